//! Linear layers of a batch on a device, `model/adapted.rs` once more: the model's own for all rows at once, whole or as products of two
//! matrices, then what adapters make of the rows that wear them. Products of few rows norm them on their way, where nothing else reads them.

use std::ops::Range;
use std::sync::Arc;

use super::adapters::{DeviceAdapter, bit};
use super::placed::upload;
use crate::model::weights::{Projection, Weight};
use crate::ops::cuda::linear::{Job, Linears, Mode, Norm, worn_apart};
use crate::ops::cuda::lora::{Segment, Shape, Target, WornRows};
use crate::ops::cuda::{CudaError, Device, Memory, Part};

/// One projection: weights in bf16, and a bias.
pub(super) struct DeviceProjection {
    pub(super) w: Memory<u16>,
    /// Of weights kept as a product: what the input passes first, `[rank][inputs]`, ranks in whole eights.
    inner: Option<Memory<u16>>,
    pub(super) bias: Option<Memory<f32>>,
    pub(super) out: usize,
    /// Columns of `w`.
    columns: usize,
}

impl DeviceProjection {
    pub(super) fn new(device: &Arc<Device>, p: &Projection<'_>) -> Result<Self, CudaError> {
        let (out, rank) = (p.weight.out_features, p.weight.in_features);
        let bias = p.bias.as_ref().map(|b| device.upload(b)).transpose()?;
        let Some(inner) = &p.inner else {
            return Ok(DeviceProjection { w: upload(device, &p.weight)?, inner: None, bias, out, columns: rank });
        };
        // Columns and rows of zeros make up whole eights.
        let (columns, inputs) = (rank.next_multiple_of(8), inner.in_features);
        let padded = |w: &Weight<'_>, width: usize, to: (usize, usize)| {
            let mut padded = vec![0u16; to.0 * to.1];
            for (row, of) in padded.chunks_exact_mut(to.1).zip(w.floats().chunks_exact(width)) {
                row.iter_mut().zip(of).for_each(|(to, &x)| *to = half::bf16::from_f32(x).to_bits());
            }
            device.upload(&padded)
        };
        let (w, inner) = (padded(&p.weight, rank, (out, columns))?, padded(inner, inputs, (columns, inputs))?);
        Ok(DeviceProjection { w, inner: Some(inner), bias, out, columns })
    }

    /// Ranks of a product, in whole eights; 0 of a whole matrix.
    pub(super) fn rank(&self) -> usize {
        if self.inner.is_some() { self.columns } else { 0 }
    }

    /// Where it lies.
    pub(super) fn layer(&self) -> LinearLayer {
        let (inner, bias) = (self.inner.as_ref().map(Memory::ptr), self.bias.as_ref().map_or(0, Memory::ptr));
        LinearLayer { w: self.w.ptr(), inner, bias, out: self.out, columns: self.columns }
    }
}

/// Where the parts of a linear layer lie.
#[derive(Clone, Copy)]
pub(super) struct LinearLayer {
    /// `[out][columns]`.
    w: u64,
    inner: Option<u64>,
    bias: u64,
    out: usize,
    columns: usize,
}

impl LinearLayer {
    /// Of a matrix `[out][columns]` without a bias.
    pub(super) fn plain(w: &Memory<u16>, (out, columns): (usize, usize)) -> Self {
        LinearLayer { w: w.ptr(), inner: None, bias: 0, out, columns }
    }

    fn job(&self, y: u64, mode: Mode) -> Job {
        Job { w: [self.w, 0], bias: [self.bias, 0], y, out: self.out, ldy: self.out, mode }
    }
}

/// Who wears what in a batch.
pub(super) struct Worn {
    pub(super) rows: WornRows,
    /// Neighbouring rows of one adapter, in order.
    pub(super) segments: Vec<(Arc<DeviceAdapter>, Range<usize>)>,
    /// Of all adapters worn: [`DeviceAdapter::updates`], [`DeviceAdapter::adapts`].
    pub(super) updates: u8,
    pub(super) adapts: u8,
    /// Rows from which updates are added apart.
    many: usize,
}

