//! Causal attention over pages, in the order that makes a row's bits its own.
//!
//! A query meets its tiles (the sinks block, sealed pages, exact pages) in order, in spans of [`SPAN`] tiles. Within
//! a span the softmax runs online: maximum, sum and output after each tile. Spans begin afresh and are merged in
//! order. A long decode shares its spans out over threads; a prompt takes all spans of a block of queries in one go;
//! both do the same arithmetic for each (query, head).
//!
//! A unit of work is a block of queries of one sequence and all query heads of one KV head: they share every tile,
//! so that it is widened or rebuilt once for all of them. A "line" below is one (query, head) of the unit.
//!
//! Sealed tiles of a basis over channels are met in `rebuild`, those of a frequency basis in [`super::latent`].

pub(super) mod rebuild;

use half::bf16;

use self::rebuild::Basis;
use super::pool::{Aligned, Shares, grow, scratch_back, scratch_take};
use super::simd::{Element, Kernel, Lanes, dispatch};
use super::softmax::{Scaled, Softmax, State};
use super::tile::{Product, Widen, by_rows};
use super::{Cpu, latent};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::Arena;
use crate::kv::layout::ExactType;
use crate::ops::{AttendRow, Heads, RopeTable, exact_head_bytes};

/// Positions of a page.
const P: usize = PAGE_TOKENS as usize;
/// Tiles of a span.
pub(super) const SPAN: usize = 16;
/// Lines a unit aims at, so that a widened tile is used often and everything stays in the second-level cache.
const LINES: usize = 96;
/// From so many lines a tile is worth widening into memory rather than in registers each time.
const WIDEN: usize = 13;
/// Multiply-adds below which waking other threads costs more than they save.
pub(super) const WORTH_SHARING: usize = 64 * 1024;

/// The arguments of `Ops::attend` but the output.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) arena: &'a Arena,
    pub(super) shape: Heads,
    pub(super) table: &'a RopeTable,
    pub(super) rows: &'a [AttendRow<'a>],
    pub(super) q: &'a [f32],
}

/// Memory kept from call to call.
#[derive(Default)]
pub(super) struct AttendScratch {
    latent: latent::LatentScratch,
    rows: Vec<RowPlan>,
    /// Spans computed apart, until they are merged.
    partials: Vec<Aligned>,
}

/// How one row is cut into units.
#[derive(Clone, Copy)]
struct RowPlan {
    /// Units before this row, and blocks (units of the merge) before it.
    units: usize,
    blocks: usize,
    /// Queries of a block, and number of blocks.
    queries: usize,
    query_blocks: usize,
    /// Spans of the last query.
    spans: usize,
    /// Floats of partials before this row.
    partials: usize,
}

