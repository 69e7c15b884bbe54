//! A Hugging Face model folder, opened and believed only after every name, shape, type and offset in it has
//! been checked. The bytes of the weights stay where they are: mapped from the files, or compiled in.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde_json::Value;

use crate::model::config::ModelConfig;
use crate::model::config_json::{self, ConfigError};
use crate::model::generation::{self, Generation};
use crate::model::header::{self, Dtype, Entry, HeaderError, Limits};
use crate::model::json::{self, shown};
use crate::model::weights::{self, Linear, LoadDtype, ModelWeights};

/// An opened model: its configuration, and every tensor by name.
///
/// The files are mapped, so the folder must not be written to while the server runs; a file that is cut short
/// under a mapping ends the process (there is no catching it). Files of a model folder are written once, by a download; where that
/// is not so, see [`Unmapped`].
pub struct Checkpoint {
    pub config: ModelConfig,
    /// Set when some layer attends to this many last positions only; see [`Checkpoint::check_context`].
    pub sliding_window: Option<usize>,
    pub generation: Generation,
    /// One sentence each, for the log at start.
    pub warnings: Vec<String>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Located>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint({}, {} tensors, {} bytes)", self.config.family, self.tensors.len(), self.stored_bytes())
    }
}

/// A stored tensor: its bytes are exactly as long as type and shape say, and not necessarily aligned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

/// Why a model folder cannot be served. Each is one sentence with cause and mend.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{} is not a folder; name a folder with config.json and *.safetensors", .path.display())]
    NotAFolder { path: PathBuf },
    #[error("cannot read {}: {source}; check that it exists and is readable", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not a regular file; replace it by the file itself", .path.display())]
    NotAFile { path: PathBuf },
    #[error("{} is {bytes} bytes long, more than the {limit} allowed for it", .path.display())]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{} has neither model.safetensors nor model.safetensors.index.json; {mend}", .dir.display())]
    NoWeights { dir: PathBuf, mend: &'static str },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{file} {source}")]
    Header { file: String, source: HeaderError },
    #[error("model.safetensors.index.json {reason}; download it again")]
    Index { reason: String },
    #[error("model.safetensors.index.json names the shard {shard}, which is not in the folder; download the missing file")]
    MissingShard { shard: String },
    #[error(
        "model.safetensors.index.json places the tensor `{tensor}` in {shard}, which does not hold it; index and shards are of different downloads"
    )]
    NotInShard { tensor: String, shard: String },
    #[error(
        "{shard} holds the tensor `{tensor}`, which model.safetensors.index.json places {place}; index and shards are of different downloads"
    )]
    NotInIndex { tensor: String, shard: String, place: String },
    #[error("the tensor `{tensor}` is missing; {mend}")]
    MissingTensor { tensor: String, mend: &'static str },
    #[error(
        "the tensor `{tensor}` in {file} belongs to nothing in a {family} model of {layers} layers; config.json and weights do not fit together"
    )]
    ExtraTensor { tensor: String, file: String, family: String, layers: usize },
    #[error("the tensor `{tensor}` has the shape {got:?} and config.json makes it {want:?}; config.json and weights do not fit together")]
    Shape { tensor: String, want: Vec<usize>, got: Vec<usize> },
    #[error("the tensor `{tensor}` is stored as {got}; supported are F32, BF16 and F16 (quantised checkpoints are not)")]
    Dtype { tensor: String, got: &'static str },
    #[error(
        "config.json ties the output head to the embedding, and `lm_head.weight` is there and differs from it; set tie_word_embeddings to false if the head is to be used"
    )]
    HeadDiffers,
    #[error(
        "the model attends to the last {window} positions only in some layers, which is not computed here; serve it with --max-model-len {window} or less ({asked} asked)"
    )]
    Window { window: usize, asked: usize },
    #[error("the tensor `{tensor}` in {file} has {value} at element {element}; the weights are damaged: download {file} again")]
    NotFinite { tensor: String, file: String, element: usize, value: f32 },
    #[error(
        "the tensor `{tensor}` in {file} is zeros wherever it was looked at, as in a download that was never finished; download {file} again"
    )]
    AllZero { tensor: String, file: String },
}

struct Shard {
    file: String,
    bytes: Bytes,
}

/// Where a shard's bytes are.
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
    /// Of an [`Unmapped`] checkpoint: in the file of this path and length.
    Stored(File, PathBuf, u64),
}

