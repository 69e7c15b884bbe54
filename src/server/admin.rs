//! Everything that is not generation: probes, pages, models, capacity, metrics, drain.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::HeaderValue;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use super::error::ErrorBody;
use super::openai::{Capacity, ChatChunk, CompressionCard, Draining, ModelCard, ModelList, ProfileCapacity, ProfileCard, Status, Version};
use super::{ApiError, Loaded, Phase, Server};
use crate::adapters::registry::{AliasState, Registry};
use crate::admission::wire::Message;
use crate::admission::{Refusal, ServedProfile};
use crate::ids::ProfileIndex;
use crate::kv::layout::Size;

/// The description of this API.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Strait",
        description = "OpenAI-compatible server for long contexts with a compressed KV cache.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        super::generate::chat,
        super::generate::completion,
        super::generate::invocation,
        super::generate::tokenize,
        super::generate::detokenize,
        models,
        model,
        capacity,
        health,
        ready,
        ping,
        version,
        metrics,
        super::adapters::list,
        super::adapters::load,
        super::adapters::unload,
        super::adapters::rollback,
        drain
    ),
    components(schemas(ChatChunk, Message))
)]
pub struct Api;

/// Whether the process works: the engine gives signs of life, or there is none yet.
#[utoipa::path(get, path = "/health", tag = "Operations", responses((status = 200, body = Status), (status = 503, body = ErrorBody)))]
pub async fn health(State(server): State<Arc<Server>>) -> Result<Json<Status>, ApiError> {
    alive(&server)?;
    Ok(Json(Status { status: "ok" }))
}

/// Whether new requests are taken: the model is loaded, the server is not draining.
#[utoipa::path(get, path = "/ready", tag = "Operations", responses((status = 200, body = Status), (status = 503, body = ErrorBody)))]
pub async fn ready(State(server): State<Arc<Server>>) -> Result<Json<Status>, ApiError> {
    server.accepting()?;
    alive(&server)?;
    Ok(Json(Status { status: "ready" }))
}

/// The same, under the name and by the methods that SageMaker asks: it sends requests from the first 200 on.
#[utoipa::path(method(get, post), path = "/ping", tag = "vLLM", responses((status = 200, body = Status), (status = 503, body = ErrorBody)))]
pub async fn ping(server: State<Arc<Server>>) -> Result<Json<Status>, ApiError> {
    ready(server).await
}

fn alive(server: &Server) -> Result<(), ApiError> {
    let Ok(loaded) = server.loaded() else { return Ok(()) };
    // A server that is stopping has let its engine go.
    let age = loaded.engine.heartbeat_age();
    if age > server.config.heartbeat_limit && server.phase() < Phase::Stopping {
        return Err(ApiError::stalled(age));
    }
    Ok(())
}

/// The server's version.
#[utoipa::path(get, path = "/version", tag = "Operations", responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "Operations", responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let text = match server.loaded() {
        Ok(loaded) => {
            let engine = loaded.engine.snapshot();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            server.telemetry.scrape(&engine, &super::adapters::snapshot(loaded, &engine.device_adapters, now))
        }
        Err(_) => server.telemetry.render(),
    };
    let mut response = text.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    response
}

/// The served models.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "OpenAI",
    responses((status = 200, body = ModelList), (status = "default", description = "OpenAI's error object", body = ErrorBody))
)]
pub async fn models(State(server): State<Arc<Server>>) -> Result<Json<ModelList>, ApiError> {
    let loaded = server.loaded()?;
    let mut data: Vec<ModelCard> = loaded.model.names.iter().map(|name| card(loaded, name)).collect();
    data.extend(loaded.adapters.state().aliases.iter().map(|a| adapter_card(loaded, a)));
    Ok(Json(ModelList { object: "list", data }))
}

/// One served model.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    tag = "OpenAI",
    params(("id" = String, Path, description = "A name from /v1/models; it may contain slashes")),
    responses((status = 200, body = ModelCard), (status = "default", description = "OpenAI's error object", body = ErrorBody))
)]
pub async fn model(State(server): State<Arc<Server>>, id: Result<Path<String>, PathRejection>) -> Result<Json<ModelCard>, ApiError> {
    let loaded = server.loaded()?;
    let Path(id) = id.map_err(|_| Refusal::UnknownModel)?;
    if loaded.model.names.contains(&id) {
        return Ok(Json(card(loaded, &id)));
    }
    // Whether there is an adapter of that name may be for its folder to say.
    let known = loaded.clone();
    let look = move |adapters: &Registry| Ok(known.model.resolve(Some(&id)).map(|(_, adapter)| adapters.alias(&adapter?)));
    let state = super::adapters::blocking(&server, loaded, look).await??.ok_or(Refusal::UnknownModel)?;
    Ok(Json(adapter_card(loaded, &state)))
}

fn adapter_card(loaded: &Loaded, adapter: &AliasState) -> ModelCard {
    ModelCard {
        root: adapter.path.display().to_string(),
        parent: Some(loaded.model.name().to_owned()),
        created: adapter.created,
        ..card(loaded, &adapter.alias)
    }
}

