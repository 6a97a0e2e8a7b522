//! The validations of all folds in one folder (nnU-Net `accumulate_cv_results`), and the means of two models' (nnU-Net
//! `ensemble_crossvalidations`).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::{Model, SelectOptions, joined};
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::nnunet::dataset::{DatasetJson, Reader, label_sidecar};
use crate::nnunet::ensemble;
use crate::nnunet::evaluate::folder;
use crate::nnunet::split::{self, Fold};
use crate::nnunet::workers;
use crate::tensor::Device;

/// The folder that a model's fold validated a case in, by the name of the label map.
pub(super) type Cases = BTreeMap<OsString, PathBuf>;

/// What every model predicted: each case once and, unless the cross-validation may be incomplete, all that the splits name.
pub(super) fn validations(
    models: &[Model],
    described: &[DatasetJson],
    truth: &Path,
    preprocessed: &Path,
    options: &SelectOptions,
) -> Result<Vec<Cases>> {
    let mut out = Vec::new();
    for (model, dataset) in models.iter().zip(described) {
        let ending = dataset.file_ending.as_str();
        let cases = validation(model, &options.folds, ending)?;
        if !options.incomplete {
            let known = folder::files(truth, ending)?;
            let ids: Vec<String> = known.iter().map(|name| stem(name, ending)).collect();
            for (id, fold) in expected(preprocessed, &ids, &options.folds)? {
                if !cases.contains_key(&OsString::from(format!("{id}{ending}"))) {
                    let run = model.training(&fold.to_string());
                    let what = format!(
                        "not predicted by folds {}, expected of fold {fold}; predict it with '{run} --val --npz', or go on \
                         without it with --chill",
                        joined(&options.folds, ", ")
                    );
                    return Err(Error::dataset(&model.folder, format!("case {id}"), what));
                }
            }
        }
        out.push(cases);
    }
    Ok(out)
}

/// Where each case of `model` was validated.
fn validation(model: &Model, folds: &[Fold], ending: &str) -> Result<Cases> {
    let mut cases = Cases::new();
    let mut of_fold: BTreeMap<OsString, Fold> = BTreeMap::new();
    for fold in folds {
        let path = model.folder.join(format!("fold_{fold}")).join("validation");
        if !path.is_dir() {
            let run = model.training(&fold.to_string());
            let what = format!(
                "no such folder: fold {fold} was not trained, or not validated; train it with '{run} --npz', or leave the \
                 configuration or the fold out with -c or -f"
            );
            return Err(Error::dataset(&path, "folder", what));
        }
        for name in folder::files(&path, ending)? {
            if let Some(before) = of_fold.insert(name.clone(), *fold) {
                let what = format!(
                    "predicted by folds {before} and {fold}, expected by one: were they trained with different splits?"
                );
                return Err(Error::dataset(&model.folder, format!("case {}", stem(&name, ending)), what));
            }
            cases.insert(name, path.clone());
        }
    }
    if cases.is_empty() {
        return Err(folder::nothing(&model.folder.join(format!("fold_{}", folds[0])).join("validation"), ending));
    }
    Ok(cases)
}

