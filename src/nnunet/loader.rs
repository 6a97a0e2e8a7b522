//! Batches for training and validation (nnU-Net `nnUNetDataLoader` and its workers), made ahead by threads of their own.
//!
//! A batch is a function of the seed, the epoch and its number in it: whatever the number of threads, and wherever a run
//! begins again, it has the same bytes. The threads never enter a rayon pool, so a network that computes in one is not
//! held up.

mod queue;
mod sampling;

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;

pub use sampling::{Oversampling, Sampler};

use crate::error::{Error, Result};
use crate::nnunet::augment::{AugmentConfig, Augmenter, Item, Parameters, RawPatch, Scratch};
use crate::nnunet::training_case::TrainingCase;
use queue::{Place, Queue};

/// What a loader makes.
#[derive(Debug, Clone)]
pub struct LoaderConfig {
    /// Voxels of a patch along (z, y, x); 1 along z in 2D.
    pub patch: [usize; 3],
    /// Patches of a batch.
    pub batch: usize,
    /// Batches of an epoch; the next one is the first of the epoch after.
    pub iterations: u32,
    /// Which patches are put on foreground.
    pub oversampling: Oversampling,
    /// All that is random follows from it.
    pub seed: u64,
    /// Augmentation for training; `None` for patches as they are.
    pub augment: Option<AugmentConfig>,
    /// In a cascade the foreground labels of the stage before, each of which becomes a channel; else empty.
    pub previous: Vec<u16>,
    /// Patches go out as they were read: a [`Trainer`](super::train::Trainer) on a card augments them there. Not in a cascade.
    pub raw: bool,
    /// Threads, at least one.
    pub workers: usize,
    /// Batches that are made before they are asked for, at least one.
    pub ahead: usize,
}

impl LoaderConfig {
    /// For training with nnU-Net's defaults: 250 iterations, a third of the patches on foreground, two threads.
    #[must_use]
    pub fn training(augment: AugmentConfig, batch: usize) -> Self {
        Self { iterations: 250, augment: Some(augment.clone()), ..Self::validation(augment.patch, batch) }
    }

    /// For validation with nnU-Net's defaults: 50 iterations, a third of the patches on foreground, one thread.
    #[must_use]
    pub fn validation(patch: [usize; 3], batch: usize) -> Self {
        Self {
            patch,
            batch,
            iterations: 50,
            oversampling: Oversampling::LastOfBatch(0.33),
            seed: 0,
            augment: None,
            previous: Vec::new(),
            raw: false,
            workers: 1,
            ahead: 3,
        }
    }
}

/// Patches and their labels. Its memory goes back to the loader when it is dropped.
pub struct Batch {
    /// `[N, C, D, H, W]`; empty where a card is to make it.
    pub image: Vec<f32>,
    /// `[N, D, H, W]`; empty where a card is to make it.
    pub target: Vec<u16>,
    /// What a card makes them of.
    raw: Vec<RawPatch>,
    /// Channels, those of the stage before included.
    pub channels: usize,
    /// Voxels of a patch along (z, y, x).
    pub patch: [usize; 3],
    /// Which case each patch is from.
    pub cases: Vec<usize>,
    home: Option<Arc<Queue>>,
}

impl Batch {
    /// Patches from elsewhere than a loader: `image` `[N, C, D, H, W]` and `target` `[N, D, H, W]`, whose N is the number of
    /// `cases`.
    ///
    /// # Errors
    /// [`Error::Shape`] for other numbers of voxels.
    pub fn new(
        image: Vec<f32>,
        target: Vec<u16>,
        channels: usize,
        patch: [usize; 3],
        cases: Vec<usize>,
    ) -> Result<Self> {
        let voxels = cases.len() * patch.iter().product::<usize>();
        if image.len() != voxels * channels || target.len() != voxels {
            let what = format!("{} values and {} labels for {voxels} voxels", image.len(), target.len());
            return Err(Error::shape("batch", what));
        }
        Ok(Self { image, target, raw: Vec::new(), channels, patch, cases, home: None })
    }

