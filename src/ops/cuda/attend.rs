//! Attention of decoded positions on the device: what is to be met becomes spans, spans become launches, and the parts of a row are
//! merged by log-sum-exp: by a launch of their own, or, of rows that are exact, by the blocks that end last.
//!
//! A row's spans follow from its own length alone, so what a row comes to does not depend on what else is in the batch.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};

use super::CudaError;
use super::driver::{Device, Memory, Own};
use super::latents::{LatentsArgs, Meets, THREADS, key_width};
use super::maps::{DeviceMaps, Way, stride};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::layout::{ExactType, SealedLayer};
use crate::ops::{AttendRow, Heads, LayerView};

const P: usize = PAGE_TOKENS as usize;
/// Kernels know the unit of page addresses as `UNIT`.
const _: () = assert!(PageAddr::UNIT == 64);

/// Spans a row's pages are cut into at most, as long as spans are short; and pages of one, at least and at most: whole tiles of the
/// kernels, and so many that a partial result is little beside them.
const SPANS: usize = 64;
const EXACT_SPAN: (usize, usize) = (4, 32);
const SEALED_SPAN: (usize, usize) = (8, SEALED_MOST);
pub(super) const SEALED_MOST: usize = 32;

/// Bytes an arena has beyond its pages: kernels read up to so many after a page's codes, and heed none of them.
pub const ARENA_SLACK: usize = 1024;

/// Pages of each span of `pages`, of so many spans, or more where they are of `most` pages.
fn span(pages: usize, spans: usize, (least, most): (usize, usize)) -> usize {
    pages.div_ceil(spans).next_multiple_of(least).min(most)
}

/// Pages of each span of so many exact ones.
pub fn exact_span(pages: usize) -> usize {
    span(pages, SPANS, EXACT_SPAN)
}

/// Pages of each span of so many sealed ones, in their order: twice as many spans as of exact ones where pages are many, as a row by itself
/// would leave half of the processors without any. The last quarter is cut fine: blocks over long spans begin first
/// ([`DeviceWork::set`]), and those over short ones end together where as many long ones would leave processors without any.
pub fn sealed_spans(pages: usize) -> Vec<usize> {
    let spans = if pages > 16 * SPANS { 2 * SPANS } else { SPANS };
    let (least, each) = (SEALED_SPAN.0, span(pages, spans, SEALED_SPAN));
    let long = (pages - (pages / 4).min(64 * least)) / each.max(1);
    let mut spans = vec![each; if each > least { long } else { 0 }];
    let mut left = pages - spans.len() * each;
    while left > 0 {
        spans.push(left.min(least));
        left -= left.min(least);
    }
    spans
}

/// One span of one row's sealed pages (`SealedItem` of `latent.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct SealedItem {
    pub row: u32,
    pub table: u32,
    pub pages: u32,
    pub skip: u32,
    /// Which of the sequence's pages the first is.
    pub page: u32,
    /// Where its results lie: [`DeviceWork::set`] says.
    pub part: u32,
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
    /// Which of its row's spans it is, of how many.
    pub at: u32,
    pub of: u32,
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
    /// Sequences whose positions the rows are.
    pub sequences: usize,
}