/// `Ops::attend` on `cpu`.
pub(super) fn attend(cpu: &Cpu, call: &Call<'_>, out: &mut [f32]) {
    let Heads { heads, kv_heads, head_dim, .. } = call.shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads} KV heads");
    assert_eq!(call.q.len(), out.len(), "q and out differ in length");
    let group = heads / kv_heads;
    let lines = LINES / group;

    let mut scratch = cpu.attend.lock().unwrap_or_else(|e| e.into_inner());
    let AttendScratch { latent: latent_scratch, rows: plans, partials } = &mut *scratch;
    plans.clear();
    let (mut blocks, mut work, mut end, mut longest) = (0, 0, 0, 0);
    for row in call.rows {
        check(row, call, &mut end);
        if latent::absorbs(row) {
            // No unit of its own here.
            plans.push(RowPlan { units: 0, blocks, queries: 0, query_blocks: 0, spans: 0, partials: 0 });
            continue;
        }
        let queries = lines.clamp(1, row.n.max(1));
        let query_blocks = row.n.div_ceil(queries);
        let tiles = tiles(row, row.position as usize + row.n.max(1) - 1, row.view.layout.drops);
        let spans = tiles.div_ceil(SPAN);
        plans.push(RowPlan { units: 0, blocks, queries, query_blocks, spans, partials: 0 });
        blocks += query_blocks * kv_heads;
        work += 2 * row.n * heads * head_dim * tiles * P;
        longest = longest.max(spans);
    }
    assert!(end * heads * head_dim <= out.len(), "rows beyond q");
    latent::attend(cpu, call, latent_scratch, out);
    let threads = cpu.pool.threads();
    // Blocks alone keep the threads busy, or spans must be shared out too.
    let split = threads > 1 && longest > 1 && blocks < 4 * threads && work >= WORTH_SHARING;
    let (mut units, mut floats) = (0, 0);
    for plan in plans.iter_mut() {
        let spans = if split { plan.spans } else { 1 };
        (plan.units, plan.partials) = (units, floats);
        units += plan.query_blocks * kv_heads * spans;
        floats += plan.query_blocks * kv_heads * spans * State::floats(plan.queries * group, head_dim);
    }
    if split {
        grow(partials, floats);
    }
    let partials = Shares::new(partials.as_mut_slice());
    let (plans, out) = (&plans[..], Shares::new(out));
    let unit = |i: usize, phase: Phase| {
        let at = match phase {
            Phase::Merge => plans.partition_point(|p| p.blocks <= i) - 1,
            _ => plans.partition_point(|p| p.units <= i) - 1,
        };
        let (plan, row) = (plans[at], &call.rows[at]);
        let (block, span) = match phase {
            Phase::Merge => (i - plan.blocks, 0),
            Phase::Span => ((i - plan.units) / plan.spans, (i - plan.units) % plan.spans),
            Phase::Whole => (i - plan.units, 0),
        };
        // Later queries see more: they go first, so that the last unit to finish is a short one.
        let (kv_head, queries) = (block % kv_heads, plan.query_blocks - 1 - block / kv_heads);
        let first = queries * plan.queries;
        let each = State::floats(plan.queries * group, head_dim);
        let partial = partials.get().cast::<f32>().wrapping_add(plan.partials + (block * plan.spans + span) * each);
        let n = plan.queries.min(row.n - first);
        let skips = row.view.layout.drops;
        let parts = if phase == Phase::Merge { tiles(row, row.position as usize + first + n - 1, skips).div_ceil(SPAN) } else { 0 };
        let unit = Unit { call, row, kv_head, first, n, phase, skips, span, partial, each, parts, out: out.get() };
        // SAFETY: `Cpu` holds only instruction sets this machine has; rows were checked, no two of them overlap, and
        // units write lines, or partials, of their own.
        unsafe { dispatch(cpu.isa, unit) }
    };
    let all = |n: usize, phase: Phase| {
        let task = |i: usize| unit(i, phase);
        if work < WORTH_SHARING { (0..n).for_each(task) } else { cpu.pool.run(n, &task) }
    };
    if split {
        all(units, Phase::Span);
        all(blocks, Phase::Merge);
    } else {
        all(units, Phase::Whole);
    }
}

/// What a unit does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// All spans, and the result.
    Whole,
    /// One span, into its partial.
    Span,
    /// The result from the partials.
    Merge,
}

/// # Panics
/// When a row breaks the contract of `AttendRow`; memory safety rests on this. `end` is the end of the row before.
fn check(row: &AttendRow<'_>, call: &Call<'_>, end: &mut usize) {
    let (layout, shape) = (row.view.layout, call.shape);
    assert!(row.first >= *end, "rows of the batch overlap or are out of order");
    *end = row.first + row.n;
    assert_eq!((layout.kv_heads, layout.head_dim), (shape.kv_heads, shape.head_dim), "layout of another model");
    let sealed = row.sealed.len() * P;
    assert!(row.position as usize >= sealed, "a query stands inside the sealed pages");
    assert!(sealed + row.exact.len() * P >= row.position as usize + row.n, "too few exact pages");
    let sinks = layout.sinks as usize;
    assert!(row.sinks.is_none() || ((1..=P).contains(&sinks) && sealed > 0), "{sinks} sinks beside {sealed} sealed positions");
    if !row.sealed.is_empty() {
        assert_eq!(2 * call.table.half, layout.head_dim, "rope table of another model");
        assert!(row.view.compression.is_some(), "sealed pages without a basis");
        assert!(row.view.layer < layout.sealed.len(), "sealed pages in a layout without them");
    }
}

/// Tiles the query at `position` sees, without the sealed ones if those are skipped.
pub(super) fn tiles(row: &AttendRow<'_>, position: usize, skips: bool) -> usize {
    usize::from(row.sinks.is_some()) + position / P + 1 - if skips { row.sealed.len() } else { 0 }
}

/// A block of queries of one sequence, under one KV head.
pub(super) struct Unit<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) row: &'a AttendRow<'a>,
    pub(super) kv_head: usize,
    /// Queries, counted in the row.
    pub(super) first: usize,
    pub(super) n: usize,
    pub(super) phase: Phase,
    /// Sealed tiles are met elsewhere; spans count the others.
    pub(super) skips: bool,
    /// The span of [`Phase::Span`].
    pub(super) span: usize,
    /// The partial of `span`, or for [`Phase::Merge`] the first of `parts`, which are `each` floats apart.
    pub(super) partial: *mut f32,
    pub(super) each: usize,
    pub(super) parts: usize,
    pub(super) out: *mut f32,
}

