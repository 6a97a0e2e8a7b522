//! House rules: who may use whom, where unsafe code may be, what the library must never do.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// What each part of `src` may name as `crate::...`; the floors are explained in README.md.
const FLOORS: &[(&str, &[&str])] = &[
    ("base", &["base", "error"]),
    ("error", &["error"]),
    ("tensor", &["base", "error", "tensor"]),
    ("io", &["base", "error", "tensor", "io"]),
    ("backend", &["base", "error", "tensor", "backend"]),
    ("autograd", &["base", "error", "tensor", "backend", "autograd"]),
    ("ops", &["base", "error", "tensor", "backend", "autograd", "ops"]),
    ("nn", &["base", "error", "tensor", "autograd", "ops", "nn"]),
    ("models", &["base", "error", "tensor", "autograd", "ops", "nn", "models"]),
    ("nnunet", &["base", "error", "tensor", "io", "autograd", "ops", "nn", "models", "preview", "nnunet"]),
    ("phantom", &["base", "error", "io", "phantom"]),
    ("preview", &["base", "error", "io", "preview"]),
    ("demo", &["base", "error", "tensor", "io", "models", "nnunet", "phantom", "preview", "demo"]),
    ("cli", &[]),
    ("main", &[]),
];

/// The only files that may hold unsafe code: memory, the driver, the kernels, and the maps of weight files.
const UNSAFE: &[&str] = &[
    "src/tensor/buffer.rs",
    "src/tensor/cuda/",
    "src/backend/cpu/",
    "src/io/pth.rs",
    "src/io/pth/",
    "src/io/weights.rs",
    "src/io/weights/",
    "src/io/map.rs",
];

/// A dependency and the only places that may name it.
const CRATES: &[(&str, &[&str])] = &[
    ("cudarc", &["src/tensor/cuda/"]),
    ("rayon", &["src/base/par.rs", "src/tensor/device.rs", "src/backend/cpu/"]),
    ("clap", &["src/cli/"]),
    ("indicatif", &["src/cli/"]),
    ("png", &["src/preview", "src/io/picture.rs"]),
    ("tiff", &["src/io/picture.rs"]),
];

/// Operations without a CPU kernel file, test or benchmark of their own, and why.
const EXEMPT: &[(&str, &str)] = &[
    (
        "backward",
        "no operation: the way back of conv3d, tested with it in conv3d_grad.rs, autograd.rs and golden_train.rs",
    ),
    ("head", "the last 1x1x1 layer fused into the sweep over windows: private, tested in its own file"),
    (
        "cuda",
        "no operation: how those of other files run on a card, tested with the kernels in tests/kernels/device.rs",
    ),
    ("lazy", "no operation: inputs that operations finish while they read them, tested with conv3d in conv3d_fused.rs"),
    ("testing", "no operation: the door through which tests reach every implementation"),
    ("filter", "how filters lie on a card, which every convolution there goes through"),
    ("grad", "the ways back on a card, each with a kernel of its own that has tests"),
    ("patch", "warp, blur, intensity and low_resolution on a card: tests/kernels/augment.rs"),
    ("head_loss", "conv3d and loss on the processor; on a card tests/kernels/head_loss.rs"),
];

const MAX_LINES: usize = 600;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `folder`, as path from the root with its text.
fn files(folder: &str, ending: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
                out.push((name, String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned()));
            }
        }
    }
    assert!(!out.is_empty(), "{folder}: no {ending}");
    out.sort();
    out
}

/// The product, without the tests that stand in files of their own.
fn sources() -> Vec<(String, String)> {
    files("src", ".rs").into_iter().filter(|(f, _)| !f.ends_with("/tests.rs")).collect()
}

fn is_cli(name: &str) -> bool {
    name == "src/main.rs" || name.starts_with("src/cli/")
}

fn within(name: &str, places: &[&str]) -> bool {
    places.iter().any(|p| name == *p || (p.ends_with('/') && name.starts_with(p)) || name == format!("{p}.rs"))
        || places.iter().any(|p| !p.ends_with(".rs") && !p.ends_with('/') && name.starts_with(&format!("{p}/")))
}

