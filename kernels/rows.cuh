// What a forward pass does row by row: embed, rms_norm, rope_append, silu_mul. All bound by memory, or by their launch when rows
// are few. A row's result depends on that row alone, and is summed in an order that its width fixes.
//
// name          grid                                     block  dynamic shared bytes
// embed         (rows)                                   256    0
// rms_norm      (rows)                                   256    32
// rope_append_* ((rows + 15) / 16, heads + 2 kv_heads)   256    64 (d + 1)
// silu_mul      (rows, (width + 1023) / 1024)            256    0
//
// Pointers to rows are aligned to 16 bytes; widths that 4 (in embed 8) does not divide are slower, not wrong.
#pragma once
#include "common.cuh"

namespace rows {

constexpr int THREADS = 256;

// x[r][i] = table[tokens[r]][i]. Moves rows * width * (2 + 4) bytes.
__device__ __forceinline__ void embed(const u32* __restrict__ tokens, const u16* __restrict__ table, u32 width, float* __restrict__ x) {
    const u16* from = table + (u64)tokens[blockIdx.x] * width;
    float* to = x + (u64)blockIdx.x * width;
    if (width % 8 == 0) {
        for (u32 i = threadIdx.x; i < width / 8; i += THREADS) {
            uint4 w = ((const uint4*)from)[i];
            ((float4*)to)[2 * i] = float4{b_lo(w.x), b_hi(w.x), b_lo(w.y), b_hi(w.y)};
            ((float4*)to)[2 * i + 1] = float4{b_lo(w.z), b_hi(w.z), b_lo(w.w), b_hi(w.w)};
        }
    } else {
        for (u32 i = threadIdx.x; i < width; i += THREADS) to[i] = b_of(from[i]);
    }
}

// The root mean square of rows of quads, to be divided by: rms_norm takes it, and products that norm their input themselves
// (linear.cuh). A block of THREADS sums a row, in the one order there is, so the bits are the same wherever that happens; sums of
// products are spelled out as the compiler would contract them, lest it do otherwise in one place.
//
// Rows up to KEEP * 1024 wide are read once; of wider ones the rest is read a second time, from the first-level cache.
constexpr int KEEP = 4;
// The squares of a row that fall to a thread; its first quads stay in `keep`.
__device__ __forceinline__ float norm_squares(const float4* from, u32 quads, float4 (&keep)[KEEP]) {
    float sum = 0;
    auto add = [&](float4 v) { sum += fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.x, v.x, v.y * v.y))); };
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        u32 i = threadIdx.x + k * THREADS;
        if (i < quads) { keep[k] = from[i]; add(keep[k]); }
    }
    for (u32 i = threadIdx.x + KEEP * THREADS; i < quads; i += THREADS) add(from[i]);
    return sum;
}
// What a row is multiplied by, from the sums of its warps.
__device__ __forceinline__ float norm_inverse(const float* sums, u32 width, float eps) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) total += sums[i];
    return 1.0f / sqrtf(total / (float)width + eps);
}
__device__ __forceinline__ uint2 norm_quad(float4 v, float inverse, float4 w) {
    return uint2{b_pair(v.x * inverse * w.x, v.y * inverse * w.y), b_pair(v.z * inverse * w.z, v.w * inverse * w.w)};
}

// out[r][i] = x[r][i] / sqrt(mean(x[r]^2) + eps) * weight[i]. Moves rows * width * (4 + 2) bytes and the weight.
__device__ __forceinline__ void rms_norm(const float* __restrict__ x, const float* __restrict__ weight, float eps, u32 width, u16* __restrict__ out) {
    SHARED(float, sums);
    const float* from = x + (u64)blockIdx.x * width;
    u16* to = out + (u64)blockIdx.x * width;
    const float4* from4 = (const float4*)from;
    const float4* weight4 = (const float4*)weight;
    u32 quads = width % 4 == 0 ? width / 4 : 0;
    float4 keep[KEEP];
    float sum = norm_squares(from4, quads, keep);
    if (!quads) for (u32 i = threadIdx.x; i < width; i += THREADS) sum = fmaf(from[i], from[i], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float inverse = norm_inverse(sums, width, eps);
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        u32 i = threadIdx.x + k * THREADS;
        if (i < quads) ((uint2*)to)[i] = norm_quad(keep[k], inverse, weight4[i]);
    }
    for (u32 i = threadIdx.x + KEEP * THREADS; i < quads; i += THREADS) ((uint2*)to)[i] = norm_quad(from4[i], inverse, weight4[i]);
    if (!quads) for (u32 i = threadIdx.x; i < width; i += THREADS) to[i] = of_b(from[i] * inverse * weight[i]);
}

