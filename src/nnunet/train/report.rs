//! What steps and epochs tell of themselves.

use serde::Serialize;

use crate::nnunet::checkpoint::Logged;

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// Before the step.
    pub loss: f64,
    /// Norm of all gradients together, before clipping; infinite of a step that was skipped.
    pub gradient_norm: f64,
    /// Whether they were scaled down.
    pub clipped: bool,
    /// Nothing moved: gradients were not finite as float16 that are of the loss times `loss_scale`, which goes back now.
    pub skipped: bool,
    /// What the loss was multiplied by before the way back, in float16 on a card.
    pub loss_scale: Option<f64>,
    /// Wall seconds until the batch was there; on a card beside the step before.
    pub seconds_waiting: f64,
    /// Wall seconds of the step.
    pub seconds: f64,
}

/// What one epoch did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EpochReport {
    /// Its number, from 0.
    pub epoch: u32,
    /// Constant within an epoch.
    pub learning_rate: f64,
    /// Mean loss in training.
    pub train_loss: f64,
    /// Mean loss in validation.
    pub val_loss: Option<f64>,
    /// Mean of `dice`, classes that no patch has left out.
    pub mean_fg_dice: Logged,
    /// Its moving average.
    pub ema_fg_dice: Logged,
    /// Dice of every class or region over the validation's patches.
    pub dice_per_class_or_region: Vec<Logged>,
    /// The moving average is higher than ever.
    pub is_best: bool,
    /// Largest norm of gradients.
    pub max_gradient_norm: f64,
    /// Steps whose gradients were scaled down.
    pub clipped: u32,
    /// Steps that were skipped, see [`StepReport::skipped`].
    pub skipped: u32,
    /// What the next step's loss is multiplied by, in float16 on a card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Wall seconds.
    pub seconds: f64,
    /// Wall seconds until batches were there; on a card most of them beside its steps.
    pub seconds_waiting: f64,
    /// Largest total of the device's tensors in bytes.
    pub peak_tensor_bytes: usize,
}

impl EpochReport {
    /// What nnU-Net writes to its log at the end of an epoch.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let round = |v: f64| (v * 1e4).round_ties_even() / 1e4;
        let number = |v: f64| if v.is_nan() { "nan".to_string() } else { round(v).to_string() };
        let dice: Vec<String> = self.dice_per_class_or_region.iter().map(|d| number(d.0)).collect();
        let mut lines = vec![format!("train_loss {}", number(self.train_loss))];
        if let Some(loss) = self.val_loss {
            lines.push(format!("val_loss {}", number(loss)));
            lines.push(format!("Pseudo dice [{}]", dice.join(", ")));
        }
        if let Some(scale) = self.loss_scale.filter(|_| self.skipped > 0) {
            lines.push(format!("steps skipped, whose gradients overflowed: {}; loss scale {scale}", self.skipped));
        }
        lines.push(format!("Epoch time: {:.2} s", self.seconds));
        if self.is_best {
            lines.push(format!("Yayy! New best EMA pseudo Dice: {}", number(self.ema_fg_dice.0)));
        }
        lines
    }
}
