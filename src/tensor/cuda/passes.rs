//! Launches of a computation that repeats: noted, and where they come again exactly as before, asked for as one graph.
//!
//! A graph is never trusted to be what is wanted: every launch of a pass is held against the recorded one, byte for byte of
//! its parameters, before the graph runs in their place. Another address, shape or precision is another launch, and then
//! everything is launched as it is asked for.

use std::thread::ThreadId;

use super::{Ask, Driver, Graph, Work};
use crate::error::{Error, Result};

/// Fewer launches than this are not worth a graph.
const LEAST: usize = 8;
/// More launches than this are not noted.
const MOST: usize = 4096;
/// Computations that are known; the one that was used longest ago goes.
const MAX_KNOWN: usize = 32;

/// A computation and how its passes begin.
#[derive(Debug)]
struct Known {
    key: Vec<usize>,
    /// Work of the last pass that was noted; with a graph, what the graph does.
    work: Vec<Work>,
    graph: Option<Graph>,
}

#[derive(Debug)]
enum Mode {
    /// Work is issued as it is asked for and noted.
    Note(Vec<Work>),
    /// As the graph has it so far: so much work is held back.
    Hold(usize),
    /// Work is issued as it is asked for.
    Plain,
}

/// A pass under way.
#[derive(Debug)]
struct Run {
    key: Vec<usize>,
    /// Work of other threads is no part of it.
    thread: ThreadId,
    mode: Mode,
    /// Its graph is waited for also where the card has nothing else to do.
    patient: bool,
}

/// The passes of a card.
#[derive(Debug, Default)]
pub(super) struct Passes {
    run: Option<Run>,
    /// Most recently used last.
    known: Vec<Known>,
    /// The driver makes no graphs.
    refused: bool,
    /// Of work that was held back, and failed when nobody could be told.
    failure: Option<Error>,
}

impl Passes {
    /// Begins a pass, unless one is under way: then false.
    pub(super) fn enter(&mut self, key: &[usize], patient: bool) -> bool {
        if self.run.is_some() {
            return false;
        }
        let at = self.known.iter().position(|k| k.key == key);
        let graph = at.is_some_and(|at| {
            self.known[at..].rotate_left(1);
            self.known.last().is_some_and(|k| k.graph.is_some())
        });
        let mode = match graph {
            _ if self.refused => Mode::Plain,
            true => Mode::Hold(0),
            false => Mode::Note(Vec::new()),
        };
        self.run = Some(Run { key: key.to_vec(), thread: std::thread::current().id(), mode, patient });
        true
    }

    /// Issues work, or holds it back.
    pub(super) fn ask(&mut self, ask: Ask<'_>, driver: &dyn Driver) -> Result<()> {
        let own = self.run.as_ref().is_some_and(|r| r.thread == std::thread::current().id());
        if !own {
            self.flush(driver)?;
            return ask.issue(driver);
        }
        self.check()?;
        let Some(Run { mode, patient, .. }) = &mut self.run else { return ask.issue(driver) };
        match mode {
            Mode::Plain => ask.issue(driver),
            Mode::Note(work) => {
                ask.issue(driver)?;
                if work.len() < MOST {
                    work.push(ask.into());
                }
                Ok(())
            }
            // A card with nothing to do begins with the first launch, before the last is known.
            Mode::Hold(0) if !*patient && !driver.busy().unwrap_or(false) => {
                *mode = Mode::Plain;
                ask.issue(driver)
            }
            Mode::Hold(held) => {
                let Some(known) = self.known.last_mut() else { return ask.issue(driver) };
                if known.work.get(*held).is_some_and(|w| ask.is(w)) {
                    *held += 1;
                    return if *held == known.work.len() { self.replay(driver) } else { Ok(()) };
                }
                // Another computation than before: noted from its beginning, as far as that was the same. What it was
                // before is forgotten, so that what changed once, a learning rate or a loss scale, is not taken for what
                // changes every time: then the graph would end before it for good.
                let mut same = std::mem::take(&mut known.work);
                same.truncate(*held);
                *mode = Mode::Note(same);
                self.forget(driver);
                let Some(Run { mode: Mode::Note(work), .. }) = &mut self.run else { return Ok(()) };
                work.iter().try_for_each(|w| w.ask().issue(driver))?;
                ask.issue(driver)?;
                work.push(ask.into());
                Ok(())
            }
        }
    }

