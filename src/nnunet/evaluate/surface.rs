//! How far the surfaces of a truth and a prediction lie apart: the surface Dice of Nikolov et al., "Deep learning to achieve
//! clinically applicable segmentation of head and neck anatomy for radiotherapy", 2018, and the 95th percentile of Hausdorff's
//! distance, in the conventions of Maier-Hein et al., "Metrics reloaded", 2024 (and of MONAI by default).
//!
//! | | |
//! |---|---|
//! | surface | voxels of the class with a face on the outside; what is beyond the image is outside |
//! | distance | from a voxel of one surface to the nearest of the other, between centres, in mm, exact |
//! | surface Dice | share of all voxels of both surfaces that are no further than the tolerance from the other one; each voxel counts as one, not by its area |
//! | 95 % Hausdorff | the larger one of the two directions' 95th percentiles, interpolated as NumPy does |
//! | class in neither | both are not a number, as Dice is, and no part of any mean |
//! | class in one only | surface Dice 0, Hausdorff infinite |
//! | ignored voxels | in neither, and a face towards one is no surface: what lies there is not known |

use std::ops::Range;

use super::Class;
use crate::error::{Error, Result};
use crate::io::{LabelData, Segmentation};
use crate::nnunet::fingerprint::percentile;
use crate::nnunet::volume::distance_transform;

/// Surface Dice counts distances of up to so many mm by default: a common thickness of slices of radiotherapy's CTs, and
/// about what two people differ by.
pub const TOLERANCE_MM: f64 = 1.0;

/// Files state spacings in f32, as in 0.8 mm = 0.800000012: what is no further but for that is not further.
const SLACK: f64 = 1.0 + 1e-6;

/// How far two surfaces lie apart.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Surfaces {
    /// Normalised surface Dice, 0 to 1; NaN for a class that is in neither, or that only ignored voxels surround.
    pub surface_dice: f64,
    /// 95th percentile of the distances in mm; NaN as above, infinite for a class that is in one only.
    pub hausdorff_95_mm: f64,
}

/// The surfaces of `classes` in one case, by the spacing of the truth. A distance of up to `tolerance_mm` counts as none in
/// surface Dice. Voxels that the truth marks with the label `ignore` are left out.
///
/// # Errors
/// [`Error::Shape`] when the grids have other sizes, [`Error::Usage`] when the tolerance or a spacing is not a positive number
/// (of the tolerance 0 is one), [`Error::OutOfMemory`].
pub fn compare_surfaces(
    truth: &Segmentation,
    prediction: &Segmentation,
    classes: &[Class],
    ignore: Option<u16>,
    tolerance_mm: f64,
) -> Result<Vec<Surfaces>> {
    super::check_shapes(truth, prediction)?;
    if !(tolerance_mm.is_finite() && tolerance_mm >= 0.0) {
        return Err(Error::usage(format!("a tolerance of {tolerance_mm} mm, expected 0 or more")));
    }
    let boxes = Boxes::of(truth, prediction);
    let spacing = truth.geometry.spacing_mm;
    let of = |class: &Class| {
        let Some(around) = boxes.around(class) else {
            return Ok(Surfaces { surface_dice: f64::NAN, hausdorff_95_mm: f64::NAN });
        };
        let ignored = |i: usize| Some(truth.labels.get(i)) == ignore;
        let [a, b] = [&truth.labels, &prediction.labels].map(|labels| around.surface(labels, class, &ignored));
        between(&a, &b, around.shape(), spacing, tolerance_mm)
    };
    classes.iter().map(of).collect()
}

/// Voxels of a box that are on a surface, and how many.
struct Surface {
    /// Not on it.
    off: Vec<bool>,
    voxels: usize,
    /// The class has voxels, be they on the surface or not.
    exists: bool,
}

fn between(a: &Surface, b: &Surface, shape: [usize; 3], spacing: [f64; 3], tolerance_mm: f64) -> Result<Surfaces> {
    if a.voxels == 0 || b.voxels == 0 {
        // A class without a surface says nothing of where its borders are.
        let [surface_dice, hausdorff_95_mm] = if a.exists == b.exists { [f64::NAN; 2] } else { [0.0, f64::INFINITY] };
        return Ok(Surfaces { surface_dice, hausdorff_95_mm });
    }
    // One volume of distances at a time.
    let (mut near, mut furthest) = (0, 0.0f64);
    for (from, to) in [(a, b), (b, a)] {
        let distances = distance_transform(&to.off, shape, spacing)?;
        let mut found: Vec<f64> = distances.iter().zip(&from.off).filter(|(_, off)| !**off).map(|(d, _)| *d).collect();
        near += found.iter().filter(|d| **d <= tolerance_mm * SLACK).count();
        furthest = furthest.max(percentile(&mut found, 95.0));
    }
    Ok(Surfaces { surface_dice: near as f64 / (a.voxels + b.voxels) as f64, hausdorff_95_mm: furthest })
}

/// A box of an image, half-open along (z, y, x).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Around {
    ranges: [Range<usize>; 3],
    /// Voxels of the image.
    image: [usize; 3],
}

