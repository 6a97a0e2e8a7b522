//! What is found out about a device by trying.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Entries that were tried on a device before anything relied on them, by name: whether they do there what they are for.
#[derive(Debug, Default)]
pub struct Findings(Mutex<BTreeMap<String, Result<(), String>>>);

impl Findings {
    /// Nothing was tried yet.
    #[must_use]
    pub const fn new() -> Findings {
        Findings(Mutex::new(BTreeMap::new()))
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Result<(), String>>> {
        // Single insertions: a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `entry` passed, if it was tried.
    #[must_use]
    pub fn passed(&self, entry: &str) -> Option<bool> {
        self.all().get(entry).map(Result::is_ok)
    }

    /// Keeps that `entry` passed, or why it did not.
    pub fn keep(&self, entry: &str, verdict: Result<(), String>) {
        self.all().insert(entry.into(), verdict);
    }

    /// Those that did not pass, each with the reason.
    #[must_use]
    pub fn refused(&self) -> Vec<(String, String)> {
        self.all().iter().filter_map(|(entry, v)| Some((entry.clone(), v.as_ref().err()?.clone()))).collect()
    }
}