impl Bytes {
    /// Those of a range that was checked against the length when the header was read; of what is not in memory a copy.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], of what is not in memory alone.
    fn get(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        match self {
            Bytes::Mapped(map) => Ok(Cow::Borrowed(&map[range])),
            Bytes::Static(bytes) => Ok(Cow::Borrowed(&bytes[range])),
            Bytes::Stored(file, path, _) => {
                let mut out = vec![0; range.len()];
                file.read_exact_at(&mut out, range.start as u64).map_err(|e| {
                    let cut = "it became shorter while it was read";
                    let source = if e.kind() == ErrorKind::UnexpectedEof { std::io::Error::new(e.kind(), cut) } else { e };
                    CheckpointError::Io { path: path.clone(), source }
                })?;
                Ok(Cow::Owned(out))
            }
        }
    }
}

/// Whether a folder's weights stay in its files, mapped, or are read when they are asked for.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    Map,
    Read,
}

struct Located {
    shard: usize,
    entry: Entry,
}

/// Largest `config.json`, `generation_config.json`.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Weights in a form that is not loaded.
const PICKLED: [&str; 3] = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model_checkpoint.pt"];

/// How long sequences may be that full attention computes as the model was made to.
fn computed_as_made(config: &ModelConfig, sliding_window: Option<usize>) -> usize {
    sliding_window.map_or(config.max_positions, |window| window.min(config.max_positions))
}

/// What `config.json` says of a model whose weights are not in its folder, in any form: one that may yet be downloaded. `None` where they are.
///
/// # Errors
/// As [`Checkpoint::open`] where the folder or the file is not what it should be.
pub fn without_weights(dir: &Path) -> Result<Option<config_json::Parsed>, CheckpointError> {
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    if !dir.is_dir() || weights.iter().chain(&PICKLED).any(|name| dir.join(name).exists()) {
        return Ok(None);
    }
    Ok(Some(config_json::parse(&read_file(&dir.join("config.json"), CONFIG_BYTES_MAX)?)?))
}

