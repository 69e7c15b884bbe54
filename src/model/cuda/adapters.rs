//! The device tier of adapters: copies of adapters that lie in the host's memory, there for as long as those are and there is room.
//!
//! A copy is one piece of memory: first the table that kernels read, what the adapter does at each place; then its tensors. What is
//! no longer in the host's memory goes before the next step; of the rest, what was longest unused makes room.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytemuck::Pod;
use half::bf16;
use rayon::prelude::*;

use crate::ids::AdapterGeneration;
use crate::model::delta::{Delta, Norm, Site, SiteDelta};
use crate::ops::cuda::lora::{EmbedSite, Site as DeviceSite};
use crate::ops::cuda::{CudaError, Device, Memory, Part};
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

/// Bytes of a copy before they are on the device.
struct Image<'a>(&'a mut Vec<u8>);

impl Image<'_> {
    /// So many zeros.
    fn room<T: Pod>(&mut self, n: usize) -> (usize, &mut [T]) {
        let at = self.0.len().next_multiple_of(ALIGN);
        self.0.resize(at + n * size_of::<T>(), 0);
        (at, bytemuck::cast_slice_mut(&mut self.0[at..]))
    }

    fn put<T: Pod>(&mut self, data: &[T]) -> Span {
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
        let at = self.0.len();
        self.0.extend_from_slice(bytemuck::cast_slice(data));
        (at, data.len())
    }

    /// Tiles `[rank][64]` as bf16 `[rank / 2 rounded up][64][2]`.
    fn put_up(&mut self, data: MatrixData<'_>, rank: usize) -> usize {
        let (tile, tiles) = (rank.div_ceil(2) * UP_TILE, data.len() / (rank * UP_TILE));
        let (at, to) = self.room::<[u16; 2]>(tiles * tile);
        let fill = |(of, pairs): (usize, &mut [[u16; 2]])| {
            for j in 0..rank {
                let from = (of * rank + j) * UP_TILE;
                let to = &mut pairs[j / 2 * UP_TILE..][..UP_TILE];
                match data {
                    MatrixData::Bf16(d) => to.iter_mut().zip(&d[from..]).for_each(|(pair, x)| pair[j % 2] = x.to_bits()),
                    MatrixData::F32(d) => to.iter_mut().zip(&d[from..]).for_each(|(pair, &x)| pair[j % 2] = bf16::from_f32(x).to_bits()),
                }
            }
        };
        to.par_chunks_mut(tile).enumerate().for_each(fill);
        at
    }

    /// As bf16.
    fn put_matrix(&mut self, data: MatrixData<'_>) -> Span {
        match data {
            MatrixData::Bf16(d) => self.put(bytemuck::cast_slice::<bf16, u16>(d)),
            MatrixData::F32(d) => self.put(&d.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>()),
        }
    }
}

