//! The definition of every operation: loops in f32 and f64, no cleverness. Slow on purpose; a fast backend is
//! right when it agrees with this one. The codec is spelled out here a second time, so that it is checked too.

use half::{bf16, f16};

use crate::compress::{FrequencyMap, KeyMap, Projection};
use crate::ids::{PAGE_TOKENS, PageAddr};
use crate::kv::Arena;
use crate::kv::layout::{ExactType, PageLayout, Quantiser, SealedLayer};
use crate::ops::{AttendRow, Heads, LayerView, Linear, Matrix, Ops, RopeTable, SealJob, UP_TILE, Update, exact_head_bytes};

const P: usize = PAGE_TOKENS as usize;

/// The slow, obvious backend.
pub struct Reference;

impl Matrix<'_> {
    fn at(&self, row: usize, column: usize) -> f32 {
        self.data.at(row * self.in_features + column)
    }
}

impl Ops for Reference {
    fn describe(&self) -> String {
        "reference, 1 thread".into()
    }

    fn linear(&self, x: &[f32], rows: usize, jobs: &mut [Linear<'_>]) {
        for job in jobs {
            let (n, k) = (job.w.out_features, job.w.in_features);
            let mut passed = Vec::new();
            if let Some(inner) = job.inner {
                assert_eq!(inner.out_features, k, "what the input passes first is not [{k}][in_features]");
                passed = vec![0.0; rows * k];
                self.linear(x, rows, &mut [Linear { w: inner, inner: None, bias: None, accumulate: false, y: &mut passed }]);
            }
            let x = if job.inner.is_some() { &passed } else { x };
            for r in 0..rows {
                for o in 0..n {
                    let mut sum = 0.0f64;
                    for i in 0..k {
                        sum += f64::from(x[r * k + i]) * f64::from(job.w.at(o, i));
                    }
                    let mut y = sum as f32 + job.bias.map_or(0.0, |b| b[o]);
                    if job.accumulate {
                        y += job.y[r * n + o];
                    }
                    job.y[r * n + o] = y;
                }
            }
        }
    }

    fn low_rank(&self, x: &[f32], updates: &[Update<'_>], targets: &mut [&mut [f32]]) {
        for update in updates {
            let f = &update.factors;
            f.check();
            for row in update.rows.clone() {
                let x = &x[row * f.in_features..][..f.in_features];
                let dot = |j: usize| (0..f.in_features).map(|i| f64::from(x[i]) * f64::from(f.down.at(j * f.in_features + i))).sum::<f64>();
                let shrunk: Vec<f64> = (0..f.rank).map(dot).collect();
                let y = &mut targets[update.target][row * f.out_features..][..f.out_features];
                for (o, y) in y.iter_mut().enumerate() {
                    let up = |j: usize| f64::from(f.up.at((o / UP_TILE * f.rank + j) * UP_TILE + o % UP_TILE));
                    *y += (0..f.rank).map(|j| shrunk[j] * up(j)).sum::<f64>() as f32;
                }
            }
        }
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let n = weight.len();
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            let mean = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / n as f64;
            let inverse = (mean + f64::from(eps)).sqrt().recip() as f32;
            for i in 0..n {
                out[i] = x[i] * inverse * weight[i];
            }
        }
    }

    fn rope(&self, x: &mut [f32], heads: usize, table: &RopeTable, positions: &[u32]) {
        let d = 2 * table.half;
        for (x, &position) in x.chunks_exact_mut(heads * d).zip(positions) {
            x.chunks_exact_mut(d).for_each(|head| rotate(head, table, position));
        }
    }

    fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        for (g, &u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
    }

    fn attend(&self, arena: &Arena, shape: Heads, table: &RopeTable, rows: &[AttendRow<'_>], q: &[f32], out: &mut [f32]) {
        let Heads { heads, kv_heads, head_dim: d, scale } = shape;
        for row in rows {
            let history = row.position as usize + row.n;
            for kv_head in 0..kv_heads {
                let (keys, values) = gather(arena, row, table, kv_head, d, history);
                for i in 0..row.n {
                    let visible = row.position as usize + i + 1;
                    for head in kv_head * (heads / kv_heads)..(kv_head + 1) * (heads / kv_heads) {
                        let at = ((row.first + i) * heads + head) * d;
                        let q = &q[at..at + d];
                        // A profile that drops its sealed positions meets only its sinks among them.
                        let sinks = if row.sinks.is_some() { row.view.layout.sinks as usize } else { 0 };
                        let gone = if row.view.layout.drops { sinks..row.sealed.len() * P } else { 0..0 };
                        let dot = |j: usize| (0..d).map(|c| f64::from(q[c]) * f64::from(keys[j * d + c])).sum::<f64>() * f64::from(scale);
                        let score = |j: usize| if gone.contains(&j) { f64::NEG_INFINITY } else { dot(j) };
                        let scores: Vec<f64> = (0..visible).map(score).collect();
                        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                        let total: f64 = weights.iter().sum();
                        for c in 0..d {
                            let sum: f64 = (0..visible).map(|j| weights[j] * f64::from(values[j * d + c])).sum();
                            out[at + c] = (sum / total) as f32;
                        }
                    }
                }
            }
        }
    }

    fn seal(&self, arena: &mut Arena, view: LayerView<'_>, table: &RopeTable, jobs: &[SealJob]) {
        let layout = view.layout;
        let compression = view.compression.expect("only compressed profiles seal");
        let sealed = layout.sealed[view.layer];
        let (d, width) = (layout.head_dim, layout.kv_heads * layout.head_dim);
        for job in jobs {
            let mut keys = vec![0.0; P * width];
            let mut values = vec![0.0; P * width];
            for head in 0..layout.kv_heads {
                for slot in 0..P {
                    let at = slot * width + head * d;
                    let key = &mut keys[at..at + d];
                    read_exact(arena, layout, job.from, job.from_offset, head, slot, key, &mut values[at..at + d]);
                    if let KeyMap::Channels(_) = compression.keys {
                        rotate_back(key, table, job.position + slot as u32);
                    }
                }
            }
            let skip = job.skip as usize;
            let latent = |k| match &compression.keys {
                KeyMap::Channels(p) => project(p, k),
                KeyMap::Frequencies(map) => frequency_latent(map, k),
            };
            let keys: Vec<Vec<f32>> = keys.chunks_exact(width).map(latent).collect();
            let values: Vec<Vec<f32>> = values.chunks_exact(width).map(|v| project(&compression.values, v)).collect();
            if layout.drops {
                continue;
            }
            write_keys(arena, job.to, &sealed, &keys, skip);
            write_values(arena, job.to, &sealed, &values, skip);
        }
    }
}

/// Rotates one head in place: `(a, b) -> (a cos - b sin, b cos + a sin)` over its two halves.
fn rotate(head: &mut [f32], table: &RopeTable, position: u32) {
    let half = table.half;
    for i in 0..half {
        let (cos, sin) = (table.cos[position as usize * half + i], table.sin[position as usize * half + i]);
        let (a, b) = (head[i], head[half + i]);
        head[i] = a * cos - b * sin;
        head[half + i] = b * cos + a * sin;
    }
}

/// The inverse of [`rotate`], also where the table carries an attention factor.
fn rotate_back(head: &mut [f32], table: &RopeTable, position: u32) {
    let half = table.half;
    for i in 0..half {
        let (cos, sin) = (table.cos[position as usize * half + i], table.sin[position as usize * half + i]);
        let norm = cos * cos + sin * sin;
        let (a, b) = (head[i], head[half + i]);
        head[i] = (a * cos + b * sin) / norm;
        head[half + i] = (b * cos - a * sin) / norm;
    }
}

fn element(arena: &Arena, exact: ExactType, page: PageAddr, offset: usize, i: usize) -> f32 {
    match exact {
        ExactType::F32 => arena.slice::<f32>(page, offset + 4 * i, 1)[0],
        ExactType::Bf16 => arena.slice::<bf16>(page, offset + 2 * i, 1)[0].to_f32(),
    }
}

/// One position's key (after rope) and value of one head out of an exact page.
#[expect(clippy::too_many_arguments, reason = "coordinates of one vector in the cache, private to the definition")]
fn read_exact(
    arena: &Arena,
    layout: &PageLayout,
    page: PageAddr,
    offset: usize,
    head: usize,
    slot: usize,
    key: &mut [f32],
    value: &mut [f32],
) {
    let d = layout.head_dim;
    let keys = offset + 2 * head * exact_head_bytes(layout);
    for c in 0..d {
        key[c] = element(arena, layout.exact, page, keys, c * P + slot);
        value[c] = element(arena, layout.exact, page, keys + exact_head_bytes(layout), slot * d + c);
    }
}

/// Keys (after rope) and values of one KV head for positions `0..history`, whatever branch holds them.
fn gather(arena: &Arena, row: &AttendRow<'_>, table: &RopeTable, kv_head: usize, d: usize, history: usize) -> (Vec<f32>, Vec<f32>) {
    let layout = row.view.layout;
    let (mut keys, mut values) = (vec![0.0; history * d], vec![0.0; history * d]);
    let sealed_positions = (row.sealed.len() * P).min(history);
    for j in 0..history {
        let (key, value) = (&mut keys[j * d..(j + 1) * d], &mut values[j * d..(j + 1) * d]);
        if let Some(page) = row.sinks.filter(|_| j < sealed_positions && j < layout.sinks as usize) {
            let stride = layout.sinks_stride();
            let head_bytes = d * stride * layout.exact.bytes();
            let at = row.view.layer * layout.sinks_layer_bytes() + 2 * kv_head * head_bytes;
            for c in 0..d {
                key[c] = element(arena, layout.exact, page, at, c * stride + j);
                value[c] = element(arena, layout.exact, page, at + head_bytes, j * d + c);
            }
        } else if j < sealed_positions && layout.drops {
            // Nobody meets it.
        } else if j < sealed_positions {
            let compression = row.view.compression.expect("sealed pages belong to a compressed profile");
            let sealed = &layout.sealed[row.view.layer];
            let (k, v) = read_sealed(arena, row.sealed[j / P], sealed, j % P);
            match &compression.keys {
                KeyMap::Channels(p) => {
                    key.copy_from_slice(&rebuild(p, &k)[kv_head * d..][..d]);
                    rotate(key, table, j as u32);
                }
                KeyMap::Frequencies(map) => key.copy_from_slice(&frequency_key(map, &k, kv_head)),
            }
            value.copy_from_slice(&rebuild(&compression.values, &v)[kv_head * d..][..d]);
        } else {
            let page = row.exact[(j - row.sealed.len() * P) / P];
            read_exact(arena, layout, page, row.exact_offset, kv_head, j % P, key, value);
        }
    }
    (keys, values)
}

/// `(x - mean) . down`.
fn project(p: &Projection, x: &[f32]) -> Vec<f32> {
    let mut latent = vec![0.0; p.rank()];
    for group in &p.groups {
        let rank = group.ranks.len();
        for r in 0..rank {
            let sum: f64 =
                group.channels.clone().enumerate().map(|(i, c)| f64::from(x[c] - p.mean[c]) * f64::from(group.down[i * rank + r])).sum();
            latent[group.ranks.start + r] = sum as f32;
        }
    }
    latent
}

/// `mean + latent . up`.
fn rebuild(p: &Projection, latent: &[f32]) -> Vec<f32> {
    let mut x = p.mean.clone();
    for group in &p.groups {
        let width = group.channels.len();
        for (i, c) in group.channels.clone().enumerate() {
            let sum: f64 = group.ranks.clone().enumerate().map(|(r, j)| f64::from(latent[j]) * f64::from(group.up[r * width + i])).sum();
            x[c] += sum as f32;
        }
    }
    x
}

/// `c[j] = sum over h of down[j][h] z[h]`, of a key after rope.
fn frequency_latent(map: &FrequencyMap, key: &[f32]) -> Vec<f32> {
    let mut latent = Vec::new();
    for (j, &f) in map.frequencies.iter().enumerate() {
        let (mut re, mut im) = (0.0f64, 0.0f64);
        for h in 0..map.kv_heads {
            let [a, b] = [0, map.half].map(|half| f64::from(key[2 * map.half * h + half + f as usize]));
            let [c, d] = map.down[j * map.kv_heads + h].map(f64::from);
            (re, im) = (re + c * a - d * b, im + c * b + d * a);
        }
        latent.extend([re as f32, im as f32]);
    }
    turn(map, &latent, false)
}

/// `z[h] = sum over j of up[j][h] c[j]`: a turned key of one head.
fn frequency_key(map: &FrequencyMap, latent: &[f32], kv_head: usize) -> Vec<f32> {
    let latent = turn(map, latent, true);
    let mut key = vec![0.0f64; 2 * map.half];
    for (j, &f) in map.frequencies.iter().enumerate() {
        let [a, b] = [latent[2 * j], latent[2 * j + 1]].map(f64::from);
        let [c, d] = map.up[j * map.kv_heads + kv_head].map(f64::from);
        key[f as usize] += c * a - d * b;
        key[map.half + f as usize] += c * b + d * a;
    }
    key.into_iter().map(|x| x as f32).collect()
}

/// A latent as 16 bits store it: f16, saturating.
fn to_f16(x: f32) -> f16 {
    f16::from_f32(x.clamp(-65504.0, 65504.0))
}

/// `(scale, min)` of a group and the code of each element: unclamped minimum (KIVI's form, not CSKV's
/// clamped zero point), codes against the stored, rounded scale and minimum.
fn quantise(x: &[f32], bits: u32) -> (f16, f16, Vec<u32>) {
    let levels = ((1u32 << bits) - 1) as f32;
    let (min, max) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)));
    if x.is_empty() {
        return (f16::ZERO, f16::ZERO, vec![]);
    }
    let (min, scale) = (to_f16(min), to_f16((max - min) / levels));
    let code =
        |v: f32| if scale.to_f32() > 0.0 { ((v - min.to_f32()) / scale.to_f32()).round_ties_even().clamp(0.0, levels) as u32 } else { 0 };
    (scale, min, x.iter().map(|&v| code(v)).collect())
}

