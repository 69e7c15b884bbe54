//! The scheduler under load, with a model that knows what every page must hold.
//!
//! The fake model carries out plans on a real arena. For each position it computes, it writes a checksum of everything
//! that the keys and values of that position depend on: all tokens so far, layer, profile, adapter, salt. Before it uses a
//! page it verifies every checksum in it. The next token is a hash of the tokens so far and a seed. So a page that is
//! mixed up, freed early, shared wrongly, sealed from the wrong place or read at the wrong layer is found where it happens,
//! and whatever a sequence says is compared with what it would say alone.
//!
//! Each seed draws a small world: few slabs, a few profiles, two-letter alphabets, shared prefixes, priorities, and which
//! faults exist. `STRAIT_SIM_STEPS` makes the run longer, `STRAIT_SIM_SEED` runs one seed alone.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strait::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex, SeqId, TokenId};
use strait::kv::layout::PageSizes;
use strait::request::{Failure, FinishReason, GenerateRequest, Sampling};
use strait::scheduler::{Config, Outcome, ProfileSizes, Queue, Refused, RowResult, Scheduler, SealedSplit};
use strait::step::{ExactStore, Logits, Move, Row, StepPlan, sealed_len};

const P: u32 = PAGE_TOKENS;
/// The one adapter of every world.
const ADAPTER: AdapterGeneration = AdapterGeneration(7);

/// Splitmix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0, 0)
    }

    /// In `0..n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Once in `n`.
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0xFF51_AFD7_ED55_8CCD).rotate_left(31);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// One sequence as its owner sees it.
struct Live {
    request: GenerateRequest,
    /// Hash of tokens `0..=i`, for each known token.
    prefix: Vec<u64>,
    tokens: Vec<TokenId>,
    /// Every step it takes part in fails.
    poison: bool,
    /// What it was told to have read from the prefix cache.
    cached: u32,
    /// A fault was injected that may end it.
    may_fail: bool,
    /// The step before which it came.
    since: u64,
    /// A row of it was planned, ever and since it was preempted.
    started: bool,
    running: bool,
}

impl Live {
    fn new(request: GenerateRequest, poison: bool, since: u64) -> Self {
        let identity = mix(request.adapter.0, mix(request.cache_salt, request.profile.0.into()));
        let mut live = Live {
            request,
            prefix: Vec::new(),
            tokens: Vec::new(),
            cached: 0,
            poison,
            may_fail: poison,
            since,
            started: false,
            running: false,
        };
        let mut hash = identity;
        for &token in live.request.prompt.iter() {
            hash = mix(hash, u64::from(token) + 1);
            live.prefix.push(hash);
            live.tokens.push(token);
        }
        live
    }

    fn push(&mut self, token: TokenId) {
        let last = *self.prefix.last().expect("a prompt is not empty");
        self.prefix.push(mix(last, u64::from(token) + 1));
        self.tokens.push(token);
    }

    /// What follows position `at`.
    fn next(&self, at: u32) -> TokenId {
        let vocabulary = if self.request.stop_tokens.is_empty() { 2 } else { 24 };
        (mix(self.prefix[at as usize], self.request.sampling.seed) % vocabulary) as TokenId
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Its whole output when nothing else runs, stop token included, and why it ends.
    fn alone(&self) -> (Vec<TokenId>, FinishReason) {
        let mut run = Live::new(self.request.clone(), false, 0);
        loop {
            let token = run.next(run.tokens.len() as u32 - 1);
            let stops = run.generated() as u32 >= run.request.min_new_tokens && run.request.stop_tokens.contains(&token);
            run.push(token);
            let output = || run.tokens[run.request.prompt.len()..].to_vec();
            if stops {
                return (output(), FinishReason::Stop);
            }
            if run.generated() as u32 == run.request.max_new_tokens {
                return (output(), FinishReason::Length);
            }
        }
    }

    fn kv(&self, position: u32, layer: u32) -> u64 {
        mix(self.prefix[position as usize], u64::from(layer) + 1)
    }

    fn hidden(&self, position: u32, layer: u32) -> u64 {
        mix(self.prefix[position as usize], u64::from(layer) + 1000)
    }

    /// Latents of a page: one checksum over it, without the sinks.
    fn sealed(&self, page: u32, layer: u32, skip: u32) -> u64 {
        (page * P + skip..(page + 1) * P).fold(u64::from(skip), |sum, p| mix(sum, self.kv(p, layer)))
    }
}

/// The arena, and the model that reads and writes it.
///
/// Words of 8 bytes: exact page `[layer][64]`, sinks block `[layer][16]`, sealed page `[layer]`, workspace page `[64]` keys
/// and values then `[64]` hidden states.
struct Memory {
    words: Vec<u64>,
    layers: u32,
}

type Checked<T> = Result<T, String>;

impl Memory {
    fn word(&mut self, page: PageAddr, at: u32) -> &mut u64 {
        &mut self.words[page.byte() as usize / 8 + at as usize]
    }

