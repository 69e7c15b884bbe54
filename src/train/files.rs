//! The training directory: what a run needs to go on after it was killed at any moment.
//!
//! ```text
//! lock                       held by the process that trains here
//! settings.json              what the training is of; everything else here belongs to it
//! layer-000.activations ...  what the exact model makes of the calibration texts: per token, in the order of the texts, f32
//!                            little-endian: keys (before rope), values, queries (before rope); then BLAKE3 of these bytes
//! start.safetensors          the untrained artifact that training starts from
//! <profile>-000.checkpoint   per profile and layer (`checkpoint`)
//! loss.csv, loss.svg         the curves
//! ```
//!
//! Every file takes its name only when all of it is on the disk.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::files::{Draft, part};
use crate::model::config::ModelConfig;
use crate::model::decoder::Observer;
use crate::train::TrainError;

const LOCK: &str = "lock";
const SETTINGS: &str = "settings.json";

/// What a training is of, in words: key and value. Two runs with the same make the same files.
pub type Identity = BTreeMap<String, String>;

/// A training directory that this process alone works in.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// BLAKE3 of the settings, in every checkpoint.
    pub(super) digest: String,
    /// Locked until it is closed, by whatever end of the process.
    _lock: File,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TrainError {
    move |source| TrainError::Io { action, path: path.to_owned(), source }
}