/// Lines of the product: number and code, without comments and without the file's own tests.
fn code(text: &str) -> Vec<(usize, &str)> {
    let mut out = Vec::new();
    let mut lines = text.lines().enumerate().peekable();
    while let Some((i, line)) = lines.next() {
        if line.trim() == "#[cfg(test)]" && lines.peek().is_some_and(|(_, l)| l.contains("mod tests")) {
            break;
        }
        let code = match line.find("//") {
            Some(at) if !line[..at].ends_with(':') => &line[..at],
            _ => line,
        };
        if !code.trim().is_empty() {
            out.push((i + 1, code));
        }
    }
    out
}

/// Whether `word` stands in `code` by itself.
fn has_word(code: &str, word: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word)
        .any(|(at, _)| !part(code[..at].chars().next_back()) && !part(code[at + word.len()..].chars().next()))
}

fn report(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

/// The first names of all paths `crate::name` and `crate::{name, ...}` in `code`.
fn named(code: &str) -> Vec<String> {
    let name = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut out = Vec::new();
    for (at, found) in code.match_indices("crate::") {
        let rest = &code[at + found.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            out.push(name(rest));
            continue;
        };
        let mut depth = 0;
        let mut start = true;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = true,
                c if start && depth == 0 && !c.is_whitespace() => {
                    out.push(name(&group[i..]));
                    start = false;
                }
                _ => {}
            }
        }
    }
    out
}

#[test]
fn a_floor_never_looks_up() {
    let mut broken = Vec::new();
    for (file, text) in sources().iter().filter(|(f, _)| f != "src/lib.rs") {
        let floor = file["src/".len()..].split(['/', '.']).next().unwrap();
        let Some((_, allowed)) = FLOORS.iter().find(|(f, _)| *f == floor) else {
            broken.push(format!("{file}: no rule for the floor {floor} in tests/tidy.rs"));
            continue;
        };
        let whole: String = code(text).iter().flat_map(|(_, l)| [l, "\n"]).collect();
        for name in named(&whole) {
            // The root re-exports of the two lowest floors.
            let part = match name.as_str() {
                "Error" | "Result" => "error",
                "Device" | "Isa" | "Precision" => "tensor",
                other => other,
            };
            if !allowed.contains(&part) {
                broken.push(format!("{file}: crate::{name}"));
            }
        }
    }
    report("a floor may only use the floors below it", &broken);
}

#[test]
fn the_command_line_uses_the_public_library_only() {
    let mut broken = Vec::new();
    for (file, text) in sources().iter().filter(|(f, _)| is_cli(f)) {
        broken.extend(code(text).iter().filter(|(_, l)| l.contains("#[path")).map(|(i, _)| format!("{file}:{i}")));
    }
    report("cli reaches into the library", &broken);
    assert!(files("src/cli", ".rs").iter().any(|(_, t)| t.contains("use stunet::")));
}

#[test]
fn unsafe_code_has_its_places_and_its_reasons() {
    let mut broken = Vec::new();
    for (file, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in code(&text) {
            if !has_word(line, "unsafe") {
                continue;
            }
            if !within(&file, UNSAFE) {
                broken.push(format!("{file}:{i}: unsafe code is not allowed in this file"));
            }
            let block = line.contains("unsafe {") || line.contains("unsafe impl");
            if block && !has_safety(&lines[..i]) {
                broken.push(format!("{file}:{i}: no SAFETY comment directly above"));
            }
        }
    }
    report("unsafe code", &broken);
}

/// Whether the comment block that ends within three lines above the last of `lines` says SAFETY.
fn has_safety(lines: &[&str]) -> bool {
    let above = &lines[..lines.len() - 1];
    let is_comment = |l: &&str| l.trim_start().starts_with("//");
    let near = above.iter().rev().take(3).position(is_comment);
    near.is_some_and(|at| above.iter().rev().skip(at).take_while(|l| is_comment(l)).any(|l| l.contains("SAFETY:")))
}