    fn expect(&mut self, page: PageAddr, at: u32, want: u64, what: impl Fn() -> String) -> Checked<()> {
        match *self.word(page, at) == want {
            true => Ok(()),
            false => Err(format!("{} is not in {page:?}", what())),
        }
    }

    /// Carries out a plan layer by layer, as a runner does, up to `limit` row-layers.
    fn run(&mut self, plan: &StepPlan, live: &BTreeMap<SeqId, Live>, profiles: &[ProfileSizes], limit: u64) -> Checked<Vec<RowResult>> {
        let mut done = 0;
        for layer in 0..self.layers {
            for row in plan.rows.iter().filter(|row| row.layers.contains(&layer)) {
                if done == limit {
                    return Ok(Vec::new());
                }
                done += 1;
                let profile = &profiles[usize::from(row.profile.0)];
                self.run_layer(plan, row, layer, &live[&row.seq], profile).map_err(|e| format!("{:?} layer {layer}: {e}", row.seq))?;
            }
        }
        let result = |row: &Row| match row.logits {
            Logits::None => RowResult::Nothing,
            _ if row.positions.end as usize == live[&row.seq].tokens.len() => RowResult::Token(live[&row.seq].next(row.positions.end - 1)),
            _ => RowResult::Nothing,
        };
        Ok(plan.rows.iter().map(result).collect())
    }

