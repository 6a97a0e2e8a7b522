//! Rotation and scale: which voxels of a case a patch needs, and the warp onto its grid.

use super::{AugmentConfig, Spatial};
use crate::error::Result;
use crate::nnunet::training_case::TrainingCase;
use crate::ops::warp::Warp;

/// Reads what the patch needs whose initial patch begins at voxel `lower` of the case, and tells how it gets onto its grid.
/// Outside of the initial patch the image is 0 and labels are -1, whatever the case holds there; both are interpolated across
/// that border (nnU-Net pads with the label -1 in `SpatialTransform`).
pub(super) fn source(
    config: &AugmentConfig,
    spatial: Spatial,
    case: &dyn TrainingCase,
    lower: [i64; 3],
    image: &mut Vec<f32>,
    labels: &mut Vec<i16>,
) -> Result<Warp> {
    let initial = config.initial_patch;
    let matrix = matrix(spatial, config.planes);
    // The middle of the grid lies in the middle of the initial patch.
    let middle: [f64; 3] = std::array::from_fn(|k| (initial[k] as f64 - 1.0) / 2.0);
    let half = config.patch.map(|n| (n as f64 - 1.0) / 2.0);
    let (mut first, mut size, mut shift) = ([0i64; 3], [0usize; 3], [0.0; 3]);
    for k in 0..3 {
        if k == 0 && config.planes {
            size[0] = config.patch[0];
            continue;
        }
        let reach: f64 = (0..3).map(|j| matrix[k][j].abs() * half[j]).sum();
        let end = initial[k] as i64;
        // One voxel of the border stands for all that is outside.
        first[k] = ((middle[k] - reach).floor() as i64).clamp(-1, end - 1);
        let last = ((middle[k] + reach).floor() as i64 + 1).clamp(first[k] + 1, end);
        size[k] = (last - first[k] + 1) as usize;
        let turned: f64 = (0..3).map(|j| matrix[k][j] * half[j]).sum();
        shift[k] = middle[k] - turned - first[k] as f64;
    }
    let volume: usize = size.iter().product();
    image.resize(case.channels() * volume, 0.0);
    labels.resize(case.label_channels() * volume, 0);
    let at = std::array::from_fn(|k| lower[k] + first[k]);
    case.crop(at, size, image, labels)?;
    for k in 0..3 {
        let ends = [(first[k] < 0, 0), (first[k] + size[k] as i64 > initial[k] as i64, size[k] - 1)];
        for (_, plane) in ends.into_iter().filter(|(outside, _)| *outside) {
            fill_plane(image, size, k, plane, 0.0);
            fill_plane(labels, size, k, plane, -1);
        }
    }
    Ok(Warp { matrix, shift, source: size, grid: config.patch, origin: first, planes: config.planes })
}

/// nnU-Net `create_affine_matrix_3d` and, in planes, `create_affine_matrix_2d`, whose matrix turns the other two axes.
fn matrix(Spatial { angles, scale }: Spatial, planes: bool) -> [[f64; 3]; 3] {
    let [(sa, ca), (sb, cb), (sc, cc)] = angles.map(f64::sin_cos);
    if planes {
        return [[1.0, 0.0, 0.0], [0.0, cc * scale, -sc * scale], [0.0, sc * scale, cc * scale]];
    }
    let about = [
        [[cc, -sc, 0.0], [sc, cc, 0.0], [0.0, 0.0, 1.0]],
        [[cb, 0.0, sb], [0.0, 1.0, 0.0], [-sb, 0.0, cb]],
        [[1.0, 0.0, 0.0], [0.0, ca, -sa], [0.0, sa, ca]],
    ];
    let product = |a: [[f64; 3]; 3], b: [[f64; 3]; 3]| {
        a.map(|row| std::array::from_fn(|j| row[0] * b[0][j] + row[1] * b[1][j] + row[2] * b[2][j]))
    };
    product(product(about[0], about[1]), about[2]).map(|row| row.map(|v| v * scale))
}

/// Fills the plane number `plane` across `axis` of every volume of `size` voxels.
fn fill_plane<T: Copy>(volumes: &mut [T], size: [usize; 3], axis: usize, plane: usize, value: T) {
    let inner: usize = size[axis + 1..].iter().product();
    for piece in volumes.chunks_exact_mut(size[axis] * inner) {
        piece[plane * inner..][..inner].fill(value);
    }
}
