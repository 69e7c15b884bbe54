//! The files of an adapter: found under a root they cannot leave, read whole, and named by the digest of their bytes.
//!
//! Weights are read into memory, not mapped: a file that shrinks under a mapping would end the process, and adapters come and go
//! while the server runs. Pickled weights are refused unread.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::adapters::AdapterError;
use crate::model::checkpoint::TensorView;
use crate::model::header::{self, Dtype, Entry, Limits};
use crate::model::weights::floats;

/// Largest configuration file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Where adapters may come from, and how large they may be.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// `None` lets them come from anywhere: for an operator's own command line.
    pub root: Option<PathBuf>,
    /// Of all files of weights of one adapter.
    pub bytes: u64,
}

/// An adapter's files.
pub struct Files {
    /// The real path of the folder.
    pub path: PathBuf,
    pub config_name: &'static str,
    pub config: Vec<u8>,
    pub tensors: Tensors,
    /// BLAKE3 of configuration and weights.
    pub digest: [u8; 32],
}

/// The tensors of one or several files.
pub struct Tensors {
    files: Vec<(String, Vec<u8>)>,
    entries: BTreeMap<String, (usize, Entry)>,
}

impl Bounds {
    /// The real path of `path`: relative ones lie under the root, and none leaves it, through links neither.
    ///
    /// # Errors
    /// Where there is nothing, or it is elsewhere.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf, AdapterError> {
        let shown = || crate::model::json::shown(&path.display().to_string(), 120);
        if path.as_os_str().is_empty() {
            return Err(AdapterError::NotFound { path: "an empty path".into(), why: "name its folder" });
        }
        let root = match &self.root {
            None => None,
            Some(root) => Some(root.canonicalize().map_err(|e| io(root, &e))?),
        };
        // The root may be a link, and paths spelled with its name.
        let within = self.root.as_ref().and_then(|configured| path.strip_prefix(configured).ok()).filter(|_| path.is_absolute());
        let path = within.unwrap_or(path);
        let asked = root.as_ref().map_or_else(|| path.to_owned(), |root| root.join(path));
        // What is outside is said to be so whether or not it exists: the answer must not tell what lies there.
        if let Some(root) = &root
            && !plain(&asked).starts_with(root)
        {
            return Err(AdapterError::Outside { path: shown() });
        }
        let real = asked.canonicalize().map_err(|e| match e.kind() {
            // Where a link leads to is not told either.
            std::io::ErrorKind::NotFound if root.is_some() && asked.is_symlink() => AdapterError::Outside { path: shown() },
            std::io::ErrorKind::NotFound => AdapterError::NotFound { path: shown(), why: "there is no such folder" },
            _ => io(path, &e),
        })?;
        match &root {
            Some(root) if !real.starts_with(root) => Err(AdapterError::Outside { path: shown() }),
            _ => Ok(real),
        }
    }

    /// The adapter in the folder `path`.
    ///
    /// # Errors
    /// Where there is none, or it is no adapter that can be read.
    pub fn read(&self, path: &Path) -> Result<Files, AdapterError> {
        let folder = self.resolve(path)?;
        let shown = || crate::model::json::shown(&path.display().to_string(), 120);
        if !folder.is_dir() {
            return Err(AdapterError::NotFound { path: shown(), why: "it is not a folder" });
        }
        let has = |name: &str| folder.join(name).exists();
        let (config_name, weights) = if has("adapter_config.json") {
            match (has("adapter_model.safetensors"), has("adapter_model.bin")) {
                (true, _) => ("adapter_config.json", vec!["adapter_model.safetensors".to_owned()]),
                (false, true) => {
                    return Err(AdapterError::NotServed {
                        what: "its weights are in pickle form (adapter_model.bin), which can run code and is not read".into(),
                        mend: "save it with safe_serialization=True, or convert the file to adapter_model.safetensors".into(),
                    });
                }
                (false, false) => {
                    return Err(AdapterError::NotFound { path: shown(), why: "the folder has no adapter_model.safetensors" });
                }
            }
        } else if has("config.json") {
            // Before gigabytes of a whole model are read for nothing.
            is_sorsa(&self.file(&folder, "config.json", CONFIG_BYTES_MAX)?)?;
            ("config.json", self.model_files(&folder)?)
        } else {
            return Err(AdapterError::NotFound { path: shown(), why: "the folder has no adapter_config.json" });
        };
        let config = self.file(&folder, config_name, CONFIG_BYTES_MAX)?;
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(b"strait adapter 1");
        part(&config);
        let mut files = Vec::new();
        let mut left = self.bytes;
        for name in weights {
            let bytes = self.file(&folder, &name, left)?;
            left -= bytes.len() as u64;
            part(&bytes);
            files.push((name, bytes));
        }
        let tensors = Tensors::new(files)?;
        Ok(Files { path: folder, config_name, config, tensors, digest: *hasher.finalize().as_bytes() })
    }

    /// Refuses a folder one of whose files is a link out of the root.
    ///
    /// # Errors
    /// There, or where it cannot be listed.
    pub fn confined(&self, folder: &Path) -> Result<(), AdapterError> {
        let Some(root) = &self.root else { return Ok(()) };
        let root = root.canonicalize().map_err(|e| io(root, &e))?;
        for entry in std::fs::read_dir(folder).map_err(|e| io(folder, &e))?.flatten() {
            if !entry.path().canonicalize().is_ok_and(|real| real.starts_with(&root)) {
                return Err(AdapterError::Outside { path: entry.file_name().to_string_lossy().into_owned() });
            }
        }
        Ok(())
    }

    /// The weight files of a folder in the form of a model.
    fn model_files(&self, folder: &Path) -> Result<Vec<String>, AdapterError> {
        if folder.join("model.safetensors").exists() {
            return Ok(vec!["model.safetensors".to_owned()]);
        }
        let index = "model.safetensors.index.json";
        if !folder.join(index).exists() {
            let path = folder.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            return Err(AdapterError::NotFound { path, why: "the folder has a config.json and no model.safetensors" });
        }
        let bad = |reason: String| AdapterError::Config { file: "model.safetensors.index.json", reason };
        let text = self.file(folder, index, 16 << 20)?;
        let value = crate::model::json::parse(&text).map_err(|e| bad(format!("is not valid JSON ({e})")))?;
        let map = value.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| bad("has no weight_map".into()))?;
        let mut names: Vec<String> = map.values().filter_map(|v| v.as_str().map(str::to_owned)).collect();
        names.sort_unstable();
        names.dedup();
        let plain = |n: &String| n.ends_with(".safetensors") && n.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if names.is_empty() || names.len() > 1024 || !names.iter().all(plain) {
            return Err(bad("does not name plain safetensors files".into()));
        }
        Ok(names)
    }

    /// One file of the folder, if it is a regular one under the root and not too long.
    fn file(&self, folder: &Path, name: &str, limit: u64) -> Result<Vec<u8>, AdapterError> {
        let path = folder.join(name);
        let io = |e: std::io::Error| AdapterError::Io { path: name.to_owned(), reason: e.to_string() };
        let real = path.canonicalize().map_err(io)?;
        if let Some(root) = &self.root {
            let root = root.canonicalize().map_err(io)?;
            if !real.starts_with(root) {
                return Err(AdapterError::Outside { path: name.to_owned() });
            }
        }
        // Asking first keeps a FIFO from blocking the open.
        let about = std::fs::metadata(&real).map_err(io)?;
        if !about.is_file() {
            return Err(AdapterError::Io { path: name.to_owned(), reason: "it is not a regular file".into() });
        }
        let too_large = |bytes| AdapterError::TooLarge { file: name.to_owned(), bytes, limit };
        if about.len() > limit {
            return Err(too_large(about.len()));
        }
        let mut out = Vec::with_capacity(about.len() as usize);
        let file = File::open(&real).map_err(io)?;
        // One more than allowed tells a file that grew meanwhile.
        file.take(limit + 1).read_to_end(&mut out).map_err(io)?;
        if out.len() as u64 > limit { Err(too_large(out.len() as u64)) } else { Ok(out) }
    }
}

