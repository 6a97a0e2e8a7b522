//! Reading and writing NIfTI: values, geometry, and the seven defects of the `nifti` crate that the guard closes.

mod damage;
mod files;
mod geometry;

use files::{Nii, gz, warnings_of};
use proptest::prelude::*;
use stunet::Error;
use stunet::io::{Geometry, Image, LabelData, Segmentation};
use stunet::io::{
    ReadOptions, read_nifti, read_nifti_header, read_nifti_with, read_segmentation, write_image, write_nifti,
};
use tempfile::tempdir;

fn labels(geometry: Geometry) -> Segmentation {
    let n = geometry.len();
    Segmentation::new(LabelData::U8((0..n).map(|i| (i % 7) as u8).collect()), geometry, Vec::new()).unwrap()
}

#[test]
fn defect_1_names_with_dots_are_used_as_given() {
    let dir = tempdir().unwrap();
    let names = ["1.2.840.113619.nii", "1.2.840.113620.nii", "case.v2.nii", "case.v3.nii.gz", "ä b.nii"];
    for name in names {
        write_nifti(dir.path().join(name), &labels(Geometry::new([2, 3, 4], [1.0; 3]))).unwrap();
    }
    let mut found: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, names);
}

// Defect 2, success on a full disk, is tested where the disk can be made full: in src/io/atomic.rs.

#[test]
fn defect_3_voxels_start_at_vox_offset() {
    let mut f = Nii::int16([3, 4, 5]);
    f.f32(108, &[1024.0]);
    f.gap = vec![0x55; 1024 - 348];
    let plain = f.read("offset.nii").unwrap();
    assert_eq!(plain.channels[0], Nii::ramp(60));
    assert_eq!(f.packed().read("offset.nii.gz").unwrap(), plain);
}

#[test]
fn defect_4_no_scaling_for_slope_zero_nan_infinity() {
    for slope in [0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut f = Nii::int16([2, 2, 2]);
        f.f32(112, &[slope, 5.0]);
        assert_eq!(f.read("slope.nii").unwrap().channels[0], Nii::ramp(8), "slope {slope}");
    }
}

#[test]
fn scaling_is_done_in_f64() {
    let mut f = Nii::new(&[1, 1, 2], 8, 32);
    f.data = [16_777_217_i32, -2_147_483_647].iter().flat_map(|v| v.to_le_bytes()).collect();
    f.f32(112, &[0.1, -1_677_721.7]);
    let (slope, inter) = (f64::from(0.1_f32), f64::from(-1_677_721.7_f32));
    let expected = [16_777_217.0, -2_147_483_647.0].map(|v: f64| (v * slope + inter) as f32);
    assert_eq!(f.read("scaled.nii").unwrap().channels[0], expected);
    f.f32(112, &[2.0, f32::NAN]);
    assert!(f.read("scaled.nii").unwrap_err().to_string().contains("scl_inter"));
}

#[test]
fn defect_5_odd_qforms_do_not_panic() {
    let mut f = Nii::int16([2, 3, 4]);
    f.i16(252, &[1]);
    // (pixdim[0], signs, quaternion) and the affine's diagonal
    let half = std::f32::consts::FRAC_1_SQRT_2;
    for (qfac, sign, quaternion, diagonal) in [
        (0.0, 1.0, [0.0, 0.0, 0.0], [1.5, 2.0, 2.5]),
        (-1.0, 1.0, [0.0, 0.0, 0.0], [1.5, 2.0, -2.5]),
        (1.0, -1.0, [0.0, 0.0, 0.0], [1.5, 2.0, 2.5]),
        (1.0, 1.0, [0.0, 0.0, 1.0], [-1.5, -2.0, 2.5]),
        // longer than one: rotation by 180 degrees about the axis, as the standard's library does
        (1.0, 1.0, [0.0, 0.0, 3.0], [-1.5, -2.0, 2.5]),
        (1.0, 1.0, [half, half, half], [-0.5, -2.0 / 3.0, -2.5 / 3.0]),
    ] {
        f.f32(76, &[qfac, sign * 1.5, 2.0, sign * 2.5]);
        f.f32(256, &quaternion);
        let g = f.read("qform.nii").unwrap().geometry;
        for i in 0..3 {
            assert!((g.affine[i][i] - diagonal[i]).abs() < 1e-6, "{quaternion:?}: {:?}", g.affine);
        }
        assert_eq!(g.spacing_mm, [2.5, 2.0, 1.5]);
    }
    f.f32(256, &[f32::NAN, 0.0, 0.0]);
    assert!(f.read("qform.nii").unwrap_err().to_string().contains("qform"));
}

