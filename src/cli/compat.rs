//! nnU-Net's spellings of options (`-step_size`, `--disable_tta`, `-pl` ...), rewritten before clap sees them.
//!
//! `-i -o -d -c -f -p -m` are the same in both and not listed.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};

use stunet::{Error, Result};

enum Rule {
    /// The same option of ours.
    Is(&'static str),
    /// Changes no result here; may carry a value.
    Ignored { value: bool, why: &'static str },
    /// Known, and not possible.
    Refused(&'static str),
}

use Rule::{Ignored, Is, Refused};

const NO_WORKERS: Rule = Ignored { value: true, why: "there are no worker processes; use --threads" };
const OVERWRITES: Rule = Ignored { value: false, why: "results are overwritten unless --continue is given" };

/// nnU-Net v2 (`nnUNetv2_predict`, `nnUNetv2_predict_from_modelfolder`), then v1 (`nnUNet_predict`).
const TABLE: &[(&str, Rule)] = &[
    ("-tr", Is("--trainer")),
    ("-chk", Is("--checkpoint")),
    ("-step_size", Is("--step-size")),
    ("--disable_tta", Is("--no-tta")),
    ("--save_probabilities", Is("--save-probabilities")),
    ("--continue_prediction", Is("--continue")),
    ("--c", Is("--continue")),
    ("-num_parts", Is("--num-parts")),
    ("-part_id", Is("--part-id")),
    ("-device", Is("--device")),
    ("--disable_progress_bar", Is("--no-progress")),
    ("-npp", NO_WORKERS),
    ("-nps", NO_WORKERS),
    ("--verbose", Ignored { value: false, why: "there is nothing more to say; see --report" }),
    ("--not_on_device", Ignored { value: false, why: "results are gathered in main memory anyway" }),
    ("-prev_stage_predictions", Is("--previous-stage")),
    ("--input_folder", Is("--input")),
    ("--output_folder", Is("--output")),
    ("--trainer_class_name", Is("--trainer")),
    ("--plans_identifier", Is("--plans")),
    ("--num_parts", Is("--num-parts")),
    ("--part_id", Is("--part-id")),
    ("--step_size", Is("--step-size")),
    ("--save_npz", Is("--save-probabilities")),
    ("-z", Is("--save-probabilities")),
    ("--num_threads_preprocessing", NO_WORKERS),
    ("--num_threads_nifti_save", NO_WORKERS),
    ("--disable_mixed_precision", Ignored { value: false, why: "all arithmetic is float32 anyway" }),
    ("--all_in_gpu", Ignored { value: true, why: "results are gathered in main memory anyway" }),
    ("--overwrite_existing", OVERWRITES),
    ("-t", Refused("name the model's folder with -m MODEL (nnU-Net v1 keeps no table of tasks that could be read)")),
    ("--task_name", Refused("name the model's folder with -m MODEL")),
    ("-ctr", Is("--trainer")),
    ("--cascade_trainer_class_name", Is("--trainer")),
    ("-l", Is("--previous-stage")),
    ("--lowres_segmentations", Is("--previous-stage")),
    ("--interp_order", Refused("the order of interpolation follows the model's plans")),
    ("--interp_order_z", Refused("the order of interpolation follows the model's plans")),
    ("--force_separate_z", Refused("the resampling follows the model's plans")),
];

/// `nnUNetv2_train`.
const OF_TRAINING: &[(&str, Rule)] = &[
    ("-tr", Is("--trainer")),
    ("-pretrained_weights", Is("--pretrained")),
    ("--c", Is("--continue")),
    ("--val_best", Is("--val-best")),
    ("-device", Is("--device")),
    ("-num_gpus", Ignored { value: true, why: "one device trains one fold" }),
    ("--disable_checkpointing", Refused("checkpoints are written; see --save-every")),
];

/// What `convert` and `inspect` share with `predict`.
const OF_MODELS: &[(&str, Rule)] = &[("-chk", Is("--checkpoint"))];

/// nnU-Net's `nnUNetv2_extract_fingerprint`, `nnUNetv2_plan_experiment`, `nnUNetv2_preprocess` and
/// `nnUNetv2_plan_and_preprocess`.
const OF_DATASETS: &[(&str, Rule)] = &[
    ("-pl", Is("--planner")),
    ("-gpu_memory_target", Is("--gpu-memory-target")),
    ("-overwrite_target_spacing", Is("--overwrite-target-spacing")),
    ("-overwrite_plans_name", Is("--overwrite-plans-name")),
    ("-plans_name", Is("--plans")),
    ("--no_pp", Is("--no-preprocessing")),
    ("--verify_dataset_integrity", Is("--verify")),
    ("--no_pbar", Is("--no-progress")),
    ("-np", NO_WORKERS),
    ("-npfp", NO_WORKERS),
    ("--verbose", Ignored { value: false, why: "there is nothing more to say" }),
    ("-fpe", Refused("there is one kind of fingerprint")),
    ("-preprocessor_name", Refused("there is one kind of preprocessing")),
];

/// `nnUNetv2_evaluate_folder` and `nnUNetv2_evaluate_simple`.
const OF_EVALUATION: &[(&str, Rule)] = &[
    ("-djfile", Is("--dataset-json")),
    ("-pfile", Ignored { value: true, why: "the labels stand in the description of the data set" }),
    ("-il", Is("--ignore")),
    ("-np", NO_WORKERS),
];

/// `nnUNetv2_determine_postprocessing` and `nnUNetv2_apply_postprocessing`.
const OF_POSTPROCESSING: &[(&str, Rule)] = &[
    ("-ref", Is("--reference")),
    ("-pp_pkl_file", Is("--steps")),
    ("-dataset_json", Is("--dataset-json")),
    ("-plans_json", Ignored { value: true, why: "the labels stand in the description of the data set" }),
    ("--remove_postprocessed", Is("--remove-postprocessed")),
    ("-np", NO_WORKERS),
];

/// `nnUNetv2_ensemble`.
const OF_ENSEMBLES: &[(&str, Rule)] = &[("--save_npz", Is("--save-probabilities")), ("-np", NO_WORKERS)];

/// `nnUNetv2_export_model_to_zip`.
const OF_EXPORTS: &[(&str, Rule)] = &[
    ("-tr", Is("--trainer")),
    ("-chk", Is("--checkpoint")),
    ("--exp_cv_preds", Is("--validations")),
    (
        "--not_strict",
        Ignored { value: false, why: "configurations that were not trained are left out unless named with -c" },
    ),
];

/// `nnUNetv2_find_best_configuration`.
const OF_SELECTION: &[(&str, Rule)] = &[
    ("-tr", Is("--trainers")),
    ("--disable_ensembling", Is("--no-ensembling")),
    ("--no_overwrite", Is("--no-overwrite")),
    ("-np", NO_WORKERS),
];

/// The arguments in our spelling, and warnings about those that were dropped.
///
/// # Errors
/// [`Error::Usage`] for an option of nnU-Net that is known and not possible.
pub(super) fn rewrite(argv: impl IntoIterator<Item = OsString>) -> Result<(Vec<OsString>, Vec<String>)> {
    let mut rest: VecDeque<OsString> = argv.into_iter().collect();
    let (mut out, mut warnings) = (Vec::with_capacity(rest.len()), Vec::new());
    out.extend(rest.drain(..rest.len().min(2)));
    let table = match out.get(1).and_then(|command| command.to_str()) {
        Some("predict") => TABLE,
        Some("train") => OF_TRAINING,
        Some("evaluate") => OF_EVALUATION,
        Some("ensemble") => OF_ENSEMBLES,
        Some("postprocess") => OF_POSTPROCESSING,
        Some("export") => OF_EXPORTS,
        Some("select") => OF_SELECTION,
        Some("convert" | "inspect") => OF_MODELS,
        Some("verify" | "fingerprint" | "plan" | "preprocess" | "plan-and-preprocess") => OF_DATASETS,
        _ => {
            out.extend(rest);
            return Ok((out, warnings));
        }
    };
    while let Some(arg) = rest.pop_front() {
        if arg == "--" {
            out.push(arg);
            out.extend(rest);
            break;
        }
        let (name, value) = split(&arg);
        match table.iter().find(|(spelling, _)| Some(*spelling) == name) {
            None => out.push(arg),
            Some((_, Is(ours))) => {
                let mut ours = OsString::from(ours);
                if let Some(value) = value {
                    ours.push("=");
                    ours.push(value);
                }
                out.push(ours);
            }
            Some((theirs, Ignored { value: takes, why })) => {
                if *takes && value.is_none() {
                    rest.pop_front();
                }
                warnings.push(format!("{theirs} is ignored: {why}"));
            }
            Some((theirs, Refused(why))) => return Err(Error::Usage { what: format!("{theirs}: {why}") }),
        }
    }
    Ok((out, warnings))
}

/// `-name=value` to its parts.
fn split(arg: &OsStr) -> (Option<&str>, Option<&str>) {
    match arg.to_str() {
        Some(s) if s.starts_with('-') => match s.split_once('=') {
            Some((name, value)) => (Some(name), Some(value)),
            None => (Some(s), None),
        },
        _ => (None, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(line: &str) -> Result<(String, usize)> {
        let (argv, warnings) = rewrite(line.split(' ').map(OsString::from))?;
        Ok((argv.join(OsStr::new(" ")).into_string().unwrap(), warnings.len()))
    }

    #[test]
    fn nnunet_spellings_become_ours() {
        let line = "stunet predict -i in -o out -d 4 -c 3d_fullres -f 0 1 -tr T -p P -chk best.pth -step_size=0.3 \
                    --disable_tta -num_parts 2 -part_id 1 -npp 3 -nps=2 --save_probabilities -device cpu";
        let ours = "stunet predict -i in -o out -d 4 -c 3d_fullres -f 0 1 --trainer T -p P --checkpoint best.pth \
                    --step-size=0.3 --no-tta --num-parts 2 --part-id 1 --save-probabilities --device cpu";
        assert_eq!(rewritten(line).unwrap(), (ours.into(), 2));
    }

    #[test]
    fn other_commands_and_values_are_left_alone() {
        for line in ["stunet convert -tr x", "stunet predict -- -tr", "stunet", "stunet predict -i tr"] {
            assert_eq!(rewritten(line).unwrap(), (line.into(), 0));
        }
        let train = "stunet train 4 3d_fullres 0 -tr nnUNetTrainer_5epochs -pretrained_weights a.pth --c -num_gpus 1";
        let ours = "stunet train 4 3d_fullres 0 --trainer nnUNetTrainer_5epochs --pretrained a.pth --continue";
        assert_eq!(rewritten(train).unwrap(), (ours.into(), 1));
        let (ours, _) = rewritten("stunet inspect model -f 0 -chk best").unwrap();
        assert_eq!(ours, "stunet inspect model -f 0 --checkpoint best");
        let (ours, _) =
            rewritten("stunet plan -d 4 -pl P -gpu_memory_target 4 -overwrite_target_spacing 1 1 1").unwrap();
        assert_eq!(ours, "stunet plan -d 4 --planner P --gpu-memory-target 4 --overwrite-target-spacing 1 1 1");
        let (ours, warnings) =
            rewritten("stunet evaluate gt pred -djfile d.json -pfile p.json -np 8 -o s.json --chill").unwrap();
        assert_eq!((ours.as_str(), warnings), ("stunet evaluate gt pred --dataset-json d.json -o s.json --chill", 2));
        let (ours, _) = rewritten("stunet evaluate gt pred -l 1 2 -il 3").unwrap();
        assert_eq!(ours, "stunet evaluate gt pred -l 1 2 --ignore 3");
        let (ours, warnings) =
            rewritten("stunet postprocess apply -i a -o b -pp_pkl_file p.pkl -plans_json p -np 4").unwrap();
        assert_eq!((ours.as_str(), warnings), ("stunet postprocess apply -i a -o b --steps p.pkl", 2));
        let (ours, warnings) =
            rewritten("stunet select 4 -tr T -c 2d 3d_fullres -np 4 --disable_ensembling --no_overwrite").unwrap();
        let expected = "stunet select 4 --trainers T -c 2d 3d_fullres --no-ensembling --no-overwrite";
        assert_eq!((ours.as_str(), warnings), (expected, 1));
        assert_eq!(rewritten("stunet predict -t 4").unwrap_err().exit_code(), 2);
    }
}
