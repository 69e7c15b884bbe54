//! One binary of integration tests; each module is a room of `src`.

mod artifact;
mod calibrate;
mod codec;
mod engine;
mod model;
mod ops;
mod pages;
mod plan;
mod scheduler;
mod sim;
