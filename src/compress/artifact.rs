//! The compression artifact: one file that holds the bases of a model and the profiles made of them.
//!
//! ```text
//! u64 little-endian   n, length of the header
//! n bytes             header: JSON, padded with spaces to a multiple of 8
//!                       "__metadata__": { "strait.manifest": <the manifest, JSON as a string>,
//!                                         "strait.blake3":   <64 hex digits: BLAKE3 of manifest then data> }
//!                       "<tensor>": { "dtype": "F32", "shape": [...], "data_offsets": [begin, end] } ...
//! the rest            data: the tensors in the order of the header, little-endian f32, without gaps
//! ```
//!
//! That is the safetensors format, so any reader of it opens the file. The manifest:
//!
//! ```text
//! { "format": "strait-compression", "version": 3,
//!   "base": "<64 hex digits>",                    fingerprint of the checkpoint, as the loader computes it
//!   "layers": L, "kv_heads": H, "head_dim": D,
//!   "bases": [ { "name": "joint",
//!                "keys": "channels",              or "frequencies"
//!                "heads_per_group": H,            KV heads that share one map of channels; divides H
//!                "init": "weighted",              or "closed", "svd", "asvd": how it was found, or what training began from
//!                "up": "directions",              or "nested" or "trained": what turns latents back (below)
//!                "widths": [[k, v], ...] } ],     per layer: latent elements of keys and values, all groups
//!   "profiles": [ { "name": "cskv-80",
//!                   "size": { "key_rank": 0.2, "value_rank": 0.2, "key_bits": 16, "value_bits": 16 },
//!                                                 or { "budget": 512 }: bytes of a position over all layers
//!                   "key_quantiser": "affine", "value_quantiser": "affine",      or "hadamard"
//!                   "window": 64, "sinks": 4,
//!                   "basis": "joint",             one of "bases"
//!                   "layers": [ { "keys": { "rank": 26, "bits": 4 }, "values": { "rank": 26, "bits": 4 } }, ... ] } ] }
//!                                                 leading latent elements used, all groups, and bits of each
//! ```
//!
//! Of a hadamard profile, latents are turned by `quant::Rotation` of the rank, group by group, before they are quantised. Maps of
//! channels that were trained have that in them already.
//!
//! Tensors, for every basis and layer and for `keys` (before rope) and `values`, with `C = H * D` channels,
//! `G = H / heads_per_group` groups of `C / G` channels, and `R` the width:
//!
//! ```text
//! <basis>.<layer>.keys.mean         [C]
//! <basis>.<layer>.keys.directions   [G, R / G, C / G]    latent = (x - mean) . directions^T, group by group
//! <basis>.<layer>.keys.up           [G, R / G, C / G]    x ~ mean + latent . up; not where "up" is "directions", which
//!                                                        then are orthonormal and serve for it
//! ```
//!
//! Keys by rope frequency (`"keys": "frequencies"`) have `R / 2` complex latent elements and no mean. With `z[h]` made of channels
//! `f` and `f + D / 2` of head `h` as real and imaginary part:
//!
//! ```text
//! <basis>.<layer>.keys.frequencies  [R / 2]              f of each latent element, a whole number below D / 2
//! <basis>.<layer>.keys.directions   [R / 2, H, 2]        latent = sum over h of conj(direction[h]) z[h]
//! <basis>.<layer>.keys.up           [R / 2, H, 2]        z[h] ~ sum over elements of frequency f of latent * up[h]
//! ```
//!
//! Directions lie row by row in falling order of energy, so a profile of smaller rank reads a prefix of each
//! group (unless they are trained, for their own width only), and profiles that differ in rank, bits or window share every byte. Elements are f32: a bf16 basis turns each
//! direction by about 0.2 %, an error as large as that of the bf16 keys it projects, to save half of a file that is a
//! hundredth of its model (Llama-3.1-8B up to 50 % rank: 134 MB beside 16 GB).

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::{Basis, FrequencyBasis, KeyBasis, LayerBasis, LayerCompression, RankError, Up};
use crate::files::{Draft, replace_file};
use crate::ids::PAGE_TOKENS;
use crate::kv::layout::{BasisKind, Cskv, Init, Profile, Quantiser, Size, WINDOW_MOST, Width, Widths};
use crate::model::config::ModelConfig;

const FORMAT: &str = "strait-compression";
const VERSION: u32 = 3;
const MANIFEST: &str = "strait.manifest";
const DIGEST: &str = "strait.blake3";
/// Bytes of a header that the format allows.
const HEADER_MOST: u64 = 100_000_000;

/// The bases of one model and the profiles that were made with them. Whoever holds one knows that every shape
/// fits the model, every number is finite, and every profile can be served.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    base: Fingerprint,
    model: ModelConfig,
    bases: Vec<BasisSet>,
    profiles: Vec<StoredProfile>,
}

/// The bases of all layers, grouped alike.
#[derive(Clone, Debug, PartialEq)]
pub struct BasisSet {
    /// Part of the tensors' names: ASCII letters, digits, `-` and `_`.
    pub name: String,
    pub heads_per_group: usize,
    /// How it was found, or what training began from.
    pub init: Init,
    pub layers: Vec<LayerBasis>,
}

