//! Everything that generates nothing: tokens, models, capacity, keys, metrics, paths.

use super::*;

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
        ("/tokenize", with(json!({"prompt": "x"}), &json!({"messages": hello()["messages"]})), "400 invalid_value messages"),
        ("/tokenize", with(hello(), &json!({"tools": [{"type": "function"}]})), "400 unsupported_parameter tools"),
        ("/tokenize", with(hello(), &json!({"chat_template": "x"})), "400 unsupported_parameter chat_template"),
        ("/tokenize", json!({"prompt": "x", "truncate_prompt_tokens": 1}), "400 unsupported_parameter truncate_prompt_tokens"),
        ("/detokenize", json!({}), "400 invalid_value tokens"),
        ("/detokenize", json!({"tokens": "x"}), "400 invalid_type tokens"),
        ("/detokenize", json!({"tokens": [260]}), "400 invalid_value tokens"),
    ] {
        assert_eq!(app.post(path, &body).await.verdict(), verdict, "{body}");
    }
}

#[tokio::test]
async fn parts_of_a_message_are_joined_as_its_template_joins_them() {
    let walks = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}";
    for (template, text) in [("{{ messages[0].content }}", "ab\ncd"), (walks, "abcd")] {
        let json = crate::text::byte_level().to_string();
        let tokenizer = Arc::new(Tokenizer::from_json(&json, None, Some(&json!(template)), usize::MAX).expect("a tokenizer"));
        let app = app_of(config(), Model { codec: Arc::new(ModelCodec::new(tokenizer, 300)), ..model() });
        let parts: Value = ["ab", "cd"].iter().map(|text| json!({"type": "text", "text": text})).collect();
        let answer = app.post("/tokenize", &json!({"messages": [{"role": "user", "content": parts}]})).await.json();
        let back = app.post("/detokenize", &json!({"tokens": answer["tokens"]})).await.json();
        assert_eq!(back["prompt"], text, "{template}");
    }
    // They are counted like any text.
    let part = json!({"type": "text", "text": "y".repeat(1 << 19)});
    let answer = app(vec![]).post(CHAT, &json!({"messages": [{"role": "user", "content": [part, part]}]})).await;
    assert_eq!(answer.verdict(), "400 context_length_exceeded messages");
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
                "key_bits": 16,
                "value_bits": 16,
                "budget": null,
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
        ("POST", "/v1/load_lora_adapter", "403 not_allowed -", None),
        ("POST", "/v1/unload_lora_adapter", "403 not_allowed -", None),
        ("POST", "/v1/rollback_lora_adapter", "403 not_allowed -", None),
        ("GET", "/v1/lora_adapters", "200", None),
        ("GET", "/health", "200", None),
        ("GET", "/ready", "200", None),
        ("GET", "/ping", "200", None),
        ("POST", "/ping", "200", None),
        ("PUT", "/ping", "405 method_not_allowed -", Some("GET,HEAD,POST")),
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
    let later = ["/v1/responses", "/v1/embeddings"];
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
        ("/ping", &[], "200"),
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
async fn pages_of_other_origins_may_use_the_server_if_they_are_allowed() {
    let none: &[&str] = &[];
    let (app_origin, other) = ("https://app.example", "https://other.example");
    let ask = [("access-control-request-method", "POST"), ("access-control-request-headers", "authorization,content-type,x-stainless-os")];
    let key = [("authorization", "Bearer sk-one")];
    // Who is allowed, the method and what is sent with it; then the answer, and whose page may read it.
    for (allowed, method, path, origin, headers, verdict, readable) in [
        (none, "OPTIONS", CHAT, Some(app_origin), &ask[..], "401 invalid_api_key -", None),
        (none, "GET", "/v1/models", Some(app_origin), &key, "200", None),
        (&[app_origin], "OPTIONS", CHAT, Some(app_origin), &ask, "204", Some(app_origin)),
        (&[app_origin], "OPTIONS", CHAT, Some(other), &ask, "401 invalid_api_key -", None),
        (&[app_origin], "OPTIONS", CHAT, None, &ask, "401 invalid_api_key -", None),
        (&[app_origin], "OPTIONS", CHAT, Some(app_origin), &key, "405 method_not_allowed -", Some(app_origin)),
        (&[app_origin], "GET", "/v1/models", Some(app_origin), &key, "200", Some(app_origin)),
        (&[app_origin], "GET", "/v1/models", Some(app_origin), &[], "401 invalid_api_key -", Some(app_origin)),
        (&[app_origin], "GET", "/v1/models", Some(other), &key, "200", None),
        (&[app_origin], "GET", "/v1/models", None, &key, "200", None),
        (&[app_origin], "GET", "/nope", Some(app_origin), &key, "404 not_found -", Some(app_origin)),
        (&["*"], "OPTIONS", CHAT, Some("null"), &ask, "204", Some("*")),
        (&["*"], "GET", "/v1/models", Some(other), &key, "200", Some("*")),
        // Being allowed opens no admin route.
        (&["*"], "POST", "/admin/drain", Some(other), &key, "403 not_allowed -", Some("*")),
        (&[app_origin], "POST", "/admin/drain", Some(app_origin), &key, "403 not_allowed -", Some(app_origin)),
    ] {
        let app = app_with(Config { api_keys: Keys::new(["sk-one"]), origins: Origins::new(allowed), ..config() }, vec![]);
        let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
        for (name, value) in origin.map(|origin| ("origin", origin)).iter().chain(headers) {
            request = request.header(*name, *value);
        }
        let mut request = request.body(Body::empty()).expect("a request");
        request.extensions_mut().insert(Peer("127.0.0.1:5000".parse().expect("an address")));
        let answer = app.send(request).await;
        let shown = format!("{allowed:?} {method} {path} {origin:?}");
        assert_eq!(answer.verdict(), verdict, "{shown}");
        let header = |name: &str| answer.headers.get(name).map(|v| v.to_str().expect("text"));
        assert_eq!(header("access-control-allow-origin"), readable, "{shown}");
        assert_eq!(header("access-control-expose-headers").is_some(), readable.is_some(), "{shown}");
        assert_eq!(header("vary"), (allowed == [app_origin]).then_some("origin"), "{shown}");
        let permits = (header("access-control-allow-methods"), header("access-control-allow-headers"), header("access-control-max-age"));
        let want = (Some("GET, HEAD, POST"), Some("authorization,content-type,x-stainless-os"), Some("600"));
        assert_eq!(permits, if verdict == "204" { want } else { (None, None, None) }, "{shown}");
        assert_eq!(header("access-control-allow-credentials"), None);
    }
    // A page of the internet that is to reach this machine.
    let app = app_with(Config { origins: Origins::new([app_origin]), ..config() }, vec![]);
    let request =
        Request::options(CHAT).header("host", "localhost").header("origin", app_origin).header("access-control-request-method", "POST");
    let request = request.header("access-control-request-private-network", "true").body(Body::empty()).expect("a request");
    assert_eq!(app.send(request).await.headers["access-control-allow-private-network"], "true");
    // Nor does it say which hosts there are.
    let request = Request::options(CHAT).header("host", "a b").header("origin", app_origin).header("access-control-request-method", "POST");
    assert_eq!(app.send(request.body(Body::empty()).expect("a request")).await.verdict(), "400 bad_host -");
}

