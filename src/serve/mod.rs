//! The composition root: builds every room from the settings, starts the engine thread, serves, drains.

pub mod adapters;
pub mod codec;
pub mod eval;
pub mod inspect;
mod memory;
pub mod offline;
pub mod ready;
pub mod train;

use std::future::Future;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::adapters::registry::{self, Registry};
use crate::admission;
use crate::config::ConfigError;
use crate::config::Settings;
use crate::config::args::{DeviceArg, LogFormat, ServeFlags};
use crate::config::profiles::BUDGETED;
use crate::demo;
use crate::engine::thread::{Broken, EngineThread, Host, Parts, Runner, start};
use crate::ids::{PAGE_TOKENS, PageAddr, ProfileIndex};
use crate::kv::Arena;
use crate::kv::layout::{Cskv, PageLayout, Profile, Size};
use crate::model::cuda::{self, CudaDecoder};
use crate::model::decoder::{Decoder, ReadyProfile};
use crate::model::delta::HeldAs;
use crate::ops::Ops;
use crate::ops::cpu::Cpu;
use crate::ops::cuda::Device;
use crate::ops::cuda::cublaslt::Found;
use crate::ops::cuda::maps::Unserved;
use crate::scheduler::{self, Fit, ProfileSizes};
use crate::serve::codec::ModelCodec;
use crate::serve::ready::{Bases, Computed, Opened, Source};
use crate::server::listen::Drained;
use crate::server::{self, Keys, Loaded, Origins, Pages, Server};
use crate::telemetry::{Facts, Telemetry};

const PAGES: Pages = Pages { chat: include_str!("../server/web/chat.html"), dashboard: include_str!("../server/web/dashboard.html") };

