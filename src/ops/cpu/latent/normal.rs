//! Sealed pages by the Hadamard quantiser, met on their codes: weights of 8 bits in quads, the absorbed query's once for all pages.
//!
//! What a rotation has passed through looks normal, so that its largest element is some three or four deviations: a query rounded to 8
//! bits under one factor moves a score by less than a tenth of what the 4-bit codes of the keys moved it already. Softmax weights of a
//! group of pages are rounded under one factor too, and what rounding leaves over goes to the next position, in 16 lanes of
//! positions that begin at different remainders: no number of small weights is lost beside a large one.

use std::ops::Range;

use half::f16;

use super::super::codes::{Bytes, Codes, QuadProduct, Take, key_codes, value_codes};
use super::super::simd::{Kernel, Lanes};
use super::super::tile::Widen;
use super::{GROUP, Group, P, Room, Span, WIDTH, codes_of};
use crate::kv::layout::SealedLayer;
use crate::quant::{Order, levels};

/// An absorbed query for normal keys: weights of 8 bits, a quad to a word, and how sums are read.
///
/// ```text
/// [0, q)   signed bytes, q quads of channels in runs
/// q        f32: what is to be added to a sum, since levels are met 128 too high
/// q + 1    f32: what a sum is multiplied by, beside the deviation of its position
/// ```
pub(super) struct NormalQuery;

impl NormalQuery {
    pub(super) fn words(layer: &SealedLayer) -> usize {
        codes_of(layer).quads() + 2
    }

    /// Writes the query `a: [key_rank]` of a line.
    pub(super) fn write(layer: &SealedLayer, a: &[f32], to: &mut [u32]) {
        const TOP: f32 = 127.0;
        let quads = codes_of(layer).quads();
        let top = a.iter().fold(0.0f32, |top, x| top.max(x.abs()));
        // Below this the factor would be infinite, and the scores are nothing.
        let factor = if top > 1e-30 && top.is_finite() { TOP / top } else { 0.0 };
        let mut sum = 0i32;
        to.fill(0);
        for (i, &x) in a.iter().enumerate() {
            let weight = (x * factor).round_ties_even() as i32;
            sum += weight;
            let (quad, byte) = Order::Runs.quad(i);
            to[quad] |= u32::from(weight as i8 as u8) << (8 * byte);
        }
        to[quads] = ((-128 * sum) as f32).to_bits();
        let finite = a.iter().all(|x| x.is_finite());
        to[quads + 1] = if finite { top / TOP / levels(layer.keys.bits).1 } else { f32::NAN }.to_bits();
    }
}

/// Evaluates an expression with `$r` the greatest of the constants 8, 4, 2 and 1 that is neither beyond `$rows` nor what stays in
/// registers; and is that constant.
macro_rules! by_powers {
    ($rows:expr, $s:ty, |$r:ident| $body:expr) => {
        match $rows {
            8.. if <$s>::BYTE_ROWS >= 8 => {
                const $r: usize = 8;
                $body;
                $r
            }
            4.. => {
                const $r: usize = 4;
                $body;
                $r
            }
            2.. => {
                const $r: usize = 2;
                $body;
                $r
            }
            _ => {
                const $r: usize = 1;
                $body;
                $r
            }
        }
    };
}

