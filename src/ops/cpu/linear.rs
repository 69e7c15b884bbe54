//! Matrix products against weights that stay where the checkpoint's mapping has them.
//!
//! Every output is a dot product in one order, whatever kernel computes it: the inputs in blocks of [`BLOCK`];
//! within a block one vector accumulator, lanes along the inputs, then the tree of [`Lanes::reduce_add`]; blocks
//! are added to a running total in turn; bias and residual last. So a row gives the same bits alone, in a batch,
//! and in a prompt, and the kernels differ only in how many outputs they have under way:
//!
//! - one row, or two short ones, on wide vectors: weights are read from memory front to back, as memory gives them fastest;
//! - few rows: a group of weight rows is read once from memory, widened in registers, and meets all rows;
//! - many rows: a panel of weight rows is widened once into a buffer the second-level cache holds, a tile of
//!   input rows stays in the first level while the panel streams past it.

use half::bf16;

use super::Cpu;
use super::pool::{Aligned, Shares, grow, scratch_back, scratch_take};
use super::simd::{Element, Kernel, Lanes, dispatch};
use super::tile::{by_rows, widen};
use crate::ops::{Linear, MatrixData};

/// Inputs summed in one accumulator before it is added to the total. Six rows of so many inputs and four of weights
/// take less than half the first-level cache, as two threads often share a core.
pub(super) const BLOCK: usize = 512;
/// Weight rows of a panel at most; `PANEL * BLOCK` floats fit the second-level cache beside the input tile.
const PANEL: usize = 128;
/// Input rows that meet a panel before it is dropped.
const ROWS: usize = 192;
/// Up to so many rows, widening weights in registers beats the detour through a panel.
const FEW: usize = 24;
/// Bytes of inputs up to which rows meet weights that are read front to back: the inputs stay in the first-level cache meanwhile.
const STREAM_BYTES: usize = 28 * 1024;
/// How far ahead of what is read front to back memory is asked for: over the end of a page, where processors stop by themselves.
const STREAM_AHEAD: usize = 4096;
/// Floats of one tile's totals: six rows by four columns as [`Lanes::reduce_add`] lays them out.
pub(super) const TOTALS: usize = 32;
/// Multiplications below which waking other threads costs more than they save.
const WORTH_SHARING: usize = 96 * 1024;
/// Bytes of weights a chunk of the few-rows kernel should have at least.
const CHUNK_BYTES: usize = 32 * 1024;

/// Memory kept from call to call.
#[derive(Default)]
pub(super) struct LinearScratch {
    jobs: Vec<Job>,
    /// The inputs, their rows on cache lines, and the same rounded to bf16.
    lined: Vec<Aligned>,
    halves: Vec<Aligned>,
}

/// A [`Linear`] as threads share it. Its pointers are valid for the length of the call.
#[derive(Clone, Copy)]
struct Job {
    w: Weights,
    out: usize,
    /// Null for none.
    bias: *const f32,
    accumulate: bool,
    y: Shares<f32>,
    /// Output columns of a chunk, and the number of chunks along columns.
    columns: usize,
    chunks: usize,
}

/// The rows all jobs share.
struct Input {
    width: usize,
    /// Rows of `width`, each `x_step` after the one before.
    x: *const f32,
    x_step: usize,
    /// The same in bf16, where a job needs it; null otherwise.
    rounded: *const bf16,
    rounded_step: usize,
}

// SAFETY: the pointers are only read while the call lasts.
unsafe impl Sync for Input {}

#[derive(Clone, Copy)]
enum Weights {
    F32(*const f32),
    Bf16(*const bf16),
}

// SAFETY: the pointers are read only, but for `y`, which each chunk writes in columns and rows of its own.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

