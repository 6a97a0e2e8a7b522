//! From header fields to spacing and affine.

use std::path::Path;

use ::nifti::NiftiHeader;

use super::header::HEADER_LEN;
use crate::error::{Error, Result};
use crate::io::image::Geometry;

/// Three rows of a voxel-to-patient matrix.
pub(super) type Affine = [[f64; 4]; 3];

/// Spacing and affine of a header.
///
/// The spacing is what ITK, and so nnU-Net, reports whatever the sform says: `|pixdim|` in millimetres (`xyzt_units`
/// metre and micrometre are converted). A file of two dimensions gets nnU-Net's spacing along z, 999 times its larger
/// one. The affine is the sform if there is one, else the qform, else `pixdim` alone (methods 3, 2, 1 of the standard).
///
/// # Errors
/// [`Error::Image`] naming `pixdim`, `qform` or `sform`.
pub(super) fn geometry(
    path: &Path,
    h: &NiftiHeader,
    raw: &[u8; HEADER_LEN],
    shape: [usize; 3],
    rank: usize,
    warnings: &mut Vec<String>,
) -> Result<Geometry> {
    let axes = rank.min(3);
    for i in 1..=axes {
        let p = h.pixdim[i];
        if !p.is_finite() || p == 0.0 {
            return Err(Error::image(path, format!("pixdim[{i}]"), format!("{p}, expected a spacing above 0")));
        }
        if p < 0.0 {
            warnings.push(format!("pixdim[{i}] is {p}, its sign is ignored"));
        }
    }
    let unit = match h.xyzt_units & 7 {
        1 => 1000.0,
        3 => 0.001,
        _ => 1.0,
    };
    let mut pixdim: [f64; 3] = std::array::from_fn(|i| f64::from(h.pixdim[i + 1]).abs());
    if axes == 2 && !(pixdim[2].is_finite() && pixdim[2] > 0.0) {
        pixdim[2] = 1.0;
    }
    let affine = choose(path, h, pixdim, axes, warnings)?.map(|row| row.map(|v| v * unit));
    let mut mm = pixdim.map(|s| s * unit);
    if axes == 2 {
        mm[2] = mm[0].max(mm[1]) * 999.0;
    }
    let columns = column_lengths(&affine);
    for i in 0..axes {
        if (columns[i] - mm[i]).abs() > 1e-3 * mm[i] {
            let what = "pixdim and the affine differ in scale: the network sees pixdim, volumes follow the affine";
            warnings.push(format!("{what} (axis {}: {} mm and {} mm)", i + 1, mm[i], columns[i]));
            break;
        }
    }
    Ok(Geometry { shape, spacing_mm: [mm[2], mm[1], mm[0]], affine, header: Some(raw.to_vec()) })
}

/// The affine in the units of the file. `spacing` is (x, y, z).
fn choose(path: &Path, h: &NiftiHeader, spacing: [f64; 3], axes: usize, warnings: &mut Vec<String>) -> Result<Affine> {
    let sform = (h.sform_code > 0).then(|| {
        let rows = [h.srow_x, h.srow_y, h.srow_z].map(|row| row.map(f64::from));
        if axes == 2 { with_normal(rows, spacing[2]) } else { rows }
    });
    let qform = (h.qform_code > 0).then(|| qform(h, spacing));
    match (sform, qform) {
        (Some(s), q) if is_usable(&s) => {
            if let Some(q) = q.filter(|q| !same(&s, q, spacing)) {
                let what = format!("sform {s:?} and qform {q:?} differ; the sform is used");
                warnings.push(what);
            }
            if is_sheared(&s, axes) {
                warnings.push("the sform is sheared: voxels are not boxes".into());
            }
            Ok(s)
        }
        (Some(_), Some(q)) if is_usable(&q) => {
            warnings.push("the sform is not finite or singular; the qform is used".into());
            Ok(q)
        }
        (None, Some(q)) if is_usable(&q) => Ok(q),
        (Some(_), _) => Err(Error::image(path, "sform", "not finite or singular, expected an invertible affine")),
        (None, Some(_)) => Err(Error::image(path, "qform", "not finite, expected a rotation and an offset")),
        (None, None) => {
            warnings.push("neither sform nor qform: where left and right are is unknown, RAS+ is assumed".into());
            let [x, y, z] = spacing;
            Ok([[x, 0.0, 0.0, 0.0], [0.0, y, 0.0, 0.0], [0.0, 0.0, z, 0.0]])
        }
    }
}

