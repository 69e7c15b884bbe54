//! Codes in words (`quant`) as attention reads them: to numbers, or straight into integer dot products.
//!
//! A dot product takes pairs of codes, in the 16-bit halves of a word, or quads, in its bytes; the other side is as many weights, of
//! as many bits, the same for all lanes. Pairs are spread out to memory first ([`Spread`], [`PairProduct`]), quads in registers
//! ([`QuadProduct`]).

use std::ops::Range;

use super::simd::{Kernel, Lanes};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::Arena;
use crate::kv::layout::SealedLayer;
use crate::quant::{Order, levels, place, third, words};

const P: usize = PAGE_TOKENS as usize;

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
    /// Quads of a word.
    pub(super) const fn quads_of_word(&self) -> usize {
        8 / low(self.bits) as usize
    }

    /// Quads of a lane, those beyond its last code in a last word included.
    pub(super) const fn quads(&self) -> usize {
        words(self.n, low(self.bits)) * self.quads_of_word()
    }

    /// Pairs of a lane, two to a quad.
    pub(super) const fn pairs(&self) -> usize {
        2 * self.quads()
    }
}

/// Key codes of a sealed page, below 16 bits.
pub(super) fn key_codes(arena: &Arena, page: PageAddr, layer: &SealedLayer) -> Codes {
    let keys = &layer.keys;
    let words = arena.slice::<u32>(page, keys.codes, keys.key_code_bytes() / 4).as_ptr();
    Codes { words, lanes: P, n: keys.rank, bits: keys.bits, order: Order::Runs }
}

/// Value codes of a sealed page, below 16 bits.
pub(super) fn value_codes(arena: &Arena, page: PageAddr, layer: &SealedLayer) -> Codes {
    let values = &layer.values;
    let words = arena.slice::<u32>(page, values.codes, values.value_code_bytes() / 4).as_ptr();
    Codes { words, lanes: values.rank, n: P, bits: values.bits, order: Order::Strided }
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

/// Pairs of quads `[from, to)` of `width` lanes from lane `lane`, spread out to `out: [..][stride]`, a pair to a word. Lanes from
/// `width` up to a whole vector are zero.
///
/// A quad is two pairs: codes of its bytes 0 and 2, then of 1 and 3. Of codes in runs they are pairs `2 q` and `2 q + 1`; of strided
/// ones `q` and `q + 16`, so that pair `p` is of codes `p` and `p + 32`.
pub(super) struct Spread {
    pub(super) codes: Codes,
    pub(super) lane: usize,
    pub(super) width: usize,
    /// On borders of words; `from` is 0 for strided codes.
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) out: *mut u32,
    /// No less than `width` rounded up to 16.
    pub(super) stride: usize,
    /// Distance in bytes to the codes of the page that is met next, to be fetched meanwhile; zero for none.
    pub(super) ahead: isize,
}

impl Kernel for Spread {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on.
        unsafe {
            match self.codes.bits {
                8 => self.words::<S, 8>(),
                4 => self.words::<S, 4>(),
                3 => self.words::<S, 3>(),
                _ => self.words::<S, 2>(),
            }
        }
    }
}

impl Spread {
    #[inline(always)]
    unsafe fn words<S: Lanes, const BITS: u32>(self) {
        // Stores below cannot change what is in locals.
        let Spread { codes: Codes { words: first, lanes, n, order, .. }, lane, width, from, to: end, out, stride, ahead } = self;
        let per = 8 / low(BITS) as usize;
        let first = first.wrapping_add(lane);
        let mut at = first.wrapping_add(from / per * lanes);
        let thirds = first.wrapping_add(words(n, 2) * lanes);
        // Of codes in runs, what is stored follows in the order of quads; of strided ones, quads do.
        let (quad_step, byte_step) = match order {
            Order::Runs => (2 * stride, stride),
            Order::Strided => (stride, 16 * stride),
        };
        let mut out = out;
        // SAFETY: words of the tile are read in lanes that it has; `out` has `stride` words for each pair, no fewer than lanes that
        // are met.
        unsafe {
            for word in from / per..end / per {
                let third = if BITS == 3 { thirds.wrapping_add(word / 2 * lanes) } else { at };
                let mut j = 0;
                while j < width {
                    if ahead != 0 {
                        S::prefetch(at.wrapping_add(j).cast::<u8>().wrapping_offset(ahead));
                    }
                    let (codes, third) = (vector::<S>(at.wrapping_add(j), width - j), vector::<S>(third.wrapping_add(j), width - j));
                    for k in 0..per {
                        let quad = quad::<S, BITS>([codes, third], word, k);
                        let out = out.wrapping_add(j + k.wrapping_mul(quad_step));
                        S::store_words(out, S::field(quad, 0, 0x00ff_00ff));
                        S::store_words(out.wrapping_add(byte_step), S::field(quad, 8, 0x00ff_00ff));
                    }
                    j += S::N;
                }
                (at, out) = (at.wrapping_add(lanes), out.wrapping_add(per.wrapping_mul(quad_step)));
            }
        }
    }
}

