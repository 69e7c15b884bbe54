//! One parametrised decoder for every family: a step plan in, hidden states of the rows that want logits out.
//!
//! The plan's rows are carried out layer by layer. Rows that pass through all layers form one batch. Quanta of a
//! layer-by-layer prefill (decision 5) take their hidden states from the workspace pages and put them back, a
//! block of positions at a time, so that the scratch memory of a step is bounded by its token budget.

use crate::compress::LayerCompression;
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::Arena;
use crate::kv::layout::PageLayout;
use crate::model::adapted::{self, Adapters, NormPlace, Normed, Place, Worn};
use crate::model::config::ModelConfig;
use crate::model::delta::{Delta, Norm, Site};
use crate::model::draw::{Answer, Ask, NotFinite};
use crate::model::weights::{LayerWeights, ModelWeights, Projection, Weight};
use crate::ops::{Append, AttendRow, Heads, LayerView, Linear, Ops, RopeTable, SealJob, append};
use crate::step::{ExactStore, Logits, Move, Row, StepPlan};

const P: usize = PAGE_TOKENS as usize;

/// A cache profile made ready for one model: where its bytes lie, and its bases.
#[derive(Clone, Debug)]
pub struct ReadyProfile {
    pub layout: PageLayout,
    /// One per layer; empty for `full`.
    pub compression: Vec<LayerCompression>,
}

impl ReadyProfile {
    fn view(&self, layer: usize) -> LayerView<'_> {
        LayerView { layer, layout: &self.layout, compression: self.compression.get(layer) }
    }
}

/// A model with its scratch memory. `forward` is the only verb.
pub struct Decoder<'a> {
    config: &'a ModelConfig,
    weights: ModelWeights<'a>,
    rope: RopeTable,
    heads: Heads,
    /// Positions a layer-by-layer quantum computes at once.
    block: usize,
    scratch: Scratch,
}

/// Sees every query, key (before rope) and value a forward pass computes, for every position in every layer: calibration reads
/// the model through it.
pub trait Observer {
    /// A text begins: nothing that follows belongs to the one before.
    fn begin(&mut self) {}

    /// Sees what the projections of the coming layer see, after the norm: `[n][hidden]`.
    /// `residual` is what was normed.
    fn inputs(&mut self, layer: usize, residual: &[f32], inputs: &[f32]);

    /// `keys`, `values`: `[positions.len()][kv_channels]`.
    fn observe(&mut self, layer: usize, positions: &[u32], keys: &[f32], values: &[f32]);

    /// Sees the queries (before rope) of the positions it saw last: `[positions.len()][q_channels]`.
    fn queries(&mut self, layer: usize, queries: &[f32]);
}

/// Activations of one batch, kept from step to step.
#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    positions: Vec<u32>,
    /// Rows of the batch that go on to the rest of the last layer, and their states.
    wanted: Vec<usize>,
    wanted_x: Vec<f32>,
    wanted_normed: Vec<f32>,
    /// As wanted, with the plan row each belongs to, at the output head.
    heads: Vec<(usize, usize)>,
    logits: Vec<f32>,
    /// The parts of the batch, and of the wanted positions alone.
    parts: Vec<Part>,
    singles: Vec<Part>,
    /// Hidden states of a quantum.
    quantum: Vec<f32>,
    seals: Vec<SealJob>,
    /// Empty between calls: the memory of a list whose elements borrow from the plan.
    rows: Vec<AttendRow<'static>>,
}

/// The memory of a list for elements that live otherwise long: collecting from a list's own iterator keeps its place.
fn empty_of<'b>(mut rows: Vec<AttendRow<'_>>) -> Vec<AttendRow<'b>> {
    rows.clear();
    rows.into_iter().map(|_| unreachable!("the list is empty")).collect()
}

/// Part of a plan row that is in the current batch.
#[derive(Clone, Copy)]
struct Part {
    row: usize,
    /// First position, and how many.
    position: u32,
    n: usize,
    /// Where it begins in the batch.
    first: usize,
}

