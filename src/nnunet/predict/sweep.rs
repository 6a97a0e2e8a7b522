//! The sliding window: runs the network over an image from its first plane to its last and hands out finished planes
//! of scores in rising order, so that at most one window's depth of scores (or the windows' features) exists at a time.

use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use super::export::Labelling;
use super::export::Planes;
use super::held::{Held, PLANES};
use super::sums::{self, Sums, with_processor};
use super::window::{gaussian, starts};
use crate::autograd::Ctx;
use crate::base::par;
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::models::{Head, Network};
use crate::ops::head::{self, Activation, PackedHead};
#[cfg(feature = "cuda")]
use crate::ops::resample::Labels;
use crate::tensor::{BLOCK, Device, Dims, Layout, Stored, Tensor};

/// What is aggregated over windows, and where.
///
/// Averaging commutes with a linear head, so logits need not exist: the features are averaged and the head comes
/// last, unless there are fewer classes. A softmax does not commute; then either the class scores of one window's depth are
/// summed, or the windows' features are held until a plane is finished, whichever takes less memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gather {
    /// Weighted sums of features; the caller applies the head to the planes.
    Features,
    /// Weighted sums of the head's activated scores.
    Scores(Activation),
    /// Features held per window in 24 bits, scores made plane by plane.
    Held(Activation),
}

/// Everything that says which windows run and how they count; makes the memory plan before anything runs.
#[derive(Debug, Clone)]
pub(crate) struct SweepPlan {
    /// Voxels of the image on the network's grid.
    pub(crate) shape: [usize; 3],
    /// Window size.
    pub(crate) patch: [usize; 3],
    /// First voxels per axis, in the padded image.
    pub(crate) starts: [Vec<usize>; 3],
    /// Mirrored passes.
    pub(crate) flips: Vec<[bool; 3]>,
    /// Aggregation.
    pub(crate) gather: Gather,
    /// True when windows count by a Gaussian, false when all voxels count alike.
    pub(crate) gaussian: bool,
    /// Only the most accurate kernels.
    pub(crate) strict: bool,
    /// Sums are kept where the networks run, not with the processor.
    pub(crate) sums_on_card: bool,
    /// How the processor would aggregate.
    on_host: Gather,
    folds: usize,
    features: usize,
    classes: usize,
}

impl SweepPlan {
    /// Plans windows of `patch` over `shape` at `step`; `linear` says that logits are averaged, otherwise `activation`
    /// is applied to each window first. `features` are those of one network, of which there are `folds`.
    pub(crate) fn new(
        shape: [usize; 3],
        patch: [usize; 3],
        step: f64,
        flips: Vec<[bool; 3]>,
        nets: &[Network],
        activation: Activation,
    ) -> Result<Self> {
        let first = nets.first().ok_or_else(|| Error::usage("a model without a fold"))?;
        let padded = [0, 1, 2].map(|a| shape[a].max(patch[a]));
        let starts = [0, 1, 2].map(|a| starts(padded[a], patch[a], step));
        let mut plan = Self {
            shape,
            patch,
            starts,
            flips,
            gather: Gather::Features,
            gaussian: true,
            strict: false,
            sums_on_card: false,
            on_host: Gather::Features,
            folds: nets.len(),
            features: first.head_features().next_multiple_of(BLOCK),
            classes: first.classes(),
        };
        let choices = match activation {
            Activation::Identity => [Gather::Features, Gather::Scores(activation)],
            _ => [Gather::Held(activation), Gather::Scores(activation)],
        };
        let bytes = choices.map(|g| plan.bytes_of(g));
        plan.gather = if bytes[0] <= bytes[1] { choices[0] } else { choices[1] };
        Ok(plan)
    }

