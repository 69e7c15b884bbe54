//! The HTTP edge: who may ask, how much they may send, what they are told. It knows text and sockets; the engine behind
//! it knows tokens.
//!
//! A request passes, in this order: request id, `Host`, key, route, headers of its body, the body itself (deadline and
//! limit), admission off the async threads, the engine's queue. Each step does no work a later one could make vain.

use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{ALLOW, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use subtle::ConstantTimeEq;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::adapters::registry::Registry;
use crate::engine::EngineHandle;
use crate::ids::ProfileIndex;
use crate::telemetry::{Event, Full, Telemetry};

pub use crate::admission::{Codec, Model, Refusal};

pub mod adapters;
pub mod admin;
pub mod error;
pub mod generate;
pub mod listen;
pub mod openai;
pub mod origins;
pub mod socket;

pub use error::ApiError;
pub use listen::{Peer, serve};
pub use origins::Origins;

/// What the edge needs to know before any model is loaded.
#[derive(Clone, Debug)]
pub struct Config {
    /// Keys for everything but the public paths; none means that no key is needed.
    pub api_keys: Keys,
    /// Keys for `/admin/*` and for changing adapters, which without any are for this machine's own callers; they open everything
    /// else, too.
    pub admin_keys: Keys,
    /// Whose pages may use the server, beside its own.
    pub origins: Origins,
    pub limits: Limits,
    /// Longest silence of a stream before a keep-alive comment.
    pub keep_alive: Duration,
    /// An engine that gave no sign of life for so long is reported dead.
    pub heartbeat_limit: Duration,
    /// Requests whose text is worked on at once, if their bodies have at most [`SHORT_TEXT`] bytes, and how many more may wait for
    /// that. Beside them, so many times that much of longer bodies; one that is longer still is the only long one then.
    pub text_threads: usize,
    pub text_queue: usize,
    /// Seeds of requests that give none repeat from start to start, in the same order, when this is set.
    pub seed: Option<u64>,
    pub pages: Pages,
}

/// Bytes of the longest body whose text is short: work on it takes one place among its like. Work on longer ones takes a place
/// among theirs for each so many bytes, as memory goes with the text, and short ones need not wait for long ones.
pub const SHORT_TEXT: usize = 256 << 10;

/// Pages served to browsers. They load nothing from other hosts.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    pub chat: &'static str,
    pub dashboard: &'static str,
}

/// What one client may cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub body_bytes: usize,
    /// Bytes of all bodies being read or worked on.
    pub bodies_bytes: usize,
    /// A body has this long to arrive, and a second more for each MiB of it that has.
    pub body_deadline: Duration,
    /// A header, or the next request on an open connection, has this long to arrive.
    pub header_deadline: Duration,
    /// Bytes of a header; at least 8 KiB.
    pub header_bytes: usize,
    pub headers: usize,
    pub connections: usize,
    /// Bytes the kernel may hold for a client that does not read.
    pub send_buffer: usize,
    /// A client that acknowledges nothing for so long is gone.
    pub write_stall: Duration,
    /// After the drain deadline, so long for error events to be written.
    pub stop_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body_bytes: 16 << 20,
            bodies_bytes: 256 << 20,
            body_deadline: Duration::from_secs(30),
            header_deadline: Duration::from_secs(10),
            header_bytes: 32 << 10,
            headers: 64,
            connections: 1024,
            send_buffer: 64 << 10,
            write_stall: Duration::from_secs(30),
            stop_grace: Duration::from_secs(5),
        }
    }
}

impl Config {
    /// The shipped limits, no keys, and these pages.
    pub fn new(pages: Pages) -> Self {
        Config {
            api_keys: Keys::default(),
            admin_keys: Keys::default(),
            origins: Origins::default(),
            limits: Limits::default(),
            keep_alive: Duration::from_secs(10),
            heartbeat_limit: Duration::from_secs(60),
            text_threads: std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2)),
            text_queue: 64,
            seed: None,
            pages,
        }
    }
}

/// A set of secrets, kept as digests.
#[derive(Clone, Default)]
pub struct Keys {
    digests: Vec<[u8; 32]>,
}

impl Keys {
    /// The keys, of which empty ones are left out.
    pub fn new<S: AsRef<str>>(keys: impl IntoIterator<Item = S>) -> Self {
        let digests = keys.into_iter().filter(|k| !k.as_ref().is_empty()).map(|k| *blake3::hash(k.as_ref().as_bytes()).as_bytes());
        Keys { digests: digests.collect() }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Whether `presented` is one of them. Takes the same time whichever it is, and if it is none.
    pub fn admit(&self, presented: &[u8]) -> bool {
        let digest = blake3::hash(presented);
        let found = self.digests.iter().fold(subtle::Choice::from(0), |found, known| found | known[..].ct_eq(&digest.as_bytes()[..]));
        found.into()
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.digests.len())
    }
}

