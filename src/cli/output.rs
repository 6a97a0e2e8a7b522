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
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
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
    say("error", what);
}

/// One line `warning: ...` on standard error.
pub(super) fn say_warning(what: &str) {
    say("warning", what);
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

/// File names and headers come from strangers: whatever is no plain text is shown as a space.
fn say(kind: &str, what: &str) {
    let plain: String = what.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = format!("{kind}: {}\n", plain.split_whitespace().collect::<Vec<_>>().join(" "));
    // Nothing can be done when standard error is closed.
    above_bar(|| drop(std::io::stderr().write_all(line.as_bytes())));
}

/// Prints the fields of a JSON object, one a line, nested ones indented.
pub(super) fn table(value: &Value) -> Result<()> {
    let mut out = String::new();
    rows(value, 0, &mut out);
    text(&out)
}

fn rows(value: &Value, depth: usize, out: &mut String) {
    let entries: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(k, v)| (k.replace('_', " "), v)).collect(),
        Value::Array(items) => items.iter().map(|v| ("-".to_owned(), v)).collect(),
        _ => return,
    };
    let width = entries.iter().map(|(k, _)| k.len()).max().unwrap_or(0);
    for (key, value) in entries {
        let indent = depth * 2;
        match plain(value) {
            Some(text) => out.push_str(&format!("{:indent$}{key:width$}  {text}\n", "")),
            None => {
                out.push_str(&format!("{:indent$}{key}\n", ""));
                rows(value, depth + 1, out);
            }
        }
    }
}

/// What fits on one line: a scalar, or a list of scalars.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::Object(fields) if fields.is_empty() => Some("none".into()),
        Value::Object(_) => None,
        Value::Array(items) if items.is_empty() => Some("none".into()),
        Value::Array(items) if items.iter().all(|v| !v.is_object() && !v.is_array()) => {
            Some(items.iter().filter_map(plain).collect::<Vec<_>>().join(", "))
        }
        Value::Array(items) => {
            let inner = |v: &Value| match v {
                Value::Array(numbers) if numbers.iter().all(Value::is_number) => plain(v).map(|t| format!("[{t}]")),
                _ => None,
            };
            Some(items.iter().map(inner).collect::<Option<Vec<_>>>()?.join(" "))
        }
        Value::String(s) => Some(s.clone()),
        Value::Null => Some("-".into()),
        other => Some(other.to_string()),
    }
}
