//! What to run on new images: nnU-Net's `inference_instructions.txt`, with stunet's commands first.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use super::{Model, Selected, joined};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;

/// Folders whose names are the reader's to choose.
const INPUT: &str = "INPUT_FOLDER";
const OUTPUT: &str = "OUTPUT_FOLDER";

/// One prediction.
struct Prediction<'a> {
    model: &'a Model,
    configuration: &'a str,
    output: String,
    /// What the stage before predicted.
    previous: Option<String>,
}

pub(super) fn write(selected: &Selected, path: &Path) -> Result<()> {
    let text = text(selected);
    write_atomically(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io("write", path, e)))
}

pub(super) fn text(selected: &Selected) -> String {
    let best = selected.best();
    let predictions = predictions(&best.models);
    let (before, after) = (best.dice(), selected.postprocessing.after.foreground_dice());
    let mut out = format!("Best of the cross-validation: {}\n", best.name);
    // Writing to a String cannot fail.
    let _ = writeln!(out, "mean Dice {before:.5}, after post-processing {after:.5}");
    if selected.postprocessing.steps.is_empty() {
        out.push_str("No post-processing improves it: the commands below that apply it copy label maps as they are.\n");
    }
    for (heading, commands) in [
        ("Segment new images with stunet", ours(selected, &predictions)),
        ("The same with nnU-Net", theirs(selected, &predictions)),
    ] {
        let _ = write!(out, "\n{heading}:\n\n{}\n", commands.join("\n"));
    }
    out
}

/// The predictions in the order in which they are run. The first stage of a cascade comes before the second; where it is one of
/// the models itself, it is run once.
fn predictions(models: &[Model]) -> Vec<Prediction<'_>> {
    let output = |i: usize| if models.len() == 1 { OUTPUT.to_owned() } else { format!("{OUTPUT}_MODEL_{}", i + 1) };
    let mut out: Vec<Prediction<'_>> = Vec::new();
    for (i, model) in models.iter().enumerate() {
        let previous = model.previous.as_deref().map(|first| {
            let same = |p: &&Prediction<'_>| {
                p.configuration == first && p.model.trainer == model.trainer && p.model.plans == model.plans
            };
            if let Some(run) = out.iter().find(same) {
                return run.output.clone();
            }
            let stages = out.iter().filter(|p| p.output.starts_with("OUTPUT_FOLDER_PREV_STAGE")).count();
            let number = if stages == 0 { String::new() } else { format!("_{}", stages + 1) };
            let output = format!("{OUTPUT}_PREV_STAGE{number}");
            out.push(Prediction { model, configuration: first, output: output.clone(), previous: None });
            output
        });
        out.push(Prediction { model, configuration: &model.configuration, output: output(i), previous });
    }
    out
}

