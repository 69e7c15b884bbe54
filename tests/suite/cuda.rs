//! The CUDA backend against the definition: the host's code and the kernels' source, on an emulated driver whose device is this CPU
//! (`kernels/emulation`), or on a real one with `STRAIT_TEST_CUDA=real`.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use strait::compress::artifact::{Artifact, Fingerprint};
use strait::engine::thread::{Broken, EngineThread, Parts, Runner, start};
use strait::engine::{EngineHandle, TokenStream};
use strait::ids::{AdapterGeneration, PageAddr, SeqId};
use strait::kv::Arena;
use strait::kv::layout::{BasisKind, ExactType, PageLayout, Profile, Size};
use strait::model::checkpoint::Checkpoint;
use strait::model::cuda::CudaDecoder;
use strait::model::decoder::{Decoder, LogitsSink, Pass, ReadyProfile};
use strait::model::delta::Delta;
use strait::model::weights::LoadDtype;
use strait::ops::cuda::attend::{ARENA_SLACK, Append, AttendLayer, DeviceWork, SealedItem, Work, exact_span, sealed_spans};
use strait::ops::cuda::maps::{DeviceMaps, serves};
use strait::ops::cuda::rows::Rope;
use strait::ops::cuda::{CudaError, Device, Memory, Own};
use strait::ops::reference::Reference;
use strait::ops::{AttendRow, Heads, LayerView};
use strait::request::{Event, Failure, GenerateRequest};
use strait::scheduler::{self, ProfileSizes, RowResult, Scheduler};
use strait::step::StepPlan;

use crate::ops::{Cache, LAYER, Rng, Sequence, assert_near, assert_same, heads, turned};
use crate::{emulated, engine};

/// Whether the tests run on a real device.
fn real() -> bool {
    std::env::var("STRAIT_TEST_CUDA").is_ok_and(|v| v == "real")
}

/// The device of all tests.
pub(crate) fn device() -> Arc<Device> {
    static DEVICE: OnceLock<Result<Arc<Device>, String>> = OnceLock::new();
    let open = || {
        if !real() {
            emulated::load()?;
        }
        Device::open(0).map_err(|e| e.to_string())
    };
    DEVICE.get_or_init(open).clone().unwrap_or_else(|e| panic!("{e}"))
}

/// And as it would be without kernels of its own architecture.
pub(crate) fn devices() -> [Arc<Device>; 2] {
    static COMMON: OnceLock<Arc<Device>> = OnceLock::new();
    let own = device();
    let common = COMMON.get_or_init(|| Device::open_common(own.ordinal()).unwrap()).clone();
    [own, common]
}

/// The same with a stream of its own: for what records launches, which must not be those of another test.
pub(crate) fn own_device() -> Arc<Device> {
    Device::open(device().ordinal()).unwrap()
}

/// Attention of the last `n` positions of each sequence on the device.
pub(crate) fn attend(device: &Arc<Device>, cache: &Cache, rows: &[(&Sequence, usize)], q: &[f32]) -> Vec<f32> {
    attend_in(device, cache, rows, q, 0)
}

