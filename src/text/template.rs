//! Chat templates: messages to the prompt the model was trained on, as Hugging Face renders it.
//!
//! A template is a program of the operator's choosing, run on a client's data. It reads no files, reaches nothing
//! outside, and is bounded in work, memory, output and time ([`ChatTemplate`]). A client's text never becomes a
//! control token: texts of special tokens, and of the added tokens that the template spells, are marked in it before rendering,
//! found again after, and tokenised as the plain text they are. Of the latter an assistant's messages keep all, which the model
//! wrote as tokens, and a system's those that tell no turns apart: it is where applications explain tools in the model's own marks.

use std::io::Write;
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value as Jinja};
use serde_json::{Map, Value, json};

use crate::ids::TokenId;
use crate::model::json::{shown, shown_value};
use crate::text::jinja::{self, Exception};
use crate::text::specials::{Controls, Specials};
use crate::text::{Named, TextError, Tokenizer};

const TIME: Duration = Duration::from_secs(2);
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// Output beyond this many times the input, and [`OUTPUT_BYTES`], is no prompt.
const OUTPUT_FACTOR: usize = 4;
const OUTPUT_BYTES: usize = 1 << 20;

/// Why there is no prompt. Messages are at most about 200 characters, without control characters.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TemplateError {
    /// The model's folder has a template that does not compile.
    #[error("the chat template does not compile: {reason}")]
    Syntax { reason: String },
    #[error("this model has no chat template; send a prompt to /v1/completions instead")]
    Missing,
    /// The template itself refused the messages (`raise_exception`).
    #[error("the chat template refuses these messages: {message}")]
    Raised { message: String },
    #[error("the chat template failed on these messages: {reason}")]
    Failed { reason: String },
    /// The template is to blame, unless the messages are enormous.
    #[error("the chat template took too much {what} on these messages")]
    TooMuch { what: &'static str },
    #[error("messages must be a list of objects")]
    Messages,
    #[error("messages[{message}].content[{part}] is of type {kind}; this server reads text only")]
    Part { message: usize, part: usize, kind: String },
    #[error("messages[{message}].content[{part}] has no text")]
    PartText { message: usize, part: usize },
    #[error("messages[{message}].content is {got}; a string or a list of text parts is needed")]
    Content { message: usize, got: String },
    /// Templates pass over what they have no branch for; a message must not vanish without a word.
    #[error("messages[{message}] has the role {role}, which this model's chat template leaves out; send it as a user's message")]
    Role { message: usize, role: &'static str },
    #[error("chat_template_kwargs cannot set `{key}`, which the server sets itself")]
    Reserved { key: String },
    #[error("chat_template_kwargs has `{key}`, which this model's template does not read")]
    UnknownKwarg { key: String },
    #[error("chat_template_kwargs has `{key}` = {value}; a string, number or boolean is needed")]
    NestedKwarg { key: String, value: String },
    #[error("continue_final_message and add_generation_prompt exclude each other")]
    ContinueAndGenerate,
    #[error("continue_final_message needs a last message with text, and the template must show it")]
    NothingToContinue,
}

impl TemplateError {
    /// Whether the messages or arguments are at fault, not the model's template: a 400 rather than a 500.
    pub fn is_callers(&self) -> bool {
        !matches!(self, TemplateError::Syntax { .. } | TemplateError::TooMuch { .. })
    }
}

/// A conversation to render.
#[derive(Clone, Copy, Debug)]
pub struct Chat<'a> {
    /// A list of objects with `role` and `content`.
    pub messages: &'a Value,
    pub tools: Option<&'a Value>,
    /// Ends the prompt where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, to be continued.
    pub continue_final_message: bool,
    pub kwargs: &'a Map<String, Value>,
}

/// A compiled template, or several under names: `tool_use` is taken when there are tools, else `default`.
pub struct ChatTemplate {
    env: Environment<'static>,
    named: Named,
    has_tool_use: bool,
    /// Variables that some template reads and does not set.
    reads: Vec<String>,
    /// The template walks over lists of content parts itself.
    reads_parts: bool,
    /// The template shows nothing of a developer's message, or fails on it: it is of before that role, when it was called system.
    developer_is_system: bool,
    /// Roles whose messages the template leaves out of a prompt without tools.
    dropped: Vec<&'static str>,
    /// A conversation without tools, as the template shows it; `None` where it shows none.
    plain: Option<String>,
    /// The template fails on the content of an answer that is nothing but calls of tools, or says `None` for it.
    null_is_empty: bool,
}

