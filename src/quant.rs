//! The codec of latents: asymmetric quantisation of a group of numbers to a few bits, and codes to words.
//!
//! A group shares a step `scale = (max - min) / (2^bits - 1)` and an offset `min`, both kept as f16 and not clamped
//! to the codes' range, so that a group far from zero keeps its offset. Codes are chosen against the *rounded* scale
//! and offset, since those are what the reader has.
//!
//! **Words.** Attention sums over one axis of a tile of codes and has lanes along the other. A lane's codes `0..n` along the
//! summed axis fill 32-bit words of its own; the same word of all lanes lies side by side, `[words][lanes]`, so that a vector
//! load takes one word of neighbouring lanes. Four codes make a quad, one to a byte of a word, so that one shift and one mask
//! give what an integer dot product of bytes takes, and its halves what one of 16 bits takes:
//!
//! ```text
//! 2, 4, 8 bits   8 / bits quads to a word: byte b of quad q in word q / (8 / bits), at bit 8 b + bits (q % (8 / bits))
//! 3 bits         the low two bits as above; then the third bits, 8 quads to a word: byte b of quad q in word
//!                words(n, 2) + q / 8, at bit 8 b + q % 8
//!
//! runs           code i is byte i % 4 of quad i / 4         (keys: channels)
//! strided        code i is byte i / 16 of quad i % 16       (values: the 64 positions of a page, so that 16 neighbouring
//!                                                           weights fill a byte of 16 words)
//! ```
//!
//! Places of a last word beyond code `n` are zero.
//!
//! **Normal latents.** A rotation ([`Rotation`]) makes the elements of a vector look like draws of one normal distribution, for which
//! the best step between levels is known (Max 1960; compare the MSE form of TurboQuant, arXiv 2504.19874). So one f16 scale, the vector's
//! standard deviation as its levels give it back best, serves all elements, and [`levels`] are whole numbers, that integer products
//! take them as they are.

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

/// The numbers that codes of 2, 3 or 4 bits stand for, rising, and what a standard deviation is in them: levels at even steps, of the
/// step that has the least squared error for a normal distribution (Max 1960, table II).
///
/// Levels of any distance (Lloyd 1982) have 1 % less of that error at 2 bits, 8 % at 3 and 18 % at 4, that is 0.84 decibels. They cost a
/// reader a look-up where these are the codes themselves, less half of the largest: a matrix unit takes such codes with one
/// mask and no arithmetic, which is most of what attention over sealed pages does beside its products.
///
/// # Panics
/// For other bits.
pub const fn levels(bits: u32) -> (&'static [i8], f32) {
    match bits {
        2 => (&[-3, -1, 1, 3], 2.0087),
        3 => (&[-7, -5, -3, -1, 1, 3, 5, 7], 3.4129),
        4 => (&[-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15], 5.9666),
        _ => panic!("levels are of 2, 3 or 4 bits"),
    }
}

/// Quantises `x` to codes of `bits` (2, 3 or 4) among [`levels`], and gives the standard deviation: code `c` stands for
/// `deviation * level[c] / unit`.
///
/// The deviation is first the root of the mean square, then what gives `x` back best from the codes that gave; codes are
/// the nearest under that, rounded to f16. All codes are of the level next below zero where `x` is zero.
///
/// # Panics
/// When `codes` has another length than `x`.
pub fn quantise_normal(x: &[f32], bits: u32, codes: &mut [u8]) -> f16 {
    assert_eq!(x.len(), codes.len(), "one code per element");
    let (levels, unit) = levels(bits);
    let half = (levels.len() / 2) as f32;
    // Boundaries are the even numbers; an element on one goes down. What is no number is the lowest code.
    let choose = |codes: &mut [u8], by: f32| {
        codes.iter_mut().zip(x).for_each(|(code, &v)| *code = ((0.5 * (v * by)).ceil().max(1.0 - half).min(half) + (half - 1.0)) as u8);
    };
    let square = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len().max(1) as f64;
    if square == 0.0 {
        choose(codes, 0.0);
        return f16::ZERO;
    }
    choose(codes, (f64::from(unit) / square.sqrt()) as f32);
    let (mut xl, mut ll) = (0.0f64, 0.0f64);
    for (&code, &v) in codes.iter().zip(x) {
        let level = f64::from(levels[code as usize]);
        (xl, ll) = (xl + f64::from(v) * level, ll + level * level);
    }
    let best = if ll > 0.0 { xl / ll } else { 0.0 };
    let deviation = to_f16((best * f64::from(unit)) as f32);
    if deviation > f16::ZERO {
        choose(codes, unit / deviation.to_f32());
    }
    deviation
}

