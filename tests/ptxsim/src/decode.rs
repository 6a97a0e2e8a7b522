//! Instruction names and operands to operations.

mod asynchronous;
mod matrix;

use crate::alu;
use crate::compare;
use crate::convert::{self, Convert};
use crate::ins::{Access, Addr, Atom, AtomOp, D, Logic, Op, P, Pure, R, Reg, SetP, Shfl, ShflMode, Space, Ty, Vote};
use crate::parse::{CONST, Operand, Parser};

/// First address of shared memory in generic addresses.
pub(crate) const SHARED: u64 = 0x7f0 << 36;
/// First address of parameters in generic addresses.
pub(crate) const PARAM: u64 = 0x7e0 << 36;
/// First address of local memory in generic addresses.
pub(crate) const LOCAL: u64 = 0x7d0 << 36;

type Result<T> = std::result::Result<T, String>;

/// The parts of an instruction's name.
struct Name<'a> {
    parts: Vec<&'a str>,
}

impl<'a> Name<'a> {
    fn has(&self, part: &str) -> bool {
        self.parts[1..].contains(&part)
    }

    /// Types in the order of the name.
    fn types(&self) -> impl Iterator<Item = Ty> {
        self.parts[1..].iter().filter_map(|p| Ty::parse(p))
    }

    fn ty(&self) -> Result<Ty> {
        self.types().next().ok_or_else(|| "no type".into())
    }

    fn space(&self) -> Space {
        let spaces = [
            ("global", Space::Global),
            ("shared", Space::Shared),
            ("local", Space::Local),
            ("param", Space::Param),
            ("const", Space::Const),
        ];
        let base = |p: &&str| p.split("::").next().map(str::to_string);
        let named = |p: &str| spaces.iter().find(|(n, _)| *n == p).map(|(_, s)| *s);
        self.parts[1..].iter().filter_map(base).find_map(|p| named(&p)).unwrap_or(Space::Generic)
    }
}

impl Parser<'_> {
    pub(crate) fn r(&mut self, o: &Operand) -> Result<R> {
        match o {
            Operand::Reg(Reg::Narrow(r)) => Ok(*r),
            Operand::Immediate(v) => Ok(self.constant(*v as u32)),
            Operand::Sink => Ok(R(0)),
            o => Err(format!("a register of at most 32 bits is needed, not {o:?}")),
        }
    }

    pub(crate) fn d(&mut self, o: &Operand) -> Result<D> {
        match o {
            Operand::Reg(Reg::Wide(d)) => Ok(*d),
            Operand::Immediate(v) => Ok(self.wide_constant(*v)),
            Operand::Sink => Ok(D(0)),
            o => Err(format!("a 64-bit register is needed, not {o:?}")),
        }
    }

    fn p(&self, o: &Operand) -> Result<P> {
        match o {
            Operand::Reg(Reg::Pred(p)) => Ok(*p),
            Operand::Sink => Ok(P(0)),
            o => Err(format!("a predicate is needed, not {o:?}")),
        }
    }

    /// A register of the width of `ty`, or a constant in one.
    fn value(&mut self, o: &Operand, ty: Ty) -> Result<Reg> {
        match o {
            Operand::Reg(r) => Ok(*r),
            _ if ty.bytes() == 8 => Ok(Reg::Wide(self.d(o)?)),
            _ => Ok(Reg::Narrow(self.r(o)?)),
        }
    }

    fn rs(&mut self, o: &Operand) -> Result<Vec<R>> {
        match o {
            Operand::List(list) => list.iter().map(|o| self.r(o)).collect(),
            o => Ok(vec![self.r(o)?]),
        }
    }
}

fn mem(o: &Operand) -> Result<Addr> {
    match o {
        Operand::Mem(a) => Ok(*a),
        o => Err(format!("an address is needed, not {o:?}")),
    }
}

fn immediate(o: &Operand) -> Result<u64> {
    match o {
        Operand::Immediate(v) => Ok(*v),
        o => Err(format!("a constant is needed, not {o:?}")),
    }
}

