//! Which kernels a device runs where it has some of its own: they are tried on the very device, before anything is served, against the kernels of
//! all architectures, on the shapes of the model. And then the library of products, where it is at hand, against the kernels that were chosen.
//!
//! Kernels of one architecture use what no emulation shows whole: registers and memory that a matrix unit reads by itself. A device on which they
//! give other results, or give them later, runs without them. The library must be faster, and sum a row in one order whatever the other rows.

use std::sync::Arc;

use super::attend::{ARENA_SLACK, Append, AttendLayer, DeviceWork, Work};
use super::cublaslt::{Launch, Product};
use super::driver::{Device, Memory, Own};
use super::linear::{Job, Linears, MANY, Mode};
use super::maps::DeviceMaps;
use super::{CudaError, prefill};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::layout::{ExactType, PageLayout, Quantiser, SealedLayer, Width, Widths};
use crate::ops::{AttendRow, Heads, LayerView};

/// How far a row of results in bf16 may be from the other kernels', as a share of its length: weights and results are rounded to 2^-8 and less.
const SHORT: f64 = 1e-2;
/// And one of f32 sums; a single one of 4096 products left out is more than ten times as far.
const LONG: f64 = 1e-3;
/// How much longer own kernels may take, and how much less the library has to: what two runs of the same differ by.
const LATER: f64 = 1.05;
const SOONER: f64 = 0.95;

/// What is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Of {
    /// Kernels of the device's own architecture, against those of all.
    Own(Own),
    /// The library, against the kernels that the device runs.
    Library,
}

/// What came of trying something.
#[derive(Clone, Debug)]
pub struct Trial {
    pub of: Of,
    what: &'static str,
    /// Milliseconds of what it was tried against, and of itself; those infinite of what the library has no algorithm for.
    pub common_ms: f64,
    pub own_ms: f64,
    /// How far the worst row of theirs is from the same row of the others, as a share of what rounding allows.
    pub off: f64,
}

impl Trial {
    /// Whether it gives the same results, and soon enough.
    pub fn holds(&self) -> bool {
        let within = if self.of == Of::Library { SOONER } else { LATER };
        self.off <= 1.0 && self.own_ms.is_finite() && self.own_ms <= within * self.common_ms
    }
}

impl std::fmt::Display for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Trial { what, common_ms, own_ms, off, .. } = self;
        let verdict = if self.holds() { "in use" } else { "left out" };
        let (by, others) = match self.of {
            Of::Own(_) => ("kernels of this architecture", "those of all"),
            Of::Library => ("cuBLASLt", "Strait's own kernels"),
        };
        if own_ms.is_infinite() {
            return write!(f, "{what}: {by} has no algorithm for all numbers of rows: {verdict}");
        }
        write!(f, "{what}: {own_ms:.3} ms by {by}, {common_ms:.3} by {others}, apart by {off:.2} of what rounding allows: {verdict}")
    }
}

/// What a model asks of the kernels that are tried.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub heads: Heads,
    /// Outputs and inputs of a product; more than 8 outputs.
    pub matrix: (usize, usize),
    /// Rows of a product, and queries of a chunk, that are timed.
    pub rows: usize,
    /// Positions before the chunk.
    pub history: usize,
    /// Sequences whose next position is decoded, and sealed pages of each.
    pub decoded: (usize, usize),
}