    /// Runs the graph in the place of all that is held back.
    fn replay(&mut self, driver: &dyn Driver) -> Result<()> {
        if let Some(run) = &mut self.run {
            run.mode = Mode::Plain;
        }
        let Some(known) = self.known.last() else { return Ok(()) };
        match known.graph.map(|g| driver.replay(g)) {
            Some(Ok(())) => Ok(()),
            _ => {
                let result = known.work.iter().try_for_each(|w| w.ask().issue(driver));
                self.forget(driver);
                result
            }
        }
    }

    /// Forgets the graph of the computation under way.
    fn forget(&mut self, driver: &dyn Driver) {
        if let Some(graph) = self.known.last_mut().and_then(|k| k.graph.take()) {
            // What it costs is memory of the driver's, until the context goes.
            let _ = driver.forget(graph);
        }
    }

    /// What failed when nobody could be told.
    fn check(&mut self) -> Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Issues what is held back: something comes that is no launch, or another thread's.
    pub(super) fn flush(&mut self, driver: &dyn Driver) -> Result<()> {
        self.check()?;
        let Some(Run { mode, key, thread, .. }) = &mut self.run else { return Ok(()) };
        match mode {
            Mode::Plain | Mode::Hold(0) => Ok(()),
            // Another thread does not end what this one repeats.
            Mode::Note(work) if work.is_empty() || *thread != std::thread::current().id() => Ok(()),
            Mode::Note(work) => {
                let work = std::mem::take(work);
                let key = key.clone();
                *mode = Mode::Plain;
                self.learn(key, work, driver);
                Ok(())
            }
            Mode::Hold(held) => {
                let held = std::mem::replace(held, 0);
                *mode = Mode::Plain;
                let Some(known) = self.known.last() else { return Ok(()) };
                known.work[..held].iter().try_for_each(|w| w.ask().issue(driver))
            }
        }
    }

    /// Ends the pass.
    pub(super) fn leave(&mut self, driver: &dyn Driver) {
        let failure = self.flush(driver).err();
        self.failure = failure;
        self.run = None;
    }

    /// Keeps how a pass began, and what it has in common with the one before as a graph.
    fn learn(&mut self, key: Vec<usize>, work: Vec<Work>, driver: &dyn Driver) {
        let Some(known) = self.known.iter_mut().find(|k| k.key == key) else {
            if self.known.len() >= MAX_KNOWN
                && let Some(graph) = self.known.remove(0).graph
            {
                let _ = driver.forget(graph);
            }
            self.known.push(Known { key, work, graph: None });
            return;
        };
        let same = work.iter().zip(&known.work).take_while(|(a, b)| a.ask().is(b)).count();
        // A pass that was cut short, by what came only once, says nothing of what follows.
        let goes_on = same == known.work.len() && same < work.len();
        known.work = work;
        if same < LEAST || goes_on {
            return;
        }
        known.work.truncate(same);
        match driver.record(&known.work) {
            Ok(graph) => known.graph = Some(graph),
            Err(_) => {
                self.refused = true;
                self.known.clear();
            }
        }
    }

    /// Gives the graphs back.
    pub(super) fn release(&mut self, driver: &dyn Driver) {
        for graph in self.known.drain(..).filter_map(|k| k.graph) {
            // Nobody can be told, and the context frees what is left.
            let _ = driver.forget(graph);
        }
    }
}
