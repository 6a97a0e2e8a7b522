//! PNG and TIFF data sets, as nnU-Net's `NaturalImage2DIO` and `Tiff3DIO` read them.

use std::fs::File;
use std::path::Path;

use serde_json::json;
use stunet::io::{picture_size, read_pictures, read_tiff_stacks};
use stunet::nnunet::dataset::{Dataset, Reader};
use stunet::nnunet::fingerprint::Fingerprint;
use stunet::nnunet::planner::{PlanOptions, Planner, plan};
use stunet::{Device, Geometry};
use tiff::encoder::{TiffEncoder, colortype};

fn write_png(path: &Path, [y, x]: [u32; 2], color: png::ColorType, depth: png::BitDepth, bytes: &[u8]) {
    let mut encoder = png::Encoder::new(File::create(path).unwrap(), x, y);
    encoder.set_color(color);
    encoder.set_depth(depth);
    encoder.write_header().unwrap().write_image_data(bytes).unwrap();
}

fn write_stack(path: &Path, [z, y, x]: [usize; 3], values: &[u16]) {
    let mut encoder = TiffEncoder::new(File::create(path).unwrap()).unwrap();
    for plane in values.chunks(y * x).take(z) {
        encoder.write_image::<colortype::Gray16>(x as u32, y as u32, plane).unwrap();
    }
}

#[test]
fn pictures_of_every_depth() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_png(&at("rgb.png"), [1, 2], png::ColorType::Rgb, png::BitDepth::Eight, &[1, 2, 3, 4, 5, 255]);
    write_png(&at("wide.png"), [1, 2], png::ColorType::Grayscale, png::BitDepth::Sixteen, &[1, 2, 255, 255]);
    write_png(&at("mask.png"), [1, 2], png::ColorType::Grayscale, png::BitDepth::One, &[0b0100_0000]);
    let image = read_pictures(&[at("rgb.png"), at("wide.png"), at("mask.png")]).unwrap();
    let expected = [[1.0, 4.0], [2.0, 5.0], [3.0, 255.0], [258.0, 65535.0], [0.0, 1.0]];
    assert_eq!(image.channels, expected.map(|c| c.to_vec()));
    assert_eq!(image.geometry, Geometry::new([1, 1, 2], [999.0, 1.0, 1.0]));

    write_stack(&at("one.tif"), [1, 2, 3], &[5, 6, 7, 8, 9, 60000]);
    write_stack(&at("two.tif"), [2, 1, 3], &[5, 6, 7, 8, 9, 60000]);
    assert_eq!((picture_size(&at("one.tif")).unwrap()[0], picture_size(&at("two.tif")).unwrap()[0]), (1, 2));
    let values = vec![5.0, 6.0, 7.0, 8.0, 9.0, 60000.0];
    assert_eq!(read_pictures(&[at("one.tif")]).unwrap().channels[0], values);
    let stack = read_tiff_stacks(&[at("two.tif")], [2.0, 1.0, 0.5]).unwrap();
    assert_eq!((stack.channels, stack.geometry), (vec![values], Geometry::new([2, 1, 3], [2.0, 1.0, 0.5])));
}

#[test]
fn damage_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_png(&at("a.png"), [4, 5], png::ColorType::Grayscale, png::BitDepth::Eight, &[7; 20]);
    write_png(&at("b.png"), [5, 4], png::ColorType::Grayscale, png::BitDepth::Eight, &[7; 20]);
    write_png(&at("la.png"), [1, 1], png::ColorType::GrayscaleAlpha, png::BitDepth::Eight, &[7; 2]);
    write_stack(&at("c.tif"), [2, 3, 4], &[9; 24]);
    let e = |paths: &[&str]| read_pictures(&paths.iter().map(|p| at(p)).collect::<Vec<_>>()).unwrap_err().to_string();
    assert!(e(&["a.png", "b.png"]).contains("b.png: size: [5, 4] pixels (y, x), expected [4, 5]"));
    assert!(e(&["c.tif"]).contains("c.tif: pages: 2, expected a picture of one"));
    assert!(e(&["la.png"]).contains("colour type"));
    // Every shorter file and every flipped byte gives an image or an error, never a panic.
    for name in ["a.png", "c.tif"] {
        let whole = std::fs::read(at(name)).unwrap();
        for n in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[n] ^= 0xff;
            for bytes in [&whole[..n], &flipped] {
                std::fs::write(at("damaged"), bytes).unwrap();
                let (flat, deep) = (read_pictures(&[at("damaged")]), read_tiff_stacks(&[at("damaged")], [1.0; 3]));
                assert!([flat, deep].into_iter().flatten().all(|i| i.geometry.len() <= 1 << 24), "{name} {n}");
            }
        }
    }
}

#[test]
fn data_sets_of_pictures_are_planned() {
    let dir = tempfile::tempdir().unwrap();
    for sub in ["imagesTr", "labelsTr"] {
        std::fs::create_dir(dir.path().join(sub)).unwrap();
    }
    let description = |channels, ending| json!({"channel_names": channels, "labels": {"background": 0, "a": 1}, "numTraining": 1, "file_ending": ending});
    let colours = json!({"0": "R", "1": "G", "2": "rgb_to_0_1"});
    std::fs::write(dir.path().join("dataset.json"), description(colours, ".png").to_string()).unwrap();
    let rgb: Vec<u8> = (0..40 * 50 * 3).map(|i| (i % 250) as u8).collect();
    let label: Vec<u8> = (0..40 * 50).map(|i| (i % 2) as u8).collect();
    write_png(&dir.path().join("imagesTr/x_0000.png"), [40, 50], png::ColorType::Rgb, png::BitDepth::Eight, &rgb);
    write_png(&dir.path().join("labelsTr/x.png"), [40, 50], png::ColorType::Grayscale, png::BitDepth::Eight, &label);
    let dataset = Dataset::open(dir.path()).unwrap();
    assert_eq!(dataset.reader, Reader::NaturalImage2dIo);
    assert!(dataset.verify(&Device::cpu(), &mut ()).unwrap().is_empty());
    let fingerprint = json!({"spacings": [[999, 1, 1]], "shapes_after_crop": [[1, 40, 50]],
        "median_relative_size_after_cropping": 1, "foreground_intensity_properties_per_channel": {}});
    let fingerprint = Fingerprint::of(Path::new("f.json"), &fingerprint).unwrap();
    let options = PlanOptions::default();
    let plans = plan(&dataset.json, "D", dataset.reader, &fingerprint, Planner::Default, &options).unwrap();
    assert_eq!(plans.configurations.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["2d"]);

    std::fs::write(dir.path().join("dataset.json"), description(json!({"0": "ct"}), ".tif").to_string()).unwrap();
    write_stack(&dir.path().join("imagesTr/v_0000.tif"), [2, 3, 4], &[1; 24]);
    write_stack(&dir.path().join("labelsTr/v.tif"), [2, 3, 4], &[1; 24]);
    for name in ["imagesTr/v.json", "labelsTr/v.json"] {
        std::fs::write(dir.path().join(name), r#"{"spacing": [3, 1.5, 1]}"#).unwrap();
    }
    let dataset = Dataset::open(dir.path()).unwrap();
    assert_eq!((dataset.reader, dataset.ids()), (Reader::Tiff3dIo, vec!["v".into()]));
    assert!(dataset.verify(&Device::cpu(), &mut ()).unwrap().is_empty());
    assert_eq!(dataset.image(&dataset.cases[0]).unwrap().geometry.spacing_mm, [3.0, 1.5, 1.0]);
}
