//! The mean of several models' probabilities, and the segmentation it makes (nnU-Net `ensemble_folders`).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::base::json::Json;
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::npy::{Archive, Stream};
use crate::io::{Geometry, LabelData, Segmentation, write_npz};
use crate::nnunet::dataset::{DatasetJson, Reader, label_sidecar};
use crate::nnunet::evaluate::folder;
use crate::nnunet::json;
use crate::nnunet::plans::Decision;
use crate::nnunet::preprocess::resample::zeros;
use crate::nnunet::store;

/// Averages the `probabilities` of the files `CASE.npz` of the same name in all `inputs` in float32 and writes the
/// segmentations to `output`, with `probabilities` the averages as `CASE.npz` and `CASE.pkl`, too. Where a case lies is what
/// its label map beside the first file says, or else its `.pkl`. The files written, by case.
///
/// Archives are read side by side, a channel at a time: memory does not follow the number of classes or folders.
///
/// # Errors
/// [`Error::Usage`] for no folder; [`Error::Dataset`] naming the file that one of the folders lacks; [`Error::Model`] naming
/// the archive that is damaged or does not fit the others or the data set; [`Error::Unsupported`] for label maps of an ending that
/// there is no reader for; [`Error::Cancelled`]; [`Error::Io`].
pub fn ensemble(
    inputs: &[PathBuf],
    output: &Path,
    dataset: &DatasetJson,
    probabilities: bool,
    progress: &mut dyn Progress,
) -> Result<Vec<PathBuf>> {
    let names = names(inputs)?;
    let reader = reader(dataset, &inputs[0].join(&names[0]))?;
    std::fs::create_dir_all(output).map_err(|e| Error::io("create", output, e))?;
    // What later steps look for beside predictions.
    json::write(&output.join("dataset.json"), &Json::from(&dataset.value), false)?;
    let mut written = Vec::new();
    for (done, name) in names.iter().enumerate() {
        tell(progress, Event::Cases { done, total: names.len() })?;
        let paths: Vec<PathBuf> = inputs.iter().map(|folder| folder.join(name)).collect();
        written.extend(case(&paths, output, dataset, reader, probabilities)?);
    }
    tell(progress, Event::Cases { done: names.len(), total: names.len() })?;
    Ok(written)
}

/// How a data set's label maps are read and written; one beside `archive` may tell.
///
/// # Errors
/// [`Error::Unsupported`] where there is none.
pub(super) fn reader(dataset: &DatasetJson, archive: &Path) -> Result<Reader> {
    Reader::of(dataset, Some(&archive.with_file_name(label_map(archive, dataset))))
}

/// Name of the label map beside an archive.
fn label_map(archive: &Path, dataset: &DatasetJson) -> String {
    format!("{}{}", archive.file_stem().unwrap_or_default().to_string_lossy(), dataset.file_ending)
}

/// Names of the archives, which are in each folder.
fn names(inputs: &[PathBuf]) -> Result<Vec<OsString>> {
    let Some(first) = inputs.first() else { return Err(Error::usage("no folder to average was given")) };
    let sets = inputs.iter().map(|f| folder::files(f, ".npz")).collect::<Result<Vec<_>>>()?;
    let all: BTreeSet<&OsString> = sets.iter().flatten().collect();
    for (input, set) in inputs.iter().zip(&sets) {
        if let Some(name) = all.iter().find(|n| set.binary_search(n).is_err()) {
            let path = input.join(name);
            return Err(Error::dataset(&path, "file", "missing, expected as the other folders have it"));
        }
    }
    if all.is_empty() {
        return Err(Error::dataset(first, "folder", "no .npz in it; predict with --save-probabilities"));
    }
    Ok(all.into_iter().cloned().collect())
}

