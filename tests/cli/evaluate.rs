//! `stunet evaluate` and `stunet postprocess`.

use std::path::Path;

use stunet::io::{self, Geometry, LabelData, Segmentation};

use crate::common::binary::{stunet, stunet_in};

fn write(path: &Path, labels: &[u8]) {
    let geometry = Geometry::new([1, 2, labels.len() / 2], [1.0; 3]);
    let seg = Segmentation::new(LabelData::U8(labels.to_vec()), geometry, Vec::new()).unwrap();
    io::write_nifti(path, &seg).unwrap();
}

const DATASET: &str = r#"{"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b<i>": 2},
                         "numTraining": 2, "file_ending": ".nii.gz"}"#;

/// Two truths with their predictions, of which one has a speck.
fn folders() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for sub in ["truth", "found"] {
        std::fs::create_dir(dir.path().join(sub)).unwrap();
    }
    let at = |name: &str| dir.path().join(name);
    write(&at("truth/p1.nii.gz"), &[1, 1, 2, 0, 0, 0, 1, 1, 2, 0, 0, 0]);
    write(&at("found/p1.nii.gz"), &[1, 1, 2, 0, 0, 1, 1, 1, 2, 0, 0, 0]);
    for sub in ["truth", "found"] {
        write(&at(&format!("{sub}/p2.nii.gz")), &[1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]);
    }
    std::fs::write(at("found/dataset.json"), DATASET).unwrap();
    dir
}

#[test]
fn a_folder_is_compared_and_post_processed() {
    let dir = folders();
    let ran = stunet_in(dir.path(), &["evaluate", "truth", "found", "--threads", "2"]);
    let out = ran.ok();
    for file in ["summary.json", "summary.csv", "summary.html"] {
        assert!(out.lines().any(|l| l == format!("found/{file}")), "{out}");
        assert!(dir.path().join("found").join(file).is_file());
    }
    assert!(out.contains("surface Dice 1 mm") && out.contains("mean Dice 0.9722"), "{out}");
    let page = std::fs::read_to_string(dir.path().join("found/summary.html")).unwrap();
    assert!(page.contains("b&lt;i&gt;") && !page.contains("b<i>"));
    // nnU-Net's commands as they stand.
    let theirs =
        ["evaluate", "truth", "found", "-djfile", "found/dataset.json", "-pfile", "p.json", "-o", "out/s.json"];
    let ran = stunet_in(dir.path(), &theirs);
    assert!(ran.ok().ends_with("out/s.json\nout/s.csv\nout/s.html\n"), "{}", ran.out);
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(read("out/s.json"), read("found/summary.json"));
    let simple = ["evaluate", "truth", "found", "-l", "1", "2", "-il", "9", "-o", "simple.json", "--summary-only"];
    assert!(stunet_in(dir.path(), &simple).ok().ends_with("simple.json\n"));
    assert_eq!(read("simple.json"), read("found/summary.json"));
    assert!(!dir.path().join("simple.csv").exists());

    let ran = stunet_in(dir.path(), &["postprocess", "determine", "-i", "found", "-ref", "truth"]);
    assert!(ran.ok().contains("largest component of all foreground [1, 2]"), "{}", ran.out);
    let apply = ["postprocess", "apply", "-i", "found", "-o", "clean", "-pp_pkl_file", "found/postprocessing.pkl"];
    let ran = stunet_in(dir.path(), &apply);
    assert_eq!(ran.ok(), "clean/p1.nii.gz\nclean/p2.nii.gz\n");
    let labels = |name: &str| io::read_segmentation(dir.path().join(name)).unwrap().labels;
    for case in ["p1", "p2"] {
        assert_eq!(labels(&format!("clean/{case}.nii.gz")), labels(&format!("truth/{case}.nii.gz")));
        assert_eq!(labels(&format!("found/postprocessed/{case}.nii.gz")), labels(&format!("truth/{case}.nii.gz")));
    }
}

#[test]
fn what_is_missing_or_does_not_fit_is_one_line() {
    let dir = folders();
    let at = |name: &str| dir.path().join(name);
    let fails = |args: &[&str], code: i32, parts: &[&str]| {
        let ran = stunet_in(dir.path(), args);
        let line = ran.error(code);
        parts.iter().for_each(|p| assert!(line.contains(p), "{line}: {p}"));
    };
    fails(&["evaluate", "none", "found"], 3, &["none: folder: no such folder"]);
    fails(&["evaluate", "found", "truth"], 2, &["truth/dataset.json: missing", "-l"]);
    fails(&["evaluate", "truth", "found", "--tolerance=-1"], 2, &["tolerance"]);
    // Asked for twice, counted once.
    let rows = |labels: &[&str]| {
        let args = [&["evaluate", "truth", "found", "--summary-only", "-l"], labels].concat();
        stunet_in(dir.path(), &args).ok().to_owned()
    };
    assert_eq!(rows(&["1", "1", "2"]), rows(&["1", "2"]));
    fails(&["evaluate", "truth", "found", "-o", "summary"], 2, &[".json"]);
    fails(&["evaluate", "truth", "found", "-il", "3"], 2, &["--labels"]);
    fails(&["evaluate", "truth", "found", "--images", "truth"], 3, &["truth/p1_0000.nii.gz: image: missing"]);
    write(&at("truth/p3.nii.gz"), &[0; 12]);
    fails(&["evaluate", "truth", "found"], 3, &["truth/p3.nii.gz: prediction: missing", "found/p3.nii.gz", "--chill"]);
    stunet_in(dir.path(), &["evaluate", "truth", "found", "--chill"]).ok();
    write(&at("found/p3.nii.gz"), &[0; 8]);
    fails(
        &["evaluate", "truth", "found"],
        3,
        &["found/p3.nii.gz", "[1, 2, 4]", "expected [1, 2, 6]", "truth/p3.nii.gz"],
    );
    std::fs::remove_file(at("truth/p3.nii.gz")).unwrap();
    fails(&["evaluate", "truth", "found"], 3, &["found/p3.nii.gz: truth: missing", "truth/p3.nii.gz"]);
    std::fs::write(at("found/p3.nii.gz"), b"no image").unwrap();
    std::fs::write(at("truth/p3.nii.gz"), b"no image").unwrap();
    fails(&["evaluate", "truth", "found"], 3, &["truth/p3.nii.gz"]);
    let apply = ["postprocess", "apply", "-i", "found", "-o", "clean", "--steps"];
    fails(&[&apply[..], &["found/dataset.json"]].concat(), 4, &["found/dataset.json", "postprocessing_fns"]);
    fails(&[&apply[..], &["found/none.pkl"]].concat(), 1, &["found/none.pkl"]);
}

#[test]
fn help_of_the_actions_fits_the_screen() {
    for args in
        [&["postprocess", "--help"][..], &["postprocess", "determine", "--help"], &["postprocess", "apply", "-h"]]
    {
        let ran = stunet(args);
        assert!(ran.ok().lines().all(|l| l.chars().count() <= 80) && ran.out.contains("Example"), "{}", ran.out);
    }
}
