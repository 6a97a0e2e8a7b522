//! NumPy scalars and arrays inside pickles, as plans of nnU-Net v1 hold them.

use std::borrow::Cow;

use serde_json::Value;

use super::value::{Callable, Node, View, float};

/// Element type of a NumPy array, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bool,
    Int(usize),
    Uint(usize),
    Float(usize),
}

impl Kind {
    fn size(self) -> usize {
        match self {
            Kind::Bool => 1,
            Kind::Int(n) | Kind::Uint(n) | Kind::Float(n) => n,
        }
    }

    fn value(self, bytes: &[u8]) -> Value {
        // Widened to 64 bits by hand: the slice has exactly the size of the type.
        let mut wide = [0u8; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        match self {
            Kind::Bool => Value::Bool(unsigned != 0),
            Kind::Uint(_) => Value::from(unsigned),
            Kind::Int(n) => {
                let shift = 64 - 8 * n as u32;
                Value::from(((unsigned << shift) as i64) >> shift)
            }
            Kind::Float(2) => float(half::f16::from_bits(unsigned as u16).to_f64()),
            Kind::Float(4) => float(f64::from(f32::from_bits(unsigned as u32))),
            Kind::Float(_) => float(f64::from_bits(unsigned)),
        }
    }
}

/// The plain value of a noted call: a NumPy scalar or array; null for everything else (a tensor, a device). `None`
/// when the budget is spent.
pub(super) fn to_json(call: View<'_>, left: &mut usize) -> Option<Value> {
    // Before decoding, which reads all of the text and may fail every time the same call is referred to.
    *left = left.checked_sub(encoded_len(call))?;
    let Some(array) = decode(call).filter(|a| !a.columns) else { return Some(Value::Null) };
    let n = array.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    // Charged by the byte: many scalars may refer to one long buffer.
    *left = left.checked_sub(n)?.checked_sub(array.bytes.len())?;
    let size = array.kind.size();
    if array.bytes.len() != n.checked_mul(size)? {
        return Some(Value::Null);
    }
    let mut values: Vec<Value> = array.bytes.chunks_exact(size).map(|b| array.kind.value(b)).collect();
    if array.shape.is_empty() {
        return values.pop();
    }
    // Fold the flat values into nested lists, innermost axis first.
    for &d in array.shape.iter().skip(1).rev() {
        if d == 0 {
            return Some(Value::Array(Vec::new()));
        }
        let mut rows = Vec::with_capacity(values.len() / d);
        let mut rest = values.into_iter();
        loop {
            let row: Vec<Value> = rest.by_ref().take(d).collect();
            if row.is_empty() {
                break;
            }
            rows.push(Value::Array(row));
        }
        values = rows;
    }
    Some(Value::Array(values))
}

struct Array<'a> {
    kind: Kind,
    shape: Vec<usize>,
    /// The first axis fastest, which differs from the usual order only with two or more axes.
    columns: bool,
    bytes: Cow<'a, [u8]>,
}

/// Shape and values, the last axis fastest, of an array of integers of at most two axes and `most` values; `None` for
/// everything else.
pub(super) fn integers(call: View<'_>, most: usize) -> Option<([usize; 2], Vec<i64>)> {
    let array = decode(call)?;
    let (rows, columns) = match array.shape[..] {
        [n] => (n, 1),
        [n, m] => (n, m),
        _ => return None,
    };
    let n = rows.checked_mul(columns).filter(|n| *n <= most)?;
    let size = array.kind.size();
    if array.bytes.len() != n.checked_mul(size)? {
        return None;
    }
    let flat = array.bytes.chunks_exact(size).map(|b| array.kind.value(b).as_i64()).collect::<Option<Vec<i64>>>()?;
    if !array.columns {
        return Some(([rows, columns], flat));
    }
    Some(([rows, columns], (0..n).map(|i| flat[i % columns * rows + i / columns]).collect()))
}

fn decode(call: View<'_>) -> Option<Array<'_>> {
    let (callable, args, state) = call.call()?;
    match callable {
        Callable::NumpyScalar => {
            let [dtype, data] = args[..] else { return None };
            Some(Array { kind: kind(dtype)?, shape: Vec::new(), columns: false, bytes: bytes(data)? })
        }
        Callable::NumpyReconstruct => {
            let [_version, shape, dtype, fortran, data] = state?.items(5)?[..] else { return None };
            let shape = shape.sizes(8)?;
            let columns = matches!(fortran.node(), Node::Bool(true)) && shape.len() > 1;
            Some(Array { kind: kind(dtype)?, shape, columns, bytes: bytes(data)? })
        }
        Callable::NumpyFromBuffer => {
            let [data, dtype, shape, order] = args[..] else { return None };
            let shape = shape.sizes(8)?;
            let columns = order.str() != Some("C") && shape.len() > 1;
            Some(Array { kind: kind(dtype)?, shape, columns, bytes: bytes(data)? })
        }
        _ => None,
    }
}

/// `numpy.dtype('f8', False, True)` with state `(3, '<', ...)`.
fn kind(dtype: View<'_>) -> Option<Kind> {
    let (Callable::NumpyDtype, args, state) = dtype.call()? else { return None };
    let code = args.first()?.str()?;
    let order = state.and_then(|s| s.items(9)?.get(1)?.str()).unwrap_or("|");
    let (first, code) = match code.strip_prefix(['<', '>', '|', '=']) {
        Some(rest) => (&code[..1], rest),
        None => ("<", code),
    };
    // "=" never reaches a pickle: NumPy writes the explicit order.
    if order == ">" || first == ">" {
        return None;
    }
    Some(match code {
        "b1" | "?" => Kind::Bool,
        "i1" => Kind::Int(1),
        "i2" => Kind::Int(2),
        "i4" => Kind::Int(4),
        "i8" => Kind::Int(8),
        "u1" => Kind::Uint(1),
        "u2" => Kind::Uint(2),
        "u4" => Kind::Uint(4),
        "u8" => Kind::Uint(8),
        "f2" => Kind::Float(2),
        "f4" => Kind::Float(4),
        "f8" => Kind::Float(8),
        _ => return None,
    })
}

/// Length of the texts that decoding the call would read: the arguments of `_codecs.encode` among its own.
fn encoded_len(call: View<'_>) -> usize {
    let Some((_, args, state)) = call.call() else { return 0 };
    let state = state.and_then(|s| s.items(5)).unwrap_or_default();
    let len = |v: &View<'_>| match v.call() {
        Some((Callable::Encode, args, _)) => args.first().and_then(|t| t.str()).map_or(0, str::len),
        _ => 0,
    };
    args.iter().chain(&state).map(len).fold(0, usize::saturating_add)
}

/// Bytes as protocol 3 and later hold them, or `_codecs.encode(text, 'latin1')` of protocol 2.
fn bytes(v: View<'_>) -> Option<Cow<'_, [u8]>> {
    if let Node::Bytes(b) = v.node() {
        return Some(Cow::Borrowed(b));
    }
    let (Callable::Encode, args, _) = v.call()? else { return None };
    if args.get(1)?.str()? != "latin1" {
        return None;
    }
    let text = args.first()?.str()?;
    text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect::<Option<Vec<u8>>>().map(Cow::Owned)
}
