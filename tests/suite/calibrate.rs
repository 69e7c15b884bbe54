//! The closed form is the optimum, however the rows come in.

use strait::calibrate::{
    CalibrateError, Choice, Moments, Products, Source, Sources, Telling, Trial, artifact, collect, hull, products, sample, solve, spread,
    tokens_needed, value_metric,
};
use strait::compress::artifact::{Artifact, Fingerprint};
use strait::compress::{FrequencyMap, KeyBasis, KeyMap, Projection};
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Quantiser, Size, Width, Widths};
use strait::model::config::ModelConfig;
use strait::model::decoder::Decoder;
use strait::model::weights::{LayerWeights, LoadDtype, ModelWeights};
use strait::ops::cpu::Cpu;
use strait::ops::{Matrix, MatrixData};

use crate::artifact::{by_channels, channels_of, cskv, model};

/// Uniform in -1..1 from a seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}

/// `n` rows of `c` correlated channels around a mean of about `offset`: `spectrum(i)` scales the `i`-th factor.
fn rows(seed: u64, n: usize, c: usize, offset: f64, spectrum: fn(usize) -> f64) -> Vec<f32> {
    let mut noise = Noise(seed);
    let mixing: Vec<f64> = (0..c * c).map(|_| noise.next()).collect();
    let mean: Vec<f64> = (0..c).map(|_| offset * (1.0 + noise.next())).collect();
    let mut out = Vec::with_capacity(n * c);
    for _ in 0..n {
        let factors: Vec<f64> = (0..c).map(|i| noise.next() * spectrum(i)).collect();
        out.extend((0..c).map(|j| (mean[j] + (0..c).map(|i| factors[i] * mixing[i * c + j]).sum::<f64>()) as f32));
    }
    out
}

fn falling(i: usize) -> f64 {
    0.8_f64.powi(i as i32)
}

