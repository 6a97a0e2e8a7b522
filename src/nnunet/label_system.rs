//! Label systems: which numbers another data set gives to structures, and of which classes of a model each of them is made
//! (STU-Net `direct_inference`). They are data: the known ones stand in `data/label_systems`, a user's own file has the same
//! form.
//!
//! ```
//! use stunet::nnunet::label_system::{LabelSystem, ModelClasses};
//! use stunet::{Geometry, Segmentation, io::LabelData};
//! // Liver and brain by STU-Net's numbers; CT-ORG calls the liver 1 and the brain 6.
//! let found = LabelData::U8(vec![0, 40, 6]);
//! let mut found = Segmentation::new(found, Geometry::new([1, 1, 3], [1.0; 3]), Vec::new())?;
//! LabelSystem::named("ct-org")?.from_model(&ModelClasses::stunet()?)?.apply(&mut found)?;
//! assert_eq!(found.labels, LabelData::U8(vec![0, 1, 6]));
//! # Ok::<(), stunet::Error>(())
//! ```

mod relabelling;

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::json::{self, Field};
use super::labels::LabelSet;
use super::model::stunet_labels;
use super::plans::{Decision, InferencePlan};
use crate::base::json::parse_unique;
use crate::error::{Error, Result};
use crate::io::LabelData;
use crate::io::atomic::write_atomically;
pub use relabelling::Relabelling;

macro_rules! known {
    ($($name:literal)*) => { &[$(($name, include_str!(concat!("data/label_systems/", $name, ".json")))),*] };
}

/// Name and text of every known system.
const KNOWN: &[(&str, &str)] = known!(
    "abdomenatlas" "abdomenct-1k" "amos22" "btcv" "btcv-cervix" "ct-org" "flare22" "kipa22" "kits21" "msd-liver"
    "msd-pancreas" "msd-spleen" "segthor" "totalsegmentator-v1" "verse20" "word"
);

/// The largest of the known ones has 12 kB.
const MAX_BYTES: u64 = 1 << 20;
/// Names are shown in tables and pictures.
const MAX_NAME: usize = 100;
const MAX_SOURCE: usize = 1000;

/// A structure as a data set knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SystemLabel {
    /// What people call it.
    pub name: String,
    /// The data set's values that mean it or a part of it, 1 to 65535; predictions get the first.
    pub values: Vec<u16>,
    /// The classes of a model that it is made of.
    pub classes: Vec<String>,
}

/// The numbering of a data set. No value stands in two labels; of a class that stands in several the last one counts, as what
/// is written later overwrites what is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LabelSystem {
    name: String,
    source: String,
    labels: Vec<SystemLabel>,
    /// For errors.
    #[serde(skip)]
    file: PathBuf,
}

impl LabelSystem {
    /// What the file is called that says of a folder of label maps in which system they are.
    pub const FILE: &str = "label_system.json";

