// Decode attention over exact pages (a `full` cache; the window and sinks of a compressed one), and the merge of all parts of a row.
#pragma once
#include "rows.cuh"

// A number as it will be read from a page.
template <class E> __device__ __forceinline__ float as_stored(float x) { return sizeof(E) == 2 ? b_of(of_b(x)) : x; }

template <class E> struct Eight;
template <> struct Eight<u16> {
    uint4 v;
    __device__ __forceinline__ void load(const u8* p) { v = ld_once((const uint4*)p); }
    __device__ __forceinline__ void zero() { v = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void get(float (&x)[8]) const {
        x[0] = b_lo(v.x), x[1] = b_hi(v.x), x[2] = b_lo(v.y), x[3] = b_hi(v.y), x[4] = b_lo(v.z), x[5] = b_hi(v.z), x[6] = b_lo(v.w), x[7] = b_hi(v.w);
    }
};
template <> struct Eight<float> {
    uint4 v, w;
    __device__ __forceinline__ void load(const u8* p) { v = ld_once((const uint4*)p), w = ld_once((const uint4*)p + 1); }
    __device__ __forceinline__ void zero() { v = w = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void get(float (&x)[8]) const {
        x[0] = f_of(v.x), x[1] = f_of(v.y), x[2] = f_of(v.z), x[3] = f_of(v.w), x[4] = f_of(w.x), x[5] = f_of(w.y), x[6] = f_of(w.z), x[7] = f_of(w.w);
    }
};

// One span of one row's exact pages, and its sinks.
struct ExactItem {
    u32 row;
    // Its pages in the table, and positions of the last of them.
    u32 table, pages, last;
    // Page of the sinks block and how many positions of it are met; none where zero.
    u32 sinks_page, sinks;
    // Which of its row's spans this is, and how many they are; they are neighbours.
    u32 at, of;
};

struct ExactArgs {
    const u8* arena;
    const u32* table;
    const ExactItem* items;
    // [rows][heads][d] after rope.
    const float* q;
    // [items][heads][d], not divided by the sum, and [items][heads][2]: largest exponent, sum.
    float* out;
    float* state;
    // Where rows have no other parts: [rows][heads][d] bf16, and f32 or null, to which the last block of a row's spans merges them, and
    // [items][KV heads][head groups] blocks that have ended, zero between launches. Null where `merge` is launched.
    u16* merged;
    float* merged_f32;
    u32* ended;
    float scale;
    // Offsets of this layer in an exact page and in the sinks block; positions a sinks block has room for.
    u32 offset, sinks_offset, sinks_stride;
    int heads, kv_heads;
    // Where each row is the last position of a sequence of its own, what `rope_append` would do first (rows.cuh): queries are turned here, and
    // the position's keys and values, [rows][kv_heads][d], are met, and go to their page. Null where that is done.
    const float *k, *v;
    const float *q_norm, *k_norm;
    const float *cos, *sin;
    const u32* positions;
    float eps;
};

// score = scale log2(e) q . k;  out = sum over pos of 2^(score - m) v[pos].
//
//   A warp takes whole pages, every W-th of its span, and keeps a softmax of its own; warps meet once, at the end. Keys lie channel by
//   channel: a lane scores 8 neighbouring positions of every fourth channel. Values lie position by position: a lane sums 8
//   neighbouring channels. Both come in 16-byte loads straight into registers.
//   Bytes a position, layer and KV head: 4 d (bf16). FLOPs: 4 d a head. Memory binds: up to 8 query heads a KV head leave the adders idle.
//
//   Where rows have no sealed parts and blocks are few, a row's blocks merge it as `merge` would: one span at once, of several
//   the block that ends last, for its heads, in the order of `merge` and so to its bits. Bytes then: 4 d a span and head, out of the second-level cache.
//   Where rows' last positions are still to be appended, the block over a row's last page does it: it meets them out of shared memory, as what it
//   writes to the page is for launches behind this one.
//   Grid (items, KV heads, head groups of 4 within one), block 32 W, shared 4 (4 D + W (4 * 64 + 4 D + 8) + 2 D) bytes.
template <class E, int D, int W>
__device__ __forceinline__ void attend_exact(const ExactArgs& p) {
    constexpr int G = 4;
    constexpr int LPR = D / 8;              // lanes to a row of values
    constexpr int RPL = 32 / LPR;           // rows at once
    SHARED(float, shared);
    float* q = shared;                      // [D][G]
    float* weights = q + D * G;             // [W][64][G]
    float* parts = weights + W * PAGE * G;  // [W][G][D]
    float* states = parts + W * G * D;      // [W][G][2]
    float *new_key = states + W * G * 2, *new_value = new_key + D;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int group = p.heads / p.kv_heads, kv_head = blockIdx.y, head0 = kv_head * group + blockIdx.z * G, n = min(G, group - (int)blockIdx.z * G);
    // What is asked of it late is read late: registers are all taken in between.
    const ExactItem& own = p.items[blockIdx.x];
    const ExactItem item = own;
    // What the host uploaded is there before the launch ahead ends, and so is all of a page but the position at hand: the first page of
    // each warp is on its way meanwhile, in the cache that all writes go through.
    if (warp < (int)item.pages) {
        const u32 head_bytes = D * PAGE * sizeof(E), positions = warp + 1 == (int)item.pages ? item.last : PAGE;
        const u8* keys = p.arena + ((size_t)p.table[item.table + warp] * UNIT + (p.offset + 2 * blockIdx.y * head_bytes));
        for (u32 i = lane * 128; i < head_bytes + positions * D * sizeof(E); i += 32 * 128) prefetch(keys + i);
    }
    const bool appends = p.k && own.at + 1 == own.of;
    const size_t angles = p.k ? (size_t)p.positions[item.row] * (D / 2) : 0;
    if (p.k && tid < D / 2 && tid % 32 == 0) prefetch(p.cos + angles + tid), prefetch(p.sin + angles + tid);
    grid_wait();
    grid_go();
    if (p.k) {
        // A warp to a head, and to the keys and the values.
        static_assert(W == G, "a warp to a head");
        if (warp < n)
            rows::turn_head(p.q + ((size_t)item.row * p.heads + head0 + warp) * D, p.q_norm, p.eps, D, p.cos + angles, p.sin + angles,
                            [&](u32 c, float x) { q[c * G + warp] = x * (p.scale * 1.44269504f); });
        else
            for (int c = lane; c < D; c += 32) q[c * G + warp] = 0.0f;
        if (appends) {
            const int slot = item.last - 1;
            E* page = (E*)(p.arena + (size_t)p.table[item.table + item.pages - 1] * UNIT + p.offset) + 2 * kv_head * D * PAGE;
            const size_t from = ((size_t)item.row * p.kv_heads + kv_head) * D;
            if (warp == 2)
                rows::turn_head(p.k + from, p.k_norm, p.eps, D, p.cos + angles, p.sin + angles, [&](u32 c, float x) {
                    new_key[c] = as_stored<E>(x);
                    if (blockIdx.z == 0) rows::put(page + c * PAGE + slot, x);
                });
            if (warp == 3)
                for (int c = lane; c < D; c += 32) {
                    const float x = p.v[from + c];
                    new_value[c] = as_stored<E>(x);
                    if (blockIdx.z == 0) rows::put(page + (PAGE + slot) * D + c, x);
                }
        }
    } else {
        for (int i = tid; i < G * D; i += 32 * W) {
            const int h = i % G;
            q[i] = h < n ? p.q[((size_t)item.row * p.heads + head0 + h) * D + i / G] * (p.scale * 1.44269504f) : 0.0f;
        }
    }
    __syncthreads();
    float* mine = weights + warp * PAGE * G;
    const int head = lane / 8;
    const int row_of = lane / LPR, column = lane % LPR * 8;
    float o[G][8] = {};
    float largest = -1e30f, sum = 0;                // of `head`
    const int units = item.pages + (item.sinks > 0);
    // Pages fewer than warps are shared: a warp takes a half or a quarter of one, and more lanes to a position.
    auto meet = [&](auto split, int index, int cut) {
        constexpr int SPLIT = decltype(split)::value, CHUNKS = 8 / SPLIT, SUBS = 4 * SPLIT, OWN = PAGE / SPLIT;
        const int sub = lane / CHUNKS, chunk = cut * CHUNKS + lane % CHUNKS;    // channel of `SUBS`, positions of eight
        const bool sinks = index == (int)item.pages;
        const int stride = sinks ? p.sinks_stride : PAGE;
        const int positions = sinks ? item.sinks : index + 1 == (int)item.pages ? item.last : PAGE;
        const size_t head_bytes = (size_t)D * stride * sizeof(E);
        const u32 address = sinks ? item.sinks_page : p.table[item.table + index];
        const u8* keys = p.arena + (size_t)address * UNIT + (sinks ? p.sinks_offset : p.offset) + 2 * kv_head * head_bytes;
        const u8* values = keys + head_bytes;
        // Where there is little to meet it is latency that binds: values are on their way while keys are met.
        if (units <= W)
            for (u32 i = lane * 128; i < positions * D * sizeof(E); i += 32 * 128) prefetch(values + i);
        float s[G][8] = {};
        const bool there = 8 * chunk < stride;
#pragma unroll 8
        for (int i = 0; i < D / SUBS; i++) {
            Eight<E> k;
            const int c = SUBS * i + sub;
            if (there) k.load(keys + ((size_t)c * stride + 8 * chunk) * sizeof(E));
            else k.zero();
            float x[8];
            k.get(x);
            const float4 a = *(const float4*)(q + c * G);
#pragma unroll
            for (int j = 0; j < 8; j++) s[0][j] += a.x * x[j], s[1][j] += a.y * x[j], s[2][j] += a.z * x[j], s[3][j] += a.w * x[j];
        }
        // The position that is not in its page yet is met in the order in which it would be there, and so to the same bits.
        const int slot = appends && index + 1 == (int)item.pages ? positions - 1 : -1;
        const bool has_slot = slot >= OWN * cut && slot < OWN * (cut + 1);
        if (has_slot) {
            float score[G] = {};
            for (int i = 0; i < D / SUBS; i++) {
                const int c = SUBS * i + sub;
                const float4 a = *(const float4*)(q + c * G);
                const float x = new_key[c];
                score[0] += a.x * x, score[1] += a.y * x, score[2] += a.z * x, score[3] += a.w * x;
            }
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (8 * chunk + j == slot)
#pragma unroll
                    for (int h = 0; h < G; h++) s[h][j] = score[h];
        }
        // Over the channels of a lane's group: eight lanes end with one head, those of the same positions with the same.
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const bool upper = head & 2, odd = head & 1;
            float a = upper ? s[2][j] : s[0][j], b = upper ? s[3][j] : s[1][j];
            a += __shfl_xor_sync(~0u, upper ? s[0][j] : s[2][j], 16);
            b += __shfl_xor_sync(~0u, upper ? s[1][j] : s[3][j], 16);
            x[j] = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
#pragma unroll
            for (int i = CHUNKS; i < 8; i *= 2) x[j] += __shfl_xor_sync(~0u, x[j], i);
        }
        float top = -INFINITY;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (8 * chunk + j >= positions) x[j] = -INFINITY;
            top = fmaxf(top, x[j]);
        }
#pragma unroll
        for (int i = 1; i < CHUNKS; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        top = fmaxf(top, largest);
        const float by = ex2(largest - top);
        largest = top;
        float total = 0;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float w = ex2(x[j] - top);
            total += w;
            mine[(8 * chunk + j) * G + head] = w;
        }
        // Of lanes with the same positions one counts them.
        sum = sum * by + (lane % 8 < CHUNKS ? total : 0.0f);
        __syncwarp();
#pragma unroll
        for (int h = 0; h < G; h++) {
            const float b = __shfl_sync(~0u, by, 8 * h);
#pragma unroll
            for (int j = 0; j < 8; j++) o[h][j] *= b;
        }
        if (row_of >= RPL) return;
        auto add = [&](const Eight<E>& v, int pos) {
            float y[8];
            v.get(y);
            const float4 a = *(const float4*)(mine + pos * G);
#pragma unroll
            for (int j = 0; j < 8; j++) o[0][j] += a.x * y[j], o[1][j] += a.y * y[j], o[2][j] += a.z * y[j], o[3][j] += a.w * y[j];
        };
        auto row = [&](int pos) { return values + ((size_t)pos * D + column) * sizeof(E); };
        if (SPLIT == 1 && positions == PAGE && !has_slot) {
#pragma unroll 8
            for (int i = 0; i < (PAGE + RPL - 1) / RPL; i++) {
                Eight<E> v;
                if (PAGE % RPL && i * RPL + row_of >= PAGE) break;
                v.load(row(i * RPL + row_of));
                add(v, i * RPL + row_of);
            }
            return;
        }
        // Eight rows are on their way at once, whatever their number. What lies beyond the last position may be anything, NaN too: it is not read.
        const int end = min(positions - has_slot, OWN * (cut + 1));
        for (int pos = OWN * cut + row_of; pos < end; pos += 8 * RPL) {
            Eight<E> v[8];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (pos + e * RPL < end) v[e].load(row(pos + e * RPL));
                else v[e].zero();
            }
#pragma unroll
            for (int e = 0; e < 8; e++) add(v[e], min(pos + e * RPL, OWN * (cut + 1) - 1));
        }
        if (has_slot && row_of == (slot - OWN * cut) % RPL) {
            const float4 a = *(const float4*)(mine + slot * G);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float y = new_value[column + j];
                o[0][j] += a.x * y, o[1][j] += a.y * y, o[2][j] += a.z * y, o[3][j] += a.w * y;
            }
        }
    };
    static_assert(W == 4, "a page in as many parts as warps, or in half as many");
    if (units == 1) meet(Int<4>(), 0, warp);
    else if (units == 2) meet(Int<2>(), warp / 2, warp % 2);
    else
