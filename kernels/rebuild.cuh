// Sealed pages of every kind that latent.cuh does not meet as words: latents spread into shared memory as f16, whatever basis, quantiser
// and bits they have; met there by absorbed queries (keys taken after rope), or rebuilt into keys and turned (keys taken before it).
//
// name              grid                          block  serves
// attend_absorbed   (items * line blocks, 1, z)   256    decoded positions, keys after rope: up to 32 lines a block
// attend_rebuilt    (items * line blocks, 1, z)   256    decoded positions, keys before rope: up to 8 query heads of one KV head a block
// rebuild_pages     (pages, KV heads)             256    chunks of queries: bf16 tiles as of exact pages, which prefill.cuh meets
//
// A "line" is one query head of one row. A "group" is the KV heads that share a basis; its latents are a span of all latents. Blocks of z
// take 512 (absorbed) or 1024 (rebuilt) value latents each. Dynamic shared memory: as `Room` lays it out.
//
// Bytes a position and layer: those of its codes and scales, once for all lines of a block; other KV heads' blocks of the same item run
// beside it and meet them in the second-level cache. Nothing rebuilt leaves the multiprocessor while decoding.
//
// FLOPs a position and layer: to rebuild 2 rank_k d a KV head (of a joint basis; its group's span of others), to score 2 d a line (absorbed:
// 2 span_k), to sum 2 span_v a line. 8 KV heads of 128, ranks 208, 4 bits: 212 bytes and 447 kFLOP: the tensor cores bind, at 2100 FLOP a byte
// ten times a Hopper's ridge. A warp rebuilds 32 positions by 32 channels: 256 bytes out of shared memory for each product of 16 x 8 x 16,
// so that shared memory holds it to half of a Hopper's rate, and to an Ampere's whole; spreading takes some 3 operations a code beside it.
// Absorbed, memory binds at 8 and 16 bits, and issue beside it below.
#pragma once
#include "latent.cuh"

namespace rebuild {

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// The keys, or the values, of a layer's sealed pages.
struct Part {
    // Latents of all groups; of one; those that are spread: of keys from the multiple of 32 below its first, of both up to a multiple of 16;
    // and of these how many at once. Chunks of keys are multiples of 32, of values of 128, unless they are the whole width.
    u32 rank, span, width, chunk;
    u32 bits, affine;
    // Offsets in a page.
    u32 codes, meta;
};

// Rows of tiles in elements: odd multiples of 16 bytes, so that the 8 rows of a matrix lie in different banks. Columns of values are positions
// in the order of their words: column 4 q + b is position q + 16 b.
constexpr int V_ROW = PAGE + 8, S_ROW = PAGE + 4;
__device__ __forceinline__ u32 position_of(u32 column) { return column / 4 + column % 4 * 16; }

// What a page's groups have of scales and minima, in shared memory.
struct Scales {
    u16* keys;        // affine: [2][width]
    u16* values;      // affine: [2][groups of 32 latents][64 columns]
    float* key;       // [64]: what a position's products are multiplied by
    float* value;
};
__device__ __forceinline__ u32 value_groups(const Part& v) { return v.span == 0 ? 0 : (v.span + 62) / 32; }

// The numbers of a word in order, as pairs of f16: affine ones as codes, normal ones as codes less their middle.
template <int BITS, bool AFFINE> __device__ __forceinline__ void numbers(u32 w, u32 third, u32* out) {
    constexpr int QUADS = BITS == 8 ? 1 : BITS == 4 ? 2 : 4, PLANE = BITS == 3 ? 2 : BITS;
    constexpr u32 MASK = BITS == 8 ? ~0u : BITS == 4 ? 0x0f0f0f0fu : 0x03030303u;
    // 1024 + code and 512 + code, exactly, less 1024 and what 512 and the middle make.
    constexpr u32 BASE = AFFINE ? 0x64646464u : 0x60606060u, LESS = AFFINE ? 0xe400e400u : BITS == 4 ? 0xe00fe00fu : BITS == 3 ? 0xe007e007u : 0xe003e003u;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        u32 codes = w >> (PLANE * q) & MASK;
        if (BITS == 3) codes |= (third >> q & 0x01010101u) << 2;
        if (!AFFINE) codes <<= 1;
        out[2 * q] = h_add(prmt(codes, BASE, 0x4140), LESS);
        out[2 * q + 1] = h_add(prmt(codes, BASE, 0x4342), LESS);
    }
}

