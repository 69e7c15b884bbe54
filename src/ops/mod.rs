//! The fused operations of a forward pass and their shapes. `reference` is the definition, loops in f32;
//! `cpu` is the fast twin and must agree with it within the tolerances of `tests/suite/ops.rs`.
//!
//! Determinism, on the host: every output row of every operation depends on that row's inputs alone, and is computed in an
//! order that depends on shapes of that row only: never on how many rows there are, how they are split into
//! chunks, or how many threads run. So a sequence's logits do not depend, to the bit, on what else is in the
//! batch, and for the `full` profile a prompt computed in one chunk, in many, or token by token is the same.

use half::bf16;

use crate::compress::LayerCompression;
use crate::ids::PageAddr;
use crate::kv::Arena;
use crate::kv::layout::{ExactType, PageLayout};

pub mod cpu;
pub mod cuda;
pub mod reference;

/// A row-major matrix `[out][in]`, borrowed from the checkpoint's mapping where its type allows.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub out_features: usize,
    pub in_features: usize,
    pub data: MatrixData<'a>,
}

/// Elements of a [`Matrix`].
#[derive(Clone, Copy, Debug)]
pub enum MatrixData<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// `y = x . w^T (+ bias)`, or added onto `y` when `accumulate` (the residual stream).
pub struct Linear<'a> {
    pub w: Matrix<'a>,
    /// Of weights kept as a product: what the input passes first, `[w.in_features][in_features]`.
    pub inner: Option<Matrix<'a>>,
    pub bias: Option<&'a [f32]>,
    pub accumulate: bool,
    /// `[rows][w.out_features]`.
    pub y: &'a mut [f32],
}

/// Output columns of a tile of [`LowRank::up`].
pub const UP_TILE: usize = 64;

/// A product of two thin matrices, `up (down x)`: what an adapter adds to a linear layer (LoRA, Hu et al. 2021, eq. 3), its scale
/// folded into `up`. Both factors have one element type.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    pub rank: usize,
    pub in_features: usize,
    pub out_features: usize,
    /// `[rank][in_features]`.
    pub down: MatrixData<'a>,
    /// `[out_features / 64 rounded up][rank][64]`, zeros past the end: a tile of outputs is read front to back.
    pub up: MatrixData<'a>,
}

/// A [`LowRank`] for some rows of a batch.
#[derive(Clone, Debug)]
pub struct Update<'a> {
    pub factors: LowRank<'a>,
    /// Rows of the input, and of the output it is added to.
    pub rows: std::ops::Range<usize>,
    /// Which of the outputs.
    pub target: usize,
}

/// Cosines and sines per position, `[max_positions][head_dim / 2]`, scaling included.
#[derive(Clone, Debug)]
pub struct RopeTable {
    pub half: usize,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

/// One layer's view of one profile's pages.
#[derive(Clone, Copy)]
pub struct LayerView<'a> {
    pub layer: usize,
    pub layout: &'a PageLayout,
    /// `None` for `full`.
    pub compression: Option<&'a LayerCompression>,
}

/// Consecutive queries of one sequence, and the pages they see.
///
/// Query `i` stands at `position + i` and sees every earlier position and itself:
/// sinks `[0, n_sinks)` when `sinks` is there, sealed positions from there up to `64 * sealed.len()`,
/// then exact ones, page `j` of `exact` beginning at `64 * (sealed.len() + j)`.
#[derive(Clone, Copy)]
pub struct AttendRow<'a> {
    pub view: LayerView<'a>,
    /// First row of this sequence in `q` and `out`.
    pub first: usize,
    pub n: usize,
    pub position: u32,
    pub sealed: &'a [PageAddr],
    pub sinks: Option<PageAddr>,
    /// Byte offset of this layer in the exact pages (zero in workspace pages, which hold one layer).
    pub exact: &'a [PageAddr],
    pub exact_offset: usize,
}

/// Shapes shared by all rows of an attention call.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Usually `head_dim ^ -0.5`.
    pub scale: f32,
}

/// The operations of one forward pass. Activations are f32, row-major.
pub trait Ops: Send + Sync {
    /// What runs, for logs: instruction set and threads.
    fn describe(&self) -> String;

