//! Adapters against Hugging Face PEFT and an independent SORSA: every format on disk, its logits, and what is refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use strait::adapters::base::Spectra;
use strait::adapters::folder::Bounds;
use strait::adapters::pack::base_weight;
use strait::adapters::registry::Load;
use strait::adapters::{AdapterError, BaseChoice, Module, Parsed, Place, Reader, Ready, write};
use strait::compress::LayerCompression;
use strait::eval::forced::{Machine, Said, force};
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Quantiser};
use strait::model::checkpoint::Checkpoint;
use strait::model::decoder::{Decoder, ReadyProfile};
use strait::model::delta::{Delta, HeldAs, Site};
use strait::model::weights::LoadDtype;
use strait::ops::Ops;
use strait::ops::cpu::Cpu;
use strait::ops::reference::Reference;
use strait::step::Logits;

use crate::eval::{mean, tokens};
use crate::families::{POSITIONS, PROMPT, artifact, full, shares};
use crate::golden;
use crate::http::adapters::{Root, limits, registry};
use crate::model::{Alone, log_softmax};

/// What `tests/golden/make_adapters.py` says of one adapter; its header says what each field means.
#[derive(Deserialize)]
struct Expected {
    base: String,
    #[serde(default)]
    cases: Vec<Case>,
    /// Of a checkpoint whose residual weights were rounded: as if they had not been.
    unrounded: Option<Vec<Case>>,
    refused: Option<String>,
    residual: Option<String>,
    #[serde(default)]
    largest_change: f64,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    logits: Vec<f32>,
    logprobs: Vec<f32>,
}

#[derive(Deserialize)]
struct Listed {
    name: String,
    base: String,
    kind: String,
}

pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters").join(name)
}

fn listed() -> Vec<Listed> {
    serde_json::from_str(&std::fs::read_to_string(folder("index.json")).unwrap()).unwrap()
}

fn expected(name: &str) -> Expected {
    serde_json::from_str(&std::fs::read_to_string(folder(name).join("expected.json")).unwrap()).unwrap()
}

/// Prompts with the logits after them.
type Prompted = Vec<(Vec<u32>, Vec<f32>)>;

/// Adapters that PEFT or an independent implementation was asked about: name, base, and prompts with the logits after them.
pub(crate) fn golden_cases() -> impl Iterator<Item = (String, String, Prompted)> {
    let served = listed().into_iter().map(|l| (expected(&l.name), l)).filter(|(want, _)| want.refused.is_none());
    served.map(|(want, l)| (l.name, l.base, want.cases.into_iter().map(|c| (c.prompt, c.logits)).collect()))
}

pub(crate) fn ready(base: &Checkpoint, path: &Path, choice: &BaseChoice, held: HeldAs) -> Result<Ready, AdapterError> {
    let bounds = Bounds { root: None, bytes: 64 << 20 };
    Reader { base, spectra: &Spectra::new(None, base).unwrap(), bounds, rank: 64 }.ready(path, choice, held)
}

fn choice(name: &str, expected: &Expected) -> BaseChoice {
    expected.residual.as_ref().map_or(BaseChoice::Auto, |dir| BaseChoice::Residual(folder(name).join(dir)))
}

