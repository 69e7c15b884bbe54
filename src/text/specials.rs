//! Where the texts of special tokens stand in a string: a trie over bytes, leftmost and longest first, as the
//! `tokenizers` crate splits.

use std::ops::Range;

/// The control tokens of a vocabulary.
pub(crate) struct Controls {
    /// Special tokens, and the turn markers of a chat template that are none.
    pub(crate) all: Specials,
    /// Special tokens, and those of the markers that tell turns apart: the others (`<tool_call>`) an application may use to explain
    /// tools, in a system's message.
    pub(crate) turns: Specials,
    /// Without any markers: an answer in a history has some of them (`<think>`, `<tool_call>`) as the tokens the model wrote.
    pub(crate) special: Specials,
}

/// The special tokens of a vocabulary, or some of its tokens taken for them. Search is O(text x longest token), whatever their number.
pub(crate) struct Specials {
    nodes: Vec<Node>,
    flags: Vec<Strip>,
    /// Bytes of the longest.
    longest: usize,
}

#[derive(Default)]
struct Node {
    /// Sorted by byte.
    next: Vec<(u8, u32)>,
    /// The token that ends here.
    token: Option<u32>,
}

/// Whether a token takes the white space at its left or right with it.
#[derive(Clone, Copy)]
struct Strip {
    left: bool,
    right: bool,
}

impl Specials {
    /// From `(text, lstrip, rstrip)`.
    pub(crate) fn new(tokens: impl Iterator<Item = (impl AsRef<str>, bool, bool)>) -> Specials {
        let mut it = Specials { nodes: vec![Node::default()], flags: Vec::new(), longest: 0 };
        for (text, left, right) in tokens.filter(|(t, ..)| !t.as_ref().is_empty()) {
            let mut at = 0;
            it.longest = it.longest.max(text.as_ref().len());
            for &byte in text.as_ref().as_bytes() {
                at = match it.nodes[at].next.binary_search_by_key(&byte, |&(b, _)| b) {
                    Ok(i) => it.nodes[at].next[i].1 as usize,
                    Err(i) => {
                        let new = it.nodes.len();
                        it.nodes.push(Node::default());
                        it.nodes[at].next.insert(i, (byte, new as u32));
                        new
                    }
                };
            }
            it.nodes[at].token = Some(it.flags.len() as u32);
            it.flags.push(Strip { left, right });
        }
        it
    }

    /// The first match at or after byte `from`.
    fn find(&self, text: &str, from: usize) -> Option<(Range<usize>, Strip)> {
        let bytes = text.as_bytes();
        (from..bytes.len()).find_map(|start| {
            let (mut at, mut found) = (0, None);
            for (i, &byte) in bytes[start..].iter().enumerate() {
                let next = &self.nodes[at].next;
                let Ok(edge) = next.binary_search_by_key(&byte, |&(b, _)| b) else { break };
                at = next[edge].1 as usize;
                if let Some(token) = self.nodes[at].token {
                    found = Some((start..start + i + 1, self.flags[token as usize]));
                }
            }
            found
        })
    }

    /// Whether `text` ends with the beginning of a token, which what follows it may make whole.
    pub(crate) fn may_begin_in(&self, text: &str) -> bool {
        let bytes = text.as_bytes();
        (bytes.len().saturating_sub(self.longest)..bytes.len()).any(|start| {
            let end = bytes[start..].iter().try_fold(0, |at: usize, &byte| {
                let next = &self.nodes[at].next;
                next.binary_search_by_key(&byte, |&(b, _)| b).ok().map(|edge| next[edge].1 as usize)
            });
            end.is_some_and(|at| !self.nodes[at].next.is_empty())
        })
    }

    /// Every match, leftmost and longest, none overlapping.
    pub(crate) fn matches<'a>(&'a self, text: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
        let mut from = 0;
        std::iter::from_fn(move || {
            let (range, _) = self.find(text, from)?;
            from = range.end;
            Some(range)
        })
    }

    /// Cuts `text` into stretches to tokenise one by one: `true` where a stretch holds a guarded match and must be
    /// read as plain text. `guarded` are some of [`Specials::matches`], in order. Cuts lie only at the other
    /// matches, where the tokenizer would cut in any case, so nothing else changes.
    pub(crate) fn regions(&self, text: &str, guarded: &[Range<usize>]) -> Vec<(Range<usize>, bool)> {
        if guarded.is_empty() {
            return vec![(0..text.len(), false)];
        }
        let mut out: Vec<(Range<usize>, bool)> = Vec::new();
        let mut close = |range: Range<usize>, plain: bool| {
            if range.is_empty() {
                return;
            }
            // Neighbouring stretches that are not plain are one.
            match out.last_mut() {
                Some((last, false)) if !plain => last.end = range.end,
                _ => out.push((range, plain)),
            }
        };
        // [begin, from)  the stretch since the last token of the template, searched so far
        let (mut begin, mut from, mut plain) = (0, 0, false);
        let mut guarded = guarded.iter().peekable();
        while let Some((token, strip)) = self.find(text, from) {
            if guarded.next_if(|g| **g == token).is_some() {
                plain = true;
                from = token.end;
                continue;
            }
            // A token that takes white space with it takes it from the stretches at its sides.
            let before = begin + text[begin..token.start].trim_end().len();
            let cut = if strip.left { before } else { token.start };
            let end = if strip.right { text.len() - text[token.end..].trim_start().len() } else { token.end };
            close(begin..cut, plain);
            close(cut..end, false);
            (begin, from, plain) = (end, end, false);
        }
        close(begin..text.len(), plain);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials() -> Specials {
        Specials::new([("<s>", false, false), ("<end>", false, true), ("<end>>", false, false), ("<l>", true, false)].into_iter())
    }

    #[test]
    fn matches_are_leftmost_and_longest() {
        let found: Vec<_> = specials().matches("a<s><end>><end> <en").collect();
        assert_eq!(found, [1..4, 4..10, 10..15]);
    }

    #[test]
    fn a_token_may_begin_at_the_end_of_a_text() {
        let found = ["a<", "<en", "<end>", "<s><", "", "a", "<s>", "<end>>", "<e n", "< "].map(|text| specials().may_begin_in(text));
        assert_eq!(found, [true, true, true, true, false, false, false, false, false, false]);
    }

    #[test]
    fn regions_cut_only_at_tokens_outside_guards() {
        let text = "<s>hi <s> you<end>  ok <l>x<s>";
        let guard = 6..9;
        let regions: Vec<_> = specials().regions(text, &[guard]).into_iter().map(|(r, p)| (&text[r], p)).collect();
        assert_eq!(regions, [("<s>", false), ("hi <s> you", true), ("<end>  ok <l>x<s>", false)]);
        assert_eq!(specials().regions("plain", &[]), [(0..5, false)]);
        assert_eq!(specials().regions("<s>", std::slice::from_ref(&(0..3))), [(0..3, true)]);
        assert_eq!(specials().regions("", &[]), [(0..0, false)]);
    }
}
