//! Runs the command line.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What a run of the program left behind.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// Runs `stunet` with `args` in `folder`, without nnU-Net's variables of this machine.
pub fn stunet_in<S: AsRef<std::ffi::OsStr>>(folder: &Path, args: &[S]) -> Ran {
    stunet_with(folder, args, &[])
}

/// As [`stunet_in`], with environment variables.
pub fn stunet_with<S: AsRef<std::ffi::OsStr>>(folder: &Path, args: &[S], env: &[(&str, &Path)]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stunet"));
    command.args(args).current_dir(folder);
    for name in ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"] {
        command.env_remove(name);
    }
    command.envs(env.iter().copied());
    let out = command.output().expect("the program starts");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    // Without a code the program was killed by a signal.
    Ran { code: out.status.code().unwrap_or(-1), out: text(&out.stdout), err: text(&out.stderr) }
}

/// Runs `stunet` somewhere.
pub fn stunet<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ran {
    stunet_in(&std::env::temp_dir(), args)
}

impl Ran {
    /// The only line of standard error, which has to be an error, after the run ended with `code`.
    #[track_caller]
    pub fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.out, self.err);
        assert!(!self.err.contains("panicked"), "{}", self.err);
        let errors: Vec<&str> = self.err.lines().filter(|l| !l.starts_with("warning: ")).collect();
        assert_eq!(errors.len(), 1, "one line expected: {}", self.err);
        errors[0].strip_prefix("error: ").unwrap_or_else(|| panic!("no error line: {}", self.err))
    }

    /// Standard output of a run that went well.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.out, self.err);
        &self.out
    }
}

/// Every file below `folder`, sorted.
pub fn tree(folder: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { out.extend(tree(&path)) } else { out.push(path) }
    }
    out.sort();
    out
}
