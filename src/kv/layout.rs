//! The bytes of a page: the single contract between every writer and reader of the cache.
//!
//! ```text
//! exact page      per layer, per KV head:  K^T [head_dim][64]  then  V [64][head_dim]      (element: ExactType)
//!                 K after rope; channel-major, so that one vector load covers neighbouring positions
//! workspace page  one layer as above, then hidden states [64][hidden] f32
//! sinks block     per layer, per KV head:  K^T [head_dim][S]   then  V [S][head_dim],  S = sinks rounded up to 16
//! sealed page     per layer:
//!   16 bit        key latents   [key_rank][64] f16         value latents [64][value_rank] f16
//!   affine        key codes     [words(key_rank)][64] u32      key scales [key_rank] f16, key minima [key_rank] f16
//!                 value codes   [words(64)][value_rank] u32    value scales [groups][64] f16, value minima [groups][64] f16
//!   hadamard      key codes     as above                       key scales [blocks][64] f16
//!                 value codes   as above                       value scales [blocks][64] f16
//! ```
//!
//! Key latents are of keys *before* rope, but of a `frequency` or `identity` basis *after* it. The affine quantiser takes keys per
//! channel over the page, values per token in groups of [`VALUE_GROUP`] channels; the Hadamard one both per token, in blocks of
//! channels that were rotated together. Codes lie in words (`quant`): lanes are positions for keys, which are summed over
//! channels (in runs), and channels for values, which are summed over positions (strided).
//! A basis that keeps nothing has sealed pages of the least size, [`PageAddr::UNIT`], without contents.
//! Each of the four sections of a sealed layer begins on an 8-byte boundary, each layer on a 64-byte boundary, every page
//! is a multiple of 64 bytes.

use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::model::config::ModelConfig;
use crate::quant::words;

/// Channels of a value latent that share a `(scale, min)`.
pub const VALUE_GROUP: usize = 32;

/// Recent positions that a profile may keep exact, at most.
pub const WINDOW_MOST: u32 = 65536;

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
    pub size: Size,
    pub key_quantiser: Quantiser,
    pub value_quantiser: Quantiser,
    /// At least so many recent positions stay exact.
    pub window: u32,
    /// So many first positions stay exact.
    pub sinks: u32,
    pub basis: BasisKind,
    /// How the basis is found; `None` leaves it to who computes it.
    pub init: Option<Init>,
}

/// How much of a position a profile keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// The same shares of the channels in every layer.
    Shares {
        /// Of the key channels, in `(0, 1]`.
        key_rank: f64,
        /// Of the value channels, in `(0, 1]`.
        value_rank: f64,
        /// Bits of a latent element of keys: 16, 8, 4, 3 or 2.
        key_bits: u32,
        /// Of values; 16 where that of keys is, and only there.
        value_bits: u32,
    },
    /// So many bytes over all layers, scales counted, spread by what they buy.
    Budget(u32),
}

/// How latents below 16 bits become codes (`quant`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quantiser {
    /// Scale and minimum: keys per channel over a page, values per token in groups.
    Affine,
    /// Latents rotated, and taken per token by one scale as if they were normal. At 4, 3 or 2 bits.
    Hadamard,
}

/// How a basis is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Init {
    /// The singular vectors of the projections' weights.
    Svd,
    /// Those of the weights scaled by the inputs they meet.
    Asvd,
    /// What loses the least of keys and values, errors counting the same everywhere.
    Closed,
    /// The same, errors counting as much as the queries that meet a key, and the output projection of a value, make of them.
    Weighted,
}

impl Init {
    /// Its name in a profile and in an artifact.
    pub const fn name(self) -> &'static str {
        match self {
            Init::Svd => "svd",
            Init::Asvd => "asvd",
            Init::Closed => "closed",
            Init::Weighted => "weighted",
        }
    }
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
    /// Keys after rope and values as they are, head by head: only quantised (KIVI, TurboQuant).
    Identity,
    /// Nothing is kept beyond window and sinks (StreamingLLM).
    Dropped,
}

impl BasisKind {
    /// KV heads that share a basis.
    pub fn heads_per_group(self, kv_heads: usize) -> usize {
        match self {
            BasisKind::Joint | BasisKind::Frequency | BasisKind::Dropped => kv_heads,
            BasisKind::Grouped(n) => n,
            BasisKind::Identity => 1,
        }
    }

