//! Training: its gradients are those of its losses, its losses those of the served cache, and a kill costs nothing.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{Device, Tensor};
use clap::Parser;
use half::f16;
use strait::calibrate::{Moments, Source, solve};
use strait::compress::artifact::{Artifact, Fingerprint};
use strait::compress::{FrequencyMap, KeyMap, LayerCompression, Projection};
use strait::config::args::{Cli, Command};
use strait::kv::layout::{BasisKind, Cskv, Profile, Quantiser, Size, Width, Widths};
use strait::model::config::ModelConfig;
use strait::model::decoder::Observer;
use strait::ops::{Matrix, MatrixData, RopeTable};
use strait::train::adam::learning_rate;
use strait::train::codec::Codec;
use strait::train::problem::{Piece, Problem, pieces};
use strait::train::{Directory, Identity, Loss, Model, Settings, Subject, TrainError, TrainedLayer, train, trained_basis};

use crate::artifact::model;

/// Uniform in -1..1 from a seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }

    fn numbers(&mut self, n: usize, scale: f64) -> Vec<f32> {
        (0..n).map(|_| (self.next() * scale) as f32).collect()
    }
}

/// Two layers of a model that is not there: activations with falling spectra and means, and output projections.
struct World {
    config: ModelConfig,
    rope: RopeTable,
    projections: Vec<Vec<f32>>,
    /// Per layer, of all texts: per token keys, values, queries.
    activations: Vec<Vec<f32>>,
    texts: Vec<usize>,
}

const LAYERS: usize = 2;

impl World {
    fn new(seed: u64, texts: &[usize]) -> World {
        let config = model(LAYERS, 4, 2, 8);
        let mut noise = Noise(seed);
        let tokens: usize = texts.iter().sum();
        let mut correlated = |n: usize, channels: usize, offset: f64| {
            let mixing: Vec<f64> = (0..channels * channels).map(|_| noise.next()).collect();
            let mean: Vec<f64> = (0..channels).map(|_| offset * noise.next()).collect();
            let row = |noise: &mut Noise| -> Vec<f32> {
                let factors: Vec<f64> = (0..channels).map(|i| 2.0 * noise.next() * 0.8f64.powi(i as i32)).collect();
                let mixed = |c: usize| mean[c] + (0..channels).map(|i| factors[i] * mixing[i * channels + c]).sum::<f64>();
                (0..channels).map(|c| mixed(c) as f32).collect()
            };
            (0..n).map(|_| row(&mut noise)).collect::<Vec<_>>()
        };
        let activations = (0..LAYERS)
            .map(|_| {
                let (keys, values, queries) = (correlated(tokens, 16, 1.0), correlated(tokens, 16, 1.0), correlated(tokens, 32, 0.3));
                keys.into_iter().zip(values).zip(queries).flat_map(|((k, v), q)| [k, v, q]).flatten().collect()
            })
            .collect();
        let projections = (0..LAYERS).map(|_| noise.numbers(32 * 32, 0.3)).collect();
        let rope = RopeTable::new(&config, texts.iter().copied().max().unwrap());
        World { config, rope, projections, activations, texts: texts.to_vec() }
    }

    fn outputs(&self) -> Vec<Matrix<'_>> {
        self.projections.iter().map(|w| Matrix { out_features: 32, in_features: 32, data: MatrixData::F32(w) }).collect()
    }

    fn column(&self, layer: usize, from: usize, to: usize) -> Vec<f32> {
        self.activations[layer].chunks_exact(64).flat_map(|t| &t[from..to]).copied().collect()
    }

    /// The untrained maps of a profile.
    fn closed(&self, profile: &Profile) -> Vec<LayerCompression> {
        let cskv = profile.cskv.as_ref().unwrap();
        let mut moments = Moments::new(&self.config, cskv.sinks as usize);
        for layer in 0..LAYERS {
            let (keys, values) = (self.column(layer, 0, 16), self.column(layer, 16, 32));
            let mut at = 0;
            for &n in &self.texts {
                moments.add(layer, 0, &keys[at * 16..(at + n) * 16], &values[at * 16..(at + n) * 16]).unwrap();
                at += n;
            }
        }
        let widths = cskv.widths(&self.config).unwrap();
        let ranks = (widths.keys.rank, widths.values.rank);
        let solution = solve(&moments, cskv.basis, &Source::Closed, ranks).unwrap();
        let maps = |l: &strait::compress::LayerBasis| {
            let maps = LayerCompression { keys: l.keys.map(ranks.0).unwrap(), values: l.values.projection(ranks.1).unwrap() };
            maps.for_quantisers(cskv)
        };
        solution.layers.iter().map(maps).collect()
    }

    fn subject(&self, profile: &Profile) -> Subject {
        let start = self.closed(profile);
        Subject { start, profile: profile.clone(), widths: self.widths(profile) }
    }

    fn widths(&self, profile: &Profile) -> Vec<Widths> {
        vec![profile.cskv.as_ref().unwrap().widths(&self.config).unwrap(); LAYERS]
    }

    fn problem(&self, profile: &Profile, start: &LayerCompression, loss: Loss) -> (Problem, Vec<Tensor>) {
        let outputs = self.outputs();
        let model = Model { config: &self.config, rope: &self.rope, outputs: &outputs };
        let parts = pieces(&self.texts, profile, loss).unwrap();
        let widths = self.widths(profile)[0];
        Problem::new((model, 0), &self.activations[0], &parts, (profile.cskv.as_ref().unwrap(), &widths, start), (loss, 1)).unwrap()
    }

    fn record(&self, directory: &Directory) {
        let mut recorder = directory.recorder(&self.config).unwrap();
        let mut at = 0;
        for &n in &self.texts {
            for layer in 0..LAYERS {
                let of = |from: usize, to: usize| {
                    let all = self.column(layer, from, to);
                    all[at * (to - from)..(at + n) * (to - from)].to_vec()
                };
                recorder.observe(layer, &(0..n as u32).collect::<Vec<_>>(), &of(0, 16), &of(16, 32));
                recorder.queries(layer, &of(32, 64));
            }
            at += n;
        }
        recorder.finish().unwrap();
        assert!(directory.recorded(&self.config, at) && !directory.recorded(&self.config, at + 1));
    }

    /// Trains in a directory, which is filled where it is empty; `heard` hears of every step.
    fn train(
        &self,
        dir: &Path,
        subjects: &[Subject],
        settings: &Settings,
        heard: &(dyn Fn(&str, usize, u64) + Sync),
    ) -> Result<Vec<Vec<TrainedLayer>>, TrainError> {
        let directory = Directory::open(dir, &identity(settings))?;
        if !directory.recorded(&self.config, self.texts.iter().sum()) {
            self.record(&directory);
        }
        let outputs = self.outputs();
        let model = Model { config: &self.config, rope: &self.rope, outputs: &outputs };
        train(&directory, model, &self.texts, subjects, settings, (1, heard))
    }
}

