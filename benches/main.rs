//! Benchmarks, one file per subject: `cargo bench -- conv3d`.

fn main() {}
