// Products of many rows as linear_many has them, by Hopper's products of warpgroups: y[row][o] = sum over k of x[row][k] W[o][k] + bias[o].
//
// The same parameter, a Linears by value (192 bytes), with the same meaning and the same demands; any rows, outputs, and `in` of eights.
//
//   name            outputs of a tile   rows of a tile   threads   stages   dynamic shared bytes
//   linear_wg_256   256, gated 128      128              256       4        196608
//   linear_wg_128   128, gated 64       128              256       6        196608
//
//   Grid: (min(tiles, multiprocessors)), tiles = ceil(rows / 128) * sum over jobs of ceil(out / outputs of a tile). Any grid gives the same
//   bits, and so does either kernel: every sum goes over k in order. They differ from those of linear_many and linear_few_*.
//   As in linear_many only W is read until grid_wait.
//
// Bytes: x once for every tile of outputs and W once for every tile of rows, from the second-level cache for the most part:
// 2 in rows out (1 / 128 + 1 / outputs of a tile), 85 FLOPs a byte of tiles of 256 and 64 of 128. FLOPs: 2 rows in out, rows and outputs
// rounded up to tiles. In shared memory a step of 64 k is written once, 48 KiB, and read as 80: each warpgroup reads all of W's tile; at
// full speed that step takes 1024 cycles, which is all the 128 bytes a cycle there are. So it is bound by the tensor cores up to what they
// can be fed; tiles of 128 outputs by shared memory, with 640 cycles beside 512 of the tensor cores: predicted 550 to 600 TFLOP/s on an H200 from 2048 rows on, if the second-level cache gives 7 TB/s; not timed on a device yet.
//
// Two warpgroups, 64 rows by all outputs of the tile each, whose sums are all they hold: both operands come from shared memory, in a ring of
// stages filled by asynchronous copies. Eight lanes bring a line of 128 bytes of a row, so that reads are of whole lines, and exchange
// its pieces by the row's number as the products take them, which is without conflicts too.
//
// One barrier a step: what this thread copied of the step is there, all have copied theirs, and all have waited for the products before the
// last ones, so that their stage is free. Then the step's products join those under way, and copies for the freed stage are asked for
// while both are at work: the tensor cores have the next step's products before they are through with this one's.
//
// Blocks stay, and take every gridDim.x-th tile; copies run on across the ends of tiles, so that a tile's first steps are on their way
// while the one before is written. Tiles of neighbouring blocks are of the same outputs, for up to 16 tiles of rows, then of the next
// outputs: W is read from memory once for 2048 rows, and these rows stay in the second-level cache meanwhile.
#pragma once
#include "linear.cuh"

#if WARPGROUPS
// Writes this lane's sums of a tile whose first output is `at`: of `row` and the eighth one from it. WHOLE: all outputs there are, and
// 16 bytes of y may be written at once (`wide`); apart from what asks, so that the code for most tiles is short.
template <int N8, bool WHOLE> __device__ __forceinline__ void linear_wg_write(const Linear& j, float (&d)[N8][4], int row, int rows, int at, bool wide) {
    const int t = threadIdx.x & 3, end = j.out - at;
    const bool pair = j.mode == LINEAR_GATED, adds = j.mode == LINEAR_ADD;
#pragma unroll
    for (int n = 0; n < N8; n++) {
        const float* bias = j.bias[pair ? n & 1 : 0];
        const int o = (pair ? n >> 1 : n) * 8 + t * 2;
        if (bias)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float b = WHOLE || o + i < end ? bias[at + o + i] : 0.0f;
                d[n][i] += b, d[n][2 + i] += b;
            }
    }
    // Lanes hold two neighbours of a row, and exchange them for 16 bytes.
    if (adds || j.mode == LINEAR_F32) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Even lanes take four of a tile of eight, odd ones of the next.
            const int o = (t & 1) * 8 + (t & 2) * 2, left = end - o;
            float* y = static_cast<float*>(j.y) + (size_t)(row + half * 8) * j.ldy + at + o;
            const bool there = row + half * 8 < rows;
            // What is there already, all at once: with stores in between each load would wait for the one before.
            float old[N8 / 2][4] = {};
            if (adds && there)
