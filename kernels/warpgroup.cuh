// Decode attention over sealed pages as latent.cuh has it, by Hopper's products of warpgroups: the same arguments, the same partial
// results, the same items; only sums are rounded otherwise.
//
// A block is one warpgroup and takes its item page by page. Codes are the left operand, masked where they stand in the words that a lane
// has loaded: 64 positions, then 64 value channels at a time. What they meet lies in shared memory, where the matrix unit reads it without
// any thread's help: absorbed queries, for the whole item, and the weights of a page, twice, so that one page's are written while those of
// the page before are met.
//
//   Bytes and FLOPs a position are those of latent.cuh. What binds is the latency of what stands around the products: for 32 heads and ranks
//   208 of 4 bits some 600 instructions a page and warp, 150 of them masks, 130 the softmax, 30 products, and 12 warps to issue them
//   (loadtest/gpu.md).
//
//   Grid (items, tiles / MT), block 128; at most 256 value channels. Shared bytes: queries and weights 512 MT (whole_steps + 8), lines 9 * 64 MT,
//   the table 128, arrivals 16, sums 4096 MT, two pages; and what is read of beyond a page and not heeded, 31 rows of keys and 1024 bytes of values.
#pragma once
#include "latent.cuh"

#if WARPGROUPS
template <int MT, int CHANNEL_TILES, int BITS_K, int BITS_V> __device__ __forceinline__ void attend_sealed_wg(const SealedArgs& p) {
    constexpr int LINES = 16 * MT, N8 = LINES / 8;
    constexpr u32 NEXT_N = 128, NEXT_K = N8 * 128, STEP = 2 * NEXT_K;       // bytes; a step is 16 channels of a query or 16 weights
    constexpr u32 VECTORS = STEP / 16;
    constexpr int BLOCK_STEPS = BITS_K == 4 ? 2 : 4, BLOCKS = 4 / BLOCK_STEPS;  // of channels; whose products are under way at once
    constexpr u32 KEY_ROW = PAGE * 4 + 32;                                  // bytes of a row of words here: four lanes' rows in banks of their own
    constexpr float BIAS = 7.0f, HEADROOM = 32768.0f;
    SHARED(u8, shared);
    const int steps = key_steps(p.rank_k, BITS_K), whole_steps = (steps + 7) / 8 * 8;
    const u32 words_k = BITS_K == 4 ? (p.rank_k + 7) / 8 : (p.rank_k + 15) / 16, rows_k = words_k + (BITS_K == 3 ? (words_k + 1) / 2 : 0);
    // Of a page apart: its key codes, a row at a time; and scales and value codes, as they lie.
    const u32 value_row = p.rank_v * 4, bytes = p.end - p.key_scales, key_room = rows_k * KEY_ROW, slot = (bytes + 127) / 128 * 128;
    u8 *q = shared, *weights = q + whole_steps * STEP;                      // [whole_steps][2][N8][8][8], [2][4][2][N8][8][8] f16
    float *offsets = (float*)(weights + 8 * STEP), *bases = offsets + LINES, *falls = bases + LINES;
    float *shares = falls + LINES, *red = shares + LINES;                   // red: [4][LINES]
    u32* ratios = (u32*)(red + 4 * LINES);                                  // [LINES], pairs of f16
    u32* table = ratios + LINES;                                            // [MOST]
    u64* arrivals = (u64*)(table + SEALED_MOST);                            // [2], of pages
    float4* sums = (float4*)(arrivals + 2);                                 // [N8][128]: a lane's of two lines, without and with values' scales
    u8* keys = (u8*)(sums + N8 * 128);                                       // two pages' of keys, then of scales and values
    u8* room = keys + 2 * key_room;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const SealedItem item = p.items[blockIdx.x];
    // A page all of which is met elsewhere is none.
    const int line0 = blockIdx.y * LINES, first = item.skip >= PAGE, pages = item.pages - first, at = 16 * warp + 2 * g;
    const int skip = first ? 0 : item.skip;
    const WgTile queries = wg_tile(q, NEXT_N, NEXT_K), weighted = wg_tile(weights, NEXT_N, NEXT_K);

    if (tid < pages) table[tid] = p.table[item.table + first + tid];
    if (tid < 2) bulk_barrier(arrivals + tid);
    __syncthreads();
    // On their way to where they are met: a page's scales and values, and its keys.
    auto bring_values = [&](int page) {
        if (tid > 0 || page >= pages) return;
        bulk_expect(arrivals + (page & 1), bytes);
        bulk_copy(room + (page & 1) * slot, p.arena + (size_t)table[page] * UNIT + p.key_scales, bytes, arrivals + (page & 1));
    };
    const u32 row = tid / 16, column = tid % 16 * 16;
    auto bring_keys = [&](int page) {
        if (page < pages) {
            const u8* from = p.arena + (size_t)table[page] * UNIT + (p.key_codes + row * PAGE * 4 + column);
            u8* to = keys + (page & 1) * key_room + (row * KEY_ROW + column);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (row + 8 * i < rows_k) cp16(to + 8 * i * KEY_ROW, from + 8 * i * PAGE * 4);
            if (rows_k > 32)
#pragma unroll 1
                for (u32 i = 32; row + i < rows_k; i += 8) cp16(to + i * KEY_ROW, from + i * PAGE * 4);
        }
        cp_commit();
    };
    bring_values(0);
    bring_keys(0);
    bring_keys(1);
    // Tiles of queries, from the fragments that latent.cuh's products take; beyond them zeros. Lines' factors are powers of two of each
    // other, or of lines of zeros: under the largest one all make exponents, and none loses what another would heed.
    float factor = ld_fresh(p.factors + (size_t)item.row * p.tiles * 16 + line0 + lane % LINES);
    const float own_factor = factor;
    factor = warp_max(factor);
    const uint4* from = (const uint4*)p.fragments + ((size_t)item.row * p.tiles + blockIdx.y * MT) * steps * 32;
    if (tid < LINES) {
        const float ratio = own_factor / factor;
        ratios[tid] = h_pair(ratio, ratio);
        offsets[tid] = ld_fresh(p.offsets + (size_t)item.row * p.tiles * 16 + line0 + tid) * ratio;
        bases[tid] = pages > 0 ? 0 : -1e30f;
    }
    __syncthreads();
    for (int i = tid; i < MT * steps * 32; i += 128) {
        const uint4 v = ld_fresh(from + i);
        const int m = i / (steps * 32), step = i / 32 % steps, line = i % 32 / 4;
        const u32 by_low = ratios[16 * m + line], by_high = ratios[16 * m + line + 8];
        u8* to = q + step * STEP + 2 * m * NEXT_N + line * 16 + i % 4 * 4;
        *(u32*)to = h_mul(v.x, by_low), *(u32*)(to + NEXT_N) = h_mul(v.y, by_high);
        *(u32*)(to + NEXT_K) = h_mul(v.z, by_low), *(u32*)(to + NEXT_K + NEXT_N) = h_mul(v.w, by_high);
    }
    for (int i = tid; i < (whole_steps - steps) * (int)STEP / 4; i += 128) ((u32*)(q + steps * STEP))[i] = 0;
    wg_shared_written();
    cp_wait<1>();
    __syncthreads();

    // Where the weights of this lane's positions lie: those of 4 bits that are neighbours lie in neighbouring nibbles, of fewer bits in
    // parts of one.
    constexpr int FEW = BITS_V == 4 ? 0 : 1;
    u8* mine = weights + 4 * t +
               (FEW ? (warp % 2) * STEP + g % 2 * NEXT_K + (2 * (g / 2) + warp / 2) * 16 : (2 * (g / 4) + warp % 2) * STEP + (2 * (g % 4) + warp / 2) * 16);
    constexpr u32 SECOND = FEW ? 2 * STEP : NEXT_K;
    const float share[2] = {FEW && g % 2 ? 1.0f / 16 : 1.0f, (FEW && g % 2 ? 1.0f / 16 : 1.0f) * (FEW ? 1.0f / 4 : 1.0f / 16)};
    const float whole[2] = {1.0f / share[0], 1.0f / share[1]};
    // And its words of a page: of key blocks, one after the other; of value channels. Words beyond the last of either are whatever lies
    // there: they meet queries of zero, or make sums that no one heeds.
    const u8* keys_here = keys + t * KEY_ROW + (8 * warp + g) * 8;
    const u8* thirds_here = keys + (words_k + t / 2) * KEY_ROW + (8 * warp + g) * 8;
    const u8 *key_scales_here = room + at * 2, *value_scales_here = key_scales_here + (p.value_scales - p.key_scales);
    const u8* values_here = room + (p.value_codes - p.key_scales) + t * value_row + at * 4;
    const u32 value_more = (BITS_V == 4 ? 4 : 4 + t / 2 - t) * value_row;

    float o[CHANNEL_TILES][N8][4] = {};
#pragma unroll
    for (int n = 0; n < N8; n++) sums[n * 128 + tid] = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int page = 0; page < pages; page++) {
        const u32 turn = page & 1, here = turn * slot;
        float s[N8][4];
#pragma unroll
        for (int n = 0; n < N8; n++) {
            const float2 offset = *(const float2*)(offsets + 8 * n + 2 * t);
            s[n][0] = s[n][2] = offset.x, s[n][1] = s[n][3] = offset.y;
        }
        wg_settle(s);
        // Some blocks' products are under way while the next ones' codes are masked; words are taken one turn ahead.
        const u8 *low = keys_here + turn * key_room, *third = thirds_here + turn * key_room;
        WgTile tile = queries;
        uint2 w[2 * BLOCKS], w3[2 * BLOCKS] = {};
        auto take = [&] {
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS; i++) {
                w[i] = *(const uint2*)(low + i * 4 * KEY_ROW);
                if (BITS_K == 3) w3[i] = *(const uint2*)(third + i * 2 * KEY_ROW);
            }
            low += 2 * BLOCKS * 4 * KEY_ROW, third += 2 * BLOCKS * 2 * KEY_ROW;
        };
        auto mask = [&](u32(&a)[4][4], int from) {
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                for (int part = 0; part < BLOCK_STEPS / 2; part++) {
                    u32 x[4], y[4];
                    spread<BITS_K>(w[from + i].x, BITS_K == 3 ? w3[from + i].x >> (4 * (t % 2)) : 0, part, x);
                    spread<BITS_K>(w[from + i].y, BITS_K == 3 ? w3[from + i].y >> (4 * (t % 2)) : 0, part, y);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        u32(&to)[4] = a[i * BLOCK_STEPS + 2 * part + h];
                        to[0] = x[2 * h], to[1] = y[2 * h], to[2] = x[2 * h + 1], to[3] = y[2 * h + 1];
                    }
                }
            wg_settle(a);
        };
        auto meet = [&](const u32(&a)[4][4]) {
            wg_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wg_mma_h<false>(s, a[step], wg_at(tile, step * VECTORS));
            wg_commit();
            tile = wg_at(tile, 4 * VECTORS);
        };
        if (whole_steps > 0) {
            u32 a[4][4], b[4][4];
            take();
            mask(a, 0);
            meet(a);
#pragma unroll 1
            for (int step = 8;; step += 8) {
                mask(b, BLOCKS);
                // Beyond the last block there is room to read from.
                take();
                meet(b);
                wg_wait<1>();
                wg_settle(a);
                if (step >= whole_steps) break;
                mask(a, 0);
                meet(a);
                wg_wait<1>();
                wg_settle(b);
            }
            wg_wait<0>();
            wg_settle(b);
        }
        bulk_wait(arrivals + turn, page / 2);
        const u32 ks = *(const u32*)(key_scales_here + here), vs = *(const u32*)(value_scales_here + here);
        const float value_plain[2] = {p.rank_v > 0 ? h_lo(vs) : 0, p.rank_v > 0 ? h_hi(vs) : 0};
        const float key_scale[2] = {p.rank_k > 0 ? h_lo(ks) * factor : 0, p.rank_k > 0 ? h_hi(ks) * factor : 0};
        const float value_scale[2] = {value_plain[0] * share[0], value_plain[1] * share[1]}, top_value = fmaxf(fmaxf(value_plain[0], value_plain[1]), 1e-9f);
        wg_settle(s);
        // Scores become exponents against the bases.
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < N8; n++) {
            const float2 base = *(const float2*)(bases + 8 * n + 2 * t);
#pragma unroll
            for (int c = 0; c < 4; c++) s[n][c] = s[n][c] * key_scale[c / 2] - (c % 2 ? base.y : base.x);
        }
        // Of what is met elsewhere nothing.
        if (page == 0 && skip > 0)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (at + e < skip)
