//! Model folders: nnU-Net v1, nnU-Net v2 and the project's own.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Folds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Folds {
    /// All found.
    #[default]
    All,
    /// Named.
    Names(Vec<String>),
}

/// Options.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelOptions {
    /// Folds.
    pub folds: Folds,
    /// Checkpoint.
    pub checkpoint: Option<String>,
}

/// Convert.
///
/// # Errors
/// Always.
pub fn convert(src: &Path, _: &Path) -> Result<()> {
    Err(Error::model(src, "model", "not in this build"))
}

/// Inspection.
#[derive(Debug, serde::Serialize)]
pub struct Inspection {}

/// Inspect.
///
/// # Errors
/// Always.
pub fn inspect(path: &Path) -> Result<Inspection> {
    Err(Error::model(path, "model", "not in this build"))
}

/// Files.
///
/// # Errors
/// Always.
pub fn files(path: &Path, _: &ModelOptions) -> Result<Vec<PathBuf>> {
    Err(Error::model(path, "model", "not in this build"))
}
