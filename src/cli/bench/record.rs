//! What a benchmark found out, for people and for machines.

use std::collections::BTreeMap;

use serde::Serialize;
use stunet::autograd::Step;
use stunet::{Device, Error, Result};

use super::super::{output, system};
use super::Seconds;
use super::train_step::Training;

/// One run of a benchmark.
#[derive(Debug, Default, Serialize)]
pub(super) struct Record {
    pub(super) command: &'static str,
    pub(super) version: &'static str,
    pub(super) model: String,
    /// (z, y, x).
    pub(super) patch: [usize; 3],
    pub(super) channels: u16,
    pub(super) classes: u16,
    pub(super) precision: String,
    pub(super) strict: bool,
    pub(super) device: String,
    pub(super) threads: usize,
    pub(super) isa: &'static str,
    pub(super) runs: u16,
    /// Median.
    pub(super) seconds: f64,
    pub(super) seconds_min: f64,
    /// Of a pass through a card that ends with the labels on the host, where `seconds` leave them on the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seconds_on_host: Option<f64>,
    /// Of passes through a card that are issued one after the other, as a prediction's windows are; `seconds` are of passes
    /// that are each waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seconds_in_a_row: Option<f64>,
    /// Operations of plain convolutions by the median.
    pub(super) gflops: f64,
    /// Above 1 where an algorithm does fewer operations.
    pub(super) roofline_share: f64,
    pub(super) roofline_gflops: f64,
    /// What a card's memory reaches with a copy, read and written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory_gb_per_second: Option<f64>,
    /// Largest total of tensors, parameters included.
    pub(super) peak_bytes: usize,
    pub(super) peak_process_bytes: Option<u64>,
    #[serde(flatten)]
    pub(super) prediction: Option<Prediction>,
    #[serde(flatten)]
    pub(super) training: Option<Training>,
    /// Kernels that did not pass their trial on this card, and why.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) refused_kernels: BTreeMap<String, String>,
    pub(super) layers: Vec<Layer>,
}

/// What only a whole prediction has.
#[derive(Debug, Serialize)]
pub(super) struct Prediction {
    /// (z, y, x).
    pub(super) shape: [usize; 3],
    pub(super) step_size: f64,
    pub(super) mirroring: bool,
    pub(super) windows: usize,
    /// Windows, each as often as it is mirrored.
    pub(super) passes: usize,
    /// Of the network stage, by windows.
    pub(super) seconds_per_window: f64,
    pub(super) seconds_per_stage: serde_json::Map<String, serde_json::Value>,
}

/// One layer.
#[derive(Debug, Default, Serialize)]
pub(super) struct Layer {
    pub(super) operation: &'static str,
    pub(super) what: String,
    pub(super) implementation: &'static str,
    pub(super) seconds: f64,
    /// None where nothing is multiplied.
    pub(super) gflops: Option<f64>,
    pub(super) roofline_share: Option<f64>,
    /// Bytes read and written at least, by the time, and as a share of what the card's memory reaches with a copy. Above 1
    /// where a cache holds them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gb_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory_share: Option<f64>,
    /// Calls that a card was given before it was waited for, of which `seconds` is the mean; none where each was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) in_a_row: Option<usize>,
    /// What the implementation was chosen from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) implementations: Vec<Candidate>,
}

/// One implementation that a layer could have.
#[derive(Debug, Serialize)]
pub(super) struct Candidate {
    pub(super) implementation: &'static str,
    /// As accurate as plain summation.
    pub(super) strict: bool,
    /// The rule's choice: the least estimate.
    pub(super) chosen: bool,
    /// By the rule, at this machine's roofline.
    pub(super) estimated_seconds: f64,
    /// Median and least, where it was timed.
    pub(super) seconds: Option<f64>,
    pub(super) seconds_min: Option<f64>,
    /// As of the layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) in_a_row: Option<usize>,
}

impl From<&Step> for Layer {
    fn from(s: &Step) -> Self {
        Self {
            operation: s.operation,
            what: s.what.clone(),
            implementation: s.implementation,
            seconds: s.seconds,
            gflops: (s.macs > 0).then(|| s.macs as f64 * 2e-9 / s.seconds.max(1e-9)),
            ..Self::default()
        }
    }
}

