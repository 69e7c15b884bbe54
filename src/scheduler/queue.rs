//! Who waits to start, for those who ask before they queue: how many there may be is decided here, before the scheduler hears of them.

use std::collections::BTreeMap;

use super::Config;
use crate::ids::SeqId;

/// The book of the sequences that wait for their first start. It numbers them.
pub struct Queue {
    max_requests: usize,
    max_tokens: u64,
    /// With the tokens of their prompts. The oldest is first.
    waiting: BTreeMap<SeqId, u64>,
    tokens: u64,
    next: u64,
}

impl Queue {
    /// For the scheduler of this configuration.
    pub fn new(config: &Config) -> Self {
        Queue {
            max_requests: config.max_queued_requests,
            max_tokens: config.max_queued_tokens,
            waiting: BTreeMap::new(),
            tokens: 0,
            next: 0,
        }
    }

    /// Takes the sequences of one request, by the lengths of their prompts: all of them or none. When nobody waits they are taken whatever
    /// they come to, as there is nothing that a later try could wait for.
    ///
    /// # Errors
    /// How many wait, when there is no room behind them.
    pub fn enter(&mut self, prompts: &[usize]) -> Result<Vec<SeqId>, usize> {
        let tokens = prompts.iter().map(|&n| n as u64).sum::<u64>();
        let waiting = self.waiting.len();
        if waiting > 0 && (waiting + prompts.len() > self.max_requests || self.tokens + tokens > self.max_tokens) {
            return Err(waiting);
        }
        let seqs: Vec<SeqId> = (self.next..).map(SeqId).take(prompts.len()).collect();
        self.next += seqs.len() as u64;
        self.tokens += tokens;
        self.waiting.extend(seqs.iter().copied().zip(prompts.iter().map(|&n| n as u64)));
        Ok(seqs)
    }

    /// A sequence started, or ended before it did. One that does not wait is left alone.
    pub fn leave(&mut self, seq: SeqId) {
        self.tokens -= self.waiting.remove(&seq).unwrap_or(0);
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
