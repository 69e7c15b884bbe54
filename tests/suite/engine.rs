//! The real engine thread on tiny real models: batching, profiles, layer-by-layer prefill, cancellation, faults.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use strait::calibrate::{self, Moments};
use strait::compress::artifact::Fingerprint;
use strait::engine::thread::{EngineThread, Host, Parts, Runner, start};
use strait::engine::{EngineHandle, SubmitError, TokenStream};
use strait::ids::{AdapterGeneration, ProfileIndex, SeqId, TokenId};
use strait::kv::Arena;
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile};
use strait::model::checkpoint::Checkpoint;
use strait::model::decoder::{Decoder, LogitsSink, Pass, ReadyProfile};
use strait::model::weights::LoadDtype;
use strait::ops::cpu::Cpu;
use strait::ops::{AttendRow, Heads, LayerView, Linear, Ops, RopeTable, SealJob, Update};
use strait::request::{Event, Failure, FinishReason, GenerateRequest, Sampling, TokenLogprob, Usage};
use strait::scheduler::{self, ProfileSizes, RowResult};
use strait::step::StepPlan;
use strait::telemetry;

const POSITIONS: usize = 768;

/// `full`; all directions at 16 bits; a fifth of them; a fifth at 4 bits; all by frequency at 16 bits.
fn profiles() -> Vec<Profile> {
    let cskv = |name: &str, share, bits, sinks| Profile {
        name: name.into(),
        cskv: Some(Cskv::shares((share, share), bits, (64, sinks), BasisKind::Joint)),
    };
    let mut turning = cskv("turning", 1.0, 16, 4);
    turning.cskv.iter_mut().for_each(|c| c.basis = BasisKind::Frequency);
    let full = Profile { name: "full".into(), cskv: None };
    vec![full, cskv("lossless", 1.0, 16, 4), cskv("fifth", 0.2, 16, 4), cskv("fifth-4", 0.2, 4, 0), turning]
}

pub(crate) struct World {
    pub(crate) engine: EngineHandle,
    pub(crate) thread: Option<EngineThread>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.engine.stop();
        let ended = self.thread.take().expect("joined once").join();
        if !std::thread::panicking() {
            assert_eq!(ended.expect("the engine thread ends well"), Ok(()));
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Size {
    budget: u32,
    seqs: usize,
    arena_pages: u64,
    queue: usize,
    positions: usize,
}

pub(crate) const ROOMY: Size = Size { budget: 512, seqs: 16, arena_pages: 200, queue: 64, positions: POSITIONS };

pub(crate) fn world(model: &str, size: Size, ops: impl Fn() -> Box<dyn Ops>) -> World {
    let (engine, thread) = start(parts(model, size, ops)).unwrap();
    World { engine, thread: Some(thread) }
}

/// As [`world`], with room for a few sequences at a time.
pub(crate) fn tight() -> Size {
    Size { arena_pages: 14, ..ROOMY }
}

/// As [`world`], where so many may wait.
pub(crate) fn queue_of(queue: usize) -> Size {
    Size { queue, ..ROOMY }
}

/// As [`world`], with somebody who hears of what happens.
pub(crate) fn watched(model: &str, size: Size, ops: impl Fn() -> Box<dyn Ops>, emit: impl Fn(telemetry::Event) + Send + 'static) -> World {
    let (engine, thread) = start(Parts { emit: Box::new(emit), ..parts(model, size, ops) }).unwrap();
    World { engine, thread: Some(thread) }
}

fn parts(model: &str, size: Size, ops: impl Fn() -> Box<dyn Ops>) -> Parts {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(model);
    let checkpoint: &'static Checkpoint = Box::leak(Box::new(Checkpoint::open(&dir).unwrap()));
    let config = &checkpoint.config;
    let ops = ops();
    let mut decoder = Decoder::new(config, checkpoint.weights(LoadDtype::F32), size.positions, 64);

    let texts: Vec<Vec<TokenId>> = (0..4).map(|i| tokens(300, 100 + i, config.vocab)).collect();
    let mut moments = Moments::new(config, 4);
    calibrate::collect(&mut decoder, &Cpu::new(1), &texts, &mut moments, |_| ()).unwrap();
    let artifact = {
        let sources = calibrate::Sources::closed();
        calibrate::artifact(&moments, config, Fingerprint([0; 32]), &profiles(), &sources, None).unwrap().artifact
    };
    let ready: Vec<ReadyProfile> = profiles()
        .iter()
        .map(|p| ReadyProfile {
            layout: PageLayout::new(config, ExactType::F32, p, None),
            compression: if p.cskv.is_some() { artifact.layers(p).unwrap() } else { vec![] },
        })
        .collect();
    let arena_bytes = ready[0].layout.sizes().exact * size.arena_pages;
    Parts {
        scheduler: scheduler::Config {
            max_num_seqs: size.seqs,
            max_num_batched_tokens: size.budget,
            max_queued_requests: size.queue,
            max_queued_tokens: 1 << 20,
            layers: config.layers as u32,
            max_model_len: size.positions as u32,
            arena_bytes,
            profiles: ready.iter().map(|r| ProfileSizes::of(&r.layout)).collect(),
            prefix_caching: true,
            hash_secret: [7; 32],
            model_digest: [1; 32],
        },
        runner: Runner::Host(Box::new(Host { arena: Arena::new(arena_bytes).unwrap(), decoder, profiles: ready, ops })),
        emit: Box::new(|_| ()),
    }
}

pub(crate) fn cpu() -> Box<dyn Ops> {
    Box::new(Cpu::new(2))
}

pub(crate) fn tokens(n: usize, seed: u64, vocab: usize) -> Vec<TokenId> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % vocab as u64) as TokenId
        })
        .collect()
}

