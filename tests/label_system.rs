//! Label systems: the known ones, relabelling against its definition, bad files, and predictions and evaluations by one.

use std::collections::HashMap;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use stunet::io::{self, Geometry, LabelData, Segmentation};
use stunet::nnunet::dataset::DatasetJson;
use stunet::nnunet::label_system::{LabelSystem, ModelClasses};
use stunet::{Device, Error};

use crate::common::binary::{stunet_in, tree};
use crate::common::files::nifti;
use crate::common::nnunet::Model;

fn map(labels: LabelData) -> Segmentation {
    let geometry = Geometry::new([1, 1, labels.len()], [1.0; 3]);
    Segmentation::new(labels, geometry, Vec::new()).unwrap()
}

#[test]
fn known_systems_are_files_of_the_form_that_users_write() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/nnunet/data/label_systems");
    let mut files: Vec<String> =
        tree(&folder).iter().map(|p| p.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    files.sort();
    let known: Vec<&str> = LabelSystem::known().collect();
    assert_eq!(known, files, "a file that nobody knows, or not in order");
    let stunet = ModelClasses::stunet().unwrap();
    for name in known {
        let (system, file) = (LabelSystem::named(name).unwrap(), folder.join(format!("{name}.json")));
        assert_eq!((system.name(), system.source().is_empty()), (name, false));
        assert_eq!(system.to_json(), std::fs::read_to_string(&file).unwrap());
        assert_eq!(LabelSystem::read(&file).unwrap().labels(), system.labels());
        system.from_model(&stunet).unwrap();
    }
    assert!(LabelSystem::named("amos").unwrap_err().to_string().contains("amos22"));
}

