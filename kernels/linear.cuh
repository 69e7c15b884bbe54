// Products of activations with weights: y[row][o] = sum over k of x[row][k] W[o][k] + bias[o].
//
// x[rows][in] and W[out][in] are bf16, row-major, 16-byte aligned, `in` and `ldx` multiples of 8; sums are f32. linear_normed_* take x
// in f32 and norm it themselves.
//
//   name                  outputs of a tile   rows         threads   dynamic shared bytes
//   linear_few_m1_n{N}    16                  1 ..= 8 N    256       65536 + 4096 N          N = 1, 2, 4, 8
//   linear_few_m2_n{N}    32, gated 16        1 ..= 8 N    256       65536 + 4096 N          N = 1, 2, 4, 8
//   linear_few_m4_n{N}    64, gated 32        1 ..= 8 N    256       131072 + 4096 N         N = 4, 8
//   linear_worn_m{1,2}_n{N}  as linear_few, with adapters' updates      65536 + 5120 N + 3072      N = 1, 2, 4, 8
//   linear_normed_m{1,2}  as linear_few_*_n1  1 ..= 8      256       65536 + rows (512 + 2 line), line = 64 floor((in + 31) / 64) + 32
//   linear_many           128, gated 64       any          256       65536
//
// All take one parameter, a Linears by value (192 bytes), linear_worn_* a LinearsWorn (248), linear_normed_* a LinearsNormed (208).
// tiles = sum over jobs of ceil(out / outputs of a tile).
//   linear_few_*:  grid = (min(tiles, multiprocessors * B)), B = 1 for n8 and m4, 3 for n1 and n2 where shared memory has room, else 2. Any grid gives the same bits.
//   linear_normed_*: the same; worth it while normed rows leave room for as many blocks as linear_few_* would have at once.
//   linear_many:   grid = (ceil(rows / 128), tiles).
// The host must raise MAX_DYNAMIC_SHARED_SIZE_BYTES, and had best ask for a carve-out of B blocks and no more: x lives in what is left
// as first-level cache. m4 and linear_worn_*_n8 do not fit sm_86, sm_89 and sm_120 (99 KiB); everything else does. Gated jobs need m2, m4 or linear_many.
// m1, m2 and m4 give the same bits: the larger m reads x more rarely, the smaller fills the device with fewer outputs.
// Launches may ask for programmatic stream serialization: until grid_wait only W, a norm's weight and tables of adapters are read, so the
// launch ahead must not write them.
//
// A row's bits depend on that row, W and `in` alone, within linear_few_* and within linear_many; the two differ from one another.
// linear_normed_* gives those of rms_norm and then linear_few_*.
#pragma once
#include "lora.cuh"
#include "rows.cuh"

// What becomes of a sum. GATED: y = silu(sum of w[0]) * (sum of w[1]), in bf16.
constexpr int LINEAR_F32 = 0, LINEAR_BF16 = 1, LINEAR_ADD = 2, LINEAR_GATED = 3;

// One matrix, or two of a gated pair; 56 bytes.
struct Linear {
    const u16* w[2];       // w[1]: of a gated pair only
    const float* bias[2];  // null where there is none
    void* y;               // y[rows][ldy], f32 or bf16 (BF16, GATED); ADD adds onto f32
    int out, ldy, mode, pad;
};
struct Linears {
    Linear job[3];
    const void* x;  // bf16; f32 of a LinearsNormed
    int jobs, rows, in, ldx;
};
// Of rows that are normed first: their norm's weight, f32 [in].
struct LinearsNormed {
    Linears linears;
    const float* weight;
    float eps;
    u32 pad;
};
// What adapters add to some jobs, shrunk already (lora_shrink): no segment has more than 64 rows, so segments are its items.
struct LinearsWorn {
    Linears linears;
    const lora::Worn* worn;
    const u16* high;
    const u16* low;
    u32 segments, stride;
    // Of each job, of a gated one two: the place in adapters' tables, and which of lora_shrink's targets; NOBODY where there is none.
    u16 place[3][2];
    u16 target[3][2];
};
static_assert(sizeof(Linear) == 56 && sizeof(Linears) == 192 && sizeof(LinearsWorn) == 248 && sizeof(LinearsNormed) == 208, "the host lays these out too");
constexpr u16 UNTOUCHED = 0xffff;

