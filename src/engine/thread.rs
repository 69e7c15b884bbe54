//! The engine thread: it owns the model, the cache and the scheduler, and does one thing at a time: hear what came in,
//! plan, compute, settle, tell. It never waits for a client, and a fault of one sequence ends that sequence.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::adapters::registry::Lease;
use crate::engine::sampler::Sampler;
use crate::engine::{Engine, EngineHandle, SubmitError, TokenStream};
use crate::ids::{AdapterGeneration, SeqId, TokenId};
use crate::kv::Arena;
use crate::model::adapted::Adapters;
use crate::model::cuda::CudaDecoder;
use crate::model::cuda::adapters::Given;
use crate::model::decoder::{Decoder, LogitsSink, Pass, ReadyProfile};
use crate::model::delta::Delta;
use crate::model::draw::{Answer, Ask, Draw, NotFinite, Occurrences, has_penalties};
use crate::ops::Ops;
use crate::ops::cuda::CudaError;
use crate::request::{Event, Failure, FinishReason, GenerateRequest, TokenLogprob};
use crate::scheduler::{self, Fit, Outcome, Queue, RowResult, Scheduler};
use crate::step::StepPlan;
use crate::telemetry::{self, Snapshot};

/// Events a client may leave unread of one sequence before that is cancelled: it stopped reading.
const UNREAD_EVENTS: usize = 4096;

/// The same of all sequences of a request together, each of which has an equal share: an event may hold some hundred bytes.
const UNREAD_OF_A_REQUEST: usize = 64 * UNREAD_EVENTS;

/// Steps between two full checks of the scheduler's books, at least.
const CHECK_EVERY: u64 = 256;

/// How many times as long as a check took there is none: it takes longer the more pages there are.
const CHECK_SPARES: u32 = 1000;

/// How often gauges are refreshed while the engine is busy.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(100);

/// Everything the engine owns.
pub struct Parts {
    pub runner: Runner,
    pub scheduler: scheduler::Config,
    /// Receives every event worth counting.
    pub emit: Box<dyn Fn(telemetry::Event) + Send>,
}

/// Who carries out plans, with the model and the cache it does so on.
pub enum Runner {
    Host(Box<Host>),
    Cuda(Box<CudaDecoder>),
}

/// The model and its cache in the host's memory.
pub struct Host {
    pub decoder: Decoder<'static>,
    pub arena: Arena,
    pub profiles: Vec<ReadyProfile>,
    pub ops: Box<dyn Ops>,
}

impl Runner {
    /// The cache profiles it serves.
    pub fn profiles(&self) -> &[ReadyProfile] {
        match self {
            Runner::Host(host) => &host.profiles,
            Runner::Cuda(decoder) => decoder.profiles(),
        }
    }

    fn forward(
        &mut self,
        plan: &StepPlan,
        adapters: &[(AdapterGeneration, Arc<Delta>)],
        sink: &mut dyn LogitsSink,
    ) -> Result<(), CudaError> {
        match self {
            Runner::Host(host) => {
                let Host { decoder, arena, profiles, ops } = &mut **host;
                let adapters: &Adapters<'_> = &adapters.iter().map(|(id, delta)| (*id, &**delta)).collect::<Vec<_>>();
                decoder.forward(&mut Pass { plan, arena, profiles, adapters, ops: &**ops, sink, observer: None });
                Ok(())
            }
            Runner::Cuda(decoder) => {
                let given: &Given<'_> = &adapters.iter().map(|(id, delta)| (*id, delta)).collect::<Vec<_>>();
                decoder.forward(plan, given, sink)
            }
        }
    }

    /// Has an adapter brought to a device before a row wears it, if there is room without what is `wanted`.
    fn fetch(&mut self, adapter: (AdapterGeneration, &Arc<Delta>), wanted: impl Fn(AdapterGeneration) -> bool) {
        match self {
            Runner::Host(_) => {}
            Runner::Cuda(decoder) => decoder.fetch(adapter, wanted),
        }
    }

    /// Adapters that are under way to a device.
    fn coming(&mut self) -> Vec<AdapterGeneration> {
        match self {
            Runner::Host(_) => Vec::new(),
            Runner::Cuda(decoder) => decoder.coming().collect(),
        }
    }