/// As [`attend`], of one row whose sealed pages are cut into spans of so many pages; as they would be where that is zero.
pub(crate) fn attend_in(device: &Arc<Device>, cache: &Cache, rows: &[(&Sequence, usize)], q: &[f32], each: usize) -> Vec<f32> {
    let shape = cache.shape;
    let layout = &cache.layout;
    serves(&cache.view(), shape, device.shared).unwrap();
    let mut work = Work::default();
    let mut first = 0;
    for &(seq, n) in rows {
        let row = AttendRow {
            view: cache.view(),
            first,
            n,
            position: (seq.len - n) as u32,
            sealed: &seq.sealed,
            sinks: seq.sinks,
            exact: &seq.exact,
            exact_offset: 0,
        };
        work.push(first as u32, &row);
        first += n;
    }
    if each > 0 {
        let (first, pages) = (work.sealed[0], work.sealed.iter().map(|i| i.pages as usize).sum::<usize>());
        work.sealed = (0..pages)
            .step_by(each)
            .map(|at| SealedItem {
                table: first.table + at as u32,
                pages: each.min(pages - at) as u32,
                skip: if at == 0 { first.skip } else { 0 },
                page: at as u32,
                ..first
            })
            .collect();
        work.rows[0].sealed_end = work.sealed.len() as u32;
    }
    let maps = cache.compression.as_ref().filter(|_| !layout.drops).map(|_| DeviceMaps::new(device, &cache.view(), shape).unwrap());
    let rope = [&cache.table.cos, &cache.table.sin].map(|x| device.upload(x).unwrap());
    let mut arena = device.alloc::<u8>(cache.arena.len() + ARENA_SLACK).unwrap();
    arena.write(0, cache.arena.slice::<u8>(PageAddr(0), 0, cache.arena.len())).unwrap();
    let q = device.upload(q).unwrap();
    let mut out = device.alloc::<u16>(q.len()).unwrap();
    let mut out_f32 = device.alloc::<f32>(q.len()).unwrap();
    out.fill(0xff).unwrap();
    out_f32.fill(0xff).unwrap();
    let mut on = DeviceWork::new(device).unwrap();
    on.set(&work, shape, &layout.sealed, first).unwrap();
    // Other queries first: what a launch leaves behind is nothing to the next.
    let other = device.upload(&vec![0.5f32; q.len()]).unwrap();
    let layer = |q: &Memory<f32>| AttendLayer {
        view: cache.view(),
        shape,
        exact_offset: LAYER * layout.exact_layer_bytes(),
        maps: maps.as_ref(),
        arena: arena.ptr(),
        rope: [rope[0].ptr(), rope[1].ptr()],
        q: q.ptr(),
        out: out.ptr(),
        out_f32: out_f32.ptr(),
        batch: first,
        append: Append::default(),
    };
    on.attend(device, &layer(&other)).unwrap();
    on.attend(device, &layer(&q)).unwrap();
    let halves: Vec<f32> = out.to_vec().unwrap().iter().map(|&b| half::bf16::from_bits(b).to_f32()).collect();
    let out = out_f32.to_vec().unwrap();
    let rounded: Vec<f32> = out.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
    assert_same(&halves, &rounded, format_args!("bf16 of the same"));
    out
}

