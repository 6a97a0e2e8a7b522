//! A preprocessed case as training reads it, whatever file it lies in.

use crate::error::Result;

/// Where the voxels of a class are, on the grid of the preprocessed case: nnU-Net's `class_locations`, a random choice of
/// them, by which patches are put on foreground.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClassLocations {
    /// In the order of nnU-Net's `LabelManager`: labels or regions, then the annotated region of data sets with an ignore
    /// label. Classes without voxels are there, empty.
    pub classes: Vec<(ClassKey, Vec<[u32; 3]>)>,
}

impl ClassLocations {
    /// The classes, each with the number of its voxels.
    #[must_use]
    pub fn counts(&self) -> Vec<(&ClassKey, usize)> {
        self.classes.iter().map(|(class, voxels)| (class, voxels.len())).collect()
    }
}

/// What a list of locations is of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ClassKey {
    /// A label.
    Label(i16),
    /// The labels of a region; with an ignore label, -1 and all labels are the annotated region.
    Region(Vec<i16>),
}

/// A preprocessed case of which patches are read.
pub trait TrainingCase: Send + Sync {
    /// Channels of the image.
    fn channels(&self) -> usize;

    /// Voxels along the transposed (z, y, x); a 2D case is a stack of planes.
    fn shape(&self) -> [usize; 3];

    /// Classes, each with the number of voxels of it that are known: [`ClassLocations`], which may stay in a file.
    fn classes(&self) -> Vec<(&ClassKey, usize)>;

    /// A known voxel of a class, both by their number in [`TrainingCase::classes`].
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) naming the file when it is damaged.
    ///
    /// # Panics
    /// When there is no such class or voxel.
    fn location(&self, class: usize, at: usize) -> Result<[u32; 3]>;

    /// Channels of [`TrainingCase::crop`]'s labels: the truth, and in a cascade the prediction of the stage before.
    fn label_channels(&self) -> usize {
        1
    }

    /// Writes the box of `size` voxels that begins at `lower` to `data` (channel, z, y, x) and `labels` (label channel, z, y,
    /// x). Outside of the case the data are 0 and the labels -1.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), [`Error::Model`](crate::Error::Model) naming the file when it is damaged.
    fn crop(&self, lower: [i64; 3], size: [usize; 3], data: &mut [f32], labels: &mut [i16]) -> Result<()>;
}
