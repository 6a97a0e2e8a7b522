//! A card as operations see it: its driver, with uploads that do not wait, and launches that repeat as one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::passes::Passes;
use super::staging::Staging;
use super::{Ask, Driver, Findings, Launch, Memory, Module, Parameter};
use crate::error::{Error, Result};

/// A driver with what stands before it.
#[derive(Debug)]
pub(in crate::tensor) struct Queue {
    driver: Arc<dyn Driver>,
    staging: Mutex<Staging>,
    passes: Mutex<Passes>,
}

impl Queue {
    pub(in crate::tensor) fn new(driver: Arc<dyn Driver>) -> Queue {
        Queue { driver, staging: Mutex::default(), passes: Mutex::default() }
    }

    /// Begins a pass of the computation `key` on this thread, which lasts until the result is dropped; none inside another. A
    /// patient one is held back for its graph also where the card has nothing else to do.
    pub(in crate::tensor) fn enter(&self, key: &[usize], patient: bool) -> Pass<'_> {
        Pass { queue: self.passes().enter(key, patient).then_some(self) }
    }

    fn passes(&self) -> MutexGuard<'_, Passes> {
        // Launches that a panic left are issued by whoever comes next.
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        // A panic under the lock leaves at worst a buffer that is copied from, which is waited for before it is filled.
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Issues what is held back, before something that relies on it.
    pub(in crate::tensor) fn flush(&self) -> Result<()> {
        self.passes().flush(&*self.driver)
    }
}

/// A pass under way; nothing when it was begun inside of another.
pub(in crate::tensor) struct Pass<'a> {
    queue: Option<&'a Queue>,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if let Some(queue) = self.queue {
            queue.passes().leave(&*queue.driver);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.passes.get_mut().unwrap_or_else(PoisonError::into_inner).release(&*self.driver);
        self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).release(&*self.driver);
    }
}

impl Driver for Queue {
    fn capability(&self) -> [u32; 2] {
        self.driver.capability()
    }

    fn multiprocessors(&self) -> usize {
        self.driver.multiprocessors()
    }

    fn name(&self) -> String {
        self.driver.name()
    }

    fn total(&self) -> usize {
        self.driver.total()
    }

    fn available(&self) -> Result<usize> {
        self.driver.available()
    }

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        match self.driver.alloc(bytes) {
            // What sends go through is only there for speed.
            Err(Error::OutOfMemory { .. }) if self.staging().release(&*self.driver) => self.driver.alloc(bytes),
            done => done,
        }
    }

    fn free(&self, memory: Memory) -> Result<()> {
        self.flush()?;
        self.driver.free(memory)
    }

    fn upload(&self, to: Memory, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        self.staging().upload(&*self.driver, to, bytes)
    }

    fn download(&self, from: Memory, bytes: &mut [u8]) -> Result<()> {
        self.flush()?;
        self.driver.download(from, bytes)
    }

    fn memset(&self, memory: Memory, value: u8) -> Result<()> {
        self.passes().ask(Ask::Memset { memory, value }, &*self.driver)
    }

    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: Parameter<'_>) -> Result<()> {
        self.passes().ask(Ask::Launch { module, entry, launch, params }, &*self.driver)
    }

    fn findings(&self) -> &Findings {
        self.driver.findings()
    }

    fn synchronize(&self) -> Result<()> {
        self.flush()?;
        self.driver.synchronize()
    }
}
