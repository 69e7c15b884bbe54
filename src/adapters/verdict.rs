//! What to tell a person about an adapter's health.

use serde::Serialize;

use super::health::ModuleHealth;
use super::update::Update;

/// How bad it is, in rising order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Healthy,
    /// Nothing is wrong, something could be better.
    Advice,
    Warning,
    /// Not to be served.
    Refuse,
}

/// What to tell a person about an adapter.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The worst of the lines.
    pub level: Level,
    /// Sentences, the worst first.
    pub lines: Vec<String>,
}

/// An update as large as this share of its base is no fine-tuning.
const LARGE: f64 = 0.5;
/// `|A A^T - I|_F / sqrt(r)` above this: columns are off from unit length or each other by a tenth.
const DRIFT: f64 = 0.1;
/// The largest finite half-precision number.
const HALF: f64 = 65504.0;
/// Modules that a line names, at most.
const NAMED: usize = 3;

/// A verdict on all modules of an adapter. The same for any order of them.
pub fn verdict(modules: &[ModuleHealth]) -> Verdict {
    let all = modules.len();
    let mut lines: Vec<(Level, String)> = Vec::new();
    // Those with a positive measure, the worst first, with their names.
    let pick = |measure: &dyn Fn(&ModuleHealth) -> f64| {
        let mut hit: Vec<(f64, &str)> = modules.iter().map(|m| (measure(m), m.name.as_str())).filter(|x| x.0 > 0.0).collect();
        hit.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        let named: Vec<&str> = hit.iter().take(NAMED).map(|x| x.1).collect();
        let more = hit.len().saturating_sub(NAMED);
        let names = named.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() };
        (hit.len(), hit.iter().map(|x| x.0).sum::<f64>(), hit.first().map_or(0.0, |x| x.0), names)
    };
    let update = |f: fn(&Update) -> f64| move |m: &ModuleHealth| m.update.as_ref().map_or(0.0, f);

    let (n, count, _, names) = pick(&|m| m.not_finite.iter().map(|x| x.count as f64).sum());
    if n > 0 {
        lines.push((Level::Refuse, format!("not finite: {count} numbers in {n} of {all} modules ({names}): do not serve")));
    }
    let (n, count, _, names) = pick(&|m| m.intruders.as_ref().map_or(0.0, |i| i.found.len() as f64));
    if let Some(i) = modules.iter().find_map(|m| m.intruders.as_ref()).filter(|_| n > 0) {
        let text = format!(
            "intruders: {count} in {n} of {all} modules, most in {names}: leading directions whose cosine with each of the base's is \
             below {}, which goes with forgetting; consider --repair",
            i.epsilon
        );
        lines.push((Level::Warning, text));
    }
    let (n, _, worst, names) = pick(&|m| m.update.as_ref().map_or(0.0, |u| if u.relative_norm > LARGE { u.relative_norm } else { 0.0 }));
    if n > 0 {
        let text = format!("large: updates of up to {worst:.2} of the base's norm in {n} of {all} modules ({names}): check the scale");
        lines.push((Level::Warning, text));
    }
    let drift = |m: &ModuleHealth| m.drift.as_ref().map_or(0.0, |d| d.a.max(d.b));
    let (n, _, worst, names) = pick(&|m| if drift(m) > DRIFT * (m.rank as f64).sqrt() { drift(m) } else { 0.0 });
    if n > 0 {
        let text = format!(
            "drift: sides up to {worst:.3} from orthonormal in {n} of {all} modules ({names}): trained with too weak a regulariser"
        );
        lines.push((Level::Warning, text));
    }
    let (n, _, worst, names) = pick(&|m| m.scale.as_ref().map_or(0.0, |s| if s.largest > HALF { s.largest } else { 0.0 }));
    if n > 0 {
        lines.push((
            Level::Warning,
            format!("overflow: entries of up to {worst:.3e} in {n} of {all} modules ({names}) do not fit half precision"),
        ));
    }
    let (n, _, _, names) = pick(&|m| m.update.as_ref().map_or(0.0, |u| f64::from(u8::from(u.norm == 0.0))));
    if n > 0 {
        lines.push((Level::Advice, format!("zero: {n} of {all} modules ({names}) change nothing and can be left out")));
    }
    let most = |f: fn(&Update) -> f64| pick(&update(f)).2;
    let rank = modules.iter().filter(|m| m.update.is_some()).map(|m| m.rank).max().unwrap_or(0);
    let (lossless, nearly) = (most(|u| u.numerical_rank as f64) as usize, most(|u| u.rank_99 as f64) as usize);
    if (1..rank).contains(&lossless) {
        lines.push((Level::Advice, format!("rank can be cut from {rank} to {lossless} without loss")));
    }
    if (1..rank.min(lossless)).contains(&nearly) {
        lines.push((Level::Advice, format!("rank can be cut from {rank} to {nearly} with 99 % of each module's energy kept")));
    }
    lines.sort_by_key(|line| std::cmp::Reverse(line.0));
    let level = lines.first().map_or(Level::Healthy, |line| line.0);
    if level <= Level::Advice {
        let text =
            if all == 0 { "healthy: no modules".to_owned() } else { format!("healthy: no intruders in {all} modules, all numbers finite") };
        lines.insert(0, (Level::Healthy, text));
    }
    Verdict { level, lines: lines.into_iter().map(|line| line.1).collect() }
}

#[cfg(test)]
mod tests {
    use super::super::health::tests::{base, module, planted};
    use super::super::health::{Settings, examine};
    use super::*;

    #[test]
    fn the_worst_comes_first_whatever_the_order() {
        let (data, l) = base();
        let of = |name: &str, n: usize, nan: bool| {
            let (mut up, down) = planted(&l, n, 3.0, 1);
            up[0] = if nan { f32::NAN } else { up[0] };
            let m = super::super::health::Module { name, ..module(&data, &up, &down) };
            examine(&m, &l, &Settings::default()).unwrap()
        };
        let mut all = vec![of("a", 0, false), of("b", 1, false), of("c", 3, false), of("d", 0, true), of("e", 1, false), of("f", 1, false)];
        let v = verdict(&all);
        assert_eq!(v.level, Level::Refuse);
        assert_eq!(v.lines[0], "not finite: 1 numbers in 1 of 6 modules (d): do not serve");
        assert!(v.lines[1].starts_with("intruders: 6 in 4 of 6 modules, most in c, b, e and 1 more: "), "{v:?}");
        all.reverse();
        assert_eq!(verdict(&all).lines, v.lines);
        let v = verdict(&all[5..]);
        assert_eq!(
            (v.level, v.lines.as_slice()),
            (Level::Healthy, ["healthy: no intruders in 1 modules, all numbers finite".to_owned()].as_slice())
        );
    }
}
