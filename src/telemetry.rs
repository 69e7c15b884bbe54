//! Everything an operator can see: one closed list of events, and the one place that turns them into
//! metrics and logs. Events carry plain labels and numbers, so every room may emit them.
//!
//! Two families of names: `strait:` (ours) and `vllm:` (what Kubernetes routers and dashboards of this field already
//! scrape; names, labels and buckets as vLLM declares them). [`METRICS`] is the catalogue: nothing outside it is registered.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, OnceLock, PoisonError};

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A request was refused before the engine; `code` is the stable error code, `full` what had no room for it, if that is why.
    Refused {
        code: &'static str,
        full: Option<Full>,
    },
    /// A sequence was accepted by the engine.
    Accepted {
        prompt_tokens: u32,
        max_new_tokens: u32,
    },
    /// A sequence's first plan row was made after so long in the queue.
    Started {
        queue_s: f64,
        cached_tokens: u32,
        prompt_tokens: u32,
    },
    /// Its first token, since arrival.
    FirstToken {
        ttft_s: f64,
    },
    /// Each later token, since the one before.
    NextToken {
        gap_s: f64,
    },
    /// A sequence ended. `reason`: `stop`, `length`, `abort` or `error`. Where it never started there is no `prefill_s`.
    Finished {
        reason: &'static str,
        e2e_s: f64,
        prefill_s: Option<f64>,
        decode_s: f64,
        prompt_tokens: u32,
        completion_tokens: u32,
        preemptions: u32,
    },
    Preempted,
    /// One forward pass.
    Step {
        seconds: f64,
        tokens: u32,
    },
    /// Prefix cache look-up, in tokens.
    PrefixLookup {
        queried: u32,
        hit: u32,
    },
    /// An HTTP reply was begun. `path` is a route of the router or `unmatched`, `method` a known method or `other`.
    Http {
        path: &'static str,
        method: &'static str,
        status: u16,
    },
    /// A panic was caught at the HTTP edge; only that request ended.
    Panicked,
    /// `accept` failed (file descriptors, memory); accepting pauses briefly.
    AcceptFailed,
    /// A connection was accepted, or it closed.
    Connections {
        open: usize,
    },
    /// The server became ready, or stopped being so.
    Ready {
        ready: bool,
    },
    /// An adapter was read and made resident, or was not.
    AdapterLoaded {
        ok: bool,
        seconds: f64,
    },
    /// An adapter was taken out of memory to make room for another.
    AdapterEvicted,
    /// The drain deadline passed with so many connections still open.
    DrainForced {
        connections: usize,
    },
}

/// What has no room for one more request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Full {
    /// As many requests wait for the engine as may.
    Requests,
    /// Those that wait have as many prompt tokens as may.
    Tokens,
    /// As many requests wait for their text to be worked on as may.
    Texts,
    /// Bodies that are held are as many bytes as may be.
    Bodies,
}

impl Full {
    /// The label value; of the engine's queue as vLLM has them.
    pub fn label(self) -> &'static str {
        match self {
            Full::Requests => "max_num_queued_reqs",
            Full::Tokens => "max_num_queued_tokens",
            Full::Texts => "max_queued_texts",
            Full::Bodies => "max_body_bytes",
        }
    }
}

/// Every one, in the order of the label's documentation.
const FULL: [Full; 4] = [Full::Requests, Full::Tokens, Full::Texts, Full::Bodies];

/// State of the engine after a step: what gauges show and `/v1/capacity` answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    pub running: usize,
    pub waiting: usize,
    pub arena_bytes: u64,
    pub free_bytes: u64,
    /// Bytes of pages that only the prefix cache holds: free on demand.
    pub cached_bytes: u64,
    /// Bytes in use, those that pages in use leave to nobody counted, of so many that pages can have.
    pub used_bytes: u64,
    pub usable_bytes: u64,
    /// Bytes in use by `(profile index, branch)`.
    pub branches: Vec<(u8, Branch, u64)>,
    /// Adapters that lie on a device, by generation, and the bytes of each there.
    pub device_adapters: Vec<(u64, u64)>,
}

/// What there is of adapters: what gauges show.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterSnapshot {
    /// Names clients may use; of these, those whose weights are in memory, and those that stay there.
    pub registered: usize,
    pub resident: usize,
    pub pinned: usize,
    /// Resident generations that no name points to any more.
    pub retired: usize,
    /// Name and bytes of each one in the host's memory, and of each one on a device.
    pub bytes: Vec<(String, u64)>,
    pub device_bytes: Vec<(String, u64)>,
    pub budget_bytes: u64,
    /// `None` where no device serves.
    pub device_budget_bytes: Option<u64>,
    /// How many adapters of the usual size the budget has room for.
    pub room: usize,
    /// Names of the resident ones, and of those being read.
    pub running: Vec<String>,
    pub waiting: Vec<String>,
    /// Unix seconds.
    pub now: u64,
}