/// A model that can be asked.
pub struct Loaded {
    pub model: Model,
    pub engine: EngineHandle,
    /// Bytes of cache a request of so many positions needs at its largest: the scheduler's own arithmetic, not
    /// decreasing in the number of positions.
    pub need: Arc<dyn Fn(ProfileIndex, u32) -> u64 + Send + Sync>,
    pub adapters: Registry,
}

/// Where the server is in its life. It only moves forward.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    Loading,
    Ready,
    /// New requests are refused, those in flight go on.
    Draining,
    /// Those in flight are ended, too.
    Stopping,
}

/// The state of the edge. Shared by all connections.
pub struct Server {
    pub config: Config,
    pub telemetry: Arc<Telemetry>,
    loaded: OnceLock<Arc<Loaded>>,
    phase: watch::Sender<Phase>,
    short_texts: Arc<Semaphore>,
    long_texts: Arc<Semaphore>,
    text_queue: Arc<Semaphore>,
    bodies: Arc<AtomicUsize>,
    /// Random per process, unless seeded; absent seeds come from it and their count.
    secret: [u8; 32],
    seeds: AtomicU64,
    /// Random per process; request ids come from it and their count.
    id_secret: [u8; 32],
    ids: AtomicU64,
}

/// The id of a request: the client's own if it is harmless, else one of ours.
#[derive(Clone, Debug)]
pub struct RequestId(pub Arc<str>);

impl Server {
    /// A server without a model: it answers health and metrics, everything else with 503 until [`Server::install`].
    pub fn new(config: Config, telemetry: Arc<Telemetry>) -> Arc<Self> {
        telemetry.emit(Event::Ready { ready: false });
        Arc::new(Server {
            loaded: OnceLock::new(),
            phase: watch::Sender::new(Phase::Loading),
            short_texts: Arc::new(Semaphore::new(config.text_threads.max(1))),
            long_texts: Arc::new(Semaphore::new(config.text_threads.max(1))),
            text_queue: Arc::new(Semaphore::new(config.text_threads.max(1) + config.text_queue)),
            bodies: Arc::new(AtomicUsize::new(0)),
            secret: config.seed.map_or_else(process_secret, |seed| *blake3::hash(&seed.to_le_bytes()).as_bytes()),
            seeds: AtomicU64::new(0),
            id_secret: process_secret(),
            ids: AtomicU64::new(0),
            config,
            telemetry,
        })
    }

    /// Puts the loaded model behind the edge; from now on `/ready` says so. Only the first call counts.
    pub fn install(&self, loaded: Loaded) {
        if self.loaded.set(Arc::new(loaded)).is_err() {
            return;
        }
        if !self.advance(Phase::Ready)
            && let Some(loaded) = self.loaded.get()
        {
            // The drain began while the model was being loaded.
            loaded.engine.drain();
        }
    }

    /// Moves on to `phase`, unless the server is there already or further.
    fn advance(&self, phase: Phase) -> bool {
        let moved = self.phase.send_if_modified(|now| {
            let moves = *now < phase;
            if moves {
                *now = phase;
            }
            moves
        });
        if moved {
            self.telemetry.emit(Event::Ready { ready: phase == Phase::Ready });
        }
        moved
    }

