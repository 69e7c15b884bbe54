//! The device tier of adapters: copies of adapters that lie in the host's memory, there for as long as those are and there is room.
//!
//! A copy is one piece of memory: first the table that kernels read, what the adapter does at each place; then its tensors. What is
//! no longer in the host's memory goes before the next step; of the rest, what was longest unused makes room.
//!
//! Copies are made by a thread of their own, beside the steps of others. Whoever is about to be asked for an adapter says so early
//! (`DeviceAdapters::fetch`), and a batch that needs one which is still on its way waits for it.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender, TryRecvError};
use std::sync::{Arc, Weak};

use bytemuck::Pod;
use half::bf16;
use rayon::prelude::*;

use crate::ids::AdapterGeneration;
use crate::model::delta::{Delta, Norm, Site, SiteDelta};
use crate::ops::cuda::lora::{EmbedSite, Site as DeviceSite};
use crate::ops::cuda::{Copier, CudaError, Device, Memory, Part};
use crate::ops::{MatrixData, UP_TILE};

/// Sites of a layer.
const SITES: usize = Site::ALL.len();
const NORMS: usize = Norm::ALL.len();
/// Tensors begin at multiples of so many bytes, as kernels read them.
const ALIGN: usize = 16;

/// The place of a linear layer in tables.
pub(super) fn place(layer: usize, site: Site) -> usize {
    layer * SITES + site as usize
}

/// The place of the output head, behind all layers.
pub(super) fn head_place(layers: usize) -> usize {
    layers * SITES
}

/// A place's bit in [`DeviceAdapter::updates`] and [`DeviceAdapter::adapts`]: one for each kind of site, then the head's.
pub(super) fn bit(place: usize, layers: usize) -> u8 {
    1 << if place == head_place(layers) { SITES } else { place % SITES }
}

/// Where some elements of a copy begin, and how many they are.
type Span = (usize, usize);

/// An adapter on the device.
pub(super) struct DeviceAdapter {
    /// Of all copies of this process: addresses come again, numbers do not.
    pub(super) number: u64,
    image: Memory<u8>,
    /// Largest rank of a linear layer's update.
    pub(super) rank: usize,
    /// Which kinds of site have an update, and which a gain, a bias or weights that stand in for the model's, in any layer.
    pub(super) updates: u8,
    pub(super) adapts: u8,
    /// By place: weights and bias that stand in for the model's own.
    replaced: HashMap<usize, (Span, Option<Span>)>,
    /// By layer and [`Norm`]; the final one behind all.
    norms: HashMap<usize, Span>,
    embed: Option<EmbedParts>,
    layers: usize,
}

#[derive(Clone, Copy, Default)]
struct EmbedParts {
    table: Option<Span>,
    gain: Option<Span>,
    down: Option<Span>,
    up: Option<Span>,
    rank: usize,
}