/// The largest differences of a logit and of a log-probability, over whole prompts and over prompts read token by token from the
/// middle on.
fn differences(ops: &dyn Ops, name: &str, cases: &[Case], choice: &BaseChoice) -> (f32, f32) {
    let base = Checkpoint::open(&golden::folder(&expected(name).base)).unwrap();
    let ready = ready(&base, &folder(name), choice, HeldAs::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(ready.facts.bytes, ready.delta.bytes());
    let (mut logit, mut logprob) = (0.0f32, 0.0f32);
    let mut delta = Some(ready.delta);
    for case in cases {
        for half in [false, true] {
            let mut alone = Alone::new(&base, LoadDtype::F32);
            alone.delta = delta.take();
            let first = if half { case.prompt.len() / 2 } else { case.prompt.len() };
            let mut got = alone.run(ops, &case.prompt[..first], 0, Logits::All);
            for (at, token) in case.prompt.iter().enumerate().skip(first) {
                got.extend(alone.run(ops, &[*token], at as u32, Logits::Last));
            }
            assert_eq!(got.len(), case.prompt.len());
            let off = got.last().unwrap().1.iter().zip(&case.logits).map(|(a, b)| (a - b).abs());
            logit = golden::worst(off.chain([logit]));
            let off = case.logprobs.iter().enumerate().map(|(i, want)| (log_softmax(&got[i].1, case.prompt[i + 1]) - want).abs());
            logprob = golden::worst(off.chain([logprob]));
            delta = alone.delta.take();
        }
    }
    (logit, logprob)
}

fn check_goldens(ops: &dyn Ops, prompts: usize) {
    let mut kinds = std::collections::BTreeSet::new();
    for Listed { name, base, kind } in listed() {
        let want = expected(&name);
        assert_eq!(want.base, base);
        if want.refused.is_some() {
            continue;
        }
        assert_eq!(want.cases.len(), 3, "{name}");
        let cases = &want.unrounded.as_ref().unwrap_or(&want.cases)[..prompts];
        let (logit, logprob) = differences(ops, &name, cases, &choice(&name, &want));
        println!("{name}: logits within {logit:.1e} of up to {:.1}, log-probabilities within {logprob:.1e}", want.largest_change);
        assert!(logit < 1e-3 && logprob < 1e-3, "{name}: off by {logit} and {logprob}");
        assert!(want.largest_change > 0.3, "{name} changes too little to tell");
        kinds.insert(kind);
    }
    assert!(kinds.len() >= 14, "{kinds:?}");
}

#[test]
fn the_reference_agrees_with_peft() {
    check_goldens(&Reference, 2);
}

#[test]
fn the_fast_backend_agrees_with_peft() {
    check_goldens(&Cpu::new(2), 3);
}

/// Rounding the residual weights of a full SORSA checkpoint to bf16 is noise on the whole base, and not part of the adapter.
#[test]
fn what_rounding_did_to_a_full_sorsa_checkpoint_is_small() {
    let (logit, _) = differences(&Cpu::new(2), "sorsa-full", &expected("sorsa-full").cases, &BaseChoice::Auto);
    assert!(logit > 1e-3 && f64::from(logit) < 0.03 * expected("sorsa-full").largest_change, "off by {logit}");
}

#[test]
fn what_cannot_be_served_is_refused_with_a_mend() {
    for (name, choice, part) in [
        ("trainable-tokens", BaseChoice::Auto, "modules_to_save"),
        (
            "resized-grown",
            BaseChoice::Auto,
            "with a vocabulary of 388 tokens (`base_model.model.model.embed_tokens.weight`), and the served model has 384",
        ),
        ("pissa-head-tied", BaseChoice::Auto, "took a product out of the output head, which is this base's embedding"),
        ("pissa-residual", BaseChoice::Auto, "base residual:FOLDER"),
        ("pissa-residual", BaseChoice::Residual(golden::folder("llama-linear")), "that of the served base"),
        ("pissa-residual", BaseChoice::Residual(golden::folder("llama3")), "another shape"),
        ("pissa-residual", BaseChoice::Residual(folder("pissa")), "config.json"),
        ("pissa-residual", BaseChoice::Initial(folder("lora-kv")), "another base"),
        ("pissa-residual", BaseChoice::Initial(folder("patterns-unsorted")), "other modules"),
        ("sorsa-full", BaseChoice::Original, "leave base out"),
    ] {
        let base = Checkpoint::open(&golden::folder(&expected(name).base)).unwrap();
        let Err(error) = ready(&base, &folder(name), &choice, HeldAs::F32) else { panic!("{name} with {choice} is served") };
        assert!(error.to_string().contains(part), "{name} with {choice}: {error}");
    }
    // Every adapter on a base it was not made for, and a whole model, which is no adapter.
    for Listed { name, base, .. } in listed() {
        for other in ["llama2", "llama3", "qwen3"].into_iter().filter(|o| *o != base) {
            let other = Checkpoint::open(&golden::folder(other)).unwrap();
            assert!(ready(&other, &folder(&name), &BaseChoice::Auto, HeldAs::F32).is_err(), "{name} is served on {other:?}");
        }
    }
    let base = Checkpoint::open(&golden::folder("llama2")).unwrap();
    let Err(error) = ready(&base, &golden::folder("llama2"), &BaseChoice::Auto, HeldAs::F32) else { panic!("a model is an adapter") };
    assert!(error.to_string().contains("a whole model of type llama"), "{error}");
}

/// `up down` of a module.
fn product(module: &Module) -> Vec<f64> {
    let (out, inputs) = (module.up.len() / module.rank, module.down.len() / module.rank);
    let entry = |o: usize, i: usize| -> f64 {
        (0..module.rank).map(|j| f64::from(module.up[o * module.rank + j]) * f64::from(module.down[j * inputs + i])).sum()
    };
    (0..out).flat_map(|o| (0..inputs).map(move |i| (o, i))).map(|(o, i)| entry(o, i)).collect()
}

#[test]
fn a_residual_base_may_be_written_to_while_it_is_read() {
    // Whoever may put adapters below the root may do this; a mapped file that is cut short would end the process.
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let dir = std::env::temp_dir().join(format!("strait-residual-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(folder("pissa-residual").join("base").join(file), dir.join(file)).unwrap();
    }
    let read = || ready(&base, &folder("pissa-residual"), &BaseChoice::Residual(dir.clone()), HeldAs::F32);
    let whole = std::fs::read(dir.join("model.safetensors")).unwrap();
    let (want, done) = (read().unwrap().digest, std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                std::fs::write(dir.join("model.safetensors"), &whole).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(3));
            }
        });
        for _ in 0..40 {
            match read().map(|ready| ready.digest) {
                Ok(digest) => assert_eq!(digest, want),
                Err(AdapterError::Io { path, reason }) => {
                    assert!(path.ends_with("model.safetensors") && reason.contains("shorter"), "{reason}")
                }
                // Cut before it was opened.
                Err(AdapterError::Base { reason, .. }) => assert!(reason.contains("model.safetensors"), "{reason}"),
                Err(other) => panic!("{other}"),
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(read().unwrap().digest, want);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn an_initial_adapter_is_taken_out_again() {
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let spectra = Spectra::new(None, &base).unwrap();
    let bounds = Bounds { root: None, bytes: 64 << 20 };
    let reader = Reader { base: &base, spectra: &spectra, bounds, rank: 64 };
    let read = |name: &str, choice| reader.read(&folder(name), &choice).unwrap().parsed.modules;
    let (trained, initial) = (read("pissa-niter", BaseChoice::Original), read("pissa-niter-1000", BaseChoice::Original));
    let moved = read("pissa-niter", BaseChoice::Initial(folder("pissa-niter-1000")));
    assert_eq!(moved.len(), trained.len());
    for (place, module) in &moved {
        let (a, b) = (product(&trained[place]), product(&initial[place]));
        assert!(a.iter().zip(&b).any(|(a, b)| (a - b).abs() > 1e-3), "the two differ");
        for (got, (a, b)) in product(module).iter().zip(a.iter().zip(&b)) {
            assert!((got - (a - b)).abs() < 1e-6, "{place:?}: {got} for {a} - {b}");
        }
    }
}

/// Puts factors of the embedding into a copy of a golden adapter: as PEFT draws them, or as training would leave them.
fn with_embedding(root: &Root, golden: &str, name: &str, trained: bool) -> PathBuf {
    use safetensors::tensor::{Dtype, TensorView};
    root.put(golden, name);
    let at = root.0.join(name);
    let mut config: Value = serde_json::from_slice(&std::fs::read(at.join("adapter_config.json")).unwrap()).unwrap();
    let rank = config["r"].as_u64().unwrap() as usize;
    config["target_modules"].as_array_mut().unwrap().push("embed_tokens".into());
    std::fs::write(at.join("adapter_config.json"), config.to_string()).unwrap();
    let c = Checkpoint::open(&golden::folder("llama-linear")).unwrap().config;
    let mut rng = crate::ops::Rng::seeded(3);
    let (mut a, b) = (rng.normals(rank * c.vocab), rng.normals(c.hidden * rank));
    a.iter_mut().for_each(|v| *v *= if trained { 0.1 } else { 0.0 });
    let bytes = std::fs::read(at.join("adapter_model.safetensors")).unwrap();
    let there = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = |shape, data| TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(data)).unwrap();
    let embedding = [("A", view(vec![rank, c.vocab], &a)), ("B", view(vec![c.hidden, rank], &b))];
    let named = embedding.map(|(part, view)| (format!("base_model.model.model.embed_tokens.lora_embedding_{part}"), view));
    let all = there.tensors().into_iter().chain(named).collect::<Vec<_>>();
    safetensors::serialize_to_file(all, None, &at.join("adapter_model.safetensors")).unwrap();
    at
}

#[test]
fn a_decomposition_that_a_disk_changed_is_made_anew() {
    let root = Root::new("changed", &[]);
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let place = Place::Layer(0, Site::Q);
    let made = || {
        let spectra = Spectra::new(Some(&root.0), &base).unwrap();
        (spectra.top(&base, place, 4).unwrap(), spectra.left(&base, place).unwrap())
    };
    let (top, left) = made();
    let folder = std::fs::read_dir(&root.0).unwrap().next().unwrap().unwrap().path();
    let files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(files.len(), 2, "{files:?}");
    for file in &files {
        let whole = std::fs::read(file).unwrap();
        let mut changed = whole.clone();
        // The sign of a number, which leaves it one that may be there.
        let (first, size) = if file.extension().unwrap() == "top" { (32, 8) } else { (24, 4) };
        changed[first + size * 100 + size - 1] ^= 0x80;
        std::fs::write(file, changed).unwrap();
        let (again, other) = made();
        assert!(again.u == top.u && again.s == top.s && again.v == top.v && other == left, "{}", file.display());
        assert!(std::fs::read(file).unwrap() == whole, "and is kept");
    }
}

#[test]
fn of_an_embedding_nothing_was_taken_whatever_the_initialisation() {
    let root = Root::new("embedding", &[]);
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let spectra = Spectra::new(None, &base).unwrap();
    let reader = Reader { base: &base, spectra: &spectra, bounds: Bounds { root: None, bytes: 64 << 20 }, rank: 64 };
    let read = |path: &Path, choice: &BaseChoice| reader.read(path, choice).unwrap_or_else(|e| panic!("{}: {e}", path.display())).parsed;
    let residual = BaseChoice::Residual(folder("pissa-residual").join("base"));
    let initial = BaseChoice::Initial(with_embedding(&root, "pissa-niter-1000", "initial", false));
    for (golden, choice, plain) in [
        ("pissa", BaseChoice::Auto, BaseChoice::Auto),
        ("olora", BaseChoice::Auto, BaseChoice::Auto),
        ("pissa-residual", residual.clone(), residual),
        ("pissa-residual", BaseChoice::Pissa, BaseChoice::Pissa),
        ("pissa-niter", initial, BaseChoice::Initial(folder("pissa-niter-1000"))),
    ] {
        let path = with_embedding(&root, golden, golden, true);
        let (moved, asis) = (read(&path, &choice), read(&path, &BaseChoice::Original));
        let mut want = read(&folder(golden), &plain).modules;
        want.insert(Place::Embed, asis.modules[&Place::Embed].clone());
        assert!(moved.modules == want, "{golden} with {choice}");
    }
    // One that was trained is none from before training.
    let path = with_embedding(&root, "pissa-niter", "again", true);
    let initial = BaseChoice::Initial(with_embedding(&root, "pissa-niter-1000", "moved", true));
    let Err(error) = reader.read(&path, &initial) else { panic!("it is taken for an initial one") };
    assert!(error.to_string().contains("does not begin at zero"), "{error}");
}

#[test]
fn a_head_that_lies_beside_its_factors_is_what_they_belong_on() {
    let root = Root::new("head", &["pissa-head"]);
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let spectra = Spectra::new(None, &base).unwrap();
    let reader = Reader { base: &base, spectra: &spectra, bounds: Bounds { root: None, bytes: 64 << 20 }, rank: 64 };
    let read = |path: &Path, choice: &BaseChoice| reader.read(path, choice).unwrap_or_else(|e| panic!("{choice}: {e}")).parsed.modules;
    let (whole, at) = (folder("pissa-head"), root.0.join("pissa-head"));
    let want = read(&whole, &BaseChoice::Auto);
    // However the base is named: what is taken out of the head is known from the file.
    let residual = BaseChoice::Residual(folder("pissa-residual").join("base"));
    for choice in [BaseChoice::Pissa, residual, BaseChoice::Initial(whole.clone())] {
        let got = read(&whole, &choice);
        let initial = matches!(choice, BaseChoice::Initial(_));
        for (place, module) in got.iter().filter(|(p, _)| **p == Place::Head || !initial) {
            assert!(module.weight.is_none(), "{place:?} under {choice}: a product is enough");
            let off = product(module).iter().zip(product(&want[place])).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < 1e-5, "{place:?} under {choice}: off by {off}");
        }
    }
    // One that is no base less such a product is served as it is, as PEFT does.
    let name = "lm_head.base_layer.weight";
    add(&at, &[(name, name, 0.5)]);
    assert!(read(&at, &BaseChoice::Auto)[&Place::Head] == read(&at, &BaseChoice::Original)[&Place::Head]);
    // The served base's own: PEFT would add the factors to that.
    fill(&at, name, &base_weight(&base, Place::Head));
    let (got, asis) = (read(&at, &BaseChoice::Auto), read(&at, &BaseChoice::Original));
    assert!(got[&Place::Head].up == asis[&Place::Head].up && got[&Place::Head].weight.is_none());
}

