//! The two streams. A reader that closed its end (`stunet info | head -1`) is no failure, and never a panic.

use std::io::{ErrorKind, Write};
use std::path::Path;

use serde_json::Value;
use stunet::{Error, Result};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::progress::above_bar;

/// Writes `text` as it stands to standard output.
pub(super) fn text(text: &str) -> Result<()> {
    let written = above_bar(|| {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    });
    match written {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::Io { path: "standard output".into(), action: "write", source: e })
        }
        _ => Ok(()),
    }
}

/// Writes one line to standard output.
pub(super) fn line(line: impl std::fmt::Display) -> Result<()> {
    text(&format!("{line}\n"))
}

/// Writes the path of a finished file to standard output.
pub(super) fn path(path: &Path) -> Result<()> {
    line(path.display())
}

/// One line `error: ...` on standard error.
pub(super) fn say_error(what: &str) {
    tell("error: ", what);
}

/// One line `warning: ...` on standard error.
pub(super) fn say_warning(what: &str) {
    tell("warning: ", what);
}

/// Prints the library's warnings as [`say_warning`] does.
pub(super) fn show_library_warnings() {
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).event_format(OneLine);
    // Fails only when one is set already.
    let _ = subscriber.with_writer(std::io::sink).try_init();
}

struct OneLine;

impl<S, N> FormatEvent<S, N> for OneLine
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, cx: &FmtContext<'_, S, N>, _: Writer<'_>, event: &tracing::Event<'_>) -> std::fmt::Result {
        let mut text = String::new();
        cx.format_fields(Writer::new(&mut text), event)?;
        say_warning(&text);
        Ok(())
    }
}

/// One line of progress on standard error.
pub(super) fn say(what: &str) {
    tell("", what);
}

/// File names and headers come from strangers: whatever is no plain text is shown as a space.
fn tell(kind: &str, what: &str) {
    let plain: String = what.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = format!("{kind}{}\n", plain.split_whitespace().collect::<Vec<_>>().join(" "));
    // Nothing can be done when standard error is closed.
    above_bar(|| drop(std::io::stderr().write_all(line.as_bytes())));
}

/// Rows of cells as lines, each column as wide as its widest cell.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().enumerate().map(|(i, cell)| format!("{cell:0$}", width(i))).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// Prints the fields of a JSON object, one a line, nested ones indented; of a list of objects, each is headed by the
/// value of its first field.
pub(super) fn table(value: &Value) -> Result<()> {
    let mut out = String::new();
    rows(value, 0, &mut out);
    text(&out)
}

fn rows(value: &Value, indent: usize, out: &mut String) {
    let Value::Object(fields) = value else { return };
    let width = fields.keys().map(String::len).max().unwrap_or(0);
    for (key, value) in fields {
        let key = key.replace('_', " ");
        match (one_line(value), value) {
            (Some(text), _) => out.push_str(&format!("{:indent$}{key:width$}  {text}\n", "")),
            (None, Value::Array(items)) => {
                out.push_str(&format!("{:indent$}{key}\n", ""));
                items.iter().for_each(|item| list_item(item, indent + 2, out));
            }
            (None, _) => {
                out.push_str(&format!("{:indent$}{key}\n", ""));
                rows(value, indent + 2, out);
            }
        }
    }
}

fn list_item(item: &Value, indent: usize, out: &mut String) {
    let Value::Object(fields) = item else {
        return out.push_str(&format!("{:indent$}{}\n", "", one_line(item).unwrap_or_default()));
    };
    let values: Option<Vec<String>> = fields.values().map(one_line).collect();
    match values {
        Some(values) if values.len() <= 2 => out.push_str(&format!("{:indent$}{}\n", "", values.join("  "))),
        _ => {
            let mut rest = fields.clone();
            let head = fields.iter().next().and_then(|(key, value)| {
                let text = one_line(value)?;
                rest.shift_remove(key);
                Some(text)
            });
            out.push_str(&format!("{:indent$}{}\n", "", head.unwrap_or_default()));
            rows(&Value::Object(rest), indent + 2, out);
        }
    }
}

/// What fits on one line: a scalar, or a list of scalars.
fn one_line(value: &Value) -> Option<String> {
    match value {
        Value::Object(fields) if fields.is_empty() => Some("none".into()),
        Value::Object(_) => None,
        Value::Array(items) if items.is_empty() => Some("none".into()),
        Value::Array(items) if items.iter().all(|v| !v.is_object() && !v.is_array()) => {
            Some(items.iter().filter_map(one_line).collect::<Vec<_>>().join(", "))
        }
        Value::Array(items) => {
            let inner = |v: &Value| match v {
                Value::Array(numbers) if numbers.iter().all(Value::is_number) => one_line(v).map(|t| format!("[{t}]")),
                _ => None,
            };
            Some(items.iter().map(inner).collect::<Option<Vec<_>>>()?.join(" "))
        }
        Value::String(s) => Some(s.clone()),
        Value::Null => Some("-".into()),
        other => Some(other.to_string()),
    }
}