#[test]
fn defect_6_size_comes_from_datatype_not_bitpix() {
    for bitpix in [0, 8, 32, -16, 64] {
        let mut f = Nii::int16([3, 4, 5]);
        f.i16(72, &[bitpix]);
        let (image, warnings) = warnings_of(|| f.read("bitpix.nii"));
        assert_eq!(image.unwrap().channels[0], Nii::ramp(60));
        assert!(warnings.iter().any(|w| w.contains("bitpix")), "{warnings:?}");
    }
}

#[test]
fn defect_7_gzip_of_many_members() {
    let f = Nii::int16([5, 6, 7]);
    let bytes = f.bytes();
    for piece in [1, 10, 100, 348, 352, 400] {
        // an empty member ends the files of bgzip
        let packed: Vec<u8> = bytes.chunks(piece).chain([&[][..]]).flat_map(gz).collect();
        let dir = tempdir().unwrap();
        let path = dir.path().join("members.nii.gz");
        std::fs::write(&path, packed).unwrap();
        assert_eq!(read_nifti(&[&path]).unwrap().channels[0], Nii::ramp(210), "members of {piece} bytes");
    }
}

#[test]
fn content_decides_what_is_packed() {
    let f = Nii::int16([2, 3, 4]);
    let expected = f.read("a.nii").unwrap();
    assert_eq!(f.read("plain.nii.gz").unwrap(), expected);
    assert_eq!(f.packed().read("packed.nii").unwrap(), expected);
    assert_eq!(f.packed().read("packed").unwrap(), expected);
}

#[test]
fn channels_come_from_files_or_from_the_fourth_axis() {
    let dir = tempdir().unwrap();
    let mut f = Nii::int16([2, 3, 4]);
    let one = f.write(&dir, "c_0000.nii");
    let two = f.packed().write(&dir, "c_0001.nii.gz");
    let image = read_nifti(&[&one, &two]).unwrap();
    assert_eq!(image.channels, [Nii::ramp(24), Nii::ramp(24)]);

    f.i16(40, &[4, 2, 3, 2, 2]);
    let image = f.read("4d.nii").unwrap();
    assert_eq!(image.geometry.shape, [2, 3, 2]);
    assert_eq!(image.channels, [&Nii::ramp(24)[..12], &Nii::ramp(24)[12..]]);
    f.i16(40, &[5, 2, 3, 2, 1, 2]);
    assert_eq!(f.read("5d.nii").unwrap().channels, image.channels);
    f.i16(40, &[7, 2, 3, 4, 1, 1, 1, 1]);
    assert_eq!(f.read("7d.nii").unwrap().channels, [Nii::ramp(24)]);
    f.i16(40, &[5, 2, 3, 1, 2, 2]);
    assert!(f.read("time.nii").unwrap_err().to_string().contains("dim"));

    assert!(matches!(read_nifti(&[""; 0]), Err(Error::Usage { .. })));
}

#[test]
fn what_is_larger_than_the_limit_is_refused_by_its_header() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.nii");
    let image = Image::new(vec![vec![1.0; 24]; 2], Geometry::new([2, 3, 4], [1.0; 3])).unwrap();
    write_image(&path, &image).unwrap();
    let with = |bytes| read_nifti_with(&[&path], &ReadOptions::default().max_bytes(bytes));
    assert_eq!(with(192).unwrap().channels.len(), 2);
    let e = with(191).unwrap_err();
    assert_eq!(e.exit_code(), 3);
    assert!(e.to_string().contains("192 bytes") && e.to_string().contains("limit is 191"), "{e}");
}

#[test]
fn a_flat_image_has_one_slice() {
    let mut f = Nii::int16([2, 3, 4]);
    f.i16(40, &[2, 4, 6]);
    f.f32(76, &[1.0, 0.5, 0.75, 0.0]);
    f.i16(254, &[1]);
    f.f32(280, &[0.5, 0.0, 0.0, 1.0, 0.0, 0.75, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0]);
    let image = f.read("flat.nii").unwrap();
    assert_eq!(image.geometry.shape, [1, 6, 4]);
    // nnU-Net's spacing for 2-D files
    assert_eq!(image.geometry.spacing_mm, [749.25, 0.75, 0.5]);
    assert_eq!(image.geometry.affine[2], [0.0, 0.0, 1.0, 3.0]);
    let dir = tempdir().unwrap();
    let path = dir.path().join("flat_labels.nii");
    write_nifti(&path, &labels(image.geometry.clone())).unwrap();
    assert_eq!(read_nifti_header(&path).unwrap().shape, [1, 6, 4]);
    assert_eq!(&std::fs::read(&path).unwrap()[40..46], &[2, 0, 4, 0, 6, 0]);
}

