// The one place where CUDA, its inline PTX and their stand-ins on a CPU meet: kernels name neither.
//
// Compiled by nvcc for a device; by any C++17 compiler, with -DSTRAIT_EMULATED, for emulation/cuda_cpu.h, which runs the
// very same kernels thread by thread.
//
// Words: a "pair" is two 16-bit floats in a u32, the lower first. `h` is f16, `b` is bf16.
#pragma once
#ifdef STRAIT_EMULATED
#include "emulation/cuda_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// Dynamic shared memory, aligned for every access below.
extern __shared__ __align__(128) unsigned char strait_shared[];
#define SHARED(T, name) T* name = reinterpret_cast<T*>(strait_shared)
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A kernel by the name the host asks for.
#ifdef STRAIT_EMULATED
#define KERNEL(threads, blocks, name) static void name
#else
#define KERNEL(threads, blocks, name) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#endif

// Positions of a page.
constexpr int PAGE = 64;
// Bytes of a unit of page addresses (PageAddr::UNIT).
constexpr int UNIT = 64;

#ifdef STRAIT_EMULATED
static inline float f_of(u32 u) { float f; memcpy(&f, &u, 4); return f; }
static inline u32 u_of(float f) { u32 u; memcpy(&u, &f, 4); return u; }
static inline float h_of(u16 u) { _Float16 h; memcpy(&h, &u, 2); return (float)h; }
static inline u16 of_h(float f) { _Float16 h = (_Float16)f; u16 u; memcpy(&u, &h, 2); return u; }
static inline float b_of(u16 u) { return f_of((u32)u << 16); }
static inline u16 of_b(float f) { u32 v = u_of(f); if ((v & 0x7fffffff) > 0x7f800000) return 0x7fff; v += 0x7fff + ((v >> 16) & 1); return (u16)(v >> 16); }
static inline float h_lo(u32 u) { return h_of((u16)u); }
static inline float h_hi(u32 u) { return h_of((u16)(u >> 16)); }
static inline float b_lo(u32 u) { return f_of(u << 16); }
static inline float b_hi(u32 u) { return f_of(u & 0xffff0000u); }
static inline u32 h_pair(float lo, float hi) { return of_h(lo) | (u32)of_h(hi) << 16; }
static inline u32 b_pair(float lo, float hi) { return of_b(lo) | (u32)of_b(hi) << 16; }
static inline u32 h_fma(u32 a, u32 b, u32 c) { return h_pair((float)((double)h_lo(a) * h_lo(b) + h_lo(c)), (float)((double)h_hi(a) * h_hi(b) + h_hi(c))); }
static inline u32 h_add(u32 a, u32 b) { return h_pair(h_lo(a) + h_lo(b), h_hi(a) + h_hi(b)); }
static inline u32 h_mul(u32 a, u32 b) { return h_pair(h_lo(a) * h_lo(b), h_hi(a) * h_hi(b)); }
static inline u32 prmt(u32 a, u32 b, u32 s) {
    u64 t = (u64)b << 32 | a; u32 r = 0;
    for (int i = 0; i < 4; i++) { u32 n = s >> (4 * i) & 15; u32 v = (u32)(t >> (8 * (n & 7))) & 255; if (n & 8) v = v & 128 ? 255 : 0; r |= v << (8 * i); }
    return r;
}
template <class F> static inline void emu_mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, F of, const char* name) {
    u32 in[6] = {a[0], a[1], a[2], a[3], b0, b1}; auto s = emu::deposit(~0u, in, 24, name);
    unsigned l = emu::self().lane, g = l >> 2, t = l & 3;
    for (int half = 0; half < 2; half++) for (int j = 0; j < 2; j++) {
        float acc = d[half * 2 + j]; int n = t * 2 + j;
        for (int k = 0; k < 16; k++) {
            int src = (int)g * 4 + ((k & 7) >> 1); u32 av = s[src][(k >> 3) * 2 + half]; u32 bv = s[n * 4 + ((k & 7) >> 1)][4 + (k >> 3)];
            acc += of((u16)(k & 1 ? av >> 16 : av)) * of((u16)(k & 1 ? bv >> 16 : bv));
        }
        d[half * 2 + j] = acc;
    }
}
static inline void mma_h(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emu_mma(d, a, b0, b1, h_of, "mma.f16"); }
static inline void mma_b(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emu_mma(d, a, b0, b1, b_of, "mma.bf16"); }
template <bool TRANS> static inline void ldsm4(u32 (&r)[4], const void* row) {
    u64 p = (u64)row; auto s = emu::deposit(~0u, &p, 8, "ldmatrix"); unsigned l = emu::self().lane;
    for (int m = 0; m < 4; m++) {
        auto at = [&](int i) { u64 q; memcpy(&q, s[m * 8 + i], 8); return (const u16*)q; };
        if (!TRANS) { const u16* q = at(l >> 2); r[m] = q[(l & 3) * 2] | (u32)q[(l & 3) * 2 + 1] << 16; }
        else { r[m] = at((l & 3) * 2)[l >> 2] | (u32)at((l & 3) * 2 + 1)[l >> 2] << 16; }
    }
}
static inline void cp16(void* to, const void* from) { emu_cp_async(to, from, 16); }
// Zeros where `there` is false; the source is not read then.
static inline void cp16_if(void* to, const void* from, bool there) { emu_cp_async(to, there ? from : nullptr, 16); }
static inline void cp_commit() { emu_cp_commit(); }
template <int N> static inline void cp_wait() { emu_cp_wait(N); }
static inline u32 in_register(u32 x) { return x; }
static inline int any_of_block(int p) { return emu::any_of_block(p); }
static inline float ex2(float x) { return exp2f(x); }
static inline float lg2(float x) { return log2f(x); }
static inline float product(float a, float b) { volatile float r = a * b; return r; }
template <class T> static inline T ld_once(const T* p) { return *p; }
static inline float ld_fresh(const float* p) { return *p; }
static inline void prefetch(const void*) {}
static inline void grid_wait() {}
static inline void grid_go() {}
#else
__device__ __forceinline__ float f_of(u32 u) { return __uint_as_float(u); }
__device__ __forceinline__ u32 u_of(float f) { return __float_as_uint(f); }
__device__ __forceinline__ float h_of(u16 u) { return __half2float(__ushort_as_half(u)); }
__device__ __forceinline__ u16 of_h(float f) { return __half_as_ushort(__float2half_rn(f)); }
__device__ __forceinline__ float b_of(u16 u) { return __uint_as_float((u32)u << 16); }
__device__ __forceinline__ u16 of_b(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
__device__ __forceinline__ float h_lo(u32 u) { return h_of((u16)u); }
__device__ __forceinline__ float h_hi(u32 u) { return h_of((u16)(u >> 16)); }
__device__ __forceinline__ float b_lo(u32 u) { return __uint_as_float(u << 16); }
__device__ __forceinline__ float b_hi(u32 u) { return __uint_as_float(u & 0xffff0000u); }
__device__ __forceinline__ u32 h_pair(float lo, float hi) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
__device__ __forceinline__ u32 b_pair(float lo, float hi) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
__device__ __forceinline__ u32 h_fma(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
__device__ __forceinline__ u32 h_add(u32 a, u32 b) { u32 r; asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
__device__ __forceinline__ u32 h_mul(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
// Of the eight bytes of a and b those that the nibbles of s name; a nibble of 8 and more repeats the byte's sign (which __byte_perm does not).
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 s) { u32 r; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s)); return r; }
// d[16][8] += a[16][16] b[16][8]; lane 4 g + t holds of d rows g and g + 8, columns 2 t and 2 t + 1; of a, pairs of columns from 2 t
// of rows g and g + 8, then from 2 t + 8 of both; of b, pairs of rows from 2 t, then from 2 t + 8, of column g.
__device__ __forceinline__ void mma_h(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_b(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8.
template <bool TRANS> __device__ __forceinline__ void ldsm4(u32 (&r)[4], const void* row) {
    u32 p = (u32)__cvta_generic_to_shared(row);
    if (TRANS) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
    else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}
__device__ __forceinline__ void cp16(void* to, const void* from) { asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory"); }
__device__ __forceinline__ void cp16_if(void* to, const void* from, bool there) { asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0) : "memory"); }
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// A constant that stays in a register: the compiler would make it anew for every use.
__device__ __forceinline__ u32 in_register(u32 x) { u32 r; asm volatile("mov.u32 %0, %1;" : "=r"(r) : "r"(x)); return r; }
// A barrier of the block that tells whether any thread says so.
__device__ __forceinline__ int any_of_block(int p) { return __syncthreads_or(p); }
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float lg2(float x) { float y; asm("lg2.approx.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
// A product that is rounded by itself: the compiler makes no sum that follows part of it.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
// A load of what no one reads twice and no one writes while the kernel runs.
__device__ __forceinline__ uint4 ld_once(const uint4* p) { uint4 v; asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }
__device__ __forceinline__ uint2 ld_once(const uint2* p) { uint2 v; asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); return v; }
__device__ __forceinline__ u32 ld_once(const u32* p) { u32 v; asm("ld.global.nc.L1::no_allocate.u32 %0,[%1];" : "=r"(v) : "l"(p)); return v; }
// A load of what another block of this launch wrote.
__device__ __forceinline__ float ld_fresh(const float* p) { return __ldcg(p); }
// Asks for a line of 128 bytes to be brought to the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// For launches that may begin before the one ahead has ended (programmatic stream serialization, from sm_90 on): waits for all that
// ran before, its writes included; lets the next one begin. Nothing happens where a launch does not ask for it.
__device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_go() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}