/// A profile that the artifact was made for.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredProfile {
    /// Compressed; its basis kind is that of the basis.
    pub profile: Profile,
    /// Name of the [`BasisSet`] it reads.
    pub basis: String,
    /// Latents per layer.
    pub widths: Vec<Widths>,
}

/// Identity of a checkpoint's weights.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// Why an artifact cannot be read, made, used or written.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("cannot read the compression artifact {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write the compression artifact {}: {source}; what was there before is unchanged", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} is there and is no compression artifact; remove it, or name another file", path.display())]
    Occupied { path: PathBuf },
    #[error("the compression artifact is not a whole safetensors file: {0}; make it anew with `strait compress`")]
    Container(String),
    #[error("the file is not a compression artifact: its metadata has no {0}; name one that `strait compress` wrote")]
    NoManifest(&'static str),
    #[error("the manifest of the compression artifact is not what this version reads: {0}")]
    Manifest(String),
    #[error(
        "the compression artifact has format version {found} and this build reads version {VERSION}; make it anew with `strait compress`"
    )]
    Version { found: u64 },
    #[error(
        "the compression artifact was damaged: its contents have digest {found} and it was written with {want}; make it anew with `strait compress`"
    )]
    Damaged { found: String, want: String },
    #[error(
        "the compression artifact was made for base {artifact} and the model is {model}; make one for this model with `strait compress`"
    )]
    WrongBase { artifact: Fingerprint, model: Fingerprint },
    #[error("the compression artifact is for {what} {artifact} and the model has {model}")]
    Geometry { what: &'static str, artifact: usize, model: usize },
    #[error("the compression artifact lacks the tensor {0}")]
    Missing(String),
    #[error("the compression artifact has a tensor {0} that its manifest does not know")]
    Unknown(String),
    #[error("the tensor {tensor} is {found} and its manifest says {want}")]
    Shape { tensor: String, found: String, want: String },
    #[error("the tensor {tensor} has a value that is not finite at element {index}")]
    NotFinite { tensor: String, index: usize },
    #[error("the basis {basis} is not usable: {reason}")]
    Basis { basis: String, reason: String },
    #[error("the profile {profile} is not usable: {reason}")]
    Profile { profile: String, reason: String },
    #[error("the profile {profile} cannot be served by this artifact: {part} of layer {layer}: {source}")]
    Rank { profile: String, layer: usize, part: &'static str, source: RankError },
    #[error(
        "the compression artifact has no basis of {wanted} for the profile {profile}; it has: {has}; make it anew with `strait compress --config`, of the file that defines the profile"
    )]
    NoBasis { profile: String, wanted: String, has: String },
}

use ArtifactError as Error;

/// The manifest as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: String,
    version: u64,
    base: String,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    bases: Vec<ManifestBasis>,
    profiles: Vec<ManifestProfile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestBasis {
    name: String,
    keys: KeyKind,
    heads_per_group: usize,
    #[serde(with = "InitName")]
    init: Init,
    up: UpKind,
    widths: Vec<(usize, usize)>,
}

/// [`Init`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Init", rename_all = "kebab-case")]
enum InitName {
    Svd,
    Asvd,
    Closed,
    Weighted,
}

/// [`Quantiser`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Quantiser", rename_all = "kebab-case")]
enum QuantiserName {
    Affine,
    Hadamard,
}

/// [`Size`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum ManifestSize {
    Shares { key_rank: f64, value_rank: f64, key_bits: u32, value_bits: u32 },
    Budget { budget: u32 },
}

/// [`Widths`] as they are written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestWidths {
    keys: Width,
    values: Width,
}

/// What the keys of a basis set are taken by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyKind {
    Channels,
    Frequencies,
}

/// [`Up`] of all layers of a basis set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum UpKind {
    Directions,
    Nested,
    Trained,
}

impl UpKind {
    fn of(up: &Up) -> Self {
        match up {
            Up::Directions => UpKind::Directions,
            Up::Nested(_) => UpKind::Nested,
            Up::Trained(_) => UpKind::Trained,
        }
    }

