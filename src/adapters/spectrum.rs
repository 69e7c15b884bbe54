//! Singular values and vectors of weight matrices and of low-rank products.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Accum, ColMut, Mat, MatRef, Par, Scale, get_global_parallelism};
use rayon::prelude::*;

/// A matrix of finite numbers, row by row; borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    pub rows: usize,
    pub cols: usize,
    /// `[rows][cols]`.
    pub data: &'a [f32],
}

/// Singular triplets in falling order of `s`: `sum over j of s[j] u[.][j] v[.][j]` is the matrix or its best part of this rank.
/// The entry of largest magnitude of each left vector is positive, so that the same matrix gives the same vectors.
#[derive(Clone, Debug)]
pub struct Triplets {
    pub rows: usize,
    pub cols: usize,
    /// Left singular vectors `[rows][s.len()]`, orthonormal columns.
    pub u: Vec<f64>,
    pub s: Vec<f64>,
    /// Right singular vectors `[cols][s.len()]`, orthonormal columns.
    pub v: Vec<f64>,
}

/// All left singular vectors of a matrix that are not numerically null, rounded to be kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Left {
    pub rows: usize,
    /// `[rows][s.len()]`.
    pub u: Vec<f32>,
    /// In falling order.
    pub s: Vec<f32>,
}

/// Why there is no decomposition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{got} numbers are no {rows} by {cols} matrix")]
    Shape { got: usize, rows: usize, cols: usize },
    #[error("the number at row {row}, column {column} is not finite")]
    NotFinite { row: usize, column: usize },
    #[error("the singular value iteration did not converge")]
    NoConvergence,
    #[error("these bytes are no stored singular vectors: {0}")]
    Format(&'static str),
}

/// Sides up to this are decomposed as they are.
const SMALL: usize = 256;
/// Columns of a Krylov block, at most. Narrow blocks reach a higher degree within the same basis: a Gaussian 2048 by 2048 takes
/// a basis of 528 at 12 columns and 768 at 24 for its 16 leading triplets.
const BLOCK: usize = 16;
/// A Krylov basis grows up to this part of the side. Beyond, the decomposition of the Gram matrix is about as quick.
const BASIS_SHARE: usize = 4;
/// Bound on the product's relative error at which a Krylov basis is wide enough. The bound is about 100 times the error.
const TOLERANCE: f64 = 1e-7;
/// Left vectors of singular values below this share of the largest are noise: 32-bit numbers do not determine them.
const NULL: f64 = 1e-6;
/// Decompositions of sides up to this run on one thread, so that their last bits do not depend on how many there are.
const SEQUENTIAL: usize = 512;
const MAGIC: [u8; 8] = *b"LEFTVEC\x01";

impl Dense<'_> {
    /// Whether the shape fits the data and all numbers are finite.
    ///
    /// # Errors
    /// `Shape`, or `NotFinite` with the first place.
    pub fn check(&self) -> Result<(), Error> {
        if self.rows.checked_mul(self.cols) != Some(self.data.len()) {
            return Err(Error::Shape { got: self.data.len(), rows: self.rows, cols: self.cols });
        }
        match self.data.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(i) => Err(Error::NotFinite { row: i / self.cols, column: i % self.cols }),
        }
    }

    fn small(&self) -> usize {
        self.rows.min(self.cols)
    }

    fn large(&self) -> usize {
        self.rows.max(self.cols)
    }

    /// Visits `A^T` in slabs `[some][small]`, where `A` is the matrix or its transpose, `[small][large]`; each with its first row.
    /// Only a slab at a time is held in f64.
    fn slabs(&self, mut visit: impl FnMut(usize, MatRef<'_, f64>)) {
        let (small, large) = (self.small(), self.large());
        let step = ((1 << 19) / small.max(1)).max(64);
        let mut buffer = vec![0.0f64; step.min(large) * small];
        for first in (0..large).step_by(step) {
            let n = step.min(large - first);
            let slab = &mut buffer[..n * small];
            let copy = |to: &mut [f64], from: &[f32]| to.iter_mut().zip(from).for_each(|(t, &f)| *t = f64::from(f));
            if self.rows <= self.cols {
                slab.par_chunks_mut(n).zip(self.data.par_chunks(self.cols)).for_each(|(to, row)| copy(to, &row[first..]));
                visit(first, MatRef::from_column_major_slice(slab, n, small));
            } else {
                slab.par_chunks_mut(small).zip(self.data[first * small..].par_chunks(small)).for_each(|(to, row)| copy(to, row));
                visit(first, MatRef::from_row_major_slice(slab, n, small));
            }
        }
    }

    /// `A A^T x`.
    fn gram_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(x.nrows(), x.ncols());
        self.slabs(|_, t| {
            let y = t * x;
            matmul(&mut out, Accum::Add, t.transpose(), &y, 1.0, get_global_parallelism());
        });
        out
    }

    /// Lower half of `A A^T`.
    fn gram(&self) -> Mat<f64> {
        use BlockStructure::{Rectangular, TriangularLower};
        let mut out = Mat::zeros(self.small(), self.small());
        let par = get_global_parallelism();
        self.slabs(|_, t| {
            triangular::matmul(&mut out, TriangularLower, Accum::Add, t.transpose(), Rectangular, t, Rectangular, 1.0, par);
        });
        out
    }

    /// `A^T x`: `[large][columns of x]`.
    fn transposed_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(self.large(), x.ncols());
        self.slabs(|first, t| {
            matmul(out.subrows_mut(first, t.nrows()), Accum::Replace, t, x, 1.0, get_global_parallelism());
        });
        out
    }
}

