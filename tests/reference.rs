//! Training in plain f64: operations, losses, optimiser and networks, written from their definitions with nothing of the
//! product; proved against finite differences and against the reference data.

mod conv;
pub mod golden;
mod gradients;
pub mod kinks;
pub mod loss;
pub mod net;
mod ops;
pub mod sgd;
pub mod tape;
