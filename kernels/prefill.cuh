// Exact causal attention of chunks of queries over exact pages of bf16:
//   out[i][h] = sum over j <= p of softmax_j(scale q[i][h] . k[j]) v[j],  p = position of row i, keys and values of KV head h / (heads / kv_heads).
//
// name        grid                           block  dynamic shared bytes: 4 (72 D + 64 (D + 8))
// prefill_D   (heads, blocks of 64 queries)  128    D 64: 36864, 80: 45568, 96: 54272, 128: 71680
// for D of 64, 80, 96, 128. Heads of one KV head are neighbours in the grid, so that they meet a page in the second-level cache.
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

// D channels; 4 warps of 16 queries each.
template <int D> struct Shape {
    static constexpr int QUERIES = 64, THREADS = 128;
    // Rows of tiles in elements: odd multiples of 16 bytes, so that the 8 rows of a matrix lie in different banks.
    static constexpr int K_ROW = PAGE + 8, V_ROW = D + 8;
    static constexpr int K_TILE = D * K_ROW, V_TILE = PAGE * V_ROW, BYTES = 2 * 2 * (K_TILE + V_TILE);
    static_assert(D % 16 == 0 && (V_ROW / 8) % 2 == 1, "rows of values would meet in banks");
};

// Keys [D][64] and values [64][D] of a page and KV head; values from position `there` of it on are zero, as what is not there yet may be NaN.
template <int D> __device__ __forceinline__ void load(u16* keys, u16* values, const u16* __restrict__ from, u32 there) {
    typedef Shape<D> S;
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

template <int D>
__device__ __forceinline__ void attend(const float* __restrict__ q, u32 q_stride, u16* __restrict__ out, const u8* __restrict__ arena, const u32* __restrict__ pages,
                                       u32 offset, const Row* __restrict__ rows, const Item* __restrict__ items, u32 kv_heads, float scale,
                                       float* __restrict__ carried, float* __restrict__ carried_state) {
    typedef Shape<D> S;
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
        load<D>(to, to + S::K_TILE, (const u16*)(arena + (u64)table[j] * 64), last + 1 - j * PAGE);
        cp_commit();
    };
    u32 count = last / PAGE + 1;
    load_page(0);

    // The row of a 16 x 16 tile, and its half, that this lane names for a load of fragments.
    u32 tile_row = lane % 16, tile_column = lane / 16 * 8, mine = warp * 16 + g;
    // Queries times scale in base 2, as fragments. Zero past the end.
    u32 a[D / 16][4];
    q += (u64)(row.first + item.query) * q_stride + head * D;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float* from = q + (u64)(mine + 8 * half) * q_stride + 2 * t;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            float2 x = mine + 8 * half < queries ? *(const float2*)(from + i * 8) : float2{0, 0};
            a[i / 2][half + i % 2 * 2] = b_pair(x.x * scale, x.y * scale);
        }
    }
    float o[D / 8][4] = {}, top[2] = {-f_of(0x7f800000), -f_of(0x7f800000)}, sum[2] = {};
    if (row.carry & CARRIED_IN) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 query = mine + 8 * half;
            if (query >= queries) continue;
            u64 line = (u64)(row.first + item.query + query) * heads + head;
            float2 state = *(const float2*)(carried_state + 2 * line);
            // Of the four lanes of a query one has the sum, which they add up at the end.
            top[half] = state.x, sum[half] = t == 0 ? state.y : 0.0f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float2 x = *(const float2*)(carried + line * D + 2 * t + n * 8);
                o[n][2 * half] = x.x, o[n][2 * half + 1] = x.y;
            }
        }
    }
    // Positions up to the first are seen by every query of the warp, none past the second by any.
    u32 all_see = min(begin + warp * 16, last), some_see = min(begin + warp * 16 + 15, last);

    for (u32 j = 0; j < count; j++) {
        cp_wait<0>();
        // Page j is there for all, and all are done with page j - 1, whose place the next one takes.
        __syncthreads();
        if (j + 1 < count) load_page(j + 1);
        const u16 *keys = shared + (j & 1) * (S::K_TILE + S::V_TILE) + tile_row * S::K_ROW + tile_column;
        const u16* values = shared + (j & 1) * (S::K_TILE + S::V_TILE) + S::K_TILE + tile_row * S::V_ROW + tile_column;
#pragma unroll 1
        for (u32 at = j * PAGE; at < j * PAGE + PAGE && at <= some_see; at += STEP, keys += STEP, values += STEP * S::V_ROW) {
            float s[STEP / 8][4] = {};
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
#pragma unroll
                for (int n = 0; n < STEP / 16; n++) {
                    u32 b[4];
                    ldsm4<true>(b, keys + k * 16 * S::K_ROW + n * 16);
                    mma_b(s[2 * n], a[k], b[0], b[1]);
                    mma_b(s[2 * n + 1], a[k], b[2], b[3]);
                }
            }
            if (at + STEP - 1 > all_see) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // A query past the end sees what the last one sees, so that it meets no more; it is not written.
                    int seen = (int)(min(begin + mine + 8 * half, last) - at - 2 * t);
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++) {
                        if (n * 8 > seen) s[n][2 * half] = -f_of(0x7f800000);
                        if (n * 8 + 1 > seen) s[n][2 * half + 1] = -f_of(0x7f800000);
                    }
                }
            }
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = top[half];
#pragma unroll
                for (int n = 0; n < STEP / 8; n++) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                shrink[half] = ex2(top[half] - most);  // position 0 is seen by all, so the greatest is finite
                top[half] = most;
                float more = 0;
#pragma unroll
                for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) { s[n][i] = ex2(s[n][i] - most); more += s[n][i]; }
                }
                sum[half] = fmaf(sum[half], shrink[half], more);
            }
            // The greatest seldom moves once a history is long, and products with one change nothing.
            if (__ballot_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) o[n][i] *= shrink[i / 2];
                }
            }
#pragma unroll
            for (int k = 0; k < STEP / 16; k++) {
                // What a product gives two neighbouring tiles of columns is what the next one takes as 16 columns.
                u32 p[4];
#pragma unroll
                for (int i = 0; i < 4; i++) p[i] = b_pair(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    u32 b[4];
                    ldsm4<true>(b, values + k * 16 * S::V_ROW + n * 16);
                    mma_b(o[2 * n], p, b[0], b[1]);
                    mma_b(o[2 * n + 1], p, b[2], b[3]);
                }
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        float inverse = 1.0f / total;
        u32 query = mine + 8 * half;
        if (query >= queries) continue;
        u64 line = (u64)(row.first + item.query + query) * heads + head;
        if (row.carry & CARRIED_OUT) {
            if (t == 0) *(float2*)(carried_state + 2 * line) = float2{top[half], total};
#pragma unroll
            for (int n = 0; n < D / 8; n++) *(float2*)(carried + line * D + 2 * t + n * 8) = float2{o[n][2 * half], o[n][2 * half + 1]};
            continue;
        }
        u16* to = out + line * D + 2 * t;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(u32*)(to + n * 8) = b_pair(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
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
#define PREFILL(D)                                                                                                              \
    KERNEL(128, 3, prefill_##D)(PrefillArgs p) { grid_wait(); grid_go();                                                        \
        prefill::attend<D>(p.q, p.q_stride, p.out, p.arena, p.pages, p.offset, p.rows, p.items, p.kv_heads, p.scale, p.carried, \
                           p.carried_state);                                                                                    \
    }
PREFILL(64)
PREFILL(80)
PREFILL(96)
PREFILL(128)
#undef PREFILL
