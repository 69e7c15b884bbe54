//! Every field of a request: its range, its refusal, what the engine gets of it.

use super::*;

#[tokio::test]
async fn parameters_of_a_chat() {
    let ok = "200";
    let long = "x".repeat(300);
    let many_kwargs: Value = (0..33).map(|i| (format!("k{i}"), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let many_biases: Value = (0..1025).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let table = [
        // P01 and P02: numbers
        (json!({"temperature": 0}), ok),
        (json!({"temperature": 2}), ok),
        (json!({"temperature": null}), ok),
        (json!({"temperature": 1e-50}), ok),
        (json!({"temperature": -0.0}), ok),
        (json!({"temperature": 1e39}), "400 invalid_value temperature"),
        (json!({"temperature": -1e39}), "400 invalid_value temperature"),
        (json!({"temperature": -0.1}), "400 invalid_value temperature"),
        (json!({"temperature": 2.1}), "400 invalid_value temperature"),
        (json!({"temperature": "0.5"}), "400 invalid_type temperature"),
        (json!({"temperature": true}), "400 invalid_type temperature"),
        (json!({"temperature": {}}), "400 invalid_type temperature"),
        (json!({"top_p": 1}), ok),
        (json!({"top_p": 1e-50}), ok),
        (json!({"top_p": 0}), "400 invalid_value top_p"),
        (json!({"top_p": 1.1}), "400 invalid_value top_p"),
        (json!({"top_k": -1}), ok),
        (json!({"top_k": 0}), ok),
        (json!({"top_k": 100_000}), ok),
        (json!({"top_k": -2}), "400 invalid_value top_k"),
        (json!({"top_k": 1.0}), "400 invalid_type top_k"),
        (json!({"min_p": 1}), ok),
        (json!({"min_p": -0.1}), "400 invalid_value min_p"),
        (json!({"presence_penalty": -2}), ok),
        (json!({"presence_penalty": 2.5}), "400 invalid_value presence_penalty"),
        (json!({"frequency_penalty": "1"}), "400 invalid_type frequency_penalty"),
        (json!({"repetition_penalty": 2}), ok),
        (json!({"repetition_penalty": 0}), "400 invalid_value repetition_penalty"),
        (json!({"repetition_penalty": 1e-50}), "400 invalid_value repetition_penalty"),
        (json!({"repetition_penalty": 2.01}), "400 invalid_value repetition_penalty"),
        // P03 and P04: limits
        (json!({"max_tokens": 1}), ok),
        (json!({"max_tokens": null, "max_completion_tokens": 5}), ok),
        (json!({"max_tokens": 5, "max_completion_tokens": 5}), ok),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": 0}), "400 invalid_value max_tokens"),
        (json!({"max_completion_tokens": 0}), "400 invalid_value max_completion_tokens"),
        (json!({"max_tokens": -1}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": 1.0}), "400 invalid_type max_tokens"),
        (json!({"max_tokens": 4_294_967_296_u64}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": 1000}), "400 context_length_exceeded max_tokens"),
        (json!({"min_tokens": 5, "max_tokens": 5}), ok),
        (json!({"min_tokens": 6, "max_tokens": 5}), "400 invalid_value min_tokens"),
        (json!({"min_tokens": 1000, "max_tokens": null}), "400 invalid_value min_tokens"),
        // P05 and P06
        (json!({"n": 128}), ok),
        (json!({"n": 0}), "400 invalid_value n"),
        (json!({"n": 129}), "400 invalid_value n"),
        (json!({"n": u64::MAX}), "400 invalid_value n"),
        (json!({"best_of": 1}), ok),
        (json!({"best_of": 2}), "400 unsupported_parameter best_of"),
        (json!({"best_of": 2, "n": 2}), ok),
        (json!({"best_of": 3, "n": 2}), "400 unsupported_parameter best_of"),
        (json!({"best_of": "2", "n": 2}), "400 invalid_type best_of"),
        (json!({"use_beam_search": true}), "400 unsupported_parameter use_beam_search"),
        (json!({"suffix": "x"}), "400 unsupported_parameter suffix"),
        (json!({"prompt_embeds": "x"}), "400 unsupported_parameter prompt_embeds"),
        (json!({"audio": {}}), "400 unsupported_parameter audio"),
        (json!({"modalities": ["text"]}), ok),
        (json!({"modalities": ["text", "audio"]}), "400 unsupported_parameter modalities"),
        (json!({"tools": [], "tool_choice": "auto"}), ok),
        (json!({"tools": null, "tool_choice": "none"}), ok),
        (json!({"tools": [{}]}), "400 unsupported_parameter tools"),
        (json!({"tool_choice": "required"}), "400 unsupported_parameter tool_choice"),
        (json!({"response_format": {"type": "text"}}), ok),
        (json!({"response_format": {"type": "json_object"}}), "400 unsupported_parameter response_format"),
        (json!({"structured_outputs": {"regex": "a"}}), "400 unsupported_parameter structured_outputs"),
        (json!({"guided_json": {}}), "400 unsupported_parameter guided_json"),
        (json!({"functions": []}), ok),
        (json!({"echo": true}), "400 unsupported_parameter echo"),
        (json!({"skip_special_tokens": false}), "400 unsupported_parameter skip_special_tokens"),
        (json!({"store": true}), "400 unsupported_parameter store"),
        (json!({"add_special_tokens": false}), ok),
        (json!({"add_special_tokens": true}), "400 unsupported_parameter add_special_tokens"),
        (json!({"return_tokens_as_token_ids": true}), "400 unsupported_parameter return_tokens_as_token_ids"),
        (json!({"thinking_token_budget": 9}), "400 unsupported_parameter thinking_token_budget"),
        (json!({"enable_thinking": false}), "400 unsupported_parameter enable_thinking"),
        (json!({"lora_path": "a"}), "400 unsupported_parameter lora_path"),
        (json!({"verbosity": "medium", "vllm_xargs": {}, "repeat_penalty": 1.0}), ok),
        (json!({"verbosity": "low"}), "400 unsupported_parameter verbosity"),
        (json!({"max_repetition_pattern_size": 0, "min_repetition_pattern_size": 0, "repetition_min_count": 0}), ok),
        (json!({"max_repetition_pattern_size": 8}), "400 unsupported_parameter max_repetition_pattern_size"),
        (json!({"vllm_xargs": {"a": 1}}), "400 unsupported_parameter vllm_xargs"),
        (json!({"repeat_penalty": 1.1}), "400 unsupported_parameter repeat_penalty"),
        // As clients of many servers switch samplers off.
        (json!({"mirostat": 0, "dry_multiplier": 0.0, "xtc_probability": 0, "top_n_sigma": -1, "top_a": 0, "n_predict": -1}), ok),
        (json!({"mirostat": 2}), "400 unsupported_parameter mirostat"),
        (json!({"xtc_probability": 0.5}), "400 unsupported_parameter xtc_probability"),
        (json!({"n_predict": 1}), "400 unsupported_parameter n_predict"),
        (json!({"max_new_tokens": 1}), "400 unsupported_parameter max_new_tokens"),
        // P09: stop
        (json!({"stop": []}), ok),
        (json!({"stop": null}), ok),
        (json!({"stop": ["a", "b", "c", "\u{0}"]}), ok),
        (json!({"stop": ""}), "400 invalid_value stop"),
        (json!({"stop": vec!["a"; 32]}), ok),
        (json!({"stop": vec!["a"; 33]}), "400 invalid_value stop"),
        (json!({"stop": long}), "400 invalid_value stop"),
        (json!({"stop": 1}), "400 invalid_type stop"),
        (json!({"stop": [1]}), "400 invalid_type stop"),
        (json!({"stop_token_ids": [1, 2]}), ok),
        (json!({"stop_token_ids": [VOCAB]}), "400 invalid_value stop_token_ids"),
        (json!({"stop_token_ids": [-1]}), "400 invalid_type stop_token_ids"),
        // P12 and P13: logit_bias
        (json!({"logit_bias": {"5": -100, "259": 100.0}}), ok),
        (json!({"logit_bias": {"260": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"-1": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"+1": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"abc": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"4294967296": 1}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"1": 1e39}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": {"1": "1"}}), "400 invalid_type logit_bias"),
        (json!({"logit_bias": {"1": 1, "01": 2}}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": many_biases}), "400 invalid_value logit_bias"),
        (json!({"logit_bias": [1]}), "400 invalid_type logit_bias"),
        // P15: logprobs
        (json!({"logprobs": true, "top_logprobs": 20}), ok),
        (json!({"logprobs": true, "top_logprobs": 21}), "400 invalid_value top_logprobs"),
        (json!({"top_logprobs": 1}), "400 invalid_value top_logprobs"),
        (json!({"top_logprobs": 0}), ok),
        (json!({"logprobs": false, "top_logprobs": 0}), ok),
        (json!({"logprobs": 1}), "400 invalid_type logprobs"),
        // P16: seeds
        (json!({"seed": i64::MIN}), ok),
        (json!({"seed": u64::MAX}), ok),
        (json!({"seed": 1.5}), "400 invalid_type seed"),
        (json!({"seed": 1e30}), "400 invalid_type seed"),
        // P17: model
        (json!({"model": "org/demo"}), ok),
        (json!({"model": null}), ok),
        (json!({"model": ""}), "400 invalid_value model"),
        (json!({"model": "../x"}), "404 model_not_found model"),
        (json!({"model": "demo:adapter"}), "404 model_not_found model"),
        (json!({"model": "x".repeat(1 << 20)}), "400 invalid_value model"),
        // P18: streams
        (json!({"stream_options": {"include_usage": true}}), "400 invalid_value stream_options"),
        (json!({"stream": "yes"}), "400 invalid_type stream"),
        (json!({"stream": true, "stream_options": [true]}), "400 invalid_type stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": 1}}), "400 invalid_type stream_options.include_usage"),
        // P19 and P21
        (json!({"user": "me"}), ok),
        (json!({"user": "x".repeat(1 << 20)}), "400 invalid_value user"),
        (json!({"metadata": {"a": "b"}}), ok),
        (json!({"metadata": {"a": 1}}), "400 invalid_value metadata"),
        (json!({"priority": -5}), ok),
        (json!({"priority": 3_000_000_000_u64}), "400 invalid_value priority"),
        (json!({"cache_salt": "tenant_1-A"}), ok),
        (json!({"cache_salt": ""}), "400 invalid_value cache_salt"),
        (json!({"cache_salt": "x".repeat(65)}), "400 invalid_value cache_salt"),
        (json!({"cache_salt": "a\nb"}), "400 invalid_value cache_salt"),
        (json!({"cache_salt": "\u{1f600}"}), "400 invalid_value cache_salt"),
        (json!({"cache_profile": "full"}), ok),
        (json!({"cache_profile": "cskv-1"}), "400 invalid_value cache_profile"),
        // C01 to C03 and P22: messages and templates
        (json!({"messages": []}), "400 invalid_value messages"),
        (json!({"messages": null}), "400 invalid_value messages"),
        (json!({"messages": "hi"}), "400 invalid_type messages"),
        (json!({"messages": vec![json!({"role": "user", "content": ""}); 4097]}), "400 invalid_value messages"),
        (json!({"messages": [["user", "hi"]]}), "400 invalid_type messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "400 invalid_value messages[0].role"),
        (json!({"messages": [{"role": "boss", "content": "hi"}]}), "400 invalid_value messages[0].role"),
        (json!({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}), "400 invalid_value messages[1].content"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "400 invalid_type messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}), ok),
        (json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "400 invalid_value messages[0].content[0].text"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]}]}),
            "400 unsupported_parameter messages[0].content[0].type",
        ),
        (json!({"messages": [{"role": "user", "content": [["text", "a"]]}]}), "400 invalid_type messages[0].content[0]"),
        (json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]}), ok),
        // As other servers mark a message to go on with, and calls were before tools.
        (json!({"messages": [{"role": "assistant", "content": "a", "prefix": true}]}), "400 unsupported_parameter messages[0].prefix"),
        (json!({"messages": [{"role": "assistant", "content": "a", "partial": true}]}), "400 unsupported_parameter messages[0].partial"),
        (
            json!({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}),
            "400 unsupported_parameter messages[0].function_call",
        ),
        (json!({"messages": [{"role": "assistant", "content": "a", "prefix": false, "function_call": null, "refusal": null}]}), ok),
        (json!({"messages": [{"role": "user", "content": "raise"}]}), "400 template_error messages"),
        (json!({"chat_template": "{{ 1 }}"}), "400 unsupported_parameter chat_template"),
        (json!({"chat_template_kwargs": {"enable_thinking": false, "x": 1, "y": "s", "z": null}}), ok),
        (json!({"reasoning_effort": "x".repeat(65)}), "400 invalid_value reasoning_effort"),
        (json!({"chat_template_kwargs": {"tokenize": true}}), "400 invalid_value chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"messages": "x"}}), "400 invalid_value chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"a": []}}), "400 invalid_type chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"a b": 1}}), "400 invalid_value chat_template_kwargs"),
        (json!({"chat_template_kwargs": many_kwargs}), "400 invalid_value chat_template_kwargs"),
        (json!({"continue_final_message": true}), ok),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), "400 invalid_value continue_final_message"),
        // H11: what we do not know does not matter
        (json!({"some_new_field": {"deep": [1, {"a": null}]}}), ok),
    ];
    let app = app(vec![]);
    for (extra, verdict) in table {
        let answer = app.post(CHAT, &with(hello(), &extra)).await;
        let verdict_got = if answer.text.starts_with("data:") { "200".to_owned() } else { answer.verdict() };
        let shown: String = extra.to_string().chars().take(120).collect();
        assert_eq!(verdict_got, verdict, "{shown}: {}", answer.text.chars().take(400).collect::<String>());
    }
}

