//! Minimal filtering along one axis (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast
//! Algorithms for Convolutional Neural Networks", CVPR 2016): how few products give `M` neighbouring outputs.
//!
//! Every scheme maps `L` neighbouring inputs to `P` values, whose products with `P` values made from the filter map to
//! `M` outputs. A convolution in three dimensions applies one scheme per axis.
//!
//! The points of [`F4`] are 0, +-1/sqrt 2, +-sqrt 2 and infinity rather than the usual 0, +-1, +-2: the same number of
//! operations, but magnitudes that lie closer together, which makes the rounding error about three times smaller in 3D.

use std::marker::PhantomData;

use crate::backend::cpu::isa::Scalar;
use crate::backend::cpu::lanes::Lanes;

/// One axis, from `L` inputs to `P` values.
pub(super) trait Forward<const L: usize, const P: usize> {
    /// The inputs' transform.
    fn forward<S: Lanes>(s: S, d: &[S::R; L]) -> [S::R; P];
}

/// One axis, by its number of inputs, products and outputs.
pub(super) trait Axis<const L: usize, const P: usize, const M: usize>: Forward<L, P> {
    /// From products to outputs.
    fn inverse<S: Lanes>(s: S, m: &[S::R; P]) -> [S::R; M];
    /// The filter's transform; a kernel of one tap is the first of the three.
    fn filter<S: Lanes>(s: S, g: &[S::R; 3]) -> [S::R; P];
}

/// A kernel of one tap.
pub(super) struct One;
/// Three taps, two outputs from four products.
pub(super) struct F2;
/// Three taps, four outputs from six products.
pub(super) struct F4;
/// Three taps at stride 2: the even taps meet every second input, the middle tap the others, so it is a two-tap filter
/// on one half of the inputs and a one-tap filter on the other: two outputs from 3 + 2 products.
pub(super) struct S2;
/// The same for four outputs from 5 + 4 products.
pub(super) struct S4;

/// Sums of two neighbouring outputs of a scheme: the gradient of a voxel that stood for two.
pub(super) struct Sums<X>(PhantomData<X>);
/// The transpose of a scheme's step from products to outputs: a filter's gradient has the inputs' transform, this of the
/// outputs' gradients, the sums of their products over all tiles, and last the transpose of the filter's transform.
pub(super) struct Spread<X>(PhantomData<X>);

/// Squares of the points of [`F4`]: 1/2 and 2.
const A: f32 = std::f32::consts::FRAC_1_SQRT_2;
const B: f32 = std::f32::consts::SQRT_2;

/// The points of [`S4`] are +-these and infinity: near those of least rounding error, with powers that are exact in f32.
const SA: f32 = 0.375;
const SB: f32 = 1.375;

impl Forward<1, 1> for One {
    #[inline(always)]
    fn forward<S: Lanes>(_: S, d: &[S::R; 1]) -> [S::R; 1] {
        *d
    }
}

impl Axis<1, 1, 1> for One {
    #[inline(always)]
    fn inverse<S: Lanes>(_: S, m: &[S::R; 1]) -> [S::R; 1] {
        *m
    }
    #[inline(always)]
    fn filter<S: Lanes>(_: S, g: &[S::R; 3]) -> [S::R; 1] {
        [g[0]]
    }
}

impl Forward<4, 4> for F2 {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, d: &[S::R; 4]) -> [S::R; 4] {
        [s.sub(d[0], d[2]), s.add(d[1], d[2]), s.sub(d[2], d[1]), s.sub(d[1], d[3])]
    }
}

impl Axis<4, 4, 2> for F2 {
    #[inline(always)]
    fn inverse<S: Lanes>(s: S, m: &[S::R; 4]) -> [S::R; 2] {
        let (p, q) = (s.add(m[1], m[2]), s.sub(m[1], m[2]));
        [s.add(m[0], p), s.sub(q, m[3])]
    }
    #[inline(always)]
    fn filter<S: Lanes>(s: S, g: &[S::R; 3]) -> [S::R; 4] {
        let half = s.splat(0.5);
        let (e, o) = (s.mul(half, s.add(g[0], g[2])), s.mul(half, g[1]));
        [g[0], s.add(e, o), s.sub(e, o), g[2]]
    }
}

