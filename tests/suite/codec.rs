//! The quantiser by distribution. Every error is judged against what the format allows: half a step, and the rounding of
//! scale and minimum to f16.

use half::f16;
use strait::kv::layout::VALUE_GROUP;
use strait::quant::{Order, Rotation, Scale, dequantise, get, levels, put, quantise_group, quantise_normal, words};

const BITS: [u32; 4] = [8, 4, 3, 2];

/// Normal numbers (sums of twelve uniform ones) from a seed.
struct Normal(u64);

impl Normal {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn next(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    fn group(&mut self, n: usize, mean: f64, deviation: f64) -> Vec<f32> {
        (0..n).map(|_| (mean + deviation * self.next()) as f32).collect()
    }
}

/// What comes back of `x`, through packed codes as in a page.
fn through(x: &[f32], bits: u32) -> (Vec<f32>, Vec<u8>, Scale) {
    let mut codes = vec![0xee; x.len()];
    let scale = quantise_group(x, bits, &mut codes);
    let n = x.len();
    let mut lane = vec![0; words(n, bits)];
    codes.iter().enumerate().for_each(|(i, &code)| put(&mut lane, (n, bits, Order::Runs), i, &[code]));
    let mut read = vec![[0xdd]; n];
    read.iter_mut().enumerate().for_each(|(i, code)| get(&lane, (n, bits, Order::Runs), i, code));
    let read = read.concat();
    assert_eq!(read, codes, "codes survive packing");
    let mut back = vec![f32::NAN; x.len()];
    dequantise(&read, scale, &mut back);
    (back, codes, scale)
}

/// Half the distance of f16 numbers around `x`: the most that rounding moves it.
fn half_ulp(x: f64) -> f64 {
    (x.abs() * 2.0_f64.powi(-11)).max(2.0_f64.powi(-25))
}

/// The largest error that the format excuses: half a (rounded) step inside the range, and at its ends what the rounded minimum and
/// the rounded scale leave uncovered.
fn bound(x: &[f32], bits: u32) -> f64 {
    let top = f64::from((1_u32 << bits) - 1);
    let (min, max) = x.iter().fold((f64::MAX, f64::MIN), |(a, b), &v| (a.min(v.into()), b.max(v.into())));
    let step = (max - min) / top;
    let arithmetic = 4.0 * f64::from(f32::EPSILON) * min.abs().max(max.abs()); // f32 sums and products
    (step + half_ulp(step)) / 2.0 + half_ulp(min) + top * half_ulp(step) + arithmetic
}

/// Largest error over the bound.
fn ratio(x: &[f32], bits: u32) -> f64 {
    let (back, ..) = through(x, bits);
    let worst = x.iter().zip(&back).map(|(&x, &y)| (f64::from(x) - f64::from(y)).abs()).fold(0.0, f64::max);
    assert!(back.iter().all(|y| y.is_finite()));
    worst / bound(x, bits)
}

/// Root mean square of the error over that of the numbers.
fn relative_error(pairs: impl Iterator<Item = (f32, f32)>) -> f64 {
    let (error, size) = pairs.fold((0.0, 0.0), |(e, s), (x, y)| {
        let (x, y) = (f64::from(x), f64::from(y));
        (e + (x - y).powi(2), s + x * x)
    });
    (error / size).sqrt()
}

#[test]
fn no_distribution_exceeds_the_bound_of_the_format() {
    let mut d = Normal(1);
    let mut outlier = d.group(64, 0.0, 1.0);
    outlier[17] = 80.0;
    let cases: Vec<(&str, Vec<f32>)> = vec![
        ("flat", vec![0.37; 64]),
        ("flat, negative and large", vec![-1234.5; 64]),
        ("zero", vec![0.0; 64]),
        ("one element", vec![3.3]),
        ("two plateaus", (0..64).map(|i| if i % 3 == 0 { -2.0 } else { 7.5 }).collect()),
        ("ramp", (0..64).map(|i| i as f32 * 0.1 - 2.0).collect()),
        ("normal", d.group(64, 0.0, 1.0)),
        ("normal, of a value group", d.group(VALUE_GROUP, 0.0, 0.02)),
        ("heavy tail", (0..64).map(|_| (d.next().powi(5) / 10.0) as f32).collect()),
        ("one outlier", outlier),
        ("mean 3 deviations away", d.group(64, 3.0, 1.0)),
        ("mean 10 deviations below", d.group(64, -10.0, 1.0)),
        ("mean 1000 deviations away", d.group(64, 1000.0, 1.0)),
        ("smaller than f16 is normal", d.group(64, 0.0, 1e-6)),
        ("smaller than f16 is at all", d.group(64, 0.0, 1e-12)),
        ("subnormal f32", d.group(64, 0.0, 1e-40)),
        ("nearly the largest f16", d.group(64, 50_000.0, 2000.0)),
    ];
    for bits in BITS {
        for (name, x) in &cases {
            let ratio = ratio(x, bits);
            assert!(ratio <= 1.0, "{name} at {bits} bits: {ratio:.3} of the bound");
        }
    }
    for seed in 0..300 {
        let mut d = Normal(seed);
        let (mean, deviation) = (10_f64.powf(d.uniform() * 6.0 - 3.0), 10_f64.powf(d.uniform() * 6.0 - 4.0));
        let n = 1 + (d.uniform() * 64.0) as usize;
        let x = d.group(n, mean, deviation);
        let bits = BITS[seed as usize % 4];
        let ratio = ratio(&x, bits);
        assert!(ratio <= 1.0, "seed {seed}, {n} numbers of {mean} +- {deviation} at {bits} bits: {ratio:.3}");
    }
}

#[test]
fn errors_of_normal_numbers_are_those_of_an_ideal_uniform_quantiser() {
    // Uniform over a step: its square's mean is step^2 / 12. A biased rounding (truncation has step^2 / 3) shows at once.
    let mut d = Normal(2);
    for bits in BITS {
        let (mut squares, mut ideal, mut sum, mut steps) = (0.0, 0.0, 0.0, 0.0);
        for _ in 0..400 {
            let x = d.group(64, 0.5, 1.0);
            let (back, _, scale) = through(&x, bits);
            let step = f64::from(scale.scale.to_f32());
            for (x, y) in x.iter().zip(back) {
                let e = f64::from(*x) - f64::from(y);
                squares += e * e;
                sum += e;
                ideal += step * step / 12.0;
                steps += step;
            }
        }
        let ratio = squares / ideal;
        assert!((0.85..1.15).contains(&ratio), "{bits} bits: {ratio:.3} of the ideal");
        assert!((sum / steps).abs() < 0.02, "{bits} bits: biased by {:.4} of a step", sum / steps);
    }
}

#[test]
fn every_code_is_the_nearest() {
    let mut d = Normal(3);
    for bits in BITS {
        for (mean, deviation) in [(0.0, 1.0), (20.0, 1.0), (-3.0, 1e-3), (0.0, 1e4)] {
            let x = d.group(64, mean, deviation);
            let (_, codes, scale) = through(&x, bits);
            for (&x, &code) in x.iter().zip(&codes) {
                let distance = |code: u32| (scale.value(code as u8) - x).abs();
                let best = (0..1 << bits).map(distance).fold(f32::MAX, f32::min);
                assert!(distance(code.into()) <= best + 1e-5 * x.abs().max(scale.scale.to_f32()), "{x} as {code} of {scale:?}");
            }
        }
    }
}

/// An asymmetric quantiser whose zero point is clamped to the codes, as CSKV's published code has it: what not to do.
fn clamped_zero_point(x: &[f32], bits: u32) -> Vec<f32> {
    let top = ((1_u32 << bits) - 1) as f32;
    let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(a, b), &v| (a.min(v), b.max(v)));
    let scale = (max - min) / top;
    let zero = (-min / scale).round().clamp(0.0, top);
    x.iter().map(|v| ((v / scale).round() + zero).clamp(0.0, top) - zero).map(|q| q * scale).collect()
}

