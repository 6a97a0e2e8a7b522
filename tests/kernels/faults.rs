//! Faults planted into a kernel's PTX: what would make the other tests pass by luck is found here.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use stunet::Result;
use stunet::backend_testing::cuda::conv3d::{self, Wish};
use stunet::backend_testing::cuda::{Source, Storage};
use stunet::tensor::cuda::{Driver, Findings, Launch, Memory, Module, Parameter};

use super::conv3d::{Case, reference};
use super::sim::Sim;
use super::{room, stored, unpadded};

/// What is planted into the text of an entry.
type Edit<'a> = &'a (dyn Fn(&str) -> String + Sync);

/// A device that runs another text than it is given, of entries whose names begin so.
pub struct Faulty<'a> {
    sim: &'a Sim,
    name: &'static str,
    begin: &'static str,
    edit: Edit<'a>,
    findings: Findings,
}

impl<'a> Faulty<'a> {
    pub fn new(sim: &'a Sim, name: &'static str, begin: &'static str, edit: Edit<'a>) -> Faulty<'a> {
        Faulty { sim, name, begin, edit, findings: Findings::new() }
    }
}

impl std::fmt::Debug for Faulty<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faulty({})", self.name)
    }
}

impl Driver for Faulty<'_> {
    fn name(&self) -> String {
        self.name.into()
    }

    fn total(&self) -> usize {
        self.sim.total()
    }

    fn available(&self) -> Result<usize> {
        self.sim.available()
    }

    fn capability(&self) -> [u32; 2] {
        self.sim.capability()
    }

    fn multiprocessors(&self) -> usize {
        self.sim.multiprocessors()
    }

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        self.sim.alloc(bytes)
    }

    fn free(&self, memory: Memory) -> Result<()> {
        self.sim.free(memory)
    }

    fn upload(&self, to: Memory, bytes: &[u8]) -> Result<()> {
        self.sim.upload(to, bytes)
    }

    fn download(&self, from: Memory, bytes: &mut [u8]) -> Result<()> {
        self.sim.download(from, bytes)
    }

    fn memset(&self, memory: Memory, value: u8) -> Result<()> {
        self.sim.memset(memory, value)
    }

    fn findings(&self) -> &Findings {
        &self.findings
    }

    fn launch(&self, module: &Module, entry: &str, launch: Launch, params: Parameter<'_>) -> Result<()> {
        if !entry.starts_with(self.begin) {
            return self.sim.launch(module, entry, launch, params);
        }
        // What stands before all entries, and this one.
        let all = module.text()?;
        let header = &all[..all.find(".visible .entry").unwrap()];
        let rest = &all[all.find(&format!(".visible .entry {entry}(")).unwrap()..];
        let entry_text = &rest[..rest[1..].find(".visible .entry").map_or(rest.len(), |end| end + 1)];
        let edited = (self.edit)(entry_text);
        assert!(edited != entry_text, "{}: nothing was planted", self.name);
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(format!("{header}{edited}").as_bytes()).unwrap();
        // A module is known by where it lies, for the life of the process.
        let packed = packed.finish().unwrap().leak();
        self.sim.launch(&Module { name: self.name, packed }, entry, launch, params)
    }

    fn synchronize(&self) -> Result<()> {
        self.sim.synchronize()
    }
}

/// Why the case is wrong with the edit; `None` when nothing was noticed.
fn run(name: &'static str, variant: &str, edit: Edit<'_>) -> Option<String> {
    let c = Case { sources: vec![(32, [1; 3], true), (16, [1; 3], false)], ..Case::new([5, 9, 9], 0, 32) };
    let (weight, bias) = (c.weight(), c.bias());
    let sim = Sim::new(1);
    let faulty = Faulty::new(&sim, name, "conv3d", edit);
    let inputs = c.inputs(&sim);
    let sources: Vec<Source> = inputs.iter().map(|i| i.source).collect();
    let packed = conv3d::pack_weight(&weight, [32, 48, 3, 3, 3], &[32, 16], c.storage).unwrap();
    let p = conv3d::Problem {
        storage: c.storage,
        batch: 1,
        sources: &sources,
        weight: sim.with(&packed),
        bias: None,
        filters: 32,
        kernel: [3; 3],
        stride: [1; 3],
        out: room(&sim, 5 * 81 * 32, c.storage),
        partials: None,
        workspace: None,
    };
    let plan = conv3d::plan(&faulty, &p, false, Wish { variant: Some(variant), parts: Some(1) }).unwrap();
    if let Err(e) = conv3d::run(&faulty, &p, &plan) {
        return Some(e.to_string());
    }
    let mut bytes = vec![0; p.out.bytes];
    if let Err(e) = sim.download(p.out, &mut bytes) {
        return Some(e.to_string());
    }
    let got = unpadded(&Storage::Bf16.load(&bytes), 32);
    let expected = reference(&c, &inputs, &weight, &bias);
    let wrong = |(g, e): (&f32, &(f64, f64))| {
        let b = stored(e.0, e.1, 48 * 27, c.storage);
        // NaN is not within anything.
        let within = (f64::from(*g) - b.value).abs() <= b.error;
        (!within).then(|| format!("{g}, expected {}", b.value))
    };
    got.iter().zip(&expected).find_map(wrong)
}

/// The text with the `n`-th occurrence of `from` made `to`, counted from the end.
pub fn replace(text: &str, from: &str, to: &str, n: usize) -> String {
    let (at, _) = text.rmatch_indices(from).nth(n).unwrap_or_else(|| panic!("no {from}"));
    format!("{}{to}{}", &text[..at], &text[at + from.len()..])
}

#[test]
pub(super) fn ptx_faults_in_conv3d_are_found() {
    for variant in ["n32", "any_n32"] {
        assert!(run("sound", variant, &|t| format!("{t}\n")).is_none(), "the kernel itself is right");
        let mut missing = 0;
        let found = |what: &'static str, edit: Edit<'_>| {
            let why = run(what, variant, edit);
            assert!(why.is_some(), "{variant}: {what} was not found");
        };
        // Loaded by all before it is multiplied; multiplied by all before results take its place; results before they are
        // copied. The others stand in branches for moments and for a single brick.
        let mut barriers = 0;
        let total = AtomicUsize::new(1);
        while barriers < total.load(Ordering::Relaxed) {
            let nth = barriers;
            let edit = |t: &str| {
                total.store(t.matches("bar.sync").count(), Ordering::Relaxed);
                replace(t, "bar.sync \t0;", "", nth)
            };
            missing += usize::from(run("a barrier is missing", variant, &edit).is_some());
            barriers += 1;
        }
        assert!(missing >= 3, "{variant}: {missing} of {barriers} missing barriers were found");
        found("copies are not waited for", &|t| t.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;"));
        found("rows of a matrix are mixed", &|t| replace(t, "xor.b32", "or.b32", 0));
        found("one product is left out", &|t| {
            let at = t.rfind("mma.sync").unwrap();
            format!("{}// {}", &t[..at], &t[at..])
        });
        found("padding is not zero", &|t| {
            // The size of the first copy that has one in a register.
            let at = t.find("cp.async.cg").unwrap();
            let end = at + t[at..].find(';').unwrap();
            let comma = t[..end].rfind(',').unwrap();
            format!("{}, 16{}", &t[..comma], &t[end..])
        });
        found("a value is not written", &|t| {
            let at = t.rfind("st.global.v4").unwrap();
            format!("{}// {}", &t[..at], &t[at..])
        });
    }
}
