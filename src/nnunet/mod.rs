//! Floor 7: the nnU-Net pipeline, in the order it runs.

pub mod augment;
pub mod cases;
pub mod checkpoint;
pub mod loader;
pub mod lookup;
pub mod loss;
pub mod model;
pub mod plans;
mod postprocess;
pub mod predict;
pub mod preprocess;
pub mod report;
#[doc(hidden)]
pub mod testing;
pub mod training_case;
