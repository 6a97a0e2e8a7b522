//! `stunet bench`: what its JSON says, and what it refuses. No time is held against another.

use serde_json::Value;
use stunet::Isa;
use stunet::io::{self, Geometry, LabelData, Segmentation};
use stunet::nnunet::volume::{Neighbours, distance_transform, fill_holes, label};

use crate::common::binary::{Ran, stunet};

fn bench(what: &str, more: &[&str]) -> Ran {
    let common = ["bench", what, "--classes", "7", "--runs", "1", "--threads", "2", "--device", "cpu"];
    let patch: &[&str] = if more.contains(&"--patch") { &[] } else { &["--patch", "32"] };
    stunet(&[&common[..], patch, more].concat())
}

/// The only line of standard output.
fn json(ran: &Ran) -> Value {
    assert_eq!(ran.ok().lines().count(), 1, "{}", ran.out);
    let value: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
    for key in ["seconds", "seconds_min", "gflops", "roofline_share", "roofline_gflops", "peak_bytes"] {
        assert!(value[key].as_f64().is_some_and(|v| v > 0.0), "{key} in {value}");
    }
    assert!(value["seconds_min"].as_f64() <= value["seconds"].as_f64());
    assert_eq!(value["peak_process_bytes"].is_u64(), cfg!(target_os = "linux"));
    for (key, expected) in [("model", "small"), ("precision", "f32"), ("device", "cpu")] {
        assert_eq!(value[key], expected);
    }
    assert_eq!((&value["threads"], &value["classes"]), (&2.into(), &7.into()));
    for layer in value["layers"].as_array().unwrap() {
        assert!(["operation", "what", "implementation"].iter().all(|k| layer[k].is_string()), "{layer}");
        assert!(layer["seconds"].as_f64().unwrap() > 0.0, "{layer}");
    }
    value
}

#[test]
fn forward_ends_in_labels() {
    let value = json(&bench("forward", &["--json", "--patch", "32", "64", "32"]));
    assert_eq!(value["command"], "forward");
    assert_eq!(value["patch"], serde_json::json!([32, 64, 32]));
    assert_eq!((&value["strict"], &value["isa"]), (&false.into(), &Isa::detect().name().into()));
    let layers = value["layers"].as_array().unwrap();
    assert_eq!(layers.last().unwrap()["operation"], "head_labels");
    assert_eq!(layers.last().unwrap()["what"], "16->7 at 32x64x32");
    // Of a card only.
    assert!(["seconds_on_host", "seconds_in_a_row"].iter().all(|k| value.get(k).is_none()), "{value}");
    assert!(layers.iter().any(|l| l["operation"] == "conv3d" && l["gflops"].as_f64().unwrap() > 0.0));
    let text = bench("forward", &[]);
    assert!(
        text.ok().contains("16->7")
            && text.out.contains("GFLOP/s")
            && serde_json::from_str::<Value>(&text.out).is_err()
    );
}

#[test]
fn conv3d_shows_what_it_chooses_from() {
    for (more, strict, all) in [(&["--json"][..], false, false), (&["--json", "--strict", "--all"], true, true)] {
        let value = json(&bench("conv3d", more));
        assert_eq!((&value["command"], &value["strict"]), (&"conv3d".into(), &strict.into()));
        let layers = value["layers"].as_array().unwrap();
        // Two of each stage, and the decoder's of two inputs.
        assert_eq!(layers.len(), 2 * 6 + 5);
        assert!(layers[16]["what"].as_str().unwrap().starts_with("16+16->16 3x3x3"));
        for layer in layers {
            let list = layer["implementations"].as_array().unwrap();
            let chosen: Vec<&Value> = list.iter().filter(|c| c["chosen"] == true).collect();
            assert_eq!(chosen.len(), 1, "{layer}");
            assert_eq!(chosen[0]["implementation"], layer["implementation"]);
            assert_eq!(chosen[0]["seconds"], layer["seconds"]);
            let estimate = |c: &Value| c["estimated_seconds"].as_f64().unwrap();
            assert!(list.iter().all(|c| estimate(c) >= estimate(chosen[0])), "{layer}");
            assert!(list.iter().all(|c| !strict || c["strict"] == true), "{layer}");
            assert!(list.iter().all(|c| c["seconds"].is_f64() == (all || c["chosen"] == true)), "{layer}");
        }
        assert!(layers.iter().any(|l| l["implementations"].as_array().unwrap().len() > 1));
    }
}

#[test]
fn instance_norm_is_timed_at_every_stage() {
    let ran = bench("instance-norm", &["--json"]);
    let value: Value = serde_json::from_str(ran.ok()).unwrap();
    let layers = value["layers"].as_array().unwrap();
    assert_eq!(
        (layers.len(), &layers[0]["what"], &layers[5]["what"]),
        (6, &"16 at 32x32x32".into(), &"256 at 1x1x1".into())
    );
    for layer in layers {
        let [seconds, rate] = ["seconds", "gb_per_second"].map(|k| layer[k].as_f64().unwrap());
        assert!(seconds > 0.0 && rate > 0.0 && layer["gflops"].is_null(), "{layer}");
    }
    let text = bench("instance-norm", &[]);
    assert!(text.ok().contains("GB/s") && !text.out.contains("FLOP"), "{}", text.out);
}