/// Tries the kernels of the device's own architecture for chunks of queries, for products of many rows and for positions decoded over sealed pages,
/// and leaves out those that do not hold. Nothing where it has none. What is timed is whole tiles, as in the midst of a long prompt; ends of tiles,
/// carried sums, every mode and every width of codes are compared beside it.
///
/// Cost: some milliseconds of the device, some tenths of a second of the host, and the memory of each in its turn: the product and its operands, or
/// pages (of a model of 8 KV heads of 128 on an H200 some 120 MB).
///
/// # Errors
/// Where there is no room, or the device fails; it may be lost then.
pub fn choose(device: &Arc<Device>, shape: &Shape) -> Result<Vec<Trial>, CudaError> {
    let mut trials = vec![];
    if device.runs(Own::Prefill) {
        let sample = |n, history, split| prefill::Sample::new(device, shape.heads, (n, history), split);
        let d = shape.heads.head_dim;
        let mut timed = sample(shape.rows, shape.history, 0)?;
        let mut trial = compare(device, (Own::Prefill, "chunks of queries"), (d, SHORT), || timed.run(device))?;
        // Few queries, an odd page, the end of a page; and sums that are carried from two pages to one, and to the rest.
        for mut case in [sample(70, 65, 0)?, sample(70, 200, 2)?] {
            trial.off = trial.off.max(apart(device, Own::Prefill, (d, SHORT), || Ok(case.run(device)?.0))?);
        }
        trials.push(trial);
    }
    if device.runs(Own::Linear) {
        let (out, inputs) = shape.matrix;
        let mut timed = One::new(device, shape.rows, (out, inputs), Mode::F32)?;
        let mut trial = compare(device, (Own::Linear, "products of many rows"), (out, LONG), || {
            timed.reset()?;
            let ms = device.time(3, || timed.launch(device, None))?;
            Ok((timed.read()?, ms))
        })?;
        for (rows, out, mode, bound) in [(96, out - 5, Mode::Add, LONG), (200, out - 8, Mode::Gated, SHORT), (130, out, Mode::Bf16, SHORT)]
        {
            for outputs in [128, 256] {
                let mut case = One::new(device, rows, (out, inputs), mode)?;
                let run = || {
                    case.reset()?;
                    case.launch(device, Some(outputs))?;
                    case.read()
                };
                trial.off = trial.off.max(apart(device, Own::Linear, (out, bound), run)?);
            }
        }
        trials.push(trial);
    }
    // Latents of a fifth of the channels.
    let (kv, d) = (shape.heads.kv_heads * shape.heads.head_dim, shape.heads.head_dim);
    let fifth = (kv / 5).next_multiple_of(16).min(256);
    if device.runs(Own::Sealed) {
        let mut timed = Decoded::new(device, shape.heads, [(fifth, 4); 2], shape.decoded, (0, 4.0))?;
        let mut trial = compare(device, (Own::Sealed, "positions over sealed pages"), (d, SHORT), || timed.run(device))?;
        // Every width of codes, few latents and many; spans that end within their pages; sinks of some positions, and of a whole page; and queries
        // so large that bases of exponents rise.
        let (some, few) = (fifth.min(102), fifth.min(20));
        for (keys, values, sinks, reach) in [
            ((some, 2), (few, 2), 0, 4.0),
            ((some, 2), (fifth, 4), 3, 40.0),
            ((some, 3), (few, 3), 64, 4.0),
            ((some, 3), (fifth, 2), 0, 40.0),
            ((few, 4), (fifth, 3), 5, 4.0),
            ((few, 4), (few, 4), 64, 40.0),
        ] {
            let mut case = Decoded::new(device, shape.heads, [keys, values], (2, 11), (sinks, reach))?;
            trial.off = trial.off.max(apart(device, Own::Sealed, (d, SHORT), || Ok(case.run(device)?.0))?);
        }
        trials.push(trial);
    }
    for trial in &trials {
        if let Of::Own(own) = trial.of {
            device.choose(own, trial.holds());
        }
    }
    Ok(trials)
}

/// What becomes of the products of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Becomes {
    /// Outputs in f32.
    Outputs,
    /// They are added onto what is there.
    Sum,
    /// SiLU makes one of two, in bf16: own kernels at once, the library by a launch of its own.
    Gated,
}

/// One launch of products of a model.
#[derive(Clone, Debug)]
pub struct Products {
    pub what: &'static str,
    pub inputs: usize,
    pub becomes: Becomes,
    /// Outputs of each, and whether it has a bias.
    pub outs: Vec<(usize, bool)>,
}

impl Products {
    /// As the library is asked for them; nothing where it is not to be: a bias beside what is there would be added in another order.
    pub fn launch(&self) -> Option<Launch> {
        let its = self.becomes != Becomes::Sum || self.outs.iter().all(|(_, biased)| !biased);
        let product = |&(out, biased): &(usize, bool)| Product { out, inputs: self.inputs, wide: true, biased };
        its.then(|| self.outs.iter().map(product).collect())
    }
}

/// Tries the library on launches of so many rows, and gives it those that it computes sooner. Nothing where it is not open, or rows are few.
///
/// Cost: as [`choose`]; the memory of the largest of the launches, with weights for one matrix.
///
/// # Errors
/// Where there is no room, or the device fails; it may be lost then.
pub fn choose_library(device: &Arc<Device>, launches: &[Products], rows: usize) -> Result<Vec<Trial>, CudaError> {
    if device.library().is_none() || rows < MANY {
        return Ok(vec![]);
    }
    launches.iter().filter_map(|of| Some((of, of.launch()?))).map(|(of, launch)| try_library(device, of, &launch, rows)).collect()
}

