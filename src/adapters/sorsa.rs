//! SORSA checkpoints (`Gunale0926/SORSA`; Cao 2024): `y = W_r x + scale * B diag(S) A x`, where `W_r` is the base less `scale` times
//! its leading singular triplets. A full one carries `W_r` and the rest of the model, a compact one the triples alone.
//!
//! Either becomes a difference on the served base, so many of them share it. What rounding a full one's `W_r` went through is
//! not part of that: it is noise of the size of half a unit in its last place, which training neither made nor used.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::adapters::folder::Files;
use crate::adapters::pack::base_weight;
use crate::adapters::{AdapterError, Format, Module, NormPlace, Parsed, Place, TrainedOn, Triple};
use crate::model::checkpoint::Checkpoint;
use crate::model::json::{self, shown};
use crate::model::weights::floats;

const FILE: &str = "config.json";

/// The adapter in `files`, for this base.
///
/// # Errors
/// Where it is no SORSA checkpoint of such a model, is damaged, or changed more than its triples.
pub fn parse(files: &Files, base: &Checkpoint) -> Result<Parsed, AdapterError> {
    let c = &base.config;
    let fail = |reason: String| AdapterError::Config { file: FILE, reason };
    let config = json::parse(&files.config).map_err(|e| fail(format!("is not valid JSON ({e})")))?;
    let alpha = match config.get("alpha") {
        None | Some(Value::Null) => None,
        Some(v) => Some(v.as_f64().filter(|a| a.is_finite()).ok_or_else(|| fail("has an alpha that is no number".into()))?),
    };
    let mut modules = BTreeMap::new();
    let mut places = BTreeSet::new();
    let mut rest = Vec::new();
    for tensor in files.tensors.names() {
        let bad = |reason: String| AdapterError::Tensor { tensor: tensor.to_owned(), reason };
        let Some(name) = tensor.strip_prefix("model.") else {
            return Err(bad("does not begin with `model.`, as all of SORSA's do".into()));
        };
        match name.rsplit_once('.') {
            Some((path, "sorsa_A" | "sorsa_S" | "sorsa_B")) => {
                let place = Place::of(path, c).filter(|p| *p != Place::Embed);
                let absent = || bad(format!("is of the module {}, which the served model does not have", shown(path, 120)));
                places.insert(place.ok_or_else(absent)?);
            }
            _ => rest.push((tensor, name)),
        }
    }
    if places.is_empty() {
        return Err(fail("says model_type sorsa, and no sorsa_A, sorsa_S or sorsa_B is there: it was merged; serve it as a model".into()));
    }
    for place in places {
        let (out, inputs) = place.shape(c);
        let name = |part: &str| format!("model.{}.{part}", place.path());
        let rank = match files.tensors.shape(&name("sorsa_S")) {
            Some(&[rank]) if rank > 0 => rank,
            _ => return Err(AdapterError::Tensor { tensor: name("sorsa_S"), reason: "is missing or no vector".into() }),
        };
        let a = files.tensors.floats(&name("sorsa_A"), &[rank, inputs])?;
        let s = files.tensors.floats(&name("sorsa_S"), &[rank])?;
        let b = files.tensors.floats(&name("sorsa_B"), &[out, rank])?;
        let scale = alpha.map_or(1.0, |alpha| alpha / rank as f64);
        let up = b.chunks_exact(rank).flat_map(|row| row.iter().zip(&s).map(|(b, s)| (f64::from(*b) * f64::from(*s) * scale) as f32));
        let module = Module { rank, down: a.clone(), up: up.collect(), scale, triple: Some(Triple { a, s, b }), ..Module::default() };
        modules.insert(place, module);
    }
    // Of a full one, everything else must be the base's, or close to it where a triple was taken out.
    let mut residual = BTreeMap::new();
    for (tensor, name) in rest {
        let bad = |reason: &str| AdapterError::Tensor { tensor: tensor.to_owned(), reason: reason.into() };
        let path = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")).unwrap_or(name);
        if name.ends_with(".weight")
            && let Some(place) = Place::of(path, c).filter(|p| modules.contains_key(p))
        {
            residual.insert(place, tensor);
            continue;
        }
        let own = if name == "lm_head.weight" { Place::Head.tensor(c) } else { name.to_owned() };
        let Some(view) = base.tensor(&own) else {
            if NormPlace::of(path, c).is_none() && name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            return Err(bad("is in no model such as the served one"));
        };
        let shape = view.shape.to_vec();
        let stored = files.tensors.floats(tensor, &shape)?;
        // A checkpoint in another type than the base's rounds what it carries.
        let close = |(a, b): (f32, f32)| (a - b).abs() <= b.abs() / 128.0;
        if !stored.into_iter().zip(floats(view)).all(close) {
            return Err(bad("differs from the served base's, and SORSA trains nothing but its triples; was it trained on another base?"));
        }
    }
    for (place, tensor) in residual {
        let (out, inputs) = place.shape(c);
        let stored = files.tensors.floats(tensor, &[out, inputs])?;
        modules.get_mut(&place).expect("only places of triples").weight = Some(stored);
    }
    let base_name = config.get("base_model_name_or_path").and_then(Value::as_str).filter(|s| !s.is_empty()).map(|s| shown(s, 200));
    Ok(Parsed {
        format: Format::Sorsa,
        modules,
        norms: BTreeMap::new(),
        base_name,
        trained_on: TrainedOn::WithoutScaledLeading,
        warnings: Vec::new(),
    })
}

/// Whether the residual weights a full checkpoint carries are the base less what was taken out of it, `taken: [out][in]` row by row;
/// takes them off the module.
///
/// # Errors
/// Where they are of another base.
pub fn check_residual(place: Place, module: &mut Module, base: &Checkpoint, taken: &dyn Fn(usize, &mut [f64])) -> Result<(), AdapterError> {
    let Some(stored) = module.weight.take() else { return Ok(()) };
    let (_, inputs) = place.shape(&base.config);
    let own = base_weight(base, place);
    let (mut off, mut all) = (0.0f64, 0.0f64);
    let mut row = vec![0.0f64; inputs];
    for (o, (stored, own)) in stored.chunks_exact(inputs).zip(own.chunks_exact(inputs)).enumerate() {
        taken(o, &mut row);
        for i in 0..inputs {
            let want = f64::from(own[i]) - row[i];
            off += (f64::from(stored[i]) - want).powi(2);
            all += f64::from(own[i]).powi(2);
        }
    }
    // Rounding to bf16 leaves 0.2 % or less.
    if (off / all.max(f64::MIN_POSITIVE)).sqrt() < 0.01 {
        return Ok(());
    }
    Err(AdapterError::Refused {
        reason: format!(
            "the residual weights of {} are not the served base less its leading singular triplets; the checkpoint is of another base",
            place.path()
        ),
    })
}