impl Work {
    /// Adds the `n` queries of a row, the first of which stands at its position; the first is row `first` of the batch.
    pub fn push(&mut self, first: u32, of: &AttendRow<'_>) {
        self.sequences += 1;
        let sinks = if of.sinks.is_some() && !of.sealed.is_empty() { of.view.layout.sinks } else { 0 };
        let before = of.sealed.len() * P;
        let reach = (of.position as usize + of.n - before).div_ceil(P);
        let (sealed_table, exact_table) = (self.put(of.sealed), self.put(&of.exact[..reach]));
        for i in 0..of.n {
            let row = first + i as u32;
            let (sealed, exact) = (self.sealed.len() as u32, self.exact.len() as u32);
            if !of.view.layout.drops {
                let mut at = 0;
                for pages in sealed_spans(of.sealed.len()) {
                    let (page, pages, skip) = (at, pages as u32, if at == 0 { sinks } else { 0 });
                    self.sealed.push(SealedItem { row, table: sealed_table + page, pages, skip, page, part: 0 });
                    at += pages;
                }
            }
            let positions = of.position as usize + i + 1 - before;
            let pages = positions.div_ceil(P);
            let each = exact_span(pages);
            for at in (0..pages).step_by(each.max(1)) {
                let n = each.min(pages - at);
                let sinks = if at == 0 { sinks } else { 0 };
                self.exact.push(ExactItem {
                    row,
                    table: exact_table + at as u32,
                    pages: n as u32,
                    last: (positions - (at + n - 1) * P).min(P) as u32,
                    sinks_page: if sinks > 0 { of.sinks.map_or(0, |p| p.0) } else { 0 },
                    sinks,
                    at: (at / each) as u32,
                    of: pages.div_ceil(each) as u32,
                });
            }
            self.rows.push(MergeRow { row, sealed, sealed_end: self.sealed.len() as u32, exact, exact_end: self.exact.len() as u32 });
        }
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
    offsets: u64,
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
    offsets: u64,
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
    merged: u64,
    merged_f32: u64,
    ended: u64,
    scale: f32,
    offset: u32,
    sinks_offset: u32,
    sinks_stride: u32,
    heads: i32,
    kv_heads: i32,
    append: Append,
}

/// Queries that are not turned yet, and keys and values of their positions that are not in their pages, as [`super::rows::Rope`] has them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Append {
    /// `[rows][kv_heads][d]` f32. Zero where nothing is to be appended.
    pub k: u64,
    pub v: u64,
    /// `[d]`, on each head before rope; or zero.
    pub q_norm: u64,
    pub k_norm: u64,
    /// `[positions][d / 2]`.
    pub cos: u64,
    pub sin: u64,
    /// Of each row.
    pub positions: u64,
    pub eps: f32,
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

/// Rows whose partial results are in memory at once, and their items.
#[derive(Clone, Debug)]
struct Slice {
    rows: Range<usize>,
    sealed: Range<usize>,
    exact: Range<usize>,
}

/// Bytes of partial results that are kept at once, where a single row does not need more.
const PARTIAL_BYTES: usize = 256 << 20;

/// What partial results take at most, where a single row does not need more: memory grows to powers of two.
pub const PARTIAL_MOST: usize = 2 * PARTIAL_BYTES;

/// Absorbed queries and partial results, between the launches of one layer's attention.
struct Partials {
    fragments: Memory<u16>,
    factors: Memory<f32>,
    offsets: Memory<f32>,
    sealed: Memory<u16>,
    sealed_state: Memory<f32>,
    exact: Memory<f32>,
    exact_state: Memory<f32>,
    /// How many blocks of a row's spans have ended; zero between launches.
    ended: Memory<u32>,
}

impl Partials {
    fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Partials {
            fragments: device.alloc(1)?,
            factors: device.alloc(1)?,
            offsets: device.alloc(1)?,
            sealed: device.alloc(1)?,
            sealed_state: device.alloc(1)?,
            exact: device.alloc(1)?,
            exact_state: device.alloc(1)?,
            ended: device.alloc(0)?,
        })
    }
}

/// Work on the device, and the memory of its partial results. Built once a step; launched once a layer.
pub struct DeviceWork {
    table: Memory<u32>,
    sealed_items: Memory<SealedItem>,
    exact_items: Memory<ExactItem>,
    rows: Memory<MergeRow>,
    slices: Vec<Slice>,
    partials: Arc<Mutex<Partials>>,
    /// Most parts a row has.
    parts: usize,
    /// Whether each row is a sequence's one position, over exact pages alone.
    single: bool,
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
    /// Cosines and sines, `[positions][d / 2]` f32, of positions up to the last that is met.
    pub rope: [u64; 2],
    /// `[rows][heads][d]` f32, after rope.
    pub q: u64,
    /// `[rows][heads * d]` bf16; and f32, or zero.
    pub out: u64,
    pub out_f32: u64,
    /// Rows of `q`.
    pub batch: usize,
    /// What is still to be done to queries, keys and values, where [`DeviceWork::appends`] says that this can.
    pub append: Append,
}