/// The operation of one instruction.
pub(crate) fn decode(k: &mut Parser<'_>, name: &str, o: &[Operand]) -> Result<Op> {
    let n = Name { parts: name.split('.').collect() };
    // Constants of 16 bits may be written as negative numbers, and registers are kept zero-extended.
    let short = n.types().last().is_some_and(|t| matches!(t, Ty::U16 | Ty::S16));
    let masked: Vec<Operand>;
    let o = if short {
        let mask = |o: &Operand| if let Operand::Immediate(v) = o { Operand::Immediate(v & 0xffff) } else { o.clone() };
        masked = o.iter().map(mask).collect();
        &masked[..]
    } else {
        o
    };
    let arity = |least: usize| if o.len() < least { Err(format!("{least} operands are needed")) } else { Ok(()) };
    let unknown = || Err(format!("unknown instruction {name}"));
    match n.parts[0] {
        "ret" | "exit" => Ok(Op::Exit),
        "trap" | "brkpt" => Ok(Op::Trap),
        "fence" if n.has("proxy") && n.parts.iter().any(|p| p.starts_with("async")) => Ok(Op::ProxyFence),
        "membar" | "fence" | "prefetch" | "prefetchu" | "griddepcontrol" | "applypriority" | "discard" | "pmevent" => {
            Ok(Op::Nothing)
        }
        "nanosleep" => Ok(Op::Yield),
        "setmaxnreg" if o.len() == 1 => Ok(Op::Registers(n.has("inc"), immediate(&o[0])? as u32)),
        "bar" | "barrier" => barrier(k, &n, o),
        "activemask" => arity(1).and_then(|()| Ok(Op::ActiveMask(k.r(&o[0])?))),
        "elect" => match (o, o.first()) {
            ([_, members], Some(Operand::Pair(to, p))) => Ok(Op::ElectSync(k.r(to)?, k.p(p)?, k.r(members)?)),
            _ => unknown(),
        },
        "ld" | "ldu" | "st" => arity(2).and_then(|()| access(k, &n, o)),
        "atom" | "red" => arity(2).and_then(|()| atom(k, &n, o)),
        "setp" => arity(3).and_then(|()| setp(k, &n, o)),
        "set" => arity(3).and_then(|()| {
            let (to, from) = (n.ty()?, n.types().nth(1).ok_or("two types are needed")?);
            let ones = if to.float() { 1f32.to_bits() } else { u32::MAX };
            match compare::select(n.parts[1], from) {
                Some(Pure::Compare(f)) => Ok(Op::Set(f, k.r(&o[0])?, k.r(&o[1])?, k.r(&o[2])?, ones)),
                _ => Err("comparison".into()),
            }
        }),
        "selp" => arity(4).and_then(|()| {
            let p = k.p(&o[3])?;
            Ok(if n.ty()?.bytes() == 8 {
                Op::SelectWide(k.d(&o[0])?, k.d(&o[1])?, k.d(&o[2])?, p)
            } else {
                Op::Select(k.r(&o[0])?, k.r(&o[1])?, k.r(&o[2])?, p)
            })
        }),
        "cvta" => arity(2).and_then(|()| cvta(k, &n, o)),
        "isspacep" => unknown(),
        "cvt" if n.parts.contains(&"pack") => unknown(),
        "cvt" => arity(2).and_then(|()| cvt(k, &n, o)),
        "mov" => arity(2).and_then(|()| mov(k, &n, o)),
        "shfl" => arity(5).and_then(|()| shfl(k, &n, o)),
        "vote" => arity(3).and_then(|()| vote(k, &n, o)),
        "match" => arity(3).and_then(|()| {
            let ty = n.ty()?;
            let (value, members) = (k.value(&o[1], ty)?, k.r(&o[2])?);
            Ok(match &o[0] {
                _ if n.has("any") => Op::MatchAny(k.r(&o[0])?, value, members),
                Operand::Pair(to, p) => Op::MatchAll(k.r(to)?, Some(k.p(p)?), value, members),
                to => Op::MatchAll(k.r(to)?, None, value, members),
            })
        }),
        "redux" => arity(3).and_then(|()| {
            let ty = n.ty()?;
            if ty.float() {
                return unknown();
            }
            let op = atom_op(&n).ok_or("operation")?;
            Ok(Op::Redux(op, ty.signed(), k.r(&o[0])?, k.r(&o[1])?, k.r(&o[2])?))
        }),
        "ldmatrix" | "stmatrix" | "movmatrix" | "mma" | "wgmma" => matrix::decode(k, &n, o),
        "cp" | "mbarrier" => asynchronous::decode(k, &n, o),
        "and" | "or" | "xor" if n.ty()? == Ty::Pred => arity(3).and_then(|()| {
            let logic = match n.parts[0] {
                "and" => Logic::And,
                "or" => Logic::Or,
                _ => Logic::Xor,
            };
            Ok(Op::Logic(logic, k.p(&o[0])?, k.p(&o[1])?, k.p(&o[2])?))
        }),
        "not" if n.ty()? == Ty::Pred => arity(2).and_then(|()| Ok(Op::Not(k.p(&o[0])?, k.p(&o[1])?))),
        op => {
            let ty = n.types().last().ok_or_else(|| format!("unknown instruction {name}"))?;
            let f = alu::select(op, ty, &|m| n.has(m)).ok_or_else(|| format!("unknown instruction {name}"))?;
            pure(k, f, op, ty, o)
        }
    }
}

