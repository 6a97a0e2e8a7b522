//! The command line: arguments, help, streams, exit codes.

mod bench;
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod cuda;
mod demo;
mod evaluate;
mod integration;
mod outputs;
#[cfg(feature = "natural")]
mod planar;
mod train;

use std::path::Path;

use crate::common::binary::{stunet, stunet_in, stunet_with, tree};
use stunet::io::{self, Geometry, Image, LabelData, Segmentation};
use stunet::nnunet::cases;
use stunet::nnunet::dataset::Reader;

/// A small image of one channel.
fn image(path: &Path) {
    let geometry = Geometry::new([4, 5, 6], [2.0, 1.0, 1.0]);
    let image = Image::new(vec![(0..120).map(|i| i as f32).collect()], geometry).unwrap();
    io::write_image(path, &image).unwrap();
}

#[test]
fn help_fits_the_screen_and_says_what_it_has_to() {
    let commands = [
        "",
        "predict",
        "demo",
        "convert",
        "export",
        "import",
        "inspect",
        "label-systems",
        "info",
        "bench",
        "completions",
        "train",
        "phantoms",
        "evaluate",
        "select",
    ];
    for command in commands {
        for flag in ["--help", "-h"] {
            let args: Vec<&str> = [command, flag].into_iter().filter(|a| !a.is_empty()).collect();
            let ran = stunet(&args);
            for line in ran.ok().lines() {
                assert!(line.chars().count() <= 80, "{command} {flag}: {line}");
            }
            assert!(ran.err.is_empty());
            assert!(ran.out.contains("Example"), "{command} {flag}");
        }
    }
    let help = stunet(&["--help"]).out;
    for needed in ["Examples:", "stunet predict -m", "Not a medical device", "Exit codes:", "130", "bad image"] {
        assert!(help.contains(needed), "{needed}");
    }
    let predict = stunet(&["predict", "--help"]).out;
    for option in ["--folds", "--step-size", "--no-tta", "--num-parts", "--continue", "--memory-limit", "--report"] {
        assert!(predict.contains(option), "{option}");
    }
}

#[test]
fn version_info_and_completions() {
    assert_eq!(stunet(&["--version"]).ok(), format!("stunet {}\n", env!("CARGO_PKG_VERSION")));
    let info = stunet(&["info"]);
    for field in ["processor", "kernels", "threads", "memory", "cuda"] {
        assert!(info.ok().lines().any(|l| l.starts_with(field)), "{}", info.out);
    }
    let json: serde_json::Value = serde_json::from_str(stunet(&["info", "--json"]).ok()).unwrap();
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    assert!(json["threads"].as_u64().unwrap() > 0 && json["cuda"]["status"].is_string());
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(stunet(&["completions", shell]).ok().contains("memory-limit"), "{shell}");
    }
}

