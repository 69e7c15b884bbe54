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
//! Keys of a sealed tile are rebuilt and turned by rope. Values are not: the softmax sums their latents, and the sum
//! is expanded once, after the last sealed tile of the span. Sealed tiles of a frequency basis are met in `latent`.

use half::{bf16, f16};

use super::codes::{Codes, Meaning, Numbers};
use super::pool::{Aligned, Shares, grow, scratch_back, scratch_take};
use super::rows::turned;
use super::simd::{Element, Kernel, Lanes, dispatch};
use super::tile::{Product, Widen, by_rows};
use super::{Cpu, latent};
use crate::compress::{Group, KeyMap, LayerCompression, Projection};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::Arena;
use crate::kv::layout::{ExactType, Quantiser, SealedLayer};
use crate::ops::{AttendRow, Heads, RopeTable, exact_head_bytes};
use crate::quant::{Order, levels};

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

/// Running softmax of some lines: maxima, sums, and outputs `[lines][stride]`.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) m: *mut f32,
    pub(super) l: *mut f32,
    pub(super) o: *mut f32,
    pub(super) stride: usize,
    lines: usize,
}

impl State {
    pub(super) const fn floats(lines: usize, width: usize) -> usize {
        2 * lines.next_multiple_of(16) + lines * width.next_multiple_of(16)
    }

    /// # Safety
    /// `at` is valid for [`State::floats`].
    pub(super) unsafe fn at(at: *mut f32, lines: usize, width: usize) -> State {
        let each = lines.next_multiple_of(16);
        State { m: at, l: at.wrapping_add(each), o: at.wrapping_add(2 * each), stride: width.next_multiple_of(16), lines }
    }

    /// Lines `[first, first + n)`.
    pub(super) fn part(&self, first: usize, n: usize) -> State {
        let o = self.o.wrapping_add(first * self.stride);
        State { m: self.m.wrapping_add(first), l: self.l.wrapping_add(first), o, stride: self.stride, lines: n }
    }

    /// # Safety
    /// As promised by [`State::at`].
    pub(super) unsafe fn clear(&self) {
        // SAFETY: the ranges of `at`.
        unsafe {
            for i in 0..self.lines {
                *self.m.add(i) = f32::NEG_INFINITY;
                *self.l.add(i) = 0.0;
            }
            self.o.write_bytes(0, self.lines * self.stride);
        }
    }

    /// Merges the next span of the same lines into this.
    ///
    /// # Safety
    /// Both as promised by [`State::at`], and apart.
    pub(super) unsafe fn merge<S: Lanes>(self, next: State) {
        // SAFETY: passed on.
        unsafe { S::enter(Merge { to: self, next }) }
    }
}

/// [`State::merge`].
struct Merge {
    to: State,
    next: State,
}

impl Kernel for Merge {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Merge { to: State { m, l, o, stride, lines }, next } = self;
        // SAFETY: lines and strides are the same; strides are whole vectors.
        unsafe {
            for i in 0..lines {
                let (a, b) = (*m.add(i), *next.m.add(i));
                if b == f32::NEG_INFINITY && *next.l.add(i) == 0.0 {
                    // The line saw nothing in that span.
                    continue;
                }
                let top = if a > b { a } else { b };
                let mut scale = [0.0f32; 16];
                (scale[0], scale[1]) = (a - top, b - top);
                S::store(scale.as_mut_ptr(), S::exp(S::load(scale.as_ptr())));
                *m.add(i) = top;
                *l.add(i) = *l.add(i) * scale[0] + *next.l.add(i) * scale[1];
                let (a, b) = (S::splat(scale[0]), S::splat(scale[1]));
                let mut j = 0;
                while j < stride {
                    let (to, from) = (o.add(i * stride + j), next.o.add(i * stride + j));
                    S::store(to, S::fma(S::load(from), b, S::mul(S::load(to), a)));
                    j += S::N;
                }
            }
        }
    }
}

/// `to[j] = from[j] * by` for `n` elements; `from` may be `to`.
struct Scaled {
    from: *const f32,
    to: *mut f32,
    n: usize,
    by: f32,
}