fn pure(k: &mut Parser<'_>, f: Pure, op: &str, ty: Ty, o: &[Operand]) -> Result<Op> {
    let operands = match f {
        Pure::A1(_) | Pure::W1(_) | Pure::Narrow(_) | Pure::Widen(_) => 2,
        Pure::A3(_) | Pure::W3(_) | Pure::MadWide(_) => 4,
        Pure::A4(_) => 5,
        _ => 3,
    };
    if o.len() != operands {
        return Err(format!("{operands} operands are needed"));
    }
    let divides = matches!(op, "div" | "rem") && !ty.float();
    Ok(match f {
        Pure::A1(f) => Op::A1(f, k.r(&o[0])?, k.r(&o[1])?),
        Pure::A2(f) if divides => Op::Div(f, k.r(&o[0])?, k.r(&o[1])?, k.r(&o[2])?),
        Pure::A2(f) => Op::A2(f, k.r(&o[0])?, k.r(&o[1])?, k.r(&o[2])?),
        Pure::A3(f) => Op::A3(f, k.r(&o[0])?, k.r(&o[1])?, k.r(&o[2])?, k.r(&o[3])?),
        Pure::A4(f) => Op::A4(f, k.r(&o[0])?, [k.r(&o[1])?, k.r(&o[2])?, k.r(&o[3])?, k.r(&o[4])?]),
        Pure::W1(f) => Op::W1(f, k.d(&o[0])?, k.d(&o[1])?),
        Pure::W2(f) if divides => Op::DivWide(f, k.d(&o[0])?, k.d(&o[1])?, k.d(&o[2])?),
        Pure::W2(f) => Op::W2(f, k.d(&o[0])?, k.d(&o[1])?, k.d(&o[2])?),
        Pure::W3(f) => Op::W3(f, k.d(&o[0])?, k.d(&o[1])?, k.d(&o[2])?, k.d(&o[3])?),
        Pure::Narrow(f) => Op::Narrow(f, k.r(&o[0])?, k.d(&o[1])?),
        Pure::Widen(f) => Op::Widen(f, k.d(&o[0])?, k.r(&o[1])?),
        Pure::MulWide(f) => Op::MulWide(f, k.d(&o[0])?, k.r(&o[1])?, k.r(&o[2])?),
        Pure::MadWide(f) => Op::MadWide(f, k.d(&o[0])?, k.r(&o[1])?, k.r(&o[2])?, k.d(&o[3])?),
        Pure::ShiftWide(f) => Op::ShiftWide(f, k.d(&o[0])?, k.d(&o[1])?, k.r(&o[2])?),
        Pure::Compare(_) | Pure::CompareWide(_) => return Err("a comparison is no value".into()),
    })
}

fn barrier(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    if n.has("warp") {
        return Ok(Op::SyncWarp(k.r(&o[0])?));
    }
    if n.has("red") || n.has("cluster") || o.is_empty() {
        return Err(format!("unknown instruction {}", n.parts.join(".")));
    }
    let count = o.get(1).map(|c| k.r(c)).transpose()?;
    Ok(Op::Barrier(k.r(&o[0])?, count, n.has("sync")))
}

