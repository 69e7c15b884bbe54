//! `strait eval`: puts a model of this process, or a server's, before the questions and texts of [`crate::eval`].
//!
//! A model of this process answers through the server's own router, without a socket: what is measured is what is served.

use std::collections::HashSet;
use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tower::ServiceExt;

use crate::adapters::registry::Lease;
use crate::config::args::{self, Asked, Asking, DeviceArg, ServeFlags, StyleArg};
use crate::config::{self, AdapterModule, ConfigError, Settings};
use crate::engine::thread::{EngineThread, Runner};
use crate::eval::ask::{Body, Client, Sending, Transport};
use crate::eval::forced::{Machine, Said, force};
use crate::eval::http::Http;
use crate::eval::report::{Answers, Forced, ForcedRow, Origin, STUDENT, WILSON};
use crate::eval::run::{self, Marked, RunError, Sheet};
use crate::eval::score::{Block, Estimate, student, wilson};
use crate::eval::tasks::{Material, Niah, Style, Task, sentences};
use crate::kv::layout::Profile;
use crate::model::checkpoint::Checkpoint;
use crate::serve::ready::{Bases, Source};
use crate::server::{self, Server};
use crate::telemetry::Telemetry;
use crate::text::first_tokens;

/// The exact profile, with which all others are compared.
const FULL: &str = "full";

/// How long a server may take for one answer, unless told: the longest wait its own queue allows.
const TIMEOUT: u64 = 600;

/// `strait eval`: measures, and prints a table or JSON.
///
/// # Errors
/// One sentence for what kept it from measuring.
pub fn eval(ask: &args::Eval) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (text, json) = runtime.block_on(async {
        Ok::<_, anyhow::Error>(match ask {
            args::Eval::Lines(g) => generated(g, &[Task::Lines], Material::default()).await?,
            args::Eval::Topics(g) => generated(g, &[Task::Topics], Material::default()).await?,
            args::Eval::Kv(g) => generated(g, &[Task::Kv], Material::default()).await?,
            args::Eval::Vt(v) => generated(&v.generated, &[Task::Vt], worded(v)).await?,
            args::Eval::Niah(n) => {
                let kinds = kinds(&n.kinds)?;
                let haystack = n.haystack.as_deref().map(run::read_text).transpose()?.map(|text| sentences(&text)).unwrap_or_default();
                generated(&n.vt.generated, &kinds, Material { haystack: &haystack, ..worded(&n.vt) }).await?
            }
            args::Eval::Prompts(p) => prompts(p).await?,
            args::Eval::Ppl(f) => forced(f, false).await?,
            args::Eval::Kl(f) => forced(f, true).await?,
        })
    })?;
    let asked = match ask {
        args::Eval::Lines(g) | args::Eval::Topics(g) | args::Eval::Kv(g) => &g.asking.asked,
        args::Eval::Vt(v) => &v.generated.asking.asked,
        args::Eval::Niah(n) => &n.vt.generated.asking.asked,
        args::Eval::Prompts(p) => &p.asking.asked,
        args::Eval::Ppl(f) | args::Eval::Kl(f) => &f.asked,
    };
    writeln!(std::io::stdout(), "{}", if asked.json { json } else { text }.trim_end())?;
    Ok(())
}

/// A report, for people and for machines.
type Report = (String, String);

fn report<R: std::fmt::Display + serde::Serialize>(report: &R) -> anyhow::Result<Report> {
    Ok((report.to_string(), serde_json::to_string_pretty(report)?))
}

/// Tells what was measured before something failed: hours may have gone into it.
fn tell(measured: &impl std::fmt::Display) {
    eprintln!("measured until it failed:\n{}", measured.to_string().trim_end());
}

