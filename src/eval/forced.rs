//! Teacher forcing against a compressed cache: the first part of a sequence is a prompt, prefilled exactly; every later
//! token is fed as if it had been generated, and reads the past just as a decode step would. What the model then says of
//! the next token is compared with what it says over the exact cache.
//!
//! Decoding position `p` reads sealed pages up to `sealed_len(p)`. That is the same for a whole page of positions, so they
//! are computed in one row, and no output depends on the others in its row (`ops`): the logits are those of single steps.

use crate::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex, SeqId, TokenId};
use crate::kv::Arena;
use crate::kv::layout::PageLayout;
use crate::model::decoder::{Decoder, LogitsSink, Pass, ReadyProfile};
use crate::model::delta::Delta;
use crate::ops::Ops;
use crate::step::{ExactStore, Logits, Move, Row, StepPlan, sealed_len};

use super::score::Block;

/// Positions of the exact cache computed at once, and scored together: their logits are kept to compare with.
const CHUNK: u32 = PAGE_TOKENS;

/// Tokens of an exact prefill computed at once.
const PREFILL: u32 = 512;

/// What one profile said of the scored tokens, in blocks of up to 64 neighbours. Sums are in nats.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// Minus the log-probability of the token that stands there.
    pub surprise: Vec<Block>,
    /// The same, less that of the exact cache.
    pub excess: Vec<Block>,
    /// Kullback-Leibler divergence of the exact cache's distribution from this one.
    pub divergence: Vec<Block>,
    /// 1 where both think the same token likeliest.
    pub agreement: Vec<Block>,
}

/// Why text cannot be forced. Each is one sentence with cause and mend.
#[derive(Debug, thiserror::Error)]
pub enum ForcedError {
    #[error("a sequence of {tokens} tokens with a prompt of {prompt} leaves none to score; raise --lengths or lower --prompt-share")]
    NothingToScore { tokens: usize, prompt: usize },
    #[error("a sequence of {tokens} tokens is longer than the {positions} positions this decoder was made for")]
    TooLong { tokens: usize, positions: usize },
    #[error(
        "cannot reserve {bytes} bytes for the caches that are compared ({reason}); lower --lengths, or compare fewer --profiles at once"
    )]
    Memory { bytes: u64, reason: String },
    #[error("the model made numbers that are not finite under {profile} at position {position}; {suspects}")]
    NotFinite { profile: String, position: u32, suspects: &'static str },
}

/// Forces `sequence` under every one of `chosen` (indices of `profiles`) and adds what they say to `said`, one for each
/// of `chosen`. The first `prompt` tokens are the prompt. `full` is the index of an exact profile, to compare with.
///
/// Scored are the tokens from `prompt + 1` on: token `prompt` follows from the exact prefill alone.
///
/// Cost: one prefill and the decoding per profile, and once more for `full`; memory for all their caches, and for the
/// logits of 64 positions.
///
/// # Errors
/// [`ForcedError`].
pub fn force(
    machine: &mut Machine<'_, '_>,
    (full, chosen): (usize, &[usize]),
    sequence: &[TokenId],
    prompt: usize,
    said: &mut [Said],
) -> Result<(), ForcedError> {
    let tokens = sequence.len();
    if prompt == 0 || tokens < prompt + 2 {
        return Err(ForcedError::NothingToScore { tokens, prompt });
    }
    if tokens > machine.decoder.positions() {
        return Err(ForcedError::TooLong { tokens, positions: machine.decoder.positions() });
    }
    let (n, prompt) = (tokens as u32, prompt as u32);
    let mut space = Space::default();
    let lanes = std::iter::once(full).chain(chosen.iter().copied());
    let mut lanes: Vec<Lane> = lanes.map(|i| Lane::new(i, &machine.profiles[i].layout, n, prompt, &mut space)).collect();
    if machine.adapter.is_some() {
        lanes.iter_mut().for_each(|lane| lane.adapter = WORN);
    }
    let bytes = space.bytes();
    if bytes.div_ceil(PageAddr::UNIT) > u64::from(u32::MAX) {
        return Err(ForcedError::Memory { bytes, reason: "that is beyond what pages can address".to_owned() });
    }
    let mut arena = Arena::new(bytes).map_err(|e| ForcedError::Memory { bytes, reason: e.to_string() })?;
    for lane in &mut lanes {
        lane.prefill(machine, &mut arena, &sequence[..prompt as usize]);
    }
    let mut exact = Table::new(machine.decoder.config().vocab);
    let mut begin = prompt;
    // The last token predicts nothing.
    while begin < n - 1 {
        let end = (begin + CHUNK).min(n - 1);
        exact.clear();
        for (i, lane) in lanes.iter_mut().enumerate() {
            let mut block = [Block { n: end - begin, sum: 0.0 }; 4];
            let mut judge = Judge { first: i == 0, begin, sequence, exact: &mut exact, block: &mut block, broken: None };
            lane.decode(machine, &mut arena, sequence, begin..end, &mut judge);
            if let Some(position) = judge.broken {
                let suspects = match machine.adapter {
                    Some(_) => "the adapter diverged in training, or the checkpoint or the kernels are broken",
                    None => "the checkpoint or the kernels are broken",
                };
                return Err(ForcedError::NotFinite { profile: machine.names[lane.profile].to_owned(), position, suspects });
            }
            if i > 0 {
                let to = &mut said[i - 1];
                let lists = [&mut to.surprise, &mut to.excess, &mut to.divergence, &mut to.agreement];
                lists.into_iter().zip(block).for_each(|(list, block)| list.push(block));
            }
        }
        begin = end;
    }
    Ok(())
}

