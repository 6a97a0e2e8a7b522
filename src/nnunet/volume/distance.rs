//! Exact Euclidean distance transforms.
//!
//! Squared distances separate into one lower envelope of parabolas per line and axis (Felzenszwalb and Huttenlocher,
//! "Distance transforms of sampled functions", 2012), which is built and read by comparisons alone, without the places
//! where parabolas cross (Maurer, Qi and Raghavan, "A linear time algorithm for computing exact Euclidean distance
//! transforms of binary images in arbitrary dimensions", 2003).

use crate::base::par;

/// Columns that are worked on together: neighbours in memory.
const BLOCK: usize = 8;

/// Fills `out`, (z, y, x) of `shape`, with each voxel's distance to the nearest one outside of `mask`, in the unit of
/// `spacing`; infinite where the mask leaves none out.
pub(super) fn transform(mask: &[bool], shape: [usize; 3], spacing: [f64; 3], out: &mut [f64]) {
    let [nz, ny, nx] = shape;
    if out.is_empty() {
        return;
    }
    let squares = |k: usize| (0..shape[k]).map(|d| (d as f64 * spacing[k]).powi(2)).collect::<Vec<f64>>();
    let (along_z, along_y) = (squares(0), squares(1));
    par::chunks_mut_with(out, ny * nx, Envelope::default, |envelope, z, plane| {
        for (y, row) in plane.chunks_exact_mut(nx).enumerate() {
            along_row(&mask[(z * ny + y) * nx..][..nx], spacing[2], row);
        }
        let mut rows: Vec<&mut [f64]> = plane.chunks_exact_mut(nx).collect();
        envelope.across(&mut rows, &along_y, |d| d);
    });
    // The rows of a plane through z and x lie apart.
    let mut planes: Vec<Vec<&mut [f64]>> = (0..ny).map(|_| Vec::with_capacity(nz)).collect();
    for (i, row) in out.chunks_exact_mut(nx).enumerate() {
        planes[i % ny].push(row);
    }
    par::each(planes, |_, mut rows| Envelope::default().across(&mut rows, &along_z, f64::sqrt));
}

/// Squared distances within a row.
fn along_row(mask: &[bool], spacing: f64, out: &mut [f64]) {
    let mut steps = f64::INFINITY;
    for (o, inside) in out.iter_mut().zip(mask) {
        steps = if *inside { steps + 1.0 } else { 0.0 };
        *o = steps;
    }
    steps = f64::INFINITY;
    for (o, inside) in out.iter_mut().zip(mask).rev() {
        steps = if *inside { steps + 1.0 } else { 0.0 };
        *o = (o.min(steps) * spacing).powi(2);
    }
}

/// The parabolas of a line that are lowest somewhere, by rising place.
#[derive(Default)]
struct Envelope {
    /// Where each has its lowest point.
    places: Vec<usize>,
    /// How high that is.
    heights: Vec<f64>,
    /// Columns, one after the other.
    columns: Vec<f64>,
}

impl Envelope {
    /// Adds the distances along the columns of `rows`, of which `squares` holds those of 0, 1 ... steps, to the squared
    /// distances that stand in them; `finish` is done to every sum.
    fn across(&mut self, rows: &mut [&mut [f64]], squares: &[f64], finish: impl Fn(f64) -> f64) {
        let n = rows.len();
        let width = rows.first().map_or(0, |r| r.len());
        self.columns.resize(BLOCK * n, 0.0);
        let mut columns = std::mem::take(&mut self.columns);
        for first in (0..width).step_by(BLOCK) {
            let block = BLOCK.min(width - first);
            let mut any = false;
            for (i, row) in rows.iter().enumerate() {
                for (c, v) in row[first..first + block].iter().enumerate() {
                    columns[c * n + i] = *v;
                    any |= *v != 0.0;
                }
            }
            // All outside of the mask.
            if !any {
                continue;
            }
            for column in columns.chunks_exact_mut(n).take(block) {
                self.lower(column, squares);
            }
            for (i, row) in rows.iter_mut().enumerate() {
                for (c, v) in row[first..first + block].iter_mut().enumerate() {
                    *v = finish(columns[c * n + i]);
                }
            }
        }
        self.columns = columns;
    }