#pragma unroll 1
        for (int index = warp; index < units; index += W) meet(Int<1>(), index, 0);
    // One state of the warp: sums over chunks of positions, values over rows.
#pragma unroll
    for (int i = 1; i < 8; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane % 8 == 0) states[(warp * G + head) * 2] = largest, states[(warp * G + head) * 2 + 1] = sum;
    float* part = parts + warp * G * D;
    for (int r = 0; r < RPL; r++) {
        __syncwarp();
        if (row_of == r) {
#pragma unroll
            for (int h = 0; h < G; h++)
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float& x = part[h * D + column + j];
                    x = r == 0 ? o[h][j] : x + o[h][j];
                }
        }
    }
    __syncthreads();
    for (int i = tid; i < n * D; i += 32 * W) {
        const int h = i / D, c = i % D;
        float top = -1e30f, value = 0, total = 0;
        for (int w = 0; w < W; w++) top = fmaxf(top, states[(w * G + h) * 2]);
        for (int w = 0; w < W; w++) {
            const float by = ex2(states[(w * G + h) * 2] - top);
            value += by * parts[(w * G + h) * D + c];
            total += by * states[(w * G + h) * 2 + 1];
        }
        if (p.merged && own.of == 1) {
            // Of one part the weight is one.
            const size_t at = ((size_t)item.row * p.heads + head0 + h) * D + c;
            const float y = (0.0f + value) / total;
            p.merged[at] = of_b(y);
            if (p.merged_f32) p.merged_f32[at] = y;
            continue;
        }
        const size_t line = (size_t)blockIdx.x * p.heads + head0 + h;
        p.out[line * D + c] = value;
        if (c == 0) p.state[2 * line] = top, p.state[2 * line + 1] = total;
    }
    if (!p.merged || own.of == 1) return;
    __threadfence();
    __syncthreads();
    const size_t first = blockIdx.x - own.at;
    u32* ended = p.ended + (first * gridDim.y + blockIdx.y) * gridDim.z + blockIdx.z;
    const bool end = any_of_block(tid == 0 && atomicAdd(ended, 1u) == own.of - 1);
    if (!end) return;
    __threadfence();
    if (tid == 0) *ended = 0;
    const int spans = own.of;
    float* sums = shared;                   // [G]
    float* by = sums + G;                   // [G][spans]
    auto load = [](const float* x) { return ld_fresh(x); };
    if (warp < n) {
        const float* state = p.state + (first * p.heads + head0 + warp) * 2;
        const size_t step = (size_t)p.heads * 2;
        float top = -1e30f;
        for (int i = lane; i < spans; i += 32) top = fmaxf(top, load(state + i * step));
        top = warp_max(top);
        float sum = 0;
        for (int i = lane; i < spans; i += 32) {
            const float w = ex2(load(state + i * step) - top);
            by[warp * spans + i] = w;
            sum = fmaf(w, load(state + i * step + 1), sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) sums[warp] = sum;
    }
    __syncthreads();
    // Neighbouring elements of all heads to neighbouring threads.
    constexpr int EACH = (G * D + 32 * W - 1) / (32 * W);
    static_assert(W >= G, "a warp weighs the parts of a head");
    const float* from = p.out + (first * p.heads + head0) * D;
    float y[EACH] = {};
#pragma unroll 8
    for (int k = 0; k < spans; k++)
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = tid + e * 32 * W;
            if (i < n * D) y[e] = fmaf(by[i / D * spans + k], load(from + (size_t)k * p.heads * D + i), y[e]);
        }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int i = tid + e * 32 * W;
        if (i >= n * D) continue;
        const size_t at = ((size_t)item.row * p.heads + head0) * D + i;
        const float merged = y[e] / sums[i / D];
        p.merged[at] = of_b(merged);
        if (p.merged_f32) p.merged_f32[at] = merged;
    }
}

