//! Hugging Face PEFT folders, read as the library reads them (`huggingface/peft`: `tuners/lora/config.py`,
//! `utils/save_and_load.py`, `utils/other.py`). What is present in the weights counts; the configuration says how much.

use std::collections::{BTreeMap, BTreeSet};

use fancy_regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use crate::adapters::folder::{Files, Tensors};
use crate::adapters::pack::base_weight;
use crate::adapters::{AdapterError, Format, Module, NormPlace, Parsed, Place, TrainedOn};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::ModelConfig;
use crate::model::delta::{Norm, Site};
use crate::model::json::{self, shown, shown_value};

const FILE: &str = "adapter_config.json";
const PREFIX: &str = "base_model.model.";

/// Keys that say nothing about what is computed when serving.
const INERT: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
];

/// Unknown keys that are told one by one.
const WARNINGS: usize = 16;
/// Patterns of an adapter, all together: more than a model has modules is no pattern.
const PATTERNS: usize = 8192;
/// Longest pattern, in bytes.
const PATTERN_BYTES: usize = 1024;

/// Keys that change the computation in a way that is not served, what that is, and what to do.
const REFUSED: &[(&str, &str, &str)] = &[
    ("alora_invocation_tokens", "it is an activated LoRA, which acts from a marker in the prompt on", "train it as a plain LoRA"),
    ("arrow_config", "it routes between several adapters (Arrow)", "load those adapters one by one"),
    ("kasa_config", "KaSA cuts small singular values out of the base", "merge it into the base and serve that"),
    ("layer_replication", "it repeats layers of the base", "save the model with its repeated layers and serve that"),
    ("monteclora_config", "MonteCLoRA draws its weights at random", "merge a draw of it into a plain LoRA"),
    ("target_parameters", "it adapts parameters that are no linear layers", "serve the merged model"),
    ("trainable_token_indices", "it retrains single rows of the embedding", "save the whole embedding (modules_to_save) instead"),
    ("use_bdlora", "its factors are block-diagonal (BD-LoRA)", "expand them to a plain LoRA"),
    ("use_qalora", "its inputs are pooled in groups (QA-LoRA)", "serve the merged model"),
];

/// The adapter in `files`, for this base.
///
/// # Errors
/// Where it is not a LoRA of such a model, is damaged, or needs what is not served.
pub fn parse(files: &Files, base: &Checkpoint) -> Result<Parsed, AdapterError> {
    let c = &base.config;
    let config = Config::read(&files.config)?;
    let mut warnings = config.warnings.clone();
    let mut names = Names::default();
    for tensor in files.tensors.names() {
        names.sort(tensor, c)?;
    }
    names.vocabulary(&files.tensors, c)?;
    let mut modules: BTreeMap<Place, Module> = BTreeMap::new();
    let mut untargeted = Vec::new();
    for (&place, found) in &names.factors {
        let module = factors(&config, &files.tensors, place, found, c)?;
        if config.targets(&place.path())? == Some(false) {
            untargeted.push(place.path());
        }
        modules.insert(place, module);
    }
    if let Some(first) = untargeted.first() {
        let n = untargeted.len();
        warnings.push(format!("target_modules does not name {n} modules whose weights are there ({first}, ...); they are served"));
    }
    let mut lacking = Vec::new();
    for place in places(c).filter(|p| !names.factors.contains_key(p)) {
        if config.targets(&place.path())? == Some(true) {
            lacking.push(place.path());
        }
    }
    if let Some(first) = lacking.first() {
        // As with PEFT, which says so, too: tools that extract an adapter leave out what does not change.
        let n = lacking.len();
        warnings.push(format!("target_modules names {n} modules whose weights are not there ({first}, ...); they stay the base's"));
    }
    for (&place, tensor) in &names.biases {
        if !place.has_bias(c) {
            return Err(bad(tensor, "is a bias, and the served model has none there".into()));
        }
        let (out, _) = place.shape(c);
        modules.entry(place).or_default().base_bias = Some(files.tensors.floats(tensor, &[out])?);
    }
    for (&place, tensor) in names.weights.iter().chain(&names.carried) {
        let (out, inputs) = place.shape(c);
        let shape = if place == Place::Embed { [inputs, out] } else { [out, inputs] };
        let module = modules.entry(place).or_default();
        if module.weight.is_some() || module.rank > 0 && names.weights.contains_key(&place) {
            return Err(bad(tensor, "stands beside other weights for the same module".into()));
        }
        module.weight = Some(files.tensors.floats(tensor, &shape)?);
    }
    for (&place, tensor) in &names.copies {
        let (out, inputs) = place.shape(c);
        let copy = files.tensors.floats(tensor, &if place == Place::Embed { [inputs, out] } else { [out, inputs] })?;
        if !modules.get(&place).and_then(|m| m.weight.as_ref()).is_some_and(|w| *w == copy) {
            return Err(bad(tensor, format!("is no copy of the weights that the file has for {} itself", place.path())));
        }
    }
    for (&place, tensor) in &names.originals {
        let (out, inputs) = place.shape(c);
        let stored = files.tensors.floats(tensor, &if place == Place::Embed { [inputs, out] } else { [out, inputs] })?;
        // An adapter in another type than the base's rounds what it carries.
        if stored.iter().zip(&base_weight(base, place)).any(|(a, b)| (a - b).abs() > b.abs() / 128.0) {
            return Err(bad(tensor, "differs from the served base's own weights; the adapter is for another base".into()));
        }
    }
    let mut norms = BTreeMap::new();
    for (&place, (tensor, width)) in &names.norms {
        norms.insert(place, files.tensors.floats(tensor, &[*width])?);
    }
    if modules.is_empty() && norms.is_empty() {
        return Err(AdapterError::Config { file: FILE, reason: "comes with no weights that change anything".into() });
    }
    let dora = modules.values().any(|m| m.magnitude.is_some());
    let lacking = modules.iter().find(|(_, m)| m.rank > 0 && m.magnitude.is_none());
    match (config.dora, dora, lacking) {
        (true, _, Some((place, _))) => {
            return Err(fail(format!("says use_dora, and {} has no magnitude; the file is incomplete", place.path())));
        }
        (false, true, _) => return Err(fail("does not say use_dora, and magnitudes are there".into())),
        _ => {}
    }
    config.promises(&names, &modules, c)?;
    let format = match (&config.init, dora, config.rslora) {
        (TrainedOn::WithoutLeading, ..) => Format::Pissa,
        (TrainedOn::WithoutQr, ..) => Format::Olora,
        (_, true, _) => Format::Dora,
        (_, _, true) => Format::Rslora,
        _ => Format::Lora,
    };
    Ok(Parsed { format, modules, norms, base_name: config.base_name, trained_on: config.init, warnings })
}

