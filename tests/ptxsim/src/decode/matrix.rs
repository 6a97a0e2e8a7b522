//! Names of the instructions that move and multiply matrices.

use super::{Name, Result, immediate, mem};
use crate::ins::{Mma, MmaKind, Op, Reg, WgA, Wgmma};
use crate::parse::{Operand, Parser};

pub(super) fn decode(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Op> {
    let unknown = || format!("unknown instruction {}", n.parts.join("."));
    match n.parts[0] {
        "ldmatrix" | "stmatrix" => {
            let count = [("x1", 1), ("x2", 2), ("x4", 4)].iter().find(|(x, _)| n.has(x)).ok_or_else(unknown)?.1;
            if !n.has("b16") || o.len() != 2 {
                return Err(unknown());
            }
            let load = n.parts[0] == "ldmatrix";
            let (regs, at) = if load { (&o[0], &o[1]) } else { (&o[1], &o[0]) };
            let regs = k.rs(regs)?;
            if regs.len() != count {
                return Err(format!("{count} registers are needed"));
            }
            let (at, trans) = (mem(at)?, n.has("trans"));
            Ok(if load { Op::LdMatrix(regs, at, trans) } else { Op::StMatrix(regs, at, trans) })
        }
        "movmatrix" if n.has("trans") && o.len() == 2 => Ok(Op::MovMatrix(k.r(&o[0])?, k.r(&o[1])?)),
        "mma" if o.len() == 4 => mma(k, n, o).and_then(|m| m.ok_or_else(unknown)),
        "wgmma" if n.has("fence") => Ok(Op::AlignedNothing),
        "wgmma" if n.has("commit_group") => Ok(Op::WgmmaCommit),
        "wgmma" if n.has("wait_group") && o.len() == 1 => Ok(Op::WgmmaWait(immediate(&o[0])? as u32)),
        "wgmma" if n.has("mma_async") => wgmma(k, n, o).and_then(|m| m.ok_or_else(unknown)),
        _ => Err(unknown()),
    }
}

fn kind(n: &Name<'_>) -> Option<MmaKind> {
    let kinds = [("bf16", MmaKind::Bf16), ("f16", MmaKind::F16), ("tf32", MmaKind::Tf32)];
    // Operand types stand after the type of the result, which may be f16 itself.
    let inputs = n.parts.iter().rev().take(3).collect::<Vec<_>>();
    kinds.iter().find(|(name, _)| inputs.iter().any(|p| **p == *name)).map(|(_, kind)| *kind)
}

fn mma(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Option<Op>> {
    let Some(kind) = kind(n) else { return Ok(None) };
    let depth = [("m16n8k16", 16), ("m16n8k8", 8), ("m16n8k4", 4)].iter().find(|(s, _)| n.has(s)).map(|s| s.1);
    let Some(depth) = depth.filter(|_| n.has("row") && n.has("col")) else { return Ok(None) };
    let legal = if kind == MmaKind::Tf32 { depth <= 8 } else { depth >= 8 };
    if !legal || n.has("sp") {
        return Ok(None);
    }
    let wide = n.has("f32");
    let (d, a, b, c) = (k.rs(&o[0])?, k.rs(&o[1])?, k.rs(&o[2])?, k.rs(&o[3])?);
    // Every lane holds a 32nd of each matrix.
    let per = if kind == MmaKind::Tf32 { 1 } else { 2 };
    let sums = if wide { 4 } else { 2 };
    for (name, have, need) in [
        ("d", d.len(), sums),
        ("a", a.len(), 16 * depth / 32 / per),
        ("b", b.len(), 8 * depth / 32 / per),
        ("c", c.len(), sums),
    ] {
        if have != need {
            return Err(format!("{need} registers are needed for {name}"));
        }
    }
    Ok(Some(Op::Mma(Box::new(Mma { kind, k: depth, wide, d, a, b, c }))))
}

fn wgmma(k: &mut Parser<'_>, n: &Name<'_>, o: &[Operand]) -> Result<Option<Op>> {
    let shape = n.parts.iter().find_map(|p| p.strip_prefix("m64n")?.split_once('k'));
    let Some((columns, depth)) = shape.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?))) else {
        return Ok(None);
    };
    let Some(kind) = kind(n) else { return Ok(None) };
    let legal = if kind == MmaKind::Tf32 { depth == 8 } else { depth == 16 };
    if !legal || !n.has("f32") || columns % 8 != 0 || columns > 256 || n.has("sp") {
        return Ok(None);
    }
    let d = k.rs(&o[0])?;
    if d.len() != columns / 2 {
        return Err(format!("{} registers are needed for d", columns / 2));
    }
    let a = match &o[1] {
        Operand::List(_) => WgA::Registers(k.rs(&o[1])?),
        a => WgA::Descriptor(k.d(a)?),
    };
    let from_registers = matches!(a, WgA::Registers(_));
    let transposes = if kind == MmaKind::Tf32 {
        0
    } else if from_registers {
        1
    } else {
        2
    };
    if o.len() != 6 + transposes {
        return Err(format!("{} operands are needed", 6 + transposes));
    }
    let keep = match &o[3] {
        Operand::Reg(Reg::Pred(p)) => Ok(*p),
        v => Err(immediate(v)? & 1 == 1),
    };
    let scale = |o: &Operand| immediate(o).map(|v| if v as i64 == -1 { -1.0 } else { 1.0 });
    let trans = |at: usize| o.get(at).map_or(Ok(false), |v| immediate(v).map(|v| v & 1 == 1));
    let (trans_a, trans_b) = if from_registers { (false, trans(6)?) } else { (trans(6)?, trans(7)?) };
    let (scale_a, scale_b) = (scale(&o[4])?, scale(&o[5])?);
    let b = k.d(&o[2])?;
    Ok(Some(Op::Wgmma(Box::new(Wgmma {
        kind,
        n: columns,
        k: depth,
        d,
        a,
        b,
        keep,
        scale_a,
        scale_b,
        trans_a,
        trans_b,
    }))))
}
