//! The codec of latents: asymmetric quantisation of a group of numbers to a few bits, and codes to bytes.
//!
//! A group shares a step `scale = (max - min) / (2^bits - 1)` and an offset `min`, both kept as f16 and not clamped
//! to the codes' range, so that a group far from zero keeps its offset. Codes are chosen against the *rounded* scale
//! and offset, since those are what the reader has. A stream of codes is little-endian: bit `j` of code `i`
//! is bit `i * bits + j` of the stream.

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

/// Bytes of `n` codes.
pub const fn packed_len(n: usize, bits: u32) -> usize {
    (n * bits as usize).div_ceil(8)
}

/// Writes `codes` as a stream; the unused high bits of the last byte are zero.
///
/// # Panics
/// When `out` is not of [`packed_len`], or `bits` not of 1 to 8.
pub fn pack(codes: &[u8], bits: u32, out: &mut [u8]) {
    assert!((1..=8).contains(&bits), "codes of {bits} bits");
    assert_eq!(out.len(), packed_len(codes.len(), bits), "a stream of another length");
    let (mut buffer, mut have) = (0u32, 0);
    let mut to = out.iter_mut();
    for &code in codes {
        buffer |= u32::from(code) << have;
        have += bits;
        if have >= 8 {
            // There is a byte for every eight bits: the length was checked.
            if let Some(byte) = to.next() {
                *byte = buffer as u8;
            }
            buffer >>= 8;
            have -= 8;
        }
    }
    if let Some(byte) = to.next() {
        *byte = buffer as u8;
    }
}

/// Reads `out.len()` codes of a stream, from code `first`.
///
/// # Panics
/// When the stream is too short, or `bits` not of 1 to 8.
#[inline(always)]
pub fn unpack(stream: &[u8], bits: u32, first: usize, out: &mut [u8]) {
    assert!((1..=8).contains(&bits), "codes of {bits} bits");
    let start = first * bits as usize;
    let stream = &stream[start / 8..packed_len(first + out.len(), bits)];
    let skip = (start % 8) as u32;
    if skip == 0 && bits == 8 {
        return out.copy_from_slice(stream);
    }
    if skip == 0 && bits == 4 {
        for (pair, &byte) in out.chunks_mut(2).zip(stream) {
            pair[0] = byte & 15;
            if let Some(high) = pair.get_mut(1) {
                *high = byte >> 4;
            }
        }
        return;
    }
    let mask = (1u32 << bits) - 1;
    let mut from = stream.iter();
    let (mut buffer, mut have) = (0u32, 0);
    if let Some(&byte) = from.next() {
        (buffer, have) = (u32::from(byte) >> skip, 8 - skip);
    }
    for code in out {
        while have < bits {
            // The slice ends with the last code's byte, so there is one.
            buffer |= u32::from(from.next().copied().unwrap_or(0)) << have;
            have += 8;
        }
        *code = (buffer & mask) as u8;
        buffer >>= bits;
        have -= bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_little_endian() {
        for (bits, codes, want) in [
            (8, &[1u8, 200][..], &[1u8, 200][..]),
            (4, &[1, 2, 15], &[0x21, 0x0f]),
            (3, &[1, 2, 3, 4, 5, 6, 7, 0], &[0b1101_0001, 0b0101_1000, 0b0001_1111]),
            (3, &[7], &[7]),
            (2, &[0, 1, 2, 3, 1], &[0b11100100, 1]),
        ] {
            let mut out = vec![0xff; packed_len(codes.len(), bits)];
            pack(codes, bits, &mut out);
            assert_eq!(out, want, "{bits} bits");
        }
    }

    #[test]
    fn any_part_of_a_stream_reads_back() {
        for bits in 1..=8 {
            let codes: Vec<u8> = (0..131u32).map(|i| ((i * 37 + i / 7) & ((1 << bits) - 1)) as u8).collect();
            for n in [0, 1, 2, 7, 8, 9, 64, 131] {
                let mut stream = vec![0; packed_len(n, bits)];
                pack(&codes[..n], bits, &mut stream);
                for first in 0..n {
                    let mut back = vec![0; n - first];
                    unpack(&stream, bits, first, &mut back);
                    assert_eq!(back, codes[first..n], "{bits} bits, {n} codes from {first}");
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