/// The folders that are averaged; none of a single model.
fn members<'a>(predictions: &'a [Prediction<'_>]) -> Vec<&'a str> {
    let outputs = predictions.iter().map(|p| p.output.as_str());
    outputs.filter(|o| o.starts_with("OUTPUT_FOLDER_MODEL_")).collect()
}

/// How a program spells a prediction: its command, then the options of the trainer, the stage before, the probabilities.
type Spelling = [&'static str; 4];
const OURS: Spelling = ["stunet predict", "--trainer", "--previous-stage", "--save-probabilities"];
const THEIRS: Spelling = ["nnUNetv2_predict", "-tr", "-prev_stage_predictions", "--save_probabilities"];

fn predict(selected: &Selected, predictions: &[Prediction<'_>], spelling: Spelling) -> Vec<String> {
    let [command, of_trainer, of_previous, probabilities] = spelling;
    let (folds, dataset, members) = (joined(&selected.folds, " "), quoted(&selected.dataset), members(predictions));
    let line = |p: &Prediction<'_>| {
        let [configuration, trainer, plans] = [p.configuration, &p.model.trainer, &p.model.plans].map(quoted);
        let output = p.output.as_str();
        let mut line = format!(
            "{command} -d {dataset} -i {INPUT} -o {output} -f {folds} -c {configuration} {of_trainer} {trainer} -p {plans}"
        );
        if let Some(previous) = &p.previous {
            line += &format!(" {of_previous} {previous}");
        }
        if members.contains(&output) {
            line += &format!(" {probabilities}");
        }
        line
    };
    predictions.iter().map(line).collect()
}

/// Files beside the best candidate's label maps, as words of a shell.
fn beside<const N: usize>(selected: &Selected, names: [&str; N]) -> [String; N] {
    names.map(|name| quoted(&selected.best().folder.join(name).to_string_lossy()))
}

fn ours(selected: &Selected, predictions: &[Prediction<'_>]) -> Vec<String> {
    let mut out = predict(selected, predictions, OURS);
    let members = members(predictions);
    let [steps, dataset] = beside(selected, ["postprocessing.pkl", "dataset.json"]);
    if !members.is_empty() {
        out.push(format!("stunet ensemble -i {} -o {OUTPUT} --dataset-json {dataset}", members.join(" ")));
    }
    out.push(format!("stunet postprocess apply -i {OUTPUT} -o {OUTPUT}_PP --steps {steps} --dataset-json {dataset}"));
    out
}

fn theirs(selected: &Selected, predictions: &[Prediction<'_>]) -> Vec<String> {
    let mut out = predict(selected, predictions, THEIRS);
    let members = members(predictions);
    let [steps, plans, dataset] = beside(selected, ["postprocessing.pkl", "plans.json", "dataset.json"]);
    if !members.is_empty() {
        out.push(format!("nnUNetv2_ensemble -i {} -o {OUTPUT}", members.join(" ")));
    }
    out.push(format!(
        "nnUNetv2_apply_postprocessing -i {OUTPUT} -o {OUTPUT}_PP -pp_pkl_file {steps} -plans_json {plans} -dataset_json \
         {dataset}"
    ));
    out
}

/// As a shell takes it for one word.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./+=:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(configuration: &str, previous: Option<&str>) -> Model {
        Model {
            trainer: "T".into(),
            plans: "P".into(),
            configuration: configuration.into(),
            previous: previous.map(str::to_owned),
            folder: configuration.into(),
        }
    }

    fn order(models: &[Model]) -> Vec<String> {
        let show = |p: &Prediction<'_>| {
            format!("{} -> {} after {}", p.configuration, p.output, p.previous.as_deref().unwrap_or("-"))
        };
        predictions(models).iter().map(show).collect()
    }

    #[test]
    fn the_first_stage_of_a_cascade_runs_before_the_second_and_once() {
        let (full, low) = (model("3d_fullres", None), model("3d_lowres", None));
        let cascade = model("3d_cascade_fullres", Some("3d_lowres"));
        assert_eq!(order(std::slice::from_ref(&full)), ["3d_fullres -> OUTPUT_FOLDER after -"]);
        assert_eq!(
            order(std::slice::from_ref(&cascade)),
            [
                "3d_lowres -> OUTPUT_FOLDER_PREV_STAGE after -",
                "3d_cascade_fullres -> OUTPUT_FOLDER after OUTPUT_FOLDER_PREV_STAGE"
            ]
        );
        assert_eq!(
            order(&[low, cascade.clone()]),
            [
                "3d_lowres -> OUTPUT_FOLDER_MODEL_1 after -",
                "3d_cascade_fullres -> OUTPUT_FOLDER_MODEL_2 after OUTPUT_FOLDER_MODEL_1"
            ]
        );
        // Of another trainer the first stage is another.
        let other = Model { trainer: "U".into(), ..cascade.clone() };
        assert_eq!(
            order(&[cascade, other]),
            [
                "3d_lowres -> OUTPUT_FOLDER_PREV_STAGE after -",
                "3d_cascade_fullres -> OUTPUT_FOLDER_MODEL_1 after OUTPUT_FOLDER_PREV_STAGE",
                "3d_lowres -> OUTPUT_FOLDER_PREV_STAGE_2 after -",
                "3d_cascade_fullres -> OUTPUT_FOLDER_MODEL_2 after OUTPUT_FOLDER_PREV_STAGE_2"
            ]
        );
        assert_eq!(order(&[full.clone(), full])[1], "3d_fullres -> OUTPUT_FOLDER_MODEL_2 after -");
    }

    #[test]
    fn words_of_a_shell() {
        assert_eq!(quoted("/data/Dataset004_x/a-b.json"), "/data/Dataset004_x/a-b.json");
        assert_eq!(quoted("it's here"), r"'it'\''s here'");
        assert_eq!(quoted(""), "''");
    }
}