/// Every linear layer of a model, and the embedding.
fn places(c: &ModelConfig) -> impl Iterator<Item = Place> {
    (0..c.layers).flat_map(|l| Site::ALL.map(|s| Place::Layer(l, s))).chain([Place::Embed, Place::Head])
}

fn bad(tensor: &str, reason: String) -> AdapterError {
    AdapterError::Tensor { tensor: tensor.to_owned(), reason }
}

/// The low-rank parts of one module.
fn factors(config: &Config, tensors: &Tensors, place: Place, found: &Factors, c: &ModelConfig) -> Result<Module, AdapterError> {
    let path = place.path();
    let (Some(a), Some(b)) = (&found.a, &found.b) else {
        let (have, lack) = if found.a.is_some() { ("lora_A", "lora_B") } else { ("lora_B", "lora_A") };
        let there = found.a.as_ref().or(found.b.as_ref()).or(found.magnitude.as_ref()).or(found.bias.as_ref());
        let tensor = there.cloned().unwrap_or_default();
        return Err(bad(&tensor, format!("has no partner: {path} has {have} or less, and no {lack}; the file is incomplete")));
    };
    let (out, inputs) = place.shape(c);
    let rank = match tensors.shape(a) {
        Some(&[rank, _]) if rank > 0 => rank,
        other => return Err(bad(a, format!("has the shape {:?}, which is no [rank, {inputs}]", other.unwrap_or(&[])))),
    };
    let down = tensors.floats(a, &[rank, inputs])?;
    let mut up = tensors.floats(b, &[out, rank])?;
    let says = config.rank(&path)?;
    if says != rank {
        return Err(fail(format!(
            "gives {path} rank {says} and its weights have {rank}, so its scale cannot be known; PEFT refuses it, too"
        )));
    }
    let scale = config.scale(&path, rank)?;
    up.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
    let magnitude = found.magnitude.as_ref().map(|m| tensors.floats(m, &[out])).transpose()?;
    let bias = match &found.bias {
        None => None,
        Some(tensor) => {
            let mut bias = tensors.floats(tensor, &[out])?;
            bias.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            Some(bias)
        }
    };
    if let (Some(m), Some(_)) = (&found.magnitude, &bias) {
        return Err(bad(m, "stands beside a bias of lora_B, which DoRA has none of".into()));
    }
    Ok(Module { rank, down, up, scale, magnitude, bias, ..Module::default() })
}

/// Tensors of one module's low-rank part.
#[derive(Default)]
struct Factors {
    a: Option<String>,
    b: Option<String>,
    bias: Option<String>,
    magnitude: Option<String>,
}

