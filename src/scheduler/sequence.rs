//! One sequence and the pages it holds. Only a running one has pages; going back to waiting, or ending, consumes it,
//! so giving pages back cannot be forgotten.

use std::ops::Range;
use std::time::Duration;

use super::profile::{Need, ProfileSizes, pages_for};
use crate::ids::{PAGE_TOKENS, PageAddr, SeqId, TokenId};
use crate::pages::PagePool;
use crate::pages::prefix::{Hit, Key, Keys, PageTokens};
use crate::request::{CacheUse, GenerateRequest, Timings, Usage};
use crate::step::{ExactStore, Logits, Move, Row, StepPlan};

/// Who comes first: lower priority values, then earlier arrival. Total, as arrivals are numbered.
pub(super) type Rank = (i32, u64);

/// When things happened to a sequence, on the caller's clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Times {
    pub arrived: Duration,
    /// Its first row was planned.
    pub started: Option<Duration>,
    pub first_token: Option<Duration>,
    pub last_token: Option<Duration>,
}

impl Times {
    fn timings(self) -> Timings {
        let between = |from: Option<Duration>, to: Option<Duration>| from.zip(to).map_or(Duration::ZERO, |(a, b)| b.saturating_sub(a));
        Timings {
            queue: between(Some(self.arrived), self.started),
            prefill: between(self.started, self.first_token),
            decode: between(self.first_token, self.last_token),
        }
    }
}

/// What is known of a sequence once it is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ended {
    pub usage: Usage,
    pub times: Times,
    /// How often it lost computed positions to others.
    pub preemptions: u32,
}

/// One choice of one request, from enqueue to its end.
pub(super) struct Sequence<State> {
    pub(super) id: SeqId,
    pub(super) rank: Rank,
    pub(super) request: GenerateRequest,
    pub(super) generated: Vec<TokenId>,
    /// Chain keys of its complete pages, as far as they were needed.
    keys: Vec<Key>,
    root: Key,
    pub(super) times: Times,
    pub(super) preemptions: u32,
    /// Prompt positions it had read from the prefix index when it started.
    pub(super) cached_tokens: u32,
    /// Starts in an empty arena and shares it with nobody: the way out when, alone, it cannot grow because pages are
    /// scattered over slabs.
    pub(super) compact: bool,
    pub(super) state: State,
}

/// Holds nothing.
#[derive(Default)]
pub(super) struct Waiting {
    /// What it waits for.
    pub(super) parked: Option<Lack>,
}

/// A page that a prompt lacks, and a running prefill computes.
#[derive(Clone, Copy)]
pub(super) struct Lack {
    pub(super) runner: Rank,
    pub(super) page: u32,
    /// Token-layers to compute that page and all that follows.
    pub(super) alone: u64,
}

/// Holds pages.
///
/// ```text
/// full         exact:     [0, target) leased at the start, then one page at a time
///              shared:    [0, reused) read from the prefix index, never written
/// compressed   sealed:     [0, reused) shared; [reused, sealed_len) written by the prefill's moves, then one at a time
///   prefill    workspace:  [reused, target), given back after the last layer
///              exact:      [sealed_len, target), written by the prefill's moves
///   decode     exact:      [sealed_len, computed]
/// ```
pub(super) struct Running {
    pub(super) phase: Phase,
    pub(super) reused: u32,
    /// End of the prefill: prompt and whatever was generated before a preemption.
    pub(super) target: u32,
    /// Positions whose keys and values are where decoding will read them.
    pub(super) computed: u32,
    pub(super) sealed: Vec<PageAddr>,
    pub(super) exact: Vec<PageAddr>,
    pub(super) workspace: Vec<PageAddr>,
    pub(super) sinks: Option<PageAddr>,
    /// Where the step that decodes position `computed` seals the first exact page.
    pub(super) sealing: Option<Hit>,
    /// Complete pages already offered to the prefix index.
    pub(super) offered: usize,
    /// Over, but a step in flight may still touch its pages.
    pub(super) ended: bool,
}

