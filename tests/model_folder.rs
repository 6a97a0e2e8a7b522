//! Model folders of nnU-Net v1, v2 and the project's own.

use std::path::{Path, PathBuf};

use stunet::nnunet::model::{Architecture, Folds, ModelFolder, ModelKind, ModelOptions, convert, inspect};
use stunet::nnunet::plans::{Decision, Normalization, Rules};

use crate::common::shared;

fn v1_folder() -> Option<PathBuf> {
    Some(shared("golden/stunet_v1")?.join("Task101_TotalSegmentator/STUNetTrainer_small__nnUNetPlansv2.1"))
}

fn open(path: &Path) -> ModelFolder {
    ModelFolder::open(path, &ModelOptions::new()).unwrap()
}

#[test]
fn golden_model_folder_v2() {
    let Some(root) = shared("golden/pipeline") else { return };
    // (name, channels, heads, patch, mask)
    let expected = [
        ("ct_aniso", 1, 4, Normalization::Ct),
        ("mr_two", 2, 3, Normalization::ZScore),
        ("mr_thick", 1, 3, Normalization::ZScore),
        ("regions", 1, 3, Normalization::ZScore),
        ("ignore", 1, 3, Normalization::Ct),
    ];
    for (name, channels, heads, normalization) in expected {
        let m = open(&root.join(name).join("model/stunet"));
        assert_eq!((m.kind, m.plan.rules), (ModelKind::NnunetV2, Rules::NnunetV2), "{name}");
        assert_eq!((m.plan.channels.len(), m.plan.heads), (channels, heads), "{name}");
        assert!(m.plan.channels.iter().all(|c| c.normalization == normalization), "{name}");
        assert_eq!(m.plan.mirror_axes, [0, 1, 2], "{name}");
        assert_eq!(m.folds.len(), 1);
        println!("{:?}", m.plan);
        // The oracle's own note of dims and strides.
        let note: serde_json::Value =
            serde_json::from_slice(&std::fs::read(root.join(name).join("model/stunet/stunet.json")).unwrap()).unwrap();
        assert_eq!(serde_json::to_value(m.plan.strides).unwrap(), note["strides"], "{name}");
        let Architecture::StuNet { dims, depth, .. } = m.architecture else { panic!("{name}") };
        assert_eq!((serde_json::to_value(dims).unwrap(), depth), (note["dims"].clone(), [1; 6]), "{name}");
        for fold in &m.folds {
            for tensor in fold.weights.names() {
                fold.weights.values(tensor).unwrap();
            }
        }
    }
}

#[test]
fn golden_model_folder_v1() {
    let Some(folder) = v1_folder() else { return };
    let m = open(&folder);
    println!("{:?}", m.plan);
    assert_eq!((m.kind, m.plan.heads, m.plan.patch), (ModelKind::NnunetV1, 9, [64; 3]));
}
