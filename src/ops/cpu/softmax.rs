//! The running softmax of attention: maxima, sums and outputs of lines, moved on tile by tile, and merged span by span.

use super::simd::{Kernel, Lanes};
use crate::ids::PAGE_TOKENS;

const P: usize = PAGE_TOKENS as usize;

/// Running softmax of some lines: maxima, sums, and outputs `[lines][stride]`.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) m: *mut f32,
    pub(super) l: *mut f32,
    pub(super) o: *mut f32,
    pub(super) stride: usize,
    pub(super) lines: usize,
}

impl State {
    pub(super) const fn floats(lines: usize, width: usize) -> usize {
        2 * lines.next_multiple_of(16) + lines * width.next_multiple_of(16)
    }

    /// # Safety
    /// `at` is valid for [`State::floats`].
    pub(super) unsafe fn at(at: *mut f32, lines: usize, width: usize) -> State {
        let each = lines.next_multiple_of(16);
        State { m: at, l: at.wrapping_add(each), o: at.wrapping_add(2 * each), stride: width.next_multiple_of(16), lines }
    }

    /// Lines `[first, first + n)`.
    pub(super) fn part(&self, first: usize, n: usize) -> State {
        let o = self.o.wrapping_add(first * self.stride);
        State { m: self.m.wrapping_add(first), l: self.l.wrapping_add(first), o, stride: self.stride, lines: n }
    }

    /// # Safety
    /// As promised by [`State::at`].
    pub(super) unsafe fn clear(&self) {
        // SAFETY: the ranges of `at`.
        unsafe {
            for i in 0..self.lines {
                *self.m.add(i) = f32::NEG_INFINITY;
                *self.l.add(i) = 0.0;
            }
            self.o.write_bytes(0, self.lines * self.stride);
        }
    }

    /// Merges the next span of the same lines into this.
    ///
    /// # Safety
    /// Both as promised by [`State::at`], and apart.
    pub(super) unsafe fn merge<S: Lanes>(self, next: State) {
        // SAFETY: passed on.
        unsafe { S::enter(Merge { to: self, next }) }
    }
}

/// [`State::merge`].
struct Merge {
    to: State,
    next: State,
}

impl Kernel for Merge {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Merge { to: State { m, l, o, stride, lines }, next } = self;
        // SAFETY: lines and strides are the same; strides are whole vectors.
        unsafe {
            for i in 0..lines {
                let (a, b) = (*m.add(i), *next.m.add(i));
                if b == f32::NEG_INFINITY && *next.l.add(i) == 0.0 {
                    // The line saw nothing in that span.
                    continue;
                }
                let top = if a > b { a } else { b };
                let mut scale = [0.0f32; 16];
                (scale[0], scale[1]) = (a - top, b - top);
                S::store(scale.as_mut_ptr(), S::exp(S::load(scale.as_ptr())));
                *m.add(i) = top;
                *l.add(i) = *l.add(i) * scale[0] + *next.l.add(i) * scale[1];
                let (a, b) = (S::splat(scale[0]), S::splat(scale[1]));
                let mut j = 0;
                while j < stride {
                    let (to, from) = (o.add(i * stride + j), next.o.add(i * stride + j));
                    S::store(to, S::fma(S::load(from), b, S::mul(S::load(to), a)));
                    j += S::N;
                }
            }
        }
    }
}

/// `to[j] = from[j] * by` for `n` elements; `from` may be `to`.
pub(super) struct Scaled {
    pub(super) from: *const f32,
    pub(super) to: *mut f32,
    pub(super) n: usize,
    pub(super) by: f32,
}

impl Kernel for Scaled {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Scaled { from, to, n, by } = self;
        // SAFETY: `j + N <= n` in the loop, the rest after it.
        unsafe {
            let by = S::splat(by);
            let mut j = 0;
            while j + S::N <= n {
                S::store(to.add(j), S::mul(S::load(from.add(j)), by));
                j += S::N;
            }
            if j < n {
                S::store_part(to.add(j), S::mul(S::load_part(from.add(j), n - j), by), n - j);
            }
        }
    }
}

/// A tile's scores of some lines, and where their softmax stands.
pub(super) struct Softmax<'a> {
    /// `[lines][64]`: scores of `width` positions become weights. At most 6 lines.
    pub(super) scores: *mut f32,
    pub(super) width: usize,
    pub(super) lines: usize,
    /// Line `r` sees positions `[from, to[r])`.
    pub(super) from: usize,
    pub(super) to: [usize; 6],
    pub(super) gain: f32,
    /// Maxima and sums of the lines, to be moved on.
    pub(super) m: *mut f32,
    pub(super) l: *mut f32,
    /// What outputs so far are to be scaled by, and sums of the weights.
    pub(super) scale: &'a mut [f32; 16],
    pub(super) sums: &'a mut [f32; 16],
}

impl Kernel for Softmax<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: `width` is a whole number of vectors, no more than 64.
        unsafe {
            let gain = S::splat(self.gain);
            let mut tops = [0.0f32; 6];
            self.scale.fill(0.0);
            for r in 0..self.lines {
                let scores = self.scores.add(r * P);
                let to = self.to[r];
                let whole = self.from == 0 && to >= self.width;
                let mut top = S::splat(f32::NEG_INFINITY);
                let mut j = 0;
                while j < self.width {
                    let mut v = S::mul(S::load(scores.add(j)), gain);
                    if !whole {
                        v = S::keep(v, self.from.saturating_sub(j).min(S::N), to.saturating_sub(j).min(S::N));
                    }
                    S::store(scores.add(j), v);
                    top = S::max(top, v);
                    j += S::N;
                }
                let (before, here) = (*self.m.add(r), S::greatest(top));
                tops[r] = if here > before { here } else { before };
                self.scale[r] = before - tops[r];
                *self.m.add(r) = tops[r];
            }
            let scale = self.scale.as_mut_ptr();
            S::store(scale, S::exp(S::load(scale)));
            for r in 0..self.lines {
                let scores = self.scores.add(r * P);
                let top = S::splat(tops[r]);
                let mut sum = S::splat(0.0);
                let mut j = 0;
                while j < self.width {
                    let v = S::exp(S::sub(S::load(scores.add(j)), top));
                    S::store(scores.add(j), v);
                    sum = S::add(sum, v);
                    j += S::N;
                }
                self.sums[r] = S::sum(sum);
                *self.l.add(r) = *self.l.add(r) * self.scale[r] + self.sums[r];
            }
        }
    }
}
