//! Any model folder to the project's own.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};

use super::own::{FILE, FORMAT, FoldEntry, Manifest, NOTICE, SourceEntry, VERSION};
use super::{ModelFolder, ModelOptions};
use crate::error::{Error, Result};
use crate::io::weights::{self, Weights};
use crate::tensor::{DType, Precision};

/// Converts a model to the project's own folder: `model.json` and `fold_NAME.safetensors`, tensor names and element
/// types kept (f64 becomes f32, the type of all arithmetic) unless the options ask for a precision. Tensors go one by one from the mapped source to the file.
///
/// The folder is written under a temporary name beside `dst` and renamed when complete.
///
/// # Errors
/// [`Error::Usage`] when `dst` exists and is not an empty folder; whatever [`ModelFolder::open`] says; [`Error::Model`]
/// when a weight is NaN or infinite; [`Error::Io`].
pub fn convert(src: impl AsRef<Path>, dst: impl AsRef<Path>, options: &ModelOptions) -> Result<()> {
    // Before the source, which may take long to open.
    check_free(dst.as_ref())?;
    ModelFolder::open(src, options)?.write_as(dst, options.precision)
}

impl ModelFolder {
    /// Writes the model as a folder of the project's own; see [`convert`].
    ///
    /// # Errors
    /// As [`convert`].
    pub fn write(&self, dst: impl AsRef<Path>) -> Result<()> {
        self.write_as(dst, None)
    }

    fn write_as(&self, dst: impl AsRef<Path>, precision: Option<Precision>) -> Result<()> {
        let dst = dst.as_ref();
        check_free(dst)?;
        let temporary = Temporary::beside(dst)?;
        // Each tensor once, by its first name.
        let names: Vec<String> = self.architecture.tensors().into_iter().map(|(name, _)| name).collect();
        let mut folds = Vec::new();
        for fold in &self.folds {
            let file = format!("fold_{}.safetensors", fold.name);
            let sha256 = write_safetensors(&fold.weights, &names, precision, &temporary.path.join(&file))?;
            folds.push(FoldEntry { name: fold.name.clone(), file, sha256 });
        }
        let root = self.sources.first().and_then(|p| p.parent()).unwrap_or(Path::new(""));
        let sources = self.sources.iter().map(|path| {
            let sha256 = weights::sha256(&weights::map_file(path)?);
            Ok(SourceEntry { file: source_name(path, root), sha256 })
        });
        let manifest = Manifest {
            format: FORMAT.into(),
            version: VERSION,
            notice: NOTICE.into(),
            architecture: self.architecture.clone(),
            plan: self.plan.clone(),
            folds,
            sources: sources.collect::<Result<_>>()?,
        };
        let path = temporary.path.join(FILE);
        let mut text = serde_json::to_string_pretty(&manifest).map_err(|e| Error::io("write", &path, e.into()))?;
        text.push('\n');
        write(&path, |f| f.write_all(text.as_bytes()))?;
        temporary.rename(dst)
    }
}

/// The name of a file within its model, "fold_0/checkpoint_final.pth": enough to recognise it, no private folders.
fn source_name(path: &Path, root: &Path) -> String {
    let parts = if path.parent() == Some(root) { 1 } else { 2 };
    let names: Vec<Cow<'_, str>> = path.iter().rev().take(parts).map(|p| p.to_string_lossy()).collect();
    names.into_iter().rev().collect::<Vec<_>>().join("/")
}

fn check_free(dst: &Path) -> Result<()> {
    match fs::read_dir(dst) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::usage(format!("{}: exists and is not empty", dst.display()))),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(_) => Err(Error::usage(format!("{}: exists and is no folder", dst.display()))),
    }
}

/// A folder that is removed again unless it is renamed.
pub(super) struct Temporary {
    pub(super) path: PathBuf,
}

