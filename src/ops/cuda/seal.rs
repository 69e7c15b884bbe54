//! Exact pages to sealed pages: launches of `seal.cuh`.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::CudaError;
use super::driver::{Device, Memory};
use crate::compress::{KeyMap, LayerCompression, Projection};
use crate::kv::layout::{ExactType, PageLayout, Quantiser, SealedPart};

/// A page to seal (`seal::Job`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct SealedJob {
    pub from: u32,
    /// Byte offset of the layer in `from`.
    pub offset: u32,
    pub to: u32,
    pub skip: u32,
    /// Of the page's first token: keys of a basis that is taken before rope are turned back by it.
    pub position: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PartArgs {
    rank: u32,
    groups: u32,
    bits: u32,
    affine: u32,
    blocks: u32,
    codes: u32,
    meta: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ProjectArgs {
    arena: u64,
    jobs: u64,
    key_map: u64,
    value_map: u64,
    key_mean: u64,
    value_mean: u64,
    cos: u64,
    sin: u64,
    latents: u64,
    keys: PartArgs,
    values: PartArgs,
    channels: u32,
    d: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CodesArgs {
    arena: u64,
    jobs: u64,
    latents: u64,
    keys: PartArgs,
    values: PartArgs,
}

/// The maps of one layer that take latents, dense, rotations folded in.
pub struct DownMaps {
    /// `[channels][key rank]`.
    keys: Memory<f32>,
    /// `[channels]`, of keys before rope; none of those after it.
    key_mean: Option<Memory<f32>>,
    /// `[channels][value rank]`, and `[channels]`.
    values: Memory<f32>,
    mean: Memory<f32>,
    groups: u32,
}

impl DownMaps {
    /// Folds and uploads the maps of one layer.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn new(device: &Arc<Device>, compression: &LayerCompression) -> Result<Self, CudaError> {
        let values = &compression.values;
        let (keys, key_mean) = match &compression.keys {
            KeyMap::Channels(p) => (dense(p), Some(device.upload(&p.mean)?)),
            KeyMap::Frequencies(map) => {
                // The latent of a key that is one in one channel is that channel's row.
                let mut unit = vec![0.0; values.channels()];
                let mut keys = Vec::with_capacity(values.channels() * compression.keys.rank());
                for c in 0..values.channels() {
                    unit[c] = 1.0;
                    keys.extend(map.latent(&unit));
                    unit[c] = 0.0;
                }
                (keys, None)
            }
        };
        let groups = values.groups.len().max(1) as u32;
        Ok(DownMaps {
            keys: device.upload(&keys)?,
            key_mean,
            values: device.upload(&dense(values))?,
            mean: device.upload(&values.mean)?,
            groups,
        })
    }
}

/// The map that takes latents, `[channels][rank]`.
fn dense(p: &Projection) -> Vec<f32> {
    let rank = p.rank();
    let mut down = vec![0.0; p.channels() * rank];
    for group in &p.groups {
        let width = group.ranks.len();
        for (i, c) in group.channels.clone().enumerate() {
            down[c * rank + group.ranks.start..][..width].copy_from_slice(&group.down[i * width..][..width]);
        }
    }
    down
}

/// Pages that are sealed at once: what lies between the two kernels is so much.
const AT_ONCE: usize = 128;

/// Elements that lie between the two kernels, of so many pages of a layer of so many latents.
pub fn latents_between(pages: usize, latents: usize) -> usize {
    pages.min(AT_ONCE) * 64 * latents
}

/// Seals `n` of `jobs` in one layer. `rope` holds cosines and sines of positions, `[positions][d / 2]`; `latents` grows to what lies
/// between the two kernels.
///
/// # Errors
/// Where the device refuses, or there is no room.
///
/// # Panics
/// Where the layer seals nothing.
pub fn seal(
    device: &Device,
    arena: &Memory<u8>,
    (layout, layer): (&PageLayout, usize),
    maps: &DownMaps,
    rope: [&Memory<f32>; 2],
    (jobs, n): (&Memory<SealedJob>, usize),
    latents: &mut Memory<f32>,
) -> Result<(), CudaError> {
    if n == 0 || layout.drops {
        return Ok(());
    }
    assert!(n <= jobs.len(), "{n} jobs of {}", jobs.len());
    let sealed = layout.sealed[layer];
    let part = |p: SealedPart| PartArgs {
        rank: p.rank as u32,
        groups: maps.groups,
        bits: p.bits,
        affine: u32::from(p.quantiser == Quantiser::Affine),
        blocks: sealed.blocks as u32,
        codes: p.codes as u32,
        meta: p.meta as u32,
    };
    let (keys, values) = (part(sealed.keys), part(sealed.values));
    let most = sealed.keys.rank.max(sealed.values.rank);
    latents.reserve(latents_between(n, sealed.keys.rank + sealed.values.rank))?;
    for first in (0..n).step_by(AT_ONCE) {
        let n = AT_ONCE.min(n - first);
        let jobs = jobs.part(first, n);
        let args = ProjectArgs {
            arena: arena.ptr(),
            jobs: jobs.ptr(),
            key_map: maps.keys.ptr(),
            value_map: maps.values.ptr(),
            key_mean: maps.key_mean.as_ref().map_or(0, Memory::ptr),
            value_mean: maps.mean.ptr(),
            cos: if maps.key_mean.is_some() { rope[0].ptr() } else { 0 },
            sin: if maps.key_mean.is_some() { rope[1].ptr() } else { 0 },
            latents: latents.ptr(),
            keys,
            values,
            channels: (layout.kv_heads * layout.head_dim) as u32,
            d: layout.head_dim as u32,
        };
        let kernel = match layout.exact {
            ExactType::Bf16 => "seal_project_b16",
            ExactType::F32 => "seal_project_f32",
        };
        // SAFETY: jobs are of pages that their plan leased; maps have the layer's shapes.
        unsafe { device.launch(kernel, [most.div_ceil(32), n, 2], 128, 12288, &args) }?;
        let args = CodesArgs { arena: arena.ptr(), jobs: jobs.ptr(), latents: latents.ptr(), keys, values };
        let shared = 4 * (1536 + 32 * sealed.blocks).max(2 * most.next_multiple_of(32));
        // SAFETY: as above.
        unsafe { device.launch("seal_codes", [n, 4, 1], 512, shared, &args) }?;
    }
    Ok(())
}