/// Eigenvalues of the covariance of channels `from..to`, falling: Jacobi rotations, slow and plain.
fn eigenvalues(rows: &[f32], c: usize, from: usize, to: usize) -> Vec<f64> {
    let (n, m) = ((rows.len() / c) as f64, to - from);
    let mean: Vec<f64> = (from..to).map(|j| rows.chunks_exact(c).map(|r| f64::from(r[j])).sum::<f64>() / n).collect();
    let mut a = vec![vec![0.0; m]; m];
    for row in rows.chunks_exact(c) {
        let x: Vec<f64> = (0..m).map(|j| f64::from(row[from + j]) - mean[j]).collect();
        for i in 0..m {
            for j in 0..m {
                a[i][j] += x[i] * x[j] / n;
            }
        }
    }
    for _ in 0..60 {
        for p in 0..m {
            for q in p + 1..m {
                if a[p][q] == 0.0 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let cos = 1.0 / (t * t + 1.0).sqrt();
                let sin = t * cos;
                for row in &mut a {
                    (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
                }
                let (upper, lower) = a.split_at_mut(q);
                for (x, y) in upper[p].iter_mut().zip(&mut lower[0]) {
                    (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
                }
            }
        }
    }
    let mut values: Vec<f64> = (0..m).map(|i| a[i][i]).collect();
    values.sort_by(|x, y| y.total_cmp(x));
    values
}

/// Mean over the rows of the squared error of down and up.
fn error(p: &Projection, rows: &[f32]) -> f64 {
    let c = p.channels();
    let mut sum = 0.0;
    for row in rows.chunks_exact(c) {
        for g in &p.groups {
            let (width, rank) = (g.channels.len(), g.ranks.len());
            let x: Vec<f64> = g.channels.clone().map(|i| f64::from(row[i]) - f64::from(p.mean[i])).collect();
            let latent: Vec<f64> = (0..rank).map(|r| (0..width).map(|i| x[i] * f64::from(g.down[i * rank + r])).sum()).collect();
            for (i, x) in x.iter().enumerate() {
                let back: f64 = (0..rank).map(|r| latent[r] * f64::from(g.up[r * width + i])).sum();
                sum += (x - back).powi(2);
            }
        }
    }
    sum / (rows.len() / c) as f64
}

fn watched(layers: usize, kv_heads: usize, head_dim: usize, keys: &[f32], values: &[f32]) -> Moments {
    let mut moments = Moments::new(&model(layers, kv_heads, kv_heads, head_dim), 0);
    for layer in 0..layers {
        // In uneven pieces, as chunks of a prompt come.
        let c = kv_heads * head_dim;
        let (mut at, n) = (0, keys.len() / c);
        for piece in [1, 7, 300].into_iter().cycle() {
            let end = (at + piece).min(n);
            moments.add(layer, at, &keys[at * c..end * c], &values[at * c..end * c]).unwrap();
            at = end;
            if at == n {
                break;
            }
        }
    }
    moments
}

#[test]
fn the_error_of_every_rank_is_the_energy_of_what_was_dropped_and_no_basis_does_better() {
    // Fewer tokens than channels (solved on their side), more, and so many that rows were folded away.
    for n in [12, 40, 1300] {
        let (keys, values) = (rows(1, n, 16, 0.0, falling), rows(2, n, 16, 5.0, falling));
        for (basis, groups) in [(BasisKind::Joint, 1), (BasisKind::Grouped(2), 2), (BasisKind::Grouped(1), 4)] {
            let widest = if groups == 1 && n == 12 { 8 } else { 16 }; // 12 tokens do not span 16 channels
            let solution = solve(&watched(1, 4, 4, &keys, &values), basis, &Source::Closed, (widest, widest)).unwrap();
            for (part, (data, of)) in
                [(&keys, channels_of(&solution.layers[0].keys)), (&values, &solution.layers[0].values)].into_iter().enumerate()
            {
                let width = 16 / groups;
                let best: Vec<Vec<f64>> = (0..groups).map(|g| eigenvalues(data, 16, g * width, (g + 1) * width)).collect();
                let total: f64 = best.iter().flatten().sum();
                for rank in (groups..=widest).step_by(groups) {
                    let dropped: f64 = best.iter().map(|e| e[rank / groups..].iter().sum::<f64>()).sum();
                    let got = error(&of.projection(rank).unwrap(), data);
                    assert!(
                        (got - dropped).abs() <= 1e-5 * total,
                        "n {n}, {basis:?}, part {part}, rank {rank}: {got} for {dropped} of {total}"
                    );
                    let kept = solution.spectra[0][part].kept(rank);
                    assert!((kept - (1.0 - dropped / total)).abs() <= 1e-6, "n {n}, {basis:?}, rank {rank}: {kept}");
                }
            }
        }
    }
}

#[test]
fn full_rank_gives_every_input_back() {
    for offset in [0.0, 100.0] {
        let data = rows(3, 200, 16, offset, falling);
        let solution = solve(&watched(1, 4, 4, &data, &data), BasisKind::Joint, &Source::Closed, (16, 16)).unwrap();
        let p = channels_of(&solution.layers[0].keys).projection(16).unwrap();
        let (g, scale) = (&p.groups[0], 1.0 + offset as f32);
        for row in data.chunks_exact(16) {
            // In f32, as the kernels do it.
            let x: Vec<f32> = row.iter().zip(&p.mean).map(|(x, m)| x - m).collect();
            let latent: Vec<f32> = (0..16).map(|r| (0..16).map(|i| x[i] * g.down[i * 16 + r]).sum()).collect();
            for (i, &x) in row.iter().enumerate() {
                let back = p.mean[i] + (0..16).map(|r| latent[r] * g.up[r * 16 + i]).sum::<f32>();
                assert!((back - x).abs() <= 1e-4 * scale, "{back} for {x}");
            }
        }
    }
}

#[test]
fn directions_are_orthonormal_even_where_there_is_no_energy() {
    // Rank 3 data: what is beyond must still be a basis, on both sides of n = channels.
    let rank_3: fn(usize) -> f64 = |i| if i < 3 { 1.0 } else { 0.0 };
    for (n, name) in [(12, "short"), (40, "long")] {
        for data in [rows(4, n, 16, 2.0, rank_3), vec![1.5; n * 16]] {
            let solution = solve(&watched(1, 4, 4, &data, &data), BasisKind::Joint, &Source::Closed, (10, 10)).unwrap();
            let d = &channels_of(&solution.layers[0].keys).directions;
            for i in 0..10 {
                for j in 0..10 {
                    let dot: f32 = (0..16).map(|c| d[i * 16 + c] * d[j * 16 + c]).sum();
                    assert!((dot - f32::from(i == j)).abs() < 1e-4, "{name}: {i}.{j} = {dot}");
                }
            }
            assert!(solution.energy_kept(10, 10)[0].0 > 1.0 - 1e-9);
        }
    }
}

#[test]
fn a_large_common_offset_costs_no_accuracy() {
    // Mean a thousand times the deviation: one sum of squares in f32 would hold nothing of the deviation.
    let centred = rows(5, 1300, 8, 0.0, falling);
    let moved: Vec<f32> = centred.iter().map(|x| x + 1024.0).collect();
    let [a, b] = [&centred, &moved].map(|d| solve(&watched(1, 2, 4, d, d), BasisKind::Joint, &Source::Closed, (4, 4)).unwrap());
    for (x, y) in channels_of(&a.layers[0].keys).directions.iter().zip(&channels_of(&b.layers[0].keys).directions) {
        assert!((x - y).abs() < 2e-3, "{x} {y}");
    }
}

#[test]
fn sinks_take_no_part() {
    let data = rows(6, 60, 8, 0.0, falling);
    let mut plain = Moments::new(&model(1, 2, 2, 4), 0);
    let mut spared = Moments::new(&model(1, 2, 2, 4), 4);
    let wild = [1e6_f32; 4 * 8];
    for text in data.chunks(20 * 8) {
        plain.add(0, 0, text, text).unwrap();
        // Four wild positions first, split over two chunks.
        spared.add(0, 0, &wild[..3 * 8], &wild[..3 * 8]).unwrap();
        let rest = [&wild[..8], text].concat();
        spared.add(0, 3, &rest, &rest).unwrap();
    }
    assert_eq!((plain.tokens(), spared.tokens()), (60, 60));
    let [a, b] = [plain, spared].map(|m| solve(&m, BasisKind::Joint, &Source::Closed, (4, 4)).unwrap());
    assert_eq!(a.layers, b.layers);
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let m = model(2, 2, 2, 4);
    let data = rows(7, 4, 8, 0.0, falling);
    let mut moments = Moments::new(&m, 0);
    for (part, at, wrong) in [("keys", 9, f32::NAN), ("values", 30, f32::INFINITY)] {
        let mut bad = data.clone();
        bad[at] = wrong;
        let (keys, values) = if part == "keys" { (&bad, &data) } else { (&data, &bad) };
        let message = moments.add(1, 100, keys, values).unwrap_err().to_string();
        assert!(message.starts_with(&format!("layer 1 made {part} that are not finite (token {} of", 100 + at / 8)), "{message}");
    }
    assert!(matches!(moments.add(0, 0, &data[1..], &data[1..]), Err(CalibrateError::Ragged { part: "keys", .. })));
    assert!(matches!(moments.add(0, 0, &data, &data[8..]), Err(CalibrateError::Ragged { part: "values", .. })));
    assert_eq!(moments.tokens(), 0, "nothing of a refused chunk is taken in");

    moments.add(0, 0, &data, &data).unwrap();
    assert!(matches!(
        solve(&moments, BasisKind::Joint, &Source::Closed, (2, 2)),
        Err(CalibrateError::Uneven { layer: 1, tokens: 0, first: 4 })
    ));
    moments.add(1, 0, &data, &data).unwrap();
    let few = solve(&moments, BasisKind::Joint, &Source::Closed, (2, 4)).unwrap_err();
    assert_eq!(
        few.to_string(),
        "calibration saw 4 tokens (sinks left out) and a rank of 4 needs at least 5; give it more text, or a higher --tokens"
    );
    assert_eq!((tokens_needed(BasisKind::Joint, 4, &m), tokens_needed(BasisKind::Grouped(1), 4, &m)), (5, 3));
    assert!(
        solve(&moments, BasisKind::Joint, &Source::Closed, (2, 3)).is_ok()
            && solve(&moments, BasisKind::Grouped(1), &Source::Closed, (6, 6)).is_ok()
    );
    for (basis, rank) in [(BasisKind::Joint, 0), (BasisKind::Joint, 9), (BasisKind::Grouped(1), 3)] {
        assert!(
            matches!(solve(&moments, basis, &Source::Closed, (rank, 2)), Err(CalibrateError::Rank { part: "keys", .. })),
            "{basis:?} {rank}"
        );
    }
    assert!(matches!(
        solve(&moments, BasisKind::Grouped(3), &Source::Closed, (2, 2)),
        Err(CalibrateError::Groups { heads: 3, kv_heads: 2 })
    ));
}

#[test]
fn an_artifact_has_one_basis_per_grouping_as_wide_as_its_widest_profile() {
    let m = model(3, 8, 4, 8);
    let data = rows(8, 100, 32, 1.0, falling);
    let moments = watched(3, 4, 8, &data, &data);
    let profiles = [
        Profile { name: "full".into(), cskv: None },
        cskv("cskv-50", 0.5, 16, BasisKind::Joint),
        cskv("cskv-75", 0.25, 16, BasisKind::Joint),
        cskv("cskv-75-4", 0.25, 4, BasisKind::Joint),
        cskv("grouped", 0.25, 4, BasisKind::Grouped(2)),
    ];
    let made = artifact(&moments, &m, Fingerprint([3; 32]), &profiles, &Sources::closed(), None).unwrap();
    let shapes: Vec<_> = made.artifact.bases().iter().map(|b| (b.name.as_str(), b.layers[2].keys.width())).collect();
    assert_eq!(shapes, [("grouped-2", 8), ("joint", 16)]);
    assert_eq!(made.artifact.layers(&profiles[2]).unwrap(), made.artifact.layers(&profiles[3]).unwrap());
    for (profile, kept) in profiles[1..].iter().zip(&made.energy) {
        for (layer, (l, &(k, v))) in made.artifact.layers(profile).unwrap().iter().zip(&kept.layers).enumerate() {
            let total: f64 = eigenvalues(&data, 32, 0, 32).iter().sum();
            assert!((error(by_channels(&l.keys), &data) / total - (1.0 - k)).abs() < 1e-4, "{} layer {layer}", profile.name);
            assert_eq!(k, v);
        }
    }
    let kept = &made.energy[1].layers;
    assert!(kept[0].0 > 0.9 && kept[0].0 < 0.999, "{kept:?}");
    let line =
        format!("cskv-75 keeps of the energy of keys/values, in percent by layer: {:.1}/{:.1} ", kept[0].0 * 100.0, kept[0].1 * 100.0);
    assert!(made.energy[1].to_string().starts_with(&line), "{}", made.energy[1]);
    let back = Artifact::from_bytes(&made.artifact.to_bytes(), &m, Fingerprint([3; 32])).unwrap();
    assert_eq!(back, made.artifact);
}

/// Squared errors of keys by (KV head, frequency), means over the rows.
fn frequency_errors(map: &FrequencyMap, rows: &[f32]) -> Vec<f64> {
    let (heads, half) = (map.kv_heads, map.half);
    let mut sums = vec![0.0; heads * half];
    let times = |[a, b]: [f64; 2], [c, d]: [f64; 2]| [a * c - b * d, a * d + b * c];
    for row in rows.chunks_exact(2 * half * heads) {
        let z = |h: usize, f: usize| [row[2 * half * h + f], row[2 * half * h + half + f]].map(f64::from);
        let mut back = vec![[0.0; 2]; heads * half];
        for (j, &f) in map.frequencies.iter().enumerate() {
            let mut latent = [0.0; 2];
            for h in 0..heads {
                let [re, im] = times(map.down[j * heads + h].map(f64::from), z(h, f as usize));
                latent = [latent[0] + re, latent[1] + im];
            }
            for h in 0..heads {
                let [re, im] = times(map.up[j * heads + h].map(f64::from), latent);
                let to = &mut back[h * half + f as usize];
                *to = [to[0] + re, to[1] + im];
            }
        }
        for h in 0..heads {
            for f in 0..half {
                let ([a, b], [c, d]) = (z(h, f), back[h * half + f]);
                sums[h * half + f] += (a - c).powi(2) + (b - d).powi(2);
            }
        }
    }
    let n = (rows.len() / (2 * half * heads)) as f64;
    sums.into_iter().map(|s| s / n).collect()
}

#[test]
fn by_frequency_what_is_dropped_is_the_error_and_weights_move_it_where_it_counts() {
    for n in [40, 1300] {
        let data = rows(9, n, 32, 0.7, falling);
        let mut moments = watched(1, 4, 8, &data, &data);
        // Queries of the second KV head are ten times as large as others, at frequency 3 a hundred times.
        let mut queries = rows(10, 64, 32, 0.0, |_| 1.0);
        for q in queries.chunks_exact_mut(32) {
            q[8..16].iter_mut().for_each(|x| *x *= 10.0);
            [11, 15].into_iter().for_each(|c| q[c] *= 10.0);
        }
        moments.add_queries(0, &queries).unwrap();
        let energy = |h: usize, f: usize| queries.chunks_exact(32).map(|q| q[8 * h + f].powi(2) + q[8 * h + 4 + f].powi(2)).sum::<f32>();
        let of = |weighting: &Source<'_>, rank: usize| {
            let solution = solve(&moments, BasisKind::Frequency, weighting, (32, 16)).unwrap();
            let KeyMap::Frequencies(map) = solution.layers[0].keys.map(rank).unwrap() else { panic!("keys by frequency") };
            assert!(matches!(solution.layers[0].keys, KeyBasis::Frequencies(_)));
            (frequency_errors(&map, &data), solution.spectra[0][0].kept(rank))
        };
        let metric = vec![(0..4 * 64).map(|i| f64::from(u8::from(i % 64 % 9 == 0))).collect::<Vec<_>>()];
        let total: f64 = data.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
        for rank in [2, 8, 20, 32] {
            let (errors, kept) = of(&Source::Closed, rank);
            let error: f64 = errors.iter().sum();
            assert!((error / total - (1.0 - kept)).abs() < 1e-5, "n {n}, rank {rank}: {error} of {total}, kept {kept}");
            let (weighted, _) = of(&Source::Weighted(&metric), rank);
            let worth = |errors: &[f64]| (0..16).map(|i| f64::from(energy(i / 4, i % 4)) * errors[i]).sum::<f64>();
            let (closed_worth, worth) = (worth(&errors), worth(&weighted));
            assert!(worth <= closed_worth * (1.0 + 1e-6) + 1e-4, "n {n}, rank {rank}: {worth}, unweighted {closed_worth}");
            assert!(rank == 32 || worth < 0.9 * closed_worth, "n {n}, rank {rank}: {worth} gains nothing over {closed_worth}");
        }
    }
}

#[test]
fn weighted_values_lose_least_of_what_the_output_projection_sees() {
    let m = model(1, 8, 4, 8);
    let data = rows(11, 400, 32, 1.0, falling);
    let moments = watched(1, 4, 8, &data, &data);
    // An output projection that hardly looks at half of the channels of each head.
    let mut w = rows(12, 16, 64, 0.0, |_| 1.0);
    w.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % 8 < 4 { 1.0 } else { 0.02 });
    let metric = value_metric(&m, Matrix { out_features: 16, in_features: 64, data: MatrixData::F32(&w) });
    let seen = |p: &Projection| {
        let mut sum = 0.0;
        for row in data.chunks_exact(32) {
            let g = &p.groups[0];
            let rank = g.ranks.len();
            let x: Vec<f64> = (0..32).map(|i| f64::from(row[i] - p.mean[i])).collect();
            let latent: Vec<f64> = (0..rank).map(|r| (0..32).map(|i| x[i] * f64::from(g.down[i * rank + r])).sum()).collect();
            let lost: Vec<f64> = (0..32).map(|i| x[i] - (0..rank).map(|r| latent[r] * f64::from(g.up[r * 32 + i])).sum::<f64>()).collect();
            // Query head `q` reads its KV head's value through columns `8 q` on.
            for out in w.chunks_exact(64) {
                for q in 0..8 {
                    sum += (0..8).map(|i| lost[q / 2 * 8 + i] * f64::from(out[8 * q + i])).sum::<f64>().powi(2);
                }
            }
        }
        sum
    };
    let metrics = [metric];
    for rank in [4, 12, 24] {
        let of = |weighting: &Source<'_>| {
            let solution = solve(&moments, BasisKind::Joint, weighting, (4, 32)).unwrap();
            seen(&solution.layers[0].values.projection(rank).unwrap())
        };
        let (closed, weighted) = (of(&Source::Closed), of(&Source::Weighted(&metrics)));
        assert!(weighted < 0.9 * closed, "rank {rank}: {weighted} against {closed} unweighted");
    }
    let solution = solve(&moments, BasisKind::Joint, &Source::Weighted(&metrics), (4, 32)).unwrap();
    let whole = seen(&solution.layers[0].values.projection(32).unwrap());
    assert!(whole < 1e-4, "full rank loses {whole}");
}

