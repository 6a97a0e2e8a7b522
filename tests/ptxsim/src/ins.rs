//! Decoded instructions: everything that needs text is decided once, before a kernel runs.

use crate::convert::Convert;

/// One value of each lane of a warp.
pub(crate) type V32 = [u32; 32];
/// One wide value of each lane of a warp.
pub(crate) type V64 = [u64; 32];

/// A value for every lane. Loops over lanes become vector code in this form only.
#[inline(always)]
pub(crate) fn each<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; 32] {
    let mut out = [T::default(); 32];
    for (i, o) in out.iter_mut().enumerate() {
        *o = f(i);
    }
    out
}

/// Set in the number of a register row that is a constant of the kernel and not a warp's own.
pub(crate) const CONSTANT: u32 = 1 << 31;

/// A row of registers of at most 32 bits; narrower values are kept zero-extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct R(pub(crate) u32);
/// A row of 64-bit registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct D(pub(crate) u32);
/// A predicate: one bit a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct P(pub(crate) u32);

/// Types of PTX; `b` types are the unsigned ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ty {
    Pred,
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    F16,
    Bf16,
    F16x2,
    Bf16x2,
    Tf32,
    F32,
    F64,
}

impl Ty {
    pub(crate) fn parse(s: &str) -> Option<Ty> {
        Some(match s {
            "pred" => Ty::Pred,
            "u8" | "b8" => Ty::U8,
            "s8" => Ty::S8,
            "u16" | "b16" => Ty::U16,
            "s16" => Ty::S16,
            "u32" | "b32" => Ty::U32,
            "s32" => Ty::S32,
            "u64" | "b64" => Ty::U64,
            "s64" => Ty::S64,
            "f16" => Ty::F16,
            "bf16" => Ty::Bf16,
            "f16x2" => Ty::F16x2,
            "bf16x2" => Ty::Bf16x2,
            "tf32" => Ty::Tf32,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Ty::Pred | Ty::U8 | Ty::S8 => 1,
            Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 => 2,
            Ty::U64 | Ty::S64 | Ty::F64 => 8,
            _ => 4,
        }
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    pub(crate) fn float(self) -> bool {
        matches!(self, Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 | Ty::Tf32 | Ty::F32 | Ty::F64)
    }
}

/// A function of registers only, by the widths of its result and operands.
#[derive(Clone, Copy)]
pub(crate) enum Pure {
    A1(fn(&V32) -> V32),
    A2(fn(&V32, &V32) -> V32),
    A3(fn(&V32, &V32, &V32) -> V32),
    A4(fn(&V32, &V32, &V32, &V32) -> V32),
    W1(fn(&V64) -> V64),
    W2(fn(&V64, &V64) -> V64),
    W3(fn(&V64, &V64, &V64) -> V64),
    Narrow(fn(&V64) -> V32),
    Widen(fn(&V32) -> V64),
    MulWide(fn(&V32, &V32) -> V64),
    MadWide(fn(&V32, &V32, &V64) -> V64),
    ShiftWide(fn(&V64, &V32) -> V64),
    Compare(fn(&V32, &V32) -> u32),
    CompareWide(fn(&V64, &V64) -> u32),
}

/// Logic of two predicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

impl Logic {
    pub(crate) fn of(self, a: u32, b: u32) -> u32 {
        match self {
            Logic::And => a & b,
            Logic::Or => a | b,
            Logic::Xor => a ^ b,
        }
    }
}

/// What `setp` writes and what it combines the comparison with.
pub(crate) struct SetP {
    pub(crate) to: P,
    /// Receives the combination with the negated comparison.
    pub(crate) other: Option<P>,
    pub(crate) with: Option<(Logic, P, bool)>,
}

/// State spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Param,
    Const,
}

/// The register part of an address.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Base {
    None,
    Narrow(R),
    Wide(D),
}

/// Register plus constant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addr {
    pub(crate) base: Base,
    pub(crate) offset: u64,
}

/// A register of either width.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reg {
    Narrow(R),
    Wide(D),
    Pred(P),
}

/// A load or store of one to eight values a lane.
pub(crate) struct Access {
    pub(crate) space: Space,
    pub(crate) ty: Ty,
    pub(crate) addr: Addr,
    pub(crate) regs: Vec<Reg>,
}

/// What an atomic does with the old value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