impl Triplets {
    /// From `[small][n]` and `[large][n]` singular vectors of `A`, `n` at least `r`.
    fn new(w: Dense<'_>, small: MatRef<'_, f64>, s: &[f64], large: MatRef<'_, f64>, r: usize) -> Self {
        let (left, right) = if w.rows <= w.cols { (small, large) } else { (large, small) };
        let mut out = Triplets { rows: w.rows, cols: w.cols, u: Vec::new(), s: s[..r].to_vec(), v: Vec::new() };
        let signs: Vec<f64> = (0..r)
            .map(|j| {
                let largest = left.col(j).iter().fold(0.0f64, |a, &x| if x.abs() > a.abs() { x } else { a });
                if largest < 0.0 { -1.0 } else { 1.0 }
            })
            .collect();
        let rows = |m: MatRef<'_, f64>, n| (0..n).flat_map(|i| (0..r).map(move |j| (i, j))).map(|(i, j)| m[(i, j)] * signs[j]).collect();
        out.u = rows(left, w.rows);
        out.v = rows(right, w.cols);
        out
    }

    /// Keeps the `r` leading triplets.
    pub fn truncate(&mut self, r: usize) {
        let n = self.s.len();
        if r < n {
            let keep = |x: &[f64]| x.chunks_exact(n).flat_map(|row| row[..r].to_vec()).collect();
            (self.u, self.v) = (keep(&self.u), keep(&self.v));
            self.s.truncate(r);
        }
    }

    /// Two factors of the product that share the singular values evenly: up `[rows][n]` is `U sqrt(S)`, down `[n][cols]` is
    /// `sqrt(S) V^T`.
    pub fn balanced(&self) -> (Vec<f64>, Vec<f64>) {
        let n = self.s.len();
        let roots: Vec<f64> = self.s.iter().map(|s| s.sqrt()).collect();
        let up = self.u.iter().enumerate().map(|(i, x)| x * roots[i % n]).collect();
        let down = (0..n).flat_map(|j| (0..self.cols).map(move |c| (j, c))).map(|(j, c)| roots[j] * self.v[c * n + j]).collect();
        (up, down)
    }
}

/// The `r` leading singular triplets (fewer where a side is shorter), for factors that stand in for an f32 SVD.
///
/// A side of up to 256 goes to a thin SVD. Otherwise a seeded block Krylov basis of the smaller Gram operator, wholly
/// reorthogonalised, grows until its Ritz residuals bound the relative error of the product `U S V^T` by 1e-7 (it is about 1e-9
/// then); where that takes more than a quarter of the side, the Gram matrix itself is decomposed. A last SVD of `A^T U` makes the
/// squared condition of the Gram matrix harmless: what is returned is exactly the matrix's own part over the subspace found,
/// and that subspace is off by about `1e-16 s[0] / (s[r-1] - s[r])`, like a direct SVD's in f64.
/// Where `s[r-1]` and `s[r]` are as good as equal the best part of rank `r` is not unique: one of the best is returned. Vectors
/// within a cluster of equal values are any basis of it.
///
/// The result depends on the seed and the matrix; the number of threads changes the last bits of f64 at most.
///
/// Cost on 2 cores (Gaussian, which has no gaps and so is the worst case): TIMINGS
///
/// # Errors
/// `Shape`, `NotFinite`; `NoConvergence`, which finite numbers are not known to give.
pub fn top(w: Dense<'_>, r: usize) -> Result<Triplets, Error> {
    w.check()?;
    let small = w.small();
    let r = r.min(small);
    if r == 0 {
        return Ok(Triplets { rows: w.rows, cols: w.cols, u: Vec::new(), s: Vec::new(), v: Vec::new() });
    }
    let basis = if small <= SMALL {
        Mat::identity(small, small)
    } else if let Some(basis) = krylov(w, r)? {
        basis
    } else {
        eigen(w.gram().as_ref())?.1.subcols(0, r).to_owned()
    };
    let (large, s, turn) = thin(w.transposed_times(basis.as_ref()).as_ref())?;
    Ok(Triplets::new(w, (basis * turn).as_ref(), &s, large.as_ref(), r))
}

