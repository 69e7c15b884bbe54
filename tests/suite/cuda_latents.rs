//! Sealed pages of every basis and quantiser on the device, against the definition: sealing, decoding, and chunks of queries over them.

use std::sync::Arc;

use strait::compress::{FrequencyMap, Group, KeyMap, LayerCompression, Projection};
use strait::config::profiles::builtin;
use strait::ids::PageAddr;
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Quantiser, SealedLayer, Size};
use strait::model::checkpoint::Checkpoint;
use strait::model::config::ModelConfig;
use strait::model::decoder::ReadyProfile;
use strait::ops::cuda::Device;
use strait::ops::cuda::attend::{ARENA_SLACK, Append, AttendLayer};
use strait::ops::cuda::maps::{DeviceMaps, Unserved, serves};
use strait::ops::cuda::prefill::Prefill;
use strait::ops::cuda::seal::{DownMaps, SealedJob, seal};
use strait::ops::reference::Reference;
use strait::ops::{AttendRow, Heads, LayerView};

use crate::cuda::{attend, device, devices, in_lockstep, rms};
use crate::ops::{Cache, LAYER, Sequence, assert_same, heads, turned};

/// Shares of the channels that give odd ranks, at these bits of keys and values, by the Hadamard quantiser or not.
fn profile(basis: BasisKind, (key_bits, value_bits): (u32, u32), turns: [bool; 2], sinks: u32) -> Cskv {
    let size = Size::Shares { key_rank: 0.32, value_rank: 0.43, key_bits, value_bits };
    Cskv { size, ..turned(4, sinks, basis, turns) }
}

/// Every kind of latents at least once with every kind of basis.
fn table() -> Vec<(Cskv, ExactType, Heads)> {
    use BasisKind::{Frequency, Grouped, Identity, Joint};
    use ExactType::{Bf16, F32};
    let (affine, turned, keys, values) = ([false; 2], [true; 2], [true, false], [false, true]);
    let mut all = vec![];
    let mut add = |basis, bits, turns, sinks, exact, shape| all.push((profile(basis, bits, turns, sinks), exact, shape));
    add(Joint, (16, 16), affine, 0, F32, heads(4, 2, 64));
    add(Joint, (8, 8), affine, 4, Bf16, heads(3, 3, 80));
    add(Joint, (4, 4), affine, 17, F32, heads(4, 2, 96));
    add(Joint, (3, 3), affine, 4, Bf16, heads(8, 1, 128));
    add(Joint, (2, 2), affine, 64, F32, heads(4, 2, 64));
    add(Joint, (4, 4), turned, 4, Bf16, heads(4, 2, 128));
    add(Joint, (3, 2), turned, 0, F32, heads(2, 2, 64));
    add(Joint, (2, 3), turned, 5, Bf16, heads(10, 1, 64));
    add(Joint, (4, 8), keys, 4, F32, heads(2, 1, 80));
    add(Joint, (8, 4), values, 4, F32, heads(2, 1, 64));
    add(Grouped(1), (16, 16), affine, 4, Bf16, heads(3, 3, 64));
    add(Grouped(2), (8, 4), affine, 4, F32, heads(4, 4, 64));
    add(Grouped(1), (4, 3), turned, 0, Bf16, heads(6, 3, 80));
    add(Grouped(2), (2, 4), turned, 5, F32, heads(4, 4, 96));
    add(Frequency, (16, 16), affine, 4, F32, heads(4, 2, 64));
    add(Frequency, (8, 8), affine, 0, Bf16, heads(8, 2, 80));
    add(Frequency, (4, 4), affine, 17, F32, heads(20, 4, 64));
    add(Frequency, (3, 3), affine, 4, F32, heads(3, 3, 96));
    add(Frequency, (2, 2), affine, 4, Bf16, heads(4, 1, 128));
    add(Frequency, (4, 8), keys, 4, F32, heads(34, 2, 64));
    add(Frequency, (3, 4), [true, true], 4, F32, heads(3, 3, 64));
    add(Identity, (16, 16), affine, 4, Bf16, heads(4, 2, 64));
    add(Identity, (8, 8), affine, 0, F32, heads(2, 2, 80));
    add(Identity, (4, 2), affine, 4, Bf16, heads(6, 2, 96));
    add(Identity, (4, 3), turned, 4, F32, heads(4, 2, 64));
    add(Identity, (2, 4), turned, 17, Bf16, heads(2, 1, 128));
    // Layers that keep nothing of their keys, or of their values.
    for which in [1, 2] {
        for basis in [Joint, Frequency] {
            all.push((Cskv { size: Size::Budget(which), ..crate::ops::turned(4, 4, basis, affine) }, F32, heads(4, 2, 64)));
        }
    }
    all
}

