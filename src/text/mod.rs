//! Text in and out of the model: `Tokenizer` (text to ids and back, as exact bytes), [`template`] (messages to a
//! prompt), [`stream`] (ids to text while they arrive, with stop strings).
//!
//! Nothing here knows the engine. Everything here runs on the caller's thread and is linear in its input.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use futures_util::FutureExt;
use serde_json::Value;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{AddedToken, PreTokenizerWrapper};

use crate::ids::TokenId;
use crate::model::json::{self, shown};
use crate::text::specials::{Controls, Specials};
use crate::text::template::{ChatTemplate, TemplateError};

mod jinja;
mod specials;
pub mod stream;
pub mod template;

pub use stream::{Piece, Start, Stops, StreamOptions, TextStream};

/// Why a tokenizer or template cannot be used. Each is one sentence with cause and mend.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {}: {reason}; the model folder needs it", .path.display())]
    Io { path: PathBuf, reason: String },
    #[error("{} is {bytes} bytes long, more than the {limit} allowed for it", .path.display())]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{file} cannot be used ({reason}); download it again")]
    Format { file: &'static str, reason: String },
    #[error(
        "tokenizer.json decodes with {decoder}, which is not supported; supported are ByteLevel, Metaspace, and the sentencepiece sequence of Replace, ByteFallback, Fuse and Strip"
    )]
    Decoder { decoder: String },
    #[error("tokenizer.json gives `{token}` the id {id}, and the model has {vocab} tokens; tokenizer and model do not fit together")]
    OutsideVocabulary { token: String, id: TokenId, vocab: usize },
    #[error(
        "tokenizer_config.json gives `{token}` the id {want}, and tokenizer.json has no place for it there (it would become {got}); the two files are of different models"
    )]
    AddedToken { token: String, want: TokenId, got: TokenId },
    #[error("this text cannot be tokenised: {reason}")]
    Encode { reason: String },
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(
        "{source}; it is in {file}: correct it there or download that anew, or take it out, and the model takes prompts at /v1/completions alone"
    )]
    BadTemplate { file: &'static str, source: TemplateError },
}

/// What the beginning of a decoded text loses, because the encoder put it there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StartRule {
    Nothing,
    /// Up to this many spaces.
    Spaces(usize),
    /// Every space that stands for a metaspace in the first token.
    FirstToken,
}

/// A tokenizer with its chat template, checked when it was loaded. Shared by all requests.
///
/// Memory: the vocabulary twice (once for encoding, once as bytes for decoding).
pub struct Tokenizer {
    /// Parses special tokens in the text.
    inner: tokenizers::Tokenizer,
    /// Treats control tokens as plain text; made when first needed.
    plain: OnceLock<tokenizers::Tokenizer>,
    /// The same for text that does not begin the prompt, where a metaspace is not prepended.
    plain_inside: OnceLock<tokenizers::Tokenizer>,
    controls: Controls,
    /// Added tokens that control and are not special to `inner`.
    markers: Vec<AddedToken>,
    bytes: TokenBytes,
    prefix: Vec<TokenId>,
    suffix: Vec<TokenId>,
    eos: Option<TokenId>,
    beyond: Beyond,
    template: Option<ChatTemplate>,
    /// One sentence each, for the log at start.
    pub warnings: Vec<String>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} ids)", self.id_bound())
    }
}

/// Added tokens that the model has no row for, and that are left out.
struct Beyond {
    vocab: usize,
    tokens: BTreeMap<u64, String>,
}

impl Beyond {
    /// Whether this token is one of them.
    fn takes(&mut self, id: u64, text: &str) -> bool {
        let beyond = id >= self.vocab as u64;
        if beyond {
            self.tokens.insert(id, text.to_owned());
        }
        beyond
    }
}

/// The exact bytes of every id, end to end.
struct TokenBytes {
    data: Vec<u8>,
    /// `ends[id]`; the token begins where the one before ends.
    ends: Vec<u32>,
    special: Vec<bool>,
    start: StartRule,
}

const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
const CONFIG_BYTES_MAX: u64 = 16 << 20;

