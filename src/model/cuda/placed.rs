//! A model as it lies on a device, and what a device serves: weights in bf16, rope, and the maps of the profiles' layers. Nothing here changes
//! once it is there.

use std::sync::Arc;

use half::bf16;

use super::linear::{DeviceProjection, gates_by_library};
use crate::ids::PAGE_TOKENS;
use crate::model::config::ModelConfig;
use crate::model::decoder::ReadyProfile;
use crate::model::weights::{LayerWeights, ModelWeights, Projection, Weight};
use crate::ops::cuda::maps::{DeviceMaps, Unserved, serves};
use crate::ops::cuda::sample::WIDEST;
use crate::ops::cuda::seal::DownMaps;
use crate::ops::cuda::trial::{self, Becomes, Trial};
use crate::ops::cuda::{CudaError, Device, Memory};
use crate::ops::{Heads, LayerView, MatrixData, RopeTable};

/// Why a model or a profile cannot be served on a device.
#[derive(Debug, thiserror::Error)]
pub enum CudaRefusal {
    #[error("{0}")]
    Profile(#[from] Unserved),
    #[error("a CUDA device computes in bf16: give --dtype bfloat16, which rounds these weights, or --device cpu")]
    Dtype,
    #[error("a CUDA device takes widths that are multiples of 8, and this model has {what} of {width}: use --device cpu")]
    Width { what: &'static str, width: usize },
    #[error("a CUDA device takes vocabularies of up to {WIDEST}, and this model's is of {vocab}: use --device cpu")]
    Vocabulary { vocab: usize },
    #[error(transparent)]
    Device(#[from] CudaError),
}

/// A model on a device.
pub(super) struct DeviceModel {
    pub(super) config: &'static ModelConfig,
    pub(super) embed: Memory<u16>,
    head: Option<Memory<u16>>,
    pub(super) norm: Memory<f32>,
    pub(super) layers: Vec<DeviceLayer>,
    pub(super) cos: Memory<f32>,
    pub(super) sin: Memory<f32>,
    pub(super) profiles: Vec<ReadyProfile>,
    /// `[profiles][layers]`.
    pub(super) maps: Vec<Vec<ProfileMaps>>,
    pub(super) heads: Heads,
    /// Inner ranks of the linear layers of one input, at most.
    pub(super) ranks: usize,
}

impl DeviceModel {
    /// Takes weights, rope and the maps of `profiles` to the device.
    ///
    /// # Errors
    /// Where the model or a profile is not served on a device, or the device has no room.
    pub(super) fn new(
        device: &Arc<Device>,
        config: &'static ModelConfig,
        weights: &ModelWeights<'_>,
        rope: &RopeTable,
        profiles: Vec<ReadyProfile>,
    ) -> Result<Self, CudaRefusal> {
        check_model(config, weights)?;
        profiles.iter().try_for_each(|profile| check_profile(profile, config, device))?;
        let vector = |x: &Vec<f32>| device.upload(x);
        let layers = weights.layers.iter().map(|l| DeviceLayer::new(device, l)).collect::<Result<Vec<_>, CudaError>>()?;
        let heads = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim, scale: config.attention_scale() };
        let maps = |profile: &ReadyProfile| (0..config.layers).map(|layer| ProfileMaps::new(device, profile, layer, heads)).collect();
        Ok(DeviceModel {
            config,
            ranks: layers.iter().map(DeviceLayer::ranks).max().unwrap_or(0),
            embed: upload(device, &weights.embed)?,
            head: weights.untied_head.as_ref().map(|h| upload(device, h)).transpose()?,
            norm: vector(&weights.norm)?,
            layers,
            cos: device.upload(&rope.cos)?,
            sin: device.upload(&rope.sin)?,
            maps: profiles.iter().map(maps).collect::<Result<_, CudaError>>()?,
            profiles,
            heads,
        })
    }

    /// Whether gate and up of that many rows are apart before SiLU makes one of them, in some layer at least: of products of two matrices, and by
    /// the library.
    pub(super) fn gates_apart(&self, device: &Device, rows: usize) -> bool {
        self.ranks > 0 || self.layers.iter().any(|l| gates_by_library(device, (rows, self.config.hidden), [&l.gate, &l.up]))
    }

    /// The output head: `[vocab][hidden]`.
    pub(super) fn head(&self) -> &Memory<u16> {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}

/// The weights of one layer.
pub(super) struct DeviceLayer {
    pub(super) input_norm: Memory<f32>,
    pub(super) post_norm: Memory<f32>,
    pub(super) q: DeviceProjection,
    pub(super) k: DeviceProjection,
    pub(super) v: DeviceProjection,
    pub(super) o: DeviceProjection,
    pub(super) q_norm: Option<Memory<f32>>,
    pub(super) k_norm: Option<Memory<f32>>,
    pub(super) gate: DeviceProjection,
    pub(super) up: DeviceProjection,
    pub(super) down: DeviceProjection,
}

impl DeviceLayer {
    fn new(device: &Arc<Device>, l: &LayerWeights<'_>) -> Result<Self, CudaError> {
        let vector = |x: &Vec<f32>| device.upload(x);
        let projection = |p| DeviceProjection::new(device, p);
        Ok(DeviceLayer {
            input_norm: vector(&l.input_norm)?,
            post_norm: vector(&l.post_norm)?,
            q: projection(&l.q)?,
            k: projection(&l.k)?,
            v: projection(&l.v)?,
            o: projection(&l.o)?,
            q_norm: l.q_norm.as_ref().map(vector).transpose()?,
            k_norm: l.k_norm.as_ref().map(vector).transpose()?,
            gate: projection(&l.gate)?,
            up: projection(&l.up)?,
            down: projection(&l.down)?,
        })
    }

    /// Inner ranks of the linear layers of one input, at most.
    fn ranks(&self) -> usize {
        let [q, k, v, o, gate, up, down] =
            [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down].map(DeviceProjection::rank);
        [q + k + v, o, gate + up, down].into_iter().max().unwrap_or(0)
    }
}

/// The maps of one layer of one profile; none of `full`.
pub(super) struct ProfileMaps {
    pub(super) attend: Option<DeviceMaps>,
    pub(super) down: Option<DownMaps>,
}

impl ProfileMaps {
    fn new(device: &Arc<Device>, profile: &ReadyProfile, layer: usize, heads: Heads) -> Result<Self, CudaError> {
        let Some(c) = profile.compression.get(layer).filter(|_| !profile.layout.drops) else {
            return Ok(ProfileMaps { attend: None, down: None });
        };
        let view = LayerView { layer, layout: &profile.layout, compression: Some(c) };
        Ok(ProfileMaps { attend: Some(DeviceMaps::new(device, &view, heads)?), down: Some(DownMaps::new(device, c)?) })
    }
}

/// A matrix as bf16.
pub(super) fn upload(device: &Arc<Device>, w: &Weight<'_>) -> Result<Memory<u16>, CudaError> {
    match w.matrix().data {
        MatrixData::Bf16(data) => device.upload(bytemuck::cast_slice(data)),
        MatrixData::F32(data) => device.upload(&data.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>()),
    }
}

/// Whether a device serves a model.
///
/// # Errors
/// Where it does not, why.
pub fn check_model(config: &ModelConfig, weights: &ModelWeights<'_>) -> Result<(), CudaRefusal> {
    fn all<'l, 'w>(l: &'l LayerWeights<'w>) -> [&'l Projection<'w>; 7] {
        [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]
    }
    if config.vocab > WIDEST {
        return Err(CudaRefusal::Vocabulary { vocab: config.vocab });
    }
    let of_layer = |l: &LayerWeights<'_>| all(l).iter().any(|p| is_f32(&p.weight) || p.inner.as_ref().is_some_and(is_f32));
    if is_f32(&weights.embed) || is_f32(weights.head()) || weights.layers.iter().any(of_layer) {
        return Err(CudaRefusal::Dtype);
    }
    if ![64, 80, 96, 128].contains(&config.head_dim) {
        return Err(Unserved::HeadDim(config.head_dim).into());
    }
    for (what, width) in [("hidden states", config.hidden), ("an MLP", config.intermediate), ("query heads", config.q_channels())] {
        if !width.is_multiple_of(8) {
            return Err(CudaRefusal::Width { what, width });
        }
    }
    Ok(())
}

fn is_f32(w: &Weight<'_>) -> bool {
    matches!(w.matrix().data, MatrixData::F32(_))
}

/// Tries the device's own kernels on the shapes of a model, and the library where it was opened on the products of a layer of as many rows as
/// a step has; what does not hold is left out.
///
/// # Errors
/// Where the device fails.
pub fn try_kernels(device: &Arc<Device>, config: &ModelConfig, weights: &ModelWeights<'_>, step: usize) -> Result<Vec<Trial>, CudaError> {
    let heads = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim, scale: config.attention_scale() };
    let matrix = (config.intermediate.clamp(16, 4096), config.hidden);
    // What fills the device: on an H200 2048 rows, after 6336 positions.
    let rows = 128 * (device.processors / 8).max(1);
    // As many sealed pages are three blocks of 16 a processor, of few sequences.
    let pages = 48 * device.processors;
    let decoded = (pages.div_ceil(2048), pages.min(2048));
    let mut trials = trial::choose(device, &trial::Shape { heads, matrix, rows, history: 48 * device.processors, decoded })?;
    if let Some(layer) = weights.layers.first() {
        // Blocks of a prompt that goes layer by layer are of whole pages.
        trials.extend(trial::choose_library(device, &layer_products(config, layer), step.next_multiple_of(PAGE_TOKENS as usize))?);
    }
    Ok(trials)
}

/// The launches of products of a layer.
pub fn layer_products(config: &ModelConfig, layer: &LayerWeights<'_>) -> [trial::Products; 4] {
    let (hidden, q, kv, wide) = (config.hidden, config.q_channels(), config.kv_channels(), config.intermediate);
    let (plain, add, gated) = (Becomes::Outputs, Becomes::Sum, Becomes::Gated);
    let of = |what, inputs, becomes, outs: &[(usize, &Projection<'_>)]| trial::Products {
        what,
        inputs,
        becomes,
        outs: outs.iter().map(|(out, p)| (*out, p.bias.is_some())).collect(),
    };
    [
        of("queries, keys and values", hidden, plain, &[(q, &layer.q), (kv, &layer.k), (kv, &layer.v)]),
        of("outputs of attention", q, add, &[(hidden, &layer.o)]),
        of("gate and up", hidden, gated, &[(wide, &layer.gate), (wide, &layer.up)]),
        of("outputs of an MLP", wide, add, &[(hidden, &layer.down)]),
    ]
}

/// Whether a device serves a cache profile.
///
/// # Errors
/// Where it does not, why.
pub fn check_profile(profile: &ReadyProfile, config: &ModelConfig, device: &Device) -> Result<(), Unserved> {
    let shape = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim, scale: 1.0 };
    let view = |layer| LayerView { layer, layout: &profile.layout, compression: profile.compression.get(layer) };
    (0..profile.layout.layers).try_for_each(|layer| serves(&view(layer), shape, device.shared))
}
