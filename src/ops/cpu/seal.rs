//! Exact pages to sealed pages: keys turned back, projected, quantised.
//!
//! Threads compute the bytes of whole pages apart from the arena, which are then copied in: a sealed page is a
//! small fraction of the work that makes it, and no two threads ever hold the arena to write.

use std::ops::Range;

use half::{bf16, f16};

use super::Cpu;
use super::pool::{Shares, scratch_back, scratch_take};
use super::rows::turn_tables;
use super::simd::{Element, Kernel, Lanes, dispatch};
use super::tile::{Product, Widen, by_rows};
use crate::compress::{FrequencyMap, KeyMap, LayerCompression, Projection};
use crate::ids::PAGE_TOKENS;
use crate::kv::Arena;
use crate::kv::layout::{ExactType, Quantiser, SealedLayer};
use crate::ops::{LayerView, RopeTable, SealJob, exact_head_bytes};
use crate::quant::{Order, put, put_one, quantise_group, quantise_normal, to_f16};

const P: usize = PAGE_TOKENS as usize;

/// `Ops::seal` on `cpu`.
pub(super) fn seal(cpu: &Cpu, arena: &mut Arena, view: LayerView<'_>, table: &RopeTable, jobs: &[SealJob]) {
    let Some(compression) = view.compression else { panic!("a profile without compression seals nothing") };
    if view.layout.drops {
        return;
    }
    let layer = view.layout.sealed[view.layer];
    assert_eq!(2 * table.half, view.layout.head_dim, "rope table of another model");
    let channels = view.layout.kv_heads * view.layout.head_dim;
    assert_eq!((compression.keys.channels(), compression.keys.rank()), (channels, layer.keys.rank), "basis of another model or width");
    assert_eq!(
        (compression.values.channels(), compression.values.rank()),
        (channels, layer.values.rank),
        "basis of another model or width"
    );
    let keys = match &compression.keys {
        KeyMap::Channels(p) => Some(p),
        KeyMap::Frequencies(map) => {
            assert_eq!(map.kv_heads, view.layout.kv_heads, "basis of another model");
            assert!(map.frequencies.iter().all(|&f| (f as usize) < map.half), "a frequency beyond the head");
            assert_eq!(map.down.len(), map.frequencies.len() * map.kv_heads, "down is not [pairs][kv_heads]");
            None
        }
    };
    for p in keys.into_iter().chain([&compression.values]) {
        let (mut channel, mut at) = (0, 0);
        for g in &p.groups {
            assert_eq!((g.channels.start, g.ranks.start), (channel, at), "groups do not tile channels and ranks");
            assert_eq!(g.down.len(), g.channels.len() * g.ranks.len(), "down is not [channels][ranks]");
            (channel, at) = (g.channels.end, g.ranks.end);
        }
        assert_eq!(channel, p.channels(), "groups do not tile the channels");
    }
    // Sections begin on 8-byte boundaries.
    let bytes = layer.bytes();
    let mut pages = cpu.seal.lock().unwrap_or_else(|e| e.into_inner());
    pages.clear();
    pages.resize(jobs.len() * bytes / 8, 0);
    let pages: &mut [u8] = bytemuck::cast_slice_mut(&mut pages[..]);
    let to = Shares::new(&mut *pages);
    {
        let arena = &*arena;
        cpu.pool.run(jobs.len(), &|i| {
            // SAFETY: job `i` alone has this range, of the buffer's `jobs * bytes`.
            let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(i * bytes), bytes) };
            assert!(jobs[i].skip <= PAGE_TOKENS, "{} sinks in a page", jobs[i].skip);
            let page = Page { arena, view, table, compression, layer, job: jobs[i], to };
            // SAFETY: `Cpu` holds only instruction sets this machine has; shapes were checked above.
            unsafe { dispatch(cpu.isa, page) }
        });
    }
    for (i, job) in jobs.iter().enumerate() {
        arena.slice_mut::<u8>(job.to, layer.keys.codes, bytes).copy_from_slice(&pages[i * bytes..][..bytes]);
    }
}

/// One page of one layer.
struct Page<'a> {
    arena: &'a Arena,
    view: LayerView<'a>,
    table: &'a RopeTable,
    compression: &'a LayerCompression,
    layer: SealedLayer,
    job: SealJob,
    /// The layer's bytes in the sealed page, zeroed.
    to: &'a mut [u8],
}