pub(crate) fn request(prompt: &[TokenId], max_new: u32, profile: u8) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.into(),
        max_new_tokens: max_new,
        min_new_tokens: 0,
        stop_tokens: Arc::new([]),
        sampling: Sampling::greedy(),
        logprobs: Some(2),
        prompt_logprobs: None,
        profile: ProfileIndex(profile),
        adapter: AdapterGeneration(0),
        priority: 0,
        cache_salt: 0,
        queue_timeout: Duration::from_secs(60),
    }
}

#[derive(Debug, PartialEq)]
pub(crate) struct Said {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) prompt: Vec<TokenLogprob>,
    pub(crate) end: Result<(FinishReason, Usage), Failure>,
}

/// The next event of a sequence. An end that was lost fails a test here; it would wait for ever.
pub(crate) fn event_of(stream: &mut TokenStream) -> Event {
    const LIMIT: Duration = Duration::from_secs(300);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let event = runtime.block_on(async { tokio::time::timeout(LIMIT, stream.next()).await });
    let event = event.unwrap_or_else(|_| panic!("sequence {} had no event in {LIMIT:?}: its end was lost", stream.seq.0));
    event.expect("the engine says how it ends")
}

pub(crate) fn hear(mut stream: TokenStream) -> Said {
    let (mut tokens, mut logprobs, mut prompt) = (vec![], vec![], vec![]);
    loop {
        match event_of(&mut stream) {
            Event::Prompt { logprobs } => prompt = logprobs,
            Event::Token { id, logprob } => {
                tokens.push(id);
                logprobs.extend(logprob);
            }
            Event::Done { reason, usage } => return Said { tokens, logprobs, prompt, end: Ok((reason, usage)) },
            Event::Failed { failure } => return Said { tokens, logprobs, prompt, end: Err(failure) },
        }
    }
}