/// `Ops::linear` on `cpu`. What weights kept as products are of is met with the others' weights, then each on its own.
pub(super) fn linear(cpu: &Cpu, x: &[f32], rows: usize, jobs: &mut [Linear<'_>]) {
    let width = |job: &Linear<'_>| job.inner.map_or(0, |inner| inner.out_features);
    let all: usize = jobs.iter().map(width).sum();
    if all == 0 {
        return dense(cpu, x, rows, jobs);
    }
    let mut passed = cpu.passed.lock().unwrap_or_else(|e| e.into_inner());
    passed.clear();
    passed.resize(rows * all, 0.0);
    let mut rest = &mut passed[..];
    let mut first: Vec<Linear<'_>> = Vec::with_capacity(jobs.len());
    for job in jobs.iter_mut() {
        first.push(match job.inner {
            None => Linear { w: job.w, inner: None, bias: job.bias, accumulate: job.accumulate, y: &mut *job.y },
            Some(inner) => {
                assert_eq!(inner.out_features, job.w.in_features, "what the input passes first is not [w.in_features][in_features]");
                let (y, left) = std::mem::take(&mut rest).split_at_mut(rows * inner.out_features);
                rest = left;
                Linear { w: inner, inner: None, bias: None, accumulate: false, y }
            }
        });
    }
    dense(cpu, x, rows, &mut first);
    let mut rest = &passed[..];
    for job in jobs.iter_mut().filter(|job| job.inner.is_some()) {
        let (x, left) = rest.split_at(rows * job.w.in_features);
        rest = left;
        dense(cpu, x, rows, &mut [Linear { w: job.w, inner: None, bias: job.bias, accumulate: job.accumulate, y: &mut *job.y }]);
    }
}

/// [`linear`] of weights that are no products.
fn dense(cpu: &Cpu, x: &[f32], rows: usize, jobs: &mut [Linear<'_>]) {
    let Some(inputs) = jobs.first().map(|job| job.w.in_features) else { return };
    assert!(inputs > 0 && x.len() == rows * inputs, "x is not [rows][in_features]");
    if rows == 0 {
        return;
    }
    let mut scratch = cpu.linear.lock().unwrap_or_else(|e| e.into_inner());
    let LinearScratch { jobs: list, lined, halves } = &mut *scratch;
    list.clear();
    let row_blocks = if rows <= FEW { 1 } else { rows.div_ceil(ROWS) };
    let block = rows.div_ceil(row_blocks).next_multiple_of(12);
    let mut work = 0;
    let mut pairs = false;
    for job in jobs {
        let out = job.w.out_features;
        let (w, len, bytes) = match job.w.data {
            MatrixData::F32(w) => (Weights::F32(w.as_ptr()), w.len(), 4),
            MatrixData::Bf16(w) => (Weights::Bf16(w.as_ptr()), w.len(), 2),
        };
        assert_eq!(job.w.in_features, inputs, "jobs differ in in_features");
        assert_eq!(len, out * inputs, "weights are not [out][in]");
        assert_eq!(job.y.len(), rows * out, "y is not [rows][out]");
        assert!(job.bias.is_none_or(|b| b.len() == out), "bias is not [out]");
        pairs |= bytes == 2;
        work += rows * out * inputs;
        let columns = if rows <= FEW {
            let least = CHUNK_BYTES / (inputs * bytes).max(1);
            out.div_ceil(32 * cpu.pool.threads()).max(least).next_multiple_of(8)
        } else {
            // Narrower panels where there would be too few for all threads.
            let panels = (4 * cpu.pool.threads()).div_ceil(row_blocks);
            out.div_ceil(panels).next_multiple_of(4).clamp(16, PANEL)
        };
        list.push(Job {
            w,
            out,
            bias: job.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            accumulate: job.accumulate,
            y: Shares::new(job.y),
            columns,
            chunks: out.div_ceil(columns),
        });
    }
    pairs &= cpu.isa.rounds_activations();
    let mut input = Input { width: inputs, x: x.as_ptr(), x_step: inputs, rounded: std::ptr::null(), rounded_step: 0 };
    if (3..=FEW).contains(&rows) {
        // Loads that cross cache lines cost a third of the speed. Beside the weights the copy is nothing; with one
        // or two rows there is nothing to gain, and many are copied tile by tile.
        (input.x, input.x_step) = copied(cpu, x, inputs, lined, |v| v);
    }
    if pairs {
        (input.rounded, input.rounded_step) = copied(cpu, x, inputs, halves, bf16::from_f32);
    }
    let input = &input;
    let units: usize = list.iter().map(|job| job.chunks * row_blocks).sum();
    let list = &list[..];
    let unit = |i: usize| {
        let mut i = i;
        let mut at = 0;
        while i >= list[at].chunks * row_blocks {
            i -= list[at].chunks * row_blocks;
            at += 1;
        }
        let job = &list[at];
        let (chunk, row) = (i / row_blocks, i % row_blocks * block);
        if row >= rows {
            return;
        }
        let first = chunk * job.columns;
        let unit =
            Unit { input, job, rows: (row, rows.min(row + block)), columns: (first, job.out.min(first + job.columns)), few: rows <= FEW };
        // SAFETY: `Cpu` holds only instruction sets this machine has. Lengths were checked above, and no two
        // units share both a row and a column of one `y`.
        unsafe { dispatch(cpu.isa, unit) }
    };
    if work < WORTH_SHARING { (0..units).for_each(unit) } else { cpu.pool.run(units, &unit) }
}

/// Copies rows of `width` into `buffer` as `f` of each element, every row on a cache line: where, and how far apart.
fn copied<T: Copy>(cpu: &Cpu, x: &[f32], width: usize, buffer: &mut Vec<Aligned>, f: fn(f32) -> T) -> (*const T, usize) {
    let step = width.next_multiple_of(64 / size_of::<T>());
    let rows = x.len() / width;
    grow(buffer, rows * step * size_of::<T>() / size_of::<f32>());
    let to = Shares::new(buffer.as_mut_slice());
    let row = |i: usize| {
        for (j, &v) in x[i * width..(i + 1) * width].iter().enumerate() {
            // SAFETY: `grow` made room for `rows * step` elements, and each row is written by one thread.
            unsafe { to.get().cast::<T>().add(i * step + j).write(f(v)) }
        }
    };
    if x.len() < WORTH_SHARING {
        (0..rows).for_each(row)
    } else {
        cpu.pool.run(rows, &row)
    }
    (to.get().cast::<T>().cast_const(), step)
}

/// Output rows and columns one thread computes.
struct Unit<'a> {
    input: &'a Input,
    job: &'a Job,
    rows: (usize, usize),
    columns: (usize, usize),
    /// Which of the two kernels.
    few: bool,
}

/// How inputs and weights become products: the element types, and how many inputs a step takes.
pub(super) trait Dot<S: Lanes> {
    type X: Copy;
    type W: Copy;
    /// Element of a panel.
    type Panel: Dot<S, X = Self::X>;
    type A: Copy;
    type B: Copy;
    const STEP: usize;
    unsafe fn a(p: *const Self::X) -> Self::A;
    unsafe fn a_part(p: *const Self::X, n: usize) -> Self::A;
    unsafe fn b(p: *const Self::W) -> Self::B;
    unsafe fn b_part(p: *const Self::W, n: usize) -> Self::B;
    unsafe fn add(acc: S::V, a: Self::A, b: Self::B) -> S::V;
    /// Copies one weight row of `n` elements into a panel.
    unsafe fn pack(from: *const Self::W, to: *mut <Self::Panel as Dot<S>>::W, n: usize);
}

/// Products and sums in f32.
pub(super) struct Plain<W>(std::marker::PhantomData<W>);
/// Products of bf16 pairs, summed in f32.
struct Pairs;

impl<S: Lanes, W: Element> Dot<S> for Plain<W> {
    type X = f32;
    type W = W;
    type Panel = Plain<f32>;
    type A = S::V;
    type B = S::V;
    const STEP: usize = S::N;
    #[inline(always)]
    unsafe fn a(p: *const f32) -> S::V {
        // SAFETY: the caller's promises are those of the function called; so below.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn a_part(p: *const f32, n: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::load_part(p, n) }
    }
    #[inline(always)]
    unsafe fn b(p: *const W) -> S::V {
        // SAFETY: as above.
        unsafe { W::load::<S>(p) }
    }
    #[inline(always)]
    unsafe fn b_part(p: *const W, n: usize) -> S::V {
        // SAFETY: as above.
        unsafe { W::load_part::<S>(p, n) }
    }
    #[inline(always)]
    unsafe fn add(acc: S::V, a: S::V, b: S::V) -> S::V {
        // SAFETY: as above.
        unsafe { S::fma(a, b, acc) }
    }
    #[inline(always)]
    unsafe fn pack(from: *const W, to: *mut f32, n: usize) {
        // SAFETY: `n` elements at both ends.
        unsafe { widen::<S, W>(from, to, n) }
    }
}

impl<S: Lanes> Dot<S> for Pairs {
    type X = bf16;
    type W = bf16;
    type Panel = Pairs;
    type A = S::P;
    type B = S::P;
    const STEP: usize = 2 * S::N;
    #[inline(always)]
    unsafe fn a(p: *const bf16) -> S::P {
        // SAFETY: the caller's promises are those of the function called; so below.
        unsafe { S::pairs(p) }
    }
    #[inline(always)]
    unsafe fn a_part(p: *const bf16, n: usize) -> S::P {
        // SAFETY: as above.
        unsafe { S::pairs_part(p, n) }
    }
    #[inline(always)]
    unsafe fn b(p: *const bf16) -> S::P {
        // SAFETY: as above.
        unsafe { S::pairs(p) }
    }
    #[inline(always)]
    unsafe fn b_part(p: *const bf16, n: usize) -> S::P {
        // SAFETY: as above.
        unsafe { S::pairs_part(p, n) }
    }
    #[inline(always)]
    unsafe fn add(acc: S::V, a: S::P, b: S::P) -> S::V {
        // SAFETY: as above.
        unsafe { S::pair_dot(acc, a, b) }
    }
    #[inline(always)]
    unsafe fn pack(from: *const bf16, to: *mut bf16, n: usize) {
        // SAFETY: `n` elements at both ends, which are different buffers.
        unsafe { std::ptr::copy_nonoverlapping(from, to, n) }
    }
}

/// The dot products of `R` inputs with `4 * Q` weight rows over `n <= BLOCK` inputs, added to `totals`, of which
/// each group of four weight rows has [`TOTALS`]. The rows are valid for `n` elements, `totals` for `Q * TOTALS`.
pub(super) struct Dots<S: Lanes, D: Dot<S>, const R: usize, const Q: usize> {
    pub(super) x: [*const D::X; R],
    pub(super) w: [[*const D::W; 4]; Q],
    pub(super) n: usize,
    /// Distance in bytes to the weights that will be read next, to be fetched meanwhile; zero for nothing.
    pub(super) ahead: usize,
    pub(super) totals: *mut f32,
}

impl<T: Lanes, D: Dot<T>, const R: usize, const Q: usize> Kernel for Dots<T, D, R, Q> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on; `S` is `T`, as only `T::enter` runs this.
        unsafe { dots(self) }
    }
}

