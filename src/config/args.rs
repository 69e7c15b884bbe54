//! The command line and the config file, as their users write them. Field names are the flags.

use crate::kv::layout::Init;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::adapters::BaseChoice;
use crate::config::ConfigError;
use crate::config::profiles::ProfileFile;

/// Serve long contexts from a compressed KV cache, over the OpenAI API.
///
/// Without a subcommand, serves the built-in demo model on http://127.0.0.1:8000.
#[derive(Parser, Debug)]
#[command(name = "strait", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub serve: ServeFlags,
}

impl Cli {
    /// The command line, and of the environment what it does not say.
    ///
    /// # Errors
    /// What clap would end the program with, be it help.
    pub fn read<T: Into<std::ffi::OsString> + Clone>(args: impl IntoIterator<Item = T>) -> Result<Cli, clap::Error> {
        let matches = Cli::command().try_get_matches_from(args)?;
        let mut cli = Cli::from_arg_matches(&matches)?;
        match (&mut cli.command, matches.subcommand()) {
            (None, _) => cli.serve.settle(&matches)?,
            (Some(Command::Serve(serve)), Some((_, matches))) => serve.flags.settle(matches)?,
            _ => {}
        }
        Ok(cli)
    }
}

/// What the program can do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve a model over HTTP.
    Serve(Box<Serve>),
    /// Say exactly what fits: bytes per token, tokens and requests, per cache profile.
    Plan(Plan),
    /// Calibrate a model and write its compression artifact: closed form, or trained from there.
    Compress(Compress),
    /// Measure what cache profiles cost in quality: retrieval, perplexity, divergence.
    #[command(subcommand)]
    Eval(Box<Eval>),
    /// Load, unload, list and roll back the adapters of a running server; verify and inspect adapter folders.
    #[command(subcommand)]
    Adapter(Box<Adapter>),
}

/// `strait adapter`.
#[derive(Subcommand, Debug)]
pub enum Adapter {
    /// Load an adapter into a running server, or replace one.
    Load(AdapterLoad),
    /// Take an adapter away from a running server; requests on it finish.
    Unload(AdapterName),
    /// List the adapters of a running server, and what they take.
    List(AdapterServer),
    /// Point a name back to the generation before.
    Rollback(AdapterRollback),
    /// Read an adapter folder as the server would, and say what it is or why it is not served.
    Verify(AdapterFolder),
    /// Write an adapter of any format that is served as a plain LoRA on the original base.
    Convert(AdapterConvert),
    /// Report the spectral health of an adapter: ranks, norms, intruder dimensions.
    Inspect(AdapterInspect),
}

