//! What an adapter's module does to its base weights: size, rank, new directions, and what to do about them.

use faer::{Mat, MatRef};
use serde::Serialize;

use super::left::Left;
use super::spectrum::{self, Dense, Triplets, top, values};
use super::update::{NULL, Update};

/// A low-rank update `up down` of base weights; with a gain the weights served are `diag(gain)(base + up down)`. Borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    pub name: &'a str,
    /// `[out][in]`.
    pub base: Dense<'a>,
    /// `[r][in]`.
    pub down: &'a [f32],
    /// `[out][r]`, scale folded in.
    pub up: &'a [f32],
    /// `[out]`: a DoRA magnitude over the row norm.
    pub gain: Option<&'a [f32]>,
    pub orthonormal: Option<Orthonormal<'a>>,
}

/// The two sides of a SORSA triple, which training should have kept orthonormal.
#[derive(Clone, Copy, Debug)]
pub struct Orthonormal<'a> {
    /// `[r][in]`.
    pub a: &'a [f32],
    /// `[out][r]`.
    pub b: &'a [f32],
}

/// What counts as an intruder: one of the `k` leading left singular vectors of the tuned weights whose cosine with each of the
/// base's is below an epsilon (Shuttleworth et al., arXiv 2410.21228, whose numbers are the default).
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub k: usize,
    /// Those that are counted, for comparison.
    pub epsilons: Vec<f64>,
    /// The one that verdicts and repairs go by.
    pub epsilon: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { k: 10, epsilons: vec![0.5, 0.6, 0.7, 0.8, 0.9], epsilon: 0.5 }
    }
}

/// Why a module was not examined.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("{module}: {part} has {got} numbers, not {expected}")]
    Shape { module: String, part: &'static str, got: usize, expected: usize },
    #[error("{module}: {source}")]
    Spectrum { module: String, source: spectrum::Error },
    #[error("{module}: a repair needs finite numbers and a factor from 0 to 1")]
    Repair { module: String },
}

/// What [`examine`] saw of a module.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleHealth {
    pub name: String,
    pub out: usize,
    pub inner: usize,
    /// Rows of `down`.
    pub rank: usize,
    /// Parts with numbers that are not finite. The fields below are `None` then.
    pub not_finite: Vec<NotFinite>,
    pub scale: Option<Scale>,
    pub update: Option<Update>,
    /// `None` also where the tuned weights are the base's.
    pub intruders: Option<Intruders>,
    pub drift: Option<Drift>,
}

/// Numbers that are NaN or infinite, and the first place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotFinite {
    /// `base`, `down`, `up`, `gain`, `a`, `b`, or `tuned` where only the served weights overflow.
    pub part: &'static str,
    pub count: usize,
    pub row: usize,
    pub column: usize,
}

/// Sizes of the factors as they are stored.
#[derive(Clone, Debug, Serialize)]
pub struct Scale {
    /// Magnitude of the largest entry of either factor.
    pub largest: f64,
    /// Frobenius norms.
    pub down_norm: f64,
    pub up_norm: f64,
    /// Largest over smallest singular value; `None` where the smallest is zero.
    pub down_condition: Option<f64>,
    pub up_condition: Option<f64>,
    /// Smallest and largest gain of a row.
    pub gain: Option<(f64, f64)>,
}

/// The leading directions of the tuned weights, compared to the base's.
#[derive(Clone, Debug, Serialize)]
pub struct Intruders {
    pub epsilon: f64,
    /// Those below `epsilon`.
    pub found: Vec<Dimension>,
    /// Leading directions looked at.
    pub k: usize,
    /// How many are below each epsilon of the settings.
    pub counts: Vec<(f64, usize)>,
}

/// A leading left singular vector of the tuned weights.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Dimension {
    /// Its place, from 0.
    pub index: usize,
    /// Its singular value.
    pub sigma: f64,
    /// Largest magnitude of its cosine with any of the base's vectors.
    pub cosine: f64,
}

