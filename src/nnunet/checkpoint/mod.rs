//! Checkpoints of a training: our own files, and nnU-Net's `checkpoint_*.pth` in both directions.
//!
//! An own file is a safetensors file: parameters as `weights/NAME`, what the optimizer keeps as `momentum_buffer/NAME` and
//! so on, all f32 in PyTorch's order; the rest is JSON in the header's metadata, next to the SHA-256 of the whole file.

mod names;
mod nnunet;
mod state;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use nnunet::write_nnunet;
pub use state::{Logged, Logs, Origin, TrainingState};

use crate::autograd::Param;
use crate::error::{Error, Result};
use crate::io::pth;
use crate::io::sealed::{self, Entry};
use crate::io::weights::{Weights, map_file, printable};
use crate::nn::{self, Module, Optimizer, ParamSource, Rule};

const FORMAT: &str = "stunet-checkpoint";
const VERSION: u32 = 1;

/// All but tensors of an own file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    state: TrainingState,
    rule: Rule,
    max_norm: Option<f64>,
    /// Steps of every parameter that had a gradient.
    steps: BTreeMap<String, u64>,
}

/// Writes a checkpoint: parameters of `net`, what `optimizer` keeps of them, and `state`. The file appears under its name
/// only when it is complete and on the disk; the one before it stays as `NAME.previous`.
///
/// # Errors
/// [`Error::Io`], [`Error::NotFinite`] naming a parameter from which no training can go on, [`Error::Unsupported`] for a
/// network on a card. The checkpoints that are there stay then.
pub fn write(path: impl AsRef<Path>, net: &dyn Module, optimizer: &Optimizer, state: &TrainingState) -> Result<()> {
    let path = path.as_ref();
    let params = parameters(net);
    let with_state = || params.iter().filter(|p| optimizer.steps(p) > 0);
    let manifest = Manifest {
        state: state.clone(),
        rule: optimizer.rule(),
        max_norm: optimizer.max_norm(),
        steps: with_state().map(|p| (p.name().to_string(), optimizer.steps(p))).collect(),
    };
    let text = serde_json::to_string(&manifest).map_err(|e| Error::io("write", path, e.into()))?;
    let entry = |folder: &str, p: &'_ Param| (format!("{folder}/{}", p.name()), p.shape());
    let mut entries = Vec::new();
    for &p in &params {
        let (name, shape) = entry("weights", p);
        entries.push(Entry { name, shape, values: Box::new(|| finite(p, nn::values(p)?)) });
    }
    for (at, buffer) in optimizer.rule().buffers().iter().enumerate() {
        for &p in with_state() {
            let (name, shape) = entry(buffer, p);
            entries.push(Entry { name, shape, values: Box::new(move || kept_values(optimizer, p, at)) });
        }
    }
    let texts = [("format", FORMAT.into()), ("version", VERSION.to_string()), ("training", text)];
    sealed::write(path, &previous(path), &texts, &entries)
}

/// What an optimizer keeps of a parameter.
fn kept_values(optimizer: &Optimizer, p: &Param, buffer: usize) -> Result<Vec<f32>> {
    finite(p, optimizer.buffer(p, buffer).unwrap_or_else(|| Ok(Vec::new()))?)
}

/// A training cannot go on from anything else, and what it could go on from would be replaced.
fn finite(p: &Param, values: Vec<f32>) -> Result<Vec<f32>> {
    if values.iter().all(|v| v.is_finite()) {
        return Ok(values);
    }
    Err(Error::NotFinite { what: format!("{}, or what the optimizer keeps of it", p.name()) })
}

/// The name of the checkpoint before.
fn previous(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".previous");
    name.into()
}

fn parameters(net: &dyn Module) -> Vec<&Param> {
    let mut out = Vec::new();
    net.params(&mut |p| out.push(p));
    out
}

/// An open checkpoint. As a [`ParamSource`] it builds networks.
#[derive(Debug)]
pub struct Checkpoint {
    weights: Weights,
    state: TrainingState,
    rule: Rule,
    max_norm: Option<f64>,
    kept: Kept,
    warning: Option<String>,
}

/// How the optimizer's part is told apart: steps of those parameters that it knows.
#[derive(Debug)]
enum Kept {
    ByName(BTreeMap<String, u64>),
    /// By a parameter's place in PyTorch's order, and the number of parameters.
    ByPlace(BTreeMap<usize, u64>, usize),
}

