//! Jinja as Hugging Face runs it, on an engine that is not Python: its filters, methods, numbers and dates in Python's
//! spelling, and the few constructs the engine's parser lacks, rewritten.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value as Jinja};

use crate::model::json::shown;

/// Work per render, in units of about one instruction or 64 bytes made: at most a quarter of a second and 256 MB.
const FUEL: u64 = 4_000_000;

/// What `raise_exception` carries, to tell it from a mistake of the template.
#[derive(Debug)]
pub(super) struct Exception(pub(super) String);

impl std::fmt::Display for Exception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Exception {}

/// Jinja as Hugging Face sets it up.
pub(super) fn environment(clock: impl Fn() -> i64 + Send + Sync + 'static) -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the delimiters are Jinja's own"));
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(128);
    env.set_unknown_method_callback(methods);
    env.add_function("raise_exception", |message: Rest<Jinja>| -> Result<Jinja, Error> {
        let message = message.first().map(ToString::to_string).unwrap_or_default();
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Exception(message)))
    });
    env.add_function("strftime_now", move |format: &str| -> Result<String, Error> {
        strftime(format, clock())
            .map_err(|c| Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know %{}", shown(&c.to_string(), 8))))
    });
    env.add_filter("tojson", tojson);
    env.add_filter("indent", indent);
    // Python calls strings and mappings sequences too: they have a length and can be indexed.
    env.add_test("sequence", |v: &Jinja| matches!(v.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map));
    env.add_test("iterable", |v: &Jinja| {
        matches!(v.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Undefined)
    });
    env
}

