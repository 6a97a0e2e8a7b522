//! Whether a data set can be trained on (nnU-Net `verify_dataset_integrity`).

use super::{Dataset, RawCase, Reader};
use crate::base::progress::Progress;
use crate::error::{Error, Result};
use crate::io::{Geometry, Image, Segmentation};
use crate::nnunet::workers;
use crate::tensor::Device;

impl Dataset {
    /// Checks that every case has the files it needs, without opening them.
    ///
    /// # Errors
    /// [`Error::Dataset`] naming the first case with a missing or surplus file.
    pub fn check_files(&self) -> Result<()> {
        self.cases.iter().flat_map(|c| self.file_faults(c)).next().map_or(Ok(()), Err)
    }

    /// Reads the whole data set and returns all that is wrong with it, in the order of the cases; nothing for a good one.
    ///
    /// Checked are the number of cases, that channels and label map are there, that they can be read and lie on one
    /// grid, that every voxel is a number, and that label maps hold only the labels of dataset.json. Directions and
    /// origins that differ are warned of, as training does not look at them.
    ///
    /// # Errors
    /// [`Error::Cancelled`]. Faults of the data set are not errors of this function.
    pub fn verify(&self, device: &Device, progress: &mut dyn Progress) -> Result<Vec<Error>> {
        let (found, stated) = (self.cases.len(), self.json.num_training);
        let mut faults = Vec::new();
        if found != stated {
            let what = format!("{stated}, but there are {found} training cases; correct the number or the folder");
            faults.push(Error::dataset(&self.folder.join("dataset.json"), "numTraining", what));
        }
        // With regions, whose labels may have gaps as far as a network is concerned.
        if let Some(gap) = self.json.labels.gap() {
            let what = format!("no label of value {gap}, expected values without gaps: renumber the labels");
            faults.push(Error::dataset(&self.folder.join("dataset.json"), "labels", what));
        }
        let of_cases = workers::map(device, self.cases.len(), progress, |i| {
            let case = &self.cases[i];
            let missing: Vec<Error> = self.file_faults(case).collect();
            Ok(if missing.is_empty() { self.content_faults(case) } else { missing })
        })?;
        faults.extend(of_cases.into_iter().flatten());
        Ok(faults)
    }

    fn file_faults<'a>(&'a self, case: &'a RawCase) -> impl Iterator<Item = Error> + 'a {
        let expected = self.json.channels.len();
        // A picture may have several channels: their total is looked at when they are read.
        let pictures = self.reader == Reader::NaturalImage2dIo && case.images.len() < expected;
        let one_a_channel = !pictures && (case.images.len() > 1 || expected == 1);
        let there = move |i: usize| {
            let name = format!("{}_{i:04}{}", case.name, self.json.file_ending);
            // Files of an explicit list may have any name.
            self.json.value.get("dataset").is_some()
                || case.images.iter().any(|p| p.file_name().is_some_and(|n| *n == *name))
        };
        let channels = (0..expected).filter(move |&i| one_a_channel && !there(i));
        let channels = channels.map(move |i| self.missing_channel(case, i));
        let surplus =
            (one_a_channel && case.images.len() != expected && channels.clone().next().is_none()).then(|| {
                let what = format!("{} image files, dataset.json names {expected} channels", case.images.len());
                self.fault(case, what)
            });
        let files = case.images.iter().chain([&case.label]).filter(|p| !p.is_file());
        let absent = files.map(move |p| {
            let kind = if *p == case.label { "label map" } else { "image" };
            self.fault(case, format!("its {kind} {} is missing", p.display()))
        });
        channels.chain(surplus).chain(absent)
    }

    fn content_faults(&self, case: &RawCase) -> Vec<Error> {
        let mut faults = Vec::new();
        let image = self.image(case).map_err(|e| faults.push(self.of_case(case, e))).ok();
        if let Some(image) = &image {
            faults.extend(self.value_faults(case, image));
        }
        let label = self.label(case).map_err(|e| faults.push(self.of_case(case, e))).ok();
        let Some(label) = label else { return faults };
        faults.extend(self.label_faults(case, &label));
        if let Some(image) = &image {
            faults.extend(self.grid_faults(case, &image.geometry, &label.geometry));
        }
        faults
    }

    /// An error of a file, said of the case it belongs to.
    fn of_case(&self, case: &RawCase, error: Error) -> Error {
        match error {
            Error::Dataset { .. } => error,
            other => self.fault(case, other.to_string()),
        }
    }

    fn value_faults(&self, case: &RawCase, image: &Image) -> Vec<Error> {
        let mut faults = Vec::new();
        for (i, channel) in image.channels.iter().enumerate() {
            let nan = channel.iter().filter(|v| v.is_nan()).count();
            let infinite = channel.iter().filter(|v| v.is_infinite()).count();
            for (count, kind) in [(nan, "NaN"), (infinite, "infinite")] {
                if count > 0 {
                    let name = &self.json.channels[i];
                    let what = format!("channel {i} ({name}): {count} voxels are {kind}; put a number in their place");
                    faults.push(self.fault(case, what));
                }
            }
        }
        faults
    }

    fn label_faults(&self, case: &RawCase, label: &Segmentation) -> Option<Error> {
        let mut found = vec![false; 1 << 16];
        label.labels.iter().for_each(|l| found[usize::from(l)] = true);
        self.json.labels.values().for_each(|v| found[usize::from(v)] = false);
        let odd: Vec<usize> = (0..found.len()).filter(|&v| found[v]).take(11).collect();
        let shown: Vec<String> = odd.iter().take(10).map(usize::to_string).collect();
        let more = if odd.len() > 10 { " ..." } else { "" };
        let known: Vec<String> = self.json.labels.values().map(|v| v.to_string()).collect();
        let known = if known.len() > 20 { format!("0 to {}", known[known.len() - 1]) } else { known.join(", ") };
        (!odd.is_empty()).then(|| {
            let file = case.label.display();
            let what = format!("{file} holds labels {}{more}, dataset.json names {known}", shown.join(", "));
            self.fault(case, what)
        })
    }

    fn grid_faults(&self, case: &RawCase, image: &Geometry, label: &Geometry) -> Vec<Error> {
        let mut faults = Vec::new();
        if image.shape != label.shape {
            let what = format!(
                "the label map has {:?} voxels (z, y, x), the image {:?}; they must lie on one grid",
                label.shape, image.shape
            );
            faults.push(self.fault(case, what));
        }
        if !close(&label.spacing_mm, &image.spacing_mm) {
            let what = format!(
                "the label map's spacing is {:?} mm (z, y, x), the image's {:?}; they must be the same",
                label.spacing_mm, image.spacing_mm
            );
            faults.push(self.fault(case, what));
        }
        let origin = |g: &Geometry| g.affine.map(|row| row[3]);
        let direction = |g: &Geometry| {
            let length = |k: usize| g.affine.iter().map(|row| row[k] * row[k]).sum::<f64>().sqrt();
            let lengths = [length(0), length(1), length(2)];
            g.affine.map(|row| std::array::from_fn::<f64, 3, _>(|k| row[k] / lengths[k])).concat()
        };
        let what = [
            ("origins", close(&origin(label), &origin(image))),
            ("directions", close(&direction(label), &direction(image))),
        ];
        for (what, _) in what.into_iter().filter(|(_, same)| !same) {
            let (folder, name) = (self.folder.display(), &case.name);
            tracing::warn!("{folder}: case {name}: the {what} of image and label map differ; look whether they match");
        }
        faults
    }
}

/// `numpy.allclose`.
fn close(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-8 + 1e-5 * b.abs())
}