/// Positions of one tile, ready to be multiplied: keys `[head_dim][key_step]`, values `[positions][value_step]`.
#[derive(Clone, Copy)]
struct Tile<B> {
    keys: *const B,
    key_step: usize,
    values: *const B,
    value_step: usize,
    /// Columns of the values: `head_dim`, or the rank of latents.
    width: usize,
    /// Distance in bytes to the keys of the next tile.
    ahead: isize,
}

/// Where a tile stands.
#[derive(Clone, Copy)]
struct Place {
    /// Position of lane 0, and lanes `[from, to)` that hold positions.
    base: usize,
    from: usize,
    to: usize,
}

/// Scratch of a unit, in floats.
struct Room {
    span: State,
    total: State,
    /// Latent outputs `[lines][latent_stride]`, and sums of the weights that went into them.
    latents: *mut f32,
    latent_stride: usize,
    weights: *mut f32,
    /// `[6][64]`.
    scores: *mut f32,
    keys: *mut f32,
    values: *mut f32,
    key_latents: *mut f32,
    cos: *mut f32,
    sin: *mut f32,
}

impl Kernel for Unit<'_> {
    unsafe fn run<S: Lanes>(self) {
        let d = self.call.shape.head_dim;
        let lines = self.n * self.group();
        let basis = match self.row.view.compression {
            Some(c) if !self.row.sealed.is_empty() && !self.skips => {
                Some(Basis::new(c, self.row.view.layout.sealed[self.row.view.layer], self.kv_head, d))
            }
            _ => None,
        };
        let pad = |n: usize| n.next_multiple_of(16);
        let (key_rank, value_rank) = basis.as_ref().map_or((0, 0), |b| (b.keys.ranks.len(), b.values.ranks.len()));
        let state = State::floats(lines, d);
        let sizes = [
            state,
            state,
            lines * pad(value_rank),
            pad(lines),
            6 * P,
            d * P,
            P * pad(d.max(value_rank)),
            key_rank * P,
            d / 2 * P,
            d / 2 * P,
        ];
        let mut buffer = scratch_take(sizes.iter().sum());
        let mut at = buffer.as_mut_ptr().cast::<f32>();
        let [a, b, latents, weights, scores, keys, values, key_latents, cos, sin] = sizes.map(|n| {
            let here = at;
            at = at.wrapping_add(n);
            here
        });
        // SAFETY: each part of the scratch has the size it is used with; the rest is passed on.
        unsafe {
            let span = if self.phase == Phase::Span { self.partial } else { a };
            let room = Room {
                span: State::at(span, lines, d),
                total: State::at(b, lines, d),
                latents,
                latent_stride: pad(value_rank),
                weights,
                scores,
                keys,
                values,
                key_latents,
                cos,
                sin,
            };
            let spans = tiles(self.row, self.position(self.n - 1), self.skips).div_ceil(SPAN);
            match self.phase {
                Phase::Span if self.span < spans => self.span::<S>(&room, basis.as_ref(), self.span),
                // A span only later queries of the row reach.
                Phase::Span => {}
                Phase::Whole => {
                    room.total.clear();
                    for span in 0..spans {
                        self.span::<S>(&room, basis.as_ref(), span);
                        room.total.merge::<S>(room.span);
                    }
                    self.finish::<S>(&room.total);
                }
                Phase::Merge => {
                    room.total.clear();
                    for part in 0..self.parts {
                        room.total.merge::<S>(State::at(self.partial.add(part * self.each), lines, d));
                    }
                    self.finish::<S>(&room.total);
                }
            }
        }
        scratch_back(buffer);
    }
}

