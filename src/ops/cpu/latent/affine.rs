//! Sealed pages by the affine quantiser, met on their codes: weights of 16 bits in pairs, each page with weights of its own.

use half::f16;

use super::super::codes::{PairProduct, Spread, key_codes, value_codes};
use super::super::simd::{Kernel, Lanes};
use super::super::softmax::State;
use super::super::tile::{Widen, by_rows};
use super::{CHUNK, Group, P, Room, Span, VALUE_PAIRS, WIDTH};
use crate::kv::layout::VALUE_GROUP;

/// Safety of the unsafe functions: as [`Kernel::run`] of [`Span`], with the room it made.
impl Span<'_> {
    /// Scores of page `at` of the group.
    pub(super) unsafe fn score_affine<S: Lanes>(&self, room: &Room, group: &Group<'_>, at: usize, t: usize) {
        let (lines, layer) = (self.lines(), self.layer);
        let (page, ahead) = (group.pages[at], group.distance(at));
        let codes = key_codes(self.call.arena, page, &layer);
        let (scales, minima) = self.call.arena.slice::<f16>(page, layer.keys.meta, 2 * layer.keys.rank).split_at(layer.keys.rank);
        // SAFETY: the room has `t` floats for each part, no fewer than there are pairs.
        unsafe {
            for (k, meta) in [scales, minima].into_iter().enumerate() {
                room.line.add(meta.len()).write_bytes(0, 2 * t - meta.len());
                S::enter(Widen { from: meta.as_ptr(), to: room.line, n: meta.len() });
                split(room.line, (room.key_meta[2 * k], room.key_meta[2 * k + 1]), codes.pairs());
                for part in &room.key_meta[2 * k..2 * k + 2] {
                    part.add(codes.pairs()).write_bytes(0, t - codes.pairs());
                }
            }
            // The sum of `rank` products stays within 31 bits.
            let top = (1usize << layer.keys.bits) - 1;
            let limit = (i32::MAX as usize / (top * layer.keys.rank).max(1)).min(32767) as f32;
            S::enter(KeyWeights { room, absorbed: self.absorbed, lines, t, limit });
            let pairs = codes.pairs();
            let mut from = 0;
            while from < pairs {
                let to = pairs.min(from + CHUNK);
                let (out, stride) = (room.spread, P);
                S::enter(Spread { codes, lane: 0, width: P, from: from / 2, to: to / 2, out, stride, ahead });
                let mut line = 0;
                while line < lines {
                    let rows = (lines - line).min(S::ROWS);
                    by_rows!(rows, S, |R| {
                        let (mut a, mut sums) = ([room.weights.cast_const(); R], [room.sums; R]);
                        for r in 0..R {
                            a[r] = a[r].add((line + r) * t + from);
                            sums[r] = sums[r].add((line + r) * P);
                        }
                        let b = room.spread.cast_const();
                        S::enter(PairProduct { a, b, b_step: P, n: to - from, width: P, sums, goes_on: from > 0 });
                    });
                    line += rows;
                }
                from = to;
            }
            S::enter(Scores { room, lines, scores: room.scores.add(at * P) });
        }
    }

    /// Adds the weighted value latents of page `at` of the group to those of the lines.
    pub(super) unsafe fn gather_affine<S: Lanes>(&self, room: &Room, group: &Group<'_>, at: usize, v: usize) {
        let (lines, layer, groups) = (self.lines(), self.layer, self.layer.value_groups());
        let (page, ahead) = (group.pages[at], group.distance(at));
        let codes = value_codes(self.call.arena, page, &layer);
        let meta = self.call.arena.slice::<f16>(page, layer.values.meta, 2 * groups * P);
        // SAFETY: the room has 64 floats for each group and line, and 32 pairs of 32 lanes.
        unsafe {
            S::enter(Widen { from: meta.as_ptr(), to: room.line, n: meta.len() });
            for k in 0..2 {
                for g in 0..groups {
                    let (from, to) = (room.line.add((k * groups + g) * P), room.value_meta[k].add(g * P));
                    std::ptr::copy_nonoverlapping(from, to, P);
                }
            }
            let scores = room.scores.add(at * P);
            S::enter(ValueBias { room, scores, lines, groups });
            for g in 0..groups {
                let (lane, width) = (g * VALUE_GROUP, VALUE_GROUP.min(layer.values.rank - g * VALUE_GROUP));
                let (out, stride) = (room.spread, VALUE_GROUP);
                S::enter(Spread { codes, lane, width, from: 0, to: P / 4, out, stride, ahead });
                S::enter(ValueWeights { room, scores, g, lines });
                let mut line = 0;
                while line < lines {
                    let rows = (lines - line).min(S::ROWS);
                    by_rows!(rows, S, |R| {
                        let (mut a, mut sums) = ([room.weights.cast_const(); R], [room.sums; R]);
                        for r in 0..R {
                            a[r] = a[r].add((line + r) * VALUE_PAIRS);
                            sums[r] = sums[r].add((line + r) * VALUE_GROUP);
                        }
                        let b = room.spread.cast_const();
                        S::enter(PairProduct { a, b, b_step: VALUE_GROUP, n: VALUE_PAIRS, width, sums, goes_on: false });
                    });
                    line += rows;
                }
                S::enter(Latents { room, g, groups, lines, v, width });
            }
        }
    }
}

