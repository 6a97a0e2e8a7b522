//! Uploads that do not wait: through a few page-locked buffers in turn.

use super::{Driver, Memory, Pinned};
use crate::error::{Error, Result};

/// How many: images and labels of a batch of two, and as many again whose bytes have left theirs. What is more waits for the
/// card's work.
const BUFFERS: usize = 4;
/// Bytes of a buffer at least and at most. The largest holds the window of eight channels of 128^3 voxels, and the box that such
/// a patch is warped from; what is longer goes piece by piece.
const LEAST: usize = 64 << 10;
pub(super) const MOST: usize = 64 << 20;

/// The buffers: one is filled while the card copies from the others.
#[derive(Debug, Default)]
pub(super) struct Staging {
    buffers: [Option<Pinned>; BUFFERS],
    next: usize,
    /// The system gives no page-locked memory, or no more of it.
    refused: bool,
}

impl Staging {
    /// Copies `bytes` to the start of `to`, in the order of work; returns when they were read.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not fit, [`Error::Device`].
    pub(super) fn upload(&mut self, driver: &dyn Driver, to: Memory, bytes: &[u8]) -> Result<()> {
        if bytes.len() > to.bytes {
            return Err(Error::shape("upload", format!("{} bytes for memory of {}", bytes.len(), to.bytes)));
        }
        for (i, piece) in bytes.chunks(MOST).enumerate() {
            let to = Memory { address: to.address + (i * MOST) as u64, bytes: piece.len() };
            match self.room(driver, piece.len())? {
                Some(buffer) => {
                    driver.fill(buffer, piece)?;
                    driver.copy(to, buffer, piece.len())?;
                }
                None => driver.upload(to, piece)?,
            }
        }
        Ok(())
    }

    /// The buffer whose turn it is, with room for `bytes`, from which nothing is copied any more.
    fn room(&mut self, driver: &dyn Driver, bytes: usize) -> Result<Option<Pinned>> {
        if self.refused {
            return Ok(None);
        }
        let buffer = &mut self.buffers[self.next];
        self.next = (self.next + 1) % BUFFERS;
        if let Some(b) = *buffer {
            driver.wait(b)?;
            if b.bytes >= bytes {
                return Ok(Some(b));
            }
            *buffer = None;
            driver.unpin(b)?;
        }
        match driver.pin(bytes.next_power_of_two().clamp(LEAST, MOST)) {
            Ok(b) => *buffer = Some(b),
            // Whoever cannot copy beside the computation copies after it.
            Err(_) => self.refused = true,
        }
        Ok(*buffer)
    }

    /// Gives the buffers back; whether there was one.
    pub(super) fn release(&mut self, driver: &dyn Driver) -> bool {
        let mut any = false;
        for buffer in self.buffers.iter_mut().filter_map(Option::take) {
            // Nobody can be told, and the context frees what is left.
            let _ = driver.unpin(buffer);
            any = true;
        }
        any
    }
}
