//! What the kernels' host side asks of a device: memory, and to run an entry of a PTX file.

use crate::error::{Error, Result};

/// Memory of a device. Only a name for it: who allocated it frees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Where it starts, as kernels see it.
    pub address: u64,
    /// How much there is of it.
    pub bytes: usize,
}

impl Memory {
    /// Checks that `bytes` fit, so that no kernel is told of memory that is not there.
    ///
    /// # Errors
    /// [`Error::Shape`] that names the operation and the operand.
    pub(super) fn at_least(self, bytes: usize, op: &'static str, what: &str) -> Result<u64> {
        if self.bytes < bytes {
            return Err(Error::shape(op, format!("{what} has {} bytes, expected {bytes}", self.bytes)));
        }
        Ok(self.address)
    }
}

/// A PTX file in the program.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    /// Its file name.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// A kernel's PTX files: what is asked for is what the card can run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Files {
    /// For compute capability 7.5 and later, without bf16.
    turing: Option<Module>,
    /// For compute capability 8.0 and later.
    ampere: Module,
}

impl Files {
    pub(super) const fn new(turing: Option<Module>, ampere: Module) -> Files {
        Files { turing, ampere }
    }

    /// Runs `entry` of the best file for the card.
    pub(super) fn launch(&self, driver: &dyn Driver, entry: &str, launch: Launch, params: &[u8]) -> Result<()> {
        let [major, minor] = driver.capability();
        let module = match &self.turing {
            _ if major >= 8 => &self.ampere,
            Some(module) if [major, minor] >= [7, 5] && !entry.ends_with("_bf16") => module,
            _ => return Err(Error::unsupported(format!("{entry} on a card of compute capability {major}.{minor}"))),
        };
        driver.launch(module, entry, launch, params)
    }

    /// The files that hold `entry`.
    pub(super) fn of(&self, entry: &str) -> Vec<Module> {
        let old = self.turing.filter(|_| !entry.ends_with("_bf16"));
        old.into_iter().chain([self.ampere]).collect()
    }
}

/// The files of a kernel: `files!("stem")`, or `files!("stem", bf16)` where only cards with bf16 have one.
macro_rules! files {
    ($stem:literal) => {
        $crate::backend::cuda::driver::Files::new(
            Some($crate::backend::cuda::driver::module!(concat!($stem, ".sm75.ptx"))),
            $crate::backend::cuda::driver::module!(concat!($stem, ".sm80.ptx")),
        )
    };
    ($stem:literal, bf16) => {
        $crate::backend::cuda::driver::Files::new(
            None,
            $crate::backend::cuda::driver::module!(concat!($stem, ".sm80.ptx")),
        )
    };
}
pub(super) use files;

/// The PTX file of this name as a [`Module`].
macro_rules! module {
    ($name:expr) => {
        $crate::backend::cuda::driver::Module {
            name: $name,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/ptx/", $name)),
        }
    };
}
pub(super) use module;

/// How an entry is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

impl Launch {
    /// `blocks` blocks of `threads` threads in one dimension.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more blocks than a grid may have.
    pub(super) fn line(blocks: usize, threads: u32, shared: usize) -> Result<Launch> {
        let n = u32::try_from(blocks).ok().filter(|n| i32::try_from(*n).is_ok());
        let n = n.ok_or_else(|| Error::unsupported(format!("a grid of {blocks} blocks")))?;
        Ok(Launch { grid: [n, 1, 1], block: [threads, 1, 1], shared })
    }
}

/// Shared memory that every card of that capability gives a block.
pub(super) fn shared_limit(driver: &dyn Driver) -> usize {
    match driver.capability()[0] {
        0..=7 => 64 << 10,
        9 => 227 << 10,
        _ => 99 << 10,
    }
}

/// A device that runs PTX. Work is done in the order in which it is asked for; only [`Driver::download`] and
/// [`Driver::synchronize`] wait for it.
pub trait Driver {
    /// Compute capability of the card, major and minor.
    fn capability(&self) -> [u32; 2];

    /// Multiprocessors: how many blocks run side by side at least.
    fn multiprocessors(&self) -> usize;

    /// Memory of `bytes` bytes with unspecified contents, aligned to 256.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    fn alloc(&self, bytes: usize) -> Result<Memory>;

    /// Gives memory back.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn free(&self, memory: Memory) -> Result<()>;

    /// Copies `bytes` to the start of `to`.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not fit, [`Error::Device`].
    fn upload(&self, to: Memory, bytes: &[u8]) -> Result<()>;

    /// Copies the start of `from` to `bytes`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not as many, [`Error::Device`].
    fn download(&self, from: Memory, bytes: &mut [u8]) -> Result<()>;

    /// Sets all bytes of `memory` to `value`.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn memset(&self, memory: Memory, value: u8) -> Result<()>;

    /// Runs `entry` of `module` with one parameter, a struct of these bytes.
    ///
    /// # Errors
    /// [`Error::Device`] that names the entry.
    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: &[u8]) -> Result<()>;

    /// Waits for all work asked for.
    ///
    /// # Errors
    /// [`Error::Device`], also of work asked for earlier.
    fn synchronize(&self) -> Result<()>;
}
