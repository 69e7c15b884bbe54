//! The page pool against a naive model: maps from addresses to what is there, and a search for "will it fit".

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;

use strait::ids::{AdapterGeneration, PageAddr, ProfileIndex};
use strait::kv::layout::PageSizes;
use strait::pages::prefix::{CacheIdentity, Hit, Key, Keys, PageTokens};
use strait::pages::{Kind, PagePool, Tag};

const SLAB: u64 = 1024;

/// Profile 0 is exact only; the two compressed ones share the sizes of some pages and not of others.
fn sizes() -> [PageSizes; 3] {
    [
        PageSizes { exact: SLAB, sealed: 0, sinks: 0, workspace: 0 },
        PageSizes { exact: SLAB, sealed: 192, sinks: 64, workspace: 448 },
        PageSizes { exact: 448, sealed: 64, sinks: 0, workspace: 512 },
    ]
}

fn size_of(tag: Tag) -> u64 {
    let PageSizes { exact, sealed, sinks, workspace } = sizes()[usize::from(tag.profile.0)];
    [exact, sealed, sinks, workspace][tag.kind as usize]
}

fn tag(profile: u8, kind: Kind) -> Tag {
    Tag { profile: ProfileIndex(profile), kind }
}

/// One who holds pages: a chain of shared ones, and private ones.
#[derive(Default)]
struct Holder {
    profile: u8,
    letters: Vec<u8>,
    chain: Vec<Hit>,
    private: Vec<PageAddr>,
}

/// What a chain of letters is known as.
type Chain = (u8, Vec<u8>);

struct World {
    pool: PagePool,
    keys: Keys,
    holders: Vec<Holder>,
    /// Tag and number of holders of every page that is held.
    held: BTreeMap<PageAddr, (Tag, u32)>,
    /// What was last written to a page, and indexed.
    written: BTreeMap<PageAddr, Chain>,
    known: BTreeSet<Chain>,
    slabs: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Open(u8),
    /// The next page of a chain: shared if it is known, else leased, written and indexed.
    Extend(usize, u8),
    /// The same, but computed without looking first.
    Compute(usize, u8),
    Private(usize, Vec<(u8, u8, u32)>),
    GiveBackPrivate(usize),
    Close(usize),
    Forget(usize, usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let demand = vec((0..3u8, 0..4u8, 0..4u32), 1..4);
    let op = prop_oneof![
        2 => (0..3u8).prop_map(Op::Open),
        6 => (0..6usize, 0..2u8).prop_map(|(h, letter)| Op::Extend(h, letter)),
        3 => (0..6usize, 0..2u8).prop_map(|(h, letter)| Op::Compute(h, letter)),
        3 => (0..6usize, demand).prop_map(|(h, demand)| Op::Private(h, demand)),
        2 => (0..6usize).prop_map(Op::GiveBackPrivate),
        3 => (0..6usize).prop_map(Op::Close),
        1 => (0..6usize, 0..4usize).prop_map(|(h, depth)| Op::Forget(h, depth)),
    ];
    vec(op, 1..200)
}

impl World {
    fn new(slabs: u64) -> Self {
        World {
            pool: PagePool::new(slabs * SLAB + 320, &sizes()),
            keys: Keys::new([1; 32]),
            holders: Vec::new(),
            held: BTreeMap::new(),
            written: BTreeMap::new(),
            known: BTreeSet::new(),
            slabs,
        }
    }

    fn key(&self, profile: u8, letters: &[u8]) -> (Key, PageTokens) {
        let identity = CacheIdentity { model: [0; 32], adapter: AdapterGeneration(0), profile: ProfileIndex(profile), salt: 0 };
        let tokens = |letter: u8| [u32::from(letter); 64];
        let key = letters.iter().fold(self.keys.root(&identity), |parent, &letter| self.keys.next(&parent, &tokens(letter)));
        (key, tokens(*letters.last().expect("a page has letters")))
    }

    fn find(&self, profile: u8, letters: &[u8]) -> Option<Hit> {
        let (key, tokens) = self.key(profile, letters);
        self.pool.find(&key, &tokens)
    }