fn access(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let store = n.parts[0] == "st";
    if n.has("async") {
        return Err("st.async is not supported".into());
    }
    let (at, values) = if store { (&o[0], &o[1]) } else { (&o[1], &o[0]) };
    let ty = n.ty()?;
    let regs = match values {
        Operand::List(list) => list.iter().map(|v| k.value(v, ty)).collect::<Result<Vec<_>>>()?,
        v => vec![k.value(v, ty)?],
    };
    let vector = [("v2", 2), ("v4", 4), ("v8", 8)].iter().find(|(v, _)| n.has(v)).map_or(1, |v| v.1);
    if regs.len() != vector || ty.bytes() * vector > 32 {
        return Err(format!("{vector} values are needed"));
    }
    let access = Box::new(Access { space: n.space(), ty, addr: mem(at)?, regs });
    Ok(if store { Op::Store(access) } else { Op::Load(access) })
}

fn atom_op(n: &Name<'_>) -> Option<AtomOp> {
    let ops = [
        ("add", AtomOp::Add),
        ("min", AtomOp::Min),
        ("max", AtomOp::Max),
        ("and", AtomOp::And),
        ("or", AtomOp::Or),
        ("xor", AtomOp::Xor),
        ("exch", AtomOp::Exch),
        ("cas", AtomOp::Cas),
        ("inc", AtomOp::Inc),
        ("dec", AtomOp::Dec),
    ];
    ops.iter().find(|(name, _)| n.has(name)).map(|(_, op)| *op)
}

fn atom(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let op = atom_op(n).ok_or("unknown atomic")?;
    let ty = n.types().last().ok_or("no type")?;
    if ty.float() {
        return Ok(Op::FloatAtomic);
    }
    if ty.bytes() < 4 {
        return Err("atomics of 16 bits are not supported".into());
    }
    // `atom` has the old value's register in front.
    let (to, o) = if n.parts[0] == "red" { (None, o) } else { (Some(k.value(&o[0], ty)?), &o[1..]) };
    let operands = if op == AtomOp::Cas { 3 } else { 2 };
    if o.len() != operands {
        return Err(format!("{operands} operands are needed"));
    }
    let swap = if op == AtomOp::Cas { Some(k.value(&o[2], ty)?) } else { None };
    let (addr, value) = (mem(&o[0])?, k.value(&o[1], ty)?);
    Ok(Op::Atom(Box::new(Atom { op, space: n.space(), ty, to, addr, value, swap })))
}

fn setp(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let (to, other) = match &o[0] {
        Operand::Pair(a, b) => (k.p(a)?, Some(k.p(b)?)),
        a => (k.p(a)?, None),
    };
    let with = match o.get(3) {
        None => None,
        Some(c) => {
            let logic = [("and", Logic::And), ("or", Logic::Or), ("xor", Logic::Xor)];
            let logic = logic.iter().find(|(name, _)| n.has(name)).ok_or("setp with four operands")?.1;
            Some(match c {
                Operand::Negated(p) => (logic, *p, true),
                c => (logic, k.p(c)?, false),
            })
        }
    };
    let ty = n.types().last().ok_or("no type")?;
    let set = Box::new(SetP { to, other, with });
    match compare::select(n.parts[1], ty).ok_or("unknown comparison")? {
        Pure::Compare(f) => Ok(Op::Compare(f, k.r(&o[1])?, k.r(&o[2])?, set)),
        Pure::CompareWide(f) => Ok(Op::CompareWide(f, k.d(&o[1])?, k.d(&o[2])?, set)),
        _ => Err("unknown comparison".into()),
    }
}

