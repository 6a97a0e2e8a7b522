//! Which windows a sweep runs, how they count and what is aggregated, planned by memory before anything runs.

use super::held::{Held, PLANES};
use super::sums;
use super::window::starts;
use crate::error::{Error, Result};
use crate::models::Network;
use crate::ops::head::Activation;
use crate::tensor::{BLOCK, Device, Dims};

/// A 2D network runs so many slices in a pass at most, and so many voxels unless a slice has more: filters are read once for
/// all of them, and there is work for all threads.
const SLICES: usize = 16;
const PASS_VOXELS: usize = 1 << 18;

/// What is aggregated over windows, and where.
///
/// Averaging commutes with a linear head, so logits need not exist: the features are averaged and the head comes
/// last, unless there are fewer classes. A softmax does not commute; then either the class scores of one window's depth are
/// summed, or the windows' features are held until a plane is finished, whichever takes less memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gather {
    /// Weighted sums of features; the caller applies the head to the planes.
    Features,
    /// Weighted sums of the head's activated scores.
    Scores(Activation),
    /// Features held per window in 24 bits, scores made plane by plane.
    Held(Activation),
}

/// Everything that says which windows run and how they count; makes the memory plan before anything runs.
#[derive(Debug, Clone)]
pub(crate) struct SweepPlan {
    /// Voxels of the image on the network's grid.
    pub(crate) shape: [usize; 3],
    /// Window size; that of a 2D network is one slice.
    pub(crate) patch: [usize; 3],
    /// Windows are slices of a 2D network.
    pub(super) planar: bool,
    /// Planes of a pass: a window's, or so many slices at the same place, each a sample of its own. All passes have the same
    /// number, those past the image's last slice are zeros: what a network runs may go by it, down to the last bit.
    pub(super) planes: usize,
    /// First voxels of passes per axis, in the padded image.
    pub(crate) starts: [Vec<usize>; 3],
    /// Mirrored passes.
    pub(crate) flips: Vec<[bool; 3]>,
    /// Aggregation.
    pub(crate) gather: Gather,
    /// True when windows count by a Gaussian, false when all voxels count alike.
    pub(crate) gaussian: bool,
    /// Only the most accurate kernels.
    pub(crate) strict: bool,
    /// Sums are kept where the networks run, not with the processor.
    pub(crate) sums_on_card: bool,
    /// How the processor would aggregate.
    on_host: Gather,
    pub(super) folds: usize,
    pub(super) features: usize,
    pub(super) classes: usize,
}

impl SweepPlan {
    /// Plans windows of `patch` over `shape` at `step`; `linear` says that logits are averaged, otherwise `activation`
    /// is applied to each window first. `features` are those of one network, of which there are `folds`.
    pub(crate) fn new(
        shape: [usize; 3],
        patch: [usize; 3],
        step: f64,
        flips: Vec<[bool; 3]>,
        nets: &[Network],
        activation: Activation,
    ) -> Result<Self> {
        let first = nets.first().ok_or_else(|| Error::usage("a model without a fold"))?;
        let padded = [0, 1, 2].map(|a| shape[a].max(patch[a]));
        let starts = [0, 1, 2].map(|a| starts(padded[a], patch[a], step));
        let mut plan = Self {
            shape,
            patch,
            planar: first.is_planar(),
            planes: patch[0],
            starts,
            flips,
            gather: Gather::Features,
            gaussian: true,
            strict: false,
            sums_on_card: false,
            on_host: Gather::Features,
            folds: nets.len(),
            features: first.head_features().next_multiple_of(BLOCK),
            classes: first.classes(),
        };
        if plan.planar {
            let most = (PASS_VOXELS / (patch[1] * patch[2]).max(1)).clamp(1, SLICES);
            // Windows that are held are single.
            let most = if activation == Activation::Identity { most } else { 1 };
            plan.run_slices(shape[0].div_ceil(shape[0].div_ceil(most).max(1)));
        }
        let choices = match activation {
            Activation::Identity => [Gather::Features, Gather::Scores(activation)],
            _ => [Gather::Held(activation), Gather::Scores(activation)],
        };
        let bytes = choices.map(|g| plan.bytes_of(g));
        plan.gather = if bytes[0] <= bytes[1] { choices[0] } else { choices[1] };
        Ok(plan)
    }

    /// Runs so many slices of a 2D network in a pass.
    pub(super) fn run_slices(&mut self, slices: usize) {
        self.planes = slices.max(1);
        self.starts[0] = (0..self.shape[0]).step_by(self.planes).collect();
    }

    /// Voxels (z, y, x) of a pass.
    pub(super) fn pass_size(&self) -> [usize; 3] {
        [self.planes, self.patch[1], self.patch[2]]
    }

