//! The learned low-rank map of one layer: exact keys and values to latents and back.
//! Its file format lives in `artifact`, how it is computed in `calibrate`.

use std::ops::Range;

use crate::kv::layout::{Cskv, Quantiser};
use crate::model::config::ModelConfig;
use crate::quant::Rotation;

pub mod artifact;
pub mod seen;

/// Per layer: how keys and values become latents.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCompression {
    pub keys: KeyMap,
    pub values: Projection,
}

/// How keys become latents, and how a query meets them.
#[derive(Clone, Debug, PartialEq)]
pub enum KeyMap {
    /// Taken before rope; rebuilt and turned to be met.
    Channels(Projection),
    /// Taken after rope; the query is absorbed and no key is ever rebuilt.
    Frequencies(FrequencyMap),
}

impl KeyMap {
    /// Latent width.
    pub fn rank(&self) -> usize {
        match self {
            KeyMap::Channels(p) => p.rank(),
            KeyMap::Frequencies(f) => 2 * f.frequencies.len(),
        }
    }

    /// Key channels.
    pub fn channels(&self) -> usize {
        match self {
            KeyMap::Channels(p) => p.channels(),
            KeyMap::Frequencies(f) => 2 * f.half * f.kv_heads,
        }
    }
}

/// A map that commutes with rope (decision 2).
///
/// Rope turns channels `f` and `f + half` of every head, as the complex number `z[h] = k[h][f] + i k[h][f + half]`, by one
/// angle. Complex combinations of one frequency's `z` over the KV heads turn by that angle too: so the latent
/// `c[j] = sum over h of down[j][h] z[h]` of pair `j`, at its frequency, may be taken of turned keys, and
/// `z[h] ~ sum over j of up[j][h] c[j]` gives turned keys. A turned query `q` at head `h` therefore scores
/// `Re(conj(q) z[h]) = sum over j of Re(conj(a[j]) c[j])` with `a[j] = q conj(up[j][h])`: a dot product of real numbers with
/// the latent, whose elements `2 j` and `2 j + 1` are the real and imaginary part of `c[j]`.
#[derive(Clone, Debug, PartialEq)]
pub struct FrequencyMap {
    pub kv_heads: usize,
    /// Frequencies: half a head.
    pub half: usize,
    /// Of each pair, below `half`.
    pub frequencies: Vec<u32>,
    /// `[pairs][kv_heads]`, real and imaginary part.
    pub down: Vec<[f32; 2]>,
    pub up: Vec<[f32; 2]>,
    /// Turns each block of as many latent elements before they are stored, and an absorbed query before it meets them.
    pub rotation: Option<Rotation>,
}

impl FrequencyMap {
    /// Latent of a key after rope `[kv_heads][head_dim]`, not turned by the rotation yet: see [`FrequencyMap::rotate`].
    fn combine(&self, key: &[f32]) -> Vec<f32> {
        let mut latent = Vec::with_capacity(2 * self.frequencies.len());
        for (j, &f) in self.frequencies.iter().enumerate() {
            let (mut re, mut im) = (0.0, 0.0);
            for (h, &[c, d]) in self.down[j * self.kv_heads..][..self.kv_heads].iter().enumerate() {
                let at = 2 * self.half * h + f as usize;
                let (a, b) = (key[at], key[at + self.half]);
                (re, im) = (re + c * a - d * b, im + c * b + d * a);
            }
            latent.extend([re, im]);
        }
        latent
    }

    /// Latent of a key after rope, `[kv_heads][head_dim]`, as it is stored.
    pub fn latent(&self, key: &[f32]) -> Vec<f32> {
        let mut latent = self.combine(key);
        let mut spare = vec![0.0; latent.len()];
        self.rotate(&mut latent, 1, &mut spare);
        latent
    }

    /// The key after rope that a stored latent stands for.
    pub fn key(&self, latent: &[f32]) -> Vec<f32> {
        let mut latent = latent.to_vec();
        if let Some(rotation) = &self.rotation {
            latent.chunks_exact_mut(rotation.size()).for_each(|block| rotation.undo(block));
        }
        let mut key = vec![0.0; 2 * self.half * self.kv_heads];
        for (j, &f) in self.frequencies.iter().enumerate() {
            for (h, &[c, d]) in self.up[j * self.kv_heads..][..self.kv_heads].iter().enumerate() {
                let at = 2 * self.half * h + f as usize;
                key[at] += c * latent[2 * j] - d * latent[2 * j + 1];
                key[at + self.half] += c * latent[2 * j + 1] + d * latent[2 * j];
            }
        }
        key
    }

