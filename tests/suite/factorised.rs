//! Checkpoints whose linear layers are stored as products (WeLore, Maestro): served as such, as transformers says of the products.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use strait::adapters::BaseChoice;
use strait::model::checkpoint::Checkpoint;
use strait::model::delta::HeldAs;
use strait::model::weights::LoadDtype;
use strait::ops::Ops;
use strait::ops::cpu::Cpu;
use strait::ops::reference::Reference;
use strait::step::Logits;

use crate::adapters;
use crate::golden::{folder, worst};
use crate::http::adapters::Root;
use crate::model::{Alone, log_softmax};

/// What `tests/golden/make_factorised.py` says; its header says what each field means.
#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    logits: Vec<f32>,
    logprobs: Vec<f32>,
}

fn check(ops: &dyn Ops) {
    for name in ["welore", "maestro"] {
        let checkpoint = Checkpoint::open(&folder(name)).unwrap();
        let expected: Expected = serde_json::from_str(&std::fs::read_to_string(folder(name).join("expected.json")).unwrap()).unwrap();
        for case in &expected.cases {
            for half in [false, true] {
                let mut alone = Alone::new(&checkpoint, LoadDtype::F32);
                let first = if half { case.prompt.len() / 2 } else { case.prompt.len() };
                let mut got = alone.run(ops, &case.prompt[..first], 0, Logits::All);
                for (at, token) in case.prompt.iter().enumerate().skip(first) {
                    got.extend(alone.run(ops, &[*token], at as u32, Logits::Last));
                }
                let logit = worst(got.last().unwrap().1.iter().zip(&case.logits).map(|(a, b)| (a - b).abs()));
                let score = worst(case.logprobs.iter().enumerate().map(|(i, w)| (log_softmax(&got[i].1, case.prompt[i + 1]) - w).abs()));
                assert!(logit < 1e-3 && score < 1e-3, "{name}: off by {logit} and {score}");
            }
        }
    }
}

#[test]
fn the_reference_agrees_with_transformers_on_products() {
    check(&Reference);
}

#[test]
fn the_fast_backend_agrees_with_transformers_on_products() {
    check(&Cpu::new(2));
}

#[test]
fn products_are_used_as_products_of_the_ranks_that_count() {
    let dense = Checkpoint::open(&folder("llama-bias")).unwrap();
    let whole: usize = dense.weights(LoadDtype::F32).layers.iter().map(|l| l.q.weight.bytes() + l.down.weight.bytes()).sum();
    for (name, products) in [("welore", 11), ("maestro", 12)] {
        let checkpoint = Checkpoint::open(&folder(name)).unwrap();
        let weights = checkpoint.weights(LoadDtype::Auto);
        let all: Vec<_> = weights.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]).collect();
        let n = all.iter().filter(|p| p.inner.is_some()).count();
        assert_eq!(n, products, "{name}");
        for p in all.iter().filter(|p| p.inner.is_some()) {
            let inner = p.inner.as_ref().unwrap();
            assert_eq!(inner.out_features, p.weight.in_features);
            let (out, inputs, k) = (p.weight.out_features, inner.in_features, inner.out_features);
            assert!((out + inputs) * k < out * inputs, "{name}: a product of {k} larger than {out} by {inputs}");
            // What WeLore stores is used where it lies.
            assert_eq!(name == "welore", p.weight.is_borrowed() && inner.is_borrowed());
        }
        let held: usize =
            weights.layers.iter().flat_map(|l| [&l.q, &l.down]).map(|p| p.weight.bytes() + p.inner.as_ref().map_or(0, |i| i.bytes())).sum();
        assert!(held < whole, "{name}: {held} bytes for {whole}");
    }
    // Nearly all ranks kept: multiplied out, which is smaller.
    let maestro = Checkpoint::open(&folder("maestro")).unwrap();
    assert!(maestro.weights(LoadDtype::Auto).layers[0].o.inner.is_none());
}

/// The same model with every product multiplied out.
fn multiplied_out(checkpoint: &Checkpoint, source: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::copy(folder(source).join("config.json"), to.join("config.json")).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for layer in 0..checkpoint.config.layers {
        for part in [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ] {
            let path = format!("model.layers.{layer}.{part}");
            let (weight, bias) = checkpoint.linear(&path).unwrap();
            let bias = bias.expect("llama-bias has them all");
            tensors.push((format!("{path}.weight"), vec![bias.len(), weight.len() / bias.len()], weight));
            tensors.push((format!("{path}.bias"), vec![bias.len()], bias));
        }
    }
    for name in checkpoint.names().filter(|n| !n.contains("_proj.")) {
        let view = checkpoint.tensor(name).unwrap();
        let data = view.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        tensors.push((name.to_owned(), view.shape.to_vec(), data));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, data)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(data)).unwrap()));
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &to.join("model.safetensors")).unwrap();
}

#[test]
fn adapters_are_served_on_products_as_on_the_whole_matrices() {
    let root = Root::new("products", &[]);
    for name in ["welore", "maestro"] {
        let checkpoint = Checkpoint::open(&folder(name)).unwrap();
        multiplied_out(&checkpoint, name, &root.0.join(name));
        let whole = Checkpoint::open(&root.0.join(name)).unwrap();
        // Its gains are norms of the base's rows, its biases stand in for the base's, and its triple is taken out of the base.
        for adapter in ["dora", "bias-all", "sorsa-compact-alpha"] {
            let logits = |base: &Checkpoint| {
                let mut alone = Alone::new(base, LoadDtype::F32);
                alone.delta = Some(adapters::ready(base, &adapters::folder(adapter), &BaseChoice::Auto, HeldAs::F32).unwrap().delta);
                alone.run(&Cpu::new(2), &[1, 2, 3, 5, 8, 13, 21], 0, Logits::Last).remove(0).1
            };
            let (a, b) = (logits(&checkpoint), logits(&whole));
            let off = worst(a.iter().zip(&b).map(|(a, b)| (a - b).abs()));
            assert!(off < 1e-3, "{adapter} on {name}: off by {off}");
        }
    }
}

#[test]
fn products_that_do_not_fit_are_refused() {
    let root = Root::new("products-bad", &[]);
    let bytes = std::fs::read(folder("welore").join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let product = tensors.names().into_iter().find(|n| n.ends_with("V.weight")).unwrap().to_owned();
    type Change = fn(&str, Vec<usize>, Vec<u8>) -> Option<(Vec<usize>, Vec<u8>)>;
    let cases: [(&str, Change); 2] = [
        ("is missing", |_, _, _| None),
        ("has the shape", |_, shape, data| {
            let row = data.len() / shape[0];
            Some((vec![shape[0] - 1, shape[1]], data[row..].to_vec()))
        }),
    ];
    for (i, (message, change)) in cases.into_iter().enumerate() {
        let to = root.0.join(i.to_string());
        std::fs::create_dir_all(&to).unwrap();
        std::fs::copy(folder("welore").join("config.json"), to.join("config.json")).unwrap();
        let all: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = tensors
            .tensors()
            .into_iter()
            .filter_map(|(name, view)| {
                let (shape, data) = (view.shape().to_vec(), view.data().to_vec());
                let (shape, data) = if name == product { change(&name, shape, data)? } else { (shape, data) };
                Some((name, view.dtype(), shape, data))
            })
            .collect();
        let views = all.iter().map(|(name, dtype, shape, data)| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &to.join("model.safetensors")).unwrap();
        let error = Checkpoint::open(&to).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}
