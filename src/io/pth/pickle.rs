//! A reader of Python pickles that executes nothing.
//!
//! A pickle is a program for a stack machine whose `REDUCE`, `NEWOBJ`, `INST` and `OBJ` instructions call any Python
//! object by name. Here they only note the call, and only of a callable on a closed list whose meaning is known; any
//! other call refuses the file. A class that is merely mentioned stays an inert name.
//!
//! Values live in one arena and refer to each other by index, so shared references never expand, cycles do no harm
//! and dropping needs no recursion. Every instruction takes at least one byte of input and makes a bounded number of
//! nodes, so memory is bounded by the size of the input, which is itself capped.

use std::collections::{BTreeSet, HashMap};

use super::text::{raw_unicode_escape, unquote};
use super::value::{Callable, Id, Node, Pickle};

/// Largest pickle that is read: checkpoints with hundreds of tensors need 0.1 MB, plans of large data sets a few.
pub(crate) const MAX_PICKLE_BYTES: usize = 64 << 20;
const MAX_NODES: usize = 2 << 20;
const MAX_STACK: usize = 1 << 20;
const MAX_NAME_BYTES: usize = 256;
const MAX_GLOBALS: usize = 1024;

/// Why a pickle was refused, and where.
#[derive(Debug)]
pub(crate) struct Fault {
    /// Byte offset of the instruction.
    pub(crate) at: usize,
    /// One line.
    pub(crate) what: String,
}

/// Reads the first pickle in `bytes`.
///
/// Returns it with the number of bytes it took (legacy PyTorch files hold several in a row).
pub(crate) fn parse(bytes: &[u8]) -> Result<(Pickle, usize), Fault> {
    parse_all(&bytes[..bytes.len().min(MAX_PICKLE_BYTES)])
}

/// As [`parse`], however many bytes it takes.
pub(crate) fn parse_all(bytes: &[u8]) -> Result<(Pickle, usize), Fault> {
    let mut vm = Vm::new(bytes);
    loop {
        let at = vm.at;
        match vm.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                let globals = vm.globals.into_iter().collect();
                return Ok((Pickle { nodes: vm.nodes, root, globals }, vm.at));
            }
            Err(what) => return Err(Fault { at, what }),
        }
    }
}

type Step<T> = Result<T, String>;

struct Vm<'a> {
    input: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    globals: BTreeSet<String>,
}

impl<'a> Vm<'a> {
    fn new(input: &'a [u8]) -> Self {
        let (nodes, stack, marks) = (Vec::new(), Vec::new(), Vec::new());
        Self { input, at: 0, nodes, stack, marks, memo: HashMap::new(), globals: BTreeSet::new() }
    }

    // ---- input

    fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.input.len());
        let Some(end) = end else {
            return Err(format!("needs {n} more bytes, {} are left", self.input.len() - self.at));
        };
        let bytes = &self.input[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u8(&mut self) -> Step<usize> {
        Ok(usize::from(self.array::<1>()?[0]))
    }

    fn u32(&mut self) -> Step<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn len8(&mut self) -> Step<usize> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| "a length does not fit this machine".into())
    }

    fn raw_line(&mut self) -> Step<&'a [u8]> {
        let rest = &self.input[self.at..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or("a line does not end")?;
        self.at += n + 1;
        Ok(&rest[..n])
    }

    fn line(&mut self) -> Step<&'a str> {
        std::str::from_utf8(self.raw_line()?).map_err(|_| "a line is not UTF-8".into())
    }

    // ---- stack

    fn node(&mut self, node: Node) -> Step<Id> {
        if self.nodes.len() >= MAX_NODES {
            return Err(format!("more than {MAX_NODES} values"));
        }
        self.nodes.push(node);
        Ok(Id(self.nodes.len() as u32 - 1))
    }

    fn push_id(&mut self, id: Id) -> Step<()> {
        if self.stack.len() >= MAX_STACK {
            return Err(format!("more than {MAX_STACK} values on the stack"));
        }
        self.stack.push(id);
        Ok(())
    }

    fn push(&mut self, node: Node) -> Step<()> {
        let id = self.node(node)?;
        self.push_id(id)
    }

    fn pop(&mut self) -> Step<Id> {
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err("takes a value from an empty stack".into());
        }
        self.stack.pop().ok_or_else(|| "takes a value from an empty stack".into())
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..].last().copied().ok_or_else(|| "needs a value on the stack".into())
    }

    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("needs a mark on the stack")?;
        Ok(self.stack.split_off(mark))
    }

    fn set_memo(&mut self, key: u32) -> Step<()> {
        if self.memo.len() >= MAX_NODES {
            return Err(format!("more than {MAX_NODES} memo entries"));
        }
        let id = self.top()?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn get_memo(&mut self, key: u32) -> Step<()> {
        let id = self.memo.get(&key).copied().ok_or_else(|| format!("memo entry {key} does not exist"))?;
        self.push_id(id)
    }

    // ---- instructions

    fn step(&mut self) -> Step<Option<Id>> {
        let op = self.array::<1>()?[0];
        match op {
            b'.' => return self.pop().map(Some),
            0x80 => {
                let version = self.u8()?;
                if version > 5 {
                    return Err(format!("pickle protocol {version}, expected 0 to 5"));
                }
            }
            0x95 => {
                let n = self.len8()?;
                if n > self.input.len() - self.at {
                    return Err(format!("a frame of {n} bytes, {} are left", self.input.len() - self.at));
                }
            }
            b'(' => {
                if self.marks.len() >= MAX_STACK {
                    return Err("too many marks".into());
                }
                self.marks.push(self.stack.len());
            }
            b'0' => {
                // POP takes a mark when one is on top.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => {
                let id = self.top()?;
                self.push_id(id)?;
            }
            b'N' => self.push(Node::None)?,
            0x88 => self.push(Node::Bool(true))?,
            0x89 => self.push(Node::Bool(false))?,
            b'I' | b'L' | b'F' | b'J' | b'K' | b'M' | 0x8a | 0x8b | b'G' => self.number(op)?,
            b'S' | b'V' | b'X' | 0x8c | 0x8d | b'T' | b'U' | b'B' | b'C' | 0x8e | 0x96 => self.text(op)?,
            b']' | b'l' | b')' | b't' | 0x85..=0x87 | b'}' | b'd' | 0x8f | 0x91 => self.container(op)?,
            b'a' | b'e' | b's' | b'u' | 0x90 => self.fill(op)?,
            b'g' | b'h' | b'j' | b'p' | b'q' | b'r' | 0x94 => self.memo_op(op)?,
            b'c' | 0x93 | b'i' | b'o' | b'R' | 0x81 | 0x92 | b'b' => self.object(op)?,
            b'P' => {
                let key: Box<str> = self.line()?.into();
                let id = self.node(Node::Str(key))?;
                self.push(Node::Persistent(id))?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id))?;
            }
            0x82..=0x84 => return Err("an extension code, which no model file has".into()),
            0x97 | 0x98 => return Err("an out-of-band buffer, which a file cannot have".into()),
            other => return Err(format!("unknown pickle instruction 0x{other:02x}")),
        }
        Ok(None)
    }

    fn number(&mut self, op: u8) -> Step<()> {
        let node = match op {
            b'I' => match self.line()? {
                "00" => Node::Bool(false),
                "01" => Node::Bool(true),
                s => Node::Int(s.trim().parse().map_err(|_| "not an integer")?),
            },
            b'L' => {
                let s = self.line()?;
                Node::Int(s.trim_end_matches('L').parse().map_err(|_| "not an integer of 64 bits")?)
            }
            b'F' => Node::Float(self.line()?.trim().parse().map_err(|_| "not a number")?),
            b'J' => Node::Int(i64::from(i32::from_le_bytes(self.array()?))),
            b'K' => Node::Int(self.u8()? as i64),
            b'M' => Node::Int(i64::from(u16::from_le_bytes(self.array()?))),
            b'G' => Node::Float(f64::from_be_bytes(self.array()?)),
            _ => {
                let n = if op == 0x8a { self.u8()? } else { self.u32()? as usize };
                long(self.take(n)?)
            }
        };
        self.push(node)
    }

    fn text(&mut self, op: u8) -> Step<()> {
        let node = match op {
            b'S' => Node::Str(unquote(self.line()?)?),
            b'V' => Node::Str(raw_unicode_escape(self.raw_line()?)?),
            b'X' | 0x8c | 0x8d | b'T' | b'U' => {
                let n = match op {
                    b'X' | b'T' => self.u32()? as usize,
                    0x8d => self.len8()?,
                    _ => self.u8()?,
                };
                let bytes = self.take(n)?;
                match std::str::from_utf8(bytes) {
                    Ok(s) => Node::Str(s.into()),
                    // Python 2 strings hold any bytes; lone surrogates of Python 3 mean nothing to us either.
                    Err(_) => Node::Bytes(bytes.into()),
                }
            }
            _ => {
                let n = match op {
                    b'B' => self.u32()? as usize,
                    b'C' => self.u8()?,
                    _ => self.len8()?,
                };
                Node::Bytes(self.take(n)?.into())
            }
        };
        self.push(node)
    }

    fn container(&mut self, op: u8) -> Step<()> {
        let node = match op {
            b']' => Node::List(Vec::new()),
            b'l' => Node::List(self.pop_mark()?),
            b')' => Node::Tuple(Vec::new()),
            b't' => Node::Tuple(self.pop_mark()?),
            0x85..=0x87 => {
                let n = usize::from(op - 0x84);
                let mut items = (0..n).map(|_| self.pop()).collect::<Step<Vec<Id>>>()?;
                items.reverse();
                Node::Tuple(items)
            }
            b'}' => Node::Dict(Vec::new()),
            b'd' => Node::Dict(pairs(&self.pop_mark()?)?),
            0x8f => Node::Set(Vec::new()),
            _ => Node::Set(self.pop_mark()?),
        };
        self.push(node)
    }

    fn fill(&mut self, op: u8) -> Step<()> {
        let items = match op {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let target = self.top()?;
        let fits = match (op, &mut self.nodes[target.0 as usize]) {
            (b'a' | b'e', Node::List(list)) => {
                list.extend(items);
                true
            }
            (b's' | b'u', Node::Dict(dict)) => {
                dict.extend(pairs(&items)?);
                true
            }
            (0x90, Node::Set(set)) => {
                set.extend(items);
                true
            }
            _ => false,
        };
        if fits { Ok(()) } else { Err("adds items to a value that is no list, dictionary or set".into()) }
    }

    fn memo_op(&mut self, op: u8) -> Step<()> {
        match op {
            b'g' | b'p' => {
                let key = self.line()?.trim().parse().map_err(|_| "not a memo number")?;
                if op == b'g' { self.get_memo(key) } else { self.set_memo(key) }
            }
            b'h' | b'q' => {
                let key = self.u8()? as u32;
                if op == b'h' { self.get_memo(key) } else { self.set_memo(key) }
            }
            b'j' | b'r' => {
                let key = self.u32()?;
                if op == b'j' { self.get_memo(key) } else { self.set_memo(key) }
            }
            _ => self.set_memo(self.memo.len() as u32),
        }
    }

    fn object(&mut self, op: u8) -> Step<()> {
        match op {
            b'c' => {
                let id = self.global_from_lines()?;
                self.push_id(id)
            }
            0x93 => {
                let name = self.pop()?;
                let module = self.pop()?;
                let id = self.global(module, name)?;
                self.push_id(id)
            }
            b'i' => {
                let class = self.global_from_lines()?;
                let args = self.pop_mark()?;
                let args = self.node(Node::Tuple(args))?;
                self.call(class, args)
            }
            b'o' => {
                let mut args = self.pop_mark()?;
                if args.is_empty() {
                    return Err("needs a class after the mark".into());
                }
                let class = args.remove(0);
                let args = self.node(Node::Tuple(args))?;
                self.call(class, args)
            }
            0x92 => {
                self.pop()?; // keyword arguments: no allowed callable takes any
                let args = self.pop()?;
                let class = self.pop()?;
                self.call(class, args)
            }
            b'b' => {
                let new = self.pop()?;
                let target = self.top()?;
                match &mut self.nodes[target.0 as usize] {
                    Node::Call { state, .. } => {
                        *state = Some(new);
                        Ok(())
                    }
                    // The attributes of an OrderedDict, such as the `_metadata` of a state_dict.
                    Node::Dict(_) => Ok(()),
                    _ => Err("sets the state of a value that has none".into()),
                }
            }
            _ => {
                let args = self.pop()?;
                let callable = self.pop()?;
                self.call(callable, args)
            }
        }
    }

    fn global_from_lines(&mut self) -> Step<Id> {
        let (module, name): (Box<str>, Box<str>) = (self.line()?.into(), self.line()?.into());
        let module = self.node(Node::Str(module))?;
        let name = self.node(Node::Str(name))?;
        self.global(module, name)
    }

    fn global(&mut self, module: Id, name: Id) -> Step<Id> {
        let (Node::Str(m), Node::Str(n)) = (&self.nodes[module.0 as usize], &self.nodes[name.0 as usize]) else {
            return Err("the name of a global is no text".into());
        };
        if m.len() + n.len() > MAX_NAME_BYTES || m.chars().chain(n.chars()).any(char::is_control) {
            return Err("the name of a global is too long or not printable".into());
        }
        self.globals.insert(format!("{m}.{n}"));
        if self.globals.len() > MAX_GLOBALS {
            return Err(format!("mentions more than {MAX_GLOBALS} globals"));
        }
        self.node(Node::Global { module, name })
    }

    /// Notes the call of an allowed callable; refuses any other. This is the gate of the whole reader.
    fn call(&mut self, callable: Id, args: Id) -> Step<()> {
        let Node::Global { module, name } = &self.nodes[callable.0 as usize] else {
            return Err("calls a value that is no global, refused".into());
        };
        let (Node::Str(module), Node::Str(name)) = (&self.nodes[module.0 as usize], &self.nodes[name.0 as usize])
        else {
            return Err("the name of a global is no text".into());
        };
        let Some(callable) = Callable::allowed(module, name) else {
            return Err(format!("calls {module}.{name}, which is not on the list of known harmless names, refused"));
        };
        let Node::Tuple(items) = &self.nodes[args.0 as usize] else {
            return Err(format!("calls {module}.{name} with arguments that are no tuple"));
        };
        if callable == Callable::OrderedDict {
            // Its items follow one by one; older pickles that pass them in the call are not made by PyTorch.
            if !items.is_empty() {
                return Err("calls collections.OrderedDict with arguments, expected none".into());
            }
            return self.push(Node::Dict(Vec::new()));
        }
        self.push(Node::Call { callable, args, state: None })
    }
}

