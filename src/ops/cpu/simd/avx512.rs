//! Sixteen lanes in AVX-512 registers, without and with bf16 dot products.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Lanes};

#[derive(Clone, Copy)]
pub(super) struct Avx512;
#[derive(Clone, Copy)]
pub(super) struct Avx512Vnni;
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16;

/// Runs `kernel` compiled for AVX-512.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL and DQ, and the kernel's own promises hold.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
#[inline(never)]
unsafe fn run<K: Kernel>(kernel: K) {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { kernel.run::<Avx512>() }
}

/// Runs `kernel` compiled for AVX-512 with integer dot products.
///
/// # Safety
/// As for [`run`], and the machine has AVX512_VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline(never)]
unsafe fn run_vnni<K: Kernel>(kernel: K) {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { kernel.run::<Avx512Vnni>() }
}

/// Runs `kernel` compiled for AVX-512 with integer and bf16 dot products.
///
/// # Safety
/// As for [`run`], and the machine has AVX512_VNNI and AVX512_BF16.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
#[inline(never)]
unsafe fn run_bf16<K: Kernel>(kernel: K) {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { kernel.run::<Avx512Bf16>() }
}

/// A call of intrinsics under the promise every function of [`Lanes`] is made under.
macro_rules! hw {
    ($e:expr) => {{
        // SAFETY: `Lanes` is used only on machines that have the instructions, and its pointers are valid
        // for the elements the intrinsic touches.
        #[allow(unused_unsafe)]
        unsafe {
            $e
        }
    }};
}

/// The first `n <= 16` lanes.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

#[inline(always)]
unsafe fn widen_bf16(v: __m256i) -> __m512 {
    hw!(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)))
}

/// Each of the four vectors folded to four partial sums, in the four quarters.
#[inline(always)]
unsafe fn fold(&[a, b, c, d]: &[__m512; 4]) -> __m512 {
    hw!({
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xEE>(c, d));
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xDD>(ab, cd))
    })
}

