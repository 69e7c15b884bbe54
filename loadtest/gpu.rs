//! How near the CUDA kernels come to what the device can do: `cargo bench --bench gpu [-- word ...]` prints the tables whose title
//! contains one of the words (all without words). `SDPA=FILE` names what `loadtest/gpu.py` measured of PyTorch on the same card;
//! `ROW=TEXT` leaves of the tables `attention` and `decode` the rows whose "cache, context x batch" contains the text. The word `--dry`
//! goes through all of them at small shapes on a device that this CPU emulates: times mean nothing then, and what would fail, fails. The
//! word `--common` leaves out kernels of one architecture alone and cuBLASLt, so that a Hopper shows what devices without them run.
//!
//! Each row has its prediction beside it, written before it was measured: bytes over the measured ceiling, or the operations that
//! spread codes, whichever takes longer. Work is recorded once and run many times; data is larger than the second-level cache, or
//! several sets of it take turns.

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use strait::compress::{FrequencyMap, Group, KeyMap, LayerCompression, Projection};
use strait::ids::{AdapterGeneration, PageAddr, ProfileIndex, SeqId};
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Quantiser};
use strait::model::choices::Choices;
use strait::model::config::{ModelConfig, Rope, RopeScaling};
use strait::model::cuda::{CudaDecoder, CudaRefusal};
use strait::model::decoder::{LogitsSink, ReadyProfile};
use strait::model::delta::{Delta, Factors, HeldAs, Site, SiteDelta};
use strait::model::draw::{Answer, Ask, Draw, NotFinite};
use strait::model::weights::{self, Data, LayerWeights, ModelWeights, Weight};
use strait::ops::cuda::attend::{ARENA_SLACK, Append, AttendLayer, DeviceWork, Work};
use strait::ops::cuda::cublaslt::Product;
use strait::ops::cuda::linear::{Job, Linears, MANY, Mode};
use strait::ops::cuda::maps::DeviceMaps;
use strait::ops::cuda::prefill::Prefill;
use strait::ops::cuda::trial::{self, Becomes, Products};
use strait::ops::cuda::{CudaError, Device, Memory, Own};
use strait::ops::{AttendRow, Heads, LayerView, RopeTable};
use strait::request::Sampling;
use strait::step::{ExactStore, Logits, Row, StepPlan};

#[path = "../tests/suite/emulated.rs"]
mod emulated;

type Table = fn(&Arc<Device>, f64, &Sizes) -> Result<(), CudaError>;

/// What the tables go over, and how much of it.
struct Sizes {
    /// Attention: context and batch.
    contexts: Vec<usize>,
    batches: Vec<usize>,
    /// Queries of a chunk; context and batch.
    chunk: usize,
    chunks: Vec<(usize, usize)>,
    /// Products: outputs and inputs; rows.
    matrices: Vec<(usize, usize)>,
    rows: Vec<usize>,
    /// Rows of a step that the library is tried on.
    steps: [usize; 2],
    /// Sampling: logits and rows.
    sampled: Vec<(usize, usize)>,
    /// A whole model; context and batch of exact and of compressed pages.
    model: ModelConfig,
    exact: Vec<(usize, usize)>,
    compressed: Vec<(usize, usize)>,
    /// Rows that wear adapters.
    wearers: [usize; 2],
    /// Bytes that data fills at least, over all its sets, so that no cache holds it; bytes the ceiling is measured on.
    spread: usize,
    ceiling: usize,
    /// Repeats at most.
    times: usize,
}

impl Sizes {
    fn full() -> Self {
        let compressed = [8192, 32_768, 131_072].iter().flat_map(|&c| [1, 16, 64].map(|b| (c, b))).collect();
        Self {
            contexts: vec![8192, 32_768, 131_072],
            batches: vec![1, 16, 64],
            chunk: 2048,
            chunks: vec![(2048, 1), (2048, 4), (8192, 1), (32_768, 1), (131_072, 1)],
            matrices: vec![(4096, 4096), (6144, 4096), (1024, 4096), (28672, 4096), (4096, 14336), (128_256, 4096)],
            rows: vec![1, 4, 8, 16, 32, 64, 512, 2048],
            steps: [512, 2048],
            sampled: vec![(128_256, 1), (128_256, 16), (128_256, 64)],
            model: model(32),
            exact: vec![(64, 1), (64, 16), (8192, 1), (8192, 16), (32_768, 1), (32_768, 16), (131_072, 1), (131_072, 4)],
            compressed,
            wearers: [1, 16],
            spread: 600 << 20,
            ceiling: 4 << 30,
            times: 20,
        }
    }

    fn dry() -> Self {
        Self {
            contexts: vec![128, 640],
            batches: vec![1, 2],
            chunk: 64,
            chunks: vec![(64, 2), (192, 1)],
            matrices: vec![(128, 256), (192, 512)],
            rows: vec![1, 8, 80],
            steps: [66, 128],
            sampled: vec![(512, 2), (5000, 1)],
            model: ModelConfig { hidden: 256, intermediate: 512, vocab: 512, ..model(2) },
            exact: vec![(64, 2), (256, 1)],
            compressed: vec![(256, 2)],
            wearers: [1, 3],
            spread: 1 << 20,
            ceiling: 1 << 20,
            times: 1,
        }
    }
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let dry = words.iter().any(|w| w == "--dry");
    let common = words.iter().any(|w| w == "--common");
    let words: Vec<_> = words.into_iter().filter(|w| w != "--dry" && w != "--common").collect();
    if dry {
        emulated::load()?;
    }
    let device = if common { Device::open_common(0) } else { Device::open(0) }.map_err(|e| e.to_string())?;
    tables(&device, &words, common, &if dry { Sizes::dry() } else { Sizes::full() }).map_err(|e| e.to_string())
}

