//! Adapters against Hugging Face PEFT and an independent SORSA: every format on disk, its logits, and what is refused.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use strait::adapters::base::Spectra;
use strait::adapters::folder::Bounds;
use strait::adapters::left::left as spectrum_left;
use strait::adapters::pack::base_weight;
use strait::adapters::registry::{Happened, Lease, Limits, Load, Registry};
use strait::adapters::spectrum::Dense;
use strait::adapters::{AdapterError, BaseChoice, Module, Parsed, Place, Reader, Ready, write};
use strait::compress::LayerCompression;
use strait::config::args::{AdapterFolder, AdapterInspect};
use strait::engine::TokenStream;
use strait::eval::forced::{Machine, Said, force};
use strait::ids::AdapterGeneration;
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Quantiser};
use strait::model::checkpoint::Checkpoint;
use strait::model::decoder::{Decoder, ReadyProfile};
use strait::model::delta::{Delta, HeldAs, Site};
use strait::model::weights::LoadDtype;
use strait::ops::Ops;
use strait::ops::cpu::Cpu;
use strait::ops::reference::Reference;
use strait::request::{Event, GenerateRequest};
use strait::serve::inspect::inspect as inspect_adapter;
use strait::step::Logits;

use crate::engine::{self, ROOMY, World, hear, world};
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

const SERVED: [&str; 6] = ["all-linear", "pissa", "olora", "sorsa-compact", "dora-embed", "modules-to-save-proj"];