impl Tokenizer {
    /// Opens `tokenizer.json` in a model folder, with `tokenizer_config.json` and a chat template if they are there.
    ///
    /// The template is `chat_template.jinja`, else `chat_template.json`, else `chat_template` in
    /// `tokenizer_config.json`: the order of Hugging Face.
    ///
    /// `vocab` is as for [`Tokenizer::from_json`].
    pub fn open(dir: &Path, vocab: usize) -> Result<Tokenizer, TextError> {
        let Some(tokenizer) = read(dir, "tokenizer.json", TOKENIZER_BYTES_MAX)? else {
            let reason = "there is no such file".to_owned();
            return Err(TextError::Io { path: dir.join("tokenizer.json"), reason });
        };
        let config = read(dir, "tokenizer_config.json", CONFIG_BYTES_MAX)?;
        let mut file = "chat_template.jinja";
        let template = match read(dir, file, CONFIG_BYTES_MAX)? {
            Some(source) => Some(Value::String(source)),
            None => match read(dir, "chat_template.json", CONFIG_BYTES_MAX)? {
                Some(text) => {
                    file = "chat_template.json";
                    let value = json::parse(text.as_bytes()).map_err(|reason| TextError::Format { file, reason })?;
                    let reason = "it has no chat_template".to_owned();
                    Some(value.get("chat_template").cloned().ok_or(TextError::Format { file, reason })?)
                }
                None => {
                    file = "tokenizer_config.json";
                    None
                }
            },
        };
        Tokenizer::from_json(&tokenizer, config.as_deref(), template.as_ref(), vocab).map_err(|error| match error {
            TextError::Template(source) => TextError::BadTemplate { file, source },
            other => other,
        })
    }

    /// The same from memory. `template` goes before the one in `tokenizer_config.json`: a string, or a list of
    /// `{name, template}`.
    ///
    /// Added tokens with ids from `vocab` on, the width of the logits, are left out with a warning: a `<pad>` that training needed
    /// and whose row was never saved. `usize::MAX` keeps all.
    pub fn from_json(
        tokenizer_json: &str,
        config_json: Option<&str>,
        template: Option<&Value>,
        vocab: usize,
    ) -> Result<Tokenizer, TextError> {
        let mut raw = json::parse(tokenizer_json.as_bytes()).map_err(|reason| TextError::Format { file: "tokenizer.json", reason })?;
        let config = match config_json {
            Some(text) => json::parse(text.as_bytes()).map_err(|reason| TextError::Format { file: "tokenizer_config.json", reason })?,
            None => Value::Null,
        };
        let mut beyond = Beyond { vocab, tokens: BTreeMap::new() };
        if let Some(added) = raw.get_mut("added_tokens").and_then(Value::as_array_mut) {
            added.retain(|token| {
                let (id, text) = (token.get("id").and_then(Value::as_u64), content(token));
                !id.zip(text).is_some_and(|(id, text)| beyond.takes(id, text))
            });
        }
        let kept = if beyond.tokens.is_empty() { Cow::Borrowed(tokenizer_json) } else { Cow::Owned(raw.to_string()) };
        let mut warnings = Vec::new();
        // The parser of the crate trusts some numbers of the file; a panic there is a bad file, not a bug to die of.
        let parsed = catch_unwind(|| tokenizers::Tokenizer::from_bytes(kept.as_bytes()))
            .unwrap_or_else(|_| Err("its numbers contradict each other".into()));
        let mut inner = parsed.map_err(|e| TextError::Format { file: "tokenizer.json", reason: shown(&e.to_string(), 200) })?;
        // Lengths are the server's business.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| TextError::Format { file: "tokenizer.json", reason: shown(&e.to_string(), 200) })?;
        let named = add_tokens(&mut inner, &config, &mut beyond, &mut warnings)?;
        let bytes = TokenBytes::new(&inner, raw.get("decoder").unwrap_or(&Value::Null))?;
        let (prefix, suffix) = surroundings(&inner, &config, &named)?;
        let eos = named.get("eos_token").and_then(|text| inner.token_to_id(text));
        let template = match template.or_else(|| config.get("chat_template")).filter(|v| !v.is_null()) {
            Some(value) => Some(ChatTemplate::new(value, &named)?),
            None => None,
        };
        let (controls, markers) = controls(&inner, &named, template.as_ref());
        let (plain, plain_inside) = (OnceLock::new(), OnceLock::new());
        Ok(Tokenizer { inner, plain, plain_inside, controls, markers, bytes, prefix, suffix, eos, beyond, template, warnings })
    }