    /// Adapters that lie on a device, by generation, and the bytes of each there.
    fn device_adapters(&self) -> Vec<(u64, u64)> {
        match self {
            Runner::Host(_) => Vec::new(),
            Runner::Cuda(decoder) => decoder.adapters().map(|(generation, bytes)| (generation.0, bytes)).collect(),
        }
    }
}

/// The engine's thread, and what it ends with.
pub type EngineThread = std::thread::JoinHandle<Result<(), Broken>>;

/// Why the engine ended before it was asked to. Its clients have been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The device will compute nothing more.
    #[error("its device is lost")]
    DeviceLost,
    /// The books of the cache are wrong: any further token might be another sequence's.
    #[error("its page accounting is broken")]
    Accounting,
}

/// Starts the thread. It runs until [`Engine::stop`], or until it is [`Broken`].
///
/// # Errors
/// When the scheduler refuses its configuration, or no thread can be made.
pub fn start(parts: Parts) -> anyhow::Result<(EngineHandle, EngineThread)> {
    let scheduler = Scheduler::new(parts.scheduler.clone())?;
    let (inbox, messages) = std_mpsc::channel();
    let door = Arc::new(Door {
        inbox: Mutex::new(Some(inbox)),
        fit: Fit::new(&parts.scheduler),
        queue: Mutex::new(Queue::new(&parts.scheduler)),
        draining: AtomicBool::new(false),
        born: Instant::now(),
        beat: AtomicU64::new(IDLE),
        snapshot: RwLock::new(Arc::new(scheduler.snapshot())),
    });
    let mut runner = parts.runner;
    if let Runner::Cuda(decoder) = &mut runner {
        let door = Arc::downgrade(&door);
        decoder.on_arrival(Arc::new(move || {
            if let Some(door) = door.upgrade() {
                door.send(Message::AdapterArrived);
            }
        }));
    }
    let room = Room {
        scheduler,
        runner,
        emit: parts.emit,
        clients: HashMap::new(),
        leaving: Vec::new(),
        sampler: Sampler::default(),
        door: door.clone(),
        outcomes: Vec::new(),
        logprobs: Vec::new(),
        steps: 0,
        check_at: Instant::now(),
        snapshot_at: Instant::now(),
        stalled: true,
        lost: false,
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || room.run(&messages))?;
    Ok((EngineHandle::new(Arc::new(door)), thread))
}

enum Message {
    /// The sequences of one request; their places in the queue are taken. It came to the door at that age of the engine, and waited since
    /// for the step in flight.
    Submit(Duration, Vec<Submitted>),
    /// Nobody listens any more.
    Cancel(SeqId),
    /// The listener has what it wanted (a stop string): end it as finished.
    Finish(SeqId),
    /// Sequences that waited for it may start.
    AdapterArrived,
    Drain,
    Stop,
}

struct Submitted {
    seq: SeqId,
    request: GenerateRequest,
    adapter: Option<Lease>,
    events: mpsc::Sender<Event>,
    /// Whether it was told that the client of this request does not read: once, of all sequences.
    warned: Arc<AtomicBool>,
}

/// The heartbeat of an engine that has nothing to do.
const IDLE: u64 = u64::MAX;

/// The engine as others see it.
struct Door {
    /// `None` once the engine takes nothing more.
    inbox: Mutex<Option<std_mpsc::Sender<Message>>>,
    fit: Fit,
    /// Sequences that were submitted and have not started. Nothing else is locked while this is.
    queue: Mutex<Queue>,
    draining: AtomicBool,
    born: Instant,
    /// Milliseconds since `born` when the current step began, or its current layer on the host, or [`IDLE`].
    beat: AtomicU64,
    snapshot: RwLock<Arc<Snapshot>>,
}

impl Door {
    fn send(&self, message: Message) -> bool {
        self.inbox().as_ref().is_some_and(|inbox| inbox.send(message).is_ok())
    }

    fn inbox(&self) -> MutexGuard<'_, Option<std_mpsc::Sender<Message>>> {
        self.inbox.lock().expect("no holder of the inbox panics")
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no holder of the queue panics")
    }

    /// The engine lives at this age of it.
    fn beat(&self, now: Duration) {
        self.beat.store(now.as_millis() as u64, Ordering::Relaxed);
    }
}

