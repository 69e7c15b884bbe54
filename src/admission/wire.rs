//! Request bodies as the API spells them, read field by field: types, ranges and combinations that need no knowledge
//! of the model. The structs are also the schemas of `/openapi.json`, so that what is documented is what is read.

use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};

use super::Refusal;
use super::json::{Fields, Json};

/// Most messages of a chat.
pub const MESSAGES_MAX: usize = 4096;
/// Tokens of a text completion that does not say how many, as OpenAI and vLLM have it: clients of that API count on it.
pub const COMPLETION_TOKENS: u32 = 16;
/// Most prompts of one completions request.
pub const PROMPTS_MAX: usize = 1024;
/// Most choices per prompt, as OpenAI has it.
pub const CHOICES_MAX: u32 = 128;
/// Most sequences one request may become.
pub const SEQUENCES_MAX: usize = 1024;
/// Most stop strings, and their longest length in bytes. OpenAI takes 4; evaluation harnesses send more to other servers.
pub const STOPS_MAX: usize = 32;
pub const STOP_BYTES_MAX: usize = 256;
/// Most stop token ids.
pub const STOP_TOKENS_MAX: usize = 256;
/// Most entries of `logit_bias`.
pub const BIASES_MAX: usize = 1024;
/// Most alternatives beside a token's log-probability.
pub const LOGPROBS_MAX: u32 = 20;
/// Most entries of `chat_template_kwargs`.
pub const KWARGS_MAX: usize = 32;

/// What a stream carries beside the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ToSchema)]
pub struct StreamOptions {
    /// A last chunk with `usage`.
    #[schema(default = false, required = false)]
    pub include_usage: bool,
    /// Running token counts in every chunk.
    #[schema(default = false, required = false)]
    pub continuous_usage_stats: bool,
}

