//! The parts of an adapter as a [`Delta`] of the model: scales and gains folded in, factors laid out for the kernels, tensors that
//! equal the model's own left out.

use crate::adapters::{AdapterError, Module, NormPlace, Parsed, Place};
use crate::model::checkpoint::Checkpoint;
use crate::model::delta::{Delta, EmbedDelta, EmbedFactors, Factors, HeldAs, SiteDelta};
use crate::model::weights::{Projection, floats};

/// The base's weights at a place, row-major as stored: `[out][in]`, an embedding `[vocab][hidden]`.
pub fn base_weight(base: &Checkpoint, place: Place) -> Vec<f32> {
    const THERE: &str = "an opened checkpoint has every tensor its configuration asks for";
    match place {
        Place::Layer(..) => base.linear(&place.path()).expect(THERE).0,
        Place::Embed | Place::Head => floats(base.tensor(&place.tensor(&base.config)).expect(THERE)).collect(),
    }
}

/// The base's bias at a place; zeros where it has none.
fn base_bias(base: &Checkpoint, place: Place) -> Vec<f32> {
    let (out, _) = place.shape(&base.config);
    let own = if matches!(place, Place::Layer(..)) { base.linear(&place.path()).and_then(|(_, bias)| bias) } else { None };
    own.unwrap_or_else(|| vec![0.0; out])
}

/// What `parsed`, whose factors belong on `base`, changes of it. Gains cost `rank * in * out` multiplications per module.
///
/// # Errors
/// Where the numbers do not come out finite, or the adapter carries other weights of the base than it has.
pub fn pack(parsed: &Parsed, base: &Checkpoint, held: HeldAs) -> Result<Delta, AdapterError> {
    let c = &base.config;
    let mut delta = Delta::new(c.layers);
    for (&place, module) in &parsed.modules {
        match place {
            Place::Embed => delta.embed = embed(module, base, held)?,
            Place::Head => delta.head = site(place, module, base, held)?,
            Place::Layer(layer, at) => delta.layers[layer].sites[at as usize] = site(place, module, base, held)?.map(Box::new),
        }
    }
    for (&place, weights) in &parsed.norms {
        match place {
            NormPlace::Final => delta.norm = Some(weights.clone()),
            NormPlace::Layer(layer, norm) => delta.layers[layer].norms[norm as usize] = Some(weights.clone()),
        }
    }
    Ok(delta)
}

fn site(place: Place, module: &Module, base: &Checkpoint, held: HeldAs) -> Result<Option<SiteDelta>, AdapterError> {
    let (out, inputs) = place.shape(&base.config);
    let own_bias = module.base_bias.as_ref().map(|new| (new, base_bias(base, place)));
    // What PEFT carries along of the base is left out where it is the base's.
    let replaced = module.weight.as_ref().filter(|w| w[..] != base_weight(base, place)[..]);
    let mut site = SiteDelta::default();
    if let Some(weight) = replaced {
        let has_bias = place.has_bias(&base.config);
        let bias = has_bias.then(|| module.base_bias.clone().unwrap_or_else(|| base_bias(base, place)));
        check(place, "weights", held, weight)?;
        site.replace = Some(Projection { weight: held.matrix((out, inputs), weight), inner: None, bias });
    }
    let mut bias = module.bias.clone();
    if let (Some((new, old)), None) = (&own_bias, replaced) {
        let bias = bias.get_or_insert_with(|| vec![0.0; out]);
        bias.iter_mut().zip(new.iter().zip(old)).for_each(|(b, (new, old))| *b += new - old);
    }
    check(place, "bias", HeldAs::F32, bias.as_deref().unwrap_or_default())?;
    site.bias = bias.filter(|b| b.iter().any(|v| *v != 0.0));
    if module.rank > 0 {
        let mut up = module.up.clone();
        if let Some(gain) = gains(place, module, base)? {
            up.chunks_exact_mut(module.rank).zip(&gain).for_each(|(row, g)| row.iter_mut().for_each(|v| *v *= g));
            site.gain = Some(gain);
        }
        check(place, "factors", held, &module.down)?;
        check(place, "scaled factors", held, &up)?;
        site.factors = Some(Factors::new((&module.down, &up), module.rank, held));
    }
    Ok((site != SiteDelta::default()).then_some(site))
}

/// What the magnitude of a linear module multiplies the rows of its tuned weights by; `None` where it has none.
///
/// # Errors
/// Where a row is zero.
pub fn gains(place: Place, module: &Module, base: &Checkpoint) -> Result<Option<Vec<f32>>, AdapterError> {
    let Some(magnitude) = &module.magnitude else { return Ok(None) };
    let weight = module.weight.clone().unwrap_or_else(|| base_weight(base, place));
    gain(place, magnitude, &row_norms(&weight, module, place.shape(&base.config))).map(Some)
}