/// Squared error that projecting keys on a basis, about its mean, leaves of `w diag(input)^(1/2)`.
fn error_of_weights(p: &Projection, w: &[f32], input: &[f64]) -> f64 {
    let (c, h) = (p.channels(), input.len());
    let columns: Vec<f32> = (0..h).flat_map(|j| (0..c).map(move |i| (i, j))).map(|(i, j)| w[i * h + j] * input[j].sqrt() as f32).collect();
    let mut about_zero = p.clone();
    about_zero.mean.fill(0.0);
    error(&about_zero, &columns) * h as f64
}

#[test]
fn svd_and_asvd_leave_what_the_dropped_singular_values_say_and_lose_more_than_the_closed_form() {
    let (c, h, n) = (16, 24, 400);
    let w = rows(20, c, h, 0.0, falling);
    let bias: Vec<f32> = (0..c).map(|i| i as f32 * 0.1).collect();
    // Inputs of unlike magnitude: the third is large.
    let inputs: Vec<f32> = rows(21, n, h, 0.0, falling).iter().enumerate().map(|(i, x)| if i % h == 2 { 30.0 * x } else { *x }).collect();
    let keys: Vec<f32> = inputs
        .chunks_exact(h)
        .flat_map(|x| (0..c).map(|i| bias[i] + (0..h).map(|j| w[i * h + j] * x[j]).sum::<f32>()).collect::<Vec<_>>())
        .collect();
    let mut m = model(1, 4, 4, 4);
    m.hidden = h;
    let mut moments = Moments::new(&m, 0);
    moments.add(0, 0, &keys, &keys).unwrap();
    moments.add_inputs(0, &inputs).unwrap();
    let magnitudes = moments.input_magnitudes(0);
    let plain: Vec<f64> = (0..h).map(|j| inputs.iter().skip(j).step_by(h).map(|x| f64::from(x.abs())).sum()).collect();
    for j in 0..h {
        assert!((magnitudes[j] / magnitudes[0] - plain[j] / plain[0]).abs() < 1e-4 * magnitudes[j] / magnitudes[0]);
    }
    let matrix = Matrix { out_features: c, in_features: h, data: MatrixData::F32(&w) };
    let projections = [(matrix, Some(&bias[..]), None); 2];
    let (even, weighed) = ([products(projections, &vec![1.0; h])], [products(projections, &magnitudes)]);
    let mut lost = Vec::new();
    for (init, input) in [(Source::Svd(&even), vec![1.0; h]), (Source::Asvd(&weighed), magnitudes.clone())] {
        // Columns and their negatives have no mean, so their covariance is the product of the weights.
        let both: Vec<f32> = (0..2 * h)
            .flat_map(|j| (0..c).map(move |i| (i, j)))
            .map(|(i, j)| w[i * h + j % h] * input[j % h].sqrt() as f32 * if j < h { 1.0 } else { -1.0 })
            .collect();
        let values = eigenvalues(&both, c, 0, c);
        let (total, solution) = (values.iter().sum::<f64>(), solve(&moments, BasisKind::Joint, &init, (c, c)).unwrap());
        let basis = channels_of(&solution.layers[0].keys);
        assert_eq!(basis.mean, bias, "the bias is the mean of what the weights make");
        for rank in 1..=c {
            let dropped = values[rank..].iter().sum::<f64>() * h as f64;
            let got = error_of_weights(&basis.projection(rank).unwrap(), &w, &input);
            assert!((got - dropped).abs() < 1e-5 * total * h as f64, "rank {rank}: {got} for {dropped}");
        }
        lost.push(error(&basis.projection(4).unwrap(), &keys));
        // By frequency too, the whole of it gives keys back, and energies are of keys.
        let whole = solve(&moments, BasisKind::Frequency, &init, (c, c)).unwrap();
        let KeyMap::Frequencies(map) = whole.layers[0].keys.map(c).unwrap() else { panic!("keys by frequency") };
        assert!(frequency_errors(&map, &keys).iter().all(|e| *e < 1e-4));
        assert!((whole.spectra[0][0].kept(c) - 1.0).abs() < 1e-6);
    }
    let closed = solve(&moments, BasisKind::Joint, &Source::Closed, (c, c)).unwrap();
    lost.push(error(&channels_of(&closed.layers[0].keys).projection(4).unwrap(), &keys));
    assert!(lost[0] > 1.2 * lost[1] && lost[1] > lost[2], "svd, asvd, closed: {lost:?}");
    // Neither needs text for its rank; inputs that are not finite are refused by layer and token.
    let none = Moments::new(&m, 0);
    assert!(solve(&none, BasisKind::Joint, &Source::Svd(&even), (c, c)).is_ok());
    let mut bad = inputs.clone();
    bad[5 * h + 1] = f32::NAN;
    let message = moments.add_inputs(0, &bad).unwrap_err().to_string();
    assert!(message.starts_with("layer 0 made inputs that are not finite (token 5 "), "{message}");
}