    fn run_layer(&mut self, plan: &StepPlan, row: &Row, layer: u32, live: &Live, profile: &ProfileSizes) -> Checked<()> {
        let Range { start, end } = row.positions;
        let (sealed, exact) = (&plan.pages[row.sealed.clone()], &plan.pages[row.exact.clone()]);
        let first = sealed.len() as u32 * P;
        if start >= end || first > start || exact.len() as u32 != (end - first).div_ceil(P) {
            return Err(format!("{start}..{end} with {} sealed and {} exact pages", sealed.len(), exact.len()));
        }
        if row.profile != live.request.profile || row.adapter != live.request.adapter || end as usize > live.tokens.len() {
            return Err("the row is not of this request".into());
        }
        // However often it is preempted, a compressed sequence computes its prompt from exact pages but for those it found
        // sealed the first time, and each later position from the pages that were sealed when it was first decoded.
        let prompt = live.request.prompt.len() as u32;
        let as_first = match row.store {
            ExactStore::Exact => !profile.compressed || start >= prompt && (start..end).all(|p| sealed_len(p, profile.window) == first),
            ExactStore::Workspace => end <= prompt && first <= live.cached,
        };
        if !as_first {
            return Err(format!("{start}..{end} after {prompt} prompt tokens sees {first} sealed positions"));
        }
        // Where a position's keys and values of this layer are in its page.
        let slot = |p: u32| match row.store {
            ExactStore::Exact => layer * P + p % P,
            ExactStore::Workspace => p % P,
        };
        let page_of = |p: u32| exact[((p - first) / P) as usize];
        if layer == row.layers.start && layer > 0 {
            if row.store != ExactStore::Workspace || !row.tokens.is_empty() {
                return Err("only a workspace keeps hidden states".into());
            }
            for p in start..end {
                self.expect(page_of(p), P + p % P, live.hidden(p, layer), || format!("hidden state of {p}"))?;
            }
        } else if layer == 0 && plan.tokens[row.tokens.clone()] != live.tokens[start as usize..end as usize] {
            return Err("input tokens are not those of the sequence".into());
        }
        let sinks = if sealed.is_empty() { 0 } else { profile.sinks };
        if row.sinks.is_some() != (sinks > 0) {
            return Err(format!("sinks are {:?} beside {} sealed pages", row.sinks, sealed.len()));
        }
        for p in 0..sinks {
            self.expect(row.sinks.expect("checked above"), layer * 16 + p, live.kv(p, layer), || format!("sink {p}"))?;
        }
        for (i, &page) in (0..).zip(sealed) {
            let skip = if i == 0 { profile.sinks } else { 0 };
            self.expect(page, layer, live.sealed(i, layer, skip), || format!("sealed page {i}"))?;
        }
        for p in first..start {
            self.expect(page_of(p), slot(p), live.kv(p, layer), || format!("position {p}"))?;
        }
        for p in start..end {
            *self.word(page_of(p), slot(p)) = live.kv(p, layer);
        }
        for m in &plan.moves[row.moves.clone()] {
            let (Move::Seal { from, .. } | Move::Sinks { from, .. } | Move::Keep { from, .. }) = *m;
            let index = exact.iter().position(|&page| page == from).ok_or("a move from a page outside the row")? as u32;
            let begin = first + index * P;
            let all = |memory: &mut Self, n: u32| {
                (begin..begin + n).try_for_each(|p| match p < end {
                    true => memory.expect(from, slot(p), live.kv(p, layer), || format!("position {p}, to move")),
                    false => Err(format!("position {p} is moved and not computed")),
                })
            };
            match *m {
                Move::Seal { to, skip, .. } => {
                    all(self, P)?;
                    if skip != if begin == 0 { profile.sinks } else { 0 } {
                        return Err(format!("page at {begin} is sealed without {skip} positions"));
                    }
                    *self.word(to, layer) = live.sealed(begin / P, layer, skip);
                }
                Move::Sinks { to, n, .. } => {
                    all(self, n)?;
                    if (begin, n) != (0, profile.sinks) {
                        return Err(format!("{n} sinks at {begin}"));
                    }
                    (0..n).for_each(|p| *self.word(to, layer * 16 + p) = live.kv(p, layer));
                }
                Move::Keep { to, n, .. } => {
                    all(self, n)?;
                    (begin..begin + n).for_each(|p| *self.word(to, layer * P + p % P) = live.kv(p, layer));
                }
            }
        }
        if layer + 1 == row.layers.end && row.layers.end < self.layers {
            for p in start..end {
                *self.word(page_of(p), P + p % P) = live.hidden(p, layer + 1);
            }
        }
        Ok(())
    }
}

/// What a seed draws.
struct World {
    config: Config,
    requests: u64,
    /// Steps between arrivals, about.
    calm: u64,
    cancels: bool,
    faults: bool,
    /// Steps between failed ones, about, where faults exist.
    fault_every: u64,
    timeouts: bool,
    /// Whether adapters take their time to arrive.
    travels: bool,
    prompt_max: u64,
    new_max: u64,
    documents: u64,
}

fn page_sizes(layers: u64, sealed: u64, sinks: u32) -> PageSizes {
    PageSizes { exact: layers * 512, sealed, sinks: if sinks > 0 { layers * 128 } else { 0 }, workspace: 1024 }
}

fn world(rng: &mut Rng) -> World {
    let layers = 1 + rng.below(3);
    // Several pages of all but one kind to a slab, and few slabs: what is read of a beginning may hold so many that its reader cannot grow.
    let scattered = rng.one_in(4);
    let profile = |rng: &mut Rng| {
        if scattered {
            let sizes = PageSizes { exact: 4096, sealed: 1024, sinks: 0, workspace: 1024 };
            let split = SealedSplit { keys: 512, values: 256, metadata: 256 };
            return ProfileSizes { sizes, window: rng.pick(&[32, 64]), sinks: 0, compressed: true, split };
        }
        if rng.one_in(3) {
            let sizes = PageSizes { exact: layers * 512, ..PageSizes::default() };
            return ProfileSizes { sizes, ..ProfileSizes::default() };
        }
        let (window, sinks, sealed) = (rng.pick(&[0, 32, 64, 100, 128, 256]), rng.pick(&[0, 4, 16]), rng.pick(&[64, 128, 256, 512]));
        let split = SealedSplit { keys: sealed / 2, values: sealed / 4, metadata: sealed / 4 };
        ProfileSizes { sizes: page_sizes(layers, sealed, sinks), window, sinks, compressed: true, split }
    };
    let profiles: Vec<ProfileSizes> = (0..1 + rng.below(3)).map(|_| profile(rng)).collect();
    let slab = profiles.iter().map(|p| p.sizes.exact.max(p.sizes.workspace)).max().unwrap_or(0);
    let max_num_seqs = 1 + rng.below(8) as usize;
    // Short prompts and long answers on few slabs: everybody grows, nobody can.
    let crowded = !scattered && rng.one_in(2);
    let slabs = if scattered {
        3 + rng.below(3)
    } else if crowded {
        6 + rng.below(12)
    } else {
        5 + rng.below(40)
    };
    World {
        config: Config {
            max_num_seqs,
            max_num_batched_tokens: max_num_seqs as u32 - 1 + P + rng.pick(&[0, 0, 17, 64, 300]),
            max_queued_requests: 4 + rng.below(40) as usize,
            max_queued_tokens: 200 + rng.below(8000),
            layers: layers as u32,
            max_model_len: 1000,
            arena_bytes: slab * slabs + rng.below(slab),
            profiles,
            prefix_caching: !rng.one_in(5),
            hash_secret: [rng.next() as u8; 32],
            model_digest: [1; 32],
        },
        requests: 10 + rng.below(50),
        calm: if crowded { 1 } else { rng.pick(&[1, 3, 20, 60]) },
        cancels: rng.one_in(2),
        faults: rng.one_in(2),
        fault_every: rng.pick(&[300, 20]),
        timeouts: rng.one_in(3),
        prompt_max: if crowded { 70 } else { rng.pick(&[70, 200, 400]) },
        new_max: if crowded { rng.pick(&[200, 300, 500]) } else { rng.pick(&[3, 80, 200, 300]) },
        documents: 1 + rng.below(4),
        travels: rng.one_in(3),
    }
}

impl World {
    fn request(&self, rng: &mut Rng) -> GenerateRequest {
        let document = rng.below(self.documents);
        let (shared, own) = (rng.below(self.prompt_max), rng.below(self.prompt_max / 2 + 1));
        let shared = (0..shared).map(|i| (mix(document, i) % 2) as TokenId);
        let own: Vec<TokenId> = (0..own.max(1)).map(|_| rng.below(2) as TokenId).collect();
        let max_new_tokens = 1 + rng.below(self.new_max) as u32;
        GenerateRequest {
            prompt: shared.chain(own).collect(),
            max_new_tokens,
            min_new_tokens: if rng.one_in(4) { rng.below(u64::from(max_new_tokens) + 1) as u32 } else { 0 },
            stop_tokens: if rng.one_in(2) { Arc::from([2, 3]) } else { Arc::from([]) },
            sampling: Sampling { seed: rng.below(3), ..Sampling::greedy() },
            logprobs: None,
            prompt_logprobs: rng.one_in(8).then_some(1),
            profile: ProfileIndex(rng.below(self.config.profiles.len() as u64) as u8),
            adapter: rng.pick(&[AdapterGeneration(0), AdapterGeneration(0), AdapterGeneration(0), ADAPTER]),
            priority: rng.pick(&[0, 0, 0, 0, -1, 5]),
            cache_salt: rng.pick(&[0, 0, 0, 9]),
            queue_timeout: if self.timeouts { Duration::from_millis(rng.pick(&[1, 50, 500, 5000])) } else { Duration::MAX },
        }
    }
}

/// Everything of one seed.
struct Sim {
    rng: Rng,
    world: World,
    scheduler: Scheduler,
    queue: Queue,
    memory: Memory,
    live: BTreeMap<SeqId, Live>,
    now: Duration,
    next_seq: u64,
    steps: u64,
    /// Plans until [`ADAPTER`] arrives.
    travel: u64,
    /// Hash of all outcomes and plans.
    stream: u64,
    tally: Tally,
}

/// What happened, to see that a run exercised what it is for.
#[derive(Default, Debug)]
struct Tally {
    done: u64,
    cached_tokens: u64,
    preemptions: u64,
    layered_rows: u64,
    seals: u64,
    timeouts: u64,
    replayed_rows: u64,
    refused: u64,
    cancelled_in_flight: u64,
    failed_steps: u64,
    passed: u64,
    alone: u64,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let world = world(&mut rng);
        Sim::of(seed, rng, world)
    }

