//! What is done to whole volumes of labels: connected components, holes, distances. Volumes are (z, y, x) with x fastest;
//! a picture is a volume of one plane.
//!
//! ```
//! use stunet::nnunet::volume::{Neighbours, distance_transform, label};
//! // A ring of 3 x 3 voxels and a voxel at its corner.
//! let mask = [1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1].map(|v| v == 1);
//! let shape = [1, 4, 4];
//! assert_eq!(label(&mask, shape, Neighbours::Faces)?.1, 2);
//! assert_eq!(label(&mask, shape, Neighbours::Corners)?.1, 1);
//! assert_eq!(distance_transform(&mask, shape, [5.0, 2.0, 1.0])?[4], 1.0);
//! # Ok::<(), stunet::Error>(())
//! ```

mod components;
mod distance;
mod mask;

pub(crate) use components::Components;
pub use components::Neighbours;
pub(crate) use mask::Mask;

use crate::error::{Error, Result};
use crate::nnunet::preprocess::resample::zeros;

/// The distance of each voxel of `mask` to the nearest voxel outside of it, between their centres, 0 for those outside:
/// exact, by `spacing` along (z, y, x) and in its unit (`scipy.ndimage.distance_transform_edt`). Infinite where all voxels
/// are in the mask: what is beyond the volume is not known.
///
/// # Errors
/// [`Error::Shape`] when the mask has not the size of `shape`, [`Error::Usage`] when a spacing is not a positive number,
/// [`Error::OutOfMemory`].
pub fn distance_transform(mask: &[bool], shape: [usize; 3], spacing: [f64; 3]) -> Result<Vec<f64>> {
    check("distance transform", mask, shape)?;
    if !spacing.iter().all(|s| s.is_finite() && *s > 0.0) {
        return Err(Error::usage(format!("distance transform: spacing {spacing:?}, expected positive numbers")));
    }
    let mut out = zeros(mask.len(), "distances")?;
    distance::transform(mask, shape, spacing, &mut out);
    Ok(out)
}

/// The number of each voxel's connected component, from 1 in the order of their first voxels, 0 outside of `mask`; and how
/// many there are (`scipy.ndimage.label`, `skimage.measure.label`).
///
/// # Errors
/// [`Error::Shape`] when the mask has not the size of `shape`, or has 2^32 voxels or more; [`Error::OutOfMemory`].
pub fn label(mask: &[bool], shape: [usize; 3], neighbours: Neighbours) -> Result<(Vec<u32>, usize)> {
    check("components", mask, shape)?;
    if u32::try_from(mask.len()).is_err() {
        return Err(Error::shape("components", format!("{shape:?}, expected fewer than 2^32 voxels")));
    }
    let components = Components::new(mask, shape, neighbours, u16::from);
    let mut out = zeros(mask.len(), "numbers of components")?;
    components.number(&mut out);
    Ok((out, components.len()))
}

/// Adds to `mask` all that it shuts off from the border of the volume, by steps through voxels' faces
/// (`scipy.ndimage.binary_fill_holes`). In a volume of one plane nothing is shut off.
///
/// # Errors
/// [`Error::Shape`] when the mask has not the size of `shape`.
pub fn fill_holes(mask: &mut [bool], shape: [usize; 3]) -> Result<()> {
    check("holes", mask, shape)?;
    if mask.is_empty() {
        return Ok(());
    }
    let [_, ny, nx] = shape;
    let at = |z: usize, y: usize| (z * ny + y) * nx..(z * ny + y + 1) * nx;
    let mut bits = Mask::new(shape, |z, y, row| row.copy_from_slice(&mask[at(z, y)]));
    bits.fill_holes();
    bits.unpack(mask);
    Ok(())
}

fn check(op: &'static str, mask: &[bool], shape: [usize; 3]) -> Result<()> {
    match shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) {
        Some(n) if n == mask.len() => Ok(()),
        _ => Err(Error::shape(op, format!("{} voxels for {shape:?}", mask.len()))),
    }
}