/// Which pages of a sequence that ends others may go on with.
#[derive(Clone, Copy)]
pub(super) enum Trust {
    All,
    /// Those it found in the prefix index.
    Read,
    Nothing,
}

/// What a running sequence computes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Position `at` of layer `layer`; always layer 0 for the full profile, whose chunks pass all layers.
    Prefill {
        layer: u32,
        at: u32,
    },
    Decode,
}

/// A share of a prefill: some positions through some layers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Quantum {
    pub(super) positions: Range<u32>,
    pub(super) layers: Range<u32>,
}

/// Pages to start with.
pub(super) struct Start<'a> {
    /// Shared pages, from position 0.
    pub(super) hits: &'a [Hit],
    /// Leased pages: exact, sealed, sinks, workspace, as `Need::of` lists them.
    pub(super) leased: &'a [PageAddr],
    pub(super) need: Need,
}

impl<State> Sequence<State> {
    /// Positions whose tokens are known.
    pub(super) fn len(&self) -> u32 {
        (self.request.prompt.len() + self.generated.len()) as u32
    }

    pub(super) fn prompt_len(&self) -> u32 {
        self.request.prompt.len() as u32
    }

    /// Where its prefill ends. An exact cache takes generated tokens like prompt tokens: they come out the same. A compressed
    /// one decodes them over again, for the first time they were computed from latents.
    pub(super) fn prefill_target(&self, compressed: bool) -> u32 {
        if compressed { self.prompt_len() } else { self.len() }
    }

    /// The token at a position.
    pub(super) fn token(&self, position: u32) -> TokenId {
        let (at, n) = (position as usize, self.request.prompt.len());
        if at < n { self.request.prompt[at] } else { self.generated[at - n] }
    }

    /// Key and tokens of a complete page.
    pub(super) fn page(&mut self, page: u32, keys: &Keys) -> (Key, PageTokens) {
        for next in self.keys.len() as u32..=page {
            let key = keys.next(self.keys.last().unwrap_or(&self.root), &self.page_tokens(next));
            self.keys.push(key);
        }
        (self.keys[page as usize], self.page_tokens(page))
    }

    fn page_tokens(&self, page: u32) -> PageTokens {
        std::array::from_fn(|i| self.token(page * PAGE_TOKENS + i as u32))
    }

    /// Log-probabilities of the whole prompt are wanted, and were not delivered yet.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.request.prompt_logprobs.is_some() && self.generated.is_empty()
    }

    /// When it gives up waiting, and as whom; only before it started.
    pub(super) fn deadline(&self) -> Option<(Duration, Rank)> {
        let at = self.times.arrived.saturating_add(self.request.queue_timeout);
        self.times.started.is_none().then_some((at, self.rank))
    }

    fn ended(&self, cache: CacheUse) -> Ended {
        let usage = Usage {
            prompt_tokens: self.prompt_len(),
            cached_tokens: self.cached_tokens,
            completion_tokens: self.generated.len() as u32,
            cache,
            timings: self.times.timings(),
        };
        Ended { usage, times: self.times, preemptions: self.preemptions }
    }

    fn with<Next>(self, state: Next) -> Sequence<Next> {
        let Sequence { id, rank, request, generated, keys, root, times, preemptions, cached_tokens, compact, state: _ } = self;
        Sequence { id, rank, request, generated, keys, root, times, preemptions, cached_tokens, compact, state }
    }
}

impl Sequence<Waiting> {
    pub(super) fn new(id: SeqId, rank: Rank, request: GenerateRequest, root: Key, arrived: Duration) -> Self {
        Sequence {
            id,
            rank,
            request,
            generated: Vec::new(),
            keys: Vec::new(),
            root,
            times: Times { arrived, ..Times::default() },
            preemptions: 0,
            cached_tokens: 0,
            compact: false,
            state: Waiting::default(),
        }
    }

