//! Attention over sealed pages of a frequency basis: no key and no value is rebuilt.
//!
//! A query is absorbed once into `key_rank` numbers ([`FrequencyMap`]), and its score of a position is their dot product with
//! the position's key latent; the softmax sums value latents, and the sum is expanded once, at the end. All heads meet the same
//! latents, so a unit of work is a span of pages and every head of a block of queries: a "line" is one (query, head), in the
//! order `[kv_head][query][head of the group]`.
//!
//! Below 16 bits both products run on the codes themselves. Of the affine quantiser, with key latents `scale[r] * code + min[r]`, a
//! score is `sum (a[r] scale[r]) code[r] + sum a[r] min[r]`: the weights `a[r] scale[r]` of a line and a page are rounded to 16 bits
//! under one factor of theirs, and the sum is exact in 32 bits from there; likewise values, with the softmax's weights times
//! the scales of a group ([`affine`]). Of the Hadamard quantiser weights have 8 bits ([`normal`]). Either moves a result much less than
//! the codes moved what they stand for.
//!
//! Window and sinks are exact tiles, met by [`super::attend`]; all are merged at the end. What a line comes to depends on
//! that line alone: spans are the same whatever is in the batch.

mod affine;
mod normal;

use half::f16;

use self::normal::NormalQuery;
use super::Cpu;
use super::attend::rebuild::group_of;
use super::attend::{Call, Phase, SPAN, Unit, WORTH_SHARING, tiles};
use super::codes::Codes;
use super::pool::{Aligned, Shares, grow, scratch_back, scratch_take};
use super::simd::{Kernel, Lanes, dispatch};
use super::softmax::State;
use super::tile::{Product, Widen, by_rows};
use crate::compress::{FrequencyMap, KeyMap, Projection};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::layout::{Quantiser, SealedLayer, SealedPart};
use crate::ops::AttendRow;
use crate::quant::Order;

const P: usize = PAGE_TOKENS as usize;
/// Lines a unit aims at: enough that spreading codes out is little beside the products, few enough to stay in cache.
const LINES: usize = 64;
/// Floats of partial results and absorbed queries kept at once.
const MEMORY: usize = 8 << 20;
/// Pairs of key codes spread out at once: 16 KiB, in the first-level cache.
const CHUNK: usize = 64;
/// Pages whose softmax is taken at once; a span is whole groups, so that a page's group does not depend on how a row is cut.
const GROUP: usize = 4;
/// Positions of a group.
const WIDTH: usize = GROUP * P;
/// Pairs of a value channel of a page.
const VALUE_PAIRS: usize = P / 2;

/// Memory kept from call to call.
#[derive(Default)]
pub(super) struct LatentScratch {
    blocks: Vec<Block>,
    absorbed: Vec<Aligned>,
    partials: Vec<Aligned>,
}

/// Some queries of one row.
#[derive(Clone, Copy)]
struct Block {
    row: usize,
    first: usize,
    n: usize,
    /// Units before it.
    units: usize,
    /// Spans of sealed pages, and of other tiles.
    sealed_spans: usize,
    spans: usize,
    /// Its floats of absorbed queries, and of partials, before it.
    absorbed: usize,
    partials: usize,
}

/// Whether a row has sealed pages that are met here.
pub(super) fn absorbs(row: &AttendRow<'_>) -> bool {
    map_of(row).is_some()
}

fn map_of<'a>(row: &AttendRow<'a>) -> Option<(&'a FrequencyMap, &'a Projection, SealedLayer)> {
    match row.view.compression {
        Some(c) if !row.sealed.is_empty() && !row.view.layout.drops => match &c.keys {
            KeyMap::Frequencies(map) => Some((map, &c.values, row.view.layout.sealed[row.view.layer])),
            KeyMap::Channels(_) => None,
        },
        _ => None,
    }
}

