//! A model made ready: opened, typed, its cache profiles laid out and their bases read or computed.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::calibrate::{self, Moments, Products, Sources, Telling, Trial, calibration_text, demo_prompts, tokens_needed};
use crate::compress::LayerCompression;
use crate::compress::artifact::{Artifact, ArtifactError, Fingerprint};
use crate::config::{self, Settings};
use crate::demo;
use crate::ids::TokenId;
use crate::kv::layout::{BasisKind, ExactType, Init, PageLayout, Profile, Quantiser, Size, Width, Widths};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, ReadyProfile};
use crate::model::weights::{LayerWeights, LoadDtype, ModelWeights};
use crate::ops::{Matrix, Ops};
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
    pub fingerprint: Fingerprint,
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

    /// Opens and checks everything, of the values of the weights a sample.
    ///
    /// # Errors
    /// One sentence for the first thing that is missing, broken, or not supported.
    pub fn open(self) -> anyhow::Result<Opened> {
        let (mut checkpoint, tokenizer, name, root) = match &self {
            Source::Demo => (demo::checkpoint()?, demo::tokenizer()?, demo::NAME.to_owned(), demo::NAME.to_owned()),
            Source::Folder(dir) => {
                let checkpoint = Checkpoint::open(dir)?;
                let tokenizer = Tokenizer::open(dir, checkpoint.config.vocab)?;
                (checkpoint, tokenizer, folder_name(dir), dir.display().to_string())
            }
        };
        let fingerprint = Fingerprint(checkpoint.digest()?);
        let vocab = checkpoint.config.vocab;
        tokenizer.check_vocab(vocab)?;
        // Fine-tunes are told to end with another token by the tokenizer alone: config.json stays the base model's.
        if let Some(eos) = tokenizer.eos().filter(|&id| (id as usize) < vocab) {
            checkpoint.generation.end_at(eos);
        }
        if checkpoint.generation.eos.is_empty() {
            checkpoint.warnings.push(
                "no file of the model names a token that ends an answer, so answers end at max_tokens or a client's stop alone; set eos_token_id in generation_config.json"
                    .to_owned(),
            );
        }
        for warning in checkpoint.warnings.iter().chain(&tokenizer.warnings) {
            tracing::warn!("{warning}");
        }
        Ok(Opened { checkpoint: Box::leak(Box::new(checkpoint)), fingerprint, tokenizer: Arc::new(tokenizer), name, root, source: self })
    }
}

/// The last part of a folder's real path: what its model is called unless the operator says otherwise.
pub fn folder_name(dir: &Path) -> String {
    let real = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    real.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// In which type exact keys and values are kept: that which the weights are held in.
pub fn exact_type(checkpoint: &Checkpoint, dtype: LoadDtype) -> ExactType {
    if checkpoint.is_held_in_bf16(dtype) { ExactType::Bf16 } else { ExactType::F32 }
}

/// Where the bases of the compressed profiles came from, for the operator. Neither where no profile compresses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bases {
    /// The path of an artifact, or that it is built in.
    pub artifact: Option<String>,
    /// Of what no artifact has.
    pub computed: Option<Computed>,
}

/// Bases computed at start.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    /// Names of the profiles.
    pub profiles: String,
    /// Of built-in text.
    pub tokens: usize,
    pub seconds: f64,
}

impl fmt::Display for Bases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(from) = &self.artifact {
            write!(f, "from the artifact {from}")?;
        }
        if let Some(Computed { profiles, tokens, .. }) = &self.computed {
            let and = if self.artifact.is_some() { "; " } else { "" };
            write!(f, "{and}computed from {tokens} tokens of built-in text: {profiles}")?;
        }
        Ok(())
    }
}