/// An orthonormal matrix of any size whose products spread every element over all others: the Kronecker product of a Hartley
/// transform, of the odd part `m` of the size, and a Hadamard matrix, of the power of two `h` in it, after signs.
///
/// With element `i` written `i = a h + b`, `b < h`:
///
/// ```text
/// y[a' h + b'] = sum over a, b of  cas(2 pi a a' / m) / sqrt(m)  *  (-1)^ones(b & b') / sqrt(h)  *  sign(i) x[a h + b]
/// cas(t) = cos t + sin t;  sign(i) is negative where the product of i + 1 with 0x9E3779B1, modulo 2^32, has an odd number of ones
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    n: usize,
    hadamard: usize,
    /// `[m][m]`, with the scale of both parts.
    hartley: Vec<f32>,
    signs: Vec<f32>,
}

impl Rotation {
    /// Of vectors of `n` elements.
    pub fn new(n: usize) -> Self {
        let hadamard = 1 << n.max(1).trailing_zeros();
        let m = n / hadamard;
        let scale = 1.0 / (n.max(1) as f64).sqrt();
        let cas = |i: usize| {
            let t = std::f64::consts::TAU * ((i / m.max(1) * (i % m.max(1))) % m.max(1)) as f64 / m.max(1) as f64;
            ((t.cos() + t.sin()) * scale) as f32
        };
        let sign = |i: usize| if (i as u32 + 1).wrapping_mul(0x9E37_79B1).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
        Rotation { n, hadamard, hartley: (0..m * m).map(cas).collect(), signs: (0..n).map(sign).collect() }
    }

    /// Elements of its vectors.
    pub fn size(&self) -> usize {
        self.n
    }

    /// Turns a vector back.
    ///
    /// # Panics
    /// Where `x` is not of this size.
    pub fn undo(&self, x: &mut [f32]) {
        // Both parts are symmetric and their own inverses; signs came first and go last.
        x.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
        self.apply(x, 1);
        x.iter_mut().zip(&self.signs).for_each(|(x, sign)| *x *= sign);
    }

    /// Turns the vectors in the columns of `x: [n][lanes]`.
    ///
    /// Cost: `log2(h) + 2 m` operations an element.
    ///
    /// # Panics
    /// Where `x` is not that long.
    pub fn apply(&self, x: &mut [f32], lanes: usize) {
        self.apply_in(x, lanes, &mut vec![0.0; x.len()]);
    }

    /// As [`Rotation::apply`], in memory that is as long as `x`.
    ///
    /// # Panics
    /// As it does, or where the memory is shorter.
    pub fn apply_in(&self, x: &mut [f32], lanes: usize, spare: &mut [f32]) {
        assert_eq!(x.len(), self.n * lanes, "vectors of another size");
        for (row, &sign) in x.chunks_exact_mut(lanes.max(1)).zip(&self.signs) {
            row.iter_mut().for_each(|x| *x *= sign);
        }
        let (h, m) = (self.hadamard, self.n / self.hadamard);
        let mut step = 1;
        while step < h {
            for pair in x.chunks_exact_mut(2 * step * lanes) {
                let (low, high) = pair.split_at_mut(step * lanes);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            step *= 2;
        }
        let width = h * lanes;
        if m == 1 {
            x.iter_mut().for_each(|x| *x *= self.hartley[0]);
            return;
        }
        let from = &mut spare[..x.len()];
        from.copy_from_slice(x);
        for (to, row) in x.chunks_exact_mut(width.max(1)).zip(self.hartley.chunks_exact(m.max(1))) {
            to.fill(0.0);
            for (from, &c) in from.chunks_exact(width).zip(row) {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += c * from);
            }
        }
    }
}

