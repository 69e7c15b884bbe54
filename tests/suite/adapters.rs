//! Adapters against Hugging Face PEFT and an independent SORSA: every format on disk, its logits, and what is refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use strait::adapters::base::Spectra;
use strait::adapters::folder::Bounds;
use strait::adapters::{AdapterError, BaseChoice, Module, Reader, Ready};
use strait::model::checkpoint::Checkpoint;
use strait::model::delta::HeldAs;
use strait::model::weights::LoadDtype;
use strait::ops::Ops;
use strait::ops::cpu::Cpu;
use strait::ops::reference::Reference;
use strait::step::Logits;

use crate::golden;
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

pub(crate) fn ready(base: &Checkpoint, path: &Path, choice: &BaseChoice, held: HeldAs) -> Result<Ready, AdapterError> {
    let bounds = Bounds { root: None, file_bytes: 64 << 20 };
    Reader { base, spectra: &Spectra::new(None, base), bounds, rank: 64 }.ready(path, choice, held)
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
            for (a, b) in got.last().unwrap().1.iter().zip(&case.logits) {
                logit = logit.max((a - b).abs());
            }
            for (i, want) in case.logprobs.iter().enumerate() {
                logprob = logprob.max((log_softmax(&got[i].1, case.prompt[i + 1]) - want).abs());
            }
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
fn an_initial_adapter_is_taken_out_again() {
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let spectra = Spectra::new(None, &base);
    let bounds = Bounds { root: None, file_bytes: 64 << 20 };
    let reader = Reader { base: &base, spectra: &spectra, bounds, rank: 64 };
    let read = |name: &str, choice| reader.read(&folder(name), &choice).unwrap().parsed.modules;
    let (trained, initial) = (read("pissa", BaseChoice::Original), read("pissa-niter", BaseChoice::Original));
    let moved = read("pissa", BaseChoice::Initial(folder("pissa-niter")));
    assert_eq!(moved.len(), trained.len());
    for (place, module) in &moved {
        let (a, b) = (product(&trained[place]), product(&initial[place]));
        assert!(a.iter().zip(&b).any(|(a, b)| (a - b).abs() > 1e-3), "the two differ");
        for (got, (a, b)) in product(module).iter().zip(a.iter().zip(&b)) {
            assert!((got - (a - b)).abs() < 1e-6, "{place:?}: {got} for {a} - {b}");
        }
    }
}