/// Every tensor by what it is.
#[derive(Default)]
struct Names {
    factors: BTreeMap<Place, Factors>,
    biases: BTreeMap<Place, String>,
    weights: BTreeMap<Place, String>,
    /// The base's own weights, as PEFT saves an embedding beside its factors.
    carried: BTreeMap<Place, String>,
    /// What PEFT saves of a module of modules_to_save once more, where the vocabulary was resized: its weights, and the base's.
    copies: BTreeMap<Place, String>,
    originals: BTreeMap<Place, String>,
    norms: BTreeMap<NormPlace, (String, usize)>,
}

impl Names {
    fn sort(&mut self, tensor: &str, c: &ModelConfig) -> Result<(), AdapterError> {
        let Some(name) = tensor.strip_prefix(PREFIX) else {
            return Err(bad(tensor, format!("does not begin with {PREFIX}; the file was not saved by PEFT from a causal language model")));
        };
        let absent = |path: &str| {
            let path = shown(path, 120);
            bad(tensor, format!("is of the module {path}, which the served model does not have; is the adapter for another base?"))
        };
        const KINDS: [&str; 5] = [".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector"];
        if let Some((kind, (path, rest))) = KINDS.iter().find_map(|k| {
            let at = name.find(&format!("{k}.")).or_else(|| name.ends_with(k).then(|| name.len() - k.len()))?;
            Some((*k, (&name[..at], &name[at + k.len()..])))
        }) {
            let place = Place::of(path, c).ok_or_else(|| absent(path))?;
            let embedding = kind.starts_with(".lora_embedding");
            if (place == Place::Embed) != (embedding || kind == ".lora_magnitude_vector" && place == Place::Embed) {
                return Err(bad(tensor, format!("is no factor that {path} takes")));
            }
            let found = self.factors.entry(place).or_default();
            let slot = match (kind, plain_rest(rest)) {
                (".lora_A", Some("weight")) | (".lora_embedding_A", Some("")) => &mut found.a,
                (".lora_B", Some("weight")) | (".lora_embedding_B", Some("")) => &mut found.b,
                (".lora_B", Some("bias")) => &mut found.bias,
                (".lora_magnitude_vector", Some("" | "weight")) => &mut found.magnitude,
                _ => return Err(bad(tensor, "has a name that no LoRA of PEFT has".into())),
            };
            if slot.replace(tensor.to_owned()).is_some() {
                return Err(bad(tensor, "is there twice, under two adapter names".into()));
            }
            return Ok(());
        }
        let Some((path, what)) = name.rsplit_once('.') else { return Err(absent(name)) };
        let within = |part: &str| path.strip_suffix(part).filter(|_| what == "weight").and_then(|path| Place::of(path, c));
        if let Some(place) = within(".modules_to_save") {
            self.copies.insert(place, tensor.to_owned());
            return Ok(());
        }
        if let Some(place) = within(".original_module") {
            self.originals.insert(place, tensor.to_owned());
            return Ok(());
        }
        let (path, base_layer) = path.strip_suffix(".base_layer").map_or((path, false), |p| (p, true));
        let before = if let Some((place, width)) = NormPlace::of(path, c).filter(|_| what == "weight") {
            self.norms.insert(place, (tensor.to_owned(), width)).map(|(before, _)| before)
        } else {
            let place = Place::of(path, c).ok_or_else(|| absent(path))?;
            match what {
                "bias" => self.biases.insert(place, tensor.to_owned()),
                // PEFT saves the embedding beside its factors: the base's own, unless the vocabulary was resized.
                "weight" if base_layer => self.carried.insert(place, tensor.to_owned()),
                "weight" => self.weights.insert(place, tensor.to_owned()),
                _ => return Err(bad(tensor, "has a name that no LoRA of PEFT has".into())),
            }
        };
        match before {
            None => Ok(()),
            Some(before) => Err(bad(tensor, format!("stands for what `{before}` is already"))),
        }
    }

    /// Refuses embeddings and heads of another vocabulary, which PEFT saves where it was resized before training. PEFT, too, loads them
    /// on a base alone that was resized alike.
    fn vocabulary(&self, tensors: &Tensors, c: &ModelConfig) -> Result<(), AdapterError> {
        let whole = [&self.weights, &self.carried, &self.copies, &self.originals];
        for tensor in whole.iter().flat_map(|of| [Place::Embed, Place::Head].map(|p| of.get(&p))).flatten() {
            if let Some(&[vocab, hidden]) = tensors.shape(tensor)
                && (vocab != c.vocab && hidden == c.hidden)
            {
                return Err(AdapterError::NotServed {
                    what: format!("it was trained with a vocabulary of {vocab} tokens (`{tensor}`), and the served model has {}", c.vocab),
                    mend: "serve the base as it was resized for the training (resize_token_embeddings, then save_pretrained)".into(),
                });
            }
        }
        Ok(())
    }
}

