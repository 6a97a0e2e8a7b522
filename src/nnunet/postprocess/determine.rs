//! Which steps improve predictions whose truth is known (nnU-Net `determine_postprocessing`), and the same steps on a
//! folder (`apply_postprocessing_to_folder`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::steps::{self, Step};
use super::{apply, keep_largest};
use crate::base::json::Json;
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::Segmentation;
use crate::nnunet::dataset::{DatasetJson, Reader};
use crate::nnunet::evaluate::{Folders, Metrics, Summary, compare, folder};
use crate::nnunet::json;
use crate::nnunet::labels::GivenRegion;
use crate::nnunet::volume::Neighbours;
use crate::nnunet::workers;
use crate::tensor::Device;

/// What [`determine`] decided, and why.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Determined {
    /// The steps, in the order in which they are taken.
    pub steps: Vec<Step>,
    /// Of the predictions as they are.
    pub before: Summary,
    /// After the steps.
    pub after: Summary,
}

impl Determined {
    /// Writes `postprocessing.pkl`, `postprocessing.json` and the `summary.json` of the predictions as they are to `folder`,
    /// all under nnU-Net's names and keys. The three files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let [pkl, text, summary] =
            ["postprocessing.pkl", "postprocessing.json", "summary.json"].map(|name| folder.join(name));
        steps::write(&pkl, &self.steps)?;
        let [functions, kwargs] = steps::to_json(&self.steps);
        let value = Json::object([
            ("input_folder", self.before.means_json()),
            ("postprocessed", self.after.means_json()),
            functions,
            kwargs,
        ]);
        json::write(&text, &value, true)?;
        self.before.write(&summary)?;
        Ok(vec![pkl, text, summary])
    }
}

/// Decides as nnU-Net does: all foreground's largest component is kept if that raises the mean Dice and lowers that of no
/// class; then, of several classes each in turn and on top of what was accepted, if that raises the class's own. With
/// `postprocessed` the label maps after all steps, and their `summary.json`, are written to that folder.
///
/// Unlike nnU-Net, which believes a `summary.json` that is there, the predictions are always compared anew. Labels do not
/// touch each other's voxels, so all of them are tried in one pass over the cases; regions need one each.
///
/// # Errors
/// Those of [`Folders::files`], reading and writing; [`Error::Cancelled`].
pub fn determine(
    folders: &Folders,
    dataset: &DatasetJson,
    postprocessed: Option<&Path>,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<Determined> {
    let files = folders.files(true)?;
    if let Err(e) = folders.files(false) {
        tracing::warn!("{e}. Post-processing should be determined on all cases");
    }
    let mut work = Work { folders, files: &files, device, progress };
    let before = work.pass("as they are", |_| Ok(()))?;
    let labels = &dataset.labels;
    let mut steps = Vec::new();
    // What the last accepted step left.
    let mut best = before.clone();
    let foreground = Step::Foreground(labels.foreground_labels().to_vec());
    let tried = work.steps("largest of all foreground", std::slice::from_ref(&foreground))?;
    let worse = tried.dice().iter().zip(before.dice()).any(|((_, after), (_, before))| *after < before);
    if tried.foreground_dice() > before.foreground_dice() && !worse {
        steps.push(foreground);
        best = tried;
    }
    match labels.given_regions() {
        _ if folders.classes.len() < 2 => {}
        None => {
            let foreground = labels.foreground_labels();
            let tried = work.pass("largest of each label", |seg| {
                apply(&steps, seg);
                let each = foreground.iter().map(|l| (*l, *l));
                keep_largest(&mut seg.labels, seg.geometry.shape, each, Neighbours::Corners);
                Ok(())
            })?;
            let improved = tried.dice().into_iter().zip(best.dice()).map(|((_, after), (_, before))| after > before);
            steps.extend(foreground.iter().zip(improved).filter(|(_, i)| *i).map(|(l, _)| Step::Label(*l)));
        }
        Some(regions) => {
            for (i, region) in regions.into_iter().enumerate() {
                let mut more = steps.clone();
                more.push(match region {
                    GivenRegion::Number(label) => Step::Label(label),
                    GivenRegion::List(labels) => Step::Region(labels.to_vec()),
                });
                let tried = work.steps("largest of a region", &more)?;
                if tried.dice()[i].1 > best.dice()[i].1 {
                    (steps, best) = (more, tried);
                }
            }
        }
    }
    let after = match postprocessed {
        None => work.steps("all steps", &steps)?,
        Some(output) => work.write(&steps, output)?,
    };
    Ok(Determined { steps, before, after })
}

/// The cases, gone through again and again: they need not fit into memory together.
struct Work<'a> {
    folders: &'a Folders,
    files: &'a [OsString],
    device: &'a Device,
    progress: &'a mut dyn Progress,
}

impl Work<'_> {
    fn steps(&mut self, name: &str, steps: &[Step]) -> Result<Summary> {
        self.pass(name, |seg| {
            apply(steps, seg);
            Ok(())
        })
    }

    /// Compares every case after `change` was done to its prediction.
    fn pass(&mut self, name: &str, change: impl Fn(&mut Segmentation) -> Result<()> + Sync) -> Result<Summary> {
        let found = self.compare(name, |_, seg| change(seg))?;
        Ok(self.folders.summary(self.files, found))
    }

    fn compare(
        &mut self,
        name: &str,
        change: impl Fn(usize, &mut Segmentation) -> Result<()> + Sync,
    ) -> Result<Vec<Vec<Metrics>>> {
        tell(self.progress, Event::Stage(name))?;
        let (folders, files) = (self.folders, self.files);
        workers::map(self.device, files.len(), self.progress, |i| {
            let [truth, mut prediction] = folders.read(&files[i])?;
            change(i, &mut prediction)?;
            compare(&truth, &prediction, &folders.classes, folders.ignore)
        })
    }

    /// The last pass, which writes what it makes.
    fn write(&mut self, steps: &[Step], output: &Path) -> Result<Summary> {
        std::fs::create_dir_all(output).map_err(|e| Error::io("create", output, e))?;
        let (files, reader) = (self.files, self.folders.reader);
        let found = self.compare("all steps", |i, seg| {
            apply(steps, seg);
            reader.write(&output.join(&files[i]), seg)
        })?;
        let mut written = self.folders.clone();
        written.prediction = output.into();
        let summary = written.summary(files, found);
        summary.write(&output.join("summary.json"))?;
        Ok(summary)
    }
}

/// Takes the steps on every label map of `input` with the ending `ending` and writes them under the same names to `output`;
/// the files written, by name.
///
/// # Errors
/// [`Error::Dataset`] when there is none, [`Error::Unsupported`] for an ending that nothing is read by, those of reading and
/// writing, [`Error::Cancelled`].
pub fn apply_to_folder(
    input: &Path,
    output: &Path,
    steps: &[Step],
    ending: &str,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<Vec<PathBuf>> {
    let files = folder::files(input, ending)?;
    if files.is_empty() {
        return Err(folder::nothing(input, ending));
    }
    let reader = Reader::of_ending(ending, Some(&input.join(&files[0])))?;
    std::fs::create_dir_all(output).map_err(|e| Error::io("create", output, e))?;
    workers::map(device, files.len(), progress, |i| {
        let mut seg = reader.label(&input.join(&files[i]))?;
        apply(steps, &mut seg);
        let path = output.join(&files[i]);
        reader.write(&path, &seg)?;
        Ok(path)
    })
}
