//! Adapters at start, and `strait adapter`: the operator's hands on a running server, and a look at folders without one.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST};
use serde_json::{Value, json};

use crate::adapters::base::Spectra;
use crate::adapters::folder::Bounds;
use crate::adapters::registry::{Happened, Limits, Load, Registry};
use crate::adapters::{Facts, Reader, Ready, write};
use crate::config::args::{self, AdapterFolder, AdapterServer};
use crate::config::{AdapterSettings, cache_dir};
use crate::demo;
use crate::eval::ask::Transport;
use crate::eval::http::Http;
use crate::model::checkpoint::Checkpoint;
use crate::model::delta::HeldAs;
use crate::model::weights::LoadDtype;
use crate::serve::ready::Source;
use crate::telemetry::{Event, Telemetry};

/// The registry of a server, with what `--lora-modules` names loaded and what the root holds registered; of memory `free` bytes are
/// left, and on a device adapters may take `device_bytes`.
///
/// # Errors
/// One sentence for the first adapter that cannot be loaded, or where the root cannot be listed.
pub fn registry(
    base: &'static Checkpoint,
    held: HeldAs,
    (settings, free, device_bytes): (&AdapterSettings, Option<u64>, Option<u64>),
    (names, telemetry): (&[String], &Arc<Telemetry>),
) -> anyhow::Result<Registry> {
    let bytes = match settings.memory_bytes {
        Some(bytes) => bytes,
        // What a few adapters take, where nobody says how much is free.
        None => free.map_or(1 << 30, |free| (free / 8).max(64 << 20)),
    };
    let limits = Limits {
        bytes,
        device_bytes,
        rank: settings.max_rank,
        root: settings.root.clone(),
        discover: settings.discover,
        reserved: names.to_vec(),
    };
    let telemetry = telemetry.clone();
    let tell = move |happened| {
        telemetry.emit(match happened {
            Happened::Loaded { seconds } => Event::AdapterLoaded { ok: true, seconds },
            Happened::Failed => Event::AdapterLoaded { ok: false, seconds: 0.0 },
            Happened::Evicted => Event::AdapterEvicted,
        });
    };
    let spectra = Spectra::new(settings.cache_dir.as_deref(), base)?;
    let registry = Registry::new((base, held), spectra, limits, Box::new(tell));
    for module in &settings.modules {
        let (alias, path, base) = (module.name.clone(), module.path.clone(), module.base.clone());
        let load = Load { alias, path, base, trusted: true, ..Load::default() };
        let done = registry.load(&load).with_context(|| match module.name.starts_with("--") {
            true => format!("{} {}", module.name, module.path.display()),
            false => format!("--lora-modules {}={}", module.name, module.path.display()),
        })?;
        done.facts.warnings.iter().for_each(|w| tracing::warn!(adapter = %module.name, "{w}"));
        tracing::info!(adapter = %module.name, format = done.facts.format, rank = done.facts.rank, bytes = done.facts.bytes, "adapter loaded");
    }
    let (found, left_out) = registry.discover().context("cannot list --lora-root")?;
    left_out.iter().for_each(|(folder, why)| tracing::warn!(folder, "an adapter in --lora-root is left out: {why}"));
    if settings.discover {
        tracing::info!(adapters = found, "registered what --lora-root holds");
    }
    Ok(registry)
}

/// Bytes of a device that adapters may take, where `free` are left beside the weights: none where none can be loaded.
pub fn device_bytes(settings: &AdapterSettings, free: u64) -> u64 {
    if !settings.any() {
        return 0;
    }
    settings.device_memory_bytes.unwrap_or(free / 8)
}

