//! Bases in closed form. [`Moments`] watches the keys and values that a forward pass makes of calibration text;
//! [`solve`] gives the bases that lose the least of them: the centred principal components of each layer's output,
//! which are the optimum of CSKV's reconstruction loss before quantisation; and, to compare with, those that the weights alone
//! give ([`Source`]).
//!
//! Cost on `n` tokens and `c` channels, per layer and for keys and values each: `n c^2` multiply-adds to watch, in
//! f64; memory about `4 n c` bytes up to `n = c`, `8 c^2` beyond (Llama-2-7B: 8.6 GB over all layers); then the
//! eigenvectors of a `min(n, c)` square matrix.
//! One tensor timed on two shared cores at 2.8 GHz, optimised, on random rows, times 64 for 32 layers: Llama-3.1-8B joint
//! (c = 1024, 4096 tokens) 40 s; Llama-2-7B (c = 4096) joint 4 min from 2048 tokens and 19 min from 6000, in groups of 4
//! heads 1 min. The forward passes come on top.

use std::collections::BTreeMap;
use std::fmt;

use faer::{Mat, Side};
use rayon::prelude::*;

use crate::compress::artifact::{Artifact, ArtifactError, BasisSet, Fingerprint, StoredProfile};
use crate::compress::{Basis, KeyBasis, LayerBasis, RankError, Up};
use crate::kv::layout::{BasisKind, Cskv, Init, Profile, Size, Widths};
use crate::model::config::ModelConfig;
use crate::ops::{Matrix, MatrixData};

mod allocate;
mod collect;
mod demo;
mod frequency;
mod pca;
mod sample;
mod text;

pub use allocate::{Choice, Trial, hull, spread};
pub use collect::{collect, show};
pub use demo::demo_prompts;
pub(crate) use demo::{ADJECTIVES, NOUNS};
pub use sample::{Telling, sample};
pub use text::calibration_text;

/// What calibration has seen of each layer: first and second moments of its keys before rope and of its values.
///
/// The first positions of every text are left out: attention sinks have outlying keys, and stay exact in the cache.
pub struct Moments {
    heads: usize,
    kv_heads: usize,
    channels: usize,
    sinks: usize,
    layers: Vec<[pca::Stream; 2]>,
    /// Per layer: sums over tokens and query heads of the energy of queries, `[kv_heads][head_dim / 2]`.
    queries: Vec<Vec<f64>>,
    /// Per layer: sums over tokens of the magnitude of what its projections see, `[hidden]`.
    inputs: Vec<Vec<f64>>,
    /// What budgets are spread by, where there are some.
    sample: Option<allocate::Sample>,
}

