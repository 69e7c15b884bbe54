//! What completions say, in one piece and as streams, and how they end.

use super::*;

#[tokio::test]
async fn a_chat_in_one_piece() {
    let app = app(vec![Ok(vec![Say("Hello"), Tell(Event::Token { id: EOS, logprob: None }), Done(FinishReason::Stop)])]);
    let answer = app.post(CHAT, &hello()).await;
    check_pretty(
        &answer,
        &expect![[r#"
        {
          "id": "chatcmpl-r1",
          "object": "chat.completion",
          "created":0,
          "model": "demo",
          "choices": [
            {
              "index": 0,
              "message": {
                "role": "assistant",
                "content": "Hello",
                "refusal": null
              },
              "logprobs": null,
              "finish_reason": "stop"
            }
          ],
          "usage": {
            "prompt_tokens": 18,
            "completion_tokens": 6,
            "total_tokens": 24,
            "prompt_tokens_details": {
              "cached_tokens": 2
            },
            "kv_cache": {
              "profile": "cskv-80",
              "bytes": 4096,
              "sealed_tokens": 64,
              "window_tokens": 10
            },
            "timings": {
              "queue_ms": 1.0,
              "prompt_ms": 2.5,
              "predicted_ms": 40.0
            }
          }
        }"#]],
    );
    assert_eq!(answer.headers["x-request-id"], "r1");
    assert_eq!(app.fake.seen().requests[0].prompt.len(), "user:hi\nassistant:".len());
}

#[tokio::test]
async fn a_chat_as_a_stream() {
    let app = app(vec![Ok(vec![Say("Hé"), Done(FinishReason::Length)])]);
    let answer = app.post(CHAT, &with(hello(), &json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(answer.headers["cache-control"], "no-store");
    check(
        &answer,
        &expect![[r#"
        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"H"},"logprobs":null,"finish_reason":null}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"é"},"logprobs":null,"finish_reason":null}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[],"usage":{"prompt_tokens":18,"completion_tokens":3,"total_tokens":21,"prompt_tokens_details":{"cached_tokens":2},"kv_cache":{"profile":"cskv-80","bytes":4096,"sealed_tokens":64,"window_tokens":10},"timings":{"queue_ms":1.0,"prompt_ms":2.5,"predicted_ms":40.0}}}

        data: [DONE]

    "#]],
    );
}

#[tokio::test]
async fn a_stream_with_running_counts_token_ids_and_logprobs() {
    let app = app(vec![Ok(ends("ab"))]);
    let extra = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}, "return_token_ids": true, "logprobs": true, "top_logprobs": 1});
    check(
        &app.post(CHAT, &with(hello(), &extra)).await,
        &expect![[r#"
        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":18,"completion_tokens":1,"total_tokens":19},"prompt_token_ids":[117,115,101,114,58,104,105,10,97,115,115,105,115,116,97,110,116,58]}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]}]}],"refusal":null},"finish_reason":null,"token_ids":[97]}],"usage":{"prompt_tokens":18,"completion_tokens":1,"total_tokens":19}}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{"content":"b"},"logprobs":{"content":[{"token":"b","logprob":-0.5,"bytes":[98],"top_logprobs":[{"token":"b","logprob":-0.5,"bytes":[98]}]}],"refusal":null},"finish_reason":null,"token_ids":[98]}],"usage":{"prompt_tokens":18,"completion_tokens":2,"total_tokens":20}}

        data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"demo","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":18,"completion_tokens":2,"total_tokens":20}}

        data: [DONE]

    "#]],
    );
}

