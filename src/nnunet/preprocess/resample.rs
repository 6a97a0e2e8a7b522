//! Resampling of volumes and label maps (nnU-Net `resample_data_or_seg_to_shape`), including the rule that treats a
//! coarse axis apart.

use bytemuck::Zeroable;
use bytemuck::allocation::try_zeroed_vec;

use super::spline::Axis;
use crate::base::par;
use crate::error::{Error, Result};
use crate::nnunet::plans::Resampling;
use crate::ops::resample::{LANES, Lane};
use crate::tensor::Isa;

/// Above this ratio of the largest to the smallest spacing the coarse axis is treated apart.
const ANISOTROPY: f64 = 3.0;

/// More voxels than this in one channel are taken for a wrong spacing, not for an image.
const MAX_VOXELS: usize = 1 << 33;

/// A volume that is read row by row, so that crops, transposes and intensity maps need no copy.
pub(crate) trait Rows: Sync {
    /// Voxels along (z, y, x).
    fn shape(&self) -> [usize; 3];
    /// Writes the row at (z, y) to `out`, x rising.
    fn row(&self, z: usize, y: usize, out: &mut [f32]);
}

/// Some axes of an array, in any order: an array seen through a transpose and a crop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// Voxels along (z, y, x) of the view.
    pub(crate) shape: [usize; 3],
    /// Steps in the array for one step along (z, y, x) of the view.
    pub(crate) strides: [usize; 3],
    /// Position of the view's first voxel.
    pub(crate) base: usize,
}

impl View {
    /// A whole array in its own order.
    pub(crate) fn whole(shape: [usize; 3]) -> Self {
        Self { shape, strides: [shape[1] * shape[2], shape[2], 1], base: 0 }
    }

    /// Axis k of the new view is axis `axes[k]` of this one, as in `numpy.transpose`.
    pub(crate) fn transposed(self, axes: [usize; 3]) -> Self {
        Self { shape: axes.map(|a| self.shape[a]), strides: axes.map(|a| self.strides[a]), base: self.base }
    }

    /// The part inside `bbox`, given half-open per axis.
    pub(crate) fn cropped(self, bbox: [[usize; 2]; 3]) -> Self {
        let base = self.base + (0..3).map(|k| bbox[k][0] * self.strides[k]).sum::<usize>();
        Self { shape: bbox.map(|[lo, hi]| hi - lo), strides: self.strides, base }
    }

    /// Copies the row at (z, y) of `array` to `out`.
    pub(crate) fn read<T: Copy>(&self, array: &[T], z: usize, y: usize, out: &mut [T]) {
        let at = self.base + z * self.strides[0] + y * self.strides[1];
        if self.strides[2] == 1 {
            out.copy_from_slice(&array[at..at + self.shape[2]]);
        } else {
            for (o, v) in out.iter_mut().zip(array[at..].iter().step_by(self.strides[2])) {
                *o = *v;
            }
        }
    }

    /// Copies `row` to the row at (z, y) of `array`.
    pub(crate) fn write<T: Copy>(&self, row: &[T], z: usize, y: usize, array: &mut [T]) {
        let at = self.base + z * self.strides[0] + y * self.strides[1];
        if self.strides[2] == 1 {
            array[at..at + self.shape[2]].copy_from_slice(row);
        } else {
            for (o, v) in array[at..].iter_mut().step_by(self.strides[2]).zip(row) {
                *o = *v;
            }
        }
    }
}

/// An array in memory, seen through a view.
pub(crate) struct Held<'a> {
    /// The values.
    pub(crate) array: &'a [f32],
    /// Which of them, in which order.
    pub(crate) view: View,
}

impl Rows for Held<'_> {
    fn shape(&self) -> [usize; 3] {
        self.view.shape
    }

    fn row(&self, z: usize, y: usize, out: &mut [f32]) {
        self.view.read(self.array, z, y, out);
    }
}

/// Copies all rows of `source` to `out`.
pub(crate) fn copy_rows<R: Rows + ?Sized>(source: &R, out: &mut [f32]) {
    let [_, ny, nx] = source.shape();
    par::chunks_mut(out, ny * nx, |z, plane| {
        plane.chunks_mut(nx).enumerate().for_each(|(y, row)| source.row(z, y, row));
    });
}

