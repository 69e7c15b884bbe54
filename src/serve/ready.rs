//! A model made ready: opened, typed, its cache profiles laid out and their bases read or computed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::calibrate::{self, Moments, Weighting, calibration_text, demo_prompts, tokens_needed};
use crate::compress::artifact::{Artifact, Fingerprint};
use crate::config::args::InitArg;
use crate::demo;
use crate::ids::TokenId;
use crate::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile};
use crate::model::checkpoint::Checkpoint;
use crate::model::decoder::{Decoder, ReadyProfile};
use crate::model::weights::{Data, LoadDtype, ModelWeights};
use crate::ops::Ops;
use crate::text::Tokenizer;

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum Source {
    Demo,
    Folder(PathBuf),
}

/// A model's files, opened and checked. Leaked on purpose: a process serves one model for its life.
pub struct Opened {
    pub checkpoint: &'static Checkpoint,
    /// With its chat template, if there is one.
    pub tokenizer: Arc<Tokenizer>,
    /// Its name in the API unless the operator gives one.
    pub name: String,
    /// Its path, or the demo model's name.
    pub root: String,
    pub source: Source,
}

impl Source {
    /// The demo model when no folder is named.
    pub fn of(folder: Option<&PathBuf>) -> Source {
        folder.map_or(Source::Demo, |f| Source::Folder(f.clone()))
    }

    /// Opens and checks everything but the values of the weights.
    ///
    /// # Errors
    /// One sentence for the first thing that is missing, broken, or not supported.
    pub fn open(self) -> anyhow::Result<Opened> {
        let (checkpoint, tokenizer, name, root) = match &self {
            Source::Demo => (demo::checkpoint()?, demo::tokenizer()?, demo::NAME.to_owned(), demo::NAME.to_owned()),
            Source::Folder(dir) => (Checkpoint::open(dir)?, Tokenizer::open(dir)?, folder_name(dir), dir.display().to_string()),
        };
        tokenizer.check_vocab(checkpoint.config.vocab)?;
        for warning in checkpoint.warnings.iter().chain(&tokenizer.warnings) {
            tracing::warn!("{warning}");
        }
        Ok(Opened { checkpoint: Box::leak(Box::new(checkpoint)), tokenizer: Arc::new(tokenizer), name, root, source: self })
    }
}

