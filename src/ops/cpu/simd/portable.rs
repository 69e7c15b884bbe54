//! Eight lanes as an array: the shape every other instruction set is a faster version of. With `PAIRS`, bf16 dot
//! products are spelled out too, so that kernels made for them are tested where no processor has them.

use half::{bf16, f16};

use super::{Kernel, Lanes};

const N: usize = 8;

#[derive(Clone, Copy)]
pub(super) struct Portable<const PAIRS: bool>;

#[inline(always)]
fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for i in 0..N {
        out[i] = f(a[i], b[i]);
    }
    out
}

/// The first `n` elements of `p` through `f`, zeros after.
///
/// # Safety
/// `p` is valid for `n` elements.
#[inline(always)]
unsafe fn gather<T: Copy>(p: *const T, n: usize, f: impl Fn(T) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for (i, x) in out.iter_mut().enumerate().take(n) {
        // SAFETY: `i < n`.
        *x = f(unsafe { p.add(i).read() });
    }
    out
}

fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

macro_rules! read {
    ($name:ident, $part:ident, $t:ty, $f:expr) => {
        #[inline(always)]
        unsafe fn $name(p: *const $t) -> Self::V {
            // SAFETY: the caller gives `N` elements.
            unsafe { gather(p, N, $f) }
        }
        #[inline(always)]
        unsafe fn $part(p: *const $t, n: usize) -> Self::V {
            // SAFETY: the caller gives `n` elements.
            unsafe { gather(p, n, $f) }
        }
    };
}

impl<const PAIRS: bool> Lanes for Portable<PAIRS> {
    const N: usize = N;
    const PAIRS: bool = PAIRS;
    const ROWS: usize = 2;
    const BYTE_ROWS: usize = 4;
    type V = [f32; N];
    type P = [bf16; 2 * N];
    type W = [u32; N];

    #[inline(never)]
    unsafe fn enter<K: Kernel>(kernel: K) {
        // SAFETY: passed on.
        unsafe { kernel.run::<Self>() }
    }

    read!(load, load_part, f32, |x| x);
    read!(load_bf16, load_bf16_part, bf16, bf16_to_f32);
    read!(load_f16, load_f16_part, f16, f16::to_f32);

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; N]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller gives `N` elements.
        unsafe { p.cast::<[f32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize) {
        for (i, &x) in v.iter().enumerate().take(n) {
            // SAFETY: `i < n`.
            unsafe { p.add(i).write(x) }
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Two roundings: a fused one is a library call where the hardware lacks it.
        zip(zip(a, b, |a, b| a * b), c, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        // Adding 1.5 * 2^23 leaves no bits for a fraction; callers stay within 2^22.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V {
        zip(a, n, |a, n| a * f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn keep(a: Self::V, from: usize, to: usize) -> Self::V {
        let mut out = [f32::NEG_INFINITY; N];
        let to = to.min(N);
        if from < to {
            out[from..to].copy_from_slice(&a[from..to]);
        }
        out
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        let s = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
        (s[0] + s[2]) + (s[1] + s[3])
    }
    #[inline(always)]
    unsafe fn greatest(a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
    #[inline(always)]
    unsafe fn reduce_add<const R: usize>(acc: &[[Self::V; 4]; R], out: *mut f32) {
        for (r, row) in acc.iter().enumerate() {
            for (c, &v) in row.iter().enumerate() {
                // SAFETY: the caller gives sixteen floats for every four rows.
                unsafe { *out.add(16 * (r / 4) + 4 * c + r % 4) += Self::sum(v) }
            }
        }
    }
    #[inline(always)]
    unsafe fn pairs(p: *const bf16) -> Self::P {
        // SAFETY: the caller gives `2 * N` elements.
        unsafe { p.cast::<Self::P>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn pairs_part(p: *const bf16, n: usize) -> Self::P {
        let mut out = [bf16::ZERO; 2 * N];
        // SAFETY: the caller gives `n < 2 * N` elements.
        unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), n) };
        out
    }
    #[inline(always)]
    unsafe fn pair_dot(acc: Self::V, a: Self::P, b: Self::P) -> Self::V {
        let mut out = acc;
        for i in 0..N {
            // The hardware adds the odd element first.
            for j in [2 * i + 1, 2 * i] {
                out[i] += bf16_to_f32(a[j]) * bf16_to_f32(b[j]);
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn words(p: *const u32) -> Self::W {
        // SAFETY: the caller gives `N` words.
        unsafe { p.cast::<Self::W>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn words_part(p: *const u32, n: usize) -> Self::W {
        let mut out = [0; N];
        // SAFETY: the caller gives `n < N` words.
        unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), n) };
        out
    }
    #[inline(always)]
    unsafe fn store_words(p: *mut u32, w: Self::W) {
        // SAFETY: the caller gives `N` words.
        unsafe { p.cast::<Self::W>().write_unaligned(w) }
    }
    #[inline(always)]
    unsafe fn splat_word(x: u32) -> Self::W {
        [x; N]
    }
    #[inline(always)]
    unsafe fn field(w: Self::W, shift: u32, mask: u32) -> Self::W {
        w.map(|w| w >> shift & mask)
    }
    #[inline(always)]
    unsafe fn or_shifted<const BY: u32>(a: Self::W, b: Self::W) -> Self::W {
        std::array::from_fn(|i| a[i] | b[i] << BY)
    }
    #[inline(always)]
    unsafe fn table(from: &[u8; 16]) -> Self::W {
        // Bytes 16 to 31 of the vector repeat the first.
        std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|b| from[4 * (i % 4) + b])))
    }
    #[inline(always)]
    unsafe fn lookup(table: Self::W, w: Self::W) -> Self::W {
        let one = |code: u8| table[usize::from(code) / 4].to_le_bytes()[usize::from(code) % 4];
        w.map(|w| u32::from_le_bytes(w.to_le_bytes().map(one)))
    }
    #[inline(always)]
    unsafe fn dot8(acc: Self::W, unsigned: Self::W, signed: Self::W) -> Self::W {
        std::array::from_fn(|i| {
            let (u, s) = (unsigned[i].to_le_bytes(), signed[i].to_le_bytes());
            let products = (0..4).map(|b| (i32::from(u[b]) * i32::from(s[b] as i8)) as u32);
            products.fold(acc[i], u32::wrapping_add)
        })
    }
    #[inline(always)]
    unsafe fn word_values(w: Self::W) -> Self::V {
        w.map(|w| w as i32 as f32)
    }
    #[inline(always)]
    unsafe fn to_words(v: Self::V) -> Self::W {
        v.map(|x| x.round_ties_even() as i32 as u32)
    }
    #[inline(always)]
    unsafe fn halves(low: Self::W, high: Self::W) -> Self::W {
        std::array::from_fn(|i| low[i] & 0xffff | high[i] << 16)
    }
    #[inline(always)]
    unsafe fn dot16(acc: Self::W, a: Self::W, b: Self::W) -> Self::W {
        let half = |x: u32, y: u32| i32::from(x as u16 as i16) * i32::from(y as u16 as i16);
        std::array::from_fn(|i| {
            let low = half(a[i], b[i]);
            let high = half(a[i] >> 16, b[i] >> 16);
            acc[i].wrapping_add(low as u32).wrapping_add(high as u32)
        })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