    /// Where the server is now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Resolves when the server has come to `phase` or further.
    pub fn reached(&self, phase: Phase) -> impl Future<Output = ()> + Send + 'static {
        let mut watch = self.phase.subscribe();
        async move {
            // The sender lives in the server; if that is gone, so is everything to wait for.
            let _ = watch.wait_for(|now| *now >= phase).await;
        }
    }

    /// Stops taking requests: `/ready` fails, new generations get 503, those in flight go on.
    pub fn drain(&self) {
        if self.advance(Phase::Draining)
            && let Some(loaded) = self.loaded.get()
        {
            loaded.engine.drain();
        }
    }

    /// Ends what is in flight with error events. Implies [`Server::drain`].
    pub fn stop(&self) {
        self.drain();
        if self.advance(Phase::Stopping)
            && let Some(loaded) = self.loaded.get()
        {
            loaded.engine.stop();
        }
    }

    /// The model, for anything that does not start new work.
    pub(crate) fn loaded(&self) -> Result<&Arc<Loaded>, ApiError> {
        self.loaded.get().ok_or_else(ApiError::not_ready)
    }

    /// The model, for new work.
    pub(crate) fn accepting(&self) -> Result<&Arc<Loaded>, ApiError> {
        if self.phase() >= Phase::Draining {
            return Err(ApiError::draining());
        }
        self.loaded()
    }

    /// 64 bits to derive the seeds of a request from that gives none.
    pub(crate) fn entropy(&self) -> u64 {
        keyed_count(&self.secret, &self.seeds)
    }

    /// 64 bits that name a request; outsiders cannot guess another's.
    fn unique(&self) -> u64 {
        keyed_count(&self.id_secret, &self.ids)
    }

    /// Works on the text of a body of so many `bytes` with `job`, on a thread that may block.
    ///
    /// # Errors
    /// 429 when too many wait already; what `job` refuses; 500 if it panics.
    pub(crate) async fn text<T, F>(&self, loaded: &Arc<Loaded>, bytes: usize, job: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce(&Model) -> Result<T, Refusal> + Send + 'static,
    {
        let Ok(place) = self.text_queue.clone().try_acquire_owned() else {
            return Err(ApiError::overloaded(Full::Texts, Duration::from_secs(1)));
        };
        let (slots, wanted) = match bytes.div_ceil(SHORT_TEXT) {
            0 | 1 => (&self.short_texts, 1),
            // No more than there are, or the longest would wait for ever.
            many => (&self.long_texts, many.min(self.config.text_threads.max(1))),
        };
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let slot = slots.clone().acquire_many_owned(wanted).await.map_err(|_| ApiError::internal())?;
        let loaded = loaded.clone();
        let done = tokio::task::spawn_blocking(move || {
            // Held until the work is done, also when the client has left meanwhile: the thread is busy either way.
            let _held = (place, slot);
            job(&loaded.model)
        });
        match done.await {
            Ok(result) => result.map_err(ApiError::from),
            Err(error) => {
                tracing::error!(panicked = error.is_panic(), "text work failed");
                self.telemetry.emit(Event::Panicked);
                Err(ApiError::internal())
            }
        }
    }

    /// Reads a JSON body: right type, within the limit, in time.
    ///
    /// # Errors
    /// 415, 413 (before reading, if the length is announced), 408, 429 if all bodies together are too large.
    pub(crate) async fn read_body(&self, request: Request) -> Result<Body, ApiError> {
        let limits = &self.config.limits;
        check_json(request.headers())?;
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|n| n > limits.body_bytes as u64) {
            return Err(ApiError::body_too_large(limits.body_bytes));
        }
        let mut held = Body { bytes: Bytes::new(), counted: 0, total: self.bodies.clone() };
        let mut bytes = Vec::new();
        let mut body = request.into_body();
        let begun = Instant::now();
        loop {
            let deadline = begun + limits.body_deadline + Duration::from_secs((bytes.len() >> 20) as u64);
            let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
                Err(_) => return Err(ApiError::request_timeout()),
                Ok(None) => break,
                Ok(Some(Err(_))) => return Err(ApiError::broken_body()),
                Ok(Some(Ok(frame))) => frame,
            };
            // Trailers are read and forgotten.
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > limits.body_bytes {
                return Err(ApiError::body_too_large(limits.body_bytes));
            }
            if !held.count(data.len(), limits.bodies_bytes) {
                return Err(ApiError { close: true, ..ApiError::overloaded(Full::Bodies, Duration::from_secs(1)) });
            }
            bytes.extend_from_slice(&data);
        }
        held.bytes = bytes.into();
        Ok(held)
    }

    /// Every path with its handlers. The paths are those of [`ROUTES`].
    pub fn router(self: &Arc<Self>) -> Router {
        let later = || -> MethodRouter<Arc<Server>> { post(admin::not_implemented) };
        Router::new()
            .route("/", get(admin::chat_page))
            .route("/dashboard", get(admin::dashboard_page))
            .route("/docs", get(admin::docs_page))
            .route("/openapi.json", get(admin::openapi))
            .route("/health", get(admin::health))
            .route("/ready", get(admin::ready))
            .route("/ping", get(admin::ping).post(admin::ping))
            .route("/version", get(admin::version))
            .route("/metrics", get(admin::metrics))
            .route("/tokenize", post(generate::tokenize))
            .route("/detokenize", post(generate::detokenize))
            .route("/v1/models", get(admin::models))
            .route("/v1/models/{*id}", get(admin::model))
            .route("/v1/capacity", get(admin::capacity))
            .route("/v1/chat/completions", post(generate::chat))
            .route("/v1/completions", post(generate::completion))
            .route("/invocations", post(generate::invocation))
            .route("/v1/responses", later())
            .route("/v1/embeddings", later())
            .route("/v1/load_lora_adapter", post(adapters::load))
            .route("/v1/unload_lora_adapter", post(adapters::unload))
            .route("/v1/rollback_lora_adapter", post(adapters::rollback))
            .route("/v1/lora_adapters", get(adapters::list))
            .route("/admin/drain", post(admin::drain))
            .method_not_allowed_fallback(async || ApiError::method_not_allowed())
            .fallback(async || ApiError::not_found())
            .layer(from_fn_with_state(self.clone(), edge))
            .with_state(self.clone())
    }
}

