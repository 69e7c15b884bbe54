//! Adapters: from a folder on disk to what the forward pass adds, and who holds which.
//!
//! ```text
//! folder     the files of an adapter, read under a root they cannot leave, and their digest
//! peft       Hugging Face PEFT folders: names, patterns and scales as the library reads them
//! sorsa      SORSA checkpoints, full and compact
//! base       what a changed base (PiSSA, OLoRA, a residual or an initial adapter) adds on the original one
//! write      the same as a plain LoRA folder
//! pack       the parts of an adapter as a `Delta` of the model
//! registry   alias -> generation -> lease; tiers, budgets, single flight
//! dense      products with a matrix of f32, in f64
//! spectrum   singular values and vectors; `left`, all left ones of a base, kept on disk
//! health     what an adapter's spectrum says of it: its `update`, its intruders; `verdict`, `repair`, `heatmap`
//! ```
//!
//! Whatever an adapter was on disk, it is parsed into [`Parsed`]: per linear layer a pair of factors on the *original* base, its
//! scale folded in, and the tensors that stand in for the model's own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::adapters::base::Spectra;
use crate::adapters::folder::Bounds;
use crate::ids::AdapterGeneration;
use crate::model::checkpoint::{Checkpoint, CheckpointError};
use crate::model::config::ModelConfig;
use crate::model::delta::{Delta, HeldAs, Norm, Site};
use crate::model::header::HeaderError;

pub mod base;
pub mod dense;
pub mod folder;
pub mod health;
pub mod heatmap;
pub mod left;
pub mod pack;
pub mod peft;
pub mod registry;
pub mod repair;
pub mod sorsa;
pub mod spectrum;
pub mod update;
pub mod verdict;
pub mod write;

/// A linear layer or the embedding.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Place {
    Embed,
    Layer(usize, Site),
    Head,
}

/// A norm.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum NormPlace {
    Layer(usize, Norm),
    Final,
}

impl Place {
    /// The place of a module's path, as Hugging Face spells it; `None` where a model of this configuration has none.
    pub fn of(path: &str, c: &ModelConfig) -> Option<Place> {
        match path {
            "model.embed_tokens" => Some(Place::Embed),
            "lm_head" => Some(Place::Head),
            _ => {
                let (layer, rest) = layer(path, c)?;
                Site::ALL.into_iter().find(|s| s.name() == rest).map(|site| Place::Layer(layer, site))
            }
        }
    }

    /// The module's path.
    pub fn path(self) -> String {
        match self {
            Place::Embed => "model.embed_tokens".into(),
            Place::Head => "lm_head".into(),
            Place::Layer(layer, site) => format!("model.layers.{layer}.{}", site.name()),
        }
    }

    /// `(out, in)` of its weights as a linear layer; an embedding maps a token to the residual stream.
    pub fn shape(self, c: &ModelConfig) -> (usize, usize) {
        match self {
            Place::Embed => (c.hidden, c.vocab),
            Place::Head => (c.vocab, c.hidden),
            Place::Layer(_, site) => site.shape(c),
        }
    }

    /// Name of its weights in the base checkpoint.
    pub fn tensor(self, c: &ModelConfig) -> String {
        match self {
            Place::Head if c.tied => format!("{}.weight", Place::Embed.path()),
            _ => format!("{}.weight", self.path()),
        }
    }

    /// Whether the model has a bias there.
    pub fn has_bias(self, c: &ModelConfig) -> bool {
        match self {
            Place::Embed | Place::Head => false,
            Place::Layer(_, Site::Q | Site::K | Site::V) => c.qkv_bias,
            Place::Layer(_, Site::O) => c.output_bias,
            Place::Layer(_, Site::Gate | Site::Up | Site::Down) => c.mlp_bias,
        }
    }
}

impl NormPlace {
    /// The place of a norm's path, with its width.
    pub fn of(path: &str, c: &ModelConfig) -> Option<(NormPlace, usize)> {
        if path == "model.norm" {
            return Some((NormPlace::Final, c.hidden));
        }
        let (layer, rest) = layer(path, c)?;
        let norm = Norm::ALL.into_iter().find(|n| n.name() == rest)?;
        Some((NormPlace::Layer(layer, norm), norm.width(c)?))
    }
}