/// The cases of the data set that `folds` validate, each with its fold. Nothing where no splits are kept: a data set that was
/// preprocessed elsewhere may have been split by any.
fn expected(preprocessed: &Path, ids: &[String], folds: &[Fold]) -> Result<Vec<(String, Fold)>> {
    let path = preprocessed.join(split::FILE);
    if !folds.contains(&Fold::All) && !path.is_file() {
        tracing::warn!("{}: missing; whether all cases were validated is not known", path.display());
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for fold in folds {
        out.extend(split::fold(preprocessed, ids, *fold)?.val.into_iter().map(|id| (id, *fold)));
    }
    Ok(out)
}

/// Checks that both models predicted the same cases, and kept the probabilities of all.
pub(super) fn check_pair(models: [&Model; 2], cases: [&Cases; 2], dataset: &DatasetJson) -> Result<()> {
    let ending = dataset.file_ending.as_str();
    for (model, [own, other]) in models.iter().zip([[cases[0], cases[1]], [cases[1], cases[0]]]) {
        if let Some(name) = other.keys().find(|name| !own.contains_key(*name)) {
            let what = "not predicted, expected as another model predicted it; leave out means with --no-ensembling";
            return Err(Error::dataset(&model.folder, format!("case {}", stem(name, ending)), what));
        }
        for (name, validation) in own {
            let archive = archive(validation, name, ending);
            if !archive.is_file() {
                let fold = validation.parent().map(super::name_of).unwrap_or_default();
                let run = model.training(fold.trim_start_matches("fold_"));
                let what = format!(
                    "missing: the mean of two models is that of their probabilities; write them with '{run} --val --npz', or \
                     leave out means with --no-ensembling"
                );
                return Err(Error::dataset(&archive, "file", what));
            }
        }
    }
    Ok(())
}

/// How the label maps of a model are read and written.
pub(super) fn reader(dataset: &DatasetJson, cases: &Cases) -> Result<Reader> {
    Reader::of(dataset, cases.iter().next().map(|(name, folder)| folder.join(name)).as_deref())
}

/// Copies all label maps of a model, and its descriptions, to `output`.
pub(super) fn accumulate(
    model: &Model,
    cases: &Cases,
    reader: Reader,
    output: &Path,
    overwrite: bool,
    progress: &mut dyn Progress,
) -> Result<()> {
    begin(model, output, overwrite)?;
    for (done, (name, folder)) in cases.iter().enumerate() {
        tell(progress, Event::Cases { done, total: cases.len() })?;
        let (from, to) = (folder.join(name), output.join(name));
        if !overwrite && to.is_file() {
            continue;
        }
        // Where the spacing of a stack stands.
        if reader == Reader::Tiff3dIo && label_sidecar(&from).is_file() {
            copy(&label_sidecar(&from), &label_sidecar(&to))?;
        }
        copy(&from, &to)?;
    }
    tell(progress, Event::Cases { done: cases.len(), total: cases.len() })
}

/// Writes the label maps of two models' mean probabilities, and the descriptions of the first, to `output`. As many cases are
/// worked on at once as `device` has threads, each with a few channels in memory.
pub(super) fn average(
    [(first, cases), (_, others)]: [(&Model, &Cases); 2],
    (dataset, reader): (&DatasetJson, Reader),
    output: &Path,
    overwrite: bool,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<()> {
    begin(first, output, overwrite)?;
    let ending = dataset.file_ending.as_str();
    let cases: Vec<(&OsString, &PathBuf)> = cases.iter().collect();
    workers::map(device, cases.len(), progress, |i| {
        let (name, folder) = cases[i];
        if !overwrite && output.join(name).is_file() {
            return Ok(());
        }
        let archives = [Some(folder), others.get(name)].into_iter().flatten().map(|f| archive(f, name, ending));
        ensemble::case(&archives.collect::<Vec<_>>(), output, dataset, reader, false).map(drop)
    })?;
    Ok(())
}

/// Makes `output`, anew if it is to be overwritten, with the model's descriptions.
fn begin(model: &Model, output: &Path, overwrite: bool) -> Result<()> {
    if overwrite {
        remove(output)?;
    }
    fs::create_dir_all(output).map_err(|e| Error::io("create", output, e))?;
    ["dataset.json", "plans.json"].iter().try_for_each(|name| copy(&model.folder.join(name), &output.join(name)))
}

/// Removes a folder with all that is in it, if it is there.
pub(super) fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", folder, e)),
        _ => Ok(()),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(|e| Error::io("read", from, e))?;
    write_atomically(to, |file| io::copy(&mut source, file).map(drop).map_err(|e| Error::io("write", to, e)))
}

/// The probabilities of a case beside its label map.
fn archive(folder: &Path, name: &OsString, ending: &str) -> PathBuf {
    folder.join(format!("{}.npz", stem(name, ending)))
}

/// A case's name from that of its label map.
fn stem(name: &OsString, ending: &str) -> String {
    let name = name.to_string_lossy();
    name.strip_suffix(ending).unwrap_or(&name).to_owned()
}
