//! Floor 4: one file per operation: documentation, shape rule, forward.
