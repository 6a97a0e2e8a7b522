//! Crop, normalise, resample: from an image to what the network sees (nnU-Net v2 `DefaultPreprocessor`, v1
//! `GenericPreprocessor`).

mod case;
pub(super) mod crop;
pub(crate) mod labels;
mod locations;
mod normalize;
mod plan;
pub(crate) mod resample;
pub(crate) mod spline;

use crate::base::par;
use crate::error::{Error, Result};
use crate::io::{Image, Segmentation};
use crate::nnunet::plans::{Channel, InferencePlan, Normalization, Resampling, Rules};
use crate::nnunet::volume::Mask;
use crate::tensor::Isa;
use case::with_previous;
pub use case::{PreprocessedCase, preprocess_case};
use crop::Scan;
pub use locations::class_locations;
use normalize::Map;
pub use plan::PreprocessPlan;
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

impl Preprocessed {
    /// Appends a channel of zeros and ones for each of `values`, from a label map on the same grid.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not as many labels as voxels, [`Error::OutOfMemory`].
    pub(crate) fn append_one_hot(&mut self, map: &[i16], values: &[u16]) -> Result<()> {
        let voxels: usize = self.shape.iter().product();
        if map.len() != voxels {
            return Err(Error::shape("preprocess", format!("{} labels for {voxels} voxels", map.len())));
        }
        let before = self.data.len();
        let asked = voxels.saturating_mul(values.len());
        if self.data.try_reserve_exact(asked).is_err() {
            let what = "the labels of the stage before".into();
            return Err(Error::OutOfMemory { what, asked: 4 * asked, in_use: 4 * before, limit: isize::MAX as usize });
        }
        self.data.resize(before + asked, 0.0);
        labels::one_hot(map, values, &mut self.data[before..]);
        self.channels += values.len();
        Ok(())
    }
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
    preprocess_by(Isa::detect(), image, None, plan)
}

/// [`preprocess`] with the kernels of one instruction set, and with what the stage before of a cascade predicted.
pub(crate) fn preprocess_by(
    isa: Isa,
    image: &Image,
    predicted: Option<&Segmentation>,
    plan: &InferencePlan,
) -> Result<Preprocessed> {
    let previous = plan.previous.as_ref();
    let plan = &PreprocessPlan::from(plan);
    match (previous, predicted) {
        (Some(p), Some(predicted)) => return with_previous(isa, image, predicted, plan, &p.labels),
        (Some(p), None) => return Err(Error::usage(format!("{NEEDS_PREVIOUS}: those of {}", p.configuration))),
        (None, Some(_)) => {
            return Err(Error::usage("a segmentation of a stage before, for a model that is no cascade"));
        }
        (None, None) => {}
    }
    alone(isa, image, plan)
}

/// An image without a label map that has a say in what is inside of it.
fn alone(isa: Isa, image: &Image, plan: &PreprocessPlan) -> Result<Preprocessed> {
    let grids = Grids::of(image, plan)?;
    let mask = plan.channels.iter().any(|c| c.use_mask).then(|| Mask::nonzero(&image.channels, &grids.view));
    Job { plan, grids, mask, isa }.run(image)
}

/// What is missing where a cascade's second stage has no first.
pub(crate) const NEEDS_PREVIOUS: &str = "the second stage of a cascade needs the segmentations of the first";

/// Largest shape that an image of `shape` voxels and `spacing_mm`, both (z, y, x), can have on the network's grid
/// (transposed axes): that of the whole image, of which [`preprocess`] keeps the nonzero region.
///
/// # Errors
/// [`Error::Input`] for spacings that cannot be; [`Error::Usage`] for a plan whose transposes do not undo each other.
pub(crate) fn plan_shape(shape: [usize; 3], spacing_mm: [f64; 3], plan: &InferencePlan) -> Result<[usize; 3]> {
    PreprocessPlan::from(plan).largest_shape(shape, spacing_mm)
}

/// The grids of an image on its way.
#[derive(Debug, Clone, Copy)]
struct Grids {
    /// The nonzero region of the transposed image.
    view: View,
    /// Voxels of the transposed image.
    whole: [usize; 3],
    bbox: [[usize; 2]; 3],
    /// Spacing of the transposed image, and that of the network's grid.
    spacing: [f64; 3],
    target: [f64; 3],
    /// Voxels of the network's grid.
    shape: [usize; 3],
}

