//! The augmentation of nnU-Net's training (`nnUNetTrainer.get_training_transforms` with batchgeneratorsv2): what is drawn
//! and what is done with it, apart.
//!
//! [`Parameters`] are drawn from a counter-based generator by the seed, the epoch, the place of the patch in it and the
//! transform, so that a patch never depends on the patches before it. [`Augmenter`] is a function of parameters and voxels,
//! on the thread that calls it.

#[cfg(feature = "cuda")]
mod card;
mod cascade;
mod chain;
mod intensity;
mod morphology;
mod parameters;
mod spatial;

#[cfg(feature = "cuda")]
pub(crate) use card::CardBatch;
pub use cascade::{Operation, Removal};
pub use chain::{Augmenter, RawPatch, Scratch};
pub use morphology::Operator;
pub(crate) use parameters::Purpose;
pub use parameters::{Item, Noise, Parameters, Spatial};

use crate::error::{Error, Result};

/// A patch whose longest axis is more than so many times its first is rotated and scaled in planes (nnU-Net
/// `ANISO_THRESHOLD`).
const ANISOTROPY: f64 = 3.0;

/// The smallest scale that the patch which is read allows for; nnU-Net's scales begin at 0.7 all the same.
const SMALLEST_SCALE: f64 = 0.85;

/// What may be done to patches.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AugmentConfig {
    /// Voxels along (z, y, x) that the network sees; 1 along z in 2D.
    pub patch: [usize; 3],
    /// Voxels of the patch that is read.
    pub initial_patch: [usize; 3],
    /// The network is two-dimensional: z is no axis of the patch.
    pub two_d: bool,
    /// Rotate and scale in planes: 2D and nnU-Net's "dummy 2D".
    pub planes: bool,
    /// Largest angle of a rotation in radians.
    pub rotation: f64,
    /// Axes that may be mirrored.
    pub mirror: [bool; 3],
    /// Channels that are 0 outside of the nonzero mask: `use_mask_for_norm` of the plans.
    pub masked: Vec<bool>,
}

impl AugmentConfig {
    /// For a patch of the plans, two or three sizes: nnU-Net `configure_rotation_dummyDA_mirroring_and_inital_patch_size`.
    ///
    /// # Errors
    /// [`Error::Usage`] for another number of sizes, and for a size of 0.
    pub fn new(patch: &[usize], masked: &[bool]) -> Result<Self> {
        let two_d = patch.len() == 2;
        let sizes = match *patch {
            [y, x] => [1, y, x],
            [z, y, x] => [z, y, x],
            _ => return Err(Error::usage(format!("patch {patch:?}, expected two or three sizes"))),
        };
        if sizes.contains(&0) {
            return Err(Error::usage(format!("patch {patch:?}, expected sizes of at least 1")));
        }
        let largest = sizes.into_iter().max().unwrap_or(1) as f64;
        let degrees: f64 = if two_d {
            let smallest = patch.iter().copied().min().unwrap_or(1) as f64;
            if largest / smallest > 1.5 { 15.0 } else { 180.0 }
        } else if largest / sizes[0] as f64 > ANISOTROPY {
            180.0
        } else {
            30.0
        };
        let planes = two_d || largest / sizes[0] as f64 > ANISOTROPY;
        let rotation = degrees / 360.0 * 2.0 * std::f64::consts::PI;
        Ok(Self {
            patch: sizes,
            initial_patch: initial_patch(sizes, two_d, planes, rotation),
            two_d,
            planes,
            rotation,
            mirror: [!two_d, true, true],
            masked: masked.to_vec(),
        })
    }
}

/// The patch that is read so that rotations do not turn its corners out (nnU-Net `get_patch_size`): each axis as long as it
/// is after the largest rotation about any one axis, over the smallest scale. Between planes nothing is read.
fn initial_patch(patch: [usize; 3], two_d: bool, planes: bool, rotation: f64) -> [usize; 3] {
    let (sin, cos) = rotation.min(90.0 / 360.0 * 2.0 * std::f64::consts::PI).sin_cos();
    let p = patch.map(|n| n as f64);
    let mut longest = p;
    // Pairs of axes that turn into each other; a row vector times the matrix.
    let turns: &[(usize, usize)] = if two_d { &[(1, 2)] } else { &[(1, 2), (2, 0), (0, 1)] };
    for &(a, b) in turns {
        longest[a] = longest[a].max((p[a] * cos + p[b] * sin).abs());
        longest[b] = longest[b].max((p[b] * cos - p[a] * sin).abs());
    }
    let mut out = longest.map(|n| (n / SMALLEST_SCALE) as usize);
    if planes {
        out[0] = patch[0];
    }
    out
}
