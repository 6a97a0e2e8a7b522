//! PTX text to decoded kernels: directives, declarations, names. What `nvcc -ptx` writes, and inline assembly.

use std::collections::HashMap;

use crate::decode;
use crate::error::{Error, Result};
use crate::ins::{Addr, Base, CONSTANT, D, Ins, Op, P, R, Reg, Ty};
use crate::text::{Statement, literal, number, split, statements};

/// First address of constant memory.
pub(crate) const CONST: u64 = 0x7c0 << 36;
/// First address of the variables that a module declares.
pub(crate) const GLOBALS: u64 = 0x7b0 << 36;

/// Decoded PTX.
pub struct Module {
    version: String,
    target: String,
    pub(crate) kernels: Vec<Kernel>,
    pub(crate) constants: Vec<u8>,
    pub(crate) globals: Vec<u8>,
}

/// A parameter of an entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its first byte in parameter space.
    pub offset: usize,
    /// Its size.
    pub bytes: usize,
    /// Its alignment.
    pub align: usize,
}

/// A register that is set once, when a warp starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    Lane,
    Warp,
    Warps,
    Zero,
    One,
    LaneMask(LaneMask),
    DynamicShared,
    TotalShared,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LaneMask {
    Eq,
    Lt,
    Le,
    Gt,
    Ge,
}

pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Ins>,
    pub(crate) params: Vec<Param>,
    pub(crate) param_bytes: usize,
    pub(crate) narrow: usize,
    pub(crate) wide: usize,
    pub(crate) preds: usize,
    pub(crate) consts: Vec<[u32; 32]>,
    pub(crate) wide_consts: Vec<[u64; 32]>,
    pub(crate) specials: Vec<(Special, u32)>,
    pub(crate) static_shared: usize,
    pub(crate) dynamic_align: usize,
    pub(crate) local: usize,
    pub(crate) max_threads: u32,
    /// Blocks that are to have room on a multiprocessor.
    pub(crate) min_blocks: u32,
}

impl Kernel {
    /// Registers that a thread begins with, where the kernel's bounds decide: all that there are.
    pub(crate) fn registers(&self) -> u32 {
        65536 / (self.max_threads * self.min_blocks).max(256) / 8 * 8
    }
}

/// What an operand can be before its instruction says what it must be.
#[derive(Clone, Debug)]
pub(crate) enum Operand {
    Reg(Reg),
    Immediate(u64),
    Sink,
    Mem(Addr),
    Tensor(Addr, Vec<Operand>),
    List(Vec<Operand>),
    Pair(Box<Operand>, Box<Operand>),
    Negated(P),
}

impl Module {
    /// Parses and decodes a whole file; an instruction that is not known is an error with its line.
    pub fn parse(source: &str) -> Result<Module> {
        let mut module = Module {
            version: String::new(),
            target: String::new(),
            kernels: Vec::new(),
            constants: Vec::new(),
            globals: Vec::new(),
        };
        let mut names = HashMap::new();
        let mut dynamic = Vec::new();
        let all = statements(source);
        let mut rest = all.iter();
        while let Some(s) = rest.next() {
            let fail = |what: &str| Error::Parse { line: s.line, what: format!("{what}: `{}`", s.text) };
            let text = s.text.as_str();
            if let Some(v) = text.strip_prefix(".version") {
                module.version = v.trim().into();
            } else if let Some(t) = text.strip_prefix(".target") {
                module.target = t.trim().into();
            } else if text.contains(".entry") {
                let mut parser = Parser::new(&names, &dynamic);
                parser.head(text).map_err(|e| fail(&e))?;
                let line = s.line;
                while !parser.done {
                    let s =
                        rest.next().ok_or(Error::Parse { line, what: "the body of the kernel has no end".into() })?;
                    parser
                        .statement(s)
                        .map_err(|what| Error::Parse { line: s.line, what: format!("{what}: `{}`", s.text) })?;
                }
                module.kernels.push(parser.finish().map_err(|(line, what)| Error::Parse { line, what })?);
            } else if text.contains(".func") {
                return Err(fail("functions are not supported, only inlined ones"));
            } else if text.contains(".extern") && text.contains(".shared") {
                let v = Variable::parse(text).map_err(|e| fail(&e))?;
                dynamic.push((v.name, v.align));
            } else if text.contains(".const") || text.contains(".global") {
                let v = Variable::parse(text).map_err(|e| fail(&e))?;
                let constant = text.contains(".const");
                let (bank, base) = if constant { (&mut module.constants, 0) } else { (&mut module.globals, GLOBALS) };
                let at = bank.len().next_multiple_of(v.align);
                bank.resize(at, 0);
                bank.extend(&v.data);
                bank.resize(at + v.bytes, 0);
                names.insert(v.name, base + at as u64);
            } else if !text.starts_with('.') && text != "{" && text != "}" {
                return Err(fail("a statement outside of a kernel"));
            }
        }
        Ok(module)
    }

