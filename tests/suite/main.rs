//! Integration tests, one module per room.

mod checkpoint;
mod text;
