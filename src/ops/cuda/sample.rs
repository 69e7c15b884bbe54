//! Tokens from logits that stay on the device: launches of `sample.cuh`.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::CudaError;
use super::driver::{Device, Memory, Part, Pinned};

/// Most alternatives beside a token's log-probability (`sample::TOP`).
pub const TOP: usize = 32;
/// Widest logits: as many slices as a block has heads to merge, each as wide as its threads have room for.
pub const WIDEST: usize = SLICES * SLICE;

/// Most slices of a row, and logits of one; least logits that are worth a block.
const SLICES: usize = 128;
const SLICE: usize = 64 * 256;
const LEAST: usize = 2048;
/// Bins of a row's histogram (`sample::BINS`), and candidates that are listed at most (`sample::LISTED`).
const BINS: usize = 1280;
const LISTED: usize = 16384;

/// No token, no log-probability.
pub const NONE: u32 = u32::MAX;

/// What is asked of a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    Nothing = 0,
    Token = 1,
    Score = 2,
}

/// What is asked of a row's logits, in full (`SampleRow`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Asked {
    pub seed: u64,
    /// As a share of 2^64; zero keeps all.
    pub top_p: u64,
    /// Of the draw.
    pub index: u32,
    /// Steps of 2^-24 octave that a logit is worth; zero is greedy.
    pub scale: f32,
    /// Zero keeps all.
    pub top_k: u32,
    /// Most steps below the best that are kept.
    pub most: u32,
    pub repetition: f32,
    /// To be scored.
    pub token: u32,
    /// At most [`TOP`]; [`NONE`] where no log-probability is asked for.
    pub alternatives: u32,
    /// A [`Kind`].
    pub kind: u32,
    /// Its bends: penalties from here on, and where those, biases and bans end. No kind names a token twice.
    pub first: u32,
    pub penalties: u32,
    pub biases: u32,
    pub bans: u32,
}

/// What changes a logit: a penalty subtracts after the repetition penalty, a bias adds, a ban ends all.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Bend {
    pub token: u32,
    pub by: f32,
}

/// What was found of a row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Found {
    /// Sum of weights of the raw logits; zero where no log-probability was asked for.
    pub total: u64,
    /// [`NONE`] where no token can be chosen.
    pub token: u32,
    /// The greatest raw logit, and the token's.
    pub best: f32,
    pub logit: f32,
    pad: u32,
}

/// One of the best tokens of a row; [`NONE`] beyond the vocabulary.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Alternative {
    pub token: u32,
    pub logit: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SampleArgs {
    logits: u64,
    asked: u64,
    bends: u64,
    was: u64,
    best: u64,
    sums: u64,
    totals: u64,
    tops: u64,
    weights: u64,
    counts: u64,
    listed: u64,
    list: u64,
    found: u64,
    alternatives: u64,
    rows: u32,
    vocab: u32,
    slices: u32,
    width: u32,
    bent: u32,
    unit: f32,
}

/// All that the launches of a step depend on, but for what lies in memory.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Shape {
    rows: usize,
    vocab: usize,
    slices: usize,
    /// Whether any row has log-probabilities, alternatives, bends, a draw, a draw with top-k or top-p.
    scores: bool,
    alternatives: bool,
    bends: bool,
    draws: bool,
    truncates: bool,
}

/// The rows of an output head, what is asked of them, and what was found.
pub struct Samples {
    device: Arc<Device>,
    shape: Shape,
    asked: Memory<Asked>,
    bends: Memory<Bend>,
    was: Memory<f32>,
    best: Memory<u64>,
    sums: Memory<u64>,
    totals: Memory<u64>,
    tops: Memory<u64>,
    weights: Memory<u64>,
    counts: Memory<u32>,
    listed: Memory<u32>,
    list: Memory<u64>,
    found: Memory<Found>,
    alternatives: Memory<Alternative>,
    host_found: Pinned<Found>,
    host_alternatives: Pinned<Alternative>,
}