    /// Turns latents, or absorbed queries, in the columns of `x: [2 * pairs][lanes]`, in memory that is as long as `x`.
    ///
    /// # Panics
    /// Where `x` is not that long, or the memory shorter.
    pub fn rotate(&self, x: &mut [f32], lanes: usize, spare: &mut [f32]) {
        assert_eq!(x.len(), 2 * self.frequencies.len() * lanes, "latents of another map");
        if let Some(rotation) = &self.rotation {
            x.chunks_exact_mut((rotation.size() * lanes).max(1)).for_each(|block| rotation.apply_in(block, lanes, spare));
        }
    }
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

impl LayerCompression {
    /// Keys after rope and values as they are, head by head.
    pub fn identity(model: &ModelConfig) -> Self {
        let (kv_heads, half) = (model.kv_heads, model.head_dim / 2);
        let one = |j: usize| (0..kv_heads).map(move |h| [f32::from(u8::from(j / half == h)), 0.0]);
        let maps: Vec<[f32; 2]> = (0..kv_heads * half).flat_map(one).collect();
        let frequencies = (0..kv_heads * half).map(|j| (j % half) as u32).collect();
        let keys = FrequencyMap { kv_heads, half, frequencies, down: maps.clone(), up: maps, rotation: None };
        let d = model.head_dim;
        let unit: Vec<f32> = (0..d * d).map(|i| f32::from(u8::from(i / d == i % d))).collect();
        let head = |h: usize| Group { channels: h * d..(h + 1) * d, ranks: h * d..(h + 1) * d, down: unit.clone(), up: unit.clone() };
        let values = Projection { mean: vec![0.0; kv_heads * d], groups: (0..kv_heads).map(head).collect() };
        LayerCompression { keys: KeyMap::Frequencies(keys), values }
    }

    /// Of a profile that keeps nothing of a sealed position.
    pub fn dropped(model: &ModelConfig) -> Self {
        let (kv_heads, half) = (model.kv_heads, model.head_dim / 2);
        let keys = FrequencyMap { kv_heads, half, frequencies: vec![], down: vec![], up: vec![], rotation: None };
        LayerCompression { keys: KeyMap::Frequencies(keys), values: Projection { mean: vec![0.0; model.kv_channels()], groups: vec![] } }
    }

    /// As the quantisers of keys and of values want it: for the Hadamard one, latents turned block by block. A rotation of channels
    /// is folded into their map; that of frequencies stays a step of its own, as their map is sparse.
    pub fn for_quantisers(self, cskv: &Cskv) -> Self {
        self.turned_for(cskv, true)
    }

    /// The same for maps that were trained: those of channels have the rotation in them already.
    pub fn as_trained(self, cskv: &Cskv) -> Self {
        self.turned_for(cskv, false)
    }

    fn turned_for(mut self, cskv: &Cskv, folds: bool) -> Self {
        if cskv.key_quantiser == Quantiser::Hadamard {
            match &mut self.keys {
                KeyMap::Channels(p) if folds => p.rotate(),
                KeyMap::Channels(_) => {}
                KeyMap::Frequencies(map) if map.frequencies.is_empty() => {}
                KeyMap::Frequencies(map) => {
                    let blocks = cskv.basis.blocks(map.kv_heads).max(1);
                    map.rotation = Some(Rotation::new(2 * map.frequencies.len() / blocks));
                }
            }
        }
        if folds && cskv.value_quantiser == Quantiser::Hadamard {
            self.values.rotate();
        }
        self
    }
}

impl Projection {
    /// Turns the latents of each group, in both directions of the map.
    fn rotate(&mut self) {
        for group in self.groups.iter_mut().filter(|g| !g.ranks.is_empty()) {
            let rotation = Rotation::new(group.ranks.len());
            group.down.chunks_exact_mut(group.ranks.len()).for_each(|row| rotation.apply(row, 1));
            rotation.apply(&mut group.up, group.channels.len());
        }
    }

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
    pub up: Up,
}

/// How latents are turned back, in the shape of the directions they were taken by.
#[derive(Clone, Debug, PartialEq)]
pub enum Up {
    /// By the directions themselves, which are then orthonormal and in falling order of energy, so the leading ones are the
    /// best basis of every smaller rank.
    Directions,
    /// By others, again so that the leading ones are the best basis of every smaller rank: optima of a weighted error.
    Nested(Vec<f32>),
    /// By others that were trained with the directions, for their own width only.
    Trained(Vec<f32>),
}

impl Up {
    /// What turns latents back, where that is not the directions.
    pub fn own(&self) -> Option<&[f32]> {
        match self {
            Up::Directions => None,
            Up::Nested(up) | Up::Trained(up) => Some(up),
        }
    }

