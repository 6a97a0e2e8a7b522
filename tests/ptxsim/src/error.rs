//! What can be wrong with a module, a launch, or a kernel.

use std::fmt;

/// Where in a launch a fault was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Entry point.
    pub kernel: String,
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// The instruction there.
    pub text: String,
    /// Block in the grid.
    pub cta: [u32; 3],
    /// Warp in the block.
    pub warp: usize,
}

/// Everything that this crate refuses or finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The text is no PTX, or holds something that this crate does not know.
    Parse {
        /// Line of the PTX text, from 1.
        line: u32,
        /// What is wrong there.
        what: String,
    },
    /// The launch itself is impossible: sizes, parameters, names.
    Launch(String),
    /// A fault of the kernel.
    Fault {
        /// Where.
        place: Box<Place>,
        /// What.
        fault: Fault,
    },
}

/// `Result` of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a kernel did wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An access outside of its buffer, of shared memory, of parameters.
    OutOfBounds {
        /// What was accessed.
        what: String,
        /// First byte, from its start.
        offset: u64,
        /// Bytes of the access.
        bytes: usize,
        /// Bytes there are.
        len: u64,
    },
    /// An address that belongs to nothing.
    WildAddress(u64),
    /// An address that is no multiple of the size of the access.
    Misaligned {
        /// The address.
        address: u64,
        /// Its multiple.
        bytes: usize,
    },
    /// A read of a byte that nothing wrote, or that an asynchronous copy has yet to bring.
    Unwritten {
        /// What was read.
        what: String,
        /// The byte, from its start.
        offset: u64,
    },
    /// Two warps of a block touch a byte of shared memory, one of them writes, nothing orders them.
    SharedRace {
        /// The byte.
        offset: u64,
        /// The other one.
        with: String,
    },
    /// A bulk copy or wgmma touches a byte of shared memory that a warp wrote with no `fence.proxy.async` since.
    ProxyFence {
        /// The byte.
        offset: u64,
        /// Who wrote it.
        warp: usize,
    },
    /// Two blocks of a launch touch a byte of global memory and one of them writes.
    GlobalRace {
        /// The byte, from the start of its buffer.
        offset: u64,
        /// The other block, by its number in the grid.
        with: String,
    },
    /// An instruction for whole warps was reached by part of one.
    Divergent {
        /// Lanes that are here.
        here: u32,
        /// Lanes that had to be.
        needed: u32,
    },
    /// Nothing can go on; all warps and where they stand.
    Deadlock(String),
    /// An integer division by zero.
    DivisionByZero {
        /// The lane.
        lane: usize,
    },
    /// An atomic sum of floats, which depends on the order.
    FloatAtomic,
    /// Wrong use of a barrier, of an mbarrier, or of a group of asynchronous work.
    Barrier(String),
    /// A write to memory that kernels may only read.
    ReadOnly,
    /// A shuffle reads a lane that does not take part.
    InactiveLane(usize),
    /// A tensor map, matrix descriptor or bulk copy that hardware would refuse.
    Descriptor(String),
    /// More instructions than the options allow: an endless loop.
    TooLong,
    /// `trap`, or an instruction past the end.
    Trap,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::OutOfBounds { what, offset, bytes, len } => {
                write!(f, "out of bounds: {bytes} bytes at offset {offset} of {what}, which has {len}")
            }
            Fault::WildAddress(a) => write!(f, "no buffer at address {a:#x}"),
            Fault::Misaligned { address, bytes } => write!(f, "misaligned: {address:#x} is no multiple of {bytes}"),
            Fault::Unwritten { what, offset } => write!(f, "reads byte {offset} of {what}, which nothing wrote"),
            Fault::SharedRace { offset, with } => write!(f, "race: byte {offset} of shared memory with {with}"),
            Fault::ProxyFence { offset, warp } => {
                write!(f, "byte {offset} of shared memory, which warp {warp} wrote with no fence.proxy.async since")
            }
            Fault::GlobalRace { offset, with } => write!(f, "race: byte {offset} of a buffer with {with}"),
            Fault::Divergent { here, needed } => {
                write!(f, "reached by lanes {here:#010x} of a warp, but {needed:#010x} have to take part")
            }
            Fault::Deadlock(list) => write!(f, "deadlock: {list}"),
            Fault::DivisionByZero { lane } => write!(f, "division by zero in lane {lane}"),
            Fault::FloatAtomic => write!(f, "atomics of floats are forbidden: their sum depends on the order"),
            Fault::Barrier(what) | Fault::Descriptor(what) => f.write_str(what),
            Fault::ReadOnly => write!(f, "writes memory that is read-only"),
            Fault::InactiveLane(lane) => write!(f, "reads lane {lane}, which does not take part"),
            Fault::TooLong => write!(f, "more instructions than the options allow"),
            Fault::Trap => write!(f, "trap"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Parse { line, what } => write!(f, "PTX line {line}: {what}"),
            Error::Launch(what) => f.write_str(what),
            Error::Fault { place: p, fault } => {
                let [x, y, z] = p.cta;
                let (kernel, line, text, warp) = (&p.kernel, p.line, &p.text, p.warp);
                write!(f, "{kernel}, line {line} `{text}`, block ({x}, {y}, {z}), warp {warp}: {fault}")
            }
        }
    }
}

impl std::error::Error for Error {}
