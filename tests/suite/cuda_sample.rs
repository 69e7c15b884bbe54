//! Sampling on a device against the host's sampler, which defines it: the same tokens and log-probabilities, to the bit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use strait::engine::sampler::Sampler;
use strait::ids::SeqId;
use strait::model::choices::Choices;
use strait::model::cuda::CudaDecoder;
use strait::model::decoder::{Decoder, LogitsSink};
use strait::model::draw::{Answer, Ask, Draw, NotFinite, Occurrences};
use strait::model::weights::LoadDtype;
use strait::ops::cuda::Device;
use strait::request::{Event, GenerateRequest, Sampling, TokenLogprob};
use strait::scheduler::{Outcome, ProfileSizes, RowResult, Scheduler};
use strait::step::StepPlan;

use crate::cuda::{demo, device, engine_on, own_device, settings};
use crate::engine;

/// What is asked of one row, with all that it borrows.
#[derive(Clone)]
enum Asked {
    Nothing,
    Logits,
    Score { token: u32, alternatives: u32 },
    Token { sampling: Sampling, index: u32, occurrences: Option<Occurrences>, banned: Vec<u32>, logprobs: Option<u32> },
}

impl Asked {
    fn token(sampling: Sampling) -> Self {
        Asked::Token { sampling, index: 3, occurrences: None, banned: vec![], logprobs: None }
    }

    fn ask(&self) -> Ask<'_> {
        match self {
            Asked::Nothing => Ask::Nothing,
            Asked::Logits => Ask::Logits,
            Asked::Score { token, alternatives } => Ask::Score { token: *token, alternatives: *alternatives },
            Asked::Token { sampling, index, occurrences, banned, logprobs } => {
                Ask::Token(Draw { sampling, index: *index, occurrences: occurrences.as_ref(), banned, logprobs: *logprobs })
            }
        }
    }
}

type Row = (Vec<f32>, Asked);
type Answered = Option<Result<Answer, NotFinite>>;

/// Answers of the host's sampler.
fn on_host(rows: &[Row]) -> Vec<Answered> {
    let mut sampler = Sampler::default();
    let answer = |(logits, asked): &Row| match asked.ask() {
        Ask::Nothing | Ask::Logits => None,
        Ask::Score { token, alternatives } => Some(sampler.score(logits, token, alternatives).map(Answer::Score)),
        Ask::Token(draw) => Some(sampler.sample(&mut logits.clone(), &draw).map(|(id, logprob)| Answer::Token { id, logprob })),
    };
    rows.iter().map(answer).collect()
}

/// Answers of the device, which leaves logits alone that are asked for themselves.
fn on_device(device: &Arc<Device>, rows: &[Row]) -> Vec<Answered> {
    let vocab = rows[0].0.len();
    let mut choices = Choices::new(device, vocab).unwrap();
    rows.iter().for_each(|(_, asked)| choices.push(&asked.ask()));
    choices.set().unwrap();
    let all: Vec<f32> = rows.iter().flat_map(|(logits, _)| logits).copied().collect();
    let logits = device.upload(&all).unwrap();
    choices.launch(logits.part(0, all.len())).unwrap();
    let after = logits.to_vec().unwrap();
    for (i, (before, _)) in rows.iter().enumerate().filter(|(_, (_, asked))| matches!(asked, Asked::Logits)) {
        assert!(choices.wants_logits(i));
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
        assert!(before.iter().zip(&after[i * vocab..]).all(same), "logits that are asked for are left alone");
    }
    let answers = choices.read().unwrap();
    (0..rows.len()).map(|i| answers.of(i)).collect()
}

fn assert_alike(rows: &[Row]) {
    let (got, want) = (on_device(&device(), rows), on_host(rows));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let settings = match &rows[i].1 {
            Asked::Token { sampling, .. } => format!("{sampling:?}"),
            _ => "no draw".into(),
        };
        assert_eq!(got, want, "row {i} of {} logits: {settings}", rows[i].0.len());
    }
}

