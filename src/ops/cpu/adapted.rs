//! Low-rank updates of matrix products: rows of many adapters in one pass that shrinks and one that expands.
//!
//! A step's decode rows may each wear another adapter, so the unit of work is a piece of one update: some of its rows with some
//! of its ranks, or with some of its output tiles. Factors are read once for the rows that share them, front to back; with one
//! row an update is bound by reading them, `rank * (in + out)` elements, beside `in * out` of the layer itself.
//!
//! The order of every sum is that of [`super::linear`] for the shrinking, and that of the ranks for the expanding, whatever the
//! rows: a row gives the same bits alone and in a prompt. Activations are never rounded here.

use half::bf16;

use super::Cpu;
use super::linear::{BLOCK, Dots, Plain, TOTALS};
use super::pool::{Aligned, Shares, grow};
use super::simd::{Element, Kernel, Lanes, dispatch};
use super::tile::{Product, by_rows};
use crate::ops::{MatrixData, UP_TILE, Update};

/// Rows and ranks of a unit that shrinks.
const ROWS: usize = 24;
const RANKS: usize = 8;
/// Bytes of factors a unit that expands should read at least.
const EXPAND_BYTES: usize = 32 * 1024;
/// Multiplications below which waking other threads costs more than they save.
const WORTH_SHARING: usize = 96 * 1024;

/// Memory kept from call to call.
#[derive(Default)]
pub(super) struct AdaptedScratch {
    list: Vec<Part>,
    /// Where each target begins, and its length.
    targets: Vec<(Shares<f32>, usize)>,
    /// The shrunk inputs of all updates, `[rows][rank]` each.
    shrunk: Vec<Aligned>,
}

#[derive(Clone, Copy)]
enum Factor {
    F32(*const f32),
    Bf16(*const bf16),
}

/// An update as threads share it. Its pointers are valid for the length of the call.
#[derive(Clone, Copy)]
struct Part {
    down: Factor,
    up: Factor,
    rank: usize,
    inputs: usize,
    outputs: usize,
    /// First row, and how many.
    first: usize,
    rows: usize,
    /// The inputs of its first row; the outputs of the batch's first row.
    x: *const f32,
    y: Shares<f32>,
    /// Where its shrunk rows begin.
    shrunk: usize,
    /// Units of each pass: along ranks or tiles, times along rows.
    shrinks: (usize, usize),
    expands: (usize, usize),
    /// Tiles of a unit that expands.
    tiles: usize,
}

// SAFETY: the pointers are read only, but for `y` and the shrunk rows, which each unit writes in places of its own.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

/// `Ops::low_rank` on `cpu`.
pub(super) fn low_rank(cpu: &Cpu, x: &[f32], updates: &[Update<'_>], targets: &mut [&mut [f32]]) {
    let mut scratch = cpu.adapted.lock().unwrap_or_else(|e| e.into_inner());
    let AdaptedScratch { list, targets: ys, shrunk } = &mut *scratch;
    list.clear();
    ys.clear();
    ys.extend(targets.iter_mut().map(|y| (Shares::new(y), y.len())));
    let (mut floats, mut work) = (0, 0);
    for update in updates {
        let f = &update.factors;
        f.check();
        let (first, rows) = (update.rows.start, update.rows.len());
        assert!(update.rows.end * f.in_features <= x.len(), "an update's rows are not in x");
        let (y, len) = ys[update.target];
        assert!(update.rows.end * f.out_features <= len, "an update's rows are not in its target");
        if rows == 0 {
            continue;
        }
        let factor = |data: MatrixData<'_>| match data {
            MatrixData::F32(d) => (Factor::F32(d.as_ptr()), 4),
            MatrixData::Bf16(d) => (Factor::Bf16(d.as_ptr()), 2),
        };
        let ((down, _), (up, bytes)) = (factor(f.down), factor(f.up));
        let tiles = EXPAND_BYTES.div_ceil(f.rank * UP_TILE * bytes);
        let blocks = rows.div_ceil(ROWS);
        list.push(Part {
            down,
            up,
            rank: f.rank,
            inputs: f.in_features,
            outputs: f.out_features,
            first,
            rows,
            x: x[first * f.in_features..].as_ptr(),
            y,
            shrunk: floats,
            shrinks: (f.rank.div_ceil(RANKS), blocks),
            expands: (f.out_features.div_ceil(UP_TILE).div_ceil(tiles), blocks),
            tiles,
        });
        floats += rows * f.rank;
        work += rows * f.rank * (f.in_features + f.out_features);
    }
    grow(shrunk, floats);
    let (list, shrunk) = (&list[..], Shares::new(shrunk.as_mut_slice()));
    let run = |units: usize, unit: &(dyn Fn(usize) + Sync)| {
        if work < WORTH_SHARING { (0..units).for_each(unit) } else { cpu.pool.run(units, unit) }
    };
    run(list.iter().map(|p| p.shrinks.0 * p.shrinks.1).sum(), &|i| {
        let (part, column, block) = find(list, i, |p| p.shrinks);
        // SAFETY: `Cpu` holds only instruction sets this machine has. Lengths were checked above, and no two units share both a row
        // and a rank of one update.
        unsafe { dispatch(cpu.isa, Shrink { part, ranks: column * RANKS, row: block * ROWS, shrunk }) }
    });
    run(list.iter().map(|p| p.expands.0 * p.expands.1).sum(), &|i| {
        let (part, column, block) = find(list, i, |p| p.expands);
        // SAFETY: as above; updates of one target share no row, and units of one update not both a row and a column.
        unsafe { dispatch(cpu.isa, Expand { part, tile: column * part.tiles, row: block * ROWS, shrunk }) }
    });
}

