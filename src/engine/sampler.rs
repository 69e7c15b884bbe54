//! Logits to tokens. The draw of a sequence's `i`-th token is a pure function of its logits, its settings and
//! `(seed, i)`: the same whatever else runs, on any number of threads, after any preemption.

use std::collections::HashMap;

use crate::ids::TokenId;
use crate::request::{Sampling, TokenLogprob};

/// Scratch of the sampler, reused from token to token.
#[derive(Default)]
pub struct Sampler {
    candidates: Vec<(f32, TokenId)>,
}

/// How often each token occurred, kept per sequence only while a penalty needs it.
#[derive(Default, Clone, Debug)]
pub struct Occurrences {
    /// Token to (is in the prompt, times in the output).
    counts: HashMap<TokenId, (bool, u32)>,
}

impl Occurrences {
    /// Counts a prompt.
    pub fn of_prompt(prompt: &[TokenId]) -> Self {
        Occurrences { counts: prompt.iter().map(|&t| (t, (true, 0))).collect() }
    }

    /// Counts one generated token.
    pub fn add(&mut self, token: TokenId) {
        self.counts.entry(token).or_default().1 += 1;
    }
}

/// Whether any penalty of these settings depends on what was said before.
pub fn has_penalties(s: &Sampling) -> bool {
    s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0
}

/// Everything about one draw but the logits.
pub struct Draw<'a> {
    pub sampling: &'a Sampling,
    /// Index of the token in the sequence's output.
    pub index: u32,
    /// Present when [`has_penalties`].
    pub occurrences: Option<&'a Occurrences>,
    /// Tokens that must not be chosen yet (EOS and stop tokens before `min_new_tokens`).
    pub banned: &'a [TokenId],
    /// As `GenerateRequest::logprobs`.
    pub logprobs: Option<u32>,
}

/// Logits that no token can be chosen from: NaN, positive infinity, or all of them minus infinity.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct NotFinite;