impl Forward<6, 6> for F4 {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, d: &[S::R; 6]) -> [S::R; 6] {
        let (c, two, half) = (s.splat(2.5), s.splat(2.0), s.splat(0.5));
        let (p, q) = (s.fnma(two, d[2], d[4]), s.fnma(two, d[1], d[3]));
        let (r, u) = (s.fnma(half, d[2], d[4]), s.fnma(half, d[1], d[3]));
        // A product and two additions rather than two fused ones: additions have units of their own.
        let (q, u) = (s.mul(s.splat(A), q), s.mul(s.splat(B), u));
        [
            s.fnma(c, d[2], s.add(d[0], d[4])),
            s.add(p, q),
            s.sub(p, q),
            s.add(r, u),
            s.sub(r, u),
            s.fnma(c, d[3], s.add(d[1], d[5])),
        ]
    }
}

impl Axis<6, 6, 4> for F4 {
    #[inline(always)]
    fn inverse<S: Lanes>(s: S, m: &[S::R; 6]) -> [S::R; 4] {
        let (p, q) = (s.add(m[1], m[2]), s.sub(m[1], m[2]));
        let (r, u) = (s.add(m[3], m[4]), s.sub(m[3], m[4]));
        [
            s.add(m[0], s.add(p, r)),
            s.fma(s.splat(B), u, s.mul(s.splat(A), q)),
            s.fma(s.splat(2.0), r, s.mul(s.splat(0.5), p)),
            s.fma(s.splat(2.0 * B), u, s.fma(s.splat(0.5 * A), q, m[5])),
        ]
    }
    #[inline(always)]
    fn filter<S: Lanes>(s: S, g: &[S::R; 3]) -> [S::R; 6] {
        // Differences of a point to 0 and to the three others multiply to -3/2 for +-1/sqrt 2, and to 6 for +-sqrt 2.
        let (na, nb) = (-1.0 / 1.5, 1.0 / 6.0);
        let e = s.mul(s.splat(na), s.fma(s.splat(0.5), g[2], g[0]));
        let o = s.mul(s.splat(na * A), g[1]);
        let f = s.mul(s.splat(nb), s.fma(s.splat(2.0), g[2], g[0]));
        let p = s.mul(s.splat(nb * B), g[1]);
        [g[0], s.add(e, o), s.sub(e, o), s.add(f, p), s.sub(f, p), g[2]]
    }
}

impl Forward<5, 5> for S2 {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, d: &[S::R; 5]) -> [S::R; 5] {
        [s.sub(d[0], d[2]), d[2], s.sub(d[2], d[4]), d[1], d[3]]
    }
}

impl Axis<5, 5, 2> for S2 {
    #[inline(always)]
    fn inverse<S: Lanes>(s: S, m: &[S::R; 5]) -> [S::R; 2] {
        [s.add(s.add(m[0], m[1]), m[3]), s.add(s.sub(m[1], m[2]), m[4])]
    }
    #[inline(always)]
    fn filter<S: Lanes>(s: S, g: &[S::R; 3]) -> [S::R; 5] {
        [g[0], s.add(g[0], g[2]), g[2], g[1], g[1]]
    }
}

impl Forward<9, 9> for S4 {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, d: &[S::R; 9]) -> [S::R; 9] {
        let (a, b) = (s.splat(SA * SA), s.splat(SB * SB));
        let (p, q) = (s.fnma(b, d[2], d[6]), s.fnma(b, d[0], d[4]));
        let (r, u) = (s.fnma(a, d[2], d[6]), s.fnma(a, d[0], d[4]));
        let (q, u) = (s.mul(s.splat(SA), q), s.mul(s.splat(SB), u));
        let last = s.fma(s.splat(SA * SA * SB * SB), d[0], s.fnma(s.splat(SA * SA + SB * SB), d[4], d[8]));
        [s.add(p, q), s.sub(p, q), s.add(r, u), s.sub(r, u), last, d[1], d[3], d[5], d[7]]
    }
}

