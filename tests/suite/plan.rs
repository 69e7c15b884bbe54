//! The planner's numbers, against numbers worked out by hand.

use strait::ids::ProfileIndex;
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Width, Widths};
use strait::model::config::ModelConfig;
use strait::plan::{Ask, Plan, PlannedProfile, ProfilePlan, Requests, SealedPage, plan};
use strait::scheduler::{Config, Fit, ProfileSizes};
use strait::step::sealed_len;

use crate::artifact::{cskv, model};

fn llama_31_8b() -> ModelConfig {
    ModelConfig { max_positions: 131_072, ..model(32, 32, 8, 128) }
}

fn qwen_25_7b() -> ModelConfig {
    model(28, 28, 4, 128)
}

fn llama_2_7b() -> ModelConfig {
    model(32, 32, 32, 128)
}

fn profiles() -> Vec<PlannedProfile> {
    let joint = BasisKind::Joint;
    [
        Profile { name: "full".into(), cskv: None },
        cskv("cskv-50", 0.5, 16, joint),
        cskv("cskv-80", 0.2, 16, joint),
        cskv("cskv-95", 0.2, 4, joint),
        cskv("three", 0.2, 3, joint),
    ]
    .map(|profile| PlannedProfile { profile, widths: None })
    .into()
}

fn planned(model: &ModelConfig, arena_bytes: u64, lengths: &[u32]) -> Plan {
    plan(&Ask { model, exact: ExactType::Bf16, profiles: &profiles(), arena_bytes, lengths })
}

#[test]
fn bytes_per_token_are_what_the_formats_say() {
    // Layers x (key + value latents) x bytes, and for 4 bits: codes, 4 bytes per key channel and page,
    // 4 bytes per 32 value channels and token.
    let llama = planned(&llama_31_8b(), 1 << 34, &[]);
    let bytes: Vec<f64> = llama.profiles.iter().map(|p| p.bytes_per_token).collect();
    assert_eq!(bytes[..4], [131_072.0, 2.0 * 512.0 * 2.0 * 32.0, 25_600.0, 7712.0]);
    // 94.1 % saved. A layer is 6400 + 800 + 6400 + 1792 = 15392 bytes, of which layers begin 15424 apart.
    assert_eq!(bytes[3], 32.0 * 15_424.0 / 64.0);
    let qwen = planned(&qwen_25_7b(), 1 << 34, &[]);
    let bytes: Vec<f64> = qwen.profiles.iter().map(|p| p.bytes_per_token).collect();
    // The 4-bit layer of rank 100, whose keys fill 13 words, is 3328 + 400 + 3200 + 1024 = 7952 bytes; layers begin 8000 apart.
    assert_eq!(bytes[..4], [57_344.0, 28_672.0, 11_200.0, 28.0 * 8000.0 / 64.0]);
    let llama2 = planned(&llama_2_7b(), 1 << 34, &[]);
    let bytes: Vec<f64> = llama2.profiles.iter().map(|p| p.bytes_per_token).collect();
    assert_eq!(bytes[..4], [524_288.0, 262_144.0, 102_400.0, 32.0 * (400.0 + 50.0 + 400.0 + 100.0)]);
    assert_eq!(llama2.profiles[2].times_smaller, 5.12);
}

#[test]
fn a_sealed_page_is_its_keys_values_metadata_and_padding() {
    let p = planned(&llama_31_8b(), 1 << 34, &[]).profiles;
    assert_eq!(p[0].sealed_page, None);
    assert_eq!(p[2].sealed_page, Some(SealedPage { bytes: 1_638_400, keys: 819_200, values: 819_200, metadata: 0, padding: 0 }));
    let metadata = 32 * (200 * 4 + 64 * 7 * 4);
    assert_eq!(p[3].sealed_page, Some(SealedPage { bytes: 493_568, keys: 204_800, values: 204_800, metadata, padding: 32 * 32 }));
    // Three bits: 50 quads in 13 words of low bits and 7 of third bits per position for 200 channels; 4 and 2 per value channel.
    let three = p[4].sealed_page.unwrap();
    assert_eq!((three.keys, three.values), (32 * 64 * 20 * 4, 32 * 200 * 6 * 4));
    let qwen = planned(&qwen_25_7b(), 1 << 34, &[]).profiles[3].sealed_page.unwrap();
    // 100 channels fill 12.5 words.
    let (keys, values, metadata) = (28 * 13 * 256, 28 * 3200, 28 * (400 + 1024));
    assert_eq!(qwen, SealedPage { bytes: 28 * 8000, keys, values, metadata, padding: 28 * 48 });
    for p in p.iter().filter_map(|p| p.sealed_page) {
        assert_eq!(p.keys + p.values + p.metadata + p.padding, p.bytes);
    }
}

