//! Linear layers and norms of a batch whose rows wear adapters: the model's own for all rows at once, then what each adapter makes
//! of its rows. A batch without adapters costs nothing here.

use std::ops::Range;

use crate::ids::AdapterGeneration;
use crate::model::delta::{Delta, Norm, Site, SiteDelta};
use crate::model::weights::Weight;
use crate::ops::{Linear, Ops, Update};

/// The adapters a pass may name, with what they change.
pub type Adapters<'p> = [(AdapterGeneration, &'p Delta)];

/// Which linear layer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Layer(usize, Site),
    Head,
}

/// Which norm.
#[derive(Clone, Copy, Debug)]
pub(super) enum NormPlace {
    Layer(usize, Norm),
    Final,
}

impl Place {
    fn of(self, delta: &Delta) -> Option<&SiteDelta> {
        match self {
            Place::Layer(layer, site) => delta.site(layer, site),
            Place::Head => delta.head.as_ref(),
        }
    }
}

impl NormPlace {
    fn of(self, delta: &Delta) -> Option<&[f32]> {
        match self {
            NormPlace::Layer(layer, norm) => delta.layer_norm(layer, norm),
            NormPlace::Final => delta.norm.as_deref(),
        }
    }
}

/// Rows of a batch that wear one adapter.
pub(super) struct Worn<'p> {
    delta: &'p Delta,
    rows: Range<usize>,
}

/// The adapter of a row; `None` for the model alone.
///
/// # Panics
/// When `adapters` lacks it: whoever makes a pass brings the adapters of its rows.
pub(super) fn adapter<'p>(adapters: &Adapters<'p>, generation: AdapterGeneration) -> Option<&'p Delta> {
    (generation != AdapterGeneration::default()).then(|| {
        let found = adapters.iter().find(|(known, _)| *known == generation);
        found.expect("a pass brings the adapters of its rows").1
    })
}

/// Who wears what, in a batch of parts of so many rows each. Neighbours that wear the same become one.
pub(super) fn worn<'p>(adapters: &Adapters<'p>, parts: impl Iterator<Item = (AdapterGeneration, usize)>) -> Vec<Worn<'p>> {
    let mut out: Vec<Worn<'p>> = Vec::new();
    let (mut first, mut last) = (0, AdapterGeneration::default());
    for (generation, n) in parts {
        if let Some(delta) = adapter(adapters, generation) {
            match out.last_mut() {
                Some(worn) if last == generation && worn.rows.end == first => worn.rows.end += n,
                _ => out.push(Worn { delta, rows: first..first + n }),
            }
        }
        (first, last) = (first + n, generation);
    }
    out
}

/// `Ops::linear` under adapters: `jobs[i]` is the layer at `places[i]`.
pub(super) fn linear(ops: &dyn Ops, (x, rows): (&[f32], usize), jobs: &mut [Linear<'_>], places: &[Place], worn: &[Worn<'_>]) {
    if worn.is_empty() {
        return ops.linear(x, rows, jobs);
    }
    // Gains and replaced weights act on the layer's own output. Where that is added onto the residual stream, what was there
    // before is kept.
    let mut kept = Vec::new();
    for (job, place) in jobs.iter().zip(places) {
        for Worn { delta, rows } in worn {
            if place.of(delta).is_some_and(|site| site.gain.is_some() || site.replace.is_some()) {
                kept.push(if job.accumulate { job.y[span(rows, job.w.out_features)].to_vec() } else { Vec::new() });
            }
        }
    }
    ops.linear(x, rows, jobs);
    let mut kept = kept.into_iter();
    for (job, place) in jobs.iter_mut().zip(places) {
        let (inputs, width) = (job.inputs(), job.w.out_features);
        for Worn { delta, rows } in worn {
            let Some(site) = place.of(delta) else { continue };
            let y = &mut job.y[span(rows, width)];
            let mut bias = job.bias;
            let mut before = None;
            if site.gain.is_some() || site.replace.is_some() {
                before = kept.next().filter(|_| job.accumulate);
            }
            if let Some(own) = &site.replace {
                if let Some(before) = &before {
                    y.copy_from_slice(before);
                }
                bias = own.bias.as_deref();
                let inner = own.inner.as_ref().map(Weight::matrix);
                let own = Linear { w: own.weight.matrix(), inner, bias, accumulate: job.accumulate, y: &mut *y };
                ops.linear(&x[span(rows, inputs)], rows.len(), &mut [own]);
            }
            if let Some(gain) = &site.gain {
                for (row, y) in y.chunks_exact_mut(width).enumerate() {
                    let before = before.as_ref().map(|b| &b[row * width..][..width]);
                    for o in 0..width {
                        let base = before.map_or(0.0, |b| b[o]) + bias.map_or(0.0, |b| b[o]);
                        y[o] += (gain[o] - 1.0) * (y[o] - base);
                    }
                }
            }
            if let Some(bias) = &site.bias {
                y.chunks_exact_mut(width).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
            }
        }
    }
    let mut updates = Vec::new();
    for (target, place) in places.iter().enumerate() {
        for Worn { delta, rows } in worn {
            if let Some(factors) = place.of(delta).and_then(|site| site.factors.as_ref()) {
                updates.push(Update { factors: factors.low_rank(), rows: rows.clone(), target });
            }
        }
    }
    if !updates.is_empty() {
        let mut targets: Vec<&mut [f32]> = jobs.iter_mut().map(|job| &mut *job.y).collect();
        ops.low_rank(x, &updates, &mut targets);
    }
}

/// What a norm is of.
pub(super) struct Normed<'x> {
    pub(super) x: &'x [f32],
    pub(super) weight: &'x [f32],
    pub(super) eps: f32,
    /// Elements of a row of the batch: a multiple of the weights', where several are normed apart.
    pub(super) stride: usize,
}

/// `Ops::rms_norm` under adapters.
pub(super) fn rms_norm(ops: &dyn Ops, of: &Normed<'_>, place: NormPlace, worn: &[Worn<'_>], out: &mut [f32]) {
    ops.rms_norm(of.x, of.weight, of.eps, out);
    for Worn { delta, rows } in worn {
        if let Some(own) = place.of(delta) {
            let at = span(rows, of.stride);
            ops.rms_norm(&of.x[at.clone()], own, of.eps, &mut out[at]);
        }
    }
}

/// Elements of rows of `width`.
fn span(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