    /// Takes its pages.
    pub(super) fn start(self, pages: Start<'_>, compressed: bool) -> Sequence<Running> {
        let Start { hits, leased, need } = pages;
        let reused = hits.len() as u32 * PAGE_TOKENS;
        let shared = hits.iter().map(|hit| hit.page);
        let (exact, rest) = leased.split_at(need.exact as usize);
        let (sealed, rest) = rest.split_at(need.sealed as usize);
        let (sinks, workspace) = rest.split_at(need.sinks as usize);
        let sinks = sinks.first().copied().or_else(|| hits.first().and_then(|hit| hit.sinks));
        let (exact, sealed) = if compressed {
            (exact.to_vec(), shared.chain(sealed.iter().copied()).collect())
        } else {
            (shared.chain(exact.iter().copied()).collect(), Vec::new())
        };
        let running = Running {
            phase: Phase::Prefill { layer: 0, at: reused },
            reused,
            target: self.prefill_target(compressed),
            computed: reused,
            sealed,
            exact,
            workspace: workspace.to_vec(),
            sinks,
            sealing: None,
            offered: hits.len(),
            ended: false,
        };
        self.with(running)
    }

    /// Ends without having held anything.
    pub(super) fn end(self) -> Ended {
        self.ended(CacheUse::default())
    }
}

impl Sequence<Running> {
    /// Starts: its first row is planned.
    pub(super) fn begin(&mut self, now: Duration) {
        self.times.started = Some(now);
        self.cached_tokens = self.state.reused;
    }

    /// Gives everything back; what was computed and is not found in the prefix index is computed again.
    pub(super) fn preempt(mut self, pool: &mut PagePool) -> Sequence<Waiting> {
        self.preemptions += u32::from(!self.is_untouched());
        self.release_pages(pool);
        self.with(Waiting::default())
    }

    /// Gives everything back, for good. What of its pages is not to be trusted leaves the prefix index.
    pub(super) fn end(mut self, pool: &mut PagePool, profile: &ProfileSizes, trust: Trust) -> Ended {
        let ended = self.ended(self.cache_use(profile));
        let trusted = match trust {
            Trust::All => usize::MAX,
            Trust::Read => (self.state.reused / PAGE_TOKENS) as usize,
            Trust::Nothing => 0,
        };
        let chain = if profile.compressed { &self.state.sealed } else { &self.state.exact };
        if let Some(&page) = chain.get(trusted) {
            pool.forget(page);
        }
        self.release_pages(pool);
        ended
    }

    /// What it would have come to, had it ended now.
    pub(super) fn ended_so_far(&self, profile: &ProfileSizes) -> Ended {
        self.ended(self.cache_use(profile))
    }

    fn release_pages(&mut self, pool: &mut PagePool) {
        let Running { sealed, exact, workspace, sinks, sealing, .. } = &mut self.state;
        let sealing = sealing.take().into_iter().flat_map(|hit| [hit.sinks, Some(hit.page)].into_iter().flatten());
        // Chains go back from their end, the sinks block before page 0, so that a parent is used later than its children.
        let all = workspace.drain(..).chain(sealing).chain(exact.drain(..).rev()).chain(sinks.take()).chain(sealed.drain(..).rev());
        all.for_each(|page| pool.release(page));
    }

