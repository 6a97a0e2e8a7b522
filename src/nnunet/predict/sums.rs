//! Sums over windows: with the processor, or on the card where the windows' features are made, and scores of them.

use std::borrow::Cow;

use crate::base::par;
use crate::error::{Error, Result};
use crate::models::Head;
#[cfg(feature = "cuda")]
use crate::ops::cuda::ScoreLayer;
use crate::ops::head::Activation;
#[cfg(feature = "cuda")]
use crate::ops::resample::SumsOnCard;
#[cfg(feature = "cuda")]
use crate::tensor::BLOCK;
use crate::tensor::{Device, Dims, Layout, Tensor};

/// Running sums `[ring][H][W][channels]`, and what was counted in them, with the processor or on a card. Plane p of the image
/// lies in slot `p % ring`.
pub(super) struct Sums {
    values: Tensor,
    counted: Tensor,
    ring: [usize; 3],
    channels: usize,
    /// What a window's voxels count, on a card that knows it.
    #[cfg(feature = "cuda")]
    importance: Option<Tensor>,
    /// The layers whose scores a card sums, one of each network; none where features are summed.
    #[cfg(feature = "cuda")]
    layers: Vec<ScoreLayer>,
}

impl Sums {
    /// For windows of `depth` planes, of `channels` channels, or of the scores of each network's head. Zeros are made plane
    /// by plane, see [`Sums::clear`].
    pub(super) fn new(
        [depth, h, w]: [usize; 3],
        channels: usize,
        scores: Option<(&[&Head], Activation)>,
        importance: Option<&[f32]>,
        place: &Device,
    ) -> Result<Self> {
        #[cfg(not(feature = "cuda"))]
        let _ = (importance, scores);
        let channels = if scores.is_some() && !place.is_cpu() { lanes_on_card(channels) } else { channels };
        let ring = [ring(depth, !place.is_cpu()), h, w];
        Ok(Self {
            values: Tensor::empty(Dims::from([ring[0], h, w, channels]), Layout::PLAIN, place)?,
            counted: Tensor::empty(Dims::from(ring), Layout::PLAIN, place)?,
            ring,
            channels,
            #[cfg(feature = "cuda")]
            importance: match importance {
                Some(m) if !place.is_cpu() => Some(Tensor::from_host(m, Dims::from([m.len()]), place)?),
                _ => None,
            },
            #[cfg(feature = "cuda")]
            layers: match scores {
                Some((heads, how)) if !place.is_cpu() => {
                    let layer = |h: &&Head| ScoreLayer::new(&h.weight, &h.bias, how, place);
                    heads.iter().map(layer).collect::<Result<_>>()?
                }
                _ => Vec::new(),
            },
        })
    }

    /// Where plane `p` of the image is.
    fn slot(&self, p: usize) -> usize {
        p % self.ring[0]
    }

    /// Sets plane `p`, in place of one that is out, to zero.
    pub(super) fn clear(&mut self, p: usize) -> Result<()> {
        let (slot, n) = (self.slot(p), self.ring[1] * self.ring[2]);
        for (t, n) in [(&mut self.values, n * self.channels), (&mut self.counted, n)] {
            #[cfg(feature = "cuda")]
            if !t.device().is_cpu() {
                crate::ops::cuda::clear(t, slot * n, n)?;
                continue;
            }
            par::chunks_mut(&mut unshared(t)?[slot * n..][..n], 1 << 16, |_, piece| piece.fill(0.0));
        }
        Ok(())
    }

    /// Channels with those that fill up, which stay zero.
    pub(super) fn channels(&self) -> usize {
        self.channels
    }

    /// Plane `p`, and what was counted in it.
    pub(super) fn plane(&self, p: usize) -> Result<[Cow<'_, [f32]>; 2]> {
        let (slot, n) = (self.slot(p), self.ring[1] * self.ring[2]);
        Ok([part(&self.values, slot, n * self.channels)?, part(&self.counted, slot, n)?])
    }

    /// All sums, if they are with the processor.
    pub(super) fn host(&mut self) -> Result<&mut [f32]> {
        unshared(&mut self.values)
    }

