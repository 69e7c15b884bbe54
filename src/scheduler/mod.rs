//! Which sequences run next, and on which pages. A pure state machine: driven by calls and the time they bring, it
//! knows no clock, no device, no channel, and the same calls make the same plans.
//!
//! ```text
//! enqueue --> waiting --plan: admit--> running: prefill --commit--> running: decode --commit--> Done
//!                ^                        |                            |
//!                \------ plan: preempt ---+----------------------------/        cancel, Failed: from anywhere
//! ```
//!
//! One plan is in flight at a time: `plan`, then `commit` or `step_failed`. What is cancelled between them keeps its
//! pages until then.
//!
//! **Order.** Everything is by rank: lower `priority` first, then earlier arrival. A preempted sequence keeps its rank,
//! so it is in front again of all that arrived later.
//!
//! **A step.** First every decoding sequence, one token each. What remains of the step's budget, in token-layers, goes to
//! prefills: at least half to the first in rank, the rest to those that have less left than it, fewest first, and what they
//! leave to the first again. So a huge prompt is never starved, and never starves, and of equal ones each is done as soon as
//! it can be.
//!
//! **Admission** leases all pages of a prompt or none. Nobody passes a sequence for which there is no room, of whatever
//! priority. A sequence that waits for a page which a running prefill is computing (an equal prompt that is before it in rank, and
//! will have it sooner than the sequence itself would), or for an adapter that is under way to the device, is passed: it lacks
//! nothing that others could take. Nothing is admitted in a plan in which a decode took pages from somebody. A sequence
//! may be admitted before the budget has anything for it, so that a short prompt behind several huge ones is not kept waiting
//! by them; if its pages or its place are wanted before it computed anything, by one before it in rank or one that decodes, it
//! gives them back and loses nothing. It starts with its first row: until then it waits, whatever it holds, and may wait too long.
//!
//! **Preemption.** When a decode cannot grow, the last in rank gives back all its pages; those the prefix index knows stay
//! cached. It computes prompt and generated tokens again later; nothing is emitted twice, and it goes on as if nothing had
//! been: an exact cache is the same however it was filled, and a compressed sequence prefills its prompt and then decodes
//! what it said over again, up to a page in one row, each position from the pages it met the first time. One exception: pages
//! of its prompt that it found cached and that were evicted meanwhile are computed anew, and exactly. What was preempted
//! [`SHIELD`] times goes last among victims. The first in rank of those can always take what others hold, so there is
//! progress. A sequence that cannot grow though it is alone holds pages scattered over slabs: it starts again in an emptied
//! arena, when nobody else runs, and while it runs nobody else starts. There `enqueue` promised it every page it will need.
//!
//! Priority orders who is admitted and who is preempted for want of pages; nobody who has computed anything is preempted just
//! to let another start.

mod check;
mod fit;
mod profile;
mod queue;
mod sequence;

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::time::Duration;

pub use self::fit::Fit;
pub use self::profile::ProfileSizes;
pub use self::queue::{Limit, Queue};
pub use self::sequence::{Ended, Times};
use self::sequence::{Lack, Rank, Running, Sequence, Start, Trust, Waiting};
use crate::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex, SeqId, TokenId};
pub use crate::kv::layout::SealedSplit;
use crate::pages::prefix::{CacheIdentity, Hit, Keys};
use crate::pages::{Kind, PagePool, Tag};
use crate::request::{Failure, FinishReason, GenerateRequest};
use crate::step::{Logits, StepPlan};
use crate::telemetry::{Branch, Snapshot};

/// A sequence that lost work to preemption so often is not preempted again while another can be.
pub const SHIELD: u32 = 3;

/// What the scheduler works with. Fixed for its life.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Tokens one step computes, through all layers; more layers' worth is never planned.
    pub max_num_batched_tokens: u32,
    /// Requests of which some sequence waits for its first start. This and the next are kept by [`Queue`], whom those who enqueue ask before.
    pub max_queued_requests: usize,
    /// The prompt tokens of what waits. The request that reaches one of the two may exceed it.
    pub max_queued_tokens: u64,
    pub layers: u32,
    /// Prompt and generated tokens of one sequence.
    pub max_model_len: u32,
    pub arena_bytes: u64,
    pub profiles: Vec<ProfileSizes>,
    pub prefix_caching: bool,
    /// Drawn at start: makes keys of the prefix index unforgeable.
    pub hash_secret: [u8; 32],
    pub model_digest: [u8; 32],
}

