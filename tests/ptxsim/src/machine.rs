//! The device: buffers, tensor maps, launches.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::cta::{Cta, Worker};
use crate::error::{Error, Result};
use crate::global::{Global, MAX_CTAS};
use crate::parse::{Kernel, Module};
use crate::report::Report;
use crate::tensor_map::TensorMap;

/// A device with its memory.
#[derive(Default)]
pub struct Machine {
    pub(crate) global: Global,
    pub(crate) maps: Vec<TensorMap>,
}

/// How to run a launch.
#[derive(Clone, Debug)]
pub struct Options {
    /// 0 runs warps in turn, each until it waits; any other number is a random schedule of its own.
    pub seed: u64,
    /// Threads to run blocks on; 0 for one a core. The result does not depend on it.
    pub threads: usize,
    /// Instructions that a warp may run before it counts as caught in a loop.
    pub limit: u64,
    /// Shared memory that a block may have, static and dynamic.
    pub shared_limit: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { seed: 0, threads: 0, limit: 1 << 32, shared_limit: 227 * 1024 }
    }
}

/// One launch, as its blocks see it.
pub(crate) struct Launch<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) module: &'a Module,
    pub(crate) kernel: &'a Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) dynamic: usize,
    pub(crate) params: &'a [u8],
    pub(crate) options: &'a Options,
}

impl Machine {
    /// A device with no memory in use.
    pub fn new() -> Machine {
        Machine::default()
    }

    /// A buffer of exactly `bytes` bytes, all of them unwritten; returns its device address.
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.global.alloc(bytes)
    }

    /// A buffer with contents.
    pub fn upload(&mut self, data: &[u8]) -> u64 {
        let address = self.alloc(data.len());
        self.global.upload(address, data).expect("the buffer was made for this data");
        address
    }

    /// Copies `data` to a device address.
    pub fn write(&mut self, address: u64, data: &[u8]) -> Result<()> {
        self.global.upload(address, data).map_err(|f| Error::Launch(f.to_string()))
    }

    /// `bytes` bytes from a device address; bytes that nothing wrote are 0xcd.
    pub fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>> {
        self.global.download(address, bytes).map_err(|f| Error::Launch(f.to_string()))
    }

    /// A whole buffer, of which every byte has to be written.
    pub fn download(&self, address: u64) -> Result<Vec<u8>> {
        if let Some(at) = self.unwritten(address)? {
            return Err(Error::Launch(format!("byte {at} of the buffer at {address:#x} was never written")));
        }
        let bytes = self.global.len(address).map_err(|f| Error::Launch(f.to_string()))?;
        self.read(address, bytes)
    }

    /// Offset of the first byte of a buffer that nothing wrote: an output that a kernel left out.
    pub fn unwritten(&self, address: u64) -> Result<Option<usize>> {
        self.global.unwritten(address).map_err(|f| Error::Launch(f.to_string()))
    }

    /// Makes a buffer count as never written, for a second run.
    pub fn forget(&mut self, address: u64) -> Result<()> {
        self.global.forget(address).map_err(|f| Error::Launch(f.to_string()))
    }

    /// Gives a buffer back; later accesses to it are errors.
    pub fn free(&mut self, address: u64) -> Result<()> {
        if self.global.free(address) { Ok(()) } else { Err(Error::Launch(format!("no buffer at {address:#x}"))) }
    }

    /// Registers a tensor map and returns the 128 bytes that a kernel takes as `__grid_constant__` parameter.
    pub fn tensor_map(&mut self, map: TensorMap) -> Result<[u8; 128]> {
        map.check().map_err(Error::Launch)?;
        self.maps.push(map);
        Ok(TensorMap::handle(self.maps.len() - 1))
    }

    /// Runs a kernel to its end. `params` is laid out as `.param` space is, see [`crate::Params`].
    pub fn launch(
        &mut self,
        module: &Module,
        entry: &str,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: usize,
        params: &[u8],
        options: &Options,
    ) -> Result<Report> {
        let kernel = module.kernel(entry)?;
        let refuse = |what: String| Err(Error::Launch(format!("{entry}: {what}")));
        if params.len() != kernel.param_bytes {
            return refuse(format!("{} bytes of parameters, the kernel takes {}", params.len(), kernel.param_bytes));
        }
        let threads: u64 = block.iter().map(|b| u64::from(*b)).product();
        let ctas: u64 = grid.iter().map(|g| u64::from(*g)).product();
        if threads == 0 || threads > u64::from(kernel.max_threads) {
            return refuse(format!("{threads} threads in a block, the kernel allows {}", kernel.max_threads));
        }
        if ctas == 0 || ctas > MAX_CTAS || grid[1] > 65535 || grid[2] > 65535 {
            return refuse(format!("a grid of {grid:?} blocks"));
        }
        let shared = kernel.static_shared.next_multiple_of(16) + dynamic_shared;
        if shared > options.shared_limit {
            return refuse(format!("{shared} bytes of shared memory, a block may have {}", options.shared_limit));
        }
        let launch = Launch { machine: self, module, kernel, grid, block, dynamic: dynamic_shared, params, options };
        let result = launch.run(ctas as usize);
        self.global.end_launch();
        result
    }
}

impl Launch<'_> {
    fn run(&self, ctas: usize) -> Result<Report> {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if self.options.threads == 0 { cores() } else { self.options.threads }.min(ctas);
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        // The first error in the order of the blocks, so that it is the same for any number of threads.
        let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        let total = Mutex::new(Report::new(self.kernel));
        let work = || {
            let mut worker = Worker::new(self.kernel);
            while !stop.load(Ordering::Relaxed) {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                if turn >= ctas {
                    break;
                }
                // Seeds also begin elsewhere in the grid.
                let index = (turn as u64).wrapping_add(self.options.seed % ctas as u64) as usize % ctas;
                if let Err(e) = Cta::new(self, &mut worker, index).run() {
                    stop.store(true, Ordering::Relaxed);
                    let mut first = error.lock().unwrap_or_else(|e| e.into_inner());
                    if first.as_ref().is_none_or(|(t, _)| turn < *t) {
                        *first = Some((turn, e));
                    }
                }
            }
            total.lock().unwrap_or_else(|e| e.into_inner()).add(&worker);
        };
        if threads == 1 {
            work();
        } else {
            std::thread::scope(|s| (0..threads).for_each(|_| drop(s.spawn(work))));
        }
        match error.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some((_, e)) => Err(e),
            None => Ok(total.into_inner().unwrap_or_else(|e| e.into_inner())),
        }
    }
}