impl Engine for Arc<Door> {
    fn submit_all(&self, requests: Vec<GenerateRequest>, adapter: Option<Lease>) -> Result<Vec<TokenStream>, SubmitError> {
        let leased = adapter.as_ref().map_or(AdapterGeneration::default(), Lease::generation);
        assert!(requests.iter().all(|r| r.adapter == leased), "a request names the adapter it has a lease on");
        if self.draining.load(Ordering::Relaxed) {
            return Err(SubmitError::Draining);
        }
        for request in &requests {
            let fit = self.fit.check(request.profile, request.prompt.len() as u32, request.max_new_tokens.max(1));
            if let Err((need, have)) = fit {
                return Err(SubmitError::TooLarge { need, have });
            }
        }
        let prompts: Vec<usize> = requests.iter().map(|r| r.prompt.len()).collect();
        let arrived = self.born.elapsed();
        let seqs = {
            let mut queue = self.queue();
            let entered = queue.enter(&prompts, arrived);
            entered.map_err(|(queued, limit)| SubmitError::QueueFull { queued, limit, retry_after: queue.retry_after(arrived) })?
        };
        let unread = (UNREAD_OF_A_REQUEST / seqs.len().max(1)).clamp(1, UNREAD_EVENTS);
        let warned = Arc::<AtomicBool>::default();
        let (mut submitted, mut receivers) = (Vec::with_capacity(seqs.len()), Vec::with_capacity(seqs.len()));
        for (&seq, request) in seqs.iter().zip(requests) {
            // And its end, which always has a place.
            let (events, receiver) = mpsc::channel(unread + 1);
            submitted.push(Submitted { seq, request, adapter: adapter.clone(), events, warned: warned.clone() });
            receivers.push(receiver);
        }
        if !self.send(Message::Submit(arrived, submitted)) {
            let mut queue = self.queue();
            seqs.iter().for_each(|&seq| queue.leave(seq));
            return Err(SubmitError::Stopped);
        }
        let stream = |(seq, receiver)| {
            let door = self.clone();
            TokenStream::new(seq, receiver, move || {
                door.send(Message::Cancel(seq));
            })
        };
        Ok(seqs.into_iter().zip(receivers).map(stream).collect())
    }

    fn finish(&self, seq: SeqId) {
        self.send(Message::Finish(seq));
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.read().expect("no holder panics").clone()
    }

    fn heartbeat_age(&self) -> Duration {
        match self.beat.load(Ordering::Relaxed) {
            IDLE => Duration::ZERO,
            beat => self.born.elapsed().saturating_sub(Duration::from_millis(beat)),
        }
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.send(Message::Drain);
    }

    fn stop(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.send(Message::Stop);
    }
}

/// The owner of a sequence, and what the engine must know to choose and report its tokens.
struct Client {
    events: mpsc::Sender<Event>,
    /// As in [`Submitted`].
    warned: Arc<AtomicBool>,
    request: GenerateRequest,
    /// On the adapter it names.
    adapter: Option<Lease>,
    generated: u32,
    /// From its start on, where a penalty needs it: what waits takes no memory for that, however many choices of a long prompt there are.
    occurrences: Option<Occurrences>,
    /// By position minus one, from its start on; complete when the first token comes.
    prompt_logprobs: Vec<Option<TokenLogprob>>,
    /// No token was asked for: only the prompt is scored.
    scoring: bool,
    arrived: Instant,
    /// When its first row was planned.
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// What the thread owns.
struct Room {
    scheduler: Scheduler,
    runner: Runner,
    emit: Box<dyn Fn(telemetry::Event) + Send>,
    clients: HashMap<SeqId, Client>,
    /// Of clients that left since the last step: a plan may still name their adapters.
    leaving: Vec<Lease>,
    sampler: Sampler,
    door: Arc<Door>,
    outcomes: Vec<Outcome>,
    /// Of the rows of the step just computed.
    logprobs: Vec<Option<TokenLogprob>>,
    steps: u64,
    check_at: Instant,
    snapshot_at: Instant,
    /// The latest plan was empty: nothing can run until something comes in, or a deadline passes.
    stalled: bool,
    /// The device will compute nothing more.
    lost: bool,
}

impl Room {
    fn run(mut self, messages: &std_mpsc::Receiver<Message>) -> Result<(), Broken> {
        let mut plan = StepPlan::default();
        let mut results = Vec::new();
        loop {
            if !self.receive(messages) {
                self.end(messages, Failure::Draining);
                return Ok(());
            }
            let now = self.door.born.elapsed();
            self.door.beat(now);
            self.scheduler.expire(now, &mut self.outcomes);
            self.scheduler.await_adapters(self.runner.coming());
            self.scheduler.plan(now, &mut plan, &mut self.outcomes);
            self.deliver(&[]);
            self.stalled = plan.rows.is_empty();
            if self.stalled {
                self.leaving.clear();
                continue;
            }
            self.step(&plan, &mut results);
            self.steps += 1;
            if self.lost {
                tracing::error!("the device is lost; the engine stops");
                self.end(messages, Failure::Internal("the server lost its device".into()));
                return Err(Broken::DeviceLost);
            }
            if self.steps.is_multiple_of(CHECK_EVERY)
                && let Err(broken) = self.check()
            {
                tracing::error!(%broken, "page accounting is broken; the engine stops");
                self.end(messages, Failure::Internal("the server's page accounting failed".into()));
                return Err(Broken::Accounting);
            }
            if self.snapshot_at.elapsed() > SNAPSHOT_EVERY {
                self.publish();
            }
        }
    }