KERNEL(128, 4, attend_exact_b16_64)(ExactArgs p) { attend_exact<u16, 64, 4>(p); }
KERNEL(128, 4, attend_exact_b16_80)(ExactArgs p) { attend_exact<u16, 80, 4>(p); }
KERNEL(128, 4, attend_exact_b16_96)(ExactArgs p) { attend_exact<u16, 96, 4>(p); }
KERNEL(128, 4, attend_exact_b16_128)(ExactArgs p) { attend_exact<u16, 128, 4>(p); }
KERNEL(128, 3, attend_exact_f32_64)(ExactArgs p) { attend_exact<float, 64, 4>(p); }
KERNEL(128, 3, attend_exact_f32_80)(ExactArgs p) { attend_exact<float, 80, 4>(p); }
KERNEL(128, 3, attend_exact_f32_96)(ExactArgs p) { attend_exact<float, 96, 4>(p); }
KERNEL(128, 3, attend_exact_f32_128)(ExactArgs p) { attend_exact<float, 128, 4>(p); }

// What a row's parts are: ranges of items.
struct MergeRow {
    u32 row, sealed, sealed_end, exact, exact_end;
};

struct MergeArgs {
    const MergeRow* rows;
    // As `attend_sealed` and `attend_exact` leave them.
    const u16* sealed;
    const float* sealed_state;
    const float* exact;
    const float* exact_state;
    // Turns value latents into a head's values: [kv_heads][rank][d] f16, and the mean [kv_heads][d].
    const u16* up;
    const float* mean;
    // [rows][heads * d] bf16, and f32 where not null.
    u16* out;
    float* out_f32;
    int heads, kv_heads, d, rank, tiles;
};

