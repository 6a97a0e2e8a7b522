//! Writers of PyTorch checkpoints and nnU-Net model folders, good and hostile, for the tests of bad input.

use std::path::{Path, PathBuf};

/// A Python value to pickle.
#[derive(Clone)]
pub enum Py {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    Tuple(Vec<Py>),
    List(Vec<Py>),
    Dict(Vec<(Py, Py)>),
    Global(String, String),
    /// A call of a global.
    Call(String, String, Vec<Py>),
    Persistent(Box<Py>),
    /// Instructions as they are.
    Raw(Vec<u8>),
}

pub fn s(v: &str) -> Py {
    Py::Str(v.into())
}

pub fn dict<const N: usize>(items: [(&str, Py); N]) -> Py {
    Py::Dict(items.into_iter().map(|(k, v)| (s(k), v)).collect())
}

pub fn ints(values: &[i64]) -> Py {
    Py::Tuple(values.iter().map(|&v| Py::Int(v)).collect())
}

/// The pickle of a value, protocol 2.
pub fn pickle(value: &Py) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    put(value, &mut out);
    out.push(b'.');
    out
}

fn put(value: &Py, out: &mut Vec<u8>) {
    match value {
        Py::None => out.push(b'N'),
        Py::Bool(b) => out.push(if *b { 0x88 } else { 0x89 }),
        Py::Int(i) => {
            out.extend([0x8a, 8]);
            out.extend(i.to_le_bytes());
        }
        Py::Float(f) => {
            out.push(b'G');
            out.extend(f.to_be_bytes());
        }
        Py::Str(s) => {
            out.push(b'X');
            out.extend((s.len() as u32).to_le_bytes());
            out.extend(s.bytes());
        }
        Py::Tuple(items) => {
            out.push(b'(');
            items.iter().for_each(|i| put(i, out));
            out.push(b't');
        }
        Py::List(items) => {
            out.push(b'(');
            items.iter().for_each(|i| put(i, out));
            out.push(b'l');
        }
        Py::Dict(items) => {
            out.extend(b"}(");
            for (k, v) in items {
                put(k, out);
                put(v, out);
            }
            out.push(b'u');
        }
        Py::Global(module, name) => out.extend(format!("c{module}\n{name}\n").bytes()),
        Py::Call(module, name, args) => {
            put(&Py::Global(module.clone(), name.clone()), out);
            put(&Py::Tuple(args.clone()), out);
            out.push(b'R');
        }
        Py::Persistent(id) => {
            put(id, out);
            out.push(b'Q');
        }
        Py::Raw(bytes) => out.extend(bytes),
    }
}

/// A tensor in storage `key` of `numel` elements of class `class` ("FloatStorage").
pub fn tensor(key: &str, class: &str, numel: i64, offset: i64, size: &[i64], stride: &[i64]) -> Py {
    let class = Py::Global("torch".into(), class.into());
    let id = Py::Persistent(Box::new(Py::Tuple(vec![s("storage"), class, s(key), s("cpu"), Py::Int(numel)])));
    let hooks = Py::Call("collections".into(), "OrderedDict".into(), vec![]);
    let args = vec![id, Py::Int(offset), ints(size), ints(stride), Py::Bool(false), hooks];
    Py::Call("torch._utils".into(), "_rebuild_tensor_v2".into(), args)
}

/// One entry of a zip file.
pub struct Entry {
    pub name: String,
    /// As stored in the file.
    pub data: Vec<u8>,
    /// 0 stored, 8 deflated.
    pub method: u16,
    /// Size that the directory states for the unpacked data.
    pub size: u32,
    /// Bit 0: encrypted.
    pub flags: u16,
    pub crc: u32,
}

impl Entry {
    pub fn stored(name: &str, data: &[u8]) -> Self {
        Entry { name: name.into(), data: data.into(), method: 0, size: data.len() as u32, flags: 0, crc: crc32(data) }
    }
}

