// Decode attention over sealed pages of a frequency basis whose latents are rotated ("normal" codes of 4, 3 or 2 bits).
//
//   score[line][pos] = sum over r of a[line][r] latent[pos][r]         a: the absorbed query (compress::FrequencyMap), by `absorb`
//   sum[line][r]     = sum over pos of 2^(score - m) value[pos][r]     expanded once a row, by `merge` (attend.cuh)
//   latent[pos][r]   = scale[pos] level[code[pos][r]] / unit           (quant: normal latents)
//
// A "line" is one query head of one row; all heads meet the same latents, so a line is a row of the matrix unit's left operand and a
// code, spread into registers, is the right one. The words of a page are as the host's kernels read them (kv::layout): since any
// order of the summed axis serves, as long as both operands share it, each lane takes whole words in 16-byte loads, straight from
// global memory into the fragments of its products: no latent touches shared memory.
//
//   Bytes a position and layer: rank_k bits_k / 8 + rank_v bits_v / 8 + 4. FLOPs: 2 lines (rank_k + rank_v).
//   32 heads, ranks 208 and 208, 4 bits: 212 bytes, 26.6 kFLOP: 125 FLOP a byte, less than a Hopper's ridge. What binds is issue and the
//   latency between instructions: 0.6 integer operations a code, and what stands around them (loadtest/gpu.md).
#pragma once
#include "common.cuh"

// A code as the low bits of an f16 is the denormal code * 2^-24, exactly; the matrix unit takes it as it is, and one multiplication at the
// end makes up for it. Codes that stand higher in their half of a word are masked out where they stand: what they are met with, an
// element of the query or a position's weight, is that much smaller (`spread_shift`). Half of the largest code is taken off at the end, or
// rather, products begin with it: a line's is the same for all positions (`offsets`), a row's for all channels.
constexpr float DENORMAL = 16777216.0f;

// The four pairs of part 0 or 1 of a word; only part 0 of 4 bits: pair i holds the codes of nibbles i and i + 4.
//   4 bits: a word's nibbles are its codes.
//   3 bits: nibbles hold the low two bits of two parts; `third`, the word of third bits moved to this word's, that of pair i at bit
//           8 (i / 2) + 2 (i % 2) + part.
//   2 bits: nibbles hold two parts, part 0 in their lower half.
template <int BITS> __device__ __forceinline__ void spread(u32 w, u32 third, int part, u32 (&out)[4]) {
    const u32 high = w >> 8;
    if (BITS == 4) {
        out[0] = w & 0x000f000fu, out[1] = w & 0x00f000f0u, out[2] = high & 0x000f000fu, out[3] = high & 0x00f000f0u;
    } else {
        const u32 even = 0x00030003u << (2 * part), odd = 0x00300030u << (2 * part);
        out[0] = w & even, out[1] = w & odd, out[2] = high & even, out[3] = high & odd;
        if (BITS == 3) {
            const u32 e = 0x00040004u << (2 * part), o = 0x00400040u << (2 * part);
            out[0] |= third << (2 + part) & e, out[1] |= third << (4 + part) & o, out[2] |= third >> (6 - part) & e, out[3] |= third >> (4 - part) & o;
        }
    }
}
// How far above the lowest bits of its half the code of pair i and a part stands.
__device__ __forceinline__ constexpr int spread_shift(int part, int i) { return 2 * part + 4 * (i % 2); }

// Half of the largest code, which stands for zero; and the standard deviation in codes (quant::levels, which are twice as fine).
__device__ __forceinline__ constexpr float middle_of(int bits) { return 0.5f * (float)((1 << bits) - 1); }
__device__ __forceinline__ constexpr float unit_of(int bits) { return bits == 4 ? 2.9833f : bits == 3 ? 1.70645f : 1.00435f; }

// In place of bits: latents that are spread before they are met (rebuild.cuh), so that queries lie in their order, [lines][rank].
constexpr int PLAIN = 16;

// Key channels of a word, and steps of 16 channels that four words of four lanes make.
__device__ __forceinline__ int word_channels(int bits) { return bits == 4 ? 8 : 16; }
__device__ __forceinline__ int key_steps(int rank, int bits) { return bits == 4 ? (rank + 31) / 32 * 2 : bits == PLAIN ? rank / 16 : (rank + 63) / 64 * 4; }