    fn of(seed: u64, mut rng: Rng, world: World) -> Self {
        let words = (0..world.config.arena_bytes / 8).map(|_| rng.next()).collect();
        let scheduler = Scheduler::new(world.config.clone()).expect("the world is sound");
        let queue = Queue::new(&world.config);
        let memory = Memory { words, layers: world.config.layers };
        Sim {
            rng,
            world,
            scheduler,
            queue,
            memory,
            live: BTreeMap::new(),
            now: Duration::ZERO,
            next_seq: 0,
            steps: 0,
            travel: 0,
            stream: seed,
            tally: Tally::default(),
        }
    }

    fn run(&mut self) -> Checked<()> {
        let mut plan = StepPlan::default();
        let mut quiet = 0;
        loop {
            let arriving = self.next_seq < self.world.requests;
            if arriving && self.rng.one_in(self.world.calm) {
                for _ in 0..1 + self.rng.below(4) {
                    self.enqueue()?;
                }
            }
            if self.world.cancels && self.rng.one_in(25) {
                self.cancel(false)?;
            }
            if self.world.cancels && self.rng.one_in(1500) {
                let mut out = Vec::new();
                self.scheduler.end_all(Failure::Draining, &mut out);
                self.deliver(&plan, out)?;
                self.check(!self.live.is_empty(), "something outlived end_all")?;
            }
            self.step(&mut plan)?;
            if arriving {
                continue;
            }
            if self.scheduler.is_idle() {
                break;
            }
            quiet += 1;
            self.check(quiet > 60_000, "no end after 60000 steps without arrivals")?;
        }
        self.check(!self.live.is_empty(), "idle, and somebody got no answer")?;
        self.check(!self.queue.is_empty(), "idle, and somebody waits")?;
        let bytes = self.scheduler.pool().bytes();
        self.check(bytes.held != 0, "idle, and pages are held")?;
        self.scheduler.drain();
        let request = self.world.request(&mut self.rng);
        let refused = self.scheduler.enqueue(SeqId(u64::MAX), request, self.now);
        self.check(refused != Err(Refused::Draining), "a request was taken while draining")
    }

