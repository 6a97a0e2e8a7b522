//! From image to segmentation: preprocess, slide windows, aggregate, resample back, decide.

mod cohort;
mod export;
mod held;
mod options;
mod preprocessed;
pub(super) mod scores;
mod stand_in;
mod sums;
mod sweep;
mod sweep_plan;
#[cfg(test)]
mod sweep_tests;
pub(super) mod window;

use std::path::Path;
use std::time::Instant;

pub use cohort::{Finished, Sink, Source};
pub use export::Probabilities;
pub use options::{Mode, PredictOptions};
pub use scores::labels_from_scores;

use self::export::{Export, Planes, Scores};
use self::scores::{Kept, Stored};
use self::sweep::{Gather, Sweep, SweepPlan};
use super::model::{FoldWeights, ModelFolder, ModelOptions};
use super::plans::{Decision, InferencePlan, Rules};
use super::postprocess::keep_largest_components;
use super::preprocess::{Preprocessed, Properties, plan_shape, preprocess_by};
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::{Geometry, Image, LabelData, Segmentation};
use crate::models::Network;
use crate::ops::head::{Activation, LinearHead};
use crate::tensor::Device;

/// What a prediction took.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Windows of the image.
    pub tiles: usize,
    /// Voxels (z, y, x) of the image on the network's grid.
    pub network_shape: [usize; 3],
    /// Wall seconds of each stage: "preprocess", "network", "export"; of a cohort's cases "read" before them.
    pub seconds: Vec<(String, f64)>,
    /// Largest total of the device's tensors in bytes, the model's weights included.
    pub peak_tensor_bytes: usize,
}

/// A segmentation and what came with it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Prediction {
    /// The label map on the image's grid.
    pub segmentation: Segmentation,
    /// Class probabilities, if they were asked for.
    pub probabilities: Option<Probabilities>,
    /// What preprocessing did to the image's grid.
    pub properties: Properties,
    /// Time and memory.
    pub report: Report,
}

/// A model in memory, ready for any number of images.
#[derive(Debug)]
pub struct Predictor {
    plan: InferencePlan,
    nets: Vec<Network>,
    device: Device,
    options: PredictOptions,
}

impl Predictor {
    /// Opens a model folder of nnU-Net v1, nnU-Net v2 or the project's own kind, all folds of it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Model`] or [`Error::Unsupported`], naming file and field.
    pub fn open(model: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::open_with(model, device, &ModelOptions::default())
    }

    /// Opens chosen folds or checkpoints of a model folder, the filters stored as chosen.
    ///
    /// # Errors
    /// As [`Predictor::open`].
    pub fn open_with(model: impl AsRef<Path>, device: &Device, options: &ModelOptions) -> Result<Self> {
        let folder = ModelFolder::open(model.as_ref(), options)?;
        let config = folder.architecture.config(folder.plan.strides);
        let build = |f: &FoldWeights| {
            config.build_with(&f.weights, device, options.precision.unwrap_or_else(|| device.precision()))
        };
        let nets = device.install(|| folder.folds.iter().map(build).collect::<Result<Vec<_>>>())?;
        Ok(Self { plan: folder.plan, nets, device: device.clone(), options: PredictOptions::default() })
    }

    /// Sets the options of the predictions that follow.
    #[must_use]
    pub fn options(mut self, options: PredictOptions) -> Self {
        self.options = options;
        self
    }

    /// What the model expects and gives.
    #[must_use]
    pub fn plan(&self) -> &InferencePlan {
        &self.plan
    }

    /// Where it runs.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Segments an image.
    ///
    /// # Errors
    /// [`Error::Usage`] when the image's channels do not fit the model, an option is out of range or the image holds
    /// values that no model can use; [`Error::OutOfMemory`].
    pub fn predict(&mut self, image: &Image) -> Result<Segmentation> {
        Ok(self.predict_with(image, &mut ())?.segmentation)
    }

    /// Segments an image with progress, and says what it took. The callback can cancel.
    ///
    /// # Errors
    /// As [`Predictor::predict`], and [`Error::Cancelled`].
    pub fn predict_with(&mut self, image: &Image, progress: &mut dyn Progress) -> Result<Prediction> {
        self.predict_case(image, None, progress)
    }