impl Temporary {
    pub(super) fn beside(dst: &Path) -> Result<Self> {
        let Some(name) = dst.file_name() else {
            return Err(Error::usage(format!("{}: expected the name of a new folder", dst.display())));
        };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = loop {
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}-{}.part", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
            let path = dst.with_file_name(hidden);
            match fs::create_dir(&path) {
                Ok(()) => break path,
                // Left by a killed process that had the same number.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io("create", &path, e)),
            }
        };
        Ok(Self { path })
    }

    fn rename(self, dst: &Path) -> Result<()> {
        let io = |e| Error::io("create", dst, e);
        sync_folder(&self.path);
        match fs::remove_dir(dst) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
            _ => {}
        }
        fs::rename(&self.path, dst).map_err(io)?;
        sync_folder(dst.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")));
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After the rename there is nothing of this name. A failure to tidy up must not hide the first error.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Makes renames durable where the system can; not all can open a folder.
pub(super) fn sync_folder(path: &Path) {
    if let Ok(f) = File::open(path) {
        let _ = f.sync_all();
    }
}

fn write(path: &Path, f: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    let io = |e| Error::io("write", path, e);
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(io)?);
    f(&mut file).map_err(io)?;
    file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)
}

/// Writes the named tensors, sorted, and returns the file's SHA-256.
fn write_safetensors(weights: &Weights, names: &[String], precision: Option<Precision>, path: &Path) -> Result<String> {
    // The format asks for offsets without gaps; widest types first keeps every tensor aligned.
    let mut order: Vec<(&str, Dtype)> = names.iter().map(|n| (n.as_str(), dtype(weights, n, precision))).collect();
    order.sort_by_key(|&(name, dtype)| (std::cmp::Reverse(dtype.bitsize()), name));
    let mut at = 0;
    let mut table = Vec::new();
    for &(name, dtype) in &order {
        let shape = weights.shape(name).unwrap_or_default().to_vec();
        let bytes = shape.iter().product::<usize>() * (dtype.bitsize() / 8);
        table.push((name.to_string(), TensorInfo { dtype, shape, data_offsets: (at, at + bytes) }));
        at += bytes;
    }
    let bad = |e: String| Error::model(weights.path(), "state_dict", e);
    let metadata = Metadata::new(None, table).map_err(|e| bad(e.to_string()))?;
    let mut header = serde_json::to_string(&metadata).map_err(|e| bad(e.to_string()))?.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut hash = Sha256::new();
    let mut failed = None;
    write(path, |file| {
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            file.write_all(bytes)
        };
        put(&(header.len() as u64).to_le_bytes())?;
        put(&header)?;
        for &(name, dtype) in &order {
            match tensor(weights, name, dtype) {
                Ok(bytes) => put(&bytes)?,
                Err(e) => {
                    failed = Some(e);
                    return Ok(());
                }
            }
        }
        Ok(())
    })?;
    match failed {
        Some(e) => Err(e),
        None => Ok(weights::hex(&hash.finalize())),
    }
}

fn dtype(weights: &Weights, name: &str, precision: Option<Precision>) -> Dtype {
    match (precision, weights.dtype(name)) {
        (Some(Precision::F16), _) | (None, Some(DType::F16)) => Dtype::F16,
        (Some(Precision::Bf16), _) | (None, Some(DType::Bf16)) => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// The bytes to write. Going through the values refuses what is not finite.
fn tensor<'w>(weights: &'w Weights, name: &str, dtype: Dtype) -> Result<Cow<'w, [u8]>> {
    let values = weights.values(name)?;
    let is_same = matches!(
        (dtype, weights.dtype(name)),
        (Dtype::F32, Some(DType::F32)) | (Dtype::F16, Some(DType::F16)) | (Dtype::BF16, Some(DType::Bf16))
    );
    if is_same {
        return weights.bytes(name);
    }
    // Rounding must not make infinities of large weights.
    let finite = |is: bool| if is { Ok(()) } else { Err(Error::model(weights.path(), name, "too large for float16")) };
    Ok(Cow::Owned(match dtype {
        Dtype::F16 => {
            let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            finite(halves.iter().all(|v| v.is_finite()))?;
            halves.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }))
}
