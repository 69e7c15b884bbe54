// Seals exact pages: latents of their keys and values, quantised, packed into sealed pages. In two kernels, as a scale wants all
// latents of a position (or all positions of a latent) while their computation wants many blocks even for one page.
//
// name            grid                                              block  dynamic shared bytes
// seal_project_*  ((max rank + 31) / 32, jobs, 2: keys, values)     128    12288
// seal_codes      (jobs, 4: keys, values, two halves of each)       512    4 max(1536 + 32 max blocks, 2 (max rank rounded up to 32))
//
// Between them lie f32 latents, [jobs] of keys [rank][64], then values [64][rank]: 256 (key rank + value rank) bytes a job.
// Maps are dense f32 [channels][rank], rotations folded in; in equal blocks along their diagonal, `groups` of them, beyond which
// they are not summed. A part of rank 0 is left out. The head dimension divides by 8. Keys that are taken before rope are turned back
// from it on their way in.
#pragma once
#include "common.cuh"

namespace seal {

// A page to seal: addresses in units of 64 bytes, the byte offset of the layer in the exact page, positions that stay out, and where the
// page's first one stands.
struct Job { u32 from, offset, to, skip, position; };

// The keys or the values of one layer: how wide, blocks of the map's diagonal, bits (16, 8, 4, 3, 2), affine or normal, groups that
// share a scale where it is normal, and byte offsets from the sealed page's start.
struct Part { u32 rank, groups, bits, affine, blocks, codes, meta; };

template <class E> struct Eight { uint4 w[sizeof(E) / 2]; };
__device__ __forceinline__ void widen(const Eight<u16>& e, float (&x)[8]) {
    u32 w[4] = {e.w[0].x, e.w[0].y, e.w[0].z, e.w[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) { x[2 * i] = b_lo(w[i]); x[2 * i + 1] = b_hi(w[i]); }
}
__device__ __forceinline__ void widen(const Eight<float>& e, float (&x)[8]) {
    u32 w[8] = {e.w[0].x, e.w[0].y, e.w[0].z, e.w[0].w, e.w[1].x, e.w[1].y, e.w[1].z, e.w[1].w};
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = f_of(w[i]);
}

constexpr int RANKS = 32, CHANNELS = 32, PROJECTS = 128;

// latent[p][r] = sum over c of (x[p][c] - mean[c]) map[c][r], channels in order, in f32 so that codes are the reference's but for
// latents next to a boundary. A block takes 64 positions by 32 latents, a thread 4 by 4; 32 channels at a time, the next ones in
// registers meanwhile. FLOPs: 128 * rank * channels / groups a page; bytes: the page once per 32 latents, the map once per page, both
// from the second-level cache. Bound by f32 arithmetic. TURN: x is turned back first, channels a and b = a + d / 2 of a head to
// (a cos + b sin) / (cos^2 + sin^2) and (b cos - a sin) / the same, by `turns` [positions][d / 2] from the page's first on; the page is then
// read twice, and the table once, per 32 latents.
template <class E, bool VALUES, bool TURN>
__device__ __forceinline__ void project(const u8* __restrict__ page, const Part& part, const float* __restrict__ map, const float* __restrict__ mean, u32 channels,
                                        u32 d, const float* __restrict__ cos, const float* __restrict__ sin, float* __restrict__ latents) {
    SHARED(float, xs);                    // [CHANNELS][PAGE]
    float* ms = xs + CHANNELS * PAGE;     // [CHANNELS][RANKS]
    u32 first = blockIdx.x * RANKS, rank = part.rank;
    if (first >= rank) return;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 width = rank / part.groups, last = min(first + RANKS, rank) - 1;
    u32 begin = first / width * (channels / part.groups), end = (last / width + 1) * (channels / part.groups);
    Eight<E> next[2], other[TURN ? 2 : 1];
    float next_map[8];
    auto load = [&](u32 from) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            u32 e = threadIdx.x + PROJECTS * u;
            u32 channel = from + (VALUES ? warp * 8 : e / 8), position = VALUES ? lane + 32 * u : e % 8 * 8;
            u32 head = channel / d, c = channel % d;
            u64 at = VALUES ? (2 * head + 1) * (u64)d * PAGE + position * d + c : 2 * head * (u64)d * PAGE + c * PAGE + position;
            const uint4* p = (const uint4*)(page + at * sizeof(E));
#pragma unroll
            for (u32 i = 0; i < sizeof(E) / 2; i++) next[u].w[i] = channel < end ? p[i] : uint4{0, 0, 0, 0};
            if constexpr (TURN) {
                // What turns with it: half a head on or back.
                const uint4* q = (const uint4*)((const u8*)p + (c < d / 2 ? (int)d / 2 : -(int)d / 2) * (int)(PAGE * sizeof(E)));
#pragma unroll
                for (u32 i = 0; i < sizeof(E) / 2; i++) other[u].w[i] = channel < end ? q[i] : uint4{0, 0, 0, 0};
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 channel = from + warp + 4 * i, r = first + lane;
            next_map[i] = channel < end && r < rank ? map[(u64)channel * rank + r] : 0.0f;
        }
    };
    auto store = [&](u32 from) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            u32 e = threadIdx.x + PROJECTS * u;
            float x[8];
            widen(next[u], x);
            if (VALUES) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    u32 c = warp * 8 + i;
                    xs[c * PAGE + lane + 32 * u] = from + c < end && mean ? x[i] - mean[from + c] : x[i];
                }
            } else {
                u32 c = e / 8;
                if constexpr (TURN) {
                    float y[8];
                    widen(other[u], y);
                    u32 half = d / 2, in_head = (from + c) % d, at = e % 8 * 8 * half + in_head % half;
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        float co = cos[at + i * half], si = sin[at + i * half];
                        x[i] = (in_head < half ? x[i] * co + y[i] * si : x[i] * co - y[i] * si) / (co * co + si * si);
                    }
                }
                float m = from + c < end && mean ? mean[from + c] : 0.0f;
                float4* to = (float4*)(xs + c * PAGE + e % 8 * 8);
                to[0] = float4{x[0] - m, x[1] - m, x[2] - m, x[3] - m};
                to[1] = float4{x[4] - m, x[5] - m, x[6] - m, x[7] - m};
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) ms[(warp + 4 * i) * RANKS + lane] = next_map[i];
    };
    float sum[4][4] = {};  // [latent][position]
    u32 p4 = threadIdx.x % 16, r4 = threadIdx.x / 16;
    load(begin);
    for (u32 from = begin; from < end; from += CHANNELS) {
        __syncthreads();
        store(from);
        __syncthreads();
        if (from + CHANNELS < end) load(from + CHANNELS);
#pragma unroll 8
        for (int c = 0; c < CHANNELS; c++) {
            float4 x = ((const float4*)(xs + c * PAGE))[p4], m = ((const float4*)(ms + c * RANKS))[r4];
            float mr[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum[i][0] = fmaf(x.x, mr[i], sum[i][0]);
                sum[i][1] = fmaf(x.y, mr[i], sum[i][1]);
                sum[i][2] = fmaf(x.z, mr[i], sum[i][2]);
                sum[i][3] = fmaf(x.w, mr[i], sum[i][3]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 r = first + r4 * 4 + i;
        if (r >= rank) continue;
        if (VALUES) {
#pragma unroll
            for (int j = 0; j < 4; j++) latents[(p4 * 4 + j) * rank + r] = sum[i][j];
        } else {
            ((float4*)(latents + r * PAGE))[p4] = float4{sum[i][0], sum[i][1], sum[i][2], sum[i][3]};
        }
    }
}

// The levels of `quant::levels`.
template <int BITS> __device__ __forceinline__ constexpr int level(int code) { return 2 * code + 1 - (1 << BITS); }
template <int BITS> __device__ __forceinline__ constexpr float unit() { return BITS == 2 ? 2.0087f : BITS == 3 ? 3.4129f : 5.9666f; }

// The code of the nearest level to y; half way goes down.
template <int BITS> __device__ __forceinline__ u32 number(float y) {
    constexpr float half = 1 << (BITS - 1);
    return (u32)(fminf(fmaxf(ceilf(0.5f * y), 1 - half), half) + half - 1);
}

__device__ __forceinline__ u16 saturated(float x) { return of_h(fminf(fmaxf(x, -65504.0f), 65504.0f)); }
__device__ __forceinline__ float root(float squares, u32 n) { return sqrtf(squares / (float)n); }

// What scales latents to levels: f16 deviation from products and squares of the first choice of levels, which `first` scaled.
template <int BITS> __device__ __forceinline__ float settle(float first, float xl, float ll, u16& deviation) {
    deviation = first > 0.0f ? saturated(xl / ll * unit<BITS>()) : (u16)0;
    float rounded = h_of(deviation);
    return rounded > 0.0f ? unit<BITS>() / rounded : first;
}
template <int BITS> __device__ __forceinline__ u32 affine_code(float x, float scale, float low) {
    constexpr float top = (float)((1 << BITS) - 1);
    return scale > 0.0f ? (u32)fminf(fmaxf(rintf((x - low) / scale), 0.0f), top) : 0u;
}
template <int BITS> __device__ __forceinline__ void affine_scale(float low, float high, u16& scale, u16& base) {
    bool any = low <= high;
    scale = any ? saturated((high - low) / (float)((1 << BITS) - 1)) : (u16)0;
    base = any ? saturated(low) : (u16)0;
}

constexpr int WARPS = 16;
__device__ __forceinline__ float infinite() { return f_of(0x7f800000); }

// Quads of a word, its low two bits only of 3 bit codes; places of a code in a word, and of its third bit.
template <int BITS> constexpr int PLANE = BITS == 3 ? 2 : BITS;
template <int BITS> constexpr int QUADS = 8 / PLANE<BITS>;
template <int BITS> __device__ __forceinline__ u32 placed(u32 code, int quad, int byte) {
    return (BITS == 3 ? code & 3 : code) << (8 * byte + PLANE<BITS> * (quad % QUADS<BITS>));
}

// Keys: lanes are 32 positions, warps take turns at latents (scales) and at stripes of 32 of them (words).
template <int BITS, bool AFFINE>
__device__ __forceinline__ void keys(const float* __restrict__ latents, const Part& part, u32 skip, u32 half, u8* __restrict__ page) {
    SHARED(float, shared);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, position = half * 32 + lane, rank = part.rank;
    u16* meta = (u16*)(page + part.meta);
    u32* words = (u32*)(page + part.codes);
    bool out = position < skip;
    const float* x = latents + position;
    float* by = shared + 3 * WARPS * 32;                 // [blocks][32]
    float *scales = shared, *lows = shared + rank;       // [rank], where affine
    u32 width = AFFINE ? rank : rank / part.blocks;
    if (AFFINE) {
        for (u32 r = warp; r < rank; r += WARPS) {
            float low = infinite(), high = -infinite();
#pragma unroll
            for (u32 p = lane; p < PAGE; p += 32) {
                if (p < skip) continue;
                low = fminf(low, latents[r * PAGE + p]);
                high = fmaxf(high, latents[r * PAGE + p]);
            }
            low = -warp_max(-low);
            high = warp_max(high);
            u16 scale, base;
            affine_scale<BITS>(low, high, scale, base);
            if (lane == 0) { scales[r] = h_of(scale); lows[r] = h_of(base); }
            if (lane == 0 && half == 0) { meta[r] = scale; meta[rank + r] = base; }
        }
    } else {
        float *squares = shared, *products = shared + WARPS * 32, *levels = shared + 2 * WARPS * 32;
        auto total = [&](const float* of) { float t = 0; for (int w = 0; w < WARPS; w++) t += of[w * 32 + lane]; return t; };
        for (u32 b = 0; b < part.blocks; b++) {
            float sq = 0, xl = 0, ll = 0;
            for (u32 r = b * width + warp; r < (b + 1) * width; r += WARPS) sq = fmaf(x[r * PAGE], x[r * PAGE], sq);
            squares[warp * 32 + lane] = sq;
            __syncthreads();
            float deviation = root(total(squares), width), first = deviation > 0.0f ? unit<BITS>() / deviation : 0.0f;
            for (u32 r = b * width + warp; r < (b + 1) * width; r += WARPS) {
                float v = x[r * PAGE], l = (float)level<BITS>(number<BITS>(v * first));
                xl = fmaf(v, l, xl);
                ll = fmaf(l, l, ll);
            }
            products[warp * 32 + lane] = xl;
            levels[warp * 32 + lane] = ll;
            __syncthreads();
            u16 stored;
            float scale = settle<BITS>(first, total(products), total(levels), stored);
            if (warp == 0) { by[b * 32 + lane] = scale; meta[b * PAGE + position] = out ? (u16)0 : stored; }
        }
    }
    __syncthreads();
    u32 quads = (rank + 3) / 4, low_words = (quads + QUADS<BITS> - 1) / QUADS<BITS>;
    for (u32 stripe = warp; stripe * 32 < rank; stripe += WARPS) {
        u32 r = stripe * 32, b = r / width, edge = (b + 1) * width, third = 0;
        float scale = AFFINE ? 0.0f : by[b * 32 + lane];
        for (int w = 0; w < 8 / QUADS<BITS>; w++) {
            u32 word = 0;
            // A word's latents are on their way together: what is done with each has branches, over which the compiler moves no load.
            float v[4 * QUADS<BITS>];
#pragma unroll
            for (int i = 0; i < 4 * QUADS<BITS>; i++) v[i] = x[min(r + i, rank - 1) * PAGE];
#pragma unroll
            for (int quad = 0; quad < QUADS<BITS>; quad++) {
#pragma unroll
                for (int byte = 0; byte < 4; byte++, r++) {
                    if (r >= rank) continue;
                    if (!AFFINE && r == edge) { edge += width; scale = by[++b * 32 + lane]; }
                    u32 code = 0;
                    if constexpr (AFFINE) code = affine_code<BITS>(v[4 * quad + byte], scales[r], lows[r]);
                    else code = number<BITS>(v[4 * quad + byte] * scale);
                    if (out) code = 0;
                    word |= placed<BITS>(code, quad, byte);
                    if (BITS == 3) third |= (code >> 2) << (8 * byte + w * QUADS<BITS> + quad);
                }
            }
            u32 at = stripe * (8 / QUADS<BITS>) + w;
            if (at < low_words) words[at * PAGE + position] = word;
        }
        if (BITS == 3) words[(low_words + stripe) * PAGE + position] = third;
    }
}

// Values: warps take turns at 32 positions (scales), threads at latents (words). Half `h` of a page is the positions whose quads are
// 8 h to 8 h + 7: position 16 byte + quad.
template <int BITS, bool AFFINE>
__device__ __forceinline__ void values(const float* __restrict__ latents, const Part& part, u32 skip, u32 half, u8* __restrict__ page) {
    SHARED(float, shared);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = part.rank;
    u16* meta = (u16*)(page + part.meta);
    u32* words = (u32*)(page + part.codes);
    u32 width = AFFINE ? 32 : rank / part.blocks, groups = AFFINE ? (rank + 31) / 32 : part.blocks;
    float *scales = shared, *lows = shared + groups * 32;  // [groups][32], of position 8 byte + quad % 8
    for (u32 p = warp; p < 32; p += WARPS) {
        u32 position = p / 8 * 16 + half * 8 + p % 8;
        const float* x = latents + position * rank;
        bool out = position < skip;
        for (u32 g = 0; g < groups; g++) {
            if (AFFINE) {
                u32 r = g * 32 + lane;
                float v = x[r < rank ? r : g * 32];
                float low = -warp_max(-v), high = warp_max(v);
                u16 scale, base;
                affine_scale<BITS>(low, high, scale, base);
                if (lane == 0) {
                    scales[g * 32 + p] = h_of(scale);
                    lows[g * 32 + p] = h_of(base);
                    meta[g * PAGE + position] = out ? (u16)0 : scale;
                    meta[(groups + g) * PAGE + position] = out ? (u16)0 : base;
                }
            } else {
                float sq = 0, xl = 0, ll = 0;
                for (u32 r = g * width + lane; r < (g + 1) * width; r += 32) sq = fmaf(x[r], x[r], sq);
                float deviation = root(warp_sum(sq), width);
                if constexpr (!AFFINE) {
                    float first = deviation > 0.0f ? unit<BITS>() / deviation : 0.0f;
                    for (u32 r = g * width + lane; r < (g + 1) * width; r += 32) {
                        float l = (float)level<BITS>(number<BITS>(x[r] * first));
                        xl = fmaf(x[r], l, xl);
                        ll = fmaf(l, l, ll);
                    }
                    xl = warp_sum(xl);
                    ll = warp_sum(ll);
                    u16 stored;
                    float scale = settle<BITS>(first, xl, ll, stored);
                    if (lane == 0) { scales[g * 32 + p] = scale; meta[g * PAGE + position] = out ? (u16)0 : stored; }
                }
            }
        }
    }
    __syncthreads();
    constexpr int HALF = 8 / QUADS<BITS>;  // words of half a page
    for (u32 r = threadIdx.x; r < rank; r += WARPS * 32) {
        u32 g = r / width, third = 0;
        for (int w = 0; w < HALF; w++) {
            u32 word = 0;
            float v[4 * QUADS<BITS>];
#pragma unroll
            for (int i = 0; i < 4 * QUADS<BITS>; i++) v[i] = latents[(i % 4 * 16 + half * 8 + w * QUADS<BITS> + i / 4) * rank + r];
#pragma unroll
            for (int quad = 0; quad < QUADS<BITS>; quad++) {
#pragma unroll
                for (int byte = 0; byte < 4; byte++) {
                    u32 q = w * QUADS<BITS> + quad, position = byte * 16 + half * 8 + q, at = g * 32 + byte * 8 + q;
                    float x = v[4 * quad + byte];
                    u32 code = 0;
                    if constexpr (AFFINE) code = affine_code<BITS>(x, scales[at], lows[at]);
                    else code = number<BITS>(x * scales[at]);
                    if (position < skip) code = 0;
                    word |= placed<BITS>(code, quad, byte);
                    if (BITS == 3) third |= (code >> 2) << (8 * byte + q);
                }
            }
            words[(half * HALF + w) * rank + r] = word;
        }
        if (BITS == 3) words[(4 + half) * rank + r] = third;
    }
}

// 16 bits: the latents as they lie, in f16.
template <bool VALUES> __device__ __forceinline__ void halves(const float* __restrict__ latents, const Part& part, u32 skip, u32 half, u8* __restrict__ page) {
    u16* to = (u16*)(page + part.codes);
    for (u32 i = half * part.rank * 32 + threadIdx.x; i < (half + 1) * part.rank * 32; i += WARPS * 32) {
        u32 position = VALUES ? i / part.rank : i % PAGE;
        to[i] = position < skip ? (u16)0 : saturated(latents[i]);
    }
}

template <int BITS, bool AFFINE> __device__ __forceinline__ void codes(const float* latents, const Part& part, u32 skip, bool is_value, u32 half, u8* page) {
    if (is_value) values<BITS, AFFINE>(latents, part, skip, half, page);
    else keys<BITS, AFFINE>(latents, part, skip, half, page);
}

}  // namespace seal

struct SealProjectArgs {
    const u8* arena;
    const seal::Job* jobs;
    const float* key_map;     // [channels][keys.rank]
    const float* value_map;   // [channels][values.rank]
    const float* key_mean;    // [channels], or null
    const float* value_mean;
    const float* cos;         // [positions][d / 2], of keys that are taken before rope; or null
    const float* sin;
    float* latents;
    seal::Part keys, values;
    u32 channels, d;          // kv_heads * d, d
};
template <class E> __device__ __forceinline__ void seal_project(const SealProjectArgs& p) {
    seal::Job job = p.jobs[blockIdx.y];
    const u8* page = p.arena + (u64)job.from * 64 + job.offset;
    float* to = p.latents + (u64)blockIdx.y * (p.keys.rank + p.values.rank) * PAGE;
    u64 turn = (u64)job.position * (p.d / 2);
    if (blockIdx.z == 1) seal::project<E, true, false>(page, p.values, p.value_map, p.value_mean, p.channels, p.d, nullptr, nullptr, to + p.keys.rank * PAGE);
    else if (p.cos) seal::project<E, false, true>(page, p.keys, p.key_map, p.key_mean, p.channels, p.d, p.cos + turn, p.sin + turn, to);
    else seal::project<E, false, false>(page, p.keys, p.key_map, p.key_mean, p.channels, p.d, nullptr, nullptr, to);
}
KERNEL(128, 4, seal_project_b16)(SealProjectArgs p) { grid_wait(); grid_go(); seal_project<u16>(p); }
KERNEL(128, 4, seal_project_f32)(SealProjectArgs p) { grid_wait(); grid_go(); seal_project<float>(p); }

struct SealCodesArgs {
    u8* arena;
    const seal::Job* jobs;
    const float* latents;
    seal::Part keys, values;
};
// quant.rs: code = the nearest of the levels to x unit / deviation, deviation = unit sum(x l) / sum(l l), l the levels that x / rms(x) is
// nearest to; or code = round((x - min) / scale), scale = (max - min) / (2^bits - 1). Scales are rounded to f16 first.
// Bytes: 256 a latent, read up to four times from the second-level cache, and 8 bits written. FLOPs: some 10 a latent and position, twice.
KERNEL(512, 1, seal_codes)(SealCodesArgs p) {
    grid_wait();
    grid_go();
    seal::Job job = p.jobs[blockIdx.x];
    bool is_value = blockIdx.y >= 2;
    u32 half = blockIdx.y % 2;
    seal::Part part = is_value ? p.values : p.keys;
    if (part.rank == 0) return;
    const float* from = p.latents + ((u64)blockIdx.x * (p.keys.rank + p.values.rank) + (is_value ? p.keys.rank : 0)) * PAGE;
    u8* page = p.arena + (u64)job.to * 64;
    if (part.bits == 16) {
        if (is_value) seal::halves<true>(from, part, job.skip, half, page);
        else seal::halves<false>(from, part, job.skip, half, page);
    } else if (part.affine) {
        if (part.bits == 8) seal::codes<8, true>(from, part, job.skip, is_value, half, page);
        else if (part.bits == 4) seal::codes<4, true>(from, part, job.skip, is_value, half, page);
        else if (part.bits == 3) seal::codes<3, true>(from, part, job.skip, is_value, half, page);
        else seal::codes<2, true>(from, part, job.skip, is_value, half, page);
    } else {
        if (part.bits == 4) seal::codes<4, false>(from, part, job.skip, is_value, half, page);
        else if (part.bits == 3) seal::codes<3, false>(from, part, job.skip, is_value, half, page);
        else seal::codes<2, false>(from, part, job.skip, is_value, half, page);
    }
}