#[tokio::test]
async fn two_choices_are_two_sequences_with_their_own_seeds() {
    // "b" when "a" was read, "A" when the end of "b" was: clocks would order them only while nothing stalls.
    let both = Arc::new(Barrier::new(2));
    let meet = || Meet(both.clone());
    let app = app(vec![
        Ok(vec![Say("a"), meet(), meet(), Say("A"), Done(FinishReason::Stop)]),
        Ok(vec![meet(), Say("b"), Done(FinishReason::Length), meet()]),
    ]);
    let answer = app.post(TEXT, &json!({"prompt": "x", "n": 2, "seed": 7, "stream": true})).await;
    check(
        &answer,
        &expect![[r#"
        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":1,"text":"b","logprobs":null,"finish_reason":null}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":1,"text":"","logprobs":null,"finish_reason":"length"}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":0,"text":"A","logprobs":null,"finish_reason":null}]}

        data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"demo","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}]}

        data: [DONE]

    "#]],
    );
    let seeds: Vec<_> = app.fake.seen().requests.iter().map(|r| r.sampling.seed).collect();
    assert_eq!(seeds[0], 7);
    assert_ne!(seeds[1], 7);
}

#[tokio::test]
async fn what_goes_on_from_a_text_keeps_the_space_it_begins_with() {
    let continued = with(hello(), &json!({"continue_final_message": true}));
    for (path, body, text) in [(CHAT, hello(), "there"), (CHAT, continued, " there"), (TEXT, json!({"prompt": "hi"}), " there")] {
        for stream in [false, true] {
            let app = app(vec![Ok(ends(" there"))]);
            let answer = app.post(path, &with(body.clone(), &json!({"stream": stream}))).await;
            let frames = if stream { frames(&answer.text) } else { vec![answer.json()] };
            let text_of = |f: &Value| {
                let choice = &f["choices"][0];
                [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]]
                    .iter()
                    .find_map(|t| t.as_str().map(str::to_owned))
            };
            assert_eq!(frames.iter().filter_map(text_of).collect::<String>(), text, "{path} {body} {stream}");
        }
    }
}

#[tokio::test]
async fn prompts_and_choices_are_indexed_prompt_by_prompt() {
    let app = app(["a", "b", "c", "d"].map(|t| Ok(ends(t))).into());
    let answer = app.post(TEXT, &json!({"prompt": ["x", "yy"], "n": 2, "seed": -1, "echo": true, "max_tokens": 3})).await.json();
    let told: Vec<_> =
        answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].as_str().expect("text").to_owned()).collect();
    assert_eq!(told, ["xa", "xb", "yyc", "yyd"]);
    // BOS and the text, each prompt once; cached tokens once per prompt; every choice's cache.
    assert_eq!(answer["usage"]["prompt_tokens"], 2 + 3);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
    assert_eq!(answer["usage"]["kv_cache"]["bytes"], 4 * 4096);
    let seeds: Vec<_> = app.fake.seen().requests.iter().map(|r| r.sampling.seed).collect();
    assert_eq!((seeds[0], seeds[1]), (seeds[2], seeds[3]), "a prompt's seeds do not depend on its neighbours");
    assert_eq!(seeds[0], u64::MAX);
}