/// Names that `chat_template_kwargs` cannot take: what the server passes, and what would look like its parameters.
const RESERVED: &[&str] = &[
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
    "tokenize",
    "chat_template",
    "conversation",
    "return_tensors",
    "return_dict",
    "padding",
    "truncation",
    "max_length",
];

/// Names that clients set for whatever model they talk to, as some templates read them: no mistake where this one does not.
const CUSTOMARY: &[&str] = &["enable_thinking", "thinking", "reasoning_effort", "thinking_budget", "add_vision_id", "date_string"];

impl ChatTemplate {
    /// From a source, or a list of `{name, template}`.
    pub(crate) fn new(value: &Value, named: &Named) -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::with_clock(value, named, || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64))
    }

    /// The same with `strftime_now` reading seconds since 1970 from `clock`; times are in UTC.
    pub fn with_clock(
        value: &Value,
        named: &std::collections::BTreeMap<String, String>,
        clock: impl Fn() -> i64 + Send + Sync + 'static,
    ) -> Result<ChatTemplate, TemplateError> {
        let syntax = |reason: String| TemplateError::Syntax { reason: shown(&reason, 160) };
        let list: Vec<(String, &str)> = match value {
            Value::String(source) => vec![("default".to_owned(), source)],
            Value::Array(items) => items
                .iter()
                .map(|item| {
                    let text = |key: &str| item.get(key).and_then(Value::as_str);
                    text("name").zip(text("template")).map(|(n, t)| (n.to_owned(), t))
                })
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| syntax("it is a list of something else than {name, template}".to_owned()))?,
            _ => return Err(syntax("it is neither text nor a list".to_owned())),
        };
        let mut env = jinja::environment(clock);
        let mut reads = Vec::new();
        for (name, source) in &list {
            if source.len() > SOURCE_BYTES_MAX {
                return Err(syntax(format!("it is {} bytes long, more than the {SOURCE_BYTES_MAX} allowed", source.len())));
            }
            env.add_template_owned(name.clone(), jinja::translated(source)).map_err(|e| syntax(e.to_string()))?;
            let template = env.get_template(name).map_err(|e| syntax(e.to_string()))?;
            reads.extend(template.undeclared_variables(false));
        }
        if env.get_template("default").is_err() {
            return Err(syntax("none of its templates is named default".to_owned()));
        }
        reads.sort_unstable();
        reads.dedup();
        let has_tool_use = env.get_template("tool_use").is_ok();
        let named = named.clone();
        let mut it = ChatTemplate {
            env,
            named,
            has_tool_use,
            reads,
            reads_parts: false,
            developer_is_system: false,
            dropped: Vec::new(),
            plain: None,
            null_is_empty: false,
        };
        it.probe_all();
        Ok(it)
    }

    /// Whether the template reads a variable of this name, so that setting it means something.
    pub fn reads(&self, variable: &str) -> bool {
        self.reads.binary_search_by(|v| v.as_str().cmp(variable)).is_ok()
    }

    /// Whether this text may be what tells turns apart: it stands in a conversation without tools, if the template shows any.
    pub(crate) fn turns_by(&self, text: &str) -> bool {
        self.plain.as_ref().is_none_or(|plain| plain.contains(text))
    }

    /// Whether this text stands in the template's source as it is.
    pub(crate) fn spells(&self, text: &str) -> bool {
        self.env.templates().any(|(_, template)| template.source().contains(text))
    }

    /// The prompt as text, special tokens spelled out. Input is not made safe against special tokens in it:
    /// see [`Tokenizer::render`].
    pub fn render_text(&self, chat: &Chat<'_>) -> Result<String, TemplateError> {
        self.render_marked(chat, None).map(|p| p.text)
    }

    /// Renders; with `controls`, also tells where in the result their texts come from the input.
    fn render_marked(&self, chat: &Chat<'_>, controls: Option<&Controls>) -> Result<Rendered, TemplateError> {
        if chat.continue_final_message && chat.add_generation_prompt {
            return Err(TemplateError::ContinueAndGenerate);
        }
        for key in chat.kwargs.keys() {
            if RESERVED.contains(&key.as_str()) || self.named.contains_key(key) {
                return Err(TemplateError::Reserved { key: shown(key, 60) });
            }
        }
        let mut tools = chat.tools.cloned().unwrap_or(Value::Null);
        let mut messages = self.messages(chat.messages, !tools.is_null())?;
        let mut kwargs = chat.kwargs.clone();
        let marks = Marks::choose(&[chat.messages, &tools]);
        if let Some(Controls { all, turns, special }) = controls {
            for message in messages.as_array_mut().into_iter().flatten() {
                let guarded = match message.get("role").and_then(Value::as_str) {
                    Some("assistant") => special,
                    Some("system" | "developer") => turns,
                    _ => all,
                };
                marks.guard(message, guarded);
            }
            marks.guard(&mut tools, all);
            kwargs.values_mut().for_each(|v| marks.guard(v, all));
        }
        if chat.continue_final_message {
            let text = messages.as_array_mut().and_then(|m| m.last_mut()).and_then(last_text);
            text.ok_or(TemplateError::NothingToContinue)?.extend([marks.end, ' ']);
        }
        let mut context = kwargs;
        for (key, value) in &self.named {
            context.insert(key.clone(), Value::from(value.as_str()));
        }
        let tools_given = !tools.is_null();
        let size = json_size(&messages) + json_size(&tools);
        context.insert("messages".to_owned(), messages);
        context.insert("tools".to_owned(), tools);
        context.entry("documents".to_owned()).or_insert(Value::Null);
        context.insert("add_generation_prompt".to_owned(), Value::Bool(chat.add_generation_prompt));
        let name = if tools_given && self.has_tool_use { "tool_use" } else { "default" };
        let template = self.env.get_template(name).map_err(|e| failure(&e))?;
        let mut sink = Sink { out: Vec::new(), limit: OUTPUT_FACTOR * size + OUTPUT_BYTES, deadline: Instant::now() + TIME, full: None };
        let result = template.render_captured_to(Jinja::from(Serde(&context)), &mut sink).map(|_| ());
        if let Some(what) = sink.full {
            return Err(TemplateError::TooMuch { what });
        }
        result.map_err(|e| failure(&e))?;
        let mut text = String::from_utf8(sink.out).map_err(|_| TemplateError::Failed { reason: "not text".to_owned() })?;
        if chat.continue_final_message {
            let at = text.rfind(marks.end).ok_or(TemplateError::NothingToContinue)?;
            // The space that went with the mark tells a template that trims.
            let kept = text[at..].strip_prefix(marks.end).is_some_and(|rest| rest.starts_with(' '));
            text.truncate(at);
            if !kept {
                text.truncate(text.trim_end().len());
            }
        }
        Ok(marks.unmark(text, controls.map(|c| &c.all)))
    }

    /// A copy of the messages in the form the template reads: a developer's as the system's where it knows no developer; content parts joined into a string (by newlines, as
    /// vLLM does) unless it walks over parts itself; arguments of tool calls as objects; reasoning also as
    /// `reasoning_content` and `thinking`. Content that is null beside calls of tools is the empty string where the
    /// template has no words for null, and else stays null, which some templates look for.
    fn messages(&self, messages: &Value, tools_given: bool) -> Result<Value, TemplateError> {
        let mut messages = messages.clone();
        let list = messages.as_array_mut().ok_or(TemplateError::Messages)?;
        for (message, value) in list.iter_mut().enumerate() {
            let object = value.as_object_mut().ok_or(TemplateError::Messages)?;
            if let Some(role) = object.get_mut("role") {
                // Tools may bring in the branch that shows their results.
                if let Some(role) = self.dropped.iter().find(|r| **r == *role && !tools_given) {
                    return Err(TemplateError::Role { message, role });
                }
                if self.developer_is_system && role == "developer" {
                    *role = Value::from("system");
                }
            }
            let calls = object.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty());
            if let Some(content) = object.get_mut("content") {
                match content {
                    Value::Null if calls && self.null_is_empty => *content = Value::String(String::new()),
                    Value::Null | Value::String(_) => {}
                    Value::Array(parts) => {
                        let texts = parts.iter().enumerate().map(|(part, v)| part_text(message, part, v)).collect::<Result<Vec<_>, _>>()?;
                        *content = if self.reads_parts {
                            texts.into_iter().map(|t| json!({ "type": "text", "text": t })).collect()
                        } else {
                            Value::String(texts.join("\n"))
                        };
                    }
                    other => return Err(TemplateError::Content { message, got: shown_value(other) }),
                }
            }
            for call in object.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(arguments) = call.pointer_mut("/function/arguments")
                    && let Some(text) = arguments.as_str()
                {
                    // OpenAI's clients send them as text, templates were written for objects. What is no object stays text.
                    let parsed = if text.trim().is_empty() { Some(Value::Object(Map::new())) } else { serde_json::from_str(text).ok() };
                    if let Some(object @ Value::Object(_)) = parsed {
                        *arguments = object;
                    }
                }
            }
            let reasoning = ["reasoning_content", "thinking", "reasoning"];
            if let Some(text) = reasoning.iter().find_map(|k| object.get(*k).filter(|v| !v.is_null()).cloned()) {
                object.entry("thinking").or_insert_with(|| text.clone());
                object.insert("reasoning_content".to_owned(), text);
            }
        }
        Ok(messages)
    }

    /// What the template makes of messages that are already in its form.
    fn probe(&self, messages: Value) -> Result<String, TemplateError> {
        let mut context = Map::new();
        context.insert("messages".to_owned(), messages);
        context.insert("add_generation_prompt".to_owned(), Value::Bool(false));
        context.insert("tools".to_owned(), Value::Null);
        for (key, value) in &self.named {
            context.insert(key.clone(), Value::from(value.as_str()));
        }
        let template = self.env.get_template("default").map_err(|e| failure(&e))?;
        let mut sink = Sink { out: Vec::new(), limit: OUTPUT_BYTES, deadline: Instant::now() + TIME, full: None };
        let result = template.render_captured_to(Jinja::from(Serde(&context)), &mut sink).map(|_| ());
        if let Some(what) = sink.full {
            return Err(TemplateError::TooMuch { what });
        }
        result.map_err(|e| failure(&e))?;
        String::from_utf8(sink.out).map_err(|_| TemplateError::Failed { reason: "not text".to_owned() })
    }

    /// Finds out what the template does with what some templates cannot take.
    fn probe_all(&mut self) {
        // A template that walks over parts shows the text alone; one that does not fails or shows the list as Python would print it.
        let parts = self.probe(json!([{ "role": "user", "content": [{ "type": "text", "text": NEEDLE }] }]));
        if matches!(parts, Err(TemplateError::TooMuch { .. })) {
            // It would be so each time.
            return;
        }
        self.reads_parts =
            parts.is_ok_and(|out| out.contains(NEEDLE) && !out.contains(&format!("'{NEEDLE}'")) && !out.contains(&format!("\"{NEEDLE}\"")));
        self.probe_roles();
        let turns = |roles: &[&str]| roles.iter().map(|role| json!({ "role": role, "content": "x" })).collect::<Value>();
        let shown = |roles: &[&str]| self.probe(turns(roles)).ok();
        self.plain = shown(&["system", "user", "assistant", "user"]).or_else(|| shown(&["user", "assistant", "user"]));
        self.null_is_empty = self.probe_null();
    }

    /// Renders conversations with a message of each role that a template may not know. Where it fails on one, it says itself
    /// what it wants when it is asked in earnest.
    fn probe_roles(&mut self) {
        let opening = |role: &str| json!([{ "role": role, "content": NEEDLE }, { "role": "user", "content": ASKED }]);
        self.developer_is_system = !self.probe(opening("developer")).is_ok_and(|out| out.contains(NEEDLE));
        if self.developer_is_system && self.drops(vec![opening("system")]) {
            self.dropped.push("developer");
        }
        for role in ["tool", "function"] {
            // Templates differ in what they want to have been said before a result.
            let answers = [
                json!({ "role": "assistant", "content": "", "tool_calls": calls(json!({})) }),
                json!({ "role": "assistant", "content": null, "tool_calls": calls(json!("{}")) }),
                json!({ "role": "assistant", "content": "x" }),
            ];
            let result = json!({ "role": role, "name": "f", "tool_call_id": CALL_ID, "content": NEEDLE });
            let asked = json!({ "role": "user", "content": ASKED });
            if self.drops(answers.into_iter().map(|answer| json!([asked, answer, result])).collect()) {
                self.dropped.push(role);
            }
        }
    }

    /// Renders an answer of calls alone, with its content null and empty: null must neither fail nor show as Python prints it.
    fn probe_null(&self) -> bool {
        let nones = |content: Value, arguments: &Value| {
            let answer = json!({ "role": "assistant", "content": content, "tool_calls": calls(arguments.clone()) });
            Some(self.probe(json!([{ "role": "user", "content": ASKED }, answer])).ok()?.matches("None").count())
        };
        // Some templates put the arguments of calls into a string, others walk over them.
        !["{}".into(), json!({})]
            .iter()
            .any(|arguments| nones(Value::Null, arguments).is_some_and(|n| n <= nones(Value::from(""), arguments).unwrap_or(n)))
    }

    /// Whether the template shows the user's message of some of these conversations, and of none the one looked for.
    fn drops(&self, conversations: Vec<Value>) -> bool {
        let shown: Vec<String> = conversations.into_iter().filter_map(|c| self.probe(c).ok()).filter(|out| out.contains(ASKED)).collect();
        !shown.is_empty() && shown.iter().all(|out| !out.contains(NEEDLE))
    }
}

