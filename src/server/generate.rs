//! Chat and text completions: admit, submit, then tell the answer in one piece or as server-sent events.
//!
//! The script that tells a stream is polled by the reply's own body: when the connection goes, the body is dropped, with
//! it the script, and with that every [`TokenStream`], which cancels the sequences. No task outlives its client.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body as Reply;
use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bytes::Bytes;
use hyper::body::Frame;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::error::ErrorBody;
use super::openai::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, ChatMessage, ChatToken, Completion, CompletionChoice,
    CompletionLogprobs, Delta, Detokenized, KvCache, PromptTokensDetails, StopReason, Timings, TokenText, Tokenized, TopLogprobs, Usage,
};
use super::{ApiError, Loaded, RequestId, Server};
use crate::adapters::registry::Lease;
use crate::admission::wire::{ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest};
use crate::admission::{self, Admitted, Codec, Prompt, TextStream};
use crate::engine::{EngineHandle, TokenStream};
use crate::ids::{AdapterGeneration, TokenId};
use crate::request::{self, Event, Failure, FinishReason, GenerateRequest, TokenLogprob};
use crate::telemetry;
use crate::text::{Start, Stops};

/// What JSON can carry in place of minus infinity, as OpenAI and vLLM write it.
const LOGPROB_MIN: f32 = -9999.0;
/// Frames written but not yet taken by the connection.
const FRAMES_MAX: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Chat,
    Text,
}

/// Continues a chat.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "OpenAI",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, events of ChatChunk and `data: [DONE]`", body = ChatCompletion),
        (status = "default", description = "OpenAI's error object", body = ErrorBody)
    )
)]
pub async fn chat(State(server): State<Arc<Server>>, Extension(id): Extension<RequestId>, request: Request) -> Result<Response, ApiError> {
    generate(server, id, request, Some(Kind::Chat)).await
}

/// Continues one or more texts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "OpenAI",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer; with `stream`, events of Completion and `data: [DONE]`", body = Completion),
        (status = "default", description = "OpenAI's error object", body = ErrorBody)
    )
)]
pub async fn completion(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(server, id, request, Some(Kind::Text)).await
}

/// Continues a chat or texts, whichever the body is of: SageMaker has one path for all.
#[utoipa::path(
    post,
    path = "/invocations",
    tag = "vLLM",
    request_body(content = ChatRequest, description = "A ChatRequest if it has `messages`, else a CompletionRequest"),
    responses(
        (status = 200, description = "As of the path for such a body", body = ChatCompletion),
        (status = "default", description = "OpenAI's error object", body = ErrorBody)
    )
)]
pub async fn invocation(
    State(server): State<Arc<Server>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(server, id, request, None).await
}

/// Tokens of a text or of a chat's prompt.
#[utoipa::path(
    post,
    path = "/tokenize",
    tag = "vLLM",
    request_body = TokenizeRequest,
    responses((status = 200, body = Tokenized), (status = "default", description = "OpenAI's error object", body = ErrorBody))
)]
pub async fn tokenize(State(server): State<Arc<Server>>, request: Request) -> Result<Json<Tokenized>, ApiError> {
    let loaded = server.loaded()?;
    let body = server.read_body(request).await?;
    let reply = server.text(loaded, body.len(), move |model| {
        let (tokens, strings) = model.tokenize(&body)?;
        let token_strs = strings.then(|| tokens.iter().map(|&id| token_name(&*model.codec, id)).collect());
        Ok(Tokenized { count: tokens.len(), max_model_len: model.context, tokens, token_strs })
    });
    Ok(Json(reply.await?))
}

