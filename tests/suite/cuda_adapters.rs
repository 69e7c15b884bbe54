//! Adapters and factorised bases on a device: everything a delta may hold, many at once, against the host; PEFT's own logits; more
//! adapters than there is room for.

use std::sync::Arc;

use strait::adapters::BaseChoice;
use strait::adapters::registry::Load;
use strait::ids::{AdapterGeneration, PageAddr, ProfileIndex, SeqId};
use strait::kv::layout::{ExactType, PageLayout, Profile};
use strait::model::checkpoint::Checkpoint;
use strait::model::config::ModelConfig;
use strait::model::cuda::{CudaDecoder, layer_products};
use strait::model::decoder::{Decoder, ReadyProfile};
use strait::model::delta::{Delta, EmbedDelta, EmbedFactors, Factors, HeldAs, Norm, Site, SiteDelta};
use strait::model::weights::{LoadDtype, Projection};
use strait::ops::cuda::Device;
use strait::request::Event;
use strait::step::{ExactStore, Logits, Row, StepPlan};

use crate::cuda::{Kept, Wardrobe, demo, engine_on, hear, own_device, request, rms, worn_in_lockstep};
use crate::cuda_linear::with_library;
use crate::engine::event_of;
use crate::http::adapters::{limits, registry_of};
use crate::{adapters, emulated, golden};

pub(crate) fn open(name: &str) -> &'static Checkpoint {
    Box::leak(Box::new(Checkpoint::open(&golden::folder(name)).unwrap()))
}

/// A `full` cache.
fn full(config: &ModelConfig) -> Vec<ReadyProfile> {
    let profile = Profile { name: "full".into(), cskv: None };
    vec![ReadyProfile { layout: PageLayout::new(config, ExactType::Bf16, &profile, None), compression: vec![] }]
}

/// Numbers of about `scale`, from a seed.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / 8_388_608.0 - 1.0
    }

    fn vec(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| scale * self.next()).collect()
    }

    /// Around one.
    fn gains(&mut self, n: usize) -> Vec<f32> {
        self.vec(n, 0.3).iter().map(|x| 1.0 + x).collect()
    }

    fn factors(&mut self, (out, inputs): (usize, usize), rank: usize) -> Factors {
        let scale = (rank as f32).sqrt().recip();
        Factors::new((&self.vec(rank * inputs, (inputs as f32).sqrt().recip()), &self.vec(out * rank, scale)), rank, HeldAs::Bf16)
    }

    pub(crate) fn plain(&mut self, c: &ModelConfig, sites: &[Site], rank: usize) -> Delta {
        let mut delta = Delta::new(c.layers);
        for layer in &mut delta.layers {
            for &site in sites {
                let factors = Some(self.factors(site.shape(c), rank));
                layer.sites[site as usize] = Some(Box::new(SiteDelta { factors, ..SiteDelta::default() }));
            }
        }
        delta
    }

    /// Of everything a delta may hold, something in every layer.
    fn everything(&mut self, c: &ModelConfig) -> Delta {
        let mut delta = Delta::new(c.layers);
        for (i, layer) in delta.layers.iter_mut().enumerate() {
            for site in Site::ALL {
                let (out, inputs) = site.shape(c);
                let at = i + site as usize;
                let replace = at.is_multiple_of(3).then(|| Projection {
                    weight: HeldAs::Bf16.matrix((out, inputs), &self.vec(out * inputs, (inputs as f32).sqrt().recip())),
                    inner: None,
                    bias: (at.is_multiple_of(2)).then(|| self.vec(out, 0.1)),
                });
                layer.sites[site as usize] = Some(Box::new(SiteDelta {
                    factors: (at % 4 != 1).then(|| self.factors((out, inputs), 3 + at)),
                    gain: (at % 3 != 2).then(|| self.gains(out)),
                    bias: at.is_multiple_of(2).then(|| self.vec(out, 0.1)),
                    replace,
                }));
            }
            for norm in Norm::ALL {
                layer.norms[norm as usize] = norm.width(c).map(|n| self.gains(n));
            }
        }
        let (vocab, hidden) = (c.vocab, c.hidden);
        let (down, up) = (self.vec(3 * vocab, 0.5), self.vec(hidden * 3, 0.5));
        delta.embed = Some(EmbedDelta {
            replace: Some(HeldAs::Bf16.matrix((vocab, hidden), &self.vec(vocab * hidden, 1.0))),
            factors: Some(EmbedFactors::new((&down, &up), 3, HeldAs::Bf16)),
            gain: Some(self.gains(hidden)),
        });
        delta.norm = Some(self.gains(hidden));
        let head = SiteDelta { factors: Some(self.factors((vocab, hidden), 9)), gain: Some(self.gains(vocab)), ..SiteDelta::default() };
        delta.head = Some(head);
        delta
    }
}

