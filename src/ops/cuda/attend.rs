//! Attention of decoded positions on the device: what is to be met becomes spans, spans become launches, and the parts of a row are
//! merged by log-sum-exp.
//!
//! A row's spans follow from its own length alone, so what a row comes to does not depend on what else is in the batch.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::CudaError;
use super::driver::{Device, Memory};
use crate::compress::{KeyMap, LayerCompression};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::layout::{ExactType, Quantiser, SealedLayer};
use crate::ops::{AttendRow, Heads, LayerView};

const P: usize = PAGE_TOKENS as usize;
/// Kernels know the unit of page addresses as `UNIT`.
const _: () = assert!(PageAddr::UNIT == 64);

/// Spans a row's pages are cut into at most, as long as spans are short.
const SPANS: usize = 64;
/// Pages of a span, at least and at most: whole tiles of the kernels, and so many that a partial result is little beside them.
const SEALED_SPAN: (usize, usize) = (8, 32);
const EXACT_SPAN: (usize, usize) = (4, 32);

/// Bytes an arena has beyond its pages: kernels read up to so many after a page's codes, and heed none of them.
pub const ARENA_SLACK: usize = 1024;

/// Pages of each span of `pages`.
pub fn span(pages: usize, (least, most): (usize, usize)) -> usize {
    pages.div_ceil(SPANS).next_multiple_of(least).min(most)
}

/// One span of one row's sealed pages (`SealedItem` of `latent.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct SealedItem {
    pub row: u32,
    pub table: u32,
    pub pages: u32,
    pub skip: u32,
}

/// One span of one row's exact pages (`ExactItem` of `attend.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct ExactItem {
    pub row: u32,
    pub table: u32,
    pub pages: u32,
    pub last: u32,
    pub sinks_page: u32,
    pub sinks: u32,
}

/// The items a row's parts are (`MergeRow` of `attend.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct MergeRow {
    pub row: u32,
    pub sealed: u32,
    pub sealed_end: u32,
    pub exact: u32,
    pub exact_end: u32,
}

/// What one launch of attention meets: rows of one profile whose exact pages lie alike.
#[derive(Default, Debug, PartialEq)]
pub struct Work {
    pub table: Vec<u32>,
    pub sealed: Vec<SealedItem>,
    pub exact: Vec<ExactItem>,
    pub rows: Vec<MergeRow>,
}

impl Work {
    /// Adds one query at `position`, whose row in the batch is `row`.
    pub fn push(&mut self, row: u32, position: u32, of: &AttendRow<'_>) {
        let sinks = if of.sinks.is_some() && !of.sealed.is_empty() { of.view.layout.sinks } else { 0 };
        let (sealed, exact) = (self.sealed.len() as u32, self.exact.len() as u32);
        if !of.view.layout.drops {
            let table = self.put(of.sealed);
            let each = span(of.sealed.len(), SEALED_SPAN);
            for first in (0..of.sealed.len()).step_by(each.max(1)) {
                let pages = each.min(of.sealed.len() - first) as u32;
                let skip = if first == 0 { sinks } else { 0 };
                self.sealed.push(SealedItem { row, table: table + first as u32, pages, skip });
            }
        }
        let positions = position as usize + 1 - of.sealed.len() * P;
        let pages = positions.div_ceil(P);
        let table = self.put(&of.exact[..pages]);
        let each = span(pages, EXACT_SPAN);
        for first in (0..pages).step_by(each.max(1)) {
            let n = each.min(pages - first);
            let last = (positions - (first + n - 1) * P).min(P) as u32;
            let first_item = first == 0 && sinks > 0;
            self.exact.push(ExactItem {
                row,
                table: table + first as u32,
                pages: n as u32,
                last,
                sinks_page: if first_item { of.sinks.map_or(0, |p| p.0) } else { 0 },
                sinks: if first_item { sinks } else { 0 },
            });
        }
        self.rows.push(MergeRow { row, sealed, sealed_end: self.sealed.len() as u32, exact, exact_end: self.exact.len() as u32 });
    }