macro_rules! lanes {
    ($name:ident { $($pairs:item)* }) => {
        impl Lanes for $name {
            const N: usize = 16;
            const ROWS: usize = 6;
            const BYTE_ROWS: usize = 8;
            type V = __m512;
            type W = __m512i;
            $($pairs)*

            #[inline(always)]
            unsafe fn splat(x: f32) -> Self::V {
                hw!(_mm512_set1_ps(x))
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> Self::V {
                hw!(_mm512_loadu_ps(p))
            }
            #[inline(always)]
            unsafe fn load_part(p: *const f32, n: usize) -> Self::V {
                hw!(_mm512_maskz_loadu_ps(first(n), p))
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const bf16) -> Self::V {
                hw!(widen_bf16(_mm256_loadu_si256(p.cast())))
            }
            #[inline(always)]
            unsafe fn load_bf16_part(p: *const bf16, n: usize) -> Self::V {
                hw!(widen_bf16(_mm256_maskz_loadu_epi16(first(n), p.cast())))
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const f16) -> Self::V {
                hw!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
            }
            #[inline(always)]
            unsafe fn load_f16_part(p: *const f16, n: usize) -> Self::V {
                hw!(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p.cast())))
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, v: Self::V) {
                hw!(_mm512_storeu_ps(p, v))
            }
            #[inline(always)]
            unsafe fn store_part(p: *mut f32, v: Self::V, n: usize) {
                hw!(_mm512_mask_storeu_ps(p, first(n), v))
            }
            #[inline(always)]
            unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
                hw!(_mm512_add_ps(a, b))
            }
            #[inline(always)]
            unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
                hw!(_mm512_sub_ps(a, b))
            }
            #[inline(always)]
            unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
                hw!(_mm512_mul_ps(a, b))
            }
            #[inline(always)]
            unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
                hw!(_mm512_div_ps(a, b))
            }
            #[inline(always)]
            unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                hw!(_mm512_fmadd_ps(a, b, c))
            }
            #[inline(always)]
            unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
                hw!(_mm512_max_ps(a, b))
            }
            #[inline(always)]
            unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
                hw!(_mm512_min_ps(a, b))
            }
            #[inline(always)]
            unsafe fn round(a: Self::V) -> Self::V {
                hw!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
            }
            #[inline(always)]
            unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V {
                // Zero instead of a subnormal at -127: subnormals are slow in what follows.
                hw!(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(n, _mm512_set1_ps(-127.0)), a, n))
            }
            #[inline(always)]
            unsafe fn keep(a: Self::V, from: usize, to: usize) -> Self::V {
                hw!(_mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), first(to) & !first(from), a))
            }
            #[inline(always)]
            unsafe fn sum(a: Self::V) -> f32 {
                hw!({
                    let s = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
                    let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
                    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
                    _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)))
                })
            }
            #[inline(always)]
            unsafe fn greatest(a: Self::V) -> f32 {
                hw!({
                    let s = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
                    let s = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
                    let s = _mm_max_ps(s, _mm_movehl_ps(s, s));
                    _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)))
                })
            }
            #[inline(always)]
            unsafe fn reduce_add<const R: usize>(acc: &[[Self::V; 4]; R], out: *mut f32) {
                for quad in 0..R.div_ceil(4) {
                    // Rows that are not there are computed as the last one; nobody reads them.
                    let (u0, u1) = hw!((fold(&acc[(4 * quad).min(R - 1)]), fold(&acc[(4 * quad + 1).min(R - 1)])));
                    hw!({
                        let s = _mm512_add_ps(_mm512_unpacklo_ps(u0, u1), _mm512_unpackhi_ps(u0, u1));
                        let t = if 4 * quad + 2 < R {
                            let (u2, u3) = (fold(&acc[(4 * quad + 2).min(R - 1)]), fold(&acc[(4 * quad + 3).min(R - 1)]));
                            _mm512_add_ps(_mm512_unpacklo_ps(u2, u3), _mm512_unpackhi_ps(u2, u3))
                        } else {
                            s
                        };
                        let (s, t) = (_mm512_castps_pd(s), _mm512_castps_pd(t));
                        let v = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(s, t)), _mm512_castpd_ps(_mm512_unpackhi_pd(s, t)));
                        let out = out.add(16 * quad);
                        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), v));
                    });
                }
            }
            #[inline(always)]
            unsafe fn words(p: *const u32) -> Self::W {
                hw!(_mm512_loadu_si512(p.cast()))
            }
            #[inline(always)]
            unsafe fn words_part(p: *const u32, n: usize) -> Self::W {
                hw!(_mm512_maskz_loadu_epi32(first(n), p.cast()))
            }
            #[inline(always)]
            unsafe fn store_words(p: *mut u32, w: Self::W) {
                hw!(_mm512_storeu_si512(p.cast(), w))
            }
            #[inline(always)]
            unsafe fn splat_word(x: u32) -> Self::W {
                hw!(_mm512_set1_epi32(x as i32))
            }
            #[inline(always)]
            unsafe fn field(w: Self::W, shift: u32, mask: u32) -> Self::W {
                hw!(_mm512_and_si512(_mm512_srl_epi32(w, _mm_cvtsi32_si128(shift as i32)), _mm512_set1_epi32(mask as i32)))
            }
            #[inline(always)]
            unsafe fn or_shifted<const BY: u32>(a: Self::W, b: Self::W) -> Self::W {
                hw!(_mm512_or_si512(a, _mm512_slli_epi32::<BY>(b)))
            }
            #[inline(always)]
            unsafe fn table(from: &[u8; 16]) -> Self::W {
                hw!(_mm512_broadcast_i32x4(_mm_loadu_si128(from.as_ptr().cast())))
            }
            #[inline(always)]
            unsafe fn lookup(table: Self::W, w: Self::W) -> Self::W {
                hw!(_mm512_shuffle_epi8(table, w))
            }
            #[inline(always)]
            unsafe fn word_values(w: Self::W) -> Self::V {
                hw!(_mm512_cvtepi32_ps(w))
            }
            #[inline(always)]
            unsafe fn to_words(v: Self::V) -> Self::W {
                hw!(_mm512_cvtps_epi32(v))
            }
            #[inline(always)]
            unsafe fn halves(low: Self::W, high: Self::W) -> Self::W {
                hw!(_mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32::<16>(high)))
            }
            #[inline(always)]
            unsafe fn prefetch(p: *const u8) {
                hw!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
            }
        }
    };
}

