//! Transforms of the values of one channel.
//!
//! Maps of single values are not carried out but put together, and done by whoever reads the values next: brightness,
//! contrast and the ends of a gamma transform cost no pass over memory. What is known of the values is kept beside them.

use super::{AugmentConfig, Parameters};
use crate::base::rng::Key;
use crate::error::{Error, Result};
use crate::ops::blur::{Kernel, TAPS, blur};
use crate::ops::intensity::{Flip, Map, Power, Stats, add_noise, power, put, stats};
use crate::ops::low_resolution::low_resolution;
use crate::tensor::Isa;

/// A channel under way, on the processor or on a card: what can be done to its values.
pub(super) trait Values {
    /// Adds `sigma` times the standard normal numbers of a stream.
    fn noise(&mut self, sigma: f32, key: Key) -> Result<()>;
    /// Filters along z, y and x; at most once, before anything below.
    fn blur(&mut self, kernels: &[Kernel; 3]) -> Result<()>;
    /// `v <- scale v + shift`.
    fn affine(&mut self, scale: f64, shift: f64) -> Result<()>;
    /// `ContrastTransform` with `preserve_range`; before it no map has bounds.
    fn contrast(&mut self, factor: f64) -> Result<()>;
    /// `SimulateLowResolutionTransform`: "nearest-exact" down, linear up.
    fn low_resolution(&mut self, coarse: [usize; 3]) -> Result<()>;
    /// `GammaTransform` with `p_retain_stats` 1.
    fn gamma(&mut self, gamma: f32) -> Result<()>;
}

/// All transforms of the values of channel `index`, but for what [`Parameters::mirror`] does.
pub(super) fn transform(config: &AugmentConfig, p: &Parameters, index: usize, x: &mut impl Values) -> Result<()> {
    let shape = config.patch;
    if let Some(noise) = &p.noise {
        x.noise(noise.sigma(), noise.field(index))?;
    }
    if let Some(sigmas) = p.blur.get(index).copied().flatten() {
        let mut kernels = sigmas.map(gaussian);
        if config.two_d {
            kernels[0] = Kernel { weights: [1.0; TAPS], len: 1 };
        }
        x.blur(&kernels)?;
    }
    if let Some(&factor) = p.brightness.get(index) {
        x.affine(f64::from(factor), 0.0)?;
    }
    if let Some(&factor) = p.contrast.get(index) {
        x.contrast(f64::from(factor))?;
    }
    if let Some(scale) = p.low_resolution.get(index).copied().flatten() {
        let along = |k| if k == 0 && config.planes { shape[0] } else { coarse(shape[k], scale) };
        x.low_resolution([0, 1, 2].map(along))?;
    }
    if let Some(&gamma) = p.gamma_inverted.get(index) {
        x.affine(-1.0, 0.0)?;
        x.gamma(gamma)?;
        x.affine(-1.0, 0.0)?;
    }
    if let Some(&gamma) = p.gamma.get(index) {
        x.gamma(gamma)?;
    }
    Ok(())
}

/// Whether a channel is 0 outside of the nonzero mask.
pub(super) fn masked(config: &AugmentConfig, index: usize) -> bool {
    config.masked.get(index).is_some_and(|m| *m)
}

/// Memory to work with.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// A channel that is not where it was.
    moved: Vec<f32>,
    small: Vec<f32>,
}

/// A channel under way on the processor: its values are `map(x)`.
pub(super) struct Channel<'c> {
    isa: Isa,
    shape: [usize; 3],
    x: &'c mut [f32],
    map: Map,
    known: Option<Stats>,
    /// Memory for a channel that is filtered.
    moved: Option<&'c mut Vec<f32>>,
    small: &'c mut Vec<f32>,
}

/// Python's `round(n * scale)`.
fn coarse(n: usize, scale: f32) -> usize {
    ((n as f64 * f64::from(scale)).round_ties_even() as usize).max(1)
}