impl Axis<9, 9, 4> for S4 {
    #[inline(always)]
    fn inverse<S: Lanes>(s: S, m: &[S::R; 9]) -> [S::R; 4] {
        let (p, q) = (s.add(m[0], m[1]), s.sub(m[0], m[1]));
        let (r, u) = (s.add(m[2], m[3]), s.sub(m[2], m[3]));
        [
            s.add(m[5], s.add(p, r)),
            s.fma(s.splat(SB), u, s.fma(s.splat(SA), q, m[6])),
            s.fma(s.splat(SB * SB), r, s.fma(s.splat(SA * SA), p, m[7])),
            s.fma(s.splat(SB * SB * SB), u, s.fma(s.splat(SA * SA * SA), q, s.add(m[4], m[8]))),
        ]
    }
    #[inline(always)]
    fn filter<S: Lanes>(s: S, g: &[S::R; 3]) -> [S::R; 9] {
        // Differences of a point p to the three others multiply to 2 p (p^2 - q^2), q the points of the other pair.
        let (na, nb) = (0.5 / (SA * SA - SB * SB), 0.5 / (SB * SB - SA * SA));
        let (e, o) = (s.mul(s.splat(na / SA), g[0]), s.mul(s.splat(na), g[2]));
        let (f, p) = (s.mul(s.splat(nb / SB), g[0]), s.mul(s.splat(nb), g[2]));
        [s.add(e, o), s.sub(o, e), s.add(f, p), s.sub(p, f), g[2], g[1], g[1], g[1], g[1]]
    }
}

impl<X: Forward<L, P>, const L: usize, const P: usize> Forward<L, P> for Sums<X> {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, d: &[S::R; L]) -> [S::R; P] {
        X::forward(s, d)
    }
}

impl Axis<4, 4, 1> for Sums<F2> {
    #[inline(always)]
    fn inverse<S: Lanes>(s: S, m: &[S::R; 4]) -> [S::R; 1] {
        let y = F2::inverse(s, m);
        [s.add(y[0], y[1])]
    }
    #[inline(always)]
    fn filter<S: Lanes>(s: S, g: &[S::R; 3]) -> [S::R; 4] {
        F2::filter(s, g)
    }
}

impl Axis<6, 6, 2> for Sums<F4> {
    #[inline(always)]
    fn inverse<S: Lanes>(s: S, m: &[S::R; 6]) -> [S::R; 2] {
        let y = F4::inverse(s, m);
        [s.add(y[0], y[1]), s.add(y[2], y[3])]
    }
    #[inline(always)]
    fn filter<S: Lanes>(s: S, g: &[S::R; 3]) -> [S::R; 6] {
        F4::filter(s, g)
    }
}

impl Forward<2, 4> for Spread<F2> {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, y: &[S::R; 2]) -> [S::R; 4] {
        [y[0], s.add(y[0], y[1]), s.sub(y[0], y[1]), s.sub(s.splat(0.0), y[1])]
    }
}

impl Forward<4, 6> for Spread<F4> {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, y: &[S::R; 4]) -> [S::R; 6] {
        let (two, half) = (s.splat(2.0), s.splat(0.5));
        let (p, q) = (s.fma(half, y[2], y[0]), s.mul(s.splat(A), s.fma(half, y[3], y[1])));
        let (r, u) = (s.fma(two, y[2], y[0]), s.mul(s.splat(B), s.fma(two, y[3], y[1])));
        [y[0], s.add(p, q), s.sub(p, q), s.add(r, u), s.sub(r, u), y[3]]
    }
}

impl Forward<2, 5> for Spread<S2> {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, y: &[S::R; 2]) -> [S::R; 5] {
        [y[0], s.add(y[0], y[1]), s.sub(s.splat(0.0), y[1]), y[0], y[1]]
    }
}

