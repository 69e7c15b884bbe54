//! Bytes where they buy most: how a budget is spread over layers, over keys and values, and over ranks and bits.
//!
//! Every choice is tried on a sample of the calibration text: what the attention of a layer gives, after the output projection, when
//! only that part of it is compressed, against what it gives exactly; as a share of the energy of the residual stream it is added to,
//! so that layers compare. Of each part's choices the lower convex hull of error over bytes is kept, and the steps along all hulls
//! are taken in the order of what they save for a byte: the best of all spreads of hull points (Shoham and Gersho 1988).
//!
//! On the demo model this foretells the divergence of the answers better than the energy of what is dropped does, by far: one
//! of its layers does all of the retrieval, which no spectrum shows.

use std::sync::atomic::{AtomicUsize, Ordering};

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::CalibrateError;
use crate::compress::seen::{self, Coding};
use crate::compress::{KeyMap, LayerBasis, LayerCompression, Projection};
use crate::kv::layout::{Cskv, Quantiser, SealedLayer, Width, Widths};
use crate::model::config::ModelConfig;
use crate::ops::{Matrix, MatrixData, Ops, RopeTable};

/// Queries of a text that errors are measured at: evenly over its second half, which has a past worth keeping.
const QUERIES: usize = 96;

/// Sixty-fourths of the channels that are tried as ranks.
const SHARES: [usize; 14] = [0, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64];

/// What layers made of some calibration texts.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// Texts begin to be taken in while there are fewer tokens.
    limit: usize,
    /// Whether the text that is going on is one of the sample.
    open: bool,
    layers: Vec<Vec<Text>>,
}

/// One layer's part in one text.
#[derive(Clone, Debug, Default)]
struct Text {
    /// Before rope; `[n][kv_channels]`, as are the values.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Before rope; `[n][q_channels]`.
    queries: Vec<f32>,
    /// Sum over tokens of the squares of the residual stream before the layer.
    energy: f64,
}

impl Sample {
    pub(super) fn new(model: &ModelConfig) -> Self {
        // A quarter of a gibibyte, but some text of every model.
        let each = model.layers * (2 * model.kv_channels() + model.heads * model.head_dim);
        Sample { limit: ((64 << 20) / each.max(1)).clamp(1024, 4096), open: false, layers: vec![Vec::new(); model.layers] }
    }

    pub(super) fn inputs(&mut self, layer: usize, residual: &[f32]) {
        if let Some(text) = self.layers[layer].last_mut().filter(|_| self.open) {
            text.energy += residual.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        }
    }

    /// A text begins: hear of it before anything of its first layer.
    pub(super) fn begin(&mut self, channels: usize) {
        let so_far: usize = self.layers.first().map_or(0, |texts| texts.iter().map(|t| t.keys.len()).sum::<usize>() / channels);
        self.open = so_far < self.limit;
        if self.open {
            self.layers.iter_mut().for_each(|texts| texts.push(Text::default()));
        }
    }

    pub(super) fn add(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        if let Some(text) = self.layers[layer].last_mut().filter(|_| self.open) {
            text.keys.extend_from_slice(keys);
            text.values.extend_from_slice(values);
        }
    }

    pub(super) fn queries(&mut self, layer: usize, queries: &[f32]) {
        if let Some(text) = self.layers[layer].last_mut().filter(|_| self.open) {
            text.queries.extend_from_slice(queries);
        }
    }
}

/// What it takes to try choices.
#[derive(Clone, Copy)]
pub struct Trial<'a> {
    pub model: &'a ModelConfig,
    pub ops: &'a dyn Ops,
    pub rope: &'a RopeTable,
    /// The output projection of each layer.
    pub outputs: &'a [Matrix<'a>],
    /// Hears how many choices are tried, of how many.
    pub tried: &'a (dyn Fn(usize, usize) + Sync),
}

/// A choice for one part of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub width: Width,
    /// Of a page.
    pub bytes: usize,
    pub error: f64,
}

