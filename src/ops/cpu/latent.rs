//! Attention over sealed pages of a frequency basis: no key and no value is rebuilt.
//!
//! A query is absorbed once into `key_rank` numbers ([`FrequencyMap`]), and its score of a position is their dot product with
//! the position's key latent; the softmax sums value latents, and the sum is expanded once, at the end. All heads meet the same
//! latents, so a unit of work is a span of pages and every head of a block of queries: a "line" is one (query, head), in the
//! order `[kv_head][query][head of the group]`.
//!
//! Below 16 bits both products run on the codes themselves. With key latents `scale[r] * code + min[r]`, a score is
//! `sum (a[r] scale[r]) code[r] + sum a[r] min[r]`: the weights `a[r] scale[r]` of a line and a page are rounded to 16 bits
//! under one factor of theirs, and the sum is exact in 32 bits from there; likewise values, with the softmax's weights times
//! the scales of a group. The rounding moves a weight by 2^-16 of the largest, some 500 times less than 4-bit codes move
//! what they stand for.
//!
//! Window and sinks are exact tiles, met by [`super::attend`]; all are merged at the end. What a line comes to depends on
//! that line alone: spans are the same whatever is in the batch.

use half::f16;

use super::Cpu;
use super::attend::{Call, Phase, SPAN, Softmax, State, Unit, WORTH_SHARING, group_of, key_codes, tiles, value_codes};
use super::codes::{Codes, Into, PairProduct, QuadProduct, Spread, signed_levels, unsigned_levels};
use super::pool::{Aligned, Shares, grow, scratch_back, scratch_take};
use super::simd::{Kernel, Lanes, dispatch};
use super::tile::{Product, Widen, by_rows};
use crate::compress::{FrequencyMap, KeyMap, Projection};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::layout::{Quantiser, SealedLayer, SealedPart, VALUE_GROUP};
use crate::ops::AttendRow;
use crate::quant::{Order, levels};

const P: usize = PAGE_TOKENS as usize;
/// Lines a unit aims at: enough that spreading codes out is little beside the products, few enough to stay in cache.
const LINES: usize = 64;
/// Floats of partial results and absorbed queries kept at once.
const MEMORY: usize = 8 << 20;
/// Pairs of key codes spread out at once: 16 KiB, in the first-level cache.
const CHUNK: usize = 64;
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

/// An absorbed query for normal keys: weights of 16 bits in two bytes each, a quad to a word, and how sums are read.
///
/// ```text
/// [0, q)       signed upper bytes, q quads of channels in runs
/// [q, 2 q)     signed lower bytes:  weight = 256 upper + lower
/// 2 q, 2 q + 1 what is to be added to the sums of upper and of lower bytes, since levels are met 128 too high
/// 2 q + 2      f32: what a sum is multiplied by, beside the deviation of its position
/// ```
struct NormalQuery;

impl NormalQuery {
    fn words(layer: &SealedLayer) -> usize {
        2 * codes_of(layer).quads() + 3
    }

