//! The tensors of a checkpoint by their place in the decoder, typed.

use std::borrow::Cow;
use std::collections::BTreeMap;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::model::checkpoint::{Checkpoint, TensorView, cast};
use crate::model::config::ModelConfig;
use crate::model::delta::Site;
use crate::model::header::Dtype;
use crate::ops::{Matrix, MatrixData};

pub(super) const EMBED: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";
const FINAL_NORM: &str = "model.norm.weight";

/// `--dtype`: in which type matrices are held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LoadDtype {
    /// As stored; F16 becomes F32, which is exact.
    #[default]
    Auto,
    /// Rounded to nearest even where stored otherwise.
    Bf16,
    /// Widened where stored otherwise.
    F32,
}

/// Elements of a matrix, borrowed from the checkpoint where possible.
#[derive(Clone, Debug, PartialEq)]
pub enum Data<'a> {
    F32(Cow<'a, [f32]>),
    Bf16(Cow<'a, [bf16]>),
}

/// A row-major matrix `[out][in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight<'a> {
    pub out_features: usize,
    pub in_features: usize,
    pub data: Data<'a>,
}

impl Weight<'_> {
    /// What [`crate::ops`] multiplies by.
    pub fn matrix(&self) -> Matrix<'_> {
        let data = match &self.data {
            Data::F32(d) => MatrixData::F32(d),
            Data::Bf16(d) => MatrixData::Bf16(d),
        };
        Matrix { out_features: self.out_features, in_features: self.in_features, data }
    }

    /// Row `i`, widened into `out` of `in_features` elements: the look-up of an embedding.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        let range = i * self.in_features..(i + 1) * self.in_features;
        match &self.data {
            Data::F32(d) => out.copy_from_slice(&d[range]),
            Data::Bf16(d) => d[range].iter().zip(out).for_each(|(x, y)| *y = x.to_f32()),
        }
    }

    /// All elements, widened.
    pub fn floats(&self) -> Vec<f32> {
        match &self.data {
            Data::F32(d) => d.to_vec(),
            Data::Bf16(d) => d.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(d) => size_of_val(&**d),
            Data::Bf16(d) => size_of_val(&**d),
        }
    }

    /// Whether the elements lie in the checkpoint itself.
    pub fn is_borrowed(&self) -> bool {
        matches!(&self.data, Data::F32(Cow::Borrowed(_)) | Data::Bf16(Cow::Borrowed(_)))
    }
}

/// A matrix with its bias of `out_features` elements, if the model has one.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection<'a> {
    pub weight: Weight<'a>,
    /// Of a matrix that is stored and used as a product `weight inner`.
    pub inner: Option<Weight<'a>>,
    pub bias: Option<Vec<f32>>,
}

impl<'a> Projection<'a> {
    /// The whole matrix, multiplied out where it is a product: `2 * out * in * rank` FLOPs.
    pub fn dense(&self) -> Cow<'_, Weight<'a>> {
        let Some(inner) = &self.inner else { return Cow::Borrowed(&self.weight) };
        let product = multiplied(&self.weight.floats(), &inner.floats(), self.weight.in_features);
        let data = match self.weight.data {
            Data::F32(_) => Data::F32(Cow::Owned(product)),
            Data::Bf16(_) => Data::Bf16(Cow::Owned(product.into_iter().map(bf16::from_f32).collect())),
        };
        Cow::Owned(Weight { out_features: self.weight.out_features, in_features: inner.in_features, data })
    }
}

/// `left right` of `left: [out][k]` and `right: [k][in]`.
fn multiplied(left: &[f32], right: &[f32], k: usize) -> Vec<f32> {
    let (out, inputs) = (left.len() / k, right.len() / k);
    let mut product = vec![0.0; out * inputs];
    product.par_chunks_mut(inputs).zip(left.par_chunks(k)).for_each(|(row, left)| {
        for (l, right) in left.iter().zip(right.chunks_exact(inputs)) {
            row.iter_mut().zip(right).for_each(|(p, r)| *p += l * r);
        }
    });
    product
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerWeights<'a> {
    /// `[hidden]`, before attention.
    pub input_norm: Vec<f32>,
    /// `[hidden]`, before the MLP.
    pub post_norm: Vec<f32>,
    pub q: Projection<'a>,
    pub k: Projection<'a>,
    pub v: Projection<'a>,
    pub o: Projection<'a>,
    /// `[head_dim]`, on each head of q and of k before rope.
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub gate: Projection<'a>,
    pub up: Projection<'a>,
    pub down: Projection<'a>,
}

