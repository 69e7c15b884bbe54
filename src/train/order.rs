//! Which texts and which positions a step looks at: functions of the seed and the step alone, so that a run that was cut off goes
//! on with the very batches it would have had.

/// A number that depends on its arguments alone: SplitMix64's finaliser, chained.
fn draw(seed: u64, stream: u64, counter: u64) -> u64 {
    [stream, counter].into_iter().fold(seed, |state, x| {
        let mut z = (state ^ x).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// Which of `n` things comes `index`-th: rounds through all of them, each in an order of its own.
pub(super) fn shuffled(seed: u64, index: u64, n: usize) -> usize {
    let (round, place) = (index / n as u64, (index % n as u64) as usize);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&i| (draw(seed, round, i as u64), i));
    order[place]
}

/// `count` of `range`, rising, one out of each of `count` equal stretches: the middle of it, or drawn for `Some((seed, index))`.
pub(super) fn spread(range: std::ops::Range<usize>, count: usize, drawn: Option<(u64, u64)>) -> Vec<usize> {
    let bound = |i: usize| range.start + i * range.len() / count;
    let within = |i: usize| match drawn {
        None => 0.5,
        // 24 bits below 1; the top bit apart from `shuffled`'s streams.
        Some((seed, index)) => (draw(seed, index | 1 << 63, i as u64) >> 40) as f64 / f64::from(1 << 24),
    };
    let one = |i: usize| (bound(i) + ((bound(i + 1) - bound(i)) as f64 * within(i)) as usize).min(range.end - 1);
    (0..count).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_visits_everything_and_no_two_alike() {
        let round = |seed, r: u64| (0..20).map(|i| shuffled(seed, r * 20 + i, 20)).collect::<Vec<_>>();
        for r in 0..5 {
            let mut all = round(1, r);
            all.sort();
            assert_eq!(all, (0..20).collect::<Vec<_>>());
        }
        assert!(round(1, 0) != round(1, 1) && round(1, 0) != round(2, 0));
        assert_eq!(shuffled(7, 3, 1), 0);
    }

    #[test]
    fn spread_positions_rise_and_stay_inside() {
        for (range, count) in [(5..9, 4), (10..1000, 256), (0..1, 1), (3..10, 6)] {
            for drawn in [None, Some((1, 2)), Some((1, 3))] {
                let got = spread(range.clone(), count, drawn);
                assert!(got.len() == count && got.iter().all(|i| range.contains(i)), "{got:?}");
                assert!(got.windows(2).all(|w| w[0] < w[1]) || range.len() < count, "{got:?}");
            }
        }
        assert_ne!(spread(0..1000, 10, Some((1, 2))), spread(0..1000, 10, Some((1, 3))));
        assert_eq!(spread(0..4, 4, Some((9, 9))), [0, 1, 2, 3]);
    }
}