#pragma unroll
                for (int n = 0; n < N8 / 2; n++) {
                    const float* q = y + n * 16;
                    if (WHOLE || (wide && n * 16 + 4 <= left)) {
                        const float4 v = *reinterpret_cast<const float4*>(q);
                        old[n][0] = v.x, old[n][1] = v.y, old[n][2] = v.z, old[n][3] = v.w;
                    } else
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (n * 16 + i < left) old[n][i] = q[i];
                }
#pragma unroll
            for (int n = 0; n < N8 / 2; n++) {
                float v[4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float lo = d[2 * n][half * 2 + i], hi = d[2 * n + 1][half * 2 + i], got = __shfl_xor_sync(~0u, t & 1 ? lo : hi, 1);
                    v[i] = old[n][i] + (t & 1 ? got : lo), v[2 + i] = old[n][2 + i] + (t & 1 ? hi : got);
                }
                float* q = y + n * 16;
                if (!there) continue;
                if (WHOLE || (wide && n * 16 + 4 <= left)) *reinterpret_cast<float4*>(q) = make_float4(v[0], v[1], v[2], v[3]);
                else
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (n * 16 + i < left) q[i] = v[i];
            }
        }
        return;
    }
    // Four tiles' two neighbours become eight of one tile: lane t's of the t-th.
    auto put = [&](u32(&v)[4], int half, int o) {
#pragma unroll
        for (int b = 1; b < 4; b *= 2)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!(i & b)) {
                    const u32 got = __shfl_xor_sync(~0u, t & b ? v[i] : v[i | b], b);
                    if (t & b) v[i] = got;
                    else v[i | b] = got;
                }
        o += t * 8;
        u16* y = static_cast<u16*>(j.y) + (size_t)(row + half * 8) * j.ldy + at + o;
        if (row + half * 8 >= rows) return;
        if (WHOLE || (wide && o + 8 <= end)) *reinterpret_cast<uint4*>(y) = make_uint4(v[0], v[1], v[2], v[3]);
        else
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (o + i < end) y[i] = (u16)(v[i >> 1] >> (i & 1) * 16);
    };
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (pair)
#pragma unroll
            for (int n = 0; n < N8; n += 8) {
                u32 v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *gate = d[n + 2 * i] + half * 2, *up = d[n + 2 * i + 1] + half * 2;
                    v[i] = b_pair(linear_gate(gate[0], up[0]), linear_gate(gate[1], up[1]));
                }
                put(v, half, n * 4);
            }
        else