/// Memory for `n` values, or an error where the system has none: sizes come from image headers. Not touched here, so
/// that the threads that fill it share the work of getting its pages.
pub(crate) fn zeros<T: Zeroable>(n: usize, what: &str) -> Result<Vec<T>> {
    try_zeroed_vec(n).map_err(|()| Error::OutOfMemory {
        what: what.into(),
        asked: n.saturating_mul(size_of::<T>()),
        in_use: 0,
        limit: isize::MAX as usize,
    })
}

/// Shape of a volume after resampling from spacing `old` to `new` (mm): `round(old / new * shape)`, halves to even
/// (nnU-Net `compute_new_shape`).
///
/// # Errors
/// [`Error::Input`] for spacings that are not positive, and when an axis would vanish or the volume explode.
pub(crate) fn new_shape(shape: [usize; 3], old: [f64; 3], new: [f64; 3]) -> Result<[usize; 3]> {
    if let Some(s) = old.iter().chain(&new).find(|s| !(s.is_finite() && **s > 0.0)) {
        return Err(Error::input(format!("a voxel spacing of {s} mm was found, a positive number is expected")));
    }
    let mut out = [0; 3];
    for k in 0..3 {
        let n = (old[k] / new[k] * shape[k] as f64).round_ties_even();
        if n < 1.0 {
            return Err(Error::input(format!(
                "too thin: {} voxels of {} mm along an axis are none at the model's {} mm",
                shape[k], old[k], new[k]
            )));
        }
        out[k] = n.min(MAX_VOXELS as f64) as usize;
    }
    match out.iter().try_fold(1usize, |n, &s| n.checked_mul(s)) {
        Some(n) if n <= MAX_VOXELS => Ok(out),
        _ => Err(Error::input(format!(
            "it would have {out:?} voxels at the model's spacing of {new:?} mm; its own spacing, {old:?} mm, \
             must be wrong"
        ))),
    }
}

/// The axis that is resampled apart, if any (nnU-Net `determine_do_sep_z_and_axis`): the one coarsest axis of
/// `current` where it is more than three times the finest, or else of `new`.
pub(crate) fn separate_axis(rule: &Resampling, current: [f64; 3], new: [f64; 3]) -> Option<usize> {
    let max = |s: [f64; 3]| s.into_iter().fold(f64::MIN, f64::max);
    let anisotropic = |s: [f64; 3]| max(s) / s.into_iter().fold(f64::MAX, f64::min) > ANISOTROPY;
    let spacing = match rule.force_separate_z {
        Some(false) => return None,
        Some(true) => current,
        None if anisotropic(current) => current,
        None if anisotropic(new) => new,
        None => return None,
    };
    let mut coarse = (0..3).filter(|&k| max(spacing) / spacing[k] == 1.0);
    // Two or three equally coarse axes: nothing stands apart.
    match (coarse.next(), coarse.next()) {
        (Some(axis), None) => Some(axis),
        _ => None,
    }
}

/// How the three axes go from `from` to `to` voxels.
pub(crate) fn axes(from: [usize; 3], to: [usize; 3], rule: &Resampling, apart: Option<usize>) -> Result<[Axis; 3]> {
    let axis = |k: usize| {
        if apart == Some(k) && rule.order_z > 1 && from[k] != to[k] {
            return Err(Error::unsupported(format!("resampling of order {} along the coarse axis", rule.order_z)));
        }
        Axis::new(from[k], to[k], if apart == Some(k) { rule.order_z } else { rule.order })
    };
    Ok([axis(0)?, axis(1)?, axis(2)?])
}

