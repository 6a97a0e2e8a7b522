//! From the network's grid to labels on the image's own grid, plane by plane: the values of all classes exist for two
//! planes at a time, never for the volume (nnU-Net `convert_predicted_logits_to_segmentation_with_correct_shape`, v1
//! `save_segmentation_nifti_from_softmax`).
//!
//! Linear interpolation commutes with the network's last layer, which is affine: where a plane source can give the
//! layer's inputs, 16 features in place of 105 logits are interpolated and the layer is applied after it. Inside a plane
//! of a finer grid it is cheaper to apply it before: to fewer voxels, and a score is interpolated with two operations.

use bytemuck::{Pod, Zeroable};

use crate::base::par;
use crate::error::{Error, Result};
use crate::io::LabelData;
use crate::nnunet::plans::{Decision, InferencePlan, Resampling, Rules, target_spacing};
use crate::nnunet::preprocess::Properties;
use crate::nnunet::preprocess::labels::{Vote, resample_labels};
use crate::nnunet::preprocess::resample::{View, axes, separate_axis, zeros};
use crate::nnunet::preprocess::spline::Axis;
use crate::ops::head::{LinearHead, PackedHead, Tap, Winner, blend, head_row, label_row, sample, scores};
use crate::tensor::Isa;

/// Rows of a plane that one piece of parallel work makes.
const ROWS: usize = 8;

/// The same where scores are interpolated: every piece makes a row or two that its neighbours make too.
const BAND: usize = 32;

/// Values on the network's grid, from the first plane to the last.
pub(crate) trait Planes {
    /// Values per voxel: scores, or inputs of the head.
    fn channels(&self) -> usize;

    /// Voxels along (z, y, x).
    fn shape(&self) -> [usize; 3];

    /// Writes plane `z` to `out`, (y, x, channel) with the channel fastest. Planes are asked for in rising order,
    /// each at most once; some may be left out.
    ///
    /// # Errors
    /// Whatever stops the source; it ends the export.
    fn plane(&mut self, z: usize, out: &mut [f32]) -> Result<()>;

    /// Where the values are on a card that can do it: makes the labels of every plane of the target there and hands them to
    /// `put` in rising order. False, without having begun, elsewhere.
    ///
    /// # Errors
    /// As [`Planes::plane`].
    fn labels(&mut self, how: &Labelling<'_>, put: &mut dyn FnMut(usize, &[u16])) -> Result<bool> {
        let _ = (how, put);
        Ok(false)
    }
}

/// From scores on the network's grid, or inputs of its last layer, to labels on another.
#[derive(Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read on cards only"))]
pub(crate) struct Labelling<'a> {
    /// The layer, where the planes hold its inputs.
    pub(crate) head: Option<&'a LinearHead>,
    /// Of the scores.
    pub(crate) classes: usize,
    pub(crate) winner: Winner<'a>,
    pub(crate) grid: &'a Grid,
    /// Labels can exceed 255.
    pub(crate) wide: bool,
}

/// What the scores are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scores {
    /// Before softmax or sigmoid.
    Logits,
    /// After it.
    Probabilities,
}

/// Scores of every class or region.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Probabilities {
    /// (channel, z, y, x), x fastest.
    pub values: Vec<f32>,
    /// Number of channels.
    pub channels: usize,
    /// Voxels along (z, y, x), in the image's own order of axes.
    pub shape: [usize; 3],
}

/// How one image's prediction becomes labels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Export<'a> {
    /// The model's rules.
    pub(crate) plan: &'a InferencePlan,
    /// What preprocessing did to the image.
    pub(crate) properties: &'a Properties,
    /// What the scores are.
    pub(crate) scores: Scores,
    /// The network's last layer, where the planes hold its inputs.
    pub(crate) head: Option<&'a LinearHead>,
    /// Instructions to use.
    pub(crate) isa: Isa,
}