/// Which codes of a lane make a quad.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Four neighbours.
    Runs,
    /// Of 64 codes, four at a distance of 16.
    Strided,
}

impl Order {
    /// Quad and byte of code `i`.
    #[inline(always)]
    pub const fn quad(self, i: usize) -> (usize, usize) {
        match self {
            Order::Runs => (i / 4, i % 4),
            Order::Strided => (i % 16, i / 16),
        }
    }
}

/// Words that the `n` codes of a lane fill; `n` is 64 where they are strided.
pub const fn words(n: usize, bits: u32) -> usize {
    let quads = n.div_ceil(4);
    match bits {
        3 => quads.div_ceil(4) + quads.div_ceil(8),
        _ => (quads * bits as usize).div_ceil(8),
    }
}

/// Where a code, or a part of it, stands among the words of its lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub word: usize,
    pub shift: u32,
}

/// The place of a byte of a quad, of codes of 2, 4 or 8 bits; of 3 bits, that of its low two.
#[inline(always)]
pub const fn place((quad, byte): (usize, usize), bits: u32) -> Place {
    let bits = if bits == 3 { 2 } else { bits };
    let per = 8 / bits as usize;
    Place { word: quad / per, shift: 8 * byte as u32 + bits * (quad % per) as u32 }
}

/// The place of the third bit, of `n` codes of 3 bits.
#[inline(always)]
pub const fn third((quad, byte): (usize, usize), n: usize) -> Place {
    Place { word: n.div_ceil(4).div_ceil(4) + quad / 8, shift: (8 * byte + quad % 8) as u32 }
}

/// Writes code `i` of `n` of each of `codes.len()` lanes into `words: [words(n, bits)][lanes]`, whose places for it are zero.
///
/// # Panics
/// When the words are too few, or `bits` not 2, 3, 4 or 8.
pub fn put(words: &mut [u32], (n, bits, order): (usize, u32, Order), i: usize, codes: &[u8]) {
    for (lane, &code) in codes.iter().enumerate() {
        put_one(words, (n, bits, order), i, (codes.len(), lane), code);
    }
}

/// Writes code `i` of `n` of one of `lanes` lanes, whose places for it are zero.
///
/// # Panics
/// As [`put`].
#[inline]
pub fn put_one(words: &mut [u32], (n, bits, order): (usize, u32, Order), i: usize, (lanes, lane): (usize, usize), code: u8) {
    assert!(matches!(bits, 2 | 3 | 4 | 8), "codes of {bits} bits");
    let quad = order.quad(i);
    let low = place(quad, bits);
    let mask = if bits == 3 { 3 } else { (1 << bits) - 1 };
    words[low.word * lanes + lane] |= (u32::from(code) & mask) << low.shift;
    if bits == 3 {
        let high = third(quad, n);
        words[high.word * lanes + lane] |= u32::from(code >> 2 & 1) << high.shift;
    }
}

