//! Sums over windows: with the processor, or on the card where the windows' features are made.

use std::borrow::Cow;

use super::sweep::unshared;
use crate::base::par;
use crate::error::Result;
use crate::tensor::{Device, Dims, Layout, Tensor};

/// Running sums `[ring][H][W][channels]`, with the processor or on a card.
pub(super) struct Sums {
    values: Tensor,
    /// On a card that knows it: what a window's voxels count.
    #[cfg(feature = "cuda")]
    importance: Option<Tensor>,
}

impl Sums {
    /// Zeros are made plane by plane, see [`Sums::clear`].
    pub(super) fn new(
        [ring, h, w]: [usize; 3],
        channels: usize,
        importance: Option<&[f32]>,
        place: &Device,
    ) -> Result<Self> {
        #[cfg(not(feature = "cuda"))]
        let _ = importance;
        Ok(Self {
            values: Tensor::empty(Dims::from([ring, h, w, channels]), Layout::PLAIN, place)?,
            #[cfg(feature = "cuda")]
            importance: match importance {
                Some(m) if !place.is_cpu() => Some(Tensor::from_host(m, Dims::from([m.len()]), place)?),
                _ => None,
            },
        })
    }

    fn plane_len(&self) -> usize {
        self.values.dims().as_slice()[1..].iter().product()
    }

    /// Sets plane `slot` to zero.
    pub(super) fn clear(&mut self, slot: usize) -> Result<()> {
        let n = self.plane_len();
        #[cfg(feature = "cuda")]
        if !self.values.device().is_cpu() {
            return crate::ops::cuda::clear(&self.values, slot * n, n);
        }
        par::chunks_mut(&mut unshared(&mut self.values)?[slot * n..][..n], 1 << 16, |_, piece| piece.fill(0.0));
        Ok(())
    }

    /// Plane `slot`.
    pub(super) fn plane(&self, slot: usize) -> Result<Cow<'_, [f32]>> {
        let n = self.plane_len();
        #[cfg(feature = "cuda")]
        if !self.values.device().is_cpu() {
            let mut plane = vec![0.0; n];
            crate::ops::cuda::download(&self.values, slot * n, &mut plane)?;
            return Ok(Cow::Owned(plane));
        }
        Ok(Cow::Borrowed(&self.values.as_slice()[slot * n..][..n]))
    }

    /// All of them, if they are with the processor.
    pub(super) fn host(&mut self) -> Result<&mut [f32]> {
        unshared(&mut self.values)
    }

    /// Adds the features of a window that begins at `start` and was mirrored by `flip`, times `scale` and what its voxels
    /// count, to the channels from `first` on; false if the sums are with the processor, who has to do it.
    pub(super) fn add_on_card(
        &mut self,
        features: &Tensor,
        first: usize,
        start: [usize; 3],
        flip: [bool; 3],
        scale: f32,
    ) -> Result<bool> {
        #[cfg(feature = "cuda")]
        if !self.values.device().is_cpu() {
            let [ring, h, w, channels] = [0, 1, 2, 3].map(|i| self.values.dims().as_slice()[i]);
            let (importance, ring) = (self.importance.as_ref(), [ring, h, w]);
            let of = [channels, first];
            crate::ops::cuda::aggregate(features, importance, &self.values, ring, of, start, flip, scale)?;
            return Ok(true);
        }
        let _ = (features, first, start, flip, scale);
        Ok(false)
    }
}

/// Features as the processor has them.
pub(super) fn with_processor<'f>(features: &'f Tensor, host: &Device) -> Result<Cow<'f, Tensor>> {
    #[cfg(feature = "cuda")]
    if !features.device().is_cpu() {
        return crate::ops::cuda::to_processor(features, host).map(Cow::Owned);
    }
    let _ = host;
    Ok(Cow::Borrowed(features))
}