    fn check(&self, wrong: bool, what: &str) -> Checked<()> {
        if wrong { Err(what.to_owned()) } else { Ok(()) }
    }

    fn enqueue(&mut self) -> Checked<()> {
        let request = self.world.request(&mut self.rng);
        let choices = if self.rng.one_in(10) { 2 + self.rng.below(3) } else { 1 };
        // As the engine does: places in the queue first.
        let Ok(seqs) = self.queue.enter(&vec![request.prompt.len(); choices as usize], self.now) else {
            self.tally.refused += choices;
            return Ok(());
        };
        for (choice, seq) in (0..).zip(seqs) {
            self.next_seq = seq.0 + 1;
            let sampling = Sampling { seed: request.sampling.seed + choice, ..Sampling::greedy() };
            let request = GenerateRequest { sampling, ..request.clone() };
            match self.scheduler.enqueue(seq, request.clone(), self.now) {
                Ok(()) => {
                    let poison = self.world.faults && self.rng.one_in(20);
                    self.live.insert(seq, Live::new(request, poison, self.steps));
                }
                Err(Refused::TooLarge { .. }) => {
                    self.queue.leave(seq);
                    self.tally.refused += 1;
                }
                Err(other) => return Err(format!("refused: {other}")),
            }
        }
        self.scheduler.check()
    }

    fn cancel(&mut self, in_flight: bool) -> Checked<()> {
        let seq = SeqId(self.rng.below(self.next_seq + 1));
        let before = self.scheduler.pool().bytes();
        let known = self.live.remove(&seq).is_some();
        self.queue.leave(seq);
        let ended = self.scheduler.cancel(seq);
        self.check(ended.is_some() != known, "cancel and the owner disagree on who lives")?;
        if in_flight {
            self.tally.cancelled_in_flight += u64::from(known);
            self.check(self.scheduler.pool().bytes() != before, "pages moved while a step is in flight")?;
        }
        self.scheduler.check()
    }

