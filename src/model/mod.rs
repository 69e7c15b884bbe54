//! The decoder: `config` holds its facts.

pub mod config;
