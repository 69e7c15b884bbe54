//! What `strait adapter inspect` finds in adapters whose faults were planted, and in ones that have none.

use std::path::{Path, PathBuf};

use strait::adapters::left::left as spectrum_left;
use strait::adapters::pack::base_weight;
use strait::adapters::spectrum::Dense;
use strait::adapters::{BaseChoice, Place};
use strait::config::args::{AdapterFolder, AdapterInspect};
use strait::model::checkpoint::Checkpoint;
use strait::model::delta::{HeldAs, Site};
use strait::serve::inspect::inspect as inspect_adapter;

use crate::adapters::{folder, ready};
use crate::golden;
use crate::http::adapters::Root;

/// Writes a LoRA whose modules are these, with a scale of one.
fn plant(to: &Path, modules: &[(String, usize, Vec<f32>, Vec<f32>)]) {
    use safetensors::tensor::{Dtype, TensorView};
    std::fs::create_dir_all(to).unwrap();
    let ranks: serde_json::Map<String, serde_json::Value> = modules.iter().map(|(name, r, ..)| (name.clone(), (*r).into())).collect();
    let config = serde_json::json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks,
        "target_modules": ranks.keys().collect::<Vec<_>>()});
    std::fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
    let views = modules.iter().flat_map(|(name, r, down, up)| {
        let view = |rows: usize, data: &'_ [f32]| {
            TensorView::new(Dtype::F32, vec![rows, data.len() / rows], bytemuck::cast_slice::<f32, u8>(data).to_vec().leak()).unwrap()
        };
        [
            (format!("base_model.model.{name}.lora_A.weight"), view(*r, down)),
            (format!("base_model.model.{name}.lora_B.weight"), view(up.len() / r, up)),
        ]
    });
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &to.join("adapter_model.safetensors")).unwrap();
}

fn inspect_ask(root: &Root, adapter: &Path) -> AdapterInspect {
    AdapterInspect {
        folder: AdapterFolder {
            path: adapter.to_owned(),
            model: Some(golden::folder("llama-linear")),
            base: BaseChoice::Original,
            max_lora_rank: 64,
            cache_dir: Some(root.0.join("cache")),
            json: true,
        },
        k: 10,
        epsilon: 0.5,
        svg: Some(root.0.join("report.svg")),
        repair: None,
        lambda: 0.1,
    }
}

fn inspect(root: &Root, adapter: &Path, repair: Option<PathBuf>) -> serde_json::Value {
    let ask = AdapterInspect { repair, ..inspect_ask(root, adapter) };
    serde_json::from_str(&inspect_adapter(&ask).unwrap()).unwrap()
}

#[test]
fn inspection_reports_exactly_the_intruders_that_were_planted() {
    let root = Root::new("inspect", &[]);
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let mut rng = crate::ops::Rng::seeded(5);
    let planted: Vec<(Place, usize)> =
        [(Site::Q, 0), (Site::K, 1), (Site::V, 2), (Site::O, 3), (Site::Gate, 4), (Site::Up, 0), (Site::Down, 2)]
            .map(|(site, n)| (Place::Layer(1, site), n))
            .to_vec();
    let modules = planted.iter().map(|&(place, n)| {
        let (out, inputs) = place.shape(&base.config);
        let weight = base_weight(&base, place);
        let left = spectrum_left(Dense { rows: out, cols: inputs, data: &weight }).unwrap();
        let (m, top) = (left.s.len(), left.s[0]);
        let r = n.max(2);
        let (mut down, mut up) = (vec![0.0f32; r * inputs], vec![0.0f32; out * r]);
        for j in 0..n {
            // A direction spread evenly over all of the base's, and stronger than any of them: signs of a Hadamard matrix keep
            // several apart from each other.
            for o in 0..out {
                let spread: f32 = (0..m).map(|i| if (i & (j + 1)).count_ones() % 2 == 0 { 1.0 } else { -1.0 } * left.u[o * m + i]).sum();
                up[o * r + j] = spread / (m as f32).sqrt() * top * (2.0 + j as f32);
            }
            down[j * inputs + 7 * j + 3] = 1.0;
        }
        if n == 0 {
            down = rng.normals(r * inputs);
            up = rng.normals(out * r).iter().map(|v| v * 1e-3).collect();
        }
        (place.path(), r, down, up)
    });
    let adapter = root.0.join("planted");
    plant(&adapter, &modules.collect::<Vec<_>>());
    let count = |told: &serde_json::Value| -> Vec<(String, u64)> {
        let modules = told["modules"].as_array().unwrap().iter();
        modules.map(|m| (m["name"].as_str().unwrap().into(), m["intruders"]["found"].as_array().unwrap().len() as u64)).collect()
    };
    let told = inspect(&root, &adapter, Some(root.0.join("repaired")));
    let want: Vec<(String, u64)> = planted.iter().map(|(place, n)| (place.path(), *n as u64)).collect();
    assert_eq!(count(&told), want);
    assert_eq!(told["verdict"]["level"], "warning", "{}", told["verdict"]);
    let svg = std::fs::read_to_string(root.0.join("report.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("gate_proj"), "{}", &svg[..200]);
    // What was cached of the base gives the same.
    assert_eq!(count(&inspect(&root, &adapter, None)), want);
    assert!(std::fs::read_dir(root.0.join("cache")).unwrap().count() == 1, "one folder for one base");
    // Repaired, it is an adapter that is served, without any.
    let repaired = root.0.join("repaired");
    assert!(count(&inspect(&root, &repaired, None)).iter().all(|(_, n)| *n == 0));
    ready(&base, &repaired, &BaseChoice::Original, HeldAs::F32).unwrap();
}

#[test]
fn a_nearly_full_rank_adapter_that_stays_small_has_no_intruders() {
    let root = Root::new("benign", &[]);
    let base = Checkpoint::open(&golden::folder("llama-linear")).unwrap();
    let mut rng = crate::ops::Rng::seeded(6);
    let modules = Site::ALL.map(|site| {
        let place = Place::Layer(0, site);
        let ((out, inputs), r) = (place.shape(&base.config), 60);
        let norm = base_weight(&base, place).iter().map(|v| v * v).sum::<f32>().sqrt();
        let down = rng.normals(r * inputs);
        let up = rng.normals(out * r).iter().map(|v| v * 0.03 * norm / ((out * inputs * r) as f32).sqrt()).collect();
        (place.path(), r, down, up)
    });
    plant(&root.0.join("benign"), &modules);
    let told = inspect(&root, &root.0.join("benign"), None);
    for m in told["modules"].as_array().unwrap() {
        assert_eq!(m["intruders"]["found"].as_array().unwrap().len(), 0, "{}", m["name"]);
        let norm = m["update"]["relative_norm"].as_f64().unwrap();
        assert!((0.02..0.04).contains(&norm) && m["update"]["rank_99"].as_u64().unwrap() > 30, "{}", m["update"]);
    }
}

#[test]
fn a_sorsa_adapter_reports_how_far_its_triples_drifted() {
    let root = Root::new("drift", &[]);
    let mut ask = inspect_ask(&root, &folder("sorsa-compact"));
    ask.folder.base = BaseChoice::Auto;
    let told: serde_json::Value = serde_json::from_str(&inspect_adapter(&ask).unwrap()).unwrap();
    for m in told["modules"].as_array().unwrap() {
        let drift = |side: &str| m["drift"][side].as_f64().unwrap();
        assert!(drift("a") > 0.01 && drift("b") > 0.01, "{m}");
    }
}
