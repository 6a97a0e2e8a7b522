//! Devices: where tensors live and operations run.

use std::sync::Arc;

use super::buffer::Buffer;
use super::pool::Pool;
use crate::error::{Error, Result};

/// Bytes a device's tensors take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryReport {
    /// Held by live tensors.
    pub in_use: usize,
    /// Held by live tensors or kept for the next ones, the region of [`Device::planned`] as a whole.
    pub reserved: usize,
    /// Largest `in_use` since the device was made or [`Device::reset_peak`] was called.
    pub peak: usize,
    /// Limit, if one was set.
    pub limit: Option<usize>,
    /// Tensors that [`Device::planned`] placed as planned, since the device was made.
    pub planned_hits: u64,
    /// Tensors that it had planned differently, or could not place, and that took other memory.
    pub planned_misses: u64,
}

/// Where tensors live and operations run. Cheap to clone.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Device {
    /// The processor.
    Cpu(Arc<CpuDevice>),
}

/// The processor: its instruction set, its threads and its memory pool.
pub struct CpuDevice {
    isa: Isa,
    threads: Option<rayon::ThreadPool>,
    pool: Arc<Pool>,
}

/// Instruction sets that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Portable Rust; also the reference.
    Scalar,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, VL, BW and DQ.
    Avx512,
}

impl Isa {
    /// The best this processor has.
    #[must_use]
    pub fn detect() -> Isa {
        *Isa::available().last().unwrap_or(&Isa::Scalar)
    }

    /// All that this processor has, in rising order.
    #[must_use]
    pub fn available() -> &'static [Isa] {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            match (avx2, avx512) {
                (true, true) => &[Isa::Scalar, Isa::Avx2, Isa::Avx512],
                (true, false) => &[Isa::Scalar, Isa::Avx2],
                _ => &[Isa::Scalar],
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            &[Isa::Scalar]
        }
    }

    /// "scalar", "avx2" or "avx512".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }
}

impl Device {
    /// The processor, running in the caller's current rayon pool.
    #[must_use]
    pub fn cpu() -> Self {
        Device::Cpu(Arc::new(CpuDevice { isa: Isa::detect(), threads: None, pool: Arc::default() }))
    }

    /// The processor with `threads` threads of its own.
    ///
    /// # Errors
    /// [`Error::Usage`] for zero threads, [`Error::Device`] when the threads cannot be started.
    pub fn cpu_with_threads(threads: usize) -> Result<Self> {
        Self::cpu_with(Some(threads), Isa::detect())
    }

    /// The processor with threads of its own (`None`: the caller's current rayon pool) and a chosen instruction set.
    ///
    /// # Errors
    /// [`Error::Usage`] for zero threads, [`Error::Device`] when this processor lacks `isa` or the threads cannot be
    /// started.
    pub fn cpu_with(threads: Option<usize>, isa: Isa) -> Result<Self> {
        if !Isa::available().contains(&isa) {
            return Err(Error::Device { what: format!("this processor has no {}", isa.name()) });
        }
        let threads = threads.map(start_threads).transpose()?;
        Ok(Device::Cpu(Arc::new(CpuDevice { isa, threads, pool: Arc::default() })))
    }

