//! The bytes of a page: the single contract between every writer and reader of the cache.
//!
//! ```text
//! exact page      per layer, per KV head:  K^T [head_dim][64]  then  V [64][head_dim]      (element: ExactType)
//!                 K after rope; channel-major, so that one vector load covers neighbouring positions
//! workspace page  one layer as above, then hidden states [64][hidden] f32
//! sinks block     per layer, per KV head:  K^T [head_dim][S]   then  V [S][head_dim],  S = sinks rounded up to 16
//! sealed page     per layer:
//!   16 bit        key latents   [key_rank][64] f16         value latents [64][value_rank] f16
//!   < 16 bit      key codes     [words(key_rank)][64] u32      key scales [key_rank] f16, key minima [key_rank] f16
//!                 value codes   [words(64)][value_rank] u32    value scales [groups][64] f16, value minima [groups][64] f16
//! ```
//!
//! Key latents are of keys *before* rope, but of a `frequency` basis *after* it, with which it commutes. Keys are quantised per
//! channel over the page, values per token in groups of [`VALUE_GROUP`] channels. Codes lie in words (`quant`): lanes are
//! positions for keys, which are summed over channels, and channels for values, which are summed over positions.
//! Each of the four sections of a sealed layer begins on an 8-byte boundary, each layer on a 64-byte boundary, every page
//! is a multiple of 64 bytes.

use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::model::config::ModelConfig;
use crate::quant::words;

/// Channels of a value latent that share a `(scale, min)`.
pub const VALUE_GROUP: usize = 32;

const P: usize = PAGE_TOKENS as usize;

/// Element of exact keys and values. Follows the weights' type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExactType {
    F32,
    Bf16,
}

impl ExactType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            ExactType::F32 => 4,
            ExactType::Bf16 => 2,
        }
    }
}

/// How a request's context is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    pub name: String,
    /// `None` is the exact cache, `full`.
    pub cskv: Option<Cskv>,
}

/// A compressed profile as an operator writes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Cskv {
    /// Share of the key channels kept, in `(0, 1]`.
    pub key_rank: f64,
    /// Share of the value channels kept, in `(0, 1]`.
    pub value_rank: f64,
    /// Bits of a latent element: 16, 8, 4, 3 or 2.
    pub bits: u32,
    /// At least so many recent positions stay exact.
    pub window: u32,
    /// So many first positions stay exact.
    pub sinks: u32,
    pub basis: BasisKind,
}

/// Over which KV heads one basis is shared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BasisKind {
    /// All KV heads of a layer (the paper).
    Joint,
    /// Groups of `n` neighbouring KV heads; `n` divides the number of KV heads.
    Grouped(usize),
    /// Keys by rope frequency over all KV heads, so that no key is rebuilt; values as `Joint`.
    Frequency,
}

impl BasisKind {
    /// KV heads that share a basis.
    pub fn heads_per_group(self, kv_heads: usize) -> usize {
        match self {
            BasisKind::Joint | BasisKind::Frequency => kv_heads,
            BasisKind::Grouped(n) => n,
        }
    }
}

impl Cskv {
    /// Latent width of a layer for a share of the channels: whole channels per head, at least one
    /// (CSKV code: `int(density * head_dim) * n_kv_heads`).
    fn rank(share: f64, model: &ModelConfig) -> usize {
        ((share * model.head_dim as f64) as usize).clamp(1, model.head_dim) * model.kv_heads
    }

    /// (key, value) latent widths of a layer for its shares. Those of frequency keys are pairs, hence even.
    pub fn ranks(&self, model: &ModelConfig) -> (usize, usize) {
        let (keys, values) = (Self::rank(self.key_rank, model), Self::rank(self.value_rank, model));
        match self.basis {
            BasisKind::Frequency => (keys.next_multiple_of(2), values),
            BasisKind::Joint | BasisKind::Grouped(_) => (keys, values),
        }
    }
}

/// Byte offsets of one layer inside a sealed page, from the page's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SealedLayer {
    pub key_rank: usize,
    pub value_rank: usize,
    pub bits: u32,
    pub key_codes: usize,
    /// Scales, then minima. Unused (equal to `key_codes`) at 16 bits, as is `value_meta`.
    pub key_meta: usize,
    pub value_codes: usize,
    pub value_meta: usize,
    pub end: usize,
}

impl SealedLayer {
    fn at(start: usize, key_rank: usize, value_rank: usize, bits: u32) -> Self {
        let align = |n: usize| n.next_multiple_of(8);
        let key_codes = start;
        if bits == 16 {
            let value_codes = align(key_codes + key_rank * P * 2);
            let end = align(value_codes + P * value_rank * 2);
            return SealedLayer { key_rank, value_rank, bits, key_codes, key_meta: key_codes, value_codes, value_meta: value_codes, end };
        }
        let key_meta = align(key_codes + Self::key_code_bytes(key_rank, bits));
        let value_codes = align(key_meta + key_rank * 4);
        let value_meta = align(value_codes + Self::value_code_bytes(value_rank, bits));
        let end = align(value_meta + P * value_rank.div_ceil(VALUE_GROUP) * 4);
        SealedLayer { key_rank, value_rank, bits, key_codes, key_meta, value_codes, value_meta, end }
    }