/// Floats of one absorbed query: in the order of channels at 16 bits; below, for the affine quantiser, the first codes of all pairs,
/// then the second; for the other, words of [`NormalQuery`].
fn absorbed_floats(layer: &SealedLayer) -> usize {
    match (layer.keys.bits, layer.keys.quantiser) {
        (16, _) => layer.keys.rank,
        (_, Quantiser::Affine) => 2 * codes_of(layer).pairs().next_multiple_of(16),
        (_, Quantiser::Hadamard) => NormalQuery::words(layer),
    }
}

/// Key codes of a page of this layer, wherever it is.
fn codes_of(layer: &SealedLayer) -> Codes {
    Codes { words: std::ptr::null(), lanes: P, n: layer.keys.rank, bits: layer.keys.bits, order: Order::Runs }
}

/// The rows of the call that [`absorbs`] says are met here. Rows were checked.
pub(super) fn attend(cpu: &Cpu, call: &Call<'_>, scratch: &mut LatentScratch, out: &mut [f32]) {
    let shape = call.shape;
    let group = shape.heads / shape.kv_heads;
    let mut rows = call.rows.iter().enumerate().filter(|(_, row)| row.n > 0 && absorbs(row)).peekable();
    let mut first = 0;
    while rows.peek().is_some() {
        // A round: blocks until their results fill the memory, at least one.
        scratch.blocks.clear();
        let (mut units, mut absorbed, mut partials, mut work) = (0, 0, 0, 0);
        while let Some(&(at, row)) = rows.peek() {
            let Some((map, values, layer)) = map_of(row) else { unreachable!("filtered") };
            check(map, values, &layer, call);
            let n = (LINES / shape.heads).clamp(1, row.n - first);
            let (sealed_spans, exact) = (row.sealed.len().div_ceil(SPAN), tiles(row, row.position as usize + first + n - 1, true));
            let spans = exact.div_ceil(SPAN);
            let each = State::floats(n * group, shape.head_dim);
            let floats = sealed_spans * State::floats(n * shape.heads, layer.values.rank) + spans * shape.kv_heads * each;
            if !scratch.blocks.is_empty() && absorbed + partials + floats > MEMORY {
                break;
            }
            scratch.blocks.push(Block { row: at, first, n, units, sealed_spans, spans, absorbed, partials });
            units += sealed_spans + spans * shape.kv_heads;
            absorbed += n * shape.heads * absorbed_floats(&layer).next_multiple_of(16);
            partials += floats;
            work += n * shape.heads * (row.sealed.len() * (layer.keys.rank + layer.values.rank) + 2 * exact * shape.head_dim) * P;
            first += n;
            if first == row.n {
                first = 0;
                rows.next();
            }
        }
        grow(&mut scratch.absorbed, absorbed);
        grow(&mut scratch.partials, partials);
        let blocks = &scratch.blocks[..];
        let (absorbed, partials) = (Shares::new(scratch.absorbed.as_mut_slice()), Shares::new(scratch.partials.as_mut_slice()));
        let out = Shares::new(out);
        let all =
            |n: usize, task: &(dyn Fn(usize) + Sync)| if work < WORTH_SHARING { (0..n).for_each(task) } else { cpu.pool.run(n, task) };

        all(blocks.len(), &|i| {
            let block = blocks[i];
            // SAFETY: the block has so many floats of its own.
            unsafe { absorb(call, &block, absorbed.get().cast::<f32>().add(block.absorbed)) }
        });
        all(units, &|i| {
            let block = blocks[blocks.partition_point(|b| b.units <= i) - 1];
            let row = &call.rows[block.row];
            let unit = i - block.units;
            let Some((_, _, layer)) = map_of(row) else { unreachable!("blocks are of absorbing rows") };
            let each = State::floats(block.n * group, shape.head_dim);
            let sealed = State::floats(block.n * shape.heads, layer.values.rank);
            let partial = partials.get().cast::<f32>().wrapping_add(block.partials);
            if unit < block.sealed_spans {
                let absorbed = absorbed.get().cast::<f32>().wrapping_add(block.absorbed);
                let span = Span { call, row, layer, block, span: unit, absorbed, partial: partial.wrapping_add(unit * sealed) };
                // SAFETY: `Cpu` holds only instruction sets this machine has; rows were checked, and the partials of a
                // span are its own.
                unsafe { dispatch(cpu.isa, span) }
            } else {
                let (span, kv_head) = ((unit - block.sealed_spans) / shape.kv_heads, (unit - block.sealed_spans) % shape.kv_heads);
                let partial = partial.wrapping_add(block.sealed_spans * sealed + (span * shape.kv_heads + kv_head) * each);
                let unit = Unit {
                    call,
                    row,
                    kv_head,
                    first: block.first,
                    n: block.n,
                    phase: Phase::Span,
                    skips: true,
                    span,
                    partial,
                    each,
                    parts: 0,
                    out: out.get(),
                };
                // SAFETY: as above.
                unsafe { dispatch(cpu.isa, unit) }
            }
        });
        all(blocks.len() * shape.kv_heads, &|i| {
            let (block, kv_head) = (blocks[i / shape.kv_heads], i % shape.kv_heads);
            let row = &call.rows[block.row];
            let Some((_, values, layer)) = map_of(row) else { unreachable!("blocks are of absorbing rows") };
            let each = State::floats(block.n * group, shape.head_dim);
            let sealed = State::floats(block.n * shape.heads, layer.values.rank);
            let partial = partials.get().cast::<f32>().wrapping_add(block.partials);
            let unit = Unit {
                call,
                row,
                kv_head,
                first: block.first,
                n: block.n,
                phase: Phase::Merge,
                skips: true,
                span: 0,
                partial: partial.wrapping_add(block.sealed_spans * sealed + kv_head * each),
                each: shape.kv_heads * each,
                parts: block.spans,
                out: out.get(),
            };
            let merge = Merge { unit, values, width: layer.values.rank, latents: partial, spans: block.sealed_spans };
            // SAFETY: as above; each unit writes the lines of its own heads.
            unsafe { dispatch(cpu.isa, merge) }
        });
    }
}

