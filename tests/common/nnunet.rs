//! Model folders of nnU-Net with a tiny STU-Net, as nnU-Net would write them, or a little wrong.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use stunet::models::StuNetConfig;
use stunet::nn::ParamSource;
use stunet::nn::RandomParams;

use super::pickle::{Py, call, dict, ints, pickle, s};
use super::torch::{Tensor, state_dict, storages, torch_zip};

/// Channels of each stage of the tiny network.
pub const TINY: [usize; 6] = [2, 2, 3, 3, 4, 4];

/// Random parameters of the tiny network.
pub fn tensors(channels: usize, classes: usize) -> Vec<Tensor> {
    let mut config = StuNetConfig::small(channels, classes);
    config.dims = TINY;
    let shapes = config.parameters();
    let source = RandomParams::new(1, shapes.iter().cloned().collect());
    let values = |name: &str| source.values(name).unwrap().into_owned();
    shapes.iter().enumerate().map(|(i, (name, shape))| Tensor::new(name, shape, i, values(name))).collect()
}

/// Everything an nnU-Net v2 model folder is written from; change what has to be wrong.
pub struct Model {
    pub plans: Value,
    pub dataset: Value,
    pub tensors: Vec<Tensor>,
    pub init_args: Py,
    /// Something that nnU-Net reads back only to train on.
    pub logging: Py,
}

impl Model {
    /// A model that works, of `channels` z-scored channels.
    pub fn new(channels: usize, classes: usize) -> Self {
        let device = call("torch", "device", vec![s("cuda"), Py::Int(0)]);
        Self {
            plans: v2_plans(channels),
            dataset: v2_dataset(channels, classes),
            tensors: tensors(channels, classes),
            init_args: dict([("configuration", s("3d_fullres")), ("fold", Py::Int(0)), ("device", device)]),
            logging: Py::None,
        }
    }

    /// A model that works, of one CT channel and two organs.
    pub fn ct() -> Self {
        let mut model = Self::new(1, 3);
        model.configuration()["normalization_schemes"] = json!(["CTNormalization"]);
        model.plans["foreground_intensity_properties_per_channel"] = json!({"0": {
            "mean": 100.0, "std": 50.0, "percentile_00_5": -80.0, "percentile_99_5": 240.0,
            "min": -100.0, "max": 300.0, "median": 90.0,
        }});
        model.dataset["channel_names"] = json!({"0": "CT"});
        model.dataset["labels"] = json!({"background": 0, "liver": 1, "spleen": 2});
        model
    }

    /// The configuration in the plans.
    pub fn configuration(&mut self) -> &mut Value {
        &mut self.plans["configurations"]["3d_fullres"]
    }

    /// The tensor `name`.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).expect("a tensor of this name")
    }

    /// The object in the checkpoint.
    pub fn object(&self) -> Py {
        dict([
            ("network_weights", state_dict(&self.tensors, "_orig_mod.module.")),
            ("trainer_name", s("STUNetTrainer_tiny")),
            ("init_args", self.init_args.clone()),
            ("inference_allowed_mirroring_axes", ints(&[0, 1, 2])),
            ("logging", self.logging.clone()),
        ])
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> Vec<u8> {
        torch_zip(&self.object(), &storages(&self.tensors))
    }

    /// Writes `plans.json`, `dataset.json` and `FOLD/checkpoint_final.pth`.
    pub fn write(&self, folder: &Path, folds: &[&str]) {
        let checkpoint = self.checkpoint();
        for fold in folds {
            std::fs::create_dir_all(folder.join(fold)).unwrap();
            std::fs::write(folder.join(fold).join("checkpoint_final.pth"), &checkpoint).unwrap();
        }
        std::fs::write(folder.join("plans.json"), self.plans.to_string()).unwrap();
        std::fs::write(folder.join("dataset.json"), self.dataset.to_string()).unwrap();
    }
}

