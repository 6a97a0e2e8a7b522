//! Machines with no driver, a broken one, an old one: the program starts, says why there is no GPU, and never falls over. And what
//! a driver is asked for when it is sent something.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::image;
use crate::common::binary::{Ran, stunet_with, tree};

const STUB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/stub_driver.c");

/// `folder` with a driver in it: the stub with these settings.
fn driver(folder: &Path, settings: &[&str]) {
    let library = folder.join("libcuda.so.1");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-o"]).arg(&library).arg(STUB);
    cc.args(settings.iter().map(|s| format!("-D{s}")));
    let out = cc.output().unwrap();
    assert!(out.status.success(), "{settings:?}: {}", String::from_utf8_lossy(&out.stderr));
    // Also under the name that is looked for first, so that no driver of this machine is found before it.
    std::fs::copy(&library, folder.join("libcuda.so")).unwrap();
}

/// Whether this machine can compile the stub.
fn has_compiler() -> bool {
    let found = Command::new("cc").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: no cc");
    }
    found
}

fn run(folder: &Path, args: &[&str]) -> Ran {
    let ran = stunet_with(folder, args, &[("LD_LIBRARY_PATH", folder)]);
    assert!(ran.code >= 0, "{args:?} ended by a signal: {}", ran.err);
    assert!(!ran.err.contains("panicked"), "{args:?}: {}", ran.err);
    ran
}

/// `info` works and gives the reason, and what needs a card ends with code 5 and one line that gives it.
fn check(folder: &Path, reason: &str) {
    let info = run(folder, &["info"]);
    let text = info.ok();
    assert!(text.lines().any(|l| l.starts_with("cuda") && l.contains(reason)), "expected {reason:?}: {text}");
    assert!(info.err.is_empty(), "{}", info.err);
    let json: Value = serde_json::from_str(run(folder, &["info", "--json"]).ok()).unwrap();
    assert_eq!(json["cuda"]["usable"], false, "{json}");
    image(&folder.join("a.nii"));
    for args in [
        &["predict", "-m", "m", "-i", "a.nii", "-o", "o.nii", "--device", "cuda"][..],
        &["bench", "forward", "--device", "cuda", "--model", "small", "--patch", "32"],
    ] {
        let ran = run(folder, args);
        let e = ran.error(5);
        assert!(e.contains("cuda:0 cannot be used: ") && e.contains(reason), "expected {reason:?}: {e}");
        assert!(ran.out.is_empty(), "{}", ran.out);
    }
    assert!(!tree(folder).contains(&folder.join("o.nii")));
}

#[test]
fn a_driver_that_finds_no_card_is_no_reason_to_fail() {
    if !has_compiler() {
        return;
    }
    for (settings, reason) in [
        (&["INIT=100"][..], ""),
        (&["CARDS=0"], ""),
        (&["INIT=803"], "cuInit: CUDA_ERROR_OF_STUB (803)"),
        // A code that no binding knows, of which the driver gives no name either.
        (&["INIT=98765"], "cuInit: error 98765"),
        (&["HAS=1", "INIT=803"], "cuInit: error 803"),
        (&["VERSION=10020"], "is of CUDA 10.2, expected 11.0"),
        (&["MAJOR=7"], "Stub Card is of compute capability 7.0, expected 7.5"),
        (&["HAS=0"], "its library has no cuInit"),
        (&["HAS=1"], "its library has no cuDeviceGetAttribute"),
        (&["RETAIN=999"], "cuDevicePrimaryCtxRetain: error 999"),
        (&["STREAM=2"], "cuStreamCreate: error 2"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        driver(dir.path(), settings);
        check(dir.path(), if reason.is_empty() { "driver 12.4 found no card" } else { reason });
    }
}

#[test]
fn a_driver_that_is_no_library_is_none() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::write(dir.path().join(name), [0x5a; 4096]).unwrap();
    }
    let info = run(dir.path(), &["info"]);
    // A machine's own driver may still be found under another name.
    if info.ok().contains("no NVIDIA driver") {
        check(dir.path(), "no NVIDIA driver was found on this machine");
    }
}

/// A card that can be opened is listed, and what then goes wrong is said in one line.
#[test]
fn a_card_that_fails_later_is_code_5() {
    if !has_compiler() {
        return;
    }
    for (settings, reason) in [
        (&["LOAD=222"][..], "does not load: error 222 stub: this PTX; is too new"),
        (&["ALLOC=2"], "memory"),
        (&["ALLOC=700"], "cuMemAlloc: error 700"),
        (&["MAJOR=9"], "has no "),
        // Without page-locked memory the network's weights arrive all the same. None of these drivers makes graphs.
        (&["MAJOR=9", "PIN=2"], "has no "),
    ] {
        let dir = tempfile::tempdir().unwrap();
        driver(dir.path(), settings);
        let ran = run(dir.path(), &["bench", "forward", "--device", "cuda", "--model", "small", "--patch", "32"]);
        let e = ran.error(5);
        assert!(e.contains(reason), "{settings:?}: {e}");
    }
    let dir = tempfile::tempdir().unwrap();
    driver(dir.path(), &["CARDS=2", "VERSION=11000"]);
    let info = run(dir.path(), &["info"]);
    let expected = [
        "cuda            driver 11.0 found Stub Card, Stub Card",
        "cuda:0          Stub Card, compute capability 8.0, 8.0 GiB, networks in bf16",
        "cuda:1          Stub Card, compute capability 8.0, 8.0 GiB, networks in bf16",
    ];
    for line in expected {
        assert!(info.ok().lines().any(|l| l == line), "{line}: {}", info.out);
    }
    let json: Value = serde_json::from_str(run(dir.path(), &["info", "--json"]).ok()).unwrap();
    assert_eq!((&json["cuda"]["usable"], &json["device"]), (&true.into(), &"cpu".into()));
    let card = &json["cuda"]["cards"][1];
    assert_eq!(
        (&card["device"], &card["name"], &card["usable"]),
        (&"cuda:1".into(), &"Stub Card".into(), &true.into())
    );
    assert_eq!((&card["precision"], &card["memory_bytes"]), (&"bf16".into(), &(8u64 << 30).into()));
    // There is no third.
    let ran = run(dir.path(), &["bench", "forward", "--device", "cuda:2"]);
    assert!(ran.error(5).contains("cuda:2 cannot be used: there is no card 2, driver 11.0 found"), "{}", ran.err);
}

