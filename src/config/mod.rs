//! What the operator asked for, made into what will run. Flags win over environment variables, these over the
//! `--config` file, these over defaults; each default gives its reason here. Nothing that is accepted is ignored.

pub mod args;
pub mod profiles;

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use crate::adapters::BaseChoice;
use crate::config::args::{Bytes, DeviceArg, DtypeArg, KernelsArg, LogFormat, ServeFlags};
use crate::config::profiles::{DEFAULT_PROFILE, builtin};
use crate::kv::layout::Profile;
use crate::model::weights::LoadDtype;

/// What a server will run, before the model is known.
#[derive(Clone, Debug)]
pub struct Settings {
    pub host: IpAddr,
    pub port: u16,
    pub api_keys: Vec<String>,
    pub admin_api_key: Option<String>,
    /// Origins as browsers send them, or `*`.
    pub allowed_origins: Vec<String>,
    pub served_model_names: Vec<String>,
    pub max_model_len: Option<u32>,
    pub dtype: LoadDtype,
    pub device: DeviceArg,
    /// Whether a device may run kernels of its own architecture, and the library's.
    pub own_kernels: bool,
    pub threads: usize,
    pub kv_cache_memory_bytes: Option<u64>,
    pub profiles: Vec<Profile>,
    /// Names of those that the config file defines.
    pub defined: Vec<String>,
    /// Name of one of `profiles`, or of one that only the artifact has.
    pub default_profile: String,
    pub compression: Option<PathBuf>,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: u32,
    pub max_queued_requests: usize,
    pub prefix_caching: bool,
    pub shutdown_timeout: Duration,
    pub adapters: AdapterSettings,
    pub log_format: LogFormat,
    pub seed: Option<u64>,
}

/// What is asked for of adapters.
#[derive(Clone, Debug, Default)]
pub struct AdapterSettings {
    pub modules: Vec<AdapterModule>,
    pub root: Option<PathBuf>,
    pub discover: bool,
    pub memory_bytes: Option<u64>,
    pub device_memory_bytes: Option<u64>,
    pub max_rank: usize,
    /// Where decompositions of the base are kept; `None` where there is no such place.
    pub cache_dir: Option<PathBuf>,
}

impl AdapterSettings {
    /// Whether any can be loaded.
    pub fn any(&self) -> bool {
        !self.modules.is_empty() || self.root.is_some()
    }
}

/// One adapter of `--lora-modules`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterModule {
    pub name: String,
    pub path: PathBuf,
    pub base: BaseChoice,
}

/// Why the settings cannot run. One sentence with cause and mend.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the config file {}: {source}; check the path given to --config", .path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("the config file {} is not valid: {reason}", .path.display())]
    Toml { path: PathBuf, reason: String },
    #[error("cannot read the API key file {}: {source}; check the path given to --api-key-file", .path.display())]
    KeyFile { path: PathBuf, source: std::io::Error },
    #[error("the API key file {} holds no key; write one key per line, # begins a comment", .path.display())]
    NoKeys { path: PathBuf },
    #[error("an API key is empty; give a key of at least one character")]
    EmptyKey,
    #[error("--allowed-origins has {text:?}, which {fault}")]
    Origin { text: String, fault: &'static str },
    #[error("there is no cache profile {name:?}; choose one of {known}, or define it under [profiles] in the config file")]
    UnknownProfile { name: String, known: String },
    #[error("cache profile {name:?}: {fault}")]
    BadProfile { name: String, fault: String },
    #[error("--lora-modules has {text:?}, which is {fault}; write name=folder, or JSON with name and path")]
    LoraModule { text: String, fault: String },
    #[error("--lora-discover looks for adapters in --lora-root, which is not given")]
    DiscoverNowhere,
    #[error("--lora-root {} is not a folder; make it, or name another", .path.display())]
    LoraRoot { path: PathBuf },
    #[error("--{flag} is {value}; it must be {want}")]
    Range { flag: &'static str, value: String, want: &'static str },
    #[error(
        "--max-num-batched-tokens is {tokens}, and {seqs} sequences need at least {least} (a token each, and a page of a prompt); raise it or lower --max-num-seqs"
    )]
    StepTooSmall { tokens: u32, seqs: usize, least: usize },
}