/// Parts of the cache, as metrics name them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Branch {
    Window,
    Sinks,
    SealedKeys,
    SealedValues,
    Metadata,
    Workspace,
}

impl Branch {
    /// The label value.
    pub fn label(self) -> &'static str {
        match self {
            Branch::Window => "window",
            Branch::Sinks => "sinks",
            Branch::SealedKeys => "sealed_keys",
            Branch::SealedValues => "sealed_values",
            Branch::Metadata => "metadata",
            Branch::Workspace => "workspace",
        }
    }
}

/// Every branch, in the order of the labels' documentation.
const BRANCHES: [Branch; 6] =
    [Branch::Window, Branch::Sinks, Branch::SealedKeys, Branch::SealedValues, Branch::Metadata, Branch::Workspace];

/// The sort of a metric, as Prometheus names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    /// The word of the `# TYPE` line.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One row of the catalogue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// Variable labels; `vllm:` metrics also carry `model_name` and `engine`.
    pub labels: &'static [&'static str],
    pub help: &'static str,
    buckets: Buckets,
}

/// Upper bounds of a histogram, by what it measures; copied from vLLM so that its dashboards fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Buckets {
    None,
    Ttft,
    Gap,
    Request,
    Tokens,
    Iteration,
    Preemptions,
    Step,
}

impl Buckets {
    fn bounds(self) -> Vec<f64> {
        match self {
            Buckets::None => Vec::new(),
            Buckets::Ttft => vec![
                0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
                2560.0,
            ],
            Buckets::Gap => {
                vec![0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
            }
            Buckets::Request => vec![
                0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
                7680.0,
            ],
            // 1-2-5 up to a million positions: the longest contexts anybody serves.
            Buckets::Tokens => (0..=6).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e))).take_while(|&b| b <= 1e6).collect(),
            Buckets::Iteration => std::iter::once(1.0).chain((3..=14).map(|e| f64::from(1u32 << e))).collect(),
            Buckets::Preemptions => vec![1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0],
            Buckets::Step => vec![0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0],
        }
    }
}

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, labels, help, buckets: Buckets::None }
}
const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, labels, help, buckets: Buckets::None }
}
const fn histogram(name: &'static str, buckets: Buckets, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram, labels: &[], help, buckets }
}

