//! Whole data sets (nnU-Net `preprocess_dataset`): many cases at a time within a limit of memory, and only those that are not
//! there yet.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use super::case::file;
use super::{ENDINGS, Form, made_by, write_case, write_npz_case};
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::read_nifti_header;
use crate::io::weights::sha256;
use crate::nnunet::dataset::{Dataset, RawCase};
use crate::nnunet::json::{self, Field};
use crate::nnunet::labels::{GivenRegion, LabelSet};
use crate::nnunet::model::preprocess_plan;
use crate::nnunet::planner::copy_descriptions;
use crate::nnunet::preprocess::{PreprocessPlan, preprocess_case};
use crate::nnunet::training_case::ClassKey;
use crate::nnunet::workers;
use crate::tensor::Device;

/// Configurations that are preprocessed where none is named, if the plans have them (nnU-Net's own list); a cascade's second
/// stage reads what its first configuration has.
const USUAL: [&str; 3] = ["2d", "3d_fullres", "3d_lowres"];

/// Changes when the same plan gives other files than before.
const VERSION: u32 = 1;

/// The folder of raw label maps, for the evaluation of validation cases.
const TRUTHS: &str = "gt_segmentations";

/// Options of [`preprocess_dataset`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PreprocessOptions {
    /// Write `CASE.npz` and `CASE.pkl`, which nnU-Net trains on, instead of the project's own form.
    pub npz: bool,
    /// Remove what a configuration's folder holds, and begin anew.
    pub fresh: bool,
    /// No more cases at a time than these bytes hold, by an estimate from their headers.
    pub memory_limit: Option<usize>,
}

/// What was done for a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PreprocessedConfiguration {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// Cases preprocessed now.
    pub written: usize,
    /// Cases that were there, made of the same files by the same plan.
    pub kept: usize,
}

/// Preprocesses all training cases of a data set for some configurations, by default for "2d", "3d_fullres" and "3d_lowres"
/// if the plans `plans_name` have them. `folder` is the data set's below `nnUNet_preprocessed`, which holds the plans.
///
/// As nnU-Net does, each configuration fills the folder that its `data_identifier` names, and label maps are copied to
/// `gt_segmentations`. A case appears under its name when it is whole; one that is there already, made of the same files by
/// the same plan, is kept, and one of which the data set no longer knows is removed.
///
/// # Errors
/// [`Error::Dataset`] naming the case with files that are missing or do not fit; [`Error::Usage`] when a configuration is not
/// in the plans, or its folder holds cases in another form; [`Error::Model`] and [`Error::Unsupported`] for plans;
/// [`Error::OutOfMemory`] when a single case needs more than the limit; [`Error::Io`]; [`Error::Cancelled`].
pub fn preprocess_dataset(
    dataset: &Dataset,
    folder: &Path,
    plans_name: &str,
    configurations: &[String],
    options: &PreprocessOptions,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<Vec<PreprocessedConfiguration>> {
    let plans = folder.join(format!("{plans_name}.json"));
    if !plans.is_file() {
        let what = format!("{}: no such plans; make them with 'stunet plan' first", plans.display());
        return Err(Error::usage(what));
    }
    let names = chosen(&plans, configurations)?;
    dataset.check_files()?;
    let description = dataset.folder.join("dataset.json");
    let classes = location_classes(&dataset.json.labels);
    // All plans before the first image.
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for name in names {
        let (plan, identifier) = preprocess_plan(&plans, &description, &name)?;
        let folder = folder.join(identifier);
        jobs.push(Job { dataset, name, plan, folder, classes: &classes, options });
    }
    copy_descriptions(dataset, folder)?;
    copy_truths(dataset, &folder.join(TRUTHS))?;
    jobs.iter().map(|job| job.run(device, progress)).collect()
}

/// The configurations asked for, each of which the plans have.
fn chosen(plans: &Path, asked: &[String]) -> Result<Vec<String>> {
    let value = json::read(plans)?;
    let known = Field::root(plans, &value).need("configurations")?;
    let known: BTreeSet<&str> = known.entries()?.into_iter().map(|(name, _)| name).collect();
    if let Some(unknown) = asked.iter().find(|a| !known.contains(a.as_str())) {
        let what = format!("{}: no configuration {unknown:?}, there are {known:?}", plans.display());
        return Err(Error::usage(what));
    }
    if !asked.is_empty() {
        return Ok(asked.to_vec());
    }
    let usual: Vec<String> = USUAL.iter().filter(|u| known.contains(*u)).map(|&u| u.into()).collect();
    if usual.is_empty() {
        let what = format!("{}: none of the usual configurations {USUAL:?}; name one of {known:?}", plans.display());
        return Err(Error::usage(what));
    }
    Ok(usual)
}

/// The classes whose locations nnU-Net stores: labels or regions, then all that is annotated where some voxels are not.
#[must_use]
pub fn location_classes(labels: &LabelSet) -> Vec<ClassKey> {
    // Labels beyond what a preprocessed case can hold are found in no case.
    let label = |l: &u16| i16::try_from(*l).unwrap_or(i16::MAX);
    let list = |l: &[u16]| l.iter().map(label).collect::<Vec<i16>>();
    let class = |region| match region {
        GivenRegion::Number(l) => ClassKey::Label(label(&l)),
        GivenRegion::List(l) => ClassKey::Region(list(l)),
    };
    let mut classes: Vec<ClassKey> = match labels.given_regions() {
        Some(regions) => regions.into_iter().map(class).collect(),
        None => labels.foreground_labels().iter().map(|l| ClassKey::Label(label(l))).collect(),
    };
    if labels.ignore().is_some() {
        classes.push(ClassKey::Region(std::iter::once(-1).chain(list(labels.labels())).collect()));
    }
    classes
}

/// One configuration.
struct Job<'a> {
    dataset: &'a Dataset,
    name: String,
    plan: PreprocessPlan,
    folder: PathBuf,
    classes: &'a [ClassKey],
    options: &'a PreprocessOptions,
}