/// How far a SORSA triple's sides are from orthonormal.
#[derive(Clone, Debug, Serialize)]
pub struct Drift {
    /// `|A A^T - I|_F`
    pub a: f64,
    /// `|B^T B - I|_F`
    pub b: f64,
}

pub(super) fn failed(module: &Module<'_>) -> impl Fn(spectrum::Error) -> Error {
    let module = module.name.to_owned();
    move |source| Error::Spectrum { module: module.clone(), source }
}

/// Looks at one module, `base` being the left vectors of its base weights. Numbers that are not finite are reported and nothing is
/// decomposed then. The cost is that of [`top`] for `settings.k` triplets of the tuned weights, which are formed in f32, and of
/// `k` products with the base's vectors.
///
/// # Errors
/// `Shape` where lengths do not fit each other or a rank is zero; `Spectrum` where a decomposition does not converge.
pub fn examine(module: &Module<'_>, base: &Left, settings: &Settings) -> Result<ModuleHealth, Error> {
    let rank = module.rank(base)?;
    let Dense { rows: out, cols: inner, .. } = module.base;
    let mut health = ModuleHealth {
        name: module.name.to_owned(),
        out,
        inner,
        rank,
        not_finite: module.not_finite(rank),
        scale: None,
        update: None,
        intruders: None,
        drift: None,
    };
    if !health.not_finite.is_empty() {
        return Ok(health);
    }
    let tuned = module.tuned(rank);
    let tuned = Dense { data: &tuned, ..module.base };
    health.not_finite.extend(not_finite("tuned", tuned.data, inner));
    if !health.not_finite.is_empty() {
        return Ok(health);
    }
    let (update, scale) = (Update::of(module, base, rank), module.scale(rank));
    let (update, scale) = (update.map_err(failed(module))?, scale.map_err(failed(module))?);
    if update.norm > 0.0 || module.gain.is_some() {
        let (dimensions, _) = leading(tuned, base, settings.k).map_err(failed(module))?;
        let below = |epsilon: f64| dimensions.iter().filter(move |d| d.cosine < epsilon);
        health.intruders = Some(Intruders {
            epsilon: settings.epsilon,
            found: below(settings.epsilon).copied().collect(),
            k: dimensions.len(),
            counts: settings.epsilons.iter().map(|&e| (e, below(e).count())).collect(),
        });
    }
    health.drift = module.orthonormal.map(|o| {
        let a = MatRef::from_column_major_slice(o.a, inner, o.a.len() / inner);
        let b = MatRef::from_row_major_slice(o.b, out, o.b.len() / out);
        Drift { a: from_orthonormal(a), b: from_orthonormal(b) }
    });
    (health.update, health.scale) = (Some(update), Some(scale));
    Ok(health)
}

/// The `k` leading directions of tuned weights.
pub(super) fn leading(tuned: Dense<'_>, base: &Left, k: usize) -> Result<(Vec<Dimension>, Triplets), spectrum::Error> {
    let t = top(tuned, k)?;
    let (n, m) = (t.s.len(), base.s.len());
    let cosines = base.project(&t.u, n);
    let best = |j: usize| cosines[j * m..(j + 1) * m].iter().fold(0.0f64, |a, c| a.max(c.abs()));
    // A direction without weight is any vector, and no intruder.
    let real = (0..n).filter(|&j| t.s[j] > NULL * t.s[0]);
    Ok((real.map(|index| Dimension { index, sigma: t.s[index], cosine: best(index) }).collect(), t))
}

/// `|X^T X - I|_F`
fn from_orthonormal(x: MatRef<'_, f32>) -> f64 {
    let x = Mat::from_fn(x.nrows(), x.ncols(), |i, j| f64::from(x[(i, j)]));
    (x.transpose() * &x - Mat::<f64>::identity(x.ncols(), x.ncols())).norm_l2()
}

pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

pub(super) fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

