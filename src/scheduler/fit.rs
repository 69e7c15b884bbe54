//! "Will it fit", for those who ask before they queue: the same arithmetic as the scheduler's own, on an empty pool.

use super::Config;
use super::profile::ProfileSizes;
use crate::ids::{PAGE_TOKENS, ProfileIndex};
use crate::pages::PagePool;

/// Whether a request could run alone in a pool: `(need, have)` in bytes of whole slabs when it could not.
pub(super) fn alone(pool: &PagePool, profile: ProfileIndex, sizes: &ProfileSizes, prompt: u32, max_new: u32) -> Result<(), (u64, u64)> {
    let at_peak = sizes.peaks(prompt, max_new).map(|need| pool.alone(&need.of(profile)));
    at_peak.into_iter().find(|(need, have)| need > have).map_or(Ok(()), Err)
}

/// Answers whether a request could run alone in the whole cache. Never lends a page.
pub struct Fit {
    pool: PagePool,
    profiles: Vec<ProfileSizes>,
}

impl Fit {
    /// For the scheduler of this configuration.
    pub fn new(config: &Config) -> Self {
        let sizes: Vec<_> = config.profiles.iter().map(|p| p.sizes).collect();
        Fit { pool: PagePool::new(config.arena_bytes, &sizes), profiles: config.profiles.clone() }
    }

    /// In bytes of whole slabs, each kind of page at its peak. O(1).
    ///
    /// # Errors
    /// `(need, have)` in bytes when it can never run.
    ///
    /// # Panics
    /// For a profile that is not in the configuration.
    pub fn check(&self, profile: ProfileIndex, prompt: u32, max_new: u32) -> Result<(), (u64, u64)> {
        alone(&self.pool, profile, &self.profiles[usize::from(profile.0)], prompt, max_new)
    }

    /// Bytes that a prompt of up to `positions - 1` tokens and one more need at their largest, in whole slabs. A prompt that ends with
    /// a page may need less than a shorter one.
    ///
    /// # Panics
    /// For a profile that is not in the configuration.
    pub fn need(&self, profile: ProfileIndex, positions: u32) -> u64 {
        let peaks = up_to(positions.saturating_sub(1).max(1)).flat_map(|prompt| self.profiles[usize::from(profile.0)].peaks(prompt, 1));
        peaks.map(|need| self.pool.alone(&need.of(profile)).0).max().unwrap_or(0)
    }

    /// The longest prompt, with one token of answer, that could run alone, as could all shorter ones; at most `limit`.
    pub fn longest(&self, profile: ProfileIndex, limit: u32) -> u32 {
        let (mut fits, mut fails) = (0, limit.saturating_add(1));
        while fails - fits > 1 {
            let middle = fits + (fails - fits) / 2;
            if up_to(middle).all(|prompt| self.check(profile, prompt, 1).is_ok()) { fits = middle } else { fails = middle }
        }
        fits
    }
}

/// The prompts that stand for all up to this long: what one needs falls where its last page is full, but is no less than what one
/// that is a page shorter needs.
fn up_to(prompt: u32) -> impl Iterator<Item = u32> {
    prompt.saturating_sub(PAGE_TOKENS - 1).max(1)..=prompt
}