pub(crate) fn id(n: u64) -> AdapterGeneration {
    AdapterGeneration(n)
}

/// Adapters of every kind, and how many bytes they are.
pub(crate) fn wardrobe(c: &ModelConfig) -> (Vec<(AdapterGeneration, Arc<Delta>)>, u64) {
    let mut numbers = Numbers(11);
    let mut head = numbers.plain(c, &[Site::Q, Site::V], 20);
    head.layers[0] = Default::default();
    head.head = Some(SiteDelta { factors: Some(numbers.factors((c.vocab, c.hidden), 5)), ..SiteDelta::default() });
    let deltas = [numbers.plain(c, &Site::ALL, 5), head, numbers.everything(c), numbers.plain(c, &[Site::Down], 70)];
    let bytes = deltas.iter().map(Delta::bytes).sum();
    ((1..).zip(deltas).map(|(n, delta)| (id(n), Arc::new(delta))).collect(), bytes)
}

#[test]
fn rows_that_wear_anything_say_the_same_on_the_device_as_on_the_host() {
    for name in ["llama-bias", "qwen3", "mistral"] {
        let checkpoint = open(name);
        let c = &checkpoint.config;
        let (adapters, bytes) = wardrobe(c);
        // Side by side, prefilled whole and layer by layer, and then token by token; again when their beginnings are cached.
        let wears: Vec<AdapterGeneration> = [1, 2, 3, 0, 4, 3, 1].map(id).into();
        let first: &[(u64, usize, u32, u8)] = &[(5, 9, 6, 0), (6, 20, 4, 0), (7, 90, 5, 0), (8, 5, 6, 0), (9, 30, 3, 0), (7, 12, 4, 0)];
        let again: &[(u64, usize, u32, u8)] = &[(5, 100, 3, 0)];
        // All of them at once, and hardly one.
        for bytes in [bytes, adapters[2].1.bytes()] {
            let wardrobe = Wardrobe { adapters: adapters.clone(), wears: wears.clone(), bytes };
            let mut off = worn_in_lockstep(&own_device(), checkpoint, full(c), &[first, again], (80, false), &wardrobe);
            off.sort_by(f64::total_cmp);
            let (median, worst) = (off[off.len() / 2], off[off.len() - 1]);
            println!("{name}: logits differ by {median:.1e} (median of {} rms) and {worst:.1e} at most", off.len());
            assert!(median < 0.01, "{name}: {median}");
        }
    }
}

#[test]
fn products_of_two_matrices_say_the_same_on_the_device_as_on_the_host() {
    for name in ["welore", "maestro"] {
        let checkpoint = open(name);
        let (adapters, bytes) = wardrobe(&checkpoint.config);
        let wardrobe = Wardrobe { adapters, wears: [0, 1, 3].map(id).into(), bytes };
        let waves: &[(u64, usize, u32, u8)] = &[(5, 9, 4, 0), (6, 90, 3, 0), (7, 20, 3, 0)];
        let mut off = worn_in_lockstep(&own_device(), checkpoint, full(&checkpoint.config), &[waves], (80, false), &wardrobe);
        off.sort_by(f64::total_cmp);
        let median = off[off.len() / 2];
        println!("{name}: logits differ by {median:.1e} (median of {} rms)", off.len());
        assert!(median < 0.01, "{name}: {median}");
    }
}

/// A decoder of a golden model on the device, with a `full` cache.
fn on_device(checkpoint: &'static Checkpoint, adapter_bytes: u64) -> CudaDecoder {
    on(own_device(), checkpoint, (64, adapter_bytes))
}

/// The same on any device, with room for steps of so many tokens.
pub(crate) fn on(device: Arc<Device>, checkpoint: &'static Checkpoint, (tokens, adapter_bytes): (usize, u64)) -> CudaDecoder {
    let config = &checkpoint.config;
    let host = Decoder::new(config, checkpoint.weights(LoadDtype::Bf16), 1024, 64);
    let arena = 64 * full(config)[0].layout.sizes().exact;
    CudaDecoder::new(device, config, host.weights(), host.rope(), full(config), (arena, adapter_bytes, tokens)).unwrap()
}