    /// Writes the query `a: [key_rank]` of a line that meets channels `[from, to)` only.
    fn write(layer: &SealedLayer, a: &[f32], to: &mut [u32]) {
        let quads = codes_of(layer).quads();
        // The greatest weight whose upper byte is one.
        const TOP: f32 = 127.0 * 256.0 + 127.0;
        let top = a.iter().fold(0.0f32, |top, x| top.max(x.abs()));
        let factor = if top > 0.0 && top.is_finite() { TOP / top } else { 0.0 };
        let (mut upper, mut lower) = (0i32, 0i32);
        to.fill(0);
        for (i, &x) in a.iter().enumerate() {
            let weight = (x * factor).round_ties_even() as i32;
            let high = (weight + 128) >> 8;
            let low = weight - 256 * high;
            (upper, lower) = (upper + high, lower + low);
            let (quad, byte) = Order::Runs.quad(i);
            to[quad] |= u32::from(high as i8 as u8) << (8 * byte);
            to[quads + quad] |= u32::from(low as i8 as u8) << (8 * byte);
        }
        to[2 * quads] = (-128 * upper) as u32;
        to[2 * quads + 1] = (-128 * lower) as u32;
        let finite = a.iter().all(|x| x.is_finite());
        let back = if finite { top / TOP / levels(layer.keys.bits).1 } else { f32::NAN };
        to[2 * quads + 2] = back.to_bits();
    }
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
            if !scratch.blocks.is_empty() && partials + floats > MEMORY {
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

/// `a[j] = q[frequency] conj(up[j][kv_head])` of every line, in the order of [`absorbed_floats`].
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
    let mut turned = vec![0.0; if map.rotation.is_some() || plain { layer.keys.rank } else { 0 }];
    for (line, (kv_head, at)) in lines(call, block).enumerate() {
        // SAFETY: the floats of this line.
        let to = unsafe { std::slice::from_raw_parts_mut(to.add(line * floats), floats) };
        let q = &call.q[at..at + 2 * map.half];
        let absorbed: &mut [f32] = if plain { &mut turned } else { &mut *to };
        absorbed.fill(0.0);
        for (j, &f) in map.frequencies.iter().enumerate() {
            let (re, im) = (q[f as usize], q[map.half + f as usize]);
            let [ur, ui] = map.up[j * map.kv_heads + kv_head];
            absorbed[place(2 * j)] = re * ur + im * ui;
            absorbed[place(2 * j + 1)] = im * ur - re * ui;
        }
        if plain {
            map.rotate(&mut turned, 1);
            match layer.keys.bits {
                16 => to[..turned.len()].copy_from_slice(&turned),
                _ => NormalQuery::write(&layer, &turned, bytemuck::cast_slice_mut(&mut to[..NormalQuery::words(&layer)])),
            }
        }
    }
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

/// Scratch of a span. `L` lines, `T` pairs rounded up to 16, `V` value latents rounded up to 16, `G` value groups.
struct Room {
    /// Maxima, sums, and latents `[L][V]`.
    state: State,
    /// `[L]`: of the page at hand, what latents so far are scaled by.
    scale: *mut f32,
    /// Scales or minima of the page's keys, or both of its values, as they lie there.
    line: *mut f32,
    /// `[L][64]`.
    scores: *mut f32,
    /// Scales and minima of the page's key channels: first and second codes of the pairs, `[T]` each.
    key_meta: [*mut f32; 4],
    /// `[L][T]` pairs of key weights; later `[L][32]` of value weights.
    weights: *mut u32,
    /// `[L]` each: what a product of weights is multiplied by, and what is added.
    back: *mut f32,
    bias: *mut f32,
    /// `[CHUNK][64]` or `[32][32]` pairs of codes.
    spread: *mut u32,
    /// `[L][64]`.
    sums: *mut u32,
    /// Softmax weights by first and second codes of pairs of positions, `[L][64]`; and the greatest of each line.
    halves: *mut f32,
    greatest: *mut f32,
    /// Scales and minima of the page's value groups by pairs of positions, `[G][64]` each.
    value_meta: [*mut f32; 2],
    /// `[L][G rounded up to 4]`.
    value_bias: *mut f32,
    /// Of a normal page: deviations of positions, `[blocks][64]` of keys, then of values.
    deviations: *mut f32,
    /// Only at 16 bits: `[key_rank][64]` and `[64][V]`.
    wide_keys: *mut f32,
    wide_values: *mut f32,
}

impl Kernel for Span<'_> {
    unsafe fn run<S: Lanes>(self) {
        let lines = self.lines();
        let layer = &self.layer;
        let (wide, pad) = (layer.keys.bits == 16, |n: usize| n.next_multiple_of(16));
        let affine = |part: &SealedPart, n: usize| if wide || part.quantiser == Quantiser::Hadamard { 0 } else { n };
        let t = affine(&layer.keys, pad(codes_of(layer).pairs()));
        let v = pad(layer.values.rank);
        let groups = affine(&layer.values, layer.value_groups());
        let narrow = |n: usize| if wide { 0 } else { pad(n) };
        let sizes = [
            pad(lines),
            narrow((2 * t).max(2 * groups * P)),
            lines * P,
            t,
            t,
            t,
            t,
            // Pairs of key weights; of value weights; or two bytes of value weights.
            narrow(lines * t.max(VALUE_PAIRS)),
            pad(lines),
            pad(lines),
            narrow(CHUNK * P),
            narrow(2 * lines * P),
            narrow(lines * P),
            pad(lines),
            narrow(groups * P),
            narrow(groups * P),
            narrow(lines * groups.next_multiple_of(4)),
            narrow(2 * layer.blocks * P),
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
        let [halves, greatest, v0, v1, value_bias, deviations, wide_keys, wide_values] = rest;
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
            halves,
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
            let pages = self.span * SPAN..self.row.sealed.len().min((self.span + 1) * SPAN);
            for page in pages {
                let from = if page == 0 { sinks } else { 0 };
                if from == P {
                    continue;
                }
                let addr = self.row.sealed[page];
                let next = self.row.sealed.get(page + 1).copied();
                if wide {
                    self.wide_page::<S>(&room, addr, from, v);
                } else {
                    match self.layer.keys.quantiser {
                        Quantiser::Affine => self.score::<S>(&room, addr, t, next),
                        Quantiser::Hadamard => self.score_normal::<S>(&room, addr, next),
                    }
                    self.softmax::<S>(&room, from);
                    match self.layer.values.quantiser {
                        Quantiser::Affine => self.gather::<S>(&room, addr, v, next),
                        Quantiser::Hadamard => self.gather_normal::<S>(&room, addr, v, next),
                    }
                }
            }
        }
        scratch_back(buffer);
    }
}

/// Safety of the unsafe functions: as [`Kernel::run`] of [`Span`], with the room it made.
impl Span<'_> {
    fn lines(&self) -> usize {
        self.block.n * self.call.shape.heads
    }