    /// Names of the known systems, sorted.
    pub fn known() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().map(|(name, _)| *name)
    }

    /// A known system.
    ///
    /// # Errors
    /// [`Error::Usage`] naming all known ones.
    pub fn named(name: &str) -> Result<Self> {
        let Some((_, text)) = KNOWN.iter().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = Self::known().collect();
            return Err(Error::usage(format!("no label system {name:?}; known are {}", known.join(", "))));
        };
        let file = PathBuf::from(format!("label system {name}"));
        let value = parse_unique(text.as_bytes()).map_err(|e| Error::dataset(&file, "JSON", e.to_string()))?;
        Self::of(&file, &value)
    }

    /// A file of a user: an object of `name`, `labels` and, if wanted, `source`; each label with `name`, `values` and `classes`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Dataset`] naming file, key and what is expected: names are of one line, values from 1 to 65535
    /// and used once, no list is empty, no label is overwritten by later ones altogether.
    pub fn read(file: &Path) -> Result<Self> {
        Self::of(file, &json::read_dataset_up_to(file, MAX_BYTES)?)
    }

    /// A known system by its name, else a file.
    ///
    /// # Errors
    /// Those of [`LabelSystem::read`]; [`Error::Usage`] for what is neither.
    pub fn open(name_or_file: &Path) -> Result<Self> {
        if let Some(name) = Self::known().find(|known| name_or_file.as_os_str() == *known) {
            return Self::named(name);
        }
        if name_or_file.exists() {
            return Self::read(name_or_file);
        }
        let known: Vec<&str> = Self::known().collect();
        let (given, known) = (name_or_file.display(), known.join(", "));
        Err(Error::usage(format!("{given}: neither a file nor a known label system, which are {known}")))
    }

    fn of(file: &Path, value: &Value) -> Result<Self> {
        let root = Field::of_dataset(file, value);
        only(&root, &["name", "source", "labels"])?;
        let name = text(&root.need("name")?, MAX_NAME)?;
        let source = root.get("source").map(|s| text(&s, MAX_SOURCE)).transpose()?.unwrap_or_default();
        let field = root.need("labels")?;
        let items = field.items()?;
        if items.is_empty() {
            return Err(field.error("an empty list, expected at least one label"));
        }
        let (mut names, mut values) = (HashSet::new(), HashMap::new());
        let labels = items.iter().map(|item| label(item, &mut names, &mut values)).collect::<Result<Vec<_>>>()?;
        let last = last_of_class(&labels);
        if let Some(i) = (0..labels.len()).find(|i| labels[*i].classes.iter().all(|c| last[c.as_str()] != *i)) {
            let what = "later labels have all of them and overwrite this one, expected a class of its own";
            return Err(items[i].need("classes")?.error(what));
        }
        Ok(Self { name, source, labels, file: file.into() })
    }

    /// What people call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its facts are from, which may be empty.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Its labels in the order in which they are written.
    #[must_use]
    pub fn labels(&self) -> &[SystemLabel] {
        &self.labels
    }

    /// Whether label maps in this system mean the same in the other.
    #[must_use]
    pub fn has_numbers_of(&self, other: &Self) -> bool {
        let numbers = |s: &Self| s.labels.iter().map(|l| (l.name.clone(), l.values.clone())).collect::<HashSet<_>>();
        numbers(self) == numbers(other)
    }

    /// The text of a file that [`LabelSystem::read`] reads, a line for each label.
    #[must_use]
    pub fn to_json(&self) -> String {
        let quoted = |s: &str| Value::from(s).to_string();
        let list = |items: Vec<String>| format!("[{}]", items.join(", "));
        let mut out = format!("{{\n    \"name\": {},\n", quoted(&self.name));
        if !self.source.is_empty() {
            let _ = writeln!(out, "    \"source\": {},", quoted(&self.source));
        }
        out.push_str("    \"labels\": [");
        for (i, l) in self.labels.iter().enumerate() {
            let values = list(l.values.iter().map(u16::to_string).collect());
            let classes = list(l.classes.iter().map(|c| quoted(c)).collect());
            let (comma, name) = (if i == 0 { "" } else { "," }, quoted(&l.name));
            let _ = write!(out, "{comma}\n        {{\"name\": {name}, \"values\": {values}, \"classes\": {classes}}}");
        }
        out.push_str("\n    ]\n}\n");
        out
    }

    /// Writes [`LabelSystem::to_json`], whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = self.to_json();
        write_atomically(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io("write", path, e)))
    }

    /// From a model's label maps to the data set's numbers, of each label the first. All else becomes background.
    ///
    /// # Errors
    /// [`Error::Dataset`] naming the first class that the model does not have.
    pub fn from_model(&self, classes: &ModelClasses) -> Result<Relabelling> {
        self.of_classes(classes, |_, label| label.values[0])
    }

    /// From a model's label maps to the system's labels numbered from 1 in their order: what metrics are computed of.
    ///
    /// # Errors
    /// As [`LabelSystem::from_model`].
    pub fn in_order_from_model(&self, classes: &ModelClasses) -> Result<Relabelling> {
        self.of_classes(classes, |i, _| in_order(i))
    }

    /// From the data set's label maps to the system's labels numbered from 1 in their order.
    #[must_use]
    pub fn in_order_from_dataset(&self) -> Relabelling {
        let labels = self.labels.iter().enumerate();
        let pairs = labels.flat_map(|(i, l)| l.values.iter().map(move |v| (*v, in_order(i)))).collect();
        Relabelling::new(pairs, self.names(|i, _| in_order(i)))
    }

    fn names(&self, number: impl Fn(usize, &SystemLabel) -> u16) -> Vec<(u16, String)> {
        self.labels.iter().enumerate().map(|(i, l)| (number(i, l), l.name.clone())).collect()
    }

    fn of_classes(
        &self,
        classes: &ModelClasses,
        number: impl Fn(usize, &SystemLabel) -> u16 + Copy,
    ) -> Result<Relabelling> {
        let known: HashSet<&str> = classes.names.iter().map(|(_, name)| name.as_str()).collect();
        for (i, label) in self.labels.iter().enumerate() {
            for (k, class) in label.classes.iter().enumerate() {
                if !known.contains(class.as_str()) {
                    let field = format!("labels[{i}].classes[{k}]");
                    return Err(Error::dataset(&self.file, field, classes.lacks(class)));
                }
            }
        }
        let last = last_of_class(&self.labels);
        let of =
            |(value, name): &(u16, String)| last.get(name.as_str()).map(|i| (*value, number(*i, &self.labels[*i])));
        Ok(Relabelling::new(classes.names.iter().filter_map(of).collect(), self.names(number)))
    }
}

