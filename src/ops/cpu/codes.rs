//! Codes in words (`quant`) as attention reads them: to numbers, or straight into integer dot products.
//!
//! A dot product takes pairs of codes, in the 16-bit halves of a word, or quads, in its bytes; the other side is as many weights,
//! rounded to 16 bits or split into bytes, the same for all lanes.

use super::simd::{Kernel, Lanes};
use crate::quant::{Order, levels, place, third, words};

/// Codes of a tile: `[words(n, bits)][lanes]`.
#[derive(Clone, Copy)]
pub(super) struct Codes {
    pub(super) words: *const u32,
    pub(super) lanes: usize,
    /// Codes of a lane.
    pub(super) n: usize,
    pub(super) bits: u32,
    pub(super) order: Order,
}

impl Codes {
    /// Bits of the words that hold the low bits, or all.
    const fn low(&self) -> u32 {
        if self.bits == 3 { 2 } else { self.bits }
    }

    /// Quads of a lane, those beyond its last code in a last word included.
    pub(super) const fn quads(&self) -> usize {
        words(self.n, self.low()) * (8 / self.low() as usize)
    }

    /// Pairs of a lane, two to a quad.
    pub(super) const fn pairs(&self) -> usize {
        2 * self.quads()
    }
}

/// [`levels`] above -128, so that they are unsigned.
pub(super) fn unsigned_levels(bits: u32) -> [u8; 16] {
    let mut table = [0; 16];
    levels(bits).0.iter().zip(&mut table).for_each(|(&level, to)| *to = (i16::from(level) + 128) as u8);
    table
}

/// [`levels`] as they are.
pub(super) fn signed_levels(bits: u32) -> [u8; 16] {
    let mut table = [0; 16];
    levels(bits).0.iter().zip(&mut table).for_each(|(&level, to)| *to = level as u8);
    table
}

/// What a code stands for.
#[derive(Clone, Copy)]
pub(super) enum Meaning {
    /// `min + code * scale`.
    Affine { scale: f32, min: f32 },
    /// `level[code] * scale`.
    Normal { scale: f32 },
    /// `level[code] * scale[lane]`.
    NormalEach { scales: *const f32 },
}

/// `to[lane]` of code `i` in `width` lanes from lane `lane`.
pub(super) struct Numbers {
    pub(super) codes: Codes,
    pub(super) i: usize,
    pub(super) lane: usize,
    pub(super) width: usize,
    pub(super) meaning: Meaning,
    pub(super) to: *mut f32,
}

impl Kernel for Numbers {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Numbers { codes: Codes { words, lanes, n, bits, order }, i, lane, width, meaning, to } = self;
        let (low, high) = (place(order.quad(i), bits), third(order.quad(i), n));
        let mask = if bits == 3 { 3 } else { (1 << bits) - 1 };
        // SAFETY: the words hold code `i` of every lane; `width` lanes are read and written.
        unsafe {
            let at = words.add(low.word * lanes + lane);
            let high_at = if bits == 3 { words.add(high.word * lanes + lane) } else { at };
            let table = match meaning {
                Meaning::Affine { .. } => S::splat_word(0),
                _ => S::table(&unsigned_levels(bits)),
            };
            let value = |low_word: S::W, high_word: S::W, j: usize| {
                let code = S::field(low_word, low.shift, mask);
                let code = if bits == 3 { S::or_shifted::<2>(code, S::field(high_word, high.shift, 1)) } else { code };
                let level = || S::sub(S::word_values(S::field(S::lookup(table, code), 0, 0xff)), S::splat(128.0));
                match meaning {
                    Meaning::Affine { scale, min } => S::fma(S::word_values(code), S::splat(scale), S::splat(min)),
                    Meaning::Normal { scale } => S::mul(level(), S::splat(scale)),
                    // A last part of lanes has no scales beyond it to read.
                    Meaning::NormalEach { scales } if j + S::N <= width => S::mul(level(), S::load(scales.add(j))),
                    Meaning::NormalEach { scales } => S::mul(level(), S::load_part(scales.add(j), width - j)),
                }
            };
            let mut j = 0;
            while j + S::N <= width {
                S::store(to.add(j), value(S::words(at.add(j)), S::words(high_at.add(j)), j));
                j += S::N;
            }
            if j < width {
                let rest = width - j;
                S::store_part(to.add(j), value(S::words_part(at.add(j), rest), S::words_part(high_at.add(j), rest), j), rest);
            }
        }
    }
}

/// How codes are spread out.
#[derive(Clone, Copy)]
pub(super) enum Into<'a> {
    /// Two pairs to a quad: codes of its bytes 0 and 2, then of 1 and 3. Of codes in runs, pairs `2 q` and `2 q + 1`; of strided
    /// ones `q` and `q + 16`, so that pair `p` is of codes `p` and `p + 32`.
    Pairs,
    /// Quads of these bytes, by code.
    Quads(&'a [u8; 16]),
}

/// Quads `[from, to)` of `width` lanes from lane `lane`, spread out to `out: [..][stride]`, a pair or a quad to a word. Lanes from
/// `width` up to a whole vector are zero, or anything that code 0 stands for.
pub(super) struct Spread<'a> {
    pub(super) codes: Codes,
    pub(super) lane: usize,
    pub(super) width: usize,
    /// On borders of words; `from` is 0 for strided codes.
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) into: Into<'a>,
    pub(super) out: *mut u32,
    /// No less than `width` rounded up to 16.
    pub(super) stride: usize,
}