/// One step of prompts side by side, each under an adapter; the logits of all positions.
pub(crate) fn step(on: &mut CudaDecoder, prompts: &[(&[u32], AdapterGeneration)], given: &[(AdapterGeneration, &Arc<Delta>)]) -> Kept {
    let config = on.config();
    let page = full(config)[0].layout.sizes().exact;
    let mut plan = StepPlan::default();
    for (i, &(prompt, adapter)) in prompts.iter().enumerate() {
        let (tokens, pages) = (plan.tokens.len(), plan.pages.len());
        plan.tokens.extend(prompt);
        plan.pages.push(PageAddr((i as u64 * page / PageAddr::UNIT) as u32));
        plan.rows.push(Row {
            seq: SeqId(i as u64),
            profile: ProfileIndex(0),
            adapter,
            positions: 0..prompt.len() as u32,
            layers: 0..config.layers as u32,
            tokens: tokens..tokens + prompt.len(),
            sealed: 0..0,
            exact: pages..pages + 1,
            store: ExactStore::Exact,
            sinks: None,
            moves: 0..0,
            logits: Logits::All,
        });
    }
    let mut kept = Kept::default();
    on.forward(&plan, given, &mut kept).unwrap();
    kept
}

#[test]
fn adapters_on_the_device_say_what_peft_says() {
    let mut seen = 0;
    for (name, base, cases) in adapters::golden_cases().filter(|(_, base, _)| ["qwen3", "llama-bias"].contains(&base.as_str())) {
        let checkpoint = open(&base);
        let ready = adapters::ready(checkpoint, &adapters::folder(&name), &BaseChoice::Auto, HeldAs::Bf16).unwrap();
        let delta = Arc::new(ready.delta);
        let mut on = on_device(checkpoint, delta.bytes());
        for (prompt, logits) in cases.iter().filter(|(prompt, _)| prompt.len() <= 64) {
            let own = step(&mut on, &[(prompt, id(1))], &[(id(1), &delta)]);
            let bare = step(&mut on, &[(prompt, id(0))], &[]);
            let last = (0, prompt.len() as u32 - 1);
            let (off, apart) = (rms(&own.0[&last], logits), rms(&bare.0[&last], logits));
            println!("{name} on {base}: off by {off:.4} in bf16, by {apart:.3} without it");
            assert!(off < 0.03 && off < apart / 4.0, "{name}: off by {off}, and by {apart} without it");
            seen += 1;
        }
    }
    assert!(seen >= 11, "{seen} cases");
}

#[test]
fn what_a_row_wears_is_nothing_to_its_neighbours() {
    let checkpoint = open("llama-bias");
    let (adapters, bytes) = wardrobe(&checkpoint.config);
    let given: Vec<_> = adapters.iter().map(|(id, delta)| (*id, delta)).collect();
    let mut on = on_device(checkpoint, bytes);
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| (0..7 + i).map(|t| (t * 31 + i * 7) % 250).collect()).collect();
    let rows: Vec<(&[u32], AdapterGeneration)> = prompts.iter().zip([3, 0, 1, 4, 2].map(id)).map(|(p, id)| (&p[..], id)).collect();
    let all = step(&mut on, &rows, &given);
    for (i, row) in rows.iter().enumerate() {
        let alone = step(&mut on, &[*row], &given);
        for position in 0..row.0.len() as u32 {
            assert_eq!(all.0[&(i, position)], alone.0[&(0, position)], "row {i} at {position}");
        }
    }
}

/// Gives the library all that a layer of a model launches, of up to so many rows.
fn give_layers(device: &Device, checkpoint: &'static Checkpoint, rows: usize) {
    let weights = checkpoint.weights(LoadDtype::Bf16);
    let launches: Vec<_> = layer_products(&checkpoint.config, &weights.layers[0]).iter().filter_map(|products| products.launch()).collect();
    assert!(launches.len() >= 2 && launches.iter().all(|launch| device.give_to_library(launch, rows)), "{launches:?}");
}

#[test]
fn rows_whose_products_are_the_librarys_say_the_same_on_the_device_as_on_the_host() {
    for name in ["llama-bias", "qwen3"] {
        let Some((device, _alone)) = with_library() else { return eprintln!("this machine has no cuBLASLt") };
        let checkpoint = open(name);
        give_layers(&device, checkpoint, 128);
        let (adapters, bytes) = wardrobe(&checkpoint.config);
        let wardrobe = Wardrobe { adapters, wears: [1, 0, 3, 0, 2, 4].map(id).into(), bytes };
        // Prompts within a step and beyond it, so layer by layer.
        let waves: &[(u64, usize, u32, u8)] = &[(5, 70, 3, 0), (6, 90, 3, 0), (7, 20, 3, 0), (8, 150, 3, 0), (9, 200, 2, 0), (4, 66, 2, 0)];
        let mut off = worn_in_lockstep(&device, checkpoint, full(&checkpoint.config), &[waves], (120, false), &wardrobe);
        off.sort_by(f64::total_cmp);
        let (median, worst) = (off[off.len() / 2], off[off.len() - 1]);
        println!("{name}: logits differ by {median:.1e} (median of {} rms) and {worst:.1e} at most", off.len());
        assert!(median < 0.01, "{name}: {median}");
    }
}