/// The last part of a folder's real path: what its model is called unless the operator says otherwise.
pub fn folder_name(dir: &Path) -> String {
    let real = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    real.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// In which type exact keys and values are kept: that of the weights.
pub fn exact_type(weights: &ModelWeights<'_>) -> ExactType {
    match weights.embed.data {
        Data::Bf16(_) => ExactType::Bf16,
        Data::F32(_) => ExactType::F32,
    }
}

/// Where the bases of the compressed profiles came from, for the operator.
#[derive(Clone, Debug, PartialEq)]
pub enum Bases {
    /// No profile compresses.
    None,
    Artifact(String),
    /// Computed now, from so many calibration tokens in so many seconds.
    Computed {
        tokens: usize,
        seconds: f64,
    },
}

/// Lays out `profiles`, with bases from an artifact, or in closed form from calibration text.
///
/// # Errors
/// Where the artifact does not fit, or a profile asks for what the model does not have.
pub fn profiles(
    opened: &Opened,
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    exact: ExactType,
    profiles: &[Profile],
    compression: Option<&Path>,
) -> anyhow::Result<(Vec<ReadyProfile>, Bases)> {
    let model = &opened.checkpoint.config;
    for profile in profiles {
        check_basis(profile, model.kv_heads)?;
    }
    let fingerprint = Fingerprint(opened.checkpoint.digest());
    let (artifact, bases) = if profiles.iter().all(|p| p.cskv.is_none()) {
        (None, Bases::None)
    } else if let Some(path) = compression {
        (Some(Artifact::read(path, model, fingerprint)?), Bases::Artifact(path.display().to_string()))
    } else if let Some(artifact) = built_in(opened, fingerprint, profiles)? {
        (Some(artifact), Bases::Artifact("built in".into()))
    } else {
        let begun = Instant::now();
        let (calibrated, tokens) = compute(opened, decoder, ops, profiles, None, None, InitArg::Weighted)?;
        (Some(calibrated.artifact), Bases::Computed { tokens, seconds: begun.elapsed().as_secs_f64() })
    };
    let ready = profiles.iter().map(|profile| -> anyhow::Result<ReadyProfile> {
        let Some(artifact) = artifact.as_ref().filter(|_| profile.cskv.is_some()) else {
            return Ok(ReadyProfile { layout: PageLayout::new(model, exact, profile, None), compression: Vec::new() });
        };
        let ranks = artifact.ranks(profile)?;
        Ok(ReadyProfile { layout: PageLayout::new(model, exact, profile, Some(&ranks)), compression: artifact.layers(profile)? })
    });
    Ok((ready.collect::<anyhow::Result<_>>()?, bases))
}

/// The demo model's own artifact, where it serves all of these profiles.
fn built_in(opened: &Opened, fingerprint: Fingerprint, profiles: &[Profile]) -> anyhow::Result<Option<Artifact>> {
    if !matches!(opened.source, Source::Demo) {
        return Ok(None);
    }
    let artifact = Artifact::from_bytes(demo::ARTIFACT, &opened.checkpoint.config, fingerprint)?;
    Ok(profiles.iter().all(|p| artifact.layers(p).is_ok()).then_some(artifact))
}

/// Whether a profile's grouping divides the model's KV heads.
///
/// # Errors
/// One sentence that names both numbers.
pub fn check_basis(profile: &Profile, kv_heads: usize) -> anyhow::Result<()> {
    if let Some(Cskv { basis: BasisKind::Grouped(n), .. }) = profile.cskv
        && !kv_heads.is_multiple_of(n)
    {
        bail!("cache profile {:?} groups {n} KV heads, which do not divide the model's {kv_heads}; change its basis", profile.name);
    }
    Ok(())
}

/// Hears how many tokens are done, and of how many.
pub type Progress<'a> = dyn Fn(usize, usize) + 'a;

/// Bases in closed form for the compressed ones of `profiles`; also how many tokens were seen.
///
/// `text` is calibrated on, or the built-in text (and prompts of its own kind for the demo model). `limit` bounds the
/// tokens; without it, four times as many as the widest basis has directions, at least 1024.
///
/// # Errors
/// Where there is too little text, or the model makes numbers that are not finite.
pub fn compute(
    opened: &Opened,
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    profiles: &[Profile],
    text: Option<&str>,
    limit: Option<(usize, &Progress<'_>)>,
    init: InitArg,
) -> anyhow::Result<(calibrate::Calibrated, usize)> {
    let model = &opened.checkpoint.config;
    let cskv = || profiles.iter().filter_map(|p| p.cskv.as_ref());
    let need = cskv()
        .flat_map(|c| <[usize; 2]>::from(c.ranks(model)).map(|rank| tokens_needed(c.basis, rank, model)))
        .max()
        .context("no cache profile compresses, so there is nothing to calibrate")?;
    let sinks = cskv().map(|c| c.sinks as usize).max().unwrap_or(0);
    let want = limit.map_or((4 * need).max(1024), |(n, _)| n);
    let texts = calibration_tokens(opened, text, want, decoder.positions())?;
    let mut moments = Moments::new(model, sinks);
    let total: usize = texts.iter().map(Vec::len).sum();
    calibrate::collect(decoder, ops, &texts, &mut moments, |seen| {
        if let Some((_, progress)) = limit {
            progress(seen, total);
        }
    })?;
    Ok((solve(opened, decoder, profiles, &moments, init)?, total))
}

/// Bases in closed form for the compressed ones of `profiles`, from what calibration saw.
///
/// # Errors
/// Where that is too little.
pub(super) fn solve(
    opened: &Opened,
    decoder: &Decoder<'_>,
    profiles: &[Profile],
    moments: &Moments,
    init: InitArg,
) -> anyhow::Result<calibrate::Calibrated> {
    let model = &opened.checkpoint.config;
    let fingerprint = Fingerprint(opened.checkpoint.digest());
    let metrics: Vec<Vec<f64>> = decoder.weights().layers.iter().map(|l| calibrate::value_metric(model, l.o.weight.matrix())).collect();
    let weighting = match init {
        InitArg::Closed => Weighting::Closed,
        InitArg::Weighted => Weighting::Weighted(&metrics),
    };
    Ok(calibrate::artifact(moments, model, fingerprint, profiles, &weighting)?)
}

/// Sequences of at most `longest` tokens, at most `want` tokens together.
pub(super) fn calibration_tokens(opened: &Opened, text: Option<&str>, want: usize, longest: usize) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let mut texts: Vec<Vec<TokenId>> = match (text, &opened.source) {
        (None, Source::Demo) => {
            // Prompts of about 900 tokens, the kind the model was made for; 2.6 characters to a token.
            let prompts = demo_prompts(want.div_ceil(900), 900 * 26 / 10);
            prompts.iter().map(|p| opened.tokenizer.encode(p, false, true)).collect::<Result<_, _>>()?
        }
        (text, _) => {
            let text = text.unwrap_or_else(|| calibration_text(want));
            let tokens = opened.tokenizer.encode(text, false, false)?;
            // Pieces of some length, each begun as the model expects a text to begin.
            let begin = opened.tokenizer.encode("", true, false)?;
            let piece = 1024.min(longest).saturating_sub(begin.len()).max(1);
            tokens.chunks(piece).map(|c| begin.iter().chain(c).copied().collect()).collect()
        }
    };
    let mut left = want;
    for text in &mut texts {
        text.truncate(left.min(longest));
        left -= text.len();
    }
    texts.retain(|t| !t.is_empty());
    Ok(texts)
}

/// The weights of an opened model in the type asked for.
pub fn weights(opened: &Opened, dtype: LoadDtype) -> ModelWeights<'static> {
    opened.checkpoint.weights(dtype)
}
