//! The one error type of the crate.

use std::path::{Path, PathBuf};

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. A message is one line and names the file and the field where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller asked for something that cannot be: an option out of range, a missing folder of inputs.
    #[error("{what}")]
    Usage {
        /// What was wrong and what is expected.
        what: String,
    },
    /// The operating system refused to read or write.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// "read", "write", "create" ...
        action: &'static str,
        /// The system's own error.
        source: std::io::Error,
    },
    /// An image file is damaged or is not what it has to be.
    #[error("{}: {field}: {what}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// The header field or part of the file.
        field: String,
        /// What is wrong and what is expected.
        what: String,
    },
    /// An image in memory does not fit what is asked of it: channels, values or spacing. Who knows its file says
    /// [`Error::Image`] instead.
    #[error("the image: {what}")]
    Input {
        /// What is wrong and what is expected.
        what: String,
    },
    /// A model file (weights, plans, dataset description) is damaged, hostile or incomplete.
    #[error("{}: {field}: {what}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// The key, tensor name or part of the file.
        field: String,
        /// What is wrong and what is expected.
        what: String,
    },
    /// A data set for training is damaged or incomplete.
    #[error("{}: {field}: {what}", path.display())]
    Dataset {
        /// The file or folder.
        path: PathBuf,
        /// The case, or the key or part of the file.
        field: String,
        /// What is wrong and how to mend it.
        what: String,
    },
    /// A well-formed request that this version cannot serve.
    #[error("unsupported: {what}")]
    Unsupported {
        /// What is not supported, and what is.
        what: String,
    },
    /// Tensor shapes or layouts that do not fit an operation.
    #[error("{op}: {what}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The shapes found and expected.
        what: String,
    },
    /// A number that training cannot go on with: NaN or infinite.
    #[error("{what}: not finite")]
    NotFinite {
        /// Where it was found.
        what: String,
    },
    /// A device cannot be used.
    #[error("device: {what}")]
    Device {
        /// Why.
        what: String,
    },
    /// More memory would be needed than the limit allows, or than the system gives. A prediction under a limit is refused
    /// before it starts; where an allocation fails all the same, nothing of its result is kept.
    #[error("out of memory: {what} needs {asked} bytes, {in_use} are in use, the limit is {limit}")]
    OutOfMemory {
        /// What the memory is for.
        what: String,
        /// Bytes asked for.
        asked: usize,
        /// Bytes in use.
        in_use: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The caller's progress callback asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// The exit code of the command line for this error:
    /// 1 failure while running, 2 usage, 3 bad image or data set, 4 bad model, 5 device or memory, 130 cancelled.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Io { .. } | Error::Shape { .. } | Error::NotFinite { .. } => 1,
            Error::Usage { .. } => 2,
            Error::Image { .. } | Error::Input { .. } | Error::Dataset { .. } => 3,
            Error::Model { .. } | Error::Unsupported { .. } => 4,
            Error::Device { .. } | Error::OutOfMemory { .. } => 5,
            Error::Cancelled => 130,
        }
    }

    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Error::Usage { what: what.into() }
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), action, source }
    }

    pub(crate) fn image(path: &Path, field: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Image { path: path.into(), field: field.into(), what: what.into() }
    }

    pub(crate) fn input(what: impl Into<String>) -> Self {
        Error::Input { what: what.into() }
    }

    pub(crate) fn model(path: &Path, field: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Model { path: path.into(), field: field.into(), what: what.into() }
    }

    pub(crate) fn dataset(path: &Path, field: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Dataset { path: path.into(), field: field.into(), what: what.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Error::Unsupported { what: what.into() }
    }

    pub(crate) fn shape(op: &'static str, what: impl Into<String>) -> Self {
        Error::Shape { op, what: what.into() }
    }
}