// Key latents from `begin` on (a multiple of 32), n of them (a multiple of 16), into the tile [64 positions][row].
template <int BITS, bool AFFINE>
__device__ __forceinline__ void spread_keys(u16* tile, u32 row, const u8* page, const Part& k, u32 begin, u32 n, const u16* scales) {
    constexpr u32 UNIT_CHANNELS = BITS == 4 || BITS == 8 ? 8 : 16, WORD = BITS == 8 ? 4 : UNIT_CHANNELS;
    const u32* words = (const u32*)(page + k.codes);
    const u32 low_words = (k.rank + WORD - 1) / WORD;
#pragma unroll 2
    for (u32 i = threadIdx.x; i < n / UNIT_CHANNELS * PAGE; i += THREADS) {
        const u32 position = i % PAGE, column = i / PAGE * UNIT_CHANNELS, word = (begin + column) / WORD;
        u32 x[UNIT_CHANNELS / 2], w = word < low_words ? ld_once(words + word * PAGE + position) : 0u;
        u32 third = BITS == 3 && word < low_words ? ld_once(words + (low_words + word / 2) * PAGE + position) >> (4 * (word % 2)) : 0u;
        numbers<BITS, AFFINE>(w, third, x);
        if constexpr (BITS == 8) numbers<BITS, AFFINE>(word + 1 < low_words ? ld_once(words + (word + 1) * PAGE + position) : 0u, 0, x + 2);
#pragma unroll
        for (u32 j = 0; j < UNIT_CHANNELS / 8; j++) {
            if constexpr (AFFINE) {
                const uint4 s = *(const uint4*)(scales + column + 8 * j), m = *(const uint4*)(scales + k.width + column + 8 * j);
                x[4 * j] = h_fma(x[4 * j], s.x, m.x), x[4 * j + 1] = h_fma(x[4 * j + 1], s.y, m.y);
                x[4 * j + 2] = h_fma(x[4 * j + 2], s.z, m.z), x[4 * j + 3] = h_fma(x[4 * j + 3], s.w, m.w);
            }
            *(uint4*)(tile + position * row + column + 8 * j) = make_uint4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
        }
    }
}
// The same of 16 bits, which lie channel by channel.
__device__ __forceinline__ void spread_keys_16(u16* tile, u32 row, const u8* page, const Part& k, u32 begin, u32 n) {
    const u32* from = (const u32*)(page + k.codes);
#pragma unroll 2
    for (u32 i = threadIdx.x; i < n / 8 * (PAGE / 2); i += THREADS) {
        const u32 pair = i % (PAGE / 2), column = i / (PAGE / 2) * 8, channel = begin + column;
        u32 x[8];
#pragma unroll
        for (u32 j = 0; j < 8; j++) x[j] = channel + j < k.rank ? ld_once(from + (channel + j) * (PAGE / 2) + pair) : 0u;
        u16* to = tile + 2 * pair * row + column;
        *(uint4*)to = make_uint4(prmt(x[0], x[1], 0x5410), prmt(x[2], x[3], 0x5410), prmt(x[4], x[5], 0x5410), prmt(x[6], x[7], 0x5410));
        *(uint4*)(to + row) = make_uint4(prmt(x[0], x[1], 0x7632), prmt(x[2], x[3], 0x7632), prmt(x[4], x[5], 0x7632), prmt(x[6], x[7], 0x7632));
    }
}
__device__ __forceinline__ void spread_keys(u16* tile, u32 row, const u8* page, const Part& k, u32 begin, u32 n, const u16* scales) {
    if (k.bits == 16) return spread_keys_16(tile, row, page, k, begin, n);
    if (k.affine) {
        if (k.bits == 8) spread_keys<8, true>(tile, row, page, k, begin, n, scales);
        else if (k.bits == 4) spread_keys<4, true>(tile, row, page, k, begin, n, scales);
        else if (k.bits == 3) spread_keys<3, true>(tile, row, page, k, begin, n, scales);
        else spread_keys<2, true>(tile, row, page, k, begin, n, scales);
    } else {
        if (k.bits == 4) spread_keys<4, false>(tile, row, page, k, begin, n, scales);
        else if (k.bits == 3) spread_keys<3, false>(tile, row, page, k, begin, n, scales);
        else spread_keys<2, false>(tile, row, page, k, begin, n, scales);
    }
}