#pragma unroll
            for (int n = 0; n < N8; n += 4) {
                u32 v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] = b_pair(d[n + i][half * 2], d[n + i][half * 2 + 1]);
                put(v, half, n * 8);
            }
}
template <int N8> __device__ __forceinline__ void linear_wg(const Linears& p) {
    constexpr int OUTS = 8 * N8, S = N8 == 32 ? 4 : 6, AHEAD = S - 2, ROWS = 128, X = ROWS * 128, STAGE = X + OUTS * 128, TOGETHER = 16;
    SHARED(u8, shared);
    const int tid = threadIdx.x, g = tid >> 2 & 7;
    const int in = p.in, steps = (in + 63) / 64, row_tiles = (p.rows + ROWS - 1) / ROWS;
    int out_tiles = 0;
    for (int j = 0; j < p.jobs; j++) out_tiles += linear_tiles<OUTS>(p.job[j]);
    const int tiles = row_tiles * out_tiles;
    // Tiles of rows that are met together: of sweeps as even as they come.
    const int sweeps = (row_tiles + TOGETHER - 1) / TOGETHER, together = (row_tiles + sweeps - 1) / sweeps, sweep = together * out_tiles;
    auto find = [&](int tile, int& row0, int& at) -> const Linear& {
        const int first = tile / sweep * together, rows = min(together, row_tiles - first);
        tile %= sweep;
        row0 = (first + tile % rows) * ROWS;
        at = tile / rows;
        return p.job[linear_find<OUTS>(p, at)];
    };

    // What is copied next: this thread brings 16 bytes of lines r, r + 32, ... of either operand. A gated pair's outputs alternate by
    // eights within the tile, so that gate and up meet in one lane.
    const int r = tid >> 3, c = (tid & 7) * 8;
    u8* into = shared + r * 128 + (((tid ^ r) & 7) << 4);
    const size_t x_next = (size_t)32 * p.ldx;
    const u16 *x = nullptr, *w = nullptr;
    size_t w_next = 0;
    int f_tile = blockIdx.x, f_k = 0, f_slot = 0, x_lines = 0, w_lines = 0;
    auto open = [&] {
        x_lines = w_lines = 0;
        if (f_tile < tiles) {
            int row0, at;
            const Linear& j = find(f_tile, row0, at);
            const bool pair = j.mode == LINEAR_GATED;
            const int o = at + (pair ? (r >> 4) * 8 + (r & 7) : r), apart = pair ? 16 : 32;
            x = static_cast<const u16*>(p.x) + (size_t)(row0 + r) * p.ldx + c;
            w = j.w[pair ? r >> 3 & 1 : 0] + (size_t)o * in + c;
            w_next = (size_t)apart * in;
            // So many of its lines there are.
            x_lines = (p.rows - row0 - r + 31) >> 5;
            w_lines = (j.out - o + apart - 1) >> (pair ? 4 : 5);
        }
    };
    // Where nothing is left, zeros: in `in` not of 64, of rows and outputs beyond the last; past the last tile, so that the count of groups holds.
    auto feed_w = [&](int slot, int k) {
        const int lines = k + c < in ? w_lines : 0;
        u8* q = into + slot * STAGE + X;
#pragma unroll
        for (int i = 0; i < OUTS / 32; i++) cp16_if(q + i * 4096, w + i * w_next + k, i < lines);
    };
    auto feed_x = [&](int slot, int k) {
        const int lines = k + c < in ? x_lines : 0;
        u8* q = into + slot * STAGE;
#pragma unroll
        for (int i = 0; i < ROWS / 32; i++) cp16_if(q + i * 4096, x + i * x_next + k, i < lines);
        cp_commit();
        f_slot = slot + 1 == S ? 0 : slot + 1;
        if ((f_k += 64) >= in) {
            f_k = 0;
            f_tile += gridDim.x;
            open();
        }
    };
    open();
#pragma unroll
    for (int s = 0; s < AHEAD; s++)
        if (s < steps) feed_w(s, s * 64);
    grid_wait();
    grid_go();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        if (s >= steps) feed_w(s, f_k);
        feed_x(s, f_k);
    }

    const WgLines a = wg_lines(shared + (tid >> 7) * (X / 2)), b = wg_lines(shared + X);
    int slot = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float d[N8][4];
#pragma unroll
        for (int n = 0; n < N8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[n][i] = 0.0f;
        wg_settle(d);
#pragma unroll 1
        for (int s = 0; s < steps; s++) {
            cp_wait<AHEAD - 1>();
            wg_shared_written();
            __syncthreads();
            const u32 stage = slot * (STAGE / 16);
            slot = slot + 1 == S ? 0 : slot + 1;
            wg_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) wg_mma_b(d, wg_at(a, stage + 2 * k), wg_at(b, stage + 2 * k));
            wg_commit();
            feed_w(f_slot, f_k);
            feed_x(f_slot, f_k);
            wg_wait<1>();
        }
        wg_wait<0>();
        wg_settle(d);

        int row0, at;
        const Linear& j = find(tile, row0, at);
        const int row = row0 + (tid >> 5) * 16 + g, outs = j.mode == LINEAR_GATED ? OUTS / 2 : OUTS;
        const bool wide = ((j.ldy & (j.mode == LINEAR_F32 || j.mode == LINEAR_ADD ? 3 : 7)) | (int)(reinterpret_cast<size_t>(j.y) & 15)) == 0;
        if (wide && at + outs <= j.out) linear_wg_write<N8, true>(j, d, row, p.rows, at, wide);
        else linear_wg_write<N8, false>(j, d, row, p.rows, at, wide);
    }
}
KERNEL(256, 1, linear_wg_256)(const __grid_constant__ Linears p) { linear_wg<32>(p); }
KERNEL(256, 1, linear_wg_128)(const __grid_constant__ Linears p) { linear_wg<16>(p); }
#else
KERNEL(256, 1, linear_wg_256)(const __grid_constant__ Linears) {}
KERNEL(256, 1, linear_wg_128)(const __grid_constant__ Linears) {}
#endif
