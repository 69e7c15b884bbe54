//! Ids to text while they arrive: nothing is said that later ids could change, and nothing of a stop string.

use std::sync::Arc;

use crate::ids::TokenId;
use crate::text::{StartState, Tokenizer};

/// How a text begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// It stands alone, as an answer in a chat does: the whole of it is [`Tokenizer::decode`] of all its ids.
    Alone,
    /// It goes on from a text, as a completion does, or the answer that goes on with a chat's last message: a leading space stays,
    /// whatever the tokenizer.
    Continues,
}

/// What a stream leaves out.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// Control tokens have no text.
    pub skip_special: bool,
    pub start: Start,
    /// The text ends before the first of these.
    pub stops: Stops,
    /// Before so many ids none of them ends it.
    pub min_tokens: u32,
}

/// Stop strings, made ready for search. Cloning shares them, as all choices of a request do.
#[derive(Clone, Debug, Default)]
pub struct Stops(Arc<[Stop]>);

/// One of them, for Knuth's, Morris' and Pratt's search.
#[derive(Debug)]
struct Stop {
    pattern: String,
    /// `fall[i]`: length of the longest proper border of `pattern[..=i]`.
    fall: Vec<usize>,
}

impl Stops {
    /// In this order; empty ones never match.
    pub fn new(texts: &[String]) -> Stops {
        Stops(texts.iter().map(|text| Stop::new(text)).collect())
    }

    /// The texts, in order.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|stop| stop.pattern.as_str())
    }
}

/// What one id added to the text.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Piece {
    /// Whole characters, final. Often empty, while a character or a stop string may be under way.
    pub text: String,
    /// Set once, when the text has ended: which of `stops` ended it. Later ids add nothing.
    pub stopped: Option<usize>,
}

/// The text of one sequence.
///
/// Stops are matched over bytes, across token edges. The match that is complete first wins; of several that end at
/// the same byte, the longest. O(bytes x stops) in all, amortised; holds back at most the longest stop string and
/// three bytes.
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    start: StartState,
    stops: Stops,
    /// How much of each stop string the text ends with just now.
    matched: Vec<usize>,
    /// Ids to come that no stop string ends the text with.
    free: u32,
    /// Bytes that came and are not said yet.
    held: Vec<u8>,
    ended: bool,
}

impl Stop {
    fn new(text: &str) -> Stop {
        let pattern = text.as_bytes();
        let mut fall = vec![0; pattern.len()];
        let mut k = 0;
        for i in 1..pattern.len() {
            while k > 0 && pattern[i] != pattern[k] {
                k = fall[k - 1];
            }
            k += usize::from(pattern[i] == pattern[k]);
            fall[i] = k;
        }
        Stop { pattern: text.to_owned(), fall }
    }

    /// Takes one more byte of a text that ends with `matched` bytes of the pattern; whether it now ends with the whole of it.
    fn step(&self, matched: &mut usize, byte: u8) -> bool {
        let pattern = self.pattern.as_bytes();
        if pattern.is_empty() {
            return false;
        }
        while *matched > 0 && pattern[*matched] != byte {
            *matched = self.fall[*matched - 1];
        }
        *matched += usize::from(pattern[*matched] == byte);
        let whole = *matched == pattern.len();
        if whole {
            // Whoever does not end here goes on with what may be the beginning of the next one.
            *matched = self.fall[*matched - 1];
        }
        whole
    }
}

impl TextStream {
    /// A stream at its start.
    pub fn new(tokenizer: Arc<Tokenizer>, options: StreamOptions) -> TextStream {
        let mut start = tokenizer.start(options.skip_special);
        if options.start == Start::Continues {
            start.forget();
        }
        let matched = vec![0; options.stops.0.len()];
        TextStream { tokenizer, start, stops: options.stops, matched, free: options.min_tokens, held: Vec::new(), ended: false }
    }

    /// Takes one more id.
    pub fn push(&mut self, id: TokenId) -> Piece {
        if self.ended {
            return Piece::default();
        }
        let old = self.held.len();
        let free = self.free > 0;
        self.free = self.free.saturating_sub(1);
        self.tokenizer.push_bytes(&mut self.start, id, &mut self.held);
        for at in old..self.held.len() {
            let byte = self.held[at];
            let stops = self.stops.0.iter().zip(&mut self.matched).enumerate();
            let hit = stops.filter_map(|(i, (stop, matched))| stop.step(matched, byte).then_some((stop.pattern.len(), i)));
            // Every stop must take the byte, so the longest is chosen only after all have.
            if let Some((length, i)) = hit.max_by_key(|&(length, i)| (length, std::cmp::Reverse(i)))
                && !free
            {
                // Its beginning was held back since it might have become this.
                self.held.truncate(at + 1 - length);
                self.ended = true;
                let text = self.say(self.held.len(), true);
                return Piece { text, stopped: Some(i) };
            }
        }
        let may_stop = self.matched.iter().copied().max().unwrap_or(0);
        let text = self.say(self.held.len() - may_stop, false);
        Piece { text, stopped: None }
    }

    /// What was held back, when no more ids come. A character that never became whole is U+FFFD.
    pub fn finish(mut self) -> String {
        if self.ended {
            return String::new();
        }
        self.say(self.held.len(), true)
    }

    /// Says the first `n` held bytes, but not (unless `last`) a character they leave unfinished.
    fn say(&mut self, n: usize, last: bool) -> String {
        let mut out = String::new();
        let mut done = 0;
        for chunk in self.held[..n].utf8_chunks() {
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            let bad = chunk.invalid();
            if bad.is_empty() {
                continue;
            }
            // Bad bytes at the very end may be the beginning of a character.
            let unfinished = done + bad.len() == n && std::str::from_utf8(bad).is_err_and(|e| e.error_len().is_none());
            if unfinished && !last {
                break;
            }
            out.push(char::REPLACEMENT_CHARACTER);
            done += bad.len();
        }
        self.held.drain(..done);
        out
    }
}
