// Exact causal attention of chunks of queries over exact pages of bf16:
//   out[i][h] = sum over j <= p of softmax_j(scale q[i][h] . k[j]) v[j],  p = position of row i, keys and values of KV head h / (heads / kv_heads).
//
// name               grid                           block  dynamic shared bytes: 4 (72 D + 64 (D + 8)), and 256 (D + 8) for _32
// prefill_D_64_16    (heads, blocks of 64 queries)  128    D 64: 36864, 80: 45568, 96: 54272, 128:  71680
// prefill_D_128_16   (heads, blocks of 128 queries) 256          the same
// prefill_D_128_32   (heads, blocks of 128 queries) 128    D 64: 55296, 80: 68096, 96: 80896, 128: 106496
// for D of 64, 80, 96, 128. All three give the same bits; the last name is the queries of a warp, to which it loads a fragment of keys or
// values once. Heads of one KV head are neighbours in the grid, so that they meet a page in the second-level cache.
//
// Work: the blocks of queries, {row, first query of it in the block}; those that see most first. Rows: {first row in q, n, position
// of query 0, first of its pages in `pages`, seen, carry}; page j of a row holds positions 64 j and on. Pages from the last query's on are
// not asked for. Where `seen` is not zero, every query sees so many positions, and no more.
//
// A history may be met in several launches: what a query has come to so far, its sums, their weights' sum and largest exponent, is CARRIED_IN,
// CARRIED_OUT, or both: 4 (D + 2) bytes a query and head each way, little beside what queries meet of a span of pages in between.
//
// FLOPs: 4 D a pair of query and position (to whole pages). Bytes: 4 D read and 2 D written a query and head; from the second-level cache
// a page of keys and values, 256 D, a block of queries and head. Bound by the tensor cores from a few hundred positions on, and next to
// them by shared memory, which at 16 queries a warp gives 256 bytes for each product of 16 x 8 x 16.
//
// A row's result depends on the row and its history alone: pages are taken in order from position 0 whatever the chunk, and a page that a
// query does not see adds exact zeros. (Carried sums go on as they were; which pages a launch meets must not depend on the chunk either.)
#pragma once
#include "common.cuh"

namespace prefill {

struct Row { u32 first, n, position, pages, seen, carry; };
constexpr u32 CARRIED_IN = 1, CARRIED_OUT = 2;
struct Item { u32 row, query; };

// D channels; blocks of WARPS times M times 16 queries.
template <int D, int WARPS, int M> struct Shape {
    static constexpr int QUERIES = 16 * M * WARPS, THREADS = 32 * WARPS;
    // Rows of tiles in elements: odd multiples of 16 bytes, so that the 8 rows of a matrix lie in different banks.
    static constexpr int K_ROW = PAGE + 8, V_ROW = D + 8;
    static constexpr int K_TILE = D * K_ROW, V_TILE = PAGE * V_ROW, Q_TILE = M > 1 ? QUERIES * V_ROW : 0, BYTES = 2 * (2 * (K_TILE + V_TILE) + Q_TILE);
    static_assert(D % 16 == 0 && (V_ROW / 8) % 2 == 1, "rows of values would meet in banks");
};

// Keys [D][64] and values [64][D] of a page and KV head; values from position `there` of it on are zero, as what is not there yet may be NaN.
template <int D, int WARPS, int M> __device__ __forceinline__ void load(u16* keys, u16* values, const u16* __restrict__ from, u32 there) {
    typedef Shape<D, WARPS, M> S;
    constexpr int EIGHTS = D / 8, ROWS = S::THREADS / 8;
    {
        u32 row = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < D; i += ROWS)
            if (D % ROWS == 0 || i + row < D) cp16(keys + row * S::K_ROW + column + i * S::K_ROW, from + threadIdx.x * 8 + i * PAGE);
    }
    from += D * PAGE;
    if constexpr (S::THREADS % EIGHTS == 0) {
        constexpr int STEP = S::THREADS / EIGHTS;
        u32 row = threadIdx.x / EIGHTS, column = threadIdx.x % EIGHTS * 8;
#pragma unroll
        for (int i = 0; i < PAGE; i += STEP) cp16_if(values + row * S::V_ROW + column + i * S::V_ROW, from + threadIdx.x * 8 + i * D, i + row < there);
    } else {
#pragma unroll 1
        for (u32 i = threadIdx.x; i < PAGE * EIGHTS; i += S::THREADS) cp16_if(values + i / EIGHTS * S::V_ROW + i % EIGHTS * 8, from + i * 8, i / EIGHTS < there);
    }
}

constexpr int STEP = 32;  // positions whose scores a query has in registers