    fn up(self, tensor: impl FnOnce() -> Result<Vec<f32>, Error>) -> Result<Up, Error> {
        Ok(match self {
            UpKind::Directions => Up::Directions,
            UpKind::Nested => Up::Nested(tensor()?),
            UpKind::Trained => Up::Trained(tensor()?),
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestProfile {
    name: String,
    size: ManifestSize,
    #[serde(with = "QuantiserName")]
    key_quantiser: Quantiser,
    #[serde(with = "QuantiserName")]
    value_quantiser: Quantiser,
    window: u32,
    sinks: u32,
    basis: String,
    layers: Vec<ManifestWidths>,
}

/// What a compressed profile is served with.
struct Choice<'a> {
    basis: &'a BasisSet,
    widths: Vec<Widths>,
}

impl Artifact {
    /// An artifact of these bases and profiles.
    ///
    /// # Errors
    /// Where a shape does not fit `model`, a number is not finite, a name is used twice, or a profile asks for what
    /// its basis does not have.
    pub fn new(base: Fingerprint, model: &ModelConfig, bases: Vec<BasisSet>, profiles: Vec<StoredProfile>) -> Result<Self, Error> {
        let artifact = Artifact { base, model: model.clone(), bases, profiles };
        artifact.check()?;
        Ok(artifact)
    }

    /// Reads and checks the artifact at `path`, which must be for this very model. The file is read whole, once its header says that it
    /// is that: a checkpoint that was named by mistake may be larger than memory.
    ///
    /// # Errors
    /// Where it cannot be read, is damaged, is of another version or base, or does not hold together.
    pub fn read(path: &Path, model: &ModelConfig, base: Fingerprint) -> Result<Self, Error> {
        /// All that counts of the header before the tensors are there.
        #[derive(Deserialize)]
        struct Header {
            #[serde(default, rename = "__metadata__")]
            metadata: Option<HashMap<String, String>>,
        }
        let failed = |source| Error::Read { path: path.to_owned(), source };
        let regular = std::fs::metadata(path).map_err(failed)?.is_file();
        if !regular {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        let mut file = std::fs::File::open(path).map_err(failed)?;
        let mut bytes = Vec::new();
        (&file).take(8).read_to_end(&mut bytes).map_err(failed)?;
        let length = bytes.first_chunk().map_or(0, |&n| u64::from_le_bytes(n));
        (&file).take(length.min(HEADER_MOST)).read_to_end(&mut bytes).map_err(failed)?;
        // What has no header that can be read is no container, whatever comes behind.
        if let Ok(header) = serde_json::from_slice::<Header>(bytes.get(8..).unwrap_or_default()) {
            manifest_of(header.metadata.as_ref(), base)?;
            file.read_to_end(&mut bytes).map_err(failed)?;
        }
        Self::from_bytes(&bytes, model, base)
    }

    /// As [`Artifact::read`], from memory.
    ///
    /// # Errors
    /// As [`Artifact::read`].
    pub fn from_bytes(bytes: &[u8], model: &ModelConfig, base: Fingerprint) -> Result<Self, Error> {
        let container = |e: safetensors::SafeTensorError| Error::Container(e.to_string());
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(container)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(container)?;
        let (manifest, text, want) = manifest_of(metadata.metadata().as_ref(), base)?;
        let mut digest = blake3::Hasher::new();
        digest.update(text.as_bytes()).update(&bytes[8 + header..]);
        let found = Fingerprint(*digest.finalize().as_bytes()).to_string();
        if found != *want {
            return Err(Error::Damaged { found, want: want.clone() });
        }
        manifest.check_geometry(model)?;

        let mut known = HashSet::new();
        let bases = manifest.bases.iter().map(|b| b.read(&tensors, model, &mut known)).collect::<Result<Vec<_>, _>>()?;
        if let Some(name) = tensors.names().into_iter().find(|&n| !known.contains(n)) {
            return Err(Error::Unknown(name.to_owned()));
        }
        let profiles = manifest.profiles.into_iter().map(|p| p.stored(&bases, model)).collect::<Result<Vec<_>, _>>()?;
        Self::new(base, model, bases, profiles)
    }

    /// Writes the artifact, whole or not at all: into a new file beside `path` that takes its place once it is on
    /// the disk.
    ///
    /// # Errors
    /// Where the folder cannot be written or is full; what stood at `path` before stands unchanged then.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        replace_file(path, |w| self.write_to(w)).map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// Whether [`Artifact::write`] can begin at `path`: for who will know only in an hour what to write there. What is there may only
    /// be another artifact, whole or not, or empty: weights that were named by mistake would be gone.
    ///
    /// # Errors
    /// As it does, and [`ArtifactError::Occupied`].
    pub fn check_place(path: &Path) -> Result<(), Error> {
        let failed = |source| Error::Write { path: path.to_owned(), source };
        Draft::beside(path).map(drop).map_err(failed)?;
        let mut begins = Vec::new();
        match std::fs::File::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.map_err(failed)?.take(256).read_to_end(&mut begins).map_err(failed)?,
        };
        // The manifest is the first thing that the header has.
        match begins.is_empty() || begins.windows(MANIFEST.len()).any(|w| w == MANIFEST.as_bytes()) {
            true => Ok(()),
            false => Err(Error::Occupied { path: path.to_owned() }),
        }
    }

    /// The bytes of the file. The same artifact gives the same bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes).expect("memory takes every byte");
        bytes
    }

    /// Fingerprint of the checkpoint this is for.
    pub fn base(&self) -> Fingerprint {
        self.base
    }

    /// What the profiles are made of.
    pub fn bases(&self) -> &[BasisSet] {
        &self.bases
    }

    /// The profiles this was made for. Others are served as well, as far as a basis of their kind is wide enough.
    pub fn profiles(&self) -> &[StoredProfile] {
        &self.profiles
    }

    /// Latents of `profile` per layer, where its basis is a computed one; none for others. See [`Artifact::layers`].
    ///
    /// # Errors
    /// As [`Artifact::layers`], but for widths that its basis does not have.
    pub fn widths(&self, profile: &Profile) -> Result<Vec<Widths>, Error> {
        match &profile.cskv {
            Some(cskv) if cskv.basis.is_computed() => Ok(self.choose(&profile.name, cskv)?.widths),
            _ => Ok(Vec::new()),
        }
    }

    /// The maps of `profile`, per layer, where its basis is a computed one; none for others.
    ///
    /// A profile that the artifact was made for (same name, size and grouping) takes the basis and the widths stored for it, whatever its
    /// window and sinks; of shares whatever its bits and quantisers too, unless the basis was trained for some. Any other takes, evenly
    /// over the layers, the widths of its shares from the first untrained basis of its grouping and init.
    ///
    /// # Errors
    /// Where no basis has the profile's grouping, or it is too narrow for its ranks; where a budget is not the one stored.
    pub fn layers(&self, profile: &Profile) -> Result<Vec<LayerCompression>, Error> {
        let Some(cskv) = profile.cskv.as_ref().filter(|c| c.basis.is_computed()) else { return Ok(Vec::new()) };
        let Choice { basis, widths } = self.choose(&profile.name, cskv)?;
        let trained = basis.trained();
        let layers = basis.layers.iter().zip(widths).enumerate();
        layers
            .map(|(layer, (basis, widths))| {
                let at = |part| move |source| Error::Rank { profile: profile.name.clone(), layer, part, source };
                let maps = LayerCompression {
                    keys: basis.keys.map(widths.keys.rank).map_err(at("keys"))?,
                    values: basis.values.projection(widths.values.rank).map_err(at("values"))?,
                };
                Ok(if trained { maps.as_trained(cskv) } else { maps.for_quantisers(cskv) })
            })
            .collect()
    }

    fn choose(&self, name: &str, cskv: &Cskv) -> Result<Choice<'_>, Error> {
        check_spec(name, cskv, &self.model)?;
        let heads_per_group = cskv.basis.heads_per_group(self.model.kv_heads);
        let kind = KeyKind::of(cskv.basis);
        let fits =
            |b: &BasisSet| b.heads_per_group == heads_per_group && b.key_kind() == kind && cskv.init.is_none_or(|init| init == b.init);
        for stored in self.profiles.iter().filter(|p| p.profile.name == name) {
            let made = stored.profile.cskv.as_ref().expect("check refuses exact profiles");
            let basis = self.basis(&stored.basis).expect("check finds the basis of every profile");
            if !fits(basis) {
                continue;
            }
            // What was trained through a quantiser, or spread by what it costs, is for that one.
            let bound = basis.trained() || matches!(made.size, Size::Budget(_));
            let quantisers = (made.key_quantiser, made.value_quantiser) == (cskv.key_quantiser, cskv.value_quantiser);
            if made.size == cskv.size && (!bound || quantisers) {
                return Ok(Choice { basis, widths: stored.widths.clone() });
            }
            if let (Size::Shares { key_rank, value_rank, .. }, Size::Shares { key_rank: k, value_rank: v, .. }) = (made.size, cskv.size)
                && (key_rank, value_rank) == (k, v)
                && !basis.trained()
            {
                let own = cskv.widths(&self.model).expect("shares give widths");
                let bits = |w: &Widths| Widths {
                    keys: Width { bits: own.keys.bits, ..w.keys },
                    values: Width { bits: own.values.bits, ..w.values },
                };
                return Ok(Choice { basis, widths: stored.widths.iter().map(bits).collect() });
            }
        }
        let refuse = |reason: String| Error::Profile { profile: name.to_owned(), reason };
        let widths = cskv.widths(&self.model).ok_or_else(|| {
            refuse(
                "the artifact was not made for this name, budget and quantisers; make it anew with `strait compress`, or define shares"
                    .to_owned(),
            )
        })?;
        let Some(basis) = self.bases.iter().find(|b| fits(b) && !b.trained()) else {
            let shape = |kind, heads| match kind {
                KeyKind::Channels => format!("{heads} heads per group"),
                KeyKind::Frequencies => "keys by frequency".to_owned(),
            };
            let describe = |b: &BasisSet| {
                let init = b.init.name();
                format!("{} ({}, {init}{})", b.name, shape(b.key_kind(), b.heads_per_group), if b.trained() { ", trained" } else { "" })
            };
            return Err(Error::NoBasis {
                profile: name.to_owned(),
                wanted: shape(kind, heads_per_group) + &cskv.init.map_or(String::new(), |i| format!(", {}", i.name())),
                has: self.bases.iter().map(describe).collect::<Vec<_>>().join(", "),
            });
        };
        Ok(Choice { basis, widths: vec![widths; self.model.layers] })
    }

    fn basis(&self, name: &str) -> Option<&BasisSet> {
        self.bases.iter().find(|b| b.name == name)
    }

    fn check(&self) -> Result<(), Error> {
        let mut names = HashSet::new();
        for set in &self.bases {
            let refuse = |reason: String| Error::Basis { basis: set.name.clone(), reason };
            if set.name.is_empty() || !set.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
                return Err(refuse("a name is made of letters, digits, - and _".to_owned()));
            }
            if !names.insert(&set.name) {
                return Err(refuse("two bases have this name".to_owned()));
            }
            check_groups(set.heads_per_group, &self.model).map_err(refuse)?;
            if set.layers.len() != self.model.layers {
                return Err(Error::Geometry { what: "layers", artifact: set.layers.len(), model: self.model.layers });
            }
            for (layer, one) in set.layers.iter().enumerate() {
                let at = |part: &str, reason: String| refuse(format!("{part} of layer {layer}: {reason}"));
                match &one.keys {
                    KeyBasis::Channels(basis) => check_basis(basis, set, &self.model).map_err(|reason| at("keys", reason))?,
                    KeyBasis::Frequencies(basis) => check_frequencies(basis, set, &self.model).map_err(|reason| at("keys", reason))?,
                }
                check_basis(&one.values, set, &self.model).map_err(|reason| at("values", reason))?;
                for (part, tensor, _, values) in one.tensors() {
                    if let Some(index) = values.iter().position(|x| !x.is_finite()) {
                        return Err(Error::NotFinite { tensor: tensor_name(&set.name, layer, part, tensor), index });
                    }
                }
                let first = &set.layers[0];
                if UpKind::of(one.keys.up()) != set.up_kind() || UpKind::of(&one.values.up) != set.up_kind() {
                    return Err(refuse("some layers are trained pairs and some are not".to_owned()));
                }
                if std::mem::discriminant(&one.keys) != std::mem::discriminant(&first.keys) {
                    return Err(refuse("some layers have keys by channels and some by frequencies".to_owned()));
                }
            }
        }
        let mut names = HashSet::new();
        for stored in &self.profiles {
            let name = &stored.profile.name;
            let refuse = |reason: String| Error::Profile { profile: name.clone(), reason };
            if name.is_empty() || name.len() > 64 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
                return Err(refuse("a name is 1 to 64 letters, digits, '-', '_' or '.'".to_owned()));
            }
            if name == "full" {
                return Err(refuse("full is the exact cache".to_owned()));
            }
            if !names.insert(name) {
                return Err(refuse("two profiles have this name".to_owned()));
            }
            let cskv = stored.profile.cskv.as_ref().ok_or_else(|| refuse("an exact profile needs no basis".to_owned()))?;
            check_spec(name, cskv, &self.model)?;
            let basis =
                self.basis(&stored.basis).ok_or_else(|| refuse(format!("it reads the basis {}, which is not there", stored.basis)))?;
            if !cskv.basis.is_computed() {
                return Err(refuse("it needs no basis".to_owned()));
            }
            if cskv.basis.heads_per_group(self.model.kv_heads) != basis.heads_per_group || KeyKind::of(cskv.basis) != basis.key_kind() {
                return Err(refuse(format!("it is grouped otherwise than its basis {}", basis.name)));
            }
            if stored.widths.len() != self.model.layers {
                return Err(refuse(format!("it has ranks for {} of {} layers", stored.widths.len(), self.model.layers)));
            }
            for (layer, (one, widths)) in basis.layers.iter().zip(&stored.widths).enumerate() {
                let at = |part| move |source| Error::Rank { profile: name.clone(), layer, part, source };
                one.keys.check_rank(widths.keys.rank).map_err(at("keys"))?;
                one.values.check_rank(widths.values.rank).map_err(at("values"))?;
                check_bits(widths, cskv).map_err(refuse)?;
            }
        }
        Ok(())
    }

    fn manifest(&self) -> Manifest {
        let basis = |set: &BasisSet| ManifestBasis {
            name: set.name.clone(),
            keys: set.key_kind(),
            heads_per_group: set.heads_per_group,
            init: set.init,
            up: set.up_kind(),
            widths: set.layers.iter().map(|l| (l.keys.width(), l.values.width())).collect(),
        };
        let profile = |stored: &StoredProfile| {
            let cskv = stored.profile.cskv.as_ref().expect("check refuses exact profiles");
            ManifestProfile {
                name: stored.profile.name.clone(),
                size: match cskv.size {
                    Size::Shares { key_rank, value_rank, key_bits, value_bits } => {
                        ManifestSize::Shares { key_rank, value_rank, key_bits, value_bits }
                    }
                    Size::Budget(budget) => ManifestSize::Budget { budget },
                },
                key_quantiser: cskv.key_quantiser,
                value_quantiser: cskv.value_quantiser,
                window: cskv.window,
                sinks: cskv.sinks,
                basis: stored.basis.clone(),
                layers: stored.widths.iter().map(|&Widths { keys, values }| ManifestWidths { keys, values }).collect(),
            }
        };
        Manifest {
            format: FORMAT.to_owned(),
            version: VERSION.into(),
            base: self.base.to_string(),
            layers: self.model.layers,
            kv_heads: self.model.kv_heads,
            head_dim: self.model.head_dim,
            bases: self.bases.iter().map(basis).collect(),
            profiles: self.profiles.iter().map(profile).collect(),
        }
    }

    /// Streams the file; what is buffered is one tensor. Each tensor is visited twice, as the digest stands before it.
    fn write_to(&self, w: &mut dyn Write) -> io::Result<()> {
        let manifest = serde_json::to_string(&self.manifest()).map_err(io::Error::other)?;
        let mut digest = blake3::Hasher::new();
        digest.update(manifest.as_bytes());
        let mut entries = serde_json::Map::new();
        let mut at = 0;
        self.for_each_tensor(|name, shape, data| {
            let end = at + data.len() * 4;
            entries.insert(name, serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [at, end] }));
            at = end;
            digest.update(&little_endian(data));
            Ok(())
        })?;
        let digest = Fingerprint(*digest.finalize().as_bytes()).to_string();
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), serde_json::json!({ MANIFEST: manifest, DIGEST: digest }));
        header.extend(entries);
        let mut header = serde_json::to_vec(&header).map_err(io::Error::other)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(&header)?;
        self.for_each_tensor(|_, _, data| w.write_all(&little_endian(data)))
    }

    fn for_each_tensor(&self, mut visit: impl FnMut(String, Vec<usize>, &[f32]) -> io::Result<()>) -> io::Result<()> {
        for set in &self.bases {
            for (layer, one) in set.layers.iter().enumerate() {
                for (part, tensor, shape, data) in one.tensors() {
                    visit(tensor_name(&set.name, layer, part, tensor), shape, &data)?;
                }
            }
        }
        Ok(())
    }
}

