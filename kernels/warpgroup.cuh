// Decode attention over sealed pages as latent.cuh has it, by Hopper's products of warpgroups: the same arguments, the same partial
// results, the same items; only sums are rounded otherwise.
//
// A block is one warpgroup and takes its item page by page. Codes are the left operand, masked where they stand in the words that a lane
// has loaded: 64 positions, then 64 value channels at a time. What they meet lies in shared memory, where the matrix unit reads it without
// any thread's help: absorbed queries, for the whole item, and the weights of a page.
//
// A page's scores are met, and then, while its weights are made, the values of the page before: so products are always under way, two steps of
// them while the next two are masked, and nothing waits for the last of a kind. Of weights there are three pages': those being made, those
// being met, and those that another warp may still be meeting, as all come together only once a page.
//
//   Bytes and FLOPs a position are those of latent.cuh. What binds is the latency of what stands around the products: for 32 heads and ranks
//   208 of 4 bits some 600 instructions a page and warp, 160 of them masks, 150 the softmax, 32 products, and 12 warps to issue them
//   (loadtest/gpu.md).
//
//   Grid (items, tiles / MT), block 128; at most 256 value channels. Shared bytes: queries 512 MT whole_steps, three pages' weights 2048 MT + 16 each
//   (fewer than 4 bits: 128), lines 8 * 64 MT, the table 144, sums 512 MT, two pages; and what is read of beyond a page and not heeded, 15 rows of
//   keys and 1024 bytes of values.
#pragma once
#include "latent.cuh"

#if WARPGROUPS
// Two steps' codes of two neighbours, of one part of their words.
template <int BITS> __device__ __forceinline__ void mask(u32 (&to)[2][4], uint2 w, uint2 third, int part) {
    const int t = threadIdx.x % 4;
    u32 x[4], y[4];
    spread<BITS>(w.x, BITS == 3 ? third.x >> (4 * (t % 2)) : 0, part, x);
    spread<BITS>(w.y, BITS == 3 ? third.y >> (4 * (t % 2)) : 0, part, y);
#pragma unroll
    for (int h = 0; h < 2; h++) to[h][0] = x[2 * h], to[h][1] = y[2 * h], to[h][2] = x[2 * h + 1], to[h][3] = y[2 * h + 1];
    wg_settle(to);
}