    /// Segments an image with the second stage of a cascade, to which `previous` is what the first predicted of it, on the
    /// image's grid.
    ///
    /// # Errors
    /// As [`Predictor::predict_with`]; [`Error::Usage`] when the model is no such stage, [`Error::Input`] for a segmentation
    /// on another grid.
    pub fn predict_cascade(
        &mut self,
        image: &Image,
        previous: &Segmentation,
        progress: &mut dyn Progress,
    ) -> Result<Prediction> {
        self.predict_case(image, Some(previous), progress)
    }

    fn predict_case(
        &mut self,
        image: &Image,
        previous: Option<&Segmentation>,
        progress: &mut dyn Progress,
    ) -> Result<Prediction> {
        self.validate()?;
        self.check_memory(&image.geometry, image.channels.len())?;
        self.limited(|this| {
            this.device.install(|| {
                tell(progress, Event::Stage("preprocess"))?;
                let prepared = this.prepare(image, previous)?;
                this.finish(this.segment(&prepared, image.geometry.clone(), &[], progress)?)
            })
        })
    }

    /// Runs predictions under the memory limit of the options.
    fn limited<R>(&mut self, run: impl FnOnce(&Self) -> R) -> R {
        let before = self.device.memory().limit;
        // The limit is of the machine's memory; a card's own is checked before.
        if self.options.memory_limit.is_some() && self.device.is_cpu() {
            self.device.set_memory_limit(self.options.memory_limit);
        }
        let result = run(self);
        self.device.set_memory_limit(before);
        result
    }

    /// Segments an image and also returns the class scores on the network's own grid, before resampling:
    /// probabilities of a v1 model, logits of a v2 one. Takes classes x volume of memory; for comparisons.
    #[doc(hidden)]
    pub fn predict_with_scores(&mut self, image: &Image) -> Result<(Segmentation, Probabilities)> {
        self.validate()?;
        let this = &*self;
        this.device.install(|| {
            let case = preprocess_by(this.device.isa(), image, None, &this.plan)?;
            let plan = this.plan_sweep(case.shape, this.card_room()?)?;
            let head = this.combined_head(&plan)?;
            let (inputs, channels) = (plan.channels(), this.plan.heads);
            let [depth, area] = [case.shape[0], case.shape[1] * case.shape[2]];
            let mut nothing = ();
            let mut sweep = Sweep::new(plan, &this.nets, &this.device, &case.data, &mut nothing)?;
            let (mut plane, mut scores) = (vec![0.0; area * inputs], vec![0.0; depth * area * channels]);
            for (z, out) in scores.chunks_exact_mut(area * channels).enumerate() {
                sweep.plane(z, &mut plane)?;
                match &head {
                    Some(h) => {
                        let voxels = plane.chunks_exact(inputs).zip(out.chunks_exact_mut(channels));
                        voxels.for_each(|(v, out)| h.apply(v, out));
                    }
                    None => out.copy_from_slice(&plane),
                }
            }
            let mut stored = Stored { scores: &scores, channels, shape: case.shape };
            let labels = this.export(&case, None).labels(&mut stored)?;
            let mut values = vec![0.0; scores.len()];
            for (c, volume) in values.chunks_exact_mut(depth * area).enumerate() {
                volume.iter_mut().zip(scores[c..].iter().step_by(channels)).for_each(|(o, s)| *o = *s);
            }
            let segmentation = Segmentation::new(labels, image.geometry.clone(), this.plan.labels.clone())?;
            Ok((segmentation, Probabilities { values, channels, shape: case.shape }))
        })
    }