template <int PLAIN> __device__ __forceinline__ int linear_tiles(const Linear& j) {
    return j.mode == LINEAR_GATED ? (j.out + PLAIN / 2 - 1) / (PLAIN / 2) : (j.out + PLAIN - 1) / PLAIN;
}
// Finds the job of a tile; `tile` becomes the tile's first output.
template <int PLAIN> __device__ __forceinline__ int linear_find(const Linears& p, int& tile) {
    int j = 0;
    for (; j < p.jobs - 1; j++) {
        const int n = linear_tiles<PLAIN>(p.job[j]);
        if (tile < n) break;
        tile -= n;
    }
    tile *= p.job[j].mode == LINEAR_GATED ? PLAIN / 2 : PLAIN;
    return j;
}
__device__ __forceinline__ float linear_gate(float gate, float up) { return gate / (1.0f + ex2(gate * -1.44269504f)) * up; }

// Where what a segment adds to an output lies; the three of a segment are those of the jobs, or of the two halves of a gated one.
struct LinearUpdate {
    const u32* up;
    u32 rank, first;    // 0: nothing
};
static_assert(sizeof(LinearUpdate) == 16, "so much shared memory is asked for");
__device__ __forceinline__ LinearUpdate linear_update_of(const LinearsWorn& w, u32 segment, u32 i) {
    const bool gated = w.linears.job[0].mode == LINEAR_GATED;
    const u32 job = gated ? 0 : i, half = gated ? i : 0;
    if (half > 1 || w.target[job][half] == UNTOUCHED) return {nullptr, 0, 0};
    const lora::Worn worn = w.worn[segment];
    const lora::Site& site = worn.sites[w.place[job][half]];
    return {site.up, site.rank, worn.first << 16 | worn.rows};
}
// Asks for the factors of a tile that it will need when its products are summed.
template <int MT> __device__ __forceinline__ void linear_ahead(const Linears& p, const LinearsWorn& w, const LinearUpdate* updates, int tile) {
    const int job = linear_find<MT * 16>(p, tile);
    const bool pair = MT > 1 && p.job[job].mode == LINEAR_GATED;
    const u32 lane = threadIdx.x & 31;
    for (u32 segment = threadIdx.x >> 5; segment < w.segments; segment += 8)
        for (int h = 0; h < (pair ? 2 : 1); h++) {
            const LinearUpdate& u = updates[segment * 3 + (pair ? h : job)];
            const u32 pairs = (u.rank + 1) / 2;
            // 16 outputs of two ranks are 64 bytes, 32 are a line.
            for (u32 i = lane; i < pairs; i += 32) prefetch(u.up + ((size_t)(tile >> 6) * pairs + i) * 64 + (tile & 63));
        }
}
// What adapters add to a tile of MT times 16 outputs of a job, into its slots. A warp takes every eighth segment, all ranks of it in
// order, so the sum of a row does not depend on the others; where registers allow, two segments at a time. Bytes: 2 rank 16 MT of `up`
// a segment; bound by the latency of reading it.
template <int MT, int NT> __device__ __forceinline__ void linear_update(const LinearsWorn& w, const LinearUpdate* updates, u32 job, bool pair, int at, float* extra) {
    constexpr u32 TWO = NT <= 2 ? 2 : 1;
    const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    for (u32 first = threadIdx.x >> 5; first < w.segments; first += 8 * TWO) {
        // Of a segment: its rows, and the tiles of 8 rows they are in.
        u32 rows[TWO], from[TWO], tile[TWO], tiles[TWO], most = 0;
#pragma unroll
        for (u32 s = 0; s < TWO; s++) {
            const u32 segment = first + s * 8;
            u32 where = 0;
            if (segment < w.segments) where = updates[segment * 3 + (pair ? 0 : job)].first | (pair ? updates[segment * 3 + 1].first : 0);
            from[s] = where >> 16, rows[s] = where & 0xffff, tile[s] = from[s] / 8;
            tiles[s] = rows[s] ? (from[s] + rows[s] + 7) / 8 - tile[s] : 0;
            most = max(most, tiles[s]);
        }
        for (u32 n = 0; n < most; n++) {
            float acc[TWO][MT][4] = {};
            u32 ranks = 0;
#pragma unroll
            for (u32 s = 0; s < TWO; s++)
                for (u32 h = 0; h < (pair ? 2 : 1); h++)
                    if (n < tiles[s]) ranks = max(ranks, updates[(first + s * 8) * 3 + (pair ? h : job)].rank);
            for (u32 k = 0; k < ranks; k += 16) {
                u32 a[TWO][MT][4], b[TWO][MT][4];
#pragma unroll
                for (u32 s = 0; s < TWO; s++)
#pragma unroll
                    for (u32 m = 0; m < MT; m++) {
                        const u32 which = pair ? m & 1 : job;
                        LinearUpdate u = {nullptr, 0, 0};
                        if (n < tiles[s]) u = updates[(first + s * 8) * 3 + which];
                        const bool there = k < u.rank;
                        const u32 pairs = there ? (u.rank + 1) / 2 : 0, o = at + (pair ? m >> 1 : m) * 16, row = (tile[s] + n) * 8 + g - from[s];
                        const size_t up = ((size_t)(o >> 6) * pairs + k / 2 + t) * 64 + (o & 63) + g;
                        const u32 target = pair ? w.target[0][which] : w.target[which][0];
                        const size_t shrunk = (((size_t)target * w.segments + first + s * 8) * lora::ROWS + row) * w.stride + k + t * 2;
                        const bool mine = there && row < rows[s];
#pragma unroll
                        for (u32 i = 0; i < 4; i++) {
                            a[s][m][i] = k / 2 + (i >> 1) * 4 + t < pairs ? u.up[up + (i >> 1) * 256 + (i & 1) * 8] : 0;
                            b[s][m][i] = mine ? *reinterpret_cast<const u32*>((i < 2 ? w.low : w.high) + shrunk + (i & 1) * 8) : 0;
                        }
                    }
#pragma unroll
                for (u32 s = 0; s < TWO; s++)
#pragma unroll
                    for (u32 m = 0; m < MT; m++) {
                        mma_b(acc[s][m], a[s][m], b[s][m][0], b[s][m][1]);
                        mma_b(acc[s][m], a[s][m], b[s][m][2], b[s][m][3]);
                    }
            }
#pragma unroll
            for (u32 s = 0; s < TWO; s++)
#pragma unroll
                for (u32 c = 0; c < 4; c++)
                    if (n < tiles[s] && (tile[s] + n) * 8 + t * 2 + (c & 1) - from[s] < rows[s])
#pragma unroll
                        for (u32 m = 0; m < MT; m++)
                            extra[m * NT * 128 + ((tile[s] + n) * 8 + (c & 1) * 4 + t) * 16 + ((g + (c >> 1) * 8) ^ ((t >> 1) << 3))] = acc[s][m][c];
        }
    }
}