/// Why a configuration cannot run.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("max_num_batched_tokens is {tokens}, and {seqs} sequences need at least {least}: one token each, and one page of a prompt")]
    StepTooSmall { tokens: u32, seqs: usize, least: usize },
    #[error("{0} must not be zero")]
    Zero(&'static str),
    #[error("cache profile {profile}: {fault}")]
    Profile { profile: usize, fault: &'static str },
    #[error("{0} cache profiles; there may be 255")]
    Profiles(usize),
    #[error("an arena of {0} bytes is beyond the 256 GiB that pages can address")]
    Arena(u64),
}

/// Why a request was not taken. Nothing of it is left behind.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// It could not run even alone. Bytes of whole slabs, exact.
    #[error("the request needs {need} bytes of cache, and there are {have}")]
    TooLarge { need: u64, have: u64 },
    #[error("prompt and generated tokens would be {tokens}, and the model takes {max_model_len}")]
    TooLong { tokens: u64, max_model_len: u32 },
    /// Not a request that admission builds.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
    #[error("draining")]
    Draining,
}

/// What a row of the plan came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RowResult {
    /// Computed; its logits were not wanted.
    Nothing,
    /// The token sampled from the last position's logits.
    Token(TokenId),
    /// Ends the sequence, and only it. What it computed leaves the prefix index, and after [`Failure::Numerical`] what it read does, too.
    Failed(Failure),
}

/// What happened to a sequence. A sequence that was enqueued gets exactly one of `Done` and `Failed`, and nothing after it;
/// one that is cancelled gets neither.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Its first row is in the plan; the time until then is its queueing time.
    Started {
        seq: SeqId,
        queued: Duration,
        /// The prefix index was asked: it is kept, and the prompt is not to be scored.
        looked_up: bool,
        cached_tokens: u32,
        prompt_tokens: u32,
    },
    /// A token, from `row` of the plan just committed; the stop token too, as the last one. Whether it is text is the edge's to say.
    Token {
        seq: SeqId,
        row: usize,
        id: TokenId,
    },
    /// It waits again. If it had no token yet, prompt log-probabilities will come once more from the start.
    Preempted {
        seq: SeqId,
    },
    /// It ended as it should. `completion_tokens` counts its `Token`s.
    Done {
        seq: SeqId,
        reason: FinishReason,
        ended: Ended,
    },
    Failed {
        seq: SeqId,
        failure: Failure,
        ended: Ended,
    },
}

/// Decides what the next step computes, and keeps all books.
pub struct Scheduler {
    config: Config,
    keys: Keys,
    pool: PagePool,
    waiting: BTreeMap<Rank, Sequence<Waiting>>,
    /// In order of rank.
    running: Vec<Sequence<Running>>,
    ranks: HashMap<SeqId, Rank>,
    /// Of all that have not started, those that hold pages too.
    deadlines: BTreeMap<(Duration, Rank), SeqId>,
    arrivals: u64,
    now: Duration,
    draining: bool,
    /// Rows of the plan in flight; zero when there is none.
    in_flight: usize,
    /// Groups of sequences that run apart from all others, the last one next: a step with them failed.
    suspects: Vec<Vec<SeqId>>,
    /// The sequence for which there was no room, and the pool's count of changes at that time.
    blocked: Option<(Rank, u64)>,
    /// Adapters that are under way to where they are computed with.
    coming: Vec<AdapterGeneration>,
    scratch: Scratch,
}

/// Memory that is used again from plan to plan.
#[derive(Default)]
struct Scratch {
    pages: Vec<PageAddr>,
    hits: Vec<Hit>,
    /// Running prefills: remaining token-layers and place in `running`.
    prefills: Vec<(u64, usize)>,
}

/// How an attempt to admit came out.
enum Admission {
    Started,
    /// It waits for a page that is being computed, or for its adapter; others may pass.
    Parked,
    NoRoom,
    Failed,
}