#[test]
fn what_a_sequence_holds_besides_sealed_pages() {
    let p = &planned(&llama_31_8b(), 1 << 34, &[]).profiles;
    let exact_page = 32 * 2 * 8 * 128 * 64 * 2;
    assert_eq!(exact_page, 8 << 20);
    assert_eq!((p[0].window_bytes, p[0].sinks_bytes, p[0].workspace_bytes_per_token), (0, 0, 0.0));
    // A window of 64 and the page it drains: two pages. Sinks: 4, with room for 16. Workspace: one layer's keys and values,
    // and 4096 hidden states in f32.
    assert_eq!((p[2].window_bytes, p[2].sinks_bytes), (2 * exact_page, 32 * 2 * 8 * 128 * 16 * 2));
    assert_eq!(p[2].workspace_bytes_per_token, 2.0 * 1024.0 * 2.0 + 4096.0 * 4.0);
    assert_eq!(p[2].exact_page_bytes, exact_page);
}

#[test]
fn what_fits_is_counted_in_slabs() {
    // 1 GiB = 128 slabs of 8 MiB. cskv-80: 5 sealed pages, 8 sinks blocks of 1 MiB, 6 workspace pages of 1.25 MiB to a slab.
    let plan = planned(&llama_31_8b(), 1 << 30, &[8192, 32_768]);
    assert_eq!((plan.slab_bytes, plan.slabs), (8 << 20, 128));
    let p = &plan.profiles;
    // full: 128 pages of 64; 8192 tokens are 128 pages.
    assert_eq!((p[0].max_prompt_tokens, p[0].max_context_tokens), (8192, 8192));
    assert_eq!(p[0].requests, [Requests { tokens: 8192, fit: 1 }, Requests { tokens: 32_768, fit: 0 }]);
    // cskv-80: 2 slabs of window and 1 of sinks leave 125 = 625 sealed pages; the 626th seals at (626 + 1) x 64 tokens.
    assert_eq!(p[2].max_context_tokens, 627 * 64 - 1);
    // A prompt of 342 pages: 341 sealed in 69 slabs, 1 exact (nothing is drained from exact pages in prefill), 1 of sinks,
    // 342 of workspace in 57. One token more takes two exact pages and a 58th slab of workspace.
    assert_eq!(p[2].max_prompt_tokens, 342 * 64);
    // 8192 tokens: 127 sealed, 2 exact, 1 sinks each; one prompt's workspace of ceil(128/6) = 22 slabs.
    // R = 3: ceil(381/5) + 6 + 1 + 22 = 77 + 29 = 106. R = 4: 102 + 8 + 1 + 22 = 133 > 128.
    assert_eq!(p[2].requests[0].fit, 3);
}

