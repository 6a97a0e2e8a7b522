//! Named tensors in a memory-mapped file.