// Where channel c of an absorbed query lies: the step, the lane's column t, and of its four halves (pair, half) the index; and how far up the
// codes it meets stand.
struct QueryPlace { int step, t, pair, half, shift; };
__device__ __forceinline__ QueryPlace query_place(int c, int bits) {
    QueryPlace p;
    if (bits == 4) {
        const int word = c / 8, x = c % 8, n = 2 * (x % 4) + x / 4, i = n % 4;
        p.step = word / 4 * 2 + i / 2, p.t = word % 4, p.pair = i % 2, p.half = n / 4, p.shift = spread_shift(0, i);
    } else {
        const int word = c / 16, x = c % 16, quad = x / 4, n = 2 * (x % 4) + quad / 2, i = n % 4;
        p.step = word / 4 * 4 + quad % 2 * 2 + i / 2, p.t = word % 4, p.pair = i % 2, p.half = n / 4, p.shift = spread_shift(quad % 2, i);
    }
    return p;
}

// a[line][r] = sum over c of q[line][c] map[kv_head][c][r], scaled to f16 by its largest element, in the order of the products below.
//
//   q [rows][heads][d] f32 after rope; map [kv_heads][d][rank] f16, rank even (the basis and its rotation, folded);
//   fragments [rows][line tiles][steps][32 lanes][8] f16; factors and offsets [rows][16 line tiles] f32: score = factor * scale *
//   (offset + product with codes). Where `bits` is PLAIN, fragments are [rows][16 line tiles][rank], 16 divides the rank, and there are no
//   offsets.
//   Grid (rows, kv_heads), block 512, shared 4 (4 d + 4 * 4 rank + 16) bytes. Reads the map once a row: L2 binds, and its latency.
struct AbsorbArgs {
    const float* q;
    const u16* map;
    u16* fragments;
    float* factors;
    float* offsets;
    float scale;
    int heads, kv_heads, d, rank, bits;
};
KERNEL(512, 2, absorb)(AbsorbArgs p) {
    // No launch writes maps: they are on their way while the one ahead runs.
    for (int i = threadIdx.x * 64; i < p.d * p.rank; i += 512 * 64) prefetch(p.map + (size_t)blockIdx.y * p.d * p.rank + i);
    grid_wait();
    grid_go();
    SHARED(float, shared);
    constexpr int SLICES = 4;               // of the summed channels
    float* q = shared;                      // [d][4]
    float* a = shared + 4 * p.d;            // [SLICES][4 lines][rank]
    float* red = a + SLICES * 4 * p.rank;   // [16]
    const int row = blockIdx.x, kv_head = blockIdx.y, tid = threadIdx.x, group = p.heads / p.kv_heads;
    const int steps = key_steps(p.rank, p.bits), tiles = (p.heads + 15) / 16, half_rank = p.rank / 2;
    u16* out = p.fragments + (size_t)row * tiles * steps * 256;
    // Writes element c of a line, and gives what it is against codes that stand lowest.
    auto put = [&](int line, int c, float x) {
        if (p.bits == PLAIN) {
            out[line * p.rank + c] = of_h(x);
            return 0.0f;
        }
        const QueryPlace at = query_place(c, p.bits);
        const float high = (float)(1 << at.shift);
        const u16 h = of_h(x / high);
        out[(((line / 16) * steps + at.step) * 32 + line % 8 * 4 + at.t) * 8 + (2 * at.pair + line % 16 / 8) * 2 + at.half] = h;
        return h_of(h) * high;
    };
    const u32* map = (const u32*)(p.map + (size_t)kv_head * p.d * p.rank);
    const int slice = tid / 128, lane = tid % 128, each = p.d / SLICES;
    for (int first = 0; first < group; first += 4) {
        const int n = min(4, group - first);
        const float* from = p.q + ((size_t)row * p.heads + kv_head * group + first) * p.d;
        __syncthreads();
        for (int i = tid; i < 4 * p.d; i += 512) q[i] = i % 4 < n ? from[i % 4 * p.d + i / 4] : 0.0f;
        __syncthreads();
        for (int r = lane; r < half_rank; r += 128) {
            float x[4][2] = {};
#pragma unroll 16
            for (int c = slice * each; c < (slice + 1) * each; c++) {
                const u32 m = map[(size_t)c * half_rank + r];
                const float4 w = *(const float4*)(q + 4 * c);
                const float lo = h_lo(m), hi = h_hi(m);
                x[0][0] += w.x * lo, x[0][1] += w.x * hi, x[1][0] += w.y * lo, x[1][1] += w.y * hi;
                x[2][0] += w.z * lo, x[2][1] += w.z * hi, x[3][0] += w.w * lo, x[3][1] += w.w * hi;
            }
#pragma unroll
            for (int line = 0; line < 4; line++) *(float2*)(a + (slice * 4 + line) * p.rank + 2 * r) = make_float2(x[line][0], x[line][1]);
        }
        __syncthreads();
        // From here a slice is a line.
        float largest = 0;
        float* mine = a + slice * p.rank;
        for (int r = lane; r < p.rank; r += 128) {
            const float x = mine[r] + mine[4 * p.rank + r] + mine[8 * p.rank + r] + mine[12 * p.rank + r];
            mine[r] = x;
            largest = fmaxf(largest, fabsf(x));
        }
        largest = warp_max(largest);
        if (tid % 32 == 0) red[tid / 32] = largest;
        __syncthreads();
        largest = fmaxf(fmaxf(red[4 * slice], red[4 * slice + 1]), fmaxf(red[4 * slice + 2], red[4 * slice + 3]));
        // Against codes the largest element is some 32 to 64, which leaves room below it for what stands higher, by a power of two, so that
        // factors of lines are powers of two of each other (warpgroup.cuh).
        const float by = largest <= 0 ? 0.0f : p.bits == PLAIN ? 1.0f / largest : f_of((259u - max(u_of(largest) >> 23, 27u)) << 23);
        const int head = kv_head * group + first + slice;
        float sum = 0;
        if (slice < n) {
            for (int r = lane; r < steps * 16; r += 128) sum += put(head, r, r < p.rank ? mine[r] * by : 0.0f);
            // Never zero, so that what is masked by infinity stays so.
            if (lane == 0) p.factors[(size_t)row * tiles * 16 + head] = fmaxf((by > 0 ? 1.0f / by : 0.0f) * (p.scale * 1.44269504f * (p.bits == PLAIN ? 1.0f : DENORMAL / unit_of(p.bits))), 1e-30f);
        }
        if (p.bits != PLAIN) {
            sum = warp_sum(sum);
            __syncthreads();
            if (tid % 32 == 0) red[tid / 32] = sum;
            __syncthreads();
            sum = red[4 * slice] + red[4 * slice + 1] + red[4 * slice + 2] + red[4 * slice + 3];
            if (slice < n && lane == 0) p.offsets[(size_t)row * tiles * 16 + head] = -middle_of(p.bits) / DENORMAL * sum;
        }
    }
    // Lines that no head has.
    if (kv_head == p.kv_heads - 1) {
        for (int head = p.heads; head < 16 * tiles; head++) {
            for (int r = tid; r < steps * 16; r += 512) put(head, r, 0.0f);
            if (tid == 0) {
                p.factors[(size_t)row * tiles * 16 + head] = 1e-30f;
                if (p.bits != PLAIN) p.offsets[(size_t)row * tiles * 16 + head] = 0;
            }
        }
    }
}