    /// Every page it holds.
    pub(super) fn held(&self) -> impl Iterator<Item = PageAddr> + '_ {
        let Running { sealed, exact, workspace, sinks, sealing, .. } = &self.state;
        let sealing = sealing.iter().flat_map(|hit| std::iter::once(hit.page).chain(hit.sinks));
        sealed.iter().chain(exact).chain(workspace).copied().chain(*sinks).chain(sealing)
    }

    /// Whether nothing of it was computed since it started: it loses nothing when it gives its pages back.
    pub(super) fn is_untouched(&self) -> bool {
        self.state.phase == Phase::Prefill { layer: 0, at: self.state.reused }
    }

    pub(super) fn is_decoding(&self) -> bool {
        self.state.phase == Phase::Decode
    }

    /// Pages that the next decode step needs and that are not here yet: for its positions to be written to, and where they
    /// make a page leave the window, one for that to be sealed into.
    pub(super) fn growth(&self, profile: &ProfileSizes) -> Need {
        let Running { computed, sealed, exact, sinks, sealing, .. } = &self.state;
        let sealed = sealed.len() as u32;
        let end = profile.decode_end(*computed, self.len());
        let seals = profile.sealed_len(end) / PAGE_TOKENS > sealed && sealing.is_none();
        Need {
            exact: pages_for(end) - sealed - exact.len() as u32,
            sealed: u32::from(seals),
            sinks: u32::from(seals && sealed == 0 && profile.sinks > 0 && sinks.is_none()),
            workspace: 0,
        }
    }

    /// Whether its prefill is still to offer a page to the prefix index.
    pub(super) fn is_computing(&self, page: u32, profile: &ProfileSizes) -> bool {
        let complete = if profile.compressed { profile.sealed_len(self.state.target) } else { self.state.target } / PAGE_TOKENS;
        !self.is_decoding() && (self.state.offered as u32..complete).contains(&page)
    }

    /// Whether its prefill is still to offer just the page that `other` lacks.
    pub(super) fn will_offer(&mut self, other: &Sequence<Waiting>, page: u32, profiles: &[ProfileSizes], keys: &Keys) -> bool {
        self.root == other.root
            && self.is_computing(page, &profiles[usize::from(self.request.profile.0)])
            && Some(&self.page(page, keys).0) == other.keys.get(page as usize)
    }

    /// Token-layers until its prefill offers a page: pages are sealed when all of the prompt is there, and exact ones one by one.
    pub(super) fn until_offered(&self, page: u32, compressed: bool, layers: u32) -> u64 {
        match self.state.phase {
            Phase::Prefill { at, .. } if !compressed => u64::from(((page + 1) * PAGE_TOKENS).saturating_sub(at)) * u64::from(layers),
            _ => self.remaining(compressed, layers),
        }
    }

    fn cache_use(&self, profile: &ProfileSizes) -> CacheUse {
        let Running { sealed, exact, workspace, sinks, sealing, computed, phase, .. } = &self.state;
        let n = |pages: &[PageAddr]| pages.len() as u64;
        let sealing = sealing.map_or(0, |hit| profile.sizes.sealed + hit.sinks.map_or(0, |_| profile.sizes.sinks));
        let bytes = n(exact) * profile.sizes.exact
            + n(sealed) * profile.sizes.sealed
            + n(workspace) * profile.sizes.workspace
            + sinks.map_or(0, |_| profile.sizes.sinks)
            + sealing;
        let sealed_tokens = match phase {
            Phase::Decode => sealed.len() as u32 * PAGE_TOKENS,
            Phase::Prefill { .. } if profile.compressed => self.state.reused,
            Phase::Prefill { .. } => 0,
        };
        let sinks = if sealed_tokens > 0 { profile.sinks } else { 0 };
        CacheUse { bytes, sealed_tokens, window_tokens: computed - sealed_tokens + sinks }
    }

    /// Token-layers its prefill has left.
    pub(super) fn remaining(&self, compressed: bool, layers: u32) -> u64 {
        let Running { phase, target, reused, .. } = self.state;
        match phase {
            Phase::Decode => 0,
            Phase::Prefill { at, .. } if !compressed => u64::from(target - at) * u64::from(layers),
            Phase::Prefill { layer, at } => u64::from(layers - layer) * u64::from(target - reused) - u64::from(at - reused),
        }
    }

    /// What it prefills with a budget of so many token-layers, and how many that takes.
    ///
    /// Quanta begin and end on page boundaries, but for the end of the prompt.
    pub(super) fn quanta(&self, compressed: bool, layers: u32, budget: u64, mut emit: impl FnMut(Quantum)) -> u64 {
        let Running { phase, target, reused, .. } = self.state;
        let Phase::Prefill { mut layer, mut at } = phase else { return 0 };
        let end_within = |at: u32, tokens: u64| match u32::try_from(tokens).ok().and_then(|t| at.checked_add(t)) {
            Some(end) if end < target => end / PAGE_TOKENS * PAGE_TOKENS,
            _ => target,
        };
        let whole = u64::from(layers);
        let untouched = (layer, at) == (0, reused);
        if !compressed || (untouched && u64::from(target - reused) * whole <= budget) {
            let end = end_within(at, budget / whole);
            if end <= at {
                return 0;
            }
            emit(Quantum { positions: at..end, layers: 0..layers });
            return u64::from(end - at) * whole;
        }
        let mut left = budget;
        while layer < layers {
            let end = end_within(at, left);
            if end <= at {
                break;
            }
            emit(Quantum { positions: at..end, layers: layer..layer + 1 });
            left -= u64::from(end - at);
            (layer, at) = if end == target { (layer + 1, reused) } else { (layer, end) };
        }
        budget - left
    }

    /// Adds the row of a decode step of at most so many tokens, and says how many it has. Its pages are leased already.
    ///
    /// It has one, but for a compressed sequence that was preempted and decodes over again what it said: there, as many as are
    /// known up to the next seal. Each of them sees what it saw the first time, so the sequence goes on as if nothing had been.
    pub(super) fn decode_row(&self, profile: &ProfileSizes, layers: u32, tokens: u32, plan: &mut StepPlan) -> u32 {
        let Running { computed, sealed, exact, sinks, sealing, .. } = &self.state;
        let end = profile.decode_end(*computed, self.len()).min(computed + tokens);
        let first_move = plan.moves.len();
        if let Some(to) = sealing.filter(|_| profile.sealed_len(end) / PAGE_TOKENS > sealed.len() as u32) {
            let skip = self.push_sinks(profile, sealed.is_empty(), exact[0], to.sinks, plan);
            plan.moves.push(Move::Seal { from: exact[0], to: to.page, skip });
        }
        let exact = &exact[..pages_for(end) as usize - sealed.len()];
        let logits = if end == self.len() { Logits::Last } else { Logits::None };
        let view = View { sealed, exact, store: ExactStore::Exact, sinks: *sinks, moves: first_move, logits };
        self.push_row(Quantum { positions: *computed..end, layers: 0..layers }, view, plan);
        end - computed
    }

    /// Adds the row of a prefill quantum.
    pub(super) fn prefill_row(&self, profile: &ProfileSizes, layers: u32, quantum: Quantum, plan: &mut StepPlan) {
        let Running { target, reused, sealed, exact, workspace, sinks, .. } = &self.state;
        let ends = quantum.positions.end == *target;
        let logits = match quantum.layers.end == layers {
            true if self.wants_prompt_logits() => Logits::All,
            true if ends && *target == self.len() => Logits::Last,
            _ => Logits::None,
        };
        let first_move = plan.moves.len();
        if !profile.compressed {
            let exact = &exact[..pages_for(quantum.positions.end) as usize];
            let view = View { sealed: &[], exact, store: ExactStore::Exact, sinks: None, moves: first_move, logits };
            return self.push_row(quantum, view, plan);
        }
        let shared = (reused / PAGE_TOKENS) as usize;
        if ends {
            for (i, &from) in workspace.iter().enumerate() {
                if let Some(&to) = sealed.get(shared + i) {
                    let skip = self.push_sinks(profile, shared + i == 0, from, *sinks, plan);
                    plan.moves.push(Move::Seal { from, to, skip });
                } else {
                    let start = reused + i as u32 * PAGE_TOKENS;
                    let to = exact[shared + i - sealed.len()];
                    plan.moves.push(Move::Keep { from, to, n: (target - start).min(PAGE_TOKENS) });
                }
            }
        }
        let exact = &workspace[..pages_for(quantum.positions.end - reused) as usize];
        let sinks = if shared > 0 { *sinks } else { None };
        let view = View { sealed: &sealed[..shared], exact, store: ExactStore::Workspace, sinks, moves: first_move, logits };
        self.push_row(quantum, view, plan);
    }

    /// The move that saves the sinks of page 0, and how many positions its seal skips.
    fn push_sinks(&self, profile: &ProfileSizes, first: bool, from: PageAddr, to: Option<PageAddr>, plan: &mut StepPlan) -> u32 {
        if !first || profile.sinks == 0 {
            return 0;
        }
        let to = to.expect("a sinks block is leased with sealed page 0");
        plan.moves.push(Move::Sinks { from, to, n: profile.sinks });
        profile.sinks
    }

    fn push_row(&self, quantum: Quantum, view: View<'_>, plan: &mut StepPlan) {
        let Quantum { positions, layers } = quantum;
        let tokens = plan.tokens.len();
        if layers.start == 0 {
            plan.tokens.extend(positions.clone().map(|position| self.token(position)));
        }
        let pages = plan.pages.len();
        plan.pages.extend_from_slice(view.sealed);
        let sealed = pages..plan.pages.len();
        plan.pages.extend_from_slice(view.exact);
        plan.rows.push(Row {
            seq: self.id,
            profile: self.request.profile,
            adapter: self.request.adapter,
            positions,
            layers,
            tokens: tokens..plan.tokens.len(),
            exact: sealed.end..plan.pages.len(),
            sealed,
            store: view.store,
            sinks: view.sinks,
            moves: view.moves..plan.moves.len(),
            logits: view.logits,
        });
    }

    /// Settles a row: what it computed is now there.
    pub(super) fn advance(&mut self, row: &Row, compressed: bool, layers: u32, pool: &mut PagePool) {
        let s = &mut self.state;
        match s.phase {
            Phase::Decode => {
                s.computed = row.positions.end;
                if let Some(hit) = s.sealing.take_if(|_| !row.moves.is_empty()) {
                    pool.release(s.exact.remove(0));
                    s.sealed.push(hit.page);
                    s.sinks = s.sinks.or(hit.sinks);
                }
            }
            Phase::Prefill { .. } if row.positions.end < s.target => {
                s.phase = Phase::Prefill { layer: row.layers.start, at: row.positions.end };
                if !compressed {
                    s.computed = row.positions.end;
                }
            }
            Phase::Prefill { .. } if row.layers.end < layers => s.phase = Phase::Prefill { layer: row.layers.end, at: s.reused },
            Phase::Prefill { .. } => {
                s.phase = Phase::Decode;
                s.computed = s.target;
                s.workspace.drain(..).for_each(|page| pool.release(page));
            }
        }
    }

    /// Forgets the progress of a prefill whose workspace may be half written; other rows may simply run again.
    pub(super) fn rewind(&mut self, compressed: bool) {
        if compressed && matches!(self.state.phase, Phase::Prefill { .. }) {
            self.state.phase = Phase::Prefill { layer: 0, at: self.state.reused };
        }
    }

    /// Complete pages of its chain.
    fn complete(&self, compressed: bool) -> usize {
        match self.state.phase {
            Phase::Prefill { .. } if compressed => (self.state.reused / PAGE_TOKENS) as usize,
            Phase::Decode if compressed => self.state.sealed.len(),
            _ => (self.state.computed / PAGE_TOKENS) as usize,
        }
    }

    pub(super) fn offered_all(&self, profile: &ProfileSizes) -> bool {
        self.state.offered == self.complete(profile.compressed)
    }

    /// Offers pages that became complete to the prefix index, and goes on with those it answers where they are the same to the bit.
    pub(super) fn offer_pages(&mut self, compressed: bool, keys: &Keys, pool: &mut PagePool) {
        let complete = self.complete(compressed);
        for page in self.state.offered..complete {
            let (key, tokens) = self.page(page as u32, keys);
            let s = &mut self.state;
            let chain = if compressed { &mut s.sealed } else { &mut s.exact };
            let parent = page.checked_sub(1).map(|parent| chain[parent]);
            let sinks = if page == 0 { s.sinks } else { None };
            if compressed && pool.find(&key, &tokens).is_some() {
                // Perhaps computed from a beginning read compressed: of equal tokens, but not of equal bytes. It goes on with its own.
                continue;
            }
            let hit = pool.insert(parent, key, &tokens, Hit { page: chain[page], sinks });
            chain[page] = hit.page;
            if page == 0 {
                s.sinks = hit.sinks;
            }
        }
        self.state.offered = complete;
    }
}

/// What a row sees, and where its part of the plan begins.
struct View<'a> {
    sealed: &'a [PageAddr],
    exact: &'a [PageAddr],
    store: ExactStore,
    sinks: Option<PageAddr>,
    moves: usize,
    logits: Logits,
}
