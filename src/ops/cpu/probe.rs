//! What the machine can do at best, measured: the yardsticks of `loadtest/micro.rs`.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::Cpu;
use super::simd::{Kernel, Lanes, run};

impl Cpu {
    /// Bytes per second read by all threads together, from a buffer of `bytes` read again and again: of main memory
    /// when that is more than the caches hold, of a cache otherwise. Takes some 0.3 s.
    pub fn read_bandwidth(&self, bytes: usize) -> f64 {
        const CHUNK: usize = 64 * 1024;
        let data = vec![1.0f32; bytes.div_ceil(4 * CHUNK).max(1) * CHUNK];
        let sink = AtomicU32::new(0);
        let seconds = best(Duration::from_millis(300), || {
            self.pool.run(data.len() / CHUNK, &|i| {
                let mut sum = 0.0;
                let read = Read { data: &data[i * CHUNK..][..CHUNK], sum: &mut sum };
                // SAFETY: `Cpu` holds only instruction sets this machine has.
                unsafe { run(self.isa, read) };
                sink.fetch_xor(sum.to_bits(), Ordering::Relaxed);
            });
        });
        black_box(sink.into_inner());
        (data.len() * 4) as f64 / seconds
    }

    /// Multiply-adds in f32 per second of all threads together, times two. Takes some 0.3 s.
    pub fn peak_flops(&self) -> f64 {
        const TURNS: usize = 100_000;
        let chunks = 8 * self.threads();
        let lanes = AtomicU32::new(0);
        let seconds = best(Duration::from_millis(300), || {
            self.pool.run(chunks, &|_| {
                let mut done = 0;
                // SAFETY: `Cpu` holds only instruction sets this machine has.
                unsafe { run(self.isa, Multiply { turns: black_box(TURNS), lanes: &mut done }) };
                lanes.store(done, Ordering::Relaxed);
            });
        });
        2.0 * f64::from(lanes.into_inner()) * (CHAINS * TURNS * chunks) as f64 / seconds
    }
}

/// The shortest of the runs that fit `time`.
fn best(time: Duration, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < time {
        let one = Instant::now();
        f();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

/// Sums a multiple of 128 floats.
struct Read<'a> {
    data: &'a [f32],
    sum: &'a mut f32,
}

impl Kernel for Read<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: each step lies within the slice.
        unsafe {
            let mut acc = [S::splat(0.0); 8];
            let mut i = 0;
            while i + 8 * S::N <= self.data.len() {
                for line in 0..8 * S::N / 16 {
                    // Hardware stops at the ends of pages.
                    S::prefetch(self.data.as_ptr().wrapping_add(i + line * 16 + 4096).cast());
                }
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = S::add(*acc, S::load(self.data.as_ptr().add(i + j * S::N)));
                }
                i += 8 * S::N;
            }
            *self.sum = acc.iter().map(|&v| S::sum(v)).sum();
        }
    }
}

/// Independent sums, enough to hide the latency of a multiply-add.
const CHAINS: usize = 10;

/// Multiplies and adds in registers.
struct Multiply<'a> {
    turns: usize,
    /// Set to the lanes of a vector.
    lanes: &'a mut u32,
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        // SAFETY: arithmetic on the caller's instruction set.
        unsafe {
            let (a, b) = (S::splat(black_box(0.5)), S::splat(black_box(0.25)));
            let mut acc = [a; CHAINS];
            for _ in 0..self.turns {
                for acc in &mut acc {
                    *acc = S::fma(a, *acc, b);
                }
            }
            let sum: f32 = acc.iter().map(|&v| S::sum(v)).sum();
            black_box(sum);
            *self.lanes = S::N as u32;
        }
    }
}
