//! `stunet completions`.

use clap::CommandFactory;
use clap_complete::Shell;
use stunet::Result;

use super::{Cli, output};

/// Print the completion script of a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet completions bash > /etc/bash_completion.d/stunet
  stunet completions fish > ~/.config/fish/completions/stunet.fish")]
pub(super) struct Args {
    /// The shell
    shell: Shell,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "stunet", &mut script);
    output::text(&String::from_utf8_lossy(&script))
}