impl Directory {
    /// Makes the directory for this training, or opens it to go on.
    ///
    /// # Errors
    /// Where it holds another training, or anything else; where another process is at work in it; where it cannot be written.
    pub fn open(path: &Path, identity: &Identity) -> Result<Directory, TrainError> {
        std::fs::create_dir_all(path).map_err(failed("make", path))?;
        // Nothing is left in a folder that is somebody else's: not even a lock.
        if occupied(path)? {
            return Err(TrainError::Occupied { path: path.to_owned() });
        }
        let lock_path = path.join(LOCK);
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(failed("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(TrainError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(e)) => return Err(failed("lock", &lock_path)(e)),
        }
        let settings = path.join(SETTINGS);
        let text = serde_json::to_string_pretty(identity).expect("a map of strings is JSON");
        match std::fs::read(&settings) {
            Ok(there) => {
                let unknown = |e: serde_json::Error| TrainError::Unknown { path: path.to_owned(), reason: e.to_string() };
                let there: Identity = serde_json::from_slice(&there).map_err(unknown)?;
                let keys = identity.keys().chain(there.keys());
                if let Some(key) = keys.into_iter().find(|&k| there.get(k) != identity.get(k)) {
                    let say = |map: &Identity| map.get(key).cloned().unwrap_or_else(|| "none".into());
                    return Err(TrainError::Other { path: path.to_owned(), what: key.clone(), there: say(&there), here: say(identity) });
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if occupied(path)? {
                    return Err(TrainError::Occupied { path: path.to_owned() });
                }
                replace(&settings, text.as_bytes())?;
            }
            Err(e) => return Err(failed("read", &settings)(e)),
        }
        Ok(Directory { path: path.to_owned(), digest: blake3::hash(text.as_bytes()).to_hex().to_string(), _lock: lock })
    }

    /// Where the untrained artifact is kept.
    pub fn start(&self) -> PathBuf {
        self.path.join("start.safetensors")
    }

    pub(super) fn checkpoint(&self, profile: &str, layer: usize) -> PathBuf {
        self.path.join(format!("{profile}-{layer:03}.checkpoint"))
    }

    pub(super) fn curves(&self) -> [PathBuf; 2] {
        ["loss.csv", "loss.svg"].map(|name| self.path.join(name))
    }

    fn activations(&self, layer: usize) -> PathBuf {
        self.path.join(format!("layer-{layer:03}.activations"))
    }

    /// Whether the activations of `tokens` tokens are there, of every layer.
    pub fn recorded(&self, model: &ModelConfig, tokens: usize) -> bool {
        let size = (tokens * record(model) * 4 + blake3::OUT_LEN) as u64;
        (0..model.layers).all(|layer| std::fs::metadata(self.activations(layer)).is_ok_and(|m| m.len() == size))
    }

    /// Begins to record the activations of every layer.
    ///
    /// # Errors
    /// Where a file cannot be made.
    pub fn recorder(&self, model: &ModelConfig) -> Result<Recorder, TrainError> {
        let open = |layer| {
            let path = self.activations(layer);
            let draft = Draft::alone(&path).map_err(failed("write", &path))?;
            Ok(Recording { path, draft, digest: blake3::Hasher::new() })
        };
        Ok(Recorder {
            kv_channels: model.kv_channels(),
            q_channels: model.q_channels(),
            layers: (0..model.layers).map(open).collect::<Result<_, TrainError>>()?,
            pending: Vec::new(),
            failed: None,
        })
    }

    /// The activations of one layer: per token keys and values `[kv_channels]` each, and queries `[q_channels]`, before rope.
    ///
    /// # Errors
    /// Where the file cannot be read, or is not what was written: what training makes of other numbers would be maps all the same.
    pub fn layer(&self, layer: usize) -> Result<Vec<f32>, TrainError> {
        let path = self.activations(layer);
        let bytes = std::fs::read(&path).map_err(failed("read", &path))?;
        let bytes = match bytes.split_last_chunk() {
            Some((bytes, digest)) if blake3::hash(bytes) == *digest => bytes,
            _ => return Err(TrainError::Damaged { path, reason: "its numbers are not those that were written".into() }),
        };
        Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }
}

/// Whether a folder holds anything and no settings: not what a training leaves, at whatever moment it is killed.
fn occupied(path: &Path) -> Result<bool, TrainError> {
    let (mut settings, mut other) = (false, false);
    for entry in std::fs::read_dir(path).map_err(failed("read", path))? {
        let name = entry.map_err(failed("read", path))?.file_name();
        settings |= name == SETTINGS;
        other |= name != LOCK && Some(&*name) != part(Path::new(SETTINGS)).file_name();
    }
    Ok(other && !settings)
}

/// Numbers that are kept of one token in one layer.
pub fn record(model: &ModelConfig) -> usize {
    2 * model.kv_channels() + model.q_channels()
}

/// Writes the activations of all layers as a forward pass makes them, tokens in the order they come.
#[derive(Debug)]
pub struct Recorder {
    kv_channels: usize,
    q_channels: usize,
    layers: Vec<Recording>,
    /// Keys, then values, of the layer that is at work, until its queries come.
    pending: Vec<f32>,
    failed: Option<TrainError>,
}

#[derive(Debug)]
struct Recording {
    path: PathBuf,
    draft: Draft,
    digest: blake3::Hasher,
}

impl Recorder {
    /// What went wrong since it was last asked.
    ///
    /// # Errors
    /// Where an activation was not finite, or could not be written. What came after is lost.
    pub fn check(&mut self) -> Result<(), TrainError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Takes everything to the disk and gives the files their names.
    ///
    /// # Errors
    /// Where that fails, or something failed before.
    pub fn finish(mut self) -> Result<(), TrainError> {
        self.check()?;
        self.layers.into_iter().try_for_each(|Recording { path, mut draft, digest }| {
            draft.write_all(digest.finalize().as_bytes()).and_then(|()| draft.place()).map_err(failed("write", &path))
        })
    }

    fn refuse_wild(&mut self, layer: usize, part: &'static str, x: &[f32], channels: usize) {
        if let Some(at) = x.iter().position(|x| !x.is_finite()) {
            self.failed.get_or_insert(TrainError::NotFinite { layer, part, token: at / channels });
        }
    }
}

impl Observer for Recorder {
    fn inputs(&mut self, _: usize, _: &[f32], _: &[f32]) {}

    fn observe(&mut self, layer: usize, _: &[u32], keys: &[f32], values: &[f32]) {
        self.refuse_wild(layer, "keys", keys, self.kv_channels);
        self.refuse_wild(layer, "values", values, self.kv_channels);
        self.pending.clear();
        self.pending.extend_from_slice(keys);
        self.pending.extend_from_slice(values);
    }

    fn queries(&mut self, layer: usize, queries: &[f32]) {
        self.refuse_wild(layer, "queries", queries, self.q_channels);
        if self.failed.is_some() {
            return;
        }
        let (keys, values) = self.pending.split_at(self.pending.len() / 2);
        let tokens =
            keys.chunks_exact(self.kv_channels).zip(values.chunks_exact(self.kv_channels)).zip(queries.chunks_exact(self.q_channels));
        let bytes: Vec<u8> = tokens.flat_map(|((k, v), q)| k.iter().chain(v).chain(q)).flat_map(|x| x.to_le_bytes()).collect();
        let Recording { path, draft, digest } = &mut self.layers[layer];
        digest.update(&bytes);
        if let Err(e) = draft.write_all(&bytes) {
            self.failed = Some(failed("write", path)(e));
        }
    }
}

/// Puts `bytes` at `path`, all of them or none. The lock keeps others out, so a draft of each file is enough, and what a kill left of
/// it is written over.
///
/// # Errors
/// Where that fails; what stood there before stands unchanged then.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let write = || {
        let mut draft = Draft::alone(path)?;
        draft.write_all(bytes)?;
        draft.place()
    };
    write().map_err(failed("write", path))
}