__device__ __forceinline__ void put(u16* p, float x) { *p = of_b(x); }
__device__ __forceinline__ void put(float* p, float x) { *p = x; }

constexpr int APPENDED = 16;  // rows of a block: so many neighbouring slots of a key channel fill a sector of 32 bytes
constexpr u32 NO_PAGE = ~0u;

// What a warp's first row needs and no launch writes is asked for while the launch ahead runs: it would come from far, as all weights have
// passed through the caches since the last layer.
__device__ __forceinline__ void rope_ahead(const u32* positions, const u32* pages, u32 count, u32 d, const float* cos, const float* sin) {
    u32 row = blockIdx.x * APPENDED + threadIdx.x / 32, half = d / 2, i = threadIdx.x % 32 * 32;
    if (row >= count) return;
    prefetch(pages + row);
    u64 at = (u64)positions[row] * half + i;
    if (i < half) prefetch(cos + at), prefetch(sin + at);
}

// A head normed by its root mean square (where there is a norm) and turned by rope, by one warp,
//   (a, b) = (x[i], x[i + d / 2])  ->  (a cos - b sin, b cos + a sin);
// `c` and `s` are its position's cosines and sines; d even, at most 256. Rounded alike wherever it is done.
template <class F> __device__ __forceinline__ void turn_head(const float* from, const float* norm, float eps, u32 d, const float* c, const float* s, F put) {
    const u32 lane = threadIdx.x % 32, half = d / 2;
    float a[4], b[4], sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 i = lane + 32 * j;
        if (i < half) { a[j] = from[i]; b[j] = from[i + half]; sum = fmaf(a[j], a[j], fmaf(b[j], b[j], sum)); }
    }
    float inverse = norm ? 1.0f / sqrtf(warp_sum(sum) / (float)d + eps) : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 i = lane + 32 * j;
        if (i >= half) continue;
        float x = a[j], y = b[j];
        if (norm) { x = x * inverse * norm[i]; y = y * inverse * norm[i + half]; }
        put(i, fmaf(x, c[i], -product(y, s[i])));
        put(i + half, fmaf(y, c[i], product(x, s[i])));
    }
}

// Per row and head: q and k normed and turned (turn_head);
// q goes back to where it was, k and v to slot position % 64 of the row's exact page; nowhere where the page is NO_PAGE.
// q f32 [rows][q_stride], k and v f32 [rows][kv_stride]; d even, at most 256.
// Moves 8 bytes of q, 4 of k and v each an element, and 2 (or 4) where they are stored.
template <class E>
__device__ __forceinline__ void rope_append(float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v, u32 q_stride, u32 kv_stride, u32 count,
                                            u32 heads, u32 kv_heads, u32 d, const float* __restrict__ q_norm, const float* __restrict__ k_norm, float eps,
                                            const float* __restrict__ cos, const float* __restrict__ sin, const u32* __restrict__ positions, u8* __restrict__ arena,
                                            const u32* __restrict__ pages, u32 offset) {
    SHARED(float, turned);  // [APPENDED][d + 1]
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = d / 2, first = blockIdx.x * APPENDED;
    bool is_q = blockIdx.y < heads, is_k = !is_q && blockIdx.y < heads + kv_heads;
    u32 head = is_q ? blockIdx.y : (blockIdx.y - heads) % kv_heads;
    auto in_page = [&](u32 row) { return arena + (u64)pages[row] * 64 + offset + (u64)(2 * head + !is_k) * d * PAGE * sizeof(E); };
    for (u32 at = warp; at < APPENDED; at += THREADS / 32) {
        u32 row = first + at;
        if (row >= count) break;
        if (!is_q && !is_k) {
            if (pages[row] == NO_PAGE) continue;
            E* to = (E*)in_page(row) + positions[row] % PAGE * d;
            const float* from = v + (u64)row * kv_stride + head * d;
            for (u32 i = lane; i < d; i += 32) put(to + i, from[i]);
            continue;
        }
        const float* from = is_q ? q + (u64)row * q_stride + head * d : k + (u64)row * kv_stride + head * d;
        float* to = is_q ? q + (u64)row * q_stride + head * d : turned + at * (d + 1);
        const u64 angles = (u64)positions[row] * half;
        turn_head(from, is_q ? q_norm : k_norm, eps, d, cos + angles, sin + angles, [&](u32 channel, float x) { to[channel] = x; });
    }
    if (!is_k) return;
    __syncthreads();
    // Neighbouring threads take neighbouring rows, which mostly are neighbouring slots of one page.
    for (u32 e = threadIdx.x; e < APPENDED * d; e += THREADS) {
        u32 at = e % APPENDED, channel = e / APPENDED, row = first + at;
        if (row < count && pages[row] != NO_PAGE) put((E*)in_page(row) + channel * PAGE + positions[row] % PAGE, turned[at * (d + 1) + channel]);
    }
}

