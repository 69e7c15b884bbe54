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
// Dynamic shared memory, aligned for every access below: of a warpgroup to lines.
extern __shared__ __align__(1024) unsigned char strait_shared[];
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

// Whether kernels for warpgroups are compiled.
#if defined(STRAIT_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUPS 1
#else
#define WARPGROUPS 0
#endif

// A number that a function takes as a type.
template <int N> struct Int { static constexpr int value = N; };

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
// What a warpgroup multiplies from shared memory: 8 x 8 tiles of 16-bit elements, eight rows of 16 bytes each.
struct WgTile { const u8* at; u32 next_n, next_k; };
static inline WgTile wg_tile(const void* at, u32 next_n, u32 next_k) { return {(const u8*)at, next_n, next_k}; }
static inline WgTile wg_at(WgTile t, u32 vectors) { return {t.at + vectors * 16, t.next_n, t.next_k}; }
// The same in lines: eight lines of 128 bytes, whose 16 bytes are exchanged by the line's number, follow each other; at multiples of 1024.
struct WgLines { const u8* at; u32 vectors; };
static inline WgLines wg_lines(const void* at) { if ((uintptr_t)at % 1024) emu_bad("lines for a warpgroup that do not begin at a multiple of 1024"); return {(const u8*)at, 0}; }
static inline WgLines wg_at(WgLines l, u32 vectors) { return {l.at, l.vectors + vectors}; }
// From where on, and how far, 16 k of 8 n8 columns are read.
static inline void wg_handed_over(WgTile b, int n8) { emu_wg_handed_over(b.at, (n8 - 1) * b.next_n + b.next_k + 128); }
static inline void wg_handed_over(WgLines l, int n8) { emu_wg_handed_over(l.at + l.vectors / 64 * 1024, n8 * 1024); }
static inline u16 wg_element(WgTile b, bool rows_of_k, int n, int k) {
    u16 v; memcpy(&v, b.at + n / 8 * b.next_n + k / 8 * b.next_k + (rows_of_k ? k % 8 * 16 + n % 8 * 2 : n % 8 * 16 + k % 8 * 2), 2); return v;
}
static inline u16 wg_element(WgLines l, bool, int n, int k) {
    u16 v; memcpy(&v, l.at + n * 128 + ((l.vectors + k / 8) ^ (n & 7)) * 16 + k % 8 * 2, 2); return v;
}
// Of a pending product d is poison, what is shared is read when it is waited for, and a must be as it was then: none may be touched before.
template <bool ROWS_OF_K, int N8, class B, class F> static inline void emu_wg_mma(float (&d)[N8][4], const u32 (&a)[4], B b, bool adds, F of) {
    auto s = emu::deposit(~0u, a, 16, "wgmma");
    wg_handed_over(b, N8);
    unsigned l = emu::self().lane, g = l >> 2, t = l & 3;
    struct Product { float a[2][16], before[N8][4]; float (*d)[4]; B b; bool first, adds; unsigned t; const u32* from; u32 own[4]; F of; } p{{}, {}, d, b, emu_wg_first(d), adds, t, a, {}, of};
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 16; k++) { u32 v = s[g * 4 + ((k & 7) >> 1)][(k >> 3) * 2 + half]; p.a[half][k] = of((u16)(k & 1 ? v >> 16 : v)); }
    memcpy(p.own, a, 16);
    if (p.first) { memcpy(p.before, d, sizeof p.before); memset(d, 0xff, sizeof p.before); }
    emu_wg_push(d, [p] {
        if (memcmp(p.from, p.own, 16)) emu_bad("registers of a product under way were written");
        if (p.first) memcpy(p.d, p.before, sizeof p.before);
        for (int n8 = 0; n8 < N8; n8++) for (int c = 0; c < 4; c++) {
            float acc = p.adds ? p.d[n8][c] : 0;
            for (int k = 0; k < 16; k++) acc += p.a[c / 2][k] * p.of(wg_element(p.b, ROWS_OF_K, n8 * 8 + 2 * p.t + c % 2, k));
            p.d[n8][c] = acc;
        }
    });
}
template <bool ROWS_OF_K, bool ADDS, int N8> static inline void wg_mma_h(float (&d)[N8][4], const u32 (&a)[4], WgTile b) { emu_wg_mma<ROWS_OF_K>(d, a, b, ADDS, h_of); }
template <bool ROWS_OF_K, bool ADDS, int N8> static inline void wg_mma_b(float (&d)[N8][4], const u32 (&a)[4], WgTile b) { emu_wg_mma<ROWS_OF_K>(d, a, b, ADDS, b_of); }
// Both from shared memory; all lanes come together, as they must.
template <int N8> static inline void wg_mma_b(float (&d)[N8][4], WgLines a, WgLines b) {
    u32 none = 0; emu::deposit(~0u, &none, 4, "wgmma of lines");
    wg_handed_over(a, 8), wg_handed_over(b, N8);
    struct Product { float before[N8][4]; float (*d)[4]; WgLines a, b; bool first; unsigned lane, warp; } p{{}, d, a, b, emu_wg_first(d), emu::self().lane, emu::self().warp % 4};
    if (p.first) { memcpy(p.before, d, sizeof p.before); memset(d, 0xff, sizeof p.before); }
    emu_wg_push(d, [p] {
        if (p.first) memcpy(p.d, p.before, sizeof p.before);
        float x[2][16];
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 16; k++) x[half][k] = b_of(wg_element(p.a, false, p.warp * 16 + half * 8 + p.lane / 4, k));
        for (int n8 = 0; n8 < N8; n8++) for (int c = 0; c < 2; c++) {
            float y[16];
            for (int k = 0; k < 16; k++) y[k] = b_of(wg_element(p.b, false, n8 * 8 + 2 * (p.lane % 4) + c, k));
            for (int half = 0; half < 2; half++) { float acc = p.d[n8][2 * half + c]; for (int k = 0; k < 16; k++) acc += x[half][k] * y[k]; p.d[n8][2 * half + c] = acc; }
        }
    });
}
static inline void wg_fence() { emu::self().fenced = true; }
static inline void wg_commit() { emu::self().wgg++; }
template <int LEFT> static inline void wg_wait() { emu_wg_wait(LEFT); }
template <int N8> static inline void wg_settle(float (&)[N8][4]) {}
template <int N> static inline void wg_settle(u32 (&)[N][4]) {}
static inline void wg_shared_written() {
    emu::Fiber& f = emu::self();
    f.landed_lo = ~uintptr_t(0), f.landed_hi = 0;
    if (!f.handed) f.handed = true, emu::blk->handed++;
}
static inline const u8* one_address(const u8* p) { return p; }
static inline int any_of_block(int p) { return emu::any_of_block(p); }
static inline float ex2(float x) { return exp2f(x); }
static inline float lg2(float x) { return log2f(x); }
static inline float rcp(float x) { return 1.0f / x; }
static inline float product(float a, float b) { volatile float r = a * b; return r; }
template <class T> static inline T ld_once(const T* p) { return *p; }
static inline uint4 ld_ahead(const uint4* p) { return *p; }
static inline float ld_fresh(const float* p) { return *p; }
static inline uint4 ld_fresh(const uint4* p) { return *p; }
static inline void prefetch(const void*) {}
static inline void grid_wait() { emu::wait_for_launches(); }
static inline void grid_go() { emu::let_next_begin(); }
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
// Products of a warpgroup, four warps on multiples of four (Hopper's own, sm_90a): d[64][8 N8] += a[64][16] b[16][8 N8]. A warp's 16 rows of
// a and d lie in its lanes as above; b lies in shared memory, in tiles of 8 x 8 elements, 128 bytes each, `next_n` and `next_k` bytes apart;
// a row of a tile, 16 bytes, is of one k (ROWS_OF_K) or of one n; wg_at goes on by so many 16 bytes. A product is under way until it is
// waited for: till then neither d nor a, which are in registers, nor b may be written. Registers are handed over by wg_fence, shared memory
// by wg_shared_written and a barrier.
struct WgTile { u32 at, layout; };
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ WgTile wg_tile(const void* at, u32 next_n, u32 next_k) {
    return {((u32)__cvta_generic_to_shared(at) & 0x3ffff) >> 4 | (next_k >> 4) << 16, next_n >> 4};
}
__device__ __forceinline__ WgTile wg_at(WgTile t, u32 vectors) { return {t.at + vectors, t.layout}; }
// The same in lines: of 128 bytes, 64 elements of k; line n's 16 bytes are exchanged, place by place, by n % 8; at multiples of 1024 bytes.
// wg_at goes on in k by so many 16 bytes, within the line; and by eights of lines, 64 of them each.
struct WgLines { u32 at; };
__device__ __forceinline__ WgLines wg_lines(const void* at) { return {((u32)__cvta_generic_to_shared(at) & 0x3ffff) >> 4 | 1u << 16}; }
__device__ __forceinline__ WgLines wg_at(WgLines l, u32 vectors) { return {l.at + vectors}; }
// As the matrix unit takes it: of shared memory fewer than 256 KiB, so that what is added to an address stays in its bits.
__device__ __forceinline__ u64 wg_descriptor(WgTile t) { u64 d; asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(t.at), "r"(t.layout)); return d; }
// Eight lines are 1024 bytes, and exchanged in 128.
__device__ __forceinline__ u64 wg_descriptor(WgLines l) { u64 d; asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(l.at), "r"(64u | 1u << 30)); return d; }
// Names of ten operands; one tile of sums.
#define WG_TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define WG_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define WG_D4(n) WG_D(n), WG_D(n + 1), WG_D(n + 2), WG_D(n + 3)
template <bool ROWS_OF_K, bool ADDS> __device__ __forceinline__ void wg_mma_h(float (&d)[2][4], const u32 (&a)[4], WgTile b) {
    asm volatile("{ .reg .pred adds; setp.ne.u32 adds, %14, 0;"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {" "%0,%1,%2,%3,%4,%5,%6,%7" "},{%8,%9,%10,%11},%12,adds,1,1,%13; }"
                 : WG_D(0), WG_D(1) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wg_descriptor(b)), "n"(ROWS_OF_K ? 1 : 0), "n"(ADDS ? 1 : 0));
}
template <bool ROWS_OF_K, bool ADDS> __device__ __forceinline__ void wg_mma_h(float (&d)[4][4], const u32 (&a)[4], WgTile b) {
    asm volatile("{ .reg .pred adds; setp.ne.u32 adds, %22, 0;"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" WG_TEN("") "," "%10,%11,%12,%13,%14,%15" "},{%16,%17,%18,%19},%20,adds,1,1,%21; }"
                 : WG_D4(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wg_descriptor(b)), "n"(ROWS_OF_K ? 1 : 0), "n"(ADDS ? 1 : 0));
}
template <bool ROWS_OF_K, bool ADDS> __device__ __forceinline__ void wg_mma_b(float (&d)[8][4], const u32 (&a)[4], WgTile b) {
    asm volatile("{ .reg .pred adds; setp.ne.u32 adds, %38, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WG_TEN("") "," WG_TEN("1") "," WG_TEN("2") "," "%30,%31" "},{%32,%33,%34,%35},%36,adds,1,1,%37; }"
                 : WG_D4(0), WG_D4(4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wg_descriptor(b)), "n"(ROWS_OF_K ? 1 : 0), "n"(ADDS ? 1 : 0));
}
template <bool ROWS_OF_K, bool ADDS> __device__ __forceinline__ void wg_mma_b(float (&d)[10][4], const u32 (&a)[4], WgTile b) {
    asm volatile("{ .reg .pred adds; setp.ne.u32 adds, %46, 0;"
                 "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" WG_TEN("") "," WG_TEN("1") "," WG_TEN("2") "," WG_TEN("3") "},{%40,%41,%42,%43},%44,adds,1,1,%45; }"
                 : WG_D4(0), WG_D4(4), WG_D(8), WG_D(9) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wg_descriptor(b)), "n"(ROWS_OF_K ? 1 : 0), "n"(ADDS ? 1 : 0));
}
template <bool ROWS_OF_K, bool ADDS> __device__ __forceinline__ void wg_mma_b(float (&d)[12][4], const u32 (&a)[4], WgTile b) {
    asm volatile("{ .reg .pred adds; setp.ne.u32 adds, %54, 0;"
                 "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" WG_TEN("") "," WG_TEN("1") "," WG_TEN("2") "," WG_TEN("3") "," "%40,%41,%42,%43,%44,%45,%46,%47" "},{%48,%49,%50,%51},%52,adds,1,1,%53; }"
                 : WG_D4(0), WG_D4(4), WG_D4(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wg_descriptor(b)), "n"(ROWS_OF_K ? 1 : 0), "n"(ADDS ? 1 : 0));
}
template <bool ROWS_OF_K, bool ADDS> __device__ __forceinline__ void wg_mma_b(float (&d)[16][4], const u32 (&a)[4], WgTile b) {
    asm volatile("{ .reg .pred adds; setp.ne.u32 adds, %70, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WG_TEN("") "," WG_TEN("1") "," WG_TEN("2") "," WG_TEN("3") "," WG_TEN("4") "," WG_TEN("5") "," "%60,%61,%62,%63" "},{%64,%65,%66,%67},%68,adds,1,1,%69; }"
                 : WG_D4(0), WG_D4(4), WG_D4(8), WG_D4(12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wg_descriptor(b)), "n"(ROWS_OF_K ? 1 : 0), "n"(ADDS ? 1 : 0));
}
__device__ __forceinline__ void wg_mma_b(float (&d)[16][4], WgLines a, WgLines b) {
    asm volatile("{ .reg .pred adds; setp.eq.u32 adds, 0, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WG_TEN("") "," WG_TEN("1") "," WG_TEN("2") "," WG_TEN("3") "," WG_TEN("4") "," WG_TEN("5") "," "%60,%61,%62,%63" "},%64,%65,adds,1,1,0,0; }"
                 : WG_D4(0), WG_D4(4), WG_D4(8), WG_D4(12) : "l"(wg_descriptor(a)), "l"(wg_descriptor(b)));
}
__device__ __forceinline__ void wg_mma_b(float (&d)[32][4], WgLines a, WgLines b) {
    asm volatile("{ .reg .pred adds; setp.eq.u32 adds, 0, 0;"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" WG_TEN("") "," WG_TEN("1") "," WG_TEN("2") "," WG_TEN("3") "," WG_TEN("4") "," WG_TEN("5") "," WG_TEN("6") "," WG_TEN("7") "," WG_TEN("8") "," WG_TEN("9") "," WG_TEN("10") "," WG_TEN("11") "," "%120,%121,%122,%123,%124,%125,%126,%127" "},%128,%129,adds,1,1,0,0; }"
                 : WG_D4(0), WG_D4(4), WG_D4(8), WG_D4(12), WG_D4(16), WG_D4(20), WG_D4(24), WG_D4(28) : "l"(wg_descriptor(a)), "l"(wg_descriptor(b)));
}
#undef WG_TEN
#undef WG_D
#undef WG_D4
__device__ __forceinline__ void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wg_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// What makes these registers stays ahead of this, what reads them behind: of d between a wait and its use; of a before a fence, and again
// after the wait, till when nothing else may be in them: the compiler does not know by itself.
template <int N8> __device__ __forceinline__ void wg_settle(float (&d)[N8][4]) {
#pragma unroll
    for (int n = 0; n < N8; n++) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
template <int N> __device__ __forceinline__ void wg_settle(u32 (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}
__device__ __forceinline__ void wg_shared_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
// An address that is made once, and not anew for each that lies a known way behind it.
__device__ __forceinline__ const u8* one_address(const u8* p) { asm volatile("" : "+l"(p)); return p; }
// A barrier of the block that tells whether any thread says so.
__device__ __forceinline__ int any_of_block(int p) { return __syncthreads_or(p); }
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float lg2(float x) { float y; asm("lg2.approx.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
// A product that is rounded by itself: the compiler makes no sum that follows part of it.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
// A load of what no one reads twice and no one writes while the kernel runs.
__device__ __forceinline__ uint4 ld_once(const uint4* p) { uint4 v; asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }
__device__ __forceinline__ uint2 ld_once(const uint2* p) { uint2 v; asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); return v; }
__device__ __forceinline__ u32 ld_once(const u32* p) { u32 v; asm("ld.global.nc.L1::no_allocate.u32 %0,[%1];" : "=r"(v) : "l"(p)); return v; }
// A load of what no one writes while this kernel or the one ahead of it runs, asked for where it stands: ahead of a grid_wait it is on its way while
// the launch ahead ends. One of the above (nc) is of what never changes to the assembler, which moves it behind the wait.
__device__ __forceinline__ uint4 ld_ahead(const uint4* p) { uint4 v; asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }
// A load of what another block of this launch wrote, or a launch that no grid_wait of this one was for.
__device__ __forceinline__ float ld_fresh(const float* p) { return __ldcg(p); }
__device__ __forceinline__ uint4 ld_fresh(const uint4* p) { return __ldcg(p); }
// Asks for a line of 128 bytes to be brought to the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// A launch may use what was there when the one ahead of it passed its own grid_wait, if that one lets it begin no sooner; it must wait before it
// ends, all the same, so that who waits for it waits for both.
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