    fn step(&mut self, plan: &mut StepPlan) -> Checked<()> {
        self.now += Duration::from_millis(self.rng.below(20));
        let mut out = Vec::new();
        if self.scheduler.next_deadline().is_some_and(|at| at <= self.now) {
            self.scheduler.expire(self.now, &mut out);
            self.check(out.is_empty(), "a deadline passed and nobody expired")?;
        }
        self.travel = self.travel.saturating_sub(1);
        if self.world.travels && self.travel == 0 && self.rng.one_in(30) {
            self.travel = self.rng.below(60);
        }
        self.scheduler.await_adapters((self.travel > 0).then_some(ADAPTER));
        self.scheduler.plan(self.now, plan, &mut out);
        self.deliver(plan, out)?;
        for row in &plan.rows {
            self.live.get_mut(&row.seq).ok_or("a row of nobody")?.running = true;
        }
        self.scheduler.check().map_err(|e| format!("after plan: {e}\n{plan}"))?;
        if plan.rows.is_empty() {
            let all_wait = self.travel > 0 && self.live.values().all(|live| live.request.adapter == ADAPTER);
            return self.check(!self.scheduler.is_idle() && !all_wait, "work waits and nothing was planned");
        }
        self.steps += 1;
        self.check_budget(plan)?;
        for word in [plan.rows.len(), plan.tokens.len(), plan.pages.len(), plan.moves.len()] {
            self.stream = mix(self.stream, word as u64);
        }
        // The runner holds references to what it runs, whoever is cancelled meanwhile.
        let poisoned = plan.rows.iter().any(|row| self.live[&row.seq].poison);
        let fails = poisoned || (self.world.faults && self.rng.one_in(self.world.fault_every));
        let limit = if fails { self.rng.below(plan.rows.len() as u64 * 2) } else { u64::MAX };
        let results = self.memory.run(plan, &self.live, &self.world.config.profiles, limit).map_err(|e| format!("{e}\n{plan}"));
        let mut results = results?;
        if self.world.cancels && self.rng.one_in(20) {
            self.cancel(true)?;
        }
        if self.world.cancels && self.rng.one_in(20) {
            self.enqueue()?;
        }
        let mut out = Vec::new();
        if fails {
            self.tally.failed_steps += 1;
            self.scribble(plan);
            let alone = plan.rows.iter().all(|row| row.seq == plan.rows[0].seq);
            if let Some(live) = self.live.get_mut(&plan.rows[0].seq).filter(|_| alone) {
                live.may_fail = true;
            }
            let failure = Failure::Internal("injected".into());
            match self.rng.one_in(2) && !plan.rows.is_empty() {
                true => self.scheduler.step_failed(plan, failure, self.now, &mut out),
                false => self.scheduler.commit(plan, &[], self.now, &mut out),
            }
        } else {
            if self.world.faults && self.rng.one_in(self.world.fault_every / 2) {
                let i = self.rng.below(results.len() as u64) as usize;
                results[i] = RowResult::Failed(Failure::Numerical);
                if let Some(live) = self.live.get_mut(&plan.rows[i].seq) {
                    live.may_fail = true;
                }
            }
            self.scheduler.commit(plan, &results, self.now, &mut out);
        }
        self.deliver(plan, out)?;
        self.scheduler.check().map_err(|e| format!("after commit: {e}\n{plan}"))
    }

    /// A failed step leaves anything in pages that it was to write.
    fn scribble(&mut self, plan: &StepPlan) {
        for row in &plan.rows {
            let exact = &plan.pages[row.exact.clone()];
            let first = row.sealed.len() as u32 * P;
            for p in row.positions.clone() {
                let page = exact[((p - first) / P) as usize];
                let (layer, rubbish) = (row.layers.start, self.rng.next());
                match row.store {
                    ExactStore::Exact => *self.memory.word(page, layer * P + p % P) = rubbish,
                    ExactStore::Workspace => {
                        *self.memory.word(page, p % P) = rubbish;
                        *self.memory.word(page, P + p % P) = rubbish;
                    }
                }
            }
        }
    }

    fn check_budget(&mut self, plan: &StepPlan) -> Checked<()> {
        let config = &self.world.config;
        let cost: u64 = plan.rows.iter().map(|row| row.len() as u64 * u64::from(row.layers.end - row.layers.start)).sum();
        let mut seqs: Vec<SeqId> = plan.rows.iter().map(|row| row.seq).collect();
        seqs.sort_unstable();
        seqs.dedup();
        self.tally.layered_rows += plan.rows.iter().filter(|row| row.layers.end - row.layers.start < config.layers).count() as u64;
        let again = |row: &&Row| row.store == ExactStore::Exact && !row.sealed.is_empty() && row.logits == Logits::None;
        self.tally.replayed_rows += plan.rows.iter().filter(again).count() as u64;
        self.tally.seals += plan.moves.iter().filter(|m| matches!(m, Move::Seal { .. })).count() as u64;
        let over = cost > u64::from(config.max_num_batched_tokens) * u64::from(config.layers) || seqs.len() > config.max_num_seqs;
        self.check(over, &format!("a step of {cost} token-layers for {} sequences", seqs.len()))?;
        let inside = plan.rows.iter().any(|row| {
            let mut exact = plan.pages[row.exact.clone()].to_vec();
            exact.sort_unstable();
            exact.windows(2).any(|pair| pair[0] == pair[1])
        });
        self.check(inside, "a page is twice in a table")
    }

