//! One page for people: tables, and pictures of the best, the median and the worst case. It refers to no other file.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::Class;
use super::folder::{Evaluation, Folders};
use super::table::{case_name, write_text};
use crate::error::{Error, Result};
use crate::io::{Image, LabelData, Segmentation};
use crate::nnunet::report::NOTICE;
use crate::preview::{Picture, PreviewOptions, best_slices, render};

/// A case as the page shows it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Shown {
    /// Number of the case.
    pub case: usize,
    /// "best", "median", "worst", or several of them where cases are few.
    pub rank: String,
    /// The truth, drawn.
    pub truth: Picture,
    /// The prediction on the same slices.
    pub prediction: Picture,
}

const STYLE: &str = "\
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#1b1e24}\
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}\
table{border-collapse:collapse}th,td{padding:.25em .7em;text-align:right;border-bottom:1px solid #dde1e7}\
th:first-child,td:first-child,td.t,th.t{text-align:left}thead th{border-bottom:2px solid #9aa3b0}\
tbody tr:hover{background:#f3f6fa}.n{background:#fff4d6;border:1px solid #e6cf8b;padding:.6em .9em}\
.b{background:linear-gradient(90deg,#bcd7f5 var(--w),transparent var(--w))}\
img{max-width:100%;display:block;margin:.4em 0}details{margin:.2em 0}summary{cursor:pointer}\
dt{font-weight:600}dd{margin:0 0 .5em 1.2em}code{background:#f0f2f5;padding:0 .25em}";

impl Evaluation {
    /// Mean Dice of a case over its classes but background; NaN when it has none of them.
    fn case_dice(&self, case: usize) -> f64 {
        let classes = self.foreground();
        super::nan_mean(&classes.map(|k| self.summary.cases[case].metrics[k].dice()).collect::<Vec<_>>())
    }