fn identity(settings: &Settings) -> Identity {
    [("settings".to_owned(), format!("{settings:?}"))].into()
}

fn profile(name: &str, share: f64, bits: u32, basis: BasisKind) -> Profile {
    Profile { name: name.into(), cskv: Some(Cskv::shares((share, share), bits, (20, 3), basis)) }
}

const KINDS: [(&str, BasisKind); 3] = [("joint", BasisKind::Joint), ("heads", BasisKind::Grouped(1)), ("frequency", BasisKind::Frequency)];

/// A directory of its own for a test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("strait-train-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Maps that are somewhat off.
fn perturbed(maps: &LayerCompression, noise: &mut Noise, by: f64) -> LayerCompression {
    let mut maps = maps.clone();
    let mut shake = |x: &mut f32| *x += (noise.next() * by) as f32;
    let mut projection = |p: &mut Projection| p.groups.iter_mut().for_each(|g| g.down.iter_mut().chain(&mut g.up).for_each(&mut shake));
    projection(&mut maps.values);
    match &mut maps.keys {
        KeyMap::Channels(p) => projection(p),
        KeyMap::Frequencies(f) => f.down.iter_mut().chain(&mut f.up).flatten().for_each(&mut shake),
    }
    maps
}

fn numbers(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn gradients_are_those_of_the_losses() {
    let world = World::new(1, &[110, 110]);
    for (name, basis) in KINDS {
        for loss in [Loss::Reconstruction, Loss::Attention] {
            let profile = profile(name, 0.5, 16, basis);
            let start = perturbed(&world.closed(&profile)[0], &mut Noise(2), 0.2);
            let (problem, params) = world.problem(&profile, &start, loss);
            let slope = problem.slope(&params, 0).unwrap();
            assert!(slope.loss > 0.01 && slope.loss < 2.0, "{name} {loss:?}: {}", slope.loss);
            let mut noise = Noise(3);
            for (i, gradient) in slope.gradients.iter().enumerate() {
                // Along the gradient, and across it.
                for direction in [numbers(gradient), noise.numbers(gradient.elem_count(), 1.0)] {
                    let length = direction.iter().map(|x| x * x).sum::<f32>().sqrt();
                    let direction: Vec<f32> = direction.iter().map(|x| x / length).collect();
                    let want: f64 = direction.iter().zip(numbers(gradient)).map(|(a, b)| f64::from(a * b)).sum();
                    let step = Tensor::from_vec(direction, gradient.dims(), &Device::Cpu).unwrap();
                    let at = |by: f64| {
                        let mut moved = params.clone();
                        moved[i] = (&moved[i] + (&step * by).unwrap()).unwrap();
                        problem.slope(&moved, 0).unwrap().loss
                    };
                    let got = (at(0.02) - at(-0.02)) / 0.04;
                    let size = numbers(gradient).iter().map(|x| x * x).sum::<f32>().sqrt();
                    assert!(
                        (got - want).abs() < 0.01 * f64::from(size) + 2e-5,
                        "{name} {loss:?} parameter {i}: {got} for {want}, length {size}"
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_pass_straight_through_the_codec() {
    let world = World::new(4, &[100, 100]);
    let profile = profile("coarse", 0.5, 2, BasisKind::Joint);
    let cskv = profile.cskv.as_ref().unwrap();
    let start = &world.closed(&profile)[0];
    let (problem, params) = world.problem(&profile, start, Loss::Reconstruction);
    let slope = problem.slope(&params, 0).unwrap();
    // Of two pieces one is held out; values of the other, in f64 but for the latents that the codec sees.
    let (down, up) = (&start.values.groups[0].down, &start.values.groups[0].up);
    let [train, held_out] = pieces(&world.texts, &profile, Loss::Reconstruction).unwrap();
    assert_eq!(
        (&train[..], &held_out[..]),
        (&[Piece { first: 0, position: 0, n: 100 }][..], &[Piece { first: 100, position: 0, n: 100 }][..])
    );
    let values = world.column(0, 16, 32);
    let centred: Vec<f32> = values.chunks_exact(16).flat_map(|v| v.iter().zip(&start.values.mean).map(|(x, m)| x - m)).collect();
    let energy =
        (0..2).flat_map(|t| centred[(100 * t + 3) * 16..100 * (t + 1) * 16].iter()).map(|&x| f64::from(x).powi(2)).sum::<f64>() / 194.0;
    let rank = 8;
    let mut latents: Vec<f32> =
        centred[..1600].chunks_exact(16).flat_map(|x| (0..rank).map(move |r| (0..16).map(|c| x[c] * down[c * rank + r]).sum())).collect();
    Codec::new(cskv, &world.widths(&profile)[0], 2, None).values(&mut latents, 0);
    let (mut of_down, mut of_up) = (vec![0.0f64; 16 * rank], vec![0.0f64; rank * 16]);
    for (x, latent) in centred[3 * 16..1600].chunks_exact(16).zip(latents[3 * rank..].chunks_exact(rank)) {
        let back = |c: usize| (0..rank).map(|r| f64::from(latent[r] * up[r * 16 + c])).sum::<f64>();
        let of_back: Vec<f64> = (0..16).map(|c| 2.0 * (back(c) - f64::from(x[c])) / (2.0 * energy * 97.0)).collect();
        for r in 0..rank {
            let of_latent: f64 = (0..16).map(|c| of_back[c] * f64::from(up[r * 16 + c])).sum();
            for c in 0..16 {
                of_down[c * rank + r] += of_latent * f64::from(x[c]);
                of_up[r * 16 + c] += f64::from(latent[r]) * of_back[c];
            }
        }
    }
    // Parameters are in units of their root mean square.
    for (i, (want, numbers_of)) in [(2, (of_down, down)), (3, (of_up, up))] {
        let unit = (numbers_of.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / numbers_of.len() as f64).sqrt();
        let size = want.iter().map(|x| x.abs()).fold(0.0, f64::max) * unit;
        for (got, want) in numbers(&slope.gradients[i]).iter().zip(want) {
            assert!((f64::from(*got) - want * unit).abs() < 1e-3 * size, "parameter {i}: {got} for {}", want * unit);
        }
    }
}

/// What the codec leaves of a group, written out anew.
fn quantised(x: &[f64], bits: u32) -> Vec<f64> {
    let top = f64::from((1u32 << bits) - 1);
    let (min, max) = x.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v)));
    let (min, scale) = (f16::from_f64(min).to_f64(), f16::from_f32(((max - min) / top) as f32).to_f64());
    x.iter().map(|v| min + if scale > 0.0 { ((v - min) / scale).round_ties_even().clamp(0.0, top) * scale } else { 0.0 }).collect()
}

#[test]
fn the_codec_is_that_of_sealed_pages() {
    let cskv = |bits| Cskv::shares((1.0, 1.0), bits, (0, 4), BasisKind::Joint);
    let (n, rank) = (100, 40);
    let latents = Noise(5).numbers(n * rank, 3.0);
    for bits in [16, 4, 3, 2] {
        for position in [0, 192] {
            let (mut keys, mut values) = (latents.clone(), latents.clone());
            let width = Width { rank, bits };
            let codec = Codec::new(&cskv(bits), &Widths { keys: width, values: width }, 2, None);
            codec.keys(&mut keys, position);
            codec.values(&mut values, position);
            let sinks = if position == 0 { 4 } else { 0 };
            let x = |i: usize, r: usize| f64::from(latents[i * rank + r]);
            for (i, r) in (0..n).flat_map(|i| (0..rank).map(move |r| (i, r))) {
                let (page, group) = (if i < 64 { sinks..64 } else { 64..n }, if r < 32 { 0..32 } else { 32..rank });
                let (mut key, mut value) = (x(i, r), x(i, r));
                if bits < 16 && i >= sinks {
                    key = quantised(&page.clone().map(|j| x(j, r)).collect::<Vec<_>>(), bits)[i - page.start];
                    value = quantised(&group.clone().map(|c| x(i, c)).collect::<Vec<_>>(), bits)[r - group.start];
                }
                let got = [keys[i * rank + r], values[i * rank + r]].map(f64::from);
                assert!((got[0] - key).abs() < 1e-5 && (got[1] - value).abs() < 1e-5, "{bits} bits, {i}.{r}: {got:?} for {key}, {value}");
            }
        }
    }
}

/// `(x - mean) . down`, and `mean + latent . up`, of all groups.
fn down(p: &Projection, x: &[f64]) -> Vec<f64> {
    let one = |g: &strait::compress::Group, r: usize| {
        g.channels.clone().enumerate().map(|(i, c)| (x[c] - f64::from(p.mean[c])) * f64::from(g.down[i * g.ranks.len() + r])).sum()
    };
    p.groups.iter().flat_map(|g| (0..g.ranks.len()).map(move |r| one(g, r))).collect()
}

fn up(p: &Projection, latent: &[f64]) -> Vec<f64> {
    let one = |g: &strait::compress::Group, i: usize, c: usize| {
        let sum: f64 = g.ranks.clone().enumerate().map(|(r, j)| latent[j] * f64::from(g.up[r * g.channels.len() + i])).sum();
        f64::from(p.mean[c]) + sum
    };
    p.groups.iter().flat_map(|g| g.channels.clone().enumerate().map(move |(i, c)| one(g, i, c))).collect()
}

fn times([a, b]: [f64; 2], [c, d]: [f64; 2]) -> [f64; 2] {
    [a * c - b * d, a * d + b * c]
}

/// `x: [heads][8]` turned to `position`.
fn turned(world: &World, x: &[f64], position: usize) -> Vec<f64> {
    let mut out = x.to_vec();
    for head in out.chunks_exact_mut(8) {
        for i in 0..4 {
            let turn = [&world.rope.cos, &world.rope.sin].map(|t| f64::from(t[position * 4 + i]));
            [head[i], head[i + 4]] = times([head[i], head[i + 4]], turn);
        }
    }
    out
}

/// Latents of consecutive tokens to what their readers see, by pages and groups, sinks left out; `keep` zeroes them.
fn through_codec(latents: &mut [Vec<f64>], bits: u32, sinks: usize, keys: bool) {
    let (n, rank) = (latents.len(), latents[0].len());
    if bits == 16 {
        return;
    }
    if keys {
        for (r, page) in (0..rank).flat_map(|r| (0..n.div_ceil(64)).map(move |p| (r, p))) {
            let rows = (page * 64).max(sinks)..(page * 64 + 64).min(n);
            let seen = quantised(&latents[rows.clone()].iter().map(|l| l[r]).collect::<Vec<_>>(), bits);
            latents[rows].iter_mut().zip(seen).for_each(|(l, x)| l[r] = x);
        }
    } else {
        latents[sinks..].iter_mut().for_each(|l| l.chunks_mut(32).for_each(|g| g.copy_from_slice(&quantised(g, bits))));
    }
}

/// Squared error of attention after the output projection, in plain f64 loops: mean over the queries of one text that see something
/// compressed. `nothing` keeps no latent.
fn attention_error(world: &World, maps: &LayerCompression, cskv: &Cskv, text: usize, nothing: bool) -> f64 {
    let first: usize = world.texts[..text].iter().sum();
    let (n, sinks, window) = (world.texts[text], cskv.sinks as usize, cskv.window as usize);
    let token = |i: usize| world.activations[0][(first + i) * 64..][..64].iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let plain: Vec<Vec<f64>> = (0..n).map(|i| token(i)[..16].to_vec()).collect();
    let values: Vec<Vec<f64>> = (0..n).map(|i| token(i)[16..32].to_vec()).collect();
    let keys: Vec<Vec<f64>> = (0..n).map(|i| turned(world, &plain[i], i)).collect();
    let queries: Vec<Vec<f64>> = (0..n).map(|i| turned(world, &token(i)[32..], i)).collect();
    let z = |k: &[f64], h: usize, f: usize| [k[8 * h + f], k[8 * h + 4 + f]];
    let complex = |x: [f32; 2]| x.map(f64::from);
    let mut latents: Vec<Vec<f64>> = match &maps.keys {
        KeyMap::Channels(p) => plain.iter().map(|k| down(p, k)).collect(),
        KeyMap::Frequencies(FrequencyMap { frequencies, down, .. }) => {
            let pair = |k: &[f64], j: usize, f: usize| {
                (0..2).map(|h| times(complex(down[2 * j + h]), z(k, h, f))).fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d])
            };
            keys.iter().map(|k| frequencies.iter().enumerate().flat_map(|(j, &f)| pair(k, j, f as usize)).collect()).collect()
        }
    };
    let mut of_values: Vec<Vec<f64>> = values.iter().map(|v| down(&maps.values, v)).collect();
    if nothing {
        latents.iter_mut().chain(&mut of_values).flatten().for_each(|x| *x = 0.0);
    }
    let bits = cskv.widths(&world.config).unwrap().keys.bits;
    through_codec(&mut latents, bits, sinks, true);
    through_codec(&mut of_values, bits, sinks, false);
    let near_keys: Vec<Vec<f64>> = latents
        .iter()
        .enumerate()
        .map(|(i, l)| match &maps.keys {
            KeyMap::Channels(p) => turned(world, &up(p, l), i),
            KeyMap::Frequencies(FrequencyMap { frequencies, up, .. }) => {
                let mut key = vec![0.0; 16];
                for (j, &f) in frequencies.iter().enumerate() {
                    for h in 0..2 {
                        let [re, im] = times(complex(up[2 * j + h]), [l[2 * j], l[2 * j + 1]]);
                        key[8 * h + f as usize] += re;
                        key[8 * h + 4 + f as usize] += im;
                    }
                }
                key
            }
        })
        .collect();
    let near_values: Vec<Vec<f64>> = of_values.iter().map(|l| up(&maps.values, l)).collect();
    let attend = |i: usize, compressed: bool| -> Vec<f64> {
        let seen = |j: usize| compressed && j >= sinks && j + window <= i;
        let mut out = vec![0.0; 32];
        for head in 0..4 {
            let at = head / 2 * 8;
            let key = |j: usize| if seen(j) { &near_keys[j][at..at + 8] } else { &keys[j][at..at + 8] };
            let value = |j: usize| if seen(j) { &near_values[j][at..at + 8] } else { &values[j][at..at + 8] };
            let weights: Vec<f64> = (0..=i)
                .map(|j| (key(j).iter().zip(&queries[i][8 * head..]).map(|(a, b)| a * b).sum::<f64>() / 8f64.sqrt()).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            for c in 0..8 {
                out[8 * head + c] = (0..=i).map(|j| weights[j] * value(j)[c]).sum::<f64>() / total;
            }
        }
        out
    };
    let error = |i: usize| {
        let lost: Vec<f64> = attend(i, true).iter().zip(attend(i, false)).map(|(a, b)| a - b).collect();
        world.projections[0].chunks_exact(32).map(|w| w.iter().zip(&lost).map(|(&a, b)| f64::from(a) * b).sum::<f64>().powi(2)).sum::<f64>()
    };
    let rows = sinks + window..n;
    rows.clone().map(error).sum::<f64>() / rows.len() as f64
}

#[test]
fn the_attention_loss_is_what_a_compressed_cache_loses() {
    // More than a page, so that keys are quantised in two parts; few enough queries that every one is looked at.
    let world = World::new(6, &[150, 145, 140]);
    for (name, basis) in KINDS {
        for bits in [16, 2] {
            let profile = profile(name, 0.5, bits, basis);
            let cskv = profile.cskv.as_ref().unwrap();
            let start = &world.closed(&profile)[0];
            let (problem, params) = world.problem(&profile, start, Loss::Attention);
            // The third text is held out.
            let energy = (0..3).map(|t| attention_error(&world, start, cskv, t, true)).sum::<f64>() / 3.0;
            let want = attention_error(&world, start, cskv, 2, false) / energy;
            let got = problem.held_out(&params).unwrap();
            assert!((got - want).abs() < 1e-3 * want, "{name} {bits} bits: {got} for {want}");
            let nothing: Vec<Tensor> = params.iter().map(|p| p.zeros_like().unwrap()).collect();
            let want = attention_error(&world, start, cskv, 2, true) / energy;
            let got = problem.held_out(&nothing).unwrap();
            assert!((got - want).abs() < 1e-3 * want && (0.3..3.0).contains(&got), "{name} {bits} bits, nothing kept: {got} for {want}");
        }
    }
}

fn quietly(_: &str, _: usize, _: u64) {}

#[test]
fn without_a_quantiser_reconstruction_finds_the_principal_components() {
    let world = World::new(7, &[400; 6]);
    let folder = Folder::new("pca");
    let profile = profile("plain", 0.5, 16, BasisKind::Joint);
    let best = world.closed(&profile);
    let mut noise = Noise(8);
    let start = best.iter().map(|l| perturbed(l, &mut noise, 0.3)).collect();
    let settings = Settings { loss: Loss::Reconstruction, steps: 400, learning_rate: 0.05, seed: 1 };
    let trained = world
        .train(&folder.0, &[Subject { widths: world.widths(&profile), profile: profile.clone(), start }], &settings, &quietly)
        .unwrap();
    let (problem, params) = world.problem(&profile, &best[0], Loss::Reconstruction);
    let (optimum, TrainedLayer { before, after, .. }) = (problem.held_out(&params).unwrap(), &trained[0][0]);
    assert!(*before > 3.0 * optimum && *after < 1.06 * optimum, "{before} to {after}, principal components {optimum}");
    // The maps that came back are those that were measured.
    let (problem, params) = world.problem(&profile, &trained[0][0].maps, Loss::Reconstruction);
    assert!((problem.held_out(&params).unwrap() - after).abs() < 1e-4 * after);
}

#[test]
fn training_through_the_quantiser_beats_quantising_what_was_not_trained_for_it() {
    let world = World::new(9, &[200; 6]);
    let settings = |loss| Settings { loss, steps: 40, learning_rate: 0.03, seed: 1 };
    for loss in [Loss::Reconstruction, Loss::Attention] {
        let folder = Folder::new(&format!("qat-{}", loss.name()));
        let subject = |(name, basis): (&str, BasisKind)| {
            let profile = profile(name, 0.5, 2, basis);
            world.subject(&profile)
        };
        let subjects = KINDS.map(subject);
        let trained = world.train(&folder.0, &subjects, &settings(loss), &quietly).unwrap();
        for (subject, layers) in subjects.iter().zip(&trained) {
            for TrainedLayer { before, after, step, maps } in layers {
                let name = &subject.profile.name;
                assert!(*after < 0.95 * before && *step > 0, "{name} {loss:?}: {before} to {after} at step {step}");
                // What an artifact keeps of them gives them back.
                let basis = trained_basis(maps);
                assert_eq!(basis.keys.map(maps.keys.rank()).unwrap(), maps.keys);
                assert_eq!(basis.values.projection(maps.values.rank()).unwrap(), maps.values);
                assert!(basis.keys.map(2).is_err(), "a trained basis serves its own width");
            }
        }
        let table = std::fs::read_to_string(folder.0.join("loss.csv")).unwrap();
        let mut lines = table.lines();
        assert_eq!(lines.next(), Some("profile,layer,step,learning rate,train loss,held-out loss"));
        let first: Vec<&str> = lines.next().unwrap().split(',').collect();
        assert_eq!(first[..5], ["joint", "0", "0", "0.000000e0", ""]);
        assert_eq!(first[5].parse::<f64>().unwrap(), format!("{:.6e}", trained[0][0].before).parse::<f64>().unwrap());
        assert_eq!(table.lines().count(), 1 + 3 * LAYERS * 41);
        assert!(table.lines().nth(2).unwrap().ends_with(','), "not every row looks at what is held out");
        let drawing = std::fs::read_to_string(folder.0.join("loss.svg")).unwrap();
        for text in ["heads: held-out", loss.name(), "layer 1", "steps", "log scale"] {
            assert!(drawing.contains(text), "the drawing lacks {text}");
        }
    }
}

#[test]
fn rotated_latents_and_parts_that_keep_nothing_are_trained_like_others() {
    let world = World::new(19, &[200; 6]);
    let settings = Settings { loss: Loss::Attention, steps: 60, learning_rate: 0.02, seed: 1 };
    let folder = Folder::new("rotated");
    let turned = |name: &str, basis| {
        let mut profile = profile(name, 0.5, 2, basis);
        let cskv = profile.cskv.as_mut().unwrap();
        (cskv.key_quantiser, cskv.value_quantiser) = (Quantiser::Hadamard, Quantiser::Hadamard);
        world.subject(&profile)
    };
    // Nothing of the values of layer 0 and of the keys of layer 1, by channels and by frequency.
    let thin = |name: &str, basis| {
        let mut subject = world.subject(&profile(name, 0.5, 4, basis));
        let nothing = Projection { groups: subject.start[0].values.groups.clone(), ..subject.start[0].values.clone() };
        let none = |p: &Projection| {
            let group = |g: &strait::compress::Group| strait::compress::Group { ranks: 0..0, down: vec![], up: vec![], ..g.clone() };
            Projection { mean: p.mean.clone(), groups: p.groups.iter().map(group).collect() }
        };
        subject.start[0].values = none(&nothing);
        subject.widths[0].values.rank = 0;
        subject.start[1].keys = match &subject.start[1].keys {
            KeyMap::Channels(p) => KeyMap::Channels(none(p)),
            KeyMap::Frequencies(map) => KeyMap::Frequencies(FrequencyMap { frequencies: vec![], down: vec![], up: vec![], ..map.clone() }),
        };
        subject.widths[1].keys.rank = 0;
        subject
    };
    let subjects = [
        turned("turned", BasisKind::Joint),
        turned("turning", BasisKind::Frequency),
        thin("thin", BasisKind::Joint),
        thin("thinner", BasisKind::Frequency),
    ];
    let trained = world.train(&folder.0, &subjects, &settings, &quietly).unwrap();
    for (subject, layers) in subjects.iter().zip(&trained) {
        for (l, (start, widths)) in layers.iter().zip(subject.start.iter().zip(&subject.widths)) {
            // At 2 bits there is much to learn; at 4 the closed form of so simple a world is hard to beat.
            let most = if widths.keys.bits == 2 { 0.98 } else { 1.0 };
            assert!(l.after <= most * l.before && l.after.is_finite(), "{}: {} to {}", subject.profile.name, l.before, l.after);
            assert_eq!((l.maps.keys.rank(), l.maps.values.rank()), (widths.keys.rank, widths.values.rank), "{}", subject.profile.name);
            assert!(widths.values.rank > 0 || l.maps.values == start.values);
            assert!(widths.keys.rank > 0 || l.maps.keys == start.keys);
        }
    }
    // What an artifact gives back of trained maps are those maps, whether rotated or not.
    for (subject, layers) in subjects[..2].iter().zip(&trained) {
        let cskv = subject.profile.cskv.as_ref().unwrap();
        for l in layers {
            let basis = trained_basis(&l.maps);
            let (keys, values) = (l.maps.keys.rank(), l.maps.values.rank());
            let back = LayerCompression { keys: basis.keys.map(keys).unwrap(), values: basis.values.projection(values).unwrap() };
            assert_eq!(back.as_trained(cskv), l.maps);
        }
    }
}

#[test]
fn nothing_worse_than_the_start_is_returned() {
    let world = World::new(10, &[100; 3]);
    let folder = Folder::new("worse");
    let profile = profile("best", 0.5, 16, BasisKind::Joint);
    let start = world.closed(&profile);
    // The optimum, and steps so large that they only lead away.
    let settings = Settings { loss: Loss::Reconstruction, steps: 5, learning_rate: 1.0, seed: 1 };
    let trained =
        world.train(&folder.0, &[Subject { widths: world.widths(&profile), profile, start: start.clone() }], &settings, &quietly).unwrap();
    for (layer, start) in trained[0].iter().zip(&start) {
        assert_eq!((&layer.maps, layer.step), (start, 0));
        assert_eq!(layer.before, layer.after);
    }
}

#[test]
fn a_killed_training_goes_on_to_the_very_same_bits() {
    let world = World::new(11, &[100; 5]);
    let (whole, cut) = (Folder::new("whole"), Folder::new("cut"));
    let subjects = [("joint", BasisKind::Joint), ("frequency", BasisKind::Frequency)].map(|(name, basis)| {
        let profile = profile(name, 0.5, 3, basis);
        world.subject(&profile)
    });
    let settings = Settings { loss: Loss::Attention, steps: 23, learning_rate: 0.02, seed: 1 };
    // What a kill after 17 steps of the second layer would leave: the first done, the second saved at its last look.
    let copy = |profile: &str, layer: usize, step: u64| {
        if (profile, layer, step) == ("joint", 1, 17) {
            std::fs::create_dir(&cut.0).unwrap();
            for entry in std::fs::read_dir(&whole.0).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), cut.0.join(entry.file_name())).unwrap();
            }
            std::fs::write(cut.0.join("joint-001.checkpoint.part"), "half of a checkp").unwrap();
        }
    };
    let want = world.train(&whole.0, &subjects, &settings, &copy).unwrap();
    let heard = Mutex::new(vec![]);
    let hear = |profile: &str, layer: usize, step: u64| heard.lock().unwrap().push((profile.to_owned(), layer, step));
    let got = world.train(&cut.0, &subjects, &settings, &hear).unwrap();
    let heard = heard.into_inner().unwrap();
    assert_eq!(heard[..3], [("joint".into(), 0, 23), ("joint".into(), 1, 16), ("joint".into(), 1, 17)], "a finished layer is not redone");
    assert_eq!(got, want);
    for name in ["joint-001.checkpoint", "frequency-001.checkpoint", "loss.csv", "loss.svg"] {
        assert!(std::fs::read(whole.0.join(name)).unwrap() == std::fs::read(cut.0.join(name)).unwrap(), "{name} differs");
    }
}

