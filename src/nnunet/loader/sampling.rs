//! Which case and which place a patch is from (nnU-Net `nnUNetDataLoader.get_bbox`).

use std::sync::Arc;

use crate::base::rng::Rng;
use crate::error::Result;
use crate::nnunet::augment::{Item, Purpose};
use crate::nnunet::training_case::{ClassKey, TrainingCase};

/// Which patches of a batch are put on foreground.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Oversampling {
    /// The last of the batch, this share of it.
    LastOfBatch(f64),
    /// Each with this probability: `nnUNetTrainer_probabilisticOversampling`.
    Probability(f64),
}

/// Chooses patches.
#[derive(Debug, Clone)]
pub struct Sampler {
    initial: [usize; 3],
    patch: [usize; 3],
    batch: usize,
    oversampling: Oversampling,
}

/// A patch: its case, and its first voxel there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) case: usize,
    pub(super) lower: [i64; 3],
}

impl Sampler {
    /// For batches of `batch` patches of `patch` voxels, for each of which `initial` voxels are read.
    #[must_use]
    pub fn new(initial: [usize; 3], patch: [usize; 3], batch: usize, oversampling: Oversampling) -> Self {
        Self { initial, patch, batch, oversampling }
    }

    pub(super) fn draw(&self, cases: &[Arc<dyn TrainingCase>], position: usize, item: Item) -> Result<Chosen> {
        let mut rng = item.rng(Purpose::Sampling);
        let case = rng.below(cases.len() as u64) as usize;
        let forced = self.is_forced(position, &mut rng);
        let lower = self.lower(&*cases[case], forced, &mut rng)?;
        Ok(Chosen { case, lower })
    }

    fn is_forced(&self, position: usize, rng: &mut Rng) -> bool {
        match self.oversampling {
            Oversampling::LastOfBatch(share) => {
                position as f64 >= (self.batch as f64 * (1.0 - share)).round_ties_even()
            }
            Oversampling::Probability(p) => rng.chance(p),
        }
    }

    /// First voxels that a patch of a case may have, both ends included, as nnU-Net pads it: half of what is read beyond the
    /// patch on both sides, or as much as the case is too small.
    #[must_use]
    pub fn bounds(&self, shape: [usize; 3]) -> [[i64; 2]; 3] {
        std::array::from_fn(|k| {
            let (n, initial) = (shape[k] as i64, self.initial[k] as i64);
            let pad = (initial - self.patch[k] as i64).max(initial - n);
            [(-pad).div_euclid(2), n + pad.div_euclid(2) + pad.rem_euclid(2) - initial]
        })
    }

    fn lower(&self, case: &dyn TrainingCase, forced: bool, rng: &mut Rng) -> Result<[i64; 3]> {
        let bounds = self.bounds(case.shape());
        if let Some(voxel) = voxel(case, forced, rng)? {
            // nnU-Net has no upper bound here: what is beyond the case is padded.
            let low = |k: usize| (i64::from(voxel[k]) - (self.initial[k] / 2) as i64).max(bounds[k][0]);
            return Ok(std::array::from_fn(low));
        }
        Ok(bounds.map(|[low, high]| low + rng.below((high - low + 1).max(1) as u64) as i64))
    }
}

/// A voxel to put the patch on: of a random class, or with an ignore label of what is annotated.
fn voxel(case: &dyn TrainingCase, forced: bool, rng: &mut Rng) -> Result<Option<[u32; 3]>> {
    let is_annotated = |key: &ClassKey| matches!(key, ClassKey::Region(labels) if labels.contains(&-1));
    let classes = case.classes();
    let all = classes.iter().enumerate().filter(|(_, (key, n))| *n > 0 && (forced || is_annotated(key)));
    let mut eligible: Vec<_> = all.collect();
    if eligible.len() > 1 {
        eligible.retain(|(_, (key, _))| !is_annotated(key));
    }
    let Some(&(class, (_, n))) = eligible.get(rng.below(eligible.len() as u64) as usize) else { return Ok(None) };
    case.location(class, rng.below(*n as u64) as usize).map(Some)
}
