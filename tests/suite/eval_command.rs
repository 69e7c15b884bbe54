//! Whom `strait eval` asks: a server that plays a script, over HTTP; and the command itself, in process and against a server in
//! a process of its own.

use std::collections::HashSet;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use strait::eval::ask::{AskError, Client};
use strait::eval::http::Http;
use strait::eval::run::{answers, cell, sheet};
use strait::eval::tasks::{Material, Task};
use strait::model::weights::LoadDtype;

use crate::eval::{PLAIN, Scratch};

// ---------------------------------------------------------------- a server that plays a script

/// What a scripted server was asked.
type Log = Arc<Mutex<Vec<Value>>>;

/// Answers chats by looking the asked name up; under the profile `small`, only where the prompt's last digit is even. The
/// first chat of all is told to come again.
async fn scripted(tokenizes: bool) -> (String, Log) {
    let log: Log = Arc::default();
    let models = json!({ "data": [{ "id": "it", "max_model_len": 2000, "cache_profiles": [{ "name": "small" }, { "name": "full" }] }] });
    let bare = json!({ "data": [{ "id": "other" }, { "id": "it" }] });
    let chats = Arc::new(AtomicUsize::new(0));
    let (seen, served) = (log.clone(), log.clone());
    let chat = async move |Json(body): Json<Value>| -> Response {
        served.lock().unwrap().push(body.clone());
        let text = body["messages"][0]["content"].as_str().unwrap_or_default().to_owned();
        let n = text.len().div_ceil(3);
        if body["stream"] != true {
            return Json(json!({ "usage": { "prompt_tokens": n } })).into_response();
        }
        if chats.fetch_add(1, Ordering::Relaxed) == 0 {
            return (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "0")], "later").into_response();
        }
        let asked = text.rsplit_once(' ').unwrap().1.trim_end_matches('?');
        let line = text.lines().find(|l| l.contains(&format!("key {asked}:"))).unwrap().to_owned();
        let knows = body["cache_profile"] != "small" || line.ends_with(['0', '2', '4', '6', '8']);
        let (head, tail) = if knows { line.split_at(6) } else { ("I do", " not know") };
        let say = |s: &str| format!("data: {}\r\n\r\n", json!({ "choices": [{ "delta": { "content": s } }] }));
        let usage = json!({ "choices": [], "usage": { "prompt_tokens": n, "completion_tokens": 9, "kv_cache": { "bytes": 10 * n }, "timings": { "predicted_ms": 40.0 } } });
        let events = format!(": hello\n\n{}{}data: {usage}\n\ndata: [DONE]\n\n", say(head), say(tail));
        ([("content-type", "text/event-stream")], events).into_response()
    };
    let tokenize = async move |Json(body): Json<Value>| -> Response {
        seen.lock().unwrap().push(body.clone());
        Json(json!({ "count": body["messages"][0]["content"].as_str().unwrap().len().div_ceil(3) })).into_response()
    };
    let mut app = axum::Router::new().route("/base/v1/chat/completions", post(chat));
    app = app.route("/base/v1/models", get(async move || Json(if tokenizes { models } else { bare })));
    if tokenizes {
        app = app.route("/base/tokenize", post(tokenize));
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    (format!("http://{address}/base/v1/"), log)
}

async fn client(url: &str, model: Option<&str>) -> Result<Client, AskError> {
    Client::open(Box::new(Http::new(url)?), Some("secret".into()), model.map(Into::into), Duration::from_secs(20)).await
}