#[test]
fn what_cannot_be_trained_is_refused_in_a_sentence() {
    let world = World::new(12, &[100; 3]);
    let folder = Folder::new("bad");
    let settings = Settings { loss: Loss::Attention, steps: 4, learning_rate: 0.01, seed: 1 };
    let profile = profile("mine", 0.5, 4, BasisKind::Joint);
    let subject = world.subject(&profile);
    let message = |r: Result<Vec<Vec<TrainedLayer>>, TrainError>| r.unwrap_err().to_string();

    let few = pieces(&[86, 90], &profile, Loss::Attention).unwrap_err().to_string();
    assert!(
        few.starts_with("training mine takes at least two calibration texts of 87 tokens or more") && few.contains("there are 1"),
        "{few}"
    );
    assert!(pieces(&[87, 90], &profile, Loss::Attention).is_ok());
    assert!(pieces(&[67, 90], &profile, Loss::Reconstruction).is_ok());
    let [train, held_out] = pieces(&[2500; 9], &profile, Loss::Attention).unwrap();
    assert_eq!((train.len(), held_out.len()), (24, 3));
    assert_eq!(train[2], Piece { first: 2048, position: 2048, n: 452 });

    world.train(&folder.0, std::slice::from_ref(&subject), &settings, &quietly).unwrap();
    let other = message(world.train(&folder.0, std::slice::from_ref(&subject), &Settings { steps: 5, ..settings }, &quietly));
    assert!(other.contains("was begun with another settings (") && other.contains("give another --train-dir"), "{other}");
    let held = Directory::open(&folder.0, &identity(&settings)).unwrap();
    let busy = Directory::open(&folder.0, &identity(&settings)).unwrap_err();
    assert!(matches!(&busy, TrainError::Busy { .. }), "{busy}");
    drop(held);
    std::fs::write(folder.0.join("mine-001.checkpoint"), "not a checkpoint").unwrap();
    let damaged = message(world.train(&folder.0, std::slice::from_ref(&subject), &settings, &quietly));
    assert!(damaged.contains("mine-001.checkpoint is damaged") && damaged.contains("remove it"), "{damaged}");
    for broken in [&b"{\"a"[..], b"", b"\xff", b"[]"] {
        std::fs::write(folder.0.join("settings.json"), broken).unwrap();
        let unknown = Directory::open(&folder.0, &identity(&settings)).unwrap_err();
        assert!(matches!(&unknown, TrainError::Unknown { .. }) && unknown.to_string().ends_with("give another --train-dir"), "{unknown}");
    }
    std::fs::remove_file(folder.0.join("settings.json")).unwrap();
    let occupied = Directory::open(&folder.0, &identity(&settings)).unwrap_err();
    assert!(matches!(&occupied, TrainError::Occupied { .. }), "{occupied}");
    let letters = Folder::new("letters");
    std::fs::create_dir(&letters.0).unwrap();
    std::fs::write(letters.0.join("letter"), "").unwrap();
    let occupied = Directory::open(&letters.0, &identity(&settings)).unwrap_err();
    assert!(matches!(&occupied, TrainError::Occupied { .. }), "{occupied}");
    assert_eq!(std::fs::read_dir(&letters.0).unwrap().count(), 1, "a folder that is refused is left as it was");
    let file = folder.0.join("layer-000.activations");
    let no_folder = Directory::open(&file.join("below"), &identity(&settings)).unwrap_err().to_string();
    assert!(no_folder.starts_with("cannot make "), "{no_folder}");

    let wild = Folder::new("wild");
    let directory = Directory::open(&wild.0, &identity(&settings)).unwrap();
    for (part, at) in [("keys", 0), ("values", 1), ("queries", 2)] {
        let mut recorder = directory.recorder(&world.config).unwrap();
        let mut parts = [vec![0.5; 3 * 16], vec![0.5; 3 * 16], vec![0.5; 3 * 32]];
        let width = parts[at].len() / 3;
        parts[at][width] = f32::NAN;
        recorder.observe(1, &[0, 1, 2], &parts[0], &parts[1]);
        recorder.queries(1, &parts[2]);
        let error = recorder.check().unwrap_err().to_string();
        assert!(error.starts_with(&format!("layer 1 made {part} that are not finite (token 1 of")), "{error}");
        assert!(!directory.recorded(&world.config, 3));
    }
    let names: Vec<_> = std::fs::read_dir(&wild.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "beside lock and settings nothing is left of what was not finished: {names:?}");
    drop(directory);
    let diverging = Folder::new("diverging");
    let far = Settings { learning_rate: 1e30, ..settings };
    let diverged = message(world.train(&diverging.0, &[subject], &far, &quietly));
    assert!(
        diverged.starts_with("the loss of layer 0 under mine is not finite after ") && diverged.ends_with("lower --train-lr"),
        "{diverged}"
    );
}