template <int MT, int CHANNEL_TILES, int BITS_K, int BITS_V> __device__ __forceinline__ void attend_sealed_wg(const SealedArgs& p) {
    constexpr int LINES = 16 * MT, N8 = LINES / 8;
    constexpr u32 NEXT_N = 128, NEXT_K = N8 * 128, STEP = 2 * NEXT_K;       // bytes; a step is 16 channels of a query or 16 weights
    constexpr u32 VECTORS = STEP / 16;
    constexpr int BLOCK_STEPS = BITS_K == 4 ? 2 : 4, BLOCKS = 4 / BLOCK_STEPS, TURNS = 2 * CHANNEL_TILES;  // of channels; whose products are under way at once
    constexpr u32 KEY_ROW = PAGE * 4 + 32;                                  // bytes of a row of words here: four lanes' rows in banks of their own
    // Of weights steps lie so that those a warp writes at once have banks of their own: neighbours by 16 bytes, of fewer bits by 16 in a step.
    constexpr bool FEW = BITS_V != 4;
    constexpr u32 WEIGHTS_K = NEXT_K + (FEW ? 16 : 0), WEIGHTS = 8 * WEIGHTS_K + (FEW ? 0 : 16);
    constexpr auto weights_step = [](u32 step) { return step * 2 * WEIGHTS_K + (FEW ? 0 : step / 2 * 16); };
    constexpr int VALUE_ROWS = BITS_V == 4 ? 8 : BITS_V == 3 ? 6 : 4;
    constexpr float BIAS = 7.0f, HEADROOM = 32768.0f;
    SHARED(u8, shared);
    const int steps = key_steps(p.rank_k, BITS_K), whole_steps = max(4, (steps + 3) / 4 * 4);
    const u32 words_k = BITS_K == 4 ? (p.rank_k + 7) / 8 : (p.rank_k + 15) / 16, rows_k = words_k + (BITS_K == 3 ? (words_k + 1) / 2 : 0);
    // Of a page apart: its key codes and value codes, a row at a time, and scales.
    const u32 key_room = rows_k * KEY_ROW + 4 * PAGE, value_row = (p.rank_v * 4 + 95) / 128 * 128 + 32, value_room = VALUE_ROWS * value_row;
    u8 *q = shared, *weights = q + whole_steps * STEP;                      // [whole_steps][2][N8][8][8], [3][4][2][N8][8][8] f16
    float *offsets = (float*)(weights + 3 * WEIGHTS), *bases = offsets + LINES, *falls = bases + LINES;
    float *shares = falls + LINES, *red = shares + LINES;                   // red: [4][LINES]
    u32* table = (u32*)(red + 4 * LINES);                                   // [MOST], then which part this is
    float4* totals = (float4*)(table + SEALED_MOST + 4);                    // [4][N8][4]: two lines' sums of a warp
    u8* keys = (u8*)(totals + 16 * N8);                                     // two pages': keys, their scales and the values'
    u8* values = keys + 2 * key_room;                                       // two pages' values
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const SealedItem item = p.items[blockIdx.x];
    // A page all of which is met elsewhere is none.
    const int line0 = blockIdx.y * LINES, first = item.skip >= PAGE, pages = item.pages - first, at = 16 * warp + 2 * g;
    const int skip = first ? 0 : item.skip;
    const WgTile queries = wg_tile(q, NEXT_N, NEXT_K), weighted = wg_tile(weights, NEXT_N, WEIGHTS_K);

    if (pages <= 0) {
        const size_t place = (size_t)item.part * p.tiles * 16 + line0;
        for (int i = tid; i < LINES * p.rank_v; i += 128) p.out[place * p.rank_v + i] = 0;
        if (tid < LINES) *(float4*)(p.state + 4 * (place + tid)) = make_float4(-1e30f, 0, 0, 0);
        return;
    }
    if (tid < pages) table[tid] = p.table[item.table + first + tid];
    if (tid == 0) table[SEALED_MOST] = item.part;
    // Tiles of queries, from the fragments that latent.cuh's products take: of each warp every fourth step, four of them on their way at once.
    const uint4* from = (const uint4*)p.fragments + ((size_t)item.row * p.tiles + blockIdx.y * MT) * steps * 32 + lane;
    uint4 fragments[MT][4];
    auto take_queries = [&](int from_step) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (from_step + 4 * i < steps) fragments[m][i] = ld_fresh(from + (m * steps + from_step + 4 * i) * 32);
    };
    take_queries(warp);
    const size_t lines_at = (size_t)item.row * p.tiles * 16 + line0;
    const float own_factor = ld_fresh(p.factors + lines_at + lane % LINES), own_offset = ld_fresh(p.offsets + lines_at + lane % LINES);
    __syncthreads();
    // On their way to where they are met: a page's keys and scales; its values.
    const u32 row = tid / 16, column = tid % 16 * 16;
    const u32 key_from = p.key_codes + row * PAGE * 4 + column, value_from = p.value_codes + row * p.rank_v * 4 + column;
    const u32 scale_from = (tid < PAGE / 8 ? p.key_scales : p.value_scales) + tid % (PAGE / 8) * 16;
    auto bring_keys = [&](int page) {
        if (page >= pages) return;
        const u8* page_at = p.arena + (size_t)table[page] * UNIT;
        const u8* from = one_address(page_at + key_from);
        u8* to = keys + (page & 1) * key_room + (row * KEY_ROW + column);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (row + 8 * i < rows_k) cp16(to + 8 * i * KEY_ROW, from + 8 * i * PAGE * 4);
        if (rows_k > 32)
#pragma unroll 1
            for (u32 r = row + 32; r < rows_k; r += 8) {
                to += 8 * KEY_ROW, from += 8 * PAGE * 4;
                cp16(to + 24 * KEY_ROW, from + 24 * PAGE * 4);
            }
        if (tid < 4 * PAGE / 16) cp16(keys + (page & 1) * key_room + rows_k * KEY_ROW + tid * 16, page_at + scale_from);
    };
    auto bring_values = [&](int page) {
        if (page >= pages || row >= VALUE_ROWS) return;
        const u8* from = one_address(p.arena + (size_t)table[page] * UNIT + value_from);
        u8* to = values + (page & 1) * value_room + (row * value_row + column);
#pragma unroll
        for (int i = 0; i < CHANNEL_TILES; i++)
            if (column + 256 * i < (u32)p.rank_v * 4) cp16(to + 256 * i, from + 256 * i);
    };
    bring_keys(0);
    bring_values(0);
    cp_commit();
    bring_keys(1);
    cp_commit();
    // Lines' factors are powers of two of each other, or of lines of zeros: under the largest one all make exponents, and none loses what
    // another would heed.
    const float factor = warp_max(own_factor), own_ratio = own_factor / factor;
    const u32 ratio = h_pair(own_ratio, own_ratio);
    if (tid < LINES) offsets[tid] = own_offset * own_ratio, bases[tid] = 0;
    for (int first_step = warp; first_step < steps; first_step += 16) {
        if (first_step > warp) take_queries(first_step);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const u32 by_low = __shfl_sync(~0u, ratio, 16 * m + g), by_high = __shfl_sync(~0u, ratio, 16 * m + g + 8);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (first_step + 4 * i >= steps) continue;
                const uint4 v = fragments[m][i];
                u8* to = q + (first_step + 4 * i) * STEP + 2 * m * NEXT_N + lane * 4;
                *(u32*)to = h_mul(v.x, by_low), *(u32*)(to + NEXT_N) = h_mul(v.y, by_high);
                *(u32*)(to + NEXT_K) = h_mul(v.z, by_low), *(u32*)(to + NEXT_K + NEXT_N) = h_mul(v.w, by_high);
            }
        }
    }
    // Beyond the last step there are zeros; and before the first page none weighs anything.
    for (int i = tid; i < (whole_steps - steps) * (int)STEP / 16; i += 128) ((uint4*)(q + steps * STEP))[i] = make_uint4(0, 0, 0, 0);
    for (int i = tid; i < (int)WEIGHTS / 16; i += 128) ((uint4*)(weights + 2 * WEIGHTS))[i] = make_uint4(0, 0, 0, 0);
    wg_shared_written();
    cp_wait<1>();
    __syncthreads();

    // Where the weights of this lane's positions lie: those of 4 bits that are neighbours lie in neighbouring nibbles, of fewer bits in
    // parts of one.
    u8* mine = weights + 4 * t +
               (FEW ? weights_step(warp % 2) + g % 2 * WEIGHTS_K + (2 * (g / 2) + warp / 2) * 16 : weights_step(2 * (g / 4) + warp % 2) + (2 * (g % 4) + warp / 2) * 16);
    constexpr u32 SECOND = FEW ? weights_step(2) : WEIGHTS_K;
    const float share[2] = {FEW && g % 2 ? 1.0f / 16 : 1.0f, (FEW && g % 2 ? 1.0f / 16 : 1.0f) * (FEW ? 1.0f / 4 : 1.0f / 16)};
    const float whole[2] = {1.0f / share[0], 1.0f / share[1]};
    // And its words of a page: of key blocks, one after the other; of value channels. Words beyond the last of either are whatever lies
    // there: they meet queries of zero, or make sums that no one heeds.
    const u8* keys_here = keys + t * KEY_ROW + (8 * warp + g) * 8;
    const u8* thirds_here = keys + (words_k + t / 2) * KEY_ROW + (8 * warp + g) * 8;
    const u8* scales_here = keys + rows_k * KEY_ROW + at * 2;
    const u8* values_here = values + t * value_row + at * 4;
    const u32 value_more = (BITS_V == 4 ? 4 : 4 + t / 2 - t) * value_row;

    float o[CHANNEL_TILES][N8][4] = {}, s[N8][4];
    u32 codes[2][2][4] = {};
    // This lane's, of two lines: without and with values' scales.
    float4 sums[N8];
