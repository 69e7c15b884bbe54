//! The codec of latents: asymmetric quantisation of a group of numbers to a few bits, and codes to words.
//!
//! A group shares a step `scale = (max - min) / (2^bits - 1)` and an offset `min`, both kept as f16 and not clamped
//! to the codes' range, so that a group far from zero keeps its offset. Codes are chosen against the *rounded* scale
//! and offset, since those are what the reader has.
//!
//! **Words.** Attention sums over one axis of a tile of codes and has lanes along the other. A lane's codes `0..n` along the
//! summed axis fill 32-bit words of its own; the same word of all lanes lies side by side, `[words][lanes]`, so that a vector
//! load takes one word of neighbouring lanes. Codes `j` and `j + half` of a word stand at the same place of its two 16-bit halves,
//! so that one shift and one mask give a pair for an integer dot product:
//!
//! ```text
//! 2, 4, 8 bits   per = 32 / bits codes to a word, little-endian: code i in word i / per, at bit bits (i % per); half = per / 2
//! 3 bits         the low two bits as above, in words(n, 2) words; then the third bits, 32 codes to a word, so that they pair
//!                up as the low bits do:
//!                code i in word i / 32 of these, at bit 16 (i % 16 / 8) + 8 (i / 16 % 2) + i % 8
//! ```
//!
//! Places of a last word beyond code `n` are zero.

use half::f16;

/// What a group of codes shares, in the order it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Scale {
    pub scale: f16,
    pub min: f16,
}

impl Scale {
    /// The number `code` stands for.
    #[inline(always)]
    pub fn value(self, code: u8) -> f32 {
        self.min.to_f32() + f32::from(code) * self.scale.to_f32()
    }
}

/// `x` as f16, with what f16 cannot hold clamped to its largest finite value; NaN stays NaN.
pub fn to_f16(x: f32) -> f16 {
    // Half a step above the largest finite value still rounds to infinity, hence the clamp before rounding.
    f16::from_f32(x.clamp(-65504.0, 65504.0))
}

/// Quantises `x` to codes of `bits` (1 to 8), one per element. An empty group gives zeros.
///
/// The code is `round((x - min) / scale)`, halves to even, clamped to `0..2^bits`; all zero when the scale is.
///
/// # Panics
/// When `codes` has another length than `x`.
pub fn quantise_group(x: &[f32], bits: u32, codes: &mut [u8]) -> Scale {
    assert_eq!(x.len(), codes.len(), "one code per element");
    let top = ((1u32 << bits) - 1) as f32;
    let (min, max) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v)));
    if min > max {
        codes.fill(0);
        return Scale::default();
    }
    let shared = Scale { scale: to_f16((max - min) / top), min: to_f16(min) };
    let (scale, min) = (shared.scale.to_f32(), shared.min.to_f32());
    if scale == 0.0 {
        codes.fill(0);
    } else {
        for (code, &v) in codes.iter_mut().zip(x) {
            *code = ((v - min) / scale).round_ties_even().clamp(0.0, top) as u8;
        }
    }
    shared
}

/// The numbers that `codes` of one group stand for.
#[inline(always)]
pub fn dequantise(codes: &[u8], scale: Scale, out: &mut [f32]) {
    let (scale, min) = (scale.scale.to_f32(), scale.min.to_f32());
    for (x, &code) in out.iter_mut().zip(codes) {
        *x = min + f32::from(code) * scale;
    }
}

/// Words that the `n` codes of a lane fill.
pub const fn words(n: usize, bits: u32) -> usize {
    match bits {
        3 => n.div_ceil(16) + n.div_ceil(32),
        _ => (n * bits as usize).div_ceil(32),
    }
}

/// Where a code, or a part of it, stands among the words of its lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub word: usize,
    pub shift: u32,
}

/// The place of code `i` of 2, 4 or 8 bits; of 3 bits, that of its low two.
#[inline(always)]
pub const fn place(i: usize, bits: u32) -> Place {
    let bits = if bits == 3 { 2 } else { bits };
    let per = 32 / bits as usize;
    Place { word: i / per, shift: bits * (i % per) as u32 }
}

/// The place of the third bit of code `i` of `n` codes of 3 bits.
#[inline(always)]
pub const fn third(i: usize, n: usize) -> Place {
    Place { word: n.div_ceil(16) + i / 32, shift: (16 * (i % 16 / 8) + 8 * (i / 16 % 2) + i % 8) as u32 }
}

