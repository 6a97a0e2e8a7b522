//! A synthetic CT of a trunk with its true segmentation: data for the demonstration, for tests and for training runs
//! that need no patient.
//!
//! The patient lies in the scanner as nnU-Net's users have them: Hounsfield units, integers, a voxel grid with an
//! affine. Body, ribs, spine, lungs, heart, liver, spleen, kidneys, stomach, bowel and great vessels are solids given
//! by formulas; pose, sizes, places and attenuations differ from seed to seed. Edges are blurred by about 2 mm and
//! voxels carry white Gaussian noise. The truth is exact: it comes from the formulas, not from the picture.
//!
//! ```
//! use stunet::phantom::{Phantom, label};
//! let (ct, truth) = Phantom::new(7).with_grid([48, 36, 50], [6.0, 6.0, 6.0])?.render();
//! assert_eq!(ct.geometry, truth.geometry);
//! let liver_ml = truth.volume_ml(u16::from(label::LIVER));
//! assert!((400.0..1200.0).contains(&liver_ml), "{liver_ml}");
//! # Ok::<(), stunet::Error>(())
//! ```

mod anatomy;
mod shape;

use std::io::Write;
use std::path::Path;

use serde_json::{Map, json};

use crate::base::json::Json;
use crate::base::par;
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::image::{Geometry, Image, LabelData, Segmentation};
use anatomy::Anatomy;

/// The label values of the truth. Left and right are the patient's.
pub mod label {
    /// All that has no label of its own: air, fat, muscle, heart, stomach, bowel, ribs, vena cava.
    pub const BACKGROUND: u8 = 0;
    /// Left lung.
    pub const LUNG_LEFT: u8 = 1;
    /// Right lung.
    pub const LUNG_RIGHT: u8 = 2;
    /// Liver.
    pub const LIVER: u8 = 3;
    /// Spleen.
    pub const SPLEEN: u8 = 4;
    /// Left kidney.
    pub const KIDNEY_LEFT: u8 = 5;
    /// Right kidney.
    pub const KIDNEY_RIGHT: u8 = 6;
    /// Vertebrae, discs and spinal canal.
    pub const SPINE: u8 = 7;
    /// Descending aorta.
    pub const AORTA: u8 = 8;
}

/// Label values and names of the truth, background left out.
pub const NAMES: [(u16, &str); 8] = [
    (label::LUNG_LEFT as u16, "lung_left"),
    (label::LUNG_RIGHT as u16, "lung_right"),
    (label::LIVER as u16, "liver"),
    (label::SPLEEN as u16, "spleen"),
    (label::KIDNEY_LEFT as u16, "kidney_left"),
    (label::KIDNEY_RIGHT as u16, "kidney_right"),
    (label::SPINE as u16, "spine"),
    (label::AORTA as u16, "aorta"),
];

/// Writes the `dataset.json` of a raw data set of `cases` phantoms to `folder`.
///
/// # Errors
/// [`Error::Io`].
pub fn describe(folder: &Path, cases: usize) -> Result<()> {
    let mut labels = Map::from_iter([("background".to_owned(), 0.into())]);
    labels.extend(NAMES.map(|(value, name)| (name.to_owned(), value.into())));
    let value = json!({
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "name": "synthetic trunks",
        "description": "made by stunet; of no use for patients",
    });
    let path = folder.join("dataset.json");
    let text = Json::from(value).to_text(false);
    write_atomically(&path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io("write", &path, e)))
}

/// Random stream of the voxel noise; those of the anatomy are in its own module.
const NOISE_STREAM: u32 = 5;

/// A synthetic patient in a scanner.
#[derive(Debug, Clone)]
pub struct Phantom {
    seed: u64,
    anatomy: Anatomy,
    shape: [usize; 3],
    spacing_mm: [f64; 3],
    noise_hu: f64,
}

impl Phantom {
    /// Patient number `seed` on a grid of 192 x 144 x 200 voxels (z, y, x) of 1.5 mm, with 15 HU of noise. The same
    /// seed gives the same voxels, whatever the number of threads.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let anatomy = Anatomy::new(seed);
        Self { seed, anatomy, shape: [192, 144, 200], spacing_mm: [1.5; 3], noise_hu: 15.0 }
    }

    /// The same patient on another grid: voxels and spacing in mm along (z, y, x). The grid is centred on the trunk,
    /// which is about 280 mm wide and 200 mm deep; it has no end along z.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no voxel, more than 2^31 of them, or a spacing is not a positive number up to
    /// 1000.
    pub fn with_grid(mut self, shape: [usize; 3], spacing_mm: [f64; 3]) -> Result<Self> {
        let voxels = shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        if !voxels.is_some_and(|n| (1..=1 << 31).contains(&n)) {
            return Err(Error::usage(format!("phantom grid {shape:?}: expected 1 to 2^31 voxels")));
        }
        if !spacing_mm.iter().all(|s| *s > 0.0 && *s <= 1000.0) {
            return Err(Error::usage(format!("phantom spacing {spacing_mm:?}: expected numbers of mm up to 1000")));
        }
        (self.shape, self.spacing_mm) = (shape, spacing_mm);
        Ok(self)
    }

    /// The same patient with voxel noise of standard deviation `hu`.
    ///
    /// # Errors
    /// [`Error::Usage`] when `hu` is negative or not finite.
    pub fn with_noise(mut self, hu: f64) -> Result<Self> {
        if !(hu.is_finite() && hu >= 0.0) {
            return Err(Error::usage(format!("phantom noise {hu} HU: expected a number from 0")));
        }
        self.noise_hu = hu;
        Ok(self)
    }

    /// The grid: array axes z, y, x run to the patient's top, front and right (RAS+), the origin is the centre.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::new(self.shape, self.spacing_mm);
        for i in 0..3 {
            let (n, step) = (self.shape[2 - i], self.spacing_mm[2 - i]);
            geometry.affine[i][3] = -0.5 * (n as f64 - 1.0) * step;
        }
        geometry
    }

    /// The CT in Hounsfield units (integers within -1024 and 3071) and its true segmentation, labels as in [`NAMES`].
    #[must_use]
    pub fn render(&self) -> (Image, Segmentation) {
        let geometry = self.geometry();
        let [_, ny, nx] = self.shape;
        let mut voxels = vec![(0.0f32, 0u8); geometry.len()];
        let affine = geometry.affine;
        par::chunks_mut(&mut voxels, ny * nx, |k, slice| {
            for (i, v) in slice.iter_mut().enumerate() {
                let index = [(i % nx) as f64, (i / nx) as f64, k as f64];
                let tissue = self.anatomy.at([0, 1, 2].map(|a| affine[a][a] * index[a] + affine[a][3]));
                *v = (tissue.hu as f32, tissue.label);
            }
        });
        let labels = voxels.iter().map(|v| v.1).collect();
        let mut hu: Vec<f32> = voxels.into_iter().map(|v| v.0).collect();
        par::chunks_mut(&mut hu, ny * nx, |k, slice| {
            shape::add_white_noise(slice, k * ny * nx, self.seed, NOISE_STREAM, self.noise_hu);
            slice.iter_mut().for_each(|v| *v = v.round_ties_even().clamp(-1024.0, 3071.0));
        });
        let names = NAMES.map(|(value, name)| (value, name.to_owned())).to_vec();
        let truth = Segmentation { labels: LabelData::U8(labels), geometry: geometry.clone(), names };
        (Image { channels: vec![hu], geometry }, truth)
    }
}
