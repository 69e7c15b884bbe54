//! A model made ready: opened, typed, its cache profiles laid out and their bases read or computed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::calibrate::{self, Init, Moments, Products, Telling, calibration_text, demo_prompts, tokens_needed};
use crate::compress::artifact::{Artifact, Fingerprint};
use crate::config::args::InitArg;
use crate::demo;
use crate::ids::TokenId;
use crate::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile};
use crate::model::checkpoint::Checkpoint;
use crate::model::decoder::{Decoder, ReadyProfile};
use crate::model::weights::{Data, LayerWeights, LoadDtype, ModelWeights};
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
        let how = Calibration { text: Text::BuiltIn, tokens: None, init: InitArg::Weighted, progress: &|_, _, _| () };
        let (calibrated, tokens) = compute(opened, decoder, ops, profiles, &how)?;
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

/// Hears what is going on, how many tokens are done, and of how many.
pub type Progress<'a> = dyn Fn(&'static str, usize, usize) + 'a;

/// What a model is calibrated on.
#[derive(Clone, Copy, Debug)]
pub enum Text<'a> {
    Given(&'a str),
    /// What is built in: at hand at once. For the demo model, prompts of its own kind.
    BuiltIn,
    /// What the model says itself, from this seed; for the demo model what is built in, which is what it was made for.
    Sampled(u64),
}

/// How bases are computed.
pub struct Calibration<'a> {
    pub text: Text<'a>,
    /// Tokens at most; without it, four times as many as the widest basis has directions, at least 1024.
    pub tokens: Option<usize>,
    pub init: InitArg,
    pub progress: &'a Progress<'a>,
}

/// Bases for the compressed ones of `profiles`; also how many tokens were seen.
///
/// # Errors
/// Where there is too little text, or the model makes numbers that are not finite.
pub fn compute(
    opened: &Opened,
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    profiles: &[Profile],
    how: &Calibration<'_>,
) -> anyhow::Result<(calibrate::Calibrated, usize)> {
    let model = &opened.checkpoint.config;
    let cskv = || profiles.iter().filter_map(|p| p.cskv.as_ref());
    let need = cskv()
        .flat_map(|c| <[usize; 2]>::from(c.ranks(model)).map(|rank| tokens_needed(c.basis, rank, model)))
        .max()
        .context("no cache profile compresses, so there is nothing to calibrate")?;
    let sinks = cskv().map(|c| c.sinks as usize).max().unwrap_or(0);
    let want = how.tokens.unwrap_or((4 * need).max(1024));
    let texts = calibration_tokens(opened, decoder, ops, how, want)?;
    let mut moments = Moments::new(model, sinks);
    let total: usize = texts.iter().map(Vec::len).sum();
    calibrate::collect(decoder, ops, &texts, &mut moments, |seen| {
        (how.progress)("calibrating", seen, total);
    })?;
    let fingerprint = Fingerprint(opened.checkpoint.digest());
    let layers = &decoder.weights().layers;
    let metrics: Vec<Vec<f64>> = layers.iter().map(|l| calibrate::value_metric(model, l.o.weight.matrix())).collect();
    let products = |input: &dyn Fn(usize) -> Vec<f64>| -> Vec<Products> {
        let one = |(i, l): (usize, &LayerWeights<'_>)| {
            let keys = (l.k.weight.matrix(), l.k.bias.as_deref(), l.k_norm.as_deref());
            calibrate::products([keys, (l.v.weight.matrix(), l.v.bias.as_deref(), None)], &input(i))
        };
        layers.iter().enumerate().map(one).collect()
    };
    let made = |init: &Init<'_>| calibrate::artifact(&moments, model, fingerprint, profiles, init);
    let calibrated = match how.init {
        InitArg::Svd => made(&Init::Svd(&products(&|_| vec![1.0; model.hidden]))),
        InitArg::Asvd => made(&Init::Asvd(&products(&|layer| moments.input_magnitudes(layer)))),
        InitArg::Closed => made(&Init::Closed),
        InitArg::Weighted => made(&Init::Weighted(&metrics)),
    }?;
    Ok((calibrated, total))
}

/// Sequences as long as the decoder takes at most, of at most `want` tokens together.
fn calibration_tokens(
    opened: &Opened,
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    how: &Calibration<'_>,
    want: usize,
) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let longest = decoder.positions();
    // Texts begin as the model expects a text to begin.
    let ends = &opened.checkpoint.generation.eos;
    let mut begin = opened.tokenizer.encode("", true, false)?;
    begin.retain(|t| !ends.contains(t));
    begin.truncate(longest.saturating_sub(1));
    let pieces = |text: &str| -> anyhow::Result<Vec<Vec<TokenId>>> {
        let tokens = opened.tokenizer.encode(text, false, false)?;
        let piece = 1024.min(longest).saturating_sub(begin.len()).max(1);
        Ok(tokens.chunks(piece).map(|c| begin.iter().chain(c).copied().collect()).collect())
    };
    let mut texts: Vec<Vec<TokenId>> = match (how.text, &opened.source) {
        (Text::Given(text), _) => pieces(text)?,
        (Text::BuiltIn | Text::Sampled(_), Source::Demo) => {
            // Prompts of about 900 tokens, the kind the model was made for; 2.6 characters to a token.
            let prompts = demo_prompts(want.div_ceil(900), 900 * 26 / 10);
            prompts.iter().map(|p| opened.tokenizer.encode(p, false, true)).collect::<Result<_, _>>()?
        }
        (Text::BuiltIn, Source::Folder(_)) => pieces(calibration_text(want))?,
        (Text::Sampled(seed), Source::Folder(_)) => {
            let telling = Telling { begin: &begin, ends, want, seed };
            calibrate::sample(decoder, ops, &telling, |seen| (how.progress)("sampling", seen, want))?
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