/// # Panics
/// When maps and pages do not fit each other; memory safety rests on this.
fn check(map: &FrequencyMap, values: &Projection, layer: &SealedLayer, call: &Call<'_>) {
    assert_eq!((map.kv_heads, 2 * map.half), (call.shape.kv_heads, call.shape.head_dim), "basis of another model");
    assert_eq!(2 * map.frequencies.len(), layer.keys.rank, "basis of another width than the page");
    assert!(map.frequencies.iter().all(|&f| (f as usize) < map.half), "a frequency beyond the head");
    assert_eq!(map.up.len(), map.frequencies.len() * map.kv_heads, "up is not [pairs][kv_heads]");
    assert_eq!(
        (values.channels(), values.rank()),
        (call.shape.kv_heads * call.shape.head_dim, layer.values.rank),
        "basis of another model"
    );
    assert!(values.groups.iter().all(|g| g.ranks.end <= layer.values.rank), "a group wider than the page");
}

/// The lines of a block, in their order: place in `q` of each.
fn lines<'a>(call: &'a Call<'_>, block: &'a Block) -> impl Iterator<Item = (usize, usize)> + 'a {
    let (shape, row) = (call.shape, call.rows[block.row].first + block.first);
    let group = shape.heads / shape.kv_heads;
    (0..shape.kv_heads).flat_map(move |kv_head| {
        (0..block.n).flat_map(move |query| {
            (0..group).map(move |head| (kv_head, ((row + query) * shape.heads + kv_head * group + head) * shape.head_dim))
        })
    })
}

