//! Sealed tiles of bases over channels. Keys are rebuilt and turned by rope. Values are not: the softmax sums their latents, and
//! the sum is expanded once, after the last sealed tile of the span.

use half::f16;

use super::super::codes::{Meaning, Numbers, key_codes, value_codes};
use super::super::rows::{turn_tables, turned};
use super::super::simd::{Kernel, Lanes};
use super::super::softmax::Scaled;
use super::super::tile::{Product, Widen, by_rows};
use super::{P, Place, Room, Tile, Unit};
use crate::compress::{Group, KeyMap, LayerCompression, Projection};
use crate::ids::PageAddr;
use crate::kv::layout::{Quantiser, SealedLayer};
use crate::quant::levels;

/// What a sealed tile is rebuilt with: the groups its KV head belongs to.
pub(super) struct Basis<'a> {
    pub(super) keys: &'a Group,
    key_mean: &'a [f32],
    /// First channel of the head in the keys' group.
    key_channel: usize,
    pub(super) values: &'a Group,
    value_mean: &'a [f32],
    value_channel: usize,
    layer: SealedLayer,
}

/// The group of a projection that the head at `channel` belongs to, the head's mean, and its first channel in the group.
pub(in super::super) fn group_of(p: &Projection, channel: usize, d: usize) -> (&Group, &[f32], usize) {
    let group = p.groups.iter().find(|g| g.channels.contains(&channel)).unwrap_or_else(|| panic!("channel {channel} has no group"));
    assert!(channel + d <= group.channels.end, "a group of channels ends inside a head");
    assert_eq!(group.up.len(), group.ranks.len() * group.channels.len(), "up is not [ranks][channels]");
    (group, &p.mean[channel..channel + d], channel - group.channels.start)
}

impl<'a> Basis<'a> {
    pub(super) fn new(compression: &'a LayerCompression, layer: SealedLayer, kv_head: usize, d: usize) -> Self {
        let KeyMap::Channels(keys) = &compression.keys else { panic!("keys of a frequency basis are never rebuilt") };
        let (keys, key_mean, key_channel) = group_of(keys, kv_head * d, d);
        let (values, value_mean, value_channel) = group_of(&compression.values, kv_head * d, d);
        assert!(keys.ranks.end <= layer.keys.rank && values.ranks.end <= layer.values.rank, "basis wider than the page");
        Basis { keys, key_mean, key_channel, values, value_mean, value_channel, layer }
    }
}