/// Seeded numbers.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn uniform(&mut self) -> f32 {
        (self.next() % (1 << 24)) as f32 / (1 << 24) as f32
    }

    /// Logits as a model has them: most of them a heap, some far above it.
    fn logits(&mut self, n: usize) -> Vec<f32> {
        let (spread, peaks) = (self.one_of(&[0.5, 3.0, 12.0]), self.below(6));
        let mut logits: Vec<f32> = (0..n).map(|_| spread * (0..4).map(|_| self.uniform() - 0.5).sum::<f32>()).collect();
        for _ in 0..peaks {
            let at = self.below(n);
            logits[at] += 4.0 * spread * self.uniform();
        }
        // Ties, as coarse logits have many.
        if self.below(3) == 0 {
            logits.iter_mut().for_each(|l| *l = (*l * 4.0).round() / 4.0);
        }
        if self.below(3) == 0 {
            let at = self.below(n);
            logits.iter_mut().skip(1).step_by(5).for_each(|l| *l = f32::NEG_INFINITY);
            logits[at] = 0.5;
        }
        logits
    }

    fn tokens(&mut self, vocab: usize, most: usize) -> Vec<u32> {
        let n = self.below(most.min(vocab) + 1);
        let mut all: Vec<u32> = (0..n).map(|_| self.below(vocab) as u32).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn asked(&mut self, vocab: usize) -> Asked {
        if self.below(8) == 0 {
            return Asked::Score { token: self.below(vocab) as u32, alternatives: self.one_of(&[0, 1, 5, 20]) };
        }
        let sampling = Sampling {
            temperature: self.one_of(&[0.0, 1e-3, 0.3, 0.7, 1.0, 1.0, 1.3, 2.0]),
            top_p: self.one_of(&[1.0, 1.0, 0.99, 0.9, 0.5, 1e-6]),
            top_k: self.one_of(&[0, 0, 1, 2, 20, 1000, 50_000, u32::MAX]),
            min_p: self.one_of(&[0.0, 0.0, 0.01, 0.2, 1.0]),
            repetition_penalty: self.one_of(&[1.0, 1.1, 0.5]),
            presence_penalty: self.one_of(&[0.0, 0.7, -1.0]),
            frequency_penalty: self.one_of(&[0.0, 0.3]),
            logit_bias: Arc::new(self.tokens(vocab, 9).into_iter().map(|t| (t, self.uniform() * 20.0 - 10.0)).collect()),
            seed: self.next(),
        };
        let mut occurrences = Occurrences::of_prompt(&self.tokens(vocab, 600));
        self.tokens(vocab, 40).into_iter().for_each(|t| (0..=t % 3).for_each(|_| occurrences.add(t)));
        Asked::Token {
            sampling,
            index: self.below(1000) as u32,
            occurrences: (self.below(2) == 0).then_some(occurrences),
            banned: if self.below(3) == 0 { self.tokens(vocab - 1, 4) } else { vec![] },
            logprobs: self.one_of(&[None, None, Some(0), Some(3), Some(20)]),
        }
    }
}

fn with(f: impl FnOnce(&mut Sampling)) -> Asked {
    let mut s = Sampling { temperature: 1.0, seed: 11, ..Sampling::greedy() };
    f(&mut s);
    Asked::token(s)
}

#[test]
fn the_device_chooses_the_tokens_of_the_host() {
    let mut rng = Rng(3);
    for (vocab, batches, rows) in [(1, 2, 4), (2, 2, 9), (7, 6, 16), (1000, 12, 16), (2049, 4, 5), (32_003, 4, 6), (128_256, 4, 3)] {
        for _ in 0..batches {
            let some: Vec<Row> = (0..rows).map(|_| (rng.logits(vocab), rng.asked(vocab))).collect();
            assert_alike(&some);
        }
    }
}