/// Every metric the server exports; the README's table is compared with it.
pub const METRICS: &[Metric] = &[
    counter("http_requests_total", &["path", "method", "status"], "HTTP replies begun, by route (or `unmatched`), method and status."),
    gauge(
        "strait:adapter_budget_bytes",
        &["tier"],
        "Bytes that all adapters together may take in the memory of the host, and of the device.",
    ),
    gauge("strait:adapter_bytes", &["adapter", "tier"], "Bytes of each adapter in memory; one that lost its name goes by its generation."),
    counter("strait:adapter_evictions_total", &[], "Adapters taken out of memory to make room for others."),
    histogram("strait:adapter_load_seconds", Buckets::Step, "Reading an adapter and making it ready."),
    counter("strait:adapter_loads_total", &["outcome"], "Adapters read from disk: `ok` or `error`."),
    gauge(
        "strait:adapters",
        &["state"],
        "Adapters: `registered` names; of these `resident` and `pinned`; `retired` generations still in memory.",
    ),
    gauge("strait:build_info", &["version"], "Always 1; the label carries the version."),
    gauge("strait:connections", &[], "Open client connections."),
    counter("strait:accept_failures_total", &[], "Failed accepts (file descriptors or memory exhausted)."),
    counter("strait:drain_forced_total", &[], "Connections still open when the drain deadline passed."),
    gauge("strait:kv_cache_arena_bytes", &[], "Bytes of the cache arena, fixed at start."),
    gauge(
        "strait:kv_cache_bytes",
        &["branch", "profile"],
        "Bytes of the cache by branch and profile; `free`, `cached` (by the prefix index alone, so free on demand) and `rounding` (left over by slabs) have none. All of them are the arena.",
    ),
    gauge("strait:kv_cache_bytes_per_token", &["profile"], "Bytes one more position costs past the window."),
    gauge("strait:kv_cache_evictable_bytes", &[], "Bytes that only the prefix cache holds: free on demand."),
    gauge("strait:model_bytes", &[], "Bytes of the model's weights as they are held in memory, mapped or not."),
    counter("strait:panics_total", &[], "Panics caught at the HTTP edge; each ended one request."),
    gauge("strait:process_resident_bytes", &[], "Resident memory of the process."),
    gauge("strait:ready", &[], "1 while the model is loaded and the server is not draining."),
    counter("strait:requests_rejected_total", &["code"], "Requests refused, by error code."),
    histogram("strait:step_seconds", Buckets::Step, "Duration of a forward pass."),
    counter(
        "vllm:admission_rejections_total",
        &["reason"],
        "Requests refused for want of room: in the engine's queue (`max_num_queued_reqs`, `max_num_queued_tokens`), in that for work on text (`max_queued_texts`), for bodies (`max_body_bytes`).",
    ),
    gauge(
        "vllm:cache_config_info",
        &["block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"],
        "Always 1; tokens per page, pages of the default profile in the arena, the default profile, prefix caching.",
    ),
    histogram("vllm:e2e_request_latency_seconds", Buckets::Request, "From arrival to the last token."),
    counter("vllm:generation_tokens_total", &[], "Tokens generated."),
    histogram("vllm:inter_token_latency_seconds", Buckets::Gap, "Between neighbouring tokens of a sequence."),
    histogram("vllm:iteration_tokens_total", Buckets::Iteration, "Tokens computed by a forward pass."),
    gauge("vllm:kv_cache_usage_perc", &[], "Share of the cache in use, 0 to 1; what only the prefix cache holds counts as free."),
    gauge(
        "vllm:lora_requests_info",
        &["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        "Unix time of the scrape; how many adapters fit, names of the resident ones, names of those being read.",
    ),
    counter("vllm:num_preemptions_total", &[], "Sequences whose pages were taken back to be computed again later."),
    gauge("vllm:num_requests_running", &[], "Sequences that started and hold pages."),
    gauge("vllm:num_requests_waiting", &[], "Sequences that have not started, or wait for pages again."),
    counter("vllm:prefix_cache_hits_total", &[], "Prompt tokens found in the prefix cache."),
    counter("vllm:prefix_cache_queries_total", &[], "Prompt tokens looked up in the prefix cache."),
    counter("vllm:prompt_tokens_cached_total", &[], "Prompt tokens that were not computed, as they came from the prefix cache."),
    counter("vllm:prompt_tokens_total", &[], "Prompt tokens of sequences that started."),
    histogram("vllm:request_decode_time_seconds", Buckets::Request, "From the first token to the last."),
    histogram("vllm:request_generation_tokens", Buckets::Tokens, "Tokens generated by a sequence."),
    histogram("vllm:request_inference_time_seconds", Buckets::Request, "From the first plan row to the last token."),
    histogram("vllm:request_num_preemptions", Buckets::Preemptions, "How often a sequence was preempted."),
    histogram("vllm:request_params_max_tokens", Buckets::Tokens, "The limit of new tokens of accepted sequences."),
    histogram("vllm:request_prefill_time_seconds", Buckets::Request, "From the first plan row to the first token."),
    histogram("vllm:request_prompt_tokens", Buckets::Tokens, "Prompt tokens of a sequence."),
    histogram("vllm:request_queue_time_seconds", Buckets::Request, "From arrival to the first plan row."),
    counter("vllm:request_success_total", &["finished_reason"], "Sequences that ended: `stop`, `length`, `abort` or `error`."),
    histogram("vllm:request_time_per_output_token_seconds", Buckets::Gap, "Decode time of a sequence per token after the first."),
    histogram("vllm:time_to_first_token_seconds", Buckets::Ttft, "From arrival to the first token."),
];

/// What is known once the model is loaded: fixed labels and sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Name and bytes per token of every profile, in the order of `ProfileIndex`.
    pub profiles: Vec<(String, f64)>,
    pub default_profile: usize,
    /// Tokens in a page.
    pub page_tokens: u32,
    /// Whole pages of the default profile the arena has room for.
    pub pages: u64,
    pub prefix_caching: bool,
    /// Bytes of the weights.
    pub model_bytes: u64,
}

/// The metrics of one server. Cheap to emit into from any thread; share it in an `Arc`.
pub struct Telemetry {
    registry: Registry,
    counters: HashMap<&'static str, IntCounter>,
    counter_vecs: HashMap<&'static str, IntCounterVec>,
    gauges: HashMap<&'static str, IntGauge>,
    usage: Gauge,
    cache_bytes: IntGaugeVec,
    cache_config: IntGaugeVec,
    adapters: IntGaugeVec,
    adapter_bytes: IntGaugeVec,
    adapter_budget: IntGaugeVec,
    lora_info: IntGaugeVec,
    bytes_per_token: GaugeVec,
    histograms: Histograms,
    facts: OnceLock<Facts>,
    /// Held while gauges are set and told.
    scrape: Mutex<()>,
}

struct Histograms {
    ttft: Histogram,
    gap: Histogram,
    per_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt: Histogram,
    generation: Histogram,
    max_tokens: Histogram,
    preemptions: Histogram,
    iteration: Histogram,
    step: Histogram,
    adapter_load: Histogram,
}

/// Registers what it builds, from the catalogue's row of that name.
struct Builder {
    registry: Registry,
    model_name: String,
}