// Most pages of an item.
constexpr int SEALED_MOST = 32;

// One span of one row's sealed pages.
struct SealedItem {
    u32 row;
    // Its pages in the table.
    u32 table, pages;
    // Positions of its first page that are met elsewhere (sinks).
    u32 skip;
    // Which of the sequence's pages the first is.
    u32 page;
    // Where its results lie.
    u32 part;
};

struct SealedArgs {
    const u8* arena;
    const u32* table;
    const SealedItem* items;
    const u16* fragments;
    const float* factors;
    const float* offsets;
    // [parts][16 tiles][rank_v] f16 and [parts][16 tiles][4] f32: largest exponent, sum, and what the f16 are multiples of.
    u16* out;
    float* state;
    // Offsets in a page of the sections of this layer.
    u32 key_codes, key_scales, value_codes, value_scales, end;
    int rank_k, rank_v, bits_k, bits_v;
    // 16-line tiles over all lines.
    int tiles;
};

// Where a lane's vectors of a page's key words lie: of block b (four words, one a lane's column t), at low + 4 b ROW; those of third
// bits at third + 2 b ROW.
template <int BITS> struct KeyWords {
    static constexpr int ROW = PAGE / 4;    // a word of all positions, in vectors
    const uint4 *low, *third;
    int blocks;
    __device__ __forceinline__ KeyWords(const u8* codes, int rank, int chunk, int t) {
        const int words = BITS == 4 ? (rank + 7) / 8 : (rank + 15) / 16;
        blocks = (words + 3) / 4;
        low = (const uint4*)codes + t * ROW + chunk / 4;
        third = (const uint4*)codes + (words + t / 2) * ROW + chunk / 4;
    }
};