template <int D, int WARPS, int M>
__device__ __forceinline__ void attend(const float* __restrict__ q, u32 q_stride, u16* __restrict__ out, const u8* __restrict__ arena, const u32* __restrict__ pages,
                                       u32 offset, const Row* __restrict__ rows, const Item* __restrict__ items, u32 kv_heads, float scale,
                                       float* __restrict__ carried, float* __restrict__ carried_state) {
    typedef Shape<D, WARPS, M> S;
    SHARED(u16, shared);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 heads = gridDim.x, head = blockIdx.x, kv_head = head / (heads / kv_heads);
    Item item = items[blockIdx.y];
    Row row = rows[item.row];
    u32 queries = min(row.n - item.query, (u32)S::QUERIES), begin = row.seen ? row.seen - 1 : row.position + item.query, last = row.seen ? begin : begin + queries - 1;
    const u32* table = pages + row.pages;
    arena += offset + (u64)kv_head * 4 * D * PAGE;
    auto load_page = [&](u32 j) {
        u16* to = shared + (j & 1) * (S::K_TILE + S::V_TILE);
        load<D, WARPS, M>(to, to + S::K_TILE, (const u16*)(arena + (u64)table[j] * 64), last + 1 - j * PAGE);
        cp_commit();
    };
    u32 count = last / PAGE + 1;
    load_page(0);

    // The row of a 16 x 16 tile, and its half, that this lane names for a load of fragments.
    u32 tile_row = lane % 16, tile_column = lane / 16 * 8, mine = warp * 16 * M + g;
    // Queries times scale in base 2: as fragments, or in shared memory. Zero past the end.
    u32 a[D / 16][4];
    u16* q_tile = shared + 2 * (S::K_TILE + S::V_TILE) + warp * 16 * M * S::V_ROW;
    q += (u64)(row.first + item.query) * q_stride + head * D;
    if constexpr (M == 1) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float* from = q + (u64)(mine + 8 * half) * q_stride + 2 * t;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                float2 x = mine + 8 * half < queries ? *(const float2*)(from + i * 8) : float2{0, 0};
                a[i / 2][half + i % 2 * 2] = b_pair(x.x * scale, x.y * scale);
            }
        }
    } else {
        for (u32 i = lane; i < 16 * M * D / 2; i += 32) {
            u32 r = i / (D / 2), c = i % (D / 2) * 2, query = warp * 16 * M + r;
            float2 x = query < queries ? *(const float2*)(q + (u64)query * q_stride + c) : float2{0, 0};
            *(u32*)(q_tile + r * S::V_ROW + c) = b_pair(x.x * scale, x.y * scale);
        }
    }
    float o[M][D / 8][4] = {}, top[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -f_of(0x7f800000);
    if (row.carry & CARRIED_IN) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 query = mine + 16 * m + 8 * half;
                if (query >= queries) continue;
                u64 line = (u64)(row.first + item.query + query) * heads + head;
                float2 state = *(const float2*)(carried_state + 2 * line);
                // Of the four lanes of a query one has the sum, which they add up at the end.
                top[m][half] = state.x, sum[m][half] = t == 0 ? state.y : 0.0f;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    float2 x = *(const float2*)(carried + line * D + 2 * t + n * 8);
                    o[m][n][2 * half] = x.x, o[m][n][2 * half + 1] = x.y;
                }
            }
        }
    }
    // Positions up to the first are seen by every query of the warp, none past the second by any.
    u32 all_see = min(begin + warp * 16 * M, last), some_see = min(begin + warp * 16 * M + 16 * M - 1, last);

    for (u32 j = 0; j < count; j++) {
        cp_wait<0>();
        // Page j is there for all, and all are done with page j - 1, whose place the next one takes.
        __syncthreads();
        if (j + 1 < count) load_page(j + 1);
        const u16 *keys = shared + (j & 1) * (S::K_TILE + S::V_TILE) + tile_row * S::K_ROW + tile_column;
        const u16* values = shared + (j & 1) * (S::K_TILE + S::V_TILE) + S::K_TILE + tile_row * S::V_ROW + tile_column;
#pragma unroll 1
        for (u32 at = j * PAGE; at < j * PAGE + PAGE && at <= some_see; at += STEP, keys += STEP, values += STEP * S::V_ROW) {
            float s[M][STEP / 8][4] = {};
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                if constexpr (M > 1) {
#pragma unroll
                    for (int m = 0; m < M; m++) ldsm4<false>(a[m], q_tile + (m * 16 + tile_row) * S::V_ROW + k * 16 + tile_column);
                }
#pragma unroll
                for (int n = 0; n < STEP / 16; n++) {
                    u32 b[4];
                    ldsm4<true>(b, keys + k * 16 * S::K_ROW + n * 16);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        mma_b(s[m][2 * n], a[M > 1 ? m : k], b[0], b[1]);
                        mma_b(s[m][2 * n + 1], a[M > 1 ? m : k], b[2], b[3]);
                    }
                }
            }
            if (at + STEP - 1 > all_see) {
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        // A query past the end sees what the last one sees, so that it meets no more; it is not written.
                        int seen = (int)(min(begin + mine + 16 * m + 8 * half, last) - at - 2 * t);
#pragma unroll
                        for (int n = 0; n < STEP / 8; n++) {
                            if (n * 8 > seen) s[m][n][2 * half] = -f_of(0x7f800000);
                            if (n * 8 + 1 > seen) s[m][n][2 * half + 1] = -f_of(0x7f800000);
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < M; m++) {
                float shrink[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float most = top[m][half];
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++) most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                    shrink[half] = ex2(top[m][half] - most);  // position 0 is seen by all, so the greatest is finite
                    top[m][half] = most;
                    float more = 0;
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                        for (int i = 2 * half; i < 2 * half + 2; i++) { s[m][n][i] = ex2(s[m][n][i] - most); more += s[m][n][i]; }
                    }
                    sum[m][half] = fmaf(sum[m][half], shrink[half], more);
                }
                // The greatest seldom moves once a history is long, and products with one change nothing.
                if (__ballot_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                    for (int n = 0; n < D / 8; n++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) o[m][n][i] *= shrink[i / 2];
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < STEP / 16; k++) {
                // What a product gives two neighbouring tiles of columns is what the next one takes as 16 columns.
                u32 p[M][4];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) p[m][i] = b_pair(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
                }
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    u32 b[4];
                    ldsm4<true>(b, values + k * 16 * S::V_ROW + n * 16);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        mma_b(o[m][2 * n], p[m], b[0], b[1]);
                        mma_b(o[m][2 * n + 1], p[m], b[2], b[3]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            float inverse = 1.0f / total;
            u32 query = mine + 16 * m + 8 * half;
            if (query >= queries) continue;
            if (row.carry & CARRIED_OUT) {
                u64 line = (u64)(row.first + item.query + query) * heads + head;
                if (t == 0) *(float2*)(carried_state + 2 * line) = float2{top[m][half], total};
#pragma unroll
                for (int n = 0; n < D / 8; n++) *(float2*)(carried + line * D + 2 * t + n * 8) = float2{o[m][n][2 * half], o[m][n][2 * half + 1]};
                continue;
            }
            u16* to = out + ((u64)(row.first + item.query + query) * heads + head) * D + 2 * t;
#pragma unroll
            for (int n = 0; n < D / 8; n++) *(u32*)(to + n * 8) = b_pair(o[m][n][2 * half] * inverse, o[m][n][2 * half + 1] * inverse);
        }
    }
}

}  // namespace prefill

