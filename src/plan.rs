//! What fits: the arithmetic of `strait plan`. Nothing is estimated; the numbers are those of the page layout and of
//! the page pool, which cuts the arena into slabs as large as the largest page and fills a slab with pages of one size.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::ids::PAGE_TOKENS;
use crate::kv::layout::{ExactType, PageLayout, PageSizes, Profile, Widths};
use crate::model::config::ModelConfig;
use crate::step::sealed_len;

const P: u64 = PAGE_TOKENS as u64;

/// What is asked: a model, the profiles of a server, and its arena.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    pub model: &'a ModelConfig,
    pub exact: ExactType,
    pub profiles: &'a [PlannedProfile],
    /// Bytes of the cache, as `--kv-cache-memory-bytes` gives them.
    pub arena_bytes: u64,
    /// Lengths of request, in tokens (positive), of which the table says how many fit.
    pub lengths: &'a [u32],
}

/// A profile, with the latent widths of its artifact where one sets them.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedProfile {
    pub profile: Profile,
    /// Latents per layer; `None` follows the profile's shares.
    pub widths: Option<Vec<Widths>>,
}

/// What fits. Prints as a table; serialises with the same numbers and more.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    pub arena_bytes: u64,
    /// The largest page of all profiles.
    pub slab_bytes: u64,
    pub slabs: u64,
    /// Longest sequence that is served, as far as it is known; what fits may be longer.
    pub max_positions: usize,
    pub profiles: Vec<ProfilePlan>,
}

/// What fits of one profile, if the whole arena serves it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProfilePlan {
    pub name: String,
    /// Bytes of one more position of a long context: of its sealed page, or of its exact page for `full`.
    pub bytes_per_token: f64,
    /// How many times more bytes per token `full` takes.
    pub times_smaller: f64,
    /// None for `full`.
    pub sealed_page: Option<SealedPage>,
    pub exact_page_bytes: u64,
    /// The window of one long sequence at its fullest, in exact pages. Zero for `full`, where all is exact.
    pub window_bytes: u64,
    pub sinks_bytes: u64,
    /// Bytes per prompt token while it is prefilled, beyond what its context then keeps.
    pub workspace_bytes_per_token: f64,
    /// Longest prompt that one request can have, its prefill included.
    pub max_prompt_tokens: u32,
    /// Longest context that one request can grow to by decoding.
    pub max_context_tokens: u32,
    pub requests: Vec<Requests>,
}

/// The bytes of a sealed page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SealedPage {
    pub bytes: u64,
    pub keys: u64,
    pub values: u64,
    pub metadata: u64,
    pub padding: u64,
}

/// How many requests of one length are in the cache at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Requests {
    pub tokens: u32,
    /// So many can grow to `tokens` together, whenever each of them seals its pages, while one of them is prefilled with
    /// a prompt of that length.
    pub fit: u64,
}

/// What fits of each profile of `ask`. Costs microseconds.
///
/// # Panics
/// Where ranks are given for another number of layers than the model has.
pub fn plan(ask: &Ask<'_>) -> Plan {
    let layouts: Vec<PageLayout> = ask
        .profiles
        .iter()
        .map(|p| {
            assert!(p.widths.as_ref().is_none_or(|r| r.len() == ask.model.layers), "widths of {} are one pair per layer", p.profile.name);
            PageLayout::new(ask.model, ask.exact, &p.profile, p.widths.as_deref())
        })
        .collect();
    let sizes = layouts.iter().map(PageLayout::sizes);
    let slab_bytes = sizes.flat_map(|s| [s.exact, s.sealed, s.sinks, s.workspace]).max().unwrap_or(0);
    let slabs = ask.arena_bytes.checked_div(slab_bytes).unwrap_or(0);
    let profiles = ask.profiles.iter().zip(&layouts);
    let profiles = profiles
        .map(|(p, layout)| profile_plan(ask, &p.profile.name, &Room { layout, sizes: layout.sizes(), slab_bytes, slabs }))
        .collect();
    Plan { arena_bytes: ask.arena_bytes, slab_bytes, slabs, max_positions: ask.model.max_positions, profiles }
}

fn profile_plan(ask: &Ask<'_>, name: &str, room: &Room<'_>) -> ProfilePlan {
    let Room { layout, sizes, .. } = room;
    let compressed = room.compressed();
    let bytes_per_token = layout.bytes_per_token();
    let window_pages = u64::from(layout.window.saturating_add(PAGE_TOKENS)).div_ceil(P);
    ProfilePlan {
        name: name.to_owned(),
        bytes_per_token,
        times_smaller: sizes.exact as f64 / P as f64 / bytes_per_token,
        sealed_page: compressed.then(|| {
            let split = layout.sealed_split();
            let held = split.keys + split.values + split.metadata;
            let bytes = sizes.sealed;
            SealedPage { bytes, keys: split.keys, values: split.values, metadata: split.metadata, padding: bytes - held }
        }),
        exact_page_bytes: sizes.exact,
        window_bytes: if compressed { window_pages * sizes.exact } else { 0 },
        sinks_bytes: sizes.sinks,
        workspace_bytes_per_token: sizes.workspace as f64 / P as f64,
        max_prompt_tokens: room.max_prompt(),
        max_context_tokens: room.max_context(),
        requests: ask.lengths.iter().map(|&tokens| Requests { tokens, fit: room.requests(tokens) }).collect(),
    }
}

/// Pages of each kind. The counts are those of the scheduler, which admits by them.
#[derive(Clone, Copy, Default)]
struct Pages {
    exact: u64,
    sealed: u64,
    sinks: u64,
    workspace: u64,
}

/// An arena that serves one profile.
struct Room<'a> {
    layout: &'a PageLayout,
    sizes: PageSizes,
    slab_bytes: u64,
    slabs: u64,
}