/// Averages one case, which is called as the first of its archives is, and writes it to `output`; its files.
///
/// # Errors
/// As [`ensemble`].
pub(super) fn case(
    paths: &[PathBuf],
    output: &Path,
    dataset: &DatasetJson,
    reader: Reader,
    probabilities: bool,
) -> Result<Vec<PathBuf>> {
    let Some(first) = paths.first() else { return Err(Error::usage("no probabilities to average were given")) };
    let name = first.file_name().unwrap_or_default();
    let mut archives = paths.iter().map(|p| Archive::open(p)).collect::<Result<Vec<_>>>()?;
    let mut streams = archives.iter_mut().map(|a| a.stream("probabilities")).collect::<Result<Vec<_>>>()?;
    let shape = streams[0].shape();
    for (path, stream) in paths.iter().zip(&streams) {
        let heads = dataset.labels.heads();
        if stream.shape()[0] != heads || stream.shape() != shape {
            let (found, expected) = (stream.shape(), [heads, shape[1], shape[2], shape[3]]);
            let what = format!("{found:?} (channel, z, y, x), expected {expected:?}");
            return Err(Error::model(path, "probabilities", what));
        }
    }
    let stem = first.file_stem().unwrap_or_default().to_string_lossy();
    let label_map = label_map(first, dataset);
    let voxels = [shape[1], shape[2], shape[3]];
    let reader = match reader {
        // Where no label map tells a picture from a stack, the probabilities do.
        Reader::NaturalImage2dIo if voxels[0] > 1 && dataset.file_ending.eq_ignore_ascii_case(".tif") => {
            Reader::Tiff3dIo
        }
        reader => reader,
    };
    let geometry = geometry(first, &label_map, &stem, voxels, reader)?;
    if geometry.shape != voxels {
        let what = format!("{voxels:?} voxels (z, y, x), the case has {:?}", geometry.shape);
        return Err(Error::model(first, "probabilities", what));
    }
    let mut vote = Vote::new(dataset.labels.decision(), geometry.len())?;
    let [path, npz, pkl] = [output.join(&label_map), output.join(name), output.join(format!("{stem}.pkl"))];
    let mut written = vec![path.clone()];
    if reader == Reader::Tiff3dIo {
        written.push(label_sidecar(&path));
    }
    if probabilities {
        write_npz(&npz, |archive| {
            archive.array("probabilities", &shape, |a| {
                average(&mut streams, |channel, mean| {
                    vote.channel(channel, mean);
                    a.push(mean)
                })
            })
        })?;
        let given = first.with_file_name(format!("{stem}.pkl"));
        if given.is_file() {
            let properties = std::fs::read(&given).map_err(|e| Error::io("read", &given, e))?;
            write_atomically(&pkl, |file| file.write_all(&properties).map_err(|e| Error::io("write", &pkl, e)))?;
        } else {
            store::write_grid(&pkl, &geometry)?;
        }
        written.extend([npz, pkl]);
    } else {
        average(&mut streams, |channel, mean| {
            vote.channel(channel, mean);
            Ok(())
        })?;
    }
    reader.write(&path, &Segmentation::new(vote.finish(), geometry, Vec::new())?)?;
    Ok(written)
}

/// Calls `f(channel, mean)` for every channel: sums in the order of the folders, then a division, in float32.
fn average(streams: &mut [Stream<'_>], mut f: impl FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
    let [channels, z, y, x] = streams[0].shape();
    let mut mean: Vec<f32> = zeros(z * y * x, "a mean of probabilities")?;
    let mut next: Vec<f32> = zeros(z * y * x, "probabilities")?;
    let count = streams.len() as f32;
    for channel in 0..channels {
        for (i, stream) in streams.iter_mut().enumerate() {
            if i == 0 {
                stream.read(&mut mean)?;
            } else {
                stream.read(&mut next)?;
                mean.iter_mut().zip(&next).for_each(|(m, n)| *m += n);
            }
        }
        mean.iter_mut().for_each(|m| *m /= count);
        f(channel, &mean)?;
    }
    streams.iter_mut().try_for_each(Stream::finish)
}

/// Labels as channel after channel comes (nnU-Net `convert_probabilities_to_segmentation`).
struct Vote {
    decision: Decision,
    /// Largest probability so far; of regions nothing.
    best: Vec<f32>,
    labels: Vec<u16>,
}

impl Vote {
    fn new(decision: Decision, voxels: usize) -> Result<Self> {
        let compared = if decision == Decision::Argmax { voxels } else { 0 };
        Ok(Self { decision, best: zeros(compared, "probabilities")?, labels: zeros(voxels, "labels")? })
    }

    fn channel(&mut self, channel: usize, mean: &[f32]) {
        match &self.decision {
            Decision::Regions { paint } => {
                let label = paint[channel];
                let inside = self.labels.iter_mut().zip(mean).filter(|(_, m)| **m > 0.5);
                inside.for_each(|(l, _)| *l = label);
            }
            // As many channels as labels, which are u16.
            Decision::Argmax if channel == 0 => self.best.copy_from_slice(mean),
            Decision::Argmax => {
                for ((best, label), m) in self.best.iter_mut().zip(&mut self.labels).zip(mean) {
                    // The first of equal ones stays.
                    if *m > *best {
                        (*best, *label) = (*m, channel as u16);
                    }
                }
            }
        }
    }

    fn finish(self) -> LabelData {
        if self.labels.iter().all(|l| *l < 256) {
            return LabelData::U8(self.labels.into_iter().map(|l| l as u8).collect());
        }
        LabelData::U16(self.labels)
    }
}

/// Where a case lies: as its label map does, or as the properties say that nnU-Net keeps beside its probabilities.
fn geometry(archive: &Path, label_map: &str, stem: &str, shape: [usize; 3], reader: Reader) -> Result<Geometry> {
    let (map, pkl) = (archive.with_file_name(label_map), archive.with_file_name(format!("{stem}.pkl")));
    if map.is_file()
        && let Some(grid) = reader.label_grid(&map)?
    {
        return Ok(grid);
    }
    if !pkl.is_file() {
        let file = if map.is_file() { label_sidecar(&map) } else { map };
        let what = format!("missing, expected beside {stem}.npz: it says where the case lies; {stem}.pkl does, too");
        return Err(Error::dataset(&file, "file", what));
    }
    store::read_grid(&pkl, shape)
}