#[tokio::test]
async fn echo_with_logprobs_scores_a_prompt_as_evaluation_harnesses_ask() {
    for stream in [false, true] {
        let app = app(vec![Ok(vec![Done(FinishReason::Length)])]);
        let body = json!({"prompt": "hé!", "echo": true, "logprobs": 1, "max_tokens": 0, "add_special_tokens": false, "stream": stream});
        let answer = app.post(TEXT, &body).await;
        let frames = if stream { frames(&answer.text) } else { vec![answer.json()] };
        let json = &frames[0];
        assert_eq!(json["choices"][0]["text"], "hé!");
        assert_eq!(frames[frames.len() - 1]["choices"][0]["finish_reason"], "length");
        expect![[r#"{"text_offset":[0,1,2,2],"token_logprobs":[null,-0.5,-0.5,-0.5],"tokens":["h","bytes:\\xc3","bytes:\\xa9","!"],"top_logprobs":[null,{"bytes:\\xc3":-0.5},{"bytes:\\xa9":-0.5},{"!":-0.5}]}"#]].assert_eq(&json["choices"][0]["logprobs"].to_string());
        let seen = app.fake.seen();
        assert_eq!((seen.requests[0].max_new_tokens, seen.requests[0].prompt_logprobs), (0, Some(1)));
    }
}

#[tokio::test]
async fn a_harness_finds_one_logprob_per_token_also_when_the_last_is_eos() {
    let app = app(vec![Ok(vec![Tell(Event::Token { id: EOS, logprob: None }), Done(FinishReason::Stop)])]);
    let answer = app.post(TEXT, &json!({"prompt": [104, 105], "echo": true, "logprobs": 0, "max_tokens": 1})).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "hi");
    assert_eq!(choice["logprobs"]["tokens"], json!(["h", "i", "</s>"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
    // Without alternatives the token itself is still listed.
    assert_eq!(choice["logprobs"]["top_logprobs"], json!([null, {"i": -0.5}, {"</s>": -0.5}]));
}

#[tokio::test]
async fn offsets_are_places_in_the_text() {
    let app = app(vec![Ok(ends("é!"))]);
    let answer = app.post(TEXT, &json!({"prompt": "a<s>", "echo": true, "logprobs": 0})).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "a<s>é!");
    // BOS was added by the tokenizer and is not in the text; what the client wrote is.
    assert_eq!(choice["logprobs"]["tokens"], json!(["<s>", "a", "<", "s", ">", "bytes:\\xc3", "bytes:\\xa9", "!"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 1, 2, 3, 4, 5, 5]));
}

#[tokio::test]
async fn offsets_leave_out_the_space_that_an_encoder_put_before_a_text() {
    for legacy in [true, false] {
        let tokenizer =
            Arc::new(Tokenizer::from_json(&crate::text::sentencepiece(legacy).to_string(), None, None, usize::MAX).expect("a tokenizer"));
        let id = |token: &str| tokenizer.token_id(token).expect("a token");
        let said = [id("\u{2581}"), id("w"), id("</s>"), id("o")];
        for prompt in
            [json!("hello w"), json!(" hello"), json!("<s>hello"), json!(tokenizer.encode("hello w", false, true).expect("tokens"))]
        {
            let prompts = match prompt.as_str() {
                Some(text) => tokenizer.encode(text, true, true).expect("tokens").len(),
                None => prompt.as_array().expect("ids").len(),
            };
            let logprob = TokenLogprob { logprob: -0.5, top: vec![] };
            let token = |id| Event::Token { id, logprob: Some(logprob.clone()) };
            let done = Event::Done { reason: FinishReason::Length, usage: Usage::default() };
            let scores = Event::Prompt { logprobs: vec![logprob.clone(); prompts - 1] };
            let events = [scores].into_iter().chain(said.map(token)).chain([done]).collect();
            let codec = Arc::new(ModelCodec::new(tokenizer.clone(), 300));
            let app = served(EngineHandle::new(Arc::new(Happened(Mutex::new(events)))), Model { codec, ..model() });
            let answer = app.post(TEXT, &json!({"prompt": prompt, "echo": true, "logprobs": 0})).await.json();
            let choice = &answer["choices"][0];
            let text: Vec<char> = choice["text"].as_str().expect("text").chars().collect();
            let offsets: Vec<usize> = serde_json::from_value(choice["logprobs"]["text_offset"].clone()).expect("offsets");
            let tokens: Vec<String> = serde_json::from_value(choice["logprobs"]["tokens"].clone()).expect("tokens");
            for (token, from, to) in (0..tokens.len()).map(|i| (&tokens[i], offsets[i], *offsets.get(i + 1).unwrap_or(&text.len()))) {
                let shown: String = text[from..to].iter().collect();
                assert!(
                    shown == *token || shown == token.trim_start() || token.starts_with('<') && shown.is_empty(),
                    "{prompt} {token:?} is at {from}..{to} of {answer}"
                );
            }
            assert_eq!(offsets.last(), Some(&(text.len() - 1)), "{prompt}: {answer}");
        }
    }
}

/// An engine for which all of a sequence has happened when it is submitted.
struct Happened(Mutex<Vec<Event>>);

impl Engine for Happened {
    fn submit_all(&self, _: Vec<GenerateRequest>, _: Option<Lease>) -> Result<Vec<TokenStream>, SubmitError> {
        let events = std::mem::take(&mut *self.0.lock().expect("unshared"));
        let (tx, rx) = mpsc::channel(events.len());
        events.into_iter().for_each(|event| tx.try_send(event).expect("room"));
        Ok(vec![TokenStream::new(SeqId(1), rx, || {})])
    }
    fn finish(&self, _: SeqId) {}
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::default()
    }
    fn heartbeat_age(&self) -> Duration {
        Duration::ZERO
    }
    fn drain(&self) {}
    fn stop(&self) {}
}

fn happened(events: Vec<Event>) -> App {
    served(EngineHandle::new(Arc::new(Happened(Mutex::new(events)))), model())
}

/// Any engine behind the router.
fn served(engine: EngineHandle, model: Model) -> App {
    let server = Server::new(config(), Arc::new(Telemetry::new("demo")));
    let (need, adapters) = (Arc::new(|_, _| 0), crate::http::adapters::none());
    server.install(Loaded { model, engine, need, adapters });
    App { router: server.router(), server, fake: Fake::new(vec![]) }
}

/// The engine itself, of which the scripts above only say what it does.
#[tokio::test]
async fn the_engine_tells_the_stop_token_and_the_edge_keeps_it_out_of_the_text() {
    let world = crate::engine::world("llama2", crate::engine::ROOMY, crate::engine::cpu);
    let app = |eos| served(world.engine.clone(), Model { defaults: Defaults { eos, ..Defaults::default() }, ..model() });
    let greedy = json!({"temperature": 0, "cache_profile": "full", "return_token_ids": true, "logit_bias": {"0": -100}, "logprobs": 0});
    let ask = |prompt: &[TokenId], extra: Value| with(with(greedy.clone(), &json!({"prompt": prompt})), &extra);
    let prompt = crate::engine::tokens(20, 3, 256);
    let text = |ids: &[TokenId]| String::from_utf8_lossy(&ids.iter().map(|&id| id as u8).collect::<Vec<_>>()).into_owned();

    let answer = app(vec![]).post(TEXT, &ask(&prompt, json!({"max_tokens": 16}))).await.json();
    let free: Vec<TokenId> = serde_json::from_value(answer["choices"][0]["token_ids"].clone()).unwrap();
    let n = (3..16).find(|&n| !free[..n].contains(&free[n])).expect("the model does not repeat itself from its third token on");
    let eos = free[n];

    for (app, extra, said) in [
        (app(vec![eos]), json!({"max_tokens": 16}), &free[..n]),
        (app(vec![]), json!({"max_tokens": 16, "stop_token_ids": [eos]}), &free[..n]),
        (app(vec![]), json!({"max_tokens": 16, "stop_token_ids": [eos], "include_stop_str_in_output": true}), &free[..=n]),
    ] {
        let answer = app.post(TEXT, &ask(&prompt, extra.clone())).await.json();
        let choice = &answer["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["text"]), (&json!("stop"), &json!(text(said))), "{extra}");
        assert_eq!((&choice["token_ids"], &answer["usage"]["completion_tokens"]), (&json!(free[..=n]), &json!(n + 1)), "{extra}");
        assert_eq!(choice["logprobs"]["token_logprobs"].as_array().map(Vec::len), Some(n + 1), "{extra}");
    }
    // A harness counts on a prompt of n tokens and the one that follows, whatever it is.
    let prompt = [&prompt[..], &free[..n]].concat();
    let answer = app(vec![eos]).post(TEXT, &ask(&prompt, json!({"max_tokens": 1, "echo": true}))).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["logprobs"]["token_logprobs"].as_array().map(Vec::len), Some(prompt.len() + 1));
    assert_eq!((&choice["token_ids"], &choice["finish_reason"]), (&json!([eos]), &json!("stop")));
}

#[tokio::test]
async fn an_idle_server_takes_a_request_of_more_sequences_than_may_wait() {
    let world = crate::engine::world("llama2", crate::engine::queue_of(2), crate::engine::cpu);
    let app = served(world.engine.clone(), model());
    let prompts: Vec<Vec<TokenId>> = (0..8).map(|i| crate::engine::tokens(20, 3 + i, 256)).collect();
    for (extra, choices) in [(json!({"prompt": prompts}), 8), (json!({"prompt": prompts[0], "n": 5}), 5)] {
        let answer = app.post(TEXT, &with(json!({"max_tokens": 2, "logit_bias": {"0": -100}}), &extra)).await;
        assert_eq!(answer.verdict(), "200");
        assert_eq!(answer.json()["choices"].as_array().map(Vec::len), Some(choices));
    }
}

#[tokio::test]
async fn minus_infinity_and_bytes_that_are_no_text_fit_json() {
    let deep = TokenLogprob { logprob: f32::NEG_INFINITY, top: vec![(0xc3, f32::NEG_INFINITY), (0xa9, -1.0)] };
    let token = |id| Event::Token { id, logprob: Some(deep.clone()) };
    // The player replaces log-probabilities of `Token`s.
    for (path, key) in [(TEXT, "prompt"), (CHAT, "messages")] {
        let done = Event::Done { reason: FinishReason::Stop, usage: Usage::default() };
        let app = happened(vec![token(0xc3), token(0xa9), done]);
        let logprobs = if path == TEXT { json!(2) } else { json!(true) };
        let prompt = if path == TEXT { json!("x") } else { hello()["messages"].clone() };
        let answer = app.post(path, &json!({key: prompt, "logprobs": logprobs})).await.json();
        let choice = &answer["choices"][0];
        match path {
            TEXT => expect![[r#"{"index":0,"text":"é","logprobs":{"text_offset":[0,1],"token_logprobs":[-9999.0,-9999.0],"tokens":["bytes:\\xc3","bytes:\\xa9"],"top_logprobs":[{"bytes:\\xc3":-9999.0,"bytes:\\xa9":-1.0},{"bytes:\\xc3":-9999.0,"bytes:\\xa9":-1.0}]},"finish_reason":"stop"}"#]].assert_eq(&choice.to_string()),
            _ => expect![[r#"{"index":0,"message":{"role":"assistant","content":"é","refusal":null},"logprobs":{"content":[{"token":"�","logprob":-9999.0,"bytes":[195],"top_logprobs":[{"token":"�","logprob":-9999.0,"bytes":[195]},{"token":"�","logprob":-1.0,"bytes":[169]}]},{"token":"�","logprob":-9999.0,"bytes":[169],"top_logprobs":[{"token":"�","logprob":-9999.0,"bytes":[195]},{"token":"�","logprob":-1.0,"bytes":[169]}]}],"refusal":null},"finish_reason":"stop"}"#]].assert_eq(&choice.to_string()),
        }
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_choice_exactly_and_bills_what_was_seen() {
    for (say, extra, text, stop, completion_tokens) in [
        ("one two three", json!({"stop": "two"}), "one ", "two", 7),
        ("one two three", json!({"stop": ["x", "two"], "include_stop_str_in_output": true}), "one two", "two", 7),
        ("aaab", json!({"stop": ["aab"]}), "a", "aab", 4),
        ("Ünd", json!({"stop": ["nd", "three"]}), "Ü", "nd", 4),
    ] {
        for stream in [false, true] {
            let app = app(vec![Ok(vec![Say(say), UntilFinish])]);
            let body = with(
                with(json!({"prompt": "x", "stream": stream}), &extra),
                &json!({"stream_options": stream.then(|| json!({"include_usage": true}))}),
            );
            let answer = app.post(TEXT, &body).await;
            let reason = |frame: &Value| frame["choices"][0]["stop_reason"].as_str().map(str::to_owned);
            let (told, usage, stopped) = match stream {
                false => {
                    let answer = answer.json();
                    (answer["choices"][0]["text"].as_str().expect("text").to_owned(), answer["usage"].clone(), reason(&answer))
                }
                true => {
                    let frames = frames(&answer.text);
                    (texts(&frames), frames[frames.len() - 1]["usage"].clone(), frames.iter().find_map(reason))
                }
            };
            assert_eq!((told.as_str(), stopped.as_deref()), (text, Some(stop)));
            assert_eq!(usage["completion_tokens"], completion_tokens, "{say}");
            assert_eq!(usage["kv_cache"], json!({"profile": "cskv-80", "bytes": 4096, "sealed_tokens": 64, "window_tokens": 10}));
            assert_eq!(app.fake.seen().finished, [SeqId(1)]);
        }
    }
}

#[tokio::test]
async fn an_invocation_is_of_whatever_its_body_is() {
    let text = json!({"prompt": "x"});
    for (body, path, object) in [(hello(), CHAT, "chat.completion"), (text.clone(), TEXT, "text_completion")] {
        for stream in [false, true] {
            let body = with(body.clone(), &json!({"stream": stream}));
            let [asked, invoked] = [path, "/invocations"].map(|path| (app(vec![Ok(ends("hi"))]), path));
            let (asked, invoked) = (asked.0.post(asked.1, &body).await, invoked.0.post(invoked.1, &body).await);
            assert_eq!(scrub(&invoked.text), scrub(&asked.text));
            assert!(invoked.text.contains(&format!("\"object\":\"{object}{}\"", if stream && path == CHAT { ".chunk" } else { "" })));
        }
    }
    let app = app(vec![]);
    for (body, verdict) in [
        (json!({}), "400 invalid_value prompt"),
        (json!({"messages": null}), "400 invalid_value prompt"),
        (with(text, &json!({"top_logprobs": 1})), "400 unsupported_parameter top_logprobs"),
        (with(hello(), &json!({"echo": true})), "400 unsupported_parameter echo"),
    ] {
        assert_eq!(app.post("/invocations", &body).await.verdict(), verdict, "{body}");
    }
}

#[tokio::test]
async fn a_stop_string_ends_nothing_before_min_tokens() {
    let json = crate::text::byte_level().to_string();
    let tokenizer = Arc::new(Tokenizer::from_json(&json, None, None, usize::MAX).expect("a tokenizer"));
    for (min_tokens, text, completion_tokens) in [(0, "a", 2), (1, "a", 2), (2, "a;b", 4), (4, "a;b;c", 6)] {
        let app = app_of(config(), Model { codec: Arc::new(ModelCodec::new(tokenizer.clone(), 300)), ..model() });
        app.fake.seen().plays.push_back(Ok(vec![Say("a;b;c;"), UntilFinish]));
        let answer = app.post(TEXT, &json!({"prompt": "x", "stop": ";", "min_tokens": min_tokens})).await.json();
        let choice = &answer["choices"][0];
        let told = (choice["text"].as_str(), choice["stop_reason"].as_str(), answer["usage"]["completion_tokens"].as_u64());
        assert_eq!(told, (Some(text), Some(";"), Some(completion_tokens)), "{min_tokens}");
    }
}

#[tokio::test]
async fn a_stop_token_is_not_text_unless_generation_went_on() {
    let dot = TokenId::from(b'.');
    let token = |id| Tell(Event::Token { id, logprob: None });
    for (steps, extra, text, stopped) in [
        (vec![Say("a"), token(dot), Done(FinishReason::Stop)], json!({}), "a", Some(dot)),
        (vec![Say("a"), token(dot), Done(FinishReason::Stop)], json!({"include_stop_str_in_output": true}), "a.", Some(dot)),
        (vec![Say("a"), token(dot), Say("b"), Done(FinishReason::Stop)], json!({"min_tokens": 3}), "a.b", None),
        (vec![Say("a"), token(dot), Done(FinishReason::Length)], json!({"min_tokens": 2}), "a.", None),
        // The model's own end is none of the client's.
        (vec![token(EOS), Done(FinishReason::Stop)], json!({}), "", None),
    ] {
        for (path, prompt) in [(TEXT, json!({"prompt": "x"})), (CHAT, hello())] {
            let app = app(vec![Ok(steps.clone())]);
            let body = with(with(prompt, &json!({"stop_token_ids": [dot]})), &extra);
            let choice = app.post(path, &body).await.json()["choices"][0].clone();
            let told = if path == TEXT { &choice["text"] } else { &choice["message"]["content"] };
            assert_eq!((told, choice.get("stop_reason")), (&json!(text), stopped.map(|id| json!(id)).as_ref()), "{path} {extra}");
        }
    }
}

#[tokio::test]
async fn an_abnormal_end_is_a_status_or_an_error_event_without_done() {
    for (failure, verdict) in [
        (Failure::Numerical, "500 numerical_error -"),
        (Failure::OutOfPages, "503 out_of_pages -"),
        (Failure::QueueTimeout, "503 deadline_exceeded -"),
        (Failure::Internal("canary".into()), "500 internal_error -"),
        (Failure::Draining, "503 draining -"),
        (Failure::Unread, "408 client_too_slow -"),
    ] {
        let failed = || vec![Ok(vec![Say("abc"), Tell(Event::Failed { failure: failure.clone() })])];
        let answer = app(failed()).post(CHAT, &hello()).await;
        assert_eq!(answer.verdict(), verdict);
        assert_eq!(answer.headers.contains_key("retry-after"), answer.status == 503);
        assert!(!answer.text.contains("canary"));

        let answer = app(failed()).post(CHAT, &with(hello(), &json!({"stream": true}))).await;
        assert_eq!(answer.status, 200);
        let frames = frames(&answer.text);
        let code = frames[frames.len() - 1]["error"]["code"].as_str().expect("an error event last");
        assert!(verdict.contains(code), "{code}");
        assert!(!answer.text.contains("[DONE]") && !answer.text.contains("canary"));
    }
    // An engine that dies leaves a sequence without an end.
    let app = app(vec![Ok(vec![Say("abc")])]);
    assert_eq!(app.post(CHAT, &hello()).await.verdict(), "500 internal_error -");
}

/// A task that has done much is told to wait although there is more for it (tokio's budget of 128 operations). Wherever that falls in a
/// stream whose reader was held up, the stream is told to its end.
#[tokio::test]
async fn a_stream_that_fell_behind_is_told_whole() {
    for (path, body) in [(TEXT, json!({"prompt": "x"})), (CHAT, hello())] {
        for tokens in 1..=200 {
            let token = |i: usize| Event::Token { id: TokenId::from(b'a') + i as u32 % 26, logprob: None };
            let done = Event::Done { reason: FinishReason::Length, usage: Usage::default() };
            let app = happened((0..tokens).map(token).chain([done]).collect());
            let answer = app.post(path, &with(body.clone(), &json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
            assert!(answer.text.ends_with("data: [DONE]\n\n"), "{tokens} tokens end with {:?}", answer.text.lines().last());
            let frames = frames(&answer.text);
            assert_eq!(frames[frames.len() - 1]["usage"]["completion_tokens"], tokens);
            assert_eq!(frames[frames.len() - 2]["choices"][0]["finish_reason"], "length");
            let alphabet = ('a'..='z').cycle().take(tokens).collect::<String>();
            let told: String =
                frames.iter().filter_map(|f| f["choices"][0]["text"].as_str().or(f["choices"][0]["delta"]["content"].as_str())).collect();
            assert_eq!(told, alphabet);
        }
    }
}

#[tokio::test]
async fn a_choice_that_met_its_stop_string_is_finished_whatever_comes_after() {
    let failed = |failure| vec![Say("a.b"), Tell(Event::Failed { failure })];
    // The last one's engine dies.
    for steps in [failed(Failure::Numerical), failed(Failure::Draining), vec![Say("a.b")]] {
        for stream in [false, true] {
            let app = app(vec![Ok(steps.clone()), Ok(vec![Wait(20), Say("other"), Done(FinishReason::Length)])]);
            let answer = app.post(TEXT, &json!({"prompt": "x", "n": 2, "stop": ".", "stream": stream})).await;
            assert_eq!(answer.status, 200);
            let all = if stream { frames(&answer.text) } else { vec![answer.json()] };
            assert!(!stream || answer.text.ends_with("data: [DONE]\n\n"), "{}", answer.text);
            let choices = || all.iter().flat_map(|f| f["choices"].as_array().expect("choices"));
            let told = |i: usize| {
                let own: Vec<_> = choices().filter(|c| c["index"] == i).collect();
                let text: String = own.iter().filter_map(|c| c["text"].as_str()).collect();
                (text, own[own.len() - 1]["finish_reason"].as_str().expect("a reason"))
            };
            assert_eq!((told(0), told(1)), (("a".into(), "stop"), ("other".into(), "length")));
        }
    }
}

#[tokio::test]
async fn a_failed_choice_ends_its_siblings() {
    let app = app(vec![Ok(vec![Hang]), Ok(vec![Tell(Event::Failed { failure: Failure::Numerical })])]);
    assert_eq!(app.post(CHAT, &with(hello(), &json!({"n": 2}))).await.verdict(), "500 numerical_error -");
    assert_eq!(app.fake.cancelled(2).await.len(), 2);
}

#[tokio::test]
async fn panics_end_one_request() {
    let app = app(vec![Ok(vec![Say("a\0")])]);
    assert_eq!(app.post(TEXT, &json!({"prompt": "panic"})).await.verdict(), "500 internal_error -");
    let answer = app.post(TEXT, &json!({"prompt": "x", "stream": true})).await;
    assert!(answer.text.contains("\"internal_error\"") && !answer.text.contains("[DONE]"), "{}", answer.text);
    app.fake.seen().plays.push_back(Ok(vec![Say("\0")]));
    assert_eq!(app.post(TEXT, &json!({"prompt": "x"})).await.verdict(), "500 internal_error -");
    assert_eq!(app.post(TEXT, &json!({"prompt": "x"})).await.status, 200);
    assert!(app.server.telemetry.render().contains("strait:panics_total 3\n"));
}
