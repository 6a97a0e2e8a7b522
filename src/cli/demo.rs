//! `stunet demo`.
use stunet::Result;

/// Demo
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: &Args) -> Result<()> {
    Ok(())
}
