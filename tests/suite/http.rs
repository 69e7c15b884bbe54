//! The HTTP edge against a scripted engine: transcripts, tables of good and bad requests, hostile clients on real sockets.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use expect_test::{Expect, expect};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use strait::admission::{Chat, Codec, Defaults, EncodeError, Model, Piece, ServedProfile, TemplateError, TextStream};
use strait::engine::{Engine, EngineHandle, SubmitError, TokenStream};
use strait::ids::{ProfileIndex, SeqId, TokenId};
use strait::kv::layout::{BasisKind, Cskv, Profile};
use strait::request::{CacheUse, Event, Failure, FinishReason, GenerateRequest, TokenLogprob, Usage};
use strait::server::{Config, Keys, Loaded, Pages, Peer, Phase, ROUTES, Server, serve};
use strait::telemetry::{Branch, Facts, Snapshot, Telemetry};
use strait::text::Start;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tower::ServiceExt;

// ---------------------------------------------------------------- a codec of bytes

const BOS: TokenId = 256;
const EOS: TokenId = 257;
const VOCAB: usize = 260;

/// Token ids are bytes; 256 is `<s>`, 257 `</s>`.
struct Bytes;

impl Codec for Bytes {
    fn encode(&self, text: &str, add_special_tokens: bool, _: bool) -> Result<Vec<TokenId>, EncodeError> {
        assert!(text != "panic", "a tokenizer that panics");
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
    fn stream<'a>(&'a self, _: Start, stop: &[String], include_stop: bool) -> Box<dyn TextStream + Send + 'a> {
        Box::new(ByteStream { codec: self, stop: stop.to_vec(), include_stop, held: Vec::new() })
    }
}

struct ByteStream<'a> {
    codec: &'a Bytes,
    stop: Vec<String>,
    include_stop: bool,
    held: Vec<u8>,
}