/// Reads what [`put`] wrote.
///
/// # Panics
/// As it does.
pub fn get(words: &[u32], (n, bits, order): (usize, u32, Order), i: usize, codes: &mut [u8]) {
    assert!(matches!(bits, 2 | 3 | 4 | 8), "codes of {bits} bits");
    let lanes = codes.len();
    let quad = order.quad(i);
    let low = place(quad, bits);
    let mask = if bits == 3 { 3 } else { (1 << bits) - 1 };
    for (lane, code) in codes.iter_mut().enumerate() {
        *code = (words[low.word * lanes + lane] >> low.shift & mask) as u8;
        if bits == 3 {
            let high = third(quad, n);
            *code |= ((words[high.word * lanes + lane] >> high.shift & 1) << 2) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_as_documented() {
        use Order::{Runs, Strided};
        let at = |i: usize, code: u8| (0..64).map(|j| if j == i { code } else { 0 }).collect::<Vec<u8>>();
        for (bits, order, codes, want) in [
            (8, Runs, vec![1u8, 2, 3, 200, 5], vec![(0, 0xc803_0201u32), (1, 5)]),
            (4, Runs, vec![1, 2, 3, 4, 5, 6, 7, 15, 9], vec![(0, 0xf473_6251), (1, 9)]),
            // Quads 0 and 3 of one word.
            (2, Runs, vec![1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3], vec![(0, 0x0003_02c1)]),
            // The low bits of codes 0 and 1 are 3 and 1; the third bits of code 0, and of code 17: byte 1 of quad 4.
            (3, Runs, vec![7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4], vec![(0, 0x0103), (2, 0x1001)]),
            // Code 18 is byte 1 of quad 2: at 4 bits in word 1, low; at 2 bits in word 0, third; its third bit in word 4.
            (4, Strided, at(18, 9), vec![(1, 0x0900)]),
            (2, Strided, at(18, 3), vec![(0, 0x3000)]),
            (3, Strided, at(18, 5), vec![(0, 0x1000), (4, 0x0400)]),
        ] {
            let mut out = vec![0; words(codes.len(), bits)];
            for (i, &code) in codes.iter().enumerate() {
                put(&mut out, (codes.len(), bits, order), i, &[code]);
            }
            let found: Vec<(usize, u32)> = out.iter().copied().enumerate().filter(|(_, w)| *w != 0).collect();
            assert_eq!(found, want, "{bits} bits, {order:?}: {out:x?}");
        }
    }

    #[test]
    fn codes_of_any_number_read_back_in_their_lanes() {
        for bits in [2, 3, 4, 8] {
            for (n, order) in [1, 2, 7, 8, 15, 16, 17, 33, 64, 100].map(|n| (n, Order::Runs)).into_iter().chain([(64, Order::Strided)]) {
                let code = |i: usize, lane: usize| ((i * 37 + lane * 11 + i / 7) & ((1 << bits) - 1)) as u8;
                let mut all = vec![0; words(n, bits) * 3];
                for i in 0..n {
                    put(&mut all, (n, bits, order), i, &[code(i, 0), code(i, 1), code(i, 2)]);
                }
                for i in 0..n {
                    let mut back = [0; 3];
                    get(&all, (n, bits, order), i, &mut back);
                    assert_eq!(back, [code(i, 0), code(i, 1), code(i, 2)], "{bits} bits, code {i} of {n}");
                }
            }
        }
    }

    #[test]
    fn a_rotation_is_orthonormal_and_spreads_one_element_over_all() {
        for n in [1usize, 2, 3, 8, 12, 15, 24, 64, 90] {
            let rotation = Rotation::new(n);
            let mut rows: Vec<f32> = (0..n * n).map(|i| f32::from(u8::from(i / n == i % n))).collect();
            rotation.apply(&mut rows, n);
            for i in 0..n {
                for j in 0..n {
                    let dot: f32 = (0..n).map(|k| rows[k * n + i] * rows[k * n + j]).sum();
                    assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-5, "size {n}: columns {i} and {j} have product {dot}");
                }
            }
            // Of an odd part, cas is at most sqrt 2 and reaches zero only where it has to.
            let top = rows.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            assert!(top <= (2.0 / n as f32).sqrt() + 1e-6, "size {n}: {top}");
            // As the formula says.
            let h = 1 << n.trailing_zeros();
            let m = n / h;
            for (to, from) in [(0, n - 1), (n / 2, n / 3), (n - 1, n - 1)] {
                let ((a, b), (c, d)) = ((from / h, from % h), (to / h, to % h));
                let t = std::f64::consts::TAU * (a * c) as f64 / m as f64;
                let sign = |odd: u32| if odd % 2 == 1 { -1.0 } else { 1.0 };
                let want = (t.cos() + t.sin()) / (n as f64).sqrt() * sign((b & d).count_ones());
                let want = want * sign(((from as u64 + 1) * 0x9E37_79B1 % (1 << 32)).count_ones());
                assert!((f64::from(rows[to * n + from]) - want).abs() < 1e-5, "size {n}: {to} of {from}");
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
