//! Damaged, truncated and hostile files: each is one error that names file and field, none a panic.

use std::io::{Seek, Write};

use stunet::Error;
use stunet::io::{read_nifti, read_nifti_header};
use tempfile::tempdir;

use super::files::{Nii, gz, warnings_of};

/// The error of a file with these bytes: an image error of one line that names the file.
fn refused(bytes: &[u8], name: &str) -> String {
    let dir = tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let e = read_nifti(&[&path]).expect_err("expected an error");
    let m = e.to_string();
    assert!(matches!(e, Error::Image { .. }), "{m}");
    assert!(m.contains(name) && !m.contains('\n'), "{m}");
    m
}

#[test]
fn a_truncated_file_is_refused_wherever_it_is_cut() {
    let bytes = Nii::int16([7, 6, 5]).bytes();
    for cut in 0..bytes.len() {
        let m = refused(&bytes[..cut], "cut.nii");
        assert!(m.contains("expected"), "{m}");
    }
}

#[test]
fn a_truncated_gzip_file_is_refused_wherever_it_is_cut() {
    let whole = Nii::int16([7, 6, 5]).bytes();
    let packed = gz(&whole);
    for cut in 0..packed.len() {
        refused(&packed[..cut], "cut.nii.gz");
    }
    // one member complete, the next cut
    let (head, tail) = whole.split_at(400);
    let (head, tail) = (gz(head), gz(tail));
    for cut in 0..tail.len() {
        refused(&[&head[..], &tail[..cut]].concat(), "cut.nii.gz");
    }
    // whole gzip, short content
    for cut in [0, 100, 347, 348, 352, 400, whole.len() - 1] {
        refused(&gz(&whole[..cut]), "short.nii.gz");
    }
}

#[test]
fn a_wrong_checksum_or_length_is_refused() {
    let packed = gz(&Nii::int16([7, 6, 5]).bytes());
    for back in 1..=8 {
        let mut bad = packed.clone();
        let at = bad.len() - back;
        bad[at] ^= 1;
        assert!(refused(&bad, "crc.nii.gz").contains("gzip"));
    }
    for cut in 1..=8 {
        assert!(refused(&packed[..packed.len() - cut], "trailer.nii.gz").contains("gzip"));
    }
}

#[test]
fn what_follows_the_image_is_warned_of() {
    let f = Nii::int16([3, 4, 5]);
    let (bytes, packed) = (f.bytes(), gz(&f.bytes()));
    let longer = [&bytes[..], &[1; 100]].concat();
    for (bytes, name) in [
        (longer.clone(), "tail.nii"),
        (gz(&longer), "tail.nii.gz"),
        ([&packed[..], &[0; 512]].concat(), "padded.nii.gz"),
        ([&packed[..], b"garbage"].concat(), "garbage.nii.gz"),
    ] {
        let dir = tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let (image, warnings) = warnings_of(|| read_nifti(&[&path]));
        assert_eq!(image.unwrap().channels[0], Nii::ramp(60));
        assert!(warnings.iter().any(|w| w.contains("follow")), "{name}: {warnings:?}");
    }
}

#[test]
fn a_gzip_bomb_is_stopped() {
    // 80 MiB of zeros behind a tiny image, in about 80 KiB
    let mut bytes = Nii::int16([3, 4, 5]).bytes();
    bytes.resize(bytes.len() + (80 << 20), 0);
    assert!(refused(&gz(&bytes), "bomb.nii.gz").contains("bytes follow"));
}

#[test]
fn sizes_are_checked_before_memory_is_asked_for() {
    for dim in [
        [3, 32767, 32767, 32767, 1, 1, 1, 1],
        [7, 32767, 32767, 32767, 32767, 32767, 32767, 32767],
        [4, 32767, 32767, 2, 32767, 1, 1, 1],
        [3, 1600, 1600, 1600, 1, 1, 1, 1],
        [3, 2000, 2000, 500, 1, 1, 1, 1],
    ] {
        let mut f = Nii::int16([2, 2, 2]);
        f.i16(40, &dim);
        assert!(refused(&f.bytes(), "huge.nii").contains("dim"));
        assert!(refused(&f.packed().bytes(), "huge.nii.gz").contains("dim"));
    }
    for (at, value) in [(0, 0), (0, 1), (0, -3), (0, 8), (1, 0), (1, -5), (2, -32768), (3, 0)] {
        let mut f = Nii::int16([2, 2, 2]);
        f.i16(40 + 2 * at, &[value]);
        let m = refused(&f.bytes(), "dim.nii");
        assert!(m.contains(&format!("dim[{at}]: {value}, expected")), "{m}");
    }
}