/// Who computes.
pub struct Machine<'m, 'w> {
    pub decoder: &'m mut Decoder<'w>,
    pub ops: &'m dyn Ops,
    pub profiles: &'m [ReadyProfile],
    /// Of these profiles.
    pub names: &'m [&'m str],
    /// The adapter all sequences wear.
    pub adapter: Option<&'m Delta>,
}

/// The generation of [`Machine::adapter`].
const WORN: AdapterGeneration = AdapterGeneration(1);

impl Machine<'_, '_> {
    fn run(&mut self, arena: &mut Arena, plan: &StepPlan, sink: &mut dyn LogitsSink) {
        let adapters: Vec<_> = self.adapter.map(|delta| (WORN, delta)).into_iter().collect();
        let adapters = &adapters[..];
        self.decoder.forward(&mut Pass { plan, arena, profiles: self.profiles, adapters, ops: self.ops, sink, observer: None });
    }
}

/// Hands out places in an arena that is not there yet.
#[derive(Default)]
struct Space {
    used: u64,
}

impl Space {
    /// Places of `n` pages of `size` bytes, a multiple of the address unit.
    fn pages(&mut self, n: u32, size: u64) -> Vec<PageAddr> {
        let first = self.used;
        self.used += u64::from(n) * size;
        // Past the largest address the arena is refused before anything is read.
        (0..u64::from(n)).map(|i| PageAddr(((first + i * size) / PageAddr::UNIT) as u32)).collect()
    }

    fn bytes(&self) -> u64 {
        self.used
    }
}

/// A sequence's cache under one profile.
struct Lane {
    profile: usize,
    adapter: AdapterGeneration,
    compressed: bool,
    window: u32,
    sink_tokens: u32,
    layers: u32,
    /// Sealed pages, of which the first `filled` are.
    sealed: Vec<PageAddr>,
    filled: usize,
    /// Exact pages from the first position that is not sealed, and those that are free.
    exact: Vec<PageAddr>,
    free: Vec<PageAddr>,
    workspace: Vec<PageAddr>,
    sinks: Option<PageAddr>,
}

impl Lane {
    fn new(profile: usize, layout: &PageLayout, n: u32, prompt: u32, space: &mut Space) -> Lane {
        let sizes = layout.sizes();
        let compressed = !layout.sealed.is_empty();
        // A compressed one holds its window, the page that leaves it, and the page that is written.
        let exact = if compressed { (layout.window + 3 * PAGE_TOKENS).min(n + PAGE_TOKENS) } else { n };
        let sealed = if compressed { sealed_len(n, layout.window) / PAGE_TOKENS } else { 0 };
        let workspace = if compressed { prompt.div_ceil(PAGE_TOKENS) } else { 0 };
        let sinks = u32::from(compressed && layout.sinks > 0);
        Lane {
            profile,
            adapter: AdapterGeneration::default(),
            compressed,
            window: layout.window,
            sink_tokens: layout.sinks,
            layers: layout.layers as u32,
            sealed: space.pages(sealed, sizes.sealed),
            filled: 0,
            exact: Vec::new(),
            free: space.pages(exact.div_ceil(PAGE_TOKENS), sizes.exact),
            workspace: space.pages(workspace, sizes.workspace),
            sinks: space.pages(sinks, sizes.sinks).first().copied(),
        }
    }

