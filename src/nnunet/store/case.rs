//! A stored case, whatever its arrays lie in.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::boxes::{Boxes, to_f32, to_i16};
use crate::nnunet::training_case::{ClassLocations, TrainingCase};

/// What training reads outside of the case.
const OUTSIDE: i16 = -1;

/// Arrays of a case and where its classes are.
pub(super) struct StoredCase {
    data: Box<dyn Boxes>,
    /// The truth, then in a cascade what the stage before predicted.
    labels: Vec<Box<dyn Boxes>>,
    locations: ClassLocations,
}

impl StoredCase {
    /// Checks that the arrays lie on one grid that holds the locations; `path` is named in errors.
    pub(super) fn new(
        path: &Path,
        data: Box<dyn Boxes>,
        labels: Vec<Box<dyn Boxes>>,
        locations: ClassLocations,
    ) -> Result<Self> {
        let [channels, z, y, x] = data.shape();
        if channels == 0 || z * y * x == 0 {
            return Err(Error::model(path, "data", format!("{:?}, expected at least one voxel", data.shape())));
        }
        for array in &labels {
            if array.shape() != [1, z, y, x] {
                let what = format!("{:?}, expected {:?} as the data have", array.shape(), [1, z, y, x]);
                return Err(Error::model(path, "seg", what));
            }
        }
        let shape = [z, y, x];
        for (class, voxels) in &locations.classes {
            if let Some(v) = voxels.iter().find(|v| v.iter().zip(shape).any(|(&v, n)| v as usize >= n)) {
                let what = format!("voxel {v:?} of {class:?} lies outside of the case's {shape:?}");
                return Err(Error::model(path, "class_locations", what));
            }
        }
        Ok(Self { data, labels, locations })
    }

    /// All data and labels.
    pub(super) fn whole(&self, path: &Path) -> Result<(Vec<f32>, Vec<i16>)> {
        let [channels, ..] = self.data.shape();
        let (shape, n) = (self.shape(), self.shape().iter().product::<usize>());
        let (Some(data), Some(labels)) = (fresh(n.saturating_mul(channels)), fresh(n * self.labels.len())) else {
            let (what, asked) = (format!("the case {}", path.display()), n.saturating_mul(4 * channels));
            return Err(Error::OutOfMemory { what, asked, in_use: 0, limit: isize::MAX as usize });
        };
        let (mut data, mut labels) = (data, labels);
        self.crop([0; 3], shape, &mut data, &mut labels)?;
        Ok((data, labels))
    }
}

fn fresh<T: bytemuck::Zeroable>(n: usize) -> Option<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(n).ok()
}

impl TrainingCase for StoredCase {
    fn channels(&self) -> usize {
        self.data.shape()[0]
    }

    fn shape(&self) -> [usize; 3] {
        let [_, z, y, x] = self.data.shape();
        [z, y, x]
    }

    fn locations(&self) -> &ClassLocations {
        &self.locations
    }

    fn label_channels(&self) -> usize {
        self.labels.len()
    }

    fn crop(&self, lower: [i64; 3], size: [usize; 3], data: &mut [f32], labels: &mut [i16]) -> Result<()> {
        let (channels, voxels) = (self.channels(), size.iter().product::<usize>());
        if data.len() != channels * voxels || labels.len() != self.labels.len() * voxels {
            let what = format!("{} and {} values for {size:?} voxels", data.len(), labels.len());
            return Err(Error::shape("crop", what));
        }
        // What of the box lies within the case.
        let shape = self.shape();
        let clamp = |v: i64, k: usize| v.clamp(0, shape[k] as i64) as usize;
        let from: [usize; 3] = std::array::from_fn(|k| clamp(lower[k], k));
        let to: [usize; 3] = std::array::from_fn(|k| clamp(lower[k].saturating_add(size[k] as i64), k));
        if (0..3).any(|k| to[k] - from[k] != size[k]) {
            data.fill(0.0);
            labels.fill(OUTSIDE);
        }
        if (0..3).any(|k| to[k] == from[k]) {
            return Ok(());
        }
        // A place in the box; pieces come from within it.
        let place = |at: [usize; 3]| {
            let [z, y, x]: [usize; 3] = std::array::from_fn(|k| (at[k] as i64 - lower[k]) as usize);
            (z * size[1] + y) * size[2] + x
        };
        let element = self.data.dtype();
        for (c, out) in data.chunks_mut(voxels).enumerate() {
            self.data.pieces(c, from, to, &mut |at, bytes| {
                let n = bytes.len() / element.size();
                to_f32(element, bytes, &mut out[place(at)..][..n]);
            })?;
        }
        for (array, out) in self.labels.iter().zip(labels.chunks_mut(voxels)) {
            let element = array.dtype();
            array.pieces(0, from, to, &mut |at, bytes| {
                let n = bytes.len() / element.size();
                to_i16(element, bytes, &mut out[place(at)..][..n]);
            })?;
        }
        Ok(())
    }
}

/// Files of a case, by which it is told apart from others.
pub(super) fn file(folder: &Path, identifier: &str, ending: &str) -> PathBuf {
    // Not `with_extension`: identifiers may hold dots.
    folder.join(format!("{identifier}{ending}"))
}
