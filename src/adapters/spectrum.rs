//! Singular values and vectors of weight matrices and of low-rank products.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{ColMut, Mat, MatRef, Par, Scale, get_global_parallelism};

pub use super::dense::Dense;

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
pub(super) const SMALL: usize = 256;
/// Columns of a Krylov block, at most. Narrow blocks reach a higher degree within the same basis: a Gaussian 2048 by 2048 takes
/// a basis of 528 at 12 columns and 768 at 24 for its 16 leading triplets.
const BLOCK: usize = 16;
/// A Krylov basis grows up to this part of the side. Beyond, the decomposition of the Gram matrix is about as quick.
const BASIS_SHARE: usize = 4;
/// Bound on the product's relative error at which a Krylov basis is wide enough. The bound is about 100 times the error.
const TOLERANCE: f64 = 1e-7;
/// Decompositions of sides up to this run on one thread, so that their last bits do not depend on how many there are.
const SEQUENTIAL: usize = 512;

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
/// The result depends on the matrix alone: the seed is fixed, and the number of threads changes at most the last bits of f64, and only
/// where a Gram matrix of a side over 512 is decomposed.
///
/// Cost on 2 cores: a Gaussian matrix, which has no gaps and so ends with its Gram matrix, takes 2.3 s at 2048 by 2048 for 16
/// triplets and 2.4 s for 128; 3.5 s and 4.3 s at 2048 by 8192. Values that fall about like `1 / sqrt(j)` take 0.4 s for 16 at 2048
/// by 2048, 1.3 s at 2048 by 8192 and 1.7 s at 4096 by 4096; 128 of them 2.7 s at 2048 by 8192. The product was off by 4e-13 (Gram
/// matrix) and 5e-10 (Krylov), where an f32 SVD's is off by 1e-7. Memory beyond the result: a slab of 4 MiB in f64 and the basis, or 3
/// f64 squares of the shorter side.
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
        let clear = |mut column: ColMut<'_, f64>| {
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
pub(super) fn eigen(a: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>), Error> {
    let (n, par) = (a.nrows(), parallel(a.nrows()));
    let (mut s, mut u) = (Diag::zeros(n), Mat::zeros(n, n));
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Default::default()));
    self_adjoint_evd(a, s.as_mut(), Some(u.as_mut()), par, MemStack::new(&mut memory), Default::default())
        .map_err(|_| Error::NoConvergence)?;
    let values = s.column_vector().iter().rev().copied().collect();
    Ok((values, u.as_ref().reverse_cols().to_owned()))
}

/// Left vectors, values in falling order, right vectors.
type Svd = (Mat<f64>, Vec<f64>, Mat<f64>);

