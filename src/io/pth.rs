//! PyTorch files, read without executing anything.