impl Samples {
    /// No rows.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let d = device;
        Ok(Samples {
            shape: Shape::default(),
            asked: d.alloc(1)?,
            bends: d.alloc(1)?,
            was: d.alloc(1)?,
            best: d.alloc(1)?,
            sums: d.alloc(1)?,
            totals: d.alloc(1)?,
            tops: d.alloc(1)?,
            weights: d.alloc(1)?,
            counts: d.alloc(1)?,
            listed: d.alloc(1)?,
            list: d.alloc(1)?,
            found: d.alloc(1)?,
            alternatives: d.alloc(1)?,
            host_found: Pinned::new(d, 1)?,
            host_alternatives: Pinned::new(d, 1)?,
            device: d.clone(),
        })
    }

    /// Takes to the device what is asked of rows of `vocab` logits.
    ///
    /// # Errors
    /// Where there is no room.
    ///
    /// # Panics
    /// For more than [`WIDEST`] logits or [`TOP`] alternatives, or bends that lie elsewhere. Tokens are the caller's to check.
    pub fn set(&mut self, asked: &[Asked], bends: &[Bend], vocab: usize) -> Result<(), CudaError> {
        assert!((1..=WIDEST).contains(&vocab), "rows of {vocab} logits");
        let (rows, token) = (asked.len(), Kind::Token as u32);
        for a in asked {
            assert!(a.alternatives == NONE || a.alternatives as usize <= TOP, "{} alternatives", a.alternatives);
            let ends = [a.first, a.penalties, a.biases, a.bans, bends.len() as u32];
            assert!(ends.is_sorted(), "bends at {ends:?}");
        }
        let any = |of: &dyn Fn(&Asked) -> bool| asked.iter().any(|a| a.kind != Kind::Nothing as u32 && of(a));
        let draws = |a: &Asked| a.kind == token && a.scale > 0.0;
        // Enough blocks for all multiprocessors.
        let enough = 4 * self.device.processors / rows.max(1);
        let least = vocab.div_ceil(SLICE);
        self.shape = Shape {
            rows,
            vocab,
            slices: enough.min(vocab.div_ceil(LEAST)).clamp(least, SLICES),
            scores: any(&|a| a.alternatives != NONE),
            alternatives: any(&|a| a.alternatives != NONE && a.alternatives > 0),
            bends: any(&|a| a.bans > a.first),
            draws: any(&draws),
            truncates: any(&|a| draws(a) && (a.top_k > 0 || a.top_p > 0)),
        };
        let s = self.shape;
        let sliced = rows * s.slices;
        self.asked.reserve(rows)?;
        self.asked.write(0, asked)?;
        self.bends.reserve(bends.len())?;
        self.bends.write(0, bends)?;
        self.was.reserve(bends.len())?;
        self.best.reserve(2 * sliced)?;
        self.sums.reserve(sliced)?;
        self.found.reserve(rows)?;
        if s.scores {
            self.totals.reserve(sliced)?;
            self.tops.reserve(sliced * TOP)?;
            self.alternatives.reserve(rows * TOP)?;
        }
        if s.truncates {
            self.weights.reserve(rows * BINS)?;
            self.counts.reserve(rows * BINS)?;
            self.listed.reserve(rows)?;
            self.list.reserve(rows * LISTED)?;
        }
        Ok(())
    }

    /// Adds all that its launches depend on, but for what lies in its memory.
    pub fn key(&self, key: &mut Vec<u64>) {
        let Shape { rows, vocab, slices, scores, alternatives: _, bends, draws, truncates } = self.shape;
        key.extend([rows as u64, vocab as u64, slices as u64]);
        key.extend([scores, bends, draws, truncates].map(u64::from));
        key.extend([&self.best, &self.sums, &self.totals, &self.tops, &self.weights, &self.list].map(Memory::ptr));
        key.extend([self.asked.ptr(), self.bends.ptr(), self.was.ptr(), self.counts.ptr(), self.listed.ptr()]);
        key.extend([self.found.ptr(), self.alternatives.ptr()]);
    }

    /// Answers all rows from `logits: [rows][vocab]`, which bends change in place. `unit` is a row's scale at temperature 1.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit.
    pub fn launch(&self, logits: Part<'_, f32>, unit: f32) -> Result<(), CudaError> {
        let Shape { rows, vocab, slices, scores, bends, draws, truncates, .. } = self.shape;
        assert!(logits.len() >= rows * vocab, "{rows} rows of {vocab} in {}", logits.len());
        let args = SampleArgs {
            logits: logits.ptr(),
            asked: self.asked.ptr(),
            bends: self.bends.ptr(),
            was: self.was.ptr(),
            best: self.best.ptr(),
            sums: self.sums.ptr(),
            totals: self.totals.ptr(),
            tops: self.tops.ptr(),
            weights: self.weights.ptr(),
            counts: self.counts.ptr(),
            listed: self.listed.ptr(),
            list: self.list.ptr(),
            found: self.found.ptr(),
            alternatives: self.alternatives.ptr(),
            rows: rows as u32,
            vocab: vocab as u32,
            slices: slices as u32,
            width: vocab.div_ceil(slices.max(1)) as u32,
            bent: 0,
            unit,
        };
        let (d, sliced) = (&self.device, [slices, rows, 1]);
        let merged = if scores { 320 + 8 * slices * TOP } else { 0 };
        // SAFETY: memory was made for this shape, and the logits are as many; tokens are the caller's.
        unsafe {
            d.launch("sample_best", sliced, 256, 64, &args)?;
            if scores {
                d.launch("sample_top", sliced, 256, 18560, &args)?;
            }
            if bends {
                d.launch("sample_bend", [rows, 1, 1], 512, 0, &args)?;
                d.launch("sample_best", sliced, 256, 64, &SampleArgs { bent: 1, ..args })?;
            }
            if draws {
                d.launch("sample_weigh", sliced, 256, 15424, &args)?;
            }
            if truncates {
                d.launch("sample_gather", sliced, 256, 128, &args)?;
            }
            d.launch("sample_choose", [rows, 1, 1], 512, merged.max(8512), &args)
        }
    }

    /// Reads what was found of all rows: of each, and [`TOP`] alternatives of each where any row asked for some.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn read(&mut self) -> Result<(&[Found], &[Alternative]), CudaError> {
        let rows = self.shape.rows;
        let alternatives = if self.shape.alternatives { rows * TOP } else { 0 };
        self.host_found.reserve(rows)?;
        self.host_alternatives.reserve(alternatives)?;
        let found = &mut self.host_found.as_mut_slice()[..rows];
        self.found.read(0, found)?;
        let some = &mut self.host_alternatives.as_mut_slice()[..alternatives];
        if !some.is_empty() {
            self.alternatives.read(0, some)?;
        }
        Ok((found, some))
    }
}
