//! Trained models as one zip file, as nnU-Net shares them (`export_pretrained_model`, `install_model_from_zip_file`).
//!
//! nnU-Net unpacks whatever an archive holds to wherever its names point. Here nothing is believed: names stay inside, links
//! and devices are refused, what is unpacked is as large as was said and not many times the archive, checksums hold, and the
//! models are opened before anything has its place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter};

use super::convert::{Temporary, sync_folder};
use super::{ModelFolder, ModelKind, ModelOptions, own, v1};
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::zipped::{self, Output, is_plain, one_line};
use crate::nnunet::select::CONFIGURATIONS;

/// Times its own size that an archive may have unpacked. Weights hardly shrink, JSON to a tenth; deflate could say thousand.
const MOST_LARGER: u64 = 100;
/// Bytes that any archive may have unpacked.
const SMALL: u64 = 64 << 20;
/// Longest name, and most folders in it.
const NAME: usize = 1024;
const DEEPEST: usize = 16;
/// The kind of file in a Unix mode, and the two that are unpacked.
const KIND: u32 = 0o17_0000;
const REGULAR: u32 = 0o10_0000;
const FOLDER: u32 = 0o4_0000;
/// Beside a model's folder, of its data set.
const OF_DATASET: [&str; 2] = ["inference_information.json", "inference_instructions.txt"];
/// Of a fold, a cross-validation, an ensemble: nnU-Net's own choice.
const OF_FOLD: [&str; 4] = ["debug.json", "progress.png", "network_architecture.pdf", "validation/summary.json"];
const OF_RESULTS: [&str; 3] = ["summary.json", "postprocessing.pkl", "postprocessing.json"];

/// Writes models as the zip file `to`, with what nnU-Net exports beside weights: fingerprint, curves, summaries of the
/// validation and of the cross-validation, post-processing, ensembles whose members are all among the models, and which
/// configuration is best; with `predictions` the label maps of the validations, too. Names begin with the folder that holds a
/// model's (`DatasetNNN_Name/TRAINER__PLANS__CONFIGURATION/...`), of nnU-Net 1 with that of the configuration
/// (`3d_fullres/TaskNNN_Name/TRAINER__PLANS/...`), those of a folder of this project with the model's own.
///
/// Equal files give equal archives. The names in it.
///
/// # Errors
/// What [`ModelFolder::open`] says of each; [`Error::Usage`] for no model and for two of the same name; [`Error::Cancelled`];
/// [`Error::Io`].
pub fn export(
    models: &[PathBuf],
    to: &Path,
    options: &ModelOptions,
    predictions: bool,
    progress: &mut dyn Progress,
) -> Result<Vec<String>> {
    let mut files = BTreeMap::new();
    let mut parents = BTreeSet::new();
    if models.is_empty() {
        return Err(Error::usage("no model to export was named"));
    }
    for model in models {
        // Of "." and "..", too, what it is called.
        let folder = fs::canonicalize(model).map_err(|e| Error::io("read", model, e))?;
        let opened = ModelFolder::open(&folder, options)?;
        let parent = folder.parent().unwrap_or(&folder).to_path_buf();
        let is_own = folder.join(own::FILE).is_file();
        let mut root = if is_own { parent.clone() } else { parent.parent().unwrap_or(&parent).to_path_buf() };
        // nnU-Net v1 keeps a folder of data sets for each configuration.
        if opened.kind == ModelKind::NnunetV1 && CONFIGURATIONS.contains(&&*named(&root)) {
            root = root.parent().unwrap_or(&root).to_path_buf();
        }
        let mut wanted: BTreeSet<PathBuf> = opened.sources.iter().cloned().collect();
        for source in &opened.sources {
            let fold = source.parent().filter(|f| *f != folder);
            let Some(fold) = fold else { continue };
            wanted.extend(OF_FOLD.map(|name| fold.join(name)));
            if predictions {
                wanted.extend(plain_files(&fold.join("validation"))?);
            }
        }
        // Of nnU-Net v1 each fold's plans lie beside its checkpoint, and post-processing beside the folds.
        let checkpoints = opened.sources.iter().filter(|p| p.extension().is_some_and(|e| e == "model"));
        wanted.extend(checkpoints.map(|p| v1::info_file(p)));
        wanted.extend(["dataset_fingerprint.json", "postprocessing.json", "plans.pkl"].map(|name| folder.join(name)));
        for results in sub_folders(&folder)?.into_iter().filter(|f| named(f).starts_with("crossval_results_folds_")) {
            wanted.extend(if predictions {
                plain_files(&results)?
            } else {
                OF_RESULTS.map(|n| results.join(n)).into()
            });
        }
        for path in wanted.into_iter().filter(|p| p.is_file()) {
            if files.insert(name_below(&root, &path)?, path).is_some() {
                return Err(Error::usage(format!("{}: named twice, or another model has its name", model.display())));
            }
        }
        if !is_own {
            parents.insert((root, parent));
        }
    }
    for (root, parent) in &parents {
        let mut more: Vec<PathBuf> = OF_DATASET.map(|name| parent.join(name)).into();
        for ensemble in sub_folders(&parent.join("ensembles"))? {
            if members(&named(&ensemble)).is_some_and(|m| m.iter().all(|m| has(models, parent, m))) {
                more.extend(match predictions {
                    true => plain_files(&ensemble)?,
                    false => OF_RESULTS.map(|n| ensemble.join(n)).into(),
                });
            }
        }
        for path in more.into_iter().filter(|p| p.is_file()) {
            files.insert(name_below(root, &path)?, path);
        }
    }
    let total = files.len();
    write_atomically(to, |out| {
        let mut zip = ZipWriter::new_stream(Output::new(out));
        for (done, (name, path)) in files.iter().enumerate() {
            tell(progress, Event::Cases { done, total })?;
            add(&mut zip, name, path, to)?;
        }
        zip.finish().map(drop).map_err(|e| Error::io("write", to, e.into()))
    })?;
    tell(progress, Event::Cases { done: total, total })?;
    Ok(files.into_keys().collect())
}