/// All weights of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelWeights<'a> {
    /// `[vocab][hidden]`.
    pub embed: Weight<'a>,
    pub layers: Vec<LayerWeights<'a>>,
    /// `[hidden]`.
    pub norm: Vec<f32>,
    /// `[vocab][hidden]`; `None` when the embedding is the head.
    pub untied_head: Option<Weight<'a>>,
}

impl<'a> ModelWeights<'a> {
    /// Bytes of matrices that lie in the checkpoint itself: pages of its files, that every step reads.
    pub fn mapped_bytes(&self) -> u64 {
        self.matrices().filter(|w| w.is_borrowed()).map(|w| w.bytes() as u64).sum()
    }

    /// Bytes of all weights as they are held, which is not always as they are stored; mapped or not.
    pub fn bytes(&self) -> u64 {
        let norms = |l: &LayerWeights<'_>| {
            [Some(&l.input_norm), Some(&l.post_norm), l.q_norm.as_ref(), l.k_norm.as_ref()]
                .into_iter()
                .flatten()
                .map(Vec::len)
                .sum::<usize>()
        };
        let biases = self.projections().filter_map(|p| p.bias.as_ref()).map(Vec::len).sum::<usize>();
        let floats = self.norm.len() + biases + self.layers.iter().map(norms).sum::<usize>();
        self.matrices().map(|w| w.bytes() as u64).sum::<u64>() + (floats * size_of::<f32>()) as u64
    }

    fn projections(&self) -> impl Iterator<Item = &Projection<'a>> {
        self.layers.iter().flat_map(|l| Site::ALL.map(|site| site.of(l)))
    }

    fn matrices(&self) -> impl Iterator<Item = &Weight<'a>> {
        let linear = self.projections().flat_map(|p| std::iter::once(&p.weight).chain(&p.inner));
        linear.chain([&self.embed]).chain(&self.untied_head)
    }

    /// The output head, tied or not.
    pub fn head(&self) -> &Weight<'a> {
        self.untied_head.as_ref().unwrap_or(&self.embed)
    }
}

/// How a linear layer is stored: names below the layer's own, of the part the output comes from and of the one the input passes
/// first.
struct Form {
    outer: &'static str,
    inner: &'static str,
    bias: &'static str,
}

/// WeLore (Jaiswal et al. 2024): `W = U V`, where a layer's rank fell far enough; dense where not.
static WELORE: Form = Form { outer: "U.weight", inner: "V.weight", bias: "bias" };
/// Maestro (Horvath et al. 2024): two linear layers in a row. Ranks that training left without weight are still stored.
static MAESTRO: Form = Form { outer: "out_network.weight", inner: "in_network.weight", bias: "out_network.bias" };

/// The importance below which Maestro drops a rank: the product of the norms of its two sides.
const IMPORTANCE: f64 = 1e-5;

/// The shape of a stored tensor.
type Shapes<'s> = dyn Fn(&str) -> Option<&'s [usize]> + 's;