    /// Voxels of the padded image.
    fn padded(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| self.shape[a].max(self.patch[a]))
    }

    /// Zeros before the image; an odd remainder goes to the end.
    fn pad(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| (self.padded()[a] - self.shape[a]) / 2)
    }

    /// Windows of the image.
    pub(crate) fn windows(&self) -> usize {
        self.starts.iter().map(Vec::len).product()
    }

    /// Passes through a network.
    pub(crate) fn passes(&self) -> usize {
        self.windows() * self.flips.len() * self.folds
    }

    /// Where the window of the `n`-th pass starts, and how it is mirrored.
    #[cfg(feature = "cuda")]
    fn pass(&self, n: usize) -> ([usize; 3], [bool; 3]) {
        let (window, [_, ny, nx]) = (n / self.flips.len() / self.folds, [0, 1, 2].map(|a| self.starts[a].len()));
        let at = [window / (ny * nx), window / nx % ny, window % nx];
        ([0, 1, 2].map(|a| self.starts[a][at[a]]), self.flips[n % self.flips.len()])
    }

    /// Channels of the planes that come out.
    pub(crate) fn channels(&self) -> usize {
        match self.gather {
            Gather::Features => self.folds * self.features,
            Gather::Scores(_) | Gather::Held(_) => self.classes,
        }
    }

    /// Bytes that aggregation takes, beside the network's own.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes_of(self.gather)
    }

    /// Aggregates on `device`, a card with so many bytes to spare, if that can be: by what moves the fewest bytes in a pass
    /// and fits. Windows are not held there.
    pub(crate) fn move_to_card(&mut self, device: &Device, room: usize) {
        let scores = |how| (sums::lanes_on_card(self.classes), Gather::Scores(how));
        let mut choices = match self.gather {
            Gather::Features | Gather::Scores(Activation::Identity) => {
                vec![(self.features, Gather::Features), scores(Activation::Identity)]
            }
            Gather::Scores(how) | Gather::Held(how) => vec![scores(how)],
        };
        choices.sort_by_key(|(lanes, _)| *lanes);
        let can = |g: &Gather| *g == Gather::Features || sums::scores_on_card(device, self.features);
        let fits = choices.into_iter().map(|(_, g)| g).find(|g| can(g) && self.bytes_on_card(*g) <= room);
        if let Some(gather) = fits {
            self.on_host = self.gather;
            (self.gather, self.sums_on_card) = (gather, true);
        }
    }

    /// Undoes [`SweepPlan::move_to_card`]. Sums of logits stay what they are, which the head that finishes them goes with.
    fn move_to_host(&mut self) {
        self.sums_on_card = false;
        if !matches!(self.gather, Gather::Features | Gather::Scores(Activation::Identity)) {
            self.gather = self.on_host;
        }
    }

    /// Room for what windows leave.
    fn store(&self, nets: &[Network], importance: Option<&[f32]>, device: &Device) -> Result<Store> {
        if matches!(self.gather, Gather::Held(_)) {
            return Ok(Store::Held(Vec::new()));
        }
        let [_, h, w] = self.padded();
        let heads: Vec<&Head> = nets.iter().map(Network::head).collect::<Result<_>>()?;
        let scores = match self.gather {
            Gather::Scores(how) => Some((&heads[..], how)),
            Gather::Features | Gather::Held(_) => None,
        };
        let place = if self.sums_on_card { device } else { device.host() };
        let sum = Sums::new([self.patch[0], h, w], self.channels(), scores, importance, place)?;
        Ok(Store::Ring { sum: Box::new(sum), end: 0 })
    }

    fn bytes_on_card(&self, gather: Gather) -> usize {
        let (depth, [_, h, w]) = (sums::ring(self.patch[0], true), self.padded());
        let lanes = match gather {
            Gather::Features => self.folds * self.features,
            Gather::Scores(_) | Gather::Held(_) => sums::lanes_on_card(self.classes),
        };
        [depth, h, w, lanes + 1].iter().fold(4, |n: usize, &v| n.saturating_mul(v))
    }

    fn bytes_of(&self, gather: Gather) -> usize {
        let [_, h, w] = self.padded();
        let ring = |k: usize| 4 * self.patch[0] * h * w * (k + 1);
        match gather {
            Gather::Features => ring(self.folds * self.features),
            Gather::Scores(_) => ring(self.classes),
            Gather::Held(_) => {
                let windows = self.starts[1].len() * self.starts[2].len() * self.folds * self.flips.len();
                // While a row of windows runs, earlier rows hold the planes that they share with it.
                let shared = |row: usize| {
                    let now = self.starts[0][row];
                    // Planes go in whole pieces, and one of the finished ones may still be wanted.
                    let gone = |s: &usize| now.saturating_sub(s + 1) / PLANES * PLANES;
                    let left = |s: &usize| self.patch[0].saturating_sub(gone(s));
                    self.starts[0][..row].iter().map(left).sum::<usize>()
                };
                let planes = self.patch[0] + (0..self.starts[0].len()).map(shared).max().unwrap_or(0);
                windows * Held::bytes(self.patch, self.features) / self.patch[0].max(1) * planes
            }
        }
    }
}

