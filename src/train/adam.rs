//! AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019) on a few tensors whose moments are the caller's
//! to keep, a clip of the gradient's norm, and the course of the learning rate. The weight decay is that of the paper's training:
//! none, as shrinking a map shrinks what it gives back; so no term of it stands here.

use candle_core::{Result, Tensor};

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;
/// Norm over all tensors together that a gradient is cut to, as in the paper's training.
const CLIP: f64 = 1.0;
/// Of the steps, how many go by before the full rate.
const WARM_UP: f64 = 0.05;
/// Of the full rate, what is left at the end.
const LEAST: f64 = 0.01;

/// What is optimised, and the running means of its gradients and of their squares, one of each per tensor.
#[derive(Clone)]
pub(super) struct Adam {
    pub(super) params: Vec<Tensor>,
    pub(super) first: Vec<Tensor>,
    pub(super) second: Vec<Tensor>,
}

impl Adam {
    /// Moments of zero.
    pub(super) fn new(params: Vec<Tensor>) -> Result<Self> {
        let zeros = || params.iter().map(Tensor::zeros_like).collect::<Result<Vec<_>>>();
        Ok(Adam { first: zeros()?, second: zeros()?, params })
    }

    /// One update at the learning rate `rate`; `t` counts updates from 0. Gives the gradient's norm before it was cut; where that is
    /// not finite, nothing is updated.
    pub(super) fn step(&mut self, gradients: &[Tensor], t: u64, rate: f64) -> Result<f64> {
        let mut squares = 0.0;
        for g in gradients {
            squares += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        let cut = (CLIP / norm).min(1.0);
        let t = t as f64 + 1.0;
        // The means begin at zero: corrected as if they had always been.
        let (early_first, early_second) = (1.0 - BETAS.0.powf(t), 1.0 - BETAS.1.powf(t));
        for (i, g) in gradients.iter().enumerate() {
            let g = (g * cut)?;
            self.first[i] = ((&self.first[i] * BETAS.0)? + (&g * (1.0 - BETAS.0))?)?;
            self.second[i] = ((&self.second[i] * BETAS.1)? + (g.sqr()? * (1.0 - BETAS.1))?)?;
            let deviation = ((&self.second[i] / early_second)?.sqrt()? + EPSILON)?;
            let step = ((&self.first[i] * (rate / early_first))? / deviation)?;
            self.params[i] = (&self.params[i] - step)?;
        }
        Ok(norm)
    }
}

/// The rate of step `t` of `steps`: up linearly over the first twentieth, then down a half cosine to a hundredth of `peak`.
pub fn learning_rate(peak: f64, t: u64, steps: u64) -> f64 {
    let warm = (steps as f64 * WARM_UP).ceil().max(1.0);
    let t = t as f64;
    if t < warm {
        return peak * (t + 1.0) / warm;
    }
    let gone = (t - warm) / (steps as f64 - warm).max(1.0);
    peak * (LEAST + (1.0 - LEAST) * 0.5 * (1.0 + (std::f64::consts::PI * gone).cos()))
}