#[test]
fn files_of_one_image_must_match() {
    let dir = tempdir().unwrap();
    let one = Nii::int16([2, 3, 4]).write(&dir, "one.nii");
    let second = |edit: &dyn Fn(&mut Nii)| {
        let mut f = Nii::int16([2, 3, 4]);
        edit(&mut f);
        let two = f.write(&dir, "two.nii");
        warnings_of(|| read_nifti(&[&one, &two]))
    };
    let message = |edit: &dyn Fn(&mut Nii)| second(edit).0.unwrap_err().to_string();

    let m = message(&|f| f.i16(40, &[3, 4, 3, 2]));
    assert!(m.contains("two.nii: dim: 4 x 3 x 2") && m.contains("expected 2 x 3 x 4") && m.contains("one.nii"), "{m}");
    let m = message(&|f| f.i16(40, &[4, 2, 3, 2, 2]));
    assert!(m.contains("channels"), "{m}");
    let m = message(&|f| f.f32(76, &[1.0, 1.5, 2.0, 2.6]));
    assert!(m.contains("two.nii: pixdim") && m.contains("one.nii"), "{m}");

    assert!(second(&|f| f.f32(76, &[1.0, 1.500_001, 2.0, 2.5])).0.is_ok());
    let (image, warnings) = second(&|f| {
        f.i16(252, &[1]);
        f.f32(268, &[0.0, 0.0, 7.0]);
    });
    assert!(image.is_ok() && warnings.iter().any(|w| w.contains("origin")), "{warnings:?}");
}

#[test]
fn a_header_and_its_image_file() {
    let dir = tempdir().unwrap();
    let mut f = Nii::int16([2, 3, 4]);
    f.h[344..348].copy_from_slice(b"ni1\0");
    f.f32(108, &[0.0]);
    let hdr = dir.path().join("pair.v1.hdr");
    std::fs::write(&hdr, f.h).unwrap();
    let m = read_nifti(&[&hdr]).unwrap_err().to_string();
    assert!(m.contains("pair.v1.img"), "{m}");
    std::fs::write(dir.path().join("pair.v1.img"), &f.data).unwrap();
    assert_eq!(read_nifti(&[&hdr]).unwrap().channels, [Nii::ramp(24)]);
    std::fs::write(dir.path().join("pair.v1.img"), &f.data[1..]).unwrap();
    assert!(read_nifti(&[&hdr]).unwrap_err().to_string().contains("truncated"));
}

#[test]
fn what_is_not_finite_is_kept_and_counted() {
    let mut f = Nii::new(&[2, 2, 2], 16, 32);
    let values = [0.0, f32::NAN, 1.0, f32::INFINITY, 2.0, f32::NEG_INFINITY, 3.0, 4.0];
    f.data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let image = f.read("nan.nii").unwrap();
    assert_eq!(image.non_finite(), 3);
    assert!(image.channels[0][1].is_nan());
    assert_eq!(image.channels[0][3], f32::INFINITY);
}

#[test]
fn label_maps_round_trip_and_repeat_byte_for_byte() {
    let dir = tempdir().unwrap();
    let geometry = Geometry::new([3, 4, 5], [3.0, 0.5, 0.7]);
    for (i, data) in [
        LabelData::U8((0..60).collect()),
        LabelData::U8([255; 60].to_vec()),
        LabelData::U16((0..60).map(|i| i * 1000).collect()),
    ]
    .into_iter()
    .enumerate()
    {
        let s = Segmentation::new(data, geometry.clone(), Vec::new()).unwrap();
        for ext in ["nii", "nii.gz", "NII.GZ"] {
            let path = dir.path().join(format!("{i}.{ext}"));
            write_nifti(&path, &s).unwrap();
            let first = std::fs::read(&path).unwrap();
            let back = read_segmentation(&path).unwrap();
            assert_eq!(back.labels, s.labels);
            write_nifti(&path, &back).unwrap();
            let packed = first.starts_with(&[0x1f, 0x8b]);
            assert_eq!(packed, ext != "nii");
            // no time stamp, no name
            assert!(!packed || first[3..8] == [0; 5]);
            write_nifti(&path, &s).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), first);
        }
    }
}

#[test]
fn what_is_no_label_map_is_refused() {
    for (value, told) in [(-1.0, "-1"), (0.5, "0.5"), (65536.0, "65536"), (f32::NAN, "NaN")] {
        let mut f = Nii::new(&[2, 2, 2], 16, 32);
        f.data[4 * 5..4 * 6].copy_from_slice(&f32::to_le_bytes(value));
        let dir = tempdir().unwrap();
        let m = read_segmentation(f.write(&dir, "seg.nii")).unwrap_err().to_string();
        assert!(m.contains(&format!("{told} at (1, 0, 1)")), "{m}");
    }
    let mut f = Nii::int16([2, 3, 4]);
    f.i16(40, &[4, 2, 3, 2, 2]);
    let dir = tempdir().unwrap();
    assert!(read_segmentation(f.write(&dir, "seg.nii")).unwrap_err().to_string().contains("2 channels"));
}