    fn foreground(&self) -> impl Iterator<Item = usize> + '_ {
        self.summary.classes.iter().enumerate().filter(|(_, c)| c.key != "0").map(|(k, _)| k)
    }

    /// The best, the median and the worst case by mean Dice, each once. Of cases that are equal the first by name is the
    /// better one.
    fn remarkable(&self) -> Vec<(usize, String)> {
        let mut order: Vec<usize> = (0..self.files.len()).filter(|i| !self.case_dice(*i).is_nan()).collect();
        order.sort_by(|a, b| self.case_dice(*b).total_cmp(&self.case_dice(*a)));
        let (Some(&best), Some(&worst)) = (order.first(), order.last()) else { return Vec::new() };
        let mut out: Vec<(usize, String)> = Vec::new();
        for (case, rank) in [(best, "best"), (order[order.len() / 2], "median"), (worst, "worst")] {
            match out.iter_mut().find(|(c, _)| *c == case) {
                Some((_, ranks)) => *ranks += &format!(", {rank}"),
                None => out.push((case, rank.into())),
            }
        }
        out
    }

    /// The page.
    ///
    /// # Errors
    /// [`Error::Io`] when a picture cannot be encoded.
    pub fn to_html(&self, shown: &[Shown]) -> Result<String> {
        let mut page = String::new();
        let surfaces = self.surfaces.is_some();
        let cases = self.files.len();
        let _ = write!(
            page,
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Evaluation of {cases} cases</title>\n\
             <style>{STYLE}</style></head><body>\n<h1>Evaluation of {cases} cases</h1>\n<p class=\"n\">{NOTICE}</p>\n\
             <p>Mean Dice over cases, then over classes: <b>{}</b></p>\n",
            number(self.summary.foreground_dice(), 4)
        );
        page.push_str(
            "<h2>Classes</h2>\n<table><thead><tr><th>class</th><th class=\"t\">name</th><th>cases</th><th>Dice</th>",
        );
        if let Some(mm) = self.tolerance_mm {
            let _ = write!(
                page,
                "<th>surface Dice, {mm} mm</th><th>95 % Hausdorff, mm</th><th>in truth or prediction only</th>"
            );
        }
        page.push_str("</tr></thead><tbody>\n");
        for (k, m) in self.class_means().iter().enumerate() {
            let (key, name) = (escaped(&self.summary.classes[k].key), escaped(&self.class_names[k]));
            let _ = write!(page, "<tr><td>{key}</td><td class=\"t\">{name}</td><td>{}</td>{}", m.cases, bar(m.dice));
            if surfaces {
                let distance = number(m.hausdorff_95_mm, 2);
                let _ = write!(page, "{}<td>{distance}</td><td>{}</td>", bar(m.surface_dice), m.in_one_only);
            }
            page.push_str("</tr>\n");
        }
        page.push_str("</tbody></table>\n");
        self.pictures(shown, &mut page)?;
        self.cases(&mut page);
        page.push_str(&self.words());
        let version = env!("CARGO_PKG_VERSION");
        let _ = write!(page, "<p class=\"n\">{NOTICE} stunet {version}.</p>\n</body></html>\n");
        Ok(page)
    }

    fn pictures(&self, shown: &[Shown], page: &mut String) -> Result<()> {
        if !shown.is_empty() {
            page.push_str("<h2>Best, median and worst case by mean Dice</h2>\n");
        }
        for s in shown {
            let (name, dice) = (escaped(&self.case_name(s.case)), number(self.case_dice(s.case), 4));
            let _ = writeln!(page, "<h3>{}: {name}, Dice {dice}</h3>", s.rank);
            for (picture, what) in [(&s.truth, "truth"), (&s.prediction, "prediction")] {
                let png = picture.to_png().map_err(|e| Error::io("encode", Path::new("a picture"), e))?;
                let (data, w, h) = (base64(&png), picture.width, picture.height);
                let alt = format!("{what} of {name}");
                let _ = writeln!(
                    page,
                    "<img src=\"data:image/png;base64,{data}\" alt=\"{alt}\" width=\"{w}\" height=\"{h}\" \
                     style=\"height:auto\">"
                );
            }
        }
        Ok(())
    }

    /// A line for each case, which opens to one for each of its classes.
    fn cases(&self, page: &mut String) {
        page.push_str("<h2>Cases</h2>\n");
        for (i, case) in self.summary.cases.iter().enumerate() {
            let (name, dice) = (escaped(&self.case_name(i)), number(self.case_dice(i), 4));
            let _ = write!(page, "<details><summary>{name}: Dice {dice}</summary>\n<table><thead><tr><th>class</th>");
            page.push_str("<th class=\"t\">name</th><th>Dice</th><th>IoU</th><th>TP</th><th>FP</th><th>FN</th>");
            if self.surfaces.is_some() {
                page.push_str("<th>surface Dice</th><th>95 % Hausdorff, mm</th>");
            }
            page.push_str("</tr></thead><tbody>\n");
            for (k, m) in case.metrics.iter().enumerate() {
                let (key, class) = (escaped(&self.summary.classes[k].key), escaped(&self.class_names[k]));
                let (iou, tp, fp, fn_) = (number(m.iou(), 4), m.tp, m.fp, m.fn_);
                let _ = write!(page, "<tr><td>{key}</td><td class=\"t\">{class}</td>{}<td>{iou}</td>", bar(m.dice()));
                let _ = write!(page, "<td>{tp}</td><td>{fp}</td><td>{fn_}</td>");
                if let Some(s) = self.surfaces.as_ref().map(|s| s[i][k]) {
                    let _ = write!(page, "{}<td>{}</td>", bar(s.surface_dice), number(s.hausdorff_95_mm, 2));
                }
                page.push_str("</tr>\n");
            }
            page.push_str("</tbody></table></details>\n");
        }
    }

    /// What the numbers mean.
    fn words(&self) -> String {
        let mut out = String::from(
            "<h2>What the numbers mean</h2>\n<dl>\n<dt>Dice</dt><dd>2 TP / (2 TP + FP + FN) of voxels, as nnU-Net counts them. \
             A class that is in neither truth nor prediction of a case has none, and is no part of means.</dd>\n",
        );
        if let Some(mm) = self.tolerance_mm {
            let _ = write!(
                out,
                "<dt>Surface Dice at {mm} mm</dt><dd>Share of the voxels on both surfaces that are no further than {mm} mm from \
                 the other surface (Nikolov et al., 2018; surface voxels count alike, as in Metrics Reloaded, 2024); 0 where the \
                 class is in one of truth and prediction only.</dd>\n<dt>95 % Hausdorff</dt><dd>The larger of both directions' \
                 95th percentiles of distances between surfaces, in mm; infinite (&infin;) where the class is in one of truth and \
                 prediction only. Means are of finite ones; how many are not stands beside them.</dd>\n"
            );
        }
        out.push_str("</dl>\n");
        out
    }

    /// Writes the page, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_html(&self, path: &Path, shown: &[Shown]) -> Result<()> {
        write_text(path, &self.to_html(shown)?)
    }
}