/// `strait serve`: serves `model`, or the demo model, until SIGTERM or SIGINT.
///
/// # Errors
/// One sentence for what kept it from serving.
pub fn serve(model: Option<&PathBuf>, flags: &ServeFlags) -> anyhow::Result<()> {
    let settings = Settings::resolve(flags)?;
    log_to_stderr(settings.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("http").enable_all().build()?;
    to_the_end(runtime, run(Source::of(model), settings))
}

/// Runs `work` to its end. What still runs on threads that may block, a model being loaded or an adapter being read, is left behind:
/// nothing can interrupt it, and a runtime that is dropped waits for it, when no signal is heard any more.
fn to_the_end<T>(runtime: Runtime, work: impl Future<Output = T>) -> T {
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}

fn log_to_stderr(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("STRAIT_LOG").unwrap_or_else(|_| "info".into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    // A second server in one process (tests) keeps the first one's log.
    let _ = match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

async fn run(source: Source, settings: Settings) -> anyhow::Result<()> {
    // The port first: a second server on it must not load a model to find that out.
    let address = SocketAddr::new(settings.host, settings.port);
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; is another server running there? choose another with --port (0 takes a free one) or --host")
    })?;
    let address = listener.local_addr()?;
    if settings.api_keys.is_empty() && !address.ip().is_loopback() {
        tracing::warn!("listening on {address} without an API key: whoever reaches it can use it; see --api-key-file");
    }

    if settings.api_keys.is_empty() && settings.allowed_origins.iter().any(|origin| origin == "*") {
        tracing::warn!("any web page that a browser shows may use the server, without a key: see --api-key-file, or name origins");
    }

    let is_demo = matches!(source, Source::Demo);
    let telemetry_name = match (&source, settings.served_model_names.first()) {
        (_, Some(name)) => name.clone(),
        (Source::Demo, None) => demo::NAME.to_owned(),
        (Source::Folder(dir), None) => ready::folder_name(dir),
    };
    let telemetry = Arc::new(Telemetry::new(&telemetry_name));
    let mut config = server::Config::new(PAGES);
    config.api_keys = Keys::new(&settings.api_keys);
    config.admin_keys = Keys::new(&settings.admin_api_key);
    config.origins = Origins::new(&settings.allowed_origins);
    config.seed = settings.seed;
    config.text_queue = text_queue(&settings);
    let server = Server::new(config, telemetry.clone());
    let drain_timeout = settings.shutdown_timeout;
    let serving = tokio::spawn(server::serve(listener, server.clone(), shutdown_signal(), drain_timeout));

    // Loading blocks for long; meanwhile the edge answers 503 and a signal ends the process.
    let loading = {
        let (server, telemetry) = (server.clone(), telemetry.clone());
        tokio::task::spawn_blocking(move || load(source, &settings, &telemetry).and_then(|ready| install(&server, ready)))
    };
    let (summary, engine) = tokio::select! {
        loaded = loading => loaded.context("loading the model failed")??,
        () = server.reached(server::Phase::Draining) => bail!("stopped while the model was being loaded"),
    };
    let mut out = std::io::stdout();
    // Nobody may be reading; that is no reason not to serve.
    let _ = write!(out, "{}", banner(&address, is_demo, &summary)).and_then(|()| out.flush());

    both_ended(&server, serving, move || engine.join()).await
}

/// How many requests may wait for work on their text: all that the engine may take, so that none of these is refused on the way there.
/// Their bodies have a limit of their own.
fn text_queue(settings: &Settings) -> usize {
    settings.max_num_seqs.saturating_add(settings.max_queued_requests).min(1 << 20)
}

/// Waits for the accept loop and for the engine's thread, whichever ends first.
async fn both_ended(
    server: &Server,
    mut serving: JoinHandle<Drained>,
    join: impl FnOnce() -> std::thread::Result<Result<(), Broken>> + Send + 'static,
) -> anyhow::Result<()> {
    let mut engine = tokio::task::spawn_blocking(join);
    let drained = tokio::select! {
        drained = &mut serving => match drained {
            Ok(drained) => drained,
            // It panicked, and with it went whoever hears signals and tells the engine to end.
            Err(failed) => {
                server.stop();
                let _ = tokio::time::timeout(server.config.limits.stop_grace, engine).await;
                return Err(failed).context("the accept loop failed");
            }
        },
        ended = &mut engine => {
            // Its clients have been told. Where it was not asked to end, that has a moment to reach them.
            let stopping = server.phase() >= server::Phase::Draining;
            server.stop();
            if !stopping {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            ended_well(ended?)?;
            ensure!(stopping, "the engine ended unasked");
            let drained = serving.await.context("the accept loop failed")?;
            tracing::info!(forced = drained.forced, "stopped");
            return Ok(());
        }
    };
    // All clients have been told by now. A step that lasts longer than readiness lets one last ends with the process.
    let limit = server.config.heartbeat_limit;
    match tokio::time::timeout(limit, engine).await {
        Ok(ended) => ended_well(ended?)?,
        Err(_) => bail!("a step of the engine did not end within {} s of the last request; ended without it", limit.as_secs()),
    }
    tracing::info!(forced = drained.forced, "stopped");
    Ok(())
}

/// What became of the engine's thread, as an error where it did not end as asked.
fn ended_well(ended: std::thread::Result<Result<(), Broken>>) -> anyhow::Result<()> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(broken)) => bail!("the engine stopped: {broken}; see the log above"),
        Err(_) => bail!("the engine thread panicked; see the log above"),
    }
}

/// SIGTERM or SIGINT.
async fn shutdown_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        // Without handlers the signals end the process by themselves.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining; a second one ends at once"),
    }
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => (), _ = interrupt.recv() => () }
        std::process::exit(130);
    });
}

/// A model with its engine, not yet started.
struct Ready {
    opened: Opened,
    parts: Parts,
    names: Vec<String>,
    context: u32,
    default_profile: usize,
    bases: Bases,
    backend: String,
    load_seconds: f64,
    weight_bytes: u64,
    profile_specs: Vec<Profile>,
    prefix_caching: bool,
    adapters: Registry,
}

/// What the banner tells.
struct Summary {
    name: String,
    root: String,
    context: u32,
    backend: String,
    bases: Bases,
    load_seconds: f64,
    weight_bytes: u64,
    arena_bytes: u64,
    /// Name, bytes per token, tokens of one context that fit; and whether it is the default.
    profiles: Vec<(String, f64, u64, bool)>,
    adapters: Option<registry::State>,
}

/// Has whatever computes beside [`Cpu`], which has threads of its own, do so on as many: conversions of weights, decompositions, what
/// budgets are spread by.
fn work_on(threads: usize) {
    // A second one in a process (tests) keeps the threads of the first.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("work-{i}")).build_global();
}

