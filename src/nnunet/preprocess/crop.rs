//! The nonzero region of an image (nnU-Net `crop_to_nonzero`).

use super::resample::View;
use crate::base::par;
use crate::nnunet::volume::Mask;

/// What one pass over the channels found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scan {
    /// Smallest box that holds every voxel that is not 0 in all channels, half-open along (z, y, x) of the view.
    /// `None` where all voxels are 0.
    pub(crate) bbox: Option<[[usize; 2]; 3]>,
    /// Voxels of each channel that are not a number.
    pub(crate) nan: Vec<usize>,
    /// Voxels of each channel that are infinite.
    pub(crate) infinite: Vec<usize>,
}

/// Looks at every voxel of all `channels` through `view`. NaN counts as nonzero, as it does in numpy.
pub(crate) fn scan(channels: &[Vec<f32>], view: &View) -> Scan {
    let [nz, ny, nx] = view.shape;
    let planes = par::map(nz, |z| {
        let mut row = vec![0f32; nx];
        // Per channel: NaN, infinite.
        let mut odd = vec![(0, 0); channels.len()];
        let (mut y_range, mut x_range) = ([ny, 0], [nx, 0]);
        for y in 0..ny {
            for (array, odd) in channels.iter().zip(&mut odd) {
                view.read(array, z, y, &mut row);
                if !row.iter().fold(true, |all, v| all & v.is_finite()) {
                    odd.0 += row.iter().filter(|v| v.is_nan()).count();
                    odd.1 += row.iter().filter(|v| v.is_infinite()).count();
                }
                if let Some(first) = row.iter().position(|&v| v != 0.0) {
                    let last = row.iter().rposition(|&v| v != 0.0).unwrap_or(first);
                    x_range = [x_range[0].min(first), x_range[1].max(last + 1)];
                    y_range = [y_range[0].min(y), y_range[1].max(y + 1)];
                }
            }
        }
        (odd, y_range, x_range)
    });
    let mut bbox = [[nz, 0], [ny, 0], [nx, 0]];
    let (mut nan, mut infinite) = (vec![0; channels.len()], vec![0; channels.len()]);
    for (z, (odd, y_range, x_range)) in planes.into_iter().enumerate() {
        for (c, (n, i)) in odd.into_iter().enumerate() {
            nan[c] += n;
            infinite[c] += i;
        }
        if y_range[0] < y_range[1] {
            for (b, r) in bbox.iter_mut().zip([[z, z + 1], y_range, x_range]) {
                *b = [b[0].min(r[0]), b[1].max(r[1])];
            }
        }
    }
    Scan { bbox: (bbox[0][0] < bbox[0][1]).then_some(bbox), nan, infinite }
}

impl Mask {
    /// Voxels that are nonzero in any channel, holes filled.
    ///
    /// `view` must be the crop to the nonzero box: all that lies outside of it is background, so filling inside of it
    /// is the same as filling the whole array.
    pub(crate) fn nonzero(channels: &[Vec<f32>], view: &View) -> Self {
        let mut mask = Self::new(view.shape, |z, y, inside| {
            let mut row = vec![0f32; inside.len()];
            inside.fill(false);
            for array in channels {
                view.read(array, z, y, &mut row);
                inside.iter_mut().zip(&row).for_each(|(i, &v)| *i |= v != 0.0);
            }
        });
        mask.fill_holes();
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scan_finds_the_box_and_the_odd_values() {
        let mut a = vec![0f32; 4 * 5 * 6];
        let mut b = a.clone();
        a[(5 + 2) * 6 + 3] = 1.0;
        b[(2 * 5 + 4) * 6 + 1] = f32::NAN;
        b[(2 * 5 + 4) * 6 + 2] = f32::NEG_INFINITY;
        let view = View::whole([4, 5, 6]);
        let found = scan(&[a.clone(), b.clone()], &view);
        assert_eq!(found.bbox, Some([[1, 3], [2, 5], [1, 4]]));
        assert_eq!((found.nan, found.infinite), (vec![0, 1], vec![0, 1]));
        let turned = scan(&[a, b], &view.transposed([2, 0, 1]));
        assert_eq!(turned.bbox, Some([[1, 4], [1, 3], [2, 5]]));
        assert_eq!(scan(&[vec![0.0; 120]], &view).bbox, None);
    }
}
