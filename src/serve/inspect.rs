//! `strait adapter inspect`: the spectral health of an adapter, and a repaired copy of it.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::adapters::health::{Module, ModuleHealth, Orthonormal, Settings, examine};
use crate::adapters::pack::{base_weight, gains};
use crate::adapters::repair::repair;
use crate::adapters::spectrum::Dense;
use crate::adapters::verdict::{Level, verdict};
use crate::adapters::{Place, Read, heatmap, write};
use crate::config::args::AdapterInspect;
use crate::serve::adapters::{base_of, reader};

/// The report, as text or JSON; writes what else was asked for.
///
/// # Errors
/// Where the adapter cannot be read or examined, or something cannot be written.
pub fn inspect(ask: &AdapterInspect) -> anyhow::Result<String> {
    let (epsilon, lambda) = (ask.epsilon, ask.lambda);
    if !(epsilon > 0.0 && epsilon <= 1.0) {
        bail!("--epsilon is {epsilon}; it must be above 0 and at most 1");
    }
    if !(0.0..=1.0).contains(&lambda) {
        bail!("--lambda is {lambda}; it must be from 0 to 1");
    }
    if let Some(out) = ask.repair.as_ref().filter(|out| out.exists()) {
        bail!("--repair {} is there already; name a new folder", out.display());
    }
    let (base, spectra) = base_of(&ask.folder)?;
    let Read { mut parsed, digest, path } = reader(&ask.folder, base, &spectra).read(&ask.folder.path, &ask.folder.base)?;
    let mut settings = Settings { k: usize::from(ask.k), epsilon, ..Settings::default() };
    if !settings.epsilons.contains(&epsilon) {
        settings.epsilons.push(epsilon);
        settings.epsilons.sort_by(f64::total_cmp);
    }
    let linear: Vec<Place> = parsed.modules.iter().filter(|(p, m)| m.rank > 0 && **p != Place::Embed).map(|(p, _)| *p).collect();
    let bar = ProgressBar::new(linear.len() as u64);
    bar.set_style(ProgressStyle::with_template("{msg} {bar:32} {pos}/{len}, {eta} left").expect("a valid template"));
    let mut health: Vec<ModuleHealth> = Vec::new();
    let mut repaired = Vec::new();
    for place in linear {
        let name = place.path();
        bar.set_message(name.clone());
        let (rows, cols) = place.shape(&base.config);
        let own = base_weight(base, place);
        let left = spectra.left(base, place)?;
        let parts = &parsed.modules[&place];
        let gain = gains(place, parts, base)?;
        let orthonormal = parts.triple.as_ref().map(|t| Orthonormal { a: &t.a, b: &t.b });
        let dense = Dense { rows, cols, data: &own };
        let module = Module { name: &name, base: dense, down: &parts.down, up: &parts.up, gain: gain.as_deref(), orthonormal };
        let one = examine(&module, &left, &settings)?;
        if ask.repair.is_some() && one.intruders.as_ref().is_some_and(|i| !i.found.is_empty()) {
            let done = repair(&module, &left, &settings, lambda)?;
            repaired.push(json!({
                "name": name,
                "before": done.before,
                "after": done.after,
                "kept_energy": done.kept_energy,
                "relative_norm": done.relative_norm,
            }));
            let parts = parsed.modules.get_mut(&place).expect("it was just there");
            (parts.down, parts.up, parts.triple) = (done.down, done.up, None);
            if let Some(gain) = gain {
                // The magnitude that gives the new rows the old gain.
                let norms = crate::adapters::pack::row_norms(&own, parts, (rows, cols));
                parts.magnitude = Some(gain.iter().zip(norms).map(|(g, n)| (f64::from(*g) * n) as f32).collect());
            }
        }
        health.push(one);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let verdict = verdict(&health);
    if let Some(svg) = &ask.svg {
        let title =
            format!("{} ({})", path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()), parsed.format.name());
        std::fs::write(svg, heatmap::svg(&health, &title)).with_context(|| format!("cannot write {}", svg.display()))?;
    }
    if let Some(out) = &ask.repair {
        write::write(&parsed, &base.config, out)?;
    }
    if ask.folder.json {
        let hex: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
        let told = json!({
            "path": path.display().to_string(),
            "generation": hex,
            "format": parsed.format.name(),
            "settings": settings,
            "verdict": verdict,
            "modules": health,
            "repaired": ask.repair.as_ref().map(|out| json!({"path": out.display().to_string(), "lambda": lambda, "modules": repaired})),
        });
        return Ok(format!("{told:#}\n"));
    }
    let mut out = table(&health);
    let level = match verdict.level {
        Level::Healthy => "healthy",
        Level::Advice => "advice",
        Level::Warning => "warning",
        Level::Refuse => "do not serve",
    };
    writeln!(out, "verdict: {level}")?;
    verdict.lines.iter().try_for_each(|line| writeln!(out, "  {line}"))?;
    if let Some(to) = &ask.repair {
        let sum = |key: &str| repaired.iter().filter_map(|r| r[key].as_u64()).sum::<u64>();
        writeln!(
            out,
            "repaired: {} modules, intruders {} to {}, scaled by {lambda}; written to {}",
            repaired.len(),
            sum("before"),
            sum("after"),
            shown(to)
        )?;
    }
    Ok(out)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// One row a module.
fn table(health: &[ModuleHealth]) -> String {
    let mut rows =
        vec![["module", "rank", "effective", "90 %", "|D|/|W|", "overlap", "chance", "intruders", "least cosine"].map(str::to_owned)];
    for m in health {
        let update = m.update.as_ref();
        let number = |f: &dyn Fn(&crate::adapters::update::Update) -> String| update.map_or_else(|| "-".to_owned(), f);
        let found = m.intruders.as_ref();
        rows.push([
            m.name.clone(),
            m.rank.to_string(),
            number(&|u| format!("{:.1}", u.effective_rank)),
            number(&|u| u.rank_90.to_string()),
            number(&|u| format!("{:.4}", u.relative_norm)),
            number(&|u| format!("{:.2}", u.overlap)),
            number(&|u| format!("{:.2}", u.chance)),
            found.map_or_else(|| "-".into(), |i| i.found.len().to_string()),
            found.and_then(|i| i.found.iter().map(|d| d.cosine).min_by(f64::total_cmp)).map_or_else(|| "-".into(), |c| format!("{c:.2}")),
        ]);
    }
    let widths: Vec<usize> = (0..9).map(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, w))| if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") })
            .collect();
        out += cells.join("  ").trim_end();
        out.push('\n');
    }
    out
}
