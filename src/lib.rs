//! STU-Net and nnU-Net from scratch: 3D medical image segmentation without Python or PyTorch.
//!
//! Research software. **Not a medical device**; not for diagnosis.

pub mod autograd;
pub(crate) mod backend;
pub mod base;
pub mod error;
pub mod io;
pub mod models;
pub mod nn;
pub mod nnunet;
pub mod ops;
pub mod phantom;
#[cfg(feature = "picture")]
pub mod preview;
pub mod tensor;

pub use base::progress::{Event, Flow, Progress};
pub use error::{Error, Result};
pub use io::{Image, Segmentation};
pub use nnunet::model::{Folds, ModelOptions};
pub use nnunet::predict::{Mode, PredictOptions, Prediction, Predictor, Report};
pub use tensor::{Device, Isa};
