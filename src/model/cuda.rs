//! The decoder on a CUDA device: the same plan, carried out by kernels on weights and a cache that lie there.
//!
//! The host uploads what a step is about (tokens, positions, page tables, spans, who wears which adapter, how to choose), asks for its
//! kernels in order, and reads back the tokens that were chosen; logits only where they are asked for. Rows that pass through all layers
//! form one batch, or several where they wear more adapters than there is room for at once; quanta of a layer-by-layer prefill go block
//! by block, as on the host. `placed` is the model as it lies there, `scratch` what passes through its layers, `linear` the linear layers of
//! a batch, `adapters` the copies of adapters on the device.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex};
use crate::kv::layout::PageLayout;
use crate::model::choices::Choices;
use crate::model::config::ModelConfig;
use crate::model::cuda::adapters::{Arrived, DeviceAdapter, DeviceAdapters, Given, head_place, place};
use crate::model::cuda::linear::{DeviceProjection, Input, LinearJob, LinearLayer, Normed, Worn, gate_and_up, gates_by_library, project};
use crate::model::cuda::placed::DeviceModel;
use crate::model::cuda::scratch::Scratch;
use crate::model::decoder::{LogitsSink, ReadyProfile};
use crate::model::delta::{Delta, Norm, Site};
use crate::model::weights::ModelWeights;
use crate::ops::cuda::attend::{ARENA_SLACK, Append, AttendLayer, DeviceWork, PARTIAL_MOST, Work};
use crate::ops::cuda::linear::{Job, Mode};
use crate::ops::cuda::maps::DeviceMaps;
use crate::ops::cuda::prefill::Prefill;
use crate::ops::cuda::rows::{Rope, SinksJob};
use crate::ops::cuda::seal::{SealedJob, latents_between, seal};
use crate::ops::cuda::{CudaError, Device, Memory, Part, Recording};
use crate::ops::{AttendRow, LayerView, RopeTable};
use crate::step::{ExactStore, Logits, Move, Row, StepPlan};

pub mod adapters;
mod linear;
mod placed;
mod scratch;

pub use placed::{CudaRefusal, check_model, check_profile, layer_products, try_kernels};

const P: usize = PAGE_TOKENS as usize;
/// Rows whose logits are on the device at once.
const HEADS_AT_ONCE: usize = 64;
/// Batches that are kept as recorded.
const RECORDINGS: usize = 64;
/// Bytes of tables of pages and spans, of what is asked of logits, and of recordings; they grow with batches.
const TABLE_BYTES: u64 = 256 << 20;
/// Queries of a row from which they are met as a chunk.
const CHUNK: usize = 2;
/// Sites whose outputs become one by SiLU, at once where no adapter changes them.
const MLP: u8 = 1 << Site::Gate as u8 | 1 << Site::Up as u8;

/// Rows of one profile whose exact pages lie alike, side by side in a batch.
struct Group {
    profile: ProfileIndex,
    store: ExactStore,
    /// Positions of the batch.
    first: usize,
    n: usize,
    /// What is met position by position, and chunk by chunk.
    work: DeviceWork,
    prefill: Prefill,
}

/// Part of a plan row that is in a batch.
#[derive(Clone, Copy)]
struct Span {
    row: usize,
    position: u32,
    n: usize,
    first: usize,
}

/// A model, its cache and its scratch memory on a device. [`CudaDecoder::forward`] is the only verb.
pub struct CudaDecoder {
    device: Arc<Device>,
    model: DeviceModel,
    arena: Memory<u8>,
    block: usize,
    adapters: DeviceAdapters,
    /// Those of the batch at hand; who wears them, in it and among the rows that were picked of it.
    wearing: Vec<(AdapterGeneration, Arc<DeviceAdapter>)>,
    worn: Worn,
    picked_worn: Worn,
    scratch: Scratch,
    /// What is asked of the logits at hand.
    choices: Choices,
    /// Those of the batch at hand come first.
    groups: Vec<Group>,
    /// None of theirs, but whose memory between launches all of them use.
    work: DeviceWork,
    prefill: Prefill,
    used: usize,
    /// By what was asked for; none of what was asked for once.
    recordings: HashMap<Vec<u64>, Option<Recording>>,
}