impl Export<'_> {
    /// Labels on the image's own grid.
    ///
    /// # Errors
    /// [`Error::Shape`] when planes, head and plan do not fit; [`Error::Unsupported`] for spline orders above 1;
    /// [`Error::OutOfMemory`]; errors of `planes`.
    pub(crate) fn labels(&self, planes: &mut dyn Planes) -> Result<LabelData> {
        Ok(match self.max_label() {
            0..256 => LabelData::U8(self.on_image(planes)?),
            _ => LabelData::U16(self.on_image(planes)?),
        })
    }

    /// Labels on a grid of `to` voxels (z, y, x) over the nonzero region, its axes transposed as the plan says: what the next
    /// stage of a cascade gets (nnU-Net `resample_and_save`).
    ///
    /// # Errors
    /// As [`Export::labels`].
    pub(crate) fn labels_on(&self, planes: &mut dyn Planes, to: [usize; 3]) -> Result<LabelData> {
        // nnU-Net takes the other grid's spacing for this one's.
        let rule = &self.plan.resampling_probabilities;
        let own = self.plan.transpose_forward.map(|a| self.properties.spacing_mm[a]);
        let spacing = target_spacing(self.plan.spacing_mm, own);
        let grid = Grid::new(planes.shape(), to, rule, separate_axis(rule, spacing, spacing))?;
        let whole = View::whole(to);
        Ok(match self.max_label() {
            0..256 => LabelData::U8(self.in_frame(planes, &grid, &whole, to)?),
            _ => LabelData::U16(self.in_frame(planes, &grid, &whole, to)?),
        })
    }

    /// v1's `--mode fast` (`order` 1) and `fastest` (`order` 0): labels are decided on the network's grid and
    /// resampled as labels.
    ///
    /// # Errors
    /// As [`Export::labels`].
    pub(crate) fn labels_fast(&self, planes: &mut dyn Planes, order: u8) -> Result<LabelData> {
        Ok(match self.max_label() {
            0..256 => LabelData::U8(self.fast(planes, order)?),
            _ => LabelData::U16(self.fast(planes, order)?),
        })
    }

    /// Labels as [`Export::labels`] gives them, and the probabilities that nnU-Net would save: for v2 on the whole
    /// image, background (of regions: nothing) outside of the nonzero region; for v1 on the nonzero region alone.
    ///
    /// Memory: channels x voxels of the image.
    ///
    /// # Errors
    /// As [`Export::labels`].
    pub(crate) fn labels_and_probabilities(&self, planes: &mut dyn Planes) -> Result<(LabelData, Probabilities)> {
        let backward = self.plan.transpose_backward;
        let (frame, shape) = match self.plan.rules {
            Rules::NnunetV1 => {
                let shape = backward.map(|a| self.properties.shape_after_cropping[a]);
                (View::whole(shape).transposed(self.plan.transpose_forward), shape)
            }
            Rules::NnunetV2 => (self.frame(), self.image_shape()),
        };
        let (channels, voxels) = (self.plan.heads, shape.iter().product::<usize>());
        let mut values = zeros(channels.saturating_mul(voxels), "the probabilities")?;
        if self.plan.decision == Decision::Argmax {
            values[..voxels].fill(1.0);
        }
        let mut out = Probabilities { values, channels, shape };
        let labels = match self.max_label() {
            0..256 => LabelData::U8(self.with_probabilities(planes, &frame, &mut out)?),
            _ => LabelData::U16(self.with_probabilities(planes, &frame, &mut out)?),
        };
        Ok((labels, out))
    }

    /// The largest label that can come out.
    fn max_label(&self) -> usize {
        match &self.plan.decision {
            Decision::Argmax => self.plan.heads.saturating_sub(1),
            Decision::Regions { paint } => paint.iter().copied().max().map_or(0, usize::from),
        }
    }

    /// Voxels of the image along its own (z, y, x).
    fn image_shape(&self) -> [usize; 3] {
        self.plan.transpose_backward.map(|a| self.properties.shape_before_cropping[a])
    }

    /// The nonzero region inside the image, in transposed order.
    fn frame(&self) -> View {
        View::whole(self.image_shape()).transposed(self.plan.transpose_forward).cropped(self.properties.bbox)
    }

    /// The axis (of the transposed array) that is resampled apart on the way back.
    fn apart(&self) -> Option<usize> {
        let (rule, forward) = (&self.plan.resampling_probabilities, self.plan.transpose_forward);
        let image = self.properties.spacing_mm;
        let own = forward.map(|a| image[a]);
        let model = target_spacing(self.plan.spacing_mm, own);
        match self.plan.rules {
            Rules::NnunetV2 => separate_axis(rule, model, own),
            // v1 exports the untransposed array, and asks the image's own spacing first. It forgets to transpose the
            // model's spacing back; so do we.
            Rules::NnunetV1 => {
                separate_axis(rule, image, model).and_then(|axis| forward.iter().position(|&a| a == axis))
            }
        }
    }

    fn winner(&self) -> Winner<'_> {
        match &self.plan.decision {
            Decision::Argmax => Winner::Largest,
            Decision::Regions { paint } => {
                // A sigmoid exceeds 1/2 where its logit is positive.
                let threshold = if self.scores == Scores::Logits { 0.0 } else { 0.5 };
                Winner::Painted { threshold, paint }
            }
        }
    }

    fn check(&self, planes: &dyn Planes) -> Result<()> {
        let (given, heads) = (planes.channels(), self.plan.heads);
        let (inputs, outputs) = self.head.map_or((heads, heads), |h| (h.channels(), h.classes()));
        let regions = match &self.plan.decision {
            Decision::Argmax => heads,
            Decision::Regions { paint } => paint.len(),
        };
        if given == inputs && outputs == heads && regions == heads && heads > 0 && heads <= usize::from(u16::MAX) {
            return Ok(());
        }
        let what =
            format!("{given} values per voxel, a head from {inputs} to {outputs}, {regions} labels, {heads} heads");
        Err(Error::shape("export", what))
    }

    /// Labels of the image, resampled scores.
    fn on_image<T: Label>(&self, planes: &mut dyn Planes) -> Result<Vec<T>> {
        let target = self.properties.shape_after_cropping;
        let grid = Grid::new(planes.shape(), target, &self.plan.resampling_probabilities, self.apart())?;
        self.in_frame(planes, &grid, &self.frame(), self.image_shape())
    }

    /// Labels on `grid`, written to their `frame` in an array of `shape`.
    fn in_frame<T: Label>(
        &self,
        planes: &mut dyn Planes,
        grid: &Grid,
        frame: &View,
        shape: [usize; 3],
    ) -> Result<Vec<T>> {
        let mut labels = zeros(shape.iter().product(), "the segmentation")?;
        self.each_plane(planes, grid, |z, plane| write_plane(frame, z, plane, &mut labels))?;
        Ok(labels)
    }

    /// Labels of the network's grid, then resampled.
    fn fast<T: Label>(&self, planes: &mut dyn Planes, order: u8) -> Result<Vec<T>> {
        let (from, to) = (planes.shape(), self.properties.shape_after_cropping);
        let rule = Resampling { order, order_z: 0, force_separate_z: None };
        let grid = Grid::new(from, from, &rule, None)?;
        let coarse: Vec<T> = self.in_frame(planes, &grid, &View::whole(from), from)?;
        let apart = if order == 0 { None } else { self.apart() };
        let fine = resample_labels(&coarse, from, to, &rule, apart, Vote::Half)?;
        let frame = self.frame();
        let mut labels = zeros(self.image_shape().iter().product(), "the segmentation")?;
        for (z, plane) in fine.chunks(to[1] * to[2]).enumerate() {
            plane.chunks(to[2]).enumerate().for_each(|(y, row)| frame.write(row, z, y, &mut labels));
        }
        Ok(labels)
    }

    /// Calls `put` with the labels of every plane of the target, (y, x).
    fn each_plane(&self, planes: &mut dyn Planes, grid: &Grid, mut put: impl FnMut(usize, &[u16])) -> Result<()> {
        self.check(planes)?;
        let (head, classes, wide) = (self.head, self.plan.heads, self.max_label() > 255);
        if planes.labels(&Labelling { head, classes, winner: self.winner(), grid, wide }, &mut put)? {
            return Ok(());
        }
        let (width, channels) = (grid.x.len(), planes.channels());
        let mut window = Window::new(planes)?;
        let mut plane = vec![0u16; grid.y.len() * width];
        let packed = self.head.filter(|h| self.scores_first(h, planes.shape(), grid)).map(LinearHead::packed);
        for (z, &tap) in grid.z.iter().enumerate() {
            let blended = window.at(planes, tap)?;
            if let Some(head) = &packed {
                par::chunks_mut(&mut plane, BAND * width, |piece, rows| {
                    blended.label_band(self.isa, head, &grid.y[piece * BAND..], &grid.x, rows);
                });
                put(z, &plane);
                continue;
            }
            par::chunks_mut(&mut plane, ROWS * width, |piece, rows| {
                let mut held = Vec::new();
                for (out, &tap) in rows.chunks_mut(width).zip(&grid.y[piece * ROWS..]) {
                    let row = blended.row(self.isa, tap, &mut held);
                    match self.head {
                        Some(head) => head_row(self.isa, row, &grid.x, head, self.winner(), out),
                        None => label_row(self.isa, row, channels, &grid.x, self.winner(), out),
                    }
                }
            });
            put(z, &plane);
        }
        Ok(())
    }

    /// Whether to apply the head before interpolating in the plane. Per class, a voxel of the head costs its channels
    /// in multiply-additions and some three operations to compare or store; interpolating along both axes costs about
    /// six more.
    fn scores_first(&self, head: &LinearHead, from: [usize; 3], grid: &Grid) -> bool {
        let (before, after) = (from[1] * from[2], grid.y.len() * grid.x.len());
        let (cost, interpolation) = (head.channels() + 3, 6);
        self.winner() == Winner::Largest && before * cost + after * interpolation < after * cost
    }

    /// As [`Export::on_image`], and writes probabilities into `frame` of every volume of `out`.
    fn with_probabilities<T: Label>(
        &self,
        planes: &mut dyn Planes,
        frame: &View,
        out: &mut Probabilities,
    ) -> Result<Vec<T>> {
        self.check(planes)?;
        let target = self.properties.shape_after_cropping;
        let grid = Grid::new(planes.shape(), target, &self.plan.resampling_probabilities, self.apart())?;
        let mut labels = zeros(self.image_shape().iter().product(), "the segmentation")?;
        let (place, classes, inputs) = (self.frame(), self.plan.heads, planes.channels());
        let (height, width, voxels) = (grid.y.len(), grid.x.len(), out.shape.iter().product::<usize>());
        let mut window = Window::new(planes)?;
        // A plane, (y, class, x), and its labels.
        let mut scores = zeros(height * classes * width, "a plane of probabilities")?;
        let mut plane = vec![0u16; height * width];
        for (z, &tap) in grid.z.iter().enumerate() {
            let blended = window.at(planes, tap)?;
            par::chunks_mut(&mut scores, classes * width, |y, row| {
                let (mut held, mut inner, mut values) = (Vec::new(), vec![0.0; inputs], vec![0.0; classes]);
                let source = blended.row(self.isa, grid.y[y], &mut held);
                for (x, &tap) in grid.x.iter().enumerate() {
                    match self.head {
                        Some(head) => {
                            sample(source, inputs, tap, &mut inner);
                            head.apply(&inner, &mut values);
                        }
                        None => sample(source, inputs, tap, &mut values),
                    }
                    row[x..].iter_mut().step_by(width).zip(&values).for_each(|(r, &v)| *r = v);
                }
            });
            par::chunks_mut(&mut plane, width, |y, out| {
                let mut values = vec![0.0; classes];
                for (x, o) in out.iter_mut().enumerate() {
                    let row = &scores[y * classes * width..][..classes * width];
                    values.iter_mut().zip(row[x..].iter().step_by(width)).for_each(|(v, &r)| *v = r);
                    *o = self.winner().of(&values);
                }
            });
            write_plane(&place, z, &plane, &mut labels);
            if self.scores == Scores::Logits {
                let softmax = self.plan.decision == Decision::Argmax;
                par::chunks_mut(&mut scores, classes * width, |_, row| nonlinearity(row, width, softmax));
            }
            par::chunks_mut(&mut out.values, voxels, |class, volume| {
                for y in 0..height {
                    frame.write(&scores[(y * classes + class) * width..][..width], z, y, volume);
                }
            });
        }
        Ok(labels)
    }
}

