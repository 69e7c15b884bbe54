//! From tasks, files and a server to cells of a report: makes sheets of questions, has them answered, scores them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use futures_util::{StreamExt, TryStreamExt};
use serde_json::Value;

use super::ask::{Answer, AskError, Client};
use super::report::Cell;
use super::score::{Rule, changed, wilson};
use super::tasks::{FitError, Material, Question, Style, Task, example, fit, seed_of};

/// Why there is no report. Each is one sentence with cause and mend.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Fit(#[from] FitError),
    #[error("--lengths has {length}, and the model takes at most {context} tokens; lower it")]
    TooLong { length: u32, context: u32 },
    #[error(
        "the shortest prompt of {task} has {least} tokens, and of a context of {context} an answer of {answer} leaves {room}; no --lengths will do: ask a model of a longer context, or let it have one"
    )]
    NoRoom { task: String, least: u32, context: u32, answer: u32, room: u32 },
    #[error("--lengths has 0; prompts have at least one token")]
    NoLength,
    #[error("--n is 0; ask at least one question of each kind")]
    NoQuestions,
    #[error("cannot read {}: {reason}; check the path", .path.display())]
    Read { path: PathBuf, reason: String },
    #[error("{} is not UTF-8 (byte {at}); convert it", .path.display())]
    NotUtf8 { path: PathBuf, at: usize },
    #[error("{} {what}", .path.display())]
    Content { path: PathBuf, what: String },
}

/// Questions of one task and length: asked alike under every profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Sheet {
    pub task: String,
    pub length: Option<u32>,
    pub questions: Vec<Question>,
}

/// What one profile answered to a sheet.
#[derive(Clone, Debug, PartialEq)]
pub struct Marked {
    pub answers: Vec<Answer>,
    pub scores: Vec<f64>,
}

/// Reads a UTF-8 text.
///
/// # Errors
/// [`RunError::Read`], [`RunError::NotUtf8`], and [`RunError::Content`] where nothing but white space is in it.
pub fn read_text(path: &Path) -> Result<String, RunError> {
    let bytes = std::fs::read(path).map_err(|e| RunError::Read { path: path.into(), reason: e.to_string() })?;
    let text = String::from_utf8(bytes).map_err(|e| RunError::NotUtf8 { path: path.into(), at: e.utf8_error().valid_up_to() })?;
    if text.trim().is_empty() {
        return Err(RunError::Content { path: path.into(), what: "holds no text; give one that does".to_owned() });
    }
    Ok(text)
}

/// Checks lengths against what the model takes.
///
/// # Errors
/// [`RunError::NoLength`], [`RunError::TooLong`].
pub fn check_lengths(lengths: &[u32], context: Option<u32>) -> Result<(), RunError> {
    match lengths.iter().find(|&&n| n == 0 || context.is_some_and(|c| n > c)) {
        Some(0) => Err(RunError::NoLength),
        Some(&length) => Err(RunError::TooLong { length, context: context.unwrap_or(u32::MAX) }),
        None => Ok(()),
    }
}

/// `n` questions of `task` whose prompts fill `length` tokens, or what the model's context leaves beside the answer where
/// that is less.
///
/// # Errors
/// [`RunError`].
pub async fn sheet(client: &Client, task: Task, length: u32, n: usize, seed: u64, material: Material<'_>) -> Result<Sheet, RunError> {
    let name = task.to_string();
    let answer = task.max_tokens(material.style);
    let room = client.context.map_or(length, |c| c.saturating_sub(answer));
    let budget = length.min(room);
    let count = async |question: &Question| client.count(question).await;
    let mut material = material;
    if task == Task::Vt && material.style == Style::Ruler {
        // A worked example of at most 500 tokens, as RULER has; none where it would take more than a quarter of the prompt.
        let of_first = seed_of(seed, task, length, 0);
        let fitted = fit(&name, 500.min(budget / 4), task.least(), |size| example(of_first, size), count).await?;
        material.example = fitted.ok().map(|(_, _, size)| size);
    }
    let mut questions = Vec::new();
    for index in 0..n {
        let seed = seed_of(seed, task, length, index);
        match fit(&name, budget, task.least(), |size| task.question(seed, size, material), count).await? {
            Ok((question, ..)) => questions.push(question),
            // What was asked for is not what it lacks.
            Err(FitError::TooShort { task, least, budget: room }) if room < length => {
                return Err(RunError::NoRoom { task, least, context: client.context.unwrap_or(length), answer, room });
            }
            Err(other) => return Err(other.into()),
        }
    }
    Ok(Sheet { task: name, length: Some(length), questions })
}

/// Has a sheet answered under `profile`, `at_once` questions at a time; `heard` is called after each.
///
/// # Errors
/// The first [`AskError`], after which nothing more is asked.
pub async fn answers(client: &Client, sheet: &Sheet, profile: Option<&str>, at_once: usize, heard: impl Fn()) -> Result<Marked, AskError> {
    let asking = sheet.questions.iter().enumerate().map(|(index, question)| {
        let heard = &heard;
        async move {
            let label = format!("{}/{:?}/{index}", sheet.task, sheet.length);
            let answer = client.ask(question, profile, &label).await;
            heard();
            answer
        }
    });
    let answers: Vec<Answer> = futures_util::stream::iter(asking).buffered(at_once.max(1)).try_collect().await?;
    let scores = sheet.questions.iter().zip(&answers).map(|(q, a)| q.rule.score(&a.text, &q.references)).collect();
    Ok(Marked { answers, scores })
}

