//! Instructions that read and write registers only. Each is chosen once, at decoding, as a function over all lanes.

use crate::float::{Round, bf16_to_f32, directed, f16_to_f32, f32_to_bf16, f32_to_f16, flush};
use crate::ins::{Pure, Ty, each};

macro_rules! a1 {
    (|$x:ident| $e:expr) => {
        Pure::A1(|a| {
            each(|i| {
                let $x = a[i];
                $e
            })
        })
    };
}
macro_rules! a2 {
    (|$x:ident, $y:ident| $e:expr) => {
        Pure::A2(|a, b| {
            each(|i| {
                let ($x, $y) = (a[i], b[i]);
                $e
            })
        })
    };
}
macro_rules! a3 {
    (|$x:ident, $y:ident, $z:ident| $e:expr) => {
        Pure::A3(|a, b, c| {
            each(|i| {
                let ($x, $y, $z) = (a[i], b[i], c[i]);
                $e
            })
        })
    };
}
macro_rules! w1 {
    (|$x:ident| $e:expr) => {
        Pure::W1(|a| {
            each(|i| {
                let $x = a[i];
                $e
            })
        })
    };
}
macro_rules! w2 {
    (|$x:ident, $y:ident| $e:expr) => {
        Pure::W2(|a, b| {
            each(|i| {
                let ($x, $y) = (a[i], b[i]);
                $e
            })
        })
    };
}
macro_rules! w3 {
    (|$x:ident, $y:ident, $z:ident| $e:expr) => {
        Pure::W3(|a, b, c| {
            each(|i| {
                let ($x, $y, $z) = (a[i], b[i], c[i]);
                $e
            })
        })
    };
}
#[inline]
pub(crate) fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

#[inline]
pub(crate) fn g(x: u64) -> f64 {
    f64::from_bits(x)
}

#[inline]
pub(crate) fn s16(x: u32) -> i32 {
    i32::from(x as i16)
}

/// A function of one f16 (or bf16) value for one register that holds one of them, or two.
macro_rules! half {
    ($pair:expr, $load:ident, $store:ident, |$x:ident| $e:expr) => {
        if $pair {
            a1!(|v| {
                let one = |h: u16| -> u32 {
                    let $x = $load(h);
                    u32::from($store($e))
                };
                one(v as u16) | one((v >> 16) as u16) << 16
            })
        } else {
            a1!(|v| {
                let $x = $load(v as u16);
                u32::from($store($e))
            })
        }
    };
    ($pair:expr, $load:ident, $store:ident, |$x:ident, $y:ident| $e:expr) => {
        if $pair {
            a2!(|v, w| {
                let one = |h: u16, k: u16| -> u32 {
                    let ($x, $y) = ($load(h), $load(k));
                    u32::from($store($e))
                };
                one(v as u16, w as u16) | one((v >> 16) as u16, (w >> 16) as u16) << 16
            })
        } else {
            a2!(|v, w| {
                let ($x, $y) = ($load(v as u16), $load(w as u16));
                u32::from($store($e))
            })
        }
    };
    ($pair:expr, $load:ident, $store:ident, |$x:ident, $y:ident, $z:ident| $e:expr) => {
        if $pair {
            a3!(|v, w, u| {
                let one = |h: u16, k: u16, l: u16| -> u32 {
                    let ($x, $y, $z) = ($load(h), $load(k), $load(l));
                    u32::from($store($e))
                };
                one(v as u16, w as u16, u as u16) | one((v >> 16) as u16, (w >> 16) as u16, (u >> 16) as u16) << 16
            })
        } else {
            a3!(|v, w, u| {
                let ($x, $y, $z) = ($load(v as u16), $load(w as u16), $load(u as u16));
                u32::from($store($e))
            })
        }
    };
}

/// `min` and `max` of PTX: a number wins over a NaN, and -0 is below +0.
#[inline]
pub(crate) fn min(x: f32, y: f32) -> f32 {
    if x.is_nan() && y.is_nan() {
        f32::from_bits(0x7fff_ffff)
    } else if x == 0.0 && y == 0.0 {
        if x.is_sign_negative() { x } else { y }
    } else {
        x.min(y)
    }
}