/// What probes look for in a prompt, and what a user says in them.
const NEEDLE: &str = "Zq7probe";
const ASKED: &str = "Xk3asked";
/// Mistral's templates want nine letters and digits.
const CALL_ID: &str = "Zq7call01";

/// Calls of tools, for a probe.
fn calls(arguments: Value) -> Value {
    json!([{ "id": CALL_ID, "type": "function", "function": { "name": "f", "arguments": arguments } }])
}

impl Tokenizer {
    /// The prompt of a conversation.
    ///
    /// `kwargs` are `chat_template_kwargs`: plain values for variables that the template reads. Special-token
    /// strings in messages, tools and kwargs become plain text tokens, and so do added tokens that the template spells, but for
    /// those in an assistant's messages, and what tells turns apart in a system's; the template's own become control tokens.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: &Map<String, Value>,
    ) -> Result<Vec<TokenId>, TextError> {
        let template = self.template().ok_or(TemplateError::Missing)?;
        for (key, value) in kwargs {
            if RESERVED.contains(&key.as_str()) {
                return Err(TemplateError::Reserved { key: shown(key, 60) }.into());
            }
            if !template.reads(key) && !CUSTOMARY.contains(&key.as_str()) {
                return Err(TemplateError::UnknownKwarg { key: shown(key, 60) }.into());
            }
            if value.is_array() || value.is_object() {
                return Err(TemplateError::NestedKwarg { key: shown(key, 60), value: shown_value(value) }.into());
            }
        }
        let chat = Chat { messages, tools, add_generation_prompt, continue_final_message, kwargs };
        let prompt = template.render_marked(&chat, Some(self.controls()))?;
        self.encode_guarded(&prompt.text, &prompt.guarded)
    }
}