/// The hull of the choices: rising in bytes, falling in error, each step saving less for a byte than the one before.
pub fn hull(mut choices: Vec<Choice>) -> Vec<Choice> {
    choices.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.error.total_cmp(&b.error)));
    let mut hull: Vec<Choice> = Vec::new();
    for c in choices {
        if hull.last().is_some_and(|last| c.error >= last.error || c.bytes == last.bytes) {
            continue;
        }
        let slope = |a: &Choice, b: &Choice| (a.error - b.error) / (b.bytes - a.bytes) as f64;
        while let [.., a, b] = hull[..]
            && slope(&a, &b) <= slope(&b, &c)
        {
            hull.pop();
        }
        hull.push(c);
    }
    hull
}

/// The choice on each hull that spreads `bytes` of a page best: steps in the order of what they save for a byte, as long as they fit.
pub fn spread(hulls: &[Vec<Choice>], bytes: usize) -> Vec<Choice> {
    let mut at = vec![0; hulls.len()];
    let mut open = vec![true; hulls.len()];
    let mut left = bytes.saturating_sub(hulls.iter().map(|h| h[0].bytes).sum());
    loop {
        let saving = |i: usize| {
            let (a, b) = (hulls[i][at[i]], hulls[i].get(at[i] + 1)?);
            Some((a.error - b.error) / (b.bytes - a.bytes) as f64)
        };
        let best = (0..hulls.len()).filter(|&i| open[i]).filter_map(|i| Some((i, saving(i)?))).max_by(|a, b| a.1.total_cmp(&b.1));
        let Some((i, _)) = best else { return hulls.iter().zip(at).map(|(h, i)| h[i]).collect() };
        let step = hulls[i][at[i] + 1].bytes - hulls[i][at[i]].bytes;
        if step <= left {
            (at[i], left) = (at[i] + 1, left - step);
        } else {
            open[i] = false;
        }
    }
}

/// The hulls of keys and values of every layer, in turn, for bases as wide as there are channels.
///
/// Cost: for each layer, some fifty choices of keys and as many of values, each an attention of 96 queries a text.
pub(super) fn hulls(sample: &Sample, trial: &Trial<'_>, cskv: &Cskv, bases: &[LayerBasis]) -> Result<Vec<Vec<Choice>>, CalibrateError> {
    let window = measured_window(sample, trial.model.kv_channels(), cskv)?;
    let widths = [false, true].map(|values| (values, choices(trial.model, cskv, values)));
    let (all, done) = (bases.len() * widths.iter().map(|w| w.1.len()).sum::<usize>(), AtomicUsize::new(0));
    let hulls = (0..bases.len()).into_par_iter().map(|i| -> Result<Vec<Vec<Choice>>, CalibrateError> {
        let layer = Layer::new(sample, trial, (cskv, window), i);
        let part = |(values, widths): &(bool, Vec<Width>)| {
            let choices = widths.iter().map(|&width| {
                let choice = layer.choice(&bases[i], width, *values);
                (trial.tried)(done.fetch_add(1, Ordering::Relaxed) + 1, all);
                choice
            });
            Ok(hull(choices.collect::<Result<_, _>>()?))
        };
        widths.iter().map(part).collect()
    });
    let hulls: Vec<Vec<Vec<Choice>>> = hulls.collect::<Result<_, _>>()?;
    Ok(hulls.into_iter().flatten().collect())
}

/// The widths that are tried for keys, or for values.
fn choices(model: &ModelConfig, cskv: &Cskv, values: bool) -> Vec<Width> {
    let channels = model.kv_channels();
    let blocks = cskv.basis.blocks(model.kv_heads);
    // Whole quads in every block, and pairs of a frequency basis.
    let mut ranks: Vec<usize> = SHARES.iter().map(|s| (s * channels / 64).next_multiple_of(4 * blocks).min(channels)).collect();
    ranks.dedup();
    let quantiser = if values { cskv.value_quantiser } else { cskv.key_quantiser };
    let bits: &[u32] = if quantiser == Quantiser::Hadamard { &[4, 3, 2] } else { &[8, 4, 3, 2] };
    let bits = |rank| if rank == 0 { &bits[..1] } else { bits };
    ranks.into_iter().flat_map(|rank| bits(rank).iter().map(move |&bits| Width { rank, bits })).collect()
}