/// Needles by name; one of each sort when none is named.
fn kinds(names: &[String]) -> anyhow::Result<Vec<Task>> {
    if names.is_empty() {
        return Ok([Niah::Single1, Niah::MultiKey1, Niah::MultiValue, Niah::MultiQuery].map(Task::Niah).to_vec());
    }
    let find = |name: &String| Niah::ALL.iter().find(|(_, known)| known == name).map(|(kind, _)| Task::Niah(*kind));
    names
        .iter()
        .map(|name| {
            let known = || Niah::ALL.map(|(_, known)| known).join(", ");
            find(name).with_context(|| format!("there is no kind of needle {name:?}; choose from {} with --kinds", known()))
        })
        .collect()
}

/// In which words a RULER task is put.
fn worded(ask: &args::Vt) -> Material<'static> {
    let asked = &ask.generated.asking.asked;
    let style = match ask.style {
        Some(StyleArg::Ruler) => Style::Ruler,
        Some(StyleArg::Plain) => Style::Plain,
        None if asked.model.is_none() && asked.url.is_none() => Style::Plain,
        None => Style::Ruler,
    };
    Material { style, bare: ask.no_answer_prefix, ..Material::default() }
}

async fn generated(ask: &args::Generated, tasks: &[Task], material: Material<'_>) -> anyhow::Result<Report> {
    if ask.n == 0 {
        bail!(RunError::NoQuestions);
    }
    run::check_lengths(&ask.lengths, None)?;
    let examiner = Examiner::open(&ask.asking).await?;
    run::check_lengths(&ask.lengths, examiner.client.context)?;
    let mut sheets = Vec::new();
    for &task in tasks {
        for &length in &ask.lengths {
            sheets.push(run::sheet(&examiner.client, task, length, ask.n, ask.seed, material).await?);
        }
    }
    let ruler = tasks.iter().all(|task| matches!(task, Task::Niah(_) | Task::Vt));
    let style = ruler.then_some(if material.style == Style::Plain { "plain" } else { "ruler" });
    examiner.examine(&sheets, &ask.asking, Some(ask.seed), style).await
}

async fn prompts(ask: &args::Prompts) -> anyhow::Result<Report> {
    let sheets = run::read_questions(&ask.file, &ask.lengths)?;
    Examiner::open(&ask.asking).await?.examine(&sheets, &ask.asking, None, None).await
}

/// A server to ask, with the engine behind it if that is in this process.
struct Examiner {
    client: Client,
    profiles: Vec<Option<String>>,
    origin: Origin,
    inside: Option<(Arc<Server>, EngineThread)>,
}

impl Drop for Examiner {
    fn drop(&mut self) {
        if let Some((server, thread)) = self.inside.take() {
            server.stop();
            // A panic of the engine has ended its requests with errors already.
            let _ = thread.join();
        }
    }
}

impl Examiner {
    async fn open(ask: &Asking) -> anyhow::Result<Examiner> {
        let timeout = Duration::from_secs(ask.asked.timeout.unwrap_or(TIMEOUT));
        if let Some(url) = &ask.asked.url {
            let key = ask.asked.api_key.clone().or_else(|| std::env::var("STRAIT_API_KEY").ok());
            let client = Client::open(Box::new(Http::new(url)?), key, ask.asked.model_name.clone(), timeout).await?;
            let profiles = full_first(client.choose(&ask.asked.profiles)?);
            let origin = Origin { model: client.model.clone(), asked: url.clone(), bases: None };
            return Ok(Examiner { client, profiles, origin, inside: None });
        }
        let settings = settings(&ask.asked, Some(ask))?;
        let telemetry = Arc::new(Telemetry::new("eval"));
        let ready = super::load(Source::of(ask.asked.model.as_ref()), &settings, &telemetry)?;
        check_known(&ask.asked, &ready.profile_specs)?;
        let server = Server::new(
            server::Config { seed: settings.seed, text_queue: super::text_queue(&settings), ..server::Config::new(super::PAGES) },
            telemetry,
        );
        let (summary, thread) = super::install(&server, ready)?;
        let inside = Some((server.clone(), thread));
        // A long prefill on one core may take an hour, and nobody else is waiting.
        let patience = Duration::from_secs(86_400);
        let client = Client::open(Box::new(Inside(server.router())), None, None, patience).await?;
        let profiles = full_first(client.choose(&ask.asked.profiles)?);
        let origin = Origin { model: summary.name, asked: "in process".to_owned(), bases: told(&summary.bases) };
        Ok(Examiner { client, profiles, origin, inside })
    }

