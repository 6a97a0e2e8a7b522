//! Patches on their way from a case to a batch, on a card: [`crate::ops::warp`], [`crate::ops::blur`],
//! [`crate::ops::intensity`] and [`crate::ops::low_resolution`] there. Nothing waits for the card.

use super::{backend, card, memory, plain};
use crate::backend::cuda::intensity::{self as kernel, Step};
use crate::base::rng::Key;
use crate::error::{Error, Result};
use crate::ops::blur::Kernel;
use crate::ops::warp::Warp;
use crate::tensor::cuda::{Driver, Memory};
use crate::tensor::{Device, Dims, Layout, Tensor};

const OP: &str = "augmentation";

/// What memory is for.
#[derive(Debug, Clone, Copy)]
enum Place {
    Source,
    SourceLabels,
    Image,
    Labels,
    Moved,
    State,
    Parts,
}

/// Memory that patches are made in, one after the other: work on a card is done in order.
#[derive(Debug, Default)]
pub(crate) struct Room {
    held: [Option<Tensor>; 7],
}

impl Room {
    /// Takes memory for patches of so many voxels, and for boxes that they are warped from.
    pub(crate) fn reserve(&mut self, source: usize, voxels: usize, channels: usize, device: &Device) -> Result<()> {
        let floats = |n: usize| n.saturating_mul(4);
        for (place, bytes) in [
            (Place::Source, floats(source.saturating_mul(channels))),
            (Place::SourceLabels, source.saturating_mul(2)),
            (Place::Image, floats(voxels.saturating_mul(channels))),
            (Place::Labels, voxels.saturating_mul(2)),
            (Place::Moved, floats(voxels)),
            (Place::State, kernel::STATE),
            (Place::Parts, kernel::parts_bytes(voxels)),
        ] {
            self.bytes(place, bytes, device)?;
        }
        Ok(())
    }

    fn bytes(&mut self, place: Place, bytes: usize, device: &Device) -> Result<Memory> {
        let held = &mut self.held[place as usize];
        let fits = |t: &&mut Tensor| t.device().shares_memory(device) && t.cuda().is_some_and(|m| m.bytes >= bytes);
        if held.as_mut().filter(fits).is_none() {
            *held = None;
            *held = Some(device.unplanned(|| plain(bytes.div_ceil(4), device))?);
        }
        let t = held.as_ref().ok_or_else(|| Error::shape(OP, "no memory"))?;
        Ok(Memory { bytes, ..memory(OP, device, t)? })
    }
}

/// Patches and labels of a batch in a card's memory, the same from one batch to the next.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    image: Option<Tensor>,
    labels: Option<Tensor>,
}

impl Batch {
    /// f32 `[N, C, D, H, W]`, and u16 `[N][D][H][W]`, two to a float.
    pub(crate) fn tensors(&mut self, dims: [usize; 5], device: &Device) -> Result<(Tensor, Tensor)> {
        let [n, _, d, h, w] = dims;
        let same = |t: &Tensor, dims: Dims| t.device().shares_memory(device) && *t.dims() == dims;
        let (all, packed) = (Dims::from(dims), Dims::from([(n * d * h * w).div_ceil(2)]));
        let kept = |held: &mut Option<Tensor>, dims: Dims| {
            let t = match held.take().filter(|t| same(t, dims)) {
                Some(t) => t,
                None => device.unplanned(|| Tensor::empty(dims, Layout::PLAIN, device))?,
            };
            Ok::<_, Error>(held.insert(t).clone())
        };
        Ok((kept(&mut self.image, all)?, kept(&mut self.labels, packed)?))
    }
}

/// Copies `bytes` to the start of `to`.
pub(crate) fn send(device: &Device, to: &Tensor, bytes: &[u8]) -> Result<()> {
    card(OP, device)?.upload(memory(OP, device, to)?, bytes)
}

/// A patch under way.
pub(crate) struct Patch<'r> {
    device: &'r Device,
    driver: &'r dyn Driver,
    room: &'r mut Room,
    channels: usize,
    shape: [usize; 3],
    image: Memory,
    labels: Memory,
}

impl<'r> Patch<'r> {
    /// Of `image` `[channels][D][H][W]` and `labels` `[D][H][W]`: the patch of size `shape` itself, or a box that `warp` brings
    /// to it.
    pub(crate) fn new(
        device: &'r Device,
        room: &'r mut Room,
        shape: [usize; 3],
        image: &[f32],
        labels: &[i16],
        warp: Option<&Warp>,
    ) -> Result<Self> {
        let driver = card(OP, device)?;
        let voxels: usize = shape.iter().product();
        let from: usize = warp.map_or(shape, |w| w.source).iter().product();
        let channels = image.len() / from.max(1);
        if from == 0 || voxels == 0 || image.len() != channels * from || labels.len() != from {
            let what = format!("{} values and {} labels for {from} voxels", image.len(), labels.len());
            return Err(Error::shape(OP, what));
        }
        let to_image = room.bytes(Place::Image, channels * voxels * 4, device)?;
        let to_labels = room.bytes(Place::Labels, voxels * 2, device)?;
        match warp {
            None => {
                driver.upload(to_image, bytemuck::cast_slice(image))?;
                driver.upload(to_labels, bytemuck::cast_slice(labels))?;
            }
            Some(w) => {
                let source = room.bytes(Place::Source, image.len() * 4, device)?;
                let source_labels = room.bytes(Place::SourceLabels, labels.len() * 2, device)?;
                driver.upload(source, bytemuck::cast_slice(image))?;
                driver.upload(source_labels, bytemuck::cast_slice(labels))?;
                let problem = backend::warp::Problem {
                    image: source,
                    labels: source_labels,
                    image_out: to_image,
                    labels_out: to_labels,
                    channels,
                    matrix: w.matrix,
                    shift: w.shift,
                    source: w.source,
                    grid: w.grid,
                    origin: w.origin,
                    planes: w.planes,
                };
                backend::warp::run(driver, &problem)?;
            }
        }
        Ok(Self { device, driver, room, channels, shape, image: to_image, labels: to_labels })
    }

