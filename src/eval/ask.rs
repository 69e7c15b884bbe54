//! Asks an OpenAI-compatible server: how many tokens a prompt has, what the answer is, what its cache took, how long it
//! took to say. The same words go to a server far away and to one in this process; only the [`Transport`] differs.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response};
use serde_json::{Value, json};

use super::http::request;
use super::tasks::Question;

/// Body of a response.
pub type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A request under way.
pub type Sending = Pin<Box<dyn Future<Output = Result<Response<Body>, AskError>> + Send>>;

/// Carries requests to a server.
pub trait Transport: Send + Sync {
    /// The response to `request`, whose path is one of the API's own.
    fn send(&self, request: Request<Full<Bytes>>) -> Sending;
}

/// Why a server could not be asked. Each is one sentence with cause and mend.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AskError {
    #[error("--url {url} cannot be used: {reason}; write it as http://host:port")]
    Url { url: String, reason: &'static str },
    #[error("the API key has characters that no HTTP header can carry; check --api-key")]
    Key,
    #[error("cannot ask {url}: {reason}; is the server running there?")]
    Lost { url: String, reason: String },
    #[error("the server refused {path} with status {status}: {message}")]
    Refused { path: &'static str, status: u16, message: String },
    #[error("the server gave up on {path}: {message}; its log says more")]
    GaveUp { path: &'static str, message: String },
    #[error("the server's answer to {path} is not what the OpenAI API says: {reason}; is it such a server?")]
    Malformed { path: &'static str, reason: String },
    #[error("the server did not answer {path} within {seconds} s; raise --timeout, or lower --lengths")]
    Slow { path: &'static str, seconds: u64 },
    #[error("the server serves no model {name:?}, but {known}; choose one with --model-name")]
    UnknownModel { name: String, known: String },
    #[error("there is no cache profile {name:?} there; choose from {known} with --profiles")]
    UnknownProfile { name: String, known: String },
    #[error("the server has no /tokenize that answers token ids, which ppl needs to cut the text; use Strait or vLLM, or run in process")]
    NoTokenize,
}

/// What came back to a question.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub text: String,
    /// As the server counts; `None` if it does not say.
    pub prompt_tokens: Option<u32>,
    pub completion_tokens: Option<u32>,
    /// `usage.kv_cache.bytes`: every page the request held at its end.
    pub cache_bytes: Option<u64>,
    /// From the first token to the last, as the server tells, or from the first text to the last, as it arrived.
    pub decode: Duration,
}

/// A server, and one model of it.
pub struct Client {
    transport: Box<dyn Transport>,
    key: Option<String>,
    timeout: Duration,
    pub model: String,
    /// Longest sequence it takes, if it says so.
    pub context: Option<u32>,
    /// Its cache profiles; empty for a server that knows none.
    pub profiles: Vec<String>,
    /// It has no `/tokenize`: prompts are counted by asking for one token.
    counts_by_asking: AtomicBool,
    /// Differs from run to run, so that no prompt finds its beginning in the server's prefix cache.
    salt: String,
}

const MODELS: &str = "/v1/models";
const TOKENIZE: &str = "/tokenize";
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// How often a busy server is asked again, and how long at most between two times.
const RETRIES: u32 = 20;
const RETRY_MOST: u64 = 60;

impl Client {
    /// Asks what is served, and chooses `model`, or the first.
    ///
    /// # Errors
    /// [`AskError`], where there is no such server or model.
    pub async fn open(
        transport: Box<dyn Transport>,
        key: Option<String>,
        model: Option<String>,
        timeout: Duration,
    ) -> Result<Client, AskError> {
        let mut client = Client {
            transport,
            key,
            timeout,
            model: String::new(),
            context: None,
            profiles: Vec::new(),
            counts_by_asking: AtomicBool::new(false),
            salt: run_salt(),
        };
        let listed = client.json(MODELS, None).await?;
        let empty = Vec::new();
        let models = listed["data"].as_array().unwrap_or(&empty);
        let id = |m: &Value| m["id"].as_str().unwrap_or_default().to_owned();
        let chosen = match &model {
            Some(name) => models.iter().find(|m| m["id"] == name.as_str()).ok_or_else(|| AskError::UnknownModel {
                name: name.clone(),
                known: models.iter().map(id).collect::<Vec<_>>().join(", "),
            })?,
            None => models.first().ok_or_else(|| malformed(MODELS, "it lists no model"))?,
        };
        client.model = id(chosen);
        client.context = chosen["max_model_len"].as_u64().and_then(|n| u32::try_from(n).ok());
        let profiles = chosen["cache_profiles"].as_array().unwrap_or(&empty);
        client.profiles = profiles.iter().filter_map(|p| p["name"].as_str().map(str::to_owned)).collect();
        Ok(client)
    }

    /// The profiles of `wanted`, or all; one without a name for a server that has none.
    ///
    /// # Errors
    /// [`AskError::UnknownProfile`].
    pub fn choose(&self, wanted: &[String]) -> Result<Vec<Option<String>>, AskError> {
        if let Some(name) = wanted.iter().find(|name| !self.profiles.contains(name)) {
            let known = if self.profiles.is_empty() { "none".to_owned() } else { self.profiles.join(", ") };
            return Err(AskError::UnknownProfile { name: name.clone(), known });
        }
        let chosen = if wanted.is_empty() { &self.profiles } else { wanted };
        Ok(if chosen.is_empty() { vec![None] } else { chosen.iter().cloned().map(Some).collect() })
    }

    /// Tokens of a question's prompt: by `/tokenize`, or where there is none, by asking for an answer of one token.
    ///
    /// # Errors
    /// [`AskError`].
    pub async fn count(&self, question: &Question) -> Result<u32, AskError> {
        if !self.counts_by_asking.load(Ordering::Relaxed) {
            match self.json(TOKENIZE, Some(&self.prompt(question))).await {
                Ok(reply) => {
                    let count = reply["count"].as_u64().and_then(|n| u32::try_from(n).ok());
                    return count.ok_or_else(|| malformed(TOKENIZE, "it has no count"));
                }
                // Not there, or of another kind (llama-server's takes `content`).
                Err(AskError::Refused { status: 400 | 404 | 405 | 422 | 501, .. }) if self.profiles.is_empty() => {
                    self.counts_by_asking.store(true, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
        }
        let mut body = self.prompt(question);
        body["max_tokens"] = 1.into();
        body["temperature"] = 0.into();
        let path = path_of(question);
        let reply = self.json(path, Some(&body)).await?;
        let count = reply["usage"]["prompt_tokens"].as_u64().and_then(|n| u32::try_from(n).ok());
        count.ok_or_else(|| malformed(path, "its usage has no prompt_tokens"))
    }

    /// The greedy answer to a question. `label` tells it from all others of this run.
    ///
    /// # Errors
    /// [`AskError`]. A server that is busy (429) is asked again.
    pub async fn ask(&self, question: &Question, profile: Option<&str>, label: &str) -> Result<Answer, AskError> {
        let mut body = self.prompt(question);
        body["max_tokens"] = question.max_tokens.into();
        body["temperature"] = 0.into();
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        if let Some(profile) = profile {
            // A beginning found in the prefix cache is read compressed, where a cold prompt is computed exactly.
            body["cache_profile"] = profile.into();
            // Of what the model's files ask for, temperature 0 leaves this alone: answers to a record of many like lines suffer most.
            body["repetition_penalty"] = 1.into();
            // Hashed, as a salt is of few letters.
            body["cache_salt"] = blake3::hash(format!("{}/{label}", self.salt).as_bytes()).to_hex().as_str().into();
        }
        let path = path_of(question);
        let work = async {
            let response = self.accepted(path, Some(&body)).await?;
            let mut heard = Heard::default();
            let mut stream = response.into_body();
            while let Some(frame) = stream.frame().await {
                let frame = frame.map_err(|e| malformed(path, format!("its stream broke off ({e})")))?;
                if let Ok(data) = frame.into_data() {
                    heard.take(&data, path)?;
                }
            }
            heard.finish(path)
        };
        self.in_time(path, work).await
    }

    /// Log-probabilities (natural) of `ids[1..]`, each after all before it, by an echo of the prompt.
    ///
    /// # Errors
    /// [`AskError`].
    pub async fn score(&self, ids: &[u32]) -> Result<Vec<f64>, AskError> {
        // One token is asked for, as evaluation harnesses do: some servers refuse none.
        let body = json!({
            "model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 1,
        });
        let reply = self.json(COMPLETIONS, Some(&body)).await?;
        let logprobs = reply["choices"][0]["logprobs"]["token_logprobs"].as_array();
        let logprobs = logprobs.ok_or_else(|| malformed(COMPLETIONS, "it has no token_logprobs for an echo"))?;
        let of_prompt = logprobs.get(1..ids.len()).ok_or_else(|| malformed(COMPLETIONS, "it has fewer token_logprobs than tokens"))?;
        of_prompt.iter().map(|v| v.as_f64().ok_or_else(|| malformed(COMPLETIONS, "a token_logprob is no number"))).collect()
    }

    /// Token ids of `text`.
    ///
    /// # Errors
    /// [`AskError::NoTokenize`] where the server cannot.
    pub async fn tokenize(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, AskError> {
        let body = json!({ "model": self.model, "prompt": text, "add_special_tokens": add_special_tokens });
        let reply = match self.json(TOKENIZE, Some(&body)).await {
            Err(AskError::Refused { status: 404 | 405 | 501, .. }) => return Err(AskError::NoTokenize),
            other => other?,
        };
        let ids = reply["tokens"].as_array().ok_or(AskError::NoTokenize)?;
        ids.iter().map(|v| v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or(AskError::NoTokenize)).collect()
    }

    /// The model and the prompt, as `/tokenize` and the completions take them alike.
    fn prompt(&self, question: &Question) -> Value {
        if question.prompt.is_string() {
            return json!({ "model": self.model, "prompt": question.prompt });
        }
        let mut body = json!({ "model": self.model, "messages": question.prompt });
        if question.continues {
            body["add_generation_prompt"] = false.into();
            body["continue_final_message"] = true.into();
        }
        body
    }

    /// A whole reply as JSON.
    async fn json(&self, path: &'static str, body: Option<&Value>) -> Result<Value, AskError> {
        let work = async {
            let response = self.accepted(path, body).await?;
            let bytes = response.into_body().collect().await.map_err(|e| malformed(path, e.to_string()))?.to_bytes();
            serde_json::from_slice(&bytes).map_err(|e| malformed(path, e.to_string()))
        };
        self.in_time(path, work).await
    }

    async fn in_time<T>(&self, path: &'static str, work: impl Future<Output = Result<T, AskError>>) -> Result<T, AskError> {
        let slow = AskError::Slow { path, seconds: self.timeout.as_secs() };
        tokio::time::timeout(self.timeout, work).await.unwrap_or(Err(slow))
    }

    /// A response with a good status; waits while the server is busy.
    async fn accepted(&self, path: &'static str, body: Option<&Value>) -> Result<Response<Body>, AskError> {
        for attempt in 0.. {
            let response = self.transport.send(request(path, body, self.key.as_deref())?).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let after = response.headers().get("retry-after").and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
            let bytes = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            if status.as_u16() == 429 && attempt < RETRIES {
                tokio::time::sleep(Duration::from_secs(after.unwrap_or(1).clamp(1, RETRY_MOST))).await;
                continue;
            }
            return Err(AskError::Refused { path, status: status.as_u16(), message: said(&bytes) });
        }
        unreachable!("the last attempt returns")
    }
}

fn malformed(path: &'static str, reason: impl Into<String>) -> AskError {
    AskError::Malformed { path, reason: reason.into() }
}

fn path_of(question: &Question) -> &'static str {
    if question.prompt.is_string() { COMPLETIONS } else { CHAT }
}

/// What a refusal says: OpenAI's error object, or the beginning of whatever it is.
fn said(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let message = value["error"]["message"].as_str().or_else(|| value["message"].as_str()).or_else(|| value["detail"].as_str());
    let text = message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.is_empty() { "it gives no reason".to_owned() } else { text.chars().take(300).collect() }
}

/// Different for every run, without anyone's clock: the standard library seeds each hasher from the operating system.
fn run_salt() -> String {
    use std::hash::{BuildHasher, Hasher};
    format!("{:016x}", std::hash::RandomState::new().build_hasher().finish())
}

/// A stream of server-sent events, as far as it came.
#[derive(Default)]
struct Heard {
    /// Bytes of a line that is not whole yet.
    line: Vec<u8>,
    text: String,
    usage: Value,
    first: Option<Instant>,
    last: Option<Instant>,
    over: bool,
}

impl Heard {
    fn take(&mut self, data: &[u8], path: &'static str) -> Result<(), AskError> {
        for &byte in data {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            self.event(&line, path)?;
        }
        Ok(())
    }

    fn event(&mut self, line: &[u8], path: &'static str) -> Result<(), AskError> {
        let line = line.trim_ascii();
        // Other fields, comments and the blank lines between events say nothing here.
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { return Ok(()) };
        if data == b"[DONE]" {
            self.over = true;
            return Ok(());
        }
        let event: Value =
            serde_json::from_slice(data).map_err(|e| malformed(path, format!("an event of its stream is not JSON ({e})")))?;
        if event.get("error").is_some() {
            return Err(AskError::GaveUp { path, message: said(data) });
        }
        let choice = &event["choices"][0];
        let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default();
        if !text.is_empty() {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
            self.text += text;
        }
        if event["usage"].is_object() {
            self.usage = event["usage"].clone();
        }
        Ok(())
    }

    fn finish(self, path: &'static str) -> Result<Answer, AskError> {
        if !self.over {
            return Err(malformed(path, "its stream ended without [DONE]"));
        }
        let number = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        Ok(Answer {
            text: self.text,
            prompt_tokens: number(&self.usage["prompt_tokens"]),
            completion_tokens: number(&self.usage["completion_tokens"]),
            cache_bytes: self.usage["kv_cache"]["bytes"].as_u64(),
            // The server's own clock, if it tells: text that comes in a burst says little.
            decode: match self.usage["timings"]["predicted_ms"].as_f64().map(|ms| Duration::try_from_secs_f64(ms / 1e3)) {
                Some(Ok(told)) => told,
                _ => self.first.zip(self.last).map_or(Duration::ZERO, |(first, last)| last - first),
            },
        })
    }
}
