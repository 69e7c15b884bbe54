//! What an adapter changes of a model, as the forward pass wants it: low-rank updates of linear layers, row gains, biases, and
//! tensors that stand in for the model's own. Whatever an adapter was on disk, this is what it becomes.
//!
//! A linear layer `y = W x + b` under a delta is, in this order,
//!
//! ```text
//! y  = gain * (W' x) + up (down x) + b + bias        W' is W, or what replaces it
//! ```
//!
//! with DoRA's magnitude over norm as `gain` (Liu et al. 2024, eq. 5; the gain of the update is folded into `up`).

use half::bf16;

use crate::model::config::ModelConfig;
use crate::model::weights::{Data, LayerWeights, Projection, Weight};
use crate::ops::{LowRank, MatrixData, UP_TILE};

/// A linear layer of a decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Site {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Site {
    /// In the order of a forward pass.
    pub const ALL: [Site; 7] = [Site::Q, Site::K, Site::V, Site::O, Site::Gate, Site::Up, Site::Down];

    /// Its name below the layer, as checkpoints spell it.
    pub fn name(self) -> &'static str {
        match self {
            Site::Q => "self_attn.q_proj",
            Site::K => "self_attn.k_proj",
            Site::V => "self_attn.v_proj",
            Site::O => "self_attn.o_proj",
            Site::Gate => "mlp.gate_proj",
            Site::Up => "mlp.up_proj",
            Site::Down => "mlp.down_proj",
        }
    }

    /// `(out, in)` in a model of this configuration.
    pub fn shape(self, c: &ModelConfig) -> (usize, usize) {
        match self {
            Site::Q => (c.q_channels(), c.hidden),
            Site::K | Site::V => (c.kv_channels(), c.hidden),
            Site::O => (c.hidden, c.q_channels()),
            Site::Gate | Site::Up => (c.intermediate, c.hidden),
            Site::Down => (c.hidden, c.intermediate),
        }
    }

    /// The model's own weights there.
    pub fn of<'w, 'a>(self, layer: &'w LayerWeights<'a>) -> &'w Projection<'a> {
        match self {
            Site::Q => &layer.q,
            Site::K => &layer.k,
            Site::V => &layer.v,
            Site::O => &layer.o,
            Site::Gate => &layer.gate,
            Site::Up => &layer.up,
            Site::Down => &layer.down,
        }
    }
}

/// A vector of norm weights.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Norm {
    Input,
    Post,
    Query,
    Key,
}

impl Norm {
    pub const ALL: [Norm; 4] = [Norm::Input, Norm::Post, Norm::Query, Norm::Key];

    /// Its name below the layer.
    pub fn name(self) -> &'static str {
        match self {
            Norm::Input => "input_layernorm",
            Norm::Post => "post_attention_layernorm",
            Norm::Query => "self_attn.q_norm",
            Norm::Key => "self_attn.k_norm",
        }
    }

    /// Its length; `None` where the model has no such norm.
    pub fn width(self, c: &ModelConfig) -> Option<usize> {
        match self {
            Norm::Input | Norm::Post => Some(c.hidden),
            Norm::Query | Norm::Key => c.qk_norm.then_some(c.head_dim),
        }
    }
}

/// In which type factors and replaced matrices are held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeldAs {
    F32,
    Bf16,
}

impl HeldAs {
    /// The type of these weights.
    pub fn of(weight: &Weight<'_>) -> HeldAs {
        match weight.data {
            Data::F32(_) => HeldAs::F32,
            Data::Bf16(_) => HeldAs::Bf16,
        }
    }