pub(crate) fn settled(world: &World) -> Arc<telemetry::Snapshot> {
    let begun = Instant::now();
    loop {
        let s = world.engine.snapshot();
        if s.running + s.waiting == 0 && s.free_bytes + s.cached_bytes > 0 && s.branches.iter().all(|b| b.2 == 0) {
            return s;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "pages never came home: {s:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_sequence_does_not_depend_on_what_else_is_in_the_batch() {
    for model in ["llama3", "qwen3"] {
        let prompts: Vec<Vec<TokenId>> = [1, 5, 63, 64, 65, 130, 300].iter().map(|&n| tokens(n, n as u64, 256)).collect();
        let sampled = |i: usize, profile| GenerateRequest {
            sampling: Sampling {
                temperature: if i.is_multiple_of(2) { 0.0 } else { 0.8 },
                seed: i as u64,
                top_p: 0.9,
                ..Sampling::greedy()
            },
            ..request(&prompts[i], 20, profile)
        };
        // Each alone, with a cold cache, with steps of another size.
        let alone: Vec<Vec<Said>> = (0..5u8)
            .map(|profile| {
                (0..prompts.len())
                    .map(|i| {
                        let world = world(model, Size { budget: 80, ..ROOMY }, cpu);
                        hear(world.engine.submit(sampled(i, profile)).unwrap())
                    })
                    .collect()
            })
            .collect();
        let together = world(model, ROOMY, cpu);
        let streams: Vec<_> = (0..5u8)
            .flat_map(|p| (0..prompts.len()).map(move |i| (p, i)))
            .map(|(p, i)| (p, i, together.engine.submit(sampled(i, p)).unwrap()))
            .collect();
        for (profile, i, stream) in streams {
            let (got, want) = (hear(stream), &alone[profile as usize][i]);
            assert_eq!(got.tokens, want.tokens, "{model}, profile {profile}, prompt {i}");
            assert_eq!(got.logprobs, want.logprobs, "{model}, profile {profile}, prompt {i}: to the bit");
        }
        settled(&together);
    }
}

#[test]
fn prefill_of_a_compressed_cache_is_exact_at_any_length() {
    for budget in [80, 512, 1024] {
        let world = world("llama3", Size { budget, ..ROOMY }, cpu);
        for n in [1, 64, 65, 200, 600] {
            let prompt = tokens(n, 9 + n as u64, 256);
            let first = |profile| hear(world.engine.submit(request(&prompt, 1, profile)).unwrap()).logprobs;
            let full = first(0);
            for profile in 1..4 {
                assert_eq!(first(profile), full, "budget {budget}, {n} tokens, profile {profile}");
            }
        }
    }
}

#[test]
fn all_directions_at_16_bits_are_as_good_as_the_exact_cache() {
    let world = world("llama3", ROOMY, cpu);
    let prompt = tokens(500, 3, 256);
    let said = |profile| hear(world.engine.submit(request(&prompt, 100, profile)).unwrap());
    let (full, lossless, fifth, turning) = (said(0), said(1), said(3), said(4));
    let difference =
        |other: &Said| full.logprobs.iter().zip(&other.logprobs).map(|(a, b)| (a.logprob - b.logprob).abs()).fold(0.0, f32::max);
    assert_eq!(full.tokens, lossless.tokens);
    assert_eq!(full.tokens, turning.tokens);
    assert!(difference(&lossless) < 0.02, "{}", difference(&lossless));
    assert!(difference(&turning) < 0.02, "by frequency: {}", difference(&turning));
    assert!(difference(&fifth) > 0.02, "a fifth of the directions cannot be exact on random weights: is it compressed at all?");
    let (_, usage) = lossless.end.unwrap();
    assert_eq!((usage.cache.sealed_tokens, usage.cache.window_tokens), (512, 599 - 512 + 4));
}

#[test]
fn prompt_log_probabilities_come_through_every_way_of_prefill() {
    let prompt = tokens(300, 5, 256);
    let mut all: Vec<Vec<TokenLogprob>> = vec![];
    for (budget, profile) in [(512, 0), (80, 0), (80, 1), (512, 1)] {
        let world = world("qwen2", Size { budget, ..ROOMY }, cpu);
        let said = hear(world.engine.submit(GenerateRequest { prompt_logprobs: Some(1), ..request(&prompt, 1, profile) }).unwrap());
        assert_eq!(said.prompt.len(), 299);
        all.push(said.prompt);
    }
    assert!(all.iter().all(|p| *p == all[0]));
}

#[test]
fn a_prompt_may_be_scored_without_an_answer() {
    let counted = Arc::new(AtomicU32::new(0));
    let world = watched("qwen2", ROOMY, cpu, {
        let counted = counted.clone();
        move |event| match event {
            telemetry::Event::FirstToken { .. } | telemetry::Event::NextToken { .. } => _ = counted.fetch_add(1, Ordering::Relaxed),
            _ => {}
        }
    });
    let prompt = tokens(100, 5, 256);
    let score = |max| hear(world.engine.submit(GenerateRequest { prompt_logprobs: Some(1), ..request(&prompt, max, 0) }).unwrap());
    let (answered, scored) = (score(1), score(0));
    assert_eq!(scored.prompt, answered.prompt);
    assert_eq!((scored.prompt.len(), scored.tokens.len()), (99, 0));
    let (reason, usage) = scored.end.unwrap();
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 0));
    assert_eq!(counted.load(Ordering::Relaxed), 1, "tokens that were generated for somebody");
}