#[test]
fn text_the_model_says_itself_is_as_asked_and_the_same_each_time() {
    let checkpoint = strait::demo::checkpoint().unwrap();
    let ends = &checkpoint.generation.eos;
    let told = |seed: u64, begin: &[u32], want: usize| {
        let mut decoder = Decoder::new(&checkpoint.config, checkpoint.weights(LoadDtype::Auto), 512, 512);
        let mut heard = Vec::new();
        let texts = sample(&mut decoder, &Cpu::new(2), &Telling { begin, ends, want, seed }, |n| heard.push(n)).unwrap();
        assert!(heard.is_sorted() && heard.last() == Some(&want), "{heard:?}");
        texts
    };
    let texts = told(1, &[1], 2000);
    let total: usize = texts.iter().map(Vec::len).sum();
    assert!((2000..2000 + 16 + 1).contains(&total), "{total} tokens");
    for text in &texts {
        assert!(text.len() <= 512 && text[0] == 1 && !text[..text.len() - 1].iter().any(|t| ends.contains(t)), "{text:?}");
        assert!(ends.contains(text.last().unwrap()) || text.len() == 512 || texts.iter().rev().take(16).any(|t| t == text));
    }
    assert_eq!(texts, told(1, &[1], 2000));
    assert_ne!(texts, told(2, &[1], 2000));
    // With nothing to begin with, beginnings are drawn.
    let first: std::collections::HashSet<u32> = told(1, &[], 500).iter().map(|t| t[0]).collect();
    assert!(first.len() > 8);
}

