//! PyTorch checkpoints and safetensors: read what PyTorch wrote, execute nothing, refuse everything malformed.

use std::path::{Path, PathBuf};

use stunet::io::weights::Weights;
use stunet::nnunet::model::{ModelFolder, ModelOptions};
use stunet::tensor::DType;

use crate::common::nnunet::{Model, v1_folder};
use crate::common::pickle::{Py, dict, hostile, pickle};
use crate::common::shared;
use crate::common::torch::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Opens bytes as a file of its own.
fn open(folder: &Path, bytes: &[u8]) -> stunet::Result<Weights> {
    let path = folder.join("x.pth");
    // A new file each time: overwriting one makes some file systems wait for the disk.
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).unwrap();
    Weights::open(&path)
}

/// torch_zip.pth and torch_legacy.pth were made by PyTorch 2 (`_use_new_zipfile_serialization` True and False) from
/// `{"network_weights": d, "trainer_name": ..., "init_args": {..., torch.device}, "x": np.float64(2.5)}`, where `d`
/// holds every element type, and with `base = torch.arange(24.)`: shared = base.reshape(4, 6), strided =
/// shared.t()[1:4], step = base[1::5], scalar = base[7], parameter = Parameter(base[2:4]), empty = zeros(0, 3).
#[test]
fn tensors_as_pytorch_wrote_them() {
    for file in ["torch_zip.pth", "torch_legacy.pth"] {
        let w = Weights::open(fixture(file)).unwrap();
        let v = |name: &str| w.values(name).unwrap().into_owned();
        // The wrapper prefixes `module._orig_mod.` are gone.
        assert_eq!(w.names()[0], "f32", "{file}");
        assert_eq!((w.shape("f32"), v("f32")), (Some(&[2, 3][..]), vec![0.0, 0.25, 0.5, 0.75, 1.0, 1.25]));
        assert_eq!((w.dtype("f16"), v("f16")), (Some(DType::F16), vec![1.5, -2.25]));
        assert_eq!((w.dtype("bf16"), &v("bf16")[..2]), (Some(DType::Bf16), &[3.0, -0.5][..]));
        assert_eq!((w.dtype("f64"), v("f64")), (Some(DType::F64), vec![0.1]));
        assert_eq!((w.dtype("i64"), v("i64")), (Some(DType::I64), vec![-7.0, (1u64 << 40) as f32]));
        assert_eq!([v("i32"), v("i16"), v("i8"), v("u8")], [vec![-3.0], vec![300.0], vec![-5.0], vec![250.0]]);
        assert_eq!((w.dtype("bool"), v("bool")), (Some(DType::Bool), vec![1.0, 0.0]));
        assert_eq!(v("shared"), (0..24).map(|i| i as f32).collect::<Vec<_>>());
        let strided: Vec<f32> = (1..4).flat_map(|c| (0..4).map(move |r| (6 * r + c) as f32)).collect();
        assert_eq!((w.shape("strided"), v("strided")), (Some(&[3, 4][..]), strided));
        assert_eq!(
            [v("step"), v("scalar"), v("parameter")],
            [vec![1.0, 6.0, 11.0, 16.0, 21.0], vec![7.0], vec![2.0, 3.0]]
        );
        assert_eq!((w.shape("empty"), v("empty").len()), (Some(&[0, 3][..]), 0));
        assert_eq!(w.shape("scalar"), Some(&[][..]));
        for global in ["torch.FloatStorage", "torch.device", "numpy.dtype", "torch._utils._rebuild_tensor_v2"] {
            assert!(w.globals().iter().any(|g| g == global), "{file}: {global}");
        }
    }
}

#[test]
fn aligned_f32_is_not_copied() {
    let w = Weights::open(fixture("torch_zip.pth")).unwrap();
    assert!(matches!(w.values("f32").unwrap(), std::borrow::Cow::Borrowed(_)));
    assert!(matches!(w.values("strided").unwrap(), std::borrow::Cow::Owned(_)));
}