    fn put(&mut self, pages: &[PageAddr]) -> u32 {
        let at = self.table.len() as u32;
        self.table.extend(pages.iter().map(|p| p.0));
        at
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AbsorbArgs {
    q: u64,
    map: u64,
    fragments: u64,
    factors: u64,
    scale: f32,
    heads: i32,
    kv_heads: i32,
    d: i32,
    rank: i32,
    bits: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SealedArgs {
    arena: u64,
    table: u64,
    items: u64,
    fragments: u64,
    factors: u64,
    out: u64,
    state: u64,
    key_codes: u32,
    key_scales: u32,
    value_codes: u32,
    value_scales: u32,
    end: u32,
    rank_k: i32,
    rank_v: i32,
    bits_k: i32,
    bits_v: i32,
    tiles: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ExactArgs {
    arena: u64,
    table: u64,
    items: u64,
    q: u64,
    out: u64,
    state: u64,
    scale: f32,
    offset: u32,
    sinks_offset: u32,
    sinks_stride: u32,
    heads: i32,
    kv_heads: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeArgs {
    rows: u64,
    sealed: u64,
    sealed_state: u64,
    exact: u64,
    exact_state: u64,
    up: u64,
    mean: u64,
    out: u64,
    out_f32: u64,
    heads: i32,
    kv_heads: i32,
    d: i32,
    rank: i32,
    tiles: i32,
}

/// The maps of one layer of one profile, as kernels take them.
pub struct DeviceMaps {
    /// `[kv_heads][d][key rank]`: an absorbed query of each head, the basis and its rotation folded.
    absorb: Memory<u16>,
    /// `[kv_heads][value rank][d]` and `[kv_heads][d]`.
    up: Memory<u16>,
    mean: Memory<f32>,
}

/// Why a profile's sealed pages are not met on the device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    #[error("a CUDA device serves compressed profiles whose keys have a frequency basis")]
    Basis,
    #[error("a CUDA device serves compressed profiles whose keys and values are quantised by \"hadamard\", at 4, 3 or 2 bits")]
    Quantiser,
    #[error("a CUDA device serves value ranks that are multiples of 4, up to 1024: layer {layer} has {rank}")]
    Rank { layer: usize, rank: usize },
    #[error("a CUDA device serves heads of 64, 80, 96 or 128 channels, not {0}")]
    HeadDim(usize),
}

/// Whether a layer's sealed pages are met on the device.
///
/// # Errors
/// Where they are not, why.
pub fn serves(view: &LayerView<'_>) -> Result<(), Unserved> {
    if ![64, 80, 96, 128].contains(&view.layout.head_dim) {
        return Err(Unserved::HeadDim(view.layout.head_dim));
    }
    let Some(compression) = view.compression.filter(|_| !view.layout.drops) else { return Ok(()) };
    let layer = view.layout.sealed[view.layer];
    if !matches!(compression.keys, KeyMap::Frequencies(_)) || layer.blocks != 1 {
        return Err(Unserved::Basis);
    }
    let (k, v) = (layer.keys, layer.values);
    if [k, v].iter().any(|part| part.quantiser != Quantiser::Hadamard || !(2..=4).contains(&part.bits)) {
        return Err(Unserved::Quantiser);
    }
    if !v.rank.is_multiple_of(4) || v.rank > 1024 {
        return Err(Unserved::Rank { layer: view.layer, rank: v.rank });
    }
    Ok(())
}

impl DeviceMaps {
    /// Folds and uploads the maps of one layer.
    ///
    /// # Errors
    /// Where there is no room.
    ///
    /// # Panics
    /// For keys that are rebuilt: see [`serves`].
    pub fn new(device: &Arc<Device>, compression: &LayerCompression, kv_heads: usize, d: usize) -> Result<Self, CudaError> {
        let KeyMap::Frequencies(map) = &compression.keys else { panic!("keys are absorbed") };
        let rank = 2 * map.frequencies.len();
        let mut absorb = vec![f16::ZERO; kv_heads * d * rank];
        let mut spare = vec![0.0; rank];
        for head in 0..kv_heads {
            for c in 0..d {
                // The absorbed form of a query that is one in channel c.
                let mut row = vec![0.0f32; rank];
                for (j, &f) in map.frequencies.iter().enumerate() {
                    let [re, im] = map.up[j * kv_heads + head];
                    if c == f as usize {
                        (row[2 * j], row[2 * j + 1]) = (re, -im);
                    } else if c == map.half + f as usize {
                        (row[2 * j], row[2 * j + 1]) = (im, re);
                    }
                }
                map.rotate(&mut row, 1, &mut spare);
                row.iter().zip(&mut absorb[(head * d + c) * rank..][..rank]).for_each(|(&x, y)| *y = f16::from_f32(x));
            }
        }
        let values = &compression.values;
        let rank = values.rank();
        let mut up = vec![f16::ZERO; kv_heads * rank * d];
        for group in &values.groups {
            let width = group.channels.len();
            for (i, r) in group.ranks.clone().enumerate() {
                for (j, channel) in group.channels.clone().enumerate() {
                    up[(channel / d * rank + r) * d + channel % d] = f16::from_f32(group.up[i * width + j]);
                }
            }
        }
        let bits = |x: &[f16]| x.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
        Ok(DeviceMaps { absorb: device.upload(&bits(&absorb))?, up: device.upload(&bits(&up))?, mean: device.upload(&values.mean)? })
    }
}

/// Work on the device, and the memory of its partial results. Built once a step; launched once a layer.
pub struct DeviceWork {
    table: Memory<u32>,
    sealed_items: Memory<SealedItem>,
    exact_items: Memory<ExactItem>,
    rows: Memory<MergeRow>,
    counts: [usize; 3],
    fragments: Memory<u16>,
    factors: Memory<f32>,
    sealed: Memory<u16>,
    sealed_state: Memory<f32>,
    exact: Memory<f32>,
    exact_state: Memory<f32>,
    /// Most parts a row has.
    parts: usize,
}

/// One layer's attention.
pub struct AttendLayer<'a> {
    pub view: LayerView<'a>,
    pub shape: Heads,
    /// Of the layer in exact pages.
    pub exact_offset: usize,
    /// `None` for `full`.
    pub maps: Option<&'a DeviceMaps>,
    pub arena: u64,
    /// `[rows][heads][d]` f32, after rope.
    pub q: u64,
    /// `[rows][heads * d]` bf16; and f32, or zero.
    pub out: u64,
    pub out_f32: u64,
    /// Rows of `q`.
    pub batch: usize,
}

impl DeviceWork {
    /// Memory for nothing yet.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(DeviceWork {
            table: device.alloc(1)?,
            sealed_items: device.alloc(1)?,
            exact_items: device.alloc(1)?,
            rows: device.alloc(1)?,
            counts: [0; 3],
            fragments: device.alloc(1)?,
            factors: device.alloc(1)?,
            sealed: device.alloc(1)?,
            sealed_state: device.alloc(1)?,
            exact: device.alloc(1)?,
            exact_state: device.alloc(1)?,
            parts: 0,
        })
    }