/// A zip file with exactly these entries, however wrong.
pub fn zip(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    for e in entries {
        let at = out.len() as u32;
        let mut fields = Vec::new();
        fields.extend([20, 0]);
        for v in [e.flags, e.method, 0, 0x21] {
            fields.extend(v.to_le_bytes());
        }
        for v in [e.crc, e.data.len() as u32, e.size] {
            fields.extend(v.to_le_bytes());
        }
        fields.extend((e.name.len() as u16).to_le_bytes());
        fields.extend([0, 0]);
        out.extend(b"PK\x03\x04");
        out.extend(&fields);
        out.extend(e.name.bytes());
        out.extend(&e.data);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&fields);
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(e.name.bytes());
    }
    let (start, size, n) = (out.len() as u32, directory.len() as u32, entries.len() as u16);
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend(n.to_le_bytes());
    out.extend(n.to_le_bytes());
    out.extend(size.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0, 0]);
    out
}

pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// Entries of a checkpoint as `torch.save` writes them.
pub fn torch_entries(object: &[u8], storages: &[(String, Vec<u8>)]) -> Vec<Entry> {
    let mut entries = vec![Entry::stored("archive/data.pkl", object), Entry::stored("archive/byteorder", b"little")];
    entries.extend(storages.iter().map(|(key, data)| Entry::stored(&format!("archive/data/{key}"), data)));
    entries.push(Entry::stored("archive/version", b"3\n"));
    entries
}

/// A checkpoint as `torch.save` writes it.
pub fn torch_zip(object: &Py, storages: &[(String, Vec<u8>)]) -> Vec<u8> {
    zip(&torch_entries(&pickle(object), storages))
}

pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Name and shape of tensors.
pub type Tensors = Vec<(String, Vec<usize>)>;

/// Name and shape of every tensor of a STU-Net with one block per stage.
pub fn stunet_tensors(dims: [usize; 6], channels: usize, classes: usize) -> Tensors {
    let mut out = Vec::new();
    let mut conv = |name: String, o: usize, i: usize, k: usize| {
        out.push((format!("{name}.weight"), vec![o, i, k, k, k]));
        out.push((format!("{name}.bias"), vec![o]));
    };
    let mut norms = Vec::new();
    let mut block = |conv: &mut dyn FnMut(String, usize, usize, usize), at: String, i: usize, o: usize| {
        conv(format!("{at}.conv1"), o, i, 3);
        conv(format!("{at}.conv2"), o, o, 3);
        conv(format!("{at}.conv3"), o, i, 1);
        for n in ["norm1", "norm2"] {
            norms.push((format!("{at}.{n}.weight"), vec![o]));
            norms.push((format!("{at}.{n}.bias"), vec![o]));
        }
    };
    for s in 0..6 {
        block(&mut conv, format!("conv_blocks_context.{s}.0"), if s == 0 { channels } else { dims[s - 1] }, dims[s]);
    }
    for u in 0..5 {
        block(&mut conv, format!("conv_blocks_localization.{u}.0"), 2 * dims[4 - u], dims[4 - u]);
    }
    for u in 0..5 {
        conv(format!("upsample_layers.{u}.conv"), dims[4 - u], dims[5 - u], 1);
        conv(format!("seg_outputs.{u}"), classes, dims[4 - u], 1);
    }
    out.extend(norms);
    out
}

/// A state_dict and its storages, values from a simple rule.
pub fn state_dict(tensors: &[(String, Vec<usize>)], prefix: &str) -> (Py, Vec<(String, Vec<u8>)>) {
    let mut storages = Vec::new();
    let mut items = Vec::new();
    for (i, (name, shape)) in tensors.iter().enumerate() {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|j| ((i * 31 + j * 7) % 101) as f32 / 101.0 - 0.5).collect();
        storages.push((i.to_string(), f32_bytes(&values)));
        let size: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        let mut stride = vec![1; size.len()];
        for a in (1..size.len()).rev() {
            stride[a - 1] = stride[a] * size[a];
        }
        items
            .push((s(&format!("{prefix}{name}")), tensor(&i.to_string(), "FloatStorage", n as i64, 0, &size, &stride)));
    }
    (Py::Dict(items), storages)
}