/// What bases are found from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// The singular vectors of the projections' weights, per layer: [`products`] of an even input. The paper's plain SVD:
    /// `x A = x W V S^-1/2` is a projection of the key `x W` on the right singular vectors `V`.
    Svd(&'a [Products]),
    /// Those of the weights scaled by the inputs that they meet: [`products`] of [`Moments::input_magnitudes`]. ASVD with
    /// `alpha = 1/2` (arXiv 2312.05821), as the paper starts from.
    Asvd(&'a [Products]),
    /// The principal components of keys and values: the optimum of the paper's loss, errors counting the same everywhere.
    Closed,
    /// The weighted closed form: errors of keys count by the energy of the queries that meet them at their frequency, errors of
    /// values by what the output projection makes of them: per layer, [`value_metric`].
    Weighted(&'a [Vec<f64>]),
}

/// What the weights of one layer make of an input without correlations, and its means: of keys and of values.
#[derive(Clone, Debug)]
pub struct Products {
    /// `W diag(input) W^T`.
    second: [Mat<f64>; 2],
    /// The biases.
    mean: [Vec<f32>; 2],
}

/// One projection: its weights, its bias, and the weight of the norm over each head that follows it, if they are there.
pub type Projected<'a> = (Matrix<'a>, Option<&'a [f32]>, Option<&'a [f32]>);

/// [`Products`] of the projections to keys and to values, for inputs of these magnitudes.
///
/// A norm over each head (QK-norm) scales channels by its weight; that it divides by the head's length is left out, as no
/// singular value decomposition of weights can know it.
///
/// Cost: `channels^2 * hidden` multiply-adds each.
pub fn products(projections: [Projected<'_>; 2], input: &[f64]) -> Products {
    let one = |(w, bias, norm): Projected<'_>| {
        let gain = |row: usize| norm.map_or(1.0, |n| f64::from(n[row % n.len()]));
        let mut row = vec![0.0; w.in_features];
        let mut scaled = Mat::zeros(w.out_features, w.in_features);
        for r in 0..w.out_features {
            read_row(w, r, &mut row);
            row.iter().zip(input).enumerate().for_each(|(c, (&x, i))| scaled[(r, c)] = gain(r) * f64::from(x) * i.sqrt());
        }
        let second = &scaled * scaled.transpose();
        // Under a norm the bias is no mean of what comes out.
        let mean = bias.filter(|_| norm.is_none()).map_or(vec![0.0; w.out_features], <[f32]>::to_vec);
        (second, mean)
    };
    let [(keys, key_mean), (values, value_mean)] = projections.map(one);
    Products { second: [keys, values], mean: [key_mean, value_mean] }
}

fn read_row(w: Matrix<'_>, r: usize, to: &mut [f32]) {
    let range = r * w.in_features..(r + 1) * w.in_features;
    match w.data {
        MatrixData::F32(data) => to.copy_from_slice(&data[range]),
        MatrixData::Bf16(data) => to.iter_mut().zip(&data[range]).for_each(|(to, x)| *to = x.to_f32()),
    }
}

/// What an error of the values of a layer is worth: per KV head, the sum over its query heads of `W^T W`, `W` being their columns
/// of the output projection; `[kv_heads][head_dim][head_dim]`.
///
/// Cost: `hidden * heads * head_dim^2` multiply-adds.
pub fn value_metric(model: &ModelConfig, output: Matrix<'_>) -> Vec<f64> {
    let d = model.head_dim;
    let mut metric = vec![0.0; model.kv_heads * d * d];
    let mut row = vec![0.0; output.in_features];
    for r in 0..output.out_features {
        read_row(output, r, &mut row);
        for (head, w) in row.chunks_exact(d).enumerate() {
            let to = &mut metric[head * model.kv_heads / model.heads * d * d..][..d * d];
            for (to, &a) in to.chunks_exact_mut(d).zip(w) {
                to.iter_mut().zip(w).for_each(|(to, &b)| *to += f64::from(a * b));
            }
        }
    }
    metric
}

/// Square roots of `[heads][half]` weights, over both halves of each head.
fn diagonal(weights: &[f64], d: usize) -> Vec<Mat<f64>> {
    let heads = weights.chunks_exact(d / 2);
    heads.map(|w| Mat::from_fn(d, d, |i, j| if i == j { w[i % (d / 2)].sqrt() } else { 0.0 })).collect()
}

/// `L` of `metric + a little = L L^T`, head by head.
fn cholesky(metric: &[f64], d: usize) -> Option<Vec<Mat<f64>>> {
    let one = |m: &[f64]| {
        let mean = (0..d).map(|i| m[i * d + i]).sum::<f64>() / d as f64;
        // A direction that the projection ignores may not be ignored by what follows it.
        let least = if mean > 0.0 { 1e-4 * mean } else { 1.0 };
        let m = Mat::from_fn(d, d, |i, j| m[i * d + j] + if i == j { least } else { 0.0 });
        Some(m.llt(Side::Lower).ok()?.L().to_owned())
    };
    metric.chunks_exact(d * d).map(one).collect()
}

/// The bases of all layers, and what they keep.
#[derive(Clone, Debug)]
pub struct Solution {
    pub layers: Vec<LayerBasis>,
    /// Of keys and of values, per layer.
    pub spectra: Vec<[Spectrum; 2]>,
}

/// How the energy (variance about the mean) of one layer's keys or values falls off over its directions.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    /// Per group: energy in all directions, and in each leading one, falling.
    pub groups: Vec<(f64, Vec<f64>)>,
}

