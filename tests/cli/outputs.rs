//! What a prediction writes besides the segmentation, and when it refuses to.

use std::path::{Path, PathBuf};

use serde_json::Value;
use stunet::nnunet::cases::Case;
use stunet::nnunet::dataset::Reader;
use stunet::{Device, Error, Event, Flow, Mode, PredictOptions, Predictor, io};

use crate::common::binary::{Ran, stunet_in, tree};
use crate::common::files::nifti;
use crate::common::nnunet::Model;

/// A folder with a tiny model and one image.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        Model::ct().write(&bench.path("model"), &["fold_0"]);
        bench.image("a_0000.nii");
        bench
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: impl AsRef<Path>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, nifti([12, 11, 10])).unwrap();
    }

    /// `stunet predict` with the tiny model and more.
    fn predict(&self, more: &[&str]) -> Ran {
        stunet_in(self.dir.path(), &[&["predict", "-m", "model", "--no-tta", "--device", "cpu"], more].concat())
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Makes the model one of nnU-Net v1.
    fn turn_to_v1(&self) {
        stunet_in(self.dir.path(), &["convert", "model", "own"]).ok();
        let mut manifest = self.json("own/model.json");
        manifest["plan"]["rules"] = "nnunet_v1".into();
        std::fs::write(self.path("own/model.json"), manifest.to_string()).unwrap();
        std::fs::remove_dir_all(self.path("model")).unwrap();
        std::fs::rename(self.path("own"), self.path("model")).unwrap();
    }

    /// Name, NumPy header and bytes of the numbers of the only array in an archive.
    fn array(&self, name: &str) -> (String, String, usize) {
        let mut zip = zip::ZipArchive::new(std::fs::File::open(self.path(name)).unwrap()).unwrap();
        assert_eq!(zip.len(), 1);
        let mut entry = zip.by_index(0).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        assert!(bytes.starts_with(b"\x93NUMPY\x01\x00"));
        let head = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        let header = String::from_utf8(bytes[10..head].to_vec()).unwrap();
        (entry.name().unwrap().into_owned(), header, bytes.len() - head)
    }
}