fn layer<'p>(path: &'p str, c: &ModelConfig) -> Option<(usize, &'p str)> {
    let (layer, rest) = path.strip_prefix("model.layers.")?.split_once('.')?;
    // Only the plain spelling of a number: no sign, no leading zeros.
    let number = layer.parse::<usize>().ok().filter(|n| n.to_string() == layer && *n < c.layers)?;
    Some((number, rest))
}

/// What kind of adapter a folder held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Lora,
    Rslora,
    Dora,
    Pissa,
    Olora,
    Sorsa,
}

impl Format {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Lora => "LoRA",
            Format::Rslora => "rsLoRA",
            Format::Dora => "DoRA",
            Format::Pissa => "PiSSA",
            Format::Olora => "OLoRA",
            Format::Sorsa => "SORSA",
        }
    }
}

/// What an adapter does to one module. Factors come in pairs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Module {
    /// Zero where there are no factors.
    pub rank: usize,
    /// `[rank][in]`.
    pub down: Vec<f32>,
    /// `[out][rank]`, the scale folded in.
    pub up: Vec<f32>,
    /// What was folded in.
    pub scale: f64,
    /// DoRA's `[out]`.
    pub magnitude: Option<Vec<f32>>,
    /// `[out]`, added to what the factors make, the scale folded in.
    pub bias: Option<Vec<f32>>,
    /// `[out]`, in place of the base's bias.
    pub base_bias: Option<Vec<f32>>,
    /// `[out][in]`, in place of the base's weights (an embedding's lie `[vocab][hidden]`).
    pub weight: Option<Vec<f32>>,
    /// SORSA's own factors, for its health: orthonormal where training kept them so.
    pub triple: Option<Triple>,
}

/// SORSA's `A: [rank][in]`, `S: [rank]` and `B: [out][rank]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Triple {
    pub a: Vec<f32>,
    pub s: Vec<f32>,
    pub b: Vec<f32>,
}

/// An adapter as read: checked against the model's shapes, finite, on the original base unless `base` says otherwise.
#[derive(Clone, Debug)]
pub struct Parsed {
    pub format: Format,
    pub modules: BTreeMap<Place, Module>,
    pub norms: BTreeMap<NormPlace, Vec<f32>>,
    /// The base as the adapter names it.
    pub base_name: Option<String>,
    /// Which base its factors were trained on.
    pub trained_on: TrainedOn,
    /// One sentence each.
    pub warnings: Vec<String>,
}

/// Which weights an adapter's factors belong on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrainedOn {
    /// The weights as the base has them.
    Base,
    /// The base less its leading singular triplets, as many as the factors have ranks (PiSSA).
    WithoutLeading,
    /// The base less `scale` times its leading singular triplets (SORSA).
    WithoutScaledLeading,
    /// The base less `scale` times the leading columns of its QR decomposition (OLoRA).
    WithoutQr,
}

impl Parsed {
    /// Largest rank of its factors.
    pub fn rank(&self) -> usize {
        self.modules.values().map(|m| m.rank).max().unwrap_or(0)
    }
}

