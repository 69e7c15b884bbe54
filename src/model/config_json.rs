//! `config.json` into [`ModelConfig`]: every family's spelling, and a refusal by name for everything that
//! would change the computation and is not computed here.
//!
//! The rule for keys, in this order:
//! 1. keys that are *read* (below, by family and in the rope dictionary);
//! 2. keys known to change nothing at inference (`INERT`) are passed over;
//! 3. keys known to change the computation (`NEUTRAL`) pass only with the value that leaves it alone;
//! 4. any other key passes if it is null, false or empty, and, with a warning, if it is bookkeeping in form
//!    (a name that begins with `_` or ends with `_id`, `_version`, `_path`, ... and a plain value);
//! 5. the rest is refused: a number or a switch nobody here knows cannot be proved harmless.
//!
//! Where a key is absent, the default is that of the Hugging Face configuration class of the family.

use serde_json::{Map, Value, json};

use crate::model::config::{ModelConfig, Rope, RopeScaling};
use crate::model::json::{self, shown, shown_value};

/// A configuration with what does not fit into [`ModelConfig`].
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    pub config: ModelConfig,
    /// Some layer attends only to this many last positions; full attention is right only up to that length.
    pub sliding_window: Option<usize>,
    /// `eos_token_id` of `config.json`, one or several.
    pub eos: Vec<u32>,
    /// `dtype`, or `torch_dtype` as it was called: the type of the weights that come with it, as far as it may be believed.
    pub dtype: Option<String>,
    /// One sentence each, for the log.
    pub warnings: Vec<String>,
}

/// Why `config.json` (or `generation_config.json`) was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("{file} is not valid JSON ({reason}); download it again")]
    Json { file: &'static str, reason: String },
    #[error("{file} has no `{key}`; it is needed to build the model")]
    Missing { file: &'static str, key: &'static str },
    #[error("{file} has `{key}` = {value}, and {want} is needed")]
    Value { file: &'static str, key: String, value: String, want: String },
    #[error("config.json has `{key}` = {value}, which this server does not compute ({why}); {mend}")]
    Unsupported { key: String, value: String, why: String, mend: String },
    #[error(
        "config.json has `{key}` = {value}, a key this server does not know and cannot prove harmless; remove it if it does not change the model"
    )]
    UnknownKey { key: String, value: String },
    #[error("config.json says `{key}` = {value}; supported are llama, mistral, qwen2 and qwen3 for causal language models")]
    Model { key: &'static str, value: String },
    #[error("config.json says `{key}` = {value} and `{other}` = {other_value}, which contradict each other; correct one of them")]
    Contradiction { key: String, value: String, other: String, other_value: String },
}

const FILE: &str = "config.json";

/// Keys that say nothing about the computation at inference, whatever their value.
const INERT: &[&str] = &[
    "architectures",
    "model_type",
    "transformers_version",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "bos_token_id",
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "pretraining_tp",
    "name_or_path",
    "tokenizer_class",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "torchscript",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "return_dict_in_generate",
    "remove_invalid_values",
    "chunk_size_feed_forward",
    "keys_to_ignore_at_inference",
    "gradient_checkpointing",
    "use_bfloat16",
    "tf_legacy_loss",
    "unsloth_version",
    "unsloth_fixed",
    "unsloth_training",
    "router_aux_loss_coef",
    // How transformers.js loads an ONNX export of the model.
    "transformers.js_config",
    "output_router_logits",
    // Generation settings of the days before generation_config.json; none is read from here.
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "do_sample",
    "max_length",
    "min_length",
    "max_new_tokens",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "diversity_penalty",
    "length_penalty",
    "repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "no_repeat_ngram_size",
    "early_stopping",
    "bad_words_ids",
    "begin_suppress_tokens",
    "suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    // Sizes of other implementations, said again.
    "max_sequence_length",
    "tokenizer_model_max_length",
    "model_max_length",
];