pub(crate) fn rms(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (off / want.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

#[test]
fn the_device_is_found_and_errors_say_what_to_do() {
    let device = device();
    assert!(device.describe().contains("compute capability"), "{}", device.describe());
    // What a driver makes of the image's code for Hopper lets launches overlap; it would be slower without a word otherwise.
    assert!(device.overlaps() || !device.runs(Own::Linear), "{}", device.describe());
    let count = Device::count().unwrap();
    match Device::open(count) {
        Err(e @ CudaError::NoSuchDevice { .. }) => assert!(e.to_string().contains("numbered from 0"), "{e}"),
        other => panic!("{:?}", other.map(|d| d.describe())),
    }
    let data: Vec<u32> = (0..1000).collect();
    let memory = device.upload(&data).unwrap();
    assert_eq!(memory.to_vec().unwrap(), data);
    let mut part = [0; 3];
    memory.read(500, &mut part).unwrap();
    assert_eq!(part, [500, 501, 502]);
}

#[test]
fn exact_attention_on_the_device_agrees_with_the_definition() {
    let device = device();
    for (exact, shape) in [
        (ExactType::F32, heads(4, 4, 64)),
        (ExactType::Bf16, heads(2, 1, 80)),
        (ExactType::F32, heads(4, 1, 96)),
        (ExactType::Bf16, heads(7, 1, 128)),
        (ExactType::Bf16, heads(10, 2, 64)),
        (ExactType::Bf16, heads(3, 3, 96)),
        (ExactType::F32, heads(2, 1, 80)),
        (ExactType::F32, heads(2, 2, 128)),
    ] {
        for (before, n) in [(0, 1), (0, 3), (62, 3), (127, 1), (500, 2), (64 * 17 + 5, 1)] {
            let cache = &mut Cache::new(exact, shape, None);
            let mut seq = Sequence::default();
            cache.extend(&mut seq, before + n);
            let q = cache.queries(n);
            let want = cache.attend(&Reference, &[(&seq, n)], &q);
            let got = attend(&device, cache, &[(&seq, n)], &q);
            let Heads { heads, kv_heads, head_dim, .. } = shape;
            assert_near(&got, &want, 2e-5, format_args!("{exact:?} {heads}/{kv_heads} of {head_dim}, {before}+{n}"));
        }
    }
}

#[test]
fn sealed_attention_on_the_device_agrees_with_the_definition() {
    for (bits, sinks, exact, shape) in [
        ((4, 4), 4, ExactType::Bf16, heads(8, 2, 64)),
        ((4, 4), 0, ExactType::F32, heads(3, 3, 80)),
        ((4, 4), 17, ExactType::F32, heads(32, 4, 96)),
        ((4, 4), 64, ExactType::Bf16, heads(20, 4, 128)),
        ((3, 3), 4, ExactType::F32, heads(4, 2, 64)),
        ((3, 3), 0, ExactType::Bf16, heads(32, 8, 64)),
        ((2, 2), 5, ExactType::Bf16, heads(4, 2, 64)),
        ((2, 2), 0, ExactType::F32, heads(32, 4, 80)),
        ((4, 2), 3, ExactType::Bf16, heads(8, 2, 64)),
        ((2, 4), 0, ExactType::F32, heads(32, 4, 64)),
        ((3, 4), 9, ExactType::Bf16, heads(17, 1, 128)),
        ((4, 3), 0, ExactType::Bf16, heads(8, 2, 96)),
        ((2, 3), 0, ExactType::F32, heads(4, 4, 64)),
        ((3, 2), 1, ExactType::Bf16, heads(16, 2, 128)),
        // Sums of 8 warps: more than 256 value channels.
        ((4, 4), 4, ExactType::Bf16, heads(12, 12, 64)),
        ((2, 2), 4, ExactType::Bf16, heads(20, 10, 64)),
    ] {
        for pages in [1, 5] {
            let mut profile = turned(bits.0, sinks, BasisKind::Frequency, [true, true]);
            let Size::Shares { value_bits, .. } = &mut profile.size else { unreachable!("a profile of shares") };
            *value_bits = bits.1;
            let cache = &mut Cache::new(exact, shape, Some(profile));
            let mut seq = Sequence::default();
            cache.extend(&mut seq, pages * 64 + 64 + 10);
            cache.seal(&Reference, &mut seq, pages);
            let q = cache.queries(2);
            let want = cache.attend(&Reference, &[(&seq, 2)], &q);
            for device in devices() {
                let off = rms(&attend(&device, cache, &[(&seq, 2)], &q), &want);
                // Queries and weights have the 11 bits of f16, partial results too.
                let Heads { heads, kv_heads, head_dim, .. } = shape;
                let on = if device.runs(Own::Sealed) { "warpgroups" } else { "warps" };
                assert!(off < 3e-3, "{bits:?} bits, {exact:?} {heads}/{kv_heads} of {head_dim}, {pages} pages, {on}: off by {off:e}");
            }
        }
    }
}

#[test]
fn long_spans_of_sealed_pages_agree_with_the_definition() {
    for bits in [4, 3, 2] {
        let cache = &mut Cache::new(ExactType::F32, heads(2, 1, 64), Some(turned(bits, 4, BasisKind::Frequency, [true, true])));
        let mut seq = Sequence::default();
        cache.extend(&mut seq, 40 * 64 + 70);
        cache.seal(&Reference, &mut seq, 40);
        // Maxima that move from tile to tile, and back.
        let q: Vec<f32> = cache.queries(1).iter().map(|x| 2.0 * x).collect();
        let want = cache.attend(&Reference, &[(&seq, 1)], &q);
        for (most, device) in devices().iter().flat_map(|device| [(8, device), (32, device)]) {
            let off = rms(&attend_in(device, cache, &[(&seq, 1)], &q, most), &want);
            assert!(off < 3e-3, "{bits} bits, spans of {most} pages, warpgroups {}: off by {off:e}", device.runs(Own::Sealed));
        }
    }
}

#[test]
fn a_row_on_the_device_does_not_depend_on_its_batch() {
    let cache = &mut Cache::new(ExactType::Bf16, heads(8, 2, 64), Some(turned(4, 4, BasisKind::Frequency, [true, true])));
    let (mut one, mut two) = (Sequence::default(), Sequence::default());
    cache.extend(&mut one, 14 * 64 + 70);
    cache.seal(&Reference, &mut one, 13);
    cache.extend(&mut two, 40);
    let q = cache.queries(4);
    let width = 8 * 64;
    for device in devices() {
        let all = attend(&device, cache, &[(&two, 3), (&one, 1)], &q);
        assert_same(&attend(&device, cache, &[(&one, 1)], &q[3 * width..]), &all[3 * width..], format_args!("alone"));
        assert_same(&attend(&device, cache, &[(&two, 3)], &q[..3 * width]), &all[..3 * width], format_args!("the others"));
    }
}

#[test]
fn exact_rows_come_to_the_same_where_their_own_blocks_merge_them() {
    let device = device();
    // Heads in groups of four, of less, and of more than four; one span, and several of unlike lengths.
    for shape in [heads(8, 2, 64), heads(3, 1, 80), heads(6, 1, 96), heads(4, 2, 128)] {
        let cache = &mut Cache::new(ExactType::Bf16, shape, Some(turned(4, 4, BasisKind::Frequency, [true, true])));
        let (mut sealed, mut short, mut long) = (Sequence::default(), Sequence::default(), Sequence::default());
        cache.extend(&mut sealed, 3 * 64 + 70);
        cache.seal(&Reference, &mut sealed, 3);
        cache.extend(&mut short, 40);
        cache.extend(&mut long, 14 * 64 + 9);
        let q = cache.queries(4);
        let width = shape.heads * shape.head_dim;
        // Beside a row that has sealed parts they are merged by a launch of its own.
        let beside = attend(&device, cache, &[(&sealed, 1), (&short, 1), (&long, 2)], &q);
        let alone = attend(&device, cache, &[(&short, 1), (&long, 2)], &q[width..]);
        assert_same(&alone, &beside[width..], format_args!("{} heads over {} of {}", shape.heads, shape.kv_heads, shape.head_dim));
    }
}

#[test]
fn positions_that_attention_appends_come_to_the_bits_of_those_appended_before() {
    let device = device();
    let last = |len: usize| len - 1;
    // Lengths of each sequence: within a page, which warps share by quarters or halves; more pages; ends of both; spans that are merged.
    let lens: [usize; 12] = [1, 15, 16, 17, 63, 64, 65, 100, 128, 129, 320, 64 * 40 + 5];
    for (exact, shape, normed) in [
        (ExactType::Bf16, Heads { heads: 8, kv_heads: 2, head_dim: 128, scale: 0.09 }, true),
        (ExactType::F32, Heads { heads: 6, kv_heads: 1, head_dim: 64, scale: 0.125 }, false),
        (ExactType::Bf16, Heads { heads: 3, kv_heads: 1, head_dim: 80, scale: 0.11 }, true),
    ] {
        let Heads { heads, kv_heads, head_dim: d, .. } = shape;
        let rng = &mut Rng::seeded(41);
        let mut numbers = |n: usize| rng.normals(n);
        let layout = PageLayout { exact, layers: 1, kv_heads, head_dim: d, hidden: 0, window: 0, sinks: 0, sealed: vec![], drops: false };
        let page = layout.exact_layer_bytes();
        let pages: usize = lens.iter().map(|len| len.div_ceil(64)).sum();
        let content: Vec<u8> = match exact {
            ExactType::Bf16 => numbers(pages * page / 2).into_iter().flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            ExactType::F32 => numbers(pages * page / 4).into_iter().flat_map(f32::to_le_bytes).collect(),
        };
        let (q, k, v) = (numbers(lens.len() * heads * d), numbers(lens.len() * kv_heads * d), numbers(lens.len() * kv_heads * d));
        let norms = [numbers(d), numbers(d)].map(|norm| device.upload(&norm).unwrap());
        let [cos, sin] = [f32::cos, f32::sin].map(|f| {
            let angles =
                (0..lens[lens.len() - 1] * d / 2).map(|i| f((i / (d / 2)) as f32 / 1e4f32.powf((i % (d / 2)) as f32 * 2.0 / d as f32)));
            device.upload(&angles.collect::<Vec<f32>>()).unwrap()
        });
        let positions = device.upload(&lens.map(|len| last(len) as u32)).unwrap();
        let (mut work, mut at, mut ends) = (Work::default(), 0, vec![]);
        for (row, &len) in lens.iter().enumerate() {
            let own: Vec<_> = (at..at + len.div_ceil(64)).map(|i| PageAddr((i * page / 64) as u32)).collect();
            at += own.len();
            ends.push(own[own.len() - 1].0);
            let view = LayerView { layer: 0, layout: &layout, compression: None };
            work.push(
                row as u32,
                &AttendRow { view, first: row, n: 1, position: last(len) as u32, sealed: &[], sinks: None, exact: &own, exact_offset: 0 },
            );
        }
        let ends = device.upload(&ends).unwrap();
        let run = |before: bool| {
            let mut arena = device.alloc::<u8>(content.len() + ARENA_SLACK).unwrap();
            arena.write(0, &content).unwrap();
            let (q, k, v) = (device.upload(&q).unwrap(), device.upload(&k).unwrap(), device.upload(&v).unwrap());
            let norm = |i: usize| normed.then(|| norms[i].all());
            let mut append = Append::default();
            if before {
                let rope = Rope {
                    q: q.all(),
                    k: k.all(),
                    v: v.all(),
                    q_norm: norm(0),
                    k_norm: norm(1),
                    eps: 1e-5,
                    cos: &cos,
                    sin: &sin,
                    positions: positions.all(),
                    pages: ends.all(),
                    arena: &arena,
                    offset: 0,
                    exact,
                };
                device.rope_append(&rope, shape).unwrap();
            } else {
                let at = |i| norm(i).map_or(0, |n| n.ptr());
                append = Append {
                    k: k.ptr(),
                    v: v.ptr(),
                    q_norm: at(0),
                    k_norm: at(1),
                    cos: cos.ptr(),
                    sin: sin.ptr(),
                    positions: positions.ptr(),
                    eps: 1e-5,
                };
            }
            let mut out = device.alloc::<u16>(lens.len() * heads * d).unwrap();
            let mut out_f32 = device.alloc::<f32>(lens.len() * heads * d).unwrap();
            out.fill(0xff).unwrap();
            out_f32.fill(0xff).unwrap();
            let mut on = DeviceWork::new(&device).unwrap();
            on.set(&work, shape, &[], lens.len()).unwrap();
            assert!(on.appends(lens.len()) && !on.appends(lens.len() + 1));
            let layer = AttendLayer {
                view: LayerView { layer: 0, layout: &layout, compression: None },
                shape,
                exact_offset: 0,
                maps: None,
                arena: arena.ptr(),
                rope: [0; 2],
                q: q.ptr(),
                out: out.ptr(),
                out_f32: out_f32.ptr(),
                batch: lens.len(),
                append,
            };
            on.attend(&device, &layer).unwrap();
            (out_f32.to_vec().unwrap(), arena.to_vec().unwrap()[..content.len()].to_vec())
        };
        let (want, kept) = run(true);
        let (got, held) = run(false);
        assert!(want.iter().all(|x| x.is_finite()) && kept != content);
        assert_same(&got, &want, format_args!("{heads} heads over {kv_heads} of {d}"));
        assert_eq!(held, kept, "{heads} heads over {kv_heads} of {d}: pages");
    }
    // Positions of one sequence meet each other's, and sealed pages absorbed queries: both are appended before.
    let mut on = DeviceWork::new(&device).unwrap();
    let shape = Heads { heads: 1, kv_heads: 1, head_dim: 64, scale: 0.125 };
    let layout = PageLayout {
        exact: ExactType::F32,
        layers: 1,
        kv_heads: 1,
        head_dim: 64,
        hidden: 0,
        window: 0,
        sinks: 0,
        sealed: vec![],
        drops: false,
    };
    let view = LayerView { layer: 0, layout: &layout, compression: None };
    let mut work = Work::default();
    work.push(0, &AttendRow { view, first: 0, n: 2, position: 3, sealed: &[], sinks: None, exact: &[PageAddr(0)], exact_offset: 0 });
    on.set(&work, shape, &[], 2).unwrap();
    assert!(!on.appends(2));
}

#[test]
fn spans_are_whole_tiles_that_follow_from_the_length() {
    for (pages, want) in [(0, 0), (1, 4), (256, 4), (257, 8), (512, 8), (2048, 32), (1 << 20, 32)] {
        assert_eq!(exact_span(pages), want, "{pages} pages");
    }
    // Long spans of sealed pages, how many, and short ones.
    for (pages, long) in [
        (0, (0, 0, 0)),
        (1, (8, 0, 1)),
        (17, (8, 0, 3)),
        (512, (8, 0, 64)),
        (513, (16, 24, 17)),
        (1024, (16, 48, 32)),
        (1025, (16, 48, 33)),
        (2048, (16, 96, 64)),
        (4096, (32, 112, 64)),
        (1 << 20, (32, 32752, 64)),
    ] {
        let spans = sealed_spans(pages);
        let (each, n, short) = long;
        let end = pages - n * each;
        let want: Vec<usize> = std::iter::repeat_n(each, n).chain((0..short).map(|i| (end - 8 * i).min(8))).collect();
        assert_eq!((spans.iter().sum::<usize>(), spans), (pages, want), "{pages} pages");
    }
}

/// Logits of a pass, by plan row and position.
#[derive(Default)]
pub(crate) struct Kept(pub(crate) BTreeMap<(usize, u32), Vec<f32>>);

impl LogitsSink for Kept {
    fn logits(&mut self, row: usize, position: u32, logits: &mut [f32]) {
        self.0.insert((row, position), logits.to_vec());
    }
}

pub(crate) fn settings(layers: u32, budget: u32, arena_bytes: u64, profiles: Vec<ProfileSizes>) -> scheduler::Config {
    scheduler::Config {
        max_num_seqs: 8,
        max_num_batched_tokens: budget,
        max_queued_requests: 16,
        max_queued_tokens: 1 << 20,
        layers,
        max_model_len: 1024,
        arena_bytes,
        profiles,
        prefix_caching: true,
        hash_secret: [7; 32],
        model_digest: [1; 32],
    }
}

pub(crate) fn request(prompt: &[u32], new: u32, profile: u8) -> GenerateRequest {
    GenerateRequest { logprobs: None, ..engine::request(prompt, new, profile) }
}

/// The scheduler's plans for some requests, carried out by the host and by the device, each on a cache of its own, until all are
/// done: at every position whose logits are wanted both must say the same. The host's tokens go on.
///
/// A request is the seed and length of its prompt, tokens to say, and profile; those of a wave begin together, and prompts of one seed
/// begin alike. Unless the device goes on with a cache of its `own`, it gets the host's after every step. Gives by how much logits differ.
pub(crate) fn in_lockstep(
    checkpoint: &'static Checkpoint,
    profiles: Vec<ReadyProfile>,
    waves: &[&[(u64, usize, u32, u8)]],
    budget: u32,
    own: bool,
) -> Vec<f64> {
    worn_in_lockstep(&own_device(), checkpoint, profiles, waves, (budget, own), &Wardrobe::default())
}

/// What requests wear: the first the first of `wears`, and so on; the model alone where there are none.
#[derive(Default)]
pub(crate) struct Wardrobe {
    pub(crate) adapters: Vec<(AdapterGeneration, Arc<Delta>)>,
    pub(crate) wears: Vec<AdapterGeneration>,
    /// Bytes of adapters that fit the device at once.
    pub(crate) bytes: u64,
}

/// As [`in_lockstep`], under adapters, on a device that is the test's own.
pub(crate) fn worn_in_lockstep(
    device: &Arc<Device>,
    checkpoint: &'static Checkpoint,
    profiles: Vec<ReadyProfile>,
    waves: &[&[(u64, usize, u32, u8)]],
    (budget, own): (u32, bool),
    wardrobe: &Wardrobe,
) -> Vec<f64> {
    const POSITIONS: usize = 1024;
    let config = &checkpoint.config;
    let sizes: Vec<ProfileSizes> = profiles.iter().map(|p| ProfileSizes::of(&p.layout)).collect();
    let arena_bytes = 40 * profiles[0].layout.sizes().exact;
    let mut scheduler = Scheduler::new(settings(config.layers as u32, budget, arena_bytes, sizes)).unwrap();
    let mut host = Decoder::new(config, checkpoint.weights(LoadDtype::Bf16), POSITIONS, 64);
    let mut arena = Arena::new(arena_bytes).unwrap();
    let rope = host.rope().clone();
    let mut on =
        CudaDecoder::new(device.clone(), config, host.weights(), &rope, profiles.clone(), (arena_bytes, wardrobe.bytes, 64)).unwrap();
    // The definition, whose queries and weights are not rounded to 8 bits as the host's fast kernels round them.
    let ops = Reference;
    let worn: Vec<_> = wardrobe.adapters.iter().map(|(id, delta)| (*id, &**delta)).collect();
    let given: Vec<_> = wardrobe.adapters.iter().map(|(id, delta)| (*id, delta)).collect();
    let (mut all, mut now) = (Vec::new(), Duration::ZERO);
    let (mut plan, mut outcomes) = (StepPlan::default(), Vec::new());
    let mut seqs = 0..;
    for wave in waves {
        for &(seed, prompt, new, profile) in *wave {
            let mut seed = seed;
            let prompt: Vec<u32> = (0..prompt)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (seed >> 33) as u32 % config.vocab as u32
                })
                .collect();
            let seq: u64 = seqs.next().unwrap();
            let adapter = wardrobe.wears.get(seq as usize).copied().unwrap_or_default();
            scheduler.enqueue(SeqId(seq), GenerateRequest { adapter, ..request(&prompt, new, profile) }, now).unwrap();
        }
        while !scheduler.is_idle() {
            now += Duration::from_millis(1);
            scheduler.plan(now, &mut plan, &mut outcomes);
            let (mut a, mut b) = (Kept::default(), Kept::default());
            host.forward(&mut Pass {
                plan: &plan,
                arena: &mut arena,
                profiles: &profiles,
                adapters: &worn,
                ops: &ops,
                sink: &mut a,
                observer: None,
            });
            on.forward(&plan, &given, &mut b).unwrap();
            let (held, largest) =
                (on.adapters().map(|(_, bytes)| bytes).sum::<u64>(), worn.iter().map(|(_, d)| d.bytes()).max().unwrap_or(0));
            assert!(held <= wardrobe.bytes.max(largest) * 17 / 16 + 4096, "{held} bytes of adapters on the device");
            assert_eq!(a.0.keys().collect::<Vec<_>>(), b.0.keys().collect::<Vec<_>>(), "{plan}");
            for (at, want) in &a.0 {
                let off = rms(&b.0[at], want);
                // Activations are bf16 between layers; a chunk's queries and weights are rounded to it too.
                let decodes = plan.rows.iter().all(|row| row.len() == 1);
                let most = if !own && decodes {
                    0.01
                } else if own {
                    0.4
                } else {
                    0.1
                };
                assert!(off < most, "row {} position {}: off by {off:.3} in\n{plan}", at.0, at.1);
                all.push(off);
            }
            if !own {
                on.arena().write(0, arena.slice::<u8>(PageAddr(0), 0, arena.len())).unwrap();
            }
            let results: Vec<RowResult> = (0..plan.rows.len())
                .map(|row| match a.0.range((row, 0)..(row + 1, 0)).next_back() {
                    Some((_, logits)) => {
                        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                        RowResult::Token(best as u32)
                    }
                    None => RowResult::Nothing,
                })
                .collect();
            scheduler.commit(&plan, &results, now, &mut outcomes);
        }
    }
    all
}