/// A label's place, name, values and classes.
type Fact<'a> = (usize, &'a str, &'a [u16], &'a [&'a str]);

/// Facts of `direct_inference/label_sys.py` and `AbdomenAtlas/label_orders.json`, by hand: how many labels, and some of them.
#[test]
fn known_systems_say_what_was_published() {
    let expected: [(&str, usize, &[Fact<'_>]); 15] = [
        ("msd-liver", 1, &[(0, "liver", &[1, 2], &["liver"])]),
        ("msd-pancreas", 1, &[(0, "pancreas", &[1, 2], &["pancreas"])]),
        ("msd-spleen", 1, &[(0, "spleen", &[1], &["spleen"])]),
        ("btcv", 13, &[(9, "portal vein and splenic vein", &[10], &["portal_vein_and_splenic_vein"])]),
        ("btcv-cervix", 1, &[(0, "urinary_bladder", &[1], &["urinary_bladder"])]),
        ("abdomenct-1k", 4, &[(1, "kidney", &[2], &["kidney_left", "kidney_right"])]),
        ("kits21", 1, &[(0, "kidney", &[1, 2, 3], &["kidney_left", "kidney_right"])]),
        // The second row of its summary is 10, as there.
        ("flare22", 13, &[(1, "esophagus", &[10], &["esophagus"]), (5, "right kidney", &[2], &["kidney_right"])]),
        (
            "ct-org",
            5,
            &[
                (
                    2,
                    "lung",
                    &[3],
                    &[
                        "lung_lower_lobe_left",
                        "lung_lower_lobe_right",
                        "lung_middle_lobe_right",
                        "lung_upper_lobe_left",
                        "lung_upper_lobe_right",
                    ],
                ),
                (4, "brain", &[6], &["brain"]),
            ],
        ),
        ("amos22", 12, &[(3, "esophagus", &[5], &["esophagus"]), (11, "bladder", &[14], &["urinary_bladder"])]),
        ("kipa22", 1, &[(0, "kidney", &[2], &["kidney_left", "kidney_right"])]),
        ("verse20", 24, &[(7, "T1", &[8], &["vertebrae_T1"]), (23, "L5", &[24], &["vertebrae_L5"])]),
        ("word", 13, &[(1, "colon", &[10], &["colon"]), (4, "femur_right", &[16], &["femur_right"])]),
        ("segthor", 3, &[(1, "trachea", &[3], &["trachea"])]),
        ("abdomenatlas", 9, &[(2, "IVC", &[3], &["inferior_vena_cava"]), (6, "right kidney", &[7], &["kidney_right"])]),
    ];
    for (name, labels, facts) in expected {
        let system = LabelSystem::named(name).unwrap();
        assert_eq!(system.labels().len(), labels, "{name}");
        for (at, label, values, classes) in facts {
            let found = &system.labels()[*at];
            assert_eq!((found.name.as_str(), found.values.as_slice()), (*label, *values), "{name}");
            assert_eq!(found.classes, *classes, "{name}");
        }
    }
}

/// TotalSegmentator's own order of the classes that STU-Net's weights have in the alphabet's.
#[test]
fn totalsegmentators_numbers_are_all_there() {
    let system = LabelSystem::named("totalsegmentator-v1").unwrap();
    let values: Vec<u16> = system.labels().iter().flat_map(|l| l.values.clone()).collect();
    assert_eq!(values, (1..=104).collect::<Vec<u16>>());
    assert!(system.labels().iter().all(|l| l.classes == [l.name.clone()]));
    let stunet = ModelClasses::stunet().unwrap();
    let [mut ours, mut theirs]: [Vec<&str>; 2] = [
        stunet.names().iter().map(|(_, n)| n.as_str()).collect(),
        system.labels().iter().map(|l| l.name.as_str()).collect(),
    ];
    assert!(ours.is_sorted() && !theirs.is_sorted());
    ours.sort_unstable();
    theirs.sort_unstable();
    assert_eq!(ours, theirs);
    let at = [1, 2, 3, 5, 7, 8, 41, 57, 104].map(|v: usize| system.labels()[v - 1].name.as_str());
    let known =
        ["spleen", "kidney_right", "kidney_left", "liver", "aorta", "inferior_vena_cava", "vertebrae_C1", "colon"];
    assert_eq!((&at[..8], at[8]), (&known[..], "urinary_bladder"));
    // There and back is what was there.
    let by_name: HashMap<&str, u16> = stunet.names().iter().map(|(v, n)| (n.as_str(), *v)).collect();
    let mut found = map(LabelData::U8((0..=104).collect()));
    system.from_model(&stunet).unwrap().apply(&mut found).unwrap();
    for (old, new) in (0..=104).zip(found.labels.iter()) {
        let back = if new == 0 { 0 } else { by_name[system.labels()[usize::from(new) - 1].name.as_str()] };
        assert_eq!(old, back);
    }
    assert_eq!(found.names[0], (1, "spleen".into()));
}

/// A system of labels with values and numbers of classes, and the classes `c1`, `c2` ... of a model by value.
fn system(dir: &Path, labels: &[(Vec<u16>, Vec<u16>)]) -> LabelSystem {
    let label = |(i, (values, classes)): (usize, &(Vec<u16>, Vec<u16>))| {
        let classes: Vec<String> = classes.iter().map(|c| format!("c{c}")).collect();
        json!({"name": format!("label {i}"), "values": values, "classes": classes})
    };
    let labels: Vec<Value> = labels.iter().enumerate().map(label).collect();
    let file = dir.join("system.json");
    std::fs::write(&file, json!({"name": "random", "labels": labels}).to_string()).unwrap();
    LabelSystem::read(&file).unwrap()
}

fn model(dir: &Path, classes: u16) -> ModelClasses {
    let mut labels = serde_json::Map::from_iter([("background".to_owned(), 0.into())]);
    labels.extend((1..=classes).map(|c| (format!("c{c}"), c.into())));
    let value = json!({"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"});
    let file = dir.join("dataset.json");
    ModelClasses::of_dataset(&file, &DatasetJson::of(&file, value).unwrap().labels).unwrap()
}

/// The definition: labels are written one after the other, each over what is there.
fn written(voxels: &[u16], labels: &[(Vec<u16>, u16)]) -> Vec<u16> {
    let mut out = vec![0; voxels.len()];
    for (from, to) in labels {
        voxels.iter().zip(&mut out).filter(|(v, _)| from.contains(v)).for_each(|(_, o)| *o = *to);
    }
    out
}

/// Labels of which each has values of its own, and a class that no later one has.
fn any_labels() -> impl Strategy<Value = Vec<(Vec<u16>, Vec<u16>)>> {
    let value = prop_oneof![1u16..=60, 250u16..=260, any::<u16>().prop_map(|v| v.max(1))];
    let values = prop::collection::hash_set(value, 1..40).prop_map(|v| v.into_iter().collect::<Vec<u16>>());
    let classes = prop::collection::vec(prop::collection::hash_set(1u16..=30, 0..5), 10);
    (values, classes, Just((31u16..=40).collect::<Vec<u16>>()).prop_shuffle(), 1usize..=10).prop_map(
        |(values, shared, own, n)| {
            let n = n.min(values.len());
            let label = |i: usize| {
                let values = values.iter().skip(i).step_by(n).copied().collect();
                (values, shared[i].iter().copied().chain([own[i]]).collect())
            };
            (0..n).map(label).collect()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn relabelling_is_what_writing_label_after_label_gives(
        labels in any_labels(),
        picks in prop::collection::vec(any::<u16>(), 1..400),
        narrow in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (system, classes) = (system(dir.path(), &labels), model(dir.path(), 45));
        let of_classes: Vec<u16> = picks.iter().map(|p| p % 46).collect();
        let values: Vec<u16> = labels.iter().flat_map(|l| l.0.clone()).chain([0, 1, 77, 65535]).collect();
        let of_dataset: Vec<u16> = picks.iter().map(|p| values[usize::from(*p) % values.len()]).collect();
        let bytes = |v: &[u16]| v.iter().map(|v| u8::try_from(*v).ok()).collect::<Option<Vec<u8>>>();
        let stored = |v: &[u16]| match bytes(v) {
            Some(bytes) if narrow => LabelData::U8(bytes),
            _ => LabelData::U16(v.to_vec()),
        };
        let numbered = |of: &dyn Fn(usize) -> (Vec<u16>, u16)| (0..labels.len()).map(of).collect::<Vec<_>>();
        let cases = [
            (
                system.from_model(&classes).unwrap(),
                &of_classes,
                numbered(&|i| (labels[i].1.clone(), labels[i].0[0])),
            ),
            (
                system.in_order_from_model(&classes).unwrap(),
                &of_classes,
                numbered(&|i| (labels[i].1.clone(), i as u16 + 1)),
            ),
            (system.in_order_from_dataset(), &of_dataset, numbered(&|i| (labels[i].0.clone(), i as u16 + 1))),
        ];
        for (relabelling, voxels, labels) in cases {
            let mut found = map(stored(voxels));
            relabelling.apply(&mut found).unwrap();
            let names: Vec<u16> = found.names.iter().map(|(v, _)| *v).collect();
            prop_assert_eq!(names, labels.iter().map(|l| l.1).collect::<Vec<_>>());
            prop_assert_eq!(found.labels.iter().collect::<Vec<_>>(), written(voxels, &labels));
            let fits = labels.iter().all(|l| l.1 < 256);
            prop_assert_eq!(matches!(found.labels, LabelData::U8(_)), fits);
        }
    }
}

/// More voxels than one piece of work has.
#[test]
fn relabelling_does_not_depend_on_threads() {
    let dir = tempfile::tempdir().unwrap();
    let (system, classes) = (system(dir.path(), &[(vec![300], vec![1, 2]), (vec![7], vec![2])]), model(dir.path(), 3));
    let relabelling = system.from_model(&classes).unwrap();
    let voxels: Vec<u8> = (0..(1usize << 18) * 3 + 5).map(|i| (i * 7 / 3 % 4) as u8).collect();
    let with = |threads: usize, labels: LabelData| {
        let mut found = map(labels);
        Device::cpu_with_threads(threads).unwrap().install(|| relabelling.apply(&mut found)).unwrap();
        found.labels
    };
    let LabelData::U16(one) = with(1, LabelData::U8(voxels.clone())) else { panic!("300 is no byte") };
    assert!(one.iter().zip(&voxels).all(|(new, old)| *new == [0, 300, 7, 0][usize::from(*old)]));
    assert_eq!(with(3, LabelData::U8(voxels.clone())), LabelData::U16(one.clone()));
    assert_eq!(with(3, LabelData::U16(voxels.iter().map(|v| u16::from(*v)).collect())), LabelData::U16(one));
}

#[test]
fn bad_files_are_refused_in_one_line_that_names_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.json");
    let refused = |text: &[u8], parts: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let e = LabelSystem::read(&file).unwrap_err();
        let line = e.to_string();
        assert!(line.starts_with(&format!("{}: ", file.display())) && !line.contains('\n'), "{line}");
        assert!(parts.iter().all(|p| line.contains(p)) && e.exit_code() == 3, "{line}: {parts:?}");
    };
    let of = |labels: Value| json!({"name": "x", "labels": labels}).to_string();
    let one = |label: Value| of(json!([label]));
    let good = json!({"name": "a", "values": [1], "classes": ["liver"]});
    let with = |key: &str, value: Value| {
        let mut label = good.clone();
        label[key] = value;
        label
    };
    refused(b"{", &["JSON"]);
    refused(b"[]", &["top level", "expected an object"]);
    refused(b"{\"name\": \"x\", \"name\": \"y\", \"labels\": []}", &["JSON", "name"]);
    refused(b"{}", &["name: missing"]);
    refused(b"{\"name\": \"x\"}", &["labels: missing"]);
    refused(
        json!({"name": "x", "labels": [good], "lables": 1}).to_string().as_bytes(),
        &["lables: not a key", "labels"],
    );
    refused(json!({"name": "a\nb", "labels": [good]}).to_string().as_bytes(), &["name: expected one line"]);
    refused(json!({"name": "n".repeat(101), "labels": [good]}).to_string().as_bytes(), &["name", "1 to 100"]);
    refused(json!({"name": "x", "source": 3, "labels": [good]}).to_string().as_bytes(), &["source: 3", "a text"]);
    refused(of(json!([])).as_bytes(), &["labels: an empty list"]);
    refused(of(json!({"1": "liver"})).as_bytes(), &["labels:", "expected a list"]);
    refused(one(json!("liver")).as_bytes(), &["labels[0]:", "expected an object"]);
    refused(one(with("vlaues", json!([2]))).as_bytes(), &["labels[0].vlaues: not a key", "values"]);
    refused(one(with("name", json!(""))).as_bytes(), &["labels[0].name: expected one line"]);
    refused(one(with("values", json!([]))).as_bytes(), &["labels[0].values: an empty list"]);
    refused(one(with("values", json!(1))).as_bytes(), &["labels[0].values: 1, expected a list"]);
    for value in [json!(65536), json!(-1), json!(1.5), json!("1"), json!(null), json!(1e300)] {
        let parts = ["labels[0].values[0]", "expected an integer from 0 to 65535"];
        refused(one(with("values", json!([value]))).as_bytes(), &parts);
    }
    refused(one(with("values", json!([0]))).as_bytes(), &["labels[0].values[0]: 0 is the background"]);
    refused(one(with("values", json!([4, 4]))).as_bytes(), &["labels[0].values[1]: 4 is a value of \"a\" already"]);
    let second = json!({"name": "b", "values": [2, 1], "classes": ["spleen"]});
    refused(of(json!([good, second])).as_bytes(), &["labels[1].values[1]: 1 is a value of \"a\" already"]);
    let namesake = json!({"name": "a", "values": [2], "classes": ["spleen"]});
    refused(of(json!([good, namesake])).as_bytes(), &["labels[1].name: \"a\" a second time"]);
    refused(one(json!({"name": "a", "values": [1]})).as_bytes(), &["labels[0].classes: missing"]);
    refused(one(with("classes", json!([]))).as_bytes(), &["labels[0].classes: an empty list"]);
    refused(one(with("classes", json!(["x", "x"]))).as_bytes(), &["labels[0].classes[1]: \"x\" a second time"]);
    refused(one(with("classes", json!([7]))).as_bytes(), &["labels[0].classes[0]: 7, expected a text"]);
    let over = json!({"name": "b", "values": [2], "classes": ["spleen", "liver"]});
    refused(of(json!([good, over])).as_bytes(), &["labels[0].classes: later labels have all of them"]);
    refused(&vec![b' '; (1 << 20) + 1], &["file size", "1048577", "1048576"]);
    refused(format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)).as_bytes(), &["JSON"]);
    assert!(matches!(LabelSystem::read(dir.path()), Err(Error::Dataset { .. } | Error::Io { .. })));
    let e = LabelSystem::open(&dir.path().join("none")).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("neither a file nor") && e.to_string().contains("amos22"));
}

