//! Calibration text that the model says itself: what it is likely to read and write, when nobody gives any
//! (as LLM-QAT does, arXiv 2305.17888).

use super::text::Draw;
use crate::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex, SeqId, TokenId};
use crate::kv::Arena;
use crate::kv::layout::{ExactType, PageLayout, Profile};
use crate::model::decoder::{Decoder, LogitsSink, Pass, ReadyProfile};
use crate::ops::Ops;
use crate::step::{ExactStore, Logits, Row, StepPlan};

/// Sequences told side by side: each weight that is read serves all of them.
const ROWS: usize = 16;
/// Tokens of a sequence, at most.
const LENGTH: usize = 512;
/// Tokens of a sequence before it may end.
const LEAST: usize = 32;
/// Share of the probability that is drawn from: the likeliest tokens that hold it.
const NUCLEUS: f32 = 0.95;

/// What sequences are made of.
#[derive(Clone, Copy, Debug)]
pub struct Telling<'a> {
    /// Each begins with these; with a token drawn evenly from the vocabulary where there are none.
    pub begin: &'a [TokenId],
    /// Each ends before one of these, if not at its greatest length.
    pub ends: &'a [TokenId],
    /// Tokens in all, at least.
    pub want: usize,
    pub seed: u64,
}

/// Sequences the model says by itself, drawn at temperature 1 from the nucleus. `done` hears how many tokens there are. The same
/// arguments give the same sequences on the same backend.
///
/// Cost: a decode step of 16 rows for every 16 tokens; memory for exact caches of 16 sequences of 512 tokens.
///
/// # Errors
/// Where logits are not finite, or the memory for the caches cannot be had.
///
/// # Panics
/// Where `begin` fills a sequence.
pub fn sample(
    decoder: &mut Decoder<'_>,
    ops: &dyn Ops,
    telling: &Telling<'_>,
    mut done: impl FnMut(usize),
) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let length = LENGTH.min(decoder.positions());
    assert!(telling.begin.len() < length, "nothing is left to say");
    let full = Profile { name: "full".into(), cskv: None };
    let layout = PageLayout::new(decoder.config(), ExactType::Bf16, &full, None);
    let (page, each) = (layout.sizes().exact, length.div_ceil(PAGE_TOKENS as usize));
    let mut arena = Arena::new(page * (ROWS * each) as u64)?;
    let pages: Vec<PageAddr> = (0..(ROWS * each) as u64).map(|i| PageAddr((i * page / PageAddr::UNIT) as u32)).collect();
    let profiles = [ReadyProfile { layout, compression: Vec::new() }];
    let mut draw = Draw::new(telling.seed);
    let vocab = decoder.config().vocab;
    let begin = |draw: &mut Draw| match telling.begin {
        [] => vec![draw.below(vocab) as TokenId],
        some => some.to_vec(),
    };
    let mut rows: Vec<Told> = (0..ROWS).map(|_| Told { tokens: begin(&mut draw), computed: 0 }).collect();
    let mut texts: Vec<Vec<TokenId>> = Vec::new();
    let mut finished = 0;
    loop {
        let so_far = finished + rows.iter().map(|r| r.tokens.len()).sum::<usize>();
        done(so_far.min(telling.want));
        if so_far >= telling.want {
            break;
        }
        let mut plan = StepPlan { rows: vec![], tokens: vec![], pages: pages.clone(), moves: vec![] };
        for (i, told) in rows.iter().enumerate() {
            let first = plan.tokens.len();
            plan.tokens.extend(&told.tokens[told.computed..]);
            plan.rows.push(Row {
                seq: SeqId(i as u64),
                profile: ProfileIndex(0),
                adapter: AdapterGeneration(0),
                positions: told.computed as u32..told.tokens.len() as u32,
                layers: 0..decoder.config().layers as u32,
                tokens: first..plan.tokens.len(),
                sealed: 0..0,
                exact: i * each..(i + 1) * each,
                store: ExactStore::Exact,
                sinks: None,
                moves: 0..0,
                logits: Logits::Last,
            });
        }
        let mut pick =
            Pick { rows: &mut rows, draw: &mut draw, ends: telling.ends, order: Vec::new(), ended: [false; ROWS], broken: false };
        decoder.forward(&mut Pass {
            plan: &plan,
            arena: &mut arena,
            profiles: &profiles,
            adapters: &[],
            ops,
            sink: &mut pick,
            observer: None,
        });
        let Pick { ended, broken, .. } = pick;
        if broken {
            anyhow::bail!("the model's logits are not finite on text of its own; the checkpoint or the kernels are broken");
        }
        for (told, ended) in rows.iter_mut().zip(ended) {
            if ended || told.tokens.len() == length {
                finished += told.tokens.len();
                let next = Told { tokens: begin(&mut draw), computed: 0 };
                texts.push(std::mem::replace(told, next).tokens);
            }
        }
    }
    texts.extend(rows.into_iter().map(|r| r.tokens).filter(|t| t.len() > telling.begin.len().max(1)));
    Ok(texts)
}

/// A sequence, and how much of it the cache has.
struct Told {
    tokens: Vec<TokenId>,
    computed: usize,
}

/// Draws each row's next token.
struct Pick<'a> {
    rows: &'a mut [Told],
    draw: &'a mut Draw,
    ends: &'a [TokenId],
    order: Vec<u32>,
    ended: [bool; ROWS],
    broken: bool,
}

impl LogitsSink for Pick<'_> {
    fn logits(&mut self, row: usize, _: u32, logits: &mut [f32]) {
        if logits.iter().any(|x| !x.is_finite()) {
            self.broken = true;
            return;
        }
        let told = &mut self.rows[row];
        told.computed = told.tokens.len();
        if told.tokens.len() < LEAST {
            self.ends.iter().for_each(|&t| logits[t as usize] = f32::NEG_INFINITY);
        }
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        logits.iter_mut().for_each(|x| *x = (*x - top).exp());
        let total: f32 = logits.iter().sum();
        self.order.clear();
        // What has a hundred-thousandth of an even share is beyond any nucleus.
        self.order.extend((0..logits.len() as u32).filter(|&i| logits[i as usize] > 1e-5 * total / logits.len().max(1) as f32));
        self.order.sort_unstable_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let mut held = 0.0;
        let within = self.order.iter().position(|&i| {
            held += logits[i as usize];
            held >= NUCLEUS * total
        });
        let mut left = self.draw.fraction() as f32 * held;
        let nucleus = &self.order[..within.map_or(self.order.len(), |i| i + 1)];
        let token = nucleus.iter().copied().find(|&i| {
            left -= logits[i as usize];
            left < 0.0
        });
        let token = token.unwrap_or(nucleus[0]);
        self.ended[row] = self.ends.contains(&token);
        told.tokens.push(token);
    }
}