/// Every route: the label values of `http_requests_total`, and what `/openapi.json` documents.
pub const ROUTES: &[&str] = &[
    "/",
    "/dashboard",
    "/docs",
    "/openapi.json",
    "/health",
    "/ready",
    "/ping",
    "/version",
    "/metrics",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/models/{*id}",
    "/v1/capacity",
    "/v1/chat/completions",
    "/v1/completions",
    "/invocations",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/rollback_lora_adapter",
    "/v1/lora_adapters",
    "/admin/drain",
];

/// Paths that need no key: probes, and pages whose own calls need one.
const PUBLIC: &[&str] = &["/health", "/ready", "/ping", "/", "/dashboard", "/docs"];

/// Paths outside `/admin/` that change what is served to everybody.
const ADMIN: &[&str] = &["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/rollback_lora_adapter"];

/// A body that was read, counted against the limit of all bodies until it is dropped.
pub(crate) struct Body {
    bytes: Bytes,
    counted: usize,
    total: Arc<AtomicUsize>,
}

impl Body {
    fn count(&mut self, n: usize, most: usize) -> bool {
        let before = self.total.fetch_add(n, Ordering::Relaxed);
        self.counted += n;
        before + n <= most
    }
}

impl std::ops::Deref for Body {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.total.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

fn check_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let encoded = headers.get_all(CONTENT_ENCODING).iter().any(|v| !v.as_bytes().eq_ignore_ascii_case(b"identity"));
    if encoded {
        return Err(ApiError::unsupported_media_type("the body must not be compressed"));
    }
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let json = match (types.next().and_then(|v| v.to_str().ok()), types.next()) {
        (Some(one), None) => {
            let (essence, parameters) = one.split_once(';').unwrap_or((one, ""));
            let utf8 = parameters.trim().is_empty() || parameters.trim().replace('"', "").eq_ignore_ascii_case("charset=utf-8");
            essence.trim().eq_ignore_ascii_case("application/json") && utf8
        }
        _ => false,
    };
    if json { Ok(()) } else { Err(ApiError::unsupported_media_type("the body must be JSON: send Content-Type: application/json")) }
}

/// The outermost layer: id, `Host`, key, panic boundary, counting.
async fn edge(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>();
    let path = matched.and_then(|m| ROUTES.iter().copied().find(|r| *r == m.as_str())).unwrap_or("unmatched");
    let method = method_label(request.method());
    let id = RequestId(request_id(&server, request.headers()));
    request.extensions_mut().insert(id.clone());

    let origin = server.config.origins.admit(request.headers());
    let preflight = origin.is_some() && origins::is_preflight(request.method(), request.headers());
    let mut response = match admit(&server, path, &request, preflight) {
        Err(error) => error.into_response(),
        Ok(()) if preflight => origins::preflight(request.headers()),
        // No route of ours is an authority, so the router has no `Allow` for it.
        Ok(()) if *request.method() == Method::CONNECT => {
            ([(ALLOW, "GET, HEAD, POST")], ApiError { close: true, ..ApiError::method_not_allowed() }).into_response()
        }
        Ok(()) => match std::panic::AssertUnwindSafe(next.run(request)).catch_unwind().await {
            Ok(response) => response,
            Err(_) => {
                tracing::error!(request_id = %id.0, path, "a handler panicked");
                server.telemetry.emit(Event::Panicked);
                ApiError::internal().into_response()
            }
        },
    };
    if let Some(&error::Refused(code, full)) = response.extensions().get() {
        tracing::debug!(request_id = %id.0, path, status = response.status().as_u16(), code, "refused");
        server.telemetry.emit(Event::Refused { code, full });
    }
    let value = HeaderValue::from_str(&id.0).expect("request ids are of [A-Za-z0-9_-]");
    response.headers_mut().insert(HeaderName::from_static("x-request-id"), value);
    server.config.origins.mark(origin, response.headers_mut());
    server.telemetry.emit(Event::Http { path, method, status: response.status().as_u16() });
    response
}

