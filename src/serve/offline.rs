//! Commands that need no running server: `plan` and `compress`, which `train` carries on.

use std::collections::HashSet;
use std::io::Write;
use std::time::Instant;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::compress::artifact::Artifact;
use crate::config::Settings;
use crate::config::args::{self, ServeFlags};
use crate::config::profiles::{BUDGETED, budget};
use crate::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Size};
use crate::model::checkpoint;
use crate::model::decoder::Decoder;
use crate::model::weights::LoadDtype;
use crate::ops::cpu::Cpu;
use crate::plan::{Ask, PlannedProfile, plan as arithmetic};
use crate::serve::ready::{self, Calibration, Source, Text};
use crate::serve::{check_arena, train, work_on};

/// Bytes of the cache that are planned with where nobody says how many.
const PLANNED: u64 = 4 << 30;

/// `strait plan`: what fits, as a table or JSON.
///
/// # Errors
/// Where the model's folder cannot be opened, or output cannot be written.
pub fn plan(ask: &args::Plan) -> anyhow::Result<()> {
    let settings = Settings::resolve(&ServeFlags {
        config: ask.config.clone(),
        compression: ask.compression.clone(),
        dtype: ask.dtype,
        kv_cache_memory_bytes: ask.kv_cache_memory_bytes,
        ..ServeFlags::default()
    })?;
    if ask.lengths.contains(&0) {
        bail!("--lengths has 0; a request has at least one token");
    }
    let arena_bytes = settings.kv_cache_memory_bytes.unwrap_or(PLANNED);
    check_arena(arena_bytes)?;
    let (mut model, window, stored, (specs, artifact)) = match &ask.model {
        // Before a model is downloaded, its configuration says what will fit. What an artifact is of, only weights say.
        Some(dir)
            if settings.compression.is_none()
                && let Some(known) = checkpoint::without_weights(dir)? =>
        {
            let stored = known.dtype.as_deref().map(|name| if name == "bfloat16" { ExactType::Bf16 } else { ExactType::F32 });
            (known.config, known.sliding_window, stored, (settings.profiles.clone(), None))
        }
        model => {
            let opened = Source::of(model.as_ref()).open()?;
            let checkpoint = opened.checkpoint;
            let stored = ready::exact_type(checkpoint, LoadDtype::Auto);
            (checkpoint.config.clone(), checkpoint.sliding_window, Some(stored), ready::described(&opened, &settings)?)
        }
    };
    // Of the lengths that a server would take, and what it would refuse is not planned with.
    model.max_positions = window.map_or(model.max_positions, |window| window.min(model.max_positions));
    if let Some(asked) = settings.max_model_len.map(|n| n as usize) {
        if asked > model.max_positions {
            bail!("max-model-len is {asked}, and the model computes up to {} positions as it was made to; lower it", model.max_positions);
        }
        model.max_positions = asked;
    }
    let exact = match settings.dtype {
        LoadDtype::Bf16 => ExactType::Bf16,
        LoadDtype::F32 => ExactType::F32,
        LoadDtype::Auto => stored.context("config.json does not say of which type the weights are; give --dtype")?,
    };
    let mut profiles = Vec::new();
    for profile in specs {
        ready::check_basis(&profile, &model)?;
        let computed = profile.cskv.as_ref().is_some_and(|c| c.basis.is_computed());
        let widths = match artifact.as_ref().filter(|_| computed).map(|a| a.widths(&profile)) {
            Some(Ok(widths)) => Some(widths),
            Some(Err(e)) if settings.compression.is_some() => return Err(e.into()),
            // What is built in does not have it: it would be computed at start.
            _ => None,
        };
        if let (None, Some(Cskv { size: Size::Budget(_), .. })) = (&widths, &profile.cskv) {
            bail!(
                "cache profile {:?} is a budget, which an artifact spreads: make one with `strait compress` and give it with --compression",
                profile.name
            );
        }
        profiles.push(PlannedProfile { profile, widths });
    }
    let mut seen = HashSet::new();
    let lengths: Vec<u32> = ask.lengths.iter().copied().filter(|&n| seen.insert(n)).collect();
    let plan = arithmetic(&Ask { model: &model, exact, profiles: &profiles, arena_bytes, lengths: &lengths });
    let text = if ask.json { serde_json::to_string_pretty(&plan)? } else { plan.to_string() };
    writeln!(std::io::stdout(), "{}", text.trim_end())?;
    Ok(())
}