fn load(source: Source, settings: &Settings, telemetry: &Arc<Telemetry>) -> anyhow::Result<Ready> {
    let begun = Instant::now();
    work_on(settings.threads);
    let opened = source.open()?;
    let checkpoint = opened.checkpoint;
    let model = &checkpoint.config;
    let context = settings.max_model_len.unwrap_or(model.max_positions as u32);
    if context as usize > model.max_positions {
        bail!("--max-model-len is {context}, and the model was made for {} positions; lower it", model.max_positions);
    }
    checkpoint.check_context(context as usize)?;
    let ops: Box<dyn Ops> = Box::new(Cpu::new(settings.threads));
    let weights = ready::weights(&opened, settings.dtype);
    let exact = ready::exact_type(checkpoint, settings.dtype);
    let weight_bytes = weights.bytes();
    let mut decoder = Decoder::new(model, weights, context as usize, settings.max_num_batched_tokens as usize);
    let device = device(settings.device, settings.own_kernels)?;
    if let Some(device) = &device {
        // Before bases are computed, which takes long.
        cuda::check_model(model, decoder.weights())?;
        if settings.own_kernels {
            match device.open_library()? {
                found @ Found::Refused(_) => tracing::warn!("{found}"),
                found => tracing::info!("{found}"),
            }
        }
        let trials = cuda::try_kernels(device, model, decoder.weights(), settings.max_num_batched_tokens as usize)
            .context("the device failed in a trial of kernels; --device-kernels common serves without what is tried")?;
        for trial in &trials {
            if trial.holds() {
                tracing::info!("{trial}");
            } else {
                tracing::warn!("{trial}");
            }
        }
    }
    let (mut profile_specs, mut profiles, bases) = ready::profiles(&opened, &mut decoder, &*ops, exact, settings)?;
    if let Some(device) = &device {
        for at in (0..profiles.len()).rev() {
            if let Err(why) = cuda::check_profile(&profiles[at], model, device) {
                left_out(&profile_specs[at].name, &settings.default_profile, &why)?;
                profile_specs.remove(at);
                profiles.remove(at);
            }
        }
    }
    for (spec, ready) in profile_specs.iter().zip(&profiles).filter(|(spec, _)| !settings.defined.contains(&spec.name)) {
        if let Some(warning) = beyond_its_name(spec, ready.layout.bytes_per_token(), profiles[0].layout.bytes_per_token()) {
            tracing::warn!("{warning}");
        }
    }
    let default_profile = profile_specs.iter().position(|p| p.name == settings.default_profile).ok_or_else(|| {
        ConfigError::UnknownProfile { name: settings.default_profile.clone(), known: crate::config::names(&profile_specs) }
    })?;
    if let Some(Computed { profiles, tokens, seconds }) = &bases.computed {
        tracing::info!(
            "no compression artifact has {profiles}: computed closed-form bases from {tokens} tokens of built-in text in {seconds:.1} s (`strait compress` writes one)"
        );
    }

    let sizes: Vec<ProfileSizes> = profiles.iter().map(|p| ProfileSizes::of(&p.layout)).collect();
    let placed = match device {
        None => Placed::Host(profiles),
        Some(device) => {
            let (weights, rope) = (decoder.weights(), decoder.rope());
            let step = (settings.max_num_batched_tokens as usize, settings.adapters.any());
            let on = CudaDecoder::without_cache(device.clone(), model, weights, rope, profiles, step)
                .context("weights, maps of cache profiles and what a step computes with must fit the device")?;
            Placed::Device(device, Box::new(on))
        }
    };
    // Of a device: what is left beside weights, maps and the memory of a step, but for what grows, and some for the driver.
    let device_free = match &placed {
        Placed::Device(device, _) => Some((device.memory()?.0 as u64).saturating_sub(CudaDecoder::further_bytes()) / 20 * 19),
        Placed::Host(_) => None,
    };
    let device_adapters = device_free.map(|free| adapters::device_bytes(&settings.adapters, free));
    if device_free.is_none() && settings.adapters.device_memory_bytes.is_some() {
        tracing::warn!("--lora-device-memory-bytes has no effect: the CPU serves");
    }
    // A device has the weights in memory of its own.
    let free = memory::available(if device_free.is_some() { 0 } else { decoder.weights().mapped_bytes() });
    let mut config = scheduler::Config {
        max_num_seqs: settings.max_num_seqs,
        max_num_batched_tokens: settings.max_num_batched_tokens,
        max_queued_requests: settings.max_queued_requests,
        // So that a queue of the longest prompts is not hours long; one prompt may always wait.
        max_queued_tokens: 8 * u64::from(context),
        layers: model.layers as u32,
        // A prompt that fills the context may still be scored; its one unheard token is never computed.
        max_model_len: context + 1,
        arena_bytes: 0,
        profiles: sizes,
        prefix_caching: settings.prefix_caching,
        hash_secret: secret(),
        model_digest: opened.fingerprint.0,
    };
    let arena_bytes = match (settings.kv_cache_memory_bytes, device_free) {
        (Some(bytes), _) => bytes,
        (None, None) => {
            let free = free.context("cannot read how much memory is free; give --kv-cache-memory-bytes")?;
            default_arena(free / 2, &config)
        }
        (None, Some(free)) => {
            // Copies of adapters are a little larger than what they are counted as: tables, and tensors that are aligned.
            let taken = device_adapters.map_or(0, |bytes| bytes + bytes / 16);
            default_arena(free.saturating_sub(taken), &config)
        }
    };
    check_arena(arena_bytes)?;
    config.arena_bytes = arena_bytes;
    // The least that is worth serving: one prompt of a page and a page of answer.
    let least = (2 * PAGE_TOKENS).min(context);
    if let Err((need, have)) = Fit::new(&config).check(ProfileIndex(default_profile as u8), least.div_ceil(2), least / 2) {
        bail!(
            "the cache of {have} usable bytes cannot hold one request of {least} tokens, which takes {need}; raise --kv-cache-memory-bytes or choose a smaller --cache-profile"
        );
    }
    let names = if settings.served_model_names.is_empty() { vec![opened.name.clone()] } else { settings.served_model_names.clone() };
    let held = HeldAs::of(&decoder.weights().embed);
    let adapters = adapters::registry(checkpoint, held, (&settings.adapters, free, device_adapters), (&names, telemetry))?;
    let runner = match placed {
        Placed::Host(profiles) => {
            let arena = Arena::new(arena_bytes)
                .with_context(|| format!("cannot reserve {arena_bytes} bytes for the cache; lower --kv-cache-memory-bytes"))?;
            Runner::Host(Box::new(Host { decoder, arena, profiles, ops }))
        }
        Placed::Device(device, mut on) => {
            let for_adapters = device_adapters.unwrap_or(0);
            on.give(arena_bytes, for_adapters)?;
            let left = device.memory()?.0 as u64;
            if left < for_adapters {
                bail!(
                    "adapters may take {for_adapters} bytes on the device and {left} are left there beside weights and cache; lower --lora-device-memory-bytes or --kv-cache-memory-bytes"
                );
            }
            Runner::Cuda(on)
        }
    };
    let backend = match &runner {
        Runner::Host(host) => host.ops.describe(),
        Runner::Cuda(decoder) => decoder.describe(),
    };
    let telemetry = telemetry.clone();
    let emit = Box::new(move |event| telemetry.emit(event));
    Ok(Ready {
        parts: Parts { runner, scheduler: config, emit },
        names,
        context,
        default_profile,
        bases,
        backend,
        load_seconds: begun.elapsed().as_secs_f64(),
        weight_bytes,
        profile_specs,
        prefix_caching: settings.prefix_caching,
        adapters,
        opened,
    })
}