fn add<W: Write + std::io::Seek>(zip: &mut ZipWriter<W>, name: &str, path: &Path, to: &Path) -> Result<()> {
    let read = |e| Error::io("read", path, e);
    let mut file = File::open(path).map_err(read)?;
    let bytes = file.metadata().map_err(read)?.len();
    // Weights do not shrink.
    let packed = [".pth", ".model", ".safetensors", ".gz", ".png", ".npz"].iter().any(|e| name.ends_with(e));
    let options = SimpleFileOptions::default()
        .compression_method(if packed { CompressionMethod::Stored } else { CompressionMethod::Deflated })
        .last_modified_time(DateTime::default())
        .unix_permissions(0o644)
        .large_file(bytes >= 0xf000_0000);
    let write = |e| Error::io("write", to, e);
    zip.start_file(name, options).map_err(|e| write(e.into()))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        // Told apart from errors of writing: another file is to be named.
        let n = file.read(&mut buffer).map_err(read)?;
        if n == 0 {
            return Ok(());
        }
        zip.write_all(&buffer[..n]).map_err(write)?;
    }
}

/// What an archive says of one of its files.
struct Entry {
    index: usize,
    path: PathBuf,
    bytes: u64,
}

/// Unpacks the models of an archive into `results` (nnU-Net's `nnUNet_results`), where each appears whole or not at all; the
/// folders of the models. What is there already stays, unless `overwrite` is given: then a model of the same name is
/// replaced by the archive's.
///
/// # Errors
/// [`Error::Model`] naming the entry that is refused (see the module), an archive without a model, and what
/// [`ModelFolder::open`] finds damaged in one; [`Error::Usage`] for what is there already; [`Error::Cancelled`];
/// [`Error::Io`]. After an error nothing is unpacked.
pub fn import(file: &Path, results: &Path, overwrite: bool, progress: &mut dyn Progress) -> Result<Vec<PathBuf>> {
    let opened = File::open(file).map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::model(file, "file", "missing"),
        _ => Error::io("read", file, e),
    })?;
    let length = opened.metadata().map_err(|e| Error::io("read", file, e))?.len();
    let damaged = |what: String| Error::model(file, "zip directory", what);
    let mut archive = zipped::open(BufReader::new(opened)).map_err(damaged)?;
    let entries = entries(&mut archive, file, length)?;
    let found = models(&entries);
    if found.is_empty() {
        let what = "no model in it: expected plans.json with fold_*/*.pth, fold_*/*.model, or model.json";
        return Err(Error::model(file, "contents", what));
    }
    // Of one within another only the outer is moved. A model moves as a folder, of other files each.
    let inner = |m: &Path| m.ancestors().skip(1).any(|a| found.contains(a));
    let models: BTreeSet<&PathBuf> = found.iter().filter(|m| !inner(m)).collect();
    let others = entries.iter().map(|e| &e.path).filter(|p| !models.iter().any(|m| p.starts_with(m)));
    let moves: Vec<&PathBuf> = models.iter().copied().chain(others).collect();
    for path in &moves {
        check_place(&results.join(path), models.contains(path), overwrite)?;
    }
    fs::create_dir_all(results).map_err(|e| Error::io("create", results, e))?;
    let temporary = Temporary::beside(&results.join("import"))?;
    let [fresh, old] = ["new", "old"].map(|name| temporary.path.join(name));
    for folder in [&fresh, &old] {
        fs::create_dir(folder).map_err(|e| Error::io("create", folder, e))?;
    }
    for (done, entry) in entries.iter().enumerate() {
        tell(progress, Event::Cases { done, total: entries.len() })?;
        unpack(&mut archive, file, entry, &fresh)?;
    }
    for model in &found {
        for checkpoint in checkpoints(&entries, model) {
            let options = ModelOptions { checkpoint, ..ModelOptions::new() };
            match ModelFolder::open(fresh.join(model), &options) {
                // What this version does not support may well be right.
                Ok(_) | Err(Error::Unsupported { .. }) => {}
                Err(Error::Model { field, what, path }) => {
                    let entry = path.strip_prefix(&fresh).unwrap_or(&path).display().to_string();
                    return Err(Error::model(file, format!("{entry}: {field}"), what));
                }
                Err(e) => return Err(e),
            }
        }
    }
    tell(progress, Event::Cases { done: entries.len(), total: entries.len() })?;
    let mut placed = Vec::new();
    for (number, path) in moves.iter().enumerate() {
        let (to, aside) = (results.join(path), old.join(number.to_string()));
        let done =
            check_place(&to, models.contains(path), overwrite).and_then(|()| place(&fresh.join(path), &to, &aside));
        match done {
            Ok(()) => placed.push((to, aside)),
            Err(e) => {
                // As it was. What cannot be put back is not thrown away either.
                let back = placed.iter().rev().fold(true, |all, (to, aside)| put_back(to, aside).is_ok() && all);
                if !back || fs::read_dir(&old).is_ok_and(|mut rest| rest.next().is_some()) {
                    std::mem::forget(temporary);
                }
                return Err(e);
            }
        }
    }
    Ok(models.iter().map(|m| results.join(m)).collect())
}

