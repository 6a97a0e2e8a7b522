//! Floor 1, side room: files to host data and back. Knows no model, no plan, and no device but the host.

pub mod atomic;
pub(crate) mod b2nd;
pub(crate) mod boxes;
pub mod image;
pub mod nifti;
pub(crate) mod npy;
pub mod npz;
#[cfg(feature = "natural")]
pub mod picture;
pub(crate) mod pth;
pub(crate) mod sealed;
pub mod weights;
pub(crate) mod zipped;

pub use image::{Geometry, Image, LabelData, Segmentation};
pub use nifti::{
    ReadOptions, read_nifti, read_nifti_header, read_nifti_with, read_segmentation, write_image, write_nifti,
};
pub use npz::write_npz;
#[cfg(feature = "natural")]
pub use picture::{picture_grid, picture_size, read_pictures, read_tiff_stacks, write_picture, write_tiff_stack};