impl CudaDecoder {
    /// Takes weights, rope and the maps of `profiles` to the device, and reserves an arena of `arena_bytes` there; adapters may take
    /// `adapter_bytes` beside it. `block` bounds the scratch memory of layer-by-layer prefill.
    ///
    /// # Errors
    /// Where the model or a profile is not served on a device, or the device has no room.
    pub fn new(
        device: Arc<Device>,
        config: &'static ModelConfig,
        weights: &ModelWeights<'_>,
        rope: &RopeTable,
        profiles: Vec<ReadyProfile>,
        (arena_bytes, adapter_bytes, block): (u64, u64, usize),
    ) -> Result<Self, CudaRefusal> {
        let mut decoder = Self::without_cache(device, config, weights, rope, profiles, (block, adapter_bytes > 0))?;
        decoder.give(arena_bytes, adapter_bytes)?;
        Ok(decoder)
    }

    /// Reserves an arena of so many bytes, in the place of the one there was; adapters may take `adapter_bytes` beside it.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn give(&mut self, arena_bytes: u64, adapter_bytes: u64) -> Result<(), CudaRefusal> {
        self.adapters.set_budget(adapter_bytes);
        self.arena = self.device.alloc::<u8>(0)?;
        self.arena = self.device.alloc::<u8>(usize::try_from(arena_bytes).unwrap_or(usize::MAX).saturating_add(ARENA_SLACK))?;
        Ok(())
    }

    /// As [`CudaDecoder::new`], with no arena yet, and with room for a step of `tokens`, whose rows may wear adapters where `adapted`. What
    /// steps take beyond that is to be left free: [`CudaDecoder::further_bytes`].
    ///
    /// # Errors
    /// As it has.
    pub fn without_cache(
        device: Arc<Device>,
        config: &'static ModelConfig,
        weights: &ModelWeights<'_>,
        rope: &RopeTable,
        profiles: Vec<ReadyProfile>,
        (tokens, adapted): (usize, bool),
    ) -> Result<Self, CudaRefusal> {
        let d = &device;
        let model = DeviceModel::new(d, config, weights, rope, profiles)?;
        let (mut scratch, mut prefill) = (Scratch::new(d)?, Prefill::new(d)?);
        scratch.reserve(&model, tokens, (adapted, model.gates_apart(d, tokens)))?;
        scratch.reserve_heads(&model, HEADS_AT_ONCE)?;
        let layers = model.profiles.iter().flat_map(|p| &p.layout.sealed);
        if let Some(latents) = layers.map(|l| l.keys.rank + l.values.rank).max() {
            scratch.latents.reserve(latents_between(tokens.div_ceil(P), latents))?;
            prefill.reserve(model.heads, tokens)?;
        }
        let decoder = CudaDecoder {
            arena: d.alloc(0)?,
            block: tokens.next_multiple_of(P),
            adapters: DeviceAdapters::new(d.clone()),
            wearing: Vec::new(),
            worn: Worn::new(d)?,
            picked_worn: Worn::new(d)?,
            scratch,
            choices: Choices::new(d, config.vocab)?,
            groups: Vec::new(),
            work: DeviceWork::new(d)?,
            prefill,
            used: 0,
            recordings: HashMap::new(),
            device: device.clone(),
            model,
        };
        device.wait()?;
        Ok(decoder)
    }

    /// Bytes of the device that steps may take beyond what is reserved: partial results of many rows, which are bounded, and tables, choosing and
    /// recordings, for which a round figure stands.
    pub fn further_bytes() -> u64 {
        PARTIAL_MOST as u64 + TABLE_BYTES
    }

    /// The cache profiles it serves.
    pub fn profiles(&self) -> &[ReadyProfile] {
        &self.model.profiles
    }

    /// The facts of its model.
    pub fn config(&self) -> &'static ModelConfig {
        self.model.config
    }

    /// The memory of its cache.
    pub fn arena(&mut self) -> &mut Memory<u8> {
        &mut self.arena
    }

    /// What runs, for logs.
    pub fn describe(&self) -> String {
        self.device.describe()
    }

    /// The adapters that lie on the device, and the bytes of each there.
    pub fn adapters(&self) -> impl Iterator<Item = (AdapterGeneration, u64)> + '_ {
        self.adapters.held()
    }

    /// Has an adapter copied to the device beside the steps to come, where it is not there and there is room without what is `wanted`.
    pub fn fetch(&mut self, adapter: (AdapterGeneration, &Arc<Delta>), wanted: impl Fn(AdapterGeneration) -> bool) {
        self.adapters.fetch(adapter, wanted);
    }

    /// The adapters on their way to the device.
    pub fn coming(&mut self) -> impl Iterator<Item = AdapterGeneration> + '_ {
        self.adapters.coming()
    }

    /// Has `arrived` called, by another thread, whenever what [`CudaDecoder::fetch`] asks for from now on has come, or failed to.
    pub fn on_arrival(&mut self, arrived: Arrived) {
        self.adapters.on_arrival(arrived);
    }

    /// Carries out a plan, as [`super::decoder::Decoder::forward`] does, under the adapters its rows name.
    ///
    /// A step that asks for the very launches of one before it, as most steps that only decode do, is one launch of what was recorded
    /// then.
    ///
    /// # Errors
    /// Where the device fails. What the plan writes is then undefined, and nothing else.
    ///
    /// # Panics
    /// When `given` lacks an adapter of a row.
    pub fn forward(&mut self, plan: &StepPlan, given: &Given<'_>, sink: &mut dyn LogitsSink) -> Result<(), CudaError> {
        self.adapters.sweep();
        let done = self.carry_out(plan, given, sink);
        self.wear(&[], given)?;
        done
    }

    fn carry_out(&mut self, plan: &StepPlan, given: &Given<'_>, sink: &mut dyn LogitsSink) -> Result<(), CudaError> {
        let layers = self.model.config.layers;
        let mut through: Vec<usize> = (0..plan.rows.len()).filter(|&i| plan.rows[i].layers.len() == layers).collect();
        through.sort_by_key(|&i| (key(&plan.rows[i]), plan.rows[i].adapter));
        for rows in self.batches(plan, &through, given) {
            let named: Vec<_> = rows.iter().map(|&row| plan.rows[row].adapter).collect();
            self.wear(&named, given)?;
            self.batch(plan, rows, sink)?;
        }
        for (index, row) in plan.rows.iter().enumerate().filter(|(_, row)| row.layers.len() < layers) {
            self.wear(&[row.adapter], given)?;
            for layer in row.layers.clone() {
                self.quantum(plan, (index, row), layer as usize, sink)?;
                self.moves(plan, &[index], layer as usize)?;
            }
        }
        self.device.wait()
    }

    /// Rows that pass through all layers, in batches whose adapters fit the device together.
    fn batches<'r>(&self, plan: &StepPlan, rows: &'r [usize], given: &Given<'_>) -> Vec<&'r [usize]> {
        let (mut batches, mut first, mut bytes) = (Vec::new(), 0, 0);
        let mut worn: Vec<AdapterGeneration> = Vec::new();
        for (at, &row) in rows.iter().enumerate() {
            let adapter = plan.rows[row].adapter;
            let Some((_, delta)) = given.iter().find(|(known, _)| *known == adapter) else { continue };
            if worn.contains(&adapter) {
                continue;
            }
            if !worn.is_empty() && bytes + delta.bytes() > self.adapters.budget() {
                batches.push(&rows[first..at]);
                (first, bytes) = (at, 0);
                worn.clear();
            }
            worn.push(adapter);
            bytes += delta.bytes();
        }
        batches.push(&rows[first..]);
        batches.retain(|rows| !rows.is_empty());
        batches
    }

    /// Takes the adapters that the rows of a batch name to the device, where they are not there.
    fn wear(&mut self, named: &[AdapterGeneration], given: &Given<'_>) -> Result<(), CudaError> {
        // What is no longer worn may make room.
        self.wearing.clear();
        self.worn.clear();
        self.picked_worn.clear();
        let worn = |id: AdapterGeneration| named.contains(&id);
        let all_given = named.iter().all(|id| *id == AdapterGeneration::default() || given.iter().any(|(known, _)| known == id));
        assert!(all_given, "a pass brings the adapters of its rows");
        let wanted: Vec<_> = given.iter().filter(|(id, _)| worn(*id)).copied().collect();
        self.wearing = self.adapters.ready(&wanted)?;
        Ok(())
    }

    /// Rows that pass through all layers, at once.
    fn batch(&mut self, plan: &StepPlan, rows: &[usize], sink: &mut dyn LogitsSink) -> Result<(), CudaError> {
        let mut first = 0;
        let spans: Vec<Span> = rows
            .iter()
            .map(|&row| {
                let span = Span { row, position: plan.rows[row].positions.start, n: plan.rows[row].len(), first };
                first += span.n;
                span
            })
            .collect();
        let tokens = self.begin(plan, &spans)?;
        self.take_tokens(plan, &spans)?;
        let wanted = wanted(plan, &spans);
        let moves = rows.iter().any(|&row| !plan.rows[row].moves.is_empty());
        if !moves && wanted.len() <= HEADS_AT_ONCE {
            self.pick(plan, &wanted, sink)?;
            self.recorded(tokens, wanted.len())?;
            return self.tell(&wanted, sink);
        }
        self.embed(tokens)?;
        for layer in 0..self.model.config.layers {
            self.layer(layer, tokens)?;
            self.moves(plan, rows, layer)?;
        }
        self.emit(plan, &wanted, sink)
    }

    /// All launches of a batch that moves nothing, from embeddings to what is chosen from the logits of `wanted` rows: as recorded, when
    /// the same were asked for before.
    fn recorded(&mut self, tokens: usize, wanted: usize) -> Result<(), CudaError> {
        let s = &self.scratch;
        let mut key = vec![tokens as u64, wanted as u64];
        s.key(&mut key);
        self.worn.key(&mut key);
        self.picked_worn.key(&mut key);
        for g in &self.groups[..self.used] {
            key.extend([u64::from(g.profile.0), u64::from(g.store == ExactStore::Workspace), g.first as u64, g.n as u64]);
            g.work.key(&mut key);
            g.prefill.key(&mut key);
        }
        self.choices.key(&mut key);
        match self.recordings.get(&key) {
            Some(Some(recording)) => return recording.launch(),
            // Asked for a second time: likely to be again.
            Some(None) => {
                let device = self.device.clone();
                match device.record(|| self.launch(tokens, wanted)) {
                    Ok(recording) => {
                        recording.launch()?;
                        self.recordings.insert(key, Some(recording));
                    }
                    Err(lost) if lost.is_lost() => return Err(lost),
                    // There was no room for it: the launches need none.
                    Err(_) => {
                        self.recordings.remove(&key);
                        self.launch(tokens, wanted)?;
                    }
                }
                return Ok(());
            }
            None => {}
        }
        if self.recordings.len() >= RECORDINGS {
            self.recordings.clear();
        }
        self.recordings.insert(key, None);
        self.launch(tokens, wanted)
    }

    fn launch(&self, tokens: usize, wanted: usize) -> Result<(), CudaError> {
        self.embed(tokens)?;
        (0..self.model.config.layers).try_for_each(|layer| self.layer(layer, tokens))?;
        self.head(wanted)?;
        self.choose(wanted)
    }

    /// One layer of one row of a layer-by-layer prefill, block by block.
    fn quantum(&mut self, plan: &StepPlan, (index, row): (usize, &Row), layer: usize, sink: &mut dyn LogitsSink) -> Result<(), CudaError> {
        let offset = self.model.profiles[row.profile.0 as usize].layout.workspace_hidden();
        let mut position = row.positions.start;
        while position < row.positions.end {
            let n = ((row.positions.end - position) as usize).min(self.block);
            let spans = [Span { row: index, position, n, first: 0 }];
            self.begin(plan, &spans)?;
            let x = n * self.model.config.hidden;
            if layer == 0 {
                self.take_tokens(plan, &spans)?;
                self.embed(n)?;
            } else {
                let at = (self.scratch.pages.part(0, n), self.scratch.positions.part(0, n));
                self.device.hidden(&self.arena, at, offset, self.scratch.x.part(0, x), false)?;
            }
            self.layer(layer, n)?;
            if layer + 1 == self.model.config.layers {
                self.emit(plan, &wanted(plan, &spans), sink)?;
            } else {
                let at = (self.scratch.pages.part(0, n), self.scratch.positions.part(0, n));
                self.device.hidden(&self.arena, at, offset, self.scratch.x.part(0, x), true)?;
            }
            position += n as u32;
        }
        Ok(())
    }

    /// Takes a batch's positions, pages and spans to the device; spans of one profile and store are neighbours. Gives its positions.
    fn begin(&mut self, plan: &StepPlan, spans: &[Span]) -> Result<usize, CudaError> {
        let tokens = spans.last().map_or(0, |s| s.first + s.n);
        let c = self.model.config;
        let (mut positions, mut pages) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        for span in spans {
            let row = &plan.rows[span.row];
            let exact = &plan.pages[row.exact.clone()];
            for position in span.position..span.position + span.n as u32 {
                positions.push(position);
                pages.push(exact[position as usize / P - row.sealed.len()].0);
            }
        }
        let shapes = [(c.hidden, 3), (c.q_channels(), 1), (c.intermediate, 1)];
        let wearing = &self.wearing;
        self.worn.set(spans.iter().map(|span| (of_row(wearing, &plan.rows[span.row]), span.n)), &shapes)?;
        let adapted = self.worn.apart(MLP, tokens) || self.worn.adapts != 0;
        self.scratch.reserve(&self.model, tokens, (adapted, self.model.gates_apart(&self.device, tokens)))?;
        self.scratch.positions.write(0, &positions)?;
        self.scratch.pages.write(0, &pages)?;

        let mut used = 0;
        for some in spans.chunk_by(|a, b| key(&plan.rows[a.row]) == key(&plan.rows[b.row])) {
            let row = &plan.rows[some[0].row];
            let (first, n) = (some[0].first, some.iter().map(|s| s.n).sum());
            if used == self.groups.len() {
                let (work, prefill) = (self.work.another(&self.device)?, self.prefill.another(&self.device)?);
                self.groups.push(Group { profile: row.profile, store: row.store, first, n, work, prefill });
            }
            let group = &mut self.groups[used];
            used += 1;
            (group.profile, group.store, group.first, group.n) = (row.profile, row.store, first, n);
            group.prefill.clear();
            let profile = &self.model.profiles[row.profile.0 as usize];
            let mut work = Work::default();
            // Over sealed pages chunks pay from another size on.
            let maps = self.model.maps[row.profile.0 as usize].iter().filter_map(|m| m.attend.as_ref());
            let over_sealed = maps.map(DeviceMaps::chunk).max().unwrap_or(CHUNK);
            for span in some {
                let row = &plan.rows[span.row];
                let (sealed, exact) = (&plan.pages[row.sealed.clone()], &plan.pages[row.exact.clone()]);
                let view = LayerView { layer: 0, layout: &profile.layout, compression: profile.compression.first() };
                let of = AttendRow {
                    view,
                    first: span.first,
                    n: span.n,
                    position: span.position,
                    sealed,
                    sinks: row.sinks,
                    exact,
                    exact_offset: 0,
                };
                if span.n >= if sealed.is_empty() { CHUNK } else { over_sealed } {
                    group.prefill.push((span.first - first) as u32, &of);
                } else {
                    work.push((span.first - first) as u32, &of);
                }
            }
            group.work.set(&work, self.model.heads, &profile.layout.sealed, n)?;
            group.prefill.set(self.model.heads)?;
        }
        self.used = used;
        Ok(tokens)
    }

    /// Takes a batch's tokens to the device.
    fn take_tokens(&mut self, plan: &StepPlan, spans: &[Span]) -> Result<(), CudaError> {
        let of = |span: &Span| {
            let row = &plan.rows[span.row];
            let first = row.tokens.start + (span.position - row.positions.start) as usize;
            &plan.tokens[first..first + span.n]
        };
        let tokens: Vec<u32> = spans.iter().flat_map(of).copied().collect();
        let s = &mut self.scratch;
        s.tokens.reserve(tokens.len())?;
        s.tokens.write(0, &tokens)
    }

    /// The embeddings of a batch's tokens.
    fn embed(&self, tokens: usize) -> Result<(), CudaError> {
        let (s, hidden) = (&self.scratch, self.model.config.hidden);
        self.device.embed(s.tokens.part(0, tokens), self.model.embed.all(), hidden, s.x.part(0, tokens * hidden))?;
        for (adapter, rows) in &self.worn.segments {
            let Some((table, site)) = adapter.embed() else { continue };
            let (tokens, x) = (s.tokens.part(rows.start, rows.len()), s.x.part(rows.start * hidden, rows.len() * hidden));
            if let Some(table) = table {
                self.device.embed(tokens, table, hidden, x)?;
            }
            if site.gain != 0 || site.rank > 0 {
                self.device.embed_adapted(tokens, &site, hidden, x)?;
            }
        }
        Ok(())
    }

    /// All rows of a batch, to be normed before linear layers read them; adapters may have weights of their own for that.
    fn normed<'a>(
        &'a self,
        (x, rows): (&'a Memory<f32>, usize),
        weight: &'a Memory<f32>,
        worn: &'a Worn,
        own: impl Fn(&'a DeviceAdapter) -> Option<Part<'a, f32>>,
    ) -> Input<'a> {
        let (c, n) = (self.model.config, rows * self.model.config.hidden);
        let own = worn.segments.iter().filter_map(|(adapter, rows)| Some((own(adapter)?, rows.clone()))).collect();
        Input::Normed(Normed { x: x.part(0, n), weight: weight.all(), eps: c.norm_eps, own, to: self.scratch.normed.part(0, n) })
    }

    /// One decoder layer over the batch.
    fn layer(&self, layer: usize, tokens: usize) -> Result<(), CudaError> {
        let (c, s, w, device) = (self.model.config, &self.scratch, &self.model.layers[layer], &*self.device);
        let at = |site| place(layer, site);
        let project = |x: &Input<'_>, inputs: usize, jobs: &[LinearJob<'_>]| {
            project(device, (x, inputs), tokens, jobs, (&self.worn, c.layers), &s.linear)
        };
        let normed = self.normed((&s.x, tokens), &w.input_norm, &self.worn, |a| a.norm(layer, Norm::Input));
        let to = |of: &DeviceProjection, site, y| LinearJob { of: of.layer(), place: at(site), y, add: false };
        let (q, kv) = (tokens * c.q_channels(), tokens * c.kv_channels());
        let jobs = [to(&w.q, Site::Q, s.q.part(0, q)), to(&w.k, Site::K, s.k.part(0, kv)), to(&w.v, Site::V, s.v.part(0, kv))];
        project(&normed, c.hidden, &jobs)?;
        for group in &self.groups[..self.used] {
            let profile = &self.model.profiles[group.profile.0 as usize];
            let layout = &profile.layout;
            let offset = match group.store {
                ExactStore::Exact => layer * layout.exact_layer_bytes(),
                ExactStore::Workspace => 0,
            };
            let append = self.append(layer, group);
            if append.is_none() {
                self.rope_append(layer, group, (layout, offset))?;
            }
            let qs = c.q_channels();
            let (q, out) = (s.q.part(group.first * qs, group.n * qs), s.attended.part(group.first * qs, group.n * qs));
            let of = AttendLayer {
                view: LayerView { layer, layout, compression: profile.compression.get(layer) },
                shape: self.model.heads,
                exact_offset: offset,
                maps: self.model.maps[group.profile.0 as usize][layer].attend.as_ref(),
                arena: self.arena.ptr(),
                rope: [self.model.cos.ptr(), self.model.sin.ptr()],
                q: q.ptr(),
                out: out.ptr(),
                out_f32: 0,
                batch: group.n,
                append: append.unwrap_or_default(),
            };
            group.prefill.attend(device, &of)?;
            group.work.attend(device, &of)?;
        }
        let x = s.x.part(0, tokens * c.hidden);
        project(&Input::Ready(s.attended.ptr()), c.q_channels(), &[LinearJob { of: w.o.layer(), place: at(Site::O), y: x, add: true }])?;
        let normed = self.normed((&s.x, tokens), &w.post_norm, &self.worn, |a| a.norm(layer, Norm::Post));
        let by_library = || gates_by_library(device, (tokens, c.hidden), [&w.gate, &w.up]);
        if w.gate.rank() + w.up.rank() > 0 || self.worn.apart(MLP, tokens) || by_library() {
            let n = tokens * c.intermediate;
            let (gate, up) = (s.gate.part(0, n), s.up.part(0, n));
            project(&normed, c.hidden, &[to(&w.gate, Site::Gate, gate), to(&w.up, Site::Up, up)])?;
            device.silu_mul(gate, up, c.intermediate, s.gated.part(0, n))?;
        } else {
            let gated = Job {
                w: [w.gate.w.ptr(), w.up.w.ptr()],
                bias: [&w.gate, &w.up].map(|p| p.bias.as_ref().map_or(0, Memory::ptr)),
                y: s.gated.ptr(),
                out: c.intermediate,
                ldy: c.intermediate,
                mode: Mode::Gated,
            };
            gate_and_up(device, (&normed, c.hidden), tokens, gated, (&self.worn, [at(Site::Gate), at(Site::Up)], c.layers))?;
        }
        project(&Input::Ready(s.gated.ptr()), c.intermediate, &[LinearJob { of: w.down.layer(), place: at(Site::Down), y: x, add: true }])
    }

    /// What attention over a group turns and appends itself, if it can: none of its rows has norms of its own, and each is a position decoded over
    /// exact pages. That saves a launch.
    fn append(&self, layer: usize, group: &Group) -> Option<Append> {
        let (s, w) = (&self.scratch, &self.model.layers[layer]);
        let own = |norm| self.worn.segments.iter().any(|(adapter, _)| adapter.norm(layer, norm).is_some());
        if group.store != ExactStore::Exact || !group.work.appends(group.n) || [Norm::Query, Norm::Key].into_iter().any(own) {
            return None;
        }
        let (kvs, first, n) = (self.model.config.kv_channels(), group.first, group.n);
        let norm = |w: &Option<Memory<f32>>| w.as_ref().map_or(0, Memory::ptr);
        Some(Append {
            k: s.k.part(first * kvs, n * kvs).ptr(),
            v: s.v.part(first * kvs, n * kvs).ptr(),
            q_norm: norm(&w.q_norm),
            k_norm: norm(&w.k_norm),
            cos: self.model.cos.ptr(),
            sin: self.model.sin.ptr(),
            positions: s.positions.part(first, n).ptr(),
            eps: self.model.config.norm_eps,
        })
    }

    /// Queries of a group turned, its keys and values into their pages.
    fn rope_append(&self, layer: usize, group: &Group, (layout, offset): (&PageLayout, usize)) -> Result<(), CudaError> {
        let (c, s, w) = (self.model.config, &self.scratch, &self.model.layers[layer]);
        let (qs, kvs) = (c.q_channels(), c.kv_channels());
        let of = |rows: Range<usize>, adapter: Option<&DeviceAdapter>| {
            let own = |norm| adapter.and_then(|a| a.norm(layer, norm));
            let rope = Rope {
                q: s.q.part(rows.start * qs, rows.len() * qs),
                k: s.k.part(rows.start * kvs, rows.len() * kvs),
                v: s.v.part(rows.start * kvs, rows.len() * kvs),
                q_norm: own(Norm::Query).or(w.q_norm.as_ref().map(Memory::all)),
                k_norm: own(Norm::Key).or(w.k_norm.as_ref().map(Memory::all)),
                eps: c.norm_eps,
                cos: &self.model.cos,
                sin: &self.model.sin,
                positions: s.positions.part(rows.start, rows.len()),
                pages: s.pages.part(rows.start, rows.len()),
                arena: &self.arena,
                offset,
                exact: layout.exact,
            };
            self.device.rope_append(&rope, self.model.heads)
        };
        // What is turned is turned in place: rows with norms of their own are left out of the others.
        let mut next = group.first;
        let end = group.first + group.n;
        for (adapter, rows) in &self.worn.segments {
            let rows = rows.start.max(group.first)..rows.end.min(end);
            if !rows.is_empty() && [Norm::Query, Norm::Key].iter().any(|&n| adapter.norm(layer, n).is_some()) {
                of(next..rows.start, None)?;
                of(rows.clone(), Some(adapter))?;
                next = rows.end;
            }
        }
        of(next..end, None)
    }

    /// Carries out the moves of `rows` in one layer.
    fn moves(&mut self, plan: &StepPlan, rows: &[usize], layer: usize) -> Result<(), CudaError> {
        for index in 0..self.model.profiles.len() {
            let layout = &self.model.profiles[index].layout;
            let (mut seals, mut sinks) = (Vec::new(), Vec::new());
            for row in rows.iter().map(|&i| &plan.rows[i]).filter(|row| row.profile.0 as usize == index) {
                let from_offset = match row.store {
                    ExactStore::Exact => layer * layout.exact_layer_bytes(),
                    ExactStore::Workspace => 0,
                };
                for m in &plan.moves[row.moves.clone()] {
                    match *m {
                        Move::Seal { from, to, skip } => {
                            let exact = &plan.pages[row.exact.clone()];
                            let page = exact.iter().position(|&p| p == from).expect("a row seals one of its own exact pages");
                            let position = ((row.sealed.len() + page) * P) as u32;
                            seals.push(SealedJob { from: from.0, offset: from_offset as u32, to: to.0, skip, position });
                        }
                        Move::Sinks { from, to, n } => sinks.push(SinksJob { from: from.0, offset: from_offset as u32, to: to.0, n }),
                        Move::Keep { from, to, n: _ } => {
                            let bytes = layout.exact_layer_bytes();
                            let at = |page: PageAddr, offset: usize| page.byte() as usize + offset;
                            self.arena.copy_within(at(from, from_offset), at(to, layer * bytes), bytes)?;
                        }
                    }
                }
            }
            let s = &mut self.scratch;
            if !sinks.is_empty() {
                s.sinks.reserve(sinks.len())?;
                s.sinks.write(0, &sinks)?;
                let to = (layer * layout.sinks_layer_bytes(), layout.sinks_stride());
                self.device.keep_sinks(&self.arena, &s.sinks, sinks.len(), to, (layout.kv_heads, layout.head_dim, layout.exact))?;
            }
            if let (Some(maps), false) = (&self.model.maps[index][layer].down, seals.is_empty()) {
                s.jobs.reserve(seals.len())?;
                s.jobs.write(0, &seals)?;
                let rope = [&self.model.cos, &self.model.sin];
                seal(&self.device, &self.arena, (layout, layer), maps, rope, (&s.jobs, seals.len()), &mut s.latents)?;
            }
        }
        Ok(())
    }

    /// Final norm, output head and what is chosen from the logits of the wanted positions of a batch, a bounded number at a time.
    fn emit(&mut self, plan: &StepPlan, wanted: &[Wanted], sink: &mut dyn LogitsSink) -> Result<(), CudaError> {
        for some in wanted.chunks(HEADS_AT_ONCE) {
            self.pick(plan, some, sink)?;
            self.head(some.len())?;
            self.choose(some.len())?;
            self.tell(some, sink)?;
        }
        Ok(())
    }

    /// Takes to the device which rows of the batch are wanted, and what for, and makes room for them.
    fn pick(&mut self, plan: &StepPlan, wanted: &[Wanted], sink: &mut dyn LogitsSink) -> Result<(), CudaError> {
        self.choices.clear();
        wanted.iter().for_each(|w| self.choices.push(&sink.ask(w.row, w.position)));
        self.choices.set()?;
        let (c, s, n) = (self.model.config, &mut self.scratch, wanted.len());
        let wearing = &self.wearing;
        self.picked_worn.set(wanted.iter().map(|w| (of_row(wearing, &plan.rows[w.row]), 1)), &[(c.hidden, 1)])?;
        s.reserve_heads(&self.model, n)?;
        s.picked.write(0, &wanted.iter().map(|w| w.at).collect::<Vec<u32>>())
    }

    /// Final norm and output head of the rows that were picked.
    fn head(&self, n: usize) -> Result<(), CudaError> {
        if n == 0 {
            return Ok(());
        }
        let (c, s) = (self.model.config, &self.scratch);
        let x = s.picked_x.part(0, n * c.hidden);
        self.device.pick(s.x.part(0, s.x.len()), s.picked.part(0, n), c.hidden, x)?;
        let normed = self.normed((&s.picked_x, n), &self.model.norm, &self.picked_worn, DeviceAdapter::final_norm);
        let head = LinearLayer::plain(self.model.head(), (c.vocab, c.hidden));
        let job = LinearJob { of: head, place: head_place(c.layers), y: s.logits.part(0, n * c.vocab), add: false };
        project(&self.device, (&normed, c.hidden), n, &[job], (&self.picked_worn, c.layers), &s.linear)
    }

    /// Tokens and scores of the logits of the rows that were picked.
    fn choose(&self, n: usize) -> Result<(), CudaError> {
        self.choices.launch(self.scratch.logits.part(0, n * self.model.config.vocab))
    }

    /// Reads what was asked for and hands it out: tokens and scores, or the logits themselves.
    fn tell(&mut self, wanted: &[Wanted], sink: &mut dyn LogitsSink) -> Result<(), CudaError> {
        let (vocab, s) = (self.model.config.vocab, &mut self.scratch);
        // Neighbours whose logits are asked for come in one piece.
        let raw: Vec<usize> = (0..wanted.len()).filter(|&i| self.choices.wants_logits(i)).collect();
        s.host_logits.reserve(raw.len() * vocab)?;
        let mut host = s.host_logits.as_mut_slice();
        for some in raw.chunk_by(|a, b| a + 1 == *b) {
            let (part, rest) = host.split_at_mut(some.len() * vocab);
            s.logits.read(some[0] * vocab, part)?;
            let rows = some.iter().map(|&i| &wanted[i]);
            rows.zip(part.chunks_exact_mut(vocab)).for_each(|(w, logits)| sink.logits(w.row, w.position, logits));
            host = rest;
        }
        let answers = self.choices.read()?;
        for (i, w) in wanted.iter().enumerate() {
            if let Some(answer) = answers.of(i) {
                sink.answer(w.row, w.position, answer);
            }
        }
        Ok(())
    }
}