/// The widths of each layer that keep most within `budget` bytes of a position.
pub(super) fn widths(hulls: &[Vec<Choice>], budget: u32, trial: &Trial<'_>, cskv: &Cskv) -> Vec<Widths> {
    // Sections and pages are rounded up: what that takes is taken from what is spread.
    let page = budget as usize * 64;
    let blocks = cskv.basis.blocks(trial.model.kv_heads);
    let mut target = page;
    loop {
        let chosen = spread(hulls, target);
        let widths: Vec<Widths> = chosen.chunks_exact(2).map(|c| Widths { keys: c[0].width, values: c[1].width }).collect();
        let whole = SealedLayer::page_bytes(&widths, [cskv.key_quantiser, cskv.value_quantiser], blocks);
        if whole <= page || target == 0 {
            return widths;
        }
        target = target.saturating_sub((whole - page).max(64));
    }
}

/// The window that queries of the sample have: that of the profile, or a quarter of the longest text where that is less. No query of a
/// text within its window would meet anything compressed, so nothing would cost anything, and nothing would be kept.
///
/// # Errors
/// Where nothing of any text is beyond it and the sinks.
fn measured_window(sample: &Sample, channels: usize, cskv: &Cskv) -> Result<usize, CalibrateError> {
    let longest = sample.layers.iter().flatten().map(|t| t.keys.len() / channels).max().unwrap_or(0);
    let window = (cskv.window as usize).min(longest / 4);
    match longest > cskv.sinks as usize + window {
        true => Ok(window),
        false => Err(CalibrateError::TooShort { longest, sinks: cskv.sinks }),
    }
}

/// One layer of the sample, as its choices are tried on it.
struct Layer<'a> {
    trial: &'a Trial<'a>,
    cskv: &'a Cskv,
    /// See [`measured_window`].
    window: usize,
    texts: Vec<Turned<'a>>,
    energy: f64,
    /// `[q_channels][hidden]`.
    output: Mat<f32>,
}

/// A text, its keys and chosen queries turned.
struct Turned<'a> {
    text: &'a Text,
    positions: Vec<u32>,
    keys: Vec<f32>,
    /// Positions of the queries, and the queries.
    at: Vec<usize>,
    queries: Vec<f32>,
    /// Per query head, `[queries][n]`: products with the exact keys, and their softmax.
    products: Vec<Mat<f32>>,
    exact: Vec<Mat<f32>>,
}