/// A tensor of a copy, as the host has it.
#[derive(Clone, Copy)]
enum Tensor<'d> {
    Bytes(&'d [u8]),
    Floats(&'d [f32]),
    /// It becomes bf16.
    Matrix(MatrixData<'d>),
    /// Tiles `[rank][64]`, which become bf16 `[rank / 2 rounded up][64][2]`.
    Up(MatrixData<'d>, usize),
}

/// Bytes of a tensor that one thread writes.
const RUN: usize = 1 << 20;
/// Bytes of two rows of an [`Tensor::Up`]'s tile, side by side.
const PAIR: usize = UP_TILE * 2 * size_of::<u16>();

impl Tensor<'_> {
    /// Bytes of it in a copy.
    fn bytes(self) -> usize {
        match self {
            Tensor::Bytes(d) => d.len(),
            Tensor::Floats(d) => size_of_val(d),
            Tensor::Matrix(d) => d.len() * size_of::<u16>(),
            Tensor::Up(d, rank) => d.len() / (rank * UP_TILE) * rank.div_ceil(2) * PAIR,
        }
    }

    /// Writes its bytes from `first` on, which is a multiple of [`PAIR`].
    fn write(self, first: usize, to: &mut [u8]) {
        match self {
            Tensor::Bytes(d) => to.copy_from_slice(&d[first..][..to.len()]),
            Tensor::Floats(d) => to.copy_from_slice(&bytemuck::cast_slice(d)[first..][..to.len()]),
            Tensor::Matrix(MatrixData::Bf16(d)) => to.copy_from_slice(&bytemuck::cast_slice(d)[first..][..to.len()]),
            Tensor::Matrix(MatrixData::F32(d)) => {
                let to = bytemuck::cast_slice_mut::<u8, u16>(to);
                to.iter_mut().zip(&d[first / 2..]).for_each(|(to, &x)| *to = bf16::from_f32(x).to_bits());
            }
            Tensor::Up(d, rank) => {
                let pairs = rank.div_ceil(2);
                for (row, to) in (first / PAIR..).zip(to.chunks_exact_mut(PAIR)) {
                    let (tile, j) = (row / pairs, row % pairs * 2);
                    let to = bytemuck::cast_slice_mut::<u8, [u16; 2]>(to);
                    for odd in 0..2 {
                        let from = (tile * rank + j + odd) * UP_TILE;
                        match d {
                            // Of an odd rank the last has no other.
                            _ if j + odd == rank => to.iter_mut().for_each(|pair| pair[odd] = 0),
                            MatrixData::Bf16(d) => to.iter_mut().zip(&d[from..]).for_each(|(pair, x)| pair[odd] = x.to_bits()),
                            MatrixData::F32(d) => {
                                to.iter_mut().zip(&d[from..]).for_each(|(pair, &x)| pair[odd] = bf16::from_f32(x).to_bits());
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What a copy of an adapter is made of.
struct Image<'d> {
    /// By place; addresses are bytes of the copy, and nothing begins at byte 0 but this table.
    table: Vec<DeviceSite>,
    /// Behind the table, in this order.
    tensors: Vec<(usize, Tensor<'d>)>,
    bytes: usize,
    rank: usize,
    updates: u8,
    adapts: u8,
    replaced: HashMap<usize, (Span, Option<Span>)>,
    norms: HashMap<usize, Span>,
    embed: Option<EmbedParts>,
}

impl<'d> Image<'d> {
    fn put(&mut self, tensor: Tensor<'d>) -> usize {
        let at = self.bytes.next_multiple_of(ALIGN);
        self.bytes = at + tensor.bytes();
        self.tensors.push((at, tensor));
        at
    }

    fn floats(&mut self, data: &'d [f32]) -> Span {
        (self.put(Tensor::Floats(data)), data.len())
    }

    fn matrix(&mut self, data: MatrixData<'d>) -> Span {
        (self.put(Tensor::Matrix(data)), data.len())
    }

    fn of(delta: &'d Delta) -> Self {
        let layers = delta.layers.len();
        let table = vec![DeviceSite::default(); head_place(layers) + 1];
        let mut image = Image {
            bytes: size_of_val(&table[..]),
            table,
            tensors: Vec::new(),
            rank: 0,
            updates: 0,
            adapts: 0,
            replaced: HashMap::new(),
            norms: HashMap::new(),
            embed: None,
        };
        let sites = delta.layers.iter().enumerate().flat_map(|(layer, l)| {
            Site::ALL.into_iter().filter_map(move |site| Some((place(layer, site), l.sites[site as usize].as_deref()?)))
        });
        for (at, site) in sites.chain(delta.head.iter().map(|head| (head_place(layers), head))) {
            let SiteDelta { replace, factors, gain, bias } = site;
            let mut to = DeviceSite::default();
            if let Some(factors) = factors {
                let f = factors.low_rank();
                f.check();
                (to.down, to.up, to.rank) = (image.matrix(f.down).0 as u64, image.put(Tensor::Up(f.up, f.rank)) as u64, f.rank as u32);
                image.updates |= bit(at, layers);
                image.rank = image.rank.max(f.rank);
            }
            to.gain = gain.as_ref().map_or(0, |g| image.floats(g).0 as u64);
            to.bias = bias.as_ref().map_or(0, |b| image.floats(b).0 as u64);
            if let Some(own) = replace {
                assert!(own.inner.is_none(), "what stands in for weights is one matrix");
                let (w, b) = (image.matrix(own.weight.matrix().data), own.bias.as_ref().map(|b| image.floats(b)));
                (to.replaced, to.own_bias) = (1, b.map_or(0, |b| b.0 as u64));
                image.replaced.insert(at, (w, b));
            }
            if replace.is_some() || gain.is_some() || bias.is_some() {
                image.adapts |= bit(at, layers);
            }
            image.table[at] = to;
        }
        let norms = delta
            .layers
            .iter()
            .enumerate()
            .flat_map(|(layer, l)| l.norms.iter().enumerate().filter_map(move |(i, norm)| Some((layer * NORMS + i, norm.as_ref()?))));
        for (at, norm) in norms.chain(delta.norm.iter().map(|norm| (layers * NORMS, norm))) {
            let span = image.floats(norm);
            image.norms.insert(at, span);
        }
        image.embed = delta.embed.as_ref().map(|e| {
            let mut parts = EmbedParts {
                table: e.replace.as_ref().map(|w| image.matrix(w.matrix().data)),
                gain: e.gain.as_ref().map(|g| image.floats(g)),
                ..EmbedParts::default()
            };
            if let Some(factors) = &e.factors {
                let (rank, down, up) = factors.parts();
                (parts.rank, parts.down, parts.up) = (rank, Some(image.matrix(down)), Some(image.floats(up)));
            }
            parts
        });
        image
    }
}

/// A run of a tensor's bytes: where it begins in a copy, and which they are.
type Run<'d> = (usize, Tensor<'d>, Range<usize>);

/// Tensors in runs of so many bytes at most, which is a multiple of [`PAIR`].
fn runs<'d>(tensors: &[(usize, Tensor<'d>)], bytes: usize) -> Vec<Run<'d>> {
    let of = |&(at, tensor): &(usize, Tensor<'d>)| {
        let end = tensor.bytes();
        (0..end).step_by(bytes).map(move |first| (at + first, tensor, first..end.min(first + bytes)))
    };
    tensors.iter().flat_map(of).collect()
}

/// Writes `runs` into the part of a copy that begins at `begin`, side by side.
fn fill(mut window: &mut [u8], begin: usize, runs: &[Run<'_>]) {
    let mut at = begin;
    let mut pieces = Vec::with_capacity(runs.len());
    for (first, tensor, of) in runs {
        let (gap, behind) = window.split_at_mut(first - at);
        gap.fill(0);
        let (piece, behind) = behind.split_at_mut(of.len());
        pieces.push((piece, tensor, of.start));
        (window, at) = (behind, first + of.len());
    }
    pieces.into_par_iter().for_each(|(piece, tensor, first)| tensor.write(first, piece));
}

/// As many of `runs` at a time as lie within so many bytes, with where they begin and end.
fn windows<'r, 'd>(runs: &'r [Run<'d>], bytes: usize) -> impl Iterator<Item = (usize, usize, &'r [Run<'d>])> {
    let mut left = runs;
    std::iter::from_fn(move || {
        let begin = left.first()?.0;
        let (some, rest) = left.split_at(left.partition_point(|(at, _, of)| at + of.len() - begin <= bytes));
        left = rest;
        let (at, _, of) = some.last().expect("a run lies within");
        Some((begin, at + of.len(), some))
    })
}

impl DeviceAdapter {
    /// A copy of `delta`, brought by `copier`.
    fn new(device: &Arc<Device>, copier: &mut Copier, delta: &Delta) -> Result<Self, CudaError> {
        let Image { mut table, tensors, bytes, rank, updates, adapts, replaced, norms, embed } = Image::of(delta);
        let mut memory = device.alloc::<u8>(bytes)?;
        let address = |at: &mut u64| *at = if *at == 0 { 0 } else { memory.ptr() + *at };
        for s in &mut table {
            [&mut s.down, &mut s.up, &mut s.gain, &mut s.bias, &mut s.own_bias].into_iter().for_each(address);
        }
        let table = (0, Tensor::Bytes(bytemuck::cast_slice(&table)));
        let tensors: Vec<_> = std::iter::once(table).chain(tensors).collect();
        let runs = runs(&tensors, RUN);
        let sent = windows(&runs, copier.window())
            .try_for_each(|(begin, end, some)| copier.copy(&mut memory, begin, end - begin, |window| fill(window, begin, some)));
        // Also where some of it failed: nothing may be on its way to memory that is given back.
        let arrived = copier.wait();
        sent.and(arrived)?;
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Ok(DeviceAdapter { number, image: memory, rank, updates, adapts, replaced, norms, embed, layers: delta.layers.len() })
    }

    /// Where its table begins.
    pub(super) fn sites(&self) -> u64 {
        self.image.ptr()
    }

    /// Whether updates of linear layers are all it has: launches then do not depend on which adapter it is.
    pub(super) fn is_plain(&self) -> bool {
        self.adapts == 0 && self.norms.is_empty() && self.embed.is_none()
    }

    /// Weights, and bias, that stand in for the model's own.
    pub(super) fn replaced(&self, place: usize) -> Option<(Part<'_, u16>, Option<Part<'_, f32>>)> {
        self.replaced.get(&place).map(|(w, b)| (self.view(*w), b.map(|b| self.view(b))))
    }

    /// What stands in for a layer's norm.
    pub(super) fn norm(&self, layer: usize, norm: Norm) -> Option<Part<'_, f32>> {
        self.norms.get(&(layer * NORMS + norm as usize)).map(|&n| self.view(n))
    }

    /// What stands in for the final norm.
    pub(super) fn final_norm(&self) -> Option<Part<'_, f32>> {
        self.norms.get(&(self.layers * NORMS)).map(|&n| self.view(n))
    }

    /// What becomes of the vectors of tokens: a table of its own, and what is added to either's.
    pub(super) fn embed(&self) -> Option<(Option<Part<'_, u16>>, EmbedSite)> {
        self.embed.map(|e| {
            let at = |span: Option<Span>| span.map_or(0, |(at, _)| self.image.ptr() + at as u64);
            let site = EmbedSite { gain: at(e.gain), down: at(e.down), up: at(e.up), rank: e.rank };
            (e.table.map(|t| self.view(t)), site)
        })
    }

    fn view<T: Pod>(&self, (at, n): Span) -> Part<'_, T> {
        self.image.view(at, n)
    }
}

/// Adapters a pass may name, as they lie in the host's memory.
pub type Given<'p> = [(AdapterGeneration, &'p Arc<Delta>)];

