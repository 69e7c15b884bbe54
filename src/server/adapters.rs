//! Adapters over HTTP: load, replace, unload, roll back, list. Calls and replies as vLLM's clients and the Kubernetes sidecar know
//! them; a caller that asks for JSON is told more.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};

use super::error::ErrorBody;
use super::openai::{AdapterCard, AdapterFacts, AdapterGenerationCard, AdapterList, AdapterLoaded, AdapterUnloaded};
use super::{ApiError, Loaded, Server};
use crate::adapters::registry::{self, GenerationState, Load, Registry};
use crate::adapters::{AdapterError, BaseChoice, Facts};
use crate::admission::json::{self, Fields};
use crate::admission::wire::{LoadLora, RollbackLora, UnloadLora};
use crate::admission::{self, Refusal};
use crate::ids::AdapterGeneration;
use crate::telemetry::AdapterSnapshot;

/// Loads an adapter under a name, or replaces what the name points to. With the admin key, or from this machine where there is none.
#[utoipa::path(
    post,
    path = "/v1/load_lora_adapter",
    tag = "Adapters",
    request_body = LoadLora,
    responses(
        (status = 200, description = "A sentence, as vLLM has it; with `Accept: application/json` an AdapterLoaded", body = AdapterLoaded),
        (status = "default", description = "OpenAI's error object", body = ErrorBody)
    )
)]
pub async fn load(State(server): State<Arc<Server>>, request: Request) -> Result<Response, ApiError> {
    let (loaded, body, json) = asked(&server, request, LoadLora::read).await?;
    let base: BaseChoice = match &body.base {
        None => BaseChoice::Auto,
        Some(text) => text.parse().map_err(|rule| Refusal::Value { param: "base".to_owned(), rule })?,
    };
    let load = Load {
        alias: body.lora_name.clone(),
        path: body.lora_path.into(),
        base,
        in_place: body.load_inplace,
        pinned: body.pinned,
        expected: body.expected_generation.map(AdapterGeneration),
        trusted: false,
    };
    let done = blocking(&server, &loaded, move |adapters| adapters.load(&load)).await?;
    let name = &body.lora_name;
    tracing::info!(adapter = %name, generation = %hex(done.generation), bytes = done.facts.bytes, seconds = done.seconds, "adapter loaded");
    done.facts.warnings.iter().for_each(|w| tracing::warn!(adapter = %name, "{w}"));
    Ok(reply(json, &format!("Success: LoRA adapter '{name}' added successfully."), card_of(name, done)))
}

/// Takes an adapter away: requests on it finish, then its memory is free. With the admin key, or from this machine where there is none.
#[utoipa::path(
    post,
    path = "/v1/unload_lora_adapter",
    tag = "Adapters",
    request_body = UnloadLora,
    responses(
        (status = 200, description = "A sentence, as vLLM has it; with `Accept: application/json` an AdapterUnloaded", body = AdapterUnloaded),
        (status = "default", description = "OpenAI's error object", body = ErrorBody)
    )
)]
pub async fn unload(State(server): State<Arc<Server>>, request: Request) -> Result<Response, ApiError> {
    let (loaded, body, json) = asked(&server, request, UnloadLora::read).await?;
    let name = body.lora_name.clone();
    let done = blocking(&server, &loaded, move |adapters| adapters.unload(&name)).await?;
    let name = &body.lora_name;
    tracing::info!(adapter = %name, freed = done.freed_bytes, leases = done.leases, "adapter unloaded");
    let told = AdapterUnloaded {
        object: "lora_adapter.unloaded",
        id: name.clone(),
        freed_bytes: done.freed_bytes,
        requests_finishing: done.leases,
        bytes_when_finished: done.retiring_bytes,
    };
    Ok(reply(json, &format!("Success: LoRA adapter '{name}' removed successfully."), told))
}

/// Points a name back to an earlier generation. With the admin key, or from this machine where there is none.
#[utoipa::path(
    post,
    path = "/v1/rollback_lora_adapter",
    tag = "Adapters",
    request_body = RollbackLora,
    responses(
        (status = 200, description = "A sentence; with `Accept: application/json` an AdapterLoaded", body = AdapterLoaded),
        (status = "default", description = "OpenAI's error object", body = ErrorBody)
    )
)]
pub async fn rollback(State(server): State<Arc<Server>>, request: Request) -> Result<Response, ApiError> {
    let (loaded, body, json) = asked(&server, request, RollbackLora::read).await?;
    let (name, to) = (body.lora_name.clone(), body.generation.map(AdapterGeneration));
    let done = blocking(&server, &loaded, move |adapters| adapters.rollback(&name, to)).await?;
    let name = &body.lora_name;
    tracing::info!(adapter = %name, generation = %hex(done.generation), "adapter rolled back");
    let text = format!("Success: LoRA adapter '{name}' is back at generation {}.", hex(done.generation));
    Ok(reply(json, &text, card_of(name, done)))
}

