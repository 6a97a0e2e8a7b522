//! Crop, normalise, resample: from an image to what the network sees (nnU-Net v2 `DefaultPreprocessor`, v1
//! `GenericPreprocessor`).

pub(super) mod crop;
mod normalize;
pub(crate) mod resample;
pub(crate) mod spline;

use crate::base::par;
use crate::error::{Error, Result};
use crate::io::Image;
use crate::nnunet::plans::{Channel, InferencePlan, Normalization, Resampling, Rules};
use crate::tensor::Isa;
use crop::{Mask, Scan};
use normalize::Map;
use resample::{Held, Rows, View};

/// An image on the network's grid.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Preprocessed {
    /// Normalised intensities, (channel, z, y, x) with x fastest, axes transposed as the plan says.
    pub data: Vec<f32>,
    /// Number of channels.
    pub channels: usize,
    /// Voxels along the transposed (z, y, x).
    pub shape: [usize; 3],
    /// How to come back to the image's own grid.
    pub properties: Properties,
}

/// What preprocessing did to the grid (nnU-Net's `properties` dictionary).
///
/// Shapes and box refer to the *transposed* array, as nnU-Net v2 stores them; v1 crops before it transposes and stores
/// the untransposed ones.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Properties {
    /// The image's own voxel spacing in mm along its own (z, y, x), not transposed.
    pub spacing_mm: [f64; 3],
    /// Voxels of the transposed image.
    pub shape_before_cropping: [usize; 3],
    /// The nonzero region, half-open along each transposed axis.
    pub bbox: [[usize; 2]; 3],
    /// Voxels of the nonzero region, before resampling.
    pub shape_after_cropping: [usize; 3],
}

/// Brings `image` onto the network's grid as `plan` says.
///
/// v2: transpose, crop to the nonzero region, normalise, resample. v1: crop, transpose, NaN to 0, resample, normalise.
///
/// # Errors
/// [`Error::Input`], naming the channel, when the image has another number of channels than the plan, values that are
/// not finite (v1 takes NaN for 0) or too large to be normalised, only zeros (v1), or a spacing that cannot be;
/// [`Error::Usage`] for a plan whose parts do not fit each other; [`Error::Unsupported`] for spline orders other than 0,
/// 1 and 3; [`Error::OutOfMemory`].
pub fn preprocess(image: &Image, plan: &InferencePlan) -> Result<Preprocessed> {
    preprocess_by(Isa::detect(), image, plan)
}

/// [`preprocess`] with the kernels of one instruction set.
pub(crate) fn preprocess_by(isa: Isa, image: &Image, plan: &InferencePlan) -> Result<Preprocessed> {
    let (found, expected) = (image.channels.len(), plan.channels.len());
    if found != expected {
        let names: Vec<&str> = plan.channels.iter().map(|c| c.name.as_str()).collect();
        let what = format!("{found} channels, the model expects {expected} ({})", names.join(", "));
        return Err(Error::input(what));
    }
    // Before the voxels are looked at: a wrong spacing is told from the header alone.
    plan_shape(image.geometry.shape, image.geometry.spacing_mm, plan)?;
    let whole = View::whole(image.geometry.shape).transposed(plan.transpose_forward);
    let found = crop::scan(&image.channels, &whole);
    check_values(plan, &found)?;
    // An image of zeros: v2 keeps the whole of it; v1 stops.
    let bbox = match (found.bbox, plan.rules) {
        (Some(bbox), _) => bbox,
        (None, Rules::NnunetV2) => whole.shape.map(|n| [0, n]),
        (None, Rules::NnunetV1) => {
            return Err(Error::input("every voxel is 0: there is nothing to segment"));
        }
    };
    let view = whole.cropped(bbox);
    let spacing = plan.transpose_forward.map(|a| image.geometry.spacing_mm[a]);
    let shape = resample::new_shape(view.shape, spacing, plan.spacing_mm)?;
    let apart = resample::separate_axis(&plan.resampling_data, spacing, plan.spacing_mm);
    let mask = plan.channels.iter().any(|c| c.use_mask).then(|| Mask::nonzero(&image.channels, &view));
    let job = Job { plan, view, shape, apart, mask, isa };
    let voxels: usize = shape.iter().product();
    let mut data = resample::zeros(voxels.saturating_mul(expected), "the preprocessed image")?;
    match plan.rules {
        Rules::NnunetV1 => job.v1(image, &mut data)?,
        Rules::NnunetV2 => job.v2(image, &mut data)?,
    }
    let properties = Properties {
        spacing_mm: image.geometry.spacing_mm,
        shape_before_cropping: whole.shape,
        bbox,
        shape_after_cropping: view.shape,
    };
    Ok(Preprocessed { data, channels: expected, shape, properties })
}

/// Largest shape that an image of `shape` voxels and `spacing_mm`, both (z, y, x), can have on the network's grid
/// (transposed axes): that of the whole image, of which [`preprocess`] keeps the nonzero region.
///
/// # Errors
/// [`Error::Input`] for spacings that cannot be; [`Error::Usage`] for a plan whose transposes do not undo each other.
pub(crate) fn plan_shape(shape: [usize; 3], spacing_mm: [f64; 3], plan: &InferencePlan) -> Result<[usize; 3]> {
    check_transpose(plan)?;
    let axes = plan.transpose_forward;
    resample::new_shape(axes.map(|a| shape[a]), axes.map(|a| spacing_mm[a]), plan.spacing_mm)
}

