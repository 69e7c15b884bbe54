//! What must hold between any two calls. Tests check it at every step, the engine now and then.

use std::collections::BTreeMap;

use super::Scheduler;
use super::profile::{ProfileSizes, pages_for};
use super::sequence::{Phase, Running, Sequence};
use crate::ids::{PAGE_TOKENS, PageAddr};

impl Scheduler {
    /// Recounts every book: the pool's own, who holds which page, queues, budgets, tables. O(pages + sequences).
    ///
    /// # Errors
    /// The first thing that is not as it must be.
    pub fn check(&self) -> Result<(), String> {
        self.pool.check()?;
        self.check_holders()?;
        self.check_queues()?;
        for sequence in &self.running {
            let profile = &self.config.profiles[usize::from(sequence.request.profile.0)];
            self.check_tables(sequence, profile).map_err(|fault| format!("{:?}: {fault}", sequence.id))?;
        }
        Ok(())
    }

    /// Holders of a page are the tables that name it, and nobody else.
    fn check_holders(&self) -> Result<(), String> {
        let mut named: BTreeMap<PageAddr, u32> = BTreeMap::new();
        let mut bytes = 0;
        for sequence in &self.running {
            for page in sequence.held() {
                *named.entry(page).or_default() += 1;
            }
        }
        for (&page, &n) in &named {
            if self.pool.holders(page) != n {
                return Err(format!("{page:?} has {} holders and is in {n} tables", self.pool.holders(page)));
            }
            bytes += self.pool.size_of(page);
        }
        if bytes != self.pool.bytes().held {
            return Err(format!("{} bytes are held, and tables name {bytes}", self.pool.bytes().held));
        }
        Ok(())
    }

    fn check_queues(&self) -> Result<(), String> {
        let running = self.running.len();
        if running > self.config.max_num_seqs || !self.running.is_sorted_by(|a, b| a.rank < b.rank) {
            return Err(format!("{running} sequences run, or not in order"));
        }
        if running > 1 && self.running.iter().any(|s| s.compact) {
            return Err(format!("{running} sequences run, and one of them is to have the arena for itself"));
        }
        let deadline = |s: &Sequence<Running>| Some((s.deadline()?, s.id)).filter(|_| !s.state.ended);
        let waiting = self.waiting.values().filter_map(|s| Some((s.deadline()?, s.id)));
        let deadlines: BTreeMap<_, _> = self.running.iter().filter_map(deadline).chain(waiting).collect();
        if deadlines != self.deadlines {
            return Err(format!("{} deadlines for {} that have not started", self.deadlines.len(), deadlines.len()));
        }
        let live = self.running.iter().filter(|s| !s.state.ended).map(|s| (s.id, s.rank));
        let all: Vec<_> = live.chain(self.waiting.values().map(|s| (s.id, s.rank))).collect();
        if all.len() != self.ranks.len() || !all.iter().all(|(id, rank)| self.ranks.get(id) == Some(rank)) {
            return Err(format!("{} sequences live and {} are known", all.len(), self.ranks.len()));
        }
        if self.in_flight == 0 && self.running.iter().any(|s| s.state.ended) {
            return Err("a sequence that ended holds pages and no step is in flight".into());
        }
        Ok(())
    }

    /// Tables are as long as their positions, and what will be written is held once and unknown to the index.
    fn check_tables(&self, sequence: &Sequence<Running>, profile: &ProfileSizes) -> Result<(), String> {
        let Running { phase, reused, target, computed, sealed, exact, workspace, sinks, sealing, offered, .. } = &sequence.state;
        let n = |pages: &[PageAddr]| pages.len() as u32;
        let (written_sealed, written_exact, tables) = match phase {
            Phase::Prefill { layer, at } => {
                if at < reused || at >= target || *layer >= self.config.layers || *target != sequence.prefill_target(profile.compressed) {
                    return Err(format!("prefill of {reused}..{target} stands at {at} of layer {layer}"));
                }
                let need = profile.prefill_need(*target, *reused);
                let shared = reused / PAGE_TOKENS;
                let (s, e) = if profile.compressed { (shared + need.sealed, need.exact) } else { (0, shared + need.exact) };
                let written_exact = if profile.compressed { &exact[..] } else { &exact[(computed / PAGE_TOKENS) as usize..] };
                (sealed.get(shared as usize..).unwrap_or_default(), written_exact, (s, e, need.workspace))
            }
            Phase::Decode => {
                let end = profile.decode_end(*computed, sequence.len());
                if *computed >= end || (!profile.compressed && *computed + 1 != end) || sequence.generated.is_empty() {
                    return Err(format!("decodes {} positions and computed {computed}", sequence.len()));
                }
                let s = profile.sealed_len(*computed) / PAGE_TOKENS;
                let grown = sealing.is_some() || n(exact) + n(sealed) > pages_for(*computed);
                let written = if profile.compressed { 0 } else { (computed / PAGE_TOKENS) as usize };
                let e = pages_for(if grown { end } else { *computed }) - s;
                (&sealed[..0], &exact[written.min(exact.len())..], (s, e, 0))
            }
        };
        if (n(sealed), n(exact), n(workspace)) != tables {
            return Err(format!("{phase:?} at {computed} holds {:?} pages, not {tables:?}", (n(sealed), n(exact), n(workspace))));
        }
        if sinks.is_some() != (profile.compressed && profile.sinks > 0 && !sealed.is_empty()) {
            return Err(format!("sinks {sinks:?} beside {} sealed pages", sealed.len()));
        }
        if sealing.is_some_and(|hit| hit.sinks.is_some() != (sealed.is_empty() && profile.sinks > 0)) {
            return Err(format!("seals into {sealing:?} after {} pages", sealed.len()));
        }
        let sealing = sealing.iter().flat_map(|hit| std::iter::once(hit.page).chain(hit.sinks));
        for page in written_sealed.iter().chain(written_exact).chain(workspace).copied().chain(sealing) {
            if self.pool.holders(page) != 1 || self.pool.is_indexed(page) {
                return Err(format!("{page:?} will be written, and is shared or indexed"));
            }
        }
        let chain = if profile.compressed { sealed } else { exact };
        if *offered > chain.len() || (self.config.prefix_caching && self.in_flight == 0 && !sequence.offered_all(profile)) {
            return Err(format!("{offered} of {} pages were offered to the index", chain.len()));
        }
        Ok(())
    }
}