/// Which running server.
#[derive(Args, Debug)]
pub struct AdapterServer {
    /// The server: http://host:port.
    #[arg(long, default_value = "http://127.0.0.1:8000", env = "STRAIT_URL")]
    pub url: String,
    /// Its admin key, needed where it has one, and from other machines [default: the environment variable STRAIT_ADMIN_API_KEY, then STRAIT_API_KEY].
    #[arg(long)]
    pub api_key: Option<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// `strait adapter load`.
#[derive(Args, Debug)]
pub struct AdapterLoad {
    /// The name clients then use as `model`.
    pub name: String,
    /// Its folder, on the server's side: below its --lora-root, or relative to it.
    pub path: String,
    /// Replace what the name points to.
    #[arg(long)]
    pub in_place: bool,
    /// Never take it out of memory.
    #[arg(long)]
    pub pin: bool,
    /// Only if the name points to this generation now.
    #[arg(long, value_name = "GENERATION")]
    pub expect: Option<String>,
    /// The weights it was trained on: auto, original, pissa, residual:FOLDER or initial:FOLDER.
    #[arg(long, default_value = "auto")]
    pub base: BaseChoice,
    #[command(flatten)]
    pub server: AdapterServer,
}

/// `strait adapter unload`.
#[derive(Args, Debug)]
pub struct AdapterName {
    pub name: String,
    #[command(flatten)]
    pub server: AdapterServer,
}

/// `strait adapter rollback`.
#[derive(Args, Debug)]
pub struct AdapterRollback {
    pub name: String,
    /// The generation to go back to [default: the one before].
    #[arg(long)]
    pub generation: Option<String>,
    #[command(flatten)]
    pub server: AdapterServer,
}

/// `strait adapter verify`.
#[derive(Args, Debug)]
pub struct AdapterFolder {
    /// The adapter's folder.
    pub path: PathBuf,
    /// The base: a Hugging Face-format folder; the built-in demo model when left out.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// The weights it was trained on: auto, original, pissa, residual:FOLDER or initial:FOLDER.
    #[arg(long, default_value = "auto")]
    pub base: BaseChoice,
    /// Largest rank that is served.
    #[arg(long, default_value_t = 256)]
    pub max_lora_rank: usize,
    /// Folder where decompositions of the base are kept [default: strait in the user's cache folder].
    #[arg(long, env = "STRAIT_CACHE_DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Print JSON instead of text.
    #[arg(long)]
    pub json: bool,
}

/// `strait adapter convert`.
#[derive(Args, Debug)]
pub struct AdapterConvert {
    #[command(flatten)]
    pub folder: AdapterFolder,
    /// The new folder.
    #[arg(long)]
    pub out: PathBuf,
}

/// `strait adapter inspect`.
#[derive(Args, Debug)]
pub struct AdapterInspect {
    #[command(flatten)]
    pub folder: AdapterFolder,
    /// Leading left singular vectors of the tuned weights that are looked at.
    #[arg(short, long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub k: u16,
    /// A vector whose largest cosine with the base's is below this is an intruder.
    #[arg(long, default_value_t = 0.5)]
    pub epsilon: f64,
    /// Also draw the report as this SVG file.
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// Also write the adapter, its intruders scaled down, to this new folder.
    #[arg(long, value_name = "FOLDER")]
    pub repair: Option<PathBuf>,
    /// What intruders are scaled by.
    #[arg(long, default_value_t = 0.75, requires = "repair")]
    pub lambda: f64,
}

/// `strait serve`.
#[derive(Args, Debug)]
pub struct Serve {
    /// A Hugging Face-format folder; the built-in demo model when left out.
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub flags: ServeFlags,
}

/// `strait plan`.
#[derive(Args, Debug)]
pub struct Plan {
    /// A Hugging Face-format folder, of which config.json is enough; the built-in demo model when left out.
    pub model: Option<PathBuf>,
    /// Bytes of the cache: a number, or one with KiB, MiB, GiB [default: 4GiB].
    #[arg(long, env = "STRAIT_KV_CACHE_MEMORY_BYTES")]
    pub kv_cache_memory_bytes: Option<Bytes>,
    /// Lengths of request to count, in tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [4096u32, 32768, 131072])]
    pub lengths: Vec<u32>,
    /// Type of the weights in memory, and so of exact keys and values [default: auto, as stored].
    #[arg(long, value_enum, env = "STRAIT_DTYPE")]
    pub dtype: Option<DtypeArg>,
    /// Compression artifact of this model, whose ranks and profiles count [default: what is built in, or the profiles' shares].
    #[arg(long, env = "STRAIT_COMPRESSION")]
    pub compression: Option<PathBuf>,
    /// TOML file of a server: its cache profiles, and those of the settings above that are not given here.
    #[arg(long, env = "STRAIT_CONFIG")]
    pub config: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// `strait compress`.
#[derive(Args, Debug)]
pub struct Compress {
    /// A Hugging Face-format folder; the built-in demo model when left out.
    pub model: Option<PathBuf>,
    /// Where to write the artifact.
    #[arg(long)]
    pub out: PathBuf,
    /// UTF-8 text to calibrate on; what the model says by itself when left out.
    #[arg(long)]
    pub text: Option<PathBuf>,
    /// Seed of what the model says by itself.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Tokens to calibrate on, at most.
    #[arg(long, default_value_t = 16384)]
    pub tokens: usize,
    /// Leave the built-in profiles as they are without an artifact, at the same ranks in every layer; otherwise each is spread like a budget.
    #[arg(long)]
    pub uniform: bool,
    /// Also make profiles of so many bytes per token over all layers, named budget-BYTES: spread over layers, keys and values, ranks
    /// and bits by what they buy.
    #[arg(long, value_delimiter = ',', value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..))]
    pub budget: Vec<u32>,
    /// How bases are found.
    #[arg(long, value_enum, default_value_t = InitArg::Weighted)]
    pub init: InitArg,
    /// Type of the weights in memory: that which the model will be served with, of whose exact cache profiles take a share [default: auto,
    /// as stored].
    #[arg(long, value_enum, env = "STRAIT_DTYPE")]
    pub dtype: Option<DtypeArg>,
    /// Worker threads [default: all cores].
    #[arg(long, env = "STRAIT_THREADS")]
    pub threads: Option<usize>,
    /// TOML file of a server: its cache profiles, and those of these settings that are not given here.
    #[arg(long, env = "STRAIT_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub train: Train,
}

/// The flags of `strait compress` that train what it computed.
#[derive(Args, Debug)]
pub struct Train {
    /// Also train the maps of compressed profiles by so many steps of gradient descent per layer.
    #[arg(long, requires = "train_dir", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub train_steps: Option<u64>,
    /// Directory of the training: the same command goes on there after it was killed.
    #[arg(long, requires = "train_steps")]
    pub train_dir: Option<PathBuf>,
    /// What training minimises.
    #[arg(long, value_enum, default_value_t = LossArg::Attention, requires = "train_steps")]
    pub train_loss: LossArg,
    /// Highest learning rate, relative to the root mean square of what is trained.
    #[arg(long, default_value_t = 0.02, requires = "train_steps")]
    pub train_lr: f64,
    /// Profiles to train [default: all that compress].
    #[arg(long, value_delimiter = ',', requires = "train_steps")]
    pub train_profiles: Vec<String>,
}

/// `--train-loss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LossArg {
    /// Of keys and values: the paper's.
    Reconstruction,
    /// Of what attention, which sees its window exactly, adds to the residual stream.
    Attention,
}

/// `strait eval`: one measurement.
#[derive(Subcommand, Debug)]
pub enum Eval {
    /// LongEval lines: one of many numbered lines.
    Lines(Generated),
    /// LongEval topics: the first of several conversations.
    Topics(Generated),
    /// RULER needles: numbers or UUIDs hidden in a text.
    Niah(Niah),
    /// RULER variable tracking: a chain of assignments hidden in noise.
    Vt(Vt),
    /// One of many keys with a number.
    Kv(Generated),
    /// The prompts of a JSONL file, with their answers.
    Prompts(Prompts),
    /// Perplexity of a text, each token read over the compressed past.
    Ppl(Forced),
    /// Divergence from the exact cache, and agreement on the likeliest token, on a text.
    Kl(Forced),
}

/// Whom to ask.
#[derive(Args, Debug)]
pub struct Asked {
    /// A Hugging Face-format folder; the built-in demo model when left out.
    #[arg(conflicts_with = "url")]
    pub model: Option<PathBuf>,
    /// Ask this OpenAI-compatible server instead: http://host:port.
    #[arg(long)]
    pub url: Option<String>,
    /// Key of that server; prefer the environment variable STRAIT_API_KEY, as arguments are visible to others.
    #[arg(long, requires = "url")]
    pub api_key: Option<String>,
    /// Model of that server [default: the first it lists].
    #[arg(long, requires = "url")]
    pub model_name: Option<String>,
    /// Seconds that server may take for one answer [default: 600].
    #[arg(long, requires = "url", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,
    /// Cache profiles to compare [default: all].
    #[arg(long, value_delimiter = ',')]
    pub profiles: Vec<String>,
    /// TOML file of a server: its cache profiles, and those of its settings that are not given here.
    #[arg(long, conflicts_with = "url")]
    pub config: Option<PathBuf>,
    /// Compression artifact of the model [default: computed at start].
    #[arg(long, conflicts_with = "url")]
    pub compression: Option<PathBuf>,
    /// Worker threads [default: all cores].
    #[arg(long, short, conflicts_with = "url")]
    pub threads: Option<usize>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// How questions are asked.
#[derive(Args, Debug)]
pub struct Asking {
    #[command(flatten)]
    pub asked: Asked,
    /// Bytes of the KV cache: a number, or one with KiB, MiB, GiB [default: from the memory that weights leave free].
    #[arg(long, conflicts_with = "url")]
    pub kv_cache_memory_bytes: Option<Bytes>,
    /// Questions that are asked at once. Decode speeds are those of one request among so many.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub max_concurrency: u16,
    /// Also write every answer, with its question and score, to this JSONL file.
    #[arg(long)]
    pub answers: Option<PathBuf>,
}

/// `strait eval lines`, `topics`, `kv`, and what other generated tasks have in common with them.
#[derive(Args, Debug)]
pub struct Generated {
    #[command(flatten)]
    pub asking: Asking,
    /// Tokens of a prompt; it fills 85 to 100 % of that.
    #[arg(long, value_delimiter = ',', default_values_t = [1024u32, 4096])]
    pub lengths: Vec<u32>,
    /// Questions for each length, asked under every profile.
    #[arg(long, default_value_t = 50)]
    pub n: usize,
    /// The same seed makes the same questions.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `strait eval vt`.
#[derive(Args, Debug)]
pub struct Vt {
    #[command(flatten)]
    pub generated: Generated,
    /// Words of the task [default: ruler; plain for the built-in demo model, which knows no others].
    #[arg(long, value_enum)]
    pub style: Option<StyleArg>,
    /// Do not begin the model's answer for it, as RULER does: for servers that cannot continue a message.
    #[arg(long)]
    pub no_answer_prefix: bool,
}

/// `--style`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StyleArg {
    /// As the benchmark has them.
    Ruler,
    /// A few plain words, five-digit numbers, no beginning of the answer.
    Plain,
}

/// `strait eval niah`.
#[derive(Args, Debug)]
pub struct Niah {
    #[command(flatten)]
    pub vt: Vt,
    /// Kinds of needle, by RULER's names [default: single_1, multikey_1, multivalue, multiquery].
    #[arg(long, value_delimiter = ',')]
    pub kinds: Vec<String>,
    /// UTF-8 text to hide needles in, where the kind has prose [default: generated sentences].
    #[arg(long)]
    pub haystack: Option<PathBuf>,
}

/// `strait eval prompts`.
#[derive(Args, Debug)]
pub struct Prompts {
    #[command(flatten)]
    pub asking: Asking,
    /// JSONL: `messages` or `prompt`, `gold` or `outputs`, perhaps `task`, `target`, `max_tokens`.
    #[arg(long)]
    pub file: PathBuf,
    /// Only prompts whose `target` is one of these [default: all].
    #[arg(long, value_delimiter = ',')]
    pub lengths: Vec<u32>,
}

/// `strait eval ppl` and `kl`.
#[derive(Args, Debug)]
pub struct Forced {
    #[command(flatten)]
    pub asked: Asked,
    /// UTF-8 text to measure on.
    #[arg(long)]
    pub text: PathBuf,
    /// Tokens of a sequence.
    #[arg(long, value_delimiter = ',', default_values_t = [1024u32])]
    pub lengths: Vec<u32>,
    /// Sequences of each length, at most.
    #[arg(long, default_value_t = 16)]
    pub n: usize,
    /// Under this adapter: what a cache costs whose bases were made without it.
    #[arg(long, conflicts_with = "url")]
    pub adapter: Option<PathBuf>,
    /// The weights that adapter was trained on: auto, original, pissa, residual:FOLDER or initial:FOLDER.
    #[arg(long, default_value = "auto", requires = "adapter")]
    pub adapter_base: BaseChoice,
    /// Share of a sequence that is prompt, prefilled exactly and not scored; the rest is read token by token.
    #[arg(long, default_value_t = 0.5)]
    pub prompt_share: f64,
}

/// Flags of a server; each also an environment variable and a key of the config file.
#[derive(Args, Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct ServeFlags {
    /// TOML file with any of these settings, and cache profiles.
    #[arg(long, env = "STRAIT_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Address to listen on [default: 127.0.0.1].
    #[arg(long, env = "STRAIT_HOST")]
    pub host: Option<IpAddr>,
    /// Port to listen on; 0 takes a free one [default: 8000].
    #[arg(long, short, env = "STRAIT_PORT")]
    pub port: Option<u16>,
    /// Key that clients must present as bearer token; may be repeated. Prefer --api-key-file: arguments are visible to others.
    #[arg(long, env = "STRAIT_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_key: Vec<String>,
    /// File with one API key per line; # begins a comment.
    #[arg(long, env = "STRAIT_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Key for /admin routes, and for loading and unloading adapters [default: none; callers on this machine may].
    #[arg(long, env = "STRAIT_ADMIN_API_KEY", hide_env_values = true)]
    pub admin_api_key: Option<String>,
    /// Origin whose web pages may use the server (scheme://host:port), or * for any; may be repeated [default: none but its own pages].
    #[arg(long, env = "STRAIT_ALLOWED_ORIGINS")]
    pub allowed_origins: Vec<String>,
    /// Name of the model in the API; may be repeated [default: the folder's name].
    #[arg(long, alias = "alias", env = "STRAIT_SERVED_MODEL_NAME", value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    /// Longest sequence, prompt and answer together [default: what the model was made for].
    #[arg(long, alias = "ctx-size", alias = "context-length", env = "STRAIT_MAX_MODEL_LEN")]
    pub max_model_len: Option<u32>,
    /// Type of the weights in memory [default: auto, as stored].
    #[arg(long, value_enum, env = "STRAIT_DTYPE")]
    pub dtype: Option<DtypeArg>,
    /// cpu, cuda, cuda:N, or auto: a CUDA device where there is one [default: cpu].
    #[arg(long, env = "STRAIT_DEVICE")]
    pub device: Option<DeviceArg>,
    /// Kernels of a CUDA device: auto, those of its own architecture, and cuBLASLt's, where they hold in a trial at start; or common, Strait's for
    /// all architectures [default: auto].
    #[arg(long, value_enum, env = "STRAIT_DEVICE_KERNELS")]
    pub device_kernels: Option<KernelsArg>,
    /// Worker threads [default: all cores].
    #[arg(long, short, env = "STRAIT_THREADS")]
    pub threads: Option<usize>,
    /// Bytes of the KV cache: a number, or one with KiB, MiB, GiB [default: from the memory that weights leave free].
    #[arg(long, env = "STRAIT_KV_CACHE_MEMORY_BYTES")]
    pub kv_cache_memory_bytes: Option<Bytes>,
    /// Cache profile of requests that name none: full, cskv-50, cskv-80, cskv-95, cskv-fast, or one of the config file [default: full].
    #[arg(long, env = "STRAIT_CACHE_PROFILE")]
    pub cache_profile: Option<String>,
    /// Compression artifact of this model [default: computed at start].
    #[arg(long, env = "STRAIT_COMPRESSION")]
    pub compression: Option<PathBuf>,
    /// Sequences that run at once [default: 64].
    #[arg(long, alias = "parallel", alias = "max-running-requests", env = "STRAIT_MAX_NUM_SEQS")]
    pub max_num_seqs: Option<usize>,
    /// Tokens computed in one step [default: 512].
    #[arg(long, alias = "chunked-prefill-size", env = "STRAIT_MAX_NUM_BATCHED_TOKENS")]
    pub max_num_batched_tokens: Option<u32>,
    /// Requests that may wait, with eight contexts of prompt tokens in all; one that finds fewer is taken whole, others are answered 429 [default: 256].
    #[arg(long, alias = "max-num-queued-reqs", env = "STRAIT_MAX_QUEUED_REQUESTS")]
    pub max_queued_requests: Option<usize>,
    /// Reuse the cache of equal prompt beginnings: the default, said aloud.
    #[arg(long, env = "STRAIT_ENABLE_PREFIX_CACHING", num_args = 0..=1, default_missing_value = "true")]
    pub enable_prefix_caching: Option<bool>,
    /// Compute every prompt from its start.
    #[arg(long, env = "STRAIT_NO_ENABLE_PREFIX_CACHING", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip)]
    pub no_enable_prefix_caching: Option<bool>,
    /// Seconds that running requests get to finish after SIGTERM [default: 30].
    #[arg(long, env = "STRAIT_SHUTDOWN_TIMEOUT")]
    pub shutdown_timeout: Option<f64>,
    /// Adapters to load at start: name=folder, or JSON {"name", "path", "base"}; may be repeated.
    #[arg(long, env = "STRAIT_LORA_MODULES", num_args = 1..)]
    pub lora_modules: Vec<String>,
    /// Folder that adapters may be loaded from while the server runs [default: none, so they may not].
    #[arg(long, env = "STRAIT_LORA_ROOT")]
    pub lora_root: Option<PathBuf>,
    /// Serve every adapter folder in --lora-root under its name, read when it is first asked for.
    #[arg(long, env = "STRAIT_LORA_DISCOVER", num_args = 0..=1, default_missing_value = "true")]
    pub lora_discover: Option<bool>,
    /// Bytes that adapters may take in memory together [default: an eighth of what weights leave free].
    #[arg(long, env = "STRAIT_LORA_MEMORY_BYTES")]
    pub lora_memory_bytes: Option<Bytes>,
    /// Bytes that adapters may take on a device together [default: an eighth of what weights, maps and a step leave free there].
    #[arg(long, env = "STRAIT_LORA_DEVICE_MEMORY_BYTES")]
    pub lora_device_memory_bytes: Option<Bytes>,
    /// Largest rank of an adapter [default: 256].
    #[arg(long, env = "STRAIT_MAX_LORA_RANK")]
    pub max_lora_rank: Option<usize>,
    /// Folder where decompositions of the base are kept, which PiSSA and SORSA need [default: strait in the user's cache folder].
    #[arg(long, env = "STRAIT_CACHE_DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Form of the log on stderr [default: text].
    #[arg(long, value_enum, env = "STRAIT_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Seed of requests that give none; they then repeat from start to start in the same order [default: random].
    #[arg(long, env = "STRAIT_SEED")]
    pub seed: Option<u64>,
}

impl ServeFlags {
    /// Two flags say one thing: one that was typed wins over an environment that has the other. Clap would refuse the two.
    fn settle(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let source = |id| matches.value_source(id);
        match (source("enable_prefix_caching"), source("no_enable_prefix_caching")) {
            (Some(ValueSource::CommandLine), Some(ValueSource::EnvVariable)) => self.no_enable_prefix_caching = None,
            (Some(ValueSource::EnvVariable), Some(ValueSource::CommandLine)) => self.enable_prefix_caching = None,
            (Some(_), Some(_)) => {
                let both =
                    "--enable-prefix-caching and --no-enable-prefix-caching cannot be used together, nor can their environment variables\n";
                return Err(clap::Error::raw(ErrorKind::ArgumentConflict, both).format(&mut Cli::command()));
            }
            _ => {}
        }
        Ok(())
    }