#[tokio::test]
async fn parameters_of_a_completion() {
    let ok = "200";
    let table = [
        (json!({"prompt": "x"}), ok),
        (json!({"prompt": ["x", "y"]}), ok),
        (json!({"prompt": [1, 2]}), ok),
        (json!({"prompt": [[1, 2], [3]]}), ok),
        (json!({"prompt": [BOS, EOS]}), ok),
        (json!({"prompt": ""}), ok), // BOS
        (json!({"prompt": "", "add_special_tokens": false}), "400 invalid_value prompt"),
        (json!({}), "400 invalid_value prompt"),
        (json!({"prompt": null}), "400 invalid_value prompt"),
        (json!({"prompt": []}), "400 invalid_value prompt"),
        (json!({"prompt": [[]]}), "400 invalid_value prompt"),
        (json!({"prompt": 5}), "400 invalid_type prompt"),
        (json!({"prompt": {}}), "400 invalid_type prompt"),
        (json!({"prompt": ["x", 1]}), "400 invalid_type prompt"),
        (json!({"prompt": ["x", [1]]}), "400 invalid_type prompt"),
        (json!({"prompt": [1, -1]}), "400 invalid_type prompt"),
        (json!({"prompt": [1, 1.0]}), "400 invalid_type prompt"),
        (json!({"prompt": [[["x"]]]}), "400 invalid_type prompt"),
        (json!({"prompt": [VOCAB]}), "400 invalid_value prompt"),
        (json!({"prompt": [1, 4_294_967_296_u64]}), "400 invalid_type prompt"),
        (json!({"prompt": vec!["x"; 1024]}), ok),
        (json!({"prompt": vec!["x"; 1025]}), "400 invalid_value prompt"),
        (json!({"prompt": vec!["x"; 8], "n": 128}), ok),
        (json!({"prompt": vec!["x"; 9], "n": 128}), "400 invalid_value n"),
        (json!({"prompt": "x", "logprobs": 0}), ok),
        (json!({"prompt": "x", "logprobs": 20}), ok),
        (json!({"prompt": "x", "logprobs": 21}), "400 invalid_value logprobs"),
        (json!({"prompt": "x", "logprobs": true}), "400 invalid_type logprobs"),
        (json!({"prompt": "x", "max_tokens": 0}), "400 invalid_value max_tokens"),
        (json!({"prompt": "x", "max_tokens": 0, "echo": true}), ok),
        (json!({"prompt": "x", "echo": 1}), "400 invalid_type echo"),
        (json!({"prompt": "x", "top_logprobs": 2}), "400 unsupported_parameter top_logprobs"),
        (json!({"prompt": "x", "best_of": 2}), "400 unsupported_parameter best_of"),
        (json!({"prompt": "x", "suffix": ""}), ok),
        (json!({"prompt": "x", "suffix": "y"}), "400 unsupported_parameter suffix"),
    ];
    let app = app(vec![]);
    for (body, verdict) in table {
        let answer = app.post(TEXT, &body).await;
        assert_eq!(answer.verdict(), verdict, "{}: {}", body.to_string().chars().take(120).collect::<String>(), answer.text);
    }
}

