//! The decoder and where it comes from: `checkpoint` opens a folder, `weights` types its tensors, `config` holds its
//! facts, `delta` is what an adapter changes of them, `decoder` runs them on the host (rows under adapters through `adapted`), `cuda`
//! on a device; `draw` is what is asked of its logits, `choices` has a device answer.

pub mod adapted;
pub mod checkpoint;
pub mod choices;
pub mod config;
pub mod config_json;
pub mod cuda;
pub mod decoder;
pub mod delta;
pub mod draw;
pub mod generation;
pub mod header;
pub mod json;
mod rope;
pub mod weights;
