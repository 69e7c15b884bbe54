//! The HTTP edge against a scripted engine: transcripts, tables of good and bad requests, hostile clients on real sockets.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use expect_test::{Expect, expect};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use strait::adapters::registry::Lease;
use strait::admission::{Chat, Codec, Defaults, EncodeError, Model, Piece, ServedProfile, TemplateError, TextStream};
use strait::engine::{Engine, EngineHandle, SubmitError, TokenStream};
use strait::ids::{ProfileIndex, SeqId, TokenId};
use strait::kv::layout::{BasisKind, Cskv, Profile};
use strait::request::{CacheUse, Event, Failure, FinishReason, GenerateRequest, Timings, TokenLogprob, Usage};
use strait::scheduler::Limit;
use strait::serve::codec::ModelCodec;
use strait::server::{Config, Keys, Loaded, Origins, Pages, Peer, Phase, ROUTES, Server, serve};
use strait::telemetry::{Branch, Facts, Snapshot, Telemetry};
use strait::text::{Start, Stops, Tokenizer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Barrier, mpsc, watch};
use tower::ServiceExt;

pub(crate) mod adapters;
mod endpoints;
mod generate;
mod parameters;
mod sockets;
mod texts;

// ---------------------------------------------------------------- a codec of bytes

const BOS: TokenId = 256;
const EOS: TokenId = 257;
const VOCAB: usize = 260;

/// Token ids are bytes; 256 is `<s>`, 257 `</s>`.
struct Bytes;

impl Codec for Bytes {
    fn encode(&self, text: &str, add_special_tokens: bool, _: bool) -> Result<Vec<TokenId>, EncodeError> {
        assert!(text != "panic", "a tokenizer that panics");
        if text == "slow" {
            std::thread::sleep(Duration::from_millis(200));
        }
        let bos = add_special_tokens.then_some(BOS);
        Ok(bos.into_iter().chain(text.bytes().map(TokenId::from)).collect())
    }
    fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let bytes: Vec<u8> = ids.iter().filter(|&&id| !skip_special || id < 256).flat_map(|&id| self.token_bytes(id)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
    fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        match id {
            BOS => b"<s>".to_vec(),
            EOS => b"</s>".to_vec(),
            id => vec![u8::try_from(id).expect("a byte")],
        }
    }
    fn is_special(&self, id: TokenId) -> bool {
        id >= BOS
    }
    fn vocab(&self) -> usize {
        VOCAB
    }
    fn max_token_bytes(&self) -> Option<usize> {
        Some(4)
    }
    fn render(&self, chat: &Chat<'_>) -> Result<Vec<TokenId>, TemplateError> {
        let mut text = String::new();
        for message in chat.messages.as_array().expect("an array") {
            let (role, content) = (message["role"].as_str().expect("a role"), message["content"].as_str().unwrap_or("-"));
            if content == "raise" {
                return Err(TemplateError { message: "roles must alternate".into() });
            }
            text += &format!("{role}:{content}\n");
        }
        if chat.continue_final_message {
            text.pop();
        }
        if chat.add_generation_prompt {
            text += "assistant:";
        }
        for (key, value) in chat.kwargs {
            text += &format!("[{key}={value}]");
        }
        Ok(self.encode(&text, false, true).expect("bytes always encode"))
    }
    /// An answer that stands alone loses the space it begins with, as with a tokenizer of the sentencepiece kind.
    fn stream<'a>(&'a self, start: Start, stop: &Stops, include_stop: bool, _: u32) -> Box<dyn TextStream + Send + 'a> {
        Box::new(ByteStream {
            codec: self,
            trims: start == Start::Alone,
            stop: stop.texts().map(str::to_owned).collect(),
            include_stop,
            held: Vec::new(),
        })
    }
}

struct ByteStream<'a> {
    codec: &'a Bytes,
    /// Nothing was pushed yet, and a space would not be told.
    trims: bool,
    stop: Vec<String>,
    include_stop: bool,
    held: Vec<u8>,
}

