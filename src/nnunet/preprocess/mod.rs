//! Crop, normalise, resample.
