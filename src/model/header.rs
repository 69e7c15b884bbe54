//! The header of a safetensors file, read as hostile input: nothing in it is believed before the whole of it
//! has been checked against the file's length. No tensor data is touched here.
//!
//! A file is `u64` header length (little endian), the header (JSON), then the data section. Beyond what the
//! `safetensors` crate refuses, this pass refuses names given twice, names that are not plain, more tensors or
//! dimensions than any model has, and shapes whose product overflows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::model::json::shown;

/// Most dimensions a tensor may have.
const DIMS_MAX: usize = 8;

/// What a header may ask for before it is refused unread.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub header_bytes: u64,
    pub tensors: usize,
}

impl Limits {
    /// For a model: 64 MiB and 100,000 tensors.
    pub const MODEL: Limits = Limits { header_bytes: 64 << 20, tensors: 100_000 };
    /// For an adapter: 1 MiB and 16,384 tensors (a LoRA pair on seven projections of a thousand layers).
    pub const ADAPTER: Limits = Limits { header_bytes: 1 << 20, tensors: 16_384 };
}

/// Element type of a stored tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
    /// Known to the format and of this many bytes per element, but not a type that weights are read from.
    Other(&'static str, usize),
}

impl Dtype {
    fn parse(name: &str) -> Option<Dtype> {
        const OTHER: [(&str, usize); 12] = [
            ("BOOL", 1),
            ("U8", 1),
            ("I8", 1),
            ("F8_E4M3", 1),
            ("F8_E5M2", 1),
            ("F8_E8M0", 1),
            ("I16", 2),
            ("U16", 2),
            ("I32", 4),
            ("U32", 4),
            ("I64", 8),
            ("U64", 8),
        ];
        match name {
            "F32" => Some(Dtype::F32),
            "BF16" => Some(Dtype::Bf16),
            "F16" => Some(Dtype::F16),
            "F64" => Some(Dtype::Other("F64", 8)),
            _ => OTHER.iter().find(|(n, _)| *n == name).map(|&(n, bytes)| Dtype::Other(n, bytes)),
        }
    }

    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::Other(_, bytes) => bytes,
        }
    }

    /// The format's own spelling.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::Other(name, _) => name,
        }
    }
}

/// One tensor of a header. `begin..end` are byte offsets in the whole file, inside it, and exactly as long as
/// `shape` and `dtype` say.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub begin: usize,
    pub end: usize,
}

/// Why a file is not a safetensors file to be trusted. Each message is a clause that follows the file's name.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum HeaderError {
    #[error("is only {file} bytes long, too short for a safetensors file; download it again")]
    TooShort { file: u64 },
    #[error(
        "claims a header of {header} bytes, and after its length field only {left} bytes follow; the file is truncated or not safetensors: download it again"
    )]
    Length { header: u64, left: u64 },
    #[error("is a Git LFS pointer and not the file it stands for; `git lfs pull` in that folder fetches it")]
    Pointer,
    #[error("claims a header of {header} bytes, more than the {limit} allowed; the file is damaged or hostile")]
    TooLarge { header: u64, limit: u64 },
    #[error("has a header that does not parse ({reason}); download it again")]
    Json { reason: String },
    #[error("has a tensor with the name {name:?}, which is not 1 to 256 of A-Z a-z 0-9 _ . -")]
    Name { name: String },
    #[error("has the tensor `{tensor}` of type {dtype}, which the safetensors format does not know")]
    Dtype { tensor: String, dtype: String },
    #[error("has the tensor `{tensor}` whose shape overflows")]
    ShapeOverflow { tensor: String },
    #[error("has the tensor `{tensor}` at bytes {begin}..{end} where its shape and type need {need} bytes")]
    Extent { tensor: String, begin: u64, end: u64, need: u64 },
    #[error(
        "has the tensor `{tensor}` at bytes {begin}..{end} of a data section of {data} bytes; the file is truncated: download it again"
    )]
    PastEnd { tensor: String, begin: u64, end: u64, data: u64 },
    #[error("has the tensor `{tensor}` beginning at byte {begin} where {want} was due: tensors overlap or leave a gap")]
    Tiling { tensor: String, begin: u64, want: u64 },
    #[error("has {extra} bytes after its last tensor; the file is damaged or carries something else")]
    Trailing { extra: u64 },
}

/// Reads and checks the header of the file `bytes`: O(tensors log tensors), and no allocation larger than the
/// header before everything is checked.
pub fn parse(bytes: &[u8], limits: Limits) -> Result<BTreeMap<String, Entry>, HeaderError> {
    parse_head(bytes, bytes.len() as u64, limits)
}

/// The same of a file of `file` bytes by its beginning, which must hold the header.
///
/// # Errors
/// As [`parse`].
pub fn parse_head(head: &[u8], file: u64, limits: Limits) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let Some((length, rest)) = head.split_first_chunk::<8>() else { return Err(HeaderError::TooShort { file }) };
    // The first word of what stands for a file where Git LFS did not fetch it; no length begins so.
    if length == b"version " {
        return Err(HeaderError::Pointer);
    }
    let header = u64::from_le_bytes(*length);
    let left = file.saturating_sub(8);
    if header > limits.header_bytes {
        // A length beyond the file says more about the file than about the limit.
        return Err(if header > left {
            HeaderError::Length { header, left }
        } else {
            HeaderError::TooLarge { header, limit: limits.header_bytes }
        });
    }
    let json = rest.get(..header as usize).filter(|json| json.len() >= 2 && header <= left);
    let json = json.ok_or(HeaderError::Length { header, left })?;
    let mut de = serde_json::Deserializer::from_slice(json);
    let found = HeaderSeed { tensors: limits.tensors }
        .deserialize(&mut de)
        .and_then(|found| de.end().map(|()| found))
        .map_err(|e| HeaderError::Json { reason: shown(&e.to_string(), 160) })?;
    check(found, 8 + json.len(), (left - header) as usize)
}