    /// Takes the work of a step to the device, and makes room for its partial results in any layer of `layers`.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn set(&mut self, work: &Work, shape: Heads, layers: &[SealedLayer], batch: usize) -> Result<(), CudaError> {
        let tiles = shape.heads.div_ceil(16);
        let most = |f: &dyn Fn(&SealedLayer) -> usize| layers.iter().map(f).max().unwrap_or(0);
        self.table.reserve(work.table.len())?;
        self.table.write(0, &work.table)?;
        self.sealed_items.reserve(work.sealed.len())?;
        self.sealed_items.write(0, &work.sealed)?;
        self.exact_items.reserve(work.exact.len())?;
        self.exact_items.write(0, &work.exact)?;
        self.rows.reserve(work.rows.len())?;
        self.rows.write(0, &work.rows)?;
        self.counts = [work.sealed.len(), work.exact.len(), work.rows.len()];
        self.parts = work.rows.iter().map(|r| (r.sealed_end - r.sealed + r.exact_end - r.exact) as usize).max().unwrap_or(0);
        if !work.sealed.is_empty() {
            self.fragments.reserve(batch * tiles * 256 * most(&|l| steps(l)))?;
            self.factors.reserve(batch * tiles * 16)?;
            self.sealed.reserve(work.sealed.len() * tiles * 16 * most(&|l| l.values.rank))?;
            self.sealed_state.reserve(work.sealed.len() * tiles * 16 * 4)?;
        }
        self.exact.reserve(work.exact.len() * shape.heads * shape.head_dim)?;
        self.exact_state.reserve(work.exact.len() * shape.heads * 2)?;
        Ok(())
    }

    /// Adds all that its launches depend on, but for what lies in its memory.
    pub fn key(&self, key: &mut Vec<u64>) {
        key.extend(self.counts.iter().chain([&self.parts]).map(|&n| n as u64));
        key.extend([self.table.ptr(), self.sealed_items.ptr(), self.exact_items.ptr(), self.rows.ptr(), self.fragments.ptr()]);
        key.extend([self.factors.ptr(), self.sealed.ptr(), self.sealed_state.ptr(), self.exact.ptr(), self.exact_state.ptr()]);
    }

    /// Launches one layer's attention over the work.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where the layer is none that [`serves`] passes.
    pub fn attend(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        self.sealed(device, layer)?;
        self.exact(device, layer)?;
        self.merge(device, layer)
    }

    /// The parts over sealed pages.
    ///
    /// # Errors
    /// As [`DeviceWork::attend`].
    pub fn sealed(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        let Heads { heads, kv_heads, head_dim: d, scale } = layer.shape;
        let tiles = heads.div_ceil(16);
        let sealed = self.counts[0];
        if sealed > 0 {
            let part = layer.view.layout.sealed[layer.view.layer];
            let maps = layer.maps.expect("sealed pages have maps");
            let (k, v) = (part.keys, part.values);
            let args = AbsorbArgs {
                q: layer.q,
                map: maps.absorb.ptr(),
                fragments: self.fragments.ptr(),
                factors: self.factors.ptr(),
                scale,
                heads: heads as i32,
                kv_heads: kv_heads as i32,
                d: d as i32,
                rank: k.rank as i32,
                bits: k.bits as i32,
            };
            // SAFETY: memory of the shapes the kernel documents, made by `set` and `DeviceMaps::new`.
            unsafe { device.launch("absorb", [layer.batch, kv_heads, 1], 512, 4 * (4 * d + 16 * k.rank), &args) }?;
            let args = SealedArgs {
                arena: layer.arena,
                table: self.table.ptr(),
                items: self.sealed_items.ptr(),
                fragments: self.fragments.ptr(),
                factors: self.factors.ptr(),
                out: self.sealed.ptr(),
                state: self.sealed_state.ptr(),
                key_codes: k.codes as u32,
                key_scales: k.meta as u32,
                value_codes: v.codes as u32,
                value_scales: v.meta as u32,
                end: part.end as u32,
                rank_k: k.rank as i32,
                rank_v: v.rank as i32,
                bits_k: k.bits as i32,
                bits_v: v.bits as i32,
                tiles: tiles as i32,
            };
            let mt = if tiles.is_multiple_of(2) { 2 } else { 1 };
            const WARPS: usize = 8;
            let kernel = SEALED[mt - 1][usize::from(v.rank > 32 * WARPS)][k.bits as usize - 2][v.bits as usize - 2];
            let shared = mt * steps(&part) * 512 + WARPS * mt * 2048 + 2 * WARPS * 16 * mt * 4 + 64 * mt + 4 * SEALED_SPAN.1;
            // SAFETY: as above; pages were leased by who made the work.
            unsafe { device.launch(kernel, [sealed, tiles / mt, 1], 32 * WARPS, shared, &args) }?;
        }
        Ok(())
    }

    /// The parts over exact pages.
    ///
    /// # Errors
    /// As [`DeviceWork::attend`].
    pub fn exact(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        let Heads { heads, kv_heads, head_dim: d, scale } = layer.shape;
        let layout = layer.view.layout;
        let args = ExactArgs {
            arena: layer.arena,
            table: self.table.ptr(),
            items: self.exact_items.ptr(),
            q: layer.q,
            out: self.exact.ptr(),
            state: self.exact_state.ptr(),
            scale,
            offset: layer.exact_offset as u32,
            sinks_offset: (layer.view.layer * layout.sinks_layer_bytes()) as u32,
            sinks_stride: layout.sinks_stride() as u32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
        };
        let kernel = match (layout.exact, d) {
            (ExactType::Bf16, 64) => "attend_exact_b16_64",
            (ExactType::Bf16, 80) => "attend_exact_b16_80",
            (ExactType::Bf16, 96) => "attend_exact_b16_96",
            (ExactType::Bf16, 128) => "attend_exact_b16_128",
            (ExactType::F32, 64) => "attend_exact_f32_64",
            (ExactType::F32, 80) => "attend_exact_f32_80",
            (ExactType::F32, 96) => "attend_exact_f32_96",
            (ExactType::F32, 128) => "attend_exact_f32_128",
            (_, d) => panic!("heads of {d} channels were refused"),
        };
        const WARPS: usize = 4;
        let shared = 4 * (4 * d + WARPS * (4 * P + 4 * d + 8));
        // SAFETY: as above.
        unsafe { device.launch(kernel, [self.counts[1], kv_heads, (heads / kv_heads).div_ceil(4)], 32 * WARPS, shared, &args) }
    }

    /// The parts of each row into one.
    ///
    /// # Errors
    /// As [`DeviceWork::attend`].
    pub fn merge(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        let Heads { heads, kv_heads, head_dim: d, .. } = layer.shape;
        let rank = if self.counts[0] > 0 { layer.view.layout.sealed[layer.view.layer].values.rank } else { 0 };
        let tiles = heads.div_ceil(16);
        let args = MergeArgs {
            rows: self.rows.ptr(),
            sealed: self.sealed.ptr(),
            sealed_state: self.sealed_state.ptr(),
            exact: self.exact.ptr(),
            exact_state: self.exact_state.ptr(),
            up: layer.maps.map_or(0, |m| m.up.ptr()),
            mean: layer.maps.map_or(0, |m| m.mean.ptr()),
            out: layer.out,
            out_f32: layer.out_f32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            d: d as i32,
            rank: rank as i32,
            tiles: tiles as i32,
        };
        let slices = (if rank.is_multiple_of(8) { 1024usize } else { 512 }).checked_div(rank).map_or(0, |n| n.max(1));
        let shared = 4 * (8 + 4 * self.parts.next_multiple_of(4) + 4 * (slices * rank).max(512 / (d / 2) * d));
        // SAFETY: as above.
        unsafe { device.launch("merge", [self.counts[2], kv_heads, 1], 512, shared, &args) }
    }
}

