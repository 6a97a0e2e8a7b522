//! Comparisons of `setp` and `set`: a bit for every lane.

use crate::alu::{f, g, s16};
use crate::float::{bf16_to_f32, f16_to_f32};
use crate::ins::{Pure, Ty, each};

macro_rules! bits {
    ($a:ident, $b:ident, $x:ident, $y:ident, $e:expr) => {{
        // Every lane contributes its own bit, without shifts that depend on the lane.
        let set: [u32; 32] = each(|i| {
            let ($x, $y) = ($a[i], $b[i]);
            if $e { 1u32 << i } else { 0 }
        });
        set.iter().fold(0, |m, b| m | b)
    }};
}
macro_rules! cmp {
    (|$x:ident, $y:ident| $e:expr) => {
        Pure::Compare(|a, b| bits!(a, b, $x, $y, $e))
    };
}
macro_rules! cmpw {
    (|$x:ident, $y:ident| $e:expr) => {
        Pure::CompareWide(|a, b| bits!(a, b, $x, $y, $e))
    };
}

/// The comparison `op` of `setp` for type `ty`.
#[allow(clippy::neg_cmp_op_on_partial_ord, reason = "the negated forms are those that hold for a NaN")]
pub(crate) fn select(op: &str, ty: Ty) -> Option<Pure> {
    macro_rules! all {
        ($make:ident, $x:ident, $y:ident, $a:expr, $b:expr) => {
            match op {
                "eq" => $make!(|$x, $y| $a == $b),
                "ne" => $make!(|$x, $y| $a != $b),
                "lt" | "lo" => $make!(|$x, $y| $a < $b),
                "le" | "ls" => $make!(|$x, $y| $a <= $b),
                "gt" | "hi" => $make!(|$x, $y| $a > $b),
                "ge" | "hs" => $make!(|$x, $y| $a >= $b),
                _ => return None,
            }
        };
    }
    macro_rules! ordered {
        ($make:ident, $x:ident, $y:ident, $a:expr, $b:expr) => {
            match op {
                // A comparison with a NaN is false, also `ne`; the forms with u are true.
                "ne" => $make!(|$x, $y| $a < $b || $a > $b),
                "equ" => $make!(|$x, $y| !($a < $b || $a > $b)),
                "neu" => $make!(|$x, $y| $a != $b),
                "ltu" => $make!(|$x, $y| !($a >= $b)),
                "leu" => $make!(|$x, $y| !($a > $b)),
                "gtu" => $make!(|$x, $y| !($a <= $b)),
                "geu" => $make!(|$x, $y| !($a < $b)),
                "num" => $make!(|$x, $y| !$a.is_nan() && !$b.is_nan()),
                "nan" => $make!(|$x, $y| $a.is_nan() || $b.is_nan()),
                _ => all!($make, $x, $y, $a, $b),
            }
        };
    }
    Some(match ty {
        Ty::U16 | Ty::U32 | Ty::U8 => all!(cmp, x, y, x, y),
        Ty::S32 => all!(cmp, x, y, x as i32, (y as i32)),
        Ty::S16 => all!(cmp, x, y, s16(x), s16(y)),
        Ty::U64 => all!(cmpw, x, y, x, y),
        Ty::S64 => all!(cmpw, x, y, x as i64, (y as i64)),
        Ty::F32 => ordered!(cmp, x, y, f(x), f(y)),
        Ty::F64 => ordered!(cmpw, x, y, g(x), g(y)),
        Ty::F16 => ordered!(cmp, x, y, f16_to_f32(x as u16), f16_to_f32(y as u16)),
        Ty::Bf16 => ordered!(cmp, x, y, bf16_to_f32(x as u16), bf16_to_f32(y as u16)),
        _ => return None,
    })
}
