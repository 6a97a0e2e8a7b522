//! Reference data of training: tiny networks and losses, computed in float64 and stored as float32 beside how far a
//! float32 run of PyTorch is from them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::shared;

/// How many networks there are.
pub const NETWORKS: usize = 5;

/// A stored array, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Array<T> {
    pub shape: Vec<usize>,
    pub values: Vec<T>,
}

impl Array<f32> {
    pub fn to_f64(&self) -> Vec<f64> {
        self.values.iter().map(|v| f64::from(*v)).collect()
    }
}

/// Parameters, gradients or anything else that the network's parameter names name.
pub type Named = BTreeMap<String, Array<f32>>;

/// Which family of networks; U-Nets by their encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Kind {
    #[serde(rename = "stunet", alias = "stunet_deep")]
    StuNet,
    #[serde(rename = "plain")]
    Plain,
    #[serde(rename = "resenc")]
    ResidualEncoder,
}

/// One optimiser step.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Step {
    /// Learning rate of this epoch.
    pub lr: f64,
    pub epoch: usize,
    /// Loss before the step.
    pub loss: f64,
    /// Euclidean norm of all gradients before they are clipped.
    pub grad_norm: f64,
}

/// Channels of each resolution, and blocks in each stage of a STU-Net.
#[derive(Debug, Clone, Deserialize)]
pub struct Arch {
    pub features: Vec<usize>,
    pub depth: usize,
}

/// What a network of the reference data is and how it was trained.
#[derive(Debug, Clone, Deserialize)]
pub struct Settings {
    pub kind: Kind,
    pub arch: Arch,
    pub input_channels: usize,
    pub classes: usize,
    /// From each resolution to the next, axes (z, y, x).
    pub strides: Vec<[usize; 3]>,
    /// Of the patch, axes (z, y, x).
    pub shape: [usize; 3],
    pub batch: usize,
    /// Weight of each output's loss, the full resolution first; an output of weight 0 is left out of the loss.
    pub ds_weights: Vec<f64>,
    pub batch_dice: bool,
    /// Whether the background counts in the Dice.
    pub do_bg: bool,
    pub dice_smooth: f64,
    pub weight_decay: f64,
    pub momentum: f64,
    pub nesterov: bool,
    /// Largest norm of all gradients.
    pub clip: f64,
}

/// How far PyTorch's own float32 run is from the float64 truth, each as the norm of the difference / the norm.
#[derive(Debug, Clone)]
pub struct TorchError {
    /// Its steps, to compare with [`GoldenTrain::steps`].
    pub steps: Vec<Step>,
    /// Of each output of the first step.
    pub outputs: Vec<f64>,
    /// Of each gradient of the first step; meaningless for the biases before an instance norm, whose truth is zero.
    pub gradients: BTreeMap<String, f64>,
    /// Of each parameter's change by all steps, `after - before`; PyTorch's own was measured before the truth was
    /// rounded to float32.
    pub updates: BTreeMap<String, f64>,
    /// The largest difference of a gradient tensor / the largest norm of a gradient tensor: the measure for gradients
    /// that are zero.
    pub gradient_to_largest: f64,
}

/// One network of the reference data: inputs and targets of each step, and what comes out in float64.
#[derive(Debug, Clone)]
pub struct GoldenTrain {
    /// `net_0_stunet`, for messages.
    pub name: String,
    pub settings: Settings,
    /// Parameters before the first step by their name in the state dict, without the aliases that nnU-Net's decoders
    /// and blocks give the same tensors.
    pub before: Named,
    /// Parameters after the last step.
    pub after: Named,
    /// One per step, `[N, C, D, H, W]`.
    pub inputs: Vec<Array<f32>>,
    /// Labels `[N, 1, D, H, W]` for every step and output, the full resolution first.
    pub targets: Vec<Vec<Array<u8>>>,
    /// Logits of the first step, the full resolution first.
    pub outputs: Vec<Array<f32>>,
    /// Gradients of the first step; a parameter that the loss does not reach has none, and no step changes it.
    pub gradients: Named,
    pub steps: Vec<Step>,
    pub torch: TorchError,
}

/// What a file of settings holds besides them.
#[derive(Deserialize)]
struct Record {
    #[serde(flatten)]
    settings: Settings,
    steps: Vec<Step>,
    torch_f32: TorchRecord,
}

#[derive(Deserialize)]
struct TorchRecord {
    steps: Vec<Step>,
    error: BTreeMap<String, f64>,
}

/// All arrays of a file.
struct Arrays {
    floats: Named,
    labels: BTreeMap<String, Array<u8>>,
}