    /// `.version` of the file.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// `.target` of the file.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Names of the entry points, in the order of the file.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.kernels.iter().map(|k| k.name.as_str())
    }

    /// Parameters of an entry point.
    pub fn params(&self, entry: &str) -> Option<&[Param]> {
        self.kernels.iter().find(|k| k.name == entry).map(|k| k.params.as_slice())
    }

    /// Lines of the instructions of an entry point, with their text.
    pub fn lines(&self, entry: &str) -> Vec<(u32, &str)> {
        let kernel = self.kernels.iter().find(|k| k.name == entry);
        kernel.into_iter().flat_map(|k| k.code.iter().map(|i| (i.line, &*i.text))).collect()
    }

    pub(crate) fn kernel(&self, entry: &str) -> Result<&Kernel> {
        let found = self.kernels.iter().find(|k| k.name == entry);
        found.ok_or_else(|| Error::Launch(format!("no entry point {entry}")))
    }
}

/// A declaration of memory.
struct Variable {
    name: String,
    align: usize,
    bytes: usize,
    data: Vec<u8>,
}

impl Variable {
    fn parse(text: &str) -> Result<Variable, String> {
        let (head, values) = match text.split_once('=') {
            Some((h, v)) => (h.trim(), Some(v.trim())),
            None => (text, None),
        };
        let words: Vec<&str> = head.split_whitespace().collect();
        let ty = words.iter().find_map(|w| Ty::parse(w.strip_prefix('.')?)).ok_or("no type")?;
        // The alignment of a pointer parameter speaks of what it points to.
        let own = words.iter().position(|w| *w == ".align").filter(|_| !words.contains(&".ptr"));
        let asked = own.and_then(|i| words.get(i + 1)?.parse().ok());
        let (name, dims) = match words.last().and_then(|w| w.split_once('[')) {
            Some((n, d)) => (n, d.trim_end_matches(']')),
            None => (*words.last().ok_or("no name")?, "1"),
        };
        let mut count = 1;
        for d in dims.split("][").filter(|d| !d.is_empty()) {
            count *= d.trim().parse::<usize>().map_err(|_| "size of the array")?;
        }
        let mut data = Vec::new();
        if let Some(values) = values {
            for v in split(values.trim_start_matches('{').trim_end_matches('}')) {
                let v = literal(v.trim_matches(['{', '}'])).ok_or("initial value")?;
                data.extend(&v.to_le_bytes()[..ty.bytes()]);
            }
        }
        Ok(Variable { name: name.into(), align: asked.unwrap_or(ty.bytes()), bytes: ty.bytes() * count, data })
    }
}

struct Scope {
    regs: HashMap<String, Reg>,
    id: usize,
}

/// A kernel while it is read.
pub(crate) struct Parser<'a> {
    names: &'a HashMap<String, u64>,
    dynamic: &'a [(String, usize)],
    scopes: Vec<Scope>,
    /// Labels of every scope that was opened, by its id.
    labels: Vec<HashMap<String, u32>>,
    /// Label lists of `brx.idx`.
    tables: HashMap<String, Vec<String>>,
    /// Branches to be resolved: instruction, label, scopes around it.
    open: Vec<(usize, String, Vec<usize>)>,
    symbols: HashMap<String, u64>,
    params: HashMap<String, u64>,
    consts: HashMap<u32, u32>,
    wide_consts: HashMap<u64, u32>,
    pub(crate) specials: HashMap<Special, u32>,
    kernel: Kernel,
    done: bool,
}

type Located<T> = Result<T, (u32, String)>;