// Value latents from `begin` on into the tile [n][V_ROW], n a multiple of 16; zeros from the span's end, `there` on. `first`: the group of 32
// that scales begin with.
template <int BITS, bool AFFINE>
__device__ __forceinline__ void spread_values(u16* tile, const u8* page, const Part& v, u32 begin, u32 n, u32 there, const u16* scales, u32 first) {
    constexpr u32 COLUMNS = BITS == 2 || BITS == 3 ? 16 : 8, UNITS = PAGE / COLUMNS;
    const u32* words = (const u32*)(page + v.codes) + begin;
    const u32 minima = value_groups(v) * PAGE;
#pragma unroll 2
    for (u32 i = threadIdx.x / 32; i < (n + 31) / 32 * UNITS; i += WARPS) {
        const u32 unit = i % UNITS, r = i / UNITS * 32 + threadIdx.x % 32;
        if (r >= n) continue;
        u32 x[COLUMNS / 2] = {};
        if (r < there) {
            if constexpr (BITS == 16) {
                const u16* from = (const u16*)(page + v.codes) + begin + r;
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 2; j++) {
                    const u32 column = unit * COLUMNS + 2 * j;
                    x[j] = from[position_of(column) * v.rank] | (u32)from[position_of(column + 1) * v.rank] << 16;
                }
            } else if constexpr (BITS == 8) {
                numbers<8, true>(ld_once(words + 2 * unit * v.rank + r), 0, x);
                numbers<8, true>(ld_once(words + (2 * unit + 1) * v.rank + r), 0, x + 2);
            } else {
                const u32 third = BITS == 3 ? ld_once(words + (4 + unit / 2) * v.rank + r) >> (4 * (unit % 2)) : 0u;
                numbers<BITS, AFFINE>(ld_once(words + unit * v.rank + r), third, x);
            }
            if constexpr (AFFINE) {
                const u16* s = scales + ((begin + r) / 32 - first) * PAGE + unit * COLUMNS;
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 8; j++) {
                    const uint4 a = *(const uint4*)(s + 8 * j), m = *(const uint4*)(s + minima + 8 * j);
                    x[4 * j] = h_fma(x[4 * j], a.x, m.x), x[4 * j + 1] = h_fma(x[4 * j + 1], a.y, m.y);
                    x[4 * j + 2] = h_fma(x[4 * j + 2], a.z, m.z), x[4 * j + 3] = h_fma(x[4 * j + 3], a.w, m.w);
                }
            }
        }
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; j++) *(uint4*)(tile + r * V_ROW + unit * COLUMNS + 8 * j) = make_uint4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
    }
}
__device__ __forceinline__ void spread_values(u16* tile, const u8* page, const Part& v, u32 begin, u32 n, u32 there, const u16* scales, u32 first) {
    if (v.bits == 16) spread_values<16, false>(tile, page, v, begin, n, there, scales, first);
    else if (v.affine) {
        if (v.bits == 8) spread_values<8, true>(tile, page, v, begin, n, there, scales, first);
        else if (v.bits == 4) spread_values<4, true>(tile, page, v, begin, n, there, scales, first);
        else if (v.bits == 3) spread_values<3, true>(tile, page, v, begin, n, there, scales, first);
        else spread_values<2, true>(tile, page, v, begin, n, there, scales, first);
    } else {
        if (v.bits == 4) spread_values<4, false>(tile, page, v, begin, n, there, scales, first);
        else if (v.bits == 3) spread_values<3, false>(tile, page, v, begin, n, there, scales, first);
        else spread_values<2, false>(tile, page, v, begin, n, there, scales, first);
    }
}

// What latents as they are spread are multiplied by, beside their scale.
__device__ __forceinline__ float unit_by(const Part& part) { return part.bits < 16 && !part.affine ? 1.0f / unit_of(part.bits) : 1.0f; }

// The scales of a page's keys that group `group` meets, whose spread latents begin at `first`.
__device__ __forceinline__ void stage_keys(const Scales& to, const u8* page, const Part& k, u32 group, u32 first) {
    const u16* meta = (const u16*)(page + k.meta);
    const bool normal = k.bits < 16 && !k.affine && k.rank > 0;
    const float by = unit_by(k);
    if (threadIdx.x < PAGE) to.key[threadIdx.x] = normal ? h_of(meta[group * PAGE + threadIdx.x]) * by : 1.0f;
    if (k.bits < 16 && k.affine)
        for (u32 i = threadIdx.x; i < k.width; i += THREADS) {
            const bool there = first + i < k.rank;
            to.keys[i] = there ? meta[first + i] : (u16)0;
            to.keys[k.width + i] = there ? meta[k.rank + first + i] : (u16)0;
        }
}
// Those of its values, `unit_by` left out.
__device__ __forceinline__ void stage_values(const Scales& to, const u8* page, const Part& v, u32 group) {
    const u16* meta = (const u16*)(page + v.meta);
    const bool normal = v.bits < 16 && !v.affine && v.rank > 0;
    if (threadIdx.x < PAGE) to.value[threadIdx.x] = normal ? h_of(meta[group * PAGE + threadIdx.x]) : 1.0f;
    if (v.bits < 16 && v.affine) {
        const u32 all = (v.rank + 31) / 32, first = group * v.span / 32, n = value_groups(v);
        for (u32 i = threadIdx.x; i < n * PAGE; i += THREADS) {
            const u32 g = first + i / PAGE, at = g * PAGE + position_of(i % PAGE);
            to.values[i] = g < all ? meta[at] : (u16)0;
            to.values[n * PAGE + i] = g < all ? meta[all * PAGE + at] : (u16)0;
        }
    }
}

// Rows of a map [there][d] from row `first` on, n of them, into shared memory [n][d + 8]; zeros past its end.
__device__ __forceinline__ void load_up(u16* to, const u16* from, u32 first, u32 n, u32 there, u32 d) {
    const u32 eights = d / 8;
    for (u32 r = threadIdx.x / 16; r < n; r += THREADS / 16)
        for (u32 c = threadIdx.x % 16; c < eights; c += 16) cp16_if(to + r * (d + 8) + 8 * c, from + (u64)(first + r) * d + 8 * c, first + r < there);
}

// Products of a warp: 32 positions by up to 16 channels of the lower half of a head and as many of the upper, which rope turns with them.
struct Rebuilt { float x[2][2][2][4]; };  // [16 positions][8 channels][half of the head]
// Latents [64 positions][row] (KEYS), or [latents][V_ROW] by column, times `up`: the `n` latents that both hold, a multiple of 16.
template <bool KEYS> __device__ __forceinline__ void multiply(Rebuilt& to, const u16* tile, u32 row, const u16* up, u32 n, u32 d) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = warp % 2 * 32, j0 = warp / 2, pairs = d / 16;
    const u16* a_from = KEYS ? tile + (at + lane % 16) * row + lane / 16 * 8 : tile + (lane / 16 * 8 + lane % 8) * V_ROW + at + lane / 8 % 2 * 8;
    const u16* b_from = up + lane % 16 * (d + 8) + lane / 16 * (d / 2) + 8 * j0;