impl BasisSet {
    /// Whether its layers are trained pairs, each for its own width.
    pub fn trained(&self) -> bool {
        self.up_kind() == UpKind::Trained
    }

    /// What keys are taken by.
    pub fn key_kind(&self) -> KeyKind {
        match self.layers.first().map(|l| &l.keys) {
            Some(KeyBasis::Frequencies(_)) => KeyKind::Frequencies,
            _ => KeyKind::Channels,
        }
    }

    fn up_kind(&self) -> UpKind {
        self.layers.first().map_or(UpKind::Directions, |l| UpKind::of(&l.values.up))
    }
}

impl KeyKind {
    fn of(basis: BasisKind) -> Self {
        match basis {
            BasisKind::Joint | BasisKind::Grouped(_) => KeyKind::Channels,
            BasisKind::Frequency | BasisKind::Identity | BasisKind::Dropped => KeyKind::Frequencies,
        }
    }
}

/// Part, name, shape and elements.
type Tensor<'a> = (&'static str, &'static str, Vec<usize>, Cow<'a, [f32]>);

impl LayerBasis {
    fn tensors(&self) -> Vec<Tensor<'_>> {
        let mut all = match &self.keys {
            KeyBasis::Channels(basis) => basis.tensors("keys"),
            KeyBasis::Frequencies(b) => {
                let pairs = b.frequencies.len();
                let shape = vec![pairs, b.kv_heads, 2];
                let frequencies = b.frequencies.iter().map(|&f| f as f32).collect();
                let mut all: Vec<Tensor<'_>> = vec![("keys", "frequencies", vec![pairs], Cow::Owned(frequencies))];
                all.push(("keys", "directions", shape.clone(), Cow::Borrowed(&b.directions)));
                all.extend(b.up.own().map(|up| ("keys", "up", shape, Cow::Borrowed(up))));
                all
            }
        };
        all.extend(self.values.tensors("values"));
        all
    }
}

