//! JSON that cannot say two things at once: like `serde_json::Value`, but a key given twice is an error
//! (the plain parser keeps the last one silently, and other readers keep the first).

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Parses `bytes`; the error is one clause with line and column, at most 200 characters.
///
/// Depth is bounded by the parser (128). Memory is about 24 times the input, so callers cap the input.
pub fn parse(bytes: &[u8]) -> Result<Value, String> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err("it is a Git LFS pointer and not the file it stands for, which `git lfs pull` in that folder fetches".to_owned());
    }
    serde_json::from_slice::<Unique>(bytes).map(|v| v.0).map_err(|e| shown(&e.to_string(), 200))
}

/// `text` made fit for a message: control characters escaped, cut after `limit` characters.
pub fn shown(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == limit {
            out.push_str("...");
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// A JSON value as a message shows it.
pub fn shown_value(value: &Value) -> String {
    // Only the head of a large value is worth rendering; nested ones are named by kind.
    match value {
        Value::Array(a) if a.len() > 8 => format!("a list of {}", a.len()),
        Value::Object(o) if o.len() > 8 => format!("an object with {} keys", o.len()),
        other => shown(&other.to_string(), 80),
    }
}

struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Unique(v)) = seq.next_element()? {
            items.push(v);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let Unique(value) = map.next_value()?;
            if out.contains_key(&key) {
                return Err(A::Error::custom(format_args!("the key `{}` is given twice", shown(&key, 80))));
            }
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_plain_parser_except_for_a_key_given_twice() {
        for text in ["1", "-2.5", "null", r#"{"a":[1,{"b":"x"}],"c":true}"#, "[]", "1e400", "{", "[1,]", "\u{feff}{}"] {
            let (ours, plain) = (parse(text.as_bytes()), serde_json::from_str::<Value>(text));
            assert_eq!(ours.is_ok(), plain.is_ok(), "{text}");
            assert_eq!(ours.ok(), plain.ok(), "{text}");
        }
        let error = parse(br#"{"a":{"b":1,"b":2}}"#).unwrap_err();
        assert!(error.contains("`b` is given twice"), "{error}");
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
        let pointer = parse(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n").unwrap_err();
        assert!(pointer.contains("git lfs pull"), "{pointer}");
    }

    #[test]
    fn shown_text_is_short_and_has_no_control_characters() {
        assert_eq!(shown("a\n\u{1b}b", 80), "a\\n\\u{1b}b");
        assert_eq!(shown("abcdef", 3), "abc...");
    }
}