/// Resamples `source` into `out`, (z, y, x) with `to` voxels. Like skimage's `resize` it clips to the range of the
/// input: of the whole volume, or of each slice where an axis is treated `apart`.
pub(crate) fn resample<R: Rows + ?Sized>(
    source: &R,
    to: [usize; 3],
    rule: &Resampling,
    apart: Option<usize>,
    isa: Isa,
    out: &mut [f32],
) -> Result<()> {
    let [az, ay, ax] = axes(source.shape(), to, rule, apart)?;
    match apart {
        None => volume(isa, source, [&az, &ay, &ax], false, out),
        Some(0) => volume(isa, source, [&az, &ay, &ax], true, out),
        // The core treats its first axis apart: bring the coarse axis there, and its result back.
        Some(axis) => {
            let (order, back) = if axis == 1 { ([1, 0, 2], [1, 0, 2]) } else { ([2, 0, 1], [1, 2, 0]) };
            let (from, all) = (source.shape(), [az, ay, ax]);
            let mut held = zeros(from.iter().product(), "resampling")?;
            copy_rows(source, &mut held);
            let turned = Held { array: &held, view: View::whole(from).transposed(order) };
            let mut result = zeros(out.len(), "resampling")?;
            volume(isa, &turned, order.map(|k| &all[k]), true, &mut result)?;
            copy_rows(&Held { array: &result, view: View::whole(order.map(|k| to[k])).transposed(back) }, out);
            Ok(())
        }
    }
}

/// Slices along the first axis, then along the first axis.
fn volume<R: Rows + ?Sized>(
    isa: Isa,
    source: &R,
    [az, ay, ax]: [&Axis; 3],
    apart: bool,
    out: &mut [f32],
) -> Result<()> {
    let (plane, slices) = (ay.output() * ax.output(), az.input());
    if az.is_same() {
        let ranges = in_plane(isa, source, ay, ax, apart, out);
        let resampled = !(ay.is_same() && ax.is_same());
        if resampled && !apart {
            let (lo, hi) = join(&ranges);
            par::chunks_mut(out, plane, |_, p| p.iter_mut().for_each(|v| *v = v.clamp(lo, hi)));
        }
        return Ok(());
    }
    // The planes in between are kept in f32: one rounding, 6e-8 of the value.
    let mut between = zeros(slices * plane, "resampling")?;
    let ranges = in_plane(isa, source, ay, ax, apart, &mut between);
    let clip = if apart { (f32::MIN, f32::MAX) } else { join(&ranges) };
    through_planes(isa, &between, az, plane, clip, out);
    Ok(())
}

/// Smallest and largest of several ranges.
fn join(ranges: &[(f32, f32)]) -> (f32, f32) {
    ranges.iter().fold((f32::MAX, f32::MIN), |(lo, hi), &(l, h)| (lo.min(l), hi.max(h)))
}

/// What one slice at a time is worked on with.
struct Scratch {
    /// The slice as it is, (y, x).
    whole: Vec<f32>,
    /// After the y axis, (y, x), rows of [`Scratch::stride`].
    half: Vec<f64>,
    /// Not a power of two, as widths of images are: [`LANES`] rows are read side by side, and would share a few lines of
    /// the cache.
    stride: usize,
    panel: Vec<Lane>,
    lines: Vec<Lane>,
}

/// Resamples every slice of `source` in its plane into `out`; `clip`: to the slice's own range. Returns the range of
/// every slice's input.
///
/// First along y, where lines lie side by side already, then along x, where they are turned.
fn in_plane<R: Rows + ?Sized>(
    isa: Isa,
    source: &R,
    ay: &Axis,
    ax: &Axis,
    clip: bool,
    out: &mut [f32],
) -> Vec<(f32, f32)> {
    let [slices, ny, nx] = source.shape();
    let (my, mx) = (ay.output(), ax.output());
    let mut planes: Vec<(&mut [f32], (f32, f32))> =
        out.chunks_mut((my * mx).max(1)).map(|p| (p, (f32::MAX, f32::MIN))).collect();
    debug_assert_eq!(planes.len(), slices);
    let stride = nx + 8;
    let make = || Scratch {
        whole: vec![0.0; ny * nx],
        half: vec![0.0; my * stride],
        stride,
        panel: Vec::new(),
        lines: vec![[0.0; LANES]; my.max(mx)],
    };
    par::chunks_mut_with(&mut planes, 1, make, |scratch, z, work| {
        let (plane, range) = &mut work[0];
        for (y, row) in scratch.whole.chunks_mut(nx).enumerate() {
            source.row(z, y, row);
            *range = row.iter().fold(*range, |(lo, hi), &v| (lo.min(v), hi.max(v)));
        }
        if ay.is_same() && ax.is_same() {
            plane.copy_from_slice(&scratch.whole);
            return;
        }
        let (lo, hi) = if clip { *range } else { (f32::MIN, f32::MAX) };
        along_y(isa, ay, nx, scratch);
        along_x(isa, ax, scratch, |v| (v as f32).max(lo).min(hi), plane);
    });
    planes.into_iter().map(|(_, range)| range).collect()
}