/// Names of the checkpoints in a model's folds; of a folder of this project there is nothing to choose.
fn checkpoints(entries: &[Entry], model: &Path) -> BTreeSet<Option<String>> {
    let of_fold = entries.iter().map(|e| &e.path).filter(|p| p.parent().and_then(Path::parent) == Some(model));
    let weights = of_fold.filter(|p| p.extension().is_some_and(|e| e == "pth" || e == "model"));
    let names: BTreeSet<Option<String>> = weights.map(|p| Some(named(p))).collect();
    if names.is_empty() { BTreeSet::from([None]) } else { names }
}

/// Whether there is room for a model or a file: nothing, or with `overwrite` one of the same kind.
fn check_place(to: &Path, is_model: bool, overwrite: bool) -> Result<()> {
    let Ok(there) = to.symlink_metadata() else { return Ok(()) };
    if !overwrite {
        return Err(Error::usage(format!("{}: is there already; --overwrite replaces it", to.display())));
    }
    let folds = || sub_folders(to).is_ok_and(|all| all.iter().any(|f| named(f).starts_with("fold_")));
    let same = match is_model {
        true => there.is_dir() && (to.join(own::FILE).is_file() || to.join("plans.json").is_file() || folds()),
        false => there.is_file(),
    };
    if same {
        return Ok(());
    }
    let kind = if is_model { "a model" } else { "a file" };
    Err(Error::usage(format!(
        "{}: is there already and is not {kind}, which is all that would be replaced",
        to.display()
    )))
}

