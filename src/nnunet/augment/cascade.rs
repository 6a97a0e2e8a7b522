//! The labels of the stage before in a cascade: one channel each, made imperfect.

use super::morphology::{Operator, Structure, small_components};
use crate::base::rng::Rng;

/// A binary operator on the channel of a label.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Operation {
    /// Which of the labels of the stage before.
    pub channel: usize,
    /// What is done to its voxels.
    pub operator: Operator,
    /// Radius of the ball, of the disk in 2D, in voxels.
    pub radius: f64,
}

/// A connected component of a label is taken away.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Removal {
    /// Which of the labels of the stage before.
    pub channel: usize,
    /// Which of the components that may be taken: from 0, the first, up to but not including 1, behind the last.
    pub choice: f64,
}

/// Components that are larger are never taken away, as a share of the patch.
const LARGEST: f64 = 0.15;

pub(super) fn draw_operations(rng: &mut Rng, labels: usize) -> Vec<Operation> {
    let all = [Operator::Dilation, Operator::Erosion, Operator::Closing, Operator::Opening];
    let chosen = draw_channels(rng, 0.4, labels);
    let operation = |channel| {
        let operator = all[rng.below(4) as usize];
        Operation { channel, operator, radius: rng.uniform(1.0, 8.0) }
    };
    chosen.into_iter().map(operation).collect()
}

pub(super) fn draw_removals(rng: &mut Rng, labels: usize) -> Vec<Removal> {
    let chosen = draw_channels(rng, 0.2, labels);
    chosen.into_iter().map(|channel| Removal { channel, choice: rng.unit() }).collect()
}

/// With probability `gate` all labels in random order, each with probability 1/2.
fn draw_channels(rng: &mut Rng, gate: f64, labels: usize) -> Vec<usize> {
    let mut order: Vec<usize> = if rng.chance(gate) { (0..labels).collect() } else { Vec::new() };
    rng.shuffle(&mut order);
    order.retain(|_| rng.chance(0.5));
    order
}

/// `ApplyRandomBinaryOperatorTransform`, then `RemoveRandomConnectedComponentFromOneHotEncodingTransform`.
pub(super) fn apply(
    operations: &[Operation],
    removals: &[Removal],
    shape: [usize; 3],
    flat: bool,
    channels: &mut [f32],
) {
    let volume = shape.iter().product::<usize>().max(1);
    for o in operations {
        let structure = if flat { Structure::disk(o.radius) } else { Structure::ball(o.radius) };
        let own = &mut channels[o.channel * volume..][..volume];
        let mut added = structure.apply(o.operator, shape, own);
        for (own, now) in own.iter_mut().zip(&mut added) {
            (*own, *now) = (if *now { 1.0 } else { 0.0 }, *now && *own == 0.0);
        }
        // What is new here is no longer anything else.
        for (_, other) in channels.chunks_exact_mut(volume).enumerate().filter(|(c, _)| *c != o.channel) {
            other.iter_mut().zip(&added).filter(|(_, added)| **added).for_each(|(v, _)| *v = 0.0);
        }
    }
    for r in removals {
        remove(r, shape, &mut channels[r.channel * volume..][..volume]);
    }
}

fn remove(removal: &Removal, shape: [usize; 3], channel: &mut [f32]) {
    let components = small_components(shape, channel, LARGEST);
    let chosen = (removal.choice * components.len() as f64) as usize;
    for run in components.get(chosen).into_iter().flatten() {
        channel[run.clone()].fill(0.0);
    }
}
