//! Floor 6: the networks. Knows no files, plans or patches.

mod random;
mod stunet;

pub use random::RandomParams;
pub use stunet::{Head, StuNet, StuNetConfig};
