//! Helpers of the tests.

pub mod binary;
pub mod bound;
pub mod drive;
pub mod files;
pub mod golden_train;
pub mod nnunet;
pub mod pickle;
pub mod torch;

use std::path::PathBuf;

/// The folder of reference data beside the project, or `None`, said aloud, where it is absent: the project's own
/// tests stand alone.
pub fn shared(what: &str) -> Option<PathBuf> {
    let p = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared").join(what);
    if !p.exists() {
        eprintln!("skipped: the reference data {what} is not on this machine");
        return None;
    }
    Some(p)
}