fn named((profile, exact, shape): &(Cskv, ExactType, Heads)) -> String {
    let Heads { heads, kv_heads, head_dim, .. } = shape;
    let of = |q: Quantiser| if q == Quantiser::Hadamard { "turned" } else { "affine" };
    let quantisers = [profile.key_quantiser, profile.value_quantiser].map(of);
    format!("{:?} {:?} {quantisers:?} sinks {} {exact:?} {heads}/{kv_heads} of {head_dim}", profile.basis, profile.size, profile.sinks)
}

#[test]
fn decoding_over_any_sealed_pages_agrees_with_the_definition() {
    let device = device();
    for case in table() {
        let (profile, exact, shape) = case.clone();
        let cache = &mut Cache::new(exact, shape, Some(profile));
        let mut seq = Sequence::default();
        cache.extend(&mut seq, 3 * 64 + 10);
        cache.seal(&Reference, &mut seq, 2);
        let q = cache.queries(1);
        let want = cache.attend(&Reference, &[(&seq, 1)], &q);
        let off = rms(&attend(&device, cache, &[(&seq, 1)], &q), &want);
        // Queries, latents, rebuilt keys and weights have the 11 bits of f16.
        assert!(off < 3e-3, "{}: off by {off:e}", named(&case));
    }
}

/// Attention of the last `n` positions of each sequence as chunks, sealed pages rebuilt so many at once.
fn chunks(device: &Arc<Device>, cache: &Cache, rows: &[(&Sequence, usize)], q: &[f32], span: usize) -> Vec<f32> {
    let (shape, layout) = (cache.shape, &cache.layout);
    let mut work = Prefill::in_spans(device, span).unwrap();
    let mut first = 0;
    for &(seq, n) in rows {
        let position = (seq.len - n) as u32;
        let (view, exact_offset) = (cache.view(), LAYER * layout.exact_layer_bytes());
        work.push(
            first as u32,
            &AttendRow { view, first, n, position, sealed: &seq.sealed, sinks: seq.sinks, exact: &seq.exact, exact_offset },
        );
        first += n;
    }
    work.set(shape).unwrap();
    let maps = (!layout.drops).then(|| DeviceMaps::new(device, &cache.view(), shape).unwrap());
    let rope = [&cache.table.cos, &cache.table.sin].map(|x| device.upload(x).unwrap());
    let mut arena = device.alloc::<u8>(cache.arena.len() + ARENA_SLACK).unwrap();
    arena.write(0, cache.arena.slice::<u8>(PageAddr(0), 0, cache.arena.len())).unwrap();
    let q = device.upload(q).unwrap();
    let mut out = device.alloc::<u16>(q.len()).unwrap();
    out.fill(0xff).unwrap();
    let layer = AttendLayer {
        view: cache.view(),
        shape,
        exact_offset: LAYER * layout.exact_layer_bytes(),
        maps: maps.as_ref(),
        arena: arena.ptr(),
        rope: [rope[0].ptr(), rope[1].ptr()],
        q: q.ptr(),
        out: out.ptr(),
        out_f32: 0,
        batch: first,
        append: Append::default(),
    };
    work.attend(device, &layer).unwrap();
    out.to_vec().unwrap().iter().map(|&b| half::bf16::from_bits(b).to_f32()).collect()
}