fn tables(device: &Arc<Device>, words: &[String], common: bool, sizes: &Sizes) -> Result<(), CudaError> {
    let ceiling = ceiling(device, sizes.ceiling)?;
    println!("{}; reads {:.0} GB/s at best\n", device.describe(), ceiling / 1e9);
    // On a device of its own, as it leaves out what does not hold, and these tables tell of what is asked for.
    if [Own::Prefill, Own::Linear].into_iter().any(|own| device.runs(own)) {
        let shape = trial::Shape {
            heads: SHAPE,
            matrix: sizes.matrices[0],
            rows: sizes.chunk.max(MANY),
            history: 3 * sizes.chunk,
            decoded: (3, sizes.chunk),
        };
        for trial in trial::choose(&Device::open(device.ordinal())?, &shape)? {
            println!("trial: {trial}");
        }
        println!();
    }
    if !common {
        // Nothing is given to it but what a row of a table is about.
        println!("{}", device.open_library()?);
        for &rows in &sizes.steps {
            let tried = Device::open(device.ordinal())?;
            tried.open_library()?;
            for trial in trial::choose_library(&tried, &layer_products(&sizes.model), rows)? {
                println!("trial of {rows} rows: {trial}");
            }
        }
        println!();
    }
    let tables: [(&str, Table); 7] = [
        ("attention", attention),
        ("prefill", prefill),
        ("prefix hit", prefix_hit),
        ("linear", linear),
        ("sample", sample),
        ("decode", decode),
        ("adapters", adapters),
    ];
    for (title, table) in tables {
        if words.is_empty() || words.iter().any(|w| title.contains(w.as_str())) {
            println!("{title}");
            table(device, ceiling, sizes)?;
            println!();
        }
    }
    Ok(())
}