/// Whether a model's configuration is a SORSA checkpoint's.
///
/// # Errors
/// Where it is another model's.
fn is_sorsa(config: &[u8]) -> Result<(), AdapterError> {
    let bad = |e| AdapterError::Config { file: "config.json", reason: format!("is not valid JSON ({e})") };
    match crate::model::json::parse(config).map_err(bad)?.get("model_type").and_then(|t| t.as_str()) {
        Some("sorsa") => Ok(()),
        other => {
            let what =
                other.map_or_else(|| "of no known type".into(), |t| format!("a whole model of type {}", crate::model::json::shown(t, 40)));
            Err(AdapterError::NotServed {
                what: format!("the folder holds no adapter_config.json but {what}"),
                mend: "name an adapter's folder, or serve that model by itself".into(),
            })
        }
    }
}

/// `path` without `.` and `..`, by its spelling alone.
fn plain(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

fn io(path: &Path, error: &std::io::Error) -> AdapterError {
    AdapterError::Io { path: crate::model::json::shown(&path.display().to_string(), 120), reason: error.to_string() }
}

impl Tensors {
    fn new(files: Vec<(String, Vec<u8>)>) -> Result<Tensors, AdapterError> {
        let mut entries = BTreeMap::new();
        for (at, (name, bytes)) in files.iter().enumerate() {
            // A whole model's header is longer than an adapter's.
            let limits = if name.starts_with("adapter") { Limits::ADAPTER } else { Limits::MODEL };
            let found = header::parse(bytes, limits).map_err(|source| AdapterError::Header { file: name.clone(), source })?;
            for (tensor, entry) in found {
                if entries.insert(tensor.clone(), (at, entry)).is_some() {
                    return Err(AdapterError::Tensor { tensor, reason: "is in two of the files".into() });
                }
            }
        }
        Ok(Tensors { files, entries })
    }

    /// Names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|(_, e)| &e.shape[..])
    }

    /// The elements of a tensor of this shape.
    ///
    /// # Errors
    /// Where it is not there, of another shape or type, or has elements that are not finite.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, AdapterError> {
        let bad = |reason: String| AdapterError::Tensor { tensor: name.to_owned(), reason };
        let Some((file, entry)) = self.entries.get(name) else { return Err(bad("is missing".into())) };
        if entry.shape != shape {
            return Err(bad(format!(
                "has the shape {:?}, and the served model makes it {shape:?}; is the adapter for another base?",
                entry.shape
            )));
        }
        if let Dtype::Other(other, _) = entry.dtype {
            return Err(bad(format!("is stored as {other}; F32, BF16 and F16 are read")));
        }
        let data = &self.files[*file].1[entry.begin..entry.end];
        // A loop for each type: an adapter is read while others wait for it.
        let out: Vec<f32> = match entry.dtype {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::Bf16 => data.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect(),
            _ => floats(TensorView { dtype: entry.dtype, shape: &entry.shape, data }).collect(),
        };
        match out.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(bad(format!("has {} at element {at}: it is damaged, or its training diverged", out[at]))),
            None => Ok(out),
        }
    }
}