#[tokio::test]
async fn questions_go_over_http_and_come_back_scored() {
    let (url, log) = scripted(true).await;
    let client = client(&url, None).await.unwrap();
    assert_eq!((client.model.as_str(), client.context, client.profiles.len()), ("it", Some(2000), 2));
    let sheet = sheet(&client, Task::Kv, 1000, 8, 3, Material::default()).await.unwrap();
    let full = answers(&client, &sheet, Some("full"), 3, || ()).await.unwrap();
    let small = answers(&client, &sheet, Some("small"), 3, || ()).await.unwrap();
    assert_eq!(full.scores, [1.0; 8]);
    let right = sheet.questions.iter().filter(|q| q.references[0].ends_with(['0', '2', '4', '6', '8'])).count();
    assert!(right > 0 && right < 8, "the seed must give both kinds");
    let cell = cell(&sheet, Some("small"), &small, Some(&full)).unwrap();
    assert_eq!((cell.n, cell.accuracy.mean, cell.lost, cell.won), (8, right as f64 / 8.0, Some(8 - right), Some(0)));
    assert!((850.0..=1000.0).contains(&cell.prompt_tokens.unwrap()));
    assert_eq!(cell.cache_bytes_per_prompt_token, Some(10.0));
    assert_eq!(cell.decode_tokens_per_second, Some(200.0), "by the server's clock");
    let log = log.lock().unwrap();
    let chats: Vec<&Value> = log.iter().filter(|b| b["stream"] == true).collect();
    // Eight each, and the one that had to come again.
    assert_eq!(chats.len(), 17);
    assert!(chats.iter().all(|b| b["temperature"] == 0 && b["max_tokens"] == 50 && b["model"] == "it"));
    assert!(chats.iter().all(|b| b["repetition_penalty"] == 1), "greedy, whatever the model's files say");
    let salts: HashSet<&str> = chats.iter().map(|b| b["cache_salt"].as_str().unwrap()).collect();
    assert_eq!(salts.len(), 8, "no prompt shares its beginning in the server's prefix cache with another");
    assert!(salts.iter().all(|s| (1..=64).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_alphanumeric())));
}

#[tokio::test]
async fn a_server_with_nothing_but_the_api_is_asked_too() {
    let (url, log) = scripted(false).await;
    let client = client(&url, Some("it")).await.unwrap();
    assert_eq!(client.choose(&[]).unwrap(), [None]);
    assert!(matches!(client.choose(&["full".into()]), Err(AskError::UnknownProfile { .. })));
    let sheet = sheet(&client, Task::Kv, 600, 2, 0, Material::default()).await.unwrap();
    let marked = answers(&client, &sheet, None, 1, || ()).await.unwrap();
    assert_eq!(marked.scores, [1.0; 2]);
    // Nothing a foreign server need not know.
    let log = log.lock().unwrap().clone();
    assert!(log.iter().all(|b| b.get("cache_profile").is_none() && b.get("cache_salt").is_none() && b["model"] == "it"));
    assert!(log.iter().all(|b| b.get("repetition_penalty").is_none()));
    assert!(matches!(client.tokenize("a", true).await, Err(AskError::NoTokenize)));
}