fn not_finite(part: &'static str, data: &[f32], columns: usize) -> Option<NotFinite> {
    let first = data.iter().position(|x| !x.is_finite())?;
    let count = data[first..].iter().filter(|x| !x.is_finite()).count();
    Some(NotFinite { part, count, row: first / columns, column: first % columns })
}

impl Module<'_> {
    /// The rank, where all shapes fit.
    pub(super) fn rank(&self, base: &Left) -> Result<usize, Error> {
        let Dense { rows: out, cols: inner, data } = self.base;
        let rank = self.down.len() / inner.max(1);
        let mut parts = vec![
            ("base", data.len(), out * inner),
            ("base vectors", base.rows, out),
            ("down", self.down.len(), rank.max(1) * inner.max(1)),
            ("up", self.up.len(), out.max(1) * rank),
        ];
        parts.extend(self.gain.map(|g| ("gain", g.len(), out)));
        if let Some(o) = self.orthonormal {
            let r = (o.a.len() / inner.max(1)).max(1);
            parts.extend([("a", o.a.len(), r * inner), ("b", o.b.len(), out * r)]);
        }
        match parts.into_iter().find(|(_, got, expected)| got != expected) {
            None => Ok(rank),
            Some((part, got, expected)) => Err(Error::Shape { module: self.name.to_owned(), part, got, expected }),
        }
    }

    pub(super) fn not_finite(&self, rank: usize) -> Vec<NotFinite> {
        let Dense { cols, data, .. } = self.base;
        let mut parts = vec![("base", data, cols), ("down", self.down, cols), ("up", self.up, rank)];
        parts.extend(self.gain.map(|g| ("gain", g, 1)));
        if let Some(o) = self.orthonormal {
            parts.extend([("a", o.a, cols), ("b", o.b, o.a.len() / cols)]);
        }
        parts.into_iter().filter_map(|(part, data, columns)| not_finite(part, data, columns)).collect()
    }

    /// The weights served, in f32.
    pub(super) fn tuned(&self, rank: usize) -> Vec<f32> {
        const ROWS: usize = 256;
        let Dense { cols, data, .. } = self.base;
        let down = Mat::from_fn(rank, cols, |i, j| f64::from(self.down[i * cols + j]));
        let mut tuned = Vec::with_capacity(data.len());
        for (n, rows) in data.chunks(ROWS * cols).enumerate() {
            let up = Mat::from_fn(rows.len() / cols, rank, |i, j| f64::from(self.up[(n * ROWS + i) * rank + j]));
            // Transposed, so that rows lie in one piece.
            let update = down.transpose() * up.transpose();
            for (i, row) in rows.chunks_exact(cols).enumerate() {
                let gain = self.gain.map_or(1.0, |g| f64::from(g[n * ROWS + i]));
                tuned.extend(row.iter().zip(update.col(i).iter()).map(|(&w, d)| (gain * (f64::from(w) + d)) as f32));
            }
        }
        tuned
    }

    fn scale(&self, rank: usize) -> Result<Scale, spectrum::Error> {
        let Dense { rows: out, cols: inner, .. } = self.base;
        let condition = |data, rows, cols| {
            let s = values(Dense { rows, cols, data })?;
            let last = s[s.len() - 1];
            Ok((last > 0.0).then(|| s[0] / last))
        };
        let range = |g: &[f32]| g.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &x| (a.min(x.into()), b.max(x.into())));
        Ok(Scale {
            largest: self.down.iter().chain(self.up).fold(0.0, |a, &x| f64::from(x.abs()).max(a)),
            down_norm: norm(self.down),
            up_norm: norm(self.up),
            down_condition: condition(self.down, rank, inner)?,
            up_condition: condition(self.up, out, rank)?,
            gain: self.gain.map(range),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::left::left;
    use super::super::verdict::{Level, verdict};
    use super::*;

    pub(in super::super) const OUT: usize = 72;
    pub(in super::super) const IN: usize = 64;

    fn noise(n: usize, scale: f64, seed: u64) -> Vec<f32> {
        let mut s = seed;
        let mut next = move || {
            s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (s >> 33) as f64 / f64::from(1u32 << 31)
        };
        (0..n).map(|_| (scale * ((0..12).map(|_| next()).sum::<f64>() - 6.0)) as f32).collect()
    }

    /// A base with `1 / sqrt(1 + j)` for singular values, and its vectors.
    pub(in super::super) fn base() -> (Vec<f32>, Left) {
        let data = noise(OUT * IN, 1.0, 11);
        let mut t = top(Dense { rows: OUT, cols: IN, data: &data }, IN).unwrap();
        t.s = (0..IN).map(|j| 1.0 / (1.0 + j as f64).sqrt()).collect();
        let (up, down) = t.balanced();
        let dot = |i: usize, c: usize| (0..IN).map(|j| up[i * IN + j] * down[j * IN + c]).sum::<f64>() as f32;
        let data: Vec<f32> = (0..OUT * IN).map(|x| dot(x / IN, x % IN)).collect();
        let l = left(Dense { rows: OUT, cols: IN, data: &data }).unwrap();
        (data, l)
    }

    /// `n` left directions, each spread evenly over its own 12 of the base's vectors, with singular value `sigma`, and `rest` small
    /// ones. Right sides are unit vectors.
    pub(in super::super) fn planted(l: &Left, n: usize, sigma: f32, rest: usize) -> (Vec<f32>, Vec<f32>) {
        let rank = n + rest;
        let (mut up, mut down) = (vec![0.0; OUT * rank], vec![0.0; rank * IN]);
        for j in 0..rank {
            down[j * IN + 3 * j] = 1.0;
            for i in 0..OUT {
                let spread = || (0..12).map(|x| l.u[i * IN + 12 + 12 * j + x]).sum::<f32>() / 12f32.sqrt();
                up[i * rank + j] = if j < n { sigma * spread() } else { 0.05 * l.u[i * IN + j - n] };
            }
        }
        (up, down)
    }

    pub(in super::super) fn module<'a>(base: &'a [f32], up: &'a [f32], down: &'a [f32]) -> Module<'a> {
        let base = Dense { rows: OUT, cols: IN, data: base };
        Module { name: "layers.0.q_proj", base, down, up, gain: None, orthonormal: None }
    }

    fn found(h: &ModuleHealth) -> usize {
        h.intruders.as_ref().unwrap().found.len()
    }

    #[test]
    fn planted_intruders_are_counted() {
        let (data, l) = base();
        for n in 0..=4 {
            let (up, down) = planted(&l, n, 3.0, 1);
            let h = examine(&module(&data, &up, &down), &l, &Settings::default()).unwrap();
            let i = h.intruders.as_ref().unwrap();
            assert_eq!((found(&h), i.k), (n, 10), "{i:?}");
            // 1 / sqrt(12) = .29, a little more by what the base adds.
            assert!(i.found.iter().enumerate().all(|(j, d)| d.index == j && (d.sigma - 3.0).abs() < 0.2 && d.cosine < 0.4), "{i:?}");
            assert!(i.counts.is_sorted_by(|a, b| a.1 <= b.1) && i.counts[0] == (0.5, n));
            let verdict = verdict(&[h]);
            assert_eq!(verdict.lines.iter().any(|x| x.starts_with(&format!("intruders: {n} in 1 of 1"))), n > 0, "{verdict:?}");
        }
    }

    #[test]
    fn a_small_update_of_nearly_full_rank_is_benign() {
        let (data, l) = base();
        let (up, down) = (noise(OUT * 60, 0.0003, 3), noise(60 * IN, 1.0, 4));
        let h = examine(&module(&data, &up, &down), &l, &Settings::default()).unwrap();
        let u = h.update.as_ref().unwrap();
        assert_eq!((found(&h), u.numerical_rank), (0, 60));
        assert!((0.02..0.2).contains(&u.relative_norm), "{}", u.relative_norm);
        assert_eq!(verdict(&[h]).level, Level::Advice);
    }

    #[test]
    fn a_gain_scales_rows_of_the_sum() {
        let (data, l) = base();
        let (up, down) = planted(&l, 1, 3.0, 1);
        let even = vec![2.0f32; OUT];
        let with = |gain| Module { gain, ..module(&data, &up, &down) };
        let (plain, doubled) = (with(None), with(Some(even.as_slice())));
        let of = |m: &Module<'_>| examine(m, &l, &Settings::default()).unwrap().intruders.unwrap().found[0];
        let (a, b) = (of(&plain), of(&doubled));
        assert!((b.sigma - 2.0 * a.sigma).abs() < 1e-5 && (a.cosine - b.cosine).abs() < 1e-5, "{a:?} {b:?}");
        // A gain that leaves 3 rows makes intruders by itself, without an update.
        let few: Vec<f32> = (0..OUT).map(|i| if i < 3 { 1.0 } else { 0.0 }).collect();
        let zero = vec![0.0; up.len()];
        let m = Module { up: &zero, ..with(Some(few.as_slice())) };
        let h = examine(&m, &l, &Settings::default()).unwrap();
        assert_eq!((found(&h), h.intruders.as_ref().unwrap().k), (3, 3));
        assert_eq!(h.scale.unwrap().gain, Some((0.0, 1.0)));
    }

    #[test]
    fn what_is_not_finite_is_placed_and_not_decomposed() {
        let (data, l) = base();
        let (mut up, down) = planted(&l, 1, 3.0, 1);
        (up[2 * 2 + 1], up[9 * 2]) = (f32::NAN, f32::INFINITY);
        let bad = module(&data, &up, &down);
        let h = examine(&bad, &l, &Settings::default()).unwrap();
        assert_eq!(h.not_finite, [NotFinite { part: "up", count: 2, row: 2, column: 1 }]);
        assert!(h.update.is_none() && h.intruders.is_none());
        let v = verdict(&[h]);
        assert_eq!((v.level, v.lines[0].contains("do not serve")), (Level::Refuse, true), "{v:?}");
        // Finite factors whose product is not.
        let huge = vec![3e38; OUT];
        let h = examine(&module(&data, &huge, &vec![10.0; IN]), &l, &Settings::default()).unwrap();
        assert_eq!(h.not_finite[0], NotFinite { part: "tuned", count: OUT * IN, row: 0, column: 0 });
        let short = examine(&module(&data, &huge[1..], &vec![10.0; IN]), &l, &Settings::default());
        assert!(matches!(short, Err(Error::Shape { part: "up", .. })));
        let zero = examine(&module(&data, &vec![0.0; OUT], &vec![1.0; IN]), &l, &Settings::default()).unwrap();
        assert!(zero.intruders.is_none() && verdict(&[zero]).lines[1].starts_with("zero: 1 of 1"));
    }

    #[test]
    fn drift_is_the_distance_from_orthonormal() {
        let (data, l) = base();
        let t = top(Dense { rows: OUT, cols: IN, data: &data }, 4).unwrap();
        let b: Vec<f32> = t.u.iter().map(|&x| x as f32).collect();
        let a: Vec<f32> = (0..4 * IN).map(|x| t.v[x % IN * 4 + x / IN] as f32).collect();
        let (up, down) = planted(&l, 0, 0.0, 1);
        let of = |a: &[f32]| {
            let m = Module { orthonormal: Some(Orthonormal { a, b: &b }), ..module(&data, &up, &down) };
            examine(&m, &l, &Settings::default()).unwrap()
        };
        let none = of(&a).drift.unwrap();
        assert!(none.a < 1e-6 && none.b < 1e-6, "{none:?}");
        let off = of(&a.iter().map(|x| x * 1.1).collect::<Vec<_>>());
        // Each diagonal element is 1.21.
        assert!((off.drift.as_ref().unwrap().a - 0.42).abs() < 1e-5);
        assert!(verdict(&[off]).lines[0].starts_with("drift: "));
    }
}
