//! Wire request to tokens to [`GenerateRequest`]s, or a [`Refusal`]. Everything below trusts what comes out of here.
//!
//! The order of the checks is fixed, cheapest first: JSON, types and ranges, the model's name, a bound on the prompt's
//! length from its bytes, tokens, and what they leave room for. Nothing here blocks but the tokenizer and the chat
//! template; callers keep these calls off the async threads.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::ids::{AdapterGeneration, ProfileIndex, TokenId};
use crate::kv::layout::Profile;
use crate::request::{GenerateRequest, Sampling};
pub use crate::text::template::Chat;
use crate::text::{Start, Stops};

pub mod json;
pub mod wire;

use json::Fields;
use wire::{ChatRequest, CompletionRequest, DetokenizeRequest, Options, Prompts, Source, StreamOptions, TokenizeRequest};

/// Text to tokens and back, and messages to a prompt, for one model. Called from threads that may block.
pub trait Codec: Send + Sync {
    /// Token ids of `text`. With `parse_special`, the text of a special token becomes that token.
    ///
    /// # Errors
    /// Where the vocabulary has no way to spell the text.
    fn encode(&self, text: &str, add_special_tokens: bool, parse_special: bool) -> Result<Vec<TokenId>, EncodeError>;
    /// Text of `ids`, with U+FFFD for what is no UTF-8.
    fn decode(&self, ids: &[TokenId], skip_special: bool) -> String;
    /// The exact bytes of one token.
    fn token_bytes(&self, id: TokenId) -> Vec<u8>;
    /// Whether a token is left out of generated text.
    fn is_special(&self, id: TokenId) -> bool;
    /// Width of the logits; valid ids are below it.
    fn vocab(&self) -> usize;
    /// Bytes of input text that one token covers at most; `None` if a normaliser may drop text.
    fn max_token_bytes(&self) -> Option<usize>;
    /// The prompt of a chat, as tokens.
    ///
    /// # Errors
    /// The chat template's own complaint.
    fn render(&self, chat: &Chat<'_>) -> Result<Vec<TokenId>, TemplateError>;
    /// Turns the tokens of one choice into text, cut at the first of `stop` that is complete after more than `min_tokens`.
    fn stream<'a>(&'a self, start: Start, stop: &Stops, include_stop: bool, min_tokens: u32) -> Box<dyn TextStream + Send + 'a>;
}

/// Text that the model's vocabulary cannot spell.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EncodeError {
    pub message: String,
}

/// The chat template refused or failed; the message may go to the client (shortened).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TemplateError {
    pub message: String,
}

/// Tokens of one choice to text that may be sent: incomplete UTF-8 and possible beginnings of a stop string are held back.
pub trait TextStream {
    fn push(&mut self, id: TokenId) -> Piece;
    /// What was held back, when no more tokens come and no stop string was met.
    fn finish(&mut self) -> String;
}

/// Text that may be sent now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    /// Which stop string was met, if one was; `text` ends before it (or behind it, if it is to be kept).
    pub stopped: Option<usize>,
}

/// What admission must know of the loaded model.
#[derive(Clone)]
pub struct Model {
    /// Names it is served under; replies carry the first where a request names none.
    pub names: Vec<String>,
    /// Where it came from: a folder or a name, as `/v1/models` shows it.
    pub root: String,
    /// Unix seconds of loading.
    pub created: u64,
    /// Longest sequence, prompt and completion together.
    pub context: u32,
    pub codec: Arc<dyn Codec>,
    /// In the order of [`ProfileIndex`]; not empty.
    pub profiles: Vec<ServedProfile>,
    pub default_profile: ProfileIndex,
    pub defaults: Defaults,
    /// Longest wait of a request for the first token of its first sequence.
    pub queue_timeout: Duration,
    /// Where adapters are served.
    pub adapters: Option<Arc<dyn Adapters>>,
}

/// Which names are adapters'.
pub trait Adapters: Send + Sync {
    /// Whether a request may name it. It need not be resident, or even have been read.
    fn knows(&self, name: &str) -> bool;
}

