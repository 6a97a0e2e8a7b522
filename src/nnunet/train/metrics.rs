//! How well a network does on patches while it learns: nnU-Net's pseudo Dice (`validation_step`,
//! `on_validation_epoch_end`).

use crate::base::par;
use crate::error::{Error, Result};
use crate::ops::{LabelMap, Outputs};
use crate::tensor::Tensor;

/// Voxels of a piece of parallel work.
const PIECE: usize = 8192;

/// Voxels by what became of them, of every class that counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Counts {
    hit: Vec<u64>,
    wrong: Vec<u64>,
    missed: Vec<u64>,
}

impl Counts {
    fn new(classes: usize) -> Self {
        Self { hit: vec![0; classes], wrong: vec![0; classes], missed: vec![0; classes] }
    }

    /// Counts a voxel of the class `label` for which `found` was found, both below the number of classes.
    fn voxel(&mut self, found: usize, label: usize) {
        match (found, label) {
            (0, 0) => {}
            (a, b) if a == b => self.hit[a - 1] += 1,
            (a, b) => {
                if a > 0 {
                    self.wrong[a - 1] += 1;
                }
                if b > 0 {
                    self.missed[b - 1] += 1;
                }
            }
        }
    }

    /// Adds another count, or takes it over where there is none yet.
    pub(super) fn add(&mut self, other: &Self) {
        let pairs = [(&mut self.hit, &other.hit), (&mut self.wrong, &other.wrong), (&mut self.missed, &other.missed)];
        for (a, b) in pairs {
            a.resize(b.len(), 0);
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        }
    }

    /// Dice of every class, NaN for one that is neither there nor found.
    pub(super) fn dice(&self) -> Vec<f64> {
        let of = |((&hit, &wrong), &missed)| {
            let (twice, others): (u64, u64) = (2 * hit, wrong + missed);
            twice as f64 / (twice + others) as f64
        };
        self.hit.iter().zip(&self.wrong).zip(&self.missed).map(of).collect()
    }
}

/// The mean of what is not NaN (`numpy.nanmean`).
pub(super) fn nan_mean(values: &[f64]) -> f64 {
    let known: Vec<f64> = values.iter().copied().filter(|v| !v.is_nan()).collect();
    known.iter().sum::<f64>() / known.len() as f64
}

/// Counts the voxels of `labels` `[N, D, H, W]` that a network of so many `classes` found: the labels but background.
pub(super) fn count_labels(labels: &[u16], target: &LabelMap, classes: usize, ignore: Option<u16>) -> Result<Counts> {
    if labels.len() != target.labels().len() {
        let what = format!("{} labels beside {:?}", labels.len(), target.dims());
        return Err(Error::shape("pseudo Dice", what));
    }
    let strange = |l: &&u16| usize::from(**l) >= classes && Some(**l) != ignore;
    if let Some(label) = target.labels().iter().chain(labels).find(strange) {
        return Err(Error::shape("pseudo Dice", format!("label {label} for {classes} classes")));
    }
    let parts = par::map(labels.len().div_ceil(PIECE), |k| {
        let mut counts = Counts::new(classes.saturating_sub(1));
        let piece = k * PIECE..labels.len().min((k + 1) * PIECE);
        let pairs = labels[piece.clone()].iter().zip(&target.labels()[piece]);
        for (found, label) in pairs.filter(|(_, l)| Some(**l) != ignore) {
            counts.voxel(usize::from(*found), usize::from(*label));
        }
        counts
    });
    let mut all = Counts::new(classes.saturating_sub(1));
    parts.iter().for_each(|c| all.add(c));
    Ok(all)
}

