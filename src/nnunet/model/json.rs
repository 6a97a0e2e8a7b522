//! Typed access to JSON-like data with errors that name the file and the key path.

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::io::weights::printable;

/// Plans of large data sets reach a few megabytes.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Reads a JSON file. Python's `NaN` and `Infinity`, which are not JSON, are read as null.
pub(super) fn read(path: &Path) -> Result<Value> {
    let io = |e| Error::io("read", path, e);
    let meta = std::fs::metadata(path).map_err(io)?;
    let size = meta.len();
    if !meta.is_file() {
        return Err(Error::model(path, "file", "not a regular file"));
    }
    if size > MAX_JSON_BYTES {
        return Err(Error::model(path, "file size", format!("{size} bytes, expected at most {MAX_JSON_BYTES}")));
    }
    let bytes = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&without_python_numbers(&bytes)).map_err(|e| Error::model(path, "JSON", e.to_string()))
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

/// A value and where it stands.
#[derive(Clone)]
pub(super) struct Field<'a> {
    file: &'a Path,
    at: String,
    pub(super) value: &'a Value,
}

impl<'a> Field<'a> {
    pub(super) fn root(file: &'a Path, value: &'a Value) -> Self {
        Self { file, at: String::new(), value }
    }

    /// The value at `at` of `file`, as found by other means.
    pub(super) fn at(file: &'a Path, at: impl Into<String>, value: &'a Value) -> Self {
        Self { file, at: at.into(), value }
    }

    pub(super) fn error(&self, what: impl Into<String>) -> Error {
        Error::model(self.file, if self.at.is_empty() { "top level" } else { &self.at }, what)
    }

    fn wrong(&self, expected: &str) -> Error {
        let mut found = self.value.to_string();
        if found.len() > 60 {
            found = format!("{}...", found.chars().take(60).collect::<String>());
        }
        self.error(format!("{found}, expected {expected}"))
    }

    fn child(&self, key: &str, value: &'a Value) -> Field<'a> {
        let key = printable(key);
        let at = if self.at.is_empty() { key } else { format!("{}.{key}", self.at) };
        Field { file: self.file, at, value }
    }

    /// The value at `key`, where it is present and not null.
    pub(super) fn get(&self, key: &str) -> Option<Field<'a>> {
        let value = self.value.get(key)?;
        (!value.is_null()).then(|| self.child(key, value))
    }

    /// The value at `key`, which must be there.
    pub(super) fn need(&self, key: &str) -> Result<Field<'a>> {
        if !self.value.is_object() {
            return Err(self.wrong("an object"));
        }
        match self.value.get(key) {
            Some(value) => Ok(self.child(key, value)),
            None => Err(self.child(key, &Value::Null).error("missing")),
        }
    }

    pub(super) fn str(&self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.wrong("a text"))
    }

    pub(super) fn bool(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    /// An integer of at most `max`.
    pub(super) fn usize(&self, max: usize) -> Result<usize> {
        // Python writes some whole numbers as floats.
        let whole = |f: f64| ((0.0..=9e15).contains(&f) && f.fract() == 0.0).then_some(f as u64);
        let n = self.value.as_u64().or_else(|| self.value.as_f64().and_then(whole));
        match n.and_then(|n| usize::try_from(n).ok()) {
            Some(n) if n <= max => Ok(n),
            _ => Err(self.wrong(&format!("an integer from 0 to {max}"))),
        }
    }

    /// A finite number.
    pub(super) fn f64(&self) -> Result<f64> {
        self.value.as_f64().filter(|f| f.is_finite()).ok_or_else(|| self.wrong("a finite number"))
    }

    pub(super) fn items(&self) -> Result<Vec<Field<'a>>> {
        let list = self.value.as_array().ok_or_else(|| self.wrong("a list"))?;
        let item = |(i, value)| Field { file: self.file, at: format!("{}[{i}]", self.at), value };
        Ok(list.iter().enumerate().map(item).collect())
    }

    /// Exactly three items.
    pub(super) fn three<T>(&self, f: impl Fn(&Field<'a>) -> Result<T>) -> Result<[T; 3]> {
        let items = self.items()?;
        let [a, b, c] = &items[..] else {
            return Err(self.error(format!("{} items, expected 3", items.len())));
        };
        Ok([f(a)?, f(b)?, f(c)?])
    }

    pub(super) fn entries(&self) -> Result<Vec<(&'a str, Field<'a>)>> {
        let map = self.value.as_object().ok_or_else(|| self.wrong("an object"))?;
        Ok(map.iter().map(|(key, value)| (key.as_str(), self.child(key, value))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_numbers_become_null_outside_strings_only() {
        let text = br#"{"NaN \" NaN": [NaN, -Infinity,Infinity], "s": "Infinity\\", "x": -1.5}"#;
        let v: Value = serde_json::from_slice(&without_python_numbers(text)).unwrap();
        assert_eq!(v["NaN \" NaN"], serde_json::json!([null, null, null]));
        assert_eq!((v["s"].as_str(), v["x"].as_f64()), (Some("Infinity\\"), Some(-1.5)));
        assert!(matches!(without_python_numbers(b"{\"a\": 1}"), Cow::Borrowed(_)));
    }

    #[test]
    fn errors_name_the_key_path() {
        let v = serde_json::json!({"a": {"b": [1, 2.5, "x"]}});
        let root = Field::root(Path::new("plans.json"), &v);
        let b = root.need("a").unwrap().need("b").unwrap();
        assert_eq!(b.items().unwrap()[0].usize(9).unwrap(), 1);
        let e = b.items().unwrap()[2].f64().unwrap_err().to_string();
        assert_eq!(e, "plans.json: a.b[2]: \"x\", expected a finite number");
        let e = root.need("a").unwrap().need("c").err().unwrap().to_string();
        assert_eq!(e, "plans.json: a.c: missing");
        assert!(b.three(|f| f.usize(9)).is_err());
    }
}
