//! The driver's functions, looked up all together before the first of them is called.
//!
//! cudarc's own bindings look a function up when it is called, panic where the driver lacks it, and return an enum, which
//! a code that is newer than the bindings must never become. Here a missing function is an error that names it, and a
//! code is a number.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};
use std::ptr;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUfunction_attribute, CUgraph,
    CUgraphExec, CUjit_option, CUmodule, CUstream, CUstreamCaptureMode, CUtensorMap, CUtensorMapDataType,
    CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
};

pub(super) const OUT_OF_MEMORY: c_int = 2;
pub(super) const NO_DEVICE: c_int = 100;
pub(super) const NOT_READY: c_int = 600;

macro_rules! calls {
    ($(#[$doc:meta])* $table:ident { $($symbol:ident($($argument:ty),*);)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case, reason = "as cuda.h spells them")]
        #[derive(Debug)]
        pub(super) struct $table {
            $(pub(super) $symbol: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl $table {
            /// All of them in the driver's library, which has to be there: see [`super::probe`].
            ///
            /// # Errors
            /// Names the first that it lacks.
            #[allow(non_snake_case, reason = "as cuda.h spells them")]
            pub(super) fn find() -> Result<Self, String> {
                // SAFETY: loads the library as `is_culib_present` did; it stays for the life of the process.
                let library = unsafe { sys::culib() };
                $(
                    let name = concat!(stringify!($symbol), "\0").as_bytes();
                    // SAFETY: the type is that of cuda.h, which never changes under a name.
                    let found = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> c_int>(name) };
                    let $symbol = *found.map_err(|_| concat!("its library has no ", stringify!($symbol)))?;
                )*
                Ok(Self { $($symbol),* })
            }
        }
    };
}

calls! {
    /// What it takes to ask which cards there are; in every driver since CUDA 2.2.
    Questions {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetName(*mut c_char, c_int, CUdevice);
    }
}

calls! {
    /// What it takes to use one; in every driver since CUDA 11.0.
    Calls {
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
        cuDeviceTotalMem_v2(*mut usize, CUdevice);
        cuMemGetInfo_v2(*mut usize, *mut usize);
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        cuDevicePrimaryCtxRelease_v2(CUdevice);
        cuCtxSetCurrent(CUcontext);
        cuStreamCreate(*mut CUstream, c_uint);
        cuStreamSynchronize(CUstream);
        cuStreamQuery(CUstream);
        cuStreamWaitEvent(CUstream, CUevent, c_uint);
        cuStreamDestroy_v2(CUstream);
        cuModuleLoadDataEx(*mut CUmodule, *const c_void, c_uint, *mut CUjit_option, *mut *mut c_void);
        cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        cuModuleUnload(CUmodule);
        cuFuncSetAttribute(CUfunction, CUfunction_attribute, c_int);
        cuMemAlloc_v2(*mut CUdeviceptr, usize);
        cuMemFree_v2(CUdeviceptr);
        cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
        cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
        cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuEventCreate(*mut CUevent, c_uint);
        cuEventRecord(CUevent, CUstream);
        cuEventSynchronize(CUevent);
        cuEventDestroy_v2(CUevent);
        cuMemsetD8Async(CUdeviceptr, c_uchar, usize, CUstream);
        cuLaunchKernel(
            CUfunction,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            CUstream,
            *mut *mut c_void,
            *mut *mut c_void
        );
    }
}

calls! {
    /// What it takes to make graphs; in every driver since CUDA 11.4, and nothing is lost but some time without.
    GraphCalls {
        cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode);
        cuStreamEndCapture(CUstream, *mut CUgraph);
        cuGraphInstantiateWithFlags(*mut CUgraphExec, CUgraph, u64);
        cuGraphLaunch(CUgraphExec, CUstream);
        cuGraphExecDestroy(CUgraphExec);
        cuGraphDestroy(CUgraph);
    }
}

calls! {
    /// What it takes to make tensor maps; in every driver since CUDA 12.0.
    MapCalls {
        cuTensorMapEncodeTiled(
            *mut CUtensorMap,
            CUtensorMapDataType,
            c_uint,
            *mut c_void,
            *const u64,
            *const u64,
            *const c_uint,
            *const c_uint,
            CUtensorMapInterleave,
            CUtensorMapSwizzle,
            CUtensorMapL2promotion,
            CUtensorMapFloatOOBfill
        );
    }
}

/// An error that says what failed, and how in the driver's words.
pub(super) fn check(what: &str, code: c_int) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{what}: {}", named(code))) }
}

/// [`check`] of a card that is in use.
pub(super) fn done(what: &str, code: c_int) -> crate::error::Result<()> {
    check(what, code).map_err(|what| crate::error::Error::Device { what })
}

/// `CUDA_ERROR_NO_DEVICE (100)`, or only the number where the driver has no name for it.
pub(super) fn named(code: c_int) -> String {
    // SAFETY: as in `find`; whoever has a code has called the driver.
    let library = unsafe { sys::culib() };
    // SAFETY: the type is that of cuda.h.
    let get = unsafe { library.get::<unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int>(b"cuGetErrorName\0") };
    let mut name = ptr::null();
    let Ok(get) = get else { return format!("error {code}") };
    // SAFETY: the pointer is to a live variable, and takes any number for a code.
    let known = unsafe { get(code, &mut name) } == 0 && !name.is_null();
    if !known {
        return format!("error {code}");
    }
    // SAFETY: the driver points to a constant of its own, which ends with a NUL.
    format!("{} ({code})", unsafe { CStr::from_ptr(name) }.to_string_lossy())
}