#[inline]
pub(crate) fn max(x: f32, y: f32) -> f32 {
    -min(-x, -y)
}

#[inline]
fn min_nan(x: f32, y: f32) -> f32 {
    if x.is_nan() || y.is_nan() { f32::from_bits(0x7fff_ffff) } else { min(x, y) }
}

#[inline]
fn max_nan(x: f32, y: f32) -> f32 {
    if x.is_nan() || y.is_nan() { f32::from_bits(0x7fff_ffff) } else { max(x, y) }
}

#[inline]
fn unit(x: f32) -> f32 {
    if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) }
}

/// The exact fused product and sum, rounded once more to f64: enough for formats below half of its digits.
#[inline]
fn fma_f16(x: f32, y: f32, z: f32) -> f32 {
    x.mul_add(y, z)
}

/// `op` of type `ty` with the other parts of its name, or `None`.
pub(crate) fn select(op: &str, ty: Ty, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    match ty {
        Ty::F32 => float(op, has),
        Ty::F64 => double(op, has),
        Ty::F16 | Ty::F16x2 => half_precision(op, ty == Ty::F16x2, has),
        Ty::Bf16 | Ty::Bf16x2 => brain(op, ty == Ty::Bf16x2, has),
        Ty::U16 | Ty::S16 | Ty::U8 | Ty::S8 => short(op, ty, has),
        Ty::U32 | Ty::S32 => word(op, ty == Ty::S32, has),
        Ty::U64 | Ty::S64 => long(op, ty == Ty::S64, has),
        Ty::Pred | Ty::Tf32 => None,
    }
}