    /// The sums on a card, for a grid that begins at `pad` in y and x.
    #[cfg(feature = "cuda")]
    pub(super) fn on_card(&self, pad: [usize; 2]) -> Option<SumsOnCard<'_>> {
        let (values, counted, ring) = (&self.values, &self.counted, self.ring);
        (!values.device().is_cpu()).then_some(SumsOnCard { values, counted, ring, pad })
    }

    /// Plane `p` of the sums on a card.
    #[cfg(feature = "cuda")]
    pub(super) fn slot_of(&self, p: usize) -> usize {
        self.slot(p)
    }

    /// Adds the features that the `fold`-th network made of a window that begins at `start` and was mirrored by `flip`, or
    /// their scores, times `scale` and what its voxels count; and counts them with the first pass over the window. False if
    /// the sums are with the processor, who has to do both.
    pub(super) fn add_on_card(
        &mut self,
        features: &Tensor,
        fold: usize,
        start: [usize; 3],
        flip: [bool; 3],
        scale: f32,
    ) -> Result<bool> {
        #[cfg(feature = "cuda")]
        if !self.values.device().is_cpu() {
            let counted = (fold == 0 && flip == [false; 3]).then_some(&self.counted);
            let (layer, importance) = (self.layers.get(fold), self.importance.as_ref());
            let lanes = features.dims().five()[1].next_multiple_of(BLOCK);
            let of = [self.channels, if layer.is_some() { 0 } else { fold * lanes }];
            let (sum, ring) = (&self.values, self.ring);
            crate::ops::cuda::aggregate(features, layer, importance, sum, counted, ring, of, start, flip, scale)?;
            return Ok(true);
        }
        let _ = (features, fold, start, flip, scale);
        Ok(false)
    }

    /// Counts the voxels of a window of `size` that begins at `start`, if the sums are with the processor: by `importance`,
    /// or all alike.
    pub(super) fn count(&mut self, start: [usize; 3], size: [usize; 3], importance: Option<&[f32]>) -> Result<()> {
        if !self.counted.device().is_cpu() {
            return Ok(());
        }
        let ([pz, py, px], [_, h, w]) = (size, self.ring);
        par::chunks_mut(unshared(&mut self.counted)?, h * w, |slot, plane| {
            let z = (slot + pz - start[0] % pz) % pz;
            for y in 0..py {
                let out = &mut plane[(start[1] + y) * w + start[2]..][..px];
                match importance {
                    Some(m) => out.iter_mut().zip(&of_plane(m, z, py * px)[y * px..]).for_each(|(o, m)| *o += m),
                    None => out.iter_mut().for_each(|o| *o += 1.0),
                }
            }
        });
        Ok(())
    }
}

/// What counts in plane `z`, of `n` voxels, of a pass: slices of a 2D network are all alike.
pub(super) fn of_plane(importance: &[f32], z: usize, n: usize) -> &[f32] {
    &importance[z * n % importance.len()..][..n]
}

/// Planes of the sums over windows of `depth` planes. A card interpolates between the last two of the planes that are
/// finished, of which the next windows need none; the processor takes each as it is finished.
pub(super) fn ring(depth: usize, on_card: bool) -> usize {
    depth + usize::from(on_card)
}

/// Channels of the sums of so many classes' scores on a card.
pub(super) fn lanes_on_card(classes: usize) -> usize {
    #[cfg(feature = "cuda")]
    return ScoreLayer::lanes(classes);
    #[cfg(not(feature = "cuda"))]
    classes
}

/// Whether a card can make scores of so many features.
pub(super) fn scores_on_card(device: &Device, features: usize) -> bool {
    #[cfg(feature = "cuda")]
    return ScoreLayer::is_supported(device, features);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (device, features);
        false
    }
}

/// The `i`-th `n` values.
fn part(t: &Tensor, i: usize, n: usize) -> Result<Cow<'_, [f32]>> {
    #[cfg(feature = "cuda")]
    if !t.device().is_cpu() {
        let mut values = vec![0.0; n];
        crate::ops::cuda::download(t, i * n, &mut values)?;
        return Ok(Cow::Owned(values));
    }
    Ok(Cow::Borrowed(&t.as_slice()[i * n..][..n]))
}

pub(super) fn unshared(t: &mut Tensor) -> Result<&mut [f32]> {
    t.as_mut_slice().ok_or_else(|| Error::shape("sweep", "a running sum is shared"))
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