/// What the engine says under an adapter, or without.
fn ask(world: &World, lease: Option<&Lease>, mut request: GenerateRequest) -> TokenStream {
    request.adapter = lease.map_or_else(AdapterGeneration::default, Lease::generation);
    world.engine.submit_with(request, lease.cloned()).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn a_sequence_does_not_depend_on_what_adapters_run_beside_it() {
    let root = Root::new("mixed", &SERVED);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let leases: Vec<Option<Lease>> = SERVED
        .iter()
        .map(|name| {
            registry.load(&Load { alias: (*name).into(), path: (*name).into(), ..Load::default() }).unwrap();
            Some(runtime().block_on(registry.acquire(name)).unwrap())
        })
        .chain([None])
        .collect();
    let prompts: Vec<Vec<u32>> = [3, 40, 64, 70, 110].iter().map(|&n| engine::tokens(n, n as u64, 256)).collect();
    let cases: Vec<(usize, usize, u8)> =
        (0..leases.len()).flat_map(|l| [0, 2, 3].map(|p| (l, (l + usize::from(p)) % prompts.len(), p))).collect();
    let request = |(_, prompt, profile): (usize, usize, u8)| GenerateRequest {
        cache_salt: 1 + prompt as u64,
        ..engine::request(&prompts[prompt], 120, profile)
    };
    let alone = world("llama-linear", ROOMY, engine::cpu);
    let apart: Vec<_> = cases.iter().map(|&case| hear(ask(&alone, leases[case.0].as_ref(), request(case)))).collect();
    assert!(
        apart.iter().all(|said| said.tokens.len() == 120 && said.end.is_ok()),
        "{:?}",
        apart.iter().map(|s| &s.end).collect::<Vec<_>>()
    );
    // Everybody says something else of one prompt, or the adapters do nothing.
    let common: Vec<_> = leases.iter().map(|l| hear(ask(&alone, l.as_ref(), request((0, 2, 0)))).logprobs).collect();
    for (a, b) in (0..leases.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
        assert!(common[a] != common[b], "adapters {a} and {b} say the same");
    }
    // Pages for a few of them at a time: the others wait, and some are preempted and computed again.
    let preempted = Arc::new(AtomicUsize::new(0));
    let counted = preempted.clone();
    let tight = engine::watched("llama-linear", engine::tight(), engine::cpu, move |event| {
        if matches!(event, strait::telemetry::Event::Preempted) {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let streams: Vec<_> = cases.iter().map(|&case| ask(&tight, leases[case.0].as_ref(), request(case))).collect();
    for ((case, stream), want) in cases.iter().zip(streams).zip(&apart) {
        let got = hear(stream);
        assert_eq!((got.tokens, got.logprobs), (want.tokens.clone(), want.logprobs.clone()), "{case:?}");
    }
    assert!(preempted.load(Ordering::Relaxed) > 0, "nobody was preempted");
    drop(leases);
    drop((alone, tight));
    assert_eq!(registry.state().aliases.iter().map(|a| a.leases).sum::<usize>(), 0, "every lease came home");
    registry.check().unwrap();
}

#[test]
fn prefixes_are_shared_within_a_generation_and_never_across() {
    let root = Root::new("prefix", &["all-linear", "olora"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let load = |path: &str| registry.load(&Load { alias: "a".into(), path: path.into(), in_place: true, ..Load::default() }).unwrap();
    let lease = || runtime().block_on(registry.acquire("a")).unwrap();
    let world = world("llama-linear", ROOMY, engine::cpu);
    let prompt = engine::tokens(200, 5, 256);
    let cached = |lease: Option<&Lease>| hear(ask(&world, lease, engine::request(&prompt, 8, 0))).end.unwrap().1.cached_tokens;
    load("all-linear");
    let first = lease();
    assert_eq!((cached(None), cached(Some(&first)), cached(None), cached(Some(&first))), (0, 0, 192, 192));
    // The same name, other content: what vLLM answers from a stale cache.
    load("olora");
    let second = lease();
    assert_ne!(first.generation(), second.generation());
    assert_eq!((cached(Some(&second)), cached(Some(&second))), (0, 192));
    // The same content under any name is the same generation.
    registry.load(&Load { alias: "b".into(), path: "all-linear".into(), ..Load::default() }).unwrap();
    let third = runtime().block_on(registry.acquire("b")).unwrap();
    assert_eq!((third.generation(), cached(Some(&third))), (first.generation(), 192));
}

#[test]
fn a_request_finishes_on_the_generation_it_began_with() {
    let root = Root::new("swap", &["all-linear", "olora"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let load = |path: &str| registry.load(&Load { alias: "a".into(), path: path.into(), in_place: true, ..Load::default() }).unwrap();
    let lease = || runtime().block_on(registry.acquire("a")).unwrap();
    let world = world("llama-linear", ROOMY, engine::cpu);
    let request = || GenerateRequest { cache_salt: 3, ..engine::request(&engine::tokens(90, 2, 256), 300, 3) };
    load("all-linear");
    let want = hear(ask(&world, Some(&lease()), request()));
    let mut running = ask(&world, Some(&lease()), request());
    assert!(matches!(engine::event_of(&mut running), Event::Token { .. }));
    load("olora");
    let second = lease();
    let gone = registry.unload("a").unwrap();
    assert_eq!((gone.freed_bytes, gone.leases, registry.check()), (0, 2, Ok(())));
    let swapped = hear(ask(&world, Some(&second), request()));
    drop(second);
    let got = hear(running);
    assert_eq!(got.tokens[..], want.tokens[1..], "replaced and unloaded under it, it goes on");
    assert_ne!(swapped.tokens, want.tokens);
    let begun = Instant::now();
    while registry.state().resident_bytes > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "bytes stay: {:?}", registry.state());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn many_first_uses_read_an_adapter_once_and_the_least_used_makes_room() {
    let root = Root::new("tiers", &["all-linear", "olora", "pissa", "sorsa-compact"]);
    let names = ["all-linear", "olora", "pissa", "sorsa-compact"];
    let size = |name: &str| {
        let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
        ready(&base, &folder(name), &BaseChoice::Auto, HeldAs::F32).unwrap().facts.bytes
    };
    let sizes: Vec<u64> = names.iter().map(|n| size(n)).collect();
    // Room for the three largest, less a byte of the fourth.
    let budget = sizes.iter().sum::<u64>() - 1;
    let happened = Arc::new(Mutex::new(Vec::new()));
    let heard = happened.clone();
    let checkpoint: &'static Checkpoint = Box::leak(Box::new(Checkpoint::open(&golden::folder("llama-linear")).unwrap()));
    let registry = Registry::new(
        (checkpoint, HeldAs::F32),
        Spectra::new(None, checkpoint).unwrap(),
        Limits { discover: true, ..limits(Some(&root.0), budget) },
        Box::new(move |what| heard.lock().unwrap().push(what)),
    );
    assert_eq!(registry.discover().unwrap(), (4, vec![]));
    let loads = || happened.lock().unwrap().iter().filter(|h| matches!(h, Happened::Loaded { .. })).count();
    let evictions = || happened.lock().unwrap().iter().filter(|h| matches!(h, Happened::Evicted)).count();
    let runtime = runtime();
    let all = |name: &'static str| {
        let asked: Vec<_> = (0..16)
            .map(|_| {
                let registry = registry.clone();
                runtime.spawn(async move { registry.acquire(name).await.unwrap() })
            })
            .collect();
        asked.into_iter().map(|a| runtime.block_on(a).unwrap()).collect::<Vec<Lease>>()
    };
    for name in &names[..3] {
        assert_eq!(all(name).len(), 16);
    }
    assert_eq!((loads(), evictions()), (3, 0));
    // The first again, so that the second is the least used; the fourth then takes its place.
    drop(all(names[0]));
    let fourth = all(names[3]);
    assert_eq!((loads(), evictions()), (4, 1));
    let resident = |name: &str| registry.alias(name).unwrap().resident;
    assert_eq!(names.map(resident), [true, false, true, true]);
    // What is leased stays, whatever is asked for; with everything leased there is no room.
    let (first, third) = (all(names[0]), all(names[2]));
    let error = runtime.block_on(registry.acquire(names[1])).unwrap_err();
    assert!(matches!(error, AdapterError::Busy { .. }), "{error}");
    registry.check().unwrap();
    // With a little room that does not suffice nobody is thrown out for nothing.
    drop(first);
    let before = evictions();
    let error = runtime.block_on(registry.acquire(names[1]));
    assert!(error.is_ok() || evictions() == before, "what does not fit evicted others");
    drop(error);
    let first = all(names[0]);
    drop(third);
    drop(all(names[1]));
    assert_eq!(names.map(resident), [true, true, false, true]);
    // Files that changed while it was on disk are not served as what they were.
    std::fs::copy(folder("olora").join("adapter_config.json"), root.0.join("pissa/adapter_config.json")).unwrap();
    std::fs::copy(folder("olora").join("adapter_model.safetensors"), root.0.join("pissa/adapter_model.safetensors")).unwrap();
    drop((first, fourth));
    let before = (loads(), evictions(), names.map(resident));
    let error = runtime.block_on(registry.acquire("pissa")).unwrap_err();
    assert!(matches!(error, AdapterError::FilesChanged { .. }), "{error}");
    assert_eq!((loads(), evictions(), names.map(resident)), before, "nobody makes room for what is refused");
    registry.load(&Load { alias: "pissa".into(), path: "pissa".into(), in_place: true, ..Load::default() }).unwrap();
    drop(all("pissa"));
    // One larger than the whole budget never fits.
    let small = self::registry("llama-linear", limits(Some(&root.0), sizes[1] - 1));
    let error = small.load(&Load { alias: "x".into(), path: "olora".into(), ..Load::default() }).unwrap_err();
    assert!(matches!(error, AdapterError::NeverFits { .. } | AdapterError::TooLarge { .. }), "{error}");
    assert_eq!(small.state().resident_bytes, 0);
    small.check().unwrap();
    registry.check().unwrap();
}

#[test]
fn of_two_who_load_one_name_one_is_told_that_it_is_taken() {
    let root = Root::new("race", &["all-linear", "olora"]);
    for round in 0..8 {
        let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
        let load = |path: &'static str| {
            let registry = registry.clone();
            std::thread::spawn(move || registry.load(&Load { alias: "x".into(), path: path.into(), ..Load::default() }))
        };
        let both = [load("all-linear"), load("olora")].map(|t| t.join().unwrap());
        assert_eq!(both.iter().filter(|r| r.is_ok()).count(), 1, "round {round}: {both:?}");
        assert!(both.iter().any(|r| matches!(r, Err(AdapterError::Loaded { .. }))), "{both:?}");
        let state = registry.state();
        assert_eq!((state.aliases.len(), state.generations.len()), (1, 1), "the other's bytes are gone");
        registry.check().unwrap();
    }
}

#[test]
fn the_books_are_right_whoever_does_what_at_once() {
    let names = ["all-linear", "olora", "pissa", "sorsa-compact"];
    let root = Root::new("threads", &names);
    let registry = registry("llama-linear", Limits { discover: true, ..limits(Some(&root.0), 64 << 20) });
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let threads: Vec<_> = (0..6u64)
        .map(|seed| {
            let (registry, handle) = (registry.clone(), handle.clone());
            std::thread::spawn(move || {
                let mut rng = crate::ops::Rng::seeded(seed);
                let mut leases = Vec::new();
                for _ in 0..40 {
                    let name = names[(rng.next() % 4) as usize];
                    // Names of its own for loads that must succeed; a shared one for those that may not.
                    match rng.next() % 5 {
                        0 => {
                            let alias = format!("own-{seed}");
                            let load = Load { alias, path: name.into(), in_place: true, ..Load::default() };
                            registry.load(&load).unwrap();
                        }
                        1 => drop(registry.load(&Load { alias: "shared".into(), path: name.into(), in_place: true, ..Load::default() })),
                        2 => drop(registry.unload("shared")),
                        3 => drop(registry.rollback("shared", None)),
                        // Whatever else goes on, what is in the root can be had.
                        _ => leases.push(handle.block_on(async {
                            assert!(registry.knows(name));
                            registry.acquire(name).await.unwrap()
                        })),
                    }
                    if leases.len() > 3 {
                        leases.remove(0);
                    }
                }
                drop(registry.unload(&format!("own-{seed}")));
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    registry.check().unwrap();
    let held: Vec<_> = registry.state().generations.into_iter().filter(|g| g.leases > 0).collect();
    assert!(held.is_empty(), "{held:?}");
    drop(registry.unload("shared"));
    for name in names {
        drop(registry.unload(name));
    }
    registry.check().unwrap();
    assert_eq!(registry.state().resident_bytes, 0);
    // Taken away, it is not found in the root again until it is loaded.
    assert!(!registry.knows("olora"));
    registry.load(&Load { alias: "olora".into(), path: "olora".into(), ..Load::default() }).unwrap();
    assert!(registry.knows("olora"));
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

#[test]
fn folders_of_the_root_that_no_request_could_name_are_told() {
    let root = Root::new("unnameable", &["olora"]);
    ["my adapter", "demo", ".hidden"].iter().for_each(|name| root.put("olora", name));
    std::fs::create_dir(root.0.join("no adapter")).unwrap();
    let registry = registry("llama-linear", Limits { discover: true, ..limits(Some(&root.0), 64 << 20) });
    let (found, left_out) = registry.discover().unwrap();
    let told: Vec<String> = left_out.iter().map(|(folder, why)| format!("{folder}: {why}")).collect();
    assert_eq!((found, told.len()), (1, 2), "{told:?}");
    assert!(told[0].starts_with("demo: \"demo\" is the name of the served model"), "{told:?}");
    assert!(told[1].starts_with("my adapter: an adapter's name is at most 256 bytes, without spaces"), "{told:?}");
}

#[test]
fn the_books_are_right_whatever_is_done() {
    let names = ["all-linear", "olora", "pissa", "sorsa-compact", "trainable-tokens", "lora-kv"];
    let root = Root::new("books", &names);
    let runtime = runtime();
    for seed in 0..6u64 {
        let registry = registry("llama-linear", limits(Some(&root.0), 48 << 10));
        let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move |n: usize| {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            (rng % n as u64) as usize
        };
        let mut leases: Vec<Lease> = Vec::new();
        for step in 0..60 {
            let alias = format!("a{}", next(3));
            match next(6) {
                0 | 1 => {
                    let (in_place, pinned) = (next(2) == 0, next(8) == 0);
                    let _ = registry.load(&Load { alias, path: names[next(names.len())].into(), in_place, pinned, ..Load::default() });
                }
                2 => {
                    let _ = registry.unload(&alias);
                }
                3 => {
                    let _ = registry.rollback(&alias, None);
                }
                4 => leases.extend(runtime.block_on(registry.acquire(&alias)).ok()),
                _ if !leases.is_empty() => drop(leases.swap_remove(next(leases.len()))),
                _ => {}
            }
            registry.check().unwrap_or_else(|e| panic!("seed {seed}, step {step}: {e}"));
        }
        leases.clear();
        (0..3).for_each(|i| drop(registry.unload(&format!("a{i}"))));
        registry.check().unwrap();
        let state = registry.state();
        assert!(state.resident_bytes == 0 && state.generations.is_empty(), "seed {seed}: {state:?}");
    }
}

/// Writes a LoRA whose modules are these, with a scale of one.
fn plant(to: &Path, modules: &[(String, usize, Vec<f32>, Vec<f32>)]) {
    use safetensors::tensor::{Dtype, TensorView};
    std::fs::create_dir_all(to).unwrap();
    let ranks: serde_json::Map<String, serde_json::Value> = modules.iter().map(|(name, r, ..)| (name.clone(), (*r).into())).collect();
    let config = serde_json::json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks,
        "target_modules": ranks.keys().collect::<Vec<_>>()});
    std::fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
    let views = modules.iter().flat_map(|(name, r, down, up)| {
        let view = |rows: usize, data: &'_ [f32]| {
            TensorView::new(Dtype::F32, vec![rows, data.len() / rows], bytemuck::cast_slice::<f32, u8>(data).to_vec().leak()).unwrap()
        };
        [
            (format!("base_model.model.{name}.lora_A.weight"), view(*r, down)),
            (format!("base_model.model.{name}.lora_B.weight"), view(up.len() / r, up)),
        ]
    });
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &to.join("adapter_model.safetensors")).unwrap();
}

fn inspect_ask(root: &Root, adapter: &Path) -> AdapterInspect {
    AdapterInspect {
        folder: AdapterFolder {
            path: adapter.to_owned(),
            model: Some(golden::folder("llama-linear")),
            base: BaseChoice::Original,
            max_lora_rank: 64,
            cache_dir: Some(root.0.join("cache")),
            json: true,
        },
        k: 10,
        epsilon: 0.5,
        svg: Some(root.0.join("report.svg")),
        repair: None,
        lambda: 0.1,
    }
}

fn inspect(root: &Root, adapter: &Path, repair: Option<PathBuf>) -> serde_json::Value {
    let ask = AdapterInspect { repair, ..inspect_ask(root, adapter) };
    serde_json::from_str(&inspect_adapter(&ask).unwrap()).unwrap()
}

#[test]
fn inspection_reports_exactly_the_intruders_that_were_planted() {
    let root = Root::new("inspect", &[]);
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let mut rng = crate::ops::Rng::seeded(5);
    let planted: Vec<(Place, usize)> =
        [(Site::Q, 0), (Site::K, 1), (Site::V, 2), (Site::O, 3), (Site::Gate, 4), (Site::Up, 0), (Site::Down, 2)]
            .map(|(site, n)| (Place::Layer(1, site), n))
            .to_vec();
    let modules = planted.iter().map(|&(place, n)| {
        let (out, inputs) = place.shape(&base.config);
        let weight = base_weight(&base, place);
        let left = spectrum_left(Dense { rows: out, cols: inputs, data: &weight }).unwrap();
        let (m, top) = (left.s.len(), left.s[0]);
        let r = n.max(2);
        let (mut down, mut up) = (vec![0.0f32; r * inputs], vec![0.0f32; out * r]);
        for j in 0..n {
            // A direction spread evenly over all of the base's, and stronger than any of them: signs of a Hadamard matrix keep
            // several apart from each other.
            for o in 0..out {
                let spread: f32 = (0..m).map(|i| if (i & (j + 1)).count_ones() % 2 == 0 { 1.0 } else { -1.0 } * left.u[o * m + i]).sum();
                up[o * r + j] = spread / (m as f32).sqrt() * top * (2.0 + j as f32);
            }
            down[j * inputs + 7 * j + 3] = 1.0;
        }
        if n == 0 {
            down = rng.normals(r * inputs);
            up = rng.normals(out * r).iter().map(|v| v * 1e-3).collect();
        }
        (place.path(), r, down, up)
    });
    let adapter = root.0.join("planted");
    plant(&adapter, &modules.collect::<Vec<_>>());
    let count = |told: &serde_json::Value| -> Vec<(String, u64)> {
        let modules = told["modules"].as_array().unwrap().iter();
        modules.map(|m| (m["name"].as_str().unwrap().into(), m["intruders"]["found"].as_array().unwrap().len() as u64)).collect()
    };
    let told = inspect(&root, &adapter, Some(root.0.join("repaired")));
    let want: Vec<(String, u64)> = planted.iter().map(|(place, n)| (place.path(), *n as u64)).collect();
    assert_eq!(count(&told), want);
    assert_eq!(told["verdict"]["level"], "warning", "{}", told["verdict"]);
    let svg = std::fs::read_to_string(root.0.join("report.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("gate_proj"), "{}", &svg[..200]);
    // What was cached of the base gives the same.
    assert_eq!(count(&inspect(&root, &adapter, None)), want);
    assert!(std::fs::read_dir(root.0.join("cache")).unwrap().count() == 1, "one folder for one base");
    // Repaired, it is an adapter that is served, without any.
    let repaired = root.0.join("repaired");
    assert!(count(&inspect(&root, &repaired, None)).iter().all(|(_, n)| *n == 0));
    ready(&base, &repaired, &BaseChoice::Original, HeldAs::F32).unwrap();
}

#[test]
fn a_nearly_full_rank_adapter_that_stays_small_has_no_intruders() {
    let root = Root::new("benign", &[]);
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let mut rng = crate::ops::Rng::seeded(6);
    let modules = Site::ALL.map(|site| {
        let place = Place::Layer(0, site);
        let ((out, inputs), r) = (place.shape(&base.config), 60);
        let norm = base_weight(&base, place).iter().map(|v| v * v).sum::<f32>().sqrt();
        let down = rng.normals(r * inputs);
        let up = rng.normals(out * r).iter().map(|v| v * 0.03 * norm / ((out * inputs * r) as f32).sqrt()).collect();
        (place.path(), r, down, up)
    });
    plant(&root.0.join("benign"), &modules);
    let told = inspect(&root, &root.0.join("benign"), None);
    for m in told["modules"].as_array().unwrap() {
        assert_eq!(m["intruders"]["found"].as_array().unwrap().len(), 0, "{}", m["name"]);
        let norm = m["update"]["relative_norm"].as_f64().unwrap();
        assert!((0.02..0.04).contains(&norm) && m["update"]["rank_99"].as_u64().unwrap() > 30, "{}", m["update"]);
    }
}

#[test]
fn a_sorsa_adapter_reports_how_far_its_triples_drifted() {
    let root = Root::new("drift", &[]);
    let mut ask = inspect_ask(&root, &folder("sorsa-compact"));
    ask.folder.base = BaseChoice::Auto;
    let told: serde_json::Value = serde_json::from_str(&inspect_adapter(&ask).unwrap()).unwrap();
    for m in told["modules"].as_array().unwrap() {
        let drift = |side: &str| m["drift"][side].as_f64().unwrap();
        assert!(drift("a") > 0.01 && drift("b") > 0.01, "{m}");
    }
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