/// Checkpoints that must be refused, with a piece of the message to expect.
fn hostile_checkpoints() -> Vec<(String, Vec<u8>, &'static str)> {
    let mut out = Vec::new();
    for (name, value) in hostile() {
        let object = dict([("network_weights", dict([])), ("x", value)]);
        out.push((format!("calls {name}"), torch_zip(&object, &[]), name));
    }
    let data = vec![("0".to_string(), f32_bytes(&[1.0, 2.0, 3.0, 4.0]))];
    let max = i64::MAX;
    let bad_tensors: [(&str, Py); 12] = [
        ("offset beyond", tensor("0", "FloatStorage", 4, 3, &[2], &[1])),
        ("negative offset", tensor("0", "FloatStorage", 4, -1, &[2], &[1])),
        ("huge offset", tensor("0", "FloatStorage", 4, max, &[2], &[1])),
        ("stride beyond", tensor("0", "FloatStorage", 4, 0, &[2], &[4])),
        ("huge stride", tensor("0", "FloatStorage", 4, 0, &[3], &[max])),
        ("negative stride", tensor("0", "FloatStorage", 4, 3, &[2], &[-1])),
        ("huge size", tensor("0", "FloatStorage", 4, 0, &[max, max], &[1, 1])),
        ("repeated by stride 0", tensor("0", "FloatStorage", 4, 0, &[1 << 40], &[0])),
        ("wrong rank", tensor("0", "FloatStorage", 4, 0, &[2, 2], &[1])),
        ("storage too small", tensor("0", "FloatStorage", 5, 0, &[5], &[1])),
        ("storage absent", tensor("1", "FloatStorage", 4, 0, &[4], &[1])),
        ("storage of unknown class", tensor("0", "QInt8Storage", 4, 0, &[4], &[1])),
    ];
    for (name, t) in bad_tensors {
        out.push((name.into(), torch_zip(&dict([("network_weights", dict([("conv", t)]))]), &data), "conv"));
    }
    let good = pickle(&dict([("network_weights", dict([("conv", tensor("0", "FloatStorage", 4, 0, &[4], &[1]))]))]));
    let mut with = |name: &str, expected: &'static str, change: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = torch_entries(&good, &data);
        change(&mut entries);
        out.push((name.to_string(), zip(&entries), expected));
    };
    with("path traversal", "refused", &|e| e.push(Entry::stored("archive/../../evil", b"x")));
    with("absolute path", "refused", &|e| e.push(Entry::stored("/etc/passwd", b"x")));
    with("drive letter", "refused", &|e| e.push(Entry::stored("C:\\evil", b"x")));
    with("duplicate name", "same name", &|e| e.push(Entry::stored("archive/data/0", b"0123456789abcdef")));
    with("second object", "data.pkl", &|e| e.push(Entry::stored("other/data.pkl", b"N.")));
    with("no object", "data.pkl", &|e| e[0].name = "archive/model.pkl".into());
    with("encrypted", "encrypted", &|e| e[2].flags = 1);
    with("wrong checksum", "CRC", &|e| e[2].crc ^= 1);
    with("wrong checksum of the object", "CRC", &|e| e[0].crc ^= 1);
    with("big-endian", "big-endian", &|e| e[1] = Entry::stored("archive/byteorder", b"big"));
    with("size lie", "", &|e| e[2].size = u32::MAX - 1);
    with("deflated bomb", "compressed", &|e| {
        e[2].method = 8;
        e[2].size = 1 << 30;
    });
    out.push(("empty".into(), vec![], "empty"));
    out.push(("text".into(), b"not a model at all, only text".to_vec(), ""));
    out.push(("end of a zip only".into(), zip(&[]), "data.pkl"));
    out
}

#[test]
fn hostile_files_are_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, expected) in hostile_checkpoints() {
        let e = open(folder.path(), &bytes).map(|w| w.names().to_vec()).expect_err(&name);
        let text = e.to_string();
        assert!(text.contains(expected) && text.contains("x.pth") && !text.contains('\n'), "{name}: {text}");
        assert_eq!(e.exit_code(), 4, "{name}: {text}");
    }
}

