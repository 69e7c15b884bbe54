//! The frequency basis in closed form: of each rope frequency, the principal components of its complex keys over the KV heads;
//! of all frequencies together, those of the greatest energy.

use faer::{Mat, Side, c64};

use crate::compress::{FrequencyBasis, Up};

/// `E[x x^T]` of some channels.
pub(super) type Second<'a> = dyn Fn(&[usize]) -> Mat<f64> + 'a;

/// The leading pairs of one layer, and their energies.
pub(super) struct Found {
    pub(super) basis: FrequencyBasis,
    /// Of each pair, falling.
    pub(super) energies: Vec<f64>,
    pub(super) total: f64,
}

/// The `pairs` complex directions that lose the least of the keys, not centred: a mean direction is a component like others,
/// so that sinks and positions off the mean come back right. `second` gives `E[x x^T]` of some key channels.
///
/// `seen` gives them of the keys where `second` is of something else: energies are then counted by it.
/// `weights: [kv_heads][half]` is what an error of a head at a frequency is worth; by these, and turned back by an `up` of their
/// own. `None` where the eigenvalue iteration does not converge.
pub(super) fn solve(
    second: impl Fn(&[usize]) -> Mat<f64>,
    seen: Option<&Second<'_>>,
    (kv_heads, half): (usize, usize),
    pairs: usize,
    weights: Option<&[f64]>,
) -> Option<Found> {
    let mut all: Vec<(f64, f64, usize, Vec<c64>)> = Vec::new();
    let mut total = 0.0;
    let root = |h: usize, f: usize| weights.map_or(1.0, |w| w[h * half + f].sqrt());
    for f in 0..half {
        let channels: Vec<usize> = [f, half + f].iter().flat_map(|c| (0..kv_heads).map(move |h| 2 * half * h + c)).collect();
        // E[z z^H] of z = a + ib.
        let covariance_of = |m: Mat<f64>| {
            Mat::from_fn(kv_heads, kv_heads, |i, j| {
                let (a, b) = ((i, j), (kv_heads + i, kv_heads + j));
                let re = m[a] + m[b];
                let im = m[(kv_heads + i, j)] - m[(i, kv_heads + j)];
                c64::new(re, im) * root(i, f) * root(j, f)
            })
        };
        let covariance = covariance_of(second(&channels));
        let met = seen.map(|seen| covariance_of(seen(&channels)));
        let counted = met.as_ref().unwrap_or(&covariance);
        total += (0..kv_heads).map(|h| counted[(h, h)].re).sum::<f64>();
        let eigen = covariance.self_adjoint_eigen(Side::Lower).ok()?;
        for i in 0..kv_heads {
            let vector = eigen.U().col(i);
            let energy = met.as_ref().map_or(eigen.S()[i].re, |met| (vector.adjoint() * met * vector).re);
            all.push((eigen.S()[i].re, energy.max(0.0), f, vector.iter().copied().collect()));
        }
    }
    // Stable, so that equal energies keep the order of frequencies.
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.truncate(pairs);
    let mut basis = FrequencyBasis { kv_heads, half, frequencies: Vec::new(), directions: Vec::new(), up: Up::Directions };
    let mut up = Vec::new();
    for (_, _, f, vector) in &all {
        basis.frequencies.push(*f as u32);
        // The phase of a component is free: the element of largest magnitude is made real, so that calibrating twice gives
        // the same file.
        let largest = vector.iter().fold(c64::new(0.0, 0.0), |a, &x| if x.norm_sqr() > a.norm_sqr() * (1.0 + 1e-9) { x } else { a });
        let turn = largest.conj() / largest.norm_sqr().sqrt();
        for (h, &x) in vector.iter().enumerate() {
            let x = x * turn;
            let (down, back) = (x * root(h, *f), x / root(h, *f));
            basis.directions.extend([down.re as f32, down.im as f32]);
            up.extend([back.re as f32, back.im as f32]);
        }
    }
    if weights.is_some() {
        basis.up = Up::Nested(up);
    }
    Some(Found { basis, energies: all.into_iter().map(|(_, e, ..)| e).collect(), total })
}
