//! Batches under way between the threads that make them and the one that asks for them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{Made, Maker};
use crate::error::{Error, Result};
use crate::nnunet::augment::Scratch;

/// A batch of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) epoch: u32,
    pub(super) iteration: u32,
}

pub(super) struct Queue {
    maker: Maker,
    state: Mutex<State>,
    /// A batch is there.
    made: Condvar,
    /// There is something to make, or nothing any more.
    wanted: Condvar,
}

struct State {
    /// The batch that is handed out next.
    next: Place,
    /// The one that is begun next, and how many have been begun and not yet handed out.
    begin: Place,
    open: usize,
    /// Counts the jumps: what was begun before one is of no use after it.
    jump: u64,
    ready: BTreeMap<Place, Result<Made>>,
    /// Memory of batches that came back.
    spare: Vec<Made>,
    stopped: bool,
}

impl Queue {
    pub(super) fn new(maker: Maker) -> Self {
        let start = Place { epoch: 0, iteration: 0 };
        let state = State {
            next: start,
            begin: start,
            open: 0,
            jump: 0,
            ready: BTreeMap::new(),
            spare: Vec::new(),
            stopped: false,
        };
        Self { maker, state: Mutex::new(state), made: Condvar::new(), wanted: Condvar::new() }
    }

    pub(super) fn maker(&self) -> &Maker {
        &self.maker
    }

    /// No state is left half changed by a panic: none can happen while it is locked.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn after(&self, place: Place) -> Place {
        if place.iteration + 1 < self.maker.config.iterations {
            return Place { iteration: place.iteration + 1, ..place };
        }
        Place { epoch: place.epoch.wrapping_add(1), iteration: 0 }
    }

    /// What a thread does until it is told to stop.
    pub(super) fn work(&self) {
        let mut scratch = Scratch::default();
        while let Some((place, jump, mut made)) = self.begin() {
            let run = catch_unwind(AssertUnwindSafe(|| self.maker.make(place, &mut scratch, &mut made)));
            let result = run.unwrap_or_else(|panic| {
                scratch = Scratch::default();
                Err(panicked(place, &*panic))
            });
            let mut state = self.lock();
            if jump == state.jump {
                state.ready.insert(place, result.map(|()| made));
                self.made.notify_all();
            } else {
                state.spare.push(made);
            }
        }
    }

    /// Waits for a batch to make.
    fn begin(&self) -> Option<(Place, u64, Made)> {
        let mut state = self.lock();
        while !state.stopped && state.open >= self.maker.config.ahead {
            state = self.wanted.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped {
            return None;
        }
        let place = state.begin;
        state.begin = self.after(place);
        state.open += 1;
        Some((place, state.jump, state.spare.pop().unwrap_or_default()))
    }

    pub(super) fn next(&self) -> Result<Made> {
        let mut state = self.lock();
        loop {
            let place = state.next;
            if let Some(result) = state.ready.remove(&place) {
                state.next = self.after(place);
                state.open -= 1;
                self.wanted.notify_one();
                return result;
            }
            state = self.made.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn seek(&self, place: Place) {
        let mut state = self.lock();
        if place == state.next {
            return;
        }
        let old = std::mem::take(&mut state.ready);
        state.spare.extend(old.into_values().flatten());
        (state.next, state.begin, state.open) = (place, place, 0);
        state.jump += 1;
        self.wanted.notify_all();
    }

    pub(super) fn take_back(&self, made: Made) {
        let mut state = self.lock();
        // No more than can be used at a time.
        if state.spare.len() < self.maker.config.ahead {
            state.spare.push(made);
        }
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.wanted.notify_all();
    }
}

fn panicked(place: Place, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let Place { epoch, iteration } = place;
    let what = format!("the loader at epoch {epoch}, iteration {iteration}: {}", text.unwrap_or("a panic"));
    Error::Device { what }
}