enum Store {
    /// The planes of weighted sums up to `end`.
    Ring {
        sum: Box<Sums>,
        end: usize,
    },
    Held(Vec<Held>),
}

/// A sweep under way.
pub(crate) struct Sweep<'a> {
    plan: SweepPlan,
    nets: &'a [Network],
    heads: Vec<PackedHead>,
    /// Where networks run, and the processor, which does the rest.
    device: &'a Device,
    host: Device,
    data: &'a [f32],
    channels: usize,
    /// On a card: what the next pass reads, at one place for all of them.
    input: Option<Tensor>,
    /// Passes whose windows were sent there.
    sent: usize,
    importance: Option<Vec<f32>>,
    store: Store,
    rows_done: usize,
    passes_done: usize,
    network: Duration,
    exporting: bool,
    progress: &'a mut dyn Progress,
}

impl<'a> Sweep<'a> {
    /// Starts a sweep over `data` `[channels, z, y, x]` of the plan's shape.
    pub(crate) fn new(
        plan: SweepPlan,
        nets: &'a [Network],
        device: &'a Device,
        data: &'a [f32],
        progress: &'a mut dyn Progress,
    ) -> Result<Self> {
        let channels = data.len() / plan.shape.iter().product::<usize>().max(1);
        let host = device.host().clone();
        let importance = plan.gaussian.then(|| gaussian(plan.patch));
        let mut plan = plan;
        let store = match plan.store(nets, importance.as_deref(), device) {
            // Other programs may have taken what the plan counted on.
            Err(Error::OutOfMemory { .. }) if plan.sums_on_card => {
                plan.move_to_host();
                plan.store(nets, importance.as_deref(), device)?
            }
            store => store?,
        };
        let heads = nets.iter().map(|n| {
            let head = n.head()?;
            Ok(PackedHead::new(&head.weight, &head.bias, head.features, plan.features))
        });
        let heads = heads.collect::<Result<_>>()?;
        let [pz, py, px] = plan.patch;
        let input = || Tensor::empty(Dims::from([1, channels, pz, py, px]), Layout::PLAIN, device);
        let input = (!device.is_cpu()).then(input).transpose()?;
        Ok(Self {
            plan,
            nets,
            heads,
            device,
            host,
            data,
            channels,
            input,
            sent: 0,
            importance,
            store,
            rows_done: 0,
            passes_done: 0,
            network: Duration::ZERO,
            exporting: false,
            progress,
        })
    }

    /// Wall seconds spent running windows so far.
    pub(crate) fn network_seconds(&self) -> f64 {
        self.network.as_secs_f64()
    }

    /// Runs all windows that start at the `row`-th z start.
    fn run_row(&mut self, row: usize) -> Result<()> {
        let z = self.plan.starts[0][row];
        if let Store::Ring { sum, end } = &mut self.store {
            let upto = z + self.plan.patch[0];
            (*end..upto).try_for_each(|p| sum.clear(p))?;
            *end = upto;
        }
        for y in self.plan.starts[1].clone() {
            for x in self.plan.starts[2].clone() {
                self.run_window([z, y, x])?;
            }
        }
        Ok(())
    }

    fn run_window(&mut self, start: [usize; 3]) -> Result<()> {
        for fold in 0..self.nets.len() {
            for flip in self.plan.flips.clone() {
                let (nets, device, [pz, py, px]) = (self.nets, self.device, self.plan.patch);
                let strict = self.plan.strict;
                // Passes with the same key ask for the same tensors, and nothing but what is held outlives them.
                device.planned(&[fold, self.channels, pz, py, px, usize::from(strict)], || {
                    let mut cx = Ctx::infer(device).strict(strict);
                    let x = cx.leaf(self.input(start, flip)?);
                    let features = nets[fold].features(&mut cx, x)?.into_value();
                    self.passes_done += 1;
                    // Put together while the card computes this one, and copied when it has.
                    self.send_next()?;
                    self.add(start, flip, fold, &features)
                })?;
                tell(self.progress, Event::Tiles { done: self.passes_done, total: self.plan.passes() })?;
            }
        }
        self.add_weight(start)
    }

