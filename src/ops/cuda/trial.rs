//! Which kernels a device runs where it has some of its own: each is tried on the very device, before anything is served, against the kernels of
//! all architectures, on the shapes of the model.
//!
//! Kernels of one architecture use what no emulation shows whole: registers and memory that a matrix unit reads by itself. A device on which they
//! give other results, or give them later, runs without them.

use std::sync::Arc;

use super::driver::{Device, Memory, Own};
use super::linear::{Job, Linears, Mode};
use super::{CudaError, prefill};
use crate::ops::Heads;

/// Rows differ by rounding only: of weights and results to bf16 (2^-8 and less), and of f32 sums.
const BOUND: f64 = 1e-2;

/// What came of trying kernels of the device's own architecture.
#[derive(Clone, Debug)]
pub struct Trial {
    pub of: Own,
    /// Milliseconds of the kernels of all architectures, and of its own.
    pub common_ms: f64,
    pub own_ms: f64,
    /// How far the worst row of theirs is from the same row of the others, as a share of its length.
    pub off: f64,
}

impl Trial {
    /// Whether they give the same results, and no later.
    pub fn holds(&self) -> bool {
        self.off <= BOUND && self.own_ms <= self.common_ms
    }
}

impl std::fmt::Display for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Trial { of, common_ms, own_ms, off } = self;
        let what = match of {
            Own::Sealed => "decoded positions",
            Own::Prefill => "chunks of queries",
            Own::Linear => "products of many rows",
        };
        let verdict = if self.holds() { "in use" } else { "left out" };
        write!(
            f,
            "{what}: {own_ms:.3} ms by kernels of this architecture, {common_ms:.3} by those of all, off by {off:.1e} at most: {verdict}"
        )
    }
}

/// What a model asks of the kernels that are tried.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub heads: Heads,
    /// Outputs and inputs of a product.
    pub matrix: (usize, usize),
    /// Rows of a product, and queries of a chunk.
    pub rows: usize,
    /// Positions before the chunk.
    pub history: usize,
}

/// Tries the kernels of the device's own architecture for chunks of queries and for products of many rows, and leaves out those that do not hold.
/// Nothing where it has none. (Those for decoded positions were measured where they were made, and run.)
///
/// Cost: some milliseconds of the device, 0.2 s of the host, and the memory of the product, its operands and the chunk's pages meanwhile.
///
/// # Errors
/// Where there is no room, or the device fails; it may be lost then.
pub fn choose(device: &Arc<Device>, shape: &Shape) -> Result<Vec<Trial>, CudaError> {
    let chunks = || prefill::trial(device, shape.heads, shape.rows, shape.history);
    let products = || product(device, shape.matrix, shape.rows);
    let mut trials = vec![];
    if device.runs(Own::Prefill) {
        trials.push(compare(device, Own::Prefill, shape.heads.head_dim, chunks)?);
    }
    if device.runs(Own::Linear) {
        trials.push(compare(device, Own::Linear, shape.matrix.0, products)?);
    }
    Ok(trials)
}

/// Runs `work`, which gives rows of so many numbers and milliseconds, both ways.
fn compare(device: &Device, of: Own, row: usize, work: impl Fn() -> Result<(Vec<f32>, f64), CudaError>) -> Result<Trial, CudaError> {
    let (own, own_ms) = work()?;
    device.choose(of, false);
    let (common, common_ms) = work()?;
    let trial = Trial { of, common_ms, own_ms, off: furthest(&own, &common, row) };
    device.choose(of, trial.holds());
    Ok(trial)
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

/// A product of rows at random, always the same, by the kernels the device runs: `[rows][outputs]`, and the milliseconds it took.
fn product(device: &Arc<Device>, (out, inputs): (usize, usize), rows: usize) -> Result<(Vec<f32>, f64), CudaError> {
    let (w, x) = (random(device, out * inputs, 1.0)?, random(device, rows * inputs, 1.0)?);
    let y = device.alloc::<f32>(rows * out)?;
    let job = Job { w: [w.ptr(), 0], bias: [0; 2], y: y.ptr(), out, ldy: out, mode: Mode::F32 };
    let linears = Linears { jobs: &[job], x: x.ptr(), rows, inputs, ldx: inputs, worn: None, norm: None };
    let ms = device.time(3, || linears.launch(device))?;
    Ok((y.to_vec()?, ms))
}

/// Numbers in `-most .. most`.
pub(super) fn uniform(n: usize, most: f32) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * most).collect()
}

/// So many of them in bf16, a million and three over and over: no two rows begin alike.
pub(super) fn random(device: &Arc<Device>, n: usize, most: f32) -> Result<Memory<u16>, CudaError> {
    let block: Vec<u16> = uniform(n.min(1_000_003), most).into_iter().map(|x| half::bf16::from_f32(x).to_bits()).collect();
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
        let common: Vec<f32> = uniform(640, 1.0);
        assert_eq!(furthest(&common, &common, 64), 0.0);
        let mut own = common.clone();
        own[100] += 0.05;
        assert!(furthest(&own, &common, 64) > BOUND / 2.0);
        own[100] = f32::NAN;
        assert_eq!(furthest(&own, &common, 64), f64::INFINITY);
        let trial = |own_ms, off| Trial { of: Own::Prefill, common_ms: 1.0, own_ms, off };
        assert!(trial(0.9, 1e-3).holds());
        assert!(!trial(1.1, 1e-3).holds(), "slower");
        assert!(!trial(0.5, 0.02).holds(), "other results");
        assert!(!trial(0.5, f64::INFINITY).holds(), "no numbers");
    }
}
