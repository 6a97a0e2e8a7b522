//! The CUDA driver probe: what is on this machine, found without a context and without a panic.
//!
//! cudarc's own calls panic when the library or one symbol of it is missing (an old or broken driver), so the few
//! symbols needed are looked up one by one.
#![allow(unsafe_code)]

mod context;
mod driver;

use std::ffi::{CStr, c_char, c_int, c_uint};

use cudarc::driver::sys;

pub use context::Context;
pub use driver::{Driver, Launch, Memory, Module};

use super::device::CudaStatus;

/// See [`super::cuda_status`].
pub(super) fn probe() -> CudaStatus {
    // SAFETY: only opens and closes the driver library, whose initialisers NVIDIA documents as safe to run.
    if !unsafe { sys::is_culib_present() } {
        return CudaStatus::NoDriver;
    }
    devices().unwrap_or_else(CudaStatus::Broken)
}

fn check(call: &str, code: c_int) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call} gave error {code}")) }
}

fn devices() -> Result<CudaStatus, String> {
    // SAFETY: the library was just found, so this does not panic; it stays loaded for the life of the process.
    let lib = unsafe { sys::culib() };
    let missing = |e: &dyn std::fmt::Display| e.to_string();
    // SAFETY: the signatures below are those of cuda.h, unchanged since CUDA 3.
    let (init, version, count, get, name) = unsafe {
        (
            lib.get::<unsafe extern "C" fn(c_uint) -> c_int>(b"cuInit\0").map_err(|e| missing(&e))?,
            lib.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion\0").map_err(|e| missing(&e))?,
            lib.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDeviceGetCount\0").map_err(|e| missing(&e))?,
            lib.get::<unsafe extern "C" fn(*mut c_int, c_int) -> c_int>(b"cuDeviceGet\0").map_err(|e| missing(&e))?,
            lib.get::<unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int>(b"cuDeviceGetName\0")
                .map_err(|e| missing(&e))?,
        )
    };
    let (mut v, mut n) = (0, 0);
    // SAFETY: both pointers are to live integers of the type the driver writes.
    unsafe {
        check("cuInit", init(0))?;
        check("cuDriverGetVersion", version(&mut v))?;
        check("cuDeviceGetCount", count(&mut n))?;
    }
    let mut devices = Vec::new();
    for i in 0..n {
        let (mut device, mut text) = (0, [0 as c_char; 256]);
        // SAFETY: `device` is a live integer; the name is written into `text`, whose length is passed, with a NUL.
        unsafe {
            check("cuDeviceGet", get(&mut device, i))?;
            check("cuDeviceGetName", name(text.as_mut_ptr(), 255, device))?;
        }
        text[255] = 0;
        // SAFETY: `text` ends with a NUL at the latest in its last place.
        devices.push(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned());
    }
    Ok(CudaStatus::Found { version: v, devices })
}
