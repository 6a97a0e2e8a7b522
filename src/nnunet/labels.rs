//! Labels of a data set and what a network's output channels mean (nnU-Net `LabelManager`).

use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::nnunet::json::{self, Field};
use crate::nnunet::plans::Decision;
use crate::ops::Outputs;

/// The `labels` of a dataset.json.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelSet {
    /// Name and label values as they stand in the file, the ignore label left out.
    entries: Vec<(String, Vec<u16>)>,
    /// Every label value, rising, background included, ignore label not.
    labels: Vec<u16>,
    /// With regions: name and labels of each that is not background, in the file's order.
    regions: Option<Vec<(String, Vec<u16>)>>,
    /// Names of regions that the file gives as one number instead of a list: nnU-Net calls them as labels.
    numbers: Vec<String>,
    regions_class_order: Vec<u16>,
    ignore: Option<u16>,
}

/// A region as `dataset.json` gives it. To the network both are the same; nnU-Net's own files call a number as they call a
/// label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenRegion<'a> {
    /// `"core": 3`
    Number(u16),
    /// `"core": [3]`
    List(&'a [u16]),
}

impl LabelSet {
    /// The labels of a `dataset.json`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), [`Error::Dataset`](crate::Error::Dataset) naming the key and what is expected:
    /// `background` is 0, an ignore label is one above the highest, data sets with regions have a
    /// `regions_class_order`, those without have no gap between label values.
    pub fn read(dataset_json: &Path) -> Result<Self> {
        let value = json::read_dataset(dataset_json)?;
        Self::of(&Field::of_dataset(dataset_json, &value))
    }

    /// The labels of the description of a data set.
    pub(crate) fn of(dataset: &Field<'_>) -> Result<Self> {
        let field = dataset.need("labels")?;
        let mut entries: Vec<(String, Vec<u16>)> = Vec::new();
        let (mut ignore, mut numbers) = (None, Vec::new());
        for (name, value) in field.entries()? {
            if name == "ignore" {
                ignore = Some((label(&value)?, value));
                continue;
            }
            let values = match value.value {
                Value::Array(_) => value.items()?.iter().map(label).collect::<Result<_>>()?,
                _ => {
                    numbers.push(name.to_string());
                    vec![label(&value)?]
                }
            };
            if values.is_empty() {
                return Err(value.error("an empty list, expected at least one label value"));
            }
            if name == "background" && values != [0] {
                return Err(value.error("expected 0"));
            }
            entries.push((name.to_string(), values));
        }
        if !entries.iter().any(|(name, _)| name == "background") {
            return Err(field.error("no \"background\", expected it as label 0"));
        }
        let mut labels: Vec<u16> = entries.iter().flat_map(|(_, v)| v).copied().collect();
        labels.sort_unstable();
        labels.dedup();
        if let Some((value, f)) = &ignore {
            let expected = usize::from(labels.last().copied().unwrap_or(0)) + 1;
            if usize::from(*value) != expected {
                return Err(f.error(format!("{value}, expected {expected}, one above the highest label")));
            }
        }
        let ignore = ignore.map(|(value, _)| value);
        let mut set = Self { entries, labels, regions: None, numbers, regions_class_order: Vec::new(), ignore };
        if set.entries.iter().any(|(_, v)| v.len() > 1) {
            let order = dataset.need("regions_class_order")?;
            let paint = order.items()?.iter().map(label).collect::<Result<Vec<u16>>>()?;
            let is_background = |values: &[u16]| values.iter().all(|&v| v == 0);
            let regions: Vec<_> = set.entries.iter().filter(|(_, v)| !is_background(v)).cloned().collect();
            if regions.len() != paint.len() {
                return Err(order.error(format!("{} values for {} regions", paint.len(), regions.len())));
            }
            (set.regions, set.regions_class_order) = (Some(regions), paint);
        } else if let Some(gap) = set.gap() {
            return Err(field.error(format!("no label of value {gap}, expected values without gaps")));
        }
        Ok(set)
    }

    /// The lowest value that no label has although a higher one is there.
    pub(crate) fn gap(&self) -> Option<u16> {
        self.labels.iter().zip(0..).find(|(l, expected)| **l != *expected).map(|(_, expected)| expected)
    }

    /// Output channels of a network: one a region, or one a label with background (`num_segmentation_heads`).
    #[must_use]
    pub fn heads(&self) -> usize {
        self.regions.as_ref().map_or(self.labels.len(), Vec::len)
    }

