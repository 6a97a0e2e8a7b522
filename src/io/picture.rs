//! Pictures as images and label maps: PNG and TIFF in 2D (nnU-Net `NaturalImage2DIO`), stacks of TIFF pages in 3D (`Tiff3DIO`).

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;

use tiff::decoder::{DecodingResult, Limits};
use tiff::encoder::colortype::{ColorType, Gray8, Gray16};
use tiff::encoder::{Compression, DeflateLevel, TiffEncoder, TiffValue};
use tiff::tags::Tag;

use super::atomic::write_atomically;
use super::image::{Geometry, Image, LabelData, Segmentation};
use crate::error::{Error, Result};

/// DEFLATE and LZW expand no more than this; a header that asks for more cannot be honest.
const MAX_EXPANSION: u64 = 4096;

/// Most bytes of one picture in memory, as f32.
const MAX_BYTES: u64 = 8 << 30;

/// nnU-Net's spacing of pictures: no neighbours along z.
const SPACING: [f64; 3] = [999.0, 1.0, 1.0];

/// One page: samples of each channel, (y, x) with x fastest.
struct Page {
    channels: Vec<Vec<f32>>,
    size: [usize; 2],
}

/// Reads a 2D image, one picture for each channel or one with several, PNG or TIFF by content. Colours become three
/// channels, transparency a fourth. Values are those of the file, (1, y, x); the spacing is 999, 1, 1.
///
/// # Errors
/// [`Error::Io`]; [`Error::Image`] naming the file and what is wrong with it: damaged, of several pages, of another size
/// than the first.
pub fn read_pictures<P: AsRef<Path>>(paths: &[P]) -> Result<Image> {
    let mut channels = Vec::new();
    let mut size = None;
    for path in paths.iter().map(AsRef::as_ref) {
        let page = match pages(path)? {
            Pages::One(page) => page,
            Pages::Many(n) => return Err(Error::image(path, "pages", format!("{n}, expected a picture of one"))),
        };
        let first = *size.get_or_insert(page.size);
        if page.size != first {
            let what = format!("{:?} pixels (y, x), expected {first:?} as in the first file", page.size);
            return Err(Error::image(path, "size", what));
        }
        channels.extend(page.channels);
    }
    let [y, x] = size.ok_or_else(|| Error::usage("no image file was given"))?;
    Image::new(channels, Geometry::new([1, y, x], SPACING))
}

/// Reads a 3D image, a stack of TIFF pages for each channel, with the given spacing in mm (z, y, x).
///
/// # Errors
/// As [`read_pictures`].
pub fn read_tiff_stacks<P: AsRef<Path>>(paths: &[P], spacing_mm: [f64; 3]) -> Result<Image> {
    let mut channels = Vec::new();
    let mut shape = None;
    for path in paths.iter().map(AsRef::as_ref) {
        let mut stack = Vec::new();
        let mut depth = 0;
        let mut first = None;
        let size = read_tiff(path, &mut |page: Page| {
            let [only] = &page.channels[..] else {
                let n = page.channels.len();
                return Err(Error::image(path, "samples", format!("{n} a pixel, expected 1: a page is a plane")));
            };
            if page.size != *first.get_or_insert(page.size) {
                return Err(Error::image(path, "size", "differs between pages, expected planes of one size"));
            }
            stack.extend_from_slice(only);
            depth += 1;
            Ok(())
        });
        size?;
        let [y, x] = first.unwrap_or([0, 0]);
        let expected = *shape.get_or_insert([depth, y, x]);
        if [depth, y, x] != expected {
            let what = format!("{:?} voxels (z, y, x), expected {expected:?} as in the first file", [depth, y, x]);
            return Err(Error::image(path, "size", what));
        }
        channels.push(stack);
    }
    let shape = shape.ok_or_else(|| Error::usage("no image file was given"))?;
    Image::new(channels, Geometry::new(shape, spacing_mm))
}