/// The launches of products of a layer of a model without biases.
fn layer_products(c: &ModelConfig) -> [Products; 4] {
    let of =
        |what, inputs, becomes, outs: &[usize]| Products { what, inputs, becomes, outs: outs.iter().map(|&out| (out, false)).collect() };
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    [
        of("queries, keys and values", c.hidden, Becomes::Outputs, &[q, kv, kv]),
        of("outputs of attention", q, Becomes::Sum, &[c.hidden]),
        of("gate and up", c.hidden, Becomes::Gated, &[c.intermediate; 2]),
        of("outputs of an MLP", c.intermediate, Becomes::Sum, &[c.hidden]),
    ]
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn normal(&mut self) -> f32 {
        let x = self.next();
        (0..4).map(|i| (x >> (16 * i) & 0xffff) as f32 / 65536.0 - 0.5).sum::<f32>() * 1.7
    }

    fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReadArgs {
    from: u64,
    n: u64,
    out: u64,
}

/// Bytes per second of a summing kernel, at its best of some grids.
fn ceiling(device: &Arc<Device>, bytes: usize) -> Result<f64, CudaError> {
    let data = filled(device, bytes, &random_bf16(8 << 20))?;
    let out = device.alloc::<u32>(1)?;
    let mut best = 0.0f64;
    for blocks in [2, 4, 8, 16] {
        let args = ReadArgs { from: data.ptr(), n: bytes as u64 / 16, out: out.ptr() };
        // SAFETY: reads the allocation, writes one word.
        let ms = device.time(5, || unsafe { device.launch("probe_read", [device.processors * blocks, 1, 1], 512, 0, &args) })?;
        best = best.max(bytes as f64 / ms * 1e3);
    }
    Ok(best)
}

fn random_bf16(n: usize) -> Vec<u8> {
    let mut rng = Rng(1);
    (0..n).flat_map(|_| bf16::from_f32(rng.normal()).to_le_bytes()).collect()
}

/// `bytes` of the device that repeat `block`.
fn filled(device: &Arc<Device>, bytes: usize, block: &[u8]) -> Result<Memory<u8>, CudaError> {
    let mut memory = device.alloc::<u8>(bytes)?;
    let mut done = block.len().min(bytes);
    memory.write(0, &block[..done])?;
    while done < bytes {
        let n = done.min(bytes - done);
        memory.copy_within(0, done, n)?;
        done += n;
    }
    Ok(memory)
}

const SHAPE: Heads = Heads { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088_388_35 };

/// An 8B Llama of so many layers.
fn model(layers: usize) -> ModelConfig {
    ModelConfig {
        family: "llama".into(),
        hidden: 4096,
        layers,
        heads: SHAPE.heads,
        kv_heads: SHAPE.kv_heads,
        head_dim: SHAPE.head_dim,
        intermediate: 14336,
        vocab: 128_256,
        max_positions: 131_072,
        norm_eps: 1e-5,
        rope: Rope { theta: 500_000.0, scaling: RopeScaling::None },
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tied: false,
    }
}

/// A frequency profile of so many channels of each head, rotated.
fn profile(channels: usize, bits: u32) -> Profile {
    let share = (channels as f64 + 0.5) / 128.0;
    let cskv = Cskv::shares((share, share), bits, (64, 4), BasisKind::Frequency);
    let cskv = Cskv { key_quantiser: Quantiser::Hadamard, value_quantiser: Quantiser::Hadamard, ..cskv };
    Profile { name: format!("{channels} of 128, {bits} bits"), cskv: Some(cskv) }
}

/// The same with keys over all heads at once, which are rebuilt.
fn joint(channels: usize, bits: u32) -> Profile {
    let Profile { name, cskv } = profile(channels, bits);
    Profile { name: format!("{name}, joint"), cskv: cskv.map(|c| Cskv { basis: BasisKind::Joint, ..c }) }
}

/// The same by frequency, not rotated.
fn affine(channels: usize, bits: u32) -> Profile {
    let Profile { name, cskv } = profile(channels, bits);
    let cskv = cskv.map(|c| Cskv { key_quantiser: Quantiser::Affine, value_quantiser: Quantiser::Affine, ..c });
    Profile { name: format!("{name}, affine"), cskv }
}

fn maps(layout: &PageLayout, profile: &Profile, rng: &mut Rng) -> LayerCompression {
    let (rank_k, rank_v, kv) = (layout.sealed[0].keys.rank, layout.sealed[0].values.rank, SHAPE.kv_heads);
    let width = kv * 128;
    let mut projection = |rank: usize| {
        let group = Group { channels: 0..width, ranks: 0..rank, down: rng.normals(width * rank), up: rng.normals(width * rank) };
        Projection { mean: rng.normals(width), groups: vec![group] }
    };
    let values = projection(rank_v);
    if profile.cskv.as_ref().is_some_and(|c| c.basis == BasisKind::Joint) {
        return LayerCompression { keys: KeyMap::Channels(projection(rank_k)), values };
    }
    let mut pairs = |n: usize| (0..n).map(|_| [rng.normal(), rng.normal()]).collect::<Vec<_>>();
    let up = pairs(rank_k / 2 * kv);
    let frequencies = (0..rank_k / 2).map(|j| (j % 64) as u32).collect();
    let keys = FrequencyMap { kv_heads: kv, half: 64, frequencies, down: up.clone(), up, rotation: None };
    LayerCompression { keys: KeyMap::Frequencies(keys), values }
}

/// Some sealed pages of random codes.
fn sealed_block(layout: &PageLayout, pages: usize, rng: &mut Rng) -> Vec<u8> {
    let size = layout.sizes().sealed as usize;
    let part = layout.sealed[0];
    let mut block = vec![0u8; size * pages];
    for page in block.chunks_exact_mut(size) {
        page.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
        for (at, bytes) in [(part.keys.meta, part.key_meta_bytes()), (part.values.meta, part.value_meta_bytes())] {
            for scale in page[at..at + bytes].as_chunks_mut::<2>().0 {
                *scale = f16::from_f32((1.0 + 0.2 * rng.normal()) / 64.0).to_le_bytes();
            }
        }
    }
    block
}

/// What PyTorch took, in microseconds, by context and batch.
fn sdpa() -> HashMap<(usize, usize), (f64, String)> {
    let Ok(path) = std::env::var("SDPA") else { return HashMap::new() };
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let rows: Vec<(usize, usize, f64, String)> = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"));
    rows.into_iter().map(|(context, batch, us, backend)| ((context, batch), (us, backend))).collect()
}

fn attention(device: &Arc<Device>, ceiling: f64, sizes: &Sizes) -> Result<(), CudaError> {
    let sdpa = sdpa();
    let rng = &mut Rng(7);
    println!("  one layer of 32 heads over 8 KV heads of 128; times in us; bytes counted as laid out, scales, window and sinks included");
    println!(
        "  {:<26} {:>7} {:>5} {:>9} {:>9} {:>9} {:>8} {:>6} | {:>8} {:>8} {:>8} | {:>9} {:>6}",
        "cache", "context", "batch", "predicted", "measured", "floor", "GB/s", "%floor", "sealed", "exact", "merge", "SDPA bf16", "x"
    );
    let full = Profile { name: "full".into(), cskv: None };
    let rope = RopeTable::new(&model(1), sizes.contexts.iter().max().map_or(0, |n| n + 1));
    let rope = [device.upload(&rope.cos)?, device.upload(&rope.sin)?];
    let profiles = [full, profile(26, 4), profile(32, 4), profile(13, 4), profile(26, 3), profile(26, 2), affine(26, 8), joint(26, 4)];
    for profile in profiles {
        let layout = PageLayout::new(&model(1), ExactType::Bf16, &profile, None);
        let compressed = profile.cskv.is_some();
        let page = layout.sizes();
        let maps_host = compressed.then(|| maps(&layout, &profile, rng));
        let view = LayerView { layer: 0, layout: &layout, compression: maps_host.as_ref() };
        let maps = compressed.then(|| DeviceMaps::new(device, &view, SHAPE)).transpose()?;
        for &context in &sizes.contexts {
            for &batch in &sizes.batches {
                let (sealed_pages, window_pages) = if compressed { (context / 64 - 1, 1) } else { (0, context / 64) };
                let per = sealed_pages * page.sealed as usize + window_pages * page.exact as usize + page.sinks as usize;
                let bytes_once = batch * per;
                let name = format!("{}, {context} x {batch}", profile.name);
                if bytes_once > 40 << 30 || std::env::var("ROW").is_ok_and(|row| !name.contains(&row)) {
                    continue;
                }
                // Sets of data that take turns.
                let sets = (sizes.spread / 2).div_ceil(bytes_once).clamp(1, 64);
                let arena_bytes = sets * bytes_once;
                // Sealed pages first, of all sets; then the exact ones.
                let sealed_bytes = sets * batch * sealed_pages * page.sealed as usize;
                let mut arena = device.alloc::<u8>(arena_bytes + ARENA_SLACK)?;
                fill_part(&mut arena, 0, sealed_bytes, &if compressed { sealed_block(&layout, 256, rng) } else { vec![] })?;
                fill_part(&mut arena, sealed_bytes, arena_bytes - sealed_bytes, &random_bf16(4 << 20))?;
                let mut order: Vec<u32> = (0..(sets * batch * sealed_pages) as u32).collect();
                (1..order.len()).rev().for_each(|i| order.swap(i, (rng.next() % (i as u64 + 1)) as usize));
                let sealed_at = |i: usize| PageAddr(order[i] * (page.sealed / 64) as u32);
                let exact_at = |i: usize| PageAddr(((sealed_bytes + i * page.exact as usize) / 64) as u32);
                let sinks_base = sealed_bytes + sets * batch * window_pages * page.exact as usize;
                let mut works = Vec::new();
                for set in 0..sets {
                    let mut work = Work::default();
                    for row in 0..batch {
                        let at = set * batch + row;
                        let sealed: Vec<_> = (0..sealed_pages).map(|i| sealed_at(at * sealed_pages + i)).collect();
                        let exact: Vec<_> = (0..window_pages).map(|i| exact_at(at * window_pages + i)).collect();
                        let sinks = compressed.then(|| PageAddr(((sinks_base + at * page.sinks as usize) / 64) as u32));
                        let position = (context - 1) as u32;
                        let of = AttendRow { view, first: row, n: 1, position, sealed: &sealed, sinks, exact: &exact, exact_offset: 0 };
                        work.push(row as u32, &of);
                    }
                    let mut on = DeviceWork::new(device)?;
                    on.set(&work, SHAPE, &layout.sealed, batch)?;
                    works.push(on);
                }
                let q = device.upload(&rng.normals(batch * 32 * 128))?;
                let out = device.alloc::<u16>(batch * 32 * 128)?;
                let layer = AttendLayer {
                    view,
                    shape: SHAPE,
                    exact_offset: 0,
                    maps: maps.as_ref(),
                    arena: arena.ptr(),
                    rope: [rope[0].ptr(), rope[1].ptr()],
                    q: q.ptr(),
                    out: out.ptr(),
                    out_f32: 0,
                    batch,
                    append: Append::default(),
                };
                let times = (1usize << 30).div_ceil(arena_bytes).max(3).min(sizes.times);
                let each = |f: &dyn Fn(&DeviceWork) -> Result<(), CudaError>| -> Result<f64, CudaError> {
                    Ok(device.time(times, || works.iter().try_for_each(f))? * 1e3 / sets as f64)
                };
                let us = each(&|w| w.attend(device, &layer))?;
                let parts = [
                    each(&|w| {
                        w.absorb(device, &layer)?;
                        w.exact(device, &layer, 0)?;
                        w.sealed(device, &layer, 0)
                    })?,
                    each(&|w| w.exact(device, &layer, 0))?,
                    each(&|w| w.merge(device, &layer, 0))?,
                ];
                let laid = if compressed {
                    batch
                        * (sealed_pages * layout.sealed[0].bytes() + window_pages * layout.exact_layer_bytes() + layout.sinks_layer_bytes())
                } else {
                    bytes_once
                };
                let floor = laid as f64 / ceiling * 1e6;
                // Operations that spread and weigh codes: some 11 clocks a position and multiprocessor at ranks of 208, and 16 where they
                // pass through shared memory; products that rebuild keys, at half of what a Hopper's tensor cores do (`rebuild.cuh`).
                let spread = if let Some(cskv) = &profile.cskv {
                    let (keys, values) = (layout.sealed[0].keys.rank as f64, layout.sealed[0].values.rank as f64);
                    let clocks = if cskv.key_quantiser == Quantiser::Hadamard { 11.0 } else { 16.0 };
                    let spread = clocks * (keys + values) / 416.0 / (device.processors as f64 * 1755.0);
                    let rebuilt = if cskv.basis == BasisKind::Joint { 2.0 * keys * (SHAPE.kv_heads * 128) as f64 / 495e6 } else { 0.0 };
                    (batch * context) as f64 * spread.max(rebuilt)
                } else {
                    0.0
                };
                let predicted = floor.max(spread) + 8.0;
                let (reference, ratio) = match sdpa.get(&(context, batch)) {
                    Some((best, _)) => (format!("{best:.1}"), format!("{:.2}", best / us)),
                    None => ("".into(), "".into()),
                };
                println!(
                    "  {:<26} {:>7} {:>5} {:>9.1} {:>9.1} {:>9.1} {:>8.0} {:>6.1} | {:>8.1} {:>8.1} {:>8.1} | {:>9} {:>6}",
                    profile.name,
                    context,
                    batch,
                    predicted,
                    us,
                    floor,
                    laid as f64 / us / 1e3,
                    100.0 * floor / us,
                    parts[0],
                    parts[1],
                    parts[2],
                    reference,
                    ratio
                );
            }
        }
    }
    Ok(())
}

/// Chunks of queries at the end of their context.
fn prefill(device: &Arc<Device>, _: f64, sizes: &Sizes) -> Result<(), CudaError> {
    let (chunk, most) = (sizes.chunk, predicted(device));
    println!("  chunks of {chunk} queries, 32 heads over 8 KV heads of 128, exact pages; predicted at {most} TFLOP/s");
    println!("  {:>7} {:>5} {:>9} {:>9} {:>8}", "context", "batch", "predicted", "measured", "TFLOP/s");
    let layout = PageLayout::new(&model(1), ExactType::Bf16, &Profile { name: "full".into(), cskv: None }, None);
    let page = layout.sizes().exact as usize;
    let view = LayerView { layer: 0, layout: &layout, compression: None };
    for &(context, batch) in &sizes.chunks {
        let pages = context / 64;
        let arena = filled(device, batch * pages * page, &random_bf16(4 << 20))?;
        let q = device.upload(&Rng(5).normals(batch * chunk * 32 * 128))?;
        let out = device.alloc::<u16>(q.len())?;
        let mut work = Prefill::new(device)?;
        for row in 0..batch {
            let table: Vec<_> = (0..pages).map(|i| PageAddr(((row * pages + i) * page / 64) as u32)).collect();
            let position = (context - chunk) as u32;
            let of = AttendRow { view, first: row * chunk, n: chunk, position, sealed: &[], sinks: None, exact: &table, exact_offset: 0 };
            work.push((row * chunk) as u32, &of);
        }
        work.set(SHAPE)?;
        let layer = AttendLayer {
            view,
            shape: SHAPE,
            exact_offset: 0,
            maps: None,
            arena: arena.ptr(),
            rope: [0; 2],
            q: q.ptr(),
            out: out.ptr(),
            out_f32: 0,
            batch: batch * chunk,
            append: Append::default(),
        };
        let us = 1e3 * device.time(sizes.times.min(5), || work.attend(device, &layer))?;
        let visible = chunk * (context - chunk) + chunk * (chunk + 1) / 2;
        let flops = (4 * 128 * 32 * batch * visible) as f64;
        println!("  {context:>7} {batch:>5} {:>9.1} {us:>9.1} {:>8.1}", flops / most / 1e6, flops / us / 1e6);
    }
    Ok(())
}

/// TFLOP/s that attention of chunks was predicted at before it was first timed: on warpgroups, and by warps.
fn predicted(device: &Device) -> f64 {
    if device.runs(Own::Prefill) { 500.0 } else { 400.0 }
}

/// Chunks of queries whose history is sealed but for its last page: what a prompt meets whose beginning is in the prefix index.
fn prefix_hit(device: &Arc<Device>, _: f64, sizes: &Sizes) -> Result<(), CudaError> {
    let (chunk, rng, most) = (sizes.chunk, &mut Rng(9), predicted(device));
    println!("  chunks of {chunk} queries after a sealed history, 32 heads over 8 KV heads of 128; predicted: queries and history at");
    println!("  {most} TFLOP/s, and 1.4 ns a position to rebuild it");
    println!("  {:<26} {:>7} {:>9} {:>9} {:>8} {:>8}", "cache", "context", "predicted", "measured", "TFLOP/s", "rebuild");
    for profile in [profile(26, 4), affine(26, 8), joint(26, 4)] {
        let layout = PageLayout::new(&model(1), ExactType::Bf16, &profile, None);
        let page = layout.sizes();
        let maps_host = maps(&layout, &profile, rng);
        let view = LayerView { layer: 0, layout: &layout, compression: Some(&maps_host) };
        let maps = DeviceMaps::new(device, &view, SHAPE)?;
        for &(context, _) in sizes.chunks.iter().filter(|(context, _)| *context > chunk) {
            let rope = RopeTable::new(&model(1), context);
            let rope = [device.upload(&rope.cos)?, device.upload(&rope.sin)?];
            let (history, exact) = ((context - chunk) / 64, chunk / 64);
            let (sealed_bytes, exact_bytes) = (history * page.sealed as usize, exact * page.exact as usize);
            let mut arena = device.alloc::<u8>(sealed_bytes + exact_bytes + page.sinks as usize + ARENA_SLACK)?;
            fill_part(&mut arena, 0, sealed_bytes, &sealed_block(&layout, 256, rng))?;
            fill_part(&mut arena, sealed_bytes, exact_bytes + page.sinks as usize, &random_bf16(4 << 20))?;
            let at = |base: usize, i: usize, size: u64| PageAddr(((base + i * size as usize) / 64) as u32);
            let sealed: Vec<_> = (0..history).map(|i| at(0, i, page.sealed)).collect();
            let exact: Vec<_> = (0..exact).map(|i| at(sealed_bytes, i, page.exact)).collect();
            let of = AttendRow {
                view,
                first: 0,
                n: chunk,
                position: (context - chunk) as u32,
                sealed: &sealed,
                sinks: Some(at(sealed_bytes + exact_bytes, 0, 0)),
                exact: &exact,
                exact_offset: 0,
            };
            let q = device.upload(&rng.normals(chunk * 32 * 128))?;
            let out = device.alloc::<u16>(q.len())?;
            let layer = AttendLayer {
                view,
                shape: SHAPE,
                exact_offset: 0,
                maps: Some(&maps),
                arena: arena.ptr(),
                rope: [rope[0].ptr(), rope[1].ptr()],
                q: q.ptr(),
                out: out.ptr(),
                out_f32: 0,
                batch: chunk,
                append: Append::default(),
            };
            let mut work = Prefill::new(device)?;
            work.push(0, &of);
            work.set(SHAPE)?;
            let times = sizes.times.min(5);
            let us = 1e3 * device.time(times, || work.attend(device, &layer))?;
            let rebuild = 1e3 * device.time(times, || work.rebuild_all(device, &layer))?;
            let visible = chunk * (context - chunk) + chunk * (chunk + 1) / 2;
            let flops = (4 * 128 * 32 * visible) as f64;
            let predicted = flops / most / 1e6 + (context - chunk) as f64 * 1.4e-3;
            println!("  {:<26} {context:>7} {predicted:>9.1} {us:>9.1} {:>8.1} {rebuild:>8.1}", profile.name, flops / us / 1e6);
        }
    }
    Ok(())
}

/// Fills a part of `memory` with repeats of `block`.
fn fill_part(memory: &mut Memory<u8>, at: usize, bytes: usize, block: &[u8]) -> Result<(), CudaError> {
    let mut done = block.len().min(bytes);
    memory.write(at, &block[..done])?;
    while done < bytes {
        // Whole blocks, so that pages stay pages.
        let n = done.min(bytes - done);
        memory.copy_within(at, at + done, n)?;
        done += n;
    }
    Ok(())
}

fn linear(device: &Arc<Device>, ceiling: f64, sizes: &Sizes) -> Result<(), CudaError> {
    println!("  y = x W^T in bf16, f32 sums; times in us");
    println!(
        "  {:>7} {:>6} {:>5} {:>9} {:>9} {:>8} {:>8} {:>6} | {:>8}",
        "out", "in", "rows", "floor", "measured", "GB/s", "TFLOP/s", "%floor", "cuBLASLt"
    );
    let block = random_bf16(8 << 20);
    for &(out, inputs) in &sizes.matrices {
        for &rows in &sizes.rows {
            let bytes = 2 * out * inputs;
            let sets = sizes.spread.div_ceil(bytes).clamp(1, 64);
            let w = filled(device, sets * bytes, &block)?;
            let x = filled(device, 2 * rows * inputs, &block)?;
            let y = device.alloc::<f32>(rows * out)?;
            let launch = |i: usize| {
                let job = Job { w: [w.ptr() + (i * bytes) as u64, 0], bias: [0; 2], y: y.ptr(), out, ldy: out, mode: Mode::F32 };
                Linears { jobs: &[job], x: x.ptr(), rows, inputs, ldx: inputs, worn: None, norm: None }.launch(device)
            };
            let time = || Ok::<_, CudaError>(device.time(sizes.times.min(5), || (0..sets).try_for_each(launch))? * 1e3 / sets as f64);
            let us = time()?;
            let its = [Product { out, inputs, wide: true, biased: false }];
            let library = if rows >= MANY && device.give_to_library(&its, rows) {
                // Not recorded the first time: it loads what it runs then.
                launch(0)?;
                let us = time()?;
                device.take_from_library(&its);
                format!("{us:.1}")
            } else {
                "-".into()
            };
            let flops = 2.0 * (rows * out * inputs) as f64;
            let floor = (bytes as f64 / ceiling).max(flops / 790e12) * 1e6;
            println!(
                "  {out:>7} {inputs:>6} {rows:>5} {floor:>9.1} {us:>9.1} {:>8.0} {:>8.1} {:>6.1} | {library:>8}",
                bytes as f64 / us / 1e3,
                flops / us / 1e6,
                100.0 * floor / us
            );
        }
    }
    Ok(())
}

/// Tokens from logits, as the output head leaves them.
fn sample(device: &Arc<Device>, ceiling: f64, sizes: &Sizes) -> Result<(), CudaError> {
    println!("  tokens of f32 logits, all launches of a step together; times in us; floor: the logits, read once");
    println!(
        "  {:>7} {:>5} {:>9} | {:>9} {:>9} | {:>9} | {:>9} {:>9} | {:>9}",
        "vocab", "rows", "floor", "predicted", "greedy", "drawn", "predicted", "k and p", "20 best"
    );
    let rng = &mut Rng(9);
    let greedy = Sampling::greedy();
    let drawn = Sampling { temperature: 0.8, seed: 1, ..Sampling::greedy() };
    let cut = Sampling { top_k: 50, top_p: 0.95, ..drawn.clone() };
    for &(vocab, rows) in &sizes.sampled {
        // Distributions with a few likely tokens.
        let logits: Vec<f32> = (0..rows * vocab).map(|i| 3.0 * rng.normal() + if i % 997 == 0 { 6.0 } else { 0.0 }).collect();
        let logits = device.upload(&logits)?;
        let us = |sampling: &Sampling, logprobs: Option<u32>| -> Result<f64, CudaError> {
            let mut choices = Choices::new(device, vocab)?;
            for index in 0..rows as u32 {
                choices.push(&Ask::Token(Draw { sampling, index, occurrences: None, banned: &[], logprobs }));
            }
            choices.set()?;
            let ms = device.time(sizes.times, || choices.launch(logits.part(0, rows * vocab)))?;
            let answers = choices.read()?;
            assert!((0..rows).all(|i| matches!(answers.of(i), Some(Ok(_)))), "a token for each row");
            Ok(ms * 1e3)
        };
        let times = [us(&greedy, None)?, us(&drawn, None)?, us(&cut, None)?, us(&cut, Some(20))?];
        let floor = (4 * rows * vocab) as f64 / ceiling * 1e6;
        // Some 30 operations an element, twice, at 64 a clock and multiprocessor; launches, and the block that does the rest.
        let weighed = (30 * rows * vocab) as f64 / (64.0 * device.processors as f64 * 1755.0);
        let predicted = [floor + 6.0, floor + 2.0 * weighed.max(floor) + 20.0];
        println!(
            "  {vocab:>7} {rows:>5} {floor:>9.1} | {:>9.1} {:>9.1} | {:>9.1} | {:>9.1} {:>9.1} | {:>9.1}",
            predicted[0], times[0], times[1], predicted[1], times[2], times[3]
        );
    }
    Ok(())
}

/// Asks for the likeliest tokens and does nothing with them.
struct Deaf {
    sampling: Sampling,
    tokens: usize,
}

impl LogitsSink for Deaf {
    fn logits(&mut self, _: usize, _: u32, _: &mut [f32]) {
        unreachable!("no logits are asked for");
    }

    fn ask(&mut self, _: usize, _: u32) -> Ask<'_> {
        Ask::Token(Draw { sampling: &self.sampling, index: 0, occurrences: None, banned: &[], logprobs: None })
    }

    fn answer(&mut self, _: usize, _: u32, answer: Result<Answer, NotFinite>) {
        assert!(answer.is_ok(), "logits of a whole model");
        self.tokens += 1;
    }
}