lanes!(Avx512 {
    unsafe fn enter<K: Kernel>(kernel: K) {
        // SAFETY: passed on.
        unsafe { run(kernel) }
    }
    type P = ();
    #[inline(always)]
    unsafe fn pairs(_: *const bf16) -> Self::P {}
    #[inline(always)]
    unsafe fn pairs_part(_: *const bf16, _: usize) -> Self::P {}
    #[inline(always)]
    unsafe fn pair_dot(acc: Self::V, (): Self::P, (): Self::P) -> Self::V {
        // Never called: kernels ask for `PAIRS` first.
        acc
    }
    #[inline(always)]
    unsafe fn dot16(acc: Self::W, a: Self::W, b: Self::W) -> Self::W {
        hw!(_mm512_add_epi32(acc, _mm512_madd_epi16(a, b)))
    }
    #[inline(always)]
    unsafe fn dot8(acc: Self::W, unsigned: Self::W, signed: Self::W) -> Self::W {
        // `maddubs` would saturate: even and odd bytes apart, as 16-bit halves.
        hw!({
            let bytes = _mm512_set1_epi16(0xff);
            let even = _mm512_madd_epi16(_mm512_and_si512(unsigned, bytes), _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(signed)));
            let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(unsigned), _mm512_srai_epi16::<8>(signed));
            _mm512_add_epi32(acc, _mm512_add_epi32(even, odd))
        })
    }
});

lanes!(Avx512Vnni {
    unsafe fn enter<K: Kernel>(kernel: K) {
        // SAFETY: passed on.
        unsafe { run_vnni(kernel) }
    }
    type P = ();
    #[inline(always)]
    unsafe fn pairs(_: *const bf16) -> Self::P {}
    #[inline(always)]
    unsafe fn pairs_part(_: *const bf16, _: usize) -> Self::P {}
    #[inline(always)]
    unsafe fn pair_dot(acc: Self::V, (): Self::P, (): Self::P) -> Self::V {
        // Never called: kernels ask for `PAIRS` first.
        acc
    }
    #[inline(always)]
    unsafe fn dot16(acc: Self::W, a: Self::W, b: Self::W) -> Self::W {
        hw!(_mm512_dpwssd_epi32(acc, a, b))
    }
    #[inline(always)]
    unsafe fn dot8(acc: Self::W, unsigned: Self::W, signed: Self::W) -> Self::W {
        hw!(_mm512_dpbusd_epi32(acc, unsigned, signed))
    }
});

lanes!(Avx512Bf16 {
    const PAIRS: bool = true;
    unsafe fn enter<K: Kernel>(kernel: K) {
        // SAFETY: passed on.
        unsafe { run_bf16(kernel) }
    }
    type P = __m512bh;
    #[inline(always)]
    unsafe fn pairs(p: *const bf16) -> Self::P {
        hw!(std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())))
    }
    #[inline(always)]
    unsafe fn pairs_part(p: *const bf16, n: usize) -> Self::P {
        hw!(std::mem::transmute::<__m512i, __m512bh>(_mm512_maskz_loadu_epi16(((1u64 << n) - 1) as __mmask32, p.cast())))
    }
    #[inline(always)]
    unsafe fn pair_dot(acc: Self::V, a: Self::P, b: Self::P) -> Self::V {
        hw!(_mm512_dpbf16_ps(acc, a, b))
    }
    #[inline(always)]
    unsafe fn dot16(acc: Self::W, a: Self::W, b: Self::W) -> Self::W {
        hw!(_mm512_dpwssd_epi32(acc, a, b))
    }
    #[inline(always)]
    unsafe fn dot8(acc: Self::W, unsigned: Self::W, signed: Self::W) -> Self::W {
        hw!(_mm512_dpbusd_epi32(acc, unsigned, signed))
    }
});