/// `a[j] = scale * q[frequency] conj(up[j][kv_head])` of every line, in the order of [`absorbed_floats`].
///
/// # Safety
/// `to` has that many floats for each line.
unsafe fn absorb(call: &Call<'_>, block: &Block, to: *mut f32) {
    let Some((map, _, layer)) = map_of(&call.rows[block.row]) else { unreachable!("blocks are of absorbing rows") };
    let floats = absorbed_floats(&layer).next_multiple_of(16);
    let plain = layer.keys.bits == 16 || layer.keys.quantiser == Quantiser::Hadamard;
    let place = |channel: usize| match plain {
        true => channel,
        // Bytes 0 and 1 of a quad are the first codes of its pairs.
        false => channel / 4 * 2 + channel % 2 + if channel % 4 < 2 { 0 } else { floats / 2 },
    };
    let rank = layer.keys.rank;
    let mut buffer = scratch_take(2 * rank);
    // SAFETY: the buffer has so many floats.
    let (turned, spare) = unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<f32>(), 2 * rank) }.split_at_mut(rank);
    for (line, (kv_head, at)) in lines(call, block).enumerate() {
        // SAFETY: the floats of this line.
        let to = unsafe { std::slice::from_raw_parts_mut(to.add(line * floats), floats) };
        let q = &call.q[at..at + 2 * map.half];
        let absorbed: &mut [f32] = if plain { &mut *turned } else { &mut *to };
        absorbed.fill(0.0);
        for (j, &f) in map.frequencies.iter().enumerate() {
            let (re, im) = (call.shape.scale * q[f as usize], call.shape.scale * q[map.half + f as usize]);
            let [ur, ui] = map.up[j * map.kv_heads + kv_head];
            absorbed[place(2 * j)] = re * ur + im * ui;
            absorbed[place(2 * j + 1)] = im * ur - re * ui;
        }
        if plain {
            map.rotate(turned, 1, spare);
            match layer.keys.bits {
                16 => to[..turned.len()].copy_from_slice(turned),
                _ => NormalQuery::write(&layer, turned, bytemuck::cast_slice_mut(&mut to[..NormalQuery::words(&layer)])),
            }
        }
    }
    scratch_back(buffer);
}

/// A span of sealed pages, for all lines of a block.
struct Span<'a> {
    call: &'a Call<'a>,
    row: &'a AttendRow<'a>,
    layer: SealedLayer,
    block: Block,
    span: usize,
    absorbed: *const f32,
    /// The state of all lines, whose outputs are latents.
    partial: *mut f32,
}

/// Neighbouring sealed pages of a span.
struct Group<'a> {
    /// No more than [`GROUP`].
    pages: &'a [PageAddr],
    /// The pages of the group after it.
    next: &'a [PageAddr],
    /// Positions before this are not met.
    from: usize,
}

impl Group<'_> {
    fn width(&self) -> usize {
        self.pages.len() * P
    }

    /// Bytes from page `at` to the one that is met next; zero if there is none.
    fn distance(&self, at: usize) -> isize {
        distance(self.pages[at], self.pages.get(at + 1).or(self.next.first()))
    }

    /// Bytes from each page to the one that is met after as many; zero if there is none.
    fn distances(&self) -> [isize; GROUP] {
        std::array::from_fn(|at| self.pages.get(at).map_or(0, |&page| distance(page, self.next.get(at))))
    }
}

fn distance(from: PageAddr, to: Option<&PageAddr>) -> isize {
    to.map_or(0, |to| (to.0 as isize - from.0 as isize) * PageAddr::UNIT as isize)
}

/// Scratch of a span. `L` lines, `W` positions of a group, `T` pairs rounded up to 16, `V` value latents rounded up to 16, `G` value
/// groups.
struct Room {
    /// Maxima, sums, and latents `[L][V]`.
    state: State,
    /// `[L]`: of the group at hand, what latents so far are scaled by.
    scale: *mut f32,
    /// Scales or minima of the page's keys, or both of its values, as they lie there.
    line: *mut f32,
    /// `[L][W]`.
    scores: *mut f32,
    /// Scales and minima of the page's key channels: first and second codes of the pairs, `[T]` each.
    key_meta: [*mut f32; 4],
    /// `[L][T]` pairs of key weights; later `[L][32]` pairs, or `[L][W / 4]` quads, of value weights.
    weights: *mut u32,
    /// `[L]` each: what a product of weights is multiplied by, and what is added.
    back: *mut f32,
    bias: *mut f32,
    /// `[CHUNK][64]` pairs of key codes, `[32][32]` pairs of value codes.
    spread: *mut u32,
    /// `[L][64]`.
    sums: *mut u32,
    /// The greatest softmax weight of each line.
    greatest: *mut f32,
    /// Scales and minima of the page's value groups by pairs of positions, `[G][64]` each.
    value_meta: [*mut f32; 2],
    /// `[L][G rounded up to 4]`.
    value_bias: *mut f32,
    /// Of normal pages: deviations of positions, `[blocks][64]` of a page's keys, then `[blocks][W]` of a group's values.
    deviations: *mut f32,
    /// Only at 16 bits: `[key_rank][64]` and `[64][V]`.
    wide_keys: *mut f32,
    wide_values: *mut f32,
}

