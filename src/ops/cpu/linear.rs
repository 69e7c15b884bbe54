//! Matrix products against weights that stay where the checkpoint's mapping has them.
//!
//! Every output is a dot product in one order, whatever kernel computes it: the inputs in blocks of [`BLOCK`];
//! within a block one vector accumulator, lanes along the inputs, then the tree of [`Lanes::reduce_add`]; blocks
//! are added to a running total in turn; bias and residual last. So a row gives the same bits alone, in a batch,
//! and in a prompt, and the kernels differ only in how many outputs they have under way:
//!
//! - one row, or up to four short ones, on wide vectors: weights are read from memory front to back, as memory gives them fastest;
//! - few rows: a block of some weight rows is read once from memory, widened in registers, and meets all rows before the next;
//! - many rows: a panel of weight rows is widened once into a buffer the second-level cache holds, a tile of
//!   input rows stays in the first level while the panel streams past it.

use half::bf16;

use super::Cpu;
use super::pool::{Aligned, Shares, grow, scratch_back, scratch_take};
use super::simd::{Element, Kernel, Lanes, dispatch, run};
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
const FEW: usize = 32;
/// Groups of four weight rows that a tile of few input rows meets one after the other, while its own block stays in the first-level cache.
const GROUPS: usize = 4;
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
    x: Rows<f32>,
    /// The same in bf16, where a job needs it; null otherwise.
    rounded: Rows<bf16>,
}

/// Rows of inputs in blocks of [`BLOCK`]: block `b` of row `r` begins `r * row + b * block` elements after the first.
#[derive(Clone, Copy)]
struct Rows<T> {
    first: *const T,
    row: usize,
    block: usize,
}

impl<T: Copy> Rows<T> {
    /// Rows that lie as they are, `row` apart.
    fn plain(first: *const T, row: usize) -> Self {
        Rows { first, row, block: BLOCK }
    }

    /// Where the block of row `r` is that begins with element `k`.
    ///
    /// # Safety
    /// There is one.
    unsafe fn at(self, r: usize, k: usize) -> *const T {
        // SAFETY: within the rows.
        unsafe { self.first.add(r * self.row + k / BLOCK * self.block) }
    }
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
    let (mut pairs, mut plain) = (false, false);
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
        let paired = bytes == 2 && cpu.isa.rounds_activations();
        pairs |= paired;
        plain |= !paired;
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
    let mut input = Input { width: inputs, x: Rows::plain(x.as_ptr(), inputs), rounded: Rows::plain(std::ptr::null(), 0) };
    // Rows a power of two long would meet in the same few places of the first-level cache, and loads that cross cache lines cost a
    // third of the speed. Beside the weights the copy is nothing; with one or two rows there is nothing to gain, and many are copied
    // tile by tile.
    let blocked = (3..=FEW).contains(&rows);
    if blocked && plain {
        input.x = copied(cpu, x, inputs, blocked, lined);
    }
    if pairs {
        input.rounded = copied(cpu, x, inputs, blocked, halves);
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

/// Copies rows of `width` into `buffer`, in `T`: every row from a cache line on, or `blocked`, block by block.
fn copied<T: Rounded>(cpu: &Cpu, x: &[f32], width: usize, blocked: bool, buffer: &mut Vec<Aligned>) -> Rows<T> {
    let rows = x.len() / width;
    let line = 64 / size_of::<T>();
    let (row, block, len) = if blocked {
        (BLOCK, rows * BLOCK, rows * width.next_multiple_of(BLOCK))
    } else {
        (width.next_multiple_of(line), BLOCK, rows * width.next_multiple_of(line))
    };
    grow(buffer, len * size_of::<T>() / size_of::<f32>());
    let to = Shares::new(buffer.as_mut_slice());
    let one = |i: usize| {
        for (b, part) in x[i * width..(i + 1) * width].chunks(BLOCK).enumerate() {
            // SAFETY: `Cpu` holds only instruction sets this machine has. `grow` made room for `len` elements, and each row is
            // written by one thread.
            unsafe {
                let to = to.get().cast::<T>().add(i * row + b * block);
                run(cpu.isa, Round { from: part.as_ptr(), to, n: part.len() });
            }
        }
    };
    if x.len() < WORTH_SHARING {
        (0..rows).for_each(one)
    } else {
        cpu.pool.run(rows, &one)
    }
    Rows { first: to.get().cast::<T>().cast_const(), row, block }
}

/// What inputs are copied as.
trait Rounded: Copy {
    fn of(x: f32) -> Self;
}

impl Rounded for f32 {
    #[inline(always)]
    fn of(x: f32) -> f32 {
        x
    }
}

impl Rounded for bf16 {
    /// As [`bf16::from_f32`], ties to even, without a branch, so that a loop of it becomes vectors.
    #[inline(always)]
    fn of(x: f32) -> bf16 {
        let bits = x.to_bits();
        let nan = bits & 0x7fff_ffff > 0x7f80_0000;
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        bf16::from_bits(if nan { bits >> 16 | 0x40 } else { rounded } as u16)
    }
}

/// Copies `n` inputs.
struct Round<T> {
    from: *const f32,
    to: *mut T,
    n: usize,
}

impl<T: Rounded> Kernel for Round<T> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        for i in 0..self.n {
            // SAFETY: `n` elements at both ends, which are different buffers.
            unsafe { self.to.add(i).write(T::of(*self.from.add(i))) }
        }
    }
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
    /// Distance in bytes to the weights that will be read next, to be fetched meanwhile.
    pub(super) ahead: isize,
    pub(super) totals: *mut f32,
}