impl Kernel for Page<'_> {
    unsafe fn run<S: Lanes>(mut self) {
        let (d, heads) = (self.view.layout.head_dim, self.view.layout.kv_heads);
        let channels = heads * d;
        let (key_rank, value_rank) = (self.layer.keys.rank, self.layer.values.rank);
        let sizes = [channels * P, key_rank.max(value_rank) * P, d / 2 * P, d / 2 * P, key_rank.max(value_rank).div_ceil(4), key_rank];
        let mut buffer = scratch_take(sizes.iter().sum());
        let mut at = buffer.as_mut_ptr().cast::<f32>();
        let [x, latents, cos, sin, codes, column] = sizes.map(|n| {
            let here = at;
            at = at.wrapping_add(n);
            here
        });
        // SAFETY: the parts of the scratch have the sizes their use names; projections were checked to tile
        // channels and ranks.
        unsafe {
            for head in 0..heads {
                self.load::<S>(head, 0, x.add(head * d * P));
            }
            match &self.compression.keys {
                KeyMap::Channels(projection) => {
                    turn_tables(self.table, self.job.position as usize, cos, sin);
                    for head in 0..heads {
                        S::enter(Unturn { x: x.add(head * d * P), cos, sin, mean: &projection.mean[head * d..][..d] });
                    }
                    project_keys::<S>(projection, x, latents);
                }
                KeyMap::Frequencies(map) => {
                    S::enter(Combine { map, x, latents });
                    let spare = std::slice::from_raw_parts_mut(x, channels * P);
                    map.rotate(std::slice::from_raw_parts_mut(latents, key_rank * P), P, spare);
                }
            }
            codes.cast::<u8>().write_bytes(0, key_rank.max(value_rank));
            column.write_bytes(0, key_rank);
            {
                let codes = std::slice::from_raw_parts_mut(codes.cast::<u8>(), key_rank);
                let column = std::slice::from_raw_parts_mut(column, key_rank);
                self.write_keys(std::slice::from_raw_parts(latents, key_rank * P), codes, column);
            }

            for head in 0..heads {
                // Values lie `[64][head_dim]`: kept so, one block of channels per head.
                let (at, mean) = (x.add(head * d * P), &self.compression.values.mean[head * d..][..d]);
                self.load::<S>(head, 1, at);
                for p in 0..P {
                    for (c, mean) in mean.iter().enumerate() {
                        *at.add(p * d + c) -= mean;
                    }
                }
            }
            project_values::<S>(&self.compression.values, x, (d, value_rank), latents);
            let codes = std::slice::from_raw_parts_mut(codes.cast::<u8>(), value_rank);
            self.write_values(std::slice::from_raw_parts(latents, value_rank * P), codes);
        }
        scratch_back(buffer);
    }
}

