//! The command line. All logic is in the library.

fn main() {}
