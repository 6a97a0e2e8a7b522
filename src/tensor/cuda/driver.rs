//! What the kernels' host side asks of a device: memory, and to run an entry of a PTX file.

use std::io::Read;

use flate2::read::ZlibDecoder;

use super::{Findings, Parameter, TensorMap};
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
    pub(crate) fn at_least(self, bytes: usize, op: &'static str, what: &str) -> Result<u64> {
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
    /// Its text as a zlib stream, by whose address a module is known.
    pub packed: &'static [u8],
}

impl Module {
    /// Its text.
    ///
    /// # Errors
    /// [`Error::Device`] that names the file when it is damaged.
    pub fn text(&self) -> Result<String> {
        let mut text = String::new();
        match ZlibDecoder::new(self.packed).read_to_string(&mut text) {
            Ok(_) => Ok(text),
            Err(e) => Err(Error::Device { what: format!("{}: {e}", self.name) }),
        }
    }
}

/// Page-locked memory of the host, from which a card copies while the processor goes on. Only a name for it: who pinned it
/// unpins it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// What tells it from others.
    pub address: usize,
    /// How much there is of it.
    pub bytes: usize,
}

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
    pub(crate) fn line(blocks: usize, threads: u32, shared: usize) -> Result<Launch> {
        let n = u32::try_from(blocks).ok().filter(|n| i32::try_from(*n).is_ok());
        let n = n.ok_or_else(|| Error::unsupported(format!("a grid of {blocks} blocks")))?;
        Ok(Launch { grid: [n, 1, 1], block: [threads, 1, 1], shared })
    }
}

/// What a launch or a memset asks for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ask<'a> {
    Launch { module: &'a Module, entry: &'a str, launch: Launch, params: Parameter<'a> },
    Memset { memory: Memory, value: u8 },
}

impl Ask<'_> {
    pub(super) fn issue(self, driver: &dyn Driver) -> Result<()> {
        match self {
            Ask::Launch { module, entry, launch, params } => driver.launch(module, entry, launch, params),
            Ask::Memset { memory, value } => driver.memset(memory, value),
        }
    }

    /// Whether it asks for exactly that.
    pub(super) fn is(self, work: &Work) -> bool {
        match (self, work.ask()) {
            (
                Ask::Launch { module: m, entry: e, launch: l, params: p },
                Ask::Launch { module, entry, launch, params },
            ) => {
                // A file is in the program once.
                (m.name, m.packed.as_ptr(), e, l, p) == (module.name, module.packed.as_ptr(), entry, launch, params)
            }
            (Ask::Memset { memory: m, value: v }, Ask::Memset { memory, value }) => (m, v) == (memory, value),
            _ => false,
        }
    }
}

/// A launch or a memset that is kept.
#[derive(Debug, Clone)]
pub enum Work {
    /// See [`Driver::launch`].
    Launch {
        /// Where the entry is.
        module: Module,
        /// Its name.
        entry: String,
        /// How it is run.
        launch: Launch,
        /// See [`Parameter::maps`].
        maps: Vec<TensorMap>,
        /// See [`Parameter::bytes`].
        bytes: Vec<u8>,
    },
    /// See [`Driver::memset`].
    Memset {
        /// What is set.
        memory: Memory,
        /// To what.
        value: u8,
    },
}

impl Work {
    pub(super) fn ask(&self) -> Ask<'_> {
        match self {
            Work::Launch { module, entry, launch, maps, bytes } => {
                Ask::Launch { module, entry, launch: *launch, params: Parameter { maps, bytes } }
            }
            Work::Memset { memory, value } => Ask::Memset { memory: *memory, value: *value },
        }
    }
}

impl From<Ask<'_>> for Work {
    fn from(ask: Ask<'_>) -> Work {
        match ask {
            Ask::Launch { module, entry, launch, params } => {
                let (maps, bytes) = (params.maps.into(), params.bytes.into());
                Work::Launch { module: *module, entry: entry.into(), launch, maps, bytes }
            }
            Ask::Memset { memory, value } => Work::Memset { memory, value },
        }
    }
}