impl<T: Lanes, D: Dot<T>, const R: usize, const Q: usize> Kernel for Dots<T, D, R, Q> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: passed on; `S` is `T`, as only `T::enter` runs this.
        unsafe { dots::<T, D, R, Q, 4>(self, 0) }
    }
}

/// [`Dots`], which fetches what is ahead of `F` weight rows of each four, from row `from` on.
///
/// # Safety
/// As [`Kernel::run`] of [`Dots`].
#[inline(always)]
unsafe fn dots<S: Lanes, D: Dot<S>, const R: usize, const Q: usize, const F: usize>(
    Dots { x, w, n, ahead, totals }: Dots<S, D, R, Q>,
    from: usize,
) {
    let mut next = [[std::ptr::null::<u8>(); F]; Q];
    for q in 0..Q {
        for f in 0..F {
            next[q][f] = w[q][from + f].cast::<u8>().wrapping_offset(ahead);
        }
    }
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
                for f in 0..F {
                    S::prefetch(next[q][f].wrapping_add(k * size_of::<D::W>()));
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
    x: Rows<D::X>,
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
                    let (mut acc, w, n) = ([T::splat(0.0); R], w.add(k), BLOCK.min(n - k));
                    let mut rows = [x.first; R];
                    for r in 0..R {
                        rows[r] = x.at(r, k);
                    }
                    let mut j = 0;
                    while j + D::STEP <= n {
                        let b = D::b(w.add(j));
                        T::prefetch(w.add(j).cast::<u8>().wrapping_add(STREAM_AHEAD));
                        for r in 0..R {
                            acc[r] = D::add(acc[r], D::a(rows[r].add(j)), b);
                        }
                        j += D::STEP;
                    }
                    if j < n {
                        let b = D::b_part(w.add(j), n - j);
                        for r in 0..R {
                            acc[r] = D::add(acc[r], D::a_part(rows[r].add(j), n - j), b);
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

/// The dot products of `R` inputs with some weight rows over `n <= BLOCK` inputs, added to totals as of [`Dots`].
struct Tile<S: Lanes, D: Dot<S>, const R: usize, const F: usize> {
    /// Rows each `x_step` after the one before.
    x: *const D::X,
    x_step: usize,
    /// Rows each `w_step` after the one before, no more than `4 * GROUPS`.
    w: *const D::W,
    w_step: usize,
    columns: usize,
    n: usize,
    /// Distance in bytes to the weights that will be read next. Of each four rows `F` from row `from` on are fetched meanwhile.
    ahead: isize,
    from: usize,
    totals: *mut f32,
}

impl<T: Lanes, D: Dot<T>, const R: usize, const F: usize> Kernel for Tile<T, D, R, F> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Tile { x: first, x_step, w, w_step, columns, n, ahead, from, totals } = self;
        // SAFETY: passed on; `S` is `T`, as only `T::enter` runs this. Columns past the end are computed as the last one and dropped.
        unsafe {
            let mut x = [first; R];
            for r in 0..R {
                x[r] = x[r].add(r * x_step);
            }
            let mut c = 0;
            // One or two rows leave registers for eight columns at once, and have too few sums under way without.
            while R <= 2 && 2 * R <= T::ROWS && columns - c > 4 {
                let mut eight = [[w; 4]; 2];
                for i in 0..8 {
                    eight[i / 4][i % 4] = w.add((c + i).min(columns - 1) * w_step);
                }
                dots::<T, D, R, 2, F>(Dots { x, w: eight, n, ahead, totals: totals.add(c / 4 * TOTALS) }, from);
                c += 8;
                if c >= columns {
                    return;
                }
            }
            while c < columns {
                let mut four = [w; 4];
                for i in 0..4 {
                    four[i] = w.add((c + i).min(columns - 1) * w_step);
                }
                dots::<T, D, R, 1, F>(Dots { x, w: [four], n, ahead, totals: totals.add(c / 4 * TOTALS) }, from);
                c += 4;
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
                dots::<T, D, R, 1, 0>(Dots { x: rows, w, n, ahead: 0, totals: totals.add(group * TOTALS) }, 0);
            }
        }
    }
}

impl Unit<'_> {
    /// # Safety
    /// As [`Kernel::run`]; `x` and `w` are those of this unit.
    unsafe fn with<S: Lanes, D: Dot<S>>(&self, x: Rows<D::X>, w: *const D::W) {
        // SAFETY: passed on.
        unsafe {
            let rows = self.rows.1 - self.rows.0;
            // Narrow vectors would have too many sums to wait for.
            let streams = S::N >= 16 && rows * self.input.width * size_of::<D::X>() <= STREAM_BYTES;
            match rows {
                1 if streams => self.streamed::<S, D, 1>(x, w),
                2 if streams => self.streamed::<S, D, 2>(x, w),
                3 if streams => self.streamed::<S, D, 3>(x, w),
                4 if streams => self.streamed::<S, D, 4>(x, w),
                _ if self.few => self.few::<S, D>(x, w),
                _ => self.many::<S, D>(x, w),
            }
        }
    }

    /// Reads weight rows straight from memory, one after the other.
    unsafe fn streamed<S: Lanes, D: Dot<S>, const R: usize>(&self, x: Rows<D::X>, w: *const D::W) {
        // SAFETY: rows and columns are in range, and row `i` of weights begins at `i * width`.
        unsafe {
            let ((row, _), (mut column, last), n) = (self.rows, self.columns, self.input.width);
            let x = Rows { first: x.at(row, 0), ..x };
            while column < last {
                let columns = (last - column).min(8);
                let mut totals = [0.0f32; 2 * TOTALS];
                S::enter(Stream::<S, D, R> { x, w: w.add(column * n), columns, n, totals: totals.as_mut_ptr() });
                self.finish((row, R), (column, columns), totals.as_ptr());
                column += columns;
            }
        }
    }

    /// Reads weight rows straight from memory, a block of some of them at a time, which meets all rows.
    unsafe fn few<S: Lanes, D: Dot<S>>(&self, x: Rows<D::X>, w: *const D::W) {
        let ((row0, end), (first, last), width) = (self.rows, self.columns, self.input.width);
        let tiles = (end - row0).div_ceil(S::ROWS);
        // Tiles as even as can be: small ones are slow.
        let row = |tile: usize| row0 + (end - row0) * tile / tiles;
        let mut buffer = scratch_take(tiles * GROUPS * TOTALS);
        let totals = buffer.as_mut_ptr().cast::<f32>();
        let mut column = first;
        while column < last {
            let columns = (last - column).min(4 * GROUPS);
            // SAFETY: rows and columns are in range, row `i` of weights begins at `i * width`, and the scratch holds the totals.
            unsafe {
                totals.write_bytes(0, tiles * GROUPS * TOTALS);
                for k in (0..width).step_by(BLOCK) {
                    let elements = if k + BLOCK < width { BLOCK } else { 4 * GROUPS * width - k };
                    let ahead = (elements * size_of::<D::W>()) as isize;
                    for tile in 0..tiles {
                        // Tiles share what is to be fetched.
                        let (from, to) = (4 * tile / tiles, 4 * (tile + 1) / tiles);
                        macro_rules! enter {
                            ($f:literal) => {
                                by_rows!(row(tile + 1) - row(tile), S, |R| {
                                    S::enter(Tile::<S, D, R, $f> {
                                        x: x.at(row(tile), k),
                                        x_step: x.row,
                                        w: w.add(column * width + k),
                                        w_step: width,
                                        columns,
                                        n: BLOCK.min(width - k),
                                        ahead,
                                        from,
                                        totals: totals.add(tile * GROUPS * TOTALS),
                                    })
                                })
                            };
                        }
                        match to - from {
                            0 => enter!(0),
                            1 => enter!(1),
                            2 => enter!(2),
                            _ => enter!(4),
                        }
                    }
                }
                for tile in 0..tiles {
                    self.finish((row(tile), row(tile + 1) - row(tile)), (column, columns), totals.add(tile * GROUPS * TOTALS));
                }
            }
            column += columns;
        }
        scratch_back(buffer);
    }

    /// Widens weights into a panel that all rows meet.
    unsafe fn many<S: Lanes, D: Dot<S>>(&self, x: Rows<D::X>, w: *const D::W) {
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
                            let (mut rows, mut next_x) = ([x.first; R], [x.first; R]);
                            for r in 0..R {
                                rows[r] = x.at(row + r, k);
                                next_x[r] = rows[r].wrapping_add(S::ROWS * x.row);
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
            for (group, quad) in (0..columns.1).step_by(4).flat_map(|c| (0..rows.1).step_by(4).map(move |r| (c, r))) {
                let tile = totals.add(TOTALS * (group / 4) + 4 * quad).cast::<[[f32; 4]; 4]>().read();
                let mut turned = [[0.0f32; 4]; 4];
                for c in 0..4 {
                    for r in 0..4 {
                        turned[r][c] = tile[c][r];
                    }
                }
                for (r, mut sums) in turned.into_iter().enumerate().take(rows.1 - quad) {
                    let column = columns.0 + group;
                    let y = self.job.y.get().add((rows.0 + quad + r) * self.job.out + column);
                    let n = (columns.1 - group).min(4);
                    if n == 4 {
                        // As below, of all four at once.
                        let of = |p: *const f32| p.cast::<[f32; 4]>().read();
                        let add = |a: [f32; 4], b: [f32; 4]| [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]];
                        if !self.job.bias.is_null() {
                            sums = add(sums, of(self.job.bias.add(column)));
                        }
                        if self.job.accumulate {
                            sums = add(sums, of(y));
                        }
                        y.cast::<[f32; 4]>().write(sums);
                        continue;
                    }
                    for (c, mut sum) in sums.into_iter().enumerate().take(n) {
                        if !self.job.bias.is_null() {
                            sum += *self.job.bias.add(column + c);
                        }
                        if self.job.accumulate {
                            sum += *y.add(c);
                        }
                        *y.add(c) = sum;
                    }
                }
            }
        }
    }
}

impl Kernel for Unit<'_> {
    unsafe fn run<S: Lanes>(self) {
        let x = self.input.x;
        // SAFETY: passed on; bf16 inputs are there whenever the instruction set has pairs and a job needs them.
        unsafe {
            match self.job.w {
                Weights::F32(w) => self.with::<S, Plain<f32>>(x, w),
                Weights::Bf16(w) if S::PAIRS => self.with::<S, Pairs>(self.input.rounded, w),
                Weights::Bf16(w) => self.with::<S, Plain<bf16>>(x, w),
            }
        }
    }
}