/// What follows the kind of a factor: `.weight`, `.bias` or nothing, perhaps after the name of an adapter, which PEFT strips and
/// some trainers leave.
fn plain_rest(rest: &str) -> Option<&str> {
    let parts: Vec<&str> = rest.strip_prefix('.').map_or_else(Vec::new, |r| r.split('.').collect());
    match parts[..] {
        [] => Some(""),
        [last @ ("weight" | "bias")] | [_, last @ ("weight" | "bias")] => Some(last),
        [_] => Some(""),
        _ => None,
    }
}

/// `adapter_config.json`, as far as it matters.
struct Config {
    r: usize,
    alpha: f64,
    rank_pattern: Vec<(Key, f64)>,
    alpha_pattern: Vec<(Key, f64)>,
    rslora: bool,
    dora: bool,
    init: TrainedOn,
    base_name: Option<String>,
    target: Option<Target>,
    exclude: Option<Target>,
    layers: Option<BTreeSet<u64>>,
    layers_pattern: Vec<Regex>,
    modules_to_save: Vec<String>,
    lora_bias: bool,
    /// Biases of the base were trained.
    bias: bool,
    warnings: Vec<String>,
}

/// `target_modules` and `exclude_modules`.
enum Target {
    /// `all-linear`: whatever is linear but the output head.
    AllLinear,
    Pattern(Regex),
    Names(Vec<String>),
}

fn fail(reason: String) -> AdapterError {
    AdapterError::Config { file: FILE, reason }
}

/// A pattern of Python's `re`, as a whole match of `before pattern after`. What it may cost is bounded: it may be anybody's.
fn regex(before: &str, pattern: &str, after: &str) -> Result<Regex, AdapterError> {
    let bad = |why: &str| fail(format!("has the pattern {:?}, which {why}", shown(pattern, 80)));
    if pattern.len() > PATTERN_BYTES {
        return Err(bad("is too long"));
    }
    let mut builder = RegexBuilder::new(&format!("{before}(?:{pattern}){after}"));
    builder.backtrack_limit(10_000).delegate_size_limit(256 << 10).delegate_dfa_size_limit(256 << 10);
    builder.build().map_err(|_| bad("is no regular expression that is read here"))
}

fn matches(regex: &Regex, path: &str) -> Result<bool, AdapterError> {
    regex.is_match(path).map_err(|_| fail("has a pattern that takes too long to match".into()))
}

/// A key of `rank_pattern` or `alpha_pattern`.
enum Key {
    /// Letters, digits, underscores and dashes, and points, which stand for any character: matched without a machine.
    Plain(String),
    Pattern(Regex),
}

impl Key {
    fn is_plain(pattern: &str) -> bool {
        !pattern.is_empty() && pattern.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
    }

    fn of(pattern: &str) -> Result<Key, AdapterError> {
        if Key::is_plain(pattern) {
            return Ok(Key::Plain(pattern.to_owned()));
        }
        Ok(Key::Pattern(regex(r"\A(?:.*\.)?", pattern, "$")?))
    }

    /// `re.match("(.*\.)?(key)$", path)`.
    fn matches(&self, path: &str) -> Result<bool, AdapterError> {
        let key = match self {
            Key::Pattern(regex) => return matches(regex, path),
            Key::Plain(key) => key.as_bytes(),
        };
        let Some(at) = path.len().checked_sub(key.len()) else { return Ok(false) };
        let (before, end) = path.as_bytes().split_at(at);
        let same = key.iter().zip(end).all(|(k, p)| k == p || *k == b'.');
        Ok(same && before.last().is_none_or(|b| *b == b'.'))
    }
}

