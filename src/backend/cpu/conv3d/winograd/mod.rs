//! Convolution with fewer products: minimal filtering along all three axes at once ([`axis`]).
//!
//! A block of tiles goes through four passes ([`transform`], [`gemm`]): inputs along z, then plane by plane the inputs in
//! the plane, the products, and the outputs in the plane, and last the outputs along z. Small filters are transformed
//! once, and every thread takes blocks of its own that stay in its caches. For deep layers, which have many channels and
//! few voxels, the threads share one large block and divide channels instead: first inputs, then outputs, whose filters
//! they transform as they go.
//!
//! An output that replaces its input waits in a ring until that is no longer read ([`ring`]).
//!
//! Normalisation and leaky ReLU of the input happen while it is read, nearest upsampling is a matter of addresses, and
//! the sums for the next normalisation are taken while the output is written.

mod axis;
mod filter;
mod gemm;
mod plan;
mod ring;
mod run;
mod transform;
mod weight;
mod window;

pub(in crate::backend::cpu) use filter::prepare;
pub(in crate::backend::cpu) use plan::{Plan, Scheme};
pub(in crate::backend::cpu) use run::run;
pub(in crate::backend::cpu) use weight::{WeightPlan, weight_gradient};