/// An orthonormal basis `[small][r]` of the leading singular subspace; `None` where a bounded basis does not give it.
fn krylov(w: Dense<'_>, r: usize) -> Result<Option<Mat<f64>>, Error> {
    let side = w.small();
    let (b, bound) = ((r + 8).min(BLOCK), side / BASIS_SHARE);
    if 2 * (r + b) > bound {
        return Ok(None);
    }
    let mut random = Random(1);
    let mut block = random.block(side, b);
    orthonormal(&mut block, 0.0, &mut random);
    let mut basis = Mat::zeros(side, bound);
    // basis^T A A^T basis, lower half.
    let mut projected = Mat::zeros(bound, bound);
    let (mut k, mut tried) = (0, 0);
    loop {
        basis.subcols_mut(k, b).copy_from(&block);
        k += b;
        let known = basis.subcols(0, k);
        let mut rest = w.gram_times(block.as_ref());
        let along = known.transpose() * &rest;
        projected.submatrix_mut(k - b, 0, b, k).copy_from(along.transpose());
        rest -= known * &along;
        let last = k + b > bound;
        // Each try costs k^3.
        if k > r && (last || 5 * k >= 6 * tried) {
            tried = k;
            let (values, vectors) = eigen(projected.submatrix(0, 0, k, k))?;
            let residuals = &rest * vectors.submatrix(k - b, 0, b, r);
            if accurate(&values, residuals.as_ref()) {
                let found = known * vectors.subcols(0, r);
                return Ok(complete(w, &found, values[r - 1], &mut random)?.then_some(found));
            }
        }
        if last {
            return Ok(None);
        }
        block = rest;
        orthonormal(&mut block, 1e-13 * projected.norm_max(), &mut random);
        // Once more at unit length: what cancellation left of `known` in a short remainder is large by now.
        let along = known.transpose() * &block;
        block -= known * along;
        orthonormal(&mut block, 0.0, &mut random);
    }
}

/// Gram and Schmidt's columns. Where one is no longer than `floor` without those before it, the Krylov space has ended in a
/// direction: any other one goes on.
fn orthonormal(x: &mut Mat<f64>, floor: f64, random: &mut Random) {
    for j in 0..x.ncols() {
        let (before, mut rest) = x.as_mut().split_at_col_mut(j);
        let (before, mut column) = (before.as_ref(), rest.as_mut().col_mut(0));
        // Twice is enough.
        let mut clear = |mut column: ColMut<'_, f64>| {
            for _ in 0..2 {
                let along = before.transpose() * column.as_ref();
                column -= before * along;
            }
            column.norm_l2()
        };
        let mut length = clear(column.as_mut());
        if length <= floor {
            column.copy_from(random.block(before.nrows(), 1).col(0));
            length = clear(column.as_mut());
        }
        column /= Scale(length);
    }
}

/// Whether the subspace of the leading Ritz vectors gives the product within the tolerance: each vector is off by at most its
/// residual over its distance from the first value left out (Davis and Kahan), and weighs as much as its singular value.
fn accurate(values: &[f64], residuals: MatRef<'_, f64>) -> bool {
    let r = residuals.ncols();
    let error: f64 = residuals
        .col_iter()
        .zip(values)
        .map(|(x, value)| {
            let (residual, gap) = (x.norm_l2(), value - values[r]);
            let angle = if residual < gap { residual / gap } else { 1.0 };
            2.0 * value.max(0.0) * angle * angle
        })
        .sum();
    error <= TOLERANCE * TOLERANCE * values[..r].iter().sum::<f64>()
}

/// Whether nothing above `least` (an eigenvalue of the Gram matrix) is left outside `found`. A block Krylov space holds at most
/// as many vectors of a multiple value as its block has columns, and shows no residual for the others.
fn complete(w: Dense<'_>, found: &Mat<f64>, least: f64, random: &mut Random) -> Result<bool, Error> {
    let mut probe = random.block(found.nrows(), BLOCK);
    for _ in 0..4 {
        let along = found.transpose() * &probe;
        probe -= found * along;
        orthonormal(&mut probe, 0.0, random);
        probe = w.gram_times(probe.as_ref());
    }
    let along = found.transpose() * &probe;
    probe -= found * along;
    orthonormal(&mut probe, 0.0, random);
    let outside = eigen((probe.transpose() * w.gram_times(probe.as_ref())).as_ref())?.0[0];
    Ok(outside <= least * (1.0 + 1e-9) || least <= 0.0)
}