#pragma unroll 2
    for (u32 k = 0; k < n; k += 16) {
        u32 a[2][4];
#pragma unroll
        for (u32 m = 0; m < 2; m++) ldsm4<!KEYS>(a[m], KEYS ? a_from + m * 16 * row + k : a_from + k * V_ROW + m * 16);
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            if (j0 + 4 * j >= pairs) break;
            u32 b[4];
            ldsm4<true>(b, b_from + k * (d + 8) + 32 * j);
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                mma_h(to.x[m][j][0], a[m], b[0], b[1]);
                mma_h(to.x[m][j][1], a[m], b[2], b[3]);
            }
        }
    }
}

}  // namespace rebuild

struct LatentsArgs {
    const u8* arena;
    const u32* table;
    const SealedItem* items;
    // Absorbed: [rows][16 tiles][keys.width] f16 and [rows][16 tiles], by `absorb`. Rebuilt: [rows][heads][d] f32 after rope.
    const void* queries;
    const float* factors;
    // Rebuilt: [kv_heads][keys.width][d] f16, zeros where a head has no part in a latent; [kv_heads][d]; [positions][d / 2].
    const u16* up;
    const float* mean;
    const float* cos;
    const float* sin;
    // [items][16 tiles][stride] f16 and [items][16 tiles][4] f32: largest exponent, sum, and what the f16 are multiples of.
    u16* out;
    float* state;
    float scale;
    // Lines are heads; they come in `units` that blocks keep apart: groups, or KV heads where keys are rebuilt.
    u32 heads, units, groups, d, tiles, stride;
    // Whether shared memory holds the whole map; where the layer ends in a page.
    u32 resident, end;
    rebuild::Part keys, values;
};

namespace rebuild {

// Places in shared memory, in this order.
struct Room {
    u16 *up, *queries, *tile, *weights;
    float *scores, *by, *factors;
    Scales scales;
    u32* table;
};
__device__ __forceinline__ u32 tile_size(const Part& k, const Part& v) { return max(PAGE * (k.chunk + 8), v.chunk * V_ROW); }
template <bool ABSORBED, int LINES> __device__ __forceinline__ Room room(u8* at, const LatentsArgs& p) {
    Room r;
    auto take = [&](size_t bytes) { u8* here = at; at += bytes; return here; };
    r.up = (u16*)take(ABSORBED ? 0 : 2 * (p.resident ? p.keys.width : p.keys.chunk) * (p.d + 8));
    r.queries = (u16*)take(2 * LINES * ((ABSORBED ? p.keys.width : p.d) + 8));
    r.tile = (u16*)take(2 * tile_size(p.keys, p.values));
    r.scores = (float*)take(4 * (ABSORBED ? 2 : 4) * LINES * S_ROW);
    r.weights = (u16*)take(2 * LINES * V_ROW);
    r.scales.keys = (u16*)take(p.keys.affine ? 4 * p.keys.width : 0);
    r.scales.values = (u16*)take(p.values.affine ? 4 * value_groups(p.values) * PAGE : 0);
    r.scales.key = (float*)take(4 * PAGE);
    r.scales.value = (float*)take(4 * PAGE);
    r.by = (float*)take(4 * LINES);
    r.factors = (float*)take(4 * LINES);
    r.table = (u32*)take(4 * SEALED_MOST);
    return r;
}

// score[line][pos] = factor a[line] . latent[pos], or q[line] . turned(up latent[pos] + mean);  sum[line][r] = sum over pos of 2^(score - m) value[pos][r].
//
// A page at a time: its key latents are spread; scores are summed by warps in planes, of channels or of latents; a softmax of 16 lanes a line;
// its value latents are spread where those of keys were, and summed. Keys are turned by their place in the page, and queries turned back by
// the page's own, once a page, so that one table of 64 positions turns all keys. (Angles are f32 products of position and frequency: what is
// composed is off what the table has by their rounding, 2^-24 of the angle.)
template <bool ABSORBED, int NT, int MT>
__device__ __forceinline__ void attend(const LatentsArgs& p) {
    constexpr int LINES = 8 * NT, PLANES = ABSORBED ? 2 : 4, ROUNDS = (LINES + 15) / 16;
    constexpr float HEADROOM = 12.0f;       // weights up to 2^12, so that small ones keep their bits in f16
    static_assert(ABSORBED || LINES == WARPS, "a warp to a line");
    SHARED(u8, shared);
    const Room room = rebuild::room<ABSORBED, LINES>(shared, p);
    const u32 tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const u32 d = p.d, half = d / 2, lines = p.heads / p.units, cuts = (lines + LINES - 1) / LINES, blocks = p.units * cuts;
    const u32 unit = blockIdx.x % blocks / cuts, cut = blockIdx.x % blocks % cuts, index = blockIdx.x / blocks;
    const u32 head0 = unit * lines + cut * LINES, n = min((u32)LINES, lines - cut * LINES), used = (n + 7) / 8;
    const u32 group = unit * p.groups / p.units, first = group * p.keys.span / 32 * 32;
    const u32 base = blockIdx.z * 128 * MT, rows = p.values.width > base ? min(p.values.width - base, 128u * MT) : 0;
    const u32 value0 = group * p.values.span + base, there = p.values.span > base ? p.values.span - base : 0, value_group = group * p.values.span / 32;
    const u16* map = ABSORBED ? nullptr : p.up + (u64)unit * p.keys.width * d;
    const float* mean = ABSORBED ? nullptr : p.mean + unit * d;
    // Maps are there before any kernel of the step runs.
    if (!ABSORBED && p.resident) { load_up(room.up, map, 0, p.keys.width, p.keys.width, d); cp_commit(); }
    grid_wait();
    grid_go();
    const SealedItem item = p.items[index];
    if (tid < item.pages) room.table[tid] = p.table[item.table + tid];

    float pairs[2][2] = {};                 // of a query: channels that turn together
    if constexpr (ABSORBED) {
        const u16* from = (const u16*)p.queries + ((u64)item.row * p.tiles * 16 + head0) * p.keys.width;
        const u32 eights = p.keys.width / 8;
        for (u32 line = warp; line < LINES; line += WARPS)
            for (u32 i = lane; i < eights; i += 32)
                *(uint4*)(room.queries + line * (p.keys.width + 8) + 8 * i) = line < n ? *(const uint4*)(from + (u64)line * p.keys.width + 8 * i) : make_uint4(0, 0, 0, 0);
        if (tid < LINES) room.factors[tid] = tid < n ? p.factors[(u64)item.row * p.tiles * 16 + head0 + tid] : 0.0f;
    } else {
        // As fractions of a line's largest element, and without the attention factor that the table has, which the keys' turn brings in.
        const float* from = (const float*)p.queries + ((u64)item.row * p.heads + head0) * d;
        float largest = 0;
        for (u32 c = lane; warp < n && c < d; c += 32) largest = fmaxf(largest, fabsf(from[warp * d + c]));
        largest = warp_max(largest);
        if (lane == 0) room.factors[warp] = fmaxf(largest * p.scale * 1.44269504f, 1e-30f), room.by[warp] = largest > 0 ? 1.0f / (largest * p.cos[0]) : 0.0f;
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            const u32 i = tid + j * THREADS, line = i / half, c = i % half;
            if (line < n) pairs[j][0] = from[line * d + c] * room.by[line], pairs[j][1] = from[line * d + half + c] * room.by[line];
        }
    }
    __syncthreads();
    auto page_at = [&](u32 i) { return p.arena + (u64)room.table[i] * UNIT; };
    const u32 page_lines = (p.end - p.keys.codes + 127) / 128;
    auto fetch = [&](u32 i) {
        if (i < item.pages)
            for (u32 line = tid; line < page_lines; line += THREADS) prefetch(page_at(i) + p.keys.codes + line * 128);
    };
    stage_keys(room.scales, page_at(0), p.keys, group, first);