    /// Refuses a tokenizer that can produce an id the model has no row for. `vocab` is the width of the logits.
    pub fn check_vocab(&self, vocab: usize) -> Result<(), TextError> {
        let worst = self.inner.get_vocab(true).into_iter().filter(|(_, id)| *id as usize >= vocab).min_by_key(|(_, id)| *id);
        // A token that was left out may still be put around every text.
        let around = || {
            let id = *self.prefix.iter().chain(&self.suffix).find(|&&id| id as usize >= vocab)?;
            Some((self.beyond.tokens.get(&u64::from(id)).cloned().unwrap_or_default(), id))
        };
        match worst.or_else(around) {
            Some((token, id)) => Err(TextError::OutsideVocabulary { token: shown(&token, 80), id, vocab }),
            None => Ok(()),
        }
    }

    /// The ids of `text`.
    ///
    /// `add_special_tokens` puts what the model's files ask for around it (usually BOS in front). With
    /// `parse_special`, the text of a special token becomes that token, as in a prompt written by hand; without, it
    /// stays plain text, as a user's words must; so does that of a turn marker of the chat template which the vocabulary has as an
    /// added token that is not special.
    pub fn encode(&self, text: &str, add_special_tokens: bool, parse_special: bool) -> Result<Vec<TokenId>, TextError> {
        let mut out = if add_special_tokens { self.prefix.clone() } else { Vec::new() };
        let tokenizer = if parse_special { &self.inner } else { self.plain() };
        encode_into(tokenizer, text, &mut out)?;
        if add_special_tokens {
            out.extend_from_slice(&self.suffix);
        }
        Ok(out)
    }

    /// The first `n` plain ids of `text`, or all where there are fewer; see [`first_tokens`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_first(&self, text: &str, n: usize) -> Result<Vec<TokenId>, TextError> {
        first_tokens(text, n, async |text| self.encode(text, false, false)).now_or_never().expect("nothing here waits")
    }

    /// Encodes a prompt in which `guarded` byte ranges, ordered and apart, hold special-token text that must stay
    /// plain. Everything else is tokenised exactly as [`Tokenizer::encode`] would.
    pub(crate) fn encode_guarded(&self, text: &str, guarded: &[std::ops::Range<usize>]) -> Result<Vec<TokenId>, TextError> {
        let mut out = Vec::new();
        for (range, plain) in self.controls.all.regions(text, guarded) {
            let tokenizer = match (plain, range.start) {
                (false, _) => &self.inner,
                (true, 0) => self.plain(),
                (true, _) => self.plain_inside(),
            };
            encode_into(tokenizer, &text[range], &mut out)?;
        }
        Ok(out)
    }

    /// Text of `ids`: their bytes, where each run that is not UTF-8 becomes U+FFFD, less the space an encoder
    /// of the sentencepiece kind puts in front of a text. Ids without text decode to nothing.
    ///
    /// `clean_up_tokenization_spaces` is not applied: it destroys text that the model wrote.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        let mut start = self.start(skip_special);
        for &id in ids {
            start.push(&self.bytes, id, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The exact bytes of one token wherever it stands but at the start of a text: part of a character perhaps.
    /// Empty for ids that have no text.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        self.bytes.get(id).to_vec()
    }

    /// The id of a token as the vocabulary spells it (`<|im_end|>`, `Ġthe`).
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    /// The `eos_token` of `tokenizer_config.json`: what the model was tuned to end an answer with, whatever the ids are that its
    /// other files still have of a base model.
    pub fn eos(&self) -> Option<TokenId> {
        self.eos
    }

    /// Whether `id` is a control token, which `skip_special` leaves out of texts.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.bytes.special.get(id as usize).copied().unwrap_or(false)
    }

    /// One more than the largest id the tokenizer knows.
    pub fn id_bound(&self) -> usize {
        self.bytes.ends.len()
    }

    /// Whether tokens hold every byte of a text, since nothing normalises it first.
    pub fn keeps_all_text(&self) -> bool {
        self.inner.get_normalizer().is_none()
    }

    /// Longest token in bytes: a text of `n` bytes has at least `n / longest` tokens, so one that cannot fit is
    /// refused without tokenising it. Walks the vocabulary: ask once. Holds where nothing normalises the text to fewer bytes.
    pub fn longest_token_bytes(&self) -> usize {
        (0..self.bytes.ends.len() as u32).map(|id| self.bytes.get(id).len()).max().unwrap_or(0).max(1)
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    pub(crate) fn controls(&self) -> &Controls {
        &self.controls
    }

    pub(crate) fn start(&self, skip_special: bool) -> StartState {
        StartState { rule: self.bytes.start, skip_special }
    }

    /// Appends the text of `id` to `out`, the way it stands after what `start` has seen.
    pub(crate) fn push_bytes(&self, start: &mut StartState, id: TokenId, out: &mut Vec<u8>) {
        start.push(&self.bytes, id, out);
    }

    fn plain(&self) -> &tokenizers::Tokenizer {
        self.plain.get_or_init(|| {
            let mut t = self.inner.clone();
            if !self.markers.is_empty() {
                t.add_special_tokens(self.markers.iter().cloned()).expect("they were added before, less one flag");
            }
            t.set_encode_special_tokens(true);
            t
        })
    }

    fn plain_inside(&self) -> &tokenizers::Tokenizer {
        self.plain_inside.get_or_init(|| {
            let mut t = self.plain().clone();
            if let Some(mut pre) = t.get_pre_tokenizer().cloned() {
                prepend_nothing(&mut pre);
                t.with_pre_tokenizer(Some(pre));
            }
            t
        })
    }
}

