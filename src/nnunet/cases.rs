//! Cohorts: which files of a folder belong to which case, in nnU-Net's naming `case_0000.nii.gz`, where the four
//! digits number the channel (nnU-Net `create_lists_from_splitted_dataset_folder`).

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::dataset::Reader;
use super::plans::{Channel, InferencePlan};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::{Geometry, Image, Segmentation};

/// Endings of NIfTI's files.
pub(super) const NIFTI: &[&str] = &[".nii.gz", ".nii"];

/// Endings of images of one kind, the longer first, and of their segmentations.
const KINDS: [&[&str]; 3] = [NIFTI, &[".png"], &[".tiff", ".tif"]];

/// File name endings of images that can be read, in any case of letters.
pub fn endings() -> impl Iterator<Item = &'static str> {
    KINDS.into_iter().flatten().copied()
}

/// Endings that the segmentation of the image at `path` may have: those of its kind, NIfTI if nothing tells.
#[must_use]
pub fn endings_like(path: &Path) -> &'static [&'static str] {
    KINDS[kind(path).unwrap_or(0)]
}

/// One patient's image files.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Case {
    /// Name without channel number and ending.
    pub name: String,
    /// Channel number and file, by rising channel.
    pub files: Vec<(usize, PathBuf)>,
}

/// What a folder holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Found {
    /// Cases by name, in the order nnU-Net goes through them.
    pub cases: Vec<Case>,
    /// Files that belong to no case: no channel number, another ending, a name that is not UTF-8, pictures among images
    /// of another kind. Hidden files and folders are not listed.
    pub ignored: Vec<PathBuf>,
}

/// Groups the images of `folder` by case. They are of one kind: NIfTI where there is one such image, else PNG, else TIFF.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be listed; [`Error::Image`] when it holds no image of the form
/// `case_0000.nii.gz`.
pub fn find(folder: &Path) -> Result<Found> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))?;
    let mut of_kind: [BTreeMap<String, Vec<(usize, PathBuf)>>; KINDS.len()] = Default::default();
    let mut ignored = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("list", folder, e))?.path();
        let stem = stem(&path);
        match kind(&path).zip(stem.as_deref().and_then(split_channel)) {
            Some((kind, (name, channel))) => of_kind[kind].entry(name.into()).or_default().push((channel, path)),
            None if is_hidden(&path) || path.is_dir() => {}
            None => ignored.push(path),
        }
    }
    let mut kinds = of_kind.into_iter().skip_while(BTreeMap::is_empty);
    let cases = kinds.next().unwrap_or_default();
    ignored.extend(kinds.flatten().flat_map(|(_, files)| files).map(|(_, path)| path));
    if cases.is_empty() {
        let what = "no image named like case_0000.nii.gz (four digits: the channel) is in this folder";
        return Err(Error::image(folder, "folder", what));
    }
    // The spacing of a stack of pages stands in CASE.json.
    let of_case = |p: &PathBuf| p.file_stem().and_then(|s| s.to_str()).is_some_and(|s| cases.contains_key(s));
    ignored.retain(|p| p.extension().is_none_or(|e| e != "json") || !of_case(p));
    ignored.sort();
    let sorted = |(name, mut files): (String, Vec<(usize, PathBuf)>)| {
        files.sort();
        Case { name, files }
    };
    Ok(Found { cases: cases.into_iter().map(sorted).collect(), ignored })
}

/// The share of one of `num_parts` processes that work through the same cohort: every `num_parts`-th case from
/// `part_id` on.
///
/// # Errors
/// [`Error::Usage`] unless `part_id < num_parts`.
pub fn part(cases: Vec<Case>, num_parts: usize, part_id: usize) -> Result<Vec<Case>> {
    if part_id >= num_parts {
        let what = format!("part id {part_id} of {num_parts} parts: expected 0 <= part id < number of parts");
        return Err(Error::usage(what));
    }
    Ok(cases.into_iter().skip(part_id).step_by(num_parts).collect())
}

/// Copies the descriptions that nnU-Net's later steps (post-processing, ensembling) look for beside predictions,
/// `plans.json` and `dataset.json`, if the model is a folder that has both.
///
/// # Errors
/// [`Error::Io`] when they cannot be read or written.
pub fn copy_descriptions(model: &Path, output: &Path) -> Result<()> {
    let names = ["plans.json", "dataset.json"];
    if !names.iter().all(|n| model.join(n).is_file()) {
        return Ok(());
    }
    for name in names {
        let (from, to) = (model.join(name), output.join(name));
        let bytes = std::fs::read(&from).map_err(|e| Error::io("read", &from, e))?;
        write_atomically(&to, |file| file.write_all(&bytes).map_err(|e| Error::io("write", &to, e)))?;
    }
    Ok(())
}