    /// Replaces a column by the lower envelope of the parabolas that stand on it.
    fn lower(&mut self, column: &mut [f64], squares: &[f64]) {
        let unit = squares.get(1).copied().unwrap_or(1.0);
        let (places, heights) = (&mut self.places, &mut self.heights);
        places.clear();
        heights.clear();
        for (place, &height) in column.iter().enumerate() {
            if height == f64::INFINITY {
                continue;
            }
            while let ([.., u, v], [.., low, middle]) = (&places[..], &heights[..]) {
                let (a, b) = ((v - u) as f64, (place - v) as f64);
                // The middle one is nowhere below both others.
                if (a + b) * middle - b * low - a * height < a * b * (a + b) * unit {
                    break;
                }
                places.pop();
                heights.pop();
            }
            places.push(place);
            heights.push(height);
        }
        if places.is_empty() {
            return;
        }
        let mut i = 0;
        let at = |i: usize, place: usize| heights[i] + squares[place.abs_diff(places[i])];
        for (place, value) in column.iter_mut().enumerate() {
            let mut lowest = at(i, place);
            while i + 1 < places.len() {
                let next = at(i + 1, place);
                if next > lowest {
                    break;
                }
                (i, lowest) = (i + 1, next);
            }
            *value = lowest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition.
    fn nearest(mask: &[bool], [nz, ny, nx]: [usize; 3], spacing: [f64; 3]) -> Vec<f64> {
        let place = |i: usize| [i / (ny * nx), i / nx % ny, i % nx];
        let square = |a: [usize; 3], b: [usize; 3]| -> f64 {
            (0..3).map(|k| (a[k].abs_diff(b[k]) as f64 * spacing[k]).powi(2)).sum()
        };
        let outside: Vec<[usize; 3]> = (0..nz * ny * nx).filter(|i| !mask[*i]).map(place).collect();
        let to = |i: usize| outside.iter().map(|o| square(place(i), *o)).fold(f64::INFINITY, f64::min).sqrt();
        (0..mask.len()).map(to).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn distances_are_those_to_the_nearest_voxel_outside(
            shape in [1usize..9, 1usize..12, 1usize..22],
            values in proptest::collection::vec(0f64..1.0, 9 * 12 * 22),
            density in 0f64..=1.0,
            spacing in [0.2f64..5.0, 0.2f64..5.0, 0.2f64..5.0],
        ) {
            let mask: Vec<bool> = values[..shape.iter().product()].iter().map(|v| *v <= density.sqrt()).collect();
            let mut found = vec![-1.0; mask.len()];
            transform(&mask, shape, spacing, &mut found);
            for (f, e) in found.iter().zip(nearest(&mask, shape, spacing)) {
                // Three squares and two sums of up to half an epsilon each, on both sides, and a parabola dropped for one that
                // rounding makes as low; the root halves all of it.
                prop_assert!(f == &e || (f - e).abs() <= 8.0 * f64::EPSILON * e, "{f} {e}");
            }
        }
    }

    #[test]
    fn a_mask_that_is_everywhere_is_infinitely_far_from_the_outside() {
        let mut out = vec![0.0; 24];
        transform(&[true; 24], [2, 3, 4], [1.0; 3], &mut out);
        assert!(out.iter().all(|d| *d == f64::INFINITY));
        transform(&[], [0, 3, 4], [1.0; 3], &mut []);
    }

    #[test]
    fn far_along_every_axis() {
        for k in 0..3 {
            let mut shape = [1; 3];
            shape[k] = 700;
            let mask: Vec<bool> = (0..700).map(|i| i != 650).collect();
            let mut out = vec![0.0; 700];
            transform(&mask, shape, [0.5, 0.25, 2.0], &mut out);
            let spacing = [0.5, 0.25, 2.0][k];
            assert!(out.iter().enumerate().all(|(i, d)| *d == i.abs_diff(650) as f64 * spacing), "{k}");
        }
    }
}