/// # Safety
/// As [`Kernel::run`] of [`Dots`].
#[inline(always)]
unsafe fn dots<S: Lanes, D: Dot<S>, const R: usize, const Q: usize>(Dots { x, w, n, ahead, totals }: Dots<S, D, R, Q>) {
    // SAFETY: `k + STEP <= n` in the loop, `n - k < STEP` elements after it.
    unsafe {
        let mut acc = [[[S::splat(0.0); 4]; R]; Q];
        let mut k = 0;
        while k + D::STEP <= n {
            for q in 0..Q {
                let mut b = [D::b(w[q][0].add(k)); 4];
                for c in 1..4 {
                    b[c] = D::b(w[q][c].add(k));
                }
                if ahead > 0 {
                    for c in 0..4 {
                        S::prefetch(w[q][c].add(k).cast::<u8>().wrapping_add(ahead));
                    }
                }
                for r in 0..R {
                    let a = D::a(x[r].add(k));
                    for c in 0..4 {
                        acc[q][r][c] = D::add(acc[q][r][c], a, b[c]);
                    }
                }
            }
            k += D::STEP;
        }
        if k < n {
            for q in 0..Q {
                for r in 0..R {
                    let a = D::a_part(x[r].add(k), n - k);
                    for c in 0..4 {
                        acc[q][r][c] = D::add(acc[q][r][c], a, D::b_part(w[q][c].add(k), n - k));
                    }
                }
            }
        }
        for q in 0..Q {
            S::reduce_add(&acc[q], totals.add(q * TOTALS));
        }
    }
}

