//! Loss scaling: gradients that 16 bits would lose at one end, held off the other (Micikevicius et al., "Mixed precision
//! training", 2018).

use serde::{Deserialize, Serialize};

use super::StepNorms;
use crate::error::{Error, Result};
use crate::ops::LossValue;

/// What a loss is multiplied by before the way back, so that small gradients are no zeros in float16, as
/// `torch.amp.GradScaler` finds it: halved whenever gradients overflow, doubled when they did not for long.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradScaler {
    /// The factor; an f32.
    scale: f64,
    growth_factor: f64,
    backoff_factor: f64,
    growth_interval: u32,
    /// Steps in a row, since the factor changed, that were not skipped.
    #[serde(rename = "_growth_tracker")]
    growth_tracker: u32,
}

impl Default for GradScaler {
    /// PyTorch's, with which nnU-Net trains: from 65536, doubled after 2000 steps.
    fn default() -> Self {
        Self { scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000, growth_tracker: 0 }
    }
}

impl GradScaler {
    /// One that begins with the factor `scale` and doubles it after `growth_interval` steps.
    ///
    /// # Errors
    /// [`Error::Usage`] for a factor that is no finite number of at least 1, or an interval of 0.
    pub fn new(scale: f64, growth_interval: u32) -> Result<Self> {
        let new = Self { scale: f64::from(scale as f32), growth_interval, ..Self::default() };
        if !new.is_valid() || new.scale < 1.0 {
            let what = format!("a loss scale of {scale} that grows after {growth_interval} steps: expected at least 1");
            return Err(Error::usage(what));
        }
        Ok(new)
    }

    /// What the loss is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Steps in a row, since the factor changed, that were not skipped.
    #[must_use]
    pub fn growth_tracker(&self) -> u32 {
        self.growth_tracker
    }

    /// The factors and the interval: growth, backoff, steps.
    #[must_use]
    pub fn rule(&self) -> (f64, f64, u32) {
        (self.growth_factor, self.backoff_factor, self.growth_interval)
    }

    /// Whether a training can go on with it: it grows and shrinks, and gradients can be freed of the factor.
    pub(crate) fn is_valid(&self) -> bool {
        let grows = self.growth_factor >= 1.0 && self.growth_factor.is_finite();
        let shrinks = self.backoff_factor > 0.0 && self.backoff_factor < 1.0;
        let scale = self.scale > 0.0 && (self.scale as f32).is_finite();
        grows && shrinks && scale && self.growth_interval > self.growth_tracker
    }

    /// What becomes of the factor, and of a step that found this, of a loss times the factor: no norms when it is skipped.
    ///
    /// # Errors
    /// The step's own, but for [`Error::NotFinite`] of gradients alone as long as the factor can go back.
    pub(crate) fn settle(&mut self, found: Result<StepNorms>, loss: &LossValue) -> Result<Option<StepNorms>> {
        match found {
            Ok(norms) => {
                self.grow();
                Ok(Some(norms))
            }
            Err(Error::NotFinite { what }) => match loss.read()? {
                value if !value.is_finite() => Err(Error::NotFinite { what: format!("the loss is {value}") }),
                _ if self.back_off() => Ok(None),
                _ => {
                    let scale = self.scale;
                    let what = format!("{what}, and the factor {scale} of the loss cannot go back any further");
                    Err(Error::NotFinite { what })
                }
            },
            Err(e) => Err(e),
        }
    }

    /// After a step whose gradients were finite.
    fn grow(&mut self) {
        self.growth_tracker += 1;
        if self.growth_tracker >= self.growth_interval {
            self.growth_tracker = 0;
            let scale = (self.scale * self.growth_factor) as f32;
            if scale.is_finite() {
                self.scale = scale.into();
            }
        }
    }

    /// After a step that was skipped; false when the loss is as it was, so that nothing is left to give: PyTorch would halve
    /// the factor until it is zero, and skip every step until someone looks.
    fn back_off(&mut self) -> bool {
        let scale = f64::from((self.scale * self.backoff_factor) as f32);
        if scale < 1.0 {
            return false;
        }
        (self.scale, self.growth_tracker) = (scale, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_halves_at_once_and_doubles_after_many_steps() {
        let mut s = GradScaler::default();
        (0..1999).for_each(|_| s.grow());
        assert_eq!((s.scale(), s.growth_tracker()), (65536.0, 1999));
        assert!(s.back_off());
        assert_eq!((s.scale(), s.growth_tracker()), (32768.0, 0));
        (0..2000).for_each(|_| s.grow());
        assert_eq!((s.scale(), s.growth_tracker()), (65536.0, 0));
        assert_eq!((0..99).filter(|_| s.back_off()).count(), 16);
        assert_eq!(s.scale(), 1.0);
    }

    #[test]
    fn a_factor_stays_a_finite_f32() {
        let mut s = GradScaler::new(2f64.powi(127), 1).unwrap();
        s.grow();
        assert_eq!((s.scale(), s.growth_tracker()), (2f64.powi(127), 0));
        for (scale, interval) in [(0.0, 1), (f64::NAN, 1), (1e39, 1), (0.5, 1), (2.0, 0)] {
            assert!(GradScaler::new(scale, interval).is_err(), "{scale} {interval}");
        }
    }

    #[test]
    fn the_names_are_those_of_pytorch() {
        let text = serde_json::to_string(&GradScaler::default()).unwrap();
        let torch =
            r#"{"scale":65536.0,"growth_factor":2.0,"backoff_factor":0.5,"growth_interval":2000,"_growth_tracker":0}"#;
        assert_eq!(text, torch);
    }
}