#[test]
fn what_a_disk_changed_of_a_training_is_refused() {
    let world = World::new(13, &[100; 3]);
    let folder = Folder::new("changed");
    let settings = Settings { loss: Loss::Attention, steps: 4, learning_rate: 0.01, seed: 1 };
    let subject = world.subject(&profile("mine", 0.5, 4, BasisKind::Joint));
    let train = || world.train(&folder.0, std::slice::from_ref(&subject), &settings, &quietly);
    let want = train().unwrap();
    let name = "mine-001.checkpoint";
    let path = folder.0.join(name);
    let whole = std::fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 60).chain([whole.len() - 1]) {
        let mut changed = whole.clone();
        changed[at] ^= 2;
        std::fs::write(&path, &changed).unwrap();
        let error = train().expect_err("a changed bit is not read over").to_string();
        assert!(error.contains(&format!("{name} is damaged: ")) && error.contains("remove it, and the same command"), "{at}: {error}");
    }
    // What the sentence advises.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(train().unwrap(), want);
    assert!(std::fs::read(&path).unwrap() == whole);
    // What it is trained on is looked at when it is trained.
    let activations = folder.0.join("layer-001.activations");
    let right = std::fs::read(&activations).unwrap();
    std::fs::remove_file(&path).unwrap();
    for at in [0, right.len() / 2, right.len() - 1] {
        let mut changed = right.clone();
        changed[at] ^= 2;
        std::fs::write(&activations, &changed).unwrap();
        let error = train().expect_err("a changed bit is not trained on").to_string();
        assert!(error.contains("layer-001.activations is damaged: ") && !path.exists(), "{at}: {error}");
    }
    std::fs::remove_file(&activations).unwrap();
    assert_eq!(train().unwrap(), want);
    assert!(std::fs::read(&path).unwrap() == whole && std::fs::read(&activations).unwrap() == right);
}

