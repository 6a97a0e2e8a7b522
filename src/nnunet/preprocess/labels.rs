//! Resampling of label maps: the indicator of every label is interpolated, and a rule decides between them (nnU-Net
//! `resample_data_or_seg` with `is_seg`, batchgenerators `resize_segmentation`).

use bytemuck::Zeroable;

use super::resample::{axes, zeros};
use super::spline::Axis;
use crate::base::par;
use crate::error::{Error, Result};
use crate::nnunet::plans::Resampling;

/// How a voxel's label is decided from the shares that labels have of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vote {
    /// The highest label that has half of it, 0 where none has (batchgenerators up to 0.25.1, used by nnU-Net v1).
    Half,
    /// The label with the largest share; among equal ones that of the nearest voxel, or else the lowest (batchgenerators
    /// from 0.25.5 on, used by nnU-Net v2).
    Largest,
}

/// Resamples a label map; `labels` is (z, y, x) with `from` voxels, the result has `to`.
///
/// Shares are sums of f64 products in the order in which scipy adds them up, so that equal shares are found equal.
///
/// # Errors
/// [`Error::Unsupported`] for orders other than 0 and 1; [`Error::OutOfMemory`].
pub(crate) fn resample_labels<T: Copy + Default + Ord + Zeroable + Send + Sync>(
    labels: &[T],
    from: [usize; 3],
    to: [usize; 3],
    rule: &Resampling,
    apart: Option<usize>,
    vote: Vote,
) -> Result<Vec<T>> {
    let what = || Error::unsupported(format!("resampling of label maps with spline order {}", rule.order));
    let table = |axis: &Axis| -> Result<Vec<(usize, usize, f64)>> {
        (0..axis.output()).map(|o| axis.pair(o).ok_or_else(what)).collect()
    };
    if apart.is_some_and(|axis| rule.order_z != 0 && from[axis] != to[axis]) {
        let what = format!("resampling of label maps with order {} along the coarse axis; 0 is", rule.order_z);
        return Err(Error::unsupported(what));
    }
    let [az, ay, ax] = axes(from, to, rule, apart)?;
    let [tz, ty, tx] = [table(&az)?, table(&ay)?, table(&ax)?];
    let nearest = |k: usize| -> Result<Vec<usize>> {
        let axis = Axis::new(from[k], to[k], 0)?;
        (0..to[k]).map(|o| axis.pair(o).map(|(i, ..)| i).ok_or_else(what)).collect()
    };
    let [nz, ny, nx] = [nearest(0)?, nearest(1)?, nearest(2)?];
    let mut out: Vec<T> = zeros(to.iter().product(), "resampling of labels")?;
    par::chunks_mut(&mut out, to[1] * to[2], |z, plane| {
        let (z0, z1, wz) = tz[z];
        for (y, row) in plane.chunks_mut(to[2]).enumerate() {
            let (y0, y1, wy) = ty[y];
            let at = |z: usize, y: usize| &labels[(z * from[1] + y) * from[2]..][..from[2]];
            let lines = [at(z0, y0), at(z0, y1), at(z1, y0), at(z1, y1)];
            let weights = [(1.0 - wz) * (1.0 - wy), (1.0 - wz) * wy, wz * (1.0 - wy), wz * wy];
            let near = at(nz[z], ny[y]);
            for (x, o) in row.iter_mut().enumerate() {
                let (x0, x1, wx) = tx[x];
                let first = lines[0][x0];
                *o = if lines.iter().all(|l| l[x0] == first && l[x1] == first) {
                    first
                } else {
                    let eight = Eight::of(&lines, &weights, x0, x1, wx);
                    match vote {
                        Vote::Half => eight.half(),
                        Vote::Largest => eight.largest(near[nx[x]]),
                    }
                };
            }
        }
    });
    Ok(out)
}

/// A voxel's eight neighbours and their weights.
struct Eight<T> {
    labels: [T; 8],
    weights: [f64; 8],
}

impl<T: Copy + Default + Ord> Eight<T> {
    fn of(lines: &[&[T]; 4], weights: &[f64; 4], x0: usize, x1: usize, wx: f64) -> Self {
        Self {
            labels: std::array::from_fn(|i| lines[i / 2][if i % 2 == 0 { x0 } else { x1 }]),
            weights: std::array::from_fn(|i| weights[i / 2] * if i % 2 == 0 { 1.0 - wx } else { wx }),
        }
    }

    /// Every label once, with its share.
    fn shares(&self) -> impl Iterator<Item = (T, f64)> {
        (0..8).filter(|&i| !self.labels[..i].contains(&self.labels[i])).map(|i| {
            let same = self.labels.iter().zip(&self.weights).filter(|(l, _)| **l == self.labels[i]);
            (self.labels[i], same.fold(0.0, |sum, (_, w)| sum + w))
        })
    }

    fn half(&self) -> T {
        self.shares().filter(|(_, share)| *share >= 0.5).map(|(label, _)| label).max().unwrap_or_default()
    }

    fn largest(&self, nearest: T) -> T {
        let (mut best, mut most) = (nearest, 0.0);
        for (label, share) in self.shares() {
            let level = share == most && most > 0.0;
            if share > most || (level && best != nearest && (label == nearest || label < best)) {
                (best, most) = (label, share);
            }
        }
        best
    }
}