impl Page<'_> {
    /// Widens the keys (`half` 0) or values (1) of a head.
    ///
    /// # Safety
    /// `to` is valid for `head_dim * 64`.
    unsafe fn load<S: Lanes>(&self, head: usize, half: usize, to: *mut f32) {
        let n = self.view.layout.head_dim * P;
        let at = self.job.from_offset + (2 * head + half) * exact_head_bytes(self.view.layout);
        unsafe fn from<S: Lanes, B: Element + bytemuck::Pod>(page: &Page<'_>, at: usize, n: usize, to: *mut f32) {
            // SAFETY: the slice has `n` elements, as has `to`.
            unsafe { S::enter(Widen { from: page.arena.slice::<B>(page.job.from, at, n).as_ptr(), to, n }) }
        }
        // SAFETY: passed on.
        unsafe {
            match self.view.layout.exact {
                ExactType::F32 => from::<S, f32>(self, at, n, to),
                ExactType::Bf16 => from::<S, bf16>(self, at, n, to),
            }
        }
    }

    /// `n` elements at byte `from` of the page, which lie in this layer.
    fn part<T: bytemuck::Pod>(&mut self, from: usize, n: usize) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.to[from - self.layer.keys.codes..][..n * size_of::<T>()])
    }

    /// `latents: [key_rank][64]`; room for the codes and the latents of a position.
    fn write_keys(&mut self, latents: &[f32], codes: &mut [u8], column: &mut [f32]) {
        let (SealedLayer { keys, blocks, .. }, skip) = (self.layer, self.job.skip as usize);
        let (rank, bits) = (keys.rank, keys.bits);
        if bits == 16 {
            for (r, row) in latents.chunks_exact(P).enumerate() {
                write_halves(self.part(keys.codes + (r * P + skip) * 2, P - skip), &row[skip..]);
            }
            return;
        }
        match keys.quantiser {
            Quantiser::Affine => {
                let mut codes = [0u8; P];
                for (r, row) in latents.chunks_exact(P).enumerate() {
                    let shared = quantise_group(&row[skip..], bits, &mut codes[skip..]);
                    put(self.part(keys.codes, keys.key_code_bytes() / 4), (rank, bits, Order::Runs), r, &codes);
                    let meta = self.part(keys.meta, 2 * rank);
                    (meta[r], meta[rank + r]) = (shared.scale, shared.min);
                }
            }
            Quantiser::Hadamard => {
                let width = (rank / blocks).max(1);
                for p in skip..P {
                    column.iter_mut().zip(latents.chunks_exact(P)).for_each(|(to, row)| *to = row[p]);
                    for (b, (x, codes)) in column.chunks(width).zip(codes.chunks_mut(width)).enumerate() {
                        let deviation = quantise_normal(x, bits, codes);
                        self.part(keys.meta, blocks * P)[b * P + p] = deviation;
                    }
                    let words = self.part(keys.codes, keys.key_code_bytes() / 4);
                    codes.iter().enumerate().for_each(|(i, &code)| put_one(words, (rank, bits, Order::Runs), i, (P, p), code));
                }
            }
        }
    }

    /// `latents: [64][value_rank]`, and room for the codes of a position.
    fn write_values(&mut self, latents: &[f32], codes: &mut [u8]) {
        let SealedLayer { values, .. } = self.layer;
        let (rank, bits, groups, width) = (values.rank, values.bits, self.layer.value_groups(), self.layer.value_group());
        let metas = self.layer.value_meta_bytes() / 2;
        for (p, row) in latents.chunks_exact(rank.max(1)).enumerate().skip(self.job.skip as usize) {
            if bits == 16 {
                write_halves(self.part(values.codes + p * rank * 2, rank), row);
                continue;
            }
            for (g, (x, codes)) in row.chunks(width).zip(codes.chunks_mut(width)).enumerate() {
                match values.quantiser {
                    Quantiser::Affine => {
                        let shared = quantise_group(x, bits, codes);
                        let meta = self.part(values.meta, metas);
                        (meta[g * P + p], meta[(groups + g) * P + p]) = (shared.scale, shared.min);
                    }
                    Quantiser::Hadamard => {
                        let deviation = quantise_normal(x, bits, codes);
                        self.part(values.meta, metas)[g * P + p] = deviation;
                    }
                }
            }
            put(self.part(values.codes, values.value_code_bytes() / 4), (P, bits, Order::Strided), p, codes);
        }
    }
}

/// Turns the keys of a head, `[head_dim][64]`, back by tables `[head_dim / 2][64]`, and takes the mean away.
struct Unturn<'a> {
    x: *mut f32,
    cos: *const f32,
    sin: *const f32,
    mean: &'a [f32],
}

impl Kernel for Unturn<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Unturn { x, cos, sin, mean } = self;
        let half = mean.len() / 2;
        for i in 0..half {
            let mut j = i * P;
            while j < (i + 1) * P {
                // SAFETY: `j` runs over the row of channel `i`, the other half's lies `half` rows on.
                unsafe {
                    let (a, b) = (x.add(j), x.add(half * P + j));
                    let (u, v, c, s) = (S::load(a), S::load(b), S::load(cos.add(j)), S::load(sin.add(j)));
                    // Scaled tables (YaRN) stretch the key too.
                    let norm = S::fma(c, c, S::mul(s, s));
                    let x = S::div(S::fma(v, s, S::mul(u, c)), norm);
                    let y = S::div(S::sub(S::mul(v, c), S::mul(u, s)), norm);
                    S::store(a, S::sub(x, S::splat(mean[i])));
                    S::store(b, S::sub(y, S::splat(mean[half + i])));
                    j += S::N;
                }
            }
        }
    }
}