// s[m][j] += lines by the positions j of eight chunks, over the channels of one block. `q`: this lane's of the fragments [steps][MT][32].
template <int MT, int BITS>
__device__ __forceinline__ void sealed_block(float (&s)[MT][4][4], const uint4& low, const uint4& third, const uint4* q, int t) {
    constexpr int STEPS = BITS == 4 ? 2 : 4;
    const u32 w[4] = {low.x, low.y, low.z, low.w}, w3[4] = {third.x, third.y, third.z, third.w};
#pragma unroll
    for (int part = 0; part < STEPS / 2; part++) {
        // Fragments of two steps, of all four chunk positions.
        u32 b[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) spread<BITS>(w[j], BITS == 3 ? w3[j] >> (4 * (t % 2)) : 0, part, b[j]);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4 v = q[((2 * part + h) * MT + m) * 32];
                const u32 a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < 4; j++) mma_h(s[m][j], a, b[j][2 * h], b[j][2 * h + 1]);
            }
    }
}

// Scores of 4 x 8 positions of one warp.
// Words beyond the last are read too, where queries are zero: they are a page's next bytes, or past the last page 1 KiB that the arena has.
template <int MT, int BITS>
__device__ __forceinline__ void sealed_scores(float (&s)[MT][4][4], const KeyWords<BITS>& keys, const uint4* q, int t) {
    constexpr int STEP = (BITS == 4 ? 2 : 4) * MT * 32, ROW = KeyWords<BITS>::ROW;
    const uint4 *low = keys.low, *third = keys.third;
    // Two vectors take turns, so that one is on its way while the other is met.
    uint4 one = ld_once(low), two = {};
    for (int block = 0; block < keys.blocks; block += 2, q += 2 * STEP) {
        if (block + 1 < keys.blocks) two = ld_once(low + 4 * ROW);
        sealed_block<MT, BITS>(s, one, BITS == 3 ? ld_once(third) : uint4{}, q, t);
        if (block + 1 >= keys.blocks) break;
        low += 8 * ROW;
        if (block + 2 < keys.blocks) one = ld_once(low);
        sealed_block<MT, BITS>(s, two, BITS == 3 ? ld_once(third + 2 * ROW) : uint4{}, q + STEP, t);
        third += 4 * ROW;
    }
}

// The words of a page's values that a lane takes: two vectors of four channels, the second of the upper half of the words or of
// third bits; none of 2 bits.
template <int BITS> __device__ __forceinline__ void load_values(uint4 (&v)[2], const u8* codes, int rank, int channel, int t) {
    const u32* words = (const u32*)codes + min(channel, rank - 4);
    v[0] = ld_once((const uint4*)(words + t * rank));
    if (BITS == 4) v[1] = ld_once((const uint4*)(words + (t + 4) * rank));
    if (BITS == 3) v[1] = ld_once((const uint4*)(words + (4 + t / 2) * rank));
}