    float o[MT][NT][4] = {}, top[ROUNDS], sum[ROUNDS] = {};
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) top[i] = -1e30f;
    const u32 k_row = p.keys.chunk + 8;
    const bool normal_values = p.values.bits < 16 && !p.values.affine;
    __syncthreads();
    for (u32 i = 0; i < item.pages; i++) {
        const u8* page = page_at(i);
        fetch(i + 1);
        stage_values(room.scales, page, p.values, group);
        if constexpr (!ABSORBED) {
            const u64 turn = (u64)(item.page + i) * PAGE * half;
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                const u32 at = tid + j * THREADS, line = at / half, c = at % half;
                if (line >= LINES) break;
                const float co = p.cos[turn + c], si = p.sin[turn + c], x = pairs[j][0], y = pairs[j][1];
                room.queries[line * (d + 8) + c] = of_h(x * co + y * si);
                room.queries[line * (d + 8) + half + c] = of_h(y * co - x * si);
            }
        }
        // Scores: planes of products.
        Rebuilt keys = {};
        float s[ABSORBED ? NT : 1][4] = {};
        u32 chunk = 0;
        do {
            const u32 n_k = min(p.keys.chunk, p.keys.width - chunk);
            if (chunk > 0) __syncthreads();
            if (!ABSORBED && !p.resident) { load_up(room.up, map, chunk, n_k, p.keys.width, d); cp_commit(); }
            spread_keys(room.tile, k_row, page, p.keys, first + chunk, n_k, room.scales.keys + chunk);
            cp_wait<0>();
            __syncthreads();
            if constexpr (ABSORBED) {
                const u16* a_from = room.tile + (warp % 4 * 16 + lane % 16) * k_row + lane / 16 * 8;
                const u16* b_from = room.queries + (lane / 16 * 8 + lane % 8) * (p.keys.width + 8) + chunk + lane / 8 % 2 * 8;
#pragma unroll 2
                for (u32 k = warp / 4 * 16; k < n_k; k += 32) {
                    u32 a[4];
                    ldsm4<false>(a, a_from + k);
#pragma unroll
                    for (u32 j = 0; j < NT; j += 2) {
                        if (j >= used) break;
                        u32 b[4];
                        ldsm4<false>(b, b_from + j * 8 * (p.keys.width + 8) + k);
                        mma_h(s[j], a, b[0], b[1]);
                        if (j + 1 < used) mma_h(s[j + 1], a, b[2], b[3]);
                    }
                }
            } else {
                multiply<true>(keys, room.tile, k_row, room.up + (p.resident ? chunk * (d + 8) : 0), n_k, d);
            }
            chunk += p.keys.chunk;
        } while (chunk < p.keys.width);
        if constexpr (ABSORBED) {
            const u32 position = warp % 4 * 16 + g;
            const float by[2] = {room.scales.key[position], room.scales.key[position + 8]};
            float* to = room.scores + (warp / 4 * LINES + 2 * t) * S_ROW + position;
#pragma unroll
            for (u32 j = 0; j < NT; j++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) to[(8 * j + c % 2) * S_ROW + c / 2 * 8] = s[j][c] * by[c / 2];
        } else {
            // What a product gives two tiles of 8 channels is what the next one takes as 16: those of the two halves of the head.
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                float x[4] = {};
                const u32 position = warp % 2 * 32 + m * 16 + g;
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    const u32 c = 8 * (warp / 2 + 4 * j) + 2 * t;
                    if (c >= half) break;
                    const float2 lower = *(const float2*)(mean + c), upper = *(const float2*)(mean + half + c);
                    u32 a[4];
#pragma unroll
                    for (u32 r = 0; r < 2; r++) {
                        const u32 at = position + 8 * r;
                        const float2 co = *(const float2*)(p.cos + at * half + c), si = *(const float2*)(p.sin + at * half + c);
                        const float by = room.scales.key[at];
                        const float x0 = keys.x[m][j][0][2 * r] * by + lower.x, x1 = keys.x[m][j][0][2 * r + 1] * by + lower.y;
                        const float y0 = keys.x[m][j][1][2 * r] * by + upper.x, y1 = keys.x[m][j][1][2 * r + 1] * by + upper.y;
                        a[r] = h_pair(x0 * co.x - y0 * si.x, x1 * co.y - y1 * si.y);
                        a[2 + r] = h_pair(y0 * co.x + x0 * si.x, y1 * co.y + x1 * si.y);
                    }
                    const u16* q = room.queries + g * (d + 8) + c;
                    mma_h(x, a, *(const u32*)q, *(const u32*)(q + half));
                }
                float* to = room.scores + (warp / 2 * LINES + 2 * t) * S_ROW + position;
                to[0] = x[0], to[S_ROW] = x[1], to[8] = x[2], to[S_ROW + 8] = x[3];
            }
        }
        __syncthreads();

        // A softmax: 16 lanes a line, four positions a lane.
