//! Python values as pickles, good and hostile.

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

pub fn call(module: &str, name: &str, args: Vec<Py>) -> Py {
    Py::Call(module.into(), name.into(), args)
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
        Py::Int(i) => match i32::try_from(*i) {
            Ok(i) => {
                out.push(b'J');
                out.extend(i.to_le_bytes());
            }
            Err(_) => {
                out.extend([0x8a, 8]);
                out.extend(i.to_le_bytes());
            }
        },
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

/// Values that run code when Python loads them, with the name that a refusal has to give. Code that ran would leave a
/// file `pwned` behind, in the current folder or in its `out`.
pub fn hostile() -> Vec<(&'static str, Py)> {
    let shell = "touch pwned; echo pwned > out/pwned";
    let python = "open('pwned', 'w').write('pwned')";
    let raw = |pieces: &[&[u8]]| Py::Raw(pieces.concat());
    let mut argument = Vec::new();
    put(&s(shell), &mut argument);
    let import = call("builtins", "__import__", vec![s("os")]);
    let mut system = Vec::new();
    put(&call("builtins", "getattr", vec![import, s("system")]), &mut system);
    vec![
        ("os.system", call("os", "system", vec![s(shell)])),
        ("posix.system", call("posix", "system", vec![s(shell)])),
        ("builtins.eval", call("builtins", "eval", vec![s(python)])),
        ("__builtin__.eval", call("__builtin__", "eval", vec![s(python)])),
        ("builtins.exec", call("builtins", "exec", vec![s(python)])),
        ("__builtin__.getattr", call("__builtin__", "getattr", vec![s("x"), s("y")])),
        ("builtins.__import__", raw(&[&system, b"(", &argument, b"tR"])),
        ("runpy.run_path", call("runpy", "run_path", vec![s("pwned.py")])),
        ("subprocess.Popen", call("subprocess", "Popen", vec![s(shell)])),
        ("pkgutil.resolve_name", call("pkgutil", "resolve_name", vec![s("os:system")])),
        ("torch.load", call("torch", "load", vec![s("other.pth")])),
        ("torch.hub.load", call("torch.hub", "load", vec![s("a/b"), s("c")])),
        ("numpy.testing._private.utils.runstring", call("numpy.testing._private.utils", "runstring", vec![s(python)])),
        ("_pickle.loads", call("_pickle", "loads", vec![s("x")])),
        // Other instructions with the same effect: names from the stack, new objects, objects of Python 1.
        ("os.system", raw(&[b"\x8c\x02os\x8c\x06system\x93(", &argument, b"tR"])),
        ("torch._utils._rebuild_tensor_v2.__globals__", {
            raw(&[b"\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93(", &argument, b"tR"])
        }),
        ("subprocess.Popen", raw(&[b"csubprocess\nPopen\n(", &argument, b"t\x81"])),
        ("os.system", raw(&[b"(cos\nsystem\n", &argument, b"o"])),
        ("os.system", raw(&[b"(", &argument, b"ios\nsystem\n"])),
        ("os.system", raw(&[b"cos\nsystem\n)\x81"])),
    ]
}