impl DeviceWork {
    /// Memory for nothing yet.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Self::of(device, Arc::new(Mutex::new(Partials::new(device)?)))
    }

    /// The same, with the memory of this one's partial results: launches of both follow one another, as a stream's do.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn another(&self, device: &Arc<Device>) -> Result<Self, CudaError> {
        Self::of(device, self.partials.clone())
    }

    fn of(device: &Arc<Device>, partials: Arc<Mutex<Partials>>) -> Result<Self, CudaError> {
        Ok(DeviceWork {
            table: device.alloc(1)?,
            sealed_items: device.alloc(1)?,
            exact_items: device.alloc(1)?,
            rows: device.alloc(1)?,
            slices: Vec::new(),
            partials,
            parts: 0,
            single: false,
        })
    }

    fn partials(&self) -> MutexGuard<'_, Partials> {
        self.partials.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.exact_items.reserve(work.exact.len())?;
        self.exact_items.write(0, &work.exact)?;
        let rank = most(&stride);
        let bytes = |sealed: usize, exact: usize| sealed * tiles * 16 * (2 * rank + 16) + exact * shape.heads * 4 * (shape.head_dim + 2);
        self.slices.clear();
        let mut rows = work.rows.clone();
        for (at, row) in rows.iter_mut().enumerate() {
            let (sealed, exact) = (row.sealed as usize..row.sealed_end as usize, row.exact as usize..row.exact_end as usize);
            match self.slices.last_mut() {
                Some(s) if bytes(sealed.end - s.sealed.start, exact.end - s.exact.start) <= PARTIAL_BYTES => {
                    (s.rows.end, s.sealed.end, s.exact.end) = (at + 1, sealed.end, exact.end);
                }
                _ => self.slices.push(Slice { rows: at..at + 1, sealed, exact }),
            }
            // Results of a slice lie from the beginning on.
            let slice = &self.slices[self.slices.len() - 1];
            let (sealed, exact) = (slice.sealed.start as u32, slice.exact.start as u32);
            (row.sealed, row.sealed_end) = (row.sealed - sealed, row.sealed_end - sealed);
            (row.exact, row.exact_end) = (row.exact - exact, row.exact_end - exact);
        }
        // Each result has the place of its part of the row, but those that take longest begin first: the last to end are short ones.
        let mut items = work.sealed.clone();
        for slice in &self.slices {
            let items = &mut items[slice.sealed.clone()];
            (0..).zip(&mut *items).for_each(|(part, item)| item.part = part);
            items.sort_by_key(|item| std::cmp::Reverse(item.pages));
        }
        self.sealed_items.reserve(items.len())?;
        self.sealed_items.write(0, &items)?;
        self.rows.reserve(rows.len())?;
        self.rows.write(0, &rows)?;
        self.single = work.sealed.is_empty() && work.sequences == work.rows.len();
        self.parts = work.rows.iter().map(|r| (r.sealed_end - r.sealed + r.exact_end - r.exact) as usize).max().unwrap_or(0);
        let (sealed, exact) = self.slices.iter().fold((0, 0), |(s, e), slice| (s.max(slice.sealed.len()), e.max(slice.exact.len())));
        let mut p = self.partials();
        if !work.sealed.is_empty() {
            p.fragments.reserve(batch * tiles * 256 * most(&|l| steps(l).max(key_width(l.blocks, l.keys.rank / l.blocks.max(1)) / 16)))?;
            p.factors.reserve(batch * tiles * 16)?;
            p.offsets.reserve(batch * tiles * 16)?;
            p.sealed.reserve(sealed * tiles * 16 * rank)?;
            p.sealed_state.reserve(sealed * tiles * 16 * 4)?;
        }
        p.exact.reserve(exact * shape.heads * shape.head_dim)?;
        p.exact_state.reserve(exact * shape.heads * 2)?;
        let blocks = exact * shape.kv_heads * head_groups(shape);
        if blocks > p.ended.len() {
            p.ended.reserve(blocks)?;
            p.ended.fill(0)?;
        }
        Ok(())
    }

    /// Adds all that its launches depend on, but for what lies in its memory.
    pub fn key(&self, key: &mut Vec<u64>) {
        key.extend([self.parts as u64, u64::from(self.single)]);
        key.extend(self.slices.iter().flat_map(|s| [s.rows.end, s.sealed.end, s.exact.end]).map(|n| n as u64));
        key.extend([self.table.ptr(), self.sealed_items.ptr(), self.exact_items.ptr(), self.rows.ptr()]);
        let p = self.partials();
        key.extend([p.fragments.ptr(), p.factors.ptr(), p.offsets.ptr(), p.sealed.ptr(), p.sealed_state.ptr()]);
        key.extend([p.exact.ptr(), p.exact_state.ptr(), p.ended.ptr()]);
    }

    /// Whether attention over the work, which is all of a batch of so many rows, can turn their queries and append their keys and values itself:
    /// where no row meets another's position, and none is absorbed.
    pub fn appends(&self, rows: usize) -> bool {
        self.single && rows == self.slices.last().map_or(0, |slice| slice.rows.end)
    }

    /// Nothing of another run is taken for the next one's.
    ///
    /// # Errors
    /// Where the device fails.
    pub(super) fn spoil(&mut self) -> Result<(), CudaError> {
        let mut p = self.partials();
        p.sealed.fill(0xff)?;
        p.sealed_state.fill(0xff)
    }

    /// Launches one layer's attention over the work.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where the layer is none that [`super::maps::serves`] passes.
    pub fn attend(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        self.absorb(device, layer)?;
        (0..self.slices.len()).try_for_each(|slice| {
            // In this order: what meets sealed pages does not wait for the other, which is small and waited for the queries.
            self.exact(device, layer, slice)?;
            self.sealed(device, layer, slice)?;
            self.merge(device, layer, slice)
        })
    }

    /// The absorbed queries of all rows.
    ///
    /// # Errors
    /// As [`DeviceWork::attend`].
    pub fn absorb(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        let Heads { heads, kv_heads, head_dim: d, scale } = layer.shape;
        let absorb = layer.maps.and_then(|maps| Some((maps, maps.absorb.as_ref()?)));
        if let (Some((maps, absorb)), true) = (absorb, self.slices.iter().any(|s| !s.sealed.is_empty())) {
            let p = self.partials();
            let args = AbsorbArgs {
                q: layer.q,
                map: absorb.ptr(),
                fragments: p.fragments.ptr(),
                factors: p.factors.ptr(),
                offsets: p.offsets.ptr(),
                scale,
                heads: heads as i32,
                kv_heads: kv_heads as i32,
                d: d as i32,
                rank: maps.width as i32,
                bits: if maps.way == Way::Words { layer.view.layout.sealed[layer.view.layer].keys.bits as i32 } else { PLAIN },
            };
            // SAFETY: memory of the shapes the kernel documents, made by `set` and `DeviceMaps::new`.
            unsafe { device.launch("absorb", [layer.batch, kv_heads, 1], 512, absorb_shared(d, maps.width), &args) }?;
        }
        Ok(())
    }

    /// The parts of a slice over sealed pages, right after [`DeviceWork::exact`], which waits for what both need.
    ///
    /// # Errors
    /// As [`DeviceWork::attend`].
    pub fn sealed(&self, device: &Device, layer: &AttendLayer<'_>, slice: usize) -> Result<(), CudaError> {
        let tiles = layer.shape.heads.div_ceil(16);
        let items = &self.slices[slice].sealed;
        if items.is_empty() {
            return Ok(());
        }
        let maps = layer.maps.expect("sealed pages have maps");
        if maps.way != Way::Words {
            return self.spread(device, layer, maps, items);
        }
        let part = layer.view.layout.sealed[layer.view.layer];
        let (k, v) = (part.keys, part.values);
        // Kernels take sixteen bytes at once.
        assert!(
            [k.codes, k.meta, v.codes, v.meta, 4 * v.rank].iter().all(|at| at.is_multiple_of(16)),
            "sections of words are aligned: {part:?}"
        );
        let p = self.partials();
        let args = SealedArgs {
            arena: layer.arena,
            table: self.table.ptr(),
            items: self.sealed_items.part(items.start, items.len()).ptr(),
            fragments: p.fragments.ptr(),
            factors: p.factors.ptr(),
            offsets: p.offsets.ptr(),
            out: p.sealed.ptr(),
            state: p.sealed_state.ptr(),
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
        let mt = tiles_at_once(layer.shape.heads);
        let bits = [k.bits, v.bits].map(|bits| bits as usize - 2);
        let own = warpgroup_shared(layer.shape.heads, &part);
        let (kernel, warps, shared) = if device.runs(Own::Sealed) && v.rank <= 256 && k.rank + v.rank > 0 && own <= device.shared {
            (SEALED_WARPGROUP[mt - 1][usize::from(v.rank > 128)][bits[0]][bits[1]], 4, own)
        } else {
            (SEALED[mt - 1][usize::from(v.rank > 32 * WARPS)][bits[0]][bits[1]], WARPS, sealed_shared(layer.shape.heads, &part))
        };
        // SAFETY: as above; pages were leased by who made the work.
        unsafe { device.launch(kernel, [items.len(), tiles / mt, 1], 32 * warps, shared, &args) }
    }

    /// Parts over sealed pages whose latents are spread before they are met.
    fn spread(&self, device: &Device, layer: &AttendLayer<'_>, maps: &DeviceMaps, items: &Range<usize>) -> Result<(), CudaError> {
        let Heads { heads, kv_heads, head_dim: d, scale } = layer.shape;
        let spread = maps.spread.expect("latents that are spread have a shape");
        let (kernel, meets, units) = match maps.way {
            Way::Rebuilt => ("attend_rebuilt", Meets::Rebuilt, kv_heads),
            _ => ("attend_absorbed", Meets::Absorbed, spread.groups),
        };
        let (lines, values) = meets.reach();
        let p = self.partials();
        let args = LatentsArgs {
            arena: layer.arena,
            table: self.table.ptr(),
            items: self.sealed_items.part(items.start, items.len()).ptr(),
            queries: if maps.way == Way::Rebuilt { layer.q } else { p.fragments.ptr() },
            factors: p.factors.ptr(),
            up: maps.key_up.ptr(),
            mean: maps.key_mean.as_ref().map_or(0, Memory::ptr),
            rope: layer.rope,
            out: p.sealed.ptr(),
            state: p.sealed_state.ptr(),
            scale,
            heads: heads as u32,
            units: units as u32,
            groups: spread.groups as u32,
            d: d as u32,
            tiles: heads.div_ceil(16) as u32,
            stride: maps.stride as u32,
            resident: u32::from(spread.resident),
            end: layer.view.layout.sealed[layer.view.layer].end as u32,
            keys: spread.keys,
            values: spread.values,
        };
        let blocks = units * (heads / units).div_ceil(lines);
        let cuts = (spread.values.width as usize).div_ceil(values).max(1);
        // SAFETY: as above.
        unsafe { device.launch(kernel, [items.len() * blocks, 1, cuts], THREADS, spread.shared, &args) }
    }

    /// Whether the blocks over exact pages merge the rows of a slice themselves, to the same bits: where those are all the parts there are,
    /// and each is a whole row or all blocks run at once. Of more blocks it takes longer than a launch (loadtest/gpu.md).
    fn merges_itself(&self, device: &Device, slice: usize, shape: Heads) -> bool {
        let Slice { sealed, exact, .. } = &self.slices[slice];
        let at_once = exact.len() * shape.kv_heads * head_groups(shape) <= 4 * device.processors;
        sealed.is_empty() && 16 * (1 + self.parts) <= exact_shared(shape.head_dim) && (self.parts == 1 || at_once)
    }

    /// The parts of a slice over exact pages, merged where it has no others.
    ///
    /// # Errors
    /// As [`DeviceWork::attend`].
    pub fn exact(&self, device: &Device, layer: &AttendLayer<'_>, slice: usize) -> Result<(), CudaError> {
        let items = &self.slices[slice].exact;
        let Heads { heads, kv_heads, head_dim: d, scale } = layer.shape;
        let layout = layer.view.layout;
        let (merged, merged_f32) = if self.merges_itself(device, slice, layer.shape) { (layer.out, layer.out_f32) } else { (0, 0) };
        let p = self.partials();
        let args = ExactArgs {
            arena: layer.arena,
            table: self.table.ptr(),
            items: self.exact_items.part(items.start, items.len()).ptr(),
            q: layer.q,
            out: p.exact.ptr(),
            state: p.exact_state.ptr(),
            merged,
            merged_f32,
            ended: p.ended.ptr(),
            scale,
            offset: layer.exact_offset as u32,
            sinks_offset: (layer.view.layer * layout.sinks_layer_bytes()) as u32,
            sinks_stride: layout.sinks_stride() as u32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            append: layer.append,
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
        // SAFETY: as above.
        unsafe { device.launch(kernel, [items.len(), kv_heads, head_groups(layer.shape)], 32 * EXACT_WARPS, exact_shared(d), &args) }
    }

    /// The parts of each row of a slice into one, where that is not done yet.
    ///
    /// # Errors
    /// As [`DeviceWork::attend`].
    pub fn merge(&self, device: &Device, layer: &AttendLayer<'_>, slice: usize) -> Result<(), CudaError> {
        let rows = &self.slices[slice].rows;
        let Heads { heads, kv_heads, head_dim: d, .. } = layer.shape;
        if self.merges_itself(device, slice, layer.shape) {
            return Ok(());
        }
        let rank = layer.maps.map_or(0, |maps| maps.stride);
        let tiles = heads.div_ceil(16);
        let p = self.partials();
        let args = MergeArgs {
            rows: self.rows.part(rows.start, rows.len()).ptr(),
            sealed: p.sealed.ptr(),
            sealed_state: p.sealed_state.ptr(),
            exact: p.exact.ptr(),
            exact_state: p.exact_state.ptr(),
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
        // SAFETY: as above.
        unsafe { device.launch("merge", [rows.len(), kv_heads, 1], MERGE_THREADS, merge_shared(rank, d, self.parts), &args) }
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

/// On devices with warpgroups, by tiles of 16 lines (1, 2), more than 128 value channels (of at most 256) or not, bits of keys and of values.
const SEALED_WARPGROUP: [[[[&str; 3]; 3]; 2]; 2] = [
    [
        [
            ["attend_sealed_wg_1_2_22", "attend_sealed_wg_1_2_23", "attend_sealed_wg_1_2_24"],
            ["attend_sealed_wg_1_2_32", "attend_sealed_wg_1_2_33", "attend_sealed_wg_1_2_34"],
            ["attend_sealed_wg_1_2_42", "attend_sealed_wg_1_2_43", "attend_sealed_wg_1_2_44"],
        ],
        [
            ["attend_sealed_wg_1_4_22", "attend_sealed_wg_1_4_23", "attend_sealed_wg_1_4_24"],
            ["attend_sealed_wg_1_4_32", "attend_sealed_wg_1_4_33", "attend_sealed_wg_1_4_34"],
            ["attend_sealed_wg_1_4_42", "attend_sealed_wg_1_4_43", "attend_sealed_wg_1_4_44"],
        ],
    ],
    [
        [
            ["attend_sealed_wg_2_2_22", "attend_sealed_wg_2_2_23", "attend_sealed_wg_2_2_24"],
            ["attend_sealed_wg_2_2_32", "attend_sealed_wg_2_2_33", "attend_sealed_wg_2_2_34"],
            ["attend_sealed_wg_2_2_42", "attend_sealed_wg_2_2_43", "attend_sealed_wg_2_2_44"],
        ],
        [
            ["attend_sealed_wg_2_4_22", "attend_sealed_wg_2_4_23", "attend_sealed_wg_2_4_24"],
            ["attend_sealed_wg_2_4_32", "attend_sealed_wg_2_4_33", "attend_sealed_wg_2_4_34"],
            ["attend_sealed_wg_2_4_42", "attend_sealed_wg_2_4_43", "attend_sealed_wg_2_4_44"],
        ],
    ],
];

/// Warps of a block over sealed pages.
const WARPS: usize = 8;
/// Warps of a block over exact pages, and bytes of its shared memory.
const EXACT_WARPS: usize = 4;
const fn exact_shared(d: usize) -> usize {
    4 * (6 * d + EXACT_WARPS * (4 * P + 4 * d + 8))
}

/// Blocks over exact pages that share a KV head: each meets four query heads.
const fn head_groups(shape: Heads) -> usize {
    (shape.heads / shape.kv_heads).div_ceil(4)
}

/// Bytes of shared memory of `absorb`.
pub(super) const fn absorb_shared(d: usize, rank: usize) -> usize {
    4 * (4 * d + 16 * rank + 16)
}

/// `AbsorbArgs` has it in place of bits where queries lie in the order of their latents (`PLAIN` of `latent.cuh`).
const PLAIN: i32 = 16;

/// Threads of a block that merges; kernels know them by that name.
const MERGE_THREADS: usize = 384;

/// Bytes of shared memory of `merge`.
pub(super) fn merge_shared(rank: usize, d: usize, parts: usize) -> usize {
    let each = if rank.is_multiple_of(8) { 2 } else { 1 };
    let slices = (each * MERGE_THREADS).checked_div(rank).map_or(0, |n| n.max(1));
    4 * (8 + 4 * parts.next_multiple_of(4) + 4 * (slices * rank).max(MERGE_THREADS / (d / 2) * d))
}

/// Tiles of 16 lines that a block over sealed pages meets.
const fn tiles_at_once(heads: usize) -> usize {
    if heads.div_ceil(16).is_multiple_of(2) { 2 } else { 1 }
}

/// Bytes of shared memory of `attend_sealed`.
pub(super) fn sealed_shared(heads: usize, layer: &SealedLayer) -> usize {
    let mt = tiles_at_once(heads);
    mt * steps(layer) * 512 + WARPS * mt * 2048 + 2 * WARPS * 16 * mt * 4 + 128 * mt + 4 * SEALED_MOST
}

/// Bytes of shared memory of `attend_sealed_wg`: queries; three pages' weights; lines, the table, sums of warps; two pages' keys with scales,
/// and values. Words beyond a page's are read, and not heeded: of keys up to 15 rows, of values up to 256 channels.
fn warpgroup_shared(heads: usize, layer: &SealedLayer) -> usize {
    let (mt, key_row) = (tiles_at_once(heads), 4 * P + 32);
    let key_rows = match layer.keys.bits {
        3 => layer.keys.rank.div_ceil(16) + layer.keys.rank.div_ceil(16).div_ceil(2),
        bits => layer.keys.rank.div_ceil(32 / bits as usize),
    };
    let value_rows = [4, 6, 8][layer.values.bits as usize - 2];
    let weights = if layer.values.bits == 4 { 4 * 512 * mt + 16 } else { 8 * (256 * mt + 16) };
    let values = (2 * value_rows * ((4 * layer.values.rank + 95) / 128 * 128 + 32)).max(15 * key_row) + 1024;
    512 * mt * steps(layer).next_multiple_of(4).max(4)
        + 3 * weights
        + 8 * 64 * mt
        + 4 * (SEALED_MOST + 4)
        + 512 * mt
        + 2 * (key_rows * key_row + 4 * P)
        + values
}

/// Steps of 16 channels of an absorbed query.
fn steps(layer: &SealedLayer) -> usize {
    match layer.keys.bits {
        4 => layer.keys.rank.div_ceil(32) * 2,
        _ => layer.keys.rank.div_ceil(64) * 4,
    }
}
