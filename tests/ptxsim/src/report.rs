//! What a launch did: instructions, the lines that ran, and the traffic of every load and store.

use std::collections::BTreeMap;

use crate::cta::Worker;
use crate::parse::Kernel;

/// Traffic of one load or store instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Times that a warp ran it.
    pub requests: u64,
    /// Lanes of all requests.
    pub lanes: u64,
    /// Passes through shared memory: one serves 32 banks of four bytes.
    pub wavefronts: u64,
    /// Passes that the same bytes would take with no bank conflict.
    pub ideal_wavefronts: u64,
    /// 32-byte sectors of global memory.
    pub sectors: u64,
    /// Sectors that the same number of bytes would fill.
    pub ideal_sectors: u64,
}

impl Site {
    pub(crate) fn add(&mut self, o: &Site) {
        self.requests += o.requests;
        self.lanes += o.lanes;
        self.wavefronts += o.wavefronts;
        self.ideal_wavefronts += o.ideal_wavefronts;
        self.sectors += o.sectors;
        self.ideal_sectors += o.ideal_sectors;
    }
}

/// Counters of one launch, or of several that were added up.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Instructions, counted once a warp.
    pub warp_instructions: u64,
    /// Instructions, counted once a lane.
    pub lane_instructions: u64,
    /// For every line with an instruction: how often a warp ran it.
    pub coverage: BTreeMap<u32, u64>,
    /// For every line with a load or store that ran: its traffic.
    pub counters: BTreeMap<u32, Site>,
    lines: Vec<u32>,
}

impl Report {
    pub(crate) fn new(kernel: &Kernel) -> Report {
        let lines: Vec<u32> = kernel.code.iter().map(|i| i.line).collect();
        Report { coverage: lines.iter().map(|l| (*l, 0)).collect(), lines, ..Report::default() }
    }

    pub(crate) fn add(&mut self, worker: &Worker) {
        self.warp_instructions += worker.counts.iter().sum::<u64>();
        self.lane_instructions += worker.lanes;
        for ((line, count), site) in self.lines.iter().zip(&worker.counts).zip(&worker.sites) {
            *self.coverage.entry(*line).or_default() += count;
            if site.requests > 0 {
                self.counters.entry(*line).or_default().add(site);
            }
        }
    }

    /// Adds another launch of the same kernel.
    pub fn merge(&mut self, other: &Report) {
        self.warp_instructions += other.warp_instructions;
        self.lane_instructions += other.lane_instructions;
        for (line, count) in &other.coverage {
            *self.coverage.entry(*line).or_default() += count;
        }
        for (line, site) in &other.counters {
            self.counters.entry(*line).or_default().add(site);
        }
    }

    /// Lines that never ran.
    pub fn uncovered(&self) -> Vec<u32> {
        self.coverage.iter().filter(|(_, n)| **n == 0).map(|(l, _)| *l).collect()
    }
}

/// Parameters in the layout of `.param` space.
#[derive(Clone, Debug, Default)]
pub struct Params(Vec<u8>);

impl Params {
    /// None yet.
    pub fn new() -> Params {
        Params::default()
    }

    /// Bytes with the alignment of their parameter: a struct by value, a tensor map (64).
    pub fn bytes(mut self, data: &[u8], align: usize) -> Params {
        self.0.resize(self.0.len().next_multiple_of(align), 0);
        self.0.extend(data);
        self
    }

    /// A pointer or 64-bit number.
    pub fn u64(self, v: u64) -> Params {
        self.bytes(&v.to_le_bytes(), 8)
    }

    /// A 32-bit number.
    pub fn u32(self, v: u32) -> Params {
        self.bytes(&v.to_le_bytes(), 4)
    }

    /// A signed 32-bit number.
    pub fn i32(self, v: i32) -> Params {
        self.bytes(&v.to_le_bytes(), 4)
    }

    /// A float.
    pub fn f32(self, v: f32) -> Params {
        self.bytes(&v.to_le_bytes(), 4)
    }

    /// The tensor map that [`crate::Machine::tensor_map`] gave.
    pub fn map(self, v: &[u8; 128]) -> Params {
        self.bytes(v, 64)
    }

    /// All of them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}