impl Kernel for Span<'_> {
    unsafe fn run<S: Lanes>(self) {
        let lines = self.lines();
        let layer = &self.layer;
        let floats = absorbed_floats(layer).next_multiple_of(16);
        let (wide, pad) = (layer.keys.bits == 16, |n: usize| n.next_multiple_of(16));
        let affine = |part: &SealedPart, n: usize| if wide || part.quantiser == Quantiser::Hadamard { 0 } else { n };
        let t = affine(&layer.keys, pad(codes_of(layer).pairs()));
        let v = pad(layer.values.rank);
        let groups = affine(&layer.values, layer.value_groups());
        let narrow = |n: usize| if wide { 0 } else { pad(n) };
        let sizes = [
            pad(lines),
            narrow((2 * t).max(2 * groups * P)),
            lines * WIDTH,
            t,
            t,
            t,
            t,
            narrow(lines * t.max(VALUE_PAIRS).max(WIDTH / 4)),
            pad(lines),
            pad(lines),
            narrow(CHUNK * P),
            narrow(lines * P),
            pad(lines),
            narrow(groups * P),
            narrow(groups * P),
            narrow(lines * groups.next_multiple_of(4)),
            narrow(layer.blocks * WIDTH),
            if wide { layer.keys.rank * P } else { 0 },
            if wide { P * v } else { 0 },
        ];
        let mut buffer = scratch_take(sizes.iter().sum());
        let mut at = buffer.as_mut_ptr().cast::<f32>();
        let parts = sizes.map(|n| {
            let here = at;
            at = at.wrapping_add(n);
            here
        });
        let [scale, line, scores, k0, k1, k2, k3, weights, back, bias, spread, sums, rest @ ..] = parts;
        let [greatest, v0, v1, value_bias, deviations, wide_keys, wide_values] = rest;
        // SAFETY: the partial has so many floats.
        let state = unsafe { State::at(self.partial, lines, self.layer.values.rank) };
        let room = Room {
            state,
            scale,
            line,
            scores,
            key_meta: [k0, k1, k2, k3],
            weights: weights.cast(),
            back,
            bias,
            spread: spread.cast(),
            sums: sums.cast(),
            greatest,
            value_meta: [v0, v1],
            value_bias,
            deviations,
            wide_keys,
            wide_values,
        };
        // SAFETY: each part of the scratch has the size it is used with; maps and pages were checked.
        unsafe {
            room.state.clear();
            let sinks = if self.row.sinks.is_some() { self.row.view.layout.sinks as usize } else { 0 };
            let pages = &self.row.sealed[self.span * SPAN..self.row.sealed.len().min((self.span + 1) * SPAN)];
            for (i, group) in pages.chunks(GROUP).enumerate() {
                let first = self.span * SPAN + i * GROUP;
                let after = &self.row.sealed[first + group.len()..];
                let group = Group { pages: group, next: &after[..after.len().min(GROUP)], from: if first == 0 { sinks } else { 0 } };
                if group.from == group.width() {
                    continue;
                }
                for at in 0..group.pages.len() {
                    match self.layer.keys.quantiser {
                        _ if wide => self.score_wide::<S>(&room, &group, at),
                        Quantiser::Affine => self.score_affine::<S>(&room, &group, at, t),
                        Quantiser::Hadamard => self.score_normal::<S>(&room, &group, at, floats),
                    }
                }
                S::enter(Softmax { room: &room, lines, width: group.width(), from: group.from });
                match self.layer.values.quantiser {
                    Quantiser::Hadamard if !wide => self.gather_normal::<S>(&room, &group, v),
                    quantiser => {
                        for at in 0..group.pages.len() {
                            match quantiser {
                                _ if wide => self.gather_wide::<S>(&room, &group, at, v),
                                _ => self.gather_affine::<S>(&room, &group, at, v),
                            }
                            // What was before the group has been scaled with its first page.
                            std::slice::from_raw_parts_mut(room.scale, lines).fill(1.0);
                        }
                    }
                }
            }
        }
        scratch_back(buffer);
    }
}

