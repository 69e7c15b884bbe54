//! An adapter as a plain PEFT folder on the original base, whatever it was: what any server that reads LoRA can serve.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

use crate::adapters::{AdapterError, NormPlace, Parsed, Place};
use crate::model::config::ModelConfig;
use crate::model::delta::Norm;

/// Writes `parsed`, whose factors belong on the served base, as a new folder `out`. Scales are folded into the factors, so the
/// configuration makes every one of them 1. Elements are stored as F32.
///
/// # Errors
/// Where `out` is there already, or cannot be written; nothing is left of it then.
pub fn write(parsed: &Parsed, c: &ModelConfig, out: &Path) -> Result<(), AdapterError> {
    let failed = |reason: String| AdapterError::Write { path: out.display().to_string(), reason };
    let mut tensors: Vec<(String, Vec<usize>, &[f32])> = Vec::new();
    let mut ranks = Map::new();
    let mut saved = Vec::new();
    let (mut lora_bias, mut base_bias, mut dora) = (false, false, false);
    for (&place, m) in &parsed.modules {
        let (path, (rows, cols)) = (place.path(), place.shape(c));
        let name = |part: &str| format!("base_model.model.{path}.{part}");
        if m.rank > 0 {
            ranks.insert(path.clone(), json!(m.rank));
            let [a, b] = if place == Place::Embed { ["lora_embedding_A", "lora_embedding_B"] } else { ["lora_A.weight", "lora_B.weight"] };
            tensors.push((name(a), vec![m.rank, cols], &m.down));
            tensors.push((name(b), vec![rows, m.rank], &m.up));
        }
        if let Some(magnitude) = &m.magnitude {
            dora = true;
            tensors.push((name("lora_magnitude_vector"), vec![rows], magnitude));
        }
        if let Some(bias) = &m.bias {
            lora_bias = true;
            tensors.push((name("lora_B.bias"), vec![rows], bias));
        }
        if let Some(bias) = &m.base_bias {
            base_bias |= m.weight.is_none();
            let at = if m.rank > 0 { "base_layer.bias" } else { "bias" };
            tensors.push((name(at), vec![rows], bias));
        }
        if let Some(weight) = &m.weight {
            let shape = if place == Place::Embed { vec![cols, rows] } else { vec![rows, cols] };
            if m.rank > 0 {
                tensors.push((name("base_layer.weight"), shape, weight));
            } else {
                saved.push(path.clone());
                tensors.push((name("weight"), shape, weight));
            }
        }
    }
    for (&place, weights) in &parsed.norms {
        let path = match place {
            NormPlace::Final => "model.norm".to_owned(),
            NormPlace::Layer(layer, norm) => format!("model.layers.{layer}.{}", Norm::name(norm)),
        };
        tensors.push((format!("base_model.model.{path}.weight"), vec![weights.len()], weights));
        saved.push(path);
    }
    let targets: Vec<&String> = ranks.keys().collect();
    // Empty where an adapter only replaces tensors: that is read here, and PEFT asks for a target.
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": parsed.base_name,
        "r": parsed.rank().max(1),
        "lora_alpha": parsed.rank().max(1),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": targets,
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "bias": if base_bias { "all" } else { "none" },
        "lora_bias": lora_bias,
        "use_dora": dora,
        "use_rslora": false,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "lora_dropout": 0.0,
        "inference_mode": true,
    });
    let views = tensors.iter().map(|(name, shape, data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(data));
        view.map(|view| (name, view)).map_err(|e| AdapterError::Tensor { tensor: name.clone(), reason: format!("cannot be stored: {e}") })
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    if let Some(above) = out.parent() {
        std::fs::create_dir_all(above).map_err(|e| failed(e.to_string()))?;
    }
    std::fs::create_dir(out).map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => failed("it is there already; name a new folder".into()),
        _ => failed(e.to_string()),
    })?;
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let written = safetensors::serialize_to_file(views, Some(metadata), &out.join("adapter_model.safetensors"))
        .map_err(|e| e.to_string())
        .and_then(|()| std::fs::write(out.join("adapter_config.json"), format!("{config:#}\n")).map_err(|e| e.to_string()));
    written.map_err(|reason| {
        // The folder is new: nobody else's files are in it, and half an adapter is none.
        let _ = std::fs::remove_dir_all(out);
        failed(reason)
    })
}