    /// Scores of the page's positions into `room.scores`.
    unsafe fn score<S: Lanes>(&self, room: &Room, page: PageAddr, t: usize, next: Option<PageAddr>) {
        let (lines, layer) = (self.lines(), self.layer);
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
            let top = ((1u32 << layer.keys.bits) - 1) as f32;
            let limit = (i32::MAX as f32 / (top * layer.keys.rank as f32)).min(32767.0).floor();
            S::enter(KeyWeights { room, absorbed: self.absorbed, lines, t, limit });
            let pairs = codes.pairs();
            let mut from = 0;
            while from < pairs {
                let to = pairs.min(from + CHUNK);
                self.ask::<S>(next, from / CHUNK, pairs.div_ceil(CHUNK) + layer.value_groups());
                S::enter(Spread { codes, lane: 0, width: P, from: from / 2, to: to / 2, into: Into::Pairs, out: room.spread, stride: P });
                let mut line = 0;
                while line < lines {
                    let rows = (lines - line).min(S::ROWS);
                    by_rows!(rows, S, |R| {
                        let (mut a, mut out) = ([room.weights.cast_const(); R], [room.sums; R]);
                        for r in 0..R {
                            a[r] = a[r].add((line + r) * t + from);
                            out[r] = out[r].add((line + r) * P);
                        }
                        let b = room.spread.cast_const();
                        S::enter(PairProduct { a, b, b_step: P, n: to - from, out, width: P, accumulate: from > 0 });
                    });
                    line += rows;
                }
                from = to;
            }
            S::enter(Scores { room, lines });
        }
    }

    /// Asks for a part of the next page, one of `parts`, while this one is met: all at once would fill the queues that
    /// this page's own bytes come through.
    unsafe fn ask<S: Lanes>(&self, next: Option<PageAddr>, part: usize, parts: usize) {
        let layer = &self.layer;
        if let Some(next) = next {
            let each = layer.bytes().div_ceil(parts).next_multiple_of(64);
            let bytes = self.call.arena.slice::<u8>(next, layer.keys.codes, layer.bytes());
            let bytes = &bytes[(part * each).min(bytes.len())..((part + 1) * each).min(bytes.len())];
            // SAFETY: passed on.
            unsafe { S::enter(Prefetch { from: bytes.as_ptr(), bytes: bytes.len() }) }
        }
    }

    /// Lines that meet a block of channels: all where there is but one, those of its KV head where each head is a block.
    fn lines_of(&self, block: usize) -> std::ops::Range<usize> {
        let each = self.lines() / self.layer.blocks;
        block * each..(block + 1) * each
    }

    /// Parts that a page of normal latents is asked for in.
    fn normal_parts(&self) -> usize {
        let layer = &self.layer;
        layer.blocks * ((layer.keys.rank / layer.blocks).div_ceil(4 * CHUNK) + (layer.values.rank / layer.blocks).div_ceil(P))
    }

    /// [`Span::score`] of normal keys.
    unsafe fn score_normal<S: Lanes>(&self, room: &Room, page: PageAddr, next: Option<PageAddr>) {
        let layer = &self.layer;
        let codes = key_codes(self.call.arena, page, layer);
        let meta = self.call.arena.slice::<f16>(page, layer.keys.meta, layer.key_meta_bytes() / 2);
        let table = unsigned_levels(layer.keys.bits);
        let (all, floats) = (codes.quads(), absorbed_floats(layer).next_multiple_of(16));
        let each = if layer.blocks == 1 { all } else { layer.keys.rank / layer.blocks / 4 };
        let parts = self.normal_parts();
        let mut part = 0;
        // SAFETY: the room has 64 sums for two rows of each line, and a chunk of quads; absorbed lines have what `NormalQuery` says.
        unsafe {
            S::enter(Widen { from: meta.as_ptr(), to: room.deviations, n: meta.len() });
            for block in 0..layer.blocks {
                let (first, end) = (block * each, (block + 1) * each);
                let lines = self.lines_of(block);
                let mut from = first;
                while from < end {
                    let to = end.min(from + CHUNK);
                    self.ask::<S>(next, part, parts);
                    part += 1;
                    S::enter(Spread { codes, lane: 0, width: P, from, to, into: Into::Quads(&table), out: room.spread, stride: P });
                    let (mut row, rows_end) = (2 * lines.start, 2 * lines.end);
                    while row < rows_end {
                        let rows = (rows_end - row).min(S::ROWS);
                        by_rows!(rows, S, |R| {
                            let (mut a, mut out) = ([self.absorbed.cast::<u32>(); R], [room.sums; R]);
                            for r in 0..R {
                                a[r] = a[r].add((row + r) / 2 * floats + (row + r) % 2 * all + from);
                                out[r] = out[r].add((row + r) * P);
                            }
                            let b = room.spread.cast_const();
                            let product =
                                QuadProduct::<R, false> { a, b, b_step: P, n: to - from, out, width: P, accumulate: from > first };
                            S::enter(product);
                        });
                        row += rows;
                    }
                    from = to;
                }
                if first == end {
                    // Keys of which nothing is kept: all scores are zero.
                    room.deviations.add(block * P).write_bytes(0, P);
                    room.sums.add(2 * lines.start * P).write_bytes(0, 2 * lines.len() * P);
                }
                let query = self.absorbed.cast::<u32>().add(2 * all);
                S::enter(NormalScores { room, lines, query, stride: floats, deviations: room.deviations.add(block * P) });
            }
        }
    }

    /// [`Span::gather`] of normal values.
    unsafe fn gather_normal<S: Lanes>(&self, room: &Room, page: PageAddr, v: usize, next: Option<PageAddr>) {
        let layer = &self.layer;
        let codes = value_codes(self.call.arena, page, layer);
        let meta = self.call.arena.slice::<f16>(page, layer.values.meta, layer.value_meta_bytes() / 2);
        let table = signed_levels(layer.values.bits);
        let unit = levels(layer.values.bits).1;
        let each = layer.values.rank / layer.blocks;
        let deviations = room.deviations.wrapping_add(layer.blocks * P);
        let parts = self.normal_parts();
        let mut part = parts - layer.blocks * each.div_ceil(P);
        // SAFETY: the room has two rows of 16 weights and of 64 sums for each line, and 16 quads of 64 lanes.
        unsafe {
            S::enter(Widen { from: meta.as_ptr(), to: deviations, n: meta.len() });
            for block in 0..layer.blocks {
                let lines = self.lines_of(block);
                S::enter(NormalWeights { room, lines: lines.clone(), deviations: deviations.add(block * P), unit });
                let mut lane = block * each;
                while lane < (block + 1) * each {
                    let width = P.min((block + 1) * each - lane);
                    self.ask::<S>(next, part, parts);
                    part += 1;
                    S::enter(Spread { codes, lane, width, from: 0, to: P / 4, into: Into::Quads(&table), out: room.spread, stride: P });
                    let (mut row, rows_end) = (2 * lines.start, 2 * lines.end);
                    while row < rows_end {
                        let rows = (rows_end - row).min(S::ROWS);
                        by_rows!(rows, S, |R| {
                            let (mut a, mut out) = ([room.weights.cast_const(); R], [room.sums; R]);
                            for r in 0..R {
                                a[r] = a[r].add((row + r) * P / 4);
                                out[r] = out[r].add((row + r) * P);
                            }
                            let b = room.spread.cast_const();
                            S::enter(QuadProduct::<R, true> { a, b, b_step: P, n: P / 4, out, width, accumulate: false });
                        });
                        row += rows;
                    }
                    S::enter(NormalLatents { room, lines: lines.clone(), to: room.state.o.add(lane), v, width });
                    lane += width;
                }
            }
        }
    }

    /// Scores to weights; maxima and sums move on.
    unsafe fn softmax<S: Lanes>(&self, room: &Room, from: usize) {
        let lines = self.lines();
        let mut line = 0;
        while line < lines {
            let n = (lines - line).min(6);
            let (mut scale, mut sums) = ([0.0; 16], [0.0; 16]);
            // SAFETY: `n` lines from `line` are in the room.
            unsafe {
                S::enter(Softmax {
                    scores: room.scores.add(line * P),
                    width: P,
                    lines: n,
                    from,
                    to: [P; 6],
                    gain: self.call.shape.scale,
                    m: room.state.m.add(line),
                    l: room.state.l.add(line),
                    scale: &mut scale,
                    sums: &mut sums,
                });
                std::ptr::copy_nonoverlapping(scale.as_ptr(), room.scale.add(line), n);
            }
            line += n;
        }
    }

    /// Adds the page's weighted value latents to `room.latents`.
    unsafe fn gather<S: Lanes>(&self, room: &Room, page: PageAddr, v: usize, next: Option<PageAddr>) {
        let (lines, layer, groups) = (self.lines(), self.layer, self.layer.value_groups());
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
            // Pair `p` is of positions `p` and `p + 32`: weights lie as scores do.
            std::ptr::copy_nonoverlapping(room.scores, room.halves, lines * P);
            S::enter(ValueBias { room, lines, groups });
            for g in 0..groups {
                let chunks = codes_of(&layer).pairs().div_ceil(CHUNK);
                self.ask::<S>(next, chunks + g, chunks + groups);
                let (lane, width) = (g * VALUE_GROUP, VALUE_GROUP.min(layer.values.rank - g * VALUE_GROUP));
                S::enter(Spread { codes, lane, width, from: 0, to: P / 4, into: Into::Pairs, out: room.spread, stride: VALUE_GROUP });
                S::enter(ValueWeights { room, g, lines });
                let mut line = 0;
                while line < lines {
                    let rows = (lines - line).min(S::ROWS);
                    by_rows!(rows, S, |R| {
                        let (mut a, mut out) = ([room.weights.cast_const(); R], [room.sums; R]);
                        for r in 0..R {
                            a[r] = a[r].add((line + r) * VALUE_PAIRS);
                            out[r] = out[r].add((line + r) * VALUE_GROUP);
                        }
                        let b = room.spread.cast_const();
                        S::enter(PairProduct { a, b, b_step: VALUE_GROUP, n: VALUE_PAIRS, out, width, accumulate: false });
                    });
                    line += rows;
                }
                S::enter(Latents { room, g, groups, lines, v, width });
            }
        }
    }

    /// A page of 16-bit latents: widened, and met as numbers.
    unsafe fn wide_page<S: Lanes>(&self, room: &Room, page: PageAddr, from: usize, v: usize) {
        let (lines, layer, arena) = (self.lines(), self.layer, self.call.arena);
        let (rank, width) = (layer.keys.rank, layer.values.rank);
        let absorbed = rank.next_multiple_of(16);
        // SAFETY: the room has a tile of keys and of values, and 64 scores and `v` latents for every line.
        unsafe {
            let keys = arena.slice::<f16>(page, layer.keys.codes, rank * P);
            S::enter(Widen { from: keys.as_ptr(), to: room.wide_keys, n: rank * P });
            let mut line = 0;
            while line < lines {
                let rows = (lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out) = ([self.absorbed; R], [room.scores; R]);
                    for r in 0..R {
                        a[r] = a[r].add((line + r) * absorbed);
                        out[r] = out[r].add((line + r) * P);
                    }
                    Product { a, a_step: 1, b: room.wide_keys.cast_const(), b_step: P, n: rank, ahead: 0 }.onto::<S>(out, P, None);
                });
                line += rows;
            }
            self.softmax::<S>(room, from);
            for p in from..P {
                let values = arena.slice::<f16>(page, layer.values.codes + p * width * 2, width);
                S::enter(Widen { from: values.as_ptr(), to: room.wide_values.add(p * v), n: width });
            }
            let mut line = 0;
            while line < lines {
                let rows = (lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out, mut scale) = ([room.scores.cast_const(); R], [room.state.o; R], [0.0; R]);
                    for r in 0..R {
                        a[r] = a[r].add((line + r) * P + from);
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

/// Sums of a block's products to scores of its lines.
struct NormalScores<'a> {
    room: &'a Room,
    lines: std::ops::Range<usize>,
    /// The tail of [`NormalQuery`] of line 0, and words from line to line.
    query: *const u32,
    stride: usize,
    deviations: *const f32,
}

impl Kernel for NormalScores<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let NormalScores { room: Room { sums, scores, .. }, lines, query, stride, deviations } = self;
        // SAFETY: 128 sums and 64 scores for each line, three words of its query.
        unsafe {
            for line in lines {
                let query = query.add(line * stride);
                let (upper, lower) = (S::word_values(S::splat_word(*query)), S::word_values(S::splat_word(*query.add(1))));
                let back = S::splat(f32::from_bits(*query.add(2)));
                let mut j = 0;
                while j < P {
                    let at = sums.add(2 * line * P + j).cast_const();
                    let high = S::add(S::word_values(S::words(at)), upper);
                    let low = S::add(S::word_values(S::words(at.add(P))), lower);
                    let sum = S::fma(high, S::splat(256.0), low);
                    S::store(scores.add(line * P + j), S::mul(S::mul(sum, back), S::load(deviations.add(j))));
                    j += S::N;
                }
            }
        }
    }
}