impl Forward<4, 9> for Spread<S4> {
    #[inline(always)]
    fn forward<S: Lanes>(s: S, y: &[S::R; 4]) -> [S::R; 9] {
        let (a, b) = (s.splat(SA * SA), s.splat(SB * SB));
        let (p, q) = (s.fma(a, y[2], y[0]), s.mul(s.splat(SA), s.fma(a, y[3], y[1])));
        let (r, u) = (s.fma(b, y[2], y[0]), s.mul(s.splat(SB), s.fma(b, y[3], y[1])));
        [s.add(p, q), s.sub(p, q), s.add(r, u), s.sub(r, u), y[3], y[0], y[1], y[2], y[3]]
    }
}

/// `by_kind!(kind, function::<S>(arguments))` calls `function::<S, Scheme, L, P, M>(arguments)` of the scheme that `kind`
/// stands for.
macro_rules! by_kind {
    ($kind:expr, $f:ident $(::<$s:ty>)? ( $($a:expr),* )) => {{
        use $crate::backend::cpu::conv3d::winograd::axis::{F2, F4, Kind, One, S2, S4, Sums};
        match $kind {
            Kind::One => $f::<$($s,)? One, 1, 1, 1>($($a),*),
            Kind::F2 => $f::<$($s,)? F2, 4, 4, 2>($($a),*),
            Kind::F4 => $f::<$($s,)? F4, 6, 6, 4>($($a),*),
            Kind::S2 => $f::<$($s,)? S2, 5, 5, 2>($($a),*),
            Kind::S4 => $f::<$($s,)? S4, 9, 9, 4>($($a),*),
            Kind::F2Sums => $f::<$($s,)? Sums<F2>, 4, 4, 1>($($a),*),
            Kind::F4Sums => $f::<$($s,)? Sums<F4>, 6, 6, 2>($($a),*),
        }
    }};
}
pub(super) use by_kind;

/// As [`by_kind`], for what is before the products: sums of outputs make no difference there.
macro_rules! by_forward {
    ($kind:expr, $f:ident ::<$s:ty> ( $($a:expr),* )) => {{
        use $crate::backend::cpu::conv3d::winograd::axis::{F2, F4, Kind, One, S2, S4};
        match $kind {
            Kind::One => $f::<$s, One, 1, 1, 1>($($a),*),
            Kind::F2 | Kind::F2Sums => $f::<$s, F2, 4, 4, 2>($($a),*),
            Kind::F4 | Kind::F4Sums => $f::<$s, F4, 6, 6, 4>($($a),*),
            Kind::S2 => $f::<$s, S2, 5, 5, 2>($($a),*),
            Kind::S4 => $f::<$s, S4, 9, 9, 4>($($a),*),
        }
    }};
}
pub(super) use by_forward;

/// As [`by_forward`], for the outputs' gradients.
macro_rules! by_spread {
    ($kind:expr, $f:ident ::<$s:ty> ( $($a:expr),* )) => {{
        use $crate::backend::cpu::conv3d::winograd::axis::{F2, F4, Kind, One, S2, S4, Spread};
        match $kind {
            Kind::One => $f::<$s, One, 1, 1, 1>($($a),*),
            Kind::F2 | Kind::F2Sums => $f::<$s, Spread<F2>, 2, 4, 3>($($a),*),
            Kind::F4 | Kind::F4Sums => $f::<$s, Spread<F4>, 4, 6, 3>($($a),*),
            Kind::S2 => $f::<$s, Spread<S2>, 2, 5, 3>($($a),*),
            Kind::S4 => $f::<$s, Spread<S4>, 4, 9, 3>($($a),*),
        }
    }};
}
pub(super) use by_spread;

/// The schemes as values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// See [`One`]; its stride may be 1 or 2.
    One,
    /// See [`F2`].
    F2,
    /// See [`F4`].
    F4,
    /// See [`S2`].
    S2,
    /// See [`S4`].
    S4,
    /// See [`Sums`]: of [`F2`].
    F2Sums,
    /// Of [`F4`].
    F4Sums,
}

