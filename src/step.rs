//! What one forward pass computes, as plain data: made by the scheduler, carried out by the runner,
//! settled by the scheduler's `commit`. Prints itself, so that a test of policy is a transcript.

use std::fmt;
use std::ops::Range;

use crate::ids::{AdapterGeneration, PAGE_TOKENS, PageAddr, ProfileIndex, SeqId, TokenId};

/// Positions `[0, sealed_len)` are in sealed pages; at least `window` positions stay exact.
///
/// The one definition of "how much is sealed", used by scheduler, kernels and tests.
pub const fn sealed_len(len: u32, window: u32) -> u32 {
    len.saturating_sub(window) / PAGE_TOKENS * PAGE_TOKENS
}

/// The next length at which more is sealed than at `len`.
pub const fn next_seal(len: u32, window: u32) -> u32 {
    sealed_len(len, window) + window + PAGE_TOKENS
}

/// One forward pass. All ranges of a row index the plan's own flat arrays, so that a plan is reused
/// from step to step without allocating.
#[derive(Default, Clone)]
pub struct StepPlan {
    pub rows: Vec<Row>,
    /// Input tokens of all rows.
    pub tokens: Vec<TokenId>,
    /// Page tables of all rows.
    pub pages: Vec<PageAddr>,
    /// What becomes of pages once a row's positions are computed.
    pub moves: Vec<Move>,
}

/// Which logits a row wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Logits {
    /// None: the prompt goes on in a later step.
    None,
    /// Of the last position, to sample the next token.
    Last,
    /// Of every position: prompt log-probabilities, and the last one is sampled.
    All,
}

/// Where a row's exact keys and values live while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExactStore {
    /// Pages of all layers: a `full` cache, or the window of a compressed one.
    Exact,
    /// Pages of one layer at a time, with room for hidden states: prefill of a compressed cache,
    /// layer by layer when the prompt exceeds a step.
    Workspace,
}

/// One sequence's share of a step: a prompt chunk, a decoded token, or decoded tokens over again after a preemption, through
/// some or all layers.
///
/// ```text
/// positions  [0, sinks)                 exact, in the sinks block (only once page 0 is sealed)
///            [sinks, sealed)            latents, in sealed pages
///            [sealed, positions.start)  exact, in exact or workspace pages: seen by this row
///            positions                  computed by this row, appended to those same pages
/// ```
#[derive(Clone)]
pub struct Row {
    pub seq: SeqId,
    pub profile: ProfileIndex,
    pub adapter: AdapterGeneration,
    /// Positions this row computes.
    pub positions: Range<u32>,
    /// Layers it passes through. All of them, but for the quanta of a layer-by-layer prefill.
    pub layers: Range<u32>,
    /// Its input tokens, in `StepPlan::tokens`; empty when `layers.start > 0` (hidden states are in the workspace).
    pub tokens: Range<usize>,
    /// Sealed pages, in `StepPlan::pages`; page `i` holds positions `[i * PAGE_TOKENS, (i + 1) * PAGE_TOKENS)`.
    /// Always empty for the `full` profile, whose complete pages stay in `exact`.
    pub sealed: Range<usize>,
    /// Exact or workspace pages, in `StepPlan::pages`; the first begins at position `sealed.len() * PAGE_TOKENS`.
    pub exact: Range<usize>,
    pub store: ExactStore,
    /// Exact copies of the first positions; present once page 0 is sealed and the profile keeps sinks.
    pub sinks: Option<PageAddr>,
    /// Moves of this row, in `StepPlan::moves`, carried out for each of `layers` after its attention.
    pub moves: Range<usize>,
    pub logits: Logits,
}

/// What becomes of a page of exact keys and values, for every layer of the row, after that layer's attention.
/// The source page is in the row's `store`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Move {
    /// Compress a whole page into a sealed page. `skip` first positions (sinks) take no part in its scales.
    Seal { from: PageAddr, to: PageAddr, skip: u32 },
    /// Copy the first `n` positions of a page into the sinks block.
    Sinks { from: PageAddr, to: PageAddr, n: u32 },
    /// Copy `n` positions of a workspace page into a window page.
    Keep { from: PageAddr, to: PageAddr, n: u32 },
}

impl Row {
    /// Number of positions this row computes.
    pub fn len(&self) -> usize {
        (self.positions.end - self.positions.start) as usize
    }

    /// Whether it computes nothing; no planned row does.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }
}

impl StepPlan {
    /// Empties the plan, keeping its memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.tokens.clear();
        self.pages.clear();
        self.moves.clear();
    }
}

impl fmt::Display for StepPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.rows {
            write!(f, "{:?} p{} {}..{}", row.seq, row.profile.0, row.positions.start, row.positions.end)?;
            if row.store == ExactStore::Workspace {
                write!(f, " layers {}..{}", row.layers.start, row.layers.end)?;
            }
            write!(f, " sealed={} exact={}", row.sealed.len(), row.exact.len())?;
            for m in &self.moves[row.moves.clone()] {
                match m {
                    Move::Seal { to, .. } => write!(f, " seal->{to:?}")?,
                    Move::Sinks { .. } => write!(f, " sinks")?,
                    Move::Keep { n, .. } => write!(f, " keep({n})")?,
                }
            }
            match row.logits {
                Logits::None => writeln!(f)?,
                Logits::Last => writeln!(f, " sample")?,
                Logits::All => writeln!(f, " logits")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealing_drains_whole_pages_and_keeps_the_window() {
        for (len, window, want) in
            [(0, 64, 0), (64, 64, 0), (127, 64, 0), (128, 64, 64), (191, 64, 64), (192, 64, 128), (63, 0, 0), (64, 0, 64)]
        {
            assert_eq!(sealed_len(len, window), want, "len {len}, window {window}");
            assert!(len - sealed_len(len, window) >= window.min(len));
            let next = (len..).find(|&n| sealed_len(n, window) > want);
            assert_eq!(Some(next_seal(len, window)), next, "len {len}, window {window}");
        }
    }
}
