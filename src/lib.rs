//! Strait: long contexts through a narrow channel.

pub mod compress;
pub mod engine;
pub mod ids;
pub mod kv;
pub mod model;
pub mod ops;
pub mod pages;
pub mod request;
pub mod scheduler;
pub mod step;
pub mod telemetry;