/// Keys that would change the computation: name, the values (besides null) that do not, and what they ask for.
fn neutral() -> Vec<(&'static str, Vec<Value>, &'static str)> {
    let one = || vec![json!(1), json!(1.0)];
    let zero = || vec![json!(0), json!(0.0), json!(false)];
    let off = || vec![json!(false)];
    let on = || vec![json!(true)];
    vec![
        ("quantization_config", vec![json!({})], "quantised weights"),
        ("compression_config", vec![json!({})], "quantised weights"),
        ("quantization", vec![json!({})], "quantised weights"),
        ("auto_map", vec![json!({})], "code from the model's repository"),
        ("trust_remote_code", off(), "code from the model's repository"),
        ("custom_pipelines", vec![json!({})], "code from the model's repository"),
        ("partial_rotary_factor", one(), "rotary positions on part of each head"),
        ("rotary_pct", one(), "rotary positions on part of each head"),
        ("rotary_emb_fraction", one(), "rotary positions on part of each head"),
        ("rope_interleaved", off(), "rotary pairs of neighbouring channels"),
        ("rope_interleave", off(), "rotary pairs of neighbouring channels"),
        ("attn_logit_softcapping", vec![], "soft-capped attention scores"),
        ("final_logit_softcapping", vec![], "soft-capped logits"),
        ("attn_softcap", zero(), "soft-capped attention scores"),
        ("logits_scaling", one(), "scaled logits"),
        ("logit_scale", one(), "scaled logits"),
        ("logits_scale", one(), "scaled logits"),
        ("embedding_multiplier", one(), "scaled embeddings"),
        ("scale_emb", one(), "scaled embeddings"),
        ("residual_multiplier", one(), "scaled residuals"),
        ("scale_depth", vec![], "scaled residuals"),
        ("attention_multiplier", vec![], "another attention scale"),
        ("query_pre_attn_scalar", vec![], "another attention scale"),
        ("scale_attn_weights", on(), "another attention scale"),
        ("clip_qkv", vec![], "clipped queries, keys and values"),
        // SmolLM2's own note of what it is.
        ("is_llama_config", on(), "another architecture"),
        ("alibi", off(), "ALiBi positions"),
        ("use_alibi", off(), "ALiBi positions"),
        ("position_embedding_type", vec![json!("rope"), json!("rotary")], "other position embeddings"),
        ("num_experts", zero(), "a mixture of experts"),
        ("num_local_experts", zero(), "a mixture of experts"),
        ("n_routed_experts", zero(), "a mixture of experts"),
        ("num_experts_per_tok", zero(), "a mixture of experts"),
        ("moe_intermediate_size", zero(), "a mixture of experts"),
        ("kv_lora_rank", zero(), "latent attention"),
        ("q_lora_rank", zero(), "latent attention"),
        ("attention_chunk_size", vec![], "chunked attention"),
        ("no_rope_layers", vec![json!([])], "layers without positions"),
        ("no_rope_layer_interval", zero(), "layers without positions"),
        ("nope_layers", vec![json!([])], "layers without positions"),
        ("cross_attention_layers", vec![json!([])], "cross attention"),
        ("add_cross_attention", off(), "cross attention"),
        ("cross_attention_hidden_size", vec![], "cross attention"),
        ("is_encoder_decoder", off(), "an encoder"),
        ("is_decoder", vec![json!(false), json!(true)], "another kind of attention"),
        ("is_causal", on(), "attention to later positions"),
        ("causal", on(), "attention to later positions"),
        ("use_bidirectional_attention", off(), "attention to later positions"),
        ("tie_encoder_decoder", off(), "an encoder"),
        ("pruned_heads", vec![json!({})], "pruned heads"),
        ("rms_norm", on(), "another norm"),
        ("use_rmsnorm", on(), "another norm"),
        ("norm_type", vec![json!("rmsnorm"), json!("rms_norm")], "another norm"),
        ("vision_config", vec![json!({})], "images"),
        ("audio_config", vec![json!({})], "sound"),
        ("text_config", vec![json!({})], "a model inside another"),
        ("dual_chunk_attention_config", vec![json!({})], "chunked attention"),
    ]
}

/// Endings of keys whose plain values are bookkeeping.
const BOOKKEEPING: &[&str] = &[
    "_id", "_ids", "_version", "_path", "_paths", "_name", "_date", "_url", "_hash", "_commit", "_license", "_author", "_dtype", "_comment",
];
const BOOKKEEPING_WHOLE: &[&str] =
    &["license", "author", "authors", "name", "description", "version", "commit", "comment", "date", "language", "tags"];

