//! Who owns which bytes of the arena. No bytes live here.
//!
//! The arena is cut into equal slabs, as large as the largest page. A slab serves pages of one size at a time; one
//! whose pages are all free serves any size again, so pages of every kind and profile share the same memory.
//!
//! ```text
//! page    free --lease--> held (1..n holders) --release--> free
//!                          ^    \--release, indexed--> cached --evict--> free
//!                          \--------retain---------------/
//! bytes   free + held + cached + lost = arena        lost: what a slab's pages leave over, and the arena's tail
//! ```
//!
//! A cached page is held by nobody; the prefix index keeps it until its memory is wanted. So "will it fit" counts it
//! as free, and says no more than the truth: a slab changes its size of page only when nobody holds a page of it.

mod lists;
pub mod prefix;

use self::lists::{Lists, NONE};
use self::prefix::{Entry, Hit, Key, PageTokens, PrefixIndex};
use crate::ids::{PageAddr, ProfileIndex};
use crate::kv::layout::PageSizes;

/// Kinds of page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    Exact,
    Sealed,
    Sinks,
    Workspace,
}

impl Kind {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Kind; 4] = [Kind::Exact, Kind::Sealed, Kind::Sinks, Kind::Workspace];
}

/// What a page is leased for. Sets its size, and under what its bytes are counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Tag {
    pub profile: ProfileIndex,
    pub kind: Kind,
}

impl Tag {
    fn index(self) -> usize {
        usize::from(self.profile.0) * Kind::ALL.len() + self.kind as usize
    }
}

/// Where every byte of the arena is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bytes {
    pub free: u64,
    pub held: u64,
    pub cached: u64,
    /// Left over by pages that do not fill their slab, and by slabs that do not fill the arena.
    pub lost: u64,
}

/// Lends pages of the arena, to one holder or to several, and remembers what complete pages hold.
///
/// Holders keep two promises: who holds an indexed page holds its ancestors too, and gives a chain back from its end.
pub struct PagePool {
    arena_bytes: u64,
    slab_bytes: u64,
    classes: Vec<Class>,
    /// Size class of each tag; `NO_CLASS` where the profile has no such page.
    class_of: Vec<u16>,
    slabs: Vec<Slab>,
    /// Of each slab the slots used since it took its class: a slab of small pages has many, and most arenas hold few of those.
    pages: Vec<Vec<Page>>,
    /// Slabs that serve no class, the last one to be used next.
    empty: Vec<u32>,
    /// Slabs with a free page: list `2 * class`, those of which a page is held; list `2 * class + 1`, the others.
    partial: Lists,
    /// Slabs without a held but with a cached page, longest unused first.
    idle: Lists,
    /// Slabs without a held page, empty ones included: what evicting everything would leave to any class.
    clearable: u32,
    held_bytes: Vec<u64>,
    cached_bytes: Vec<u64>,
    index: PrefixIndex,
    changes: u64,
}

const NO_CLASS: u16 = u16::MAX;
const NO_LIST: u16 = u16::MAX;

/// Pages of one size.
#[derive(Clone, Debug)]
struct Class {
    page_bytes: u64,
    /// Pages of a slab.
    per_slab: u32,
    /// Free pages in slabs of this class.
    free: u32,
    /// Pages not held in slabs of which another is: free, or free after evicting.
    room: u32,
    slabs: u32,
}

#[derive(Clone, Debug)]
struct Slab {
    class: u16,
    /// List of `partial` it is in.
    partial: u16,
    idle: bool,
    held: u32,
    cached: u32,
    /// First of the slots given back; the others follow through `Page::next`.
    vacant: u32,
}

/// One slot. Free when nobody holds it and no entry names it.
#[derive(Clone, Debug)]
struct Page {
    holders: u32,
    /// Index entry that stands for this page.
    entry: u32,
    next: u32,
    tag: u16,
}

