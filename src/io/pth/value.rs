//! The inert values a pickle holds, and what the few known calls among them mean.

use serde_json::{Map, Number, Value};

/// Most arguments that a known callable takes.
const MAX_ARGS: usize = 8;

/// Index of a value in its pickle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Id(pub(super) u32);

/// One value.
#[derive(Debug)]
pub(crate) enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, which nothing but PyTorch's magic number is.
    Long,
    Float(f64),
    Str(Box<str>),
    Bytes(Box<[u8]>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Set(Vec<Id>),
    /// A Python object mentioned by name.
    Global {
        module: Id,
        name: Id,
    },
    /// A call that was noted, not made.
    Call {
        callable: Callable,
        args: Id,
        state: Option<Id>,
    },
    /// A reference to data outside the pickle: PyTorch's storages.
    Persistent(Id),
}

/// The callables whose meaning is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Callable {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// `torch.device`, `torch.Size` and plain containers: allowed, of no interest.
    Inert,
    NumpyScalar,
    NumpyReconstruct,
    NumpyFromBuffer,
    NumpyDtype,
    Encode,
}

impl Callable {
    pub(super) fn allowed(module: &str, name: &str) -> Option<Callable> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Callable::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Callable::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Callable::RebuildParameter,
            ("torch", "device" | "Size") => Callable::Inert,
            ("builtins" | "__builtin__", "set" | "frozenset" | "bytearray" | "complex") => Callable::Inert,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Callable::NumpyScalar,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Callable::NumpyReconstruct,
            ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Callable::NumpyFromBuffer,
            ("numpy", "dtype") => Callable::NumpyDtype,
            ("_codecs", "encode") => Callable::Encode,
            _ => return None,
        })
    }
}

/// A whole pickle.
#[derive(Debug)]
pub(crate) struct Pickle {
    pub(super) nodes: Vec<Node>,
    pub(super) root: Id,
    /// Every Python name it mentions, sorted.
    pub(crate) globals: Vec<String>,
}

impl Pickle {
    pub(crate) fn root(&self) -> View<'_> {
        self.view(self.root)
    }

    fn view(&self, id: Id) -> View<'_> {
        View { pickle: self, id }
    }

    /// Every reference to outside data, in the order of appearance.
    pub(super) fn persistent(&self) -> impl Iterator<Item = View<'_>> {
        self.nodes.iter().filter_map(|n| match n {
            Node::Persistent(id) => Some(self.view(*id)),
            _ => None,
        })
    }
}

/// A value in its pickle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pickle: &'a Pickle,
    id: Id,
}