/// Safety of the unsafe functions: as [`Kernel::run`] of [`Span`], with the room it made.
impl Span<'_> {
    /// Lines that meet a block of channels: all where there is but one, those of its KV head where each head is a block.
    fn lines_of(&self, block: usize) -> Range<usize> {
        let each = self.lines() / self.layer.blocks;
        block * each..(block + 1) * each
    }

    /// Scores of page `at` of the group.
    pub(super) unsafe fn score_normal<S: Lanes>(&self, room: &Room, group: &Group<'_>, at: usize, floats: usize) {
        let layer = &self.layer;
        let page = group.pages[at];
        let codes = key_codes(self.call.arena, page, layer);
        let meta = self.call.arena.slice::<f16>(page, layer.keys.meta, layer.key_meta_bytes() / 2);
        let (quads, per) = (codes.quads(), codes.quads_of_word());
        let ahead = group.distance(at);
        // SAFETY: the room has scores for each line; absorbed lines have what `NormalQuery` says.
        unsafe {
            S::enter(Widen { from: meta.as_ptr(), to: room.deviations, n: meta.len() });
            for block in 0..layer.blocks {
                let lines = self.lines_of(block);
                // Of heads that are blocks, those whose channels do not fill words share some with their neighbours, for whose
                // quads the query of another head is zero.
                let range = block * layer.keys.rank / layer.blocks / 4..((block + 1) * layer.keys.rank / layer.blocks).div_ceil(4);
                if range.is_empty() {
                    // Keys of which nothing is kept.
                    for line in lines {
                        room.scores.add(line * WIDTH + at * P).write_bytes(0, P);
                    }
                    continue;
                }
                let words = range.start / per..range.end.div_ceil(per);
                let deviations = room.deviations.add(block * P).cast_const();
                let mut line = lines.start;
                while line < lines.end {
                    let ahead = &[if line == lines.start { ahead } else { 0 }];
                    line += by_powers!(lines.end - line, S, |R| {
                        let absorbed = self.absorbed.cast::<u32>().add(line * floats);
                        let mut a = [absorbed.add(words.start * per); R];
                        for r in 0..R {
                            a[r] = a[r].add(r * floats);
                        }
                        let take = ToScores {
                            query: absorbed.add(quads).cast(),
                            stride: floats,
                            deviations,
                            scores: room.scores.add(line * WIDTH + at * P),
                        };
                        let (tiles, words, bytes) = (&[codes][..], words.clone(), Bytes::Unsigned);
                        S::enter(QuadProduct { tiles, words, lane: 0, width: P, a, bytes, take, ahead });
                    });
                }
            }
        }
    }

    /// Adds the group's weighted value latents to those of the lines.
    pub(super) unsafe fn gather_normal<S: Lanes>(&self, room: &Room, group: &Group<'_>, v: usize) {
        let (layer, arena) = (&self.layer, self.call.arena);
        let mut tiles = [Codes { words: std::ptr::null(), ..value_codes(arena, group.pages[0], layer) }; GROUP];
        let (each, ahead) = (layer.values.rank / layer.blocks, group.distances());
        // SAFETY: the room has deviations of a group for each block, and as many weights for each line as the group has quads.
        unsafe {
            for (at, (&page, tile)) in group.pages.iter().zip(&mut tiles).enumerate() {
                *tile = value_codes(arena, page, layer);
                let meta = arena.slice::<f16>(page, layer.values.meta, layer.value_meta_bytes() / 2);
                for (block, meta) in meta.chunks_exact(P).enumerate() {
                    S::enter(Widen { from: meta.as_ptr(), to: room.deviations.add(block * WIDTH + at * P), n: P });
                }
            }
            let tiles = &tiles[..group.pages.len()];
            let words = 0..P / 4 / tiles[0].quads_of_word();
            for block in 0..layer.blocks {
                let lines = self.lines_of(block);
                let deviations = room.deviations.add(block * WIDTH);
                S::enter(NormalWeights { room, lines: lines.clone(), deviations, width: group.width(), unit: levels(layer.values.bits).1 });
                let (lane, mut line) = (block * each, lines.start);
                while line < lines.end {
                    // What is met next is asked for once, evenly over the time there is.
                    let ahead = if line == lines.start { &ahead } else { &[0; GROUP] };
                    line += by_powers!(lines.end - line, S, |R| {
                        let mut a = [room.weights.add(line * WIDTH / 4).cast_const(); R];
                        for r in 0..R {
                            a[r] = a[r].add(r * WIDTH / 4);
                        }
                        let (back, scale) = (room.back.add(line).cast_const(), room.scale.add(line).cast_const());
                        let take = ToLatents { latents: room.state.o.add(line * v + lane), stride: v, width: each, back, scale };
                        let (words, bytes) = (words.clone(), Bytes::Signed);
                        S::enter(QuadProduct { tiles, words, lane, width: each, a, bytes, take, ahead });
                    });
                }
            }
        }
    }
}

/// Sums of products of a line's query to scores.
#[derive(Clone, Copy)]
struct ToScores {
    /// The tail of [`NormalQuery`] of the first line, and words from line to line.
    query: *const f32,
    stride: usize,
    deviations: *const f32,
    scores: *mut f32,
}

impl Take for ToScores {
    #[inline(always)]
    unsafe fn take<S: Lanes>(&self, r: usize, j: usize, sums: S::W) {
        // SAFETY: scores of a group for each line, two words after its query.
        unsafe {
            let query = self.query.wrapping_add(r * self.stride);
            let sum = S::add(S::word_values(sums), S::splat(*query));
            let score = S::mul(S::mul(sum, S::splat(*query.wrapping_add(1))), S::load(self.deviations.wrapping_add(j)));
            S::store(self.scores.wrapping_add(r * WIDTH + j), score);
        }
    }
}

/// Sums of products of a line's weights, added to its latents, which are scaled to the new maximum.
#[derive(Clone, Copy)]
struct ToLatents {
    /// Of the first line, and floats from line to line.
    latents: *mut f32,
    stride: usize,
    /// Latents of this product: those after them are others'.
    width: usize,
    back: *const f32,
    scale: *const f32,
}

