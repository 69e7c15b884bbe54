//! The prefix index: which page holds the keys and values of which tokens, and in what order pages are given up.
//!
//! A complete page (a sealed one, or 64 filled positions of an exact one) is known by a chain key: a keyed hash of
//! everything that shaped its bytes, of its parent's key and of its 64 tokens. Tokens are compared as well on a hit, so
//! a page is never handed to other tokens, whatever happens to the hash.
//!
//! ```text
//! identity --> page 0 --> page 1 --> page 2          an entry's page is held only while its parent's is,
//!             (+ sinks)        \---> page 2'         so the entry longest unused is always a leaf
//! ```
//!
//! The index knows chains and their order of use; whether a page is held is the pool's to know.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::lists::{Lists, NONE};
use crate::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex, TokenId};

/// The tokens of one page.
pub type PageTokens = [TokenId; PAGE_TOKENS as usize];

/// Key of a page in its chain. Unforgeable without the secret, so a client cannot aim at another's pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key([u8; 32]);

impl std::hash::Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0[..8]);
    }
}

/// Takes the key's first bytes as they are: they are already a keyed hash.
#[derive(Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0 << 8 | u64::from(byte);
        }
    }
}

/// Everything but tokens that shapes a page's bytes, or says who may see them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheIdentity {
    /// Digest of the weights and of whatever the profiles' bases were made from.
    pub model: [u8; 32],
    pub adapter: AdapterGeneration,
    pub profile: ProfileIndex,
    pub salt: u64,
}

/// Makes chain keys under one secret, drawn anew at each start of the server.
#[derive(Clone, Copy)]
pub struct Keys {
    secret: [u8; 32],
}

impl Keys {
    pub fn new(secret: [u8; 32]) -> Self {
        Keys { secret }
    }

    /// The parent of every page 0 of `identity`. A field added to the identity breaks this line until it is hashed.
    pub fn root(&self, identity: &CacheIdentity) -> Key {
        let CacheIdentity { model, adapter: AdapterGeneration(adapter), profile: ProfileIndex(profile), salt } = *identity;
        let mut hash = blake3::Hasher::new_keyed(&self.secret);
        hash.update(b"strait cache identity");
        hash.update(&model).update(&adapter.to_le_bytes()).update(&[profile]).update(&salt.to_le_bytes());
        Key(*hash.finalize().as_bytes())
    }

    /// The key of the page that follows `parent` with `tokens`.
    pub fn next(&self, parent: &Key, tokens: &PageTokens) -> Key {
        let mut bytes = [0; 32 + 4 * PAGE_TOKENS as usize];
        bytes[..32].copy_from_slice(&parent.0);
        for (at, token) in bytes[32..].chunks_exact_mut(4).zip(tokens) {
            at.copy_from_slice(&token.to_le_bytes());
        }
        Key(*blake3::keyed_hash(&self.secret, &bytes).as_bytes())
    }
}

/// What an entry stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit {
    pub page: PageAddr,
    /// The chain's sinks block; only at depth 0, and only where the profile keeps sinks.
    pub sinks: Option<PageAddr>,
}

impl Hit {
    /// Its pages.
    pub fn pages(self) -> impl Iterator<Item = PageAddr> {
        std::iter::once(self.page).chain(self.sinks)
    }
}

/// One indexed page.
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) tokens: PageTokens,
    pub(super) hit: Hit,
    /// Size class of the page: which list of unused entries it joins.
    class: u16,
    parent: u32,
    /// Children are a list through `sibling`, a page rarely has more than a few.
    child: u32,
    sibling: [u32; 2],
    /// When its pages were last given back, by the index's own count; zero while one is held.
    unused_since: u64,
}

/// Chains of entries, and the unused ones by age.
#[derive(Default)]
pub(super) struct PrefixIndex {
    by_key: HashMap<Key, u32, BuildHasherDefault<KeyHasher>>,
    entries: Vec<Entry>,
    vacant: Vec<u32>,
    /// Entries none of whose pages is held, per class, longest unused first.
    unused: Lists,
    clock: u64,
}

