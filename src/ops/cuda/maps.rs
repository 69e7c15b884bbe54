//! The maps of a profile as kernels take them: how a layer's sealed pages are met on the device, whether they can be, and the matrices that
//! takes, folded and uploaded once.

use std::sync::Arc;

use half::f16;

use super::CudaError;
use super::attend::{absorb_shared, merge_shared, sealed_shared};
use super::driver::{Device, Memory};
use super::latents::{Meets, Spread, first_key, key_width};
use super::trial;
use crate::compress::{FrequencyMap, KeyMap, LayerCompression, Projection};
use crate::kv::layout::{Quantiser, SealedLayer};
use crate::ops::{Heads, LayerView};

/// How a layer's sealed pages are met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By absorbed queries, as words (`latent.cuh`).
    Words,
    /// By absorbed queries, spread (`rebuild.cuh`).
    Absorbed,
    /// As keys that are rebuilt and turned (`rebuild.cuh`).
    Rebuilt,
}

/// The maps of one layer of one profile, as kernels take them.
pub struct DeviceMaps {
    pub(super) way: Way,
    /// `[kv_heads][d][width]`: an absorbed query of each head, the basis and its rotation folded. Of keys taken after rope.
    pub(super) absorb: Option<Memory<u16>>,
    /// `[kv_heads][width][d]` and `[kv_heads][d]`: rebuilt keys of each head. No mean of keys taken after rope.
    pub(super) key_up: Memory<u16>,
    pub(super) key_mean: Option<Memory<f32>>,
    /// `[kv_heads][stride][d]` and `[kv_heads][d]`: a head's values, of its group's latents.
    pub(super) up: Memory<u16>,
    pub(super) mean: Memory<f32>,
    /// Latents that each head is absorbed into, and that a line's sums have.
    pub(super) width: usize,
    pub(super) stride: usize,
    /// How latents are spread, while decoding and for chunks.
    pub(super) spread: Option<Spread>,
    pub(super) pages: Spread,
}

/// Why a profile's sealed pages are not met on the device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    #[error(
        "a CUDA device serves bases whose groups of KV heads all have as many latents: layer {layer} has others; compress anew, or use --device cpu"
    )]
    Groups { layer: usize },
    #[error("a CUDA device serves heads of 64, 80, 96 or 128 channels, not {0}")]
    HeadDim(usize),
    #[error(
        "layer {layer} has ranks of {} (keys) and {} (values), for which a block of this device has too little shared memory ({needs} bytes of {has}): choose lower ranks, or use --device cpu",
        ranks[0], ranks[1]
    )]
    Shared { layer: usize, ranks: [usize; 2], needs: usize, has: usize },
}

/// Whether a layer's sealed pages are met on a device whose blocks have `shared` bytes of shared memory.
///
/// # Errors
/// Where they are not, why.
pub fn serves(view: &LayerView<'_>, shape: Heads, shared: usize) -> Result<(), Unserved> {
    if ![64, 80, 96, 128].contains(&view.layout.head_dim) {
        return Err(Unserved::HeadDim(view.layout.head_dim));
    }
    let Some(compression) = view.compression.filter(|_| !view.layout.drops) else { return Ok(()) };
    let layer = view.layout.sealed[view.layer];
    let even = |p: &Projection| {
        p.groups.len() == layer.blocks
            && p.groups.windows(2).all(|g| g[0].ranks.len() == g[1].ranks.len() && g[0].channels.len() == g[1].channels.len())
    };
    let keys = match &compression.keys {
        KeyMap::Channels(p) => even(p),
        // Pairs of a head's own frequencies, head by head, where there are blocks.
        KeyMap::Frequencies(map) => layer.keys.rank.is_multiple_of(layer.blocks) && (layer.blocks == 1 || own_blocks(map, layer.blocks)),
    };
    if !keys || !even(&compression.values) {
        return Err(Unserved::Groups { layer: view.layer });
    }
    let ranks = [layer.keys.rank, layer.values.rank];
    way(&compression.keys, &layer, shape, shared).map(|_| ()).map_err(|needs| Unserved::Shared {
        layer: view.layer,
        ranks,
        needs,
        has: shared,
    })
}

/// Whether each of `blocks` of latents stands for KV heads of its own.
fn own_blocks(map: &FrequencyMap, blocks: usize) -> bool {
    let (pairs, heads) = (map.frequencies.len() / blocks, map.kv_heads / blocks);
    map.up.iter().enumerate().all(|(i, &up)| up == [0.0; 2] || i / map.kv_heads / pairs.max(1) == i % map.kv_heads / heads)
}

/// How a layer is met, how its latents are spread for that, and for chunks of queries.
///
/// # Errors
/// Where blocks have too little shared memory: what they need.
fn way(keys: &KeyMap, layer: &SealedLayer, shape: Heads, has: usize) -> Result<(Way, Option<Spread>, Spread), usize> {
    let d = shape.head_dim;
    let fits = |needs: usize| if needs <= has { Ok(()) } else { Err(needs) };
    let pages = Spread::new(layer, Meets::Pages, d, has)?;
    if let KeyMap::Channels(_) = keys {
        fits(merge_shared(stride(layer), d, 0))?;
        return Ok((Way::Rebuilt, Some(Spread::new(layer, Meets::Rebuilt, d, has)?), pages));
    }
    let normal = [layer.keys, layer.values].iter().all(|part| part.quantiser == Quantiser::Hadamard && (2..=4).contains(&part.bits));
    let words = normal && layer.blocks == 1 && layer.values.rank.is_multiple_of(4) && layer.values.rank <= 1024;
    if words && sealed_shared(shape.heads, layer).max(absorb_shared(d, layer.keys.rank)) <= has {
        return Ok((Way::Words, None, pages));
    }
    fits(absorb_shared(d, pages.keys.width as usize).max(merge_shared(stride(layer), d, 0)))?;
    Ok((Way::Absorbed, Some(Spread::new(layer, Meets::Absorbed, d, has)?), pages))
}