#[test]
fn the_learning_rate_warms_up_and_dies_away() {
    let rates: Vec<f64> = (0..100).map(|t| learning_rate(2.0, t, 100)).collect();
    assert!((rates[0] - 0.4).abs() < 1e-12 && (rates[4] - 2.0).abs() < 1e-12 && (rates[5] - 2.0).abs() < 1e-12);
    assert!(rates[5..].windows(2).all(|w| w[1] < w[0]) && rates[99] < 0.03 && rates[99] >= 0.02);
    assert_eq!(learning_rate(1.0, 0, 1), 1.0);
}

fn compress(arguments: &[&str]) -> anyhow::Result<()> {
    let all = ["strait", "compress"].iter().chain(arguments);
    let Some(Command::Compress(ask)) = Cli::try_parse_from(all)?.command else { panic!("not a command to compress") };
    strait::serve::offline::compress(&ask)
}

#[test]
fn the_demo_model_is_trained_from_the_command_line_and_the_same_command_again_changes_nothing() {
    let folder = Folder::new("demo");
    std::fs::create_dir(&folder.0).unwrap();
    let (out, dir) = (folder.0.join("a.safetensors"), folder.0.join("training"));
    let (out_text, dir_text) = (out.to_str().unwrap(), dir.to_str().unwrap());
    let asked = |profiles: &str, steps: &str| {
        let flags = ["--tokens", "1100", "--threads", "2", "--train-steps", steps, "--train-dir", dir_text, "--train-profiles", profiles];
        compress(&[&["--out", out_text][..], &flags].concat())
    };
    let refused = |profiles: &str| asked(profiles, "3").unwrap_err().to_string();
    assert!(refused("cskv-95,nosuch").starts_with("there is no cache profile \"nosuch\" to train; choose of cskv-50, "));
    assert!(refused("full").starts_with("cache profile \"full\" has no basis that is computed"));
    let short = compress(&["--out", out_text, "--tokens", "200", "--train-steps", "3", "--train-dir", dir_text, "--init", "svd"]);
    assert!(short.unwrap_err().to_string().contains(" takes at least two calibration texts of 132 tokens or more"));
    let nowhere = folder.0.join("none/a");
    let nowhere = ["--out", nowhere.to_str().unwrap(), "--train-steps", "3", "--train-dir", dir_text];
    assert!(compress(&nowhere).unwrap_err().to_string().starts_with("cannot write the compression artifact "));
    assert!(!dir.exists() && !out.exists(), "a refused command leaves nothing");
    for bad in [
        &["--train-steps", "3"][..],
        &["--train-dir", dir_text],
        &["--train-loss", "attention"],
        &["--train-steps", "0", "--train-dir", dir_text],
    ] {
        assert!(compress(&[&["--out", out_text][..], bad].concat()).is_err(), "{bad:?}");
    }

    asked("cskv-95,cskv-fast", "3").unwrap();
    let first = std::fs::read(&out).unwrap();
    let checkpoint = strait::demo::checkpoint().unwrap();
    let read = |bytes: &[u8]| Artifact::from_bytes(bytes, &checkpoint.config, Fingerprint(checkpoint.digest().unwrap())).unwrap();
    let artifact = read(&first);
    let sets: Vec<(&str, bool)> = artifact.bases().iter().map(|b| (b.name.as_str(), b.trained())).collect();
    assert_eq!(sets, [("frequency", false), ("cskv-95", true), ("cskv-fast", true)]);
    let reads: Vec<(&str, &str)> = artifact.profiles().iter().map(|p| (p.profile.name.as_str(), p.basis.as_str())).collect();
    assert_eq!(reads, [("cskv-50", "frequency"), ("cskv-80", "frequency"), ("cskv-95", "cskv-95"), ("cskv-fast", "cskv-fast")]);
    for stored in artifact.profiles() {
        assert_eq!(artifact.layers(&stored.profile).unwrap().len(), 5);
    }
    std::fs::remove_file(&out).unwrap();
    let start = dir.join("start.safetensors");
    let within = ["--out", start.to_str().unwrap(), "--tokens", "1100", "--threads", "2", "--train-steps", "3", "--train-dir", dir_text];
    let within = compress(&[&within[..], &["--train-profiles", "cskv-95,cskv-fast"]].concat()).unwrap_err().to_string();
    assert!(within.contains(" lies in the training directory, "), "{within}");
    asked("cskv-95,cskv-fast", "3").unwrap();
    assert!(std::fs::read(&out).unwrap() == first);
    let other = asked("cskv-95", "3").unwrap_err().to_string();
    assert!(other.contains("was begun with another list of profiles to train (cskv-95, cskv-fast there, cskv-95 now)"), "{other}");
}