#[test]
fn a_budget_goes_where_it_buys_most() {
    let mut noise = Noise(31);
    for _ in 0..200 {
        let mut any = |parts: usize| -> Vec<Vec<Choice>> {
            let one = |noise: &mut Noise| {
                let n = 2 + (noise.next().abs() * 5.0) as usize;
                let choices = (0..n).map(|i| Choice {
                    width: Width { rank: i, bits: 4 },
                    bytes: if i == 0 { 0 } else { 1 + (noise.next().abs() * 40.0) as usize },
                    error: noise.next().abs() * if i == 0 { 4.0 } else { 1.0 },
                });
                choices.collect::<Vec<_>>()
            };
            (0..parts).map(|_| one(&mut noise)).collect()
        };
        let choices = any(3);
        let hulls: Vec<Vec<Choice>> = choices.iter().cloned().map(hull).collect();
        for (hull, all) in hulls.iter().zip(&choices) {
            let slopes: Vec<f64> = hull.windows(2).map(|w| (w[0].error - w[1].error) / (w[1].bytes - w[0].bytes) as f64).collect();
            assert!(slopes.iter().all(|s| *s > 0.0) && slopes.is_sorted_by(|a, b| a > b), "{hull:?}");
            // No choice lies below the hull.
            for c in all {
                let at = hull.iter().rposition(|h| h.bytes <= c.bytes).unwrap();
                let floor = match hull.get(at + 1) {
                    Some(_) => hull[at].error - slopes[at] * (c.bytes - hull[at].bytes) as f64,
                    None => hull[at].error,
                };
                assert!(c.error >= floor - 1e-9 || hull.get(at + 1).is_none() && c.error >= floor, "{c:?} is below {hull:?}");
            }
        }
        // Along the order of steps, every spread is the best of all choices that take no more.
        let most: usize = hulls.iter().map(|h| h.last().unwrap().bytes).sum();
        let total = |c: &[Choice]| (c.iter().map(|c| c.bytes).sum::<usize>(), c.iter().map(|c| c.error).sum::<f64>());
        for budget in 0..=most {
            let (bytes, error) = total(&spread(&hulls, budget));
            assert!(bytes <= budget);
            let mut best = f64::INFINITY;
            for a in &hulls[0] {
                for b in &hulls[1] {
                    for c in &hulls[2] {
                        let (all, e) = total(&[*a, *b, *c]);
                        best = if all <= bytes { best.min(e) } else { best };
                    }
                }
            }
            // Where a step did not fit, smaller ones behind it fill what it left, which is good but need not be best.
            if budget == bytes && exact_step(&hulls, bytes) {
                assert!(error <= best + 1e-9, "{budget} bytes: {error} where {best} is there");
            }
        }
    }
}