    /// All of `jobs` on the same input `x: [rows][in_features]`. One parallel region for all jobs.
    fn linear(&self, x: &[f32], rows: usize, jobs: &mut [Linear<'_>]);

    /// `targets[u.target][i] += up (down x[i])` for the rows `i` of every update `u`; all updates share the input `x: [rows][in_features]`,
    /// and a target is `[rows][out_features]`. No two updates of a target share a row.
    ///
    /// Grouped as S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023) group them: one pass that shrinks to ranks, one that
    /// expands. Reads each update's factors once, `2 * rank * (in + out)` FLOPs a row; rows without an update cost nothing.
    fn low_rank(&self, x: &[f32], updates: &[Update<'_>], targets: &mut [&mut [f32]]);

    /// `out[i] = x[i] / sqrt(mean(x[i]^2) + eps) * weight`, for rows of `weight.len()`.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);

    /// Rotates `x: [positions.len()][heads][2 * table.half]` in place, each row at its position.
    fn rope(&self, x: &mut [f32], heads: usize, table: &RopeTable, positions: &[u32]);

    /// `gate[i] = silu(gate[i]) * up[i]`.
    fn silu_mul(&self, gate: &mut [f32], up: &[f32]);

    /// Causal softmax attention of `q: [rows][heads][head_dim]` (after rope) into `out` of the same shape.
    fn attend(&self, arena: &Arena, shape: Heads, table: &RopeTable, rows: &[AttendRow<'_>], q: &[f32], out: &mut [f32]);

    /// Compresses exact pages into sealed pages: `(from, byte offset of the layer in it, to, skip, first position)`.
    /// The first `skip` positions (sinks) take no part in scales and store code zero.
    fn seal(&self, arena: &mut Arena, view: LayerView<'_>, table: &RopeTable, jobs: &[SealJob]);
}

/// One page to seal.
#[derive(Clone, Copy, Debug)]
pub struct SealJob {
    pub from: PageAddr,
    /// Byte offset of the layer in `from`.
    pub from_offset: usize,
    pub to: PageAddr,
    pub skip: u32,
    /// Position of the page's first token; its keys are turned back from their rope by it.
    pub position: u32,
}

/// Keys and values of consecutive positions, to be written into exact pages.
pub struct Append<'a> {
    pub view: LayerView<'a>,
    /// Page `j` begins at position `first_page + 64 * j`.
    pub pages: &'a [PageAddr],
    pub first_page: u32,
    /// Byte offset of the layer in each page.
    pub exact_offset: usize,
    /// Position of the first key.
    pub position: u32,
    /// After rope: `[n][kv_heads][head_dim]`.
    pub k: &'a [f32],
    pub v: &'a [f32],
}

/// Writes keys and values into their pages. Shared by every backend on the host: it moves `n * kv_channels`
/// elements, which is nothing beside the projections that made them.
pub fn append(arena: &mut Arena, a: &Append<'_>) {
    let layout = a.view.layout;
    let (d, heads) = (layout.head_dim, layout.kv_heads);
    let width = heads * d;
    let half = exact_head_bytes(layout);
    for (i, (k, v)) in a.k.chunks_exact(width).zip(a.v.chunks_exact(width)).enumerate() {
        let at = a.position - a.first_page + i as u32;
        let (page, slot) = (a.pages[(at / 64) as usize], (at % 64) as usize);
        for h in 0..heads {
            let keys = a.exact_offset + 2 * h * half;
            let (k, v) = (&k[h * d..][..d], &v[h * d..][..d]);
            match layout.exact {
                ExactType::F32 => {
                    let dst = arena.slice_mut::<f32>(page, keys, d * 64);
                    k.iter().enumerate().for_each(|(c, &x)| dst[c * 64 + slot] = x);
                    arena.slice_mut::<f32>(page, keys + half, d * 64)[slot * d..][..d].copy_from_slice(v);
                }
                ExactType::Bf16 => {
                    let dst = arena.slice_mut::<bf16>(page, keys, d * 64);
                    k.iter().enumerate().for_each(|(c, &x)| dst[c * 64 + slot] = bf16::from_f32(x));
                    let dst = &mut arena.slice_mut::<bf16>(page, keys + half, d * 64)[slot * d..][..d];
                    v.iter().zip(dst).for_each(|(&x, y)| *y = bf16::from_f32(x));
                }
            }
        }
    }
}

/// Bytes of keys of one head in an exact page; its values follow.
pub fn exact_head_bytes(layout: &PageLayout) -> usize {
    layout.head_dim * 64 * layout.exact.bytes()
}

impl Linear<'_> {
    /// Elements of a row of its input.
    pub fn inputs(&self) -> usize {
        self.inner.map_or(self.w.in_features, |inner| inner.in_features)
    }
}

impl MatrixData<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            MatrixData::F32(d) => d.len(),
            MatrixData::Bf16(d) => d.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i`, widened.
    pub fn at(&self, i: usize) -> f32 {
        match self {
            MatrixData::F32(d) => d[i],
            MatrixData::Bf16(d) => d[i].to_f32(),
        }
    }
}

impl LowRank<'_> {
    /// Panics unless the factors are as long as they say: kernels read them by address.
    pub fn check(&self) {
        let LowRank { rank, in_features, out_features, down, up } = self;
        assert!(*rank > 0, "a rank of zero is no update");
        assert_eq!(down.len(), rank * in_features, "down is not [rank][in_features]");
        assert_eq!(up.len(), out_features.div_ceil(UP_TILE) * rank * UP_TILE, "up is not tiles of [rank][64]");
    }
}

impl ExactType {
    /// `f32` to the stored element and back, the rounding every reader sees.
    pub fn round(self, x: f32) -> f32 {
        match self {
            ExactType::F32 => x,
            ExactType::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }
}