/// An artifact in closed form, and what each of its profiles keeps.
#[derive(Clone, Debug)]
pub struct Calibrated {
    pub artifact: Artifact,
    pub energy: Vec<EnergyKept>,
}

/// Share of the energy of keys and values that a profile's latents hold, per layer. Prints as a line for the log.
#[derive(Clone, Debug, PartialEq)]
pub struct EnergyKept {
    pub profile: String,
    /// (keys, values), each in `[0, 1]`.
    pub layers: Vec<(f64, f64)>,
}

/// Spreads budgets; remembers what it tried, which serves every budget of the same kind.
pub struct Allocator<'a> {
    sample: &'a allocate::Sample,
    trial: Trial<'a>,
    known: Vec<(Cskv, Vec<Vec<Choice>>)>,
}

impl Allocator<'_> {
    /// Of a profile with a budget.
    ///
    /// # Errors
    /// Where a rank is none of the basis, or no text is long enough to say what choices cost.
    pub fn allocate(&mut self, cskv: &Cskv, budget: u32, bases: &[LayerBasis]) -> Result<Vec<Widths>, CalibrateError> {
        let kind = Cskv { size: Size::Budget(1), ..cskv.clone() };
        let known = match self.known.iter().position(|k| k.0 == kind) {
            Some(known) => known,
            None => {
                self.known.push((kind, allocate::hulls(self.sample, &self.trial, cskv, bases)?));
                self.known.len() - 1
            }
        };
        Ok(allocate::widths(&self.known[known].1, budget, &self.trial, cskv))
    }
}