/// Word and bit of bit `b` of a code of `n`, which is byte `byte` of quad `quad`, as `quant` documents them.
fn code_bit(bits: u32, n: usize, (quad, byte): (usize, usize), b: usize) -> (usize, usize) {
    let quads = n.div_ceil(4);
    if bits == 3 && b == 2 {
        return (quads.div_ceil(4) + quad / 8, 8 * byte + quad % 8);
    }
    let plane = if bits == 3 { 2 } else { bits as usize };
    (quad / (8 / plane), 8 * byte + plane * (quad % (8 / plane)) + b)
}

/// Quad and byte of channel `i` of keys.
fn in_runs(i: usize) -> (usize, usize) {
    (i / 4, i % 4)
}

/// Quad and byte of position `i` of values.
fn strided(i: usize) -> (usize, usize) {
    (i % 16, i / 16)
}

/// Writes a code of `n` of a lane of `words: [..][lanes]`.
fn put_code(words: &mut [u32], (lanes, lane): (usize, usize), bits: u32, n: usize, at: (usize, usize), code: u32) {
    for b in 0..bits as usize {
        let (word, bit) = code_bit(bits, n, at, b);
        let word = &mut words[word * lanes + lane];
        *word = *word & !(1 << bit) | (code >> b & 1) << bit;
    }
}

