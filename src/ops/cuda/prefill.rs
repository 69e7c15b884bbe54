//! Attention of chunks of queries: launches of `prefill.cuh` over exact pages, and over sealed ones that `rebuild.cuh` makes such pages of.
//!
//! Sealed pages are rebuilt a span at a time into scratch memory, which the second-level cache holds, and met there by all queries of the chunk;
//! what queries have come to is carried from span to span, and to the exact pages. Spans are counted from position 0, so what a query comes
//! to does not depend on the chunk it is in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};

use super::attend::AttendLayer;
use super::driver::{Device, Memory, Own};
use super::latents::{Meets, PartArgs, Spread, THREADS};
use super::{CudaError, trial};
use crate::ids::PAGE_TOKENS;
use crate::kv::layout::ExactType;
use crate::ops::{AttendRow, Heads};

const P: usize = PAGE_TOKENS as usize;
/// Sealed pages of a row that are rebuilt at once, and of all rows together: 32 MiB of the pages of 8 KV heads of 128 channels.
const SPAN: usize = 64;
const ROUND: usize = 128;
const CARRIED_IN: u32 = 1;
const CARRIED_OUT: u32 = 2;

/// Consecutive queries of one sequence over pages that lie as exact ones do (`prefill::Row`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct PrefillRow {
    /// First of its rows in the batch, and how many.
    pub first: u32,
    pub n: u32,
    /// Of its first query, counted from its first page.
    pub position: u32,
    /// First of its pages in the table.
    pub pages: u32,
    /// Positions that all its queries see; zero where they see those up to their own.
    pub seen: u32,
    pub carry: u32,
}

/// A sealed page to rebuild (`RebuildJob` of `rebuild.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct RebuildJob {
    from: u32,
    page: u32,
    sinks_page: u32,
    sinks: u32,
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
    carried: u64,
    carried_state: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RebuildArgs {
    arena: u64,
    jobs: u64,
    out: u64,
    key_up: u64,
    key_mean: u64,
    rope: [u64; 2],
    value_up: u64,
    value_mean: u64,
    groups: u32,
    d: u32,
    value_rows: u32,
    sinks_offset: u32,
    sinks_stride: u32,
    keys: PartArgs,
    values: PartArgs,
}

/// Channels of a head, and their kernels.
const D: [usize; 4] = [64, 80, 96, 128];
const COMMON: [&str; 4] = ["prefill_64", "prefill_80", "prefill_96", "prefill_128"];
const WIDE: [&str; 4] = ["prefill_wg_64", "prefill_wg_80", "prefill_wg_96", "prefill_wg_128"];

/// The sealed pages that a row of the batch meets before its exact ones.
struct Sealed {
    row: usize,
    jobs: Vec<RebuildJob>,
    /// Positions that are met of them.
    seen: usize,
}

/// Spans of sealed pages that are rebuilt and met at once: ranges of jobs and of items.
#[derive(Clone, Debug, PartialEq)]
struct Round {
    jobs: std::ops::Range<usize>,
    items: std::ops::Range<usize>,
}

/// What lies between the rounds of one layer.
struct Carry {
    /// Rebuilt pages of a round.
    rebuilt: Memory<u16>,
    carried: Memory<f32>,
    carried_state: Memory<f32>,
}

impl Carry {
    /// Makes room for so many rebuilt pages, and what so many queries have come to.
    fn reserve(&mut self, shape: Heads, pages: usize, queries: usize) -> Result<(), CudaError> {
        self.rebuilt.reserve(pages * page_units(shape) * 32)?;
        self.carried.reserve(queries * shape.heads * shape.head_dim)?;
        self.carried_state.reserve(queries * shape.heads * 2)
    }
}

/// Chunks of a step, on the device.
pub struct Prefill {
    rows: Vec<PrefillRow>,
    table: Vec<u32>,
    sealed: Vec<Sealed>,
    span: usize,
    /// Whether warpgroups meet its chunks.
    wide: bool,
    device_rows: Memory<PrefillRow>,
    device_items: Memory<Item>,
    device_table: Memory<u32>,
    device_jobs: Memory<RebuildJob>,
    carry: Arc<Mutex<Carry>>,
    rounds: Vec<Round>,
    /// Over exact pages, before those of the rounds.
    items: usize,
}

