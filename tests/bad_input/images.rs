//! Images.

use super::Bench;
use crate::common::files::{DATA, gzip, nifti, with};

/// Name of the file, its bytes, and what the message has to mention besides the name.
type Bad = (&'static str, Vec<u8>, &'static str);

#[test]
fn damaged_files_are_refused() {
    let good = nifti([12, 11, 10]);
    let packed = gzip(&good);
    let n = packed.len();
    let cut = |bytes: &[u8], keep: usize| bytes[..keep].to_vec();
    let list: Vec<Bad> = vec![
        ("empty.nii", vec![], "header"),
        ("empty.nii.gz", vec![], "header"),
        ("ten_bytes.nii", cut(&good, 10), "header"),
        ("half_a_header.nii", cut(&good, 174), "header"),
        ("header_only.nii", cut(&good, DATA), ": file: "),
        ("half.nii", cut(&good, good.len() / 2), ": file: "),
        ("all_but_a_byte.nii", cut(&good, good.len() - 1), ": file: "),
        ("half.nii.gz", cut(&packed, n / 2), "gzip stream"),
        ("no_trailer.nii.gz", cut(&packed, n - 8), "gzip stream"),
        ("half_a_trailer.nii.gz", cut(&packed, n - 4), "gzip stream"),
        ("all_but_a_byte.nii.gz", cut(&packed, n - 1), "gzip stream"),
        ("wrong_crc.nii.gz", with(packed.clone(), n - 8, &[!packed[n - 8]]), "gzip stream"),
        ("wrong_length.nii.gz", with(packed.clone(), n - 4, &[!packed[n - 4]]), "gzip stream"),
        (
            "spoilt_body.nii.gz",
            with(packed.clone(), n / 2, &packed[n / 2..n / 2 + 64].iter().map(|b| !b).collect::<Vec<_>>()),
            "gzip stream",
        ),
        ("gzip_magic_only.nii.gz", vec![0x1f, 0x8b], "gzip stream"),
        ("text.nii", b"this is a letter, not an image".repeat(30), "NIfTI"),
        ("picture.nii.gz", [b"\x89PNG\r\n\x1a\n".to_vec(), vec![7; 1000]].concat(), "sizeof_hdr"),
        ("packed_text.nii.gz", gzip(&b"nothing to see here ".repeat(60)), "sizeof_hdr"),
    ];
    refuse(&list);
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let good = nifti([12, 11, 10]);
    let dim = |axis: usize, n: i16| with(good.clone(), 40 + 2 * axis, &n.to_le_bytes());
    let pixdim = |axis: usize, mm: f32| with(good.clone(), 76 + 4 * axis, &mm.to_le_bytes());
    let datatype = |code: i16| with(good.clone(), 70, &code.to_le_bytes());
    let huge = [32767i16; 3].iter().enumerate().fold(good.clone(), |b, (i, n)| with(b, 42 + 2 * i, &n.to_le_bytes()));
    let nifti2 = with(with(vec![0; 2000], 0, &540i32.to_le_bytes()), 4, b"n+2\0\r\n\x1a\n");
    let list: Vec<Bad> = vec![
        ("size_of_header.nii", with(good.clone(), 0, &349i32.to_le_bytes()), "sizeof_hdr"),
        ("magic.nii", with(good.clone(), 344, b"n+7\0"), "magic"),
        ("nifti_2.nii", nifti2, "sizeof_hdr"),
        ("no_axes.nii", dim(0, 0), "dim"),
        ("nine_axes.nii", dim(0, 9), "dim"),
        ("minus_one_axis.nii", dim(0, -1), "dim"),
        ("zero_voxels.nii", dim(1, 0), "dim"),
        ("minus_ten_voxels.nii", dim(2, -10), "dim"),
        ("one_slice_too_many.nii", dim(3, 11), ": file: "),
        ("huge.nii", huge.clone(), "dim"),
        ("huge.nii.gz", gzip(&huge), "dim"),
        ("unknown_type.nii", datatype(0), "datatype"),
        ("bits.nii", datatype(1), "datatype"),
        ("complex.nii", datatype(32), "datatype"),
        ("rgb.nii", datatype(128), "datatype"),
        ("quadruple.nii", datatype(1536), "datatype"),
        ("nonsense_type.nii", datatype(9999), "datatype"),
        ("nan_spacing.nii", pixdim(1, f32::NAN), "pixdim"),
        ("infinite_spacing.nii", pixdim(2, f32::INFINITY), "pixdim"),
        ("zero_spacing.nii", pixdim(3, 0.0), "pixdim"),
        ("data_in_the_header.nii", with(good.clone(), 108, &100f32.to_le_bytes()), "vox_offset"),
        ("data_nowhere.nii", with(good.clone(), 108, &f32::NAN.to_le_bytes()), "vox_offset"),
        ("data_behind_the_end.nii", with(good.clone(), 108, &1e9f32.to_le_bytes()), "vox_offset"),
        ("data_at_minus_one.nii", with(good.clone(), 108, &(-1f32).to_le_bytes()), "vox_offset"),
    ];
    refuse(&list);
}