/// Pages of a picture, 1 of a PNG file, and the pixels (y, x) of the first. No pixel is read.
///
/// # Errors
/// As [`read_pictures`].
pub fn picture_size(path: &Path) -> Result<[usize; 3]> {
    if is_png(path)? {
        let (file, len) = open(path)?;
        let (_, size) = png_header(path, len, file)?;
        return Ok([1, size[0], size[1]]);
    }
    let (_, len) = open(path)?;
    let mut decoder = tiff_decoder(path)?;
    let (size, _) = tiff_page(path, len, &mut decoder)?;
    let mut n = 1;
    while decoder.more_images() {
        decoder.next_image().map_err(|e| bad_tiff(path, e))?;
        tiff_page(path, len, &mut decoder)?;
        n += 1;
    }
    Ok([n, size[0], size[1]])
}

/// The grid that [`read_pictures`] gives the image of this picture, of which no pixel is read.
///
/// # Errors
/// As [`read_pictures`].
pub fn picture_grid(path: &Path) -> Result<Geometry> {
    match picture_size(path)? {
        [1, y, x] => Ok(Geometry::new([1, y, x], SPACING)),
        [n, ..] => Err(Error::image(path, "pages", format!("{n}, expected a picture of one"))),
    }
}

/// Writes the label map of a 2D image as a grey picture, a PNG or by its ending a TIFF file: of 8 bits where every label is
/// below 255, else of 16, as nnU-Net does. Whole or not at all.
///
/// # Errors
/// [`Error::Usage`] for more than one slice; [`Error::Io`].
pub fn write_picture(path: &Path, segmentation: &Segmentation) -> Result<()> {
    let [z, y, x] = segmentation.geometry.shape;
    if z != 1 {
        return Err(Error::usage(format!("{}: {z} slices, a picture has one", path.display())));
    }
    let png = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
    if !png {
        return write_tiff(path, segmentation, None);
    }
    let (depth, bytes) = match grey(&segmentation.labels) {
        LabelData::U8(labels) => (png::BitDepth::Eight, labels),
        LabelData::U16(labels) => (png::BitDepth::Sixteen, labels.iter().flat_map(|l| l.to_be_bytes()).collect()),
    };
    let bad = |e: png::EncodingError| Error::io("write", path, e.into());
    let [width, height] = sides(path, [y, x])?;
    write_atomically(path, |file| {
        let mut encoder = png::Encoder::new(file, width, height);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.set_depth(depth);
        let mut writer = encoder.write_header().map_err(bad)?;
        writer.write_image_data(&bytes).map_err(bad)?;
        writer.finish().map_err(bad)
    })
}

/// Writes the label map of a 3D image as a stack of grey TIFF pages, compressed; bits as those of [`write_picture`]. The
/// spacing has no place in it. Whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write_tiff_stack(path: &Path, segmentation: &Segmentation) -> Result<()> {
    // By which tifffile, nnU-Net's reader, knows a stack of one page.
    let shape = format!("{{\"shape\": {:?}}}", segmentation.geometry.shape);
    write_tiff(path, segmentation, Some(&shape))
}

/// A page for each plane, the first with a description.
fn write_tiff(path: &Path, segmentation: &Segmentation, description: Option<&str>) -> Result<()> {
    let [_, y, x] = segmentation.geometry.shape;
    let sides = sides(path, [y, x])?;
    let labels = grey(&segmentation.labels);
    write_atomically(path, |file| {
        let written = match &labels {
            LabelData::U8(labels) => write_pages::<Gray8>(file, labels, sides, description),
            LabelData::U16(labels) => write_pages::<Gray16>(file, labels, sides, description),
        };
        written.map_err(|e| match e {
            tiff::TiffError::IoError(e) => Error::io("write", path, e),
            e => Error::io("write", path, std::io::Error::other(e)),
        })
    })
}

fn write_pages<C: ColorType>(
    file: &mut BufWriter<File>,
    labels: &[C::Inner],
    [width, height]: [u32; 2],
    mut description: Option<&str>,
) -> tiff::TiffResult<()>
where
    [C::Inner]: TiffValue,
{
    let mut encoder = TiffEncoder::new(&mut *file)?.with_compression(Compression::Deflate(DeflateLevel::Balanced));
    for plane in labels.chunks(width as usize * height as usize) {
        let mut image = encoder.new_image::<C>(width, height)?;
        if let Some(text) = description.take() {
            image.encoder().write_tag(Tag::ImageDescription, text)?;
        }
        image.write_data(plane)?;
    }
    file.flush().map_err(Into::into)
}