impl TextStream for ByteStream<'_> {
    fn push(&mut self, id: TokenId) -> Piece {
        assert!(id != 0, "a text stream that panics");
        let trimmed = std::mem::take(&mut self.trims) && id == TokenId::from(b' ');
        if id < 256 && !trimmed {
            self.held.extend(self.codec.token_bytes(id));
        }
        let hit = self.stop.iter().enumerate().filter_map(|(stop, s)| {
            let at = self.held.windows(s.len()).position(|w| w == s.as_bytes())?;
            Some((at, s.len(), stop))
        });
        if let Some((at, len, stop)) = hit.min() {
            let end = if self.include_stop { at + len } else { at };
            return Piece { text: String::from_utf8_lossy(&self.held[..end]).into_owned(), stopped: Some(stop) };
        }
        let whole = match std::str::from_utf8(&self.held) {
            Ok(_) => self.held.len(),
            Err(error) => error.valid_up_to(),
        };
        let open = (0..=whole).find(|&at| self.stop.iter().any(|s| s.as_bytes().starts_with(&self.held[at..]))).unwrap_or(whole);
        let text = self.held.drain(..open.min(whole)).collect();
        Piece { text: String::from_utf8(text).expect("whole characters"), stopped: None }
    }
    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

// ---------------------------------------------------------------- an engine that plays scripts

/// What the engine does for one sequence.
#[derive(Clone)]
enum Step {
    /// One token per byte.
    Say(&'static str),
    Tell(Event),
    Wait(u64),
    /// Waits until all that was told has been read, and then for the other sequences that meet here.
    Meet(Arc<Barrier>),
    /// Nothing more until the sequence is cancelled, or ended by `finish` or `stop`.
    Hang,
    /// Waits for `finish`, then ends with `Done { Stop }`.
    UntilFinish,
    Done(FinishReason),
}
use Step::*;

fn ends(text: &'static str) -> Vec<Step> {
    vec![Say(text), Done(FinishReason::Stop)]
}

type Play = Result<Vec<Step>, SubmitError>;

#[derive(Default)]
struct Seen {
    plays: VecDeque<Play>,
    requests: Vec<GenerateRequest>,
    cancelled: Vec<(SeqId, Instant)>,
    finished: Vec<SeqId>,
}

struct Fake {
    seen: Arc<Mutex<Seen>>,
    next: AtomicU64,
    /// Tokens of `Say` that were handed over.
    said: Arc<AtomicUsize>,
    finish: watch::Sender<BTreeSet<u64>>,
    stopped: watch::Sender<bool>,
    draining: AtomicBool,
    heartbeat: Mutex<Duration>,
}

impl Fake {
    fn new(plays: Vec<Play>) -> Arc<Self> {
        Arc::new(Fake {
            seen: Arc::new(Mutex::new(Seen { plays: plays.into(), ..Seen::default() })),
            next: AtomicU64::new(1),
            said: Arc::default(),
            finish: watch::Sender::new(BTreeSet::new()),
            stopped: watch::Sender::new(false),
            draining: AtomicBool::new(false),
            heartbeat: Mutex::new(Duration::ZERO),
        })
    }
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().expect("no test panics while it holds this")
    }
    async fn cancelled(&self, n: usize) -> Vec<(SeqId, Instant)> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            if self.seen().cancelled.len() >= n {
                return self.seen().cancelled.clone();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{} of {n} sequences were cancelled", self.seen().cancelled.len());
    }
    async fn submitted(&self, n: usize) {
        let begun = Instant::now();
        while self.seen().requests.len() < n {
            assert!(begun.elapsed() < Duration::from_secs(5), "{n} requests did not arrive");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn logprob_of(id: TokenId, alternatives: u32) -> TokenLogprob {
    let top = (0..alternatives).map(|i| (if i == 0 { id } else { TokenId::from(b'A') + i }, -0.5 - i as f32)).collect();
    TokenLogprob { logprob: -0.5, top }
}

async fn play(
    steps: Vec<Step>,
    request: GenerateRequest,
    seq: u64,
    tx: mpsc::Sender<Event>,
    mut finish: watch::Receiver<BTreeSet<u64>>,
    said: Arc<AtomicUsize>,
) {
    let mut generated = 0;
    if let Some(n) = request.prompt_logprobs {
        let logprobs = request.prompt[1..].iter().map(|&id| logprob_of(id, n)).collect();
        let _ = tx.send(Event::Prompt { logprobs }).await;
    }
    let token = |id| Event::Token { id, logprob: request.logprobs.map(|n| logprob_of(id, n)) };
    let done = |reason, generated| {
        let cache = CacheUse { bytes: 4096, sealed_tokens: 64, window_tokens: 10 };
        let timings = Timings { queue: Duration::from_millis(1), prefill: Duration::from_micros(2500), decode: Duration::from_millis(40) };
        let usage = Usage { prompt_tokens: request.prompt.len() as u32, cached_tokens: 2, completion_tokens: generated, cache, timings };
        Event::Done { reason, usage }
    };
    for step in steps {
        let event = match step {
            Say(text) => {
                for byte in text.bytes() {
                    generated += 1;
                    let sent = tx.send(token(TokenId::from(byte))).await;
                    said.fetch_add(usize::from(sent.is_ok()), Ordering::Relaxed);
                }
                continue;
            }
            Tell(Event::Token { id, .. }) => {
                generated += 1;
                token(id)
            }
            Tell(event) => event,
            Wait(ms) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                continue;
            }
            Meet(barrier) => {
                drop(tx.reserve_many(tx.max_capacity()).await);
                barrier.wait().await;
                continue;
            }
            Hang => std::future::pending().await,
            UntilFinish => {
                let _ = finish.wait_for(|all| all.contains(&seq)).await;
                done(FinishReason::Stop, generated)
            }
            Done(reason) => done(reason, generated),
        };
        let _ = tx.send(event).await;
    }
}

impl Fake {
    fn play(&self, request: GenerateRequest, adapter: Option<Lease>) -> Result<TokenStream, SubmitError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(SubmitError::Draining);
        }
        let mut seen = self.seen();
        let steps = seen.plays.pop_front().unwrap_or_else(|| Ok(ends("ok")))?;
        seen.requests.push(request.clone());
        let seq = self.next.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = mpsc::channel(64);
        let (finish, mut stopped, said) = (self.finish.subscribe(), self.stopped.subscribe(), self.said.clone());
        let task = tokio::spawn(async move {
            let _held = adapter;
            let stopped = async { stopped.wait_for(|s| *s).await.is_ok() };
            let forced = tokio::select! {
                () = play(steps, request, seq, tx.clone(), finish, said) => false,
                forced = stopped => forced,
            };
            if forced {
                let _ = tx.send(Event::Failed { failure: Failure::Draining }).await;
            }
        });
        let log = self.seen.clone();
        Ok(TokenStream::new(SeqId(seq), rx, move || {
            task.abort();
            log.lock().expect("no test panics while it holds this").cancelled.push((SeqId(seq), Instant::now()));
        }))
    }
}