fn word(op: &str, signed: bool, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    Some(match op {
        "add" if has("sat") => a2!(|x, y| (x as i32).saturating_add(y as i32) as u32),
        "sub" if has("sat") => a2!(|x, y| (x as i32).saturating_sub(y as i32) as u32),
        "add" => a2!(|x, y| x.wrapping_add(y)),
        "sub" => a2!(|x, y| x.wrapping_sub(y)),
        "mul" if has("wide") && signed => {
            Pure::MulWide(|a, b| each(|i| (i64::from(a[i] as i32) * i64::from(b[i] as i32)) as u64))
        }
        "mul" if has("wide") => Pure::MulWide(|a, b| each(|i| u64::from(a[i]) * u64::from(b[i]))),
        "mad" if has("wide") && signed => Pure::MadWide(|a, b, c| {
            each(|i| ((i64::from(a[i] as i32) * i64::from(b[i] as i32)) as u64).wrapping_add(c[i]))
        }),
        "mad" if has("wide") => {
            Pure::MadWide(|a, b, c| each(|i| (u64::from(a[i]) * u64::from(b[i])).wrapping_add(c[i])))
        }
        "mul" if has("hi") && signed => a2!(|x, y| ((i64::from(x as i32) * i64::from(y as i32)) >> 32) as u32),
        "mul" if has("hi") => a2!(|x, y| ((u64::from(x) * u64::from(y)) >> 32) as u32),
        "mul" => a2!(|x, y| x.wrapping_mul(y)),
        "mad" if has("hi") && signed => {
            a3!(|x, y, z| (((i64::from(x as i32) * i64::from(y as i32)) >> 32) as u32).wrapping_add(z))
        }
        "mad" if has("hi") => a3!(|x, y, z| (((u64::from(x) * u64::from(y)) >> 32) as u32).wrapping_add(z)),
        "mad" => a3!(|x, y, z| x.wrapping_mul(y).wrapping_add(z)),
        "mul24" | "mad24" => return None,
        "sad" if signed => a3!(|x, y, z| (x as i32).abs_diff(y as i32).wrapping_add(z)),
        "sad" => a3!(|x, y, z| x.abs_diff(y).wrapping_add(z)),
        "div" if signed => a2!(|x, y| (x as i32).checked_div(y as i32).unwrap_or(x as i32) as u32),
        "div" => a2!(|x, y| x.checked_div(y).unwrap_or(0)),
        "rem" if signed => a2!(|x, y| (x as i32).checked_rem(y as i32).unwrap_or(0) as u32),
        "rem" => a2!(|x, y| x.checked_rem(y).unwrap_or(0)),
        "min" if signed => a2!(|x, y| (x as i32).min(y as i32) as u32),
        "min" => a2!(|x, y| x.min(y)),
        "max" if signed && has("relu") => a2!(|x, y| (x as i32).max(y as i32).max(0) as u32),
        "max" if signed => a2!(|x, y| (x as i32).max(y as i32) as u32),
        "max" => a2!(|x, y| x.max(y)),
        "neg" => a1!(|x| x.wrapping_neg()),
        "abs" => a1!(|x| (x as i32).wrapping_abs() as u32),
        "and" => a2!(|x, y| x & y),
        "or" => a2!(|x, y| x | y),
        "xor" => a2!(|x, y| x ^ y),
        "not" => a1!(|x| !x),
        "cnot" => a1!(|x| u32::from(x == 0)),
        "shl" => a2!(|x, y| x.checked_shl(y).unwrap_or(0)),
        "shr" if signed => a2!(|x, y| ((x as i32) >> y.min(31)) as u32),
        "shr" => a2!(|x, y| x.checked_shr(y).unwrap_or(0)),
        "popc" => a1!(|x| x.count_ones()),
        "clz" => a1!(|x| x.leading_zeros()),
        "brev" => a1!(|x| x.reverse_bits()),
        "bfind" if has("shiftamt") && !signed => a1!(|x| if x == 0 { u32::MAX } else { x.leading_zeros() }),
        "bfind" if has("shiftamt") => return None,
        "bfind" if signed => {
            a1!(|x| {
                let v = if (x as i32) < 0 { !x } else { x };
                v.checked_ilog2().unwrap_or(u32::MAX)
            })
        }
        "bfind" => a1!(|x| x.checked_ilog2().unwrap_or(u32::MAX)),
        "bfe" if signed => a3!(|x, p, n| bfe_signed(u64::from(x), p, n, 32) as u32),
        "bfe" => a3!(|x, p, n| bfe(u64::from(x), p, n, 32) as u32),
        "bfi" => Pure::A4(|a, b, c, d| each(|i| bfi(u64::from(a[i]), u64::from(b[i]), c[i], d[i], 32) as u32)),
        "lop3" => Pure::A4(|a, b, c, d| each(|i| lop3(a[i], b[i], c[i], d[i]))),
        "prmt" => permute(has)?,
        "shf" if has("l") && has("wrap") => a3!(|x, y, n| (pair(x, y) << (n & 31) >> 32) as u32),
        "shf" if has("l") => a3!(|x, y, n| ((u128::from(pair(x, y)) << n.min(32)) >> 32) as u32),
        "shf" if has("wrap") => a3!(|x, y, n| (pair(x, y) >> (n & 31)) as u32),
        "shf" => a3!(|x, y, n| (pair(x, y) >> n.min(32)) as u32),
        "fns" | "dp4a" | "dp2a" => return dot(op, signed, has),
        "mov" => a1!(|x| x),
        _ => return None,
    })
}

fn dot(op: &str, signed: bool, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    // Both operands of one signedness: the only forms there are names for here.
    let mixed = has("u32") && has("s32");
    Some(match op {
        "dp4a" if signed && !mixed => {
            a3!(|x, y, z| (0..4).fold(z, |s, j| {
                let (p, q) = ((x >> (8 * j)) as i8, (y >> (8 * j)) as i8);
                s.wrapping_add((i32::from(p) * i32::from(q)) as u32)
            }))
        }
        "dp4a" if !mixed => {
            a3!(|x, y, z| (0..4).fold(z, |s, j| s.wrapping_add(((x >> (8 * j)) & 255) * ((y >> (8 * j)) & 255))))
        }
        _ => return None,
    })
}