/// The labels in as many bits as nnU-Net writes.
fn grey(labels: &LabelData) -> LabelData {
    if labels.iter().all(|l| l < 255) {
        LabelData::U8(labels.iter().map(|l| l as u8).collect())
    } else {
        LabelData::U16(labels.iter().collect())
    }
}

/// Width and height as pictures tell them.
fn sides(path: &Path, [y, x]: [usize; 2]) -> Result<[u32; 2]> {
    match (u32::try_from(x), u32::try_from(y)) {
        (Ok(x), Ok(y)) => Ok([x, y]),
        _ => Err(Error::usage(format!("{}: {y} x {x} pixels are more than a picture can have", path.display()))),
    }
}

enum Pages {
    One(Page),
    Many(usize),
}

fn pages(path: &Path) -> Result<Pages> {
    if is_png(path)? {
        return read_png(path).map(Pages::One);
    }
    let (mut first, mut n) = (None, 0);
    read_tiff(path, &mut |page| {
        n += 1;
        first.get_or_insert(page);
        Ok(())
    })?;
    match first {
        Some(page) if n == 1 => Ok(Pages::One(page)),
        _ => Ok(Pages::Many(n)),
    }
}

fn open(path: &Path) -> Result<(BufReader<File>, u64)> {
    let failed = |e| Error::io("read", path, e);
    let meta = std::fs::metadata(path).map_err(failed)?;
    if !meta.is_file() {
        return Err(Error::image(path, "file", "not a regular file, expected a picture"));
    }
    Ok((BufReader::new(File::open(path).map_err(failed)?), meta.len()))
}

fn is_png(path: &Path) -> Result<bool> {
    use std::io::Read;
    let magic = b"\x89PNG\r\n\x1a\n";
    let (file, _) = open(path)?;
    let mut found = Vec::new();
    file.take(magic.len() as u64).read_to_end(&mut found).map_err(|e| Error::io("read", path, e))?;
    Ok(found == magic)
}

/// Refuses sizes that the bytes of the file cannot hold, before memory is asked for.
fn check(path: &Path, file_len: u64, size: [usize; 2], samples: usize) -> Result<()> {
    let pixels = (size[0] as u64).saturating_mul(size[1] as u64).saturating_mul(samples as u64);
    // A sample has one bit at least.
    if pixels == 0 || pixels / 8 > file_len.saturating_mul(MAX_EXPANSION) || pixels.saturating_mul(4) > MAX_BYTES {
        let what = format!("{} x {} pixels of {samples} samples in {file_len} bytes", size[1], size[0]);
        return Err(Error::image(path, "size", format!("{what}: truncated, damaged or too large")));
    }
    Ok(())
}

/// Interleaved samples to one array for each channel.
fn apart<T: Copy>(values: &[T], samples: usize, to: impl Fn(T) -> f32) -> Vec<Vec<f32>> {
    (0..samples).map(|c| values.iter().skip(c).step_by(samples).map(|&v| to(v)).collect()).collect()
}

fn bad_png(path: &Path, e: png::DecodingError) -> Error {
    match e {
        png::DecodingError::IoError(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => Error::io("read", path, e),
        e => Error::image(path, "PNG", e.to_string()),
    }
}

/// A file whose header is read, and its pixels (y, x).
fn png_header(path: &Path, len: u64, file: BufReader<File>) -> Result<(png::Decoder<BufReader<File>>, [usize; 2])> {
    let mut decoder = png::Decoder::new_with_limits(file, png::Limits { bytes: MAX_BYTES as usize });
    // A palette becomes its colours, fewer than eight bits become eight.
    decoder.set_transformations(png::Transformations::EXPAND);
    let info = decoder.read_header_info().map_err(|e| bad_png(path, e))?;
    let size = [info.height as usize, info.width as usize];
    check(path, len, size, info.color_type.samples())?;
    Ok((decoder, size))
}

fn read_png(path: &Path) -> Result<Page> {
    let bad = |e| bad_png(path, e);
    let (file, len) = open(path)?;
    let (mut decoder, size) = png_header(path, len, file)?;
    let info = decoder.read_header_info().map_err(bad)?;
    let one_bit = info.bit_depth == png::BitDepth::One && info.color_type == png::ColorType::Grayscale;
    let mut reader = decoder.read_info().map_err(bad)?;
    let bytes = reader.output_buffer_size().ok_or_else(|| Error::image(path, "size", "too large"))?;
    let mut raw = vec![0; bytes];
    let frame = reader.next_frame(&mut raw).map_err(bad)?;
    reader.finish().map_err(bad)?;
    let samples = frame.color_type.samples();
    if !matches!(samples, 1 | 3 | 4) {
        return Err(Error::image(path, "colour type", "grey with transparency, expected grey, RGB or RGBA"));
    }
    let channels = if frame.bit_depth == png::BitDepth::Sixteen {
        let wide: Vec<u16> = raw.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]])).collect();
        apart(&wide, samples, f32::from)
    } else {
        // Pictures of one bit are masks of 0 and 1, as numpy has them.
        apart(&raw, samples, |v| f32::from(if one_bit { u8::from(v > 0) } else { v }))
    };
    Ok(Page { channels, size })
}

