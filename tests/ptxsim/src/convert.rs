//! `cvt`: between all numbers, with their roundings and saturations.

use crate::alu::max;
use crate::float::{BF16, F16, F32, Round, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, flush, narrow};
use crate::ins::{Pure, Ty, each};

/// A conversion of one value, whatever its types.
#[derive(Clone, Copy)]
pub(crate) struct Convert {
    to: Ty,
    from: Ty,
    round: Option<Round>,
    /// Rounds to an integer that stays a float (`cvt.rni.f32.f32`).
    integral: bool,
    sat: bool,
    relu: bool,
    ftz: bool,
}

impl Convert {
    pub(crate) fn new(to: Ty, from: Ty, has: &dyn Fn(&str) -> bool) -> Convert {
        let named = [("rn", Round::Nearest), ("rz", Round::Zero), ("rm", Round::Down), ("rp", Round::Up)];
        let found = named.iter().find(|(n, _)| has(n) || has(&format!("{n}i"))).map(|(_, r)| *r);
        let round = if has("rna") { Some(Round::Away) } else { found };
        let integral = ["rni", "rzi", "rmi", "rpi"].iter().any(|n| has(n));
        Convert { to, from, round, integral, sat: has("sat"), relu: has("relu"), ftz: has("ftz") }
    }

    /// The function for whole warps, where there is one.
    pub(crate) fn fast(&self) -> Option<Pure> {
        if self.sat || self.relu || self.ftz {
            return None;
        }
        if !self.to.float() && !self.from.float() {
            return Some(integers(self.to, self.from));
        }
        Some(match (self.to, self.from, self.round) {
            (Ty::F32, Ty::S32, Some(Round::Nearest)) => Pure::A1(|a| each(|i| (a[i] as i32 as f32).to_bits())),
            (Ty::F32, Ty::U32, Some(Round::Nearest)) => Pure::A1(|a| each(|i| (a[i] as f32).to_bits())),
            (Ty::F32, Ty::F16, None) => Pure::A1(|a| each(|i| f16_to_f32(a[i] as u16).to_bits())),
            (Ty::F32, Ty::Bf16, None) => Pure::A1(|a| each(|i| a[i] << 16)),
            (Ty::Bf16, Ty::F32, Some(Round::Nearest)) => {
                Pure::A1(|a| each(|i| u32::from(f32_to_bf16(f32::from_bits(a[i])))))
            }
            (Ty::F16, Ty::F32, Some(Round::Nearest)) => {
                Pure::A1(|a| each(|i| u32::from(f32_to_f16(f32::from_bits(a[i])))))
            }
            (Ty::S32, Ty::F32, Some(Round::Zero)) => Pure::A1(|a| each(|i| f32::from_bits(a[i]) as i32 as u32)),
            (Ty::U32, Ty::F32, Some(Round::Zero)) => Pure::A1(|a| each(|i| f32::from_bits(a[i]) as u32)),
            _ => return None,
        })
    }

    /// One value, in the low bits of both.
    pub(crate) fn one(&self, x: u64) -> u64 {
        match (self.to.float(), self.from.float()) {
            (false, false) => clamp(extend(x, self.from), self.to),
            (true, false) => self.store(extend(x, self.from) as f64),
            (false, true) => {
                let v = round_integral(self.load(x), self.round.unwrap_or(Round::Zero));
                if v.is_nan() {
                    // What hardware gives; the manual leaves 64 bits at the lowest number.
                    return if self.to.bytes() == 8 { 1 << 63 } else { 0 };
                }
                clamp(v as i128, self.to)
            }
            (true, true) => {
                let v = self.load(x);
                let v = if self.integral { round_integral(v, self.round.unwrap_or(Round::Nearest)) } else { v };
                self.store(v)
            }
        }
    }

    fn load(&self, x: u64) -> f64 {
        match self.from {
            Ty::F16 => f64::from(f16_to_f32(x as u16)),
            Ty::Bf16 => f64::from(bf16_to_f32(x as u16)),
            Ty::F64 => f64::from_bits(x),
            _ if self.ftz => f64::from(flush(f32::from_bits(x as u32))),
            _ => f64::from(f32::from_bits(x as u32)),
        }
    }