pub(crate) struct Atom {
    pub(crate) op: AtomOp,
    pub(crate) space: Space,
    pub(crate) ty: Ty,
    pub(crate) to: Option<Reg>,
    pub(crate) addr: Addr,
    pub(crate) value: Reg,
    pub(crate) swap: Option<Reg>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

pub(crate) struct Shfl {
    pub(crate) mode: ShflMode,
    pub(crate) to: R,
    pub(crate) valid: Option<P>,
    pub(crate) value: R,
    pub(crate) lane: R,
    pub(crate) clamp: R,
    pub(crate) members: R,
}

/// A warp-wide agreement on one value.
#[derive(Clone, Copy)]
pub(crate) enum Vote {
    Ballot(R),
    All(P),
    Any(P),
    Uni(P),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MmaKind {
    /// m16n8k16 and m16n8k8 of f16.
    F16,
    /// m16n8k16 and m16n8k8 of bf16.
    Bf16,
    /// m16n8k8 and m16n8k4 of tf32.
    Tf32,
}

pub(crate) struct Mma {
    pub(crate) kind: MmaKind,
    pub(crate) k: usize,
    /// Whether sums are f32; else they are pairs of f16.
    pub(crate) wide: bool,
    pub(crate) d: Vec<R>,
    pub(crate) a: Vec<R>,
    pub(crate) b: Vec<R>,
    pub(crate) c: Vec<R>,
}

pub(crate) enum WgA {
    Descriptor(D),
    Registers(Vec<R>),
}

pub(crate) struct Wgmma {
    pub(crate) kind: MmaKind,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) d: Vec<R>,
    pub(crate) a: WgA,
    pub(crate) b: D,
    /// Whether the sums so far are kept: a predicate, or a constant.
    pub(crate) keep: Result<P, bool>,
    pub(crate) scale_a: f32,
    pub(crate) scale_b: f32,
    pub(crate) trans_a: bool,
    pub(crate) trans_b: bool,
}

pub(crate) struct CpAsync {
    pub(crate) size: usize,
    pub(crate) to: Addr,
    pub(crate) from: Addr,
    /// Bytes to read; the rest is zero.
    pub(crate) read: Option<R>,
    /// Lanes that read nothing at all.
    pub(crate) ignore: Option<P>,
}

pub(crate) struct Bulk {
    pub(crate) tensor: bool,
    pub(crate) shared: Addr,
    pub(crate) global: Addr,
    pub(crate) coordinates: Vec<R>,
    pub(crate) offsets: Vec<R>,
    pub(crate) im2col: bool,
    pub(crate) size: Option<R>,
    pub(crate) barrier: Option<Addr>,
}

pub(crate) enum MBarrier {
    Init {
        addr: Addr,
        count: R,
    },
    Inval {
        addr: Addr,
    },
    Arrive {
        addr: Addr,
        count: Option<R>,
        expect: Option<R>,
        drop: bool,
        to: Option<D>,
    },
    ExpectTx {
        addr: Addr,
        bytes: R,
    },
    CompleteTx {
        addr: Addr,
        bytes: R,
    },
    TestParity {
        to: P,
        addr: Addr,
        parity: R,
    },
    TestState {
        to: P,
        addr: Addr,
        state: D,
    },
    /// `cp.async.mbarrier.arrive`: arrives when the thread's copies so far are done.
    CopyArrive {
        addr: Addr,
        noinc: bool,
    },
}

/// A decoded operation.
pub(crate) enum Op {
    A1(fn(&V32) -> V32, R, R),
    A2(fn(&V32, &V32) -> V32, R, R, R),
    A3(fn(&V32, &V32, &V32) -> V32, R, R, R, R),
    A4(fn(&V32, &V32, &V32, &V32) -> V32, R, [R; 4]),
    W1(fn(&V64) -> V64, D, D),
    W2(fn(&V64, &V64) -> V64, D, D, D),
    W3(fn(&V64, &V64, &V64) -> V64, D, D, D, D),
    Narrow(fn(&V64) -> V32, R, D),
    Widen(fn(&V32) -> V64, D, R),
    MulWide(fn(&V32, &V32) -> V64, D, R, R),
    MadWide(fn(&V32, &V32, &V64) -> V64, D, R, R, D),
    ShiftWide(fn(&V64, &V32) -> V64, D, D, R),
    /// Integer quotients and remainders: zero is an error.
    Div(fn(&V32, &V32) -> V32, R, R, R),
    DivWide(fn(&V64, &V64) -> V64, D, D, D),
    Compare(fn(&V32, &V32) -> u32, R, R, Box<SetP>),
    CompareWide(fn(&V64, &V64) -> u32, D, D, Box<SetP>),
    /// Conversions without a function for whole warps.
    Convert(Box<Convert>, Reg, Reg),
    Select(R, R, R, P),
    SelectWide(D, D, D, P),
    /// `set`: all ones, or 1.0, where the comparison holds.
    Set(fn(&V32, &V32) -> u32, R, R, R, u32),
    Logic(Logic, P, P, P),
    Not(P, P),
    SetTrue(P),
    /// 64 bits from halves, quarters; 32 bits from halves.
    Pack(Reg, Vec<R>),
    Unpack(Vec<R>, Reg),
    Load(Box<Access>),
    Store(Box<Access>),
    Atom(Box<Atom>),
    /// Where a float atomic stands: an error once it is reached.
    FloatAtomic,
    Branch(u32),
    BranchIndexed(R, Vec<u32>),
    Exit,
    Trap,
    /// Barrier number, threads that take part, whether the warp waits.
    Barrier(R, Option<R>, bool),
    SyncWarp(R),
    Shfl(Box<Shfl>),
    /// Vote, its predicate, whether that is negated, members.
    Vote(Vote, P, bool, R),
    MatchAny(R, Reg, R),
    MatchAll(R, Option<P>, Reg, R),
    Redux(AtomOp, bool, R, R, R),
    ActiveMask(R),
    ElectSync(R, P, R),
    LdMatrix(Vec<R>, Addr, bool),
    StMatrix(Vec<R>, Addr, bool),
    MovMatrix(R, R),
    Mma(Box<Mma>),
    Wgmma(Box<Wgmma>),
    WgmmaCommit,
    WgmmaWait(u32),
    CpAsync(Box<CpAsync>),
    CpCommit,
    CpWait(u32),
    Bulk(Box<Bulk>),
    BulkCommit,
    BulkWait(u32),
    MBarrier(Box<MBarrier>),
    /// `setmaxnreg`: whether a warp waits for more registers, and how many a thread then has.
    Registers(bool, u32),
    /// Must be reached by whole warps, and does nothing here (`wgmma.fence`).
    AlignedNothing,
    /// What was written to shared memory becomes known to bulk copies and wgmma.
    ProxyFence,
    /// Lets others go first (`nanosleep`).
    Yield,
    Nothing,
}

/// An instruction and where it stands.
pub(crate) struct Ins {
    pub(crate) op: Op,
    /// Predicate and whether it is negated.
    pub(crate) guard: Option<(P, bool)>,
    pub(crate) line: u32,
    pub(crate) text: Box<str>,
}