impl Config {
    fn read(bytes: &[u8]) -> Result<Config, AdapterError> {
        let value = json::parse(bytes).map_err(|e| fail(format!("is not valid JSON ({e})")))?;
        let Value::Object(map) = value else { return Err(fail("is not a JSON object".into())) };
        match map.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => {
                return Err(AdapterError::NotServed {
                    what: format!("it is an adapter of type {}", shown(other, 40)),
                    mend: "served are LORA adapters; merge others into the base, or extract a LoRA from the merged model".into(),
                });
            }
            None => return Err(fail("has no peft_type; it is not the configuration of a PEFT adapter".into())),
        }
        for (key, what, mend) in REFUSED {
            if map.get(*key).is_some_and(says_something) {
                return Err(AdapterError::NotServed { what: (*what).into(), mend: (*mend).into() });
            }
        }
        let mut warnings = Vec::new();
        for (key, value) in &map {
            let known = INERT.contains(&key.as_str()) || READ.contains(&key.as_str()) || REFUSED.iter().any(|r| r.0 == key);
            if !known && says_something(value) {
                if warnings.len() == WARNINGS {
                    warnings.push("more keys are not known here and are ignored".into());
                    break;
                }
                warnings.push(format!("{FILE} has {} = {}, which is not known here and is ignored", shown(key, 60), shown_value(value)));
            }
        }
        if flag(&map, "fan_in_fan_out")? {
            // PEFT resets it where the module is a Linear, and in the families served here all are.
            warnings.push("fan_in_fan_out is for Conv1D layers, which this model has none of; it is ignored, as PEFT does".into());
        }
        let rslora = flag(&map, "use_rslora")?;
        let r = number(&map, "r")?.unwrap_or(8.0);
        if !(1.0..=65536.0).contains(&r) || r.fract() != 0.0 {
            return Err(fail("has an r that is no positive integer".into()));
        }
        let alpha = number(&map, "lora_alpha")?.unwrap_or(8.0);
        let layers = match map.get("layers_to_transform") {
            None | Some(Value::Null) => None,
            Some(Value::Number(n)) => Some(n.as_u64().into_iter().collect()),
            Some(Value::Array(list)) if list.is_empty() => None,
            Some(Value::Array(list)) => {
                let all = list.iter().map(|v| v.as_u64().ok_or_else(|| fail("has a layers_to_transform that is no list of layers".into())));
                Some(all.collect::<Result<_, _>>()?)
            }
            Some(_) => return Err(fail("has a layers_to_transform that is no list of layers".into())),
        };
        let layers_pattern = strings(&map, "layers_pattern")?.unwrap_or_default();
        if layers_pattern.len() > PATTERNS / 64 {
            return Err(fail(format!("has {} layers_pattern, more than are read here", layers_pattern.len())));
        }
        let layers_pattern = layers_pattern.iter().map(|p| regex(r"\A(?:|.*?\.)", p, r"\.(?P<idx>\d+)\."));
        Ok(Config {
            r: r as usize,
            alpha,
            rank_pattern: patterns(&map, "rank_pattern")?,
            alpha_pattern: patterns(&map, "alpha_pattern")?,
            rslora,
            dora: flag(&map, "use_dora")?,
            init: trained_on(map.get("init_lora_weights"))?,
            base_name: map.get("base_model_name_or_path").and_then(Value::as_str).filter(|s| !s.is_empty()).map(|s| shown(s, 200)),
            target: target(&map, "target_modules")?,
            exclude: target(&map, "exclude_modules")?,
            layers,
            layers_pattern: layers_pattern.collect::<Result<_, _>>()?,
            modules_to_save: strings(&map, "modules_to_save")?.unwrap_or_default(),
            lora_bias: flag(&map, "lora_bias")?,
            bias: match map.get("bias") {
                None | Some(Value::Null) => false,
                Some(Value::String(s)) if ["none", "all", "lora_only"].contains(&s.as_str()) => s != "none",
                Some(_) => return Err(fail("has a bias that is none of none, all and lora_only".into())),
            },
            warnings,
        })
    }

    /// The rank it gives a module.
    fn rank(&self, path: &str) -> Result<usize, AdapterError> {
        match pattern(&self.rank_pattern, path)? {
            None => Ok(self.r),
            Some(r) if (1.0..=65536.0).contains(&r) && r.fract() == 0.0 => Ok(r as usize),
            Some(r) => Err(fail(format!("gives {path} the rank {r}, which is no positive integer"))),
        }
    }

    /// What a module's product is multiplied by: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA (Kalajdzievski 2023).
    fn scale(&self, path: &str, rank: usize) -> Result<f64, AdapterError> {
        let alpha = pattern(&self.alpha_pattern, path)?.unwrap_or(self.alpha);
        let scale = alpha / if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        if scale.is_finite() { Ok(scale) } else { Err(fail(format!("makes the scale of {path} infinite"))) }
    }

    /// Whether `target_modules` and its kin choose a module; `None` where they do not say.
    fn targets(&self, path: &str) -> Result<Option<bool>, AdapterError> {
        if let Some(exclude) = &self.exclude
            && exclude.names(path)?
        {
            return Ok(Some(false));
        }
        // PEFT puts no factors on or in a module that is saved whole.
        let saved = |m: &String| path.match_indices(m.as_str()).any(|(at, _)| segments(path, at, m.len()));
        if self.modules_to_save.iter().any(saved) {
            return Ok(Some(false));
        }
        let Some(target) = &self.target else { return Ok(None) };
        let exact = matches!(target, Target::Names(names) if names.iter().any(|n| n == path));
        let by_suffix = matches!(target, Target::Names(_)) && !exact;
        let layer = || -> Option<u64> {
            if self.layers_pattern.is_empty() {
                // The first numbered segment that has two before it.
                let mut parts = path.split('.').skip(2);
                return parts.find_map(|p| p.parse().ok());
            }
            let found = self.layers_pattern.iter().find_map(|p| p.captures(path).ok().flatten())?;
            found.name("idx")?.as_str().parse().ok()
        };
        let here = !by_suffix || self.layers.as_ref().is_none_or(|l| layer().is_some_and(|n| l.contains(&n)));
        Ok(Some(target.names(path)? && here))
    }

    /// Whether the weights keep what the configuration promises: a stripped file would be served as another adapter.
    fn promises(&self, names: &Names, modules: &BTreeMap<Place, Module>, c: &ModelConfig) -> Result<(), AdapterError> {
        let of = |entry: &str, path: &str| path == entry || path.strip_suffix(entry).is_some_and(|p| p.ends_with('.'));
        let norms = (0..c.layers).flat_map(|l| Norm::ALL.map(|n| format!("model.layers.{l}.{}", n.name()))).chain(["model.norm".into()]);
        let model: Vec<String> = places(c).map(Place::path).chain(norms.filter(|n| NormPlace::of(n, c).is_some())).collect();
        let saved: BTreeSet<String> = {
            let norms = names.norms.values().filter_map(|(t, _)| t.strip_prefix(PREFIX)?.strip_suffix(".weight").map(str::to_owned));
            names.weights.keys().map(|p| p.path()).chain(norms).collect()
        };
        for entry in &self.modules_to_save {
            if let Some(lost) = model.iter().find(|m| of(entry, m) && !saved.contains(*m)) {
                return Err(fail(format!(
                    "promises the weights of {lost} (modules_to_save), and they are not there; the file is incomplete"
                )));
            }
        }
        if self.lora_bias && modules.iter().any(|(p, m)| *p != Place::Embed && m.rank > 0 && m.bias.is_none()) {
            return Err(fail("says lora_bias, and a bias of lora_B is not there; the file is incomplete".into()));
        }
        if self.bias && names.biases.is_empty() && modules.iter().any(|(p, m)| m.rank > 0 && p.has_bias(c)) {
            return Err(fail("says that biases were trained (bias), and none is there; the file is incomplete".into()));
        }
        Ok(())
    }
}

