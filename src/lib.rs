#![doc = include_str!("ARCHITECTURE.md")]

pub mod calibrate;
pub mod compress;
pub mod config;
pub mod engine;
pub mod ids;
pub mod kv;
pub mod model;
pub mod ops;
pub mod pages;
pub mod plan;
pub mod quant;
pub mod request;
pub mod scheduler;
pub mod step;
pub mod telemetry;
