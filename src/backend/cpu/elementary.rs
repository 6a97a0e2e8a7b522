//! Elementary functions of sixteen floats at once.

use super::isa::Simd;

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

#[cfg(test)]
mod tests {
    use super::super::isa::Scalar;
    use super::*;
    use crate::tensor::BLOCK;

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
}