impl Take for ToLatents {
    #[inline(always)]
    unsafe fn take<S: Lanes>(&self, r: usize, j: usize, sums: S::W) {
        let to = self.latents.wrapping_add(r * self.stride + j);
        // SAFETY: the latents of the line, no more than `width` of them.
        unsafe {
            let (back, scale) = (S::splat(*self.back.wrapping_add(r)), S::splat(*self.scale.wrapping_add(r)));
            if j + S::N <= self.width {
                S::store(to, S::fma(S::word_values(sums), back, S::mul(S::load(to), scale)));
            } else {
                let rest = self.width - j;
                S::store_part(to, S::fma(S::word_values(sums), back, S::mul(S::load_part(to, rest), scale)), rest);
            }
        }
    }
}

/// Softmax weights times the deviations of a block, in bytes, and what their products are multiplied by.
struct NormalWeights<'a> {
    room: &'a Room,
    lines: Range<usize>,
    deviations: *const f32,
    /// Positions of the group.
    width: usize,
    unit: f32,
}

/// What lanes of positions begin with: sixteenths, in no order, about zero.
const REMAINDERS: [f32; 16] = {
    let mut all = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        all[i] = ((7 * i + 3) % 16) as f32 / 16.0 - 15.0 / 32.0;
        i += 1;
    }
    all
};

impl Kernel for NormalWeights<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let NormalWeights { room: Room { scores, back, bias: factors, .. }, lines, deviations, width, unit } = self;
        // A remainder may add a half.
        const TOP: f32 = 254.0;
        // SAFETY: scores of a group for each line; what affine pages add to products is nothing here.
        unsafe {
            for line in lines.clone() {
                let from = scores.wrapping_add(line * WIDTH);
                let (mut top, mut sum) = (S::splat(0.0), S::splat(0.0));
                let mut j = 0;
                while j < width {
                    let w = S::mul(S::load(from.wrapping_add(j)), S::load(deviations.wrapping_add(j)));
                    (top, sum) = (S::max(top, w), S::add(sum, w));
                    j += S::N;
                }
                let top = S::greatest(top);
                let some = top > 1e-30 && top.is_finite();
                *factors.add(line) = if some { TOP / top } else { 0.0 };
                // A weight that is not finite makes the line so.
                *back.add(line) = if some { top / TOP / unit } else { 0.0 } + 0.0 * S::sum(sum);
            }
            let mut line = lines.start;
            while line < lines.end {
                // Lines beside each other, so that none waits for its own remainders.
                if line + 4 <= lines.end {
                    rounded::<S, 4>(self.room, line, deviations, width);
                    line += 4;
                } else {
                    rounded::<S, 1>(self.room, line, deviations, width);
                    line += 1;
                }
            }
        }
    }
}

/// Weights of `R` lines from `line` on.
///
/// # Safety
/// As for [`NormalWeights`].
#[inline(always)]
unsafe fn rounded<S: Lanes, const R: usize>(room: &Room, line: usize, deviations: *const f32, width: usize) {
    const STEP: usize = P / 4;
    // SAFETY: scores of a group for each line, and a fourth as many words of weights.
    unsafe {
        let mut factor = [S::splat(0.0); R];
        for r in 0..R {
            factor[r] = S::splat(*room.bias.add(line + r));
        }
        let mut lane = 0;
        while lane < STEP {
            let mut left = [S::load(REMAINDERS.as_ptr().wrapping_add(lane)); R];
            let mut page = 0;
            while page < width {
                let mut quads = [S::splat_word(0); R];
                for byte in 0..4 {
                    let at = page + byte * STEP + lane;
                    let deviation = S::load(deviations.wrapping_add(at));
                    for r in 0..R {
                        let weight = S::load(room.scores.wrapping_add((line + r) * WIDTH + at));
                        let exact = S::fma(S::mul(weight, deviation), factor[r], left[r]);
                        let whole = S::round(exact);
                        left[r] = S::sub(exact, whole);
                        let word = S::to_words(whole);
                        quads[r] = match byte {
                            0 => word,
                            1 => S::or_shifted::<8>(quads[r], word),
                            2 => S::or_shifted::<16>(quads[r], word),
                            _ => S::or_shifted::<24>(quads[r], word),
                        };
                    }
                }
                for r in 0..R {
                    S::store_words(room.weights.wrapping_add((line + r) * WIDTH / 4 + page / 4 + lane), quads[r]);
                }
                page += P;
            }
            lane += S::N;
        }
    }
}