/// The line of a report that a marked sheet makes, beside that of `full`; `None` for a sheet without questions.
pub fn cell(sheet: &Sheet, profile: Option<&str>, marked: &Marked, full: Option<&Marked>) -> Option<Cell> {
    let of = |value: fn(&Answer) -> Option<f64>| {
        let all: Option<Vec<f64>> = marked.answers.iter().map(value).collect();
        all.filter(|all| !all.is_empty()).map(|all| all.iter().sum::<f64>() / all.len() as f64)
    };
    let (prompt, bytes) = (of(|a| a.prompt_tokens.map(f64::from)), of(|a| a.cache_bytes.map(|b| b as f64)));
    // Of all requests together: short answers must not count as much as long ones.
    let after_first: f64 = marked.answers.iter().filter_map(|a| a.completion_tokens).map(|n| f64::from(n.saturating_sub(1))).sum();
    let seconds: f64 = marked.answers.iter().map(|a| a.decode.as_secs_f64()).sum();
    let against = full.map(|full| changed(&full.scores, &marked.scores));
    Some(Cell {
        task: sheet.task.clone(),
        profile: profile.map(str::to_owned),
        length: sheet.length,
        n: marked.scores.len(),
        accuracy: wilson(&marked.scores)?,
        lost: against.map(|a| a.0),
        won: against.map(|a| a.1),
        prompt_tokens: prompt,
        cache_bytes: bytes,
        cache_bytes_per_prompt_token: bytes.zip(prompt).map(|(b, p)| b / p),
        decode_tokens_per_second: (after_first > 0.0 && seconds > 0.0).then(|| after_first / seconds),
    })
}

/// Questions of a JSONL file, by task and target length. A line is an object with
///
/// - `messages` (an array), or `prompt` or `input` (a string, completed as it stands);
/// - `gold`: a word, right when it is the answer's last one, or any other text, right when it occurs; or `outputs`, a list
///   of which the share that occurs counts;
/// - perhaps `task` (a name), `target` (the length in tokens it was made for) and `max_tokens` (96 without).
///
/// With `lengths`, only lines whose `target` is among them.
///
/// # Errors
/// [`RunError`], naming the first line that is none of this.
pub fn read_questions(path: &Path, lengths: &[u32]) -> Result<Vec<Sheet>, RunError> {
    let text = read_text(path)?;
    let bad = |line: usize, what: &str| RunError::Content { path: path.into(), what: format!("is no file of prompts: line {line} {what}") };
    let mut sheets: BTreeMap<(String, Option<u32>), Vec<Question>> = BTreeMap::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value: Value = serde_json::from_str(line).map_err(|e| bad(i + 1, &format!("is not JSON ({e})")))?;
        let target = value["target"].as_u64().and_then(|n| u32::try_from(n).ok());
        let task = value["task"].as_str().unwrap_or("prompts").to_owned();
        let question = question(&value).map_err(|what| bad(i + 1, what))?;
        if lengths.is_empty() || target.is_some_and(|t| lengths.contains(&t)) {
            sheets.entry((task, target)).or_default().push(question);
        }
    }
    if sheets.is_empty() {
        let what = "has no prompt whose \"target\" is one of --lengths; leave that out to take all".to_owned();
        return Err(RunError::Content { path: path.into(), what });
    }
    Ok(sheets.into_iter().map(|((task, length), questions)| Sheet { task, length, questions }).collect())
}

fn question(value: &Value) -> Result<Question, &'static str> {
    let prompt = ["messages", "prompt", "input"].iter().map(|key| &value[key]).find(|v| !v.is_null());
    let prompt = prompt.ok_or("has neither \"messages\" nor \"prompt\"")?;
    let whole = match prompt {
        Value::Array(messages) => !messages.is_empty() && messages.iter().all(|m| m["role"].is_string()),
        Value::String(text) => !text.is_empty(),
        _ => false,
    };
    if !whole {
        return Err("has a prompt that is neither a text nor a list of messages");
    }
    let text = |v: &Value| match v {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let (rule, references) = match (&value["gold"], &value["outputs"]) {
        (Value::Null, Value::Array(all)) if !all.is_empty() => {
            (Rule::Found, all.iter().map(text).collect::<Option<Vec<_>>>().ok_or("has \"outputs\" that are not texts")?)
        }
        (gold, _) => {
            let gold = text(gold).ok_or("has neither a \"gold\" answer nor \"outputs\"")?;
            let word = gold.chars().all(|c| c.is_alphanumeric() || c == '-');
            (if word { Rule::LastWord } else { Rule::Found }, vec![gold])
        }
    };
    let max_tokens = match &value["max_tokens"] {
        Value::Null => 96,
        given => given.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0).ok_or("has a \"max_tokens\" that is no count")?,
    };
    Ok(Question { prompt: prompt.clone(), continues: false, rule, references, max_tokens })
}

/// Cuts the tokens of a text into sequences of `length`, each begun with `begin`; at most `n`. What is left over at the end
/// is not used.
///
/// # Errors
/// [`RunError::Content`] where not one is full.
pub fn sequences(path: &Path, tokens: &[u32], begin: &[u32], length: u32, n: usize) -> Result<Vec<Vec<u32>>, RunError> {
    let own = (length as usize).saturating_sub(begin.len());
    let whole = tokens.len().checked_div(own).unwrap_or(0);
    if whole == 0 {
        let what = format!("has {} tokens, too few for a sequence of {length}; give a longer text or lower --lengths", tokens.len());
        return Err(RunError::Content { path: path.into(), what });
    }
    Ok(tokens.chunks_exact(own).take(n).map(|c| begin.iter().chain(c).copied().collect()).collect())
}