#[inline]
fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[inline]
fn lop3(x: u32, y: u32, z: u32, table: u32) -> u32 {
    let mut out = 0;
    for k in 0..8 {
        if table >> k & 1 == 1 {
            let pick = |v: u32, bit: u32| if k >> bit & 1 == 1 { v } else { !v };
            out |= pick(x, 2) & pick(y, 1) & pick(z, 0);
        }
    }
    out
}

#[inline]
fn bfe(x: u64, position: u32, length: u32, width: u32) -> u64 {
    let (p, n) = (position & 255, length & 255);
    if n == 0 || p >= width {
        return 0;
    }
    let v = x >> p;
    if n >= 64 { v } else { v & ((1 << n) - 1) }
}

#[inline]
fn bfe_signed(x: u64, position: u32, length: u32, width: u32) -> u64 {
    let (p, n) = (position & 255, length & 255);
    if n == 0 {
        return 0;
    }
    let top = (p + n - 1).min(width - 1);
    let sign = if x >> top & 1 == 1 { u64::MAX } else { 0 };
    let kept = (top + 1).saturating_sub(p);
    let v = bfe(x, position, kept, width);
    if kept >= 64 { v } else { v | sign << kept }
}

#[inline]
fn bfi(from: u64, into: u64, position: u32, length: u32, width: u32) -> u64 {
    let (p, n) = (position & 255, length & 255);
    if n == 0 || p >= width {
        return into;
    }
    let ones = if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    into & !(ones << p) | (from & ones) << p
}

fn permute(has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    if ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"].iter().any(|m| has(m)) {
        return None;
    }
    Some(a3!(|x, y, s| {
        let bytes = pair(x, y).to_le_bytes();
        let mut out = 0;
        for j in 0..4 {
            let sel = s >> (4 * j) & 15;
            let mut b = bytes[(sel & 7) as usize];
            if sel & 8 != 0 {
                b = if b & 0x80 != 0 { 0xff } else { 0 };
            }
            out |= u32::from(b) << (8 * j);
        }
        out
    }))
}

fn short(op: &str, ty: Ty, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    let signed = ty.signed();
    if ty.bytes() == 1 && op != "mov" {
        return None;
    }
    Some(match op {
        "add" => a2!(|x, y| x.wrapping_add(y) & 0xffff),
        "sub" => a2!(|x, y| x.wrapping_sub(y) & 0xffff),
        "mul" if has("wide") && signed => a2!(|x, y| (s16(x) * s16(y)) as u32),
        "mul" if has("wide") => a2!(|x, y| x.wrapping_mul(y)),
        "mad" if has("wide") && signed => a3!(|x, y, z| ((s16(x) * s16(y)) as u32).wrapping_add(z)),
        "mad" if has("wide") => a3!(|x, y, z| x.wrapping_mul(y).wrapping_add(z)),
        "mul" if has("hi") && signed => a2!(|x, y| ((s16(x) * s16(y)) >> 16) as u32 & 0xffff),
        "mul" if has("hi") => a2!(|x, y| x.wrapping_mul(y) >> 16),
        "mul" => a2!(|x, y| x.wrapping_mul(y) & 0xffff),
        "mad" => a3!(|x, y, z| x.wrapping_mul(y).wrapping_add(z) & 0xffff),
        "div" if signed => a2!(|x, y| s16(x).checked_div(s16(y)).unwrap_or(0) as u32 & 0xffff),
        "div" => a2!(|x, y| x.checked_div(y).unwrap_or(0)),
        "rem" if signed => a2!(|x, y| s16(x).checked_rem(s16(y)).unwrap_or(0) as u32 & 0xffff),
        "rem" => a2!(|x, y| x.checked_rem(y).unwrap_or(0)),
        "min" if signed => a2!(|x, y| s16(x).min(s16(y)) as u32 & 0xffff),
        "min" => a2!(|x, y| x.min(y)),
        "max" if signed => a2!(|x, y| s16(x).max(s16(y)) as u32 & 0xffff),
        "max" => a2!(|x, y| x.max(y)),
        "neg" => a1!(|x| x.wrapping_neg() & 0xffff),
        "abs" => a1!(|x| s16(x).unsigned_abs() & 0xffff),
        "and" => a2!(|x, y| x & y),
        "or" => a2!(|x, y| x | y),
        "xor" => a2!(|x, y| x ^ y),
        "not" => a1!(|x| !x & 0xffff),
        "shl" => a2!(|x, y| x.checked_shl(y).unwrap_or(0) & 0xffff),
        "shr" if signed => a2!(|x, y| (s16(x) >> y.min(31)) as u32 & 0xffff),
        "shr" => a2!(|x, y| x.checked_shr(y).unwrap_or(0)),
        "mov" => a1!(|x| x),
        _ => return None,
    })
}