impl Engine for Fake {
    fn submit_all(&self, requests: Vec<GenerateRequest>, adapter: Option<Lease>) -> Result<Vec<TokenStream>, SubmitError> {
        requests.into_iter().map(|request| self.play(request, adapter.clone())).collect()
    }
    fn finish(&self, seq: SeqId) {
        self.seen().finished.push(seq);
        self.finish.send_modify(|all| {
            all.insert(seq.0);
        });
    }
    fn snapshot(&self) -> Arc<Snapshot> {
        let branches = vec![(1, Branch::SealedKeys, 100)];
        Arc::new(Snapshot {
            running: 1,
            waiting: 2,
            arena_bytes: 100_000,
            free_bytes: 30_000,
            cached_bytes: 20_000,
            branches,
            ..Snapshot::default()
        })
    }
    fn heartbeat_age(&self) -> Duration {
        *self.heartbeat.lock().expect("no test panics while it holds this")
    }
    fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
    fn stop(&self) {
        self.stopped.send_replace(true);
    }
}

// ---------------------------------------------------------------- the server under test

fn model() -> Model {
    let cskv = Cskv::shares((0.2, 0.2), 16, (64, 4), BasisKind::Joint);
    let served = |name: &str, cskv, bytes_per_token| ServedProfile { profile: Profile { name: name.into(), cskv }, bytes_per_token };
    Model {
        names: vec!["demo".into(), "org/demo".into()],
        root: "/models/demo".into(),
        created: 1_700_000_000,
        context: 1000,
        codec: Arc::new(Bytes),
        profiles: vec![served("full", None, 100.0), served("cskv-80", Some(cskv), 20.0)],
        default_profile: ProfileIndex(1),
        defaults: Defaults { temperature: 0.7, top_k: 20, eos: vec![EOS], ..Defaults::default() },
        queue_timeout: Duration::from_secs(30),
        adapters: None,
    }
}

