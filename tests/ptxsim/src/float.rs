//! Number formats of tensor cores and the roundings of `cvt`.

/// `bf16` to `f32`, exact.
#[inline]
pub fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// `f32` to the nearest `bf16`, ties to even.
#[inline]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return 0x7fff;
    }
    ((bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16) as u16
}

/// `f16` to `f32`, exact.
#[inline]
pub fn f16_to_f32(h: u16) -> f32 {
    let sign = u32::from(h & 0x8000) << 16;
    let rest = u32::from(h & 0x7fff);
    if rest >= 0x7c00 {
        return f32::from_bits(sign | 0x7f80_0000 | (rest & 0x3ff) << 13);
    }
    // The exponent is moved by a multiplication, which also makes small numbers normal.
    let scaled = f32::from_bits(rest << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(sign | scaled.to_bits())
}

/// `f32` to the nearest `f16`, ties to even.
#[inline]
pub fn f32_to_f16(x: f32) -> u16 {
    narrow(f64::from(x), F16, Round::Nearest) as u16
}

/// Rounding of a conversion.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Round {
    Nearest,
    Zero,
    Down,
    Up,
    /// Ties away from zero.
    Away,
}

/// A format by the bits of its exponent and mantissa.
#[derive(Clone, Copy)]
pub(crate) struct Format {
    exponent: u32,
    mantissa: u32,
}

pub(crate) const F16: Format = Format { exponent: 5, mantissa: 10 };
pub(crate) const BF16: Format = Format { exponent: 8, mantissa: 7 };
pub(crate) const F32: Format = Format { exponent: 8, mantissa: 23 };

/// Any format from an exact value, rounded once.
pub(crate) fn narrow(x: f64, to: Format, round: Round) -> u32 {
    let bias = (1i32 << (to.exponent - 1)) - 1;
    let sign = u32::from(x.is_sign_negative()) << (to.exponent + to.mantissa);
    let infinity = ((1u32 << to.exponent) - 1) << to.mantissa;
    if x.is_nan() {
        // The one NaN that conversions to narrow formats give.
        return if to.mantissa == 23 { infinity | 1 << 22 | sign } else { infinity | ((1 << to.mantissa) - 1) };
    }
    let a = x.abs();
    if a.is_infinite() {
        return sign | infinity;
    }
    if a == 0.0 {
        return sign;
    }
    let exponent = (((a.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(1 - bias);
    let unit = 2f64.powi(exponent - to.mantissa as i32);
    let scaled = a / unit;
    let whole = match round {
        Round::Nearest => scaled.round_ties_even(),
        Round::Away => scaled.round(),
        Round::Zero => scaled.floor(),
        Round::Down if sign != 0 => scaled.ceil(),
        Round::Up if sign == 0 => scaled.ceil(),
        Round::Down | Round::Up => scaled.floor(),
    };
    let bits = (((exponent + bias - 1) as u32) << to.mantissa).wrapping_add(whole as u32);
    // With no hidden bit the sum above counts the exponent of subnormals one too low, which is what they need.
    if bits >= infinity {
        let toward_zero =
            round == Round::Zero || (round == Round::Down && sign == 0) || (round == Round::Up && sign != 0);
        return sign | if toward_zero { infinity - 1 } else { infinity };
    }
    sign | bits
}

/// `f32` with its mantissa cut to the ten bits that tensor cores read of tf32.
#[inline]
pub(crate) fn tf32(x: u32) -> f32 {
    f32::from_bits(x & 0xffff_e000)
}

/// Zero of the same sign in place of a subnormal.
#[inline]
pub(crate) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// Sum or difference rounded in another direction than to the nearest, from the exact error of the nearest one.
pub(crate) fn directed(exact_hi: f64, round: Round) -> f32 {
    f32::from_bits(narrow(exact_hi, F32, round))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_returns() {
        for h in 0..=u16::MAX {
            let x = f16_to_f32(h);
            if !x.is_nan() {
                assert_eq!(f32_to_f16(x), h);
                assert_eq!(narrow(f64::from(x), F16, Round::Zero), u32::from(h));
            }
        }
    }

    #[test]
    fn every_bf16_returns_and_ties_go_to_even() {
        for h in 0..=u16::MAX {
            let x = bf16_to_f32(h);
            if !x.is_nan() {
                assert_eq!(f32_to_bf16(x), h);
                assert_eq!(narrow(f64::from(x), BF16, Round::Nearest), u32::from(h));
            }
        }
        for (bits, nearest, zero, up) in [
            (0x3f80_8000, 0x3f80, 0x3f80, 0x3f81),
            (0x3f81_8000, 0x3f82, 0x3f81, 0x3f82),
            (0x3f80_8001, 0x3f81, 0x3f80, 0x3f81),
        ] {
            let x = f64::from(f32::from_bits(bits));
            assert_eq!(narrow(x, BF16, Round::Nearest), nearest);
            assert_eq!(u32::from(f32_to_bf16(x as f32)), nearest);
            assert_eq!(narrow(x, BF16, Round::Zero), zero);
            assert_eq!(narrow(x, BF16, Round::Up), up);
        }
    }

    #[test]
    fn the_ends_of_f16() {
        assert_eq!(f32_to_f16(65519.0), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(narrow(1e9, F16, Round::Zero), 0x7bff);
        assert_eq!(f32_to_f16(2f32.powi(-25)), 0);
        assert_eq!(f32_to_f16(1.5 * 2f32.powi(-25)), 1);
        assert_eq!(f32_to_f16(f32::NAN), 0x7fff);
        assert_eq!(f32_to_f16(-0.0), 0x8000);
    }
}
