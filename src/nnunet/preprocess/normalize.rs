//! Intensity normalisation (nnU-Net `default_normalization_schemes`; v1 `GenericPreprocessor`).

use super::resample::Rows;
use crate::base::par;
use crate::error::{Error, Result};
use crate::nnunet::plans::{Channel, Normalization, Rules};
use crate::nnunet::volume::Mask;

/// nnU-Net's floor of divisors.
const TINY: f64 = 1e-8;

/// `(clamp(x, lo, hi) - shift) / scale` in f32, the arithmetic of numpy on float32 arrays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Map {
    clip: Option<(f32, f32)>,
    shift: f32,
    scale: f32,
}

impl Map {
    /// Leaves every value as it is.
    pub(crate) const SAME: Map = Map { clip: None, shift: 0.0, scale: 1.0 };

    /// Maps all of `values`.
    pub(crate) fn apply(&self, values: &mut [f32]) {
        if let Some((lo, hi)) = self.clip {
            values.iter_mut().for_each(|v| *v = v.max(lo).min(hi));
        }
        if *self != Map::SAME {
            values.iter_mut().for_each(|v| *v = (*v - self.shift) / self.scale);
        }
    }
}

/// Mean, population standard deviation, smallest and largest of the values of `source`, inside `mask` if there is
/// one; `None` where that leaves no voxel. Sums are f64, row by row in order: exact enough that numpy's own rounding is
/// the larger error, and the same for any number of threads.
pub(crate) fn statistics<R: Rows + ?Sized>(source: &R, mask: Option<&Mask>) -> Option<(f64, f64, f32, f32)> {
    let [nz, ny, nx] = source.shape();
    // Folds all values of a plane.
    let plane = |z: usize, f: &mut dyn FnMut(&[f32])| {
        let (mut row, mut kept) = (vec![0f32; nx], Vec::with_capacity(nx));
        for y in 0..ny {
            source.row(z, y, &mut row);
            match mask {
                None => f(&row),
                Some(mask) => {
                    kept.clear();
                    mask.row(z, y, |x, inside| {
                        if inside {
                            kept.push(row[x]);
                        }
                    });
                    f(&kept);
                }
            }
        }
    };
    let sums = par::map(nz, |z| {
        let (mut count, mut sum, mut lo, mut hi) = (0usize, 0.0, f32::MAX, f32::MIN);
        plane(z, &mut |row| {
            count += row.len();
            sum += total(row, f64::from);
            (lo, hi) = row.iter().fold((lo, hi), |(lo, hi), &v| (lo.min(v), hi.max(v)));
        });
        (count, sum, lo, hi)
    });
    let (count, sum, lo, hi) =
        sums.into_iter().fold((0, 0.0, f32::MAX, f32::MIN), |t, p| (t.0 + p.0, t.1 + p.1, t.2.min(p.2), t.3.max(p.3)));
    if count == 0 {
        return None;
    }
    let mean = sum / count as f64;
    let squares: f64 = par::map(nz, |z| {
        let mut squares = 0.0;
        plane(z, &mut |row| squares += total(row, |v| (f64::from(v) - mean) * (f64::from(v) - mean)));
        squares
    })
    .into_iter()
    .sum();
    Some((mean, (squares / count as f64).sqrt(), lo, hi))
}

/// Sum of `f` in eight interleaved parts, so that it need not wait for each addition.
fn total(values: &[f32], f: impl Fn(f32) -> f64) -> f64 {
    let mut parts = [0f64; 8];
    let chunks = values.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().map(|&v| f(v)).sum();
    for c in chunks {
        for (p, &v) in parts.iter_mut().zip(c) {
            *p += f(v);
        }
    }
    parts.iter().sum::<f64>() + rest
}

/// The map that normalises channel `number`, whose values `source` gives.
///
/// # Errors
/// [`Error::Usage`] where the plan lacks what the scheme needs, [`Error::Input`] where the values do not fit it.
pub(crate) fn map<R: Rows + ?Sized>(
    rules: Rules,
    number: usize,
    channel: &Channel,
    source: &R,
    mask: Option<&Mask>,
) -> Result<Map> {
    let map = scheme(rules, number, channel, source, mask)?;
    let Map { clip, shift, scale } = map.map;
    let (lo, hi) = clip.unwrap_or(map.range);
    if [shift, scale, (lo - shift) / scale, (hi - shift) / scale].iter().all(|v| v.is_finite()) {
        return Ok(map.map);
    }
    let name = &channel.name;
    let what = format!("channel {number} ({name}): values from {lo} to {hi} are too far apart to be normalised");
    Err(if clip.is_some() { Error::usage(what) } else { Error::input(what) })
}

/// A map and the range of what it is given.
struct Ranged {
    map: Map,
    range: (f32, f32),
}

fn scheme<R: Rows + ?Sized>(
    rules: Rules,
    number: usize,
    channel: &Channel,
    source: &R,
    mask: Option<&Mask>,
) -> Result<Ranged> {
    let ranged = |map, range| Ok(Ranged { map, range });
    let same = || ranged(Map::SAME, (0.0, 0.0));
    let name = || format!("channel {number} ({})", channel.name);
    let floor = |std: f64| match rules {
        Rules::NnunetV1 => std + TINY,
        Rules::NnunetV2 => std.max(TINY),
    };
    match channel.normalization {
        Normalization::None => same(),
        Normalization::Ct => {
            let Some(i) = &channel.intensity else {
                let what = "CT normalisation needs the training set's intensity statistics, the plans have none";
                return Err(Error::usage(format!("{}: {what}", name())));
            };
            let clip = (i.percentile_00_5 as f32, i.percentile_99_5 as f32);
            ranged(Map { clip: Some(clip), shift: i.mean as f32, scale: i.std.max(TINY) as f32 }, clip)
        }
        Normalization::ZScore => match statistics(source, mask) {
            // No voxel inside the mask: nothing to change.
            None => same(),
            Some((mean, std, lo, hi)) => {
                ranged(Map { clip: None, shift: mean as f32, scale: floor(std) as f32 }, (lo, hi))
            }
        },
        Normalization::RescaleTo01 => match statistics(source, None) {
            None => same(),
            Some((.., lo, hi)) => ranged(Map { clip: None, shift: lo, scale: (hi - lo).max(TINY as f32) }, (lo, hi)),
        },
        Normalization::RgbTo01 => match statistics(source, None) {
            Some((.., lo, hi)) if lo < 0.0 || hi > 255.0 => {
                Err(Error::input(format!("{}: values from {lo} to {hi}, RGB normalisation expects 0 to 255", name())))
            }
            _ => ranged(Map { clip: None, shift: 0.0, scale: 255.0 }, (0.0, 255.0)),
        },
    }
}
