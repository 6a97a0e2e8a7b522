//! Progress and cancellation through a caller's trait: the library never prints.

use crate::error::{Error, Result};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A stage of a prediction begins: "preprocess", "network" (which also interpolates finished planes), "export".
    Stage(&'a str),
    /// `done` of `total` windows have run through the network.
    Tiles {
        /// Windows finished.
        done: usize,
        /// Windows of this image, mirrored passes and folds included.
        total: usize,
    },
    /// `done` of `total` steps of a training's epoch, those of its validation included, are over.
    Steps {
        /// The epoch, from 0.
        epoch: u32,
        /// Steps that are over.
        done: usize,
        /// Steps of the epoch.
        total: usize,
    },
    /// `done` of `total` cases of a data set are finished.
    Cases {
        /// Cases finished.
        done: usize,
        /// Cases of the data set.
        total: usize,
    },
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop at the next safe point with [`Error::Cancelled`].
    Cancel,
}

/// Receives events; the return value can cancel the work. `()` ignores everything.
pub trait Progress: Send {
    /// Called often; keep it cheap.
    fn event(&mut self, event: Event<'_>) -> Flow;
}

impl Progress for () {
    fn event(&mut self, _: Event<'_>) -> Flow {
        Flow::Continue
    }
}

impl<F: FnMut(Event<'_>) -> Flow + Send> Progress for F {
    fn event(&mut self, event: Event<'_>) -> Flow {
        self(event)
    }
}

/// Sends `event` and turns a wish to cancel into the error.
pub(crate) fn tell(progress: &mut dyn Progress, event: Event<'_>) -> Result<()> {
    match progress.event(event) {
        Flow::Continue => Ok(()),
        Flow::Cancel => Err(Error::Cancelled),
    }
}