impl Checkpoint {
    /// Opens a folder with `config.json`, one `model.safetensors` or the shards of
    /// `model.safetensors.index.json`, and perhaps `generation_config.json`.
    ///
    /// Reads the headers only; weights are paged in when they are used. Where both kinds of weights lie in the
    /// folder the single file is taken, as Hugging Face does.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_by(dir, Access::Map)
    }

    fn open_by(dir: &Path, access: Access) -> Result<Checkpoint, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::NotAFolder { path: dir.to_owned() });
        }
        let config = read_file(&dir.join("config.json"), CONFIG_BYTES_MAX)?;
        let generation_path = dir.join("generation_config.json");
        let generation = if generation_path.exists() { Some(read_file(&generation_path, CONFIG_BYTES_MAX)?) } else { None };
        // The configuration is refused before any shard is opened.
        let parsed = config_json::parse(&config)?;
        let mut warnings = Vec::new();
        let shards = if dir.join("model.safetensors").exists() {
            vec![open_shard(dir, "model.safetensors", access)?]
        } else if dir.join("model.safetensors.index.json").exists() {
            return Checkpoint::open_index(dir, access, parsed, generation, warnings);
        } else {
            let pickled = PICKLED.iter().any(|n| dir.join(n).exists());
            let mend = if pickled {
                "weights in pickle form are not loaded: convert them to safetensors (README.md has a command)"
            } else {
                "download the weights in safetensors form"
            };
            return Err(CheckpointError::NoWeights { dir: dir.to_owned(), mend });
        };
        let tensors = locate(&shards)?;
        Checkpoint::assemble(parsed, generation.as_deref(), shards, tensors, &mut warnings)
    }

    /// The same from memory, for a model compiled into the binary. Align `safetensors` to 8 bytes or more, or
    /// its weights are copied.
    pub fn from_bytes(config_json: &str, generation_json: Option<&str>, safetensors: &'static [u8]) -> Result<Checkpoint, CheckpointError> {
        let parsed = config_json::parse(config_json.as_bytes())?;
        let shards = vec![Shard { file: "model.safetensors".to_owned(), bytes: Bytes::Static(safetensors) }];
        let tensors = locate(&shards)?;
        Checkpoint::assemble(parsed, generation_json.map(str::as_bytes), shards, tensors, &mut Vec::new())
    }

    fn open_index(
        dir: &Path,
        access: Access,
        parsed: config_json::Parsed,
        generation: Option<Vec<u8>>,
        mut warnings: Vec<String>,
    ) -> Result<Checkpoint, CheckpointError> {
        let index = read_file(&dir.join("model.safetensors.index.json"), INDEX_BYTES_MAX)?;
        let index = parse_index(&index)?;
        let mut files: Vec<&String> = index.places.values().collect();
        files.sort_unstable();
        files.dedup();
        if files.len() > 4096 {
            return Err(CheckpointError::Index { reason: format!("names {} shards, more than any model has", files.len()) });
        }
        let mut shards = Vec::with_capacity(files.len());
        for file in files {
            if !dir.join(file).exists() {
                return Err(CheckpointError::MissingShard { shard: file.clone() });
            }
            shards.push(open_shard(dir, file, access)?);
        }
        let tensors = locate_indexed(&shards, &index)?;
        let data: u64 = tensors.values().map(|t| (t.entry.end - t.entry.begin) as u64).sum();
        if let Some(total) = index.total_bytes.filter(|&n| n != data) {
            // Several published indexes count shared tensors twice or count parameters, so this alone is no proof.
            warnings.push(format!("model.safetensors.index.json states {total} bytes of weights and the shards hold {data}"));
        }
        Checkpoint::assemble(parsed, generation.as_deref(), shards, tensors, &mut warnings)
    }

    fn assemble(
        parsed: config_json::Parsed,
        generation: Option<&[u8]>,
        shards: Vec<Shard>,
        tensors: BTreeMap<String, Located>,
        warnings: &mut Vec<String>,
    ) -> Result<Checkpoint, CheckpointError> {
        warnings.extend(parsed.warnings);
        let generation = generation::parse(generation, &parsed.eos, parsed.config.vocab, warnings)?;
        let warnings = std::mem::take(warnings);
        let (config, sliding_window) = (parsed.config, parsed.sliding_window);
        let mut it = Checkpoint { config, sliding_window, generation, warnings, shards, tensors };
        it.check_tensors()?;
        Ok(it)
    }

    /// Every tensor the configuration asks for is there in its shape and in a supported type, and nothing else is.
    fn check_tensors(&mut self) -> Result<(), CheckpointError> {
        let want = weights::expected(&self.config, &|name| self.tensors.get(name).map(|t| &t.entry.shape[..]));
        for (name, shape) in &want {
            let Some(found) = self.tensors.get(name) else {
                let mend = if name == "lm_head.weight" {
                    "add it, or set tie_word_embeddings to true in config.json if the model ties its head"
                } else {
                    "config.json and weights do not fit together, or a file is missing"
                };
                return Err(CheckpointError::MissingTensor { tensor: name.clone(), mend });
            };
            if found.entry.shape != *shape {
                let (want, got) = (shape.clone(), found.entry.shape.clone());
                return Err(CheckpointError::Shape { tensor: name.clone(), want, got });
            }
            if let Dtype::Other(got, _) = found.entry.dtype {
                return Err(CheckpointError::Dtype { tensor: name.clone(), got });
            }
        }
        let tied_head = self.config.tied.then_some(weights::HEAD);
        let mut halves = 0;
        for (name, found) in &self.tensors {
            halves += usize::from(found.entry.dtype == Dtype::F16);
            if want.contains_key(name) || Some(name.as_str()) == tied_head || inert(name) {
                continue;
            }
            return Err(CheckpointError::ExtraTensor {
                tensor: name.clone(),
                file: self.shards[found.shard].file.clone(),
                family: self.config.family.clone(),
                layers: self.config.layers,
            });
        }
        if halves > 0 {
            self.warnings
                .push(format!("{halves} tensors are stored as F16: they are held as F32, which is exact, or rounded with --dtype bf16, which takes half of that"));
        }
        if let (true, Some(head)) = (self.config.tied, self.stored(weights::HEAD)?) {
            let embed = self.stored(weights::EMBED)?.expect("checked above");
            let (head, embed) = (head.view(), embed.view());
            if head.shape != embed.shape {
                let (want, got) = (embed.shape.to_vec(), head.shape.to_vec());
                return Err(CheckpointError::Shape { tensor: weights::HEAD.to_owned(), want, got });
            }
            if let Dtype::Other(got, _) = head.dtype {
                return Err(CheckpointError::Dtype { tensor: weights::HEAD.to_owned(), got });
            }
            let same = if head.dtype == embed.dtype { head.data == embed.data } else { weights::floats(head).eq(weights::floats(embed)) };
            if !same {
                return Err(CheckpointError::HeadDiffers);
            }
        }
        Ok(())
    }

    /// The stored tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        match self.stored(name) {
            Ok(Some(Stored { dtype, shape, data: Cow::Borrowed(data) })) => Some(TensorView { dtype, shape, data }),
            Ok(None) => None,
            _ => unreachable!("only an unmapped checkpoint has its bytes elsewhere, and it lends none"),
        }
    }

    /// The stored tensor of this name, read where it is not in memory.
    fn stored(&self, name: &str) -> Result<Option<Stored<'_>>, CheckpointError> {
        let Some(Located { shard, entry }) = self.tensors.get(name) else { return Ok(None) };
        let data = self.shards[*shard].bytes.get(entry.begin..entry.end)?;
        Ok(Some(Stored { dtype: entry.dtype, shape: &entry.shape, data }))
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| &t.entry.shape[..])
    }

    /// Names of all stored tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors as stored.
    pub fn stored_bytes(&self) -> u64 {
        self.tensors.values().map(|t| (t.entry.end - t.entry.begin) as u64).sum()
    }

    /// The weights as the forward pass wants them. Borrowed from the mapping where type and alignment allow,
    /// else converted now: a cost only of `--dtype` against the stored type, of F16, and of unaligned files.
    pub fn weights(&self, dtype: LoadDtype) -> ModelWeights<'_> {
        weights::build(self, dtype)
    }

    /// The whole matrix `[out][in]` of the linear layer `path` and its bias, in `f32`, in whatever form it is stored.
    pub fn linear(&self, path: &str) -> Option<Linear> {
        let get = |name: &str| Ok::<_, Infallible>(self.tensor(name).map(|view| weights::floats(view).collect()));
        let Ok(linear) = weights::linear_of(path, &|name| self.shape(name), get);
        linear
    }

    /// Whether full attention is right for sequences of up to `max_model_len` positions.
    pub fn check_context(&self, max_model_len: usize) -> Result<(), CheckpointError> {
        match self.sliding_window {
            Some(window) if max_model_len > window => Err(CheckpointError::Window { window, asked: max_model_len }),
            _ => Ok(()),
        }
    }

    /// The longest sequences that the model in a folder computes as it was made to, by its `config.json` alone: its positions, or
    /// its sliding window where that is less.
    ///
    /// # Errors
    /// Where that file cannot be read, or describes what is not computed here.
    pub fn longest(dir: &Path) -> Result<usize, CheckpointError> {
        let parsed = config_json::parse(&read_file(&dir.join("config.json"), CONFIG_BYTES_MAX)?)?;
        Ok(computed_as_made(&parsed.config, parsed.sliding_window))
    }

    /// The same of a folder that is open.
    pub fn positions(&self) -> usize {
        computed_as_made(&self.config, self.sliding_window)
    }

    /// Whether [`Checkpoint::weights`] would hold the embedding in bf16. Converts nothing.
    pub fn is_held_in_bf16(&self, dtype: LoadDtype) -> bool {
        let stored = self.tensors.get(weights::EMBED).map(|t| t.entry.dtype);
        dtype == LoadDtype::Bf16 || dtype == LoadDtype::Auto && stored == Some(Dtype::Bf16)
    }

    /// Identity of the model: of the configuration as resolved, of every tensor's name, type and shape, and of a
    /// sample of its values. How the tensors are spread over files, and generation settings, do not enter.
    ///
    /// BLAKE3 over, each part preceded by its length as `u64` little endian: `strait model 1`; the resolved
    /// configuration as Rust prints it; then per tensor, in order of names: name, type, shape as `u64`s, and of
    /// the data either all (up to 64 KiB), or 16 blocks of 4 KiB at `i * (len - 4096) / 15`, the first and
    /// last among them. About 25 MB are read for a model of 400 tensors, whatever its size. Values outside the
    /// sample do not enter: it tells models apart, and is no seal against tampering.
    ///
    /// # Errors
    /// Where a matrix has nothing but zeros in the sample, as in a file that was given its length and never filled, or a number there
    /// is not finite.
    pub fn digest(&self) -> Result<[u8; 32], CheckpointError> {
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(b"strait model 1");
        part(format!("{:?} {:?}", self.config, self.sliding_window).as_bytes());
        for (name, Located { shard, entry }) in self.tensors.iter().filter(|(name, _)| !inert(name)) {
            part(name.as_bytes());
            part(entry.dtype.name().as_bytes());
            part(&entry.shape.iter().flat_map(|&d| (d as u64).to_le_bytes()).collect::<Vec<u8>>());
            let (Shard { file, bytes }, len) = (&self.shards[*shard], entry.end - entry.begin);
            let (blocks, size) = if len <= 64 << 10 { (1, len) } else { (16, 4096) };
            let mut zeros = true;
            for i in 0..blocks {
                let start = ((len - size) as u128 * i / 15) as usize;
                let sample = bytes.get(entry.begin + start..entry.begin + start + size)?;
                part(&sample);
                zeros &= sample.iter().all(|byte| *byte == 0);
                // A block may begin within an element.
                let first = start.div_ceil(entry.dtype.bytes());
                let data = &sample[first * entry.dtype.bytes() - start..];
                let mut values = weights::floats(TensorView { dtype: entry.dtype, shape: &entry.shape, data });
                if let Some((at, value)) = values.by_ref().enumerate().find(|(_, value)| !value.is_finite()) {
                    return Err(CheckpointError::NotFinite { tensor: name.clone(), file: file.clone(), element: first + at, value });
                }
            }
            // Rows of tokens that nobody uses are zeros in many an embedding, and biases often; a whole matrix never is.
            if zeros && entry.shape.len() == 2 {
                return Err(CheckpointError::AllZero { tensor: name.clone(), file: file.clone() });
            }
        }
        Ok(*hasher.finalize().as_bytes())
    }
}