    /// Has the sheets answered under every profile.
    async fn examine(&self, sheets: &[Sheet], ask: &Asking, seed: Option<u64>, style: Option<&'static str>) -> anyhow::Result<Report> {
        let mut file = match &ask.answers {
            None => None,
            Some(path) => Some(std::io::BufWriter::new(
                std::fs::File::create(path)
                    .with_context(|| format!("cannot write {}; choose another place for --answers", path.display()))?,
            )),
        };
        let bar = progress("asking {bar:32} {pos}/{len} questions, {eta} left");
        bar.set_length((self.profiles.len() * sheets.iter().map(|s| s.questions.len()).sum::<usize>()) as u64);
        let mut answers = Answers { origin: self.origin.clone(), seed, style, interval: WILSON, cells: Vec::new() };
        let mut ask_all = async || -> anyhow::Result<()> {
            for sheet in sheets {
                let mut full: Option<Marked> = None;
                for profile in &self.profiles {
                    let name = profile.as_deref();
                    let marked = run::answers(&self.client, sheet, name, usize::from(ask.max_concurrency), || bar.inc(1)).await?;
                    answers.cells.extend(run::cell(sheet, name, &marked, full.as_ref()));
                    if let Some(file) = &mut file {
                        write_answers(file, sheet, name, &marked).context("cannot write the file of --answers")?;
                    }
                    if name == Some(FULL) {
                        full = Some(marked);
                    }
                }
            }
            Ok(())
        };
        let asked = ask_all().await;
        bar.finish_and_clear();
        if asked.is_err() && !answers.cells.is_empty() {
            tell(&answers);
        }
        asked?;
        report(&answers)
    }
}

/// Each once, and `full` before all others, which are compared with it.
fn full_first(mut profiles: Vec<Option<String>>) -> Vec<Option<String>> {
    let mut seen = HashSet::new();
    profiles.retain(|name| seen.insert(name.clone()));
    profiles.sort_by_key(|name| name.as_deref() != Some(FULL));
    profiles
}

fn write_answers(file: &mut impl Write, sheet: &Sheet, profile: Option<&str>, marked: &Marked) -> std::io::Result<()> {
    for (question, (answer, score)) in sheet.questions.iter().zip(marked.answers.iter().zip(&marked.scores)) {
        let line = json!({
            "task": sheet.task, "length": sheet.length, "profile": profile, "prompt": question.prompt, "references": question.references,
            "answer": answer.text, "score": score, "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
        });
        writeln!(file, "{line}")?;
    }
    // Whole sheets at once, and none that the disk refused goes unheard.
    file.flush()
}

/// The router of a server in this process.
struct Inside(axum::Router);

impl Transport for Inside {
    fn send(&self, request: Request<Full<Bytes>>) -> Sending {
        let router = self.0.clone();
        Box::pin(async move {
            let response: Result<_, Infallible> = router.oneshot(request.map(axum::body::Body::new)).await;
            let Ok(response) = response;
            Ok(response.map(|body| -> Body { body.map_err(Into::into).boxed_unsync() }))
        })
    }
}