/// One channel per label of `wanted`: 1 where it is, 0 elsewhere (nnU-Net `convert_labelmap_to_one_hot`).
pub(crate) fn one_hot<L: Copy + Into<i32>>(labels: &[L], wanted: &[u16], out: &mut [f32]) {
    for (&label, out) in wanted.iter().zip(out.chunks_exact_mut(labels.len().max(1))) {
        for (out, &l) in out.iter_mut().zip(labels) {
            *out = if l.into() == i32::from(label) { 1.0 } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::resample::{Held, View, resample};
    use super::*;
    use crate::base::rng::Rng;
    use crate::tensor::Isa;

    fn rule(order: u8) -> Resampling {
        Resampling { order, order_z: 0, force_separate_z: None }
    }

    /// The definition: the indicator of every label resampled as an image. `None` where it is nearly level.
    fn by_indicators(
        labels: &[u8],
        from: [usize; 3],
        to: [usize; 3],
        rule: &Resampling,
        apart: Option<usize>,
        vote: Vote,
    ) -> Vec<Option<u8>> {
        let shares: Vec<Vec<f32>> = (0..=*labels.iter().max().unwrap())
            .map(|label| {
                let indicator: Vec<f32> = labels.iter().map(|&l| f32::from(u8::from(l == label))).collect();
                let mut share = vec![0.0; to.iter().product()];
                let held = Held { array: &indicator, view: View::whole(from) };
                resample(&held, to, rule, apart, Isa::detect(), &mut share).unwrap();
                share
            })
            .collect();
        (0..to.iter().product())
            .map(|i| {
                let mut sorted: Vec<(f32, u8)> = shares.iter().zip(0..).map(|(s, l)| (s[i], l)).collect();
                sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
                match vote {
                    Vote::Largest => (sorted[0].0 - sorted[1].0 > 1e-5).then_some(sorted[0].1),
                    // 1/3 + 1/6 may be a hair below 1/2, here or there.
                    Vote::Half if sorted.iter().any(|s| (s.0 - 0.5).abs() < 1e-5) => None,
                    Vote::Half => Some(if sorted[0].0 > 0.5 { sorted[0].1 } else { 0 }),
                }
            })
            .collect()
    }

    #[test]
    fn labels_are_resampled_by_their_shares() {
        let mut rng = Rng::new(11, 0);
        let from = [5, 6, 7];
        let labels: Vec<u8> = (0..from.iter().product()).map(|_| rng.uniform(0.0, 4.0) as u8).collect();
        for (order, vote) in [(0, Vote::Half), (1, Vote::Half), (0, Vote::Largest), (1, Vote::Largest)] {
            for apart in [None, Some(0), Some(1), Some(2)] {
                for to in [[5, 6, 7], [11, 5, 9], [4, 13, 17]] {
                    let ours = resample_labels(&labels, from, to, &rule(order), apart, vote).unwrap();
                    let reference = by_indicators(&labels, from, to, &rule(order), apart, vote);
                    let odd = ours.iter().zip(&reference).filter(|(o, r)| r.is_some_and(|r| r != **o)).count();
                    assert_eq!(odd, 0, "{order} {vote:?} {apart:?} {to:?}");
                }
            }
        }
    }

    /// `resize_segmentation(a, shape, 1)` of batchgenerators 0.25.1 on exact ties: the later label wins; where three
    /// labels share a voxel and none has half of it, background.
    #[test]
    fn half_breaks_ties_upwards_and_falls_back_to_background() {
        let half = |labels: &[u16], from, to| resample_labels(labels, from, to, &rule(1), None, Vote::Half).unwrap();
        assert_eq!(half(&[1, 2, 2, 1], [1, 1, 4], [1, 1, 2]), [2, 2]);
        assert_eq!(half(&[1, 2, 3, 4], [1, 2, 2], [1, 1, 1]), [0]);
        assert_eq!(half(&[5, 0, 300, 0], [1, 2, 2], [1, 1, 1]), [0]);
    }

    /// `resize_segmentation(a, shape, 1)` of batchgenerators 0.25.5 on exact ties.
    #[test]
    fn largest_breaks_ties_by_the_nearest_voxel_then_downwards() {
        let largest =
            |labels: &[i16], from, to| resample_labels(labels, from, to, &rule(1), None, Vote::Largest).unwrap();
        // Halfway, scipy's nearest neighbour is the later voxel.
        assert_eq!(largest(&[1, 2, 2, 1], [1, 1, 4], [1, 1, 2]), [2, 1]);
        assert_eq!(largest(&[1, 2, 3, 4], [1, 2, 2], [1, 1, 1]), [4]);
        // The nearest voxel's label has lost: the lowest of the tied ones.
        assert_eq!(largest(&[3, 1, 1, 1, 2, 2, 2, 3], [2, 2, 2], [1, 1, 1]), [1]);
        assert_eq!(largest(&[-1, 0, -1, 0], [1, 2, 2], [1, 1, 1]), [0]);
    }

    #[test]
    fn unknown_orders_are_refused() {
        assert!(resample_labels(&[0u8; 8], [2; 3], [3; 3], &rule(3), None, Vote::Half).is_err());
        let linear_z = Resampling { order: 1, order_z: 1, force_separate_z: None };
        assert!(resample_labels(&[0u8; 8], [2; 3], [3; 3], &linear_z, Some(0), Vote::Largest).is_err());
    }
}