/// Keys that are read.
const READ: &[&str] = &[
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
];

impl Target {
    fn names(&self, path: &str) -> Result<bool, AdapterError> {
        Ok(match self {
            Target::AllLinear => path != "lm_head" && path != "model.embed_tokens",
            Target::Pattern(regex) => matches(regex, path)?,
            Target::Names(names) => names.iter().any(|n| path == n || path.strip_suffix(n.as_str()).is_some_and(|p| p.ends_with('.'))),
        })
    }
}

/// Whether so many bytes of a path from `at` on are whole segments of it.
fn segments(path: &str, at: usize, n: usize) -> bool {
    n > 0 && (at == 0 || path[..at].ends_with('.')) && (at + n == path.len() || path[at + n..].starts_with('.'))
}

/// Whether a value switches something on.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::String(s) => !s.is_empty(),
        Value::Number(_) | Value::Bool(true) => true,
    }
}

fn flag(map: &Map<String, Value>, key: &str) -> Result<bool, AdapterError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(_) => Err(fail(format!("has a {key} that is neither true nor false"))),
    }
}

fn number(map: &Map<String, Value>, key: &str) -> Result<Option<f64>, AdapterError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_f64().filter(|v| v.is_finite()).map(Some).ok_or_else(|| fail(format!("has a {key} that is no number"))),
    }
}

/// A string, or a list of them.
fn strings(map: &Map<String, Value>, key: &str) -> Result<Option<Vec<String>>, AdapterError> {
    let bad = || fail(format!("has a {key} that is neither a string nor a list of strings"));
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(one)) => Ok(Some(if one.is_empty() { vec![] } else { vec![one.clone()] })),
        Some(Value::Array(list)) => list.iter().map(|v| v.as_str().map(str::to_owned).ok_or_else(bad)).collect::<Result<_, _>>().map(Some),
        Some(_) => Err(bad()),
    }
}

fn target(map: &Map<String, Value>, key: &str) -> Result<Option<Target>, AdapterError> {
    match map.get(key) {
        Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => Ok(Some(Target::AllLinear)),
        Some(Value::String(s)) if !s.is_empty() => Ok(Some(Target::Pattern(regex(r"\A", s, r"\z")?))),
        _ => Ok(strings(map, key)?.filter(|names| !names.is_empty()).map(Target::Names)),
    }
}