    /// Positions in sealed pages once `len` are computed.
    fn sealed_len(&self, len: u32) -> u32 {
        if self.compressed { sealed_len(len, self.window) } else { 0 }
    }

    /// Makes sure that there are exact pages for positions below `end`.
    fn grow(&mut self, end: u32) {
        let pages = end.div_ceil(PAGE_TOKENS) as usize - self.filled;
        while self.exact.len() < pages {
            self.exact.push(self.free.pop().expect("a lane has all the pages it can use"));
        }
    }

    fn prefill(&mut self, machine: &mut Machine<'_, '_>, arena: &mut Arena, prompt: &[TokenId]) {
        let n = prompt.len() as u32;
        if !self.compressed {
            self.grow(n);
            for begin in (0..n).step_by(PREFILL as usize) {
                let end = (begin + PREFILL).min(n);
                let plan = self.plan(begin..end, 0..self.layers, &prompt[begin as usize..end as usize], Logits::None, vec![]);
                machine.run(arena, &plan, &mut Nobody);
            }
            return;
        }
        // Layer by layer through the workspace, sealing as the scheduler does at the end of a prompt.
        let sealed = (self.sealed_len(n) / PAGE_TOKENS) as usize;
        let kept = self.workspace.len() - sealed;
        self.exact = self.free.split_off(self.free.len() - kept);
        let mut moves = Vec::new();
        for (i, &from) in self.workspace.iter().enumerate() {
            match i.checked_sub(sealed) {
                None => self.seal(i, from, &mut moves),
                Some(i) => {
                    let left = n - (sealed + i) as u32 * PAGE_TOKENS;
                    moves.push(Move::Keep { from, to: self.exact[i], n: left.min(PAGE_TOKENS) });
                }
            }
        }
        for layer in 0..self.layers {
            let tokens = if layer == 0 { prompt } else { &[] };
            let row = Row {
                store: ExactStore::Workspace,
                sealed: 0..0,
                exact: 0..self.workspace.len(),
                sinks: None,
                ..self.row(0..n, layer..layer + 1, tokens.len(), moves.len(), Logits::None)
            };
            let plan = StepPlan { rows: vec![row], tokens: tokens.to_vec(), pages: self.workspace.clone(), moves: moves.clone() };
            machine.run(arena, &plan, &mut Nobody);
        }
        self.filled = sealed;
    }

    /// Computes `positions` of `sequence`, each over the cache that a decode step finds there.
    fn decode(
        &mut self,
        machine: &mut Machine<'_, '_>,
        arena: &mut Arena,
        sequence: &[TokenId],
        positions: std::ops::Range<u32>,
        sink: &mut dyn LogitsSink,
    ) {
        let mut begin = positions.start;
        while begin < positions.end {
            // Up to the step that seals the next page; it still reads it exactly.
            let seals_at = (self.filled as u32 + 1) * PAGE_TOKENS + self.window;
            let end = if self.compressed { positions.end.min(seals_at) } else { positions.end };
            self.grow(end);
            let mut moves = Vec::new();
            let seals = self.sealed_len(end) as usize > self.filled * PAGE_TOKENS as usize;
            if seals {
                self.seal(self.filled, self.exact[0], &mut moves);
            }
            let plan = self.plan(begin..end, 0..self.layers, &sequence[begin as usize..end as usize], Logits::All, moves);
            machine.run(arena, &plan, sink);
            if seals {
                self.free.push(self.exact.remove(0));
                self.filled += 1;
            }
            begin = end;
        }
    }

