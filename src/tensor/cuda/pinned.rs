//! Page-locked memory of the host, and how a card copies from it beside its work.
//!
//! The bus is slow beside the card's own memory. What is sent crosses it at once, on a stream of its own, to memory that nothing
//! else uses; from there it is copied, in the order of work, to where it is to lie. So a copy waits for no work but the one that
//! takes what was sent before it, and work waits for the bus only when what it needs has not come.
#![allow(unsafe_code)]

use std::ffi::{c_uint, c_void};
use std::ptr;

use cudarc::driver::sys;

use super::Memory;
use super::calls::{Calls, done as check};
use crate::error::Result;

/// Page-locked memory.
#[derive(Debug)]
pub(super) struct Locked {
    start: *mut c_void,
    bytes: usize,
    /// The last copy from it.
    copied: sys::CUevent,
    /// None where the card had no memory for it: copies are then made in the order of work.
    beside: Option<Beside>,
}

/// As much memory of the card.
#[derive(Debug)]
struct Beside {
    address: sys::CUdeviceptr,
    /// The last copy from it.
    taken: sys::CUevent,
}

/// The streams of a card.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams {
    /// On which everything happens in order.
    pub(super) work: sys::CUstream,
    /// What comes over the bus.
    pub(super) bus: sys::CUstream,
}

/// The context has to be current. Nobody asks how long anything took.
fn event(calls: &Calls) -> Result<sys::CUevent> {
    let mut event = ptr::null_mut();
    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
    // SAFETY: the context is current, the pointer is to a live variable.
    check("cuEventCreate", unsafe { (calls.cuEventCreate)(&mut event, flags) })?;
    Ok(event)
}

impl Beside {
    fn new(calls: &Calls, bytes: usize) -> Result<Beside> {
        let taken = event(calls)?;
        let mut address = 0;
        // SAFETY: the context is current, the pointer is to a live variable. A size of zero would be refused.
        let code = unsafe { (calls.cuMemAlloc_v2)(&mut address, bytes.max(1)) };
        if code != 0 {
            // SAFETY: the event was made above and nobody knows of it. An error of this call would hide the first.
            let _ = unsafe { (calls.cuEventDestroy_v2)(taken) };
        }
        check("cuMemAlloc", code)?;
        Ok(Beside { address, taken })
    }

    /// Waits for the last copy from it, and gives it back.
    fn release(self, calls: &Calls) -> Result<()> {
        // SAFETY: both are from the driver, and whoever has them by value is the last to know them.
        unsafe {
            let done = check("the GPU's work", (calls.cuEventSynchronize)(self.taken));
            let event = check("cuEventDestroy", (calls.cuEventDestroy_v2)(self.taken));
            done.and(event).and(check("cuMemFree", (calls.cuMemFree_v2)(self.address)))
        }
    }
}

impl Locked {
    /// So many bytes, all zero. The context has to be current.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(super) fn new(calls: &Calls, bytes: usize) -> Result<Locked> {
        let mut start = ptr::null_mut();
        // SAFETY: the context is current, the pointer is to a live variable. A size of zero would be refused.
        check("cuMemHostAlloc", unsafe { (calls.cuMemHostAlloc)(&mut start, bytes.max(1), 0) })?;
        // SAFETY: as much memory as was asked for, at no other's place. Zeros, so that all of it can be read.
        unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        match event(calls) {
            Ok(copied) => Ok(Locked { start, bytes, copied, beside: Beside::new(calls, bytes).ok() }),
            Err(e) => {
                // SAFETY: the memory is from the driver and nobody knows of it. An error of this call would hide the first.
                let _ = unsafe { (calls.cuMemFreeHost)(start) };
                Err(e)
            }
        }
    }

    /// What tells it from others.
    pub(super) fn address(&self) -> usize {
        self.start.addr()
    }

    /// As memory of which a size is asked.
    pub(super) fn size(&self) -> Memory {
        Memory { address: 0, bytes: self.bytes }
    }

    /// Bytes of the card that go with it.
    pub(super) fn of_card(&self) -> usize {
        self.beside.as_ref().map_or(0, |_| self.bytes)
    }

    /// Happens when the last copy from it is done.
    pub(super) fn copied(&self) -> sys::CUevent {
        self.copied
    }

    /// Writes to its start. Whoever calls it keeps other writers out.
    ///
    /// # Panics
    /// For more bytes than it has.
    pub(super) fn fill(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes, "{} bytes for memory of {}", bytes.len(), self.bytes);
        // SAFETY: the memory is as long as was checked, and no slice of it exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.cast(), bytes.len()) };
    }

    /// Has its first `bytes` bytes copied to the start of `to`, in the order of work. The context has to be current. Calls for
    /// one `Locked` come one after the other.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    ///
    /// # Panics
    /// Where either side is shorter.
    pub(super) fn copy(&self, calls: &Calls, to: Memory, bytes: usize, streams: Streams) -> Result<()> {
        assert!(bytes <= self.bytes.min(to.bytes), "{bytes} bytes from {} to {}", self.bytes, to.bytes);
        self.ask(calls, to, bytes, streams).inspect_err(|_| {
            // Part of it may be under way without the event that tells. Errors of these calls would hide the first.
            for stream in [streams.bus, streams.work] {
                // SAFETY: the streams are the caller's.
                let _ = unsafe { (calls.cuStreamSynchronize)(stream) };
            }
        })
    }

    fn ask(&self, calls: &Calls, to: Memory, bytes: usize, Streams { work, bus }: Streams) -> Result<()> {
        let Some(Beside { address, taken }) = self.beside else {
            // SAFETY: there are as many bytes on both sides; who fills the memory or gives it back waits for the event first.
            return unsafe {
                check("copy", (calls.cuMemcpyHtoDAsync_v2)(to.address, self.start, bytes, work))?;
                check("cuEventRecord", (calls.cuEventRecord)(self.copied, work))
            };
        };
        // SAFETY: there are as many bytes in all three places; who fills the memory or gives it back waits for the events first.
        // What is beside is written when the copy out of it before was done, and read when it is written. An event that was not
        // recorded yet has nothing to be waited for.
        unsafe {
            check("cuStreamWaitEvent", (calls.cuStreamWaitEvent)(bus, taken, 0))?;
            check("copy", (calls.cuMemcpyHtoDAsync_v2)(address, self.start, bytes, bus))?;
            check("cuEventRecord", (calls.cuEventRecord)(self.copied, bus))?;
            check("cuStreamWaitEvent", (calls.cuStreamWaitEvent)(work, self.copied, 0))?;
            check("copy", (calls.cuMemcpyDtoDAsync_v2)(to.address, address, bytes, work))?;
            check("cuEventRecord", (calls.cuEventRecord)(taken, work))
        }
    }

    /// Waits for the last copy from it, and gives it back. The context has to be current.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(super) fn release(self, calls: &Calls) -> Result<()> {
        let beside = self.beside.map_or(Ok(()), |beside| beside.release(calls));
        // SAFETY: both are from the driver, and whoever has them by value is the last to know them.
        unsafe {
            let done = check("the GPU's work", (calls.cuEventSynchronize)(self.copied));
            let event = check("cuEventDestroy", (calls.cuEventDestroy_v2)(self.copied));
            beside.and(done).and(event).and(check("cuMemFreeHost", (calls.cuMemFreeHost)(self.start)))
        }
    }
}