/// The thin singular value decomposition of `up [out][k]` times `down [k][inner]` without forming the product: min(out, k, inner)
/// triplets, exact to f64. Costs about `4 (out + inner) k^2`.
///
/// # Errors
/// `Shape`; `NoConvergence`, which numbers that are not finite give.
pub fn refactor(up: &[f64], down: &[f64], out: usize, k: usize, inner: usize) -> Result<Triplets, Error> {
    for (got, rows, cols) in [(up.len(), out, k), (down.len(), k, inner)] {
        if rows.checked_mul(cols) != Some(got) {
            return Err(Error::Shape { got, rows, cols });
        }
    }
    let r = out.min(inner).min(k);
    if r == 0 {
        return Ok(Triplets { rows: out, cols: inner, u: Vec::new(), s: Vec::new(), v: Vec::new() });
    }
    // SVDs where QR would do: they cost about the same once a side is long.
    let (q, a, rotation) = thin(MatRef::from_row_major_slice(up, out, k))?;
    // Row by row as it lies is the transpose column by column.
    let (p, b, turn) = thin(MatRef::from_column_major_slice(down, inner, k))?;
    let mut core = rotation.transpose() * turn;
    core.col_iter_mut().zip(&b).for_each(|(column, b)| column.iter_mut().zip(&a).for_each(|(x, a)| *x *= a * b));
    let (u, s, v) = thin(core.as_ref())?;
    let (u, v) = (q * u, p * v);
    // `new` wants the shorter side first.
    let shape = Dense { rows: out, cols: inner, data: &[] };
    let (small, large) = if out <= inner { (&u, &v) } else { (&v, &u) };
    Ok(Triplets::new(shape, small.as_ref(), &s, large.as_ref(), r))
}

/// Singular values of a `[rows][cols]` matrix in falling order.
///
/// # Errors
/// `Shape`, `NotFinite`, `NoConvergence`.
pub fn values(w: Dense<'_>) -> Result<Vec<f64>, Error> {
    w.check()?;
    if w.small() == 0 {
        return Ok(Vec::new());
    }
    Ok(thin(w.transposed_times(Mat::identity(w.small(), w.small()).as_ref()).as_ref())?.1)
}

/// All left singular vectors, less those of singular values below 1e-6 of the largest. From the smaller Gram matrix, which leaves
/// a vector off by about `1e-16 s[0]^2 / (s gap)`: nothing that f32 shows for values above a thousandth of the largest.
/// Takes about LEFTTIMINGS
/// and memory for 3 f64 squares of the shorter side.
///
/// # Errors
/// `Shape`, `NotFinite`, `NoConvergence`.
pub fn left(w: Dense<'_>) -> Result<Left, Error> {
    w.check()?;
    let small = w.small();
    if small == 0 {
        return Ok(Left { rows: w.rows, u: Vec::new(), s: Vec::new() });
    }
    if small <= SMALL {
        let t = top(w, small)?;
        let m = t.s.iter().filter(|&&s| s > NULL * t.s[0]).count();
        let u = t.u.chunks_exact(small).flat_map(|row| row[..m].iter().map(|&x| x as f32)).collect();
        return Ok(Left { rows: w.rows, u, s: t.s[..m].iter().map(|&s| s as f32).collect() });
    }
    let (squares, vectors) = eigen(w.gram().as_ref())?;
    let m = squares.iter().filter(|&&x| x > NULL * NULL * squares[0]).count();
    let vectors = vectors.subcols(0, m);
    let mut u = vec![0.0f32; w.rows * m];
    let write = |to: &mut [f32], from: MatRef<'_, f64>| {
        to.chunks_exact_mut(m).enumerate().for_each(|(i, row)| row.iter_mut().enumerate().for_each(|(j, x)| *x = from[(i, j)] as f32));
    };
    if m == 0 {
        return Ok(Left { rows: w.rows, u, s: Vec::new() });
    }
    let mut s: Vec<f64> = squares[..m].iter().map(|x| x.sqrt()).collect();
    if w.rows <= w.cols {
        write(&mut u, vectors);
    } else {
        // W v is s u. Its own length is a better s than the root of a square.
        let mut lengths = vec![0.0; m];
        w.slabs(|first, t| {
            let y = t * vectors;
            lengths.iter_mut().zip(y.col_iter()).for_each(|(l, c)| *l += c.squared_norm_l2());
            write(&mut u[first * m..(first + t.nrows()) * m], y.as_ref());
        });
        s = lengths.iter().map(|l| l.sqrt()).collect();
        u.chunks_exact_mut(m).for_each(|row| row.iter_mut().zip(&s).for_each(|(x, s)| *x = (f64::from(*x) / s) as f32));
    }
    Ok(Left { rows: w.rows, u, s: s.iter().map(|&s| s as f32).collect() })
}

