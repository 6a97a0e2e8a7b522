//! All tests in one binary, one file per subject: `cargo test --test all conv3d`.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod common;

mod add;
mod bad_input;
mod cli;
mod conv3d;
mod conv3d_fused;
mod conv_transpose3d;
mod determinism;
mod golden_predict;
mod golden_preprocess;
mod golden_v1;
mod head_labels;
mod instance_norm;
#[cfg(feature = "cuda")]
mod kernels;
mod leaky_relu;
mod model_folder;
mod models;
mod nifti;
mod phantom;
mod preprocess;
mod pth;
mod ptx;
mod reference;
mod resample;
mod storage;
mod tidy;
mod upsample_nearest;