    /// Ends every sequence that is left with `failure`, and takes nothing more.
    fn end(&mut self, messages: &std_mpsc::Receiver<Message>, failure: Failure) {
        self.scheduler.end_all(failure, &mut self.outcomes);
        self.deliver(&[]);
        // Who was on the way in when this was decided is refused, and not left without an answer.
        *self.door.inbox() = None;
        self.scheduler.drain();
        messages.try_iter().filter(|message| !matches!(message, Message::Stop)).for_each(|message| self.hear(message));
        self.publish();
    }

    /// Checks the books, unless that took long and was lately.
    fn check(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        if begun < self.check_at {
            return Ok(());
        }
        let books = self.scheduler.check();
        self.check_at = begun + begun.elapsed() * CHECK_SPARES;
        books
    }

    fn publish(&mut self) {
        let snapshot = Snapshot { device_adapters: self.runner.device_adapters(), ..self.scheduler.snapshot() };
        *self.door.snapshot.write().expect("no holder panics") = Arc::new(snapshot);
        self.snapshot_at = Instant::now();
    }

    /// Takes in all messages; waits for one when there is nothing to compute. `false` when the engine is to end.
    fn receive(&mut self, messages: &std_mpsc::Receiver<Message>) -> bool {
        let mut next = messages.try_recv().map_err(|e| e == std_mpsc::TryRecvError::Disconnected);
        if let Err(gone) = next {
            if gone {
                return false;
            }
            // Nothing came in. With sequences on hand the next plan makes progress; without any, sleep.
            if !self.stalled {
                return true;
            }
            self.door.beat.store(IDLE, Ordering::Relaxed);
            self.publish();
            next = match self.scheduler.next_deadline() {
                None => messages.recv().map_err(|_| true),
                Some(at) => {
                    let left = at.saturating_sub(self.door.born.elapsed());
                    match messages.recv_timeout(left) {
                        Ok(message) => Ok(message),
                        Err(std_mpsc::RecvTimeoutError::Timeout) => return true,
                        Err(std_mpsc::RecvTimeoutError::Disconnected) => Err(true),
                    }
                }
            };
        }
        loop {
            match next {
                Ok(Message::Stop) => return false,
                Ok(message) => self.hear(message),
                Err(gone) => return !gone,
            }
            next = messages.try_recv().map_err(|e| e == std_mpsc::TryRecvError::Disconnected);
        }
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Submit(arrived, sequences) => sequences.into_iter().for_each(|submitted| self.enqueue(arrived, submitted)),
            Message::Cancel(seq) => {
                if let Some(ended) = self.scheduler.cancel(seq) {
                    self.forget(seq, "abort", ended.preemptions);
                }
            }
            Message::Finish(seq) => {
                if let Some(ended) = self.scheduler.cancel(seq) {
                    self.tell(seq, Event::Done { reason: FinishReason::Stop, usage: ended.usage });
                    self.forget(seq, "stop", ended.preemptions);
                }
            }
            Message::AdapterArrived => {}
            Message::Drain => self.scheduler.drain(),
            Message::Stop => unreachable!("handled by receive"),
        }
    }