struct PrefillArgs {
    const u8* arena;
    const u32* pages;
    const prefill::Row* rows;
    const prefill::Item* items;
    const float* q;           // [rows][q_stride] after rope, the first heads * D of each; q_stride even
    u16* out;                 // bf16 [rows][heads * D]
    u32 q_stride, offset;     // floats; bytes, of the layer in a page
    u32 kv_heads;             // divides heads, which the grid gives
    float scale;              // of the softmax times log2 e
    float* carried;           // [rows][heads * D], and [rows][heads][2]: largest exponent, sum; of rows that carry
    float* carried_state;
};
#define PREFILL(D, WARPS, M, OCCUPANCY, name)                                                                                       \
    KERNEL(32 * WARPS, OCCUPANCY, name)(PrefillArgs p) { grid_wait(); grid_go(); \
        prefill::attend<D, WARPS, M>(p.q, p.q_stride, p.out, p.arena, p.pages, p.offset, p.rows, p.items, p.kv_heads, p.scale,      \
                                     p.carried, p.carried_state);                                                                   \
    }
PREFILL(64, 4, 1, 3, prefill_64_64_16)
PREFILL(80, 4, 1, 3, prefill_80_64_16)
PREFILL(96, 4, 1, 3, prefill_96_64_16)
PREFILL(128, 4, 1, 3, prefill_128_64_16)
PREFILL(64, 8, 1, 1, prefill_64_128_16)
PREFILL(80, 8, 1, 1, prefill_80_128_16)
PREFILL(96, 8, 1, 1, prefill_96_128_16)
PREFILL(128, 8, 1, 1, prefill_128_128_16)
PREFILL(64, 4, 2, 2, prefill_64_128_32)
PREFILL(80, 4, 2, 2, prefill_80_128_32)
PREFILL(96, 4, 2, 2, prefill_96_128_32)
PREFILL(128, 4, 2, 2, prefill_128_128_32)
#undef PREFILL