/// A metaspace put only before the first piece of a text is not put before a later one.
fn prepend_nothing(pre: &mut PreTokenizerWrapper) {
    match pre {
        PreTokenizerWrapper::Metaspace(m) if m.get_prepend_scheme() == PrependScheme::First => {
            m.set_prepend_scheme(PrependScheme::Never);
        }
        PreTokenizerWrapper::Sequence(s) => s.as_mut().iter_mut().for_each(prepend_nothing),
        _ => {}
    }
}

/// The first `n` ids that `encode` makes of `text`, or all where there are fewer. Of a long text only a beginning is encoded: one that has
/// so many ids and some beyond, as the last may be others where the text goes on.
///
/// # Errors
/// Those of `encode`.
pub async fn first_tokens<E>(text: &str, n: usize, encode: impl AsyncFn(&str) -> Result<Vec<TokenId>, E>) -> Result<Vec<TokenId>, E> {
    const BEYOND: usize = 64;
    let enough = n.saturating_add(BEYOND);
    // Tokens of common vocabularies stand for four to five bytes.
    let mut bytes = enough.saturating_mul(5);
    loop {
        let beginning = &text[..text.ceil_char_boundary(bytes)];
        let mut ids = encode(beginning).await?;
        if ids.len() >= enough || beginning.len() == text.len() {
            ids.truncate(n);
            return Ok(ids);
        }
        bytes = bytes.saturating_mul(2);
    }
}

fn encode_into(tokenizer: &tokenizers::Tokenizer, text: &str, out: &mut Vec<TokenId>) -> Result<(), TextError> {
    // A tokenizer made from a file we did not write must not take a request thread with it.
    let encoded = catch_unwind(AssertUnwindSafe(|| tokenizer.encode_fast(text, false)))
        .unwrap_or_else(|_| Err("the tokenizer failed".into()))
        .map_err(|e| TextError::Encode { reason: shown(&e.to_string(), 160) })?;
    out.extend_from_slice(encoded.get_ids());
    Ok(())
}

/// Reads a file of the folder, or nothing where there is none.
fn read(dir: &Path, name: &str, limit: u64) -> Result<Option<String>, TextError> {
    use std::io::Read;
    let path = dir.join(name);
    let io = |e: std::io::Error| TextError::Io { path: path.clone(), reason: e.to_string() };
    let about = match std::fs::metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(io)?,
    };
    if !about.is_file() {
        return Err(TextError::Io { path, reason: "it is not a regular file".to_owned() });
    }
    let mut text = Vec::new();
    std::fs::File::open(&path).map_err(io)?.take(limit + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > limit {
        return Err(TextError::TooLarge { path, bytes: about.len().max(limit + 1), limit });
    }
    match String::from_utf8(text) {
        Ok(text) => Ok(Some(text)),
        Err(_) => Err(TextError::Io { path, reason: "it is not UTF-8".to_owned() }),
    }
}

/// The named special tokens of `tokenizer_config.json` (`bos_token`, ...), as text.
pub(crate) type Named = BTreeMap<String, String>;

/// Text of a token that is written as a string or as an object with `content`.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
}

