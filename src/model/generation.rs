//! `generation_config.json`: how the makers of a model want it sampled when a request does not say.

use serde_json::Value;

use crate::ids::TokenId;
use crate::model::config_json::{ConfigError, Fields};
use crate::model::json::{self, shown_value};
use crate::request::Sampling;

/// Defaults for requests that leave a parameter out.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Temperature 1 and nothing cut off where the file says nothing; temperature 0 where it says `do_sample: false`.
    pub sampling: Sampling,
    pub max_new_tokens: Option<u32>,
    /// Ids that end a generation, of both files, sorted, each below the vocabulary; the tokenizer's own once it is known
    /// ([`Generation::end_at`]).
    pub eos: Vec<TokenId>,
}

impl Generation {
    /// Adds an id that ends a generation.
    pub fn end_at(&mut self, id: TokenId) {
        if let Err(at) = self.eos.binary_search(&id) {
            self.eos.insert(at, id);
        }
    }
}

const FILE: &str = "generation_config.json";

/// Settings that would change the output and are not applied unless a request asks for its own kind of it:
/// name, and the values besides null that mean "off".
const NOT_APPLIED: &[(&str, &[f64])] = &[
    ("num_beams", &[1.0]),
    ("num_beam_groups", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("typical_p", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("diversity_penalty", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("min_new_tokens", &[0.0]),
    ("min_length", &[0.0]),
    ("guidance_scale", &[1.0]),
    ("bad_words_ids", &[]),
    ("force_words_ids", &[]),
    ("sequence_bias", &[]),
    ("suppress_tokens", &[]),
    ("begin_suppress_tokens", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("stop_strings", &[]),
    ("watermarking_config", &[]),
    ("exponential_decay_length_penalty", &[]),
    ("dola_layers", &[]),
];

/// Reads the file, or takes the defaults when there is none. `eos` are the ids of `config.json`.
pub fn parse(text: Option<&[u8]>, eos: &[TokenId], vocab: usize, warnings: &mut Vec<String>) -> Result<Generation, ConfigError> {
    let map = match text {
        None => serde_json::Map::new(),
        Some(text) => match json::parse(text) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(ConfigError::Json { file: FILE, reason: "not an object".to_owned() }),
            Err(reason) => return Err(ConfigError::Json { file: FILE, reason }),
        },
    };
    let mut f = Fields { file: FILE, map, used: Vec::new() };
    let sampled = f.flag("do_sample")?.unwrap_or(true);
    let temperature = f.number("temperature", 0.0, 100.0)?.unwrap_or(1.0);
    let top_k = match f.take("top_k") {
        None => 0,
        // vLLM's spelling of "all".
        Some(v) if v.as_i64() == Some(-1) || v.as_u64() == Some(0) => 0,
        Some(_) => f.count("top_k", 1 << 22)?.unwrap_or(0) as u32,
    };
    let top_p = f.number("top_p", f64::MIN_POSITIVE, 1.0)?.unwrap_or(1.0) as f32;
    let sampling = Sampling {
        temperature: if sampled { temperature as f32 } else { 0.0 },
        // A value that vanishes in f32 still means "the best token only".
        top_p: top_p.max(f32::MIN_POSITIVE),
        top_k,
        min_p: f.number("min_p", 0.0, 1.0)?.unwrap_or(0.0) as f32,
        repetition_penalty: f.number("repetition_penalty", 0.01, 100.0)?.unwrap_or(1.0) as f32,
        ..Sampling::greedy()
    };
    let max_new_tokens = f.count("max_new_tokens", 1 << 24)?.map(|n| n as u32);
    let mut all = f.token_ids("eos_token_id", vocab)?;
    all.extend_from_slice(eos);
    all.sort_unstable();
    all.dedup();
    for (name, off) in NOT_APPLIED {
        let Some(value) = f.take(name) else { continue };
        let inert = value.as_f64().is_some_and(|n| off.contains(&n)) || value.as_array().is_some_and(Vec::is_empty);
        if !inert {
            warnings.push(format!("generation_config.json asks for `{name}` = {}, which is not applied", shown_value(&value)));
        }
    }
    Ok(Generation { sampling, max_new_tokens, eos: all })
}