#[test]
fn probabilities_picture_and_report() {
    let bench = Bench::new();
    let more = ["-i", "a_0000.nii", "-o", "o.nii.gz", "--save-probabilities", "--preview", "o.png", "--json"];
    let ran = bench.predict(&more);
    let report: Value = serde_json::from_str(ran.ok()).unwrap();
    assert_eq!(report["cases"][0]["outcome"], "done");
    assert_eq!(report["interrupted"], false);
    let outputs = report["cases"][0]["outputs"].as_array().unwrap();
    let paths: Vec<_> = outputs.iter().map(|o| o["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["o.nii.gz", "o.npz", "o.png", "o.pkl"]);
    assert!(std::fs::read(bench.path("o.png")).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    let (name, header, bytes) = bench.array("o.npz");
    assert_eq!(name, "probabilities.npy");
    assert!(header.contains("'<f4'") && header.contains("(3, 10, 11, 12)"), "{header}");
    assert_eq!(bytes, 4 * 3 * 10 * 11 * 12);
}

/// nnU-Net v1 calls them softmax and stores half precision.
#[test]
fn precision_is_an_option_that_the_report_names() {
    let bench = Bench::new();
    for (more, expected) in [(&[][..], "f32"), (&["--precision", "bf16"], "bf16")] {
        let ran = bench.predict(&[&["-i", "a_0000.nii", "-o", "o.nii.gz", "--json"], more].concat());
        let report: Value = serde_json::from_str(ran.ok()).unwrap();
        assert_eq!(report["model"]["precision"], expected);
    }
}

#[test]
fn probabilities_of_v1_models() {
    let bench = Bench::new();
    bench.turn_to_v1();
    bench.predict(&["-i", "a_0000.nii", "-o", "o.nii", "--save-probabilities"]).ok();
    let (name, header, bytes) = bench.array("o.npz");
    assert_eq!(name, "softmax.npy");
    assert!(header.contains("'<f2'") && header.contains("(3, 10, 11, 12)"), "{header}");
    assert_eq!(bytes, 2 * 3 * 10 * 11 * 12);
    bench.predict(&["-i", "a_0000.nii", "-o", "fast.nii", "--mode", "fast"]).ok();
}

#[test]
fn two_outputs_of_one_name_are_refused() {
    let bench = Bench::new();
    bench.image("in/a_0000.nii");
    std::fs::create_dir(bench.path("there")).unwrap();
    let single = ["-i", "a_0000.nii", "-o", "o.nii"];
    let cohort = ["-i", "in", "-o", "out"];
    let lines: [(&[&str], &[&str]); 6] = [
        (&single, &["--report", "o.nii"]),
        (&single, &["--report", "./there/../o.nii"]),
        (&single, &["--preview", "o.nii"]),
        (&single, &["--preview", "p.png", "--report", "p.png"]),
        (&single, &["--save-probabilities", "--report", "o.npz"]),
        (&cohort, &["--report", "out/a.nii.gz"]),
    ];
    let before = tree(bench.dir.path());
    for (how, more) in lines {
        let ran = bench.predict(&[how, more].concat());
        assert!(ran.error(2).contains("two outputs"), "{more:?}: {}", ran.err);
    }
    assert_eq!(tree(bench.dir.path()), before);
}

#[test]
fn options_that_are_wrong_for_the_model_end_the_run_at_once() {
    let bench = Bench::new();
    bench.image("in/a_0000.nii");
    let ran = bench.predict(&["-i", "in", "-o", "out", "--mode", "fast"]);
    assert!(ran.error(2).contains("v1"), "{}", ran.err);
    assert!(!bench.path("out").exists());
    let mut predictor = Predictor::open(bench.path("model"), &Device::cpu()).unwrap();
    assert!(predictor.validate().is_ok());
    predictor = predictor.options(PredictOptions::default().mode(Mode::Fast));
    assert!(matches!(predictor.validate(), Err(Error::Usage { .. })));
    let image = io::read_nifti(&[bench.path("a_0000.nii")]).unwrap();
    assert!(matches!(predictor.predict(&image), Err(Error::Usage { .. })));
}

#[test]
fn too_little_memory_is_code_5_and_the_report_says_so() {
    let bench = Bench::new();
    let ran = bench.predict(&["-i", "a_0000.nii", "-o", "o.nii", "--memory-limit", "1MB", "--report", "r.json"]);
    assert!(ran.error(5).contains("1000000"), "{}", ran.err);
    assert!(!bench.path("o.nii").exists());
    let report = bench.json("r.json");
    assert_eq!(report["cases"][0]["outcome"], "failed");
    assert!(report["cases"][0]["error"].as_str().unwrap().contains("memory"), "{report}");
}

#[test]
fn the_callback_can_cancel() {
    let bench = Bench::new();
    let image = io::read_nifti(&[bench.path("a_0000.nii")]).unwrap();
    let mut predictor = Predictor::open(bench.path("model"), &Device::cpu()).unwrap();
    let mut at = |wanted: fn(&Event<'_>) -> bool| {
        let mut stop = move |e: Event<'_>| if wanted(&e) { Flow::Cancel } else { Flow::Continue };
        predictor.predict_with(&image, &mut stop).map(|_| ())
    };
    assert!(matches!(at(|e| matches!(e, Event::Stage("preprocess"))), Err(Error::Cancelled)));
    assert!(matches!(at(|e| matches!(e, Event::Tiles { .. })), Err(Error::Cancelled)));
    assert!(at(|_| false).is_ok());
}

#[test]
fn parts_share_a_folder_and_its_report_may_lie_in_the_new_one() {
    let bench = Bench::new();
    ["a", "b", "c"].iter().for_each(|n| bench.image(format!("in/{n}_0000.nii")));
    let part = |k: &str| {
        let more = ["-i", "in", "-o", "out", "--num-parts", "2", "--part-id", k, "--report"];
        let report = format!("out/run{k}.json");
        bench.predict(&[&more[..], &[report.as_str()]].concat()).ok().to_owned()
    };
    assert_eq!(part("0"), "out/a.nii.gz\nout/c.nii.gz\nout/run0.json\n");
    assert_eq!(part("1"), "out/b.nii.gz\nout/run1.json\n");
}

#[test]
fn files_that_belong_to_no_case_are_named() {
    let bench = Bench::new();
    bench.image("in/a_0000.NII");
    std::fs::write(bench.path("in/other_0000.nrrd"), "x").unwrap();
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        std::fs::write(bench.path("in").join(std::ffi::OsStr::from_bytes(b"b\xff_0000.nii")), "x").unwrap();
    }
    let ran = bench.predict(&["-i", "in", "-o", "out", "--report", "r.json"]);
    assert!(ran.ok().starts_with("out/a.nii.gz\n"), "{}", ran.out);
    let ignored = bench.json("r.json")["ignored"].as_array().unwrap().len();
    assert_eq!(ignored, ran.err.lines().filter(|l| l.contains("not used")).count());
    assert_eq!(ignored, if cfg!(target_os = "linux") { 2 } else { 1 });
    assert!(ran.err.contains("other_0000.nrrd"), "{}", ran.err);
}

#[test]
fn only_all_that_was_asked_for_is_complete() {
    let bench = Bench::new();
    bench.image("in/a_0000.nii");
    let again =
        |more: &[&str]| bench.predict(&[&["-i", "in", "-o", "out", "--continue"], more].concat()).ok().to_owned();
    assert_eq!(again(&[]), "out/a.nii.gz\n");
    assert_eq!(again(&[]), "");
    assert_eq!(again(&["--save-probabilities"]), "out/a.nii.gz\nout/a.npz\nout/a.pkl\n");
    assert_eq!(again(&["--save-probabilities"]), "");
    // Another image of the same name and shape, elsewhere in space.
    let moved = crate::common::files::with(nifti([12, 11, 10]), 280 + 12, &7f32.to_le_bytes());
    std::fs::write(bench.path("in/a_0000.nii"), moved).unwrap();
    let case = Case::from_files(&[bench.path("in/a_0000.nii")]).unwrap();
    assert!(!case.is_complete(&bench.path("out/a.nii.gz"), Reader::SimpleItkIo));
    assert_eq!(again(&[]), "out/a.nii.gz\n");
}

#[test]
fn inspect_and_convert_take_folds_and_checkpoints() {
    let bench = Bench::new();
    let run = |args: &[&str]| stunet_in(bench.dir.path(), args);
    run(&["inspect", "model", "-f", "0", "-chk", "checkpoint_final.pth"]).ok();
    assert!(run(&["inspect", "model", "-f", "3"]).error(2).contains('3'));
    assert_ne!(run(&["convert", "model", "own", "-chk", "checkpoint_best.pth"]).code, 0);
    run(&["convert", "model", "own", "-f", "0", "--checkpoint", "checkpoint_final"]).ok();
}

/// Ctrl-C in a folder of images: the report says how far the run came.
#[cfg(unix)]
#[test]
fn an_interrupted_cohort_still_has_its_report() {
    use std::process::{Command, Stdio};
    let bench = Bench::new();
    (0..80).for_each(|i| bench.image(format!("in/case{i:02}_0000.nii")));
    let mut child = Command::new(env!("CARGO_BIN_EXE_stunet"))
        .args(["predict", "-m", "model", "-i", "in", "-o", "out", "--report", "r.json", "--threads", "1"])
        .args(["--device", "cpu"])
        .current_dir(bench.dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !bench.path("out/case00.nii.gz").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended early");
        std::thread::yield_now();
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(130), &b"error: cancelled\n"[..]));
    let report = bench.json("r.json");
    assert_eq!(report["interrupted"], true);
    let cases = report["cases"].as_array().unwrap();
    assert!((1..80).contains(&cases.len()) && cases.iter().all(|c| c["outcome"] == "done"), "{report}");
}
