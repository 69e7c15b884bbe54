//! What is asked of logits, and the arithmetic of drawing a token from them.
//!
//! All of it is in integers but for one difference and one product, so that the host (`engine/sampler.rs`) and a device
//! (`kernels/sample.cuh`) choose the same token of the same logits, and sums come out alike in any order.

use std::collections::HashMap;

use crate::ids::TokenId;
use crate::request::{Sampling, TokenLogprob};

/// What is wanted of the logits that follow a position.
pub enum Ask<'a> {
    Nothing,
    /// All of them.
    Logits,
    /// The next token.
    Token(Draw<'a>),
    /// The log-probability of a token, and so many alternatives.
    Score {
        token: TokenId,
        alternatives: u32,
    },
}

/// What became of an [`Ask`] for a token or a score.
#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    Token {
        id: TokenId,
        /// Present where it was asked for.
        logprob: Option<TokenLogprob>,
    },
    Score(TokenLogprob),
}

/// Logits that no token can be chosen from: NaN, positive infinity, or none left above minus infinity.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct NotFinite;

/// Everything about one draw but the logits.
#[derive(Clone, Copy)]
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

/// How often each token occurred, kept per sequence only while a penalty needs it.
#[derive(Default, Clone, Debug)]
pub struct Occurrences {
    /// Tokens, and how often each is in the output; those of the prompt are here too.
    counts: Vec<(TokenId, u32)>,
    at: HashMap<TokenId, usize>,
}

impl Occurrences {
    /// Counts a prompt.
    pub fn of_prompt(prompt: &[TokenId]) -> Self {
        let mut all = Self::default();
        prompt.iter().for_each(|&token| _ = all.count(token));
        all
    }

    /// Counts one generated token.
    pub fn add(&mut self, token: TokenId) {
        *self.count(token) += 1;
    }

    fn count(&mut self, token: TokenId) -> &mut u32 {
        let at = *self.at.entry(token).or_insert(self.counts.len());
        if at == self.counts.len() {
            self.counts.push((token, 0));
        }
        &mut self.counts[at].1
    }
}

/// Whether any penalty of these settings depends on what was said before.
pub fn has_penalties(s: &Sampling) -> bool {
    s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0
}

impl Draw<'_> {
    /// Tokens that were said before, each once, and what is subtracted of their logits after the repetition penalty.
    pub fn penalties(&self) -> impl Iterator<Item = (TokenId, f32)> {
        let s = self.sampling;
        let by = |times: u32| if times > 0 { s.frequency_penalty * times as f32 + s.presence_penalty } else { 0.0 };
        let all = self.occurrences.into_iter().flat_map(|o| &o.counts).map(move |&(token, times)| (token, by(times)));
        all.filter(|&(_, by)| s.repetition_penalty != 1.0 || by != 0.0)
    }

    /// Penalties, biases and bans, in this order, on logits `[vocab]`.
    pub fn bend(&self, logits: &mut [f32]) {
        let repetition = self.sampling.repetition_penalty;
        for (token, by) in self.penalties() {
            let l = &mut logits[token as usize];
            *l = if *l > 0.0 { *l / repetition } else { *l * repetition } - by;
        }
        for (&token, &bias) in self.sampling.logit_bias.iter() {
            logits[token as usize] += bias;
        }
        for &token in self.banned {
            logits[token as usize] = f32::NEG_INFINITY;
        }
    }
}

/// Steps of an octave.
const FINE: u32 = 24;
/// Steps below the best from which a weight is nothing: 40 octaves.
const LIMIT: u32 = 40 << FINE;

/// Steps of 2^-24 octave that a logit below the best is worth at a temperature above zero.
pub fn scale(temperature: f32) -> f32 {
    let steps = std::f64::consts::LOG2_E * f64::from(1 << FINE);
    ((steps / f64::from(temperature)) as f32).min(f32::MAX)
}

/// Steps from the best logit down to `l`; none where it can never be drawn.
pub fn distance(l: f32, best: f32, scale: f32) -> Option<u32> {
    let y = (best - l) * scale;
    (y < LIMIT as f32).then_some(y as u32)
}