// Decode: rows <= 8 NT.
//
// Shapes: x[rows][in], W[out][in], y[rows][out]. Bytes: 2 in out of W, once; x comes from the caches, 2 in rows for each tile.
// FLOPs: 2 rows in out, of which the tensor cores do 16 NT in out. Bound by the reading of W: 8 NT FLOPs per byte at most, where an
// H200 has about 240 to spend.
//
// W is the A operand, so 16 outputs by 16 k meet 8 rows in one product, and each row of x has a column of its own: its sum cannot
// depend on the others. Rows that do not exist are zeros in registers.
//
// A chunk is 64 k. Warp w of 8 sums chunks w, w + 8, ... in this order, then the eight sums are added in the order of w. A unit, 16
// outputs of a chunk, is 2 KiB: each warp keeps a ring of its own of them, filled by asynchronous copies of whole lines, so no warp
// waits for another until a tile ends, and copies run on across the ends of tiles. 2 blocks hold 96 KiB in flight, and the first of
// it before the wait for the launch ahead.
//
// k is permuted alike in both operands: lane 4 g + t takes the 8 k from 8 t of a half chunk as its share of two products, which makes
// every access one of 16 bytes.
//
// Of a `normed` launch x is f32, and each block norms all of it for itself, into shared memory, while its first weights are on their way:
// 4 rows in bytes a block, out of the second-level cache, instead of a launch between two others that wait for each other.
template <int MT, int NT, bool WORN, bool NORMED> __device__ __forceinline__ void linear_few(const Linears& p, const LinearsWorn* w, const LinearsNormed* norm) {
    constexpr int S = MT == 4 ? 8 : 4, UNIT = 2048, STEP = 8 * 64;
    static_assert((S & (S - 1)) == 0 && S % MT == 0, "");
    static_assert(!NORMED || (NT == 1 && !WORN), "what adapters shrink is normed apart");
    SHARED(u8, shared);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    float* sums = reinterpret_cast<float*>(shared + 8 * S * UNIT);
    const int in = p.in, rows = p.rows, k0 = warp * 64;
    // Sums of a warp: slots of all rows of its tiles, or of those there are. Then normed rows, a line apart: neighbours in other banks.
    const int slots = NORMED ? rows * 16 : NT * 128, line = (in + 31) / 64 * 64 + 32;
    u16* normed = reinterpret_cast<u16*>(sums + 8 * slots);
    // What adapters add, slots like a warp's; zeros but between the barriers of a tile's end. Then where each segment's factors are.
    float* extra = sums + 8 * NT * 128;
    LinearUpdate* updates = reinterpret_cast<LinearUpdate*>(extra + 2 * NT * 128);
    int tiles = 0;
    for (int j = 0; j < p.jobs; j++) tiles += linear_tiles<MT * 16>(p.job[j]);

    // What is copied next: lane l brings 16 bytes of row l / 8 of every four.
    const int fr = lane >> 3, fc = lane & 7;
    u8* into = shared + warp * (S * UNIT) + fr * 128 + ((fc ^ ((fr & 1) << 2)) << 4);
    const u16 *w0 = nullptr, *w1 = nullptr;
    int left = 0, f_tile = blockIdx.x, f_k = k0;
    bool gated = false;
    auto open = [&] {
        left = 0;
        if (f_tile < tiles && k0 < in) {
            int at = f_tile;
            const Linear& j = p.job[linear_find<MT * 16>(p, at)];
            gated = MT > 1 && j.mode == LINEAR_GATED;
            left = j.out - at - fr;
            size_t o = (size_t)(at + fr) * in + fc * 8;
            w0 = j.w[0] + o;
            if (MT > 1) w1 = (gated ? j.w[1] : j.w[0]) + o;
        }
    };
    auto feed = [&](int m, int slot) {
        const u16* w = (MT > 1 && (m & 1) ? w1 : w0) + f_k;
        const bool there = f_k + fc * 8 < in;
        const int r0 = (gated ? m >> 1 : m) * 16;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = r0 + i * 4;
            cp16_if(into + slot * UNIT + i * 512, w + (size_t)r * in, there && r < left);
        }
        cp_commit();
        if (m == MT - 1 && (f_k += STEP) >= in) {
            f_k = k0;
            f_tile += gridDim.x;
            open();
        }
    };
    open();
    // Not unrolled: a short start of the code is soonest there.