impl Kind {
    /// Inputs, products and outputs.
    pub(super) const fn sizes(self) -> (usize, usize, usize) {
        match self {
            Kind::One => (1, 1, 1),
            Kind::F2 => (4, 4, 2),
            Kind::F4 => (6, 6, 4),
            Kind::S2 => (5, 5, 2),
            Kind::S4 => (9, 9, 4),
            Kind::F2Sums => (4, 4, 1),
            Kind::F4Sums => (6, 6, 2),
        }
    }

    /// Arithmetic operations per transform of the inputs, of the products and of the filter, for the estimate of time.
    pub(super) const fn operations(self) -> (usize, usize, usize) {
        match self {
            Kind::One => (0, 0, 0),
            Kind::F2 => (4, 4, 5),
            Kind::F4 => (14, 12, 10),
            Kind::S2 => (2, 4, 1),
            Kind::S4 => (12, 13, 8),
            Kind::F2Sums => (4, 5, 5),
            Kind::F4Sums => (14, 14, 10),
        }
    }

    /// What the three taps count in product `p` of the filter's transform.
    pub(super) fn filter(self, p: usize) -> [f32; 3] {
        fn row<X: Axis<L, P, M>, const L: usize, const P: usize, const M: usize>(p: usize) -> [f32; 3] {
            let one = |tap: usize| {
                let mut g = [[0f32; 4]; 3];
                g[tap] = [1.0; 4];
                X::filter(Scalar, &g)[p][0]
            };
            [one(0), one(1), one(2)]
        }
        by_kind!(self, row(p))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<X: Axis<L, P, M>, const L: usize, const P: usize, const M: usize>(kind: Kind, taps: usize, stride: usize) {
        assert_eq!(kind.sizes(), (L, P, M));
        for impulse in 0..L * taps {
            let (at, tap) = (impulse / taps, impulse % taps);
            let mut d = [[0f32; 4]; L];
            d[at] = [1.0; 4];
            let mut g = [[0f32; 4]; 3];
            g[tap] = [1.0; 4];
            let mut products = X::forward(Scalar, &d);
            for (m, g) in products.iter_mut().zip(X::filter(Scalar, &g)) {
                *m = m.map(|v| v * g[0]);
            }
            let y = X::inverse(Scalar, &products);
            for (o, y) in y.iter().enumerate() {
                let expected = if o * stride + tap == at { 1.0 } else { 0.0 };
                assert!((y[0] - expected).abs() < 3e-6, "{kind:?} input {at} tap {tap} output {o}: {}", y[0]);
            }
        }
    }

    /// `<products, spread(y)> = <inverse(products), y>`.
    fn check_spread<X: Axis<L, P, M>, const L: usize, const P: usize, const M: usize>()
    where
        Spread<X>: Forward<M, P>,
    {
        for (p, o) in (0..P).flat_map(|p| (0..M).map(move |o| (p, o))) {
            let (mut m, mut y) = ([[0f32; 4]; P], [[0f32; 4]; M]);
            m[p] = [1.0; 4];
            y[o] = [1.0; 4];
            let (there, back) = (X::inverse(Scalar, &m)[o][0], Spread::<X>::forward(Scalar, &y)[p][0]);
            assert!((there - back).abs() < 3e-6, "product {p} output {o}: {there} {back}");
        }
    }

    #[test]
    fn spreads_are_transposes() {
        check_spread::<F2, 4, 4, 2>();
        check_spread::<F4, 6, 6, 4>();
        check_spread::<S2, 5, 5, 2>();
        check_spread::<S4, 9, 9, 4>();
    }

    /// Each scheme is the convolution that it stands for, by its response to every single input and tap.
    #[test]
    fn schemes_are_convolutions() {
        check::<One, 1, 1, 1>(Kind::One, 1, 1);
        check::<F2, 4, 4, 2>(Kind::F2, 3, 1);
        check::<F4, 6, 6, 4>(Kind::F4, 3, 1);
        check::<S2, 5, 5, 2>(Kind::S2, 3, 2);
        check::<S4, 9, 9, 4>(Kind::S4, 3, 2);
    }
}