impl Basis {
    fn tensors(&self, part: &'static str) -> Vec<Tensor<'_>> {
        let shape = vec![self.groups, self.width() / self.groups, self.mean.len() / self.groups];
        let mut all: Vec<Tensor<'_>> = vec![(part, "mean", vec![self.mean.len()], Cow::Borrowed(&self.mean))];
        all.push((part, "directions", shape.clone(), Cow::Borrowed(&self.directions)));
        all.extend(self.up.own().map(|up| (part, "up", shape, Cow::Borrowed(up))));
        all
    }
}

/// The manifest, its text, and the digest, of an artifact for this base.
fn manifest_of(metadata: Option<&HashMap<String, String>>, base: Fingerprint) -> Result<(Manifest, &String, &String), Error> {
    let text = metadata.and_then(|m| m.get(MANIFEST)).ok_or(Error::NoManifest(MANIFEST))?;
    let manifest = Manifest::parse(text)?;
    let artifact: Fingerprint = manifest.base.parse().map_err(|e: NotHex| Error::Manifest(e.to_string()))?;
    if artifact != base {
        return Err(Error::WrongBase { artifact, model: base });
    }
    let digest = metadata.and_then(|m| m.get(DIGEST)).ok_or(Error::NoManifest(DIGEST))?;
    Ok((manifest, text, digest))
}

impl Manifest {
    fn parse(text: &str) -> Result<Self, Error> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u64,
        }
        let wrong = |e: serde_json::Error| Error::Manifest(e.to_string());
        let head: Head = serde_json::from_str(text).map_err(wrong)?;
        if head.format != FORMAT {
            return Err(Error::Manifest(format!("its format is {:?}, not {FORMAT:?}", head.format)));
        }
        if head.version != u64::from(VERSION) {
            return Err(Error::Version { found: head.version });
        }
        serde_json::from_str(text).map_err(wrong)
    }

    fn check_geometry(&self, model: &ModelConfig) -> Result<(), Error> {
        let pairs = [
            ("layers", self.layers, model.layers),
            ("KV heads", self.kv_heads, model.kv_heads),
            ("head dimension", self.head_dim, model.head_dim),
        ];
        match pairs.into_iter().find(|(_, artifact, model)| artifact != model) {
            Some((what, artifact, model)) => Err(Error::Geometry { what, artifact, model }),
            None => Ok(()),
        }
    }
}