impl Sampler {
    /// Chooses the next token. `logits: [vocab]` are changed in place.
    ///
    /// Log-probabilities are of the model's own distribution, before any of the request's settings.
    /// O(vocab), and O(vocab log vocab) only when top-p keeps a large part of it.
    ///
    /// # Errors
    /// [`NotFinite`] when the model's logits are broken.
    pub fn sample(&mut self, logits: &mut [f32], draw: &Draw<'_>) -> Result<(TokenId, Option<TokenLogprob>), NotFinite> {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !best.is_finite() || logits.iter().any(|l| l.is_nan()) {
            return Err(NotFinite);
        }
        // Measured before the logits are bent.
        let raw = draw.logprobs.map(|n| (log_sum_exp(logits, best), self.best_of(logits, n as usize)));
        let chosen_logits = raw.is_some().then(|| logits.to_vec());
        bend(logits, draw);
        let token = if draw.sampling.temperature == 0.0 { greedy(logits) } else { self.draw(logits, draw.sampling, draw.index) };
        let logprob = raw.zip(chosen_logits).map(|((total, top), raw)| TokenLogprob {
            logprob: raw[token as usize] - total,
            top: top.into_iter().map(|(l, id)| (id, l - total)).collect(),
        });
        Ok((token, logprob))
    }

    /// Log-probability of `token` and the `n` best alternatives, as reported for prompt positions.
    ///
    /// # Errors
    /// [`NotFinite`] when the model's logits are broken.
    pub fn score(&mut self, logits: &[f32], token: TokenId, n: u32) -> Result<TokenLogprob, NotFinite> {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !best.is_finite() || logits.iter().any(|l| l.is_nan()) {
            return Err(NotFinite);
        }
        let total = log_sum_exp(logits, best);
        let top = self.best_of(logits, n as usize).into_iter().map(|(l, id)| (id, l - total)).collect();
        Ok(TokenLogprob { logprob: logits[token as usize] - total, top })
    }

    /// The `n` best logits, best first, equal ones by id.
    fn best_of(&mut self, logits: &[f32], n: usize) -> Vec<(f32, TokenId)> {
        if n == 0 {
            return Vec::new();
        }
        self.load(logits);
        self.keep_best(n);
        self.candidates.clone()
    }

    fn load(&mut self, logits: &[f32]) {
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0..).map(|(&l, id)| (l, id)));
    }

    /// Keeps the `n` best candidates, sorted.
    fn keep_best(&mut self, n: usize) {
        if n < self.candidates.len() {
            self.candidates.select_nth_unstable_by(n - 1, order);
            self.candidates.truncate(n);
        }
        self.candidates.sort_unstable_by(order);
    }

    fn draw(&mut self, logits: &[f32], s: &Sampling, index: u32) -> TokenId {
        let vocab = logits.len();
        self.load(logits);
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |l: f32| f64::from((l - best) / s.temperature).exp();
        if s.top_k > 0 {
            self.keep_best((s.top_k as usize).min(vocab));
        }
        // Top-p is a share of what top-k left, min-p of the best token's probability (whose weight is 1).
        let total: f64 = self.candidates.iter().map(|&(l, _)| weight(l)).sum();
        if s.top_p < 1.0 {
            let want = f64::from(s.top_p) * total;
            let mut n = 256.min(self.candidates.len());
            loop {
                let all = self.candidates.len();
                self.candidates.select_nth_unstable_by(n - 1, order);
                self.candidates[..n].sort_unstable_by(order);
                let mut sum = 0.0;
                let kept = self.candidates[..n].iter().position(|&(l, _)| {
                    sum += weight(l);
                    sum >= want
                });
                if let Some(last) = kept {
                    self.candidates.truncate(last + 1);
                    break;
                }
                if n == all {
                    break;
                }
                n = (n * 8).min(all);
            }
        }
        if s.min_p > 0.0 {
            self.candidates.retain(|&(l, _)| weight(l) >= f64::from(s.min_p));
        }
        let total: f64 = self.candidates.iter().map(|&(l, _)| weight(l)).sum();
        let mut left = uniform(s.seed, index) * total;
        for &(l, id) in &self.candidates {
            left -= weight(l);
            if left < 0.0 {
                return id;
            }
        }
        // Rounding can leave a hair beyond the last weight: take the last token that can be drawn at all.
        self.candidates.iter().rev().find(|&&(l, _)| weight(l) > 0.0).map_or_else(|| greedy(logits), |&(_, id)| id)
    }
}

/// Best logit first, equal ones by id: a total order, as no logit is NaN.
fn order(a: &(f32, TokenId), b: &(f32, TokenId)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The best token; of equals the one with the lowest id.
fn greedy(logits: &[f32]) -> TokenId {
    let mut best = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[best] {
            best = i;
        }
    }
    best as TokenId
}

fn log_sum_exp(logits: &[f32], best: f32) -> f32 {
    let sum: f64 = logits.iter().map(|&l| f64::from(l - best).exp()).sum();
    best + sum.ln() as f32
}

/// Bias, penalties and bans, on the logits.
fn bend(logits: &mut [f32], draw: &Draw<'_>) {
    let s = draw.sampling;
    if let Some(occurrences) = draw.occurrences {
        for (&token, &(in_prompt, times)) in &occurrences.counts {
            let l = &mut logits[token as usize];
            if in_prompt || times > 0 {
                *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
            }
            *l -= s.frequency_penalty * times as f32;
            if times > 0 {
                *l -= s.presence_penalty;
            }
        }
    }
    for (&token, &bias) in s.logit_bias.iter() {
        logits[token as usize] += bias;
    }
    for &token in draw.banned {
        logits[token as usize] = f32::NEG_INFINITY;
    }
}