#[test]
fn an_adapter_of_any_format_is_written_as_a_plain_lora_that_says_the_same() {
    let root = Root::new("convert", &[]);
    let cpu = Cpu::new(2);
    for Listed { name, base, .. } in listed() {
        let want = expected(&name);
        if want.refused.is_some() {
            continue;
        }
        let base = Checkpoint::open(&golden::folder(&base)).unwrap();
        let spectra = Spectra::new(None, &base).unwrap();
        let reader = Reader { base: &base, spectra: &spectra, bounds: Bounds { root: None, bytes: 64 << 20 }, rank: 64 };
        let parsed = reader.read(&folder(&name), &choice(&name, &want)).unwrap().parsed;
        let out = root.0.join(&name);
        write::write(&parsed, &base.config, &out).unwrap();
        let again = reader.ready(&out, &BaseChoice::Original, HeldAs::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(again.facts.warnings, Vec::<String>::new(), "{name}");
        let case = &want.unrounded.as_ref().unwrap_or(&want.cases)[0];
        let mut alone = Alone::new(&base, LoadDtype::F32);
        alone.delta = Some(again.delta);
        let got = alone.run(&cpu, &case.prompt, 0, Logits::Last);
        for (a, b) in got[0].1.iter().zip(&case.logits) {
            assert!((a - b).abs() < 1e-3, "{name}: {a} for {b}");
        }
        let again = write::write(&parsed, &base.config, &out).expect_err("a folder that is there is not written over").to_string();
        assert_eq!(again, format!("cannot write {}: it is there already; name a new folder", out.display()));
    }
}

/// Saves a model whose linear layers have an adapter's updates added to them, in f32.
fn merged(base: &Checkpoint, parsed: &Parsed, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    let source = golden::folder(&base.config.family);
    std::fs::copy(source.join("config.json"), to.join("config.json")).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = base
        .names()
        .map(|name| {
            let view = base.tensor(name).unwrap();
            let wide = |b: &[u8]| half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
            let mut values: Vec<f64> = view.data.chunks_exact(2).map(|b| f64::from(wide(b))).collect();
            assert_eq!(view.dtype.bytes(), 2);
            if let Some(module) = parsed.modules.iter().find(|(p, _)| p.tensor(&base.config) == name).map(|(_, m)| m) {
                assert!(module.bias.is_none() && module.magnitude.is_none());
                values.iter_mut().zip(product(module)).for_each(|(v, d)| *v += d);
            }
            (name.to_owned(), view.shape.to_vec(), values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(safetensors::tensor::Dtype::F32, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &to.join("model.safetensors")).unwrap();
}

#[test]
fn under_every_cache_profile_an_adapter_says_what_the_merged_model_says() {
    let root = Root::new("merged", &[]);
    // Keys and values above all: their latents are taken of what the adapter makes of them.
    for (name, family) in [("lora-kv", "qwen3"), ("lora-all", "qwen2")] {
        let base = Checkpoint::open(&golden::folder(family)).unwrap();
        let spectra = Spectra::new(None, &base).unwrap();
        let reader = Reader { base: &base, spectra: &spectra, bounds: Bounds { root: None, bytes: 64 << 20 }, rank: 64 };
        let parsed = reader.read(&folder(name), &BaseChoice::Auto).unwrap().parsed;
        let delta = reader.ready(&folder(name), &BaseChoice::Auto, HeldAs::F32).unwrap().delta;
        merged(&base, &parsed, &root.0.join(name));
        let tuned = Checkpoint::open(&root.0.join(name)).unwrap();
        let turned = |p: Profile| {
            let cskv = p.cskv.unwrap();
            Profile { cskv: Some(Cskv { key_quantiser: Quantiser::Hadamard, value_quantiser: Quantiser::Hadamard, ..cskv }), ..p }
        };
        let profiles = [
            shares("joint", 0.5, 8, BasisKind::Joint),
            shares("grouped", 0.5, 4, BasisKind::Grouped(1)),
            shares("frequency", 0.25, 16, BasisKind::Frequency),
            turned(shares("turned", 0.5, 4, BasisKind::Frequency)),
            shares("identity", 1.0, 4, BasisKind::Identity),
            shares("dropped", 1.0, 4, BasisKind::Dropped),
        ];
        // The bases are the base's own: what an operator's artifact is.
        let artifact = artifact(&base, &profiles[..4]);
        let said = |checkpoint: &Checkpoint, adapter: Option<&Delta>| {
            let config = &checkpoint.config;
            let ready: Vec<ReadyProfile> = std::iter::once(&full())
                .chain(&profiles)
                .map(|p| {
                    let computed = p.cskv.as_ref().is_some_and(|c| c.basis.is_computed());
                    let widths = computed.then(|| artifact.widths(p).unwrap());
                    let compression = match &p.cskv {
                        None => vec![],
                        Some(_) if computed => artifact.layers(p).unwrap(),
                        Some(c) => {
                            let one = match c.basis {
                                BasisKind::Identity => LayerCompression::identity(config),
                                _ => LayerCompression::dropped(config),
                            };
                            vec![one.for_quantisers(c); config.layers]
                        }
                    };
                    ReadyProfile { layout: PageLayout::new(config, ExactType::F32, p, widths.as_deref()), compression }
                })
                .collect();
            let mut decoder = Decoder::new(config, checkpoint.weights(LoadDtype::F32), POSITIONS, 64);
            let chosen: Vec<usize> = (1..ready.len()).collect();
            let mut said = vec![Said::default(); chosen.len()];
            let ops = Cpu::new(2);
            let mut machine =
                Machine { decoder: &mut decoder, ops: &ops, profiles: &ready, names: &["full", "one", "two", "three"], adapter };
            force(&mut machine, (0, &chosen), &tokens(POSITIONS, 9, config.vocab), PROMPT, &mut said).unwrap();
            said
        };
        let (worn, merged, bare) = (said(&base, Some(&delta)), said(&tuned, None), said(&base, None));
        for (profile, ((worn, merged), bare)) in profiles.iter().zip(worn.iter().zip(&merged).zip(&bare)) {
            // Block by block: over a whole text of no meaning the surprises of any two models are about the same.
            let apart = |other: &Said| {
                let pairs = worn.surprise.iter().zip(&other.surprise);
                pairs.map(|(a, b)| (a.sum - b.sum).abs() / f64::from(a.n)).fold(0.0, f64::max)
            };
            let (from_merged, from_bare) = (apart(merged), apart(bare));
            let (kl_worn, kl_merged) = (mean(&worn.divergence), mean(&merged.divergence));
            println!("{name} {}: {from_merged:.1e} off, {from_bare:.2} without it; divergence {kl_worn:.2e}", profile.name);
            // A code may flip where rounding differs; a stale latent would be off by as much as the adapter changes.
            assert!(from_merged < 0.02 * from_bare && (kl_worn - kl_merged).abs() < 2e-3, "{name} {}: {kl_merged}", profile.name);
        }
    }
}

#[test]
fn a_root_may_be_a_link_and_files_that_were_stripped_are_refused() {
    let root = Root::new("real-root", &["all-linear", "dora", "modules-to-save", "lora-bias", "bias-all"]);
    let linked = Root::new("linked", &[]);
    let link = linked.0.join("link");
    std::os::unix::fs::symlink(&root.0, &link).unwrap();
    let registry = registry("llama-linear", limits(Some(&link), 64 << 20));
    for path in [link.join("all-linear"), root.0.join("all-linear"), "all-linear".into()] {
        registry.load(&Load { alias: "a".into(), path, in_place: true, ..Load::default() }).unwrap();
    }
    let outside = registry.load(&Load { alias: "b".into(), path: link.join("../x"), ..Load::default() });
    assert!(matches!(outside, Err(AdapterError::Outside { .. })), "{outside:?}");
    for (name, base, part, message) in [
        ("dora", "llama-bias", "layers.0.mlp.up_proj.lora_magnitude_vector", "has no magnitude"),
        ("modules-to-save", "llama3", "lm_head.weight", "promises the weights of lm_head"),
        ("lora-bias", "qwen2", "layers.1.mlp.down_proj.lora_B.bias", "says lora_bias"),
        ("bias-all", "llama-bias", ".bias", "biases were trained"),
        ("all-linear", "llama-linear", "layers.0.mlp.up_proj.lora_B", "no partner"),
    ] {
        strip(&root.0.join(name), part);
        let base = Checkpoint::open(&golden::folder(base)).unwrap();
        let Err(error) = ready(&base, &root.0.join(name), &BaseChoice::Auto, HeldAs::F32) else { panic!("{name} is served") };
        assert!(error.to_string().contains(message), "{name}: {error}");
    }
}

/// Adds tensors to an adapter's file, or replaces some, each made of one that is there: its name, the new one, and a factor.
fn add(at: &Path, copies: &[(&str, &str, f32)]) {
    use safetensors::tensor::{Dtype, TensorView};
    let file = at.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let there = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let made = copies.iter().map(|(from, to, factor)| {
        let view = there.tensor(&format!("base_model.model.{from}")).unwrap();
        assert_eq!(view.dtype(), Dtype::F32);
        let data: Vec<u8> = bytemuck::pod_collect_to_vec::<u8, f32>(view.data()).iter().flat_map(|v| (v * factor).to_le_bytes()).collect();
        (format!("base_model.model.{to}"), view.shape().to_vec(), data)
    });
    let made: Vec<_> = made.collect();
    let kept = there.tensors().into_iter().filter(|(name, _)| made.iter().all(|(new, ..)| new != name));
    let new = made.iter().map(|(name, shape, data)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(kept.chain(new).collect::<Vec<_>>(), None, &file).unwrap();
}

/// Numbers of a file that are finite, and what is made of them is not: rounded to bf16, scaled, or multiplied for a norm.
#[test]
fn what_overflows_when_it_is_held_is_refused_before_any_request_wears_it() {
    let part = |of: &str| format!("model.layers.0.self_attn.q_proj.lora_{of}.weight");
    let base = |name: &str| Checkpoint::open(&golden::folder(&expected(name).base)).unwrap();
    let raise = |at: &Path, of: &str| {
        let bytes = std::fs::read(at.join("adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor(&format!("base_model.model.{}", part(of))).unwrap();
        let largest = bytemuck::pod_collect_to_vec::<u8, f32>(view.data()).iter().fold(0.0, |a: f32, v| a.max(v.abs()));
        // Beyond what rounds to the largest of bf16, 3.396e38, and within f32's 3.4028e38.
        add(at, &[(&part(of), &part(of), 1.0 / largest)]);
        add(at, &[(&part(of), &part(of), 3.4e38)]);
    };
    let root = Root::new("overflow", &["all-linear", "dora"]);
    let at = root.0.join("all-linear");
    raise(&at, "A");
    let read = |held| ready(&base("all-linear"), &at, &BaseChoice::Auto, held).map(|_| ());
    assert!(read(HeldAs::F32).is_ok());
    let said = read(HeldAs::Bf16).unwrap_err().to_string();
    assert!(said.starts_with("the factors of model.layers.0.self_attn.q_proj have ") && said.contains("overflows BF16"), "{said}");
    // Scaled by four, it is beyond both.
    raise(&at, "B");
    let said = read(HeldAs::F32).unwrap_err().to_string();
    assert!(
        said.starts_with("the scaled factors of model.layers.0.self_attn.q_proj have ") && said.contains("inf, which overflows F32"),
        "{said}"
    );
    // DoRA divides by the norms of rows: by an infinite one to zeros, which would be served.
    let at = root.0.join("dora");
    add(&at, &[(&part("A"), &part("A"), 1e25), (&part("B"), &part("B"), 1e25)]);
    let said = ready(&base("dora"), &at, &BaseChoice::Auto, HeldAs::F32).map(|_| ()).unwrap_err().to_string();
    assert!(said.contains("of model.layers.0.self_attn.q_proj overflows with the factors added"), "{said}");
}

/// Removes tensors from an adapter's file.
fn strip(at: &Path, part: &str) {
    let file = at.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = tensors.tensors().into_iter().filter(|(tensor, _)| !tensor.contains(part)).collect();
    assert!(kept.len() < tensors.len());
    safetensors::serialize_to_file(kept, None, &file).unwrap();
}

#[test]
fn a_module_that_is_targeted_and_not_in_the_file_is_told() {
    let root = Root::new("lacking", &["all-linear"]);
    let warnings = |base: &str, at: &Path, choice: &BaseChoice| {
        let base = Checkpoint::open(&golden::folder(base)).unwrap();
        ready(&base, at, choice, HeldAs::F32).unwrap().facts.warnings
    };
    strip(&root.0.join("all-linear"), "layers.1.self_attn.v_proj");
    let told = warnings("llama-linear", &root.0.join("all-linear"), &BaseChoice::Auto);
    let want = "target_modules names 1 modules whose weights are not there (model.layers.1.self_attn.v_proj, ...); they stay the base's";
    assert_eq!(told, [want]);
    // PEFT's own files lack nothing.
    for Listed { name, base, .. } in listed() {
        let want = expected(&name);
        if want.refused.is_none() {
            let told = warnings(&base, &folder(&name), &choice(&name, &want));
            assert!(told.iter().all(|w| !w.contains("are not there")), "{name}: {told:?}");
        }
    }
}

#[test]
fn one_part_of_a_module_under_two_names_is_refused() {
    let root = Root::new("two-names", &["bias-all", "modules-to-save-norms"]);
    for (name, base, from, to) in [
        ("bias-all", "llama-bias", "model.layers.0.mlp.down_proj.bias", "model.layers.0.mlp.down_proj.base_layer.bias"),
        ("modules-to-save-norms", "llama3", "model.norm.weight", "model.norm.base_layer.weight"),
    ] {
        add(&root.0.join(name), &[(from, to, 0.5)]);
        let base = Checkpoint::open(&golden::folder(base)).unwrap();
        let Err(error) = ready(&base, &root.0.join(name), &BaseChoice::Auto, HeldAs::F32) else { panic!("{name} is served") };
        assert!(error.to_string().contains(from) && error.to_string().contains(to), "{error}");
    }
}

/// Where the vocabulary was resized PEFT saves all of an embedding's wrapper: what was trained twice, and the base's own.
#[test]
fn what_a_resized_vocabulary_adds_to_the_file_changes_nothing() {
    let root = Root::new("resized", &["modules-to-save-embed"]);
    let (name, at) = ("model.embed_tokens", root.0.join("modules-to-save-embed"));
    let base = Checkpoint::open(&golden::folder("llama3")).unwrap();
    let read = || ready(&base, &at, &BaseChoice::Auto, HeldAs::F32);
    let want = read().unwrap();
    let (weight, copy, original) =
        (format!("{name}.weight"), format!("{name}.modules_to_save.weight"), format!("{name}.original_module.weight"));
    // The base's own, as its file has it.
    let own = base_weight(&base, Place::Embed);
    add(&at, &[(&weight, &copy, 1.0), (&weight, &original, 1.0)]);
    let Err(error) = read() else { panic!("another base's embedding is taken for the base's") };
    assert!(error.to_string().contains("original_module.weight` differs from the served base's"), "{error}");
    fill(&at, &original, &own);
    assert_eq!(read().unwrap().delta, want.delta);
    add(&at, &[(&weight, &copy, 0.5)]);
    let Err(error) = read() else { panic!("of two that differ one is served") };
    assert!(error.to_string().contains("modules_to_save.weight` is no copy of"), "{error}");
}

/// Overwrites the numbers of a tensor in an adapter's file.
fn fill(at: &Path, name: &str, values: &[f32]) {
    let file = at.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let data = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(&format!("base_model.model.{name}")).unwrap().data().as_ptr();
    let begin = data as usize - bytes.as_ptr() as usize;
    bytes[begin..begin + 4 * values.len()].copy_from_slice(bytemuck::cast_slice(values));
    std::fs::write(&file, bytes).unwrap();
}

#[derive(Deserialize)]
struct Told {
    adapter: Option<String>,
    messages: Value,
    greedy: String,
}

/// The trained adapters of the demo model, in bf16 as it is served: the very words PEFT says.
#[test]
fn the_demo_adapters_say_what_peft_says() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo-adapters");
    let told: Vec<Told> = serde_json::from_str(&std::fs::read_to_string(dir.join("expected.json")).unwrap()).unwrap();
    let base = strait::demo::checkpoint().unwrap();
    let tokenizer = strait::demo::tokenizer().unwrap();
    let ops = Cpu::new(2);
    let eos = base.generation.eos.clone();
    let mut by = std::collections::BTreeMap::new();
    for Told { adapter, messages, greedy } in &told {
        let delta = adapter.as_ref().map(|name| ready(&base, &dir.join(name), &BaseChoice::Auto, HeldAs::Bf16).unwrap().delta);
        let prompt = tokenizer.render(messages, None, true, false, &serde_json::Map::new()).unwrap();
        let mut alone = Alone::new(&base, LoadDtype::Auto);
        alone.delta = delta;
        let mut got = alone.run(&ops, &prompt, 0, Logits::Last);
        let mut ids = Vec::new();
        while ids.len() < 60 && prompt.len() + ids.len() < 500 {
            let logits = &got[0].1;
            let id = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
            if eos.contains(&id) {
                break;
            }
            ids.push(id);
            got = alone.run(&ops, &[id], (prompt.len() + ids.len() - 1) as u32, Logits::Last);
        }
        let text = tokenizer.decode(&ids, true);
        assert_eq!(text.trim(), greedy.trim(), "{adapter:?} on {messages}");
        *by.entry(adapter.clone()).or_insert(0) += 1;
    }
    assert!(by.len() == 4 && by.values().all(|n| *n >= 5), "{by:?}");
}