#[test]
fn an_offset_group_keeps_its_accuracy() {
    // The relative error must fall as the mean grows, for the mean itself is kept; a clamped zero point loses it instead.
    for (mean, most, clamped_least) in [(3.0, 0.030, 0.07), (5.0, 0.019, 0.2), (10.0, 0.0105, 0.5)] {
        let mut d = Normal(4);
        let groups: Vec<Vec<f32>> = (0..200).map(|_| d.group(32, mean, 1.0)).collect();
        let ours = relative_error(groups.iter().flat_map(|x| x.iter().copied().zip(through(x, 4).0).collect::<Vec<_>>()));
        let theirs = relative_error(groups.iter().flat_map(|x| x.iter().copied().zip(clamped_zero_point(x, 4)).collect::<Vec<_>>()));
        assert!(ours <= most, "mean/deviation {mean}: {ours:.4}");
        assert!(theirs >= clamped_least, "mean/deviation {mean}: the clamped one has {theirs:.4}, so this test says nothing");
    }
}

#[test]
fn an_outlier_channel_loses_no_more_than_any_other() {
    // A key channel over a page is its own group, so its relative error does not depend on its size, nor others' on it.
    let mut d = Normal(5);
    let page: Vec<Vec<f32>> = (0..8).map(|_| d.group(64, 0.0, 1.0)).collect();
    let mut loud = page.clone();
    loud[3].iter_mut().for_each(|x| *x *= 1024.0);
    for bits in BITS {
        for (channel, (quiet, loud)) in page.iter().zip(&loud).enumerate() {
            let error = |x: &[f32]| relative_error(x.iter().copied().zip(through(x, bits).0));
            let (a, b) = (error(quiet), error(loud));
            assert!((a - b).abs() <= 1e-6 * a, "channel {channel} at {bits} bits: {a} and {b}");
        }
    }
}

