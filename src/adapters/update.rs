//! Size and rank of an adapter's update.

use serde::Serialize;

use super::health::{Module, norm, wide};
use super::left::Left;
use super::spectrum::{self, Dense, refactor};

/// The update `D = up down`, without the gain.
#[derive(Clone, Debug, Serialize)]
pub struct Update {
    /// Singular values in falling order.
    pub values: Vec<f64>,
    /// Frobenius norm; zero for an update that does nothing.
    pub norm: f64,
    /// The norm over the base's; 0 for a base of zeros.
    pub relative_norm: f64,
    /// Largest singular value over the base's largest.
    pub relative_top: f64,
    /// `exp(entropy)` of the singular values as shares of their sum (Roy and Vetterli, 2007).
    pub effective_rank: f64,
    /// `|D|_F^2 / s[0]^2`.
    pub stable_rank: f64,
    /// Singular values above 1e-6 of the largest: 32-bit factors carry no others.
    pub numerical_rank: usize,
    /// Share of the squared norm that the `i + 1` leading triplets hold.
    pub energy: Vec<f64>,
    /// Least ranks that keep these shares of the squared norm.
    pub rank_90: usize,
    pub rank_99: usize,
    /// `|U0_k^T U_k|_F^2 / k` for the `k` leading left singular vectors of base and update, `k` being the numerical rank (at most the
    /// base's): 1 where the update stays within the base's leading output directions.
    pub overlap: f64,
    /// The overlap of a random subspace: `k / out`.
    pub chance: f64,
}

/// Singular values below this share of the largest are rounding of the factors.
pub(super) const NULL: f64 = 1e-6;

impl Update {
    /// Measures a module's update.
    pub(super) fn of(module: &Module<'_>, base: &Left, rank: usize) -> Result<Update, spectrum::Error> {
        let Dense { rows: out, cols: inner, data } = module.base;
        let t = refactor(&wide(module.up), &wide(module.down), out, rank, inner)?;
        let squares: f64 = t.s.iter().map(|s| s * s).sum();
        let sum: f64 = t.s.iter().sum();
        let share = |part: f64, of: f64| if of > 0.0 { part / of } else { 0.0 };
        let mut held = 0.0;
        let energy: Vec<f64> =
            t.s.iter()
                .map(|s| {
                    held += s * s;
                    share(held, squares)
                })
                .collect();
        let keeps = |part: f64| if squares > 0.0 { energy.partition_point(|&e| e < part).min(energy.len() - 1) + 1 } else { 0 };
        let entropy: f64 = t.s.iter().map(|s| share(*s, sum)).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
        let numerical_rank = t.s.iter().filter(|s| **s > NULL * t.s[0]).count();
        let (k, m, n) = (numerical_rank.min(base.s.len()), base.s.len(), t.s.len());
        let cosines = base.project(&t.u, n);
        let inside: f64 = (0..k).flat_map(|j| &cosines[j * m..j * m + k]).map(|c| c * c).sum();
        Ok(Update {
            norm: squares.sqrt(),
            relative_norm: share(squares.sqrt(), norm(data)),
            relative_top: share(t.s[0], base.s.first().map_or(0.0, |&s| f64::from(s))),
            effective_rank: if sum > 0.0 { entropy.exp() } else { 0.0 },
            stable_rank: share(squares, t.s[0] * t.s[0]),
            numerical_rank,
            rank_90: keeps(0.9),
            rank_99: keeps(0.99),
            overlap: share(inside, k as f64),
            chance: share(k as f64, out as f64),
            energy,
            values: t.s,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::health::tests::{IN, OUT, base, module};
    use super::super::health::{Settings, examine};
    use super::super::verdict::{Level, verdict};

    #[test]
    fn an_update_is_measured() {
        let (data, l) = base();
        // 3 u0 e0^T + 4 u1 e1^T, of rank 3 by name.
        let mut up = vec![0.0; OUT * 3];
        (0..OUT).for_each(|i| (up[i * 3], up[i * 3 + 1]) = (3.0 * l.u[i * IN], 4.0 * l.u[i * IN + 1]));
        let mut down = vec![0.0; 3 * IN];
        (down[0], down[IN + 1], down[2 * IN + 2]) = (1.0, 1.0, 1.0);
        let h = examine(&module(&data, &up, &down), &l, &Settings::default()).unwrap();
        let u = h.update.as_ref().unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a} {b}");
        near(u.norm, 5.0);
        near(u.relative_top, 4.0);
        near(u.relative_norm, 5.0 / (0..IN).map(|j| 1.0 / (1.0 + j as f64)).sum::<f64>().sqrt());
        near(u.stable_rank, 25.0 / 16.0);
        near(u.effective_rank, (4.0 / 7.0f64).powf(-4.0 / 7.0) * (3.0 / 7.0f64).powf(-3.0 / 7.0));
        near(u.energy[0], 0.64);
        near(u.overlap, 1.0);
        near(u.chance, 2.0 / OUT as f64);
        assert_eq!((u.rank_90, u.rank_99, u.numerical_rank, h.rank), (2, 2, 2, 3));
        let s = h.scale.as_ref().unwrap();
        near(s.down_condition.unwrap(), 1.0);
        assert!(s.up_condition.is_none_or(|c| c > 1e12));
        let verdict = verdict(&[h]);
        assert!(verdict.lines.contains(&"rank can be cut from 3 to 2 without loss".to_owned()), "{verdict:?}");
        assert_eq!(verdict.level, Level::Warning, "4 times the base's top");
    }
}
