//! Products with weights on the device: which kernel of `linear.cuh` or `linear_wg.cuh`, and how it is launched; or that the library has them.

use super::CudaError;
use super::cublaslt::CublasLt;
use super::driver::{Device, Own};
use super::lora::Fused;

/// What becomes of a product.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// Stored as f32.
    F32,
    /// Stored as bf16.
    Bf16,
    /// Added onto f32: the residual stream.
    Add,
    /// Of gate and up: bf16 `silu(gate) * up`.
    Gated,
}

/// `y = x . w^T + bias` of one matrix, or of a gate and an up matrix.
#[derive(Clone, Copy)]
pub struct Job {
    /// `[out][inputs]` bf16; the second of a gated job only.
    pub w: [u64; 2],
    /// f32, zero for none.
    pub bias: [u64; 2],
    /// `[rows][ldy]`.
    pub y: u64,
    pub out: usize,
    pub ldy: usize,
    pub mode: Mode,
}

/// A norm by the root mean square, `x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Clone, Copy)]
pub struct Norm {
    /// f32 `[inputs]`.
    pub weight: u64,
    pub eps: f32,
}

/// Up to three jobs on the same input, as one launch.
pub struct Linears<'a> {
    pub jobs: &'a [Job],
    /// `[rows][ldx]` bf16; f32 where there is a norm.
    pub x: u64,
    pub rows: usize,
    pub inputs: usize,
    pub ldx: usize,
    /// What adapters add, for fewer rows than [`worn_apart`].
    pub worn: Option<Fused>,
    /// What becomes of the input first, to the bits that [`Device::rms_norm`] gives: where [`Linears::norms`] says so, and without adapters.
    pub norm: Option<Norm>,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct LinearArgs {
    w: [u64; 2],
    bias: [u64; 2],
    y: u64,
    out: i32,
    ldy: i32,
    mode: i32,
    pad: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinearsArgs {
    jobs: [LinearArgs; 3],
    x: u64,
    count: i32,
    rows: i32,
    inputs: i32,
    ldx: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinearsWornArgs {
    linears: LinearsArgs,
    worn: Fused,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinearsNormedArgs {
    linears: LinearsArgs,
    weight: u64,
    eps: f32,
    pad: u32,
}

/// Rows from which the weights are no longer all there is to wait for.
pub const MANY: usize = 65;

/// Shared memory that the device keeps of every block's, and of a multiprocessor's beyond what a block may ask for.
const KEPT: usize = 1024;

impl Linears<'_> {
    /// Tiles of so many outputs.
    fn tiles(&self, outputs: usize) -> usize {
        self.jobs.iter().map(|job| job.out.div_ceil(if job.mode == Mode::Gated { outputs / 2 } else { outputs })).sum()
    }

    /// Of a tile of fewer rows than [`MANY`]: outputs in sixteens, rows in eights.
    fn tile(&self, device: &Device) -> (usize, usize) {
        let n = self.rows.div_ceil(8).next_power_of_two();
        let gated = self.jobs.iter().any(|job| job.mode == Mode::Gated);
        // Measured on an H200: 32 outputs a tile wherever they fill the multiprocessors, 64 for many rows.
        let m = match n {
            _ if gated && n <= 4 => 2,
            1 | 2 | 4 if 10 * self.tiles(32) >= 9 * device.processors => 2,
            1 | 2 | 4 => 1,
            _ if self.worn.is_none() && self.tiles(64) >= 2 * device.processors && device.shared >= 131_072 + 4096 * 8 => 4,
            _ => 2,
        };
        (m, n)
    }

    /// Outputs of a tile of many rows, on warpgroups: 256, or 128 where so many processors are through with those sooner. To be timed: a
    /// tile of 128 is taken for five eighths of the work of one of 256, half the products and two thirds of the bytes.
    fn outputs_of_many(&self, processors: usize) -> usize {
        let turns = |outputs: usize| (self.rows.div_ceil(128) * self.tiles(outputs)).div_ceil(processors);
        if 5 * turns(128) < 8 * turns(256) { 128 } else { 256 }
    }

    /// Whether the products norm their input themselves: that of few rows, which then finds room in shared memory beside the weights on
    /// their way, without a block less on a multiprocessor.
    pub fn norms(&self, device: &Device) -> bool {
        if self.rows > 8 || self.worn.is_some() {
            return false;
        }
        let (m, _) = self.tile(device);
        let fit = |shared: usize| (device.shared + KEPT) / (shared + KEPT);
        let blocks = fit(65_536 + 4096).min(few_blocks(device, m, 1)).min(self.tiles(16 * m).div_ceil(device.processors));
        fit(normed_shared(self.rows, self.inputs)) >= blocks
    }

    /// The library, where it was given such products of so many rows.
    fn library<'d>(&self, device: &'d Device) -> Option<&'d CublasLt> {
        device.library().filter(|library| self.rows >= MANY && self.worn.is_none() && self.norm.is_none() && library.has(self))
    }

    /// Whether they are by the library, as it was [given](Device::give_to_library) such products.
    pub fn by_library(&self, device: &Device) -> bool {
        self.library(device).is_some()
    }

    /// Launches them.
    ///
    /// # Errors
    /// Where the device or the library refuses.
    ///
    /// # Panics
    /// For more than three jobs, inputs that 8 does not divide, adapters on [`MANY`] rows, or a norm where [`Linears::norms`] says no.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        if self.rows >= MANY {
            if let Some(library) = self.library(device) {
                return device.launch_by(library, self);
            }
            if device.runs(Own::Linear) {
                return self.launch_in_tiles(device, self.outputs_of_many(device.processors));
            }
            assert!(self.worn.is_none() && self.norm.is_none(), "many rows are normed and expanded apart");
            // SAFETY: shapes as the kernel documents; the caller's memory.
            return unsafe { device.launch("linear_many", [self.rows.div_ceil(128), self.tiles(128), 1], 256, 65_536, &self.args()) };
        }
        self.launch_few(device)
    }

    /// Launches them on warpgroups by tiles of 256 outputs, or of 128.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// As [`Linears::launch`].
    pub(super) fn launch_in_tiles(&self, device: &Device, outputs: usize) -> Result<(), CudaError> {
        assert!(self.worn.is_none() && self.norm.is_none(), "many rows are normed and expanded apart");
        let kernel = if outputs == 256 { "linear_wg_256" } else { "linear_wg_128" };
        let tiles = self.rows.div_ceil(128) * self.tiles(outputs);
        // SAFETY: shapes as the kernels document; the caller's memory.
        unsafe { device.launch(kernel, [tiles.min(device.processors), 1, 1], 256, 196_608, &self.args()) }
    }

    /// As kernels take them.
    fn args(&self) -> LinearsArgs {
        assert!(self.jobs.len() <= 3, "{} jobs", self.jobs.len());
        assert!(self.inputs.is_multiple_of(8) && self.ldx.is_multiple_of(8), "inputs of {} in rows of {}", self.inputs, self.ldx);
        let mut jobs = [LinearArgs::default(); 3];
        for (to, job) in jobs.iter_mut().zip(self.jobs) {
            let mode = match job.mode {
                Mode::F32 => 0,
                Mode::Bf16 => 1,
                Mode::Add => 2,
                Mode::Gated => 3,
            };
            *to = LinearArgs { w: job.w, bias: job.bias, y: job.y, out: job.out as i32, ldy: job.ldy as i32, mode, pad: 0 };
        }
        LinearsArgs {
            jobs,
            x: self.x,
            count: self.jobs.len() as i32,
            rows: self.rows as i32,
            inputs: self.inputs as i32,
            ldx: self.ldx as i32,
        }
    }

    /// Launches those of fewer rows than [`MANY`].
    fn launch_few(&self, device: &Device) -> Result<(), CudaError> {
        let args = self.args();
        let (m, n) = self.tile(device);
        let grid = |blocks: usize| [self.tiles(16 * m).min(device.processors * blocks), 1, 1];
        if let Some(Norm { weight, eps }) = self.norm {
            assert!(self.norms(device), "{} rows of {} are normed apart", self.rows, self.inputs);
            let kernel = if m == 1 { "linear_normed_m1" } else { "linear_normed_m2" };
            let args = LinearsNormedArgs { linears: args, weight, eps, pad: 0 };
            let shared = normed_shared(self.rows, self.inputs);
            // SAFETY: as above.
            return unsafe { device.launch(kernel, grid(few_blocks(device, m, 1)), 256, shared, &args) };
        }
        if let Some(worn) = self.worn {
            let kernel = WORN[m - 1][n.trailing_zeros() as usize];
            let blocks = match (m, n) {
                (_, 8) => 1,
                (1, 1) if device.shared >= 220 << 10 => 3,
                _ => 2,
            };
            let args = LinearsWornArgs { linears: args, worn };
            // SAFETY: as above; tables are of adapters that the batch holds.
            return unsafe { device.launch(kernel, grid(blocks), 256, worn_shared(n), &args) };
        }
        let kernel = match (m, n) {
            (1, 1) => "linear_few_m1_n1",
            (1, 2) => "linear_few_m1_n2",
            (1, 4) => "linear_few_m1_n4",
            (1, _) => "linear_few_m1_n8",
            (2, 1) => "linear_few_m2_n1",
            (2, 2) => "linear_few_m2_n2",
            (2, 4) => "linear_few_m2_n4",
            (2, _) => "linear_few_m2_n8",
            (_, 4) => "linear_few_m4_n4",
            (..) => "linear_few_m4_n8",
        };
        let shared = if m == 4 { 131_072 } else { 65_536 } + 4096 * n;
        // SAFETY: as above.
        unsafe { device.launch(kernel, grid(few_blocks(device, m, n)), 256, shared, &args) }
    }
}