/// `c[j] = sum over h of down[j][h] z[h]` of turned keys `x: [kv_heads][head_dim][64]`, into `latents: [2 * pairs][64]`.
struct Combine<'a> {
    map: &'a FrequencyMap,
    x: *const f32,
    latents: *mut f32,
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let Combine { map: FrequencyMap { kv_heads, half, frequencies, down, .. }, x, latents } = self;
        for (j, &f) in frequencies.iter().enumerate() {
            let mut p = 0;
            while p < P {
                // SAFETY: frequencies are below `half`; rows have 64 positions.
                unsafe {
                    let (mut re, mut im) = (S::splat(0.0), S::splat(0.0));
                    for h in 0..*kv_heads {
                        let at = x.add((2 * half * h + f as usize) * P + p);
                        let (a, b) = (S::load(at), S::load(at.add(half * P)));
                        let [c, d] = down[j * kv_heads + h].map(|x| S::splat(x));
                        re = S::sub(S::fma(c, a, re), S::mul(d, b));
                        im = S::fma(d, a, S::fma(c, b, im));
                    }
                    S::store(latents.add(2 * j * P + p), re);
                    S::store(latents.add((2 * j + 1) * P + p), im);
                }
                p += S::N;
            }
        }
    }
}

fn write_halves(to: &mut [f16], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, &x)| *to = to_f16(x));
}

/// `latents[r][p] = sum over c of x[c][p] * down[c][r]`, lanes along positions.
///
/// # Safety
/// `x` is valid for `[channels][64]`, `latents` for `[rank][64]`, and the projection's groups are whole.
unsafe fn project_keys<S: Lanes>(projection: &Projection, x: *const f32, latents: *mut f32) {
    for g in &projection.groups {
        let rank = g.ranks.len();
        let mut at = 0;
        while at < rank {
            let rows = (rank - at).min(S::ROWS);
            // SAFETY: rows `at..at + R` are within the group's ranks.
            unsafe {
                by_rows!(rows, S, |R| {
                    let (mut a, mut out) = ([g.down.as_ptr().add(at); R], [latents.add((g.ranks.start + at) * P); R]);
                    for r in 0..R {
                        (a[r], out[r]) = (a[r].add(r), out[r].add(r * P));
                    }
                    let b = x.add(g.channels.start * P);
                    Product { a, a_step: rank, b, b_step: P, n: g.channels.len(), ahead: 0 }.onto::<S>(out, P, None);
                });
            }
            at += rows;
        }
    }
}

/// `latents[p][r] = sum over c of x[p][c] * down[c][r]`, lanes along ranks, where `x` lies in one block `[64][d]`
/// per head.
///
/// # Safety
/// `x` is valid for `[heads][64][d]`, `latents` for `[64][rank]`, and the projection's groups are whole.
unsafe fn project_values<S: Lanes>(projection: &Projection, x: *const f32, (d, rank): (usize, usize), latents: *mut f32) {
    for g in &projection.groups {
        let width = g.ranks.len();
        let mut p = 0;
        while p < P {
            let rows = (P - p).min(S::ROWS);
            // SAFETY: positions `p..p + R` are within the page; heads' channels are within the group.
            unsafe {
                by_rows!(rows, S, |R| {
                    let mut out = [latents.add(p * rank + g.ranks.start); R];
                    for r in 0..R {
                        out[r] = out[r].add(r * rank);
                    }
                    let mut first = true;
                    for Range { start, end } in heads(&g.channels, d) {
                        let mut a = [x.add(start / d * d * P + p * d + start % d); R];
                        for r in 0..R {
                            a[r] = a[r].add(r * d);
                        }
                        let b = g.down.as_ptr().add((start - g.channels.start) * width);
                        let scale = if first { None } else { Some([1.0; R]) };
                        Product { a, a_step: 1, b, b_step: width, n: end - start, ahead: 0 }.onto::<S>(out, width, scale);
                        first = false;
                    }
                });
            }
            p += rows;
        }
    }
}

/// The channels of a group, head by head.
fn heads(channels: &Range<usize>, d: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *channels;
    (start / d..end.div_ceil(d)).map(move |h| start.max(h * d)..end.min((h + 1) * d))
}
