//! Reads JSON that may be hostile: bounded in memory, no duplicate keys, objects are objects.
//!
//! serde's derive accepts an array where a struct is expected, keeps the last of two equal keys or refuses them by
//! echoing their value, and narrows `1e39` to infinity. So bodies are read into [`Json`] first and taken apart by
//! [`Fields`], whose errors name the place and never the content.

use std::cell::Cell;
use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::Refusal;

/// Values a body may hold. Arrays of token ids do not count: they are kept as plain `u32`s.
pub const NODES_MAX: usize = 1 << 20;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Unsigned(u64),
    Negative(i64),
    Float(f64),
    Text(String),
    /// A non-empty array of integers that fit `u32`.
    Ids(Vec<u32>),
    Array(Vec<Json>),
    /// In order; keys are unique.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value as the type templates take.
    pub fn into_value(self) -> serde_json::Value {
        use serde_json::Value;
        match self {
            Json::Null => Value::Null,
            Json::Bool(b) => Value::Bool(b),
            Json::Unsigned(n) => n.into(),
            Json::Negative(n) => n.into(),
            Json::Float(x) => x.into(),
            Json::Text(s) => Value::String(s),
            Json::Ids(ids) => Value::Array(ids.into_iter().map(Value::from).collect()),
            Json::Array(items) => Value::Array(items.into_iter().map(Json::into_value).collect()),
            Json::Object(entries) => Value::Object(entries.into_iter().map(|(k, v)| (k, v.into_value())).collect()),
        }
    }
}

/// Parses a whole body, which must be one object.
///
/// # Errors
/// [`Refusal::Json`] with line and column, [`Refusal::Type`] if it is no object.
pub fn parse(body: &[u8]) -> Result<Vec<(String, Json)>, Refusal> {
    parse_within(body, NODES_MAX)
}

fn parse_within(body: &[u8], nodes: usize) -> Result<Vec<(String, Json)>, Refusal> {
    let seed = Seed { nodes: &Cell::new(nodes), fault: &Cell::new("the body is not valid JSON") };
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = seed.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    match value {
        Ok(Json::Object(entries)) => Ok(entries),
        Ok(_) => Err(Refusal::Type { param: String::new(), want: "an object" }),
        Err(error) => Err(Refusal::Json { fault: seed.fault.get(), line: error.line(), column: error.column() }),
    }
}

/// Carries what is left of the node budget, and what to say when parsing stops.
#[derive(Clone, Copy)]
struct Seed<'a> {
    nodes: &'a Cell<usize>,
    fault: &'a Cell<&'static str>,
}

impl Seed<'_> {
    fn take<E: serde::de::Error>(self, n: usize) -> Result<(), E> {
        match self.nodes.get().checked_sub(n) {
            Some(left) => {
                self.nodes.set(left);
                Ok(())
            }
            None => self.fail("the body holds too many values"),
        }
    }

    fn fail<T, E: serde::de::Error>(self, fault: &'static str) -> Result<T, E> {
        self.fault.set(fault);
        Err(E::custom(fault))
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Json;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, b: bool) -> Result<Json, E> {
        Ok(Json::Bool(b))
    }

    fn visit_u64<E>(self, n: u64) -> Result<Json, E> {
        Ok(Json::Unsigned(n))
    }

    fn visit_i64<E>(self, n: i64) -> Result<Json, E> {
        Ok(u64::try_from(n).map_or(Json::Negative(n), Json::Unsigned))
    }

    fn visit_f64<E>(self, x: f64) -> Result<Json, E> {
        Ok(Json::Float(x))
    }

    fn visit_str<E>(self, s: &str) -> Result<Json, E> {
        Ok(Json::Text(s.to_owned()))
    }

    fn visit_string<E>(self, s: String) -> Result<Json, E> {
        Ok(Json::Text(s))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut ids = Vec::new();
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            if items.is_empty() {
                if let Json::Unsigned(n) = item
                    && let Ok(id) = u32::try_from(n)
                {
                    ids.push(id);
                    continue;
                }
                self.take(ids.len())?;
                items.extend(ids.drain(..).map(|id| Json::Unsigned(u64::from(id))));
            }
            self.take(1)?;
            items.push(item);
        }
        Ok(if ids.is_empty() { Json::Array(items) } else { Json::Ids(ids) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut entries: Vec<(String, Json)> = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            self.take(1)?;
            entries.push((key, map.next_value_seed(self)?));
        }
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_unstable_by(|&a, &b| entries[a].0.cmp(&entries[b].0));
        if order.windows(2).any(|pair| entries[pair[0]].0 == entries[pair[1]].0) {
            return self.fail("an object of the body has the same key twice");
        }
        Ok(Json::Object(entries))
    }
}