/// Counts the voxels of `logits` `[N, C, D, H, W]`: the labels but background, or the regions. The largest logit is a voxel's
/// label, the first among equals; a positive one says that a region is there.
pub(super) fn count(logits: &Tensor, target: &LabelMap, outputs: &Outputs, ignore: Option<u16>) -> Result<Counts> {
    let [n, channels, d, h, w] = logits.dims().five();
    if target.dims() != [n, d, h, w] {
        let what = format!("labels of {:?} for logits of {:?}", target.dims(), logits.dims());
        return Err(Error::shape("pseudo Dice", what));
    }
    let (layout, all) = (logits.layout(), logits.as_slice());
    let first_of = |k: usize| layout.offset(logits.dims(), [k / channels, k % channels, 0, 0, 0]);
    let starts: Vec<usize> = (0..n * channels).map(first_of).collect();
    let voxels = d * h * w;
    let pieces = voxels.div_ceil(PIECE);
    let parts = par::map(n * pieces, |k| {
        let (sample, first) = (k / pieces, k % pieces * PIECE);
        let last = voxels.min(first + PIECE);
        let labels = &target.labels()[sample * voxels..][first..last];
        let starts = &starts[sample * channels..][..channels];
        let value = |voxel: usize, c: usize| all[starts[c] + voxel * layout.block];
        let known = labels.iter().enumerate().filter(|(_, l)| Some(**l) != ignore).map(|(i, l)| (first + i, *l));
        match outputs {
            Outputs::Labels => {
                let mut counts = Counts::new(channels.saturating_sub(1));
                for (voxel, label) in known {
                    let (mut best, mut most) = (0, f32::NEG_INFINITY);
                    for c in 0..channels {
                        let v = value(voxel, c);
                        if v > most {
                            (best, most) = (c, v);
                        }
                    }
                    counts.voxel(best, usize::from(label));
                }
                counts
            }
            Outputs::Regions(regions) => {
                let mut counts = Counts::new(channels);
                for (voxel, label) in known {
                    for (c, region) in regions.iter().enumerate() {
                        match (value(voxel, c) > 0.0, region.contains(&label)) {
                            (true, true) => counts.hit[c] += 1,
                            (true, false) => counts.wrong[c] += 1,
                            (false, true) => counts.missed[c] += 1,
                            (false, false) => {}
                        }
                    }
                }
                counts
            }
        }
    });
    let mut all = Counts::default();
    parts.iter().for_each(|p| all.add(p));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Device, Dims};

    fn tensor(values: &[f32], dims: [usize; 5], device: &Device) -> Tensor {
        Tensor::from_host(values, Dims::from(dims), device).unwrap()
    }

    #[test]
    fn labels_are_counted_and_ignored_ones_are_not() {
        let device = Device::cpu();
        // Three classes, four voxels: found 1, 2, 0, 1 where there are 1, 1, 2, ignored.
        let logits = [[0.0, 0.0, 5.0, 0.0], [2.0, 1.0, 1.0, 9.0], [1.0, 3.0, 1.0, 0.0]].concat();
        let logits = tensor(&logits, [1, 3, 1, 2, 2], &device);
        let target = LabelMap::new(vec![1, 1, 2, 7], [1, 1, 2, 2]).unwrap();
        let counts = count(&logits, &target, &Outputs::Labels, Some(7)).unwrap();
        assert_eq!(counts, Counts { hit: vec![1, 0], wrong: vec![0, 1], missed: vec![1, 1] });
        assert_eq!(counts.dice(), [2.0 / 3.0, 0.0]);
    }

    #[test]
    fn regions_are_counted_each_by_itself() {
        let device = Device::cpu();
        let logits = tensor(&[1.0, -1.0, 1.0, 1.0, 1.0, -1.0], [1, 2, 1, 1, 3], &device);
        let target = LabelMap::new(vec![1, 2, 0], [1, 1, 1, 3]).unwrap();
        let regions = Outputs::Regions(vec![vec![1, 2], vec![2]]);
        let counts = count(&logits, &target, &regions, None).unwrap();
        assert_eq!(counts, Counts { hit: vec![1, 1], wrong: vec![1, 1], missed: vec![1, 0] });
    }

    #[test]
    fn a_class_that_no_patch_has_does_not_count() {
        let mut all = Counts::new(2);
        all.hit[0] = 3;
        let dice = all.dice();
        assert!(dice[0] == 1.0 && dice[1].is_nan());
        assert_eq!(nan_mean(&dice), 1.0);
        assert!(nan_mean(&[f64::NAN]).is_nan());
    }
}