/// Takes the logits a plan asked for, or what it wants to know of them.
///
/// Whoever waits for it hears of each layer that begins on the host, for a step of many tokens may last minutes there.
///
/// The host always hands out logits. A device asks first: it hands out those of which [`Ask::Logits`] is said, and chooses and scores
/// tokens where the logits are.
pub trait LogitsSink {
    /// Logits `[vocab]` that follow `position` of a plan row; the slice is scratch, free to be changed.
    fn logits(&mut self, row: usize, position: u32, logits: &mut [f32]);

    /// What is wanted of the logits that follow `position` of a plan row.
    fn ask(&mut self, _row: usize, _position: u32) -> Ask<'_> {
        Ask::Logits
    }

    /// A layer of the pass begins.
    fn layer_begins(&mut self) {}

    /// What became of an ask for a token or a score.
    fn answer(&mut self, row: usize, position: u32, _answer: Result<Answer, NotFinite>) {
        unreachable!("row {row} asked for no more than logits after {position}");
    }
}

/// One forward pass: the plan, the cache it works on, and who carries it out.
pub struct Pass<'p> {
    pub plan: &'p StepPlan,
    pub arena: &'p mut Arena,
    pub profiles: &'p [ReadyProfile],
    /// The adapters its rows name.
    pub adapters: &'p Adapters<'p>,
    pub ops: &'p dyn Ops,
    pub sink: &'p mut dyn LogitsSink,
    /// Nobody, but in calibration.
    pub observer: Option<&'p mut dyn Observer>,
}