#[test]
fn a_class_that_a_model_lacks_is_named_with_those_that_may_be_meant() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.json");
    let lacks = |class: &str, model: &ModelClasses| {
        let label = json!({"name": "a", "values": [1], "classes": [class]});
        std::fs::write(&file, json!({"name": "x", "labels": [label]}).to_string()).unwrap();
        LabelSystem::read(&file).unwrap().from_model(model).unwrap_err().to_string()
    };
    let stunet = ModelClasses::stunet().unwrap();
    let e = lacks("left kidney", &stunet);
    assert!(e.contains("mine.json: labels[0].classes[0]: \"left kidney\" is none of the 104 classes"), "{e}");
    assert!(e.ends_with("expected one like kidney_left"), "{e}");
    assert!(lacks("splen", &stunet).ends_with("like spleen"));
    let e = lacks("uterus", &model(dir.path(), 2));
    assert!(e.contains("none of the 2 classes") && e.ends_with("expected one that is c1, c2"), "{e}");
    let e = LabelSystem::named("btcv").unwrap().from_model(&model(dir.path(), 2)).unwrap_err().to_string();
    assert!(e.starts_with("label system btcv: labels[0].classes[0]: \"spleen\""), "{e}");
}

const MINE: &str = r#"{"name": "mine", "labels": [
    {"name": "Milz", "values": [300, 9], "classes": ["spleen"]},
    {"name": "Leber", "values": [4], "classes": ["liver"]}]}"#;