/// Thin singular value decomposition.
fn thin(a: MatRef<'_, f64>) -> Result<Svd, Error> {
    let ((m, n), r) = (a.shape(), a.nrows().min(a.ncols()));
    let par = parallel(r);
    let (mut s, mut u, mut v) = (Diag::zeros(r), Mat::zeros(m, r), Mat::zeros(n, r));
    let wanted = ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd_scratch::<f64>(m, n, wanted, wanted, par, Default::default()));
    svd(a, s.as_mut(), Some(u.as_mut()), Some(v.as_mut()), par, MemStack::new(&mut memory), Default::default())
        .map_err(|_| Error::NoConvergence)?;
    Ok((u, s.column_vector().iter().copied().collect(), v))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// `U diag(s) V^T` with random orthonormal columns, rounded to f32.
    pub(in super::super) fn with_spectrum(rows: usize, cols: usize, s: impl Fn(usize) -> f64, seed: u64) -> Vec<f32> {
        let (n, mut random) = (rows.min(cols), Random(seed));
        let u = random.block(rows, n).qr().compute_thin_Q();
        let v = random.block(cols, n).qr().compute_thin_Q();
        let scaled = Mat::from_fn(rows, n, |i, j| u[(i, j)] * s(j));
        let w = scaled * v.transpose();
        (0..rows * cols).map(|i| w[(i / cols, i % cols)] as f32).collect()
    }

    fn mat(x: &[f64], rows: usize, cols: usize) -> Mat<f64> {
        Mat::from_fn(rows, cols, |i, j| x[i * cols + j])
    }

    fn product(t: &Triplets) -> Mat<f64> {
        let (up, down) = t.balanced();
        mat(&up, t.rows, t.s.len()) * mat(&down, t.s.len(), t.cols)
    }

    /// Relative error of the product against the truncation of a full SVD, and that of the singular values.
    fn errors(w: Dense<'_>, r: usize) -> (f64, f64) {
        let exact = Mat::from_fn(w.rows, w.cols, |i, j| f64::from(w.data[i * w.cols + j])).thin_svd().unwrap();
        let s: Vec<f64> = exact.S().column_vector().iter().take(r).copied().collect();
        let us = Mat::from_fn(w.rows, r, |i, j| exact.U()[(i, j)] * s[j]);
        let best = us * exact.V().subcols(0, r).transpose();
        let t = top(w, r).unwrap();
        let values = t.s.iter().zip(&s).map(|(a, b)| (a - b).abs() / s[0]).fold(0.0, f64::max);
        ((product(&t) - &best).norm_l2() / best.norm_l2(), values)
    }

    #[test]
    fn top_is_the_truncated_svd() {
        let decaying = |j: usize| 1.0 / (1.0 + j as f64);
        let steep = |j: usize| 0.8f64.powi(j as i32);
        let flat = |j: usize| 1.0 - 1e-4 * j as f64;
        // (rows, cols, r): the small side directly, then Krylov, then where its bounded basis does not do.
        for (rows, cols, r) in [(60, 90, 7), (90, 60, 60), (320, 400, 10), (400, 320, 10), (300, 300, 60)] {
            for (name, s) in [("decaying", &decaying as &dyn Fn(usize) -> f64), ("steep", &steep), ("flat", &flat)] {
                let data = with_spectrum(rows, cols, s, 3);
                let (product, values) = errors(Dense { rows, cols, data: &data }, r);
                assert!(product < 1e-7 && values < 1e-12, "{name} {rows}x{cols} r {r}: {product:e} {values:e}");
            }
        }
    }

    #[test]
    fn krylov_itself_solves_what_decays_and_gives_up_on_what_does_not() {
        let decaying = with_spectrum(300, 340, |j| 1.0 / (1.0 + j as f64), 5);
        let flat = with_spectrum(300, 340, |j| 1.0 - 1e-4 * j as f64, 5);
        let of = |data| krylov(Dense { rows: 300, cols: 340, data }, 4).unwrap();
        assert!(of(&decaying).is_some());
        assert!(of(&flat).is_none());
    }

    #[test]
    fn values_more_numerous_than_a_block_are_all_found() {
        // 20 equal ones, block 16: a Krylov space shows 16 of them and no residual.
        let n = 520;
        let mut data = vec![0.0f32; n * n];
        (0..n).for_each(|i| data[i * n + (i * 7) % n] = if i < 20 { 1.0 } else { 0.5 * 0.9f32.powi(i as i32 - 20) });
        let t = top(Dense { rows: n, cols: n, data: &data }, 24).unwrap();
        assert!(t.s[..20].iter().all(|s| (s - 1.0).abs() < 1e-12), "{:?}", t.s);
        assert!((t.s[23] - 0.5 * 0.9f64.powi(3)).abs() < 1e-7, "{:?}", t.s);
    }

    #[test]
    fn poor_matrices_keep_orthonormal_vectors() {
        let zero = vec![0.0f32; 300 * 280];
        let one: Vec<f32> = (0..300 * 280).map(|i| (1 + i / 280) as f32).collect();
        for (data, first) in [(&zero, false), (&one, true)] {
            let t = top(Dense { rows: 300, cols: 280, data }, 5).unwrap();
            assert_eq!(t.s[0] > 1.0, first);
            assert!(t.s[1..].iter().all(|s| *s <= 1e-10 * t.s[0]), "{:?}", t.s);
            for (x, rows) in [(&t.u, 300), (&t.v, 280)] {
                let x = mat(x, rows, 5);
                assert!((x.transpose() * &x - Mat::<f64>::identity(5, 5)).norm_max() < 1e-12);
            }
        }
        assert_eq!(
            top(Dense { rows: 2, cols: 2, data: &[1.0, 2.0, f32::NAN, 0.0] }, 1).unwrap_err(),
            Error::NotFinite { row: 1, column: 0 }
        );
        assert!(matches!(top(Dense { rows: 2, cols: 2, data: &[1.0] }, 1), Err(Error::Shape { .. })));
    }

    #[test]
    fn refactor_gives_the_svd_of_the_product() {
        for (out, k, inner) in [(40, 6, 30), (30, 6, 40), (5, 8, 30), (30, 8, 5)] {
            let mut random = Random(9);
            let (up, down) = (random.block(out, k), random.block(k, inner));
            let rows = |m: &Mat<f64>| (0..m.nrows()).flat_map(|i| (0..m.ncols()).map(move |j| m[(i, j)])).collect::<Vec<_>>();
            let t = refactor(&rows(&up), &rows(&down), out, k, inner).unwrap();
            let exact = up * down;
            assert!((product(&t) - &exact).norm_l2() < 1e-13 * exact.norm_l2());
            let s = exact.singular_values().unwrap();
            assert!(t.s.iter().zip(&s).all(|(a, b)| (a - b).abs() < 1e-13 * s[0]), "{:?} {s:?}", t.s);
            let largest = |j: usize| t.u.iter().skip(j).step_by(t.s.len()).fold(0.0f64, |a, &x| if x.abs() > a.abs() { x } else { a });
            assert!((0..t.s.len()).all(|j| largest(j) > 0.0));
            let mut short = t.clone();
            short.truncate(2);
            assert!(((product(&short) - &exact).norm_l2() - s[2..].iter().map(|s| s * s).sum::<f64>().sqrt()).abs() < 1e-12);
        }
    }
}