    /// A matrix `[out][in]` held so.
    pub fn matrix(self, (out_features, in_features): (usize, usize), values: &[f32]) -> Weight<'static> {
        let data = match self.hold(values.iter().copied()) {
            Held::F32(d) => Data::F32(d.into()),
            Held::Bf16(d) => Data::Bf16(d.into()),
        };
        Weight { out_features, in_features, data }
    }

    /// The first value that is not finite once it is held so.
    pub fn overflow(self, values: &[f32]) -> Option<f32> {
        let holds = |v: f32| match self {
            HeldAs::F32 => v.is_finite(),
            HeldAs::Bf16 => bf16::from_f32(v).is_finite(),
        };
        values.iter().copied().find(|v| !holds(*v))
    }

    fn hold(self, values: impl Iterator<Item = f32>) -> Held {
        match self {
            HeldAs::F32 => Held::F32(exact(values.collect())),
            HeldAs::Bf16 => Held::Bf16(exact(values.map(bf16::from_f32).collect())),
        }
    }
}

/// Memory is counted by length.
fn exact<T>(mut values: Vec<T>) -> Vec<T> {
    values.shrink_to_fit();
    values
}

/// Elements of a factor.
#[derive(Clone, Debug, PartialEq)]
enum Held {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Held {
    fn data(&self) -> MatrixData<'_> {
        match self {
            Held::F32(d) => MatrixData::F32(d),
            Held::Bf16(d) => MatrixData::Bf16(d),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Held::F32(d) => size_of_val(&d[..]),
            Held::Bf16(d) => size_of_val(&d[..]),
        }
    }
}

/// An owned [`LowRank`].
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    rank: usize,
    in_features: usize,
    out_features: usize,
    down: Held,
    up: Held,
}

impl Factors {
    /// From `down: [rank][in]` and `up: [out][rank]`, the scale folded into either.
    pub fn new((down, up): (&[f32], &[f32]), rank: usize, held: HeldAs) -> Factors {
        let (in_features, out_features) = (down.len() / rank, up.len() / rank);
        assert!(down.len() == rank * in_features && up.len() == out_features * rank, "factors are not of rank {rank}");
        let mut tiled = vec![0.0; out_features.div_ceil(UP_TILE) * rank * UP_TILE];
        for (rows, tile) in up.chunks(UP_TILE * rank).zip(tiled.chunks_exact_mut(UP_TILE * rank)) {
            for (c, row) in rows.chunks_exact(rank).enumerate() {
                row.iter().enumerate().for_each(|(j, v)| tile[j * UP_TILE + c] = *v);
            }
        }
        let up = held.hold(tiled.into_iter());
        Factors { rank, in_features, out_features, down: held.hold(down.iter().copied()), up }
    }

    /// As operations take it.
    pub fn low_rank(&self) -> LowRank<'_> {
        let Factors { rank, in_features, out_features, ref down, ref up } = *self;
        LowRank { rank, in_features, out_features, down: down.data(), up: up.data() }
    }

    /// Columns of `down`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    fn bytes(&self) -> usize {
        self.down.bytes() + self.up.bytes()
    }
}

/// What becomes of one linear layer. At least one part is there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteDelta {
    /// Weights and bias that stand in for the model's own.
    pub replace: Option<Projection<'static>>,
    pub factors: Option<Factors>,
    /// `[out]`, on what the weights make of the input, before the bias.
    pub gain: Option<Vec<f32>>,
    /// `[out]`, added to the bias.
    pub bias: Option<Vec<f32>>,
}

impl SiteDelta {
    fn bytes(&self) -> usize {
        let floats = [&self.gain, &self.bias, &self.replace.as_ref().and_then(|p| p.bias.clone())]
            .into_iter()
            .flatten()
            .map(|v| size_of_val(&v[..]))
            .sum::<usize>();
        floats + self.replace.as_ref().map_or(0, |p| p.weight.bytes()) + self.factors.as_ref().map_or(0, Factors::bytes)
    }
}

/// What becomes of one decoder layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerDelta {
    /// By [`Site`].
    pub sites: [Option<Box<SiteDelta>>; 7],
    /// By [`Norm`]: weights that stand in for the model's own.
    pub norms: [Option<Vec<f32>>; 4],
}

/// What becomes of the embedding of a token: `gain * E[token] + down[token] up`, where `E` is the model's own or what replaces it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EmbedDelta {
    pub replace: Option<Weight<'static>>,
    pub factors: Option<EmbedFactors>,
    /// `[hidden]`.
    pub gain: Option<Vec<f32>>,
}

