//! Resampling of lines of an image on the host, before there are tensors: the axes of nnU-Net's resampling.

pub(crate) use crate::backend::cpu::resample::{Four, LANES, Lane, Pair, cubic, linear, prefilter};

#[cfg(feature = "cuda")]
pub(crate) use card::{Labels, SumsOnCard};

/// The way from sums over windows on a card to labels of an image.
#[cfg(feature = "cuda")]
mod card {
    use crate::backend::cuda::{head_labels, resample as kernel};
    use crate::error::{Error, Result};
    use crate::ops::cuda::{card, memory, part, plain};
    use crate::ops::head::{LinearHead, Tap, Winner};
    use crate::tensor::{Device, Tensor};

    const OP: &str = "resample_labels";

    /// Most bytes of labels that are on the card at a time, if a plane is not more.
    const SLAB: usize = 16 << 20;

    /// Floats before the labels: the first says whether something is odd.
    const HEAD: usize = 4;

    /// Sums over windows.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct SumsOnCard<'a> {
        /// f32 `[ring][H][W][channels]`.
        pub(crate) values: &'a Tensor,
        /// f32 `[ring][H][W]`.
        pub(crate) counted: &'a Tensor,
        /// Planes, height and width.
        pub(crate) ring: [usize; 3],
        /// Where the grid begins in y and x.
        pub(crate) pad: [usize; 2],
    }

    /// Labels of some planes of an image, made on a card and kept there until all of them are fetched at once.
    pub(crate) struct Labels {
        filter: Tensor,
        bias: Tensor,
        names: Tensor,
        taps: [Tensor; 2],
        out: Tensor,
        grid: [usize; 2],
        size: [usize; 2],
        classes: usize,
        channels: usize,
        threshold: Option<f32>,
        wide: bool,
        /// Planes that there is room for, and those that are there.
        room: usize,
        planes: usize,
    }

    impl Labels {
        /// For planes of `rows` by `columns` voxels on a grid of `grid` voxels along y and x, `planes` in all; `wide` for
        /// labels above 255. The sums have `channels`, which `head` reads; without one they begin with the `classes`' scores.
        /// `None` where the card has no kernel for so many channels.
        ///
        /// # Errors
        /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::Shape`](crate::Error::Shape) for taps outside of
        /// the grid, [`Error::Device`](crate::Error::Device).
        pub(crate) fn new(
            device: &Device,
            head: Option<&LinearHead>,
            [channels, classes]: [usize; 2],
            winner: Winner<'_>,
            grid: [usize; 2],
            [rows, columns]: [&[Tap]; 2],
            planes: usize,
            wide: bool,
        ) -> Result<Option<Self>> {
            if !head.map_or(classes <= channels, |h| [h.channels(), h.classes()] == [channels, classes]) {
                return Err(Error::shape(OP, format!("sums of {channels} channels for {classes} classes")));
            }
            if !kernel::supports(card(OP, device)?, channels) {
                return Ok(None);
            }
            let (threshold, names) = match winner {
                Winner::Largest => (None, (0..=u16::MAX).take(classes).collect()),
                Winner::Painted { threshold, paint } => (Some(threshold), paint.to_vec()),
            };
            let plane = rows.len() * columns.len() * if wide { 2 } else { 1 };
            let room = (SLAB / plane.max(1)).clamp(1, planes.max(1));
            let floats = |values: &[f32]| upload(bytemuck::cast_slice(values), device);
            // What takes scores as they are.
            let unit =
                || (0..classes * channels).map(|i| if i / channels == i % channels { 1.0 } else { 0.0 }).collect();
            let weight = head.map_or_else(unit, |h| h.weight().to_vec());
            let bias = head.map_or_else(|| vec![0.0; classes], |h| h.bias().to_vec());
            Ok(Some(Self {
                filter: floats(&kernel::pack_filter(&weight, [classes, channels])?)?,
                bias: floats(&head_labels::pack_bias(&bias))?,
                names: upload(bytemuck::cast_slice(&kernel::pack_names(&names)), device)?,
                taps: [
                    upload(bytemuck::cast_slice(&kernel::pack_taps(rows, grid[0])?), device)?,
                    upload(bytemuck::cast_slice(&kernel::pack_taps(columns, grid[1])?), device)?,
                ],
                out: plain(HEAD + (plane * room).div_ceil(4), device)?,
                grid,
                size: [rows.len(), columns.len()],
                classes,
                channels,
                threshold,
                wide,
                room,
                planes: 0,
            }))
        }

        /// True when the planes have to be fetched before another is made.
        pub(crate) fn is_full(&self) -> bool {
            self.planes == self.room
        }

        /// Makes the next plane, from the planes of the ring that `between` names.
        ///
        /// # Errors
        /// [`Error::Shape`](crate::Error::Shape) when the sums are others, [`Error::Device`](crate::Error::Device).
        pub(crate) fn make(&mut self, sums: SumsOnCard<'_>, between: Tap) -> Result<()> {
            let device = self.out.device();
            let driver = card(OP, device)?;
            let all = memory(OP, device, &self.out)?;
            let odd = part(&self.out, 0, HEAD)?;
            if self.planes == 0 {
                driver.memset(odd, 0)?;
            }
            let skip = HEAD * 4 + self.planes * self.plane();
            let labels = crate::tensor::cuda::Memory {
                address: all.address + skip as u64,
                bytes: all.bytes.saturating_sub(skip),
            };
            let at = |t: &Tensor| memory(OP, device, t);
            let p = kernel::Problem {
                sum: at(sums.values)?,
                counted: at(sums.counted)?,
                ring: sums.ring,
                channels: self.channels,
                between,
                pad: sums.pad,
                grid: self.grid,
                filter: at(&self.filter)?,
                bias: at(&self.bias)?,
                names: at(&self.names)?,
                classes: self.classes,
                threshold: self.threshold,
                taps: [at(&self.taps[0])?, at(&self.taps[1])?],
                size: self.size,
                labels,
                wide: self.wide,
                odd,
            };
            kernel::run(driver, &p)?;
            self.planes += 1;
            Ok(())
        }

        /// Bytes of a plane.
        fn plane(&self) -> usize {
            self.size[0] * self.size[1] * if self.wide { 2 } else { 1 }
        }

        /// Waits for the planes made since the last call and hands them to `put` one after the other; false, without any,
        /// when a feature was no finite number.
        ///
        /// # Errors
        /// [`Error::Device`](crate::Error::Device).
        pub(crate) fn fetch(&mut self, put: &mut dyn FnMut(&[u16])) -> Result<bool> {
            let (planes, plane) = (std::mem::take(&mut self.planes), self.plane());
            if planes == 0 {
                return Ok(true);
            }
            let device = self.out.device();
            let mut bytes = vec![0u8; HEAD * 4 + planes * plane];
            card(OP, device)?.download(memory(OP, device, &self.out)?, &mut bytes)?;
            let (head, labels) = bytes.split_at(HEAD * 4);
            if head.iter().any(|b| *b != 0) {
                return Ok(false);
            }
            let mut wide = Vec::with_capacity(self.size[0] * self.size[1]);
            for plane in labels.chunks_exact(plane) {
                wide.clear();
                if self.wide {
                    wide.extend(plane.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)));
                } else {
                    wide.extend(plane.iter().map(|b| u16::from(*b)));
                }
                put(&wide);
            }
            Ok(true)
        }
    }

    /// Bytes of a whole number of floats.
    fn upload(bytes: &[u8], device: &Device) -> Result<Tensor> {
        let t = plain(bytes.len() / 4, device)?;
        card(OP, device)?.upload(memory(OP, device, &t)?, bytes)?;
        Ok(t)
    }
}
