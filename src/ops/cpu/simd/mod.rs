//! Vectors of f32 as every kernel sees them, and the door into code compiled for one instruction set.
//!
//! A [`Kernel`] is written once, generic over [`Lanes`], and entered through [`Lanes::enter`], which compiles it
//! once per instruction set in a function of its own that enables the features. Everything inside a kernel must
//! therefore be `#[inline(always)]`: a call that is not inlined would fall back to the features of the whole
//! program. Code around kernels is generic too, picked by [`dispatch`], but compiled plainly: it may not touch
//! vectors, only enter kernels. This keeps kernels small, and the compiler quick.

use std::fmt;

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Instruction sets with kernels of their own, slowest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Isa {
    /// Arrays of eight floats, for the compiler to vectorise as the target allows; no fused multiply-add.
    Portable,
    /// As [`Isa::Portable`], with the bf16 dot products of [`Isa::Avx512Bf16`] spelled out. Never the best: it is
    /// there to test what they are used for on machines without them.
    PortableBf16,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// As [`Isa::Avx512`], with integer dot products.
    Avx512Vnni,
    /// As [`Isa::Avx512Vnni`], with bf16 dot products: activations are rounded to bf16 where weights are bf16.
    Avx512Bf16,
}

impl Isa {
    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            match self {
                Isa::Portable | Isa::PortableBf16 => true,
                Isa::Avx2 => avx2,
                Isa::Avx512 => avx512,
                Isa::Avx512Vnni => avx512 && is_x86_feature_detected!("avx512vnni"),
                Isa::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            matches!(self, Isa::Portable | Isa::PortableBf16)
        }
    }

    /// All of them, slowest first.
    pub const ALL: [Isa; 6] = [Isa::PortableBf16, Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Bf16];

    /// Whether weights in bf16 meet activations rounded to bf16.
    pub fn rounds_activations(self) -> bool {
        matches!(self, Isa::PortableBf16 | Isa::Avx512Bf16)
    }

    /// The fastest this machine has.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rfind(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::PortableBf16 => "portable-bf16",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512-vnni",
            Isa::Avx512Bf16 => "avx512-bf16",
        })
    }
}

/// A piece of work over vectors, to be compiled for every instruction set; or, for [`dispatch`], a piece of work
/// that enters such.
pub(super) trait Kernel {
    /// Does it. `#[inline(always)]` when it touches vectors.
    ///
    /// # Safety
    /// The machine has the instructions of `S`, and what the kernel's own fields promise holds.
    unsafe fn run<S: Lanes>(self);
}

/// Runs `work` for `isa`, compiled plainly.
///
/// # Safety
/// The machine has `isa`, and what the work's own fields promise holds.
pub(super) unsafe fn dispatch<K: Kernel>(isa: Isa, work: K) {
    // SAFETY: passed on.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => work.run::<avx512::Avx512Bf16>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => work.run::<avx512::Avx512Vnni>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => work.run::<avx512::Avx512>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => work.run::<avx2::Avx2>(),
            Isa::PortableBf16 => work.run::<portable::Portable<true>>(),
            _ => work.run::<portable::Portable<false>>(),
        }
    }
}

/// Enters `kernel` with the instructions of `isa`.
///
/// # Safety
/// As [`dispatch`].
pub(super) unsafe fn run<K: Kernel>(isa: Isa, kernel: K) {
    struct Entered<K>(K);
    impl<K: Kernel> Kernel for Entered<K> {
        unsafe fn run<S: Lanes>(self) {
            // SAFETY: passed on.
            unsafe { S::enter(self.0) }
        }
    }
    // SAFETY: passed on.
    unsafe { dispatch(isa, Entered(kernel)) }
}

