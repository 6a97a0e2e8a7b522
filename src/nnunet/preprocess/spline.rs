//! Resampling along one axis: order 0 (nearest), 1 (linear) and 3 (cubic B-spline).
//!
//! The mathematics of `skimage.transform.resize(mode="edge", anti_aliasing=False)`, which is
//! `scipy.ndimage.zoom(grid_mode=True, mode="nearest")`: output sample o of m lies at (o + 1/2) n / m - 1/2 between the
//! n input samples. Splines are tensor products, so a volume is resampled axis by axis. The cubic prefilter is the
//! recursion of Unser, Aldroubi and Eden, "B-spline signal processing: part I", IEEE TSP 41 (1993).

use crate::error::{Error, Result};

/// Lines that are worked on at a time: sample i of all of them lies side by side.
pub(crate) const LANES: usize = 32;

/// One sample of every line of a panel.
pub(crate) type Lane = [f64; LANES];

/// scipy repeats the edge sample this often before it prefilters, and mirrors only beyond.
const PAD: usize = 12;

/// Pole of the cubic B-spline prefilter, sqrt(3) - 2.
const POLE: f64 = -0.267_949_192_431_122_7;

/// Terms of the mirrored series that starts the recursion; the next would be below 1e-26 of a sample.
const SERIES: usize = 46;

/// Where the samples of an axis come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Axis {
    /// As many samples as before: the same.
    Same(usize),
    /// Output sample o is input sample `index[o]`.
    Nearest {
        /// Samples of the input.
        n: usize,
        /// Source of every output sample.
        index: Vec<usize>,
    },
    /// Output sample o is `(1 - w) in[i] + w in[j]` for `taps[o] = (i, j, w)`.
    Linear {
        /// Samples of the input.
        n: usize,
        /// Source of every output sample.
        taps: Vec<(usize, usize, f64)>,
    },
    /// Output sample o is the spline whose coefficients (after padding) from `taps[o].0` have weights `taps[o].1`.
    Cubic {
        /// Samples of the input.
        n: usize,
        /// Source of every output sample.
        taps: Vec<(usize, [f64; 4])>,
    },
}

impl Axis {
    /// The way from `n` samples to `m` with splines of `order`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other orders than 0, 1 and 3; [`Error::Shape`] when there is no sample.
    pub(crate) fn new(n: usize, m: usize, order: u8) -> Result<Self> {
        if n == 0 || m == 0 {
            return Err(Error::shape("resample", format!("an axis of {n} voxels cannot become one of {m}")));
        }
        // Every order interpolates: with equal sizes all samples fall on samples.
        if n == m {
            return Ok(Axis::Same(n));
        }
        let scale = n as f64 / m as f64;
        let at = (0..m).map(|o| (o as f64 + 0.5) * scale - 0.5);
        let clamp = |i: f64| i.clamp(0.0, (n - 1) as f64) as usize;
        match order {
            0 => Ok(Axis::Nearest { n, index: at.map(|c| clamp((c + 0.5).floor())).collect() }),
            1 => Ok(Axis::Linear {
                n,
                taps: at
                    .map(|c| {
                        let c = c.clamp(0.0, (n - 1) as f64);
                        (clamp(c.floor()), clamp(c.floor() + 1.0), c - c.floor())
                    })
                    .collect(),
            }),
            3 => Ok(Axis::Cubic {
                n,
                taps: at
                    .map(|c| {
                        let (floor, t) = (c.floor(), c - c.floor());
                        let s = 1.0 - t;
                        let inner = |d: f64| (4.0 - 6.0 * d * d + 3.0 * d * d * d) / 6.0;
                        let weights = [s * s * s / 6.0, inner(t), inner(s), t * t * t / 6.0];
                        ((floor + PAD as f64 - 1.0) as usize, weights)
                    })
                    .collect(),
            }),
            _ => Err(Error::unsupported(format!("resampling of spline order {order}; orders 0, 1 and 3 are"))),
        }
    }

    /// Samples of the input.
    pub(crate) fn input(&self) -> usize {
        match self {
            Axis::Same(n) | Axis::Nearest { n, .. } | Axis::Linear { n, .. } | Axis::Cubic { n, .. } => *n,
        }
    }