#pragma unroll
        for (u32 round = 0; round < ROUNDS; round++) {
            const u32 line = tid / 16 + 16 * round, quad = tid % 16;
            if (line / 2 * 2 >= n) break;
            float x[4], most = -INFINITY, scales = 1.0f;
            const float factor = room.factors[line];
#pragma unroll
            for (u32 b = 0; b < 4; b++) {
                const u32 position = quad + 16 * b;
                x[b] = 0;
#pragma unroll
                for (u32 plane = 0; plane < PLANES; plane++) x[b] += room.scores[(plane * LINES + line) * S_ROW + position];
                x[b] = i == 0 && position < item.skip ? -INFINITY : x[b] * factor;
                most = fmaxf(most, x[b]);
            }
#pragma unroll
            for (int k = 1; k < 16; k *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, k));
            if (normal_values) {
                // Weights carry the values' scales.
                scales = 1e-9f;
#pragma unroll
                for (u32 b = 0; b < 4; b++) scales = fmaxf(scales, room.scales.value[quad + 16 * b]);
#pragma unroll
                for (int k = 1; k < 16; k *= 2) scales = fmaxf(scales, __shfl_xor_sync(~0u, scales, k));
            }
            const float now = fmaxf(top[round], most + lg2(scales) - HEADROOM), by = ex2(top[round] - now);
            top[round] = now;
            float w[4], more = 0;