/// Softmax weights times the deviations of a block, as 16-bit numbers in two bytes, and what their products are multiplied by.
struct NormalWeights<'a> {
    room: &'a Room,
    lines: std::ops::Range<usize>,
    deviations: *const f32,
    unit: f32,
}

impl Kernel for NormalWeights<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let NormalWeights { room: Room { scores, weights, back, .. }, lines, deviations, unit } = self;
        // SAFETY: 64 scores for each line, 16 words for either of its bytes.
        unsafe {
            for line in lines {
                let from = scores.add(line * P);
                let (mut top, mut sum) = (S::splat(0.0), S::splat(0.0));
                let mut j = 0;
                while j < P {
                    let w = S::mul(S::load(from.add(j)), S::load(deviations.add(j)));
                    (top, sum) = (S::max(top, w), S::add(sum, w));
                    j += S::N;
                }
                let top = S::greatest(top);
                let factor = if top > 0.0 && top.is_finite() { 65535.0 / top } else { 0.0 };
                // A weight that is not finite makes the line so.
                *back.add(line) = if factor > 0.0 { top / 65535.0 / unit } else { 0.0 } + 0.0 * S::sum(sum);
                let factor = S::splat(factor);
                let mut j = 0;
                while j < P / 4 {
                    let weight = |byte: usize| {
                        let at = byte * (P / 4) + j;
                        S::to_words(S::mul(S::mul(S::load(from.add(at)), S::load(deviations.add(at))), factor))
                    };
                    let (a, b, c, d) = (weight(0), weight(1), weight(2), weight(3));
                    for (row, shift) in [(0, 8), (1, 0)] {
                        let [a, b, c, d] = [a, b, c, d].map(|w| S::field(w, shift, 0xff));
                        let quad = S::or_shifted::<16>(S::or_shifted::<8>(a, b), S::or_shifted::<8>(c, d));
                        S::store_words(weights.add((2 * line + row) * P / 4 + j), quad);
                    }
                    j += S::N;
                }
            }
        }
    }
}

