//! Where files are and are to be.

use std::path::{Path, PathBuf};

use stunet::{Error, Result};

/// The path behind links, also of a file or folders that are yet to be made.
pub(super) fn real(path: &Path) -> PathBuf {
    match (path.canonicalize(), path.file_name()) {
        (Ok(real), _) => real,
        (Err(_), Some(name)) => real(parent(path)).join(name),
        (Err(_), None) => path.into(),
    }
}

pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An output's folder has to be there before hours are spent on what goes into it.
pub(super) fn check_parent(path: &Path) -> Result<()> {
    if parent(path).is_dir() {
        return Ok(());
    }
    Err(Error::Usage { what: format!("{}: its folder does not exist", path.display()) })
}