impl Around {
    fn shape(&self) -> [usize; 3] {
        [0, 1, 2].map(|k| self.ranges[k].len())
    }

    /// The surface of a class, whose voxels, if they are not ignored, all lie in the box.
    fn surface(&self, labels: &LabelData, class: &Class, ignored: &impl Fn(usize) -> bool) -> Surface {
        let [nz, ny, nx] = self.image;
        let inside = |i: usize| class.labels.contains(&labels.get(i)) && !ignored(i);
        // Voxels of the box that are inside, each looked at once.
        let shape = self.shape();
        let at = |z: usize, y: usize| (z * ny + y) * nx;
        let mut mask = Vec::with_capacity(shape.iter().product());
        for z in self.ranges[0].clone() {
            for y in self.ranges[1].clone() {
                mask.extend(self.ranges[2].clone().map(|x| inside(at(z, y) + x)));
            }
        }
        // Along an axis of one voxel there is no outside: the surface of a picture is its contour.
        let flat = [0, 1, 2].map(|k| self.image[k] == 1 && self.image != [1; 3]);
        let exists = mask.contains(&true);
        let steps = [shape[1] * shape[2], shape[2], 1];
        let image_steps = [ny * nx, nx, 1];
        let (mut off, mut voxels) = (vec![true; mask.len()], 0);
        for (i, _) in mask.iter().enumerate().filter(|(_, inside)| **inside) {
            let place = [i / steps[0], i / steps[1] % shape[1], i % shape[2]];
            let own = [0, 1, 2].map(|k| place[k] + self.ranges[k].start);
            let index = at(own[0], own[1]) + own[2];
            let open = |k: usize| {
                let sides = [
                    (own[k] > 0, place[k] > 0, i.wrapping_sub(steps[k]), index.wrapping_sub(image_steps[k])),
                    (own[k] + 1 < [nz, ny, nx][k], place[k] + 1 < shape[k], i + steps[k], index + image_steps[k]),
                ];
                sides.into_iter().any(|(in_image, in_box, near, near_index)| {
                    !in_image || !(in_box && mask[near] || ignored(near_index))
                })
            };
            if (0..3).filter(|k| !flat[*k]).any(open) {
                off[i] = false;
                voxels += 1;
            }
        }
        Surface { off, voxels, exists }
    }
}

/// The smallest box around each label of either map.
struct Boxes {
    image: [usize; 3],
    of: Vec<Option<[[usize; 2]; 3]>>,
}

impl Boxes {
    fn of(truth: &Segmentation, prediction: &Segmentation) -> Self {
        let [_, ny, nx] = truth.geometry.shape;
        let mut of: Vec<Option<[[usize; 2]; 3]>> = vec![None; usize::from(u16::MAX) + 1];
        let mut add = |label: u16, z: usize, y: usize, x: [usize; 2]| {
            let b = of[usize::from(label)].get_or_insert([[z, z + 1], [y, y + 1], x]);
            for (b, found) in b.iter_mut().zip([[z, z + 1], [y, y + 1], x]) {
                *b = [b[0].min(found[0]), b[1].max(found[1])];
            }
        };
        let row = |labels: &LabelData, at: usize, add: &mut dyn FnMut(u16, [usize; 2])| {
            let mut x = 0;
            while x < nx {
                let (label, first) = (labels.get(at + x), x);
                while x < nx && labels.get(at + x) == label {
                    x += 1;
                }
                add(label, [first, x]);
            }
        };
        for (i, at) in (0..truth.labels.len()).step_by(nx.max(1)).enumerate() {
            for labels in [&truth.labels, &prediction.labels] {
                row(labels, at, &mut |label, x| add(label, i / ny, i % ny, x));
            }
        }
        Self { image: truth.geometry.shape, of }
    }

