//! One binary of integration tests; each module is a room of `src`.

mod artifact;
mod calibrate;
mod checkpoint;
mod codec;
mod engine;
mod eval;
mod golden;
mod http;
mod model;
mod ops;
mod oracle;
mod pages;
mod plan;
mod scheduler;
mod sim;
mod text;
mod tidy;