impl Checkpoint {
    /// Opens a checkpoint of [`write()`], every byte checked, or of nnU-Net. Should it be damaged or missing, the one before
    /// it is opened in its place, which [`Checkpoint::warning`] tells.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Model`] naming file and field when neither can be read, [`Error::Unsupported`] for another
    /// version's.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let error = match Self::open_one(path) {
            Err(e @ (Error::Io { .. } | Error::Model { .. })) => e,
            done => return done,
        };
        let before = previous(path);
        match Self::open_one(&before) {
            Ok(c) => Ok(Self { warning: Some(format!("{error}; {} is used", before.display())), ..c }),
            Err(_) => Err(error),
        }
    }

    fn open_one(path: &Path) -> Result<Self> {
        if pth::is_torch(&map_file(path)?) {
            return nnunet::open(path);
        }
        let (weights, texts) = sealed::open(path)?;
        let field = |name: &str| texts.get(name).ok_or_else(|| Error::model(path, name, "missing"));
        if field("format")? != FORMAT {
            return Err(Error::model(path, "format", format!("expected {FORMAT:?}")));
        }
        let version = field("version")?;
        if *version != VERSION.to_string() {
            let what = format!("version {} of the checkpoint {}", printable(version), path.display());
            return Err(Error::unsupported(format!("{what}; version {VERSION} is")));
        }
        let manifest: Manifest = serde_json::from_str(field("training")?)
            .map_err(|e| Error::model(path, "training", printable(&e.to_string())))?;
        let Manifest { state, rule, max_norm, steps } = manifest;
        if let Some(scaler) = state.scaler.filter(|s| !s.is_valid()) {
            return Err(Error::model(path, "training.state.scaler", format!("{scaler:?}: out of range")));
        }
        Ok(Self { weights, state, rule, max_norm, kept: Kept::ByName(steps), warning: None })
    }

    /// Where the training stands.
    #[must_use]
    pub fn state(&self) -> &TrainingState {
        &self.state
    }

    /// Why the checkpoint before the one asked for was opened, if it was.
    #[must_use]
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// The file that was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.weights.path()
    }

    /// Gives the parameters to `net`, and returns the optimizer as it was.
    ///
    /// # Errors
    /// [`Error::Model`] when parameters or what the optimizer keeps of them are others than those of `net`: nothing is
    /// changed then. [`Error::OutOfMemory`].
    pub fn restore(&self, net: &mut dyn Module) -> Result<Optimizer> {
        let params = parameters(net);
        for p in &params {
            self.check(&self.weight(p.name()), p)?;
        }
        self.check_names(&params)?;
        let mut optimizer = Optimizer::new(self.rule, self.max_norm).map_err(|e| self.damaged("rule", e))?;
        for (place, p) in params.iter().enumerate() {
            let (steps, key) = match &self.kept {
                Kept::ByName(all) => (all.get(p.name()), p.name().to_string()),
                Kept::ByPlace(all, _) => (all.get(&place), place.to_string()),
            };
            let Some(&steps) = steps else { continue };
            let names: Vec<String> = self.rule.buffers().iter().map(|b| format!("{b}/{key}")).collect();
            names.iter().try_for_each(|n| self.check(n, p))?;
            let buffers = names.iter().map(|n| self.weights.values(n)).collect::<Result<Vec<_>>>()?;
            let buffers: Vec<&[f32]> = buffers.iter().map(|b| &b[..]).collect();
            optimizer.set_kept(p, steps, &buffers)?;
        }
        // Read before the first is changed: one that is not finite refuses all.
        let values = params.iter().map(|p| self.weights.values(&self.weight(p.name()))).collect::<Result<Vec<_>>>()?;
        let (mut values, mut done) = (values.into_iter(), Ok(()));
        net.params_mut(&mut |p| {
            if let (Ok(()), Some(values)) = (&done, values.next()) {
                done = nn::set_values(p, &values);
            }
        });
        done.map(|()| optimizer)
    }

    /// Checks that there is no parameter too many.
    fn check_names(&self, params: &[&Param]) -> Result<()> {
        let unknown = |name: &str| Error::model(self.path(), printable(name), "not of a parameter of this network");
        let known = |name: &str| params.iter().any(|p| p.name() == name);
        match &self.kept {
            Kept::ByName(steps) => {
                let names = self.weights.names().iter().filter_map(|n| n.strip_prefix("weights/"));
                if names.clone().count() == params.len() && steps.keys().all(|n| known(n)) {
                    return Ok(());
                }
                let other = names.chain(steps.keys().map(String::as_str)).find(|n| !known(n));
                Err(unknown(other.unwrap_or_default()))
            }
            Kept::ByPlace(_, n) if *n == params.len() => Ok(()),
            Kept::ByPlace(_, n) => {
                let what = format!("{n} parameters, the network has {}", params.len());
                Err(Error::model(self.path(), "optimizer_state.param_groups", what))
            }
        }
    }

    fn check(&self, name: &str, p: &Param) -> Result<()> {
        let expected = p.shape();
        match self.weights.shape(name) {
            Some(shape) if shape == expected => Ok(()),
            Some(shape) => Err(self.error(name, format!("shape {shape:?}, expected {expected:?}"))),
            None => Err(self.error(name, format!("missing, expected a tensor of shape {expected:?}"))),
        }
    }

    fn damaged(&self, field: &str, e: Error) -> Error {
        Error::model(self.path(), field, e.to_string())
    }

    /// What the file calls a parameter.
    fn weight(&self, name: &str) -> String {
        match self.kept {
            Kept::ByName(_) => format!("weights/{name}"),
            Kept::ByPlace(..) => name.to_string(),
        }
    }
}

impl ParamSource for Checkpoint {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.weights.shape(&self.weight(name)).map(<[usize]>::to_vec)
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        self.weights.values(&self.weight(name))
    }

    fn error(&self, name: &str, what: String) -> Error {
        Error::model(self.path(), printable(name), what)
    }
}
