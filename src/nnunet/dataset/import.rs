//! Data sets of other forms become raw data sets (nnU-Net `convert_MSD_dataset`,
//! `convert_raw_dataset_from_old_nnunet_format`).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::base::json::Json;
use crate::base::progress::Progress;
use crate::error::{Error, Result};
use crate::io::{Image, read_nifti, write_image};
use crate::nnunet::json::{self, Field};
use crate::nnunet::lookup;
use crate::nnunet::workers;
use crate::tensor::Device;

const ENDING: &str = ".nii.gz";

/// Makes a raw data set below `raw` of a task of the Medical Segmentation Decathlon: `Task05_Prostate` becomes
/// `Dataset005_Prostate`, or has the number `id`. Images of several channels become a file for each. Returns its folder,
/// which is there whole or not at all.
///
/// # Errors
/// [`Error::Usage`] when the folder's name is no task's or the number is taken; [`Error::Dataset`] naming what is missing;
/// errors of images; [`Error::Cancelled`].
pub fn convert_msd(
    source: &Path,
    raw: &Path,
    id: Option<u32>,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let task = super::folder_name(source)?;
    let parts = task.strip_prefix("Task").and_then(|t| t.split_once('_'));
    let parts = parts.and_then(|(number, name)| Some((number.parse::<u32>().ok()?, name)));
    let Some((number, name)) = parts.filter(|(_, name)| !name.is_empty()) else {
        let what = format!("{}: expected a folder like Task05_Prostate", source.display());
        return Err(Error::usage(what));
    };
    let number = id.unwrap_or(number);
    if let Ok(taken) = lookup::dataset_folder(raw, &number.to_string()) {
        return Err(Error::usage(format!("number {number} is taken by {}; choose another one", taken.display())));
    }
    let folders = ["imagesTr", "imagesTs", "labelsTr"];
    let description = describe(source, &folders, &["modality", "training", "test"])?;
    whole(&raw.join(format!("Dataset{number:03}_{name}")), &description, |target| {
        let mut files = Vec::new();
        for folder in folders {
            let images = list(&source.join(folder))?.into_iter().filter(|p| is_image(p));
            files.extend(images.map(|path| (path, target.join(folder), folder != "labelsTr")));
        }
        workers::map(device, files.len(), progress, |i| {
            let (path, folder, is_image) = &files[i];
            if *is_image { split(path, folder) } else { copy(path, &folder.join(path.file_name().unwrap_or_default())) }
        })?;
        Ok(())
    })
}

/// Makes the raw data set `name` (`DatasetNNN_Name`) below `raw` of a raw task of nnU-Net 1. Returns its folder, which is
/// there whole or not at all.
///
/// # Errors
/// As [`convert_msd`].
pub fn convert_v1(
    source: &Path,
    raw: &Path,
    name: &str,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    if lookup::number(name).is_none() || name.contains(['/', '\\']) {
        return Err(Error::usage(format!("{name:?}: expected a name like Dataset004_Hippocampus")));
    }
    let needed = ["imagesTr", "labelsTr"];
    let description = describe(source, &needed, &["tensorImageSize", "numTest", "training", "test", "modality"])?;
    let others = ["imagesTs", "labelsTs", "imagesVal", "labelsVal"].into_iter();
    let folders: Vec<&str> = needed.into_iter().chain(others).filter(|f| source.join(f).is_dir()).collect();
    whole(&raw.join(name), &description, |target| {
        let mut files = Vec::new();
        for folder in folders {
            create(&target.join(folder))?;
            files.extend(list(&source.join(folder))?.into_iter().map(|path| (path, target.join(folder))));
        }
        workers::map(device, files.len(), progress, |i| {
            let (path, folder) = &files[i];
            copy(path, &folder.join(path.file_name().unwrap_or_default()))
        })?;
        Ok(())
    })
}

/// nnU-Net's dataset.json of an older one, without the keys that it dropped.
fn describe(source: &Path, folders: &[&str], dropped: &[&str]) -> Result<Json> {
    for folder in folders.iter().map(|f| source.join(f)) {
        if !folder.is_dir() {
            return Err(Error::dataset(&folder, "folder", "missing, expected it in the data set's folder"));
        }
    }
    let path = source.join("dataset.json");
    let value = json::read_dataset(&path)?;
    let root = Field::of_dataset(&path, &value);
    let channels = root.need("modality")?;
    channels.entries()?;
    let mut labels = Map::new();
    for (number, name) in root.need("labels")?.entries()? {
        let number: u16 = number.parse().map_err(|_| name.error("the key is no label value"))?;
        labels.insert(name.str()?.to_owned(), number.into());
    }
    let mut out = Map::new();
    for (key, value) in value.as_object().into_iter().flatten().filter(|(key, _)| !dropped.contains(&key.as_str())) {
        let value = if key == "labels" { Value::Object(labels.clone()) } else { value.clone() };
        out.insert(key.clone(), value);
    }
    out.insert("file_ending".into(), ENDING.into());
    out.insert("channel_names".into(), channels.value.clone());
    Ok(Value::Object(out).into())
}

/// Makes `target` under another name, which it loses when it is complete.
fn whole(target: &Path, description: &Json, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    if target.exists() {
        return Err(Error::usage(format!("{}: is there already; remove it or choose another name", target.display())));
    }
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let partial = target.with_file_name(format!(".{name}.part"));
    if partial.exists() {
        // Left by a killed process.
        std::fs::remove_dir_all(&partial).map_err(|e| Error::io("remove", &partial, e))?;
    }
    create(&partial)?;
    let done = fill(&partial)
        .and_then(|()| json::write(&partial.join("dataset.json"), description, false))
        .and_then(|()| std::fs::rename(&partial, target).map_err(|e| Error::io("create", target, e)));
    if done.is_err() {
        // The first error tells more than one about what is left.
        let _ = std::fs::remove_dir_all(&partial);
    }
    done.map(|()| target.to_owned())
}

fn is_image(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Files of macOS begin with "._".
    name.ends_with(ENDING) && !name.starts_with(['.', '_'])
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io("list", folder, e);
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_file() {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

fn create(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        create(folder)?;
    }
    std::fs::copy(from, to).map(drop).map_err(|e| Error::io("write", to, e))
}

/// A file for each channel of an image.
fn split(path: &Path, folder: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let of_channel = |i: usize| folder.join(format!("{}_{i:04}{ENDING}", name.trim_end_matches(ENDING)));
    let image = read_nifti(&[path])?;
    if image.channels.len() == 1 {
        return copy(path, &of_channel(0));
    }
    create(folder)?;
    for (i, channel) in image.channels.into_iter().enumerate() {
        write_image(of_channel(i), &Image::new(vec![channel], image.geometry.clone())?)?;
    }
    Ok(())
}