    /// The box around a class, if it is anywhere.
    fn around(&self, class: &Class) -> Option<Around> {
        let boxes = class.labels.iter().filter_map(|l| self.of[usize::from(*l)]);
        let whole = boxes.reduce(|a, b| [0, 1, 2].map(|k| [a[k][0].min(b[k][0]), a[k][1].max(b[k][1])]))?;
        Some(Around { ranges: whole.map(|[from, to]| from..to), image: self.image })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Geometry;

    fn map(labels: Vec<u8>, shape: [usize; 3], spacing: [f64; 3]) -> Segmentation {
        Segmentation::new(LabelData::U8(labels), Geometry::new(shape, spacing), Vec::new()).unwrap()
    }

    /// Label 1 in a block of voxels.
    fn block(shape: [usize; 3], ranges: [Range<usize>; 3], spacing: [f64; 3]) -> Segmentation {
        let [_, ny, nx] = shape;
        let inside = |i: usize| {
            let place = [i / (ny * nx), i / nx % ny, i % nx];
            (0..3).all(|k| ranges[k].contains(&place[k]))
        };
        map((0..shape.iter().product()).map(|i| u8::from(inside(i))).collect(), shape, spacing)
    }

    fn one(truth: &Segmentation, found: &Segmentation, ignore: Option<u16>, tolerance: f64) -> Surfaces {
        compare_surfaces(truth, found, &[Class::label(1)], ignore, tolerance).unwrap()[0]
    }

    #[test]
    fn a_shifted_cube() {
        let (shape, spacing) = ([12, 12, 12], [3.0, 0.5, 0.8]);
        let spacing = spacing.map(|s: f64| f64::from(s as f32));
        let a = block(shape, [3..8, 3..8, 3..8], spacing);
        assert_eq!(one(&a, &a, None, 0.0), Surfaces { surface_dice: 1.0, hausdorff_95_mm: 0.0 });
        for (k, mm) in [3.0, 0.5, 0.8].into_iter().enumerate() {
            let mut ranges = [3..8, 3..8, 3..8];
            ranges[k] = 4..9;
            let b = block(shape, ranges, spacing);
            // Of 98 voxels of each surface 25 lie in the plane that the other one leaves, and 9 of the last plane are inside of
            // it: those are apart for whom its sides are as far as its front.
            let found = one(&a, &b, None, mm - 0.01);
            assert!((found.hausdorff_95_mm - mm).abs() < 1e-6, "{found:?}");
            assert!(found.surface_dice < 1.0);
            // The tolerance is reached although 0.8 in f32 is a little more.
            assert_eq!(one(&a, &b, None, mm).surface_dice, 1.0);
            let apart = found.surface_dice * 196.0;
            assert!((apart - (196.0 - 2.0 * [25.0, 34.0, 28.0][k])).abs() < 1e-9, "{apart}");
        }
    }

    #[test]
    fn the_surface_of_a_picture_is_its_contour() {
        let disc = |radius: i32| {
            let inside = |i: i32| (i / 120 - 60).pow(2) + (i % 120 - 60).pow(2) <= radius * radius;
            map((0..120 * 120).map(|i| u8::from(inside(i))).collect(), [1, 120, 120], [999.0, 1.0, 1.0])
        };
        // Two circles three apart: on a row and a column exactly, a little more where steps meet.
        let found = one(&disc(50), &disc(53), None, 1.0);
        assert_eq!(found.surface_dice, 0.0);
        assert!((3.0..3.5).contains(&found.hausdorff_95_mm), "{found:?}");
    }

    #[test]
    fn classes_that_are_missing() {
        let spacing = [1.0; 3];
        let (some, none) = (block([4, 4, 4], [1..2, 1..2, 1..2], spacing), map(vec![0; 64], [4, 4, 4], spacing));
        let both = one(&none, &none, None, 1.0);
        assert!(both.surface_dice.is_nan() && both.hausdorff_95_mm.is_nan());
        for (a, b) in [(&some, &none), (&none, &some)] {
            assert_eq!(one(a, b, None, 1.0), Surfaces { surface_dice: 0.0, hausdorff_95_mm: f64::INFINITY });
        }
    }

    #[test]
    fn what_is_ignored_has_no_surface() {
        // A bar that the prediction ends where the truth knows nothing more.
        let truth = map(vec![0, 1, 1, 1, 9, 9, 9, 0], [1, 1, 8], [1.0; 3]);
        let found = map(vec![0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 8], [1.0; 3]);
        let exact = Surfaces { surface_dice: 1.0, hausdorff_95_mm: 0.0 };
        assert_eq!(one(&truth, &found, Some(9), 0.0), exact);
        assert!(one(&truth, &found, None, 0.0).surface_dice < 1.0);
        // Hidden altogether.
        let hidden = one(&map(vec![9; 8], [1, 1, 8], [1.0; 3]), &found, Some(9), 0.0);
        assert!(hidden.surface_dice.is_nan());
        // Only ignored voxels around it: no word on its borders, though the prediction has one within.
        let truth = map(vec![9, 9, 1, 1, 1, 9, 9, 9], [1, 1, 8], [1.0; 3]);
        let found = map(vec![0, 0, 1, 0, 1, 0, 0, 0], [1, 1, 8], [1.0; 3]);
        assert!(one(&truth, &found, Some(9), 0.0).hausdorff_95_mm.is_nan());
    }

    #[test]
    fn regions_and_wrong_calls() {
        let truth = map(vec![0, 1, 2, 0, 0, 0], [1, 1, 6], [1.0; 3]);
        let found = map(vec![0, 2, 1, 1, 0, 0], [1, 1, 6], [1.0; 3]);
        let region = [Class::region(vec![1, 2])];
        let s = compare_surfaces(&truth, &found, &region, None, 0.5).unwrap()[0];
        // In a single row the ends are the surface: two of each, of which one is 1 away.
        assert_eq!(s.surface_dice, 2.0 / 4.0);
        // Of the distances 0, 1 the place 0.95.
        assert!((s.hausdorff_95_mm - 0.95).abs() < 1e-15);
        assert!(compare_surfaces(&truth, &found, &region, None, -1.0).is_err());
        assert!(compare_surfaces(&truth, &map(vec![0], [1; 3], [1.0; 3]), &region, None, 1.0).is_err());
    }
}
