//! The kernels' host side on the PTX interpreter instead of a device.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use ptxsim::{Machine, Module as Parsed, Options, Report};
use stunet::backend_testing::cuda::driver::{Driver, Launch, Memory, Module};
use stunet::{Error, Result};

/// Files parsed once for all tests, for the life of the process.
static PARSED: Mutex<Option<HashMap<&'static str, &'static Parsed>>> = Mutex::new(None);

fn parsed(module: &Module) -> &'static Parsed {
    let mut all = PARSED.lock().unwrap_or_else(PoisonError::into_inner);
    all.get_or_insert_default().entry(module.name).or_insert_with(|| {
        let parsed = Parsed::parse(module.text).unwrap_or_else(|e| panic!("{}: {e}", module.name));
        Box::leak(Box::new(parsed))
    })
}

/// A device whose blocks and warps run in the order of `seed`.
pub struct Sim {
    machine: RefCell<Machine>,
    options: Options,
    /// What every entry did in all its launches.
    pub reports: RefCell<BTreeMap<String, Report>>,
}

impl Sim {
    pub fn new(seed: u64) -> Sim {
        // Blocks get what a card of compute capability 8.6 has; tests run side by side on threads of their own.
        let options = Options { seed, threads: 1, shared_limit: 99 * 1024, ..Options::default() };
        Sim { machine: RefCell::new(Machine::new()), options, reports: RefCell::default() }
    }

    /// Memory with these contents.
    pub fn with(&self, bytes: &[u8]) -> Memory {
        let address = self.machine.borrow_mut().upload(bytes);
        Memory { address, bytes: bytes.len() }
    }

    /// All of the memory; fails when a byte of it was never written.
    pub fn bytes(&self, m: Memory) -> Vec<u8> {
        let mut v = vec![0; m.bytes];
        self.download(m, &mut v).unwrap();
        v
    }
}

fn device(e: ptxsim::Error) -> Error {
    Error::Device { what: e.to_string() }
}

impl Driver for Sim {
    fn multiprocessors(&self) -> usize {
        4
    }

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        Ok(Memory { address: self.machine.borrow_mut().alloc(bytes), bytes })
    }

    fn free(&self, memory: Memory) -> Result<()> {
        self.machine.borrow_mut().free(memory.address).map_err(device)
    }

    fn upload(&self, to: Memory, bytes: &[u8]) -> Result<()> {
        self.machine.borrow_mut().write(to.address, bytes).map_err(device)
    }

    fn download(&self, from: Memory, bytes: &mut [u8]) -> Result<()> {
        let machine = self.machine.borrow();
        if let Some(at) = machine.unwritten(from.address).map_err(device)?.filter(|at| *at < bytes.len()) {
            return Err(Error::Device { what: format!("byte {at} was never written") });
        }
        bytes.copy_from_slice(&machine.read(from.address, bytes.len()).map_err(device)?);
        Ok(())
    }

    fn memset(&self, memory: Memory, value: u8) -> Result<()> {
        self.upload(memory, &vec![value; memory.bytes])
    }

    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: &[u8]) -> Result<()> {
        let Launch { grid, block, shared } = launch;
        let report =
            self.machine.borrow_mut().launch(parsed(module), entry, grid, block, shared, params, &self.options);
        self.reports.borrow_mut().entry(entry.into()).or_default().merge(&report.map_err(device)?);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