const BUILT: &str = "METRICS is a constant table; `every_metric_registers` builds it";

impl Builder {
    fn row(name: &str) -> &'static Metric {
        METRICS.iter().find(|m| m.name == name).expect(BUILT)
    }

    fn fixed(&self, name: &str) -> HashMap<String, String> {
        if !name.starts_with("vllm:") {
            return HashMap::new();
        }
        HashMap::from([("model_name".to_owned(), self.model_name.clone()), ("engine".to_owned(), "0".to_owned())])
    }

    fn opts(&self, metric: &Metric) -> Opts {
        Opts::new(metric.name, metric.help).const_labels(self.fixed(metric.name))
    }

    fn register<C: Collector + Clone + 'static>(&self, collector: C) -> C {
        self.registry.register(Box::new(collector.clone())).expect(BUILT);
        collector
    }

    fn histogram(&self, name: &str) -> Histogram {
        let metric = Self::row(name);
        let opts = HistogramOpts { common_opts: self.opts(metric), buckets: metric.buckets.bounds() };
        let vec = self.register(HistogramVec::new(opts, &[]).expect(BUILT));
        vec.with_label_values::<&str>(&[])
    }

    fn gauge_vec(&self, name: &str) -> IntGaugeVec {
        let metric = Self::row(name);
        self.register(IntGaugeVec::new(self.opts(metric), metric.labels).expect(BUILT))
    }
}

impl Telemetry {
    /// Metrics of a server whose model goes by `model_name` (the first served name).
    pub fn new(model_name: &str) -> Self {
        let build = Builder { registry: Registry::new(), model_name: model_name.to_owned() };
        let (mut counters, mut counter_vecs, mut gauges) = (HashMap::new(), HashMap::new(), HashMap::new());
        for metric in METRICS {
            match (metric.kind, metric.labels.is_empty()) {
                (Kind::Counter, true) => {
                    counters.insert(metric.name, build.register(IntCounter::with_opts(build.opts(metric)).expect(BUILT)));
                }
                (Kind::Counter, false) => {
                    counter_vecs.insert(metric.name, build.register(IntCounterVec::new(build.opts(metric), metric.labels).expect(BUILT)));
                }
                (Kind::Gauge, true) if metric.name != USAGE => {
                    gauges.insert(metric.name, build.register(IntGauge::with_opts(build.opts(metric)).expect(BUILT)));
                }
                // The labelled gauges, the one fractional gauge and the histograms have fields of their own.
                (Kind::Gauge, _) | (Kind::Histogram, _) => {}
            }
        }
        let usage = build.register(Gauge::with_opts(build.opts(Builder::row(USAGE))).expect(BUILT));
        let per_token = Builder::row("strait:kv_cache_bytes_per_token");
        let bytes_per_token = build.register(GaugeVec::new(build.opts(per_token), per_token.labels).expect(BUILT));
        let version = build.gauge_vec("strait:build_info");
        version.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let finished = &counter_vecs["vllm:request_success_total"];
        for reason in ["stop", "length", "abort", "error"] {
            // Zero from the start, so that a rate is defined from the first scrape on.
            finished.with_label_values(&[reason]);
        }
        for full in FULL {
            counter_vecs["vllm:admission_rejections_total"].with_label_values(&[full.label()]);
        }
        for outcome in ["ok", "error"] {
            counter_vecs["strait:adapter_loads_total"].with_label_values(&[outcome]);
        }
        Telemetry {
            counters,
            counter_vecs,
            gauges,
            usage,
            bytes_per_token,
            cache_bytes: build.gauge_vec("strait:kv_cache_bytes"),
            cache_config: build.gauge_vec("vllm:cache_config_info"),
            adapters: build.gauge_vec("strait:adapters"),
            adapter_bytes: build.gauge_vec("strait:adapter_bytes"),
            adapter_budget: build.gauge_vec("strait:adapter_budget_bytes"),
            lora_info: build.gauge_vec("vllm:lora_requests_info"),
            histograms: Histograms {
                ttft: build.histogram("vllm:time_to_first_token_seconds"),
                gap: build.histogram("vllm:inter_token_latency_seconds"),
                per_token: build.histogram("vllm:request_time_per_output_token_seconds"),
                e2e: build.histogram("vllm:e2e_request_latency_seconds"),
                queue: build.histogram("vllm:request_queue_time_seconds"),
                prefill: build.histogram("vllm:request_prefill_time_seconds"),
                decode: build.histogram("vllm:request_decode_time_seconds"),
                inference: build.histogram("vllm:request_inference_time_seconds"),
                prompt: build.histogram("vllm:request_prompt_tokens"),
                generation: build.histogram("vllm:request_generation_tokens"),
                max_tokens: build.histogram("vllm:request_params_max_tokens"),
                preemptions: build.histogram("vllm:request_num_preemptions"),
                iteration: build.histogram("vllm:iteration_tokens_total"),
                step: build.histogram("strait:step_seconds"),
                adapter_load: build.histogram("strait:adapter_load_seconds"),
            },
            registry: build.registry,
            facts: OnceLock::new(),
            scrape: Mutex::new(()),
        }
    }