/// The dot products of `R` inputs, no more than four, with `columns` weight rows that follow each other, no more than 8: totals as of
/// [`Dots`]. Inputs and weight rows have `n` elements. Block after block, and not some beside each other: the latency of one sum is less than
/// memory takes for what it sums, and a single run of addresses comes 5 to 15 % faster than four (bf16 of 2048 inputs, 2 cores of Zen 4).
struct Stream<S: Lanes, D: Dot<S>, const R: usize> {
    x: [*const D::X; R],
    w: *const D::W,
    columns: usize,
    n: usize,
    totals: *mut f32,
}

impl<T: Lanes, D: Dot<T>, const R: usize> Kernel for Stream<T, D, R> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Stream { x, w, columns, n, totals } = self;
        // SAFETY: blocks are within the row; `S` is `T`, as only `T::enter` runs this.
        unsafe {
            for c in 0..columns {
                let w = w.add(c * n);
                let mut total = [0.0f32; R];
                for k in (0..n).step_by(BLOCK) {
                    let (mut acc, end) = ([T::splat(0.0); R], n.min(k + BLOCK));
                    let mut j = k;
                    while j + D::STEP <= end {
                        let b = D::b(w.add(j));
                        T::prefetch(w.add(j).cast::<u8>().wrapping_add(STREAM_AHEAD));
                        for r in 0..R {
                            acc[r] = D::add(acc[r], D::a(x[r].add(j)), b);
                        }
                        j += D::STEP;
                    }
                    if j < end {
                        let b = D::b_part(w.add(j), end - j);
                        for r in 0..R {
                            acc[r] = D::add(acc[r], D::a_part(x[r].add(j), end - j), b);
                        }
                    }
                    for r in 0..R {
                        total[r] += T::sum(acc[r]);
                    }
                }
                for r in 0..R {
                    *totals.add(TOTALS * (c / 4) + 4 * (c % 4) + r) = total[r];
                }
            }
        }
    }
}