impl PrefixIndex {
    pub(super) fn new(classes: usize) -> Self {
        PrefixIndex { unused: Lists::new(classes), ..Self::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// The entry of `key`, whatever its tokens.
    pub(super) fn find(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    pub(super) fn get(&self, entry: u32) -> &Entry {
        &self.entries[entry as usize]
    }

    /// Adds an entry whose pages are held. `key` is not in the index.
    pub(super) fn insert(&mut self, parent: Option<u32>, key: Key, tokens: &PageTokens, hit: Hit, class: u16) -> u32 {
        let parent = parent.unwrap_or(NONE);
        let head = if parent == NONE { NONE } else { self.entries[parent as usize].child };
        let entry = Entry { key, tokens: *tokens, hit, class, parent, child: NONE, sibling: [NONE, head], unused_since: 0 };
        let id = match self.vacant.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                self.unused.reserve(self.entries.len());
                self.entries.len() as u32 - 1
            }
        };
        if parent != NONE {
            self.entries[parent as usize].child = id;
            if head != NONE {
                self.entries[head as usize].sibling[0] = id;
            }
        }
        self.by_key.insert(key, id);
        id
    }

    /// Notes that no page of the entry is held any more: it is now the most recently used of the unused.
    pub(super) fn became_unused(&mut self, id: u32) {
        self.clock += 1;
        let entry = &mut self.entries[id as usize];
        entry.unused_since = self.clock;
        self.unused.push_back(entry.class.into(), id);
    }

    /// Notes that a page of the entry is held.
    pub(super) fn became_used(&mut self, id: u32) {
        let entry = &mut self.entries[id as usize];
        if std::mem::take(&mut entry.unused_since) != 0 {
            self.unused.remove(entry.class.into(), id);
        }
    }

    /// The longest unused entry whose page is of `class`.
    pub(super) fn oldest_of(&self, class: usize) -> Option<u32> {
        self.unused.front(class)
    }

    /// The longest unused entry.
    pub(super) fn oldest(&self, classes: usize) -> Option<u32> {
        (0..classes).filter_map(|class| self.unused.front(class)).min_by_key(|&id| self.entries[id as usize].unused_since)
    }

    /// A leaf below `id`, or `id` itself.
    pub(super) fn leaf_below(&self, mut id: u32) -> u32 {
        while self.entries[id as usize].child != NONE {
            id = self.entries[id as usize].child;
        }
        id
    }

    /// What an entry follows, `NONE` at depth 0.
    pub(super) fn parent(&self, id: u32) -> u32 {
        self.entries[id as usize].parent
    }

    /// Takes a leaf out of the index and says which pages it stood for.
    pub(super) fn remove_leaf(&mut self, id: u32) -> Hit {
        self.became_used(id);
        let Entry { key, hit, parent, child, sibling: [before, after], .. } = self.entries[id as usize];
        assert!(child == NONE, "only a leaf leaves the index, or its children would dangle");
        if before != NONE {
            self.entries[before as usize].sibling[1] = after;
        } else if parent != NONE {
            self.entries[parent as usize].child = after;
        }
        if after != NONE {
            self.entries[after as usize].sibling[0] = before;
        }
        self.by_key.remove(&key);
        self.vacant.push(id);
        hit
    }

    /// Live entries with their parents, in order of their slots.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Entry, Option<u32>)> {
        (0..self.entries.len() as u32).filter_map(|id| {
            let entry = &self.entries[id as usize];
            (self.by_key.get(&entry.key) == Some(&id)).then_some((id, entry, Some(entry.parent).filter(|&p| p != NONE)))
        })
    }

    /// Checks lists against entries; `used` says whether a page of an entry is held.
    pub(super) fn check(&self, classes: usize, used: impl Fn(&Entry) -> bool) -> Result<(), String> {
        let mut unused = 0;
        for class in 0..classes {
            let mut last = 0;
            for id in self.unused.iter(class) {
                let entry = self.get(id);
                unused += 1;
                if entry.unused_since <= last || usize::from(entry.class) != class || used(entry) {
                    return Err(format!("entry {id} is out of place among the unused ones of class {class}"));
                }
                last = entry.unused_since;
            }
        }
        let mut live = 0;
        for (id, entry, parent) in self.iter() {
            live += 1;
            unused -= i64::from(!used(entry));
            if let Some(parent) = parent {
                let above = self.get(parent);
                if self.find(&above.key) != Some(parent) {
                    return Err(format!("entry {id} hangs on a parent that left"));
                }
                if used(entry) && !used(above) {
                    return Err(format!("entry {id} is held and its parent is not"));
                }
                if !used(entry) && above.unused_since != 0 && above.unused_since <= entry.unused_since {
                    return Err(format!("entry {id} would be given up after its parent"));
                }
                if above.hit.pages().any(|page| entry.hit.pages().any(|other| other == page)) {
                    return Err(format!("entry {id} shares a page with its parent"));
                }
            }
        }
        if unused != 0 || live != self.by_key.len() || live + self.vacant.len() != self.entries.len() {
            return Err(format!(
                "the index counts {live} entries, {} keys, {} vacant; {unused} unused too many",
                self.len(),
                self.vacant.len()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_the_identity_and_every_token_changes_the_key() {
        let keys = Keys::new([7; 32]);
        let base = CacheIdentity { model: [1; 32], adapter: AdapterGeneration(2), profile: ProfileIndex(3), salt: 4 };
        let tokens: PageTokens = std::array::from_fn(|i| i as u32);
        let key = |keys: &Keys, identity: CacheIdentity, tokens: &PageTokens| keys.next(&keys.root(&identity), tokens);
        let mut all = vec![
            key(&keys, base, &tokens),
            key(&keys, CacheIdentity { model: [9; 32], ..base }, &tokens),
            key(&keys, CacheIdentity { adapter: AdapterGeneration(9), ..base }, &tokens),
            key(&keys, CacheIdentity { profile: ProfileIndex(9), ..base }, &tokens),
            key(&keys, CacheIdentity { salt: 9, ..base }, &tokens),
            key(&Keys::new([8; 32]), base, &tokens),
            keys.next(&key(&keys, base, &tokens), &tokens),
        ];
        for i in 0..tokens.len() {
            let mut other = tokens;
            other[i] ^= 1 << 31;
            all.push(key(&keys, base, &other));
        }
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "key {i} repeats an earlier one");
        }
        assert_eq!(key(&keys, base, &tokens), all[0]);
    }
}