/// The copies there are, and those on their way.
pub(super) struct DeviceAdapters {
    budget: u64,
    copies: HashMap<AdapterGeneration, Copied>,
    clock: u64,
    maker: Maker,
}

struct Copied {
    state: State,
    bytes: u64,
    of: Weak<Delta>,
    last_used: u64,
}

enum State {
    Here(Arc<DeviceAdapter>),
    Coming(Receiver<Made>),
    /// Why, unless whoever made it panicked.
    Failed(Option<CudaError>),
}

type Made = Result<DeviceAdapter, CudaError>;

impl Copied {
    fn take(&mut self, made: Option<Made>) {
        self.state = match made {
            Some(Ok(adapter)) => State::Here(Arc::new(adapter)),
            Some(Err(e)) => State::Failed(Some(e)),
            None => State::Failed(None),
        };
    }

    /// Takes it where it has been made.
    fn look(&mut self) {
        if let State::Coming(made) = &self.state {
            match made.try_recv() {
                Ok(made) => self.take(Some(made)),
                Err(TryRecvError::Disconnected) => self.take(None),
                Err(TryRecvError::Empty) => {}
            }
        }
    }

    /// Waits until it is not on its way.
    fn arrive(&mut self) {
        if let State::Coming(made) = &self.state {
            let made = made.recv().ok();
            self.take(made);
        }
    }
}