fn get_code(words: &[u32], (lanes, lane): (usize, usize), bits: u32, n: usize, at: (usize, usize)) -> u32 {
    let bit = |b: usize| {
        let (word, bit) = code_bit(bits, n, at, b);
        (words[word * lanes + lane] >> bit & 1) << b
    };
    (0..bits as usize).map(bit).sum()
}

/// Latents turned by the map's rotation, block by block, or turned back: `quant::Rotation` as its formula says.
fn turn(map: &FrequencyMap, latent: &[f32], back: bool) -> Vec<f32> {
    let Some(rotation) = &map.rotation else { return latent.to_vec() };
    let n = rotation.size();
    let h = 1 << n.trailing_zeros();
    let m = n / h;
    let entry = |to: usize, from: usize| {
        let t = std::f64::consts::TAU * (from / h * (to / h)) as f64 / m as f64;
        let minus = ((from % h) & (to % h)).count_ones() + (from as u32 + 1).wrapping_mul(0x9E37_79B1).count_ones();
        (t.cos() + t.sin()) / (n as f64).sqrt() * if minus % 2 == 1 { -1.0 } else { 1.0 }
    };
    let block = |x: &[f32]| -> Vec<f32> {
        let one =
            |to: usize| (0..n).map(|from| f64::from(x[from]) * if back { entry(from, to) } else { entry(to, from) }).sum::<f64>() as f32;
        (0..n).map(one).collect()
    };
    latent.chunks_exact(n).flat_map(block).collect()
}

