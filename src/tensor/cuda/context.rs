//! A card through its driver.
//!
//! The safe layer of cudarc is left out: it panics without a driver, makes events for every buffer, returns memory to the
//! system at every wait and gives no log when PTX does not load. Of its bindings only the types are used, see `calls.rs`.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUjit_option as Jit};

use super::calls::{Calls, MapCalls, NOT_READY, OUT_OF_MEMORY, done as check, named};
use super::graphs::Graphs;
use super::pinned::{Locked, Streams};
use super::{Driver, Findings, Graph, Launch, Memory, Module, Parameter, Pinned, Work};
use crate::error::{Error, Result};
use crate::tensor::{CudaStatus, cuda_status};

/// The oldest driver whose PTX version is that of our files, 7.0.
const OLDEST: i32 = 11000;
/// Bytes for what the assembler says of a file that it refuses.
const LOG: usize = 4096;

/// A card with one stream on which everything happens in order, and another for what comes over the bus meanwhile.
#[derive(Debug)]
pub struct Context {
    calls: Calls,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    bus: sys::CUstream,
    capability: [u32; 2],
    multiprocessors: usize,
    name: String,
    total: usize,
    in_use: AtomicUsize,
    /// Loaded when first launched, by name: the driver assembles a file at its first use on a machine.
    modules: Mutex<HashMap<&'static str, Loaded>>,
    /// By address.
    pinned: Mutex<HashMap<usize, Locked>>,
    /// None of a driver that lacks the functions.
    graphs: Option<Mutex<Graphs>>,
    /// None of a driver that lacks the function.
    maps: Option<MapCalls>,
    findings: Findings,
}

/// A module of the driver and its functions, each with the dynamic shared memory it was allowed.
#[derive(Debug)]
struct Loaded {
    module: sys::CUmodule,
    functions: HashMap<String, (sys::CUfunction, usize)>,
}

// SAFETY: the driver's handles may be used from any thread in which the context is current, which every call sees to;
// the tables of modules, page-locked memory and graphs are behind locks, and what is in them is used under these.
unsafe impl Send for Context {}
// SAFETY: as above; the driver serialises calls on a stream.
unsafe impl Sync for Context {}

impl Context {
    /// The card of that number.
    ///
    /// # Errors
    /// [`Error::Device`] that says why it cannot be used: no driver, too old a driver, no such card, too old a card.
    pub fn open(ordinal: usize) -> Result<Context> {
        let refuse = |what: String| Err(Error::Device { what });
        let status = cuda_status();
        let name = match status {
            CudaStatus::Found { version, .. } if version < OLDEST => {
                return refuse(format!(
                    "the NVIDIA driver is of CUDA {}.{}, expected 11.0 or later",
                    version / 1000,
                    version % 1000 / 10
                ));
            }
            CudaStatus::Found { ref devices, .. } => match devices.get(ordinal) {
                Some(name) => name.clone(),
                None => return refuse(format!("there is no card {ordinal}, {}", status.reason())),
            },
            status => return refuse(status.reason()),
        };
        let calls = Calls::find().map_err(|e| Error::Device { what: CudaStatus::Broken(e).reason() })?;
        let (mut device, mut context) = (0, ptr::null_mut());
        let mut numbers = [0; 3];
        let mut total = 0;
        let wanted = [
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        ];
        // SAFETY: the driver was initialised to find the card; every pointer is to a live variable of the type that is
        // written.
        unsafe {
            check("cuDeviceGet", (calls.cuDeviceGet)(&mut device, ordinal as c_int))?;
            for (n, attribute) in numbers.iter_mut().zip(wanted) {
                check("cuDeviceGetAttribute", (calls.cuDeviceGetAttribute)(n, attribute, device))?;
            }
            check("cuDeviceTotalMem", (calls.cuDeviceTotalMem_v2)(&mut total, device))?;
        }
        let [major, minor, multiprocessors] = numbers;
        if [major, minor] < [7, 5] {
            return refuse(format!("{name} is of compute capability {major}.{minor}, expected 7.5 or later"));
        }
        // SAFETY: the device is one that the driver named.
        check("cuDevicePrimaryCtxRetain", unsafe { (calls.cuDevicePrimaryCtxRetain)(&mut context, device) })?;
        let mut new = Context {
            calls,
            device,
            context,
            stream: ptr::null_mut(),
            bus: ptr::null_mut(),
            capability: [major, minor].map(i32::unsigned_abs),
            multiprocessors: multiprocessors.max(1) as usize,
            name,
            total,
            in_use: AtomicUsize::new(0),
            modules: Mutex::default(),
            pinned: Mutex::default(),
            graphs: Graphs::find().map(Mutex::new),
            maps: MapCalls::find().ok(),
            findings: Findings::new(),
        };
        new.enter()?;
        new.stream = new.new_stream()?;
        new.bus = new.new_stream()?;
        Ok(new)
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<usize, Locked>> {
        // Single insertions and removals: a panic elsewhere leaves nothing half done.
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { (self.calls.cuCtxSetCurrent)(self.context) })
    }

