//! Everything an operator can see: one closed list of events, and the one place that turns them into
//! metrics and logs. Events carry plain labels and numbers, so every room may emit them.

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A request was refused before the engine; `code` is the stable error code.
    Refused { code: &'static str },
    /// A sequence was accepted by the engine.
    Accepted { prompt_tokens: u32, max_new_tokens: u32 },
    /// A sequence's first plan row was made after so long in the queue.
    Started { queue_s: f64, cached_tokens: u32, prompt_tokens: u32 },
    /// Its first token, since arrival.
    FirstToken { ttft_s: f64 },
    /// Each later token, since the one before.
    NextToken { gap_s: f64 },
    /// A sequence ended. `reason`: `stop`, `length`, `abort` or `error`.
    Finished { reason: &'static str, e2e_s: f64, prefill_s: f64, decode_s: f64, prompt_tokens: u32, completion_tokens: u32, preemptions: u32 },
    Preempted,
    /// One forward pass.
    Step { seconds: f64, tokens: u32 },
    /// Prefix cache look-up, in tokens.
    PrefixLookup { queried: u32, hit: u32 },
}

/// State of the engine after a step: what gauges show and `/v1/capacity` answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    pub running: usize,
    pub waiting: usize,
    pub arena_bytes: u64,
    pub free_bytes: u64,
    /// Bytes of pages that only the prefix cache holds: free on demand.
    pub cached_bytes: u64,
    /// Bytes in use by `(profile index, branch)`.
    pub branches: Vec<(u8, Branch, u64)>,
}

/// Parts of the cache, as metrics name them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Branch {
    Window,
    Sinks,
    SealedKeys,
    SealedValues,
    Metadata,
    Workspace,
}

impl Branch {
    /// The label value.
    pub fn label(self) -> &'static str {
        match self {
            Branch::Window => "window",
            Branch::Sinks => "sinks",
            Branch::SealedKeys => "sealed_keys",
            Branch::SealedValues => "sealed_values",
            Branch::Metadata => "metadata",
            Branch::Workspace => "workspace",
        }
    }
}