    fn enqueue(&mut self, arrived: Duration, Submitted { seq, mut request, adapter, events, warned }: Submitted) {
        let (prompt, max_new) = (request.prompt.len(), request.max_new_tokens);
        // A prompt that is only scored runs like one that is answered by a single token, which nobody hears of.
        let scoring = max_new == 0;
        request.max_new_tokens = max_new.max(1);
        let client = Client {
            occurrences: None,
            events,
            warned,
            generated: 0,
            prompt_logprobs: Vec::new(),
            scoring,
            arrived: self.door.born + arrived,
            started: None,
            first_token: None,
            last_token: None,
            request: request.clone(),
            adapter,
        };
        self.clients.insert(seq, client);
        if let Err(refused) = self.scheduler.enqueue(seq, request, arrived) {
            // The door checks all of this before; what gets here raced with a drain.
            let failure = match refused {
                scheduler::Refused::Draining => Failure::Draining,
                other => Failure::Internal(other.to_string()),
            };
            self.tell(seq, Event::Failed { failure });
            self.forget(seq, "error", 0);
        } else {
            self.fetch(seq);
            (self.emit)(telemetry::Event::Accepted { prompt_tokens: prompt as u32, max_new_tokens: max_new });
        }
    }

    /// Has the adapter of a sequence that is to start brought to where it is computed with. What others wear, or wait for, stays there.
    fn fetch(&mut self, seq: SeqId) {
        let Room { runner, clients, .. } = self;
        if let Some(lease) = clients.get(&seq).and_then(|client| client.adapter.as_ref()) {
            let wanted = |other| clients.values().any(|client| client.request.adapter == other);
            runner.fetch((lease.generation(), &lease.delta()), wanted);
        }
    }

    /// What the adapters that a plan names change. Whoever leased them is a client, or just left.
    fn deltas(&self, plan: &StepPlan) -> Vec<(AdapterGeneration, Arc<Delta>)> {
        let mut out: Vec<(AdapterGeneration, Arc<Delta>)> = Vec::new();
        for row in plan.rows.iter().filter(|row| row.adapter != AdapterGeneration::default()) {
            if out.iter().all(|(known, _)| *known != row.adapter) {
                let of_client = self.clients.get(&row.seq).and_then(|c| c.adapter.as_ref());
                let held = of_client.or_else(|| self.leaving.iter().find(|l| l.generation() == row.adapter));
                out.extend(held.map(|l| (l.generation(), l.delta())));
            }
        }
        out
    }

    /// Computes a plan and settles it.
    fn step(&mut self, plan: &StepPlan, results: &mut Vec<RowResult>) {
        let begun = Instant::now();
        results.clear();
        // A cancelled sequence may still be in the step in flight; the scheduler drops its result.
        let gone = || RowResult::Failed(Failure::Internal("cancelled".into()));
        results.extend(plan.rows.iter().map(|row| if self.clients.contains_key(&row.seq) { RowResult::Nothing } else { gone() }));
        let mut logprobs = std::mem::take(&mut self.logprobs);
        logprobs.clear();
        logprobs.resize(plan.rows.len(), None);
        let deltas = self.deltas(plan);
        let computed = catch_unwind(AssertUnwindSafe(|| {
            let (clients, sampler) = (&mut self.clients, &mut self.sampler);
            let mut sink = Choose { plan, clients, sampler, results, logprobs: &mut logprobs, door: &self.door };
            self.runner.forward(plan, &deltas, &mut sink)
        }));
        drop(deltas);
        self.leaving.clear();
        let now = self.door.born.elapsed();
        match computed {
            Ok(Ok(())) => self.scheduler.commit(plan, results, now, &mut self.outcomes),
            Ok(Err(error)) => {
                tracing::error!(rows = plan.rows.len(), %error, "the device failed a step");
                self.lost |= error.is_lost();
                self.scheduler.step_failed(plan, Failure::Internal("the device failed on this request".into()), now, &mut self.outcomes);
            }
            Err(panic) => {
                let what = panic_text(&*panic);
                tracing::error!(rows = plan.rows.len(), %what, "a step panicked");
                self.scheduler.step_failed(plan, Failure::Internal("the model failed on this request".into()), now, &mut self.outcomes);
            }
        }
        let tokens = plan.rows.iter().map(|r| (r.len() * r.layers.len()) as u64).sum::<u64>() / u64::from(self.scheduler.config().layers);
        (self.emit)(telemetry::Event::Step { seconds: begun.elapsed().as_secs_f64(), tokens: tokens as u32 });
        self.deliver(&logprobs);
        self.logprobs = logprobs;
    }