impl<'a> Parser<'a> {
    fn new(names: &'a HashMap<String, u64>, dynamic: &'a [(String, usize)]) -> Parser<'a> {
        // Row 0 of every file takes what nobody wants.
        let kernel = Kernel {
            name: String::new(),
            code: Vec::new(),
            params: Vec::new(),
            param_bytes: 0,
            narrow: 1,
            wide: 1,
            preds: 1,
            consts: Vec::new(),
            wide_consts: Vec::new(),
            specials: Vec::new(),
            static_shared: 0,
            dynamic_align: dynamic.iter().map(|(_, align)| *align).max().unwrap_or(1).max(16),
            local: 0,
            max_threads: 1024,
            min_blocks: 1,
        };
        Parser {
            names,
            dynamic,
            scopes: Vec::new(),
            labels: Vec::new(),
            tables: HashMap::new(),
            open: Vec::new(),
            symbols: HashMap::new(),
            params: HashMap::new(),
            consts: HashMap::new(),
            wide_consts: HashMap::new(),
            specials: HashMap::new(),
            kernel,
            done: false,
        }
    }

    /// Name, parameters and launch bounds.
    fn head(&mut self, text: &str) -> Result<(), String> {
        let rest = text.split(".entry").nth(1).ok_or("no name")?;
        let (name, rest) = rest.split_once('(').unwrap_or((rest, ")"));
        let (list, tail) = rest.split_once(')').ok_or("parameters without end")?;
        self.kernel.name = name.trim().into();
        for bound in [".maxntid", ".reqntid"] {
            if let Some(t) = tail.split(bound).nth(1) {
                let numbers = t.split('.').next().unwrap_or_default().split(',');
                self.kernel.max_threads = numbers.filter_map(|x| x.trim().parse::<u32>().ok()).product();
            }
        }
        if let Some(t) = tail.split(".minnctapersm").nth(1) {
            let number = t.split('.').next().unwrap_or_default().trim();
            self.kernel.min_blocks = number.parse().map_err(|_| "a number of blocks is needed")?;
        }
        for p in split(list) {
            let v = Variable::parse(p)?;
            let offset = self.kernel.param_bytes.next_multiple_of(v.align);
            self.params.insert(v.name, offset as u64);
            self.kernel.params.push(Param { offset, bytes: v.bytes, align: v.align });
            self.kernel.param_bytes = offset + v.bytes;
        }
        Ok(())
    }

    fn statement(&mut self, s: &Statement) -> Result<(), String> {
        let text = s.text.as_str();
        if text == "{" {
            self.scopes.push(Scope { regs: HashMap::new(), id: self.labels.len() });
            self.labels.push(HashMap::new());
        } else if text == "}" {
            self.scopes.pop();
            self.done = self.scopes.is_empty();
        } else if let Some(label) = text.strip_suffix(':').filter(|l| !l.contains(' ')) {
            let id = self.scopes.last().ok_or("label outside of a body")?.id;
            self.labels[id].insert(label.into(), self.kernel.code.len() as u32);
        } else if let Some(targets) = text.strip_prefix(".branchtargets") {
            // Its label is the last one set.
            let here = self.kernel.code.len() as u32;
            let id = self.scopes.last().ok_or("branch targets outside of a body")?.id;
            let table = split(targets).iter().map(|t| t.to_string()).collect::<Vec<_>>();
            let names: Vec<String> =
                self.labels[id].iter().filter(|(_, at)| **at == here).map(|(n, _)| n.clone()).collect();
            for name in names {
                self.tables.entry(name).or_insert_with(|| table.clone());
            }
        } else if let Some(rest) = text.strip_prefix(".reg") {
            self.registers(rest)?;
        } else if text.starts_with(".shared") {
            let v = Variable::parse(text)?;
            let at = self.kernel.static_shared.next_multiple_of(v.align);
            self.symbols.insert(v.name, at as u64);
            self.kernel.static_shared = at + v.bytes;
        } else if text.starts_with(".local") {
            let v = Variable::parse(text)?;
            let at = self.kernel.local.next_multiple_of(v.align);
            self.symbols.insert(v.name, at as u64);
            self.kernel.local = at + v.bytes;
        } else if !text.starts_with('.') {
            self.instruction(s)?;
        }
        Ok(())
    }

    fn registers(&mut self, rest: &str) -> Result<(), String> {
        let (ty, names) = rest.trim().split_once(char::is_whitespace).ok_or("registers without names")?;
        let ty = Ty::parse(ty.trim_start_matches('.')).ok_or("type of the registers")?;
        for name in split(names) {
            let list: Vec<String> = match name.split_once('<') {
                Some((p, n)) => {
                    let n: u32 = n.trim_end_matches('>').parse().map_err(|_| "number of registers")?;
                    (0..n).map(|i| format!("{p}{i}")).collect()
                }
                None => vec![name.into()],
            };
            for name in list {
                let reg = match ty {
                    Ty::Pred => Reg::Pred(P(next(&mut self.kernel.preds))),
                    _ if ty.bytes() == 8 => Reg::Wide(D(next(&mut self.kernel.wide))),
                    _ => Reg::Narrow(R(next(&mut self.kernel.narrow))),
                };
                self.scopes.last_mut().ok_or("registers outside of a body")?.regs.insert(name, reg);
            }
        }
        Ok(())
    }

    fn instruction(&mut self, s: &Statement) -> Result<(), String> {
        let mut text = s.text.as_str();
        let mut guard = None;
        if let Some(rest) = text.strip_prefix('@') {
            let (name, rest) = rest.trim().split_once(char::is_whitespace).ok_or("guard without instruction")?;
            let (negated, name) = name.strip_prefix('!').map_or((false, name), |n| (true, n));
            let Some(Reg::Pred(p)) = self.reg(name) else { return Err(format!("{name} is no predicate")) };
            guard = Some((p, negated));
            text = rest.trim();
        }
        let (name, arguments) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let op = match name.split('.').next() {
            Some("bra") => {
                self.open.push((self.kernel.code.len(), arguments.trim().into(), self.around()));
                Op::Branch(0)
            }
            Some("brx") => {
                let args = split(arguments);
                let index = self.operand(args[0])?;
                let table = args.get(1).ok_or("brx.idx without targets")?;
                self.open.push((self.kernel.code.len(), table.to_string(), self.around()));
                Op::BranchIndexed(self.r(&index)?, Vec::new())
            }
            _ => {
                let operands = split(arguments).into_iter().map(|a| self.operand(a)).collect::<Result<Vec<_>, _>>()?;
                decode::decode(self, name, &operands)?
            }
        };
        self.kernel.code.push(Ins { op, guard, line: s.line, text: s.text.as_str().into() });
        Ok(())
    }

    fn around(&self) -> Vec<usize> {
        self.scopes.iter().rev().map(|s| s.id).collect()
    }

    fn reg(&self, name: &str) -> Option<Reg> {
        self.scopes.iter().rev().find_map(|s| s.regs.get(name).copied())
    }

    fn finish(mut self) -> Located<Kernel> {
        let find = |labels: &[HashMap<String, u32>], name: &str, scopes: &[usize]| {
            scopes.iter().find_map(|id| labels[*id].get(name).copied())
        };
        for (at, label, scopes) in std::mem::take(&mut self.open) {
            let ins = &mut self.kernel.code[at];
            let missing = |name: &str| (ins.line, format!("no label {name}"));
            match &mut ins.op {
                Op::Branch(to) => *to = find(&self.labels, &label, &scopes).ok_or_else(|| missing(&label))?,
                Op::BranchIndexed(_, to) => {
                    for name in self.tables.get(&label).ok_or_else(|| missing(&label))? {
                        to.push(find(&self.labels, name, &scopes).ok_or_else(|| missing(name))?);
                    }
                }
                _ => {}
            }
        }
        self.kernel.specials = self.specials.into_iter().collect();
        Ok(self.kernel)
    }

    /// The row of a constant.
    pub(crate) fn constant(&mut self, value: u32) -> R {
        let consts = &mut self.kernel.consts;
        let row = *self.consts.entry(value).or_insert_with(|| {
            consts.push([value; 32]);
            consts.len() as u32 - 1
        });
        R(row | CONSTANT)
    }

    /// The row of a wide constant.
    pub(crate) fn wide_constant(&mut self, value: u64) -> D {
        let consts = &mut self.kernel.wide_consts;
        let row = *self.wide_consts.entry(value).or_insert_with(|| {
            consts.push([value; 32]);
            consts.len() as u32 - 1
        });
        D(row | CONSTANT)
    }

    fn special(&mut self, name: &str) -> Option<Operand> {
        let axis = |s: &str| ["x", "y", "z"].iter().position(|a| *a == s);
        let special = match name.split_once('.') {
            Some(("%tid", a)) => Special::Tid(axis(a)?),
            Some(("%ntid", a)) => Special::Ntid(axis(a)?),
            Some(("%ctaid", a)) => Special::Ctaid(axis(a)?),
            Some(("%nctaid", a)) => Special::Nctaid(axis(a)?),
            // A launch without clusters is one of clusters of one block.
            Some(("%cluster_ctaid", _)) => Special::Zero,
            Some(("%cluster_nctaid", _)) => Special::One,
            Some(("%clusterid", a)) => Special::Ctaid(axis(a)?),
            Some(("%nclusterid", a)) => Special::Nctaid(axis(a)?),
            _ => match name {
                "%laneid" => Special::Lane,
                "%warpid" => Special::Warp,
                "%nwarpid" => Special::Warps,
                "%cluster_ctarank" | "%smid" | "%clock" | "%clock_hi" | "%globaltimer_lo" | "%globaltimer_hi" => {
                    Special::Zero
                }
                "%cluster_nctarank" | "%nsmid" => Special::One,
                "%lanemask_eq" => Special::LaneMask(LaneMask::Eq),
                "%lanemask_lt" => Special::LaneMask(LaneMask::Lt),
                "%lanemask_le" => Special::LaneMask(LaneMask::Le),
                "%lanemask_gt" => Special::LaneMask(LaneMask::Gt),
                "%lanemask_ge" => Special::LaneMask(LaneMask::Ge),
                "%dynamic_smem_size" => Special::DynamicShared,
                "%total_smem_size" => Special::TotalShared,
                // There is no time here.
                "%clock64" | "%globaltimer" => return Some(Operand::Immediate(0)),
                "WARP_SZ" => return Some(Operand::Immediate(32)),
                _ => return None,
            },
        };
        let narrow = &mut self.kernel.narrow;
        let row = *self.specials.entry(special).or_insert_with(|| next(narrow));
        Some(Operand::Reg(Reg::Narrow(R(row))))
    }

    /// Where dynamic shared memory begins: after the static part, in the alignment of its declaration.
    fn symbol(&self, name: &str) -> Option<u64> {
        if self.dynamic.iter().any(|(n, _)| n == name) {
            return Some(self.kernel.static_shared.next_multiple_of(self.kernel.dynamic_align) as u64);
        }
        let found = self.symbols.get(name).or_else(|| self.params.get(name)).or_else(|| self.names.get(name));
        found.copied()
    }

    fn operand(&mut self, s: &str) -> Result<Operand, String> {
        let s = s.trim();
        if s == "_" {
            return Ok(Operand::Sink);
        }
        if let Some(inner) = s.strip_prefix('[') {
            return self.memory(inner.strip_suffix(']').ok_or("address without end")?.trim());
        }
        if let Some(inner) = s.strip_prefix('{') {
            let parts = split(inner.trim_end_matches('}'));
            return Ok(Operand::List(parts.into_iter().map(|p| self.operand(p)).collect::<Result<_, _>>()?));
        }
        if let Some((a, b)) = s.split_once('|') {
            return Ok(Operand::Pair(Box::new(self.operand(a)?), Box::new(self.operand(b)?)));
        }
        if let Some(name) = s.strip_prefix('!') {
            return match self.reg(name) {
                Some(Reg::Pred(p)) => Ok(Operand::Negated(p)),
                _ => Err(format!("{name} is no predicate")),
            };
        }
        if let Some(reg) = self.reg(s) {
            return Ok(Operand::Reg(reg));
        }
        if let Some(v) = literal(s) {
            return Ok(Operand::Immediate(v));
        }
        if let Some((name, offset)) = s.split_once('+').filter(|(n, _)| self.symbol(n.trim()).is_some()) {
            let offset = number(offset).ok_or("offset of a name")?;
            return Ok(Operand::Immediate(self.symbol(name.trim()).unwrap_or(0).wrapping_add(offset as u64)));
        }
        if let Some(address) = self.symbol(s) {
            return Ok(Operand::Immediate(address));
        }
        self.special(s).ok_or_else(|| format!("unknown operand {s}"))
    }

    fn memory(&mut self, s: &str) -> Result<Operand, String> {
        let parts = split(s);
        if parts.len() == 2 {
            let Operand::Mem(base) = self.memory(parts[0])? else { return Err("tensor operand".into()) };
            let Operand::List(coordinates) = self.operand(parts[1])? else { return Err("coordinates".into()) };
            return Ok(Operand::Tensor(base, coordinates));
        }
        let (name, offset) = match s.rsplit_once('+') {
            Some((n, o)) => (n.trim(), number(o).ok_or("offset of an address")? as u64),
            None => (s, 0),
        };
        Ok(Operand::Mem(match self.operand(name)? {
            Operand::Reg(Reg::Narrow(r)) => Addr { base: Base::Narrow(r), offset },
            Operand::Reg(Reg::Wide(d)) => Addr { base: Base::Wide(d), offset },
            Operand::Immediate(v) => Addr { base: Base::None, offset: v.wrapping_add(offset) },
            _ => return Err(format!("{name} is no address")),
        }))
    }
}

fn next(counter: &mut usize) -> u32 {
    *counter += 1;
    *counter as u32 - 1
}