impl Prefill {
    /// None yet.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Self::in_spans(device, SPAN)
    }

    /// None yet; sealed pages will be rebuilt so many of a row at once, which is more than none.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn in_spans(device: &Arc<Device>, span: usize) -> Result<Self, CudaError> {
        let carry = Carry { rebuilt: device.alloc(1)?, carried: device.alloc(1)?, carried_state: device.alloc(1)? };
        Self::of(device, span, Arc::new(Mutex::new(carry)))
    }

    /// None yet, with the memory between launches of this one: launches of both follow one another, as a stream's do.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn another(&self, device: &Arc<Device>) -> Result<Self, CudaError> {
        Self::of(device, self.span, self.carry.clone())
    }

    fn of(device: &Arc<Device>, span: usize, carry: Arc<Mutex<Carry>>) -> Result<Self, CudaError> {
        Ok(Prefill {
            rows: vec![],
            table: vec![],
            sealed: vec![],
            span,
            wide: device.runs(Own::Prefill),
            device_rows: device.alloc(1)?,
            device_items: device.alloc(1)?,
            device_table: device.alloc(1)?,
            device_jobs: device.alloc(1)?,
            carry,
            rounds: vec![],
            items: 0,
        })
    }

    /// Makes room for what lies between launches, however much of a step is chunks over sealed pages, of so many queries together.
    ///
    /// # Errors
    /// Where there is none.
    pub fn reserve(&mut self, shape: Heads, queries: usize) -> Result<(), CudaError> {
        self.carry().reserve(shape, ROUND, queries)
    }

    fn carry(&self) -> MutexGuard<'_, Carry> {
        self.carry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all chunks.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.table.clear();
        self.sealed.clear();
        self.rounds.clear();
        self.items = 0;
    }

    /// Adds the `n` queries of a row, the first of which stands at its position; the first is row `first` of the batch.
    ///
    /// # Panics
    /// Where the pages do not reach the last of them.
    pub fn push(&mut self, first: u32, of: &AttendRow<'_>) {
        let layout = of.view.layout;
        let before = of.sealed.len() * P;
        let sinks = if of.sinks.is_some() && before > 0 { layout.sinks } else { 0 };
        // Of what is dropped only the sinks are met.
        let (pages, seen) = if layout.drops { (usize::from(sinks > 0), sinks as usize) } else { (of.sealed.len(), before) };
        if seen > 0 {
            let job = |(at, page): (usize, &crate::ids::PageAddr)| RebuildJob {
                from: page.0,
                page: at as u32,
                sinks_page: of.sinks.map_or(0, |p| p.0),
                sinks: if at == 0 { sinks } else { 0 },
            };
            let jobs = of.sealed[..pages].iter().enumerate().map(job).collect();
            self.sealed.push(Sealed { row: self.rows.len(), jobs, seen });
        }
        let position = of.position as usize - before;
        let carry = if seen > 0 { CARRIED_IN } else { 0 };
        self.rows.push(PrefillRow { first, n: of.n as u32, position: position as u32, pages: self.table.len() as u32, seen: 0, carry });
        self.table.extend(of.exact[..(position + of.n).div_ceil(P)].iter().map(|p| p.0));
    }

    /// Takes the chunks to the device, and makes room for what lies between launches.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn set(&mut self, shape: Heads) -> Result<(), CudaError> {
        let block = if self.wide { 128 } else { 64 };
        let blocks = |row: usize, n: u32| (0..n).step_by(block).map(move |query| Item { row: row as u32, query });
        let (mut rows, mut table) = (self.rows.clone(), self.table.clone());
        let mut items: Vec<Item> = rows.iter().enumerate().flat_map(|(row, r)| blocks(row, r.n)).collect();
        // Those that see most first, so that the last to begin are soon done.
        items.sort_by_key(|i| std::cmp::Reverse(rows[i.row as usize].position + i.query));
        self.items = items.len();
        // A row has one span in a round at most, as each goes on from the one before.
        let mut jobs: Vec<RebuildJob> = vec![];
        let mut done = vec![0; self.sealed.len()];
        loop {
            let (first_job, first_item) = (jobs.len(), items.len());
            for (sealed, done) in self.sealed.iter().zip(&mut done) {
                let n = self.span.min(sealed.jobs.len() - *done);
                let used = jobs.len() - first_job;
                if n == 0 || used > 0 && used + n > ROUND {
                    continue;
                }
                let row = self.rows[sealed.row];
                let seen = (sealed.seen - *done * P).min(n * P) as u32;
                let carry = CARRIED_OUT | if *done > 0 { CARRIED_IN } else { 0 };
                items.extend(blocks(rows.len(), row.n));
                rows.push(PrefillRow { position: 0, pages: table.len() as u32, seen, carry, ..row });
                table.extend((used..used + n).map(|page| (page * page_units(shape)) as u32));
                jobs.extend(&sealed.jobs[*done..*done + n]);
                *done += n;
            }
            if jobs.len() == first_job {
                break;
            }
            self.rounds.push(Round { jobs: first_job..jobs.len(), items: first_item..items.len() });
        }
        if !self.rounds.is_empty() {
            let most = self.rounds.iter().map(|r| r.jobs.len()).max().unwrap_or(0);
            let lines = self.rows.iter().map(|r| (r.first + r.n) as usize).max().unwrap_or(0);
            self.carry().reserve(shape, most, lines)?;
        }
        self.device_rows.reserve(rows.len())?;
        self.device_rows.write(0, &rows)?;
        self.device_items.reserve(items.len())?;
        self.device_items.write(0, &items)?;
        self.device_table.reserve(table.len())?;
        self.device_table.write(0, &table)?;
        self.device_jobs.reserve(jobs.len())?;
        self.device_jobs.write(0, &jobs)
    }

    /// Adds all that its launches depend on, but for what lies in its memory.
    pub fn key(&self, key: &mut Vec<u64>) {
        key.extend([self.items as u64, self.device_rows.ptr(), self.device_items.ptr(), self.device_table.ptr()]);
        let carry = self.carry();
        key.extend([self.device_jobs.ptr(), carry.rebuilt.ptr(), carry.carried.ptr(), carry.carried_state.ptr()]);
        key.push(self.rounds.len() as u64);
        key.extend(self.rounds.iter().flat_map(|r| [r.jobs.end, r.items.end]).map(|n| n as u64));
    }

    /// Attention of all chunks in one layer.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit, exact pages are not of bf16, or the layer is none that [`super::maps::serves`] passes.
    pub fn attend(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        if self.items == 0 {
            return Ok(());
        }
        assert!(layer.view.layout.exact == ExactType::Bf16, "chunks meet exact pages of bf16");
        assert!(self.rows.iter().all(|r| (r.first + r.n) as usize <= layer.batch), "chunks beyond the batch");
        let rebuilt = self.carry().rebuilt.ptr();
        for round in &self.rounds {
            self.rebuild(device, layer, round)?;
            self.meet(device, layer.shape, (layer.q, layer.out), (rebuilt, 0), round.items.clone())?;
        }
        self.meet(device, layer.shape, (layer.q, layer.out), (layer.arena, layer.exact_offset), 0..self.items)
    }

    /// Rebuilds all sealed pages of a layer, and meets none of them: what that costs by itself.
    ///
    /// # Errors
    /// As [`Prefill::attend`].
    pub fn rebuild_all(&self, device: &Device, layer: &AttendLayer<'_>) -> Result<(), CudaError> {
        self.rounds.iter().try_for_each(|round| self.rebuild(device, layer, round))
    }

    /// The sealed pages of a round, as exact ones.
    fn rebuild(&self, device: &Device, layer: &AttendLayer<'_>, round: &Round) -> Result<(), CudaError> {
        let Heads { kv_heads, head_dim: d, .. } = layer.shape;
        let (layout, maps) = (layer.view.layout, layer.maps);
        let part = &layout.sealed[layer.view.layer];
        // What is dropped has no maps, and no latents.
        let spread = maps.map_or_else(|| Spread::new(part, Meets::Pages, d, device.shared), |m| Ok(m.pages));
        let spread = spread.expect("the layer is served");
        let turns = maps.is_some_and(|m| m.key_mean.is_some());
        let args = RebuildArgs {
            arena: layer.arena,
            jobs: self.device_jobs.part(round.jobs.start, round.jobs.len()).ptr(),
            out: self.carry().rebuilt.ptr(),
            key_up: maps.map_or(0, |m| m.key_up.ptr()),
            key_mean: maps.and_then(|m| m.key_mean.as_ref()).map_or(0, Memory::ptr),
            rope: if turns { layer.rope } else { [0; 2] },
            value_up: maps.map_or(0, |m| m.up.ptr()),
            value_mean: maps.map_or(0, |m| m.mean.ptr()),
            groups: spread.groups as u32,
            d: d as u32,
            value_rows: maps.map_or(0, |m| m.stride as u32),
            sinks_offset: (layer.view.layer * layout.sinks_layer_bytes()) as u32,
            sinks_stride: layout.sinks_stride() as u32,
            keys: spread.keys,
            values: spread.values,
        };
        // SAFETY: pages were leased by who made the chunks; maps and scratch memory have the layer's shapes.
        unsafe { device.launch("rebuild_pages", [round.jobs.len(), kv_heads, 1], THREADS, spread.shared, &args) }
    }

    /// Some items over pages of `arena` and the byte offset of the layer in them.
    fn meet(
        &self,
        device: &Device,
        shape: Heads,
        (q, out): (u64, u64),
        (arena, offset): (u64, usize),
        items: std::ops::Range<usize>,
    ) -> Result<(), CudaError> {
        let Heads { heads, kv_heads, head_dim: d, scale } = shape;
        let carry = self.carry();
        let args = PrefillArgs {
            arena,
            pages: self.device_table.ptr(),
            rows: self.device_rows.ptr(),
            items: self.device_items.part(items.start, items.len()).ptr(),
            q,
            out,
            q_stride: (heads * d) as u32,
            offset: offset as u32,
            kv_heads: kv_heads as u32,
            scale: scale * std::f32::consts::LOG2_E,
            carried: carry.carried.ptr(),
            carried_state: carry.carried_state.ptr(),
        };
        let at = D.iter().position(|&of| of == d).unwrap_or_else(|| panic!("heads of {d} channels were refused"));
        let (kernel, block, shared) = if self.wide { (WIDE[at], 256, 1536 * d) } else { (COMMON[at], 128, 4 * (72 * d + 64 * (d + 8))) };
        // SAFETY: shapes were checked; pages were leased by who made the chunks.
        unsafe { device.launch(kernel, [heads, items.len(), 1], block, shared, &args) }
    }
}

