//! Floor 6: the networks. Knows no files, plans or patches.

mod config;
mod heads;
mod network;
mod plain_unet;
mod res_enc_unet;
mod stunet;
mod unet;
mod unet_config;
mod unet_names;

pub use config::StuNetConfig;
pub use heads::{Head, Scored};
pub use network::{Network, NetworkConfig};
pub use stunet::StuNet;
pub use unet::Unet;
pub use unet_config::{UnetConfig, UnetKind};
pub(crate) use unet_names::STEM;