impl Kernel for Scaled {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Scaled { from, to, n, by } = self;
        // SAFETY: `j + N <= n` in the loop, the rest after it.
        unsafe {
            let by = S::splat(by);
            let mut j = 0;
            while j + S::N <= n {
                S::store(to.add(j), S::mul(S::load(from.add(j)), by));
                j += S::N;
            }
            if j < n {
                S::store_part(to.add(j), S::mul(S::load_part(from.add(j), n - j), by), n - j);
            }
        }
    }
}

/// A tile's scores of some lines, and where their softmax stands.
pub(super) struct Softmax<'a> {
    /// `[lines][64]`: scores of `width` positions become weights. At most 6 lines.
    pub(super) scores: *mut f32,
    pub(super) width: usize,
    pub(super) lines: usize,
    /// Line `r` sees positions `[from, to[r])`.
    pub(super) from: usize,
    pub(super) to: [usize; 6],
    pub(super) gain: f32,
    /// Maxima and sums of the lines, to be moved on.
    pub(super) m: *mut f32,
    pub(super) l: *mut f32,
    /// What outputs so far are to be scaled by, and sums of the weights.
    pub(super) scale: &'a mut [f32; 16],
    pub(super) sums: &'a mut [f32; 16],
}

impl Kernel for Softmax<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: `width` is a whole number of vectors, no more than 64.
        unsafe {
            let gain = S::splat(self.gain);
            let mut tops = [0.0f32; 6];
            self.scale.fill(0.0);
            for r in 0..self.lines {
                let scores = self.scores.add(r * P);
                let to = self.to[r];
                let whole = self.from == 0 && to >= self.width;
                let mut top = S::splat(f32::NEG_INFINITY);
                let mut j = 0;
                while j < self.width {
                    let mut v = S::mul(S::load(scores.add(j)), gain);
                    if !whole {
                        v = S::keep(v, self.from.saturating_sub(j).min(S::N), to.saturating_sub(j).min(S::N));
                    }
                    S::store(scores.add(j), v);
                    top = S::max(top, v);
                    j += S::N;
                }
                let (before, here) = (*self.m.add(r), S::greatest(top));
                tops[r] = if here > before { here } else { before };
                self.scale[r] = before - tops[r];
                *self.m.add(r) = tops[r];
            }
            let scale = self.scale.as_mut_ptr();
            S::store(scale, S::exp(S::load(scale)));
            for r in 0..self.lines {
                let scores = self.scores.add(r * P);
                let top = S::splat(tops[r]);
                let mut sum = S::splat(0.0);
                let mut j = 0;
                while j < self.width {
                    let v = S::exp(S::sub(S::load(scores.add(j)), top));
                    S::store(scores.add(j), v);
                    sum = S::add(sum, v);
                    j += S::N;
                }
                self.sums[r] = S::sum(sum);
                *self.l.add(r) = *self.l.add(r) * self.scale[r] + self.sums[r];
            }
        }
    }
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

/// What a sealed tile is rebuilt with: the groups its KV head belongs to.
struct Basis<'a> {
    keys: &'a Group,
    key_mean: &'a [f32],
    /// First channel of the head in the keys' group.
    key_channel: usize,
    values: &'a Group,
    value_mean: &'a [f32],
    value_channel: usize,
    layer: SealedLayer,
}

/// The group of a projection that the head at `channel` belongs to, the head's mean, and its first channel in the group.
pub(super) fn group_of(p: &Projection, channel: usize, d: usize) -> (&Group, &[f32], usize) {
    let group = p.groups.iter().find(|g| g.channels.contains(&channel)).unwrap_or_else(|| panic!("channel {channel} has no group"));
    assert!(channel + d <= group.channels.end, "a group of channels ends inside a head");
    assert_eq!(group.up.len(), group.ranks.len() * group.channels.len(), "up is not [ranks][channels]");
    (group, &p.mean[channel..channel + d], channel - group.channels.start)
}

impl<'a> Basis<'a> {
    fn new(compression: &'a LayerCompression, layer: SealedLayer, kv_head: usize, d: usize) -> Self {
        let KeyMap::Channels(keys) = &compression.keys else { panic!("keys of a frequency basis are never rebuilt") };
        let (keys, key_mean, key_channel) = group_of(keys, kv_head * d, d);
        let (values, value_mean, value_channel) = group_of(&compression.values, kv_head * d, d);
        assert!(keys.ranks.end <= layer.keys.rank && values.ranks.end <= layer.values.rank, "basis wider than the page");
        Basis { keys, key_mean, key_channel, values, value_mean, value_channel, layer }
    }
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