    /// Samples of the output.
    pub(crate) fn output(&self) -> usize {
        match self {
            Axis::Same(n) => *n,
            Axis::Nearest { index, .. } => index.len(),
            Axis::Linear { taps, .. } => taps.len(),
            Axis::Cubic { taps, .. } => taps.len(),
        }
    }

    /// True when the samples stay as they are.
    pub(crate) fn is_same(&self) -> bool {
        matches!(self, Axis::Same(_))
    }

    /// Output sample o as (i, j, w): `(1 - w) in[i] + w in[j]`. `None` for cubic axes, which have four neighbours.
    pub(crate) fn pair(&self, o: usize) -> Option<(usize, usize, f64)> {
        match self {
            Axis::Same(_) => Some((o, o, 0.0)),
            Axis::Nearest { index, .. } => index.get(o).map(|&i| (i, i, 0.0)),
            Axis::Linear { taps, .. } => taps.get(o).copied(),
            Axis::Cubic { .. } => None,
        }
    }

    /// A panel for [`Axis::run`] and the first row that the caller fills with input samples.
    pub(crate) fn panel(&self) -> (Vec<Lane>, usize) {
        let pad = if matches!(self, Axis::Cubic { .. }) { PAD } else { 0 };
        (vec![[0.0; LANES]; self.input() + 2 * pad], pad)
    }

    /// Resamples the lines of `panel` (made by [`Axis::panel`], input samples filled in; its values are lost) and
    /// hands the output samples to `emit` in rising order.
    pub(crate) fn run(&self, panel: &mut [Lane], mut emit: impl FnMut(usize, &Lane)) {
        match self {
            Axis::Same(_) => panel.iter().enumerate().for_each(|(o, v)| emit(o, v)),
            Axis::Nearest { index, .. } => index.iter().enumerate().for_each(|(o, &i)| emit(o, &panel[i])),
            Axis::Linear { taps, .. } => {
                for (o, &(i, j, w)) in taps.iter().enumerate() {
                    let (a, b) = (&panel[i], &panel[j]);
                    emit(o, &std::array::from_fn(|l| (1.0 - w) * a[l] + w * b[l]));
                }
            }
            Axis::Cubic { n, taps } => {
                let (first, last) = (panel[PAD], panel[PAD + n - 1]);
                panel[..PAD].fill(first);
                panel[PAD + n..].fill(last);
                prefilter(panel);
                for (o, &(i, [w0, w1, w2, w3])) in taps.iter().enumerate() {
                    let (a, b, c, d) = (&panel[i], &panel[i + 1], &panel[i + 2], &panel[i + 3]);
                    emit(o, &std::array::from_fn(|l| w0 * a[l] + w1 * b[l] + w2 * c[l] + w3 * d[l]));
                }
            }
        }
    }
}

/// Samples to cubic B-spline coefficients, in place, mirrored about the outer edges of the end samples.
fn prefilter(c: &mut [Lane]) {
    let n = c.len();
    // (1 - z)(1 - 1/z), the gain of the two recursions together.
    let gain = (1.0 - POLE) * (1.0 - 1.0 / POLE);
    let far = POLE.powi(n.min(1 << 20) as i32);
    let mut start: Lane = std::array::from_fn(|l| c[0][l] + far * c[n - 1][l]);
    let mut power = POLE;
    for i in 1..n.min(SERIES) {
        for l in 0..LANES {
            start[l] += power * (c[i][l] + far * c[n - 1 - i][l]);
        }
        power *= POLE;
    }
    for l in 0..LANES {
        c[0][l] = gain * (c[0][l] + start[l] * POLE / (1.0 - far * far));
    }
    for i in 1..n {
        let before = c[i - 1];
        for l in 0..LANES {
            c[i][l] = gain * c[i][l] + POLE * before[l];
        }
    }
    for l in 0..LANES {
        c[n - 1][l] *= POLE / (POLE - 1.0);
    }
    for i in (0..n - 1).rev() {
        let after = c[i + 1];
        for l in 0..LANES {
            c[i][l] = POLE * (after[l] - c[i][l]);
        }
    }
}
