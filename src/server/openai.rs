//! Reply types, as the API spells them. Requests are in [`crate::admission::wire`].

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use utoipa::ToSchema;

/// The bill of a request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    /// Each prompt counted once, however many choices it has.
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    /// Absent in the running counts of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
    /// Absent in the running counts of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<KvCache>,
    /// Absent in the running counts of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

/// Where the time went, in milliseconds; of several choices, the longest. Named as llama-server names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Timings {
    /// From arrival until there was room.
    pub queue_ms: f64,
    /// From then to the first token.
    pub prompt_ms: f64,
    /// From the first token to the last: `completion_tokens - 1` of them, if there is one choice.
    pub predicted_ms: f64,
}

/// Where prompt tokens came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Read from the prefix cache.
    pub cached_tokens: u64,
}

/// What the request's context took, summed over its choices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct KvCache {
    pub profile: String,
    /// Bytes of all pages held at the end, shared ones included.
    pub bytes: u64,
    /// Positions in sealed pages.
    pub sealed_tokens: u64,
    /// Positions held exactly.
    pub window_tokens: u64,
}

/// Reply of `/v1/chat/completions`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// Which of the request's `stop` or `stop_token_ids` ended a choice; absent where its own end or its length did.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    Text(String),
    Token(u32),
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatMessage {
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<String>,
}

/// One `data:` frame of a chat stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunk {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChunkChoice>,
    /// In the last chunk only, and only if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatToken>,
    pub refusal: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatToken {
    #[serde(flatten)]
    pub token: TokenText,
    pub top_logprobs: Vec<TokenText>,
}

/// A token and its log-probability.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenText {
    pub token: String,
    pub logprob: f32,
    /// The token's exact bytes, of which `token` may be a lossy reading.
    pub bytes: Vec<u8>,
}

/// Reply of `/v1/completions`, and one frame of its stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null until the end of a stream.
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// Log-probabilities of a completion, one entry per token; with `echo`, the prompt's come first.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Offset of each token in the choice's text, in characters.
    pub text_offset: Vec<usize>,
    /// Null for the first token of a prompt, which nothing precedes.
    pub token_logprobs: Vec<Option<f32>>,
    /// Text of each token; bytes that are no UTF-8 as `bytes:\xe2\x82`.
    pub tokens: Vec<String>,
    #[schema(value_type = Vec<Option<std::collections::BTreeMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<TopLogprobs>>,
}

/// Alternatives of one position as an object, best first; of two tokens of the same text the better one stands.
#[derive(Clone, Debug, Default)]
pub struct TopLogprobs(pub Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (i, (token, logprob)) in self.0.iter().enumerate() {
            if !self.0[..i].iter().any(|(seen, _)| seen == token) {
                map.serialize_entry(token, logprob)?;
            }
        }
        map.end()
    }
}

/// `GET /v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelCard>,
}

/// One served model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelCard {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// Where the model came from.
    pub root: String,
    /// The base model, of an adapter.
    pub parent: Option<String>,
    /// Longest sequence, prompt and completion together.
    pub max_model_len: u32,
    /// The values `cache_profile` takes.
    pub cache_profiles: Vec<ProfileCard>,
}

/// One way to keep a context.
#[derive(Debug, Serialize, ToSchema)]
pub struct ProfileCard {
    pub name: String,
    /// What a request that names none gets.
    pub default: bool,
    pub bytes_per_token: f64,
    /// Null for the exact cache.
    pub compression: Option<CompressionCard>,
}

/// A compressed profile.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompressionCard {
    /// Share of the key channels kept; null for a budget.
    pub key_rank: Option<f64>,
    /// Share of the value channels kept; null for a budget.
    pub value_rank: Option<f64>,
    /// Bits of a latent element, of keys and of values; null for a budget.
    pub key_bits: Option<u32>,
    pub value_bits: Option<u32>,
    /// Bytes of a position over all layers that were spread by what they buy; null for shares.
    pub budget: Option<u32>,
    /// So many recent positions stay exact.
    pub window: u32,
    /// So many first positions stay exact.
    pub sinks: u32,
}

/// Reply of `/tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokenized {
    pub count: usize,
    pub max_model_len: u32,
    pub tokens: Vec<u32>,
    pub token_strs: Option<Vec<String>>,
}