// o[m][group][j] += weights of a page's positions times the values of four channels. `weights`: this lane's of the fragments
// [4 steps][MT][32 lanes], whose even and odd lanes change places in the upper two steps.
template <int MT, int NG, int BITS>
__device__ __forceinline__ void sealed_values(float (&o)[MT][NG][4][4], int group, const uint4 (&v)[2], const uint4* weights, const uint4* weights_upper, int t) {
    const u32 first[4] = {v[0].x, v[0].y, v[0].z, v[0].w}, second[4] = {v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
    for (int part = 0; part < 2; part++) {
        u32 b[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (BITS == 4) spread<4>(part == 0 ? first[j] : second[j], 0, 0, b[j]);
            else spread<BITS>(first[j], BITS == 3 ? second[j] >> (4 * (t % 2)) : 0, part, b[j]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            // Of 4 bits a word's pairs 2 h and 2 h + 1 are of step 2 part + h; of fewer, those of a part of step 2 h + part.
            const int step = BITS == 4 ? 2 * part + h : 2 * h + part;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4 x = (step < 2 ? weights : weights_upper)[(step * MT + m) * 32];
                const u32 a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                for (int j = 0; j < 4; j++) mma_h(o[m][group][j], a, b[j][2 * h], b[j][2 * h + 1]);
            }
        }
    }
}

// W warps take tiles of W / 2 pages: half a page each for the scores, then channels (32 at a time) each for the sums.
// MT tiles of 16 lines; NG groups of 32 value channels to a warp, so rank_v <= 32 W NG.
//
// Weights are taken against the largest exponent of the tiles before, as long as none exceeds it by so much that f16 could not hold
// it: so one barrier a tile serves, and what this tile's largest is, is told with it for the next.
//
// A position's weight is 2^BIAS times what the largest exponent makes it, and a share of that where codes stand higher: what f16 cannot hold
// is then below 2^-25 of the largest.
//
//   `attend_exact` is launched ahead, waits for the queries, and is not waited for but at the end: what it meets is little, and met beside this.
//   Grid (items, tiles / MT), block 32 W, shared bytes 512 MT steps + 2 (W / 2) 2048 MT + 2 * 64 MT W + 2 * 64 MT + 128.
template <int MT, int NG, int W, int BITS_K, int BITS_V>
__device__ __forceinline__ void attend_sealed(const SealedArgs& p) {
    constexpr int TP = W / 2, LINES = 16 * MT;
    constexpr int P_PAGE = 4 * MT * 32;                 // vectors of a page's weights
    constexpr float BIAS = 7.0f, HEADROOM = 15.0f;
    SHARED(uint4, shared);
    const int steps = key_steps(p.rank_k, BITS_K);
    uint4* q = shared;                                  // [steps][MT][32]
    uint4* weights = shared + steps * MT * 32;          // [2][TP][P_PAGE]
    float* red = (float*)(weights + 2 * TP * P_PAGE);   // [2][LINES][W]
    float* factors = red + 2 * LINES * W;               // [LINES]
    float* offsets = factors + LINES;                   // [LINES]
    u32* table = (u32*)(offsets + LINES);               // [MOST]
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const SealedItem item = p.items[blockIdx.x];
    const int line0 = blockIdx.y * LINES, pages = item.pages;
    auto page_at = [&](int i) { return p.arena + (size_t)table[i] * UNIT; };

    const int half = warp % 2, chunk = 16 * half + 4 * (g / 2) + 32 * (g % 2), at = 16 * half + 4 * t;
    const int channel = warp * 32 + 4 * g, last_group = (p.rank_v + 31) / 32 - 1;
    const int tiles = (pages + TP - 1) / TP;
    // What is met later is on its way to the second-level cache. A warp asks for the half page that it scores.
    const int half_lines = ((int)(p.end - p.key_codes) + 255) / 256;
    auto fetch = [&](int index) {
        if (index >= pages) return;
        const u8* from = page_at(index) + p.key_codes + half * half_lines * 128;
#pragma unroll 1
        for (int line = lane; line < half_lines; line += 32) prefetch(from + line * 128);
    };
    if (tid < pages) table[tid] = p.table[item.table + tid];
    __syncthreads();
    fetch(warp / 2);
    const uint4* from = (const uint4*)p.fragments + ((size_t)item.row * p.tiles + blockIdx.y * MT) * steps * 32;
    for (int i = tid; i < MT * steps * 32; i += 32 * W) q[(i / 32 % steps * MT + i / (steps * 32)) * 32 + i % 32] = ld_fresh(from + i);
    if (tid < LINES) {
        factors[tid] = ld_fresh(p.factors + (size_t)item.row * p.tiles * 16 + line0 + tid);
        offsets[tid] = ld_fresh(p.offsets + (size_t)item.row * p.tiles * 16 + line0 + tid);
    }
    __syncthreads();

    float o[MT][NG][4][4] = {};
    // Exponents are against `base`; sums of this lane's positions, without and with their values' scales.
    float base[MT][2], sum[MT][2] = {}, scaled[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; m++) base[m][0] = base[m][1] = -1e30f;
    for (int tile = 0; tile < tiles; tile++) {
        const int index = tile * TP + warp / 2;
        fetch(index + TP);
        // Products times the keys' scales; a line's factor is left for the exponent.
        float s[MT][4][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float offset = offsets[16 * m + 8 * r + g];
#pragma unroll
                for (int j = 0; j < 4; j++) s[m][j][2 * r] = s[m][j][2 * r + 1] = offset;
            }
        uint2 scales[2] = {};
        if (index < pages) {
            const u8* page = page_at(index);
            // A rank of none has no scales either: every score is zero, every sum the mean's.
            if (p.rank_v > 0) {
                scales[0] = *(const uint2*)((const u16*)(page + p.value_scales) + at);
                scales[1] = *(const uint2*)((const u16*)(page + p.value_scales) + at + 32);
            }
            if (p.rank_k > 0) {
                const uint2 k0 = *(const uint2*)((const u16*)(page + p.key_scales) + at), k1 = *(const uint2*)((const u16*)(page + p.key_scales) + at + 32);
                sealed_scores<MT, BITS_K>(s, KeyWords<BITS_K>(page + p.key_codes, p.rank_k, chunk, t), q + lane, t);
                const float scale[2][4] = {{h_lo(k0.x), h_hi(k0.x), h_lo(k0.y), h_hi(k0.y)}, {h_lo(k1.x), h_hi(k1.x), h_lo(k1.y), h_hi(k1.y)}};
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++)
#pragma unroll
                        for (int m = 0; m < MT; m++) s[m][j][c] *= scale[c][j], s[m][j][2 + c] *= scale[c][j];
            }
            if (index == 0 && item.skip > 0) {
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++)
                        if (at + 32 * c + j < (int)item.skip)
#pragma unroll
                            for (int m = 0; m < MT; m++) s[m][j][c] = s[m][j][2 + c] = -INFINITY;
            }
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int m = 0; m < MT; m++) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = -INFINITY;
        }
        // A bound of what a position's exponent is, its value's scale counted in.
        float top_scale = 0;