/// The profiles of `settings`, laid out, with bases from an artifact, or in closed form from calibration text.
///
/// A profile that comes with the program is what the artifact says under its name, if it does, unless the config file defines it; and
/// those that only the artifact has are served as well.
///
/// # Errors
/// Where the artifact does not fit, or a profile asks for what the model does not have.
pub fn profiles(
    opened: &Opened,
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    exact: ExactType,
    settings: &Settings,
) -> anyhow::Result<(Vec<Profile>, Vec<ReadyProfile>, Bases)> {
    let model = &opened.checkpoint.config;
    for profile in &settings.profiles {
        check_basis(profile, model)?;
    }
    let (profiles, artifact) = described(opened, settings)?;
    let mut bases = Bases::default();
    // What the operator gave has to serve all that is asked; to what is built in, the rest is added.
    let missing: Vec<Profile> = match &artifact {
        Some(_) if settings.compression.is_some() => Vec::new(),
        Some(artifact) => profiles.iter().filter(|p| artifact.widths(p).is_err()).cloned().collect(),
        None => profiles.iter().filter(|p| p.cskv.as_ref().is_some_and(|c| c.basis.is_computed())).cloned().collect(),
    };
    if artifact.is_some() {
        bases.artifact = Some(settings.compression.as_ref().map_or("built in".into(), |path| path.display().to_string()));
    }
    let computed = if missing.is_empty() {
        None
    } else {
        // Of a large model minutes go into this, in which nothing else would be heard.
        tracing::info!("computing bases in closed form from built-in text: {}", config::names(&missing));
        let begun = Instant::now();
        let how = Calibration { text: Text::BuiltIn, tokens: None, init: Init::Weighted, progress: &|_, _, _| () };
        let (calibrated, tokens) = compute(opened, decoder, ops, &missing, &how)?;
        bases.computed = Some(Computed { profiles: config::names(&missing), tokens, seconds: begun.elapsed().as_secs_f64() });
        Some(calibrated.artifact)
    };
    let ready = profiles.iter().map(|profile| -> anyhow::Result<ReadyProfile> {
        let (layers, widths) = match &profile.cskv {
            None => (Vec::new(), None),
            Some(cskv) if !cskv.basis.is_computed() => {
                let one =
                    if cskv.basis == BasisKind::Identity { LayerCompression::identity(model) } else { LayerCompression::dropped(model) };
                (vec![one.for_quantisers(cskv); model.layers], None)
            }
            Some(_) => {
                let artifact = if missing.iter().any(|p| p.name == profile.name) { &computed } else { &artifact };
                let artifact = artifact.as_ref().expect("a basis that is computed has an artifact");
                (artifact.layers(profile)?, Some(artifact.widths(profile)?))
            }
        };
        Ok(ReadyProfile { layout: PageLayout::new(model, exact, profile, widths.as_deref()), compression: layers })
    });
    let ready = ready.collect::<anyhow::Result<_>>()?;
    Ok((profiles, ready, bases))
}

/// The profiles of `settings` as they would be served, and the artifact that says so, where there is one: given, or built in.
///
/// # Errors
/// Where the artifact cannot be read or is of another model.
pub fn described(opened: &Opened, settings: &Settings) -> anyhow::Result<(Vec<Profile>, Option<Artifact>)> {
    let (model, fingerprint) = (&opened.checkpoint.config, opened.fingerprint);
    let artifact = match &settings.compression {
        Some(path) => Some(Artifact::read(path, model, fingerprint).map_err(|e| match e {
            ArtifactError::Read { .. } => anyhow::Error::from(e),
            // A config file may be what names it.
            _ => anyhow::Error::from(e).context(format!("cannot use --compression {}", path.display())),
        })?),
        None if matches!(opened.source, Source::Demo) => Some(Artifact::from_bytes(demo::ARTIFACT, model, fingerprint)?),
        None => None,
    };
    let mut profiles = settings.profiles.clone();
    if let Some(artifact) = &artifact {
        redefine(&mut profiles, artifact, &settings.defined);
    }
    Ok((profiles, artifact))
}

/// What an artifact says of profiles that the config file does not define, and those that it alone has.
pub fn redefine(profiles: &mut Vec<Profile>, artifact: &Artifact, defined: &[String]) {
    for stored in artifact.profiles().iter().map(|s| &s.profile) {
        match profiles.iter_mut().find(|p| p.name == stored.name) {
            Some(known) if !defined.contains(&known.name) => *known = stored.clone(),
            Some(_) => {}
            None => profiles.push(stored.clone()),
        }
    }
}

/// Whether a profile's basis fits the model's KV heads.
///
/// # Errors
/// One sentence that names both numbers.
pub fn check_basis(profile: &Profile, model: &ModelConfig) -> anyhow::Result<()> {
    let Some(cskv) = &profile.cskv else { return Ok(()) };
    let (name, kv_heads) = (&profile.name, model.kv_heads);
    match cskv.basis {
        BasisKind::Grouped(n) if !kv_heads.is_multiple_of(n) => {
            bail!("cache profile {name:?} groups {n} KV heads, which do not divide the model's {kv_heads}; change its basis")
        }
        // Codes of rotated keys are met four at a time, and each head is a block of its own.
        BasisKind::Identity if cskv.key_quantiser == Quantiser::Hadamard && !model.head_dim.is_multiple_of(4) => {
            bail!("cache profile {name:?} rotates heads of {} channels, which 4 do not divide; choose the affine quantiser", model.head_dim)
        }
        _ => Ok(()),
    }
}