/// `(deviation, codes)` of a block of normal numbers; see `quant::quantise_normal`.
fn quantise_normal(x: &[f32], bits: u32) -> (f16, Vec<u32>) {
    let (levels, unit) = crate::quant::levels(bits);
    let mut rising: Vec<(f64, u32)> = levels.iter().zip(0..).map(|(&level, code)| (f64::from(level), code)).collect();
    rising.sort_by(|a, b| a.0.total_cmp(&b.0));
    let nearest = |v: f64| -> u32 {
        // Half way goes down.
        rising[(1..rising.len()).filter(|&i| v > (rising[i - 1].0 + rising[i].0) / 2.0).count()].1
    };
    let rms = (x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
    let codes = |deviation: f64| -> Vec<u32> {
        let by = if deviation > 0.0 { (f64::from(unit) / deviation) as f32 } else { 0.0 };
        x.iter().map(|&v| nearest(f64::from(v * by))).collect()
    };
    let first = codes(rms);
    let level = |code: u32| f64::from(levels[code as usize]);
    let (xl, ll) = x.iter().zip(&first).fold((0.0, 0.0), |(a, b), (&v, &c)| (a + f64::from(v) * level(c), b + level(c) * level(c)));
    let deviation = if rms > 0.0 { to_f16((xl / ll * f64::from(unit)) as f32) } else { f16::ZERO };
    if deviation > f16::ZERO { (deviation, codes(deviation.to_f64())) } else { (deviation, first) }
}

fn write_keys(arena: &mut Arena, page: PageAddr, sealed: &SealedLayer, latents: &[Vec<f32>], skip: usize) {
    let (rank, bits, blocks) = (sealed.keys.rank, sealed.keys.bits, sealed.blocks);
    if bits == 16 {
        for r in 0..rank {
            let dst = arena.slice_mut::<f16>(page, sealed.keys.codes + r * P * 2, P);
            for (j, latent) in latents.iter().enumerate() {
                dst[j] = if j < skip { f16::ZERO } else { to_f16(latent[r]) };
            }
        }
        return;
    }
    arena.slice_mut::<u8>(page, sealed.keys.codes, sealed.keys.key_code_bytes()).fill(0);
    let words = sealed.keys.key_code_bytes() / 4;
    match sealed.keys.quantiser {
        Quantiser::Affine => {
            for r in 0..rank {
                let channel: Vec<f32> = latents.iter().map(|l| l[r]).collect();
                let (scale, min, codes) = quantise(&channel[skip..], bits);
                let dst = arena.slice_mut::<u32>(page, sealed.keys.codes, words);
                for j in skip..P {
                    put_code(dst, (P, j), bits, rank, in_runs(r), codes[j - skip]);
                }
                let meta = arena.slice_mut::<f16>(page, sealed.keys.meta, 2 * rank);
                (meta[r], meta[rank + r]) = (scale, min);
            }
        }
        Quantiser::Hadamard => {
            for (j, latent) in latents.iter().enumerate() {
                for (b, x) in latent.chunks((rank / blocks).max(1)).enumerate() {
                    let (deviation, codes) = if j < skip { (f16::ZERO, vec![0; x.len()]) } else { quantise_normal(x, bits) };
                    let dst = arena.slice_mut::<u32>(page, sealed.keys.codes, words);
                    for (i, code) in codes.into_iter().enumerate() {
                        put_code(dst, (P, j), bits, rank, in_runs(b * (rank / blocks) + i), code);
                    }
                    arena.slice_mut::<f16>(page, sealed.keys.meta, blocks * P)[b * P + j] = deviation;
                }
            }
        }
    }
}

fn write_values(arena: &mut Arena, page: PageAddr, sealed: &SealedLayer, latents: &[Vec<f32>], skip: usize) {
    let (rank, bits, groups, width) = (sealed.values.rank, sealed.values.bits, sealed.value_groups(), sealed.value_group());
    if bits < 16 {
        arena.slice_mut::<u8>(page, sealed.values.codes, sealed.values.value_code_bytes()).fill(0);
    }
    for (j, latent) in latents.iter().enumerate() {
        if bits == 16 {
            let dst = arena.slice_mut::<f16>(page, sealed.values.codes + j * rank * 2, rank);
            for r in 0..rank {
                dst[r] = if j < skip { f16::ZERO } else { to_f16(latent[r]) };
            }
            continue;
        }
        for g in 0..groups {
            let range = g * width..((g + 1) * width).min(rank);
            let x = &latent[range.clone()];
            let (scale, min, codes) = match sealed.values.quantiser {
                _ if j < skip => (f16::ZERO, f16::ZERO, vec![0; range.len()]),
                Quantiser::Affine => quantise(x, bits),
                Quantiser::Hadamard => {
                    let (deviation, codes) = quantise_normal(x, bits);
                    (deviation, f16::ZERO, codes)
                }
            };
            let dst = arena.slice_mut::<u32>(page, sealed.values.codes, sealed.values.value_code_bytes() / 4);
            range.zip(codes).for_each(|(r, code)| put_code(dst, (rank, r), bits, P, strided(j), code));
            let meta = arena.slice_mut::<f16>(page, sealed.values.meta, sealed.value_meta_bytes() / 2);
            meta[g * P + j] = scale;
            if sealed.values.quantiser == Quantiser::Affine {
                meta[(groups + g) * P + j] = min;
            }
        }
    }
}

/// Key and value latents of one position of a sealed page.
fn read_sealed(arena: &Arena, page: PageAddr, sealed: &SealedLayer, slot: usize) -> (Vec<f32>, Vec<f32>) {
    let (k, v, groups) = (sealed.keys.rank, sealed.values.rank, sealed.value_groups());
    if sealed.keys.bits == 16 {
        let key = |r: usize| arena.slice::<f16>(page, sealed.keys.codes + 2 * (r * P + slot), 1)[0].to_f32();
        let value = |r: usize| arena.slice::<f16>(page, sealed.values.codes + 2 * (slot * v + r), 1)[0].to_f32();
        return ((0..k).map(key).collect(), (0..v).map(value).collect());
    }
    let affine = |code: u32, scale: f16, min: f16| min.to_f32() + code as f32 * scale.to_f32();
    let normal = |code: u32, deviation: f16, bits: u32| {
        let (levels, unit) = crate::quant::levels(bits);
        f32::from(levels[code as usize]) / unit * deviation.to_f32()
    };
    let key = |r: usize| {
        let words = arena.slice::<u32>(page, sealed.keys.codes, sealed.keys.key_code_bytes() / 4);
        let meta = arena.slice::<f16>(page, sealed.keys.meta, sealed.key_meta_bytes() / 2);
        let code = get_code(words, (P, slot), sealed.keys.bits, k, in_runs(r));
        match sealed.keys.quantiser {
            Quantiser::Affine => affine(code, meta[r], meta[k + r]),
            Quantiser::Hadamard => normal(code, meta[r / (k / sealed.blocks) * P + slot], sealed.keys.bits),
        }
    };
    let value = |r: usize| {
        let words = arena.slice::<u32>(page, sealed.values.codes, sealed.values.value_code_bytes() / 4);
        let meta = arena.slice::<f16>(page, sealed.values.meta, sealed.value_meta_bytes() / 2);
        let (g, code) = (r / sealed.value_group(), get_code(words, (v, r), sealed.values.bits, P, strided(slot)));
        match sealed.values.quantiser {
            Quantiser::Affine => affine(code, meta[g * P + slot], meta[(groups + g) * P + slot]),
            Quantiser::Hadamard => normal(code, meta[g * P + slot], sealed.values.bits),
        }
    };
    ((0..k).map(key).collect(), (0..v).map(value).collect())
}
