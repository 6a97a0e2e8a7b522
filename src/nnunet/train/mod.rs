//! Training: nnU-Net's `nnUNetTrainer` and STU-Net's trainers, on any source of batches.
//!
//! A step is a pure function of the parameters and of a batch, a batch of seed, epoch and number: a training that was
//! stopped anywhere and goes on ends with the same bytes as one that was not.

mod data;
mod files;
mod input;
mod log;
mod memory;
mod metrics;
mod options;
mod plan;
mod pretrained;
mod report;
mod step;

use std::path::{Path, PathBuf};
use std::time::Instant;

use self::files::Files;
use self::input::{Input, Room};
use self::log::{Log, seconds_since_1970};
use self::memory::Decision;
use self::metrics::{Counts, nan_mean};
use self::step::Pass;
use super::checkpoint::{Checkpoint, Logged, Origin, TrainingState};
use super::loader::{Batch, Loader};
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::models::{Network, NetworkConfig};
use crate::nn::{GradScaler, Optimizer, ParamSource, PolyLr, Scheme};
use crate::tensor::Device;

pub use data::Task;
pub use files::Start;
pub use memory::Recompute;
pub use options::TrainOptions;
pub use plan::{NetworkChoice, TrainingPlan};
pub use report::{EpochReport, StepReport};

/// Where batches come from: any number of epochs of them, each the same whenever it is asked for.
pub trait Batches: Send {
    /// The batch that comes next is number `iteration` of `epoch`.
    ///
    /// # Errors
    /// Whatever is wrong with the source.
    fn seek(&mut self, epoch: u32, iteration: u32) -> Result<()>;

    /// The next batch.
    ///
    /// # Errors
    /// Whatever is wrong with the source.
    fn batch(&mut self) -> Result<Batch>;
}

impl Batches for Loader {
    fn seek(&mut self, epoch: u32, iteration: u32) -> Result<()> {
        Loader::seek(self, epoch, iteration);
        Ok(())
    }

    fn batch(&mut self) -> Result<Batch> {
        self.next()
    }
}

/// What a training learns from.
pub struct Data {
    /// Batches of its steps.
    pub train: Box<dyn Batches>,
    /// Batches that every epoch is validated on.
    pub val: Box<dyn Batches>,
    /// Names of the cases of `train`, which batches give the numbers of.
    pub cases: Vec<String>,
}

/// Wall seconds after which a checkpoint is written at the end of an epoch, however few epochs there were: those of a large
/// network on a processor take hours.
const SAVE_SECONDS: u64 = 900;

/// A training.
pub struct Trainer {
    net: Network,
    optimizer: Optimizer,
    state: TrainingState,
    plan: TrainingPlan,
    options: TrainOptions,
    pass: Pass,
    memory: Decision,
    device: Device,
    data: Data,
    room: Room,
    /// The batch of the next step, sent to a card.
    ahead: Option<Result<Input>>,
    files: Files,
    log: Log,
    saved: Instant,
    epoch_began: f64,
    seconds_of_steps: f64,
    seen: Seen,
}

/// What an epoch saw so far, beside its losses.
#[derive(Default)]
struct Seen {
    waiting: f64,
    norm: f64,
    clipped: u32,
    skipped: u32,
}