/// A stored tensor, borrowed where it is in memory.
struct Stored<'a> {
    dtype: Dtype,
    shape: &'a [usize],
    data: Cow<'a, [u8]>,
}

impl Stored<'_> {
    fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: self.shape, data: &self.data }
    }
}

/// A model folder that is checked like any other and whose files are not mapped: a tensor is read when it is asked for.
///
/// For folders that others may write to while the server runs. A file that is cut short is an error then, and ends nothing; one that
/// is replaced by another of its name is read as it was.
#[derive(Debug)]
pub struct Unmapped(Checkpoint);

impl Unmapped {
    /// Opens a folder as [`Checkpoint::open`] does.
    ///
    /// # Errors
    /// As it.
    pub fn open(dir: &Path) -> Result<Unmapped, CheckpointError> {
        Checkpoint::open_by(dir, Access::Read).map(Unmapped)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// The elements of the stored tensor of this name, one of those that the configuration asks for.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], also where the file became shorter.
    pub fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, CheckpointError> {
        Ok(self.0.stored(name)?.map(|stored| weights::floats(stored.view()).collect()))
    }

    /// As [`Checkpoint::linear`].
    ///
    /// # Errors
    /// As [`Unmapped::floats`].
    pub fn linear(&self, path: &str) -> Result<Option<Linear>, CheckpointError> {
        weights::linear_of(path, &|name| self.0.shape(name), |name| self.floats(name))
    }

    /// As [`Checkpoint::digest`], to the bit.
    ///
    /// # Errors
    /// As it, and as [`Unmapped::floats`].
    pub fn digest(&self) -> Result<[u8; 32], CheckpointError> {
        self.0.digest()
    }
}

/// Buffers that old conversions saved and nothing reads: they are recomputed.
fn inert(name: &str) -> bool {
    name == "rotary_emb.inv_freq"
        || name.starts_with("model.") && (name.ends_with("rotary_emb.inv_freq") || name.ends_with("self_attn.masked_bias"))
}

fn locate(shards: &[Shard]) -> Result<BTreeMap<String, Located>, CheckpointError> {
    let mut out = BTreeMap::new();
    for (shard, s) in shards.iter().enumerate() {
        for (name, entry) in entries(s)? {
            out.insert(name, Located { shard, entry });
        }
    }
    Ok(out)
}

/// The tensors of all shards, each of which the index must place exactly where it is.
fn locate_indexed(shards: &[Shard], index: &Index) -> Result<BTreeMap<String, Located>, CheckpointError> {
    let mut out = BTreeMap::new();
    for (shard, s) in shards.iter().enumerate() {
        for (tensor, entry) in entries(s)? {
            let place = match index.places.get(&tensor) {
                Some(file) if *file == s.file => {
                    out.insert(tensor, Located { shard, entry });
                    continue;
                }
                Some(other) => format!("in {other}"),
                None => "nowhere".to_owned(),
            };
            return Err(CheckpointError::NotInIndex { tensor, shard: s.file.clone(), place });
        }
    }
    match index.places.iter().find(|(tensor, _)| !out.contains_key(*tensor)) {
        Some((tensor, shard)) => Err(CheckpointError::NotInShard { tensor: shown(tensor, 80), shard: shard.clone() }),
        None => Ok(out),
    }
}

fn entries(shard: &Shard) -> Result<BTreeMap<String, Entry>, CheckpointError> {
    let limits = Limits::MODEL;
    let entries = match &shard.bytes {
        Bytes::Mapped(map) => header::parse(map, limits),
        Bytes::Static(bytes) => header::parse(bytes, limits),
        Bytes::Stored(_, _, bytes) => {
            let length = shard.bytes.get(0..(*bytes).min(8) as usize)?;
            let header = length.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
            // What is longer is refused for the length alone.
            let head = if header > limits.header_bytes { 8 } else { header + 8 };
            header::parse_head(&shard.bytes.get(0..head.min(*bytes) as usize)?, *bytes, limits)
        }
    };
    entries.map_err(|source| CheckpointError::Header { file: shard.file.clone(), source })
}

struct Index {
    /// Tensor to file; every file is a plain name in the same folder.
    places: BTreeMap<String, String>,
    total_bytes: Option<u64>,
}

fn parse_index(text: &[u8]) -> Result<Index, CheckpointError> {
    let fail = |reason: String| CheckpointError::Index { reason };
    let value = json::parse(text).map_err(|reason| fail(format!("is not valid JSON ({reason})")))?;
    let total_bytes = value.pointer("/metadata/total_size").and_then(Value::as_u64);
    let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
        return Err(fail("has no weight_map".to_owned()));
    };
    let mut places = BTreeMap::new();
    for (tensor, file) in map {
        let plain =
            |f: &&str| f.len() <= 255 && f.ends_with(".safetensors") && f.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        let Some(file) = file.as_str().filter(plain) else {
            return Err(fail(format!(
                "places `{}` in {}, which is not the plain name of a safetensors file",
                shown(tensor, 80),
                json::shown_value(file)
            )));
        };
        places.insert(tensor.clone(), file.to_owned());
    }
    if places.is_empty() {
        return Err(fail("has an empty weight_map".to_owned()));
    }
    Ok(Index { places, total_bytes })
}