#[test]
fn chunks_over_any_sealed_pages_agree_with_the_definition() {
    let mut cases: Vec<_> = table().into_iter().filter(|(_, exact, _)| *exact == ExactType::Bf16).collect();
    // What single positions meet as words, and what drops all but its sinks.
    cases.push((profile(BasisKind::Frequency, (4, 3), [true; 2], 4), ExactType::Bf16, heads(4, 2, 64)));
    for sinks in [4, 0] {
        cases.push((Cskv { sinks, ..crate::ops::turned(4, 4, BasisKind::Dropped, [false; 2]) }, ExactType::Bf16, heads(4, 2, 64)));
    }
    for case in cases {
        let (profile, exact, shape) = case.clone();
        let cache = &mut Cache::new(exact, shape, Some(profile));
        let (mut one, mut two) = (Sequence::default(), Sequence::default());
        cache.extend(&mut one, 4 * 64 + 10);
        cache.seal(&Reference, &mut one, 3);
        cache.extend(&mut two, 64 + 9);
        cache.seal(&Reference, &mut two, 1);
        let rows = [(&one, 70), (&two, 5)];
        let q: Vec<f32> = cache.queries(75).iter().map(|x| x / 3.0).collect();
        let want = cache.attend(&Reference, &rows, &q);
        let width = shape.heads * shape.head_dim;
        for device in devices() {
            let got = chunks(&device, cache, &rows, &q, 2);
            let off = rms(&got, &want);
            // Queries, keys, values, weights and what comes out have the 8 bits of bf16.
            assert!(off < 8e-3, "{}: off by {off:e}", named(&case));
            assert_same(
                &chunks(&device, cache, &rows[1..], &q[70 * width..], 2),
                &got[70 * width..],
                format_args!("alone, {}", named(&case)),
            );
        }
    }
}

#[test]
fn a_row_over_spread_latents_does_not_depend_on_its_batch() {
    let device = device();
    for (basis, bits) in [(BasisKind::Joint, 4), (BasisKind::Frequency, 8)] {
        let cache = &mut Cache::new(ExactType::Bf16, heads(8, 2, 64), Some(profile(basis, (bits, bits), [false; 2], 4)));
        let (mut one, mut two) = (Sequence::default(), Sequence::default());
        cache.extend(&mut one, 10 * 64 + 70);
        cache.seal(&Reference, &mut one, 10);
        cache.extend(&mut two, 140);
        cache.seal(&Reference, &mut two, 1);
        let q = cache.queries(4);
        let width = 8 * 64;
        let all = attend(&device, cache, &[(&two, 3), (&one, 1)], &q);
        assert_same(&attend(&device, cache, &[(&one, 1)], &q[3 * width..]), &all[3 * width..], format_args!("alone"));
        assert_same(&attend(&device, cache, &[(&two, 3)], &q[..3 * width]), &all[..3 * width], format_args!("the others"));
    }
}