impl Worn {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Worn { rows: WornRows::new(device)?, many: worn_apart(device), segments: Vec::new(), updates: 0, adapts: 0 })
    }

    /// Takes to the device who wears what in a batch of parts of so many rows; `shapes` are those of all linear layers it passes.
    pub(super) fn set(
        &mut self,
        parts: impl Iterator<Item = (Option<Arc<DeviceAdapter>>, usize)>,
        shapes: &[Shape],
    ) -> Result<(), CudaError> {
        self.clear();
        let mut first = 0;
        for (adapter, n) in parts {
            if let Some(adapter) = adapter {
                match self.segments.last_mut() {
                    Some((last, rows)) if Arc::ptr_eq(last, &adapter) && rows.end == first => rows.end += n,
                    _ => self.segments.push((adapter, first..first + n)),
                }
            }
            first += n;
        }
        let all = |of: &dyn Fn(&DeviceAdapter) -> u8| self.segments.iter().fold(0, |bits, (a, _)| bits | of(a));
        (self.updates, self.adapts) = (all(&|a| a.updates), all(&|a| a.adapts));
        let on_device: Vec<Segment> =
            self.segments.iter().map(|(a, rows)| Segment { sites: a.sites(), rank: a.rank, rows: rows.clone() }).collect();
        self.rows.set(&on_device, first, shapes)
    }

    /// Lets go of the adapters.
    pub(super) fn clear(&mut self) {
        self.segments.clear();
        (self.updates, self.adapts) = (0, 0);
    }

    /// Whether what adapters do at these kinds of place is done apart from the products of `rows`: gains, biases and other weights
    /// always are; updates are where rows are many.
    pub(super) fn apart(&self, bits: u8, rows: usize) -> bool {
        self.adapts & bits != 0 || (self.updates & bits != 0 && rows >= self.many)
    }

    /// Adds all that launches depend on, but for what lies in device memory that tables point to.
    pub(super) fn key(&self, key: &mut Vec<u64>) {
        self.rows.key(key);
        key.push(u64::from(self.updates) << 8 | u64::from(self.adapts));
        // Of one that does more than updates, tensors are named by launches.
        for (adapter, rows) in self.segments.iter().filter(|(a, _)| !a.is_plain()) {
            key.extend([adapter.number, rows.start as u64, rows.end as u64]);
        }
    }
}

/// What linear layers read: `[rows][inputs]`.
pub(super) enum Input<'a> {
    /// bf16.
    Ready(u64),
    /// f32, to be normed first.
    Normed(Normed<'a>),
}

/// Rows that are normed before linear layers read them.
pub(super) struct Normed<'a> {
    pub(super) x: Part<'a, f32>,
    pub(super) weight: Part<'a, f32>,
    pub(super) eps: f32,
    /// The weights of adapters that have their own, and whose rows those are.
    pub(super) own: Vec<(Part<'a, f32>, Range<usize>)>,
    /// Where they are put when they are normed apart.
    pub(super) to: Part<'a, u16>,
}

impl Input<'_> {
    /// The launch that norms its input itself, where there is one.
    fn fused<'j>(&self, device: &Device, (rows, inputs): (usize, usize), jobs: &'j [Job]) -> Option<Linears<'j>> {
        let Input::Normed(of) = self else { return None };
        let norm = Some(Norm { weight: of.weight.ptr(), eps: of.eps });
        let linears = Linears { jobs, x: of.x.ptr(), rows, inputs, ldx: inputs, worn: None, norm };
        (of.own.is_empty() && linears.norms(device)).then_some(linears)
    }

    /// Norms what is to be normed, by launches of its own; gives where the input lies in bf16.
    fn ready(&self, device: &Device, (rows, inputs): (usize, usize)) -> Result<u64, CudaError> {
        match self {
            Input::Ready(x) => Ok(*x),
            Input::Normed(of) => {
                device.rms_norm(of.x, rows, of.weight, of.eps, of.to)?;
                for (weight, rows) in &of.own {
                    let (x, to) =
                        (of.x.slice(rows.start * inputs, rows.len() * inputs), of.to.slice(rows.start * inputs, rows.len() * inputs));
                    device.rms_norm(x, rows.len(), *weight, of.eps, to)?;
                }
                Ok(of.to.ptr())
            }
        }
    }
}