impl Grids {
    /// Looks at the image's values and finds its nonzero region.
    fn of(image: &Image, plan: &PreprocessPlan) -> Result<Self> {
        let (found, expected) = (image.channels.len(), plan.channels.len());
        if found != expected {
            let names: Vec<&str> = plan.channels.iter().map(|c| c.name.as_str()).collect();
            let what = format!("{found} channels, the model expects {expected} ({})", names.join(", "));
            return Err(Error::input(what));
        }
        // Before the voxels are looked at: a wrong spacing is told from the header alone.
        plan.largest_shape(image.geometry.shape, image.geometry.spacing_mm)?;
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
        let target = plan.target_spacing(spacing);
        let shape = resample::new_shape(view.shape, spacing, target)?;
        Ok(Self { view, whole: whole.shape, bbox, spacing, target, shape })
    }

    /// The axis that `rule` treats apart.
    fn apart(&self, rule: &Resampling) -> Option<usize> {
        resample::separate_axis(rule, self.spacing, self.target)
    }
}

/// One image's way, once its grids are known.
struct Job<'a> {
    plan: &'a PreprocessPlan,
    grids: Grids,
    mask: Option<Mask>,
    isa: Isa,
}

impl Job<'_> {
    fn run(&self, image: &Image) -> Result<Preprocessed> {
        let (shape, channels) = (self.grids.shape, self.plan.channels.len());
        let voxels: usize = shape.iter().product();
        let mut data = resample::zeros(voxels.saturating_mul(channels), "the preprocessed image")?;
        match self.plan.rules {
            Rules::NnunetV1 => self.v1(image, &mut data)?,
            Rules::NnunetV2 => self.v2(image, &mut data)?,
        }
        let properties = Properties {
            spacing_mm: image.geometry.spacing_mm,
            shape_before_cropping: self.grids.whole,
            bbox: self.grids.bbox,
            shape_after_cropping: self.grids.view.shape,
        };
        Ok(Preprocessed { data, channels, shape, properties })
    }

    fn v2(&self, image: &Image, data: &mut [f32]) -> Result<()> {
        let rule = &self.plan.resampling_data;
        let apart = self.grids.apart(rule);
        let voxels = self.grids.shape.iter().product();
        let channels = image.channels.iter().zip(&self.plan.channels).zip(data.chunks_mut(voxels)).enumerate();
        for (number, ((array, channel), out)) in channels {
            // Only z-score looks at the mask; what lies outside keeps its value.
            let mask = self.mask.as_ref().filter(|_| masked(channel));
            let raw = Held { array, view: self.grids.view };
            let map = normalize::map(self.plan.rules, number, channel, &raw, mask)?;
            resample::resample(&Normalised { raw, map, mask }, self.grids.shape, rule, apart, self.isa, out)?;
        }
        Ok(())
    }

    fn v1(&self, image: &Image, data: &mut [f32]) -> Result<()> {
        let voxels: usize = self.grids.shape.iter().product();
        let mask = self.mask.as_ref().map(|m| self.resampled_mask(m)).transpose()?;
        let channels = image.channels.iter().zip(&self.plan.channels).zip(data.chunks_mut(voxels)).enumerate();
        for (number, ((array, channel), out)) in channels {
            let source = WithoutNan(Held { array, view: self.grids.view });
            let rule = &self.plan.resampling_data;
            resample::resample(&source, self.grids.shape, rule, self.grids.apart(rule), self.isa, out)?;
            let mask = mask.as_ref().filter(|_| channel.use_mask && channel.normalization != Normalization::None);
            let inside = mask.filter(|_| masked(channel));
            let held = Held { array: out, view: View::whole(self.grids.shape) };
            let map = normalize::map(self.plan.rules, number, channel, &held, inside)?;
            par::chunks_mut(out, self.grids.shape[1] * self.grids.shape[2], |z, plane| {
                map.apply(plane);
                for (y, row) in plane.chunks_mut(self.grids.shape[2]).enumerate() {
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
        let mut share = resample::zeros(self.grids.shape.iter().product(), "the nonzero mask")?;
        resample::resample(
            mask,
            self.grids.shape,
            &rule,
            self.grids.apart(&self.plan.resampling_data),
            self.isa,
            &mut share,
        )?;
        let view = View::whole(self.grids.shape);
        Ok(Mask::new(self.grids.shape, |z, y, inside| {
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

fn check_values(plan: &PreprocessPlan, scan: &Scan) -> Result<()> {
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
