//! The cache profiles that every server has, and those an operator defines.

use serde::Deserialize;

use crate::config::ConfigError;
use crate::kv::layout::{BasisKind, Cskv, Profile};

/// The profile of requests that name none: exact, until an operator decides what compression may cost.
pub const DEFAULT_PROFILE: &str = "full";

/// A page: the window is drained in whole pages, so this keeps 64 to 127 exact positions (the paper's ablation
/// gains a point of accuracy from 32 to 64, and less beyond).
const WINDOW: u32 = 64;

/// Attention sinks (StreamingLLM): the first few positions have outlying keys that a shared basis does not hold.
const SINKS: u32 = 4;

/// `full`; `cskv-50`, `cskv-80`, `cskv-95`, by how much of the exact cache each saves, nominally; and `cskv-fast`, which decodes
/// without rebuilding keys, for which it takes more of their channels.
pub fn builtin() -> Vec<Profile> {
    let cskv = |name: &str, (key_rank, value_rank), bits, basis| Profile {
        name: name.into(),
        cskv: Some(Cskv { key_rank, value_rank, bits, window: WINDOW, sinks: SINKS, basis }),
    };
    vec![
        Profile { name: "full".into(), cskv: None },
        cskv("cskv-50", (0.5, 0.5), 16, BasisKind::Joint),
        cskv("cskv-80", (0.2, 0.2), 16, BasisKind::Joint),
        cskv("cskv-95", (0.2, 0.2), 4, BasisKind::Joint),
        cskv("cskv-fast", (0.5, 0.35), 4, BasisKind::Frequency),
    ]
}

/// A profile as the config file spells it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileFile {
    key_rank: f64,
    value_rank: f64,
    bits: u32,
    window: Option<u32>,
    sinks: Option<u32>,
    basis: Option<String>,
}

impl ProfileFile {
    /// Checks every number.
    ///
    /// # Errors
    /// [`ConfigError::BadProfile`] with the first fault.
    pub fn resolve(&self, name: &str) -> Result<Profile, ConfigError> {
        let bad = |fault: String| ConfigError::BadProfile { name: name.to_owned(), fault };
        let valid = !name.is_empty() && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !valid {
            return Err(bad("a name is 1 to 64 letters, digits, '-', '_' or '.'".into()));
        }
        for (key, share) in [("key_rank", self.key_rank), ("value_rank", self.value_rank)] {
            if !(share > 0.0 && share <= 1.0) {
                return Err(bad(format!("{key} is {share}; it is a share of the channels, above 0 and up to 1")));
            }
        }
        if ![16, 8, 4, 3, 2].contains(&self.bits) {
            return Err(bad(format!("bits is {}; choose 16, 8, 4, 3 or 2", self.bits)));
        }
        let (window, sinks) = (self.window.unwrap_or(WINDOW), self.sinks.unwrap_or(SINKS));
        if window > 65536 || sinks > 64 {
            return Err(bad(format!("window is {window} and sinks {sinks}; at most 65536 and 64")));
        }
        let basis = match self.basis.as_deref().unwrap_or("joint") {
            "joint" => BasisKind::Joint,
            "frequency" => BasisKind::Frequency,
            other => match other.strip_prefix("grouped:").and_then(|n| n.parse().ok()) {
                Some(n) if n > 0 => BasisKind::Grouped(n),
                _ => {
                    return Err(bad(format!(
                        "basis is {other:?}; choose \"joint\", \"frequency\" or \"grouped:N\" with N KV heads to a group"
                    )));
                }
            },
        };
        let cskv = Cskv { key_rank: self.key_rank, value_rank: self.value_rank, bits: self.bits, window, sinks, basis };
        Ok(Profile { name: name.into(), cskv: Some(cskv) })
    }
}
