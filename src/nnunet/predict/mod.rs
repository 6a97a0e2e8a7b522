//! From image to segmentation.
