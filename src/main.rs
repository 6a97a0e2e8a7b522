//! The command line of stunet. All logic is in the library.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