/// Fields that chat and text completions share.
#[derive(Clone, Debug, Default, PartialEq, ToSchema)]
pub struct Options {
    /// A served model name; absent means the first one.
    pub model: Option<String>,
    #[schema(default = false, required = false)]
    pub stream: bool,
    pub stream_options: Option<StreamOptions>,
    /// Choices per prompt.
    #[schema(minimum = 1, maximum = 128, default = 1, required = false)]
    pub n: u32,
    /// Most tokens to generate. Absent means 16 in a text completion. In a chat it means, and null means everywhere, as many as the context
    /// leaves room for, or the model's own default.
    pub max_tokens: Option<u32>,
    /// The same under its newer name; both given must be equal.
    pub max_completion_tokens: Option<u32>,
    /// EOS, `stop_token_ids` and `stop` end nothing before so many tokens.
    #[schema(default = 0, required = false)]
    pub min_tokens: u32,
    /// Zero, and anything below 0.001, is greedy.
    #[schema(minimum = 0.0, maximum = 2.0)]
    pub temperature: Option<f64>,
    #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
    pub top_p: Option<f64>,
    /// -1 or 0 is off.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub min_p: Option<f64>,
    #[schema(minimum = -2.0, maximum = 2.0, default = 0.0, required = false)]
    pub presence_penalty: f64,
    #[schema(minimum = -2.0, maximum = 2.0, default = 0.0, required = false)]
    pub frequency_penalty: f64,
    #[schema(minimum = 0.001, maximum = 2.0)]
    pub repetition_penalty: Option<f64>,
    /// Token id to a value from -100 to 100, at most 1024 of them.
    #[schema(value_type = Option<std::collections::BTreeMap<String, f64>>)]
    pub logit_bias: Vec<(u32, f64)>,
    /// Any 64-bit integer; the same seed and request give the same text. Absent means a random one.
    #[schema(value_type = Option<i64>)]
    pub seed: Option<u64>,
    /// A string or up to 32, each of 1 to 256 bytes.
    #[schema(schema_with = text_or_texts, required = false)]
    pub stop: Vec<String>,
    #[schema(value_type = Option<Vec<u32>>)]
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop string in the text.
    #[schema(default = false, required = false)]
    pub include_stop_str_in_output: bool,
    #[schema(default = false, required = false)]
    pub ignore_eos: bool,
    /// Lower runs earlier.
    #[schema(default = 0, required = false)]
    pub priority: i32,
    /// How this request's context is kept; see `/v1/models`.
    pub cache_profile: Option<String>,
    /// Only requests of the same salt share cached prefixes. 1 to 64 of `A-Z a-z 0-9 _ -`.
    pub cache_salt: Option<String>,
    /// Also return token ids.
    #[schema(default = false, required = false)]
    pub return_token_ids: bool,
    /// Accepted for compatibility; not used.
    pub user: Option<String>,
}

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug, PartialEq, ToSchema)]
pub struct ChatRequest {
    /// Each has a `role` and a `content`: a string or an array of `{"type":"text","text":...}` parts.
    #[schema(value_type = Vec<Message>)]
    pub messages: Value,
    #[serde(flatten)]
    pub options: Options,
    #[schema(default = false, required = false)]
    pub logprobs: bool,
    /// Needs `logprobs: true`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u32>,
    #[schema(default = true, required = false)]
    pub add_generation_prompt: bool,
    /// Go on with the last message instead of beginning a new one; excludes `add_generation_prompt`.
    #[schema(default = false, required = false)]
    pub continue_final_message: bool,
    /// Extra variables of the chat template: scalars only.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Map<String, Value>,
    /// One of these variables, where OpenAI's clients send it.
    pub reasoning_effort: Option<String>,
}

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, ToSchema)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant`, `tool` or `function`.
    pub role: String,
    #[schema(schema_with = text_or_parts)]
    pub content: Value,
    pub name: Option<String>,
}

/// `POST /v1/completions`.
#[derive(Clone, Debug, PartialEq, ToSchema)]
pub struct CompletionRequest {
    /// A string, up to 1024 strings, a list of token ids, or a list of such lists.
    #[schema(schema_with = any_prompt)]
    pub prompt: Prompts,
    #[serde(flatten)]
    pub options: Options,
    /// How many tokens, where the body has no `max_tokens` under either name.
    #[schema(ignore)]
    pub new_tokens: Option<u32>,
    /// Put the prompt before the completion. With `logprobs`, the prompt's log-probabilities too; `max_tokens` may then be 0.
    #[schema(default = false, required = false)]
    pub echo: bool,
    /// So many alternatives beside each token's log-probability.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<u32>,
    /// Whether the tokenizer adds its special tokens (BOS) to a text prompt.
    #[schema(default = true, required = false)]
    pub add_special_tokens: bool,
}

/// The prompts of a completions request, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompts {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

/// `POST /tokenize`: a `prompt` or `messages`.
#[derive(Clone, Debug, PartialEq, ToSchema)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    #[serde(flatten)]
    pub source: Source,
    /// Also return each token's text.
    #[schema(default = false, required = false)]
    pub return_token_strs: bool,
}

/// What `/tokenize` is to encode.
#[derive(Clone, Debug, PartialEq, ToSchema)]
#[serde(untagged)]
pub enum Source {
    Text {
        prompt: String,
        #[schema(default = true, required = false)]
        add_special_tokens: bool,
    },
    Chat {
        #[schema(value_type = Vec<Message>)]
        messages: Value,
        #[schema(default = true, required = false)]
        add_generation_prompt: bool,
        #[schema(default = false, required = false)]
        continue_final_message: bool,
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Map<String, Value>,
    },
}

/// `POST /detokenize`.
#[derive(Clone, Debug, PartialEq, ToSchema)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}

fn array_of(item: impl Into<RefOr<Schema>>) -> RefOr<Schema> {
    ArrayBuilder::new().items(item.into()).into()
}

fn plain(kind: Type) -> RefOr<Schema> {
    ObjectBuilder::new().schema_type(kind).into()
}

fn text_or_texts() -> RefOr<Schema> {
    OneOfBuilder::new().item(plain(Type::String)).item(array_of(plain(Type::String))).into()
}

fn text_or_parts() -> RefOr<Schema> {
    let part = ObjectBuilder::new().property("type", plain(Type::String)).property("text", plain(Type::String));
    let part = part.required("type").required("text");
    OneOfBuilder::new().item(plain(Type::String)).item(array_of(part)).into()
}

fn any_prompt() -> RefOr<Schema> {
    let ids = array_of(plain(Type::Integer));
    OneOfBuilder::new().item(plain(Type::String)).item(array_of(plain(Type::String))).item(ids.clone()).item(array_of(ids)).into()
}

/// Values of a field we do not serve that ask for nothing.
#[derive(Clone, Copy)]
enum Inert {
    /// Only null or absence.
    Never,
    Bool(bool),
    Number(f64),
    /// Zero or below, as samplers are switched off.
    Off,
    EmptyArray,
    EmptyText,
    Texts(&'static [&'static str]),
    /// `["text"]`.
    TextModality,
    /// `{"type": "text"}`.
    TextFormat,
    EmptyObject,
}

impl Inert {
    fn admits(self, value: &Json) -> bool {
        match (self, value) {
            (_, Json::Null) => true,
            (Inert::Bool(b), Json::Bool(v)) => b == *v,
            (Inert::Number(x), Json::Unsigned(v)) => x == *v as f64,
            (Inert::Number(x), Json::Negative(v)) => x == *v as f64,
            (Inert::Number(x), Json::Float(v)) => x == *v,
            (Inert::Off, Json::Unsigned(0) | Json::Negative(_)) => true,
            (Inert::Off, Json::Float(v)) => *v <= 0.0,
            (Inert::EmptyArray, Json::Array(items)) => items.is_empty(),
            (Inert::EmptyText, Json::Text(s)) => s.is_empty(),
            (Inert::Texts(list), Json::Text(s)) => list.contains(&s.as_str()),
            (Inert::TextModality, Json::Array(items)) => *items == [Json::Text("text".to_owned())],
            (Inert::TextFormat, Json::Object(entries)) => *entries == [("type".to_owned(), Json::Text("text".to_owned()))],
            (Inert::EmptyObject, Json::Object(entries)) => entries.is_empty(),
            _ => false,
        }
    }
}

/// Fields of OpenAI's API or a peer's that change the answer and that this server does not serve. A value that asks
/// for nothing passes; any other is refused by name rather than ignored.
const UNSUPPORTED: &[(&str, Inert)] = &[
    ("tools", Inert::EmptyArray),
    ("tool_choice", Inert::Texts(&["none", "auto"])),
    ("functions", Inert::EmptyArray),
    ("function_call", Inert::Texts(&["none", "auto"])),
    ("response_format", Inert::TextFormat),
    ("structured_outputs", Inert::EmptyObject),
    ("guided_json", Inert::Never),
    ("guided_regex", Inert::Never),
    ("guided_choice", Inert::Never),
    ("guided_grammar", Inert::Never),
    ("grammar", Inert::EmptyText),
    ("json_schema", Inert::Never),
    ("regex", Inert::Never),
    ("ebnf", Inert::Never),
    ("use_beam_search", Inert::Bool(false)),
    ("length_penalty", Inert::Number(1.0)),
    ("suffix", Inert::EmptyText),
    ("prompt_embeds", Inert::Never),
    ("prompt_logprobs", Inert::Never),
    ("truncate_prompt_tokens", Inert::Never),
    ("allowed_token_ids", Inert::Never),
    ("bad_words", Inert::EmptyArray),
    ("skip_special_tokens", Inert::Bool(true)),
    ("spaces_between_special_tokens", Inert::Bool(true)),
    ("typical_p", Inert::Number(1.0)),
    ("audio", Inert::Never),
    ("modalities", Inert::TextModality),
    ("prediction", Inert::Never),
    ("web_search_options", Inert::Never),
    ("store", Inert::Bool(false)),
    ("service_tier", Inert::Texts(&["auto", "default"])),
    ("chat_template", Inert::Never),
    ("documents", Inert::EmptyArray),
    ("logits_processors", Inert::EmptyArray),
    ("lora", Inert::EmptyArray),
    ("adapter", Inert::Never),
    ("adapter_id", Inert::Never),
    ("lora_path", Inert::Never),
    ("enable_thinking", Inert::Never),
    ("thinking", Inert::Never),
    ("verbosity", Inert::Texts(&["medium"])),
    ("thinking_token_budget", Inert::Never),
    ("include_reasoning", Inert::Bool(true)),
    ("return_tokens_as_token_ids", Inert::Bool(false)),
    ("logprob_token_ids", Inert::EmptyArray),
    ("repetition_detection", Inert::Never),
    ("max_repetition_pattern_size", Inert::Off),
    ("min_repetition_pattern_size", Inert::Off),
    ("repetition_min_count", Inert::Off),
    ("structural_tag", Inert::Never),
    ("vllm_xargs", Inert::EmptyObject),
    ("kv_transfer_params", Inert::EmptyObject),
    ("stop_regex", Inert::EmptyArray),
    ("no_stop_trim", Inert::Bool(false)),
    ("custom_logit_processor", Inert::Never),
    ("return_hidden_states", Inert::Bool(false)),
    ("n_predict", Inert::Number(-1.0)),
    ("max_new_tokens", Inert::Never),
    ("min_new_tokens", Inert::Off),
    ("repeat_penalty", Inert::Number(1.0)),
    ("no_repeat_ngram_size", Inert::Off),
    ("mirostat", Inert::Off),
    ("dynatemp_range", Inert::Off),
    ("dry_multiplier", Inert::Off),
    ("xtc_probability", Inert::Off),
    ("top_n_sigma", Inert::Off),
    ("top_a", Inert::Off),
    ("num_beams", Inert::Number(1.0)),
];

/// The same of a message.
const UNSUPPORTED_IN_MESSAGES: &[(&str, Inert)] =
    &[("function_call", Inert::Never), ("prefix", Inert::Bool(false)), ("partial", Inert::Bool(false)), ("audio", Inert::Never)];

/// What to say to whoever sends one of them.
fn instead(name: &str) -> &'static str {
    match name {
        "enable_thinking" | "thinking" => "is not read here: what chat templates read belongs in chat_template_kwargs",
        "lora" | "lora_path" | "adapter" | "adapter_id" => "is not read: an adapter is named as the model",
        "max_new_tokens" | "n_predict" => "is called max_tokens here",
        "min_new_tokens" => "is called min_tokens here",
        "repeat_penalty" => "is called repetition_penalty here",
        "prefix" | "partial" => "is not read here: continue_final_message goes on with the last message",
        "function_call" => "is not read here: calls belong in tool_calls",
        _ => "is not supported by this server",
    }
}

fn refuse_unsupported(fields: &mut Fields, unsupported: &[(&str, Inert)]) -> Result<(), Refusal> {
    for &(name, inert) in unsupported {
        if fields.take(name).is_some_and(|value| !inert.admits(&value)) {
            return Err(Refusal::Unsupported { param: fields.param(name), what: instead(name) });
        }
    }
    Ok(())
}

fn value<T>(param: impl Into<String>, rule: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Value { param: param.into(), rule: rule.into() })
}

impl Options {
    fn read(fields: &mut Fields) -> Result<Self, Refusal> {
        let model = fields.text("model")?;
        if model.as_ref().is_some_and(|name| name.is_empty() || name.len() > 512) {
            return value("model", "must be 1 to 512 bytes long");
        }
        let stream = fields.bool("stream")?.unwrap_or(false);
        let stream_options = match fields.object("stream_options")? {
            Some(_) if !stream => return value("stream_options", "needs stream to be true"),
            Some(mut inner) => Some(StreamOptions {
                include_usage: inner.bool("include_usage")?.unwrap_or(false),
                continuous_usage_stats: inner.bool("continuous_usage_stats")?.unwrap_or(false),
            }),
            None => None,
        };
        let small = |n: i128| u32::try_from(n).expect("the range was checked");
        let whole = 0..=i128::from(u32::MAX);
        let n = fields.integer_in("n", 1..=i128::from(CHOICES_MAX))?.map_or(1, small);
        best_of(fields, n)?;
        let max_tokens = fields.integer_in("max_tokens", whole.clone())?.map(small);
        let max_completion_tokens = fields.integer_in("max_completion_tokens", whole.clone())?.map(small);
        if let (Some(a), Some(b)) = (max_tokens, max_completion_tokens)
            && a != b
        {
            return value("max_tokens", "and max_completion_tokens differ; give one of them");
        }
        let top_k = fields.integer_in("top_k", -1..=i128::from(i32::MAX))?.map(|n| i64::try_from(n).expect("the range was checked"));
        let top_p = fields.number_in("top_p", 0.0..=1.0)?;
        if top_p == Some(0.0) {
            return value("top_p", "must be greater than 0");
        }
        let seed = fields.integer_in("seed", i128::from(i64::MIN)..=i128::from(u64::MAX))?;
        let options = Options {
            model,
            stream,
            stream_options,
            n,
            max_tokens,
            max_completion_tokens,
            min_tokens: fields.integer_in("min_tokens", whole)?.map_or(0, small),
            temperature: fields.number_in("temperature", 0.0..=2.0)?,
            top_p,
            top_k,
            min_p: fields.number_in("min_p", 0.0..=1.0)?,
            presence_penalty: fields.number_in("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number_in("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            // The documented range is (0, 2]; a divisor too small to divide by is refused, not rounded.
            repetition_penalty: fields.number_in("repetition_penalty", 0.001..=2.0)?,
            logit_bias: logit_bias(fields)?,
            // Two's complement keeps every 64-bit seed, signed or not, distinct from its neighbours.
            seed: seed.map(|n| u64::try_from(n).unwrap_or_else(|_| i64::try_from(n).expect("the range was checked").cast_unsigned())),
            stop: stop(fields)?,
            stop_token_ids: fields.ids("stop_token_ids")?.unwrap_or_default(),
            include_stop_str_in_output: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            priority: fields
                .integer_in("priority", i128::from(i32::MIN)..=i128::from(i32::MAX))?
                .map_or(0, |n| i32::try_from(n).expect("the range was checked")),
            cache_profile: fields.text("cache_profile")?,
            cache_salt: fields.text("cache_salt")?,
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            user: fields.text("user")?,
        };
        if options.stop_token_ids.len() > STOP_TOKENS_MAX {
            return value("stop_token_ids", format!("has more than {STOP_TOKENS_MAX} entries"));
        }
        if let Some(salt) = &options.cache_salt
            && (salt.is_empty() || salt.len() > 64 || !salt.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-'))
        {
            return value("cache_salt", "must be 1 to 64 of A-Z a-z 0-9 _ -");
        }
        if options.user.as_ref().is_some_and(|user| user.len() > 512) {
            return value("user", "is longer than 512 bytes");
        }
        metadata(fields)?;
        fields.bool("parallel_tool_calls")?;
        Ok(options)
    }

    /// `max_tokens` under either name, with the name that was used.
    pub fn max_new_tokens(&self) -> Option<(u32, &'static str)> {
        self.max_completion_tokens.map(|n| (n, "max_completion_tokens")).or(self.max_tokens.map(|n| (n, "max_tokens")))
    }
}

/// Of as many choices as are told, all are the best.
fn best_of(fields: &mut Fields, n: u32) -> Result<(), Refusal> {
    match fields.integer("best_of")? {
        Some(best) if best != 1 && best != i128::from(n) => {
            let what = "is not supported by this server, unless it is n";
            Err(Refusal::Unsupported { param: "best_of".to_owned(), what })
        }
        _ => Ok(()),
    }
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f64)>, Refusal> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let entries = map.rest();
    if entries.len() > BIASES_MAX {
        return value("logit_bias", format!("has more than {BIASES_MAX} entries"));
    }
    let mut biases = Vec::with_capacity(entries.len());
    for (key, bias) in entries {
        // `parse` alone would admit "+5".
        let Some(id) = key.bytes().all(|b| b.is_ascii_digit()).then(|| key.parse::<u32>().ok()).flatten() else {
            return value("logit_bias", "must have token ids as keys");
        };
        let bias = match bias {
            Json::Unsigned(n) => n as f64,
            Json::Negative(n) => n as f64,
            Json::Float(x) => x,
            _ => return Err(Refusal::Type { param: "logit_bias".to_owned(), want: "an object of numbers" }),
        };
        if !(-100.0..=100.0).contains(&bias) {
            return value("logit_bias", "must have values between -100 and 100");
        }
        biases.push((id, bias));
    }
    biases.sort_unstable_by_key(|&(id, _)| id);
    // "1" and "01" are different keys of the same token.
    if biases.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return value("logit_bias", "names a token twice");
    }
    Ok(biases)
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, Refusal> {
    let items = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Json::Text(s)) => vec![Json::Text(s)],
        Some(Json::Array(items)) => items,
        Some(_) => return Err(Refusal::Type { param: "stop".to_owned(), want: "a string or an array of strings" }),
    };
    if items.len() > STOPS_MAX {
        return value("stop", format!("has more than {STOPS_MAX} entries"));
    }
    let mut stops = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Json::Text(s) if (1..=STOP_BYTES_MAX).contains(&s.len()) => stops.push(s),
            Json::Text(_) => return value("stop", format!("must have strings of 1 to {STOP_BYTES_MAX} bytes")),
            _ => return Err(Refusal::Type { param: "stop".to_owned(), want: "a string or an array of strings" }),
        }
    }
    Ok(stops)
}

/// OpenAI's `metadata`: checked as they document it, and not used.
fn metadata(fields: &mut Fields) -> Result<(), Refusal> {
    let Some(map) = fields.object("metadata")? else { return Ok(()) };
    let entries = map.rest();
    let fits = |(key, v): &(String, Json)| key.len() <= 64 && matches!(v, Json::Text(s) if s.len() <= 512);
    if entries.len() > 16 || !entries.iter().all(fits) {
        return value("metadata", "must be at most 16 pairs of strings, keys to 64 and values to 512 bytes");
    }
    Ok(())
}

impl ChatRequest {
    /// Reads a body.
    pub fn read(mut fields: Fields) -> Result<Self, Refusal> {
        refuse_unsupported(&mut fields, UNSUPPORTED)?;
        if fields.bool("echo")? == Some(true) {
            return Err(Refusal::Unsupported { param: "echo".to_owned(), what: "belongs to /v1/completions" });
        }
        templates_add_special_tokens(fields.bool("add_special_tokens")?)?;
        let options = Options::read(&mut fields)?;
        if let Some((0, name)) = options.max_new_tokens() {
            return value(name, "must be at least 1");
        }
        let logprobs = fields.bool("logprobs")?.unwrap_or(false);
        let top_logprobs = fields.integer_in("top_logprobs", 0..=i128::from(LOGPROBS_MAX))?;
        // None of nothing is asked for by clients that always send both.
        if top_logprobs.is_some_and(|n| n > 0) && !logprobs {
            return value("top_logprobs", "needs logprobs to be true");
        }
        let (add_generation_prompt, continue_final_message) = ending(&mut fields)?;
        let reasoning_effort = fields.text("reasoning_effort")?;
        if reasoning_effort.as_ref().is_some_and(|effort| effort.len() > 64) {
            return value("reasoning_effort", "is longer than 64 bytes");
        }
        let mut chat_template_kwargs = template_kwargs(&mut fields)?;
        chat_template_kwargs.extend(reasoning_effort.clone().map(|effort| ("reasoning_effort".to_owned(), effort.into())));
        Ok(ChatRequest {
            messages: messages(&mut fields)?,
            options,
            logprobs,
            top_logprobs: top_logprobs.map(|n| u32::try_from(n).expect("the range was checked")),
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs,
            reasoning_effort,
        })
    }
}

/// Those around a chat are the template's business, which would put them there twice.
fn templates_add_special_tokens(asked: Option<bool>) -> Result<(), Refusal> {
    if asked == Some(true) {
        let what = "is not supported with messages: the chat template adds the special tokens";
        return Err(Refusal::Unsupported { param: "add_special_tokens".to_owned(), what });
    }
    Ok(())
}

/// `(add_generation_prompt, continue_final_message)`: one excludes the other, and the second switches the first off.
fn ending(fields: &mut Fields) -> Result<(bool, bool), Refusal> {
    let add = fields.bool("add_generation_prompt")?;
    let go_on = fields.bool("continue_final_message")?.unwrap_or(false);
    if go_on && add == Some(true) {
        return value("continue_final_message", "excludes add_generation_prompt");
    }
    Ok((add.unwrap_or(!go_on), go_on))
}

/// Messages as templates take them: known fields only.
fn messages(fields: &mut Fields) -> Result<Value, Refusal> {
    let Some(items) = fields.array("messages")? else { return value("messages", "is missing") };
    if items.is_empty() || items.len() > MESSAGES_MAX {
        return value("messages", format!("must have 1 to {MESSAGES_MAX} entries"));
    }
    let mut all = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        all.push(Value::Object(message(Fields::of(item, format!("messages[{index}]"))?)?));
    }
    Ok(Value::Array(all))
}

fn message(mut fields: Fields) -> Result<Map<String, Value>, Refusal> {
    let mut out = Map::new();
    let Some(role) = fields.text("role")? else { return value(fields.param("role"), "is missing") };
    if !["system", "developer", "user", "assistant", "tool", "function"].contains(&role.as_str()) {
        return value(fields.param("role"), "must be system, developer, user, assistant, tool or function");
    }
    refuse_unsupported(&mut fields, UNSUPPORTED_IN_MESSAGES)?;
    let path = fields.param("content");
    let content = match fields.take("content") {
        None => Value::Null,
        Some(Json::Text(text)) => Value::String(text),
        Some(Json::Array(parts)) => text_parts(parts, &path)?,
        Some(_) => return Err(Refusal::Type { param: path, want: "a string or an array of text parts" }),
    };
    let calls = fields.array("tool_calls")?.filter(|calls| !calls.is_empty());
    if content.is_null() && calls.is_none() {
        return value(path, "is missing");
    }
    out.insert("role".to_owned(), Value::String(role));
    out.insert("content".to_owned(), content);
    if let Some(calls) = calls {
        if calls.len() > 128 {
            return value(fields.param("tool_calls"), "has more than 128 entries");
        }
        let path = fields.param("tool_calls");
        let calls = calls.into_iter().enumerate().map(|(i, call)| Fields::of(call, format!("{path}[{i}]")));
        let calls: Vec<Value> = calls.map(|call| call.map(|c| Json::Object(c.rest()).into_value())).collect::<Result<_, _>>()?;
        out.insert("tool_calls".to_owned(), Value::Array(calls));
    }
    for name in ["name", "tool_call_id"] {
        if let Some(text) = fields.text(name)? {
            if text.len() > 512 {
                return value(fields.param(name), "is longer than 512 bytes");
            }
            out.insert(name.to_owned(), Value::String(text));
        }
    }
    for name in ["reasoning", "reasoning_content"] {
        if let Some(text) = fields.text(name)? {
            out.insert(name.to_owned(), Value::String(text));
        }
    }
    Ok(out)
}

/// Content parts, each `{"type": "text", "text": ...}`.
fn text_parts(parts: Vec<Json>, path: &str) -> Result<Value, Refusal> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::of(part, format!("{path}[{index}]"))?;
        let kind = part.text("type")?;
        match kind.as_deref() {
            Some("text") => {}
            Some(_) => {
                return Err(Refusal::Unsupported {
                    param: part.param("type"),
                    what: "is not supported: this server takes text parts only",
                });
            }
            None => return value(part.param("type"), "is missing"),
        }
        match part.text("text")? {
            Some(text) => texts.push(serde_json::json!({ "type": "text", "text": text })),
            None => return value(part.param("text"), "is missing"),
        }
    }
    Ok(Value::Array(texts))
}

/// Names a template gets from the server itself.
const RESERVED_KWARGS: &[&str] = &[
    "messages",
    "tools",
    "documents",
    "tools_in_user_message",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
    "return_dict",
    "return_tensors",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
];

fn template_kwargs(fields: &mut Fields) -> Result<Map<String, Value>, Refusal> {
    const NAME: &str = "chat_template_kwargs";
    let Some(map) = fields.object(NAME)? else { return Ok(Map::new()) };
    let entries = map.rest();
    if entries.len() > KWARGS_MAX {
        return value(NAME, format!("has more than {KWARGS_MAX} entries"));
    }
    let mut kwargs = Map::new();
    for (key, v) in entries {
        let plain = key.len() <= 64 && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !plain || key.bytes().next().is_none_or(|b| b.is_ascii_digit()) {
            return value(NAME, "must have plain names of at most 64 characters");
        }
        if RESERVED_KWARGS.contains(&key.as_str()) {
            return value(NAME, "uses a name that belongs to the server");
        }
        match &v {
            Json::Text(s) if s.len() > 4096 => return value(NAME, "has a string of more than 4096 bytes"),
            Json::Ids(_) | Json::Array(_) | Json::Object(_) => {
                return Err(Refusal::Type { param: NAME.to_owned(), want: "an object of strings, numbers and booleans" });
            }
            _ => {}
        }
        kwargs.insert(key, v.into_value());
    }
    Ok(kwargs)
}

impl CompletionRequest {
    /// Reads a body.
    pub fn read(mut fields: Fields) -> Result<Self, Refusal> {
        refuse_unsupported(&mut fields, UNSUPPORTED)?;
        let options = Options::read(&mut fields)?;
        let said = fields.has("max_tokens") || fields.has("max_completion_tokens");
        let echo = fields.bool("echo")?.unwrap_or(false);
        if let Some((0, name)) = options.max_new_tokens()
            && !echo
        {
            return value(name, "must be at least 1, unless echo is true");
        }
        if fields.take("top_logprobs").is_some() {
            return Err(Refusal::Unsupported { param: "top_logprobs".to_owned(), what: "belongs to chats: here logprobs is their number" });
        }
        let logprobs = fields.integer_in("logprobs", 0..=i128::from(LOGPROBS_MAX))?;
        let prompt = prompts(&mut fields)?;
        let count = match &prompt {
            Prompts::Texts(all) => all.len(),
            Prompts::Tokens(all) => all.len(),
        };
        if count * options.n as usize > SEQUENCES_MAX {
            return value("n", format!("times the number of prompts must not exceed {SEQUENCES_MAX}"));
        }
        Ok(CompletionRequest {
            prompt,
            options,
            new_tokens: (!said).then_some(COMPLETION_TOKENS),
            echo,
            logprobs: logprobs.map(|n| u32::try_from(n).expect("the range was checked")),
            add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(true),
        })
    }
}

fn prompts(fields: &mut Fields) -> Result<Prompts, Refusal> {
    const NAME: &str = "prompt";
    let items = match fields.take(NAME) {
        None => return value(NAME, "is missing"),
        Some(Json::Text(text)) => return Ok(Prompts::Texts(vec![text])),
        Some(Json::Ids(ids)) => return Ok(Prompts::Tokens(vec![ids])),
        Some(Json::Array(items)) => items,
        Some(_) => return Err(Refusal::Type { param: NAME.to_owned(), want: "a string or an array" }),
    };
    if items.is_empty() || items.len() > PROMPTS_MAX {
        return value(NAME, format!("must have 1 to {PROMPTS_MAX} entries"));
    }
    let (mut texts, mut tokens) = (Vec::new(), Vec::new());
    for item in items {
        match item {
            Json::Text(text) => texts.push(text),
            Json::Ids(ids) => tokens.push(ids),
            Json::Array(inner) if inner.is_empty() => return value(NAME, "has an empty list of token ids"),
            _ => return Err(Refusal::Type { param: NAME.to_owned(), want: "a list of strings, of token ids, or of lists of token ids" }),
        }
    }
    match (texts.is_empty(), tokens.is_empty()) {
        (false, true) => Ok(Prompts::Texts(texts)),
        (true, false) => Ok(Prompts::Tokens(tokens)),
        _ => Err(Refusal::Type { param: NAME.to_owned(), want: "a list of one kind" }),
    }
}

impl TokenizeRequest {
    /// Reads a body.
    pub fn read(mut fields: Fields) -> Result<Self, Refusal> {
        refuse_unsupported(&mut fields, UNSUPPORTED)?;
        let model = fields.text("model")?;
        let return_token_strs = fields.bool("return_token_strs")?.unwrap_or(false);
        let special = fields.bool("add_special_tokens")?;
        let source = match fields.text("prompt")? {
            Some(_) if fields.take("messages").is_some() => return value("messages", "excludes prompt"),
            Some(prompt) => Source::Text { prompt, add_special_tokens: special.unwrap_or(true) },
            None => {
                templates_add_special_tokens(special)?;
                let (add_generation_prompt, continue_final_message) = ending(&mut fields)?;
                Source::Chat {
                    messages: messages(&mut fields)?,
                    add_generation_prompt,
                    continue_final_message,
                    chat_template_kwargs: template_kwargs(&mut fields)?,
                }
            }
        };
        Ok(TokenizeRequest { model, source, return_token_strs })
    }
}

impl DetokenizeRequest {
    /// Reads a body.
    pub fn read(mut fields: Fields) -> Result<Self, Refusal> {
        let model = fields.text("model")?;
        match fields.ids("tokens")? {
            Some(tokens) => Ok(DetokenizeRequest { model, tokens }),
            None => value("tokens", "is missing"),
        }
    }
}

/// `POST /v1/load_lora_adapter`. Other fields are ignored, as vLLM's clients send some.
#[derive(Clone, Debug, PartialEq, Eq, ToSchema)]
pub struct LoadLora {
    /// The name clients then use as `model`.
    pub lora_name: String,
    /// Its folder: below the server's adapter root, or relative to it.
    pub lora_path: String,
    /// Replace what the name points to.
    #[schema(default = false, required = false)]
    pub load_inplace: bool,
    /// Never take it out of memory.
    #[schema(default = false, required = false)]
    pub pinned: bool,
    /// The weights it was trained on: `auto`, `original`, `pissa`, `residual:FOLDER` or `initial:FOLDER`.
    pub base: Option<String>,
    /// Only if the name points to this generation now.
    #[schema(value_type = Option<String>)]
    pub expected_generation: Option<u64>,
}

/// `POST /v1/unload_lora_adapter`. Other fields are ignored.
#[derive(Clone, Debug, PartialEq, Eq, ToSchema)]
pub struct UnloadLora {
    pub lora_name: String,
}

/// `POST /v1/rollback_lora_adapter`.
#[derive(Clone, Debug, PartialEq, Eq, ToSchema)]
pub struct RollbackLora {
    pub lora_name: String,
    /// The generation to go back to; the one before this one if absent.
    #[schema(value_type = Option<String>)]
    pub generation: Option<u64>,
}

impl LoadLora {
    /// Reads a body.
    pub fn read(mut fields: Fields) -> Result<Self, Refusal> {
        let in_place = fields.bool("load_inplace")?;
        Ok(LoadLora {
            lora_name: filled(&mut fields, "lora_name")?,
            lora_path: filled(&mut fields, "lora_path")?,
            load_inplace: in_place.or(fields.bool("replace")?).unwrap_or(false),
            pinned: fields.bool("pinned")?.unwrap_or(false),
            base: fields.text("base")?,
            expected_generation: generation(&mut fields, "expected_generation")?,
        })
    }
}

impl UnloadLora {
    /// Reads a body.
    pub fn read(mut fields: Fields) -> Result<Self, Refusal> {
        Ok(UnloadLora { lora_name: filled(&mut fields, "lora_name")? })
    }
}

impl RollbackLora {
    /// Reads a body.
    pub fn read(mut fields: Fields) -> Result<Self, Refusal> {
        Ok(RollbackLora { lora_name: filled(&mut fields, "lora_name")?, generation: generation(&mut fields, "generation")? })
    }
}

/// A string that is there and not empty.
fn filled(fields: &mut Fields, name: &'static str) -> Result<String, Refusal> {
    match fields.text(name)? {
        Some(text) if !text.is_empty() => Ok(text),
        _ => value(name, "is missing or empty"),
    }
}

/// A generation as it is told: sixteen hexadecimal digits.
fn generation(fields: &mut Fields, name: &'static str) -> Result<Option<u64>, Refusal> {
    let Some(text) = fields.text(name)? else { return Ok(None) };
    match u64::from_str_radix(&text, 16) {
        Ok(n) if text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(Some(n)),
        _ => value(name, "must be a generation as /v1/lora_adapters lists it: sixteen hexadecimal digits"),
    }
}
