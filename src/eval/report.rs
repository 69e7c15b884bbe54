//! What was measured, as a table for people and as JSON for machines.

use std::fmt;

use serde::Serialize;

use super::score::Estimate;

/// Where the numbers come from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Origin {
    pub model: String,
    /// In this process, or a server's address.
    pub asked: String,
    /// Where the bases of the compressed profiles came from, if that is known.
    pub bases: Option<String>,
}

/// Answers to questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answers {
    #[serde(flatten)]
    pub origin: Origin,
    /// Of generated prompts.
    pub seed: Option<u64>,
    /// Of tasks that have several wordings.
    pub style: Option<&'static str>,
    pub interval: &'static str,
    pub cells: Vec<Cell>,
}

/// One task at one length under one profile.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    pub task: String,
    /// None for a server that knows no cache profiles.
    pub profile: Option<String>,
    /// Tokens that prompts were made for; none where a file gave them.
    pub length: Option<u32>,
    pub n: usize,
    /// Mean score, from 0 to 1.
    pub accuracy: Estimate,
    /// Prompts whose score is below, and above, that of `full`; none for `full` itself, and where it was not asked.
    pub lost: Option<usize>,
    pub won: Option<usize>,
    pub prompt_tokens: Option<f64>,
    /// Mean over requests of all cache pages held at the end.
    pub cache_bytes: Option<f64>,
    pub cache_bytes_per_prompt_token: Option<f64>,
    /// Of one request, from its first token on, while `--max-concurrency` of them run.
    pub decode_tokens_per_second: Option<f64>,
}

/// How accuracies get their intervals.
pub const WILSON: &str = "95 %: Wilson's, over prompts; wider than need be for scores that are fractions";

/// How means over tokens get their intervals.
pub const STUDENT: &str = "95 %: Student's t over blocks of 64 neighbouring tokens";

/// Columns of text, the first ones flush left.
pub(super) fn table(f: &mut fmt::Formatter<'_>, left: usize, rows: &[Vec<String>]) -> fmt::Result {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (c, text) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c] - text.chars().count());
            let gap = if c == 0 { "" } else { "  " };
            line += &if c < left { format!("{gap}{text}{pad}") } else { format!("{gap}{pad}{text}") };
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

fn or_dash<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

fn percent(e: Estimate) -> [String; 2] {
    [format!("{:.1} %", 100.0 * e.mean), format!("{:.1} .. {:.1}", 100.0 * e.low, 100.0 * e.high)]
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.model, self.asked)?;
        match &self.bases {
            Some(bases) => write!(f, ", bases {bases}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.origin)?;
        if let Some(seed) = self.seed {
            write!(f, ", seed {seed}")?;
        }
        if let Some(style) = self.style {
            write!(f, ", style {style}")?;
        }
        writeln!(f, "; intervals {}", self.interval)?;
        let header = [
            "task",
            "profile",
            "length",
            "n",
            "accuracy",
            "interval",
            "lost",
            "won",
            "prompt tokens",
            "cache bytes",
            "per prompt token",
            "decode tokens/s",
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for c in &self.cells {
            let [accuracy, interval] = percent(c.accuracy);
            rows.push(vec![
                c.task.clone(),
                or_dash(c.profile.clone(), |p| p),
                or_dash(c.length, |n| n.to_string()),
                c.n.to_string(),
                accuracy,
                interval,
                or_dash(c.lost, |n| n.to_string()),
                or_dash(c.won, |n| n.to_string()),
                or_dash(c.prompt_tokens, |n| format!("{n:.0}")),
                or_dash(c.cache_bytes, |n| format!("{n:.0}")),
                or_dash(c.cache_bytes_per_prompt_token, |n| format!("{n:.0}")),
                or_dash(c.decode_tokens_per_second, |n| format!("{n:.1}")),
            ]);
        }
        table(f, 2, &rows)
    }
}

/// What forced text came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forced {
    #[serde(flatten)]
    pub origin: Origin,
    pub interval: &'static str,
    /// Whether perplexities or divergences were asked for: which columns the table has.
    #[serde(skip)]
    pub kl: bool,
    pub rows: Vec<ForcedRow>,
}

/// One profile at one length. Logarithms are natural.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ForcedRow {
    pub profile: Option<String>,
    /// Tokens of a sequence, and of its prompt.
    pub length: u32,
    pub prompt: u32,
    pub sequences: usize,
    /// Tokens scored.
    pub tokens: u32,
    pub perplexity: Estimate,
    /// Perplexity over that of `full` on the same tokens.
    pub ratio: Option<Estimate>,
    /// Mean divergence of `full`'s distribution from this profile's.
    pub kl: Option<Estimate>,
    /// Share of tokens where both think the same token likeliest.
    pub top1: Option<Estimate>,
}

impl fmt::Display for Forced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; intervals {}", self.origin, self.interval)?;
        let common = ["profile", "length", "prompt", "sequences", "tokens"];
        let own: &[&str] = if self.kl {
            &["KL(full, it)", "interval", "same top token", "interval"]
        } else {
            &["perplexity", "interval", "over full", "interval"]
        };
        let mut rows = vec![common.iter().chain(own).map(|s| (*s).to_owned()).collect()];
        let four = |e: Estimate| [format!("{:.4}", e.mean), format!("{:.4} .. {:.4}", e.low, e.high)];
        for r in &self.rows {
            let mut row = vec![
                or_dash(r.profile.clone(), |p| p),
                r.length.to_string(),
                r.prompt.to_string(),
                r.sequences.to_string(),
                r.tokens.to_string(),
            ];
            let none = || ["-".to_owned(), "-".to_owned()];
            if self.kl {
                row.extend(r.kl.map_or_else(none, four));
                row.extend(r.top1.map_or_else(none, percent));
            } else {
                row.extend(four(r.perplexity));
                row.extend(r.ratio.map_or_else(none, four));
            }
            rows.push(row);
        }
        table(f, 1, &rows)
    }
}