impl Record {
    /// Adds the time for so many multiply-accumulates, and memory as it is now.
    pub(super) fn measured(&mut self, seconds: Seconds, macs: f64, device: &Device) {
        (self.seconds, self.seconds_min) = (seconds.median, seconds.min);
        self.gflops = macs * 2e-9 / seconds.median;
        self.roofline_share = self.gflops / self.roofline_gflops;
        self.peak_bytes = device.memory().peak;
        self.refused_kernels = device.refused_kernels().into_iter().collect();
        self.peak_process_bytes = system::peak_process_bytes();
    }

    /// One line of JSON, or a table.
    pub(super) fn print(mut self, json: bool) -> Result<()> {
        for layer in &mut self.layers {
            layer.roofline_share = layer.gflops.map(|g| g / self.roofline_gflops);
            layer.memory_share = layer.gb_per_second.zip(self.memory_gb_per_second).map(|(own, copy)| own / copy);
        }
        if json {
            return output::line(serde_json::to_string(&self).map_err(|e| Error::Unsupported { what: e.to_string() })?);
        }
        let [z, y, x] = self.patch;
        let strict = if self.strict { ", strict" } else { "" };
        output::line(format!(
            "{} {}, window {z} x {y} x {x}, {} classes, {}{strict}, {} {} with {} threads",
            self.command, self.model, self.classes, self.precision, self.device, self.isa, self.threads
        ))?;
        if let Some(p) = &self.prediction {
            let [z, y, x] = p.shape;
            let windows = format!("{} windows of {:.3} s", p.windows, p.seconds_per_window);
            let stages: Vec<String> = p
                .seconds_per_stage
                .iter()
                .map(|(n, s)| format!("{n} {:.2} s", s.as_f64().unwrap_or_default()))
                .collect();
            output::line(format!("image {z} x {y} x {x}: {windows}; {}", stages.join(", ")))?;
        }
        for line in self.training.iter().flat_map(|t| t.lines(system::human)) {
            output::line(line)?;
        }
        self.layers.iter().try_for_each(print_layer)?;
        for (entry, why) in &self.refused_kernels {
            output::line(format!("{entry} is not used: {why}"))?;
        }
        let (share, peak) = (self.roofline_share * 100.0, self.roofline_gflops);
        let rate = format!("{:.1} GFLOP/s, {share:.0} % of {peak:.1}", self.gflops);
        let rate = if self.gflops > 0.0 { format!(", {rate}") } else { String::new() };
        output::line(format!("median {:.4} s, min {:.4} s{rate}", self.seconds, self.seconds_min))?;
        if let Some((host, row)) = self.seconds_on_host.zip(self.seconds_in_a_row) {
            output::line(format!("with the labels on the host {host:.4} s, one pass after the other {row:.4} s"))?;
        }
        if let Some(memory) = self.memory_gb_per_second {
            output::line(format!("memory copies {memory:.0} GB/s"))?;
        }
        let process = self.peak_process_bytes.map(|b| format!(", process {}", system::human(b))).unwrap_or_default();
        output::line(format!("peak of tensors {}{process}", system::human(self.peak_bytes as u64)))
    }
}

fn print_layer(l: &Layer) -> Result<()> {
    let (rate, unit) = l.gb_per_second.map_or((l.gflops, "GFLOP/s"), |b| (Some(b), "GB/s"));
    let rate = rate.map(|r| format!("{r:.1}")).unwrap_or_default();
    let share = l.roofline_share.or(l.memory_share).map(|s| format!(" {:>4.0} %", s * 100.0)).unwrap_or_default();
    let title = format!("{} {}", l.operation, l.what);
    output::line(format!(
        "  {title:<62} {:<20} {:>9.4} ms {rate:>8} {unit}{share}",
        l.implementation,
        l.seconds * 1e3
    ))?;
    l.implementations.iter().try_for_each(|c| {
        let mark = if c.chosen { '*' } else { ' ' };
        let measured = c.seconds.map_or_else(|| "-".into(), |s| format!("{:.4} ms", s * 1e3));
        // A card's rule compares without saying seconds.
        let estimated = if c.estimated_seconds.is_nan() {
            String::new()
        } else {
            format!("estimated {:>9.3} ms, ", c.estimated_seconds * 1e3)
        };
        output::line(format!("    {mark} {:<22} {estimated}measured {measured:>12}", c.implementation))
    })
}