// Threads of a block of `merge`. So many leave each of two blocks the registers for what comes of eight parts: of 512 the compiler had two on
// their way at once.
constexpr int MERGE_THREADS = 384;

// latent[slice][h][r] = sum over every slices-th part of by[h][part] from[part][h][r], V elements to a thread.
template <int V>
__device__ __forceinline__ void merge_latents(float* latent, const u16* from, u32 step, const float* by, int parts, int ns, int n, int rank, int slices, int tid) {
    const int each = rank / V;
    for (int i = tid; i < slices * 4 * each; i += MERGE_THREADS) {
        const int slice = i / (4 * each), h = i / each % 4, r = i % each * V;
        if (h >= n) continue;
        // Eight parts are on their way at once, whatever their number: what is beyond the last is zero.
        float x[V] = {};
        for (int k = slice; k < ns; k += 8 * slices) {
            u32 v[8][V / 2] = {};
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (k + e * slices >= ns) continue;
                const u32* at = (const u32*)(from + ((k + e * slices) * step + h * rank + r));
                if (V == 8) *(uint4*)v[e] = *(const uint4*)at;
                else *(uint2*)v[e] = *(const uint2*)at;
            }
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float w = k + e * slices < ns ? by[h * parts + k + e * slices] : 0.0f;
#pragma unroll
                for (int j = 0; j < V / 2; j++) x[2 * j] += w * h_lo(v[e][j]), x[2 * j + 1] += w * h_hi(v[e][j]);
            }
        }
