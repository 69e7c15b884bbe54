//! Operations on each row or element alone: norm, rope, activation.

use super::Cpu;
use super::pool::Shares;
use super::simd::{Kernel, Lanes, run};
use crate::ids::PAGE_TOKENS;
use crate::ops::RopeTable;

const P: usize = PAGE_TOKENS as usize;

/// Elements below which one thread does it all, and elements of a chunk above.
const CHUNK: usize = 16 * 1024;

/// Calls `unit(from, to)` over `0..rows`, in chunks of about [`CHUNK`] elements.
fn shared(cpu: &Cpu, rows: usize, width: usize, unit: &(dyn Fn(usize, usize) + Sync)) {
    if rows * width <= 2 * CHUNK {
        return unit(0, rows);
    }
    let each = (CHUNK / width.max(1)).max(1);
    cpu.pool.run(rows.div_ceil(each), &|i| unit(i * each, rows.min((i + 1) * each)));
}

/// `Ops::rms_norm` on `cpu`.
pub(super) fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(x.len() == out.len() && x.len().is_multiple_of(width), "x and out are not [rows][{width}]");
    let (y, rows) = (Shares::new(out), x.len() / width);
    shared(cpu, rows, width, &|from, to| {
        for row in from..to {
            let norm = Norm { x: x[row * width..].as_ptr(), weight, eps, out: y.get().wrapping_add(row * width) };
            // SAFETY: `Cpu` holds only instruction sets this machine has; each row is written by one thread.
            unsafe { run(cpu.isa, norm) }
        }
    });
}

/// One row of `weight.len()` elements.
struct Norm<'a> {
    x: *const f32,
    weight: &'a [f32],
    eps: f32,
    out: *mut f32,
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let (n, w) = (self.weight.len(), self.weight.as_ptr());
        // SAFETY: all three have `n` elements.
        unsafe {
            let mut acc = S::splat(0.0);
            let mut i = 0;
            while i + S::N <= n {
                let v = S::load(self.x.add(i));
                acc = S::fma(v, v, acc);
                i += S::N;
            }
            if i < n {
                let v = S::load_part(self.x.add(i), n - i);
                acc = S::fma(v, v, acc);
            }
            let gain = S::splat(1.0 / (S::sum(acc) / n as f32 + self.eps).sqrt());
            i = 0;
            while i + S::N <= n {
                S::store(self.out.add(i), S::mul(S::mul(S::load(self.x.add(i)), gain), S::load(w.add(i))));
                i += S::N;
            }
            if i < n {
                let v = S::mul(S::mul(S::load_part(self.x.add(i), n - i), gain), S::load_part(w.add(i), n - i));
                S::store_part(self.out.add(i), v, n - i);
            }
        }
    }
}

/// `Ops::rope` on `cpu`.
pub(super) fn rope(cpu: &Cpu, x: &mut [f32], heads: usize, table: &RopeTable, positions: &[u32]) {
    let half = table.half;
    let width = heads * 2 * half;
    assert_eq!(x.len(), positions.len() * width, "x is not [positions][heads][{}]", 2 * half);
    let y = Shares::new(x);
    shared(cpu, positions.len(), width, &|from, to| {
        for (row, &position) in positions.iter().enumerate().take(to).skip(from) {
            let at = position as usize * half;
            let turn = Turn { x: y.get().wrapping_add(row * width), heads, cos: &table.cos[at..][..half], sin: &table.sin[at..][..half] };
            // SAFETY: `Cpu` holds only instruction sets this machine has; each row is written by one thread.
            unsafe { run(cpu.isa, turn) }
        }
    });
}

/// One position's heads of `2 * cos.len()` elements.
struct Turn<'a> {
    x: *mut f32,
    heads: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Turn<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let half = self.cos.len();
        for head in 0..self.heads {
            let mut i = 0;
            // SAFETY: `i` is below `half` in the table and in both halves of the head; a step covers `n` elements.
            unsafe {
                let (a, b) = (self.x.add(head * 2 * half), self.x.add((head * 2 + 1) * half));
                let (cos, sin) = (self.cos.as_ptr(), self.sin.as_ptr());
                while i + S::N <= half {
                    let (x, y) = turned::<S>(S::load(a.add(i)), S::load(b.add(i)), S::load(cos.add(i)), S::load(sin.add(i)));
                    S::store(a.add(i), x);
                    S::store(b.add(i), y);
                    i += S::N;
                }
                if i < half {
                    let n = half - i;
                    let (c, s) = (S::load_part(cos.add(i), n), S::load_part(sin.add(i), n));
                    let (x, y) = turned::<S>(S::load_part(a.add(i), n), S::load_part(b.add(i), n), c, s);
                    S::store_part(a.add(i), x, n);
                    S::store_part(b.add(i), y, n);
                }
            }
        }
    }
}

/// `(a cos - b sin, b cos + a sin)`.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn turned<S: Lanes>(a: S::V, b: S::V, cos: S::V, sin: S::V) -> (S::V, S::V) {
    // SAFETY: arithmetic on the caller's instruction set.
    unsafe {
        let minus = S::sub(S::splat(0.0), sin);
        (S::fma(b, minus, S::mul(a, cos)), S::fma(a, sin, S::mul(b, cos)))
    }
}

/// Cosines and sines of the positions from `base` on, `[half][64]`, so that lanes are positions.
///
/// # Safety
/// Both outputs are valid for `half * 64`.
pub(super) unsafe fn turn_tables(table: &RopeTable, base: usize, cos: *mut f32, sin: *mut f32) {
    let half = table.half;
    for p in 0..P {
        let at = (base + p) * half;
        for (i, (&c, &s)) in table.cos[at..at + half].iter().zip(&table.sin[at..at + half]).enumerate() {
            // SAFETY: `i < half`.
            unsafe {
                *cos.add(i * P + p) = c;
                *sin.add(i * P + p) = s;
            }
        }
    }
}

/// `Ops::silu_mul` on `cpu`.
pub(super) fn silu_mul(cpu: &Cpu, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up differ in length");
    let y = Shares::new(gate);
    shared(cpu, up.len(), 1, &|from, to| {
        let silu = Silu { gate: y.get().wrapping_add(from), up: &up[from..to] };
        // SAFETY: `Cpu` holds only instruction sets this machine has; ranges of threads are disjoint.
        unsafe { run(cpu.isa, silu) }
    });
}

struct Silu<'a> {
    gate: *mut f32,
    up: &'a [f32],
}

impl Kernel for Silu<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let (n, up) = (self.up.len(), self.up.as_ptr());
        // SAFETY: both have `n` elements.
        unsafe {
            let mut i = 0;
            while i + S::N <= n {
                S::store(self.gate.add(i), silu::<S>(S::load(self.gate.add(i)), S::load(up.add(i))));
                i += S::N;
            }
            if i < n {
                let v = silu::<S>(S::load_part(self.gate.add(i), n - i), S::load_part(up.add(i), n - i));
                S::store_part(self.gate.add(i), v, n - i);
            }
        }
    }
}

/// `gate / (1 + e^-gate) * up`.
#[inline(always)]
unsafe fn silu<S: Lanes>(gate: S::V, up: S::V) -> S::V {
    // SAFETY: arithmetic on the caller's instruction set.
    unsafe {
        let e = S::exp(S::sub(S::splat(0.0), gate));
        S::mul(S::div(gate, S::add(S::splat(1.0), e)), up)
    }
}