impl Room<'_> {
    /// What a prompt of `n` positions holds while it is prefilled.
    fn prefill(&self, n: u32) -> Pages {
        if !self.compressed() {
            return Pages { exact: pages_for(n), ..Pages::default() };
        }
        let sealed = sealed_len(n, self.layout.window);
        Pages { exact: pages_for(n - sealed), sealed: pages_for(sealed), sinks: u64::from(sealed > 0), workspace: pages_for(n) }
    }

    /// What a sequence holds in the step that decodes position `len - 1`: a page that is sealed there, and the exact page
    /// it is made of.
    fn decode(&self, len: u32) -> Pages {
        if !self.compressed() {
            return Pages { exact: pages_for(len), ..Pages::default() };
        }
        let (before, after) = (sealed_len(len - 1, self.layout.window), sealed_len(len, self.layout.window));
        Pages { exact: pages_for(len - before), sealed: pages_for(after), sinks: u64::from(after > 0), workspace: 0 }
    }

    /// No less than a sequence of `len` positions ever holds once it is prefilled, whenever it seals.
    fn fullest(&self, len: u32) -> Pages {
        let exact = if self.compressed() { len.min(self.layout.window.saturating_add(PAGE_TOKENS)) } else { len };
        Pages { exact: pages_for(exact), ..self.decode(len) }
    }

    fn compressed(&self) -> bool {
        !self.layout.sealed.is_empty()
    }

    /// Whether these pages fit the arena together.
    fn takes(&self, pages: Pages) -> bool {
        let PageSizes { exact, sealed, sinks, workspace } = self.sizes;
        let mut counts = BTreeMap::new();
        for (bytes, count) in [(exact, pages.exact), (sealed, pages.sealed), (sinks, pages.sinks), (workspace, pages.workspace)] {
            // Pages of one size share slabs, whatever they are for; pages of different sizes do not.
            *counts.entry(bytes).or_insert(0) += count;
        }
        // A kind without a size is one that the profile does not have.
        let slabs = |(&bytes, &count): (&u64, &u64)| self.slab_bytes.checked_div(bytes).map_or(0, |per_slab| count.div_ceil(per_slab));
        counts.iter().map(slabs).sum::<u64>() <= self.slabs
    }

    /// Longest prompt such that it and all shorter ones can be prefilled.
    fn max_prompt(&self) -> u32 {
        largest(|n| last_page_of(n).all(|m| self.takes(self.prefill(m))))
    }

    /// Longest sequence that a prompt of one token can grow to.
    fn max_context(&self) -> u32 {
        if !self.takes(self.prefill(1)) {
            return 0;
        }
        largest(|n| last_page_of(n).all(|m| self.takes(self.decode(m))))
    }

    fn requests(&self, tokens: u32) -> u64 {
        let (each, one) = (self.fullest(tokens), self.prefill(tokens));
        let all = |n: u32| {
            let n = u64::from(n);
            let Pages { exact, sealed, sinks, .. } = each;
            Pages { exact: n * exact, sealed: n * sealed, sinks: n * sinks, workspace: one.workspace }
        };
        u64::from(largest(|n| self.takes(all(n))))
    }
}

fn pages_for(positions: u32) -> u64 {
    u64::from(positions).div_ceil(P)
}

/// The lengths that stand for all up to `n`: what a sequence holds falls where it seals, but at `len` it is of each kind
/// no less than at `len - 64`.
fn last_page_of(n: u32) -> impl Iterator<Item = u32> {
    n.saturating_sub(PAGE_TOKENS - 1).max(1)..=n
}

/// The largest number for which `holds` is true, given that it is true up to there and false beyond; zero is not asked.
fn largest(holds: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, u32::MAX);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if holds(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "cache {} bytes = {} slabs of {}; the model takes {} positions",
            self.arena_bytes, self.slabs, self.slab_bytes, self.max_positions
        )?;
        let mut rows = vec![
            ["profile", "bytes/token", "smaller", "sealed page", "= keys", "+ values", "+ metadata", "+ padding", "window", "sinks"]
                .into_iter()
                .chain(["prefill/token", "max prompt", "max context"])
                .map(str::to_owned)
                .chain(self.profiles.first().into_iter().flat_map(|p| &p.requests).map(|r| format!("x {} tokens", r.tokens)))
                .collect::<Vec<_>>(),
        ];
        for p in &self.profiles {
            let sealed = |part: fn(&SealedPage) -> u64| p.sealed_page.as_ref().map_or("-".to_owned(), |page| part(page).to_string());
            let mut row = vec![
                p.name.clone(),
                decimal(p.bytes_per_token),
                format!("{:.2}x", p.times_smaller),
                sealed(|s| s.bytes),
                sealed(|s| s.keys),
                sealed(|s| s.values),
                sealed(|s| s.metadata),
                sealed(|s| s.padding),
                p.window_bytes.to_string(),
                p.sinks_bytes.to_string(),
                decimal(p.workspace_bytes_per_token),
                p.max_prompt_tokens.to_string(),
                p.max_context_tokens.to_string(),
            ];
            row.extend(p.requests.iter().map(|r| r.fit.to_string()));
            rows.push(row);
        }
        let widths: Vec<usize> = (0..rows[0].len()).map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
        for row in &rows {
            write!(f, "{:<w$}", row[0], w = widths[0])?;
            row.iter().zip(&widths).skip(1).try_for_each(|(cell, w)| write!(f, "  {cell:>w$}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

/// A number of bytes, which is whole or a fraction with 64 below.
fn decimal(bytes: f64) -> String {
    if bytes.fract() == 0.0 { format!("{bytes}") } else { format!("{bytes:.2}") }
}