/// Safety of the unsafe functions: as [`Kernel::run`] of [`Unit`], with the room it made.
impl Unit<'_> {
    fn group(&self) -> usize {
        self.call.shape.heads / self.call.shape.kv_heads
    }

    fn position(&self, query: usize) -> usize {
        self.row.position as usize + self.first + query
    }

    /// Offset in `q` and `out` of a line.
    fn offset(&self, line: usize) -> usize {
        let (group, shape) = (self.group(), self.call.shape);
        let row = self.row.first + self.first + line / group;
        (row * shape.heads + self.kv_head * group + line % group) * shape.head_dim
    }

    pub(super) unsafe fn finish<S: Lanes>(&self, total: &State) {
        let d = self.call.shape.head_dim;
        // SAFETY: the output row is this line's own.
        unsafe {
            for line in 0..total.lines {
                let (from, to) = (total.o.add(line * total.stride), self.out.add(self.offset(line)));
                S::enter(Scaled { from, to, n: d, by: 1.0 / *total.l.add(line) });
            }
        }
    }

    /// One span of all lines, into `room.span`.
    unsafe fn span<S: Lanes>(&self, room: &Room, basis: Option<&Basis<'_>>, span: usize) {
        let row = self.row;
        let (layout, d) = (row.view.layout, self.call.shape.head_dim);
        let sinks = usize::from(row.sinks.is_some());
        let n_sinks = if sinks == 1 { layout.sinks as usize } else { 0 };
        let last = tiles(row, self.position(self.n - 1), self.skips);
        let skipped = if self.skips { row.sealed.len() } else { 0 };
        let range = span * SPAN..last.min((span + 1) * SPAN);
        // SAFETY: passed on; tiles point into slices of the arena that hold them whole.
        unsafe {
            room.span.clear();
            room.latents.write_bytes(0, room.span.lines * room.latent_stride);
            room.weights.write_bytes(0, room.span.lines);
            for tile in range.clone() {
                if let (0, Some(page)) = (tile, row.sinks) {
                    let stride = layout.sinks_stride();
                    let at = row.view.layer * layout.sinks_layer_bytes() + 2 * self.kv_head * d * stride * layout.exact.bytes();
                    self.exact::<S>(room, (page, at, 0), stride, Place { base: 0, from: 0, to: n_sinks });
                    continue;
                }
                let page = tile - sinks + skipped;
                let base = page * P;
                match (row.sealed.get(page), basis) {
                    (Some(&addr), Some(basis)) => {
                        let from = if page == 0 { n_sinks } else { 0 };
                        if from < P {
                            self.sealed::<S>(room, basis, addr, Place { base, from, to: P });
                        }
                        if tile + 1 == range.end || page + 1 == row.sealed.len() {
                            self.expand::<S>(room, basis);
                        }
                    }
                    _ => {
                        let at = row.exact_offset + 2 * self.kv_head * exact_head_bytes(layout);
                        let here = page - row.sealed.len();
                        // Where the head of the next page is, to be fetched while this one is read.
                        let ahead = row.exact.get(here + 1).map_or(0, |next| next.byte() as isize - row.exact[here].byte() as isize);
                        self.exact::<S>(room, (row.exact[here], at, ahead), P, Place { base, from: 0, to: P });
                    }
                }
            }
        }
    }

    /// First line that sees any of a tile.
    fn first_line(&self, place: Place) -> usize {
        (place.base + place.from).saturating_sub(self.position(0)).min(self.n) * self.group()
    }

    /// Lanes of a tile that a line sees.
    fn visible(&self, place: Place, line: usize) -> usize {
        place.to.min(self.position(line / self.group()) + 1 - place.base)
    }

    /// A tile of exact positions: page, byte offset of the head in it, distance to the next tile; `stride` positions.
    unsafe fn exact<S: Lanes>(&self, room: &Room, (page, at, ahead): (PageAddr, usize, isize), stride: usize, place: Place) {
        let d = self.call.shape.head_dim;
        let line = self.first_line(place);
        let n = d * stride;
        // SAFETY: the slices hold keys and values of one head.
        unsafe {
            match self.row.view.layout.exact {
                ExactType::F32 => {
                    let data = self.call.arena.slice::<f32>(page, at, 2 * n);
                    let (keys, values) = data.split_at(n);
                    let (keys, values) = (keys.as_ptr(), values.as_ptr());
                    self.tile::<S, f32>(room, Tile { keys, key_step: stride, values, value_step: d, width: d, ahead }, place, line);
                }
                ExactType::Bf16 => {
                    let data = self.call.arena.slice::<bf16>(page, at, 2 * n);
                    let (keys, values) = data.split_at(n);
                    let (keys, values) = (keys.as_ptr(), values.as_ptr());
                    if room.span.lines - line < WIDEN {
                        self.tile::<S, bf16>(room, Tile { keys, key_step: stride, values, value_step: d, width: d, ahead }, place, line);
                    } else {
                        S::enter(Widen { from: keys, to: room.keys, n });
                        // Values past the last visible position may be anything; they are not read below either.
                        S::enter(Widen { from: values, to: room.values, n: d * self.visible(place, room.span.lines - 1) });
                        let tile = Tile {
                            keys: room.keys.cast_const(),
                            key_step: stride,
                            values: room.values.cast_const(),
                            value_step: d,
                            width: d,
                            ahead: 0,
                        };
                        self.tile::<S, f32>(room, tile, place, line);
                    }
                }
            }
        }
    }

    /// All lines from `line` meet a tile of exact values.
    unsafe fn tile<S: Lanes, B: Element>(&self, room: &Room, tile: Tile<B>, place: Place, line: usize) {
        let mut line = line;
        // SAFETY: passed on.
        unsafe {
            while line < room.span.lines {
                let rows = (room.span.lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (scale, _) = self.softmax::<S, B, R>(room, &tile, place, line);
                    self.gather::<S, B, R>(room, &tile, place, line, scale);
                });
                line += rows;
            }
        }
    }

    /// Scores of `R` lines into weights in `room.scores`; maxima and sums move on. Returns what outputs so far
    /// are to be scaled by, and the sums of the weights.
    unsafe fn softmax<S: Lanes, B: Element, const R: usize>(
        &self,
        room: &Room,
        tile: &Tile<B>,
        place: Place,
        line: usize,
    ) -> ([f32; R], [f32; R]) {
        // SAFETY: scores have 64 floats a line, no fewer than a tile has positions; `q` rows were checked.
        unsafe {
            let mut q = [self.call.q.as_ptr(); R];
            let mut scores = [room.scores; R];
            for r in 0..R {
                q[r] = q[r].add(self.offset(line + r));
                scores[r] = scores[r].add(r * P);
            }
            let width = self.visible(place, line + R - 1).next_multiple_of(16);
            let product = Product { a: q, a_step: 1, b: tile.keys, b_step: tile.key_step, n: self.call.shape.head_dim, ahead: tile.ahead };
            product.onto::<S>(scores, width, None);

            let (mut scale, mut sums, mut to) = ([0.0; 16], [0.0; 16], [0; 6]);
            for r in 0..R {
                to[r] = self.visible(place, line + r);
            }
            S::enter(Softmax {
                scores: room.scores,
                width,
                lines: R,
                from: place.from,
                to,
                gain: self.call.shape.scale,
                m: room.span.m.add(line),
                l: room.span.l.add(line),
                scale: &mut scale,
                sums: &mut sums,
            });
            (std::array::from_fn(|r| scale[r]), std::array::from_fn(|r| sums[r]))
        }
    }

    /// Adds the weighted values of `R` lines to their outputs.
    unsafe fn gather<S: Lanes, B: Element, const R: usize>(&self, room: &Room, tile: &Tile<B>, place: Place, line: usize, scale: [f32; R]) {
        // SAFETY: outputs have `head_dim` floats a line.
        unsafe {
            let mut out = [room.span.o; R];
            for r in 0..R {
                out[r] = out[r].add((line + r) * room.span.stride);
            }
            self.values::<S, B, R>(room, tile, place, line, (out, scale));
        }
    }

    /// `out[r] = out[r] * scale[r] + weights[r] . values`, over the positions line `r` sees and no others.
    unsafe fn values<S: Lanes, B: Element, const R: usize>(
        &self,
        room: &Room,
        tile: &Tile<B>,
        place: Place,
        line: usize,
        (out, scale): ([*mut f32; R], [f32; R]),
    ) {
        // SAFETY: weights have 64 floats a line; values are there up to the last visible position.
        unsafe {
            let mut a = [room.scores.cast_const(); R];
            for r in 0..R {
                a[r] = a[r].add(r * P + place.from);
            }
            let b = tile.values.wrapping_add(place.from * tile.value_step);
            let shared = self.visible(place, line).saturating_sub(place.from);
            let product = Product { a, a_step: 1, b, b_step: tile.value_step, n: shared, ahead: tile.ahead };
            product.onto::<S>(out, tile.width, Some(scale));
            // Later queries of the block see a few positions more. A product with a zero weight would do for
            // finite values, but not for what lies beyond them.
            for r in 0..R {
                let n = self.visible(place, line + r).saturating_sub(place.from) - shared;
                if n > 0 {
                    let product = Product {
                        a: [a[r].add(shared)],
                        a_step: 1,
                        b: b.wrapping_add(shared * tile.value_step),
                        b_step: tile.value_step,
                        n,
                        ahead: 0,
                    };
                    product.onto::<S>([out[r]], tile.width, Some([1.0]));
                }
            }
        }
    }
}
