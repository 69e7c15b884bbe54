//! Runs calibration texts through the exact model and shows what it makes of them to [`Moments`], or to any observer.

use crate::calibrate::{CalibrateError, Moments};
use crate::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex, SeqId, TokenId};
use crate::kv::Arena;
use crate::kv::layout::{ExactType, PageLayout, Profile};
use crate::model::decoder::{Decoder, LogitsSink, Observer, Pass, ReadyProfile};
use crate::ops::Ops;
use crate::step::{ExactStore, Logits, Row, StepPlan};

/// Tokens computed at once.
const CHUNK: usize = 512;

/// Takes in every token of `texts`, each a sequence of its own with an exact cache. `done` hears how many tokens are in.
///
/// Cost: one prefill of all texts, without the output head; memory for the exact cache of the longest.
///
/// # Errors
/// Where a key or value is not finite, or the memory for the cache cannot be had.
pub fn collect(
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    texts: &[Vec<TokenId>],
    moments: &mut Moments,
    mut done: impl FnMut(usize),
) -> anyhow::Result<()> {
    let mut watch = Watch { moments, failed: None };
    show(decoder, ops, texts, &mut watch, |watch, seen| {
        done(seen);
        watch.failed.take().map_or(Ok(()), |failed| Err(failed.into()))
    })
}

/// Shows every token of `texts`, each a sequence of its own with an exact cache, to `observer`, in order. `done` hears how many
/// tokens were shown, after every chunk of some hundreds, and may end it.
///
/// Cost: as [`collect`].
///
/// # Errors
/// That of `done`, or where the memory for the cache cannot be had.
pub fn show<O: Observer>(
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    texts: &[Vec<TokenId>],
    observer: &mut O,
    mut done: impl FnMut(&mut O, usize) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let full = Profile { name: "full".into(), cskv: None };
    let layout = PageLayout::new(decoder.config(), ExactType::F32, &full, None);
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
    let page = layout.sizes().exact;
    let n_pages = longest.div_ceil(PAGE_TOKENS as usize) as u64;
    let mut arena = Arena::new(page * n_pages)?;
    let pages: Vec<PageAddr> = (0..n_pages).map(|i| PageAddr((i * page / PageAddr::UNIT) as u32)).collect();
    let profiles = [ReadyProfile { layout, compression: Vec::new() }];
    let mut seen = 0;
    for text in texts {
        observer.begin();
        for (i, chunk) in text.chunks(CHUNK).enumerate() {
            let start = (i * CHUNK) as u32;
            let row = Row {
                seq: SeqId(0),
                profile: ProfileIndex(0),
                adapter: AdapterGeneration(0),
                positions: start..start + chunk.len() as u32,
                layers: 0..decoder.config().layers as u32,
                tokens: 0..chunk.len(),
                sealed: 0..0,
                exact: 0..pages.len(),
                store: ExactStore::Exact,
                sinks: None,
                moves: 0..0,
                logits: Logits::None,
            };
            let plan = StepPlan { rows: vec![row], tokens: chunk.to_vec(), pages: pages.clone(), moves: vec![] };
            let shown: Option<&mut dyn Observer> = Some(&mut *observer);
            decoder.forward(&mut Pass {
                plan: &plan,
                arena: &mut arena,
                profiles: &profiles,
                adapters: &[],
                ops,
                sink: &mut Nobody,
                observer: shown,
            });
            seen += chunk.len();
            done(observer, seen)?;
        }
    }
    Ok(())
}

struct Watch<'a> {
    moments: &'a mut Moments,
    failed: Option<CalibrateError>,
}

impl Observer for Watch<'_> {
    fn begin(&mut self) {
        self.moments.begin();
    }

    fn inputs(&mut self, layer: usize, residual: &[f32], inputs: &[f32]) {
        if self.failed.is_none() {
            self.failed = self.moments.add_inputs(layer, inputs).err();
            self.moments.add_residual(layer, residual);
        }
    }

    fn observe(&mut self, layer: usize, positions: &[u32], keys: &[f32], values: &[f32]) {
        if self.failed.is_none() {
            self.failed = self.moments.add(layer, positions[0] as usize, keys, values).err();
        }
    }

    fn queries(&mut self, layer: usize, queries: &[f32]) {
        if self.failed.is_none() {
            self.failed = self.moments.add_queries(layer, queries).err();
        }
    }
}

struct Nobody;

impl LogitsSink for Nobody {
    fn logits(&mut self, _: usize, _: u32, _: &mut [f32]) {}
}