impl Trainer {
    /// Begins a training, or goes on with one, in the fold's folder `folder` (nnU-Net's `fold_0`), which is made if need be.
    ///
    /// # Errors
    /// [`Error::Usage`] for options out of range, for a new training in a folder that holds one, and when there is none to go
    /// on with; those of [`TrainingPlan::network`]; [`Error::Model`] when a checkpoint or pre-trained weights do not fit;
    /// [`Error::Io`]; [`Error::OutOfMemory`], before anything is written when a step would not fit the device.
    pub fn new(
        plan: TrainingPlan,
        options: TrainOptions,
        start: Start,
        folder: &Path,
        fold: &str,
        data: Data,
        device: &Device,
    ) -> Result<Self> {
        options.validate()?;
        let config = plan.network(options.network)?;
        let files = Files::find(folder, start)?;
        let pass = Pass::new(&plan, &options)?;
        pass.check(device)?;
        let augment = options.augmentation_on(&plan, device)?;
        let origin = Origin {
            trainer: options.trainer_name(),
            configuration: plan.configuration.clone(),
            fold: fold.into(),
            plans: plan.plans.clone(),
            dataset: plan.dataset.clone(),
            mirror_axes: mirror_axes(&plan, &options),
        };
        let mut state = TrainingState::new(options.seed, origin);
        state.schedule.initial = options.initial_rate();
        state.settings = options.settings(&plan);
        state.scaler = pass.scaler(device);
        let scheme = match options.network {
            NetworkChoice::Planned => Scheme::He,
            _ => Scheme::Torch,
        };
        let initial = config.initial(options.seed, scheme);
        let checkpoint = files.resumed().map(Checkpoint::open).transpose()?;
        if let Some(checkpoint) = &checkpoint {
            check_settings(checkpoint.state(), &state)?;
        }
        let memory = memory::decide(
            options.recompute,
            checkpoint.as_ref().and_then(|c| recomputed(c.state())),
            device.room()?,
            |on| memory::step_bytes(&config, &pass, plan.patch, plan.batch, augment.as_ref(), on, device),
        )?;
        state.settings.insert(RECOMPUTE.into(), memory.recompute.into());
        let (net, optimizer) = match (checkpoint, &options.pretrained) {
            (Some(checkpoint), _) => {
                if let Some(warning) = checkpoint.warning() {
                    tracing::warn!("{warning}");
                }
                let (net, optimizer, found) = resumed(&config, &checkpoint, device)?;
                // A file of nnU-Net knows no seed.
                let seed = if found.settings.is_empty() { state.seed } else { found.seed };
                let scaler = state.scaler.map(|new: GradScaler| found.scaler.unwrap_or(new));
                state = TrainingState { origin: state.origin, settings: state.settings, seed, scaler, ..found };
                if let Some(lr) = options.learning_rate {
                    state.schedule.initial = lr;
                }
                (net, optimizer)
            }
            (None, Some(path)) => {
                let source = pretrained::Pretrained::open(path, &config, initial)?;
                tracing::info!("pre-trained weights from {}", source.file().display());
                (build(&config, &source, device)?, Optimizer::nnunet())
            }
            (None, None) => (build(&config, &initial, device)?, Optimizer::nnunet()),
        };
        if let Some(epochs) = options.epochs {
            state.schedule = PolyLr { epochs, ..state.schedule };
        } else if files.is_final() {
            // Files of PyTorch do not tell how many epochs there were to be; a final one says that they are over.
            state.schedule.epochs = state.epoch;
        }
        let net = net.recomputing(memory.recompute);
        let mut room = Room::default();
        room.reserve(augment.as_ref(), config.in_channels(), device)?;
        files.make(start)?;
        files.describe(&plan)?;
        let mut out = Self {
            net,
            optimizer,
            log: Log::begin(folder)?,
            pass,
            memory,
            state,
            device: device.clone(),
            data,
            room,
            ahead: None,
            files,
            plan,
            options,
            saved: Instant::now(),
            epoch_began: seconds_since_1970(),
            seconds_of_steps: 0.0,
            seen: Seen::default(),
        };
        for line in out.summary() {
            out.log.line(&line)?;
        }
        out.files.debug(&out.options, &config, &out.state)?;
        out.data.train.seek(out.state.epoch, out.iteration())?;
        Ok(out)
    }

    /// What is trained, for people, one line each.
    #[must_use]
    pub fn summary(&self) -> Vec<String> {
        let (plan, state) = (&self.plan, &self.state);
        let mut out = vec![
            format!("stunet {}: research software, not a medical device", env!("CARGO_PKG_VERSION")),
            format!("{} {} {} fold {}", plan.dataset_name, plan.plans_name, plan.configuration, state.origin.fold),
            format!("{}: {} parameters on {}", self.net.name(), self.net.parameter_count(), self.device.name()),
            format!("patch {:?}, batch {}, seed {}", plan.patch, plan.batch, state.seed),
            self.memory.line(),
        ];
        if state.epoch > 0 || !state.losses.is_empty() {
            out.push(format!("goes on with epoch {} after {} steps of it", state.epoch, state.losses.len()));
        }
        out
    }

