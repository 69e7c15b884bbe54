//! Adapters over HTTP, as vLLM's clients and the Kubernetes sidecar call them; bad input, and what it leaves behind.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use strait::adapters::base::Spectra;
use strait::adapters::registry::{Limits, Registry};
use strait::model::checkpoint::Checkpoint;
use strait::model::delta::HeldAs;

use super::*;
use crate::adapters::folder;

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";
const ROLLBACK: &str = "/v1/rollback_lora_adapter";
const LIST: &str = "/v1/lora_adapters";

/// A folder of its own for one test, with copies of golden adapters.
pub(crate) struct Root(pub(crate) PathBuf);

impl Root {
    pub(crate) fn new(test: &str, adapters: &[&str]) -> Root {
        let root = std::env::temp_dir().join(format!("strait-adapters-{}-{test}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).expect("a folder");
        let root = Root(root.canonicalize().expect("it is there"));
        adapters.iter().for_each(|name| root.put(name, name));
        root
    }

    /// Copies a golden adapter to a name below the root, over what is there.
    pub(crate) fn put(&self, golden: &str, name: &str) {
        let to = self.0.join(name);
        std::fs::create_dir_all(&to).expect("a folder");
        for entry in std::fs::read_dir(folder(golden)).expect("a golden adapter").map(|e| e.expect("an entry").path()) {
            if entry.is_file() {
                std::fs::copy(&entry, to.join(entry.file_name().expect("a file"))).expect("a copy");
            }
        }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn limits(root: Option<&Path>, bytes: u64) -> Limits {
    Limits {
        bytes,
        device_bytes: None,
        rank: 64,
        root: root.map(Path::to_owned),
        discover: false,
        reserved: vec!["demo".into(), "org/demo".into()],
    }
}

pub(crate) fn registry(base: &str, limits: Limits) -> Registry {
    let checkpoint = Box::leak(Box::new(Checkpoint::open(&crate::golden::folder(base)).expect("a golden model")));
    registry_of(checkpoint, HeldAs::F32, limits)
}

pub(crate) fn registry_of(checkpoint: &'static Checkpoint, held: HeldAs, limits: Limits) -> Registry {
    Registry::new((checkpoint, held), Spectra::new(None, checkpoint).unwrap(), limits, Box::new(|_| ()))
}

/// A registry without adapters.
pub(crate) fn none() -> Registry {
    static NONE: OnceLock<Registry> = OnceLock::new();
    NONE.get_or_init(|| registry("llama-linear", limits(None, 1 << 20))).clone()
}

/// An app that serves adapters of `llama-linear`; its engine says `ok` to everything.
fn serving(registry: &Registry) -> App {
    let server = Server::new(Config { admin_keys: Keys::new(["root"]), ..config() }, Arc::new(Telemetry::new("demo")));
    let fake = Fake::new(vec![]);
    let profiles = model().profiles.iter().map(|p| (p.profile.name.clone(), p.bytes_per_token)).collect();
    server.telemetry.describe(Facts { profiles, default_profile: 1, page_tokens: 64, pages: 10, prefix_caching: true, model_bytes: 1 });
    let model = Model { adapters: Some(Arc::new(registry.clone())), ..model() };
    let need = Arc::new(|_, tokens: u32| u64::from(tokens));
    let engine = EngineHandle::new(fake.clone());
    server.install(Loaded { model, engine, need, adapters: registry.clone() });
    App { router: server.router(), server, fake }
}

async fn call(app: &App, path: &str, body: &Value, json: bool) -> Answer {
    let request = Request::post(path).header("host", "localhost").header("content-type", "application/json");
    let request = request.header("authorization", "Bearer root").header("accept", if json { "application/json" } else { "*/*" });
    app.send(request.body(Body::from(body.to_string())).expect("a request")).await
}

async fn chat(app: &App, model: &str) -> Answer {
    app.post(CHAT, &with(hello(), &json!({"model": model}))).await
}

#[tokio::test]
async fn an_adapter_is_named_alone_or_behind_a_name_of_its_model() {
    let root = Root::new("names", &["all-linear"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let app = serving(&registry);
    assert_eq!(call(&app, LOAD, &json!({"lora_name": "tuned", "lora_path": "all-linear"}), false).await.verdict(), "200");
    for name in ["tuned", "demo:tuned", "org/demo:tuned"] {
        let answer = chat(&app, name).await;
        assert_eq!((answer.verdict().as_str(), &answer.json()["model"]), ("200", &json!(name)));
        assert_eq!(app.get(&format!("/v1/models/{name}")).await.json()["id"], "tuned");
    }
    assert!(app.fake.seen().requests.iter().all(|r| r.adapter.0 != 0));
    for name in ["demo:", "demo:other", "demo:demo", "tuned:tuned", ":tuned"] {
        assert_eq!(chat(&app, name).await.verdict(), "404 model_not_found model", "{name}");
    }
}

#[tokio::test]
async fn an_adapter_is_loaded_served_replaced_rolled_back_and_unloaded() {
    let root = Root::new("life", &["all-linear", "pissa", "olora"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let app = serving(&registry);
    assert_eq!(chat(&app, "tuned").await.verdict(), "404 model_not_found model");

    // The sidecar's call, with a field of its own, and vLLM's answer.
    let sidecar = json!({"lora_name": "tuned", "lora_path": "all-linear", "base_model_name": "demo"});
    let answer = call(&app, LOAD, &sidecar, false).await;
    assert_eq!((answer.verdict().as_str(), answer.text.as_str()), ("200", "Success: LoRA adapter 'tuned' added successfully."));
    assert_eq!(call(&app, LOAD, &sidecar, false).await.verdict(), "400 adapter_already_loaded -");

    // It is listed with its parent, and served under its name with its own generation.
    let models = app.get("/v1/models").await.json();
    let card = models["data"].as_array().expect("a list").iter().find(|m| m["id"] == "tuned").expect("the adapter");
    assert_eq!((&card["parent"], &card["root"]), (&json!("demo"), &json!("all-linear")));
    assert_eq!(app.get("/v1/models/tuned").await.json()["parent"], "demo");
    let answer = chat(&app, "tuned").await;
    assert_eq!((answer.verdict().as_str(), &answer.json()["model"]), ("200", &json!("tuned")));
    assert_eq!(chat(&app, "demo").await.verdict(), "200");
    let generations: Vec<u64> = app.fake.seen().requests.iter().map(|r| r.adapter.0).collect();
    let first = app.get(LIST).await.json()["data"][0]["generation"].as_str().expect("a generation").to_owned();
    assert_eq!(generations, [u64::from_str_radix(&first, 16).expect("hexadecimal"), 0]);

    // Replaced in place; told in JSON to who asks for it.
    let other = json!({"lora_name": "tuned", "lora_path": "pissa", "load_inplace": true, "expected_generation": first});
    let told = call(&app, LOAD, &other, true).await.json();
    assert_eq!((&told["replaced"], &told["format"], &told["rank"]), (&json!(first), &json!("PiSSA"), &json!(8)));
    let second = told["generation"].as_str().expect("a generation").to_owned();
    // The same compare-and-swap again: somebody was quicker.
    assert_eq!(call(&app, LOAD, &other, true).await.verdict(), "409 adapter_changed -");

    // Back, and back again.
    let back = json!({"lora_name": "tuned"});
    for want in [&first, &second, &first] {
        assert_eq!(call(&app, ROLLBACK, &back, true).await.json()["generation"], json!(want));
    }
    assert_eq!(
        call(&app, ROLLBACK, &json!({"lora_name": "tuned", "generation": "00000000000000aa"}), true).await.verdict(),
        "409 adapter_no_history -"
    );

    // Metrics, as a router reads them.
    let text = app.get("/metrics").await.text;
    let info: Vec<&str> = text.lines().filter(|l| l.starts_with("vllm:lora_requests_info{")).collect();
    assert!(info.len() == 1 && info[0].contains(r#"running_lora_adapters="tuned",waiting_lora_adapters="""#), "{info:?}");

    // Gone, with every byte.
    let held: u64 = registry.state().resident_bytes;
    let told = call(&app, UNLOAD, &json!({"lora_name": "tuned", "lora_int_id": 1}), true).await.json();
    assert_eq!((told["freed_bytes"].as_u64(), told["requests_finishing"].as_u64()), (Some(held), Some(0)));
    assert!(held > 0 && registry.state().resident_bytes == 0);
    assert_eq!(chat(&app, "tuned").await.verdict(), "404 model_not_found model");
    let answer = call(&app, UNLOAD, &json!({"lora_name": "tuned"}), false).await;
    assert_eq!(answer.verdict(), "404 adapter_not_found -");
    registry.check().expect("the books are right");
}

/// Whoever wore it hears of it, and whoever did not is not told of one.
#[tokio::test]
async fn numbers_that_are_not_finite_are_told_with_the_adapter_of_the_request() {
    let root = Root::new("diverged", &["all-linear"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let app = serving(&registry);
    assert_eq!(call(&app, LOAD, &json!({"lora_name": "tuned", "lora_path": "all-linear"}), false).await.verdict(), "200");
    for (model, named) in [("tuned", true), ("demo", false)] {
        for stream in [false, true] {
            app.fake.seen().plays.push_back(Ok(vec![Tell(Event::Failed { failure: Failure::Numerical })]));
            let answer = app.post(CHAT, &with(hello(), &json!({"model": model, "stream": stream}))).await;
            assert!(answer.text.contains("numbers that are not finite") && answer.text.contains("numerical_error"), "{}", answer.text);
            assert_eq!(answer.text.contains(r#"under the adapter \"tuned\""#), named, "{}", answer.text);
        }
    }
}

#[tokio::test]
async fn an_adapter_in_use_is_finished_on_and_then_freed() {
    let root = Root::new("use", &["all-linear", "olora"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let app = serving(&registry);
    app.fake.seen().plays.push_back(Ok(vec![Hang]));
    assert_eq!(call(&app, LOAD, &json!({"lora_name": "a", "lora_path": "all-linear"}), false).await.verdict(), "200");
    let router = app.router.clone();
    let body = with(hello(), &json!({"model": "a"})).to_string();
    let request = Request::post(CHAT).header("host", "localhost").header("content-type", "application/json");
    let running = tokio::spawn(router.oneshot(request.body(Body::from(body)).expect("a request")));
    let begun = Instant::now();
    while registry.state().aliases[0].leases == 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "a lease was never taken");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let bytes = registry.state().resident_bytes;
    let told = call(&app, UNLOAD, &json!({"lora_name": "a"}), true).await.json();
    assert_eq!(told["freed_bytes"], 0);
    assert_eq!((told["requests_finishing"].as_u64(), told["bytes_when_finished"].as_u64()), (Some(1), Some(bytes)));
    let state = registry.state();
    assert!(state.generations[0].retired && state.generations[0].leases == 1 && state.aliases.is_empty());
    // The name is free for another while the old one finishes.
    assert_eq!(call(&app, LOAD, &json!({"lora_name": "a", "lora_path": "olora"}), false).await.verdict(), "200");
    running.abort();
    let begun = Instant::now();
    while registry.state().generations.iter().any(|g| g.retired) {
        assert!(begun.elapsed() < Duration::from_secs(10), "a lease was never given back");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    registry.check().expect("the books are right");
}

#[tokio::test]
async fn bad_calls_are_refused_and_nothing_is_left_of_them() {
    let root = Root::new("bad", &["all-linear", "lora-kv", "trainable-tokens", "pissa-residual"]);
    let outside = Root::new("bad-outside", &["olora"]);
    let at = |path: &str| root.0.join(path);
    let put = |name: &str, file: &str, bytes: &[u8]| {
        root.put("all-linear", name);
        std::fs::write(at(name).join(file), bytes).expect("a file");
    };
    let weights = std::fs::read(at("all-linear/adapter_model.safetensors")).expect("weights");
    put("truncated", "adapter_model.safetensors", &weights[..weights.len() / 2]);
    put("no-header", "adapter_model.safetensors", b"\x04");
    let mut huge = weights.clone();
    huge[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    put("long-header", "adapter_model.safetensors", &huge);
    let mut nan = weights.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    put("nan", "adapter_model.safetensors", &nan);
    put("no-json", "adapter_config.json", b"{");
    put("loha", "adapter_config.json", br#"{"peft_type":"LOHA"}"#);
    put("pickled", "adapter_model.bin", b"");
    std::fs::remove_file(at("pickled/adapter_model.safetensors")).expect("it is there");
    std::fs::create_dir_all(at("empty")).expect("a folder");
    std::os::unix::fs::symlink(outside.0.join("olora"), at("link")).expect("a link");
    root.put("all-linear", "inner-link");
    std::fs::remove_file(at("inner-link/adapter_model.safetensors")).expect("it is there");
    let target = outside.0.join("olora/adapter_model.safetensors");
    std::os::unix::fs::symlink(&target, at("inner-link/adapter_model.safetensors")).expect("a link");

    let registry = registry("llama-linear", Limits { rank: 1, ..limits(Some(&root.0), 4 << 20) });
    let app = serving(&registry);
    let absolute = outside.0.join("olora").display().to_string();
    let beside = format!("../{}/olora", outside.0.file_name().expect("a name").to_string_lossy());
    let inside = at("empty").display().to_string();
    for (path, verdict) in [
        ("nowhere", "404 adapter_not_found -"),
        ("empty", "404 adapter_not_found -"),
        (inside.as_str(), "404 adapter_not_found -"),
        (absolute.as_str(), "403 adapter_outside_root -"),
        (beside.as_str(), "403 adapter_outside_root -"),
        ("/etc", "403 adapter_outside_root -"),
        ("../nowhere", "403 adapter_outside_root -"),
        ("link", "403 adapter_outside_root -"),
        ("inner-link", "403 adapter_outside_root -"),
        ("truncated", "400 adapter_invalid -"),
        ("no-header", "400 adapter_invalid -"),
        ("long-header", "400 adapter_invalid -"),
        ("nan", "400 adapter_invalid -"),
        ("no-json", "400 adapter_invalid -"),
        ("loha", "400 adapter_not_served -"),
        ("pickled", "400 adapter_not_served -"),
        ("trainable-tokens", "400 adapter_not_served -"),
        // Of another base: its modules are there, in other shapes.
        ("lora-kv", "400 adapter_invalid -"),
        ("all-linear", "400 adapter_rank -"),
    ] {
        let answer = call(&app, LOAD, &json!({"lora_name": "x", "lora_path": path}), false).await;
        assert_eq!(answer.verdict(), verdict, "{path}: {}", answer.text);
    }
    for (body, verdict) in [
        (json!({"lora_path": "all-linear"}), "400 invalid_value lora_name"),
        (json!({"lora_name": "", "lora_path": "all-linear"}), "400 invalid_value lora_name"),
        (json!({"lora_name": "x"}), "400 invalid_value lora_path"),
        (json!({"lora_name": "x", "lora_path": 5}), "400 invalid_type lora_path"),
        (json!({"lora_name": "demo", "lora_path": "all-linear"}), "400 adapter_name -"),
        (json!({"lora_name": "a,b", "lora_path": "all-linear"}), "400 adapter_name -"),
        (json!({"lora_name": "x", "lora_path": "all-linear", "base": "other"}), "400 invalid_value base"),
        (json!({"lora_name": "x", "lora_path": "all-linear", "expected_generation": "7"}), "400 invalid_value expected_generation"),
    ] {
        assert_eq!(call(&app, LOAD, &body, false).await.verdict(), verdict, "{body}");
    }
    // Without the admin key, from elsewhere than this machine.
    assert_eq!(app.post(LOAD, &json!({"lora_name": "x", "lora_path": "all-linear"})).await.verdict(), "403 not_allowed -");
    let state = registry.state();
    assert!(state.aliases.is_empty() && state.generations.is_empty() && state.resident_bytes == 0, "{state:?}");
    registry.check().expect("the books are right");
    assert_eq!(chat(&app, "demo").await.verdict(), "200");
}

#[tokio::test]
async fn without_a_root_nothing_is_loaded_at_run_time() {
    let registry = registry("llama-linear", limits(None, 4 << 20));
    let answer = call(&serving(&registry), LOAD, &json!({"lora_name": "x", "lora_path": "/tmp"}), false).await;
    assert_eq!(answer.verdict(), "403 adapter_outside_root -");
    assert!(answer.text.contains("--lora-root"), "{}", answer.text);
}

#[tokio::test]
async fn adapters_of_the_root_are_found_by_name_and_read_when_first_asked_for() {
    let root = Root::new("discover", &["all-linear", "olora"]);
    let registry = registry("llama-linear", Limits { discover: true, ..limits(Some(&root.0), 64 << 20) });
    assert_eq!(registry.discover().expect("a folder"), (2, vec![]));
    let app = serving(&registry);
    let list = app.get(LIST).await.json();
    assert!(list["data"][0]["generation"].is_null() && list["resident_bytes"] == 0);
    assert_eq!(chat(&app, "olora").await.verdict(), "200");
    // One that came later is found, too; what is no adapter's name is not.
    root.put("pissa", "late");
    assert_eq!(chat(&app, "late").await.verdict(), "200");
    for name in ["nope", "../olora", ".", "olora/"] {
        assert_eq!(chat(&app, name).await.verdict(), "404 model_not_found model", "{name}");
    }
    // What cannot be served says why, and hurts nobody.
    root.put("trainable-tokens", "odd");
    assert_eq!(chat(&app, "odd").await.verdict(), "400 adapter_not_served -");
    assert_eq!(chat(&app, "olora").await.verdict(), "200");
    registry.check().expect("the books are right");
}
