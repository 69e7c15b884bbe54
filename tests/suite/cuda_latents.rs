//! Sealed pages of every basis and quantiser on the device, against the definition: sealing, decoding, and chunks of queries over them.

use strait::kv::layout::{BasisKind, Cskv, ExactType, Quantiser, Size, Width, Widths};
use strait::ops::Heads;
use strait::ops::reference::Reference;

use crate::cuda::{attend, device, rms};
use crate::ops::{Cache, Sequence, assert_same, heads, turned};

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
