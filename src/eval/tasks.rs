//! Questions about long prompts whose answers are known, made from a seed: LongEval's lines and topics, RULER's needles and
//! variable tracking, and look-up in a list of keys and values. The texts are those of the benchmarks, word for word.
//!
//! Every maker takes a `size`, the number of its smallest pieces (lines, sentences, turns), and nothing else decides how
//! long a prompt gets; [`fit`] finds the size for a length in tokens.

use std::collections::HashSet;
use std::fmt;

use serde_json::{Value, json};

use super::score::Rule;
use super::topics::conversations;
use super::words::Draw;

/// A prompt and what a right answer to it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// An array of chat messages, or a string: a prompt to complete as it stands.
    pub prompt: Value,
    /// The last message is the beginning of the answer, for the model to go on with.
    pub continues: bool,
    pub rule: Rule,
    /// What the rule looks for.
    pub references: Vec<String>,
    /// Tokens the answer may take.
    pub max_tokens: u32,
}

/// A generated task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Task {
    /// LongEval: one of many lines with a number.
    Lines,
    /// LongEval: the first of several conversations.
    Topics,
    /// RULER: sentences with a number hidden in a text.
    Niah(Niah),
    /// RULER: variables set to each other.
    Vt,
    /// One of many keys with a number, in plain words.
    Kv,
}

/// RULER's eight needles, by its names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Niah {
    /// One number in repeated sentences.
    Single1,
    /// One number in prose.
    Single2,
    /// One UUID in prose.
    Single3,
    /// Four keys with a number each in prose; one is asked for.
    MultiKey1,
    /// Nothing but keys with numbers; one is asked for.
    MultiKey2,
    /// Nothing but UUIDs as keys and as values; one is asked for.
    MultiKey3,
    /// One key with four numbers in prose.
    MultiValue,
    /// Four keys with a number each in prose; all are asked for.
    MultiQuery,
}

impl Niah {
    /// All of them, with their names.
    pub const ALL: [(Niah, &'static str); 8] = [
        (Niah::Single1, "single_1"),
        (Niah::Single2, "single_2"),
        (Niah::Single3, "single_3"),
        (Niah::MultiKey1, "multikey_1"),
        (Niah::MultiKey2, "multikey_2"),
        (Niah::MultiKey3, "multikey_3"),
        (Niah::MultiValue, "multivalue"),
        (Niah::MultiQuery, "multiquery"),
    ];
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Task::Lines => "lines",
            Task::Topics => "topics",
            Task::Vt => "vt",
            Task::Kv => "kv",
            Task::Niah(kind) => Niah::ALL.iter().find(|(known, _)| known == kind).map_or("niah", |(_, name)| name),
        })
    }
}

/// What goes into a question beside its seed and size.
#[derive(Clone, Copy, Debug, Default)]
pub struct Material<'a> {
    /// Sentences to hide needles in, repeated as needed; generated prose when empty.
    pub haystack: &'a [String],
    /// Noise lines of the worked example that variable tracking begins with; without one, none.
    pub example: Option<usize>,
    /// Leave out the beginning of the answer that RULER puts into the model's mouth.
    pub bare: bool,
    /// The words of RULER's tasks.
    pub style: Style,
}

/// How needles and variables are worded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Style {
    /// As RULER has them.
    #[default]
    Ruler,
    /// In the few plain words that the demo model was trained on: the code of a thing, five digits, no beginning of an
    /// answer; and for variables, the value of one that is set to another that is set to a third.
    Plain,
}

/// RULER's repeated sentences.
const NOISE: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Variables of a chain: one with a value, and four hops.
const CHAIN: usize = 5;