/// Safety of the unsafe functions: as [`Kernel::run`] of [`Unit`], with the room it made.
impl Unit<'_> {
    /// A sealed tile: keys rebuilt, values as latents.
    pub(super) unsafe fn sealed<S: Lanes>(&self, room: &Room, basis: &Basis<'_>, page: PageAddr, place: Place) {
        let rank = basis.values.ranks.len();
        let (keys, values) = (room.keys.cast_const(), room.values.cast_const());
        let tile = Tile { keys, key_step: P, values, value_step: room.latent_stride, width: rank, ahead: 0 };
        // SAFETY: the room has a tile of keys and of latents, and outputs and latents for every line.
        unsafe {
            self.rebuild::<S>(room, basis, page, place);
            self.value_latents::<S>(room, basis, page, place);
            let mut line = 0;
            while line < room.span.lines {
                let rows = (room.span.lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (scale, sums) = self.softmax::<S, f32, R>(room, &tile, place, line);
                    let mut out = [room.latents; R];
                    for r in 0..R {
                        out[r] = out[r].add((line + r) * room.latent_stride);
                        let weight = room.weights.add(line + r);
                        *weight = *weight * scale[r] + sums[r];
                        let o = room.span.o.add((line + r) * room.span.stride);
                        S::enter(Scaled { from: o, to: o, n: room.span.stride, by: scale[r] });
                    }
                    self.values::<S, f32, R>(room, &tile, place, line, (out, scale));
                });
                line += rows;
            }
        }
    }

    /// Keys of a sealed page into `room.keys`, turned to their positions.
    unsafe fn rebuild<S: Lanes>(&self, room: &Room, basis: &Basis<'_>, page: PageAddr, place: Place) {
        let (arena, layer, group) = (self.call.arena, basis.layer, basis.keys);
        let d = self.call.shape.head_dim;
        let rank = group.ranks.len();
        // SAFETY: the room has `[rank][64]` latents, `[head_dim][64]` keys and two `[head_dim / 2][64]` tables; the
        // basis was checked to have `[rank][channels]` and the head's channels.
        unsafe {
            if layer.keys.bits == 16 {
                let codes = arena.slice::<f16>(page, layer.keys.codes + group.ranks.start * 2 * P, rank * P);
                S::enter(Widen { from: codes.as_ptr(), to: room.key_latents, n: rank * P });
            } else {
                let codes = key_codes(arena, page, &layer);
                let meta = arena.slice::<f16>(page, layer.keys.meta, layer.key_meta_bytes() / 2);
                let mut scales = [0.0f32; P];
                if layer.keys.quantiser == Quantiser::Hadamard && layer.keys.rank > 0 {
                    let block = group.ranks.start / (layer.keys.rank / layer.blocks);
                    let (_, unit) = levels(layer.keys.bits);
                    scales.iter_mut().zip(&meta[block * P..][..P]).for_each(|(to, s)| *to = s.to_f32() / unit);
                }
                for (r, i) in group.ranks.clone().enumerate() {
                    let meaning = match layer.keys.quantiser {
                        Quantiser::Affine => Meaning::Affine { scale: meta[i].to_f32(), min: meta[layer.keys.rank + i].to_f32() },
                        Quantiser::Hadamard => Meaning::NormalEach { scales: scales.as_ptr() },
                    };
                    S::enter(Numbers { codes, i, lane: 0, width: P, meaning, to: room.key_latents.add(r * P) });
                }
            }
            let up = group.up.as_ptr().add(basis.key_channel);
            let mut c = 0;
            while c < d {
                let rows = (d - c).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out) = ([up.add(c); R], [room.keys.add(c * P); R]);
                    for r in 0..R {
                        (a[r], out[r]) = (a[r].add(r), out[r].add(r * P));
                        std::slice::from_raw_parts_mut(out[r], P).fill(basis.key_mean[c + r]);
                    }
                    let b = room.key_latents.cast_const();
                    let product = Product { a, a_step: group.channels.len(), b, b_step: P, n: rank, ahead: 0 };
                    product.onto::<S>(out, P, Some([1.0; R]));
                });
                c += rows;
            }
            turn_tables(self.call.table, place.base, room.cos, room.sin);
            S::enter(TurnTile { keys: room.keys, n: d / 2 * P, cos: room.cos, sin: room.sin });
        }
    }

    /// Value latents of a sealed page into `room.values: [64][latent_stride]`, from `place.from` on.
    unsafe fn value_latents<S: Lanes>(&self, room: &Room, basis: &Basis<'_>, page: PageAddr, place: Place) {
        let (arena, layer, ranks) = (self.call.arena, basis.layer, &basis.values.ranks);
        for p in place.from..P {
            // SAFETY: the room has `latent_stride`, no less than the rank, for each position.
            let to = unsafe { room.values.add(p * room.latent_stride) };
            if layer.values.bits == 16 {
                let codes = arena.slice::<f16>(page, layer.values.codes + (p * layer.values.rank + ranks.start) * 2, ranks.len());
                // SAFETY: as above.
                unsafe { S::enter(Widen { from: codes.as_ptr(), to, n: ranks.len() }) }
                continue;
            }
            let codes = value_codes(arena, page, &layer);
            let (groups, width) = (layer.value_groups(), layer.value_group());
            let meta = arena.slice::<f16>(page, layer.values.meta, layer.value_meta_bytes() / 2);
            let mut lane = ranks.start;
            while lane < ranks.end {
                let group = lane / width;
                let next = ranks.end.min((group + 1) * width);
                let scale = meta[group * P + p].to_f32();
                let meaning = match layer.values.quantiser {
                    Quantiser::Affine => Meaning::Affine { scale, min: meta[(groups + group) * P + p].to_f32() },
                    Quantiser::Hadamard => Meaning::Normal { scale: scale / levels(layer.values.bits).1 },
                };
                let to = to.wrapping_add(lane - ranks.start);
                // SAFETY: the codes have every lane of the ranks, and `to` room for them.
                unsafe { S::enter(Numbers { codes, i: p, lane, width: next - lane, meaning, to }) };
                lane = next;
            }
        }
    }

    /// Adds what the latents of the span stand for to its outputs.
    pub(super) unsafe fn expand<S: Lanes>(&self, room: &Room, basis: &Basis<'_>) {
        let (d, group) = (self.call.shape.head_dim, basis.values);
        // SAFETY: the basis was checked to have `[rank][channels]` and the head's channels.
        unsafe {
            let b = group.up.as_ptr().add(basis.value_channel);
            let mut line = 0;
            while line < room.span.lines {
                let rows = (room.span.lines - line).min(S::ROWS);
                by_rows!(rows, S, |R| {
                    let (mut a, mut out) = ([room.latents.cast_const(); R], [room.span.o; R]);
                    let mut weights = [room.weights.cast_const(); R];
                    for r in 0..R {
                        a[r] = a[r].add((line + r) * room.latent_stride);
                        out[r] = out[r].add((line + r) * room.span.stride);
                        weights[r] = weights[r].add(line + r);
                    }
                    let product = Product { a, a_step: 1, b, b_step: group.channels.len(), n: group.ranks.len(), ahead: 0 };
                    product.onto::<S>(out, d, Some([1.0; R]));
                    let mean = Product { a: weights, a_step: 0, b: basis.value_mean.as_ptr(), b_step: 0, n: 1, ahead: 0 };
                    mean.onto::<S>(out, d, Some([1.0; R]));
                });
                line += rows;
            }
        }
    }
}
/// Turns keys, `n` elements in either half, by tables that lie alike.
struct TurnTile {
    keys: *mut f32,
    n: usize,
    cos: *const f32,
    sin: *const f32,
}

impl Kernel for TurnTile {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let mut j = 0;
        while j < self.n {
            // SAFETY: `n` is a whole number of vectors.
            unsafe {
                let (a, b) = (self.keys.add(j), self.keys.add(self.n + j));
                let (x, y) = turned::<S>(S::load(a), S::load(b), S::load(self.cos.add(j)), S::load(self.sin.add(j)));
                S::store(a, x);
                S::store(b, y);
            }
            j += S::N;
        }
    }
}