#[test]
fn images_are_written_as_int16_where_that_is_exact() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("image.nii");
    let g = Geometry::new([1, 2, 2], [1.0; 3]);
    for (values, code) in [
        ([-1024.0, 0.0, 32767.0, -32768.0], 4),
        ([-1024.0, 0.5, 0.0, 0.0], 16),
        ([32768.0, 0.0, 0.0, 0.0], 16),
        ([f32::NAN, 0.0, 0.0, 0.0], 16),
        ([f32::INFINITY, 0.0, 0.0, 0.0], 16),
    ] {
        let image = Image::new(vec![values.to_vec(), vec![1.0; 4]], g.clone()).unwrap();
        write_image(&path, &image).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[70], code, "{values:?}");
        let back = read_nifti(&[&path]).unwrap();
        let bits = |c: &[Vec<f32>]| c.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&back.channels), bits(&image.channels));
    }
}

#[test]
fn what_cannot_be_written_is_said_and_leaves_nothing() {
    let dir = tempdir().unwrap();
    let s = labels(Geometry::new([2, 3, 4], [1.0; 3]));
    for name in ["x.nrrd", "x", "x.nii.bz2", "x.gz"] {
        let e = write_nifti(dir.path().join(name), &s).unwrap_err();
        assert!(matches!(e, Error::Usage { .. }) && e.to_string().contains(".nii.gz or .nii"), "{e}");
    }
    let e = write_nifti(dir.path().join("no/folder.nii"), &s).unwrap_err();
    assert!(matches!(e, Error::Io { .. }) && e.to_string().contains("folder.nii"), "{e}");
    let long = labels(Geometry::new([1, 1, 40_000], [1.0; 3]));
    let e = write_nifti(dir.path().join("long.nii"), &long).unwrap_err();
    assert!(e.to_string().contains("32767"), "{e}");
    std::fs::create_dir(dir.path().join("folder.nii")).unwrap();
    assert!(write_nifti(dir.path().join("folder.nii"), &s).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// A number of every type, in both byte orders, and what has to come out of it.
fn encode(code: i16, v: f64, big: bool) -> (Vec<u8>, f64) {
    macro_rules! number {
        ($t:ty) => {{
            let n = v as $t;
            (if big { n.to_be_bytes().to_vec() } else { n.to_le_bytes().to_vec() }, n as f64)
        }};
    }
    match code {
        2 => number!(u8),
        256 => number!(i8),
        512 => number!(u16),
        4 => number!(i16),
        768 => number!(u32),
        8 => number!(i32),
        1280 => number!(u64),
        1024 => number!(i64),
        16 => number!(f32),
        _ => number!(f64),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_type_in_both_byte_orders_packed_or_not(
        code in prop::sample::select(vec![2_i16, 256, 512, 4, 768, 8, 1280, 1024, 16, 64]),
        big: bool,
        packed: bool,
        scale in prop::option::of((-3.0_f32..3.0, -100.0_f32..100.0)),
        shape in [1_usize..6, 1..6, 1..6],
        channels in 1_usize..3,
        seed in prop::collection::vec(-1e5_f64..1e5, 250),
    ) {
        let n = shape.iter().product::<usize>() * channels;
        let encoded: Vec<_> = seed[..n].iter().map(|&v| encode(code, v, big)).collect();
        let mut f = Nii::new(&[shape[2], shape[1], shape[0]], code, (encoded[0].0.len() * 8) as i16);
        f.big = big;
        f.rewrite();
        f.i16(40, &[4, shape[2] as i16, shape[1] as i16, shape[0] as i16, channels as i16]);
        f.data = encoded.iter().flat_map(|e| e.0.clone()).collect();
        if let Some((slope, inter)) = scale {
            f.f32(112, &[slope, inter]);
        }
        let image = if packed { f.packed() } else { f }.read("p.nii").unwrap();
        prop_assert_eq!(image.geometry.shape, shape);
        let (slope, inter) = scale.filter(|s| s.0 != 0.0).unwrap_or((1.0, 0.0));
        let expected: Vec<f32> =
            encoded.iter().map(|e| (e.1 * f64::from(slope) + f64::from(inter)) as f32).collect();
        prop_assert_eq!(image.channels.concat(), expected);
    }
}