    fn voxels(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its channels, how many.
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// One of them, from the first on.
    pub(crate) fn channel(&mut self, index: usize) -> Result<Channel<'_>> {
        let bytes = 4 * self.voxels();
        if index >= self.channels {
            return Err(Error::shape(OP, format!("channel {index} of {}", self.channels)));
        }
        let values = kernel::Channel {
            x: Memory { address: self.image.address + (index * bytes) as u64, bytes },
            values: self.voxels(),
            state: self.room.bytes(Place::State, kernel::STATE, self.device)?,
            parts: self.room.bytes(Place::Parts, kernel::parts_bytes(self.voxels()), self.device)?,
        };
        let moved = self.room.bytes(Place::Moved, bytes, self.device)?;
        kernel::settle(self.driver, &values, false, Step::Begin)?;
        let (driver, shape, labels) = (self.driver, self.shape, self.labels);
        Ok(Channel { driver, shape, labels, values, moved, known: false })
    }

    /// The labels, mirrored, as number `n` of `to`'s.
    pub(crate) fn put_labels(&self, flip: [bool; 3], to: &Tensor, n: usize) -> Result<()> {
        let to = placed(memory(OP, self.device, to)?, n, self.voxels() * 2)?;
        kernel::put_labels(self.driver, self.labels, self.shape, flip, to)
    }

    /// Where a channel of `to` `[N, C, D, H, W]` lies.
    pub(crate) fn place(&self, to: &Tensor, n: usize, index: usize) -> Result<Memory> {
        placed(memory(OP, self.device, to)?, n * self.channels + index, self.voxels() * 4)
    }
}

/// The `n`-th piece of `bytes` bytes.
fn placed(all: Memory, n: usize, bytes: usize) -> Result<Memory> {
    if (n + 1) * bytes > all.bytes {
        return Err(Error::shape(OP, format!("piece {n} of {bytes} bytes in {}", all.bytes)));
    }
    Ok(Memory { address: all.address + (n * bytes) as u64, bytes })
}

/// A channel of a patch under way. Maps of single values are not carried out but put together, as on the processor.
pub(crate) struct Channel<'p> {
    driver: &'p dyn Driver,
    shape: [usize; 3],
    labels: Memory,
    values: kernel::Channel,
    /// As much memory as the values have.
    moved: Memory,
    /// The card has measured the values.
    known: bool,
}

impl Channel<'_> {
    /// Adds `sigma` times the standard normal numbers of the stream `key`.
    pub(crate) fn noise(&mut self, sigma: f32, key: Key) -> Result<()> {
        self.known = false;
        kernel::noise(self.driver, &self.values, sigma, key.seed, key.words)
    }

    /// Filters along z, y and x, before anything else but noise.
    pub(crate) fn blur(&mut self, kernels: &[Kernel; 3]) -> Result<()> {
        for (axis, k) in kernels.iter().enumerate().filter(|(_, k)| k.len > 1) {
            let problem = backend::blur::Problem {
                from: self.values.x,
                to: self.moved,
                shape: self.shape,
                axis,
                weights: k.weights,
                taps: k.len,
            };
            backend::blur::run(self.driver, &problem)?;
            std::mem::swap(&mut self.values.x, &mut self.moved);
        }
        self.known = false;
        Ok(())
    }

    /// `v <- scale v + shift`.
    pub(crate) fn affine(&mut self, scale: f64, shift: f64) -> Result<()> {
        kernel::settle(self.driver, &self.values, false, Step::Affine(scale, shift))
    }

    /// `v <- factor v + (1 - factor) mean`, held between the smallest and the largest.
    pub(crate) fn contrast(&mut self, factor: f64) -> Result<()> {
        let measured = !std::mem::replace(&mut self.known, false);
        if measured {
            kernel::stats(self.driver, &self.values)?;
        }
        kernel::settle(self.driver, &self.values, measured, Step::Contrast(factor))
    }

    /// What a grid of `coarse` voxels knows of the values.
    pub(crate) fn low_resolution(&mut self, coarse: [usize; 3]) -> Result<()> {
        let problem = backend::low_resolution::Problem {
            from: self.values.x,
            to: self.moved,
            state: self.values.state,
            shape: self.shape,
            coarse,
        };
        backend::low_resolution::run(self.driver, &problem)?;
        std::mem::swap(&mut self.values.x, &mut self.moved);
        self.known = false;
        kernel::settle(self.driver, &self.values, false, Step::Begin)
    }

    /// A power curve on the range of the values, which keep their mean and deviation.
    pub(crate) fn gamma(&mut self, gamma: f32) -> Result<()> {
        if !std::mem::replace(&mut self.known, true) {
            kernel::stats(self.driver, &self.values)?;
            kernel::settle(self.driver, &self.values, true, Step::Know)?;
        }
        kernel::power(self.driver, &self.values, gamma)?;
        kernel::settle(self.driver, &self.values, true, Step::Curve)
    }

    /// The values with axes reversed, 0 where `masked` and a label is negative.
    pub(crate) fn put(&self, flip: [bool; 3], masked: bool, to: Memory) -> Result<()> {
        let outside = masked.then_some(self.labels);
        kernel::put(self.driver, &self.values, outside, self.shape, flip, to)
    }
}
