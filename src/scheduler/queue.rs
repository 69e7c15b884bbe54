//! Who waits to start, for those who ask before they queue: how many there may be is decided here, before the scheduler hears of them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use super::Config;
use crate::ids::SeqId;

/// Starts remembered to measure how fast the queue drains.
const STARTS: usize = 32;

/// Why a request finds no room in the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// Of requests of which some sequence waits.
    Requests,
    /// Of the tokens of their prompts.
    Tokens,
}

/// The book of the sequences that wait for their first start. It numbers them, and times come with its calls.
pub struct Queue {
    max_requests: usize,
    max_tokens: u64,
    /// The oldest is first.
    waiting: BTreeMap<SeqId, Waiting>,
    /// How many sequences of each request wait, where any does.
    requests: HashMap<SeqId, usize>,
    tokens: u64,
    next: u64,
    pace: Pace,
}

#[derive(Clone, Copy)]
struct Waiting {
    came: Duration,
    /// Of its prompt.
    tokens: u64,
    /// The first sequence of its request.
    request: SeqId,
}

impl Queue {
    /// For the scheduler of this configuration.
    pub fn new(config: &Config) -> Self {
        Queue {
            max_requests: config.max_queued_requests,
            max_tokens: config.max_queued_tokens,
            waiting: BTreeMap::new(),
            requests: HashMap::new(),
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
    /// How many requests wait, when as many do as may, and by which limit.
    pub fn enter(&mut self, prompts: &[usize], now: Duration) -> Result<Vec<SeqId>, (usize, Limit)> {
        let tokens = prompts.iter().map(|&n| n as u64).sum::<u64>();
        if let Some(limit) = self.full((self.requests.len(), self.tokens)) {
            return Err((self.requests.len(), limit));
        }
        let request = SeqId(self.next);
        let seqs: Vec<SeqId> = (self.next..).map(SeqId).take(prompts.len()).collect();
        self.next += seqs.len() as u64;
        self.tokens += tokens;
        let waiting = prompts.iter().map(|&n| Waiting { came: now, tokens: n as u64, request });
        self.waiting.extend(seqs.iter().copied().zip(waiting));
        if !seqs.is_empty() {
            self.requests.insert(request, seqs.len());
        }
        Ok(seqs)
    }

    /// Which limit is reached where so many requests wait, with so many tokens of prompts.
    fn full(&self, (requests, tokens): (usize, u64)) -> Option<Limit> {
        match requests {
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
        if let Some(Waiting { tokens, request, .. }) = self.waiting.remove(&seq) {
            self.tokens -= tokens;
            let left = self.requests.get_mut(&request).expect("a sequence of it waited");
            *left -= 1;
            if *left == 0 {
                self.requests.remove(&request);
            }
        }
        if self.waiting.is_empty() {
            self.pace = Pace::default();
        }
    }

    /// When to try again after a refusal: about when so many more have started that no limit is reached, from a second to ten minutes.
    pub fn retry_after(&self, now: Duration) -> Duration {
        let (mut requests, mut tokens, mut starts) = (self.requests.len(), self.tokens, 0);
        // Sequences of one request are side by side.
        let mut waiting = self.waiting.values().peekable();
        while let Some(next) = waiting.next_if(|_| starts == 0 || self.full((requests, tokens)).is_some()) {
            tokens -= next.tokens;
            starts += 1;
            if waiting.peek().is_none_or(|other| other.request != next.request) {
                requests -= 1;
            }
        }
        // Without a pace: as long as the oldest has waited. What it waits for began before it, and has yet to end.
        let oldest = || self.waiting.first_key_value().map_or(Duration::ZERO, |(_, of)| now.saturating_sub(of.came));
        self.pace.at(now, starts.max(1)).unwrap_or_else(oldest).clamp(Duration::from_secs(1), Duration::from_secs(600))
    }

    /// How many sequences wait.
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