/// What a card is sent crosses the bus on a stream of its own, and whatever the two streams do meanwhile nothing is read before it
/// was written, or written or freed before it was read.
#[test]
fn what_is_sent_overtakes_work_and_harms_none() {
    if !has_compiler() {
        return;
    }
    // Sends a network's filters, and ends at the first kernel.
    let trace = |settings: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        driver(dir.path(), settings);
        run(dir.path(), &["bench", "forward", "--device", "cuda", "--model", "small", "--patch", "32"]).error(5);
        std::fs::read_to_string(dir.path().join("trace")).unwrap()
    };
    let plain = trace(&["TRACE", "BESIDE=2"]);
    let sends: Vec<&str> = plain.lines().filter_map(|l| l.strip_prefix("send ")?.split(' ').next()).collect();
    assert!(sends.len() > 8 && sends.iter().all(|s| s == &sends[0]), "with no memory beside: {sends:?}");
    assert!(!plain.contains("place "), "{plain}");
    let trace = trace(&["TRACE"]);

    // The last lines that are over for certain, by whose they are: before what a stream does next, or the host, and when an
    // event has happened.
    type Over<'a> = HashMap<&'a str, usize>;
    const HOST: &str = "host";
    let mut known: HashMap<&str, Over<'_>> = HashMap::new();
    // The last line, and whose it is, that read a place of the host's, wrote one beside, and read one.
    let [mut sent, mut written, mut read] = [(); 3].map(|()| HashMap::<&str, (&str, usize)>::new());
    let (mut streams, mut again, mut last_placed) = ([BTreeSet::new(), BTreeSet::new()], 0, None);
    // How often neither the bus nor the host had waited for the work before.
    let mut overtaken = [0; 2];
    for (i, line) in trace.lines().enumerate() {
        let words: Vec<&str> = line.split(' ').collect();
        let [what, who, a, b] = words[..] else { panic!("{line}") };
        // A stream knows what the host did when it asked; whoever waits for an event knows what it knows.
        let learnt = [HOST, if what == "wait" { a } else { HOST }];
        for from in learnt.map(|from| known.get(from).cloned().unwrap_or_default()) {
            let mine = known.entry(who).or_default();
            for (of, line) in from {
                let last = mine.entry(of).or_insert(line);
                *last = line.max(*last);
            }
        }
        let is_over = |by: &str, last: Option<&(&str, usize)>| {
            let over = |(of, line): &(&str, usize)| known.get(by).and_then(|k| k.get(of)).is_some_and(|l| l >= line);
            last.is_none_or(over)
        };
        match what {
            // From the host to what lies beside.
            "send" => {
                assert!(is_over(HOST, sent.get(a)), "{i}: {line}: the host's bytes before were not read yet");
                assert!(is_over(who, read.get(b)), "{i}: {line}: the bytes before were not taken yet");
                for (count, by) in overtaken.iter_mut().zip([who, HOST]) {
                    *count += usize::from(!is_over(by, last_placed.as_ref()));
                }
                again += usize::from(sent.insert(a, (who, i)).is_some());
                written.insert(b, (who, i));
                streams[0].insert(who);
            }
            // From there to where it is to lie.
            "place" => {
                assert!(written.contains_key(a) && is_over(who, written.get(a)), "{i}: {line}: not there yet");
                read.insert(a, (who, i));
                last_placed = Some((who, i));
                streams[1].insert(who);
            }
            // Of either side, or anything else.
            "free" => {
                written.remove(a);
                for last in [sent.remove(a), read.remove(a)] {
                    assert!(is_over(HOST, last.as_ref()), "{i}: {line}: it is copied from");
                }
            }
            "record" => drop(known.insert(a, known.get(who).cloned().unwrap_or_default())),
            "wait" => (),
            _ => panic!("{line}"),
        }
        known.entry(who).or_default().insert(who, i);
    }
    assert!(again > 8 && overtaken.iter().all(|n| *n > 8), "{again} sent again, {overtaken:?} beside work");
    assert!(sent.is_empty() && written.is_empty() && read.is_empty(), "kept: {sent:?}, {written:?}, {read:?}");
    assert!(streams.iter().all(|s| s.len() == 1) && streams[0] != streams[1], "{streams:?}");
}