/// Opens `path` if it is a regular file or a link to one. Asking first keeps a FIFO from blocking the open.
fn open_regular(path: &Path) -> Result<(File, u64), CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(CheckpointError::NotAFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(io)?;
    // The length comes from what was opened, not from what the path meant before.
    let about = file.metadata().map_err(io)?;
    if !about.is_file() {
        return Err(CheckpointError::NotAFile { path: path.to_owned() });
    }
    Ok((file, about.len()))
}

/// Reads a small file whole.
pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let (file, bytes) = open_regular(path)?;
    let mut out = Vec::new();
    // One more than allowed tells a file that grew meanwhile.
    file.take(limit + 1).read_to_end(&mut out).map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
    if out.len() as u64 > limit {
        return Err(CheckpointError::TooLarge { path: path.to_owned(), bytes: bytes.max(limit + 1), limit });
    }
    Ok(out)
}

fn open_shard(dir: &Path, name: &str, access: Access) -> Result<Shard, CheckpointError> {
    let path = dir.join(name);
    let (file, bytes) = open_regular(&path)?;
    if access == Access::Read {
        return Ok(Shard { file: name.to_owned(), bytes: Bytes::Stored(file, path, bytes) });
    }
    if bytes == 0 {
        // An empty file cannot be mapped everywhere.
        return Err(CheckpointError::Header { file: name.to_owned(), source: HeaderError::TooShort { file: 0 } });
    }
    // SAFETY: the mapping is read-only and private to this process; the bytes are only ever read as plain numbers
    // (any bit pattern is a valid u8, f32, bf16 or f16), and every slice of it is bounds-checked against the mapping.
    // That nobody truncates or rewrites the file meanwhile is the documented condition on the model folder: rewriting
    // changes numbers, truncating ends the process with SIGBUS; neither can make a reference dangle.
    let map = unsafe { Mmap::map(&file) }.map_err(|source| CheckpointError::Io { path, source })?;
    Ok(Shard { file: name.to_owned(), bytes: Bytes::Mapped(map) })
}

/// `bytes` as elements, if they are aligned for them.
pub(super) fn cast<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(bytes: &[u8]) -> Option<Cow<'_, [T]>> {
    bytemuck::try_cast_slice(bytes).ok().map(Cow::Borrowed)
}