/// Where a model and its profiles are.
enum Placed {
    Host(Vec<ReadyProfile>),
    Device(Arc<Device>, Box<CudaDecoder>),
}

/// Bytes that pages can address.
const ARENA_MOST: u64 = u32::MAX as u64 * PageAddr::UNIT;

/// What to say where a profile of an artifact takes more bytes of a position than its name says: its budget is of an exact cache of
/// another type.
fn beyond_its_name(spec: &Profile, bytes: f64, exact: f64) -> Option<String> {
    let budgeted = matches!(spec.cskv, Some(Cskv { size: Size::Budget(_), .. }));
    let (name, share, _) = BUDGETED.into_iter().find(|(name, ..)| budgeted && *name == spec.name)?;
    (bytes > share * exact).then(|| {
        format!(
            "cache profile {name} takes {bytes} bytes per token, more than {share} of the {exact} of an exact cache: its artifact was made for weights of another type; make it anew with `strait compress --dtype`"
        )
    })
}

/// Whether pages can address so large an arena.
///
/// # Errors
/// One sentence that names both sizes.
fn check_arena(bytes: u64) -> anyhow::Result<()> {
    ensure!(bytes <= ARENA_MOST, "{}; lower --kv-cache-memory-bytes", scheduler::ConfigError::Arena(bytes));
    Ok(())
}