impl Arrays {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut out = Self { floats: BTreeMap::new(), labels: BTreeMap::new() };
        for (name, t) in file.iter() {
            let shape = t.shape().to_vec();
            match t.dtype() {
                safetensors::Dtype::U8 => {
                    out.labels.insert(name.into(), Array { shape, values: t.data().to_vec() });
                }
                safetensors::Dtype::F32 => {
                    let values = t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
                    out.floats.insert(name.into(), Array { shape, values });
                }
                other => panic!("{}: {name} is {other:?}", path.display()),
            }
        }
        out
    }

    /// Every array `FOLDER/NAME` by its NAME.
    fn folder(&self, folder: &str) -> Named {
        let inside = |(name, a): (&String, &Array<f32>)| {
            let name = name.strip_prefix(folder)?.strip_prefix('/')?;
            let alias = name.contains(".all_modules.") || name.starts_with("decoder.encoder.");
            (!alias).then(|| (name.to_string(), a.clone()))
        };
        self.floats.iter().filter_map(inside).collect()
    }
}

fn json<T: DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The file `net_K_*.json`.
fn settings_file(dir: &Path, k: usize) -> PathBuf {
    let start = format!("net_{k}_");
    let mut files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let is_it = |p: &PathBuf| {
        p.extension().is_some_and(|e| e == "json") && p.file_name().unwrap().to_string_lossy().starts_with(&start)
    };
    files.find(is_it).unwrap_or_else(|| panic!("{}: no {start}*.json", dir.display()))
}

impl GoldenTrain {
    /// Network `k` of [`NETWORKS`], or `None`, said aloud, where the reference data are absent.
    pub fn read(k: usize) -> Option<Self> {
        let path = settings_file(&shared("golden/train")?, k);
        let Record { settings, steps, torch_f32 } = json(&path);
        let arrays = Arrays::read(&path.with_extension("safetensors"));

        let input = &arrays.floats["input"];
        assert_eq!(input.shape[0], steps.len(), "{}: inputs", path.display());
        let one: usize = input.shape[1..].iter().product();
        let step = |x: &[f32]| Array { shape: input.shape[1..].to_vec(), values: x.to_vec() };
        let outputs: Vec<_> = (0..).map_while(|i| arrays.floats.get(&format!("output/{i}")).cloned()).collect();
        let targets =
            |s| (0..outputs.len()).map(|i| arrays.labels[&format!("target/{s}/{i}")].clone()).collect::<Vec<_>>();

        let error = |folder: &str, names: &Named| {
            names.keys().map(|n| (n.clone(), torch_f32.error[&format!("{folder}/{n}")])).collect::<BTreeMap<_, _>>()
        };
        let (gradients, after) = (arrays.folder("grad"), arrays.folder("after"));
        let torch = TorchError {
            outputs: (0..outputs.len()).map(|i| torch_f32.error[&format!("output/{i}")]).collect(),
            gradients: error("grad", &gradients),
            updates: error("after", &after),
            gradient_to_largest: torch_f32.error["grad_absolute"],
            steps: torch_f32.steps,
        };
        Some(Self {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            before: arrays.folder("before"),
            inputs: input.values.chunks_exact(one).map(step).collect(),
            targets: (0..steps.len()).map(targets).collect(),
            settings,
            after,
            outputs,
            gradients,
            steps,
            torch,
        })
    }
}

/// One loss of the reference data.
#[derive(Debug, Clone)]
pub struct GoldenLoss {
    /// Sigmoid outputs of overlapping regions, Dice + binary cross-entropy; otherwise softmax, Dice + cross-entropy.
    pub regions: bool,
    /// The label that takes no part; not with regions.
    pub ignore_label: Option<u8>,
    /// Whether the target's last channel marks voxels that take no part; only with regions.
    pub ignore_channel: bool,
    pub batch_dice: bool,
    /// `[N, C, D, H, W]`.
    pub logits: Array<f32>,
    /// Labels `[N, 1, D, H, W]`; with regions 0 or 1 for every region and the channel that marks ignored voxels.
    pub target: Array<u8>,
    pub loss: f64,
    /// Of the loss by the logits.
    pub gradient: Array<f32>,
}

#[derive(Deserialize)]
struct LossRecord {
    regions: bool,
    ignore_label: Option<u8>,
    ignore_channel: bool,
    batch_dice: bool,
    loss: f64,
}

impl GoldenLoss {
    /// All losses, or `None`, said aloud, where the reference data are absent.
    pub fn read_all() -> Option<Vec<Self>> {
        let dir = shared("golden/train")?;
        let arrays = Arrays::read(&dir.join("losses.safetensors"));
        let one = |(k, r): (usize, LossRecord)| Self {
            regions: r.regions,
            ignore_label: r.ignore_label,
            ignore_channel: r.ignore_channel,
            batch_dice: r.batch_dice,
            logits: arrays.floats[&format!("{k}/logits")].clone(),
            target: arrays.labels[&format!("{k}/target")].clone(),
            loss: r.loss,
            gradient: arrays.floats[&format!("{k}/grad")].clone(),
        };
        Some(json::<Vec<LossRecord>>(&dir.join("losses.json")).into_iter().enumerate().map(one).collect())
    }
}