/// Checks every entry, then that the entries tile the data section exactly.
fn check(found: BTreeMap<String, Raw>, base: usize, data: usize) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let mut order: Vec<(u64, u64, &str)> = Vec::with_capacity(found.len());
    for (name, raw) in &found {
        if name.is_empty() || name.len() > 256 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
            return Err(HeaderError::Name { name: shown(name, 80) });
        }
        let [begin, end] = raw.offsets;
        if begin > end || end > data as u64 {
            return Err(HeaderError::PastEnd { tensor: name.clone(), begin, end, data: data as u64 });
        }
        order.push((begin, end, name));
    }
    order.sort_unstable();
    let mut due = 0;
    for &(begin, end, name) in &order {
        if begin != due {
            return Err(HeaderError::Tiling { tensor: name.to_owned(), begin, want: due });
        }
        due = end;
    }
    if due != data as u64 {
        return Err(HeaderError::Trailing { extra: data as u64 - due });
    }
    let mut out = BTreeMap::new();
    for (name, raw) in found {
        let Some(dtype) = Dtype::parse(&raw.dtype) else {
            return Err(HeaderError::Dtype { tensor: name, dtype: shown(&raw.dtype, 40) });
        };
        // A dimension of zero must not hide another that overflows, so zeros count as ones here.
        let bounded = raw.shape.iter().try_fold(dtype.bytes() as u64, |n, &d| n.checked_mul(d.max(1)));
        let Some(bounded) = bounded.filter(|&n| n <= isize::MAX as u64) else {
            return Err(HeaderError::ShapeOverflow { tensor: name });
        };
        let need = if raw.shape.contains(&0) { 0 } else { bounded };
        let [begin, end] = raw.offsets;
        if end - begin != need {
            return Err(HeaderError::Extent { tensor: name, begin, end, need });
        }
        let shape = raw.shape.iter().map(|&d| d as usize).collect();
        out.insert(name, Entry { dtype, shape, begin: base + begin as usize, end: base + end as usize });
    }
    Ok(out)
}

/// An entry as written.
struct Raw {
    dtype: String,
    shape: Vec<u64>,
    offsets: [u64; 2],
}

struct HeaderSeed {
    tensors: usize,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed {
    type Value = BTreeMap<String, Raw>;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed {
    type Value = BTreeMap<String, Raw>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut out = BTreeMap::new();
        let mut about = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                // Strings about the file; nothing here depends on them.
                map.next_value_seed(StringMap)?;
                if std::mem::replace(&mut about, true) {
                    return Err(A::Error::custom("`__metadata__` is given twice"));
                }
                continue;
            }
            if out.len() == self.tensors {
                return Err(A::Error::custom(format_args!("more than {} tensors", self.tensors)));
            }
            if out.contains_key(&name) {
                return Err(A::Error::custom(format_args!("the tensor `{}` is given twice", shown(&name, 80))));
            }
            let raw = map.next_value_seed(RawSeed)?;
            out.insert(name, raw);
        }
        Ok(out)
    }
}

/// Checks that a value is an object of strings, and forgets it.
struct StringMap;

impl<'de> DeserializeSeed<'de> for StringMap {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for StringMap {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = BTreeSet::new();
        while let Some((key, _)) = map.next_entry::<String, String>()? {
            if !seen.insert(key) {
                return Err(A::Error::custom("a key of `__metadata__` is given twice"));
            }
        }
        Ok(())
    }
}

/// An entry must be an object: serde's derived structs also take lists, by position.
struct RawSeed;

impl<'de> DeserializeSeed<'de> for RawSeed {
    type Value = Raw;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Raw, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RawSeed {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let again = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>()?).is_some(),
                "shape" => shape.replace(map.next_value_seed(ListSeed { max: DIMS_MAX })?).is_some(),
                "data_offsets" => offsets.replace(map.next_value_seed(ListSeed { max: 2 })?).is_some(),
                other => {
                    let other = shown(other, 40);
                    map.next_value::<IgnoredAny>()?;
                    return Err(A::Error::custom(format_args!("unknown key `{other}` in a tensor")));
                }
            };
            if again {
                return Err(A::Error::custom(format_args!("`{key}` is given twice in a tensor")));
            }
        }
        let dtype = dtype.ok_or_else(|| A::Error::missing_field("dtype"))?;
        let shape = shape.ok_or_else(|| A::Error::missing_field("shape"))?;
        let offsets = offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?;
        let offsets = offsets.try_into().map_err(|_| A::Error::custom("data_offsets are not two numbers"))?;
        Ok(Raw { dtype, shape, offsets })
    }
}

/// A list of at most `max` integers, refused at the first one too many.
struct ListSeed {
    max: usize,
}

impl<'de> DeserializeSeed<'de> for ListSeed {
    type Value = Vec<u64>;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Vec<u64>, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ListSeed {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} non-negative integers", self.max)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut out = Vec::with_capacity(self.max);
        while let Some(v) = seq.next_element::<u64>()? {
            if out.len() == self.max {
                return Err(A::Error::custom(format_args!("a list of more than {} numbers", self.max)));
            }
            out.push(v);
        }
        Ok(out)
    }
}