/// Text of tokens.
#[utoipa::path(
    post,
    path = "/detokenize",
    tag = "vLLM",
    request_body = DetokenizeRequest,
    responses((status = 200, body = Detokenized), (status = "default", description = "OpenAI's error object", body = ErrorBody))
)]
pub async fn detokenize(State(server): State<Arc<Server>>, request: Request) -> Result<Json<Detokenized>, ApiError> {
    let loaded = server.loaded()?;
    let body = server.read_body(request).await?;
    let prompt = server.text(loaded, body.len(), move |model| model.detokenize(&body)).await?;
    Ok(Json(Detokenized { prompt }))
}

async fn generate(server: Arc<Server>, id: RequestId, request: Request, kind: Option<Kind>) -> Result<Response, ApiError> {
    let loaded = server.accepting()?.clone();
    let body = server.read_body(request).await?;
    let (entropy, bytes) = (server.entropy(), body.len());
    let admit = move |model: &admission::Model| match kind {
        Some(Kind::Chat) => Ok((Kind::Chat, model.admit_chat(&body, entropy)?)),
        Some(Kind::Text) => Ok((Kind::Text, model.admit_completion(&body, entropy)?)),
        None => model.admit_either(&body, entropy).map(|(chat, admitted)| (if chat { Kind::Chat } else { Kind::Text }, admitted)),
    };
    let (kind, Admitted { prompts, requests, reply }) = server.text(&loaded, bytes, admit).await?;
    let lease = match &reply.adapter {
        // Reading it is part of waiting for a first token.
        Some(alias) => {
            let leased = tokio::time::timeout(loaded.model.queue_timeout, loaded.adapters.acquire(alias)).await;
            Some(leased.map_err(|_| ApiError::from(&Failure::QueueTimeout))??)
        }
        None => None,
    };
    // Reading and tokenising may have taken long enough for the drain to begin.
    server.accepting()?;

    let adapter = lease.as_ref().map_or_else(AdapterGeneration::default, Lease::generation);
    let requests: Vec<_> = requests.into_iter().map(|request| GenerateRequest { adapter, ..request }).collect();
    let profile = requests.first().map_or(loaded.model.default_profile, |request| request.profile);
    let stop_tokens: Vec<_> = requests.iter().map(|request| request.stop_tokens.clone()).collect();
    let streams =
        loaded.engine.submit_all(requests, lease).map_err(|error| ApiError::not_submitted(&error))?.into_iter().zip(stop_tokens).collect();
    let answer = Answer {
        kind,
        id: match kind {
            Kind::Chat => format!("chatcmpl-{}", id.0),
            Kind::Text => format!("cmpl-{}", id.0),
        },
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        profile: loaded.model.profiles[usize::from(profile.0)].profile.name.clone(),
        prompts,
        reply,
    };
    match answer.reply.stream {
        Some(_) => Ok(stream(server, loaded, answer, streams)),
        None => collect(&loaded, &answer, streams).await.map_err(|failure| {
            log(&id.0, &failure, answer.reply.adapter.as_deref());
            ApiError::failed(&failure, answer.reply.adapter.as_deref())
        }),
    }
}

fn log(id: &str, failure: &Failure, adapter: Option<&str>) {
    match failure {
        Failure::Internal(what) => tracing::error!(request_id = id, adapter, %what, "a request failed"),
        other => tracing::warn!(request_id = id, adapter, failure = ?other, "a request failed"),
    }
}

type Submitted = Vec<(TokenStream, Arc<[TokenId]>)>;

/// What every frame and the final JSON of one request share.
struct Answer {
    kind: Kind,
    id: String,
    created: u64,
    profile: String,
    prompts: Vec<Prompt>,
    reply: admission::Reply,
}

impl Answer {
    fn prompt_of(&self, choice: usize) -> &Prompt {
        &self.prompts[choice / self.reply.n]
    }

    fn stop_reason(&self, told: &Told) -> Option<StopReason> {
        match told.stopped? {
            Stopped::Text(stop) => self.reply.stop.get(stop).cloned().map(StopReason::Text),
            Stopped::Token(id) => self.reply.stop_token_ids.contains(&id).then_some(StopReason::Token(id)),
        }
    }

