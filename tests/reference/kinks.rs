//! On which side of leaky ReLU's kink a float32 run was, where rounding decides.
//!
//! A voxel whose input to a leaky ReLU is within rounding of zero may be on one side of the kink in one run and on the
//! other in the next: the values hardly differ, but the gradient goes back by a slope of 1 in one and of 0.01 in the
//! other, which can move gradients by a thousandth. Both are right. Here such voxels are found and turned until the
//! reference's gradients are those of the run. However they are found, what is proved is the same: that the run's
//! gradients are those of the reference with a few voxels, each within rounding of its kink, on the other side. A wrong
//! gradient cannot pass so: thousands of numbers are to be met with a handful of choices between two.

use std::collections::BTreeMap;

use super::golden::{Forward, norm};
use super::net::{Kinks, SLOPE};
use super::tape::{Gradients, sum};

/// How far from the kink a voxel may be turned, in standard deviations of the run's error: one error of 16 000 in a normal
/// distribution is larger.
const REACH: f64 = 4.0;
/// A smaller part of the bound on the gradient of a norm's shift cannot be told from rounding, and need not.
const VISIBLE: f64 = 0.05;

/// By name of the parameter.
pub type ByName = BTreeMap<String, Vec<f64>>;

/// A voxel on the other side of its kink.
#[derive(Debug)]
pub struct Turned {
    /// Name of the norm before the leaky ReLU.
    pub norm: String,
    pub voxel: usize,
    /// Its distance from the kink in standard deviations of the run's error.
    pub away: f64,
}

/// The reference with voxels on the run's side.
pub struct Explained {
    pub gradients: ByName,
    pub turned: Vec<Turned>,
    /// How many voxels were near enough to be turned.
    pub near: usize,
}

impl Explained {
    /// Whether rounding turns that many. A voxel anywhere within 4 deviations of its kink changes sides with a chance of
    /// the mean of |error|, 0.8 deviations, over 8: one of ten. More than 2 and a quarter of them are turned in one of
    /// several hundred passes at most, however many are near.
    pub fn is_plausible(&self) -> bool {
        self.turned.len() <= 2 + self.near / 4
    }
}

/// What there is to explain.
pub struct Run<'a> {
    pub gradients: &'a ByName,
    /// How far, as a norm, each gradient may be from the reference; gradients without a bound are left out.
    pub bounds: &'a BTreeMap<String, f64>,
    /// Relative error of the run's values.
    pub spread: f64,
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// What such a change at a voxel does to the gradients of the parameters from the last convolution on.
fn effect(forward: &Forward, kinks: &Kinks, voxel: usize, change: f64) -> ByName {
    let mut dx = vec![0.0; forward.tape.value(kinks.x).values.len()];
    dx[voxel] = change;
    forward.by_parameter(&forward.tape.backward_between(kinks.x, dx, kinks.first))
}