/// Whether steps in the order of what they save come to this many bytes exactly, without one left out.
fn exact_step(hulls: &[Vec<Choice>], bytes: usize) -> bool {
    let mut steps: Vec<(f64, usize)> = hulls
        .iter()
        .flat_map(|h| h.windows(2).map(|w| ((w[0].error - w[1].error) / (w[1].bytes - w[0].bytes) as f64, w[1].bytes - w[0].bytes)))
        .collect();
    steps.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut sum = 0;
    sum == bytes
        || steps.iter().any(|(_, step)| {
            sum += step;
            sum == bytes
        })
}

#[test]
fn on_the_demo_model_a_budget_finds_the_layer_that_retrieves() {
    let checkpoint = strait::demo::checkpoint().unwrap();
    let model = &checkpoint.config;
    let tokenizer = strait::demo::tokenizer().unwrap();
    let texts: Vec<Vec<u32>> = strait::calibrate::demo_prompts(2, 1600).iter().map(|p| tokenizer.encode(p, false, true).unwrap()).collect();
    let mut decoder = Decoder::new(model, checkpoint.weights(LoadDtype::F32), 2048, 512);
    let mut moments = Moments::sampling(model, 4);
    let ops = Cpu::new(2);
    collect(&mut decoder, &ops, &texts, &mut moments, |_| ()).unwrap();
    let outputs: Vec<Matrix<'_>> = decoder.weights().layers.iter().map(|l| l.o.weight.matrix()).collect();
    let budget = |bytes: u32, quantiser: Quantiser| Profile {
        name: format!("b{bytes}-{quantiser:?}"),
        cskv: Some(Cskv {
            size: Size::Budget(bytes),
            value_quantiser: quantiser,
            ..Cskv::shares((1.0, 1.0), 4, (64, 4), BasisKind::Joint)
        }),
    };
    let profiles = [(96, Quantiser::Affine), (96, Quantiser::Hadamard), (300, Quantiser::Hadamard), (4000, Quantiser::Affine)]
        .map(|(b, q)| budget(b, q));
    let mut allocator = moments.allocator(Trial { model, ops: &ops, rope: decoder.rope(), outputs: &outputs, tried: &|_, _| () });
    let made = artifact(&moments, model, Fingerprint([1; 32]), &profiles, &Sources::closed(), Some(&mut allocator)).unwrap().artifact;
    let mut before = 0.0;
    for profile in &profiles {
        let widths = made.widths(profile).unwrap();
        let layout = PageLayout::new(model, ExactType::Bf16, profile, Some(&widths));
        let Some(Cskv { size: Size::Budget(budget), .. }) = profile.cskv else { unreachable!() };
        let bytes = layout.bytes_per_token();
        assert!(bytes <= f64::from(budget) && (bytes > 0.85 * f64::from(budget) || budget > 2000), "{bytes} of {budget}: {widths:?}");
        assert!(bytes >= before || budget == 96, "a larger budget buys more");
        before = bytes;
        if budget <= 300 {
            let bits = |w: &Widths| w.keys.rank * w.keys.bits as usize + w.values.rank * w.values.bits as usize;
            let most = widths.iter().map(bits).max().unwrap();
            assert_eq!(bits(&widths[2]), most, "layer 2 does the retrieving: {widths:?}");
        }
        // What was allocated is served, and comes back from its file.
        let maps = made.layers(profile).unwrap();
        assert!(maps.iter().zip(&widths).all(|(m, w)| (m.keys.rank(), m.values.rank()) == (w.keys.rank, w.values.rank)));
    }
    let back = Artifact::from_bytes(&made.to_bytes(), model, Fingerprint([1; 32])).unwrap();
    assert_eq!(back, made);
    // Neither another budget, nor this one through a quantiser that it was not spread by, which may have no levels for its bits.
    let mut turned = profiles[3].clone();
    turned.cskv.as_mut().unwrap().key_quantiser = Quantiser::Hadamard;
    assert!(made.layers(&turned).is_err());
    let other = budget(97, Quantiser::Hadamard);
    let message = made.layers(&other).unwrap_err().to_string();
    assert!(
        message.starts_with("the profile b97-Hadamard is not usable: the artifact was not made for this name, budget and quantisers"),
        "{message}"
    );
}

