//! STU-Net and nnU-Net from scratch: 3D medical image segmentation without Python or PyTorch.
//!
//! Research software. **Not a medical device**; not for diagnosis.
//!
//! ```no_run
//! use stunet::{Device, Predictor, io};
//!
//! # fn main() -> stunet::Result<()> {
//! let device = Device::best();
//! let mut predictor = Predictor::open("models/stunet_base", &device)?; // loaded once, for many images
//! let image = io::read_nifti(&["ct_0000.nii.gz"])?; // one file per channel
//! let segmentation = predictor.predict(&image)?;
//! println!("{:.1} ml of label 5", segmentation.volume_ml(5));
//! io::write_nifti("ct_seg.nii.gz", &segmentation)
//! # }
//! ```
//!
//! The pipeline's types stand at the root; [`nnunet`] holds its parts, [`io`] the files. The engine below
//! ([`tensor`], [`autograd`], [`ops`], [`nn`], [`models`]) is documented and may change in a minor version before 1.0.

pub mod autograd;
pub(crate) mod backend;
pub mod base;
pub mod demo;
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

#[cfg(feature = "cuda")]
#[doc(hidden)]
pub use backend::testing as backend_testing;
pub use base::progress::{Event, Flow, Progress};
pub use error::{Error, Result};
pub use io::{Geometry, Image, Segmentation};
pub use nnunet::model::{Folds, ModelOptions};
pub use nnunet::plans::{Decision, InferencePlan};
pub use nnunet::predict::{Mode, PredictOptions, Prediction, Predictor, Probabilities, Report};
pub use tensor::{Device, Isa, Precision};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