#[test]
fn the_library_never_prints_exits_or_reads_the_environment() {
    const NEVER: &[&str] = &["println!", "eprintln!", "print!", "eprint!", "process::exit", "process::abort"];
    let mut broken = Vec::new();
    for (file, text) in sources().iter().filter(|(f, _)| !is_cli(f)) {
        for (i, line) in code(text) {
            let environment = ["std::env::", "env::var", "env::args", "env::current_dir", "use std::env"];
            if NEVER.iter().chain(&environment).any(|n| has_word(line, n) || line.contains(&format!(" {n}"))) {
                broken.push(format!("{file}:{i}: {}", line.trim()));
            }
        }
    }
    report("in the library", &broken);
}

#[test]
fn dependencies_stay_in_their_rooms() {
    let mut broken = Vec::new();
    for (file, text) in sources() {
        for (i, line) in code(&text) {
            for (name, places) in CRATES {
                if line.contains(&format!("{name}::")) && has_word(line, name) && !within(&file, places) {
                    broken.push(format!("{file}:{i}: {name}"));
                }
            }
            let nifti = line.contains("use nifti::")
                || line.match_indices("::nifti::").any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric()));
            if nifti && !file.starts_with("src/io/nifti") && file != "src/io/mod.rs" {
                broken.push(format!("{file}:{i}: nifti"));
            }
        }
    }
    report("a dependency outside its room", &broken);
}

#[test]
fn nothing_is_left_unfinished_and_files_stay_readable() {
    let mut broken = Vec::new();
    for (file, text) in ["src", "tests", "benches"].iter().flat_map(|f| files(f, ".rs")) {
        if text.lines().count() > MAX_LINES {
            broken.push(format!("{file}: {} lines, at most {MAX_LINES}", text.lines().count()));
        }
        for (i, line) in code(&text) {
            let macros = ["todo", "unimplemented", "dbg"].map(|m| format!("{m}!("));
            if macros.iter().any(|m| line.contains(m)) {
                broken.push(format!("{file}:{i}: {}", line.trim()));
            }
        }
    }
    report("unfinished or too long", &broken);
}

#[test]
fn every_operation_has_its_kernel_test_and_benchmark() {
    let mut broken = Vec::new();
    for (file, _) in files("src/ops", ".rs") {
        let stem = Path::new(&file).file_stem().unwrap().to_string_lossy().into_owned();
        if stem == "mod" || EXEMPT.iter().any(|(s, why)| *s == stem && !why.is_empty()) {
            continue;
        }
        for place in ["src/backend/cpu", "tests"] {
            let at = |name: String| root().join(place).join(name).exists();
            if !at(format!("{stem}.rs")) && !at(stem.clone()) {
                broken.push(format!("{stem}: not in {place}"));
            }
        }
        // The passes over memory share a file.
        if !files("benches", ".rs").iter().any(|(_, text)| has_word(text, &stem)) {
            broken.push(format!("{stem}: not in benches"));
        }
    }
    report("one stem, one file in each place", &broken);
}

/// `autotests` is off, so a file that nobody names would silently not run.
#[test]
fn every_test_and_benchmark_file_runs() {
    let mut broken = Vec::new();
    for folder in ["tests", "benches"] {
        let main = std::fs::read_to_string(root().join(folder).join("main.rs")).unwrap();
        for (file, _) in files(folder, ".rs") {
            let rest = &file[folder.len() + 1..];
            let stem = rest.trim_end_matches(".rs").split('/').next().unwrap();
            // A crate of its own, with tests that cargo finds.
            if file.starts_with("tests/ptxsim/") {
                continue;
            }
            if stem != "main" && !main.lines().any(|l| l.trim() == format!("mod {stem};")) {
                broken.push(file);
            }
        }
    }
    report("not in main.rs", &broken);
}

