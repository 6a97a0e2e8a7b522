//! A picture of a segmentation: axial, coronal and sagittal slices with the labels in colour and a legend.
//!
//! For people to see at a glance whether a result is sensible; it measures nothing. Views follow the radiological
//! convention through the affine, whatever the order of the voxels.
//!
//! ```no_run
//! use stunet::phantom::Phantom;
//! use stunet::preview::{PreviewOptions, render};
//! let (ct, truth) = Phantom::new(1).render();
//! render(&ct, &truth, &PreviewOptions::default().with_title("phantom 1"))?.write_png("preview.png".as_ref())?;
//! # Ok::<(), stunet::Error>(())
//! ```

mod canvas;
pub mod curves;
mod font;
mod view;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use crate::base::par;
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::image::{Geometry, Image, Segmentation};
use canvas::{Canvas, Rgb, colour, text_height, text_width};
use view::{Census, Plane, View, axes_of_patient};

/// What every picture says.
pub const NOTICE: &str = "research use only - not a medical device";

/// How a picture is made.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PreviewOptions {
    /// Heading; empty for none. Characters outside ASCII appear as boxes.
    pub title: String,
    /// Intensities shown black and white. `None`: -160 to 240, the soft-tissue window of CT (level 40, width 400), for
    /// images with values as low as air's in Hounsfield units, and the 1st to 99th percentile for all others.
    pub window: Option<[f32; 2]>,
    /// Opacity of the labels' colour, 0 to 1; outlines are always opaque.
    pub opacity: f64,
    /// Slices along (z, y, x) of the voxels' grid. `None`: those that show most of the segmentation.
    pub slices: Option<[usize; 3]>,
}

impl Default for PreviewOptions {
    fn default() -> Self {
        Self { title: String::new(), window: None, opacity: 0.42, slices: None }
    }
}

impl PreviewOptions {
    /// With the heading `title`.
    #[must_use]
    pub fn with_title(mut self, title: impl Into<String>) -> Self {
        self.title = title.into();
        self
    }

    /// With intensities from `black` to `white`.
    #[must_use]
    pub fn with_window(mut self, black: f32, white: f32) -> Self {
        self.window = Some([black, white]);
        self
    }

    /// With the given slices along (z, y, x), as [`best_slices`] finds them for another segmentation of the image.
    #[must_use]
    pub fn with_slices(mut self, slices: [usize; 3]) -> Self {
        self.slices = Some(slices);
        self
    }

    /// With labels of the given opacity.
    #[must_use]
    pub fn with_opacity(mut self, opacity: f64) -> Self {
        self.opacity = opacity;
        self
    }
}

/// A finished picture.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Picture {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Red, green, blue of every pixel, row by row from the top left.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// Writes a PNG file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn write_png(&self, path: &Path) -> Result<()> {
        let bytes = self.to_png().map_err(|e| Error::io("write", path, e))?;
        write_atomically(path, |file| file.write_all(&bytes).map_err(|e| Error::io("write", path, e)))
    }

    /// The bytes of a PNG file.
    ///
    /// # Errors
    /// Those of the encoder, which refuses pictures without pixels.
    pub fn to_png(&self) -> std::io::Result<Vec<u8>> {
        let failed = |e: png::EncodingError| std::io::Error::other(e);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&self.rgb).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }
}

/// Sizes in pixels.
mod size {
    /// Between everything.
    pub(super) const GAP: usize = 18;
    /// All panels together are at most this wide ...
    pub(super) const PANELS: f64 = 1320.0;
    /// ... and each at most this high.
    pub(super) const PANEL_HEIGHT: f64 = 760.0;
    /// Side of a legend's colour field.
    pub(super) const SWATCH: usize = 14;
    /// Height of a legend's line.
    pub(super) const LINE: usize = 24;
    /// Lines of the legend.
    pub(super) const LINES: usize = 10;
    /// Enlargement of the font for headings and text.
    pub(super) const TITLE: usize = 3;
    pub(super) const TEXT: usize = 2;
}

