//! Where windows go, and how much each voxel of a window counts.

use crate::base::par;

/// First voxels of the windows along one axis: evenly spread, at most `patch * step` apart, rounded half to even
/// (nnU-Net `compute_steps_for_sliding_window`).
pub(crate) fn starts(image: usize, patch: usize, step: f64) -> Vec<usize> {
    let span = image.saturating_sub(patch);
    let n = (span as f64 / (patch as f64 * step)).ceil() as usize + 1;
    let actual = if n > 1 { span as f64 / (n - 1) as f64 } else { 0.0 };
    (0..n).map(|i| (actual * i as f64).round_ties_even() as usize).collect()
}

/// Scipy's `gaussian_filter1d` of a unit impulse at `n / 2` with sigma `n / 8`, cut at four sigmas, nothing outside.
fn impulse_response(n: usize) -> Vec<f64> {
    let sigma = n as f64 / 8.0;
    let radius = (4.0 * sigma + 0.5) as usize;
    let weight = |k: usize| (-0.5 * (k as f64 / sigma).powi(2)).exp();
    let sum: f64 = weight(0) + 2.0 * (1..=radius).map(weight).sum::<f64>();
    (0..n).map(|i| i.abs_diff(n / 2)).map(|k| if k <= radius { weight(k) / sum } else { 0.0 }).collect()
}

/// Importance of each voxel of a window, (z, y, x): a Gaussian with sigma = patch / 8, 1 at its maximum, zeros
/// replaced by the smallest other value (nnU-Net `compute_gaussian`), in f32.
pub(crate) fn gaussian(patch: [usize; 3]) -> Vec<f32> {
    let [gz, gy, gx] = patch.map(impulse_response);
    let max = |g: &[f64]| g.iter().copied().fold(0.0, f64::max);
    let scale = max(&gz) * max(&gy) * max(&gx);
    let mut map = vec![0f32; patch.iter().product()];
    par::chunks_mut(&mut map, patch[1] * patch[2], |z, plane| {
        for (y, row) in plane.chunks_exact_mut(patch[2]).enumerate() {
            for (v, x) in row.iter_mut().zip(&gx) {
                *v = (gz[z] * gy[y] * x / scale) as f32;
            }
        }
    });
    let least = map.iter().copied().filter(|&v| v > 0.0).fold(f32::INFINITY, f32::min);
    map.iter_mut().filter(|v| **v == 0.0).for_each(|v| *v = least);
    map
}

/// Every subset of `axes`, in the order of Python's `itertools.combinations` by rising size, none first: the
/// mirrored passes of test-time augmentation.
pub(crate) fn mirrors(axes: &[usize]) -> Vec<[bool; 3]> {
    let mut sets: Vec<u32> = (0..1 << axes.len()).collect();
    // Reversed bits compare like the index tuples do.
    sets.sort_by_key(|s| (s.count_ones(), std::cmp::Reverse(s.reverse_bits())));
    let flips = |s: u32| {
        let mut f = [false; 3];
        axes.iter().enumerate().filter(|(k, _)| s >> k & 1 == 1).for_each(|(_, &a)| f[a] = true);
        f
    };
    sets.into_iter().map(flips).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that nnU-Net's function gives.
    #[test]
    fn starts_are_nnunets() {
        assert_eq!(starts(110, 64, 0.5), [0, 23, 46]);
        assert_eq!(starts(228, 128, 0.5), [0, 50, 100]);
        assert_eq!(starts(240, 128, 0.5), [0, 56, 112]);
        assert_eq!(starts(300, 128, 0.8), [0, 86, 172]);
        assert_eq!(starts(64, 64, 0.5), [0]);
    }

    #[test]
    fn mirrors_are_ordered_as_combinations() {
        let as_axes: Vec<Vec<usize>> = mirrors(&[0, 1, 2]).iter().map(|f| (0..3).filter(|&a| f[a]).collect()).collect();
        let expected: [&[usize]; 8] = [&[], &[0], &[1], &[2], &[0, 1], &[0, 2], &[1, 2], &[0, 1, 2]];
        assert_eq!(as_axes, expected);
        assert_eq!(mirrors(&[]), [[false; 3]]);
    }

    #[test]
    fn gaussian_peaks_at_the_centre_and_is_positive() {
        let g = gaussian([8, 12, 16]);
        assert_eq!(g[(4 * 12 + 6) * 16 + 8], 1.0);
        assert!(g.iter().all(|&v| v > 0.0 && v <= 1.0));
    }
}