#[test]
fn wrong_usage_is_one_line_and_code_2() {
    let dir = tempfile::tempdir().unwrap();
    image(&dir.path().join("a_0000.nii.gz"));
    let p = ["predict", "-m", "model", "-i", "a_0000.nii.gz", "-o", "out.nii.gz"];
    let with = |more: &[&'static str]| [&p[..], more].concat();
    let lines: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "stunet --help"),
        (vec!["segment"], "segment"),
        (vec!["predict"], "--output"),
        (vec!["predict", "-i", "a_0000.nii.gz", "-o", "x.nii.gz"], "--model"),
        (with(&["--dvice", "cpu"]), "--device"),
        (with(&["--device", "gpu"]), "cuda:N"),
        (with(&["--device", "mps"]), "cuda:N"),
        (with(&["--threads", "0"]), "--threads"),
        (with(&["--threads", "many"]), "--threads"),
        (with(&["--step-size", "0"]), "up to 1"),
        (with(&["--step-size", "nan"]), "up to 1"),
        (with(&["-step_size", "1.5"]), "up to 1"),
        (with(&["--memory-limit", "much"]), "4GiB"),
        (with(&["--mode", "slow"]), "fastest"),
        (with(&["--folds", "first"]), "all"),
        (with(&["--part-id", "1"]), "folder"),
        (with(&["-d", "4", "-c", "3d_fullres"]), "--model"),
        (with(&["-t", "Task101"]), "-m"),
        (with(&["--report", "no/such/folder/r.json"]), "folder does not exist"),
        (with(&["--report", "a_0000.nii.gz"]), "also an input"),
        (vec!["predict", "-m", "model", "-i", "a_0000.nii.gz", "-o", "a_0000.nii.gz"], "also an input"),
        (vec!["predict", "-m", "model", "-i", "a_0000.nii.gz", "-o", "./a_0000.nii.gz"], "also an input"),
        (vec!["predict", "-m", "model", "-i", "a_0000.nii.gz", "-o", "out.txt"], ".nii.gz"),
        (vec!["predict", "-m", "model", "-i", "a_0000.nii.gz", "-o", "none/out.nii"], "folder does not exist"),
        (vec!["predict", "-m", "model", "-i", ".", "-o", "."], "input folder"),
        (vec!["predict", "-m", "model", "-i", ".", "-o", "out.nii.gz"], "has to be one"),
        (vec!["predict", "-m", "model", "-i", ".", "-o", "o", "--num-parts", "2", "--part-id", "2"], "part id"),
        (vec!["predict", "-m", "model", "-i", ".", "-o", "o", "--num-parts", "0"], "part id"),
        (vec!["predict", "-m", "model", "-i", ".", "a_0000.nii.gz", "-o", "o"], "several inputs"),
        (vec!["predict", "-d", "4", "-c", "3d_fullres", "-i", "a_0000.nii.gz", "-o", "o.nii"], "nnUNet_results"),
        (vec!["completions", "tcsh"], "bash"),
        (vec!["convert", "only_one"], "<DST>"),
    ];
    for (args, expected) in lines {
        let ran = stunet_in(dir.path(), &args);
        let e = ran.error(2);
        assert!(e.contains(expected), "{args:?}: {e}");
        assert!(ran.out.is_empty(), "{args:?}: {}", ran.out);
    }
    assert_eq!(tree(dir.path()), [dir.path().join("a_0000.nii.gz")]);
}

#[test]
fn an_explicit_gpu_that_cannot_be_used_is_code_5_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    image(&dir.path().join("a.nii"));
    for device in ["cuda", "cuda:7"] {
        let ran = stunet_in(dir.path(), &["predict", "-m", "m", "-i", "a.nii", "-o", "o.nii", "-device", device]);
        assert!(ran.error(5).contains("cannot be used: "), "{}", ran.err);
    }
}

#[test]
fn a_missing_model_is_code_4_and_a_missing_image_code_3() {
    let dir = tempfile::tempdir().unwrap();
    image(&dir.path().join("a.nii"));
    let ran = stunet_in(dir.path(), &["predict", "-m", "absent", "-i", "a.nii", "-o", "o.nii"]);
    assert!(ran.error(4).contains("absent"), "{}", ran.err);
    let ran = stunet_in(dir.path(), &["predict", "-m", "absent", "-i", "b.nii", "-o", "o.nii"]);
    assert!(ran.error(3).contains("b.nii"), "{}", ran.err);
    assert_eq!(tree(dir.path()).len(), 1);
}

#[test]
fn models_are_found_by_nnunets_names() {
    let dir = tempfile::tempdir().unwrap();
    image(&dir.path().join("a.nii"));
    let results = dir.path().join("results");
    for model in ["Dataset004_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres", "Dataset007_A/x", "Dataset007_B/x"] {
        std::fs::create_dir_all(results.join(model)).unwrap();
    }
    let run = |dataset: &str, more: &[&str]| {
        let args = ["predict", "-d", dataset, "-c", "3d_fullres", "-i", "a.nii", "-o", "o.nii"];
        stunet_with(dir.path(), &[&args[..], more].concat(), &[("nnUNet_results", &results)])
    };
    // Found; that there is no model in the folder is the next complaint.
    for dataset in ["4", "004", "Dataset004_Liver"] {
        let ran = run(dataset, &[]);
        assert!(ran.error(4).contains("nnUNetTrainer__nnUNetPlans__3d_fullres"), "{}", ran.err);
    }
    assert!(run("4", &["-tr", "STUNetTrainer_base"]).error(2).contains("nnUNetTrainer__nnUNetPlans__3d_fullres"));
    assert!(run("5", &[]).error(2).contains("Dataset004_Liver"));
    assert!(run("7", &[]).error(2).contains("Dataset007_A, Dataset007_B"));
}