pub const TINY: [usize; 6] = [2, 2, 3, 3, 4, 4];

/// `plans.json` of a 3D model with `channels` z-scored channels.
pub fn v2_plans(channels: usize) -> serde_json::Value {
    let kwargs =
        |order: u8| serde_json::json!({"is_seg": false, "order": order, "order_z": 0, "force_separate_z": null});
    serde_json::json!({
        "dataset_name": "Dataset001_Tiny", "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": {
            "preprocessor_name": "DefaultPreprocessor", "patch_size": [32, 32, 32], "spacing": [1.5, 1.5, 1.5],
            "normalization_schemes": vec!["ZScoreNormalization"; channels], "use_mask_for_norm": vec![false; channels],
            "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": kwargs(3),
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": kwargs(1),
            "architecture": {"arch_kwargs": {"strides":
                [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]]}},
        }},
        "foreground_intensity_properties_per_channel": {},
    })
}

/// `dataset.json` with `classes - 1` foreground labels.
pub fn v2_dataset(channels: usize, classes: usize) -> serde_json::Value {
    let names: serde_json::Map<_, _> = (0..channels).map(|c| (c.to_string(), "MR".into())).collect();
    let mut labels = serde_json::Map::from_iter([("background".to_string(), 0.into())]);
    labels.extend((1..classes).map(|l| (format!("organ_{l}"), l.into())));
    serde_json::json!({"channel_names": names, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"})
}

/// The object of an nnU-Net v2 checkpoint around a state_dict.
pub fn v2_checkpoint(state: Py) -> Py {
    let device = Py::Call("torch".into(), "device".into(), vec![s("cuda"), Py::Int(0)]);
    dict([
        ("network_weights", state),
        ("trainer_name", s("STUNetTrainer_tiny")),
        ("init_args", dict([("configuration", s("3d_fullres")), ("fold", Py::Int(0)), ("device", device)])),
        ("inference_allowed_mirroring_axes", ints(&[0, 1, 2])),
    ])
}

/// Writes an nnU-Net v2 model folder of a tiny STU-Net with the given fold folders and returns its path.
pub fn v2_folder(root: &Path, folds: &[&str], channels: usize, classes: usize) -> PathBuf {
    let folder = root.join("STUNetTrainer_tiny__nnUNetPlans__3d_fullres");
    let (state, storages) = state_dict(&stunet_tensors(TINY, channels, classes), "_orig_mod.module.");
    let bytes = torch_zip(&v2_checkpoint(state), &storages);
    for fold in folds {
        std::fs::create_dir_all(folder.join(fold)).unwrap();
        std::fs::write(folder.join(fold).join("checkpoint_final.pth"), &bytes).unwrap();
    }
    std::fs::write(folder.join("plans.json"), v2_plans(channels).to_string()).unwrap();
    std::fs::write(folder.join("dataset.json"), v2_dataset(channels, classes).to_string()).unwrap();
    folder
}

/// The object of `NAME.model.pkl` of nnU-Net v1 for one z-scored channel.
pub fn v1_info(classes: usize, stage: Py) -> Py {
    let zeroth = |v: Py| Py::Dict(vec![(Py::Int(0), v)]);
    let pools = Py::List((0..5).map(|p| ints(&[if p < 4 { 2 } else { 1 }, if p < 4 { 2 } else { 1 }, 2])).collect());
    let plans = dict([
        ("num_stages", Py::Int(1)),
        ("num_modalities", Py::Int(1)),
        ("modalities", zeroth(s("MR"))),
        ("normalization_schemes", zeroth(s("nonCT"))),
        ("use_mask_for_norm", zeroth(Py::Bool(false))),
        ("num_classes", Py::Int(classes as i64 - 1)),
        ("transpose_forward", ints(&[0, 1, 2])),
        ("transpose_backward", ints(&[0, 1, 2])),
        (
            "plans_per_stage",
            zeroth(dict([
                ("patch_size", ints(&[32, 32, 32])),
                ("current_spacing", Py::Tuple(vec![Py::Float(1.5); 3])),
                ("pool_op_kernel_sizes", pools),
            ])),
        ),
    ]);
    let init = Py::Tuple(vec![s(""), Py::Int(0), s(""), s(""), Py::Bool(false), stage, Py::Bool(true)]);
    dict([("init", init), ("name", s("STUNetTrainer_tiny")), ("plans", plans)])
}

/// Writes an nnU-Net v1 trainer folder of a tiny STU-Net and returns its path.
pub fn v1_folder(root: &Path, fold: &str, name: &str, classes: usize) -> PathBuf {
    let folder = root.join("Task001_Tiny").join("STUNetTrainer_tiny__nnUNetPlansv2.1");
    std::fs::create_dir_all(folder.join(fold)).unwrap();
    let (state, storages) = state_dict(&stunet_tensors(TINY, 1, classes), "module.");
    let object = dict([("epoch", Py::Int(1)), ("state_dict", state), ("optimizer_state_dict", Py::None)]);
    std::fs::write(folder.join(fold).join(format!("{name}.model")), torch_zip(&object, &storages)).unwrap();
    let info = pickle(&v1_info(classes, Py::Int(0)));
    std::fs::write(folder.join(fold).join(format!("{name}.model.pkl")), info).unwrap();
    folder
}

/// Values that run code when Python loads them, with the name that a refusal has to give.
pub fn hostile_values() -> Vec<(&'static str, Py)> {
    let call = |m: &str, n: &str, args: Vec<Py>| Py::Call(m.into(), n.into(), args);
    let nested = call("builtins", "getattr", vec![call("builtins", "__import__", vec![s("os")]), s("system")]);
    vec![
        ("os.system", call("os", "system", vec![s("touch pwned")])),
        ("posix.system", call("posix", "system", vec![s("touch pwned")])),
        ("builtins.eval", call("builtins", "eval", vec![s("open('pwned', 'w')")])),
        ("builtins.exec", call("builtins", "exec", vec![s("open('pwned', 'w')")])),
        ("__builtin__.getattr", call("__builtin__", "getattr", vec![s("x"), s("y")])),
        ("builtins.__import__", nested),
        ("runpy.run_path", call("runpy", "run_path", vec![s("pwned.py")])),
        ("subprocess.Popen", call("subprocess", "Popen", vec![s("touch pwned")])),
        ("pkgutil.resolve_name", call("pkgutil", "resolve_name", vec![s("os:system")])),
        ("torch.load", call("torch", "load", vec![s("other.pth")])),
        ("torch.hub.load", call("torch.hub", "load", vec![s("a/b"), s("c")])),
        ("numpy.testing._private.utils.runstring", call("numpy.testing._private.utils", "runstring", vec![s("1")])),
        ("_pickle.loads", call("_pickle", "loads", vec![s("x")])),
        ("os.system", Py::Raw(b"\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R".to_vec())),
        ("os.system", Py::Raw(b"(cos\nsystem\nS'id'\no".to_vec())),
        ("os.system", Py::Raw(b"(S'id'\nios\nsystem\n".to_vec())),
        ("os.system", Py::Raw(b"cos\nsystem\n)\x81".to_vec())),
    ]
}

/// Checkpoints that must be refused, with a piece of the message to expect.
pub fn hostile_checkpoints() -> Vec<(String, Vec<u8>, &'static str)> {
    let mut out = Vec::new();
    for (name, value) in hostile_values() {
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