impl Folders {
    /// Whether [`Folders::shown`] will find every image: told of before the hours that comparing may take.
    ///
    /// # Errors
    /// Those of [`Folders::files`]; [`Error::Dataset`] naming the first image that is missing.
    pub fn check_images(&self, images: &Path, incomplete: bool) -> Result<()> {
        for file in self.files(incomplete)? {
            let path = self.image_of(images, &file);
            if !path.is_file() {
                let label_map = self.prediction.join(file);
                let what = format!("missing, expected to be shown behind {}", label_map.display());
                return Err(Error::dataset(&path, "image", what));
            }
        }
        Ok(())
    }

    /// The first channel of a case.
    fn image_of(&self, images: &Path, file: &OsStr) -> PathBuf {
        images.join(format!("{}_0000{}", case_name(file), self.ending))
    }

    /// Draws the best, the median and the worst case. `images` is the folder of images in nnU-Net's naming
    /// (`CASE_0000.nii.gz`), whose first channel is shown behind the labels; without it they are on black.
    ///
    /// # Errors
    /// Those of reading; [`Error::Image`] when an image and its truth have other grids.
    pub fn shown(&self, evaluation: &Evaluation, images: Option<&Path>) -> Result<Vec<Shown>> {
        let draw = |(case, rank): (usize, String)| {
            let [mut truth, mut prediction] = self.read(&evaluation.files[case])?;
            let name = evaluation.case_name(case);
            let image = match images {
                Some(folder) => {
                    let path = self.image_of(folder, &evaluation.files[case]);
                    let image = self.reader.image(std::slice::from_ref(&path))?;
                    let (found, expected) = (image.geometry.shape, truth.geometry.shape);
                    if found != expected {
                        let what = format!("{found:?} voxels (z, y, x), expected {expected:?} as in its truth");
                        return Err(Error::image(&path, "dim", what));
                    }
                    image
                }
                None => Image::new(vec![vec![0.0; truth.geometry.len()]], truth.geometry.clone())?,
            };
            // Both on the image's grid, and in the same colours.
            for seg in [&mut truth, &mut prediction] {
                seg.geometry = image.geometry.clone();
                seg.names = self.label_names.clone();
                self.hide_other_labels(seg);
            }
            let options = PreviewOptions::default().with_slices(best_slices(&truth));
            let picture = |seg: &Segmentation, what: &str| {
                render(&image, seg, &options.clone().with_title(format!("{what} of {name}")))
            };
            Ok(Shown { case, rank, truth: picture(&truth, "truth")?, prediction: picture(&prediction, "prediction")? })
        };
        evaluation.remarkable().into_iter().map(draw).collect()
    }

    /// Labels that belong to no class are not shown.
    fn hide_other_labels(&self, seg: &mut Segmentation) {
        let known: Vec<u16> = self.classes.iter().flat_map(|c: &Class| &c.labels).copied().collect();
        let hide = |l: u16| !known.contains(&l);
        match &mut seg.labels {
            LabelData::U8(v) => v.iter_mut().filter(|l| hide(u16::from(**l))).for_each(|l| *l = 0),
            LabelData::U16(v) => v.iter_mut().filter(|l| hide(**l)).for_each(|l| *l = 0),
        }
    }
}

/// A cell with a number from 0 to 1 and a bar of that length.
fn bar(share: f64) -> String {
    if share.is_nan() {
        return "<td>-</td>".into();
    }
    format!("<td class=\"b\" style=\"--w:{:.1}%\">{share:.4}</td>", 100.0 * share)
}

fn number(value: f64, digits: usize) -> String {
    match value {
        v if v.is_nan() => "-".into(),
        v if v.is_infinite() => "&infin;".into(),
        v => format!("{v:.digits$}"),
    }
}

/// Text as HTML shows it, in quotation marks, too.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// RFC 4648.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = (0..3).fold(0u32, |w, i| w << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_has_the_known_answers() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn names_cannot_break_out_of_the_page() {
        assert_eq!(escaped("<b>\"a\" & 'b'"), "&lt;b&gt;&quot;a&quot; &amp; &#39;b&#39;");
        assert_eq!(
            (number(f64::NAN, 2), number(f64::INFINITY, 2), number(1.234, 1)),
            ("-".into(), "&infin;".into(), "1.2".into())
        );
    }
}