#[test]
fn a_request_that_fits_is_the_last_that_does() {
    // By brute force over every step of a growing sequence, from the layout and the page's rules alone.
    let model = model(3, 4, 2, 16);
    for (window, sinks, arena) in [(64, 4, 3 << 20), (1, 0, 1 << 20), (100, 64, 5 << 20), (32, 1, 700_000)] {
        let profile = Profile { name: "p".into(), cskv: Some(Cskv::shares((0.25, 0.5), 4, (window, sinks), BasisKind::Joint)) };
        let sizes = PageLayout::new(&model, ExactType::F32, &profile, None).sizes();
        let profiles = [PlannedProfile { profile, widths: None }];
        let got = plan(&Ask { model: &model, exact: ExactType::F32, profiles: &profiles, arena_bytes: arena, lengths: &[500] });
        let slabs_of = |pages: u64, bytes: u64| if pages == 0 { 0 } else { pages.div_ceil(got.slab_bytes / bytes) };
        let slabs = arena / got.slab_bytes;
        let held = |len: u32, before: u32, workspace: u32| {
            let sealed = u64::from(sealed_len(len, window)) / 64;
            slabs_of(sealed, sizes.sealed)
                + slabs_of(u64::from(len - before).div_ceil(64), sizes.exact)
                + slabs_of(u64::from(sealed > 0 && sinks > 0), sizes.sinks)
                + slabs_of(u64::from(workspace).div_ceil(64), sizes.workspace)
        };
        let decoded = |len: u32| held(len, sealed_len(len - 1, window), 0) <= slabs;
        let prefilled = |len: u32| held(len, sealed_len(len, window), len) <= slabs;
        let longest = (1..).find(|&len| !decoded(len)).unwrap() - 1;
        let longest_prompt = (1..).find(|&len| !prefilled(len)).unwrap() - 1;
        assert_eq!(got.profiles[0].max_prompt_tokens, longest_prompt, "window {window}");
        assert_eq!(got.profiles[0].max_context_tokens, longest, "window {window}");
        assert!(longest_prompt > 100 && longest > longest_prompt, "the case says something: {longest_prompt} {longest}");
    }
}

#[test]
fn an_artifacts_ranks_replace_the_shares() {
    let model = model(2, 4, 2, 64);
    let width = |rank| Width { rank, bits: 16 };
    let widths = [(8, 16), (32, 64)].map(|(k, v)| Widths { keys: width(k), values: width(v) }).to_vec();
    let profile = PlannedProfile { profile: cskv("p", 0.5, 16, BasisKind::Joint), widths: Some(widths) };
    let got = plan(&Ask { model: &model, exact: ExactType::F32, profiles: &[profile], arena_bytes: 1 << 20, lengths: &[] });
    assert_eq!(got.profiles[0].bytes_per_token, 2.0 * (8.0 + 16.0 + 32.0 + 64.0));
}

#[test]
fn an_arena_below_one_slab_holds_nothing() {
    let ProfilePlan { max_prompt_tokens, max_context_tokens, requests, .. } = &planned(&llama_31_8b(), (8 << 20) - 1, &[1]).profiles[2];
    assert_eq!((*max_prompt_tokens, *max_context_tokens, requests[0].fit), (0, 0, 0));
}

/// A server's banner and `/v1/capacity` say what was planned, and no shorter prompt is refused then.
#[test]
fn the_scheduler_says_of_the_longest_prompt_what_the_plan_says() {
    let model = model(3, 4, 2, 16);
    for (window, arena_bytes) in [(64, 3 << 20), (1, 1 << 20), (100, 2 << 20), (0, 3 << 20)] {
        let small = Profile { name: "p".into(), cskv: Some(Cskv::shares((0.25, 0.5), 4, (window, 4), BasisKind::Joint)) };
        let profiles = [Profile { name: "full".into(), cskv: None }, small].map(|profile| PlannedProfile { profile, widths: None });
        let planned = plan(&Ask { model: &model, exact: ExactType::F32, profiles: &profiles, arena_bytes, lengths: &[] });
        let fit = Fit::new(&Config {
            max_num_seqs: 1,
            max_num_batched_tokens: 128,
            max_queued_requests: 1,
            max_queued_tokens: 1,
            layers: 3,
            max_model_len: 1 << 24,
            arena_bytes,
            profiles: profiles.iter().map(|p| ProfileSizes::of(&PageLayout::new(&model, ExactType::F32, &p.profile, None))).collect(),
            prefix_caching: false,
            hash_secret: [0; 32],
            model_digest: [0; 32],
        });
        for (p, i) in planned.profiles.iter().zip(0..) {
            let longest = fit.longest(ProfileIndex(i), u32::MAX / 2);
            assert_eq!(longest, p.max_prompt_tokens, "{} with a window of {window}", p.name);
            assert!((1..=longest).all(|n| fit.check(ProfileIndex(i), n, 1).is_ok()));
            assert!((1..longest + 200).map(|n| fit.need(ProfileIndex(i), n)).is_sorted(), "no longer prompt needs less");
        }
    }
}

