//! What a decoder is: the facts of `config.json`, resolved and checked. One parametrised decoder serves
//! every family, so a family differs from another only by these values.

/// A decoder-only transformer with RMSNorm, rotary positions, grouped-query attention and a gated SiLU MLP.
///
/// Only [`super::checkpoint`] builds one from a folder; every number is positive and in range, `heads` is a
/// multiple of `kv_heads`, `head_dim` is even.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type` as the folder spells it (`llama`, `mistral`, `qwen2`, `qwen3`).
    pub family: String,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    /// Width of the logits: rows of the output head.
    pub vocab: usize,
    /// Longest sequence the model was made for, rope scaling included.
    pub max_positions: usize,
    pub norm_eps: f32,
    pub rope: Rope,
    /// Biases on q, k and v (Qwen2), and on the attention output (`attention_bias` of Llama).
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k before rope (Qwen3).
    pub qk_norm: bool,
    /// The output head is the embedding matrix.
    pub tied: bool,
}

/// Rotary position embedding on the two halves of each head (`x[i]`, `x[i + head_dim / 2]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are stretched for long contexts; formulas as in Hugging Face's `modeling_rope_utils`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, smooth between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
    /// YaRN: a ramp over the dimensions, and `attention_factor` on cosine and sine.
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_max_positions: f64,
        attention_factor: f64,
        truncate: bool,
    },
}

impl ModelConfig {
    /// What the product of a query and a key is multiplied by.
    pub fn attention_scale(&self) -> f32 {
        (self.head_dim as f32).powf(-0.5)
    }

    /// Channels of all KV heads together.
    pub fn kv_channels(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Channels of all query heads together.
    pub fn q_channels(&self) -> usize {
        self.heads * self.head_dim
    }
}