#pragma unroll 1
    for (int u = 0; u < S - 1; u++) feed(u % MT, u);
    if (WORN) {
        for (int i = tid; i < MT * NT * 128; i += 256) extra[i] = 0.0f;
        for (u32 i = tid; i < w->segments * 3; i += 256) updates[i] = linear_update_of(*w, i / 3, i % 3);
        __syncthreads();
    }
    float4 scale[rows::KEEP];
    if (NORMED)
#pragma unroll
        for (int i = 0; i < rows::KEEP; i++)
            if (tid + i * 256 < in / 4) scale[i] = reinterpret_cast<const float4*>(norm->weight)[tid + i * 256];
    grid_wait();
    grid_go();
    if (NORMED) {
        const float4* x = static_cast<const float4*>(p.x);
        const int quads = in / 4, ld = p.ldx / 4;
        float4 keep[rows::KEEP];
        for (int r = 0; r < rows; r++) {
            const float sum = warp_sum(rows::norm_squares(x + (size_t)r * ld, quads, keep));
            if (lane == 0) sums[r * 8 + warp] = sum;
        }
        __syncthreads();
        // The last row's quads are at hand still.
#pragma unroll 1
        for (int r = rows - 1; r >= 0; r--) {
            const float inverse = rows::norm_inverse(sums + r * 8, in, norm->eps);
            const float4* from = x + (size_t)r * ld;
            uint2* to = reinterpret_cast<uint2*>(normed + r * line);
#pragma unroll
            for (int k = 0; k < rows::KEEP; k++) {
                const int i = tid + k * 256;
                if (i < quads) to[i] = rows::norm_quad(r == rows - 1 ? keep[k] : from[i], inverse, scale[k]);
            }
#pragma unroll 1
            for (int i = tid + rows::KEEP * 256; i < quads; i += 256) to[i] = rows::norm_quad(from[i], inverse, reinterpret_cast<const float4*>(norm->weight)[i]);
        }
        __syncthreads();
    }

    const int from = warp * (S * UNIT) + g * 128 + ((t ^ ((g & 1) << 2)) << 4);
    const u16* xl = (NORMED ? normed + g * line : static_cast<const u16*>(p.x) + (size_t)g * p.ldx) + t * 8;
    int slot = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float acc[MT][NT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[m][n][c] = 0.0f;
        if (WORN) linear_ahead<MT>(p, *w, updates, tile);
        for (int k = k0; k < in; k += STEP) {
            uint4 b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    b[n][h] = make_uint4(0, 0, 0, 0);
                    if (n * 8 + g < rows && k + h * 32 + t * 8 < in) b[n][h] = *reinterpret_cast<const uint4*>(xl + (size_t)(n * 8) * p.ldx + k + h * 32);
                }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                // The unit is here for all lanes, and all have read the one before: its place is free.
                cp_wait<S - 2>();
                __syncwarp();
                feed((m + S - 1) % MT, (slot + S - 1) & (S - 1));
                const int unit = from + slot * UNIT;
                slot = (slot + 1) & (S - 1);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    // The second half lies 64 bytes on, or before, where rows are odd.
                    const u8* q = shared + (unit ^ (h * 64));
                    const uint4 lo = *reinterpret_cast<const uint4*>(q), hi = *reinterpret_cast<const uint4*>(q + 1024);
                    const u32 a0[4] = {lo.x, hi.x, lo.y, hi.y}, a1[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        mma_b(acc[m][n], a0, b[n][h].x, b[n][h].y);
                        mma_b(acc[m][n], a1, b[n][h].z, b[n][h].w);
                    }
                }
            }
        }
        int at = tile;
        const Linear& j = p.job[linear_find<MT * 16>(p, at)];
        const bool pair = MT > 1 && j.mode == LINEAR_GATED;
        const int job = (int)(&j - p.job);
        constexpr int PER = (NT * 128 + 255) / 256;
        float held[PER] = {};
        // sums[warp][n][c % 2][t][output]: 4 t apart by banks of 8, hence the exchange of halves; [warp][row][output] where few are normed.
