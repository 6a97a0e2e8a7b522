//! Stochastic gradient descent as PyTorch and nnU-Net do it.

use std::collections::BTreeMap;

use super::tape::{Array, sum};

/// nnU-Net's learning rate of `epoch`: `initial * (1 - epoch / epochs)^0.9`.
pub fn poly_lr(initial: f64, epoch: usize, epochs: usize) -> f64 {
    initial * (1.0 - epoch as f64 / epochs as f64).powf(0.9)
}

/// Scales all gradients so that their Euclidean norm together is at most `largest`; returns the norm before.
pub fn clip(gradients: &mut BTreeMap<String, Vec<f64>>, largest: f64) -> f64 {
    let norm = sum(gradients.values().flatten().map(|g| g * g)).sqrt();
    let scale = (largest / (norm + 1e-6)).min(1.0);
    gradients.values_mut().flatten().for_each(|g| *g *= scale);
    norm
}

/// Gradient descent with weight decay and momentum, Nesterov's or plain.
#[derive(Debug)]
pub struct Sgd {
    pub weight_decay: f64,
    pub momentum: f64,
    pub nesterov: bool,
    velocity: BTreeMap<String, Vec<f64>>,
}

impl Sgd {
    pub fn new(weight_decay: f64, momentum: f64, nesterov: bool) -> Self {
        Self { weight_decay, momentum, nesterov, velocity: BTreeMap::new() }
    }

    /// `g += decay * p`, `v = momentum * v + g` (at first `v = g`), `p -= lr * (g + momentum * v)`, or `lr * v` without
    /// Nesterov; parameters without a gradient stay, decay included.
    pub fn step(&mut self, parameters: &mut BTreeMap<String, Array>, gradients: &BTreeMap<String, Vec<f64>>, lr: f64) {
        for (name, g) in gradients {
            let p = parameters.get_mut(name).unwrap_or_else(|| panic!("no parameter {name}"));
            // From rest, the first velocity is the first gradient.
            let velocity = self.velocity.entry(name.clone()).or_insert_with(|| vec![0.0; g.len()]);
            for ((p, g), v) in p.values.iter_mut().zip(g).zip(velocity) {
                let g = g + self.weight_decay * *p;
                *v = self.momentum * *v + g;
                *p -= lr * if self.nesterov { g + self.momentum * *v } else { *v };
            }
        }
    }
}