impl ManifestBasis {
    /// Takes the tensors of this basis out of the file. Nothing is allocated before its size is known to fit the model.
    fn read(&self, file: &SafeTensors<'_>, model: &ModelConfig, known: &mut HashSet<String>) -> Result<BasisSet, Error> {
        let refuse = |reason: String| Error::Basis { basis: self.name.clone(), reason };
        check_groups(self.heads_per_group, model).map_err(refuse)?;
        if self.widths.len() != model.layers {
            return Err(refuse(format!("it has widths for {} of {} layers", self.widths.len(), model.layers)));
        }
        let (channels, groups) = (model.kv_channels(), model.kv_heads / self.heads_per_group);
        let mut take = |layer: usize, part: &str, tensor: &str, shape: &[usize]| {
            let name = tensor_name(&self.name, layer, part, tensor);
            let data = read_tensor(file, &name, shape);
            known.insert(name);
            data
        };
        let mut layers = Vec::new();
        for (layer, &(keys, values)) in self.widths.iter().enumerate() {
            let mut channel_basis = |part: &str, width: usize| -> Result<Basis, Error> {
                check_width(width, groups, channels).map_err(|reason| refuse(format!("{part} of layer {layer}: {reason}")))?;
                let shape = [groups, width / groups, channels / groups];
                Ok(Basis {
                    mean: take(layer, part, "mean", &[channels])?,
                    groups,
                    directions: take(layer, part, "directions", &shape)?,
                    up: self.up.up(|| take(layer, part, "up", &shape))?,
                })
            };
            let values = channel_basis("values", values)?;
            let keys = match self.keys {
                KeyKind::Channels => KeyBasis::Channels(channel_basis("keys", keys)?),
                KeyKind::Frequencies => {
                    check_width(keys, 2, channels)
                        .map_err(|_| refuse(format!("keys of layer {layer}: no pairs make a width of {keys}")))?;
                    let shape = [keys / 2, model.kv_heads, 2];
                    let mut frequencies = Vec::new();
                    for x in take(layer, "keys", "frequencies", &[keys / 2])? {
                        if x.fract() != 0.0 || !(0.0..model.head_dim as f32 / 2.0).contains(&x) {
                            return Err(refuse(format!("keys of layer {layer}: {x} is no frequency of heads of {}", model.head_dim)));
                        }
                        frequencies.push(x as u32);
                    }
                    KeyBasis::Frequencies(FrequencyBasis {
                        kv_heads: model.kv_heads,
                        half: model.head_dim / 2,
                        frequencies,
                        directions: take(layer, "keys", "directions", &shape)?,
                        up: self.up.up(|| take(layer, "keys", "up", &shape))?,
                    })
                }
            };
            layers.push(LayerBasis { keys, values });
        }
        Ok(BasisSet { name: self.name.clone(), heads_per_group: self.heads_per_group, init: self.init, layers })
    }
}

