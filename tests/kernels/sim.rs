//! The kernels' host side on the PTX interpreter instead of a device, or for once on a real one.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ptxsim::{Machine, Module as Parsed, Options, Report, Site, Swizzle};
use stunet::tensor::cuda::{Driver, Findings, Graph, Launch, Memory, Module, Parameter, Pinned, TensorMap, Work};
use stunet::{Error, Result};

/// What interpreters are found to do, which is the same for all of them.
static FINDINGS: Findings = Findings::new();

/// Files parsed once for all tests, for the life of the process, by where their text is.
static PARSED: Mutex<Option<HashMap<usize, &'static Parsed>>> = Mutex::new(None);

fn parsed(module: &Module) -> &'static Parsed {
    let mut all = PARSED.lock().unwrap_or_else(PoisonError::into_inner);
    all.get_or_insert_default().entry(module.packed.as_ptr().addr()).or_insert_with(|| {
        let parsed = Parsed::parse(&module.text().unwrap()).unwrap_or_else(|e| panic!("{}: {e}", module.name));
        Box::leak(Box::new(parsed))
    })
}

thread_local! {
    /// The card that stands in for the interpreter in this thread.
    static CARD: RefCell<Option<Arc<dyn Driver>>> = const { RefCell::new(None) };
}

/// Runs `f`, every [`Sim`] of which is that card.
pub fn on_card(card: &Arc<dyn Driver>, f: impl FnOnce()) {
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            CARD.set(None);
        }
    }
    CARD.set(Some(card.clone()));
    let _back = Back;
    f();
}

/// What a device may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lacks {
    Nothing,
    /// Page-locked memory.
    Pinning,
    /// Graphs.
    Graphs,
    /// A fault, planted: it does not wait for the copies that it is told to wait for.
    Patience,
}

/// Work that was asked for and that nobody has waited for.
enum Asked {
    Copy { to: Memory, from: usize, bytes: usize },
    Memset { memory: Memory, value: u8 },
    Launch { module: &'static Parsed, entry: String, launch: Launch, maps: Vec<TensorMap>, bytes: Vec<u8> },
}

/// The machine, and what it has not done: everything happens as late as it may, when somebody waits for it, so that a wait
/// that is missing is seen in what comes out.
#[derive(Default)]
struct State {
    machine: Machine,
    asked: VecDeque<Asked>,
    pinned: HashMap<usize, Vec<u8>>,
    graphs: Vec<Vec<Work>>,
    /// Bytes of memory that are not free.
    taken: usize,
    count: Count,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Launches, without those of graphs.
    pub launches: usize,
    /// Graphs that were made.
    pub graphs: usize,
    /// Graphs that were run.
    pub replays: usize,
    /// Times that page-locked memory was filled while a launch was not done.
    pub filled_beside: usize,
}

/// A device whose blocks and warps run in the order of `seed`.
pub struct Sim {
    state: Mutex<State>,
    options: Options,
    capability: [u32; 2],
    multiprocessors: usize,
    total: usize,
    lacks: Lacks,
    card: Option<Arc<dyn Driver>>,
    /// Memory of the card that is given back at the end.
    held: Mutex<Vec<Memory>>,
    /// What every entry did in all its launches.
    reports: Mutex<BTreeMap<String, (&'static Parsed, Report)>>,
}

impl Sim {
    /// As a card of compute capability 8.6.
    pub fn new(seed: u64) -> Sim {
        Sim::of(seed, [8, 6])
    }

    /// As a card of that compute capability.
    pub fn of(seed: u64, capability: [u32; 2]) -> Sim {
        let card = CARD.with_borrow(Clone::clone);
        // Files for older cards run on newer ones, those for 9.0 on no other.
        let capability = match card.as_ref().map(|c| c.capability()) {
            Some(own) if capability > own || capability == [9, 0] => own,
            _ => capability,
        };
        let shared_limit = [64, 99, 227][usize::try_from(capability[0]).unwrap().min(9) - 7] << 10;
        // Tests run side by side on threads of their own.
        let options = Options { seed, threads: 1, shared_limit, ..Options::default() };
        let (state, held, reports) = (Mutex::default(), Mutex::default(), Mutex::default());
        Sim {
            state,
            options,
            capability,
            multiprocessors: 4,
            total: 1 << 32,
            lacks: Lacks::Nothing,
            card,
            held,
            reports,
        }
    }