impl<'c> Channel<'c> {
    pub(super) fn new(isa: Isa, shape: [usize; 3], x: &'c mut [f32], memory: &'c mut Memory) -> Self {
        let Memory { moved, small } = memory;
        Self { isa, shape, x, map: Map::IDENTITY, known: None, moved: Some(moved), small }
    }

    /// The mirrored values, 0 where `outside` is negative.
    pub(super) fn put(self, axes: [bool; 3], outside: Option<&[i16]>, out: &mut [f32]) {
        put(self.isa, Flip { shape: self.shape, axes }, self.map, self.x, outside, out);
    }

    fn stats(&mut self) -> Stats {
        let (isa, x, map) = (self.isa, &*self.x, self.map);
        *self.known.get_or_insert_with(|| stats(isa, x, map))
    }
}

impl Values for Channel<'_> {
    fn noise(&mut self, sigma: f32, key: Key) -> Result<()> {
        add_noise(self.isa, self.x, sigma, key);
        Ok(())
    }

    fn blur(&mut self, kernels: &[Kernel; 3]) -> Result<()> {
        let moved = self.moved.take().ok_or_else(|| Error::shape("blur", "a second filter"))?;
        moved.resize(self.x.len(), 0.0);
        blur(self.isa, self.shape, kernels, self.x, self.small, moved);
        self.x = moved;
        Ok(())
    }

    fn affine(&mut self, scale: f64, shift: f64) -> Result<()> {
        let of = |v: f32| (f64::from(v) * scale + shift) as f32;
        let turned = |low: f32, high: f32| if scale < 0.0 { (of(high), of(low)) } else { (of(low), of(high)) };
        let (low, high) = turned(self.map.low, self.map.high);
        self.map = Map {
            scale: (f64::from(self.map.scale) * scale) as f32,
            shift: of(self.map.shift),
            // No bound times 0 is none.
            low: if low.is_nan() { f32::NEG_INFINITY } else { low },
            high: if high.is_nan() { f32::INFINITY } else { high },
        };
        self.known = self.known.map(|s| {
            let (min, max) = turned(s.min, s.max);
            Stats { mean: s.mean * scale + shift, std: s.std * scale.abs(), min, max }
        });
        Ok(())
    }

    fn contrast(&mut self, factor: f64) -> Result<()> {
        let s = self.stats();
        self.affine(factor, s.mean * (1.0 - factor))?;
        (self.map.low, self.map.high) = (s.min, s.max);
        self.known = None;
        Ok(())
    }

    fn low_resolution(&mut self, coarse: [usize; 3]) -> Result<()> {
        low_resolution(self.isa, self.shape, coarse, self.map, self.x, self.small);
        (self.map, self.known) = (Map::IDENTITY, None);
        Ok(())
    }

    fn gamma(&mut self, gamma: f32) -> Result<()> {
        let before = self.stats();
        let how = Power { min: before.min, max: before.max, gamma };
        let after = power(self.isa, self.x, self.map, how);
        (self.map, self.known) = (Map::IDENTITY, Some(after));
        let scale = before.std / after.std.max(1e-7);
        self.affine(scale, before.mean - after.mean * scale)
    }
}

/// batchgeneratorsv2's `blur_dimension` with `truncate=6`: the odd length nearest to `6 sigma + 1/2`.
fn gaussian(sigma: f64) -> Kernel {
    let n = 6.0 * sigma + 0.5;
    let whole = n.round_ties_even();
    let nearest = if whole % 2.0 == 1.0 {
        whole
    } else if n >= whole {
        whole + 1.0
    } else {
        whole - 1.0
    };
    let len = (nearest.max(1.0) as usize).min(TAPS);
    let mut weights = [0.0f64; TAPS];
    for (k, w) in weights.iter_mut().enumerate().take(len) {
        *w = (-0.5 * ((k as f64 - (len - 1) as f64 / 2.0) / sigma).powi(2)).exp();
    }
    let sum: f64 = weights.iter().sum();
    Kernel { weights: weights.map(|w| (w / sum) as f32), len }
}