    fn export<'a>(&'a self, case: &'a Preprocessed, head: Option<&'a LinearHead>) -> Export<'a> {
        Export {
            plan: &self.plan,
            properties: &case.properties,
            scores: if self.plan.rules == Rules::NnunetV2 { Scores::Logits } else { Scores::Probabilities },
            head,
            isa: self.device.isa(),
        }
    }

    /// Checks the options against the model.
    ///
    /// # Errors
    /// [`Error::Usage`] when an option is out of range, or made for another kind of model.
    pub fn validate(&self) -> Result<()> {
        let o = &self.options;
        o.check_step_size(&self.plan.patch[usize::from(self.plan.is_planar())..])?;
        if o.mode != Mode::Normal && self.plan.rules != Rules::NnunetV1 {
            return Err(Error::usage("mode fast and fastest exist for nnU-Net v1 models only, this is a v2 model"));
        }
        if o.mode != Mode::Normal && o.probabilities {
            return Err(Error::usage("probabilities need mode normal"));
        }
        Ok(())
    }

    fn prepare(&self, image: &Image, previous: Option<&Segmentation>) -> Result<Prepared> {
        let clock = Instant::now();
        let case = preprocess_by(self.device.isa(), image, previous, &self.plan)?;
        Ok(Prepared { case, seconds: clock.elapsed().as_secs_f64() })
    }

    /// The network, and its output on the grid of the image and on those of the stages of a cascade that follow, which have
    /// the shapes `next`.
    fn segment(
        &self,
        prepared: &Prepared,
        geometry: Geometry,
        next: &[[usize; 3]],
        progress: &mut dyn Progress,
    ) -> Result<Segmented> {
        self.device.reset_peak();
        let clock = Instant::now();
        let case = &prepared.case;
        let sweep = self.plan_sweep(case.shape, self.card_room()?)?;
        let (tiles, head) = (sweep.windows(), self.combined_head(&sweep)?);
        tell(progress, Event::Stage("network"))?;
        let mut sweep = Sweep::new(sweep, &self.nets, &self.device, &case.data, progress)?;
        let export = self.export(case, head.as_ref());
        let ((labels, probabilities), stages) = if next.is_empty() {
            (self.on_image(&export, &mut sweep)?, Vec::new())
        } else {
            let mut kept = Kept::new(&mut sweep)?;
            let result = self.on_image(&export, &mut kept)?;
            (result, next.iter().map(|to| export.labels_on(&mut kept, *to)).collect::<Result<_>>()?)
        };
        let network = sweep.network_seconds();
        let export = clock.elapsed().as_secs_f64() - network;
        let seconds = [("preprocess", prepared.seconds), ("network", network), ("export", export)];
        let report = Report {
            tiles,
            network_shape: case.shape,
            seconds: seconds.map(|(n, s)| (n.to_string(), s)).to_vec(),
            peak_tensor_bytes: self.device.memory().peak,
        };
        let properties = case.properties.clone();
        Ok(Segmented { labels, probabilities, stages, properties, geometry, report })
    }

    /// Labels on the image's own grid, and probabilities if they are asked for.
    fn on_image(&self, export: &Export<'_>, planes: &mut dyn Planes) -> Result<(LabelData, Option<Probabilities>)> {
        Ok(match self.options.mode {
            Mode::Normal if self.options.probabilities => {
                let (labels, p) = export.labels_and_probabilities(planes)?;
                (labels, Some(p))
            }
            Mode::Normal => (export.labels(planes)?, None),
            Mode::Fast => (export.labels_fast(planes, 1)?, None),
            Mode::Fastest => (export.labels_fast(planes, 0)?, None),
        })
    }

    /// What looks at the whole label map.
    fn finish(&self, segmented: Segmented) -> Result<Prediction> {
        let clock = Instant::now();
        let Segmented { mut labels, probabilities, properties, geometry, mut report, .. } = segmented;
        keep_largest_components(&mut labels, geometry.shape, &self.plan.keep_largest);
        let segmentation = Segmentation::new(labels, geometry, self.plan.labels.clone())?;
        if let Some((_, seconds)) = report.seconds.iter_mut().find(|(stage, _)| stage == "export") {
            *seconds += clock.elapsed().as_secs_f64();
        }
        Ok(Prediction { segmentation, probabilities, properties, report })
    }

    /// With `room` on the card, if it is one.
    fn plan_sweep(&self, shape: [usize; 3], room: Option<usize>) -> Result<SweepPlan> {
        let (p, o) = (&self.plan, &self.options);
        let activation = match (p.rules, &p.decision) {
            (Rules::NnunetV2, _) => Activation::Identity,
            (Rules::NnunetV1, Decision::Argmax) => Activation::Softmax,
            (Rules::NnunetV1, Decision::Regions { .. }) => Activation::Sigmoid,
        };
        let flips = window::mirrors(if o.mirroring { &p.mirror_axes } else { &[] });
        let mut plan = SweepPlan::new(shape, p.patch, o.step_size, flips, &self.nets, activation)?;
        // v1 counts a lone window's voxels alike (`_internal_predict_3D_3Dconv_tiled`); v2 always weights.
        plan.gaussian = p.rules == Rules::NnunetV2 || plan.windows() > 1;
        plan.strict = o.strict;
        // On a card if there is room beside the networks; else every window's features travel.
        if let Some(room) = room {
            plan.move_to_card(&self.device, room.saturating_sub(self.activations(p.patch)));
        }
        Ok(plan)
    }

    /// The head for planes of features: all folds' heads side by side, averaged.
    fn combined_head(&self, plan: &SweepPlan) -> Result<Option<LinearHead>> {
        if plan.gather != Gather::Features {
            return Ok(None);
        }
        let (k, n) = (plan.channels(), self.nets.len());
        let lanes = k / n;
        let classes = self.plan.heads;
        let (mut weight, mut bias) = (vec![0.0; classes * k], vec![0.0; classes]);
        for (fold, net) in self.nets.iter().enumerate() {
            let h = net.head()?;
            for c in 0..classes {
                bias[c] += h.bias[c] / n as f32;
                let row = &mut weight[c * k + fold * lanes..][..h.features];
                row.iter_mut().zip(&h.weight[c * h.features..]).for_each(|(o, w)| *o = w / n as f32);
            }
        }
        LinearHead::new(&weight, &bias).map(Some)
    }

    /// Bytes that a card has for tensors beside the models': a limit and other programs may leave less than there is, and the
    /// driver takes some for itself.
    fn card_room(&self) -> Result<Option<usize>> {
        let (Some(total), Some(free)) = (self.device.total_memory(), self.device.available_memory()?) else {
            return Ok(None);
        };
        let memory = self.device.memory();
        let most = (total / 10 * 9).min(memory.limit.unwrap_or(usize::MAX)).saturating_sub(memory.in_use);
        Ok(Some(most.min(free.saturating_sub(total / 32))))
    }

    /// Bytes that the largest network's tensors take in a pass over so many voxels, and the filters that all of them keep.
    fn activations(&self, pass: [usize; 3]) -> usize {
        let strict = self.options.strict;
        let needs = |n: &Network| n.activation_bytes(pass, &self.device, strict);
        let kept = |n: &Network| n.planned_kept_bytes(pass, &self.device, strict);
        // All folds keep filters, one runs at a time.
        let others = self.nets.iter().skip(1).map(kept).fold(0, usize::saturating_add);
        self.nets.iter().map(needs).max().unwrap_or(0).saturating_add(others)
    }

    /// Bytes that predicting an image of `channels` channels on this grid takes at most: the model, the network's
    /// tensors, the aggregation, the image and the result. Known from sizes alone, so before the image is read.
    ///
    /// # Errors
    /// [`Error::Input`] when the grid's spacing cannot be.
    pub fn memory_needed(&self, geometry: &Geometry, channels: usize) -> Result<usize> {
        Ok(self.needs(geometry, channels, self.standing()?)?.alone())
    }

    /// What is there between predictions.
    fn standing(&self) -> Result<Standing> {
        // Filters that are kept already are in use and in the plan.
        let kept: usize = self.nets.iter().map(Network::kept_bytes).sum();
        let in_use = self.device.memory().in_use;
        let held = if self.device.is_cpu() { in_use.saturating_sub(kept) } else { 0 };
        Ok(Standing { held, room: self.card_room()?, in_use })
    }

    fn needs(&self, geometry: &Geometry, channels: usize, standing: Standing) -> Result<Needs> {
        let forward = self.plan.transpose_forward;
        let from = forward.map(|a| geometry.shape[a]);
        let to = plan_shape(geometry.shape, geometry.spacing_mm, &self.plan)?;
        let sweep = self.plan_sweep(to, standing.room)?;
        let product = |v: [usize; 3]| v.iter().fold(4usize, |n, &d| n.saturating_mul(d));
        let sum = |parts: &[usize]| parts.iter().fold(0usize, |n, b| n.saturating_add(*b));
        let both = [0, 1, 2].map(|a| from[a].max(to[a]));
        let images = channels.saturating_mul(product(from).saturating_add(product(to)));
        // Of a cascade: the label map as it is read and cropped, and a channel for each label.
        let previous = self
            .plan
            .previous
            .as_ref()
            .map_or(0, |p| product(from).saturating_add(p.labels.len().saturating_mul(product(to))));
        let images = images.saturating_add(previous);
        // What a card holds is not the machine's memory.
        let pass = sweep.pass_size();
        let activations = if self.device.is_cpu() { self.activations(pass) } else { 0 };
        let sums = if sweep.sums_on_card { 0 } else { sweep.bytes() };
        // Features that travel are there as the card sends them, as floats, in order and in blocks.
        let features = self.nets.iter().map(|n| n.head_features().next_multiple_of(16)).max().unwrap_or(0);
        let travels = !self.device.is_cpu() && !sweep.sums_on_card;
        let travelling = if travels { product(pass).saturating_mul(4 * features) } else { 0 };
        let patch = product(pass).saturating_mul(self.plan.inputs() + 1);
        // The window that is computed and the next, page-locked, in buffers of a power of two.
        let staged = if self.device.is_cpu() { 0 } else { patch.saturating_mul(4).min(64 << 20) };
        let planes = product([2 * sweep.channels(), to[1], to[2]]);
        let probabilities = if self.options.probabilities { self.plan.heads.saturating_mul(product(from)) } else { 0 };
        Ok(Needs {
            held: standing.held,
            images,
            result: product(from).saturating_add(probabilities),
            // Between its passes over the axes, resampling holds two arrays of at most the larger size along every axis.
            preprocessing: product(both).saturating_mul(2),
            network: sum(&[activations, sums, travelling, patch, staged, planes]),
        })
    }

    /// Refuses what [`PredictOptions::memory_limit`] does not allow, before anything is read or run.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and as [`Predictor::memory_needed`].
    pub fn check_memory(&self, geometry: &Geometry, channels: usize) -> Result<()> {
        self.admitted(geometry, channels, self.standing()?).map(drop)
    }

    /// What a case needs, if it can be predicted at all.
    fn admitted(&self, geometry: &Geometry, channels: usize, standing: Standing) -> Result<Needs> {
        if let Some(room) = standing.room {
            let (asked, in_use) = (self.activations(self.plan.patch), standing.in_use);
            if asked > room {
                let [free, total] =
                    [self.device.available_memory()?, self.device.total_memory()].map(Option::unwrap_or_default);
                let name = self.device.name();
                let what = format!("this prediction on {name}, of whose {total} bytes {free} are free,");
                return Err(Error::OutOfMemory { what, asked, in_use, limit: room + in_use });
            }
        }
        let needs = self.needs(geometry, channels, standing)?;
        match self.options.memory_limit {
            Some(limit) if needs.alone() > limit => {
                let asked = needs.alone().saturating_sub(needs.held);
                Err(Error::OutOfMemory { what: "this prediction".into(), asked, in_use: needs.held, limit })
            }
            _ => Ok(needs),
        }
    }
}

