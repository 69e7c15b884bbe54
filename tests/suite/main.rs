//! One binary of integration tests; each module is a room of `src`.

mod artifact;
mod calibrate;
mod model;
mod plan;
mod sim;