/// By tiles of 16 lines (1, 2), more than 256 value channels or not, bits of keys and of values (2, 3, 4).
const SEALED: [[[[&str; 3]; 3]; 2]; 2] = [
    [
        [
            ["attend_sealed_1_1_22", "attend_sealed_1_1_23", "attend_sealed_1_1_24"],
            ["attend_sealed_1_1_32", "attend_sealed_1_1_33", "attend_sealed_1_1_34"],
            ["attend_sealed_1_1_42", "attend_sealed_1_1_43", "attend_sealed_1_1_44"],
        ],
        [
            ["attend_sealed_1_4_22", "attend_sealed_1_4_23", "attend_sealed_1_4_24"],
            ["attend_sealed_1_4_32", "attend_sealed_1_4_33", "attend_sealed_1_4_34"],
            ["attend_sealed_1_4_42", "attend_sealed_1_4_43", "attend_sealed_1_4_44"],
        ],
    ],
    [
        [
            ["attend_sealed_2_1_22", "attend_sealed_2_1_23", "attend_sealed_2_1_24"],
            ["attend_sealed_2_1_32", "attend_sealed_2_1_33", "attend_sealed_2_1_34"],
            ["attend_sealed_2_1_42", "attend_sealed_2_1_43", "attend_sealed_2_1_44"],
        ],
        [
            ["attend_sealed_2_4_22", "attend_sealed_2_4_23", "attend_sealed_2_4_24"],
            ["attend_sealed_2_4_32", "attend_sealed_2_4_33", "attend_sealed_2_4_34"],
            ["attend_sealed_2_4_42", "attend_sealed_2_4_43", "attend_sealed_2_4_44"],
        ],
    ],
];

/// Steps of 16 channels of an absorbed query.
fn steps(layer: &SealedLayer) -> usize {
    match layer.keys.bits {
        4 => layer.keys.rank.div_ceil(32) * 2,
        _ => layer.keys.rank.div_ceil(64) * 4,
    }
}
