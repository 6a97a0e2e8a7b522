//! `stunet label-systems`, and the label system of `stunet predict`.

use std::path::{Path, PathBuf};

use stunet::nnunet::cases;
use stunet::nnunet::label_system::{LabelSystem, ModelClasses, Relabelling};
use stunet::{Error, InferencePlan, Result, Segmentation};

use super::output;
use super::paths::parent;

/// List the data sets whose label numbers are known, or show one's
///
/// A label system says which numbers a data set gives to structures and of which classes of a model each is made. Those listed
/// are made of STU-Net's 104 classes. Save one with --json, change it, and give the file to --label-system.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet label-systems
  stunet label-systems amos22
  stunet label-systems amos22 --json > mine.json")]
pub(super) struct Args {
    /// One of the list, or a file of that form
    #[arg(value_name = "NAME|FILE")]
    system: Option<PathBuf>,
    /// Print the file
    #[arg(long, requires = "system")]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let Some(system) = &args.system else { return list() };
    let system = LabelSystem::open(system)?;
    if args.json {
        return output::text(&system.to_json());
    }
    let mut rows = vec![["values", "name", "classes"].map(str::to_owned).to_vec()];
    for label in system.labels() {
        let values: Vec<String> = label.values.iter().map(u16::to_string).collect();
        rows.push(vec![values.join(", "), label.name.clone(), label.classes.join(", ")]);
    }
    output::text(&output::columns(&rows))
}

fn list() -> Result<()> {
    let mut rows = vec![["name", "labels", "source"].map(str::to_owned).to_vec()];
    for name in LabelSystem::known() {
        let system = LabelSystem::named(name)?;
        rows.push(vec![name.to_owned(), system.labels().len().to_string(), system.source().to_owned()]);
    }
    output::text(&output::columns(&rows))
}

/// Whose numbers segmentations get.
pub(super) struct Numbering {
    /// The model's where there is none.
    pub(super) system: Option<LabelSystem>,
    relabelling: Option<Relabelling>,
}

impl Numbering {
    pub(super) fn open(system: Option<&Path>) -> Result<Self> {
        Ok(Self { system: system.map(LabelSystem::open).transpose()?, relabelling: None })
    }

    /// A folder's label maps have one numbering: else nobody could tell which of them has which. `image` is one of a folder
    /// of images; a single prediction is not described, so that what is beside it may be anything, but for what a label system
    /// says of all.
    pub(super) fn check_folder(&self, folder: &Path, image: Option<&Path>) -> Result<()> {
        let refused = |file: &Path, why: &str| {
            Err(Error::Usage { what: format!("{}: {why}; expected another output folder", file.display()) })
        };
        let [own, models] = [LabelSystem::FILE, "dataset.json"].map(|name| folder.join(name));
        match (&self.system, image) {
            (None, _) if own.is_file() => {
                refused(&own, "the label maps of this folder have another data set's numbers")
            }
            (Some(system), _) if own.is_file() => {
                let found = LabelSystem::read(&own)?;
                if found.has_numbers_of(system) {
                    return Ok(());
                }
                let (found, name) = (found.name(), system.name());
                let why = format!("the label maps of this folder have the numbers of {found:?}, not those of {name:?}");
                refused(&own, &why)
            }
            (Some(_), Some(_)) if models.is_file() => {
                refused(&models, "the label maps of this folder have a model's numbers")
            }
            // Not every model leaves a description.
            (Some(_), Some(image)) => match any_map(folder, cases::endings_like(image))? {
                Some(map) => refused(&map, &format!("there, and no {} says in which numbers", LabelSystem::FILE)),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// The second stage of a cascade takes what the first predicted in the model's numbers.
    pub(super) fn check_previous(path: &Path) -> Result<()> {
        let folder = if path.is_dir() { path } else { parent(path) };
        let own = folder.join(LabelSystem::FILE);
        if !own.is_file() {
            return Ok(());
        }
        let what = format!("{}: --previous-stage has another data set's numbers, expected the model's", own.display());
        Err(Error::Usage { what })
    }

    /// Finds the classes of the system among the model's.
    pub(super) fn fit(&mut self, plan: &InferencePlan) -> Result<()> {
        if let Some(system) = &self.system {
            self.relabelling = Some(system.from_model(&ModelClasses::of_plan(plan)?)?);
        }
        Ok(())
    }

    /// Says beside the predictions what their numbers mean.
    pub(super) fn describe(&self, model: &Path, output: &Path) -> Result<()> {
        match &self.system {
            Some(system) => system.write(&output.join(LabelSystem::FILE)),
            None => cases::copy_descriptions(model, output),
        }
    }

    pub(super) fn apply(&self, segmentation: &mut Segmentation) -> Result<()> {
        self.relabelling.as_ref().map_or(Ok(()), |r| r.apply(segmentation))
    }
}

/// A file in a folder that may be a label map, of these endings.
fn any_map(folder: &Path, endings: &[&str]) -> Result<Option<PathBuf>> {
    if !folder.is_dir() {
        return Ok(None);
    }
    let read = |e| Error::Io { path: folder.into(), action: "read", source: e };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if !name.starts_with('.') && endings.iter().any(|e| name.ends_with(e)) {
            found.push(path);
        }
    }
    // Of several the same one each time.
    Ok(found.into_iter().min())
}