    /// The same with so much memory, as it says.
    pub fn with_total(self, total: usize) -> Sim {
        let mut new = self;
        new.total = total;
        new
    }

    /// The same with so many multiprocessors, as it says.
    pub fn with_multiprocessors(self, multiprocessors: usize) -> Sim {
        let mut new = self;
        new.multiprocessors = multiprocessors;
        new
    }

    /// Another program takes so much of its memory.
    pub fn lose(&self, bytes: usize) {
        lock(&self.state).taken += bytes;
    }

    pub fn count(&self) -> Count {
        lock(&self.state).count
    }

    /// The same with less to offer.
    pub fn lacking(self, lacks: Lacks) -> Sim {
        let mut new = self;
        new.lacks = lacks;
        new
    }

    /// Does the first `n` things that were asked for.
    fn work_off(&self, state: &mut State, n: usize) -> Result<()> {
        // What follows a failure is not done, as on a card.
        let State { machine, asked, pinned, .. } = state;
        for asked in asked.drain(..n).collect::<Vec<_>>() {
            match asked {
                Asked::Copy { to, from, bytes } => {
                    let buffer = pinned.get(&from).ok_or_else(|| strange("a copy from page-locked memory"))?;
                    machine.write(to.address, &buffer[..bytes]).map_err(device)?;
                }
                Asked::Memset { memory, value } => {
                    machine.write(memory.address, &vec![value; memory.bytes]).map_err(device)?;
                }
                Asked::Launch { module, entry, launch: Launch { grid, block, shared }, maps, bytes } => {
                    let params = encoded(machine, &maps, bytes).map_err(device)?;
                    let report = machine.launch(module, &entry, grid, block, shared, &params, &self.options);
                    let report = report.map_err(device)?;
                    let mut all = lock(&self.reports);
                    all.entry(entry).or_insert_with(|| (module, Report::default())).1.merge(&report);
                }
            }
        }
        Ok(())
    }

    /// Everything that was asked for, done.
    fn done(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = lock(&self.state);
        let n = state.asked.len();
        self.work_off(&mut state, n)?;
        Ok(state)
    }

    /// Memory with these contents.
    pub fn with(&self, bytes: &[u8]) -> Memory {
        if self.card.is_some() {
            let memory = self.alloc(bytes.len()).unwrap();
            self.upload(memory, bytes).unwrap();
            return memory;
        }
        let address = lock(&self.state).machine.upload(bytes);
        Memory { address, bytes: bytes.len() }
    }

    /// Entries that ran.
    pub fn entries(&self) -> Vec<String> {
        drop(self.done().unwrap());
        lock(&self.reports).keys().cloned().collect()
    }

    /// Traffic of all of an entry's instructions that begin with `what`, in all launches.
    pub fn traffic(&self, entry: &str, what: &str) -> Site {
        drop(self.done().unwrap());
        let reports = lock(&self.reports);
        let (module, report) = &reports[entry];
        let mut sum = Site::default();
        for (line, text) in module.lines(entry) {
            let Some(site) = report.counters.get(&line).filter(|_| text.contains(what)) else { continue };
            sum.requests += site.requests;
            sum.wavefronts += site.wavefronts;
            sum.ideal_wavefronts += site.ideal_wavefronts;
            sum.sectors += site.sectors;
            sum.ideal_sectors += site.ideal_sectors;
        }
        sum
    }

    /// Whether an entry was launched; of a card that is not known.
    pub fn ran(&self, entry: &str) -> bool {
        self.card.is_some() || lock(&self.reports).contains_key(entry)
    }

