//! The CUDA driver: what is on this machine, found without a context and without a panic, and one card of it.
#![allow(unsafe_code)]

mod calls;
mod context;
mod driver;
mod findings;
mod graphs;
mod passes;
mod pinned;
mod queue;
mod rehearsal;
mod staging;
mod tensor_map;

use std::ffi::{CStr, c_char};

use cudarc::driver::sys;

pub use context::Context;
use driver::Ask;
pub use driver::{Driver, Graph, Launch, Memory, Module, Pinned, Work};
pub use findings::Findings;
pub(super) use queue::Queue;
pub(crate) use rehearsal::Rehearsal;
pub use tensor_map::{MAP, Parameter, TensorMap};

use self::calls::{NO_DEVICE, Questions, check};
use super::device::CudaStatus;

/// See [`super::cuda_status`].
pub(super) fn probe() -> CudaStatus {
    // SAFETY: only opens and closes the driver library, whose initialisers NVIDIA documents as safe to run.
    if !unsafe { sys::is_culib_present() } {
        return CudaStatus::NoDriver;
    }
    devices().unwrap_or_else(CudaStatus::Broken)
}

fn devices() -> Result<CudaStatus, String> {
    let ask = Questions::find()?;
    let (mut version, mut n) = (0, 0);
    // SAFETY: the pointer is to a live integer. The version may be asked for before anything else.
    check("cuDriverGetVersion", unsafe { (ask.cuDriverGetVersion)(&mut version) })?;
    // SAFETY: takes no pointer; 0 is the only flag there is.
    match unsafe { (ask.cuInit)(0) } {
        NO_DEVICE => return Ok(CudaStatus::Found { version, devices: Vec::new() }),
        code => check("cuInit", code)?,
    }
    // SAFETY: the pointer is to a live integer.
    check("cuDeviceGetCount", unsafe { (ask.cuDeviceGetCount)(&mut n) })?;
    let mut devices = Vec::new();
    for i in 0..n {
        let (mut device, mut text) = (0, [0 as c_char; 256]);
        // SAFETY: `device` is a live integer; the name is written into `text`, whose length is passed, with a NUL.
        unsafe {
            check("cuDeviceGet", (ask.cuDeviceGet)(&mut device, i))?;
            check("cuDeviceGetName", (ask.cuDeviceGetName)(text.as_mut_ptr(), 255, device))?;
        }
        text[255] = 0;
        // SAFETY: `text` ends with a NUL at the latest in its last place.
        devices.push(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned());
    }
    Ok(CudaStatus::Found { version, devices })
}