/// All files, each checked by what the directory says of it.
fn entries<R: Read + std::io::Seek>(archive: &mut ZipArchive<R>, file: &Path, length: u64) -> Result<Vec<Entry>> {
    let (mut found, mut folders) = (BTreeMap::new(), BTreeSet::new());
    let most = length.saturating_mul(MOST_LARGER).max(SMALL);
    let (mut bytes, mut packed) = (0u64, 0u64);
    for index in 0..archive.len() {
        let broken = |e: zip::result::ZipError| Error::model(file, "zip directory", one_line(&e.to_string()));
        let entry = archive.by_index_raw(index).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        let refuse = |what: &str| Error::model(file, format!("zip entry {:?}", short(&name)), what);
        if let Some(what) = unfit(&name) {
            return Err(refuse(&format!("a name {what}, refused")));
        }
        let path: PathBuf = name.split('/').filter(|part| !part.is_empty()).collect();
        let kind = entry.unix_mode().map_or(0, |mode| mode & KIND);
        if entry.is_symlink() || ![0, REGULAR, FOLDER].contains(&kind) || (kind == FOLDER && !entry.is_dir()) {
            return Err(refuse("a link or a device, refused"));
        }
        if entry.encrypted() {
            return Err(refuse("encrypted, expected plain"));
        }
        if !matches!(entry.compression(), CompressionMethod::Stored | CompressionMethod::Deflated) {
            return Err(refuse("compressed by an unknown method, expected stored or deflated"));
        }
        if entry.is_dir() {
            continue;
        }
        (bytes, packed) = (bytes.saturating_add(entry.size()), packed.saturating_add(entry.compressed_size()));
        if bytes > most || packed > length {
            let what = format!("{bytes} bytes unpacked of an archive of {length}, expected at most {most}");
            return Err(refuse(&what));
        }
        folders.extend(path.ancestors().skip(1).map(same));
        if found.insert(same(&path), Entry { index, path, bytes: entry.size() }).is_some() {
            return Err(refuse("another entry has this name, capitals aside"));
        }
    }
    if let Some((_, clash)) = found.iter().find(|(name, _)| folders.contains(*name)) {
        let field = format!("zip entry {:?}", short(&clash.path.to_string_lossy()));
        return Err(Error::model(file, field, "a file and a folder at once, refused"));
    }
    if archive.has_overlapping_files().map_err(|e| Error::model(file, "zip directory", one_line(&e.to_string())))? {
        return Err(Error::model(file, "zip directory", "entries overlap"));
    }
    Ok(found.into_values().collect())
}

/// Why an archive is to have no file of that name.
fn unfit(name: &str) -> Option<&'static str> {
    // Reserved by Windows, or changed by it on the way.
    let device = |part: &str| {
        let stem = part.split('.').next().unwrap_or(part).to_ascii_uppercase();
        let numbered =
            |of: &str| stem.strip_prefix(of).is_some_and(|n| n.len() == 1 && n.as_bytes()[0].is_ascii_digit());
        ["CON", "PRN", "AUX", "NUL"].contains(&&*stem) || numbered("COM") || numbered("LPT")
    };
    let odd = |part: &str| part.ends_with([' ', '.']) || part.contains(['<', '>', '"', '|', '?', '*']) || device(part);
    if !is_plain(name) {
        Some("that leaves the archive")
    } else if name.len() > NAME || name.split('/').count() > DEEPEST {
        Some("of too many characters or folders")
    } else {
        name.split('/').any(odd).then_some("that is not the same on every system")
    }
}

/// A name where capitals do not count.
fn same(path: &Path) -> String {
    path.to_string_lossy().to_lowercase()
}

/// Names go into messages.
fn short(name: &str) -> String {
    if name.chars().count() > 80 { name.chars().take(80).chain("...".chars()).collect() } else { name.into() }
}

/// Folders of models among the files.
fn models(entries: &[Entry]) -> BTreeSet<PathBuf> {
    let paths: BTreeSet<&Path> = entries.iter().map(|e| e.path.as_path()).collect();
    let of_fold = |p: &Path| -> Option<PathBuf> {
        let fold = p.parent()?;
        let is_fold = named(fold).starts_with("fold_") || named(fold) == "all";
        let folder = fold.parent().filter(|f| is_fold && !f.as_os_str().is_empty())?;
        let v2 = p.extension().is_some_and(|e| e == "pth") && paths.contains(&*folder.join("plans.json"));
        (v2 || p.extension().is_some_and(|e| e == "model")).then(|| folder.to_path_buf())
    };
    let own = |p: &Path| -> Option<PathBuf> {
        let folder = p.parent().filter(|f| !f.as_os_str().is_empty())?;
        (named(p) == own::FILE).then(|| folder.to_path_buf())
    };
    paths.iter().filter_map(|p| of_fold(p).or_else(|| own(p))).collect()
}