/// What is told when a copy has been made, or has failed.
pub type Arrived = Arc<dyn Fn() + Send + Sync>;

/// The thread that makes copies, from the first one on.
struct Maker {
    device: Arc<Device>,
    arrived: Arrived,
    thread: Option<(Sender<Job>, std::thread::JoinHandle<()>)>,
}

struct Job {
    of: Arc<Delta>,
    to: SyncSender<Made>,
    arrived: Arrived,
}

impl Maker {
    /// Has a copy made.
    fn make(&mut self, of: Arc<Delta>) -> Receiver<Made> {
        let (jobs, _) = self.thread.get_or_insert_with(|| {
            let (jobs, asked) = mpsc::channel::<Job>();
            let device = self.device.clone();
            let thread = std::thread::Builder::new().name("adapters".into()).spawn(move || make_all(&device, &asked));
            (jobs, thread.expect("the system has room for a thread"))
        });
        let (to, made) = mpsc::sync_channel(1);
        jobs.send(Job { of, to, arrived: self.arrived.clone() }).expect("the thread ends after its last job");
        made
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        if let Some((jobs, thread)) = self.thread.take() {
            drop(jobs);
            let _ = thread.join();
        }
    }
}

fn make_all(device: &Arc<Device>, asked: &Receiver<Job>) {
    let mut copier = None;
    for Job { of, to, arrived } in asked {
        let made = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let copier = match &mut copier {
                Some(copier) => copier,
                none => none.insert(Copier::new(device)?),
            };
            DeviceAdapter::new(device, copier, &of)
        }));
        if let Ok(made) = made {
            // Whoever asked may have gone.
            let _ = to.send(made);
        }
        drop((of, to));
        arrived();
    }
}