/// The demo model in bf16 with a `full` cache and the smallest that comes with it.
pub(crate) fn demo() -> (&'static Checkpoint, Vec<ReadyProfile>) {
    let checkpoint: &'static Checkpoint = Box::leak(Box::new(strait::demo::checkpoint().unwrap()));
    let config = &checkpoint.config;
    let artifact = Artifact::from_bytes(strait::demo::ARTIFACT, config, Fingerprint(checkpoint.digest().unwrap())).unwrap();
    let small = artifact.profiles().iter().map(|s| s.profile.clone()).find(|p| p.name == "cskv-95").unwrap();
    let full = Profile { name: "full".into(), cskv: None };
    let ready = [full, small].map(|p| {
        let widths = p.cskv.as_ref().map(|_| artifact.widths(&p).unwrap());
        ReadyProfile {
            layout: PageLayout::new(config, ExactType::Bf16, &p, widths.as_deref()),
            compression: p.cskv.as_ref().map_or(vec![], |_| artifact.layers(&p).unwrap()),
        }
    });
    (checkpoint, ready.into())
}

#[test]
fn the_demo_model_says_the_same_on_the_device_as_on_the_host() {
    let (checkpoint, profiles) = demo();
    // Prompts within a step and beyond it, so layer by layer; of both caches, side by side; decoding across a seal. Then prompts
    // that begin as others did: their beginning comes from sealed pages, or exact ones.
    let first: &[(u64, usize, u32, u8)] = &[(5, 20, 3, 0), (6, 150, 4, 1), (7, 70, 3, 0), (8, 230, 70, 1)];
    let again: &[(u64, usize, u32, u8)] = &[(8, 240, 3, 1), (7, 90, 2, 0), (6, 400, 2, 1)];
    let shared = in_lockstep(checkpoint, profiles.clone(), &[first, again], 160, false);
    let own = in_lockstep(checkpoint, profiles, &[first], 160, true);
    for (what, mut off, most) in [("the host's cache", shared, 0.01), ("a cache of its own", own, 0.06)] {
        off.sort_by(f64::total_cmp);
        let (median, worst) = (off[off.len() / 2], off[off.len() - 1]);
        println!("on {what} logits differ by {median:.1e} (median of {} rms) and {worst:.1e} at most", off.len());
        assert!(median < most, "on {what}: {median}");
    }
}

