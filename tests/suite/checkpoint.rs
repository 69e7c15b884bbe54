//! Model folders, good and bad: each bad one is refused with a sentence that names the culprit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Value, json};
use strait::model::checkpoint::{Checkpoint, CheckpointError, Unmapped};
use strait::model::config::RopeScaling;
use strait::model::weights::{Data, LoadDtype};
use strait::model::{config_json, header};

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("strait-checkpoint-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Folder {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One tensor to write: type, shape, bytes.
type Tensor = (&'static str, Vec<usize>, Vec<u8>);
type Tensors = BTreeMap<String, Tensor>;

fn file(tensors: &Tensors) -> Vec<u8> {
    file_padded(tensors, 8)
}

/// A safetensors file whose data section begins at a multiple of `align` plus whatever remains of `align` itself.
fn file_padded(tensors: &Tensors, align: usize) -> Vec<u8> {
    let mut at = 0;
    let mut map = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        map.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes.len()] }));
        at += bytes.len();
        data.extend_from_slice(bytes);
    }
    let mut header = Value::Object(map).to_string();
    while !header.len().is_multiple_of(align) || align == 1 && header.len().is_multiple_of(2) {
        header.push(' ');
    }
    raw(&header, &data)
}

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out
}

/// Deterministic values of both signs, exact in every stored type.
fn values(n: usize, salt: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + salt * 11) % 64) as f32 / 32.0 - 1.0).collect()
}

fn tensor(dtype: &'static str, shape: &[usize], salt: usize) -> Tensor {
    let v = values(shape.iter().product(), salt);
    let bytes = match dtype {
        "F32" => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        "BF16" => v.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        "F16" => v.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        other => panic!("no values of type {other}"),
    };
    (dtype, shape.to_vec(), bytes)
}

fn config() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true, "eos_token_id": 3
    })
}

