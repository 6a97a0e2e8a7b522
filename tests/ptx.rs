//! The checked-in PTX is what the kernels compile to: by the sums in `ptx/MANIFEST`, with no compiler at hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// `path` to sum, of every line of the manifest.
fn manifest() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(root().join("ptx/MANIFEST")).unwrap();
    let split = |line: &str| line.split_once("  ").map(|(sum, path)| (path.to_string(), sum.to_string()));
    text.lines().map(|line| split(line).unwrap_or_else(|| panic!("ptx/MANIFEST: {line:?}"))).collect()
}

/// Names of the files in `folder` that end in one of `endings`, as path from the root.
fn files(folder: &str, endings: &[&str]) -> Vec<String> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap();
    let names = entries.map(|e| format!("{folder}/{}", e.unwrap().file_name().into_string().unwrap()));
    let mut out: Vec<String> = names.filter(|n| endings.iter().any(|e| n.ends_with(e))).collect();
    out.sort();
    out
}

fn sum(path: &str) -> String {
    let bytes = std::fs::read(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The files that the first line of a kernel promises.
fn outputs(kernel: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(kernel)).unwrap();
    let first = text.lines().next().unwrap_or_default();
    let targets =
        first.strip_prefix("// targets: ").unwrap_or_else(|| panic!("{kernel}: no targets in its first line"));
    let stem = Path::new(kernel).file_stem().unwrap().to_string_lossy();
    targets.split_whitespace().map(|t| format!("ptx/{stem}.sm{t}.ptx")).collect()
}

#[test]
fn ptx_is_fresh() {
    let listed = manifest();
    let stale: Vec<&String> = listed.iter().filter(|(path, s)| sum(path) != **s).map(|(path, _)| path).collect();
    assert!(stale.is_empty(), "changed since kernels/build.sh ran: {stale:?}");
}

#[test]
fn the_manifest_lists_every_source_and_every_output() {
    let listed: Vec<String> = manifest().into_keys().collect();
    let mut present = files("kernels", &[".cu", ".cuh", ".sh"]);
    present.extend(files("ptx", &[".ptx"]));
    present.sort();
    assert_eq!(listed, present);
    let mut promised: Vec<String> = files("kernels", &[".cu"]).iter().flat_map(|k| outputs(k)).collect();
    promised.sort();
    assert_eq!(files("ptx", &[".ptx"]), promised);
}