#[test]
fn the_plan_prints_as_a_table_and_as_json() {
    let plan = planned(&llama_31_8b(), 64 << 30, &[131_072]);
    expect_test::expect![[r#"
        cache 68719476736 bytes = 8192 slabs of 8388608; the model takes 131072 positions
        profile  bytes/token  smaller  sealed page   = keys  + values  + metadata  + padding    window    sinks  prefill/token  max prompt  max context  x 131072 tokens
        full          131072    1.00x            -        -         -           -          -         0        0              0      524288       524288                4
        cskv-50        65536    2.00x      4194304  2097152   2097152           0          0  16777216  2097152          20480      786176      1048319                7
        cskv-80        25600    5.12x      1638400   819200    819200           0          0  16777216  2097152          20480     1429248      2620607               19
        cskv-95         7712   17.00x       493568   204800    204800       82944       1024  16777216  2097152          20480     2286720      8385663               60
        three           6272   20.90x       401408   163840    153600       82944       1024  16777216  2097152          20480     2418816     10482047               75
    "#]].assert_eq(&plan.to_string());
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["profiles"][2]["sealed_page"]["keys"], 819_200);
    assert_eq!(json["profiles"][0]["requests"][0]["tokens"], 131_072);
    assert_eq!(json["profiles"][0]["sealed_page"], serde_json::Value::Null);
}

fn strait(args: &[&str]) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_strait")).args(args).output().unwrap()
}