fn card(loaded: &Loaded, name: &str) -> ModelCard {
    let model = &loaded.model;
    let profile = |(index, served): (usize, &ServedProfile)| ProfileCard {
        name: served.profile.name.clone(),
        default: index == usize::from(model.default_profile.0),
        bytes_per_token: served.bytes_per_token,
        compression: served.profile.cskv.as_ref().map(|c| {
            let shares = match c.size {
                Size::Shares { key_rank, value_rank, key_bits, value_bits } => Some((key_rank, value_rank, key_bits, value_bits)),
                Size::Budget(_) => None,
            };
            CompressionCard {
                key_rank: shares.map(|s| s.0),
                value_rank: shares.map(|s| s.1),
                key_bits: shares.map(|s| s.2),
                value_bits: shares.map(|s| s.3),
                budget: if let Size::Budget(bytes) = c.size { Some(bytes) } else { None },
                window: c.window,
                sinks: c.sinks,
            }
        }),
    };
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: model.created,
        owned_by: "strait",
        root: model.root.clone(),
        parent: None,
        max_model_len: model.context,
        cache_profiles: model.profiles.iter().enumerate().map(profile).collect(),
    }
}

/// `?tokens=` of `/v1/capacity`, as it was written: a number is read below, so that its error is ours.
type CapacityQuery = Vec<(String, String)>;

/// What still fits in the cache, per profile, by the scheduler's own arithmetic.
#[utoipa::path(
    get,
    path = "/v1/capacity",
    tag = "Operations",
    params(("tokens" = Option<u32>, Query, description = "Length of the requests to count; the whole context if absent")),
    responses((status = 200, body = Capacity), (status = "default", description = "OpenAI's error object", body = ErrorBody))
)]
pub async fn capacity(
    State(server): State<Arc<Server>>,
    query: Result<Query<CapacityQuery>, QueryRejection>,
) -> Result<Json<Capacity>, ApiError> {
    let loaded = server.loaded()?;
    let context = loaded.model.context;
    let Query(query) = query.map_err(|_| Refusal::Value { param: "tokens".to_owned(), rule: "is no query".to_owned() })?;
    let request_tokens = match query.iter().find(|(key, _)| key == "tokens") {
        None => context,
        Some((_, text)) => text.parse().ok().filter(|n| (1..=context).contains(n)).ok_or_else(|| {
            let rule = format!("must be an integer between 1 and {context}");
            Refusal::Value { param: "tokens".to_owned(), rule }
        })?,
    };
    let snapshot = loaded.engine.snapshot();
    let now = snapshot.free_bytes + snapshot.cached_bytes;
    let profiles = loaded.model.profiles.iter().zip(0u8..).map(|(served, index)| {
        let need = |tokens: u32| (loaded.need)(ProfileIndex(index), tokens);
        let longest = |bytes: u64| partition(context, |tokens| need(tokens) <= bytes);
        let request_bytes = need(request_tokens);
        ProfileCapacity {
            profile: served.profile.name.clone(),
            default: ProfileIndex(index) == loaded.model.default_profile,
            bytes_per_token: served.bytes_per_token,
            tokens_now: longest(now),
            tokens_idle: longest(snapshot.arena_bytes),
            request_bytes,
            requests_now: now / request_bytes.max(1),
            requests_idle: snapshot.arena_bytes / request_bytes.max(1),
        }
    });
    Ok(Json(Capacity {
        object: "capacity",
        arena_bytes: snapshot.arena_bytes,
        free_bytes: snapshot.free_bytes,
        evictable_bytes: snapshot.cached_bytes,
        running: snapshot.running,
        waiting: snapshot.waiting,
        request_tokens,
        profiles: profiles.collect(),
    }))
}

/// The largest `n` of `0..=most` that `fits`, given that everything below what fits also does. Zero always does.
fn partition(most: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

/// Stops taking requests; those in flight go on. With the admin key, or from this machine where there is none.
#[utoipa::path(
    post,
    path = "/admin/drain",
    tag = "Operations",
    responses((status = 202, body = Draining), (status = "default", description = "OpenAI's error object", body = ErrorBody))
)]
pub async fn drain(State(server): State<Arc<Server>>) -> (StatusCode, Json<Draining>) {
    server.drain();
    tracing::info!("draining by request");
    let snapshot = server.loaded().map(|loaded| loaded.engine.snapshot()).unwrap_or_default();
    (StatusCode::ACCEPTED, Json(Draining { status: "draining", running: snapshot.running, waiting: snapshot.waiting }))
}

/// Paths of the contract that a later version serves.
pub async fn not_implemented() -> ApiError {
    ApiError::not_implemented()
}

/// The OpenAPI description.
pub async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(Api::openapi())
}

/// The chat page.
pub async fn chat_page(State(server): State<Arc<Server>>) -> Response {
    page(server.config.pages.chat)
}

/// The dashboard.
pub async fn dashboard_page(State(server): State<Arc<Server>>) -> Response {
    page(server.config.pages.dashboard)
}

/// A page that shows `/openapi.json`.
pub async fn docs_page() -> Response {
    page(include_str!("docs.html"))
}

/// A page that may use only what is in it and this server, and that nobody may frame.
const POLICY: &str = "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
                      connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

fn page(html: &'static str) -> Response {
    let mut response = html.into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CACHE_CONTROL, "no-cache"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found() {
        for most in 0..20 {
            for limit in 0..25 {
                assert_eq!(partition(most, |n| n <= limit), limit.min(most));
            }
        }
    }
}