/// Scores of a group to weights; maxima and sums of the lines move on.
struct Softmax<'a> {
    room: &'a Room,
    lines: usize,
    width: usize,
    /// Positions before this get no weight.
    from: usize,
}

impl Kernel for Softmax<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Softmax { room: Room { scores, state, scale, .. }, lines, width, from } = self;
        // SAFETY: scores of a group for each line; maxima, sums and scales are padded to 16 lines.
        unsafe {
            for line in 0..lines {
                let scores = scores.add(line * WIDTH);
                let mut top = S::splat(f32::NEG_INFINITY);
                let mut j = 0;
                while j < from {
                    S::store(scores.add(j), S::keep(S::load(scores.add(j)), (from - j).min(S::N), S::N));
                    j += S::N;
                }
                let mut j = 0;
                while j < width {
                    top = S::max(top, S::load(scores.add(j)));
                    j += S::N;
                }
                let (before, here) = (*state.m.add(line), S::greatest(top));
                let top = if here > before { here } else { before };
                *scale.add(line) = before - top;
                *state.m.add(line) = top;
            }
            let mut line = 0;
            while line < lines {
                S::store(scale.add(line), S::exp(S::load(scale.add(line))));
                line += S::N;
            }
            for line in 0..lines {
                let scores = scores.add(line * WIDTH);
                let top = S::splat(*state.m.add(line));
                let mut sum = S::splat(0.0);
                let mut j = 0;
                while j < width {
                    let v = S::exp(S::sub(S::load(scores.add(j)), top));
                    S::store(scores.add(j), v);
                    sum = S::add(sum, v);
                    j += S::N;
                }
                *state.l.add(line) = *state.l.add(line) * *scale.add(line) + S::sum(sum);
            }
        }
    }
}

/// Safety of the unsafe functions: as [`Kernel::run`] of [`Span`], with the room it made.
impl Span<'_> {
    fn lines(&self) -> usize {
        self.block.n * self.call.shape.heads
    }

    /// Scores of page `at` of a group, of 16-bit latents: widened, and met as numbers.
    unsafe fn score_wide<S: Lanes>(&self, room: &Room, group: &Group<'_>, at: usize) {
        let (lines, rank) = (self.lines(), self.layer.keys.rank);
        let absorbed = rank.next_multiple_of(16);
        // SAFETY: the room has a tile of keys, and scores for every line.
        unsafe {
            let keys = self.call.arena.slice::<f16>(group.pages[at], self.layer.keys.codes, rank * P);
            S::enter(Widen { from: keys.as_ptr(), to: room.wide_keys, n: rank * P });
            let mut line = 0;
            while line < lines {
                let rows = (lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out) = ([self.absorbed; R], [room.scores.add(at * P); R]);
                    for r in 0..R {
                        a[r] = a[r].add((line + r) * absorbed);
                        out[r] = out[r].add((line + r) * WIDTH);
                    }
                    Product { a, a_step: 1, b: room.wide_keys.cast_const(), b_step: P, n: rank, ahead: 0 }.onto::<S>(out, P, None);
                });
                line += rows;
            }
        }
    }

    /// Adds the weighted 16-bit value latents of page `at` of a group to those of the lines.
    unsafe fn gather_wide<S: Lanes>(&self, room: &Room, group: &Group<'_>, at: usize, v: usize) {
        let (lines, width) = (self.lines(), self.layer.values.rank);
        let from = group.from.saturating_sub(at * P).min(P);
        // SAFETY: the room has a tile of values, and `v` latents for every line.
        unsafe {
            for p in from..P {
                let values = self.call.arena.slice::<f16>(group.pages[at], self.layer.values.codes + p * width * 2, width);
                S::enter(Widen { from: values.as_ptr(), to: room.wide_values.add(p * v), n: width });
            }
            let mut line = 0;
            while line < lines {
                let rows = (lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out, mut scale) = ([room.scores.add(at * P + from).cast_const(); R], [room.state.o; R], [0.0; R]);
                    for r in 0..R {
                        a[r] = a[r].add((line + r) * WIDTH);
                        out[r] = out[r].add((line + r) * v);
                        scale[r] = *room.scale.add(line + r);
                    }
                    let b = room.wide_values.cast_const().add(from * v);
                    Product { a, a_step: 1, b, b_step: v, n: P - from, ahead: 0 }.onto::<S>(out, width, Some(scale));
                });
                line += rows;
            }
        }
    }
}