/// A number in `[0, 1)` from `(seed, index)`: SplitMix64's finaliser over both, twice.
fn uniform(seed: u64, index: u32) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let z = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;

    fn draw(sampling: &Sampling, index: u32) -> Draw<'_> {
        Draw { sampling, index, occurrences: None, banned: &[], logprobs: None }
    }

    fn sampled(logits: &[f32], s: &Sampling, n: u32) -> Vec<TokenId> {
        let mut sampler = Sampler::default();
        (0..n).map(|i| sampler.sample(&mut logits.to_vec(), &draw(s, i)).unwrap().0).collect()
    }

    fn with(f: impl FnOnce(&mut Sampling)) -> Sampling {
        let mut s = Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy() };
        f(&mut s);
        s
    }

    #[test]
    fn greedy_takes_the_best_and_the_lowest_of_equals() {
        assert_eq!(sampled(&[0.0, 3.0, 3.0, 1.0], &Sampling::greedy(), 3), [1, 1, 1]);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let p = [0.5f32, 0.25, 0.2, 0.05];
        let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
        let n = 40_000;
        let drawn = sampled(&logits, &with(|_| ()), n);
        for (id, p) in p.iter().enumerate() {
            let share = drawn.iter().filter(|&&t| t as usize == id).count() as f64 / f64::from(n);
            assert!((share - f64::from(*p)).abs() < 0.01, "token {id}: {share} for {p}");
        }
    }

    #[test]
    fn truncation_keeps_what_it_says() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.2, 0.05].iter().map(|p| p.ln()).collect();
        for (s, kept) in [
            (with(|s| s.top_k = 2), vec![0, 1]),
            (with(|s| s.top_p = 0.7), vec![0, 1]),
            (with(|s| s.top_p = 0.76), vec![0, 1, 2]),
            (with(|s| s.min_p = 0.39), vec![0, 1, 2]),
            (with(|s| s.min_p = 0.45), vec![0, 1]),
            (with(|s| s.top_p = 1e-9), vec![0]),
        ] {
            let mut seen = sampled(&logits, &s, 2000);
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, kept, "{s:?}");
        }
    }

    #[test]
    fn top_p_over_a_large_flat_vocabulary_keeps_its_share() {
        let logits = vec![0.0f32; 5000];
        let seen = sampled(&logits, &with(|s| s.top_p = 0.5), 3000);
        assert!(seen.iter().all(|&t| t < 2500));
        assert!(seen.iter().any(|&t| t > 2000));
    }

    #[test]
    fn a_draw_depends_on_seed_and_index_alone() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.3).collect();
        let s = with(|s| s.seed = 42);
        let all = sampled(&logits, &s, 50);
        assert_eq!(Sampler::default().sample(&mut logits.clone(), &draw(&s, 17)).unwrap().0, all[17]);
        assert_ne!(all, sampled(&logits, &with(|s| s.seed = 43), 50));
    }

    #[test]
    fn penalties_bias_and_bans_bend_the_logits() {
        let mut occurrences = Occurrences::of_prompt(&[0]);
        occurrences.add(1);
        occurrences.add(1);
        let s = Sampling {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: Arc::new(BTreeMap::from([(2, 100.0)])),
            ..Sampling::greedy()
        };
        let mut logits = vec![4.0, -1.0, 0.0, 1.0];
        bend(&mut logits, &Draw { sampling: &s, index: 0, occurrences: Some(&occurrences), banned: &[3], logprobs: None });
        assert_eq!(logits, [2.0, -3.0, 100.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn log_probabilities_are_of_the_model_before_bending() {
        let s = Sampling { logit_bias: Arc::new(BTreeMap::from([(0, 50.0)])), ..Sampling::greedy() };
        let mut logits: Vec<f32> = [0.1f32, 0.6, 0.3].iter().map(|p| p.ln()).collect();
        let (token, logprob) = Sampler::default().sample(&mut logits, &Draw { logprobs: Some(2), ..draw(&s, 0) }).unwrap();
        let logprob = logprob.unwrap();
        assert_eq!(token, 0);
        assert!((logprob.logprob - 0.1f32.ln()).abs() < 1e-6);
        assert_eq!(logprob.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn broken_logits_are_refused() {
        for bad in [vec![f32::NAN, 1.0], vec![f32::INFINITY, 0.0], vec![f32::NEG_INFINITY; 2]] {
            assert_eq!(Sampler::default().sample(&mut bad.clone(), &draw(&Sampling::greedy(), 0)), Err(NotFinite), "{bad:?}");
        }
    }
}