/// Softmax or sigmoid over the classes of a row, (class, x).
fn nonlinearity(row: &mut [f32], width: usize, softmax: bool) {
    if !softmax {
        row.iter_mut().for_each(|v| *v = 1.0 / (1.0 + (-*v).exp()));
        return;
    }
    let (mut top, mut sum) = (vec![f32::NEG_INFINITY; width], vec![0f32; width]);
    for values in row.chunks(width) {
        top.iter_mut().zip(values).for_each(|(t, &v)| *t = t.max(v));
    }
    for values in row.chunks_mut(width) {
        for ((v, t), s) in values.iter_mut().zip(&top).zip(&mut sum) {
            *v = (*v - t).exp();
            *s += *v;
        }
    }
    for values in row.chunks_mut(width) {
        values.iter_mut().zip(&sum).for_each(|(v, s)| *v /= s);
    }
}

/// A voxel type of label maps.
trait Label: Copy + Default + Ord + Zeroable + Send + Sync {
    fn of(label: u16) -> Self;
}

impl Label for u8 {
    fn of(label: u16) -> Self {
        label as u8
    }
}

impl Label for u16 {
    fn of(label: u16) -> Self {
        label
    }
}

/// Writes a plane of labels to its place.
fn write_plane<T: Label>(frame: &View, z: usize, plane: &[u16], out: &mut [T]) {
    let mut narrow = vec![T::default(); frame.shape[2]];
    for (y, row) in plane.chunks(frame.shape[2]).enumerate() {
        narrow.iter_mut().zip(row).for_each(|(n, &v)| *n = T::of(v));
        frame.write(&narrow, z, y, out);
    }
}