/// Adds the sums of `width` channels to the latents of lines, scaled to the new maxima.
struct NormalLatents<'a> {
    room: &'a Room,
    lines: std::ops::Range<usize>,
    /// Those channels of line 0.
    to: *mut f32,
    v: usize,
    width: usize,
}

impl Kernel for NormalLatents<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let NormalLatents { room: Room { sums, back, scale, .. }, lines, to, v, width } = self;
        // SAFETY: channels that do not fill a vector are stored as the part they are; sums are whole vectors.
        unsafe {
            for line in lines {
                let (to, from) = (to.add(line * v), sums.add(2 * line * P).cast_const());
                let (back, scale) = (S::splat(*back.add(line)), S::splat(*scale.add(line)));
                let value = |j: usize, before: S::V| {
                    let sum = S::fma(S::word_values(S::words(from.add(j))), S::splat(256.0), S::word_values(S::words(from.add(P + j))));
                    S::fma(sum, back, S::mul(before, scale))
                };
                let mut j = 0;
                while j + S::N <= width {
                    S::store(to.add(j), value(j, S::load(to.add(j))));
                    j += S::N;
                }
                if j < width {
                    S::store_part(to.add(j), value(j, S::load_part(to.add(j), width - j)), width - j);
                }
            }
        }
    }
}