    /// All of the memory; fails when a byte of it was never written.
    pub fn bytes(&self, m: Memory) -> Vec<u8> {
        let mut v = vec![0; m.bytes];
        self.download(m, &mut v).unwrap();
        v
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A parameter as the entry reads it.
fn encoded(machine: &mut Machine, maps: &[TensorMap], bytes: Vec<u8>) -> ptxsim::Result<Vec<u8>> {
    let mut all = Vec::new();
    for map in maps {
        all.extend(machine.tensor_map(ptxsim::TensorMap {
            base: map.address,
            element: 2,
            dims: map.sizes.map(|n| n as u64).into(),
            strides: map.strides().into(),
            tile: map.tile.map(|n| n as usize).into(),
            element_strides: vec![1; 5],
            swizzle: Swizzle::B32,
            im2col: None,
        })?);
    }
    all.extend(bytes);
    Ok(all)
}

fn asked_launch(module: &Module, entry: &str, launch: Launch, params: Parameter<'_>) -> Asked {
    let (maps, bytes) = (params.maps.into(), params.bytes.into());
    Asked::Launch { module: parsed(module), entry: entry.into(), launch, maps, bytes }
}

fn asked(work: &Work) -> Asked {
    match work {
        Work::Launch { module, entry, launch, maps, bytes } => {
            asked_launch(module, entry, *launch, Parameter { maps, bytes })
        }
        Work::Memset { memory, value } => Asked::Memset { memory: *memory, value: *value },
    }
}

fn strange(what: &str) -> Error {
    Error::Device { what: format!("{what} of somebody else") }
}

fn device(e: ptxsim::Error) -> Error {
    Error::Device { what: e.to_string() }
}

impl Drop for Sim {
    fn drop(&mut self) {
        let held = std::mem::take(&mut *lock(&self.held));
        if let Some(card) = &self.card {
            held.into_iter().for_each(|m| drop(card.free(m)));
        }
    }
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sim({:?})", self.capability)
    }
}

impl Driver for Sim {
    fn capability(&self) -> [u32; 2] {
        self.capability
    }

    fn multiprocessors(&self) -> usize {
        self.card.as_ref().map_or(self.multiprocessors, |c| c.multiprocessors())
    }

    fn name(&self) -> String {
        "interpreter".into()
    }

    fn total(&self) -> usize {
        self.total
    }

    fn available(&self) -> Result<usize> {
        let own = self.total.saturating_sub(lock(&self.state).taken);
        self.card.as_ref().map_or(Ok(own), |c| Ok(own.min(c.available()?)))
    }

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        let free = self.available()?;
        if bytes > free {
            let what = "a buffer of the interpreter".into();
            return Err(Error::OutOfMemory { what, asked: bytes, in_use: self.total - free, limit: self.total });
        }
        lock(&self.state).taken += bytes;
        if let Some(card) = &self.card {
            let memory = card.alloc(bytes)?;
            lock(&self.held).push(memory);
            // What nothing writes is no number in any of the storages.
            card.memset(memory, 0xff)?;
            return Ok(memory);
        }
        Ok(Memory { address: lock(&self.state).machine.alloc(bytes), bytes })
    }

    fn free(&self, memory: Memory) -> Result<()> {
        lock(&self.state).taken -= memory.bytes;
        if let Some(card) = &self.card {
            lock(&self.held).retain(|m| m.address != memory.address);
            return card.free(memory);
        }
        self.done()?.machine.free(memory.address).map_err(device)
    }

    fn upload(&self, to: Memory, bytes: &[u8]) -> Result<()> {
        if let Some(card) = &self.card {
            return card.upload(to, bytes);
        }
        self.done()?.machine.write(to.address, bytes).map_err(device)
    }

    fn pin(&self, bytes: usize) -> Result<Pinned> {
        match &self.card {
            _ if self.lacks == Lacks::Pinning => Err(Error::Device { what: "no page-locked memory".into() }),
            Some(card) => card.pin(bytes),
            None => {
                let buffer = vec![0; bytes];
                let pinned = Pinned { address: buffer.as_ptr().addr(), bytes };
                lock(&self.state).pinned.insert(pinned.address, buffer);
                Ok(pinned)
            }
        }
    }

    fn unpin(&self, pinned: Pinned) -> Result<()> {
        if let Some(card) = &self.card {
            return card.unpin(pinned);
        }
        self.wait(pinned)?;
        lock(&self.state).pinned.remove(&pinned.address).map(drop).ok_or_else(|| strange("page-locked memory"))
    }