/// Attention of `n` queries after a history, all at random and always the same: what kernels are tried with.
pub(super) struct Sample {
    shape: Heads,
    /// Launched one after the other: parts of the history that are met first and carried, and the rest.
    rows: Vec<PrefillRow>,
    arena: Memory<u16>,
    table: Memory<u32>,
    q: Memory<f32>,
    out: Memory<u16>,
}

impl Sample {
    /// The pages of the history are met so many at a time first, or with the queries' own where that is zero.
    ///
    /// # Errors
    /// Where there is no room.
    pub(super) fn new(device: &Arc<Device>, shape: Heads, (n, history): (usize, usize), split: usize) -> Result<Self, CudaError> {
        let pages = (history + n).div_ceil(P);
        let before = if split > 0 { history / P } else { 0 };
        let one = |seen: usize, at: usize, carry: u32| PrefillRow {
            first: 0,
            n: n as u32,
            position: (history - at * P) as u32,
            pages: at as u32,
            seen: (seen * P) as u32,
            carry,
        };
        let carried_in = |at: usize| if at > 0 { CARRIED_IN } else { 0 };
        let mut rows: Vec<_> =
            (0..before).step_by(split.max(1)).map(|at| one(split.min(before - at), at, CARRIED_OUT | carried_in(at))).collect();
        rows.push(one(0, before, carried_in(before)));
        let q = trial::uniform(3, n * shape.heads * shape.head_dim, 4.0);
        Ok(Sample {
            shape,
            rows,
            arena: trial::random(device, 4, pages * page_units(shape) * 32)?,
            table: device.upload(&(0..pages).map(|page| (page * page_units(shape)) as u32).collect::<Vec<_>>())?,
            out: device.alloc(q.len())?,
            q: device.upload(&q)?,
        })
    }