/// Numbers that all matrices of a model borrow on the host; on the device each has its own.
fn numbers_of(c: &ModelConfig, rng: &mut Rng) -> Vec<bf16> {
    let block: Vec<bf16> = (0..4 << 20).map(|_| bf16::from_f32(rng.normal() * 0.03)).collect();
    let most = c.vocab.max(c.intermediate).max(c.q_channels());
    block.iter().copied().cycle().take(most * c.hidden).collect()
}

/// A model of these numbers, and the bytes of weights that a step reads.
fn weights_of<'a>(c: &ModelConfig, numbers: &'a [bf16]) -> (ModelWeights<'a>, usize) {
    let weight =
        |out: usize, inputs: usize| Weight { out_features: out, in_features: inputs, data: Data::Bf16((&numbers[..out * inputs]).into()) };
    let projection = |out: usize, inputs: usize| weights::Projection { weight: weight(out, inputs), inner: None, bias: None };
    let ones = vec![1.0f32; c.hidden];
    let layer = || LayerWeights {
        input_norm: ones.clone(),
        post_norm: ones.clone(),
        q: projection(c.q_channels(), c.hidden),
        k: projection(c.kv_channels(), c.hidden),
        v: projection(c.kv_channels(), c.hidden),
        o: projection(c.hidden, c.q_channels()),
        q_norm: None,
        k_norm: None,
        gate: projection(c.intermediate, c.hidden),
        up: projection(c.intermediate, c.hidden),
        down: projection(c.hidden, c.intermediate),
    };
    let all = ModelWeights {
        embed: weight(c.vocab, c.hidden),
        layers: (0..c.layers).map(|_| layer()).collect(),
        norm: ones.clone(),
        untied_head: Some(weight(c.vocab, c.hidden)),
    };
    let read: usize =
        all.layers.iter().map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].iter().map(|p| p.weight.bytes()).sum::<usize>()).sum();
    let read = read + all.head().bytes();
    (all, read)
}