    /// Tells clients and telemetry what happened. `logprobs` are by row of the plan just settled.
    fn deliver(&mut self, logprobs: &[Option<TokenLogprob>]) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        // One time for all that starts in a plan.
        let now = self.door.born.elapsed();
        for outcome in outcomes.drain(..) {
            match outcome {
                Outcome::Started { seq, queued, looked_up, cached_tokens, prompt_tokens } => {
                    self.door.queue().start(seq, now);
                    if let Some(client) = self.clients.get_mut(&seq) {
                        client.start(queued);
                    }
                    (self.emit)(telemetry::Event::Started { queue_s: queued.as_secs_f64(), cached_tokens, prompt_tokens });
                    if looked_up {
                        (self.emit)(telemetry::Event::PrefixLookup { queried: prompt_tokens, hit: cached_tokens });
                    }
                }
                Outcome::Token { seq, row, id } => self.token(seq, id, logprobs.get(row).cloned().flatten()),
                Outcome::Preempted { seq } => {
                    (self.emit)(telemetry::Event::Preempted);
                    tracing::debug!(?seq, "preempted");
                }
                Outcome::Done { seq, mut reason, mut ended } => {
                    if self.clients.get(&seq).is_some_and(|c| c.scoring) {
                        (reason, ended.usage.completion_tokens) = (FinishReason::Length, 0);
                    }
                    self.tell(seq, Event::Done { reason, usage: ended.usage });
                    let label = if reason == FinishReason::Stop { "stop" } else { "length" };
                    self.forget(seq, label, ended.preemptions);
                }
                Outcome::Failed { seq, failure, ended } => {
                    self.tell(seq, Event::Failed { failure });
                    self.forget(seq, "error", ended.preemptions);
                }
            }
        }
        self.outcomes = outcomes;
    }

    fn token(&mut self, seq: SeqId, id: TokenId, logprob: Option<TokenLogprob>) {
        let Some(client) = self.clients.get_mut(&seq) else { return };
        let now = Instant::now();
        client.first_token.get_or_insert(now);
        if client.scoring {
            // Sampled to end it; no token of anybody's, nor on any bill.
            return self.tell_prompt(seq);
        }
        let event = match client.last_token.replace(now) {
            None => telemetry::Event::FirstToken { ttft_s: (now - client.arrived).as_secs_f64() },
            Some(before) => telemetry::Event::NextToken { gap_s: (now - before).as_secs_f64() },
        };
        client.generated += 1;
        if let Some(occurrences) = &mut client.occurrences {
            occurrences.add(id);
        }
        self.tell_prompt(seq);
        (self.emit)(event);
        self.tell(seq, Event::Token { id, logprob });
    }

    /// Hands out the scores of a prompt, once.
    fn tell_prompt(&mut self, seq: SeqId) {
        let Some(client) = self.clients.get_mut(&seq) else { return };
        let prompt: Vec<TokenLogprob> = std::mem::take(&mut client.prompt_logprobs).into_iter().flatten().collect();
        if !prompt.is_empty() {
            self.tell(seq, Event::Prompt { logprobs: prompt });
        }
    }

    /// Hands an event to a client. One that left its channel full but for the last place stopped reading: its sequence is cancelled.
    fn tell(&mut self, seq: SeqId, event: Event) {
        let Some(client) = self.clients.get(&seq) else { return };
        let ends = matches!(event, Event::Done { .. } | Event::Failed { .. });
        let unread = !ends && client.events.capacity() <= 1;
        // A client that has gone is told nothing; its cancellation is under way.
        let _ = client.events.try_send(if unread { Event::Failed { failure: Failure::Unread } } else { event });
        if unread {
            let events = client.events.max_capacity() - 1;
            if !client.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    ?seq,
                    events,
                    "a client left as many events of a sequence unread as are kept for it; its request is cancelled"
                );
            }
            if let Some(ended) = self.scheduler.cancel(seq) {
                self.forget(seq, "abort", ended.preemptions);
            }
        }
    }

    /// Closes the books on a client.
    fn forget(&mut self, seq: SeqId, reason: &'static str, preemptions: u32) {
        let Some(mut client) = self.clients.remove(&seq) else { return };
        self.leaving.extend(client.adapter.take());
        self.door.queue().leave(seq);
        let now = Instant::now();
        let first = client.first_token.unwrap_or(now);
        (self.emit)(telemetry::Event::Finished {
            reason,
            e2e_s: (now - client.arrived).as_secs_f64(),
            prefill_s: client.started.map(|started| (first - started).as_secs_f64()),
            decode_s: (now - first).as_secs_f64(),
            prompt_tokens: client.request.prompt.len() as u32,
            completion_tokens: client.generated,
            preemptions,
        });
    }
}