fn try_library(device: &Arc<Device>, of: &Products, launch: &[Product], rows: usize) -> Result<Trial, CudaError> {
    let mut trial = Trial { of: Of::Library, what: of.what, common_ms: f64::INFINITY, own_ms: f64::INFINITY, off: 0.0 };
    if !device.give_to_library(launch, rows) {
        return Ok(trial);
    }
    match race(device, (of, launch), rows, &mut trial) {
        // It says no to what it has an algorithm for.
        Err(CudaError::Library(_)) => trial.own_ms = f64::INFINITY,
        done => done?,
    }
    if trial.holds() {
        device.give_to_library(launch, rows);
    } else {
        device.take_from_library(launch);
    }
    Ok(trial)
}

/// Both ways of a launch that the library was given: times, and how far results are apart.
fn race(device: &Arc<Device>, (of, launch): (&Products, &[Product]), rows: usize, trial: &mut Trial) -> Result<(), CudaError> {
    let mut timed = Several::new(device, of, rows)?;
    // Not recorded the first time: it loads what it runs then.
    let whole = timed.run(device, rows)?;
    // One order of sums, whatever the other rows, and whether they are added to what is there or not.
    let same = |some: &[Vec<f32>], all: &[Vec<f32>]| {
        some.iter().zip(all).all(|(some, all)| some.iter().zip(all).all(|(a, b)| a.to_bits() == b.to_bits()))
    };
    let mut one_order = true;
    for some in [MANY, (MANY + rows) / 2] {
        one_order &= same(&timed.run(device, some)?, &whole);
    }
    if of.becomes == Becomes::Sum {
        let alone = Products { becomes: Becomes::Outputs, ..of.clone() };
        let mut sums = Several::new(device, &alone, rows)?.run(device, rows)?;
        sums.iter_mut().flatten().for_each(|x| *x += f32::from_ne_bytes([THERE; 4]));
        one_order &= same(&sums, &whole);
    }
    if !one_order {
        trial.off = f64::INFINITY;
    }
    for _ in 0..2 {
        trial.own_ms = trial.own_ms.min(device.time(3, || timed.launch(device, rows))?);
        device.take_from_library(launch);
        trial.common_ms = trial.common_ms.min(device.time(3, || timed.launch(device, rows))?);
        assert!(device.give_to_library(launch, rows), "it took them before");
    }
    device.take_from_library(launch);
    let bound = if of.becomes == Becomes::Gated { SHORT } else { LONG };
    for ((own, common), (out, _)) in whole.iter().zip(&timed.run(device, rows)?).zip(&of.outs) {
        trial.off = trial.off.max(furthest(own, common, *out) / bound);
    }
    Ok(())
}

/// Every byte of what products are added to.
const THERE: u8 = 0x3f;

/// Products of the same rows at random, as a layer of a model launches them.
struct Several<'a> {
    of: &'a Products,
    /// All matrices are the same one, or the beginning of it.
    w: Memory<u16>,
    x: Memory<u16>,
    bias: Memory<f32>,
    y: Vec<Memory<f32>>,
    gated: Memory<u16>,
}

impl<'a> Several<'a> {
    fn new(device: &Arc<Device>, of: &'a Products, rows: usize) -> Result<Self, CudaError> {
        let widest = of.outs.iter().map(|(out, _)| *out).max().expect("some products");
        let gated = if of.becomes == Becomes::Gated { rows * widest } else { 0 };
        Ok(Several {
            w: random(device, 5, widest * of.inputs)?,
            x: random(device, 7, rows * of.inputs)?,
            bias: device.upload(&uniform(8, widest, 1.0))?,
            y: of.outs.iter().map(|(out, _)| device.alloc(rows * out)).collect::<Result<_, _>>()?,
            gated: device.alloc(gated)?,
            of,
        })
    }

