//! Benchmarks, one file per operation or step of the pipeline: `cargo bench -- conv3d`.
//!
//! Beside criterion's times, every line names the rate and its share of what this machine reached in the same run: of
//! multiply-adds in registers for arithmetic, of an in-place pass over memory for the rest.
#![allow(missing_docs, unreachable_pub, reason = "benchmark code")]

mod common;
mod conv3d;
mod conv3d_grad;
mod conv_transpose3d;
mod export;
mod head_labels;
mod instance_norm;
mod labels;
mod loader;
mod loss;
mod nifti;
mod passes;
mod preprocess;
mod resample;
mod volume;

criterion::criterion_group!(
    all,
    conv3d::bench,
    conv3d_grad::bench,
    conv_transpose3d::bench,
    export::bench,
    head_labels::bench,
    instance_norm::bench,
    labels::bench,
    loader::bench,
    loss::bench,
    nifti::bench,
    passes::bench,
    preprocess::bench,
    resample::bench,
    volume::bench
);
criterion::criterion_main!(all);