/// Reads `config.json`. Allocates nothing that a number of the file decides.
pub fn parse(text: &[u8]) -> Result<Parsed, ConfigError> {
    let value = json::parse(text).map_err(|reason| ConfigError::Json { file: FILE, reason })?;
    let Value::Object(map) = value else {
        return Err(ConfigError::Json { file: FILE, reason: "not an object".to_owned() });
    };
    let mut f = Fields { file: FILE, map, used: Vec::new() };
    let family = family(&mut f)?;
    let mut warnings = Vec::new();

    let hidden = f.need_count("hidden_size", 1 << 17)?;
    let layers = f.need_count("num_hidden_layers", 1024)?;
    let heads = f.need_count("num_attention_heads", 1024)?;
    let kv_heads = match f.count("num_key_value_heads", 1024)? {
        Some(n) => n,
        // The class default of the other families is a number of one particular model.
        None if family == "llama" || f.is_null("num_key_value_heads") => heads,
        None => return Err(ConfigError::Missing { file: FILE, key: "num_key_value_heads" }),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(f.wrong("num_key_value_heads", format!("a divisor of num_attention_heads ({heads})")));
    }
    let head_dim = match f.count("head_dim", 1024)? {
        Some(d) => d,
        None if family == "qwen3" && !f.is_null("head_dim") => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(f.wrong("hidden_size", format!("a multiple of num_attention_heads ({heads}), or a head_dim,"))),
    };
    if head_dim % 2 != 0 || head_dim > 1024 {
        let (key, value) = ("head_dim".to_owned(), head_dim.to_string());
        return Err(ConfigError::Value { file: FILE, key, value, want: "an even number up to 1024".to_owned() });
    }
    let intermediate = f.need_count("intermediate_size", 1 << 20)?;
    let vocab = f.need_count("vocab_size", 1 << 22)?;
    let stated_positions = match f.count("max_position_embeddings", 1 << 24)? {
        Some(n) => n,
        None if family == "llama" => 2048,
        None => return Err(ConfigError::Missing { file: FILE, key: "max_position_embeddings" }),
    };
    let norm_eps = f.number("rms_norm_eps", 1e-12, 0.1)?.unwrap_or(1e-6) as f32;
    if let Some(act) = f.take("hidden_act").filter(|v| v.as_str() != Some("silu")) {
        return Err(unsupported("hidden_act", &act, "only silu is"));
    }
    if let Some(act) = f.take("hidden_activation").filter(|v| v.as_str() != Some("silu")) {
        return Err(unsupported("hidden_activation", &act, "only silu is"));
    }
    let attention_bias = f.flag("attention_bias")?.unwrap_or(false);
    let mlp_bias = f.flag("mlp_bias")?.unwrap_or(false);
    if attention_bias && (family == "mistral" || family == "qwen2") {
        return Err(unsupported("attention_bias", &json!(true), &format!("{family} has none to switch on")));
    }
    if mlp_bias && family != "llama" {
        return Err(unsupported("mlp_bias", &json!(true), &format!("{family} has none to switch on")));
    }
    let tied = f.flag("tie_word_embeddings")?.unwrap_or(false);
    let (rope, max_positions) = rope(&mut f, stated_positions, &mut warnings)?;
    if max_positions > 1 << 24 {
        let (key, value) = ("max_position_embeddings".to_owned(), format!("{max_positions} after rope scaling"));
        return Err(ConfigError::Value { file: FILE, key, value, want: format!("at most {}", 1 << 24) });
    }
    let sliding_window = sliding_window(&mut f, &family, layers)?;
    let eos = f.token_ids("eos_token_id", vocab)?;
    let config = ModelConfig {
        qkv_bias: attention_bias || family == "qwen2",
        output_bias: attention_bias,
        mlp_bias,
        qk_norm: family == "qwen3",
        family,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate,
        vocab,
        max_positions,
        norm_eps,
        rope,
        tied,
    };
    let dtype = ["dtype", "torch_dtype"].map(|key| f.take(key)).into_iter().flatten().find_map(|v| v.as_str().map(str::to_owned));
    rest(&f, &mut warnings)?;
    Ok(Parsed { config, sliding_window, eos, dtype, warnings })
}

/// `model_type`, confirmed by `architectures`.
fn family(f: &mut Fields) -> Result<String, ConfigError> {
    let Some(value) = f.take("model_type") else { return Err(ConfigError::Missing { file: FILE, key: "model_type" }) };
    let class = match value.as_str() {
        Some("llama") => "LlamaForCausalLM",
        Some("mistral") => "MistralForCausalLM",
        Some("qwen2") => "Qwen2ForCausalLM",
        Some("qwen3") => "Qwen3ForCausalLM",
        _ => return Err(ConfigError::Model { key: "model_type", value: shown_value(&value) }),
    };
    if let Some(list) = f.take("architectures") {
        // The first Llama conversions spelled it LLaMAForCausalLM.
        let known = |v: &Value| v.as_str().is_some_and(|s| s.eq_ignore_ascii_case(class));
        if list.as_array().is_none_or(|a| !a.is_empty() && !a.iter().any(known)) {
            return Err(ConfigError::Model { key: "architectures", value: shown_value(&list) });
        }
    }
    Ok(value.as_str().unwrap_or_default().to_owned())
}

