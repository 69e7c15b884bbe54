//! Strait: long contexts through a narrow channel.

pub mod ids;
pub mod telemetry;
pub mod compress;
pub mod request;
pub mod step;
pub mod kv;
pub mod ops;
pub mod model;
pub mod text;
pub mod demo;
pub mod engine;