impl TextStream for ByteStream<'_> {
    fn push(&mut self, id: TokenId) -> Piece {
        assert!(id != 0, "a text stream that panics");
        if id < 256 {
            self.held.extend(self.codec.token_bytes(id));
        }
        let hit = self.stop.iter().filter_map(|s| {
            let at = self.held.windows(s.len()).position(|w| w == s.as_bytes())?;
            Some((at, s.len()))
        });
        if let Some((at, len)) = hit.min() {
            let end = if self.include_stop { at + len } else { at };
            return Piece { text: String::from_utf8_lossy(&self.held[..end]).into_owned(), stopped: true };
        }
        let whole = match std::str::from_utf8(&self.held) {
            Ok(_) => self.held.len(),
            Err(error) => error.valid_up_to(),
        };
        let open = (0..=whole).find(|&at| self.stop.iter().any(|s| s.as_bytes().starts_with(&self.held[at..]))).unwrap_or(whole);
        let text = self.held.drain(..open.min(whole)).collect();
        Piece { text: String::from_utf8(text).expect("whole characters"), stopped: false }
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

async fn play(steps: Vec<Step>, request: GenerateRequest, seq: u64, tx: mpsc::Sender<Event>, mut finish: watch::Receiver<BTreeSet<u64>>) {
    let mut generated = 0;
    if let Some(n) = request.prompt_logprobs {
        let logprobs = request.prompt[1..].iter().map(|&id| logprob_of(id, n)).collect();
        let _ = tx.send(Event::Prompt { logprobs }).await;
    }
    let token = |id| Event::Token { id, logprob: request.logprobs.map(|n| logprob_of(id, n)) };
    let done = |reason, generated| {
        let cache = CacheUse { bytes: 4096, sealed_tokens: 64, window_tokens: 10 };
        let usage = Usage { prompt_tokens: request.prompt.len() as u32, cached_tokens: 2, completion_tokens: generated, cache };
        Event::Done { reason, usage }
    };
    for step in steps {
        let event = match step {
            Say(text) => {
                for byte in text.bytes() {
                    generated += 1;
                    let _ = tx.send(token(TokenId::from(byte))).await;
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

impl Engine for Fake {
    fn submit(&self, request: GenerateRequest) -> Result<TokenStream, SubmitError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(SubmitError::Draining);
        }
        let mut seen = self.seen();
        let steps = seen.plays.pop_front().unwrap_or_else(|| Ok(ends("ok")))?;
        seen.requests.push(request.clone());
        let seq = self.next.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = mpsc::channel(64);
        let (finish, mut stopped) = (self.finish.subscribe(), self.stopped.subscribe());
        let task = tokio::spawn(async move {
            let stopped = async { stopped.wait_for(|s| *s).await.is_ok() };
            let forced = tokio::select! {
                () = play(steps, request, seq, tx.clone(), finish) => false,
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
    fn finish(&self, seq: SeqId) {
        self.seen().finished.push(seq);
        self.finish.send_modify(|all| {
            all.insert(seq.0);
        });
    }
    fn snapshot(&self) -> Arc<Snapshot> {
        let branches = vec![(1, Branch::SealedKeys, 100)];
        Arc::new(Snapshot { running: 1, waiting: 2, arena_bytes: 100_000, free_bytes: 30_000, cached_bytes: 20_000, branches })
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
    let cskv = Cskv { key_rank: 0.2, value_rank: 0.2, bits: 16, window: 64, sinks: 4, basis: BasisKind::Joint };
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
    }
}

fn config() -> Config {
    Config::new(Pages { chat: "<!doctype html>chat", dashboard: "<!doctype html>dashboard" })
}

fn install(server: &Server, fake: &Arc<Fake>) {
    let profiles = model().profiles.iter().map(|p| (p.profile.name.clone(), p.bytes_per_token)).collect();
    server.telemetry.describe(Facts { profiles, default_profile: 1, page_tokens: 64, pages: 10, prefix_caching: true, model_bytes: 1 });
    let need = Arc::new(|profile: ProfileIndex, tokens: u32| u64::from(tokens) * if profile.0 == 0 { 100 } else { 20 });
    server.install(Loaded { model: model(), engine: EngineHandle::new(fake.clone()), need });
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

// ---------------------------------------------------------------- transcripts

#[tokio::test]
async fn a_chat_in_one_piece() {
    let app = app(vec![Ok(vec![Say("Hello"), Tell(Event::Token { id: EOS, logprob: None }), Done(FinishReason::Stop)])]);
    let answer = app.post(CHAT, &hello()).await;
    check_pretty(
        &answer,
        &expect![[r#"
        {
          "id": "chatcmpl-r1",
          "object": "chat.completion",
          "created":0,
          "model": "demo",
          "choices": [
            {
              "index": 0,
              "message": {
                "role": "assistant",
                "content": "Hello",
                "refusal": null
              },
              "logprobs": null,
              "finish_reason": "stop"
            }
          ],
          "usage": {
            "prompt_tokens": 18,
            "completion_tokens": 6,
            "total_tokens": 24,
            "prompt_tokens_details": {
              "cached_tokens": 2
            },
            "kv_cache": {
              "profile": "cskv-80",
              "bytes": 4096,
              "sealed_tokens": 64,
              "window_tokens": 10
            }
          }
        }"#]],
    );
    assert_eq!(answer.headers["x-request-id"], "r1");
    assert_eq!(app.fake.seen().requests[0].prompt.len(), "user:hi\nassistant:".len());
}

#[tokio::test]
async fn a_chat_as_a_stream() {
    let app = app(vec![Ok(vec![Say("Hé"), Done(FinishReason::Length)])]);
    let answer = app.post(CHAT, &with(hello(), &json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(answer.headers["cache-control"], "no-store");
    check(
        &answer,
        &expect![[r#"
        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"H"},"logprobs":null,"finish_reason":null}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"é"},"logprobs":null,"finish_reason":null}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[],"usage":{"prompt_tokens":18,"completion_tokens":3,"total_tokens":21,"prompt_tokens_details":{"cached_tokens":2},"kv_cache":{"profile":"cskv-80","bytes":4096,"sealed_tokens":64,"window_tokens":10}}}

        data: [DONE]

    "#]],
    );
}

#[tokio::test]
async fn a_stream_with_running_counts_token_ids_and_logprobs() {
    let app = app(vec![Ok(ends("ab"))]);
    let extra = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}, "return_token_ids": true, "logprobs": true, "top_logprobs": 1});
    check(
        &app.post(CHAT, &with(hello(), &extra)).await,
        &expect![[r#"
        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":18,"completion_tokens":1,"total_tokens":19},"prompt_token_ids":[117,115,101,114,58,104,105,10,97,115,115,105,115,116,97,110,116,58]}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]}]}],"refusal":null},"finish_reason":null,"token_ids":[97]}],"usage":{"prompt_tokens":18,"completion_tokens":1,"total_tokens":19}}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"b"},"logprobs":{"content":[{"token":"b","logprob":-0.5,"bytes":[98],"top_logprobs":[{"token":"b","logprob":-0.5,"bytes":[98]}]}],"refusal":null},"finish_reason":null,"token_ids":[98]}],"usage":{"prompt_tokens":18,"completion_tokens":2,"total_tokens":20}}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":18,"completion_tokens":2,"total_tokens":20}}

        data: [DONE]

    "#]],
    );
}

#[tokio::test]
async fn two_choices_are_two_sequences_with_their_own_seeds() {
    let app = app(vec![
        Ok(vec![Say("a"), Wait(40), Say("A"), Done(FinishReason::Stop)]),
        Ok(vec![Wait(20), Say("b"), Done(FinishReason::Length)]),
    ]);
    let answer = app.post(TEXT, &json!({"prompt": "x", "n": 2, "seed": 7, "stream": true})).await;
    check(
        &answer,
        &expect![[r#"
        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":1,"text":"b","logprobs":null,"finish_reason":null}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":1,"text":"","logprobs":null,"finish_reason":"length"}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":0,"text":"A","logprobs":null,"finish_reason":null}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}]}

        data: [DONE]

    "#]],
    );
    let seeds: Vec<_> = app.fake.seen().requests.iter().map(|r| r.sampling.seed).collect();
    assert_eq!(seeds[0], 7);
    assert_ne!(seeds[1], 7);
}

#[tokio::test]
async fn prompts_and_choices_are_indexed_prompt_by_prompt() {
    let app = app(["a", "b", "c", "d"].map(|t| Ok(ends(t))).into());
    let answer = app.post(TEXT, &json!({"prompt": ["x", "yy"], "n": 2, "seed": -1, "echo": true, "max_tokens": 3})).await.json();
    let told: Vec<_> =
        answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].as_str().expect("text").to_owned()).collect();
    assert_eq!(told, ["xa", "xb", "yyc", "yyd"]);
    // BOS and the text, each prompt once; cached tokens once per prompt; every choice's cache.
    assert_eq!(answer["usage"]["prompt_tokens"], 2 + 3);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
    assert_eq!(answer["usage"]["kv_cache"]["bytes"], 4 * 4096);
    let seeds: Vec<_> = app.fake.seen().requests.iter().map(|r| r.sampling.seed).collect();
    assert_eq!((seeds[0], seeds[1]), (seeds[2], seeds[3]), "a prompt's seeds do not depend on its neighbours");
    assert_eq!(seeds[0], u64::MAX);
}

#[tokio::test]
async fn echo_with_logprobs_scores_a_prompt_as_evaluation_harnesses_ask() {
    for stream in [false, true] {
        let app = app(vec![Ok(vec![Done(FinishReason::Length)])]);
        let body = json!({"prompt": "hé!", "echo": true, "logprobs": 1, "max_tokens": 0, "add_special_tokens": false, "stream": stream});
        let answer = app.post(TEXT, &body).await;
        let frames = if stream { frames(&answer.text) } else { vec![answer.json()] };
        let json = &frames[0];
        assert_eq!(json["choices"][0]["text"], "hé!");
        assert_eq!(frames[frames.len() - 1]["choices"][0]["finish_reason"], "length");
        expect![[r#"{"text_offset":[0,1,2,2],"token_logprobs":[null,-0.5,-0.5,-0.5],"tokens":["h","bytes:\\xc3","bytes:\\xa9","!"],"top_logprobs":[null,{"bytes:\\xc3":-0.5},{"bytes:\\xa9":-0.5},{"!":-0.5}]}"#]].assert_eq(&json["choices"][0]["logprobs"].to_string());
        let seen = app.fake.seen();
        assert_eq!((seen.requests[0].max_new_tokens, seen.requests[0].prompt_logprobs), (0, Some(1)));
    }
}

#[tokio::test]
async fn a_harness_finds_one_logprob_per_token_also_when_the_last_is_eos() {
    let app = app(vec![Ok(vec![Tell(Event::Token { id: EOS, logprob: None }), Done(FinishReason::Stop)])]);
    let answer = app.post(TEXT, &json!({"prompt": [104, 105], "echo": true, "logprobs": 0, "max_tokens": 1})).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "hi");
    assert_eq!(choice["logprobs"]["tokens"], json!(["h", "i", "</s>"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
    // Without alternatives the token itself is still listed.
    assert_eq!(choice["logprobs"]["top_logprobs"], json!([null, {"i": -0.5}, {"</s>": -0.5}]));
}

#[tokio::test]
async fn offsets_are_places_in_the_text() {
    let app = app(vec![Ok(ends("é!"))]);
    let answer = app.post(TEXT, &json!({"prompt": "a<s>", "echo": true, "logprobs": 0})).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "a<s>é!");
    // BOS was added by the tokenizer and is not in the text; what the client wrote is.
    assert_eq!(choice["logprobs"]["tokens"], json!(["<s>", "a", "<", "s", ">", "bytes:\\xc3", "bytes:\\xa9", "!"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 1, 2, 3, 4, 5, 5]));
}

#[tokio::test]
async fn minus_infinity_and_bytes_that_are_no_text_fit_json() {
    let deep = TokenLogprob { logprob: f32::NEG_INFINITY, top: vec![(0xc3, f32::NEG_INFINITY), (0xa9, -1.0)] };
    let token = |id| Event::Token { id, logprob: Some(deep.clone()) };
    // The player replaces log-probabilities of `Token`s, so the stream is made by hand.
    struct Raw(Mutex<Vec<Event>>);
    impl Engine for Raw {
        fn submit(&self, _: GenerateRequest) -> Result<TokenStream, SubmitError> {
            let (tx, rx) = mpsc::channel(8);
            self.0.lock().expect("unshared").drain(..).for_each(|event| tx.try_send(event).expect("room"));
            Ok(TokenStream::new(SeqId(1), rx, || {}))
        }
        fn finish(&self, _: SeqId) {}
        fn snapshot(&self) -> Arc<Snapshot> {
            Arc::default()
        }
        fn heartbeat_age(&self) -> Duration {
            Duration::ZERO
        }
        fn drain(&self) {}
        fn stop(&self) {}
    }
    for (path, key) in [(TEXT, "prompt"), (CHAT, "messages")] {
        let done = Event::Done { reason: FinishReason::Stop, usage: Usage::default() };
        let engine = EngineHandle::new(Arc::new(Raw(Mutex::new(vec![token(0xc3), token(0xa9), done]))));
        let server = Server::new(config(), Arc::new(Telemetry::new("demo")));
        server.install(Loaded { model: model(), engine, need: Arc::new(|_, _| 0) });
        let app = App { router: server.router(), server, fake: Fake::new(vec![]) };
        let logprobs = if path == TEXT { json!(2) } else { json!(true) };
        let prompt = if path == TEXT { json!("x") } else { hello()["messages"].clone() };
        let answer = app.post(path, &json!({key: prompt, "logprobs": logprobs})).await.json();
        let choice = &answer["choices"][0];
        match path {
            TEXT => expect![[r#"{"index":0,"text":"é","logprobs":{"text_offset":[0,1],"token_logprobs":[-9999.0,-9999.0],"tokens":["bytes:\\xc3","bytes:\\xa9"],"top_logprobs":[{"bytes:\\xc3":-9999.0,"bytes:\\xa9":-1.0},{"bytes:\\xc3":-9999.0,"bytes:\\xa9":-1.0}]},"finish_reason":"stop"}"#]].assert_eq(&choice.to_string()),
            _ => expect![[r#"{"index":0,"message":{"role":"assistant","content":"é","refusal":null},"logprobs":{"content":[{"token":"�","logprob":-9999.0,"bytes":[195],"top_logprobs":[{"token":"�","logprob":-9999.0,"bytes":[195]},{"token":"�","logprob":-1.0,"bytes":[169]}]},{"token":"�","logprob":-9999.0,"bytes":[169],"top_logprobs":[{"token":"�","logprob":-9999.0,"bytes":[195]},{"token":"�","logprob":-1.0,"bytes":[169]}]}],"refusal":null},"finish_reason":"stop"}"#]].assert_eq(&choice.to_string()),
        }
    }
}

// ---------------------------------------------------------------- stop strings and endings

#[tokio::test]
async fn a_stop_string_ends_the_choice_exactly_and_bills_what_was_seen() {
    for (say, extra, text, completion_tokens) in [
        ("one two three", json!({"stop": "two"}), "one ", 7),
        ("one two three", json!({"stop": ["x", "two"], "include_stop_str_in_output": true}), "one two", 7),
        ("aaab", json!({"stop": ["aab"]}), "a", 4),
        ("Ünd", json!({"stop": ["nd"]}), "Ü", 4),
    ] {
        for stream in [false, true] {
            let app = app(vec![Ok(vec![Say(say), UntilFinish])]);
            let body = with(
                with(json!({"prompt": "x", "stream": stream}), &extra),
                &json!({"stream_options": stream.then(|| json!({"include_usage": true}))}),
            );
            let answer = app.post(TEXT, &body).await;
            let (told, usage) = match stream {
                false => (answer.json()["choices"][0]["text"].as_str().expect("text").to_owned(), answer.json()["usage"].clone()),
                true => {
                    let frames = frames(&answer.text);
                    (texts(&frames), frames[frames.len() - 1]["usage"].clone())
                }
            };
            assert_eq!(told, text);
            assert_eq!(usage["completion_tokens"], completion_tokens, "{say}");
            assert_eq!(usage["kv_cache"], json!({"profile": "cskv-80", "bytes": 4096, "sealed_tokens": 64, "window_tokens": 10}));
            assert_eq!(app.fake.seen().finished, [SeqId(1)]);
        }
    }
}

fn frames(text: &str) -> Vec<Value> {
    let data = text.split("\n\n").filter_map(|f| f.strip_prefix("data: ")).filter(|f| *f != "[DONE]");
    data.map(|f| serde_json::from_str(f).expect("JSON")).collect()
}

fn texts(frames: &[Value]) -> String {
    frames.iter().filter_map(|f| f["choices"][0]["text"].as_str()).collect()
}

#[tokio::test]
async fn a_stop_token_is_not_text_unless_generation_went_on() {
    let dot = TokenId::from(b'.');
    let token = |id| Tell(Event::Token { id, logprob: None });
    for (steps, extra, text) in [
        (vec![Say("a"), token(dot), Done(FinishReason::Stop)], json!({}), "a"),
        (vec![Say("a"), token(dot), Done(FinishReason::Stop)], json!({"include_stop_str_in_output": true}), "a."),
        (vec![Say("a"), token(dot), Say("b"), Done(FinishReason::Stop)], json!({"min_tokens": 3}), "a.b"),
        (vec![Say("a"), token(dot), Done(FinishReason::Length)], json!({"min_tokens": 2}), "a."),
        (vec![token(EOS), Done(FinishReason::Stop)], json!({}), ""),
    ] {
        let app = app(vec![Ok(steps)]);
        let body = with(json!({"prompt": "x", "stop_token_ids": [dot]}), &extra);
        let answer = app.post(TEXT, &body).await.json();
        assert_eq!(answer["choices"][0]["text"], text, "{extra}");
    }
}

#[tokio::test]
async fn an_abnormal_end_is_a_status_or_an_error_event_without_done() {
    for (failure, verdict) in [
        (Failure::Numerical, "500 numerical_error -"),
        (Failure::OutOfPages, "503 out_of_pages -"),
        (Failure::QueueTimeout, "503 deadline_exceeded -"),
        (Failure::Internal("canary".into()), "500 internal_error -"),
        (Failure::Draining, "503 draining -"),
    ] {
        let failed = || vec![Ok(vec![Say("abc"), Tell(Event::Failed { failure: failure.clone() })])];
        let answer = app(failed()).post(CHAT, &hello()).await;
        assert_eq!(answer.verdict(), verdict);
        assert_eq!(answer.headers.contains_key("retry-after"), answer.status == 503);
        assert!(!answer.text.contains("canary"));

        let answer = app(failed()).post(CHAT, &with(hello(), &json!({"stream": true}))).await;
        assert_eq!(answer.status, 200);
        let frames = frames(&answer.text);
        let code = frames[frames.len() - 1]["error"]["code"].as_str().expect("an error event last");
        assert!(verdict.contains(code), "{code}");
        assert!(!answer.text.contains("[DONE]") && !answer.text.contains("canary"));
    }
    // An engine that dies leaves a sequence without an end.
    let app = app(vec![Ok(vec![Say("abc")])]);
    assert_eq!(app.post(CHAT, &hello()).await.verdict(), "500 internal_error -");
}

#[tokio::test]
async fn a_failed_choice_ends_its_siblings() {
    let app = app(vec![Ok(vec![Hang]), Ok(vec![Tell(Event::Failed { failure: Failure::Numerical })])]);
    assert_eq!(app.post(CHAT, &with(hello(), &json!({"n": 2}))).await.verdict(), "500 numerical_error -");
    assert_eq!(app.fake.cancelled(2).await.len(), 2);
}

#[tokio::test]
async fn panics_end_one_request() {
    let app = app(vec![Ok(vec![Say("a\0")])]);
    assert_eq!(app.post(TEXT, &json!({"prompt": "panic"})).await.verdict(), "500 internal_error -");
    let answer = app.post(TEXT, &json!({"prompt": "x", "stream": true})).await;
    assert!(answer.text.contains("\"internal_error\"") && !answer.text.contains("[DONE]"), "{}", answer.text);
    app.fake.seen().plays.push_back(Ok(vec![Say("\0")]));
    assert_eq!(app.post(TEXT, &json!({"prompt": "x"})).await.verdict(), "500 internal_error -");
    assert_eq!(app.post(TEXT, &json!({"prompt": "x"})).await.status, 200);
    assert!(app.server.telemetry.render().contains("strait:panics_total 3\n"));
}

// ---------------------------------------------------------------- parameters

#[tokio::test]
async fn parameters_of_a_chat() {
    let ok = "200";
    let long = "x".repeat(300);
    let many_kwargs: Value = (0..33).map(|i| (format!("k{i}"), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let many_biases: Value = (0..1025).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let table = [
        // P01 and P02: numbers
        (json!({"temperature": 0}), ok),
        (json!({"temperature": 2}), ok),
        (json!({"temperature": null}), ok),
        (json!({"temperature": 1e-50}), ok),
        (json!({"temperature": -0.0}), ok),
        (json!({"temperature": 1e39}), "400 invalid_value temperature"),
        (json!({"temperature": -1e39}), "400 invalid_value temperature"),
        (json!({"temperature": -0.1}), "400 invalid_value temperature"),
        (json!({"temperature": 2.1}), "400 invalid_value temperature"),
        (json!({"temperature": "0.5"}), "400 invalid_type temperature"),
        (json!({"temperature": true}), "400 invalid_type temperature"),
        (json!({"temperature": {}}), "400 invalid_type temperature"),
        (json!({"top_p": 1}), ok),
        (json!({"top_p": 1e-50}), ok),
        (json!({"top_p": 0}), "400 invalid_value top_p"),
        (json!({"top_p": 1.1}), "400 invalid_value top_p"),
        (json!({"top_k": -1}), ok),
        (json!({"top_k": 0}), ok),
        (json!({"top_k": 100_000}), ok),
        (json!({"top_k": -2}), "400 invalid_value top_k"),
        (json!({"top_k": 1.0}), "400 invalid_type top_k"),
        (json!({"min_p": 1}), ok),
        (json!({"min_p": -0.1}), "400 invalid_value min_p"),
        (json!({"presence_penalty": -2}), ok),
        (json!({"presence_penalty": 2.5}), "400 invalid_value presence_penalty"),
        (json!({"frequency_penalty": "1"}), "400 invalid_type frequency_penalty"),
        (json!({"repetition_penalty": 2}), ok),
        (json!({"repetition_penalty": 0}), "400 invalid_value repetition_penalty"),
        (json!({"repetition_penalty": 1e-50}), "400 invalid_value repetition_penalty"),
        (json!({"repetition_penalty": 2.01}), "400 invalid_value repetition_penalty"),
        // P03 and P04: limits
        (json!({"max_tokens": 1}), ok),
        (json!({"max_tokens": null, "max_completion_tokens": 5}), ok),
        (json!({"max_tokens": 5, "max_completion_tokens": 5}), ok),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": 0}), "400 invalid_value max_tokens"),
        (json!({"max_completion_tokens": 0}), "400 invalid_value max_completion_tokens"),
        (json!({"max_tokens": -1}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": 1.0}), "400 invalid_type max_tokens"),
        (json!({"max_tokens": 4_294_967_296_u64}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": 1000}), "400 context_length_exceeded max_tokens"),
        (json!({"min_tokens": 5, "max_tokens": 5}), ok),
        (json!({"min_tokens": 6, "max_tokens": 5}), "400 invalid_value min_tokens"),
        (json!({"min_tokens": 1000, "max_tokens": null}), "400 invalid_value min_tokens"),
        // P05 and P06
        (json!({"n": 8}), ok),
        (json!({"n": 0}), "400 invalid_value n"),
        (json!({"n": 9}), "400 invalid_value n"),
        (json!({"n": u64::MAX}), "400 invalid_value n"),
        (json!({"best_of": 1}), ok),
        (json!({"best_of": 2}), "400 unsupported_parameter best_of"),
        (json!({"use_beam_search": true}), "400 unsupported_parameter use_beam_search"),
        (json!({"suffix": "x"}), "400 unsupported_parameter suffix"),
        (json!({"prompt_embeds": "x"}), "400 unsupported_parameter prompt_embeds"),
        (json!({"audio": {}}), "400 unsupported_parameter audio"),
        (json!({"modalities": ["text"]}), ok),
        (json!({"modalities": ["text", "audio"]}), "400 unsupported_parameter modalities"),
        (json!({"tools": [], "tool_choice": "auto"}), ok),
        (json!({"tools": null, "tool_choice": "none"}), ok),
        (json!({"tools": [{}]}), "400 unsupported_parameter tools"),
        (json!({"tool_choice": "required"}), "400 unsupported_parameter tool_choice"),
        (json!({"response_format": {"type": "text"}}), ok),
        (json!({"response_format": {"type": "json_object"}}), "400 unsupported_parameter response_format"),
        (json!({"structured_outputs": {"regex": "a"}}), "400 unsupported_parameter structured_outputs"),
        (json!({"guided_json": {}}), "400 unsupported_parameter guided_json"),
        (json!({"functions": []}), ok),
        (json!({"echo": true}), "400 unsupported_parameter echo"),
        (json!({"skip_special_tokens": false}), "400 unsupported_parameter skip_special_tokens"),
        (json!({"store": true}), "400 unsupported_parameter store"),
        // P09: stop
        (json!({"stop": []}), ok),
        (json!({"stop": null}), ok),
        (json!({"stop": ["a", "b", "c", "\u{0}"]}), ok),
        (json!({"stop": ""}), "400 invalid_value stop"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "400 invalid_value stop"),
        (json!({"stop": long}), "400 invalid_value stop"),
        (json!({"stop": 1}), "400 invalid_type stop"),
        (json!({"stop": [1]}), "400 invalid_type stop"),
        (json!({"stop_token_ids": [1, 2]}), ok),
        (json!({"stop_token_ids": [VOCAB]}), "400 invalid_value stop_token_ids"),
        (json!({"stop_token_ids": [-1]}), "400 invalid_type stop_token_ids"),
        // P12 and P13: logit_bias
        (json!({"logit_bias": {"5": -100, "259": 100.0}}), ok),
        (json!({"logit_bias": {"260": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"-1": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"+1": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"abc": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"4294967296": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"1": 1e39}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"1": "1"}}), "400 invalid_type logit_bias"),
        (json!({"logit_bias": {"1": 1, "01": 2}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": many_biases}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": [1]}), "400 invalid_type logit_bias"),
        // P15: logprobs
        (json!({"logprobs": true, "top_logprobs": 20}), ok),
        (json!({"logprobs": true, "top_logprobs": 21}), "400 invalid_value top_logprobs"),
        (json!({"top_logprobs": 1}), "400 invalid_value top_logprobs"),
        (json!({"logprobs": 1}), "400 invalid_type logprobs"),
        // P16: seeds
        (json!({"seed": i64::MIN}), ok),
        (json!({"seed": u64::MAX}), ok),
        (json!({"seed": 1.5}), "400 invalid_type seed"),
        (json!({"seed": 1e30}), "400 invalid_type seed"),
        // P17: model
        (json!({"model": "org/demo"}), ok),
        (json!({"model": null}), ok),
        (json!({"model": ""}), "400 invalid_value model"),
        (json!({"model": "../x"}), "404 model_not_found model"),
        (json!({"model": "demo:adapter"}), "404 model_not_found model"),
        (json!({"model": "x".repeat(1 << 20)}), "400 invalid_value model"),
        // P18: streams
        (json!({"stream_options": {"include_usage": true}}), "400 invalid_value stream_options"),
        (json!({"stream": "yes"}), "400 invalid_type stream"),
        (json!({"stream": true, "stream_options": [true]}), "400 invalid_type stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": 1}}), "400 invalid_type stream_options.include_usage"),
        // P19 and P21
        (json!({"user": "me"}), ok),
        (json!({"user": "x".repeat(1 << 20)}), "400 invalid_value user"),
        (json!({"metadata": {"a": "b"}}), ok),
        (json!({"metadata": {"a": 1}}), "400 invalid_value metadata"),
        (json!({"priority": -5}), ok),
        (json!({"priority": 3_000_000_000_u64}), "400 invalid_value priority"),
        (json!({"cache_salt": "tenant_1-A"}), ok),
        (json!({"cache_salt": ""}), "400 invalid_value cache_salt"),
        (json!({"cache_salt": "x".repeat(65)}), "400 invalid_value cache_salt"),
        (json!({"cache_salt": "a\nb"}), "400 invalid_value cache_salt"),
        (json!({"cache_salt": "\u{1f600}"}), "400 invalid_value cache_salt"),
        (json!({"cache_profile": "full"}), ok),
        (json!({"cache_profile": "cskv-1"}), "400 invalid_value cache_profile"),
        // C01 to C03 and P22: messages and templates
        (json!({"messages": []}), "400 invalid_value messages"),
        (json!({"messages": null}), "400 invalid_value messages"),
        (json!({"messages": "hi"}), "400 invalid_type messages"),
        (json!({"messages": vec![json!({"role": "user", "content": ""}); 4097]}), "400 invalid_value messages"),
        (json!({"messages": [["user", "hi"]]}), "400 invalid_type messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "400 invalid_value messages[0].role"),
        (json!({"messages": [{"role": "boss", "content": "hi"}]}), "400 invalid_value messages[0].role"),
        (json!({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}), "400 invalid_value messages[1].content"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "400 invalid_type messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}), ok),
        (json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "400 invalid_value messages[0].content[0].text"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]}]}),
            "400 unsupported_parameter messages[0].content[0].type",
        ),
        (json!({"messages": [{"role": "user", "content": [["text", "a"]]}]}), "400 invalid_type messages[0].content[0]"),
        (json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]}), ok),
        (json!({"messages": [{"role": "user", "content": "raise"}]}), "400 template_error messages"),
        (json!({"chat_template": "{{ 1 }}"}), "400 unsupported_parameter chat_template"),
        (json!({"chat_template_kwargs": {"enable_thinking": false, "x": 1, "y": "s", "z": null}}), ok),
        (json!({"chat_template_kwargs": {"tokenize": true}}), "400 invalid_value chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"messages": "x"}}), "400 invalid_value chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"a": []}}), "400 invalid_type chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"a b": 1}}), "400 invalid_value chat_template_kwargs"),
        (json!({"chat_template_kwargs": many_kwargs}), "400 invalid_value chat_template_kwargs"),
        (json!({"continue_final_message": true}), ok),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), "400 invalid_value continue_final_message"),
        // H11: what we do not know does not matter
        (json!({"some_new_field": {"deep": [1, {"a": null}]}}), ok),
    ];
    let app = app(vec![]);
    for (extra, verdict) in table {
        let answer = app.post(CHAT, &with(hello(), &extra)).await;
        let verdict_got = if answer.text.starts_with("data:") { "200".to_owned() } else { answer.verdict() };
        let shown: String = extra.to_string().chars().take(120).collect();
        assert_eq!(verdict_got, verdict, "{shown}: {}", answer.text.chars().take(400).collect::<String>());
    }
}

#[tokio::test]
async fn parameters_of_a_completion() {
    let ok = "200";
    let table = [
        (json!({"prompt": "x"}), ok),
        (json!({"prompt": ["x", "y"]}), ok),
        (json!({"prompt": [1, 2]}), ok),
        (json!({"prompt": [[1, 2], [3]]}), ok),
        (json!({"prompt": [BOS, EOS]}), ok),
        (json!({"prompt": ""}), ok), // BOS
        (json!({"prompt": "", "add_special_tokens": false}), "400 invalid_value prompt"),
        (json!({}), "400 invalid_value prompt"),
        (json!({"prompt": null}), "400 invalid_value prompt"),
        (json!({"prompt": []}), "400 invalid_value prompt"),
        (json!({"prompt": [[]]}), "400 invalid_value prompt"),
        (json!({"prompt": 5}), "400 invalid_type prompt"),
        (json!({"prompt": {}}), "400 invalid_type prompt"),
        (json!({"prompt": ["x", 1]}), "400 invalid_type prompt"),
        (json!({"prompt": ["x", [1]]}), "400 invalid_type prompt"),
        (json!({"prompt": [1, -1]}), "400 invalid_type prompt"),
        (json!({"prompt": [1, 1.0]}), "400 invalid_type prompt"),
        (json!({"prompt": [[["x"]]]}), "400 invalid_type prompt"),
        (json!({"prompt": [VOCAB]}), "400 invalid_value prompt"),
        (json!({"prompt": [1, 4_294_967_296_u64]}), "400 invalid_type prompt"),
        (json!({"prompt": vec!["x"; 32]}), ok),
        (json!({"prompt": vec!["x"; 33]}), "400 invalid_value prompt"),
        (json!({"prompt": vec!["x"; 32], "n": 2}), ok),
        (json!({"prompt": vec!["x"; 32], "n": 3}), "400 invalid_value n"),
        (json!({"prompt": "x", "logprobs": 0}), ok),
        (json!({"prompt": "x", "logprobs": 20}), ok),
        (json!({"prompt": "x", "logprobs": 21}), "400 invalid_value logprobs"),
        (json!({"prompt": "x", "logprobs": true}), "400 invalid_type logprobs"),
        (json!({"prompt": "x", "max_tokens": 0}), "400 invalid_value max_tokens"),
        (json!({"prompt": "x", "max_tokens": 0, "echo": true}), ok),
        (json!({"prompt": "x", "echo": 1}), "400 invalid_type echo"),
        (json!({"prompt": "x", "best_of": 2}), "400 unsupported_parameter best_of"),
        (json!({"prompt": "x", "suffix": ""}), ok),
        (json!({"prompt": "x", "suffix": "y"}), "400 unsupported_parameter suffix"),
    ];
    let app = app(vec![]);
    for (body, verdict) in table {
        let answer = app.post(TEXT, &body).await;
        assert_eq!(answer.verdict(), verdict, "{}: {}", body.to_string().chars().take(120).collect::<String>(), answer.text);
    }
}

#[tokio::test]
async fn what_the_engine_gets() {
    let app = app(vec![]);
    app.post(CHAT, &hello()).await;
    let extra = json!({
        "temperature": 1e-50, "top_p": 1e-50, "top_k": -1, "min_p": 0.25, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "seed": -2, "logit_bias": {"7": -100}, "stop_token_ids": [9, 3, 9], "ignore_eos": true,
        "max_completion_tokens": 17, "min_tokens": 4, "priority": -3, "cache_profile": "full", "cache_salt": "a",
        "logprobs": true, "top_logprobs": 2, "chat_template_kwargs": {"think": false},
    });
    app.post(CHAT, &with(hello(), &extra)).await;
    app.post(CHAT, &with(hello(), &json!({"continue_final_message": true, "cache_salt": "a"}))).await;
    let seen = app.fake.seen();
    let plain = &seen.requests[0];
    assert_eq!(plain.max_new_tokens, 1000 - plain.prompt.len() as u32);
    assert_eq!((plain.sampling.temperature, plain.sampling.top_k, plain.profile), (0.7, 20, ProfileIndex(1)));
    assert_eq!((&plain.stop_tokens[..], plain.logprobs, plain.cache_salt, plain.min_new_tokens), (&[EOS][..], None, 0, 0));
    let full = &seen.requests[1];
    expect![[r#"
        Sampling {
            temperature: 0.0,
            top_p: 1.1754944e-38,
            top_k: 0,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            logit_bias: {
                7: -100.0,
            },
            seed: 18446744073709551614,
        }
    "#]]
    .assert_debug_eq(&full.sampling);
    assert_eq!((full.max_new_tokens, full.min_new_tokens, full.priority, full.profile), (17, 4, -3, ProfileIndex(0)));
    assert_eq!((&full.stop_tokens[..], full.logprobs, full.prompt_logprobs), (&[3, 9][..], Some(2), None));
    assert_eq!(Bytes.decode(&full.prompt, false), "user:hi\nassistant:[think=false]");
    assert_ne!(full.cache_salt, 0);
    assert_eq!(full.cache_salt, seen.requests[2].cache_salt);
    assert_eq!(Bytes.decode(&seen.requests[2].prompt, false), "user:hi");
    assert_ne!(plain.sampling.seed, seen.requests[2].sampling.seed, "absent seeds differ");
}

#[tokio::test]
async fn the_context_is_kept_exactly() {
    let app = app(vec![]);
    for (len, extra, verdict) in [
        (999, json!({}), "200"),
        (999, json!({"max_tokens": 1}), "200"),
        (999, json!({"max_tokens": 2}), "400 context_length_exceeded max_tokens"),
        (1000, json!({}), "400 context_length_exceeded prompt"),
        (1000, json!({"max_tokens": 0, "echo": true}), "200"),
        (1000, json!({"max_tokens": 1}), "400 context_length_exceeded prompt"),
        (1001, json!({}), "400 context_length_exceeded prompt"),
        (1001, json!({"max_tokens": 0, "echo": true}), "400 context_length_exceeded prompt"),
    ] {
        let answer = app.post(TEXT, &with(json!({"prompt": vec![7; len]}), &extra)).await;
        assert_eq!(answer.verdict(), verdict, "{len} {extra}");
    }
    let message = |answer: &Answer| answer.json()["error"]["message"].as_str().expect("a message").to_owned();
    let answer = app.post(TEXT, &json!({"prompt": vec![7; 1200]})).await;
    expect!["This model's maximum context length is 1000 tokens. However, your prompt contains 1200 input tokens, which leaves no room for an answer. Please reduce the length of the prompt."].assert_eq(&message(&answer));
    let answer = app.post(TEXT, &json!({"prompt": vec![7; 700], "max_tokens": 400})).await;
    expect!["This model's maximum context length is 1000 tokens. However, your prompt contains 700 input tokens and you requested 400 output tokens, 1100 in total. Please reduce the length of the prompt or max_tokens."].assert_eq(&message(&answer));
    // T06: certain to be too long, refused without tokenising.
    let begun = Instant::now();
    let answer = app.post(TEXT, &json!({"prompt": "y".repeat(1 << 20)})).await;
    expect!["This model's maximum context length is 1000 tokens. However, your prompt contains at least 262144 input tokens, which leaves no room for an answer. Please reduce the length of the prompt."].assert_eq(&message(&answer));
    let answer = app.post(CHAT, &json!({"messages": [{"role": "user", "content": "y".repeat(1 << 20)}]})).await;
    assert_eq!(answer.verdict(), "400 context_length_exceeded messages");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn hostile_json_is_refused_in_our_own_words() {
    let app = app(vec![]);
    let secret = "sk-canary";
    for (body, verdict) in [
        (&b""[..], "400 invalid_json -"),
        (b"{", "400 invalid_json -"),
        (b"{\"model\":\"sk-canary\"} x", "400 invalid_json -"),
        (b"\xef\xbb\xbf{}", "400 invalid_json -"),
        (b"{\"model\":\"\xff\"}", "400 invalid_json -"),
        (br#"{"model":"\ud800"}"#, "400 invalid_json -"),
        (br#"{"model":"sk-canary","model":"sk-canary"}"#, "400 invalid_json -"),
        (br#"{"temperature":NaN}"#, "400 invalid_json -"),
        (br#"{"temperature":1e999}"#, "400 invalid_json -"),
        (b"[]", "400 invalid_type -"),
        (b"\"sk-canary\"", "400 invalid_type -"),
        (b"null", "400 invalid_type -"),
        (br#"[["role"]]"#, "400 invalid_type -"),
        (br#"{"messages":[{"role":"sk-canary","content":"sk-canary"}]}"#, "400 invalid_value messages[0].role"),
        (br#"{"messages":{"sk-canary":1}}"#, "400 invalid_type messages"),
        (br#"{"logit_bias":{"sk-canary":1}}"#, "400 invalid_value logit_bias"),
        (
            br#"{"chat_template_kwargs":{"sk-canary":[]},"messages":[{"role":"user","content":"x"}]}"#,
            "400 invalid_value chat_template_kwargs",
        ),
        (br#"{"model":"sk-canary","messages":[{"role":"user","content":"x"}]}"#, "404 model_not_found model"),
        (br#"{"cache_profile":"sk-canary","messages":[{"role":"user","content":"x"}]}"#, "400 invalid_value cache_profile"),
    ] {
        let answer = app.post_bytes(CHAT, body.to_vec()).await;
        assert_eq!(answer.verdict(), verdict, "{}", String::from_utf8_lossy(body));
        assert!(!answer.text.contains(secret), "{}", answer.text);
    }
    // H29: many small values.
    let body = format!("{{\"messages\":[{}]}}", vec!["{}"; 1 << 20].join(","));
    assert_eq!(app.post_bytes(CHAT, body).await.verdict(), "400 invalid_json -");
    assert_eq!(app.fake.seen().requests.len(), 0, "nothing reached the engine");
}

#[tokio::test]
async fn bodies_must_be_plain_json() {
    let app = app(vec![]);
    for (headers, verdict) in [
        (&[("content-type", "application/json")][..], "200"),
        (&[("content-type", "Application/JSON; charset=UTF-8")], "200"),
        (&[("content-type", "application/json"), ("content-encoding", "identity")], "200"),
        (&[], "415 unsupported_media_type -"),
        (&[("content-type", "text/plain")], "415 unsupported_media_type -"),
        (&[("content-type", "application/x-www-form-urlencoded")], "415 unsupported_media_type -"),
        (&[("content-type", "application/json; charset=latin1")], "415 unsupported_media_type -"),
        (&[("content-type", "application/json"), ("content-type", "application/json")], "415 unsupported_media_type -"),
        (&[("content-type", "application/json"), ("content-encoding", "gzip")], "415 unsupported_media_type -"),
    ] {
        let mut request = Request::post(CHAT).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = app.send(request.body(Body::from(hello().to_string())).expect("a request")).await;
        assert_eq!(answer.verdict(), verdict, "{headers:?}");
    }
}

// ---------------------------------------------------------------- the other endpoints

#[tokio::test]
async fn tokens_and_back() {
    let app = app(vec![]);
    for (path, body, want) in [
        ("/tokenize", json!({"prompt": "hi"}), json!({"count": 3, "max_model_len": 1000, "tokens": [256, 104, 105], "token_strs": null})),
        (
            "/tokenize",
            json!({"model": "demo", "prompt": "é", "add_special_tokens": false, "return_token_strs": true}),
            json!({"count": 2, "max_model_len": 1000, "tokens": [195, 169], "token_strs": ["bytes:\\xc3", "bytes:\\xa9"]}),
        ),
        (
            "/tokenize",
            json!({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": false}),
            json!({"count": 7, "max_model_len": 1000, "tokens": [117, 115, 101, 114, 58, 97, 10], "token_strs": null}),
        ),
        ("/detokenize", json!({"tokens": [256, 104, 105]}), json!({"prompt": "<s>hi"})),
        ("/detokenize", json!({"tokens": []}), json!({"prompt": ""})),
    ] {
        assert_eq!(app.post(path, &body).await.json(), want, "{body}");
    }
    for (path, body, verdict) in [
        ("/tokenize", json!({}), "400 invalid_value messages"),
        ("/tokenize", json!({"prompt": 5}), "400 invalid_type prompt"),
        ("/tokenize", json!({"prompt": "x", "model": "y"}), "404 model_not_found model"),
        ("/detokenize", json!({}), "400 invalid_value tokens"),
        ("/detokenize", json!({"tokens": "x"}), "400 invalid_type tokens"),
        ("/detokenize", json!({"tokens": [260]}), "400 invalid_value tokens"),
    ] {
        assert_eq!(app.post(path, &body).await.verdict(), verdict, "{body}");
    }
}

#[tokio::test]
async fn models_and_capacity() {
    let app = app(vec![]);
    check_pretty(
        &app.get("/v1/models/org/demo").await,
        &expect![[r#"
        {
          "id": "org/demo",
          "object": "model",
          "created":0,
          "owned_by": "strait",
          "root": "/models/demo",
          "parent": null,
          "max_model_len": 1000,
          "cache_profiles": [
            {
              "name": "full",
              "default": false,
              "bytes_per_token": 100.0,
              "compression": null
            },
            {
              "name": "cskv-80",
              "default": true,
              "bytes_per_token": 20.0,
              "compression": {
                "key_rank": 0.2,
                "value_rank": 0.2,
                "bits": 16,
                "window": 64,
                "sinks": 4
              }
            }
          ]
        }"#]],
    );
    let list = app.get("/v1/models").await.json();
    let ids: Vec<_> = list["data"].as_array().expect("data").iter().map(|m| m["id"].clone()).collect();
    assert_eq!((list["object"].clone(), ids), (json!("list"), vec![json!("demo"), json!("org/demo")]));
    for path in ["/v1/models/other", "/v1/models/%00", "/v1/models/%ff"] {
        assert_eq!(app.get(path).await.verdict().split(' ').take(2).collect::<Vec<_>>(), ["404", "model_not_found"], "{path}");
    }
    check_pretty(
        &app.get("/v1/capacity?tokens=100").await,
        &expect![[r#"
        {
          "object": "capacity",
          "arena_bytes": 100000,
          "free_bytes": 30000,
          "evictable_bytes": 20000,
          "running": 1,
          "waiting": 2,
          "request_tokens": 100,
          "profiles": [
            {
              "profile": "full",
              "default": false,
              "bytes_per_token": 100.0,
              "tokens_now": 500,
              "tokens_idle": 1000,
              "request_bytes": 10000,
              "requests_now": 5,
              "requests_idle": 10
            },
            {
              "profile": "cskv-80",
              "default": true,
              "bytes_per_token": 20.0,
              "tokens_now": 1000,
              "tokens_idle": 1000,
              "request_bytes": 2000,
              "requests_now": 25,
              "requests_idle": 50
            }
          ]
        }"#]],
    );
    assert_eq!(app.get("/v1/capacity").await.json()["request_tokens"], 1000);
    for query in ["tokens=0", "tokens=1001", "tokens=x", "tokens="] {
        assert_eq!(app.get(&format!("/v1/capacity?{query}")).await.verdict(), "400 invalid_value tokens", "{query}");
    }
}

#[tokio::test]
async fn paths_and_methods() {
    let app = app(vec![]);
    for (method, path, verdict, allow) in [
        ("GET", "/nope", "404 not_found -", None),
        ("GET", "/v1//models", "404 not_found -", None),
        ("GET", "/v1/../admin/drain", "404 not_found -", None),
        ("GET", "/%2e%2e%2f", "404 not_found -", None),
        ("GET", "/health;x=1", "404 not_found -", None),
        ("GET", "/health/", "404 not_found -", None),
        ("POST", "/health", "405 method_not_allowed -", Some("GET,HEAD")),
        ("GET", "/v1/chat/completions", "405 method_not_allowed -", Some("POST")),
        ("OPTIONS", "/v1/chat/completions", "405 method_not_allowed -", Some("POST")),
        ("DELETE", "/v1/models/demo", "405 method_not_allowed -", Some("GET,HEAD")),
        ("POST", "/v1/responses", "501 not_implemented -", None),
        ("POST", "/v1/embeddings", "501 not_implemented -", None),
        ("POST", "/v1/load_lora_adapter", "501 not_implemented -", None),
        ("POST", "/v1/unload_lora_adapter", "501 not_implemented -", None),
        ("GET", "/v1/lora_adapters", "501 not_implemented -", None),
        ("GET", "/health", "200", None),
        ("GET", "/ready", "200", None),
        ("GET", "/version", "200", None),
    ] {
        let request = Request::builder().method(method).uri(path).header("host", "localhost");
        let answer = app.send(request.body(Body::empty()).expect("a request")).await;
        assert_eq!(answer.verdict(), verdict, "{method} {path}");
        assert_eq!(answer.headers.get("allow").map(|v| v.to_str().expect("text")), allow, "{method} {path}");
    }
    for path in ["/", "/dashboard", "/docs"] {
        let answer = app.get(path).await;
        assert!(answer.text.starts_with("<!doctype html>"), "{path}");
        assert_eq!(answer.headers["content-type"], "text/html; charset=utf-8");
        assert!(answer.headers["content-security-policy"].to_str().expect("text").contains("connect-src 'self'"));
    }
    assert!(!app.get("/docs").await.text.contains("https://"), "no other hosts");
}

#[tokio::test]
async fn the_description_names_every_route_and_every_field_it_reads() {
    let app = app(vec![]);
    let api = app.get("/openapi.json").await.json();
    let described: BTreeSet<String> = api["paths"].as_object().expect("paths").keys().cloned().collect();
    let pages = ["/", "/dashboard", "/docs", "/openapi.json"];
    let later = ["/v1/responses", "/v1/embeddings", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_adapters"];
    let routes: BTreeSet<String> =
        ROUTES.iter().filter(|r| !pages.contains(r) && !later.contains(r)).map(|r| r.replace("{*id}", "{id}")).collect();
    assert_eq!(described, routes);
    // Every $ref resolves.
    fn refs(value: &Value, out: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                out.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
                map.values().for_each(|v| refs(v, out));
            }
            Value::Array(items) => items.iter().for_each(|v| refs(v, out)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    refs(&api, &mut all);
    assert!(all.len() > 20);
    for reference in all {
        assert!(api.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
    // Nothing is asked for that may be left out.
    fn required(schema: &Value, out: &mut BTreeSet<String>) {
        schema["required"].as_array().into_iter().flatten().for_each(|name| out.extend(name.as_str().map(str::to_owned)));
        schema["allOf"].as_array().into_iter().flatten().for_each(|part| required(part, out));
    }
    for (name, want) in [
        ("ChatRequest", &["messages"][..]),
        ("CompletionRequest", &["prompt"]),
        ("Options", &[]),
        ("StreamOptions", &[]),
        ("TokenizeRequest", &[]),
        ("DetokenizeRequest", &["tokens"]),
    ] {
        let mut all = BTreeSet::new();
        required(&api["components"]["schemas"][name], &mut all);
        assert_eq!(all.iter().map(String::as_str).collect::<Vec<_>>(), want, "{name}");
    }
    let text = api["components"]["schemas"].to_string();
    for field in
        ["cache_profile", "chat_template_kwargs", "min_p", "add_special_tokens", "continuous_usage_stats", "kv_cache", "sealed_tokens"]
    {
        assert!(text.contains(&format!("\"{field}\"")), "{field}");
    }
}

#[tokio::test]
async fn keys_open_what_they_should() {
    let mut config = config();
    config.api_keys = Keys::new(["sk-one", "sk-two", ""]);
    config.admin_keys = Keys::new(["sk-admin"]);
    let app = app_with(config, vec![]);
    let denied = "401 invalid_api_key -";
    let huge = format!("Bearer {}", "x".repeat(8192));
    for (path, headers, verdict) in [
        ("/health", &[][..], "200"),
        ("/ready", &[], "200"),
        ("/", &[], "200"),
        ("/dashboard", &[], "200"),
        ("/docs", &[], "200"),
        ("/v1/models", &[], denied),
        ("/metrics", &[], denied),
        ("/version", &[], denied),
        ("/openapi.json", &[], denied),
        ("/nope", &[], denied),
        ("/v1/models", &[("authorization", "Bearer sk-one")], "200"),
        ("/v1/models", &[("authorization", "bearer sk-two")], "200"),
        ("/v1/models", &[("authorization", "Bearer sk-admin")], "200"),
        ("/v1/models", &[("x-api-key", "sk-two")], "200"),
        ("/v1/models", &[("authorization", "Bearer sk-one ")], denied),
        ("/v1/models", &[("authorization", "Bearer sk-on")], denied),
        ("/v1/models", &[("authorization", "Bearer ")], denied),
        ("/v1/models", &[("authorization", "Bearer")], denied),
        ("/v1/models", &[("authorization", "Basic sk-one")], denied),
        ("/v1/models", &[("authorization", huge.as_str())], denied),
        ("/v1/models", &[("x-api-key", "")], denied),
        ("/v1/models", &[("authorization", "Bearer no"), ("x-api-key", "sk-one")], denied),
        ("/v1/models", &[("authorization", "Bearer sk-one"), ("authorization", "Bearer sk-one")], "400 invalid_value authorization"),
    ] {
        let mut request = Request::get(path).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = app.send(request.body(Body::empty()).expect("a request")).await;
        assert_eq!(answer.verdict(), verdict, "{path} {headers:?}");
        assert_eq!(answer.headers.contains_key("www-authenticate"), verdict == denied);
    }
}

#[tokio::test]
async fn draining_is_for_the_machine_itself_and_the_admin_key() {
    let local = Some("127.0.0.1:5000");
    let remote = Some("10.0.0.9:5000");
    let (yes, no, unknown) = ("202", "403 not_allowed -", "401 invalid_api_key -");
    for (with_keys, peer, host, headers, verdict) in [
        (false, local, "localhost:8000", &[][..], yes),
        (false, local, "127.0.0.1:8000", &[], yes),
        (false, Some("[::1]:9"), "[::1]:8000", &[], yes),
        (false, Some("[::ffff:127.0.0.1]:9"), "127.0.0.1", &[], yes),
        (false, local, "localhost:8000", &[("origin", "http://localhost:8000")], yes),
        (false, local, "localhost:8000", &[("origin", "http://evil.example")], no),
        (false, local, "rebound.example:8000", &[], no),
        (false, remote, "10.0.0.1:8000", &[], no),
        (false, None, "localhost", &[], no),
        (true, local, "localhost", &[], unknown),
        (true, local, "localhost", &[("authorization", "Bearer sk-one")], yes),
        (true, remote, "10.0.0.1", &[("authorization", "Bearer sk-one")], no),
        (true, remote, "10.0.0.1", &[("authorization", "Bearer sk-admin")], yes),
    ] {
        let mut config = config();
        if with_keys {
            config.api_keys = Keys::new(["sk-one"]);
            config.admin_keys = Keys::new(["sk-admin"]);
        }
        let app = app_with(config, vec![]);
        let mut request = Request::post("/admin/drain").header("host", host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(Body::empty()).expect("a request");
        if let Some(peer) = peer {
            request.extensions_mut().insert(Peer(peer.parse().expect("an address")));
        }
        assert_eq!(app.send(request).await.verdict(), verdict, "{with_keys} {peer:?} {host} {headers:?}");
        let phase = if verdict == yes { Phase::Draining } else { Phase::Ready };
        assert_eq!(app.server.phase(), phase);
        if verdict == yes && !with_keys {
            assert_eq!(app.get("/ready").await.verdict(), "503 draining -");
            assert_eq!(app.get("/health").await.verdict(), "200");
            let refused = app.post(CHAT, &hello()).await;
            assert_eq!(refused.verdict(), "503 draining -");
            assert!(refused.headers.contains_key("retry-after"));
            assert_eq!(app.get("/v1/models").await.verdict(), "200");
        }
    }
}

#[tokio::test]
async fn before_the_model_is_loaded() {
    let server = Server::new(config(), Arc::new(Telemetry::new("demo")));
    let app = App { router: server.router(), fake: Fake::new(vec![]), server };
    for (path, verdict) in
        [("/health", "200"), ("/ready", "503 not_ready -"), ("/version", "200"), ("/metrics", "200"), ("/v1/models", "503 not_ready -")]
    {
        assert_eq!(app.get(path).await.verdict(), verdict, "{path}");
    }
    let refused = app.post(CHAT, &hello()).await;
    assert_eq!((refused.verdict().as_str(), &refused.headers["retry-after"]), ("503 not_ready -", &"2".parse().expect("a value")));
    assert!(app.get("/metrics").await.text.contains("strait:ready 0\n"));
    install(&app.server, &app.fake);
    assert_eq!(app.get("/ready").await.verdict(), "200");
    assert!(app.get("/metrics").await.text.contains("strait:ready 1\n"));
    *app.fake.heartbeat.lock().expect("unshared") = Duration::from_secs(61);
    assert_eq!(app.get("/health").await.verdict(), "503 engine_stalled -");
    assert_eq!(app.get("/ready").await.verdict(), "503 engine_stalled -");
}

#[tokio::test]
async fn a_full_queue_tells_when_to_come_back() {
    let full = SubmitError::QueueFull { queued: 256, retry_after: Duration::from_millis(2300) };
    let app = app(vec![
        Err(full),
        Ok(vec![Hang]),
        Err(SubmitError::Draining),
        Err(SubmitError::TooLarge { need: 9, have: 5 }),
        Err(SubmitError::Stopped),
    ]);
    let refused = app.post(CHAT, &with(hello(), &json!({"stream": true}))).await;
    assert_eq!(refused.verdict(), "429 server_overloaded -");
    assert_eq!(
        (&refused.headers["retry-after"], &refused.headers["retry-after-ms"]),
        (&"3".parse().expect("ok"), &"2300".parse().expect("ok"))
    );
    // The second choice is refused, so the first is taken back.
    assert_eq!(app.post(CHAT, &with(hello(), &json!({"n": 2}))).await.verdict(), "503 draining -");
    assert_eq!(app.fake.cancelled(1).await.len(), 1);
    let refused = app.post(CHAT, &hello()).await;
    assert_eq!(refused.verdict(), "400 context_length_exceeded -");
    assert!(refused.text.contains("cache_profile"), "{}", refused.text);
    assert_eq!(app.post(CHAT, &hello()).await.verdict(), "503 engine_stopped -");
    let metrics = app.server.telemetry.render();
    assert!(metrics.contains("strait:requests_rejected_total{code=\"server_overloaded\"} 1\n"));
    assert!(metrics.contains("reason=\"max_num_queued_reqs\"} 1\n"));
}

#[tokio::test]
async fn strangers_cannot_grow_the_metrics() {
    let app = app(vec![]);
    app.get("/nope").await;
    app.post(CHAT, &json!({"model": "m"})).await;
    let series = |app: &App| app.server.telemetry.render().lines().filter(|l| !l.starts_with('#')).count();
    let before = series(&app);
    for i in 0..200 {
        app.get(&format!("/nope/{i}")).await;
        app.post(CHAT, &json!({"model": format!("m{i}")})).await;
        let odd = Request::builder().method(format!("M{i}").as_str()).uri("/nope").header("host", "localhost");
        app.send(odd.body(Body::empty()).expect("a request")).await;
    }
    // One more at most: the label `other` for methods.
    assert!(series(&app) <= before + 1, "{} series, {before} before", series(&app));
    let metrics = app.get("/metrics").await;
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert!(metrics.text.contains("strait:kv_cache_bytes{branch=\"sealed_keys\",profile=\"cskv-80\"} 100\n"));
    assert!(metrics.text.contains("http_requests_total{method=\"other\",path=\"unmatched\",status=\"404\"} 200\n"));
}

#[tokio::test]
async fn request_ids_are_echoed_only_if_harmless() {
    let app = app(vec![]);
    let long = "x".repeat(65);
    for (id, echoed) in [("abc-1_Z", true), ("", false), ("a b", false), ("a\"b", false), (long.as_str(), false)] {
        let request = Request::get("/health").header("host", "localhost").header("x-request-id", id);
        let answer = app.send(request.body(Body::empty()).expect("a request")).await;
        assert_eq!(answer.headers["x-request-id"] == id, echoed, "{id}");
    }
}

// ---------------------------------------------------------------- real sockets

struct Net {
    app: App,
    port: u16,
    stop: watch::Sender<bool>,
    served: tokio::task::JoinHandle<strait::server::listen::Drained>,
}

async fn net_with(edit: impl FnOnce(&mut Config), plays: Vec<Play>, drain: Duration) -> Net {
    let mut config = config();
    edit(&mut config);
    let app = app_with(config, plays);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let stop = watch::Sender::new(false);
    let mut stopped = stop.subscribe();
    let shutdown = async move {
        let _ = stopped.wait_for(|s| *s).await;
    };
    let served = tokio::spawn(serve(listener, app.server.clone(), shutdown, drain));
    Net { app, port, stop, served }
}

async fn net(plays: Vec<Play>) -> Net {
    net_with(|_| {}, plays, Duration::from_secs(5)).await
}

impl Net {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).await.expect("a connection")
    }
    /// Sends bytes and reads to the end of the connection.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.expect("sent");
        read_all(&mut stream).await
    }
}

async fn read_all(stream: &mut TcpStream) -> String {
    let mut out = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut out)).await.expect("the connection closes");
    String::from_utf8_lossy(&out).into_owned()
}

async fn read_until(stream: &mut TcpStream, what: &str) -> String {
    let mut out = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&out).contains(what) {
        let n = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut buffer)).await.expect("bytes come").expect("read");
        assert!(n > 0, "closed before {what}: {}", String::from_utf8_lossy(&out));
        out.extend_from_slice(&buffer[..n]);
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn request(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .into()
}

fn status(reply: &str) -> &str {
    reply.split(' ').nth(1).unwrap_or("closed")
}

#[tokio::test]
async fn a_stream_over_a_socket_keeps_alive_and_ends() {
    let net = net_with(
        |c| c.keep_alive = Duration::from_millis(30),
        vec![Ok(vec![Wait(100), Say("x"), Done(FinishReason::Stop)])],
        Duration::ZERO,
    )
    .await;
    let mut stream = net.connect().await;
    stream.write_all(&request(CHAT, &with(hello(), &json!({"stream": true})))).await.expect("sent");
    let reply = read_until(&mut stream, "[DONE]").await;
    let comments = reply.matches(": keep-alive\n\n").count();
    assert!((1..=4).contains(&comments), "{comments} comments");
    assert!(reply.find(": keep-alive") < reply.find("\"role\""), "comments come while the prompt is waiting");
    assert!(reply.contains("transfer-encoding: chunked") && !reply.contains("\nid:"), "{reply}");
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_sequences_at_once() {
    for (stream, n, steps) in
        [(false, 1, vec![Hang]), (false, 3, vec![Say("a"), Hang]), (true, 1, vec![Hang]), (true, 2, vec![Say("a"), Hang])]
    {
        for reset in [false, true] {
            let net = net(vec![Ok(steps.clone()); n]).await;
            let mut client = net.connect().await;
            client.write_all(&request(CHAT, &with(hello(), &json!({"stream": stream, "n": n})))).await.expect("sent");
            net.app.fake.submitted(n).await;
            if stream && n == 2 {
                read_until(&mut client, "\"a\"").await;
            }
            assert!(net.app.fake.seen().cancelled.is_empty());
            if reset {
                // Closing with a linger of zero sends RST.
                socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("an option");
            }
            let left = Instant::now();
            drop(client);
            for (seq, at) in net.app.fake.cancelled(n).await {
                let after = at.duration_since(left);
                assert!(after < Duration::from_millis(100), "{seq:?} was cancelled after {after:?}");
            }
        }
    }
}

#[tokio::test]
async fn slow_clients_are_cut_off() {
    let edit = |c: &mut Config| {
        c.limits.header_deadline = Duration::from_millis(150);
        c.limits.body_deadline = Duration::from_millis(150);
    };
    let net = net_with(edit, vec![], Duration::from_secs(5)).await;
    let half_body =
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"mo";
    let chunked =
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{\"\r\n";
    let answered = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    for (bytes, want) in [
        (&b""[..], "closed"),
        (b"GET /health HTTP/1.1\r\nhost: loc", "closed"),
        (half_body, "408"),
        (chunked, "408"),
        // A connection that is idle after an answer.
        (answered, "200"),
    ] {
        let begun = Instant::now();
        let reply = net.raw(bytes).await;
        let took = begun.elapsed();
        assert_eq!(status(&reply), want, "{}: {reply}", String::from_utf8_lossy(bytes));
        assert!(took > Duration::from_millis(100) && took < Duration::from_secs(3), "{took:?}");
        if want == "408" {
            assert!(reply.contains("\"request_timeout\"") && reply.contains("connection: close"), "{reply}");
        }
    }
    // A body that trickles does not extend its time.
    let mut client = net.connect().await;
    client.write_all(half_body).await.expect("sent");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) && client.write_all(b" ").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        if net.app.server.telemetry.render().contains("code=\"request_timeout\"} 3") {
            break;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn large_bodies_are_refused_early() {
    let net = net_with(|c| c.limits.body_bytes = 1000, vec![], Duration::from_secs(5)).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    // Announced: refused before a byte of it is sent.
    let reply = net.raw(format!("{head}content-length: 1001\r\n\r\n").as_bytes()).await;
    assert!(status(&reply) == "413" && reply.contains("\"body_too_large\"") && reply.contains("connection: close"), "{reply}");
    // Not announced: refused when it crosses the limit.
    let chunk = format!("300\r\n{}\r\n", "x".repeat(0x300));
    let reply = net.raw(format!("{head}transfer-encoding: chunked\r\n\r\n{chunk}{chunk}").as_bytes()).await;
    assert_eq!(status(&reply), "413", "{reply}");
    let body = json!({"prompt": "x", "user": "y".repeat(500)});
    let mut client = net.connect().await;
    client.write_all(&request(TEXT, &body)).await.expect("sent");
    assert_eq!(status(&read_until(&mut client, "usage").await), "200");
}

#[tokio::test]
async fn a_wrong_key_costs_no_body() {
    let net = net_with(|c| c.api_keys = Keys::new(["sk-one"]), vec![], Duration::from_secs(5)).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: 1000000\r\n\r\n";
    let reply = net.raw(head.as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 401") && !reply.contains("100 Continue"), "{reply}");
}

#[tokio::test]
async fn requests_that_proxies_would_read_differently() {
    let net = net(vec![]).await;
    let json = "content-type: application/json\r\n";
    let close = "connection: close\r\n";
    for (bytes, want) in [
        (format!("GET /health HTTP/1.1\r\n{close}\r\n"), "400"),
        (format!("GET /health HTTP/1.0\r\n{close}\r\n"), "400"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nhost: a\r\n{close}\r\n"), "400"),
        (format!("GET /health HTTP/1.1\r\nhost: a/?#@b\r\n{close}\r\n"), "400"),
        (format!("GET http://b/health HTTP/1.1\r\nhost: a\r\n{close}\r\n"), "400"),
        (format!("GET http://a/health HTTP/1.1\r\nhost: a\r\n{close}\r\n"), "200"),
        (format!("CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n{close}\r\n"), "405"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n{close}\r\n"), "200"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: +2\r\n\r\n{{}}"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: 2, 2\r\n\r\n{{}}"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}transfer-encoding: xchunked\r\n\r\n"), "400"),
        (format!("POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n"), "400"),
        (format!("GET /health HTTP/1.1\r\nhost : a\r\n{close}\r\n"), "400"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "400"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\n{}{close}\r\n", "x: y\r\n".repeat(70)), "431"),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nx: {}\r\n{close}\r\n", "y".repeat(40_000)), "431"),
    ] {
        let reply = net.raw(bytes.as_bytes()).await;
        // A stream that is no HTTP at all may also just be closed.
        let got = status(&reply);
        assert!(got == want || (bytes.starts_with("PRI") && got == "closed"), "{bytes:.200}: {reply:.300}");
    }
    // TE and CL: taken as chunked, and the connection does not serve what follows.
    let smuggled = format!(
        "POST /tokenize HTTP/1.1\r\nhost: a\r\n{json}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nhost: a\r\n\r\n"
    );
    let reply = net.raw(smuggled.as_bytes()).await;
    assert_eq!(reply.matches("HTTP/1.1 ").count(), 1, "{reply}");
    // Pipelined requests are answered in order.
    let pipelined = format!("{}GET /version HTTP/1.1\r\nhost: a\r\n{close}\r\n", "GET /health HTTP/1.1\r\nhost: a\r\n\r\n".repeat(9));
    let reply = net.raw(pipelined.as_bytes()).await;
    assert_eq!((reply.matches("HTTP/1.1 200").count(), reply.matches("{\"status\":\"ok\"}").count()), (10, 9));
    assert!(
        reply.trim_end().ends_with('}') && reply.rfind("version").expect("the last answer") > reply.rfind("status").expect("the ninth")
    );
}

#[tokio::test]
async fn connections_beyond_the_cap_wait_their_turn() {
    let net = net_with(|c| c.limits.connections = 2, vec![], Duration::from_secs(5)).await;
    let mut held = vec![net.connect().await, net.connect().await];
    for client in &mut held {
        client.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
        read_until(client, "ok").await;
    }
    let mut third = net.connect().await;
    third.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    let mut buffer = [0; 16];
    assert!(tokio::time::timeout(Duration::from_millis(100), third.read(&mut buffer)).await.is_err(), "no slot yet");
    held.pop();
    read_until(&mut third, "ok").await;
}

#[tokio::test]
async fn a_drain_lets_streams_end() {
    let net = net(vec![Ok(vec![Say("a"), Wait(200), Say("b"), Done(FinishReason::Stop)])]).await;
    let mut idle = net.connect().await;
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    read_until(&mut idle, "ok").await;
    let mut client = net.connect().await;
    client.write_all(&request(CHAT, &with(hello(), &json!({"stream": true})))).await.expect("sent");
    read_until(&mut client, "\"a\"").await;
    net.stop.send_replace(true);
    assert_eq!(read_all(&mut idle).await, "", "an idle connection closes at once");
    assert!(TcpStream::connect(("127.0.0.1", net.port)).await.is_err(), "nothing more is accepted");
    assert!(net.app.server.phase() >= Phase::Draining);
    let rest = read_all(&mut client).await;
    assert!(rest.contains("\"b\"") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(net.served.await.expect("no panic").forced, 0);
    assert_eq!(net.app.server.phase(), Phase::Stopping);
}

#[tokio::test]
async fn a_drain_that_takes_too_long_ends_streams_with_an_error() {
    for hurried in [false, true] {
        let drain = if hurried { Duration::from_secs(60) } else { Duration::from_millis(100) };
        let net = net_with(|_| {}, vec![Ok(vec![Say("a"), Hang]), Ok(vec![Hang])], drain).await;
        let mut client = net.connect().await;
        client.write_all(&request(CHAT, &with(hello(), &json!({"stream": true})))).await.expect("sent");
        read_until(&mut client, "\"a\"").await;
        let mut plain = net.connect().await;
        plain.write_all(&request(CHAT, &hello())).await.expect("sent");
        net.app.fake.submitted(2).await;
        let begun = Instant::now();
        net.stop.send_replace(true);
        if hurried {
            // What a second signal does.
            net.app.server.reached(Phase::Draining).await;
            net.app.server.stop();
        }
        let rest = read_all(&mut client).await;
        assert!(rest.contains("\"code\":\"draining\"") && !rest.contains("[DONE]"), "{rest}");
        assert_eq!(status(&read_all(&mut plain).await), "503");
        assert_eq!(net.served.await.expect("no panic").forced, 2);
        assert!(begun.elapsed() < Duration::from_secs(3));
        assert!(net.app.server.telemetry.render().contains("strait:drain_forced_total 2\n"));
    }
}

#[tokio::test]
async fn a_reader_that_stalls_holds_little() {
    let net = net(vec![Ok(vec![Say(Box::leak("y".repeat(200_000).into_boxed_str())), Done(FinishReason::Stop)])]).await;
    let client = tokio::net::TcpSocket::new_v4().expect("a socket");
    client.set_recv_buffer_size(4096).expect("an option");
    let mut client = client.connect(format!("127.0.0.1:{}", net.port).parse().expect("an address")).await.expect("a connection");
    client.write_all(&request(CHAT, &with(hello(), &json!({"stream": true, "max_tokens": 900})))).await.expect("sent");
    net.app.fake.submitted(1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Nothing is read: the body is not polled any further, and the sequence still runs.
    assert!(net.app.fake.seen().cancelled.is_empty());
    drop(client);
    net.app.fake.cancelled(1).await;
}