#pragma unroll
        for (int m = 0; m < MT; m++) {
            __syncthreads();
            if (WORN && m == 0) linear_update<MT, NT>(*w, updates, job, pair, at, extra);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int o = (g + (c >> 1) * 8) ^ ((t >> 1) << 3), row = t * 2 + (c & 1);
                    if (!NORMED) sums[((warp * NT + n) * 8 + (c & 1) * 4 + t) * 16 + o] = acc[m][n][c];
                    else if (row < rows) sums[warp * slots + row * 16 + o] = acc[m][n][c];
                }
            __syncthreads();
#pragma unroll
            for (int e = 0; e < PER; e++) {
                const int i = tid + e * 256, place = i >> 4;
                const int row = NORMED ? place : (place >> 3) * 8 + (place & 3) * 2 + (place >> 2 & 1);
                const int o = at + (pair ? m >> 1 : m) * 16 + ((i & 15) ^ (((NORMED ? place >> 2 : place >> 1) & 1) << 3));
                if (NT == 1 && tid >= 128) continue;
                float update = 0.0f;
                if (WORN) update = extra[m * NT * 128 + i], extra[m * NT * 128 + i] = 0.0f;
                if (row < rows && o < j.out) {
                    float v = sums[i];
#pragma unroll
                    for (int w = 1; w < 8; w++) v += sums[w * slots + i];
                    const float* bias = j.bias[pair ? m & 1 : 0];
                    if (bias) v += bias[o];
                    const size_t y = (size_t)row * j.ldy + o;
                    if (j.mode == LINEAR_ADD) v += static_cast<float*>(j.y)[y];
                    // Last, as where it is added apart.
                    if (WORN) v += update;
                    if (j.mode == LINEAR_F32 || j.mode == LINEAR_ADD) static_cast<float*>(j.y)[y] = v;
                    else if (j.mode == LINEAR_BF16) static_cast<u16*>(j.y)[y] = of_b(v);
                    else if (m & 1) static_cast<u16*>(j.y)[y] = of_b(linear_gate(held[e], v));
                    else held[e] = v;
                }
            }
        }
    }
}
#define LINEAR_FEW(M, N, BLOCKS) KERNEL(256, BLOCKS, linear_few_m##M##_n##N)(const __grid_constant__ Linears p) { linear_few<M, N, false, false>(p, nullptr, nullptr); }
#define LINEAR_WORN(M, N, BLOCKS) KERNEL(256, BLOCKS, linear_worn_m##M##_n##N)(const __grid_constant__ LinearsWorn p) { linear_few<M, N, true, false>(p.linears, &p, nullptr); }
// Registers for three blocks.
#define LINEAR_NORMED(M) KERNEL(256, 3, linear_normed_m##M)(const __grid_constant__ LinearsNormed p) { linear_few<M, 1, false, true>(p.linears, nullptr, &p); }
LINEAR_FEW(1, 1, 2)
LINEAR_FEW(1, 2, 2)
LINEAR_FEW(1, 4, 2)
LINEAR_FEW(1, 8, 1)
LINEAR_FEW(2, 1, 2)
LINEAR_FEW(2, 2, 2)
LINEAR_FEW(2, 4, 2)
LINEAR_FEW(2, 8, 1)
LINEAR_FEW(4, 4, 1)
LINEAR_FEW(4, 8, 1)
LINEAR_WORN(1, 1, 2)
LINEAR_WORN(1, 2, 2)
LINEAR_WORN(1, 4, 2)
LINEAR_WORN(1, 8, 1)
LINEAR_WORN(2, 1, 2)
LINEAR_WORN(2, 2, 2)
LINEAR_WORN(2, 4, 2)
LINEAR_WORN(2, 8, 1)
LINEAR_NORMED(1)
LINEAR_NORMED(2)
#undef LINEAR_FEW
#undef LINEAR_WORN
#undef LINEAR_NORMED