fn long(op: &str, signed: bool, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    Some(match op {
        "add" => w2!(|x, y| x.wrapping_add(y)),
        "sub" => w2!(|x, y| x.wrapping_sub(y)),
        "mul" if has("hi") && signed => w2!(|x, y| ((i128::from(x as i64) * i128::from(y as i64)) >> 64) as u64),
        "mul" if has("hi") => w2!(|x, y| ((u128::from(x) * u128::from(y)) >> 64) as u64),
        "mul" => w2!(|x, y| x.wrapping_mul(y)),
        "mad" if !has("hi") => w3!(|x, y, z| x.wrapping_mul(y).wrapping_add(z)),
        "div" if signed => w2!(|x, y| (x as i64).checked_div(y as i64).unwrap_or(x as i64) as u64),
        "div" => w2!(|x, y| x.checked_div(y).unwrap_or(0)),
        "rem" if signed => w2!(|x, y| (x as i64).checked_rem(y as i64).unwrap_or(0) as u64),
        "rem" => w2!(|x, y| x.checked_rem(y).unwrap_or(0)),
        "min" if signed => w2!(|x, y| (x as i64).min(y as i64) as u64),
        "min" => w2!(|x, y| x.min(y)),
        "max" if signed => w2!(|x, y| (x as i64).max(y as i64) as u64),
        "max" => w2!(|x, y| x.max(y)),
        "neg" => w1!(|x| x.wrapping_neg()),
        "abs" => w1!(|x| (x as i64).wrapping_abs() as u64),
        "and" => w2!(|x, y| x & y),
        "or" => w2!(|x, y| x | y),
        "xor" => w2!(|x, y| x ^ y),
        "not" => w1!(|x| !x),
        "shl" => Pure::ShiftWide(|a, b| each(|i| a[i].checked_shl(b[i]).unwrap_or(0))),
        "shr" if signed => Pure::ShiftWide(|a, b| each(|i| ((a[i] as i64) >> b[i].min(63)) as u64)),
        "shr" => Pure::ShiftWide(|a, b| each(|i| a[i].checked_shr(b[i]).unwrap_or(0))),
        "popc" => Pure::Narrow(|a| each(|i| a[i].count_ones())),
        "clz" => Pure::Narrow(|a| each(|i| a[i].leading_zeros())),
        "brev" => w1!(|x| x.reverse_bits()),
        "mov" => w1!(|x| x),
        _ => return None,
    })
}