impl<'a> Decoder<'a> {
    /// A decoder for sequences of up to `positions`. `block` bounds the scratch memory of layer-by-layer prefill.
    pub fn new(config: &'a ModelConfig, weights: ModelWeights<'a>, positions: usize, block: usize) -> Self {
        let heads = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim, scale: config.attention_scale() };
        let block = block.next_multiple_of(P);
        Decoder { config, weights, rope: RopeTable::new(config, positions), heads, block, scratch: Scratch::default() }
    }

    /// Longest sequence it can run.
    pub fn positions(&self) -> usize {
        self.rope.cos.len() / self.rope.half
    }

    /// Turns of all positions.
    pub fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// Its weights.
    pub fn weights(&self) -> &ModelWeights<'a> {
        &self.weights
    }

    /// The facts of this model.
    pub fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// Carries out a plan: computes its rows, writes and moves their pages, and hands out the logits they want.
    ///
    /// One pass over the weights for all rows together. A step no larger than those before it allocates nothing.
    pub fn forward(&mut self, pass: &mut Pass<'_>) {
        let plan = pass.plan;
        let mut scratch = std::mem::take(&mut self.scratch);
        let layers = self.config.layers;
        let mut through = std::mem::take(&mut scratch.parts);
        into_parts(plan, layers, &mut through);
        let tokens: usize = through.iter().map(|p| p.n).sum();
        let mut x = std::mem::take(&mut scratch.x);
        x.resize(tokens * self.config.hidden, 0.0);
        for part in &through {
            let row = &plan.rows[part.row];
            let delta = adapted::adapter(pass.adapters, row.adapter);
            for (i, &token) in plan.tokens[row.tokens.clone()].iter().enumerate() {
                self.embed(token as usize, delta, slice_mut(&mut x, part.first + i, 1, self.config.hidden));
            }
        }
        for layer in 0..layers {
            pass.sink.layer_begins();
            if !through.is_empty() {
                self.layer(layer, pass, &through, &mut x, &mut scratch);
                self.moves(layer, pass, through.iter().map(|p| p.row), &mut scratch);
            }
            let quanta = plan.rows.iter().enumerate().filter(|(_, row)| row.layers.len() < layers && row.layers.contains(&(layer as u32)));
            for (index, row) in quanta {
                self.quantum(layer, pass, index, row, &mut scratch);
                self.moves(layer, pass, std::iter::once(index), &mut scratch);
            }
        }
        self.emit(pass, &through, &x, &mut scratch);
        (scratch.x, scratch.parts) = (x, through);
        self.scratch = scratch;
    }

    /// The vector of a token, into `x: [hidden]`.
    fn embed(&self, token: usize, delta: Option<&Delta>, x: &mut [f32]) {
        let own = delta.and_then(|d| d.embed.as_ref());
        own.and_then(|e| e.replace.as_ref()).unwrap_or(&self.weights.embed).row(token, x);
        if let Some(gain) = own.and_then(|e| e.gain.as_ref()) {
            x.iter_mut().zip(gain).for_each(|(x, g)| *x *= g);
        }
        if let Some(factors) = own.and_then(|e| e.factors.as_ref()) {
            factors.add(token, x);
        }
    }

    /// One layer of one row of a layer-by-layer prefill, block by block.
    fn quantum(&self, layer: usize, pass: &mut Pass<'_>, index: usize, row: &Row, scratch: &mut Scratch) {
        let plan = pass.plan;
        let hidden = self.config.hidden;
        let profile = &pass.profiles[row.profile.0 as usize];
        let offset = profile.layout.workspace_hidden();
        let pages = &plan.pages[row.exact.clone()];
        let base = (row.sealed.len() * P) as u32;
        let place = |position: u32| {
            let at = (position - base) as usize;
            (pages[at / P], offset + (at % P) * hidden * 4)
        };
        let mut x = std::mem::take(&mut scratch.quantum);
        let mut position = row.positions.start;
        while position < row.positions.end {
            let n = ((row.positions.end - position) as usize).min(self.block);
            x.resize(n * hidden, 0.0);
            for i in 0..n {
                let to = slice_mut(&mut x, i, 1, hidden);
                if layer == 0 {
                    let token = plan.tokens[row.tokens.start + (position - row.positions.start) as usize + i];
                    self.embed(token as usize, adapted::adapter(pass.adapters, row.adapter), to);
                } else {
                    let (page, at) = place(position + i as u32);
                    to.copy_from_slice(pass.arena.slice(page, at, hidden));
                }
            }
            let part = [Part { row: index, position, n, first: 0 }];
            self.layer(layer, pass, &part, &mut x, scratch);
            if layer + 1 == self.config.layers {
                self.emit(pass, &part, &x, scratch);
            } else {
                for i in 0..n {
                    let (page, at) = place(position + i as u32);
                    pass.arena.slice_mut(page, at, hidden).copy_from_slice(slice(&x, i, 1, hidden));
                }
            }
            position += n as u32;
        }
        scratch.quantum = x;
    }

    /// One decoder layer over a batch of parts, on the residual stream `x: [tokens][hidden]`.
    ///
    /// In the last layer only positions whose logits are wanted go beyond their keys and values; the others keep
    /// a state nobody reads.
    fn layer(&self, layer: usize, pass: &mut Pass<'_>, parts: &[Part], x: &mut [f32], s: &mut Scratch) {
        let (c, plan, ops) = (self.config, pass.plan, pass.ops);
        let w = &self.weights.layers[layer];
        let tokens = x.len() / c.hidden;
        let worn = worn(pass, parts);
        s.positions.clear();
        parts.iter().for_each(|p| s.positions.extend((0..p.n as u32).map(|i| p.position + i)));
        s.normed.resize(tokens * c.hidden, 0.0);
        let of = Normed { x, weight: &w.input_norm, eps: c.norm_eps, stride: c.hidden };
        adapted::rms_norm(ops, &of, NormPlace::Layer(layer, Norm::Input), &worn, &mut s.normed);
        if let Some(observer) = &mut pass.observer {
            observer.inputs(layer, x, &s.normed);
        }

        // Keys and values of every position.
        s.k.resize(tokens * c.kv_channels(), 0.0);
        s.v.resize(tokens * c.kv_channels(), 0.0);
        s.q.resize(tokens * c.q_channels(), 0.0);
        let last = layer + 1 == c.layers;
        s.wanted.clear();
        if last {
            s.wanted.extend(parts.iter().flat_map(|p| wanted(plan, p)));
        }
        let all = !last || s.wanted.len() == tokens || pass.observer.is_some();
        let [q, k, v] = [Site::Q, Site::K, Site::V].map(|site| Place::Layer(layer, site));
        if all {
            let mut jobs = [linear(&w.q, &mut s.q), linear(&w.k, &mut s.k), linear(&w.v, &mut s.v)];
            adapted::linear(ops, (&s.normed, tokens), &mut jobs, &[q, k, v], &worn);
        } else {
            let mut jobs = [linear(&w.k, &mut s.k), linear(&w.v, &mut s.v)];
            adapted::linear(ops, (&s.normed, tokens), &mut jobs, &[k, v], &worn);
        }
        if let Some(norm) = &w.k_norm {
            // In place through the attention buffer, which is free until attention runs.
            s.attended.resize(s.k.len(), 0.0);
            let of = Normed { x: &s.k, weight: norm, eps: c.norm_eps, stride: c.kv_channels() };
            adapted::rms_norm(ops, &of, NormPlace::Layer(layer, Norm::Key), &worn, &mut s.attended);
            std::mem::swap(&mut s.k, &mut s.attended);
        }
        if let Some(observer) = &mut pass.observer {
            observer.observe(layer, &s.positions, &s.k, &s.v);
        }
        ops.rope(&mut s.k, c.kv_heads, &self.rope, &s.positions);
        for part in parts {
            let row = &plan.rows[part.row];
            let profile = &pass.profiles[row.profile.0 as usize];
            let (at, n) = (part.first * c.kv_channels(), part.n * c.kv_channels());
            append(
                pass.arena,
                &Append {
                    view: profile.view(layer),
                    pages: &plan.pages[row.exact.clone()],
                    first_page: (row.sealed.len() * P) as u32,
                    exact_offset: exact_offset(profile, row.store, layer),
                    position: part.position,
                    k: &s.k[at..at + n],
                    v: &s.v[at..at + n],
                },
            );
        }

        if all {
            self.attend_and_mlp(layer, pass, (parts, &worn), x, s);
            return;
        }
        if s.wanted.is_empty() {
            return;
        }
        // The rest of the last layer, for the wanted positions alone: each is a part of one position.
        let picked = std::mem::take(&mut s.wanted);
        let mut picked_x = std::mem::take(&mut s.wanted_x);
        let mut picked_normed = std::mem::take(&mut s.wanted_normed);
        picked_x.clear();
        picked_normed.clear();
        for &i in &picked {
            picked_x.extend_from_slice(slice(x, i, 1, c.hidden));
            picked_normed.extend_from_slice(slice(&s.normed, i, 1, c.hidden));
        }
        let of = |i: usize| parts.iter().rev().find(|p| p.first <= i).expect("every position is in a part");
        let single = |(first, &i): (usize, &usize)| {
            let part = of(i);
            Part { row: part.row, position: part.position + (i - part.first) as u32, n: 1, first }
        };
        let mut singles = std::mem::take(&mut s.singles);
        singles.clear();
        singles.extend(picked.iter().enumerate().map(single));
        s.positions.clear();
        s.positions.extend(singles.iter().map(|p| p.position));
        s.q.resize(picked.len() * c.q_channels(), 0.0);
        let worn = self::worn(pass, &singles);
        adapted::linear(ops, (&picked_normed, picked.len()), &mut [linear(&w.q, &mut s.q)], &[q], &worn);
        self.attend_and_mlp(layer, pass, (&singles, &worn), &mut picked_x, s);
        for (from, &i) in picked.iter().enumerate() {
            slice_mut(x, i, 1, c.hidden).copy_from_slice(slice(&picked_x, from, 1, c.hidden));
        }
        (s.wanted, s.singles) = (picked, singles);
        (s.wanted_x, s.wanted_normed) = (picked_x, picked_normed);
    }

    /// From projected queries in `s.q` and positions in `s.positions` to the layer's output, added onto `x`.
    fn attend_and_mlp(&self, layer: usize, pass: &mut Pass<'_>, (parts, worn): (&[Part], &[Worn<'_>]), x: &mut [f32], s: &mut Scratch) {
        let (c, plan, ops) = (self.config, pass.plan, pass.ops);
        let w: &LayerWeights<'_> = &self.weights.layers[layer];
        let tokens = x.len() / c.hidden;
        if let Some(norm) = &w.q_norm {
            s.attended.resize(s.q.len(), 0.0);
            let of = Normed { x: &s.q, weight: norm, eps: c.norm_eps, stride: c.q_channels() };
            adapted::rms_norm(ops, &of, NormPlace::Layer(layer, Norm::Query), worn, &mut s.attended);
            std::mem::swap(&mut s.q, &mut s.attended);
        }
        if let Some(observer) = &mut pass.observer {
            observer.queries(layer, &s.q);
        }
        ops.rope(&mut s.q, c.heads, &self.rope, &s.positions);
        let mut rows = empty_of(std::mem::take(&mut s.rows));
        rows.extend(parts.iter().map(|part| {
            let row = &plan.rows[part.row];
            let profile = &pass.profiles[row.profile.0 as usize];
            AttendRow {
                view: profile.view(layer),
                first: part.first,
                n: part.n,
                position: part.position,
                sealed: &plan.pages[row.sealed.clone()],
                sinks: row.sinks,
                exact: &plan.pages[row.exact.clone()],
                exact_offset: exact_offset(profile, row.store, layer),
            }
        }));
        s.attended.resize(tokens * c.q_channels(), 0.0);
        ops.attend(pass.arena, self.heads, &self.rope, &rows, &s.q, &mut s.attended);
        s.rows = empty_of(rows);
        let at = |site| Place::Layer(layer, site);
        adapted::linear(ops, (&s.attended, tokens), &mut [residual(&w.o, x)], &[at(Site::O)], worn);

        s.normed.resize(tokens * c.hidden, 0.0);
        let of = Normed { x, weight: &w.post_norm, eps: c.norm_eps, stride: c.hidden };
        adapted::rms_norm(ops, &of, NormPlace::Layer(layer, Norm::Post), worn, &mut s.normed);
        s.gate.resize(tokens * c.intermediate, 0.0);
        s.up.resize(tokens * c.intermediate, 0.0);
        let mut jobs = [linear(&w.gate, &mut s.gate), linear(&w.up, &mut s.up)];
        adapted::linear(ops, (&s.normed, tokens), &mut jobs, &[at(Site::Gate), at(Site::Up)], worn);
        ops.silu_mul(&mut s.gate, &s.up);
        adapted::linear(ops, (&s.gate, tokens), &mut [residual(&w.down, x)], &[at(Site::Down)], worn);
    }

    /// Carries out the moves of `rows` in one layer.
    fn moves(&self, layer: usize, pass: &mut Pass<'_>, rows: impl Iterator<Item = usize> + Clone, s: &mut Scratch) {
        let plan = pass.plan;
        for (index, profile) in pass.profiles.iter().enumerate() {
            let layout = &profile.layout;
            // Seals of one profile go to the backend together, so that it can spread pages over threads.
            s.seals.clear();
            for row in rows.clone().map(|row| &plan.rows[row]).filter(|row| row.profile.0 as usize == index) {
                let from_offset = exact_offset(profile, row.store, layer);
                let exact = &plan.pages[row.exact.clone()];
                for m in &plan.moves[row.moves.clone()] {
                    match *m {
                        Move::Seal { from, to, skip } => {
                            let page = exact.iter().position(|&p| p == from).expect("a row seals one of its own exact pages");
                            let position = ((row.sealed.len() + page) * P) as u32;
                            s.seals.push(SealJob { from, from_offset, to, skip, position });
                        }
                        Move::Sinks { from, to, n } => {
                            copy_sinks(pass.arena, layout, (from, from_offset), (to, layer * layout.sinks_layer_bytes()), n)
                        }
                        Move::Keep { from, to, n: _ } => {
                            // Whole tiles: keys lie channel by channel, so the first positions are not contiguous.
                            let bytes = layout.exact_layer_bytes();
                            pass.arena.copy((from, from_offset), (to, layer * bytes), bytes);
                        }
                    }
                }
            }
            if !s.seals.is_empty() {
                pass.ops.seal(pass.arena, profile.view(layer), &self.rope, &s.seals);
            }
        }
    }

    /// Final norm and output head for the wanted positions of a batch, a bounded number at a time.
    fn emit(&self, pass: &mut Pass<'_>, parts: &[Part], x: &[f32], s: &mut Scratch) {
        const AT_ONCE: usize = 64;
        let (c, plan, ops) = (self.config, pass.plan, pass.ops);
        let mut heads = std::mem::take(&mut s.heads);
        heads.clear();
        heads.extend(parts.iter().flat_map(|p| wanted(plan, p).map(|i| (p.row, i))));
        for some in heads.chunks(AT_ONCE) {
            s.wanted_x.clear();
            some.iter().for_each(|&(_, i)| s.wanted_x.extend_from_slice(slice(x, i, 1, c.hidden)));
            s.wanted_normed.resize(s.wanted_x.len(), 0.0);
            let worn = adapted::worn(pass.adapters, some.iter().map(|&(row, _)| (plan.rows[row].adapter, 1)));
            let of = Normed { x: &s.wanted_x, weight: &self.weights.norm, eps: c.norm_eps, stride: c.hidden };
            adapted::rms_norm(ops, &of, NormPlace::Final, &worn, &mut s.wanted_normed);
            s.logits.resize(some.len() * c.vocab, 0.0);
            let head = Linear { w: self.weights.head().matrix(), inner: None, bias: None, accumulate: false, y: &mut s.logits };
            adapted::linear(ops, (&s.wanted_normed, some.len()), &mut [head], &[Place::Head], &worn);
            for (&(row, i), logits) in some.iter().zip(s.logits.chunks_exact_mut(c.vocab)) {
                let part = parts.iter().rev().find(|p| p.first <= i).expect("every position is in a part");
                pass.sink.logits(row, part.position + (i - part.first) as u32, logits);
            }
        }
        s.heads = heads;
    }
}