impl PagePool {
    /// A pool over `arena_bytes` for pages of these sizes, one set per profile.
    ///
    /// # Panics
    /// When a page size is not a multiple of [`PageAddr::UNIT`], or an address would not fit.
    pub fn new(arena_bytes: u64, profiles: &[PageSizes]) -> Self {
        let sizes = |p: &PageSizes| [p.exact, p.sealed, p.sinks, p.workspace];
        let mut distinct: Vec<u64> = profiles.iter().flat_map(sizes).filter(|&bytes| bytes > 0).collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.iter().all(|bytes| bytes.is_multiple_of(PageAddr::UNIT)), "pages are whole address units");
        assert!(arena_bytes / PageAddr::UNIT <= u64::from(u32::MAX), "an arena of {arena_bytes} bytes outgrows its addresses");
        let slab_bytes = distinct.last().copied().unwrap_or(PageAddr::UNIT);
        let n_slabs = (arena_bytes / slab_bytes) as u32;
        let classes: Vec<Class> = distinct
            .iter()
            .map(|&page_bytes| Class { page_bytes, per_slab: (slab_bytes / page_bytes) as u32, free: 0, room: 0, slabs: 0 })
            .collect();
        let class_of = profiles.iter().flat_map(sizes).map(|bytes| distinct.binary_search(&bytes).map_or(NO_CLASS, |c| c as u16)).collect();
        let slab = Slab { class: NO_CLASS, partial: NO_LIST, idle: false, held: 0, cached: 0, vacant: NONE };
        let (mut partial, mut idle) = (Lists::new(2 * classes.len()), Lists::new(1));
        partial.reserve(n_slabs as usize);
        idle.reserve(n_slabs as usize);
        PagePool {
            arena_bytes,
            slab_bytes,
            class_of,
            slabs: vec![slab; n_slabs as usize],
            pages: vec![Vec::new(); n_slabs as usize],
            empty: (0..n_slabs).rev().collect(),
            partial,
            idle,
            clearable: n_slabs,
            held_bytes: vec![0; profiles.len() * Kind::ALL.len()],
            cached_bytes: vec![0; profiles.len() * Kind::ALL.len()],
            index: PrefixIndex::new(classes.len()),
            changes: 0,
            classes,
        }
    }

    /// Lends the pages of `demand`, in its order, or none at all; what is cached makes way, longest unused first.
    ///
    /// Succeeds exactly when [`PagePool::can_lease`] says so. O(pages), and as much again per page evicted.
    pub fn lease(&mut self, demand: &[(Tag, u32)], pages: &mut Vec<PageAddr>) -> bool {
        if !self.can_lease(demand) {
            return false;
        }
        // `can_lease` counted with everything cached gone, and each round takes at least one page of that.
        while self.slabs_beyond(demand, |class| class.free) > self.empty.len() as u64 {
            self.evict_towards(demand);
        }
        for &(tag, n) in demand {
            for _ in 0..n {
                pages.push(self.take(tag));
            }
        }
        true
    }

    /// Whether a lease of `demand` would succeed, everything cached counted as free. Exact: slabs are counted too.
    pub fn can_lease(&self, demand: &[(Tag, u32)]) -> bool {
        // Room in slabs that keep their class comes first; the rest needs whole slabs, any that nobody holds.
        self.slabs_beyond(demand, |class| class.room) <= u64::from(self.clearable)
    }

    /// Bytes of whole slabs that `demand` takes in an arena without other holders: `(needed, there are)`.
    pub fn alone(&self, demand: &[(Tag, u32)]) -> (u64, u64) {
        (self.slabs_beyond(demand, |_| 0) * self.slab_bytes, self.slabs.len() as u64 * self.slab_bytes)
    }

    /// Adds a holder to a page that is held or cached.
    pub fn retain(&mut self, page: PageAddr) {
        let (slab, slot) = self.slot(page);
        let known = &mut self.pages[slab as usize][slot];
        assert!(known.holders > 0 || known.entry != NONE, "{page:?} is free and cannot be shared");
        known.holders += 1;
        if known.holders == 1 {
            let (tag, entry) = (known.tag, known.entry);
            let bytes = self.page_bytes(slab);
            self.cached_bytes[usize::from(tag)] -= bytes;
            self.held_bytes[usize::from(tag)] += bytes;
            self.index.became_used(entry);
            self.update(slab, |s| {
                s.cached -= 1;
                s.held += 1;
            });
        }
    }

    /// Takes a holder from a page. A page that loses its last one is cached if it is indexed, and free otherwise.
    pub fn release(&mut self, page: PageAddr) {
        self.changes += 1;
        let (slab, slot) = self.slot(page);
        let known = &mut self.pages[slab as usize][slot];
        assert!(known.holders > 0, "{page:?} is given back and nobody holds it");
        known.holders -= 1;
        if known.holders > 0 {
            return;
        }
        let (tag, entry) = (known.tag, known.entry);
        let bytes = self.page_bytes(slab);
        self.held_bytes[usize::from(tag)] -= bytes;
        if entry == NONE {
            self.vacate(slab, slot, |s| s.held -= 1);
            return;
        }
        self.cached_bytes[usize::from(tag)] += bytes;
        self.update(slab, |s| {
            s.held -= 1;
            s.cached += 1;
        });
        if self.slabs[slab as usize].idle {
            // The slab was used just now: others are cleared before it.
            self.idle.remove(0, slab);
            self.idle.push_back(0, slab);
        }
        if !self.is_held(self.index.get(entry)) {
            self.index.became_unused(entry);
        }
    }

    /// The page of `key`, if it is known and holds exactly `tokens`. The caller retains what it uses.
    pub fn find(&self, key: &Key, tokens: &PageTokens) -> Option<Hit> {
        let entry = self.index.get(self.index.find(key)?);
        (entry.tokens == *tokens).then_some(entry.hit)
    }

    /// Makes a complete page known under `key`, and says which pages its holder goes on with.
    ///
    /// When the key is known already the older page is kept: the caller becomes a holder of it, and its own page is
    /// released. So whoever holds a page of a chain holds the chain, and equal prompts end up sharing memory.
    /// A page whose parent is not indexed (it was forgotten) stays private.
    pub fn insert(&mut self, parent: Option<PageAddr>, key: Key, tokens: &PageTokens, own: Hit) -> Hit {
        self.changes += 1;
        let parent = match parent.map(|page| self.used(page).entry) {
            Some(NONE) => return own,
            other => other,
        };
        if let Some(known) = self.index.find(&key) {
            let Entry { tokens: theirs, hit, .. } = self.index.get(known);
            let hit = *hit;
            if theirs != tokens || hit == own || hit.sinks.is_some() != own.sinks.is_some() {
                return own;
            }
            hit.pages().for_each(|page| self.retain(page));
            own.pages().for_each(|page| self.release(page));
            return hit;
        }
        let class = self.slabs[self.slot(own.page).0 as usize].class;
        let entry = self.index.insert(parent, key, tokens, own, class);
        for page in own.pages() {
            let (slab, slot) = self.slot(page);
            let known = &mut self.pages[slab as usize][slot];
            assert!(known.holders > 0 && known.entry == NONE, "{page:?} is indexed by its only holder, once");
            known.entry = entry;
        }
        own
    }

    /// Takes a page and everything that follows it out of the index: its bytes are not to be trusted.
    /// Those who hold such pages keep them.
    pub fn forget(&mut self, page: PageAddr) {
        let root = self.used(page).entry;
        if root != NONE {
            self.drop_below(root);
        }
    }

    /// Empties the index: what is cached becomes free. Those who hold indexed pages keep them.
    pub fn forget_all(&mut self) {
        while let Some(leaf) = self.index.oldest(self.classes.len()) {
            self.drop_entry(leaf);
        }
    }

    /// Where every byte is.
    pub fn bytes(&self) -> Bytes {
        let (held, cached) = (self.held_bytes.iter().sum(), self.cached_bytes.iter().sum());
        let free: u64 =
            self.classes.iter().map(|c| u64::from(c.free) * c.page_bytes).sum::<u64>() + self.empty.len() as u64 * self.slab_bytes;
        Bytes { free, held, cached, lost: self.arena_bytes - free - held - cached }
    }

    /// Bytes of whole slabs that are in use, and of all: held pages, and what is left over beside them, which no lease can have. Where
    /// nobody holds a page of a slab all of it is free on demand.
    pub fn in_use(&self) -> (u64, u64) {
        let beside: u64 = self.classes.iter().map(|c| u64::from(c.room) * c.page_bytes).sum();
        let all = self.slabs.len() as u64 * self.slab_bytes;
        (all - u64::from(self.clearable) * self.slab_bytes - beside, all)
    }

    /// Bytes of held pages of one tag.
    pub fn held_bytes(&self, tag: Tag) -> u64 {
        self.held_bytes[tag.index()]
    }

    /// Bytes of cached pages of one tag.
    pub fn cached_bytes(&self, tag: Tag) -> u64 {
        self.cached_bytes[tag.index()]
    }

    /// Bytes of a page.
    pub fn size_of(&self, page: PageAddr) -> u64 {
        self.page_bytes(self.slot(page).0)
    }

    /// How many hold a page.
    pub fn holders(&self, page: PageAddr) -> u32 {
        self.page(page).map_or(0, |p| p.holders)
    }

    /// Whether the prefix index knows a page.
    pub fn is_indexed(&self, page: PageAddr) -> bool {
        self.page(page).is_some_and(|p| p.entry != NONE)
    }

    /// Pages in the prefix index.
    pub fn indexed(&self) -> usize {
        self.index.len()
    }

    /// Goes up whenever a lease that failed might now succeed.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Size of the arena.
    pub fn arena_bytes(&self) -> u64 {
        self.arena_bytes
    }

    fn page_bytes(&self, slab: u32) -> u64 {
        self.classes[usize::from(self.slabs[slab as usize].class)].page_bytes
    }

    /// The slot at an address, unless it was not used since its slab took its class.
    fn page(&self, page: PageAddr) -> Option<&Page> {
        let slab = (page.byte() / self.slab_bytes) as usize;
        (self.slabs[slab].class != NO_CLASS).then(|| self.pages[slab].get(self.slot(page).1)).flatten()
    }

    /// The slot of a page that is not free.
    fn used(&self, page: PageAddr) -> &Page {
        let (slab, slot) = self.slot(page);
        &self.pages[slab as usize][slot]
    }

    /// Slab, and slot in it, of a page that is not free.
    fn slot(&self, page: PageAddr) -> (u32, usize) {
        let slab = page.byte() / self.slab_bytes;
        let class = &self.classes[usize::from(self.slabs[slab as usize].class)];
        let within = page.byte() % self.slab_bytes;
        assert!(within.is_multiple_of(class.page_bytes), "{page:?} is inside a page");
        (slab as u32, (within / class.page_bytes) as usize)
    }

    fn is_held(&self, entry: &Entry) -> bool {
        entry.hit.pages().any(|page| self.holders(page) > 0)
    }

    /// Pages of one class in `demand`.
    fn wanted(&self, demand: &[(Tag, u32)], class: usize) -> u32 {
        demand.iter().filter(|(tag, n)| *n > 0 && usize::from(self.class(*tag)) == class).map(|(_, n)| n).sum()
    }

    /// Slabs that `demand` takes beyond the pages that each class has `room` for.
    fn slabs_beyond(&self, demand: &[(Tag, u32)], room: impl Fn(&Class) -> u32) -> u64 {
        let slabs = |(i, c): (usize, &Class)| u64::from(self.wanted(demand, i).saturating_sub(room(c)).div_ceil(c.per_slab));
        self.classes.iter().enumerate().map(slabs).sum()
    }

    fn class(&self, tag: Tag) -> u16 {
        let class = self.class_of[tag.index()];
        assert!(class != NO_CLASS, "{tag:?} has no pages");
        class
    }

    /// Frees at least one cached page: of a class of which too few are free, if one is cached, else a whole slab that
    /// nobody holds. Either way the longest unused.
    fn evict_towards(&mut self, demand: &[(Tag, u32)]) {
        let mut lacking = (0..self.classes.len()).filter(|&c| self.wanted(demand, c) > self.classes[c].free);
        let same_size = lacking.find_map(|class| self.index.oldest_of(class));
        if let Some(entry) = same_size {
            return self.drop_entry(entry);
        }
        if let Some(slab) = self.idle.front(0) {
            for slot in 0..self.pages[slab as usize].len() {
                // They are gone once the slab is empty.
                let root = self.pages[slab as usize].get(slot).map_or(NONE, |page| page.entry);
                if root != NONE {
                    self.drop_below(root);
                }
            }
            return;
        }
        let oldest = self.index.oldest(self.classes.len()).expect("can_lease counted no more than what is cached");
        self.drop_entry(oldest);
    }

    /// Takes an entry and all below it out of the index, children first.
    fn drop_below(&mut self, root: u32) {
        let mut at = root;
        loop {
            let leaf = self.index.leaf_below(at);
            at = self.index.parent(leaf);
            self.drop_entry(leaf);
            if leaf == root {
                return;
            }
        }
    }

    /// Takes a leaf out of the index; those of its pages that nobody holds become free.
    fn drop_entry(&mut self, leaf: u32) {
        self.changes += 1;
        for page in self.index.remove_leaf(leaf).pages() {
            let (slab, slot) = self.slot(page);
            let known = &mut self.pages[slab as usize][slot];
            known.entry = NONE;
            if known.holders == 0 {
                let tag = usize::from(known.tag);
                self.cached_bytes[tag] -= self.page_bytes(slab);
                self.vacate(slab, slot, |s| s.cached -= 1);
            }
        }
    }

    /// One free page, which there is, for a first holder.
    fn take(&mut self, tag: Tag) -> PageAddr {
        let class = self.class(tag);
        // Slabs of which a page is held anyway come first, so that the others can be cleared.
        let list = 2 * usize::from(class);
        let slab = self.partial.front(list).or_else(|| self.partial.front(list + 1)).unwrap_or_else(|| {
            let slab = self.empty.pop().expect("the lease made sure of enough empty slabs");
            self.count(slab, false);
            self.slabs[slab as usize].class = class;
            self.count(slab, true);
            slab
        });
        let page = Page { holders: 1, entry: NONE, next: NONE, tag: tag.index() as u16 };
        let (slots, vacant) = (&mut self.pages[slab as usize], &mut self.slabs[slab as usize].vacant);
        let at = match *vacant {
            NONE => {
                slots.push(page);
                slots.len() as u32 - 1
            }
            at => {
                *vacant = std::mem::replace(&mut slots[at as usize], page).next;
                at
            }
        };
        self.update(slab, |s| s.held += 1);
        let page_bytes = self.classes[usize::from(class)].page_bytes;
        self.held_bytes[tag.index()] += page_bytes;
        PageAddr(((u64::from(slab) * self.slab_bytes + u64::from(at) * page_bytes) / PageAddr::UNIT) as u32)
    }

    /// Puts a slot among the free ones of its slab, `leave` saying which count it leaves.
    fn vacate(&mut self, slab: u32, slot: usize, leave: impl FnOnce(&mut Slab)) {
        self.pages[slab as usize][slot].next = self.slabs[slab as usize].vacant;
        self.slabs[slab as usize].vacant = slot as u32;
        self.update(slab, leave);
    }

    /// Changes a slab, and whatever is counted and listed of it.
    fn update(&mut self, slab: u32, change: impl FnOnce(&mut Slab)) {
        self.count(slab, false);
        let s = &mut self.slabs[slab as usize];
        let class = usize::from(s.class);
        change(s);
        let (per_slab, used) = (self.classes[class].per_slab, s.held + s.cached);
        let partial = if used == 0 || used == per_slab { NO_LIST } else { 2 * class as u16 + u16::from(s.held == 0) };
        if partial != s.partial {
            if s.partial != NO_LIST {
                self.partial.remove(s.partial.into(), slab);
            }
            if partial != NO_LIST {
                self.partial.push_front(partial.into(), slab);
            }
            s.partial = partial;
        }
        let idle = s.held == 0 && s.cached > 0;
        if idle != s.idle {
            if idle {
                self.idle.push_back(0, slab);
            } else {
                self.idle.remove(0, slab);
            }
            s.idle = idle;
        }
        if used == 0 {
            s.class = NO_CLASS;
            s.vacant = NONE;
            self.pages[slab as usize] = Vec::new();
            self.empty.push(slab);
        }
        self.count(slab, true);
    }

    /// Adds a slab to the counters, or takes it out.
    fn count(&mut self, slab: u32, there: bool) {
        let s = &self.slabs[slab as usize];
        let add = |counter: &mut u32, n: u32| if there { *counter += n } else { *counter -= n };
        if s.held == 0 {
            add(&mut self.clearable, 1);
        }
        if s.class != NO_CLASS {
            let class = &mut self.classes[usize::from(s.class)];
            add(&mut class.slabs, 1);
            add(&mut class.free, class.per_slab - s.held - s.cached);
            if s.held > 0 {
                add(&mut class.room, class.per_slab - s.held);
            }
        }
    }

    /// Recounts everything from the pages up and compares. O(pages).
    ///
    /// # Errors
    /// The first counter, list or link that does not agree.
    pub fn check(&self) -> Result<(), String> {
        let (mut held_bytes, mut cached_bytes) = (vec![0; self.held_bytes.len()], vec![0; self.held_bytes.len()]);
        let mut classes: Vec<Class> = self.classes.iter().map(|c| Class { free: 0, room: 0, slabs: 0, ..c.clone() }).collect();
        let (mut clearable, mut lost, mut indexed_pages) = (0, self.arena_bytes - self.slabs.len() as u64 * self.slab_bytes, 0);
        let mut used = 0;
        for (id, slab) in self.slabs.iter().enumerate() {
            clearable += u32::from(slab.held == 0);
            if slab.class == NO_CLASS {
                if slab.held + slab.cached > 0 || slab.partial != NO_LIST || slab.idle || !self.pages[id].is_empty() {
                    return Err(format!("slab {id} has no class and is not empty"));
                }
                continue;
            }
            let class = &mut classes[usize::from(slab.class)];
            let pages = &self.pages[id];
            if pages.len() > class.per_slab as usize {
                return Err(format!("slab {id} has {} slots for {} pages", pages.len(), class.per_slab));
            }
            let mut free = vec![false; pages.len()];
            let mut at = slab.vacant;
            while at != NONE {
                if std::mem::replace(&mut free[at as usize], true) {
                    return Err(format!("slot {at} of slab {id} is free twice"));
                }
                at = pages[at as usize].next;
            }
            let (mut held, mut cached) = (0, 0);
            for (at, page) in pages.iter().enumerate() {
                if free[at] == (page.holders > 0 || page.entry != NONE) {
                    return Err(format!("slot {at} of slab {id} is free and in use, or neither: {page:?}"));
                }
                if free[at] {
                    continue;
                }
                indexed_pages += usize::from(page.entry != NONE);
                let bytes = if page.holders > 0 { &mut held_bytes } else { &mut cached_bytes };
                *(if page.holders > 0 { &mut held } else { &mut cached }) += 1;
                bytes[usize::from(page.tag)] += class.page_bytes;
                if self.class_of[usize::from(page.tag)] != slab.class {
                    return Err(format!("slot {at} of slab {id} is tagged for another size"));
                }
            }
            class.slabs += 1;
            class.free += class.per_slab - held - cached;
            class.room += if held > 0 { class.per_slab - held } else { 0 };
            used += if held > 0 { self.slab_bytes - u64::from(class.per_slab - held) * class.page_bytes } else { 0 };
            lost += self.slab_bytes - u64::from(class.per_slab) * class.page_bytes;
            if (held, cached) != (slab.held, slab.cached) || held + cached == 0 {
                return Err(format!("slab {id} counts {} held and {} cached, and has {held} and {cached}", slab.held, slab.cached));
            }
            if slab.idle != (held == 0) || (slab.partial == NO_LIST) != (held + cached == class.per_slab) {
                return Err(format!("slab {id} is in the wrong list"));
            }
        }
        for list in 0..2 * self.classes.len() {
            if let Some(slab) = self.partial.iter(list).find(|&slab| usize::from(self.slabs[slab as usize].partial) != list) {
                return Err(format!("slab {slab} is in list {list} and does not know it"));
            }
        }
        if format!("{classes:?}") != format!("{:?}", self.classes) || clearable != self.clearable {
            return Err(format!("classes count {:?}, {} clearable, and are {classes:?}, {clearable}", self.classes, self.clearable));
        }
        if self.in_use().0 != used {
            return Err(format!("{:?} bytes are in use, and {used} of slabs that somebody holds a page of", self.in_use()));
        }
        if (&held_bytes, &cached_bytes) != (&self.held_bytes, &self.cached_bytes) || self.bytes().lost != lost {
            return Err(format!(
                "bytes by tag: {:?} held {:?} cached, found {held_bytes:?} {cached_bytes:?}",
                self.held_bytes, self.cached_bytes
            ));
        }
        self.index.check(self.classes.len(), |entry| self.is_held(entry))?;
        for (id, entry, _) in self.index.iter() {
            for page in entry.hit.pages() {
                indexed_pages -= 1;
                if self.used(page).entry != id {
                    return Err(format!("entry {id} names {page:?}, which does not name it"));
                }
                if (self.holders(page) > 0) != self.is_held(entry) {
                    return Err(format!("{page:?} is held or not apart from its sinks block"));
                }
            }
        }
        if indexed_pages != 0 {
            return Err(format!("{indexed_pages} pages name entries that do not name them"));
        }
        Ok(())
    }
}