#[test]
fn hostile_legacy_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(fixture("torch_legacy.pth")).unwrap();
    for (name, value) in hostile() {
        // A plain pickle, and one behind the magic number, where PyTorch would still call it.
        let plain = pickle(&value);
        let text = open(folder.path(), &plain).unwrap_err().to_string();
        assert!(text.contains(name), "{name}: {text}");
        let mut late = good[..14].to_vec();
        assert_eq!(late.pop(), Some(0x19));
        late.extend(b"\x19.");
        late.extend(&plain);
        let text = open(folder.path(), &late).unwrap_err().to_string();
        assert!(text.contains(name), "{name}: {text}");
    }
}

#[test]
fn values_that_are_no_numbers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let data = vec![("0".to_string(), f32_bytes(&[1.0, bad]))];
        let object = dict([("conv.weight", tensor("0", "FloatStorage", 2, 0, &[2], &[1]))]);
        let w = open(folder.path(), &torch_zip(&object, &data)).unwrap();
        let text = w.values("conv.weight").unwrap_err().to_string();
        assert!(text.contains("conv.weight") && text.contains("position 1"), "{text}");
    }
}

#[test]
fn names_that_collide_without_their_prefix_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let t = || tensor("0", "FloatStorage", 1, 0, &[1], &[1]);
    let data = vec![("0".to_string(), f32_bytes(&[1.0]))];
    let object = dict([("state_dict", dict([("module.a", t()), ("_orig_mod.a", t())]))]);
    assert!(open(folder.path(), &torch_zip(&object, &data)).unwrap_err().to_string().contains("second tensor"));
    let object = dict([("model", dict([("a", t())])), ("epoch", Py::Int(3))]);
    let text = open(folder.path(), &torch_zip(&object, &data)).unwrap_err().to_string();
    assert!(text.contains("network_weights") && text.contains("epoch"), "{text}");
}

#[test]
fn every_truncation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["torch_zip.pth", "torch_legacy.pth"] {
        let bytes = std::fs::read(fixture(file)).unwrap();
        for n in 0..bytes.len() {
            assert!(open(folder.path(), &bytes[..n]).is_err(), "{file} cut at {n}");
        }
    }
}

#[test]
fn malformed_safetensors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = |header: &str, data: usize| {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.bytes());
        out.extend(vec![0; data]);
        out
    };
    let one = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let good = open(folder.path(), &file(&one("F32", "[2]", 0, 8), 8)).unwrap();
    assert_eq!(good.values("a").unwrap()[..], [0.0, 0.0]);
    drop(good);
    let bad = [
        file(&one("F32", "[2]", 0, 8), 7),
        file(&one("F32", "[2]", 0, 8), 9),
        file(&one("F32", "[2]", 4, 12), 12),
        file(&one("F32", "[3]", 0, 8), 8),
        file(&one("F32", "[18446744073709551615,2]", 0, 8), 8),
        file(&one("F32", "[2]", 8, 0), 8),
        file(&one("F8_E4M3", "[8]", 0, 8), 8),
        file("{", 0),
        file("{}", 0),
        [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        vec![9; 7],
    ];
    for (i, bytes) in bad.iter().enumerate() {
        let e = open(folder.path(), bytes).map(|w| w.names().to_vec()).expect_err(&format!("case {i}"));
        assert!(e.exit_code() == 4 && !e.to_string().contains('\n'), "case {i}: {e}");
    }
}