/// A rendered prompt, and where in it special-token strings came from the input.
struct Rendered {
    text: String,
    guarded: Vec<Range<usize>>,
}

/// Private-use characters that occur nowhere in the input: one before and one after each special-token string of
/// it, one after a text in which such a string only begins, and one where the last message is to be continued.
struct Marks {
    open: char,
    close: char,
    end: char,
}

impl Marks {
    fn choose(inputs: &[&Value]) -> Marks {
        let texts: Vec<String> = inputs.iter().map(|v| v.to_string()).collect();
        // Plane 15 has 65,534 private characters; an input that uses all of them is several hundred kB of nothing
        // else, and gets marks that are merely unlikely.
        let mut used: Vec<char> = texts.iter().flat_map(|t| t.chars()).filter(|c| ('\u{F0000}'..='\u{FFFFD}').contains(c)).collect();
        used.sort_unstable();
        used.dedup();
        let mut free = ('\u{F5A10}'..='\u{FFFFD}').chain('\u{F0000}'..'\u{F5A10}').filter(|c| used.binary_search(c).is_err());
        let mut next = |fallback| free.next().unwrap_or(fallback);
        Marks { open: next('\u{F5A10}'), close: next('\u{F5A11}'), end: next('\u{F5A12}') }
    }

    /// Puts marks round every special-token string, and behind the beginning of one, in the strings and keys of `value`.
    fn guard(&self, value: &mut Value, specials: &Specials) {
        match value {
            Value::String(text) => {
                if let Some(marked) = self.guarded(text, specials) {
                    *text = marked;
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|v| self.guard(v, specials)),
            Value::Object(map) => {
                if map.keys().any(|k| self.guarded(k, specials).is_some()) {
                    let old = std::mem::take(map);
                    map.extend(old.into_iter().map(|(k, v)| (self.guarded(&k, specials).unwrap_or(k), v)));
                }
                map.values_mut().for_each(|v| self.guard(v, specials));
            }
            _ => {}
        }
    }

    fn guarded(&self, text: &str, specials: &Specials) -> Option<String> {
        let mut out = String::new();
        let mut done = 0;
        for range in specials.matches(text) {
            out.push_str(&text[done..range.start]);
            out.push(self.open);
            out.push_str(&text[range.clone()]);
            out.push(self.close);
            done = range.end;
        }
        // A template may put another text behind this one.
        let begun = specials.may_begin_in(text);
        (done > 0 || begun).then(|| {
            out.push_str(&text[done..]);
            out.extend(begun.then_some(self.close));
            out
        })
    }

    /// Takes the marks out, and finds the special-token strings that touched one: a template that cut the string at
    /// one side has left the mark of the other.
    fn unmark(&self, text: String, specials: Option<&Specials>) -> Rendered {
        let Some(specials) = specials.filter(|_| text.contains([self.open, self.close])) else {
            return Rendered { text, guarded: Vec::new() };
        };
        let mut out = String::with_capacity(text.len());
        // Positions in `out`; both ascend.
        let (mut opens, mut closes) = (Vec::new(), Vec::new());
        for c in text.chars() {
            match c {
                c if c == self.open => opens.push(out.len()),
                c if c == self.close => closes.push(out.len()),
                c => out.push(c),
            }
        }
        let any_in = |marks: &[usize], from: usize, to: usize| marks.get(marks.partition_point(|&m| m < from)).is_some_and(|&m| m < to);
        let guarded =
            specials.matches(&out).filter(|m| any_in(&opens, m.start, m.end) || any_in(&closes, m.start + 1, m.end + 1)).collect();
        Rendered { text: out, guarded }
    }
}

/// The last text of a message that can be continued.
fn last_text(message: &mut Value) -> Option<&mut String> {
    let text = match message.get_mut("content")? {
        Value::Array(parts) => parts.iter_mut().rev().find_map(|p| p.get_mut("text"))?,
        content => content,
    };
    match text {
        Value::String(s) => Some(s),
        _ => None,
    }
}

/// Text of one content part.
fn part_text(message: usize, part: usize, value: &Value) -> Result<&str, TemplateError> {
    if let Some(text) = value.as_str() {
        return Ok(text);
    }
    let kind = value.get("type").and_then(Value::as_str).unwrap_or("text");
    if !matches!(kind, "text" | "input_text" | "output_text") {
        return Err(TemplateError::Part { message, part, kind: shown(kind, 40) });
    }
    value.get("text").and_then(Value::as_str).ok_or(TemplateError::PartText { message, part })
}

/// Bytes of text in a value, roughly.
fn json_size(value: &Value) -> usize {
    match value {
        Value::String(s) => s.len() + 2,
        Value::Array(a) => a.iter().map(json_size).sum::<usize>() + 2,
        Value::Object(o) => o.iter().map(|(k, v)| k.len() + 4 + json_size(v)).sum::<usize>() + 2,
        _ => 8,
    }
}

/// Collects output up to a size and a time.
struct Sink {
    out: Vec<u8>,
    limit: usize,
    deadline: Instant,
    full: Option<&'static str>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.out.len() + bytes.len() > self.limit {
            self.full = Some("output");
        } else if Instant::now() > self.deadline {
            self.full = Some("time");
        }
        if self.full.is_some() {
            return Err(std::io::Error::other("too much"));
        }
        self.out.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn failure(error: &Error) -> TemplateError {
    // The exception may lie under the frames of macros and includes.
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(e) = next {
        if let Some(Exception(message)) = e.downcast_ref::<Exception>() {
            return TemplateError::Raised { message: shown(message, 140) };
        }
        if e.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::TooMuch { what: "work" };
        }
        next = e.source();
    }
    TemplateError::Failed { reason: shown(&error.to_string(), 140) }
}