/// Copies `n` elements of a weight row into a panel.
struct Pack<S: Lanes, D: Dot<S>> {
    from: *const D::W,
    to: *mut <D::Panel as Dot<S>>::W,
    n: usize,
}

impl<T: Lanes, D: Dot<T>> Kernel for Pack<T, D> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on; `S` is `T`, as only `T::enter` runs this.
        unsafe { D::pack(self.from, self.to, self.n) }
    }
}

/// The dot products of `R` inputs with all of a panel, added to `totals`.
struct Sweep<S: Lanes, D: Dot<S>, const R: usize> {
    x: [*const D::X; R],
    n: usize,
    /// Room for `[R][BLOCK]` inputs: together and on cache lines they stay in the first-level cache.
    tile: *mut D::X,
    /// `[4 * groups][BLOCK]`.
    panel: *const D::W,
    groups: usize,
    totals: *mut f32,
    /// What to fetch meanwhile: the inputs of the next tile, and `lines` cache lines of the weights of the next
    /// panel in rows of `row_lines`, each `row_step` bytes after the one before.
    next_x: [*const D::X; R],
    next_w: *const u8,
    lines: usize,
    row_lines: usize,
    row_step: usize,
}

impl<T: Lanes, D: Dot<T>, const R: usize> Kernel for Sweep<T, D, R> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Sweep { x, n, tile, panel, groups, totals, next_x, next_w, lines, row_lines, row_step } = self;
        let x_lines = (n * size_of::<D::X>()).div_ceil(64);
        let (mut x_line, mut line) = (0, 0);
        // SAFETY: passed on; `S` is `T`, as only `T::enter` runs this. Fetching needs no valid address.
        unsafe {
            let mut rows = [tile.cast_const(); R];
            for r in 0..R {
                rows[r] = rows[r].add(r * BLOCK);
                std::ptr::copy_nonoverlapping(x[r], tile.add(r * BLOCK), n);
            }
            for group in 0..groups {
                while x_line * groups < (group + 1) * x_lines {
                    for next in next_x {
                        T::prefetch(next.cast::<u8>().wrapping_add(64 * x_line));
                    }
                    x_line += 1;
                }
                while line * groups < (group + 1) * lines {
                    T::prefetch(next_w.wrapping_add(line / row_lines * row_step + line % row_lines * 64));
                    line += 1;
                }
                let w = panel.add(group * 4 * BLOCK);
                let w = [[w, w.add(BLOCK), w.add(2 * BLOCK), w.add(3 * BLOCK)]];
                dots::<T, D, R, 1>(Dots { x: rows, w, n, ahead: 0, totals: totals.add(group * TOTALS) });
            }
        }
    }
}