/// A fixed random walk over changed files: any answer is right except a panic, a hang or a huge allocation.
#[test]
fn mutated_files_do_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n
    };
    let mut model = Model::new(1, 2);
    model.tensors = vec![Tensor::new("a", &[2, 2], 0, vec![1.0; 4]), Tensor::new("b", &[4], 1, vec![2.0; 4])];
    let (object, data) = (pickle(&model.object()), storages(&model.tensors));
    let whole = zip(&torch_entries(&object, &data));
    let legacy = std::fs::read(fixture("torch_legacy.pth")).unwrap();
    let mut accepted = 0;
    for round in 0..20_000 {
        // The pickle inside a sound zip, the whole zip, and the legacy container take turns.
        let mut bytes = [&object, &whole, &legacy][round % 3].clone();
        for _ in 0..1 + random(4) {
            let at = random(bytes.len());
            match random(5) {
                0 => bytes[at] ^= 1 << random(8),
                1 => bytes[at] = [0, 0xff, 0x80, b'.', b'R', b'(', b'Q', b'h'][random(8)],
                2 => drop(bytes.remove(at)),
                3 => bytes.insert(at, random(256) as u8),
                _ => {
                    let end = (at + random(16)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    let to = random(bytes.len());
                    bytes.splice(to..to, piece);
                }
            }
        }
        if round % 3 == 0 {
            bytes = zip(&torch_entries(&bytes, &data));
        }
        if let Ok(w) = open(folder.path(), &bytes) {
            accepted += 1;
            for name in w.names() {
                let n: usize = w.shape(name).unwrap().iter().product();
                assert!(n <= bytes.len(), "{name} of {n} values in {} bytes", bytes.len());
                if let Ok(v) = w.values(name) {
                    assert_eq!(v.len(), n);
                }
            }
        }
    }
    println!("{accepted} of 20000 still read");
}

#[test]
fn golden_pth_values_match_pytorch() {
    // The other networks of the reference data: many tensors, aliases that share storage, optimizer state.
    let Some(root) = shared("golden/pipeline/ct_aniso/model") else { return };
    for arch in ["plain", "resenc", "stunet"] {
        let w = Weights::open(root.join(arch).join("fold_0/checkpoint_final.pth")).unwrap();
        let mut sum = 0.0;
        for name in w.names() {
            sum += w.values(name).unwrap().iter().map(|v| f64::from(v.abs())).sum::<f64>();
        }
        println!("{arch}: {} tensors, sum of magnitudes {sum:.6}", w.names().len());
        let (tensors, expected) = match arch {
            "plain" => (PLAIN.0, PLAIN.1),
            "resenc" => (RESENC.0, RESENC.1),
            _ => (STUNET.0, STUNET.1),
        };
        assert_eq!(w.names().len(), tensors, "{arch}");
        assert!((sum - expected).abs() < 1e-6 * expected, "{arch}: {sum}");
    }
}

/// Tensors and `sum(|v|)` in float64, from PyTorch.
const PLAIN: (usize, f64) = (240, 22865.395662);
const RESENC: (usize, f64) = (740, 91344.940153);
const STUNET: (usize, f64) = (130, 4562.286534);

/// One long text that many scalars refer to: hours of decoding, were it not counted first.
#[test]
fn texts_that_are_decoded_again_and_again_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v1_folder(dir.path(), "fold_0", "x", 3);
    // The last letter is beyond latin1, so that every decoding fails at its end.
    let mut text = "a".repeat(1 << 21).into_bytes();
    text.extend("\u{100}".as_bytes());
    let mut bytes = b"\x80\x02](c_codecs\nencode\nX".to_vec();
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(&text);
    bytes.extend(b"X\x06\x00\x00\x00latin1\x86Rq\x00");
    bytes.extend(b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f8\x85Rh\x00\x86Rq\x01");
    bytes.extend(b"h\x01".repeat(200_000));
    bytes.extend(b"e.");
    std::fs::write(folder.join("fold_0/x.model.pkl"), bytes).unwrap();
    let clock = std::time::Instant::now();
    let e = ModelFolder::open(&folder, &ModelOptions::new()).map(|m| m.kind).unwrap_err().to_string();
    assert!(e.contains("too large"), "{e}");
    assert!(clock.elapsed().as_secs() < 20, "{:?}", clock.elapsed());
}

/// A safetensors header may have any length, also one that begins with the first bytes of a pickle or an archive.
#[test]
fn safetensors_of_any_header_length() {
    let folder = tempfile::tempdir().unwrap();
    for length in [0x80_usize, 0x5480, 0x4b50] {
        let mut file = (length as u64).to_le_bytes().to_vec();
        let mut header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.to_vec();
        header.resize(length, b' ');
        file.extend(header);
        file.extend(2.5f32.to_le_bytes());
        let path = folder.path().join("w.safetensors");
        std::fs::write(&path, file).unwrap();
        assert_eq!(*Weights::open(&path).unwrap().values("w").unwrap(), [2.5], "{length:#x}");
    }
}