    /// What the pass that is next reads.
    fn input(&mut self, start: [usize; 3], flip: [bool; 3]) -> Result<Tensor> {
        if self.sent == self.passes_done {
            self.send_next()?;
        }
        match &self.input {
            Some(t) => Ok(t.clone()),
            None => {
                let [pz, py, px] = self.plan.patch;
                let dims = Dims::from([1, self.channels, pz, py, px]);
                Tensor::from_host(&self.window(start, flip), dims, self.device)
            }
        }
    }

    /// Sends a card the window of the next pass; its work is done in order, so that the pass before has read its own.
    fn send_next(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(t) = self.input.as_ref().filter(|_| self.sent < self.plan.passes()) {
            let (start, flip) = self.plan.pass(self.sent);
            crate::ops::cuda::write(t, &self.window(start, flip))?;
            self.sent += 1;
        }
        Ok(())
    }

    /// The window's intensities, flipped, zeros outside the image.
    fn window(&self, start: [usize; 3], flip: [bool; 3]) -> Vec<f32> {
        let ([pz, py, px], [nz, ny, nx], pad) = (self.plan.patch, self.plan.shape, self.plan.pad());
        let mut values = vec![0f32; self.channels * pz * py * px];
        // The image coordinate of patch index i along an axis, if inside.
        let at = |axis: usize, i: usize, n: usize, size: usize| {
            let i = if flip[axis] { n - 1 - i } else { i };
            (start[axis] + i).checked_sub(pad[axis]).filter(|&v| v < size)
        };
        par::chunks_mut(&mut values, py * px, |cz, plane| {
            let (c, z) = (cz / pz, cz % pz);
            let Some(z) = at(0, z, pz, nz) else { return };
            for (y, row) in plane.chunks_exact_mut(px).enumerate() {
                let Some(y) = at(1, y, py, ny) else { continue };
                let source = &self.data[((c * nz + z) * ny + y) * nx..][..nx];
                for (x, v) in row.iter_mut().enumerate() {
                    if let Some(x) = at(2, x, px, nx) {
                        *v = source[x];
                    }
                }
            }
        });
        values
    }

    fn add(&mut self, start: [usize; 3], flip: [bool; 3], fold: usize, features: &Tensor) -> Result<()> {
        let (plan, host) = (&self.plan, &self.host);
        let ([pz, py, px], [_, h, w]) = (plan.patch, plan.padded());
        let (channels, lanes, importance) = (plan.channels(), plan.features, self.importance.as_deref());
        let scale = 1.0 / (plan.flips.len() * if plan.gather == Gather::Features { 1 } else { plan.folds }) as f32;
        if let Store::Ring { sum, .. } = &mut self.store
            && sum.add_on_card(features, fold, start, flip, scale)?
        {
            return Ok(());
        }
        let features = &*with_processor(features, host)?;
        let view = FeatureView { values: features.stored(), size: plan.patch, lanes };
        match &mut self.store {
            Store::Held(windows) => {
                windows.push(Held::new(start, flip, fold, features, host)?);
            }
            Store::Ring { sum, .. } => {
                let (gather, packed) = (plan.gather, &self.heads[fold]);
                par::chunks_mut(sum.host()?, h * w * channels, |slot, plane| {
                    let z = (slot + pz - start[0] % pz) % pz;
                    let mut row = vec![0f32; px * lanes];
                    let mut g = vec![scale; px];
                    for y in 0..py {
                        view.row(z, y, flip, &mut row);
                        if let Some(m) = importance {
                            let m = &m[(z * py + y) * px..][..px];
                            g.iter_mut().zip(m).for_each(|(g, m)| *g = m * scale);
                        }
                        let out = &mut plane[((start[1] + y) * w + start[2]) * channels..][..px * channels];
                        match gather {
                            Gather::Scores(how) => head::accumulate(host, packed, how, &row, &g, out),
                            Gather::Features | Gather::Held(_) => {
                                for ((out, f), g) in out.chunks_exact_mut(channels).zip(row.chunks_exact(lanes)).zip(&g)
                                {
                                    let out = &mut out[fold * lanes..][..lanes];
                                    out.iter_mut().zip(f).for_each(|(o, f)| *o += g * f);
                                }
                            }
                        }
                    }
                });
            }
        }
        Ok(())
    }