/// A cache profile on this model.
#[derive(Clone, Debug, PartialEq)]
pub struct ServedProfile {
    pub profile: Profile,
    /// Bytes one more position costs past the window.
    pub bytes_per_token: f64,
}

/// What a request that says nothing gets: the model's `generation_config.json`, resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    pub temperature: f64,
    pub top_p: f64,
    /// Zero is off.
    pub top_k: u32,
    pub min_p: f64,
    pub repetition_penalty: f64,
    pub max_new_tokens: Option<u32>,
    pub eos: Vec<TokenId>,
}

impl Default for Defaults {
    fn default() -> Self {
        Defaults { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0, max_new_tokens: None, eos: Vec::new() }
    }
}

/// Why a request is not taken. It carries places and numbers, never the client's content.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("{fault} (line {line}, column {column})")]
    Json { fault: &'static str, line: usize, column: usize },
    /// `param` is empty for the body itself.
    #[error("{} must be {want}", place(param))]
    Type { param: String, want: &'static str },
    #[error("{} {rule}", place(param))]
    Value { param: String, rule: String },
    #[error("{param} {what}")]
    Unsupported { param: String, what: &'static str },
    #[error("the requested model is not served here; GET /v1/models lists the names")]
    UnknownModel,
    #[error("{}", context_sentence(*context, *prompt, *at_least, *max_new))]
    ContextLength {
        param: &'static str,
        context: u32,
        prompt: u64,
        /// `prompt` is a lower bound: the text was not tokenised.
        at_least: bool,
        max_new: Option<u32>,
    },
    /// Too much to be tokenised at all, whatever it would come to.
    #[error(
        "{param} has {bytes} bytes of text, and this server tokenises at most {most} at once, as this model's maximum context length is {context} tokens"
    )]
    TextLength { param: &'static str, bytes: usize, most: usize, context: u32 },
    #[error("the chat template refused the messages: {message}")]
    Template { message: String },
}

fn place(param: &str) -> &str {
    if param.is_empty() { "the body" } else { param }
}

/// Clients look for the first sentence, as vLLM writes it.
fn context_sentence(context: u32, prompt: u64, at_least: bool, max_new: Option<u32>) -> String {
    let least = if at_least { "at least " } else { "" };
    let head =
        format!("This model's maximum context length is {context} tokens. However, your prompt contains {least}{prompt} input tokens");
    match max_new {
        Some(n) => format!(
            "{head} and you requested {n} output tokens, {} in total. Please reduce the length of the prompt or max_tokens.",
            prompt + u64::from(n)
        ),
        None => format!("{head}, which leaves no room for an answer. Please reduce the length of the prompt."),
    }
}

/// A request that can run: the engine's part and what the reply needs.
#[derive(Debug)]
pub struct Admitted {
    /// One per prompt.
    pub prompts: Vec<Prompt>,
    /// `prompts.len() * n`, in the order of the choices' index: prompt by prompt.
    pub requests: Vec<GenerateRequest>,
    pub reply: Reply,
}

/// One prompt of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub tokens: Arc<[TokenId]>,
    /// As the client wrote it; `None` for token ids and chats.
    pub text: Option<String>,
}

impl Prompt {
    /// The text that `echo` puts before its choices.
    pub fn echo(&self, codec: &dyn Codec) -> Cow<'_, str> {
        self.text.as_deref().map_or_else(|| codec.decode(&self.tokens, false).into(), Cow::Borrowed)
    }
}

/// How the answer is to be told.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The name the client used.
    pub model: String,
    /// The adapter that name is of. Requests carry no generation of it yet: whoever submits them takes a lease first.
    pub adapter: Option<String>,
    /// Choices per prompt.
    pub n: usize,
    pub stop: Vec<String>,
    /// Those the client gave, which are not all that end an answer.
    pub stop_token_ids: Vec<TokenId>,
    pub include_stop: bool,
    /// Nothing ends an answer before so many.
    pub min_tokens: u32,
    pub echo: bool,
    /// Whether the answer goes on from what the client wrote, its text or the last message, rather than standing alone.
    pub continues: bool,
    /// Alternatives to list beside each token.
    pub logprobs: Option<u32>,
    pub return_token_ids: bool,
    /// `None`: in one piece.
    pub stream: Option<StreamOptions>,
}