#[test]
fn the_readme_speaks_of_every_command_and_is_no_medical_advice() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let commands = std::fs::read_to_string(root().join("src/cli/mod.rs")).unwrap();
    let commands = commands.split("enum Command {").nth(1).and_then(|s| s.split('}').next()).unwrap();
    let variants: Vec<&str> = commands.lines().filter_map(|l| l.trim().split_once('(')).map(|(name, _)| name).collect();
    assert!(variants.len() > 15, "{variants:?}");
    for variant in variants {
        let kebab = |c: char| if c.is_uppercase() { format!("-{}", c.to_lowercase()) } else { c.to_string() };
        let command: String = variant.chars().map(kebab).collect();
        let command = command.trim_start_matches('-');
        assert!(readme.contains(&format!("stunet {command}")), "README.md does not mention stunet {command}");
    }
    assert!(readme.to_lowercase().contains("not a medical device"));
}

/// A path of one machine is of no use on another.
#[test]
fn no_path_of_one_machine() {
    let folders = ["work", "root", "home"].map(|f| format!("/{f}/"));
    let mut all: Vec<(String, String)> =
        ["src", "tests", "benches", ".ci", "kernels", "ptx"].iter().flat_map(|f| files(f, "")).collect();
    for name in ["README.md", "Cargo.toml"] {
        all.push((name.into(), std::fs::read_to_string(root().join(name)).unwrap()));
    }
    let mut broken = Vec::new();
    for (file, text) in all {
        for (i, line) in text.lines().enumerate() {
            if folders.iter().any(|f| line.contains(&format!(" {f}")) || line.contains(&format!("\"{f}"))) {
                broken.push(format!("{file}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    report("a path of one machine", &broken);
}

/// What cargo-deny would say, with nothing to install: every crate of this platform carries a licence of `deny.toml`.
#[test]
fn licences_are_allowed() {
    let deny = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let list = deny.split("allow = [").nth(1).and_then(|s| s.split(']').next()).expect("deny.toml: allow");
    let allowed: Vec<&str> = list.split(',').map(|s| s.trim().trim_matches('"')).filter(|s| !s.is_empty()).collect();
    let mut command = std::process::Command::new(std::env::var("CARGO").unwrap_or("cargo".into()));
    command.args(["metadata", "--format-version", "1", "--offline", "--locked", "--filter-platform"]);
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let out = command.arg(triple).current_dir(root()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let meta: Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages = meta["packages"].as_array().unwrap();
    assert!(packages.len() > 50);
    let mut broken = Vec::new();
    for p in packages {
        let licence = p["license"].as_str().unwrap_or("");
        if !fits(licence, &allowed) {
            broken.push(format!("{} {}: {licence:?}", p["name"], p["version"]));
        }
    }
    report("licence not in deny.toml", &broken);
}

/// Whether an SPDX expression can be met with `allowed`: `/` and OR are choices, AND are duties.
fn fits(expression: &str, allowed: &[&str]) -> bool {
    let e = expression.trim();
    for (word, all) in [(" AND ", true), (" OR ", false), ("/", false)] {
        let parts = split_outside_parentheses(e, word);
        if parts.len() > 1 {
            return if all { parts.iter().all(|p| fits(p, allowed)) } else { parts.iter().any(|p| fits(p, allowed)) };
        }
    }
    match e.strip_prefix('(').and_then(|e| e.strip_suffix(')')) {
        Some(inner) => fits(inner, allowed),
        None => allowed.contains(&e),
    }
}

fn split_outside_parentheses<'a>(e: &'a str, word: &str) -> Vec<&'a str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in e.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && e[i..].starts_with(word) => {
                parts.push(&e[start..i]);
                start = i + word.len();
            }
            _ => {}
        }
    }
    parts.push(&e[start..]);
    parts
}

#[test]
fn licence_expressions_are_understood() {
    let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"];
    for good in ["MIT", "MIT/Apache-2.0", "GPL-3.0 OR MIT", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert!(fits(good, &allowed), "{good}");
    }
    for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND MPL-2.0"] {
        assert!(!fits(bad, &allowed), "{bad}");
    }
}