/// Hears what is done, how much of it, and of how much.
pub type Progress<'a> = dyn Fn(&'static str, usize, usize) + Sync + 'a;

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
    pub init: Init,
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
    let texts = calibration_tokens(opened, decoder, ops, profiles, how)?;
    let total = texts.iter().map(Vec::len).sum();
    Ok((compute_on(opened, decoder, ops, profiles, how, &texts)?, total))
}

/// As [`compute`], from these tokens.
///
/// # Errors
/// As it does.
pub(super) fn compute_on(
    opened: &Opened,
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    profiles: &[Profile],
    how: &Calibration<'_>,
    texts: &[Vec<TokenId>],
) -> anyhow::Result<calibrate::Calibrated> {
    let model = &opened.checkpoint.config;
    let cskv = || profiles.iter().filter_map(|p| p.cskv.as_ref()).filter(|c| c.basis.is_computed());
    let sinks = cskv().map(|c| c.sinks as usize).max().unwrap_or(0);
    let budgets = cskv().any(|c| matches!(c.size, Size::Budget(_)));
    let mut moments = if budgets { Moments::sampling(model, sinks) } else { Moments::new(model, sinks) };
    let total: usize = texts.iter().map(Vec::len).sum();
    calibrate::collect(decoder, ops, texts, &mut moments, |seen| {
        (how.progress)("tokens seen", seen, total);
    })?;
    let fingerprint = opened.fingerprint;
    let layers = &decoder.weights().layers;
    let products = |input: &dyn Fn(usize) -> Vec<f64>| -> Vec<Products> {
        let one = |(i, l): (usize, &LayerWeights<'_>)| {
            let (k, v) = (l.k.dense(), l.v.dense());
            let keys = (k.matrix(), l.k.bias.as_deref(), l.k_norm.as_deref());
            calibrate::products([keys, (v.matrix(), l.v.bias.as_deref(), None)], &input(i))
        };
        layers.iter().enumerate().map(one).collect()
    };
    let asked = |init: Init| cskv().any(|c| c.init.unwrap_or(how.init) == init);
    let dense: Vec<_> = layers.iter().map(|l| l.o.dense()).collect();
    let outputs: Vec<Matrix<'_>> = dense.iter().map(|w| w.matrix()).collect();
    let sources = Sources {
        default: how.init,
        svd: if asked(Init::Svd) { products(&|_| vec![1.0; model.hidden]) } else { vec![] },
        asvd: if asked(Init::Asvd) { products(&|layer| moments.input_magnitudes(layer)) } else { vec![] },
        metrics: if asked(Init::Weighted) { outputs.iter().map(|w| calibrate::value_metric(model, *w)).collect() } else { vec![] },
    };
    let trial =
        Trial { model, ops, rope: decoder.rope(), outputs: &outputs, tried: &|choices, of| (how.progress)("choices tried", choices, of) };
    let mut allocator = budgets.then(|| moments.allocator(trial));
    Ok(calibrate::artifact(&moments, model, fingerprint, profiles, &sources, allocator.as_mut())?)
}

/// Sequences as long as the decoder takes at most, of at most as many tokens together as are asked for.
///
/// # Errors
/// Where no profile has a basis to be computed, or the text cannot be had.
pub(super) fn calibration_tokens(
    opened: &Opened,
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    profiles: &[Profile],
    how: &Calibration<'_>,
) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let model = &opened.checkpoint.config;
    let all = Width { rank: model.kv_channels(), bits: 4 };
    let need = profiles
        .iter()
        .filter_map(|p| p.cskv.as_ref())
        .filter(|c| c.basis.is_computed())
        .flat_map(|c| {
            let Widths { keys, values } = c.widths(model).unwrap_or(Widths { keys: all, values: all });
            [keys, values].map(|w| tokens_needed(c.basis, w.rank, model))
        })
        .max()
        .context("no cache profile has a basis to be computed, so there is nothing to calibrate")?;
    let want = how.tokens.unwrap_or((4 * need).max(1024));
    let longest = decoder.positions();
    // Texts begin as the model expects a text to begin.
    let ends = &opened.checkpoint.generation.eos;
    let mut begin = opened.tokenizer.encode("", true, false)?;
    begin.retain(|t| !ends.contains(t));
    begin.truncate(longest.saturating_sub(1));
    let pieces = |text: &str| -> anyhow::Result<Vec<Vec<TokenId>>> {
        let tokens = opened.tokenizer.encode_first(text, want)?;
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
            calibrate::sample(decoder, ops, &telling, |seen| (how.progress)("tokens sampled", seen, want))?
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