impl DeviceAdapter {
    /// A copy of `delta`, made in `bytes`.
    fn new(device: &Arc<Device>, delta: &Delta, bytes: &mut Vec<u8>) -> Result<Self, CudaError> {
        let layers = delta.layers.len();
        let mut table = vec![DeviceSite::default(); head_place(layers) + 1];
        bytes.clear();
        bytes.resize(size_of_val(&table[..]), 0);
        let mut image = Image(bytes);
        let (mut updates, mut adapts, mut rank) = (0, 0, 0);
        let (mut replaced, mut norms) = (HashMap::new(), HashMap::new());
        let sites = delta.layers.iter().enumerate().flat_map(|(layer, l)| {
            Site::ALL.into_iter().filter_map(move |site| Some((place(layer, site), l.sites[site as usize].as_deref()?)))
        });
        for (at, site) in sites.chain(delta.head.iter().map(|head| (head_place(layers), head))) {
            let SiteDelta { replace, factors, gain, bias } = site;
            let to = &mut table[at];
            if let Some(factors) = factors {
                let f = factors.low_rank();
                f.check();
                (to.down, to.up, to.rank) = (image.put_matrix(f.down).0 as u64, image.put_up(f.up, f.rank) as u64, f.rank as u32);
                updates |= bit(at, layers);
                rank = rank.max(f.rank);
            }
            to.gain = gain.as_ref().map_or(0, |g| image.put(g).0 as u64);
            to.bias = bias.as_ref().map_or(0, |b| image.put(b).0 as u64);
            if let Some(own) = replace {
                let (w, b) = (image.put_matrix(own.dense().matrix().data), own.bias.as_ref().map(|b| image.put(b)));
                (to.replaced, to.own_bias) = (1, b.map_or(0, |b| b.0 as u64));
                replaced.insert(at, (w, b));
            }
            if replace.is_some() || gain.is_some() || bias.is_some() {
                adapts |= bit(at, layers);
            }
        }
        for (layer, l) in delta.layers.iter().enumerate() {
            for (i, norm) in l.norms.iter().enumerate() {
                norms.extend(norm.as_ref().map(|n| (layer * NORMS + i, image.put(n))));
            }
        }
        norms.extend(delta.norm.as_ref().map(|n| (layers * NORMS, image.put(n))));
        let embed = delta.embed.as_ref().map(|e| {
            let mut parts = EmbedParts {
                table: e.replace.as_ref().map(|w| image.put_matrix(w.matrix().data)),
                gain: e.gain.as_ref().map(|g| image.put(g)),
                ..EmbedParts::default()
            };
            if let Some(factors) = &e.factors {
                let (rank, down, up) = factors.parts();
                (parts.rank, parts.down, parts.up) = (rank, Some(image.put_matrix(down)), Some(image.put(up)));
            }
            parts
        });
        let mut memory = device.alloc::<u8>(image.0.len())?;
        // Nothing begins at byte 0 but the table.
        let address = |at: &mut u64| *at = if *at == 0 { 0 } else { memory.ptr() + *at };
        for s in &mut table {
            [&mut s.down, &mut s.up, &mut s.gain, &mut s.bias, &mut s.own_bias].into_iter().for_each(address);
        }
        image.0[..size_of_val(&table[..])].copy_from_slice(bytemuck::cast_slice(&table));
        memory.write(0, image.0)?;
        Ok(DeviceAdapter { image: memory, rank, updates, adapts, replaced, norms, embed, layers })
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

/// The copies there are.
pub(super) struct DeviceAdapters {
    device: Arc<Device>,
    budget: u64,
    copies: HashMap<AdapterGeneration, Copied>,
    /// Where copies are made: pages that are the process's already take less time than fresh ones.
    bytes: Vec<u8>,
    clock: u64,
}

struct Copied {
    adapter: Arc<DeviceAdapter>,
    of: Weak<Delta>,
    last_used: u64,
}

impl DeviceAdapters {
    /// None; at most `budget` bytes of them, but for what one batch needs.
    pub(super) fn new(device: Arc<Device>, budget: u64) -> Self {
        DeviceAdapters { device, budget, copies: HashMap::new(), bytes: Vec::new(), clock: 0 }
    }

    /// How many bytes of adapters a batch may wear.
    pub(super) fn budget(&self) -> u64 {
        self.budget
    }

    /// Drops copies of what is no longer in the host's memory.
    pub(super) fn sweep(&mut self) {
        self.copies.retain(|_, copy| copy.of.strong_count() > 0);
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
                self.make_room(delta.bytes(), adapters);
                let adapter = Arc::new(DeviceAdapter::new(&self.device, delta, &mut self.bytes)?);
                self.copies.insert(generation, Copied { adapter, of: Arc::downgrade(delta), last_used: 0 });
            }
            let copy = self.copies.get_mut(&generation).expect("made above");
            copy.last_used = self.clock;
            ready.push((generation, copy.adapter.clone()));
        }
        Ok(ready)
    }

    fn make_room(&mut self, bytes: u64, kept: &Given<'_>) {
        while self.held().map(|(_, bytes)| bytes).sum::<u64>() + bytes > self.budget {
            let others = self.copies.iter().filter(|(generation, _)| kept.iter().all(|(k, _)| k != *generation));
            let Some(oldest) = others.min_by_key(|(_, copy)| copy.last_used).map(|(generation, _)| *generation) else { return };
            self.copies.remove(&oldest);
        }
    }

    /// What lies on the device, and how many bytes that is.
    pub(super) fn held(&self) -> impl Iterator<Item = (AdapterGeneration, u64)> + '_ {
        self.copies.iter().map(|(generation, copy)| (*generation, copy.adapter.image.len() as u64))
    }
}
