//! An image with its truth: what training reads (nnU-Net `DefaultPreprocessor.run_case`).

use super::labels::{Vote, resample_labels};
use super::locations::class_locations;
use super::plan::PreprocessPlan;
use super::resample::{View, zeros};
use super::{Grids, Job, Preprocessed, alone};
use crate::base::par;
use crate::error::{Error, Result};
use crate::io::{Image, LabelData, Segmentation};
use crate::nnunet::plans::Rules;
use crate::nnunet::training_case::{ClassKey, ClassLocations};
use crate::nnunet::volume::Mask;
use crate::tensor::Isa;

/// Background outside of the nonzero region.
const OUTSIDE: i16 = -1;

/// A case of a training set on the network's grid.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PreprocessedCase {
    /// The image.
    pub image: Preprocessed,
    /// The truth, (z, y, x) on the same grid; background outside of the image's nonzero region is -1.
    pub labels: Vec<i16>,
    /// Where its classes are.
    pub locations: ClassLocations,
}

/// Brings an image and its truth onto the network's grid by nnU-Net v2's rules: transpose, crop to the nonzero region,
/// normalise, resample.
///
/// `classes` are those whose locations are asked for, in the order in which nnU-Net's `LabelManager` has them.
///
/// # Errors
/// Those of [`preprocess`](super::preprocess); [`Error::Input`] when the truth lies on another grid or has labels above
/// 32767; [`Error::Unsupported`] for rules of nnU-Net v1.
pub fn preprocess_case(
    image: &Image,
    truth: &Segmentation,
    plan: &PreprocessPlan,
    classes: &[ClassKey],
) -> Result<PreprocessedCase> {
    if plan.rules != Rules::NnunetV2 {
        return Err(Error::unsupported("preprocessing for training by the rules of nnU-Net v1; those of v2 are"));
    }
    let (image, labels) = with_labels(Isa::detect(), image, truth, plan)?;
    let locations = class_locations(&labels, image.shape, classes);
    Ok(PreprocessedCase { image, labels, locations })
}

/// An image for the second stage of a cascade, and what the first one predicted of it as further channels: one of zeros and
/// ones for each of `values` (nnU-Net v2 `preprocess_fromfiles_save_to_queue`, v1 `preprocess_save_to_queue`).
pub(super) fn with_previous(
    isa: Isa,
    image: &Image,
    predicted: &Segmentation,
    plan: &PreprocessPlan,
    values: &[u16],
) -> Result<Preprocessed> {
    let (mut case, labels) = match plan.rules {
        Rules::NnunetV2 => with_labels(isa, image, predicted, plan)?,
        Rules::NnunetV1 => {
            check_grid(image, predicted)?;
            let case = alone(isa, image, plan)?;
            // v1 brings the whole map onto the grid of the nonzero region, as if that were the whole image; so do we.
            let whole = View::whole(image.geometry.shape).transposed(plan.transpose_forward);
            let map = taken(&predicted.labels, &whole, None)?;
            let rule = &plan.resampling_labels;
            let labels = resample_labels(&map, whole.shape, case.shape, rule, None, Vote::Half)?;
            (case, labels)
        }
    };
    case.append_one_hot(&labels, values)?;
    Ok(case)
}

fn check_grid(image: &Image, labels: &Segmentation) -> Result<()> {
    let (shape, own) = (image.geometry.shape, labels.geometry.shape);
    if shape != own {
        let what = format!("{shape:?} voxels (z, y, x), its segmentation has {own:?}: they must lie on one grid");
        return Err(Error::input(what));
    }
    Ok(())
}

/// An image and a label map of it on the network's grid.
fn with_labels(
    isa: Isa,
    image: &Image,
    labels: &Segmentation,
    plan: &PreprocessPlan,
) -> Result<(Preprocessed, Vec<i16>)> {
    check_grid(image, labels)?;
    let grids = Grids::of(image, plan)?;
    let rule = &plan.resampling_labels;
    // Background outside of the nonzero region is told apart.
    let region = Mask::nonzero(&image.channels, &grids.view);
    let cropped = taken(&labels.labels, &grids.view, Some(&region))?;
    let masked = plan.channels.iter().any(|c| c.use_mask);
    // Labelled voxels count as inside even where the image is 0.
    let mask = masked.then(|| {
        let [_, ny, nx] = grids.view.shape;
        Mask::new(grids.view.shape, |z, y, inside| {
            let row = &cropped[(z * ny + y) * nx..][..nx];
            inside.iter_mut().zip(row).for_each(|(i, &l)| *i = l >= 0);
        })
    });
    let labels = if grids.view.shape == grids.shape {
        cropped
    } else {
        resample_labels(&cropped, grids.view.shape, grids.shape, rule, grids.apart(rule), Vote::Largest)?
    };
    let image = Job { plan, grids, mask, isa }.run(image)?;
    Ok((image, labels))
}

/// The labels that a view sees; background outside of `region` becomes [`OUTSIDE`].
fn taken(labels: &LabelData, view: &View, region: Option<&Mask>) -> Result<Vec<i16>> {
    if matches!(labels, LabelData::U16(l) if l.iter().any(|&l| i16::try_from(l).is_err())) {
        return Err(Error::input(format!("a label above {} in its segmentation", i16::MAX)));
    }
    let mut out = zeros(view.shape.iter().product(), "the segmentation")?;
    match labels {
        LabelData::U8(l) => copy(l, view, region, &mut out),
        LabelData::U16(l) => copy(l, view, region, &mut out),
    }
    Ok(out)
}

fn copy<T: Copy + Default + Into<u16> + Sync>(labels: &[T], view: &View, region: Option<&Mask>, out: &mut [i16]) {
    let [_, ny, nx] = view.shape;
    par::chunks_mut_with(
        out,
        ny * nx,
        || vec![T::default(); nx],
        |row, z, plane| {
            for (y, out) in plane.chunks_mut(nx).enumerate() {
                view.read(labels, z, y, row);
                // Below 32768, as was checked.
                out.iter_mut().zip(&*row).for_each(|(o, &l)| *o = l.into() as i16);
                if let Some(region) = region {
                    region.row(z, y, |x, inside| {
                        if out[x] == 0 && !inside {
                            out[x] = OUTSIDE;
                        }
                    });
                }
            }
        },
    );
}
