//! Progress on standard error: a bar of windows on a terminal, nothing elsewhere; warnings always. Ctrl-C becomes
//! [`Flow::Cancel`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use stunet::{Event, Flow, Progress};

use super::output::say_warning;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Turns Ctrl-C and SIGTERM into a wish to stop at the next safe point. A second one ends the process at once.
pub(super) fn catch_interrupts() {
    let set = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    });
    if let Err(e) = set {
        say_warning(&format!("an interrupt will not wait for a safe point: {e}"));
    }
}

/// Whether Ctrl-C was pressed.
pub(super) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// The bar on the screen, if any: lines of text go above it.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Runs `print` with the bar out of the way.
pub(super) fn above_bar<R>(print: impl FnOnce() -> R) -> R {
    let shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match shown {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// One case's progress.
pub(super) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// A bar headed by `name`; `show` is false for `--no-progress`, and nothing shows when `quiet`.
    pub(super) fn new(name: &str, show: bool, quiet: bool) -> Self {
        let target = if show && !quiet { ProgressDrawTarget::stderr_with_hz(8) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target).with_prefix(name.to_owned());
        bar.set_style(style("{prefix} {spinner} {msg} {elapsed}"));
        *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
        Self { bar }
    }

    fn count(&self, done: usize, total: usize, what: &str) {
        // Some commands go through cases several times, not always as many.
        if self.bar.length() != Some(total as u64) {
            self.bar.set_length(total as u64);
            self.bar.reset_eta();
            let text = format!("{{prefix}} [{{bar:24}}] {{pos}}/{{len}} {what} {{elapsed}} left {{eta}} {{msg}}");
            self.bar.set_style(style(&text));
        }
        self.bar.set_position(done as u64);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Progress for Bar {
    fn event(&mut self, event: Event<'_>) -> Flow {
        match event {
            Event::Stage(name) => {
                self.bar.set_message(name.to_owned());
                self.bar.tick();
            }
            Event::Tiles { done, total } => self.count(done, total, "tiles"),
            Event::Cases { done, total } => self.count(done, total, "cases"),
            Event::Steps { epoch, done, total } => {
                self.bar.set_prefix(format!("epoch {epoch}"));
                self.count(done, total, "steps");
            }
            _ => {}
        }
        if interrupted() { Flow::Cancel } else { Flow::Continue }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
