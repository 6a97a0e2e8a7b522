//! Typed access to JSON-like data with errors that name the file and the key path.

use std::io::Write;
use std::path::Path;

use serde_json::Value;

use crate::base::json::{self, Json};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::weights::printable;

/// Plans of large data sets reach a few megabytes.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Whose file it is, and so which error tells of its faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// [`Error::Model`].
    Model,
    /// [`Error::Dataset`].
    Dataset,
}

impl Kind {
    fn error(self, file: &Path, field: impl Into<String>, what: impl Into<String>) -> Error {
        match self {
            Kind::Model => Error::model(file, field, what),
            Kind::Dataset => Error::dataset(file, field, what),
        }
    }
}

/// Reads a JSON file of a model. Python's `NaN` and `Infinity`, which are not JSON, are read as null.
pub(crate) fn read(path: &Path) -> Result<Value> {
    let bytes = bytes(path, Kind::Model, MAX_JSON_BYTES)?;
    json::parse(&bytes).map_err(|e| Error::model(path, "JSON", e.to_string()))
}

/// As [`read`] for a file of a data set; no key may stand twice in an object.
pub(crate) fn read_dataset(path: &Path) -> Result<Value> {
    read_dataset_up_to(path, MAX_JSON_BYTES)
}

/// As [`read_dataset`] for a file that should have no more bytes than `most`.
pub(crate) fn read_dataset_up_to(path: &Path, most: u64) -> Result<Value> {
    let bytes = bytes(path, Kind::Dataset, most)?;
    json::parse_unique(&bytes).map_err(|e| Error::dataset(path, "JSON", e.to_string()))
}

fn bytes(path: &Path, kind: Kind, most: u64) -> Result<Vec<u8>> {
    let io = |e| Error::io("read", path, e);
    let meta = std::fs::metadata(path).map_err(io)?;
    let size = meta.len();
    if !meta.is_file() {
        return Err(kind.error(path, "file", "not a regular file"));
    }
    if size > most {
        return Err(kind.error(path, "file size", format!("{size} bytes, expected at most {most}")));
    }
    std::fs::read(path).map_err(io)
}

/// Writes a JSON file as nnU-Net's `save_json` does: whole or not at all, indented by four.
pub(crate) fn write(path: &Path, value: &Json, sort_keys: bool) -> Result<()> {
    let text = value.to_text(sort_keys);
    write_atomically(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io("write", path, e)))
}

/// A value and where it stands.
#[derive(Clone)]
pub(crate) struct Field<'a> {
    file: &'a Path,
    kind: Kind,
    at: String,
    pub(crate) value: &'a Value,
}

impl<'a> Field<'a> {
    pub(crate) fn root(file: &'a Path, value: &'a Value) -> Self {
        Self { file, kind: Kind::Model, at: String::new(), value }
    }

    /// As [`Field::root`] of a file of a data set.
    pub(crate) fn of_dataset(file: &'a Path, value: &'a Value) -> Self {
        Self { file, kind: Kind::Dataset, at: String::new(), value }
    }

    /// The value at `at` of `file`, as found by other means.
    pub(crate) fn at(file: &'a Path, at: impl Into<String>, value: &'a Value) -> Self {
        Self { file, kind: Kind::Model, at: at.into(), value }
    }

    pub(crate) fn file(&self) -> &'a Path {
        self.file
    }

    pub(crate) fn error(&self, what: impl Into<String>) -> Error {
        self.kind.error(self.file, if self.at.is_empty() { "top level" } else { &self.at }, what)
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
        Field { file: self.file, kind: self.kind, at, value }
    }

    /// The value at `key`, where it is present and not null.
    pub(crate) fn get(&self, key: &str) -> Option<Field<'a>> {
        let value = self.value.get(key)?;
        (!value.is_null()).then(|| self.child(key, value))
    }

    /// The value at `key`, which must be there.
    pub(crate) fn need(&self, key: &str) -> Result<Field<'a>> {
        if !self.value.is_object() {
            return Err(self.wrong("an object"));
        }
        match self.value.get(key) {
            Some(value) => Ok(self.child(key, value)),
            None => Err(self.child(key, &Value::Null).error("missing")),
        }
    }

    pub(crate) fn str(&self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.wrong("a text"))
    }

    pub(crate) fn bool(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    /// An integer of at most `max`.
    pub(crate) fn usize(&self, max: usize) -> Result<usize> {
        // Python writes some whole numbers as floats.
        let whole = |f: f64| ((0.0..=9e15).contains(&f) && f.fract() == 0.0).then_some(f as u64);
        let n = self.value.as_u64().or_else(|| self.value.as_f64().and_then(whole));
        match n.and_then(|n| usize::try_from(n).ok()) {
            Some(n) if n <= max => Ok(n),
            _ => Err(self.wrong(&format!("an integer from 0 to {max}"))),
        }
    }

    /// A finite number.
    pub(crate) fn f64(&self) -> Result<f64> {
        self.value.as_f64().filter(|f| f.is_finite()).ok_or_else(|| self.wrong("a finite number"))
    }

    pub(crate) fn items(&self) -> Result<Vec<Field<'a>>> {
        let list = self.value.as_array().ok_or_else(|| self.wrong("a list"))?;
        let item = |(i, value)| Field { file: self.file, kind: self.kind, at: format!("{}[{i}]", self.at), value };
        Ok(list.iter().enumerate().map(item).collect())
    }

    /// Exactly three items.
    pub(crate) fn three<T>(&self, f: impl Fn(&Field<'a>) -> Result<T>) -> Result<[T; 3]> {
        let items = self.items()?;
        let [a, b, c] = &items[..] else {
            return Err(self.error(format!("{} items, expected 3", items.len())));
        };
        Ok([f(a)?, f(b)?, f(c)?])
    }

    pub(crate) fn entries(&self) -> Result<Vec<(&'a str, Field<'a>)>> {
        let map = self.value.as_object().ok_or_else(|| self.wrong("an object"))?;
        Ok(map.iter().map(|(key, value)| (key.as_str(), self.child(key, value))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