#[test]
fn what_f16_cannot_hold_is_clamped_and_stays_finite() {
    for bits in BITS {
        let top = f64::from((1_u32 << bits) - 1);
        for x in
            [vec![1e30_f32, -1e30], vec![f32::MAX, f32::MIN], vec![1e6, 2e6, 3e6], vec![-70_000.0, 0.0, 70_000.0], vec![65_519.0, 65_520.0]]
        {
            let (back, _, scale) = through(&x, bits);
            assert!(
                scale.scale.is_finite() && scale.min.is_finite() && back.iter().all(|y| y.is_finite()),
                "{x:?} at {bits} bits: {back:?}"
            );
            assert!(scale.scale >= f16::ZERO);
            // Order survives, and what f16 does hold is still within a step.
            let mut sorted = back.clone();
            sorted.sort_by(f32::total_cmp);
            let rising = x.windows(2).all(|w| w[0] <= w[1]);
            assert!(!rising || sorted == back, "{x:?} at {bits} bits: {back:?}");
            for (x, y) in x.iter().zip(&back).filter(|(x, _)| x.abs() <= 65_504.0) {
                let range = 140_000.0 / top + top * half_ulp(140_000.0 / top);
                assert!((f64::from(*x) - f64::from(*y)).abs() <= range, "{x} came back as {y} at {bits} bits");
            }
        }
    }
}

