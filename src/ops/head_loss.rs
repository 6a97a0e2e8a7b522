//! The loss of a network's head. On the processor that is [`super::conv3d()`] and [`super::loss()`]; on a card both are one, and
//! neither scores nor their gradient are ever in memory.

use super::loss::{LabelMap, Loss, Outputs, loss};
use super::{Conv3d, activation, conv3d, on_card};
use crate::autograd::{Ctx, Param, Var};
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::tensor::Tensor;
use crate::tensor::{Device, Precision};

/// The truth that scores are compared with, where the pass runs.
#[derive(Debug, Clone)]
pub struct Target {
    /// On the host, unless a card made them.
    map: Option<LabelMap>,
    dims: [usize; 4],
    /// On a card.
    #[cfg(feature = "cuda")]
    pub(super) card: Option<super::cuda::CardTarget>,
}

impl Target {
    /// `map` on `device`, for scores of these outputs.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`] on a card.
    pub fn new(map: LabelMap, outputs: &Outputs, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let card = if device.is_cpu() { None } else { Some(super::cuda::CardTarget::new(&map, outputs, device)?) };
        let _ = (outputs, device);
        Ok(Self {
            dims: map.dims(),
            map: Some(map),
            #[cfg(feature = "cuda")]
            card,
        })
    }

    /// Of u16 `[N, D, H, W]` that are on a card, two to a float of `labels`.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_card(labels: Tensor, dims: [usize; 4], outputs: &Outputs) -> Result<Self> {
        Ok(Self { map: None, dims, card: Some(super::cuda::CardTarget::of(labels, outputs)?) })
    }

    /// N, D, H, W.
    #[must_use]
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The labels, as they were given.
    ///
    /// # Errors
    /// [`Error::Shape`] for labels that a card made.
    pub fn map(&self) -> Result<&LabelMap> {
        self.map.as_ref().ok_or_else(|| Error::shape("head_loss", "labels that are on a card only"))
    }
}

/// What a loss comes to: a number, or some that a card still works on, each with its weight.
#[derive(Debug, Clone)]
pub struct LossValue(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Known(f64),
    #[cfg(feature = "cuda")]
    OnCard(Vec<(Tensor, f64)>),
}

impl LossValue {
    /// A number that is known.
    #[must_use]
    pub const fn known(value: f64) -> Self {
        Self(Kind::Known(value))
    }

    #[cfg(feature = "cuda")]
    pub(super) fn on_card(value: Tensor) -> Self {
        Self(Kind::OnCard(vec![(value, 1.0)]))
    }

    /// The sum of all, each times its weight.
    #[must_use]
    pub fn sum(terms: Vec<(LossValue, f64)>) -> Self {
        let mut known = 0.0;
        #[cfg(feature = "cuda")]
        let mut all = Vec::new();
        for (value, weight) in terms {
            match value.0 {
                Kind::Known(v) => known += weight * v,
                #[cfg(feature = "cuda")]
                Kind::OnCard(parts) => all.extend(parts.into_iter().map(|(t, w)| (t, w * weight))),
            }
        }
        #[cfg(feature = "cuda")]
        if !all.is_empty() {
            return Self(Kind::OnCard(all));
        }
        Self::known(known)
    }

    /// The number; waits for a card.
    ///
    /// # Errors
    /// [`Error::Device`] on a card.
    pub fn read(&self) -> Result<f64> {
        match &self.0 {
            Kind::Known(v) => Ok(*v),
            #[cfg(feature = "cuda")]
            Kind::OnCard(parts) => {
                let mut sum = 0.0;
                for (t, weight) in parts {
                    let mut value = [0.0];
                    super::cuda::download(t, 0, &mut value)?;
                    sum += weight * f64::from(value[0]);
                }
                Ok(sum)
            }
        }
    }

    /// The number, if it is known without waiting.
    #[must_use]
    pub fn get(&self) -> Option<f64> {
        match &self.0 {
            Kind::Known(v) => Some(*v),
            #[cfg(feature = "cuda")]
            Kind::OnCard(_) => None,
        }
    }

    /// What an optimizer on a card looks at before it moves anything: the first of the numbers.
    #[cfg(feature = "cuda")]
    pub(crate) fn guard(&self) -> Option<&Tensor> {
        match &self.0 {
            Kind::Known(_) => None,
            Kind::OnCard(parts) => parts.first().map(|(t, _)| t),
        }
    }
}

/// [`super::loss()`] of the scores that the 1x1x1 layer of filter `w` `[C, features, 1, 1, 1]` and bias `b` `[C]` makes of
/// `features` `[N, features, D, H, W]`, which on the processor are not rounded. On a card `target` is brought to the size of
/// the features (PyTorch's `nearest-exact`), the scalar's own value is not known before the card is done, and a label that is
/// neither a channel nor ignored makes the loss NaN.
///
/// # Errors
/// As [`super::conv3d()`] and [`super::loss()`]; [`Error::Unsupported`] on a card for [`Loss::top`].
pub fn head_loss<'m>(
    cx: &mut Ctx<'m>,
    features: Var,
    w: &'m Param,
    b: Option<&'m Param>,
    target: &Target,
    how: &Loss,
) -> Result<(Var, LossValue)> {
    const OP: &str = "head_loss";
    let [n, ..] = activation(OP, features.value().dims())?;
    if target.dims[0] != n {
        let what = format!("labels of {:?} for features of {:?}", target.dims, features.value().dims());
        return Err(Error::shape(OP, what));
    }
    on_card!(cx.device(), super::cuda::head_loss(cx, features, w, b, target, how));
    let before = cx.set_precision(Precision::F32);
    let scores = conv3d(cx, features, w, b, Conv3d { stride: [1; 3], padding: [0; 3] });
    cx.set_precision(before);
    let (scalar, value) = loss(cx, scores?, target.map()?, how)?;
    Ok((scalar, LossValue::known(value)))
}