/// The seed of one question: prompts of one task, length and place are the same for every profile, and stay so when more are
/// asked for.
pub fn seed_of(seed: u64, task: Task, length: u32, index: usize) -> u64 {
    let hash = blake3::hash(format!("{seed}/{task}/{length}/{index}").as_bytes());
    let (head, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
    u64::from_le_bytes(*head)
}

impl Task {
    /// Tokens the answer may take.
    pub fn max_tokens(self, style: Style) -> u32 {
        match self {
            Task::Lines => 100,
            Task::Topics | Task::Kv => 50,
            Task::Niah(_) => 128,
            // Names alone, after a beginning that was given; a plain answer spells the chain out.
            Task::Vt if style == Style::Ruler => 30,
            Task::Vt => 64,
        }
    }

    /// The smallest size there is a question of.
    pub fn least(self) -> usize {
        match self {
            Task::Lines | Task::Kv => 2,
            Task::Topics | Task::Niah(_) => 1,
            // Every assignment of the chain goes to a place of its own.
            Task::Vt => CHAIN,
        }
    }

    /// The question of a seed and a size; `None` where words do not suffice for so large a one.
    pub fn question(self, seed: u64, size: usize, material: Material<'_>) -> Option<Question> {
        let mut draw = Draw::new(seed);
        let (text, prefix, rule, references) = match self {
            Task::Lines => lines(&mut draw, size)?,
            Task::Topics => topics(&mut draw, size)?,
            Task::Niah(kind) => niah(&mut draw, kind, size, material)?,
            Task::Vt if material.style == Style::Plain => variables(&mut draw, size)?,
            Task::Vt => tracking(&mut draw, size, material.example)?,
            Task::Kv => key_values(&mut draw, size)?,
        };
        let prefix = prefix.filter(|_| !material.bare);
        let mut prompt = vec![json!({ "role": "user", "content": text })];
        prompt.extend(prefix.as_ref().map(|p| json!({ "role": "assistant", "content": p })));
        Some(Question { prompt: prompt.into(), continues: prefix.is_some(), rule, references, max_tokens: self.max_tokens(material.style) })
    }
}

/// The user's text, the beginning of the answer, how it is scored, and against what.
type Made = (String, Option<String>, Rule, Vec<String>);

/// `n` different strings of `make`; `None` where it has not so many.
fn different(n: usize, mut make: impl FnMut() -> String) -> Option<Vec<String>> {
    let mut seen = HashSet::new();
    let mut all = Vec::with_capacity(n);
    // Where a quarter is used up, most draws still are new; this gives up only far beyond.
    for _ in 0..20 * n + 100 {
        if all.len() == n {
            break;
        }
        let one = make();
        if seen.insert(one.clone()) {
            all.push(one);
        }
    }
    (all.len() == n).then_some(all)
}

fn lines(draw: &mut Draw, n: usize) -> Option<Made> {
    let mut text = String::from(
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' at the \
         end of the line as a numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I \
         will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n",
    );
    let names = draw.names(n)?;
    // Different values, so that an answer from a wrong line is never right.
    let values = draw.distinct(50_000, n);
    for (name, value) in names.iter().zip(&values) {
        text += &format!("line {name}: REGISTER_CONTENT is <{}>\n", value + 1);
    }
    let asked = draw.below(n);
    text += &format!("\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {}? I need the number.", names[asked]);
    Some((text, None, Rule::LastNumber, vec![(values[asked] + 1).to_string()]))
}

fn key_values(draw: &mut Draw, n: usize) -> Option<Made> {
    let names = draw.names(n)?;
    let values = draw.distinct(90_000, n);
    let mut text = String::from("Here is a list of keys and values:\n");
    for (name, value) in names.iter().zip(&values) {
        text += &format!("key {name}: {}\n", value + 10_000);
    }
    let asked = draw.below(n);
    text += &format!("What is the value of key {}?", names[asked]);
    Some((text, None, Rule::LastNumber, vec![(values[asked] + 10_000).to_string()]))
}

fn topics(draw: &mut Draw, turns: usize) -> Option<Made> {
    let (topics, record) = conversations(draw, turns)?;
    let text = format!(
        "Below is a record of our previous conversation on {} different topics. You are the ASSISTANT, and I am the USER. At the beginning of each \
         topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask you to \
         retrieve the first topic. Now the record start. \n{record} Now the record ends. What is the first topic(s) we discussed? Only give me the \
         topic name. Do not summarize yourself.",
        topics.len()
    );
    Some((text, None, Rule::Found, vec![topics[0].to_owned()]))
}

fn niah(draw: &mut Draw, kind: Niah, size: usize, material: Material<'_>) -> Option<Made> {
    let Material { haystack, style, .. } = material;
    let uuids = matches!(kind, Niah::Single3 | Niah::MultiKey3);
    let what = if uuids { "uuids" } else { "numbers" };
    let needle = |key: &str, value: &str| match style {
        Style::Ruler => format!("One of the special magic {what} for {key} is: {value}."),
        Style::Plain => format!("The code of the {key} is {value}."),
    };
    let digits = if style == Style::Plain { 5 } else { 7 };
    // Keys with needles, values of each key, keys asked for, and needles that fill the haystack.
    let (keys, values, asked, fill) = match kind {
        Niah::Single1 | Niah::Single2 | Niah::Single3 => (1, 1, 1, 0),
        Niah::MultiKey1 => (4, 1, 1, 0),
        Niah::MultiKey2 | Niah::MultiKey3 => (1, 1, 1, size),
        Niah::MultiValue => (1, 4, 1, 0),
        Niah::MultiQuery => (4, 1, 4, 0),
    };
    let mut names = if kind == Niah::MultiKey3 { different(keys + fill, || draw.uuid())? } else { draw.names(keys + fill)? };
    let mut numbers = different(keys * values + fill, || if uuids { draw.uuid() } else { draw.number(digits) })?;
    let (filling_names, filling_numbers) = (names.split_off(keys), numbers.split_off(keys * values));
    let mut needles: Vec<String> =
        names.iter().zip(numbers.chunks(values)).flat_map(|(name, values)| values.iter().map(|v| needle(name, v))).collect();
    draw.shuffle(&mut needles);

    let context = match kind {
        Niah::Single1 | Niah::MultiKey2 | Niah::MultiKey3 => {
            let mut hay = match kind {
                Niah::Single1 => vec![NOISE.to_owned(); size],
                _ => filling_names.iter().zip(&filling_numbers).map(|(name, value)| needle(name, value)).collect(),
            };
            let mut places = draw.distinct(size, needles.len());
            // From the end, so that a place stays what it was drawn for.
            places.sort_unstable_by(|a, b| b.cmp(a));
            for (place, needle) in places.into_iter().zip(needles) {
                hay.insert(place, needle);
            }
            hay.join("\n")
        }
        _ => {
            let sentence = |i: usize, draw: &mut Draw| match haystack {
                [] => draw.sentence(),
                given => given[i % given.len()].clone(),
            };
            let mut hay: Vec<String> = (0..size).map(|i| sentence(i, draw)).collect();
            // Forty depths, from the first sentence to behind the last.
            let mut places: Vec<usize> = draw.distinct(40, needles.len()).into_iter().map(|depth| size * depth / 39).collect();
            places.sort_unstable_by(|a, b| b.cmp(a));
            for (place, needle) in places.into_iter().zip(needles) {
                hay.insert(place, needle);
            }
            hay.join(" ")
        }
    };

    names.truncate(asked);
    let query = match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{}, and {last}", rest.join(", ")),
        None => String::new(),
    };
    numbers.truncate(asked * values);
    let one = asked * values == 1;
    if style == Style::Plain {
        let ask = if one { "is the code" } else { "are all codes" };
        let text =
            format!("There is important info hidden inside a lot of text. Find it and remember it.\n{context}\nWhat {ask} of the {query}?");
        return Some((text, None, Rule::Found, numbers));
    }
    let (a, are, all, what) = if one { ("A", "is", "is", what.trim_end_matches('s')) } else { ("Some", "are", "are all", what) };
    let text = format!(
        "{a} special magic {what} {are} hidden within the following text. Make sure to memorize it. I will quiz you about the {what} \
         afterwards.\n{context}\nWhat {all} the special magic {what} for {query} mentioned in the provided text?"
    );
    let prefix = format!(" The special magic {what} for {query} mentioned in the provided text {are}");
    Some((text, Some(prefix), Rule::Found, numbers))
}

