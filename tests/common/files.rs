//! Small image files, byte by byte, so that each byte can be wrong.

use std::io::Write;
use std::path::Path;

/// Offset of the voxels.
pub const DATA: usize = 352;

/// A whole NIfTI-1 file, little endian, int16, `shape` in (x, y, z), spacing 1.5 mm, values like a CT's.
pub fn nifti(shape: [i16; 3]) -> Vec<u8> {
    let mut b = vec![0; DATA];
    put(&mut b, 0, &348i32.to_le_bytes());
    let dim = [3, shape[0], shape[1], shape[2], 1, 1, 1, 1];
    dim.iter().enumerate().for_each(|(i, d)| put(&mut b, 40 + 2 * i, &d.to_le_bytes()));
    put(&mut b, 70, &4i16.to_le_bytes());
    put(&mut b, 72, &16i16.to_le_bytes());
    let pixdim = [1.0f32, 1.5, 1.5, 1.5, 0.0, 0.0, 0.0, 0.0];
    pixdim.iter().enumerate().for_each(|(i, d)| put(&mut b, 76 + 4 * i, &d.to_le_bytes()));
    put(&mut b, 108, &(DATA as f32).to_le_bytes());
    put(&mut b, 112, &1f32.to_le_bytes());
    b[123] = 2;
    put(&mut b, 254, &1i16.to_le_bytes());
    for row in 0..3 {
        put(&mut b, 280 + 16 * row + 4 * row, &1.5f32.to_le_bytes());
    }
    put(&mut b, 344, b"n+1\0");
    let n = shape.iter().map(|&s| s as usize).product::<usize>();
    (0..n).for_each(|i| b.extend_from_slice(&((i * 37 % 1400) as i16 - 1000).to_le_bytes()));
    b
}

/// `bytes` with `new` from `at` on.
pub fn with(mut bytes: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
    put(&mut bytes, at, new);
    bytes
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    bytes[at..at + new.len()].copy_from_slice(new);
}

/// Gzip.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// Copies a folder and all below it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let from = entry.unwrap().path();
        let to = to.join(from.file_name().unwrap());
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).unwrap();
        }
    }
}