#[test]
fn sealed_bytes_are_those_of_the_definition_but_for_ties() {
    let device = device();
    for case in table() {
        let (profile, exact, shape) = case.clone();
        let mut cache = Cache::new(exact, shape, Some(profile));
        let mut seq = Sequence::default();
        cache.extend(&mut seq, 200);
        // Exact pages as they are before they are sealed; where they go to is what the definition takes.
        let len = cache.arena.len();
        let mut arena = device.alloc::<u8>(len + ARENA_SLACK).unwrap();
        arena.write(0, cache.arena.slice::<u8>(PageAddr(0), 0, len)).unwrap();
        let from = seq.exact.clone();
        cache.seal(&Reference, &mut seq, 2);
        let sinks = cache.layout.sinks;
        let offset = (LAYER * cache.layout.exact_layer_bytes()) as u32;
        let jobs: Vec<SealedJob> = (0..2)
            .map(|i| {
                let skip = if i == 0 { sinks } else { 0 };
                SealedJob { from: from[i].0, offset, to: seq.sealed[i].0, skip, position: 64 * i as u32 }
            })
            .collect();
        let jobs = device.upload(&jobs).unwrap();
        let maps = DownMaps::new(&device, cache.compression.as_ref().unwrap()).unwrap();
        let rope = [&cache.table.cos, &cache.table.sin].map(|x| device.upload(x).unwrap());
        let mut latents = device.alloc::<f32>(1).unwrap();
        seal(&device, &arena, (&cache.layout, LAYER), &maps, [&rope[0], &rope[1]], (&jobs, 2), &mut latents).unwrap();
        let sealed = cache.layout.sealed[LAYER];
        let (mut different, mut all) = (0, 0);
        for page in &seq.sealed {
            let mut got = vec![0u8; sealed.bytes()];
            arena.read(page.byte() as usize + sealed.keys.codes, &mut got).unwrap();
            let want = cache.arena.slice::<u8>(*page, sealed.keys.codes, sealed.bytes());
            // Of numbers beside a boundary, codes go to the next one, and scales to the next f16.
            different += got.iter().zip(want).filter(|(a, b)| a != b).count();
            all += got.len();
        }
        assert!(different * 250 <= all, "{}: {different} bytes of {all} differ", named(&case));
    }
}

/// A joint basis of three quarters of the key and the value channels, the first of them.
fn first_channels(config: &ModelConfig, profile: &Profile, layout: &PageLayout) -> ReadyProfile {
    let channels = config.kv_channels();
    let of = |rank: usize| {
        let map = |rows: usize, columns: usize| (0..rows * columns).map(|i| f32::from(u8::from(i / columns == i % columns))).collect();
        let group = Group { channels: 0..channels, ranks: 0..rank, down: map(channels, rank), up: map(rank, channels) };
        Projection { mean: vec![0.01; channels], groups: vec![group] }
    };
    let cskv = profile.cskv.as_ref().unwrap();
    let layer =
        |l: &SealedLayer| LayerCompression { keys: KeyMap::Channels(of(l.keys.rank)), values: of(l.values.rank) }.for_quantisers(cskv);
    ReadyProfile { compression: layout.sealed.iter().map(layer).collect(), layout: layout.clone() }
}

#[test]
fn the_demo_model_says_the_same_over_rebuilt_and_over_affine_latents() {
    let checkpoint: &'static Checkpoint = Box::leak(Box::new(strait::demo::checkpoint().unwrap()));
    let config = &checkpoint.config;
    let ready = |basis, bits: u32, turns| {
        let shares = Size::Shares { key_rank: 0.75, value_rank: 0.75, key_bits: bits, value_bits: bits };
        let cskv = Cskv { size: shares, window: 64, ..crate::ops::turned(4, 4, basis, turns) };
        let profile = Profile { name: format!("{basis:?}"), cskv: Some(cskv) };
        let layout = PageLayout::new(config, ExactType::Bf16, &profile, None);
        match basis {
            BasisKind::Identity => ReadyProfile { compression: vec![LayerCompression::identity(config); config.layers], layout },
            _ => first_channels(config, &profile, &layout),
        }
    };
    let full = Profile { name: "full".into(), cskv: None };
    let full = ReadyProfile { layout: PageLayout::new(config, ExactType::Bf16, &full, None), compression: vec![] };
    let profiles = vec![full, ready(BasisKind::Joint, 4, [true; 2]), ready(BasisKind::Identity, 8, [false; 2])];
    // Decoding over sealed pages and across a seal; then prompts that begin as others did: chunks over sealed pages.
    let first: &[(u64, usize, u32, u8)] = &[(5, 150, 3, 1), (6, 190, 4, 2)];
    let again: &[(u64, usize, u32, u8)] = &[(5, 170, 2, 1), (6, 220, 2, 2)];
    let mut off = in_lockstep(checkpoint, profiles, &[first, again], 160, false);
    off.sort_by(f64::total_cmp);
    assert!(off[off.len() / 2] < 0.01, "{off:?}");
}