    /// What the kernels that the device runs make of it, `[n][heads * D]`, and the milliseconds they take.
    ///
    /// # Errors
    /// Where there is no room, or the device fails.
    pub(super) fn run(&mut self, device: &Arc<Device>) -> Result<(Vec<f32>, f64), CudaError> {
        // Nothing of another run is taken for this one's.
        self.out.fill(0xff)?;
        let mut work = Prefill::new(device)?;
        let block = if work.wide { 128 } else { 64 };
        let each = self.rows[0].n.div_ceil(block);
        let items: Vec<_> = (0..self.rows.len() as u32).flat_map(|row| (0..each).map(move |i| Item { row, query: i * block })).collect();
        work.device_rows = device.upload(&self.rows)?;
        work.device_items = device.upload(&items)?;
        work.device_table = device.upload(&self.table.to_vec()?)?;
        work.carry().reserve(self.shape, 0, self.rows[0].n as usize)?;
        let ms = device.time(3, || {
            (0..self.rows.len()).try_for_each(|row| {
                let items = row * each as usize..(row + 1) * each as usize;
                work.meet(device, self.shape, (self.q.ptr(), self.out.ptr()), (self.arena.ptr(), 0), items)
            })
        })?;
        Ok((self.out.to_vec()?.iter().map(|&b| half::bf16::from_bits(b).to_f32()).collect(), ms))
    }
}

/// Units of page addresses that one layer of an exact page of bf16 takes.
const fn page_units(shape: Heads) -> usize {
    2 * shape.kv_heads * shape.head_dim * P * 2 / 64
}
