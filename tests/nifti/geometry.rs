//! Orientation: the file's voxel order is never changed, and results carry their input's geometry bit for bit.

use std::collections::HashSet;

use stunet::io::{Geometry, Image, LabelData, Segmentation};
use stunet::io::{read_nifti, read_nifti_header, read_segmentation, write_image, write_nifti};
use tempfile::tempdir;

use super::files::{Nii, warnings_of};

/// Parts of a header that say where voxels lie: dim, pixdim, units, codes, qform, sform.
const GEOMETRY: [std::ops::Range<usize>; 4] = [40..56, 76..108, 123..124, 252..328];

/// Reads, writes labels and image, and compares the geometry of all three.
fn round_trip(f: &Nii) -> Geometry {
    let dir = tempdir().unwrap();
    let image = read_nifti(&[f.write(&dir, "in.nii")]).unwrap();
    let g = image.geometry.clone();
    let labels = LabelData::U8((0..g.len()).map(|i| (i % 200) as u8).collect());
    let s = Segmentation::new(labels, g.clone(), Vec::new()).unwrap();
    for name in ["out.nii", "out.nii.gz"] {
        let path = dir.path().join(name);
        write_nifti(&path, &s).unwrap();
        let back = read_segmentation(&path).unwrap();
        assert_eq!(back.labels, s.labels);
        assert_eq!((back.geometry.shape, back.geometry.spacing_mm), (g.shape, g.spacing_mm));
        assert_eq!(back.geometry.affine, g.affine);
        assert_eq!(read_nifti_header(&path).unwrap(), back.geometry);
        let (ours, theirs) = (back.geometry.header.unwrap(), g.header.as_ref().unwrap());
        for part in GEOMETRY {
            assert_eq!(ours[part.clone()], theirs[part.clone()], "header bytes {part:?}");
        }
        write_image(&path, &image).unwrap();
        let back = read_nifti(&[&path]).unwrap();
        assert_eq!(back.channels, image.channels);
        assert_eq!(back.geometry.affine, g.affine);
    }
    g
}

#[test]
fn all_48_axis_orientations_by_sform() {
    let mut seen = HashSet::new();
    let permutations = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for (p, flips) in permutations.iter().flat_map(|p| (0..8).map(move |f| (p, f))) {
        let mut rows = [[0.0_f32; 4]; 3];
        for axis in 0..3 {
            let sign = if flips >> axis & 1 == 1 { -1.0 } else { 1.0 };
            rows[p[axis]][axis] = sign * [1.5, 2.0, 2.5][axis];
        }
        for (row, offset) in rows.iter_mut().zip([-100.25, 33.3, 1e-3]) {
            row[3] = offset;
        }
        let mut f = Nii::int16([3, 4, 5]);
        f.i16(254, &[2]);
        f.f32(280, rows.as_flattened());
        let g = round_trip(&f);
        assert_eq!(g.affine, rows.map(|r| r.map(f64::from)));
        assert_eq!(g.spacing_mm, [2.5, 2.0, 1.5]);
        assert!((g.voxel_mm3() - 7.5).abs() < 1e-6);
        seen.insert(format!("{:?}", g.affine));
    }
    assert_eq!(seen.len(), 48);
}

#[test]
fn all_48_axis_orientations_by_qform() {
    // the 24 rotations of a cube as quaternions (a >= 0), each with qfac +1 and -1
    let r = std::f32::consts::FRAC_1_SQRT_2;
    let mut rotations = vec![[0.0, 0.0, 0.0]];
    for (i, s) in [(0, 1.0), (1, 1.0), (2, 1.0), (0, r), (1, r), (2, r), (0, -r), (1, -r), (2, -r)] {
        let mut q = [0.0; 3];
        q[i] = s;
        rotations.push(q);
    }
    for signs in 0..8 {
        rotations.push([0, 1, 2].map(|i| if signs >> i & 1 == 1 { -0.5 } else { 0.5 }));
    }
    for (i, j, s) in [(0, 1, r), (0, 2, r), (1, 2, r), (0, 1, -r), (0, 2, -r), (1, 2, -r)] {
        let mut q = [0.0; 3];
        (q[i], q[j]) = (r, s);
        rotations.push(q);
    }
    assert_eq!(rotations.len(), 24);
    let mut seen = HashSet::new();
    for (q, qfac) in rotations.iter().flat_map(|q| [(q, 1.0), (q, -1.0)]) {
        let mut f = Nii::int16([3, 4, 5]);
        f.i16(252, &[1]);
        f.f32(76, &[qfac]);
        f.f32(256, q);
        f.f32(268, &[-7.5, 8.0, 9.0]);
        let a = round_trip(&f).affine;
        // one entry per row and column, of the right length
        let rounded = a.map(|row| [0, 1, 2].map(|i| (row[i] * 1e4).round() / 1e4 + 0.0));
        for axis in 0..3 {
            let mut column: Vec<f64> = rounded.iter().map(|row| row[axis].abs()).collect();
            column.sort_by(f64::total_cmp);
            assert_eq!(column, [0.0, 0.0, [1.5, 2.0, 2.5][axis]], "{q:?} {a:?}");
        }
        assert_eq!(a.map(|row| row[3]), [-7.5, 8.0, 9.0]);
        seen.insert(format!("{rounded:?}"));
    }
    assert_eq!(seen.len(), 48);
}