#[tokio::test]
async fn draining_is_for_the_machine_itself_and_the_admin_key() {
    let local = Some("127.0.0.1:5000");
    let remote = Some("10.0.0.9:5000");
    let (yes, no, unknown) = ("202", "403 not_allowed -", "401 invalid_api_key -");
    // Keys of clients, and of administrators.
    let (open, keyed) = (("", ""), ("sk-one", ""));
    let (closed, administered) = (("sk-one", "sk-admin"), ("", "sk-admin"));
    for (keys, peer, host, headers, verdict) in [
        (open, local, "localhost:8000", &[][..], yes),
        (open, local, "127.0.0.1:8000", &[], yes),
        (open, Some("[::1]:9"), "[::1]:8000", &[], yes),
        (open, Some("[::ffff:127.0.0.1]:9"), "127.0.0.1", &[], yes),
        (open, local, "localhost:8000", &[("origin", "http://localhost:8000")], yes),
        (open, local, "localhost:8000", &[("origin", "http://evil.example")], no),
        (open, local, "rebound.example:8000", &[], no),
        (open, remote, "10.0.0.1:8000", &[], no),
        (open, None, "localhost", &[], no),
        // A proxy on this machine speaks for callers from anywhere.
        (open, local, "127.0.0.1:8000", &[("forwarded", "for=10.0.0.9")], no),
        (open, local, "127.0.0.1:8000", &[("x-forwarded-for", "127.0.0.1")], no),
        (open, local, "127.0.0.1:8000", &[("x-real-ip", "10.0.0.9")], no),
        (open, local, "127.0.0.1:8000", &[("via", "1.1 proxy")], no),
        (keyed, local, "localhost", &[], unknown),
        (keyed, local, "localhost", &[("authorization", "Bearer sk-one")], yes),
        (keyed, local, "localhost", &[("authorization", "Bearer sk-one"), ("x-forwarded-for", "10.0.0.9")], no),
        (administered, local, "localhost", &[], no),
        (administered, local, "localhost", &[("authorization", "Bearer sk-admin")], yes),
        (closed, local, "localhost", &[], unknown),
        (closed, local, "localhost", &[("authorization", "Bearer sk-one")], no),
        (closed, remote, "10.0.0.1", &[("authorization", "Bearer sk-one")], no),
        (closed, remote, "10.0.0.1", &[("authorization", "Bearer sk-admin")], yes),
        (closed, local, "localhost", &[("authorization", "Bearer sk-admin"), ("x-forwarded-for", "10.0.0.9")], yes),
    ] {
        let mut config = config();
        config.api_keys = Keys::new([keys.0]);
        config.admin_keys = Keys::new([keys.1]);
        let app = app_with(config, vec![]);
        let mut request = Request::post("/admin/drain").header("host", host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(Body::empty()).expect("a request");
        if let Some(peer) = peer {
            request.extensions_mut().insert(Peer(peer.parse().expect("an address")));
        }
        assert_eq!(app.send(request).await.verdict(), verdict, "{keys:?} {peer:?} {host} {headers:?}");
        let phase = if verdict == yes { Phase::Draining } else { Phase::Ready };
        assert_eq!(app.server.phase(), phase);
        if verdict == yes && keys == open {
            assert_eq!(app.get("/ready").await.verdict(), "503 draining -");
            assert_eq!(app.get("/ping").await.verdict(), "503 draining -");
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
    let full = SubmitError::QueueFull { queued: 256, limit: Limit::Requests, retry_after: Duration::from_millis(2300) };
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
async fn each_want_of_room_has_a_reason_of_its_own() {
    let full = |limit| Err(SubmitError::QueueFull { queued: 9, limit, retry_after: Duration::from_secs(1) });
    for (reason, play, edit) in [
        ("max_num_queued_reqs", full(Limit::Requests), None),
        ("max_num_queued_tokens", full(Limit::Tokens), None),
        ("max_queued_texts", Ok(vec![]), Some((|c: &mut Config| (c.text_threads, c.text_queue) = (1, 0)) as fn(&mut Config))),
        ("max_body_bytes", Ok(vec![]), Some(|c: &mut Config| c.limits.bodies_bytes = 10)),
    ] {
        let mut config = config();
        edit.into_iter().for_each(|edit| edit(&mut config));
        let app = app_with(config, vec![play]);
        // Where one place is all there is for work on text, the second finds none.
        let (slow, hello) = (json!({"prompt": "slow"}), hello());
        let work = async { if reason == "max_queued_texts" { Some(app.post("/tokenize", &slow).await) } else { None } };
        let (_, refused) = tokio::join!(work, app.post(CHAT, &hello));
        assert_eq!(refused.verdict(), "429 server_overloaded -", "{reason}");
        let metrics = app.server.telemetry.render();
        let counted: Vec<&str> =
            metrics.lines().filter(|l| l.starts_with("vllm:admission_rejections_total{") && !l.ends_with(" 0")).collect();
        assert_eq!(counted, [format!("vllm:admission_rejections_total{{engine=\"0\",model_name=\"demo\",reason=\"{reason}\"}} 1")]);
    }
}

/// Adapters whose names are looked up on a disk that is slow.
struct Slow(std::thread::ThreadId);

impl strait::admission::Adapters for Slow {
    fn knows(&self, _: &str) -> bool {
        assert_ne!(std::thread::current().id(), self.0, "files are not looked for on a thread that serves others");
        false
    }
}

#[tokio::test]
async fn a_model_is_looked_up_where_it_holds_nobody_up() {
    let model = Model { adapters: Some(Arc::new(Slow(std::thread::current().id()))), ..model() };
    let app = app_of(config(), model);
    for (id, verdict) in [("demo", "200"), ("org/demo", "200"), ("other", "404 model_not_found model")] {
        assert_eq!(app.get(&format!("/v1/models/{id}")).await.verdict(), verdict, "{id}");
    }
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
