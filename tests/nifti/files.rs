//! NIfTI files made by hand, byte by byte, independently of the library's writer.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use stunet::Result;
use stunet::io::{Image, read_nifti};
use tempfile::TempDir;

/// A file in memory: header, what lies between header and voxels, voxels.
#[derive(Clone)]
pub struct Nii {
    pub h: [u8; 348],
    pub gap: Vec<u8>,
    pub data: Vec<u8>,
    /// Numbers of the header are big-endian.
    pub big: bool,
    packed: bool,
    dim: [i16; 3],
    kind: [i16; 2],
}

impl Nii {
    /// A file of x, y, z voxels of the given `datatype` and `bitpix`, all zero, 1.5 x 2 x 2.5 mm.
    pub fn new(dim: &[usize; 3], datatype: i16, bitpix: i16) -> Self {
        let data = vec![0; dim.iter().product::<usize>() * bitpix as usize / 8];
        let dim = dim.map(|d| d as i16);
        let kind = [datatype, bitpix];
        let mut f = Self { h: [0; 348], gap: vec![0; 4], data, big: false, packed: false, dim, kind };
        f.rewrite();
        f
    }

    /// int16 voxels 0, 1, 2, ...
    pub fn int16(dim: [usize; 3]) -> Self {
        let mut f = Self::new(&dim, 4, 16);
        f.data = (0..dim.iter().product::<usize>() as i16).flat_map(i16::to_le_bytes).collect();
        f
    }

    pub fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32).collect()
    }

    /// Writes the fields again, in the byte order `big`.
    pub fn rewrite(&mut self) {
        self.h = [0; 348];
        let size = if self.big { 348_i32.to_be_bytes() } else { 348_i32.to_le_bytes() };
        self.h[..4].copy_from_slice(&size);
        let [x, y, z] = self.dim;
        self.i16(40, &[3, x, y, z, 1, 1, 1, 1]);
        self.i16(70, &self.kind.clone());
        self.f32(76, &[1.0, 1.5, 2.0, 2.5, 1.0, 1.0, 1.0, 1.0]);
        self.f32(108, &[352.0, 1.0, 0.0]);
        self.h[123] = 2;
        self.h[344..].copy_from_slice(b"n+1\0");
    }

    pub fn i16(&mut self, at: usize, values: &[i16]) {
        for (i, v) in values.iter().enumerate() {
            let b = if self.big { v.to_be_bytes() } else { v.to_le_bytes() };
            self.h[at + 2 * i..][..2].copy_from_slice(&b);
        }
    }

    pub fn f32(&mut self, at: usize, values: &[f32]) {
        for (i, v) in values.iter().enumerate() {
            let b = if self.big { v.to_be_bytes() } else { v.to_le_bytes() };
            self.h[at + 4 * i..][..4].copy_from_slice(&b);
        }
    }

    /// The same file, written through gzip.
    pub fn packed(&self) -> Self {
        Self { packed: true, ..self.clone() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let bytes = [&self.h[..], &self.gap, &self.data].concat();
        if self.packed { gz(&bytes) } else { bytes }
    }

    pub fn write(&self, dir: &TempDir, name: &str) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }

    pub fn read(&self, name: &str) -> Result<Image> {
        let dir = tempfile::tempdir().unwrap();
        read_nifti(&[self.write(&dir, name)])
    }
}

/// One gzip member.
pub fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    w.write_all(bytes).unwrap();
    w.finish().unwrap()
}

/// What `f` returns, and the warnings that it logs on this thread.
pub fn warnings_of<T>(f: impl FnOnce() -> T) -> (T, Vec<String>) {
    let log = Log::default();
    let result = tracing::subscriber::with_default(log.clone(), f);
    let lines = log.0.lock().unwrap().clone();
    (result, lines)
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, meta: &tracing::Metadata<'_>) -> bool {
        *meta.level() <= tracing::Level::WARN
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{value:?}");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}