    /// The fold's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.files.folder()
    }

    /// Where the training stands.
    #[must_use]
    pub fn state(&self) -> &TrainingState {
        &self.state
    }

    /// The network as it is now.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.net
    }

    /// Steps of the present epoch that are over.
    fn iteration(&self) -> u32 {
        u32::try_from(self.state.losses.len()).unwrap_or(u32::MAX)
    }

    /// Whether all epochs are over.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.state.epoch >= self.state.schedule.epochs
    }

    /// One step with the next batch.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming epoch, step and cases when the loss or a gradient is NaN or infinite: the parameters are
    /// those before the step then. In float16 on a card gradients that overflow are no error but a step that is skipped, as
    /// long as the loss is scaled. Errors of the batches; [`Error::OutOfMemory`].
    pub fn step(&mut self) -> Result<StepReport> {
        let clock = Instant::now();
        let input = match self.ahead.take() {
            Some(ahead) => ahead?,
            None => self.room.next(&mut *self.data.train, &self.device)?,
        };
        let (batch, seconds_waiting) = (&input.batch, input.seconds_waiting);
        let rate = self.state.schedule.at(self.state.epoch);
        let at = (self.state.epoch, self.iteration());
        let place = || {
            let (epoch, step) = at;
            let name = |i: &usize| self.data.cases.get(*i).cloned().unwrap_or_else(|| i.to_string());
            let cases: Vec<String> = batch.cases.iter().map(name).collect();
            format!("epoch {epoch}, step {step}, cases {}", cases.join(", "))
        };
        let named = |e: Error| match e {
            Error::NotFinite { what } => Error::NotFinite { what: format!("{}: {what}", place()) },
            Error::Shape { op, what } => Error::Shape { op, what: format!("{}: {what}", place()) },
            e => e,
        };
        let loss_scale = self.state.scaler.map(|s| s.scale());
        // The next batch is fetched and sent while a card works on this one; the processor has its hands full.
        let is_last = self.iteration() + 1 >= self.options.iterations && at.0 + 1 >= self.state.schedule.epochs;
        let (device, from, room, ahead) = (&self.device, &mut self.data.train, &mut self.room, &mut self.ahead);
        let mut meanwhile = || {
            if !device.is_cpu() && !is_last {
                *ahead = Some(room.next(&mut **from, device));
            }
        };
        let scaler = self.state.scaler.as_mut();
        let (net, optimizer) = (&mut self.net, &mut self.optimizer);
        let done = self.pass.train(net, optimizer, &input, rate, scaler, device, &mut meanwhile);
        let (loss, norms) = done.map_err(named)?;
        self.state.losses.push(loss);
        self.seen.waiting += seconds_waiting;
        let clipped = norms.is_some_and(|n| n.scale < 1.0);
        match (norms, loss_scale) {
            (None, Some(scale)) => {
                self.seen.skipped += 1;
                let what = "is skipped: gradients overflow at loss scale";
                self.log.line(&format!("step {} {what} {scale}, which goes back", at.1))?;
            }
            (norms, _) => {
                self.state.step += 1;
                self.seen.norm = norms.map_or(self.seen.norm, |n| self.seen.norm.max(n.gradient));
                self.seen.clipped += u32::from(clipped);
            }
        }
        Ok(StepReport {
            loss,
            gradient_norm: norms.map_or(f64::INFINITY, |n| n.gradient),
            clipped,
            skipped: norms.is_none(),
            loss_scale,
            seconds_waiting,
            seconds: clock.elapsed().as_secs_f64(),
        })
    }

    /// What is left of the present epoch: steps, validation, log, checkpoints.
    ///
    /// # Errors
    /// As [`Trainer::step`]; [`Error::Cancelled`], after which [`Trainer::save`] keeps the steps that are over;
    /// [`Error::Io`].
    pub fn epoch(&mut self, progress: &mut dyn Progress) -> Result<EpochReport> {
        let epoch = self.state.epoch;
        let learning_rate = self.state.schedule.at(epoch);
        let total = (self.options.iterations + self.options.val_iterations) as usize;
        if self.iteration() == 0 {
            self.epoch_began = seconds_since_1970();
            self.seconds_of_steps = 0.0;
            self.device.reset_peak();
            self.log.line(&format!("Epoch {epoch}"))?;
            self.log.line(&format!("Current learning rate: {learning_rate}"))?;
        }
        tell(progress, Event::Stage("training"))?;
        while self.iteration() < self.options.iterations {
            tell(progress, Event::Steps { epoch, done: self.iteration() as usize, total })?;
            let clock = Instant::now();
            let stepped = self.step();
            self.seconds_of_steps += clock.elapsed().as_secs_f64();
            stepped?;
        }
        let clock = Instant::now();
        let (mut counts, mut losses) = (Counts::default(), Vec::new());
        tell(progress, Event::Stage("validation"))?;
        self.data.val.seek(epoch, 0)?;
        for i in 0..self.options.val_iterations {
            tell(progress, Event::Steps { epoch, done: (self.options.iterations + i) as usize, total })?;
            let waiting = Instant::now();
            let batch = self.data.val.batch()?;
            self.seen.waiting += waiting.elapsed().as_secs_f64();
            let (loss, found) = self.pass.validate(&self.net, &batch, &self.device)?;
            losses.push(loss);
            counts.add(&found);
        }
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
        let dice = counts.dice();
        let seen = std::mem::take(&mut self.seen);
        let mut report = EpochReport {
            epoch,
            learning_rate,
            train_loss: mean(&self.state.losses),
            val_loss: (!losses.is_empty()).then(|| mean(&losses)),
            mean_fg_dice: Logged(nan_mean(&dice)),
            ema_fg_dice: Logged(f64::NAN),
            dice_per_class_or_region: dice.into_iter().map(Logged).collect(),
            is_best: false,
            max_gradient_norm: seen.norm,
            clipped: seen.clipped,
            skipped: seen.skipped,
            loss_scale: self.state.scaler.map(|s| s.scale()),
            seconds: self.seconds_of_steps + clock.elapsed().as_secs_f64(),
            seconds_waiting: seen.waiting,
            peak_tensor_bytes: self.device.memory().peak,
        };
        self.close_epoch(&mut report)?;
        Ok(report)
    }

    /// Logs the epoch and writes the checkpoints that are due.
    fn close_epoch(&mut self, report: &mut EpochReport) -> Result<()> {
        let logs = &mut self.state.logs;
        let before = logs.ema_fg_dice.iter().rev().map(|v| v.0).find(|v| v.is_finite());
        // nnU-Net's average stays NaN from the first epoch on whose patches hold no foreground; ours passes over it.
        let new = report.mean_fg_dice.0;
        let ema = match before {
            Some(old) if new.is_finite() => 0.9 * old + 0.1 * new,
            Some(old) => old,
            None => new,
        };
        report.ema_fg_dice = Logged(ema);
        report.is_best = ema.is_finite() && self.state.best_ema.is_none_or(|best| ema > best);
        logs.train_losses.push(Logged(report.train_loss));
        logs.val_losses.push(Logged(report.val_loss.unwrap_or(f64::NAN)));
        logs.mean_fg_dice.push(report.mean_fg_dice);
        logs.ema_fg_dice.push(report.ema_fg_dice);
        logs.dice_per_class_or_region.push(report.dice_per_class_or_region.clone());
        logs.lrs.push(Logged(report.learning_rate));
        logs.epoch_start_timestamps.push(Logged(self.epoch_began));
        logs.epoch_end_timestamps.push(Logged(seconds_since_1970()));
        self.state.losses.clear();
        self.state.epoch += 1;
        if report.is_best {
            self.state.best_ema = Some(ema);
        }
        for line in report.lines() {
            self.log.line(&line)?;
        }
        self.log.metrics(report)?;
        // Before the checkpoint that knows of it.
        if report.is_best {
            self.files.write_best(&self.net, &self.optimizer, &self.state)?;
        }
        if !self.is_finished() {
            let is_due = self.state.epoch.is_multiple_of(self.options.save_every);
            if is_due || self.saved.elapsed().as_secs() >= SAVE_SECONDS {
                self.save()?;
                self.files.write_latest(&self.net, &self.optimizer, &self.state)?;
            }
        }
        Ok(())
    }

    /// Writes the checkpoint that a training goes on from, to the bit, in the middle of an epoch too.
    ///
    /// # Errors
    /// Those of [`checkpoint::write`](super::checkpoint::write).
    pub fn save(&mut self) -> Result<()> {
        self.files.write_own(&self.net, &self.optimizer, &self.state)?;
        self.saved = Instant::now();
        Ok(())
    }

    /// All epochs that are left; `after` each is called. Should the caller cancel, what is done is saved first.
    ///
    /// # Errors
    /// Those of [`Trainer::epoch`] and of `after`. After [`Error::NotFinite`] the last checkpoint is as it was.
    pub fn run(
        &mut self,
        progress: &mut dyn Progress,
        after: &mut dyn FnMut(&Self, &EpochReport) -> Result<()>,
    ) -> Result<()> {
        while !self.is_finished() {
            match self.epoch(progress) {
                Ok(report) => after(self, &report)?,
                Err(Error::Cancelled) => {
                    self.save()?;
                    self.log.line("interrupted: what is done is saved")?;
                    return Err(Error::Cancelled);
                }
                Err(e) => {
                    self.log.line(&format!("stopped: {e}"))?;
                    return Err(e);
                }
            }
        }
        self.files.write_final(&self.net, &self.optimizer, &self.state)?;
        self.log.line("Training done.")
    }

    /// Writes a line to the text log.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn note(&mut self, line: &str) -> Result<()> {
        self.log.line(line)
    }
}