    /// Whether it serves its own width only.
    pub fn is_trained(&self) -> bool {
        matches!(self, Up::Trained(_))
    }
}

/// The widest [`FrequencyMap`] that is known for the keys of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct FrequencyBasis {
    pub kv_heads: usize,
    pub half: usize,
    /// Of each pair of latent elements, below `half`; pairs in falling order of energy over all frequencies.
    pub frequencies: Vec<u32>,
    /// `[pairs][kv_heads][2]`, real and imaginary part of `d`: the latent is `sum over h of conj(d[h]) z[h]`, and by
    /// [`Up::Directions`] it stands for `z[h] ~ d[h] c`.
    pub directions: Vec<f32>,
    pub up: Up,
}

/// The basis of one layer's keys.
#[derive(Clone, Debug, PartialEq)]
pub enum KeyBasis {
    Channels(Basis),
    Frequencies(FrequencyBasis),
}

/// The bases of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerBasis {
    pub keys: KeyBasis,
    pub values: Basis,
}

impl KeyBasis {
    /// Latent width.
    pub fn width(&self) -> usize {
        match self {
            KeyBasis::Channels(b) => b.width(),
            KeyBasis::Frequencies(b) => 2 * b.frequencies.len(),
        }
    }

    /// How latents are turned back.
    pub fn up(&self) -> &Up {
        match self {
            KeyBasis::Channels(b) => &b.up,
            KeyBasis::Frequencies(b) => &b.up,
        }
    }

    /// Whether [`KeyBasis::map`] gives this rank.
    ///
    /// # Errors
    /// As it does.
    pub fn check_rank(&self, rank: usize) -> Result<(), RankError> {
        match self {
            KeyBasis::Channels(b) => b.check_rank(rank),
            KeyBasis::Frequencies(b) => {
                let width = 2 * b.frequencies.len();
                match rank {
                    _ if rank > width => Err(RankError::TooWide { rank, width }),
                    _ if b.up.is_trained() && rank != width => Err(RankError::Trained { rank, width }),
                    _ if !rank.is_multiple_of(2) => Err(RankError::Odd { rank }),
                    _ => Ok(()),
                }
            }
        }
    }

    /// The map of `rank` latent elements.
    ///
    /// # Errors
    /// As [`Basis::projection`]; and where the rank of a frequency basis is odd.
    pub fn map(&self, rank: usize) -> Result<KeyMap, RankError> {
        self.check_rank(rank)?;
        match self {
            KeyBasis::Channels(b) => b.projection(rank).map(KeyMap::Channels),
            KeyBasis::Frequencies(b) => {
                let FrequencyBasis { kv_heads, half, .. } = *b;
                let leading = |x: &[f32]| x.as_chunks::<2>().0[..rank / 2 * kv_heads].to_vec();
                let directions = leading(&b.directions);
                Ok(KeyMap::Frequencies(FrequencyMap {
                    kv_heads,
                    half,
                    frequencies: b.frequencies[..rank / 2].to_vec(),
                    down: directions.iter().map(|&[re, im]| [re, -im]).collect(),
                    up: b.up.own().map_or(directions, leading),
                    rotation: None,
                }))
            }
        }
    }
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
    #[error("rank {rank} is asked of a frequency basis, whose latent elements come in pairs")]
    Odd { rank: usize },
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
            _ if rank > width => Err(RankError::TooWide { rank, width }),
            _ if self.up.is_trained() && rank != width => Err(RankError::Trained { rank, width }),
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
                let up = self.up.own().map_or(rows, |up| &up[g * stride..][..r * channels]).to_vec();
                Group { channels: g * channels..(g + 1) * channels, ranks: g * r..(g + 1) * r, down, up }
            })
            .collect();
        Ok(Projection { mean: self.mean.clone(), groups })
    }
}
