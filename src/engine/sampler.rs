//! Logits to tokens, on the host. The draw of a sequence's `i`-th token is a pure function of its logits, its settings and
//! `(seed, i)`: the same whatever else runs, on any number of threads, after any preemption, and on a device.

use crate::ids::TokenId;
use crate::model::draw::{Draw, NotFinite, distance, log_sum_exp, mul_high, reach_of_min_p, scale, share_of_top_p, uniform, weight};
use crate::request::{Sampling, TokenLogprob};

/// Scratch of the sampler, reused from token to token.
#[derive(Default)]
pub struct Sampler {
    /// Tokens in the lower half, and above them what they are ordered by: steps below the best logit, or the logit itself turned
    /// around. So the best come first, and equals by id.
    candidates: Vec<u64>,
}

impl Sampler {
    /// Chooses the next token. `logits: [vocab]` are changed in place.
    ///
    /// Log-probabilities are of the model's own distribution, before any of the request's settings.
    /// O(vocab), and O(vocab log vocab) only when top-p keeps a large part of it.
    ///
    /// # Errors
    /// [`NotFinite`] when the model's logits are broken, or bans leave none.
    pub fn sample(&mut self, logits: &mut [f32], draw: &Draw<'_>) -> Result<(TokenId, Option<TokenLogprob>), NotFinite> {
        let best = greatest(logits)?;
        // Measured before the logits are bent.
        let raw = draw.logprobs.map(|n| (sum_of(logits, best), self.best_of(logits, n as usize), logits.to_vec()));
        draw.bend(logits);
        let best = greatest(logits)?;
        let token =
            if draw.sampling.temperature == 0.0 { greedy(logits, best) } else { self.draw(logits, best, draw.sampling, draw.index) };
        let logprob = raw.map(|(total, top, raw)| TokenLogprob {
            logprob: raw[token as usize] - total,
            top: top.into_iter().map(|id| (id, raw[id as usize] - total)).collect(),
        });
        Ok((token, logprob))
    }

    /// Log-probability of `token` and the `n` best alternatives, as reported for prompt positions.
    ///
    /// # Errors
    /// [`NotFinite`] when the model's logits are broken.
    pub fn score(&mut self, logits: &[f32], token: TokenId, n: u32) -> Result<TokenLogprob, NotFinite> {
        let total = sum_of(logits, greatest(logits)?);
        let top = self.best_of(logits, n as usize).into_iter().map(|id| (id, logits[id as usize] - total)).collect();
        Ok(TokenLogprob { logprob: logits[token as usize] - total, top })
    }

    /// The tokens of the `n` best logits, best first, equal ones by id.
    fn best_of(&mut self, logits: &[f32], n: usize) -> Vec<TokenId> {
        if n == 0 {
            return Vec::new();
        }
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0u64..).map(|(&l, id)| u64::from(turned_around(l)) << 32 | id));
        self.keep_first(n);
        self.candidates.sort_unstable();
        self.candidates.iter().map(|&c| c as TokenId).collect()
    }

    /// Keeps the first `n` candidates, in no order.
    fn keep_first(&mut self, n: usize) {
        if n < self.candidates.len() {
            self.candidates.select_nth_unstable(n - 1);
            self.candidates.truncate(n);
        }
    }

    fn draw(&mut self, logits: &[f32], best: f32, s: &Sampling, index: u32) -> TokenId {
        let scale = scale(s.temperature);
        let of = |c: u64| weight((c >> 32) as u32);
        self.candidates.clear();
        let reachable = logits.iter().zip(0u64..).filter_map(|(&l, id)| Some(u64::from(distance(l, best, scale)?) << 32 | id));
        self.candidates.extend(reachable);
        if s.top_k > 0 {
            self.keep_first(s.top_k as usize);
        }
        // Top-p is a share of what top-k left, min-p of the best token's probability.
        if let Some(share) = share_of_top_p(s.top_p) {
            let total: u64 = self.candidates.iter().map(|&c| of(c)).sum();
            let want = mul_high(share, total).max(1);
            let all = self.candidates.len();
            let mut n = 256.min(all);
            loop {
                self.candidates.select_nth_unstable(n - 1);
                self.candidates[..n].sort_unstable();
                let mut sum = 0;
                let kept = self.candidates[..n].iter().position(|&c| {
                    sum += of(c);
                    sum >= want
                });
                if let Some(last) = kept {
                    self.candidates.truncate(last + 1);
                    break;
                }
                assert!(n < all, "all weights together are no less than a share of them");
                n = (n * 8).min(all);
            }
        }
        if s.min_p > 0.0 {
            let most = u64::from(reach_of_min_p(s.min_p));
            self.candidates.retain(|&c| c >> 32 <= most);
        }
        // Along the ids: the same sums whatever was sorted on the way.
        if s.top_k > 0 || s.top_p < 1.0 {
            self.candidates.sort_unstable_by_key(|&c| c as TokenId);
        }
        let total: u64 = self.candidates.iter().map(|&c| of(c)).sum();
        let (target, mut sum) = (mul_high(uniform(s.seed, index), total), 0);
        let chosen = self.candidates.iter().find(|&&c| {
            sum += of(c);
            sum > target
        });
        *chosen.expect("a share of the sum is less than the sum, and the best token has a weight") as TokenId
    }
}