    /// By the library where it has such launches, by own kernels else.
    fn launch(&self, device: &Device, rows: usize) -> Result<(), CudaError> {
        let mode = if self.of.becomes == Becomes::Sum { Mode::Add } else { Mode::F32 };
        let bias = |biased: bool| if biased { self.bias.ptr() } else { 0 };
        let job = |(y, &(out, biased)): (&Memory<f32>, &(usize, bool))| Job {
            w: [self.w.ptr(), 0],
            bias: [bias(biased), 0],
            y: y.ptr(),
            out,
            ldy: out,
            mode,
        };
        let jobs: Vec<Job> = self.y.iter().zip(&self.of.outs).map(job).collect();
        let of = |jobs| Linears { jobs, x: self.x.ptr(), rows, inputs: self.of.inputs, ldx: self.of.inputs, worn: None, norm: None };
        if self.of.becomes != Becomes::Gated {
            return of(&jobs).launch(device);
        }
        let (out, biases) = (self.of.outs[0].0, [0, 1].map(|i| bias(self.of.outs[i].1)));
        if of(&jobs).by_library(device) {
            of(&jobs).launch(device)?;
            return device.silu_mul(self.y[0].all(), self.y[1].all(), out, self.gated.part(0, rows * out));
        }
        let gated = Job { w: [self.w.ptr(); 2], bias: biases, y: self.gated.ptr(), out, ldy: out, mode: Mode::Gated };
        of(&[gated]).launch(device)
    }

    /// What comes of it: `[rows][out]` of each product, or of the one that SiLU makes.
    fn run(&mut self, device: &Device, rows: usize) -> Result<Vec<Vec<f32>>, CudaError> {
        // Nothing of another run is taken for this one's: NaN, or numbers where it is added to.
        let byte = if self.of.becomes == Becomes::Sum { THERE } else { 0xff };
        self.y.iter_mut().try_for_each(|y| y.fill(byte))?;
        self.gated.fill(0xff)?;
        self.launch(device, rows)?;
        if self.of.becomes == Becomes::Gated {
            let mut halves = self.gated.to_vec()?;
            halves.truncate(rows * self.of.outs[0].0);
            return Ok(vec![halves.into_iter().map(|b| half::bf16::from_bits(b).to_f32()).collect()]);
        }
        let of = |(y, (out, _)): (&Memory<f32>, &(usize, bool))| {
            let mut all = y.to_vec()?;
            all.truncate(rows * out);
            Ok(all)
        };
        self.y.iter().zip(&self.of.outs).map(of).collect()
    }
}

/// Runs `work` both ways in turns, twice: the less of the milliseconds it gives, and how far the rows of so many numbers are apart.
fn compare(
    device: &Device,
    (of, what): (Own, &'static str),
    rows: (usize, f64),
    mut work: impl FnMut() -> Result<(Vec<f32>, f64), CudaError>,
) -> Result<Trial, CudaError> {
    let mut trial = Trial { of: Of::Own(of), what, common_ms: f64::INFINITY, own_ms: f64::INFINITY, off: 0.0 };
    for _ in 0..2 {
        let off = apart(device, of, rows, || {
            let (results, ms) = work()?;
            let least = if device.runs(of) { &mut trial.own_ms } else { &mut trial.common_ms };
            *least = least.min(ms);
            Ok(results)
        })?;
        trial.off = trial.off.max(off);
    }
    Ok(trial)
}

/// Runs `work` both ways: how far rows of so many numbers are apart, as a share of a bound. Own kernels are left as they were.
fn apart(
    device: &Device,
    of: Own,
    (row, bound): (usize, f64),
    mut work: impl FnMut() -> Result<Vec<f32>, CudaError>,
) -> Result<f64, CudaError> {
    device.choose(of, false);
    let common = work();
    device.choose(of, true);
    Ok(furthest(&work()?, &common?, row) / bound)
}

/// The largest distance of two rows, as a share of the second one's length; infinite where either has no number.
fn furthest(own: &[f32], common: &[f32], row: usize) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    own.chunks(row)
        .zip(common.chunks(row))
        .map(|(own, common)| {
            let length: f64 = common.iter().map(|&x| square(x)).sum();
            let between: f64 = own.iter().zip(common).map(|(&x, &y)| square(x - y)).sum();
            let off = (between / length.max(1e-30)).sqrt();
            if off.is_nan() { f64::INFINITY } else { off }
        })
        .fold(0.0, f64::max)
}

/// A product of rows at random with weights at random.
struct One {
    rows: usize,
    matrix: (usize, usize),
    mode: Mode,
    w: [Memory<u16>; 2],
    x: Memory<u16>,
    bias: Memory<f32>,
    /// f32, of which results in bf16 take the first half.
    y: Memory<f32>,
}