/// What a command line of this command says to a server's settings.
fn settings(asked: &Asked, asking: Option<&Asking>) -> anyhow::Result<Settings> {
    let at_once = asking.map_or(1, |a| usize::from(a.max_concurrency));
    let mut settings = Settings::resolve(&ServeFlags {
        config: asked.config.clone(),
        threads: asked.threads,
        compression: asked.compression.clone(),
        kv_cache_memory_bytes: asking.and_then(|a| a.kv_cache_memory_bytes),
        max_num_seqs: Some(at_once),
        max_queued_requests: Some(at_once),
        // A prompt whose beginning is in the prefix cache reads that compressed, where a cold one is prefilled exactly.
        no_enable_prefix_caching: Some(true),
        seed: Some(0),
        ..ServeFlags::default()
    })?;
    // A server is told how long its contexts may be where a window is shorter than the model; here nobody waits for longer ones. A
    // folder that has no answer is refused with the reason when it is opened.
    if let (None, Some(dir)) = (settings.max_model_len, &asked.model) {
        settings.max_model_len = Checkpoint::longest(dir).ok().and_then(|n| u32::try_from(n).ok());
    }
    // Before a model is loaded for nothing.
    if settings.compression.is_none() {
        check_known(asked, &settings.profiles)?;
    }
    Ok(settings)
}

fn check_known(asked: &Asked, profiles: &[Profile]) -> anyhow::Result<()> {
    match asked.profiles.iter().find(|name| profiles.iter().all(|p| p.name != **name)) {
        Some(name) => bail!(ConfigError::UnknownProfile { name: name.clone(), known: config::names(profiles) }),
        None => Ok(()),
    }
}

fn told(bases: &Bases) -> Option<String> {
    (*bases != Bases::default()).then(|| bases.to_string())
}

fn progress(template: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
    bar
}

async fn forced(ask: &args::Forced, kl: bool) -> anyhow::Result<Report> {
    if !(ask.prompt_share > 0.0 && ask.prompt_share < 1.0) {
        bail!("--prompt-share is {}; it is a share of the sequence, above 0 and below 1", ask.prompt_share);
    }
    if ask.n == 0 {
        bail!("--n is 0; score at least one sequence");
    }
    run::check_lengths(&ask.lengths, None)?;
    ask.lengths.iter().try_for_each(|&length| scored(ask, length).map(drop))?;
    let text = run::read_text(&ask.text)?;
    match &ask.asked.url {
        Some(_) if kl => bail!(
            "kl compares whole distributions, of which the API gives only the top; run it in process: leave out --url and give the model's folder"
        ),
        Some(url) => echoed(ask, url, &text).await,
        None => inside(ask, kl, &text),
    }
}

/// Tokens of the text that sequences of all lengths are cut from.
fn needed(ask: &args::Forced) -> usize {
    ask.lengths.iter().max().map_or(0, |&longest| ask.n.saturating_mul(longest as usize))
}

/// Tokens of a sequence that are its prompt.
fn prompt_of(ask: &args::Forced, length: u32) -> usize {
    ((f64::from(length) * ask.prompt_share) as usize).max(1)
}

/// Tokens of a sequence that are scored: those behind its prompt, but for the first, which follows from the exact prefill alone.
fn scored(ask: &args::Forced, length: u32) -> anyhow::Result<usize> {
    if length < 3 {
        bail!(
            "--lengths has {length}; a sequence has a token of prompt, one that follows from it, and one that is scored: give at least 3"
        );
    }
    match (length as usize - 1).checked_sub(prompt_of(ask, length)) {
        None | Some(0) => bail!(
            "--prompt-share is {}, which leaves none of a sequence of {length} tokens to score; lower it, or raise --lengths",
            ask.prompt_share
        ),
        Some(scored) => Ok(scored),
    }
}

/// The sequences of every length, of which there are enough for an interval: before hours go into the first.
fn sheets(ask: &args::Forced, tokens: &[u32], begin: &[u32]) -> anyhow::Result<Vec<(u32, Vec<Vec<u32>>)>> {
    let sheet = |&length: &u32| {
        let sequences = run::sequences(&ask.text, tokens, begin, length, ask.n)?;
        let scored = scored(ask, length)?;
        if sequences.len() * scored.div_ceil(64) < 2 {
            bail!(
                "{scored} scored tokens are too few for an interval, which takes two blocks of 64; raise --lengths or --n, give a longer text, or lower --prompt-share"
            );
        }
        Ok((length, sequences))
    };
    ask.lengths.iter().map(sheet).collect()
}

