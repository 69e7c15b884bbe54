//! Nodes of candle's tape whose value is known and whose gradient we can say.
//!
//! Candle would also differentiate by everything that is constant here (activations, and there is nothing but those that is large),
//! and it runs elementwise operations on more than 65,536 numbers on one pool for the whole process, where layers that are trained
//! side by side would wait for each other.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

struct Known<F> {
    value: Vec<f32>,
    shape: Shape,
    back: F,
}

impl<F> Known<F> {
    fn forward(&self) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.value.clone()), self.shape.clone()))
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> CustomOp1 for Known<F> {
    fn name(&self) -> &'static str {
        "known"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, of_value: &Tensor) -> Result<Option<Tensor>> {
        (self.back)(of_value).map(Some)
    }
}

impl<F: Fn(&Tensor) -> Result<[Tensor; 2]>> CustomOp2 for Known<F> {
    fn name(&self) -> &'static str {
        "known"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, of_value: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = (self.back)(of_value)?;
        Ok((Some(a), Some(b)))
    }
}

/// `value` as a function of `argument`, whose gradient is `back` of the value's.
pub(super) fn known<F>(argument: &Tensor, value: &Tensor, back: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    argument.apply_op1(Known { value: value.flatten_all()?.to_vec1()?, shape: value.shape().clone(), back })
}

/// A number as a function of two arguments whose gradients it has are `back`, both, for a gradient of 1.
pub(super) fn known_number<F>(arguments: [&Tensor; 2], value: f64, back: F) -> Result<Tensor>
where
    F: Fn() -> Result<[Tensor; 2]> + Send + Sync + 'static,
{
    let scaled = move |of_value: &Tensor| {
        let by = f64::from(of_value.to_scalar::<f32>()?);
        let [a, b] = back()?;
        Ok([(a * by)?, (b * by)?])
    };
    arguments[0].apply_op2(arguments[1], Known { value: vec![value as f32], shape: ().into(), back: scaled })
}