/// The unit `i`: its update, which piece along columns, and which along rows.
fn find(list: &[Part], mut i: usize, units: impl Fn(&Part) -> (usize, usize)) -> (&Part, usize, usize) {
    let mut at = 0;
    loop {
        let (columns, rows) = units(&list[at]);
        if i < columns * rows {
            // Neighbouring units share factors, not rows: those are what is large.
            return (&list[at], i / rows, i % rows);
        }
        i -= columns * rows;
        at += 1;
    }
}

/// Up to [`ROWS`] rows with up to [`RANKS`] ranks.
struct Shrink<'a> {
    part: &'a Part,
    ranks: usize,
    row: usize,
    shrunk: Shares<Aligned>,
}

impl Kernel for Shrink<'_> {
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on.
        unsafe {
            match self.part.down {
                Factor::F32(w) => self.with::<S, f32>(w),
                Factor::Bf16(w) => self.with::<S, bf16>(w),
            }
        }
    }
}

impl Shrink<'_> {
    /// # Safety
    /// As [`Kernel::run`]; `w` is the part's own.
    unsafe fn with<S: Lanes, W: Element>(&self, w: *const W) {
        let Part { rank, inputs, rows, x, shrunk, .. } = *self.part;
        // SAFETY: rows and ranks are in range; what a block past the last rank computes is dropped.
        unsafe {
            let to = self.shrunk.get().cast::<f32>().add(shrunk);
            let (mut row, end) = (self.row, rows.min(self.row + ROWS));
            while row < end {
                let n = (end - row).min(S::ROWS);
                let mut j = self.ranks;
                while j < rank.min(self.ranks + RANKS) {
                    let mut totals = [0.0f32; TOTALS];
                    let mut k = 0;
                    while k < inputs {
                        let length = BLOCK.min(inputs - k);
                        let at = |c: usize| w.add((j + c).min(rank - 1) * inputs + k);
                        by_rows!(n, S, |R| {
                            let mut rows = [x; R];
                            for r in 0..R {
                                rows[r] = x.add((row + r) * inputs + k);
                            }
                            let w = [[at(0), at(1), at(2), at(3)]];
                            // Rows after the first few fetch what they hold already.
                            let ahead = if row == self.row { (4 * inputs * size_of::<W>()) as isize } else { 0 };
                            S::enter(Dots::<S, Plain<W>, R, 1> { x: rows, w, n: length, ahead, totals: totals.as_mut_ptr() })
                        });
                        k += BLOCK;
                    }
                    for r in 0..n {
                        for c in 0..(rank - j).min(4) {
                            *to.add((row + r) * rank + j + c) = totals[16 * (r / 4) + 4 * c + r % 4];
                        }
                    }
                    j += 4;
                }
                row += n;
            }
        }
    }
}

/// Up to [`ROWS`] rows with some output tiles.
struct Expand<'a> {
    part: &'a Part,
    tile: usize,
    row: usize,
    shrunk: Shares<Aligned>,
}

impl Kernel for Expand<'_> {
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on.
        unsafe {
            match self.part.up {
                Factor::F32(w) => self.with::<S, f32>(w),
                Factor::Bf16(w) => self.with::<S, bf16>(w),
            }
        }
    }
}

impl Expand<'_> {
    /// # Safety
    /// As [`Kernel::run`]; `w` is the part's own.
    unsafe fn with<S: Lanes, W: Element>(&self, w: *const W) {
        let Part { rank, outputs, first, rows, y, shrunk, tiles, .. } = *self.part;
        // SAFETY: rows and tiles are in range, and the last tile is cut at the last output.
        unsafe {
            let from = self.shrunk.get().cast::<f32>().cast_const().add(shrunk);
            let end = rows.min(self.row + ROWS);
            for tile in self.tile..(self.tile + tiles).min(outputs.div_ceil(UP_TILE)) {
                let b = w.add(tile * rank * UP_TILE);
                let width = UP_TILE.min(outputs - tile * UP_TILE);
                let mut row = self.row;
                while row < end {
                    let n = (end - row).min(S::ROWS);
                    by_rows!(n, S, |R| {
                        let (mut a, mut out) = ([from; R], [y.get(); R]);
                        for r in 0..R {
                            a[r] = from.add((row + r) * rank);
                            out[r] = y.get().add((first + row + r) * outputs + tile * UP_TILE);
                        }
                        let ahead = if row == self.row { (rank * UP_TILE * size_of::<W>()) as isize } else { 0 };
                        let product = Product { a, a_step: 1, b, b_step: UP_TILE, n: rank, ahead };
                        product.onto::<S>(out, width, Some([1.0; R]))
                    });
                    row += n;
                }
            }
        }
    }
}