/// Perplexity by the log-probabilities of an echoed prompt.
async fn echoed(ask: &args::Forced, url: &str, text: &str) -> anyhow::Result<Report> {
    if !ask.asked.profiles.is_empty() {
        bail!(
            "over HTTP ppl knows no --profiles: what the API scores is a prompt, which is computed exactly whatever the profile; run it in process"
        );
    }
    let key = ask.asked.api_key.clone().or_else(|| std::env::var("STRAIT_API_KEY").ok());
    let timeout = Duration::from_secs(ask.asked.timeout.unwrap_or(TIMEOUT));
    let client = Client::open(Box::new(Http::new(url)?), key, ask.asked.model_name.clone(), timeout).await?;
    // One token more is asked for than is scored.
    run::check_lengths(&ask.lengths, client.context.map(|c| c.saturating_sub(1)))?;
    let (plain, special) = (client.tokenize("a", false).await?, client.tokenize("a", true).await?);
    let begin = &special[..special.len().saturating_sub(plain.len())];
    let tokens = first_tokens(text, needed(ask), async |text| client.tokenize(text, false).await).await?;
    let origin = Origin { model: client.model.clone(), asked: url.to_owned(), bases: None };
    let mut measured = Forced { origin, interval: STUDENT, kl: false, rows: Vec::new() };
    for (length, sequences) in sheets(ask, &tokens, begin)? {
        let prompt = prompt_of(ask, length);
        let mut said = Said::default();
        for (done, sequence) in sequences.iter().enumerate() {
            let scores = match client.score(sequence).await {
                Ok(scores) => scores,
                Err(failed) => {
                    measured.rows.extend(row(None, length, prompt, done, &said, false));
                    return Err(until(&measured, failed));
                }
            };
            // `scores[i]` is of token `i + 1`; the same tokens as in process.
            let scored = scores.get(prompt..).unwrap_or_default();
            said.surprise.extend(scored.chunks(64).map(|c| Block { n: c.len() as u32, sum: -c.iter().sum::<f64>() }));
        }
        measured.rows.push(row(None, length, prompt, sequences.len(), &said, false)?);
    }
    report(&measured)
}

/// What failed, once what was measured before is told.
fn until(measured: &Forced, failed: impl Into<anyhow::Error>) -> anyhow::Error {
    if !measured.rows.is_empty() {
        tell(measured);
    }
    failed.into()
}