    /// A sealed tile: keys rebuilt, values as latents.
    unsafe fn sealed<S: Lanes>(&self, room: &Room, basis: &Basis<'_>, page: PageAddr, place: Place) {
        let rank = basis.values.ranks.len();
        let (keys, values) = (room.keys.cast_const(), room.values.cast_const());
        let tile = Tile { keys, key_step: P, values, value_step: room.latent_stride, width: rank, ahead: 0 };
        // SAFETY: the room has a tile of keys and of latents, and outputs and latents for every line.
        unsafe {
            self.rebuild::<S>(room, basis, page, place);
            self.value_latents::<S>(room, basis, page, place);
            let mut line = 0;
            while line < room.span.lines {
                let rows = (room.span.lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (scale, sums) = self.softmax::<S, f32, R>(room, &tile, place, line);
                    let mut out = [room.latents; R];
                    for r in 0..R {
                        out[r] = out[r].add((line + r) * room.latent_stride);
                        let weight = room.weights.add(line + r);
                        *weight = *weight * scale[r] + sums[r];
                        let o = room.span.o.add((line + r) * room.span.stride);
                        S::enter(Scaled { from: o, to: o, n: room.span.stride, by: scale[r] });
                    }
                    self.values::<S, f32, R>(room, &tile, place, line, (out, scale));
                });
                line += rows;
            }
        }
    }

    /// Keys of a sealed page into `room.keys`, turned to their positions.
    unsafe fn rebuild<S: Lanes>(&self, room: &Room, basis: &Basis<'_>, page: PageAddr, place: Place) {
        let (arena, layer, group) = (self.call.arena, basis.layer, basis.keys);
        let d = self.call.shape.head_dim;
        let rank = group.ranks.len();
        // SAFETY: the room has `[rank][64]` latents, `[head_dim][64]` keys and two `[head_dim / 2][64]` tables; the
        // basis was checked to have `[rank][channels]` and the head's channels.
        unsafe {
            if layer.keys.bits == 16 {
                let codes = arena.slice::<f16>(page, layer.keys.codes + group.ranks.start * 2 * P, rank * P);
                S::enter(Widen { from: codes.as_ptr(), to: room.key_latents, n: rank * P });
            } else {
                let codes = key_codes(arena, page, &layer);
                let meta = arena.slice::<f16>(page, layer.keys.meta, layer.key_meta_bytes() / 2);
                let mut scales = [0.0f32; P];
                if layer.keys.quantiser == Quantiser::Hadamard && layer.keys.rank > 0 {
                    let block = group.ranks.start / (layer.keys.rank / layer.blocks);
                    let (_, unit) = levels(layer.keys.bits);
                    scales.iter_mut().zip(&meta[block * P..][..P]).for_each(|(to, s)| *to = s.to_f32() / unit);
                }
                for (r, i) in group.ranks.clone().enumerate() {
                    let meaning = match layer.keys.quantiser {
                        Quantiser::Affine => Meaning::Affine { scale: meta[i].to_f32(), min: meta[layer.keys.rank + i].to_f32() },
                        Quantiser::Hadamard => Meaning::NormalEach { scales: scales.as_ptr() },
                    };
                    S::enter(Numbers { codes, i, lane: 0, width: P, meaning, to: room.key_latents.add(r * P) });
                }
            }
            let up = group.up.as_ptr().add(basis.key_channel);
            let mut c = 0;
            while c < d {
                let rows = (d - c).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out) = ([up.add(c); R], [room.keys.add(c * P); R]);
                    for r in 0..R {
                        (a[r], out[r]) = (a[r].add(r), out[r].add(r * P));
                        std::slice::from_raw_parts_mut(out[r], P).fill(basis.key_mean[c + r]);
                    }
                    let b = room.key_latents.cast_const();
                    let product = Product { a, a_step: group.channels.len(), b, b_step: P, n: rank, ahead: 0 };
                    product.onto::<S>(out, P, Some([1.0; R]));
                });
                c += rows;
            }
            turn_tables(self.call.table, place.base, room.cos, room.sin);
            S::enter(TurnTile { keys: room.keys, n: d / 2 * P, cos: room.cos, sin: room.sin });
        }
    }

    /// Value latents of a sealed page into `room.values: [64][latent_stride]`, from `place.from` on.
    unsafe fn value_latents<S: Lanes>(&self, room: &Room, basis: &Basis<'_>, page: PageAddr, place: Place) {
        let (arena, layer, ranks) = (self.call.arena, basis.layer, &basis.values.ranks);
        for p in place.from..P {
            // SAFETY: the room has `latent_stride`, no less than the rank, for each position.
            let to = unsafe { room.values.add(p * room.latent_stride) };
            if layer.values.bits == 16 {
                let codes = arena.slice::<f16>(page, layer.values.codes + (p * layer.values.rank + ranks.start) * 2, ranks.len());
                // SAFETY: as above.
                unsafe { S::enter(Widen { from: codes.as_ptr(), to, n: ranks.len() }) }
                continue;
            }
            let codes = value_codes(arena, page, &layer);
            let (groups, width) = (layer.value_groups(), layer.value_group());
            let meta = arena.slice::<f16>(page, layer.values.meta, layer.value_meta_bytes() / 2);
            let mut lane = ranks.start;
            while lane < ranks.end {
                let group = lane / width;
                let next = ranks.end.min((group + 1) * width);
                let scale = meta[group * P + p].to_f32();
                let meaning = match layer.values.quantiser {
                    Quantiser::Affine => Meaning::Affine { scale, min: meta[(groups + group) * P + p].to_f32() },
                    Quantiser::Hadamard => Meaning::Normal { scale: scale / levels(layer.values.bits).1 },
                };
                let to = to.wrapping_add(lane - ranks.start);
                // SAFETY: the codes have every lane of the ranks, and `to` room for them.
                unsafe { S::enter(Numbers { codes, i: p, lane, width: next - lane, meaning, to }) };
                lane = next;
            }
        }
    }

    /// Adds what the latents of the span stand for to its outputs.
    unsafe fn expand<S: Lanes>(&self, room: &Room, basis: &Basis<'_>) {
        let (d, group) = (self.call.shape.head_dim, basis.values);
        // SAFETY: the basis was checked to have `[rank][channels]` and the head's channels.
        unsafe {
            let b = group.up.as_ptr().add(basis.value_channel);
            let mut line = 0;
            while line < room.span.lines {
                let rows = (room.span.lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out) = ([room.latents.cast_const(); R], [room.span.o; R]);
                    let mut weights = [room.weights.cast_const(); R];
                    for r in 0..R {
                        a[r] = a[r].add((line + r) * room.latent_stride);
                        out[r] = out[r].add((line + r) * room.span.stride);
                        weights[r] = weights[r].add(line + r);
                    }
                    let product = Product { a, a_step: 1, b, b_step: group.channels.len(), n: group.ranks.len(), ahead: 0 };
                    product.onto::<S>(out, d, Some([1.0; R]));
                    let mean = Product { a: weights, a_step: 0, b: basis.value_mean.as_ptr(), b_step: 0, n: 1, ahead: 0 };
                    mean.onto::<S>(out, d, Some([1.0; R]));
                });
                line += rows;
            }
        }
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

