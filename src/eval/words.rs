//! Words for names and prose, and the draws from a seed that everything generated is made of.

use std::collections::HashSet;

// The demo model's words; other models know them too.
pub(super) use crate::calibrate::{ADJECTIVES, NOUNS};

const PEOPLE: [&str; 12] = ["Anna", "Ben", "Carla", "David", "Ella", "Frank", "Grace", "Henry", "Irene", "Leo", "Maria", "Oscar"];
const PLACES: [&str; 12] =
    ["market", "river", "school", "library", "garden", "station", "harbor", "forest", "village", "museum", "bakery", "theater"];
const FOODS: [&str; 10] = ["apples", "bread", "cheese", "soup", "rice", "honey", "tea", "grapes", "pasta", "cookies"];
const JOBS: [&str; 10] = ["teacher", "doctor", "farmer", "baker", "sailor", "painter", "singer", "driver", "nurse", "gardener"];

/// Numbers from a seed (splitmix64): the same on every machine, whatever crates come and go.
#[derive(Clone, Debug)]
pub(super) struct Draw(u64);

impl Draw {
    /// Begins at `seed`.
    pub(super) fn new(seed: u64) -> Self {
        Draw(seed)
    }

    /// Below `n`, which is positive and small beside 2^64.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// 64 fresh bits.
    pub(super) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `from`, which is not empty.
    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// `k` different numbers below `n` (all, where there are fewer), in random order.
    pub(super) fn distinct(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut seen = HashSet::new();
        let mut all = Vec::with_capacity(k.min(n));
        // Few of many are drawn until they differ; many of few are the beginning of a shuffle.
        if k < n / 2 {
            while all.len() < k {
                let i = self.below(n);
                if seen.insert(i) {
                    all.push(i);
                }
            }
            return all;
        }
        all.extend(0..n);
        self.shuffle(&mut all);
        all.truncate(k);
        all
    }

    /// Fisher and Yates.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// `n` different adjective-noun names in random order; `None` where there are not so many.
    ///
    /// The tenth of the combinations that the demo model was never trained on comes first, so that it retrieves rather
    /// than remembers; the others follow where those are too few.
    pub(super) fn names(&mut self, n: usize) -> Option<Vec<String>> {
        let (adjectives, nouns): (Vec<&str>, Vec<&str>) = (ADJECTIVES.split(' ').collect(), NOUNS.split(' ').collect());
        let all = || adjectives.iter().flat_map(|a| nouns.iter().map(move |b| format!("{a}-{b}")));
        let mut names: Vec<String> = all().filter(|name| held_out(name)).collect();
        self.shuffle(&mut names);
        if n > names.len() {
            let mut rest: Vec<String> = all().filter(|name| !held_out(name)).collect();
            self.shuffle(&mut rest);
            names.append(&mut rest);
        }
        names.truncate(n);
        // Where both kinds are used, the asked one may be of either.
        self.shuffle(&mut names);
        (names.len() == n).then_some(names)
    }

    /// A number of so many digits, the first not zero.
    pub(super) fn number(&mut self, digits: u32) -> String {
        let low = 10_usize.pow(digits - 1);
        (low + self.below(9 * low)).to_string()
    }

    /// A random UUID of version 4.
    pub(super) fn uuid(&mut self) -> String {
        let (a, b) = (self.bits(), self.bits());
        let (a, b) = (a & !0xf000 | 0x4000, b & !(3 << 62) | 1 << 63);
        format!("{:08x}-{:04x}-{:04x}-{:04x}-{:012x}", a >> 32, a >> 16 & 0xffff, a & 0xffff, b >> 48, b & 0xffff_ffff_ffff)
    }

    /// So many capital letters.
    pub(super) fn letters(&mut self, n: usize) -> String {
        (0..n).map(|_| char::from(b'A' + self.below(26) as u8)).collect()
    }

    /// A sentence of plain prose, without a number of more than two digits.
    pub(super) fn sentence(&mut self) -> String {
        let (adjectives, nouns): (Vec<&str>, Vec<&str>) = (ADJECTIVES.split(' ').collect(), NOUNS.split(' ').collect());
        let (p, q) = (*self.pick(&PEOPLE), *self.pick(&PEOPLE));
        let (here, there) = (*self.pick(&PLACES), *self.pick(&PLACES));
        let (food, job, how) = (*self.pick(&FOODS), *self.pick(&JOBS), *self.pick(&adjectives));
        let (thing, other, animal) = (*self.pick(&nouns), *self.pick(&nouns), *self.pick(&nouns));
        let count = 2 + self.below(19);
        match self.below(20) {
            0 => format!("{p} is a {job} who lives near the {here}."),
            1 => format!("{p} and {q} met at the {here}."),
            2 => format!("In a {how} town there was a {job} called {p}."),
            3 => format!("{p} wanted to buy {food} for {q}."),
            4 => format!("{q} asked {p} about the {thing}."),
            5 => format!("The {thing} was {how}, and {q} liked it very much."),
            6 => format!("On the way to the {there}, {p} saw a {how} {animal}."),
            7 => format!("\"Where is my {thing}?\" asked {p}."),
            8 => format!("{p} gave {count} {food} to {q}."),
            9 => format!("It was late, and the {here} was quiet."),
            10 => format!("Nobody at the {here} had seen the {thing} since the {job} left."),
            11 => format!("{p} walked from the {here} to the {there} and thought about the {other}."),
            12 => format!("The {animal} ran away from {p} and hid behind the {thing}."),
            13 => format!("{q} works as a {job} at the {there}, and knows every {thing} there."),
            14 => format!("A {how} {thing} is worth more than a {other}, said the {job}."),
            15 => format!("They ate {food} together and talked about the {animal}."),
            16 => format!("Every morning {p} drinks tea and reads a book about the {here}."),
            17 => format!("{p} told {q} a story about a {how} {animal} that lived in the {here}."),
            18 => format!("{p} put the {other} next to the {thing} and closed the door."),
            _ => format!("At night, {p} and {q} went home with the {thing}."),
        }
    }
}

/// Whether the demo model's training left this name out: its CRC-32 is a multiple of 10.
pub(super) fn held_out(name: &str) -> bool {
    crc32(name.as_bytes()).is_multiple_of(10)
}

/// CRC-32 as in zlib.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &b| (0..8).fold(crc ^ u32::from(b), |crc, _| (crc >> 1) ^ (0xedb8_8320 & 0_u32.wrapping_sub(crc & 1))))
}