#[test]
fn the_image_is_of_these_sources() {
    let kernels = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut sources: Vec<_> = std::fs::read_dir(&kernels).unwrap().map(|f| f.unwrap().path()).collect();
    sources.retain(|p| p.extension().is_some_and(|e| e == "cu" || e == "cuh"));
    sources.sort();
    // FNV-1a, as `kernels/build.py` has it.
    let fnv = |data: &[u8]| data.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut all = vec![];
    for path in sources {
        all.extend(path.file_name().unwrap().as_encoded_bytes());
        all.push(0);
        all.extend(std::fs::read(&path).unwrap());
    }
    let report = std::fs::read_to_string(kernels.join("registers.txt")).unwrap();
    let said: Vec<&str> = report.lines().take(2).collect();
    let image = fnv(&std::fs::read(kernels.join("strait.fatbin")).unwrap());
    let want = [format!("sources {:016x}", fnv(&all)), format!("image {image:016x}")];
    assert_eq!(said, want, "the kernels changed: python3 kernels/build.py compiles them anew");
}

/// An engine that serves the demo model on a device of its own.
pub(crate) fn engine_on(device: Arc<Device>) -> (EngineHandle, EngineThread) {
    let (checkpoint, profiles) = demo();
    let config = &checkpoint.config;
    let sizes: Vec<ProfileSizes> = profiles.iter().map(|p| ProfileSizes::of(&p.layout)).collect();
    let arena_bytes = 40 * profiles[0].layout.sizes().exact;
    let host = Decoder::new(config, checkpoint.weights(LoadDtype::Bf16), 1024, 64);
    let on = CudaDecoder::new(device, config, host.weights(), host.rope(), profiles, (arena_bytes, 16 << 20, 64)).unwrap();
    start(Parts {
        runner: Runner::Cuda(Box::new(on)),
        scheduler: settings(config.layers as u32, 256, arena_bytes, sizes),
        emit: Box::new(|_| ()),
    })
    .unwrap()
}