    /// What is set here, and from `other` what is not.
    pub fn or(self, other: ServeFlags) -> ServeFlags {
        let list = |a: Vec<String>, b: Vec<String>| if a.is_empty() { b } else { a };
        let caching = match (self.enable_prefix_caching, self.no_enable_prefix_caching) {
            (_, Some(no)) => Some(!no),
            (yes, None) => yes.or(other.enable_prefix_caching),
        };
        ServeFlags {
            config: self.config,
            host: self.host.or(other.host),
            port: self.port.or(other.port),
            api_key: list(self.api_key, other.api_key),
            api_key_file: self.api_key_file.or(other.api_key_file),
            admin_api_key: self.admin_api_key.or(other.admin_api_key),
            allowed_origins: list(self.allowed_origins, other.allowed_origins),
            served_model_name: list(self.served_model_name, other.served_model_name),
            max_model_len: self.max_model_len.or(other.max_model_len),
            dtype: self.dtype.or(other.dtype),
            device: self.device.or(other.device),
            device_kernels: self.device_kernels.or(other.device_kernels),
            threads: self.threads.or(other.threads),
            kv_cache_memory_bytes: self.kv_cache_memory_bytes.or(other.kv_cache_memory_bytes),
            cache_profile: self.cache_profile.or(other.cache_profile),
            compression: self.compression.or(other.compression),
            max_num_seqs: self.max_num_seqs.or(other.max_num_seqs),
            max_num_batched_tokens: self.max_num_batched_tokens.or(other.max_num_batched_tokens),
            max_queued_requests: self.max_queued_requests.or(other.max_queued_requests),
            enable_prefix_caching: caching,
            no_enable_prefix_caching: caching.map(|on| !on),
            shutdown_timeout: self.shutdown_timeout.or(other.shutdown_timeout),
            lora_modules: list(self.lora_modules, other.lora_modules),
            lora_root: self.lora_root.or(other.lora_root),
            lora_discover: self.lora_discover.or(other.lora_discover),
            lora_memory_bytes: self.lora_memory_bytes.or(other.lora_memory_bytes),
            lora_device_memory_bytes: self.lora_device_memory_bytes.or(other.lora_device_memory_bytes),
            max_lora_rank: self.max_lora_rank.or(other.max_lora_rank),
            cache_dir: self.cache_dir.or(other.cache_dir),
            log_format: self.log_format.or(other.log_format),
            seed: self.seed.or(other.seed),
        }
    }
}

/// The config file: the flags by their names, and a table of cache profiles.
#[derive(Debug, Default)]
pub struct File {
    pub flags: ServeFlags,
    pub profiles: BTreeMap<String, ProfileFile>,
}

impl File {
    /// Reads and checks a file; unknown keys are refused.
    ///
    /// # Errors
    /// Where it cannot be read, or is not what it should be.
    pub fn read(path: &Path) -> Result<File, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::File { path: path.into(), source })?;
        let bad = |reason: String| ConfigError::Toml { path: path.into(), reason: reason.trim().replace('\n', " ") };
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| bad(e.to_string()))?;
        let profiles = match table.remove("profiles") {
            Some(profiles) => profiles.try_into().map_err(|e: toml::de::Error| bad(format!("profiles: {e}")))?,
            None => BTreeMap::new(),
        };
        let flags = table.try_into().map_err(|e: toml::de::Error| bad(e.to_string()))?;
        Ok(File { flags, profiles })
    }
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DtypeArg {
    Auto,
    #[value(alias = "bfloat16")]
    #[serde(alias = "bfloat16")]
    Bf16,
    #[value(alias = "float32")]
    #[serde(alias = "float32")]
    F32,
}