/// Where every output voxel lies on the network's grid.
pub(crate) struct Grid {
    pub(crate) z: Vec<Tap>,
    pub(crate) y: Vec<Tap>,
    pub(crate) x: Vec<Tap>,
}

impl Grid {
    fn new(from: [usize; 3], to: [usize; 3], rule: &Resampling, apart: Option<usize>) -> Result<Self> {
        let [z, y, x] = axes(from, to, rule, apart)?;
        let taps = |axis: Axis| -> Result<Vec<Tap>> {
            (0..axis.output())
                .map(|o| {
                    let what = || Error::unsupported("resampling of the network's output with cubic splines");
                    axis.pair(o).map(|(i, j, w)| (i, j, w as f32)).ok_or_else(what)
                })
                .collect()
        };
        Ok(Self { z: taps(z)?, y: taps(y)?, x: taps(x)? })
    }
}

/// A line of the cache: a voxel's scores are whole lines, and no vector of them straddles two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Floats in it, a divisor of a packed head's classes.
const LINE: usize = 16;

/// The two planes of the network's grid that are worked with.
struct Window {
    shape: [usize; 3],
    channels: usize,
    /// Number and values of a plane.
    held: [(Option<usize>, Vec<f32>); 2],
}

impl Window {
    fn new(planes: &dyn Planes) -> Result<Self> {
        let (shape, channels) = (planes.shape(), planes.channels());
        let plane = shape[1].saturating_mul(shape[2]).saturating_mul(channels);
        let empty = || Ok::<_, Error>((None, zeros(plane, "a plane of the network's output")?));
        Ok(Self { shape, channels, held: [empty()?, empty()?] })
    }

