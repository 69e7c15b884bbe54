//! What an answer is worth, and how sure a mean is. Pure.

use std::fmt;

/// When an answer is right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// LongEval: the last run of digits is the reference, as a number.
    LastNumber,
    /// The last word (letters, digits and hyphens) is the reference.
    LastWord,
    /// RULER: the share of the references that occur in the answer, whatever their case.
    Found,
}

impl Rule {
    /// From 0 to 1. Without references nothing is right.
    pub fn score(self, answer: &str, references: &[String]) -> f64 {
        let whole = |right: bool| f64::from(u8::from(right));
        match self {
            Rule::LastNumber => {
                let last = answer.split(|c: char| !c.is_ascii_digit()).rfind(|run| !run.is_empty());
                let plain = |n: &str| n.trim_start_matches('0').to_owned();
                whole(last.zip(references.first()).is_some_and(|(a, b)| plain(a) == plain(b)))
            }
            Rule::LastWord => {
                let last = answer.split(|c: char| !c.is_alphanumeric() && c != '-').rfind(|word| !word.is_empty());
                whole(last.zip(references.first()).is_some_and(|(a, b)| a == b))
            }
            Rule::Found => {
                let answer = answer.to_lowercase();
                let found = references.iter().filter(|r| answer.contains(&r.to_lowercase())).count();
                if references.is_empty() { 0.0 } else { found as f64 / references.len() as f64 }
            }
        }
    }
}

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Estimate {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

impl Estimate {
    /// The same through a rising function.
    #[must_use]
    pub fn map(self, f: impl Fn(f64) -> f64) -> Estimate {
        Estimate { mean: f(self.mean), low: f(self.low), high: f(self.high) }
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.4} ({:.4} .. {:.4})", self.mean, self.low, self.high)
    }
}

/// The 97.5 % point of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's interval of a mean of `n` scores between 0 and 1. For scores that are 0 or 1 it is the usual one; for
/// fractions it is wider than need be, as none of the same mean vary more than zeros and ones do.
/// `None` for no scores.
pub fn wilson(scores: &[f64]) -> Option<Estimate> {
    if scores.is_empty() {
        return None;
    }
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let scale = 1.0 + Z * Z / n;
    let centre = (mean + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (mean * (1.0 - mean) / n + Z * Z / (4.0 * n * n)).sqrt();
    // Rounding must not leave the mean outside of its interval.
    Some(Estimate { mean, low: (centre - half).clamp(0.0, mean), high: (centre + half).clamp(mean, 1.0) })
}

/// A block of neighbouring tokens: how many, and the sum of what was measured on them.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Block {
    pub n: u32,
    pub sum: f64,
}

/// The mean per token over blocks of possibly different sizes, with Student's interval over the blocks: tokens of a text
/// depend on their neighbours, blocks hardly. `None` for fewer than two blocks.
pub fn student(blocks: &[Block]) -> Option<Estimate> {
    let count = blocks.len();
    let n: f64 = blocks.iter().map(|b| f64::from(b.n)).sum();
    if count < 2 || n == 0.0 {
        return None;
    }
    let mean = blocks.iter().map(|b| b.sum).sum::<f64>() / n;
    let spread: f64 = blocks.iter().map(|b| (b.sum - mean * f64::from(b.n)).powi(2)).sum();
    let error = (spread * count as f64 / (count as f64 - 1.0)).sqrt() / n;
    let half = t_point(count - 1) * error;
    Some(Estimate { mean, low: mean - half, high: mean + half })
}

/// The 97.5 % point of Student's distribution with so many degrees of freedom.
pub fn t_point(freedom: usize) -> f64 {
    const SMALL: [f64; 10] = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281];
    match freedom {
        0 => f64::INFINITY,
        1..=10 => SMALL[freedom - 1],
        // The beginning of the expansion in 1/v about the normal point; off by less than 2e-4 from here on.
        _ => {
            let v = freedom as f64;
            let (z3, z5, z7) = (Z.powi(3), Z.powi(5), Z.powi(7));
            Z + (z3 + Z) / (4.0 * v)
                + (5.0 * z5 + 16.0 * z3 + 3.0 * Z) / (96.0 * v * v)
                + (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * Z) / (384.0 * v * v * v)
        }
    }
}

/// How many scores fell, and how many rose, against those of the same prompts under `base`.
pub fn changed(base: &[f64], scores: &[f64]) -> (usize, usize) {
    let pairs = || base.iter().zip(scores);
    (pairs().filter(|(b, s)| s < b).count(), pairs().filter(|(b, s)| s > b).count())
}