/// Colours of everything that is not a label.
mod ink {
    use super::Rgb;
    pub(super) const PAGE: Rgb = [22, 24, 29];
    pub(super) const FRAME: Rgb = [58, 62, 72];
    pub(super) const TITLE: Rgb = [240, 242, 246];
    pub(super) const TEXT: Rgb = [206, 210, 218];
    pub(super) const FAINT: Rgb = [140, 146, 158];
    pub(super) const LETTER: Rgb = [255, 214, 102];
}

/// One slice of the picture: what to sample and how large.
struct Panel {
    view: View,
    slice: usize,
    /// Pixels.
    width: usize,
    height: usize,
}

/// The slice along each of (z, y, x) that shows most of a segmentation.
#[must_use]
pub fn best_slices(seg: &Segmentation) -> [usize; 3] {
    Census::new(seg).best_slices()
}

/// Draws three slices, if no others are asked for those that show most of the segmentation, its labels as colours over the image's first channel,
/// and a legend of the visible labels with their volumes in the whole segmentation.
///
/// # Errors
/// [`Error::Shape`] when image and segmentation have different grids, [`Error::Usage`] when a spacing is not a
/// positive number, the window is empty, or a slice is none of the image's.
pub fn render(image: &Image, seg: &Segmentation, options: &PreviewOptions) -> Result<Picture> {
    let geometry = &image.geometry;
    if geometry.shape != seg.geometry.shape || image.channels.is_empty() || geometry.is_empty() {
        let (a, b) = (geometry.shape, seg.geometry.shape);
        return Err(Error::shape("preview", format!("image of {a:?} voxels, segmentation of {b:?}")));
    }
    if !geometry.spacing_mm.iter().all(|s| s.is_finite() && *s > 0.0) {
        let s = geometry.spacing_mm;
        return Err(Error::usage(format!("preview: spacing {s:?}: expected positive numbers of mm")));
    }
    let window = options.window.unwrap_or_else(|| automatic_window(&image.channels[0]));
    if !(window[0] < window[1] && options.opacity.is_finite()) {
        return Err(Error::usage(format!("preview: window {window:?}: expected black below white")));
    }

    if options.slices.is_some_and(|s| (0..3).any(|k| s[k] >= geometry.shape[k])) {
        return Err(Error::usage(format!("preview: slices {:?} of {:?} voxels", options.slices, geometry.shape)));
    }
    let census = Census::new(seg);
    let colours = Colours::new(seg, &census);
    let panels = layout(&seg.geometry, options.slices.unwrap_or_else(|| census.best_slices()));
    let drawn: Vec<_> = panels.iter().map(|p| draw_panel(p, image, seg, &colours, window, options.opacity)).collect();
    let mut visible = BTreeMap::<u16, usize>::new();
    for (&label, &pixels) in drawn.iter().flat_map(|d| &d.labels) {
        *visible.entry(label).or_default() += pixels;
    }
    let legend: Vec<Entry> = visible.into_iter().map(|v| Entry::new(v, seg, &census, &colours)).collect();
    Ok(compose(&panels, &drawn, legend, options, geometry.shape))
}

/// Black and white for an image whose kind is not known.
fn automatic_window(voxels: &[f32]) -> [f32; 2] {
    let mut sorted: Vec<f32> = voxels.iter().copied().filter(|v| v.is_finite()).collect();
    let at = |sorted: &mut Vec<f32>, share: f64| {
        let i = (share * (sorted.len() - 1) as f64).round() as usize;
        *sorted.select_nth_unstable_by(i, f32::total_cmp).1
    };
    if sorted.is_empty() {
        return [0.0, 1.0];
    }
    let (lowest, low, high) = (at(&mut sorted, 0.0), at(&mut sorted, 0.01), at(&mut sorted, 0.99));
    // Every CT shows some air; no other usual modality has values that low.
    if lowest <= -500.0 {
        [-160.0, 240.0]
    } else if low < high {
        [low, high]
    } else {
        [low, low + low.abs().max(1.0)]
    }
}

/// A label's place in the legend.
struct Entry {
    colour: Rgb,
    name: String,
    /// Volume in the whole segmentation, with its unit.
    volume: String,
    /// Pixels of the label in the picture.
    pixels: usize,
}