impl Job<'_> {
    fn run(&self, device: &Device, progress: &mut dyn Progress) -> Result<PreprocessedConfiguration> {
        tell(progress, Event::Stage(&self.name))?;
        fs::create_dir_all(&self.folder).map_err(|e| Error::io("create", &self.folder, e))?;
        self.clear()?;
        let cases = &self.dataset.cases;
        let budget = Budget { limit: self.options.memory_limit, taken: Mutex::new(0), freed: Condvar::new() };
        let plan = self.description()?;
        self.remove_stale(&plan)?;
        let begin = |i: usize| {
            let fingerprint = fingerprint(&plan, &cases[i])?;
            if made_by(&self.folder, &cases[i].name, self.form()).is_some_and(|made| made == fingerprint) {
                return Ok(None);
            }
            let held = budget.take(estimate(&self.plan, &cases[i]), &cases[i].name)?;
            Ok(Some((held, fingerprint)))
        };
        let work = |i: usize, begun: Option<(Held<'_>, String)>| match begun {
            None => Ok(false),
            Some((_held, fingerprint)) => self.case(&cases[i], &fingerprint).map(|()| true),
        };
        let done = workers::map_begun(device, cases.len(), progress, begin, work)?;
        let written = done.iter().filter(|d| **d).count();
        let (name, folder) = (self.name.clone(), self.folder.clone());
        Ok(PreprocessedConfiguration { name, folder, written, kept: done.len() - written })
    }

    fn case(&self, case: &RawCase, fingerprint: &str) -> Result<()> {
        let (image, truth) = (self.dataset.image(case)?, self.dataset.label(case)?);
        let named = |e| match e {
            Error::Input { what } => self.dataset.fault(case, what),
            other => other,
        };
        let done = preprocess_case(&image, &truth, &self.plan, self.classes).map_err(named)?;
        // Room for the next.
        let geometry = image.geometry;
        drop((image.channels, truth));
        let write = if self.options.npz { write_npz_case } else { write_case };
        write(&self.folder, &case.name, &done, &geometry, fingerprint)
    }

    fn form(&self) -> Form {
        if self.options.npz { Form::Npz } else { Form::Own }
    }

    /// Removes what must not stay beside the cases: all with `fresh`, or cases that the data set does not know.
    fn clear(&self) -> Result<()> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(|e| Error::io("list", &self.folder, e))? {
            let path = entry.map_err(|e| Error::io("list", &self.folder, e))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_string();
            let of = |(ending, form): (&str, Form)| name.strip_suffix(ending).map(|i| (i.to_string(), form));
            // The pickles beside nnU-Net's arrays.
            let parts = ENDINGS.into_iter().chain([(".pkl", Form::Npz)]).find_map(of);
            if let Some((identifier, form)) = parts.filter(|_| !name.starts_with('.')) {
                found.push((path, identifier, form));
            }
        }
        let other =
            found.iter().find(|(path, _, form)| *form != self.form() && path.extension() != Some("pkl".as_ref()));
        if let Some((path, ..)) = other.filter(|_| !self.options.fresh) {
            let what = "is a case in another form than the one to be written: train on it as it is, or preprocess anew \
                        with --fresh, which removes it";
            return Err(Error::usage(format!("{}: {what}", path.display())));
        }
        let known: BTreeSet<&str> = self.dataset.cases.iter().map(|c| c.name.as_str()).collect();
        for (path, identifier, form) in &found {
            if self.options.fresh || (*form == self.form() && !known.contains(identifier.as_str())) {
                fs::remove_file(path).map_err(|e| Error::io("remove", path, e))?;
            }
        }
        Ok(())
    }

    /// Removes cases that were made of other files or by other plans: whatever happens before they are made again, nobody
    /// trains on a mixture.
    fn remove_stale(&self, plan: &str) -> Result<()> {
        let endings: &[&str] = if self.options.npz { &[".npz", ".pkl"] } else { &[".safetensors"] };
        for case in &self.dataset.cases {
            let found = made_by(&self.folder, &case.name, self.form());
            if found.is_some() && found != Some(fingerprint(plan, case)?) {
                for ending in endings {
                    let path = file(&self.folder, &case.name, ending);
                    fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
                }
            }
        }
        Ok(())
    }

    /// Everything but the files that a case is made of.
    fn description(&self) -> Result<String> {
        let plan = serde_json::to_string(&self.plan).map_err(|e| Error::usage(format!("plans: {e}")))?;
        Ok(format!("{VERSION} {plan} {:?} {}", self.classes, self.dataset.reader.name()))
    }
}