/// A file that unpacks to gigabytes is refused after megabytes.
#[test]
fn a_gzip_bomb_is_refused() {
    let mut bomb = nifti([12, 11, 10]);
    bomb.resize(bomb.len() + (200 << 20), 0);
    refuse(&[("bomb.nii.gz", gzip(&bomb), "gzip stream")]);
}

fn refuse(list: &[Bad]) {
    let bench = Bench::new();
    for (name, bytes, mention) in list {
        std::fs::write(bench.path(name), bytes).unwrap();
        bench.refused(name, "model", &[name], 3, &[name, mention]);
    }
}

/// A whole file whose values no model can use.
#[test]
fn voxels_that_cannot_be_are_refused() {
    let bench = Bench::new();
    let header = with(with(nifti([12, 11, 10]), 70, &16i16.to_le_bytes()), 72, &32i16.to_le_bytes());
    let volume = |odd: f32| {
        let voxels = (0..12 * 11 * 10).map(|i| if i == 700 { odd } else { i as f32 });
        [header[..DATA].to_vec(), voxels.flat_map(f32::to_le_bytes).collect()].concat()
    };
    for (name, odd) in [("nan.nii", f32::NAN), ("infinite.nii", f32::INFINITY)] {
        std::fs::write(bench.path(name), volume(odd)).unwrap();
        bench.refused(name, "model", &[name], 3, &[name, "CT", "not finite"]);
    }
    // nnU-Net v1 cannot crop an image without a nonzero voxel.
    crate::common::binary::stunet_in(bench.dir.path(), &["convert", "model", "v1"]).ok();
    let manifest = std::fs::read_to_string(bench.path("v1/model.json")).unwrap();
    std::fs::write(bench.path("v1/model.json"), manifest.replace("nnunet_v2", "nnunet_v1")).unwrap();
    let n = nifti([12, 11, 10]).len() - DATA;
    std::fs::write(bench.path("zeros.nii"), with(nifti([12, 11, 10]), DATA, &vec![0; n])).unwrap();
    bench.refused("zeros", "v1", &["zeros.nii"], 3, &["zeros.nii", "every voxel is 0"]);
}

#[test]
fn what_is_no_file_or_no_fit_is_refused() {
    let bench = Bench::new();
    let good = nifti([12, 11, 10]);
    std::fs::create_dir(bench.path("folder.nii")).unwrap();
    bench.refused("missing", "model", &["absent.nii"], 3, &["absent.nii"]);
    bench.refused("two channels", "model", &["good.nii", "good.nii"], 3, &["good.nii", "channel", "CT"]);
    let four = with(with(good.clone(), 40, &4i16.to_le_bytes()), 48, &2i16.to_le_bytes());
    std::fs::write(bench.path("two_volumes.nii"), [&four[..], &good[DATA..]].concat()).unwrap();
    bench.refused("4-D", "model", &["two_volumes.nii"], 3, &["two_volumes.nii", "channels"]);
    let args = ["predict", "-m", "model", "-i", "folder.nii", "-o", "out"];
    let ran = crate::common::binary::stunet_in(bench.dir.path(), &args);
    assert!(ran.error(3).contains("folder.nii"), "{}", ran.err);
}

#[test]
fn channels_that_do_not_fit_each_other_are_refused() {
    let bench = Bench::new();
    let mut model = crate::common::nnunet::Model::new(2, 3);
    model.dataset["channel_names"] = serde_json::json!({"0": "T1", "1": "FLAIR"});
    model.write(&bench.path("two"), &["fold_0"]);
    std::fs::write(bench.path("other_shape.nii"), nifti([12, 11, 9])).unwrap();
    let other = with(nifti([12, 11, 10]), 76 + 4, &2f32.to_le_bytes());
    std::fs::write(bench.path("other_spacing.nii"), other).unwrap();
    bench.refused("one of two", "two", &["good.nii"], 3, &["FLAIR", "missing"]);
    bench.refused("three of two", "two", &["good.nii"; 3], 3, &["good.nii", "T1, FLAIR"]);
    bench.refused("shapes", "two", &["good.nii", "other_shape.nii"], 3, &["other_shape.nii"]);
    bench.refused("spacings", "two", &["good.nii", "other_spacing.nii"], 3, &["other_spacing.nii"]);
}
