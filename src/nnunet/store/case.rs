//! A stored case, whatever its arrays lie in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::boxes::{Boxes, to_f32, to_i16};
use crate::io::weights::Weights;
use crate::nnunet::training_case::{ClassKey, ClassLocations, TrainingCase};

/// What training reads outside of the case.
const OUTSIDE: i16 = -1;

/// Arrays of a case and where its classes are.
pub(super) struct StoredCase {
    data: Box<dyn Boxes>,
    /// The truth, then in a cascade what the stage before predicted.
    labels: Vec<Box<dyn Boxes>>,
    locations: Locations,
}

/// Where the locations of classes are: 100 classes of 10 000 voxels take 12 MB a case.
pub(super) enum Locations {
    /// In memory.
    Held(ClassLocations),
    /// In a mapped file, as rows of three numbers: every class with its first row and its number of rows.
    Mapped(Arc<Weights>, Vec<(ClassKey, usize, usize)>),
}

impl StoredCase {
    /// Checks that the arrays lie on one grid that holds the locations; `path` is named in errors.
    pub(super) fn new(
        path: &Path,
        data: Box<dyn Boxes>,
        labels: Vec<Box<dyn Boxes>>,
        locations: Locations,
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
        if let Locations::Held(locations) = &locations {
            for (class, voxels) in &locations.classes {
                if let Some(v) = voxels.iter().find(|v| is_outside(**v, shape)) {
                    let what = format!("voxel {v:?} of {class:?} lies outside of the case's {shape:?}");
                    return Err(Error::model(path, "class_locations", what));
                }
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

fn is_outside(voxel: [u32; 3], shape: [usize; 3]) -> bool {
    voxel.iter().zip(shape).any(|(&v, n)| v as usize >= n)
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

    fn classes(&self) -> Vec<(&ClassKey, usize)> {
        match &self.locations {
            Locations::Held(locations) => locations.counts(),
            Locations::Mapped(_, classes) => classes.iter().map(|(class, _, n)| (class, *n)).collect(),
        }
    }

    fn location(&self, class: usize, at: usize) -> Result<[u32; 3]> {
        let (weights, classes) = match &self.locations {
            Locations::Held(locations) => return Ok(locations.classes[class].1[at]),
            Locations::Mapped(weights, classes) => (weights, classes),
        };
        let (key, first, n) = &classes[class];
        assert!(at < *n, "voxel {at} of {n}");
        let bytes = weights.bytes("locations")?;
        let row = bytes.as_chunks::<12>().0.get(first + at).copied();
        let voxel = row.map(|b| [0, 4, 8].map(|i| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]])));
        voxel.filter(|v| !is_outside(*v, self.shape())).ok_or_else(|| {
            let what = format!("voxel {at} of {key:?} is missing or lies outside of the case's {:?}", self.shape());
            Error::model(weights.path(), "locations", what)
        })
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