    fn prompt_tokens(&self) -> u64 {
        self.prompts.iter().map(|p| p.tokens.len() as u64).sum()
    }

    /// The bill, from the bills of all choices.
    fn usage(&self, choices: &[Choice<'_>]) -> Usage {
        let mut usage = self.running_usage(choices);
        let mut cached = 0;
        let mut cache = KvCache { profile: self.profile.clone(), ..KvCache::default() };
        let mut timings = Timings::default();
        for (index, choice) in choices.iter().enumerate() {
            let bill = choice.bill.unwrap_or_default();
            // A prompt is billed once, and its first choice is the one that found it cached or not.
            if index % self.reply.n == 0 {
                cached += u64::from(bill.cached_tokens);
            }
            cache.bytes += bill.cache.bytes;
            cache.sealed_tokens += u64::from(bill.cache.sealed_tokens);
            cache.window_tokens += u64::from(bill.cache.window_tokens);
            let longer = |ms: &mut f64, time: Duration| *ms = ms.max((time.as_secs_f64() * 1e6).round() / 1e3);
            longer(&mut timings.queue_ms, bill.timings.queue);
            longer(&mut timings.prompt_ms, bill.timings.prefill);
            longer(&mut timings.predicted_ms, bill.timings.decode);
        }
        usage.prompt_tokens_details = Some(PromptTokensDetails { cached_tokens: cached });
        usage.kv_cache = Some(cache);
        usage.timings = Some(timings);
        usage
    }

    /// The counts so far.
    fn running_usage(&self, choices: &[Choice<'_>]) -> Usage {
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens(), choices.iter().map(|c| u64::from(c.seen)).sum());
        Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens, ..Usage::default() }
    }
}

/// One choice while it is generated: the engine's events in, text out.
struct Choice<'a> {
    stream: TokenStream,
    text: Box<dyn TextStream + Send + 'a>,
    stop_tokens: Arc<[TokenId]>,
    include_stop: bool,
    /// A stop token whose successor decides whether it ended the sequence or, below `min_tokens`, was ordinary text.
    held: Option<TokenId>,
    /// Tokens generated, up to the one that completed a stop string.
    seen: u32,
    matched: bool,
    bill: Option<request::Usage>,
}

/// What one event adds to a choice.
#[derive(Debug, Default, PartialEq)]
struct Part {
    prompt: Option<Vec<TokenLogprob>>,
    text: String,
    tokens: Vec<(TokenId, Option<TokenLogprob>)>,
    finish: Option<FinishReason>,
    stopped: Option<Stopped>,
}

/// What of a request ended a choice.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stopped {
    /// Which of its stop strings.
    Text(usize),
    Token(TokenId),
}

impl Choice<'_> {
    fn absorb(&mut self, event: Event, engine: &EngineHandle) -> Result<Part, Failure> {
        let mut part = Part::default();
        match event {
            Event::Prompt { logprobs } => part.prompt = Some(logprobs),
            // Under way when the stop string was found.
            Event::Token { .. } if self.matched => {}
            Event::Token { id, logprob } => {
                if let Some(held) = self.held.take() {
                    self.push(held, &mut part);
                }
                if !self.matched {
                    self.seen += 1;
                    part.tokens.push((id, logprob));
                    if self.stop_tokens.binary_search(&id).is_ok() {
                        self.held = Some(id);
                    } else {
                        self.push(id, &mut part);
                    }
                }
                if self.matched {
                    engine.finish(self.stream.seq);
                }
            }
            Event::Done { reason, usage } => {
                if !self.matched {
                    part.finish = Some(reason);
                    part.stopped = self.held.filter(|_| reason == FinishReason::Stop).map(Stopped::Token);
                    if let Some(held) = self.held.take()
                        && (self.include_stop || reason == FinishReason::Length)
                    {
                        self.push(held, &mut part);
                    }
                    if !self.matched {
                        part.text.push_str(&self.text.finish());
                    }
                }
                self.bill = Some(usage);
            }
            // It had all it wanted; what became of the engine's side since changes nothing, but the bill went with it.
            Event::Failed { .. } if self.matched => self.bill = Some(request::Usage::default()),
            Event::Failed { failure } => return Err(failure),
        }
        Ok(part)
    }

    fn push(&mut self, id: TokenId, part: &mut Part) {
        let piece = self.text.push(id);
        part.text.push_str(&piece.text);
        if let Some(stop) = piece.stopped {
            self.matched = true;
            part.finish = Some(FinishReason::Stop);
            part.stopped = Some(Stopped::Text(stop));
        }
    }
}