/// The number of the label at `i` of the list; values of 16 bits, each used once, keep lists short enough.
fn in_order(i: usize) -> u16 {
    u16::try_from(i + 1).unwrap_or(u16::MAX)
}

/// The last label that each class stands in: what is written later overwrites what is there.
fn last_of_class(labels: &[SystemLabel]) -> HashMap<&str, usize> {
    labels.iter().enumerate().flat_map(|(i, l)| l.classes.iter().map(move |c| (c.as_str(), i))).collect()
}

fn label(field: &Field<'_>, names: &mut HashSet<String>, values: &mut HashMap<u16, String>) -> Result<SystemLabel> {
    only(field, &["name", "values", "classes"])?;
    let name = text(&field.need("name")?, MAX_NAME)?;
    if !names.insert(name.clone()) {
        return Err(field.need("name")?.error(format!("{name:?} a second time, expected a name for each label")));
    }
    let mut label = SystemLabel { name, values: Vec::new(), classes: Vec::new() };
    for item in list(field, "values", "a value of the data set")? {
        let value = item.usize(usize::from(u16::MAX))? as u16;
        if value == 0 {
            return Err(item.error("0 is the background, expected 1 to 65535"));
        }
        if let Some(other) = values.insert(value, label.name.clone()) {
            return Err(item.error(format!("{value} is a value of {other:?} already, expected it once")));
        }
        label.values.push(value);
    }
    let mut seen = HashSet::new();
    for item in list(field, "classes", "a class of the model")? {
        let class = text(&item, MAX_NAME)?;
        if !seen.insert(class.clone()) {
            return Err(item.error(format!("{class:?} a second time, expected it once")));
        }
        label.classes.push(class);
    }
    Ok(label)
}

/// The items of a list that is not empty.
fn list<'a>(field: &Field<'a>, key: &str, of: &str) -> Result<Vec<Field<'a>>> {
    let list = field.need(key)?;
    let items = list.items()?;
    if items.is_empty() { Err(list.error(format!("an empty list, expected at least {of}"))) } else { Ok(items) }
}

/// Refuses keys that mean nothing: they are most likely misspelt.
fn only(field: &Field<'_>, keys: &[&str]) -> Result<()> {
    match field.entries()?.iter().find(|(key, _)| !keys.contains(key)) {
        Some((_, unknown)) => Err(unknown.error(format!("not a key of a label system, expected {}", keys.join(", ")))),
        None => Ok(()),
    }
}

/// A text of one line.
fn text(field: &Field<'_>, most: usize) -> Result<String> {
    let text = field.str()?;
    let fits = !text.trim().is_empty() && text.chars().count() <= most && !text.contains(char::is_control);
    if fits { Ok(text.into()) } else { Err(field.error(format!("expected one line of 1 to {most} characters"))) }
}

