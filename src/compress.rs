//! The learned low-rank map of one layer: exact keys and values to latents and back.
//! Its file format lives in `artifact`, how it is computed in `calibrate`.

use std::ops::Range;

/// Per layer: how keys and values become latents.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCompression {
    pub keys: Projection,
    pub values: Projection,
}

/// `latent = (x - mean) . down`, `x ~ mean + latent . up`, block by block over groups of KV heads
/// (decision 1: the latent is a projection of the exact key, whatever produced it). Keys are taken before rope.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// `[channels]`.
    pub mean: Vec<f32>,
    /// In order of channels; their channel and rank ranges tile `0..channels` and `0..rank`.
    pub groups: Vec<Group>,
}

/// One block of a projection: a range of channels mapped to a range of latent elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub channels: Range<usize>,
    pub ranks: Range<usize>,
    /// `[channels.len()][ranks.len()]`.
    pub down: Vec<f32>,
    /// `[ranks.len()][channels.len()]`.
    pub up: Vec<f32>,
}

impl Projection {
    /// Latent width over all groups.
    pub fn rank(&self) -> usize {
        self.groups.last().map_or(0, |g| g.ranks.end)
    }

    /// Channels over all groups.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }
}
