//! The register tile attention and sealing are made of: scalars of a few left rows, each broadcast over vectors
//! of a shared right row. Lanes run along the output, so there is no sum across lanes, and every output adds its
//! products in the order of `k` alone.

use super::simd::{Element, Kernel, Lanes};

/// Evaluates an expression with `$r` the constant equal to `$rows`, which is one to [`Lanes::ROWS`].
macro_rules! by_rows {
    ($rows:expr, $s:ty, |$r:ident| $body:expr) => {
        match $rows {
            1 => {
                const $r: usize = 1;
                $body
            }
            2 => {
                const $r: usize = 2;
                $body
            }
            3 if <$s>::ROWS >= 3 => {
                const $r: usize = 3;
                $body
            }
            4 if <$s>::ROWS >= 4 => {
                const $r: usize = 4;
                $body
            }
            5 if <$s>::ROWS >= 5 => {
                const $r: usize = 5;
                $body
            }
            6 if <$s>::ROWS >= 6 => {
                const $r: usize = 6;
                $body
            }
            n => unreachable!("a tile of {n} rows"),
        }
    };
}
pub(super) use by_rows;

/// `out[r][j] (+)= sum over k < n of a[r][k * a_step] * b[k * b_step + j]`.
#[derive(Clone, Copy)]
pub(super) struct Product<B, const R: usize> {
    pub(super) a: [*const f32; R],
    pub(super) a_step: usize,
    pub(super) b: *const B,
    pub(super) b_step: usize,
    pub(super) n: usize,
    /// Distance in bytes from `b` to what will be read next, to be fetched meanwhile; zero for nothing.
    pub(super) ahead: isize,
}

impl<B: Element, const R: usize> Product<B, R> {
    /// Computes `width` columns, from zero, or from `out[r]` times `scale[r]` where there is a scale.
    ///
    /// # Safety
    /// As for [`Lanes`]: `out` rows are valid for `width`, `a` and `b` for what the formula names.
    pub(super) unsafe fn onto<S: Lanes>(self, out: [*mut f32; R], width: usize, scale: Option<[f32; R]>) {
        // SAFETY: passed on.
        unsafe { S::enter(Onto { product: self, out, width, scale }) }
    }
}

/// The arguments of [`Product::onto`].
struct Onto<B, const R: usize> {
    product: Product<B, R>,
    out: [*mut f32; R],
    width: usize,
    scale: Option<[f32; R]>,
}

impl<B: Element, const R: usize> Kernel for Onto<B, R> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Onto { product, out, width, scale } = self;
        // SAFETY: each block of columns ends within `width`.
        unsafe {
            let mut j = 0;
            while j + 4 * S::N <= width {
                product.block::<S, 4>(out, j, scale);
                j += 4 * S::N;
            }
            while j + S::N <= width {
                product.block::<S, 1>(out, j, scale);
                j += S::N;
            }
            if j < width {
                product.part::<S>(out, j, width - j, scale);
            }
        }
    }
}

impl<B: Element, const R: usize> Product<B, R> {
    /// `C` vectors of columns from `j`.
    #[inline(always)]
    unsafe fn block<S: Lanes, const C: usize>(&self, out: [*mut f32; R], j: usize, scale: Option<[f32; R]>) {
        // SAFETY: `C * N` columns from `j` are within the width.
        unsafe {
            let mut acc = [[S::splat(0.0); C]; R];
            if let Some(scale) = scale {
                for r in 0..R {
                    for c in 0..C {
                        acc[r][c] = S::mul(S::load(out[r].add(j + c * S::N)), S::splat(scale[r]));
                    }
                }
            }
            let (mut b, mut at) = (self.b.add(j), 0usize);
            for _ in 0..self.n {
                let mut column = [B::load::<S>(b); C];
                for c in 1..C {
                    column[c] = B::load::<S>(b.add(c * S::N));
                }
                if self.ahead != 0 {
                    let mut line = 0;
                    while line < C * S::N * size_of::<B>() {
                        S::prefetch(b.cast::<u8>().wrapping_offset(self.ahead).wrapping_add(line));
                        line += 64;
                    }
                }
                for r in 0..R {
                    let a = S::splat(*self.a[r].add(at));
                    for c in 0..C {
                        acc[r][c] = S::fma(a, column[c], acc[r][c]);
                    }
                }
                b = b.wrapping_add(self.b_step);
                at = at.wrapping_add(self.a_step);
            }
            for r in 0..R {
                for c in 0..C {
                    S::store(out[r].add(j + c * S::N), acc[r][c]);
                }
            }
        }
    }

    /// The last `n` columns, fewer than a vector, from `j`.
    #[inline(always)]
    unsafe fn part<S: Lanes>(&self, out: [*mut f32; R], j: usize, n: usize, scale: Option<[f32; R]>) {
        // SAFETY: `n` columns from `j` are within the width.
        unsafe {
            let mut acc = [S::splat(0.0); R];
            if let Some(scale) = scale {
                for r in 0..R {
                    acc[r] = S::mul(S::load_part(out[r].add(j), n), S::splat(scale[r]));
                }
            }
            let (mut b, mut at) = (self.b.add(j), 0usize);
            for _ in 0..self.n {
                let column = B::load_part::<S>(b, n);
                for r in 0..R {
                    acc[r] = S::fma(S::splat(*self.a[r].add(at)), column, acc[r]);
                }
                b = b.wrapping_add(self.b_step);
                at = at.wrapping_add(self.a_step);
            }
            for r in 0..R {
                S::store_part(out[r].add(j), acc[r], n);
            }
        }
    }
}

/// Widens `n` elements.
///
/// # Safety
/// As for [`Lanes`]: both are valid for `n`.
#[inline(always)]
pub(super) unsafe fn widen<S: Lanes, B: Element>(from: *const B, to: *mut f32, n: usize) {
    // SAFETY: `i + N <= n` in the loop, the rest after it.
    unsafe {
        let mut i = 0;
        while i + S::N <= n {
            S::store(to.add(i), B::load::<S>(from.add(i)));
            i += S::N;
        }
        if i < n {
            S::store_part(to.add(i), B::load_part::<S>(from.add(i), n - i), n - i);
        }
    }
}

/// [`widen`] as a kernel: `n` elements.
pub(super) struct Widen<B> {
    pub(super) from: *const B,
    pub(super) to: *mut f32,
    pub(super) n: usize,
}

impl<B: Element> Kernel for Widen<B> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on.
        unsafe { widen::<S, B>(self.from, self.to, self.n) }
    }
}