#pragma unroll
        for (int c = 0; c < 2; c++) top_scale = fmaxf(fmaxf(fmaxf(top_scale, h_lo(scales[c].x)), fmaxf(h_hi(scales[c].x), h_lo(scales[c].y))), h_hi(scales[c].y));
        top_scale = fmaxf(top_scale, __shfl_xor_sync(~0u, top_scale, 1));
        top_scale = lg2(fmaxf(fmaxf(top_scale, __shfl_xor_sync(~0u, top_scale, 2)), 1e-9f));
        float* told = red + tile % 2 * LINES * W;
        bool high = false;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x = -INFINITY;
#pragma unroll
                for (int j = 0; j < 4; j++) x = fmaxf(x, fmaxf(s[m][j][2 * r], s[m][j][2 * r + 1]));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                x = x * factors[16 * m + 8 * r + g] + top_scale - BIAS;
                high |= x > base[m][r] + (HEADROOM - BIAS);
                if (t == 0) told[(16 * m + 8 * r + g) * W + warp] = x;
            }
        uint4* mine = weights + (tile % 2 * TP + warp / 2) * P_PAGE;
        float total[MT][2], total_scaled[MT][2];
        // Weights of this warp's positions, in the order the sums take them in, which is that of the words of values; lanes change
        // places so that no two of a quarter of the warp meet in a bank.
        auto weigh = [&] {
            const float scale[2][4] = {{h_lo(scales[0].x), h_hi(scales[0].x), h_lo(scales[0].y), h_hi(scales[0].y)},
                                       {h_lo(scales[1].x), h_hi(scales[1].x), h_lo(scales[1].y), h_hi(scales[1].y)}};
            // By how high the codes of this lane's positions stand.
            constexpr float share[4] = {1.0f, BITS_V == 4 ? 1.0f / 16 : 1.0f / 4, BITS_V == 4 ? 1.0f : 1.0f / 16, BITS_V == 4 ? 1.0f / 16 : 1.0f / 64};
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 w[4][2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    total[m][r] = total_scaled[m][r] = 0;
                    const float factor = factors[16 * m + 8 * r + g];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float a = ex2(s[m][j][2 * r] * factor - base[m][r]), b = ex2(s[m][j][2 * r + 1] * factor - base[m][r]);
                        total[m][r] += a + b;
                        a *= scale[0][j], b *= scale[1][j];
                        total_scaled[m][r] += a + b;
                        w[j][r] = h_pair(a * share[j], b * share[j]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (BITS_V == 4) {
                        const int step = t / 2 * 2 + half, target = g * 4 + t % 2 * 2 + i;
                        mine[(step * MT + m) * 32 + (target ^ (t / 2))] = make_uint4(w[2 * i][0], w[2 * i][1], w[2 * i + 1][0], w[2 * i + 1][1]);
                    } else {
                        mine[((2 * half + i) * MT + m) * 32 + (lane ^ half)] = make_uint4(w[i][0], w[i][1], w[i + 2][0], w[i + 2][1]);
                    }
                }
            }
        };
        // The new base of all lines, once all warps have told of theirs; sums so far follow.
        auto rebase = [&] {
#pragma unroll
            for (int m = 0; m < MT; m++) {
                float by[2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float top = base[m][r];
                    const float4* all = (const float4*)(told + (16 * m + 8 * r + g) * W);
#pragma unroll
                    for (int i = 0; i < W / 4; i++) top = fmaxf(fmaxf(fmaxf(top, all[i].x), fmaxf(all[i].y, all[i].z)), all[i].w);
                    by[r] = ex2(base[m][r] - top);
                    base[m][r] = top;
                    sum[m][r] *= by[r], scaled[m][r] *= by[r];
                }
#pragma unroll
                for (int group = 0; group < NG; group++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
#pragma unroll
                        for (int c = 0; c < 4; c++) o[m][group][j][c] *= by[c / 2];
            }
        };
        weigh();
        uint4 v[2] = {};
        if (warp <= last_group) load_values<BITS_V>(v, page_at(tile * TP) + p.value_codes, p.rank_v, channel, t);
        // Of one mind: the bases are the same in all warps.
        if (any_of_block(high)) {
            rebase();
            weigh();
            __syncthreads();
        }
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) sum[m][r] += total[m][r], scaled[m][r] += total_scaled[m][r];
        const uint4* theirs = weights + tile % 2 * TP * P_PAGE + lane;
        const uint4* upper = weights + tile % 2 * TP * P_PAGE + (lane ^ 1);
        const int n = min(TP, pages - tile * TP);
        if (warp <= last_group) {
            for (int i = 0; i < n; i++) {
#pragma unroll
                for (int group = 0; group < NG; group++) {
                    if (warp + group * W > last_group) break;
                    // What comes next is on its way before this is met.
                    uint4 next[2] = {};
                    if (group + 1 < NG && warp + (group + 1) * W <= last_group)
                        load_values<BITS_V>(next, page_at(tile * TP + i) + p.value_codes, p.rank_v, channel + (group + 1) * W * 32, t);
                    else if (i + 1 < n) load_values<BITS_V>(next, page_at(tile * TP + i + 1) + p.value_codes, p.rank_v, channel, t);
                    sealed_values<MT, NG, BITS_V>(o, group, v, theirs + i * P_PAGE, upper + i * P_PAGE, t);
                    v[0] = next[0], v[1] = next[1];
                }
            }
        }
    }
    const int lines = LINES;
    float(&largest)[MT][2] = base;

    // Sums of all lanes and warps; then the largest element of each line, which its f16 are multiples of.
    auto over_warps = [&](float (&x)[MT][2], bool adds) {
        __syncthreads();
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float v = x[m][r];
#pragma unroll
                for (int i = 1; i < 4; i *= 2) {
                    const float other = __shfl_xor_sync(~0u, v, i);
                    v = adds ? v + other : fmaxf(v, other);
                }
                if (t == 0) red[warp * lines + 16 * m + 8 * r + g] = v;
            }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float v = adds ? 0.0f : -INFINITY;
                for (int i = 0; i < W; i++) {
                    const float other = red[i * lines + 16 * m + 8 * r + g];
                    v = adds ? v + other : fmaxf(v, other);
                }
                x[m][r] = v;
            }
    };
    over_warps(sum, true);
    over_warps(scaled, true);
    // Codes' middle stands for zero.
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int group = 0; group < NG; group++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) o[m][group][j][c] -= middle_of(BITS_V) / DENORMAL * scaled[m][c / 2];
    float top[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int group = 0; group < NG; group++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) top[m][c / 2] = fmaxf(top[m][c / 2], fabsf(o[m][group][j][c]));
    over_warps(top, false);
    u16* out = p.out + ((size_t)item.part * p.tiles * 16 + line0) * p.rank_v;
    float* state = p.state + ((size_t)item.part * p.tiles * 16 + line0) * 4;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int line = 16 * m + 8 * r + g;
            const float by = top[m][r] > 0 ? 1.0f / top[m][r] : 0.0f;
            if (warp == 0 && t == 0) *(float4*)(state + 4 * line) = make_float4(largest[m][r], sum[m][r], top[m][r] * (DENORMAL / unit_of(BITS_V)), 0);
            // Column 2 t + c of product j is channel 32 group + 4 (2 t + c) + j: eight neighbours to a lane.
