//! Floor 6: the networks. Knows no files, plans or patches.

mod config;
mod random;
mod stunet;

pub use config::StuNetConfig;
pub use random::RandomParams;
pub use stunet::{Head, StuNet};