/// Every adapter, and every generation that is in memory.
#[utoipa::path(
    get,
    path = "/v1/lora_adapters",
    tag = "Adapters",
    responses((status = 200, body = AdapterList), (status = "default", description = "OpenAI's error object", body = ErrorBody))
)]
pub async fn list(State(server): State<Arc<Server>>) -> Result<Json<AdapterList>, ApiError> {
    let loaded = server.loaded()?;
    let state = loaded.adapters.state();
    let engine = loaded.engine.snapshot();
    let on_device = |id: AdapterGeneration| engine.device_adapters.iter().find(|(known, _)| *known == id.0).map(|(_, bytes)| *bytes);
    let data = state.aliases.into_iter().map(|a| AdapterCard {
        id: a.alias,
        object: "lora_adapter",
        source: a.path.display().to_string(),
        base: a.base,
        generation: a.generation.map(hex),
        facts: a.facts.map(facts),
        resident: a.resident,
        pinned: a.pinned,
        created: a.created,
        requests: a.requests,
        active_leases: a.leases,
        history: a.history.into_iter().map(hex).collect(),
    });
    let generations = state.generations.into_iter().map(|g| AdapterGenerationCard {
        generation: hex(g.generation),
        aliases: g.aliases,
        rank: g.rank,
        bytes: g.bytes,
        device_bytes: on_device(g.generation),
        retired: g.retired,
        active_leases: g.leases,
    });
    Ok(Json(AdapterList {
        object: "list",
        data: data.collect(),
        generations: generations.collect(),
        resident_bytes: state.resident_bytes,
        max_bytes: state.budget_bytes,
        max_device_bytes: state.device_budget_bytes,
        max_rank: state.max_rank,
    }))
}

impl admission::Adapters for Registry {
    fn knows(&self, name: &str) -> bool {
        Registry::knows(self, name)
    }
}

/// What metrics tell of adapters, of which so many bytes lie `on_device`, by generation.
pub fn snapshot(loaded: &Loaded, on_device: &[(u64, u64)], now: u64) -> AdapterSnapshot {
    let state = loaded.adapters.state();
    let named = |g: &GenerationState| g.aliases.first().cloned().unwrap_or_else(|| hex(g.generation));
    let resident = || state.aliases.iter().filter(|a| a.resident);
    let largest = state.generations.iter().map(|g| g.bytes).max().unwrap_or(0).max(state.usual_bytes).max(1);
    AdapterSnapshot {
        registered: state.aliases.len(),
        resident: resident().count(),
        pinned: state.aliases.iter().filter(|a| a.pinned).count(),
        retired: state.generations.iter().filter(|g| g.retired).count(),
        bytes: state.generations.iter().map(|g| (named(g), g.bytes)).collect(),
        device_bytes: on_device
            .iter()
            .map(|&(id, bytes)| {
                let known = state.generations.iter().find(|g| g.generation.0 == id);
                (known.map_or_else(|| hex(AdapterGeneration(id)), named), bytes)
            })
            .collect(),
        budget_bytes: state.budget_bytes,
        device_budget_bytes: state.device_budget_bytes,
        room: usize::try_from(state.budget_bytes / largest).unwrap_or(usize::MAX).max(resident().count()).max(1),
        running: resident().map(|a| a.alias.clone()).collect(),
        waiting: state.loading,
        now,
    }
}

/// The model, the body as `read` takes it, and whether the caller wants JSON back.
async fn asked<T>(
    server: &Arc<Server>,
    request: Request,
    read: impl FnOnce(Fields) -> Result<T, Refusal>,
) -> Result<(Arc<Loaded>, T, bool), ApiError> {
    let loaded = server.accepting()?.clone();
    let json = wants_json(request.headers());
    let body = server.read_body(request).await?;
    Ok((loaded, read(Fields::body(json::parse(&body)?))?, json))
}

fn wants_json(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    accepts.map(|a| a.split(';').next().unwrap_or("").trim()).any(|a| a.eq_ignore_ascii_case("application/json"))
}

/// Works on the registry on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
    server: &Server,
    loaded: &Arc<Loaded>,
    job: impl FnOnce(&Registry) -> Result<T, AdapterError> + Send + 'static,
) -> Result<T, ApiError> {
    let adapters = loaded.adapters.clone();
    match tokio::task::spawn_blocking(move || job(&adapters)).await {
        Ok(done) => done.map_err(ApiError::from),
        Err(error) => {
            tracing::error!(panicked = error.is_panic(), "work on adapters failed");
            server.telemetry.emit(crate::telemetry::Event::Panicked);
            Err(ApiError::internal())
        }
    }
}

fn reply(json: bool, text: &str, told: impl serde::Serialize) -> Response {
    if json {
        return Json(told).into_response();
    }
    let mut response = text.to_owned().into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn card_of(name: &str, done: registry::Loaded) -> AdapterLoaded {
    AdapterLoaded {
        object: "lora_adapter.loaded",
        id: name.to_owned(),
        generation: hex(done.generation),
        replaced: done.replaced.map(hex),
        facts: facts(done.facts),
        seconds: done.seconds,
    }
}

fn facts(facts: Facts) -> AdapterFacts {
    let Facts { format, rank, modules, bytes, base_name, warnings } = facts;
    AdapterFacts { format, rank, modules, bytes, base_model_name_or_path: base_name, warnings }
}

/// A generation as it is told.
fn hex(generation: AdapterGeneration) -> String {
    format!("{:016x}", generation.0)
}