pub(crate) fn hear(mut stream: TokenStream) -> Result<Vec<u32>, Failure> {
    let mut tokens = vec![];
    loop {
        match engine::event_of(&mut stream) {
            Event::Token { id, .. } => tokens.push(id),
            Event::Done { .. } => return Ok(tokens),
            Event::Failed { failure } => return Err(failure),
            Event::Prompt { .. } => {}
        }
    }
}

#[test]
fn an_engine_on_a_device_streams_and_a_lost_device_ends_it_with_an_error() {
    let own = own_device();
    let stream = own.stream().cu_stream() as usize;
    let (engine, thread) = engine_on(own);
    let prompt: Vec<u32> = (0..90).map(|i| 20 + i * 7 % 900).collect();
    let (one, two) = (engine.submit(request(&prompt, 5, 0)).unwrap(), engine.submit(request(&prompt[..30], 5, 1)).unwrap());
    let (one, two) = (hear(one).unwrap(), hear(two).unwrap());
    assert_eq!((one.len(), two.len()), (5, 5));
    // The same alone.
    assert_eq!(hear(engine.submit(request(&prompt[..30], 5, 1)).unwrap()).unwrap(), two);
    let Some(emulated) = emulated::EMULATED.get() else {
        engine.stop();
        return thread.join().unwrap().unwrap();
    };
    // SAFETY: a function of the emulated driver, of this type.
    unsafe { emulated.get::<unsafe extern "C" fn(usize, i32)>(b"strait_emulated_lose").unwrap()(stream, 100) };
    let failure = hear(engine.submit(request(&prompt, 100, 0)).unwrap()).unwrap_err();
    assert!(matches!(&failure, Failure::Internal(what) if what.contains("device")), "{failure:?}");
    assert_eq!(thread.join().unwrap(), Err(Broken::DeviceLost));
    assert!(engine.submit(request(&prompt, 1, 0)).is_err(), "nobody is left to serve");
}