/// Turns keys, `n` elements in either half, by tables that lie alike.
struct TurnTile {
    keys: *mut f32,
    n: usize,
    cos: *const f32,
    sin: *const f32,
}

impl Kernel for TurnTile {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let mut j = 0;
        while j < self.n {
            // SAFETY: `n` is a whole number of vectors.
            unsafe {
                let (a, b) = (self.keys.add(j), self.keys.add(self.n + j));
                let (x, y) = turned::<S>(S::load(a), S::load(b), S::load(self.cos.add(j)), S::load(self.sin.add(j)));
                S::store(a, x);
                S::store(b, y);
            }
            j += S::N;
        }
    }
}

/// Cosines and sines of the positions from `base` on, `[half][64]`, so that lanes are positions.
///
/// # Safety
/// Both outputs are valid for `half * 64`.
pub(super) unsafe fn turn_tables(table: &RopeTable, base: usize, cos: *mut f32, sin: *mut f32) {
    let half = table.half;
    for p in 0..P {
        let at = (base + p) * half;
        for (i, (&c, &s)) in table.cos[at..at + half].iter().zip(&table.sin[at..at + half]).enumerate() {
            // SAFETY: `i < half`.
            unsafe {
                *cos.add(i * P + p) = c;
                *sin.add(i * P + p) = s;
            }
        }
    }
}