/// Rows that pass through all layers, as parts of one batch: those of one adapter beside each other, else in order.
fn into_parts(plan: &StepPlan, layers: usize, parts: &mut Vec<Part>) {
    parts.clear();
    let rows = plan.rows.iter().enumerate().filter(|(_, row)| row.layers.len() == layers);
    parts.extend(rows.map(|(index, row)| Part { row: index, position: row.positions.start, n: row.len(), first: 0 }));
    parts.sort_unstable_by_key(|p| (plan.rows[p.row].adapter, p.row));
    let mut first = 0;
    for part in parts {
        part.first = first;
        first += part.n;
    }
}

/// Which rows of a batch wear which adapter.
fn worn<'p>(pass: &Pass<'p>, parts: &[Part]) -> Vec<Worn<'p>> {
    adapted::worn(pass.adapters, parts.iter().map(|p| (pass.plan.rows[p.row].adapter, p.n)))
}

/// Rows of the batch whose logits the plan wants.
fn wanted(plan: &StepPlan, part: &Part) -> std::ops::Range<usize> {
    let row = &plan.rows[part.row];
    let ends = part.position + part.n as u32 == row.positions.end;
    match row.logits {
        Logits::All => part.first..part.first + part.n,
        Logits::Last if ends => part.first + part.n - 1..part.first + part.n,
        Logits::Last | Logits::None => 0..0,
    }
}