/// The setting that says whether stages run again on the way back.
const RECOMPUTE: &str = "recompute";

/// Whether the training of a state did that; one from before that was asked did not. nnU-Net's files know nothing of it.
fn recomputed(state: &TrainingState) -> Option<bool> {
    let known = !state.settings.is_empty();
    known.then(|| state.settings.get(RECOMPUTE).and_then(serde_json::Value::as_bool).unwrap_or(false))
}

/// A training goes on with the same numbers only by the same rules. Recomputation may be asked for where there is less memory
/// than before: it adds some gradients in another order.
fn check_settings(found: &TrainingState, now: &TrainingState) -> Result<()> {
    for (name, value) in found.settings.iter().filter(|(name, _)| *name != RECOMPUTE) {
        let here = now.settings.get(name);
        if here != Some(value) {
            let here = here.map_or("none".into(), |v| v.to_string());
            let what =
                format!("{name} is {here} here and {value} in the checkpoint: go on with the same, or --overwrite");
            return Err(Error::usage(what));
        }
    }
    Ok(())
}

fn build(config: &NetworkConfig, source: &(dyn ParamSource + Sync), device: &Device) -> Result<Network> {
    device.install(|| config.build(source, device))
}

/// The network of a checkpoint, and where its training stood.
fn resumed(
    config: &NetworkConfig,
    checkpoint: &Checkpoint,
    device: &Device,
) -> Result<(Network, Optimizer, TrainingState)> {
    let mut net = build(config, checkpoint, device)?;
    let optimizer = checkpoint.restore(&mut net)?;
    Ok((net, optimizer, checkpoint.state().clone()))
}