#pragma unroll
            for (u32 b = 0; b < 4; b++) {
                w[b] = ex2(x[b] - now);
                more += w[b];
                w[b] *= room.scales.value[quad + 16 * b];
            }
            sum[round] = sum[round] * by + more;
            *(uint2*)(room.weights + line * V_ROW + 4 * quad) = make_uint2(h_pair(w[0], w[1]), h_pair(w[2], w[3]));
            if (quad == 0) room.by[line] = by;
        }
        if (i + 1 < item.pages) stage_keys(room.scales, page_at(i + 1), p.keys, group, first);

        // Sums of values.
        for (u32 at = 0; at < rows; at += p.values.chunk) {
            const u32 n_v = min(p.values.chunk, rows - at);
            if (at > 0) __syncthreads();
            spread_values(room.tile, page, p.values, value0 + at, n_v, there > at ? there - at : 0, room.scales.values, value_group);
            __syncthreads();
            if (at == 0) {
#pragma unroll
                for (u32 j = 0; j < NT; j++) {
                    if (j >= used) break;
                    const float2 by = *(const float2*)(room.by + 8 * j + 2 * t);
                    if (!__any_sync(~0u, by.x != 1.0f || by.y != 1.0f)) continue;
#pragma unroll
                    for (u32 m = 0; m < MT; m++) o[m][j][0] *= by.x, o[m][j][1] *= by.y, o[m][j][2] *= by.x, o[m][j][3] *= by.y;
                }
            }
            const u32 m0 = at / 128, m1 = m0 + (n_v + 127) / 128;
#pragma unroll
            for (u32 k = 0; k < PAGE; k += 16) {
                u32 b[NT][2];
#pragma unroll
                for (u32 j = 0; j < NT; j++) {
                    const u16* w = room.weights + (8 * j + g) * V_ROW + k + 2 * t;
                    b[j][0] = *(const u32*)w, b[j][1] = *(const u32*)(w + 8);
                }
#pragma unroll
                for (u32 m = 0; m < MT; m++) {
                    const u32 r = m * 128 + warp * 16;
                    if (m < m0 || m >= m1 || r >= rows) continue;
                    u32 a[4];
                    ldsm4<false>(a, room.tile + (r - at + lane % 16) * V_ROW + k + lane / 16 * 8);
#pragma unroll
                    for (u32 j = 0; j < NT; j++)
                        if (j < used) mma_h(o[m][j], a, b[j][0], b[j][1]);
                }
            }
        }
        __syncthreads();
    }

    // Divided by their sums, latents are between those they are sums of, which f16 can hold.
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        const u32 line = tid / 16 + 16 * round;
        if (line / 2 * 2 >= n) break;
        float total = sum[round];
#pragma unroll
        for (int k = 1; k < 16; k *= 2) total += __shfl_xor_sync(~0u, total, k);
        if (tid % 16 == 0) {
            room.by[line] = total > 0 ? unit_by(p.values) / total : 0.0f;
            if (line < n && blockIdx.z == 0) *(float4*)(p.state + ((u64)item.part * p.tiles * 16 + head0 + line) * 4) = make_float4(top[round], total, total, 0);
        }
    }
    __syncthreads();
    u16* out = p.out + ((u64)item.part * p.tiles * 16 + head0) * p.stride + base;
#pragma unroll
    for (u32 j = 0; j < NT; j++) {
        if (j >= used) break;
        const float2 by = *(const float2*)(room.by + 8 * j + 2 * t);
        const bool odd = g % 2;
        const u32 line = 8 * j + 2 * t + odd;
#pragma unroll
        for (u32 m = 0; m < MT; m++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                // Two neighbouring latents of one line to a lane.
                const float x = o[m][j][2 * r] * by.x, y = o[m][j][2 * r + 1] * by.y, other = __shfl_xor_sync(~0u, odd ? x : y, 4);
                const u32 latent = m * 128 + warp * 16 + 8 * r + g / 2 * 2;
                if (line < n && base + latent < p.stride) *(u32*)(out + (u64)line * p.stride + latent) = odd ? h_pair(other, y) : h_pair(x, other);
            }
    }
}

}  // namespace rebuild

KERNEL(256, 2, attend_absorbed)(LatentsArgs p) { rebuild::attend<true, 4, 4>(p); }
KERNEL(256, 2, attend_rebuilt)(LatentsArgs p) { rebuild::attend<false, 1, 8>(p); }

// A sealed page to rebuild: its address and that of the sinks block in units of 64 bytes, which of the sequence's pages it is, and how many of
// its first positions are sinks.
struct RebuildJob { u32 from, page, sinks_page, sinks; };

struct RebuildArgs {
    const u8* arena;
    const RebuildJob* jobs;
    u16* out;                 // [jobs] exact pages of one layer, of bf16
    // [kv_heads][keys.width][d] f16 and [kv_heads][d], or null; cosines and sines [positions][d / 2], or null where keys are taken after rope.
    const u16* key_up;
    const float* key_mean;
    const float* cos;
    const float* sin;
    // [kv_heads][value_rows][d] f16, and [kv_heads][d].
    const u16* value_up;
    const float* value_mean;
    u32 groups, d, value_rows;
    u32 sinks_offset, sinks_stride;  // of the layer in a sinks block: bytes; positions it has room for
    rebuild::Part keys, values;
};