#[test]
fn degenerate_groups_come_back_exactly_or_as_near_as_f16() {
    for bits in BITS {
        // Values that f16 holds come back to the bit where the group has no range.
        for v in [0.0_f32, -0.5, 1024.0, 6.0e-8] {
            let (back, codes, scale) = through(&[v; 33], bits);
            assert_eq!((back, codes), (vec![f16::from_f32(v).to_f32(); 33], vec![0; 33]), "{v} at {bits} bits");
            assert_eq!(scale.scale, f16::ZERO);
        }
        // As many evenly spaced levels as codes: every one is exact.
        let levels: Vec<f32> = (0..1 << bits).map(|i| i as f32 * 0.25 - 8.0).collect();
        assert_eq!(through(&levels, bits).0, levels, "{bits} bits");
        // A range below the smallest f16 has no step: everything becomes the minimum, which is within the bound.
        let tiny = [1.0e-9_f32, 2.0e-9, 3.0e-9];
        assert!(through(&tiny, bits).0.iter().all(|y| y.abs() < 1e-7));
        assert_eq!(through(&[], bits).0, Vec::<f32>::new());
    }
}

/// Error of a rotated block over its energy, as a share of what the best quantiser of even steps leaves of a normal distribution (Max
/// 1960, table II).
fn normal_ratio(blocks: &[Vec<f32>], bits: u32) -> f64 {
    let least = match bits {
        2 => 0.118_846,
        3 => 0.037_440,
        _ => 0.011_543,
    };
    let (levels, unit) = levels(bits);
    let (mut error, mut energy) = (0.0, 0.0);
    for block in blocks {
        let mut x = block.clone();
        Rotation::new(x.len()).apply(&mut x, 1);
        let mut codes = vec![0; x.len()];
        let deviation = quantise_normal(&x, bits, &mut codes).to_f32();
        for (x, code) in x.iter().zip(codes) {
            error += f64::from(x - deviation * f32::from(levels[code as usize]) / unit).powi(2);
            energy += f64::from(*x).powi(2);
        }
    }
    error / energy / least
}

#[test]
fn rotated_numbers_of_any_distribution_are_quantised_as_normal_ones() {
    for bits in [4, 3, 2] {
        for n in [24, 64, 90, 352] {
            let mut d = Normal(77);
            let mut blocks = |make: &mut dyn FnMut(&mut Normal, usize) -> f64| -> Vec<Vec<f32>> {
                (0..200).map(|_| (0..n).map(|i| make(&mut d, i) as f32).collect()).collect()
            };
            // Blocks are short of a distribution's law by their finite size: a deviation that is fitted to each gains a little.
            let normal = normal_ratio(&blocks(&mut |d, _| d.next()), bits);
            assert!((0.8..1.03).contains(&normal), "normal, {bits} bits, {n}: {normal:.3}");
            let cases = [
                ("flat", blocks(&mut |d, _| d.uniform() - 0.5)),
                ("ramp", blocks(&mut |d, i| i as f64 + 0.1 * d.next())),
                ("heavy tail", blocks(&mut |d, _| d.next() / (0.05 + d.uniform()))),
                ("falling energy", blocks(&mut |d, i| d.next() * 0.9f64.powi(i as i32))),
                ("an outlier channel", blocks(&mut |d, i| if i == 5 { 50.0 + d.next() } else { d.next() })),
                ("an offset mean", blocks(&mut |d, _| 10.0 + d.next())),
            ];
            for (name, blocks) in cases {
                let ratio = normal_ratio(&blocks, bits);
                // Least of all normal is a ramp, which is all but one vector, in few elements.
                assert!(ratio < 1.6, "{name}, {bits} bits, {n}: {ratio:.3} of what normal numbers lose");
            }
        }
    }
    // Nothing, one element, and what f16 barely holds.
    for (x, want) in [(vec![0.0f32; 8], 0.0), (vec![3.0], 3.0), (vec![1e6; 4], 65504.0), (vec![1e-30; 4], 0.0)] {
        let mut codes = vec![9; x.len()];
        let deviation = quantise_normal(&x, 4, &mut codes).to_f32();
        let (levels, unit) = levels(4);
        let back = deviation * f32::from(levels[codes[0] as usize]) / unit;
        assert!((back - want).abs() <= 0.01 * want + if want == 65504.0 { 2e5 } else { 0.0 }, "{x:?} came back as {back}");
    }
}