/// Value latents that a line's sums have where latents are spread, and no fewer than where they are not.
pub(super) fn stride(layer: &SealedLayer) -> usize {
    (layer.values.rank / layer.blocks.max(1)).next_multiple_of(8)
}

impl DeviceMaps {
    /// Queries of a chunk from which it is cheaper to rebuild the pages that all of them meet than to meet them query by query. A rebuilt
    /// position costs what some 64 queries' products with words do, or some 32 with spread latents, and little more than one query
    /// that rebuilds it itself.
    pub fn chunk(&self) -> usize {
        match self.way {
            Way::Words => 64,
            Way::Absorbed => 32,
            Way::Rebuilt => 4,
        }
    }

    /// Folds and uploads the maps of one layer.
    ///
    /// # Errors
    /// Where there is no room.
    ///
    /// # Panics
    /// For a layer without maps, or one that is refused: see [`serves`].
    pub fn new(device: &Arc<Device>, view: &LayerView<'_>, shape: Heads) -> Result<Self, CudaError> {
        let Heads { kv_heads, head_dim: d, .. } = shape;
        let compression: &LayerCompression = view.compression.expect("a compressed profile has maps");
        let layer = &view.layout.sealed[view.layer];
        let (way, spread, pages) = way(&compression.keys, layer, shape, device.shared).expect("the layer is served");
        let groups = layer.blocks;
        // Of keys: where each head's latents begin, and how many it meets.
        let span = layer.keys.rank / groups;
        let width = key_width(groups, span);
        let first = |head: usize| first_key(head * groups / kv_heads, span);
        let mut key_up = vec![f16::ZERO; kv_heads * width * d];
        let (mut absorb, mut key_mean) = (None, None);
        match &compression.keys {
            KeyMap::Channels(p) => {
                let group_up =
                    |head: usize, r: usize, c: usize, x: f32| key_up[((head * width) + r - first(head)) * d + c] = f16::from_f32(x);
                each_up(p, d, group_up);
                key_mean = Some(device.upload(&p.mean)?);
            }
            KeyMap::Frequencies(map) => {
                let own = if way == Way::Words { layer.keys.rank } else { width };
                let mut rows = vec![f16::ZERO; kv_heads * d * own];
                let mut spare = vec![0.0; layer.keys.rank];
                for head in 0..kv_heads {
                    let group = head * groups / kv_heads;
                    for c in 0..d {
                        let row = absorbed(map, head, c, &mut spare);
                        for r in group * span..(group + 1) * span {
                            let x = f16::from_f32(row[r]);
                            rows[(head * d + c) * own + r - first(head)] = x;
                            key_up[(head * width + r - first(head)) * d + c] = x;
                        }
                    }
                }
                absorb = Some(device.upload(&halves(&rows))?);
            }
        }
        let values = &compression.values;
        let stride = if way == Way::Words { layer.values.rank } else { stride(layer) };
        let mut up = vec![f16::ZERO; kv_heads * stride * d];
        let span = layer.values.rank / groups;
        each_up(values, d, |head, r, c, x| up[(head * stride + r - head * groups / kv_heads * span) * d + c] = f16::from_f32(x));
        let width = if way == Way::Words { layer.keys.rank } else { width };
        let (key_up, up, mean) = (device.upload(&halves(&key_up))?, device.upload(&halves(&up))?, device.upload(&values.mean)?);
        Ok(DeviceMaps { way, absorb, key_up, key_mean, up, mean, width, stride, spread, pages })
    }

    /// Maps at random of a layer that is met as words.
    ///
    /// # Errors
    /// Where there is no room.
    pub(super) fn at_random(device: &Arc<Device>, layer: &SealedLayer, shape: Heads) -> Result<Self, CudaError> {
        let (channels, rank, stride) = (shape.kv_heads * shape.head_dim, layer.keys.rank, layer.values.rank);
        let halves = |seed, n| device.upload(&halves(&trial::uniform(seed, n, 0.2).into_iter().map(f16::from_f32).collect::<Vec<_>>()));
        Ok(DeviceMaps {
            way: Way::Words,
            absorb: Some(halves(11, channels * rank)?),
            key_up: device.alloc(0)?,
            key_mean: None,
            up: halves(12, channels * stride)?,
            mean: device.upload(&trial::uniform(13, channels, 0.2))?,
            width: rank,
            stride,
            spread: None,
            pages: Spread::default(),
        })
    }
}

fn halves(x: &[f16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// What turns latents back, element by element: KV head, latent, channel of the head, factor.
fn each_up(p: &Projection, d: usize, mut with: impl FnMut(usize, usize, usize, f32)) {
    for group in &p.groups {
        let width = group.channels.len();
        for (i, r) in group.ranks.clone().enumerate() {
            group.channels.clone().enumerate().for_each(|(j, channel)| with(channel / d, r, channel % d, group.up[i * width + j]));
        }
    }
}

/// The absorbed form of a query that is one in channel `c` of a head.
fn absorbed(map: &FrequencyMap, head: usize, c: usize, spare: &mut [f32]) -> Vec<f32> {
    let mut row = vec![0.0f32; 2 * map.frequencies.len()];
    for (j, &f) in map.frequencies.iter().enumerate() {
        let [re, im] = map.up[j * map.kv_heads + head];
        if c == f as usize {
            (row[2 * j], row[2 * j + 1]) = (re, -im);
        } else if c == map.half + f as usize {
            (row[2 * j], row[2 * j + 1]) = (im, re);
        }
    }
    map.rotate(&mut row, 1, spare);
    row
}
