//! The engine thread and its loop; the only door to it is [`EngineHandle`]. The engine knows no text.

pub mod sampler;
pub mod thread;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::adapters::registry::Lease;
use crate::ids::SeqId;
use crate::request::{Event, GenerateRequest};
pub use crate::scheduler::Limit;
use crate::telemetry::Snapshot;

/// Sends work to the engine thread. Cheap to clone; never blocks on compute.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<dyn Engine>,
}

/// What stands behind a handle: the engine thread, or a script in a test of the HTTP edge.
pub trait Engine: Send + Sync {
    /// Queues the sequences of one request, or says why not and has queued none. There is a stream for each, in their order. The lease is
    /// on the adapter that they name, if they name one, and is held until the last of them has ended.
    fn submit_all(&self, requests: Vec<GenerateRequest>, adapter: Option<Lease>) -> Result<Vec<TokenStream>, SubmitError>;
    /// Queues one sequence.
    fn submit_with(&self, request: GenerateRequest, adapter: Option<Lease>) -> Result<TokenStream, SubmitError> {
        Ok(self.submit_all(vec![request], adapter)?.pop().expect("there is a stream for each sequence"))
    }
    /// Queues one sequence of the model alone.
    fn submit(&self, request: GenerateRequest) -> Result<TokenStream, SubmitError> {
        self.submit_with(request, None)
    }
    /// Ends a sequence as if it had met a stop token: its stream gets `Done` with `FinishReason::Stop` and the usage so
    /// far, perhaps after tokens that were already under way. A sequence that has ended or is unknown is left alone.
    fn finish(&self, seq: SeqId);
    /// The engine's state after its last step.
    fn snapshot(&self) -> Arc<Snapshot>;
    /// Age of the engine's last sign of life; an idle engine is alive.
    fn heartbeat_age(&self) -> Duration;
    /// Stops taking requests. Running and queued ones go on.
    fn drain(&self);
    /// Ends every sequence that is left with `Failure::Draining`, and the thread.
    fn stop(&self);
}

/// Why a request was not queued.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full; `retry_after` follows from the pace at which it drains.
    #[error("the request queue is full ({queued} requests{})", in_all(.limit))]
    QueueFull { queued: usize, limit: Limit, retry_after: Duration },
    /// The request can never fit the cache, however idle the server is.
    #[error(
        "this request needs {need} bytes of cache and the server has {have}; shorten it, choose a smaller cache_profile, or raise --kv-cache-memory-bytes"
    )]
    TooLarge { need: u64, have: u64 },
    #[error("the server is shutting down")]
    Draining,
    #[error("the engine has stopped")]
    Stopped,
}

/// What of the requests in a full queue leaves no room for another, where it is not their number.
fn in_all(limit: &Limit) -> &'static str {
    match limit {
        Limit::Requests => "",
        Limit::Tokens => ", with as many prompt tokens as may wait",
    }
}

/// The events of one sequence. Dropping it cancels the sequence.
pub struct TokenStream {
    pub seq: SeqId,
    pub events: mpsc::Receiver<Event>,
    cancel: Option<Box<dyn FnOnce() + Send>>,
}

impl TokenStream {
    /// A stream whose drop calls `cancel`.
    pub fn new(seq: SeqId, events: mpsc::Receiver<Event>, cancel: impl FnOnce() + Send + 'static) -> Self {
        TokenStream { seq, events, cancel: Some(Box::new(cancel)) }
    }

    /// The next event; `None` only if the engine died.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            cancel();
        }
    }
}

impl EngineHandle {
    /// A handle to `engine`.
    pub fn new(engine: Arc<dyn Engine>) -> Self {
        EngineHandle { inner: engine }
    }
}

impl std::ops::Deref for EngineHandle {
    type Target = dyn Engine;
    fn deref(&self) -> &Self::Target {
        &*self.inner
    }
}