/// The result of one KV head of a block: latents of all spans merged, expanded once, merged with the other tiles.
struct Merge<'a> {
    /// Merges those others.
    unit: Unit<'a>,
    values: &'a Projection,
    /// Width of the value latents, and their states, one after the other.
    width: usize,
    latents: *mut f32,
    spans: usize,
}

impl Kernel for Merge<'_> {
    unsafe fn run<S: Lanes>(self) {
        let Merge { unit, values, width, latents, spans } = self;
        let (shape, d) = (unit.call.shape, unit.call.shape.head_dim);
        let each = unit.n * shape.heads / shape.kv_heads;
        let all = each * shape.kv_heads;
        let (group, mean, channel) = group_of(values, unit.kv_head * d, d);
        let (first, total) = (State::floats(each, width), State::floats(each, d));
        let mut buffer = scratch_take(first + total);
        let at = buffer.as_mut_ptr().cast::<f32>();
        // SAFETY: the scratch has both states; those of the spans are of all lines, of which this head's are a part; the group
        // has `[rank][channels]` and the head's channels.
        unsafe {
            let (sum, total) = (State::at(at, each, width), State::at(at.add(first), each, d));
            sum.clear();
            for span in 0..spans {
                let state = State::at(latents.add(span * State::floats(all, width)), all, width);
                sum.merge::<S>(state.part(unit.kv_head * each, each));
            }
            total.clear();
            std::ptr::copy_nonoverlapping(sum.m, total.m, each);
            std::ptr::copy_nonoverlapping(sum.l, total.l, each);
            let mut line = 0;
            while line < each {
                let rows = (each - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut sums, mut out) = ([sum.o.cast_const(); R], [sum.l.cast_const(); R], [total.o; R]);
                    for r in 0..R {
                        a[r] = a[r].add((line + r) * sum.stride + group.ranks.start);
                        sums[r] = sums[r].add(line + r);
                        out[r] = out[r].add((line + r) * total.stride);
                    }
                    let b = group.up.as_ptr().add(channel);
                    let latents = Product { a, a_step: 1, b, b_step: group.channels.len(), n: group.ranks.len(), ahead: 0 };
                    latents.onto::<S>(out, d, None);
                    let mean = Product { a: sums, a_step: 0, b: mean.as_ptr(), b_step: 0, n: 1, ahead: 0 };
                    mean.onto::<S>(out, d, Some([1.0; R]));
                });
                line += rows;
            }
            for part in 0..unit.parts {
                total.merge::<S>(State::at(unit.partial.add(part * unit.each), each, d));
            }
            unit.finish::<S>(&total);
        }
        scratch_back(buffer);
    }
}