/// Adds what `tokenizer_config.json` knows and `tokenizer.json` does not: added tokens at their ids, and the
/// special role of named tokens.
fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    config: &Value,
    beyond: &mut Beyond,
    warnings: &mut Vec<String>,
) -> Result<Named, TextError> {
    let file = "tokenizer_config.json";
    let mut missing: BTreeMap<TokenId, AddedToken> = BTreeMap::new();
    if let Some(map) = config.get("added_tokens_decoder").and_then(Value::as_object) {
        for (id, token) in map {
            let (Ok(id), Some(text)) = (id.parse::<TokenId>(), content(token)) else {
                return Err(TextError::Format { file, reason: format!("added_tokens_decoder has a bad entry `{}`", shown(id, 40)) });
            };
            if inner.token_to_id(text).is_some() || beyond.takes(u64::from(id), text) {
                continue;
            }
            let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
            let special = flag("special");
            let normalized = token.get("normalized").and_then(Value::as_bool).unwrap_or(!special);
            let token = AddedToken::from(text, special)
                .single_word(flag("single_word"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .normalized(normalized);
            missing.insert(id, token);
        }
    }
    for (id, text) in &beyond.tokens {
        let (text, vocab) = (shown(text, 80), beyond.vocab);
        warnings.push(format!("the added token `{text}` has the id {id}, and the model has {vocab} tokens; it is left out"));
    }
    for (want, token) in missing {
        let text = token.content.clone();
        let added = if token.special { inner.add_special_tokens([token]) } else { inner.add_tokens([token]) };
        let got = inner.token_to_id(&text).unwrap_or(TokenId::MAX);
        if added.is_err() || got != want {
            return Err(TextError::AddedToken { token: shown(&text, 80), want, got });
        }
    }
    let mut named = Named::new();
    let mut roles: Vec<String> = Vec::new();
    for key in ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"] {
        if let Some(text) = config.get(key).and_then(content) {
            named.insert(key.to_owned(), text.to_owned());
            roles.push(text.to_owned());
        }
    }
    for key in ["additional_special_tokens", "extra_special_tokens"] {
        let list = config.get(key);
        let items: Vec<&Value> = match list {
            Some(Value::Array(a)) => a.iter().collect(),
            Some(Value::Object(o)) => o.values().collect(),
            _ => Vec::new(),
        };
        roles.extend(items.into_iter().filter_map(content).map(str::to_owned));
    }
    for text in roles {
        if beyond.tokens.values().any(|left_out| *left_out == text) {
            continue;
        }
        let Some(id) = inner.token_to_id(&text) else {
            warnings.push(format!("tokenizer_config.json names the token `{}`, which the vocabulary does not have", shown(&text, 80)));
            continue;
        };
        if !inner.get_added_tokens_decoder().contains_key(&id) {
            let token = AddedToken::from(text, true).normalized(false);
            inner.add_special_tokens([token]).map_err(|e| TextError::Format { file, reason: shown(&e.to_string(), 160) })?;
        }
    }
    Ok(named)
}

/// The tokens that control, and those of them, marked as special, that `inner` takes for text.
///
/// Turn markers are control tokens whatever their flag says: some vocabularies have them as added tokens that are not special, so
/// that they show in decoded text. Which those are, the chat template tells: it spells them.
fn controls(inner: &tokenizers::Tokenizer, named: &Named, template: Option<&ChatTemplate>) -> (Controls, Vec<AddedToken>) {
    let added = inner.get_added_tokens_decoder();
    // A word, white space or a bracket stands in a template's code and prose too, and is language that was trained on as a token.
    let spelled = |text: &str| {
        let marks = text.chars().count() > 2 && text.chars().any(|c| !c.is_alphanumeric() && !c.is_whitespace());
        marks && template.is_some_and(|t| t.spells(text))
    };
    let special = |t: &&AddedToken| t.special || named.values().any(|text| *text == t.content);
    let all = |t: &&AddedToken| special(t) || spelled(&t.content);
    let turns = |t: &&AddedToken| special(t) || (spelled(&t.content) && template.is_some_and(|template| template.turns_by(&t.content)));
    let of = |t: &'_ AddedToken| (t.content.clone(), t.lstrip, t.rstrip);
    let controls = Controls {
        all: Specials::new(added.values().filter(all).map(of)),
        turns: Specials::new(added.values().filter(turns).map(of)),
        special: Specials::new(added.values().filter(special).map(of)),
    };
    (controls, added.values().filter(|t| !t.special && all(t)).map(|t| t.clone().special(true)).collect())
}

/// What stands around a text: from the post-processor, corrected by `add_bos_token` and `add_eos_token`.
fn surroundings(inner: &tokenizers::Tokenizer, config: &Value, named: &Named) -> Result<(Vec<TokenId>, Vec<TokenId>), TextError> {
    let encode = |special: bool| {
        catch_unwind(AssertUnwindSafe(|| inner.encode_fast("a", special)))
            .unwrap_or_else(|_| Err("the tokenizer failed on a text of one letter".into()))
            .map(|e| e.get_ids().to_vec())
            .map_err(|e| TextError::Format { file: "tokenizer.json", reason: shown(&e.to_string(), 160) })
    };
    let (bare, around) = (encode(false)?, encode(true)?);
    let Some(at) = around.windows(bare.len().max(1)).position(|w| w == bare) else {
        let reason = "its post-processor changes the text itself".to_owned();
        return Err(TextError::Format { file: "tokenizer.json", reason });
    };
    let (mut prefix, mut suffix) = (around[..at].to_vec(), around[at + bare.len()..].to_vec());
    let id = |key: &str| named.get(key).and_then(|t| inner.token_to_id(t));
    let asked = |key: &str| config.get(key).and_then(Value::as_bool);
    if let (Some(bos), Some(add)) = (id("bos_token"), asked("add_bos_token")) {
        match (add, prefix.first() == Some(&bos)) {
            (true, false) => prefix.insert(0, bos),
            (false, true) => {
                prefix.remove(0);
            }
            _ => {}
        }
    }
    if let (Some(eos), Some(add)) = (id("eos_token"), asked("add_eos_token")) {
        match (add, suffix.last() == Some(&eos)) {
            (true, false) => suffix.push(eos),
            (false, true) => {
                suffix.pop();
            }
            _ => {}
        }
    }
    Ok((prefix, suffix))
}

/// How the vocabulary spells bytes.
#[derive(Default)]
struct Spelling {
    byte_level: bool,
    byte_fallback: bool,
    /// Text replaced in every token, in order.
    replace: Vec<(String, String)>,
}

impl TokenBytes {
    fn new(inner: &tokenizers::Tokenizer, decoder: &Value) -> Result<TokenBytes, TextError> {
        let (spelling, start) = spelling(decoder)?;
        let added = inner.get_added_tokens_decoder();
        let vocab = inner.get_vocab(true);
        let bound = vocab.values().map(|&id| id as usize + 1).max().unwrap_or(0);
        // Ids are dense in every real vocabulary; a file with a few ids near 2^32 must not decide an allocation.
        if bound > 2 * vocab.len() + 65_536 {
            let reason = format!("its ids go up to {} for {} tokens", bound - 1, vocab.len());
            return Err(TextError::Format { file: "tokenizer.json", reason });
        }
        let mut text: Vec<Option<String>> = vec![None; bound];
        for (token, id) in vocab {
            text[id as usize] = Some(token);
        }
        let mut special = vec![false; bound];
        let letters = byte_letters();
        let mut it = TokenBytes { data: Vec::new(), ends: Vec::with_capacity(bound), special: Vec::new(), start };
        for (id, text) in text.iter().enumerate() {
            if let Some(token) = added.get(&(id as u32)) {
                special[id] = token.special;
                it.data.extend_from_slice(token.content.as_bytes());
            } else if let Some(text) = text {
                spelling.append(text, &letters, &mut it.data);
            }
            let Ok(end) = u32::try_from(it.data.len()) else {
                let reason = "its tokens hold more than 4 GiB".to_owned();
                return Err(TextError::Format { file: "tokenizer.json", reason });
            };
            it.ends.push(end);
        }
        it.special = special;
        Ok(it)
    }

    fn get(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.data[begin as usize..end as usize]
    }
}

impl Spelling {
    fn append(&self, token: &str, letters: &BTreeMap<char, u8>, out: &mut Vec<u8>) {
        if self.byte_level {
            // A token with a letter that stands for no byte was never byte-level.
            match token.chars().map(|c| letters.get(&c).copied()).collect::<Option<Vec<u8>>>() {
                Some(bytes) => out.extend(bytes),
                None => out.extend_from_slice(token.as_bytes()),
            }
            return;
        }
        if self.byte_fallback
            && token.len() == 6
            && let Some(byte) = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).and_then(|h| u8::from_str_radix(h, 16).ok())
        {
            out.push(byte);
            return;
        }
        let mut text = token.to_owned();
        for (from, to) in &self.replace {
            text = text.replace(from, to);
        }
        out.extend_from_slice(text.as_bytes());
    }
}