// Prefill: y = x . W^T by tiles of 128 rows by 128 outputs; on Hopper linear_wg.cuh has the same by products of warpgroups.
//
// Bytes: x once for every tile of outputs and W once for every tile of rows, from the second-level cache for the most part:
// 2 in rows out / 64. FLOPs: 2 rows in out, rows and outputs rounded up to 128. Bound by the tensor cores from about 256 rows on, and
// by what mma.sync gets of them; below, by reading W.
//
// 8 warps, 64 rows by 32 outputs each, steps of 32 k in a ring of 4 stages of 16 KiB. Blocks of one W tile are neighbours.
// A gated pair's outputs alternate by eights within the tile, so that gate and up meet in one lane.
KERNEL(256, 2, linear_many)(const __grid_constant__ Linears p) {
    constexpr int S = 4, STAGE = 16384, HALF = 8192;
    SHARED(u8, shared);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    int at = blockIdx.y;
    const Linear& j = p.job[linear_find<128>(p, at)];
    const bool pair = j.mode == LINEAR_GATED;
    const int row0 = blockIdx.x * 128, in = p.in, steps = (in + 31) / 32;

    // This thread copies 16 bytes of lines r and r + 64 of either operand. A line of 64 bytes keeps its four pieces exchanged by
    // bits 1 and 2 of its number, so that any 8 lines offer one piece without a conflict.
    const int r = tid >> 2, c = (tid & 3) * 8, o0 = pair ? at + (r >> 4) * 8 + (r & 7) : at + r, o1 = o0 + (pair ? 32 : 64);
    u8* into = shared + r * 64 + (((tid & 3) ^ ((r >> 1) & 3)) << 4);
    const u16* w = j.w[pair ? r >> 3 & 1 : 0];
    const u16 *x0 = static_cast<const u16*>(p.x) + (size_t)(row0 + r) * p.ldx + c, *x1 = x0 + (size_t)64 * p.ldx;
    const u16 *w0 = w + (size_t)o0 * in + c, *w1 = w + (size_t)o1 * in + c;
    const bool has_x0 = row0 + r < p.rows, has_x1 = row0 + r + 64 < p.rows, has_w0 = o0 < j.out, has_w1 = o1 < j.out;
    auto feed_w = [&](int s) {
        u8* q = into + (s & (S - 1)) * STAGE + HALF;
        const bool there = s * 32 + c < in;
        cp16_if(q, w0 + s * 32, there && has_w0);
        cp16_if(q + 4096, w1 + s * 32, there && has_w1);
    };
    auto feed_x = [&](int s) {
        u8* q = into + (s & (S - 1)) * STAGE;
        const bool there = s * 32 + c < in;
        cp16_if(q, x0 + s * 32, there && has_x0);
        cp16_if(q + 4096, x1 + s * 32, there && has_x1);
        cp_commit();
    };
#pragma unroll
    for (int s = 0; s < S - 1; s++) feed_w(s);
    grid_wait();
    grid_go();
#pragma unroll
    for (int s = 0; s < S - 1; s++) feed_x(s);

    const int wm = (warp & 1) * 64, wn = (warp >> 1) * 32;
    const int ar = wm + (lane & 15), ac = lane >> 4, br = wn + (lane & 7) + (lane >> 4) * 8, bc = lane >> 3 & 1;
    float acc[4][4][4];
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
    for (int s = 0; s < steps; s++) {
        cp_wait<S - 2>();
        __syncthreads();
        // Past the end these copy zeros, so that the count of groups holds.
        feed_w(s + S - 1);
        feed_x(s + S - 1);
        const u8* stage = shared + (s & (S - 1)) * STAGE;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; m++) ldsm4<false>(a[m], stage + (ar + m * 16) * 64 + (((h * 2 + ac) ^ ((ar >> 1) & 3)) << 4));
#pragma unroll
            for (int n = 0; n < 2; n++) ldsm4<false>(b[n], stage + HALF + (br + n * 16) * 64 + (((h * 2 + bc) ^ ((br >> 1) & 3)) << 4));
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++) mma_b(acc[m][n], a[m], b[n >> 1][(n & 1) * 2], b[n >> 1][(n & 1) * 2 + 1]);
        }
    }