/// The rope dictionary in either spelling (`rope_scaling` beside `rope_theta`, or `rope_parameters`), and the
/// longest sequence with it: `max_position_embeddings` itself, or for linear and yarn, as vLLM has it, the
/// original length times the factor.
fn rope(f: &mut Fields, stated: usize, warnings: &mut Vec<String>) -> Result<(Rope, usize), ConfigError> {
    let top_theta = f.number("rope_theta", 1.0, 1e12)?;
    let (old, new) = (f.take("rope_scaling"), f.take("rope_parameters"));
    let (key, value) = match (old, new) {
        (Some(old), Some(new)) if old != new => {
            return Err(ConfigError::Contradiction {
                key: "rope_scaling".to_owned(),
                value: shown_value(&old),
                other: "rope_parameters".to_owned(),
                other_value: shown_value(&new),
            });
        }
        (_, Some(new)) => ("rope_parameters", new),
        (Some(old), None) => ("rope_scaling", old),
        (None, None) => {
            let theta = top_theta.unwrap_or(10_000.0);
            return Ok((Rope { theta, scaling: RopeScaling::None }, stated));
        }
    };
    let Value::Object(map) = value else { return Err(wrong(FILE, key, &value, "an object".to_owned())) };
    if let Some((layer_type, _)) = map.iter().find(|(_, v)| v.is_object()) {
        return Err(unsupported(&format!("{key}.{layer_type}"), &map[layer_type], "rope per kind of layer"));
    }
    let mut r = Fields { file: FILE, map, used: Vec::new() };
    let inner_theta = r.number("rope_theta", 1.0, 1e12)?;
    if let (Some(a), Some(b)) = (top_theta, inner_theta)
        && a != b
    {
        return Err(ConfigError::Contradiction {
            key: "rope_theta".to_owned(),
            value: a.to_string(),
            other: format!("{key}.rope_theta"),
            other_value: b.to_string(),
        });
    }
    let theta = inner_theta.or(top_theta).unwrap_or(10_000.0);
    let (kind, legacy) = (r.take("rope_type"), r.take("type"));
    if let (Some(a), Some(b)) = (&kind, &legacy)
        && a != b
    {
        return Err(ConfigError::Contradiction {
            key: format!("{key}.rope_type"),
            value: shown_value(a),
            other: format!("{key}.type"),
            other_value: shown_value(b),
        });
    }
    let kind = kind.or(legacy).unwrap_or_else(|| json!("default"));
    if let Some(part) = r.number("partial_rotary_factor", 0.0, 1.0)?.filter(|&p| p != 1.0) {
        return Err(unsupported(&format!("{key}.partial_rotary_factor"), &json!(part), "rotary positions on part of each head"));
    }
    let original = |r: &mut Fields| r.count("original_max_position_embeddings", 1 << 24);
    let (scaling, max_positions) = match kind.as_str() {
        Some("default") => {
            // A factor that a default rope ignores.
            if let Some(n) = r.number("factor", 0.0, 1e6)?.filter(|&n| n != 1.0) {
                return Err(unsupported(&format!("{key}.factor"), &json!(n), "the default rope has no factor"));
            }
            (RopeScaling::None, stated)
        }
        Some("linear") => {
            let factor = r.need_number("factor", 1.0, 1e4)?;
            (RopeScaling::Linear { factor }, (stated as f64 * factor) as usize)
        }
        Some("llama3") => {
            let factor = r.need_number("factor", 1.0, 1e4)?;
            let low_freq_factor = r.need_number("low_freq_factor", 1e-3, 1e4)?;
            let high_freq_factor = r.need_number("high_freq_factor", 1e-3, 1e4)?;
            if high_freq_factor <= low_freq_factor {
                return Err(r.wrong("high_freq_factor", format!("more than low_freq_factor ({low_freq_factor})")));
            }
            let Some(original) = original(&mut r)? else {
                return Err(ConfigError::Missing { file: FILE, key: "original_max_position_embeddings" });
            };
            let original_max_positions = original as f64;
            (RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }, stated)
        }
        Some("yarn") => {
            let factor = r.need_number("factor", 1.0, 1e4)?;
            let beta_fast = r.number("beta_fast", 1e-3, 1e6)?.unwrap_or(32.0);
            let beta_slow = r.number("beta_slow", 1e-3, 1e6)?.unwrap_or(1.0);
            if beta_fast <= beta_slow {
                return Err(r.wrong("beta_fast", format!("more than beta_slow ({beta_slow})")));
            }
            let attention = r.number("attention_factor", 1e-3, 1e3)?;
            for name in ["mscale", "mscale_all_dim"] {
                // With an attention factor given, these are not read; zero means absent.
                if let Some(m) = r.number(name, 0.0, 1e3)?.filter(|&m| m != 0.0 && attention.is_none()) {
                    return Err(unsupported(
                        &format!("{key}.{name}"),
                        &json!(m),
                        "another yarn attention factor; state attention_factor instead",
                    ));
                }
            }
            let attention_factor = attention.unwrap_or(if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 });
            let truncate = r.flag("truncate")?.unwrap_or(true);
            let original = original(&mut r)?.unwrap_or(stated);
            let scaled = (original as f64 * factor) as usize;
            if stated != original && stated != scaled {
                warnings.push(format!(
                    "config.json stretches {original} positions by a yarn factor of {factor} and also states {stated} positions; the factor is followed"
                ));
            }
            let original_max_positions = original as f64;
            (RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, attention_factor, truncate }, scaled)
        }
        _ => {
            let why = "supported are default, linear, llama3 and yarn";
            let mut refused = unsupported(&format!("{key}.rope_type"), &kind, why);
            if let (Some("dynamic"), ConfigError::Unsupported { mend, .. }) = (kind.as_str(), &mut refused) {
                // Frequencies follow the length of a sequence once that is beyond these, and are the plain ones before.
                let how = if key == "rope_scaling" { "remove rope_scaling" } else { "make rope_type default, without a factor" };
                *mend = format!("up to {stated} positions the model is the same without it: to serve so much, {how}");
            }
            return Err(refused);
        }
    };
    if let Some((name, value)) = r.map.iter().find(|(k, v)| !v.is_null() && !r.used.contains(k)) {
        return Err(ConfigError::UnknownKey { key: format!("{key}.{}", shown(name, 60)), value: shown_value(value) });
    }
    Ok((Rope { theta, scaling }, max_positions))
}