/// `plans.json` of a 3D model with `channels` z-scored channels.
pub fn v2_plans(channels: usize) -> Value {
    let kwargs = |order: u8| json!({"is_seg": false, "order": order, "order_z": 0, "force_separate_z": null});
    json!({
        "dataset_name": "Dataset001_Tiny", "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": {
            "preprocessor_name": "DefaultPreprocessor", "patch_size": [32, 32, 32], "spacing": [1.5, 1.5, 1.5],
            "normalization_schemes": vec!["ZScoreNormalization"; channels], "use_mask_for_norm": vec![false; channels],
            "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": kwargs(3),
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": kwargs(1),
            "architecture": {"arch_kwargs": {"strides":
                [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]]}},
        }},
        "foreground_intensity_properties_per_channel": {},
    })
}

/// `dataset.json` with `classes - 1` foreground labels.
pub fn v2_dataset(channels: usize, classes: usize) -> Value {
    let names: Map<_, _> = (0..channels).map(|c| (c.to_string(), "MR".into())).collect();
    let mut labels = Map::from_iter([("background".to_string(), 0.into())]);
    labels.extend((1..classes).map(|l| (format!("organ_{l}"), l.into())));
    json!({"channel_names": names, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"})
}

/// Writes an nnU-Net v2 model folder with the given fold folders and returns its path.
pub fn v2_folder(root: &Path, folds: &[&str], channels: usize, classes: usize) -> PathBuf {
    let folder = root.join("STUNetTrainer_tiny__nnUNetPlans__3d_fullres");
    Model::new(channels, classes).write(&folder, folds);
    folder
}

/// The object of `NAME.model.pkl` of nnU-Net v1 for one z-scored channel.
pub fn v1_info(classes: usize, stage: Py) -> Py {
    let zeroth = |v: Py| Py::Dict(vec![(Py::Int(0), v)]);
    let pools = Py::List((0..5).map(|p| ints(&[if p < 4 { 2 } else { 1 }, if p < 4 { 2 } else { 1 }, 2])).collect());
    let plans = dict([
        ("num_stages", Py::Int(1)),
        ("num_modalities", Py::Int(1)),
        ("modalities", zeroth(s("MR"))),
        ("normalization_schemes", zeroth(s("nonCT"))),
        ("use_mask_for_norm", zeroth(Py::Bool(false))),
        ("num_classes", Py::Int(classes as i64 - 1)),
        ("transpose_forward", ints(&[0, 1, 2])),
        ("transpose_backward", ints(&[0, 1, 2])),
        (
            "plans_per_stage",
            zeroth(dict([
                ("patch_size", ints(&[32, 32, 32])),
                ("current_spacing", Py::Tuple(vec![Py::Float(1.5); 3])),
                ("pool_op_kernel_sizes", pools),
            ])),
        ),
    ]);
    let init = Py::Tuple(vec![s(""), Py::Int(0), s(""), s(""), Py::Bool(false), stage, Py::Bool(true)]);
    dict([("init", init), ("name", s("STUNetTrainer_tiny")), ("plans", plans)])
}

/// Writes an nnU-Net v1 trainer folder and returns its path.
pub fn v1_folder(root: &Path, fold: &str, name: &str, classes: usize) -> PathBuf {
    let folder = root.join("Task001_Tiny").join("STUNetTrainer_tiny__nnUNetPlansv2.1");
    std::fs::create_dir_all(folder.join(fold)).unwrap();
    let tensors = tensors(1, classes);
    let state = state_dict(&tensors, "module.");
    let object = dict([("epoch", Py::Int(1)), ("state_dict", state), ("optimizer_state_dict", Py::None)]);
    let bytes = torch_zip(&object, &storages(&tensors));
    std::fs::write(folder.join(fold).join(format!("{name}.model")), bytes).unwrap();
    let info = pickle(&v1_info(classes, Py::Int(0)));
    std::fs::write(folder.join(fold).join(format!("{name}.model.pkl")), info).unwrap();
    folder
}
