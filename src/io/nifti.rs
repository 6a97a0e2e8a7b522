//! NIfTI-1 files behind a guard around the `nifti` crate.