impl<'a> Layer<'a> {
    fn new(sample: &'a Sample, trial: &'a Trial<'a>, (cskv, window): (&'a Cskv, usize), layer: usize) -> Self {
        let (model, c) = (trial.model, trial.model.kv_channels());
        let q = model.heads * model.head_dim;
        let texts = &sample.layers[layer];
        let tokens: usize = texts.iter().map(|t| t.keys.len() / c).sum();
        let energy = texts.iter().map(|t| t.energy).sum::<f64>() / tokens.max(1) as f64;
        let turned = |text: &'a Text| {
            let n = text.keys.len() / c;
            let positions: Vec<u32> = (0..n as u32).collect();
            let mut keys = text.keys.clone();
            trial.ops.rope(&mut keys, model.kv_heads, trial.rope, &positions);
            let every = (n / 2).div_ceil(QUERIES).max(1);
            let at: Vec<usize> = (n / 2..n).rev().step_by(every).collect();
            let mut queries: Vec<f32> = at.iter().flat_map(|&i| text.queries[i * q..(i + 1) * q].iter().copied()).collect();
            let places: Vec<u32> = at.iter().map(|&i| i as u32).collect();
            trial.ops.rope(&mut queries, model.heads, trial.rope, &places);
            Turned { text, positions, keys, at, queries, products: Vec::new(), exact: Vec::new() }
        };
        let w = trial.outputs[layer];
        let element = |r: usize, i: usize| match w.data {
            MatrixData::F32(data) => data[r * w.in_features + i],
            MatrixData::Bf16(data) => data[r * w.in_features + i].to_f32(),
        };
        let output = Mat::from_fn(w.in_features, w.out_features, |i, r| element(r, i));
        let mut layer = Layer { trial, cskv, window, texts: texts.iter().map(turned).collect(), energy, output };
        for i in 0..layer.texts.len() {
            layer.texts[i].products = layer.products(&layer.texts[i], &layer.texts[i].keys);
            layer.texts[i].exact = layer.softmax(&layer.texts[i], layer.texts[i].products.clone());
        }
        layer
    }

    /// Scaled products of the queries of a text with `keys` (turned), `[queries][n]` for each query head.
    fn products(&self, t: &Turned<'_>, keys: &[f32]) -> Vec<Mat<f32>> {
        let model = self.trial.model;
        let (d, heads, c) = (model.head_dim, model.heads, model.kv_channels());
        let head = |h: usize| {
            let kv = h * model.kv_heads / heads;
            let mut s = Mat::<f32>::zeros(t.at.len(), t.positions.len());
            let (queries, keys) = (rows(&t.queries, heads * d, h * d, d), rows(keys, c, kv * d, d));
            matmul(s.as_mut(), Accum::Replace, queries, keys.transpose(), model.attention_scale(), Par::Seq);
            s
        };
        (0..heads).map(head).collect()
    }

    /// Their softmax, where positions that are not sealed to a query keep their exact products.
    fn softmax(&self, t: &Turned<'_>, mut products: Vec<Mat<f32>>) -> Vec<Mat<f32>> {
        for (s, own) in products.iter_mut().zip(&t.products) {
            for (i, &at) in t.at.iter().enumerate() {
                let mut top = f32::NEG_INFINITY;
                for j in 0..=at {
                    if !self.is_sealed(at, j) {
                        s[(i, j)] = own[(i, j)];
                    }
                    top = top.max(s[(i, j)]);
                }
                let mut sum = 0.0;
                for j in 0..t.positions.len() {
                    s[(i, j)] = if j <= at { (s[(i, j)] - top).exp() } else { 0.0 };
                    sum += s[(i, j)];
                }
                (0..=at).for_each(|j| s[(i, j)] /= sum);
            }
        }
        products
    }

    /// Whether the query at `at` meets position `j` compressed.
    fn is_sealed(&self, at: usize, j: usize) -> bool {
        j >= self.cskv.sinks as usize && j + self.window < at + 1
    }

    fn choice(&self, basis: &LayerBasis, width: Width, values: bool) -> Result<Choice, CalibrateError> {
        let quantiser = if values { self.cskv.value_quantiser } else { self.cskv.key_quantiser };
        let blocks = self.cskv.basis.blocks(self.trial.model.kv_heads);
        let bytes = SealedLayer::part_bytes(width, quantiser, blocks, values);
        Ok(Choice { width, bytes, error: self.error(basis, width, values)? })
    }

    /// Mean over queries of the squared error of the layer's attention, over the mean energy of the residual stream.
    fn error(&self, basis: &LayerBasis, width: Width, values: bool) -> Result<f64, CalibrateError> {
        let model = self.trial.model;
        let (d, c) = (model.head_dim, model.kv_channels());
        let other = Width { rank: 0, ..width };
        let (keys, vals) = if values { (other, width) } else { (width, other) };
        let maps = LayerCompression {
            keys: basis.keys.map(keys.rank).map_err(CalibrateError::Ranks)?,
            values: basis.values.projection(vals.rank).map_err(CalibrateError::Ranks)?,
        };
        let maps = maps.for_quantisers(self.cskv);
        let blocks = self.cskv.basis.blocks(model.kv_heads);
        let (mut sum, mut queries) = (0.0, 0);
        for t in &self.texts {
            let n = t.positions.len();
            let mut error = Mat::<f32>::zeros(t.at.len(), model.heads * d);
            let add = |error: MatMut<'_, f32>, weights: MatRef<'_, f32>, values: &[f32], kv: usize| {
                matmul(error, Accum::Replace, weights, rows(values, c, kv * d, d), 1.0, Par::Seq);
            };
            if values {
                let coding = Coding { width, quantiser: self.cskv.value_quantiser, blocks };
                let mut latents = project(&maps.values, &t.text.values);
                seen::values(&mut latents, coding);
                let mut off = rebuild(&maps.values, &latents, n);
                off.iter_mut().zip(&t.text.values).for_each(|(x, v)| *x -= v);
                for (h, exact) in t.exact.iter().enumerate() {
                    // Of the exact weights, those on sealed positions.
                    let mut weights = exact.clone();
                    for (i, &at) in t.at.iter().enumerate() {
                        (0..n).filter(|&j| !self.is_sealed(at, j)).for_each(|j| weights[(i, j)] = 0.0);
                    }
                    add(error.as_mut().subcols_mut(h * d, d), weights.as_ref(), &off, h * model.kv_heads / model.heads);
                }
            } else {
                let coding = Coding { width, quantiser: self.cskv.key_quantiser, blocks };
                let keys = self.keys(&maps.keys, t, coding);
                for (h, (mut weights, exact)) in self.softmax(t, self.products(t, &keys)).into_iter().zip(&t.exact).enumerate() {
                    weights -= exact;
                    add(error.as_mut().subcols_mut(h * d, d), weights.as_ref(), &t.text.values, h * model.kv_heads / model.heads);
                }
            }
            sum += (&error * &self.output).squared_norm_l2() as f64;
            queries += t.at.len();
        }
        Ok(sum / queries.max(1) as f64 / self.energy.max(f64::MIN_POSITIVE))
    }

    /// Turned keys as a reader sees them.
    fn keys(&self, map: &KeyMap, t: &Turned<'_>, coding: Coding) -> Vec<f32> {
        let (model, sinks) = (self.trial.model, self.cskv.sinks as usize);
        match map {
            KeyMap::Channels(p) => {
                let mut latents = project(p, &t.text.keys);
                seen::keys(&mut latents, coding, 0, sinks);
                let mut keys = rebuild(p, &latents, t.positions.len());
                self.trial.ops.rope(&mut keys, model.kv_heads, self.trial.rope, &t.positions);
                keys
            }
            KeyMap::Frequencies(map) => {
                let mut latents: Vec<f32> = t.keys.chunks_exact(model.kv_channels()).flat_map(|k| map.latent(k)).collect();
                seen::keys(&mut latents, coding, 0, sinks);
                match coding.width.rank {
                    0 => vec![0.0; t.keys.len()],
                    rank => latents.chunks_exact(rank).flat_map(|l| map.key(l)).collect(),
                }
            }
        }
    }
}

