//! "Will it fit", for those who ask before they queue: the same arithmetic as the scheduler's own, on an empty pool.

use super::Config;
use super::profile::ProfileSizes;
use crate::ids::ProfileIndex;
use crate::pages::PagePool;

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

    /// Exact in bytes of whole slabs. O(1).
    ///
    /// # Errors
    /// `(need, have)` in bytes when it can never run.
    ///
    /// # Panics
    /// For a profile that is not in the configuration.
    pub fn check(&mut self, profile: ProfileIndex, prompt: u32, max_new: u32) -> Result<(), (u64, u64)> {
        for need in self.profiles[usize::from(profile.0)].peaks(prompt, max_new) {
            let (need, have) = self.pool.alone(&need.of(profile));
            if need > have {
                return Err((need, have));
            }
        }
        Ok(())
    }
}
