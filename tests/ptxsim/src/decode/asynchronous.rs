//! Names of copies that run on their own, and of the barriers that count them.

use super::{Name, Result, immediate, mem};
use crate::ins::{Addr, Bulk, CpAsync, MBarrier, Op, Reg};
use crate::parse::{Operand, Parser};

pub(super) fn decode(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let unknown = || Err(format!("unknown instruction {}", n.parts.join(".")));
    if n.parts[0] == "mbarrier" {
        return mbarrier(k, n, o);
    }
    if !n.has("async") {
        return unknown();
    }
    if n.has("mbarrier") {
        return Ok(Op::MBarrier(Box::new(MBarrier::CopyArrive { addr: mem(&o[0])?, noinc: n.has("noinc") })));
    }
    let bulk = n.has("bulk");
    match () {
        () if n.has("commit_group") => Ok(if bulk { Op::BulkCommit } else { Op::CpCommit }),
        () if n.has("wait_all") => Ok(Op::CpWait(0)),
        () if n.has("wait_group") && o.len() == 1 => {
            let keep = immediate(&o[0])? as u32;
            Ok(if bulk { Op::BulkWait(keep) } else { Op::CpWait(keep) })
        }
        // A hint that changes nothing.
        () if n.has("prefetch") => Ok(Op::Nothing),
        () if bulk => bulk_copy(k, n, o),
        () if o.len() >= 3 => {
            let size = immediate(&o[2])? as usize;
            if !matches!(size, 4 | 8 | 16) {
                return Err("cp.async copies 4, 8 or 16 bytes".into());
            }
            let cached = n.has("L2::cache_hint");
            let (read, ignore) = match o.get(3).filter(|_| !cached || o.len() > 4) {
                None => (None, None),
                Some(Operand::Reg(Reg::Pred(p))) => (None, Some(*p)),
                Some(v) => (Some(k.r(v)?), None),
            };
            let copy = CpAsync { size, to: mem(&o[0])?, from: mem(&o[1])?, read, ignore };
            Ok(Op::CpAsync(Box::new(copy)))
        }
        () => unknown(),
    }
}

fn tensor(k: &mut Parser<'_>, o: &Operand) -> Result<(Addr, Vec<crate::ins::R>)> {
    match o {
        Operand::Tensor(a, c) => Ok((*a, c.iter().map(|c| k.r(c)).collect::<Result<_>>()?)),
        o => Err(format!("a tensor map with coordinates is needed, not {o:?}")),
    }
}

fn bulk_copy(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    if n.parts.iter().any(|p| p.starts_with("multicast") || *p == "reduce") {
        return Err("multicast and reducing copies are not supported".into());
    }
    let short = || "operands of a bulk copy".to_string();
    let load = n.parts.iter().any(|p| p.starts_with("mbarrier"));
    let mut bulk = Bulk {
        tensor: n.has("tensor"),
        shared: mem(o.get(usize::from(!load)).ok_or_else(short)?)?,
        global: Addr { base: crate::ins::Base::None, offset: 0 },
        coordinates: Vec::new(),
        offsets: Vec::new(),
        im2col: n.has("im2col"),
        size: None,
        barrier: None,
    };
    let global = o.get(usize::from(load)).ok_or_else(short)?;
    if bulk.tensor {
        (bulk.global, bulk.coordinates) = tensor(k, global)?;
        if load {
            bulk.barrier = Some(mem(o.get(2).ok_or_else(short)?)?);
            if let Some(list @ Operand::List(_)) = o.get(3) {
                bulk.offsets = k.rs(list)?;
            }
        }
    } else {
        bulk.global = mem(global)?;
        bulk.size = Some(k.r(o.get(2).ok_or_else(short)?)?);
        if load {
            bulk.barrier = Some(mem(o.get(3).ok_or_else(short)?)?);
        }
    }
    Ok(Op::Bulk(Box::new(bulk)))
}

fn mbarrier(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let need = |i: usize| o.get(i).ok_or_else(|| "operands of an mbarrier".to_string());
    Ok(Op::MBarrier(Box::new(match n.parts[1] {
        "init" => MBarrier::Init { addr: mem(need(0)?)?, count: k.r(need(1)?)? },
        "inval" => MBarrier::Inval { addr: mem(need(0)?)? },
        "arrive" | "arrive_drop" => {
            let to = match need(0)? {
                Operand::Sink => None,
                d => Some(k.d(d)?),
            };
            let value = o.get(2).map(|v| k.r(v)).transpose()?;
            let expects = n.has("expect_tx");
            MBarrier::Arrive {
                addr: mem(need(1)?)?,
                count: value.filter(|_| !expects),
                expect: value.filter(|_| expects),
                drop: n.parts[1] == "arrive_drop",
                to,
            }
        }
        "expect_tx" => MBarrier::ExpectTx { addr: mem(need(0)?)?, bytes: k.r(need(1)?)? },
        "complete_tx" => MBarrier::CompleteTx { addr: mem(need(0)?)?, bytes: k.r(need(1)?)? },
        "try_wait" | "test_wait" => {
            let Operand::Reg(Reg::Pred(to)) = *need(0)? else { return Err("a predicate is needed".into()) };
            let addr = mem(need(1)?)?;
            if n.has("parity") {
                MBarrier::TestParity { to, addr, parity: k.r(need(2)?)? }
            } else {
                MBarrier::TestState { to, addr, state: k.d(need(2)?)? }
            }
        }
        _ => return Err(format!("unknown instruction {}", n.parts.join("."))),
    })))
}