/// Whole steps of an 8B Llama with random weights: all that the server's engine waits for, logits on the host included.
fn decode(device: &Arc<Device>, ceiling: f64, sizes: &Sizes) -> Result<(), CudaError> {
    let rng = &mut Rng(3);
    let c: &'static ModelConfig = Box::leak(Box::new(sizes.model.clone()));
    let numbers = numbers_of(c, rng);
    let (all, read) = weights_of(c, &numbers);
    let rope = RopeTable::new(c, 131_073);
    println!(
        "  {} layers, {:.2} GB of weights read a step; times in ms; floor: weights and cache over {:.0} GB/s",
        c.layers,
        read as f64 / 1e9,
        ceiling / 1e9
    );
    println!("  {:<20} {:>7} {:>5} {:>9} {:>9} {:>7} {:>10}", "cache", "context", "batch", "floor", "step", "%floor", "tokens/s");
    let full = Profile { name: "full".into(), cskv: None };
    for profile in [full, profile(26, 4), profile(13, 4)] {
        let layout = PageLayout::new(c, ExactType::Bf16, &profile, None);
        let page = layout.sizes();
        let compressed = profile.cskv.is_some();
        let compression = if compressed { vec![maps(&layout, &profile, rng); c.layers] } else { vec![] };
        let shapes = if compressed { &sizes.compressed } else { &sizes.exact };
        let pages = |context: usize| if compressed && context > 64 { (context / 64 - 1, 1) } else { (0, context.div_ceil(64)) };
        let bytes = |&(context, batch): &(usize, usize)| {
            let (sealed, exact) = pages(context);
            batch * (sealed * page.sealed as usize + exact * page.exact as usize + page.sinks as usize)
        };
        let arena_bytes = shapes.iter().map(bytes).max().unwrap_or(0);
        let ready = vec![ReadyProfile { layout: layout.clone(), compression }];
        let mut on = match CudaDecoder::new(device.clone(), c, &all, &rope, ready, (arena_bytes as u64, 0, 512)) {
            Ok(on) => on,
            Err(CudaRefusal::Device(e @ CudaError::NoMemory { .. })) => {
                println!("  {:<20} does not fit: {e}", profile.name);
                continue;
            }
            Err(CudaRefusal::Device(e)) => return Err(e),
            Err(e) => panic!("{e}"),
        };
        let exact = random_bf16(4 << 20);
        for shape @ &(context, batch) in shapes {
            let name = format!("{}, {context} x {batch}", profile.name);
            if std::env::var("ROW").is_ok_and(|row| !name.contains(&row)) {
                continue;
            }
            let (sealed_pages, exact_pages) = pages(context);
            let sealed_bytes = batch * sealed_pages * page.sealed as usize;
            let sealed_block = if compressed { sealed_pages_of(&layout, 32, rng) } else { vec![] };
            fill_part(on.arena(), 0, sealed_bytes, &sealed_block)?;
            fill_part(on.arena(), sealed_bytes, bytes(shape) - sealed_bytes, &exact)?;
            let mut plan = StepPlan::default();
            for row in 0..batch {
                let at = |i: usize, size: u64, base: usize| PageAddr(((base + i * size as usize) / 64) as u32);
                let first = plan.pages.len();
                plan.pages.extend((0..sealed_pages).map(|i| at(row * sealed_pages + i, page.sealed, 0)));
                let middle = plan.pages.len();
                plan.pages.extend((0..exact_pages).map(|i| at(row * exact_pages + i, page.exact, sealed_bytes)));
                let sinks = at(row, page.sinks, sealed_bytes + batch * exact_pages * page.exact as usize);
                plan.tokens.push(row as u32);
                plan.rows.push(Row {
                    seq: SeqId(row as u64),
                    profile: ProfileIndex(0),
                    adapter: AdapterGeneration(0),
                    positions: context as u32 - 1..context as u32,
                    layers: 0..c.layers as u32,
                    tokens: row..row + 1,
                    sealed: first..middle,
                    exact: middle..plan.pages.len(),
                    store: ExactStore::Exact,
                    sinks: (compressed && sealed_pages > 0).then_some(sinks),
                    moves: 0..0,
                    logits: Logits::Last,
                });
            }
            let sink = &mut Deaf { sampling: Sampling::greedy(), tokens: 0 };
            // The second time it is recorded.
            (0..3).try_for_each(|_| on.forward(&plan, &[], sink))?;
            let times = 8;
            let start = std::time::Instant::now();
            (0..times).try_for_each(|_| on.forward(&plan, &[], sink))?;
            let ms = start.elapsed().as_secs_f64() * 1e3 / f64::from(times);
            let floor = (read + bytes(shape)) as f64 / ceiling * 1e3;
            println!(
                "  {:<20} {context:>7} {batch:>5} {floor:>9.2} {ms:>9.2} {:>7.1} {:>10.1}",
                profile.name,
                100.0 * floor / ms,
                batch as f64 / ms * 1e3
            );
        }
    }
    Ok(())
}