#pragma unroll
    for (int n = 0; n < N8; n++) sums[n] = make_float4(0, 0, 0, 0);

    // A page's products with queries: some blocks' are under way while the next ones' codes are masked; words are taken one turn ahead.
    auto meet_keys = [&](int page) {
        const u32 turn = page & 1;
        const u8 *low = keys_here + turn * key_room, *third = thirds_here + turn * key_room;
        WgTile tile = queries;
        uint2 w[BLOCKS], w3[BLOCKS] = {};
        auto take = [&](int i) {
            w[i] = *(const uint2*)(low + i * 4 * KEY_ROW);
            if (BITS_K == 3) w3[i] = *(const uint2*)(third + i * 2 * KEY_ROW);
        };
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) take(i);
        auto meet = [&](auto first) {
            low += BLOCKS * 4 * KEY_ROW, third += BLOCKS * 2 * KEY_ROW;
#pragma unroll
            for (int turn = 0; turn < 2; turn++) {
                const int block = BITS_K == 4 ? turn : 0, part = BITS_K == 4 ? 0 : turn;
                u32(&to)[2][4] = codes[turn];
                wg_wait<1>();
                wg_settle(to);
                mask<BITS_K>(to, w[block], w3[block], part);
                // Beyond the last block there is room to read from.
                if (BITS_K == 4 || part) take(block);
                wg_fence();
                if (decltype(first)::value && turn == 0) wg_mma_h<false, false>(s, to[0], tile);
                else wg_mma_h<false, true>(s, to[0], tile);
                wg_mma_h<false, true>(s, to[1], wg_at(tile, VECTORS));
                wg_commit();
                tile = wg_at(tile, 2 * VECTORS);
            }
        };
        meet(Int<1>());