#[test]
fn what_blocks_have_room_for_is_served_and_the_rest_is_refused_by_name() {
    // Shared memory of a block: of an Ada or a small Blackwell, an Ampere, a Hopper.
    const SIZES: [usize; 3] = [101_376, 166_912, 232_448];
    let serves_profile = |shape: Heads, cskv: Cskv, shared: usize| {
        let Heads { heads, kv_heads, head_dim, .. } = shape;
        let demo = strait::demo::checkpoint().unwrap().config;
        let config = ModelConfig { heads, kv_heads, head_dim, layers: 1, ..demo };
        let basis = cskv.basis;
        let layout = PageLayout::new(&config, ExactType::Bf16, &Profile { name: "p".into(), cskv: Some(cskv) }, None);
        let (channels, groups, sealed) = (config.kv_channels(), basis.blocks(kv_heads), layout.sealed[0]);
        // Only their shapes are asked for.
        let even = |rank: usize| Projection {
            mean: vec![0.0; channels],
            groups: (0..groups)
                .map(|g| {
                    let part = |n: usize| g * (n / groups)..(g + 1) * (n / groups);
                    Group { channels: part(channels), ranks: part(rank), down: vec![], up: vec![] }
                })
                .collect(),
        };
        let keys = match basis {
            BasisKind::Frequency => {
                let frequencies = vec![0; sealed.keys.rank / 2];
                KeyMap::Frequencies(FrequencyMap { kv_heads, half: head_dim / 2, frequencies, down: vec![], up: vec![], rotation: None })
            }
            _ => KeyMap::Channels(even(sealed.keys.rank)),
        };
        let computed = || LayerCompression { keys, values: even(sealed.values.rank) };
        let compression = if basis == BasisKind::Identity { LayerCompression::identity(&config) } else { computed() };
        serves(&LayerView { layer: 0, layout: &layout, compression: Some(&compression) }, shape, shared)
    };
    let serves_at = |shape, basis, share, bits, shared| serves_profile(shape, Cskv::shares((share, share), bits, (64, 4), basis), shared);
    let (grouped, many) = (heads(32, 8, 128), heads(32, 32, 128));
    for shared in SIZES {
        for (shape, basis, share, bits) in [
            (grouped, BasisKind::Joint, 0.2, 4),
            (grouped, BasisKind::Joint, 0.5, 16),
            (grouped, BasisKind::Grouped(2), 0.5, 8),
            (grouped, BasisKind::Frequency, 0.5, 8),
            (many, BasisKind::Joint, 0.2, 4),
            (many, BasisKind::Joint, 0.5, 16),
            (many, BasisKind::Grouped(4), 0.5, 4),
        ] {
            serves_at(shape, basis, share, bits, shared).unwrap_or_else(|e| panic!("{basis:?} {share} {bits} in {shared}: {e}"));
        }
    }
    // What a server has without an artifact, of an 8B.
    for (Profile { name, cskv }, shared) in builtin().into_iter().flat_map(|p| SIZES.map(|shared| (p.clone(), shared))) {
        if let Some(cskv) = cskv {
            serves_profile(grouped, cskv, shared).unwrap_or_else(|e| panic!("{name} in {shared}: {e}"));
        }
    }
    let refused = serves_at(many, BasisKind::Frequency, 0.5, 16, SIZES[0]).unwrap_err();
    assert!(matches!(refused, Unserved::Shared { ranks: [2048, 2048], .. }), "{refused}");
    assert!(refused.to_string().contains("choose lower ranks"), "{refused}");
}