    /// Entries of `labels` in the file, background, regions and ignore label included: what the planner counts.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.entries.len() + usize::from(self.ignore.is_some())
    }

    /// All label values, rising, background included, ignore label not (`all_labels`).
    #[must_use]
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// Every value that a label map may hold: [`LabelSet::labels`] and the ignore label.
    pub fn values(&self) -> impl Iterator<Item = u16> + '_ {
        self.labels.iter().copied().chain(self.ignore)
    }

    /// All label values but background, rising (`foreground_labels`).
    #[must_use]
    pub fn foreground_labels(&self) -> &[u16] {
        &self.labels[1..]
    }

    /// The labels of each region that is not background, in the file's order; `None` without regions
    /// (`foreground_regions`).
    #[must_use]
    pub fn regions(&self) -> Option<Vec<&[u16]>> {
        Some(self.regions.as_ref()?.iter().map(|(_, labels)| labels.as_slice()).collect())
    }

    /// [`LabelSet::regions`] as the file gives them.
    #[must_use]
    pub fn given_regions(&self) -> Option<Vec<GivenRegion<'_>>> {
        let regions = self.regions.as_ref()?.iter();
        let given = regions.map(|(name, labels)| match labels.as_slice() {
            [one] if self.numbers.contains(name) => GivenRegion::Number(*one),
            _ => GivenRegion::List(labels),
        });
        Some(given.collect())
    }

    /// The label that each region writes into a segmentation, empty without regions.
    #[must_use]
    pub fn regions_class_order(&self) -> &[u16] {
        &self.regions_class_order
    }

    /// Voxels of this label are not annotated.
    #[must_use]
    pub fn ignore(&self) -> Option<u16> {
        self.ignore
    }

    /// What the loss has to know.
    #[must_use]
    pub fn outputs(&self) -> Outputs {
        match &self.regions {
            None => Outputs::Labels,
            Some(regions) => Outputs::Regions(regions.iter().map(|(_, labels)| labels.clone()).collect()),
        }
    }

    /// How a segmentation is made of the output channels.
    #[must_use]
    pub fn decision(&self) -> Decision {
        match &self.regions {
            None => Decision::Argmax,
            Some(_) => Decision::Regions { paint: self.regions_class_order.clone() },
        }
    }

    /// The values a segmentation can hold but background, with their names: of labels by value, of regions in the order
    /// in which they are written.
    #[must_use]
    pub fn names(&self) -> Vec<(u16, String)> {
        if let Some(regions) = &self.regions {
            let names = regions.iter().map(|(name, _)| name.clone());
            return self.regions_class_order.iter().copied().zip(names).collect();
        }
        let mut names: Vec<(u16, String)> = Vec::new();
        for (name, values) in &self.entries {
            if values[0] != 0 && !names.iter().any(|(v, _)| *v == values[0]) {
                names.push((values[0], name.clone()));
            }
        }
        names.sort_by_key(|(v, _)| *v);
        names
    }
}

fn label(field: &Field<'_>) -> Result<u16> {
    // At most u16::MAX.
    field.usize(usize::from(u16::MAX)).map(|v| v as u16)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(dataset: &Value) -> Result<LabelSet> {
        LabelSet::of(&Field::of_dataset(Path::new("dataset.json"), dataset))
    }

    #[test]
    fn plain_labels() {
        let set = of(&json!({"labels": {"b": 2, "background": 0, "a": [1], "also a": 1, "ignore": 3}})).unwrap();
        assert_eq!((set.heads(), set.entries(), set.ignore()), (3, 5, Some(3)));
        assert_eq!((set.labels(), set.foreground_labels()), (&[0, 1, 2][..], &[1, 2][..]));
        assert_eq!(set.values().collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(set.names(), [(1, "a".into()), (2, "b".into())]);
        assert_eq!((set.outputs(), set.decision(), set.regions()), (Outputs::Labels, Decision::Argmax, None));
    }

    #[test]
    fn regions() {
        let labels = json!({"background": 0, "whole": [1, 2, 3], "enh": 3, "core": [2, 3], "ignore": 4});
        let set = of(&json!({"labels": labels, "regions_class_order": [1, 3, 2]})).unwrap();
        assert_eq!((set.heads(), set.entries(), set.ignore()), (3, 5, Some(4)));
        assert_eq!(set.regions().unwrap(), [&[1, 2, 3][..], &[3], &[2, 3]]);
        assert_eq!(set.outputs(), Outputs::Regions(vec![vec![1, 2, 3], vec![3], vec![2, 3]]));
        let given = [GivenRegion::List(&[1, 2, 3]), GivenRegion::Number(3), GivenRegion::List(&[2, 3])];
        assert_eq!(set.given_regions().unwrap(), given);
        assert_eq!(set.names(), [(1, "whole".into()), (3, "enh".into()), (2, "core".into())]);
        assert_eq!(set.labels(), [0, 1, 2, 3]);
    }

    #[test]
    fn faults_name_the_key() {
        for (dataset, at) in [
            (json!({}), "dataset.json: labels: missing"),
            (json!({"labels": {"a": 1}}), "dataset.json: labels: no \"background\""),
            (json!({"labels": {"background": 1}}), "dataset.json: labels.background: expected 0"),
            (json!({"labels": {"background": 0, "a": "1"}}), "dataset.json: labels.a: \"1\""),
            (json!({"labels": {"background": 0, "a": 2}}), "dataset.json: labels: no label of value 1"),
            (json!({"labels": {"background": 0, "a": 1, "ignore": 3}}), "dataset.json: labels.ignore: 3, expected 2"),
            (json!({"labels": {"background": 0, "a": []}}), "dataset.json: labels.a: an empty list"),
            (json!({"labels": {"background": 0, "a": [1, 2]}}), "dataset.json: regions_class_order: missing"),
        ] {
            let e = of(&dataset).unwrap_err();
            assert!(e.to_string().starts_with(at) && e.exit_code() == 3, "{e}");
        }
    }
}