namespace rebuild {

// out: k[pos] = turned(up latent[pos] + mean), v[pos] = up latent[pos] + mean; sinks as their block has them.
//
// The tensor cores' share is 4 rank d a position and KV head, some hundredth of what a chunk of 2048 queries asks of them over the same
// positions; written and read once from the second-level cache, 4 d bytes a position and KV head. Latency binds.
__device__ __forceinline__ void pages(const RebuildArgs& p) {
    SHARED(u8, shared);
    const u32 d = p.d, half = d / 2, kv_head = blockIdx.y, tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const u32 group = kv_head * p.groups / gridDim.y, first = group * p.keys.span / 32 * 32, most = max(p.keys.chunk, p.values.chunk);
    u16* up = (u16*)shared;
    u16* tile = up + most * (d + 8);
    Scales scales;
    scales.keys = tile + max(tile_size(p.keys, p.values), d * V_ROW);
    scales.values = scales.keys + (p.keys.affine ? 2 * p.keys.width : 0);
    scales.key = (float*)(scales.values + (p.values.affine ? 2 * value_groups(p.values) * PAGE : 0));
    scales.value = scales.key + PAGE;
    const RebuildJob job = p.jobs[blockIdx.x];
    const u8* page = p.arena + (u64)job.from * UNIT;
    const u16* sinks = (const u16*)(p.arena + (u64)job.sinks_page * UNIT + p.sinks_offset) + (u64)2 * kv_head * d * p.sinks_stride;
    u16* out = p.out + ((u64)blockIdx.x * gridDim.y + kv_head) * 2 * d * PAGE;
    stage_keys(scales, page, p.keys, group, first);
    stage_values(scales, page, p.values, group);
    __syncthreads();

    Rebuilt x = {};
    for (u32 chunk = 0; chunk < p.keys.width; chunk += p.keys.chunk) {
        const u32 n = min(p.keys.chunk, p.keys.width - chunk);
        load_up(up, p.key_up + (u64)kv_head * p.keys.width * d, chunk, n, p.keys.width, d);
        cp_commit();
        spread_keys(tile, p.keys.chunk + 8, page, p.keys, first + chunk, n, scales.keys + chunk);
        cp_wait<0>();
        __syncthreads();
        multiply<true>(x, tile, p.keys.chunk + 8, up, n, d);
        __syncthreads();
    }
    // Row r of a 16 x 8 product, and whether its head's upper half: what to do with two neighbouring channels of both halves.
    auto each = [&](auto with) {
#pragma unroll
        for (u32 m = 0; m < 2; m++)
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                const u32 c = 8 * (warp / 2 + 4 * j) + 2 * t;
                if (c >= half) break;
#pragma unroll
                for (u32 r = 0; r < 2; r++) with(warp % 2 * 32 + m * 16 + 8 * r + g, c, x.x[m][j][0] + 2 * r, x.x[m][j][1] + 2 * r);
            }
    };
    auto mean_of = [&](const float* mean, u32 c) { return mean ? *(const float2*)(mean + kv_head * d + c) : make_float2(0, 0); };
    each([&](u32 position, u32 c, const float* a, const float* b) {
        const float by = scales.key[position];
        const float2 lower = mean_of(p.key_mean, c), upper = mean_of(p.key_mean, half + c);
        const u64 turn = ((u64)job.page * PAGE + position) * half + c;
        const float2 co = p.cos ? *(const float2*)(p.cos + turn) : make_float2(1, 1), si = p.cos ? *(const float2*)(p.sin + turn) : make_float2(0, 0);
        const float x0 = a[0] * by + lower.x, x1 = a[1] * by + lower.y, y0 = b[0] * by + upper.x, y1 = b[1] * by + upper.y;
        u16* to = tile + c * V_ROW + position;
        to[0] = of_b(x0 * co.x - y0 * si.x), to[V_ROW] = of_b(x1 * co.y - y1 * si.y);
        to[half * V_ROW] = of_b(y0 * co.x + x0 * si.x), to[(half + 1) * V_ROW] = of_b(y1 * co.y + x1 * si.y);
    });
    __syncthreads();
    for (u32 i = tid; i < d * (PAGE / 8); i += THREADS) {
        const u32 c = i / (PAGE / 8), position = i % (PAGE / 8) * 8;
        u16* from = tile + c * V_ROW + position;
        for (u32 k = 0; k < 8 && position + k < job.sinks; k++) from[k] = sinks[c * p.sinks_stride + position + k];
        *(uint4*)(out + c * PAGE + position) = *(const uint4*)from;
    }
    __syncthreads();

    x = {};
    for (u32 chunk = 0; chunk < p.values.width; chunk += p.values.chunk) {
        const u32 n = min(p.values.chunk, p.values.width - chunk), there = p.values.span > chunk ? p.values.span - chunk : 0;
        load_up(up, p.value_up + (u64)kv_head * p.value_rows * d, chunk, n, p.value_rows, d);
        cp_commit();
        spread_values(tile, page, p.values, group * p.values.span + chunk, n, there, scales.values, group * p.values.span / 32);
        cp_wait<0>();
        __syncthreads();
        multiply<false>(x, tile, V_ROW, up, n, d);
        __syncthreads();
    }
    const float unit = unit_by(p.values);
    each([&](u32 column, u32 c, const float* a, const float* b) {
        const u32 position = position_of(column);
        const float by = scales.value[position] * unit;
        const float2 lower = mean_of(p.value_mean, c), upper = mean_of(p.value_mean, half + c);
        u16* to = tile + position * (d + 8) + c;
        *(u32*)to = b_pair(a[0] * by + lower.x, a[1] * by + lower.y), *(u32*)(to + half) = b_pair(b[0] * by + upper.x, b[1] * by + upper.y);
    });
    __syncthreads();
    out += d * PAGE;
    sinks += d * p.sinks_stride;
    for (u32 i = tid; i < d / 8 * PAGE; i += THREADS) {
        const u32 position = i / (d / 8), c = i % (d / 8) * 8;
        *(uint4*)(out + position * d + c) = *(const uint4*)(position < job.sinks ? sinks + position * d + c : tile + position * (d + 8) + c);
    }
}

}  // namespace rebuild

KERNEL(256, 2, rebuild_pages)(RebuildArgs p) { grid_wait(); grid_go(); rebuild::pages(p); }