#pragma unroll 1
        for (int step = 4; step < whole_steps; step += 4) meet(Int<0>());
    };
    // A page's products of half of the weights with the values of 64 channels; their words are taken one turn ahead.
    uint2 of = {};
    auto take_values = [&](int turn, const u8* words) {
        // Of channels 64 i + at and the next: those of one of two runs of positions, or of both.
        if (BITS_V == 4 || turn % 2 == 0) of = *(const uint2*)(words + 256 * (turn / 2) + (BITS_V == 4 ? turn % 2 * value_more : 0));
    };
    auto meet_values = [&](int turn, const u8* words, WgTile tile) {
        const int i = turn / 2, part = turn % 2;
        const uint2 third = BITS_V == 3 ? *(const uint2*)(words + 256 * i + value_more) : uint2{};
        u32(&to)[2][4] = codes[part];
        wg_wait<1>();
        wg_settle(to);
        mask<BITS_V>(to, of, third, BITS_V == 4 ? 0 : part);
        if (turn + 1 < TURNS) take_values(turn + 1, words);
        wg_fence();
#pragma unroll
        for (int h = 0; h < 2; h++) wg_mma_h<true, true>(o[i], to[h], wg_at(tile, weights_step(2 * part + h) / 16));
        wg_commit();
    };

    // Where this page's weights go, and where those of the page before are.
    int to_weights = 0, before_weights = 2;
    int page = 0;
#pragma unroll 1
    do {
        // Behind the products that make scores come those of values of the page before, whose weights have been seen by all.
        const u8* before_words = values_here + (~page & 1) * value_room;
        meet_keys(page);
        take_values(0, before_words);
        const WgTile before_tile = wg_at(weighted, before_weights * (WEIGHTS / 16));
        meet_values(0, before_words, before_tile);
        wg_wait<1>();
        wg_settle(codes[1]);
        wg_settle(s);
        const u8* scales = scales_here + (page & 1) * key_room;
        const u32 ks = *(const u32*)scales, vs = *(const u32*)(scales + 2 * PAGE);
        const float value_plain[2] = {p.rank_v > 0 ? h_lo(vs) : 0, p.rank_v > 0 ? h_hi(vs) : 0};
        const float key_scale[2] = {p.rank_k > 0 ? h_lo(ks) * factor : 0, p.rank_k > 0 ? h_hi(ks) * factor : 0};
        const float value_scale[2] = {value_plain[0] * share[0], value_plain[1] * share[1]}, top_value = fmaxf(fmaxf(value_plain[0], value_plain[1]), 1e-9f);
        // Scores become exponents against the bases.
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < N8; n++) {
            const float2 offset = *(const float2*)(offsets + 8 * n + 2 * t), base = *(const float2*)(bases + 8 * n + 2 * t);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const float from = (c % 2 ? offset.y : offset.x) * key_scale[c / 2] - (c % 2 ? base.y : base.x);
                s[n][c] = s[n][c] * key_scale[c / 2] + from;
            }
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
        u8* to = mine + to_weights * WEIGHTS;
        auto weigh = [&](int from, int end, float sign, bool shows) {
#pragma unroll
            for (int n = from; n < end; n++) {
                float w[2][2], plain[2], scaled[2];
                const float4 before = sums[n];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const float one = ex2(s[n][c]), two = ex2(s[n][2 + c]);
                    plain[c] = one + two;
                    w[0][c] = one * value_scale[0], w[1][c] = two * value_scale[1];
                    scaled[c] = w[0][c] * whole[0] + w[1][c] * whole[1];
                }
                sums[n] = make_float4(before.x + sign * plain[0], before.y + sign * plain[1], before.z + sign * scaled[0], before.w + sign * scaled[1]);
                if (shows) *(u32*)(to + n * NEXT_N) = h_pair(w[0][0], w[0][1]), *(u32*)(to + n * NEXT_N + SECOND) = h_pair(w[1][0], w[1][1]);
            }
        };
        const bool high = __any_sync(~0u, page == 0 || ex2(top) * top_value > HEADROOM);
        // Weights come while values' products are under way, some lines a tile.