    fn fill(&self, pinned: Pinned, bytes: &[u8]) -> Result<()> {
        if let Some(card) = &self.card {
            return card.fill(pinned, bytes);
        }
        let mut state = lock(&self.state);
        let beside = state.asked.iter().any(|a| matches!(a, Asked::Launch { .. }));
        state.count.filled_beside += usize::from(beside);
        let buffer = state.pinned.get_mut(&pinned.address).ok_or_else(|| strange("page-locked memory"))?;
        buffer[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy(&self, to: Memory, pinned: Pinned, bytes: usize) -> Result<()> {
        if let Some(card) = &self.card {
            return card.copy(to, pinned, bytes);
        }
        assert!(bytes <= to.bytes && bytes <= pinned.bytes);
        lock(&self.state).asked.push_back(Asked::Copy { to, from: pinned.address, bytes });
        Ok(())
    }

    fn wait(&self, pinned: Pinned) -> Result<()> {
        match &self.card {
            _ if self.lacks == Lacks::Patience => Ok(()),
            Some(card) => card.wait(pinned),
            None => {
                let mut state = lock(&self.state);
                let of = |a: &Asked| matches!(a, Asked::Copy { from, .. } if *from == pinned.address);
                let upto = state.asked.iter().rposition(of).map_or(0, |last| last + 1);
                self.work_off(&mut state, upto)
            }
        }
    }

    fn download(&self, from: Memory, bytes: &mut [u8]) -> Result<()> {
        if let Some(card) = &self.card {
            return card.download(from, bytes);
        }
        let machine = &self.done()?.machine;
        if let Some(at) = machine.unwritten(from.address).map_err(device)?.filter(|at| *at < bytes.len()) {
            return Err(Error::Device { what: format!("byte {at} was never written") });
        }
        bytes.copy_from_slice(&machine.read(from.address, bytes.len()).map_err(device)?);
        Ok(())
    }

    fn memset(&self, memory: Memory, value: u8) -> Result<()> {
        if let Some(card) = &self.card {
            return card.memset(memory, value);
        }
        lock(&self.state).asked.push_back(Asked::Memset { memory, value });
        Ok(())
    }

    fn findings(&self) -> &Findings {
        self.card.as_ref().map_or(&FINDINGS, |c| c.findings())
    }

    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: Parameter<'_>) -> Result<()> {
        lock(&self.state).count.launches += 1;
        if let Some(card) = &self.card {
            // Waited for, so that what goes wrong is said of the entry in which it did.
            return card.launch(module, entry, launch, params).and_then(|()| card.synchronize());
        }
        lock(&self.state).asked.push_back(asked_launch(module, entry, launch, params));
        Ok(())
    }

    fn record(&self, work: &[Work]) -> Result<Graph> {
        match &self.card {
            _ if self.lacks == Lacks::Graphs => Err(Error::Unsupported { what: "graphs".into() }),
            Some(card) => {
                lock(&self.state).count.graphs += 1;
                card.record(work)
            }
            None => {
                let mut state = lock(&self.state);
                state.count.graphs += 1;
                state.graphs.push(work.to_vec());
                Ok(Graph(state.graphs.len() - 1))
            }
        }
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        let mut state = lock(&self.state);
        state.count.replays += 1;
        if let Some(card) = &self.card {
            return card.replay(graph);
        }
        let asked: Vec<Asked> = state.graphs[graph.0].iter().map(asked).collect();
        state.asked.extend(asked);
        Ok(())
    }

    fn forget(&self, graph: Graph) -> Result<()> {
        match &self.card {
            Some(card) => card.forget(graph),
            None => {
                self.done()?.graphs[graph.0].clear();
                Ok(())
            }
        }
    }

    /// A card is said to be busy, too, so that what depends on it is the same in every run.
    fn busy(&self) -> Result<bool> {
        Ok(self.card.is_some() || !lock(&self.state).asked.is_empty())
    }

    fn synchronize(&self) -> Result<()> {
        match &self.card {
            Some(card) => card.synchronize(),
            None => self.done().map(drop),
        }
    }
}
