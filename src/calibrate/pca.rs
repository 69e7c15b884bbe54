//! Principal components of a stream of rows, in f64.

use std::ops::Range;

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Accum, Mat, MatRef, Scale, Side, get_global_parallelism};

/// Rows that one update of the second moment takes at once.
const CHUNK: usize = 512;

/// Rows `[n][channels]` seen so far. The rows themselves are kept while they take less memory than their second moment would
/// (`n` up to `channels`), which also lets a short stream be solved on the `n` by `n` side; then they are folded into it.
pub(super) struct Stream {
    channels: usize,
    /// Rows that are not folded yet.
    pending: Vec<f32>,
    folded: Option<Folded>,
}

/// Moments about `origin`: the mean of the first rows, which keeps a large common offset out of the sums.
struct Folded {
    rows: usize,
    origin: Vec<f64>,
    /// `sum(x - origin)`.
    sum: Vec<f64>,
    /// `sum((x - origin)(x - origin)^T)`, lower half.
    second: Mat<f64>,
}

/// What an error is worth: `L` of the metric `e^T L L^T e`, block by block along the diagonal.
pub(super) type Metric = [Mat<f64>];

/// The leading principal components of a range of channels.
pub(super) struct Principal {
    /// `[rank][channels of the range]`, in falling order of energy. The element of largest magnitude of each row is
    /// positive. Orthonormal without a metric.
    pub(super) directions: Vec<f32>,
    /// What turns them back under a metric, in the same shape.
    pub(super) up: Option<Vec<f32>>,
    /// Variance along each direction.
    pub(super) energies: Vec<f64>,
    /// Variance over all directions.
    pub(super) total: f64,
}

impl Stream {
    pub(super) fn new(channels: usize) -> Self {
        Stream { channels, pending: Vec::new(), folded: None }
    }

    /// Rows seen.
    pub(super) fn rows(&self) -> usize {
        self.folded.as_ref().map_or(0, |f| f.rows) + self.pending.len() / self.channels
    }

    /// Takes in rows of finite numbers.
    pub(super) fn push(&mut self, mut rows: &[f32]) {
        while !rows.is_empty() {
            let keep = if self.folded.is_none() { self.channels.max(CHUNK) } else { CHUNK };
            let capacity = keep * self.channels;
            if self.pending.len() == capacity {
                self.fold();
                continue;
            }
            let (now, later) = rows.split_at(rows.len().min(capacity - self.pending.len()));
            self.pending.extend_from_slice(now);
            rows = later;
        }
    }

    fn fold(&mut self) {
        let c = self.channels;
        let origin = self.mean();
        let folded = self.folded.get_or_insert_with(|| Folded { rows: 0, origin, sum: vec![0.0; c], second: Mat::zeros(c, c) });
        for row in self.pending.chunks_exact(c) {
            row.iter().zip(&folded.origin).zip(&mut folded.sum).for_each(|((&x, o), s)| *s += f64::from(x) - o);
        }
        accumulate(&mut folded.second, &self.pending, c, 0..c, &folded.origin);
        folded.rows += self.pending.len() / c;
        // Given back, not cleared: the first fold frees what the second moment replaces.
        self.pending = Vec::new();
    }

    /// `[channels]`; zero where no row was seen.
    pub(super) fn mean(&self) -> Vec<f64> {
        let c = self.channels;
        let mut mean =
            self.folded.as_ref().map_or(vec![0.0; c], |f| f.origin.iter().zip(&f.sum).map(|(o, s)| o * f.rows as f64 + s).collect());
        for row in self.pending.chunks_exact(c) {
            row.iter().zip(&mut mean).for_each(|(&x, m)| *m += f64::from(x));
        }
        let n = self.rows().max(1) as f64;
        mean.iter_mut().for_each(|m| *m /= n);
        mean
    }

