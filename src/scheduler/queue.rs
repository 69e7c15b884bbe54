//! Who waits to start, for those who ask before they queue: how many there may be is decided here, before the scheduler hears of them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::Config;
use crate::ids::SeqId;

/// Starts remembered to measure how fast the queue drains.
const STARTS: usize = 32;

/// Why a request finds no room in the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// Of requests that wait.
    Requests,
    /// Of the tokens of their prompts.
    Tokens,
}

/// The book of the sequences that wait for their first start. It numbers them, and times come with its calls.
pub struct Queue {
    max_requests: usize,
    max_tokens: u64,
    /// When they came, and the tokens of their prompts. The oldest is first.
    waiting: BTreeMap<SeqId, (Duration, u64)>,
    tokens: u64,
    next: u64,
    pace: Pace,
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
            pace: Pace::default(),
        }
    }

    /// Takes the sequences of one request, by the lengths of their prompts: all of them or none. Before a limit is reached they are taken
    /// whatever they come to. Were they to find room for all, those of a large request never would while smaller ones come and keep the
    /// queue nearly full.
    ///
    /// # Errors
    /// How many wait, when as many do as may, and by which limit.
    pub fn enter(&mut self, prompts: &[usize], now: Duration) -> Result<Vec<SeqId>, (usize, Limit)> {
        let tokens = prompts.iter().map(|&n| n as u64).sum::<u64>();
        let waiting = self.waiting.len();
        if let Some(limit) = self.full((waiting, self.tokens)) {
            return Err((waiting, limit));
        }
        let seqs: Vec<SeqId> = (self.next..).map(SeqId).take(prompts.len()).collect();
        self.next += seqs.len() as u64;
        self.tokens += tokens;
        self.waiting.extend(seqs.iter().copied().zip(prompts.iter().map(|&n| (now, n as u64))));
        Ok(seqs)
    }

    /// Which limit is reached where so many wait, with so many tokens of prompts.
    fn full(&self, (waiting, tokens): (usize, u64)) -> Option<Limit> {
        match waiting {
            0 => None,
            n if n >= self.max_requests => Some(Limit::Requests),
            _ => (tokens >= self.max_tokens).then_some(Limit::Tokens),
        }
    }

    /// A sequence started. One that does not wait is left alone, here and by [`Queue::leave`].
    pub fn start(&mut self, seq: SeqId, now: Duration) {
        if self.waiting.contains_key(&seq) {
            self.pace.start(now);
            self.leave(seq);
        }
    }

    /// A sequence ended before it started.
    pub fn leave(&mut self, seq: SeqId) {
        self.tokens -= self.waiting.remove(&seq).map_or(0, |(_, tokens)| tokens);
        if self.waiting.is_empty() {
            self.pace = Pace::default();
        }
    }

    /// When to try again after a refusal: about when so many more have started that no limit is reached, from a second to ten minutes.
    pub fn retry_after(&self, now: Duration) -> Duration {
        let (mut waiting, mut starts) = ((self.waiting.len(), self.tokens), 0);
        for (_, tokens) in self.waiting.values() {
            if starts > 0 && self.full(waiting).is_none() {
                break;
            }
            waiting = (waiting.0 - 1, waiting.1 - tokens);
            starts += 1;
        }
        // Without a pace: as long as the oldest has waited. What it waits for began before it, and has yet to end.
        let oldest = || self.waiting.first_key_value().map_or(Duration::ZERO, |(_, (came, _))| now.saturating_sub(*came));
        self.pace.at(now, starts.max(1)).unwrap_or_else(oldest).clamp(Duration::from_secs(1), Duration::from_secs(600))
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

/// Time from start to start while somebody waits all along: of a queue that was empty meanwhile it would measure how rarely anybody comes.
#[derive(Default)]
struct Pace {
    starts: VecDeque<Duration>,
}

impl Pace {
    fn start(&mut self, now: Duration) {
        if self.starts.len() == STARTS {
            self.starts.pop_front();
        }
        self.starts.push_back(now);
    }

    /// So many times the mean of what is remembered, the next of them the time since the last start if that has grown longer. Those that
    /// started together, as into places that were free, took no time from each other: the first of them only say when the clock began.
    fn at(&self, now: Duration, starts: u32) -> Option<Duration> {
        let (first, last) = (*self.starts.front()?, *self.starts.back()?);
        let later = self.starts.iter().filter(|&&at| at > first).count() as u32;
        let mean = last.saturating_sub(first).checked_div(later)?;
        Some(mean.saturating_mul(starts - 1).saturating_add(mean.max(now.saturating_sub(last))))
    }
}