impl Run<'_> {
    /// Turns voxels of the reference, which holds the same parameters and whose gradients are `all`, until its gradients
    /// are this run's.
    ///
    /// Leaky ReLUs are visited from the loss to the input: a voxel changes only gradients before it, so that at each the
    /// turned voxels behind it are known. What one voxel does to the parameters from the last convolution to the leaky
    /// ReLU tells whether it is turned in the run: the difference that is left has that part once or not at all.
    pub fn explain(&self, forward: &mut Forward, mut all: Gradients) -> Explained {
        let mut gradients = forward.by_parameter(&all);
        let (mut turned, mut near) = (Vec::new(), 0);
        for kinks in forward.pass.kinks.clone().iter().rev() {
            let x = &forward.tape.value(kinks.x).values;
            let deviation = self.spread * norm(x.iter().copied()) / (x.len() as f64).sqrt();
            let voxels: Vec<usize> = (0..x.len()).filter(|i| x[*i].abs() <= REACH * deviation).collect();
            near += voxels.len();
            if voxels.is_empty() || self.within(&gradients) {
                continue;
            }
            let changes = self.changes(forward, &all, kinks, &voxels, &gradients);
            let effects = changes.into_iter().map(|(v, change)| (v, effect(forward, kinks, v, change))).collect();
            let chosen = self.choose(effects, &gradients);
            for &voxel in &chosen {
                let away = forward.tape.value(kinks.x).values[voxel] / deviation;
                turned.push(Turned { norm: kinks.norm.clone(), voxel, away });
                forward.tape.turn(kinks.y, voxel);
            }
            if !chosen.is_empty() {
                all = forward.tape.backward(forward.loss);
                gradients = forward.by_parameter(&all);
            }
        }
        Explained { gradients, turned, near }
    }

    fn within(&self, gradients: &ByName) -> bool {
        self.bounds.iter().all(|(n, most)| norm(difference(&self.gradients[n], &gradients[n])) <= *most)
    }

    /// Inner product in which each gradient's bound has the norm 1.
    fn dot(&self, a: &ByName, b: &ByName) -> f64 {
        let of = |(n, a): (&String, &Vec<f64>)| {
            let most = self.bounds.get(n)?;
            Some(sum(a.iter().zip(&b[n]).map(|(a, b)| a * b)) / most.powi(2))
        };
        sum(a.iter().filter_map(of))
    }

    /// By how much turning each voxel changes the gradient by the leaky ReLU's input, and the gradient of its channel's
    /// shift; without those that are too small to be seen there, or too large to be part of what is left there.
    fn changes(
        &self,
        forward: &Forward,
        all: &Gradients,
        kinks: &Kinks,
        voxels: &[usize],
        gradients: &ByName,
    ) -> Vec<(usize, f64)> {
        // The loss does not depend on this one.
        let Some(dy) = all.of(kinks.y) else { return Vec::new() };
        let shift = format!("{}.bias", kinks.norm);
        let (left, bound) = (difference(&self.gradients[&shift], &gradients[&shift]), self.bounds[&shift]);
        let x = forward.tape.value(kinks.x);
        let channel = |voxel: usize| voxel / x.voxels() % x.dims[1];
        let change = |v: &usize| (*v, dy[*v] * if x.values[*v] > 0.0 { SLOPE - 1.0 } else { 1.0 - SLOPE });
        let mut changes: Vec<(usize, f64)> = voxels.iter().map(change).collect();
        let mut together = vec![0.0; x.dims[1]];
        changes.iter().for_each(|(v, change)| together[channel(*v)] += change.abs());
        changes.retain(|(v, change)| {
            let (change, c) = (change.abs(), channel(*v));
            let others = together[c] - change;
            (VISIBLE * bound..=left[c].abs() + bound + others).contains(&change)
        });
        changes
    }

    /// The voxels whose effects, each taken once, bring the reference nearest to the run: one after the other, the best
    /// first.
    fn choose(&self, mut effects: Vec<(usize, ByName)>, gradients: &ByName) -> Vec<usize> {
        let mut chosen = Vec::new();
        let Some((_, first)) = effects.first() else { return chosen };
        let left = |n: &String| (n.clone(), difference(&self.gradients[n], &gradients[n]));
        let mut left: ByName = first.keys().map(left).collect();
        loop {
            // By how much taking the effect shortens what is left, squared: positive where the best factor of the effect
            // is nearer to 1 than to 0.
            let gain = |e: &ByName| 2.0 * self.dot(e, &left) - self.dot(e, e);
            let gains = effects.iter().enumerate().map(|(i, (_, e))| (gain(e), i));
            let Some((gain, i)) = gains.max_by(|a, b| a.0.total_cmp(&b.0)) else { break };
            if gain <= 0.0 {
                break;
            }
            let (voxel, effect) = effects.swap_remove(i);
            for (n, e) in effect {
                left.get_mut(&n).unwrap().iter_mut().zip(e).for_each(|(l, e)| *l -= e);
            }
            chosen.push(voxel);
        }
        chosen
    }
}
