//! A request that can run, and the words for how it ends. Plain data: built once by admission,
//! trusted by everything below it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::ids::{AdapterGeneration, ProfileIndex, TokenId};

/// Everything the engine needs to generate one sequence. `n` choices are `n` requests with derived seeds.
///
/// Invariants, checked by admission before one is built: the prompt is not empty, every token id is below
/// the logits width, `prompt.len() + max_new_tokens` fits the context, and every number is finite and in range.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    pub prompt: Arc<[TokenId]>,
    /// Zero only scores the prompt.
    pub max_new_tokens: u32,
    /// EOS and stop ids are ignored before this many tokens are generated.
    pub min_new_tokens: u32,
    /// Generation ends after one of these (unless `min_new_tokens` is not reached); sorted.
    pub stop_tokens: Arc<[TokenId]>,
    pub sampling: Sampling,
    /// How many alternatives to report beside each sampled token's log-probability; `None` reports nothing.
    pub logprobs: Option<u32>,
    /// The same for every prompt position (`echo` with `logprobs`); such a request reads no prefix cache.
    pub prompt_logprobs: Option<u32>,
    pub profile: ProfileIndex,
    pub adapter: AdapterGeneration,
    /// Lower runs earlier; equal values in order of arrival.
    pub priority: i32,
    /// Keyed into the prefix cache: only requests of the same salt share pages.
    pub cache_salt: u64,
    /// Give up if nothing was begun after this long in the queue.
    pub queue_timeout: Duration,
}

/// How the next token is chosen from the logits. Applied in this order: bias and penalties, then
/// temperature, then top-k, top-p, min-p, then the draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Zero means greedy.
    pub temperature: f32,
    /// `1.0` keeps everything.
    pub top_p: f32,
    /// Zero keeps everything.
    pub top_k: u32,
    /// Zero keeps everything; else drops tokens below `min_p` times the best probability.
    pub min_p: f32,
    /// `1.0` is none. Divides positive and multiplies negative logits of tokens in prompt or output.
    pub repetition_penalty: f32,
    /// Subtracted once from every token in the output.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    pub logit_bias: Arc<BTreeMap<TokenId, f32>>,
    /// The draw of the `i`-th token is a pure function of `(seed, i)`, whatever else is in the batch.
    pub seed: u64,
}

impl Sampling {
    /// Greedy, without penalties.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Arc::default(),
            seed: 0,
        }
    }
}

/// Why a sequence ended normally.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum FinishReason {
    /// EOS or a stop token (stop strings are matched above the engine).
    Stop,
    /// `max_new_tokens` reached.
    Length,
}

/// Why a sequence ended abnormally. The message for the client is made at the HTTP edge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Logits were not finite.
    Numerical,
    /// The sequence alone outgrew the cache.
    OutOfPages,
    /// Waited longer than its `queue_timeout`.
    QueueTimeout,
    /// The engine panicked or its backend failed on this request.
    Internal(String),
    /// The server is shutting down and its deadline has passed.
    Draining,
    /// Its client left so many events unread that no more were kept for it.
    Unread,
}

/// A token's log-probability under the model's own distribution (before bias, penalties,
/// temperature and truncation, as vLLM reports it), with the best alternatives, best first.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub logprob: f32,
    pub top: Vec<(TokenId, f32)>,
}

/// What the cache of one sequence took when it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheUse {
    /// Bytes of all pages the sequence held at its end, shared ones included.
    pub bytes: u64,
    /// Positions in sealed pages.
    pub sealed_tokens: u32,
    /// Positions held exactly (window and sinks, or everything for `full`).
    pub window_tokens: u32,
}

/// What the engine tells the owner of a sequence, in order: at most one `Prompt`, any number of `Token`s,
/// then exactly one of `Done` and `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Log-probabilities of prompt positions `1..n` (position 0 has none); only when asked for.
    Prompt {
        logprobs: Vec<TokenLogprob>,
    },
    /// A stop token is told like any other, as the last one: it has a log-probability and is billed, and the edge keeps it out of the text.
    Token {
        id: TokenId,
        logprob: Option<TokenLogprob>,
    },
    Done {
        reason: FinishReason,
        usage: Usage,
    },
    Failed {
        failure: Failure,
    },
}

/// The bill of one sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Prompt positions that were read from the prefix cache.
    pub cached_tokens: u32,
    pub completion_tokens: u32,
    pub cache: CacheUse,
    pub timings: Timings,
}

/// Where the time of one sequence went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timings {
    /// From arrival at the engine's door until its first row was planned.
    pub queue: Duration,
    /// From then to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}