    /// Bytes of a page's key codes below 16 bits.
    pub const fn key_code_bytes(key_rank: usize, bits: u32) -> usize {
        words(key_rank, bits) * P * 4
    }

    /// Bytes of a page's value codes below 16 bits.
    pub const fn value_code_bytes(value_rank: usize, bits: u32) -> usize {
        words(P, bits) * value_rank * 4
    }

    /// Groups of value channels that share a scale.
    pub const fn value_groups(&self) -> usize {
        self.value_rank.div_ceil(VALUE_GROUP)
    }
}

/// Sizes and offsets of every kind of page of one profile on one model.
#[derive(Clone, Debug, PartialEq)]
pub struct PageLayout {
    pub exact: ExactType,
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub hidden: usize,
    pub window: u32,
    pub sinks: u32,
    /// One per layer; empty for `full`.
    pub sealed: Vec<SealedLayer>,
}

/// Bytes of each kind of page; zero where the profile has none. All the scheduler knows of a layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageSizes {
    pub exact: u64,
    pub sealed: u64,
    pub sinks: u64,
    pub workspace: u64,
}

/// What the bytes of a sealed page hold, over all layers; what is left of the page is padding.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SealedSplit {
    /// Key latents, or their codes.
    pub keys: u64,
    /// Value latents, or their codes.
    pub values: u64,
    /// Scales and minima of both.
    pub metadata: u64,
}

fn page(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(PageAddr::UNIT)
}

impl PageLayout {
    /// The layout of `profile` on `model`. `ranks` gives (key, value) latent widths per layer where an artifact
    /// sets them; otherwise they follow the profile's shares.
    pub fn new(model: &ModelConfig, exact: ExactType, profile: &Profile, ranks: Option<&[(usize, usize)]>) -> Self {
        let mut sealed = Vec::new();
        if let Some(cskv) = &profile.cskv {
            let mut at = 0;
            for layer in 0..model.layers {
                let (k, v) = match ranks {
                    Some(ranks) => ranks[layer],
                    None => cskv.ranks(model),
                };
                let one = SealedLayer::at(at, k, v, cskv.bits);
                at = one.end.next_multiple_of(64);
                sealed.push(one);
            }
        }
        PageLayout {
            exact,
            layers: model.layers,
            kv_heads: model.kv_heads,
            head_dim: model.head_dim,
            hidden: model.hidden,
            window: profile.cskv.as_ref().map_or(0, |c| c.window),
            sinks: profile.cskv.as_ref().map_or(0, |c| c.sinks),
            sealed,
        }
    }

    /// Bytes of keys and values of one layer in an exact or workspace page.
    pub fn exact_layer_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_dim * P * self.exact.bytes()
    }

    /// Byte offset of the hidden states in a workspace page.
    pub fn workspace_hidden(&self) -> usize {
        self.exact_layer_bytes().next_multiple_of(64)
    }

    /// Positions a sinks block has room for.
    pub fn sinks_stride(&self) -> usize {
        (self.sinks as usize).next_multiple_of(16)
    }

    /// Bytes of one layer in a sinks block.
    pub fn sinks_layer_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_dim * self.sinks_stride() * self.exact.bytes()
    }

    /// Bytes of each kind of page.
    pub fn sizes(&self) -> PageSizes {
        let compressed = !self.sealed.is_empty();
        let when = |yes: bool, bytes: usize| if yes { page(bytes) } else { 0 };
        PageSizes {
            exact: page(self.layers * self.exact_layer_bytes()),
            sealed: when(compressed, self.sealed.last().map_or(0, |l| l.end)),
            sinks: when(compressed && self.sinks > 0, self.layers * self.sinks_layer_bytes()),
            workspace: when(compressed, self.workspace_hidden() + P * self.hidden * 4),
        }
    }

    /// What the bytes of a sealed page hold. All zero for `full`.
    pub fn sealed_split(&self) -> SealedSplit {
        self.sealed.iter().fold(SealedSplit::default(), |sum, l| {
            let (keys, values, metadata) = match l.bits {
                16 => (l.key_rank * P * 2, P * l.value_rank * 2, 0),
                bits => (
                    SealedLayer::key_code_bytes(l.key_rank, bits),
                    SealedLayer::value_code_bytes(l.value_rank, bits),
                    l.key_rank * 4 + P * l.value_groups() * 4,
                ),
            };
            SealedSplit { keys: sum.keys + keys as u64, values: sum.values + values as u64, metadata: sum.metadata + metadata as u64 }
        })
    }

    /// Bytes one more position costs once it is past the window: an exact page's share for `full`,
    /// a sealed page's share otherwise. Metadata and padding are counted.
    pub fn bytes_per_token(&self) -> f64 {
        let sizes = self.sizes();
        let page = if self.sealed.is_empty() { sizes.exact } else { sizes.sealed };
        page as f64 / P as f64
    }
}
