//! One binary of integration tests; each module is a room of `src`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

mod adapters;
mod artifact;
mod calibrate;
mod checkpoint;
mod codec;
mod cuda;
mod cuda_adapters;
mod cuda_devices;
mod cuda_latents;
mod cuda_linear;
mod cuda_sample;
mod emulated;
mod engine;
mod eval;
mod eval_command;
mod factorised;
mod families;
mod golden;
mod http;
mod inspect;
mod model;
mod ops;
mod oracle;
mod pages;
mod plan;
mod queue;
mod registry;
mod scheduler;
mod sim;
mod template;
mod text;
mod tidy;
mod train;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Allocations this thread has made so far.
fn allocations() -> u64 {
    ALLOCATIONS.get()
}

/// The system's allocator, with a count for each thread.
struct Counting;

// SAFETY: everything is passed on; the count is a thread's own and needs no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;