/// Perplexity and divergence of a model of this process.
fn inside(ask: &args::Forced, kl: bool, text: &str) -> anyhow::Result<Report> {
    let mut settings = settings(&ask.asked, None)?;
    // Forced text is given to a decoder without an engine, and only the host has one for that.
    if settings.device != DeviceArg::Cpu {
        eprintln!("text is scored on the CPU; the config file's device is for serving");
        settings.device = DeviceArg::Cpu;
    }
    const WORN: &str = "--adapter";
    if let Some(path) = &ask.adapter {
        settings.adapters.modules.push(AdapterModule { name: WORN.into(), path: path.clone(), base: ask.adapter_base.clone() });
    }
    let telemetry = Arc::new(Telemetry::new("eval"));
    let mut ready = super::load(Source::of(ask.asked.model.as_ref()), &settings, &telemetry)?;
    check_known(&ask.asked, &ready.profile_specs)?;
    let lease = ready.adapters.resident(WORN);
    let delta = lease.as_ref().map(Lease::delta);
    let names: Vec<String> = ready.profile_specs.iter().map(|p| p.name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let chosen: Vec<&str> =
        if ask.asked.profiles.is_empty() { names.clone() } else { ask.asked.profiles.iter().map(String::as_str).collect() };
    let index = |name: &str| names.iter().position(|n| *n == name);
    let mut seen = HashSet::new();
    let lanes: Vec<usize> = chosen.iter().filter_map(|name| index(name)).filter(|lane| seen.insert(*lane)).collect();
    let full = index(FULL).context("the settings have no profile full")?;
    run::check_lengths(&ask.lengths, Some(ready.context))?;
    let tokenizer = &ready.opened.tokenizer;
    let (begin, tokens) = (tokenizer.encode("", true, false)?, tokenizer.encode_first(text, needed(ask))?);
    let bar = progress("reading {bar:32} {pos}/{len} sequences, {eta} left");
    let sheets = sheets(ask, &tokens, &begin)?;
    bar.set_length(sheets.iter().map(|s| s.1.len() as u64).sum());
    let Runner::Host(host) = &mut ready.parts.runner else { unreachable!("loaded for the CPU") };
    let (decoder, ops, profiles) = (&mut host.decoder, &*host.ops, &host.profiles);
    let mut machine = Machine { decoder, ops, profiles, names: &names, adapter: delta.as_deref() };
    let under = ask.adapter.as_ref().map_or_else(String::new, |path| format!(", adapter {}", path.display()));
    let origin = Origin { model: ready.names[0].clone(), asked: format!("in process{under}"), bases: told(&ready.bases) };
    let mut measured = Forced { origin, interval: STUDENT, kl, rows: Vec::new() };
    for (length, sequences) in sheets {
        let prompt = prompt_of(ask, length);
        let mut said = vec![Said::default(); lanes.len()];
        for (done, sequence) in sequences.iter().enumerate() {
            // One that fails in its midst was read under some profiles further than under others.
            let before = said.clone();
            if let Err(failed) = force(&mut machine, (full, &lanes), sequence, prompt, &mut said) {
                bar.finish_and_clear();
                measured.rows.extend(
                    lanes.iter().zip(&before).filter_map(|(&lane, said)| row(Some(names[lane]), length, prompt, done, said, true).ok()),
                );
                return Err(until(&measured, failed));
            }
            bar.inc(1);
        }
        for (&lane, said) in lanes.iter().zip(&said) {
            measured.rows.push(row(Some(names[lane]), length, prompt, sequences.len(), said, true)?);
        }
    }
    bar.finish_and_clear();
    report(&measured)
}

/// The line of one profile at one length.
fn row(profile: Option<&str>, length: u32, prompt: usize, sequences: usize, said: &Said, compared: bool) -> anyhow::Result<ForcedRow> {
    let tokens: u32 = said.surprise.iter().map(|b| b.n).sum();
    let surprise = student(&said.surprise).context("fewer than two blocks of tokens were scored")?;
    let over = |blocks: &[Block]| student(blocks).filter(|_| compared);
    Ok(ForcedRow {
        profile: profile.map(str::to_owned),
        length,
        prompt: prompt as u32,
        sequences,
        tokens,
        perplexity: surprise.map(f64::exp),
        ratio: over(&said.excess).map(|e| e.map(f64::exp)),
        kl: over(&said.divergence).map(|e| Estimate { low: e.low.max(0.0), ..e }),
        top1: over(&said.agreement).map(|e| agreement(e, &said.agreement)),
    })
}

/// Student's interval, widened to Wilson's where blocks vary too little to say anything: all of them agreeing is no proof
/// that the next will.
fn agreement(estimate: Estimate, blocks: &[Block]) -> Estimate {
    let each: Vec<f64> = blocks.iter().flat_map(|b| (0..b.n).map(|i| f64::from(u8::from(f64::from(i) < b.sum)))).collect();
    let wilson = wilson(&each).unwrap_or(estimate);
    Estimate { mean: estimate.mean, low: estimate.low.clamp(0.0, wilson.low), high: estimate.high.clamp(wilson.high, 1.0) }
}