    /// The `rank` leading components of `channels`; `rank` is below the number of rows and at most that of channels.
    /// Under a metric they lose the least of it: those of `L^T x`. `None` where the eigenvalue iteration does not converge.
    pub(super) fn principal(&self, channels: Range<usize>, rank: usize, metric: Option<&Metric>) -> Option<Principal> {
        let mean = self.mean();
        let n = self.rows();
        match &self.folded {
            None if n < channels.len() && metric.is_none() => {
                let x = centred(&self.pending, self.channels, channels, &mean);
                from_rows(x.as_ref(), rank)
            }
            None => {
                let mut c = Mat::zeros(channels.len(), channels.len());
                accumulate(&mut c, &self.pending, self.channels, channels, &mean);
                from_covariance(c, n, rank, metric)
            }
            Some(f) => {
                let mut c = f.second.submatrix(channels.start, channels.start, channels.len(), channels.len()).to_owned();
                accumulate(&mut c, &self.pending, self.channels, channels.clone(), &f.origin);
                // sum (x-m)(x-m)^T = sum (x-o)(x-o)^T - n (m-o)(m-o)^T
                let shift: Vec<f64> = channels.map(|i| mean[i] - f.origin[i]).collect();
                for j in 0..shift.len() {
                    for i in j..shift.len() {
                        c[(i, j)] -= n as f64 * shift[i] * shift[j];
                    }
                }
                from_covariance(c, n, rank, metric)
            }
        }
    }

    /// `E[x x^T]` of some channels, not centred.
    pub(super) fn second(&self, channels: &[usize]) -> Mat<f64> {
        let (n, stride) = (self.rows().max(1) as f64, self.channels);
        let mut sum = Mat::from_fn(channels.len(), channels.len(), |i, j| match &self.folded {
            None => 0.0,
            Some(f) => {
                let (a, b) = (channels[i], channels[j]);
                let second = f.second[(a.max(b), a.min(b))];
                second + f.origin[a] * f.sum[b] + f.sum[a] * f.origin[b] + f.rows as f64 * f.origin[a] * f.origin[b]
            }
        });
        for row in self.pending.chunks_exact(stride) {
            for (j, &b) in channels.iter().enumerate() {
                for (i, &a) in channels.iter().enumerate() {
                    sum[(i, j)] += f64::from(row[a]) * f64::from(row[b]);
                }
            }
        }
        sum / Scale(n)
    }
}

/// The `rank` leading eigenvectors of a symmetric matrix's block at `channels`, and what `stream` has of energy (about zero) along
/// them and in all. `None` where the eigenvalue iteration does not converge.
pub(super) fn leading(of: &Mat<f64>, channels: Range<usize>, rank: usize, stream: &Stream) -> Option<Principal> {
    let (first, size) = (channels.start, channels.len());
    let eigen = of.submatrix(first, first, size, size).self_adjoint_eigen(Side::Lower).ok()?;
    let vectors = Mat::from_fn(size, rank, |c, i| eigen.U()[(c, size - 1 - i)]);
    let second = stream.second(&channels.collect::<Vec<_>>());
    let energies = vectors.col_iter().map(|v| (v.transpose() * &second * v).max(0.0)).collect();
    let total = (0..size).map(|i| second[(i, i)]).sum();
    Some(Principal { directions: directions(vectors.as_ref()), up: None, energies, total })
}

/// `[channels of the range][rows]`, less `origin`: a column per row of the stream.
fn centred(rows: &[f32], stride: usize, channels: Range<usize>, origin: &[f64]) -> Mat<f64> {
    let first = channels.start;
    Mat::from_fn(channels.len(), rows.len() / stride, |c, row| f64::from(rows[row * stride + first + c]) - origin[first + c])
}

/// Adds `sum((x - origin)(x - origin)^T)` of a range of channels to the lower half of `second`.
fn accumulate(second: &mut Mat<f64>, rows: &[f32], stride: usize, channels: Range<usize>, origin: &[f64]) {
    for chunk in rows.chunks(CHUNK * stride) {
        let x = centred(chunk, stride, channels.clone(), origin);
        add_square(second, Accum::Add, x.as_ref());
    }
}

/// The lower half of `x x^T`, which costs half of the whole.
fn add_square(to: &mut Mat<f64>, accumulation: Accum, x: MatRef<'_, f64>) {
    use BlockStructure::{Rectangular, TriangularLower};
    let parallel = get_global_parallelism();
    triangular::matmul(to, TriangularLower, accumulation, x, Rectangular, x.transpose(), Rectangular, 1.0, parallel);
}