#pragma unroll
        for (int turn = 1; turn < TURNS; turn++) {
            meet_values(turn, before_words, before_tile);
            if (!high) weigh((turn - 1) * N8 / (TURNS - 1), turn * N8 / (TURNS - 1), 1, true);
        }
        wg_shared_written();
        cp_wait<0>();
        // From here on all have read this page's keys, and the values before; the next keys are here.
        if (any_of_block(high)) {
            wg_wait<0>();
            wg_settle(codes[0]);
            wg_settle(codes[1]);
#pragma unroll
            for (int i = 0; i < CHANNEL_TILES; i++) wg_settle(o[i]);
            // Bases rise to this page's largest exponents, sums follow. What this warp has weighed already is taken back: what that loses is
            // nothing beside the same weights, which come again.
            if (!high) weigh(0, N8, -1, false);
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
                const float4 before = sums[n];
                sums[n] = make_float4(before.x * by.x, before.y * by.y, before.z * by.x, before.w * by.y);
                s[n][0] += fall.x, s[n][2] += fall.x, s[n][1] += fall.y, s[n][3] += fall.y;
#pragma unroll
                for (int i = 0; i < CHANNEL_TILES; i++) o[i][n][0] *= by.x, o[i][n][2] *= by.x, o[i][n][1] *= by.y, o[i][n][3] *= by.y;
            }
            weigh(0, N8, 1, true);
            wg_shared_written();
            __syncthreads();
        }
        before_weights = to_weights, to_weights = to_weights == 2 ? 0 : to_weights + 1;
        bring_keys(page + 2);
        bring_values(page + 1);
        cp_commit();
    } while (++page < pages);
    const u8* last_words = values_here + (~page & 1) * value_room;
    take_values(0, last_words);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) meet_values(turn, last_words, wg_at(weighted, before_weights * (WEIGHTS / 16)));
    wg_wait<0>();
    wg_settle(codes[0]);
    wg_settle(codes[1]);
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES; i++) wg_settle(o[i]);

    // Sums of all lanes and warps.
#pragma unroll
    for (int n = 0; n < N8; n++) {
        float4& x = sums[n];
#pragma unroll
        for (int i = 4; i < 32; i *= 2)
            x.x += __shfl_xor_sync(~0u, x.x, i), x.y += __shfl_xor_sync(~0u, x.y, i), x.z += __shfl_xor_sync(~0u, x.z, i), x.w += __shfl_xor_sync(~0u, x.w, i);
        if (g == 0) totals[(warp * N8 + n) * 4 + t] = x;
    }
    __syncthreads();
    const size_t place = (size_t)table[SEALED_MOST] * p.tiles * 16 + line0 + 2 * t;
    float4* state = (float4*)p.state + place;
    float by[N8][2], one[N8][2];
#pragma unroll
    for (int n = 0; n < N8; n++) {
        float4 x = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 y = totals[(i * N8 + n) * 4 + t];
            x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
        }
        // Codes' middle stands for zero. No sum is further from it than all weights times half of the codes: as shares of that they are written.
        const float plain[2] = {x.x, x.y}, reach[2] = {middle_of(BITS_V) / DENORMAL * x.z, middle_of(BITS_V) / DENORMAL * x.w};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            one[n][c] = reach[c] > 0 ? -1.0f : 0.0f, by[n][c] = reach[c] > 0 ? rcp(reach[c]) : 0.0f;
            if (tid < 4) state[8 * n + c] = make_float4(bases[8 * n + 2 * t + c], plain[c], reach[c] * (DENORMAL / unit_of(BITS_V)), 0);
        }
    }
    u16* out = p.out + place * p.rank_v + at;
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES; i++) {
        // Channels beyond the last are none.
        if (64 * i + at >= p.rank_v) break;
#pragma unroll
        for (int n = 0; n < N8; n++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                *(u32*)(out + (8 * n + c) * p.rank_v + 64 * i) = h_pair(fmaf(o[i][n][c], by[n][c], one[n][c]), fmaf(o[i][n][2 + c], by[n][c], one[n][c]));
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