/// `--init`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InitArg {
    /// Singular vectors of the projections' weights.
    Svd,
    /// Those of the weights scaled by the inputs they meet.
    Asvd,
    /// What loses the least of keys and values, errors counting the same everywhere.
    Closed,
    /// The same, errors counting as much as the queries that meet a key, and the output projection of a value, make of them.
    Weighted,
}

impl From<InitArg> for Init {
    fn from(arg: InitArg) -> Init {
        match arg {
            InitArg::Svd => Init::Svd,
            InitArg::Asvd => Init::Asvd,
            InitArg::Closed => Init::Closed,
            InitArg::Weighted => Init::Weighted,
        }
    }
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    Text,
    Json,
}

/// `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum DeviceArg {
    Auto,
    Cpu,
    Cuda(u32),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(DeviceArg::Auto),
            "cpu" => Ok(DeviceArg::Cpu),
            "cuda" => Ok(DeviceArg::Cuda(0)),
            _ => {
                let index = s.strip_prefix("cuda:").and_then(|n| n.parse().ok());
                index.map(DeviceArg::Cuda).ok_or_else(|| "choose auto, cpu or cuda[:n]".into())
            }
        }
    }
}

impl TryFrom<String> for DeviceArg {
    type Error = String;

    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

/// `--device-kernels`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelsArg {
    Auto,
    Common,
}