/// Shared, local, parameter and constant memory are windows of the generic addresses; global memory is all the rest.
fn cvta(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let to = n.has("to");
    let window = match n.space() {
        Space::Shared => SHARED,
        Space::Local => LOCAL,
        Space::Param => PARAM,
        Space::Const => CONST,
        _ => 0,
    };
    let window = if to { window.wrapping_neg() } else { window };
    if n.ty()?.bytes() != 8 {
        return Err("addresses of 32 bits are not supported".into());
    }
    let add: fn(&[u64; 32], &[u64; 32]) -> [u64; 32] = |a, b| crate::ins::each(|i| a[i].wrapping_add(b[i]));
    Ok(Op::W2(add, k.d(&o[0])?, k.d(&o[1])?, k.wide_constant(window)))
}

fn cvt(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let types: Vec<Ty> = n.types().collect();
    let [to, from] = types[..] else { return Err("cvt needs two types".into()) };
    let has = |m: &str| n.has(m);
    if matches!(to, Ty::F16x2 | Ty::Bf16x2) {
        if o.len() != 3 || from != Ty::F32 {
            return Err("cvt to pairs is known from two f32".into());
        }
        return pure(k, convert::pack(to, &has).ok_or("rounding of cvt")?, "cvt", to, o);
    }
    let convert = Convert::new(to, from, &has);
    // Operands may be wider than their types, and then decide the function.
    let wide = |r: &Operand| matches!(r, Operand::Reg(Reg::Wide(_)));
    let as_declared = wide(&o[0]) == (to.bytes() == 8) && (wide(&o[1]) == (from.bytes() == 8));
    match convert.fast().filter(|_| as_declared) {
        Some(f) => pure(k, f, "cvt", to, o),
        None => {
            let (to, from) = (k.value(&o[0], to)?, k.value(&o[1], from)?);
            Ok(Op::Convert(Box::new(convert), to, from))
        }
    }
}

fn mov(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    match (&o[0], &o[1]) {
        (Operand::List(to), from) => {
            let to = to.iter().map(|r| k.r(r)).collect::<Result<Vec<_>>>()?;
            Ok(Op::Unpack(to, k.value(from, n.ty()?)?))
        }
        (to, Operand::List(from)) => {
            let from = from.iter().map(|r| k.r(r)).collect::<Result<Vec<_>>>()?;
            Ok(Op::Pack(k.value(to, n.ty()?)?, from))
        }
        (Operand::Reg(Reg::Pred(to)), Operand::Reg(Reg::Pred(from))) => Ok(Op::Logic(Logic::And, *to, *from, *from)),
        (Operand::Reg(Reg::Pred(to)), Operand::Immediate(v)) => {
            // A predicate minus itself is false, and its negation true.
            Ok(if *v & 1 == 0 { Op::Logic(Logic::Xor, *to, P(0), P(0)) } else { Op::SetTrue(*to) })
        }
        (Operand::Reg(Reg::Wide(to)), from) => Ok(Op::W1(|a| *a, *to, k.d(from)?)),
        (to, from) => Ok(Op::A1(|a| *a, k.r(to)?, k.r(from)?)),
    }
}

fn shfl(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let modes = [("up", ShflMode::Up), ("down", ShflMode::Down), ("bfly", ShflMode::Bfly), ("idx", ShflMode::Idx)];
    let mode = modes.iter().find(|(m, _)| n.has(m)).ok_or("mode of shfl")?.1;
    let (to, valid) = match &o[0] {
        Operand::Pair(a, b) => (k.r(a)?, Some(k.p(b)?)),
        a => (k.r(a)?, None),
    };
    let (value, lane, clamp, members) = (k.r(&o[1])?, k.r(&o[2])?, k.r(&o[3])?, k.r(&o[4])?);
    Ok(Op::Shfl(Box::new(Shfl { mode, to, valid, value, lane, clamp, members })))
}

fn vote(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let (p, negated) = match &o[1] {
        Operand::Negated(p) => (*p, true),
        p => (k.p(p)?, false),
    };
    let vote = match n.parts.get(2) {
        Some(&"ballot") => Vote::Ballot(k.r(&o[0])?),
        Some(&"all") => Vote::All(k.p(&o[0])?),
        Some(&"any") => Vote::Any(k.p(&o[0])?),
        Some(&"uni") => Vote::Uni(k.p(&o[0])?),
        _ => return Err("mode of vote".into()),
    };
    Ok(Op::Vote(vote, p, negated, k.r(&o[2])?))
}