#[test]
fn an_equal_beginning_is_read_from_the_cache_and_changes_nothing() {
    let world = world("mistral", ROOMY, cpu);
    let prompt = tokens(300, 11, 256);
    let say = || hear(world.engine.submit(request(&prompt, 10, 0)).unwrap());
    let (cold, warm) = (say(), say());
    assert_eq!(cold.tokens, warm.tokens);
    assert_eq!(cold.logprobs, warm.logprobs);
    assert_eq!((cold.end.unwrap().1.cached_tokens, warm.end.unwrap().1.cached_tokens), (0, 256));
}

#[test]
fn a_look_up_is_counted_where_one_is_made() {
    let prompt = tokens(150, 11, 256);
    for (prefix_caching, want) in [(true, vec![(150, 0), (150, 128)]), (false, vec![])] {
        let lookups = Arc::new(Mutex::new(vec![]));
        let into = lookups.clone();
        let mut parts = Parts {
            emit: Box::new(move |event| {
                if let telemetry::Event::PrefixLookup { queried, hit } = event {
                    into.lock().unwrap().push((queried, hit));
                }
            }),
            ..parts("llama2", ROOMY, cpu)
        };
        parts.scheduler.prefix_caching = prefix_caching;
        let (engine, thread) = start(parts).unwrap();
        let world = World { engine, thread: Some(thread) };
        // A prompt that is scored asks nobody, and leaves its pages to those who do.
        for prompt_logprobs in [None, None, Some(0)] {
            hear(world.engine.submit(GenerateRequest { prompt_logprobs, ..request(&prompt, 1, 0) }).unwrap()).end.unwrap();
        }
        assert_eq!(*lookups.lock().unwrap(), want, "prefix caching {prefix_caching}");
    }
}

