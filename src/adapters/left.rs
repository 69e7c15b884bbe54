//! All left singular vectors of a base matrix, in a form to keep.

use faer::MatRef;
use rayon::prelude::*;

use super::spectrum::{Dense, Error, SMALL, eigen, top};

/// All left singular vectors of a matrix that are not numerically null, rounded to be kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Left {
    pub rows: usize,
    /// `[rows][s.len()]`.
    pub u: Vec<f32>,
    /// In falling order.
    pub s: Vec<f32>,
}

/// Left vectors of singular values below this share of the largest are noise: 32-bit numbers do not determine them.
const NULL: f64 = 1e-6;
const MAGIC: [u8; 8] = *b"LEFTVEC\x01";

/// All left singular vectors, less those of singular values below 1e-6 of the largest. From the smaller Gram matrix, which leaves
/// a vector off by about `1e-16 s[0]^2 / (s gap)`: nothing that f32 shows for values above a thousandth of the largest.
/// On 2 cores a shorter side of 2048 takes 1.6 s (2048 by 2048) to 2.6 s (8192 by 2048), one of 4096 about 14 s, and memory for 3 f64
/// squares of that side.
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

#[cfg(test)]
mod tests {
    use super::super::spectrum::tests::with_spectrum;
    use super::*;

    #[test]
    fn left_holds_all_vectors_but_null_ones() {
        for (rows, cols) in [(40, 50), (300, 330), (330, 300)] {
            let data = with_spectrum(rows, cols, |j| if j < 20 { 0.9f64.powi(j as i32) } else { 0.0 }, 4);
            let w = Dense { rows, cols, data: &data };
            // The f32 roundings of the entries are what is left below.
            let (l, t) = (left(w).unwrap(), top(w, 20).unwrap());
            assert!(l.s.len() >= 20 && l.s.iter().zip(&t.s).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6));
            let (cosines, m) = (l.project(&t.u, 20), l.s.len());
            assert!((0..20).all(|j| (cosines[j * m + j].abs() - 1.0).abs() < 1e-6), "{rows}x{cols}");
        }
        for (rows, cols) in [(2, 2), (300, 280), (280, 300)] {
            let one: Vec<f32> = (0..rows * cols).map(|x| (1 + x / cols) as f32).collect();
            assert_eq!(left(Dense { rows, cols, data: &one }).unwrap().s.len(), 1, "{rows}x{cols}");
        }
    }

    #[test]
    fn left_round_trips_and_refuses_other_bytes() {
        let data = with_spectrum(12, 9, |j| 1.0 + j as f64, 2);
        let l = left(Dense { rows: 12, cols: 9, data: &data }).unwrap();
        let bytes = l.to_bytes();
        assert_eq!(Left::from_bytes(&bytes).unwrap(), l);
        for n in 0..bytes.len() {
            assert!(matches!(Left::from_bytes(&bytes[..n]), Err(Error::Format(_))), "{n}");
        }
        // Another version, one number more, sizes that overflow, a number that is none.
        for (at, with) in [(7, vec![2]), (bytes.len(), vec![0; 4]), (8, vec![255; 16]), (24, f32::NAN.to_le_bytes().to_vec())] {
            let mut other = bytes.clone();
            other.splice(at..(at + with.len()).min(bytes.len()), with);
            assert!(Left::from_bytes(&other).is_err(), "{at}");
        }
    }
}