#pragma unroll
    for (int n = 0; n < 4; n++) {
        const float* bias = j.bias[pair ? n & 1 : 0];
        const int o = at + (pair ? wn / 2 + (n >> 1) * 8 : wn + n * 8) + t * 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float b = bias && o + i < j.out ? bias[o + i] : 0.0f;
#pragma unroll
            for (int m = 0; m < 4; m++) acc[m][n][i] += b, acc[m][n][2 + i] += b;
        }
    }
    const bool even = (j.ldy & 1) == 0;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + wm + m * 16 + half * 8 + g;
            if (row >= p.rows) continue;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                if (pair && (n & 1)) continue;
                const int o = at + (pair ? wn / 2 + n * 4 : wn + n * 8) + t * 2;
                float v[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    v[i] = acc[m][n][half * 2 + i];
                    if (pair) v[i] = linear_gate(v[i], acc[m][n | 1][half * 2 + i]);
                }
                const size_t y = (size_t)row * j.ldy + o;
                const bool both = even && o + 1 < j.out;
                if (j.mode == LINEAR_F32 || j.mode == LINEAR_ADD) {
                    float* q = static_cast<float*>(j.y) + y;
                    if (both) {
                        float2* q2 = reinterpret_cast<float2*>(q);
                        float2 old = make_float2(0.0f, 0.0f);
                        if (j.mode == LINEAR_ADD) old = *q2;
                        *q2 = make_float2(old.x + v[0], old.y + v[1]);
                    } else
                        for (int i = 0; i < 2; i++)
                            if (o + i < j.out) q[i] = (j.mode == LINEAR_ADD ? q[i] : 0.0f) + v[i];
                } else {
                    u16* q = static_cast<u16*>(j.y) + y;
                    if (both) *reinterpret_cast<u32*>(q) = b_pair(v[0], v[1]);
                    else
                        for (int i = 0; i < 2; i++)
                            if (o + i < j.out) q[i] = of_b(v[i]);
                }
            }
        }
}