/// Reads the decoder of `tokenizer.json`: what each token's bytes are, and what the start of a text loses.
fn spelling(decoder: &Value) -> Result<(Spelling, StartRule), TextError> {
    let refuse = |what: &Value| TextError::Decoder { decoder: json::shown_value(what.get("type").unwrap_or(what)) };
    let one = std::slice::from_ref(decoder);
    let steps = match decoder.get("type").and_then(Value::as_str) {
        Some("Sequence") => decoder.get("decoders").and_then(Value::as_array).ok_or_else(|| refuse(decoder))?.as_slice(),
        _ => one,
    };
    let (mut spelling, mut start, mut fused) = (Spelling::default(), StartRule::Nothing, false);
    for step in steps {
        match step.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => spelling.byte_level = true,
            Some("ByteFallback") => spelling.byte_fallback = true,
            Some("Fuse") => fused = true,
            Some("Replace") => {
                let from = step.pointer("/pattern/String").and_then(Value::as_str).filter(|s| !s.is_empty());
                let (Some(from), Some(to)) = (from, step.get("content").and_then(Value::as_str)) else { return Err(refuse(step)) };
                spelling.replace.push((from.to_owned(), to.to_owned()));
            }
            Some("Metaspace") => {
                let from = step.get("replacement").and_then(Value::as_str).unwrap_or("\u{2581}");
                spelling.replace.push((from.to_owned(), " ".to_owned()));
                let never = step.get("prepend_scheme").and_then(Value::as_str) == Some("never")
                    || step.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
                if !never {
                    start = StartRule::FirstToken;
                }
            }
            Some("Strip") => {
                let number = |key: &str| step.get(key).and_then(Value::as_u64).unwrap_or(0);
                let (content, n) = (step.get("content").and_then(Value::as_str), number("start"));
                if content != Some(" ") || number("stop") != 0 || !fused || n > 16 {
                    return Err(refuse(step));
                }
                start = StartRule::Spaces(n as usize);
            }
            _ => return Err(refuse(step)),
        }
    }
    Ok((spelling, start))
}