/// What a case is made of and by: files by name, size and time of change.
fn fingerprint(plan: &str, case: &RawCase) -> Result<String> {
    let mut text = plan.to_string();
    // Beside a 3D TIFF a file tells its spacing.
    let beside = [&case.images[0], &case.label].map(|p| p.with_file_name(format!("{}.json", case.name)));
    let beside = beside.iter().filter(|p| p.is_file());
    for path in case.images.iter().chain([&case.label]).chain(beside) {
        let io = |e| Error::io("read", path, e);
        let meta = fs::metadata(path).map_err(io)?;
        let changed = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        text += &format!("\n{name} {} {}", meta.len(), changed.as_nanos());
    }
    Ok(sha256(text.as_bytes()))
}

/// Bytes that a case needs at most.
fn estimate(plan: &PreprocessPlan, case: &RawCase) -> usize {
    let file = &case.images[0];
    let Ok(geometry) = read_nifti_header(file) else {
        // A picture, which may be packed well.
        return fs::metadata(file).map_or(0, |m| m.len() as usize).saturating_mul(100);
    };
    let Ok(to) = plan.largest_shape(geometry.shape, geometry.spacing_mm) else { return 0 };
    let from = plan.transpose_forward.map(|a| geometry.shape[a]);
    let voxels = |s: [usize; 3]| s.iter().fold(1usize, |n, &d| n.saturating_mul(d));
    let (before, after) = (voxels(from), voxels(to));
    // The image and a file of it as it is read, the label map as read and as cropped; the result and its labels; planes
    // between two resamplings, or copies with the coarse axis first.
    let channels = plan.channels.len();
    let read = before.saturating_mul(4 * channels + 4 + 2 + 2);
    let made = after.saturating_mul(4 * channels + 2 + 1);
    let between = 4 * voxels([from[0], to[1], to[2]]).max(before).saturating_add(after);
    read.saturating_add(made).saturating_add(between)
}

/// Memory that cases share.
struct Budget {
    limit: Option<usize>,
    taken: Mutex<usize>,
    freed: Condvar,
}

/// A case's part of it.
struct Held<'a>(&'a Budget, usize);

impl Budget {
    /// Waits until there is room.
    fn take(&self, bytes: usize, case: &str) -> Result<Held<'_>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limit) = self.limit {
            if bytes > limit {
                let what = format!("preprocessing of the case {case}");
                return Err(Error::OutOfMemory { what, asked: bytes, in_use: 0, limit });
            }
            while *taken > limit - bytes {
                taken = self.freed.wait(taken).unwrap_or_else(PoisonError::into_inner);
            }
        }
        *taken = taken.saturating_add(bytes);
        Ok(Held(self, bytes))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = taken.saturating_sub(self.1);
        self.0.freed.notify_all();
    }
}

/// Copies the label maps that are not there or not those of the raw data set: of another size or time of change, which a
/// copy keeps.
fn copy_truths(dataset: &Dataset, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let state = |path: &Path| fs::metadata(path).ok().and_then(|m| Some((m.len(), m.modified().ok()?)));
    for case in &dataset.cases {
        let to = file(folder, &case.name, &dataset.json.file_ending);
        let raw = state(&case.label);
        if raw.is_some() && state(&to) == raw {
            continue;
        }
        let bytes = fs::read(&case.label).map_err(|e| Error::io("read", &case.label, e))?;
        write_atomically(&to, |file| file.write_all(&bytes).map_err(|e| Error::io("write", &to, e)))?;
        if let Some((_, changed)) = raw {
            let set = fs::File::options().write(true).open(&to).and_then(|f| f.set_modified(changed));
            set.map_err(|e| Error::io("write", &to, e))?;
        }
    }
    Ok(())
}