/// Words of the next lanes, zero beyond `left` of them.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn vector<S: Lanes>(at: *const u32, left: usize) -> S::W {
    // SAFETY: passed on.
    unsafe { if left >= S::N { S::words(at) } else { S::words_part(at, left) } }
}

/// Bits of a word that holds the low bits, or all.
const fn low(bits: u32) -> u32 {
    if bits == 3 { 2 } else { bits }
}

/// Codes of quad `k` of a word, a byte each, of a vector of lanes; with the word of their third bits.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn quad<S: Lanes, const BITS: u32>([codes, third]: [S::W; 2], word: usize, k: usize) -> S::W {
    let mask = ((1u32 << low(BITS)) - 1) * 0x0101_0101;
    // SAFETY: passed on.
    unsafe {
        let code = S::field(codes, low(BITS) * k as u32, mask);
        if BITS == 3 { S::or_shifted::<2>(code, S::field(third, 4 * (word as u32 % 2) + k as u32, 0x0101_0101)) } else { code }
    }
}

/// `sums[r][j] = before[r][j] + sum over t < n of a[r][t] . b[t * b_step + j]` over pairs of 16 bits, exact in 32, for `width` columns in
/// whole vectors.
#[derive(Clone, Copy)]
pub(super) struct PairProduct<const R: usize> {
    pub(super) a: [*const u32; R],
    pub(super) b: *const u32,
    pub(super) b_step: usize,
    pub(super) n: usize,
    pub(super) width: usize,
    pub(super) sums: [*mut u32; R],
    /// Whether there are sums before.
    pub(super) goes_on: bool,
}

impl<const R: usize> Kernel for PairProduct<R> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: columns come in whole vectors, for which there is room.
        unsafe {
            let (mut j, end) = (0, self.width.next_multiple_of(S::N));
            while j + 4 * S::N <= end {
                self.block::<S, 4>(j);
                j += 4 * S::N;
            }
            if j + 2 * S::N <= end {
                self.block::<S, 2>(j);
                j += 2 * S::N;
            }
            if j < end {
                self.block::<S, 1>(j);
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
            if self.goes_on {
                for r in 0..R {
                    for c in 0..C {
                        acc[r][c] = S::words(self.sums[r].wrapping_add(j + c * S::N).cast_const());
                    }
                }
            }
            let mut b = self.b.wrapping_add(j);
            for t in 0..self.n {
                let mut column = [S::words(b); C];
                for c in 1..C {
                    column[c] = S::words(b.wrapping_add(c * S::N));
                }
                for r in 0..R {
                    let a = S::splat_word(*self.a[r].wrapping_add(t));
                    for c in 0..C {
                        acc[r][c] = S::dot16(acc[r][c], column[c], a);
                    }
                }
                b = b.wrapping_add(self.b_step);
            }
            for r in 0..R {
                for c in 0..C {
                    S::store_words(self.sums[r].wrapping_add(j + c * S::N), acc[r][c]);
                }
            }
        }
    }
}

/// What becomes of the sums of a product.
pub(super) trait Take: Copy {
    /// Of row `r`, columns `j..j + N`.
    ///
    /// # Safety
    /// As for [`Lanes`]; row and columns are of the product.
    unsafe fn take<S: Lanes>(&self, r: usize, j: usize, sums: S::W);
}