fn bad_tiff(path: &Path, e: tiff::TiffError) -> Error {
    match e {
        tiff::TiffError::IoError(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => Error::io("read", path, e),
        e => Error::image(path, "TIFF", e.to_string()),
    }
}

type TiffDecoder = tiff::decoder::Decoder<BufReader<File>>;

fn tiff_decoder(path: &Path) -> Result<TiffDecoder> {
    let (file, _) = open(path)?;
    let mut limits = Limits::default();
    limits.decoding_buffer_size = MAX_BYTES as usize;
    limits.intermediate_buffer_size = MAX_BYTES as usize;
    Ok(tiff::decoder::Decoder::new(file).map_err(|e| bad_tiff(path, e))?.with_limits(limits))
}

/// Pixels (y, x) and samples of a page, as many as a file of `len` bytes can hold.
fn tiff_page(path: &Path, len: u64, decoder: &mut TiffDecoder) -> Result<([usize; 2], usize)> {
    let (x, y) = decoder.dimensions().map_err(|e| bad_tiff(path, e))?;
    let size = [y as usize, x as usize];
    let samples = match decoder.colortype().map_err(|e| bad_tiff(path, e))? {
        tiff::ColorType::Gray(_) => 1,
        tiff::ColorType::RGB(_) => 3,
        tiff::ColorType::RGBA(_) => 4,
        other => {
            let what = format!("{other:?}, expected grey, RGB or RGBA");
            return Err(Error::image(path, "colour type", what));
        }
    };
    check(path, len, size, samples)?;
    Ok((size, samples))
}

/// Calls `page` for every page of a TIFF file.
fn read_tiff(path: &Path, page: &mut dyn FnMut(Page) -> Result<()>) -> Result<()> {
    let bad = |e| bad_tiff(path, e);
    let (_, len) = open(path)?;
    let mut decoder = tiff_decoder(path)?;
    let mut total = 0u64;
    loop {
        let (size, samples) = tiff_page(path, len, &mut decoder)?;
        // Pages together, as they may all be kept.
        total = total.saturating_add(size[0] as u64 * size[1] as u64 * samples as u64 * 4);
        if total > MAX_BYTES {
            return Err(Error::image(path, "size", format!("more than {MAX_BYTES} bytes in memory")));
        }
        let channels = match decoder.read_image().map_err(bad)? {
            DecodingResult::U8(v) => apart(&v, samples, f32::from),
            DecodingResult::U16(v) => apart(&v, samples, f32::from),
            DecodingResult::U32(v) => apart(&v, samples, |v| v as f32),
            DecodingResult::U64(v) => apart(&v, samples, |v| v as f32),
            DecodingResult::I8(v) => apart(&v, samples, f32::from),
            DecodingResult::I16(v) => apart(&v, samples, f32::from),
            DecodingResult::I32(v) => apart(&v, samples, |v| v as f32),
            DecodingResult::I64(v) => apart(&v, samples, |v| v as f32),
            DecodingResult::F16(v) => apart(&v, samples, |v| v.to_f32()),
            DecodingResult::F32(v) => apart(&v, samples, |v| v),
            DecodingResult::F64(v) => apart(&v, samples, |v| v as f32),
        };
        if channels.iter().any(|c| c.len() != size[0] * size[1]) {
            return Err(Error::image(path, "TIFF", "fewer or more samples than its size says"));
        }
        page(Page { channels, size })?;
        if !decoder.more_images() {
            return Ok(());
        }
        decoder.next_image().map_err(bad)?;
    }
}