/// Some sealed pages of all layers, of random codes.
fn sealed_pages_of(layout: &PageLayout, pages: usize, rng: &mut Rng) -> Vec<u8> {
    let size = layout.sizes().sealed as usize;
    let mut block = vec![0u8; size * pages];
    for page in block.chunks_exact_mut(size) {
        page.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
        for part in &layout.sealed {
            for at in [part.keys.meta, part.values.meta] {
                for scale in page[at..at + 128].as_chunks_mut::<2>().0 {
                    *scale = f16::from_f32(1.0 + 0.2 * rng.normal()).to_le_bytes();
                }
            }
        }
    }
    block
}

/// Steps of the same model whose rows wear LoRAs on all linear layers: none, one for all, each its own.
fn adapters(device: &Arc<Device>, ceiling: f64, sizes: &Sizes) -> Result<(), CudaError> {
    const CONTEXT: usize = 64;
    let rng = &mut Rng(4);
    let c: &'static ModelConfig = Box::leak(Box::new(sizes.model.clone()));
    let numbers = numbers_of(c, rng);
    let (all, read) = weights_of(c, &numbers);
    let rope = RopeTable::new(c, CONTEXT + 1);
    let profile = Profile { name: "full".into(), cskv: None };
    let layout = PageLayout::new(c, ExactType::Bf16, &profile, None);
    let page = layout.sizes().exact as usize;
    let floats: Vec<f32> = (0..1 << 20).map(|_| rng.normal() * 0.03).collect();
    let some = |n: usize| floats.iter().copied().cycle().take(n).collect::<Vec<f32>>();
    let lora = |rank: usize| {
        let mut delta = Delta::new(c.layers);
        for layer in &mut delta.layers {
            for site in Site::ALL {
                let (out, inputs) = site.shape(c);
                let factors = Some(Factors::new((&some(rank * inputs), &some(out * rank)), rank, HeldAs::Bf16));
                layer.sites[site as usize] = Some(Box::new(SiteDelta { factors, ..SiteDelta::default() }));
            }
        }
        Arc::new(delta)
    };
    println!("  {} layers, `full`, {CONTEXT} positions; times in ms; floor: weights and factors over {:.0} GB/s", c.layers, ceiling / 1e9);
    println!(
        "  {:>5} {:>5} {:<14} {:>9} {:>9} {:>7} {:>8} {:>10}",
        "rank", "batch", "rows wear", "floor", "step", "%floor", "of bare", "upload"
    );
    for rank in [16, 64] {
        let one = lora(rank);
        let batches = sizes.wearers;
        let most = batches[1];
        let deltas: Vec<(AdapterGeneration, Arc<Delta>)> =
            (0..most as u64).map(|i| (AdapterGeneration(i + 1), Arc::new((*one).clone()))).collect();
        let given: Vec<_> = deltas.iter().map(|(id, delta)| (*id, delta)).collect();
        let ready = vec![ReadyProfile { layout: layout.clone(), compression: vec![] }];
        let memory = ((most * page) as u64, one.bytes() * most as u64 * 17 / 16, 512);
        let mut on = match CudaDecoder::new(device.clone(), c, &all, &rope, ready, memory) {
            Ok(on) => on,
            Err(CudaRefusal::Device(e @ CudaError::NoMemory { .. })) => {
                println!("  {rank:>5} does not fit: {e}");
                continue;
            }
            Err(CudaRefusal::Device(e)) => return Err(e),
            Err(e) => panic!("{e}"),
        };
        fill_part(on.arena(), 0, most * page, &random_bf16(4 << 20))?;
        for batch in batches {
            let mut bare = 0.0;
            for (wear, distinct) in [("nothing", 0), ("one for all", 1), ("each its own", batch)] {
                let mut plan = StepPlan::default();
                for row in 0..batch {
                    plan.pages.push(PageAddr((row * page / 64) as u32));
                    plan.tokens.push(row as u32);
                    plan.rows.push(Row {
                        seq: SeqId(row as u64),
                        profile: ProfileIndex(0),
                        adapter: AdapterGeneration(if distinct == 0 { 0 } else { (row % distinct) as u64 + 1 }),
                        positions: CONTEXT as u32 - 1..CONTEXT as u32,
                        layers: 0..c.layers as u32,
                        tokens: row..row + 1,
                        sealed: 0..0,
                        exact: row..row + 1,
                        store: ExactStore::Exact,
                        sinks: None,
                        moves: 0..0,
                        logits: Logits::Last,
                    });
                }
                let sink = &mut Deaf { sampling: Sampling::greedy(), tokens: 0 };
                // The first time copies what it wears, the second it is recorded.
                let before = on.adapters().count();
                let start = std::time::Instant::now();
                on.forward(&plan, &given, sink)?;
                let upload = start.elapsed().as_secs_f64() * 1e3 / (on.adapters().count() - before).max(1) as f64;
                (0..2).try_for_each(|_| on.forward(&plan, &given, sink))?;
                let times = 8;
                let start = std::time::Instant::now();
                (0..times).try_for_each(|_| on.forward(&plan, &given, sink))?;
                let ms = start.elapsed().as_secs_f64() * 1e3 / f64::from(times);
                bare = if distinct == 0 { ms } else { bare };
                let floor = (read + batch * page + distinct * one.bytes() as usize) as f64 / ceiling * 1e3;
                println!(
                    "  {rank:>5} {batch:>5} {wear:<14} {floor:>9.2} {ms:>9.2} {:>7.1} {:>8.3} {:>10.2}",
                    100.0 * floor / ms,
                    bare / ms,
                    if distinct == 0 { 0.0 } else { upload }
                );
            }
        }
    }
    Ok(())
}