/// Why calibration gives no bases.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    #[error(
        "layer {layer} made {part} that are not finite (token {position} of a calibration text); the checkpoint or the kernels are broken"
    )]
    NotFinite { layer: usize, part: &'static str, position: usize },
    #[error(
        "layer {layer} gave {len} numbers as {part}, which is no whole number of tokens of {channels} channels each, or not as many as its keys"
    )]
    Ragged { layer: usize, part: &'static str, len: usize, channels: usize },
    #[error("layer {layer} saw {tokens} calibration tokens and layer 0 saw {first}")]
    Uneven { layer: usize, tokens: usize, first: usize },
    #[error(
        "calibration saw {have} tokens (sinks left out) and a rank of {rank} needs at least {need}; give it more text, or a higher --tokens"
    )]
    TooFewTokens { have: usize, rank: usize, need: usize },
    #[error("the longest calibration text has {longest} tokens, of which nothing is compressed beside {sinks} sinks; give longer texts")]
    TooShort { longest: usize, sinks: u32 },
    #[error("a rank of {rank} for {part} does not divide into {groups} groups of {channels} channels each")]
    Rank { part: &'static str, rank: usize, groups: usize, channels: usize },
    #[error("groups of {heads} KV heads do not divide the model's {kv_heads}")]
    Groups { heads: usize, kv_heads: usize },
    #[error("the eigenvectors of the {part} of layer {layer} were not found: the iteration did not converge")]
    Eigen { layer: usize, part: &'static str },
    #[error(transparent)]
    Ranks(RankError),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
}

const PARTS: [&str; 2] = ["keys", "values"];

impl Moments {
    /// Of a model, leaving out the first `sinks` positions of every text.
    pub fn new(model: &ModelConfig, sinks: usize) -> Self {
        let channels = model.kv_channels();
        let layers = (0..model.layers).map(|_| [pca::Stream::new(channels), pca::Stream::new(channels)]).collect();
        let queries = vec![vec![0.0; channels / 2]; model.layers];
        let inputs = vec![vec![0.0; model.hidden]; model.layers];
        Moments { heads: model.heads, kv_heads: model.kv_heads, channels, sinks, layers, queries, inputs, sample: None }
    }

    /// The same, keeping a sample of what layers make, by which budgets are spread.
    pub fn sampling(model: &ModelConfig, sinks: usize) -> Self {
        Moments { sample: Some(allocate::Sample::new(model)), ..Self::new(model, sinks) }
    }

    /// How budgets are best spread over bases as wide as there are channels.
    ///
    /// # Panics
    /// Where no sample was kept.
    pub fn allocator<'a>(&'a self, trial: Trial<'a>) -> Allocator<'a> {
        Allocator { sample: self.sample.as_ref().expect("a sample was asked for"), trial, known: Vec::new() }
    }

    pub(crate) fn add_residual(&mut self, layer: usize, residual: &[f32]) {
        if let Some(sample) = &mut self.sample {
            sample.inputs(layer, residual);
        }
    }

    /// A text begins.
    pub(crate) fn begin(&mut self) {
        if let Some(sample) = &mut self.sample {
            sample.begin(self.channels);
        }
    }

    /// Takes in what the projections of `layer` saw: `[n][hidden]`.
    ///
    /// # Errors
    /// Where a number is not finite. Nothing is taken in then.
    ///
    /// # Panics
    /// Where the model has no such layer.
    pub fn add_inputs(&mut self, layer: usize, inputs: &[f32]) -> Result<(), CalibrateError> {
        let sums = &mut self.inputs[layer];
        if let Some(at) = inputs.iter().position(|x| !x.is_finite()) {
            return Err(CalibrateError::NotFinite { layer, part: "inputs", position: at / sums.len() });
        }
        for row in inputs.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.abs()));
        }
        Ok(())
    }

    /// Mean magnitude of what the projections of `layer` saw, `[hidden]`, up to a factor. A channel that nothing came through
    /// counts a millionth of the mean, as in the paper's code.
    pub fn input_magnitudes(&self, layer: usize) -> Vec<f64> {
        let sums = &self.inputs[layer];
        let mean = sums.iter().sum::<f64>() / sums.len().max(1) as f64;
        if mean > 0.0 { sums.iter().map(|s| s / mean + 1e-6).collect() } else { vec![1.0; sums.len()] }
    }

    /// Takes in the energy of the queries (before rope) that `layer` made: `[n][heads][head_dim]`.
    ///
    /// # Errors
    /// Where a number is not finite. Nothing is taken in then.
    ///
    /// # Panics
    /// Where the model has no such layer.
    pub fn add_queries(&mut self, layer: usize, queries: &[f32]) -> Result<(), CalibrateError> {
        if let Some(at) = queries.iter().position(|x| !x.is_finite()) {
            return Err(CalibrateError::NotFinite { layer, part: "queries", position: at * self.kv_heads / (self.heads * self.channels) });
        }
        if let Some(sample) = &mut self.sample {
            sample.queries(layer, queries);
        }
        let half = self.channels / self.kv_heads / 2;
        let per_token = self.heads * 2 * half;
        for token in queries.chunks_exact(per_token) {
            for (head, q) in token.chunks_exact(2 * half).enumerate() {
                let kv_head = head * self.kv_heads / self.heads;
                let to = &mut self.queries[layer][kv_head * half..][..half];
                let (re, im) = q.split_at(half);
                to.iter_mut().zip(re).zip(im).for_each(|((to, &a), &b)| *to += f64::from(a * a + b * b));
            }
        }
        Ok(())
    }

    /// What an error of a key is worth by KV head and frequency, floored at a thousandth of the layer's mean: a frequency that no
    /// query of the text met may be met yet.
    fn query_weights(&self, layer: usize) -> Vec<f64> {
        let sums = &self.queries[layer];
        let mean = sums.iter().sum::<f64>() / sums.len().max(1) as f64;
        if mean > 0.0 { sums.iter().map(|s| (s / mean).max(1e-3)).collect() } else { vec![1.0; sums.len()] }
    }

    /// Takes in what `layer` made of consecutive tokens of one text, the first of which stands at `position` there.
    /// `keys` (before rope) and `values` are `[n][kv_channels]`.
    ///
    /// # Errors
    /// Where a number is not finite, or the sizes do not fit. Nothing is taken in then.
    ///
    /// # Panics
    /// Where the model has no such layer.
    pub fn add(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) -> Result<(), CalibrateError> {
        let channels = self.channels;
        let skip = self.sinks.saturating_sub(position) * channels;
        let parts = [keys, values];
        for (data, part) in parts.iter().zip(PARTS) {
            if !data.len().is_multiple_of(channels) || data.len() != keys.len() {
                return Err(CalibrateError::Ragged { layer, part, len: data.len(), channels });
            }
            if let Some(at) = data.iter().position(|x| !x.is_finite()) {
                return Err(CalibrateError::NotFinite { layer, part, position: position + at / channels });
            }
        }
        if let Some(sample) = &mut self.sample {
            sample.add(layer, keys, values);
        }
        for (stream, data) in self.layers[layer].iter_mut().zip(parts) {
            stream.push(data.get(skip..).unwrap_or(&[]));
        }
        Ok(())
    }

    /// Tokens taken in so far, sinks left out.
    pub fn tokens(&self) -> usize {
        self.layers.first().map_or(0, |l| l[0].rows())
    }
}

