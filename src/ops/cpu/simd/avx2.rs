//! Eight lanes in AVX2 registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Lanes};

#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// Runs `kernel` compiled for AVX2.
///
/// # Safety
/// The machine has AVX2, FMA and F16C, and the kernel's own promises hold.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { kernel.run::<Avx2>() }
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

/// The first `n` 16-bit elements, zeros after.
///
/// # Safety
/// `p` is valid for `n < 8` elements.
#[inline(always)]
unsafe fn part16(p: *const u16, n: usize) -> __m128i {
    let mut buffer = [0u16; 8];
    hw!(std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n));
    hw!(_mm_loadu_si128(buffer.as_ptr().cast()))
}

/// All ones in the first `n` lanes.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn first(n: usize) -> __m256i {
    hw!(_mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))
}

#[inline(always)]
unsafe fn widen_bf16(v: __m128i) -> __m256 {
    hw!(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)))
}

/// Both vectors folded to four partial sums, in the two halves.
#[inline(always)]
unsafe fn fold(a: __m256, b: __m256) -> __m256 {
    hw!(_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)))
}

impl Lanes for Avx2 {
    const N: usize = 8;
    const ROWS: usize = 3;
    const BYTE_ROWS: usize = 4;
    type V = __m256;
    type W = __m256i;
    type P = ();

    unsafe fn enter<K: Kernel>(kernel: K) {
        // SAFETY: passed on.
        unsafe { run(kernel) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        hw!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        hw!(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V {
        hw!(_mm256_maskload_ps(p, first(n)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self::V {
        hw!(widen_bf16(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16_part(p: *const bf16, n: usize) -> Self::V {
        hw!(widen_bf16(part16(p.cast(), n)))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self::V {
        hw!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_f16_part(p: *const f16, n: usize) -> Self::V {
        hw!(_mm256_cvtph_ps(part16(p.cast(), n)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        hw!(_mm256_storeu_ps(p, v))
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize) {
        hw!(_mm256_maskstore_ps(p, first(n), v))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        hw!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        hw!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        hw!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        hw!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        hw!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        hw!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        hw!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        hw!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V {
        hw!({
            let e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)))
        })
    }
    #[inline(always)]
    unsafe fn keep(a: Self::V, from: usize, to: usize) -> Self::V {
        hw!({
            let inside = _mm256_andnot_si256(first(from), first(to));
            _mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), a, _mm256_castsi256_ps(inside))
        })
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        hw!({
            let s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
            let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
            _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)))
        })
    }
    #[inline(always)]
    unsafe fn greatest(a: Self::V) -> f32 {
        hw!({
            let s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
            let s = _mm_max_ps(s, _mm_movehl_ps(s, s));
            _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)))
        })
    }
    #[inline(always)]
    unsafe fn reduce_add<const R: usize>(acc: &[[Self::V; 4]; R], out: *mut f32) {
        for quad in 0..R.div_ceil(4) {
            for pair in 0..2 {
                // Rows that are not there are computed as the last one; nobody reads them.
                let at = |r: usize| (4 * quad + r).min(R - 1);
                let (c, d) = (2 * pair, 2 * pair + 1);
                let (u0, u1) = hw!((fold(acc[at(0)][c], acc[at(0)][d]), fold(acc[at(1)][c], acc[at(1)][d])));
                let (u2, u3) = hw!((fold(acc[at(2)][c], acc[at(2)][d]), fold(acc[at(3)][c], acc[at(3)][d])));
                hw!({
                    let s = _mm256_add_ps(_mm256_unpacklo_ps(u0, u1), _mm256_unpackhi_ps(u0, u1));
                    let t = _mm256_add_ps(_mm256_unpacklo_ps(u2, u3), _mm256_unpackhi_ps(u2, u3));
                    let (s, t) = (_mm256_castps_pd(s), _mm256_castps_pd(t));
                    let v = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(s, t)), _mm256_castpd_ps(_mm256_unpackhi_pd(s, t)));
                    let out = out.add(16 * quad + 8 * pair);
                    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), v));
                });
            }
        }
    }
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
    unsafe fn words(p: *const u32) -> Self::W {
        hw!(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn words_part(p: *const u32, n: usize) -> Self::W {
        hw!(_mm256_maskload_epi32(p.cast(), first(n)))
    }
    #[inline(always)]
    unsafe fn store_words(p: *mut u32, w: Self::W) {
        hw!(_mm256_storeu_si256(p.cast(), w))
    }
    #[inline(always)]
    unsafe fn splat_word(x: u32) -> Self::W {
        hw!(_mm256_set1_epi32(x as i32))
    }
    #[inline(always)]
    unsafe fn field(w: Self::W, shift: u32, mask: u32) -> Self::W {
        hw!(_mm256_and_si256(_mm256_srl_epi32(w, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi32(mask as i32)))
    }
    #[inline(always)]
    unsafe fn or_shifted<const BY: u32>(a: Self::W, b: Self::W) -> Self::W {
        hw!(_mm256_or_si256(a, _mm256_sll_epi32(b, _mm_cvtsi32_si128(BY as i32))))
    }
    #[inline(always)]
    unsafe fn table(from: &[u8; 16]) -> Self::W {
        hw!(_mm256_broadcastsi128_si256(_mm_loadu_si128(from.as_ptr().cast())))
    }
    #[inline(always)]
    unsafe fn lookup(table: Self::W, w: Self::W) -> Self::W {
        hw!(_mm256_shuffle_epi8(table, w))
    }
    #[inline(always)]
    unsafe fn dot8(acc: Self::W, unsigned: Self::W, signed: Self::W) -> Self::W {
        // `maddubs` would saturate: even and odd bytes apart, as 16-bit halves.
        hw!({
            let bytes = _mm256_set1_epi16(0xff);
            let even = _mm256_madd_epi16(_mm256_and_si256(unsigned, bytes), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed)));
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(unsigned), _mm256_srai_epi16::<8>(signed));
            _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
        })
    }
    #[inline(always)]
    unsafe fn word_values(w: Self::W) -> Self::V {
        hw!(_mm256_cvtepi32_ps(w))
    }
    #[inline(always)]
    unsafe fn to_words(v: Self::V) -> Self::W {
        hw!(_mm256_cvtps_epi32(v))
    }
    #[inline(always)]
    unsafe fn halves(low: Self::W, high: Self::W) -> Self::W {
        hw!(_mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32::<16>(high)))
    }
    #[inline(always)]
    unsafe fn dot16(acc: Self::W, a: Self::W, b: Self::W) -> Self::W {
        hw!(_mm256_add_epi32(acc, _mm256_madd_epi16(a, b)))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        hw!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
}