/// The greatest logit.
fn greatest(logits: &[f32]) -> Result<f32, NotFinite> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if best.is_finite() && !logits.iter().any(|l| l.is_nan()) { Ok(best) } else { Err(NotFinite) }
}

/// Less for a greater logit; zeros are equal.
fn turned_around(l: f32) -> u32 {
    let bits = (l + 0.0).to_bits();
    if bits >> 31 == 1 { bits } else { !bits & (u32::MAX >> 1) }
}

/// The best token; of equals the one with the lowest id.
fn greedy(logits: &[f32], best: f32) -> TokenId {
    logits.iter().position(|&l| l == best).expect("the best is one of them") as TokenId
}

fn sum_of(logits: &[f32], best: f32) -> f32 {
    let one = scale(1.0);
    log_sum_exp(best, logits.iter().filter_map(|&l| distance(l, best, one)).map(weight).sum())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::model::draw::Occurrences;

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
        Draw { sampling: &s, index: 0, occurrences: Some(&occurrences), banned: &[3], logprobs: None }.bend(&mut logits);
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
    fn alternatives_are_ordered_by_logit_then_id() {
        let logits = [0.0, -0.0, -2.0, 5.0, f32::NEG_INFINITY, 5.0, -1.0];
        assert_eq!(Sampler::default().best_of(&logits, 9), [3, 5, 0, 1, 6, 2, 4]);
        assert_eq!(Sampler::default().best_of(&logits, 3), [3, 5, 0]);
    }

    #[test]
    fn top_p_is_a_share_of_what_top_k_left() {
        // Of the first two alone 0.6 is the first; of all four it is two.
        let logits: Vec<f32> = [0.4f32, 0.25, 0.2, 0.15].iter().map(|p| p.ln()).collect();
        let seen = |s: Sampling| sampled(&logits, &s, 500).into_iter().max().unwrap();
        assert_eq!(seen(with(|s| (s.top_k, s.top_p) = (2, 0.6))), 0);
        assert_eq!(seen(with(|s| s.top_p = 0.6)), 1);
    }

    #[test]
    fn broken_logits_are_refused() {
        for bad in [vec![f32::NAN, 1.0], vec![f32::INFINITY, 0.0], vec![f32::NEG_INFINITY; 2]] {
            assert_eq!(Sampler::default().sample(&mut bad.clone(), &draw(&Sampling::greedy(), 0)), Err(NotFinite), "{bad:?}");
            assert_eq!(Sampler::default().score(&bad, 0, 1), Err(NotFinite), "{bad:?}");
        }
        let sampling = Sampling::greedy();
        let none_left = Draw { banned: &[0, 1], ..draw(&sampling, 0) };
        assert_eq!(Sampler::default().sample(&mut [1.0, 2.0], &none_left), Err(NotFinite));
    }
}
