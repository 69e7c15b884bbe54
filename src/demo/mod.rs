//! The demo model, compiled in: a small decoder trained to retrieve from long contexts. It is what a bare
//! `strait` serves, and what the tests run on.

use crate::model::checkpoint::{Checkpoint, CheckpointError};
use crate::text::{TextError, Tokenizer};

/// The name the demo model is served under.
pub const NAME: &str = "strait-demo";

pub const CONFIG: &str = include_str!("model/config.json");
pub const GENERATION_CONFIG: &str = include_str!("model/generation_config.json");
pub const TOKENIZER: &str = include_str!("model/tokenizer.json");
pub const TOKENIZER_CONFIG: &str = include_str!("model/tokenizer_config.json");

/// The weights in safetensors form, aligned to 64 bytes so that they are used in place.
pub const WEIGHTS: &[u8] = &ALIGNED.bytes;

#[repr(C, align(64))]
struct Aligned<T: ?Sized> {
    bytes: T,
}

static ALIGNED: &Aligned<[u8]> = &Aligned { bytes: *include_bytes!("model/model.safetensors") };

/// The demo model, checked like any other.
pub fn checkpoint() -> Result<Checkpoint, CheckpointError> {
    Checkpoint::from_bytes(CONFIG, Some(GENERATION_CONFIG), WEIGHTS)
}

/// Its tokenizer and chat template.
pub fn tokenizer() -> Result<Tokenizer, TextError> {
    Tokenizer::from_json(TOKENIZER, Some(TOKENIZER_CONFIG), None, usize::MAX)
}

/// The compression artifact of the built-in cache profiles. `strait compress --tokens 32768 --out
/// src/demo/model/compression.safetensors` makes it again.
pub const ARTIFACT: &[u8] = include_bytes!("model/compression.safetensors");