/// A server with this file would run with it, and so is planned.
#[test]
fn what_a_servers_file_says_is_planned_with_unless_a_flag_says_otherwise() {
    let folder = std::env::temp_dir().join(format!("strait-plan-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let (file, artifact) = (folder.join("strait.toml"), folder.join("demo.cskv"));
    std::fs::write(&artifact, strait::demo::ARTIFACT).unwrap();
    let path = |p: &std::path::Path| p.to_str().unwrap().to_owned();
    std::fs::write(&file, format!("kv-cache-memory-bytes = \"64MiB\"\ndtype = \"float32\"\ncompression = {:?}\n", path(&artifact)))
        .unwrap();
    let planned = |flags: &[&str]| -> serde_json::Value {
        let out = strait(&[&["plan", "--json"], flags].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let by_file = planned(&["--config", &path(&file)]);
    assert_eq!(by_file, planned(&["--kv-cache-memory-bytes", "64MiB", "--dtype", "f32", "--compression", &path(&artifact)]));
    assert_eq!((&by_file["arena_bytes"], &by_file["profiles"][0]["bytes_per_token"]), (&(64 << 20).into(), &5120.0.into()));
    let over = planned(&["--config", &path(&file), "--kv-cache-memory-bytes", "1GiB", "--dtype", "bf16"]);
    assert_eq!((&over["arena_bytes"], &over["profiles"][0]["bytes_per_token"]), (&(1 << 30).into(), &2560.0.into()));
    assert_eq!(planned(&[])["arena_bytes"], 4_u64 << 30);
    // That the file's artifact is read at all.
    std::fs::write(&artifact, b"no artifact").unwrap();
    let out = strait(&["plan", "--config", &path(&file)]);
    let said = String::from_utf8(out.stderr).unwrap();
    let want = format!("strait: cannot use --compression {}: the compression artifact is not a whole safetensors file: ", path(&artifact));
    assert!(out.status.code() == Some(1) && said.starts_with(&want) && said.ends_with("make it anew with `strait compress`\n"), "{said}");
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Before the weights are there it is what it will be then.
#[test]
fn a_configuration_alone_is_planned_with() {
    let whole = concat!(env!("CARGO_MANIFEST_DIR"), "/src/demo/model");
    let folder = std::env::temp_dir().join(format!("strait-plan-alone-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.to_str().unwrap();
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(format!("{whole}/config.json")).unwrap()).unwrap();
    let says = |key: &str, dtype: &str, flags: &[&str]| {
        let mut config = config.clone();
        ["dtype", "torch_dtype"].iter().for_each(|key| drop(config.as_object_mut().unwrap().remove(*key)));
        if !key.is_empty() {
            config[key] = dtype.into();
        }
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        strait(&[&["plan", path], flags].concat())
    };
    let of_all = |dtype: &str| strait(&["plan", whole, "--dtype", dtype]).stdout;
    for (key, dtype, same) in [("dtype", "bfloat16", "bf16"), ("torch_dtype", "bfloat16", "bf16"), ("dtype", "float16", "f32")] {
        let out = says(key, dtype, &[]);
        assert!(out.status.success() && out.stdout == of_all(same), "{key} {dtype}: {}", String::from_utf8_lossy(&out.stderr));
    }
    assert_eq!(says("dtype", "bfloat16", &["--dtype", "f32"]).stdout, of_all("f32"));
    let untold = String::from_utf8(says("", "", &[]).stderr).unwrap();
    assert!(untold.contains("give --dtype"), "{untold}");
    // Weights in another form are there: a model that cannot be served is not planned with.
    std::fs::write(folder.join("pytorch_model.bin"), b"").unwrap();
    let pickled = String::from_utf8(says("dtype", "bfloat16", &[]).stderr).unwrap();
    assert!(pickled.contains("convert them to safetensors"), "{pickled}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn an_arena_that_no_server_takes_is_not_planned_either() {
    let out = strait(&["plan", "--kv-cache-memory-bytes", "257GiB"]);
    let said = String::from_utf8(out.stderr).unwrap();
    let want = "strait: an arena of 275951648768 bytes is beyond the 256 GiB that pages can address; lower --kv-cache-memory-bytes\n";
    assert_eq!((out.status.code(), said.as_str()), (Some(1), want));
}

/// What a server would refuse is not planned with, and no length is passed over.
#[test]
fn lengths_are_those_that_a_server_would_take() {
    let folder = std::env::temp_dir().join(format!("strait-plan-lengths-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let whole = concat!(env!("CARGO_MANIFEST_DIR"), "/src/demo/model");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(format!("{whole}/config.json")).unwrap()).unwrap();
    config["model_type"] = "mistral".into();
    config["architectures"] = serde_json::json!(["MistralForCausalLM"]);
    config["sliding_window"] = 4096.into();
    config.as_object_mut().unwrap().retain(|key, _| !key.ends_with("_bias"));
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (path, file) = (folder.to_str().unwrap(), folder.join("strait.toml"));
    let planned = |length: u32| {
        std::fs::write(&file, format!("max-model-len = {length}\n")).unwrap();
        strait(&["plan", path, "--json", "--dtype", "bf16", "--config", file.to_str().unwrap()])
    };
    let positions = |out: std::process::Output| -> serde_json::Value {
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()["max_positions"].clone()
    };
    assert_eq!(positions(strait(&["plan", path, "--json", "--dtype", "bf16"])), 4096, "the window, not the 16384 beyond it");
    assert_eq!(positions(planned(1024)), 1024);
    let beyond = String::from_utf8(planned(4097).stderr).unwrap();
    assert!(beyond.contains("max-model-len is 4097, and the model computes up to 4096 positions"), "{beyond}");
    std::fs::remove_dir_all(&folder).unwrap();

    // Weights whose file has its length and no more.
    let unfinished = std::env::temp_dir().join(format!("strait-plan-unfinished-{}", std::process::id()));
    std::fs::create_dir(&unfinished).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("{whole}/{name}"), unfinished.join(name)).unwrap();
    }
    let mut weights = std::fs::read(format!("{whole}/model.safetensors")).unwrap();
    let header = u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
    weights[8 + header..].fill(0);
    std::fs::write(unfinished.join("model.safetensors"), weights).unwrap();
    let out = strait(&["plan", unfinished.to_str().unwrap()]);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && said.contains("is zeros wherever it was looked at") && said.contains("download"), "{said}");
    std::fs::remove_dir_all(&unfinished).unwrap();

    let none = strait(&["plan", "--lengths", "512,0"]);
    assert_eq!((none.status.code(), none.stdout.len()), (Some(1), 0));
    assert!(String::from_utf8(none.stderr).unwrap().starts_with("strait: --lengths has 0; "));
    let table = String::from_utf8(strait(&["plan", "--lengths", "512,256,512"]).stdout).unwrap();
    assert_eq!((table.matches("x 512 tokens").count(), table.matches("x 256 tokens").count()), (1, 1), "{table}");
}