fn float(op: &str, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    let (ftz, sat) = (has("ftz"), has("sat"));
    let direction =
        [("rz", Round::Zero), ("rm", Round::Down), ("rp", Round::Up)].iter().find(|d| has(d.0)).map(|d| d.1);
    if let Some(direction) = direction {
        // Sums and products of f32 are exact, or nearly so, in f64; a tie between the two is one bit in 2^29.
        return Some(match (op, direction) {
            ("add", Round::Zero) => a2!(|x, y| directed(f64::from(f(x)) + f64::from(f(y)), Round::Zero).to_bits()),
            ("mul", Round::Zero) => a2!(|x, y| directed(f64::from(f(x)) * f64::from(f(y)), Round::Zero).to_bits()),
            ("mul", Round::Down) => a2!(|x, y| directed(f64::from(f(x)) * f64::from(f(y)), Round::Down).to_bits()),
            ("mul", Round::Up) => a2!(|x, y| directed(f64::from(f(x)) * f64::from(f(y)), Round::Up).to_bits()),
            ("add", Round::Down) => a2!(|x, y| directed(f64::from(f(x)) + f64::from(f(y)), Round::Down).to_bits()),
            ("add", Round::Up) => a2!(|x, y| directed(f64::from(f(x)) + f64::from(f(y)), Round::Up).to_bits()),
            _ => return None,
        });
    }
    Some(match op {
        "add" if sat => a2!(|x, y| unit(f(x) + f(y)).to_bits()),
        "mul" if sat => a2!(|x, y| unit(f(x) * f(y)).to_bits()),
        "fma" | "mad" if sat => a3!(|x, y, z| unit(f(x).mul_add(f(y), f(z))).to_bits()),
        "add" if ftz => a2!(|x, y| flush(flush(f(x)) + flush(f(y))).to_bits()),
        "sub" if ftz => a2!(|x, y| flush(flush(f(x)) - flush(f(y))).to_bits()),
        "mul" if ftz => a2!(|x, y| flush(flush(f(x)) * flush(f(y))).to_bits()),
        "fma" | "mad" if ftz => a3!(|x, y, z| flush(flush(f(x)).mul_add(flush(f(y)), flush(f(z)))).to_bits()),
        "add" => a2!(|x, y| (f(x) + f(y)).to_bits()),
        "sub" if !sat => a2!(|x, y| (f(x) - f(y)).to_bits()),
        "mul" => a2!(|x, y| (f(x) * f(y)).to_bits()),
        "fma" | "mad" => a3!(|x, y, z| f(x).mul_add(f(y), f(z)).to_bits()),
        "div" if ftz => a2!(|x, y| flush(flush(f(x)) / flush(f(y))).to_bits()),
        "div" => a2!(|x, y| (f(x) / f(y)).to_bits()),
        "min" if has("NaN") => a2!(|x, y| min_nan(f(x), f(y)).to_bits()),
        "max" if has("NaN") => a2!(|x, y| max_nan(f(x), f(y)).to_bits()),
        "min" => a2!(|x, y| min(f(x), f(y)).to_bits()),
        "max" => a2!(|x, y| max(f(x), f(y)).to_bits()),
        "neg" => a1!(|x| x ^ 0x8000_0000),
        "abs" => a1!(|x| x & 0x7fff_ffff),
        "copysign" => a2!(|x, y| x & 0x8000_0000 | y & 0x7fff_ffff),
        "rcp" if ftz => a1!(|x| flush(1.0 / flush(f(x))).to_bits()),
        "rcp" => a1!(|x| (1.0 / f(x)).to_bits()),
        "sqrt" if ftz => a1!(|x| flush(f(x)).sqrt().to_bits()),
        "sqrt" => a1!(|x| f(x).sqrt().to_bits()),
        "rsqrt" if ftz => a1!(|x| ((1.0 / f64::from(flush(f(x))).sqrt()) as f32).to_bits()),
        "rsqrt" => a1!(|x| ((1.0 / f64::from(f(x)).sqrt()) as f32).to_bits()),
        "ex2" if ftz => a1!(|x| flush(flush(f(x)).exp2()).to_bits()),
        "ex2" => a1!(|x| f(x).exp2().to_bits()),
        "lg2" if ftz => a1!(|x| flush(f(x)).log2().to_bits()),
        "lg2" => a1!(|x| f(x).log2().to_bits()),
        "sin" => a1!(|x| f(x).sin().to_bits()),
        "cos" => a1!(|x| f(x).cos().to_bits()),
        "tanh" => a1!(|x| f(x).tanh().to_bits()),
        "mov" => a1!(|x| x),
        _ => return None,
    })
}

