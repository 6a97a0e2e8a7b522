//! Devices: where tensors live and operations run.

use std::sync::Arc;

use super::Precision;
use super::buffer::Buffer;
#[cfg(feature = "cuda")]
use super::cuda::{self, Driver as _};
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
    /// An NVIDIA card.
    #[cfg(feature = "cuda")]
    Cuda(Arc<CudaDevice>),
}

/// An NVIDIA card: its driver, its memory pool, and the processor that works beside it.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub struct CudaDevice {
    driver: Arc<cuda::Queue>,
    pool: Arc<Pool>,
    name: String,
    host: Device,
    rehearsal: bool,
}

/// The processor: its instruction set, its threads and its memory pool.
pub struct CpuDevice {
    isa: Isa,
    threads: Option<Arc<rayon::ThreadPool>>,
    pool: Arc<Pool>,
    rehearsal: bool,
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
        Self::cpu_of(Isa::detect(), None, false)
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
        let threads = threads.map(start_threads).transpose()?.map(Arc::new);
        Ok(Self::cpu_of(isa, threads, false))
    }

    fn cpu_of(isa: Isa, threads: Option<Arc<rayon::ThreadPool>>, rehearsal: bool) -> Self {
        Device::Cpu(Arc::new(CpuDevice { isa, threads, pool: Arc::default(), rehearsal }))
    }

    /// A device as this one, with memory of its own, on which nothing is computed: operations ask for memory as they would
    /// here, and [`Device::memory`] tells what that comes to. What is in tensors is nothing in particular. Of the
    /// processor's memory little is touched, so that the system has not to have it; a card's is numbers only.
    #[must_use]
    pub(crate) fn rehearsal(&self) -> Self {
        match self {
            Device::Cpu(d) => Self::cpu_of(d.isa, d.threads.clone(), true),
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => {
                let driver = Arc::new(cuda::Queue::new(Arc::new(cuda::Rehearsal::of(&*d.driver))));
                let pool = Arc::new(Pool::of(driver.clone()));
                let (name, host) = (d.name.clone(), d.host.clone());
                Device::Cuda(Arc::new(CudaDevice { driver, pool, name, host, rehearsal: true }))
            }
        }
    }

    /// Whether it is a [`Device::rehearsal`].
    pub(crate) fn is_rehearsal(&self) -> bool {
        match self {
            Device::Cpu(d) => d.rehearsal,
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => d.rehearsal,
        }
    }

    /// Bytes that new tensors can have: up to the limit, and on a card what is free, less what its driver takes for itself
    /// as kernels are first run. `None` where only the system knows.
    pub(crate) fn room(&self) -> Result<Option<usize>> {
        let memory = self.memory();
        let limit = memory.limit.map(|limit| limit.saturating_sub(memory.in_use));
        let (Some(total), Some(free)) = (self.total_memory(), self.available_memory()?) else { return Ok(limit) };
        let free = free.saturating_sub(total / 32);
        Ok(Some(limit.map_or(free, |limit| limit.min(free))))
    }

    /// CUDA device `ordinal`: its kernels' code is assembled by the driver when they are first used on a machine. What the
    /// processor does beside it runs in the caller's current rayon pool.
    ///
    /// # Errors
    /// [`Error::Device`] that says why it cannot be used: no driver, too old a driver, no such card, too old a card, or
    /// built without the `cuda` feature. Never a panic.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Self::cuda_with(ordinal, None)
    }

    /// CUDA device `ordinal`, beside which the processor works with threads of its own (`None`: the caller's current rayon
    /// pool).
    ///
    /// # Errors
    /// As [`Device::cuda`] and [`Device::cpu_with_threads`].
    pub fn cuda_with(ordinal: usize, threads: Option<usize>) -> Result<Self> {
        let named = |e: Error| match e {
            Error::Device { what } => Error::Device { what: format!("cuda:{ordinal} cannot be used: {what}") },
            e => e,
        };
        #[cfg(feature = "cuda")]
        {
            let context = cuda::Context::open(ordinal).map_err(named)?;
            let host = Self::cpu_with(threads, Isa::detect())?;
            Ok(Self::on_beside(Arc::new(context), format!("cuda:{ordinal}"), host))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = threads;
            Err(named(Error::Device { what: cuda_status().reason() }))
        }
    }

    /// Whatever runs PTX, under a name.
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    #[must_use]
    pub fn on(driver: Arc<dyn cuda::Driver>, name: String) -> Self {
        Self::on_beside(driver, name, Self::cpu())
    }

    /// The same beside a processor.
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    #[must_use]
    pub fn on_beside(driver: Arc<dyn cuda::Driver>, name: String, host: Device) -> Self {
        let driver = Arc::new(cuda::Queue::new(driver));
        let pool = Arc::new(Pool::of(driver.clone()));
        Device::Cuda(Arc::new(CudaDevice { driver, pool, name, host, rehearsal: false }))
    }

    /// The processor: itself, or the one that does beside a card what is not the card's.
    #[must_use]
    pub fn host(&self) -> &Device {
        match self {
            Device::Cpu(_) => self,
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => &d.host,
        }
    }

    /// The device to take if nothing else is asked for: the processor. No card is taken unasked as long as the kernels
    /// have run on an interpreter only.
    #[must_use]
    pub fn best() -> Self {
        Self::cpu()
    }

    /// What runs its kernels, if it is a card.
    #[cfg(feature = "cuda")]
    pub(crate) fn driver(&self) -> Option<&dyn cuda::Driver> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(d) => Some(&*d.driver),
        }
    }

    /// True for two devices whose tensors may meet: the processor whichever its threads, or one opened card.
    pub(crate) fn shares_memory(&self, other: &Self) -> bool {
        match (self, other) {
            (Device::Cpu(_), Device::Cpu(_)) => true,
            #[cfg(feature = "cuda")]
            (Device::Cuda(a), Device::Cuda(b)) => Arc::ptr_eq(a, b),
            #[cfg(feature = "cuda")]
            _ => false,
        }
    }

    /// True for the processor, whose memory can be read and written as slices.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        matches!(self, Device::Cpu(_))
    }

    /// How networks are stored if nothing else is asked for: f32 on the processor, on a card the 16 bits that its matrix
    /// units take.
    #[must_use]
    pub fn precision(&self) -> Precision {
        match self {
            Device::Cpu(_) => Precision::F32,
            #[cfg(feature = "cuda")]
            Device::Cuda(d) if d.driver.capability()[0] < 8 => Precision::F16,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Precision::Bf16,
        }
    }

    /// Waits for all work asked for; the processor's is always done.
    ///
    /// # Errors
    /// [`Error::Device`] when some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => d.driver.synchronize(),
        }
    }

    /// Bytes of a card's memory; of the processor's only the system knows.
    #[must_use]
    pub fn total_memory(&self) -> Option<usize> {
        match self {
            Device::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => Some(d.driver.total()),
        }
    }

    /// Bytes of a card's memory that new tensors can have now: what is free, whoever has the rest, and what is kept for them.
    /// Of the processor's only the system knows.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn available_memory(&self) -> Result<Option<usize>> {
        match self {
            Device::Cpu(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => {
                let (free, own) = (d.driver.available()?, d.pool.report());
                Ok(Some(free.saturating_add(own.reserved - own.in_use)))
            }
        }
    }

    /// Compute capability of a card, major and minor.
    #[must_use]
    pub fn compute_capability(&self) -> Option<[u32; 2]> {
        match self {
            Device::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => Some(d.driver.capability()),
        }
    }

    /// Kernels that a card has but does not run, because they gave something else than expected when they were first tried on
    /// it, each with the reason. Others take their place.
    #[must_use]
    pub fn refused_kernels(&self) -> Vec<(String, String)> {
        match self {
            Device::Cpu(_) => Vec::new(),
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => cuda::Driver::findings(&*d.driver).refused(),
        }
    }

    fn pool(&self) -> &Arc<Pool> {
        match self {
            Device::Cpu(d) => &d.pool,
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => &d.pool,
        }
    }

    /// Memory of this device's tensors.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        self.pool().report()
    }

    /// Refuses tensors past `bytes` in total, or lifts the limit.
    pub fn set_memory_limit(&self, bytes: Option<usize>) {
        self.pool().set_limit(bytes);
    }

    /// Starts [`MemoryReport::peak`] over from what is in use now.
    pub fn reset_peak(&self) {
        self.pool().reset_peak();
    }

    /// Gives memory that is kept for later tensors back to the system.
    pub fn trim(&self) {
        self.pool().trim();
    }

    /// Runs `f`, a computation that repeats: a pass through a network, with a `key` that says which.
    ///
    /// The first run with a key notes which tensors this thread asks for and when they are dropped. From that, every
    /// tensor is given a place in one region of memory, which later runs reuse: they take no page faults and leave no
    /// holes, at the cost of keeping the region between runs until [`Device::trim`]. Keys share the region; the
    /// largest plan decides its size. A tensor that comes unplanned, that finds its place still taken, or that
    /// outlives the run takes other memory, so a key that is used for two different computations, tensors that are
    /// dropped early or late and other threads cost time, never correctness. A limit that leaves no room for the
    /// region leaves everything as without a plan. On a card, launches that come as they came in the runs before, to the
    /// byte, go to the driver as one graph. A run inside another one, or beside one of another thread, is just
    /// run.
    pub fn planned<R>(&self, key: &[usize], f: impl FnOnce() -> R) -> R {
        self.pass(key, false, f)
    }

    /// As [`Device::planned`], of a computation whose launches are all known before the first has to run: they are one graph
    /// also where a card has nothing else to do.
    ///
    /// # Errors
    /// Those of `f`, and what went wrong with launches that were held back when it ended.
    pub(crate) fn repeated<R>(&self, key: &[usize], f: impl FnOnce() -> Result<R>) -> Result<R> {
        let result = self.pass(key, true, f)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(d) = self {
            d.driver.flush()?;
        }
        Ok(result)
    }

    fn pass<R>(&self, key: &[usize], patient: bool, f: impl FnOnce() -> R) -> R {
        #[cfg(not(feature = "cuda"))]
        let _ = patient;
        let _scope = self.pool().enter(key);
        #[cfg(feature = "cuda")]
        let _pass = match self {
            Device::Cpu(_) => None,
            Device::Cuda(d) => Some(d.driver.enter(key, patient)),
        };
        f()
    }

    /// Runs `f`, whose tensors are no part of a [`Device::planned`] run that this thread is in: they come only once, or
    /// outlive it.
    pub(crate) fn unplanned<R>(&self, f: impl FnOnce() -> R) -> R {
        let before = self.pool().pause(true);
        let result = f();
        self.pool().pause(before);
        result
    }

    /// Runs `f` with this device's threads, of a card those of the processor beside it, as the current rayon pool.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match self {
            Device::Cpu(d) => match &d.threads {
                Some(t) => t.install(f),
                None => f(),
            },
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => d.host.install(f),
        }
    }

    /// Threads that operations use; of a card those of the processor beside it.
    #[must_use]
    pub fn threads(&self) -> usize {
        match self {
            Device::Cpu(d) => d.threads.as_ref().map_or_else(rayon::current_num_threads, |t| t.current_num_threads()),
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => d.host.threads(),
        }
    }

    /// Instruction set of the CPU kernels; beside a card, of what the processor does for it.
    #[must_use]
    pub fn isa(&self) -> Isa {
        match self {
            Device::Cpu(d) => d.isa,
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => d.host.isa(),
        }
    }

    /// "cpu" or "cuda:0".
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Device::Cpu(_) => "cpu".into(),
            #[cfg(feature = "cuda")]
            Device::Cuda(d) => d.name.clone(),
        }
    }

    pub(super) fn alloc(&self, floats: usize) -> Result<Buffer> {
        Buffer::new(floats, self.pool())
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
    /// One line for a person: the cards, or why there is none.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            CudaStatus::NotBuilt => "this build has no cuda feature".into(),
            CudaStatus::NoDriver => "no NVIDIA driver was found on this machine".into(),
            CudaStatus::Broken(e) => format!("the NVIDIA driver does not work: {e}"),
            CudaStatus::Found { version, devices } => format!(
                "driver {}.{} found {}",
                version / 1000,
                version % 1000 / 10,
                if devices.is_empty() { "no card".into() } else { devices.join(", ") }
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