    /// Tries every way to give the slabs that nobody holds to the sizes in demand.
    fn fits(&self, demand: &[(Tag, u32)]) -> bool {
        let mut wanted: BTreeMap<u64, u64> = BTreeMap::new();
        demand.iter().for_each(|&(tag, n)| *wanted.entry(size_of(tag)).or_default() += u64::from(n));
        let mut slabs: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        for (page, (tag, _)) in &self.held {
            let slab = slabs.entry(page.byte() / SLAB).or_insert((size_of(*tag), 0));
            assert_eq!(slab.0, size_of(*tag), "two sizes in one slab");
            slab.1 += 1;
        }
        for (size, used) in slabs.values() {
            if let Some(n) = wanted.get_mut(size) {
                *n = n.saturating_sub(SLAB / size - used);
            }
        }
        fn search(wanted: &mut Vec<(u64, u64)>, slabs: u64) -> bool {
            if wanted.iter().all(|(_, n)| *n == 0) {
                return true;
            }
            (slabs > 0)
                && (0..wanted.len()).any(|i| {
                    let (size, n) = wanted[i];
                    if n == 0 {
                        return false;
                    }
                    wanted[i].1 = n.saturating_sub(SLAB / size);
                    let found = search(wanted, slabs - 1);
                    wanted[i].1 = n;
                    found
                })
        }
        search(&mut wanted.into_iter().collect(), self.slabs - slabs.len() as u64)
    }

    fn lease(&mut self, demand: &[(Tag, u32)]) -> Option<Vec<PageAddr>> {
        let mut pages = Vec::new();
        let fits = self.fits(demand);
        assert_eq!(self.pool.can_lease(demand), fits, "can_lease {demand:?}");
        assert_eq!(self.pool.lease(demand, &mut pages), fits, "lease {demand:?}");
        if !fits {
            assert!(pages.is_empty());
            return None;
        }
        let tags = demand.iter().flat_map(|&(tag, n)| std::iter::repeat_n(tag, n as usize));
        assert_eq!(pages.len(), tags.clone().count());
        for (&page, tag) in pages.iter().zip(tags) {
            self.written.remove(&page);
            assert!(self.held.insert(page, (tag, 1)).is_none(), "{page:?} was held already");
        }
        Some(pages)
    }

    fn retain(&mut self, hit: Hit) {
        for page in hit.pages() {
            self.pool.retain(page);
            let kind = if Some(page) == hit.sinks { Kind::Sinks } else { Kind::Sealed };
            let profile = self.written[&page].0;
            let kind = if profile == 0 { Kind::Exact } else { kind };
            self.held.entry(page).or_insert((tag(profile, kind), 0)).1 += 1;
        }
    }

    fn release(&mut self, page: PageAddr) {
        self.pool.release(page);
        let holders = &mut self.held.get_mut(&page).expect("released pages are held").1;
        *holders -= 1;
        if *holders == 0 {
            self.held.remove(&page);
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Open(profile) if self.holders.len() < 6 => self.holders.push(Holder { profile: *profile, ..Holder::default() }),
            Op::Open(_) => {}
            Op::Extend(h, letter) => self.extend(*h, *letter, true),
            Op::Compute(h, letter) => self.extend(*h, *letter, false),
            Op::Private(h, demand) => {
                let demand: Vec<_> = demand.iter().map(|&(p, kind, n)| (tag(p, Kind::ALL[usize::from(kind)]), n)).collect();
                let demand: Vec<_> = demand.into_iter().filter(|(tag, _)| size_of(*tag) > 0).collect();
                if *h < self.holders.len()
                    && let Some(pages) = self.lease(&demand)
                {
                    self.holders[*h].private.extend(pages);
                }
            }
            Op::GiveBackPrivate(h) => {
                if let Some(holder) = self.holders.get_mut(*h) {
                    std::mem::take(&mut holder.private).into_iter().for_each(|page| self.release(page));
                }
            }
            Op::Close(h) if *h < self.holders.len() => {
                let holder = self.holders.remove(*h);
                holder.private.into_iter().for_each(|page| self.release(page));
                for hit in holder.chain.into_iter().rev() {
                    hit.sinks.into_iter().chain([hit.page]).for_each(|page| self.release(page));
                }
            }
            Op::Close(_) => {}
            Op::Forget(h, depth) => {
                let Some(holder) = self.holders.get(*h).filter(|holder| *depth < holder.chain.len()) else { return };
                let (profile, letters) = (holder.profile, holder.letters[..=*depth].to_vec());
                let page = holder.chain[*depth].page;
                let indexed = self.pool.is_indexed(page);
                self.pool.forget(page);
                if indexed {
                    self.known.retain(|(p, other)| *p != profile || !other.starts_with(&letters));
                    assert_eq!(self.find(profile, &letters), None, "forgotten pages are not found");
                }
            }
        }
    }

