//! Exact causal attention of chunks of queries: launches of `prefill.cuh`.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::CudaError;
use super::driver::{Device, Memory, Part};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::ops::Heads;

/// Consecutive queries of one sequence, all of whose history is exact (`prefill::Row`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct PrefillRow {
    /// First of its rows in the batch, and how many.
    pub first: u32,
    pub n: u32,
    pub position: u32,
    /// First of its pages in the table.
    pub pages: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Item {
    row: u32,
    query: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PrefillArgs {
    arena: u64,
    pages: u64,
    rows: u64,
    items: u64,
    q: u64,
    out: u64,
    q_stride: u32,
    offset: u32,
    kv_heads: u32,
    scale: f32,
}

/// Queries of a block.
const BLOCK: u32 = 64;

/// Chunks of a step, on the device.
pub struct Prefill {
    rows: Vec<PrefillRow>,
    table: Vec<u32>,
    device_rows: Memory<PrefillRow>,
    device_items: Memory<Item>,
    device_table: Memory<u32>,
    items: usize,
}

impl Prefill {
    /// None yet.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let (device_rows, device_items, device_table) = (device.alloc(1)?, device.alloc(1)?, device.alloc(1)?);
        Ok(Prefill { rows: vec![], table: vec![], device_rows, device_items, device_table, items: 0 })
    }

    /// Forgets all chunks.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.table.clear();
        self.items = 0;
    }

    /// Adds `n` queries from row `first` of the batch on, the first of which stands at `position`.
    ///
    /// # Panics
    /// Where the pages do not reach the last of them.
    pub fn push(&mut self, first: u32, n: u32, position: u32, pages: &[PageAddr]) {
        let needed = (position + n).div_ceil(PAGE_TOKENS) as usize;
        self.rows.push(PrefillRow { first, n, position, pages: self.table.len() as u32 });
        self.table.extend(pages[..needed].iter().map(|p| p.0));
    }

    /// Takes the chunks to the device.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn set(&mut self) -> Result<(), CudaError> {
        let mut items: Vec<Item> =
            (0..).zip(&self.rows).flat_map(|(row, r)| (0..r.n).step_by(BLOCK as usize).map(move |query| Item { row, query })).collect();
        // Those that see most first, so that the last to begin are soon done.
        items.sort_by_key(|i| std::cmp::Reverse(self.rows[i.row as usize].position + i.query));
        self.items = items.len();
        self.device_rows.reserve(self.rows.len())?;
        self.device_rows.write(0, &self.rows)?;
        self.device_items.reserve(items.len())?;
        self.device_items.write(0, &items)?;
        self.device_table.reserve(self.table.len())?;
        self.device_table.write(0, &self.table)
    }

    /// Adds all that its launches depend on, but for what lies in its memory.
    pub fn key(&self, key: &mut Vec<u64>) {
        key.extend([self.items as u64, self.device_rows.ptr(), self.device_items.ptr(), self.device_table.ptr()]);
    }

    /// Attention of all chunks in one layer, which begins at byte `offset` of a page. Queries `[rows][heads][d]` f32 after rope;
    /// out `[rows][heads * d]` bf16.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit, or heads are of other than 64, 80, 96 or 128 channels.
    pub fn attend(
        &self,
        device: &Device,
        shape: Heads,
        arena: &Memory<u8>,
        offset: usize,
        (q, out): (Part<'_, f32>, Part<'_, u16>),
    ) -> Result<(), CudaError> {
        if self.items == 0 {
            return Ok(());
        }
        let Heads { heads, kv_heads, head_dim: d, scale } = shape;
        let end = self.rows.iter().map(|r| (r.first + r.n) as usize).max().unwrap_or(0) * heads * d;
        assert!(q.len() >= end && out.len() >= end, "chunks beyond q");
        let args = PrefillArgs {
            arena: arena.ptr(),
            pages: self.device_table.ptr(),
            rows: self.device_rows.ptr(),
            items: self.device_items.ptr(),
            q: q.ptr(),
            out: out.ptr(),
            q_stride: (heads * d) as u32,
            offset: offset as u32,
            kv_heads: kv_heads as u32,
            scale: scale * std::f32::consts::LOG2_E,
        };
        let kernel = match d {
            64 => "prefill_64_64_16",
            80 => "prefill_80_64_16",
            96 => "prefill_96_64_16",
            128 => "prefill_128_64_16",
            _ => panic!("heads of {d} channels were refused"),
        };
        // SAFETY: shapes were checked; pages were leased by who made the chunks.
        unsafe { device.launch(kernel, [heads, self.items, 1], 128, 4 * (72 * d + 64 * (d + 8)), &args) }
    }
}