impl Unit<'_> {
    /// # Safety
    /// As [`Kernel::run`]; `x` and `w` are those of this unit.
    unsafe fn with<S: Lanes, D: Dot<S>>(&self, x: (*const D::X, usize), w: *const D::W) {
        // SAFETY: passed on.
        unsafe {
            let rows = self.rows.1 - self.rows.0;
            // Narrow vectors would have too many sums to wait for.
            let streams = S::N >= 16 && rows * self.input.width * size_of::<D::X>() <= STREAM_BYTES;
            match rows {
                1 if streams => self.streamed::<S, D, 1>(x, w),
                2 if streams => self.streamed::<S, D, 2>(x, w),
                _ if self.few => self.few::<S, D>(x, w),
                _ => self.many::<S, D>(x, w),
            }
        }
    }

    /// Reads weight rows straight from memory, one after the other.
    unsafe fn streamed<S: Lanes, D: Dot<S>, const R: usize>(&self, (x, step): (*const D::X, usize), w: *const D::W) {
        // SAFETY: rows and columns are in range, and row `i` begins at `i * width` of weights, `i * step` of inputs.
        unsafe {
            let ((row, _), (mut column, last), n) = (self.rows, self.columns, self.input.width);
            let mut rows = [x.add(row * step); R];
            for r in 0..R {
                rows[r] = rows[r].add(r * step);
            }
            while column < last {
                let columns = (last - column).min(8);
                let mut totals = [0.0f32; 2 * TOTALS];
                S::enter(Stream::<S, D, R> { x: rows, w: w.add(column * n), columns, n, totals: totals.as_mut_ptr() });
                self.finish((row, R), (column, columns), totals.as_ptr());
                column += columns;
            }
        }
    }

    /// Reads groups of weight rows straight from memory.
    unsafe fn few<S: Lanes, D: Dot<S>>(&self, (x, step): (*const D::X, usize), w: *const D::W) {
        // SAFETY: rows and columns are in range, and row `i` begins at `i * width` of weights, `i * step` of inputs.
        unsafe {
            let (mut column, last) = self.columns;
            let row_bytes = self.input.width * size_of::<D::W>();
            while column < last {
                let (mut row, end) = self.rows;
                // One or two rows leave registers for eight columns at once.
                let wide = end - row <= 2.min(S::ROWS / 2) && last - column > 4;
                while row < end {
                    let rows = (end - row).min(S::ROWS);
                    let mut totals = [0.0f32; 2 * TOTALS];
                    let mut k = 0;
                    while k < self.input.width {
                        let n = BLOCK.min(self.input.width - k);
                        // Columns past the end are computed as the last one and dropped.
                        let at = |c: usize| w.add((column + c).min(last - 1) * self.input.width + k);
                        let row_at = |r: usize| x.add((row + r) * step + k);
                        if wide {
                            let w = [[at(0), at(1), at(2), at(3)], [at(4), at(5), at(6), at(7)]];
                            let ahead = 8 * row_bytes;
                            if rows == 1 {
                                S::enter(Dots::<S, D, 1, 2> { x: [row_at(0)], w, n, ahead, totals: totals.as_mut_ptr() });
                            } else {
                                S::enter(Dots::<S, D, 2, 2> { x: [row_at(0), row_at(1)], w, n, ahead, totals: totals.as_mut_ptr() });
                            }
                        } else {
                            let w = [[at(0), at(1), at(2), at(3)]];
                            let ahead = if row == self.rows.0 { 4 * row_bytes } else { 0 };
                            by_rows!(rows, S, |R| {
                                let mut x = [row_at(0); R];
                                for r in 0..R {
                                    x[r] = row_at(r);
                                }
                                S::enter(Dots::<S, D, R, 1> { x, w, n, ahead, totals: totals.as_mut_ptr() })
                            });
                        }
                        k += BLOCK;
                    }
                    let columns = (last - column).min(if wide { 8 } else { 4 });
                    self.finish((row, rows), (column, columns), totals.as_ptr());
                    row += rows;
                }
                column += if wide { 8 } else { 4 };
            }
        }
    }

    /// Widens weights into a panel that all rows meet.
    unsafe fn many<S: Lanes, D: Dot<S>>(&self, (x, step): (*const D::X, usize), w: *const D::W) {
        type Packed<S, D> = <<D as Dot<S>>::Panel as Dot<S>>::W;
        let (row0, end) = self.rows;
        let columns = self.columns.1 - self.columns.0;
        let groups = columns.div_ceil(4);
        let tiles = (end - row0).div_ceil(S::ROWS);
        let totals_len = tiles * groups * TOTALS;
        let mut buffer = scratch_take((PANEL + S::ROWS) * BLOCK + totals_len);
        let scratch = buffer.as_mut_ptr().cast::<f32>();
        {
            // SAFETY: the scratch holds a panel, a tile and the totals; rows and columns are in range.
            unsafe {
                let panel = scratch.cast::<Packed<S, D>>();
                let inputs = scratch.add(PANEL * BLOCK).cast::<D::X>();
                let totals = scratch.add((PANEL + S::ROWS) * BLOCK);
                totals.write_bytes(0, totals_len);
                let width = self.input.width;
                let mut k = 0;
                while k < width {
                    let n = BLOCK.min(width - k);
                    for c in 0..4 * groups {
                        // Columns past the end are computed as the last one and dropped.
                        let from = w.add((self.columns.0 + c.min(columns - 1)) * width + k);
                        S::enter(Pack::<S, D> { from, to: panel.add(c * BLOCK), n });
                    }
                    // The next panel's rows are fetched a few with every tile.
                    let row_lines = (BLOCK.min(width.saturating_sub(k + BLOCK)) * size_of::<D::W>()).div_ceil(64);
                    let each = columns.div_ceil(tiles);
                    for tile in 0..tiles {
                        let row = row0 + tile * S::ROWS;
                        let fetch = (tile * each).min(columns);
                        let next_w = w.wrapping_add((self.columns.0 + fetch) * width + k + BLOCK).cast::<u8>();
                        by_rows!((end - row).min(S::ROWS), S, |R| {
                            let (mut rows, mut next_x) = ([x.add(row * step + k); R], [x; R]);
                            for r in 0..R {
                                rows[r] = rows[r].add(r * step);
                                next_x[r] = rows[r].wrapping_add(S::ROWS * step);
                            }
                            S::enter(Sweep::<S, D::Panel, R> {
                                x: rows,
                                n,
                                tile: inputs,
                                panel,
                                groups,
                                totals: totals.add(tile * groups * TOTALS),
                                next_x,
                                next_w,
                                lines: each.min(columns - fetch) * row_lines,
                                row_lines: row_lines.max(1),
                                row_step: width * size_of::<D::W>(),
                            });
                        });
                    }
                    k += BLOCK;
                }
                for tile in 0..tiles {
                    let row = row0 + tile * S::ROWS;
                    for group in 0..groups {
                        let totals = totals.add((tile * groups + group) * TOTALS);
                        let column = (self.columns.0 + 4 * group, (columns - 4 * group).min(4));
                        self.finish((row, (end - row).min(S::ROWS)), column, totals);
                    }
                }
            }
        }
        scratch_back(buffer);
    }

    /// Adds bias and residual to the totals of `rows: (first, n)` and `columns: (first, n)`, and writes them.
    unsafe fn finish(&self, rows: (usize, usize), columns: (usize, usize), totals: *const f32) {
        // SAFETY: rows and columns are this unit's, and nobody else writes them.
        unsafe {
            for r in 0..rows.1 {
                let y = self.job.y.get().add((rows.0 + r) * self.job.out + columns.0);
                for c in 0..columns.1 {
                    let mut v = *totals.add(TOTALS * (c / 4) + 16 * (r / 4) + 4 * (c % 4) + r % 4);
                    if !self.job.bias.is_null() {
                        v += *self.job.bias.add(columns.0 + c);
                    }
                    if self.job.accumulate {
                        v += *y.add(c);
                    }
                    *y.add(c) = v;
                }
            }
        }
    }
}

impl Kernel for Unit<'_> {
    unsafe fn run<S: Lanes>(self) {
        let x = (self.input.x, self.input.x_step);
        // SAFETY: passed on; bf16 inputs are there whenever the instruction set has pairs and a job needs them.
        unsafe {
            match self.job.w {
                Weights::F32(w) => self.with::<S, Plain<f32>>(x, w),
                Weights::Bf16(w) if S::PAIRS => self.with::<S, Pairs>((self.input.rounded, self.input.rounded_step), w),
                Weights::Bf16(w) => self.with::<S, Plain<bf16>>(x, w),
            }
        }
    }
}
