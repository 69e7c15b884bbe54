//! Who holds which adapter: reading once, eviction, swaps under one name, and what the engine says under leases.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use strait::adapters::base::Spectra;
use strait::adapters::registry::{Happened, Lease, Limits, Load, Registry};
use strait::adapters::{AdapterError, BaseChoice};
use strait::engine::TokenStream;
use strait::ids::AdapterGeneration;
use strait::model::checkpoint::Checkpoint;
use strait::model::delta::HeldAs;
use strait::request::{Event, GenerateRequest};

use crate::adapters::{folder, ready};
use crate::engine::{self, ROOMY, World, hear, world};
use crate::golden;
use crate::http::adapters::{Root, limits, registry};

const SERVED: [&str; 6] = ["all-linear", "pissa", "olora", "sorsa-compact", "dora-embed", "modules-to-save-proj"];

/// What the engine says under an adapter, or without.
fn ask(world: &World, lease: Option<&Lease>, mut request: GenerateRequest) -> TokenStream {
    request.adapter = lease.map_or_else(AdapterGeneration::default, Lease::generation);
    world.engine.submit_with(request, lease.cloned()).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn a_sequence_does_not_depend_on_what_adapters_run_beside_it() {
    let root = Root::new("mixed", &SERVED);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let leases: Vec<Option<Lease>> = SERVED
        .iter()
        .map(|name| {
            registry.load(&Load { alias: (*name).into(), path: (*name).into(), ..Load::default() }).unwrap();
            Some(runtime().block_on(registry.acquire(name)).unwrap())
        })
        .chain([None])
        .collect();
    let prompts: Vec<Vec<u32>> = [3, 40, 64, 70, 110].iter().map(|&n| engine::tokens(n, n as u64, 256)).collect();
    let cases: Vec<(usize, usize, u8)> =
        (0..leases.len()).flat_map(|l| [0, 2, 3].map(|p| (l, (l + usize::from(p)) % prompts.len(), p))).collect();
    let request = |(_, prompt, profile): (usize, usize, u8)| GenerateRequest {
        cache_salt: 1 + prompt as u64,
        ..engine::request(&prompts[prompt], 120, profile)
    };
    let alone = world("llama-linear", ROOMY, engine::cpu);
    let apart: Vec<_> = cases.iter().map(|&case| hear(ask(&alone, leases[case.0].as_ref(), request(case)))).collect();
    assert!(
        apart.iter().all(|said| said.tokens.len() == 120 && said.end.is_ok()),
        "{:?}",
        apart.iter().map(|s| &s.end).collect::<Vec<_>>()
    );
    // Everybody says something else of one prompt, or the adapters do nothing.
    let common: Vec<_> = leases.iter().map(|l| hear(ask(&alone, l.as_ref(), request((0, 2, 0)))).logprobs).collect();
    for (a, b) in (0..leases.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
        assert!(common[a] != common[b], "adapters {a} and {b} say the same");
    }
    // Pages for a few of them at a time: the others wait, and some are preempted and computed again.
    let preempted = Arc::new(AtomicUsize::new(0));
    let counted = preempted.clone();
    let tight = engine::watched("llama-linear", engine::tight(), engine::cpu, move |event| {
        if matches!(event, strait::telemetry::Event::Preempted) {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let streams: Vec<_> = cases.iter().map(|&case| ask(&tight, leases[case.0].as_ref(), request(case))).collect();
    for ((case, stream), want) in cases.iter().zip(streams).zip(&apart) {
        let got = hear(stream);
        assert_eq!((got.tokens, got.logprobs), (want.tokens.clone(), want.logprobs.clone()), "{case:?}");
    }
    assert!(preempted.load(Ordering::Relaxed) > 0, "nobody was preempted");
    drop(leases);
    drop((alone, tight));
    assert_eq!(registry.state().aliases.iter().map(|a| a.leases).sum::<usize>(), 0, "every lease came home");
    registry.check().unwrap();
}

#[test]
fn prefixes_are_shared_within_a_generation_and_never_across() {
    let root = Root::new("prefix", &["all-linear", "olora"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let load = |path: &str| registry.load(&Load { alias: "a".into(), path: path.into(), in_place: true, ..Load::default() }).unwrap();
    let lease = || runtime().block_on(registry.acquire("a")).unwrap();
    let world = world("llama-linear", ROOMY, engine::cpu);
    let prompt = engine::tokens(200, 5, 256);
    let cached = |lease: Option<&Lease>| hear(ask(&world, lease, engine::request(&prompt, 8, 0))).end.unwrap().1.cached_tokens;
    load("all-linear");
    let first = lease();
    assert_eq!((cached(None), cached(Some(&first)), cached(None), cached(Some(&first))), (0, 0, 192, 192));
    // The same name, other content: what vLLM answers from a stale cache.
    load("olora");
    let second = lease();
    assert_ne!(first.generation(), second.generation());
    assert_eq!((cached(Some(&second)), cached(Some(&second))), (0, 192));
    // The same content under any name is the same generation.
    registry.load(&Load { alias: "b".into(), path: "all-linear".into(), ..Load::default() }).unwrap();
    let third = runtime().block_on(registry.acquire("b")).unwrap();
    assert_eq!((third.generation(), cached(Some(&third))), (first.generation(), 192));
}

#[test]
fn a_request_finishes_on_the_generation_it_began_with() {
    let root = Root::new("swap", &["all-linear", "olora"]);
    let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
    let load = |path: &str| registry.load(&Load { alias: "a".into(), path: path.into(), in_place: true, ..Load::default() }).unwrap();
    let lease = || runtime().block_on(registry.acquire("a")).unwrap();
    let world = world("llama-linear", ROOMY, engine::cpu);
    let request = || GenerateRequest { cache_salt: 3, ..engine::request(&engine::tokens(90, 2, 256), 300, 3) };
    load("all-linear");
    let want = hear(ask(&world, Some(&lease()), request()));
    let mut running = ask(&world, Some(&lease()), request());
    assert!(matches!(engine::event_of(&mut running), Event::Token { .. }));
    load("olora");
    let second = lease();
    let gone = registry.unload("a").unwrap();
    assert_eq!((gone.freed_bytes, gone.leases, registry.check()), (0, 2, Ok(())));
    let swapped = hear(ask(&world, Some(&second), request()));
    drop(second);
    let got = hear(running);
    assert_eq!(got.tokens[..], want.tokens[1..], "replaced and unloaded under it, it goes on");
    assert_ne!(swapped.tokens, want.tokens);
    let begun = Instant::now();
    while registry.state().resident_bytes > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "bytes stay: {:?}", registry.state());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn many_first_uses_read_an_adapter_once_and_the_least_used_makes_room() {
    let root = Root::new("tiers", &["all-linear", "olora", "pissa", "sorsa-compact"]);
    let names = ["all-linear", "olora", "pissa", "sorsa-compact"];
    let size = |name: &str| {
        let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
        ready(&base, &folder(name), &BaseChoice::Auto, HeldAs::F32).unwrap().facts.bytes
    };
    let sizes: Vec<u64> = names.iter().map(|n| size(n)).collect();
    // Room for the three largest, less a byte of the fourth.
    let budget = sizes.iter().sum::<u64>() - 1;
    let happened = Arc::new(Mutex::new(Vec::new()));
    let heard = happened.clone();
    let checkpoint: &'static Checkpoint = Box::leak(Box::new(Checkpoint::open(&golden::folder("llama-linear")).unwrap()));
    let registry = Registry::new(
        (checkpoint, HeldAs::F32),
        Spectra::new(None, checkpoint).unwrap(),
        Limits { discover: true, ..limits(Some(&root.0), budget) },
        Box::new(move |what| heard.lock().unwrap().push(what)),
    );
    assert_eq!(registry.discover().unwrap(), (4, vec![]));
    let loads = || happened.lock().unwrap().iter().filter(|h| matches!(h, Happened::Loaded { .. })).count();
    let evictions = || happened.lock().unwrap().iter().filter(|h| matches!(h, Happened::Evicted)).count();
    let runtime = runtime();
    let all = |name: &'static str| {
        let asked: Vec<_> = (0..16)
            .map(|_| {
                let registry = registry.clone();
                runtime.spawn(async move { registry.acquire(name).await.unwrap() })
            })
            .collect();
        asked.into_iter().map(|a| runtime.block_on(a).unwrap()).collect::<Vec<Lease>>()
    };
    for name in &names[..3] {
        assert_eq!(all(name).len(), 16);
    }
    assert_eq!((loads(), evictions()), (3, 0));
    // The first again, so that the second is the least used; the fourth then takes its place.
    drop(all(names[0]));
    let fourth = all(names[3]);
    assert_eq!((loads(), evictions()), (4, 1));
    let resident = |name: &str| registry.alias(name).unwrap().resident;
    assert_eq!(names.map(resident), [true, false, true, true]);
    // What is leased stays, whatever is asked for; with everything leased there is no room.
    let (first, third) = (all(names[0]), all(names[2]));
    let error = runtime.block_on(registry.acquire(names[1])).unwrap_err();
    assert!(matches!(error, AdapterError::Busy { .. }), "{error}");
    registry.check().unwrap();
    // With a little room that does not suffice nobody is thrown out for nothing.
    drop(first);
    let before = evictions();
    let error = runtime.block_on(registry.acquire(names[1]));
    assert!(error.is_ok() || evictions() == before, "what does not fit evicted others");
    drop(error);
    let first = all(names[0]);
    drop(third);
    drop(all(names[1]));
    assert_eq!(names.map(resident), [true, true, false, true]);
    // Files that changed while it was on disk are not served as what they were.
    std::fs::copy(folder("olora").join("adapter_config.json"), root.0.join("pissa/adapter_config.json")).unwrap();
    std::fs::copy(folder("olora").join("adapter_model.safetensors"), root.0.join("pissa/adapter_model.safetensors")).unwrap();
    drop((first, fourth));
    let before = (loads(), evictions(), names.map(resident));
    let error = runtime.block_on(registry.acquire("pissa")).unwrap_err();
    assert!(matches!(error, AdapterError::FilesChanged { .. }), "{error}");
    assert_eq!((loads(), evictions(), names.map(resident)), before, "nobody makes room for what is refused");
    registry.load(&Load { alias: "pissa".into(), path: "pissa".into(), in_place: true, ..Load::default() }).unwrap();
    drop(all("pissa"));
    // One larger than the whole budget never fits.
    let small = self::registry("llama-linear", limits(Some(&root.0), sizes[1] - 1));
    let error = small.load(&Load { alias: "x".into(), path: "olora".into(), ..Load::default() }).unwrap_err();
    assert!(matches!(error, AdapterError::NeverFits { .. } | AdapterError::TooLarge { .. }), "{error}");
    assert_eq!(small.state().resident_bytes, 0);
    small.check().unwrap();
    registry.check().unwrap();
}

#[test]
fn of_two_who_load_one_name_one_is_told_that_it_is_taken() {
    let root = Root::new("race", &["all-linear", "olora"]);
    for round in 0..8 {
        let registry = registry("llama-linear", limits(Some(&root.0), 64 << 20));
        let load = |path: &'static str| {
            let registry = registry.clone();
            std::thread::spawn(move || registry.load(&Load { alias: "x".into(), path: path.into(), ..Load::default() }))
        };
        let both = [load("all-linear"), load("olora")].map(|t| t.join().unwrap());
        assert_eq!(both.iter().filter(|r| r.is_ok()).count(), 1, "round {round}: {both:?}");
        assert!(both.iter().any(|r| matches!(r, Err(AdapterError::Loaded { .. }))), "{both:?}");
        let state = registry.state();
        assert_eq!((state.aliases.len(), state.generations.len()), (1, 1), "the other's bytes are gone");
        registry.check().unwrap();
    }
}

#[test]
fn the_books_are_right_whoever_does_what_at_once() {
    let names = ["all-linear", "olora", "pissa", "sorsa-compact"];
    let root = Root::new("threads", &names);
    let registry = registry("llama-linear", Limits { discover: true, ..limits(Some(&root.0), 64 << 20) });
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let threads: Vec<_> = (0..6u64)
        .map(|seed| {
            let (registry, handle) = (registry.clone(), handle.clone());
            std::thread::spawn(move || {
                let mut rng = crate::ops::Rng::seeded(seed);
                let mut leases = Vec::new();
                for _ in 0..40 {
                    let name = names[(rng.next() % 4) as usize];
                    // Names of its own for loads that must succeed; a shared one for those that may not.
                    match rng.next() % 5 {
                        0 => {
                            let alias = format!("own-{seed}");
                            let load = Load { alias, path: name.into(), in_place: true, ..Load::default() };
                            registry.load(&load).unwrap();
                        }
                        1 => drop(registry.load(&Load { alias: "shared".into(), path: name.into(), in_place: true, ..Load::default() })),
                        2 => drop(registry.unload("shared")),
                        3 => drop(registry.rollback("shared", None)),
                        // Whatever else goes on, what is in the root can be had.
                        _ => leases.push(handle.block_on(async {
                            assert!(registry.knows(name));
                            registry.acquire(name).await.unwrap()
                        })),
                    }
                    if leases.len() > 3 {
                        leases.remove(0);
                    }
                }
                drop(registry.unload(&format!("own-{seed}")));
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    registry.check().unwrap();
    let held: Vec<_> = registry.state().generations.into_iter().filter(|g| g.leases > 0).collect();
    assert!(held.is_empty(), "{held:?}");
    drop(registry.unload("shared"));
    for name in names {
        drop(registry.unload(name));
    }
    registry.check().unwrap();
    assert_eq!(registry.state().resident_bytes, 0);
    // Taken away, it is not found in the root again until it is loaded.
    assert!(!registry.knows("olora"));
    registry.load(&Load { alias: "olora".into(), path: "olora".into(), ..Load::default() }).unwrap();
    assert!(registry.knows("olora"));
}

#[test]
fn folders_of_the_root_that_no_request_could_name_are_told() {
    let root = Root::new("unnameable", &["olora"]);
    ["my adapter", "demo", ".hidden"].iter().for_each(|name| root.put("olora", name));
    std::fs::create_dir(root.0.join("no adapter")).unwrap();
    let registry = registry("llama-linear", Limits { discover: true, ..limits(Some(&root.0), 64 << 20) });
    let (found, left_out) = registry.discover().unwrap();
    let told: Vec<String> = left_out.iter().map(|(folder, why)| format!("{folder}: {why}")).collect();
    assert_eq!((found, told.len()), (1, 2), "{told:?}");
    assert!(told[0].starts_with("demo: \"demo\" is the name of the served model"), "{told:?}");
    assert!(told[1].starts_with("my adapter: an adapter's name is at most 256 bytes, without spaces"), "{told:?}");
}

#[test]
fn the_books_are_right_whatever_is_done() {
    let names = ["all-linear", "olora", "pissa", "sorsa-compact", "trainable-tokens", "lora-kv"];
    let root = Root::new("books", &names);
    let runtime = runtime();
    for seed in 0..6u64 {
        let registry = registry("llama-linear", limits(Some(&root.0), 48 << 10));
        let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move |n: usize| {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            (rng % n as u64) as usize
        };
        let mut leases: Vec<Lease> = Vec::new();
        for step in 0..60 {
            let alias = format!("a{}", next(3));
            match next(6) {
                0 | 1 => {
                    let (in_place, pinned) = (next(2) == 0, next(8) == 0);
                    let _ = registry.load(&Load { alias, path: names[next(names.len())].into(), in_place, pinned, ..Load::default() });
                }
                2 => {
                    let _ = registry.unload(&alias);
                }
                3 => {
                    let _ = registry.rollback(&alias, None);
                }
                4 => leases.extend(runtime.block_on(registry.acquire(&alias)).ok()),
                _ if !leases.is_empty() => drop(leases.swap_remove(next(leases.len()))),
                _ => {}
            }
            registry.check().unwrap_or_else(|e| panic!("seed {seed}, step {step}: {e}"));
        }
        leases.clear();
        (0..3).for_each(|i| drop(registry.unload(&format!("a{i}"))));
        registry.check().unwrap();
        let state = registry.state();
        assert!(state.resident_bytes == 0 && state.generations.is_empty(), "seed {seed}: {state:?}");
    }
}
