//! Seeded random parameters, for benchmarks and tests of networks without a checkpoint.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use crate::base::rng::Rng;
use crate::error::{Error, Result};
use crate::nn::ParamSource;

/// He-normal filters (fan in, leaky ReLU slope 0.01), zero biases, unit norm weights, as nnU-Net v1 initialises
/// (`InitWeights_He(1e-2)`). The values depend on seed and name only.
#[derive(Debug, Clone)]
pub struct RandomParams {
    seed: u64,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl RandomParams {
    /// Parameters of the given names and shapes.
    #[must_use]
    pub fn new(seed: u64, shapes: BTreeMap<String, Vec<usize>>) -> Self {
        Self { seed, shapes }
    }
}

impl ParamSource for RandomParams {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let shape = self.shapes.get(name).ok_or_else(|| self.error(name, "missing".into()))?;
        let n: usize = shape.iter().product();
        if shape.len() == 1 {
            return Ok(Cow::Owned(vec![f32::from(u8::from(name.contains("norm") && name.ends_with("weight"))); n]));
        }
        let fan_in: usize = shape[1..].iter().product();
        let std = (2.0 / (1.0 + 0.01f64 * 0.01) / fan_in as f64).sqrt();
        // FNV-1a of the name separates the streams of different parameters.
        let stream =
            name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut rng = Rng::new(self.seed, stream);
        Ok(Cow::Owned((0..n).map(|_| (rng.normal() * std) as f32).collect()))
    }

    fn error(&self, name: &str, what: String) -> Error {
        Error::model(Path::new("random parameters"), name, what)
    }
}