/// Where a layer begins in the pages a row appends to.
fn exact_offset(profile: &ReadyProfile, store: ExactStore, layer: usize) -> usize {
    match store {
        ExactStore::Exact => layer * profile.layout.exact_layer_bytes(),
        ExactStore::Workspace => 0,
    }
}

fn linear<'x>(p: &'x Projection<'_>, y: &'x mut [f32]) -> Linear<'x> {
    Linear { w: p.weight.matrix(), inner: p.inner.as_ref().map(Weight::matrix), bias: p.bias.as_deref(), accumulate: false, y }
}

fn residual<'x>(p: &'x Projection<'_>, y: &'x mut [f32]) -> Linear<'x> {
    Linear { accumulate: true, ..linear(p, y) }
}

fn slice(x: &[f32], row: usize, n: usize, width: usize) -> &[f32] {
    &x[row * width..(row + n) * width]
}

fn slice_mut(x: &mut [f32], row: usize, n: usize, width: usize) -> &mut [f32] {
    &mut x[row * width..(row + n) * width]
}

/// The first `n` positions of an exact tile into the narrower tiles of the sinks block, one layer.
fn copy_sinks(arena: &mut Arena, layout: &PageLayout, from: (PageAddr, usize), to: (PageAddr, usize), n: u32) {
    let (e, d, stride, n) = (layout.exact.bytes(), layout.head_dim, layout.sinks_stride(), n as usize);
    for head in 0..layout.kv_heads {
        let source = from.1 + 2 * head * d * P * e;
        let target = to.1 + 2 * head * d * stride * e;
        for channel in 0..d {
            arena.copy((from.0, source + channel * P * e), (to.0, target + channel * stride * e), n * e);
        }
        arena.copy((from.0, source + d * P * e), (to.0, target + d * stride * e), n * d * e);
    }
}