/// A vector of `N` floats and what can be done with it.
///
/// # Safety
/// Of every function: the machine has the instructions; pointers are valid for the elements named.
/// No function needs alignment beyond the element's.
pub(super) trait Lanes: Copy + 'static {
    /// Lanes, 8 or 16.
    const N: usize;
    /// Rows of the largest register tile of four columns that stays in registers, at most 6.
    const ROWS: usize;
    /// Rows of the largest register tile of two columns of words that stays in registers, 8 or 4.
    const BYTE_ROWS: usize;
    /// Whether [`Lanes::pair_dot`] is there.
    const PAIRS: bool = false;
    type V: Copy;
    /// `2 * N` bf16.
    type P: Copy;
    /// `N` words of 32 bits.
    type W: Copy;

    /// Runs `kernel` with these instructions, as a function of its own: one that swallowed every register tile of its
    /// callers would take the compiler minutes.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn enter<K: Kernel>(kernel: K);

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    /// The first `n < N` lanes from memory, the others zero; reads nothing else.
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V;
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    unsafe fn load_bf16_part(p: *const bf16, n: usize) -> Self::V;
    unsafe fn load_f16(p: *const f16) -> Self::V;
    unsafe fn load_f16_part(p: *const f16, n: usize) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Stores the first `n < N` lanes and touches nothing else.
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The greater; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The lesser; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest whole number.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for whole `n` in `[-127, 128]`; zero at -127.
    unsafe fn scale2(a: Self::V, n: Self::V) -> Self::V;
    /// Lanes in `[from, to)` as they are, the others minus infinity.
    unsafe fn keep(a: Self::V, from: usize, to: usize) -> Self::V;
    /// Sum of the lanes, in the tree of [`Lanes::reduce_add`].
    unsafe fn sum(a: Self::V) -> f32;
    /// The greatest lane; NaN may be lost.
    unsafe fn greatest(a: Self::V) -> f32;

    /// Adds the sum of the lanes of `acc[r][c]` to `out[16 * (r / 4) + 4 * c + r % 4]`.
    ///
    /// The tree is the same for any `R`: halves are added to halves until four partial sums are left,
    /// then `(s0 + s2) + (s1 + s3)`. Places of rows that are not there get anything.
    unsafe fn reduce_add<const R: usize>(acc: &[[Self::V; 4]; R], out: *mut f32);

    unsafe fn pairs(p: *const bf16) -> Self::P;
    unsafe fn pairs_part(p: *const bf16, n: usize) -> Self::P;
    /// Adds the products of lane pairs to `acc`. Only where [`Lanes::PAIRS`].
    unsafe fn pair_dot(acc: Self::V, a: Self::P, b: Self::P) -> Self::V;

    unsafe fn words(p: *const u32) -> Self::W;
    /// The first `n < N` words from memory, the others zero; reads nothing else.
    unsafe fn words_part(p: *const u32, n: usize) -> Self::W;
    unsafe fn store_words(p: *mut u32, w: Self::W);
    unsafe fn splat_word(x: u32) -> Self::W;
    /// `w >> shift & mask`.
    unsafe fn field(w: Self::W, shift: u32, mask: u32) -> Self::W;
    /// `a | b << BY`.
    unsafe fn or_shifted<const BY: u32>(a: Self::W, b: Self::W) -> Self::W;
    /// Sixteen bytes for [`Lanes::lookup`].
    unsafe fn table(from: &[u8; 16]) -> Self::W;
    /// Each byte of `w`, which is below 16, replaced by that byte of the table.
    unsafe fn lookup(table: Self::W, w: Self::W) -> Self::W;
    /// Adds the products of unsigned with signed bytes to `acc`, four to a lane, modulo 2^32.
    unsafe fn dot8(acc: Self::W, unsigned: Self::W, signed: Self::W) -> Self::W;
    /// Signed words as numbers.
    unsafe fn word_values(w: Self::W) -> Self::V;
    /// Numbers below 2^31 in size to the nearest signed words.
    unsafe fn to_words(v: Self::V) -> Self::W;
    /// The low halves of `low` below those of `high`.
    unsafe fn halves(low: Self::W, high: Self::W) -> Self::W;
    /// Adds the products of the signed low halves and of the signed high halves to `acc`, modulo 2^32.
    unsafe fn dot16(acc: Self::W, a: Self::W, b: Self::W) -> Self::W;

    /// Asks for the cache line of `p` to be brought to the second-level cache; `p` need not be valid.
    unsafe fn prefetch(p: *const u8);

    /// `e^x`, relative error below 4e-7; zero below -87.7, infinity above 89. `e^0` is exactly one.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: arithmetic only, on the instruction set the caller vouches for.
        unsafe {
            // The bound comes first: `max` and `min` give their second operand for NaN, so NaN stays NaN.
            let x = Self::min(Self::splat(89.0), Self::max(Self::splat(-88.1), x));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            // ln 2 in two parts, the first short enough that its product with n is exact.
            let r = Self::fma(n, Self::splat(-355.0 / 512.0), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            // The exponential series: on |r| <= ln(2)/2 the first term left out is below 1.3e-7.
            let mut p = Self::splat(1.0 / 720.0);
            for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
                p = Self::fma(p, r, Self::splat(c));
            }
            Self::scale2(p, n)
        }
    }
}

/// An element that loads as f32.
///
/// # Safety
/// As for [`Lanes`].
pub(super) trait Element: Copy + 'static {
    unsafe fn load<S: Lanes>(p: *const Self) -> S::V;
    unsafe fn load_part<S: Lanes>(p: *const Self, n: usize) -> S::V;
}

macro_rules! element {
    ($t:ty, $load:ident, $part:ident) => {
        impl Element for $t {
            #[inline(always)]
            unsafe fn load<S: Lanes>(p: *const Self) -> S::V {
                // SAFETY: the caller's promises are those of the function called.
                unsafe { S::$load(p) }
            }
            #[inline(always)]
            unsafe fn load_part<S: Lanes>(p: *const Self, n: usize) -> S::V {
                // SAFETY: the caller's promises are those of the function called.
                unsafe { S::$part(p, n) }
            }
        }
    };
}
element!(f32, load, load_part);
element!(bf16, load_bf16, load_bf16_part);
element!(f16, load_f16, load_f16_part);