#[test]
fn what_is_made_is_written_though_nobody_reads_what_is_said() {
    let folder = Folder::new("unheard");
    std::fs::create_dir(&folder.0).unwrap();
    let (out, dir) = (folder.0.join("a.safetensors"), folder.0.join("training"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_strait"));
    command.arg("compress").arg("--out").arg(&out).args(["--uniform", "--tokens", "1100", "--train-steps", "1", "--train-dir"]).arg(&dir);
    let made = command.args(["--train-profiles", "cskv-95"]).stdout(writer).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(out.exists());
}

/// Budgets of the names that promise a share are shares of what the model will be served with.
#[test]
fn a_budget_is_a_share_of_the_cache_that_will_be_served() {
    let folder = Folder::new("dtype");
    std::fs::create_dir(&folder.0).unwrap();
    let (out, config) = (folder.0.join("a.cskv"), folder.0.join("strait.toml"));
    // One budget is enough to see.
    let others = ["cskv-50", "cskv-95", "cskv-fast"].map(|name| format!("{name:?} = {{ key_rank = 0.1, value_rank = 0.1, bits = 4 }}\n"));
    std::fs::write(&config, format!("[profiles]\n{}", others.concat())).unwrap();
    let ask = ["--out", out.to_str().unwrap(), "--config", config.to_str().unwrap(), "--tokens", "400", "--dtype", "f32"];
    compress(&ask).unwrap();
    let checkpoint = strait::demo::checkpoint().unwrap();
    let artifact = Artifact::read(&out, &checkpoint.config, Fingerprint(checkpoint.digest().unwrap())).unwrap();
    let made = artifact.profiles().iter().map(|s| &s.profile).find(|p| p.name == "cskv-80").unwrap();
    assert_eq!(made.cskv.as_ref().unwrap().size, Size::Budget(1024), "a fifth of 5120 bytes in f32");
    // Served in bf16 that is two fifths, and said to be.
    let mut server = std::process::Command::new(env!("CARGO_BIN_EXE_strait"));
    server
        .args(["serve", "--port", "0", "--compression"])
        .arg(&out)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut server = server.spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(server.stdout.take().unwrap()), &mut line).unwrap();
    server.kill().unwrap();
    let said = String::from_utf8(server.wait_with_output().unwrap().stderr).unwrap();
    assert!(said.contains("cache profile cskv-80 takes ") && said.contains("more than 0.2 of the 2560 of an exact cache"), "{said}");
}