/// A browser sends no key with a preflight, which does nothing.
fn admit(server: &Server, path: &'static str, request: &Request, preflight: bool) -> Result<(), ApiError> {
    if !listen::host_is_valid(request.uri(), request.headers()) {
        return Err(ApiError::bad_host());
    }
    if !PUBLIC.contains(&path) && !preflight {
        let role = authenticate(server, request.headers())?;
        // By what was asked for as well as by what matched: nothing below /admin/ is ever open by accident.
        if path.starts_with("/admin/") || ADMIN.contains(&path) || request.uri().path().starts_with("/admin/") {
            authorise_admin(server, role, request)?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Client,
    Admin,
}

fn authenticate(server: &Server, headers: &HeaderMap) -> Result<Role, ApiError> {
    let (keys, admins) = (&server.config.api_keys, &server.config.admin_keys);
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let bearer = values.next();
    if values.next().is_some() {
        return Err(ApiError::bad_header("authorization", "there must be only one Authorization header"));
    }
    let presented = match bearer {
        Some(value) => {
            value.as_bytes().split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer ")).map(|(_, key)| key)
        }
        None => headers.get("x-api-key").map(HeaderValue::as_bytes),
    };
    // Both sets are searched whatever the first says: every wrong key costs the same work.
    let (client, admin) = (keys.admit(presented.unwrap_or_default()), admins.admit(presented.unwrap_or_default()));
    match (presented.is_some() && admin, presented.is_some() && client || keys.is_empty()) {
        (true, _) => Ok(Role::Admin),
        (false, true) => Ok(Role::Client),
        (false, false) => Err(ApiError::invalid_api_key()),
    }
}

/// What a proxy says of the caller it speaks for.
const FORWARDED: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];

/// The admin key; where there is none, a caller on this machine that is no web page and no proxy: a page of another origin sends
/// `Origin`, one that rebinds its name to 127.0.0.1 sends that name as `Host`, and a proxy says for whom it asks, if it is told to.
fn authorise_admin(server: &Server, role: Role, request: &Request) -> Result<(), ApiError> {
    if role == Role::Admin {
        return Ok(());
    }
    if !server.config.admin_keys.is_empty() {
        return Err(ApiError::not_allowed("this needs the admin key (--admin-api-key)"));
    }
    let headers = request.headers();
    let proxied = FORWARDED.iter().any(|name| headers.contains_key(*name));
    let local = request.extensions().get::<Peer>().is_some_and(|peer| peer.0.ip().to_canonical().is_loopback());
    let host = headers.get(HOST).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(host, |(name, _)| name);
    let literal = name.eq_ignore_ascii_case("localhost") || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok();
    let own_page = headers.get(ORIGIN).is_none_or(|o| o.to_str().is_ok_and(|o| o.strip_prefix("http://") == Some(host)));
    if local && literal && own_page && !proxied {
        return Ok(());
    }
    Err(ApiError::not_allowed("this needs an admin key (--admin-api-key), or a caller on the server's own machine that is no proxy"))
}

/// At most these values: methods are otherwise the client's to invent.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

fn request_id(server: &Server, headers: &HeaderMap) -> Arc<str> {
    let harmless = |v: &[u8]| (1..=64).contains(&v.len()) && v.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    match headers.get("x-request-id") {
        Some(value) if harmless(value.as_bytes()) => value.to_str().unwrap_or_default().into(),
        _ => format!("{:016x}", server.unique()).into(),
    }
}

/// The next count, through a keyed hash.
fn keyed_count(secret: &[u8; 32], counter: &AtomicU64) -> u64 {
    let n = counter.fetch_add(1, Ordering::Relaxed);
    let hash = blake3::keyed_hash(secret, &n.to_le_bytes());
    let (head, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
    u64::from_le_bytes(*head)
}

/// The standard library seeds each `RandomState` from the operating system's generator.
fn process_secret() -> [u8; 32] {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = blake3::Hasher::new();
    for _ in 0..4 {
        hasher.update(&std::hash::RandomState::new().build_hasher().finish().to_le_bytes());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    hasher.update(&now.as_nanos().to_le_bytes());
    hasher.update(&std::process::id().to_le_bytes());
    *hasher.finalize().as_bytes()
}
