use super::*;
use crate::io::image::LabelData;

/// A patient of 8 x 6 x 4 voxels with one bright voxel and label at the right front top, on a given grid order.
fn patient(mirrored: bool) -> (Image, Segmentation) {
    let mut g = Geometry::new([4, 6, 8], [30.0, 30.0, 30.0]);
    let mut at = [3, 5, 7];
    if mirrored {
        // The file stores x from right to left and y from front to back.
        g.affine[0] = [-30.0, 0.0, 0.0, 210.0];
        g.affine[1] = [0.0, -30.0, 0.0, 150.0];
        at = [3, 0, 0];
    }
    let i = (at[0] * 6 + at[1]) * 8 + at[2];
    let (mut voxels, mut labels) = (vec![0.0; g.len()], vec![0u8; g.len()]);
    (voxels[i], labels[i]) = (1.0, 3);
    let image = Image::new(vec![voxels], g.clone()).unwrap();
    (image, Segmentation::new(LabelData::U8(labels), g, vec![(3, "spot".into())]).unwrap())
}

fn pixels(picture: &Picture) -> Vec<Rgb> {
    picture.rgb.chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect()
}

#[test]
fn the_patient_lies_the_same_way_whatever_the_order_of_the_voxels() {
    let options = PreviewOptions::default().with_window(0.0, 1.0);
    let [a, b] = [false, true].map(|m| {
        let (image, seg) = patient(m);
        let census = Census::new(&seg);
        let panels = layout(&seg.geometry, census.best_slices());
        let colours = Colours::new(&seg, &census);
        let draw = |p: &Panel| draw_panel(p, &image, &seg, &colours, [0.0, 1.0], 0.4).pixels;
        panels.iter().map(|p| (p.width, p.height, draw(p))).collect::<Vec<_>>()
    });
    assert!(a == b, "mirrored voxels changed the picture");
    assert_eq!(a.len(), 3);
    for ((width, height, pixels), name) in a.into_iter().zip(["axial", "coronal", "sagittal"]) {
        // Right, front, top: always the upper left corner.
        assert!(pixels[0][0] < pixels[0][2], "{name}: the spot is blue");
        assert_eq!(pixels[width - 1], [0; 3], "{name}");
        assert_eq!(pixels[width * (height - 1)], [0; 3], "{name}");
    }
    let (image, seg) = patient(false);
    assert!(pixels(&render(&image, &seg, &options).unwrap()).contains(&colour(0)));
}

#[test]
fn voxels_keep_their_proportions() {
    let mut g = Geometry::new([10, 100, 100], [10.0, 1.0, 1.0]);
    g.spacing_mm = [10.0, 1.0, 1.0];
    let seg = Segmentation::new(LabelData::zeros(g.len(), 1), g, vec![]).unwrap();
    for panel in layout(&seg.geometry, best_slices(&seg)) {
        assert_eq!(panel.width, panel.height);
    }
    // A picture, of which nnU-Net says that slices are far apart.
    let g = Geometry::new([1, 40, 80], [999.0, 1.0, 1.0]);
    let seg = Segmentation::new(LabelData::zeros(g.len(), 1), g, vec![]).unwrap();
    let panels = layout(&seg.geometry, best_slices(&seg));
    assert_eq!(panels.iter().map(|p| p.width / p.height).collect::<Vec<_>>(), [2]);
}

#[test]
fn a_long_legend_keeps_the_largest_labels_and_counts_the_rest() {
    let g = Geometry::new([1, 200, 200], [1.0; 3]);
    let labels: Vec<u16> = (0..g.len()).map(|i| (i / 200) as u16 + 1).collect();
    let names = (1..=200).map(|l| (l, format!("a rather long name of label {l}"))).collect();
    let image = Image::new(vec![vec![0.0; g.len()]], g.clone()).unwrap();
    let seg = Segmentation::new(LabelData::U16(labels), g, names).unwrap();
    let picture = render(&image, &seg, &PreviewOptions::default().with_title("x".repeat(500))).unwrap();
    assert!(picture.height < 1300 && picture.width < 1500, "{} x {}", picture.width, picture.height);
    assert_eq!(picture.rgb.len(), 3 * picture.width as usize * picture.height as usize);
}

#[test]
fn odd_images_give_a_picture_or_an_error_but_no_panic() {
    for (shape, value) in [([1, 1, 1], f32::NAN), ([1, 1, 300], 5.0), ([300, 1, 2], f32::INFINITY)] {
        let g = Geometry::new(shape, [1.0, 0.5, 2.0]);
        let image = Image::new(vec![vec![value; g.len()]], g.clone()).unwrap();
        let seg = Segmentation::new(LabelData::zeros(g.len(), 1), g, vec![]).unwrap();
        assert!(render(&image, &seg, &PreviewOptions::default()).is_ok(), "{shape:?}");
        let empty_window = PreviewOptions::default().with_window(1.0, 1.0);
        assert!(matches!(render(&image, &seg, &empty_window), Err(Error::Usage { .. })));
    }
    let (image, _) = patient(false);
    let g = Geometry::new([4, 6, 9], [1.0; 3]);
    let seg = Segmentation::new(LabelData::zeros(g.len(), 1), g, vec![]).unwrap();
    assert!(matches!(render(&image, &seg, &PreviewOptions::default()), Err(Error::Shape { .. })));
}

#[test]
fn the_window_is_that_of_soft_tissue_for_ct_only() {
    assert_eq!(automatic_window(&[-1000.0, 0.0, 50.0]), [-160.0, 240.0]);
    let mr: Vec<f32> = (0..=1000).map(|i| i as f32).collect();
    assert_eq!(automatic_window(&mr), [10.0, 990.0]);
    assert_eq!(automatic_window(&[7.0; 9]), [7.0, 14.0]);
}

#[test]
fn a_written_picture_reads_back() {
    let (image, seg) = patient(false);
    let picture = render(&image, &seg, &PreviewOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.png");
    picture.write_png(&path).unwrap();
    let file = std::io::BufReader::new(std::fs::File::open(&path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut rgb).unwrap();
    assert_eq!((info.width, info.height), (picture.width, picture.height));
    assert_eq!(rgb, picture.rgb);
    let nowhere = folder.path().join("missing/p.png");
    assert!(matches!(picture.write_png(&nowhere), Err(Error::Io { .. })));
}