impl Entry {
    fn new((label, pixels): (u16, usize), seg: &Segmentation, census: &Census, colours: &Colours) -> Self {
        let name = seg.names.iter().find(|(l, _)| *l == label).map_or(format!("label {label}"), |(_, n)| n.clone());
        let voxels = census.voxels.get(&label).copied().unwrap_or(0);
        let ml = voxels as f64 * seg.geometry.voxel_mm3() / 1000.0;
        let volume = if ml >= 9.95 { format!("{ml:.0} ml") } else { format!("{ml:.1} ml") };
        Self { colour: colours.of(label), name: shorten(&name, 24), volume, pixels }
    }

    /// Pixels across, colour field included.
    fn width(&self) -> usize {
        size::SWATCH + 8 + text_width(&format!("{} {}", self.name, self.volume), size::TEXT)
    }
}

/// At most `limit` characters, the end replaced where it does not fit.
fn shorten(name: &str, limit: usize) -> String {
    if name.chars().count() <= limit {
        return name.to_owned();
    }
    name.chars().take(limit - 2).chain("..".chars()).collect()
}

/// The colour of each label: by its rank among all labels the segmentation can have, so that a model's organs keep
/// their colours from picture to picture.
struct Colours(Vec<u16>);

impl Colours {
    fn new(seg: &Segmentation, census: &Census) -> Self {
        let mut labels: Vec<u16> = seg.names.iter().map(|n| n.0).chain(census.voxels.keys().copied()).collect();
        labels.sort_unstable();
        labels.dedup();
        Self(labels)
    }

    fn of(&self, label: u16) -> Rgb {
        colour(self.0.binary_search(&label).unwrap_or_else(|i| i))
    }
}

/// Chooses sizes: one scale for all three, so that organs have the same size in each. Of an image of one slice there is
/// nothing to see from its sides.
fn layout(geometry: &Geometry, slices: [usize; 3]) -> Vec<Panel> {
    let (shape, spacing) = (geometry.shape, geometry.spacing_mm);
    let mm = |axis: usize| shape[axis] as f64 * spacing[axis];
    let views = [Plane::Axial, Plane::Coronal, Plane::Sagittal].map(|p| View::new(p, axes_of_patient(geometry)));
    let flat = views.iter().any(|v| shape[v.through.array] == 1);
    let views = views.into_iter().filter(|v| !flat || shape[v.through.array] == 1).collect::<Vec<_>>();
    let across: f64 = views.iter().map(|v| mm(v.across.array)).sum();
    let tallest = views.iter().map(|v| mm(v.down.array)).fold(0.0, f64::max);
    let scale = (size::PANELS / across).min(size::PANEL_HEIGHT / tallest);
    let pixels = |axis: usize| ((mm(axis) * scale).round() as usize).max(1);
    let panel = |view: View| Panel {
        slice: slices[view.through.array],
        width: pixels(view.across.array),
        height: pixels(view.down.array),
        view,
    };
    views.into_iter().map(panel).collect()
}

/// A drawn panel.
struct Drawn {
    pixels: Vec<Rgb>,
    /// Each visible label with its pixels.
    labels: BTreeMap<u16, usize>,
}

/// The two voxels around a pixel along one axis, and the weight of the second.
#[derive(Clone, Copy)]
struct Between {
    low: usize,
    high: usize,
    weight: f32,
}

/// For each of `pixels` along an axis of `n` voxels, the voxels to interpolate between.
fn sampling(pixels: usize, n: usize, upper_end_last: bool) -> Vec<Between> {
    (0..pixels)
        .map(|i| {
            let t = (i as f64 + 0.5) * n as f64 / pixels as f64 - 0.5;
            let t = if upper_end_last { t } else { n as f64 - 1.0 - t };
            let t = t.clamp(0.0, n as f64 - 1.0);
            let low = t.floor() as usize;
            Between { low, high: (low + 1).min(n - 1), weight: (t - low as f64) as f32 }
        })
        .collect()
}