/// Work that a driver has ready to run as a whole. Only a name for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Graph(pub usize);

fn unknown(pinned: Pinned) -> Error {
    Error::Device { what: format!("{} bytes of page-locked memory that this device has not", pinned.bytes) }
}

/// A device that runs PTX. Work is done in the order in which it is asked for; only [`Driver::upload`],
/// [`Driver::download`], [`Driver::wait`] and [`Driver::synchronize`] wait for it.
pub trait Driver: std::fmt::Debug + Send + Sync {
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

    /// Page-locks `bytes` bytes of the host.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a driver that does not, [`Error::Device`] of a system that refuses.
    fn pin(&self, bytes: usize) -> Result<Pinned> {
        Err(Error::unsupported(format!("{bytes} bytes of page-locked memory")))
    }

    /// Gives page-locked memory back, after the last copy from it.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn unpin(&self, pinned: Pinned) -> Result<()> {
        Err(unknown(pinned))
    }

    /// Writes `bytes` to the start of `pinned`, at once. A copy from it that is not done may take them for its own:
    /// [`Driver::wait`] comes first.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not fit, [`Error::Device`].
    fn fill(&self, pinned: Pinned, _bytes: &[u8]) -> Result<()> {
        Err(unknown(pinned))
    }

    /// Copies the first `bytes` bytes of `pinned` to the start of `to`, as work in its order: unlike [`Driver::upload`] it
    /// does not wait. What crosses the bus may do so while work before it is done.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not as many on both sides, [`Error::Device`].
    fn copy(&self, _to: Memory, pinned: Pinned, _bytes: usize) -> Result<()> {
        Err(unknown(pinned))
    }

    /// Waits until the last copy from `pinned` has read it, which may be before work asked for earlier is done.
    ///
    /// # Errors
    /// [`Error::Device`], also of earlier work that is known by then to have failed.
    fn wait(&self, pinned: Pinned) -> Result<()> {
        Err(unknown(pinned))
    }

    /// Sets all bytes of `memory` to `value`.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn memset(&self, memory: Memory, value: u8) -> Result<()>;

    /// Runs `entry` of `module`, which has one parameter.
    ///
    /// # Errors
    /// [`Error::Device`] that names the entry; [`Error::Unsupported`] of a driver that makes no tensor maps.
    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: Parameter<'_>) -> Result<()>;

    /// What was found out about this device, which lasts as long as it is open.
    fn findings(&self) -> &Findings;

    /// Makes ready to run `work`, each part after the one before. Nothing runs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a driver that makes no graphs, [`Error::Device`].
    fn record(&self, work: &[Work]) -> Result<Graph> {
        Err(Error::unsupported(format!("a graph of {} launches", work.len())))
    }

    /// Runs all of a graph, as if its work was asked for part by part.
    ///
    /// # Errors
    /// [`Error::Device`]; then none of it was asked for.
    fn replay(&self, graph: Graph) -> Result<()> {
        Err(Error::Device { what: format!("{graph:?} is of no work") })
    }

    /// Gives a graph up.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn forget(&self, graph: Graph) -> Result<()> {
        Err(Error::Device { what: format!("{graph:?} is of no work") })
    }

    /// Whether there is work that is not done.
    ///
    /// # Errors
    /// [`Error::Device`] of work asked for earlier.
    fn busy(&self) -> Result<bool> {
        Ok(false)
    }

    /// What it calls itself, for people.
    fn name(&self) -> String;

    /// Bytes of memory, all of it.
    fn total(&self) -> usize;

    /// Bytes of memory that are free, whoever has the rest.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn available(&self) -> Result<usize>;

    /// Waits for all work asked for.
    ///
    /// # Errors
    /// [`Error::Device`], also of work asked for earlier.
    fn synchronize(&self) -> Result<()>;
}