#[test]
fn what_a_row_wears_is_nothing_to_its_neighbours_where_products_are_the_librarys() {
    let Some((device, _alone)) = with_library() else { return eprintln!("this machine has no cuBLASLt") };
    let checkpoint = open("llama-bias");
    give_layers(&device, checkpoint, 192);
    let (adapters, bytes) = wardrobe(&checkpoint.config);
    let given: Vec<_> = adapters.iter().map(|(id, delta)| (*id, delta)).collect();
    let mut by_library = on(device, checkpoint, (192, bytes));
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| (0..20 + i).map(|t| (t * 31 + i * 7) % 250).collect()).collect();
    let wears = [3, 0, 1, 4, 2];
    let mut step = |wears: &[u64]| {
        let rows: Vec<(&[u32], AdapterGeneration)> = prompts.iter().zip(wears).map(|(p, &n)| (&p[..], id(n))).collect();
        step(&mut by_library, &rows, &given)
    };
    let all = step(&wears);
    for (i, &own) in wears.iter().enumerate() {
        // As many rows beside it, which wear nothing.
        let alone = step(&std::array::from_fn::<u64, 5, _>(|j| if i == j { own } else { 0 }));
        for position in 0..prompts[i].len() as u32 {
            assert_eq!(all.0[&(i, position)], alone.0[&(i, position)], "row {i} at {position}");
        }
    }
}

/// Launches name tensors of adapters that do more than add: what was recorded for one must not run for another that lies where it lay.
#[test]
fn an_address_that_comes_again_is_not_the_adapter_it_was() {
    let checkpoint = open("llama-bias");
    let c = &checkpoint.config;
    let mut numbers = Numbers(23);
    let mut of_rank = |rank: usize| {
        let mut delta = numbers.plain(c, &[Site::Q, Site::V], rank);
        let own = HeldAs::Bf16.matrix((c.vocab, c.hidden), &numbers.vec(c.vocab * c.hidden, 0.1));
        delta.head = Some(SiteDelta { replace: Some(Projection { weight: own, inner: None, bias: None }), ..SiteDelta::default() });
        Arc::new(delta)
    };
    let (one, two) = (of_rank(16), of_rank(12));
    let mut on = on_device(checkpoint, one.bytes() * 9 / 8);
    let rows: &[(&[u32], AdapterGeneration)] = &[(&[3, 1, 4], id(1))];
    (0..3).for_each(|_| drop(step(&mut on, rows, &[(id(1), &one)])));
    let rows: &[(&[u32], AdapterGeneration)] = &[(&[3, 1, 4], id(2))];
    let want = step(&mut on_device(checkpoint, two.bytes() * 9 / 8), rows, &[(id(2), &two)]);
    for _ in 0..3 {
        let got = step(&mut on, rows, &[(id(2), &two)]);
        assert_eq!(on.adapters().count(), 1, "one made room for the other");
        assert!((0..3).all(|at| got.0[&(0, at)] == want.0[&(0, at)]));
    }
}

#[test]
fn copies_on_the_device_go_with_what_they_are_copies_of() {
    let checkpoint = open("llama-bias");
    let (mut adapters, bytes) = wardrobe(&checkpoint.config);
    let mut on = on_device(checkpoint, bytes * 2);
    let prompt: &[u32] = &[3, 1, 4];
    for (id, delta) in &adapters {
        step(&mut on, &[(prompt, *id)], &[(*id, delta)]);
    }
    let held = |on: &CudaDecoder| {
        let mut held: Vec<u64> = on.adapters().map(|(id, _)| id.0).collect();
        held.sort_unstable();
        held
    };
    assert_eq!(held(&on), [1, 2, 3, 4]);
    let copied: u64 = on.adapters().map(|(_, bytes)| bytes).sum();
    assert!((bytes..bytes * 17 / 16 + 16384).contains(&copied), "{copied} bytes are copies of {bytes}");
    adapters.remove(2);
    step(&mut on, &[(prompt, id(0))], &[]);
    assert_eq!(held(&on), [1, 2, 4]);
    adapters.clear();
    step(&mut on, &[(prompt, id(0))], &[]);
    assert_eq!(held(&on), [0u64; 0]);
}

