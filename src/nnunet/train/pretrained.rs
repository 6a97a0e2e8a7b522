//! Where a fine-tuned network begins: another one's weights, but for its heads.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::weights::Weights;
use crate::models::NetworkConfig;
use crate::nn::{ParamSource, RandomParams};
use crate::nnunet::model::{ModelFolder, ModelOptions};

/// The first filters of a STU-Net, which are repeated for networks with more input channels (STU-Net
/// `run_finetuning.load_pretrained_weights`).
const FIRST: [&str; 2] = ["conv_blocks_context.0.0.conv1.weight", "conv_blocks_context.0.0.conv3.weight"];

/// The weights of another network where it has them, random ones for the heads.
pub(super) struct Pretrained {
    weights: Weights,
    initial: RandomParams,
}

/// Parameters of the heads: one channel per class of the data set that they were trained with.
fn is_head(name: &str) -> bool {
    name.starts_with("seg_outputs.") || name.contains(".seg_layers.")
}

impl Pretrained {
    /// Opens a checkpoint of nnU-Net 1 or 2 or of ours, or a model folder's first fold, and checks that every parameter of
    /// `config` but the heads' is there with its shape. The only difference that is bridged is that of a STU-Net of one input
    /// channel to one of several: its first filters are repeated, not scaled.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Model`] naming the first parameter that is missing or has another shape.
    pub(super) fn open(path: &Path, config: &NetworkConfig, initial: RandomParams) -> Result<Self> {
        let out = Self { weights: open(path)?, initial };
        for (name, shape) in config.parameters() {
            if is_head(&name) {
                continue;
            }
            match out.weights.shape(&out.stored(&name)) {
                Some(found) if found == shape || repeats(&name, found, &shape).is_some() => {}
                Some(found) => {
                    let what = format!("shape {found:?}, expected {shape:?} of the network to be trained");
                    return Err(out.error(&name, what));
                }
                None => {
                    let what = format!("missing, expected a pre-trained {} of the same sizes", config.name());
                    return Err(out.error(&name, what));
                }
            }
        }
        Ok(out)
    }

    /// What the file calls the parameter.
    fn stored(&self, name: &str) -> String {
        let own = format!("weights/{name}");
        if self.weights.shape(&own).is_some() { own } else { name.to_string() }
    }
}

/// The file with weights: that of a model folder's first fold, or `path` itself.
fn open(path: &Path) -> Result<Weights> {
    if !path.is_dir() {
        return Weights::open(path);
    }
    let mut folds = ModelFolder::open(path, &ModelOptions::new())?.folds;
    if folds.is_empty() {
        return Err(Error::model(path, "folder", "no fold, expected a trained model"));
    }
    Ok(folds.swap_remove(0).weights)
}

/// How often the input channel of a first filter of shape `found` is repeated to be one of `shape`.
fn repeats(name: &str, found: &[usize], shape: &[usize]) -> Option<usize> {
    match (found, shape) {
        ([o, 1, kernel @ ..], [p, n, same @ ..]) if FIRST.contains(&name) && o == p && kernel == same => Some(*n),
        _ => None,
    }
}

impl ParamSource for Pretrained {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.initial.shape(name)
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        if is_head(name) {
            return self.initial.values(name);
        }
        let stored = self.stored(name);
        let values = self.weights.values(&stored)?;
        let (found, shape) = (self.weights.shape(&stored).unwrap_or_default(), self.shape(name).unwrap_or_default());
        let Some(n) = repeats(name, found, &shape).filter(|n| *n > 1) else { return Ok(values) };
        let kernel: usize = shape.iter().skip(2).product();
        Ok(values.chunks_exact(kernel.max(1)).flat_map(|k| std::iter::repeat_n(k, n).flatten().copied()).collect())
    }

    fn error(&self, name: &str, what: String) -> Error {
        Error::model(self.path(), name, what)
    }
}

impl Pretrained {
    fn path(&self) -> &Path {
        self.weights.path()
    }

    /// The file that the weights are from.
    pub(super) fn file(&self) -> PathBuf {
        self.path().into()
    }
}