/// A text within the window meets nothing compressed, so that keeping nothing would look as good as anything.
#[test]
fn a_window_longer_than_the_text_is_no_reason_to_keep_nothing() {
    let checkpoint = strait::demo::checkpoint().unwrap();
    let model = &checkpoint.config;
    let tokenizer = strait::demo::tokenizer().unwrap();
    let prompt = tokenizer.encode(&strait::calibrate::demo_prompts(1, 900)[0], false, true).unwrap();
    let ops = Cpu::new(2);
    let widths = |texts: &[Vec<u32>], window: u32| {
        let mut decoder = Decoder::new(model, checkpoint.weights(LoadDtype::F32), 1024, 512);
        let mut moments = Moments::sampling(model, 4);
        collect(&mut decoder, &ops, texts, &mut moments, |_| ()).unwrap();
        let outputs: Vec<Matrix<'_>> = decoder.weights().layers.iter().map(|l| l.o.weight.matrix()).collect();
        let even = Cskv::shares((1.0, 1.0), 4, (window, 4), BasisKind::Joint);
        let profile = Profile { name: "b".into(), cskv: Some(Cskv { size: Size::Budget(300), ..even }) };
        let mut allocator = moments.allocator(Trial { model, ops: &ops, rope: decoder.rope(), outputs: &outputs, tried: &|_, _| () });
        let bases = solve(&moments, BasisKind::Joint, &Source::Svd(&even_products(model, decoder.weights())), (128, 128)).unwrap().layers;
        allocator.allocate(profile.cskv.as_ref().unwrap(), 300, &bases).map(|widths| {
            let bytes = PageLayout::new(model, ExactType::Bf16, &profile, Some(&widths)).bytes_per_token();
            (widths, bytes)
        })
    };
    assert!((300..1000).contains(&prompt.len()), "{}", prompt.len());
    let (fits, _) = widths(std::slice::from_ref(&prompt), (prompt.len() / 4) as u32).unwrap();
    for window in [prompt.len() as u32, 65536] {
        let (longer, bytes) = widths(std::slice::from_ref(&prompt), window).unwrap();
        assert!(bytes > 0.85 * 300.0, "{bytes} bytes of 300 under a window of {window}");
        assert_eq!(longer, fits, "the window that is measured is a quarter of the text");
    }
    // Many short texts are no better than one.
    let short: Vec<Vec<u32>> = prompt.chunks(40).map(<[u32]>::to_vec).collect();
    assert!(widths(&short, 64).unwrap().1 > 0.85 * 300.0);
    let tiny: Vec<Vec<u32>> = prompt.chunks(5).map(<[u32]>::to_vec).collect();
    let refused = widths(&tiny, 64).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the longest calibration text has 5 tokens, of which nothing is compressed beside 4 sinks; give longer texts"
    );
}

/// What the weights make of an even input.
fn even_products(model: &ModelConfig, weights: &ModelWeights<'_>) -> Vec<Products> {
    let one =
        |l: &LayerWeights<'_>| products([(l.k.weight.matrix(), None, None), (l.v.weight.matrix(), None, None)], &vec![1.0; model.hidden]);
    weights.layers.iter().map(one).collect()
}