fn draw_panel(
    panel: &Panel,
    image: &Image,
    seg: &Segmentation,
    colours: &Colours,
    window: [f32; 2],
    opacity: f64,
) -> Drawn {
    let shape = seg.geometry.shape;
    let stride = [shape[1] * shape[2], shape[2], 1];
    let (across, down) = (panel.view.across, panel.view.down);
    let columns = sampling(panel.width, shape[across.array], across.forward);
    let rows = sampling(panel.height, shape[down.array], down.forward);
    let base = panel.slice * stride[panel.view.through.array];
    // The four voxels around a pixel with their weights.
    let corners = |c: Between, r: Between| {
        let at = |i: usize, j: usize| base + i * stride[across.array] + j * stride[down.array];
        let (u, v) = (c.weight, r.weight);
        [
            (at(c.low, r.low), (1.0 - u) * (1.0 - v)),
            (at(c.high, r.low), u * (1.0 - v)),
            (at(c.low, r.high), (1.0 - u) * v),
            (at(c.high, r.high), u * v),
        ]
    };
    let width = panel.width;
    let mut samples = vec![(0u8, 0u16); width * panel.height];
    par::chunks_mut(&mut samples, width, |j, row| {
        for (sample, &c) in row.iter_mut().zip(&columns) {
            let four = corners(c, rows[j]);
            let value: f32 = four.iter().map(|&(i, w)| image.channels[0][i] * w).sum();
            let grey = ((value - window[0]) / (window[1] - window[0])).clamp(0.0, 1.0);
            // The label of largest weight, so that enlarged outlines are slanted lines and not stairs.
            let labels = four.map(|(i, w)| (seg.labels.get(i), w));
            let share = |label: u16| labels.iter().filter(|l| l.0 == label).map(|l| l.1).sum::<f32>();
            let mut best = (labels[0].0, share(labels[0].0));
            for &(label, _) in &labels[1..] {
                if share(label) > best.1 {
                    best = (label, share(label));
                }
            }
            *sample = ((grey * 255.0) as u8, best.0);
        }
    });
    let mut pixels = vec![[0u8; 3]; samples.len()];
    par::chunks_mut(&mut pixels, width, |j, row| {
        for (i, pixel) in row.iter_mut().enumerate() {
            let (grey, label) = samples[j * width + i];
            if label == 0 {
                *pixel = [grey; 3];
                continue;
            }
            let differs = |di: isize, dj: isize| {
                let (x, y) = (i as isize + di, j as isize + dj);
                let inside = (0..width as isize).contains(&x) && (0..panel.height as isize).contains(&y);
                inside && samples[y as usize * width + x as usize].1 != label
            };
            let edge = differs(-1, 0) || differs(1, 0) || differs(0, -1) || differs(0, 1);
            let share = if edge { 1.0 } else { opacity.clamp(0.0, 1.0) };
            let colour = colours.of(label);
            *pixel = colour.map(|c| (f64::from(c) * share + f64::from(grey) * (1.0 - share)).round() as u8);
        }
    });
    let mut labels = BTreeMap::new();
    for (_, label) in samples.into_iter().filter(|s| s.1 != 0) {
        *labels.entry(label).or_default() += 1;
    }
    Drawn { pixels, labels }
}

