//! What is asked of logits, put into the words of a device, and its answers put back into ours.

use std::sync::Arc;

use crate::model::draw::{Answer, Ask, NotFinite, log_sum_exp, reach_of_min_p, scale, share_of_top_p};
use crate::ops::cuda::sample::{Alternative, Asked, Bend, Found, Kind, NONE, Samples, TOP};
use crate::ops::cuda::{CudaError, Device, Part};
use crate::request::TokenLogprob;

/// What is asked of the rows of an output head.
pub struct Choices {
    vocab: usize,
    samples: Samples,
    asked: Vec<Asked>,
    bends: Vec<Bend>,
    /// Of each row: whether its logits themselves are asked for.
    raw: Vec<bool>,
}

/// What a device answered; rows as they were asked.
pub struct Answers<'a> {
    asked: &'a [Asked],
    found: &'a [Found],
    alternatives: &'a [Alternative],
}

impl Choices {
    /// No rows, of `vocab` logits each.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn new(device: &Arc<Device>, vocab: usize) -> Result<Self, CudaError> {
        Ok(Choices { vocab, samples: Samples::new(device)?, asked: vec![], bends: vec![], raw: vec![] })
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.asked.clear();
        self.bends.clear();
        self.raw.clear();
    }

    /// Adds a row.
    pub fn push(&mut self, ask: &Ask<'_>) {
        let first = self.bends.len() as u32;
        let nothing = Asked {
            seed: 0,
            top_p: 0,
            index: 0,
            scale: 0.0,
            top_k: 0,
            most: 0,
            repetition: 1.0,
            token: NONE,
            alternatives: NONE,
            kind: Kind::Nothing as u32,
            first,
            penalties: first,
            biases: first,
            bans: first,
        };
        self.raw.push(matches!(ask, Ask::Logits));
        self.asked.push(match ask {
            Ask::Nothing | Ask::Logits => nothing,
            Ask::Score { token, alternatives } => Asked { token: *token, alternatives: *alternatives, kind: Kind::Score as u32, ..nothing },
            Ask::Token(draw) => {
                let (s, bends) = (draw.sampling, &mut self.bends);
                bends.extend(draw.penalties().map(|(token, by)| Bend { token, by }));
                let penalties = bends.len() as u32;
                bends.extend(s.logit_bias.iter().map(|(&token, &by)| Bend { token, by }));
                let biases = bends.len() as u32;
                bends.extend(draw.banned.iter().map(|&token| Bend { token, by: f32::NEG_INFINITY }));
                Asked {
                    seed: s.seed,
                    top_p: share_of_top_p(s.top_p).unwrap_or(0),
                    index: draw.index,
                    scale: if s.temperature == 0.0 { 0.0 } else { scale(s.temperature) },
                    top_k: if (s.top_k as usize) < self.vocab { s.top_k } else { 0 },
                    most: reach_of_min_p(s.min_p),
                    repetition: s.repetition_penalty,
                    token: NONE,
                    alternatives: draw.logprobs.unwrap_or(NONE),
                    kind: Kind::Token as u32,
                    first,
                    penalties,
                    biases,
                    bans: bends.len() as u32,
                }
            }
        });
    }

    /// Takes the rows to the device.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn set(&mut self) -> Result<(), CudaError> {
        self.samples.set(&self.asked, &self.bends, self.vocab)
    }

    /// Whether a row's logits themselves are asked for.
    pub fn wants_logits(&self, row: usize) -> bool {
        self.raw[row]
    }

    /// Whether the device has nothing to choose or score.
    fn is_idle(&self) -> bool {
        self.asked.iter().all(|a| a.kind == Kind::Nothing as u32)
    }

    /// Adds all that [`Choices::launch`] depends on, but for what lies in its memory.
    pub fn key(&self, key: &mut Vec<u64>) {
        key.push(u64::from(self.is_idle()));
        self.samples.key(key);
    }

    /// Answers all rows on the device, from `[rows][vocab]` logits. Logits that are asked for themselves stay as they are.
    ///
    /// # Errors
    /// Where the device refuses.
    pub fn launch(&self, logits: Part<'_, f32>) -> Result<(), CudaError> {
        if self.is_idle() { Ok(()) } else { self.samples.launch(logits, scale(1.0)) }
    }

    /// Reads the answers: tokens, and the log-probabilities that were asked for.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn read(&mut self) -> Result<Answers<'_>, CudaError> {
        let idle = self.is_idle();
        let (found, alternatives) = if idle { (&[][..], &[][..]) } else { self.samples.read()? };
        Ok(Answers { asked: &self.asked, found, alternatives })
    }
}

impl Answers<'_> {
    /// The answer of a row; none where it asked for no token and no score.
    pub fn of(&self, row: usize) -> Option<Result<Answer, NotFinite>> {
        let asked = &self.asked[row];
        if asked.kind == Kind::Nothing as u32 {
            return None;
        }
        let found = &self.found[row];
        if found.token == NONE {
            return Some(Err(NotFinite));
        }
        let scored = (asked.alternatives != NONE).then(|| {
            let total = log_sum_exp(found.best, found.total);
            let n = asked.alternatives as usize;
            let some = if n == 0 { &[][..] } else { &self.alternatives[row * TOP..row * TOP + n] };
            let top = some.iter().filter(|a| a.token != NONE).map(|a| (a.token, a.logit - total)).collect();
            TokenLogprob { logprob: found.logit - total, top }
        });
        Some(Ok(match scored {
            Some(scored) if asked.kind == Kind::Score as u32 => Answer::Score(scored),
            logprob => Answer::Token { id: found.token, logprob },
        }))
    }
}
