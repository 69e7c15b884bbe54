//! An adapter's module with its intruders scaled down.

use serde::Serialize;

use super::health::{Error, Module, Settings, failed, leading, wide};
use super::left::Left;
use super::spectrum::{Dense, refactor};

/// An update with its intruders scaled down.
#[derive(Clone, Debug, Serialize)]
pub struct Repaired {
    /// `[r][in]`.
    pub down: Vec<f32>,
    /// `[out][r]`, scale still folded in: divide by it to store an adapter that has one.
    pub up: Vec<f32>,
    /// Intruders before and after, the latter as served with the factors above.
    pub before: usize,
    pub after: usize,
    /// Share of the repaired update's squared norm that rank `r` holds.
    pub kept_energy: f64,
    /// Norm of the repaired update over the former one's.
    pub relative_norm: f64,
}

/// Scales the singular values of the tuned weights' intruders by `lambda`, 0 to 1 (1 changes nothing; the paper's .3 costs little
/// accuracy), subtracts the base and keeps the best update of the module's rank, as PEFT's `reduce_intruder_dimension` does, which
/// takes .75. Without intruders the factors stay what they are. `W' - (1 - lambda) U S V^T - W` has rank `r` and one more for each
/// intruder, so it is decomposed exactly and never formed. Under a gain the rows of `U` are divided by it.
/// The gain stays what it is: a DoRA magnitude to be stored with the new factors is the gain times the new rows' norms.
/// Costs two examinations' [`super::spectrum::top`].
///
/// Scaling a direction down lets others into the `k` leading ones: `after` need not be zero.
///
/// # Errors
/// Those of [`super::health::examine`], and `Repair` for numbers that are not finite or another `lambda`.
pub fn repair(module: &Module<'_>, base: &Left, settings: &Settings, lambda: f64) -> Result<Repaired, Error> {
    let rank = module.rank(base)?;
    let tuned = module.tuned(rank);
    if !(0.0..=1.0).contains(&lambda) || !module.not_finite(rank).is_empty() || tuned.iter().any(|x| !x.is_finite()) {
        return Err(Error::Repair { module: module.name.to_owned() });
    }
    let Dense { rows: out, cols: inner, .. } = module.base;
    let tuned = Dense { data: &tuned, ..module.base };
    let (dimensions, t) = leading(tuned, base, settings.k).map_err(failed(module))?;
    let intruders: Vec<usize> = dimensions.iter().filter(|d| d.cosine < settings.epsilon).map(|d| d.index).collect();
    let (down, up) = (module.down.to_vec(), module.up.to_vec());
    if intruders.is_empty() {
        return Ok(Repaired { down, up, before: 0, after: 0, kept_energy: 1.0, relative_norm: 1.0 });
    }
    let (n, k) = (t.s.len(), rank + intruders.len());
    let mut wider = Vec::with_capacity(out * k);
    for i in 0..out {
        wider.extend(wide(&up[i * rank..(i + 1) * rank]));
        // A row without gain is zero in what is served, and so in U.
        let gain = module.gain.map_or(1.0, |g| f64::from(g[i]));
        let share = if gain == 0.0 { 0.0 } else { (lambda - 1.0) / gain };
        wider.extend(intruders.iter().map(|&j| share * t.s[j] * t.u[i * n + j]));
    }
    let mut taller = wide(&down);
    taller.extend(intruders.iter().flat_map(|&j| (0..inner).map(move |c| (c, j))).map(|(c, j)| t.v[c * n + j]));
    let mut new = refactor(&wider, &taller, out, k, inner).map_err(failed(module))?;
    let energy = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
    let whole = energy(&new.s);
    new.truncate(rank);
    let old = energy(&refactor(&wide(&up), &wide(&down), out, rank, inner).map_err(failed(module))?.s);
    let (mut up, mut down) = (vec![0.0; out * rank], vec![0.0; rank * inner]);
    // A side shorter than the rank leaves the rest zero.
    let (u, d) = new.balanced();
    let m = new.s.len();
    u.chunks_exact(m).zip(up.chunks_exact_mut(rank)).for_each(|(from, to)| to.iter_mut().zip(from).for_each(|(t, &f)| *t = f as f32));
    down.iter_mut().zip(&d).for_each(|(t, &f)| *t = f as f32);
    let served = Module { down: &down, up: &up, ..*module }.tuned(rank);
    let (dimensions, _) = leading(Dense { data: &served, ..module.base }, base, settings.k).map_err(failed(module))?;
    let after = dimensions.iter().filter(|d| d.cosine < settings.epsilon).count();
    let share = |of: f64| if of > 0.0 { energy(&new.s) / of } else { 1.0 };
    let (kept_energy, relative_norm) = (share(whole), share(old).sqrt());
    Ok(Repaired { down, up, before: intruders.len(), after, kept_energy, relative_norm })
}