/// The memory that is free, but no more than the longest sequences of a full house could use, in whole slabs.
fn default_arena(free: u64, config: &scheduler::Config) -> u64 {
    let (fit, profiles) = (Fit::new(config), config.profiles.len());
    let longest = (0..profiles).map(|i| fit.need(ProfileIndex(i as u8), config.max_model_len)).max().unwrap_or(0);
    let house = longest.saturating_mul(config.max_num_seqs as u64);
    let largest = config.profiles.iter().flat_map(|s| [s.sizes.exact, s.sizes.workspace]).max().unwrap_or(0);
    free.min(house).min(ARENA_MOST).max(8 * largest)
}

/// The device that was asked for; `None` for the host.
///
/// # Errors
/// Where a device was named and cannot be had.
fn device(asked: DeviceArg, own_kernels: bool) -> anyhow::Result<Option<Arc<Device>>> {
    let open = |n| if own_kernels { Device::open(n) } else { Device::open_common(n) };
    match asked {
        DeviceArg::Cpu => Ok(None),
        DeviceArg::Cuda(n) => Ok(Some(open(n as usize)?)),
        DeviceArg::Auto => match open(0) {
            Ok(device) => Ok(Some(device)),
            Err(why) => {
                tracing::info!("serving on the CPU: {why}");
                Ok(None)
            }
        },
    }
}

/// Says that a device does not serve a profile.
///
/// # Errors
/// Where it is the default.
fn left_out(name: &str, default: &str, why: &Unserved) -> anyhow::Result<()> {
    if name == default {
        bail!("cache profile {name}: {why}; choose another with --cache-profile, or use --device cpu");
    }
    tracing::warn!("leaving out cache profile {name}: {why}");
    Ok(())
}