impl ManifestProfile {
    fn stored(self, bases: &[BasisSet], model: &ModelConfig) -> Result<StoredProfile, Error> {
        let Some(set) = bases.iter().find(|b| b.name == self.basis) else {
            return Err(Error::Profile { profile: self.name, reason: format!("it reads the basis {}, which is not there", self.basis) });
        };
        let basis = match set.key_kind() {
            KeyKind::Frequencies => BasisKind::Frequency,
            KeyKind::Channels if set.heads_per_group == model.kv_heads => BasisKind::Joint,
            KeyKind::Channels => BasisKind::Grouped(set.heads_per_group),
        };
        let size = match self.size {
            ManifestSize::Shares { key_rank, value_rank, key_bits, value_bits } => {
                Size::Shares { key_rank, value_rank, key_bits, value_bits }
            }
            ManifestSize::Budget { budget } => Size::Budget(budget),
        };
        let cskv = Cskv {
            size,
            key_quantiser: self.key_quantiser,
            value_quantiser: self.value_quantiser,
            window: self.window,
            sinks: self.sinks,
            basis,
            init: Some(set.init),
        };
        let widths = self.layers.into_iter().map(|ManifestWidths { keys, values }| Widths { keys, values }).collect();
        Ok(StoredProfile { profile: Profile { name: self.name, cskv: Some(cskv) }, basis: self.basis, widths })
    }
}

fn tensor_name(basis: &str, layer: usize, part: &str, tensor: &str) -> String {
    format!("{basis}.{layer}.{part}.{tensor}")
}