impl DeviceAdapters {
    /// None, and room for none but what one batch needs.
    pub(super) fn new(device: Arc<Device>) -> Self {
        DeviceAdapters { budget: 0, copies: HashMap::new(), clock: 0, maker: Maker { device, arrived: Arc::new(|| ()), thread: None } }
    }

    /// Has `arrived` called, by another thread, whenever a copy has been made that [`DeviceAdapters::fetch`] asked for from now on.
    pub(super) fn on_arrival(&mut self, arrived: Arrived) {
        self.maker.arrived = arrived;
    }

    /// There may be at most so many bytes of them, but for what one batch needs.
    pub(super) fn set_budget(&mut self, budget: u64) {
        self.budget = budget;
    }

    /// How many bytes of adapters a batch may wear.
    pub(super) fn budget(&self) -> u64 {
        self.budget
    }

    /// Drops copies of what is no longer in the host's memory.
    pub(super) fn sweep(&mut self) {
        self.copies.retain(|_, copy| copy.of.strong_count() > 0);
    }

    /// Has a copy of an adapter made beside the steps to come, where there is none, and room for it without what is `wanted`.
    pub(super) fn fetch(&mut self, (generation, delta): (AdapterGeneration, &Arc<Delta>), wanted: impl Fn(AdapterGeneration) -> bool) {
        if !self.copies.contains_key(&generation) {
            let bytes = Image::of(delta).bytes as u64;
            // Nobody waits here.
            let coming: Vec<_> = self.coming().collect();
            if self.make_room(bytes, |other| wanted(other) || coming.contains(&other)) {
                self.make(generation, delta, bytes);
            }
        }
    }