impl<'a> View<'a> {
    pub(super) fn node(self) -> &'a Node {
        // Ids are made by the reader together with their nodes.
        &self.pickle.nodes[self.id.0 as usize]
    }

    /// The value at a text key of a dictionary; the last one wins, as in Python.
    pub(crate) fn get(self, key: &str) -> Option<View<'a>> {
        self.entries()?.rev().find_map(|(k, v)| (k.str() == Some(key)).then_some(v))
    }

    pub(crate) fn entries(self) -> Option<impl DoubleEndedIterator<Item = (View<'a>, View<'a>)> + use<'a>> {
        match self.node() {
            Node::Dict(d) => Some(d.iter().map(move |&(k, v)| (self.pickle.view(k), self.pickle.view(v)))),
            _ => None,
        }
    }

    pub(crate) fn str(self) -> Option<&'a str> {
        match self.node() {
            Node::Str(s) => Some(s),
            _ => None,
        }
    }

    pub(crate) fn int(self) -> Option<i64> {
        match self.node() {
            Node::Int(i) => Some(*i),
            _ => None,
        }
    }

    /// Items of a tuple or list of at most `max` items: the bound keeps a long list that is referred to often from
    /// being walked again and again.
    pub(crate) fn items(self, max: usize) -> Option<Vec<View<'a>>> {
        match self.node() {
            Node::Tuple(v) | Node::List(v) if v.len() <= max => {
                Some(v.iter().map(|&id| self.pickle.view(id)).collect())
            }
            _ => None,
        }
    }

    /// Non-negative integers of a tuple or list of at most `max` items, or of a `torch.Size`.
    pub(super) fn sizes(self, max: usize) -> Option<Vec<usize>> {
        if let Some((Callable::Inert, args, _)) = self.call() {
            let [inner] = args[..] else { return None };
            return if matches!(inner.node(), Node::Call { .. }) { None } else { inner.sizes(max) };
        }
        match self.node() {
            Node::Tuple(v) | Node::List(v) if v.len() <= max => {
                v.iter().map(|&id| usize::try_from(self.pickle.view(id).int()?).ok()).collect()
            }
            _ => None,
        }
    }

    /// The called name, its arguments and its state.
    pub(super) fn call(self) -> Option<(Callable, Vec<View<'a>>, Option<View<'a>>)> {
        match self.node() {
            Node::Call { callable, args, state } => {
                Some((*callable, self.pickle.view(*args).items(MAX_ARGS)?, state.map(|s| self.pickle.view(s))))
            }
            _ => None,
        }
    }

    pub(crate) fn global(self) -> Option<(&'a str, &'a str)> {
        match self.node() {
            Node::Global { module, name } => Some((self.pickle.view(*module).str()?, self.pickle.view(*name).str()?)),
            _ => None,
        }
    }

    pub(super) fn persistent_id(self) -> Option<View<'a>> {
        match self.node() {
            Node::Persistent(id) => Some(self.pickle.view(*id)),
            _ => None,
        }
    }

    /// True for a tensor or parameter.
    pub(crate) fn is_tensor(self) -> bool {
        matches!(self.node(), Node::Call { callable: Callable::RebuildTensor | Callable::RebuildParameter, .. })
    }

    /// What it is, for messages.
    pub(crate) fn kind(self) -> &'static str {
        match self.node() {
            Node::None => "None",
            Node::Bool(_) => "a bool",
            Node::Int(_) | Node::Long => "an integer",
            Node::Float(_) => "a float",
            Node::Str(_) => "a text",
            Node::Bytes(_) => "bytes",
            Node::Tuple(_) => "a tuple",
            Node::List(_) => "a list",
            Node::Dict(_) => "a dictionary",
            Node::Set(_) => "a set",
            Node::Global { .. } => "a Python class",
            Node::Call { .. } if self.is_tensor() => "a tensor",
            Node::Call { .. } => "a Python object",
            Node::Persistent(_) => "a storage",
        }
    }

    /// Shape and values, row by row, of a NumPy array of integers of at most two axes and `most` values, or of an empty list.
    pub(crate) fn integers(self, most: usize) -> Option<([usize; 2], Vec<i64>)> {
        match self.node() {
            Node::List(items) if items.is_empty() => Some(([0, 0], Vec::new())),
            _ => super::numpy::integers(self, most),
        }
    }

    /// Plain data (numbers, texts, lists, dictionaries, NumPy scalars and arrays) as JSON; what is not plain data
    /// becomes null, as do NaN and the infinities. `None` when that would be more than `budget` values (shared
    /// references expand here, and only here) or is nested too deeply.
    pub(crate) fn to_json(self, budget: usize) -> Option<Value> {
        let mut left = budget;
        self.json(&mut left, 0)
    }

    fn json(self, left: &mut usize, depth: usize) -> Option<Value> {
        const MAX_DEPTH: usize = 32;
        *left = left.checked_sub(1)?;
        if depth > MAX_DEPTH {
            return None;
        }
        Some(match self.node() {
            Node::Bool(b) => Value::Bool(*b),
            Node::Int(i) => Value::from(*i),
            Node::Float(f) => float(*f),
            Node::Str(s) => {
                // A long text that is referred to often must not multiply either.
                *left = left.checked_sub(s.len() / 16)?;
                Value::String(s.to_string())
            }
            Node::Tuple(v) | Node::List(v) | Node::Set(v) => {
                let items = v.iter().map(|&id| self.pickle.view(id).json(left, depth + 1));
                Value::Array(items.collect::<Option<_>>()?)
            }
            Node::Dict(d) => {
                let mut map = Map::new();
                for &(k, v) in d {
                    let key = match self.pickle.view(k).node() {
                        Node::Str(s) => {
                            *left = left.checked_sub(s.len() / 16)?;
                            s.to_string()
                        }
                        Node::Int(i) => i.to_string(),
                        _ => continue,
                    };
                    map.insert(key, self.pickle.view(v).json(left, depth + 1)?);
                }
                Value::Object(map)
            }
            Node::Call { .. } => super::numpy::to_json(self, left)?,
            Node::None | Node::Long | Node::Bytes(_) | Node::Global { .. } | Node::Persistent(_) => Value::Null,
        })
    }
}

/// A JSON number, or null for what JSON cannot say.
pub(super) fn float(f: f64) -> Value {
    Number::from_f64(f).map_or(Value::Null, Value::Number)
}