#[tokio::test]
async fn what_the_engine_gets() {
    let app = app(vec![]);
    app.post(CHAT, &hello()).await;
    let extra = json!({
        "temperature": 1e-50, "top_p": 1e-50, "top_k": -1, "min_p": 0.25, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "seed": -2, "logit_bias": {"7": -100}, "stop_token_ids": [9, 3, 9], "ignore_eos": true,
        "max_completion_tokens": 17, "min_tokens": 4, "priority": -3, "cache_profile": "full", "cache_salt": "a",
        "logprobs": true, "top_logprobs": 2, "chat_template_kwargs": {"think": false}, "reasoning_effort": "low",
    });
    app.post(CHAT, &with(hello(), &extra)).await;
    app.post(CHAT, &with(hello(), &json!({"continue_final_message": true, "cache_salt": "a"}))).await;
    let seen = app.fake.seen();
    let plain = &seen.requests[0];
    assert_eq!(plain.max_new_tokens, 1000 - plain.prompt.len() as u32);
    assert_eq!((plain.sampling.temperature, plain.sampling.top_k, plain.profile), (0.7, 20, ProfileIndex(1)));
    assert_eq!((&plain.stop_tokens[..], plain.logprobs, plain.cache_salt, plain.min_new_tokens), (&[EOS][..], None, 0, 0));
    let full = &seen.requests[1];
    expect![[r#"
        Sampling {
            temperature: 0.0,
            top_p: 1.1754944e-38,
            top_k: 0,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            logit_bias: {
                7: -100.0,
            },
            seed: 18446744073709551614,
        }
    "#]]
    .assert_debug_eq(&full.sampling);
    assert_eq!((full.max_new_tokens, full.min_new_tokens, full.priority, full.profile), (17, 4, -3, ProfileIndex(0)));
    assert_eq!((&full.stop_tokens[..], full.logprobs, full.prompt_logprobs), (&[3, 9][..], Some(2), None));
    assert_eq!(Bytes.decode(&full.prompt, false), "user:hi\nassistant:[think=false][reasoning_effort=\"low\"]");
    assert_ne!(full.cache_salt, 0);
    assert_eq!(full.cache_salt, seen.requests[2].cache_salt);
    assert_eq!(Bytes.decode(&seen.requests[2].prompt, false), "user:hi");
    assert_ne!(plain.sampling.seed, seen.requests[2].sampling.seed, "absent seeds differ");
}

#[test]
fn what_an_answer_may_come_to_is_bounded() {
    let refused = |context: u32, prompt: usize, extra: Value| {
        let body = with(json!({"prompt": vec![vec![7; prompt]; 8], "n": 128}), &extra).to_string();
        let refusal = Model { context, ..model() }.admit_completion(body.as_bytes(), 0).err();
        refusal.map(|refusal| refusal.to_string().chars().take(40).collect::<String>())
    };
    let many = |param| Some(format!("{param} over all choices may come to more than the").chars().take(40).collect::<String>());
    // 1024 choices: of 500 tokens with 20 alternatives each, and as much for each token of a prompt that is scored.
    assert_eq!(refused(2000, 1000, json!({"max_tokens": 500, "logprobs": 20})), None);
    assert_eq!(refused(2000, 1000, json!({"max_tokens": 500, "logprobs": 20, "echo": true})), None);
    assert_eq!(refused(2000, 1100, json!({"max_tokens": 500, "logprobs": 20, "echo": true})), many("logprobs"));
    assert_eq!(refused(2000, 100, json!({"max_tokens": 1900, "logprobs": 20})), many("logprobs"));
    assert_eq!(refused(2000, 100, json!({"max_tokens": 1900, "logprobs": 1})), None);
    assert_eq!(refused(40_000, 32_768, json!({"max_tokens": 1, "return_token_ids": true})), None);
    assert_eq!(refused(40_000, 32_769, json!({"max_tokens": 1, "return_token_ids": true})), many("return_token_ids"));
    // A prompt is told again with each choice as text, too: bodies of 16 MiB would come back as 2 GiB.
    assert_eq!(refused(40_000, 32_768, json!({"max_tokens": 1, "echo": true})), None);
    assert_eq!(refused(40_000, 32_769, json!({"max_tokens": 1, "echo": true})), many("echo"));
}

#[tokio::test]
async fn a_request_that_was_begun_does_not_wait_in_vain() {
    let app = app(vec![]);
    let answer = app.post(TEXT, &json!({"prompt": vec!["x"; 512], "n": 2})).await.json();
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.iter().map(|c| c["index"].as_u64()).collect::<Vec<_>>(), (0..1024).map(Some).collect::<Vec<_>>());
    let waits: Vec<_> = app.fake.seen().requests.iter().map(|request| request.queue_timeout).collect();
    assert_eq!(waits[0], Duration::from_secs(30));
    assert!(waits[1..].iter().all(|&wait| wait == Duration::MAX));
}

#[test]
fn equal_prompts_of_a_request_have_the_answers_of_a_seed_or_each_their_own() {
    let seeds = |extra: Value| {
        let body = with(json!({"prompt": ["x", "x", "y"], "n": 2}), &extra).to_string();
        let admitted = model().admit_completion(body.as_bytes(), 7).expect("a good request");
        admitted.requests.iter().map(|request| request.sampling.seed).collect::<Vec<_>>()
    };
    let given = seeds(json!({"seed": 5}));
    assert_eq!((given[0], &given[..2], &given[..2]), (5, &given[2..4], &given[4..]));
    assert_ne!(given[0], given[1]);
    let own = seeds(json!({}));
    assert_eq!((own[0], own.iter().collect::<BTreeSet<_>>().len()), (7, 6));
    assert_eq!(own, seeds(json!({"seed": null})));
}

#[test]
fn a_text_completion_that_says_no_limit_has_16_tokens() {
    let limit = |model: &Model, chat: bool, extra: Value| {
        let body = if chat { with(hello(), &extra) } else { with(json!({"prompt": vec![7; 90]}), &extra) }.to_string();
        let admitted = if chat { model.admit_chat(body.as_bytes(), 0) } else { model.admit_completion(body.as_bytes(), 0) };
        admitted.map(|admitted| admitted.requests[0].max_new_tokens).map_err(|refusal| refusal.to_string())
    };
    let plain = Model { context: 200, ..model() };
    let short = Model { defaults: Defaults { max_new_tokens: Some(40), ..model().defaults }, ..plain.clone() };
    let prompt = "user:hi\nassistant:".len() as u32;
    for (extra, text, by_default, chat) in [
        (json!({}), 16, 16, 200 - prompt),
        (json!({"max_tokens": null}), 110, 40, 200 - prompt),
        (json!({"max_completion_tokens": null}), 110, 40, 200 - prompt),
        (json!({"max_tokens": 100}), 100, 100, 100),
        (json!({"max_completion_tokens": 100}), 100, 100, 100),
    ] {
        assert_eq!(limit(&plain, false, extra.clone()), Ok(text), "{extra}");
        assert_eq!(limit(&short, false, extra.clone()), Ok(by_default), "{extra}");
        assert_eq!(limit(&plain, true, extra.clone()), Ok(chat), "{extra}");
    }
    // Nor does it ask for more than there is room for.
    assert_eq!(limit(&Model { context: 100, ..model() }, false, json!({})), Ok(10));
    assert_eq!(
        limit(&plain, false, json!({"min_tokens": 17})),
        Err("min_tokens must not exceed the 16 tokens this request may generate".into())
    );
}

#[tokio::test]
async fn the_context_is_kept_exactly() {
    let app = app(vec![]);
    for (len, extra, verdict) in [
        (999, json!({}), "200"),
        (999, json!({"max_tokens": 1}), "200"),
        (999, json!({"max_tokens": 2}), "400 context_length_exceeded max_tokens"),
        (1000, json!({}), "400 context_length_exceeded prompt"),
        (1000, json!({"max_tokens": 0, "echo": true}), "200"),
        (1000, json!({"max_tokens": 1}), "400 context_length_exceeded prompt"),
        (1001, json!({}), "400 context_length_exceeded prompt"),
        (1001, json!({"max_tokens": 0, "echo": true}), "400 context_length_exceeded prompt"),
    ] {
        let answer = app.post(TEXT, &with(json!({"prompt": vec![7; len]}), &extra)).await;
        assert_eq!(answer.verdict(), verdict, "{len} {extra}");
    }
    let message = |answer: &Answer| answer.json()["error"]["message"].as_str().expect("a message").to_owned();
    let answer = app.post(TEXT, &json!({"prompt": vec![7; 1200]})).await;
    expect!["This model's maximum context length is 1000 tokens. However, your prompt contains 1200 input tokens, which leaves no room for an answer. Please reduce the length of the prompt."].assert_eq(&message(&answer));
    let answer = app.post(TEXT, &json!({"prompt": vec![7; 700], "max_tokens": 400})).await;
    expect!["This model's maximum context length is 1000 tokens. However, your prompt contains 700 input tokens and you requested 400 output tokens, 1100 in total. Please reduce the length of the prompt or max_tokens."].assert_eq(&message(&answer));
    // T06: certain to be too long, refused without tokenising.
    let begun = Instant::now();
    let answer = app.post(TEXT, &json!({"prompt": "y".repeat(1 << 20)})).await;
    expect!["This model's maximum context length is 1000 tokens. However, your prompt contains at least 262144 input tokens, which leaves no room for an answer. Please reduce the length of the prompt."].assert_eq(&message(&answer));
    let answer = app.post(CHAT, &json!({"messages": [{"role": "user", "content": "y".repeat(1 << 20)}]})).await;
    assert_eq!(answer.verdict(), "400 context_length_exceeded messages");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn hostile_json_is_refused_in_our_own_words() {
    let app = app(vec![]);
    let secret = "sk-canary";
    for (body, verdict) in [
        (&b""[..], "400 invalid_json -"),
        (b"{", "400 invalid_json -"),
        (b"{\"model\":\"sk-canary\"} x", "400 invalid_json -"),
        (b"\xef\xbb\xbf{}", "400 invalid_json -"),
        (b"{\"model\":\"\xff\"}", "400 invalid_json -"),
        (br#"{"model":"\ud800"}"#, "400 invalid_json -"),
        (br#"{"model":"sk-canary","model":"sk-canary"}"#, "400 invalid_json -"),
        (br#"{"temperature":NaN}"#, "400 invalid_json -"),
        (br#"{"temperature":1e999}"#, "400 invalid_json -"),
        (b"[]", "400 invalid_type -"),
        (b"\"sk-canary\"", "400 invalid_type -"),
        (b"null", "400 invalid_type -"),
        (br#"[["role"]]"#, "400 invalid_type -"),
        (br#"{"messages":[{"role":"sk-canary","content":"sk-canary"}]}"#, "400 invalid_value messages[0].role"),
        (br#"{"messages":{"sk-canary":1}}"#, "400 invalid_type messages"),
        (br#"{"logit_bias":{"sk-canary":1}}"#, "400 invalid_value logit_bias"),
        (
            br#"{"chat_template_kwargs":{"sk-canary":[]},"messages":[{"role":"user","content":"x"}]}"#,
            "400 invalid_value chat_template_kwargs",
        ),
        (br#"{"model":"sk-canary","messages":[{"role":"user","content":"x"}]}"#, "404 model_not_found model"),
        (br#"{"cache_profile":"sk-canary","messages":[{"role":"user","content":"x"}]}"#, "400 invalid_value cache_profile"),
    ] {
        let answer = app.post_bytes(CHAT, body.to_vec()).await;
        assert_eq!(answer.verdict(), verdict, "{}", String::from_utf8_lossy(body));
        assert!(!answer.text.contains(secret), "{}", answer.text);
    }
    // H29: many small values.
    let body = format!("{{\"messages\":[{}]}}", vec!["{}"; 1 << 20].join(","));
    assert_eq!(app.post_bytes(CHAT, body).await.verdict(), "400 invalid_json -");
    assert_eq!(app.fake.seen().requests.len(), 0, "nothing reached the engine");
}

#[tokio::test]
async fn bodies_must_be_plain_json() {
    let app = app(vec![]);
    for (headers, verdict) in [
        (&[("content-type", "application/json")][..], "200"),
        (&[("content-type", "Application/JSON; charset=UTF-8")], "200"),
        (&[("content-type", "application/json"), ("content-encoding", "identity")], "200"),
        (&[], "415 unsupported_media_type -"),
        (&[("content-type", "text/plain")], "415 unsupported_media_type -"),
        (&[("content-type", "application/x-www-form-urlencoded")], "415 unsupported_media_type -"),
        (&[("content-type", "application/json; charset=latin1")], "415 unsupported_media_type -"),
        (&[("content-type", "application/json"), ("content-type", "application/json")], "415 unsupported_media_type -"),
        (&[("content-type", "application/json"), ("content-encoding", "gzip")], "415 unsupported_media_type -"),
    ] {
        let mut request = Request::post(CHAT).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = app.send(request.body(Body::from(hello().to_string())).expect("a request")).await;
        assert_eq!(answer.verdict(), verdict, "{headers:?}");
    }
}
