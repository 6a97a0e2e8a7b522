//! The sliding window: runs the network over an image from its first plane to its last and hands out finished planes
//! of scores in rising order, so that at most one window's depth of scores (or the windows' features) exists at a time.

use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use super::export::Labelling;
use super::export::Planes;
use super::held::Held;
use super::sums::{Sums, of_plane, with_processor};
pub(crate) use super::sweep_plan::{Gather, SweepPlan};
use super::window::gaussian;
use crate::autograd::Ctx;
use crate::base::par;
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::models::{Head, Network};
use crate::ops::head::{self, Activation, PackedHead};
#[cfg(feature = "cuda")]
use crate::ops::resample::Labels;
use crate::tensor::{BLOCK, Device, Layout, Stored, Tensor};

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

/// Room for what windows leave.
fn store(plan: &SweepPlan, nets: &[Network], importance: Option<&[f32]>, device: &Device) -> Result<Store> {
    if matches!(plan.gather, Gather::Held(_)) {
        return Ok(Store::Held(Vec::new()));
    }
    let [_, h, w] = plan.padded();
    let heads: Vec<&Head> = nets.iter().map(Network::head).collect::<Result<_>>()?;
    let scores = match plan.gather {
        Gather::Scores(how) => Some((&heads[..], how)),
        Gather::Features | Gather::Held(_) => None,
    };
    let place = if plan.sums_on_card { device } else { device.host() };
    let sum = Sums::new([plan.planes, h, w], plan.channels(), scores, importance, place)?;
    Ok(Store::Ring { sum: Box::new(sum), end: 0 })
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
        let store = match store(&plan, nets, importance.as_deref(), device) {
            // Other programs may have taken what the plan counted on.
            Err(Error::OutOfMemory { .. }) if plan.sums_on_card => {
                plan.move_to_host();
                store(&plan, nets, importance.as_deref(), device)?
            }
            store => store?,
        };
        let heads = nets.iter().map(|n| {
            let head = n.head()?;
            Ok(PackedHead::new(&head.weight, &head.bias, head.features, plan.features))
        });
        let heads = heads.collect::<Result<_>>()?;
        let input = || Tensor::empty(plan.input(channels), Layout::PLAIN, device);
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

    /// Runs all passes that start at the `row`-th z start.
    fn run_row(&mut self, row: usize) -> Result<()> {
        let z = self.plan.starts[0][row];
        if let Store::Ring { sum, end } = &mut self.store {
            let upto = z + self.plan.planes;
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
                let (nets, device, [pz, py, px]) = (self.nets, self.device, self.plan.pass_size());
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
            None => Tensor::from_host(&self.window(start, flip), self.plan.input(self.channels), self.device),
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

    /// The intensities of a window, or of as many as there are slices in a pass, flipped, zeros outside the image.
    fn window(&self, start: [usize; 3], flip: [bool; 3]) -> Vec<f32> {
        let ([pz, py, px], [nz, ny, nx], pad) = (self.plan.pass_size(), self.plan.shape, self.plan.pad());
        let (planar, channels, data) = (self.plan.planar, self.channels, self.data);
        let mut values = vec![0f32; channels * pz * py * px];
        // The image coordinate of patch index i along an axis, if inside.
        let at = |axis: usize, i: usize, n: usize, size: usize| {
            let i = if flip[axis] { n - 1 - i } else { i };
            (start[axis] + i).checked_sub(pad[axis]).filter(|&v| v < size)
        };
        par::chunks_mut(&mut values, py * px, |i, plane| {
            // Slices are samples, with their channels inside.
            let (c, z) = if planar { (i % channels, i / channels) } else { (i / pz, i % pz) };
            let Some(z) = at(0, z, pz, nz) else { return };
            for (y, row) in plane.chunks_exact_mut(px).enumerate() {
                let Some(y) = at(1, y, py, ny) else { continue };
                let source = &data[((c * nz + z) * ny + y) * nx..][..nx];
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
        let ([pz, py, px], [_, h, w]) = (plan.pass_size(), plan.padded());
        let (channels, lanes, importance) = (plan.channels(), plan.features, self.importance.as_deref());
        let scale = 1.0 / (plan.flips.len() * if plan.gather == Gather::Features { 1 } else { plan.folds }) as f32;
        if let Store::Ring { sum, .. } = &mut self.store
            && sum.add_on_card(features, fold, start, flip, scale)?
        {
            return Ok(());
        }
        let features = &*with_processor(features, host)?;
        let view = FeatureView { values: features.stored(), size: plan.pass_size(), lanes, planar: plan.planar };
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
                            let m = &of_plane(m, z, py * px)[y * px..][..px];
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
        sum.count(start, self.plan.pass_size(), self.importance.as_deref())
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
    /// Planes are samples.
    planar: bool,
}

impl FeatureView<'_> {
    /// The row that lands at window position (z, y) when the window was flipped by `flip`: `[x][lanes]`.
    fn row(&self, z: usize, y: usize, flip: [bool; 3], out: &mut [f32]) {
        let [nz, ny, nx] = self.size;
        let z = if flip[0] { nz - 1 - z } else { z };
        let y = if flip[1] { ny - 1 - y } else { y };
        for b in 0..self.lanes / BLOCK {
            let plane = if self.planar { z * (self.lanes / BLOCK) + b } else { b * nz + z };
            let first = (plane * ny + y) * nx;
            for x in 0..nx {
                let to = if flip[2] { nx - 1 - x } else { x };
                self.values.read((first + x) * BLOCK, &mut out[to * self.lanes + b * BLOCK..][..BLOCK]);
            }
        }
    }
}
