//! What adapters change of a batch on the device: launches of `lora.cuh`.
//!
//! Which rows wear which adapter is uploaded once a step; what an adapter does at each place of the model stands in a table that lies
//! with its factors. So a launch depends on neither, and a recorded step serves any adapters.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::CudaError;
use super::driver::{Device, Memory, Part};

/// Rows of an item, k of a split, ranks of a tile (`lora.cuh`).
const ROWS: usize = 64;
const SPLIT: usize = 512;
const RANKS: usize = 16;
/// Of a row that wears nothing.
const NOBODY: u32 = u32::MAX;

/// What an adapter does at one place (`lora::Site`): addresses on the device, zero for none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct Site {
    /// bf16 `[rank][in]`.
    pub down: u64,
    /// bf16 `[out / 64 rounded up][rank / 2 rounded up][64][2]`.
    pub up: u64,
    /// f32 `[out]` each.
    pub gain: u64,
    pub bias: u64,
    pub own_bias: u64,
    pub rank: u32,
    /// Whether `own_bias` is the bias of the layer's output, instead of the model's.
    pub replaced: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct WornArgs {
    sites: u64,
    first: u32,
    rows: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Item {
    worn: u32,
    row: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ShrinkArgs {
    worn: u64,
    items: u64,
    x: u64,
    high: u64,
    low: u64,
    partials: u64,
    ended: u64,
    place: [u32; 3],
    inputs: u32,
    stride: u32,
    tiles: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ExpandArgs {
    worn: u64,
    items: u64,
    high: u64,
    low: u64,
    y: [u64; 3],
    place: [u32; 3],
    out: [u32; 3],
    stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AdaptArgs {
    worn: u64,
    of_row: u64,
    y: u64,
    onto: u64,
    bias: u64,
    place: u32,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbedAdaptedArgs {
    tokens: u64,
    gain: u64,
    down: u64,
    up: u64,
    x: u64,
    width: u32,
    rank: u32,
}

/// Neighbouring rows of a batch that wear one adapter.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its table of [`Site`]s.
    pub sites: u64,
    /// Its largest rank.
    pub rank: usize,
    pub rows: Range<usize>,
}

/// Linear layers that read the same input: how long that is, and how many they are.
pub type Shape = (usize, usize);

/// An output that updates are added to.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Which [`Site`] of a table.
    pub place: usize,
    /// f32 `[rows][out]`.
    pub y: u64,
    pub out: usize,
}

/// Who wears what in a batch, on the device, and memory for what is shrunk.
pub struct WornRows {
    worn: Memory<WornArgs>,
    items: Memory<Item>,
    of_row: Memory<u32>,
    /// What is shrunk, in two parts; sums that are left to be added; how many blocks of each have ended, zero between launches.
    high: Memory<u16>,
    low: Memory<u16>,
    partials: Memory<f32>,
    ended: Memory<u32>,
    segments: usize,
    count: usize,
    /// Ranks of the widest adapter, in whole tiles.
    stride: usize,
    processors: usize,
}

impl WornRows {
    /// Nobody wears anything.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(WornRows {
            worn: device.alloc(1)?,
            items: device.alloc(1)?,
            of_row: device.alloc(1)?,
            high: device.alloc(1)?,
            low: device.alloc(1)?,
            partials: device.alloc(1)?,
            ended: device.alloc(1)?,
            segments: 0,
            count: 0,
            stride: 0,
            processors: device.processors,
        })
    }

    /// Takes the segments of a batch of `rows` to the device, and makes room for what layers of `shapes` shrink.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn set(&mut self, segments: &[Segment], rows: usize, shapes: &[Shape]) -> Result<(), CudaError> {
        (self.count, self.segments) = (0, segments.len());
        if segments.is_empty() {
            return Ok(());
        }
        let mut of_row = vec![NOBODY; rows];
        let (mut worn, mut items) = (Vec::with_capacity(segments.len()), Vec::new());
        for (at, segment) in (0u32..).zip(segments) {
            of_row[segment.rows.clone()].fill(at);
            items.extend(segment.rows.clone().step_by(ROWS).map(|row| Item { worn: at, row: row as u32 }));
            worn.push(WornArgs { sites: segment.sites, first: segment.rows.start as u32, rows: segment.rows.len() as u32 });
        }
        self.count = items.len();
        self.stride = segments.iter().map(|s| s.rank).max().unwrap_or(0).next_multiple_of(RANKS);
        // Fewer of a shape's targets may be touched, and then be split.
        let most = shapes.iter().flat_map(|&(inputs, targets)| (1..=targets).map(move |t| (inputs, t)));
        let partials =
            most.map(|(inputs, targets)| if self.splits(inputs, targets) > 1 { self.splits(inputs, targets) * targets } else { 0 });
        let (partials, targets) = (partials.max().unwrap_or(0), shapes.iter().map(|s| s.1).max().unwrap_or(0));
        let each = self.count * ROWS * self.stride;
        self.worn.reserve(worn.len())?;
        self.worn.write(0, &worn)?;
        self.items.reserve(items.len())?;
        self.items.write(0, &items)?;
        self.of_row.reserve(rows)?;
        self.of_row.write(0, &of_row)?;
        self.high.reserve(targets * each)?;
        self.low.reserve(targets * each)?;
        self.partials.reserve(partials * each)?;
        let counts = targets * self.stride / RANKS * self.count;
        if counts > self.ended.len() {
            self.ended.reserve(counts)?;
            self.ended.fill(0)?;
        }
        Ok(())
    }

    /// Adds all that launches depend on, but for what lies in its memory and in tables.
    pub fn key(&self, key: &mut Vec<u64>) {
        key.push(self.count as u64);
        if self.count > 0 {
            key.extend([self.stride as u64, self.segments as u64, self.worn.ptr(), self.items.ptr(), self.of_row.ptr()]);
            key.extend([self.high.ptr(), self.low.ptr(), self.partials.ptr(), self.ended.ptr()]);
        }
    }

    /// Blocks that share the sum of a shrunk element: where items alone do not fill the device, its input is split.
    fn splits(&self, inputs: usize, targets: usize) -> usize {
        let blocks = self.count * targets * (self.stride / RANKS);
        if blocks >= 2 * self.processors { 1 } else { inputs.div_ceil(SPLIT) }
    }

    /// Shrinks `x: [rows][inputs]` bf16 for all targets.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// For more than three targets, or a shape that was not told of.
    pub fn shrink(&self, device: &Device, (x, inputs): (u64, usize), targets: &[Target]) -> Result<(), CudaError> {
        let splits = self.splits(inputs, targets.len());
        let elements = targets.len() * self.count * ROWS * self.stride;
        let partials = if splits > 1 { splits * elements } else { 0 };
        let room = elements <= self.high.len().min(self.low.len()) && partials <= self.partials.len();
        assert!(room && inputs.is_multiple_of(8), "{elements} sums of inputs of {inputs}");
        assert!(targets.len() * self.stride / RANKS * self.count <= self.ended.len(), "counts of {elements} sums");
        let args = ShrinkArgs {
            worn: self.worn.ptr(),
            items: self.items.ptr(),
            x,
            high: self.high.ptr(),
            low: self.low.ptr(),
            partials: self.partials.ptr(),
            ended: self.ended.ptr(),
            place: three(targets, |t| t.place as u32),
            inputs: inputs as u32,
            stride: self.stride as u32,
            tiles: (self.stride / RANKS) as u32,
        };
        let grid = [self.count, splits, targets.len() * (self.stride / RANKS)];
        // SAFETY: memory of the shapes the kernel documents; tables are of adapters that the batch holds.
        unsafe { device.launch("lora_shrink", grid, 128, 20480, &args) }
    }

    /// Adds what was shrunk last, for the same targets, to each.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// For more than three targets.
    pub fn expand(&self, device: &Device, targets: &[Target]) -> Result<(), CudaError> {
        let args = ExpandArgs {
            worn: self.worn.ptr(),
            items: self.items.ptr(),
            high: self.high.ptr(),
            low: self.low.ptr(),
            y: three(targets, |t| t.y),
            place: three(targets, |t| t.place as u32),
            out: three(targets, |t| t.out as u32),
            stride: self.stride as u32,
        };
        // Several tiles a block, once there are blocks enough.
        let tiles = targets.iter().map(|t| t.out.div_ceil(64)).max().unwrap_or(0);
        let blocks = (8 * self.processors).div_ceil(self.count * targets.len()).clamp(1, tiles.max(1));
        // SAFETY: as above.
        unsafe { device.launch("lora_expand", [blocks, self.count, targets.len()], 128, 34816, &args) }
    }

    /// What was shrunk last, to be expanded where products are summed. `of[i]` are the places in adapters' tables and the shrunk targets
    /// of job `i`, of a gated one two.
    ///
    /// # Panics
    /// For a batch whose segments have more than 64 rows.
    pub fn fused(&self, of: [[Option<(usize, usize)>; 2]; 3]) -> Fused {
        assert_eq!(self.count, self.segments, "segments are items where products are few");
        let half = |f: fn((usize, usize)) -> usize| of.map(|halves| halves.map(|h| h.map_or(u16::MAX, |h| f(h) as u16)));
        Fused {
            worn: self.worn.ptr(),
            high: self.high.ptr(),
            low: self.low.ptr(),
            segments: self.segments as u32,
            stride: self.stride as u32,
            place: half(|(place, _)| place),
            target: half(|(_, target)| target),
        }
    }

    /// Gains and biases of adapters on a layer's own output `y: [rows][width]`, which has the model's `bias` in it; stays there, or is
    /// added `onto` as long rows, those that wear nothing too.
    ///
    /// # Errors
    /// Where the device refuses.
    pub fn adapt(&self, device: &Device, rows: usize, target: Target, onto: u64, bias: u64) -> Result<(), CudaError> {
        let Target { place, y, out } = target;
        assert!(rows <= self.of_row.len(), "{rows} rows");
        let args = AdaptArgs { worn: self.worn.ptr(), of_row: self.of_row.ptr(), y, onto, bias, place: place as u32, width: out as u32 };
        // SAFETY: as above.
        unsafe { device.launch("adapt_rows", [rows, out.div_ceil(1024), 1], 256, 0, &args) }
    }
}

