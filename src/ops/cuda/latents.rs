//! Sealed pages whose latents are spread into shared memory before they are met: the shapes and launches of `rebuild.cuh`.
//!
//! A group of KV heads shares a basis, and meets a span of the latents. Shared memory decides how much of a span is there at once.

use crate::ids::PAGE_TOKENS;
use crate::kv::layout::{Quantiser, SealedLayer, SealedPart, VALUE_GROUP};

const P: usize = PAGE_TOKENS as usize;
/// What spread keys begin at a multiple of: channels of a word of third bits.
const RUN: usize = 32;
/// Value latents that the warps of a block sum at a time.
const WARP_VALUES: usize = 128;
/// Threads of every block.
pub(super) const THREADS: usize = 256;

/// The keys or the values of a layer's sealed pages (`rebuild::Part`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PartArgs {
    pub(super) rank: u32,
    pub(super) span: u32,
    pub(super) width: u32,
    pub(super) chunk: u32,
    bits: u32,
    affine: u32,
    codes: u32,
    meta: u32,
}

/// Who meets spread latents: whose block holds what in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meets {
    /// `attend_absorbed`.
    Absorbed,
    /// `attend_rebuilt`.
    Rebuilt,
    /// `rebuild_pages`.
    Pages,
}

impl Meets {
    /// Lines of a block, and value latents it sums at most.
    pub(super) const fn reach(self) -> (usize, usize) {
        match self {
            Meets::Absorbed => (32, 4 * WARP_VALUES),
            Meets::Rebuilt => (8, 8 * WARP_VALUES),
            Meets::Pages => (0, usize::MAX),
        }
    }
}

/// How the latents of a layer are spread, and the shared memory that takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Spread {
    pub(super) groups: usize,
    pub(super) keys: PartArgs,
    pub(super) values: PartArgs,
    /// Whether shared memory holds the whole map of rebuilt keys.
    pub(super) resident: bool,
    pub(super) shared: usize,
}

/// The first key latent that a group's are spread from.
pub(super) const fn first_key(group: usize, span: usize) -> usize {
    group * span / RUN * RUN
}

/// Key latents that are spread of any group, of `span` each.
pub(super) fn key_width(groups: usize, span: usize) -> usize {
    (0..groups).map(|g| g * span - first_key(g, span) + span).max().unwrap_or(0).next_multiple_of(16)
}

impl Spread {
    /// How a block of `has` bytes of shared memory meets a layer.
    ///
    /// # Errors
    /// Where it is too small: the bytes needed at least.
    pub(super) fn new(layer: &SealedLayer, meets: Meets, d: usize, has: usize) -> Result<Self, usize> {
        let groups = layer.blocks.max(1);
        let part = |p: SealedPart, width: usize| PartArgs {
            rank: p.rank as u32,
            span: (p.rank / groups) as u32,
            width: width as u32,
            chunk: width as u32,
            bits: p.bits,
            affine: u32::from(p.bits < 16 && p.quantiser == Quantiser::Affine),
            codes: p.codes as u32,
            meta: p.meta as u32,
        };
        let (k, v) = (key_width(groups, layer.keys.rank / groups), (layer.values.rank / groups).next_multiple_of(16));
        let mut spread = Spread { groups, keys: part(layer.keys, k), values: part(layer.values, v), resident: false, shared: 0 };
        // Two blocks side by side hide each other's waits, so half of the memory is tried first. A map that is not at hand comes anew for
        // every page, so it is kept where it fits at all.
        let (_, most) = meets.reach();
        let key_chunks = |at_most: usize| std::iter::once(k).chain((1..=k / RUN).rev().map(|n| n * RUN)).filter(move |&n| n <= at_most);
        let value_chunks = std::iter::once(v).chain((1..=v.min(most) / WARP_VALUES).rev().map(|n| n * WARP_VALUES));
        let value_chunks: Vec<usize> = value_chunks.filter(|&n| n <= most).collect();
        let at_most = if meets == Meets::Pages { WARP_VALUES.max(RUN) } else { usize::MAX };
        let mut least = usize::MAX;
        for (resident, has) in [(true, has / 2), (true, has), (false, has / 2), (false, has)] {
            if resident && meets != Meets::Rebuilt {
                continue;
            }
            spread.resident = resident;
            for key in key_chunks(at_most).filter(|&n| n >= k.min(2 * RUN)) {
                for &value in value_chunks.iter().filter(|&&n| n <= at_most) {
                    (spread.keys.chunk, spread.values.chunk) = (key as u32, value as u32);
                    spread.shared = spread.bytes(meets, d);
                    if spread.shared <= has {
                        return Ok(spread);
                    }
                    least = least.min(spread.shared);
                }
            }
        }
        Err(least)
    }

    /// Bytes of shared memory, as `Room` and `rebuild_pages` lay them out.
    fn bytes(&self, meets: Meets, d: usize) -> usize {
        let (key, value, width) = (self.keys.chunk as usize, self.values.chunk as usize, self.keys.width as usize);
        let (lines, _) = meets.reach();
        let tile = (P * (key + 8)).max(value * (P + 8));
        let groups = if self.values.span == 0 { 0 } else { (self.values.span as usize + 62) / VALUE_GROUP };
        let scales = self.keys.affine as usize * 4 * width + self.values.affine as usize * 4 * groups * P + 8 * P;
        let rows = |planes: usize, query: usize| {
            lines * (2 * (query + 8) + 4 * planes * (P + 4) + 2 * (P + 8) + 8) + 4 * super::attend::SEALED_MOST
        };
        match meets {
            Meets::Absorbed => 2 * tile + scales + rows(2, width),
            Meets::Rebuilt => 2 * (if self.resident { width } else { key }) * (d + 8) + 2 * tile + scales + rows(4, d),
            Meets::Pages => 2 * key.max(value) * (d + 8) + 2 * tile.max(d * (P + 8)) + scales,
        }
    }
}

/// `LatentsArgs` of `rebuild.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LatentsArgs {
    pub(super) arena: u64,
    pub(super) table: u64,
    pub(super) items: u64,
    pub(super) queries: u64,
    pub(super) factors: u64,
    pub(super) up: u64,
    pub(super) mean: u64,
    pub(super) rope: [u64; 2],
    pub(super) out: u64,
    pub(super) state: u64,
    pub(super) scale: f32,
    pub(super) heads: u32,
    pub(super) units: u32,
    pub(super) groups: u32,
    pub(super) d: u32,
    pub(super) tiles: u32,
    pub(super) stride: u32,
    pub(super) resident: u32,
    pub(super) end: u32,
    pub(super) keys: PartArgs,
    pub(super) values: PartArgs,
}
