//! The floors and the nevers of `src/ARCHITECTURE.md`, read from the source: which room may import which, what a room
//! must never name, and that documents and code say the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Rooms from the ground up, and what each may import: always rooms above it in this list, so there are no cycles.
/// The longest name that fits a path is its room.
const FLOORS: &[(&str, &[&str])] = &[
    ("ids", &[]),
    ("telemetry", &[]),
    ("files", &[]),
    ("model::config", &[]),
    ("request", &["ids"]),
    ("step", &["ids"]),
    ("quant", &[]),
    ("kv", &["ids", "model::config", "quant"]),
    ("compress", &["files", "ids", "kv", "model::config", "quant"]),
    ("ops", &["ids", "kv", "compress", "quant"]),
    ("model", &["ids", "kv", "compress", "ops", "request", "step", "model::config"]),
    ("adapters", &["files", "ids", "model", "model::config"]),
    ("pages", &["ids", "kv"]),
    ("scheduler", &["ids", "kv", "pages", "request", "step", "telemetry"]),
    ("plan", &["ids", "kv", "model::config", "step"]),
    ("text", &["ids", "model"]),
    ("train", &["compress", "files", "ids", "kv", "model", "model::config", "ops", "quant"]),
    ("calibrate", &["ids", "kv", "compress", "model", "model::config", "ops", "step"]),
    ("engine", &["adapters", "ids", "kv", "model", "ops", "request", "scheduler", "step", "telemetry"]),
    ("admission", &["ids", "kv", "request", "text"]),
    ("server", &["adapters", "admission", "engine", "ids", "kv", "request", "telemetry", "text"]),
    ("demo", &["model", "text"]),
    ("config", &["adapters", "kv", "model"]),
    ("eval", &["calibrate", "ids", "kv", "model", "ops", "step"]),
    (
        "serve",
        &[
            "adapters",
            "admission",
            "calibrate",
            "compress",
            "config",
            "demo",
            "engine",
            "eval",
            "ids",
            "kv",
            "model",
            "model::config",
            "ops",
            "plan",
            "scheduler",
            "server",
            "telemetry",
            "text",
            "train",
        ],
    ),
];

/// Words that never stand in the code of some rooms, and why.
const NEVERS: &[(&[&str], &[&str], &str)] = &[
    (
        &["scheduler", "pages", "step", "request"],
        &["Instant", "SystemTime", "tokio", "rand::", "std::thread"],
        "they are pure: time arrives as an argument",
    ),
    (&["scheduler", "pages", "engine", "ops", "model::decoder"], &["tokenizers", "crate::text"], "below admission there is no text"),
    (
        &["ids", "request", "step", "pages", "scheduler", "engine", "admission", "ops", "model", "text", "kv"],
        &["axum", "StatusCode"],
        "HTTP lives in server",
    ),
    (&["server", "engine", "scheduler", "admission", "serve"], &["prometheus::"], "metric types live in telemetry"),
];

/// Where `unsafe` may stand.
const UNSAFE: &[&str] = &["src/ops/cpu/", "src/ops/cuda/", "src/model/checkpoint.rs"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Every file of `src` below a room: its path from the root, its module path, and its code without comments.
fn files() -> Vec<(String, String, String)> {
    let mut paths = vec![];
    sources(&root().join("src"), &mut paths);
    paths.sort();
    let named = paths.into_iter().map(|path| {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
        let module = name.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
        (name, module, std::fs::read_to_string(path).unwrap())
    });
    named.filter(|(_, module, _)| module != "lib" && module != "main").collect()
}

fn code(text: &str) -> String {
    // Tests inside a file may reach further than the file itself.
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

fn room(module: &str) -> Option<&'static str> {
    let fits = |name: &&(&'static str, _)| module == name.0 || module.strip_prefix(name.0).is_some_and(|rest| rest.starts_with("::"));
    FLOORS.iter().filter(fits).map(|f| f.0).max_by_key(|name| name.len())
}

#[test]
fn rooms_import_only_what_lies_below_them() {
    let below: BTreeMap<&str, usize> = FLOORS.iter().enumerate().map(|(i, f)| (f.0, i)).collect();
    for (name, imports) in FLOORS {
        for import in *imports {
            assert!(below[import] < below[name], "{name} imports {import}, which is not below it");
        }
    }
    let mut faults = vec![];
    for (name, module, text) in files() {
        let Some(own) = room(&module) else {
            faults.push(format!("{name} is in no room of the table"));
            continue;
        };
        let allowed = FLOORS[below[own]].1;
        for (i, _) in code(&text).match_indices("crate::") {
            let path: String = code(&text)[i + 7..].chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':').collect();
            match room(&path) {
                Some(other) if other == own || allowed.contains(&other) => {}
                other => faults.push(format!("{name}: crate::{path} (room {other:?}) is not on a floor that {own} may import")),
            }
        }
    }
    faults.dedup();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn nevers_are_never() {
    let mut faults = vec![];
    for (name, module, text) in files() {
        let code = code(&text);
        for (rooms, words, why) in NEVERS {
            let inside = rooms.iter().any(|r| module == *r || module.starts_with(&format!("{r}::")));
            for word in words.iter().filter(|w| inside && code.contains(**w)) {
                faults.push(format!("{name} names {word}: {why}"));
            }
        }
        let has_unsafe = code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl");
        if has_unsafe && !UNSAFE.iter().any(|place| name.starts_with(place)) {
            faults.push(format!("{name} has unsafe code, which has its places: {UNSAFE:?}"));
        }
        for word in ["todo!(", "unimplemented!(", "dbg!("] {
            if code.contains(word) {
                faults.push(format!("{name} has {word})"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_file_opens_with_its_job() {
    let mut paths = vec![];
    for dir in ["src", "tests/suite", "loadtest"] {
        sources(&root().join(dir), &mut paths);
    }
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        let opens = text.starts_with("//! ") || text.starts_with("#![doc = include_str!");
        assert!(opens, "{} does not open with its job", path.display());
    }
}

#[test]
fn the_readme_lists_every_metric_and_every_flag() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    for metric in strait::telemetry::METRICS {
        assert!(readme.contains(&format!("`{}`", metric.name)), "README.md does not list the metric {}", metric.name);
    }
    use clap::CommandFactory;
    let cli = strait::config::args::Cli::command();
    for flag in cli.get_arguments().filter_map(|a| a.get_long()) {
        assert!(readme.contains(&format!("`--{flag}")), "README.md does not list the flag --{flag}");
    }
}

#[test]
fn the_example_config_file_is_read() {
    use strait::config::Settings;
    use strait::config::args::ServeFlags;
    let flags = ServeFlags { config: Some(root().join("config/strait.toml")), ..ServeFlags::default() };
    let settings = Settings::resolve(&flags).unwrap();
    assert_eq!(settings.default_profile, "cskv-80");
    assert!(settings.profiles.iter().any(|p| p.name == "mine"));
}