    fn store(&self, v: f64) -> u64 {
        // Unlike `max`, the relu of a conversion keeps a NaN; saturation makes it zero.
        let v = if self.relu && v <= 0.0 { 0.0 } else { v };
        let v = if self.sat { if v.is_nan() { 0.0 } else { v.clamp(0.0, 1.0) } } else { v };
        let round = self.round.unwrap_or(Round::Nearest);
        match self.to {
            Ty::F16 => u64::from(narrow(v, F16, round)),
            Ty::Bf16 => u64::from(narrow(v, BF16, round)),
            Ty::Tf32 => {
                // Ten bits of mantissa in place of 23: rounded as an integer, as the exponent has the same size.
                let bits = (v as f32).to_bits();
                let half = match round {
                    Round::Away => 0x1000,
                    Round::Zero => 0,
                    _ => 0xfff + (bits >> 13 & 1),
                };
                u64::from(if v.is_finite() { bits.wrapping_add(half) & 0xffff_e000 } else { bits })
            }
            Ty::F64 => v.to_bits(),
            _ => {
                let bits = narrow(v, F32, round);
                u64::from(if self.ftz { flush(f32::from_bits(bits)).to_bits() } else { bits })
            }
        }
    }
}

fn round_integral(v: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => v.round_ties_even(),
        Round::Zero => v.trunc(),
        Round::Down => v.floor(),
        Round::Up => v.ceil(),
        Round::Away => v.round(),
    }
}

/// `cvt` of two f32 to one register: the first operand becomes the upper half.
pub(crate) fn pack(to: Ty, has: &dyn Fn(&str) -> bool) -> Option<Pure> {
    macro_rules! two {
        (|$x:ident| $e:expr) => {
            Pure::A2(|a, b| {
                each(|i| {
                    let one = |bits: u32| -> u32 {
                        let $x = f32::from_bits(bits);
                        $e
                    };
                    one(a[i]) << 16 | one(b[i])
                })
            })
        };
    }
    Some(match (to, has("rz"), has("relu")) {
        (Ty::F16x2, false, false) => two!(|x| u32::from(f32_to_f16(x))),
        (Ty::F16x2, false, true) => two!(|x| u32::from(f32_to_f16(relu(x)))),
        (Ty::F16x2, true, false) => two!(|x| narrow(f64::from(x), F16, Round::Zero)),
        (Ty::Bf16x2, false, false) => two!(|x| u32::from(f32_to_bf16(x))),
        (Ty::Bf16x2, false, true) => two!(|x| u32::from(f32_to_bf16(relu(x)))),
        (Ty::Bf16x2, true, false) => two!(|x| narrow(f64::from(x), BF16, Round::Zero)),
        _ => return None,
    })
}

fn relu(x: f32) -> f32 {
    if x.is_nan() { x } else { max(x, 0.0) }
}

fn extend(x: u64, ty: Ty) -> i128 {
    match ty {
        Ty::U8 => i128::from(x as u8),
        Ty::S8 => i128::from(x as i8),
        Ty::U16 => i128::from(x as u16),
        Ty::S16 => i128::from(x as i16),
        Ty::U32 => i128::from(x as u32),
        Ty::S32 => i128::from(x as i32),
        Ty::U64 => i128::from(x),
        _ => i128::from(x as i64),
    }
}

/// The nearest number of type `to`, in as many bits.
fn clamp(x: i128, to: Ty) -> u64 {
    let bits = 8 * to.bytes() as u32;
    let (low, high) = if to.signed() { (-(1i128 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
    let v = x.clamp(low, high) as u64;
    if bits == 64 { v } else { v & ((1 << bits) - 1) }
}

fn integers(to: Ty, from: Ty) -> Pure {
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
    match (from.bytes(), to.bytes()) {
        (8, 8) => Pure::W1(|a| *a),
        (8, 4) => Pure::Narrow(|a| each(|i| a[i] as u32)),
        (8, 2) => Pure::Narrow(|a| each(|i| a[i] as u32 & 0xffff)),
        (8, _) => Pure::Narrow(|a| each(|i| a[i] as u32 & 0xff)),
        // A register may be wider than the type that is read from it.
        (_, 8) => match from {
            Ty::U32 => Pure::Widen(|a| each(|i| u64::from(a[i]))),
            Ty::S32 => Pure::Widen(|a| each(|i| i64::from(a[i] as i32) as u64)),
            Ty::U16 => Pure::Widen(|a| each(|i| u64::from(a[i] as u16))),
            Ty::S16 => Pure::Widen(|a| each(|i| i64::from(a[i] as i16) as u64)),
            Ty::U8 => Pure::Widen(|a| each(|i| u64::from(a[i] as u8))),
            _ => Pure::Widen(|a| each(|i| i64::from(a[i] as i8) as u64)),
        },
        (_, n) => match (from, n) {
            (Ty::U32 | Ty::S32, 4) => a1!(|x| x),
            (Ty::U16, 4) | (Ty::U32 | Ty::S32 | Ty::U16 | Ty::S16, 2) => a1!(|x| x & 0xffff),
            (Ty::S16, 4) => a1!(|x| x as i16 as u32),
            (Ty::U8, _) | (_, 1) => a1!(|x| x & 0xff),
            (_, 4) => a1!(|x| x as i8 as u32),
            _ => a1!(|x| x as i8 as u32 & 0xffff),
        },
    }
}
