//! Seeded random parameters.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::ParamSource;
use crate::base::rng::Rng;
use crate::error::{Error, Result};

/// How filters and their biases begin. `fan in` is the product of a filter's sizes but the first, which for a transposed
/// convolution counts output channels, as PyTorch does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scheme {
    /// Filters normal of variance `2 / (1 + 0.01^2) / fan in`, zero biases: nnU-Net's `InitWeights_He(1e-2)` (He et al.,
    /// "Delving deep into rectifiers", 2015).
    #[default]
    He,
    /// Filters and biases uniform within `1 / sqrt(fan in)`: what PyTorch's layers do by themselves.
    Torch,
}

/// Random parameters of a network; norms begin with weight 1 and bias 0. The values depend on seed, name and shapes only, not
/// on the order in which they are asked for.
#[derive(Debug, Clone)]
pub struct RandomParams {
    seed: u64,
    scheme: Scheme,
    shapes: BTreeMap<String, Vec<usize>>,
    zeros: BTreeSet<String>,
}

impl RandomParams {
    /// Parameters of the given names and shapes, by [`Scheme::He`].
    #[must_use]
    pub fn new(seed: u64, shapes: BTreeMap<String, Vec<usize>>) -> Self {
        Self { seed, scheme: Scheme::He, shapes, zeros: BTreeSet::new() }
    }

    /// The same by another scheme.
    #[must_use]
    pub fn scheme(self, scheme: Scheme) -> Self {
        Self { scheme, ..self }
    }

    /// The same with zeros for the parameters whose names `are_zero` picks: those of the last norm of a residual block, which
    /// then begins as its shortcut (nnU-Net's `init_last_bn_before_add_to_0`).
    #[must_use]
    pub fn zeros(mut self, are_zero: impl Fn(&str) -> bool) -> Self {
        self.zeros.extend(self.shapes.keys().filter(|n| are_zero(n)).cloned());
        self
    }

    fn fill(&self, name: &str, n: usize, mut next: impl FnMut(&mut Rng) -> f64) -> Vec<f32> {
        // FNV-1a of the name separates the streams of different parameters.
        let stream =
            name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut rng = Rng::new(self.seed, stream);
        (0..n).map(|_| next(&mut rng) as f32).collect()
    }
}

impl ParamSource for RandomParams {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let shape = self.shapes.get(name).ok_or_else(|| self.error(name, "missing".into()))?;
        let n: usize = shape.iter().product();
        // A vector belongs to a filter or to a norm; only a norm's weight is a vector, too.
        let filter = match name.strip_suffix(".bias") {
            Some(layer) if shape.len() == 1 => self.shapes.get(&format!("{layer}.weight")),
            _ => Some(shape),
        };
        let filter = filter.filter(|s| s.len() > 1);
        let fan_in = filter.map_or(0, |s| s[1..].iter().product::<usize>());
        if self.zeros.contains(name) {
            return Ok(Cow::Owned(vec![0.0; n]));
        }
        Ok(Cow::Owned(match (self.scheme, filter) {
            (_, None) => vec![f32::from(u8::from(name.ends_with("weight"))); n],
            (Scheme::He, Some(_)) if shape.len() == 1 => vec![0.0; n],
            (Scheme::He, Some(_)) => {
                let std = (2.0 / (1.0 + 0.01f64 * 0.01) / fan_in as f64).sqrt();
                self.fill(name, n, |rng| rng.normal() * std)
            }
            (Scheme::Torch, Some(_)) => {
                let most = 1.0 / (fan_in as f64).sqrt();
                self.fill(name, n, |rng| rng.uniform(-most, most))
            }
        }))
    }

    fn error(&self, name: &str, what: String) -> Error {
        Error::model(Path::new("random parameters"), name, what)
    }
}