fn tracking(draw: &mut Draw, size: usize, example: Option<usize>) -> Option<Made> {
    // The example's draws come first, and always, so that the question is the same with and without it.
    let own = draw.bits();
    let mut text = String::new();
    if let Some(size) = example {
        text = worked(own, size)?;
    }
    let (asked, prefix, names) = chain(draw, size)?;
    Some((text + &asked, Some(prefix), Rule::Found, names))
}

/// Variables set to numbers, or to one of the forty before them, at most two hops deep; one of the deepest is asked for.
fn variables(draw: &mut Draw, size: usize) -> Option<Made> {
    let names = draw.names(size)?;
    let values = draw.distinct(90_000, size);
    let mut text = String::from("Here are some variables:\n");
    // Value and hops of each.
    let mut known: Vec<(usize, usize)> = Vec::with_capacity(size);
    for (i, name) in names.iter().enumerate() {
        let source = i.saturating_sub(40) + draw.below(i.clamp(1, 40));
        match known.get(source) {
            Some(&(value, hops)) if hops < 2 && draw.below(10) < 4 => {
                text += &format!("VAR {name} = VAR {}\n", names[source]);
                known.push((value, hops + 1));
            }
            _ => {
                let value = values[i] + 10_000;
                text += &format!("VAR {name} = {value}\n");
                known.push((value, 0));
            }
        }
    }
    let deepest = known.iter().map(|k| k.1).max()?;
    let candidates: Vec<usize> = (0..size).filter(|&i| known[i].1 == deepest).collect();
    let asked = *draw.pick(&candidates);
    text += &format!("What is the value of {}?", names[asked]);
    Some((text, None, Rule::LastNumber, vec![known[asked].0.to_string()]))
}

