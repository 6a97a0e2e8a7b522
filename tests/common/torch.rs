//! A tiny STU-Net in nnU-Net v2's model folder, written as PyTorch would, or a little wrong.

use std::path::Path;

use serde_json::{Value, json};
use stunet::models::{RandomParams, StuNetConfig};
use stunet::nn::ParamSource;

use super::files;

/// A tensor of a checkpoint.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<i32>,
    /// Elements before the first, in the storage.
    pub offset: i32,
    /// Name of the storage in the archive.
    pub storage: String,
    pub values: Vec<f32>,
}

/// Everything a model folder is written from; change what has to be wrong.
pub struct Model {
    pub plans: Value,
    pub dataset: Value,
    pub tensors: Vec<Tensor>,
    /// Pickle instructions of one value, stored in the checkpoint under "logging".
    pub logging: Vec<u8>,
    /// Pickle instructions of the value of "init_args".
    pub init_args: Vec<u8>,
}

/// Sizes of the tiny network: one input channel, background and two labels.
pub fn tiny(in_channels: usize, classes: usize) -> StuNetConfig {
    let mut config = StuNetConfig::small(in_channels, classes);
    config.dims = [4, 4, 8, 8, 8, 8];
    config
}

impl Model {
    /// A model that works.
    pub fn new() -> Self {
        let schemes = ["CTNormalization"];
        let three = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]];
        let linear = |order: u8| json!({"is_seg": false, "order": order, "order_z": 0, "force_separate_z": null});
        let configuration = json!({
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [32, 32, 32],
            "spacing": [1.5, 1.5, 1.5],
            "normalization_schemes": schemes,
            "use_mask_for_norm": [false],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": linear(3),
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": linear(1),
            "architecture": {"network_class_name": "x", "arch_kwargs": {"n_stages": 6, "strides": three}},
        });
        let statistics = json!({
            "mean": 100.0, "std": 50.0, "percentile_00_5": -80.0, "percentile_99_5": 240.0,
            "min": -100.0, "max": 300.0, "median": 90.0,
        });
        let plans = json!({
            "dataset_name": "Dataset900_Tiny",
            "plans_name": "nnUNetPlans",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {"3d_fullres": configuration},
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {"0": statistics},
        });
        let dataset = json!({
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "liver": 1, "spleen": 2},
            "numTraining": 3,
            "file_ending": ".nii.gz",
        });
        let mut init_args = Vec::new();
        dict(&mut init_args, |p| {
            text(p, "configuration");
            text(p, "3d_fullres");
        });
        Self { plans, dataset, tensors: tensors(&tiny(1, 3)), logging: b"N".to_vec(), init_args }
    }

    /// The configuration in the plans.
    pub fn configuration(&mut self) -> &mut Value {
        &mut self.plans["configurations"]["3d_fullres"]
    }

    /// The tensor `name`.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).expect("a tensor of this name")
    }

    /// Writes `plans.json`, `dataset.json` and `fold_0/checkpoint_final.pth`.
    pub fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder.join("fold_0")).unwrap();
        std::fs::write(folder.join("plans.json"), self.plans.to_string()).unwrap();
        std::fs::write(folder.join("dataset.json"), self.dataset.to_string()).unwrap();
        std::fs::write(folder.join("fold_0/checkpoint_final.pth"), self.checkpoint()).unwrap();
    }

    /// The checkpoint: a zip archive with a pickle and one entry per storage.
    pub fn checkpoint(&self) -> Vec<u8> {
        let pickle = self.pickle();
        let storages: Vec<(String, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|t| (format!("archive/data/{}", t.storage), t.values.iter().flat_map(|v| v.to_le_bytes()).collect()))
            .collect();
        let mut entries = vec![("archive/data.pkl", pickle.as_slice()), ("archive/byteorder", b"little")];
        entries.extend(storages.iter().map(|(n, b)| (n.as_str(), b.as_slice())));
        entries.push(("archive/version", b"3\n"));
        files::zip(&entries)
    }

    /// The pickle of the checkpoint.
    pub fn pickle(&self) -> Vec<u8> {
        let mut p = vec![0x80, 2];
        dict(&mut p, |p| {
            text(p, "network_weights");
            dict(p, |p| {
                for t in &self.tensors {
                    text(p, &t.name);
                    tensor(p, t);
                }
            });
            text(p, "init_args");
            p.extend_from_slice(&self.init_args);
            text(p, "trainer_name");
            text(p, "STUNetTrainer_tiny");
            text(p, "inference_allowed_mirroring_axes");
            tuple(p, &[0, 1, 2]);
            text(p, "logging");
            p.extend_from_slice(&self.logging);
        });
        p.push(b'.');
        p
    }
}

/// Random parameters of a network.
pub fn tensors(config: &StuNetConfig) -> Vec<Tensor> {
    let shapes = config.parameters();
    let source = RandomParams::new(1, shapes.iter().cloned().collect());
    let make = |(i, (name, shape)): (usize, (String, Vec<usize>))| Tensor {
        shape: shape.iter().map(|&s| s as i32).collect(),
        offset: 0,
        storage: i.to_string(),
        values: source.values(&name).unwrap().into_owned(),
        name,
    };
    shapes.into_iter().enumerate().map(make).collect()
}

pub fn text(p: &mut Vec<u8>, s: &str) {
    p.push(b'X');
    p.extend_from_slice(&(s.len() as u32).to_le_bytes());
    p.extend_from_slice(s.as_bytes());
}

pub fn int(p: &mut Vec<u8>, i: i32) {
    p.push(b'J');
    p.extend_from_slice(&i.to_le_bytes());
}

pub fn global(p: &mut Vec<u8>, module: &str, name: &str) {
    p.extend_from_slice(format!("c{module}\n{name}\n").as_bytes());
}

pub fn dict(p: &mut Vec<u8>, items: impl FnOnce(&mut Vec<u8>)) {
    p.extend_from_slice(b"}(");
    items(p);
    p.push(b'u');
}

fn tuple(p: &mut Vec<u8>, items: &[i32]) {
    p.push(b'(');
    items.iter().for_each(|&i| int(p, i));
    p.push(b't');
}

fn tensor(p: &mut Vec<u8>, t: &Tensor) {
    global(p, "torch._utils", "_rebuild_tensor_v2");
    p.extend_from_slice(b"((");
    text(p, "storage");
    global(p, "torch", "FloatStorage");
    text(p, &t.storage);
    text(p, "cpu");
    int(p, t.values.len() as i32);
    p.extend_from_slice(b"tQ");
    int(p, t.offset);
    tuple(p, &t.shape);
    let mut strides = vec![1i32; t.shape.len()];
    for i in (1..t.shape.len()).rev() {
        strides[i - 1] = strides[i].wrapping_mul(t.shape[i]);
    }
    tuple(p, &strides);
    p.push(0x89);
    global(p, "collections", "OrderedDict");
    p.extend_from_slice(b")RtR");
}
