//! JSON as Python's `json` module writes and reads it, byte for byte: files that nnU-Net shares.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt::{self, Write};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// A value to write. Unlike [`Value`] it holds NaN and infinities, which Python writes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Json>),
    /// Keys in order, as a Python dict keeps them.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// An object of these entries.
    pub(crate) fn object<const N: usize>(entries: [(&str, Json); N]) -> Self {
        Json::Object(entries.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
    }

    /// A list of these items.
    pub(crate) fn list<T: Into<Json>>(items: impl IntoIterator<Item = T>) -> Self {
        Json::List(items.into_iter().map(Into::into).collect())
    }

    /// `json.dumps(self, indent=4)`, with `sort_keys` as given.
    pub(crate) fn to_text(&self, sort_keys: bool) -> String {
        let mut out = String::new();
        write(self, sort_keys, 0, &mut out);
        out
    }
}

impl From<&Value> for Json {
    fn from(value: &Value) -> Self {
        match value {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Number(n) => n.as_i64().map_or_else(|| Json::Float(n.as_f64().unwrap_or(f64::NAN)), Json::Int),
            Value::String(s) => Json::Text(s.clone()),
            Value::Array(items) => Json::list(items),
            Value::Object(map) => Json::Object(map.iter().map(|(k, v)| (k.clone(), v.into())).collect()),
        }
    }
}

impl From<Value> for Json {
    fn from(value: Value) -> Self {
        Self::from(&value)
    }
}

impl From<f64> for Json {
    fn from(value: f64) -> Self {
        Json::Float(value)
    }
}

impl From<usize> for Json {
    fn from(value: usize) -> Self {
        // Sizes of images are far below.
        i64::try_from(value).map_or(Json::Float(value as f64), Json::Int)
    }
}

impl From<bool> for Json {
    fn from(value: bool) -> Self {
        Json::Bool(value)
    }
}

impl From<&str> for Json {
    fn from(value: &str) -> Self {
        Json::Text(value.to_owned())
    }
}

impl From<&String> for Json {
    fn from(value: &String) -> Self {
        Json::Text(value.clone())
    }
}

fn write(value: &Json, sort: bool, indent: usize, out: &mut String) {
    // Writing to a String cannot fail.
    let _ = match value {
        Json::Null => out.write_str("null"),
        Json::Bool(b) => write!(out, "{b}"),
        Json::Int(i) => write!(out, "{i}"),
        Json::Float(f) => out.write_str(&float(*f)),
        Json::Text(s) => return text(s, out),
        Json::List(items) if items.is_empty() => out.write_str("[]"),
        Json::List(items) => {
            return block(['[', ']'], items, indent, out, |item, out| write(item, sort, indent + 4, out));
        }
        Json::Object(entries) if entries.is_empty() => out.write_str("{}"),
        Json::Object(entries) => {
            let mut order: Vec<&(String, Json)> = entries.iter().collect();
            if sort {
                order.sort_by(|a, b| a.0.cmp(&b.0));
            }
            return block(['{', '}'], &order, indent, out, |(key, value), out| {
                text(key, out);
                out.push_str(": ");
                write(value, sort, indent + 4, out);
            });
        }
    };
}

/// One item a line between brackets.
fn block<T>([open, close]: [char; 2], items: &[T], indent: usize, out: &mut String, item: impl Fn(&T, &mut String)) {
    out.push(open);
    for (i, value) in items.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let _ = write!(out, "{comma}\n{:1$}", "", indent + 4);
        item(value, out);
    }
    let _ = write!(out, "\n{:indent$}{close}", "");
}

/// `repr` of a Python float: the fewest digits that read back the same, of those the nearest, the even one of two; an
/// exponent below 1e-4 and from 1e16 on.
pub(crate) fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    // Of two texts that are equally near Rust takes the larger one.
    let mut text = format!("{value:e}");
    let digits = text.bytes().take_while(|b| *b != b'e').filter(u8::is_ascii_digit).count();
    let even = format!("{value:.*e}", digits - 1);
    if even.parse() == Ok(value) {
        text = even;
    }
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let (sign, mantissa) = mantissa.strip_prefix('-').map_or(("", mantissa), |m| ("-", m));
    let mut digits: String = mantissa.chars().filter(|c| *c != '.').collect();
    if exponent < 0 {
        digits.insert_str(0, &"0".repeat(exponent.unsigned_abs() as usize));
    }
    let point = exponent.max(0) as usize + 1;
    while digits.len() < point + 1 {
        digits.push('0');
    }
    digits.insert(point, '.');
    format!("{sign}{digits}")
}

/// A string with everything but printable ASCII escaped (`ensure_ascii`).
fn text(value: &str, out: &mut String) {
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

/// Reads JSON; Python's `NaN` and `Infinity`, which are none, become null.
pub(crate) fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(&without_python_numbers(bytes))
}