    fn deliver(&mut self, plan: &StepPlan, out: Vec<Outcome>) -> Checked<()> {
        for outcome in out {
            for byte in format!("{outcome:?}").bytes() {
                self.stream = mix(self.stream, byte.into());
            }
            let wrong = |what: &str| Err(format!("{what}: {outcome:?}"));
            match &outcome {
                Outcome::Started { seq, looked_up, cached_tokens, prompt_tokens, .. } => {
                    let Some(live) = self.live.get_mut(seq) else { return wrong("unknown sequence") };
                    if live.started {
                        return wrong("a second start");
                    }
                    (live.started, live.cached) = (true, *cached_tokens);
                    self.queue.start(*seq, self.now);
                    self.tally.cached_tokens += u64::from(*cached_tokens);
                    if live.request.adapter == ADAPTER && self.travel > 0 {
                        return wrong("a start before the adapter is there");
                    }
                    self.tally.passed += u64::from(self.travel > 0);
                    if *looked_up != (self.world.config.prefix_caching && live.request.prompt_logprobs.is_none()) {
                        return wrong("a look-up that was not made, or was and is not told");
                    }
                    let n = live.request.prompt.len() as u32;
                    if *prompt_tokens != n || *cached_tokens >= n || !cached_tokens.is_multiple_of(P) {
                        return wrong("a start that cannot be");
                    }
                }
                Outcome::Token { seq, row, id } => {
                    let Some(live) = self.live.get_mut(seq) else { return wrong("unknown sequence") };
                    if plan.rows[*row].seq != *seq || live.next(live.tokens.len() as u32 - 1) != *id {
                        return wrong("not the next token");
                    }
                    live.push(*id);
                }
                Outcome::Preempted { seq } => {
                    self.tally.preemptions += 1;
                    let Some(live) = self.live.get_mut(seq) else { return wrong("unknown sequence") };
                    if !std::mem::take(&mut live.running) {
                        return wrong("nothing was computed that could be lost");
                    }
                    self.tally.alone += u64::from(self.live.values().all(|live| !live.running));
                }
                Outcome::Done { seq, reason, ended } => {
                    let Some(live) = self.live.remove(seq) else { return wrong("unknown sequence") };
                    self.tally.done += 1;
                    let (output, why) = live.alone();
                    let emitted = &live.tokens[live.request.prompt.len()..];
                    let usage = ended.usage;
                    if emitted != output || *reason != why {
                        return wrong("not what it says alone");
                    }
                    if (usage.completion_tokens as usize, usage.prompt_tokens as usize) != (output.len(), live.request.prompt.len()) {
                        return wrong("not its bill");
                    }
                    if usage.cached_tokens != live.cached {
                        return wrong("not the cached tokens of its start");
                    }
                    let profile = &self.world.config.profiles[usize::from(live.request.profile.0)];
                    let computed = usage.prompt_tokens + usage.completion_tokens - 1;
                    let sealed = if profile.compressed { sealed_len(computed, profile.window) } else { 0 };
                    let exact = u64::from(computed.div_ceil(P) - sealed / P) * profile.sizes.exact;
                    let bytes = exact + u64::from(sealed / P) * profile.sizes.sealed + if sealed > 0 { profile.sizes.sinks } else { 0 };
                    if usage.cache.sealed_tokens != sealed || usage.cache.bytes != bytes {
                        return wrong(&format!("not {sealed} sealed in {bytes} bytes"));
                    }
                }
                Outcome::Failed { seq, failure, .. } => {
                    let Some(live) = self.live.remove(seq) else { return wrong("unknown sequence") };
                    self.queue.leave(*seq);
                    let fair = match failure {
                        Failure::Numerical | Failure::Internal(_) => live.may_fail,
                        Failure::QueueTimeout => {
                            self.tally.timeouts += 1;
                            self.world.timeouts && !live.started
                        }
                        // What was taken fits, whatever happens to it.
                        Failure::OutOfPages => false,
                        // Nobody reads here, and the scheduler knows no readers.
                        Failure::Unread => false,
                        Failure::Draining => true,
                    };
                    if !fair {
                        return wrong("a failure without a cause");
                    }
                }
            }
        }
        Ok(())
    }
}