fn read_tensor(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
    let view = file.tensor(name).map_err(|_| Error::Missing(name.to_owned()))?;
    if view.dtype() != Dtype::F32 || view.shape() != shape {
        let describe = |dtype: Dtype, shape: &[usize]| format!("{dtype:?} {shape:?}");
        let (found, want) = (describe(view.dtype(), view.shape()), describe(Dtype::F32, shape));
        return Err(Error::Shape { tensor: name.to_owned(), found, want });
    }
    Ok(view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
}

fn little_endian(data: &[f32]) -> Vec<u8> {
    data.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn check_groups(heads_per_group: usize, model: &ModelConfig) -> Result<(), String> {
    match heads_per_group {
        0 => Err("no KV head is in a group".to_owned()),
        n if !model.kv_heads.is_multiple_of(n) => Err(format!("groups of {n} do not divide {} KV heads", model.kv_heads)),
        _ => Ok(()),
    }
}

fn check_width(width: usize, groups: usize, channels: usize) -> Result<(), String> {
    if !width.is_multiple_of(groups) {
        return Err(format!("a width of {width} does not divide into {groups} groups"));
    }
    if width > channels {
        return Err(format!("a width of {width} exceeds {channels} channels"));
    }
    Ok(())
}

fn check_basis(basis: &Basis, set: &BasisSet, model: &ModelConfig) -> Result<(), String> {
    let (channels, groups) = (model.kv_channels(), model.kv_heads / set.heads_per_group);
    if basis.mean.len() != channels || basis.groups != groups {
        return Err(format!("{} channels in {} groups where the model has {channels} in {groups}", basis.mean.len(), basis.groups));
    }
    check_width(basis.width(), groups, channels)?;
    if basis.directions.len() != basis.width() / groups * channels {
        return Err(format!("{} elements are no whole number of directions", basis.directions.len()));
    }
    if basis.up.own().is_some_and(|up| up.len() != basis.directions.len()) {
        return Err("its two halves differ in size".to_owned());
    }
    Ok(())
}

fn check_frequencies(basis: &FrequencyBasis, set: &BasisSet, model: &ModelConfig) -> Result<(), String> {
    let (kv_heads, half) = (model.kv_heads, model.head_dim / 2);
    if (basis.kv_heads, basis.half) != (kv_heads, half) || set.heads_per_group != kv_heads {
        return Err(format!("{} heads of {} frequencies where the model has {kv_heads} of {half}", basis.kv_heads, basis.half));
    }
    let pairs = basis.frequencies.len();
    if pairs > kv_heads * half || basis.directions.len() != 2 * pairs * kv_heads {
        return Err(format!("{} elements are no directions of {pairs} pairs", basis.directions.len()));
    }
    if basis.up.own().is_some_and(|up| up.len() != basis.directions.len()) {
        return Err("its two halves differ in size".to_owned());
    }
    match basis.frequencies.iter().find(|&&f| f as usize >= half) {
        Some(f) => Err(format!("frequency {f} of {half}")),
        None => Ok(()),
    }
}

fn check_spec(name: &str, cskv: &Cskv, model: &ModelConfig) -> Result<(), Error> {
    let refuse = |reason: String| Err(Error::Profile { profile: name.to_owned(), reason });
    if let Size::Shares { key_rank, value_rank, key_bits, value_bits } = cskv.size {
        for (what, share) in [("key_rank", key_rank), ("value_rank", value_rank)] {
            if !(share > 0.0 && share <= 1.0) {
                return refuse(format!("{what} is {share} and must be above 0 and at most 1"));
            }
        }
        let width = |bits| Width { rank: 1, bits };
        check_bits(&Widths { keys: width(key_bits), values: width(value_bits) }, cskv).or_else(refuse)?;
    }
    if cskv.window > WINDOW_MOST {
        return refuse(format!("window is {} and must be at most {WINDOW_MOST}", cskv.window));
    }
    if cskv.sinks > PAGE_TOKENS {
        return refuse(format!("sinks is {} and must be at most {PAGE_TOKENS}, one page", cskv.sinks));
    }
    check_groups(cskv.basis.heads_per_group(model.kv_heads), model).or_else(refuse)
}

fn check_bits(widths: &Widths, cskv: &Cskv) -> Result<(), String> {
    let (keys, values) = (widths.keys.bits, widths.values.bits);
    for (bits, quantiser) in [(keys, cskv.key_quantiser), (values, cskv.value_quantiser)] {
        if ![16, 8, 4, 3, 2].contains(&bits) {
            return Err(format!("bits is {bits} and must be 16, 8, 4, 3 or 2"));
        }
        if quantiser == Quantiser::Hadamard && bits > 4 {
            return Err(format!("bits is {bits}, and the hadamard quantiser has 4, 3 or 2"));
        }
    }
    match (keys == 16) == (values == 16) {
        true => Ok(()),
        false => Err(format!("bits are {keys} of keys and {values} of values; 16 goes for both or neither")),
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A fingerprint that is not 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a fingerprint of 64 hex digits")]
pub struct NotHex(String);

impl FromStr for Fingerprint {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<Self, NotHex> {
        let wrong = || NotHex(text.chars().take(80).collect());
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digit = |d: u8| (d as char).to_digit(16).ok_or_else(wrong);
            *byte = (digit(digits[0])? * 16 + digit(digits[1])?) as u8;
        }
        Ok(Fingerprint(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_its_64_digits_and_nothing_else() {
        let one = Fingerprint(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(one.to_string().parse::<Fingerprint>().unwrap(), one);
        for wrong in ["", "00", &"g".repeat(64), &"é".repeat(32), &"+1".repeat(32)] {
            assert!(wrong.parse::<Fingerprint>().is_err(), "{wrong}");
        }
    }
}