fn config() -> Config {
    Config::new(Pages { chat: "<!doctype html>chat", dashboard: "<!doctype html>dashboard" })
}

fn install(server: &Server, fake: &Arc<Fake>) {
    install_model(server, fake, model());
}

fn install_model(server: &Server, fake: &Arc<Fake>, model: Model) {
    let profiles = model.profiles.iter().map(|p| (p.profile.name.clone(), p.bytes_per_token)).collect();
    server.telemetry.describe(Facts { profiles, default_profile: 1, page_tokens: 64, pages: 10, prefix_caching: true, model_bytes: 1 });
    let need = Arc::new(|profile: ProfileIndex, tokens: u32| u64::from(tokens) * if profile.0 == 0 { 100 } else { 20 });
    server.install(Loaded { model, engine: EngineHandle::new(fake.clone()), need, adapters: adapters::none() });
}

struct App {
    server: Arc<Server>,
    fake: Arc<Fake>,
    router: Router,
}

fn app_with(config: Config, plays: Vec<Play>) -> App {
    let server = Server::new(config, Arc::new(Telemetry::new("demo")));
    let fake = Fake::new(plays);
    install(&server, &fake);
    App { router: server.router(), server, fake }
}

fn app_of(config: Config, model: Model) -> App {
    let server = Server::new(config, Arc::new(Telemetry::new("demo")));
    let fake = Fake::new(vec![]);
    install_model(&server, &fake, model);
    App { router: server.router(), server, fake }
}

fn app(plays: Vec<Play>) -> App {
    app_with(config(), plays)
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }
    /// `200`, or `400 code param`.
    fn verdict(&self) -> String {
        if self.status.is_success() {
            return self.status.as_u16().to_string();
        }
        let error = &self.json()["error"];
        let object: Vec<_> = error.as_object().expect("an error object").keys().map(String::as_str).collect();
        assert_eq!(object, ["message", "type", "param", "code"]);
        let message = error["message"].as_str().expect("a message");
        assert!(!message.is_empty() && message.chars().count() <= 300, "{message}");
        assert_eq!(self.headers["content-type"], "application/json");
        format!("{} {} {}", self.status.as_u16(), error["code"].as_str().expect("a code"), error["param"].as_str().unwrap_or("-"))
    }
}

impl App {
    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("the router does not fail");
        let (parts, body) = response.into_parts();
        assert!(parts.headers.contains_key("x-request-id"), "every reply has an id");
        let bytes = body.collect().await.expect("the body does not fail").to_bytes();
        Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).expect("text") }
    }
    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).header("host", "localhost").body(Body::empty()).expect("a request")).await
    }
    async fn post_bytes(&self, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::post(path).header("host", "localhost").header("content-type", "application/json");
        self.send(request.header("x-request-id", "r1").body(body.into()).expect("a request")).await
    }
    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string()).await
    }
}

/// Times differ from run to run.
fn scrub(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((head, tail)) = rest.split_once("\"created\":") {
        let tail = tail.trim_start();
        out += head;
        out += "\"created\":0";
        rest = tail.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out + rest
}

fn check(answer: &Answer, want: &Expect) {
    want.assert_eq(&scrub(&answer.text));
}

fn check_pretty(answer: &Answer, want: &Expect) {
    want.assert_eq(&scrub(&serde_json::to_string_pretty(&answer.json()).expect("JSON")));
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn hello() -> Value {
    json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}]})
}

fn with(mut base: Value, extra: &Value) -> Value {
    for (key, value) in extra.as_object().expect("an object") {
        base[key] = value.clone();
    }
    base
}

fn frames(text: &str) -> Vec<Value> {
    let data = text.split("\n\n").filter_map(|f| f.strip_prefix("data: ")).filter(|f| *f != "[DONE]");
    data.map(|f| serde_json::from_str(f).expect("JSON")).collect()
}

fn texts(frames: &[Value]) -> String {
    frames.iter().filter_map(|f| f["choices"][0]["text"].as_str()).collect()
}