impl Left {
    /// Inner products `[n][vectors kept]` of these vectors with the columns of `x [rows][n]`.
    ///
    /// # Panics
    /// Where `x` has another shape.
    pub fn project(&self, x: &[f64], n: usize) -> Vec<f64> {
        let m = self.s.len();
        assert_eq!(x.len(), self.rows * n, "[rows][n]");
        let mut out = vec![0.0; n * m];
        out.par_chunks_mut(m.max(1)).enumerate().for_each(|(j, to)| {
            for (i, row) in self.u.chunks_exact(m).enumerate() {
                let x = x[i * n + j];
                to.iter_mut().zip(row).for_each(|(t, &u)| *t += x * f64::from(u));
            }
        });
        out
    }

    /// For a cache: a magic number with the version, both sizes as u64, then `s` and `u`; little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        [self.rows, self.s.len()].iter().for_each(|&n| out.extend((n as u64).to_le_bytes()));
        self.s.iter().chain(&self.u).for_each(|x| out.extend(x.to_le_bytes()));
        out
    }

    /// What [`Left::to_bytes`] wrote.
    ///
    /// # Errors
    /// `Format` for another version, a length that does not fit, or numbers that no decomposition gives.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(Error::Format("another format or version"))?;
        let (sizes, numbers) = rest.split_at_checked(16).ok_or(Error::Format("cut off within the sizes"))?;
        let size = |i: usize| usize::try_from(u64::from_le_bytes(sizes[8 * i..8 * i + 8].try_into().expect("eight bytes")));
        let (Ok(rows), Ok(m)) = (size(0), size(1)) else { return Err(Error::Format("sizes beyond this machine")) };
        let expected = rows.checked_add(1).and_then(|n| n.checked_mul(m)).and_then(|n| n.checked_mul(4));
        if m > rows || expected != Some(numbers.len()) {
            return Err(Error::Format("a length that does not fit the sizes"));
        }
        let mut numbers: Vec<f32> = numbers.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let u = numbers.split_off(m);
        if !u.iter().all(|x| x.abs() <= 1.001) || !numbers.iter().all(|s| *s >= 0.0 && s.is_finite()) {
            return Err(Error::Format("numbers that are no singular vectors"));
        }
        Ok(Left { rows, u, s: numbers })
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    /// Uniform in -1..1.
    fn block(&mut self, rows: usize, cols: usize) -> Mat<f64> {
        Mat::from_fn(rows, cols, |_, _| {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
    }
}

fn parallel(side: usize) -> Par {
    if side <= SEQUENTIAL { Par::Seq } else { get_global_parallelism() }
}

/// Eigenvalues in falling order and eigenvectors of a symmetric matrix given by its lower half.
fn eigen(a: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>), Error> {
    let (n, par) = (a.nrows(), parallel(a.nrows()));
    let (mut s, mut u) = (Diag::zeros(n), Mat::zeros(n, n));
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Default::default()));
    self_adjoint_evd(a, s.as_mut(), Some(u.as_mut()), par, MemStack::new(&mut memory), Default::default())
        .map_err(|_| Error::NoConvergence)?;
    let values = s.column_vector().iter().rev().copied().collect();
    Ok((values, u.as_ref().reverse_cols().to_owned()))
}

/// Thin singular value decomposition: left vectors, values in falling order, right vectors.
fn thin(a: MatRef<'_, f64>) -> Result<(Mat<f64>, Vec<f64>, Mat<f64>), Error> {
    let ((m, n), r) = (a.shape(), a.nrows().min(a.ncols()));
    let par = parallel(r);
    let (mut s, mut u, mut v) = (Diag::zeros(r), Mat::zeros(m, r), Mat::zeros(n, r));
    let wanted = ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd_scratch::<f64>(m, n, wanted, wanted, par, Default::default()));
    svd(a, s.as_mut(), Some(u.as_mut()), Some(v.as_mut()), par, MemStack::new(&mut memory), Default::default())
        .map_err(|_| Error::NoConvergence)?;
    Ok((u, s.column_vector().iter().copied().collect(), v))
}