/// Reply of `/detokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detokenized {
    pub prompt: String,
}

/// Reply of `/version`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    pub version: &'static str,
}

/// Reply of `/health` and `/ready`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    pub status: &'static str,
}

/// Reply of `/admin/drain`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Draining {
    pub status: &'static str,
    pub running: usize,
    pub waiting: usize,
}

/// Reply of `/v1/capacity`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Capacity {
    pub object: &'static str,
    pub arena_bytes: u64,
    pub free_bytes: u64,
    /// Bytes that only the prefix cache holds: given up on demand.
    pub evictable_bytes: u64,
    pub running: usize,
    pub waiting: usize,
    /// The length that `requests_now` and `requests_idle` are about: `?tokens=`, or the whole context.
    pub request_tokens: u32,
    pub profiles: Vec<ProfileCapacity>,
}

/// What fits under one profile.
#[derive(Debug, Serialize, ToSchema)]
pub struct ProfileCapacity {
    pub profile: String,
    pub default: bool,
    pub bytes_per_token: f64,
    /// Longest single request that fits beside what runs now, up to the context.
    pub tokens_now: u32,
    /// The same on an idle server.
    pub tokens_idle: u32,
    /// Bytes of one request of `request_tokens`.
    pub request_bytes: u64,
    /// Further requests of `request_tokens` that fit now.
    pub requests_now: u64,
    pub requests_idle: u64,
}

/// What is known of an adapter once it was read.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdapterFacts {
    /// LoRA, rsLoRA, DoRA, PiSSA, OLoRA or SORSA.
    pub format: &'static str,
    /// Largest rank of an update as it is served.
    pub rank: usize,
    /// Modules it changes.
    pub modules: usize,
    /// Bytes while it is in memory.
    pub bytes: u64,
    /// As the adapter has it.
    pub base_model_name_or_path: Option<String>,
    pub warnings: Vec<String>,
}

/// One adapter of `GET /v1/lora_adapters`.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdapterCard {
    /// The name clients use as `model`.
    pub id: String,
    pub object: &'static str,
    pub source: String,
    /// Which weights it was said to be trained on.
    pub base: String,
    /// The hash of its content; null until it was first read.
    pub generation: Option<String>,
    #[serde(flatten)]
    pub facts: Option<AdapterFacts>,
    pub resident: bool,
    pub pinned: bool,
    /// Unix seconds of the latest load.
    pub created: u64,
    /// Requests under this name so far.
    pub requests: u64,
    /// Running requests on its generation.
    pub active_leases: usize,
    /// Generations it may be rolled back to, the latest last.
    pub history: Vec<String>,
}

/// One generation that is in memory.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdapterGenerationCard {
    pub generation: String,
    pub aliases: Vec<String>,
    pub rank: usize,
    pub bytes: u64,
    /// Of its copy on the device; null where there is none.
    pub device_bytes: Option<u64>,
    /// No name points to it any more.
    pub retired: bool,
    pub active_leases: usize,
}

/// `GET /v1/lora_adapters`.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdapterList {
    pub object: &'static str,
    pub data: Vec<AdapterCard>,
    pub generations: Vec<AdapterGenerationCard>,
    pub resident_bytes: u64,
    pub max_bytes: u64,
    /// Null where no device serves.
    pub max_device_bytes: Option<u64>,
    pub max_rank: usize,
}

/// Reply of `/v1/load_lora_adapter` and `/v1/rollback_lora_adapter` as JSON.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdapterLoaded {
    pub object: &'static str,
    pub id: String,
    pub generation: String,
    /// What the name pointed to before, if that was another.
    pub replaced: Option<String>,
    #[serde(flatten)]
    pub facts: AdapterFacts,
    /// Zero where it was in memory.
    pub seconds: f64,
}

/// Reply of `/v1/unload_lora_adapter` as JSON.
#[derive(Debug, Serialize, ToSchema)]
pub struct AdapterUnloaded {
    pub object: &'static str,
    pub id: String,
    /// Bytes that are free now.
    pub freed_bytes: u64,
    /// Requests that finish on it.
    pub requests_finishing: usize,
    /// Bytes that are free once they have.
    pub bytes_when_finished: u64,
}