    /// The moves that seal page `page` from the exact page `from`.
    fn seal(&self, page: usize, from: PageAddr, moves: &mut Vec<Move>) {
        let mut skip = 0;
        if let (0, Some(to)) = (page, self.sinks) {
            skip = self.sink_tokens;
            moves.push(Move::Sinks { from, to, n: skip });
        }
        moves.push(Move::Seal { from, to: self.sealed[page], skip });
    }

    /// A plan of one row over the sealed and the exact pages.
    fn plan(
        &self,
        positions: std::ops::Range<u32>,
        layers: std::ops::Range<u32>,
        tokens: &[TokenId],
        logits: Logits,
        moves: Vec<Move>,
    ) -> StepPlan {
        let pages: Vec<PageAddr> = self.sealed[..self.filled].iter().chain(&self.exact).copied().collect();
        let row = self.row(positions, layers, tokens.len(), moves.len(), logits);
        StepPlan { rows: vec![row], tokens: tokens.to_vec(), pages, moves }
    }

    fn row(&self, positions: std::ops::Range<u32>, layers: std::ops::Range<u32>, tokens: usize, moves: usize, logits: Logits) -> Row {
        Row {
            seq: SeqId(0),
            profile: ProfileIndex(self.profile as u8),
            adapter: self.adapter,
            positions,
            layers,
            tokens: 0..tokens,
            sealed: 0..self.filled,
            exact: self.filled..self.filled + self.exact.len(),
            store: ExactStore::Exact,
            sinks: self.sinks.filter(|_| self.filled > 0),
            moves: 0..moves,
            logits,
        }
    }
}

struct Nobody;

impl LogitsSink for Nobody {
    fn logits(&mut self, _: usize, _: u32, _: &mut [f32]) {}
}

/// The exact cache's view of a chunk of positions.
struct Table {
    vocab: usize,
    /// `[positions][vocab]`.
    logits: Vec<f32>,
    /// Logarithm of the sum of exponentials, by position.
    total: Vec<f64>,
    best: Vec<usize>,
}

impl Table {
    fn new(vocab: usize) -> Table {
        Table { vocab, logits: Vec::new(), total: Vec::new(), best: Vec::new() }
    }

    fn clear(&mut self) {
        self.logits.clear();
        self.total.clear();
        self.best.clear();
    }
}

/// Takes the logits of a chunk: keeps those of the exact cache, compares the others with them.
struct Judge<'j> {
    first: bool,
    begin: u32,
    sequence: &'j [TokenId],
    exact: &'j mut Table,
    /// Surprise, excess, divergence, agreement.
    block: &'j mut [Block; 4],
    broken: Option<u32>,
}

impl LogitsSink for Judge<'_> {
    fn logits(&mut self, _: usize, position: u32, logits: &mut [f32]) {
        let (best, max) = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |a, (i, &l)| if l > a.1 { (i, l) } else { a });
        if !max.is_finite() || logits.iter().any(|l| l.is_nan()) {
            self.broken.get_or_insert(position);
        }
        if self.broken.is_some() {
            return;
        }
        let total = f64::from(max) + logits.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
        if self.first {
            // Positions of a chunk come in order.
            self.exact.logits.extend_from_slice(logits);
            self.exact.total.push(total);
            self.exact.best.push(best);
            return;
        }
        let at = (position - self.begin) as usize;
        let exact = &self.exact.logits[at * self.exact.vocab..(at + 1) * self.exact.vocab];
        let exact_total = self.exact.total[at];
        let next = self.sequence[position as usize + 1] as usize;
        let (own, theirs) = (total - f64::from(logits[next]), exact_total - f64::from(exact[next]));
        let divergence: f64 = exact
            .iter()
            .zip(logits.iter())
            .map(|(&e, &l)| {
                let log_p = f64::from(e) - exact_total;
                let p = log_p.exp();
                // A token that cannot come adds nothing, however unlikely the other thinks it.
                if p > 0.0 { p * (log_p - (f64::from(l) - total)) } else { 0.0 }
            })
            .sum();
        let values = [own, own - theirs, divergence.max(0.0), f64::from(u8::from(best == self.exact.best[at]))];
        self.block.iter_mut().zip(values).for_each(|(block, value)| block.sum += value);
    }
}