#pragma unroll
                    for (int n = 0; n < N8; n++) s[n][2 * e] = s[n][2 * e + 1] = -INFINITY;
#pragma unroll
        for (int n = 0; n < N8; n++) top = fmaxf(fmaxf(top, fmaxf(s[n][0], s[n][1])), fmaxf(s[n][2], s[n][3]));
        // Weights of this lane's positions, where others meet them or nowhere; `sign` times what they are into the sums.
        u8* to = mine + turn * 4 * STEP;
        auto weigh = [&](float sign, bool shows) {
#pragma unroll
            for (int n = 0; n < N8; n++) {
                float w[2][2], plain[2], scaled[2];
                const float4 before = sums[n * 128 + tid];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const float one = ex2(s[n][c]), two = ex2(s[n][2 + c]);
                    plain[c] = one + two;
                    w[0][c] = one * value_scale[0], w[1][c] = two * value_scale[1];
                    scaled[c] = w[0][c] * whole[0] + w[1][c] * whole[1];
                }
                sums[n * 128 + tid] = make_float4(before.x + sign * plain[0], before.y + sign * plain[1], before.z + sign * scaled[0], before.w + sign * scaled[1]);
                if (shows) *(u32*)(to + n * NEXT_N) = h_pair(w[0][0], w[0][1]), *(u32*)(to + n * NEXT_N + SECOND) = h_pair(w[1][0], w[1][1]);
            }
        };
        const bool high = __any_sync(~0u, page == 0 || ex2(top) * top_value > HEADROOM);
        if (!high) weigh(1, true);
        wg_shared_written();
        cp_wait<0>();
        // From here on all have read this page's keys, and the values before; the next keys are here.
        if (any_of_block(high)) {
            // Bases rise to this page's largest exponents, sums follow. What this warp has weighed already is taken back: what that loses is
            // nothing beside the same weights, which come again.
            if (!high) weigh(-1, false);
#pragma unroll
            for (int n = 0; n < N8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int line = 8 * n + 2 * t + c;
                    float x = fmaxf(s[n][c], s[n][2 + c]) + (bases[line] + lg2(top_value));
#pragma unroll
                    for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
                    if (g == 0) red[warp * LINES + line] = x - BIAS;
                }
            __syncthreads();
            if (tid < LINES) {
                float found = -1e30f;
                for (int i = 0; i < 4; i++) found = fmaxf(found, red[i * LINES + tid]);
                const float old = bases[tid], now = page == 0 ? found : fmaxf(found, old);
                bases[tid] = now, falls[tid] = old - now, shares[tid] = page == 0 ? 0 : ex2(old - now);
            }
            __syncthreads();
#pragma unroll
            for (int n = 0; n < N8; n++) {
                const float2 fall = *(const float2*)(falls + 8 * n + 2 * t), by = *(const float2*)(shares + 8 * n + 2 * t);
                const float4 before = sums[n * 128 + tid];
                sums[n * 128 + tid] = make_float4(before.x * by.x, before.y * by.y, before.z * by.x, before.w * by.y);
                s[n][0] += fall.x, s[n][2] += fall.x, s[n][1] += fall.y, s[n][3] += fall.y;
#pragma unroll
                for (int i = 0; i < CHANNEL_TILES; i++) o[i][n][0] *= by.x, o[i][n][2] *= by.x, o[i][n][1] *= by.y, o[i][n][3] *= by.y;
            }
            weigh(1, true);
            wg_shared_written();
            __syncthreads();
        }
        bring_values(page + 1);
        bring_keys(page + 2);