/// A tiny model of liver 1 and spleen 2, two images, and a label system of its own.
fn bench() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    Model::ct().write(&dir.path().join("model"), &["fold_0"]);
    std::fs::create_dir(dir.path().join("in")).unwrap();
    for (case, shape) in [("a", [12, 11, 10]), ("b", [9, 10, 11])] {
        std::fs::write(dir.path().join(format!("in/{case}_0000.nii")), nifti(shape)).unwrap();
    }
    std::fs::write(dir.path().join("mine.json"), MINE).unwrap();
    dir
}

fn predict(dir: &Path, more: &[&str]) -> crate::common::binary::Ran {
    stunet_in(dir, &[&["predict", "-m", "model", "--no-tta", "--device", "cpu", "-i", "in"], more].concat())
}

#[test]
fn predictions_come_in_the_numbers_and_names_of_a_system() {
    let dir = bench();
    let at = |name: &str| dir.path().join(name);
    predict(dir.path(), &["-o", "plain"]).ok();
    let more = ["-o", "mine", "--label-system", "mine.json", "--preview", "pictures", "--report", "r.json"];
    predict(dir.path(), &more).ok();
    let mut seen = 0;
    for case in ["a", "b"] {
        let [plain, mine] =
            ["plain", "mine"].map(|f| io::read_segmentation(at(&format!("{f}/{case}.nii.gz"))).unwrap());
        for (old, new) in plain.labels.iter().zip(mine.labels.iter()) {
            assert_eq!(new, [0, 4, 300][usize::from(old)]);
            seen |= 1 << old;
        }
        assert_eq!((plain.geometry.shape, plain.geometry.affine), (mine.geometry.shape, mine.geometry.affine));
        assert!(at(&format!("pictures/{case}.png")).is_file());
    }
    assert!(seen > 1, "the network sees nothing, so nothing was tested");
    let report: Value = serde_json::from_slice(&std::fs::read(at("r.json")).unwrap()).unwrap();
    assert_eq!(report["label_system"]["name"], "mine");
    let labels = report["cases"][0]["labels"].as_array().unwrap();
    let named: Vec<_> = labels.iter().map(|l| (l["value"].as_u64().unwrap(), l["name"].as_str().unwrap())).collect();
    assert_eq!(named, [(300, "Milz"), (4, "Leber")]);
    // What lies beside says what the numbers mean, and nothing says otherwise.
    let written = LabelSystem::read(&at("mine").join(LabelSystem::FILE)).unwrap();
    assert_eq!(written.labels(), LabelSystem::read(&at("mine.json")).unwrap().labels());
    assert!(!at("mine/dataset.json").exists() && at("plain/dataset.json").is_file());
    // The same again, and an image alone.
    predict(dir.path(), &["-o", "mine", "--label-system", "mine.json", "--continue"]).ok();
    let one = ["predict", "-m", "model", "--no-tta", "-i", "in/a_0000.nii", "-o", "a.nii.gz"];
    stunet_in(dir.path(), &[&one[..], &["--label-system", "mine.json"]].concat()).ok();
    assert_eq!(std::fs::read(at("a.nii.gz")).unwrap(), std::fs::read(at("mine/a.nii.gz")).unwrap());
}