#[test]
fn oblique_affines() {
    for i in 0..50 {
        let t = f64::from(i);
        let (a, b) = (0.1 + t * 0.37, t * 0.21);
        let ((sa, ca), (sb, cb)) = (a.sin_cos(), b.sin_cos());
        // rotation about z, then x
        let rotation = [[ca, -sa, 0.0], [sa * cb, ca * cb, -sb], [sa * sb, ca * sb, cb]];
        let mut rows = [[0.0_f32; 4]; 3];
        for (row, r) in rows.iter_mut().zip(rotation) {
            *row = [(r[0] * 1.5) as f32, (r[1] * 2.0) as f32, (r[2] * 2.5) as f32, (t * 3.3) as f32];
        }
        let mut f = Nii::int16([3, 4, 5]);
        f.i16(252, &[1, 1]);
        f.f32(280, rows.as_flattened());
        // the quaternion of the same rotation
        let (sa, ca) = ((a / 2.0).sin(), (a / 2.0).cos());
        let (sb, cb) = ((b / 2.0).sin(), (b / 2.0).cos());
        let q = [ca * cb, ca * sb, -sa * sb, sa * cb].map(|v| v * (ca * cb).signum());
        f.f32(256, &[q[1] as f32, q[2] as f32, q[3] as f32, rows[0][3], rows[1][3], rows[2][3]]);
        let (g, warnings) = warnings_of(|| round_trip(&f));
        assert!(warnings.is_empty(), "angles {a} {b}: {warnings:?}");
        let sform = g.affine;
        f.i16(254, &[0]);
        let qform = round_trip(&f).affine;
        for (s, q) in sform.iter().flatten().zip(qform.iter().flatten()) {
            assert!((s - q).abs() < 1e-4, "angles {a} {b}: {sform:?} {qform:?}");
        }
    }
}

#[test]
fn doubtful_geometry_is_warned_of() {
    let identity = [1.5, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.5, 0.0];
    let told = |edit: &dyn Fn(&mut Nii), what: &str| {
        let mut f = Nii::int16([2, 3, 4]);
        f.i16(252, &[1, 1]);
        f.f32(280, &identity);
        edit(&mut f);
        let (image, warnings) = warnings_of(|| f.read("g.nii"));
        image.unwrap();
        let right = if what.is_empty() { warnings.is_empty() } else { warnings.iter().any(|w| w.contains(what)) };
        assert!(right, "expected \"{what}\": {warnings:?}");
    };
    told(&|_| (), "");
    told(&|f| f.f32(256, &[0.0, 0.0, 0.3]), "differ; the sform is used");
    told(&|f| f.i16(252, &[0, 0]), "neither sform nor qform");
    told(&|f| f.f32(84, &[2.2]), "differ in scale");
    told(&|f| f.f32(80, &[-1.5]), "sign");
    told(&|f| f.f32(284, &[0.3]), "sheared");
    told(&|f| f.f32(280, &[0.0; 12]), "the qform is used");
}

#[test]
fn spacing_is_pixdim_in_millimetres() {
    let mut f = Nii::int16([2, 3, 4]);
    for (units, scale) in [(0, 1.0), (2, 1.0), (7, 1.0), (10, 1.0), (1, 1000.0), (3, 0.001)] {
        f.h[123] = units;
        let g = round_trip(&f);
        assert_eq!(g.spacing_mm, [2.5 * scale, 2.0 * scale, 1.5 * scale]);
        assert_eq!([g.affine[0][0], g.affine[1][1], g.affine[2][2]], [1.5 * scale, 2.0 * scale, 2.5 * scale]);
    }
    for axis in 1..=3 {
        for bad in [0.0, f32::NAN, f32::INFINITY] {
            let mut f = Nii::int16([2, 3, 4]);
            f.f32(76 + 4 * axis, &[bad]);
            let m = f.read("pixdim.nii").unwrap_err().to_string();
            assert!(m.contains(&format!("pixdim[{axis}]")), "{m}");
        }
    }
}

#[test]
fn a_singular_or_infinite_sform_is_refused() {
    for sform in [[0.0; 12], [f32::NAN; 12], [1.0; 12]] {
        let mut f = Nii::int16([2, 3, 4]);
        f.i16(254, &[1]);
        f.f32(280, &sform);
        let m = f.read("sform.nii").unwrap_err().to_string();
        assert!(m.contains("sform: not finite or singular"), "{m}");
    }
}

#[test]
fn a_changed_geometry_wins_over_the_old_header() {
    let dir = tempdir().unwrap();
    let mut f = Nii::int16([2, 3, 4]);
    f.i16(252, &[1]);
    let image = f.read("a.nii").unwrap();
    let path = dir.path().join("moved.nii");
    let mut g = image.geometry.clone();
    g.affine[0][3] = 12.5;
    write_image(&path, &Image::new(image.channels.clone(), g.clone()).unwrap()).unwrap();
    assert_eq!(read_nifti_header(&path).unwrap().affine, g.affine);
    let mut g = image.geometry.clone();
    (g.shape, g.spacing_mm) = ([4, 3, 1], [2.5, 2.0, 9.0]);
    g.affine[0][0] = 9.0;
    write_image(&path, &Image::new(vec![vec![0.0; 12]], g.clone()).unwrap()).unwrap();
    let back = read_nifti_header(&path).unwrap();
    assert_eq!((back.shape, back.spacing_mm, back.affine), (g.shape, g.spacing_mm, g.affine));
}