fn double(op: &str, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    if ["rz", "rm", "rp"].iter().any(|r| has(r)) {
        return None;
    }
    Some(match op {
        "add" => w2!(|x, y| (g(x) + g(y)).to_bits()),
        "sub" => w2!(|x, y| (g(x) - g(y)).to_bits()),
        "mul" => w2!(|x, y| (g(x) * g(y)).to_bits()),
        "fma" | "mad" => w3!(|x, y, z| g(x).mul_add(g(y), g(z)).to_bits()),
        "div" => w2!(|x, y| (g(x) / g(y)).to_bits()),
        "min" => w2!(|x, y| g(x).min(g(y)).to_bits()),
        "max" => w2!(|x, y| g(x).max(g(y)).to_bits()),
        "neg" => w1!(|x| x ^ 1 << 63),
        "abs" => w1!(|x| x & !(1 << 63)),
        "rcp" => w1!(|x| (1.0 / g(x)).to_bits()),
        "sqrt" => w1!(|x| g(x).sqrt().to_bits()),
        "rsqrt" => w1!(|x| (1.0 / g(x).sqrt()).to_bits()),
        "mov" => w1!(|x| x),
        _ => return None,
    })
}

fn half_precision(op: &str, two: bool, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    Some(match op {
        "fma" if has("relu") => half!(two, f16_to_f32, f32_to_f16, |x, y, z| max(fma_f16(x, y, z), 0.0)),
        "add" => half!(two, f16_to_f32, f32_to_f16, |x, y| x + y),
        "sub" => half!(two, f16_to_f32, f32_to_f16, |x, y| x - y),
        "mul" => half!(two, f16_to_f32, f32_to_f16, |x, y| x * y),
        "fma" => half!(two, f16_to_f32, f32_to_f16, |x, y, z| fma_f16(x, y, z)),
        "min" if has("NaN") => half!(two, f16_to_f32, f32_to_f16, |x, y| min_nan(x, y)),
        "max" if has("NaN") => half!(two, f16_to_f32, f32_to_f16, |x, y| max_nan(x, y)),
        "min" => half!(two, f16_to_f32, f32_to_f16, |x, y| min(x, y)),
        "max" => half!(two, f16_to_f32, f32_to_f16, |x, y| max(x, y)),
        "ex2" => half!(two, f16_to_f32, f32_to_f16, |x| x.exp2()),
        "tanh" => half!(two, f16_to_f32, f32_to_f16, |x| x.tanh()),
        _ => return sign_bits(op, two),
    })
}

fn brain(op: &str, two: bool, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    Some(match op {
        "fma" if has("relu") => half!(two, bf16_to_f32, f32_to_bf16, |x, y, z| max(fma_f16(x, y, z), 0.0)),
        "add" => half!(two, bf16_to_f32, f32_to_bf16, |x, y| x + y),
        "sub" => half!(two, bf16_to_f32, f32_to_bf16, |x, y| x - y),
        "mul" => half!(two, bf16_to_f32, f32_to_bf16, |x, y| x * y),
        "fma" => half!(two, bf16_to_f32, f32_to_bf16, |x, y, z| fma_f16(x, y, z)),
        "min" if has("NaN") => half!(two, bf16_to_f32, f32_to_bf16, |x, y| min_nan(x, y)),
        "max" if has("NaN") => half!(two, bf16_to_f32, f32_to_bf16, |x, y| max_nan(x, y)),
        "min" => half!(two, bf16_to_f32, f32_to_bf16, |x, y| min(x, y)),
        "max" => half!(two, bf16_to_f32, f32_to_bf16, |x, y| max(x, y)),
        "ex2" => half!(two, bf16_to_f32, f32_to_bf16, |x| x.exp2()),
        "tanh" => half!(two, bf16_to_f32, f32_to_bf16, |x| x.tanh()),
        _ => return sign_bits(op, two),
    })
}

fn sign_bits(op: &str, two: bool) -> Option<Pure> {
    Some(match (op, two) {
        ("neg", true) => a1!(|x| x ^ 0x8000_8000),
        ("neg", false) => a1!(|x| x ^ 0x8000),
        ("abs", true) => a1!(|x| x & 0x7fff_7fff),
        ("abs", false) => a1!(|x| x & 0x7fff),
        ("mov", _) => a1!(|x| x),
        _ => return None,
    })
}