/// Puts heading, panels, legend and notice on one page.
fn compose(
    panels: &[Panel],
    drawn: &[Drawn],
    mut legend: Vec<Entry>,
    options: &PreviewOptions,
    shape: [usize; 3],
) -> Picture {
    let row_height = panels.iter().map(|p| p.height).max().unwrap_or(1);
    let panels_width = panels.iter().map(|p| p.width).sum::<usize>() + (panels.len().saturating_sub(1)) * size::GAP;
    let notice_width = text_width(NOTICE, size::TEXT);
    let inner = panels_width.max(notice_width).max(480);
    let width = inner + 2 * size::GAP;

    let cell = legend.iter().map(Entry::width).max().unwrap_or(0) + size::GAP;
    let columns = (inner / cell).max(1);
    let room = columns * size::LINES;
    // When not all fit, the largest in the picture stay, and the last place tells how many do not.
    let left_out = if legend.len() > room { legend.len() - (room - 1) } else { 0 };
    if left_out > 0 {
        let mut sizes: Vec<usize> = legend.iter().map(|e| e.pixels).collect();
        sizes.sort_unstable();
        let mut ties = sizes[..left_out].iter().filter(|&&p| p == sizes[left_out - 1]).count();
        legend.retain(|e| {
            let tie = e.pixels == sizes[left_out - 1] && ties > 0;
            ties -= usize::from(tie);
            e.pixels >= sizes[left_out - 1] && !tie
        });
    }
    let lines = (legend.len() + usize::from(left_out > 0)).div_ceil(columns);

    let heading = if options.title.is_empty() { 0 } else { text_height(size::TITLE) + size::GAP };
    let caption = text_height(size::TEXT) + 8;
    let top = size::GAP + heading;
    let legend_top = top + row_height + caption + size::GAP;
    let notice_top = legend_top + lines * size::LINE + if lines > 0 { size::GAP / 2 } else { 0 };
    let height = notice_top + text_height(size::TEXT) + size::GAP;

    let mut page = Canvas::new(width, height, ink::PAGE);
    let fits = inner / text_width("x ", size::TITLE) * 2;
    page.text(size::GAP, size::GAP, size::TITLE, ink::TITLE, &shorten(&options.title, fits.max(3)));
    let mut left = size::GAP + (inner - panels_width) / 2;
    for (panel, drawn) in panels.iter().zip(drawn) {
        let y = top + (row_height - panel.height) / 2;
        page.fill(left - 1, y - 1, panel.width + 2, panel.height + 2, ink::FRAME);
        for (j, row) in drawn.pixels.chunks_exact(panel.width).enumerate() {
            row.iter().enumerate().for_each(|(i, &p)| page.set(left + i, y + j, p));
        }
        draw_letters(&mut page, panel, left, y);
        let through = panel.view.through.array;
        let caption = format!("{} {}/{}", panel.view.name, panel.slice + 1, shape[through]);
        page.text(left, y + panel.height + 8, size::TEXT, ink::FAINT, &caption);
        left += panel.width + size::GAP;
    }
    let place = |i: usize| (size::GAP + i % columns * cell, legend_top + i / columns * size::LINE);
    for (i, entry) in legend.iter().enumerate() {
        let (x, y) = place(i);
        page.fill(x, y, size::SWATCH, size::SWATCH, entry.colour);
        let x = x + size::SWATCH + 8;
        page.text(x, y, size::TEXT, ink::TEXT, &entry.name);
        let x = x + text_width(&format!("{} ", entry.name), size::TEXT) + size::TEXT;
        page.text(x, y, size::TEXT, ink::FAINT, &entry.volume);
    }
    if left_out > 0 {
        let (x, y) = place(legend.len());
        page.text(x + size::SWATCH + 8, y, size::TEXT, ink::FAINT, &format!("+{left_out} more"));
    }
    page.text(size::GAP, notice_top, size::TEXT, ink::FAINT, NOTICE);
    Picture { width: width as u32, height: height as u32, rgb: page.pixels.into_flattened() }
}

/// The patient's directions at the panel's edges, where the panel is large enough for them.
fn draw_letters(page: &mut Canvas, panel: &Panel, left: usize, top: usize) {
    let (w, h) = (text_width("R", size::TEXT), text_height(size::TEXT));
    if panel.width < 8 * w || panel.height < 4 * h {
        return;
    }
    let (middle_x, middle_y) = (left + (panel.width - w) / 2, top + (panel.height - h) / 2);
    let places = [
        (left + 6, middle_y),
        (left + panel.width - w - 6, middle_y),
        (middle_x, top + 6),
        (middle_x, top + panel.height - h - 2),
    ];
    for ((x, y), letter) in places.into_iter().zip(panel.view.letters) {
        // A dark edge keeps the letter readable on bone.
        for (dx, dy) in [(0, 1), (2, 1), (1, 0), (1, 2)] {
            page.text(x + dx - 1, y + dy - 1, size::TEXT, [0; 3], &letter.to_string());
        }
        page.text(x, y, size::TEXT, ink::LETTER, &letter.to_string());
    }
}

#[cfg(test)]
mod tests;