impl Settings {
    /// Resolves flags (already merged with the environment) against the config file and defaults.
    ///
    /// # Errors
    /// One [`ConfigError`] for the first thing that cannot be.
    pub fn resolve(flags: &ServeFlags) -> Result<Settings, ConfigError> {
        let file = match &flags.config {
            Some(path) => args::File::read(path)?,
            None => args::File::default(),
        };
        let flags = flags.clone().or(file.flags);
        let (mut profiles, mut defined) = (builtin(), Vec::new());
        for (name, profile) in file.profiles {
            let profile = profile.resolve(&name)?;
            defined.push(name.clone());
            match profiles.iter_mut().find(|p| p.name == name) {
                Some(_) if name == "full" => {
                    return Err(ConfigError::BadProfile { name, fault: "full is the exact cache and cannot be redefined".into() });
                }
                Some(known) => *known = profile,
                None => profiles.push(profile),
            }
        }
        let wanted = flags.cache_profile.unwrap_or_else(|| DEFAULT_PROFILE.into());
        // An artifact may have profiles of its own.
        if flags.compression.is_none() && profiles.iter().all(|p| p.name != wanted) {
            return Err(ConfigError::UnknownProfile { name: wanted, known: names(&profiles) });
        }
        let mut api_keys = flags.api_key;
        if let Some(path) = &flags.api_key_file {
            api_keys.extend(read_keys(path)?);
        }
        if api_keys.iter().chain(&flags.admin_api_key).any(|k| k.is_empty()) {
            return Err(ConfigError::EmptyKey);
        }
        let threads = flags.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
        // A decode batch of 64 already reads the weights once for 64 tokens; more only lengthens each step.
        let max_num_seqs = flags.max_num_seqs.unwrap_or(64);
        // On a CPU a step of 512 prompt tokens keeps the matrix units busy, and a decode waits for it at most once.
        let max_num_batched_tokens = flags.max_num_batched_tokens.unwrap_or((max_num_seqs as u32).saturating_add(64).max(512));
        // Beyond this a client waits longer than it is patient; it is told to come back instead.
        let max_queued_requests = flags.max_queued_requests.unwrap_or(256);
        let range = |flag, value: String, want, ok: bool| if ok { Ok(()) } else { Err(ConfigError::Range { flag, value, want }) };
        range("threads", threads.to_string(), "from 1 to 1024", (1..=1024).contains(&threads))?;
        range("max-num-seqs", max_num_seqs.to_string(), "from 1 to 4096", (1..=4096).contains(&max_num_seqs))?;
        range("max-queued-requests", max_queued_requests.to_string(), "at least 1", max_queued_requests >= 1)?;
        if let Some(n) = flags.max_model_len {
            range("max-model-len", n.to_string(), "at least 2", n >= 2)?;
        }
        let least = max_num_seqs + 64;
        if (max_num_batched_tokens as usize) < least {
            return Err(ConfigError::StepTooSmall { tokens: max_num_batched_tokens, seqs: max_num_seqs, least });
        }
        // Long enough for an ordinary answer to end; below Kubernetes' default of 30 s would cut streams for nothing.
        let shutdown_timeout = flags.shutdown_timeout.unwrap_or(30.0);
        range(
            "shutdown-timeout",
            shutdown_timeout.to_string(),
            "a number of seconds from 0 to 86400",
            (0.0..=86400.0).contains(&shutdown_timeout),
        )?;
        let adapters = AdapterSettings {
            modules: lora_modules(&flags.lora_modules)?,
            discover: flags.lora_discover.unwrap_or(false),
            memory_bytes: flags.lora_memory_bytes.map(|Bytes(n)| n),
            device_memory_bytes: flags.lora_device_memory_bytes.map(|Bytes(n)| n),
            // As most trainers go: PiSSA's habit is 128, and converting doubles it.
            max_rank: flags.max_lora_rank.unwrap_or(256),
            cache_dir: flags.cache_dir.or_else(cache_dir),
            root: flags.lora_root,
        };
        range("max-lora-rank", adapters.max_rank.to_string(), "from 1 to 65536", (1..=65536).contains(&adapters.max_rank))?;
        if adapters.discover && adapters.root.is_none() {
            return Err(ConfigError::DiscoverNowhere);
        }
        if let Some(path) = adapters.root.as_ref().filter(|r| !r.is_dir()) {
            return Err(ConfigError::LoraRoot { path: path.clone() });
        }
        Ok(Settings {
            // A server without keys is for this machine alone until its operator says otherwise.
            host: flags.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            port: flags.port.unwrap_or(8000),
            api_keys,
            admin_api_key: flags.admin_api_key,
            allowed_origins: allowed_origins(&flags.allowed_origins)?,
            served_model_names: flags.served_model_name,
            max_model_len: flags.max_model_len,
            dtype: match flags.dtype.unwrap_or(DtypeArg::Auto) {
                DtypeArg::Auto => LoadDtype::Auto,
                DtypeArg::Bf16 => LoadDtype::Bf16,
                DtypeArg::F32 => LoadDtype::F32,
            },
            device: flags.device.unwrap_or(DeviceArg::Cpu),
            own_kernels: flags.device_kernels.unwrap_or(KernelsArg::Auto) == KernelsArg::Auto,
            threads,
            kv_cache_memory_bytes: flags.kv_cache_memory_bytes.map(|Bytes(n)| n),
            profiles,
            defined,
            default_profile: wanted,
            compression: flags.compression,
            max_num_seqs,
            max_num_batched_tokens,
            max_queued_requests,
            prefix_caching: !flags.no_enable_prefix_caching.unwrap_or(false),
            shutdown_timeout: Duration::from_secs_f64(shutdown_timeout),
            adapters,
            log_format: flags.log_format.unwrap_or(LogFormat::Text),
            seed: flags.seed,
        })
    }
}

