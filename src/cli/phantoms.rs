//! `stunet phantoms`.

use std::path::PathBuf;

use clap::value_parser;
use stunet::phantom::{self, Phantom};
use stunet::{Error, Event, Flow, Progress, Result, io};

use super::output;
use super::progress::{self, Bar};

/// Write a raw data set of synthetic CTs with their true segmentations, to train on
///
/// The folder is in nnU-Net's form: imagesTr, labelsTr and dataset.json. The same numbers give the same files. Of no use for
/// patients.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet phantoms -o $nnUNet_raw/Dataset900_Phantom -n 12
  stunet phantoms -o raw/Dataset901_Trunk -n 240 --first 1000 --shape 96 72 100 --spacing 3 3 3")]
pub(super) struct Args {
    /// Folder to write, DatasetNNN_Name
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 12, value_parser = value_parser!(u32).range(1..=9999))]
    count: u32,
    /// Seed of the first one; the others follow
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    first: u64,
    /// Voxels z y x
    #[arg(long, value_name = "N", num_args = 3, default_values_t = [96, 72, 100])]
    shape: Vec<usize>,
    /// Voxel spacing z y x in mm
    #[arg(long, value_name = "MM", num_args = 3, default_values_t = [3.0, 3.0, 3.0])]
    spacing: Vec<f64>,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let folder = &args.output;
    let description = folder.join("dataset.json");
    if description.exists() {
        return Err(Error::Usage { what: format!("{}: exists; choose another folder", description.display()) });
    }
    let (shape, spacing) = ([0, 1, 2].map(|k| args.shape[k]), [0, 1, 2].map(|k| args.spacing[k]));
    progress::catch_interrupts();
    let [images, labels] = ["imagesTr", "labelsTr"].map(|n| folder.join(n));
    for path in [&images, &labels] {
        std::fs::create_dir_all(path).map_err(|e| Error::Io { path: path.clone(), action: "create", source: e })?;
    }
    let mut bar = Bar::new("phantoms", !args.no_progress, false);
    let total = args.count as usize;
    for done in 0..total {
        if bar.event(Event::Cases { done, total }) == Flow::Cancel {
            return Err(Error::Cancelled);
        }
        let seed = args.first.wrapping_add(done as u64);
        let (image, truth) = Phantom::new(seed).with_grid(shape, spacing)?.render();
        io::write_image(images.join(format!("phantom_{seed:05}_0000.nii.gz")), &image)?;
        io::write_nifti(labels.join(format!("phantom_{seed:05}.nii.gz")), &truth)?;
    }
    // Last: without it the folder is no data set.
    phantom::describe(folder, total)?;
    output::path(&description)
}