    /// Those on their way.
    pub(super) fn coming(&mut self) -> impl Iterator<Item = AdapterGeneration> + '_ {
        self.copies.values_mut().for_each(Copied::look);
        self.copies.iter().filter(|(_, copy)| matches!(copy.state, State::Coming(_))).map(|(generation, _)| *generation)
    }

    /// Copies of all of `adapters`, made where they are not there yet. Others make room.
    ///
    /// # Errors
    /// Where the device has no room even so, or fails.
    pub(super) fn ready(&mut self, adapters: &Given<'_>) -> Result<Vec<(AdapterGeneration, Arc<DeviceAdapter>)>, CudaError> {
        self.clock += 1;
        let mut ready = Vec::with_capacity(adapters.len());
        for &(generation, delta) in adapters {
            if !self.copies.contains_key(&generation) {
                let bytes = Image::of(delta).bytes as u64;
                self.make_room(bytes, |other| adapters.iter().any(|(kept, _)| *kept == other));
                self.make(generation, delta, bytes);
            }
            let copy = self.copies.get_mut(&generation).expect("made above");
            copy.last_used = self.clock;
            copy.arrive();
            if let State::Here(adapter) = &copy.state {
                ready.push((generation, adapter.clone()));
            } else if let Some(Copied { state: State::Failed(Some(e)), .. }) = self.copies.remove(&generation) {
                return Err(e);
            } else {
                panic!("the copy of an adapter panicked");
            }
        }
        Ok(ready)
    }

    fn make(&mut self, generation: AdapterGeneration, delta: &Arc<Delta>, bytes: u64) {
        let state = State::Coming(self.maker.make(delta.clone()));
        self.copies.insert(generation, Copied { state, bytes, of: Arc::downgrade(delta), last_used: self.clock });
    }

    /// Drops what was longest unused, but for what is kept, until there is room for so many bytes; gives whether there is.
    fn make_room(&mut self, bytes: u64, kept: impl Fn(AdapterGeneration) -> bool) -> bool {
        while self.copies.values().map(|copy| copy.bytes).sum::<u64>() + bytes > self.budget {
            let others = self.copies.iter().filter(|(generation, _)| !kept(**generation));
            let Some(oldest) = others.min_by_key(|(_, copy)| copy.last_used).map(|(generation, _)| *generation) else { return false };
            if let Some(mut copy) = self.copies.remove(&oldest) {
                // Until it has been made it takes its room.
                copy.arrive();
            }
        }
        true
    }

    /// What lies on the device, and how many bytes that is.
    pub(super) fn held(&self) -> impl Iterator<Item = (AdapterGeneration, u64)> + '_ {
        self.copies.iter().filter(|(_, copy)| matches!(copy.state, State::Here(_))).map(|(generation, copy)| (*generation, copy.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However a copy is cut into runs and windows, it has the same bytes, and they are those of its tensors.
    #[test]
    fn a_copy_is_the_same_in_any_pieces() {
        let floats: Vec<f32> = (0..2000).map(|i| i as f32 / 8.0 - 100.0).collect();
        let halves: Vec<bf16> = floats.iter().map(|&x| bf16::from_f32(x)).collect();
        let rank = 5;
        let up = 3 * rank * UP_TILE;
        let parts = [
            Tensor::Bytes(&[1, 2, 3, 4, 5, 6, 7]),
            Tensor::Floats(&floats[..201]),
            Tensor::Matrix(MatrixData::F32(&floats[..555])),
            Tensor::Up(MatrixData::F32(&floats[..up]), rank),
            Tensor::Matrix(MatrixData::Bf16(&halves[..900])),
            Tensor::Up(MatrixData::Bf16(&halves[..up]), rank),
        ];
        let mut end = 0;
        let tensors: Vec<(usize, Tensor<'_>)> = parts
            .into_iter()
            .map(|tensor| {
                let at = usize::next_multiple_of(end, ALIGN);
                end = at + tensor.bytes();
                (at, tensor)
            })
            .collect();
        let copy = |run: usize, window: usize| {
            let (mut out, runs) = (vec![0xaa; end], runs(&tensors, run));
            let windows: Vec<_> = windows(&runs, window).collect();
            for &(begin, end, some) in &windows {
                assert!(end - begin <= window);
                fill(&mut out[begin..end], begin, some);
            }
            (out, windows.len())
        };
        let (whole, one) = copy(RUN, RUN);
        assert_eq!(one, 1);
        let mut most = 0;
        for (run, window) in [(PAIR, PAIR), (PAIR, 1000), (2 * PAIR, 2 * PAIR + 3), (4 * PAIR, RUN)] {
            let (pieces, n) = copy(run, window);
            most = most.max(n);
            // What lies between windows is nobody's.
            let inside = |at: usize| tensors.iter().any(|(first, tensor)| (*first..first + tensor.bytes()).contains(&at));
            assert!((0..end).all(|at| !inside(at) || pieces[at] == whole[at]), "runs of {run} in windows of {window}");
        }
        assert!(most > 30, "{most} windows");
        let element = |at: usize| u16::from_le_bytes([whole[at], whole[at + 1]]);
        assert_eq!(whole[..7], [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(whole[tensors[1].0..][..804], *bytemuck::cast_slice::<f32, u8>(&floats[..201]));
        for (at, n) in [(tensors[2].0, 555), (tensors[4].0, 900)] {
            assert!((0..n).all(|i| element(at + 2 * i) == halves[i].to_bits()));
        }
        for at in [tensors[3].0, tensors[5].0] {
            for (tile, j, c) in (0..3).flat_map(|tile| (0..6).flat_map(move |j| (0..UP_TILE).map(move |c| (tile, j, c)))) {
                let want = if j < rank { halves[(tile * rank + j) * UP_TILE + c].to_bits() } else { 0 };
                assert_eq!(element(at + (tile * 3 + j / 2) * PAIR + 4 * c + 2 * (j % 2)), want, "tile {tile}, rank {j}, channel {c}");
            }
        }
    }
}