/// The letters of byte-level vocabularies: printable Latin-1 stands for itself, the other bytes for the letters
/// from U+0100 on, in order.
fn byte_letters() -> BTreeMap<char, u8> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| {
            if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
                (char::from(byte), byte)
            } else {
                next += 1;
                (char::from_u32(next - 1).expect("below the surrogates"), byte)
            }
        })
        .collect()
}

/// Where in a text the decoder stands: at its start, or past it.
#[derive(Clone, Debug)]
pub(crate) struct StartState {
    rule: StartRule,
    skip_special: bool,
}

impl StartState {
    /// The text goes on from a prompt, so nothing is lost at its start.
    pub(crate) fn forget(&mut self) {
        self.rule = StartRule::Nothing;
    }

    fn push(&mut self, table: &TokenBytes, id: TokenId, out: &mut Vec<u8>) {
        let special = table.special.get(id as usize).copied().unwrap_or(false);
        // An id the tokenizer does not know is no token, so it does not count as the first one either.
        if special && self.skip_special || id as usize >= table.ends.len() {
            return;
        }
        let mut bytes = table.get(id);
        match self.rule {
            StartRule::Nothing => {}
            StartRule::FirstToken => {
                self.rule = StartRule::Nothing;
                if !special {
                    out.extend(bytes.iter().filter(|&&b| b != b' '));
                    return;
                }
            }
            StartRule::Spaces(n) => {
                let mut n = n;
                while n > 0 && bytes.first() == Some(&b' ') {
                    bytes = &bytes[1..];
                    n -= 1;
                }
                // Nothing but spaces so far: the next token may begin with one too.
                self.rule = if bytes.is_empty() && n > 0 { StartRule::Spaces(n) } else { StartRule::Nothing };
            }
        }
        out.extend_from_slice(bytes);
    }
}