impl Form {
    /// The form the linear layer `path` is stored in; `None` for a plain matrix.
    fn of(path: &str, shapes: &Shapes<'_>) -> Option<&'static Form> {
        let is = |form: &&Form| [form.outer, form.inner].iter().any(|part| shapes(&format!("{path}.{part}")).is_some());
        [&WELORE, &MAESTRO].into_iter().find(|form| is(form) && shapes(&format!("{path}.weight")).is_none())
    }
}

/// Every tensor a model of this configuration has, with its shape; linear layers in the form they are stored in.
pub(super) fn expected(c: &ModelConfig, shapes: &Shapes<'_>) -> BTreeMap<String, Vec<usize>> {
    let mut out = BTreeMap::new();
    let mut want = |name: String, shape: &[usize]| {
        out.insert(name, shape.to_vec());
    };
    want(EMBED.to_owned(), &[c.vocab, c.hidden]);
    want(FINAL_NORM.to_owned(), &[c.hidden]);
    if !c.tied {
        want(HEAD.to_owned(), &[c.vocab, c.hidden]);
    }
    let (q, kv) = (c.q_channels(), c.kv_channels());
    for i in 0..c.layers {
        let name = |part: &str| format!("model.layers.{i}.{part}");
        want(name("input_layernorm.weight"), &[c.hidden]);
        want(name("post_attention_layernorm.weight"), &[c.hidden]);
        if c.qk_norm {
            want(name("self_attn.q_norm.weight"), &[c.head_dim]);
            want(name("self_attn.k_norm.weight"), &[c.head_dim]);
        }
        let mut projection = |part: &str, to: usize, from: usize, bias: bool| {
            let path = name(part);
            let Some(form) = Form::of(&path, shapes) else {
                want(format!("{path}.weight"), &[to, from]);
                if bias {
                    want(format!("{path}.bias"), &[to]);
                }
                return;
            };
            let (outer, inner, own) = (format!("{path}.{}", form.outer), format!("{path}.{}", form.inner), format!("{path}.{}", form.bias));
            // Either side tells the rank; that the other agrees is checked with all shapes.
            let rank = shapes(&inner).and_then(|s| s.first().copied()).or_else(|| shapes(&outer)?.get(1).copied()).unwrap_or(1).max(1);
            if bias || shapes(&own).is_some() {
                want(own, &[to]);
            }
            want(outer, &[to, rank]);
            want(inner, &[rank, from]);
        };
        projection("self_attn.q_proj", q, c.hidden, c.qkv_bias);
        projection("self_attn.k_proj", kv, c.hidden, c.qkv_bias);
        projection("self_attn.v_proj", kv, c.hidden, c.qkv_bias);
        projection("self_attn.o_proj", c.hidden, q, c.output_bias);
        projection("mlp.gate_proj", c.intermediate, c.hidden, c.mlp_bias);
        projection("mlp.up_proj", c.intermediate, c.hidden, c.mlp_bias);
        projection("mlp.down_proj", c.hidden, c.intermediate, c.mlp_bias);
    }
    out
}

/// Types every tensor of a checked checkpoint.
pub(super) fn build(checkpoint: &Checkpoint, dtype: LoadDtype) -> ModelWeights<'_> {
    let get = |name: &str| checkpoint.tensor(name).expect("opening a checkpoint checks that every expected tensor is there");
    let vector = |name: String| floats(get(&name)).collect::<Vec<f32>>();
    let weight = |name: &str| typed(get(name), dtype);
    let layers = (0..checkpoint.config.layers)
        .map(|i| {
            let name = |part: &str| format!("model.layers.{i}.{part}");
            let projection = |part: &str, bias: bool| {
                let path = name(part);
                let shapes = |name: &str| checkpoint.tensor(name).map(|t| t.shape);
                let Some(form) = Form::of(&path, &shapes) else {
                    let bias = bias.then(|| vector(format!("{path}.bias")));
                    return Projection { weight: weight(&format!("{path}.weight")), inner: None, bias };
                };
                let bias = checkpoint.tensor(&format!("{path}.{}", form.bias)).map(|view| floats(view).collect());
                let (weight, inner) = (weight(&format!("{path}.{}", form.outer)), weight(&format!("{path}.{}", form.inner)));
                let product = Projection { weight, inner: Some(inner), bias };
                // WeLore chose its ranks, and keeps a matrix whole where that is smaller.
                if std::ptr::eq(form, &MAESTRO) { thresholded(product) } else { product }
            };
            let c = &checkpoint.config;
            LayerWeights {
                input_norm: vector(name("input_layernorm.weight")),
                post_norm: vector(name("post_attention_layernorm.weight")),
                q: projection("self_attn.q_proj", c.qkv_bias),
                k: projection("self_attn.k_proj", c.qkv_bias),
                v: projection("self_attn.v_proj", c.qkv_bias),
                o: projection("self_attn.o_proj", c.output_bias),
                q_norm: c.qk_norm.then(|| vector(name("self_attn.q_norm.weight"))),
                k_norm: c.qk_norm.then(|| vector(name("self_attn.k_norm.weight"))),
                gate: projection("mlp.gate_proj", c.mlp_bias),
                up: projection("mlp.up_proj", c.mlp_bias),
                down: projection("mlp.down_proj", c.mlp_bias),
            }
        })
        .collect();
    ModelWeights {
        embed: weight(EMBED),
        layers,
        norm: vector(FINAL_NORM.to_owned()),
        untied_head: (!checkpoint.config.tied).then(|| weight(HEAD)),
    }
}