#[test]
fn predictions_of_two_numberings_never_share_a_folder() {
    let dir = bench();
    let at = |name: &str| dir.path().join(name);
    let refused = |more: &[&str], code: i32, parts: &[&str]| {
        let ran = predict(dir.path(), more);
        let line = ran.error(code);
        parts.iter().for_each(|p| assert!(line.contains(p), "{line}: {p}"));
        assert!(ran.out.is_empty());
    };
    std::fs::create_dir_all(at("other")).unwrap();
    LabelSystem::named("btcv").unwrap().write(&at("other/label_system.json")).unwrap();
    refused(&["-o", "other"], 2, &["other/label_system.json", "another data set's numbers"]);
    refused(&["-o", "other", "--label-system", "mine.json"], 2, &["numbers of \"btcv\", not those of \"mine\""]);
    std::fs::create_dir_all(at("models")).unwrap();
    std::fs::write(at("models/dataset.json"), "{}").unwrap();
    refused(&["-o", "models", "--label-system", "mine.json"], 2, &["models/dataset.json", "a model's numbers"]);
    std::fs::create_dir_all(at("old")).unwrap();
    std::fs::write(at("old/a.nii.gz"), "").unwrap();
    // Not every model leaves a description; whose the label map is does not matter.
    std::fs::rename(at("old/a.nii.gz"), at("old/z.nii.gz")).unwrap();
    std::fs::write(at("old/figure.png"), "").unwrap();
    refused(&["-o", "old", "--label-system", "mine.json"], 2, &["old/z.nii.gz", "which numbers"]);
    refused(&["-o", "old", "--label-system", "mine.json", "--continue"], 2, &["old/z.nii.gz", "which numbers"]);
    let one = |more: &[&str]| {
        let line = ["predict", "-m", "model", "--no-tta", "-i", "in/a_0000.nii", "-o", "other/a.nii.gz"];
        stunet_in(dir.path(), &[&line[..], more].concat()).error(2).to_owned()
    };
    assert!(one(&[]).contains("other/label_system.json"));
    // A folder for a single image, too; what lies beside it does not matter.
    let into = stunet_in(dir.path(), &["predict", "-m", "model", "--no-tta", "-i", "in/a_0000.nii", "-o", "other"]);
    assert!(into.error(2).contains("other/label_system.json"));
    assert!(one(&["--label-system", "mine.json"]).contains("not those of"));
    assert!(one(&["--previous-stage", "other/b.nii.gz", "--label-system", "btcv"]).contains("--previous-stage"));
    refused(&["-o", "out", "--previous-stage", "other"], 2, &["other/label_system.json", "--previous-stage"]);
    // What the model does not have, and what no model of ours writes so.
    refused(
        &["-o", "out", "--label-system", "btcv"],
        3,
        &["btcv: labels[1].classes[0]: \"kidney_right\"", "liver, spleen"],
    );
    refused(&["-o", "out", "--label-system", "none"], 2, &["none: neither a file nor a known label system"]);
    refused(&["-o", "out", "--label-system", "mine.json", "--save-probabilities"], 2, &["--save-probabilities"]);
    assert!(!at("out").exists());
}

