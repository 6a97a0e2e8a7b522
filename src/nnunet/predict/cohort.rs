//! Many images, one after the other through the network: while it runs on one, the next is read and preprocessed and the
//! one before is finished and stored, as far as there is memory for several at a time.
//!
//! The stages are threads of their own that hand each other one case at a time; what they compute in parallel runs on
//! threads of their own too, never on the network's, so that none of these ever waits for a stage. Results are those of
//! one image after the other, to the byte.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, ScopedJoinHandle};
use std::time::Instant;

use super::{Needs, Prediction, Predictor, Prepared, Segmented, Standing};
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::{Geometry, Image, Segmentation};
use crate::nnunet::preprocess::NEEDS_PREVIOUS;
use crate::tensor::Device;

/// Where the images of a cohort come from. Cases are asked for in rising order, from another thread ahead of the network.
pub trait Source: Sync {
    /// Number of cases.
    fn cases(&self) -> usize;

    /// The grid of a case's image, by which memory is planned before voxels are read; `None` for a case that is to be left
    /// out.
    ///
    /// # Errors
    /// What keeps the case from being predicted; [`Sink::put`] gets it.
    fn grid(&self, case: usize) -> Result<Option<Geometry>>;

    /// The image of a case that was not left out, on that grid.
    ///
    /// # Errors
    /// As [`Source::grid`].
    fn read(&self, case: usize) -> Result<Image>;

    /// What the stage before predicted of a case, on the image's grid: asked for where the model is the second stage of a
    /// cascade.
    ///
    /// # Errors
    /// As [`Source::grid`].
    fn previous(&self, case: usize) -> Result<Segmentation> {
        Err(Error::usage(format!("case {case}: {NEEDS_PREVIOUS}")))
    }
}

/// Where the predictions of a cohort go.
pub trait Sink: Send {
    /// Takes what became of a case, `None` if it was left out. Called once for every case in rising order, from another
    /// thread while the network runs on.
    ///
    /// # Errors
    /// What ends the whole run: what only this case suffers from is the sink's own business.
    fn put(&mut self, case: usize, outcome: Result<Option<Finished>>) -> Result<()>;
}

/// A predicted case.
#[derive(Debug)]
#[non_exhaustive]
pub struct Finished {
    /// What was predicted from.
    pub image: Image,
    /// What came out.
    pub prediction: Prediction,
}

impl Predictor {
    /// Segments all images of `source` and hands the results to `sink`; `progress` is asked for whom to tell of a case, on
    /// the caller's thread, where the network runs.
    ///
    /// Same results as [`Predictor::predict_with`] for one image after the other. Up to three cases are in memory at a
    /// time: what [`PredictOptions::memory_limit`](super::PredictOptions::memory_limit) leaves no room for waits.
    ///
    /// # Errors
    /// [`Error::Usage`] when an option is out of range, errors of [`Sink::put`], [`Error::Device`] when no thread can be
    /// started, and [`Error::Cancelled`]: then the cases before the cancelled one are with the sink, and nothing is of the
    /// others. Errors of a case go to the sink.
    pub fn predict_all<'p>(
        &mut self,
        source: &dyn Source,
        sink: &mut dyn Sink,
        progress: &mut dyn FnMut(usize) -> Box<dyn Progress + 'p>,
    ) -> Result<()> {
        self.validate()?;
        self.limited(|this| {
            let cohort = Cohort { predictor: this, source, standing: this.standing()? };
            match source.cases() {
                0 => Ok(()),
                // Nothing to run beside: no other threads.
                1 => {
                    let flight = Flight::default();
                    let outcome = cohort.first(&flight, &mut *progress(0));
                    if matches!(outcome, Err(Error::Cancelled)) {
                        return outcome.map(drop);
                    }
                    this.device.install(|| cohort.store(&Mutex::new(sink), 0, outcome))
                }
                _ => cohort.run(sink, progress),
            }
        })
    }
}

/// A case on its way to the network.
enum Loaded<'f> {
    Ready(Ticket<'f>, Box<Input>),
    /// There is no room for it beside others, or there were none: all threads read it when its turn has come.
    Unread(Ticket<'f>),
    LeftOut,
    Failed(Error),
}

/// What the network gets.
struct Input {
    image: Image,
    prepared: Prepared,
    read_seconds: f64,
}

/// A case that the network is done with.
struct Done<'f> {
    _ticket: Ticket<'f>,
    image: Image,
    segmented: Segmented,
}

type Outcome<'f> = Result<Option<Done<'f>>>;

struct Cohort<'a> {
    predictor: &'a Predictor,
    source: &'a dyn Source,
    standing: Standing,
}