    fn extend(&mut self, h: usize, letter: u8, look: bool) {
        let Some(holder) = self.holders.get(h).filter(|holder| holder.letters.len() < 5) else { return };
        let (profile, parent) = (holder.profile, holder.chain.last().map(|hit| hit.page));
        let mut letters = holder.letters.clone();
        letters.push(letter);
        let (key, tokens) = self.key(profile, &letters);
        let reachable = parent.is_none_or(|page| self.pool.is_indexed(page));
        let hit = match self.pool.find(&key, &tokens).filter(|_| look && reachable) {
            Some(hit) => {
                self.retain(hit);
                hit
            }
            None => {
                let kind = if profile == 0 { Kind::Exact } else { Kind::Sealed };
                let sinks = u32::from(profile == 1 && letters.len() == 1);
                let demand = [(tag(profile, kind), 1), (tag(1, Kind::Sinks), sinks)];
                let Some(pages) = self.lease(&demand) else { return };
                let own = Hit { page: pages[0], sinks: pages.get(1).copied() };
                let known = self.pool.find(&key, &tokens);
                let hit = self.pool.insert(parent, key, &tokens, own);
                match known.filter(|_| reachable) {
                    Some(older) => {
                        assert_eq!(hit, older, "the older page is kept");
                        own.pages().for_each(|page| {
                            self.held.remove(&page);
                        });
                        for page in older.pages() {
                            let kind = if Some(page) == older.sinks { Kind::Sinks } else { kind };
                            self.held.entry(page).or_insert((tag(profile, kind), 0)).1 += 1;
                        }
                    }
                    None => {
                        assert_eq!(hit, own);
                        if reachable {
                            own.pages().for_each(|page| {
                                self.written.insert(page, (profile, letters.clone()));
                            });
                            self.known.insert((profile, letters.clone()));
                        }
                    }
                }
                hit
            }
        };
        self.holders[h].letters = letters;
        self.holders[h].chain.push(hit);
    }

