//! Damaged, hostile and contradictory files: each ends in one line that names the file and what is wrong with it, the
//! right exit code, and nothing written.

mod images;
mod models;

use std::path::{Path, PathBuf};

use crate::common::binary::{stunet_in, tree};
use crate::common::files;
use crate::common::nnunet::Model;

/// A folder with a model and an image that work.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        Model::ct().write(&bench.path("model"), &["fold_0"]);
        std::fs::write(bench.path("good.nii"), files::nifti([12, 11, 10])).unwrap();
        std::fs::create_dir(bench.path("out")).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Predicts with `model` on `images`; expects the exit code, a line with all of `mentions`, and an unchanged disk.
    #[track_caller]
    fn refused(&self, what: &str, model: &str, images: &[&str], code: i32, mentions: &[&str]) {
        let before = snapshot(self.dir.path());
        let args = [&["predict", "-m", model, "-o", "out/seg.nii.gz", "--device", "cpu", "-i"], images].concat();
        let ran = stunet_in(self.dir.path(), &args);
        let line = ran.error(code);
        for m in mentions {
            assert!(line.contains(m), "{what}: no {m:?} in: {line}");
        }
        assert!(ran.out.is_empty(), "{what}: {}", ran.out);
        assert!(line.len() < 1000, "{what}: {} characters", line.len());
        assert_eq!(before, snapshot(self.dir.path()), "{what}: files were left or changed");
    }
}

/// Names and sizes of all files: a hostile file that ran would leave its mark here.
fn snapshot(folder: &Path) -> Vec<(PathBuf, u64)> {
    tree(folder).into_iter().map(|p| (p.clone(), std::fs::metadata(&p).unwrap().len())).collect()
}

#[test]
fn the_unspoilt_model_and_image_work() {
    let bench = Bench::new();
    let args = ["predict", "-m", "model", "-i", "good.nii", "-o", "out/seg.nii.gz", "--no-tta"];
    assert_eq!(stunet_in(bench.dir.path(), &args).ok(), "out/seg.nii.gz\n");
    stunet_in(bench.dir.path(), &["convert", "model", "own"]).ok();
    let args = ["predict", "-m", "own", "-i", "good.nii", "-o", "out/own.nii.gz", "--no-tta"];
    stunet_in(bench.dir.path(), &args).ok();
    let read = |n: &str| std::fs::read(bench.path(n)).unwrap();
    assert_eq!(read("out/seg.nii.gz"), read("out/own.nii.gz"));
    assert!(stunet_in(bench.dir.path(), &["inspect", "own"]).ok().contains("liver"));
}

/// One bad case does not stop the others; the exit code and a last line say which failed.
#[test]
fn a_cohort_goes_on_after_a_bad_case() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("in")).unwrap();
    let good = files::nifti([12, 11, 10]);
    for (name, bytes) in [("a", &good[..]), ("b", &good[..500]), ("c", &good[..])] {
        std::fs::write(bench.path(&format!("in/{name}_0000.nii")), bytes).unwrap();
    }
    std::fs::write(bench.path("in/d_0001.nii"), &good).unwrap();
    let args = ["predict", "-m", "model", "-i", "in", "-o", "out", "--no-tta", "--report", "run.json"];
    let ran = stunet_in(bench.dir.path(), &args);
    assert_eq!(ran.code, 6, "{}", ran.err);
    assert!(ran.err.ends_with("error: 2 of 4 cases failed: b, d\n"), "{}", ran.err);
    assert!(ran.err.contains("b_0000.nii") && ran.err.contains("d_0001.nii"), "{}", ran.err);
    assert!(bench.path("out/a.nii.gz").exists() && bench.path("out/c.nii.gz").exists());
    assert!(!bench.path("out/b.nii.gz").exists() && !bench.path("out/d.nii.gz").exists());
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(bench.path("run.json")).unwrap()).unwrap();
    let outcomes: Vec<&str> =
        report["cases"].as_array().unwrap().iter().map(|c| c["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["done", "failed", "done", "failed"]);
    assert!(report["notice"].as_str().unwrap().contains("Not a medical device"));

    // Repaired, and one result cut short by a killed run: only those two are done again.
    std::fs::write(bench.path("in/b_0000.nii"), &good).unwrap();
    std::fs::remove_file(bench.path("in/d_0001.nii")).unwrap();
    let whole = std::fs::read(bench.path("out/a.nii.gz")).unwrap();
    std::fs::write(bench.path("out/a.nii.gz"), &whole[..whole.len() / 2]).unwrap();
    let ran =
        stunet_in(bench.dir.path(), &["predict", "-m", "model", "-i", "in", "-o", "out", "--no-tta", "--continue"]);
    assert_eq!(ran.ok(), "out/a.nii.gz\nout/b.nii.gz\n");
    assert_eq!(std::fs::read(bench.path("out/a.nii.gz")).unwrap(), whole);
}