impl Cohort<'_> {
    fn run<'p>(&self, sink: &mut dyn Sink, progress: &mut dyn FnMut(usize) -> Box<dyn Progress + 'p>) -> Result<()> {
        let device = &self.predictor.device;
        let flight = Flight { limit: self.predictor.options.memory_limit, ..Flight::default() };
        let [ahead, behind] = [beside(device)?, beside(device)?];
        let sink = Mutex::new(sink);
        thread::scope(|scope| {
            let (flight, sink) = (&flight, &sink);
            let (to_network, loaded) = sync_channel(0);
            let (to_sink, done) = sync_channel::<(usize, Outcome<'_>)>(0);
            // On every way out: whoever waits for room would wait for ever.
            let _stop = Stop(flight);
            let mut caller = progress(0);
            // Before the others start, so that theirs are the later ones.
            let first = device.install(|| self.announced(0, flight));
            start(scope, "stunet-load", move || self.load(&ahead, flight, &to_network))?;
            let writer = start(scope, "stunet-store", move || {
                done.into_iter().try_for_each(|(case, outcome)| behind.install(|| self.store(sink, case, outcome)))
            })?;
            let mut next = Some(first);
            let last = self.source.cases() - 1;
            let mut to_sink = Some(to_sink);
            let mut writer = Some(writer);
            for case in 0..=last {
                if case > 0 {
                    caller = progress(case);
                }
                let outcome = self.predict(next.take(), &loaded, flight, &mut *caller);
                // A line on a screen ends before the sink can say what became of the case.
                caller = Box::new(());
                if matches!(outcome, Err(Error::Cancelled)) {
                    return outcome.map(drop);
                }
                if case < last {
                    // The sink takes no more: it says why below.
                    if to_sink.as_ref().is_none_or(|s| s.send((case, outcome)).is_err()) {
                        break;
                    }
                    continue;
                }
                // Nothing to run beside any more: all threads store the last.
                to_sink = None;
                writer.take().map_or(Ok(()), joined)?;
                device.install(|| self.store(sink, case, outcome))?;
            }
            drop(to_sink);
            writer.map_or(Ok(()), joined)
        })
    }

    /// The only case.
    fn first<'f>(&self, flight: &'f Flight, progress: &mut dyn Progress) -> Outcome<'f> {
        let (_, loaded) = sync_channel(0);
        let case = self.predictor.device.install(|| self.announced(0, flight));
        self.predict(Some(case), &loaded, flight, progress)
    }

    /// What a case needs, if it is to be predicted.
    fn announce(&self, case: usize) -> Result<Option<(Geometry, Needs)>> {
        let Some(geometry) = self.source.grid(case)? else { return Ok(None) };
        let needs = self.predictor.admitted(&geometry, self.predictor.plan.channels.len(), self.standing)?;
        Ok(Some((geometry, needs)))
    }

    /// The first case: there is none to run beside.
    fn announced<'f>(&self, case: usize, flight: &'f Flight) -> Loaded<'f> {
        match self.announce(case) {
            Ok(Some((grid, needs))) => match flight.enter(case, grid, needs) {
                Some((ticket, _)) => Loaded::Unread(ticket),
                None => Loaded::LeftOut,
            },
            Ok(None) => Loaded::LeftOut,
            Err(e) => Loaded::Failed(e),
        }
    }

    /// The thread that goes ahead of the network.
    fn load<'f>(&self, threads: &Device, flight: &'f Flight, to_network: &SyncSender<Loaded<'f>>) {
        for case in 1..self.source.cases() {
            let loaded = match threads.install(|| self.announce(case)) {
                Ok(Some((grid, needs))) => {
                    let Some((ticket, fits)) = flight.enter(case, grid, needs) else { return };
                    if fits {
                        match threads.install(|| self.input(&ticket)) {
                            Ok(input) => Loaded::Ready(ticket, Box::new(input)),
                            Err(e) => Loaded::Failed(e),
                        }
                    } else {
                        Loaded::Unread(ticket)
                    }
                }
                Ok(None) => Loaded::LeftOut,
                Err(e) => Loaded::Failed(e),
            };
            if to_network.send(loaded).is_err() {
                return;
            }
        }
    }

    /// Reads and preprocesses a case.
    fn input(&self, ticket: &Ticket<'_>) -> Result<Input> {
        let clock = Instant::now();
        let image = self.source.read(ticket.case)?;
        let cascaded = self.predictor.plan.previous.is_some();
        let previous = cascaded.then(|| self.source.previous(ticket.case)).transpose()?;
        let read_seconds = clock.elapsed().as_secs_f64();
        let (found, expected) = (&image.geometry, &ticket.grid);
        if found.shape != expected.shape || found.spacing_mm != expected.spacing_mm {
            let of = |g: &Geometry| format!("{:?} voxels of {:?} mm", g.shape, g.spacing_mm);
            return Err(Error::input(format!("{} were announced, {} came", of(expected), of(found))));
        }
        ticket.flight.unless_stopped()?;
        let prepared = self.predictor.prepare(&image, previous.as_ref())?;
        Ok(Input { image, prepared, read_seconds })
    }

    /// Takes a case through the network.
    fn predict<'f>(
        &self,
        case: Option<Loaded<'f>>,
        loaded: &Receiver<Loaded<'f>>,
        flight: &Flight,
        progress: &mut dyn Progress,
    ) -> Outcome<'f> {
        let device = &self.predictor.device;
        tell(progress, Event::Stage("preprocess"))?;
        // Whoever loads ends early only by a panic, which goes on where its thread is joined.
        let case = case.or_else(|| loaded.recv().ok()).ok_or(Error::Cancelled)?;
        let (ticket, input) = match case {
            Loaded::Ready(ticket, input) => (ticket, *input),
            Loaded::Unread(ticket) => {
                flight.wait_for_earlier(ticket.case);
                let input = device.install(|| self.input(&ticket))?;
                (ticket, input)
            }
            Loaded::LeftOut => return Ok(None),
            Loaded::Failed(e) => return Err(e),
        };
        let Input { image, prepared, read_seconds } = input;
        let geometry = image.geometry.clone();
        let mut segmented = device.install(|| self.predictor.segment(&prepared, geometry, &[], progress))?;
        segmented.report.seconds.insert(0, ("read".into(), read_seconds));
        Ok(Some(Done { _ticket: ticket, image, segmented }))
    }

    /// Finishes a case and hands it over.
    fn store(&self, sink: &Mutex<&mut dyn Sink>, case: usize, outcome: Outcome<'_>) -> Result<()> {
        let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(Some(Done { _ticket, image, segmented })) => {
                let finished = self.predictor.finish(segmented);
                sink.put(case, finished.map(|prediction| Some(Finished { image, prediction })))
            }
            Ok(None) => sink.put(case, Ok(None)),
            Err(e) => sink.put(case, Err(e)),
        }
    }
}

