//! The decoder: `config` holds its facts, `checkpoint` reads and checks them and the weights.

pub mod checkpoint;
pub mod config;
pub mod config_json;
pub mod generation;
pub mod header;
pub mod json;
pub mod weights;