/// Why an adapter is not served. Each is one sentence with cause and mend, in the terms of who asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AdapterError {
    #[error("no adapter is at {path}: {why}")]
    NotFound { path: String, why: &'static str },
    #[error("{path} is outside the folder adapters may come from (--lora-root); move it there")]
    Outside { path: String },
    #[error("adapters are loaded at run time from --lora-root alone, and this server has none; start it with one")]
    NoRoot,
    #[error("cannot read {path}: {reason}")]
    Io { path: String, reason: String },
    #[error("cannot write {path}: {reason}")]
    Write { path: String, reason: String },
    #[error(
        "{file} is {bytes} bytes long, more than the {limit} that are left for an adapter's files here; raise --lora-memory-bytes, half of that"
    )]
    TooLarge { file: String, bytes: u64, limit: u64 },
    #[error("{file} {source}")]
    Header { file: String, source: HeaderError },
    #[error("{file} {reason}")]
    Config { file: &'static str, reason: String },
    #[error("the tensor `{tensor}` {reason}")]
    Tensor { tensor: String, reason: String },
    /// It is a kind of adapter that cannot be served as it is.
    #[error("{what}; {mend}")]
    NotServed { what: String, mend: String },
    #[error("the adapter has rank {rank} and at most {limit} is served here; raise --max-lora-rank")]
    Rank { rank: usize, limit: usize },
    #[error("the adapter takes {bytes} bytes and all adapters together may take {budget}; raise --lora-memory-bytes")]
    NeverFits { bytes: u64, budget: u64 },
    #[error("the adapter takes {bytes} bytes and adapters may take {budget} on the device; raise --lora-device-memory-bytes")]
    NeverFitsDevice { bytes: u64, budget: u64 },
    #[error("adapters in use or pinned take {held} of {budget} bytes and this one needs {bytes}; try again, or raise --lora-memory-bytes")]
    Busy { bytes: u64, held: u64, budget: u64 },
    #[error("adapters push each other out of {budget} bytes faster than they are used; try again, or raise --lora-memory-bytes")]
    Thrashing { budget: u64 },
    #[error("{alias:?} is the name of the served model; give the adapter another")]
    NameTaken { alias: String },
    #[error("{reason}")]
    Name { reason: &'static str },
    #[error("the adapter {alias:?} is loaded already; set load_inplace to replace it, or give this one another name")]
    Loaded { alias: String },
    #[error("no adapter is loaded as {alias:?}")]
    Unknown { alias: String },
    #[error("{alias:?} is at generation {now}, not {expected}: somebody else replaced it")]
    Changed { alias: String, now: String, expected: String },
    #[error("the files of {alias:?} changed since it was loaded (they were generation {was}); load it again with load_inplace")]
    FilesChanged { alias: String, was: String },
    #[error("{alias:?} has no earlier generation to go back to")]
    NoHistory { alias: String },
    #[error("{base}: {reason}")]
    Base { base: String, reason: String },
    #[error("{reason}")]
    Refused { reason: String },
    #[error("loading the adapter failed inside the server")]
    Internal,
}

/// What kind of fault an [`AdapterError`] is, for whoever turns it into a status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    NotFound,
    Forbidden,
    Invalid,
    Conflict,
    Busy,
    Server,
}

impl AdapterError {
    /// Its kind.
    pub fn fault(&self) -> Fault {
        use AdapterError as E;
        match self {
            E::NotFound { .. } | E::Unknown { .. } => Fault::NotFound,
            E::Outside { .. } | E::NoRoot => Fault::Forbidden,
            E::Changed { .. } | E::FilesChanged { .. } | E::NoHistory { .. } => Fault::Conflict,
            E::Busy { .. } | E::Thrashing { .. } => Fault::Busy,
            E::Write { .. } | E::Internal => Fault::Server,
            E::Io { .. }
            | E::TooLarge { .. }
            | E::Header { .. }
            | E::Config { .. }
            | E::Tensor { .. }
            | E::NotServed { .. }
            | E::Rank { .. }
            | E::NeverFits { .. }
            | E::NeverFitsDevice { .. }
            | E::NameTaken { .. }
            | E::Name { .. }
            | E::Loaded { .. }
            | E::Base { .. }
            | E::Refused { .. } => Fault::Invalid,
        }
    }

    /// Stable, for clients.
    pub fn code(&self) -> &'static str {
        use AdapterError as E;
        match self {
            E::NotFound { .. } | E::Unknown { .. } => "adapter_not_found",
            E::Outside { .. } | E::NoRoot => "adapter_outside_root",
            E::Io { .. } | E::TooLarge { .. } | E::Header { .. } | E::Config { .. } | E::Tensor { .. } => "adapter_invalid",
            E::NotServed { .. } | E::Base { .. } | E::Refused { .. } => "adapter_not_served",
            E::Rank { .. } => "adapter_rank",
            E::NeverFits { .. } | E::NeverFitsDevice { .. } | E::Busy { .. } | E::Thrashing { .. } => "adapter_memory",
            E::NameTaken { .. } | E::Name { .. } => "adapter_name",
            E::Loaded { .. } => "adapter_already_loaded",
            E::Changed { .. } | E::FilesChanged { .. } => "adapter_changed",
            E::NoHistory { .. } => "adapter_no_history",
            E::Write { .. } | E::Internal => "internal_error",
        }
    }
}

/// The model adapters are for, and what reading one may cost.
pub struct Reader<'a> {
    pub base: &'a Checkpoint,
    pub spectra: &'a Spectra,
    pub bounds: Bounds,
    /// Of any update as stored.
    pub rank: usize,
}

/// An adapter read, and the hash of everything that shaped it.
pub struct Read {
    pub parsed: Parsed,
    pub digest: [u8; 32],
    /// The folder it really is.
    pub path: PathBuf,
}