#pragma unroll
        for (int i = 0; i < CHANNEL_TILES; i++) wg_settle(o[i]);
        tile = wg_at(weighted, turn * 4 * VECTORS);
        u32 values[2][4][4];
#pragma unroll
        for (int i = 0; i < CHANNEL_TILES; i++) {
            // Words of values, of channels 64 i + at and the next: those of two runs of positions, or of third bits.
            const u8* words = values_here + here + 256 * i;
            const uint2 of[2] = {*(const uint2*)words, BITS_V != 2 ? *(const uint2*)(words + value_more) : uint2{}};
            u32(&a)[4][4] = values[i % 2];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                u32 x[4], y[4];
                if (BITS_V == 4) {
                    spread<4>(of[part].x, 0, 0, x), spread<4>(of[part].y, 0, 0, y);
                } else {
                    spread<BITS_V>(of[0].x, BITS_V == 3 ? of[1].x >> (4 * (t % 2)) : 0, part, x);
                    spread<BITS_V>(of[0].y, BITS_V == 3 ? of[1].y >> (4 * (t % 2)) : 0, part, y);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32(&into)[4] = a[2 * part + h];
                    into[0] = x[2 * h], into[1] = y[2 * h], into[2] = x[2 * h + 1], into[3] = y[2 * h + 1];
                }
            }
            wg_settle(a);
            wg_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) wg_mma_h<true>(o[i], a[step], wg_at(tile, step * VECTORS));
            wg_commit();
            if (i > 0) {
                wg_wait<1>();
                wg_settle(values[1 - i % 2]);
            }
        }
        wg_wait<0>();