/// Asks for the bytes of a page while another is met.
struct Prefetch {
    from: *const u8,
    bytes: usize,
}

impl Kernel for Prefetch {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let mut at = 0;
        while at < self.bytes {
            // SAFETY: an address that is only asked for.
            unsafe { S::prefetch(self.from.wrapping_add(at)) }
            at += 64;
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
}

impl Kernel for Scores<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Room { sums, scores, back, bias, .. } = self.room;
        // SAFETY: 64 sums and scores for each line.
        unsafe {
            for line in 0..self.lines {
                let (back, bias) = (S::splat(*back.add(line)), S::splat(*bias.add(line)));
                let mut j = line * P;
                while j < (line + 1) * P {
                    S::store(scores.add(j), S::fma(S::word_values(S::words(sums.add(j).cast_const())), back, bias));
                    j += S::N;
                }
            }
        }
    }
}

/// `value_bias[line][g] = sum over positions of weight * minimum`, and the greatest weight of each line.
struct ValueBias<'a> {
    room: &'a Room,
    lines: usize,
    groups: usize,
}

impl Kernel for ValueBias<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let ValueBias { room: Room { halves, value_meta: [_, minima], value_bias, greatest, .. }, lines, groups } = self;
        let stride = groups.next_multiple_of(4);
        // SAFETY: 64 weights for each line and minima for each group.
        unsafe {
            for line in 0..lines {
                let weights = halves.add(line * P);
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
    g: usize,
    lines: usize,
}

impl Kernel for ValueWeights<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let ValueWeights { room: Room { halves, value_meta: [scales, _], weights, greatest, back, .. }, g, lines } = self;
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
                let from = halves.add(line * P);
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
