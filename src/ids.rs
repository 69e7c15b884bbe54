//! Newtypes for the things that are counted and addressed. No behaviour lives here.

use std::fmt;

/// Positions in a page: the unit of allocation and of sealing, one tile of tokens for every kernel.
pub const PAGE_TOKENS: u32 = 64;

/// A token id. Valid ids are below the model's logits width, which only admission and the sampler check.
pub type TokenId = u32;

/// One sequence inside the engine: one choice of one request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

impl fmt::Debug for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

/// Where a page begins in the arena, in units of [`PageAddr::UNIT`] bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageAddr(pub u32);

impl PageAddr {
    /// Bytes per address unit; every page size is a multiple of it, so pages are aligned to cache lines.
    pub const UNIT: u64 = 64;

    /// Byte offset of the page in the arena.
    pub fn byte(self) -> u64 {
        u64::from(self.0) * Self::UNIT
    }
}

impl fmt::Debug for PageAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.0)
    }
}

/// Index of a cache profile in the server's table of profiles.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ProfileIndex(pub u8);

/// Identity of an adapter's content; zero is the base model without an adapter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct AdapterGeneration(pub u64);
