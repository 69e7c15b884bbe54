//! What is done row by row, and what moves: launches of `rows.cuh` and `moves.cuh`.
//!
//! Kernels write through shared borrows: one stream orders all that is asked of a device.

use bytemuck::{Pod, Zeroable};

use super::CudaError;
use super::driver::{Device, Memory, Part};
use crate::ids::PageAddr;
use crate::kv::layout::ExactType;
use crate::ops::Heads;

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbedArgs {
    tokens: u64,
    table: u64,
    x: u64,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    x: u64,
    weight: u64,
    out: u64,
    width: u32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AppendArgs {
    q: u64,
    k: u64,
    v: u64,
    q_norm: u64,
    k_norm: u64,
    cos: u64,
    sin: u64,
    positions: u64,
    pages: u64,
    arena: u64,
    q_stride: u32,
    kv_stride: u32,
    rows: u32,
    heads: u32,
    kv_heads: u32,
    d: u32,
    offset: u32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SiluArgs {
    gate: u64,
    up: u64,
    out: u64,
    stride: u32,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct HiddenArgs {
    arena: u64,
    pages: u64,
    positions: u64,
    x: u64,
    offset: u32,
    hidden: u32,
    to_pages: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PickArgs {
    from: u64,
    rows: u64,
    to: u64,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SinksArgs {
    arena: u64,
    jobs: u64,
    to_offset: u32,
    stride: u32,
    d: u32,
    bytes: u32,
}

/// First positions of a page that go into a sinks block (`SinksJob` of `moves.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct SinksJob {
    pub from: u32,
    pub offset: u32,
    pub to: u32,
    pub n: u32,
}

/// Queries turned in place, keys turned into their pages, values into theirs.
pub struct Rope<'a> {
    /// `[rows][heads * d]`, `[rows][kv_heads * d]` twice; q is turned in place.
    pub q: Part<'a, f32>,
    pub k: Part<'a, f32>,
    pub v: Part<'a, f32>,
    /// `[d]`, on each head before rope.
    pub q_norm: Option<Part<'a, f32>>,
    pub k_norm: Option<Part<'a, f32>>,
    pub eps: f32,
    /// `[positions][d / 2]`.
    pub cos: &'a Memory<f32>,
    pub sin: &'a Memory<f32>,
    /// Of each row: where it stands, and the page that is its.
    pub positions: Part<'a, u32>,
    pub pages: Part<'a, u32>,
    pub arena: &'a Memory<u8>,
    /// Of the layer in a page.
    pub offset: usize,
    pub exact: ExactType,
}

impl Device {
    /// `x[i] = table[tokens[i]]`.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit. Tokens must be rows of the table, which the caller has checked.
    pub fn embed(&self, tokens: Part<'_, u32>, table: Part<'_, u16>, width: usize, x: Part<'_, f32>) -> Result<(), CudaError> {
        assert!(x.len() >= tokens.len() * width, "{} rows of {width} in {}", tokens.len(), x.len());
        let args = EmbedArgs { tokens: tokens.ptr(), table: table.ptr(), x: x.ptr(), width: width as u32 };
        // SAFETY: shapes were checked.
        unsafe { self.launch("embed", [tokens.len(), 1, 1], 256, 0, &args) }
    }

    /// `out[i] = bf16(x[i] / sqrt(mean(x[i]^2) + eps) * weight)`.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit.
    pub fn rms_norm(&self, x: Part<'_, f32>, rows: usize, weight: Part<'_, f32>, eps: f32, out: Part<'_, u16>) -> Result<(), CudaError> {
        let width = weight.len();
        assert!(x.len() >= rows * width && out.len() >= rows * width, "{rows} rows of {width}");
        let args = NormArgs { x: x.ptr(), weight: weight.ptr(), out: out.ptr(), width: width as u32, eps };
        // SAFETY: shapes were checked.
        unsafe { self.launch("rms_norm", [rows, 1, 1], 256, 32, &args) }
    }

    /// `out[i] = bf16(silu(gate[i]) * up[i])`, rows of `width`.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit.
    pub fn silu_mul(&self, gate: Part<'_, f32>, up: Part<'_, f32>, width: usize, out: Part<'_, u16>) -> Result<(), CudaError> {
        let rows = out.len() / width;
        assert!(gate.len() >= out.len() && up.len() >= out.len() && out.len() == rows * width, "{rows} rows of {width}");
        let args = SiluArgs { gate: gate.ptr(), up: up.ptr(), out: out.ptr(), stride: width as u32, width: width as u32 };
        // SAFETY: shapes were checked.
        unsafe { self.launch("silu_mul", [rows, width.div_ceil(1024), 1], 256, 0, &args) }
    }

    /// See [`Rope`].
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit. Positions and pages are the caller's to check.
    pub fn rope_append(&self, a: &Rope<'_>, shape: Heads) -> Result<(), CudaError> {
        let Heads { heads, kv_heads, head_dim: d, .. } = shape;
        let rows = a.positions.len();
        assert!(a.q.len() >= rows * heads * d && a.k.len() >= rows * kv_heads * d && a.v.len() >= rows * kv_heads * d, "{rows} rows");
        assert_eq!(a.pages.len(), rows, "a page for each row");
        let norm = |n: Option<Part<'_, f32>>| {
            n.map_or(0, |n| {
                assert_eq!(n.len(), d, "a norm of another head");
                n.ptr()
            })
        };
        let args = AppendArgs {
            q: a.q.ptr(),
            k: a.k.ptr(),
            v: a.v.ptr(),
            q_norm: norm(a.q_norm),
            k_norm: norm(a.k_norm),
            cos: a.cos.ptr(),
            sin: a.sin.ptr(),
            positions: a.positions.ptr(),
            pages: a.pages.ptr(),
            arena: a.arena.ptr(),
            q_stride: (heads * d) as u32,
            kv_stride: (kv_heads * d) as u32,
            rows: rows as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            d: d as u32,
            offset: a.offset as u32,
            eps: a.eps,
        };
        let kernel = match a.exact {
            ExactType::Bf16 => "rope_append_b16",
            ExactType::F32 => "rope_append_f32",
        };
        // SAFETY: shapes were checked.
        unsafe { self.launch(kernel, [rows.div_ceil(16), heads + 2 * kv_heads, 1], 256, 64 * (d + 1), &args) }
    }

    /// Hidden states of positions into their workspace pages, or out of them.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit, or 4 does not divide the width. Pages are the caller's to check.
    pub fn hidden(
        &self,
        arena: &Memory<u8>,
        (pages, positions): (Part<'_, u32>, Part<'_, u32>),
        offset: usize,
        x: Part<'_, f32>,
        to_pages: bool,
    ) -> Result<(), CudaError> {
        let rows = pages.len();
        let hidden = x.len() / rows.max(1);
        assert!(positions.len() == rows && hidden.is_multiple_of(4), "{rows} rows of {hidden}");
        let args = HiddenArgs {
            arena: arena.ptr(),
            pages: pages.ptr(),
            positions: positions.ptr(),
            x: x.ptr(),
            offset: offset as u32,
            hidden: hidden as u32,
            to_pages: i32::from(to_pages),
        };
        // SAFETY: shapes were checked.
        unsafe { self.launch("hidden_rows", [rows, 1, 1], 256, 0, &args) }
    }

    /// `to[i] = from[rows[i]]`, rows of `width`.
    ///
    /// # Errors
    /// Where the device refuses.
    ///
    /// # Panics
    /// Where shapes do not fit, or 4 does not divide the width. Rows are the caller's to check.
    pub fn pick(&self, from: Part<'_, f32>, rows: Part<'_, u32>, width: usize, to: Part<'_, f32>) -> Result<(), CudaError> {
        assert!(to.len() >= rows.len() * width && width.is_multiple_of(4), "{} rows of {width}", rows.len());
        let args = PickArgs { from: from.ptr(), rows: rows.ptr(), to: to.ptr(), width: width as u32 };
        // SAFETY: shapes were checked.
        unsafe { self.launch("pick_rows", [rows.len(), 1, 1], 256, 0, &args) }
    }

    /// Copies first positions into sinks blocks whose tiles have room for `stride`.
    ///
    /// # Errors
    /// Where the device refuses.
    pub fn keep_sinks(
        &self,
        arena: &Memory<u8>,
        jobs: &Memory<SinksJob>,
        n: usize,
        (to_offset, stride): (usize, usize),
        (kv_heads, d, exact): (usize, usize, ExactType),
    ) -> Result<(), CudaError> {
        let args = SinksArgs {
            arena: arena.ptr(),
            jobs: jobs.ptr(),
            to_offset: to_offset as u32,
            stride: stride as u32,
            d: d as u32,
            bytes: exact.bytes() as u32,
        };
        assert!(n <= jobs.len(), "{n} jobs of {}", jobs.len());
        // SAFETY: jobs are of pages that their plan leased.
        unsafe { self.launch("keep_sinks", [n, kv_heads, 1], 128, 0, &args) }
    }
}

/// Bytes of a page's beginning, in the units of kernels.
pub const UNIT: usize = PageAddr::UNIT as usize;
