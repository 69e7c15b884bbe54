//! A second opinion on the golden checkpoints: candle-transformers, written by other hands than transformers and
//! ours, must give the same numbers. A golden file that is wrong, or a checkpoint that says less than it seems to, fails here.
//!
//! Not covered, because candle's llama has neither: `llama-bias` (biases on every projection) and `llama-yarn`.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use serde_json::Value;

use crate::golden::{self, Case, log_softmax};

/// Another summation order in float32, over two or three layers.
const TOLERANCE: f64 = 1e-3;

#[test]
fn candle_agrees_on_llama2() {
    check("llama2");
}

#[test]
fn candle_agrees_on_llama3() {
    check("llama3");
}

#[test]
fn candle_agrees_on_llama_linear() {
    check("llama-linear");
}

#[test]
fn candle_agrees_on_mistral() {
    check("mistral");
}

#[test]
fn candle_agrees_on_qwen2() {
    check("qwen2");
}

#[test]
fn candle_agrees_on_qwen3() {
    check("qwen3");
}

/// Runs every prompt whole and token by token, and the greedy continuation through candle's KV cache.
fn check(name: &str) {
    let mut oracle = Oracle::load(name);
    for case in golden::expected(name) {
        let place = format!("{name}, prompt of {}", case.prompt.len());
        check_whole(&mut oracle, &case, &place);
        check_steps(&mut oracle, &case, &place);
    }
}

fn check_whole(oracle: &mut Oracle, case: &Case, place: &str) {
    oracle.reset();
    let logp = oracle.next_logprobs(&case.prompt, 0);
    for top in &case.top {
        close(logp[top.id as usize], top.logprob, &format!("{place}: token {} after the whole prompt", top.id));
    }
}

fn check_steps(oracle: &mut Oracle, case: &Case, place: &str) {
    oracle.reset();
    let targets = case.prompt[1..].iter().zip(&case.logprobs);
    let targets = targets.chain(case.continuation.iter().zip(&case.continuation_logprobs));
    let mut token = case.prompt[0];
    for (position, (&next, &want)) in targets.enumerate() {
        let logp = oracle.next_logprobs(&[token], position);
        close(logp[next as usize], want, &format!("{place}: token {next} after position {position}"));
        if position + 1 >= case.prompt.len() {
            let best = (0..logp.len()).max_by(|&a, &b| logp[a].total_cmp(&logp[b])).expect("a vocabulary is not empty");
            assert_eq!(best as u32, next, "{place}: greedy token after position {position}");
        }
        token = next;
    }
}

fn close(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() < TOLERANCE, "{what}: candle says {got}, the golden file {want}");
}

/// One of candle's models with its own KV cache, in float32 on the CPU.
struct Oracle {
    model: Model,
}

enum Model {
    Llama { model: llama::Llama, config: llama::Config, cache: llama::Cache },
    Mistral(mistral::Model),
    Qwen2(qwen2::ModelForCausalLM),
    Qwen3(qwen3::ModelForCausalLM),
}

impl Oracle {
    fn load(name: &str) -> Self {
        let path = golden::folder(name).join("config.json");
        let text = std::fs::read_to_string(&path).expect("the golden folder has a config");
        let mut config: Value = serde_json::from_str(&text).expect("the config is JSON");
        // candle reads only the older spelling of rope.
        if let Some(theta) = config.pointer("/rope_parameters/rope_theta").cloned() {
            config["rope_theta"] = theta;
        }
        let weights = VarBuilder::from_tensors(weights(name), DType::F32, &Device::Cpu);
        let model = match config["model_type"].as_str().expect("the config names its family") {
            "llama" => {
                let config = llama_config(config);
                let model = llama::Llama::load(weights, &config).expect("candle loads llama");
                let cache = llama_cache(&config);
                Model::Llama { model, config, cache }
            }
            "mistral" => Model::Mistral(mistral::Model::new(&parse(config), weights).expect("candle loads mistral")),
            "qwen2" => Model::Qwen2(qwen2::ModelForCausalLM::new(&parse(config), weights).expect("candle loads qwen2")),
            "qwen3" => Model::Qwen3(qwen3::ModelForCausalLM::new(&parse(config), weights).expect("candle loads qwen3")),
            other => panic!("candle has no {other}"),
        };
        Self { model }
    }

    fn reset(&mut self) {
        match &mut self.model {
            Model::Llama { config, cache, .. } => *cache = llama_cache(config),
            Model::Mistral(model) => model.clear_kv_cache(),
            Model::Qwen2(model) => model.clear_kv_cache(),
            Model::Qwen3(model) => model.clear_kv_cache(),
        }
    }

    /// Log-probabilities after `tokens`, the first of which stands at `position`.
    fn next_logprobs(&mut self, tokens: &[u32], position: usize) -> Vec<f64> {
        let input = Tensor::new(tokens, &Device::Cpu).and_then(|t| t.unsqueeze(0)).expect("a row of ids");
        let logits = match &mut self.model {
            Model::Llama { model, cache, .. } => model.forward(&input, position, cache),
            Model::Mistral(model) => model.forward(&input, position),
            Model::Qwen2(model) => model.forward(&input, position),
            Model::Qwen3(model) => model.forward(&input, position),
        };
        let logits = logits.and_then(|l| l.flatten_all()).and_then(|l| l.to_vec1::<f32>()).expect("candle runs the model");
        log_softmax(&logits)
    }
}

fn llama_cache(config: &llama::Config) -> llama::Cache {
    llama::Cache::new(true, DType::F32, config, &Device::Cpu).expect("candle makes a cache")
}

/// candle knows llama3 scaling only. Linear scaling is that with every wavelength on the far side of the ramp.
fn llama_config(mut config: Value) -> llama::Config {
    let heads = config["num_attention_heads"].as_u64().expect("heads");
    if let Some(head_dim) = config["head_dim"].as_u64() {
        assert_eq!(Some(head_dim * heads), config["hidden_size"].as_u64(), "candle's llama derives head_dim");
    }
    let biased = |key: &str| config[key].as_bool().unwrap_or(false);
    assert!(!biased("attention_bias") && !biased("mlp_bias"), "candle's llama has no biases");
    match config.pointer("/rope_scaling/type").or(config.pointer("/rope_scaling/rope_type")).and_then(Value::as_str) {
        None | Some("llama3") => {}
        Some("linear") => {
            let factor = config["rope_scaling"]["factor"].clone();
            config["rope_scaling"] = serde_json::json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1,
            });
        }
        Some(other) => panic!("candle's llama has no {other} scaling"),
    }
    parse::<llama::LlamaConfig>(config).into_config(false)
}

fn parse<T: serde::de::DeserializeOwned>(config: Value) -> T {
    serde_json::from_value(config).unwrap_or_else(|e| panic!("candle's config: {e}"))
}

/// Every tensor of every shard, widened to float32.
fn weights(name: &str) -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(golden::folder(name)).expect("the golden folder is there") {
        let path = entry.expect("a directory entry").path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            for (key, tensor) in candle_core::safetensors::load(&path, &Device::Cpu).expect("candle reads safetensors") {
                let tensor = tensor.to_dtype(DType::F32).expect("every dtype widens");
                assert!(tensors.insert(key, tensor).is_none(), "{name}: a tensor stands in two shards");
            }
        }
    }
    tensors
}