#pragma unroll
        for (int i = 0; i < CHANNEL_TILES; i++) wg_settle(o[i]);
        wg_settle(values[1 - CHANNEL_TILES % 2]);
    }

    // Of all lanes and warps, for this lane's lines.
    auto over_all = [&](float (&x)[N8][2], bool adds) {
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N8; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float y = x[n][c];
#pragma unroll
                for (int i = 4; i < 32; i *= 2) {
                    const float other = __shfl_xor_sync(~0u, y, i);
                    y = adds ? y + other : fmaxf(y, other);
                }
                if (g == 0) red[warp * LINES + 8 * n + 2 * t + c] = y;
            }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N8; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float y = 0;
                for (int i = 0; i < 4; i++) {
                    const float other = red[i * LINES + 8 * n + 2 * t + c];
                    y = adds ? y + other : fmaxf(y, other);
                }
                x[n][c] = y;
            }
    };
    float sum[N8][2], scaled[N8][2];
#pragma unroll
    for (int n = 0; n < N8; n++) {
        const float4 x = sums[n * 128 + tid];
        sum[n][0] = x.x, sum[n][1] = x.y, scaled[n][0] = x.z, scaled[n][1] = x.w;
    }
    over_all(sum, true);
    over_all(scaled, true);
    // Codes' middle stands for zero. Channels beyond the last are none.
    float top[N8][2] = {};
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES; i++)
#pragma unroll
        for (int n = 0; n < N8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                o[i][n][c] -= middle_of(BITS_V) / DENORMAL * scaled[n][c % 2];
                if (64 * i + at < p.rank_v) top[n][c % 2] = fmaxf(top[n][c % 2], fabsf(o[i][n][c]));
            }
    over_all(top, false);
    u16* out = p.out + ((size_t)blockIdx.x * p.tiles * 16 + line0) * p.rank_v;
    float* state = p.state + ((size_t)blockIdx.x * p.tiles * 16 + line0) * 4;