#[test]
fn a_model_of_regions_has_no_classes_to_map() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::ct();
    model.dataset["labels"] = json!({"background": 0, "liver": [1, 2], "spleen": 2});
    model.dataset["regions_class_order"] = json!([1, 2]);
    model.tensors = crate::common::nnunet::tensors(1, 2);
    model.write(&dir.path().join("model"), &["fold_0"]);
    std::fs::create_dir(dir.path().join("in")).unwrap();
    std::fs::write(dir.path().join("in/a_0000.nii"), nifti([12, 11, 10])).unwrap();
    std::fs::write(dir.path().join("mine.json"), MINE).unwrap();
    let ran = predict(dir.path(), &["-o", "out", "--label-system", "mine.json"]);
    assert!(ran.error(4).contains("regions"), "{}", ran.err);
}

/// A label map in a file of [1, 6, 8] voxels.
fn write(path: &Path, labels: &[u16]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let seg = Segmentation::new(LabelData::U16(labels.to_vec()), Geometry::new([1, 6, 8], [2.0, 1.0, 1.0]), Vec::new());
    io::write_nifti(path, &seg.unwrap()).unwrap();
}

#[test]
fn an_evaluation_by_a_system_is_that_of_maps_relabelled_by_hand() {
    let dir = bench();
    let at = |name: &str| dir.path().join(name);
    let pick = |i: usize, k: usize, of: &[u16]| of[(i / 5 + i % 8 / 3 * k + k) % of.len()];
    for (case, k) in [("p1", 1), ("p2", 2)] {
        // 9 is a part of the spleen, 5 is none of the system's.
        let truth: Vec<u16> = (0..48).map(|i| pick(i, k, &[0, 300, 4, 9, 5])).collect();
        let found: Vec<u16> = (0..48).map(|i| pick(i + 1, k, &[0, 2, 1, 2, 0])).collect();
        let by = |map: &[u16], of: &dyn Fn(u16) -> u16| map.iter().map(|v| of(*v)).collect::<Vec<u16>>();
        write(&at(&format!("truth/{case}.nii.gz")), &truth);
        write(&at(&format!("found/{case}.nii.gz")), &found);
        write(&at(&format!("numbered/{case}.nii.gz")), &by(&found, &|v| [0, 4, 300][usize::from(v)]));
        let common = |v: u16| u16::from(v == 300 || v == 9) + 2 * u16::from(v == 4);
        write(&at(&format!("truth by hand/{case}.nii.gz")), &by(&truth, &common));
        write(&at(&format!("found by hand/{case}.nii.gz")), &by(&found, &|v| [0, 2, 1][usize::from(v)]));
    }
    std::fs::copy(at("model/dataset.json"), at("found/dataset.json")).unwrap();
    let run = |args: &[&str]| stunet_in(dir.path(), &[&["evaluate"], args].concat());
    let read =
        |name: &str| std::fs::read_to_string(at(name)).unwrap().replace(" by hand", "").replace("numbered", "found");
    run(&["truth by hand", "found by hand", "-l", "1", "2"]).ok();
    let expected = read("found by hand/summary.json");
    let numbers: Value = serde_json::from_str(&expected).unwrap();
    assert!((0.05..0.95).contains(&numbers["foreground_mean"]["Dice"].as_f64().unwrap()), "{expected}");
    let system = ["--label-system", "mine.json"];

    let ran = run(&[&["truth", "found", "--numbers", "model"], &system[..]].concat());
    assert!(ran.ok().contains("Milz") && ran.out.contains("Leber"), "{}", ran.out);
    assert_eq!(read("found/summary.json"), expected);
    let named = |name: &str| read(name).replace("label 1", "Milz").replace("label 2", "Leber");
    assert_eq!(named("found/summary.csv"), named("found by hand/summary.csv"));
    assert!(read("found/summary.csv").contains("p1,1,Milz,") && read("found/summary.html").contains("Leber"));

    // The data set's own numbers: said on the command line, or by the file that predict leaves.
    run(&[&["truth", "numbered", "--numbers", "dataset"], &system[..]].concat()).ok();
    assert_eq!(read("numbered/summary.json"), expected);
    let e = run(&[&["truth", "numbered"], &system[..]].concat());
    assert!(e.error(2).contains("--numbers model, stunet or dataset"), "{}", e.err);
    std::fs::copy(at("mine.json"), at("numbered/label_system.json")).unwrap();
    run(&[&["truth", "numbered", "-o", "s.json"], &system[..]].concat()).ok();
    assert_eq!(read("s.json"), expected);

    let fails = |args: &[&str], code: i32, parts: &[&str]| {
        let ran = run(args);
        let line = ran.error(code);
        parts.iter().for_each(|p| assert!(line.contains(p), "{line}: {p}"));
    };
    let with = |more: &[&'static str]| [&system[..], more].concat();
    fails(&with(&["truth", "numbered", "--numbers", "model"]), 2, &["numbered/label_system.json", "--numbers dataset"]);
    fails(&["truth", "numbered", "--label-system", "btcv"], 2, &["numbers of \"mine\"", "\"btcv\""]);
    fails(&["truth", "numbered"], 2, &["dataset.json: missing", "--label-system numbered/label_system.json"]);
    fails(
        &["truth", "found", "--label-system", "btcv", "--numbers", "model"],
        3,
        &["kidney_right", "found/dataset.json"],
    );
    fails(&with(&["truth", "found", "--numbers", "dataset", "--dataset-json", "x"]), 2, &["--numbers model"]);
    fails(&["truth", "found", "--numbers", "model"], 2, &["--label-system"]);
    fails(&with(&["truth", "found", "-l", "1"]), 2, &["--label-system", "--labels"]);
    fails(&with(&["truth", "found by hand", "--numbers", "model"]), 2, &["found by hand/dataset.json: missing"]);
    fails(&["truth", "truth", "--label-system", "btcv", "--numbers", "stunet"], 3, &["p1.nii.gz: labels: 300", "104"]);
}

#[test]
fn systems_are_listed_shown_and_saved() {
    let dir = tempfile::tempdir().unwrap();
    let list = stunet_in(dir.path(), &["label-systems"]);
    let names: Vec<&str> = list.ok().lines().skip(1).map(|l| l.split(' ').next().unwrap()).collect();
    assert_eq!(names, LabelSystem::known().collect::<Vec<_>>());
    assert!(list.out.contains("Task032_AMOS22_Task1"), "{}", list.out);
    let shown = stunet_in(dir.path(), &["label-systems", "kits21"]);
    assert_eq!(shown.ok(), "values   name    classes\n1, 2, 3  kidney  kidney_left, kidney_right\n");
    let saved = stunet_in(dir.path(), &["label-systems", "word", "--json"]);
    std::fs::write(dir.path().join("mine.json"), saved.ok()).unwrap();
    let again = stunet_in(dir.path(), &["label-systems", "mine.json", "--json"]);
    assert_eq!(again.ok(), saved.out);
    let ran = stunet_in(dir.path(), &["label-systems", "amos"]);
    assert!(ran.error(2).contains("amos: neither a file nor a known label system"), "{}", ran.err);
}