#[test]
fn every_setting_alone_is_that_of_the_host() {
    let mut rng = Rng(5);
    let peaked: Vec<f32> = rng.logits(5000).iter().map(|l| 2.0 * l).collect();
    let settings = [
        with(|s| s.temperature = 0.0),
        with(|_| ()),
        with(|s| s.top_k = 1),
        with(|s| s.top_k = 7),
        with(|s| s.top_k = 4999),
        with(|s| s.top_k = 5000),
        with(|s| s.top_p = 0.3),
        with(|s| s.top_p = 0.95),
        with(|s| s.top_p = 1.0f32.next_down()),
        with(|s| s.top_p = f32::MIN_POSITIVE),
        with(|s| s.min_p = 0.05),
        with(|s| s.min_p = 1.0),
        with(|s| (s.top_k, s.top_p) = (50, 0.8)),
        with(|s| (s.top_k, s.top_p, s.min_p) = (50, 0.8, 0.1)),
        with(|s| (s.temperature, s.top_p) = (f32::MIN_POSITIVE, 0.9)),
        with(|s| (s.temperature, s.top_p) = (1e30, 0.9)),
        with(|s| s.logit_bias = Arc::new(BTreeMap::from([(17, 100.0)]))),
    ];
    let rows: Vec<Row> = settings.into_iter().map(|asked| (peaked.clone(), asked)).collect();
    assert_alike(&rows);
}

#[test]
fn flat_logits_are_cut_where_the_host_cuts_them() {
    let (flat, vocab) = (vec![0.25f32; 128_256], 128_256);
    let settings = [
        with(|s| s.temperature = 0.0),
        with(|_| ()),
        with(|s| s.top_p = 0.5),
        with(|s| (s.top_k, s.top_p) = (50_000, 0.9)),
        with(|s| (s.top_k, s.seed) = (40, 5)),
    ];
    assert_alike(&settings.map(|asked| (flat.clone(), asked)));
    // The shares themselves: ids below a half, and below 40.
    let draws = |asked: Asked| -> Vec<u32> {
        let of = |index| match asked.clone() {
            Asked::Token { sampling, .. } => Asked::Token { sampling, index, occurrences: None, banned: vec![], logprobs: None },
            other => other,
        };
        let rows: Vec<Row> = (0..6).map(|index| (flat.clone(), of(index))).collect();
        let token = |a: Answered| match a.unwrap().unwrap() {
            Answer::Token { id, .. } => id,
            other => panic!("{other:?}"),
        };
        on_device(&device(), &rows).into_iter().map(token).collect()
    };
    let half = draws(with(|s| s.top_p = 0.5));
    assert!(half.iter().all(|&t| t < vocab / 2) && half.iter().any(|&t| t > vocab / 4), "{half:?}");
    assert!(draws(with(|s| s.top_k = 40)).iter().all(|&t| t < 40));
}

#[test]
fn broken_rows_are_told_apart_from_good_ones() {
    let good: Vec<f32> = (0..3000).map(|i| (i * 7919 % 3000) as f32 / 200.0).collect();
    let spoilt = |at: usize, by: f32| {
        let mut l = good.clone();
        l[at] = by;
        l
    };
    let scored = |sampling: Sampling| Asked::Token { sampling, index: 0, occurrences: None, banned: vec![], logprobs: Some(4) };
    let drawn = Sampling { temperature: 1.0, top_p: 0.9, seed: 2, ..Sampling::greedy() };
    let none_left = Asked::Token { sampling: drawn.clone(), index: 0, occurrences: None, banned: vec![1000], logprobs: Some(1) };
    let mut alone = vec![f32::NEG_INFINITY; 3000];
    alone[1000] = 1.0;
    let rows = vec![
        (good.clone(), scored(drawn.clone())),
        (spoilt(2999, f32::NAN), scored(drawn.clone())),
        (spoilt(0, -f32::NAN), Asked::token(Sampling::greedy())),
        (spoilt(1500, f32::INFINITY), Asked::token(drawn.clone())),
        (vec![f32::NEG_INFINITY; 3000], scored(Sampling::greedy())),
        (alone.clone(), none_left),
        (alone, scored(drawn.clone())),
        (spoilt(7, f32::NAN), Asked::Score { token: 3, alternatives: 2 }),
        (spoilt(7, f32::NAN), Asked::Nothing),
        (spoilt(7, f32::NAN), Asked::Logits),
        (good.clone(), Asked::Logits),
        (good.clone(), Asked::Score { token: 3, alternatives: 2 }),
        (good, Asked::token(Sampling::greedy())),
    ];
    assert_alike(&rows);
    let broken: Vec<usize> = (0..).zip(on_host(&rows)).filter(|(_, a)| *a == Some(Err(NotFinite))).map(|(i, _)| i).collect();
    assert_eq!(broken, [1, 2, 3, 4, 5, 7]);
}