    /// A network's input of so many channels.
    pub(super) fn input(&self, channels: usize) -> Dims {
        let [planes, y, x] = self.pass_size();
        if self.planar { Dims::from([planes, channels, 1, y, x]) } else { Dims::from([1, channels, planes, y, x]) }
    }

    /// Voxels of the padded image.
    pub(super) fn padded(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| self.shape[a].max(self.patch[a]))
    }

    /// Zeros before the image; an odd remainder goes to the end.
    pub(super) fn pad(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| (self.padded()[a] - self.shape[a]) / 2)
    }

    /// Windows of the image.
    pub(crate) fn windows(&self) -> usize {
        let [z, y, x] = [0, 1, 2].map(|a| self.starts[a].len());
        if self.planar { self.shape[0] * y * x } else { z * y * x }
    }

    /// Passes through a network.
    pub(crate) fn passes(&self) -> usize {
        self.starts.iter().map(Vec::len).product::<usize>() * self.flips.len() * self.folds
    }

    /// Where the window of the `n`-th pass starts, and how it is mirrored.
    #[cfg(feature = "cuda")]
    pub(super) fn pass(&self, n: usize) -> ([usize; 3], [bool; 3]) {
        let (window, [_, ny, nx]) = (n / self.flips.len() / self.folds, [0, 1, 2].map(|a| self.starts[a].len()));
        let at = [window / (ny * nx), window / nx % ny, window % nx];
        ([0, 1, 2].map(|a| self.starts[a][at[a]]), self.flips[n % self.flips.len()])
    }

    /// Channels of the planes that come out.
    pub(crate) fn channels(&self) -> usize {
        match self.gather {
            Gather::Features => self.folds * self.features,
            Gather::Scores(_) | Gather::Held(_) => self.classes,
        }
    }

    /// Bytes that aggregation takes, beside the network's own.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes_of(self.gather)
    }

    /// Aggregates on `device`, a card with so many bytes to spare, if that can be: by what moves the fewest bytes in a pass
    /// and fits. Windows are not held there.
    pub(crate) fn move_to_card(&mut self, device: &Device, room: usize) {
        if self.planar {
            self.run_slices(1);
        }
        let scores = |how| (sums::lanes_on_card(self.classes), Gather::Scores(how));
        let mut choices = match self.gather {
            Gather::Features | Gather::Scores(Activation::Identity) => {
                vec![(self.features, Gather::Features), scores(Activation::Identity)]
            }
            Gather::Scores(how) | Gather::Held(how) => vec![scores(how)],
        };
        choices.sort_by_key(|(lanes, _)| *lanes);
        let can = |g: &Gather| *g == Gather::Features || sums::scores_on_card(device, self.features);
        let fits = choices.into_iter().map(|(_, g)| g).find(|g| can(g) && self.bytes_on_card(*g) <= room);
        if let Some(gather) = fits {
            self.on_host = self.gather;
            (self.gather, self.sums_on_card) = (gather, true);
        }
    }

    /// Undoes [`SweepPlan::move_to_card`]. Sums of logits stay what they are, which the head that finishes them goes with.
    pub(super) fn move_to_host(&mut self) {
        self.sums_on_card = false;
        if !matches!(self.gather, Gather::Features | Gather::Scores(Activation::Identity)) {
            self.gather = self.on_host;
        }
    }

    fn bytes_on_card(&self, gather: Gather) -> usize {
        let (depth, [_, h, w]) = (sums::ring(self.planes, true), self.padded());
        let lanes = match gather {
            Gather::Features => self.folds * self.features,
            Gather::Scores(_) | Gather::Held(_) => sums::lanes_on_card(self.classes),
        };
        [depth, h, w, lanes + 1].iter().fold(4, |n: usize, &v| n.saturating_mul(v))
    }

    fn bytes_of(&self, gather: Gather) -> usize {
        let [_, h, w] = self.padded();
        let ring = |k: usize| 4 * self.planes * h * w * (k + 1);
        match gather {
            Gather::Features => ring(self.folds * self.features),
            Gather::Scores(_) => ring(self.classes),
            Gather::Held(_) => {
                let windows = self.starts[1].len() * self.starts[2].len() * self.folds * self.flips.len();
                // While a row of windows runs, earlier rows hold the planes that they share with it.
                let shared = |row: usize| {
                    let now = self.starts[0][row];
                    // Planes go in whole pieces, and one of the finished ones may still be wanted.
                    let gone = |s: &usize| now.saturating_sub(s + 1) / PLANES * PLANES;
                    let left = |s: &usize| self.patch[0].saturating_sub(gone(s));
                    self.starts[0][..row].iter().map(left).sum::<usize>()
                };
                let planes = self.patch[0] + (0..self.starts[0].len()).map(shared).max().unwrap_or(0);
                windows * Held::bytes(self.patch, self.features) / self.patch[0].max(1) * planes
            }
        }
    }
}