/// Names of profiles, for a message.
pub fn names(profiles: &[Profile]) -> String {
    profiles.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// `strait` in the user's cache folder, by the XDG convention.
pub fn cache_dir() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    dir("XDG_CACHE_HOME").or_else(|| dir("HOME").map(|h| h.join(".cache"))).map(|d| d.join("strait"))
}

/// `--allowed-origins`: one each, several in one value, or vLLM's JSON list.
fn allowed_origins(texts: &[String]) -> Result<Vec<String>, ConfigError> {
    let mut out = Vec::new();
    for text in texts {
        let fault = |fault| ConfigError::Origin { text: text.clone(), fault };
        let items: Vec<String> = if text.trim_start().starts_with('[') {
            serde_json::from_str(text).map_err(|_| fault("is no JSON list of origins"))?
        } else {
            text.split([',', ' ']).filter(|item| !item.is_empty()).map(str::to_owned).collect()
        };
        out.extend(items.iter().map(|item| origin(item).map_err(fault)).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(out)
}

/// An origin as browsers send it: in lower case, without the port that its scheme has anyway.
fn origin(text: &str) -> Result<String, &'static str> {
    let text = text.to_ascii_lowercase();
    if text == "*" {
        return Ok(text);
    }
    if text == "null" {
        return Err(
            "is what every local file and every sandboxed frame is called, whoever wrote it; serve the page from an origin of its own, or allow *",
        );
    }
    let (scheme, host) = text.split_once("://").ok_or("names no scheme; write it as https://app.example or http://localhost:3000")?;
    let fits = |part: &str, also: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c));
    if !fits(scheme, "+-.") || !fits(host, "-._:[]") {
        return Err("is no origin: those end with the host or its port, without a path, and have no wildcards");
    }
    let default = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => "",
    };
    Ok(format!("{scheme}://{}", host.strip_suffix(default).unwrap_or(host)))
}

/// `--lora-modules`: vLLM's two spellings, and several in one value, as an environment variable has them.
fn lora_modules(texts: &[String]) -> Result<Vec<AdapterModule>, ConfigError> {
    let mut out = Vec::new();
    for text in texts {
        let fault = |fault: &str| ConfigError::LoraModule { text: text.clone(), fault: fault.to_owned() };
        if text.trim_start().starts_with(['{', '[']) {
            let value: serde_json::Value = serde_json::from_str(text).map_err(|_| fault("not valid JSON"))?;
            let list = if let serde_json::Value::Array(list) = value { list } else { vec![value] };
            for one in list {
                let known = ["name", "path", "base", "base_model_name"]; // the last as vLLM has it: there is one model here
                if let Some(key) = one.as_object().and_then(|map| map.keys().find(|key| !known.contains(&key.as_str()))) {
                    return Err(fault(&format!("of an adapter with {key:?}, which is none of name, path and base")));
                }
                if one.get("base").is_some_and(|base| !base.is_string()) {
                    return Err(fault("of a base that is no string"));
                }
                let get = |key: &str| one.get(key).and_then(|v| v.as_str()).filter(|s| !s.is_empty());
                let (Some(name), Some(path)) = (get("name"), get("path")) else { return Err(fault("without a name or a path")) };
                let base = get("base").unwrap_or("auto").parse().map_err(|e: String| fault(&format!("of a base that {e}")))?;
                out.push(AdapterModule { name: name.into(), path: path.into(), base });
            }
        } else {
            for one in text.split_whitespace() {
                let Some((name, path)) = one.split_once('=').filter(|(n, p)| !n.is_empty() && !p.is_empty()) else {
                    return Err(fault("neither name=folder nor JSON"));
                };
                out.push(AdapterModule { name: name.into(), path: path.into(), base: BaseChoice::Auto });
            }
        }
    }
    Ok(out)
}