impl One {
    fn new(device: &Arc<Device>, rows: usize, (out, inputs): (usize, usize), mode: Mode) -> Result<Self, CudaError> {
        let w = |seed| random(device, seed, out * inputs);
        let (w, x) = ([w(5)?, w(6)?], random(device, 7, rows * inputs)?);
        let bias = device.upload(&uniform(8, out, 1.0))?;
        Ok(One { rows, matrix: (out, inputs), mode, w, x, bias, y: device.alloc(rows * out)? })
    }

    /// Nothing of another run is taken for the next one's: NaN, or numbers where it is added to.
    fn reset(&mut self) -> Result<(), CudaError> {
        self.y.fill(if self.mode == Mode::Add { 0x3f } else { 0xff })
    }

    /// As the device runs it; on its own kernels by tiles of so many outputs, where that is said.
    fn launch(&self, device: &Device, outputs: Option<usize>) -> Result<(), CudaError> {
        let (out, inputs) = self.matrix;
        let pair = self.mode == Mode::Gated;
        let second = |of: u64| if pair { of } else { 0 };
        let w = [self.w[0].ptr(), second(self.w[1].ptr())];
        let job = Job { w, bias: [self.bias.ptr(), second(self.bias.ptr())], y: self.y.ptr(), out, ldy: out, mode: self.mode };
        let linears = Linears { jobs: &[job], x: self.x.ptr(), rows: self.rows, inputs, ldx: inputs, worn: None, norm: None };
        match outputs.filter(|_| device.runs(Own::Linear)) {
            Some(outputs) => linears.launch_in_tiles(device, outputs),
            None => linears.launch(device),
        }
    }

    fn read(&self) -> Result<Vec<f32>, CudaError> {
        let y = self.y.to_vec()?;
        if matches!(self.mode, Mode::F32 | Mode::Add) {
            return Ok(y);
        }
        let halves: &[u16] = bytemuck::cast_slice(&y);
        Ok(halves[..y.len()].iter().map(|&b| half::bf16::from_bits(b).to_f32()).collect())
    }
}

/// Sequences whose pages are at random, and the query of each.
struct Decoded {
    shape: Heads,
    layout: PageLayout,
    maps: DeviceMaps,
    arena: Memory<u8>,
    work: DeviceWork,
    q: Memory<f32>,
    out: Memory<u16>,
    out_f32: Memory<f32>,
    rows: usize,
}

impl Decoded {
    /// Latents of keys and of values by rank and bits; so many rows of so many sealed pages each, that many positions of which are sinks; and how
    /// large queries are.
    fn new(
        device: &Arc<Device>,
        shape: Heads,
        [keys, values]: [(usize, u32); 2],
        (rows, pages): (usize, usize),
        (sinks, reach): (u32, f32),
    ) -> Result<Self, CudaError> {
        let width = |(rank, bits)| Width { rank, bits };
        let sealed = SealedLayer::alone(Widths { keys: width(keys), values: width(values) }, [Quantiser::Hadamard; 2], 1);
        let Heads { kv_heads, head_dim, .. } = shape;
        let layout = PageLayout {
            exact: ExactType::Bf16,
            layers: 1,
            kv_heads,
            head_dim,
            hidden: 0,
            window: 0,
            sinks,
            sealed: vec![sealed],
            drops: false,
        };
        let sizes = layout.sizes();
        // One exact page for all, and their sinks; then sealed pages, over and over the same some that differ.
        let exact = PageAddr::UNIT.max(sizes.exact.max(sizes.sinks));
        let (differ, each) = (61, sizes.sealed as usize);
        let mut arena = device.alloc::<u8>(exact as usize + rows * pages * each + ARENA_SLACK)?;
        let numbers = uniform(14, exact as usize / 2, 1.0);
        arena.write(0, bytemuck::cast_slice(&numbers.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>()))?;
        let mut some: Vec<u8> = uniform(15, differ * each, 128.0).into_iter().map(|x| x as i8 as u8).collect();
        let scales: Vec<half::f16> = uniform(16, PAGE_TOKENS as usize, 0.2).into_iter().map(|x| half::f16::from_f32(x + 0.3)).collect();
        for page in some.chunks_exact_mut(each) {
            for at in [sealed.keys.meta, sealed.values.meta] {
                page[at..at + 2 * scales.len()].copy_from_slice(bytemuck::cast_slice(&scales));
            }
        }
        for at in (0..rows * pages).step_by(differ) {
            arena.write(exact as usize + at * each, &some[..differ.min(rows * pages - at) * each])?;
        }
        let address = |page: usize| PageAddr(((exact as usize + page * each) as u64 / PageAddr::UNIT) as u32);
        let mut work = Work::default();
        for row in 0..rows {
            let own: Vec<_> = (row * pages..(row + 1) * pages).map(address).collect();
            let position = (pages * PAGE_TOKENS as usize + row % 8) as u32;
            let view = LayerView { layer: 0, layout: &layout, compression: None };
            let (sinks, exact) = ((sinks > 0).then_some(PageAddr(0)), &[PageAddr(0)]);
            work.push(row as u32, &AttendRow { view, first: row, n: 1, position, sealed: &own, sinks, exact, exact_offset: 0 });
        }
        let mut on = DeviceWork::new(device)?;
        on.set(&work, shape, &layout.sealed, rows)?;
        let width = rows * shape.heads * head_dim;
        let q = device.upload(&uniform(17, width, reach))?;
        let maps = DeviceMaps::at_random(device, &sealed, shape)?;
        Ok(Decoded { shape, layout, maps, arena, work: on, q, out: device.alloc(width)?, out_f32: device.alloc(width)?, rows })
    }