    /// Blocks of key channels, and of value channels, that the Hadamard quantiser rotates and scales by themselves.
    pub fn blocks(self, kv_heads: usize) -> usize {
        kv_heads / self.heads_per_group(kv_heads).max(1)
    }

    /// Whether there is a basis to be found.
    pub fn is_computed(self) -> bool {
        !matches!(self, BasisKind::Identity | BasisKind::Dropped)
    }
}

/// Latents of the keys, or the values, of one layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Width {
    pub rank: usize,
    pub bits: u32,
}

/// Latents of one layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Widths {
    pub keys: Width,
    pub values: Width,
}

impl Cskv {
    /// Even shares of keys and of values at the same bits, quantised affinely; (window, sinks) stay exact.
    pub fn shares((key_rank, value_rank): (f64, f64), bits: u32, (window, sinks): (u32, u32), basis: BasisKind) -> Self {
        Cskv {
            size: Size::Shares { key_rank, value_rank, key_bits: bits, value_bits: bits },
            key_quantiser: Quantiser::Affine,
            value_quantiser: Quantiser::Affine,
            window,
            sinks,
            basis,
            init: None,
        }
    }

    /// Latent width of a layer for a share of the channels: whole channels per head, at least one
    /// (CSKV code: `int(density * head_dim) * n_kv_heads`).
    fn rank(share: f64, model: &ModelConfig) -> usize {
        ((share * model.head_dim as f64) as usize).clamp(1, model.head_dim) * model.kv_heads
    }

    /// Latents of a layer by its shares; `None` for a budget. Those of frequency keys are pairs, hence even.
    pub fn widths(&self, model: &ModelConfig) -> Option<Widths> {
        let Size::Shares { key_rank, value_rank, key_bits, value_bits } = self.size else { return None };
        let (keys, values) = (Self::rank(key_rank, model), Self::rank(value_rank, model));
        let (keys, values) = match self.basis {
            BasisKind::Frequency => (keys.next_multiple_of(2), values),
            BasisKind::Joint | BasisKind::Grouped(_) => (keys, values),
            BasisKind::Identity => (model.kv_channels(), model.kv_channels()),
            BasisKind::Dropped => (0, 0),
        };
        Some(Widths { keys: Width { rank: keys, bits: key_bits }, values: Width { rank: values, bits: value_bits } })
    }
}

/// Latents of one kind in a sealed page, and where they lie from the page's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SealedPart {
    pub rank: usize,
    pub bits: u32,
    pub quantiser: Quantiser,
    pub codes: usize,
    /// Scales, then minima where there are some. Unused (equal to `codes`) at 16 bits.
    pub meta: usize,
}

impl SealedPart {
    /// Bytes of a page's key codes below 16 bits.
    pub const fn key_code_bytes(&self) -> usize {
        words(self.rank, self.bits) * P * 4
    }

    /// Bytes of a page's value codes below 16 bits.
    pub const fn value_code_bytes(&self) -> usize {
        words(P, self.bits) * self.rank * 4
    }
}

/// Byte offsets of one layer inside a sealed page, from the page's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SealedLayer {
    /// Blocks that the Hadamard quantiser scales by themselves, of keys and of values alike.
    pub blocks: usize,
    pub keys: SealedPart,
    pub values: SealedPart,
    pub end: usize,
}

impl SealedLayer {
    fn at(start: usize, widths: Widths, quantisers: [Quantiser; 2], blocks: usize) -> Self {
        let align = |n: usize| n.next_multiple_of(8);
        let Widths { keys, values } = widths;
        let part = |Width { rank, bits }, quantiser| SealedPart { rank, bits, quantiser, codes: start, meta: start };
        let mut layer = SealedLayer { blocks, keys: part(keys, quantisers[0]), values: part(values, quantisers[1]), end: start };
        let mut at = align(start + if keys.bits == 16 { keys.rank * P * 2 } else { layer.keys.key_code_bytes() });
        layer.keys.meta = if keys.bits == 16 { layer.keys.codes } else { at };
        at = align(at + layer.key_meta_bytes());
        layer.values.codes = at;
        at = align(at + if values.bits == 16 { P * values.rank * 2 } else { layer.values.value_code_bytes() });
        layer.values.meta = if values.bits == 16 { layer.values.codes } else { at };
        layer.end = align(at + layer.value_meta_bytes());
        layer
    }

