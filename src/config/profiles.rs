//! The cache profiles that every server has, and those an operator defines.

use serde::Deserialize;

use crate::config::ConfigError;
use crate::kv::layout::{BasisKind, Cskv, Init, Profile, Quantiser, Size, WINDOW_MOST};

/// The profile of requests that name none: exact, until an operator decides what compression may cost.
pub const DEFAULT_PROFILE: &str = "full";

/// A page: the window is drained in whole pages, so this keeps 64 to 127 exact positions (the paper's ablation
/// gains a point of accuracy from 32 to 64, and less beyond).
const WINDOW: u32 = 64;

/// Attention sinks (StreamingLLM): the first few positions have outlying keys that a shared basis does not hold.
const SINKS: u32 = 4;

/// `full`; `cskv-50`, `cskv-80`, `cskv-95`, by how much of the exact cache each saves; and `cskv-fast`. These are what they are without an
/// artifact: the same ranks in every layer, of bases that nothing was trained for; see [`BUDGETED`] for what a calibration makes of the names.
///
/// So bytes go to channels before they go to bits: of the paper's shares of the channels at 16 bits an untrained basis loses most. On the demo model,
/// with bases from 1,024 tokens of built-in text (KL from the exact cache past compressed, at the bytes of a position; the paper's shares in a joint basis
/// beside it): `cskv-50` 0.0030 at 1020 (0.0203 at 1280), `cskv-80` 0.0464 at 505 (0.5807 at 480), `cskv-95` 0.3304 at 140 (0.5981 at 150). Where most
/// channels of keys are kept they decode without being rebuilt; of the few of `cskv-95` only a joint basis holds enough.
pub fn builtin() -> Vec<Profile> {
    use BasisKind::{Frequency, Identity, Joint};
    use Quantiser::{Affine, Hadamard};
    let cskv = |name: &str, basis, (key_rank, key_bits, key_quantiser), (value_rank, value_bits)| {
        let size = Size::Shares { key_rank, value_rank, key_bits, value_bits };
        let even = Cskv::shares((1.0, 1.0), 4, (WINDOW, SINKS), basis);
        Profile { name: name.into(), cskv: Some(Cskv { size, key_quantiser, value_quantiser: Hadamard, ..even }) }
    };
    vec![
        Profile { name: "full".into(), cskv: None },
        cskv("cskv-50", Identity, (1.0, 8, Affine), (1.0, 4)),
        cskv("cskv-80", Frequency, (1.0, 4, Hadamard), (0.7, 3)),
        cskv("cskv-95", Joint, (0.26, 3, Hadamard), (0.26, 3)),
        cskv("cskv-fast", Frequency, (0.55, 4, Hadamard), (0.36, 2)),
    ]
}

/// A profile of `bytes` per token, where an exact cache takes `exact`: values rotated, and keys too up to an eighth of the exact bytes.
///
/// On the demo model rotated keys retrieve and diverge as those quantised per channel do at these sizes, and are met twice as fast; but
/// they have 4 bits at most, which with more bytes is too few.
pub fn budget(name: String, bytes: u32, exact: f64, basis: BasisKind) -> Profile {
    let even = Cskv::shares((1.0, 1.0), 4, (WINDOW, SINKS), basis);
    let key_quantiser = if 8.0 * f64::from(bytes) <= exact { Quantiser::Hadamard } else { Quantiser::Affine };
    Profile { name, cskv: Some(Cskv { size: Size::Budget(bytes), key_quantiser, value_quantiser: Quantiser::Hadamard, ..even }) }
}

/// The profiles of [`builtin`] as a calibration makes them of its model: names that hold, scales counted. What each may take of the
/// exact cache's bytes, and its basis: by frequency, which at these budgets retrieves on the demo model as a joint one does, and decodes
/// quicker than the exact cache where the joint one is many times slower.
pub const BUDGETED: [(&str, f64, BasisKind); 4] = [
    ("cskv-50", 0.5, BasisKind::Frequency),
    ("cskv-80", 0.2, BasisKind::Frequency),
    ("cskv-95", 0.05, BasisKind::Frequency),
    ("cskv-fast", 0.1, BasisKind::Frequency),
];

