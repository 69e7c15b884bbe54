//! The definition of every operation: loops in f32, no cleverness. Slow on purpose.