    fn add_weight(&mut self, start: [usize; 3]) -> Result<()> {
        let Store::Ring { sum, .. } = &mut self.store else { return Ok(()) };
        sum.count(start, self.plan.patch, self.importance.as_deref())
    }

    /// Scores of plane `p` of the padded image from the windows held, rows in parallel.
    fn held_plane(&self, windows: &[Held], how: Activation, p: usize, out: &mut [f32]) {
        let (host, heads, importance) = (&self.host, &self.heads, self.importance.as_deref());
        let ([pz, py, px], [_, ny, nx]) = (self.plan.patch, self.plan.shape);
        let (pad, classes, lanes) = (self.plan.pad(), self.plan.classes, self.plan.features);
        let scale = 1.0 / (self.plan.flips.len() * self.plan.folds) as f32;
        let [_, _, w] = self.plan.padded();
        par::chunks_mut(out, nx * classes, |y, out| {
            debug_assert!(y < ny);
            let y = y + pad[1];
            // The padded row: windows may reach past the image.
            let (mut sum, mut weight) = (vec![0f32; w * classes], vec![0f32; w]);
            let (mut row, mut g) = (vec![0f32; px * lanes], vec![scale; px]);
            for window in windows {
                let [sz, sy, sx] = window.start;
                if !(sz..sz + pz).contains(&p) || !(sy..sy + py).contains(&y) {
                    continue;
                }
                window.row(p - sz, y - sy, &mut row);
                if let Some(m) = importance {
                    let m = &m[((p - sz) * py + y - sy) * px..][..px];
                    g.iter_mut().zip(m).for_each(|(g, m)| *g = m * scale);
                }
                let into = &mut sum[sx * classes..][..px * classes];
                head::accumulate(host, &heads[window.fold], how, &row, &g, into);
                weight[sx..sx + px].iter_mut().zip(&g).for_each(|(w, g)| *w += g);
            }
            for (x, out) in out.chunks_exact_mut(classes).enumerate() {
                let inverse = 1.0 / weight[x + pad[2]];
                let s = &sum[(x + pad[2]) * classes..][..classes];
                out.iter_mut().zip(s).for_each(|(o, s)| *o = s * inverse);
            }
        });
    }
}

impl Planes for Sweep<'_> {
    fn channels(&self) -> usize {
        self.plan.channels()
    }

    fn shape(&self) -> [usize; 3] {
        self.plan.shape
    }

    fn plane(&mut self, z: usize, out: &mut [f32]) -> Result<()> {
        self.fill(z, out)?;
        // A comparison with NaN is false: it would pass for background.
        let rows = out.len() / self.plan.shape[1].max(1);
        let sound = par::map(self.plan.shape[1], |y| out[y * rows..][..rows].iter().all(|v| v.is_finite()));
        if sound.contains(&false) { Err(odd(&format!("plane {z} of"))) } else { Ok(()) }
    }

    #[cfg(feature = "cuda")]
    fn labels(&mut self, how: &Labelling<'_>, put: &mut dyn FnMut(usize, &[u16])) -> Result<bool> {
        let (pad, [_, ny, nx]) = (self.plan.pad(), self.plan.shape);
        let on_card = |store: &Store| matches!(store, Store::Ring { sum, .. } if sum.on_card([0; 2]).is_some());
        if !on_card(&self.store) {
            return Ok(false);
        }
        let Labelling { head, classes, winner, grid, wide } = *how;
        let Store::Ring { sum, .. } = &self.store else { return Ok(false) };
        let (of, taps) = ([sum.channels(), classes], [&grid.y[..], &grid.x]);
        let made = Labels::new(self.device, head, of, winner, [ny, nx], taps, grid.z.len(), wide);
        let mut labels = match made {
            Ok(Some(labels)) => labels,
            Ok(None) | Err(Error::OutOfMemory { .. }) => return Ok(false),
            Err(e) => return Err(e),
        };
        let mut out = 0;
        for (z, &(i, j, w)) in grid.z.iter().enumerate() {
            let j = if w == 0.0 { i } else { j };
            self.advance(j)?;
            let Store::Ring { sum, .. } = &self.store else { return Err(Error::shape("sweep", "no sums")) };
            let slot = |z: usize| sum.slot_of(z + pad[0]);
            if let Some(sums) = sum.on_card([pad[1], pad[2]]) {
                labels.make(sums, (slot(i), slot(j), w))?;
            }
            if labels.is_full() || z + 1 == grid.z.len() {
                let first = out;
                let sound = labels.fetch(&mut |plane| {
                    put(out, plane);
                    out += 1;
                })?;
                if !sound {
                    return Err(odd(&format!("one of the planes {first} to {z} that come from")));
                }
            }
        }
        Ok(true)
    }
}