/// Threads for a stage beside the network. Few beside one that takes all of the processor's, where more would only keep it
/// waiting; results are the same for any number.
fn beside(device: &Device) -> Result<Device> {
    let share = if device.is_cpu() { 4 } else { 2 };
    Device::cpu_with(Some(device.threads().div_ceil(share)), device.isa())
}

fn start<'s, T: Send + 's>(
    scope: &'s thread::Scope<'s, '_>,
    name: &str,
    f: impl FnOnce() -> T + Send + 's,
) -> Result<ScopedJoinHandle<'s, T>> {
    let started = Builder::new().name(name.into()).spawn_scoped(scope, f);
    started.map_err(|e| Error::Device { what: format!("cannot start a thread: {e}") })
}

fn joined(thread: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The cases in memory, so that together they stay within the limit.
#[derive(Default)]
struct Flight {
    limit: Option<usize>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    cases: Vec<(usize, Needs)>,
    stopped: bool,
}

/// A case's place among those in memory, until it is dropped.
struct Ticket<'f> {
    flight: &'f Flight,
    case: usize,
    grid: Geometry,
}

impl Flight {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a case in, and says whether it may be read now; if not, when all earlier ones have left. Waits while several
    /// are there and it does not fit beside them. `None` when the run was stopped.
    fn enter(&self, case: usize, grid: Geometry, needs: Needs) -> Option<(Ticket<'_>, bool)> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            let fits = !state.cases.is_empty() && self.fit(&state.cases, needs);
            if fits || state.cases.len() < 2 {
                state.cases.push((case, needs));
                return Some((Ticket { flight: self, case, grid }, fits));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One of all cases is with the network, or read where the network waits for it, and another is read beside it.
    fn fit(&self, cases: &[(usize, Needs)], new: Needs) -> bool {
        let Some(limit) = self.limit else { return true };
        let all = || cases.iter().map(|(_, n)| n).chain([&new]);
        let most = |of: fn(&Needs) -> usize| all().map(of).max().unwrap_or(0);
        let kept = all().fold(new.held, |sum, n| sum.saturating_add(n.images).saturating_add(n.result));
        let network = most(|n| n.network.max(n.preprocessing));
        kept.saturating_add(network).saturating_add(most(|n| n.preprocessing)) <= limit
    }

    fn wait_for_earlier(&self, case: usize) {
        let mut state = self.lock();
        while state.cases.iter().any(|(c, _)| *c < case) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn unless_stopped(&self) -> Result<()> {
        if self.lock().stopped { Err(Error::Cancelled) } else { Ok(()) }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.flight.lock().cases.retain(|(c, _)| *c != self.case);
        self.flight.changed.notify_all();
    }
}

/// Tells those who wait for room that there is nothing more to do.
struct Stop<'f>(&'f Flight);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.lock().stopped = true;
        self.0.changed.notify_all();
    }
}