/// The weight of a token so many steps below the best, `2^(40 - steps / 2^24)` within 1e-7 of itself and rounded down: nothing from 40
/// octaves on, and never less for fewer steps.
pub fn weight(steps: u32) -> u64 {
    // A polynomial of 2^g, g in [0, 1), in 32 bits after the point.
    let g = u64::from(!(steps << (32 - FINE)));
    let t = [38_616_766, 239_738_853, 1_031_476_366, 2_977_064_037].iter().fold(8_071_271, |t, c| c + ((t * g) >> 32));
    (((1 << 31) + ((t * g) >> 33)) << 8) >> (steps >> FINE)
}

/// Most steps below the best that min-p keeps.
pub fn reach_of_min_p(min_p: f32) -> u32 {
    let least = (f64::from(min_p) * weight(0) as f64).ceil() as u64;
    let (mut kept, mut lost) = (0, LIMIT);
    while lost - kept > 1 {
        let middle = kept + (lost - kept) / 2;
        if weight(middle) >= least {
            kept = middle;
        } else {
            lost = middle;
        }
    }
    kept
}

/// Top-p as a share of 2^64, at least 1; none where all is kept.
pub fn share_of_top_p(top_p: f32) -> Option<u64> {
    (top_p < 1.0).then(|| ((f64::from(top_p) * 2.0f64.powi(64)) as u64).max(1))
}

/// `a * b / 2^64`, rounded down.
pub fn mul_high(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// A number in `[0, 1)` from `(seed, index)`, as a share of 2^64: SplitMix64's finaliser over both, twice; 53 bits of it.
pub fn uniform(seed: u64, index: u32) -> u64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let z = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    z >> 11 << 11
}

/// The logarithm of the sum of all exponentials, from the best logit and the sum of weights at temperature 1.
pub fn log_sum_exp(best: f32, total: u64) -> f32 {
    best + (total as f64 / weight(0) as f64).ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_powers_of_two_that_never_rise() {
        let mut before = weight(0);
        assert!(before < 1 << 40);
        for steps in (0..LIMIT).step_by(997).chain((1..40).flat_map(|o| [(o << FINE) - 1, o << FINE])) {
            let exact = 2.0f64.powf(40.0 - f64::from(steps) / f64::from(1 << FINE));
            assert!((weight(steps) as f64 - exact).abs() <= 1e-7 * exact + 1.0, "{steps}: {} for {exact}", weight(steps));
        }
        for steps in (0..4u32 << FINE).step_by(37) {
            let now = weight(steps);
            assert!(now <= before, "{steps}");
            before = now;
        }
        (1..40).for_each(|octave| assert!(weight((octave << FINE) - 1) >= weight(octave << FINE), "octave {octave}"));
        assert!(weight(LIMIT - 1) > 0);
        assert_eq!(weight(LIMIT), 0);
    }

    #[test]
    fn min_p_reaches_to_the_last_weight_it_keeps() {
        for min_p in [1e-12, 1e-6, 0.05, 0.39, 0.9999, 1.0] {
            let reach = reach_of_min_p(min_p);
            let least = f64::from(min_p) * weight(0) as f64;
            assert!(weight(reach) as f64 >= least && (weight(reach + 1) as f64) < least.ceil().max(1.0), "{min_p}");
        }
    }

    #[test]
    fn extreme_temperatures_and_logits_have_distances() {
        assert_eq!(distance(1.0, 1.0, scale(f32::MIN_POSITIVE)), Some(0));
        assert_eq!(distance(0.5, 1.0, scale(f32::MIN_POSITIVE)), None);
        assert_eq!(distance(-1e30, 1.0, scale(1.0)), None);
        assert_eq!(distance(f32::NEG_INFINITY, 1.0, scale(2.0)), None);
        assert_eq!(distance(-f32::MAX, f32::MAX, scale(1e30)), None);
        assert_eq!(distance(-100.0, 100.0, scale(1e30)), Some(0));
    }

    #[test]
    fn shares_end_below_all() {
        assert_eq!(share_of_top_p(1.0), None);
        assert_eq!(share_of_top_p(f32::MIN_POSITIVE), Some(1));
        assert_eq!(share_of_top_p(0.5), Some(1 << 63));
        assert!(share_of_top_p(1.0f32.next_down()).unwrap() > u64::MAX - (1 << 41));
        assert_eq!(mul_high(u64::MAX, u64::MAX), u64::MAX - 1);
        assert!((0..1000).all(|i| mul_high(uniform(7, i), 1000) < 1000));
    }
}
