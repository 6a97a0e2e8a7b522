//! Floor 7: the nnU-Net pipeline, in the order it runs.

pub mod augment;
pub mod cases;
pub mod checkpoint;
pub mod dataset;
pub mod ensemble;
pub mod evaluate;
pub mod fingerprint;
pub(crate) mod json;
pub mod label_system;
pub mod labels;
pub mod loader;
pub mod lookup;
pub mod loss;
pub mod model;
pub mod planner;
pub mod plans;
pub mod postprocess;
pub mod predict;
pub mod preprocess;
pub mod report;
pub mod select;
pub mod split;
pub mod store;
#[doc(hidden)]
pub mod testing;
pub mod train;
pub mod training_case;
pub mod volume;
pub(crate) mod workers;