/// A position whose logits are wanted: its plan row, and where it is in the batch.
#[derive(Clone, Copy)]
struct Wanted {
    row: usize,
    position: u32,
    at: u32,
}

/// The positions of a batch whose logits are wanted.
fn wanted(plan: &StepPlan, spans: &[Span]) -> Vec<Wanted> {
    let of = |span: &Span| {
        let Span { row: index, position, n, first } = *span;
        let row = &plan.rows[index];
        let ends = position + n as u32 == row.positions.end;
        let range = match row.logits {
            Logits::All => 0..n,
            Logits::Last if ends => n - 1..n,
            Logits::Last | Logits::None => 0..0,
        };
        range.map(move |i| Wanted { row: index, position: position + i as u32, at: (first + i) as u32 })
    };
    spans.iter().flat_map(of).collect()
}

/// The adapter of a row, on the device.
fn of_row(wearing: &[(AdapterGeneration, Arc<DeviceAdapter>)], row: &Row) -> Option<Arc<DeviceAdapter>> {
    wearing.iter().find(|(id, _)| *id == row.adapter).map(|(_, adapter)| adapter.clone())
}

/// What rows share that are met by one launch.
fn key(row: &Row) -> (u8, bool) {
    (row.profile.0, row.store == ExactStore::Workspace)
}
