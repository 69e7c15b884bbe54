//! The learned low-rank map of one layer: exact keys and values to latents and back.
//! Its file format lives in `artifact`, how it is computed in `calibrate`.

use std::ops::Range;

pub mod artifact;

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

/// The widest map that is known for the keys, or the values, of one layer. Profiles take their [`Projection`]s
/// out of it, so profiles of different ranks, and of different bits at one rank, share one set of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// `[channels]`.
    pub mean: Vec<f32>,
    /// Equally wide blocks of neighbouring channels, each mapped on its own.
    pub groups: usize,
    /// `[groups][width][channels / groups]`, `width` being the rank of one group. Row `i` of a group is the
    /// direction whose coordinate is latent element `i`.
    pub directions: Vec<f32>,
    /// How latents are turned back, in the shape of `directions`. `None`: by the directions themselves, which are
    /// then orthonormal and in falling order of energy, so the leading ones are the best basis of every smaller
    /// rank. `Some`: a trained pair, which serves its own width only.
    pub up: Option<Vec<f32>>,
}

/// The bases of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerBasis {
    pub keys: Basis,
    pub values: Basis,
}

/// A rank that a [`Basis`] cannot give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RankError {
    #[error("rank {rank} does not divide into {groups} groups")]
    Uneven { rank: usize, groups: usize },
    #[error("rank {rank} is asked of a basis of width {width}")]
    TooWide { rank: usize, width: usize },
    #[error("rank {rank} is asked of a trained basis, which serves its width {width} only")]
    Trained { rank: usize, width: usize },
    #[error("rank 0 keeps nothing")]
    Zero,
}

impl Basis {
    /// Latent width over all groups.
    pub fn width(&self) -> usize {
        match self.mean.len() {
            0 => 0,
            channels => self.directions.len() * self.groups / channels,
        }
    }

    /// Whether [`Basis::projection`] gives this rank.
    ///
    /// # Errors
    /// As it does.
    pub fn check_rank(&self, rank: usize) -> Result<(), RankError> {
        let (groups, width) = (self.groups, self.width());
        match rank {
            0 => Err(RankError::Zero),
            _ if rank > width => Err(RankError::TooWide { rank, width }),
            _ if self.up.is_some() && rank != width => Err(RankError::Trained { rank, width }),
            _ if !rank.is_multiple_of(groups) => Err(RankError::Uneven { rank, groups }),
            _ => Ok(()),
        }
    }

    /// The projection of `rank` latent elements, evenly over the groups: the leading directions of each.
    ///
    /// # Errors
    /// Where `rank` is zero, does not divide by the groups, exceeds the width, or is not the width of a trained pair.
    pub fn projection(&self, rank: usize) -> Result<Projection, RankError> {
        self.check_rank(rank)?;
        let (groups, width) = (self.groups, self.width());
        let (channels, r) = (self.mean.len() / groups, rank / groups);
        let stride = width / groups * channels;
        let groups = (0..groups)
            .map(|g| {
                let rows = &self.directions[g * stride..][..r * channels];
                let mut down = vec![0.0; channels * r];
                for (i, row) in rows.chunks_exact(channels).enumerate() {
                    row.iter().enumerate().for_each(|(c, &x)| down[c * r + i] = x);
                }
                let up = self.up.as_ref().map_or(rows, |up| &up[g * stride..][..r * channels]).to_vec();
                Group { channels: g * channels..(g + 1) * channels, ranks: g * r..(g + 1) * r, down, up }
            })
            .collect();
        Ok(Projection { mean: self.mean.clone(), groups })
    }
}