    /// One layer by itself, from the page's start.
    pub fn alone(widths: Widths, quantisers: [Quantiser; 2], blocks: usize) -> Self {
        SealedLayer::at(0, widths, quantisers, blocks)
    }

    /// Bytes that keys, or values, of this width take of a page, what aligns them left out.
    pub fn part_bytes(width: Width, quantiser: Quantiser, blocks: usize, values: bool) -> usize {
        let none = Width { rank: 0, bits: width.bits };
        let widths = if values { Widths { keys: none, values: width } } else { Widths { keys: width, values: none } };
        SealedLayer::at(0, widths, [quantiser; 2], blocks).end
    }

    /// Bytes of a page of these layers.
    pub fn page_bytes(widths: &[Widths], quantisers: [Quantiser; 2], blocks: usize) -> usize {
        let end = widths.iter().fold(0usize, |at, &w| SealedLayer::at(at.next_multiple_of(64), w, quantisers, blocks).end);
        page(end.max(1)) as usize
    }

    /// Bytes of scales and minima of the keys.
    pub const fn key_meta_bytes(&self) -> usize {
        match (self.keys.bits, self.keys.quantiser) {
            _ if self.keys.rank == 0 => 0,
            (16, _) => 0,
            (_, Quantiser::Affine) => self.keys.rank * 4,
            (_, Quantiser::Hadamard) => self.blocks * P * 2,
        }
    }

    /// Bytes of scales and minima of the values.
    pub const fn value_meta_bytes(&self) -> usize {
        match (self.values.bits, self.values.quantiser) {
            _ if self.values.rank == 0 => 0,
            (16, _) => 0,
            (_, Quantiser::Affine) => self.value_groups() * P * 4,
            (_, Quantiser::Hadamard) => self.blocks * P * 2,
        }
    }

    /// Value channels that share a scale: a group of the affine quantiser, whose last may be smaller, or a block of the other.
    pub const fn value_group(&self) -> usize {
        match self.values.quantiser {
            Quantiser::Affine => VALUE_GROUP,
            Quantiser::Hadamard if self.values.rank == 0 => 1,
            Quantiser::Hadamard => self.values.rank / self.blocks,
        }
    }

    /// Groups of value channels that share a scale.
    pub const fn value_groups(&self) -> usize {
        self.values.rank.div_ceil(self.value_group())
    }

    /// Bytes of a layer's part of a sealed page.
    pub const fn bytes(&self) -> usize {
        self.end - self.keys.codes
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
    /// Sealed positions are gone: met by nobody.
    pub drops: bool,
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
    /// The layout of `profile` on `model`. `widths` gives the latents of each layer where an artifact sets them; otherwise they
    /// follow the profile's shares.
    ///
    /// # Panics
    /// Where a budget has no widths.
    pub fn new(model: &ModelConfig, exact: ExactType, profile: &Profile, widths: Option<&[Widths]>) -> Self {
        let mut sealed = Vec::new();
        if let Some(cskv) = &profile.cskv {
            let mut at = 0;
            for layer in 0..model.layers {
                let widths = widths.map_or_else(|| cskv.widths(model).expect("a budget has widths of its own"), |all| all[layer]);
                let one = SealedLayer::at(at, widths, [cskv.key_quantiser, cskv.value_quantiser], cskv.basis.blocks(model.kv_heads));
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
            drops: profile.cskv.as_ref().is_some_and(|c| c.basis == BasisKind::Dropped),
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
            sealed: when(compressed, self.sealed.last().map_or(0, |l| l.end).max(1)),
            sinks: when(compressed && self.sinks > 0, self.layers * self.sinks_layer_bytes()),
            workspace: when(compressed, self.workspace_hidden() + P * self.hidden * 4),
        }
    }

    /// What the bytes of a sealed page hold. All zero for `full`.
    pub fn sealed_split(&self) -> SealedSplit {
        self.sealed.iter().fold(SealedSplit::default(), |sum, l| {
            let keys = if l.keys.bits == 16 { l.keys.rank * P * 2 } else { l.keys.key_code_bytes() };
            let values = if l.values.bits == 16 { P * l.values.rank * 2 } else { l.values.value_code_bytes() };
            let metadata = l.key_meta_bytes() + l.value_meta_bytes();
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
