//! Rotary frequencies and the table of cosines and sines.

use std::f64::consts::PI;

use crate::model::config::{ModelConfig, Rope, RopeScaling};
use crate::ops::RopeTable;

impl RopeTable {
    /// The table for positions `0..positions`: `8 * head_dim / 2 * positions` bytes.
    ///
    /// Frequencies are rounded to f32 and multiplied by the position in f32, as Hugging Face's modules do, so
    /// that long positions turn by the same angles the model was trained with.
    pub fn new(model: &ModelConfig, positions: usize) -> Self {
        let (frequencies, factor) = frequencies(&model.rope, model.head_dim);
        let angle = |position: usize, f: f32| f64::from(position as f32 * f);
        let table = |of: fn(f64) -> f64| {
            (0..positions).flat_map(|p| frequencies.iter().map(move |&f| (of(angle(p, f)) * factor) as f32)).collect::<Vec<f32>>()
        };
        RopeTable { half: model.head_dim / 2, cos: table(f64::cos), sin: table(f64::sin) }
    }
}

/// `head_dim / 2` angular frequencies, and the factor on cosine and sine (YaRN's attention factor, else 1).
/// Formulas: Hugging Face `modeling_rope_utils`.
fn frequencies(rope: &Rope, head_dim: usize) -> (Vec<f32>, f64) {
    let plain = (0..head_dim / 2).map(|i| rope.theta.powf(-(2.0 * i as f64) / head_dim as f64));
    match &rope.scaling {
        RopeScaling::None => (plain.map(|f| f as f32).collect(), 1.0),
        RopeScaling::Linear { factor } => (plain.map(|f| (f / factor) as f32).collect(), 1.0),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let scale = |f: f64| {
                let wavelength = 2.0 * PI / f;
                if wavelength < original_max_positions / high_freq_factor {
                    f
                } else if wavelength > original_max_positions / low_freq_factor {
                    f / factor
                } else {
                    let smooth = (original_max_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            };
            (plain.map(|f| scale(f) as f32).collect(), 1.0)
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, attention_factor, truncate } => {
            let dim = head_dim as f64;
            // The dimension whose wavelength fits `rotations` times into the original context.
            let dimension = |rotations: f64| dim * (original_max_positions / (rotations * 2.0 * PI)).ln() / (2.0 * rope.theta.ln());
            let (low, high) = (dimension(*beta_fast), dimension(*beta_slow));
            let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let scale = |(i, f): (usize, f64)| {
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * ramp + f * (1.0 - ramp)
            };
            (plain.enumerate().map(|x| scale(x) as f32).collect(), *attention_factor)
        }
    }
}
