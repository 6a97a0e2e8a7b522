//! `stunet bench export`.

use std::time::Instant;

use stunet::nnunet::predict::labels_from_scores;
use stunet::{Error, Result};

use super::super::args::DeviceArgs;
use super::super::{output, system};
use super::Seconds;

/// From scores on the network's grid to labels on the image's
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Voxels of the scores along z, y and x
    #[arg(long, num_args = 3, value_names = ["Z", "Y", "X"], default_values_t = [224, 202, 244])]
    from: Vec<usize>,
    /// Voxels of the image along z, y and x
    #[arg(long, num_args = 3, value_names = ["Z", "Y", "X"], default_values_t = [112, 101, 122])]
    to: Vec<usize>,
    /// Classes, background included
    #[arg(long, value_name = "N", default_value_t = 105, value_parser = clap::value_parser!(u16).range(2..=4096))]
    classes: u16,
    /// Timed repetitions, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Args {
    pub(super) fn run(&self) -> Result<()> {
        let device = self.device.open()?;
        let grid = |v: &[usize]| <[usize; 3]>::try_from(v).map_err(|_| Error::Usage { what: "three sizes".into() });
        let (from, to, classes) = (grid(&self.from)?, grid(&self.to)?, usize::from(self.classes));
        if from.iter().chain(&to).any(|d| !(1..=4096).contains(d)) {
            return Err(Error::Usage { what: "sizes of --from and --to must lie in 1 to 4096".into() });
        }
        let n = classes * from.iter().product::<usize>();
        let scores: Vec<f32> = (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32).collect();
        let mut seconds = Vec::new();
        for run in 0..=self.runs {
            let begin = Instant::now();
            labels_from_scores(&scores, classes, from, to, &device)?;
            if run > 0 {
                seconds.push(begin.elapsed().as_secs_f64());
            }
        }
        let Seconds { median, min } = Seconds::of(seconds);
        let peak = system::peak_process_bytes().map(|b| b.saturating_sub(4 * n as u64)).map(system::human);
        let peak = peak.map(|p| format!(", {p} above the scores")).unwrap_or_default();
        output::line(format!("{classes} classes, {from:?} to {to:?}: min {min:.3} s, median {median:.3} s{peak}"))
    }
}
