//! How many pages of each kind a sequence of a given length holds. All arithmetic of "will it fit" is here.

use crate::ids::{PAGE_TOKENS, PageAddr, ProfileIndex};
use crate::kv::layout::{PageLayout, PageSizes, SealedSplit};
use crate::pages::{Kind, Tag};
use crate::step::{next_seal, sealed_len};

/// What the scheduler knows of a cache profile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProfileSizes {
    pub sizes: PageSizes,
    /// At least so many recent positions stay exact; means nothing unless `compressed`.
    pub window: u32,
    /// So many first positions stay exact; at most a page.
    pub sinks: u32,
    /// Whether pages are sealed. Otherwise only exact pages exist.
    pub compressed: bool,
    /// How the bytes of a sealed page divide.
    pub split: SealedSplit,
}

/// Pages of each kind, in the order of [`Kind::ALL`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Need {
    pub(super) exact: u32,
    pub(super) sealed: u32,
    pub(super) sinks: u32,
    pub(super) workspace: u32,
}

impl Need {
    /// The same, as the pool reads it.
    pub(super) fn of(self, profile: ProfileIndex) -> [(Tag, u32); 4] {
        let Need { exact, sealed, sinks, workspace } = self;
        let n = [exact, sealed, sinks, workspace];
        std::array::from_fn(|i| (Tag { profile, kind: Kind::ALL[i] }, n[i]))
    }

    pub(super) fn is_zero(self) -> bool {
        self == Need::default()
    }
}

/// Pages that `positions` fill or begin.
pub(super) fn pages_for(positions: u32) -> u32 {
    positions.div_ceil(PAGE_TOKENS)
}

impl ProfileSizes {
    /// What a layout comes to. Padding of a sealed page counts as metadata.
    pub fn of(layout: &PageLayout) -> Self {
        let (sizes, split) = (layout.sizes(), layout.sealed_split());
        let metadata = sizes.sealed - split.keys - split.values;
        let split = SealedSplit { metadata, ..split };
        ProfileSizes { sizes, window: layout.window, sinks: layout.sinks, compressed: !layout.sealed.is_empty(), split }
    }

    /// Positions that are in sealed pages once `len` are computed.
    pub(super) fn sealed_len(&self, len: u32) -> u32 {
        if self.compressed { sealed_len(len, self.window) } else { 0 }
    }

    /// How far a decode step goes with `computed` positions done and the tokens of `known`: to the next seal, so that what is
    /// decoded over again meets, position by position, the pages it met the first time.
    pub(super) fn decode_end(&self, computed: u32, known: u32) -> u32 {
        if self.compressed { known.min(next_seal(computed, self.window)) } else { known }
    }

    /// Pages of the prefix index that a prompt of `n` positions may use. The last position is always computed, for its
    /// logits, and a compressed prompt takes no page that would not be sealed anyway.
    pub(super) fn reusable_pages(&self, n: u32) -> u32 {
        let complete = n.saturating_sub(1) / PAGE_TOKENS;
        if self.compressed { complete.min(self.sealed_len(n) / PAGE_TOKENS) } else { complete }
    }

    /// What a prompt of `n` positions leases when its first `reused` are in shared pages.
    pub(super) fn prefill_need(&self, n: u32, reused: u32) -> Need {
        let sealed = self.sealed_len(n);
        Need {
            exact: pages_for(n - if self.compressed { sealed } else { reused }),
            sealed: sealed.saturating_sub(reused) / PAGE_TOKENS,
            sinks: u32::from(self.sinks > 0 && reused == 0 && sealed > 0),
            workspace: if self.compressed { pages_for(n - reused) } else { 0 },
        }
    }

    /// What a sequence holds in the step that decodes position `len - 1`, the page it seals there included.
    fn decode_need(&self, len: u32) -> Need {
        let (before, after) = (self.sealed_len(len - 1), self.sealed_len(len));
        Need { exact: pages_for(len - before), sealed: after / PAGE_TOKENS, sinks: u32::from(self.sinks > 0 && after > 0), workspace: 0 }
    }

    /// The most a request ever holds, in its prefill and while it decodes: what fits both, in an arena of its own, always
    /// finds its next page.
    ///
    /// Each kind of page counts at its own peak, for slabs that were full of one kind may keep a page each when it needs fewer.
    /// The last token generated is never computed. A decode step at `len` needs no less than the one at `len - 64`,
    /// so the last 64 lengths stand for all.
    pub(super) fn peaks(&self, prompt: u32, max_new: u32) -> [Need; 2] {
        let last = prompt + max_new - 1;
        let mut decode = Need::default();
        for len in (prompt + 1).max(last.saturating_sub(PAGE_TOKENS - 1))..=last {
            let Need { exact, sealed, sinks, workspace: _ } = self.decode_need(len);
            decode =
                Need { exact: decode.exact.max(exact), sealed: decode.sealed.max(sealed), sinks: decode.sinks.max(sinks), workspace: 0 };
        }
        [self.prefill_need(prompt, 0), decode]
    }

    /// Why these sizes cannot be served, if they cannot.
    pub(super) fn fault(&self) -> Option<&'static str> {
        let PageSizes { exact, sealed, sinks, workspace } = self.sizes;
        let SealedSplit { keys, values, metadata } = self.split;
        if ![exact, sealed, sinks, workspace].iter().all(|bytes| bytes.is_multiple_of(PageAddr::UNIT)) {
            Some("page sizes are not whole address units")
        } else if exact == 0 {
            Some("exact pages have no size")
        } else if !self.compressed {
            None
        } else if sealed == 0 || workspace == 0 || (sinks == 0) != (self.sinks == 0) {
            Some("a compressed profile lacks the size of a page")
        } else if self.sinks > PAGE_TOKENS {
            Some("sinks exceed a page")
        } else if keys + values + metadata != sealed {
            Some("the parts of a sealed page do not sum to it")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lengths_of_a_decode_are_its_peak() {
        for (window, sinks, prompt, max_new) in [(64, 4, 10, 700), (0, 0, 64, 300), (100, 16, 500, 1), (256, 4, 1, 90), (32, 4, 200, 200)] {
            let profile = ProfileSizes { window, sinks, compressed: true, ..ProfileSizes::default() };
            let all: Vec<Need> = (prompt + 1..prompt + max_new).map(|len| profile.decode_need(len)).collect();
            let [_, peak] = profile.peaks(prompt, max_new);
            for need in &all {
                let covers = peak.exact >= need.exact && peak.sealed >= need.sealed && peak.sinks >= need.sinks;
                assert!(covers, "{need:?} is not covered, window {window}, prompt {prompt}");
            }
            let reached = |f: fn(&Need) -> u32| all.iter().map(f).max().unwrap_or(0);
            assert_eq!((peak.exact, peak.sealed, peak.sinks), (reached(|n| n.exact), reached(|n| n.sealed), reached(|n| n.sinks)));
        }
    }
}
