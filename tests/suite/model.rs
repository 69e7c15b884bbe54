//! The decoder against Hugging Face transformers: tiny checkpoints of every family, their prompts' log-probabilities
//! and greedy continuations (made by `tests/golden/make_models.py`), on every backend and every way to cut the work.

use strait::ids::{AdapterGeneration, PageAddr, ProfileIndex, SeqId, TokenId};
use strait::kv::Arena;
use strait::kv::layout::{ExactType, PageLayout, Profile};
use strait::model::checkpoint::Checkpoint;
use strait::model::decoder::{Decoder, LogitsSink, Pass, ReadyProfile};
use strait::model::delta::Delta;
use strait::model::weights::LoadDtype;
use strait::ops::Ops;
use strait::ops::cpu::Cpu;
use strait::ops::reference::Reference;
use strait::step::{ExactStore, Logits, Row, StepPlan};

use crate::golden::{MODELS, expected, folder};

/// Logits of every position asked for, by position.
#[derive(Default)]
struct Collected(Vec<(u32, Vec<f32>)>);

impl LogitsSink for Collected {
    fn logits(&mut self, _: usize, position: u32, logits: &mut [f32]) {
        self.0.push((position, logits.to_vec()));
    }
}

/// One sequence with a `full` cache of its own.
pub(crate) struct Alone<'a> {
    decoder: Decoder<'a>,
    arena: Arena,
    profiles: Vec<ReadyProfile>,
    pages: Vec<PageAddr>,
    /// The adapter it wears.
    pub(crate) delta: Option<Delta>,
}

impl<'a> Alone<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, dtype: LoadDtype) -> Self {
        const POSITIONS: usize = 512;
        let full = Profile { name: "full".into(), cskv: None };
        let layout = PageLayout::new(&checkpoint.config, ExactType::F32, &full, None);
        let page = layout.sizes().exact;
        let pages = (0..POSITIONS as u64 / 64).map(|i| PageAddr((i * page / PageAddr::UNIT) as u32)).collect();
        Alone {
            decoder: Decoder::new(&checkpoint.config, checkpoint.weights(dtype), POSITIONS, 64),
            arena: Arena::new(page * POSITIONS as u64 / 64).unwrap(),
            profiles: vec![ReadyProfile { layout, compression: vec![] }],
            pages,
            delta: None,
        }
    }

    pub(crate) fn run(&mut self, ops: &dyn Ops, tokens: &[TokenId], from: u32, logits: Logits) -> Vec<(u32, Vec<f32>)> {
        let end = from + tokens.len() as u32;
        let row = Row {
            seq: SeqId(0),
            profile: ProfileIndex(0),
            adapter: AdapterGeneration(u64::from(self.delta.is_some())),
            positions: from..end,
            layers: 0..self.decoder.config().layers as u32,
            tokens: 0..tokens.len(),
            sealed: 0..0,
            exact: 0..self.pages.len(),
            store: ExactStore::Exact,
            sinks: None,
            moves: 0..0,
            logits,
        };
        let plan = StepPlan { rows: vec![row], tokens: tokens.to_vec(), pages: self.pages.clone(), moves: vec![] };
        let mut sink = Collected::default();
        let adapters: Vec<_> = self.delta.iter().map(|d| (AdapterGeneration(1), d)).collect();
        self.decoder.forward(&mut Pass {
            plan: &plan,
            arena: &mut self.arena,
            profiles: &self.profiles,
            adapters: &adapters,
            ops,
            sink: &mut sink,
            observer: None,
        });
        sink.0
    }
}

pub(crate) fn log_softmax(logits: &[f32], token: TokenId) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    (f64::from(logits[token as usize] - max) - sum.ln()) as f32
}

fn argmax(logits: &[f32]) -> TokenId {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as TokenId
}

fn check_goldens(ops: &dyn Ops) {
    for name in MODELS {
        let checkpoint = Checkpoint::open(&folder(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut worst = 0.0f32;
        for case in &expected(name) {
            let mut alone = Alone::new(&checkpoint, LoadDtype::F32);
            let mut got = alone.run(ops, &case.prompt, 0, Logits::All);
            assert_eq!(got.len(), case.prompt.len());
            for (i, want) in case.logprobs.iter().enumerate() {
                let (got, want) = (log_softmax(&got[i].1, case.prompt[i + 1]), *want as f32);
                worst = worst.max((got - want).abs());
                assert!(
                    (got - want).abs() < 1e-3,
                    "{name}, prompt of {}: log-probability {i} is {got}, transformers say {want}",
                    case.prompt.len()
                );
            }
            let mut continuation = vec![];
            for i in 0..case.continuation.len() {
                let token = argmax(&got.last().unwrap().1);
                continuation.push(token);
                got = alone.run(ops, &[token], (case.prompt.len() + i) as u32, Logits::Last);
            }
            assert_eq!(continuation, case.continuation, "{name}, prompt of {}", case.prompt.len());
        }
        println!("{name}: largest difference of a log-probability {worst:.1e}");
    }
}

#[test]
fn the_reference_agrees_with_transformers() {
    check_goldens(&Reference);
}

#[test]
fn the_fast_backend_agrees_with_transformers() {
    check_goldens(&Cpu::new(2));
}