/// Runs of two floats, in turn to the first and to the second codes of pairs, `pairs` of each.
///
/// # Safety
/// `from` is valid for `2 * pairs`, the others for `pairs`, an even number.
unsafe fn split(from: *const f32, (first, second): (*mut f32, *mut f32), pairs: usize) {
    for i in 0..pairs / 2 {
        // SAFETY: runs `2 i` and `2 i + 1`.
        unsafe {
            let from = from.add(4 * i);
            first.add(2 * i).cast::<[f32; 2]>().write_unaligned(from.cast::<[f32; 2]>().read_unaligned());
            second.add(2 * i).cast::<[f32; 2]>().write_unaligned(from.add(2).cast::<[f32; 2]>().read_unaligned());
        }
    }
}

/// `weights = round(absorbed * scales * factor)` in pairs, `back = 1 / factor`, `bias = sum absorbed * minima`.
struct KeyWeights<'a> {
    room: &'a Room,
    absorbed: *const f32,
    lines: usize,
    t: usize,
    /// The largest weight.
    limit: f32,
}

impl Kernel for KeyWeights<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let KeyWeights { room: Room { key_meta: [s0, s1, m0, m1], weights, back, bias, .. }, absorbed, lines, t, limit } = self;
        // SAFETY: `t` is a whole number of vectors; each line has `2 t` absorbed floats and `t` weights.
        unsafe {
            for line in 0..lines {
                let (a0, a1, to) = (absorbed.add(line * 2 * t), absorbed.add(line * 2 * t + t), weights.add(line * t));
                let (mut top, mut sum) = (S::splat(0.0), S::splat(0.0));
                let mut j = 0;
                while j < t {
                    let (x, y) = (S::load(a0.add(j)), S::load(a1.add(j)));
                    let (u, w) = (S::mul(x, S::load(s0.add(j))), S::mul(y, S::load(s1.add(j))));
                    top = S::max(top, S::max(S::max(u, S::sub(S::splat(0.0), u)), S::max(w, S::sub(S::splat(0.0), w))));
                    sum = S::fma(x, S::load(m0.add(j)), sum);
                    sum = S::fma(y, S::load(m1.add(j)), sum);
                    j += S::N;
                }
                let top = S::greatest(top);
                // A line that is not finite gets weights of no meaning and a bias that is not finite.
                let factor = if top > 0.0 && top.is_finite() { limit / top } else { 0.0 };
                *back.add(line) = if factor > 0.0 { top / limit } else { 0.0 };
                *bias.add(line) = S::sum(sum);
                let factor = S::splat(factor);
                let mut j = 0;
                while j < t {
                    let u = S::mul(S::mul(S::load(a0.add(j)), S::load(s0.add(j))), factor);
                    let w = S::mul(S::mul(S::load(a1.add(j)), S::load(s1.add(j))), factor);
                    S::store_words(to.add(j), S::halves(S::to_words(u), S::to_words(w)));
                    j += S::N;
                }
            }
        }
    }
}

/// Sums of products of codes to scores.
struct Scores<'a> {
    room: &'a Room,
    lines: usize,
    /// Of the page and the first line.
    scores: *mut f32,
}

impl Kernel for Scores<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Scores { room: Room { sums, back, bias, .. }, lines, scores } = self;
        // SAFETY: 64 sums and scores for each line.
        unsafe {
            for line in 0..lines {
                let (back, bias) = (S::splat(*back.add(line)), S::splat(*bias.add(line)));
                let (sums, scores) = (sums.add(line * P).cast_const(), scores.add(line * WIDTH));
                let mut j = 0;
                while j < P {
                    S::store(scores.add(j), S::fma(S::word_values(S::words(sums.add(j))), back, bias));
                    j += S::N;
                }
            }
        }
    }
}

