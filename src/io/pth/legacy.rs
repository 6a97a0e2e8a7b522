//! The container of `torch.save` before PyTorch 1.6: five pickles in a row (magic number, protocol version, facts
//! about the machine, the object, the list of storage keys), then the storages in that order, each a 64-bit count of
//! elements and the raw elements.

use std::collections::HashMap;
use std::ops::Range;

use super::pickle;
use super::value::{Node, Pickle};
use super::{Fault, Storage, storage};

/// 0x1950a86a20f9469cfc6c, little-endian, as a pickled long integer.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

/// True when the file starts with the pickled magic number.
pub(super) fn is_legacy(file: &[u8]) -> bool {
    // PROTO n, LONG1 10, magic
    matches!(file, [0x80, _, 0x8a, 10, rest @ ..] if rest.starts_with(&MAGIC))
}

/// Where the storages lie, by key.
type Ranges = HashMap<String, Range<usize>>;

/// The object, every Python name of all five pickles, and where the storages lie.
pub(super) fn open(file: &[u8]) -> Result<(Pickle, Ranges), Fault> {
    let mut at = 0;
    let mut globals = Vec::new();
    let mut next = |part: &'static str| -> Result<(Pickle, usize), Fault> {
        let (mut pickle, n) =
            pickle::parse(&file[at..]).map_err(|f| (format!("{part}, pickle byte {}", at + f.at), f.what))?;
        at += n;
        globals.append(&mut pickle.globals);
        Ok((pickle, at))
    };
    next("magic number")?;
    let (protocol, _) = next("protocol version")?;
    if protocol.root().int() != Some(PROTOCOL) {
        return Err(("protocol version".into(), format!("expected {PROTOCOL}")));
    }
    let (machine, _) = next("sys_info")?;
    if !matches!(machine.root().get("little_endian").map(|v| v.node()), Some(Node::Bool(true))) {
        return Err(("sys_info.little_endian".into(), "not True: written on a big-endian machine".into()));
    }
    let (mut object, _) = next("object")?;
    let (keys, mut at) = next("storage keys")?;
    globals.sort();
    globals.dedup();
    object.globals = globals;

    let mut sizes: HashMap<&str, usize> = HashMap::new();
    for id in object.persistent() {
        let Storage { key, dtype, .. } = storage(id).map_err(|what| ("storage".to_string(), what))?;
        if sizes.insert(key, dtype.size()).is_some_and(|old| old != dtype.size()) {
            return Err((format!("storage {key:?}"), "used with two element types".into()));
        }
    }
    let keys = keys.root();
    let Node::List(list) = keys.node() else {
        return Err(("storage keys".into(), format!("{}, expected a list", keys.kind())));
    };
    let mut out = HashMap::with_capacity(list.len().min(sizes.len()));
    for key in keys.items(list.len()).unwrap_or_default() {
        let key = key.str().ok_or_else(|| ("storage keys".to_string(), format!("{}, expected a text", key.kind())))?;
        let fault = |what: &str| (format!("storage {key:?}"), what.to_string());
        let size = *sizes.get(key).ok_or_else(|| fault("no tensor uses it"))?;
        let count = file.get(at..at.saturating_add(8)).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        let count = count.ok_or_else(|| fault("the file ends before its size"))?;
        let start = at + 8;
        let end = usize::try_from(count).ok().and_then(|n| n.checked_mul(size)).and_then(|n| start.checked_add(n));
        let end = end.filter(|&e| e <= file.len()).ok_or_else(|| fault("reaches beyond the end of the file"))?;
        if out.insert(key.to_string(), start..end).is_some() {
            return Err(fault("listed twice"));
        }
        at = end;
    }
    Ok((object, out))
}