/// A question about a chain with its answer.
fn worked(seed: u64, size: usize) -> Option<String> {
    let (shown, prefix, names) = chain(&mut Draw::new(seed), size)?;
    Some(format!("{shown}{prefix}{}\n\n", names.join(" ")))
}

/// The worked example of variable tracking alone, to see how long it is.
pub fn example(seed: u64, size: usize) -> Option<Question> {
    let text = worked(Draw::new(seed).bits(), size)?;
    let prompt = json!([{ "role": "user", "content": text }]);
    Some(Question { prompt, continues: false, rule: Rule::Found, references: Vec::new(), max_tokens: 1 })
}

/// One chain hidden in noise: the question, the beginning of its answer, and the variables.
fn chain(draw: &mut Draw, size: usize) -> Option<(String, String, Vec<String>)> {
    let names = different(CHAIN, || draw.letters(5))?;
    let value = draw.number(5);
    let first = format!("VAR {} = {value}", names[0]);
    let hops = names.windows(2).map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0]));
    let statements: Vec<String> = std::iter::once(first).chain(hops).collect();
    let mut hay = vec![NOISE.to_owned(); size];
    let mut places = draw.distinct(size, CHAIN);
    if places.len() < CHAIN {
        return None;
    }
    places.sort_unstable();
    for (i, (place, statement)) in places.into_iter().zip(statements).enumerate() {
        hay.insert(place + i, statement);
    }
    let context = hay.join("\n");
    let text = format!(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables that are \
         assigned the value {value} in the text above."
    );
    let prefix = format!(
        " Answer: According to the chain(s) of variable assignment in the text above, {CHAIN} variables are assigned the value {value}, they are: "
    );
    Some((text, prefix, names))
}

