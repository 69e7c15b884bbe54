//! Commands that need no running server: `plan` and `compress`, which `train` carries on.

use std::io::Write;
use std::time::Instant;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

use crate::compress::artifact::Artifact;
use crate::config::args::{self, Bytes, DtypeArg, ServeFlags};
use crate::config::{ConfigError, Settings};
use crate::kv::layout::ExactType;
use crate::model::decoder::Decoder;
use crate::model::weights::LoadDtype;
use crate::ops::cpu::Cpu;
use crate::plan::{Ask, PlannedProfile, plan as arithmetic};
use crate::serve::ready::{self, Source};
use crate::serve::train;

/// How the progress of calibration is shown.
pub(super) const CALIBRATING: &str = "calibrating {bar:32} {pos}/{len} tokens, {eta} left";

/// Settings of a command that shares only some flags with a server.
fn settings(config: Option<&std::path::PathBuf>, threads: Option<usize>) -> Result<Settings, ConfigError> {
    Settings::resolve(&ServeFlags { config: config.cloned(), threads, ..ServeFlags::default() })
}

/// `strait plan`: what fits, as a table or JSON.
///
/// # Errors
/// Where the model's folder cannot be opened, or output cannot be written.
pub fn plan(ask: &args::Plan) -> anyhow::Result<()> {
    let settings = settings(ask.config.as_ref(), None)?;
    let opened = Source::of(ask.model.as_ref()).open()?;
    let model = &opened.checkpoint.config;
    let exact = match ask.dtype {
        DtypeArg::Bf16 => ExactType::Bf16,
        DtypeArg::F32 => ExactType::F32,
        DtypeArg::Auto => ready::exact_type(&ready::weights(&opened, LoadDtype::Auto)),
    };
    let mut profiles = Vec::new();
    for profile in settings.profiles {
        ready::check_basis(&profile, model.kv_heads)?;
        profiles.push(PlannedProfile { profile, ranks: None });
    }
    let Bytes(arena_bytes) = ask.kv_cache_memory_bytes;
    let mut lengths: Vec<u32> = ask.lengths.iter().copied().filter(|&n| n > 0).collect();
    lengths.dedup();
    let plan = arithmetic(&Ask { model, exact, profiles: &profiles, arena_bytes, lengths: &lengths });
    let text = if ask.json { serde_json::to_string_pretty(&plan)? } else { plan.to_string() };
    writeln!(std::io::stdout(), "{}", text.trim_end())?;
    Ok(())
}

/// `strait compress`: closed-form bases for every compressed profile, some perhaps trained from there, written as one artifact.
///
/// # Errors
/// Where the model or the text cannot be read, the text is too short, the artifact cannot be written, or training fails.
pub fn compress(ask: &args::Compress) -> anyhow::Result<()> {
    let settings = settings(ask.config.as_ref(), ask.threads)?;
    let opened = Source::of(ask.model.as_ref()).open()?;
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
    let positions = opened.checkpoint.config.max_positions.min(ask.tokens.max(1));
    let mut decoder = Decoder::new(&opened.checkpoint.config, ready::weights(&opened, LoadDtype::Auto), positions, 512);
    for profile in &settings.profiles {
        ready::check_basis(profile, opened.checkpoint.config.kv_heads)?;
    }
    if let (Some(steps), Some(dir)) = (ask.train.train_steps, &ask.train.train_dir) {
        return train::compress(ask, (steps, dir), &settings, &opened, (&mut decoder, &ops), text.as_deref());
    }
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(CALIBRATING).expect("a valid template"));
    let progress = |seen: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(seen as u64);
    };
    let begun = Instant::now();
    let (calibrated, tokens) =
        ready::compute(&opened, &mut decoder, &ops, &settings.profiles, text.as_deref(), Some((ask.tokens, &progress)), ask.init)?;
    bar.finish_and_clear();
    let artifact: &Artifact = &calibrated.artifact;
    artifact.write(&ask.out)?;
    let mut out = std::io::stdout();
    writeln!(out, "calibrated on {tokens} tokens in {:.1} s", begun.elapsed().as_secs_f64())?;
    for energy in &calibrated.energy {
        writeln!(out, "{energy}")?;
    }
    writeln!(out, "wrote {} ({} bytes)", ask.out.display(), std::fs::metadata(&ask.out)?.len())?;
    Ok(())
}