/// One linear layer of a batch.
pub(super) struct LinearJob<'a> {
    pub(super) of: LinearLayer,
    /// Its place in tables of adapters.
    pub(super) place: usize,
    /// `[rows][out]`.
    pub(super) y: Part<'a, f32>,
    /// Whether it is added onto what is there.
    pub(super) add: bool,
}

/// Memory between the parts of a linear layer, which [`LinearScratch::reserve`] makes.
pub(super) struct LinearScratch {
    /// `[rows][out]` of what is adapted before it is added.
    side: Memory<f32>,
    /// What inner matrices make of the input.
    inner: Memory<u16>,
}

impl LinearScratch {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(LinearScratch { side: device.alloc(1)?, inner: device.alloc(1)? })
    }

    /// Makes room for outputs of `side` elements and inner ranks of `inner`.
    pub(super) fn reserve(&mut self, side: usize, inner: usize) -> Result<(), CudaError> {
        self.side.reserve(side)?;
        self.inner.reserve(inner)
    }

    /// Adds the places of its memory.
    pub(super) fn key(&self, key: &mut Vec<u64>) {
        key.extend([self.side.ptr(), self.inner.ptr()]);
    }
}

/// Up to three linear layers of one input, under the adapters that rows wear; `layers` of the model.
pub(super) fn project(
    device: &Device,
    (input, inputs): (&Input<'_>, usize),
    rows: usize,
    jobs: &[LinearJob<'_>],
    (worn, layers): (&Worn, usize),
    scratch: &LinearScratch,
) -> Result<(), CudaError> {
    let touched = |bits: u8, job: &LinearJob<'_>| bits & bit(job.place, layers) != 0;
    let targets: Vec<Target> =
        jobs.iter().filter(|j| touched(worn.updates, j)).map(|j| Target { place: j.place, y: j.y.ptr(), out: j.of.out }).collect();
    // What is adapted must not be mixed with what it is added to.
    let aside = |job: &LinearJob<'_>| job.add && touched(worn.adapts, job);
    let launched: Vec<Job> = jobs
        .iter()
        .map(|job| match (aside(job), job.add) {
            (true, _) => job.of.job(scratch.side.part(0, rows * job.of.out).ptr(), Mode::F32),
            (false, true) => job.of.job(job.y.ptr(), Mode::Add),
            (false, false) => job.of.job(job.y.ptr(), Mode::F32),
        })
        .collect();
    // Few rows are expanded where their products are summed.
    let fuses = rows < worn.many && jobs.iter().all(|job| job.of.inner.is_none() && !touched(worn.adapts, job));
    if fuses
        && targets.is_empty()
        && let Some(linears) = input.fused(device, (rows, inputs), &launched)
    {
        return linears.launch(device);
    }
    let x = input.ready(device, (rows, inputs))?;
    if !targets.is_empty() {
        // First, as it needs nothing of what follows: the weights' way to the multiprocessors begins meanwhile.
        worn.rows.shrink(device, (x, inputs), &targets)?;
    }
    if fuses && !targets.is_empty() {
        let mut of = [[None; 2]; 3];
        let mut next = 0..;
        for (job, of) in jobs.iter().zip(&mut of).filter(|(job, _)| touched(worn.updates, job)) {
            of[0] = next.next().map(|target| (job.place, target));
        }
        return Linears { jobs: &launched, x, rows, inputs, ldx: inputs, worn: Some(worn.rows.fused(of)), norm: None }.launch(device);
    }
    products(device, (x, inputs), rows, (jobs, &launched), scratch)?;
    for (job, launched) in jobs.iter().zip(&launched).filter(|(job, _)| touched(worn.adapts, job)) {
        for (adapter, of) in &worn.segments {
            if let Some((w, bias)) = adapter.replaced(job.place) {
                let own = Job {
                    w: [w.ptr(), 0],
                    bias: [bias.map_or(0, |b| b.ptr()), 0],
                    y: launched.y + (of.start * job.of.out * 4) as u64,
                    mode: Mode::F32,
                    ..*launched
                };
                let x = x + (of.start * inputs * 2) as u64;
                Linears { jobs: &[own], x, rows: of.len(), inputs, ldx: inputs, worn: None, norm: None }.launch(device)?;
            }
        }
        let onto = if aside(job) { job.y.ptr() } else { 0 };
        worn.rows.adapt(device, rows, Target { place: job.place, y: launched.y, out: job.of.out }, onto, job.of.bias)?;
    }
    if targets.is_empty() { Ok(()) } else { worn.rows.expand(device, &targets) }
}

/// Gate and up as one job, which SiLU makes one output of, under updates of adapters at these places: not where they are done
/// [apart](Worn::apart).
pub(super) fn gate_and_up(
    device: &Device,
    (input, inputs): (&Input<'_>, usize),
    rows: usize,
    job: Job,
    (worn, places, layers): (&Worn, [usize; 2], usize),
) -> Result<(), CudaError> {
    let touched = places.map(|place| worn.updates & bit(place, layers) != 0);
    let targets: Vec<Target> =
        places.iter().zip(touched).filter(|(_, touched)| *touched).map(|(&place, _)| Target { place, y: 0, out: job.out }).collect();
    if targets.is_empty()
        && let Some(linears) = input.fused(device, (rows, inputs), &[job])
    {
        return linears.launch(device);
    }
    let x = input.ready(device, (rows, inputs))?;
    let mut fused = None;
    if !targets.is_empty() {
        worn.rows.shrink(device, (x, inputs), &targets)?;
        let mut next = 0..;
        let of = [0, 1].map(|i| touched[i].then(|| (places[i], next.next().expect("counts on"))));
        fused = Some(worn.rows.fused([of, [None; 2], [None; 2]]));
    }
    Linears { jobs: &[job], x, rows, inputs, ldx: inputs, worn: fused, norm: None }.launch(device)
}

/// Whether the products of gate and up are by the library, which makes two outputs of them, for SiLU to make one of.
pub(super) fn gates_by_library(device: &Device, (rows, inputs): (usize, usize), of: [&DeviceProjection; 2]) -> bool {
    let jobs = of.map(|of| of.layer().job(0, Mode::F32));
    let whole = of.iter().all(|of| of.rank() == 0);
    whole && Linears { jobs: &jobs, x: 0, rows, inputs, ldx: inputs, worn: None, norm: None }.by_library(device)
}

/// The products with the model's own weights.
fn products(
    device: &Device,
    (x, inputs): (u64, usize),
    rows: usize,
    (jobs, launched): (&[LinearJob<'_>], &[Job]),
    scratch: &LinearScratch,
) -> Result<(), CudaError> {
    let mut at = 0;
    let mut inner = Vec::new();
    let mut outer = Vec::new();
    let mut whole = Vec::new();
    for (job, launched) in jobs.iter().zip(launched) {
        match job.of.inner {
            None => whole.push(*launched),
            Some(w) => {
                let rank = job.of.columns;
                let y = scratch.inner.part(at, rows * rank).ptr();
                at += rows * rank;
                inner.push(Job { w: [w, 0], bias: [0; 2], y, out: rank, ldy: rank, mode: Mode::Bf16 });
                outer.push((y, rank, *launched));
            }
        }
    }
    for some in [&whole, &inner].into_iter().filter(|some| !some.is_empty()) {
        Linears { jobs: some, x, rows, inputs, ldx: inputs, worn: None, norm: None }.launch(device)?;
    }
    outer.iter().try_for_each(|(x, rank, job)| {
        Linears { jobs: &[*job], x: *x, rows, inputs: *rank, ldx: *rank, worn: None, norm: None }.launch(device)
    })
}