/// Columns `[first, first + n)` of `[rows][stride]`.
fn rows(data: &[f32], stride: usize, first: usize, n: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(data, data.len() / stride, stride).subcols(first, n)
}

/// Latents `[n][rank]` of `[n][channels]`.
fn project(p: &Projection, x: &[f32]) -> Vec<f32> {
    let rank = p.rank();
    let (n, channels) = (x.len() / p.channels(), p.channels());
    let mut latents = vec![0.0; n * rank];
    let mut centred = x.to_vec();
    centred.chunks_exact_mut(channels).for_each(|x| x.iter_mut().zip(&p.mean).for_each(|(x, mean)| *x -= mean));
    for g in p.groups.iter().filter(|g| !g.ranks.is_empty()) {
        let to = MatMut::from_row_major_slice_mut(&mut latents, n, rank).subcols_mut(g.ranks.start, g.ranks.len());
        let from = rows(&centred, channels, g.channels.start, g.channels.len());
        matmul(to, Accum::Replace, from, rows(&g.down, g.ranks.len(), 0, g.ranks.len()), 1.0, Par::Seq);
    }
    latents
}

/// `[n][channels]` of latents `[n][rank]`.
fn rebuild(p: &Projection, latents: &[f32], n: usize) -> Vec<f32> {
    let rank = p.rank();
    let mut x: Vec<f32> = (0..n).flat_map(|_| p.mean.iter().copied()).collect();
    for g in p.groups.iter().filter(|g| !g.ranks.is_empty()) {
        let to = MatMut::from_row_major_slice_mut(&mut x, n, p.channels()).subcols_mut(g.channels.start, g.channels.len());
        let from = rows(latents, rank, g.ranks.start, g.ranks.len());
        matmul(to, Accum::Add, from, rows(&g.up, g.channels.len(), 0, g.channels.len()), 1.0, Par::Seq);
    }
    x
}