/// From `n` times the covariance (lower half).
fn from_covariance(mut c: Mat<f64>, n: usize, rank: usize, metric: Option<&Metric>) -> Option<Principal> {
    let size = c.nrows();
    let n = n.max(1) as f64;
    for j in 0..size {
        for i in j..size {
            c[(i, j)] /= n;
            c[(j, i)] = c[(i, j)];
        }
    }
    if let Some(blocks) = metric {
        c = by_blocks(blocks, c.as_ref(), |l| l.transpose());
        c = by_blocks(blocks, c.transpose(), |l| l.transpose());
    }
    let total = (0..size).map(|i| c[(i, i)]).sum();
    let eigen = c.self_adjoint_eigen(Side::Lower).ok()?;
    let leading = |i: usize| size - 1 - i; // they come in rising order
    let energies = (0..rank).map(|i| eigen.S()[leading(i)].max(0.0)).collect();
    let vectors = Mat::from_fn(size, rank, |c, i| eigen.U()[(c, leading(i))]);
    let Some(blocks) = metric else {
        return Some(Principal { directions: directions(vectors.as_ref()), up: None, energies, total });
    };
    // The latent of x is u^T L^T x, and stands for L^-T u.
    let down = by_blocks(blocks, vectors.as_ref(), |l| l);
    let mut up = vectors;
    let mut first = 0;
    for l in blocks {
        let rows = up.subrows_mut(first, l.nrows());
        solve_upper_triangular_in_place(l.transpose(), rows, get_global_parallelism());
        first += l.nrows();
    }
    let rows = |m: &Mat<f64>| m.col_iter().flat_map(|c| c.iter().map(|&x| x as f32).collect::<Vec<_>>()).collect();
    Some(Principal { directions: rows(&down), up: Some(rows(&up)), energies, total })
}

/// `diag(f(block)...) x`.
fn by_blocks(blocks: &Metric, x: MatRef<'_, f64>, f: impl Fn(MatRef<'_, f64>) -> MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(x.nrows(), x.ncols());
    let mut first = 0;
    for l in blocks {
        let n = l.nrows();
        let product = f(l.as_ref()) * x.subrows(first, n);
        out.subrows_mut(first, n).copy_from(product);
        first += n;
    }
    out
}

/// From centred rows, fewer than channels: an eigenvector `u` of `x^T x` gives the direction `x u`.
fn from_rows(x: MatRef<'_, f64>, rank: usize) -> Option<Principal> {
    let n = x.ncols();
    let mut gram = Mat::zeros(n, n);
    add_square(&mut gram, Accum::Replace, x.transpose());
    let total = (0..n).map(|i| gram[(i, i)]).sum::<f64>() / n as f64;
    let eigen = gram.self_adjoint_eigen(Side::Lower).ok()?;
    let squares: Vec<f64> = (0..rank).map(|i| eigen.S()[n - 1 - i].max(0.0)).collect();
    let u = Mat::from_fn(n, rank, |row, i| eigen.U()[(row, n - 1 - i)]);
    let mut v = x * &u;
    for column in v.col_iter_mut() {
        let norm = column.norm_l2();
        if norm > 0.0 {
            column.iter_mut().for_each(|x| *x /= norm);
        }
    }
    // A direction of almost no energy is noise of the others by now: then an orthonormal completion serves as well as any.
    // Those before it are orthonormal already and stay themselves, up to sign.
    if squares[rank - 1] <= 1e-10 * squares[0] {
        v = v.qr().compute_thin_Q();
    }
    let energies = squares.iter().map(|s| s / n as f64).collect();
    Some(Principal { directions: directions(v.as_ref()), up: None, energies, total })
}

/// Columns to rows, each with a definite sign, so that calibrating twice gives the same file.
fn directions(columns: MatRef<'_, f64>) -> Vec<f32> {
    let mut out = Vec::with_capacity(columns.nrows() * columns.ncols());
    for column in columns.col_iter() {
        let largest = column.iter().fold(0.0_f64, |a, &x| if x.abs() > a.abs() { x } else { a });
        let sign = if largest < 0.0 { -1.0 } else { 1.0 };
        out.extend(column.iter().map(|&x| (sign * x) as f32));
    }
    out
}
