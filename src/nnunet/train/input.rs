//! A batch on its way into a step.

use std::time::Instant;

use super::Batches;
use crate::error::{Error, Result};
use crate::nnunet::augment::AugmentConfig;
#[cfg(feature = "cuda")]
use crate::nnunet::augment::CardBatch;
use crate::nnunet::loader::Batch;
use crate::ops::{LabelMap, Outputs, Target};
use crate::tensor::{Device, Tensor};

/// Where batches lie that were sent ahead of their step.
#[derive(Debug, Default)]
pub(super) struct Room {
    #[cfg(feature = "cuda")]
    card: CardBatch,
}

/// A batch, and on a card what was sent of it.
pub(super) struct Input {
    pub(super) batch: Batch,
    /// Images, and labels two to a float.
    #[cfg(feature = "cuda")]
    sent: Option<(Tensor, Tensor)>,
    /// Wall seconds until the batch was there.
    pub(super) seconds_waiting: f64,
}

impl Room {
    /// Takes all the memory that batches need on their way, for those that a card augments.
    pub(super) fn reserve(&mut self, augment: Option<&AugmentConfig>, channels: usize, device: &Device) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(augment) = augment {
            return self.card.reserve(augment, channels, device);
        }
        let _ = (augment, channels, device);
        Ok(())
    }

    /// The next batch; where a card is to take it, its copy and what is done to it there are asked for, not waited for.
    pub(super) fn next(&mut self, from: &mut dyn Batches, device: &Device) -> Result<Input> {
        let clock = Instant::now();
        let batch = from.batch()?;
        let seconds_waiting = clock.elapsed().as_secs_f64();
        Ok(Input { seconds_waiting, ..self.place(batch, device)? })
    }

    /// A batch, sent where a card is to take it.
    pub(super) fn place(&mut self, batch: Batch, device: &Device) -> Result<Input> {
        #[cfg(feature = "cuda")]
        if !device.is_cpu() {
            let sent = match batch.raw() {
                Some((how, raw)) => self.card.make(how, raw, device)?,
                None => self.card.send(&batch.image, &batch.target, batch.image_dims(), device)?,
            };
            return Ok(Input { batch, sent: Some(sent), seconds_waiting: 0.0 });
        }
        if batch.is_raw() {
            return Err(Error::usage(format!("batches for a card to augment: expected a card, not {}", device.name())));
        }
        Ok(Input {
            batch,
            #[cfg(feature = "cuda")]
            sent: None,
            seconds_waiting: 0.0,
        })
    }
}

impl Input {
    /// Images and labels on `device`.
    pub(super) fn tensors(&self, outputs: &Outputs, device: &Device) -> Result<(Tensor, Target)> {
        #[cfg(feature = "cuda")]
        if let Some((image, labels)) = &self.sent {
            return Ok((image.clone(), Target::on_card(labels.clone(), self.batch.target_dims(), outputs)?));
        }
        tensors(&self.batch, outputs, device)
    }
}

/// Images and labels of a batch on `device`.
pub(super) fn tensors(batch: &Batch, outputs: &Outputs, device: &Device) -> Result<(Tensor, Target)> {
    let image = Tensor::from_host(&batch.image, batch.image_dims().into(), device)?;
    let target = LabelMap::new(batch.target.as_slice(), batch.target_dims())?;
    Ok((image, Target::new(target, outputs, device)?))
}