impl Model {
    /// The canonical name.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// The name replies carry for a model name, and the adapter's that is meant: its own name, or `model:adapter`.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`].
    pub fn resolve(&self, name: Option<&str>) -> Result<(String, Option<String>), Refusal> {
        let Some(name) = name else { return Ok((self.name().to_owned(), None)) };
        if self.names.iter().any(|known| known == name) {
            return Ok((name.to_owned(), None));
        }
        let adapters = self.adapters.as_ref().ok_or(Refusal::UnknownModel)?;
        let behind_a_name = self.names.iter().filter_map(|known| name.strip_prefix(known.as_str())?.strip_prefix(':'));
        let adapter = std::iter::once(name).chain(behind_a_name).find(|name| adapters.knows(name)).ok_or(Refusal::UnknownModel)?;
        Ok((name.to_owned(), Some(adapter.to_owned())))
    }

    /// Index of a profile by its name, or of the default one.
    fn profile(&self, name: Option<&str>) -> Result<ProfileIndex, Refusal> {
        let Some(name) = name else { return Ok(self.default_profile) };
        let index = self.profiles.iter().position(|p| p.profile.name == name).and_then(|i| u8::try_from(i).ok());
        index.map(ProfileIndex).ok_or_else(|| Refusal::Value { param: "cache_profile".to_owned(), rule: self.known_profiles() })
    }

    fn known_profiles(&self) -> String {
        let names: Vec<_> = self.profiles.iter().map(|p| p.profile.name.as_str()).collect();
        format!("must be one of {}", names.join(", "))
    }

    /// A chat completion, from its body. `entropy` seeds it if the client gives no seed.
    pub fn admit_chat(&self, body: &[u8], entropy: u64) -> Result<Admitted, Refusal> {
        self.chat(Fields::body(json::parse(body)?), entropy)
    }

    /// A text completion, from its body.
    pub fn admit_completion(&self, body: &[u8], entropy: u64) -> Result<Admitted, Refusal> {
        self.completion(Fields::body(json::parse(body)?), entropy)
    }

    /// Either, and whether it is a chat: one that has `messages` is.
    pub fn admit_either(&self, body: &[u8], entropy: u64) -> Result<(bool, Admitted), Refusal> {
        let fields = Fields::body(json::parse(body)?);
        let chat = fields.holds("messages");
        Ok((chat, if chat { self.chat(fields, entropy)? } else { self.completion(fields, entropy)? }))
    }

    fn chat(&self, fields: Fields, entropy: u64) -> Result<Admitted, Refusal> {
        let request = ChatRequest::read(fields)?;
        let target = self.target(&request.options)?;
        let tokens = self.render(&Chat {
            messages: &request.messages,
            tools: None,
            add_generation_prompt: request.add_generation_prompt,
            continue_final_message: request.continue_final_message,
            kwargs: &request.chat_template_kwargs,
        })?;
        let logprobs = request.logprobs.then_some(request.top_logprobs.unwrap_or(0));
        let prompts = vec![Prompt { tokens: tokens.into(), text: None }];
        let continues = request.continue_final_message;
        self.build(
            &request.options,
            Ask { target, prompts, new_tokens: None, logprobs, echo: false, continues, entropy, param: "messages" },
        )
    }

    fn completion(&self, fields: Fields, entropy: u64) -> Result<Admitted, Refusal> {
        let request = CompletionRequest::read(fields)?;
        let target = self.target(&request.options)?;
        let prompts = match request.prompt {
            Prompts::Texts(texts) => {
                // All of them first: the bound costs nothing, the tokenizer does.
                texts.iter().try_for_each(|text| self.bound(text.len(), "prompt"))?;
                let encode = |text: String| {
                    let tokens = self.encode(&text, request.add_special_tokens)?;
                    Ok(Prompt { tokens: tokens.into(), text: Some(text) })
                };
                texts.into_iter().map(encode).collect::<Result<_, Refusal>>()?
            }
            Prompts::Tokens(lists) => {
                lists.iter().try_for_each(|ids| self.check_ids(ids, "prompt"))?;
                lists.into_iter().map(|ids| Prompt { tokens: ids.into(), text: None }).collect()
            }
        };
        let CompletionRequest { options, new_tokens, logprobs, echo, .. } = request;
        self.build(&options, Ask { target, prompts, new_tokens, logprobs, echo, continues: true, entropy, param: "prompt" })
    }