fn unpack<R: Read + std::io::Seek>(archive: &mut ZipArchive<R>, file: &Path, entry: &Entry, to: &Path) -> Result<()> {
    let refuse =
        |what: String| Error::model(file, format!("zip entry {:?}", short(&entry.path.to_string_lossy())), what);
    let path = to.join(&entry.path);
    let write = |e| Error::io("write", &path, e);
    fs::create_dir_all(path.parent().unwrap_or(to)).map_err(write)?;
    // Of a name that is there already the archive was refused; no file that was there is opened.
    let mut out = BufWriter::with_capacity(1 << 20, File::create_new(&path).map_err(write)?);
    let mut packed = archive.by_index(entry.index).map_err(|e| refuse(one_line(&e.to_string())))?;
    let mut buffer = vec![0; 1 << 20];
    let mut left = entry.bytes;
    loop {
        // One byte more than there may be, so that it is seen; the checksum is looked at where the data end.
        let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX).saturating_add(1));
        let n = packed.read(&mut buffer[..room]).map_err(|e| refuse(one_line(&e.to_string())))?;
        if n == 0 {
            break;
        }
        left = left
            .checked_sub(n as u64)
            .ok_or_else(|| refuse(format!("longer than the {} bytes it says", entry.bytes)))?;
        out.write_all(&buffer[..n]).map_err(write)?;
    }
    if left > 0 {
        return Err(refuse(format!("shorter by {left} than the {} bytes it says", entry.bytes)));
    }
    out.into_inner().map_err(|e| write(e.into_error()))?.sync_all().map_err(write)
}

/// Moves a folder or file to where it belongs, and what is there to `aside`.
fn place(from: &Path, to: &Path, aside: &Path) -> Result<()> {
    let io = |e| Error::io("create", to, e);
    let parent = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io)?;
    let there = to.symlink_metadata().is_ok();
    if there {
        fs::rename(to, aside).map_err(io)?;
    }
    if let Err(e) = fs::rename(from, to) {
        // What cannot go back stays aside; the first error is the one to tell.
        let _ = if there { fs::rename(aside, to) } else { Ok(()) };
        return Err(io(e));
    }
    sync_folder(parent);
    Ok(())
}

/// Undoes [`place`].
fn put_back(to: &Path, aside: &Path) -> std::io::Result<()> {
    if to.is_dir() {
        fs::remove_dir_all(to)?
    } else {
        fs::remove_file(to)?
    }
    if aside.symlink_metadata().is_ok() { fs::rename(aside, to) } else { Ok(()) }
}

/// A file's name in the archive.
fn name_below(root: &Path, path: &Path) -> Result<String> {
    let below = path.strip_prefix(root).unwrap_or(path);
    let parts: Option<Vec<&str>> = below.iter().map(|part| part.to_str()).collect();
    let Some(name) = parts.map(|p| p.join("/")) else {
        return Err(Error::usage(format!("{}: a name that is no UTF-8", path.display())));
    };
    match unfit(&name) {
        Some(what) => Err(Error::usage(format!("{}: a name {what}", path.display()))),
        None => Ok(name),
    }
}

fn named(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Folders in a folder, by name; none where it is none itself.
fn sub_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    listed(folder, |p| p.is_dir())
}

/// Files of results: all but probabilities.
fn plain_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let heavy = |p: &Path| p.extension().is_some_and(|e| e == "npz" || e == "pkl") && named(p) != "postprocessing.pkl";
    listed(folder, |p| p.is_file() && !heavy(p))
}

fn listed(folder: &Path, keep: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let io = |e| Error::io("read", folder, e);
    let paths = fs::read_dir(folder).map_err(io)?.map(|entry| entry.map(|e| e.path()).map_err(io));
    let mut paths: Vec<PathBuf> = paths.collect::<Result<_>>()?;
    paths.retain(|p| keep(p));
    paths.sort();
    Ok(paths)
}

/// The models of `ensemble___A___B___0_1_2_3_4`.
fn members(ensemble: &str) -> Option<Vec<String>> {
    let parts: Vec<&str> = ensemble.split("___").collect();
    let [first, members @ .., _] = parts.as_slice() else { return None };
    (*first == "ensemble" && !members.is_empty()).then(|| members.iter().map(ToString::to_string).collect())
}

/// Whether a model of that name in `parent` is among those to export.
fn has(models: &[PathBuf], parent: &Path, name: &str) -> bool {
    models.iter().filter_map(|m| fs::canonicalize(m).ok()).any(|m| m == parent.join(name))
}
