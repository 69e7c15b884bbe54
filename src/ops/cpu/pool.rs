//! Threads that share out one job at a time, made for jobs of a few microseconds.
//!
//! A forward pass enters a parallel region a hundred times. Workers therefore spin for a while between jobs
//! before they park, the caller works too, and it waits only for workers that have really joined: one that
//! wakes up too late finds the gate closed. Chunks are handed out by a counter, so a slow thread takes fewer;
//! what a chunk computes must not depend on who computes it.

use std::any::Any;
use std::cell::{RefCell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Turns of the waiting loop before a worker parks: some 100 microseconds.
const SPINS: u32 = 2000;

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// On a cache line of its own.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// `generation << 32 | open << 31 | workers inside`.
    gate: Line<AtomicU64>,
    /// Next chunk to hand out.
    next: Line<AtomicUsize>,
    /// Written only while the gate is closed and nobody is inside.
    job: UnsafeCell<Option<(Task<'static>, usize)>>,
    parked: Vec<Line<AtomicBool>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: `job` is written by the thread that holds `Pool::entry`, while no worker is inside the gate, and read
// by workers inside it; the gate's release and acquire order the two. All else is atomic or locked.
unsafe impl Sync for Shared {}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

/// A fixed number of threads, the caller's among them.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held for the length of a job.
    entry: Mutex<()>,
}

impl Pool {
    /// A pool of `threads`, of which the caller is one.
    pub(super) fn new(threads: usize) -> Pool {
        let n = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            gate: Line(AtomicU64::new(0)),
            next: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            parked: (0..n).map(|_| Line(AtomicBool::new(false))).collect(),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let workers = (0..n)
            .map(|i| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("strait-cpu-{i}"))
                    .spawn(move || shared.work(i))
                    .unwrap_or_else(|e| panic!("cannot start compute thread {i} of {n}: {e}"))
            })
            .collect();
        Pool { shared, workers, entry: Mutex::new(()) }
    }

    /// Threads, the caller's among them.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once with every number below `chunks`, on all threads; returns when all calls have.
    /// A job entered from inside another, or while another thread's runs, runs on the calling thread alone.
    ///
    /// # Panics
    /// With a panic of `task`, once the other threads have left it.
    pub(super) fn run(&self, chunks: usize, task: Task<'_>) {
        let entry = if chunks > 1 && !self.workers.is_empty() { self.entry.try_lock() } else { return (0..chunks).for_each(task) };
        let _entry = match entry {
            Ok(guard) => guard,
            Err(std::sync::TryLockError::Poisoned(p)) => p.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return (0..chunks).for_each(task),
        };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The task is called only inside the gate, and this function does not
        // return or unwind before the gate is closed and empty.
        let forever = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: `entry` is held and the last job left the gate closed and empty, so nobody reads this now.
        unsafe { *shared.job.get() = Some((forever, chunks)) };
        shared.next.0.store(0, Ordering::Relaxed);
        let generation = (shared.gate.0.load(Ordering::Relaxed) >> 32) + 1;
        // Sequentially consistent, as is the worker's store to `parked`: one of the two sees the other.
        shared.gate.0.store(generation << 32 | OPEN, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers).take(chunks - 1) {
            if parked.0.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.chunks(task, chunks)));
        if mine.is_err() {
            shared.next.0.store(chunks, Ordering::Relaxed);
        }
        shared.gate.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut turns = 0;
        while shared.gate.0.load(Ordering::Acquire) & INSIDE != 0 {
            turns += 1;
            if turns < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = mine.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches every panic of a task; there is nothing to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn chunks(&self, task: Task<'_>, chunks: usize) {
        loop {
            let i = self.next.0.fetch_add(1, Ordering::Relaxed);
            if i >= chunks {
                return;
            }
            task(i);
        }
    }

    /// A worker's life.
    fn work(&self, me: usize) {
        let mut seen = 0;
        let mut turns = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let gate = self.gate.0.load(Ordering::Acquire);
            if gate >> 32 == seen || gate & OPEN == 0 {
                turns += 1;
                if turns < SPINS {
                    std::hint::spin_loop();
                    continue;
                }
                self.parked[me].0.store(true, Ordering::SeqCst);
                let now = self.gate.0.load(Ordering::SeqCst);
                if (now >> 32 == seen || now & OPEN == 0) && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.parked[me].0.store(false, Ordering::SeqCst);
                turns = 0;
                continue;
            }
            if self.gate.0.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = gate >> 32;
            turns = 0;
            // SAFETY: this thread is inside the gate, so the job is the one of this generation and stays.
            if let Some((task, chunks)) = unsafe { *self.job.get() }
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.chunks(task, chunks)))
            {
                self.next.0.store(chunks, Ordering::Relaxed);
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.gate.0.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Sixteen floats on a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Aligned(pub(super) [f32; 16]);

thread_local! {
    static SCRATCH: RefCell<Vec<Aligned>> = const { RefCell::new(Vec::new()) };
}

/// At least `n` floats of this thread's own memory, with any contents, to be given back with [`scratch_back`].
///
/// The memory grows to the largest `n` asked for and stays. Taken and given back rather than lent to a closure:
/// closures do not inherit the instruction set of the kernel around them.
pub(super) fn scratch_take(n: usize) -> Vec<Aligned> {
    let mut buffer = SCRATCH.take();
    grow(&mut buffer, n);
    buffer
}

/// Keeps the memory for the next call on this thread.
pub(super) fn scratch_back(buffer: Vec<Aligned>) {
    SCRATCH.set(buffer);
}

/// Makes room for `n` floats.
pub(super) fn grow(buffer: &mut Vec<Aligned>, n: usize) {
    if buffer.len() < n.div_ceil(16) {
        buffer.resize(n.div_ceil(16), Aligned([0.0; 16]));
    }
}

/// A pointer that threads may share; whoever writes through it says why the places are disjoint.
#[derive(Clone, Copy)]
pub(super) struct Shares<T>(*mut T);

// SAFETY: a pointer is only an address; the argument is made where it is dereferenced.
unsafe impl<T> Send for Shares<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shares<T> {}

impl<T> Shares<T> {
    pub(super) fn new(data: &mut [T]) -> Self {
        Shares(data.as_mut_ptr())
    }

    pub(super) fn get(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_run_once_whatever_the_threads() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            for chunks in [0, 1, 2, 7, 100].repeat(50) {
                let hits: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(chunks, &|i| {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1), "{threads} threads, {chunks} chunks");
            }
        }
    }

    #[test]
    fn a_worker_that_has_parked_is_woken() {
        let pool = Pool::new(2);
        let both = std::sync::Barrier::new(2);
        for _ in 0..3 {
            thread::sleep(std::time::Duration::from_millis(20));
            // Passes only when two threads are inside at once.
            pool.run(2, &|_| {
                both.wait();
            });
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..8 {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert!(i != bad, "chunk {i}"))));
            let message = caught.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*message, format!("chunk {bad}"));
        }
        let sum = AtomicUsize::new(0);
        pool.run(8, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }

    #[test]
    fn a_job_inside_a_job_runs() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(4, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            })
        });
        assert_eq!(sum.into_inner(), 24);
    }
}