/// An object being taken apart. Every reader treats `null` as absent.
pub struct Fields {
    path: String,
    entries: Vec<(String, Json)>,
}

impl Fields {
    /// Fields of the body itself.
    pub fn body(entries: Vec<(String, Json)>) -> Self {
        Fields { path: String::new(), entries }
    }

    /// Fields of `value`, which stands at `path`.
    pub fn of(value: Json, path: String) -> Result<Self, Refusal> {
        match value {
            Json::Object(entries) => Ok(Fields { path, entries }),
            _ => Err(Refusal::Type { param: path, want: "an object" }),
        }
    }

    /// Where a field stands, as errors name it: `messages[2].content`.
    pub fn param(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Takes a field out; `None` if it is absent or null.
    pub fn take(&mut self, name: &str) -> Option<Json> {
        let (_, value) = self.entries.iter_mut().find(|(key, _)| key == name)?;
        match std::mem::replace(value, Json::Null) {
            Json::Null => None,
            value => Some(value),
        }
    }

    /// Whether a field was there, be it null; one that was taken is.
    pub fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|(key, _)| key == name)
    }

    /// Whether a field is there to be taken.
    pub fn holds(&self, name: &str) -> bool {
        self.entries.iter().any(|(key, value)| key == name && *value != Json::Null)
    }

    /// What is left, in order, nulls included.
    pub fn rest(self) -> Vec<(String, Json)> {
        self.entries
    }

    fn wrong<T>(&self, name: &str, want: &'static str) -> Result<T, Refusal> {
        Err(Refusal::Type { param: self.param(name), want })
    }

    /// A boolean.
    pub fn bool(&mut self, name: &str) -> Result<Option<bool>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Bool(b)) => Ok(Some(b)),
            Some(_) => self.wrong(name, "a boolean"),
        }
    }

    /// A string.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Text(s)) => Ok(Some(s)),
            Some(_) => self.wrong(name, "a string"),
        }
    }

    /// An integer, written without fraction or exponent; `i128` holds every one the parser yields.
    pub fn integer(&mut self, name: &str) -> Result<Option<i128>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Unsigned(n)) => Ok(Some(i128::from(n))),
            Some(Json::Negative(n)) => Ok(Some(i128::from(n))),
            Some(_) => self.wrong(name, "an integer"),
        }
    }

    /// A finite number. It is checked as `f64`, so that narrowing cannot make an infinity of it.
    pub fn number(&mut self, name: &str) -> Result<Option<f64>, Refusal> {
        let x = match self.take(name) {
            None => return Ok(None),
            Some(Json::Unsigned(n)) => n as f64,
            Some(Json::Negative(n)) => n as f64,
            Some(Json::Float(x)) => x,
            Some(_) => return self.wrong(name, "a number"),
        };
        if x.is_finite() { Ok(Some(x)) } else { self.wrong(name, "a finite number") }
    }

    /// An integer of `range`.
    pub fn integer_in(&mut self, name: &str, range: RangeInclusive<i128>) -> Result<Option<i128>, Refusal> {
        match self.integer(name)? {
            Some(n) if !range.contains(&n) => {
                let rule = format!("must be an integer between {} and {}", range.start(), range.end());
                Err(Refusal::Value { param: self.param(name), rule })
            }
            other => Ok(other),
        }
    }

    /// A number of `range`, both ends included.
    pub fn number_in(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Refusal> {
        match self.number(name)? {
            Some(x) if !range.contains(&x) => {
                let rule = format!("must be between {} and {}", range.start(), range.end());
                Err(Refusal::Value { param: self.param(name), rule })
            }
            other => Ok(other),
        }
    }

    /// A nested object.
    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, Refusal> {
        let path = self.param(name);
        self.take(name).map(|value| Fields::of(value, path)).transpose()
    }

    /// An array.
    pub fn array(&mut self, name: &str) -> Result<Option<Vec<Json>>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Array(items)) => Ok(Some(items)),
            Some(Json::Ids(ids)) => Ok(Some(ids.into_iter().map(|id| Json::Unsigned(u64::from(id))).collect())),
            Some(_) => self.wrong(name, "an array"),
        }
    }

    /// An array of token ids.
    pub fn ids(&mut self, name: &str) -> Result<Option<Vec<u32>>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Ids(ids)) => Ok(Some(ids)),
            Some(Json::Array(items)) if items.is_empty() => Ok(Some(Vec::new())),
            Some(_) => self.wrong(name, "an array of token ids"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(body: &[u8]) -> String {
        match parse(body) {
            Ok(entries) => format!("ok: {entries:?}"),
            Err(Refusal::Json { fault, .. }) => fault.to_owned(),
            Err(Refusal::Type { want, .. }) => format!("want {want}"),
            Err(other) => format!("{other:?}"),
        }
    }

    #[test]
    fn bodies_that_are_not_one_json_object_are_refused() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        let invalid = "the body is not valid JSON";
        for (body, want) in [
            (&b""[..], invalid),
            (b"{", invalid),
            (b"{} x", invalid),
            (b"{}{}", invalid),
            (b"\xef\xbb\xbf{}", invalid),
            (b"{\"a\":\"\xff\"}", invalid),
            (br#"{"a":"\ud800"}"#, invalid),
            (b"{\"a\":NaN}", invalid),
            (b"{\"a\":1e309}", invalid),
            (deep.as_bytes(), invalid),
            (br#"{"a":1,"a":1}"#, "an object of the body has the same key twice"),
            (br#"{"b":{"a":1,"c":2,"a":3}}"#, "an object of the body has the same key twice"),
            (b"[]", "want an object"),
            (b"\"x\"", "want an object"),
            (b"5", "want an object"),
            (b"null", "want an object"),
            (br#"[["role"]]"#, "want an object"),
        ] {
            assert_eq!(fault(body), want, "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn values_are_kept_exactly() {
        let entries = parse(br#"{"u":18446744073709551615,"i":-9223372036854775808,"f":1.0,"s":"\u0000","ids":[1,2],"mixed":[1,"a"],"big":[4294967296],"e":[]}"#);
        let want = vec![
            ("u".to_owned(), Json::Unsigned(u64::MAX)),
            ("i".to_owned(), Json::Negative(i64::MIN)),
            ("f".to_owned(), Json::Float(1.0)),
            ("s".to_owned(), Json::Text("\0".to_owned())),
            ("ids".to_owned(), Json::Ids(vec![1, 2])),
            ("mixed".to_owned(), Json::Array(vec![Json::Unsigned(1), Json::Text("a".to_owned())])),
            ("big".to_owned(), Json::Array(vec![Json::Unsigned(1 << 32)])),
            ("e".to_owned(), Json::Array(vec![])),
        ];
        assert_eq!(entries.expect("valid"), want);
    }

    #[test]
    fn many_small_values_are_refused_and_many_token_ids_are_not() {
        let many = |item: &str, n: usize| format!("{{\"a\":[{}]}}", vec![item; n].join(","));
        for (item, n, fits) in [("{}", 99, true), ("{}", 100, false), ("7", 100_000, true), ("null", 100, false), ("[1]", 100, false)] {
            assert_eq!(parse_within(many(item, n).as_bytes(), 100).is_ok(), fits, "{n} x {item}");
        }
        // A list that stops being ids pays for all it held.
        assert!(parse_within(format!("{{\"a\":[{},null]}}", vec!["7"; 200].join(",")).as_bytes(), 100).is_err());
    }

    #[test]
    fn a_field_is_read_as_its_type_or_refused_by_name() {
        let entries = parse(br#"{"i":1.0,"f":3,"b":1,"n":null,"o":[1],"t":5}"#).expect("valid");
        let mut fields = Fields::body(entries);
        let name = |r: Refusal| match r {
            Refusal::Type { param, want } => format!("{param}: {want}"),
            other => format!("{other:?}"),
        };
        assert_eq!(fields.integer("i").map_err(name), Err("i: an integer".to_owned()));
        assert_eq!(fields.number("f").map_err(name), Ok(Some(3.0)));
        assert_eq!(fields.bool("b").map_err(name), Err("b: a boolean".to_owned()));
        assert_eq!(fields.bool("n").map_err(name), Ok(None));
        assert_eq!(fields.object("o").map(|_| ()).map_err(name), Err("o: an object".to_owned()));
        assert_eq!(fields.text("t").map_err(name), Err("t: a string".to_owned()));
    }
}