/// Random bytes that outsiders cannot guess: keys of the prefix index.
fn secret() -> [u8; 32] {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = blake3::Hasher::new();
    for _ in 0..4 {
        // Each is keyed by the operating system's randomness.
        hasher.update(&std::hash::RandomState::new().build_hasher().finish().to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Starts the engine and puts the model behind the edge.
fn install(server: &Server, ready: Ready) -> anyhow::Result<(Summary, EngineThread)> {
    let Ready { opened, parts, names, context, default_profile, bases, backend, load_seconds, weight_bytes, profile_specs, .. } = ready;
    let Ready { prefix_caching, adapters, .. } = ready;
    let config = parts.scheduler.clone();
    let layouts: Vec<PageLayout> = parts.runner.profiles().iter().map(|p: &ReadyProfile| p.layout.clone()).collect();
    let (engine, thread) = start(parts)?;
    let fit = Mutex::new(Fit::new(&config));
    let longest = |i: usize| Fit::new(&config).longest(ProfileIndex(i as u8), u32::MAX / 2);
    let summary = Summary {
        name: names[0].clone(),
        root: opened.root.clone(),
        context,
        backend,
        bases,
        load_seconds,
        weight_bytes,
        arena_bytes: config.arena_bytes,
        profiles: (0..layouts.len())
            .map(|i| (profile_specs[i].name.clone(), layouts[i].bytes_per_token(), u64::from(longest(i)), i == default_profile))
            .collect(),
        adapters: Some(adapters.state()).filter(|a| !a.aliases.is_empty()),
    };
    server.telemetry.describe(Facts {
        profiles: summary.profiles.iter().map(|p| (p.0.clone(), p.1)).collect(),
        default_profile,
        page_tokens: PAGE_TOKENS,
        pages: {
            let sizes = layouts[default_profile].sizes();
            config.arena_bytes / if sizes.sealed > 0 { sizes.sealed } else { sizes.exact }
        },
        prefix_caching,
        model_bytes: weight_bytes,
    });
    let generation = &opened.checkpoint.generation;
    let s = &generation.sampling;
    server.install(Loaded {
        model: admission::Model {
            names,
            root: opened.root.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            context,
            codec: Arc::new(ModelCodec::new(opened.tokenizer, opened.checkpoint.config.vocab)),
            profiles: profile_specs
                .into_iter()
                .zip(&layouts)
                .map(|(profile, layout)| admission::ServedProfile { profile, bytes_per_token: layout.bytes_per_token() })
                .collect(),
            default_profile: ProfileIndex(default_profile as u8),
            defaults: admission::Defaults {
                temperature: f64::from(s.temperature),
                top_p: f64::from(s.top_p),
                top_k: s.top_k,
                min_p: f64::from(s.min_p),
                repetition_penalty: f64::from(s.repetition_penalty),
                max_new_tokens: generation.max_new_tokens,
                eos: generation.eos.clone(),
            },
            // A client that waits longer has given up in all but name.
            queue_timeout: Duration::from_secs(600),
            adapters: Some(Arc::new(adapters.clone())),
        },
        adapters,
        engine,
        need: Arc::new(move |profile, positions| fit.lock().expect("arithmetic does not panic").need(profile, positions)),
    });
    Ok((summary, thread))
}

fn banner(address: &SocketAddr, is_demo: bool, s: &Summary) -> String {
    use std::fmt::Write as _;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut out = String::new();
    let url = format!("http://{address}");
    let mut line = |text: String| writeln!(out, "{text}").expect("writing to a string");
    line(format!("Strait {} serves {} on {url}", env!("CARGO_PKG_VERSION"), s.name));
    line(format!(
        "  model    {} ({:.1} MiB of weights, context {}), ready in {:.1} s",
        s.root,
        mib(s.weight_bytes),
        s.context,
        s.load_seconds
    ));
    line(format!("  backend  {}", s.backend));
    if s.bases != Bases::default() {
        line(format!("  bases    {}", s.bases));
    }
    line(format!("  cache    {:.1} MiB", mib(s.arena_bytes)));
    for (name, bytes, tokens, is_default) in &s.profiles {
        let full = s.profiles[0].1;
        let mark = if *is_default { " (default)" } else { "" };
        line(format!(
            "    {name:<10} {bytes:>10.1} bytes per token, {:>5.1}x smaller, one context of up to {tokens} tokens{mark}",
            full / bytes
        ));
    }
    if let Some(a) = &s.adapters {
        let few: Vec<&str> = a.aliases.iter().take(4).map(|a| a.alias.as_str()).collect();
        let more = if a.aliases.len() > few.len() { format!(" and {} more", a.aliases.len() - few.len()) } else { String::new() };
        let device = a.device_budget_bytes.map_or_else(String::new, |bytes| format!(", up to {:.1} MiB on the device", mib(bytes)));
        let (held, most) = (mib(a.resident_bytes), mib(a.budget_bytes));
        line(format!("  adapters {}{more} ({held:.1} of {most:.1} MiB in memory{device})", few.join(", ")));
    }
    line(format!("  chat     {url}/        dashboard {url}/dashboard        metrics {url}/metrics"));
    line("Try:".into());
    let ask = if is_demo { "What is the capital of France?" } else { "Hello!" };
    line(format!(
        "  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{\"model\": \"{}\", \"messages\": [{{\"role\": \"user\", \"content\": \"{ask}\"}}]}}'",
        s.name
    ));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::layout::{ExactType, PageSizes};

    /// However much memory a machine has, pages can address their arena.
    #[test]
    fn the_default_arena_is_no_larger_than_its_addresses() {
        let model = &demo::checkpoint().expect("it is built in").config;
        let full = PageLayout::new(model, ExactType::Bf16, &Profile { name: "full".into(), cskv: None }, None);
        let house = |seqs| default_arena(1 << 42, &config(vec![ProfileSizes::of(&full)], 1 << 30, seqs));
        assert_eq!(house(1 << 20), ARENA_MOST);
        assert!(house(1) <= ARENA_MOST && ARENA_MOST / PageAddr::UNIT <= u64::from(u32::MAX));
    }

    fn config(profiles: Vec<ProfileSizes>, context: u32, max_num_seqs: usize) -> scheduler::Config {
        scheduler::Config {
            max_num_seqs,
            max_num_batched_tokens: 512,
            max_queued_requests: 1,
            max_queued_tokens: 1,
            layers: 2,
            max_model_len: context + 1,
            arena_bytes: 0,
            profiles,
            prefix_caching: false,
            hash_secret: [0; 32],
            model_digest: [0; 32],
        }
    }

    /// Where a page of another kind is larger than an exact one, slabs are not full of those.
    #[test]
    fn a_default_arena_holds_a_longest_sequence_of_every_profile() {
        let sealed = PageSizes { exact: 32768, sealed: 8192, sinks: 8192, workspace: 49152 };
        let compressed = ProfileSizes { sizes: sealed, window: 64, sinks: 4, compressed: true, ..ProfileSizes::default() };
        let exact = ProfileSizes { sizes: PageSizes { exact: 32768, ..PageSizes::default() }, ..ProfileSizes::default() };
        for seqs in [1, 3] {
            let config = config(vec![exact, compressed], 4096, seqs);
            let fit = Fit::new(&scheduler::Config { arena_bytes: default_arena(1 << 40, &config), ..config });
            for profile in [0, 1] {
                assert_eq!(fit.check(ProfileIndex(profile), 4096, 1), Ok(()), "profile {profile}, {seqs} sequences");
            }
        }
        assert_eq!(default_arena(1 << 20, &config(vec![exact], 4096, 1)), 1 << 20, "no more than is free");
    }

    fn runtime() -> Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
    }

    #[test]
    fn what_the_engine_may_take_is_not_refused_on_the_way_there() {
        let flags = |queued| ServeFlags { max_queued_requests: queued, ..ServeFlags::default() };
        for queued in [None, Some(1), Some(1000), Some(usize::MAX)] {
            let settings = Settings::resolve(&flags(queued)).expect("settings");
            let server = Server::new(
                server::Config { text_queue: text_queue(&settings), ..server::Config::new(PAGES) },
                Arc::new(Telemetry::new("demo")),
            );
            let most = settings.max_queued_requests.min(2000) + settings.max_num_seqs;
            assert!(server.config.text_queue >= most, "{} places for {most}", server.config.text_queue);
        }
    }

    #[test]
    fn nothing_that_blocks_holds_the_end_back() {
        let begun = Instant::now();
        let (running, runs) = std::sync::mpsc::channel();
        let done = to_the_end(runtime(), async move {
            tokio::task::spawn_blocking(move || {
                running.send(()).expect("somebody waits");
                std::thread::sleep(Duration::from_secs(10));
            });
            runs.recv().expect("it runs");
            7
        });
        assert_eq!(done, 7);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    }

    #[test]
    fn a_step_that_hangs_ends_with_the_process() {
        let mut config = server::Config::new(PAGES);
        config.heartbeat_limit = Duration::from_millis(200);
        let server = Server::new(config, Arc::new(Telemetry::new("demo")));
        let begun = Instant::now();
        let (_never, ends) = std::sync::mpsc::channel::<()>();
        let done = to_the_end(runtime(), async {
            let hangs = move || {
                let _ = ends.recv_timeout(Duration::from_secs(10));
                Ok(Ok(()))
            };
            both_ended(&server, tokio::spawn(async { Drained { forced: 0 } }), hangs).await
        });
        assert!(format!("{:#}", done.expect_err("it hangs")).contains("did not end"));
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    }

    #[test]
    fn a_failed_accept_loop_ends_the_engine_and_the_wait_for_it() {
        for hears in [true, false] {
            let mut config = server::Config::new(PAGES);
            config.limits.stop_grace = Duration::from_millis(200);
            let server = Server::new(config, Arc::new(Telemetry::new("demo")));
            let begun = Instant::now();
            let (end, ends) = std::sync::mpsc::channel::<()>();
            let done = to_the_end(runtime(), async {
                let stopped = server.reached(server::Phase::Stopping);
                tokio::spawn(async move {
                    stopped.await;
                    if hears {
                        drop(end);
                    } else {
                        std::future::pending::<()>().await;
                    }
                });
                let engine = move || {
                    let _ = ends.recv_timeout(Duration::from_secs(10));
                    Ok(Ok(()))
                };
                both_ended(&server, tokio::spawn(async { panic!("an accept loop that panics") }), engine).await
            });
            assert!(format!("{:#}", done.expect_err("it failed")).starts_with("the accept loop failed"));
            assert_eq!(server.phase(), server::Phase::Stopping);
            assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        }
    }
}