/// The window of the layers that have one, by the rules of each family's configuration class.
fn sliding_window(f: &mut Fields, family: &str, layers: usize) -> Result<Option<usize>, ConfigError> {
    let null = f.is_null("sliding_window");
    let window = f.count("sliding_window", 1 << 24)?;
    let switched = f.flag("use_sliding_window")?;
    let first = f.take("max_window_layers");
    let types = f.take("layer_types");
    let window = match family {
        // The Llama classes have no window; a value is left over from something else.
        "llama" => None,
        "mistral" => window.or(if null { None } else { Some(4096) }),
        _ if switched == Some(true) => window.or(if null { None } else { Some(4096) }),
        _ => None,
    };
    if let Some(list) = types {
        let Some(list) = list.as_array().filter(|a| a.len() == layers) else {
            return Err(wrong(FILE, "layer_types", &list, format!("a list of {layers} kinds")));
        };
        let mut sliding = false;
        for kind in list {
            match kind.as_str() {
                Some("full_attention") => {}
                Some("sliding_attention") => sliding = true,
                _ => return Err(unsupported("layer_types", kind, "only full and sliding attention are known")),
            }
        }
        return match (sliding, window) {
            (false, _) => Ok(None),
            (true, Some(window)) => Ok(Some(window)),
            (true, None) => Err(ConfigError::Contradiction {
                key: "layer_types".to_owned(),
                value: "\"sliding_attention\"".to_owned(),
                other: "sliding_window".to_owned(),
                other_value: "null or switched off".to_owned(),
            }),
        };
    }
    if let (Some(_), Some(first), true) = (window, &first, family.starts_with("qwen")) {
        let Some(first) = first.as_u64() else {
            return Err(wrong(FILE, "max_window_layers", first, "a number of layers".to_owned()));
        };
        // Layers from `max_window_layers` on have the window.
        if first >= layers as u64 {
            return Ok(None);
        }
    }
    Ok(window)
}