#pragma unroll
    for (int n = 0; n < N8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int line = 8 * n + 2 * t + c;
            const float by = top[n][c] > 0 ? 1.0f / top[n][c] : 0.0f;
            if (tid < 4) *(float4*)(state + 4 * line) = make_float4(bases[line], sum[n][c], top[n][c] * (DENORMAL / unit_of(BITS_V)), 0);
#pragma unroll
            for (int i = 0; i < CHANNEL_TILES; i++)
                if (64 * i + at < p.rank_v) *(u32*)(out + (size_t)line * p.rank_v + 64 * i + at) = h_pair(o[i][n][c] * by, o[i][n][2 + c] * by);
        }
}
#define SEALED_WG(m, c, k, v) \
    KERNEL(128, 3, attend_sealed_wg_##m##_##c##_##k##v)(SealedArgs p) { grid_go(); attend_sealed_wg<m, c, k, v>(p); grid_wait(); }
#else
#define SEALED_WG(m, c, k, v) KERNEL(128, 1, attend_sealed_wg_##m##_##c##_##k##v)(SealedArgs) {}
#endif

#define SEALED_WG_BITS(m, c) \
    SEALED_WG(m, c, 2, 2) SEALED_WG(m, c, 2, 3) SEALED_WG(m, c, 2, 4) SEALED_WG(m, c, 3, 2) SEALED_WG(m, c, 3, 3) SEALED_WG(m, c, 3, 4) \
    SEALED_WG(m, c, 4, 2) SEALED_WG(m, c, 4, 3) SEALED_WG(m, c, 4, 4)
SEALED_WG_BITS(1, 2)
SEALED_WG_BITS(1, 4)
SEALED_WG_BITS(2, 2)
SEALED_WG_BITS(2, 4)