impl Case {
    /// A case of the given files, one per channel in order.
    ///
    /// # Errors
    /// [`Error::Usage`] for no file, and when names that carry channel numbers contradict the order given: swapped
    /// channels would give a wrong result without any other sign.
    pub fn from_files(files: &[PathBuf]) -> Result<Self> {
        let first = files.first().ok_or_else(|| Error::usage("no image file was given"))?;
        let stems: Vec<_> = files.iter().map(|f| stem(f).unwrap_or_default()).collect();
        if files.len() > 1 {
            for (i, (file, s)) in files.iter().zip(&stems).enumerate() {
                if let Some((_, c)) = split_channel(s)
                    && c != i
                {
                    let what = format!("{} is given as channel {i}, its name says channel {c}", file.display());
                    return Err(Error::usage(what));
                }
            }
        }
        let name = match stems.first() {
            Some(s) if !s.is_empty() => split_channel(s).map_or(s.as_str(), |(n, _)| n).to_owned(),
            _ => first.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        Ok(Self { name, files: files.iter().cloned().enumerate().collect() })
    }

    /// Reads the channels a model needs, in its order: a file for each, or one file with all of them.
    ///
    /// # Errors
    /// [`Error::Image`] naming the file of the first channel that is missing, there twice or not the model's, and the file
    /// that is of another kind than the model's images or cannot be read; [`Error::Io`].
    pub fn read(&self, plan: &InferencePlan) -> Result<Image> {
        let expected = plan.channels.as_slice();
        // A picture may have several channels.
        let pictures = plan.reader == Reader::NaturalImage2dIo && self.files.len() < expected.len();
        let all_in_one = pictures || (matches!(self.files.as_slice(), [(0, _)]) && expected.len() > 1);
        let files = if all_in_one { self.paths() } else { self.file_per_channel(expected)? };
        self.check_kind(plan.reader)?;
        let image = plan.reader.image(&files)?;
        match (all_in_one, image.channels.len()) {
            (_, n) if n == expected.len() => Ok(image),
            (true, n) if n == self.files.len() => self.file_per_channel(expected).and(Ok(image)),
            (_, n) => Err(Error::image(&files[0], "channels", format!("found {n}, {}", needs(expected)))),
        }
    }

    /// The grid of the case's image, without its voxels.
    ///
    /// # Errors
    /// As [`Case::read`].
    pub fn grid(&self, reader: Reader) -> Result<Geometry> {
        self.check_kind(reader)?;
        reader.grid(&self.paths())
    }

    /// Checks that files of the case's kind are what a model is for.
    fn check_kind(&self, reader: Reader) -> Result<()> {
        let kinds: &[usize] = match reader {
            Reader::SimpleItkIo | Reader::NibabelIo => &[0],
            Reader::NaturalImage2dIo => &[1, 2],
            Reader::Tiff3dIo => &[2],
        };
        match self.files.iter().find(|(_, p)| !kinds.contains(&kind(p).unwrap_or(0))) {
            Some((_, path)) => {
                let expected = kinds.iter().flat_map(|&k| KINDS[k]).copied().collect::<Vec<_>>().join(", ");
                let what = format!("the model is for images read by {}, expected {expected}", reader.name());
                Err(Error::image(path, "file", what))
            }
            None => Ok(()),
        }
    }

    /// The case's files by rising channel.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|(_, p)| p.clone()).collect()
    }

    fn file_per_channel(&self, expected: &[Channel]) -> Result<Vec<PathBuf>> {
        let needs = needs(expected);
        if let Some((c, path)) = self.files.iter().find(|(c, _)| *c >= expected.len()) {
            return Err(Error::image(path, "channels", format!("this is channel {c}, {needs}")));
        }
        let of = |i: usize| self.files.iter().filter(move |(c, _)| *c == i).map(|(_, p)| p);
        let mut out = Vec::with_capacity(expected.len());
        for (i, Channel { name, .. }) in expected.iter().enumerate() {
            match (of(i).next(), of(i).nth(1)) {
                (Some(p), None) => out.push(p.clone()),
                (Some(p), Some(q)) => {
                    let what = format!("channel {i} is also in {}", q.display());
                    return Err(Error::image(p, "channels", what));
                }
                (None, _) => {
                    let what = format!("the file of channel {i} ({name}) is missing, {needs}");
                    return Err(Error::image(&self.file_of(i), "channels", what));
                }
            }
        }
        Ok(out)
    }

    /// What the file of a channel would be called.
    fn file_of(&self, channel: usize) -> PathBuf {
        let first = self.files.first().map_or(Path::new(""), |(_, p)| p.as_path());
        let ending = ending(first).unwrap_or(NIFTI[0]);
        first.with_file_name(format!("{}_{channel:04}{ending}", self.name))
    }

