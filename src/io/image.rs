//! Images and segmentations in memory.
//!
//! Array order is (z, y, x) with x fastest, exactly the voxel order of the file: nothing is ever reoriented. The
//! affine says where the voxels lie in the patient.

use crate::error::{Error, Result};

/// Where voxels lie: everything a result copies from its input.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Geometry {
    /// Voxels along (z, y, x).
    pub shape: [usize; 3],
    /// Distance of neighbouring voxels in mm along (z, y, x), as the file states it (f32 widened).
    pub spacing_mm: [f64; 3],
    /// Voxel index (x, y, z, 1) to patient position in mm, RAS+, three rows.
    pub affine: [[f64; 4]; 3],
    /// The NIfTI-1 header (348 bytes, its numbers in little-endian order whatever the file's) the geometry came from,
    /// if any; results are written with its geometry fields bit for bit, as long as the fields above still agree with it.
    pub header: Option<Vec<u8>>,
}

impl Geometry {
    /// A geometry without a file: axes along x, y, z of the patient (RAS+), origin at 0.
    #[must_use]
    pub fn new(shape: [usize; 3], spacing_mm: [f64; 3]) -> Self {
        let [sz, sy, sx] = spacing_mm;
        let affine = [[sx, 0.0, 0.0, 0.0], [0.0, sy, 0.0, 0.0], [0.0, 0.0, sz, 0.0]];
        Self { shape, spacing_mm, affine, header: None }
    }

    /// Number of voxels.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True when there is no voxel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Volume of one voxel in mm^3: the determinant of the affine.
    #[must_use]
    pub fn voxel_mm3(&self) -> f64 {
        let [a, b, c] = self.affine;
        (a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]))
            .abs()
    }
}

/// An image: one or more channels (CT: Hounsfield units) on one voxel grid.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Image {
    /// One array of `geometry.len()` voxels per channel, (z, y, x) with x fastest.
    pub channels: Vec<Vec<f32>>,
    /// The grid.
    pub geometry: Geometry,
}

impl Image {
    /// An image of the given channels.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is no channel, no voxel, or a channel's length differs from the geometry's.
    pub fn new(channels: Vec<Vec<f32>>, geometry: Geometry) -> Result<Self> {
        if channels.is_empty() || geometry.is_empty() {
            return Err(Error::shape("image", "an image needs at least one channel and one voxel"));
        }
        if let Some(c) = channels.iter().position(|c| c.len() != geometry.len()) {
            let n = channels[c].len();
            return Err(Error::shape("image", format!("channel {c} has {n} voxels, the grid {}", geometry.len())));
        }
        Ok(Self { channels, geometry })
    }

    /// Voxels, over all channels, that are NaN or infinite.
    #[must_use]
    pub fn non_finite(&self) -> usize {
        self.channels.iter().flatten().filter(|v| !v.is_finite()).count()
    }
}

/// Label values in the smallest type that holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LabelData {
    /// Labels up to 255.
    U8(Vec<u8>),
    /// Labels up to 65535.
    U16(Vec<u16>),
}

impl LabelData {
    /// `n` voxels of background, in a type that holds `max_label`.
    #[must_use]
    pub fn zeros(n: usize, max_label: u32) -> Self {
        if max_label < 256 { LabelData::U8(vec![0; n]) } else { LabelData::U16(vec![0; n]) }
    }

    /// Number of voxels.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            LabelData::U8(v) => v.len(),
            LabelData::U16(v) => v.len(),
        }
    }

    /// True when there is no voxel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The label at position `i`.
    ///
    /// # Panics
    /// When `i` is out of range.
    #[must_use]
    pub fn get(&self, i: usize) -> u16 {
        match self {
            LabelData::U8(v) => u16::from(v[i]),
            LabelData::U16(v) => v[i],
        }
    }

    /// All labels in order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }
}

/// A label map on an image's grid.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Segmentation {
    /// One label per voxel, (z, y, x) with x fastest.
    pub labels: LabelData,
    /// The grid, that of the image.
    pub geometry: Geometry,
    /// Name of each label value, background left out.
    pub names: Vec<(u16, String)>,
}

impl Segmentation {
    /// A segmentation of the given labels.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of labels differs from the grid's voxels.
    pub fn new(labels: LabelData, geometry: Geometry, names: Vec<(u16, String)>) -> Result<Self> {
        if labels.len() != geometry.len() {
            let what = format!("{} labels for {} voxels", labels.len(), geometry.len());
            return Err(Error::shape("segmentation", what));
        }
        Ok(Self { labels, geometry, names })
    }

    /// Voxels that carry `label`.
    #[must_use]
    pub fn voxels(&self, label: u16) -> usize {
        self.labels.iter().filter(|&l| l == label).count()
    }

    /// Volume of `label` in millilitres.
    #[must_use]
    pub fn volume_ml(&self, label: u16) -> f64 {
        self.voxels(label) as f64 * self.geometry.voxel_mm3() / 1000.0
    }
}
