//! What a step takes, known before the first: the step itself, rehearsed on a device that computes nothing.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::input::Room;
use super::step::Pass;
use crate::error::{Error, Result};
use crate::models::NetworkConfig;
use crate::nn::{Optimizer, ParamSource};
use crate::nnunet::augment::AugmentConfig;
use crate::nnunet::loader::Batch;
use crate::tensor::Device;

/// Whether a step keeps only the inputs of stages and runs each once more on the way back: about a third more work, for a
/// fraction of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Recompute {
    /// Where a step does not fit the device's memory otherwise; a training that is gone on with, as it did before.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// In no case.
    Never,
}

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) recompute: bool,
    /// Bytes that a step takes, and those that there are, where that was looked at.
    pub(super) looked: Option<[usize; 2]>,
}

impl Decision {
    /// For people.
    pub(super) fn line(&self) -> String {
        let how = if self.recompute { "stages run again on the way back" } else { "no stage runs twice" };
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        let looked = |[needs, room]: [usize; 2]| format!(": a step takes {} MiB of {}", mib(needs), mib(room));
        format!("memory: {how}{}", self.looked.map_or_else(String::new, looked))
    }
}

/// Decides, with `bytes` of a step with recomputation and without, and `before`: what a training that is gone on with did.
///
/// # Errors
/// [`Error::OutOfMemory`] when nothing that may be chosen fits; those of `bytes`.
pub(super) fn decide(
    wanted: Recompute,
    before: Option<bool>,
    room: Option<usize>,
    bytes: impl Fn(bool) -> Result<usize>,
) -> Result<Decision> {
    let fixed = match wanted {
        Recompute::Always => return Ok(Decision { recompute: true, looked: None }),
        Recompute::Never => return Ok(Decision { recompute: false, looked: None }),
        Recompute::Auto => before,
    };
    let Some(room) = room else { return Ok(Decision { recompute: fixed.unwrap_or(false), looked: None }) };
    let mut least = usize::MAX;
    for recompute in [false, true].into_iter().filter(|r| fixed.is_none_or(|f| f == *r)) {
        let needs = match bytes(recompute) {
            // What not even the rehearsal can have does not fit.
            Err(Error::OutOfMemory { asked, .. }) => asked.max(room.saturating_add(1)),
            needs => needs?,
        };
        if needs <= room {
            return Ok(Decision { recompute, looked: Some([needs, room]) });
        }
        least = least.min(needs);
    }
    let what = match fixed {
        Some(false) => "a step of this training, which went without recomputation (go on with --recompute=always),",
        _ => "a step of this training, also with recomputation,",
    };
    Err(Error::OutOfMemory { what: what.into(), asked: least, in_use: 0, limit: room })
}

/// Parameters whose values do not matter.
struct Blank(Vec<(String, Vec<usize>)>);

impl ParamSource for Blank {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, shape)| shape.clone())
    }

    /// Of a filter none: on such a device nobody reads them.
    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        Ok(match self.shape(name).as_deref() {
            Some([len]) => vec![0.0; *len].into(),
            _ => Vec::new().into(),
        })
    }

    fn error(&self, name: &str, what: String) -> Error {
        Error::shape("rehearsal", format!("{name}: {what}"))
    }
}

/// Bytes of tensors that are alive at once, those of the network and its optimizer among them, in steps with patches of these
/// sizes on `device`. Memory that lies idle between them is no part of it: it is given up where there is no more.
///
/// # Errors
/// Those of a step.
pub(super) fn step_bytes(
    config: &NetworkConfig,
    pass: &Pass,
    patch: [usize; 3],
    batch: usize,
    augment: Option<&AugmentConfig>,
    recompute: bool,
    device: &Device,
) -> Result<usize> {
    let stage = device.rehearsal();
    let mut room = Room::default();
    room.reserve(augment, config.in_channels(), &stage)?;
    let source = Blank(config.parameters());
    let mut net = stage.install(|| config.build(&source, &stage))?.recomputing(recompute);
    let mut optimizer = Optimizer::nnunet();
    let voxels = patch.iter().fold(batch, |n, d| n.saturating_mul(*d));
    let channels = config.in_channels();
    let values = voxels.saturating_mul(channels);
    // Asked for once more: a vector of zeros takes no memory before it is read, and ends the process where it can't have it.
    if Vec::<f32>::new().try_reserve_exact(values).is_err() || Vec::<u16>::new().try_reserve_exact(voxels).is_err() {
        let asked = values.saturating_mul(4);
        return Err(Error::OutOfMemory { what: "a batch".into(), asked, in_use: 0, limit: usize::MAX });
    }
    let image = vec![0.0; values];
    let batch = Batch::new(image, vec![0; voxels], channels, patch, (0..batch).collect())?;
    let input = room.place(batch, &stage)?;
    let mut scaler = pass.scaler(&stage);
    // The second finds what the first has left: momenta, and filters in other forms.
    for _ in 0..2 {
        match pass.train(&mut net, &mut optimizer, &input, 0.0, scaler.as_mut(), &stage, &mut || {}) {
            // Nothing was computed, and a card's optimizer finds nothing finite in it.
            Ok(_) | Err(Error::NotFinite { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(stage.memory().peak)
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::models::StuNetConfig;
    use crate::tensor::Precision;
    use crate::tensor::cuda::Rehearsal;

    /// What the largest networks take of cards as they are sold, at the patch and batch of STU-Net's pre-training.
    #[test]
    fn cuda_train_large_networks_on_cards_of_several_sizes() {
        let card = |gib: usize| {
            let driver = Rehearsal::new([9, 0], 132, format!("{gib} GiB"), gib << 30);
            Device::on(Arc::new(driver), "card".into())
        };
        let pass = Pass::supervised(5, Precision::Bf16);
        for (config, cards) in [
            (StuNetConfig::large(1, 105), [(141, Some(false)), (24, Some(false)), (12, Some(true)), (8, None)]),
            (StuNetConfig::huge(1, 105), [(141, Some(false)), (80, Some(false)), (32, Some(true)), (24, None)]),
        ] {
            let config = NetworkConfig::from(config);
            // Parameters, gradients and momenta, and filters in 16 bits in the two orders that they are read in.
            let least = 16 * usize::try_from(config.parameter_count()).unwrap();
            for (gib, expected) in cards {
                let device = card(gib);
                let bytes = |on| step_bytes(&config, &pass, [128; 3], 2, None, on, &device);
                let found = decide(Recompute::Auto, None, device.room().unwrap(), bytes);
                match (found, expected) {
                    (Ok(Decision { recompute, looked: Some([needs, room]) }), Some(expected)) => {
                        assert!(recompute == expected && needs <= room, "{gib} GiB: {needs} bytes, {recompute}");
                        assert!(needs > least, "{needs} bytes for parameters of {least}");
                    }
                    (Err(Error::OutOfMemory { asked, limit, .. }), None) => assert!(asked > limit),
                    (found, expected) => panic!("{gib} GiB: {found:?}, expected {expected:?}"),
                }
                // What was asked for, or done before, is not chosen.
                let before = |on| decide(Recompute::Auto, Some(on), Some(usize::MAX), bytes).unwrap().recompute;
                assert!(before(true) && !before(false));
                assert!(decide(Recompute::Always, Some(false), Some(0), bytes).unwrap().recompute);
            }
        }
    }
}