/// Has a token chosen from each row's last logits, and prompt tokens scored from the others: by the sampler where logits come, or by
/// whom it is asked.
struct Choose<'s> {
    plan: &'s StepPlan,
    clients: &'s mut HashMap<SeqId, Client>,
    sampler: &'s mut Sampler,
    results: &'s mut [RowResult],
    logprobs: &'s mut [Option<TokenLogprob>],
    door: &'s Door,
}

impl Client {
    /// Its first row is planned, so long after it came.
    fn start(&mut self, queued: Duration) {
        let request = &self.request;
        self.started = Some(self.arrived + queued);
        self.occurrences = has_penalties(&request.sampling).then(|| Occurrences::of_prompt(&request.prompt));
        self.prompt_logprobs = if request.prompt_logprobs.is_some() { vec![None; request.prompt.len() - 1] } else { Vec::new() };
    }

    /// What it wants of the logits that follow `position`.
    fn ask(&self, position: u32) -> Ask<'_> {
        let request = &self.request;
        let next = position as usize + 1;
        if next < request.prompt.len()
            && let Some(alternatives) = request.prompt_logprobs
            && (position as usize) < self.prompt_logprobs.len()
        {
            return Ask::Score { token: request.prompt[next], alternatives };
        }
        if next != request.prompt.len() + self.generated as usize {
            return Ask::Nothing;
        }
        Ask::Token(Draw {
            sampling: &request.sampling,
            index: self.generated,
            occurrences: self.occurrences.as_ref(),
            banned: if self.generated < request.min_new_tokens { &request.stop_tokens } else { &[] },
            logprobs: request.logprobs,
        })
    }
}

impl LogitsSink for Choose<'_> {
    fn logits(&mut self, row: usize, position: u32, logits: &mut [f32]) {
        let client = self.clients.get(&self.plan.rows[row].seq);
        let answer = match client.map_or(Ask::Nothing, |c| c.ask(position)) {
            Ask::Token(draw) => self.sampler.sample(logits, &draw).map(|(id, logprob)| Answer::Token { id, logprob }),
            Ask::Score { token, alternatives } => self.sampler.score(logits, token, alternatives).map(Answer::Score),
            Ask::Nothing | Ask::Logits => return,
        };
        self.answer(row, position, answer);
    }

    fn layer_begins(&mut self) {
        self.door.beat(self.door.born.elapsed());
    }

    fn ask(&mut self, row: usize, position: u32) -> Ask<'_> {
        self.clients.get(&self.plan.rows[row].seq).map_or(Ask::Nothing, |c| c.ask(position))
    }

    fn answer(&mut self, row: usize, position: u32, answer: Result<Answer, NotFinite>) {
        let result = &mut self.results[row];
        if matches!(result, RowResult::Failed(_)) {
            return;
        }
        match answer {
            Ok(Answer::Token { id, logprob }) => {
                self.logprobs[row] = logprob;
                *result = RowResult::Token(id);
            }
            Ok(Answer::Score(scored)) => {
                let client = self.clients.get_mut(&self.plan.rows[row].seq);
                if let Some(slot) = client.and_then(|c| c.prompt_logprobs.get_mut(position as usize)) {
                    *slot = Some(scored);
                }
            }
            Err(NotFinite) => *result = RowResult::Failed(Failure::Numerical),
        }
    }
}

/// The message of a panic, for the log.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".into()).chars().take(200).collect()
}