/// All choices of a request, as their events come.
struct Run<'a> {
    choices: Vec<Choice<'a>>,
    /// Whose turn it is to be looked at first, so that none starves.
    turn: usize,
    engine: &'a EngineHandle,
}

impl<'a> Run<'a> {
    fn new(loaded: &'a Loaded, answer: &Answer, streams: Submitted) -> Self {
        let (stop, include_stop) = (Stops::new(&answer.reply.stop), answer.reply.include_stop);
        let start = if answer.reply.continues { Start::Continues } else { Start::Alone };
        let choice = |(stream, stop_tokens)| Choice {
            stream,
            text: loaded.model.codec.stream(start, &stop, include_stop, answer.reply.min_tokens),
            stop_tokens,
            include_stop,
            held: None,
            seen: 0,
            matched: false,
            bill: None,
        };
        Run { choices: streams.into_iter().map(choice).collect(), turn: 0, engine: &loaded.engine }
    }

    /// The next part of any choice, with its index; `None` when all have their bill. Nothing is lost if it is dropped.
    async fn next(&mut self) -> Option<Result<(usize, Part), Failure>> {
        let count = self.choices.len();
        let (index, event) = poll_fn(|cx| {
            let mut waiting = false;
            for offset in 0..count {
                let index = (self.turn + offset) % count;
                let choice = &mut self.choices[index];
                if choice.bill.is_some() {
                    continue;
                }
                match choice.stream.events.poll_recv(cx) {
                    Poll::Ready(event) => return Poll::Ready(Some((index, event))),
                    Poll::Pending => waiting = true,
                }
            }
            if waiting { Poll::Pending } else { Poll::Ready(None) }
        })
        .await?;
        self.turn = index + 1;
        let without_end = || Event::Failed { failure: Failure::Internal("the engine left a sequence without an end".into()) };
        let event = event.unwrap_or_else(without_end);
        Some(self.choices[index].absorb(event, self.engine).map(|part| (index, part)))
    }
}

/// One choice's answer as it grows: what is not yet told, and where the next token's text begins.
#[derive(Default)]
struct Told {
    text: String,
    tokens: Vec<(TokenId, Option<TokenLogprob>)>,
    /// The prompt's share of the log-probabilities, if it is to be told and has not been.
    prompt: Option<Vec<TokenLogprob>>,
    finish: Option<FinishReason>,
    stopped: Option<Stopped>,
    /// Characters of the choice's text before the next token.
    offset: usize,
    begun: bool,
}

impl Told {
    fn add(&mut self, part: Part) {
        self.text.push_str(&part.text);
        self.tokens.extend(part.tokens);
        if part.prompt.is_some() {
            self.prompt = part.prompt;
        }
        self.finish = part.finish.or(self.finish);
        self.stopped = part.stopped.or(self.stopped);
    }

    fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|(id, _)| *id).collect()
    }

    fn chat_logprobs(&self, codec: &dyn Codec) -> ChatLogprobs {
        let text = |id: TokenId, logprob: f32| {
            let bytes = codec.token_bytes(id);
            TokenText { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: logprob.max(LOGPROB_MIN), bytes }
        };
        let content = self.tokens.iter().filter_map(|(id, logprob)| {
            let logprob = logprob.as_ref()?;
            let top_logprobs = logprob.top.iter().map(|&(id, logprob)| text(id, logprob)).collect();
            Some(ChatToken { token: text(*id, logprob.logprob), top_logprobs })
        });
        ChatLogprobs { content: content.collect(), refusal: None }
    }

    /// Log-probabilities of the prompt (if it is still to be told) and of the tokens.
    fn text_logprobs(&mut self, codec: &dyn Codec, prompt: &Prompt) -> Result<CompletionLogprobs, Failure> {
        let mut out = CompletionLogprobs::default();
        if let Some(logprobs) = self.prompt.take() {
            if logprobs.len() + 1 != prompt.tokens.len() {
                return Err(Failure::Internal(format!("{} log-probabilities for a prompt of {}", logprobs.len(), prompt.tokens.len())));
            }
            // What the echo has left to show, while tokens spell it.
            let text = prompt.echo(codec);
            let mut left = Some(text.as_bytes());
            for (&id, logprob) in prompt.tokens.iter().zip(std::iter::once(None).chain(logprobs.iter().map(Some))) {
                let bytes = codec.token_bytes(id);
                // The space that an encoder of the sentencepiece kind put there is not in the text.
                let spelled = [Some(&bytes[..]), bytes.strip_prefix(b" ")].into_iter().flatten();
                let found = left.and_then(|text| spelled.into_iter().find_map(|shown| Some((shown, text.strip_prefix(shown)?))));
                let shown: &[u8] = match found {
                    Some((shown, rest)) => {
                        left = Some(rest);
                        shown
                    }
                    // Added by the tokenizer (BOS).
                    None if prompt.text.is_some() && codec.is_special(id) => &[],
                    // A normaliser changed the text: from here on tokens have their own widths.
                    None => {
                        left = None;
                        &bytes
                    }
                };
                self.list(&mut out, codec, (id, logprob), shown);
            }
        }
        for (id, logprob) in std::mem::take(&mut self.tokens) {
            let bytes = if codec.is_special(id) { Vec::new() } else { codec.token_bytes(id) };
            self.list(&mut out, codec, (id, logprob.as_ref()), &bytes);
        }
        Ok(out)
    }

    /// Lists a token, of which so much is `shown` in the choice's text.
    fn list(&mut self, out: &mut CompletionLogprobs, codec: &dyn Codec, (id, logprob): (TokenId, Option<&TokenLogprob>), shown: &[u8]) {
        let bytes = codec.token_bytes(id);
        out.text_offset.push(self.offset);
        // Characters that begin in this token: a character split over tokens counts where it starts.
        self.offset += shown.iter().filter(|&&b| b & 0xc0 != 0x80).count();
        out.tokens.push(name_of(&bytes));
        out.token_logprobs.push(logprob.map(|l| l.logprob.max(LOGPROB_MIN)));
        out.top_logprobs.push(logprob.map(|l| {
            let mut top: Vec<_> = l.top.iter().map(|&(id, p)| (token_name(codec, id), p.max(LOGPROB_MIN))).collect();
            // The token itself is always among them, as harnesses that look for greedy continuations expect.
            if !l.top.iter().any(|&(other, _)| other == id) {
                top.push((name_of(&bytes), l.logprob.max(LOGPROB_MIN)));
            }
            TopLogprobs(top)
        }));
    }
}

fn token_name(codec: &dyn Codec, id: TokenId) -> String {
    name_of(&codec.token_bytes(id))
}

/// A token's text; bytes that are no UTF-8 in OpenAI's spelling, so that different tokens keep different names.
fn name_of(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, b| format!("{name}\\x{b:02x}")),
    }
}