/// What `config` asks for, all of one type.
fn tensors(config: &Value, dtype: &'static str) -> Tensors {
    let n = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, inner, vocab) = (n("hidden_size"), n("intermediate_size"), n("vocab_size"));
    let head = config.get("head_dim").and_then(Value::as_u64).map_or(hidden / n("num_attention_heads"), |d| d as usize);
    let (q, kv) = (head * n("num_attention_heads"), head * n("num_key_value_heads"));
    let family = config["model_type"].as_str().unwrap();
    let mut shapes: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![vocab, hidden]), ("model.norm.weight".into(), vec![hidden])];
    if config["tie_word_embeddings"] != json!(true) {
        shapes.push(("lm_head.weight".into(), vec![vocab, hidden]));
    }
    for i in 0..n("num_hidden_layers") {
        let mut add = |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{i}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        for (name, to, from) in [("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)] {
            add(&format!("self_attn.{name}_proj.weight"), &[to, from]);
            if family == "qwen2" && name != "o" {
                add(&format!("self_attn.{name}_proj.bias"), &[to]);
            }
        }
        if family == "qwen3" {
            add("self_attn.q_norm.weight", &[head]);
            add("self_attn.k_norm.weight", &[head]);
        }
        add("mlp.gate_proj.weight", &[inner, hidden]);
        add("mlp.up_proj.weight", &[inner, hidden]);
        add("mlp.down_proj.weight", &[hidden, inner]);
    }
    shapes.into_iter().enumerate().map(|(i, (name, shape))| (name, tensor(dtype, &shape, i))).collect()
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn open(config: &Value, safetensors: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let folder = Folder::new();
    folder.put("config.json", config.to_string()).put("model.safetensors", safetensors);
    Checkpoint::open(&folder.0)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, CheckpointError>, words: &[&str]) {
    let message = result.expect_err("must be refused").to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(message.len() < 600 && !message.contains('\n'), "one short sentence: {message}");
}

#[test]
fn every_family_and_type_loads_in_place_and_converts() {
    for (family, class) in
        [("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")]
    {
        let config = with(
            config(),
            json!({ "model_type": family, "architectures": [class], "tie_word_embeddings": family == "llama", "head_dim": 4, "sliding_window": null }),
        );
        for dtype in ["F32", "BF16", "F16"] {
            let stored = tensors(&config, dtype);
            let folder = Folder::new();
            folder.put("config.json", config.to_string()).put("model.safetensors", file(&stored));
            let checkpoint = Checkpoint::open(&folder.0).unwrap();
            checkpoint.digest().unwrap();
            for load in [LoadDtype::Auto, LoadDtype::F32, LoadDtype::Bf16] {
                let weights = checkpoint.weights(load);
                let bf = load == LoadDtype::Bf16 || load == LoadDtype::Auto && dtype == "BF16";
                let in_place = dtype == "BF16" && bf || dtype == "F32" && !bf;
                assert_eq!(weights.layers.len(), 2);
                // All are held, norms and biases in f32.
                let elements =
                    |rank: usize| stored.values().filter(|t| t.1.len() == rank).map(|t| t.1.iter().product::<usize>()).sum::<usize>();
                let held = elements(2) * if bf { 2 } else { 4 } + elements(1) * 4;
                assert_eq!(weights.bytes(), held as u64, "{family} {dtype} {load:?}");
                let name = "model.layers.1.self_attn.k_proj.weight";
                let k = &weights.layers[1].k.weight;
                let salt = tensors(&config, dtype).into_iter().find(|(n, _)| n == name).unwrap().1;
                let want: Vec<f32> = match dtype {
                    "F32" => salt.2.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
                    "BF16" => salt.2.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
                    _ => salt.2.chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
                };
                let got: Vec<f32> = match &k.data {
                    Data::F32(d) => d.to_vec(),
                    Data::Bf16(d) => d.iter().map(|x| x.to_f32()).collect(),
                };
                assert_eq!((k.out_features, k.in_features, got), (4, 8, want), "{family} {dtype} {load:?}");
                assert_eq!((matches!(k.data, Data::Bf16(_)), k.is_borrowed()), (bf, in_place), "{family} {dtype} {load:?}");
                assert_eq!(weights.layers[0].q.bias.is_some(), family == "qwen2");
                assert_eq!(weights.layers[0].q_norm.is_some(), family == "qwen3");
                assert_eq!(weights.untied_head.is_none(), family == "llama");
                assert_eq!(weights.head().out_features, 10);
                let mut row = vec![0.0; 8];
                weights.embed.row(9, &mut row);
                assert!(row.iter().any(|&x| x != 0.0));
            }
        }
    }
}

#[test]
fn an_odd_header_costs_a_copy_and_nothing_else() {
    let config = config();
    for dtype in ["F32", "BF16"] {
        let stored = tensors(&config, dtype);
        let aligned = open(&config, &file(&stored)).unwrap();
        let odd = open(&config, &file_padded(&stored, 1)).unwrap();
        let (a, b) = (aligned.weights(LoadDtype::Auto), odd.weights(LoadDtype::Auto));
        assert!(a.embed.is_borrowed() && !b.embed.is_borrowed());
        let matrices: usize = stored.values().filter(|t| t.1.len() == 2).map(|t| t.2.len()).sum();
        assert_eq!((a.mapped_bytes(), b.mapped_bytes()), (matrices as u64, 0));
        assert_eq!(a, b);
        assert_eq!(aligned.digest().unwrap(), odd.digest().unwrap(), "where the header ends is no part of the identity");
    }
}

/// What is asked before anything is converted is what it comes to.
#[test]
fn how_weights_would_be_held_is_known_without_them() {
    let config = config();
    for stored in ["F32", "F16", "BF16"] {
        let checkpoint = open(&config, &file(&tensors(&config, stored))).unwrap();
        for dtype in [LoadDtype::Auto, LoadDtype::Bf16, LoadDtype::F32] {
            let held = matches!(checkpoint.weights(dtype).embed.data, Data::Bf16(_));
            assert_eq!(checkpoint.is_held_in_bf16(dtype), held, "{stored} as {dtype:?}");
        }
        assert_eq!(checkpoint.positions(), checkpoint.config.max_positions);
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let mut tiny = Tensors::new();
    tiny.insert("a".into(), tensor("F32", &[3, 5], 1));
    tiny.insert("b".into(), tensor("BF16", &[7], 2));
    let whole = file(&tiny);
    assert!(header::parse(&whole, header::Limits::MODEL).is_ok());
    for n in 0..whole.len() {
        assert!(header::parse(&whole[..n], header::Limits::MODEL).is_err(), "cut at {n}");
    }
    // And through the front door, where an empty file cannot even be mapped.
    let config = config();
    let whole = file(&tensors(&config, "BF16"));
    for n in [0, 1, 7, 8, 9, 100, whole.len() - 1] {
        refused(open(&config, &whole[..n]), &["model.safetensors", "download it again"]);
    }
    // What a clone has where Git LFS fetched nothing, mapped or not.
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 2471645608\n";
    refused(open(&config, pointer), &["model.safetensors is a Git LFS pointer", "`git lfs pull`"]);
    let folder = Folder::new();
    folder.put("config.json", config.to_string()).put("model.safetensors", pointer);
    refused(Unmapped::open(&folder.0), &["model.safetensors is a Git LFS pointer"]);
}

#[test]
fn a_flipped_bit_in_the_header_is_refused_or_loads_equal_shapes() {
    let config = with(config(), json!({ "num_hidden_layers": 1 }));
    let good = file(&tensors(&config, "BF16"));
    let n = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let parsed = header::parse(&good, header::Limits::MODEL).unwrap();
    let mut same = 0;
    for at in 0..n {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            if let Ok(entries) = header::parse(&bad, header::Limits::MODEL) {
                // Only a name may differ (the checkpoint refuses that by name), a type of equal size, or a split of a shape.
                assert_eq!(entries.len(), parsed.len(), "byte {at} bit {bit}");
                let spans = |m: &BTreeMap<String, header::Entry>| {
                    let mut v: Vec<_> = m.values().map(|e| (e.begin, e.end)).collect();
                    v.sort_unstable();
                    v
                };
                assert_eq!(spans(&entries), spans(&parsed), "byte {at} bit {bit}");
                same += 1;
            }
        }
    }
    assert!(same > 0, "the loop flipped nothing that a name could absorb");
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let entry =
        |dtype: &str, shape: &str, from: u64, to: u64| format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#);
    let e = |s: &str| s.to_owned();
    let long_shape = format!("[{}]", vec!["1"; 1_000_000].join(","));
    let cases: Vec<(String, usize, &str)> = vec![
        (e("{}"), 4, "4 bytes after its last tensor"),
        (format!(r#"{{"a":{},"a":{}}}"#, entry("F32", "[1]", 0, 4), entry("F32", "[1]", 0, 4)), 4, "`a` is given twice"),
        (format!(r#"{{"../x":{}}}"#, entry("F32", "[1]", 0, 4)), 4, "../x"),
        (format!(r#"{{"a\u0000":{}}}"#, entry("F32", "[1]", 0, 4)), 4, "name"),
        (format!(r#"{{"":{}}}"#, entry("F32", "[1]", 0, 4)), 4, "name"),
        (format!(r#"{{"a":{}}}"#, entry("F32", "[0,18446744073709551615]", 0, 0)), 0, "overflows"),
        (format!(r#"{{"a":{}}}"#, entry("F32", "[4294967296,4294967296]", 0, 4)), 4, "overflows"),
        (format!(r#"{{"a":{}}}"#, entry("F32", "[2]", 0, 4)), 4, "need 8 bytes"),
        (format!(r#"{{"a":{}}}"#, entry("F32", &long_shape, 0, 4)), 4, "a list of more than 8"),
        (format!(r#"{{"a":{}}}"#, entry("F32", "[-1]", 0, 4)), 4, "does not parse"),
        (format!(r#"{{"a":{}}}"#, entry("Q4", "[1]", 0, 4)), 4, "type Q4"),
        (format!(r#"{{"a":{},"b":{}}}"#, entry("F32", "[1]", 0, 4), entry("F32", "[1]", 2, 6)), 6, "`b` beginning at byte 2 where 4"),
        (format!(r#"{{"a":{},"b":{}}}"#, entry("F32", "[1]", 0, 4), entry("F32", "[1]", 8, 12)), 12, "`b` beginning at byte 8 where 4"),
        (format!(r#"{{"a":{}}}"#, entry("F32", "[1]", 4, 0)), 4, "bytes 4..0"),
        (format!(r#"{{"a":{}}}"#, entry("F32", "[4]", 0, 16)), 4, "data section of 4"),
        (format!(r#"{{"a":{}}}"#, entry("F32", "[1]", 0, 4)), 9, "5 bytes after"),
        (e(r#"{"a":["F32",[1],[0,4]]}"#), 4, "does not parse"),
        (e(r#"{"a":{"dtype":"F32","shape":[1]}}"#), 4, "data_offsets"),
        (e(r#"{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#), 4, "`dtype` is given twice"),
        (e(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#), 4, "unknown key `x`"),
        (e(r#"{"__metadata__":{"a":1}}"#), 0, "does not parse"),
        (format!(r#"{{"a":{}"#, "[".repeat(100_000)), 0, "does not parse"),
        (e("[]"), 0, "does not parse"),
        (e("{} {}"), 0, "does not parse"),
    ];
    for (text, data, words) in cases {
        let error = header::parse(&raw(&text, &vec![0; data]), header::Limits::MODEL).expect_err(&text[..text.len().min(200)]).to_string();
        assert!(error.contains(words), "`{words}` is not in: {error}");
        assert!(error.len() < 400, "{error}");
    }
    // Lengths: 2^64 - 1, beyond the file, beyond the limit; and too many tensors for an adapter.
    for (length, words) in [(u64::MAX, "truncated"), (100, "truncated"), (0, "truncated"), (1, "truncated")] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        assert!(header::parse(&bytes, header::Limits::MODEL).unwrap_err().to_string().contains(words), "{length}");
    }
    let limits = header::Limits { header_bytes: 64, tensors: 1 };
    let two = format!(r#"{{"a":{},"b":{}}}"#, entry("F32", "[1]", 0, 4), entry("F32", "[1]", 4, 8));
    assert!(header::parse(&raw(&two, &[0; 8]), limits).unwrap_err().to_string().contains("more than the 64 allowed"));
    let limits = header::Limits { header_bytes: 1 << 20, tensors: 1 };
    assert!(header::parse(&raw(&two, &[0; 8]), limits).unwrap_err().to_string().contains("more than 1 tensors"));
}

#[test]
fn shards_and_their_index_must_agree() {
    let config = with(config(), json!({ "tie_word_embeddings": false }));
    let all = tensors(&config, "BF16");
    let (mut one, mut two) = (all.clone(), Tensors::new());
    for name in all.keys().filter(|n| n.contains("layers.1.")) {
        two.insert(name.clone(), one.remove(name).unwrap());
    }
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let place = |name: &String| if name.contains("layers.1.") { second } else { first };
    let map: serde_json::Map<String, Value> = all.keys().map(|n| (n.clone(), json!(place(n)))).collect();
    let total: usize = all.values().map(|t| t.2.len()).sum();
    let index = |map: &serde_json::Map<String, Value>| json!({ "metadata": { "total_size": total }, "weight_map": map }).to_string();
    let folder = |index: &str| {
        let f = Folder::new();
        f.put("config.json", config.to_string()).put(first, file(&one)).put(second, file(&two)).put("model.safetensors.index.json", index);
        f
    };
    let open = |f: &Folder| Checkpoint::open(&f.0);

    let good = folder(&index(&map));
    let sharded = open(&good).unwrap();
    assert_eq!(sharded.warnings, Vec::<String>::new());
    assert_eq!(
        sharded.digest().unwrap(),
        self::open(&config, &file(&all)).unwrap().digest().unwrap(),
        "shards are no part of the identity"
    );

    std::fs::remove_file(good.0.join(second)).unwrap();
    refused(open(&good), &[second, "not in the folder"]);

    let mut odd = map.clone();
    odd.insert("model.ghost".into(), json!(first));
    refused(open(&folder(&index(&odd))), &["model.ghost", first]);

    let mut odd = map.clone();
    odd.remove("model.norm.weight");
    refused(open(&folder(&index(&odd))), &["model.norm.weight", "nowhere"]);

    let f = folder(&index(&map));
    let mut both = two.clone();
    both.insert("model.norm.weight".into(), all["model.norm.weight"].clone());
    f.put(second, file(&both));
    refused(open(&f), &["model.norm.weight", first, second]);

    let f = folder(&index(&map));
    let bytes = file(&two);
    f.put(second, &bytes[..bytes.len() - 1]);
    refused(open(&f), &[second, "truncated"]);

    for path in ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", ""] {
        let mut odd = map.clone();
        odd.insert("model.norm.weight".into(), json!(path));
        refused(open(&folder(&index(&odd))), &["model.norm.weight", "plain name"]);
    }
    let twice = index(&map).replacen("{\"lm_head.weight\"", "{\"model.norm.weight\":\"x.safetensors\",\"lm_head.weight\"", 1);
    refused(open(&folder(&twice)), &["index.json", "given twice"]);
    let other_total = index(&map).replace(&total.to_string(), "7");
    assert!(open(&folder(&other_total)).unwrap().warnings[0].contains("states 7 bytes"));
}

#[test]
fn folders_and_files_that_are_not_models_are_refused() {
    let empty = Folder::new();
    refused(Checkpoint::open(&empty.0), &["config.json"]);
    refused(Checkpoint::open(&empty.0.join("config.json")), &["is not a folder"]);
    empty.put("config.json", config().to_string());
    refused(Checkpoint::open(&empty.0), &["neither model.safetensors nor", "download"]);
    empty.put("pytorch_model.bin", "x");
    refused(Checkpoint::open(&empty.0), &["pickle", "convert"]);
    std::fs::create_dir(empty.0.join("model.safetensors")).unwrap();
    refused(Checkpoint::open(&empty.0), &["not a regular file"]);
    empty.put("config.json", vec![b' '; (4 << 20) + 1]);
    refused(Checkpoint::open(&empty.0), &["config.json", "more than"]);
    refused(Checkpoint::open(Path::new("/nonexistent")), &["is not a folder"]);
}

/// As a hub's cache has it: the snapshot's files are links to blobs named by their hashes.
#[cfg(unix)]
#[test]
fn files_may_be_links() {
    let (blobs, snapshot) = (Folder::new(), Folder::new());
    let config = config();
    blobs.put("1a2b", config.to_string()).put("3c4d", file(&tensors(&config, "BF16")));
    for (blob, name) in [("1a2b", "config.json"), ("3c4d", "model.safetensors")] {
        std::os::unix::fs::symlink(blobs.0.join(blob), snapshot.0.join(name)).unwrap();
    }
    assert_eq!(Checkpoint::open(&snapshot.0).unwrap().config.layers, 2);
    std::fs::remove_file(blobs.0.join("3c4d")).unwrap();
    refused(Checkpoint::open(&snapshot.0), &["model.safetensors"]);
}

#[test]
fn what_is_not_mapped_is_the_same_and_outlives_its_files() {
    let copied = |name: &str| {
        let folder = Folder::new();
        for file in std::fs::read_dir(crate::golden::folder(name)).unwrap() {
            let path = file.unwrap().path();
            folder.put(path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
        }
        folder
    };
    for name in crate::golden::MODELS.iter().chain(&["maestro", "welore"]) {
        let dir = crate::golden::folder(name);
        let (mapped, unmapped) = (Checkpoint::open(&dir).unwrap(), Unmapped::open(&dir).unwrap());
        assert_eq!(unmapped.config(), &mapped.config);
        assert_eq!(unmapped.digest().unwrap(), mapped.digest().unwrap(), "{name}");
        for part in ["self_attn.q_proj", "mlp.down_proj", "mlp.nothing"] {
            let path = format!("model.layers.0.{part}");
            assert_eq!(unmapped.linear(&path).unwrap(), mapped.linear(&path), "{name} {path}");
        }
        let norm = mapped.tensor("model.norm.weight").unwrap().data.len();
        assert!(norm > 0 && unmapped.floats("model.norm.weight").unwrap().is_some() && unmapped.floats("nothing").unwrap().is_none());
    }
    // A file that is cut short is an error of the next read, whatever was read before; one that is replaced is read as it was.
    let folder = copied("llama2");
    let (file, path) = (folder.0.join("model.safetensors"), "model.layers.0.self_attn.q_proj");
    let (unmapped, whole) = (Unmapped::open(&folder.0).unwrap(), std::fs::read(&file).unwrap());
    let weights = unmapped.linear(path).unwrap();
    std::fs::rename(&file, folder.0.join("old")).unwrap();
    folder.put("model.safetensors", "something else");
    assert_eq!(unmapped.linear(path).unwrap(), weights);
    std::fs::File::options().write(true).open(folder.0.join("old")).unwrap().set_len(200).unwrap();
    refused(unmapped.linear(path), &["model.safetensors", "became shorter"]);
    refused(unmapped.digest(), &["model.safetensors", "became shorter"]);
    // What is cut before it is opened is refused as a mapped one is.
    for cut in [0, 7, 8, 9, 200, whole.len() - 1] {
        folder.put("model.safetensors", &whole[..cut]);
        let (a, b) = (Unmapped::open(&folder.0).unwrap_err().to_string(), Checkpoint::open(&folder.0).unwrap_err().to_string());
        assert_eq!(a, b, "cut to {cut}");
    }
}

#[test]
fn tensors_must_be_those_of_the_configuration() {
    let config = config();
    let change = |f: &dyn Fn(&mut Tensors)| {
        let mut t = tensors(&config, "BF16");
        f(&mut t);
        open(&config, &file(&t))
    };
    refused(
        change(&|t| {
            t.remove("model.norm.weight");
        }),
        &["`model.norm.weight` is missing"],
    );
    refused(
        change(&|t| {
            t.insert("model.layers.2.mlp.up_proj.weight".into(), tensor("BF16", &[6, 8], 0));
        }),
        &["layers.2.mlp.up_proj", "2 layers"],
    );
    refused(
        change(&|t| {
            t.insert("model.layers.0.self_attn.q_proj.bias".into(), tensor("BF16", &[8], 0));
        }),
        &["q_proj.bias", "belongs to nothing"],
    );
    refused(
        change(&|t| {
            t.insert("model.layers.0.mlp.up_proj.weight".into(), tensor("BF16", &[8, 6], 0));
        }),
        &["layers.0.mlp.up_proj", "[8, 6]", "[6, 8]"],
    );
    refused(
        change(&|t| {
            t.insert("model.norm.weight".into(), ("I32", vec![8], vec![0; 32]));
        }),
        &["model.norm.weight", "I32", "BF16"],
    );
    // Recomputed buffers of old conversions change nothing, whatever their type.
    change(&|t| {
        t.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), tensor("F32", &[2], 0));
    })
    .unwrap();
    // A tied head may be there if it is the embedding.
    change(&|t| {
        t.insert("lm_head.weight".into(), t["model.embed_tokens.weight"].clone());
    })
    .unwrap();
    refused(
        change(&|t| {
            t.insert("lm_head.weight".into(), tensor("BF16", &[10, 8], 77));
        }),
        &["lm_head.weight", "differs", "tie_word_embeddings"],
    );
    refused(
        change(&|t| {
            t.insert("lm_head.weight".into(), tensor("BF16", &[9, 8], 77));
        }),
        &["lm_head.weight", "[9, 8]"],
    );
    // And an untied one must be.
    let untied = with(config.clone(), json!({ "tie_word_embeddings": false }));
    refused(open(&untied, &file(&tensors(&config, "BF16"))), &["`lm_head.weight` is missing", "tie_word_embeddings"]);

    let poison = |bytes: [u8; 2]| {
        let mut t = tensors(&config, "BF16");
        t.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().2[6..8].copy_from_slice(&bytes);
        open(&config, &file(&t)).unwrap().digest()
    };
    refused(poison(bf16::NAN.to_le_bytes()), &["layers.1.mlp.up_proj", "model.safetensors", "NaN", "element 3"]);
    refused(poison(bf16::INFINITY.to_le_bytes()), &["layers.1.mlp.up_proj", "inf"]);
    let mut t = tensors(&config, "BF16");
    t.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().2.fill(0);
    refused(
        open(&config, &file(&t)).unwrap().digest(),
        &["layers.1.mlp.up_proj", "model.safetensors is zeros", "download model.safetensors again"],
    );
}

/// A file that was given its length before the download that never came; and of what is too long to be read whole, samples.
#[test]
fn a_matrix_of_zeros_is_no_weight_and_rows_of_zeros_are_none_the_less() {
    for dtype in ["BF16", "F32"] {
        let large = with(config(), json!({ "vocab_size": 20_000 }));
        let embed = |change: &dyn Fn(&mut [u8])| {
            let mut t = tensors(&large, dtype);
            change(&mut t.get_mut("model.embed_tokens.weight").unwrap().2);
            open(&large, &file(&t)).unwrap().digest()
        };
        refused(embed(&|bytes| bytes.fill(0)), &["model.embed_tokens.weight", "is zeros wherever it was looked at", "download"]);
        // Padded rows, and a single block that has come.
        embed(&|bytes| bytes[8192..].fill(0)).unwrap();
        embed(&|bytes| {
            let last = bytes.len() - 8192;
            bytes[..last].fill(0);
        })
        .unwrap();
        // The last element, which is in the last of the samples, wherever that begins.
        let size = if dtype == "F32" { 4 } else { 2 };
        let infinite = |bytes: &mut [u8]| {
            let at = bytes.len() - size;
            bytes[at..].copy_from_slice(&f32::INFINITY.to_le_bytes()[4 - size..]);
        };
        refused(embed(&infinite), &["model.embed_tokens.weight", "has inf at element 159999"]);
    }
    // Biases may well be zeros.
    let biased = with(config(), json!({ "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"] }));
    let mut t = tensors(&biased, "BF16");
    t.get_mut("model.layers.0.self_attn.q_proj.bias").unwrap().2.fill(0);
    open(&biased, &file(&t)).unwrap().digest().unwrap();
}

#[test]
fn the_digest_tells_models_apart() {
    let config = config();
    let digest = |config: &Value, f: &dyn Fn(&mut Tensors)| {
        let mut t = tensors(config, "BF16");
        f(&mut t);
        open(config, &file(&t)).unwrap().digest().unwrap()
    };
    let base = digest(&config, &|_| ());
    assert_eq!(base, digest(&config, &|_| ()));
    assert_ne!(base, digest(&config, &|t| t.get_mut("model.norm.weight").unwrap().2[3] ^= 1));
    assert_ne!(base, digest(&with(config.clone(), json!({ "rope_theta": 20000.0 })), &|_| ()));
    assert_ne!(base, digest(&with(config.clone(), json!({ "rms_norm_eps": 1e-6 })), &|_| ()));
    assert_eq!(base, digest(&with(config.clone(), json!({ "torch_dtype": "bfloat16" })), &|_| ()));
}

fn parse(config: &Value) -> Result<config_json::Parsed, config_json::ConfigError> {
    config_json::parse(config.to_string().as_bytes())
}

#[test]
fn both_spellings_of_rope_mean_the_same() {
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 });
    let v4 = with(config(), json!({ "rope_theta": 500000.0, "rope_scaling": llama3, "max_position_embeddings": 131072 }));
    let v5 = with(
        config(),
        json!({ "rope_parameters": with(llama3.clone(), json!({ "rope_theta": 500000.0 })), "max_position_embeddings": 131072, "dtype": "bfloat16" }),
    );
    let (v4, v5) = (parse(&v4).unwrap(), parse(&v5).unwrap());
    assert_eq!(v4.config, v5.config);
    assert_eq!(v4.config.max_positions, 131072);
    assert_eq!(
        (v4.config.rope.theta, &v4.config.rope.scaling),
        (500000.0, &RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 8192.0 })
    );

    let linear = parse(&with(config(), json!({ "rope_scaling": { "type": "linear", "factor": 4 } }))).unwrap().config;
    assert_eq!((linear.rope.scaling, linear.max_positions), (RopeScaling::Linear { factor: 4.0 }, 512));

    let yarn = json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 }, "max_position_embeddings": 32768 });
    let yarn = parse(&with(config(), yarn)).unwrap().config;
    let RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, attention_factor, truncate } = yarn.rope.scaling else {
        panic!("yarn")
    };
    assert_eq!(
        (factor, beta_fast, beta_slow, original_max_positions, truncate, yarn.max_positions),
        (4.0, 32.0, 1.0, 32768.0, true, 131072)
    );
    assert!((attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    let default = parse(&with(config(), json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 1e6 } }))).unwrap().config;
    assert_eq!((default.rope.theta, default.rope.scaling), (1e6, RopeScaling::None));
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let cases = [
        (json!({ "quantization_config": { "quant_method": "gptq" } }), &["quantization_config", "gptq", "quantised"][..]),
        (json!({ "quantization_config": { "quant_method": "fp8" } }), &["fp8", "BF16, F16 or F32 that this one was made of"]),
        (
            json!({ "dual_chunk_attention_config": { "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144 } }),
            &["dual_chunk_attention_config", "up to 253952 positions", "remove the key", "--max-model-len 253952"],
        ),
        (
            json!({ "dual_chunk_attention_config": { "chunk_size": 1, "local_size": 2 } }),
            &["chunked attention", "serve a model without it"],
        ),
        (json!({ "hidden_act": "gelu" }), &["hidden_act", "gelu"]),
        (json!({ "partial_rotary_factor": 0.5 }), &["partial_rotary_factor", "0.5"]),
        (json!({ "rope_parameters": { "rope_type": "default", "partial_rotary_factor": 0.5 } }), &["partial_rotary_factor", "0.5"]),
        (json!({ "attn_logit_softcapping": 50.0 }), &["attn_logit_softcapping", "50"]),
        (json!({ "logits_scaling": 8.0 }), &["logits_scaling", "8"]),
        (json!({ "embedding_multiplier": 12.0 }), &["embedding_multiplier", "12"]),
        (json!({ "residual_multiplier": 0.22 }), &["residual_multiplier", "0.22"]),
        (json!({ "attention_multiplier": 0.015625 }), &["attention_multiplier"]),
        (json!({ "clip_qkv": 8.0 }), &["clip_qkv", "8"]),
        (json!({ "alibi": true }), &["alibi", "true"]),
        (json!({ "is_llama_config": false }), &["is_llama_config", "false", "another architecture"]),
        (json!({ "num_experts": 8 }), &["num_experts", "8"]),
        (json!({ "num_local_experts": 8 }), &["num_local_experts", "8"]),
        (json!({ "auto_map": { "AutoModelForCausalLM": "modeling.X" } }), &["auto_map", "code"]),
        (json!({ "is_causal": false }), &["is_causal", "false"]),
        (json!({ "head_dim": 5 }), &["head_dim", "5", "even"]),
        (json!({ "head_dim": 0 }), &["head_dim", "0"]),
        (json!({ "num_attention_heads": 0 }), &["num_attention_heads", "0"]),
        (json!({ "num_attention_heads": 3, "num_key_value_heads": 2 }), &["num_key_value_heads", "2", "3"]),
        (json!({ "num_hidden_layers": 1_000_000 }), &["num_hidden_layers", "1000000"]),
        (json!({ "vocab_size": 0 }), &["vocab_size", "0"]),
        (json!({ "vocab_size": 4_294_967_296u64 }), &["vocab_size", "4294967296"]),
        (json!({ "rope_theta": 0.0 }), &["rope_theta", "0"]),
        (json!({ "rope_theta": "NaN" }), &["rope_theta", "NaN"]),
        (json!({ "rms_norm_eps": 0 }), &["rms_norm_eps", "0"]),
        (json!({ "max_position_embeddings": 2_147_483_648u64 }), &["max_position_embeddings", "2147483648"]),
        (json!({ "hidden_size": 8.5 }), &["hidden_size", "8.5"]),
        (json!({ "hidden_size": "8" }), &["hidden_size", "\"8\""]),
        (json!({ "hidden_size": -8 }), &["hidden_size", "-8"]),
        (json!({ "hidden_size": null }), &["no `hidden_size`"]),
        (json!({ "eos_token_id": 10 }), &["eos_token_id", "10"]),
        (json!({ "model_type": "gemma2" }), &["model_type", "gemma2", "qwen3"]),
        (json!({ "model_type": null }), &["no `model_type`"]),
        (json!({ "architectures": ["LlamaForSequenceClassification"] }), &["architectures", "LlamaForSequenceClassification"]),
        (json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }), &["rope_type", "dynamic"]),
        (
            json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }),
            &["up to 128 positions the model is the same", "remove rope_scaling"],
        ),
        (
            json!({ "rope_parameters": { "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4 } }),
            &["make rope_type default, without a factor"],
        ),
        (json!({ "rope_scaling": { "type": "longrope", "short_factor": [1.0], "long_factor": [1.0] } }), &["longrope"]),
        (json!({ "rope_scaling": { "type": "mrope", "rope_type": "default" } }), &["rope_type", "mrope", "contradict"]),
        (json!({ "rope_scaling": { "rope_type": "linear" } }), &["no `factor`"]),
        (json!({ "rope_scaling": { "rope_type": "linear", "factor": 0.0 } }), &["factor", "0"]),
        (json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.0, "surprise": 3 } }), &["rope_scaling.surprise", "3"]),
        (json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "mscale": 0.7 } }), &["mscale", "0.7"]),
        (json!({ "rope_parameters": { "full_attention": { "rope_type": "default" } } }), &["rope_parameters.full_attention"]),
        (json!({ "rope_theta": 5.0, "rope_parameters": { "rope_type": "default", "rope_theta": 6.0 } }), &["rope_theta", "5", "6"]),
        (json!({ "layer_types": ["full_attention", "linear_attention"] }), &["layer_types", "linear_attention"]),
        (json!({ "layer_types": ["full_attention"] }), &["layer_types", "2 kinds"]),
        (json!({ "mystery_scale": 1.5 }), &["mystery_scale", "1.5", "does not know"]),
        (json!({ "mystery_switch": true }), &["mystery_switch", "true"]),
        (json!({ "mystery_mode": "odd" }), &["mystery_mode", "odd"]),
    ];
    for (change, words) in cases {
        let error = parse(&with(config(), change.clone())).expect_err(&change.to_string()).to_string();
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    }
    for text in ["", "{", "[]", "null", "{\"model_type\":\"llama\",\"model_type\":\"qwen2\"}", "\u{feff}{}", "{\"model_type\":1e999}"] {
        assert!(config_json::parse(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn harmless_keys_pass_and_bookkeeping_is_mentioned() {
    let harmless = json!({
        "mystery": null, "mystery_switch": false, "mystery_list": [], "quantization_config": null, "partial_rotary_factor": 1.0, "pretraining_tp": 2,
        "torch_dtype": "float16", "_name_or_path": "x/y", "attention_bias": false, "logits_scaling": 1.0, "use_cache": false, "num_experts": 0
    });
    let parsed = parse(&with(config(), harmless)).unwrap();
    assert_eq!(parsed.config, parse(&config()).unwrap().config);
    assert_eq!(parsed.warnings.len(), 1, "{:?}", parsed.warnings);
    assert!(parsed.warnings[0].contains("_name_or_path"));
    assert_eq!(parsed.eos, [3]);
    // SmolLM2's, a plain Llama.
    let smol = json!({
        "is_llama_config": true, "rope_interleaved": false, "rope_scaling": null, "pretraining_tp": 1,
        "transformers.js_config": { "dtype": "q4", "kv_cache_dtype": { "q4f16": "float16", "fp16": "float16" } }
    });
    let parsed = parse(&with(config(), smol)).unwrap();
    assert_eq!(parsed.config, parse(&config()).unwrap().config);
    assert_eq!(parsed.warnings, Vec::<String>::new());
}

#[test]
fn a_sliding_window_caps_the_context_instead_of_being_ignored() {
    let mistral = |change: Value| with(with(config(), json!({ "model_type": "mistral", "architectures": ["MistralForCausalLM"] })), change);
    let qwen = |change: Value| with(with(config(), json!({ "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"] })), change);
    let cases = [
        (mistral(json!({ "sliding_window": 64 })), Some(64)),
        (mistral(json!({ "sliding_window": null })), None),
        (mistral(json!({})), Some(4096)),
        (qwen(json!({ "sliding_window": 64, "use_sliding_window": false, "max_window_layers": 1 })), None),
        (qwen(json!({ "sliding_window": 64, "use_sliding_window": true, "max_window_layers": 2 })), None),
        (qwen(json!({ "sliding_window": 64, "use_sliding_window": true, "max_window_layers": 1 })), Some(64)),
        (
            qwen(json!({ "sliding_window": 64, "use_sliding_window": true, "layer_types": ["full_attention", "sliding_attention"] })),
            Some(64),
        ),
        (qwen(json!({ "sliding_window": 64, "use_sliding_window": true, "layer_types": ["full_attention", "full_attention"] })), None),
    ];
    for (config, want) in cases {
        assert_eq!(parse(&config).unwrap().sliding_window, want, "{config}");
    }
    let config = mistral(json!({ "sliding_window": 64 }));
    let checkpoint = open(&config, &file(&tensors(&config, "BF16"))).unwrap();
    checkpoint.check_context(64).unwrap();
    refused(checkpoint.check_context(65), &["64", "65", "--max-model-len"]);
}

#[test]
fn generation_defaults_come_from_their_file_or_are_refused() {
    let config = config();
    let weights = file(&tensors(&config, "BF16"));
    let open = |generation: Value| {
        let folder = Folder::new();
        folder
            .put("config.json", config.to_string())
            .put("model.safetensors", &weights)
            .put("generation_config.json", generation.to_string());
        Checkpoint::open(&folder.0)
    };
    let g = open(json!({ "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 99, "eos_token_id": [7, 3, 5] })).unwrap().generation;
    assert_eq!(
        (g.sampling.temperature, g.sampling.top_p, g.sampling.top_k, g.sampling.min_p, g.sampling.repetition_penalty),
        (0.6, 0.9, 20, 0.05, 1.1)
    );
    assert_eq!((g.max_new_tokens, g.eos), (Some(99), vec![3, 5, 7]));
    assert_eq!(open(json!({ "do_sample": false, "temperature": 0.6 })).unwrap().generation.sampling.temperature, 0.0);
    assert_eq!(open(json!({})).unwrap().generation.sampling.temperature, 1.0);
    assert!(open(json!({ "num_beams": 4 })).unwrap().warnings[0].contains("num_beams"));
    for (key, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("max_new_tokens", json!(0)),
        ("eos_token_id", json!(10)),
        ("eos_token_id", json!("x")),
        ("do_sample", json!(1)),
    ] {
        refused(open(json!({ key: value })), &["generation_config.json", key]);
    }
}

#[test]
fn the_demo_model_loads_in_place() {
    let checkpoint = strait::demo::checkpoint().unwrap();
    let c = &checkpoint.config;
    assert_eq!((c.hidden, c.layers, c.heads, c.kv_heads, c.head_dim, c.vocab, c.max_positions), (192, 5, 4, 2, 64, 2048, 16384));
    assert_eq!(checkpoint.warnings, Vec::<String>::new());
    assert_eq!(checkpoint.generation.eos, [2, 6]);
    assert_eq!(checkpoint.generation.sampling.temperature, 0.0);
    checkpoint.digest().unwrap();
    let weights = checkpoint.weights(LoadDtype::Auto);
    assert!(weights.embed.is_borrowed() && weights.layers.iter().all(|l| l.down.weight.is_borrowed() && l.q.weight.is_borrowed()));
    assert_eq!(strait::demo::WEIGHTS.as_ptr() as usize % 64, 0);
}