#[test]
fn a_row_is_chosen_alike_in_any_batch() {
    let mut rng = Rng(17);
    let rows: Vec<Row> = (0..20).map(|_| (rng.logits(40_000), rng.asked(40_000))).collect();
    let all = on_device(&device(), &rows);
    for i in [0, 7, 13] {
        assert_eq!(on_device(&device(), &rows[i..i + 1]), all[i..i + 1], "row {i}");
    }
}

#[test]
fn frequencies_on_the_device_follow_the_distribution() {
    let p = [0.5f32, 0.25, 0.2, 0.05];
    let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
    let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy() };
    let mut seen = [0; 4];
    let draws = 1024;
    for first in (0..draws).step_by(64) {
        let of = |index| Asked::Token { sampling: sampling.clone(), index, occurrences: None, banned: vec![], logprobs: None };
        let rows: Vec<Row> = (first..first + 64).map(|index| (logits.clone(), of(index))).collect();
        for answer in on_device(&device(), &rows) {
            let Some(Ok(Answer::Token { id, .. })) = answer else { panic!("{answer:?}") };
            seen[id as usize] += 1;
        }
    }
    for (n, p) in seen.iter().zip(p) {
        let share = f64::from(*n) / f64::from(draws);
        assert!((share - f64::from(p)).abs() < 0.04, "{share} for {p}");
    }
}

/// Asks a device for logits, and has the host choose: what the engine must come to with the device's own choice.
struct ByHand<'a> {
    plan: &'a StepPlan,
    request: &'a GenerateRequest,
    occurrences: &'a Occurrences,
    generated: &'a [u32],
    prompt: &'a mut Vec<TokenLogprob>,
    chosen: Option<(u32, Option<TokenLogprob>)>,
}

impl LogitsSink for ByHand<'_> {
    fn logits(&mut self, row: usize, position: u32, logits: &mut [f32]) {
        assert_eq!(row, 0, "{}", self.plan);
        let (r, next, mut sampler) = (self.request, position as usize + 1, Sampler::default());
        if next < r.prompt.len() {
            let n = r.prompt_logprobs.expect("no logits but the last are wanted without");
            self.prompt.push(sampler.score(logits, r.prompt[next], n).unwrap());
        } else {
            let draw = Draw {
                sampling: &r.sampling,
                index: self.generated.len() as u32,
                occurrences: Some(self.occurrences),
                banned: if (self.generated.len() as u32) < r.min_new_tokens { &r.stop_tokens } else { &[] },
                logprobs: r.logprobs,
            };
            self.chosen = Some(sampler.sample(logits, &draw).unwrap());
        }
    }
}

type Heard = (Vec<(u32, Option<TokenLogprob>)>, Vec<TokenLogprob>);