/// Tokens that calibration must see, sinks left out, to find a basis of `rank` latent elements over all groups:
/// `n` centred tokens span `n - 1` directions.
pub fn tokens_needed(basis: BasisKind, rank: usize, model: &ModelConfig) -> usize {
    let groups = model.kv_heads / basis.heads_per_group(model.kv_heads).clamp(1, model.kv_heads);
    rank.div_ceil(groups) + 1
}

/// The best bases up to the given ranks (latent elements over all groups), by mean squared error on what `moments` saw.
///
/// # Errors
/// Where the ranks do not fit the model, or fewer tokens were seen than [`tokens_needed`].
pub fn solve(moments: &Moments, basis: BasisKind, source: &Source<'_>, max: (usize, usize)) -> Result<Solution, CalibrateError> {
    let (max_key_rank, max_value_rank) = max;
    let heads = basis.heads_per_group(moments.kv_heads);
    if heads == 0 || !moments.kv_heads.is_multiple_of(heads) {
        return Err(CalibrateError::Groups { heads, kv_heads: moments.kv_heads });
    }
    let groups = moments.kv_heads / heads;
    let channels = moments.channels / groups;
    let first = moments.tokens();
    let by_frequency = basis == BasisKind::Frequency;
    for (rank, part) in [max_key_rank, max_value_rank].into_iter().zip(PARTS) {
        if by_frequency && part == PARTS[0] && (!rank.is_multiple_of(2) || rank > channels) {
            return Err(CalibrateError::Rank { part, rank, groups: 2, channels });
        }
        if rank == 0 || !rank.is_multiple_of(groups) || rank / groups > channels {
            return Err(CalibrateError::Rank { part, rank, groups, channels });
        }
        if rank / groups >= first && !matches!(source, Source::Svd(_) | Source::Asvd(_)) {
            return Err(CalibrateError::TooFewTokens { have: first, rank, need: rank / groups + 1 });
        }
    }
    if let Some((layer, l)) = moments.layers.iter().enumerate().find(|(_, l)| l[0].rows() != first) {
        return Err(CalibrateError::Uneven { layer, tokens: l[0].rows(), first });
    }

    let one = |(layer, streams): (usize, &[pca::Stream; 2])| -> Result<(LayerBasis, [Spectrum; 2]), CalibrateError> {
        let d = moments.channels / moments.kv_heads;
        let query_weights = matches!(source, Source::Weighted(_)).then(|| moments.query_weights(layer));
        let key_metric = query_weights.as_ref().map(|w| diagonal(w, d));
        let products = match source {
            Source::Svd(all) | Source::Asvd(all) => Some(&all[layer]),
            Source::Closed | Source::Weighted(_) => None,
        };
        let value_metric = match source {
            Source::Svd(_) | Source::Asvd(_) | Source::Closed => None,
            Source::Weighted(metrics) => Some(cholesky(&metrics[layer], d).ok_or(CalibrateError::Eigen { layer, part: PARTS[1] })?),
        };
        let part = |i: usize, rank: usize, metric: Option<&[Mat<f64>]>| -> Result<(Basis, Spectrum), CalibrateError> {
            let width = rank / groups;
            let (mut directions, mut up) = (Vec::with_capacity(rank * channels), Vec::new());
            let mut spectrum = Spectrum { groups: Vec::with_capacity(groups) };
            for g in 0..groups {
                let metric = metric.map(|m| &m[g * heads..(g + 1) * heads]);
                let range = g * channels..(g + 1) * channels;
                let found = match products {
                    Some(products) => pca::leading(&products.second[i], range, width, &streams[i]),
                    None => streams[i].principal(range, width, metric),
                };
                let found = found.ok_or(CalibrateError::Eigen { layer, part: PARTS[i] })?;
                directions.extend(found.directions);
                up.extend(found.up.unwrap_or_default());
                spectrum.groups.push((found.total, found.energies));
            }
            let mean = match products {
                Some(products) => products.mean[i].clone(),
                None => streams[i].mean().into_iter().map(|x| x as f32).collect(),
            };
            let up = if metric.is_some() { Up::Nested(up) } else { Up::Directions };
            Ok((Basis { mean, groups, directions, up }, spectrum))
        };
        let (values, of_values) = part(1, max_value_rank, value_metric.as_deref())?;
        let (keys, of_keys) = if by_frequency {
            let second = |channels: &[usize]| match products {
                Some(Products { second: [m, _], .. }) => Mat::from_fn(channels.len(), channels.len(), |i, j| m[(channels[i], channels[j])]),
                None => streams[0].second(channels),
            };
            let seen = |channels: &[usize]| streams[0].second(channels);
            let seen = products.is_some().then_some(&seen as &frequency::Second<'_>);
            let found = frequency::solve(second, seen, (moments.kv_heads, d / 2), max_key_rank / 2, query_weights.as_deref());
            let found = found.ok_or(CalibrateError::Eigen { layer, part: PARTS[0] })?;
            let each = found.energies.iter().flat_map(|e| [e / 2.0; 2]).collect();
            (KeyBasis::Frequencies(found.basis), Spectrum { groups: vec![(found.total, each)] })
        } else {
            let (keys, spectrum) = part(0, max_key_rank, key_metric.as_deref())?;
            (KeyBasis::Channels(keys), spectrum)
        };
        Ok((LayerBasis { keys, values }, [of_keys, of_values]))
    };
    // Small layers run side by side; a large one keeps every thread busy alone, and its memory is felt.
    let solved: Vec<_> = if channels < 1024 {
        moments.layers.par_iter().enumerate().map(one).collect::<Result<_, _>>()?
    } else {
        moments.layers.iter().enumerate().map(one).collect::<Result<_, _>>()?
    };
    let (layers, spectra) = solved.into_iter().unzip();
    Ok(Solution { layers, spectra })
}

/// What bases of every init are found from. Parts that no profile asks for may be empty.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Of profiles that name no init.
    pub default: Init,
    /// [`Source::Svd`], [`Source::Asvd`].
    pub svd: Vec<Products>,
    pub asvd: Vec<Products>,
    /// [`Source::Weighted`].
    pub metrics: Vec<Vec<f64>>,
}

