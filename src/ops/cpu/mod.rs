//! The fast host backend: vector kernels chosen at run time, shared out over a pool of threads.
//!
//! ```text
//! pool     threads, one job at a time, and their scratch memory
//! simd     one vector type per instruction set; kernels are generic over it
//! linear   matrix products, weights read in place
//! adapted  low-rank updates of matrix products, many adapters at once
//! tile     the register tile attention and sealing are made of
//! softmax  running maxima, sums and outputs, and how spans of them merge
//! attend   attention over exact and sealed pages, in spans of tiles
//! latent   attention over sealed pages of a frequency basis, straight on their codes
//! codes    codes of latents to numbers, and integer products with them
//! seal     exact pages to sealed pages
//! rows     norm, rope, activation
//! probe    what the machine can do at best
//! ```
//!
//! Invariant: nothing here depends on the number of rows or threads but the order in which independent results
//! are computed. Instruction sets differ from each other in rounding; one engine uses one.

#![allow(clippy::needless_range_loop, reason = "register tiles are matrices: rows and columns of several at once, by index")]

use std::sync::Mutex;

use crate::kv::Arena;
use crate::ops::{AttendRow, Heads, LayerView, Linear, Ops, RopeTable, SealJob, Update};

mod adapted;
mod attend;
mod codes;
mod latent;
mod linear;
mod pool;
mod probe;
mod rows;
mod seal;
mod simd;
mod softmax;
mod tile;

pub use simd::Isa;

/// Operations on this machine's processor.
pub struct Cpu {
    /// Available on this machine: only [`Cpu::with_isa`] sets it.
    isa: Isa,
    pool: pool::Pool,
    linear: Mutex<linear::LinearScratch>,
    /// Inputs as weights kept as products have passed them on.
    passed: Mutex<Vec<f32>>,
    adapted: Mutex<adapted::AdaptedScratch>,
    attend: Mutex<attend::AttendScratch>,
    seal: Mutex<Vec<u64>>,
}

/// An instruction set this machine does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this processor has no {wanted} (the best it has is {best})", best = Isa::best())]
pub struct NoSuchIsa {
    pub wanted: Isa,
}

impl Cpu {
    /// The best instruction set of this machine, on `threads` threads with the caller's among them (at least one).
    pub fn new(threads: usize) -> Cpu {
        Cpu::build(Isa::best(), threads)
    }

    /// As [`Cpu::new`], with a given instruction set.
    ///
    /// # Errors
    /// When this machine lacks it.
    pub fn with_isa(isa: Isa, threads: usize) -> Result<Cpu, NoSuchIsa> {
        if isa.is_available() { Ok(Cpu::build(isa, threads)) } else { Err(NoSuchIsa { wanted: isa }) }
    }

    fn build(isa: Isa, threads: usize) -> Cpu {
        let pool = pool::Pool::new(threads);
        let (linear, passed, adapted) = (Mutex::default(), Mutex::default(), Mutex::default());
        Cpu { isa, pool, linear, passed, adapted, attend: Mutex::default(), seal: Mutex::default() }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use, the caller's among them.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

impl Ops for Cpu {
    fn describe(&self) -> String {
        let n = self.threads();
        format!("cpu ({}, {n} thread{})", self.isa, if n == 1 { "" } else { "s" })
    }

    fn linear(&self, x: &[f32], rows: usize, jobs: &mut [Linear<'_>]) {
        linear::linear(self, x, rows, jobs);
    }

    fn low_rank(&self, x: &[f32], updates: &[Update<'_>], targets: &mut [&mut [f32]]) {
        adapted::low_rank(self, x, updates, targets);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        rows::rms_norm(self, x, weight, eps, out);
    }

    fn rope(&self, x: &mut [f32], heads: usize, table: &RopeTable, positions: &[u32]) {
        rows::rope(self, x, heads, table, positions);
    }

    fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        rows::silu_mul(self, gate, up);
    }

    fn attend(&self, arena: &Arena, shape: Heads, table: &RopeTable, rows: &[AttendRow<'_>], q: &[f32], out: &mut [f32]) {
        attend::attend(self, &attend::Call { arena, shape, table, rows, q }, out);
    }

    fn seal(&self, arena: &mut Arena, view: LayerView<'_>, table: &RopeTable, jobs: &[SealJob]) {
        seal::seal(self, arena, view, table, jobs);
    }
}
