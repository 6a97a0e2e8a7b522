//! Whole files or none: write to a temporary name, flush, sync, rename.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Bytes collected before they go to the system.
const BUFFER: usize = 256 << 10;

/// Writes the file `path` through `write`, so that afterwards it is either complete and on the disk, or as it was
/// before: the bytes go to a temporary name in the same folder, are flushed and synced, and the name is exchanged last.
///
/// An existing regular file or symbolic link of that name is replaced; the name is used exactly as given.
///
/// # Errors
/// [`Error::Usage`] when `path` names no regular file (a folder, a device), [`Error::Io`] naming `path` when the system
/// refuses (full disk, no permission, no such folder), and any error of `write`. The temporary file is removed.
#[doc(hidden)]
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let temporary = write_beside(path, create, write)?;
    temporary.rename(path).map_err(|e| Error::io("write", path, e))?;
    sync_folder(folder_of(path));
    Ok(())
}

/// As [`write_atomically`]; what had the name before is `previous` afterwards. At every moment there is a whole file of the
/// name, or, on file systems without hard links, of one of the two names. The temporary file has the same name every time,
/// so that what a killed process leaves is overwritten by the next: only one process at a time may write the file.
///
/// # Errors
/// As [`write_atomically`].
pub(crate) fn write_keeping(
    path: &Path,
    previous: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let hidden = |ending: &str| {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(ending);
        path.with_file_name(name)
    };
    let part = |_: &Path| {
        let path = hidden(".part");
        Ok((File::create(&path)?, Temporary { path: Some(path) }))
    };
    let failed = |e| Error::io("write", path, e);
    let temporary = write_beside(path, part, write)?;
    let link = hidden(".link");
    let _ = fs::remove_file(&link);
    if fs::hard_link(path, &link).is_ok() {
        // The new file has its name before the old one takes that of the one before, which may be the only good one.
        temporary.rename(path).map_err(failed)?;
        fs::rename(&link, previous).map_err(failed)?;
    } else {
        if path.exists() {
            fs::rename(path, previous).map_err(failed)?;
        }
        temporary.rename(path).map_err(failed)?;
    }
    sync_folder(folder_of(path));
    Ok(())
}

/// Writes a whole file under the temporary name that `create` makes in the folder of `path`, down to the disk.
fn write_beside(
    path: &Path,
    create: impl FnOnce(&Path) -> std::io::Result<(File, Temporary)>,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<Temporary> {
    if path.file_name().is_none() {
        return Err(Error::usage(format!("cannot write \"{}\": expected the name of a file", path.display())));
    }
    // A rename would put a plain file in the place of a device such as /dev/null.
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return Err(Error::usage(format!("cannot write {}: it exists and is not a regular file", path.display())));
    }
    let failed = |e| Error::io("write", path, e);
    let (file, temporary) = create(folder_of(path)).map_err(failed)?;
    let mut buffered = BufWriter::with_capacity(BUFFER, file);
    write(&mut buffered)?;
    // Dropping a BufWriter would swallow the error of its last bytes: a full disk shows up here for small files.
    buffered.flush().map_err(failed)?;
    buffered.get_ref().sync_all().map_err(failed)?;
    drop(buffered);
    Ok(temporary)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The file is whole by now; file systems that cannot sync a folder are no reason to fail.
fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// A new, empty file with a name of its own in `folder`.
fn create(folder: &Path) -> std::io::Result<(File, Temporary)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        // Not derived from the user's name, which may be as long as the file system allows.
        let path = folder.join(format!(".stunet-{}-{n}.tmp", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, Temporary { path: Some(path) })),
            // Left by a killed process that had the same number.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}

/// Removes the temporary file unless it was renamed; also while unwinding.
struct Temporary {
    path: Option<PathBuf>,
}

impl Temporary {
    fn rename(mut self, to: &Path) -> std::io::Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, to)?;
        }
        self.path = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut n: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        n.sort();
        n
    }

    #[test]
    fn replaces_a_file_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.b.c");
        for text in ["first, longer", "second"] {
            write_atomically(&path, |w| w.write_all(text.as_bytes()).map_err(|e| Error::io("write", &path, e)))
                .unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(names(dir.path()), ["a.b.c"]);
    }

    #[test]
    fn the_previous_file_is_kept_and_what_a_killed_process_left_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (path, previous) = (dir.path().join("a"), dir.path().join("a.previous"));
        for left in [".a.part", ".a.link"] {
            fs::write(dir.path().join(left), "left by a killed process, longer than what comes").unwrap();
        }
        for text in ["1", "2", "3"] {
            write_keeping(&path, &previous, |w| w.write_all(text.as_bytes()).map_err(|e| Error::io("write", &path, e)))
                .unwrap();
        }
        assert_eq!([&path, &previous].map(|p| fs::read_to_string(p).unwrap()), ["3", "2"]);
        assert_eq!(names(dir.path()), ["a", "a.previous"]);
    }

    /// The one before may be the only good one: it goes when the new one has its name, not sooner.
    #[test]
    fn the_new_file_has_its_name_before_the_one_before_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (path, previous) = (dir.path().join("a"), dir.path().join("a.previous"));
        fs::write(&path, "old").unwrap();
        // Nothing can take its name.
        fs::create_dir_all(previous.join("x")).unwrap();
        let write = |text: &'static str| {
            write_keeping(&path, &previous, |w| w.write_all(text.as_bytes()).map_err(|e| Error::io("write", &path, e)))
        };
        write("new").unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }

    #[test]
    fn a_failing_writer_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.nii");
        fs::write(&path, "old").unwrap();
        let e = write_atomically(&path, |w| {
            w.write_all(&[1; 1 << 20]).map_err(|e| Error::io("write", &path, e))?;
            Err(Error::Cancelled)
        });
        assert!(matches!(e, Err(Error::Cancelled)));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(dir.path()), ["x.nii"]);
    }

    #[test]
    fn a_panicking_writer_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.nii");
        let caught = std::panic::catch_unwind(|| write_atomically(&path, |_| panic!("writer")));
        assert!(caught.is_err());
        assert!(names(dir.path()).is_empty());
    }

    /// A file smaller than the buffer meets the full disk only in the last flush.
    #[cfg(target_os = "linux")]
    #[test]
    fn defect_2_a_full_disk_is_an_error_even_for_a_small_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.nii");
        let e = write_atomically(&path, |w| {
            let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
            *w = BufWriter::new(full);
            w.write_all(b"few bytes").map_err(|e| Error::io("write", &path, e))
        })
        .unwrap_err();
        assert!(e.to_string().contains("small.nii"), "{e}");
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn refuses_what_is_not_a_file() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path(), Path::new("/"), Path::new("")] {
            let e = write_atomically(path, |_| Ok(())).unwrap_err();
            assert!(matches!(e, Error::Usage { .. }), "{e}");
        }
        let e = write_atomically(&dir.path().join("no/such/folder.nii"), |_| Ok(())).unwrap_err();
        assert!(matches!(e, Error::Io { .. }) && e.to_string().contains("folder.nii"), "{e}");
    }
}