#[test]
fn preempted_sequences_say_the_same() {
    let prompts: Vec<Vec<TokenId>> = (0..12).map(|i| tokens(100 + i, 40 + i as u64, 256)).collect();
    // Twelve sequences grow to some 9 pages each; few pages force preemption, again and again in an exact cache.
    for (profile, arena_pages) in [(0, 14), (1, 8), (2, 6), (4, 8)] {
        let say = |size| {
            let preemptions = Arc::new(AtomicU32::new(0));
            let counter = preemptions.clone();
            let parts = Parts {
                emit: Box::new(move |event| {
                    if matches!(event, telemetry::Event::Preempted) {
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                }),
                ..parts("llama3", size, cpu)
            };
            let (engine, thread) = start(parts).unwrap();
            let world = World { engine, thread: Some(thread) };
            let streams: Vec<_> = prompts.iter().map(|p| world.engine.submit(request(p, 450, profile)).unwrap()).collect();
            let said: Vec<_> = streams.into_iter().map(hear).map(|said| (said.tokens, said.logprobs)).collect();
            (said, preemptions.load(Ordering::Relaxed))
        };
        let ((cramped, preemptions), (roomy, none)) = (say(Size { arena_pages, ..ROOMY }), say(ROOMY));
        assert!(preemptions > 0 && none == 0, "profile {profile}: {preemptions} and {none} preemptions");
        assert!(cramped == roomy, "profile {profile}: preempted sequences went on differently");
    }
}

/// What others cached of an equal prompt was computed from a compressed beginning; whose prompt was computed from its start meets its own.
#[test]
fn what_was_computed_cold_is_decoded_from_its_own_pages() {
    let prompt = tokens(400, 21, 256);
    let cold = || GenerateRequest { prompt_logprobs: Some(0), ..request(&prompt, 60, 3) };
    let alone = hear(world("llama3", ROOMY, cpu).engine.submit(cold()).unwrap());
    let world = world("llama3", ROOMY, cpu);
    for prompt in [&prompt[..200], &prompt] {
        hear(world.engine.submit(request(prompt, 1, 3)).unwrap()).end.unwrap();
    }
    let said = hear(world.engine.submit(cold()).unwrap());
    assert_eq!(said.end.as_ref().unwrap().1.cached_tokens, 0);
    assert_eq!((said.tokens, said.logprobs), (alone.tokens, alone.logprobs));
}

#[test]
fn a_dropped_stream_gives_its_pages_back() {
    let world = world("llama3", ROOMY, cpu);
    for round in 0..5 {
        let mut streams: Vec<_> =
            (0..8).map(|i| world.engine.submit(request(&tokens(200, 60 + i, 256), 400, (i % 4) as u8)).unwrap()).collect();
        for _ in 0..round {
            event_of(&mut streams[0]);
        }
    }
    let home = settled(&world);
    assert_eq!(home.branches.iter().map(|b| b.2).sum::<u64>(), 0);
}

#[test]
fn a_stream_that_is_finished_early_gets_its_bill() {
    let world = world("llama3", ROOMY, cpu);
    let mut stream = world.engine.submit(request(&tokens(100, 2, 256), 500, 0)).unwrap();
    for _ in 0..3 {
        assert!(matches!(event_of(&mut stream), Event::Token { .. }));
    }
    world.engine.finish(stream.seq);
    let said = hear(stream);
    let (reason, usage) = said.end.unwrap();
    assert_eq!((reason, usage.prompt_tokens), (FinishReason::Stop, 100));
    assert!(usage.completion_tokens >= 3 && usage.completion_tokens < 500 && usage.cache.bytes > 0);
}

#[test]
fn stop_tokens_end_and_minimum_lengths_hold_them_off() {
    let world = world("llama3", ROOMY, cpu);
    let prompt = tokens(50, 8, 256);
    let free = hear(world.engine.submit(request(&prompt, 30, 0)).unwrap()).tokens;
    let stop = free[4];
    let first = free.iter().position(|&t| t == stop).unwrap();
    let with = |min| GenerateRequest { stop_tokens: Arc::new([stop]), min_new_tokens: min, ..request(&prompt, 30, 0) };
    let stopped = hear(world.engine.submit(with(0)).unwrap());
    assert_eq!(stopped.tokens, free[..=first]);
    assert_eq!(stopped.logprobs.len(), first + 1);
    let (reason, usage) = stopped.end.unwrap();
    assert_eq!((reason, usage.completion_tokens as usize), (FinishReason::Stop, first + 1));
    let held = hear(world.engine.submit(with(20)).unwrap()).tokens;
    assert!(held.len() >= 20 && !held[..20].contains(&stop));
}

#[test]
fn what_cannot_fit_and_what_cannot_wait_is_refused_at_the_door() {
    let world = world("llama3", Size { seqs: 1, queue: 2, arena_pages: 8, ..ROOMY }, cpu);
    assert!(matches!(world.engine.submit(request(&tokens(600, 1, 256), 100, 0)), Err(SubmitError::TooLarge { .. })));
    let long = || world.engine.submit(request(&tokens(64, 1, 256), 300, 0));
    let mut kept = vec![];
    let refused = (0..20).find_map(|_| match long() {
        Ok(stream) => {
            kept.push(stream);
            None
        }
        Err(e) => Some(e),
    });
    match refused {
        Some(SubmitError::QueueFull { retry_after, .. }) => assert!(retry_after >= Duration::from_secs(1)),
        other => panic!("{other:?}"),
    }
    world.engine.drain();
    assert!(matches!(long(), Err(SubmitError::Draining)));
}

/// Whoever found the door open when the engine was asked to end: what was sent behind that has an answer, too.
#[test]
fn a_request_that_races_with_the_end_is_told_how_it_ends() {
    const ROUNDS: usize = 3;
    let (mut lost, mut told) = (0, 0);
    for _ in 0..ROUNDS {
        let world = world("llama3", Size { queue: 1 << 20, ..ROOMY }, cpu);
        let ask = || world.engine.submit_all((0..64).map(|i| request(&tokens(20, 1 + i, 256), 500, 0)).collect(), None);
        let streams: Vec<TokenStream> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mut kept = vec![];
                        loop {
                            match ask() {
                                Ok(streams) => kept.extend(streams),
                                Err(SubmitError::Draining | SubmitError::Stopped) => return kept,
                                Err(e) => panic!("{e}"),
                            }
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(2));
            world.engine.stop();
            all.into_iter().flat_map(|asks| asks.join().unwrap()).collect()
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for mut stream in streams {
            let end = runtime.block_on(async {
                loop {
                    match stream.next().await {
                        Some(Event::Failed { failure }) => break Some(failure),
                        Some(Event::Done { .. }) => panic!("500 tokens in no time"),
                        Some(_) => {}
                        None => break None,
                    }
                }
            });
            assert!(end.as_ref().is_none_or(|end| *end == Failure::Draining), "{end:?}");
            *if end.is_some() { &mut told } else { &mut lost } += 1;
        }
    }
    assert!(told > 0, "nobody was on the way");
    assert_eq!(lost, 0, "of {} sequences so many were left without an end", told + lost);
}

#[test]
fn a_request_of_many_sequences_keeps_no_more_events_than_one_of_64() {
    let world = world("llama3", ROOMY, cpu);
    let kept = |n: u64| {
        let streams = world.engine.submit_all((0..n).map(|i| request(&tokens(20, 1 + i, 256), 3, 0)).collect(), None).unwrap();
        let kept = streams.iter().map(|stream| stream.events.max_capacity() - 1).sum::<usize>();
        assert!(streams.into_iter().map(hear).all(|said| said.tokens.len() == 3));
        kept
    };
    assert_eq!([1, 64, 1024].map(kept), [4096, 64 * 4096, 64 * 4096]);
}

#[test]
fn the_sequences_of_a_request_are_queued_all_or_none() {
    let books = Arc::new(Mutex::new(BTreeMap::<String, u32>::new()));
    let world = watched("llama3", Size { seqs: 1, queue: 1, ..ROOMY }, cpu, {
        let books = books.clone();
        move |event| match event {
            telemetry::Event::Accepted { .. } => *books.lock().unwrap().entry("accepted".into()).or_default() += 1,
            telemetry::Event::Finished { reason, .. } => *books.lock().unwrap().entry(reason.into()).or_default() += 1,
            _ => {}
        }
    });
    let all = |n, max| world.engine.submit_all((0..n).map(|i| request(&tokens(20, 1 + i, 256), max, 0)).collect(), None);
    // Nobody waits: they are taken whole, and four of them at least wait behind the first, one request.
    let first = all(5, 500).unwrap();
    for n in [1, 2, 9] {
        assert!(matches!(all(n, 500), Err(SubmitError::QueueFull { queued: 1, .. })), "{n} more");
    }
    drop(first);
    let begun = Instant::now();
    while books.lock().unwrap().get("abort") != Some(&5) {
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", books.lock().unwrap());
        std::thread::sleep(Duration::from_millis(1));
    }
    let said: Vec<Said> = all(6, 3).unwrap().into_iter().map(hear).collect();
    assert!(said.iter().all(|s| s.tokens.len() == 3));
    drop(world);
    let want = BTreeMap::from([("accepted".into(), 11), ("abort".into(), 5), ("length".into(), 6)]);
    assert_eq!(*books.lock().unwrap(), want, "nothing is counted of what was refused");
}

#[test]
fn a_client_that_leaves_too_much_unread_is_told_so_behind_what_it_left() {
    let (ended, end) = mpsc::channel();
    let world = watched("llama2", Size { positions: 4600, ..ROOMY }, cpu, move |event| {
        if let telemetry::Event::Finished { reason, .. } = event {
            ended.send(reason).unwrap();
        }
    });
    let ask = || world.engine.submit(GenerateRequest { logprobs: None, ..request(&tokens(20, 1, 256), 4500, 0) }).unwrap();
    let stream = ask();
    assert_eq!(end.recv_timeout(Duration::from_secs(60)), Ok("abort"));
    let said = hear(stream);
    assert_eq!((said.tokens.len(), said.end), (4096, Err(Failure::Unread)));
    assert_eq!(hear(ask()).tokens.len(), 4500, "who reads is told all");

    // Of a request of many sequences the log has it once. No other test leaves so much unread.
    static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    struct Log;
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            LOG.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(|| Log).try_init().unwrap();
    let one = || GenerateRequest { logprobs: None, ..request(&tokens(20, 1, 256), 4500, 0) };
    assert_eq!(end.recv_timeout(Duration::from_secs(60)), Ok("length"));
    let streams = world.engine.submit_all(vec![one(), one()], None).unwrap();
    assert_eq!([(); 2].map(|()| end.recv_timeout(Duration::from_secs(60))), [Ok("abort"), Ok("abort")]);
    drop(streams);
    let told = String::from_utf8(LOG.lock().unwrap().clone()).unwrap();
    assert_eq!(told.matches("events of a sequence unread").count(), 1, "{told}");
}

/// The CPU's operations; what is to be normed is shown to somebody before.
struct Watched<F>(Cpu, F);

impl<F: Fn(&[f32]) + Send + Sync> Ops for Watched<F> {
    fn describe(&self) -> String {
        "watched".into()
    }
    fn linear(&self, x: &[f32], rows: usize, jobs: &mut [Linear<'_>]) {
        self.0.linear(x, rows, jobs);
    }
    fn low_rank(&self, x: &[f32], updates: &[Update<'_>], targets: &mut [&mut [f32]]) {
        self.0.low_rank(x, updates, targets);
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        (self.1)(x);
        self.0.rms_norm(x, weight, eps, out);
    }
    fn rope(&self, x: &mut [f32], heads: usize, table: &RopeTable, positions: &[u32]) {
        self.0.rope(x, heads, table, positions);
    }
    fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        self.0.silu_mul(gate, up);
    }
    fn attend(&self, arena: &Arena, shape: Heads, table: &RopeTable, rows: &[AttendRow<'_>], q: &[f32], out: &mut [f32]) {
        self.0.attend(arena, shape, table, rows, q, out);
    }
    fn seal(&self, arena: &mut Arena, view: LayerView<'_>, table: &RopeTable, jobs: &[SealJob]) {
        self.0.seal(arena, view, table, jobs);
    }
}

#[test]
fn the_wait_for_the_step_in_flight_is_in_every_time() {
    let gate = Arc::new((Mutex::new(()), AtomicU32::new(0)));
    let (events, heard) = std::sync::mpsc::channel();
    let world = watched(
        "llama3",
        ROOMY,
        || {
            let gate = gate.clone();
            // It is said first, so that who holds the gate knows that a step waits at it.
            let wait = move |_: &[f32]| {
                gate.1.fetch_add(1, Ordering::SeqCst);
                drop(gate.0.lock().unwrap());
            };
            Box::new(Watched(Cpu::new(1), wait))
        },
        move |event| {
            let _ = events.send(event);
        },
    );
    let (norms, wait) = (&gate.1, Duration::from_millis(100));
    let held = gate.0.lock().unwrap();
    let before = norms.load(Ordering::SeqCst);
    let first = world.engine.submit(request(&tokens(20, 1, 256), 1, 0)).unwrap();
    while norms.load(Ordering::SeqCst) == before {
        std::thread::sleep(Duration::from_millis(1));
    }
    // The step is in flight: the engine hears of nothing until it is over.
    let second = world.engine.submit(request(&tokens(20, 2, 256), 1, 0)).unwrap();
    let impatient = world.engine.submit(GenerateRequest { queue_timeout: wait, ..request(&tokens(20, 3, 256), 1, 0) }).unwrap();
    std::thread::sleep(wait);
    drop(held);
    assert!(hear(first).end.is_ok());
    assert!(hear(second).end.unwrap().1.timings.queue >= wait);
    assert_eq!(hear(impatient).end, Err(Failure::QueueTimeout));
    drop(world);
    let (mut queued, mut ttft, mut finished) = (vec![], vec![], vec![]);
    for event in heard {
        match event {
            telemetry::Event::Started { queue_s, .. } => queued.push(queue_s),
            telemetry::Event::FirstToken { ttft_s } => ttft.push(ttft_s),
            telemetry::Event::Finished { reason, e2e_s, prefill_s, .. } => finished.push((reason, e2e_s, prefill_s)),
            _ => {}
        }
    }
    let [(_, _, Some(_)), ("error", waited, None), ("length", e2e, Some(prefill))] = finished[..] else { panic!("{finished:?}") };
    assert!(queued[1] >= wait.as_secs_f64() && ttft[1] >= queued[1] && waited >= wait.as_secs_f64(), "{queued:?} {ttft:?} {waited}");
    assert!(prefill + queued[1] <= e2e + 1e-6, "the queue is no part of the prefill: {prefill} {} {e2e}", queued[1]);
}

/// A step of many tokens may last minutes where a model is large and the machine is not. That is no sign of death.
#[test]
fn an_engine_gives_signs_of_life_within_a_step() {
    let engine = Arc::new(OnceLock::<EngineHandle>::new());
    let ages = Arc::new(Mutex::new(Vec::<(Instant, Duration)>::new()));
    let world = world("llama3", ROOMY, || {
        let (engine, ages) = (engine.clone(), ages.clone());
        let slow = move |_: &[f32]| {
            // Not yet there while bases are computed.
            if let Some(engine) = engine.get() {
                ages.lock().unwrap().push((Instant::now(), engine.heartbeat_age()));
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        Box::new(Watched(Cpu::new(1), slow))
    });
    engine.set(world.engine.clone()).unwrap_or_else(|_| panic!("it is set once"));
    assert!(hear(world.engine.submit(request(&tokens(20, 1, 256), 1, 0)).unwrap()).end.is_ok());
    let ages = std::mem::take(&mut *ages.lock().unwrap());
    let (begun, last, age) = (ages[0].0, ages[ages.len() - 1].0, ages[ages.len() - 1].1);
    assert!(ages.len() > 3, "two norms to a layer, and one more");
    assert!(age + Duration::from_millis(20) <= last - begun, "{age:?} without a sign of life in a step of {:?}", last - begun);
}

#[test]
fn a_request_that_breaks_the_step_ends_alone() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama2");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let weights = checkpoint.weights(LoadDtype::F32);
    let mut mark = vec![0.0; checkpoint.config.hidden];
    weights.embed.row(255, &mut mark);
    let clean = |n, seed| -> Vec<TokenId> { tokens(n, seed, 250) };
    // The mark that one token's embedding carries.
    let mark = mark[0];
    let world =
        world("llama2", ROOMY, move || Box::new(Watched(Cpu::new(1), move |x: &[f32]| assert!(!x.contains(&mark), "the cursed token"))));
    let good: Vec<Vec<TokenId>> = (0..5).map(|i| clean(40 + 30 * i, i as u64 + 1)).collect();
    let bias: Arc<BTreeMap<TokenId, f32>> = Arc::new((250..256.min(checkpoint.config.vocab as u32)).map(|t| (t, -100.0)).collect());
    let ask = |prompt: &[TokenId], p| GenerateRequest {
        sampling: Sampling { logit_bias: bias.clone(), ..Sampling::greedy() },
        ..request(prompt, 10, p)
    };
    let want: Vec<Said> = good.iter().map(|p| hear(world.engine.submit(ask(p, 0)).unwrap())).collect();
    let mut cursed = clean(90, 77);
    cursed[50] = 255;
    let streams: Vec<_> = good.iter().map(|p| world.engine.submit(ask(p, 0)).unwrap()).collect();
    let bad: Vec<_> = (0..2).map(|p| world.engine.submit(ask(&cursed, p)).unwrap()).collect();
    for (stream, want) in streams.into_iter().zip(&want) {
        assert_eq!(hear(stream).tokens, want.tokens);
    }
    for stream in bad {
        assert!(matches!(hear(stream).end, Err(Failure::Internal(_))));
    }
    settled(&world);
}

/// Wants no logits.
struct Deaf;

impl LogitsSink for Deaf {
    fn logits(&mut self, _: usize, _: u32, _: &mut [f32]) {}
}

#[test]
fn a_decode_step_allocates_nothing() {
    for model in ["llama3", "qwen3"] {
        let Parts { scheduler, runner: Runner::Host(host), .. } = parts(model, ROOMY, || Box::new(Cpu::new(1))) else { unreachable!() };
        let Host { mut decoder, mut arena, profiles, ops } = *host;
        let mut scheduler = scheduler::Scheduler::new(scheduler).unwrap();
        for profile in 0..4u8 {
            let request = request(&tokens(60 + usize::from(profile), 7, 256), 400, profile);
            scheduler.enqueue(SeqId(profile.into()), request, Duration::ZERO).unwrap();
        }
        let (mut plan, mut outcomes, mut allocated) = (StepPlan::default(), vec![], vec![]);
        for step in 0..380 {
            scheduler.plan(Duration::ZERO, &mut plan, &mut outcomes);
            assert_eq!(plan.rows.len(), 4, "{model}, step {step}");
            let before = crate::allocations();
            decoder.forward(&mut Pass {
                plan: &plan,
                arena: &mut arena,
                profiles: &profiles,
                adapters: &[],
                ops: &*ops,
                sink: &mut Deaf,
                observer: None,
            });
            allocated.push(crate::allocations() - before);
            scheduler.commit(&plan, &[const { RowResult::Token(1) }; 4], Duration::ZERO, &mut outcomes);
        }
        // Pages are sealed first after some 130 positions; from then on everything has happened once.
        assert!(allocated[0] > 0, "the counter counts");
        let late: Vec<_> = allocated.iter().enumerate().skip(140).filter(|(_, n)| **n > 0).collect();
        assert!(late.is_empty(), "{model}: allocations by step: {late:?}");
    }
}
