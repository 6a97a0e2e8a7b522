//! `stunet bench volume`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use stunet::nnunet::volume::{Neighbours, distance_transform, fill_holes, label};
use stunet::{Device, Error, Result, io};

use super::super::args::DeviceArgs;
use super::super::output;
use super::Seconds;

/// Connected components, holes and distances of a label in a file
///
/// What scipy.ndimage does with label, binary_fill_holes and distance_transform_edt; benches/bench_volume.py times both in turn
/// and compares what they find.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Label map, NIfTI
    #[arg(value_name = "FILE")]
    input: PathBuf,
    /// Which label [default: all that is not background]
    #[arg(long, value_name = "N")]
    label: Option<u16>,
    /// Timed repetitions, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
    /// Also write what was found as plain numbers, little-endian: faces.u32, corners.u32, filled.u8, distances.f64
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Args {
    pub(super) fn run(&self) -> Result<()> {
        let device = self.device.open()?;
        let map = io::read_segmentation(&self.input)?;
        let (shape, spacing) = (map.geometry.shape, map.geometry.spacing_mm);
        let inside = |l: u16| self.label.map_or(l != 0, |wanted| l == wanted);
        let mask: Vec<bool> = (0..map.labels.len()).map(|i| inside(map.labels.get(i))).collect();
        drop(map);
        if let Some(folder) = &self.output {
            fs::create_dir_all(folder).map_err(|e| Error::Io { path: folder.clone(), action: "create", source: e })?;
        }
        let mut times = Vec::new();
        for (name, neighbours) in [("faces", Neighbours::Faces), ("corners", Neighbours::Corners)] {
            let (seconds, (numbers, _)) = self.time(&device, || label(&mask, shape, neighbours))?;
            times.push((name, seconds));
            self.keep(&format!("{name}.u32"), bytemuck::cast_slice(&numbers))?;
        }
        let (seconds, filled) = self.time(&device, || {
            let mut filled = mask.clone();
            fill_holes(&mut filled, shape).map(|()| filled)
        })?;
        times.push(("filled", seconds));
        self.keep("filled.u8", bytemuck::cast_slice(&filled))?;
        drop(filled);
        let (seconds, distances) = self.time(&device, || distance_transform(&mask, shape, spacing))?;
        times.push(("distances", seconds));
        self.keep("distances.f64", bytemuck::cast_slice(&distances))?;
        if self.json {
            let medians = times.iter().map(|(name, s)| ((*name).to_string(), s.median.into()));
            return output::line(serde_json::Value::Object(medians.collect()).to_string());
        }
        for (name, Seconds { median, min }) in times {
            output::line(format!("{name:10} min {min:.3} s, median {median:.3} s"))?;
        }
        Ok(())
    }

    /// The seconds that `f` takes, and what it gave the last time.
    fn time<T: Send>(&self, device: &Device, f: impl Fn() -> Result<T> + Sync + Send) -> Result<(Seconds, T)> {
        let mut last = device.install(&f)?;
        let mut seconds = Vec::new();
        for _ in 0..self.runs {
            // Before the next one is made.
            drop(last);
            let begin = Instant::now();
            last = device.install(&f)?;
            seconds.push(begin.elapsed().as_secs_f64());
        }
        Ok((Seconds::of(seconds), last))
    }

    fn keep(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(path) = self.output.as_deref().map(|f: &Path| f.join(name)) else { return Ok(()) };
        fs::write(&path, bytes).map_err(|e| Error::Io { path: path.clone(), action: "write", source: e })
    }
}
