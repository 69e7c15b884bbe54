//! Codes in words (`quant`) as attention reads them: to numbers, or straight into integer dot products.
//!
//! A dot product of codes takes pairs of them: a word of codes gives, by a shift and a mask, codes `j` and `j + half` in
//! its two 16-bit halves for each lane; the other side is a pair of weights rounded to 16 bits, the same for all lanes.

use super::simd::{Kernel, Lanes};
use crate::quant::{Place, place, third, words};

/// Codes of a tile: `[words(n, bits)][lanes]`.
#[derive(Clone, Copy)]
pub(super) struct Codes {
    pub(super) words: *const u32,
    pub(super) lanes: usize,
    /// Codes of a lane.
    pub(super) n: usize,
    pub(super) bits: u32,
}

impl Codes {
    /// Bits of the words that hold the low bits, or all.
    const fn low(&self) -> u32 {
        if self.bits == 3 { 2 } else { self.bits }
    }

    /// Codes `half` apart make a pair.
    pub(super) const fn half(&self) -> usize {
        16 / self.low() as usize
    }

    /// Pairs of a lane, those beyond its last code included: pair `t` is of codes `t / half * 2 half + t % half` and `half` more.
    pub(super) const fn pairs(&self) -> usize {
        words(self.n, self.low()) * self.half()
    }
}

/// `to[lane] = min + code * scale` of code `i` in `width` lanes from lane `lane`.
pub(super) struct Numbers {
    pub(super) codes: Codes,
    pub(super) i: usize,
    pub(super) lane: usize,
    pub(super) width: usize,
    pub(super) scale: f32,
    pub(super) min: f32,
    pub(super) to: *mut f32,
}

impl Kernel for Numbers {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Numbers { codes: Codes { words, lanes, n, bits }, i, lane, width, scale, min, to } = self;
        let low = place(i, bits);
        let mask = if bits == 3 { 3 } else { (1 << bits) - 1 };
        // SAFETY: the words hold code `i` of every lane; `width` lanes are read and written.
        unsafe {
            let at = words.add(low.word * lanes + lane);
            let (high, third_shift) = match bits {
                3 => {
                    let Place { word, shift } = third(i, n);
                    (words.add(word * lanes + lane), shift)
                }
                _ => (at, 0),
            };
            let (scale, min) = (S::splat(scale), S::splat(min));
            let value = |low_word: S::W, high_word: S::W| {
                let code = S::field(low_word, low.shift, mask);
                let code = if bits == 3 { S::with_third(code, S::field(high_word, third_shift, 1)) } else { code };
                S::fma(S::word_values(code), scale, min)
            };
            let mut j = 0;
            while j + S::N <= width {
                S::store(to.add(j), value(S::words(at.add(j)), S::words(high.add(j))));
                j += S::N;
            }
            if j < width {
                let rest = width - j;
                S::store_part(to.add(j), value(S::words_part(at.add(j), rest), S::words_part(high.add(j), rest)), rest);
            }
        }
    }
}

/// Pairs `[from, to)` of `width` lanes from lane `lane`, spread out to `out: [to - from][stride]`, a pair to a word. Lanes from
/// `width` up to a whole vector are zero.
pub(super) struct Spread {
    pub(super) codes: Codes,
    pub(super) lane: usize,
    pub(super) width: usize,
    /// Multiples of `half`.
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) out: *mut u32,
    /// No less than `width` rounded up to 16.
    pub(super) stride: usize,
}

impl Kernel for Spread {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on.
        unsafe {
            match self.codes.bits {
                8 => self.spread::<S, 8>(),
                4 => self.spread::<S, 4>(),
                3 => self.spread::<S, 3>(),
                _ => self.spread::<S, 2>(),
            }
        }
    }
}

impl Spread {
    #[inline(always)]
    unsafe fn spread<S: Lanes, const BITS: u32>(self) {
        let Spread { codes: Codes { words, lanes, n, .. }, lane, width, from, to, mut out, stride } = self;
        let low = if BITS == 3 { 2 } else { BITS };
        let half = 16 / low as usize;
        let mask = if BITS == 3 { 0x0003_0003 } else { ((1u32 << BITS) - 1) * 0x0001_0001 };
        // SAFETY: words of the tile are read in its lanes; `out` has `stride` words for each pair.
        unsafe {
            for word in from / half..to / half {
                let at = words.add(word * lanes + lane);
                let high = words.add((n.div_ceil(16) + word / 2) * lanes + lane);
                let mut j = 0;
                while j < width {
                    let read = |p: *const u32| if j + S::N <= width { S::words(p.add(j)) } else { S::words_part(p.add(j), width - j) };
                    let codes = read(at);
                    let thirds = if BITS == 3 { read(high) } else { codes };
                    for k in 0..half {
                        let pair = S::field(codes, low * k as u32, mask);
                        let pair = match BITS {
                            3 => S::with_third(pair, S::field(thirds, 8 * (word as u32 % 2) + k as u32, 0x0001_0001)),
                            _ => pair,
                        };
                        S::store_words(out.add(k * stride + j), pair);
                    }
                    j += S::N;
                }
                out = out.add(half * stride);
            }
        }
    }
}

/// `out[r][j] (+)= sum over t < n of a[r][t] . b[t * b_step + j]`, products of pairs, exact in 32 bits. `width` columns are
/// computed and stored in whole vectors.
#[derive(Clone, Copy)]
pub(super) struct PairProduct<const R: usize> {
    /// Pairs of signed 16-bit weights.
    pub(super) a: [*const u32; R],
    pub(super) b: *const u32,
    pub(super) b_step: usize,
    pub(super) n: usize,
    pub(super) out: [*mut u32; R],
    pub(super) width: usize,
    pub(super) accumulate: bool,
}

impl<const R: usize> Kernel for PairProduct<R> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: columns come in whole vectors, for which there is room.
        unsafe {
            let mut j = 0;
            while j + 4 * S::N <= self.width {
                self.block::<S, 4>(j);
                j += 4 * S::N;
            }
            if j + 2 * S::N <= self.width {
                self.block::<S, 2>(j);
                j += 2 * S::N;
            }
            while j < self.width {
                self.block::<S, 1>(j);
                j += S::N;
            }
        }
    }
}

impl<const R: usize> PairProduct<R> {
    #[inline(always)]
    unsafe fn block<S: Lanes, const C: usize>(&self, j: usize) {
        // SAFETY: `C` vectors of columns from `j` are there.
        unsafe {
            let mut acc = [[S::splat_word(0); C]; R];
            if self.accumulate {
                for r in 0..R {
                    for c in 0..C {
                        acc[r][c] = S::words(self.out[r].add(j + c * S::N).cast_const());
                    }
                }
            }
            let mut b = self.b.add(j);
            for t in 0..self.n {
                let mut column = [S::words(b); C];
                for c in 1..C {
                    column[c] = S::words(b.add(c * S::N));
                }
                for r in 0..R {
                    let a = S::splat_word(*self.a[r].add(t));
                    for c in 0..C {
                        acc[r][c] = S::dot16(acc[r][c], column[c], a);
                    }
                }
                b = b.wrapping_add(self.b_step);
            }
            for r in 0..R {
                for c in 0..C {
                    S::store_words(self.out[r].add(j + c * S::N), acc[r][c]);
                }
            }
        }
    }
}
