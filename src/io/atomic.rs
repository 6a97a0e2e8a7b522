//! Whole files or none: write to a temporary name, flush, sync, rename.