/// Copies from pinned memory do not end on an emulated device until this is dropped.
struct Held;

impl Held {
    fn set(hold: bool) {
        if let Some(emulated) = emulated::EMULATED.get() {
            // SAFETY: the function is of this type.
            unsafe { emulated.get::<unsafe extern "C" fn(bool)>(b"strait_emulated_hold").unwrap()(hold) }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        Held::set(false);
    }
}

#[test]
fn what_an_adapter_is_copied_beside_goes_on() {
    let device = own_device();
    if emulated::EMULATED.get().is_none() {
        eprintln!("not on this device: nothing holds its copies back");
        return;
    }
    let (checkpoint, _) = demo();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo-adapters");
    let registry = registry_of(checkpoint, HeldAs::Bf16, limits(Some(&root), 64 << 20));
    for name in ["pirate", "shout"] {
        registry.load(&Load { alias: name.into(), path: root.join(name), ..Load::default() }).unwrap();
    }
    let (engine, thread) = engine_on(device);
    let ask = |name: Option<&str>, new: u32| {
        let lease = name.map(|name| registry.resident(name).unwrap());
        let adapter = lease.as_ref().map_or(id(0), |l| l.generation());
        let request = strait::request::GenerateRequest { adapter, ..request(&[1, 30, 40, 50], new, 0) };
        engine.submit_with(request, lease).unwrap()
    };
    let held = Held;
    Held::set(true);
    // One that runs, one that waits for its adapter, one that comes later and passes that, and one that goes before it began.
    let mut runs = ask(None, 200);
    event_of(&mut runs);
    let mut waits = ask(Some("pirate"), 12);
    let gone = ask(Some("shout"), 12);
    assert_eq!(hear(ask(None, 20)).unwrap().len(), 20);
    drop(gone);
    for _ in 0..20 {
        assert!(matches!(event_of(&mut runs), Event::Token { .. }));
    }
    assert!(waits.events.try_recv().is_err(), "it is not there");
    // Nothing else to do: what has come is heard of.
    engine.finish(runs.seq);
    hear(runs).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(waits.events.try_recv().is_err(), "it is not there");
    drop(held);
    let said = hear(waits).unwrap();
    let (again, bare) = (hear(ask(Some("pirate"), 12)).unwrap(), hear(ask(None, 12)).unwrap());
    assert!(said.len() == 12 && said == again && said != bare, "{said:?}, {again:?}, {bare:?}");
    engine.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn an_engine_on_a_device_serves_adapters_under_leases() {
    let (checkpoint, _) = demo();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo-adapters");
    let registry = registry_of(checkpoint, HeldAs::Bf16, limits(Some(&root), 64 << 20));
    let load = |name: &str| registry.load(&Load { alias: name.into(), path: root.join(name), ..Load::default() }).unwrap();
    let (pirate, shout) = (load("pirate"), load("shout"));
    let (engine, thread) = engine_on(own_device());
    let tokenizer = strait::demo::tokenizer().unwrap();
    let prompt = tokenizer.encode("<|bos|><|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\n", false, true).unwrap();
    let ask = |name: Option<&str>| {
        let lease = name.map(|name| registry.resident(name).unwrap());
        let adapter = lease.as_ref().map_or(id(0), |l| l.generation());
        let request = strait::request::GenerateRequest { adapter, ..request(&prompt, 8, 0) };
        engine.submit_with(request, lease).unwrap()
    };
    let streams = [ask(None), ask(Some("pirate")), ask(Some("shout"))];
    let said = streams.map(|s| hear(s).unwrap());
    assert!(said[0] != said[1] && said[1] != said[2] && said[0] != said[2], "{said:?}");
    assert_eq!(hear(ask(Some("pirate"))).unwrap(), said[1], "the same alone");
    let on_device = || {
        let mut ids: Vec<u64> = engine.snapshot().device_adapters.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    };
    let mut both = vec![pirate.generation.0, shout.generation.0];
    both.sort_unstable();
    // Snapshots come when the engine has nothing to do.
    let wait = |want: &[u64]| {
        (0..200).any(|_| {
            on_device() == want || {
                std::thread::sleep(std::time::Duration::from_millis(10));
                false
            }
        })
    };
    assert!(wait(&both), "{:?}", on_device());
    registry.unload("pirate").unwrap();
    assert_eq!(hear(ask(None)).unwrap(), said[0]);
    assert!(wait(&[shout.generation.0]), "{:?}", on_device());
    engine.stop();
    thread.join().unwrap().unwrap();
}