#[test]
fn fields_without_meaning_are_named() {
    let refused_with = |edit: &dyn Fn(&mut Nii), field: &str| {
        let mut f = Nii::int16([2, 2, 2]);
        edit(&mut f);
        let m = refused(&f.bytes(), "field.nii");
        assert!(m.contains(&format!("field.nii: {field}: ")) && m.contains("expected"), "{m}");
    };
    for code in [0, 1, 3, 32, 128, 1536, 1792, 2048, 2304, -4, 255] {
        refused_with(&|f| f.i16(70, &[code]), "datatype");
    }
    for offset in [0.0, 348.0, 351.0, 352.5, -1.0, 1e9, f32::NAN, f32::INFINITY] {
        refused_with(&|f| f.f32(108, &[offset]), "vox_offset");
    }
    refused_with(&|f| f.h[344..].copy_from_slice(b"n+2\0"), "magic");
    refused_with(&|f| f.h[344..].copy_from_slice(b"\0\0\0\0"), "magic");
    refused_with(&|f| f.h[344..].copy_from_slice(b"ni1\0"), "magic");
    refused_with(&|f| f.h[0] = 0, "sizeof_hdr");
    refused_with(&|f| f.h[..4].copy_from_slice(&540_i32.to_le_bytes()), "sizeof_hdr");
    refused_with(&|f| f.h[..4].copy_from_slice(&540_i32.to_be_bytes()), "sizeof_hdr");
}

#[test]
fn other_kinds_of_file_are_named() {
    let m = refused(&[&540_i32.to_le_bytes()[..], &[0; 600]].concat(), "two.nii");
    assert!(m.contains("NIfTI-2"), "{m}");
    let mut dicom = vec![0; 600];
    dicom[128..132].copy_from_slice(b"DICM");
    assert!(refused(&dicom, "slice.dcm").contains("DICOM"));
    refused(b"", "empty.nii");
    refused(b"\x1f\x8b", "stub.nii.gz");
    refused(&gz(b""), "empty.nii.gz");
    let dir = tempdir().unwrap();
    assert!(matches!(read_nifti(&[dir.path()]), Err(Error::Image { .. })));
    let e = read_nifti(&[dir.path().join("absent.nii")]).unwrap_err();
    assert!(matches!(e, Error::Io { .. }) && e.to_string().contains("absent.nii"), "{e}");
}

#[test]
fn random_edits_never_panic() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("mutant.nii");
    // Overwritten in place: file systems flush a file that is emptied and written anew.
    let mut file = std::fs::File::create(&path).unwrap();
    let mut image = Nii::int16([3, 4, 5]);
    image.i16(252, &[1, 1]);
    image.f32(280, &[1.5, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.5, 0.0]);
    let mut float = Nii::new(&[4, 3, 2], 16, 32);
    float.big = true;
    float.rewrite();
    float.i16(252, &[1]);
    float.f32(256, &[0.5, 0.5, 0.5]);
    let seeds = [image.bytes(), float.bytes(), float.packed().bytes()];
    // xorshift64
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % n
    };
    let mut read = 0;
    for i in 0..20_000 {
        let mut bytes = seeds[i % seeds.len()].clone();
        for _ in 0..1 + random(4) {
            let at = random(bytes.len());
            bytes[at] = match random(4) {
                0 => 0,
                1 => 255,
                2 => bytes[at] ^ (1 << random(8)),
                _ => random(256) as u8,
            };
        }
        file.rewind().unwrap();
        file.write_all(&bytes).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        let header = read_nifti_header(&path);
        if let Ok(image) = read_nifti(&[&path]) {
            read += 1;
            assert_eq!(image.channels[0].len(), image.geometry.len());
            assert_eq!(header.unwrap(), image.geometry);
            assert!(image.geometry.affine.iter().flatten().all(|v| v.is_finite()));
        }
    }
    assert!(read > 2000, "only {read} mutants could be read");
}
