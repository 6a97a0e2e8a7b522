//! Resampling along one axis: order 0 (nearest), 1 (linear) and 3 (cubic B-spline).
//!
//! The mathematics of `skimage.transform.resize(mode="edge", anti_aliasing=False)`, which is
//! `scipy.ndimage.zoom(grid_mode=True, mode="nearest")`: output sample o of m lies at (o + 1/2) n / m - 1/2 between the
//! n input samples. Splines are tensor products, so a volume is resampled axis by axis.

use crate::error::{Error, Result};
use crate::ops::resample::{Four, LANES, Lane, Pair, cubic, linear, prefilter};
use crate::tensor::Isa;

/// scipy repeats the edge sample this often before it prefilters, and mirrors only beyond.
const PAD: usize = 12;

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
        taps: Vec<Pair>,
    },
    /// Output sample o is the spline whose coefficients (after padding) from `taps[o].0` have weights `taps[o].1`.
    Cubic {
        /// Samples of the input.
        n: usize,
        /// Source of every output sample.
        taps: Vec<Four>,
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

    /// Sizes `panel` for [`Axis::run`] and returns the first lane that the caller fills with input samples.
    pub(crate) fn panel(&self, panel: &mut Vec<Lane>) -> usize {
        let pad = if matches!(self, Axis::Cubic { .. }) { PAD } else { 0 };
        panel.resize(self.input() + 2 * pad, [0.0; LANES]);
        pad
    }

    /// Resamples the lines of `panel` (made by [`Axis::panel`], input samples filled in; its values are lost) into
    /// `out`, a lane per output sample.
    pub(crate) fn run(&self, isa: Isa, panel: &mut [Lane], out: &mut [Lane]) {
        match self {
            Axis::Same(_) => out.copy_from_slice(panel),
            Axis::Nearest { index, .. } => out.iter_mut().zip(index).for_each(|(o, &i)| *o = panel[i]),
            Axis::Linear { taps, .. } => linear(isa, taps, panel, out),
            Axis::Cubic { n, taps } => {
                let (first, last) = (panel[PAD], panel[PAD + n - 1]);
                panel[..PAD].fill(first);
                panel[PAD + n..].fill(last);
                prefilter(isa, panel);
                cubic(isa, taps, panel, out);
            }
        }
    }
}