/// `sums[r][j] = sum over tiles and quads of a[r][..] . byte(code of lane j)`, exact in 32 bits, for `width` lanes from `lane`.
///
/// Codes are spread out in registers, and none of them is written: what is read is a word of 16 lanes, and for each of its quads a
/// weight of every row. Per quad and 16 lanes: two or three operations to have its bytes, and a dot product a row.
pub(super) struct QuadProduct<'a, const R: usize, T> {
    /// Tiles alike but for where they lie, met one after the other.
    pub(super) tiles: &'a [Codes],
    /// Words of each tile.
    pub(super) words: Range<usize>,
    pub(super) lane: usize,
    pub(super) width: usize,
    /// Weights of the quads of these words, tile after tile.
    pub(super) a: [*const u32; R],
    pub(super) bytes: Bytes,
    pub(super) take: T,
    /// Of each tile, the distance in bytes from a word to what is to be fetched meanwhile; zero for nothing.
    pub(super) ahead: &'a [isize],
}

/// The byte that a code stands for in a [`QuadProduct`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bytes {
    /// Its level and 128; weights are signed.
    Unsigned,
    /// Its level; weights are unsigned.
    Signed,
}

impl<const R: usize, T: Take> Kernel for QuadProduct<'_, R, T> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Some(Codes { bits, .. }) = self.tiles.first() else { return };
        // SAFETY: passed on.
        unsafe {
            match (bits, self.bytes) {
                (4, Bytes::Unsigned) => self.columns::<S, 4, true>(),
                (3, Bytes::Unsigned) => self.columns::<S, 3, true>(),
                (_, Bytes::Unsigned) => self.columns::<S, 2, true>(),
                (4, Bytes::Signed) => self.columns::<S, 4, false>(),
                (3, Bytes::Signed) => self.columns::<S, 3, false>(),
                (_, Bytes::Signed) => self.columns::<S, 2, false>(),
            }
        }
    }
}

impl<const R: usize, T: Take> QuadProduct<'_, R, T> {
    #[inline(always)]
    unsafe fn columns<S: Lanes, const BITS: u32, const UNSIGNED: bool>(self) {
        let mut j = 0;
        // SAFETY: passed on; blocks end within `width`, the last perhaps inside a vector.
        unsafe {
            while j + 2 * S::N <= self.width {
                self.block::<S, 2, BITS, UNSIGNED>(j);
                j += 2 * S::N;
            }
            while j < self.width {
                self.block::<S, 1, BITS, UNSIGNED>(j);
                j += S::N;
            }
        }
    }

    #[inline(always)]
    unsafe fn block<S: Lanes, const C: usize, const BITS: u32, const UNSIGNED: bool>(&self, j: usize) {
        let per = 8 / low(BITS) as usize;
        let left = self.width - j;
        // SAFETY: words of the tiles are read in lanes that they have; weights are as many as their quads.
        unsafe {
            let table = S::table(&if UNSIGNED { unsigned_levels(BITS) } else { signed_levels(BITS) });
            let mut acc = [[S::splat_word(0); C]; R];
            let mut t = 0;
            for (tile, &ahead) in self.tiles.iter().zip(self.ahead) {
                let first = tile.words.wrapping_add(self.lane + j);
                let thirds = first.wrapping_add(words(tile.n, 2) * tile.lanes);
                let mut at = first.wrapping_add(self.words.start * tile.lanes);
                for word in self.words.clone() {
                    let third = if BITS == 3 { thirds.wrapping_add(word / 2 * tile.lanes) } else { at };
                    let mut codes = [[table; 2]; C];
                    for c in 0..C {
                        let (at, third) = (at.wrapping_add(c * S::N), third.wrapping_add(c * S::N));
                        codes[c] = if C > 1 { [S::words(at), S::words(third)] } else { [vector::<S>(at, left), vector::<S>(third, left)] };
                        if ahead != 0 {
                            S::prefetch(at.cast::<u8>().wrapping_offset(ahead));
                        }
                    }
                    for k in 0..per {
                        let mut column = [table; C];
                        for c in 0..C {
                            column[c] = S::lookup(table, quad::<S, BITS>(codes[c], word, k));
                        }
                        for r in 0..R {
                            let a = S::splat_word(*self.a[r].wrapping_add(t));
                            for c in 0..C {
                                acc[r][c] = if UNSIGNED { S::dot8(acc[r][c], column[c], a) } else { S::dot8(acc[r][c], a, column[c]) };
                            }
                        }
                        t += 1;
                    }
                    at = at.wrapping_add(tile.lanes);
                }
            }
            for r in 0..R {
                for c in 0..C {
                    self.take.take::<S>(r, j + c * S::N, acc[r][c]);
                }
            }
        }
    }
}