// out[r][i] = g / (1 + exp(-g)) * up[r][i], g = gate[r][i]; gate and up with rows `stride` apart. Moves rows * width * (8 + 2) bytes.
__device__ __forceinline__ void silu_mul(const float* __restrict__ gate, const float* __restrict__ up, u32 stride, u32 width, u16* __restrict__ out) {
    u64 from = (u64)blockIdx.x * stride, to = (u64)blockIdx.x * width;
    u32 i = (blockIdx.y * THREADS + threadIdx.x) * 4;
    auto one = [](float g, float u) { return g / (1.0f + ex2(-1.44269504f * g)) * u; };
    if (width % 4 == 0 && stride % 4 == 0) {
        if (i >= width) return;
        float4 g = *(const float4*)(gate + from + i), u = *(const float4*)(up + from + i);
        *(uint2*)(out + to + i) = uint2{b_pair(one(g.x, u.x), one(g.y, u.y)), b_pair(one(g.z, u.z), one(g.w, u.w))};
    } else {
        for (u32 j = i; j < i + 4 && j < width; j++) out[to + j] = of_b(one(gate[from + j], up[from + j]));
    }
}

}  // namespace rows

struct EmbedArgs {
    const u32* tokens;   // [rows]
    const u16* table;    // bf16 [vocabulary][width]
    float* x;            // [rows][width]
    u32 width;
};
KERNEL(256, 4, embed)(EmbedArgs p) { grid_wait(); grid_go(); rows::embed(p.tokens, p.table, p.width, p.x); }

struct NormArgs {
    const float* x;      // [rows][width]
    const float* weight; // [width]
    u16* out;            // bf16 [rows][width]
    u32 width;
    float eps;
};
KERNEL(256, 4, rms_norm)(NormArgs p) {
    // The weight is there already, but far: all other weights have passed through the caches since it was needed last.
    for (u32 i = threadIdx.x * 32; i < p.width; i += 256 * 32) prefetch(p.weight + i);
    grid_wait();
    grid_go();
    rows::rms_norm(p.x, p.weight, p.eps, p.width, p.out);
}

struct SiluArgs {
    const float* gate;   // [rows][stride], the first `width` of each
    const float* up;
    u16* out;            // bf16 [rows][width]
    u32 stride, width;
};
KERNEL(256, 4, silu_mul)(SiluArgs p) { grid_wait(); grid_go(); rows::silu_mul(p.gate, p.up, p.stride, p.width, p.out); }

struct AppendArgs {
    float* q;            // [rows][q_stride], the first heads * d of each
    const float* k;      // [rows][kv_stride], the first kv_heads * d of each
    const float* v;
    const float* q_norm; // [d], or null
    const float* k_norm;
    const float* cos;    // [positions][d / 2]
    const float* sin;
    const u32* positions;  // [rows]
    const u32* pages;      // [rows], in units of 64 bytes; ~0: nowhere
    u8* arena;
    u32 q_stride, kv_stride, rows, heads, kv_heads, d;
    u32 offset;          // bytes, of the layer in a page
    float eps;
};
template <class E> __device__ __forceinline__ void rope_append(const AppendArgs& p) {
    rows::rope_ahead(p.positions, p.pages, p.rows, p.d, p.cos, p.sin);
    grid_wait();
    grid_go();
    rows::rope_append<E>(p.q, p.k, p.v, p.q_stride, p.kv_stride, p.rows, p.heads, p.kv_heads, p.d, p.q_norm, p.k_norm, p.eps, p.cos, p.sin, p.positions, p.arena,
                         p.pages, p.offset);
}
KERNEL(256, 4, rope_append_b16)(AppendArgs p) { rope_append<u16>(p); }
KERNEL(256, 4, rope_append_f32)(AppendArgs p) { rope_append<float>(p); }