/// As [`parse`], but a key that stands twice in one object, of which Python silently keeps the last, is an error.
pub(crate) fn parse_unique(bytes: &[u8]) -> serde_json::Result<Value> {
    let plain = without_python_numbers(bytes);
    serde_json::from_slice::<Unique>(&plain)?;
    serde_json::from_slice(&plain)
}

/// `NaN`, `Infinity` and `-Infinity` outside strings become `null`.
fn without_python_numbers(bytes: &[u8]) -> Cow<'_, [u8]> {
    const TOKENS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let mut out: Option<Vec<u8>> = None;
    let (mut i, mut in_string) = (0, false);
    while i < bytes.len() {
        let token = if in_string { None } else { TOKENS.iter().find(|t| bytes[i..].starts_with(t)) };
        if let Some(token) = token {
            out.get_or_insert_with(|| bytes[..i].to_vec()).extend_from_slice(b"null");
            i += token.len();
            continue;
        }
        // An escape takes the next byte along, so that an escaped quote does not end the string.
        let n = if in_string && bytes[i] == b'\\' { 2.min(bytes.len() - i) } else { 1 };
        in_string ^= bytes[i] == b'"';
        if let Some(out) = &mut out {
            out.extend_from_slice(&bytes[i..i + n]);
        }
        i += n;
    }
    out.map_or(Cow::Borrowed(bytes), Cow::Owned)
}

/// Any JSON whose objects have no key twice.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_unit<E>(self) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Unique, A::Error> {
        while items.next_element::<Unique>()?.is_some() {}
        Ok(Unique)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Unique, A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                let shown: String = key.chars().take(80).collect();
                return Err(serde::de::Error::custom(format!("{shown:?} stands there twice, expected once")));
            }
            entries.next_value::<Unique>()?;
        }
        Ok(Unique)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_are_those_of_python() {
        for (value, python) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (0.1 + 0.2, "0.30000000000000004"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (0.00012345, "0.00012345"),
            (9.9999e-5, "9.9999e-05"),
            (1e15, "1000000000000000.0"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (1e16, "1e+16"),
            (1.5e-300, "1.5e-300"),
            (-1.797_693_134_862_315_7e308, "-1.7976931348623157e+308"),
            (5e-324, "5e-324"),
            (3.249_871_253_967_285, "3.249871253967285"),
            (2.005_958_557_128_906_2, "2.0059585571289062"),
            (2.180_641_174_316_406_2, "2.1806411743164062"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (5e-324 * 3.0, "1.5e-323"),
            (f64::MIN_POSITIVE, "2.2250738585072014e-308"),
            (123_456.0, "123456.0"),
            (0.000_5, "0.0005"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(value), python);
        }
    }

    #[test]
    fn layout_is_that_of_python() {
        let value = Json::object([
            ("b", Json::list([1.0, 2.0])),
            ("a", Json::object([("z", Json::Null), ("y", json!(["\u{e9}\u{1f600}\"\\\n\u{7f}/", true, []]).into())])),
            ("c", json!({}).into()),
        ]);
        let text = r#"{
    "b": [
        1.0,
        2.0
    ],
    "a": {
        "z": null,
        "y": [
            "\u00e9\ud83d\ude00\"\\\n\u007f/",
            true,
            []
        ]
    },
    "c": {}
}"#;
        assert_eq!(value.to_text(false), text);
        let sorted = value.to_text(true);
        let keys: Vec<&str> = sorted.lines().filter_map(|l| l.trim().split_once("\": ")).map(|(k, _)| k).collect();
        assert_eq!(keys, ["\"a", "\"y", "\"z", "\"b", "\"c"]);
    }

    #[test]
    fn python_numbers_become_null_outside_strings_only() {
        let text = br#"{"NaN \" NaN": [NaN, -Infinity,Infinity], "s": "Infinity\\", "x": -1.5}"#;
        let v = parse(text).unwrap();
        assert_eq!(v["NaN \" NaN"], json!([null, null, null]));
        assert_eq!((v["s"].as_str(), v["x"].as_f64()), (Some("Infinity\\"), Some(-1.5)));
        assert!(matches!(without_python_numbers(b"{\"a\": 1}"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_key_that_stands_twice_is_found() {
        assert_eq!(parse_unique(br#"{"a": {"b": 1}, "b": [1, -2, 3.5, "x", null, NaN]}"#).unwrap()["a"]["b"], 1);
        let e = parse_unique(br#"{"a": [{"b": 1, "c": 2, "b": 3}]}"#).unwrap_err().to_string();
        assert!(e.starts_with("\"b\" stands there twice"), "{e}");
    }
}