/// An image on the network's grid.
struct Prepared {
    case: Preprocessed,
    seconds: f64,
}

/// A label map as the network made it, on the image's grid.
struct Segmented {
    labels: LabelData,
    probabilities: Option<Probabilities>,
    /// Labels on the grids of the stages that follow.
    stages: Vec<LabelData>,
    properties: Properties,
    geometry: Geometry,
    report: Report,
}

/// Memory while no prediction runs.
#[derive(Debug, Clone, Copy)]
struct Standing {
    /// Bytes of the machine's memory that are the models'.
    held: usize,
    /// Bytes of a card that are left.
    room: Option<usize>,
    /// Bytes of the device's tensors.
    in_use: usize,
}

/// Bytes of the machine's memory that a case takes at most.
#[derive(Debug, Clone, Copy)]
struct Needs {
    /// The models, of all cases together.
    held: usize,
    /// The image as it is read and as the network sees it.
    images: usize,
    /// Labels and what else comes out.
    result: usize,
    /// Only during preprocessing.
    preprocessing: usize,
    /// Only while the network runs.
    network: usize,
}

impl Needs {
    /// Without another case beside it.
    fn alone(&self) -> usize {
        let most = self.network.saturating_add(self.result).max(self.preprocessing);
        self.held.saturating_add(self.images).saturating_add(most)
    }
}