    /// The plane between planes i and j.
    fn at(&mut self, planes: &mut dyn Planes, (i, j, w): Tap) -> Result<Between<'_>> {
        // A plane of no weight is never asked for.
        let j = if w == 0.0 { i } else { j };
        if self.held[0].0 != Some(i) {
            self.held.swap(0, 1);
        }
        for (slot, wanted) in [(0, i), (1, j)] {
            let held = &mut self.held[slot];
            if held.0 != Some(wanted) && !(slot == 1 && j == i) {
                held.0 = None;
                planes.plane(wanted, &mut held.1)?;
                held.0 = Some(wanted);
            }
        }
        let first = &self.held[0].1;
        let second = if j == i { first } else { &self.held[1].1 };
        Ok(Between { first, second, weight: w, line: self.shape[2] * self.channels, channels: self.channels })
    }
}

/// A plane between two.
struct Between<'a> {
    first: &'a [f32],
    second: &'a [f32],
    weight: f32,
    /// Values in a row.
    line: usize,
    /// Values of a voxel.
    channels: usize,
}

impl Between<'_> {
    /// Labels of the rows at `ys`: scores of the rows around each, interpolated along y and then along x. Where the same
    /// class wins at all four voxels around, it wins between them, and nothing is interpolated.
    fn label_band(&self, isa: Isa, head: &PackedHead, ys: &[Tap], xs: &[Tap], out: &mut [u16]) {
        let (classes, voxels) = (head.padded(), self.line / self.channels);
        let width = classes / LINE;
        let mut features = Vec::new();
        let own: Vec<Tap> = (0..voxels).map(|x| (x, x, 0.0)).collect();
        // Two rows: number, scores, winners.
        let lines = vec![Line::zeroed(); voxels * width];
        let mut held = [(); 2].map(|()| (None, lines.clone(), vec![0u16; voxels]));
        let mut between = lines;
        let (mut places, mut taps, mut found) = (Vec::new(), Vec::new(), vec![0u16; xs.len()]);
        for (out, &(i, j, w)) in out.chunks_mut(xs.len()).zip(ys) {
            let j = if w == 0.0 { i } else { j };
            if held[0].0 != Some(i) {
                held.swap(0, 1);
            }
            for (slot, wanted) in [(0, i), (1, j)] {
                let (number, lines, winners) = &mut held[slot];
                let row: &mut [f32] = bytemuck::cast_slice_mut(lines);
                if *number != Some(wanted) && !(slot == 1 && j == i) {
                    scores(isa, head, self.row(isa, (wanted, wanted, 0.0), &mut features), row);
                    label_row(isa, row, classes, &own, Winner::Largest, winners);
                    *number = Some(wanted);
                }
            }
            let (first, second) = (&held[0], if j == i { &held[0] } else { &held[1] });
            places.clear();
            taps.clear();
            for ((x, o), &tap) in out.iter_mut().enumerate().zip(xs) {
                *o = first.2[tap.0];
                if first.2[tap.1] != *o || second.2[tap.0] != *o || second.2[tap.1] != *o {
                    places.push(x);
                    taps.push(tap);
                }
            }
            if taps.is_empty() {
                continue;
            }
            if j != i {
                // Only the voxels that are asked for; taps rise.
                let mut done = 0;
                for &(left, right, _) in &taps {
                    let part = left.max(done) * width..(right + 1).max(done) * width;
                    let (a, b) = (&first.1[part.clone()], &second.1[part.clone()]);
                    let (a, b) = (bytemuck::cast_slice(a), bytemuck::cast_slice(b));
                    blend(isa, [a, b, a, b], w, 0.0, bytemuck::cast_slice_mut(&mut between[part]));
                    done = done.max(right + 1);
                }
            }
            let row = bytemuck::cast_slice(if j == i { &first.1 } else { &between });
            let found = &mut found[..taps.len()];
            label_row(isa, row, classes, &taps, Winner::Largest, found);
            places.iter().zip(found).for_each(|(&x, &mut label)| out[x] = label);
        }
    }

    /// The row between rows i and j, (x, channel); made in `held` unless it is there already.
    fn row<'a>(&'a self, isa: Isa, (i, j, w): Tap, held: &'a mut Vec<f32>) -> &'a [f32] {
        let line = |plane: &'a [f32], y: usize| &plane[y * self.line..][..self.line];
        if self.weight == 0.0 && w == 0.0 {
            return line(self.first, i);
        }
        held.resize(self.line, 0.0);
        let rows = [line(self.first, i), line(self.second, i), line(self.first, j), line(self.second, j)];
        blend(isa, rows, self.weight, w, held);
        held
    }
}

#[cfg(test)]
mod tests;