/// An adapter made ready to be served.
pub struct Ready {
    pub generation: AdapterGeneration,
    pub digest: [u8; 32],
    pub facts: Facts,
    pub delta: Delta,
}

/// What is known of a generation once it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    pub format: &'static str,
    /// Largest rank of an update as it is served.
    pub rank: usize,
    /// Modules it changes, norms among them.
    pub modules: usize,
    /// Bytes while resident.
    pub bytes: u64,
    /// The base as the adapter names it.
    pub base_name: Option<String>,
    pub warnings: Vec<String>,
}

impl Reader<'_> {
    /// The adapter in the folder `path`, checked, with its factors on the served base.
    ///
    /// # Errors
    /// One sentence for the first thing that keeps it from being served.
    pub fn read(&self, path: &Path, choice: &BaseChoice) -> Result<Read, AdapterError> {
        let files = self.bounds.read(path)?;
        let mut parsed = match files.config_name {
            "adapter_config.json" => peft::parse(&files, self.base)?,
            _ => sorsa::parse(&files, self.base)?,
        };
        if parsed.rank() > self.rank {
            return Err(AdapterError::Rank { rank: parsed.rank(), limit: self.rank });
        }
        let other = base::onto_served(&mut parsed, choice, self)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&files.digest).update(choice.kind().as_bytes()).update(&other);
        Ok(Read { parsed, digest: *hasher.finalize().as_bytes(), path: files.path })
    }

    /// The same, as the forward pass wants it.
    ///
    /// # Errors
    /// As it.
    pub fn ready(&self, path: &Path, choice: &BaseChoice, held: HeldAs) -> Result<Ready, AdapterError> {
        let Read { parsed, digest, .. } = self.read(path, choice)?;
        let delta = pack::pack(&parsed, self.base, held)?;
        let (head, _) = digest.split_first_chunk::<8>().expect("a hash has 32 bytes");
        let facts = Facts {
            format: parsed.format.name(),
            rank: delta.rank(),
            modules: parsed.modules.len() + parsed.norms.len(),
            bytes: delta.bytes(),
            base_name: parsed.base_name,
            warnings: parsed.warnings,
        };
        // Zero is the base alone.
        Ok(Ready { generation: AdapterGeneration(u64::from_be_bytes(*head).max(1)), digest, facts, delta })
    }
}

impl AdapterError {
    /// A checkpoint that an adapter needs cannot be used.
    fn base(path: &std::path::Path, error: &CheckpointError) -> AdapterError {
        AdapterError::Base { base: path.display().to_string(), reason: error.to_string() }
    }
}

/// Which base an adapter is told to belong on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum BaseChoice {
    /// As its configuration says; one that looks trained on a residual base is refused.
    #[default]
    Auto,
    /// The served base as it is, whatever the adapter looks like.
    Original,
    /// The served base less its leading singular triplets: PiSSA whose configuration no longer says so.
    Pissa,
    /// A checkpoint of the residual weights.
    Residual(PathBuf),
    /// The adapter as it was before training, whose product was taken out of the base.
    Initial(PathBuf),
}

impl BaseChoice {
    fn kind(&self) -> &'static str {
        match self {
            BaseChoice::Auto => "auto",
            BaseChoice::Original => "original",
            BaseChoice::Pissa => "pissa",
            BaseChoice::Residual(_) => "residual",
            BaseChoice::Initial(_) => "initial",
        }
    }
}

impl std::str::FromStr for BaseChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let path = |p: &str| if p.is_empty() { Err("name a folder after the colon".to_owned()) } else { Ok(PathBuf::from(p)) };
        match s.split_once(':') {
            None if s == "auto" || s.is_empty() => Ok(BaseChoice::Auto),
            None if s == "original" => Ok(BaseChoice::Original),
            None if s == "pissa" => Ok(BaseChoice::Pissa),
            Some(("residual", p)) => path(p).map(BaseChoice::Residual),
            Some(("initial", p)) => path(p).map(BaseChoice::Initial),
            _ => Err("must be auto, original, pissa, residual:FOLDER or initial:FOLDER".into()),
        }
    }
}

impl std::fmt::Display for BaseChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BaseChoice::Residual(p) | BaseChoice::Initial(p) => write!(f, "{}:{}", self.kind(), p.display()),
            _ => f.write_str(self.kind()),
        }
    }
}