/// `strait adapter`.
///
/// # Errors
/// One sentence for what was refused or failed.
pub fn adapter(command: &args::Adapter) -> anyhow::Result<()> {
    let text = match command {
        args::Adapter::Load(a) => {
            let mut body = json!({"lora_name": a.name, "lora_path": a.path, "load_inplace": a.in_place, "pinned": a.pin});
            body["base"] = json!(a.base.to_string());
            if let Some(expect) = &a.expect {
                body["expected_generation"] = json!(expect);
            }
            let told = ask(&a.server, "/v1/load_lora_adapter", Some(&body))?;
            if a.server.json { pretty(&told) } else { loaded(&told) }
        }
        args::Adapter::Unload(a) => {
            let told = ask(&a.server, "/v1/unload_lora_adapter", Some(&json!({"lora_name": a.name})))?;
            if a.server.json { pretty(&told) } else { unloaded(&told) }
        }
        args::Adapter::Rollback(a) => {
            let body = json!({"lora_name": a.name, "generation": a.generation});
            let told = ask(&a.server, "/v1/rollback_lora_adapter", Some(&body))?;
            if a.server.json { pretty(&told) } else { loaded(&told) }
        }
        args::Adapter::List(server) => {
            let told = ask(server, "/v1/lora_adapters", None)?;
            if server.json { pretty(&told) } else { table(&told) }
        }
        args::Adapter::Verify(folder) => verify(folder)?,
        args::Adapter::Convert(a) => convert(&a.folder, &a.out)?,
        args::Adapter::Inspect(inspect) => super::inspect::inspect(inspect)?,
    };
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// What a server says to one call.
fn ask(server: &AdapterServer, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
    let http = Http::new(&server.url)?;
    let from_env = || ["STRAIT_ADMIN_API_KEY", "STRAIT_API_KEY"].into_iter().find_map(|k| std::env::var(k).ok().filter(|v| !v.is_empty()));
    let mut request = Request::builder().uri(path).method(if body.is_some() { "POST" } else { "GET" });
    request = request.header(HOST, "localhost").header(CONTENT_TYPE, "application/json").header(ACCEPT, "application/json");
    if let Some(key) = server.api_key.clone().or_else(from_env) {
        request = request.header(AUTHORIZATION, format!("Bearer {key}"));
    }
    let bytes = body.map_or_else(Bytes::new, |b| Bytes::from(b.to_string()));
    let request = request.body(Full::new(bytes)).context("the API key has characters that no HTTP header can carry")?;
    let waiting = std::io::stderr().is_terminal().then(|| {
        let bar = indicatif::ProgressBar::new_spinner().with_message(format!("{} {path}", server.url));
        bar.enable_steady_tick(std::time::Duration::from_millis(120));
        bar
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, bytes) = runtime.block_on(async {
        let response = http.send(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(|e| anyhow::anyhow!("the server's answer broke off: {e}"))?.to_bytes();
        anyhow::Ok((status, bytes))
    })?;
    if let Some(bar) = waiting {
        bar.finish_and_clear();
    }
    let value: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    if status.is_success() {
        return Ok(value);
    }
    let message = value.pointer("/error/message").and_then(Value::as_str).unwrap_or("no reason given; is it a Strait server?");
    bail!("the server refused with status {}: {}", status.as_u16(), in_flags(message))
}

/// What a server says, with this command's flag in place of the field of the body that it names.
fn in_flags(message: &str) -> String {
    message.replace("set load_inplace", "give --in-place").replace("with load_inplace", "with --in-place")
}

fn pretty(value: &Value) -> String {
    format!("{:#}\n", value)
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or("-")
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn loaded(told: &Value) -> String {
    let mut out = format!(
        "{} is at generation {} ({}, rank {}, {} modules, {}{})\n",
        text(told, "id"),
        text(told, "generation"),
        text(told, "format"),
        told["rank"],
        told["modules"],
        mib(told["bytes"].as_u64().unwrap_or(0)),
        told["replaced"].as_str().map_or_else(String::new, |old| format!(", instead of {old}")),
    );
    for warning in told["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        out += &format!("  note: {warning}\n");
    }
    out
}

fn unloaded(told: &Value) -> String {
    let mut out = format!("{} is gone; {} are free", text(told, "id"), mib(told["freed_bytes"].as_u64().unwrap_or(0)));
    if let Some(n) = told["requests_finishing"].as_u64().filter(|n| *n > 0) {
        out += &format!(", and {} more when {n} requests on it end", mib(told["bytes_when_finished"].as_u64().unwrap_or(0)));
    }
    out + "\n"
}

fn table(told: &Value) -> String {
    let mut rows = vec![["name", "generation", "format", "rank", "memory", "requests", "running", "state"].map(str::to_owned)];
    for a in told["data"].as_array().into_iter().flatten() {
        let resident = a["resident"].as_bool() == Some(true);
        let state = match (resident, a["pinned"].as_bool() == Some(true)) {
            (true, true) => "resident, pinned",
            (true, false) => "resident",
            (false, _) if a["generation"].is_null() => "not read yet",
            (false, _) => "on disk",
        };
        let bytes = a["bytes"].as_u64().filter(|_| resident).map_or_else(|| "-".into(), mib);
        let number = |key: &str| a[key].as_u64().map_or_else(|| "-".into(), |n| n.to_string());
        rows.push([
            text(a, "id").into(),
            text(a, "generation").into(),
            text(a, "format").into(),
            number("rank"),
            bytes,
            number("requests"),
            number("active_leases"),
            state.into(),
        ]);
    }
    let widths: Vec<usize> = (0..8).map(|c| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
        out += cells.join("  ").trim_end();
        out.push('\n');
    }
    let number = |key: &str| told[key].as_u64().unwrap_or(0);
    let retired = told["generations"].as_array().into_iter().flatten().filter(|g| g["retired"].as_bool() == Some(true)).count();
    out += &format!("{} of {} in use", mib(number("resident_bytes")), mib(number("max_bytes")));
    if let Some(most) = told["max_device_bytes"].as_u64() {
        let copies = told["generations"].as_array().into_iter().flatten().filter_map(|g| g["device_bytes"].as_u64());
        out += &format!(", {} of {} on the device", mib(copies.sum()), mib(most));
    }
    if retired > 0 {
        out += &format!(", {retired} earlier generations among them");
    }
    out + "\n"
}

/// The base of an offline look at a folder, and what reads adapters for it.
pub(super) fn base_of(folder: &AdapterFolder) -> anyhow::Result<(&'static Checkpoint, Spectra)> {
    // The weights alone: a tokenizer says nothing of an adapter.
    let checkpoint = match Source::of(folder.model.as_ref()) {
        Source::Demo => demo::checkpoint()?,
        Source::Folder(dir) => Checkpoint::open(&dir)?,
    };
    let checkpoint: &'static Checkpoint = Box::leak(Box::new(checkpoint));
    let dir = folder.cache_dir.clone().or_else(cache_dir);
    Ok((checkpoint, Spectra::new(dir.as_deref(), checkpoint)?))
}

pub(super) fn reader<'a>(folder: &AdapterFolder, base: &'a Checkpoint, spectra: &'a Spectra) -> Reader<'a> {
    Reader { base, spectra, bounds: Bounds { root: None, bytes: u64::MAX >> 1 }, rank: folder.max_lora_rank }
}

fn verify(folder: &AdapterFolder) -> anyhow::Result<String> {
    let (base, spectra) = base_of(folder)?;
    let held = HeldAs::of(&base.weights(LoadDtype::Auto).embed);
    let Ready { generation, facts, .. } = reader(folder, base, &spectra).ready(&folder.path, &folder.base, held)?;
    let Facts { format, rank, modules, bytes, base_name, warnings } = facts;
    let told = json!({
        "path": Path::new(&folder.path).display().to_string(),
        "generation": format!("{:016x}", generation.0),
        "format": format,
        "rank": rank,
        "modules": modules,
        "bytes": bytes,
        "base_model_name_or_path": base_name,
        "warnings": warnings,
    });
    if folder.json {
        return Ok(pretty(&told));
    }
    let mut named = told.clone();
    named["id"] = told["path"].clone();
    Ok(format!("{}it can be served\n", loaded(&named)))
}

fn convert(folder: &AdapterFolder, out: &Path) -> anyhow::Result<String> {
    let (base, spectra) = base_of(folder)?;
    let parsed = reader(folder, base, &spectra).read(&folder.path, &folder.base)?.parsed;
    write::write(&parsed, &base.config, out)?;
    let told =
        json!({"path": out.display().to_string(), "from": parsed.format.name(), "rank": parsed.rank(), "modules": parsed.modules.len()});
    if folder.json {
        return Ok(pretty(&told));
    }
    Ok(format!(
        "{} is a LoRA of rank {} on the original base, made from a {} adapter\n",
        text(&told, "path"),
        told["rank"],
        text(&told, "from")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Args as _;

    use crate::adapters::AdapterError;

    /// What the server says of the field of a body, a command says of its flag, which has another name.
    #[test]
    fn what_a_server_refuses_is_mended_by_the_commands_own_flag() {
        let flag = args::AdapterLoad::augment_args(clap::Command::new("load")).get_arguments().any(|a| a.get_long() == Some("in-place"));
        assert!(flag, "the flag that is named");
        for error in
            [AdapterError::Loaded { alias: "a".into() }, AdapterError::FilesChanged { alias: "a".into(), was: "0123456789abcdef".into() }]
        {
            let (wire, said) = (error.to_string(), in_flags(&error.to_string()));
            assert!(wire.contains("load_inplace") && !wire.contains("--in-place"), "{wire}");
            assert!(said.contains("--in-place") && !said.contains("inplace"), "{said}");
        }
        let named = AdapterError::Unknown { alias: "load_inplace".into() }.to_string();
        assert_eq!(in_flags(&named), named);
    }
}