/// Method 2 of the NIfTI-1 standard: rotation by a unit quaternion of which the header stores three parts, voxel sizes
/// from `pixdim`, z mirrored when `pixdim[0]` (qfac) is negative; 0 counts as +1.
fn qform(h: &NiftiHeader, spacing: [f64; 3]) -> Affine {
    let [mut b, mut c, mut d] = [h.quatern_b, h.quatern_c, h.quatern_d].map(f64::from);
    let square = b * b + c * c + d * d;
    let a = if 1.0 - square < 1e-7 {
        // Rounding, or a damaged file: the standard's own library takes the nearest rotation, one by 180 degrees.
        let scale = 1.0 / square.sqrt();
        (b, c, d) = (b * scale, c * scale, d * scale);
        0.0
    } else {
        (1.0 - square).sqrt()
    };
    let [x, y, z] = spacing;
    let z = if h.pixdim[0] < 0.0 { -z } else { z };
    [
        [
            (a * a + b * b - c * c - d * d) * x,
            2.0 * (b * c - a * d) * y,
            2.0 * (b * d + a * c) * z,
            f64::from(h.quatern_x),
        ],
        [
            2.0 * (b * c + a * d) * x,
            (a * a + c * c - b * b - d * d) * y,
            2.0 * (c * d - a * b) * z,
            f64::from(h.quatern_y),
        ],
        [
            2.0 * (b * d - a * c) * x,
            2.0 * (c * d + a * b) * y,
            (a * a + d * d - c * c - b * b) * z,
            f64::from(h.quatern_z),
        ],
    ]
}

/// Gives the matrix of a flat image that leaves z empty a column at right angles to its plane.
fn with_normal(mut a: Affine, length: f64) -> Affine {
    if a.iter().all(|row| row[2] == 0.0) {
        let [x, y]: [[f64; 3]; 2] = std::array::from_fn(|i| a.map(|row| row[i]));
        let n = [x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0]];
        let norm = n.iter().map(|v| v * v).sum::<f64>().sqrt();
        for (row, v) in a.iter_mut().zip(n) {
            row[2] = v * length / norm;
        }
    }
    a
}

/// Lengths of the columns for x, y, z.
pub(super) fn column_lengths(a: &Affine) -> [f64; 3] {
    std::array::from_fn(|i| a.iter().map(|row| row[i] * row[i]).sum::<f64>().sqrt())
}

fn determinant(a: &Affine) -> f64 {
    let [a, b, c] = a;
    a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])
}

fn is_usable(a: &Affine) -> bool {
    let [x, y, z] = column_lengths(a);
    a.iter().flatten().all(|v| v.is_finite()) && determinant(a).abs() > 1e-6 * x * y * z
}

/// Two columns are more than about 0.06 degrees off the right angle.
fn is_sheared(a: &Affine, axes: usize) -> bool {
    let n = column_lengths(a);
    let dot = |i: usize, j: usize| a.iter().map(|row| row[i] * row[j]).sum::<f64>() / (n[i] * n[j]);
    (0..axes).any(|i| (0..i).any(|j| dot(i, j).abs() > 1e-3))
}

/// True when no entry of the matrices differs by more than a thousandth of a voxel, offsets a hundredth.
pub(super) fn same(p: &Affine, q: &Affine, spacing: [f64; 3]) -> bool {
    let voxel = spacing.into_iter().fold(f64::INFINITY, f64::min);
    p.iter().zip(q).all(|(r, s)| (0..4).all(|i| (r[i] - s[i]).abs() <= voxel * if i < 3 { 1e-3 } else { 1e-2 }))
}