    /// `/tokenize`: the tokens, and whether their texts are wanted.
    pub fn tokenize(&self, body: &[u8]) -> Result<(Vec<TokenId>, bool), Refusal> {
        let request = TokenizeRequest::read(Fields::body(json::parse(body)?))?;
        self.resolve(request.model.as_deref())?;
        let tokens = match request.source {
            // More than the context may be asked for here, as when a text is to be cut into parts.
            Source::Text { prompt, add_special_tokens } => {
                self.bound_text(prompt.len(), "prompt")?;
                self.encode(&prompt, add_special_tokens)?
            }
            Source::Chat { messages, add_generation_prompt, continue_final_message, chat_template_kwargs } => {
                let (messages, kwargs) = (&messages, &chat_template_kwargs);
                self.render(&Chat { messages, tools: None, add_generation_prompt, continue_final_message, kwargs })?
            }
        };
        Ok((tokens, request.return_token_strs))
    }

    /// `/detokenize`: the text.
    pub fn detokenize(&self, body: &[u8]) -> Result<String, Refusal> {
        let request = DetokenizeRequest::read(Fields::body(json::parse(body)?))?;
        self.resolve(request.model.as_deref())?;
        self.check_ids(&request.tokens, "tokens")?;
        Ok(self.codec.decode(&request.tokens, false))
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, Refusal> {
        let cannot = |_: EncodeError| Refusal::Value {
            param: "prompt".to_owned(),
            rule: "has text that this model's vocabulary cannot spell".to_owned(),
        };
        self.codec.encode(text, add_special_tokens, true).map_err(cannot)
    }

    fn render(&self, chat: &Chat<'_>) -> Result<Vec<TokenId>, Refusal> {
        let contents = chat.messages.as_array().into_iter().flatten().map(|m| &m["content"]);
        let texts = contents.flat_map(|content| match content {
            Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
            content => Vec::from_iter(content.as_str()),
        });
        self.bound(texts.map(str::len).sum(), "messages")?;
        // What a template may show beside contents; whether it does is its own business.
        self.bound_text(text_bytes(chat.messages), "messages")?;
        self.codec.render(chat).map_err(|error| Refusal::Template { message: error.message })
    }

    /// Refuses text that no tokenisation could make short enough, or that is too much for any, without tokenising it.
    fn bound(&self, bytes: usize, param: &'static str) -> Result<(), Refusal> {
        if let Some(most) = self.codec.max_token_bytes() {
            let least = (bytes / most.max(1)) as u64;
            if least > u64::from(self.context) {
                return Err(Refusal::ContextLength { param, context: self.context, prompt: least, at_least: true, max_new: None });
            }
        }
        self.bound_text(bytes, param)
    }

    /// Refuses more text than is ever tokenised at once.
    fn bound_text(&self, bytes: usize, param: &'static str) -> Result<(), Refusal> {
        let most = (self.context as usize * TEXT_BYTES_PER_POSITION).max(TEXT_BYTES);
        if bytes <= most {
            return Ok(());
        }
        Err(Refusal::TextLength { param, bytes, most, context: self.context })
    }

    fn check_ids(&self, ids: &[TokenId], param: &str) -> Result<(), Refusal> {
        let vocab = self.codec.vocab();
        if ids.iter().any(|&id| id as usize >= vocab) {
            return Err(Refusal::Value { param: param.to_owned(), rule: format!("has a token id that is not below {vocab}") });
        }
        Ok(())
    }

    fn target(&self, options: &Options) -> Result<Target, Refusal> {
        let (model, adapter) = self.resolve(options.model.as_deref())?;
        let profile = self.profile(options.cache_profile.as_deref())?;
        self.check_ids(&options.stop_token_ids, "stop_token_ids")?;
        let biased: Vec<TokenId> = options.logit_bias.iter().map(|&(id, _)| id).collect();
        self.check_ids(&biased, "logit_bias")?;
        Ok(Target { model, adapter, profile })
    }

    fn build(&self, options: &Options, ask: Ask) -> Result<Admitted, Refusal> {
        let sampling = self.sampling(options);
        let stop_tokens = self.stop_tokens(options);
        let cache_salt = options.cache_salt.as_deref().map_or(0, salt);
        let mut requests = Vec::with_capacity(ask.prompts.len() * options.n as usize);
        let mut numbers = 0;
        for prompt in &ask.prompts {
            let max_new_tokens = self.room(options, &ask, prompt.tokens.len())?;
            if options.min_tokens > max_new_tokens {
                let rule = format!("must not exceed the {max_new_tokens} tokens this request may generate");
                return Err(Refusal::Value { param: "min_tokens".to_owned(), rule });
            }
            numbers += u64::from(options.n) * numbers_of(options, &ask, prompt.tokens.len() as u64, u64::from(max_new_tokens));
            if numbers > NUMBERS_MAX {
                let rule = format!(
                    "over all choices may come to more than the {NUMBERS_MAX} numbers, tokens of repeated prompts among them, of one answer; ask for fewer choices or alternatives, or give max_tokens"
                );
                let param = match (ask.logprobs, ask.echo) {
                    (Some(_), _) => "logprobs",
                    (None, true) => "echo",
                    (None, false) => "return_token_ids",
                };
                return Err(Refusal::Value { param: param.to_owned(), rule });
            }
            for choice in 0..options.n {
                // Without a seed of the client's all sequences differ, those of equal prompts too, as whoever repeats one wants more answers.
                let seed = match options.seed {
                    Some(seed) => derive_seed(seed, choice),
                    None => derive_seed(ask.entropy, requests.len() as u32),
                };
                requests.push(GenerateRequest {
                    prompt: prompt.tokens.clone(),
                    max_new_tokens,
                    min_new_tokens: options.min_tokens,
                    stop_tokens: stop_tokens.clone(),
                    sampling: Sampling { seed, ..sampling.clone() },
                    logprobs: ask.logprobs,
                    prompt_logprobs: ask.logprobs.filter(|_| ask.echo),
                    profile: ask.target.profile,
                    adapter: AdapterGeneration::default(),
                    priority: options.priority,
                    cache_salt,
                    // A request that was begun is not given up for those of its sequences that wait behind the others.
                    queue_timeout: if requests.is_empty() { self.queue_timeout } else { Duration::MAX },
                });
            }
        }
        let reply = Reply {
            adapter: ask.target.adapter,
            model: ask.target.model,
            n: options.n as usize,
            stop: options.stop.clone(),
            stop_token_ids: options.stop_token_ids.clone(),
            include_stop: options.include_stop_str_in_output,
            min_tokens: options.min_tokens,
            echo: ask.echo,
            continues: ask.continues,
            logprobs: ask.logprobs,
            return_token_ids: options.return_token_ids,
            stream: options.stream.then(|| options.stream_options.unwrap_or_default()),
        };
        Ok(Admitted { prompts: ask.prompts, requests, reply })
    }

    /// How many tokens a prompt of `len` tokens may generate.
    fn room(&self, options: &Options, ask: &Ask, len: usize) -> Result<u32, Refusal> {
        let param = ask.param;
        if len == 0 {
            return Err(Refusal::Value { param: param.to_owned(), rule: "is empty".to_owned() });
        }
        let too_long =
            |param, max_new| Refusal::ContextLength { param, context: self.context, prompt: len as u64, at_least: false, max_new };
        let left = u32::try_from(len).ok().and_then(|len| self.context.checked_sub(len)).ok_or(too_long(param, None))?;
        match options.max_new_tokens() {
            Some((n, _)) if n <= left => Ok(n),
            Some((n, name)) if left > 0 => Err(too_long(name, Some(n))),
            None if left > 0 => Ok(ask.new_tokens.or(self.defaults.max_new_tokens).map_or(left, |n| n.clamp(1, left))),
            _ => Err(too_long(param, None)),
        }
    }

    fn sampling(&self, options: &Options) -> Sampling {
        let defaults = &self.defaults;
        let temperature = options.temperature.unwrap_or(defaults.temperature);
        let min_p = options.min_p.unwrap_or(defaults.min_p);
        Sampling {
            // Below the floor logits overflow when divided; what it would draw is the best token anyway.
            temperature: if temperature < TEMPERATURE_FLOOR { 0.0 } else { temperature as f32 },
            // Narrowing must not make a zero of a small share: the best token always stays.
            top_p: (options.top_p.unwrap_or(defaults.top_p) as f32).max(f32::MIN_POSITIVE),
            top_k: options.top_k.map_or(defaults.top_k, |k| u32::try_from(k).unwrap_or(0)),
            min_p: min_p as f32,
            repetition_penalty: options.repetition_penalty.unwrap_or(defaults.repetition_penalty) as f32,
            presence_penalty: options.presence_penalty as f32,
            frequency_penalty: options.frequency_penalty as f32,
            logit_bias: Arc::new(options.logit_bias.iter().map(|&(id, bias)| (id, bias as f32)).collect::<BTreeMap<_, _>>()),
            seed: 0,
        }
    }

    fn stop_tokens(&self, options: &Options) -> Arc<[TokenId]> {
        let eos = if options.ignore_eos { &[][..] } else { &self.defaults.eos };
        let mut all: Vec<TokenId> = options.stop_token_ids.iter().chain(eos).copied().collect();
        all.sort_unstable();
        all.dedup();
        all.into()
    }
}

/// Text is tokenised at once up to so many bytes for each position of the context, and up to [`TEXT_BYTES`] in any case. A token covers 3 to
/// 5 bytes of most texts, and a tokenizer takes some 270 bytes of memory for each of the text: this is all that bounds it where a
/// normaliser may drop text, or where some token is very long.
pub const TEXT_BYTES_PER_POSITION: usize = 32;
/// See [`TEXT_BYTES_PER_POSITION`].
pub const TEXT_BYTES: usize = 1 << 20;

/// Most numbers of one answer, over all of its choices: log-probabilities of tokens and of the alternatives beside them, and tokens of a prompt
/// that is told again with each choice, as ids or as text. While they are gathered each takes 8 bytes, and as JSON some 70.
pub const NUMBERS_MAX: u64 = 1 << 25;

/// The numbers that one choice may come to.
fn numbers_of(options: &Options, ask: &Ask, prompt: u64, new: u64) -> u64 {
    let told = prompt * (u64::from(options.return_token_ids) + u64::from(ask.echo));
    let scored = if ask.echo { prompt + new } else { new };
    told + ask.logprobs.map_or(0, |alternatives| scored * (1 + u64::from(alternatives)))
}

/// Bytes of all strings in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(entries) => entries.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

/// Temperatures below it are greedy.
pub const TEMPERATURE_FLOOR: f64 = 1e-3;

/// What a request aims at.
struct Target {
    model: String,
    adapter: Option<String>,
    profile: ProfileIndex,
}

/// What is left to build requests from, once the prompts are tokens.
struct Ask {
    target: Target,
    prompts: Vec<Prompt>,
    /// How many of a request that does not say, before the model's own default.
    new_tokens: Option<u32>,
    logprobs: Option<u32>,
    echo: bool,
    continues: bool,
    entropy: u64,
    /// Which field a too long prompt is blamed on.
    param: &'static str,
}

/// The seed itself for the first, well-mixed others after it (splitmix64's finaliser). A client's seed is counted on by the choice within
/// its prompt only, so a prompt's answers do not depend on its neighbours in the list.
fn derive_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A salt as the prefix cache takes it; zero is "no salt", which no salt hashes to.
fn salt(text: &str) -> u64 {
    let hash = blake3::derive_key("strait 2026 prefix cache salt", text.as_bytes());
    let (head, _) = hash.split_first_chunk::<8>().expect("a hash has 32 bytes");
    u64::from_le_bytes(*head).max(1)
}