#[cfg(test)]
mod tests {
    use super::super::health::tests::{IN, OUT, base, module, planted};
    use super::super::spectrum::{Triplets, top};
    use super::*;

    #[test]
    fn a_repair_removes_intruders_and_keeps_the_rest() {
        let (data, l) = base();
        let (up, down) = planted(&l, 3, 3.0, 1);
        let m = module(&data, &up, &down);
        let r = repair(&m, &l, &Settings::default(), 0.02).unwrap();
        assert_eq!((r.before, r.after), (3, 0));
        assert!(r.kept_energy > 0.5 && r.kept_energy <= 1.0 && r.relative_norm < 0.2, "{} {}", r.kept_energy, r.relative_norm);
        // 1 changes nothing, up to the factors' turn.
        let same = repair(&m, &l, &Settings::default(), 1.0).unwrap();
        let (a, b) = (m.tuned(4), module(&data, &same.up, &same.down).tuned(4));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
        assert_eq!((same.before, same.after), (3, 3));
        // In between, what PEFT computes: the best rank 4 of W' - (1 - lambda) U S V^T - W.
        let half = repair(&m, &l, &Settings::default(), 0.5).unwrap();
        let t = top(Dense { rows: OUT, cols: IN, data: &a }, 3).unwrap();
        let delta = |x: usize| {
            let (i, c) = (x / IN, x % IN);
            let cut: f64 = (0..3).map(|j| 0.5 * t.s[j] * t.u[i * 3 + j] * t.v[c * 3 + j]).sum();
            (f64::from(a[x]) - cut - f64::from(data[x])) as f32
        };
        let delta: Vec<f32> = (0..OUT * IN).map(delta).collect();
        let best = top(Dense { rows: OUT, cols: IN, data: &delta }, 4).unwrap();
        let got = refactor(&wide(&half.up), &wide(&half.down), OUT, 4, IN).unwrap();
        let product = |t: &Triplets, x: usize| (0..4).map(|j| t.s[j] * t.u[x / IN * 4 + j] * t.v[x % IN * 4 + j]).sum::<f64>();
        assert!((0..OUT * IN).all(|x| (product(&best, x) - product(&got, x)).abs() < 1e-5));
        assert!(matches!(repair(&m, &l, &Settings::default(), 1.5), Err(Error::Repair { .. })));
    }

    #[test]
    fn under_a_gain_it_is_the_served_weights_that_are_repaired() {
        let (data, l) = base();
        let (up, down) = planted(&l, 1, 3.0, 1);
        let uneven: Vec<f32> = (0..OUT).map(|i| 0.5 + i as f32 / OUT as f32).collect();
        let m = Module { gain: Some(&uneven), ..module(&data, &up, &down) };
        let r = repair(&m, &l, &Settings::default(), 0.05).unwrap();
        assert_eq!((r.before, r.after), (1, 0), "{r:?}");
    }

    #[test]
    fn without_intruders_nothing_changes_and_without_numbers_nothing_is_repaired() {
        let (data, l) = base();
        let (mut up, down) = planted(&l, 0, 0.0, 1);
        let r = repair(&module(&data, &up, &down), &l, &Settings::default(), 0.5).unwrap();
        assert_eq!((r.before, &r.up, &r.down), (0, &up, &down));
        up[3] = f32::NAN;
        assert!(matches!(repair(&module(&data, &up, &down), &l, &Settings::default(), 0.5), Err(Error::Repair { .. })));
    }
}