/// The low-rank part of an [`EmbedDelta`].
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedFactors {
    rank: usize,
    /// `[vocab][rank]`.
    down: Held,
    /// `[rank][hidden]`.
    up: Vec<f32>,
}

impl EmbedFactors {
    /// From `down: [rank][vocab]` and `up: [hidden][rank]`, the scale folded into either.
    pub fn new((down, up): (&[f32], &[f32]), rank: usize, held: HeldAs) -> EmbedFactors {
        let (vocab, hidden) = (down.len() / rank, up.len() / rank);
        let down = held.hold((0..vocab).flat_map(|t| (0..rank).map(move |j| down[j * vocab + t])));
        let up = (0..rank).flat_map(|j| (0..hidden).map(move |h| up[h * rank + j])).collect();
        EmbedFactors { rank, down, up }
    }

    /// The rank, `down: [vocab][rank]` and `up: [rank][hidden]`.
    pub fn parts(&self) -> (usize, MatrixData<'_>, &[f32]) {
        (self.rank, self.down.data(), &self.up)
    }

    /// Adds what `token` gets to `x: [hidden]`.
    pub fn add(&self, token: usize, x: &mut [f32]) {
        let down = self.down.data();
        for (j, up) in self.up.chunks_exact(x.len()).enumerate() {
            let t = down.at(token * self.rank + j);
            x.iter_mut().zip(up).for_each(|(x, u)| *x += t * u);
        }
    }
}

impl EmbedDelta {
    fn bytes(&self) -> usize {
        let factors = self.factors.as_ref().map_or(0, |f| f.down.bytes() + size_of_val(&f.up[..]));
        let gain = self.gain.as_ref().map_or(0, |g| size_of_val(&g[..]));
        factors + gain + self.replace.as_ref().map_or(0, Weight::bytes)
    }
}

/// Everything an adapter changes of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// One per layer of the model.
    pub layers: Vec<LayerDelta>,
    pub embed: Option<EmbedDelta>,
    /// The final norm's weights.
    pub norm: Option<Vec<f32>>,
    /// The output head; where it is the embedding, the embedding as a token's vector keeps its own.
    pub head: Option<SiteDelta>,
}

impl Delta {
    /// One that changes nothing of a model of so many layers.
    pub fn new(layers: usize) -> Delta {
        Delta { layers: vec![LayerDelta::default(); layers], ..Delta::default() }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let floats = |v: &Option<Vec<f32>>| v.as_ref().map_or(0, |v| size_of_val(&v[..]));
        let layer = |l: &LayerDelta| l.sites.iter().flatten().map(|s| s.bytes()).sum::<usize>() + l.norms.iter().map(floats).sum::<usize>();
        let ends = self.embed.as_ref().map_or(0, EmbedDelta::bytes) + floats(&self.norm) + self.head.as_ref().map_or(0, SiteDelta::bytes);
        (self.layers.iter().map(layer).sum::<usize>() + ends) as u64
    }

    /// Largest rank of any update.
    pub fn rank(&self) -> usize {
        let sites = self.layers.iter().flat_map(|l| l.sites.iter().flatten().map(|s| &**s)).chain(&self.head);
        let linear = sites.filter_map(|s| s.factors.as_ref()).map(Factors::rank).max().unwrap_or(0);
        linear.max(self.embed.as_ref().and_then(|e| e.factors.as_ref()).map_or(0, |f| f.rank))
    }

    /// What it makes of a linear layer of layer `layer`.
    pub fn site(&self, layer: usize, site: Site) -> Option<&SiteDelta> {
        self.layers[layer].sites[site as usize].as_deref()
    }

    /// What stands in for a norm of layer `layer`.
    pub fn layer_norm(&self, layer: usize, norm: Norm) -> Option<&[f32]> {
        self.layers[layer].norms[norm as usize].as_deref()
    }
}
