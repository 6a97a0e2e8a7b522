//! All tests in one binary, one file per subject: `cargo test --test all conv3d`.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod common;

mod add;
mod augment;
mod augment_draws;
mod autograd;
mod avg_pool;
mod bad_dataset;
mod bad_input;
mod blur;
mod cascade;
mod checkpoint;
mod cli;
mod cohort;
mod conv3d;
mod conv3d_fused;
mod conv3d_grad;
mod conv_transpose3d;
mod determinism;
mod ensemble;
mod evaluate;
mod golden_pipeline;
mod golden_pipeline_preprocessed;
mod golden_plans;
mod golden_predict;
mod golden_preprocess;
mod golden_train;
mod golden_v1;
mod head_labels;
mod init;
mod instance_norm;
mod instance_norm_grad;
mod intensity;
#[cfg(feature = "cuda")]
mod kernels;
mod label_system;
mod leaky_relu;
mod loader;
mod loss;
mod low_resolution;
mod model_folder;
mod models;
mod networks;
mod nifti;
mod optim;
mod params;
mod phantom;
#[cfg(feature = "natural")]
mod picture;
#[cfg(feature = "natural")]
mod planar;
mod planner;
mod postprocess;
mod prepare;
mod preprocess;
mod preprocess_dataset;
mod pth;
mod ptx;
mod reference;
mod resample;
mod select;
mod share;
mod storage;
mod store;
mod tidy;
mod train;
mod train_memory;
#[cfg(feature = "cuda")]
mod train_on_card;
mod training;
mod upsample_nearest;
mod v1;
mod volume;
mod warp;