/// A profile as the config file spells it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileFile {
    key_rank: Option<f64>,
    value_rank: Option<f64>,
    bits: Option<u32>,
    key_bits: Option<u32>,
    value_bits: Option<u32>,
    budget: Option<u32>,
    quantiser: Option<String>,
    key_quantiser: Option<String>,
    value_quantiser: Option<String>,
    window: Option<u32>,
    sinks: Option<u32>,
    basis: Option<String>,
    init: Option<String>,
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
        let basis = match self.basis.as_deref().unwrap_or("joint") {
            "joint" => BasisKind::Joint,
            "frequency" => BasisKind::Frequency,
            "identity" => BasisKind::Identity,
            "dropped" => BasisKind::Dropped,
            other => match other.strip_prefix("grouped:").and_then(|n| n.parse().ok()) {
                Some(n) if n > 0 => BasisKind::Grouped(n),
                _ => {
                    return Err(bad(format!(
                        "basis is {other:?}; choose \"joint\", \"frequency\", \"identity\", \"dropped\", or \"grouped:N\" with N KV heads to a \
                         group"
                    )));
                }
            },
        };
        let quantiser = |own: &Option<String>| match own.as_deref().or(self.quantiser.as_deref()).unwrap_or("affine") {
            "affine" => Ok(Quantiser::Affine),
            "hadamard" => Ok(Quantiser::Hadamard),
            other => Err(bad(format!("a quantiser is {other:?}; choose \"affine\" or \"hadamard\""))),
        };
        let quantisers @ [key_quantiser, value_quantiser] = [quantiser(&self.key_quantiser)?, quantiser(&self.value_quantiser)?];
        let init = match self.init.as_deref() {
            None => None,
            Some("svd") => Some(Init::Svd),
            Some("asvd") => Some(Init::Asvd),
            Some("closed") => Some(Init::Closed),
            Some("weighted") => Some(Init::Weighted),
            Some(other) => return Err(bad(format!("init is {other:?}; choose \"svd\", \"asvd\", \"closed\" or \"weighted\""))),
        };
        if init.is_some() && !basis.is_computed() {
            return Err(bad("an init is of a basis that is computed; leave it out".into()));
        }
        let size = self.size(basis, quantisers).map_err(bad)?;
        let (window, sinks) = (self.window.unwrap_or(WINDOW), self.sinks.unwrap_or(SINKS));
        if window > WINDOW_MOST || sinks > 64 {
            return Err(bad(format!("window is {window} and sinks {sinks}; at most {WINDOW_MOST} and 64")));
        }
        Ok(Profile { name: name.into(), cskv: Some(Cskv { size, key_quantiser, value_quantiser, window, sinks, basis, init }) })
    }

    fn size(&self, basis: BasisKind, quantisers: [Quantiser; 2]) -> Result<Size, String> {
        let fixed = !basis.is_computed();
        let given = [("key_rank", self.key_rank.is_some()), ("value_rank", self.value_rank.is_some())];
        if let Some(budget) = self.budget {
            let bits = [("bits", self.bits), ("key_bits", self.key_bits), ("value_bits", self.value_bits)];
            let bits = bits.map(|(what, bits)| (what, bits.is_some()));
            if let Some((what, _)) = given.into_iter().chain(bits).find(|(_, given)| *given) {
                return Err(format!("a budget decides {what} by itself; leave one of both out"));
            }
            if fixed {
                return Err("a budget spreads a basis that is computed; choose \"joint\", \"grouped:N\" or \"frequency\"".into());
            }
            if budget == 0 {
                return Err("budget is 0; it is the bytes of a position over all layers".into());
            }
            return Ok(Size::Budget(budget));
        }
        if fixed && let Some((what, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(format!("{what} is a share of the channels, and this basis keeps all or none; leave it out"));
        }
        let share = |what: &str, share: Option<f64>| match share {
            _ if fixed => Ok(1.0),
            None => Err(format!("{what} is missing; it is a share of the channels, above 0 and up to 1")),
            Some(share) if share > 0.0 && share <= 1.0 => Ok(share),
            Some(share) => Err(format!("{what} is {share}; it is a share of the channels, above 0 and up to 1")),
        };
        let (key_rank, value_rank) = (share("key_rank", self.key_rank)?, share("value_rank", self.value_rank)?);
        let bits = |what: &str, own: Option<u32>, quantiser: Quantiser| match own.or(self.bits) {
            None if basis == BasisKind::Dropped => Ok(16),
            None => Err(format!("bits is missing, and {what} too; choose 16, 8, 4, 3 or 2")),
            Some(bits) if ![16, 8, 4, 3, 2].contains(&bits) => Err(format!("{what} is {bits}; choose 16, 8, 4, 3 or 2")),
            Some(bits @ (16 | 8)) if quantiser == Quantiser::Hadamard => {
                Err(format!("{what} is {bits}; the hadamard quantiser has 4, 3 or 2"))
            }
            Some(bits) => Ok(bits),
        };
        let name = |own: &'static str| if self.bits.is_some() { "bits" } else { own };
        let (key_bits, value_bits) =
            (bits(name("key_bits"), self.key_bits, quantisers[0])?, bits(name("value_bits"), self.value_bits, quantisers[1])?);
        if (key_bits == 16) != (value_bits == 16) {
            return Err(format!("key_bits is {key_bits} and value_bits {value_bits}; 16 goes for both or neither"));
        }
        Ok(Size::Shares { key_rank, value_rank, key_bits, value_bits })
    }
}