/// `strait compress`: closed-form bases for every compressed profile, some perhaps trained from there, written as one artifact.
///
/// # Errors
/// Where the model or the text cannot be read, the text is too short, the artifact cannot be written, or training fails.
pub fn compress(ask: &args::Compress) -> anyhow::Result<()> {
    // Before what may take an hour.
    Artifact::check_place(&ask.out)?;
    let mut settings =
        Settings::resolve(&ServeFlags { config: ask.config.clone(), threads: ask.threads, dtype: ask.dtype, ..ServeFlags::default() })?;
    work_on(settings.threads);
    let opened = Source::of(ask.model.as_ref()).open()?;
    let exact = ready::exact_type(opened.checkpoint, settings.dtype);
    let full = PageLayout::new(&opened.checkpoint.config, exact, &Profile { name: "full".into(), cskv: None }, None).bytes_per_token();
    let shares = BUDGETED.into_iter().filter(|(name, ..)| !ask.uniform && !settings.defined.iter().any(|d| d == name));
    let shares = shares.map(|(name, share, basis)| budget(name.to_owned(), (full * share) as u32, full, basis));
    let named = ask.budget.iter().map(|&bytes| budget(format!("budget-{bytes}"), bytes, full, BasisKind::Frequency));
    for profile in shares.chain(named).collect::<Vec<_>>() {
        match settings.profiles.iter_mut().find(|p| p.name == profile.name) {
            Some(known) => *known = profile,
            None => settings.profiles.push(profile),
        }
    }
    let text = match &ask.text {
        None => None,
        Some(path) => {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read the calibration text {}", path.display()))?;
            Some(String::from_utf8(bytes).map_err(|e| {
                anyhow::anyhow!("the calibration text {} is not UTF-8 (byte {}); convert it", path.display(), e.utf8_error().valid_up_to())
            })?)
        }
    };
    let ops = Cpu::new(settings.threads);
    // No text is longer than the model computes as it was made to.
    let positions = opened.checkpoint.positions().min(ask.tokens.max(1));
    let mut decoder = Decoder::new(&opened.checkpoint.config, ready::weights(&opened, settings.dtype), positions, 512);
    for profile in &settings.profiles {
        ready::check_basis(profile, &opened.checkpoint.config)?;
    }
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg} {bar:32} {pos}/{len}, {eta} left").expect("a valid template"));
    let progress = |what: &'static str, seen: usize, total: usize| {
        if bar.message() != what {
            bar.set_message(what);
            bar.reset_eta();
        }
        bar.set_length(total as u64);
        bar.set_position(seen as u64);
    };
    let begun = Instant::now();
    let source = text.as_deref().map_or(Text::Sampled(ask.seed), Text::Given);
    let how = Calibration { text: source, tokens: Some(ask.tokens), init: ask.init.into(), progress: &progress };
    if let (Some(steps), Some(dir)) = (ask.train.train_steps, &ask.train.train_dir) {
        return train::compress(ask, (steps, dir), &settings, &opened, (&mut decoder, &ops), (&how, &bar));
    }
    let (calibrated, tokens) = ready::compute(&opened, &mut decoder, &ops, &settings.profiles, &how)?;
    bar.finish_and_clear();
    let artifact: &Artifact = &calibrated.artifact;
    artifact.write(&ask.out)?;
    let mut out = std::io::stdout();
    let of = match (&ask.text, &opened.source) {
        (Some(path), _) => path.display().to_string(),
        (None, Source::Demo) => "built-in prompts of the demo model's kind".to_owned(),
        (None, Source::Folder(_)) => "text the model said itself".to_owned(),
    };
    writeln!(out, "calibrated on {tokens} tokens of {of} in {:.1} s", begun.elapsed().as_secs_f64())?;
    for energy in &calibrated.energy {
        writeln!(out, "{energy}")?;
    }
    writeln!(out, "wrote {} ({} bytes)", ask.out.display(), std::fs::metadata(&ask.out)?.len())?;
    Ok(())
}