fn run(seed: u64) -> Sim {
    let mut sim = Sim::new(seed);
    if let Err(error) = sim.run() {
        let World { config, .. } = &sim.world;
        panic!("seed {seed}, step {}: {error}\n(STRAIT_SIM_SEED={seed} runs it alone)\n{config:?}", sim.steps);
    }
    sim
}

/// Strict priority leaves the others no such promise.
#[test]
fn the_most_urgent_end_soon_however_many_keep_coming() {
    const SOON: u64 = 100;
    let mut oldest = 0;
    for seed in 0..40 {
        let mut rng = Rng(seed);
        let quiet = World { cancels: false, faults: false, timeouts: false, travels: false, ..world(&mut rng) };
        let small = World { new_max: 3, documents: 2, ..quiet };
        let mut sim = Sim::of(seed, rng, small);
        let mut plan = StepPlan::default();
        let mut run = || -> Checked<()> {
            while sim.steps < 4000 {
                for _ in 0..sim.rng.below(3) {
                    sim.enqueue()?;
                }
                sim.step(&mut plan)?;
                let since = sim.live.values().filter(|live| live.request.priority == -1).map(|live| live.since).min();
                let age = since.map_or(0, |since| sim.steps - since);
                oldest = oldest.max(age);
                sim.check(age > SOON, &format!("somebody urgent came {age} steps ago"))?;
            }
            Ok(())
        };
        if let Err(error) = run() {
            panic!("seed {seed}, step {}: {error}\n{:?}", sim.steps, sim.world.config);
        }
    }
    assert!(oldest > 0, "nobody urgent ever waited");
}

#[test]
fn every_sequence_says_what_it_would_say_alone() {
    if let Some(seed) = std::env::var("STRAIT_SIM_SEED").ok().and_then(|s| s.parse().ok()) {
        let sim = run(seed);
        eprintln!("seed {seed}: {} steps, {:?}", sim.steps, sim.tally);
        return;
    }
    let target = std::env::var("STRAIT_SIM_STEPS").ok().map_or(60_000, |s| s.parse().expect("STRAIT_SIM_STEPS is a number"));
    let (began, mut steps, mut seed, mut total) = (Instant::now(), 0, 0, Tally::default());
    while steps < target {
        let sim = run(seed);
        if seed % 16 == 0 {
            assert_eq!(run(seed).stream, sim.stream, "seed {seed} does not repeat itself");
        }
        steps += sim.steps;
        seed += 1;
        let Tally {
            done,
            cached_tokens,
            preemptions,
            layered_rows,
            seals,
            timeouts,
            replayed_rows,
            refused,
            cancelled_in_flight,
            failed_steps,
            passed,
            alone,
        } = sim.tally;
        total = Tally {
            done: total.done + done,
            cached_tokens: total.cached_tokens + cached_tokens,
            preemptions: total.preemptions + preemptions,
            layered_rows: total.layered_rows + layered_rows,
            seals: total.seals + seals,
            timeouts: total.timeouts + timeouts,
            replayed_rows: total.replayed_rows + replayed_rows,
            refused: total.refused + refused,
            cancelled_in_flight: total.cancelled_in_flight + cancelled_in_flight,
            failed_steps: total.failed_steps + failed_steps,
            passed: total.passed + passed,
            alone: total.alone + alone,
        };
    }
    eprintln!("{steps} steps, {seed} seeds, {:.1?}: {total:?}", began.elapsed());
    let Tally {
        done,
        cached_tokens,
        preemptions,
        layered_rows,
        seals,
        timeouts,
        replayed_rows,
        refused,
        cancelled_in_flight,
        failed_steps,
        passed,
        alone,
    } = total;
    for (what, n) in [
        ("sequences done", done),
        ("tokens from the prefix cache", cached_tokens),
        ("preemptions", preemptions),
        ("layer-by-layer rows", layered_rows),
        ("seals", seals),
        ("timeouts", timeouts),
        ("tokens decoded over again", replayed_rows),
        ("refusals", refused),
        ("cancels in flight", cancelled_in_flight),
        ("failed steps", failed_steps),
        ("starts while an adapter was under way", passed),
        ("sequences that could not grow though they were alone", alone),
    ] {
        assert!(n > 0, "{steps} steps without any {what}");
    }
}