    /// Where the case's segmentation lies in an output folder: of NIfTI always compressed, of pictures with the image's
    /// ending.
    #[must_use]
    pub fn output(&self, folder: &Path) -> PathBuf {
        let ending = self.files.first().and_then(|(_, p)| ending(p)).filter(|e| !NIFTI.contains(e));
        folder.join(format!("{}{}", self.name, ending.unwrap_or(NIFTI[0])))
    }

    /// Whether `output` already holds a whole segmentation of this case: it decodes to its last byte and lies where the
    /// image lies, voxel for voxel. Neither a leftover of a killed run nor the result of another image of the same name
    /// is complete (nnU-Net only asks whether the file exists).
    #[must_use]
    pub fn is_complete(&self, output: &Path, reader: Reader) -> bool {
        let image = self.grid(reader).ok();
        let done = output.is_file().then(|| reader.label(output).ok()).flatten();
        matches!((image, done), (Some(i), Some(d)) if same_place(&i, &d.geometry))
    }

    /// What the stage before of a cascade predicted of this case: `path`, or the file of the case's name in the folder `path`.
    #[must_use]
    pub fn previous(&self, path: &Path) -> PathBuf {
        if !path.is_dir() {
            return path.into();
        }
        let usual = self.output(path);
        let endings = endings_like(&usual).iter();
        let mut others = endings.map(|ending| path.join(format!("{}{ending}", self.name)));
        if usual.is_file() { usual } else { others.find(|p| p.is_file()).unwrap_or(usual) }
    }

    /// Reads a segmentation of this case.
    ///
    /// # Errors
    /// As [`Case::read`]; [`Error::Image`] when it does not lie where the image lies, voxel for voxel.
    pub fn read_segmentation(&self, path: &Path, reader: Reader) -> Result<Segmentation> {
        let (found, image) = (reader.label(path)?, self.grid(reader)?);
        if same_place(&image, &found.geometry) {
            return Ok(found);
        }
        let (own, image) = (found.geometry.shape, image.shape);
        let what = format!("{own:?} voxels that lie elsewhere than the {image:?} of the image; expected its grid");
        Err(Error::image(path, "grid", what))
    }

    /// What is wrong with an image in memory, said of the file it came from.
    #[must_use]
    pub fn name_file(&self, error: Error) -> Error {
        let Error::Input { what } = error else { return error };
        let channel = what.strip_prefix("channel ").and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        let channel: Option<usize> = channel.and_then(|digits| digits.parse().ok());
        let of_channel = self.files.iter().find(|(c, _)| Some(*c) == channel);
        let path = of_channel.or(self.files.first()).map_or(Path::new(""), |(_, p)| p.as_path());
        Error::image(path, "image", what)
    }
}

/// `path`'s file name without the ending of an image, or `None` if it has no such ending.
#[must_use]
pub fn stem(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    endings().find_map(|e| without(name, e)).filter(|s| !s.is_empty() && !s.starts_with('.')).map(Into::into)
}

/// The ending of an image's file name, in small letters.
fn ending(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_string_lossy();
    endings().find(|e| without(&name, e).is_some())
}

/// Which of [`KINDS`] a file is by its name.
fn kind(path: &Path) -> Option<usize> {
    let ending = ending(path)?;
    KINDS.iter().position(|k| k.contains(&ending))
}

/// `name` without `ending`, which it may spell with capital letters.
fn without<'a>(name: &'a str, ending: &str) -> Option<&'a str> {
    let (stem, end) = name.split_at_checked(name.len().checked_sub(ending.len())?)?;
    end.eq_ignore_ascii_case(ending).then_some(stem)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."))
}

/// Equal grids, but for what float32 fields of a header round away.
fn same_place(a: &Geometry, b: &Geometry) -> bool {
    let close = |a: &f64, b: &f64| (a - b).abs() <= 1e-5 * a.abs().max(1.0);
    let affines = a.affine.iter().flatten().zip(b.affine.iter().flatten());
    let mut numbers = a.spacing_mm.iter().zip(&b.spacing_mm).chain(affines);
    a.shape == b.shape && numbers.all(|(a, b)| close(a, b))
}

/// `case_0001` to (`case`, 1).
pub(super) fn split_channel(stem: &str) -> Option<(&str, usize)> {
    let (name, digits) = stem.rsplit_once('_')?;
    let four = digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_digit());
    if four && !name.is_empty() { Some((name, digits.parse().ok()?)) } else { None }
}

fn needs(expected: &[Channel]) -> String {
    let names: Vec<&str> = expected.iter().map(|c| c.name.as_str()).collect();
    let plural = if names.len() == 1 { "" } else { "s" };
    format!("the model needs {} channel{plural} ({})", names.len(), names.join(", "))
}
