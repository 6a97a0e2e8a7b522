//! A card as operations see it: its driver, with uploads that do not wait.

use std::sync::{Arc, Mutex, PoisonError};

use super::staging::Staging;
use super::{Driver, Launch, Memory, Module};
use crate::error::Result;

/// A driver with what stands before it.
#[derive(Debug)]
pub(in crate::tensor) struct Queue {
    driver: Arc<dyn Driver>,
    staging: Mutex<Staging>,
}

impl Queue {
    pub(in crate::tensor) fn new(driver: Arc<dyn Driver>) -> Queue {
        Queue { driver, staging: Mutex::default() }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
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

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        self.driver.alloc(bytes)
    }

    fn free(&self, memory: Memory) -> Result<()> {
        self.driver.free(memory)
    }

    fn upload(&self, to: Memory, bytes: &[u8]) -> Result<()> {
        // A panic under the lock leaves at worst a buffer that is copied from, which is waited for before it is filled.
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).upload(&*self.driver, to, bytes)
    }

    fn download(&self, from: Memory, bytes: &mut [u8]) -> Result<()> {
        self.driver.download(from, bytes)
    }

    fn memset(&self, memory: Memory, value: u8) -> Result<()> {
        self.driver.memset(memory, value)
    }

    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: &[u8]) -> Result<()> {
        self.driver.launch(module, entry, launch, params)
    }

    fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }
}