fn by_hand(requests: &[GenerateRequest]) -> Vec<Heard> {
    let (checkpoint, profiles) = demo();
    let config = &checkpoint.config;
    let sizes: Vec<ProfileSizes> = profiles.iter().map(|p| ProfileSizes::of(&p.layout)).collect();
    let arena_bytes = 40 * profiles[0].layout.sizes().exact;
    let mut scheduler = Scheduler::new(settings(config.layers as u32, 256, arena_bytes, sizes)).unwrap();
    let host = Decoder::new(config, checkpoint.weights(LoadDtype::Bf16), 1024, 64);
    let mut on = CudaDecoder::new(own_device(), config, host.weights(), host.rope(), profiles, (arena_bytes, 0, 64)).unwrap();
    let (mut plan, mut outcomes, mut now) = (StepPlan::default(), Vec::new(), Duration::ZERO);
    let mut all = vec![];
    for (seq, request) in (0..).zip(requests) {
        scheduler.enqueue(SeqId(seq), request.clone(), now).unwrap();
        let (mut tokens, mut said, mut prompt) = (vec![], vec![], vec![]);
        let mut occurrences = Occurrences::of_prompt(&request.prompt);
        while !scheduler.is_idle() {
            now += Duration::from_millis(1);
            scheduler.plan(now, &mut plan, &mut outcomes);
            let mut sink =
                ByHand { plan: &plan, request, occurrences: &occurrences, generated: &tokens, prompt: &mut prompt, chosen: None };
            on.forward(&plan, &[], &mut sink).unwrap();
            let chosen = sink.chosen;
            let result = chosen.as_ref().map_or(RowResult::Nothing, |(id, _)| RowResult::Token(*id));
            if let Some((id, logprob)) = chosen {
                occurrences.add(id);
                tokens.push(id);
                said.push((id, logprob));
            }
            scheduler.commit(&plan, &[result], now, &mut outcomes);
        }
        let heard = outcomes.drain(..).filter(|o| matches!(o, Outcome::Token { .. })).count();
        assert_eq!(said.len(), heard, "every token is told, a stop token as the last one");
        all.push((said, prompt));
    }
    all
}

#[test]
fn an_engine_that_samples_on_its_device_says_what_the_host_would_choose() {
    let prompt: Vec<u32> = (0..24).map(|i| 20 + i * 7 % 900).collect();
    let request = |new: u32, profile: u8, logprobs, sampling| GenerateRequest {
        logprobs,
        sampling,
        ..engine::request(&prompt[..24 - 7 * profile as usize], new, profile)
    };
    let drawn = Sampling { temperature: 0.9, top_p: 0.95, top_k: 200, seed: 9, ..Sampling::greedy() };
    let penalised = Sampling {
        temperature: 1.1,
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        logit_bias: Arc::new(BTreeMap::from([(5, -3.0), (70, 2.5)])),
        min_p: 0.02,
        seed: 10,
        ..Sampling::greedy()
    };
    let stops: Arc<[u32]> = (0..500).collect();
    let requests = [
        request(3, 0, None, Sampling::greedy()),
        request(4, 0, Some(3), drawn.clone()),
        request(5, 1, Some(20), penalised.clone()),
        GenerateRequest { min_new_tokens: 2, stop_tokens: stops, ..request(4, 1, None, penalised) },
        GenerateRequest { prompt_logprobs: Some(2), ..request(2, 0, Some(0), drawn) },
    ];
    let want = by_hand(&requests);
    let (engine, thread) = engine_on(own_device());
    for (i, (request, (tokens, prompt))) in requests.iter().zip(want).enumerate() {
        let mut stream = engine.submit(request.clone()).unwrap();
        let (mut heard, mut scored) = (vec![], vec![]);
        loop {
            match crate::engine::event_of(&mut stream) {
                Event::Token { id, logprob } => heard.push((id, logprob)),
                Event::Prompt { logprobs } => scored = logprobs,
                Event::Done { .. } => break,
                Event::Failed { failure } => panic!("request {i}: {failure:?}"),
            }
        }
        assert!(heard.len() >= 2, "request {i} says {heard:?}");
        assert_eq!(heard, tokens, "request {i}");
        assert_eq!(scored, prompt, "the prompt of request {i}");
    }
    engine.stop();
    thread.join().unwrap().unwrap();
}