/// Blocks a multiprocessor is to have at once, where there are tiles for them.
fn few_blocks(device: &Device, m: usize, n: usize) -> usize {
    match (m, n) {
        (4, _) | (_, 8) => 1,
        (_, 1 | 2) if device.shared >= 200 << 10 => 3,
        _ => 2,
    }
}

/// Bytes of shared memory of `linear_worn_*`, of so many eights of rows.
const fn worn_shared(n: usize) -> usize {
    65_536 + 5120 * n + 3072
}

/// Rows from which what adapters add is added apart: [`MANY`], or fewer on a device whose blocks have too little shared memory.
pub fn worn_apart(device: &Device) -> usize {
    if worn_shared(MANY.div_ceil(8) - 1) <= device.shared { MANY } else { MANY / 2 + 1 }
}

/// Bytes of shared memory of `linear_normed_*`: weights on their way; of each row the sums of 8 warps, and what it is normed to.
fn normed_shared(rows: usize, inputs: usize) -> usize {
    65_536 + rows * (512 + 2 * ((inputs + 31) / 64 * 64 + 32))
}

/// By tiles of 16 outputs (1, 2) and of 8 rows (1, 2, 4, 8).
const WORN: [[&str; 4]; 2] = [
    ["linear_worn_m1_n1", "linear_worn_m1_n2", "linear_worn_m1_n4", "linear_worn_m1_n8"],
    ["linear_worn_m2_n1", "linear_worn_m2_n2", "linear_worn_m2_n4", "linear_worn_m2_n8"],
];