/// Names of a model's classes and the values that they have in its label maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelClasses {
    /// Whose they are, for errors.
    model: String,
    names: Vec<(u16, String)>,
}

impl ModelClasses {
    /// Those that a model predicts.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model of regions: a value of its label maps is not all of the region of that name.
    pub fn of_plan(plan: &InferencePlan) -> Result<Self> {
        let model = if plan.dataset.is_empty() { &plan.trainer } else { &plan.dataset };
        Self::new(format!("the model {model:?}"), plan.labels.clone(), plan.decision != Decision::Argmax)
    }

    /// Those that stand in the description of the data set that a model was trained on.
    ///
    /// # Errors
    /// As [`ModelClasses::of_plan`].
    pub fn of_dataset(dataset_json: &Path, labels: &LabelSet) -> Result<Self> {
        Self::new(dataset_json.display().to_string(), labels.names(), labels.regions().is_some())
    }

    /// Those of the published STU-Net weights: the 104 classes of TotalSegmentator v1 in alphabetical order.
    ///
    /// # Errors
    /// None but for a damaged program.
    pub fn stunet() -> Result<Self> {
        Self::new("STU-Net's published weights".into(), stunet_labels()?, false)
    }

    fn new(model: String, names: Vec<(u16, String)>, regions: bool) -> Result<Self> {
        if regions {
            return Err(Error::unsupported(format!("label systems for regions, which {model} has; labels are")));
        }
        Ok(Self { model, names })
    }

    /// The values with their names, background left out.
    #[must_use]
    pub fn names(&self) -> &[(u16, String)] {
        &self.names
    }

    /// Refuses a label map with a value that the model does not know: it has other numbers.
    pub(crate) fn check(&self, file: &Path, labels: &LabelData) -> Result<()> {
        let mut known = vec![false; 1 << 16];
        known[0] = true;
        self.names.iter().for_each(|(value, _)| known[usize::from(*value)] = true);
        match labels.iter().find(|value| !known[usize::from(*value)]) {
            Some(value) => {
                let (n, model) = (self.names.len(), &self.model);
                Err(Error::image(file, "labels", format!("{value}, expected one of the {n} labels of {model}")))
            }
            None => Ok(()),
        }
    }

    /// Says that there is no such class, and which may be meant.
    fn lacks(&self, class: &str) -> String {
        let all: Vec<&str> = self.names.iter().map(|(_, name)| name.as_str()).collect();
        let (n, model) = (all.len(), &self.model);
        let like = close(class, &all);
        let expected = match (like.is_empty(), n) {
            (false, _) => format!("like {}", like.join(", ")),
            (true, ..=8) => format!("that is {}", all.join(", ")),
            (true, _) => format!("as {} are", all[..8].join(", ")),
        };
        format!("{class:?} is none of the {n} classes of {model}, expected one {expected}")
    }
}

/// Up to three names that may be meant, the closest first: of the same words in any order, or but for a few letters the same.
fn close<'a>(wanted: &str, names: &[&'a str]) -> Vec<&'a str> {
    let words = |s: &str| {
        let mut words: Vec<String> =
            s.to_lowercase().split(|c: char| !c.is_alphanumeric()).map(str::to_owned).collect();
        words.sort();
        words
    };
    let (of_wanted, most) = (words(wanted), (wanted.chars().count() / 3).max(1));
    let far = |name: &str| match words(name) == of_wanted {
        true => 0,
        false => strsim::levenshtein(&wanted.to_lowercase(), &name.to_lowercase()),
    };
    let mut found: Vec<(usize, &str)> = names.iter().map(|n| (far(n), *n)).filter(|(d, _)| *d <= most).collect();
    found.sort_by_key(|(d, _)| *d);
    found.into_iter().take(3).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_may_be_meant() {
        let names = ["kidney_left", "kidney_right", "liver", "spleen"];
        assert_eq!(close("left kidney", &names), ["kidney_left"]);
        assert_eq!(close("Livr", &names), ["liver"]);
        assert!(close("brain", &names).is_empty());
    }
}
