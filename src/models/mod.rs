//! Floor 6: the networks. Knows no files, plans or patches.

mod config;
mod stunet;

pub use config::StuNetConfig;
pub use stunet::{Head, StuNet};
