//! The committed golden checkpoints: where they lie, and what transformers says of them.
//!
//! Made by `tests/golden/make_models.py`; its header says what each field means and how to make them again.

use std::path::PathBuf;

use serde::Deserialize;

/// Every golden checkpoint, by folder name.
pub(crate) const MODELS: [&str; 8] = ["llama2", "llama3", "llama-bias", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen3"];

/// One prompt, and the float32 reference's view of it. Logarithms are natural.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) prompt: Vec<u32>,
    /// `logprobs[i]` is that of `prompt[i + 1]` after `prompt[..=i]`.
    pub(crate) logprobs: Vec<f64>,
    /// The five likeliest tokens after the whole prompt, best first.
    pub(crate) top: Vec<Top>,
    /// 24 greedy tokens; an end of sequence among them does not end it.
    pub(crate) continuation: Vec<u32>,
    pub(crate) continuation_logprobs: Vec<f64>,
    /// The least distance in logprob between the best and the second token along the continuation.
    pub(crate) min_gap: f64,
}

/// A token with its logprob.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Top {
    pub(crate) id: u32,
    pub(crate) logprob: f64,
}

#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

/// The checkpoint's folder.
pub(crate) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name)
}

/// What the reference says of `name`, shortest prompt first.
pub(crate) fn expected(name: &str) -> Vec<Case> {
    let path = folder(name).join("expected.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let expected: Expected = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    expected.cases
}

/// Natural log-probabilities of one row of logits, in float64.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let log_sum = logits.iter().map(|&x| (x as f64 - max).exp()).sum::<f64>().ln();
    logits.iter().map(|&x| x as f64 - max - log_sum).collect()
}

/// The largest of some differences: NaN if one of them is, which `f32::max` would pass over.
pub(crate) fn worst(differences: impl IntoIterator<Item = f32>) -> f32 {
    differences.into_iter().fold(0.0, |worst, x| if x.is_nan() || x > worst { x } else { worst })
}

#[test]
fn a_difference_that_is_no_number_is_the_worst() {
    assert!(worst([1.0, f32::NAN, 2.0]).is_nan());
    assert_eq!(worst([1.0, f32::INFINITY, 2.0]), f32::INFINITY);
    assert_eq!(worst([]), 0.0);
}

#[test]
fn every_golden_file_is_whole() {
    for name in MODELS {
        let cases = expected(name);
        let lengths: Vec<usize> = cases.iter().map(|c| c.prompt.len()).collect();
        assert_eq!(lengths, [1, 5, 63, 64, 65, 200, 300], "{name}");
        for case in &cases {
            assert_eq!(case.logprobs.len() + 1, case.prompt.len(), "{name}");
            assert_eq!((case.continuation.len(), case.continuation_logprobs.len()), (24, 24), "{name}");
            assert_eq!(case.top[0].id, case.continuation[0], "{name}: greedy starts with the likeliest token");
            assert!(case.top.is_sorted_by(|a, b| a.logprob >= b.logprob), "{name}");
            assert!(case.min_gap > 1e-3, "{name}: a near-tie would make the continuation a matter of rounding");
        }
    }
}