fn reason_label(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Waits for everything and tells it in one piece.
async fn collect(loaded: &Loaded, answer: &Answer, streams: Submitted) -> Result<Response, Failure> {
    let codec = &*loaded.model.codec;
    let mut run = Run::new(loaded, answer, streams);
    let mut told: Vec<Told> = run.choices.iter().map(|_| Told::default()).collect();
    while let Some(next) = run.next().await {
        let (index, part) = next?;
        told[index].add(part);
    }
    let usage = answer.usage(&run.choices);
    let ids = answer.reply.return_token_ids;
    let finish = |told: &Told| told.finish.map(reason_label).ok_or_else(|| Failure::Internal("a choice ended without a reason".into()));
    let (id, created, model) = (answer.id.clone(), answer.created, answer.reply.model.clone());
    match answer.kind {
        Kind::Chat => {
            let mut choices = Vec::with_capacity(told.len());
            for (index, told) in told.into_iter().enumerate() {
                choices.push(ChatChoice {
                    index,
                    finish_reason: finish(&told)?,
                    stop_reason: answer.stop_reason(&told),
                    logprobs: answer.reply.logprobs.map(|_| told.chat_logprobs(codec)),
                    token_ids: ids.then(|| told.token_ids()),
                    message: ChatMessage { role: "assistant", content: told.text, refusal: None },
                });
            }
            let prompt_token_ids = ids.then(|| answer.prompts[0].tokens.to_vec());
            Ok(Json(ChatCompletion { id, object: "chat.completion", created, model, choices, usage, prompt_token_ids }).into_response())
        }
        Kind::Text => {
            let mut choices = Vec::with_capacity(told.len());
            for (index, mut told) in told.into_iter().enumerate() {
                let finish_reason = Some(finish(&told)?);
                let token_ids = ids.then(|| told.token_ids());
                let (echo, offset) = begin_echo(answer, codec, index, &mut told);
                told.offset = offset;
                let logprobs = answer.reply.logprobs.map(|_| told.text_logprobs(codec, answer.prompt_of(index))).transpose()?;
                choices.push(CompletionChoice {
                    index,
                    text: echo + &told.text,
                    logprobs,
                    finish_reason,
                    stop_reason: answer.stop_reason(&told),
                    token_ids,
                    prompt_token_ids: ids.then(|| answer.prompt_of(index).tokens.to_vec()),
                });
            }
            Ok(Json(Completion { id, object: "text_completion", created, model, choices, usage: Some(Some(usage)) }).into_response())
        }
    }
}

/// The echoed prompt of a choice (empty without `echo`), and where its first listed token begins.
fn begin_echo(answer: &Answer, codec: &dyn Codec, index: usize, told: &mut Told) -> (String, usize) {
    if !answer.reply.echo {
        return (String::new(), 0);
    }
    let text = answer.prompt_of(index).echo(codec).into_owned();
    let listed = answer.reply.logprobs.is_some();
    if listed && told.prompt.is_none() && answer.prompt_of(index).tokens.len() == 1 {
        // A prompt of one token has nothing to report, so the engine may say nothing.
        told.prompt = Some(Vec::new());
    }
    let offset = if listed { 0 } else { text.chars().count() };
    (text, offset)
}

/// The reply of a stream: `200` now, frames as they come.
fn stream(server: Arc<Server>, loaded: Arc<Loaded>, answer: Answer, streams: Submitted) -> Response {
    let (frames, taken) = mpsc::channel(FRAMES_MAX);
    let keep_alive = server.config.keep_alive;
    let script = async move {
        let mut teller = Teller { frames, keep_alive, said: Instant::now() };
        let told = tell(&loaded, &answer, streams, &mut teller).await;
        match told {
            Ok(()) => teller.say(Bytes::from_static(b"data: [DONE]\n\n")).await,
            Err(failure) => {
                let adapter = answer.reply.adapter.as_deref();
                log(&answer.id, &failure, adapter);
                teller.event(&ApiError::failed(&failure, adapter).body()).await;
            }
        }
    };
    let body = Script { taken, script: Some(Box::pin(script)), last: VecDeque::new(), server };
    let mut response = Response::new(Reply::new(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies of the nginx family buffer replies unless they are told not to.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// Writes frames, and knows when it last did.
struct Teller {
    frames: mpsc::Sender<Bytes>,
    keep_alive: Duration,
    said: Instant,
}

impl Teller {
    async fn say(&mut self, bytes: Bytes) {
        // The receiver lives in the body that polls this very script.
        let _ = self.frames.send(bytes).await;
        self.said = Instant::now();
    }

    async fn event<T: Serialize>(&mut self, value: &T) {
        let mut bytes = b"data: ".to_vec();
        match serde_json::to_vec(value) {
            Ok(json) => bytes.extend(json),
            Err(error) => tracing::error!(%error, "a frame could not be encoded"),
        }
        bytes.extend(b"\n\n");
        self.say(bytes.into()).await;
    }
}

async fn tell(loaded: &Loaded, answer: &Answer, streams: Submitted, teller: &mut Teller) -> Result<(), Failure> {
    let codec = &*loaded.model.codec;
    let options = answer.reply.stream.unwrap_or_default();
    let mut run = Run::new(loaded, answer, streams);
    let mut told: Vec<Told> = run.choices.iter().map(|_| Told::default()).collect();
    loop {
        let next = match tokio::time::timeout_at(teller.said + teller.keep_alive, run.next()).await {
            Ok(next) => next,
            Err(_) => {
                teller.say(Bytes::from_static(b": keep-alive\n\n")).await;
                continue;
            }
        };
        let Some(next) = next else { break };
        let (index, part) = next?;
        // A prompt's log-probabilities come with its echo or, if nobody asked for that, are not told at all.
        let told = &mut told[index];
        let over = told.finish.is_some();
        told.add(part);
        if over {
            continue;
        }
        let usage = match (options.continuous_usage_stats, options.include_usage) {
            (true, _) => Some(Some(answer.running_usage(&run.choices))),
            (false, true) => Some(None),
            (false, false) => None,
        };
        match answer.kind {
            Kind::Chat => tell_chat(answer, codec, index, told, usage, teller).await,
            Kind::Text => tell_text(answer, codec, index, told, usage, teller).await?,
        }
    }
    if options.include_usage {
        let usage = Some(Some(answer.usage(&run.choices)));
        match answer.kind {
            Kind::Chat => teller.event(&answer.chat_chunk(Vec::new(), usage)).await,
            Kind::Text => teller.event(&answer.text_chunk(Vec::new(), usage)).await,
        }
    }
    Ok(())
}

impl Answer {
    fn chat_chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Option<Usage>>) -> ChatChunk {
        let (id, created, model) = (self.id.clone(), self.created, self.reply.model.clone());
        ChatChunk { id, object: "chat.completion.chunk", created, model, choices, usage, prompt_token_ids: None }
    }

    fn text_chunk(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> Completion {
        let (id, created, model) = (self.id.clone(), self.created, self.reply.model.clone());
        Completion { id, object: "text_completion", created, model, choices, usage }
    }
}

/// Role, text, end: a chunk for each that there is.
async fn tell_chat(answer: &Answer, codec: &dyn Codec, index: usize, told: &mut Told, usage: Option<Option<Usage>>, teller: &mut Teller) {
    let chunk = |delta, logprobs, token_ids| ChatChunkChoice { index, delta, logprobs, finish_reason: None, stop_reason: None, token_ids };
    if !told.begun {
        told.begun = true;
        let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
        let mut first = answer.chat_chunk(vec![chunk(delta, None, None)], usage.clone());
        first.prompt_token_ids = answer.reply.return_token_ids.then(|| answer.prompts[0].tokens.to_vec());
        teller.event(&first).await;
    }
    let listed = answer.reply.logprobs.is_some() || answer.reply.return_token_ids;
    if !told.text.is_empty() || (listed && told.finish.is_some() && !told.tokens.is_empty()) {
        let logprobs = answer.reply.logprobs.map(|_| told.chat_logprobs(codec));
        let token_ids = answer.reply.return_token_ids.then(|| told.token_ids());
        told.tokens.clear();
        let delta = Delta { role: None, content: Some(std::mem::take(&mut told.text)) };
        teller.event(&answer.chat_chunk(vec![chunk(delta, logprobs, token_ids)], usage.clone())).await;
    }
    if let Some(reason) = told.finish {
        let (finish_reason, stop_reason) = (Some(reason_label(reason)), answer.stop_reason(told));
        let last = ChatChunkChoice { finish_reason, stop_reason, ..chunk(Delta::default(), None, None) };
        teller.event(&answer.chat_chunk(vec![last], usage)).await;
    }
}

/// The echo with the first text, text, and the reason with the last text.
async fn tell_text(
    answer: &Answer,
    codec: &dyn Codec,
    index: usize,
    told: &mut Told,
    usage: Option<Option<Usage>>,
    teller: &mut Teller,
) -> Result<(), Failure> {
    let ids = answer.reply.return_token_ids;
    let first = !told.begun;
    if first {
        told.begun = true;
        let (echo, offset) = begin_echo(answer, codec, index, told);
        told.offset = offset;
        if answer.reply.echo && answer.reply.logprobs.is_some() && told.prompt.is_none() {
            return Err(Failure::Internal("the engine did not report the prompt's log-probabilities first".into()));
        }
        told.text.insert_str(0, &echo);
    }
    if told.text.is_empty() && told.finish.is_none() && !(first && ids) {
        return Ok(());
    }
    let token_ids = ids.then(|| told.token_ids());
    let logprobs = answer.reply.logprobs.map(|_| told.text_logprobs(codec, answer.prompt_of(index))).transpose()?;
    let logprobs = logprobs.filter(|listed| !listed.tokens.is_empty());
    told.tokens.clear();
    let choice = CompletionChoice {
        index,
        text: std::mem::take(&mut told.text),
        logprobs,
        finish_reason: told.finish.map(reason_label),
        stop_reason: answer.stop_reason(told),
        token_ids,
        prompt_token_ids: (first && ids).then(|| answer.prompt_of(index).tokens.to_vec()),
    };
    teller.event(&answer.text_chunk(vec![choice], usage)).await;
    Ok(())
}

/// A body that plays a script: it polls the future that writes its frames.
struct Script {
    taken: mpsc::Receiver<Bytes>,
    /// `None` once it has ended.
    script: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Frames of ours after a script that panicked.
    last: VecDeque<Bytes>,
    server: Arc<Server>,
}

impl hyper::body::Body for Script {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        loop {
            match self.taken.poll_recv(cx) {
                Poll::Ready(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                // The script has ended and its sender with it: only this says that nothing it wrote is left.
                Poll::Ready(None) => return Poll::Ready(self.last.pop_front().map(|bytes| Ok(Frame::data(bytes)))),
                // Nothing there, or a task that has done its share for now (tokio's budget) and is woken again at once.
                Poll::Pending => {}
            }
            let Some(script) = &mut self.script else { return Poll::Pending };
            match std::panic::catch_unwind(AssertUnwindSafe(|| script.as_mut().poll(cx))) {
                Ok(Poll::Ready(())) => self.script = None,
                Ok(Poll::Pending) => match self.taken.poll_recv(cx) {
                    Poll::Ready(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                    _ => return Poll::Pending,
                },
                Err(_) => {
                    tracing::error!("a stream panicked");
                    self.server.telemetry.emit(telemetry::Event::Panicked);
                    self.script = None;
                    let error = serde_json::to_string(&ApiError::internal().body()).unwrap_or_default();
                    self.last.push_back(format!("data: {error}\n\n").into());
                }
            }
        }
    }
}