/// `rank_pattern` or `alpha_pattern`: the first key, in the order written, with `re.match("(.*\.)?(key)$", path)`.
fn patterns(map: &Map<String, Value>, key: &str) -> Result<Vec<(Key, f64)>, AdapterError> {
    let Some(value) = map.get(key).filter(|v| !v.is_null()) else { return Ok(Vec::new()) };
    let Value::Object(entries) = value else { return Err(fail(format!("has a {key} that is no object"))) };
    let one = |(pattern, value): (&String, &Value)| {
        let number = value.as_f64().filter(|v| v.is_finite()).ok_or_else(|| fail(format!("has a {key} with a value that is no number")))?;
        Ok((Key::of(pattern)?, number))
    };
    if entries.len() > PATTERNS || entries.keys().filter(|k| !Key::is_plain(k)).count() > PATTERNS / 64 {
        return Err(fail(format!("has a {key} of {} patterns, more than are read here", entries.len())));
    }
    entries.iter().map(one).collect()
}

fn pattern(list: &[(Key, f64)], path: &str) -> Result<Option<f64>, AdapterError> {
    for (key, value) in list {
        if key.matches(path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// What the initialisation did to the base, as `init_lora_weights` says. Conversion by PEFT sets it to true.
fn trained_on(init: Option<&Value>) -> Result<TrainedOn, AdapterError> {
    let convert = "save it with path_initial_model_for_weight_conversion, or name the initial adapter (base initial:FOLDER) or the \
                   residual base (base residual:FOLDER)";
    let refused = |what: &str| Err(AdapterError::NotServed { what: what.to_owned(), mend: convert.to_owned() });
    match init {
        None | Some(Value::Null | Value::Bool(_)) => Ok(TrainedOn::Base),
        Some(Value::String(s)) => match s.to_ascii_lowercase().as_str() {
            "gaussian" | "eva" | "orthogonal" | "mica" | "true" | "false" => Ok(TrainedOn::Base),
            "olora" => Ok(TrainedOn::WithoutQr),
            s if s == "pissa" || s.starts_with("pissa_niter_") => Ok(TrainedOn::WithoutLeading),
            "corda" => refused("it was initialised by CorDA, which takes a product out of the base that depends on its training data"),
            "lora_ga" => refused("it was initialised by LoRA-GA, which takes a product out of the base that depends on its gradients"),
            "loftq" => Err(AdapterError::NotServed {
                what: "it was initialised by LoftQ, on a base whose weights were quantised".into(),
                mend: "serve the base that LoftQ saved beside it".into(),
            }),
            other => Err(AdapterError::NotServed {
                what: format!("its init_lora_weights is {:?}, which is not known here and may have changed the base", shown(other, 40)),
                mend: convert.to_owned(),
            }),
        },
        Some(_) => Err(fail("has an init_lora_weights that is neither true, false nor a name".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::read(text.as_bytes()).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn modules_are_chosen_as_peft_chooses_them() {
        let q0 = "model.layers.0.self_attn.q_proj";
        let q10 = "model.layers.10.self_attn.q_proj";
        for (text, path, want) in [
            (r#""target_modules":["q_proj"]"#, q0, true),
            (r#""target_modules":["proj"]"#, q0, false),
            (r#""target_modules":["self_attn.q_proj"]"#, q0, true),
            (r#""target_modules":["model.layers.1.self_attn.q_proj"]"#, q0, false),
            (r#""target_modules":".*\\.q_proj""#, q0, true),
            (r#""target_modules":"q_proj""#, q0, false),
            (r#""target_modules":".*layers\\.1\\..*""#, q10, false),
            (r#""target_modules":"(?!.*lm_head).*q_proj""#, q10, true),
            (r#""target_modules":"all-linear""#, q0, true),
            (r#""target_modules":"all-linear""#, "lm_head", false),
            (r#""target_modules":["q_proj"],"exclude_modules":["layers.0.self_attn.q_proj"]"#, q0, false),
            (r#""target_modules":["q_proj"],"exclude_modules":".*\\.0\\..*""#, q0, false),
            (r#""target_modules":["q_proj"],"layers_to_transform":[1,10]"#, q10, true),
            (r#""target_modules":["q_proj"],"layers_to_transform":[1,10]"#, q0, false),
            (r#""target_modules":["q_proj"],"layers_to_transform":0"#, q0, true),
            (r#""target_modules":["q_proj"],"layers_to_transform":[10],"layers_pattern":"layers""#, q10, true),
            (r#""target_modules":["q_proj"],"layers_to_transform":[10],"layers_pattern":["h"]"#, q10, false),
            (r#""target_modules":["q_proj"],"modules_to_save":["q_proj"]"#, q0, false),
            (r#""target_modules":["q_proj"],"modules_to_save":["self_attn"]"#, q0, false),
            (r#""target_modules":["q_proj"],"modules_to_save":["attn","proj","layers.1"]"#, q0, true),
            // A module that is named whole is not asked for its layer.
            (r#""target_modules":["model.layers.0.self_attn.q_proj"],"layers_to_transform":[1]"#, q0, true),
        ] {
            let config = config(&format!(r#"{{"peft_type":"LORA",{text}}}"#));
            assert_eq!(config.targets(path).unwrap(), Some(want), "{text} {path}");
        }
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let text = r#"{"peft_type":"LORA","r":8,"lora_alpha":16,
            "rank_pattern":{"self_attn.q_proj":4,"q_proj":2,"^model.layers.1.mlp.up_proj":3,"layers\\.[01]\\.mlp\\.up_proj":5,"up_pro":9},
            "alpha_pattern":{"up_proj":1}}"#;
        let config = config(text);
        for r in ["4.5", "0", "-4", "1e9"] {
            let odd = self::config(&format!(r#"{{"peft_type":"LORA","rank_pattern":{{"up_proj":{r}}}}}"#));
            assert!(odd.rank("model.layers.0.mlp.up_proj").is_err() && odd.rank("lm_head").is_ok(), "{r}");
        }
        for (path, rank, scale) in [
            ("model.layers.0.self_attn.q_proj", 4, 4.0),
            ("model.layers.1.mlp.up_proj", 3, 1.0 / 3.0),
            ("model.layers.0.mlp.up_proj", 5, 0.2),
            ("model.layers.2.mlp.up_proj", 8, 0.125),
            ("model.layers.0.self_attn.k_proj", 8, 2.0),
        ] {
            assert_eq!(config.rank(path).unwrap(), rank, "{path}");
            assert_eq!(config.scale(path, rank).unwrap(), scale, "{path}");
        }
    }

    #[test]
    fn plain_keys_match_as_their_regular_expressions_do() {
        let paths = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head", "up_proj", "model_layers.1.mlp.up_proj"];
        let keys = [
            "up_proj",
            "mlp.up_proj",
            "1.mlp.up_proj",
            "model.layers.1.mlp.up_proj",
            "p_proj",
            ".",
            "lm_head",
            "head",
            "mlp_up_proj",
            "..proj",
        ];
        for (key, path) in keys.iter().flat_map(|k| paths.map(|p| (*k, p))) {
            let slow = matches(&regex(r"\A(?:.*\.)?", key, "$").unwrap(), path).unwrap();
            assert_eq!(Key::Plain(key.to_owned()).matches(path).unwrap(), slow, "{key} {path}");
        }
    }

    #[test]
    fn patterns_that_cost_too_much_are_refused() {
        let read = |config: String| Config::read(config.as_bytes()).map(|_| ()).map_err(|e| e.to_string());
        let many: Vec<String> = (0..3000).map(|i| format!(r#""\\\\w{{90}}a{i}":1"#)).collect();
        for config in [
            format!(r#"{{"peft_type":"LORA","rank_pattern":{{{}}}}}"#, many.join(",")),
            r#"{"peft_type":"LORA","rank_pattern":{"(\\\\w{1000}){1000}":1}}"#.to_owned(),
            format!(r#"{{"peft_type":"LORA","target_modules":"{}"}}"#, "a".repeat(5000)),
        ] {
            assert!(read(config).is_err());
        }
        let slow = config(r#"{"peft_type":"LORA","target_modules":"(a|b|ab)*(?>c)"}"#);
        assert!(slow.targets(&"ab".repeat(40)).is_err());
    }

    #[test]
    fn what_is_not_served_is_refused_with_a_mend() {
        for (text, part) in [
            (r#"{"peft_type":"LOHA"}"#, "type LOHA"),
            (r#"{"r":8}"#, "no peft_type"),
            (r#"{"peft_type":"LORA","trainable_token_indices":[1]}"#, "embedding"),
            (r#"{"peft_type":"LORA","layer_replication":[[0,1]]}"#, "repeats layers"),
            (r#"{"peft_type":"LORA","init_lora_weights":"corda"}"#, "initial:FOLDER"),
            (r#"{"peft_type":"LORA","init_lora_weights":"loftq"}"#, "LoftQ"),
            (r#"{"peft_type":"LORA","init_lora_weights":"fancy"}"#, "fancy"),
            (r#"{"peft_type":"LORA","target_modules":"("}"#, "no regular expression"),
            (r#"{"peft_type":"LORA","r":0}"#, "positive integer"),
            (r#"{"peft_type":"LORA","r":8,"r":16}"#, "twice"),
            ("[]", "not a JSON object"),
        ] {
            let Err(error) = Config::read(text.as_bytes()) else { panic!("{text} is read") };
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn an_unknown_switch_is_told() {
        let warnings = config(r#"{"peft_type":"LORA","use_magic":true,"old_magic":null,"lora_dropout":0.1}"#).warnings;
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("use_magic"));
    }
}
