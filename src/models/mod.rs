//! Floor 6: the networks. Knows no files, plans or patches.

mod config;
mod network;
mod plain_unet;
mod res_enc_unet;
mod stunet;
mod unet;
mod unet_config;

pub use config::StuNetConfig;
pub use network::{Network, NetworkConfig};
pub use stunet::{Head, StuNet};
pub use unet::Unet;
pub use unet_config::{UnetConfig, UnetKind};