    /// Whether a card is to make the patches.
    pub(crate) fn is_raw(&self) -> bool {
        !self.raw.is_empty()
    }

    /// What a card makes the patches of and how, if they are not made yet.
    #[cfg(feature = "cuda")]
    pub(crate) fn raw(&self) -> Option<(&Augmenter, &[RawPatch])> {
        let home = self.home.as_ref()?;
        self.is_raw().then(|| (&home.maker().augmenter, &self.raw[..]))
    }

    /// N, C, D, H, W of the images.
    #[must_use]
    pub fn image_dims(&self) -> [usize; 5] {
        let [d, h, w] = self.patch;
        [self.cases.len(), self.channels, d, h, w]
    }

    /// N, D, H, W of the labels.
    #[must_use]
    pub fn target_dims(&self) -> [usize; 4] {
        let [d, h, w] = self.patch;
        [self.cases.len(), d, h, w]
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("image", &self.image_dims()).field("cases", &self.cases).finish_non_exhaustive()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.take_back(Made {
                image: std::mem::take(&mut self.image),
                target: std::mem::take(&mut self.target),
                raw: std::mem::take(&mut self.raw),
                cases: std::mem::take(&mut self.cases),
            });
        }
    }
}

/// Hands out batches in order, while its threads make the next ones.
pub struct Loader {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Loader {
    /// Starts with the first batch of epoch 0.
    ///
    /// # Errors
    /// [`Error::Usage`] without cases, for cases that do not fit together and for numbers out of range; [`Error::Device`]
    /// when threads cannot be started.
    pub fn new(cases: Vec<Arc<dyn TrainingCase>>, config: LoaderConfig) -> Result<Self> {
        let workers = config.workers;
        let maker = Maker::new(cases, config)?;
        let queue = Arc::new(Queue::new(maker));
        // Joins the threads that were started when the next one cannot be.
        let mut loader = Self { queue, threads: Vec::new() };
        for i in 0..workers {
            let queue = Arc::clone(&loader.queue);
            let builder = std::thread::Builder::new().name(format!("loader-{i}"));
            let thread = builder.spawn(move || queue.work());
            let thread = thread.map_err(|e| Error::Device { what: format!("a thread of the loader: {e}") })?;
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// Goes on with a batch of an epoch. Batches that have been made ahead are kept if they are the next ones anyway.
    /// An iteration behind the last of the epoch is one of a later epoch.
    pub fn seek(&mut self, epoch: u32, iteration: u32) {
        let n = self.queue.maker().config.iterations;
        self.queue.seek(Place { epoch: epoch.wrapping_add(iteration / n), iteration: iteration % n });
    }

    /// The next batch; waits until it is made.
    ///
    /// # Errors
    /// What went wrong when it was made: errors of [`TrainingCase::crop`], [`Error::OutOfMemory`], or [`Error::Device`] when a
    /// thread panicked. The next call goes on with the batch after it.
    #[expect(clippy::should_implement_trait, reason = "an iterator would be without end and hide errors")]
    pub fn next(&mut self) -> Result<Batch> {
        let made = self.queue.next()?;
        Ok(Batch {
            image: made.image,
            target: made.target,
            raw: made.raw,
            cases: made.cases,
            channels: self.queue.maker().channels,
            patch: self.queue.maker().config.patch,
            home: Some(Arc::clone(&self.queue)),
        })
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.queue.stop();
        for thread in self.threads.drain(..) {
            // A panic has been reported as the error of its batch.
            let _ = thread.join();
        }
    }
}

/// A batch without its home.
#[derive(Default)]
struct Made {
    image: Vec<f32>,
    target: Vec<u16>,
    raw: Vec<RawPatch>,
    cases: Vec<usize>,
}

/// Makes batches; shared by all threads.
struct Maker {
    cases: Vec<Arc<dyn TrainingCase>>,
    config: LoaderConfig,
    augmenter: Augmenter,
    sampler: Sampler,
    /// Channels of the patches.
    channels: usize,
}

impl Maker {
    fn new(cases: Vec<Arc<dyn TrainingCase>>, config: LoaderConfig) -> Result<Self> {
        let bad = |what: String| Err(Error::usage(format!("loader: {what}")));
        let Some(first) = cases.first() else {
            return bad("no cases, expected at least one".into());
        };
        for (name, n) in [("batch", config.batch), ("workers", config.workers), ("ahead", config.ahead)] {
            if n == 0 {
                return bad(format!("{name} 0, expected at least 1"));
            }
        }
        if config.patch.contains(&0) || config.iterations == 0 {
            let (patch, n) = (config.patch, config.iterations);
            return bad(format!("patch {patch:?} and {n} iterations, expected at least 1 of each"));
        }
        if config.augment.as_ref().is_some_and(|a| a.patch != config.patch) {
            return bad(format!("augmentation of another patch than {:?}", config.patch));
        }
        let (channels, label_channels) = (first.channels(), first.label_channels());
        let odd = cases.iter().position(|c| c.channels() != channels || c.label_channels() != label_channels);
        if let Some(i) = odd {
            return bad(format!("case {i} has {} channels, the first has {channels}", cases[i].channels()));
        }
        if label_channels < 1 + usize::from(!config.previous.is_empty()) {
            return bad("cases without the prediction of the stage before, expected one for a cascade".into());
        }
        if config.raw && (config.augment.is_none() || !config.previous.is_empty()) {
            return bad("patches for a card to augment, expected an augmentation and no stage before".into());
        }
        let augmenter = match &config.augment {
            Some(augment) => Augmenter::new(augment.clone(), &config.previous),
            None => Augmenter::plain(config.patch, &config.previous),
        };
        let sampler = Sampler::new(augmenter.initial_patch(), config.patch, config.batch, config.oversampling);
        let channels = augmenter.channels(channels);
        let [d, h, w] = config.patch;
        let size = [config.batch, channels, d, h, w].iter().try_fold(4usize, |n, &m| n.checked_mul(m));
        let items = u32::try_from(config.batch).ok().and_then(|n| n.checked_mul(config.iterations));
        if size.is_none() || items.is_none() {
            return bad(format!("batches of {} patches of {:?} are too large", config.batch, config.patch));
        }
        Ok(Self { cases, config, augmenter, sampler, channels })
    }

    fn make(&self, place: Place, scratch: &mut Scratch, made: &mut Made) -> Result<()> {
        let volume: usize = self.config.patch.iter().product();
        let batch = self.config.batch;
        let made_here = if self.config.raw { 0 } else { batch };
        resize(&mut made.image, made_here * self.channels * volume)?;
        resize(&mut made.target, made_here * volume)?;
        made.raw.resize_with(batch - made_here, RawPatch::default);
        made.cases.clear();
        let mut images = made.image.chunks_exact_mut(self.channels * volume).zip(made.target.chunks_exact_mut(volume));
        for position in 0..batch {
            let index = place.iteration * batch as u32 + position as u32;
            let item = Item { seed: self.config.seed, epoch: place.epoch, index };
            let chosen = self.sampler.draw(&self.cases, position, item)?;
            let case = &*self.cases[chosen.case];
            let parameters = match self.augmenter.config() {
                Some(config) => Parameters::draw(config, case.channels(), self.config.previous.len(), item),
                None => Parameters::default(),
            };
            match (images.next(), made.raw.get_mut(position)) {
                (Some((image, target)), _) => {
                    self.augmenter.run(case, chosen.lower, &parameters, scratch, image, target)?;
                }
                (None, Some(raw)) => self.augmenter.read(case, chosen.lower, parameters, raw)?,
                (None, None) => return Err(Error::shape("batch", "no room for a patch")),
            }
            made.cases.push(chosen.case);
        }
        Ok(())
    }
}

/// To `n` elements of any value.
fn resize<T: Clone + Default>(v: &mut Vec<T>, n: usize) -> Result<()> {
    let missing = n.saturating_sub(v.len());
    if v.try_reserve_exact(missing).is_err() {
        let asked = n.saturating_mul(size_of::<T>());
        return Err(Error::OutOfMemory { what: "a batch".into(), asked, in_use: 0, limit: usize::MAX });
    }
    v.resize(n, T::default());
    Ok(())
}
