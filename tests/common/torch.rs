//! PyTorch checkpoints, byte by byte, so that each byte can be wrong.

use super::pickle::{Py, call, ints, pickle, s};

/// Key and bytes of a storage.
pub type Storage = (String, Vec<u8>);

/// A tensor of a checkpoint, in a storage of its own.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<i64>,
    /// Elements before the first, in the storage.
    pub offset: i64,
    /// Name of the storage in the archive.
    pub storage: String,
    pub values: Vec<f32>,
}

impl Tensor {
    /// A contiguous tensor.
    pub fn new(name: &str, shape: &[usize], storage: usize, values: Vec<f32>) -> Self {
        let shape = shape.iter().map(|&d| d as i64).collect();
        Self { name: name.into(), shape, offset: 0, storage: storage.to_string(), values }
    }

    fn object(&self) -> Py {
        let mut stride = vec![1i64; self.shape.len()];
        for a in (1..stride.len()).rev() {
            stride[a - 1] = stride[a].wrapping_mul(self.shape[a]);
        }
        tensor(&self.storage, "FloatStorage", self.values.len() as i64, self.offset, &self.shape, &stride)
    }
}

/// A state_dict with this prefix before every name.
pub fn state_dict(tensors: &[Tensor], prefix: &str) -> Py {
    Py::Dict(tensors.iter().map(|t| (s(&format!("{prefix}{}", t.name)), t.object())).collect())
}

/// The storages of the tensors.
pub fn storages(tensors: &[Tensor]) -> Vec<Storage> {
    tensors.iter().map(|t| (t.storage.clone(), f32_bytes(&t.values))).collect()
}

/// A tensor in storage `key` of `numel` elements of class `class` ("FloatStorage").
pub fn tensor(key: &str, class: &str, numel: i64, offset: i64, size: &[i64], stride: &[i64]) -> Py {
    let class = Py::Global("torch".into(), class.into());
    let id = Py::Persistent(Box::new(Py::Tuple(vec![s("storage"), class, s(key), s("cpu"), Py::Int(numel)])));
    let hooks = call("collections", "OrderedDict", vec![]);
    let args = vec![id, Py::Int(offset), ints(size), ints(stride), Py::Bool(false), hooks];
    call("torch._utils", "_rebuild_tensor_v2", args)
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
    /// Of Unix, with the kind of file; 0: written on a system without modes.
    pub mode: u32,
}

impl Entry {
    pub fn stored(name: &str, data: &[u8]) -> Self {
        let (size, crc) = (data.len() as u32, crc32(data));
        Entry { name: name.into(), data: data.into(), method: 0, size, flags: 0, crc, mode: 0 }
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
        directory.extend(b"PK\x01\x02\x14");
        directory.push(if e.mode > 0 { 3 } else { 0 });
        directory.extend(&fields);
        directory.extend([0; 6]);
        directory.extend((e.mode << 16).to_le_bytes());
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
pub fn torch_entries(object: &[u8], storages: &[Storage]) -> Vec<Entry> {
    let mut entries = vec![Entry::stored("archive/data.pkl", object), Entry::stored("archive/byteorder", b"little")];
    entries.extend(storages.iter().map(|(key, data)| Entry::stored(&format!("archive/data/{key}"), data)));
    entries.push(Entry::stored("archive/version", b"3\n"));
    entries
}

/// A checkpoint as `torch.save` writes it.
pub fn torch_zip(object: &Py, storages: &[Storage]) -> Vec<u8> {
    zip(&torch_entries(&pickle(object), storages))
}

pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