/// The sentences of a text: pieces that end with `.`, `!` or `?` before white space, and what is left at the end.
pub fn sentences(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut begin = 0;
    for (at, _) in text.match_indices(char::is_whitespace) {
        if text[begin..at].ends_with(['.', '!', '?']) {
            all.push(text[begin..at].trim());
            begin = at;
        }
    }
    all.push(text[begin..].trim());
    all.retain(|s| !s.is_empty());
    all.into_iter().map(|s| s.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// Counts after which sizes are halved.
const SECANTS: usize = 8;

/// Why there is no prompt of a length.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FitError {
    #[error("the shortest prompt of {task} has {least} tokens, and {budget} are wanted; raise --lengths")]
    TooShort { task: String, least: u32, budget: u32 },
    #[error("the longest prompt of {task} has {most} tokens, and {budget} are wanted; lower --lengths")]
    TooLong { task: String, most: u32, budget: u32 },
}

/// A question whose prompt has 85 to 100 % of `budget` tokens, or the largest that fits where its pieces are too coarse for
/// that; how many it has, and its size. `make` gives the question of a size, `least` is the smallest, `count` the tokens of one.
///
/// Asks `count` a few times: sizes follow the secant through the latest two, and are halved between what fits and what
/// does not where that has not settled soon.
///
/// # Errors
/// [`FitError`] (inside the outer `Ok`) where there is none; what `count` refuses.
pub async fn fit<E>(
    name: &str,
    budget: u32,
    least: usize,
    make: impl Fn(usize) -> Option<Question>,
    count: impl AsyncFn(&Question) -> Result<u32, E>,
) -> Result<Result<(Question, u32, usize), FitError>, E> {
    // The largest that fits so far, and the smallest known not to.
    let mut fits: Option<(usize, u32, Question)> = None;
    let mut fails: Option<usize> = None;
    let mut latest: Option<(usize, u32)> = None;
    let mut size = least;
    let mut exhausted = false;
    for round in 0.. {
        match make(size) {
            None => (fails, exhausted) = (Some(size), true),
            Some(question) => {
                let tokens = count(&question).await?;
                let slope = latest
                    .filter(|&(s, t)| s != size && t != tokens)
                    .map(|(s, t)| (f64::from(tokens) - f64::from(t)) / (size as f64 - s as f64));
                latest = Some((size, tokens));
                if tokens <= budget {
                    let enough = u64::from(tokens) * 100 >= u64::from(budget) * 85;
                    fits = Some((size, tokens, question));
                    if enough {
                        break;
                    }
                } else if size == least {
                    return Ok(Err(FitError::TooShort { task: name.to_owned(), least: tokens, budget }));
                } else {
                    (fails, exhausted) = (Some(size), false);
                }
                let aim = slope.filter(|s| *s > 0.0).map(|slope| {
                    let step = (0.97 * f64::from(budget) - f64::from(tokens)) / slope;
                    (size as f64 + step).clamp(0.0, 1e9) as usize
                });
                // Without a slope yet, a second point not far away.
                size = aim.unwrap_or(size + 8);
            }
        }
        let low = fits.as_ref().map_or(least, |f| f.0);
        size = match fails {
            Some(high) if high - low <= 1 => break,
            Some(high) if size <= low || size >= high || exhausted || round >= SECANTS => low + (high - low) / 2,
            Some(_) => size,
            None => size.max(low + 1).min(low.saturating_mul(64)),
        };
    }
    Ok(match fits {
        Some((size, tokens, question)) if u64::from(tokens) * 100 >= u64::from(budget) * 85 || !exhausted => Ok((question, tokens, size)),
        Some((_, most, _)) => Err(FitError::TooLong { task: name.to_owned(), most, budget }),
        None => Err(FitError::TooShort { task: name.to_owned(), least: 0, budget }),
    })
}