fn pairs(items: &[Id]) -> Step<Vec<(Id, Id)>> {
    if !items.len().is_multiple_of(2) {
        return Err("a dictionary needs as many values as keys".into());
    }
    Ok(items.chunks_exact(2).map(|c| (c[0], c[1])).collect())
}

/// Two's complement, little-endian.
fn long(bytes: &[u8]) -> Node {
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    if bytes.len() > 8 {
        return Node::Long;
    }
    let mut out = if negative { [0xff; 8] } else { [0; 8] };
    out[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(out))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        std::fs::read(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    /// Made by `pickle.dump(OrderedDict(a=np.int64(-3), b=np.array([1.5, 2.5]), c=np.array([[1, 2], [3, 4]], np.int32),
    /// d=np.bool_(True), e=np.float32(.5), f={0: {"x": (1, None)}}, g=np.uint8(200), h={1}, i=nan, j=np.float16(2),
    /// k="\u{e9}"), file, protocol)` of Python 3 with NumPy 2.
    #[test]
    fn numpy_values_of_every_protocol() {
        for protocol in 0..=5 {
            let bytes = fixture(&format!("numpy_p{protocol}.pkl"));
            let (pickle, n) = parse(&bytes).unwrap_or_else(|f| panic!("protocol {protocol}: {f:?}"));
            assert_eq!(n, bytes.len());
            let mut value = pickle.root().to_json(1000).unwrap();
            // Protocols before 4 make a set by a call, which stays unread.
            let set = value.as_object_mut().unwrap().remove("h").unwrap();
            assert_eq!(set, if protocol < 4 { json!(null) } else { json!([1]) });
            let expected = json!({"a": -3, "b": [1.5, 2.5], "c": [[1, 2], [3, 4]], "d": true, "e": 0.5,
                "f": {"0": {"x": [1, null]}}, "g": 200, "i": null, "j": 2.0, "k": "\u{e9}"});
            assert_eq!(value, expected, "protocol {protocol}");
        }
    }

    #[test]
    fn every_prefix_is_refused() {
        for name in ["numpy_p0.pkl", "numpy_p2.pkl", "numpy_p4.pkl", "numpy_p5.pkl"] {
            let bytes = fixture(name);
            assert!((0..bytes.len()).all(|n| parse(&bytes[..n]).is_err()), "{name}");
        }
    }

    #[test]
    fn calls_of_unknown_names_are_refused_by_name() {
        let cases: [(&[u8], &str); 8] = [
            (b"cos\nsystem\n(S'echo'\ntR.", "os.system"),
            (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "os.system"),
            (b"\x80\x02c__builtin__\neval\nX\x01\0\0\0a\x85R.", "__builtin__.eval"),
            (b"\x80\x02cbuiltins\ngetattr\n)R.", "builtins.getattr"),
            (b"(irunpy\nrun_path\n.", "runpy.run_path"),
            (b"(cos\nsystem\nS'id'\no.", "os.system"),
            (b"\x80\x02csubprocess\nPopen\n)\x81.", "subprocess.Popen"),
            (b"\x80\x04csubprocess\nPopen\n)}\x92.", "subprocess.Popen"),
        ];
        for (bytes, name) in cases {
            let fault = parse(bytes).unwrap_err();
            assert!(fault.what.contains(name), "{fault:?}");
        }
        // What a call gives cannot be called either, nor can a text.
        assert!(parse(b"\x80\x02ctorch\ndevice\n)R)R.").unwrap_err().what.contains("no global"));
        assert!(parse(b"\x80\x02X\x01\0\0\0a)R.").unwrap_err().what.contains("no global"));
    }

    #[test]
    fn a_mentioned_name_is_only_listed() {
        let (pickle, _) = parse(b"\x80\x02]cos\nsystem\na.").unwrap();
        assert_eq!(pickle.globals, ["os.system"]);
    }

    #[test]
    fn shared_references_do_not_expand() {
        // x0 = [], x1 = [x0, x0], x2 = [x1, x1] ...: 2^200 leaves were it written out.
        let mut bytes = b"\x80\x02]q\x00".to_vec();
        for i in 0..200u8 {
            bytes.extend([b']', b'q', i + 1, b'h', i, b'a', b'h', i, b'a']);
        }
        bytes.push(b'.');
        let (pickle, _) = parse(&bytes).unwrap();
        assert!(pickle.root().to_json(100_000).is_none());
        // A list within itself.
        let (pickle, _) = parse(b"\x80\x02]q\x00h\x00a.").unwrap();
        assert!(pickle.root().to_json(100_000).is_none());
    }

    #[test]
    fn sizes_are_checked_before_memory_is_taken() {
        for bytes in
            [&b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"[..], b"B\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f"]
        {
            assert!(parse(bytes).unwrap_err().what.contains("more bytes"));
        }
        assert!(parse(&[b'('; 2 << 20]).is_err());
        assert!(parse(&[b'N'; 2 << 20]).is_err());
    }
}