impl Sources {
    /// Of the closed form alone.
    pub fn closed() -> Self {
        Sources { default: Init::Closed, svd: vec![], asvd: vec![], metrics: vec![] }
    }

    fn of(&self, init: Init) -> Source<'_> {
        match init {
            Init::Svd => Source::Svd(&self.svd),
            Init::Asvd => Source::Asvd(&self.asvd),
            Init::Closed => Source::Closed,
            Init::Weighted => Source::Weighted(&self.metrics),
        }
    }
}

/// The artifact of the compressed ones among `profiles` whose basis is computed: one basis per grouping and init, as wide as the widest
/// profile needs; at the same ranks in every layer, or as `allocate` spreads the budgets, of (profile, its basis, as wide as there are
/// channels).
///
/// # Errors
/// As [`solve`], [`Artifact::new`] and [`Allocator::allocate`].
///
/// # Panics
/// Where a profile has a budget and there is no allocator.
pub fn artifact(
    moments: &Moments,
    model: &ModelConfig,
    base: Fingerprint,
    profiles: &[Profile],
    sources: &Sources,
    mut allocator: Option<&mut Allocator<'_>>,
) -> Result<Calibrated, CalibrateError> {
    type Kind = (bool, usize, Init);
    let name = |(by_frequency, heads, init): Kind| {
        let kind = match by_frequency {
            true => "frequency".to_owned(),
            false if heads == model.kv_heads => "joint".to_owned(),
            false => format!("grouped-{heads}"),
        };
        if init == sources.default { kind } else { format!("{kind}-{}", init.name()) }
    };
    let mut widest: BTreeMap<String, (Kind, (usize, usize))> = BTreeMap::new();
    let mut asked = Vec::new();
    for profile in profiles {
        let Some(cskv) = profile.cskv.as_ref().filter(|c| c.basis.is_computed()) else { continue };
        let init = cskv.init.unwrap_or(sources.default);
        let kind = (cskv.basis == BasisKind::Frequency, cskv.basis.heads_per_group(model.kv_heads), init);
        let widths = cskv.widths(model);
        let (keys, values) = widths.map_or((model.kv_channels(), model.kv_channels()), |w| (w.keys.rank, w.values.rank));
        let (_, (k, v)) = widest.entry(name(kind)).or_insert((kind, (0, 0)));
        (*k, *v) = (keys.max(*k), values.max(*v));
        asked.push((profile, name(kind), widths));
    }
    let mut sets = Vec::new();
    let mut spectra = BTreeMap::new();
    for (name, (kind, max)) in widest {
        let (by_frequency, heads, init) = kind;
        let basis = if by_frequency { BasisKind::Frequency } else { BasisKind::Grouped(heads) };
        let solution = solve(moments, basis, &sources.of(init), max)?;
        spectra.insert(name.clone(), solution.spectra);
        sets.push(BasisSet { name, heads_per_group: heads, init, layers: solution.layers });
    }
    let mut stored = Vec::new();
    for (profile, basis, widths) in asked {
        let widths = match widths {
            Some(widths) => vec![widths; model.layers],
            None => {
                let set = sets.iter().find(|s| s.name == basis).expect("every profile's basis was made");
                let Some(cskv @ Cskv { size: Size::Budget(budget), .. }) = &profile.cskv else { unreachable!("shares have widths") };
                allocator.as_mut().expect("a budget needs an allocator").allocate(cskv, *budget, &set.layers)?
            }
        };
        let mut profile = profile.clone();
        if let Some(cskv) = &mut profile.cskv {
            cskv.init = sets.iter().find(|s| s.name == basis).map(|s| s.init);
        }
        stored.push(StoredProfile { profile, basis, widths });
    }
    let kept = |s: &StoredProfile| EnergyKept {
        profile: s.profile.name.clone(),
        layers: spectra[&s.basis].iter().zip(&s.widths).map(|([k, v], w)| (k.kept(w.keys.rank), v.kept(w.values.rank))).collect(),
    };
    let energy = stored.iter().map(kept).collect();
    Ok(Calibrated { artifact: Artifact::new(base, model, sets, stored)?, energy })
}

impl Solution {
    /// Share of the energy of (keys, values) that the given ranks keep, per layer.
    pub fn energy_kept(&self, key_rank: usize, value_rank: usize) -> Vec<(f64, f64)> {
        self.spectra.iter().map(|[k, v]| (k.kept(key_rank), v.kept(value_rank))).collect()
    }
}

impl Spectrum {
    /// Share of the energy in the leading `rank` directions over all groups; 1 where there is no energy at all.
    /// Ranks beyond what was solved for count as what was.
    pub fn kept(&self, rank: usize) -> f64 {
        let r = rank / self.groups.len().max(1);
        let total: f64 = self.groups.iter().map(|(total, _)| total).sum();
        let kept: f64 = self.groups.iter().flat_map(|(_, energies)| energies.iter().take(r)).sum();
        if total > 0.0 { (kept / total).min(1.0) } else { 1.0 }
    }
}

impl fmt::Display for EnergyKept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keeps of the energy of keys/values, in percent by layer:", self.profile)?;
        self.layers.iter().try_for_each(|(k, v)| write!(f, " {:.1}/{:.1}", k.abs() * 100.0, v.abs() * 100.0))
    }
}