    /// CUDA device `ordinal`.
    ///
    /// # Errors
    /// Always [`Error::Device`] in this version, which has no GPU kernels yet; it says what the driver probe found.
    /// Never a panic, with or without a driver.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Err(Error::Device { what: format!("cuda:{ordinal} cannot be used: {}", cuda_status().reason()) })
    }

    /// The fastest device that works here.
    #[must_use]
    pub fn best() -> Self {
        Self::cuda(0).unwrap_or_else(|_| Self::cpu())
    }

    /// Memory of this device's tensors.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        let Device::Cpu(d) = self;
        d.pool.report()
    }

    /// Refuses tensors past `bytes` in total, or lifts the limit.
    pub fn set_memory_limit(&self, bytes: Option<usize>) {
        let Device::Cpu(d) = self;
        d.pool.set_limit(bytes);
    }

    /// Starts [`MemoryReport::peak`] over from what is in use now.
    pub fn reset_peak(&self) {
        let Device::Cpu(d) = self;
        d.pool.reset_peak();
    }

    /// Gives memory that is kept for later tensors back to the system.
    pub fn trim(&self) {
        let Device::Cpu(d) = self;
        d.pool.trim();
    }

    /// Runs `f`, a computation that repeats: a pass through a network, with a `key` that says which.
    ///
    /// The first run with a key notes which tensors this thread asks for and when they are dropped. From that, every
    /// tensor is given a place in one region of memory, which later runs reuse: they take no page faults and leave no
    /// holes, at the cost of keeping the region between runs until [`Device::trim`]. Keys share the region; the
    /// largest plan decides its size. A tensor that comes unplanned, that finds its place still taken, or that
    /// outlives the run takes other memory, so a key that is used for two different computations, tensors that are
    /// dropped early or late and other threads cost time, never correctness. A limit that leaves no room for the
    /// region leaves everything as without a plan. A run inside another one, or beside one of another thread, is just
    /// run.
    pub fn planned<R>(&self, key: &[usize], f: impl FnOnce() -> R) -> R {
        let Device::Cpu(d) = self;
        let _scope = d.pool.enter(key);
        f()
    }

    /// Runs `f`, whose tensors are no part of a [`Device::planned`] run that this thread is in: they come only once, or
    /// outlive it.
    pub(crate) fn unplanned<R>(&self, f: impl FnOnce() -> R) -> R {
        let Device::Cpu(d) = self;
        let before = d.pool.pause(true);
        let result = f();
        d.pool.pause(before);
        result
    }

    /// Runs `f` with this device's threads as the current rayon pool.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let Device::Cpu(d) = self;
        match &d.threads {
            Some(t) => t.install(f),
            None => f(),
        }
    }

    /// Threads that operations use.
    #[must_use]
    pub fn threads(&self) -> usize {
        let Device::Cpu(d) = self;
        d.threads.as_ref().map_or_else(rayon::current_num_threads, rayon::ThreadPool::current_num_threads)
    }

    /// Instruction set of the CPU kernels.
    #[must_use]
    pub fn isa(&self) -> Isa {
        let Device::Cpu(d) = self;
        d.isa
    }

    /// "cpu".
    #[must_use]
    pub fn name(&self) -> String {
        "cpu".into()
    }

    pub(super) fn alloc(&self, floats: usize) -> Result<Buffer> {
        let Device::Cpu(d) = self;
        Buffer::new(floats, &d.pool)
    }
}

impl std::fmt::Debug for CpuDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuDevice").field("isa", &self.isa).field("own_threads", &self.threads.is_some()).finish()
    }
}

fn start_threads(n: usize) -> Result<rayon::ThreadPool> {
    if n == 0 {
        return Err(Error::usage("0 threads asked for, at least 1 is needed"));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|i| format!("stunet-{i}"))
        .build()
        .map_err(|e| Error::Device { what: format!("cannot start {n} threads: {e}") })
}

/// What the CUDA driver probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaStatus {
    /// Built without the `cuda` feature.
    NotBuilt,
    /// No driver library on this machine.
    NoDriver,
    /// The driver library is there but does not work.
    Broken(String),
    /// The driver works; these devices were found.
    Found {
        /// Driver API version, such as 12040 for 12.4.
        version: i32,
        /// Device names.
        devices: Vec<String>,
    },
}

impl CudaStatus {
    /// One line for a person: why the GPU is not used.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            CudaStatus::NotBuilt => "this build has no cuda feature".into(),
            CudaStatus::NoDriver => "no NVIDIA driver was found on this machine".into(),
            CudaStatus::Broken(e) => format!("the NVIDIA driver does not work: {e}"),
            CudaStatus::Found { version, devices } => format!(
                "driver {}.{} with {} found, but this version has no GPU kernels yet",
                version / 1000,
                version % 1000 / 10,
                if devices.is_empty() { "no device".into() } else { devices.join(", ") }
            ),
        }
    }
}

/// Asks for the CUDA driver and its devices, without creating a context. Never panics.
#[must_use]
pub fn cuda_status() -> CudaStatus {
    #[cfg(not(feature = "cuda"))]
    return CudaStatus::NotBuilt;
    #[cfg(feature = "cuda")]
    super::cuda::probe()
}
