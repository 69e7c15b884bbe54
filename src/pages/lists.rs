//! Doubly linked lists threaded through indices, so that moving an item between lists neither searches nor allocates.

/// No item.
pub(super) const NONE: u32 = u32::MAX;

/// Several lists over the items `0..n`. An item is in one list at most; which one, its owner knows.
#[derive(Default)]
pub(super) struct Lists {
    /// `[previous, next]` of each item.
    links: Vec<[u32; 2]>,
    /// `[first, last]` of each list.
    ends: Vec<[u32; 2]>,
}

impl Lists {
    pub(super) fn new(lists: usize) -> Self {
        Lists { links: Vec::new(), ends: vec![[NONE; 2]; lists] }
    }

    /// Makes room for the items `0..n`.
    pub(super) fn reserve(&mut self, n: usize) {
        self.links.resize(self.links.len().max(n), [NONE; 2]);
    }

    pub(super) fn front(&self, list: usize) -> Option<u32> {
        Some(self.ends[list][0]).filter(|&item| item != NONE)
    }

    pub(super) fn push_front(&mut self, list: usize, item: u32) {
        let first = self.ends[list][0];
        self.links[item as usize] = [NONE, first];
        match first {
            NONE => self.ends[list][1] = item,
            _ => self.links[first as usize][0] = item,
        }
        self.ends[list][0] = item;
    }

    pub(super) fn push_back(&mut self, list: usize, item: u32) {
        let last = self.ends[list][1];
        self.links[item as usize] = [last, NONE];
        match last {
            NONE => self.ends[list][0] = item,
            _ => self.links[last as usize][1] = item,
        }
        self.ends[list][1] = item;
    }

    pub(super) fn remove(&mut self, list: usize, item: u32) {
        let [previous, next] = self.links[item as usize];
        match previous {
            NONE => self.ends[list][0] = next,
            _ => self.links[previous as usize][1] = next,
        }
        match next {
            NONE => self.ends[list][1] = previous,
            _ => self.links[next as usize][0] = previous,
        }
        self.links[item as usize] = [NONE; 2];
    }

    /// The items of a list, first to last.
    pub(super) fn iter(&self, list: usize) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.front(list), |&item| Some(self.links[item as usize][1]).filter(|&next| next != NONE))
    }
}