/// What is wrong with numbers that are none.
fn odd(place: &str) -> Error {
    let what = format!("{place} the network's output holds values that are not finite numbers");
    Error::Unsupported { what: format!("{what}: the image or the weights are too extreme") }
}

impl Sweep<'_> {
    /// Runs all windows that plane `z` of the image needs.
    fn advance(&mut self, z: usize) -> Result<()> {
        let p = z + self.plan.pad()[0];
        let clock = Instant::now();
        while self.rows_done < self.plan.starts[0].len() && self.plan.starts[0][self.rows_done] <= p {
            self.run_row(self.rows_done)?;
            self.rows_done += 1;
            // Work of a card is under way only; what follows asks for it and would be blamed for the time.
            self.device.synchronize()?;
        }
        self.network += clock.elapsed();
        let total = self.plan.passes();
        tell(self.progress, Event::Tiles { done: self.passes_done, total })?;
        if self.passes_done == total && !self.exporting {
            self.exporting = true;
            tell(self.progress, Event::Stage("export"))?;
        }
        Ok(())
    }

    fn fill(&mut self, z: usize, out: &mut [f32]) -> Result<()> {
        self.advance(z)?;
        let p = z + self.plan.pad()[0];
        if let Gather::Held(how) = self.plan.gather {
            let Store::Held(mut windows) = std::mem::replace(&mut self.store, Store::Held(Vec::new())) else {
                return Err(Error::shape("sweep", "windows are not held"));
            };
            self.held_plane(&windows, how, p, out);
            // Planes up to this one are never asked for again.
            windows.retain_mut(|w| w.forget_below((p + 1).saturating_sub(w.start[0])));
            self.store = Store::Held(windows);
            return Ok(());
        }
        let Store::Ring { sum, .. } = &self.store else {
            return Err(Error::shape("sweep", "no sums"));
        };
        let ([_, _, w], [_, _, nx]) = (self.plan.padded(), self.plan.shape);
        let (pad, k, stride) = (self.plan.pad(), self.plan.channels(), sum.channels());
        let [sum, weight] = sum.plane(p)?;
        par::chunks_mut(out, nx * k, |y, out| {
            let at = (y + pad[1]) * w + pad[2];
            for (x, out) in out.chunks_exact_mut(k).enumerate() {
                let inverse = 1.0 / weight[at + x];
                out.iter_mut().zip(&sum[(at + x) * stride..]).for_each(|(o, s)| *o = s * inverse);
            }
        });
        Ok(())
    }
}

/// Features in the blocked layout, read as rows of voxels with all channels together.
#[derive(Clone, Copy)]
struct FeatureView<'a> {
    values: Stored<'a>,
    size: [usize; 3],
    lanes: usize,
}

impl FeatureView<'_> {
    /// The row that lands at window position (z, y) when the window was flipped by `flip`: `[x][lanes]`.
    fn row(&self, z: usize, y: usize, flip: [bool; 3], out: &mut [f32]) {
        let [nz, ny, nx] = self.size;
        let z = if flip[0] { nz - 1 - z } else { z };
        let y = if flip[1] { ny - 1 - y } else { y };
        for b in 0..self.lanes / BLOCK {
            let first = ((b * nz + z) * ny + y) * nx;
            for x in 0..nx {
                let to = if flip[2] { nx - 1 - x } else { x };
                self.values.read((first + x) * BLOCK, &mut out[to * self.lanes + b * BLOCK..][..BLOCK]);
            }
        }
    }
}