/// A product without the ranks that weigh nothing; multiplied out where that is smaller still.
fn thresholded(p: Projection<'_>) -> Projection<'_> {
    let Some(inner) = &p.inner else { return p };
    let (outs, ranks, inputs) = (p.weight.out_features, p.weight.in_features, inner.in_features);
    let (left, right) = (p.weight.floats(), inner.floats());
    let norm = |squares: f64| squares.sqrt();
    let square = |v: f32| f64::from(v) * f64::from(v);
    let importance = |j: usize| {
        let out: f64 = (0..outs).map(|o| square(left[o * ranks + j])).sum();
        let input: f64 = right[j * inputs..][..inputs].iter().map(|v| square(*v)).sum();
        norm(out) * norm(input)
    };
    let mut kept: Vec<usize> = (0..ranks).filter(|&j| importance(j) >= IMPORTANCE).collect();
    if kept.is_empty() {
        kept.push(0);
    }
    let k = kept.len();
    if k == ranks && (outs + inputs) * k < outs * inputs {
        return p;
    }
    let left: Vec<f32> = left.chunks_exact(ranks).flat_map(|row| kept.iter().map(|&j| row[j])).collect();
    let right: Vec<f32> = kept.iter().flat_map(|&j| right[j * inputs..][..inputs].iter().copied()).collect();
    let held = |out_features: usize, in_features: usize, data: Vec<f32>| Weight {
        out_features,
        in_features,
        data: match p.weight.data {
            Data::F32(_) => Data::F32(Cow::Owned(data)),
            Data::Bf16(_) => Data::Bf16(Cow::Owned(data.into_iter().map(bf16::from_f32).collect())),
        },
    };
    if (outs + inputs) * k >= outs * inputs {
        return Projection { weight: held(outs, inputs, multiplied(&left, &right, k)), inner: None, bias: p.bias };
    }
    Projection { weight: held(outs, k, left), inner: Some(held(k, inputs, right)), bias: p.bias }
}

/// A linear layer's whole matrix `[out][in]`, and its bias.
pub type Linear = (Vec<f32>, Option<Vec<f32>>);

/// A linear layer, widened, in whatever form it is stored; `None` where there is none of this path. `get` gives the elements of the
/// tensor of a name.
pub(super) fn linear_of<E>(
    path: &str,
    shapes: &Shapes<'_>,
    get: impl Fn(&str) -> Result<Option<Vec<f32>>, E>,
) -> Result<Option<Linear>, E> {
    let get = |part: &str| get(&format!("{path}.{part}"));
    let Some(form) = Form::of(path, shapes) else {
        let Some(weight) = get("weight")? else { return Ok(None) };
        return Ok(Some((weight, get("bias")?)));
    };
    let rank = shapes(&format!("{path}.{}", form.inner)).and_then(|s| s.first().copied());
    let (Some(outer), Some(inner), Some(rank)) = (get(form.outer)?, get(form.inner)?, rank) else { return Ok(None) };
    Ok(Some((multiplied(&outer, &inner, rank), get(form.bias)?)))
}

/// A two-dimensional tensor in the type asked for.
fn typed(view: TensorView<'_>, dtype: LoadDtype) -> Weight<'_> {
    let to_bf16 = match (view.dtype, dtype) {
        (_, LoadDtype::Bf16) | (Dtype::Bf16, LoadDtype::Auto) => true,
        (_, LoadDtype::F32) | (_, LoadDtype::Auto) => false,
    };
    let data = match (view.dtype, to_bf16) {
        (Dtype::F32, false) => Data::F32(cast(view.data).unwrap_or_else(|| Cow::Owned(convert(view, |x| x)))),
        (Dtype::Bf16, true) => Data::Bf16(cast(view.data).unwrap_or_else(|| Cow::Owned(convert(view, bf16::from_f32)))),
        (_, false) => Data::F32(Cow::Owned(convert(view, |x| x))),
        (_, true) => Data::Bf16(Cow::Owned(convert(view, bf16::from_f32))),
    };
    Weight { out_features: view.shape[0], in_features: view.shape[1], data }
}

/// Every element through `f32` (exact for all three stored types), in parallel.
fn convert<T: Copy + Default + Send + Sync>(view: TensorView<'_>, to: impl Fn(f32) -> T + Sync) -> Vec<T> {
    const BLOCK: usize = 1 << 16;
    let size = view.dtype.bytes();
    let mut out = vec![T::default(); view.data.len() / size];
    out.par_chunks_mut(BLOCK).zip(view.data.par_chunks(BLOCK * size)).for_each(|(out, data)| {
        let part = TensorView { data, ..view };
        out.iter_mut().zip(floats(part)).for_each(|(y, x)| *y = to(x));
    });
    out
}

/// The elements as `f32`, whatever the alignment. Only for the three supported types.
pub(crate) fn floats(view: TensorView<'_>) -> impl Iterator<Item = f32> + '_ {
    let read: fn(&[u8]) -> f32 = match view.dtype {
        Dtype::F32 => |b| f32::from_le_bytes(b.try_into().expect("chunks of four")),
        Dtype::Bf16 => |b| bf16::from_le_bytes(b.try_into().expect("chunks of two")).to_f32(),
        Dtype::F16 => |b| f16::from_le_bytes(b.try_into().expect("chunks of two")).to_f32(),
        Dtype::Other(name, _) => unreachable!("{name} is refused when a checkpoint is opened"),
    };
    view.data.chunks_exact(view.dtype.bytes()).map(read)
}

const _: () = assert!(cfg!(target_endian = "little"), "stored numbers are little endian and are used in place");