/// The axes that patches are mirrored along, and that predictions may be; `None` without any.
fn mirror_axes(plan: &TrainingPlan, options: &TrainOptions) -> Option<Vec<usize>> {
    if !options.augmentation {
        return None;
    }
    // nnU-Net counts the axes of a 2D patch from 0.
    let all: Vec<usize> = if plan.planar { vec![0, 1] } else { vec![0, 1, 2] };
    let axes = options.mirror_axes.clone().unwrap_or(all);
    (!axes.is_empty()).then_some(axes)
}

/// Bytes of tensors that steps of a training take at their peak on `device`, those of the network and its optimizer among them,
/// with recomputation or without. The step is rehearsed, not run: on the processor that takes memory for gradients that are
/// added up and little else.
///
/// # Errors
/// [`Error::Usage`] for options out of range; those of [`TrainingPlan::network`]; [`Error::Unsupported`].
pub fn step_bytes(plan: &TrainingPlan, options: &TrainOptions, recompute: bool, device: &Device) -> Result<usize> {
    options.validate()?;
    let (config, pass) = (plan.network(options.network)?, Pass::new(plan, options)?);
    pass.check(device)?;
    let augment = options.augmentation_on(plan, device)?;
    memory::step_bytes(&config, &pass, plan.patch, plan.batch, augment.as_ref(), recompute, device)
}

/// The fold's folder of a training below `results`, the folder of a data set in nnU-Net's `nnUNet_results`.
#[must_use]
pub fn fold_folder(results: &Path, plan: &TrainingPlan, options: &TrainOptions, fold: &str) -> PathBuf {
    model_folder(results, plan, options, &plan.configuration).join(format!("fold_{fold}"))
}

/// The folder of all folds of a configuration.
fn model_folder(results: &Path, plan: &TrainingPlan, options: &TrainOptions, configuration: &str) -> PathBuf {
    results.join(format!("{}__{}__{configuration}", options.trainer_name(), plan.plans_name))
}

/// Where the first stage of a cascade leaves what the configuration `next` takes as input.
fn stage_folder(results: &Path, plan: &TrainingPlan, options: &TrainOptions, first: &str, next: &str) -> PathBuf {
    model_folder(results, plan, options, first).join("predicted_next_stage").join(next)
}