/// Writes code `i` of `n` of each of `codes.len()` lanes into `words: [words(n, bits)][lanes]`, whose places for it are zero.
///
/// # Panics
/// When the words are too few, or `bits` not 2, 3, 4 or 8.
pub fn put(words: &mut [u32], n: usize, bits: u32, i: usize, codes: &[u8]) {
    assert!(matches!(bits, 2 | 3 | 4 | 8), "codes of {bits} bits");
    let mut set = |Place { word, shift }: Place, down: u32, mask: u32| {
        for (to, &code) in words[word * codes.len()..][..codes.len()].iter_mut().zip(codes) {
            *to |= (u32::from(code) >> down & mask) << shift;
        }
    };
    if bits == 3 {
        set(place(i, 2), 0, 3);
        set(third(i, n), 2, 1);
    } else {
        set(place(i, bits), 0, (1 << bits) - 1);
    }
}

/// Reads what [`put`] wrote.
///
/// # Panics
/// As it does.
pub fn get(words: &[u32], n: usize, bits: u32, i: usize, codes: &mut [u8]) {
    assert!(matches!(bits, 2 | 3 | 4 | 8), "codes of {bits} bits");
    let lanes = codes.len();
    let low = place(i, bits);
    let mask = if bits == 3 { 3 } else { (1 << bits) - 1 };
    for (lane, code) in codes.iter_mut().enumerate() {
        *code = (words[low.word * lanes + lane] >> low.shift & mask) as u8;
        if bits == 3 {
            let high = third(i, n);
            *code |= ((words[high.word * lanes + lane] >> high.shift & 1) << 2) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_as_documented() {
        for (bits, codes, want) in [
            (8, &[1u8, 2, 3, 200, 5][..], &[0xc803_0201, 5][..]),
            (4, &[1, 2, 3, 4, 5, 6, 7, 15, 9], &[0xf765_4321, 9]),
            (2, &[1, 2, 3, 0, 0, 0, 0, 1, 3], &[0x0003_4039]),
            // Low bits 3, 1; third bits 1 (code 0), 0 (code 1), then 1 of code 17 at bit 8 + 1.
            (3, &[7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4], &[0b0111, 0, 0x0201]),
        ] {
            let mut out = vec![0; words(codes.len(), bits)];
            for (i, &code) in codes.iter().enumerate() {
                put(&mut out, codes.len(), bits, i, &[code]);
            }
            assert_eq!(out, want, "{bits} bits: {out:x?}");
        }
    }

    #[test]
    fn codes_of_any_number_read_back_in_their_lanes_and_pair_up() {
        for bits in [2, 3, 4, 8] {
            for n in [1, 2, 7, 8, 15, 16, 17, 33, 64, 100] {
                let code = |i: usize, lane: usize| ((i * 37 + lane * 11 + i / 7) & ((1 << bits) - 1)) as u8;
                let mut all = vec![0; words(n, bits) * 3];
                for i in 0..n {
                    put(&mut all, n, bits, i, &[code(i, 0), code(i, 1), code(i, 2)]);
                }
                for i in 0..n {
                    let mut back = [0; 3];
                    get(&all, n, bits, i, &mut back);
                    assert_eq!(back, [code(i, 0), code(i, 1), code(i, 2)], "{bits} bits, code {i} of {n}");
                }
                // The two halves of a word hold codes `half` apart, and so do those of the third bits.
                let (per, low) = (32 / if bits == 3 { 2 } else { bits as usize }, if bits == 3 { 2 } else { bits });
                for i in (0..n).filter(|i| i % per < per / 2 && i + per / 2 < n) {
                    let (a, b) = (place(i, low), place(i + per / 2, low));
                    assert_eq!((a.word, a.shift + 16), (b.word, b.shift));
                    let (a, b) = (third(i, n), third(i + 8, n));
                    assert!(bits != 3 || (a.word, a.shift + 16) == (b.word, b.shift));
                }
            }
        }
    }

    #[test]
    fn groups_keep_their_offset_and_ends() {
        let row = |x: &[f32], bits| {
            let mut codes = vec![9; x.len()];
            let s = quantise_group(x, bits, &mut codes);
            (s.scale.to_f32(), s.min.to_f32(), codes)
        };
        assert_eq!(row(&[10.0, 11.0, 12.0, 13.0], 2), (1.0, 10.0, vec![0, 1, 2, 3]));
        assert_eq!(row(&[-3.0, 0.0, 12.0], 4), (1.0, -3.0, vec![0, 3, 15]));
        assert_eq!(row(&[5.0, 5.0], 4), (0.0, 5.0, vec![0, 0]));
        assert_eq!(row(&[], 4), (0.0, 0.0, vec![]));
        // Beyond f16: the ends are clamped, nothing is infinite.
        assert_eq!(row(&[-1e6, 1e6], 8), (2e6f32 / 255.0, -65504.0, vec![0, 136]).map_scale());
    }

    trait MapScale {
        fn map_scale(self) -> Self;
    }
    impl MapScale for (f32, f32, Vec<u8>) {
        /// The scale as f16 keeps it.
        fn map_scale(self) -> Self {
            (f16::from_f32(self.0).to_f32(), self.1, self.2)
        }
    }
}