impl Scheduler {
    /// # Errors
    /// When a step could not give every sequence its share, or page sizes contradict each other.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let zeroes = [
            ("max_num_seqs", config.max_num_seqs as u64),
            ("max_queued_requests", config.max_queued_requests as u64),
            ("layers", config.layers.into()),
            ("max_model_len", config.max_model_len.into()),
            ("the number of cache profiles", config.profiles.len() as u64),
        ];
        if let Some((name, _)) = zeroes.iter().find(|(_, n)| *n == 0) {
            return Err(ConfigError::Zero(name));
        }
        let least = (config.max_num_seqs - 1).saturating_add(PAGE_TOKENS as usize);
        if (config.max_num_batched_tokens as usize) < least {
            return Err(ConfigError::StepTooSmall { tokens: config.max_num_batched_tokens, seqs: config.max_num_seqs, least });
        }
        if config.profiles.len() > 255 {
            return Err(ConfigError::Profiles(config.profiles.len()));
        }
        if config.arena_bytes / PageAddr::UNIT > u64::from(u32::MAX) {
            return Err(ConfigError::Arena(config.arena_bytes));
        }
        for (profile, sizes) in config.profiles.iter().enumerate() {
            if let Some(fault) = sizes.fault() {
                return Err(ConfigError::Profile { profile, fault });
            }
        }
        let sizes: Vec<_> = config.profiles.iter().map(|p| p.sizes).collect();
        Ok(Scheduler {
            keys: Keys::new(config.hash_secret),
            pool: PagePool::new(config.arena_bytes, &sizes),
            waiting: BTreeMap::new(),
            running: Vec::new(),
            ranks: HashMap::new(),
            deadlines: BTreeMap::new(),
            arrivals: 0,
            now: Duration::ZERO,
            draining: false,
            in_flight: 0,
            suspects: Vec::new(),
            blocked: None,
            coming: Vec::new(),
            scratch: Scratch::default(),
            config,
        })
    }

    /// Takes a request into the queue. It waits since `arrived`, which may be earlier than times already told: it lay somewhere until it
    /// could be enqueued.
    ///
    /// # Errors
    /// When it can never run (`TooLarge`, `TooLong`, `Malformed`), or none are taken any more. Whether it may wait is for [`Queue`] to say.
    ///
    /// # Panics
    /// When `seq` was used before and is not over.
    pub fn enqueue(&mut self, seq: SeqId, request: GenerateRequest, arrived: Duration) -> Result<(), Refused> {
        self.now = self.now.max(arrived);
        if self.draining {
            return Err(Refused::Draining);
        }
        let Some(profile) = self.config.profiles.get(usize::from(request.profile.0)) else {
            return Err(Refused::Malformed("no such cache profile"));
        };
        if request.prompt.is_empty() || request.max_new_tokens == 0 {
            return Err(Refused::Malformed("no tokens to read or to write"));
        }
        let tokens = request.prompt.len() as u64 + u64::from(request.max_new_tokens);
        if tokens > u64::from(self.config.max_model_len) {
            return Err(Refused::TooLong { tokens, max_model_len: self.config.max_model_len });
        }
        let prompt = request.prompt.len() as u32;
        fit::alone(&self.pool, request.profile, profile, prompt, request.max_new_tokens)
            .map_err(|(need, have)| Refused::TooLarge { need, have })?;
        let rank = (request.priority, self.arrivals);
        assert!(self.ranks.insert(seq, rank).is_none(), "{seq:?} is used twice");
        self.arrivals += 1;
        let identity =
            CacheIdentity { model: self.config.model_digest, adapter: request.adapter, profile: request.profile, salt: request.cache_salt };
        let root = self.keys.root(&identity);
        let sequence = Sequence::new(seq, rank, request, root, arrived);
        self.deadlines.extend(sequence.deadline().map(|deadline| (deadline, seq)));
        self.waiting.insert(rank, sequence);
        Ok(())
    }

    /// Ends a sequence without a word. Total: unknown and finished ones are `None`. The pages of one that is part of a
    /// step in flight are released when that step is settled.
    pub fn cancel(&mut self, seq: SeqId) -> Option<Ended> {
        let rank = *self.ranks.get(&seq)?;
        if let Some(waiting) = self.waiting.remove(&rank) {
            self.forget(seq, waiting.deadline());
            return Some(waiting.end());
        }
        let at = self.place(rank).expect("a sequence that does not wait runs");
        if self.in_flight == 0 {
            return Some(self.remove(at, Trust::All));
        }
        let sequence = &mut self.running[at];
        sequence.state.ended = true;
        let (deadline, ended) =
            (sequence.deadline(), sequence.ended_so_far(&self.config.profiles[usize::from(sequence.request.profile.0)]));
        self.forget(seq, deadline);
        Some(ended)
    }

    /// Takes no more requests. Running and queued ones go on.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Ends every sequence that is left, with `failure`.
    pub fn end_all(&mut self, failure: Failure, out: &mut Vec<Outcome>) {
        let waiting = self.waiting.values().map(|s| (s.rank, s.id));
        let running = self.running.iter().filter(|s| !s.state.ended).map(|s| (s.rank, s.id));
        let mut all: Vec<(Rank, SeqId)> = waiting.chain(running).collect();
        all.sort_unstable();
        for (_, seq) in all {
            let ended = self.cancel(seq).expect("listed just now");
            out.push(Outcome::Failed { seq, failure: failure.clone(), ended });
        }
    }

    /// When [`Scheduler::expire`] next has something to do.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first_key_value().map(|((at, _), _)| *at)
    }

    /// Ends sequences that waited too long to start.
    pub fn expire(&mut self, now: Duration, out: &mut Vec<Outcome>) {
        self.now = self.now.max(now);
        while let Some((_, &seq)) = self.deadlines.first_key_value().filter(|((at, _), _)| *at <= self.now) {
            let ended = self.cancel(seq).expect("what has a deadline lives");
            out.push(Outcome::Failed { seq, failure: Failure::QueueTimeout, ended });
        }
    }

    /// Which adapters are under way to where they are computed with. None of the sequences that wear them starts in a plan until they are
    /// no longer named here; others pass, as they do where a page is waited for.
    pub fn await_adapters(&mut self, coming: impl IntoIterator<Item = AdapterGeneration>) {
        self.coming.clear();
        self.coming.extend(coming);
    }

    /// Decides the next step. An empty plan means that nothing can run until a request or an adapter arrives; any other must be settled
    /// by [`Scheduler::commit`] or [`Scheduler::step_failed`] before the next one.
    ///
    /// # Panics
    /// When a plan is in flight.
    pub fn plan(&mut self, now: Duration, plan: &mut StepPlan, out: &mut Vec<Outcome>) {
        assert!(self.in_flight == 0, "the plan before this one is still in flight");
        self.now = self.now.max(now);
        loop {
            plan.clear();
            self.plan_rows(plan, out);
            // A group of suspects that all ended has nothing to run.
            if !plan.rows.is_empty() || self.suspects.pop().is_none() {
                break;
            }
        }
        self.in_flight = plan.rows.len();
    }

    /// Settles the plan in flight: sequences advance, tokens are decided on, pages change hands.
    ///
    /// A result that does not suit its row fails that sequence; results that do not suit the plan fail the step.
    pub fn commit(&mut self, plan: &StepPlan, results: &[RowResult], now: Duration, out: &mut Vec<Outcome>) {
        if results.len() != plan.rows.len() {
            let failure = Failure::Internal(format!("{} results for {} rows", results.len(), plan.rows.len()));
            return self.step_failed(plan, failure, now, out);
        }
        self.land(plan, now);
        self.suspects.pop();
        for (i, (row, result)) in plan.rows.iter().zip(results).enumerate() {
            // A sequence may have ended: cancelled in flight, or by an earlier row of this step.
            let Some(at) = self.ranks.get(&row.seq).and_then(|&rank| self.place(rank)) else { continue };
            let token = match (result, row.logits) {
                (RowResult::Nothing, Logits::None) => None,
                (RowResult::Nothing, Logits::All) if row.positions.end < self.running[at].state.target => None,
                (RowResult::Token(id), Logits::Last) => Some(*id),
                (RowResult::Token(id), Logits::All) if row.positions.end == self.running[at].state.target => Some(*id),
                (RowResult::Failed(failure), _) => {
                    self.fail(at, failure.clone(), out);
                    continue;
                }
                _ => {
                    self.fail(at, Failure::Internal(format!("row {i} of the step returned {result:?} for {:?}", row.logits)), out);
                    continue;
                }
            };
            let (compressed, layers) = (self.profile(at).compressed, self.config.layers);
            let sequence = &mut self.running[at];
            sequence.advance(row, compressed, layers, &mut self.pool);
            if self.config.prefix_caching {
                sequence.offer_pages(compressed, &self.keys, &mut self.pool);
            }
            if let Some(id) = token {
                self.accept(at, i, id, out);
            }
        }
    }

    /// Settles the plan in flight when nothing of it can be trusted: the step panicked, or its backend failed.
    ///
    /// A sequence that was alone in the step ends with `failure`. Otherwise all go on, but apart from the others and in
    /// halves, until those that fail are found: one bad request costs a few repeated steps and nobody else's stream.
    pub fn step_failed(&mut self, plan: &StepPlan, failure: Failure, now: Duration, out: &mut Vec<Outcome>) {
        self.land(plan, now);
        self.suspects.pop();
        let mut group: Vec<SeqId> = Vec::new();
        for row in &plan.rows {
            if let Some(at) = self.ranks.get(&row.seq).and_then(|&rank| self.place(rank)) {
                let compressed = self.profile(at).compressed;
                self.running[at].rewind(compressed);
                if group.last() != Some(&row.seq) {
                    group.push(row.seq);
                }
            }
        }
        let was_alone = plan.rows.iter().all(|row| row.seq == plan.rows[0].seq);
        if let (true, &[one]) = (was_alone, &group[..]) {
            let at = self.place(self.ranks[&one]).expect("placed just now");
            self.fail(at, failure, out);
            return;
        }
        let rest = group.split_off(group.len().div_ceil(2));
        self.suspects.extend([rest, group].into_iter().filter(|half| !half.is_empty()));
    }

    /// Whether there is nothing to run and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What gauges show.
    pub fn snapshot(&self) -> Snapshot {
        let (bytes, (used_bytes, usable_bytes)) = (self.pool.bytes(), self.pool.in_use());
        let mut branches = Vec::new();
        for (i, profile) in self.config.profiles.iter().enumerate() {
            let index = i as u8;
            let held = |kind| self.pool.held_bytes(Tag { profile: ProfileIndex(index), kind });
            branches.push((index, Branch::Window, held(Kind::Exact)));
            if !profile.compressed {
                continue;
            }
            let sealed_pages = held(Kind::Sealed) / profile.sizes.sealed;
            branches.push((index, Branch::Sinks, held(Kind::Sinks)));
            branches.push((index, Branch::SealedKeys, sealed_pages * profile.split.keys));
            branches.push((index, Branch::SealedValues, sealed_pages * profile.split.values));
            branches.push((index, Branch::Metadata, sealed_pages * profile.split.metadata));
            branches.push((index, Branch::Workspace, held(Kind::Workspace)));
        }
        let running = self.running.iter().filter(|s| s.times.started.is_some()).count();
        Snapshot {
            running,
            waiting: self.running.len() - running + self.waiting.len(),
            arena_bytes: bytes.free + bytes.held + bytes.cached + bytes.lost,
            free_bytes: bytes.free,
            cached_bytes: bytes.cached,
            used_bytes,
            usable_bytes,
            branches,
            device_adapters: Vec::new(),
        }
    }

    /// The pages, to look at.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// What [`Scheduler::new`] was given.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn profile(&self, at: usize) -> &ProfileSizes {
        &self.config.profiles[usize::from(self.running[at].request.profile.0)]
    }

    /// Place of a running sequence.
    fn place(&self, rank: Rank) -> Option<usize> {
        self.running.binary_search_by_key(&rank, |s| s.rank).ok()
    }

    /// Strikes a sequence that is over off the books.
    fn forget(&mut self, seq: SeqId, deadline: Option<(Duration, Rank)>) {
        self.ranks.remove(&seq);
        if let Some(deadline) = deadline {
            self.deadlines.remove(&deadline);
        }
    }

    /// Ends a running sequence; the caller says so.
    fn remove(&mut self, at: usize, trust: Trust) -> Ended {
        let sequence = self.running.remove(at);
        self.forget(sequence.id, sequence.deadline());
        let profile = &self.config.profiles[usize::from(sequence.request.profile.0)];
        sequence.end(&mut self.pool, profile, trust)
    }

    fn fail(&mut self, at: usize, failure: Failure, out: &mut Vec<Outcome>) {
        let seq = self.running[at].id;
        // Others may have offered what it read, and left before anybody saw what that leads to.
        let trust = if failure == Failure::Numerical { Trust::Nothing } else { Trust::Read };
        let ended = self.remove(at, trust);
        out.push(Outcome::Failed { seq, failure, ended });
    }

    /// The step in flight is over: what ended meanwhile gives its pages back.
    fn land(&mut self, plan: &StepPlan, now: Duration) {
        assert!(self.in_flight == plan.rows.len(), "this is not the plan in flight");
        self.now = self.now.max(now);
        self.in_flight = 0;
        while let Some(at) = self.running.iter().position(|s| s.state.ended) {
            self.remove(at, Trust::All);
        }
    }

    /// Adds a sampled token to its sequence and decides whether it was the last.
    fn accept(&mut self, at: usize, row: usize, id: TokenId, out: &mut Vec<Outcome>) {
        let sequence = &mut self.running[at];
        let seq = sequence.id;
        let stops =
            sequence.generated.len() as u32 >= sequence.request.min_new_tokens && sequence.request.stop_tokens.binary_search(&id).is_ok();
        sequence.generated.push(id);
        sequence.times.first_token.get_or_insert(self.now);
        sequence.times.last_token = Some(self.now);
        let full = sequence.generated.len() as u32 == sequence.request.max_new_tokens;
        out.push(Outcome::Token { seq, row, id });
        if stops || full {
            let reason = if stops { FinishReason::Stop } else { FinishReason::Length };
            let ended = self.remove(at, Trust::All);
            out.push(Outcome::Done { seq, reason, ended });
        }
    }

    /// Whether a sequence takes part in the next step.
    fn takes_part(&self, at: usize) -> bool {
        self.suspects.last().is_none_or(|group| group.contains(&self.running[at].id))
    }

    fn plan_rows(&mut self, plan: &mut StepPlan, out: &mut Vec<Outcome>) {
        // One that holds pages but has not started, and whose adapter was dropped meanwhile and is under way again.
        while let Some(at) = self.running.iter().position(|s| s.times.started.is_none() && self.coming.contains(&s.request.adapter)) {
            self.give_back(at, out);
        }
        let taken = self.grow_decodes(out);
        let layers = u64::from(self.config.layers);
        let decodes = (0..self.running.len()).filter(|&at| self.running[at].is_decoding() && self.takes_part(at));
        let mut spare = self.config.max_num_batched_tokens - decodes.clone().count() as u32;
        for at in decodes {
            spare -= self.running[at].decode_row(self.profile(at), self.config.layers, 1 + spare, plan) - 1;
        }
        let spare = u64::from(spare) * layers;
        if (!taken || self.running.is_empty()) && self.suspects.is_empty() {
            self.admit(out);
        }
        let prefills = plan.rows.len();
        self.plan_prefills(spare, plan);
        for row in &plan.rows[prefills..] {
            self.begin(row.seq, out);
        }
    }

    /// The first row of a sequence is planned, if it is its first.
    fn begin(&mut self, seq: SeqId, out: &mut Vec<Outcome>) {
        let at = self.place(self.ranks[&seq]).expect("only who runs has rows");
        let sequence = &mut self.running[at];
        let Some(deadline) = sequence.deadline() else { return };
        self.deadlines.remove(&deadline);
        sequence.begin(self.now);
        out.push(Outcome::Started {
            seq,
            queued: self.now.saturating_sub(sequence.times.arrived),
            looked_up: self.config.prefix_caching && !sequence.wants_prompt_logits(),
            cached_tokens: sequence.cached_tokens,
            prompt_tokens: sequence.prompt_len(),
        });
    }

    /// Leases what the next token of every decoding sequence needs, first in rank first. Says whether somebody gave pages back for that.
    fn grow_decodes(&mut self, out: &mut Vec<Outcome>) -> bool {
        let mut taken = false;
        let mut at = 0;
        while at < self.running.len() {
            if !self.running[at].is_decoding() || !self.takes_part(at) || self.grow(at) {
                at += 1;
                continue;
            }
            let victim = self.victim();
            let alone = self.running.len() == 1;
            if alone && self.running[victim].compact {
                // `enqueue` was promised otherwise; rather one sequence without an end than a server without one.
                let seq = self.running[victim].id;
                let ended = self.remove(victim, Trust::All);
                out.push(Outcome::Failed { seq, failure: Failure::OutOfPages, ended });
            } else {
                self.running[victim].compact |= alone;
                self.give_back(victim, out);
            }
            taken = true;
            // Whoever stands at `at` now, the same or the one after it, has its turn.
            at -= usize::from(victim < at);
        }
        taken
    }

    /// Has a running sequence wait again. One that loses nothing is not preempted, and nobody hears of it.
    fn give_back(&mut self, at: usize, out: &mut Vec<Outcome>) {
        let sequence = self.running.remove(at);
        if !sequence.is_untouched() {
            out.push(Outcome::Preempted { seq: sequence.id });
        }
        self.waiting.insert(sequence.rank, sequence.preempt(&mut self.pool));
    }

    /// Leases the pages of one more position, unless they are there.
    fn grow(&mut self, at: usize) -> bool {
        let profile = *self.profile(at);
        let Scheduler { running, pool, scratch, .. } = self;
        let sequence = &mut running[at];
        let need = sequence.growth(&profile);
        if need.is_zero() {
            return true;
        }
        scratch.pages.clear();
        if !pool.lease(&need.of(sequence.request.profile), &mut scratch.pages) {
            return false;
        }
        let (exact, rest) = scratch.pages.split_at(need.exact as usize);
        sequence.state.exact.extend_from_slice(exact);
        if let [page, sinks @ ..] = rest {
            sequence.state.sealing = Some(Hit { page: *page, sinks: sinks.first().copied() });
        }
        true
    }

    /// Who gives back its pages: one that loses nothing, or one that is not shielded, the last in rank of those.
    fn victim(&self) -> usize {
        let score = |at: usize| {
            let sequence = &self.running[at];
            (sequence.is_untouched(), sequence.preemptions < SHIELD, sequence.rank)
        };
        (0..self.running.len()).max_by_key(|&at| score(at)).expect("somebody failed to grow")
    }

    /// Starts waiting sequences while there is room. Those that run and have computed nothing make room for one that is before them.
    fn admit(&mut self, out: &mut Vec<Outcome>) {
        let mut after = Bound::Unbounded;
        while !self.running.iter().any(|s| s.compact) {
            let Some((&rank, _)) = self.waiting.range((after, Bound::Unbounded)).next() else { break };
            let makes_room = self.running.iter().rposition(|s| s.rank > rank && s.is_untouched());
            let full = self.running.len() == self.config.max_num_seqs;
            let admission = if full && makes_room.is_none() { Admission::NoRoom } else { self.try_start(rank, out) };
            match admission {
                Admission::Started | Admission::Failed => {}
                Admission::Parked => after = Bound::Excluded(rank),
                Admission::NoRoom => match makes_room {
                    Some(at) => self.give_back(at, out),
                    None => break,
                },
            }
        }
    }

    fn try_start(&mut self, rank: Rank, out: &mut Vec<Outcome>) -> Admission {
        if self.coming.contains(&self.waiting[&rank].request.adapter) {
            return Admission::Parked;
        }
        if self.blocked == Some((rank, self.pool.changes())) && !self.running.is_empty() {
            return Admission::NoRoom;
        }
        let parked = self.waiting[&rank].state.parked;
        if parked.is_some_and(|lack| self.place(lack.runner).is_some_and(|at| self.is_sooner(at, rank, lack))) {
            return Admission::Parked;
        }
        // Out of the map while it is looked at; the key of a map entry cannot be borrowed with the rest of `self`.
        let mut sequence = self.waiting.remove(&rank).expect("the caller found it there");
        let profile = self.config.profiles[usize::from(sequence.request.profile.0)];
        self.scratch.hits.clear();
        if sequence.compact && self.running.is_empty() {
            self.pool.forget_all();
        }
        let looks_up = self.config.prefix_caching && !sequence.compact && !sequence.wants_prompt_logits();
        if looks_up {
            let mut usable = profile.reusable_pages(sequence.prefill_target(profile.compressed));
            if profile.compressed && sequence.times.started.is_some() {
                // What it read compressed the first time, and nothing else, or it would go on differently.
                usable = usable.min(sequence.cached_tokens / PAGE_TOKENS);
            }
            for page in 0..usable {
                let (key, tokens) = sequence.page(page, &self.keys);
                match self.pool.find(&key, &tokens) {
                    Some(hit) => self.scratch.hits.push(hit),
                    None => {
                        let alone = sequence.prefill_target(profile.compressed) - page * PAGE_TOKENS;
                        let alone = u64::from(alone) * u64::from(self.config.layers);
                        for at in 0..self.running.len() {
                            let lack = Lack { runner: self.running[at].rank, page, alone };
                            let Scheduler { running, config, keys, .. } = self;
                            if running[at].will_offer(&sequence, page, &config.profiles, keys) && self.is_sooner(at, rank, lack) {
                                sequence.state.parked = Some(lack);
                                self.waiting.insert(rank, sequence);
                                return Admission::Parked;
                            }
                        }
                        break;
                    }
                }
            }
        }
        let places = if sequence.compact { 1 } else { self.config.max_num_seqs };
        let has_place = self.running.len() < places;
        let leased = (has_place && self.lease_prompt(&sequence, &profile)) || {
            // Shared pages may be scattered so that no slab is left for a kind of page; without them all are.
            self.running.is_empty() && !self.scratch.hits.is_empty() && {
                self.scratch.hits.clear();
                self.lease_prompt(&sequence, &profile)
            }
        };
        if !leased && self.running.is_empty() {
            self.forget(sequence.id, sequence.deadline());
            out.push(Outcome::Failed { seq: sequence.id, failure: Failure::OutOfPages, ended: sequence.end() });
            return Admission::Failed;
        }
        if !leased {
            self.blocked = Some((rank, self.pool.changes()));
            self.waiting.insert(rank, sequence);
            return Admission::NoRoom;
        }
        let need = profile.prefill_need(sequence.prefill_target(profile.compressed), self.scratch.hits.len() as u32 * PAGE_TOKENS);
        let pages = Start { hits: &self.scratch.hits, leased: &self.scratch.pages, need };
        let sequence = sequence.start(pages, profile.compressed);
        let at = self.running.partition_point(|s| s.rank < rank);
        self.running.insert(at, sequence);
        Admission::Started
    }

    /// Holds the pages in `scratch.hits` and leases the others that the prompt needs into `scratch.pages`, or does nothing.
    fn lease_prompt(&mut self, sequence: &Sequence<Waiting>, profile: &ProfileSizes) -> bool {
        let Scheduler { pool, scratch, .. } = self;
        // Held first, or the lease might evict them.
        scratch.hits.iter().flat_map(|hit| hit.pages()).for_each(|page| pool.retain(page));
        let need = profile.prefill_need(sequence.prefill_target(profile.compressed), scratch.hits.len() as u32 * PAGE_TOKENS);
        scratch.pages.clear();
        let leased = pool.lease(&need.of(sequence.request.profile), &mut scratch.pages);
        if !leased {
            for hit in scratch.hits.iter().rev() {
                hit.sinks.into_iter().chain([hit.page]).for_each(|page| pool.release(page));
            }
        }
        leased
    }

    /// Whether the prefill at `at` is still to offer what one of that rank lacks, and before it would have computed that itself. One behind
    /// it in rank may never come to it: others may always be between.
    fn is_sooner(&self, at: usize, rank: Rank, Lack { page, alone, .. }: Lack) -> bool {
        let (runner, layers) = (&self.running[at], self.config.layers);
        let left = |at: usize| self.running[at].remaining(self.profile(at).compressed, layers);
        let mut prefills = (0..self.running.len()).filter(|&at| !self.running[at].is_decoding()).map(|at| (at, left(at)));
        let Some((first, most)) = prefills.next().filter(|_| runner.is_computing(page, self.profile(at)) && runner.rank < rank) else {
            return false;
        };
        let until = runner.until_offered(page, self.profile(at).compressed, layers);
        // Beside the first only those have a share that have less left, fewest first.
        let before = |mine: u64| {
            let shorter = prefills.clone().filter(|&(other, left)| other != at && left < mine);
            shorter.map(|(_, left)| left).sum::<u64>() + if mine < most { 0 } else { most }
        };
        if at == first { until <= alone } else { before(left(at)) + until <= before(alone) + alone }
    }

    /// Divides `spare` token-layers among running prefills.
    fn plan_prefills(&mut self, mut spare: u64, plan: &mut StepPlan) {
        let mut prefills = std::mem::take(&mut self.scratch.prefills);
        prefills.clear();
        let layers = self.config.layers;
        for at in 0..self.running.len() {
            if !self.running[at].is_decoding() && self.takes_part(at) {
                prefills.push((self.running[at].remaining(self.profile(at).compressed, layers), at));
            }
        }
        if let Some((&mut (most, first), others)) = prefills.split_first_mut() {
            others.sort_unstable();
            let shorter = others.partition_point(|(left, _)| *left < most);
            let costs = |at: usize, budget: u64| self.running[at].quanta(self.profile(at).compressed, layers, budget, |_| {});
            let emit = |at: usize, budget: u64, plan: &mut StepPlan| {
                let (sequence, profile) = (&self.running[at], self.profile(at));
                sequence.quanta(profile.compressed, layers, budget, |quantum| sequence.prefill_row(profile, layers, quantum, plan))
            };
            let page = u64::from(PAGE_TOKENS) * u64::from(layers);
            let half = (spare / 2).next_multiple_of(page).min(spare);
            // What shorter ones cannot use goes to the first as well, in the same rows; so their share is found out first. Ones that are no
            // shorter get what is left: sooner they would only delay the first, and be done no earlier themselves.
            let mut rest = spare - costs(first, half);
            for (_, at) in &others[..shorter] {
                rest -= costs(*at, rest);
            }
            let used_by_others = spare - costs(first, half) - rest;
            spare -= emit(first, spare - used_by_others, plan);
            for (_, at) in others.iter() {
                spare -= emit(*at, spare, plan);
            }
        }
        self.scratch.prefills = prefills;
    }
}