    /// What the kernels that the device runs make of it, `[rows][heads][D]`, and the milliseconds that sealed pages take.
    fn run(&mut self, device: &Device) -> Result<(Vec<f32>, f64), CudaError> {
        self.out_f32.fill(0xff)?;
        let layer = AttendLayer {
            view: LayerView { layer: 0, layout: &self.layout, compression: None },
            shape: self.shape,
            exact_offset: 0,
            maps: Some(&self.maps),
            arena: self.arena.ptr(),
            rope: [0; 2],
            q: self.q.ptr(),
            out: self.out.ptr(),
            out_f32: self.out_f32.ptr(),
            batch: self.rows,
            append: Append::default(),
        };
        self.work.spoil()?;
        self.work.attend(device, &layer)?;
        let results = self.out_f32.to_vec()?;
        Ok((results, device.time(3, || self.work.sealed(device, &layer, 0))?))
    }
}

/// Numbers in `-most .. most`, of a seed.
pub(super) fn uniform(seed: u64, n: usize, most: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * most).collect()
}

/// So many of them up to 1 in bf16, a million and three over and over: no two rows begin alike.
pub(super) fn random(device: &Arc<Device>, seed: u64, n: usize) -> Result<Memory<u16>, CudaError> {
    let block: Vec<u16> = uniform(seed, n.min(1_000_003), 1.0).into_iter().map(|x| half::bf16::from_f32(x).to_bits()).collect();
    let mut memory = device.alloc::<u16>(n)?;
    for at in (0..n).step_by(block.len().max(1)) {
        memory.write(at, &block[..block.len().min(n - at)])?;
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_off_are_found() {
        let common: Vec<f32> = uniform(1, 640, 1.0);
        assert_ne!(common, uniform(2, 640, 1.0));
        assert_eq!(furthest(&common, &common, 64), 0.0);
        let mut own = common.clone();
        own[100] += 0.1;
        assert!(furthest(&own, &common, 64) > SHORT, "one of ten rows");
        own[100] = f32::NAN;
        assert_eq!(furthest(&own, &common, 64), f64::INFINITY);
        let trial = |own_ms, off| Trial { of: Of::Own(Own::Prefill), what: "", common_ms: 1.0, own_ms, off };
        assert!(trial(0.9, 0.5).holds() && trial(1.04, 0.5).holds());
        assert!(!trial(1.1, 0.5).holds(), "slower");
        assert!(!trial(0.5, 1.1).holds(), "other results");
        assert!(!trial(0.5, f64::INFINITY).holds(), "no numbers");
        let library = |own_ms, off| Trial { of: Of::Library, ..trial(own_ms, off) };
        assert!(library(0.94, 0.5).holds() && !library(0.96, 0.5).holds(), "it has to be faster");
        assert!(!library(0.5, 1.1).holds());
        assert!(!Trial { common_ms: f64::INFINITY, ..library(f64::INFINITY, 0.0) }.holds(), "no algorithm");
    }
}