/// What adapters add to products (the end of `LinearsWorn` in `linear.cuh`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Fused {
    worn: u64,
    high: u64,
    low: u64,
    segments: u32,
    stride: u32,
    place: [[u16; 2]; 3],
    target: [[u16; 2]; 3],
}

fn three<T: Copy + Default>(targets: &[Target], of: impl Fn(&Target) -> T) -> [T; 3] {
    assert!(targets.len() <= 3, "{} targets", targets.len());
    let mut out = [T::default(); 3];
    out.iter_mut().zip(targets).for_each(|(to, t)| *to = of(t));
    out
}

/// What an adapter adds to the vectors of tokens: addresses on the device, zero for none.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmbedSite {
    /// f32 `[width]`.
    pub gain: u64,
    /// bf16 `[vocabulary][rank]`, f32 `[rank][width]`.
    pub down: u64,
    pub up: u64,
    pub rank: usize,
}

impl Device {
    /// `x[i] = gain * x[i] + down[tokens[i]] up`, for vectors of `width`.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit. Tokens must be rows of `down`, which the caller has checked.
    pub fn embed_adapted(&self, tokens: Part<'_, u32>, site: &EmbedSite, width: usize, x: Part<'_, f32>) -> Result<(), CudaError> {
        assert!(x.len() >= tokens.len() * width, "{} rows of {width} in {}", tokens.len(), x.len());
        let EmbedSite { gain, down, up, rank } = *site;
        let args = EmbedAdaptedArgs { tokens: tokens.ptr(), gain, down, up, x: x.ptr(), width: width as u32, rank: rank as u32 };
        // SAFETY: shapes were checked; the site is of an adapter that the batch holds.
        unsafe { self.launch("embed_adapted", [tokens.len(), 1, 1], 256, 0, &args) }
    }
}
