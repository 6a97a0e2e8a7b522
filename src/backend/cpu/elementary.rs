//! Elementary functions of sixteen floats at once.

use super::isa::Simd;
use crate::tensor::BLOCK;

/// e^x for x up to 88, to about one unit in the last place: range reduction to |r| <= ln 2 / 2 and a polynomial of
/// degree 7 (Cephes `expf`). Below -87 the result is about 1e-38, which is as good as 0 for a probability. NaN
/// stays NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Adding 1.5 * 2^23 rounds to an integer.
    let magic = s.splat(12_582_912.0);
    let x = s.max(s.splat(-87.0), x);
    let t = s.fma(x, s.splat(std::f32::consts::LOG2_E), magic);
    let n = s.sub(t, magic);
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let y = s.add(s.fma(s.mul(p, r), r, r), s.splat(1.0));
    s.mul(y, s.power_of_two(t))
}

/// `ln(1 + a / b)` for `0 <= a <= b`, `b` not zero, to a few units in the last place however small the result: the series
/// of `2 artanh(a / (a + 2 b))`, whose argument is at most a third.
#[inline(always)]
pub(super) fn log1p_ratio<S: Simd>(s: S, a: S::V, b: S::V) -> S::V {
    let z = s.div(a, s.add(a, s.add(b, b)));
    let w = s.mul(z, z);
    // The next term would add less than 2e-9 of the sum.
    let mut p = s.splat(1.0 / 15.0);
    for c in [1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        p = s.fma(p, w, s.splat(c));
    }
    s.mul(s.add(z, z), p)
}

/// Natural logarithms of positive normal numbers, to two units in the last place and, near 1, to 1e-7 of the distance
/// from 1: the series of `2 artanh((m - 1) / (m + 1))` for the fraction m in [sqrt(1/2), sqrt(2)).
#[inline(always)]
pub(super) fn ln(x: [f32; BLOCK]) -> [f32; BLOCK] {
    let root_half = std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32;
    let mut out = [0.0; BLOCK];
    for i in 0..BLOCK {
        let bits = x[i].to_bits() as i32;
        let exponent = (bits - root_half) >> 23;
        let m = f32::from_bits((bits - (exponent << 23)) as u32);
        let z = (m - 1.0) / (m + 1.0);
        let w = z * z;
        let series = z * w * (2.0 / 3.0 + w * (2.0 / 5.0 + w * (2.0 / 7.0 + w * (2.0 / 9.0))));
        // ln 2 in two parts, the first exact in a product with any exponent.
        let e = exponent as f32;
        out[i] = e * 0.693_359_4 + (z + z + (series - e * 2.121_944_4e-4));
    }
    out
}

/// Cosine and sine of the angles `2 pi (u / 2^32 - 1/8)`, to 3e-7: the two upper bits say which quadrant, whose middle is on
/// an axis, the next 22 the place in it.
#[inline(always)]
pub(super) fn cos_sin_turns(u: [u32; BLOCK]) -> [[f32; BLOCK]; 2] {
    let mut out = [[0.0; BLOCK]; 2];
    for i in 0..BLOCK {
        let place = (u[i] >> 8 & 0x3f_ffff) as f32;
        let t = (place * (1.0 / 4_194_304.0) - 0.5) * std::f32::consts::FRAC_PI_2;
        let w = t * t;
        let s = t + t * w * (-1.0 / 6.0 + w * (1.0 / 120.0 - w * (1.0 / 5040.0 - w * (1.0 / 362_880.0))));
        let c = 1.0 - w * (0.5 - w * (1.0 / 24.0 - w * (1.0 / 720.0 - w * (1.0 / 40320.0))));
        let quadrant = u[i] >> 30;
        let (a, b) = if quadrant & 1 == 0 { (c, s) } else { (s, c) };
        out[0][i] = if quadrant == 1 || quadrant == 2 { -a } else { a };
        out[1][i] = if quadrant >= 2 { -b } else { b };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::isa::Scalar;
    use super::*;

    #[test]
    fn exp_is_accurate() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let e = f64::from(x).exp();
            let rel = (f64::from(exp(Scalar, [x; BLOCK])[0]) - e).abs() / e;
            assert!(rel < 2.5e-7, "exp({x}): relative error {rel:e}");
        }
        assert!(exp(Scalar, [f32::NAN; BLOCK])[0].is_nan());
    }

    #[test]
    fn log1p_ratio_is_accurate() {
        for i in 0..4000 {
            let a = 0.5f32.powf(i as f32 / 40.0);
            let e = f64::from(a).ln_1p();
            let rel = (f64::from(log1p_ratio(Scalar, [a; BLOCK], [1.0; BLOCK])[0]) - e).abs() / e;
            assert!(rel < 5e-7, "ln(1 + {a}): relative error {rel:e}");
        }
        assert_eq!(log1p_ratio(Scalar, [0.0; BLOCK], [1.0; BLOCK])[0], 0.0);
    }

    #[test]
    fn ln_is_accurate() {
        for i in 1..20_000u32 {
            for x in [i as f32 / 10_000.0, 0.5f32.powf(i as f32 / 200.0), i as f32 * 1e3] {
                let e = f64::from(x).ln();
                let off = (f64::from(ln([x; BLOCK])[0]) - e).abs();
                assert!(off <= 2.5e-7 * e.abs().max(1e-7), "ln({x}): off by {off:e}");
            }
        }
    }

    #[test]
    fn cosines_and_sines_stand_on_the_circle() {
        for i in 0..65_536u32 {
            let u = i.wrapping_mul(65_537);
            let [c, s] = cos_sin_turns([u; BLOCK]).map(|v| f64::from(v[0]));
            // The middle of a quadrant is at its begin, and the lowest eight bits are not looked at.
            let turn = f64::from(u >> 8) / f64::from(1 << 24) - 0.125;
            let (sin, cos) = (turn * std::f64::consts::TAU).sin_cos();
            assert!((c - cos).abs() < 3e-7 && (s - sin).abs() < 3e-7, "{u:#x}: {c} {s}, not {cos} {sin}");
        }
    }
}