/// Python's methods: those of the contributed crate, and the few it lacks that templates use.
fn methods(state: &mut State<'_, '_>, value: &Jinja, method: &str, args: &[Jinja]) -> Result<Jinja, Error> {
    if let Some(s) = value.as_str() {
        match method {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Jinja::from(s.strip_prefix(prefix).unwrap_or(s)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                // Python leaves the string alone for an empty suffix, and so does this.
                return Ok(Jinja::from(s.strip_suffix(suffix).unwrap_or(s)));
            }
            "partition" | "rpartition" => {
                let (sep,): (&str,) = from_args(args)?;
                if sep.is_empty() {
                    return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
                }
                let parts = if method == "partition" {
                    s.split_once(sep).map_or([s, "", ""], |(a, b)| [a, sep, b])
                } else {
                    s.rsplit_once(sep).map_or(["", "", s], |(a, b)| [a, sep, b])
                };
                return Ok(parts.into_iter().map(Jinja::from).collect());
            }
            "rsplit" => {
                let (sep, max): (Option<&str>, Option<i64>) = from_args(args)?;
                let n = max.and_then(|m| usize::try_from(m).ok()).map_or(usize::MAX, |m| m.saturating_add(1));
                let mut parts: Vec<&str> = match sep {
                    Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
                    Some(sep) => s.rsplitn(n, sep).collect(),
                    None => rsplit_white(s, n),
                };
                parts.reverse();
                return Ok(parts.into_iter().map(Jinja::from).collect());
            }
            "index" => {
                let (what,): (&str,) = from_args(args)?;
                return match s.find(what) {
                    Some(at) => Ok(Jinja::from(s[..at].chars().count())),
                    None => Err(Error::new(ErrorKind::InvalidOperation, "substring not found")),
                };
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Splits at runs of white space from the right into at most `n` parts, last first.
fn rsplit_white(s: &str, n: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = s.trim();
    while !rest.is_empty() {
        if parts.len() + 1 == n {
            parts.push(rest);
            break;
        }
        match rest.rfind(char::is_whitespace) {
            Some(at) => {
                let word = at + rest[at..].chars().next().map_or(0, char::len_utf8);
                parts.push(&rest[word..]);
                rest = rest[..at].trim_end();
            }
            None => {
                parts.push(rest);
                break;
            }
        }
    }
    parts
}

/// `indent(width=4, first=False, blank=False)`, as Jinja does it: every line but the first and empty ones is indented,
/// and the line that ends with the text keeps its end. `width` may be the indentation itself.
fn indent(text: &str, args: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let mut args = args.0.into_iter();
    let mut argument = |name: &str, default: Jinja| -> Result<Jinja, Error> {
        match args.next() {
            Some(value) => Ok(value),
            None => Ok(kwargs.get::<Option<Jinja>>(name)?.unwrap_or(default)),
        }
    };
    let (width, first, blank) = (argument("width", Jinja::from(4))?, argument("first", false.into())?, argument("blank", false.into())?);
    kwargs.assert_all_used()?;
    let indention = match width.as_str() {
        Some(text) => text.to_owned(),
        None => {
            " ".repeat(usize::try_from(width).map_err(|_| Error::new(ErrorKind::InvalidOperation, "indent: width is no number"))?.min(256))
        }
    };
    let mut out = String::new();
    for (i, line) in text.split('\n').enumerate() {
        let line = line.strip_suffix('\r').unwrap_or(line);
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first.is_true() } else { blank.is_true() || !line.is_empty() } {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: Python's `json.dumps`.
fn tojson(state: &State<'_, '_>, value: &Jinja, args: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let argument = |i: usize, name: &str| -> Result<Option<Jinja>, Error> {
        let named: Option<Jinja> = kwargs.get(name)?;
        Ok(named.or_else(|| args.get(i).cloned()).filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let bad = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    let indent = match argument(1, "indent")? {
        None => None,
        Some(v) => match (v.as_str(), v.as_i64()) {
            (Some(s), _) if s.len() <= 32 => Some(s.to_owned()),
            (_, Some(n)) if n <= 32 => Some(" ".repeat(n.max(0) as usize)),
            _ => return Err(bad("indent is too large")),
        },
    };
    let (item, key) = match argument(2, "separators")? {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(v) => match (v.get_item(&Jinja::from(0))?.as_str(), v.get_item(&Jinja::from(1))?.as_str()) {
            (Some(a), Some(b)) if a.len() <= 32 && b.len() <= 32 => (a.to_owned(), b.to_owned()),
            _ => return Err(bad("separators are not two short strings")),
        },
    };
    let ascii = argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let sort = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let mut json = Json { out: String::new(), indent, item, key, ascii, sort, charged: 0 };
    json.write(state, value, 0)?;
    Ok(Jinja::from(json.out))
}

/// A writer of JSON in Python's spelling.
struct Json {
    out: String,
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
    /// Bytes of `out` that fuel was paid for.
    charged: usize,
}

impl Json {
    fn write(&mut self, state: &State<'_, '_>, value: &Jinja, depth: usize) -> Result<(), Error> {
        if depth > 128 {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
        }
        state.consume_fuel(1 + ((self.out.len() - self.charged) / 64) as u64)?;
        self.charged = self.out.len();
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(float) if !value.is_integer() => self.out.push_str(&python_float(float)),
                _ => self.out.push_str(&value.to_string()),
            },
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    let key = match key.kind() {
                        ValueKind::Bool => (if key.is_true() { "true" } else { "false" }).to_owned(),
                        ValueKind::None => "null".to_owned(),
                        _ => key.to_string(),
                    };
                    entries.push((key, item));
                }
                if self.sort {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.out.push('{');
                let empty = entries.is_empty();
                for (i, (key, item)) in entries.into_iter().enumerate() {
                    self.between(i, depth + 1);
                    self.string(&key);
                    self.out.push_str(&self.key);
                    self.write(state, &item, depth + 1)?;
                }
                self.close('}', empty, depth);
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut empty = true;
                for (i, item) in value.try_iter()?.enumerate() {
                    empty = false;
                    self.between(i, depth + 1);
                    self.write(state, &item, depth + 1)?;
                }
                self.close(']', empty, depth);
            }
            other => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: a value of type {other} is not JSON"))),
        }
        Ok(())
    }

    fn between(&mut self, i: usize, depth: usize) {
        if i > 0 {
            self.out.push_str(&self.item);
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || self.ascii && !c.is_ascii() => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `repr` of a Python float: the shortest digits that read back, with an exponent outside 1e-4 .. 1e16.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// A template's source in the engine's dialect.
pub(super) fn translated(source: &str) -> String {
    with_format_filter(&without_generation_tags(source))
}

/// `{% generation %}` marks training data and nothing in a prompt: it becomes a block that is always shown.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[2..end];
        let bare = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match bare {
            "generation" => out.push_str(&format!("{{%{}%}}", inner.replace("generation", "if true"))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", inner.replace("endgeneration", "endif"))),
            _ => {
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        }
        rest = &tag[end + 2..];
    }
    out + rest
}

/// `'...' % x` as `'...'|format(x)`: the engine has Python's formatting as a filter only. Rewritten where the left
/// side is a string literal, which is how templates use it; any other `%` is a remainder.
fn with_format_filter(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let (open, inner) = tag.split_at(2);
        out.push_str(open);
        let (close, body) = match open {
            "{#" => ("#}", inner.find("#}").unwrap_or(inner.len())),
            "{%" => ("%}", tag_end(inner, "%}")),
            _ => ("}}", tag_end(inner, "}}")),
        };
        let (body, after) = inner.split_at(body);
        let raw = open == "{%" && body.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') == "raw";
        if raw {
            // Up to the end of the block nothing is a tag but its own end.
            let end = after.find("endraw").unwrap_or(after.len());
            out.push_str(body);
            out.push_str(&after[..end]);
            rest = &after[end..];
            continue;
        }
        out.push_str(&if open == "{#" { body.to_owned() } else { format_in_expression(body) });
        let close = after.strip_prefix(close).map_or("", |_| close);
        out.push_str(close);
        rest = &after[close.len()..];
    }
    out + rest
}

/// Where a tag ends: at `close`, outside strings and brackets.
fn tag_end(text: &str, close: &str) -> usize {
    let (mut i, mut depth) = (0, 0usize);
    while i < text.len() {
        let byte = text.as_bytes()[i];
        if depth == 0 && text.as_bytes()[i..].starts_with(close.as_bytes()) {
            return i;
        }
        match byte {
            b'\'' | b'"' => {
                i = string_end(text, i);
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        i += 1;
    }
    text.len()
}

/// Past the string literal that begins at byte `at`.
fn string_end(text: &str, at: usize) -> usize {
    let bytes = text.as_bytes();
    let mut i = at + 1;
    while i < bytes.len() && bytes[i] != bytes[at] {
        i += if bytes[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(bytes.len())
}

/// Past the bracket group that begins at byte `at`.
fn group_end(text: &str, at: usize) -> usize {
    let inside = at + 1;
    let close = match text.as_bytes()[at] {
        b'(' => ")",
        b'[' => "]",
        _ => "}",
    };
    (inside + tag_end(&text[inside..], close) + 1).min(text.len())
}

fn skip_space(text: &str, at: usize) -> usize {
    text.len() - text[at..].trim_start().len()
}

fn format_in_expression(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut i, mut done) = (0, 0);
    while i < text.len() {
        if !matches!(text.as_bytes()[i], b'\'' | b'"') {
            i += 1;
            continue;
        }
        let literal = i;
        i = string_end(text, i);
        let operator = skip_space(text, i);
        if text.as_bytes().get(operator) != Some(&b'%') {
            continue;
        }
        let begin = skip_space(text, operator + 1);
        let end = operand_end(text, begin);
        if end == begin {
            continue;
        }
        let operand = &text[begin..end];
        // A tuple is several arguments; of anything else the value is one.
        let inner = operand.strip_prefix('(').filter(|_| group_end(text, begin) == end).and_then(|o| o.strip_suffix(')'));
        let tuple = inner.filter(|inner| tag_end(inner, ",") < inner.len());
        out.push_str(&text[done..i]);
        let named = text[literal..i].contains("%(");
        out.push_str(if named { "|format(**" } else { "|format(" });
        out.push_str(&format_in_expression(tuple.unwrap_or(operand)));
        out.push(')');
        (i, done) = (end, end);
    }
    out + &text[done..]
}

/// Past an operand of `%`: a literal, name or bracket with its attributes, indices, calls and filters.
fn operand_end(text: &str, begin: usize) -> usize {
    let bytes = text.as_bytes();
    let word = |mut i: usize| {
        while i < bytes.len() && (bytes[i].is_ascii_alphanumeric() || bytes[i] == b'_' || !bytes[i].is_ascii()) {
            i += 1;
        }
        i
    };
    let sign = begin + usize::from(matches!(bytes.get(begin), Some(b'-' | b'+')));
    let mut i = match bytes.get(sign) {
        Some(b'\'' | b'"') => string_end(text, sign),
        Some(b'(' | b'[' | b'{') => group_end(text, sign),
        _ => word(sign),
    };
    if i == sign {
        return begin;
    }
    loop {
        i = match bytes.get(i) {
            Some(b'.') => word(i + 1),
            Some(b'(' | b'[') => group_end(text, i),
            _ => {
                let bar = skip_space(text, i);
                if bytes.get(bar) != Some(&b'|') {
                    return i;
                }
                word(skip_space(text, bar + 1))
            }
        };
    }
}

/// `time.strftime` of the C locale at `seconds` since 1970 in UTC, or the letter it does not know.
fn strftime(format: &str, seconds: i64) -> Result<String, char> {
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [&str; 12] =
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
    let days = seconds.div_euclid(86_400);
    let second = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // Days since 1 March of year 0, in eras of 400 years (Hinnant, "chrono-compatible low-level date algorithms").
    let z = days + 719_468;
    let (era, day_of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_march_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_march_year + 2) / 153;
    let day = day_of_march_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let weekday = (days + 4).rem_euclid(7) as usize;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let before: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let day_of_year = before[month as usize - 1] + day + i64::from(leap && month > 2);
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut letter = chars.next().unwrap_or('%');
        // GNU's flag for "no padding".
        let bare = letter == '-';
        if bare {
            letter = chars.next().unwrap_or('%');
        }
        let two = |n: i64| if bare { n.to_string() } else { format!("{n:02}") };
        let text = match letter {
            'd' => two(day),
            'e' => {
                if bare {
                    day.to_string()
                } else {
                    format!("{day:2}")
                }
            }
            'm' => two(month),
            'y' => two(year.rem_euclid(100)),
            'Y' => year.to_string(),
            'H' => two(hour),
            'I' => two(hour12),
            'M' => two(minute),
            'S' => two(second),
            'j' => {
                if bare {
                    day_of_year.to_string()
                } else {
                    format!("{day_of_year:03}")
                }
            }
            'p' => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            'A' => DAYS[weekday].to_owned(),
            'a' => DAYS[weekday][..3].to_owned(),
            'B' => MONTHS[month as usize - 1].to_owned(),
            'b' | 'h' => MONTHS[month as usize - 1][..3].to_owned(),
            'w' => weekday.to_string(),
            'u' => (if weekday == 0 { 7 } else { weekday }).to_string(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'R' => format!("{hour:02}:{minute:02}"),
            'D' => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            'c' => format!("{} {} {day:2} {hour:02}:{minute:02}:{second:02} {year}", &DAYS[weekday][..3], &MONTHS[month as usize - 1][..3]),
            'x' => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            'X' => format!("{hour:02}:{minute:02}:{second:02}"),
            's' => seconds.to_string(),
            'f' => "000000".to_owned(),
            'z' => "+0000".to_owned(),
            'Z' => "UTC".to_owned(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            other => return Err(other),
        };
        out.push_str(&text);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_pythons() {
        // Checked against Python's datetime in UTC.
        let cases = [
            (0, "%A %d %B %Y %H:%M:%S %j %p %I", "Thursday 01 January 1970 00:00:00 001 AM 12"),
            (951_782_400, "%a %d %b %Y %j %y %-d/%-m", "Tue 29 Feb 2000 060 00 29/2"),
            (1_735_689_599, "%c|%F|%T|%D|%e|%%", "Tue Dec 31 23:59:59 2024|2024-12-31|23:59:59|12/31/24|31|%"),
            (-1, "%F %T %w %u", "1969-12-31 23:59:59 3 3"),
            (4_102_444_800, "%F %j", "2100-01-01 001"),
        ];
        for (seconds, format, want) in cases {
            assert_eq!(strftime(format, seconds).as_deref(), Ok(want));
        }
        assert_eq!(strftime("%Q", 0), Err('Q'));
    }

    #[test]
    fn floats_are_pythons() {
        let cases: [(f64, &str); 10] = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (123456.789, "123456.789"),
            (f64::NAN, "NaN"),
        ];
        for (x, want) in cases {
            assert_eq!(python_float(x), want);
        }
    }

    #[test]
    fn percent_becomes_a_filter_after_string_literals_only() {
        let cases = [
            ("{{ '%s' % x }}", "{{ '%s'|format(x) }}"),
            ("{{ '%s %d' % (a, f(1, 2)) }}", "{{ '%s %d'|format(a, f(1, 2)) }}"),
            ("{{ \"%s\"%m['a'].b|upper ~ 'x' }}", "{{ \"%s\"|format(m['a'].b|upper) ~ 'x' }}"),
            ("{% set x = '%s' % ('y' % z) %}", "{% set x = '%s'|format(('y'|format(z))) %}"),
            ("{{ '%(a)s' % d }}", "{{ '%(a)s'|format(**d) }}"),
            ("{% if loop.index0 % 2 == 0 %}'a' % b{% endif %}", "{% if loop.index0 % 2 == 0 %}'a' % b{% endif %}"),
            ("{% set x = 'a' %}{{ {'k': {'a': 1}} }}", "{% set x = 'a' %}{{ {'k': {'a': 1}} }}"),
            ("{{ 'it\\'s }} %' }}{# '%s' % x #}", "{{ 'it\\'s }} %' }}{# '%s' % x #}"),
            ("{% raw %}{{ '%s' % x }}{% endraw %}{{ 'a' % b }}", "{% raw %}{{ '%s' % x }}{% endraw %}{{ 'a'|format(b) }}"),
            ("{{ '%s' % ", "{{ '%s' % "),
            ("{{ 'ö' % (", "{{ 'ö'|format(()"),
            ("{% 'x", "{% 'x"),
        ];
        for (source, want) in cases {
            assert_eq!(with_format_filter(source), want);
        }
    }

    #[test]
    fn generation_tags_keep_their_white_space_control() {
        let source = "a{%- generation -%} b {% endgeneration %}{% if x %}c{% endif %}{% generation";
        assert_eq!(without_generation_tags(source), "a{%- if true -%} b {% endif %}{% if x %}c{% endif %}{% generation");
    }
}