impl Kernel for Spread<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on.
        unsafe {
            match (self.codes.bits, self.into) {
                (8, _) => self.pairs::<S, 8>(),
                (4, Into::Pairs) => self.pairs::<S, 4>(),
                (3, Into::Pairs) => self.pairs::<S, 3>(),
                (_, Into::Pairs) => self.pairs::<S, 2>(),
                (4, Into::Quads(table)) => self.quads::<S, 4>(table),
                (3, Into::Quads(table)) => self.quads::<S, 3>(table),
                (_, Into::Quads(table)) => self.quads::<S, 2>(table),
            }
        }
    }
}

impl Spread<'_> {
    /// Words of the tile in lanes from `lane`.
    #[inline(always)]
    unsafe fn read<S: Lanes>(&self, word: usize, j: usize) -> S::W {
        // SAFETY: the word is in the tile, and no lane beyond `width` is read.
        unsafe {
            let p = self.codes.words.add(word * self.codes.lanes + self.lane + j);
            if j + S::N <= self.width { S::words(p) } else { S::words_part(p, self.width - j) }
        }
    }

    #[inline(always)]
    unsafe fn pairs<S: Lanes, const BITS: u32>(self) {
        let low = if BITS == 3 { 2 } else { BITS };
        let per = 8 / low as usize;
        let mask = if BITS == 3 { 0x0003_0003 } else { ((1u32 << BITS) - 1) * 0x0001_0001 };
        let (quad_step, byte_step) = match self.codes.order {
            Order::Runs => (2, 1),
            Order::Strided => (1, 16),
        };
        // SAFETY: words of the tile are read in its lanes; `out` has `stride` words for each pair.
        unsafe {
            for word in self.from / per..self.to / per {
                let mut j = 0;
                while j < self.width {
                    let codes = self.read::<S>(word, j);
                    let thirds = if BITS == 3 { self.read::<S>(self.codes.n.div_ceil(4).div_ceil(4) + word / 2, j) } else { codes };
                    for k in 0..per {
                        let quad = word * per + k - self.from;
                        for byte in 0..2 {
                            let pair = S::field(codes, 8 * byte + low * k as u32, mask);
                            let pair = match BITS {
                                3 => S::or_shifted::<2>(pair, S::field(thirds, 8 * byte + 4 * (word as u32 % 2) + k as u32, 0x0001_0001)),
                                _ => pair,
                            };
                            S::store_words(self.out.add((quad * quad_step + byte as usize * byte_step) * self.stride + j), pair);
                        }
                    }
                    j += S::N;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn quads<S: Lanes, const BITS: u32>(self, table: &[u8; 16]) {
        let low = if BITS == 3 { 2 } else { BITS };
        let per = 8 / low as usize;
        let mask = if BITS == 3 { 0x0303_0303 } else { ((1u32 << BITS) - 1) * 0x0101_0101 };
        // SAFETY: as above, with a word for each quad.
        unsafe {
            let table = S::table(table);
            for word in self.from / per..self.to / per {
                let mut j = 0;
                while j < self.width {
                    let codes = self.read::<S>(word, j);
                    let thirds = if BITS == 3 { self.read::<S>(self.codes.n.div_ceil(4).div_ceil(4) + word / 2, j) } else { codes };
                    for k in 0..per {
                        let quad = S::field(codes, low * k as u32, mask);
                        let quad = match BITS {
                            3 => S::or_shifted::<2>(quad, S::field(thirds, 4 * (word as u32 % 2) + k as u32, 0x0101_0101)),
                            _ => quad,
                        };
                        let at = self.out.add((word * per + k - self.from) * self.stride + j);
                        S::store_words(at, S::lookup(table, quad));
                    }
                    j += S::N;
                }
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

/// [`PairProduct`] of quads: `out[r][j] (+)= sum over t < n of a[r][t] . b[t * b_step + j]`, four products of bytes to a word. The
/// columns are the unsigned side, or the weights are where `WEIGHTS`.
#[derive(Clone, Copy)]
pub(super) struct QuadProduct<const R: usize, const WEIGHTS: bool> {
    pub(super) a: [*const u32; R],
    pub(super) b: *const u32,
    pub(super) b_step: usize,
    pub(super) n: usize,
    pub(super) out: [*mut u32; R],
    pub(super) width: usize,
    pub(super) accumulate: bool,
}

impl<const R: usize, const WEIGHTS: bool> Kernel for QuadProduct<R, WEIGHTS> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let mut j = 0;
        // SAFETY: as promised by the fields.
        unsafe {
            while j + 4 * S::N <= self.width.next_multiple_of(S::N) {
                self.block::<S, 4>(j);
                j += 4 * S::N;
            }
            if j + 2 * S::N <= self.width.next_multiple_of(S::N) {
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

impl<const R: usize, const WEIGHTS: bool> QuadProduct<R, WEIGHTS> {
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
                        acc[r][c] = if WEIGHTS { S::dot8(acc[r][c], a, column[c]) } else { S::dot8(acc[r][c], column[c], a) };
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