/// Decides about every key that nothing has read.
fn rest(f: &Fields, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
    let neutral = neutral();
    for (key, value) in &f.map {
        if value.is_null() || f.used.contains(key) || INERT.contains(&key.as_str()) {
            continue;
        }
        if let Some((_, harmless, why)) = neutral.iter().find(|(k, ..)| k == key) {
            if harmless.contains(value) {
                continue;
            }
            return Err(unsupported(key, value, why));
        }
        let empty = match value {
            Value::Bool(b) => !b,
            Value::String(s) => s.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            _ => false,
        };
        if empty {
            continue;
        }
        let plain = !value.is_object() && !value.is_array()
            || value.as_array().is_some_and(|a| a.len() <= 64 && a.iter().all(|v| v.is_string() || v.is_u64() || v.is_i64()));
        let bookkeeping =
            key.starts_with('_') || BOOKKEEPING.iter().any(|end| key.ends_with(end)) || BOOKKEEPING_WHOLE.contains(&key.as_str());
        if !(plain && bookkeeping) {
            return Err(ConfigError::UnknownKey { key: shown(key, 60), value: shown_value(value) });
        }
        warnings.push(format!("config.json has `{}` = {}, which is taken for bookkeeping", shown(key, 60), shown_value(value)));
    }
    Ok(())
}

fn unsupported(key: &str, value: &Value, why: &str) -> ConfigError {
    ConfigError::Unsupported { key: shown(key, 60), value: shown_value(value), why: why.to_owned(), mend: mend(key, value) }
}

/// What to do about a key that is not computed.
fn mend(key: &str, value: &Value) -> String {
    let number = |name: &str| value.get(name).and_then(Value::as_u64);
    match key {
        "quantization_config" | "compression_config" | "quantization" => {
            "serve the checkpoint in BF16, F16 or F32 that this one was made of".to_owned()
        }
        // Positions are counted within chunks that overlap by the local size; in the first chunk they are as ever.
        "dual_chunk_attention_config" => {
            match number("chunk_size").zip(number("local_size")).and_then(|(chunk, local)| chunk.checked_sub(local)) {
                Some(n) => format!(
                    "up to {n} positions attention is the same without it: to serve so much, remove the key, and make max_position_embeddings {n} or give --max-model-len {n}"
                ),
                None => "serve a model without it".to_owned(),
            }
        }
        _ => "serve a model without it".to_owned(),
    }
}

fn wrong(file: &'static str, key: &str, value: &Value, want: String) -> ConfigError {
    ConfigError::Value { file, key: shown(key, 60), value: shown_value(value), want }
}

/// An object whose read keys are remembered. A null is an absent key, as in Python's configuration classes.
pub(super) struct Fields {
    pub(super) file: &'static str,
    pub(super) map: Map<String, Value>,
    pub(super) used: Vec<String>,
}

impl Fields {
    /// The value of `key`, unless absent or null.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        if !self.used.iter().any(|k| k == key) {
            self.used.push(key.to_owned());
        }
        self.map.get(key).filter(|v| !v.is_null()).cloned()
    }

    fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    fn wrong(&self, key: &str, want: String) -> ConfigError {
        wrong(self.file, key, self.map.get(key).unwrap_or(&Value::Null), want)
    }

    /// A positive integer up to `max`.
    pub(super) fn count(&mut self, key: &'static str, max: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(wrong(self.file, key, &value, format!("an integer from 1 to {max}"))),
        }
    }

    fn need_count(&mut self, key: &'static str, max: usize) -> Result<usize, ConfigError> {
        self.count(key, max)?.ok_or(ConfigError::Missing { file: self.file, key })
    }

    /// A number in `min..=max`.
    pub(super) fn number(&mut self, key: &'static str, min: f64, max: f64) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_f64() {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(wrong(self.file, key, &value, format!("a number from {min} to {max}"))),
        }
    }

    fn need_number(&mut self, key: &'static str, min: f64, max: f64) -> Result<f64, ConfigError> {
        self.number(key, min, max)?.ok_or(ConfigError::Missing { file: self.file, key })
    }

    pub(super) fn flag(&mut self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| wrong(self.file, key, &value, "true or false".to_owned()))
    }

    /// One id or a list of at most 64, each below `vocab`.
    pub(super) fn token_ids(&mut self, key: &'static str, vocab: usize) -> Result<Vec<u32>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(&value);
        let list = value.as_array().map_or(one, |a| a.as_slice());
        let ids: Option<Vec<u32>> =
            list.iter().map(|v| v.as_u64().filter(|&id| id < vocab as u64).and_then(|id| u32::try_from(id).ok())).collect();
        ids.filter(|ids| ids.len() <= 64).ok_or_else(|| wrong(self.file, key, &value, format!("token ids below the vocabulary of {vocab}")))
    }
}