    /// Publishes what became known when the model was loaded. Only the first call counts.
    pub fn describe(&self, facts: Facts) {
        let facts = self.facts.get_or_init(|| facts);
        self.gauges["strait:model_bytes"].set(int(facts.model_bytes));
        for (name, bytes) in &facts.profiles {
            self.bytes_per_token.with_label_values(&[name.as_str()]).set(*bytes);
        }
        let profile = facts.profiles.get(facts.default_profile).map_or("", |(name, _)| name.as_str());
        let labels = [facts.page_tokens.to_string(), facts.pages.to_string(), profile.to_owned(), facts.prefix_caching.to_string()];
        self.cache_config.with_label_values(&labels).set(1);
    }

    /// Counts an event. Every label is from a closed set, so the number of series is bounded.
    pub fn emit(&self, event: Event) {
        let h = &self.histograms;
        match event {
            Event::Refused { code, full } => {
                self.counter_vecs["strait:requests_rejected_total"].with_label_values(&[code]).inc();
                if let Some(full) = full {
                    self.counter_vecs["vllm:admission_rejections_total"].with_label_values(&[full.label()]).inc();
                }
            }
            Event::Accepted { prompt_tokens: _, max_new_tokens } => h.max_tokens.observe(f64::from(max_new_tokens)),
            Event::Started { queue_s, cached_tokens, prompt_tokens } => {
                h.queue.observe(queue_s);
                self.count("vllm:prompt_tokens_total", prompt_tokens);
                self.count("vllm:prompt_tokens_cached_total", cached_tokens);
            }
            Event::FirstToken { ttft_s } => {
                h.ttft.observe(ttft_s);
                self.count("vllm:generation_tokens_total", 1);
            }
            Event::NextToken { gap_s } => {
                h.gap.observe(gap_s);
                self.count("vllm:generation_tokens_total", 1);
            }
            Event::Finished { reason, e2e_s, prefill_s, decode_s, prompt_tokens, completion_tokens, preemptions } => {
                self.counter_vecs["vllm:request_success_total"].with_label_values(&[reason]).inc();
                h.e2e.observe(e2e_s);
                if let Some(prefill_s) = prefill_s {
                    h.prefill.observe(prefill_s);
                    h.decode.observe(decode_s);
                    h.inference.observe(prefill_s + decode_s);
                }
                h.prompt.observe(f64::from(prompt_tokens));
                h.generation.observe(f64::from(completion_tokens));
                h.preemptions.observe(f64::from(preemptions));
                if completion_tokens > 1 {
                    h.per_token.observe(decode_s / f64::from(completion_tokens - 1));
                }
            }
            Event::Preempted => self.count("vllm:num_preemptions_total", 1),
            Event::Step { seconds, tokens } => {
                h.step.observe(seconds);
                h.iteration.observe(f64::from(tokens));
            }
            Event::PrefixLookup { queried, hit } => {
                self.count("vllm:prefix_cache_queries_total", queried);
                self.count("vllm:prefix_cache_hits_total", hit);
            }
            Event::Http { path, method, status } => {
                let status = status.to_string();
                self.counter_vecs["http_requests_total"].with_label_values(&[path, method, status.as_str()]).inc();
            }
            Event::Panicked => self.count("strait:panics_total", 1),
            Event::AcceptFailed => self.count("strait:accept_failures_total", 1),
            Event::Connections { open } => self.gauges["strait:connections"].set(int(open as u64)),
            Event::Ready { ready } => self.gauges["strait:ready"].set(i64::from(ready)),
            Event::AdapterLoaded { ok, seconds } => {
                self.counter_vecs["strait:adapter_loads_total"].with_label_values(&[if ok { "ok" } else { "error" }]).inc();
                if ok {
                    h.adapter_load.observe(seconds);
                }
            }
            Event::AdapterEvicted => self.count("strait:adapter_evictions_total", 1),
            Event::DrainForced { connections } => self.counters["strait:drain_forced_total"].inc_by(connections as u64),
        }
    }

    /// As [`Telemetry::render`], with these gauges: of one state of the server, whoever else asks at the same time.
    pub fn scrape(&self, engine: &Snapshot, adapters: &AdapterSnapshot) -> String {
        let _alone = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_snapshot(engine);
        self.set_adapters(adapters);
        self.render()
    }