fn embed(module: &Module, base: &Checkpoint, held: HeldAs) -> Result<Option<EmbedDelta>, AdapterError> {
    let c = &base.config;
    let replaced = module.weight.as_ref().filter(|w| w[..] != base_weight(base, Place::Embed)[..]);
    if replaced.is_some() && module.rank > 0 && c.tied {
        return Err(AdapterError::NotServed {
            what: "it carries an embedding that differs from the base's, which is also the output head".into(),
            mend: "serve the base it was trained on".into(),
        });
    }
    check(Place::Embed, "weights", held, replaced.map_or(&[], |w| w))?;
    let mut embed = EmbedDelta { replace: replaced.map(|w| held.matrix((c.vocab, c.hidden), w)), ..EmbedDelta::default() };
    if module.rank > 0 {
        let mut up = module.up.clone();
        if let Some(magnitude) = &module.magnitude {
            // PEFT takes the norm of each channel over the whole vocabulary.
            let weight = module.weight.clone().unwrap_or_else(|| base_weight(base, Place::Embed));
            let mut norms = vec![0.0f64; c.hidden];
            let mut row = vec![0.0f64; c.hidden];
            for (token, weight) in weight.chunks_exact(c.hidden).enumerate() {
                row.iter_mut().zip(weight).for_each(|(r, w)| *r = f64::from(*w));
                for j in 0..module.rank {
                    let t = f64::from(module.down[j * c.vocab + token]);
                    (0..c.hidden).for_each(|h| row[h] += t * f64::from(module.up[h * module.rank + j]));
                }
                norms.iter_mut().zip(&row).for_each(|(n, r)| *n += r * r);
            }
            let gain = gain(Place::Embed, magnitude, &norms.iter().map(|n| n.sqrt()).collect::<Vec<_>>())?;
            up.chunks_exact_mut(module.rank).zip(&gain).for_each(|(row, g)| row.iter_mut().for_each(|v| *v *= g));
            embed.gain = Some(gain);
        }
        check(Place::Embed, "factors", held, &module.down)?;
        check(Place::Embed, "scaled factors", HeldAs::F32, &up)?;
        embed.factors = Some(EmbedFactors::new((&module.down, &up), module.rank, held));
    }
    Ok((embed != EmbedDelta::default()).then_some(embed))
}

/// `|W + up down|` of every row of `weight: [out][in]`.
pub fn row_norms(weight: &[f32], module: &Module, (out, inputs): (usize, usize)) -> Vec<f64> {
    let mut row = vec![0.0f32; inputs];
    let norm = |o: usize| {
        row.copy_from_slice(&weight[o * inputs..][..inputs]);
        for (j, down) in module.down.chunks_exact(inputs).enumerate() {
            let up = module.up[o * module.rank + j];
            row.iter_mut().zip(down).for_each(|(r, d)| *r += up * d);
        }
        row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
    };
    (0..out).map(norm).collect()
}

fn gain(place: Place, magnitude: &[f32], norms: &[f64]) -> Result<Vec<f32>, AdapterError> {
    // Of an infinite norm the gain would be zero, and the rows gone.
    if let Some(row) = norms.iter().position(|n| !n.is_finite()) {
        let reason = format!("row {row} of {} overflows with the factors added; their training diverged", place.path());
        return Err(AdapterError::Refused { reason });
    }
    let gain: Vec<f32> = magnitude.iter().zip(norms).map(|(m, n)| (f64::from(*m) / n) as f32).collect();
    match gain.iter().position(|g| !g.is_finite()) {
        None => Ok(gain),
        Some(row) => Err(AdapterError::Refused {
            reason: format!(
                "row {row} of {} has norm {} and cannot be given DoRA's magnitude; the adapter is for another base",
                place.path(),
                norms[row]
            ),
        }),
    }
}

/// Whether `values` are finite as they are held: those of the file are, and what is made of them may not be.
fn check(place: Place, what: &str, held: HeldAs, values: &[f32]) -> Result<(), AdapterError> {
    let Some(value) = held.overflow(values) else { return Ok(()) };
    let mend =
        if what.starts_with("scaled") { "its alpha is not to be believed, or its training diverged" } else { "its training diverged" };
    let held = match held {
        HeldAs::F32 => "F32",
        HeldAs::Bf16 => "BF16",
    };
    Err(AdapterError::Refused { reason: format!("the {what} of {} have {value:e}, which overflows {held}; {mend}", place.path()) })
}