#pragma unroll
        for (int j = 0; j < V; j += 4) *(float4*)(latent + (slice * 4 + h) * rank + r + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
    }
}

// out[head] = (sum over sealed parts of w (up . latents + mean) + sum over exact parts of w values) / sum of w,  w = 2^(m - max m).
//
//   Four heads of one KV head at a time, which share `up`. Grid (rows, KV heads), block MERGE_THREADS, shared
//   bytes 4 (4 (parts up to 4) + 4 max(rank slices, cuts d) + 8) with slices = max(1, 2 MERGE_THREADS / rank), of half as many where 8 does
//   not divide the rank, and cuts = MERGE_THREADS / (d / 2).
//   Bytes a row and head: 2 rank a sealed part, 4 d an exact one, and `up` out of L2 once a KV head: latency and L2 bind.
KERNEL(MERGE_THREADS, 2, merge)(MergeArgs p) {
    SHARED(float, shared);
    // Of the host's, so there before the wait.
    const MergeRow row = p.rows[blockIdx.x];
    // `up`, which no launch writes, is met last; it is on its way from now on.
    if (row.sealed_end > row.sealed)
        for (int i = threadIdx.x * 64; i < p.rank * p.d; i += MERGE_THREADS * 64) prefetch(p.up + (size_t)blockIdx.y * p.rank * p.d + i);
    grid_wait();
    grid_go();
    const int kv_head = blockIdx.y, tid = threadIdx.x, warp = tid / 32, lane = tid % 32, group = p.heads / p.kv_heads;
    const int ns = row.sealed_end - row.sealed, ne = row.exact_end - row.exact, parts = (ns + ne + 3) / 4 * 4;
    float* sums = shared;               // [4][2]: of weights, sealed and exact
    float* by = sums + 8;               // [4][parts]
    float* latent = by + 4 * parts;     // [slices][4][rank], then [cuts][4][d]
    const int slices = p.rank > 0 ? max(1, (p.rank % 8 == 0 ? 2 : 1) * MERGE_THREADS / p.rank) : 0;
    for (int first = 0; first < group; first += 4) {
        const int n = min(4, group - first), head0 = kv_head * group + first;
        __syncthreads();
        if (warp < n) {
            const float* ss = p.sealed_state + ((size_t)row.sealed * p.tiles * 16 + head0 + warp) * 4;
            const float* es = p.exact_state + ((size_t)row.exact * p.heads + head0 + warp) * 2;
            const size_t ss_step = (size_t)p.tiles * 64, es_step = (size_t)p.heads * 2;
            float top = -1e30f;
#pragma unroll 4
            for (int i = lane; i < ns; i += 32) top = fmaxf(top, ss[i * ss_step]);
            for (int i = lane; i < ne; i += 32) top = fmaxf(top, es[i * es_step]);
            top = warp_max(top);
            float sealed = 0, exact = 0;
#pragma unroll 4
            for (int i = lane; i < ns; i += 32) {
                const float4 s = *(const float4*)(ss + i * ss_step);
                const float w = ex2(s.x - top);
                by[warp * parts + i] = w * s.z;
                sealed += w * s.y;
            }
            for (int i = lane; i < ne; i += 32) {
                const float w = ex2(es[i * es_step] - top);
                by[warp * parts + ns + i] = w;
                exact = fmaf(w, es[i * es_step + 1], exact);
            }
            sealed = warp_sum(sealed), exact = warp_sum(exact);
            if (lane == 0) sums[2 * warp] = sealed, sums[2 * warp + 1] = exact;
        }
        __syncthreads();
        if (ns > 0) {
            // Latents: some neighbouring elements of a head to a thread, parts in slices.
            const u16* from = p.sealed + ((size_t)row.sealed * p.tiles * 16 + head0) * p.rank;
            // All of a slice's results are fewer than 2^32.
            const u32 step = p.tiles * 16 * p.rank;
            if (p.rank % 8 == 0) merge_latents<8>(latent, from, step, by, parts, ns, n, p.rank, slices, tid);
            else merge_latents<4>(latent, from, step, by, parts, ns, n, p.rank, slices, tid);
            __syncthreads();
            for (int i = tid; i < n * p.rank; i += MERGE_THREADS)
                for (int slice = 1; slice < slices; slice++) latent[i] += latent[slice * 4 * p.rank + i];
            __syncthreads();
        }
        // Values: two neighbouring channels of all four heads to a thread, latents in slices.
        const int pairs = p.d / 2, cuts = MERGE_THREADS / pairs, cut = tid / pairs, pair = tid % pairs;
        float x[4][2] = {};
        if (ns > 0 && cut < cuts) {
            const u32* up = (const u32*)(p.up + (size_t)kv_head * p.rank * p.d) + pair;
            for (int r = cut; r < p.rank; r += 8 * cuts) {
                u32 u[8];
#pragma unroll
                for (int e = 0; e < 8; e++) u[e] = r + e * cuts < p.rank ? up[(size_t)(r + e * cuts) * pairs] : 0;
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    if (r + e * cuts >= p.rank) break;
                    const float lo = h_lo(u[e]), hi = h_hi(u[e]);
#pragma unroll
                    for (int h = 0; h < 4; h++) {
                        const float l = h < n ? latent[h * p.rank + r + e * cuts] : 0.0f;
                        x[h][0] += l * lo, x[h][1] += l * hi;
                    }
                }
            }
        }
        __syncthreads();
        float* cutsums = latent;        // [cuts][4][d]
        if (cut < cuts)
#pragma unroll
            for (int h = 0; h < 4; h++) *(float2*)(cutsums + (cut * 4 + h) * p.d + 2 * pair) = make_float2(x[h][0], x[h][1]);
        __syncthreads();
        for (int i = tid; i < n * p.d; i += MERGE_THREADS) {
            const int h = i / p.d, c = i % p.d;
            float y = 0;
            if (ns > 0) {
                y = sums[2 * h] * p.mean[kv_head * p.d + c];
                for (int k = 0; k < cuts; k++) y += cutsums[(k * 4 + h) * p.d + c];
            }
            const float* from = p.exact + ((size_t)row.exact * p.heads + head0 + h) * p.d + c;
            for (int k = 0; k < ne; k += 8) {
                float v[8];
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = from[(size_t)min(k + e, ne - 1) * p.heads * p.d];
#pragma unroll
                for (int e = 0; e < 8; e++)
                    if (k + e < ne) y = fmaf(by[h * parts + ns + k + e], v[e], y);
            }
            y /= (ns > 0 ? sums[2 * h] : 0.0f) + sums[2 * h + 1];
            const size_t at = ((size_t)row.row * p.heads + head0 + h) * p.d + c;
            p.out[at] = of_b(y);
            if (p.out_f32) p.out_f32[at] = y;
        }
    }
}