    /// A stream ordered by itself: the one that other libraries call 0 does not wait for it.
    fn new_stream(&self) -> Result<sys::CUstream> {
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the context is current, the pointer is to a live variable.
        check("cuStreamCreate", unsafe { (self.calls.cuStreamCreate)(&mut stream, flags) })?;
        Ok(stream)
    }

    fn graphs(&self) -> Result<MutexGuard<'_, Graphs>> {
        let graphs = self.graphs.as_ref().ok_or_else(|| Error::unsupported("graphs by this driver"))?;
        // Single insertions and removals, as above.
        Ok(graphs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn memset_on(&self, stream: sys::CUstream, memory: Memory, value: u8) -> Result<()> {
        // SAFETY: the memory is as long as is said, by whoever allocated it here.
        check("memset", unsafe { (self.calls.cuMemsetD8Async)(memory.address, value, memory.bytes, stream) })
    }

    fn launch_on(
        &self,
        stream: sys::CUstream,
        module: &Module,
        entry: &str,
        launch: Launch,
        params: Parameter<'_>,
    ) -> Result<()> {
        let function = self.function(module, entry, launch.shared)?;
        let mapped;
        let params = if params.maps.is_empty() {
            params.bytes
        } else {
            mapped = self.encoded(entry, params)?;
            &mapped[..]
        };
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: every entry has one parameter, a struct of as many bytes as the caller's (checked by a test for all of
        // them), which the driver copies before it returns. What the struct points to was checked against the sizes of
        // the memory by the operation that filled it in.
        check(entry, unsafe {
            (self.calls.cuLaunchKernel)(
                function,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                launch.shared as c_uint,
                stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }

    /// A parameter as the entry reads it.
    fn encoded(&self, entry: &str, params: Parameter<'_>) -> Result<Vec<u8>> {
        let Some(calls) = &self.maps else { return Err(Error::unsupported(format!("{entry} by this driver"))) };
        let mut all = Vec::new();
        for map in params.maps {
            let map = map.encode(calls).map_err(|what| Error::Device { what: format!("{entry}: {what}") })?;
            all.extend(map);
        }
        all.extend(params.bytes);
        Ok(all)
    }

    /// The entry, allowed to use `shared` bytes of dynamic shared memory.
    fn function(&self, module: &Module, entry: &str, shared: usize) -> Result<sys::CUfunction> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match modules.entry(module.name) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => {
                new.insert(Loaded { module: load(&self.calls, module)?, functions: HashMap::new() })
            }
        };
        if !loaded.functions.contains_key(entry) {
            let name = CString::new(entry).map_err(|e| Error::Device { what: format!("{entry}: {e}") })?;
            let mut function = ptr::null_mut();
            // SAFETY: the module is loaded in the current context; the name ends with a NUL and lives over the call.
            let code = unsafe { (self.calls.cuModuleGetFunction)(&mut function, loaded.module, name.as_ptr()) };
            check(&format!("{} has no {entry}", module.name), code)?;
            loaded.functions.insert(entry.into(), (function, 0));
        }
        let Some((function, allowed)) = loaded.functions.get_mut(entry) else {
            return Err(Error::Device { what: format!("{}: {entry} was not kept", module.name) });
        };
        if shared > *allowed {
            // Said for any size: what needs no word, 48 KiB, holds for static and dynamic memory together. And as much of the
            // first-level cache as there is becomes shared memory, so that more than one block finds room.
            let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            for (attribute, value) in [(limit, shared as c_int), (carveout, 100)] {
                // SAFETY: the function was got from the driver above.
                let code = unsafe { (self.calls.cuFuncSetAttribute)(*function, attribute, value) };
                check(&format!("{entry}: {shared} bytes of shared memory"), code)?;
            }
            *allowed = shared;
        }
        Ok(*function)
    }
}

/// Has the driver assemble a file, and says what it says if it will not.
fn load(calls: &Calls, module: &Module) -> Result<sys::CUmodule> {
    let text = CString::new(module.text()?).map_err(|e| Error::Device { what: format!("{}: {e}", module.name) })?;
    let mut log = [0 as c_char; LOG];
    let mut options = [Jit::CU_JIT_ERROR_LOG_BUFFER, Jit::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The driver takes numbers in the place of pointers.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(LOG - 1)];
    let mut loaded = ptr::null_mut();
    // SAFETY: the text ends with a NUL; options and values are two each, as said, and the log has room for one more byte
    // than its size says.
    let code = unsafe {
        (calls.cuModuleLoadDataEx)(&mut loaded, text.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    if code != 0 {
        let log: Vec<u8> = log.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        let log = String::from_utf8_lossy(&log).trim().replace('\n', "; ");
        return Err(Error::Device { what: format!("{} does not load: {} {log}", module.name, named(code)) });
    }
    Ok(loaded)
}

fn fits(what: &'static str, memory: Memory, bytes: usize) -> Result<()> {
    if bytes <= memory.bytes {
        return Ok(());
    }
    Err(Error::shape(what, format!("{bytes} bytes for memory of {}", memory.bytes)))
}

fn stranger(pinned: Pinned) -> Error {
    Error::Device { what: format!("no memory was page-locked at {:#x}", pinned.address) }
}

impl Driver for Context {
    fn capability(&self) -> [u32; 2] {
        self.capability
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn total(&self) -> usize {
        self.total
    }

    fn available(&self) -> Result<usize> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, the pointers are to live variables.
        check("cuMemGetInfo", unsafe { (self.calls.cuMemGetInfo_v2)(&mut free, &mut total) })?;
        Ok(free)
    }

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: the context is current, the pointer is to a live variable. A size of zero would be refused.
        match unsafe { (self.calls.cuMemAlloc_v2)(&mut address, bytes.max(1)) } {
            OUT_OF_MEMORY => Err(Error::OutOfMemory {
                what: "a buffer of the GPU".into(),
                asked: bytes,
                in_use: self.in_use.load(Ordering::Relaxed),
                limit: self.total,
            }),
            code => {
                check("cuMemAlloc", code)?;
                self.in_use.fetch_add(bytes, Ordering::Relaxed);
                Ok(Memory { address, bytes })
            }
        }
    }

    fn free(&self, memory: Memory) -> Result<()> {
        self.enter()?;
        // SAFETY: the driver checks that it gave this address out; it waits for work that uses the memory.
        check("cuMemFree", unsafe { (self.calls.cuMemFree_v2)(memory.address) })?;
        self.in_use.fetch_sub(memory.bytes, Ordering::Relaxed);
        Ok(())
    }

    fn upload(&self, to: Memory, bytes: &[u8]) -> Result<()> {
        fits("upload", to, bytes.len())?;
        self.enter()?;
        // SAFETY: there are as many bytes on both sides; the wait keeps the borrowed ones until they are copied.
        check("upload", unsafe {
            (self.calls.cuMemcpyHtoDAsync_v2)(to.address, bytes.as_ptr().cast(), bytes.len(), self.stream)
        })?;
        self.synchronize()
    }

    fn download(&self, from: Memory, bytes: &mut [u8]) -> Result<()> {
        fits("download", from, bytes.len())?;
        self.enter()?;
        // SAFETY: as for the upload.
        check("download", unsafe {
            (self.calls.cuMemcpyDtoHAsync_v2)(bytes.as_mut_ptr().cast(), from.address, bytes.len(), self.stream)
        })?;
        self.synchronize()
    }

    fn pin(&self, bytes: usize) -> Result<Pinned> {
        self.enter()?;
        let locked = Locked::new(&self.calls, bytes)?;
        let pinned = Pinned { address: locked.address(), bytes };
        self.in_use.fetch_add(locked.of_card(), Ordering::Relaxed);
        self.locked().insert(pinned.address, locked);
        Ok(pinned)
    }

    fn unpin(&self, pinned: Pinned) -> Result<()> {
        self.enter()?;
        let locked = self.locked().remove(&pinned.address).ok_or_else(|| stranger(pinned))?;
        self.in_use.fetch_sub(locked.of_card(), Ordering::Relaxed);
        locked.release(&self.calls)
    }

    fn fill(&self, pinned: Pinned, bytes: &[u8]) -> Result<()> {
        let all = self.locked();
        let locked = all.get(&pinned.address).ok_or_else(|| stranger(pinned))?;
        fits("fill", locked.size(), bytes.len())?;
        // The lock keeps other writers out.
        locked.fill(bytes);
        Ok(())
    }

    fn copy(&self, to: Memory, pinned: Pinned, bytes: usize) -> Result<()> {
        fits("copy", to, bytes)?;
        self.enter()?;
        let all = self.locked();
        let locked = all.get(&pinned.address).ok_or_else(|| stranger(pinned))?;
        fits("copy", locked.size(), bytes)?;
        locked.copy(&self.calls, to, bytes, Streams { work: self.stream, bus: self.bus })
    }

    fn wait(&self, pinned: Pinned) -> Result<()> {
        self.enter()?;
        let copied = self.locked().get(&pinned.address).ok_or_else(|| stranger(pinned))?.copied();
        // SAFETY: the event lives until the memory is given back, which whoever owns it does after it waited.
        check("the GPU's work", unsafe { (self.calls.cuEventSynchronize)(copied) })
    }

    fn memset(&self, memory: Memory, value: u8) -> Result<()> {
        self.enter()?;
        self.memset_on(self.stream, memory, value)
    }

    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: Parameter<'_>) -> Result<()> {
        self.enter()?;
        self.launch_on(self.stream, module, entry, launch, params)
    }

    fn findings(&self) -> &Findings {
        &self.findings
    }

    fn record(&self, work: &[Work]) -> Result<Graph> {
        let Some(graphs) = &self.graphs else { return Err(Error::unsupported("graphs by this driver")) };
        self.enter()?;
        // What is asked for of a stream of its own is recorded; other threads' work goes on meanwhile.
        let stream = self.new_stream()?;
        let mut graphs = graphs.lock().unwrap_or_else(PoisonError::into_inner);
        let graph = graphs.record(stream, || {
            work.iter().try_for_each(|w| match w {
                Work::Launch { module, entry, launch, maps, bytes } => {
                    self.launch_on(stream, module, entry, *launch, Parameter { maps, bytes })
                }
                Work::Memset { memory, value } => self.memset_on(stream, *memory, *value),
            })
        });
        // SAFETY: the stream was made above, and nobody else knows of it. An error of this call would hide the result.
        let _ = unsafe { (self.calls.cuStreamDestroy_v2)(stream) };
        graph
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        self.enter()?;
        self.graphs()?.replay(graph, self.stream)
    }

    fn forget(&self, graph: Graph) -> Result<()> {
        // It may be running.
        self.synchronize()?;
        self.graphs()?.forget(graph)
    }

    fn busy(&self) -> Result<bool> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        match unsafe { (self.calls.cuStreamQuery)(self.stream) } {
            NOT_READY => Ok(true),
            code => check("the GPU's work", code).map(|()| false),
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        check("the GPU's work", unsafe { (self.calls.cuStreamSynchronize)(self.stream) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        let pinned = self.pinned.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: all handles are from this context and are used no more. Errors cannot be handed to anyone here.
        unsafe {
            for stream in [self.bus, self.stream] {
                if !stream.is_null() {
                    let _ = (self.calls.cuStreamSynchronize)(stream);
                    let _ = (self.calls.cuStreamDestroy_v2)(stream);
                }
            }
            if let Some(graphs) = &mut self.graphs {
                graphs.get_mut().unwrap_or_else(PoisonError::into_inner).release();
            }
            for (_, locked) in pinned.drain() {
                let _ = locked.release(&self.calls);
            }
            for loaded in modules.values() {
                let _ = (self.calls.cuModuleUnload)(loaded.module);
            }
            let _ = (self.calls.cuDevicePrimaryCtxRelease_v2)(self.device);
        }
    }
}
