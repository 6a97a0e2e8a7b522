//! A card that is none: what operations ask for is counted, not done.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Driver, Findings, Launch, Memory, Module, Parameter};
use crate::error::Result;

/// Alignment of memory.
const ALIGN: u64 = 256;

/// A driver whose memory is addresses only and whose launches do nothing.
#[derive(Debug)]
pub(crate) struct Rehearsal {
    capability: [u32; 2],
    multiprocessors: usize,
    name: String,
    total: usize,
    /// The first address that was never given.
    next: AtomicU64,
    /// Its own: what a launch that does nothing leaves says nothing of the card.
    findings: Findings,
}

impl Rehearsal {
    /// As that card.
    pub(crate) fn of(card: &dyn Driver) -> Self {
        Self::new(card.capability(), card.multiprocessors(), card.name(), card.total())
    }

    /// As a card of that compute capability and size.
    pub(crate) fn new(capability: [u32; 2], multiprocessors: usize, name: String, total: usize) -> Self {
        Self { capability, multiprocessors, name, total, next: AtomicU64::new(ALIGN), findings: Findings::new() }
    }
}

impl Driver for Rehearsal {
    fn capability(&self) -> [u32; 2] {
        self.capability
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn total(&self) -> usize {
        self.total
    }

    fn available(&self) -> Result<usize> {
        Ok(self.total)
    }

    /// However much: who asks wants to know how much that is.
    fn alloc(&self, bytes: usize) -> Result<Memory> {
        let address = self.next.fetch_add((bytes as u64).next_multiple_of(ALIGN).max(ALIGN), Ordering::Relaxed);
        Ok(Memory { address, bytes })
    }

    fn free(&self, _: Memory) -> Result<()> {
        Ok(())
    }

    fn upload(&self, _: Memory, _: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Zeros.
    fn download(&self, _: Memory, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn memset(&self, _: Memory, _: u8) -> Result<()> {
        Ok(())
    }

    fn launch(&self, _: &Module, _: &str, _: Launch, _: Parameter<'_>) -> Result<()> {
        Ok(())
    }

    fn findings(&self) -> &Findings {
        &self.findings
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
