//! `stunet bench`.
use stunet::Result;

/// Bench
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: &Args) -> Result<()> {
    Ok(())
}