/// `scratch.whole` to `scratch.half`.
fn along_y(isa: Isa, axis: &Axis, nx: usize, scratch: &mut Scratch) {
    let Scratch { whole, half, stride, panel, lines } = scratch;
    if axis.is_same() {
        for (h, v) in half.chunks_mut(*stride).zip(whole.chunks(nx)) {
            h.iter_mut().zip(v).for_each(|(h, v)| *h = f64::from(*v));
        }
        return;
    }
    let pad = axis.panel(panel);
    for x in (0..nx).step_by(LANES) {
        let lanes = LANES.min(nx - x);
        for (sample, row) in panel[pad..].iter_mut().zip(whole.chunks(nx)) {
            sample.iter_mut().zip(&row[x..x + lanes]).for_each(|(s, v)| *s = f64::from(*v));
        }
        let lines = &mut lines[..axis.output()];
        axis.run(isa, panel, lines);
        for (row, line) in half.chunks_mut(*stride).zip(lines) {
            row[x..x + lanes].copy_from_slice(&line[..lanes]);
        }
    }
}

/// `scratch.half` to `plane`.
fn along_x(isa: Isa, axis: &Axis, scratch: &mut Scratch, keep: impl Fn(f64) -> f32, plane: &mut [f32]) {
    let Scratch { half, stride, panel, lines, .. } = scratch;
    let (nx, mx) = (axis.input(), axis.output());
    if axis.is_same() {
        for (p, h) in plane.chunks_mut(mx).zip(half.chunks(*stride)) {
            p.iter_mut().zip(h).for_each(|(p, h)| *p = keep(*h));
        }
        return;
    }
    let pad = axis.panel(panel);
    let lines = &mut lines[..mx];
    for (rows, half) in plane.chunks_mut(LANES * mx).zip(half.chunks(LANES * *stride)) {
        for (x, sample) in panel[pad..pad + nx].iter_mut().enumerate() {
            sample.iter_mut().zip(half.chunks(*stride)).for_each(|(s, row)| *s = row[x]);
        }
        axis.run(isa, panel, lines);
        for (o, line) in lines.iter().enumerate() {
            rows.chunks_mut(mx).zip(line).for_each(|(row, v)| row[o] = keep(*v));
        }
    }
}

/// Resamples along the first axis: `between` is (slices, plane).
fn through_planes(isa: Isa, between: &[f32], az: &Axis, plane: usize, (lo, hi): (f32, f32), out: &mut [f32]) {
    // Columns of the result are not contiguous: each piece of columns is made apart and then laid in place.
    const PIECE: usize = 8 * LANES;
    let m = az.output();
    let mut rows: Vec<Vec<&mut [f32]>> = (0..plane.div_ceil(PIECE)).map(|_| Vec::with_capacity(m)).collect();
    for slice in out.chunks_mut(plane.max(1)) {
        slice.chunks_mut(PIECE).zip(&mut rows).for_each(|(part, row)| row.push(part));
    }
    let make = || (Vec::new(), vec![[0.0; LANES]; m]);
    par::chunks_mut_with(&mut rows, 1, make, |(panel, lines), piece, work| {
        let parts = &mut work[0];
        let columns = PIECE.min(plane - piece * PIECE);
        let pad = az.panel(panel);
        for c in (0..columns).step_by(LANES) {
            let lanes = LANES.min(columns - c);
            for z in 0..az.input() {
                let from = &between[z * plane + piece * PIECE + c..][..lanes];
                panel[pad + z].iter_mut().zip(from).for_each(|(p, v)| *p = f64::from(*v));
            }
            az.run(isa, panel, lines);
            for (part, line) in parts.iter_mut().zip(&*lines) {
                part[c..c + lanes].iter_mut().zip(line).for_each(|(p, v)| *p = (*v as f32).max(lo).min(hi));
            }
        }
    });
}

#[cfg(test)]
mod tests;