    fn check(&mut self) {
        self.pool.check().unwrap_or_else(|fault| panic!("{fault}"));
        let mut end = 0;
        for (page, (tag, holders)) in &self.held {
            assert!(page.byte() >= end && page.byte() + size_of(*tag) <= self.slabs * SLAB, "{page:?} overlaps");
            assert_eq!(self.pool.holders(*page), *holders, "holders of {page:?}");
            end = page.byte() + size_of(*tag);
        }
        let bytes = self.pool.bytes();
        assert_eq!(bytes.held, self.held.values().map(|(tag, _)| size_of(*tag)).sum::<u64>());
        assert_eq!(bytes.free + bytes.held + bytes.cached + bytes.lost, self.slabs * SLAB + 320);
        for tag in (0..3).flat_map(|profile| Kind::ALL.map(|kind| tag(profile, kind))) {
            let want: u64 = self.held.values().filter(|(other, _)| *other == tag).map(|(tag, _)| size_of(*tag)).sum();
            assert_eq!(self.pool.held_bytes(tag), want, "{tag:?}");
        }
        // Whatever the index still knows is what was written there, below a parent it knows.
        let known: Vec<Chain> = self.known.iter().cloned().collect();
        for (profile, letters) in known {
            match self.find(profile, &letters) {
                Some(hit) => {
                    for page in hit.pages() {
                        assert_eq!(self.written.get(&page), Some(&(profile, letters.clone())), "stale {page:?}");
                    }
                    assert!(letters.len() == 1 || self.find(profile, &letters[..letters.len() - 1]).is_some(), "{letters:?} dangles");
                }
                None => {
                    self.known.remove(&(profile, letters));
                }
            }
        }
        assert_eq!(self.pool.indexed(), self.known.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_agrees_with_a_naive_model(slabs in 1..7u64, ops in ops()) {
        let mut world = World::new(slabs);
        for op in &ops {
            world.apply(op);
            world.check();
        }
        while !world.holders.is_empty() {
            world.apply(&Op::Close(0));
            world.check();
        }
        prop_assert_eq!(world.pool.bytes().held, 0);
        // Everything that is cached makes way for a lease of the whole arena.
        let whole = [(tag(0, Kind::Exact), slabs as u32)];
        prop_assert!(world.lease(&whole).is_some());
        world.check();
        prop_assert_eq!(world.pool.indexed(), 0);
    }
}

#[test]
fn the_longest_unused_leaf_makes_way_first() {
    let mut world = World::new(5);
    for letter in [0, 1] {
        world.apply(&Op::Open(0));
        world.apply(&Op::Extend(0, letter));
        world.apply(&Op::Extend(0, letter));
        world.apply(&Op::Close(0));
    }
    // The chain of zeroes is used again, so that of ones is the older.
    world.apply(&Op::Open(0));
    world.apply(&Op::Extend(0, 0));
    world.apply(&Op::Extend(0, 0));
    world.apply(&Op::Close(0));
    let mut left = Vec::new();
    for _ in 0..5 {
        world.lease(&[(tag(0, Kind::Exact), 1)]).expect("everything is free or cached");
        let chains = [[0, 0].as_slice(), &[0], &[1, 1], &[1]];
        left.push(chains.iter().filter(|letters| world.find(0, letters).is_some()).map(|l| format!("{l:?}")).collect::<Vec<_>>().join(" "));
    }
    expect_test::expect![[r#"
        [0, 0] [0] [1, 1] [1]
        [0, 0] [0] [1]
        [0, 0] [0]
        [0]
    "#]]
    .assert_eq(&(left.join("\n")));
}

#[test]
fn a_slab_is_cleared_for_another_size_without_touching_the_others() {
    let mut world = World::new(3);
    // Two slabs of sealed pages, 16 in each; nothing else is free but one slab.
    for letter in 0..32 {
        world.apply(&Op::Open(2));
        world.apply(&Op::Extend(0, letter));
        world.apply(&Op::Close(0));
    }
    assert_eq!(world.pool.indexed(), 32);
    world.lease(&[(tag(0, Kind::Exact), 1)]).expect("a slab is empty");
    assert_eq!(world.pool.indexed(), 32);
    world.lease(&[(tag(0, Kind::Exact), 1)]).expect("a slab can be cleared");
    let left: Vec<u8> = (0..32).filter(|&letter| world.find(2, &[letter]).is_some()).collect();
    assert_eq!(left, (16..32).collect::<Vec<u8>>(), "the older slab was cleared, and only that");
    world.check();
}

/// What is kept of pages goes with those that were used, not with all that an arena could be cut into: here 2^32 of 64 bytes.
#[test]
fn a_large_arena_of_small_pages_costs_little() {
    let sizes = [PageSizes { exact: 8 << 20, sealed: 64, sinks: 0, workspace: 0 }];
    let mut pool = PagePool::new(u64::from(u32::MAX) * PageAddr::UNIT, &sizes);
    let mut pages = Vec::new();
    assert!(pool.lease(&[(tag(0, Kind::Sealed), 3), (tag(0, Kind::Exact), 2)], &mut pages));
    pages.drain(..).rev().for_each(|page| pool.release(page));
    assert_eq!(pool.bytes().held, 0);
    pool.check().unwrap();
}

/// As many as there may be: of 255 profiles four each.
#[test]
fn pages_of_every_size_are_told_apart() {
    let bytes = |profile: u64, kind: u64| 64 * (4 * profile + kind + 1);
    let of = |p| PageSizes { exact: bytes(p, 0), sealed: bytes(p, 1), sinks: bytes(p, 2), workspace: bytes(p, 3) };
    let sizes: Vec<PageSizes> = (0..255).map(of).collect();
    let mut pool = PagePool::new(1020 * bytes(254, 3), &sizes);
    let mut pages = Vec::new();
    for profile in 0..255 {
        assert!(pool.lease(&Kind::ALL.map(|kind| (tag(profile, kind), 1)), &mut pages));
    }
    let got: Vec<u64> = pages.iter().map(|&page| pool.size_of(page)).collect();
    assert_eq!(got, (1..=1020).map(|n| 64 * n).collect::<Vec<u64>>());
    pool.check().unwrap();
}

/// A chain as long as that of four million tokens: one step from page to page, not one for each pair of them.
#[test]
fn a_long_chain_is_forgotten_in_time() {
    const PAGES: u32 = 1 << 16;
    let sizes = [PageSizes { exact: 64, ..PageSizes::default() }];
    let mut pool = PagePool::new(u64::from(PAGES) * 64, &sizes);
    let mut pages = Vec::new();
    assert!(pool.lease(&[(tag(0, Kind::Exact), PAGES)], &mut pages));
    let (keys, tokens) = (Keys::new([1; 32]), [0; 64]);
    let identity = CacheIdentity { model: [0; 32], adapter: AdapterGeneration(0), profile: ProfileIndex(0), salt: 0 };
    let (mut key, mut parent) = (keys.root(&identity), None);
    for &page in &pages {
        key = keys.next(&key, &tokens);
        pool.insert(parent, key, &tokens, Hit { page, sinks: None });
        parent = Some(page);
    }
    let begun = std::time::Instant::now();
    pool.forget(pages[0]);
    assert_eq!(pool.indexed(), 0);
    assert!(begun.elapsed() < std::time::Duration::from_secs(1), "{:?}", begun.elapsed());
}