/// One key per line; `#` begins a comment, at the start of a line or behind white space.
fn read_keys(path: &PathBuf) -> Result<Vec<String>, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::KeyFile { path: path.clone(), source })?;
    let keys: Vec<String> = text.lines().map(without_comment).filter(|key| !key.is_empty()).map(Into::into).collect();
    if keys.is_empty() { Err(ConfigError::NoKeys { path: path.clone() }) } else { Ok(keys) }
}

fn without_comment(line: &str) -> &str {
    let comment = |&at: &usize| line[..at].chars().next_back().is_none_or(char::is_whitespace);
    let end = line.match_indices('#').map(|(at, _)| at).find(comment).unwrap_or(line.len());
    line[..end].trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_written_as_browsers_send_them() {
        let read = |texts: &[&str]| allowed_origins(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>()).map_err(|e| e.to_string());
        for (texts, want) in [
            (&["*"][..], &["*"][..]),
            (&["https://App.example", "http://localhost:3000"], &["https://app.example", "http://localhost:3000"]),
            (
                &["https://a.example:443,http://b.example:80 http://c.example:8080"],
                &["https://a.example", "http://b.example", "http://c.example:8080"],
            ),
            (&[r#"["https://a.example", "*"]"#], &["https://a.example", "*"]),
            (&["app://obsidian.md", "http://[::1]:3000"], &["app://obsidian.md", "http://[::1]:3000"]),
            (&[], &[]),
        ] {
            assert_eq!(read(texts), Ok(want.iter().map(|w| (*w).to_owned()).collect()), "{texts:?}");
        }
        for bad in [
            "null",
            "localhost:3000",
            "https://",
            "://a",
            "https://a.example/",
            "https://a.example/app",
            "https://*.example",
            "[1]",
            "https://a@b",
        ] {
            let said = read(&[bad]).expect_err(bad);
            assert!(said.starts_with("--allowed-origins has ") && said.contains(&format!("{bad:?}")), "{said}");
        }
    }

    #[test]
    fn what_an_adapter_to_load_is_said_to_be_is_read_whole_or_refused() {
        let read = |text: &str| lora_modules(&[text.to_owned()]).map_err(|e| e.to_string());
        for text in [r#"{"name":"p","path":"x","base_model_name":"m"}"#, r#"[{"name":"p","path":"x","base":"auto"}]"#, "p=x"] {
            let read = read(text).unwrap();
            assert_eq!((read.len(), read[0].name.as_str(), &read[0].base), (1, "p", &BaseChoice::Auto), "{text}");
        }
        for (text, why) in [
            (r#"{"name":"p","path":"x","pinned":true}"#, "with \"pinned\", which is none of name, path and base"),
            (r#"{"name":"p","path":"x","base":["pissa"]}"#, "of a base that is no string"),
            (r#"{"name":"p","path":"x","base":"other"}"#, "of a base that must be auto"),
            (r#"{"name":"p"}"#, "without a name or a path"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_comment_is_no_part_of_a_key() {
        for (line, key) in [
            ("sk-a", "sk-a"),
            ("  sk-a\t", "sk-a"),
            ("sk-a # of Ann", "sk-a"),
            ("sk-a\t#of Ann # too", "sk-a"),
            ("sk#a", "sk#a"),
            ("# sk-a", ""),
            ("  #sk-a", ""),
            ("", ""),
        ] {
            assert_eq!(without_comment(line), key, "{line:?}");
        }
    }
}