    /// Sets every gauge of the engine's state.
    fn set_snapshot(&self, snapshot: &Snapshot) {
        self.gauges["vllm:num_requests_running"].set(int(snapshot.running as u64));
        self.gauges["vllm:num_requests_waiting"].set(int(snapshot.waiting as u64));
        self.gauges["strait:kv_cache_arena_bytes"].set(int(snapshot.arena_bytes));
        self.gauges["strait:kv_cache_evictable_bytes"].set(int(snapshot.cached_bytes));
        self.usage.set(snapshot.used_bytes as f64 / snapshot.usable_bytes.max(1) as f64);

        let held: u64 = snapshot.branches.iter().map(|(.., n)| n).sum();
        let (free, cached) = (snapshot.free_bytes, snapshot.cached_bytes);
        let rounding = snapshot.arena_bytes.saturating_sub(free + cached + held);
        for (branch, bytes) in [("free", free), ("cached", cached), ("rounding", rounding)] {
            self.cache_bytes.with_label_values(&[branch, ""]).set(int(bytes));
        }
        let Some(facts) = self.facts.get() else { return };
        let mut bytes: BTreeMap<(usize, Branch), u64> = BTreeMap::new();
        for &(profile, branch, n) in &snapshot.branches {
            *bytes.entry((usize::from(profile), branch)).or_default() += n;
        }
        // Every pair is written each time, so that a branch that emptied reads zero and not its last value.
        for (index, (name, _)) in facts.profiles.iter().enumerate() {
            for branch in BRANCHES {
                let n = bytes.get(&(index, branch)).copied().unwrap_or(0);
                self.cache_bytes.with_label_values(&[branch.label(), name.as_str()]).set(int(n));
            }
        }
    }

    /// Sets every gauge of adapters.
    fn set_adapters(&self, a: &AdapterSnapshot) {
        for (state, n) in [("registered", a.registered), ("resident", a.resident), ("pinned", a.pinned), ("retired", a.retired)] {
            self.adapters.with_label_values(&[state]).set(int(n as u64));
        }
        // What left memory, and what was the value of a label, must not stay from the last scrape.
        self.adapter_bytes.reset();
        for (name, bytes) in &a.bytes {
            self.adapter_bytes.with_label_values(&[name.as_str(), "host"]).set(int(*bytes));
        }
        for (name, bytes) in &a.device_bytes {
            self.adapter_bytes.with_label_values(&[name.as_str(), "device"]).set(int(*bytes));
        }
        self.adapter_budget.with_label_values(&["host"]).set(int(a.budget_bytes));
        if let Some(bytes) = a.device_budget_bytes {
            self.adapter_budget.with_label_values(&["device"]).set(int(bytes));
        }
        self.lora_info.reset();
        let labels = [a.room.to_string(), a.running.join(","), a.waiting.join(",")];
        self.lora_info.with_label_values(&labels).set(int(a.now));
    }

    /// The text exposition format, version 0.0.4.
    pub fn render(&self) -> String {
        if let Some(bytes) = resident_bytes() {
            self.gauges["strait:process_resident_bytes"].set(int(bytes));
        }
        let mut text = String::new();
        // Writing to a string cannot fail; a family without a series would, and `gather` leaves those out.
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }

    fn count(&self, name: &str, n: u32) {
        self.counters[name].inc_by(u64::from(n));
    }
}

const USAGE: &str = "vllm:kv_cache_usage_perc";

fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Resident memory of this process, where the system tells (Linux).
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The catalogue as the rows of a Markdown table: name, type, labels, help.
pub fn metrics_table() -> String {
    let mut table = String::from("| Metric | Type | Labels | Meaning |\n|---|---|---|---|\n");
    for m in METRICS {
        let labels = m.labels.iter().map(|l| format!("`{l}`")).collect::<Vec<_>>().join(", ");
        table.push_str(&format!("| `{}` | {} | {} | {} |\n", m.name, m.kind.word(), labels, m.help));
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;

    fn loaded() -> Telemetry {
        let telemetry = Telemetry::new("demo");
        telemetry.describe(Facts {
            profiles: vec![("full".into(), 1024.0), ("cskv-80".into(), 204.8)],
            default_profile: 1,
            page_tokens: 64,
            pages: 100,
            prefix_caching: true,
            model_bytes: 7,
        });
        telemetry
    }

    fn every_event() -> Vec<Event> {
        vec![
            Event::Refused { code: "server_overloaded", full: Some(Full::Tokens) },
            Event::Refused { code: "invalid_value", full: None },
            Event::Accepted { prompt_tokens: 10, max_new_tokens: 20 },
            Event::Started { queue_s: 0.5, cached_tokens: 4, prompt_tokens: 10 },
            Event::FirstToken { ttft_s: 0.03 },
            Event::NextToken { gap_s: 0.02 },
            Event::Finished {
                reason: "stop",
                e2e_s: 1.0,
                prefill_s: Some(0.25),
                decode_s: 0.5,
                prompt_tokens: 10,
                completion_tokens: 2,
                preemptions: 0,
            },
            Event::Preempted,
            Event::Step { seconds: 0.01, tokens: 9 },
            Event::PrefixLookup { queried: 10, hit: 4 },
            Event::Http { path: "/health", method: "GET", status: 200 },
            Event::Panicked,
            Event::AcceptFailed,
            Event::Connections { open: 3 },
            Event::Ready { ready: true },
            Event::DrainForced { connections: 2 },
            Event::AdapterLoaded { ok: true, seconds: 0.02 },
            Event::AdapterLoaded { ok: false, seconds: 0.02 },
            Event::AdapterEvicted,
        ]
    }

    #[test]
    fn what_is_exported_is_exactly_the_catalogue() {
        let telemetry = loaded();
        every_event().into_iter().for_each(|event| telemetry.emit(event));
        telemetry.set_snapshot(&Snapshot::default());
        telemetry.set_adapters(&AdapterSnapshot { bytes: vec![("a".into(), 5)], ..AdapterSnapshot::default() });
        let text = telemetry.render();
        let exported: BTreeSet<_> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).map(|line| line.split_once(' ').expect("name and type")).collect();
        let catalogue: BTreeSet<_> = METRICS.iter().map(|m| (m.name, m.kind.word())).collect();
        assert_eq!(exported, catalogue);
    }

    #[test]
    fn events_land_in_their_series() {
        let telemetry = loaded();
        every_event().into_iter().for_each(|event| telemetry.emit(event));
        let text = telemetry.render();
        for line in [
            r#"strait:requests_rejected_total{code="server_overloaded"} 1"#,
            r#"vllm:admission_rejections_total{engine="0",model_name="demo",reason="max_num_queued_reqs"} 0"#,
            r#"vllm:admission_rejections_total{engine="0",model_name="demo",reason="max_num_queued_tokens"} 1"#,
            r#"vllm:prompt_tokens_total{engine="0",model_name="demo"} 10"#,
            r#"vllm:prompt_tokens_cached_total{engine="0",model_name="demo"} 4"#,
            r#"vllm:generation_tokens_total{engine="0",model_name="demo"} 2"#,
            r#"vllm:request_success_total{engine="0",finished_reason="stop",model_name="demo"} 1"#,
            r#"vllm:request_success_total{engine="0",finished_reason="abort",model_name="demo"} 0"#,
            r#"vllm:time_to_first_token_seconds_bucket{engine="0",model_name="demo",le="0.02"} 0"#,
            r#"vllm:time_to_first_token_seconds_bucket{engine="0",model_name="demo",le="0.04"} 1"#,
            r#"vllm:request_inference_time_seconds_sum{engine="0",model_name="demo"} 0.75"#,
            r#"vllm:request_time_per_output_token_seconds_sum{engine="0",model_name="demo"} 0.5"#,
            r#"vllm:iteration_tokens_total_bucket{engine="0",model_name="demo",le="8"} 0"#,
            r#"vllm:iteration_tokens_total_bucket{engine="0",model_name="demo",le="16"} 1"#,
            r#"vllm:prefix_cache_hits_total{engine="0",model_name="demo"} 4"#,
            r#"http_requests_total{method="GET",path="/health",status="200"} 1"#,
            r#"strait:drain_forced_total 2"#,
            r#"strait:adapter_loads_total{outcome="ok"} 1"#,
            r#"strait:adapter_loads_total{outcome="error"} 1"#,
            r#"strait:adapter_load_seconds_count 1"#,
            r#"strait:adapter_evictions_total 1"#,
            r#"strait:kv_cache_bytes_per_token{profile="cskv-80"} 204.8"#,
            r#"vllm:cache_config_info{block_size="64",cache_dtype="cskv-80",enable_prefix_caching="true",engine="0",model_name="demo",num_gpu_blocks="100"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_branch_that_emptied_reads_zero() {
        let telemetry = loaded();
        let mut snapshot = Snapshot {
            running: 2,
            waiting: 1,
            arena_bytes: 1000,
            free_bytes: 500,
            cached_bytes: 250,
            used_bytes: 250,
            usable_bytes: 1000,
            branches: vec![(1, Branch::SealedKeys, 128), (1, Branch::SealedKeys, 2), (0, Branch::Window, 64)],
            ..Snapshot::default()
        };
        telemetry.set_snapshot(&snapshot);
        let text = telemetry.render();
        for line in [
            r#"strait:kv_cache_bytes{branch="sealed_keys",profile="cskv-80"} 130"#,
            r#"strait:kv_cache_bytes{branch="window",profile="full"} 64"#,
            r#"strait:kv_cache_bytes{branch="free",profile=""} 500"#,
            r#"strait:kv_cache_bytes{branch="cached",profile=""} 250"#,
            r#"strait:kv_cache_bytes{branch="rounding",profile=""} 56"#,
            r#"vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25"#,
            r#"vllm:num_requests_running{engine="0",model_name="demo"} 2"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        snapshot.branches.clear();
        telemetry.set_snapshot(&snapshot);
        let text = telemetry.render();
        let line = r#"strait:kv_cache_bytes{branch="sealed_keys",profile="cskv-80"} 0"#;
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }

    #[test]
    fn adapters_are_told_as_routers_read_them_and_leave_no_series_behind() {
        let telemetry = loaded();
        let mut adapters = AdapterSnapshot {
            registered: 3,
            resident: 2,
            room: 40,
            bytes: vec![("a".into(), 5), ("b".into(), 6)],
            device_bytes: vec![("a".into(), 7)],
            budget_bytes: 20,
            device_budget_bytes: Some(10),
            running: vec!["a".into(), "b".into()],
            waiting: vec!["c".into()],
            now: 17,
            ..AdapterSnapshot::default()
        };
        telemetry.set_adapters(&adapters);
        adapters.running.pop();
        adapters.bytes.pop();
        telemetry.set_adapters(&adapters);
        let text = telemetry.render();
        let info: Vec<&str> = text.lines().filter(|l| l.starts_with("vllm:lora_requests_info{")).collect();
        let want =
            r#"vllm:lora_requests_info{engine="0",max_lora="40",model_name="demo",running_lora_adapters="a",waiting_lora_adapters="c"} 17"#;
        assert_eq!(info, [want]);
        let bytes: Vec<&str> = text.lines().filter(|l| l.starts_with("strait:adapter_bytes{")).collect();
        assert_eq!(bytes, [r#"strait:adapter_bytes{adapter="a",tier="device"} 7"#, r#"strait:adapter_bytes{adapter="a",tier="host"} 5"#]);
        for line in [r#"strait:adapter_budget_bytes{tier="device"} 10"#, r#"strait:adapter_budget_bytes{tier="host"} 20"#] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.lines().any(|l| l == r#"strait:adapters{state="resident"} 2"#), "{text}");
    }

    /// Two scrapers are usual, and what each reads is to be one state of the server.
    #[test]
    fn scrapes_at_the_same_time_do_not_mix() {
        let telemetry = loaded();
        let states = [("a", 100), ("b", 200), ("c", 300), ("d", 400)].map(|(name, used)| {
            let branches = vec![(0, Branch::Window, used), (1, Branch::SealedKeys, used)];
            let engine = Snapshot { arena_bytes: 1000, free_bytes: 1000 - 2 * used, branches, ..Snapshot::default() };
            (engine, AdapterSnapshot { running: vec![name.into()], bytes: vec![(name.into(), used)], ..AdapterSnapshot::default() })
        });
        std::thread::scope(|scope| {
            for (engine, adapters) in &states {
                let telemetry = &telemetry;
                scope.spawn(move || {
                    for _ in 0..200 {
                        let text = telemetry.scrape(engine, adapters);
                        let of = |name: &str| -> Vec<&str> { text.lines().filter(|l| l.starts_with(name)).collect() };
                        let bytes = of("strait:kv_cache_bytes{");
                        let sum: u64 = bytes.iter().map(|l| l.rsplit(' ').next().expect("a value").parse::<u64>().expect("a number")).sum();
                        assert_eq!(sum, 1000, "{bytes:?}");
                        let name = &adapters.running[0];
                        let named = [of("vllm:lora_requests_info{"), of("strait:adapter_bytes{")];
                        assert!(
                            named.iter().all(|lines| lines.len() == 1 && lines[0].contains(&format!("\"{name}\""))),
                            "{name}: {named:?}"
                        );
                    }
                });
            }
        });
    }

    #[test]
    fn what_never_started_was_not_computed_for() {
        let telemetry = loaded();
        let (reason, prompt_tokens) = ("abort", 10);
        let never =
            Event::Finished { reason, e2e_s: 9.0, prefill_s: None, decode_s: 0.0, prompt_tokens, completion_tokens: 0, preemptions: 0 };
        telemetry.emit(never);
        let text = telemetry.render();
        for (name, n) in
            [("e2e_request_latency", 1), ("request_prefill_time", 0), ("request_decode_time", 0), ("request_inference_time", 0)]
        {
            let line = format!(r#"vllm:{name}_seconds_count{{engine="0",model_name="demo"}} {n}"#);
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn emitting_is_cheap_enough_for_every_token() {
        // A bound so loose that only something like a lock convoy or an allocation storm breaks it.
        let telemetry = loaded();
        let start = std::time::Instant::now();
        for _ in 0..10_000 {
            telemetry.emit(Event::NextToken { gap_s: 0.02 });
        }
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
}