#[tokio::test]
async fn a_server_that_misbehaves_is_told_apart() {
    for (status, body, want) in [
        (400, r#"{"error": {"message": "too\nlong"}}"#, "refused /v1/models with status 400: too long"),
        (500, "", "refused /v1/models with status 500: it gives no reason"),
        (200, "<html>", "is not what the OpenAI API says"),
        (200, r#"{"data": []}"#, "it lists no model"),
    ] {
        let app = axum::Router::new().fallback(async move || (StatusCode::from_u16(status).unwrap(), body));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let error = client(&url, None).await.err().unwrap().to_string();
        assert!(error.contains(want), "{error}");
    }
    let (url, _) = scripted(true).await;
    let error = client(&url, Some("them")).await.err().unwrap().to_string();
    assert_eq!(error, "the server serves no model \"them\", but it; choose one with --model-name");
    for (events, want) in [
        ("data: {\"choices\": [{\"delta\": {\"content\": \"a\"}}]}\n\n", "ended without [DONE]"),
        ("data: nonsense\n\n", "is not JSON"),
        ("data: {\"error\": {\"message\": \"draining\"}}\n\n", "gave up on /v1/chat/completions: draining"),
    ] {
        let app =
            axum::Router::new().route("/v1/models", get(async || Json(json!({ "data": [{ "id": "it" }] })))).fallback(async move || events);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let question = Task::Kv.question(0, 2, PLAIN).unwrap();
        let error = client(&url, None).await.unwrap().ask(&question, None, "x").await.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

/// A server that serves two profiles, and fails under one of them; the questions it was asked are counted.
async fn half_broken() -> (String, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let models = json!({ "data": [{ "id": "it", "cache_profiles": [{ "name": "full" }, { "name": "small" }] }] });
    let chat = async move |Json(body): Json<Value>| -> Response {
        counted.fetch_add(1, Ordering::Relaxed);
        if body["cache_profile"] == "small" {
            return (StatusCode::INTERNAL_SERVER_ERROR, r#"{"error": {"message": "no such luck"}}"#).into_response();
        }
        "data: {\"choices\": [{\"delta\": {\"content\": \"7\"}}]}\n\ndata: [DONE]\n\n".into_response()
    };
    let tokenize = async || Json(json!({ "count": 100 }));
    let app = axum::Router::new().route("/v1/models", get(async move || Json(models))).route("/v1/chat/completions", post(chat));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app.route("/tokenize", post(tokenize))).await });
    (url, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_is_asked_no_more_and_what_it_said_before_is_told() {
    let (url, asked) = half_broken().await;
    let client = client(&url, None).await.unwrap();
    let questions = sheet(&client, Task::Kv, 100, 20, 0, Material::default()).await.unwrap();
    let failed = answers(&client, &questions, Some("small"), 2, || ()).await.unwrap_err().to_string();
    assert_eq!(failed, "the server refused /v1/chat/completions with status 500: no such luck");
    assert!(asked.swap(0, Ordering::Relaxed) <= 4, "two at once, and those that followed the first before it was heard of");

    // Memory is taken by questions that there are, and not by those that are asked for.
    let none = sheet(&client, Task::Kv, 3, usize::MAX, 0, Material::default()).await.unwrap_err().to_string();
    assert_eq!(none, "the shortest prompt of kv has 100 tokens, and 3 are wanted; raise --lengths");

    let file = Scratch::new("until", b"");
    let kept = file.0.to_str().unwrap().to_owned();
    let ask = move || strait(&["eval", "kv", "--url", &url, "--lengths", "100", "--n", "3", "--answers", &kept]);
    let out = tokio::task::spawn_blocking(ask).await.unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && out.stdout.is_empty(), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    let [.., until, origin, header, full, failed] = lines[..] else { panic!("{said}") };
    assert!(until == "measured until it failed:" && origin.starts_with("it (http") && header.starts_with("task"), "{said}");
    assert!(full.starts_with("kv    full") && failed.starts_with("strait: the server refused "), "{said}");
    assert_eq!(std::fs::read_to_string(&file.0).unwrap().lines().count(), 3, "of what was answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn perplexities_of_before_a_server_failed_are_told() {
    let models = json!({ "data": [{ "id": "it" }] });
    let tokenize = async |Json(body): Json<Value>| Json(json!({ "tokens": body["prompt"].as_str().unwrap().as_bytes() }));
    let score = async |Json(body): Json<Value>| -> Response {
        let n = body["prompt"].as_array().unwrap().len();
        if n > 300 {
            return (StatusCode::INTERNAL_SERVER_ERROR, r#"{"error": {"message": "no such luck"}}"#).into_response();
        }
        let scores: Vec<Value> = std::iter::once(Value::Null).chain((0..n).map(|_| json!(-1.0))).collect();
        Json(json!({ "choices": [{ "logprobs": { "token_logprobs": scores } }] })).into_response()
    };
    let app = axum::Router::new().route("/v1/models", get(async move || Json(models))).route("/v1/completions", post(score));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app.route("/tokenize", post(tokenize))).await });
    let text = Scratch::new("scored", "The river bends twice before the mill. ".repeat(40).as_bytes());
    let ask = move || strait(&["eval", "ppl", "--url", &url, "--text", text.0.to_str().unwrap(), "--lengths", "200,400", "--n", "2"]);
    let out = tokio::task::spawn_blocking(ask).await.unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && out.stdout.is_empty(), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    let ["measured until it failed:", origin, header, row, failed] = lines[..] else { panic!("{said}") };
    assert!(origin.starts_with("it (http") && header.starts_with("profile"), "{said}");
    let row: Vec<&str> = row.split_whitespace().take(6).collect();
    assert_eq!(row, ["-", "200", "100", "2", "198", "2.7183"]);
    assert_eq!(failed, "strait: the server refused /v1/completions with status 500: no such luck");
}

#[test]
fn urls_are_read_strictly() {
    for good in ["http://localhost:8000", "http://localhost:8000/", "http://10.0.0.1/v1", "http://[::1]:80/proxy/v1/"] {
        assert!(Http::new(good).is_ok(), "{good}");
    }
    for (bad, want) in [
        ("https://localhost", "TLS is not built in"),
        ("localhost:8000", "does not begin with http://"),
        ("/v1", "does not begin with http://"),
        ("http://me:secret@host", "holds a user name"),
        ("http://host/?a", "has a query"),
        ("http:// host", "not a URL"),
    ] {
        let error = Http::new(bad).unwrap_err().to_string();
        assert!(error.contains(want) && error.ends_with("write it as http://host:port"), "{error}");
    }
}

// ---------------------------------------------------------------- the command

fn strait(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strait"));
    command.args(args).env_remove("STRAIT_API_KEY").output().unwrap()
}

fn measured(args: &[&str]) -> Value {
    let out = strait(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// A server in a process of its own.
struct Served {
    child: std::process::Child,
    url: String,
}

impl Served {
    fn start(flags: &[&str]) -> Served {
        Served::within(&[], flags)
    }

    /// In an environment that says so much more.
    fn within(environment: &[(&str, &str)], flags: &[&str]) -> Served {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strait"));
        command.args(["serve", "--port", "0"]).args(flags).envs(environment.iter().copied());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().rsplit_once(' ').unwrap().1.to_owned();
        assert!(url.starts_with("http://127.0.0.1:"), "{line}");
        Served { child, url }
    }
}

impl Served {
    /// The line of a metric.
    fn metric(&self, name: &str) -> String {
        let mut stream = std::net::TcpStream::connect(self.url.strip_prefix("http://").unwrap()).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        let text = std::io::read_to_string(stream).unwrap();
        text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Also what is not the forward pass: on a machine that others share, `--threads` is a promise.
#[cfg(target_os = "linux")]
#[test]
fn a_server_computes_on_as_many_threads_as_it_was_given() {
    let served = Served::start(&["--threads", "3"]);
    let tasks = std::fs::read_dir(format!("/proc/{}/task", served.child.id())).unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    assert_eq!(names.filter(|name| name.starts_with("work-")).count(), 3);
}

#[test]
fn a_flag_wins_over_an_environment_that_says_the_contrary_by_another_name() {
    for (variable, flag, caching) in [
        ("STRAIT_ENABLE_PREFIX_CACHING", "--no-enable-prefix-caching", false),
        ("STRAIT_NO_ENABLE_PREFIX_CACHING", "--enable-prefix-caching", true),
    ] {
        let served = Served::within(&[(variable, "true")], &[flag]);
        let told = served.metric("vllm:cache_config_info");
        assert!(told.contains(&format!("enable_prefix_caching=\"{caching}\"")), "{variable} {flag}: {told}");
    }
    // Where neither was typed later than the other there is nothing to go by.
    let out = strait(&["serve", "--enable-prefix-caching", "--no-enable-prefix-caching"]);
    assert_eq!((out.status.code(), String::from_utf8(out.stderr).unwrap().contains("cannot be used together")), (Some(2), true));
}

/// Not those of its files: what is stored in bf16 takes twice as much in f32.
#[test]
fn a_server_tells_the_bytes_that_its_weights_take() {
    let checkpoint = strait::demo::checkpoint().unwrap();
    for (dtype, load) in [("auto", LoadDtype::Auto), ("float32", LoadDtype::F32)] {
        let told = Served::start(&["--dtype", dtype]).metric("strait:model_bytes");
        assert_eq!(told, format!("strait:model_bytes {}", checkpoint.weights(load).bytes()));
    }
}

#[test]
fn a_model_says_the_same_in_process_and_over_http() {
    let served = Served::start(&[]);
    let lines = ["eval", "lines", "--lengths", "512", "--n", "3", "--profiles", "cskv-95,full", "--json"];
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo_prompts.jsonl");
    let ppl = ["eval", "ppl", "--text", text.to_str().unwrap(), "--lengths", "500", "--n", "2", "--json"];
    let over = |args: &[&str]| measured(&[args, &["--url", &served.url]].concat());
    let (inside, outside) = (measured(&lines), over(&lines));
    let cells = |v: &Value| -> Vec<Value> {
        let mut cells = v["cells"].as_array().unwrap().clone();
        // Only how fast it was may differ.
        cells.iter_mut().for_each(|c| c["decode_tokens_per_second"] = Value::Null);
        cells
    };
    assert_eq!(cells(&inside), cells(&outside));
    let [full, small] = &cells(&inside)[..] else { panic!("{inside}") };
    assert_eq!((&full["profile"], &small["profile"]), (&json!("full"), &json!("cskv-95")));
    assert!(full["accuracy"]["mean"].as_f64().unwrap() > 0.6, "the demo model finds lines: {full}");
    assert!(full["cache_bytes"].as_f64() > small["cache_bytes"].as_f64());
    assert_eq!((&full["lost"], &small["n"]), (&Value::Null, &json!(3)));

    let (inside, outside) = (measured(&ppl), over(&ppl));
    let row = |v: &Value, i: usize| (v["rows"][i]["perplexity"]["mean"].as_f64().unwrap(), v["rows"][i]["tokens"].as_u64().unwrap());
    assert_eq!(inside["rows"].as_array().unwrap().len(), strait::config::profiles::builtin().len());
    let ((here, n), (there, m)) = (row(&inside, 0), row(&outside, 0));
    assert!((here / there - 1.0).abs() < 1e-4 && n == m && n == 2 * 249, "{here} {there} {n} {m}");
    // Of a text that is longer than the server tokenises at once only the beginning is asked about.
    let long = Scratch::new("long", std::fs::read_to_string(&text).unwrap().repeat(200).as_bytes());
    assert!(std::fs::metadata(&long.0).unwrap().len() > 2 << 20);
    let of_long = over(&["eval", "ppl", "--text", long.0.to_str().unwrap(), "--lengths", "500", "--n", "2", "--json"]);
    assert_eq!(row(&of_long, 0), row(&outside, 0));
}

#[test]
fn a_model_with_a_window_is_measured_up_to_it() {
    let (from, to) = (crate::golden::folder("mistral"), std::env::temp_dir().join(format!("strait-window-{}", std::process::id())));
    std::fs::create_dir_all(&to).unwrap();
    for file in std::fs::read_dir(&from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    assert!(config["max_position_embeddings"].as_u64() > Some(512));
    config["sliding_window"] = json!(512);
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    std::fs::write(to.join("tokenizer.json"), crate::text::byte_level().to_string()).unwrap();
    let text = Scratch::new("window", "The river bends twice before the mill. ".repeat(40).as_bytes());
    let (dir, text) = (to.to_str().unwrap(), text.0.to_str().unwrap());
    let ppl = |length| ["eval", "ppl", dir, "--text", text, "--profiles", "full", "--n", "1", "--json", "--lengths", length];
    assert_eq!(measured(&ppl("512"))["rows"][0]["length"], json!(512));
    let said = String::from_utf8(strait(&ppl("513")).stderr).unwrap();
    assert!(said.contains("--lengths has 513, and the model takes at most 512 tokens; lower it"), "{said}");
    std::fs::remove_dir_all(&to).unwrap();
}

#[test]
fn answers_that_the_disk_does_not_take_are_missed() {
    let out = strait(&["eval", "lines", "--lengths", "512", "--n", "1", "--profiles", "full", "--answers", "/dev/full"]);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && said.contains("cannot write the file of --answers: No space left"), "{said}");
}

#[test]
fn every_mistake_is_one_sentence_with_its_mend() {
    let text = Scratch::new("text", "A few words.".as_bytes());
    let empty = Scratch::new("empty", b" \n");
    let latin = Scratch::new("latin", b"caf\xe9");
    let short = Scratch::new("short", b"max-model-len = 240\n");
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/demo_prompts.jsonl");
    let file = |s: &Scratch| s.0.to_str().unwrap().to_owned();
    // Nobody listens on a port that was just given back.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let down = format!("http://{free}");
    let cases: &[(&[&str], &str)] = &[
        (&["lines", "--profiles", "full,tiny"], "there is no cache profile \"tiny\"; choose one of full, cskv-50"),
        (&["lines", "--lengths", "512,20000"], "--lengths has 20000, and the model takes at most 16384 tokens; lower it"),
        (&["lines", "--lengths", "0"], "--lengths has 0"),
        (&["lines", "--n", "0"], "--n is 0"),
        (&["lines", "--lengths", "64"], "the shortest prompt of lines has"),
        (&["lines", "--lengths", "230", "--config", &file(&short)], " tokens, and of a context of 240 an answer of 100 leaves 140; no"),
        (&["niah", "--kinds", "single_9"], "there is no kind of needle \"single_9\"; choose from single_1"),
        (&["niah", "--haystack", &file(&empty)], "holds no text"),
        (&["kl", "--text", &file(&empty)], "holds no text; give one that does"),
        (&["kl", "--text", &file(&latin)], "is not UTF-8 (byte 3); convert it"),
        (&["ppl", "--text", "/nowhere/at/all"], "cannot read /nowhere/at/all"),
        (&["ppl", "--text", &file(&text)], "too few for a sequence of 1024"),
        (&["ppl", "--text", &file(&text), "--prompt-share", "1"], "--prompt-share is 1"),
        (
            &["kl", "--text", &file(&text), "--lengths", "64,2"],
            "--lengths has 2; a sequence has a token of prompt, one that follows from it,",
        ),
        (
            &["kl", "--text", &file(&text), "--lengths", "9", "--prompt-share", "0.9"],
            "leaves none of a sequence of 9 tokens to score; lower it",
        ),
        (&["kl", "--text", golden, "--lengths", "256,100", "--n", "1"], "49 scored tokens are too few for an interval"),
        (&["kl", "--text", &file(&text), "--url", &down], "run it in process"),
        (&["ppl", "--text", &file(&text), "--url", &down, "--profiles", "full"], "knows no --profiles"),
        (&["lines", "--url", &down], "is the server running there?"),
        (&["lines", "--url", "https://localhost"], "TLS is not built in"),
        (&["prompts", "--file", "/nowhere"], "cannot read /nowhere"),
        (&["lines", "--answers", "/nowhere/at/all"], "cannot write /nowhere/at/all"),
        (&["lines", "/nowhere/at/all"], "/nowhere/at/all"),
    ];
    for (args, want) in cases {
        let out = strait(&[&["eval"], *args].concat());
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("strait: ") && said.lines().count() == 1 && said.contains(want), "{args:?}: {said}");
        assert!(out.stdout.is_empty());
    }
    for args in
        [&["eval"][..], &["eval", "poems"], &["eval", "ppl"], &["eval", "lines", "--text", "x"], &["eval", "lines", "dir", "--url", "x"]]
    {
        assert_eq!(strait(args).status.code(), Some(2), "{args:?}");
    }
}