#[test]
fn harmless_options_of_nnunet_are_named_and_ignored() {
    let dir = tempfile::tempdir().unwrap();
    image(&dir.path().join("a.nii"));
    let args = ["predict", "-m", "m", "-i", "a.nii", "-o", "o.nii", "-npp", "3", "-nps", "3", "--verbose"];
    let ran = stunet_in(dir.path(), &args);
    ran.error(4);
    assert_eq!(ran.err.lines().filter(|l| l.starts_with("warning: ")).count(), 3, "{}", ran.err);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_stunet"))
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn cases_are_grouped_as_nnunet_does() {
    let dir = tempfile::tempdir().unwrap();
    let touch = |name: &str| std::fs::write(dir.path().join(name), "").unwrap();
    let names = ["b_0001.nii.gz", "b_0000.nii.gz", "a_1_0000.nii.gz", "c.nii.gz", "notes.txt", ".d_0000.nii.gz"];
    names.into_iter().for_each(touch);
    let found = cases::find(dir.path()).unwrap();
    let groups: Vec<(&str, usize)> = found.cases.iter().map(|c| (c.name.as_str(), c.files.len())).collect();
    assert_eq!(groups, [("a_1", 1), ("b", 2)]);
    assert_eq!(found.ignored, ["c.nii.gz", "notes.txt"].map(|n| dir.path().join(n)));

    let all: Vec<String> = (0..7).map(|i| format!("case_{i}_0000.nii")).collect();
    let list: Vec<_> = all.iter().map(|f| cases::Case::from_files(&[f.into()]).unwrap()).collect();
    let part = |n, k| cases::part(list.clone(), n, k).unwrap().into_iter().map(|c| c.name).collect::<Vec<_>>();
    assert_eq!(part(3, 1), ["case_1", "case_4"]);
    assert_eq!((0..3).map(|k| part(3, k).len()).sum::<usize>(), 7);

    let swapped = ["x_0001.nii".into(), "x_0000.nii".into()];
    assert!(cases::Case::from_files(&swapped).unwrap_err().to_string().contains("says channel 1"));
}

#[test]
fn only_a_whole_result_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("a_0000.nii.gz");
    image(&input);
    let case = cases::Case::from_files(&[input]).unwrap();
    let output = case.output(dir.path());
    let complete = || case.is_complete(&output, Reader::SimpleItkIo);
    assert!(!complete());
    let write = |shape: [usize; 3]| {
        let grid = Geometry::new(shape, [2.0, 1.0, 1.0]);
        let labels = LabelData::U8((0..grid.len()).map(|i| (i * 7 % 5) as u8).collect());
        io::write_nifti(&output, &Segmentation::new(labels, grid, Vec::new()).unwrap()).unwrap();
    };
    write([4, 5, 6]);
    assert!(complete());
    let whole = std::fs::read(&output).unwrap();
    for cut in [1, 8, whole.len() / 2, whole.len()] {
        std::fs::write(&output, &whole[..whole.len() - cut]).unwrap();
        assert!(!complete(), "cut by {cut}");
    }
    write([4, 5, 5]);
    assert!(!complete(), "another shape");
}

/// Ctrl-C while the network runs: the code says so, and no half of a result is left.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing_half_written() {
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_stunet"))
        .args(["demo", "--threads", "1", "-o", "demo"])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The truth is the last file before the network runs.
    while !dir.path().join("demo/truth.nii.gz").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the demo ended early");
        std::thread::yield_now();
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(130), &b"error: cancelled\n"[..]));
    let names: Vec<String> =
        tree(dir.path()).iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["ct.nii.gz", "fold_all.safetensors", "model.json", "truth.nii.gz"]);
}