/// `value_bias[line][g] = sum over positions of weight * minimum`, and the greatest weight of each line.
struct ValueBias<'a> {
    room: &'a Room,
    /// Softmax weights of the page and the first line.
    scores: *const f32,
    lines: usize,
    groups: usize,
}

impl Kernel for ValueBias<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let ValueBias { room: Room { value_meta: [_, minima], value_bias, greatest, .. }, scores, lines, groups } = self;
        let stride = groups.next_multiple_of(4);
        // SAFETY: 64 weights for each line and minima for each group.
        unsafe {
            for line in 0..lines {
                let weights = scores.add(line * WIDTH);
                let mut top = S::splat(0.0);
                let mut j = 0;
                while j < P {
                    top = S::max(top, S::load(weights.add(j)));
                    j += S::N;
                }
                *greatest.add(line) = S::greatest(top);
                let mut g = 0;
                while g < groups {
                    // Groups that are not there are computed as the last one; nobody reads them.
                    let at: [*const f32; 4] = std::array::from_fn(|c| minima.add((g + c).min(groups - 1) * P).cast_const());
                    let mut acc = [[S::splat(0.0); 4]; 1];
                    let mut j = 0;
                    while j < P {
                        let w = S::load(weights.add(j));
                        for c in 0..4 {
                            acc[0][c] = S::fma(w, S::load(at[c].add(j)), acc[0][c]);
                        }
                        j += S::N;
                    }
                    let mut sums = [0.0f32; 16];
                    S::reduce_add::<1>(&acc, sums.as_mut_ptr());
                    for c in 0..4 {
                        *value_bias.add(line * stride + g + c) = sums[4 * c];
                    }
                    g += 4;
                }
            }
        }
    }
}

/// Softmax weights times the scales of group `g`, in pairs, and what their products are multiplied by.
struct ValueWeights<'a> {
    room: &'a Room,
    /// As in [`ValueBias`].
    scores: *const f32,
    g: usize,
    lines: usize,
}

impl Kernel for ValueWeights<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let ValueWeights { room: Room { value_meta: [scales, _], weights, greatest, back, .. }, scores, g, lines } = self;
        // SAFETY: 64 weights for each line and scales for each group.
        unsafe {
            let scales = scales.add(g * P);
            let mut top = S::splat(0.0);
            let mut j = 0;
            while j < P {
                top = S::max(top, S::load(scales.add(j)));
                j += S::N;
            }
            // No weight times scale exceeds this; it is reached when the heaviest position has the largest scale. 64 products
            // with codes of 8 bits stay within 31 bits.
            let largest = S::greatest(top);
            for line in 0..lines {
                let top = largest * *greatest.add(line);
                let factor = if top > 0.0 && top.is_finite() { 32767.0 / top } else { 0.0 };
                *back.add(line) = if factor > 0.0 { top / 32767.0 } else { 0.0 };
                let factor = S::splat(factor);
                // Pair `p` is of positions `p` and `p + 32`.
                let from = scores.add(line * WIDTH);
                let mut j = 0;
                while j < VALUE_PAIRS {
                    let u = S::mul(S::mul(S::load(from.add(j)), S::load(scales.add(j))), factor);
                    let w = S::mul(S::mul(S::load(from.add(VALUE_PAIRS + j)), S::load(scales.add(VALUE_PAIRS + j))), factor);
                    S::store_words(weights.add(line * VALUE_PAIRS + j), S::halves(S::to_words(u), S::to_words(w)));
                    j += S::N;
                }
            }
        }
    }
}

/// Adds a group's sums to the latents of all lines, scaled to the new maxima.
struct Latents<'a> {
    room: &'a Room,
    g: usize,
    groups: usize,
    lines: usize,
    v: usize,
    width: usize,
}

impl Kernel for Latents<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Latents { room: Room { state: State { o: latents, .. }, sums, back, scale, value_bias, .. }, g, groups, lines, v, width } =
            self;
        // SAFETY: whole vectors up to `v`, which is a whole number of them.
        unsafe {
            for line in 0..lines {
                let (to, from) = (latents.add(line * v + g * VALUE_GROUP), sums.add(line * VALUE_GROUP).cast_const());
                let (back, scale) = (S::splat(*back.add(line)), S::splat(*scale.add(line)));
                let bias = S::splat(*value_bias.add(line * groups.next_multiple_of(4) + g));
                let mut j = 0;
                while j < width {
                    let sum = S::fma(S::word_values(S::words(from.add(j))), back, bias);
                    S::store(to.add(j), S::fma(S::load(to.add(j)), scale, sum));
                    j += S::N;
                }
            }
        }
    }
}