#[test]
fn predict_names_its_stages() {
    let value = json(&bench("predict", &["--json", "--shape", "40", "32", "35"]));
    assert_eq!(value["shape"], serde_json::json!([40, 32, 35]));
    assert_eq!((&value["windows"], &value["passes"]), (&4.into(), &4.into()));
    let stages = value["seconds_per_stage"].as_object().unwrap();
    assert_eq!(stages.keys().collect::<Vec<_>>(), ["preprocess", "network", "export"]);
    let network = stages["network"].as_f64().unwrap();
    assert!((value["seconds_per_window"].as_f64().unwrap() * 4.0 - network).abs() < 1e-6 * network);
    let mirrored = json(&bench("predict", &["--json", "--shape", "20", "20", "20", "--tta", "--strict"]));
    assert_eq!((&mirrored["windows"], &mirrored["passes"], &mirrored["strict"]), (&1.into(), &8.into(), &true.into()));
}

#[test]
fn an_instruction_set_can_be_named() {
    for isa in Isa::available() {
        let value = json(&bench("forward", &["--json", "--isa", isa.name(), "--strict"]));
        assert_eq!((&value["isa"], &value["strict"]), (&isa.name().into(), &true.into()));
        let layers = value["layers"].as_array().unwrap();
        assert_eq!(layers.last().unwrap()["implementation"], isa.name());
    }
    for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512].iter().filter(|isa| !Isa::available().contains(isa)) {
        let ran = stunet(&["bench", "forward", "--isa", isa.name()]);
        assert!(ran.error(5).contains(isa.name()), "{}", ran.err);
    }
}

#[test]
fn wrong_values_are_refused() {
    for (more, expected) in [
        (&["--patch", "33"][..], "multiples of [32, 32, 32]"),
        (&["--patch", "32", "64"], "one number, or three"),
        (&["--patch", "32", "64", "48"], "multiples of"),
        (&["--patch", "0"], "1..=1024"),
        (&["--patch", "2048"], "1..=1024"),
        (&["--model", "tiny"], "huge"),
        (&["--precision", "f64"], "f32"),
        (&["--classes", "1"], "2..=4096"),
        (&["--runs", "0"], "1..=10000"),
        (&["--threads", "0"], "--threads"),
        (&["--isa", "mmx"], "avx512"),
    ] {
        for what in ["conv3d", "forward", "instance-norm", "predict"] {
            let ran = stunet(&[&["bench", what, "--device", "cpu"], more].concat());
            assert!(ran.error(2).contains(expected), "{what} {more:?}: {}", ran.err);
        }
    }
    assert!(stunet(&["bench", "predict", "--shape", "1", "2"]).error(2).contains("--shape"));
    assert!(stunet(&["bench", "predict", "--step-size", "2"]).error(2).contains("up to 1"));
    assert!(stunet(&["bench", "predict", "--step-size", "0.001"]).error(2).contains("step size"));
}

/// Numbers as the library gives them, and nothing but seconds in the JSON.
#[test]
fn volume_writes_what_it_found() {
    let (dir, shape) = (tempfile::tempdir().unwrap(), [5, 6, 7]);
    let labels: Vec<u8> = (0..210u32).map(|i| (i * i % 7 % 3) as u8).collect();
    let mask: Vec<bool> = labels.iter().map(|l| *l == 2).collect();
    let map = Segmentation::new(LabelData::U8(labels), Geometry::new(shape, [3.0, 1.0, 0.5]), Vec::new()).unwrap();
    let (file, found) = (dir.path().join("map.nii.gz"), dir.path().join("found"));
    io::write_nifti(&file, &map).unwrap();
    let [file, folder] = [&file, &found].map(|p| p.to_str().unwrap());
    let ran = stunet(&["bench", "volume", file, "--label", "2", "--runs", "1", "--json", "--output", folder]);
    let value: Value = serde_json::from_str(ran.ok()).unwrap();
    for key in ["faces", "corners", "filled", "distances"] {
        assert!(value[key].as_f64().is_some_and(|v| v > 0.0), "{value}");
    }
    let read = |name: &str| std::fs::read(found.join(name)).unwrap();
    for (name, neighbours) in [("faces.u32", Neighbours::Faces), ("corners.u32", Neighbours::Corners)] {
        assert_eq!(read(name), bytemuck::cast_slice::<_, u8>(&label(&mask, shape, neighbours).unwrap().0));
    }
    let distances = distance_transform(&mask, shape, [3.0, 1.0, 0.5]).unwrap();
    assert_eq!(read("distances.f64"), bytemuck::cast_slice::<_, u8>(&distances));
    let mut filled = mask;
    fill_holes(&mut filled, shape).unwrap();
    assert_eq!(read("filled.u8"), filled.iter().map(|f| u8::from(*f)).collect::<Vec<u8>>());
    stunet(&["bench", "volume", folder]).error(3);
}
