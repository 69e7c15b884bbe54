//! A borrowed matrix, and the products with it that decompositions are made of.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, get_global_parallelism};
use rayon::prelude::*;

use super::spectrum::Error;

/// A matrix of finite numbers, row by row; borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    pub rows: usize,
    pub cols: usize,
    /// `[rows][cols]`.
    pub data: &'a [f32],
}

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

    pub(super) fn small(&self) -> usize {
        self.rows.min(self.cols)
    }

    pub(super) fn large(&self) -> usize {
        self.rows.max(self.cols)
    }

    /// Visits `A^T` in slabs `[some][small]`, where `A` is the matrix or its transpose, `[small][large]`; each with its first row.
    /// Only a slab at a time is held in f64.
    pub(super) fn slabs(&self, mut visit: impl FnMut(usize, MatRef<'_, f64>)) {
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
    pub(super) fn gram_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(x.nrows(), x.ncols());
        self.slabs(|_, t| {
            let y = t * x;
            matmul(&mut out, Accum::Add, t.transpose(), &y, 1.0, get_global_parallelism());
        });
        out
    }

    /// Lower half of `A A^T`.
    pub(super) fn gram(&self) -> Mat<f64> {
        use BlockStructure::{Rectangular, TriangularLower};
        let mut out = Mat::zeros(self.small(), self.small());
        let par = get_global_parallelism();
        self.slabs(|_, t| {
            triangular::matmul(&mut out, TriangularLower, Accum::Add, t.transpose(), Rectangular, t, Rectangular, 1.0, par);
        });
        out
    }

    /// `A^T x`: `[large][columns of x]`.
    pub(super) fn transposed_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(self.large(), x.ncols());
        self.slabs(|first, t| {
            matmul(out.subrows_mut(first, t.nrows()), Accum::Replace, t, x, 1.0, get_global_parallelism());
        });
        out
    }
}