/// A number of bytes, as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "BytesFile")]
pub struct Bytes(pub u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum BytesFile {
    Number(u64),
    Text(String),
}

impl TryFrom<BytesFile> for Bytes {
    type Error = String;

    fn try_from(b: BytesFile) -> Result<Self, String> {
        match b {
            BytesFile::Number(n) => Ok(Bytes(n)),
            BytesFile::Text(s) => s.parse(),
        }
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let want = || "write a number of bytes, or one with KiB, MiB, GiB, TiB (1024s) or KB, MB, GB, TB (1000s)".to_owned();
        let digits = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
        let (number, unit) = s.split_at(digits);
        let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" | "k" => 1 << 10,
            "mib" | "m" => 1 << 20,
            "gib" | "g" => 1 << 30,
            "tib" | "t" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(want()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(scale).map(Bytes).ok_or_else(want);
        }
        let number: f64 = number.parse().map_err(|_| want())?;
        let bytes = number * scale as f64;
        if bytes.is_finite() && (0.0..1e18).contains(&bytes) { Ok(Bytes(bytes as u64)) } else { Err(want()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_people_write_them() {
        for (text, want) in
            [("0", 0), ("512", 512), ("4GiB", 4 << 30), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2g", 2 << 30), ("3KB", 3000)]
        {
            assert_eq!(text.parse(), Ok(Bytes(want)), "{text}");
        }
        for bad in ["", "GiB", "-1", "1 XB", "1e3", "99999999999999999999", "18446744073709551615KiB", "1.2.3"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