#pragma unroll
            for (int group = 0; group < NG; group++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int channel = (warp + group * W) * 32 + 8 * t + 4 * c;
                    float(&x)[4][4] = o[m][group];
                    if (channel < p.rank_v)
                        *(uint2*)(out + (size_t)line * p.rank_v + channel) = make_uint2(h_pair(x[0][2 * r + c] * by, x[1][2 * r + c] * by), h_pair(x[2][2 * r + c] * by, x[3][2 * r + c] * by));
                }
        }
}

KERNEL(256, 2, attend_sealed_1_1_22)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 2, 2>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_22)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 2, 2>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_22)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 2, 2>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_22)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 2, 2>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_23)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 2, 3>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_23)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 2, 3>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_23)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 2, 3>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_23)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 2, 3>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_24)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 2, 4>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_24)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 2, 4>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_24)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 2, 4>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_24)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 2, 4>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_32)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 3, 2>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_32)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 3, 2>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_32)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 3, 2>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_32)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 3, 2>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_33)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 3, 3>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_33)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 3, 3>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_33)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 3, 3>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_33)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 3, 3>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_34)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 3, 4>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_34)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 3, 4>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_34)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 3, 4>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_34)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 3, 4>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_42)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 4, 2>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_42)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 4, 2>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_42)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 4, 2>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_42)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 4, 2>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_43)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 4, 3>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_43)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 4, 3>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_43)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 4, 3>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_43)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 4, 3>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_1_1_44)(SealedArgs p) { grid_go(); attend_sealed<1, 1, 8, 4, 4>(p); grid_wait(); }
KERNEL(256, 2, attend_sealed_2_1_44)(SealedArgs p) { grid_go(); attend_sealed<2, 1, 8, 4, 4>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_1_4_44)(SealedArgs p) { grid_go(); attend_sealed<1, 4, 8, 4, 4>(p); grid_wait(); }
KERNEL(256, 1, attend_sealed_2_4_44)(SealedArgs p) { grid_go(); attend_sealed<2, 4, 8, 4, 4>(p); grid_wait(); }
