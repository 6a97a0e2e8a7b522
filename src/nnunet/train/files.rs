//! The files of a training, named as nnU-Net names them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::options::TrainOptions;
use super::plan::TrainingPlan;
use crate::base::json::Json;
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::models::{Network, NetworkConfig};
use crate::nn::Optimizer;
use crate::nnunet::checkpoint::{self, TrainingState};
use crate::nnunet::json::write as write_json;

/// What a training goes on from to the bit.
const OWN: &str = "checkpoint_latest.safetensors";
const OWN_PREVIOUS: &str = "checkpoint_latest.safetensors.previous";
const LATEST: &str = "checkpoint_latest.pth";
const BEST: &str = "checkpoint_best.pth";
const FINAL: &str = "checkpoint_final.pth";
pub(super) const METRICS: &str = "metrics.jsonl";

/// In the order in which they are looked for.
const CHECKPOINTS: [&str; 5] = [OWN, OWN_PREVIOUS, FINAL, LATEST, BEST];

/// How a training begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Start {
    /// In a folder without checkpoints.
    #[default]
    New,
    /// From the beginning; checkpoints and metrics that are there are removed.
    Afresh,
    /// From the last checkpoint: our own, the final one, the latest, the best.
    Continue,
}

/// The folder of a fold.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
    resumed: Option<PathBuf>,
}

impl Files {
    /// Finds what to go on from; changes nothing. Our own checkpoint comes first: it is there only as long as a training
    /// runs, and then later than a final one.
    pub(super) fn find(folder: &Path, start: Start) -> Result<Self> {
        let found = CHECKPOINTS.iter().map(|n| folder.join(n)).find(|p| p.is_file());
        let resumed = match (start, found) {
            (Start::New, Some(path)) => {
                let what = "a training is here already: go on with it by --continue, or replace it by --overwrite";
                return Err(Error::usage(format!("{}: {what}", path.display())));
            }
            (Start::Continue, None) => {
                let what = "no checkpoint to go on from; begin without --continue";
                return Err(Error::usage(format!("{}: {what}", folder.display())));
            }
            (Start::Continue, found) => found.map(|p| if p.ends_with(OWN_PREVIOUS) { folder.join(OWN) } else { p }),
            (Start::New | Start::Afresh, _) => None,
        };
        Ok(Self { folder: folder.into(), resumed })
    }

    /// Makes the folder. A training that begins afresh first removes what another one would be taken for: checkpoints and
    /// metrics.
    pub(super) fn make(&self, start: Start) -> Result<()> {
        fs::create_dir_all(&self.folder).map_err(|e| Error::io("create", &self.folder, e))?;
        match start {
            Start::Afresh => self.remove(&[&CHECKPOINTS[..], &[METRICS]].concat()),
            _ => Ok(()),
        }
    }

    /// Whether the training that is gone on with has come to its end.
    pub(super) fn is_final(&self) -> bool {
        self.resumed.as_ref().is_some_and(|p| p.ends_with(FINAL))
    }

    fn remove(&self, names: &[&str]) -> Result<()> {
        for name in names {
            let path = self.folder.join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", &path, e)),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The checkpoint to go on from.
    pub(super) fn resumed(&self) -> Option<&Path> {
        self.resumed.as_deref()
    }

    /// Writes the model's descriptions beside the fold: `plans.json`, `dataset.json`, and the fingerprint if there is one.
    pub(super) fn describe(&self, plan: &TrainingPlan) -> Result<()> {
        let Some(model) = self.folder.parent() else { return Ok(()) };
        for (name, value) in [("plans.json", &plan.plans), ("dataset.json", &plan.dataset)] {
            write_json(&model.join(name), &Json::from(&Value::Object(value.clone())), false)?;
        }
        let fingerprint = plan.path.with_file_name("dataset_fingerprint.json");
        match fs::read(&fingerprint) {
            Ok(bytes) => {
                let path = model.join("dataset_fingerprint.json");
                write_atomically(&path, |file| file.write_all(&bytes).map_err(|e| Error::io("write", &path, e)))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io("read", &fingerprint, e)),
        }
    }

    /// nnU-Net's `debug.json`: what the training was asked for.
    pub(super) fn debug(&self, options: &TrainOptions, config: &NetworkConfig, state: &TrainingState) -> Result<()> {
        let options = serde_json::to_value(options).unwrap_or_default();
        let value = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "trainer": state.origin.trainer,
            "configuration": state.origin.configuration,
            "fold": state.origin.fold,
            "network": config.name(),
            "parameters": config.parameter_count(),
            "seed": state.seed,
            "schedule": serde_json::to_value(state.schedule).unwrap_or_default(),
            "inference_allowed_mirroring_axes": state.origin.mirror_axes,
            "options": options,
        });
        write_json(&self.folder.join("debug.json"), &Json::from(value), false)
    }

    pub(super) fn write_own(&self, net: &Network, optimizer: &Optimizer, state: &TrainingState) -> Result<()> {
        checkpoint::write(self.folder.join(OWN), net, optimizer, state)
    }

    /// The same for nnU-Net.
    pub(super) fn write_latest(&self, net: &Network, optimizer: &Optimizer, state: &TrainingState) -> Result<()> {
        checkpoint::write_nnunet(self.folder.join(LATEST), net, optimizer, state)
    }

    pub(super) fn write_best(&self, net: &Network, optimizer: &Optimizer, state: &TrainingState) -> Result<()> {
        checkpoint::write_nnunet(self.folder.join(BEST), net, optimizer, state)
    }

    /// The final checkpoint; those that only served to go on are removed, as nnU-Net does.
    pub(super) fn write_final(&self, net: &Network, optimizer: &Optimizer, state: &TrainingState) -> Result<()> {
        checkpoint::write_nnunet(self.folder.join(FINAL), net, optimizer, state)?;
        self.remove(&[OWN, OWN_PREVIOUS, LATEST])
    }
}