/// One image's way, once its grids are known.
struct Job<'a> {
    plan: &'a InferencePlan,
    view: View,
    shape: [usize; 3],
    apart: Option<usize>,
    mask: Option<Mask>,
    isa: Isa,
}

impl Job<'_> {
    fn v2(&self, image: &Image, data: &mut [f32]) -> Result<()> {
        let rule = &self.plan.resampling_data;
        let voxels = self.shape.iter().product();
        let channels = image.channels.iter().zip(&self.plan.channels).zip(data.chunks_mut(voxels)).enumerate();
        for (number, ((array, channel), out)) in channels {
            // Only z-score looks at the mask; what lies outside keeps its value.
            let mask = self.mask.as_ref().filter(|_| masked(channel));
            let raw = Held { array, view: self.view };
            let map = normalize::map(self.plan.rules, number, channel, &raw, mask)?;
            resample::resample(&Normalised { raw, map, mask }, self.shape, rule, self.apart, self.isa, out)?;
        }
        Ok(())
    }

    fn v1(&self, image: &Image, data: &mut [f32]) -> Result<()> {
        let voxels: usize = self.shape.iter().product();
        let mask = self.mask.as_ref().map(|m| self.resampled_mask(m)).transpose()?;
        let channels = image.channels.iter().zip(&self.plan.channels).zip(data.chunks_mut(voxels)).enumerate();
        for (number, ((array, channel), out)) in channels {
            let source = WithoutNan(Held { array, view: self.view });
            resample::resample(&source, self.shape, &self.plan.resampling_data, self.apart, self.isa, out)?;
            let mask = mask.as_ref().filter(|_| channel.use_mask && channel.normalization != Normalization::None);
            let inside = mask.filter(|_| masked(channel));
            let held = Held { array: out, view: View::whole(self.shape) };
            let map = normalize::map(self.plan.rules, number, channel, &held, inside)?;
            par::chunks_mut(out, self.shape[1] * self.shape[2], |z, plane| {
                map.apply(plane);
                for (y, row) in plane.chunks_mut(self.shape[2]).enumerate() {
                    if let Some(mask) = mask {
                        mask.row(z, y, |x, inside| {
                            if !inside {
                                row[x] = 0.0;
                            }
                        });
                    }
                }
            });
        }
        Ok(())
    }

    /// v1 carries the mask along as a label map: order 1, nearest along a separate axis.
    fn resampled_mask(&self, mask: &Mask) -> Result<Mask> {
        let rule = Resampling { order: 1, order_z: 0, force_separate_z: None };
        let mut share = resample::zeros(self.shape.iter().product(), "the nonzero mask")?;
        resample::resample(mask, self.shape, &rule, self.apart, self.isa, &mut share)?;
        let view = View::whole(self.shape);
        Ok(Mask::new(self.shape, |z, y, inside| {
            let mut row = vec![0f32; inside.len()];
            view.read(&share, z, y, &mut row);
            inside.iter_mut().zip(&row).for_each(|(i, &v)| *i = v >= 0.5);
        }))
    }
}

/// True where statistics and changes keep to the nonzero mask.
fn masked(channel: &Channel) -> bool {
    channel.use_mask && channel.normalization == Normalization::ZScore
}

/// A channel, normalised while it is read.
struct Normalised<'a> {
    raw: Held<'a>,
    map: Map,
    mask: Option<&'a Mask>,
}

impl Rows for Normalised<'_> {
    fn shape(&self) -> [usize; 3] {
        self.raw.shape()
    }

    fn row(&self, z: usize, y: usize, out: &mut [f32]) {
        self.raw.row(z, y, out);
        self.map.apply(out);
        if let Some(mask) = self.mask {
            // Outside of the mask every channel is 0, and stays so.
            mask.row(z, y, |x, inside| {
                if !inside {
                    out[x] = 0.0;
                }
            });
        }
    }
}

/// A channel with 0 in place of NaN.
struct WithoutNan<'a>(Held<'a>);

impl Rows for WithoutNan<'_> {
    fn shape(&self) -> [usize; 3] {
        self.0.shape()
    }

    fn row(&self, z: usize, y: usize, out: &mut [f32]) {
        self.0.row(z, y, out);
        out.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 0.0);
    }
}

impl Rows for Mask {
    fn shape(&self) -> [usize; 3] {
        Mask::shape(self)
    }

    fn row(&self, z: usize, y: usize, out: &mut [f32]) {
        Mask::row(self, z, y, |x, inside| out[x] = f32::from(u8::from(inside)));
    }
}

fn check_transpose(plan: &InferencePlan) -> Result<()> {
    let (forward, backward) = (plan.transpose_forward, plan.transpose_backward);
    if (0..3).all(|k| forward.get(backward[k]) == Some(&k)) {
        return Ok(());
    }
    Err(Error::usage(format!("the plans' transposes {forward:?} and {backward:?} do not undo each other")))
}

fn check_values(plan: &InferencePlan, scan: &Scan) -> Result<()> {
    for (number, channel) in plan.channels.iter().enumerate() {
        let nan = if plan.rules == Rules::NnunetV1 { 0 } else { scan.nan[number] };
        let odd = nan + scan.infinite[number];
        if odd > 0 {
            return Err(Error::input(format!(
                "channel {number} ({}): {odd} voxels are not finite numbers",
                channel.name
            )));
        }
    }
    Ok(())
}
