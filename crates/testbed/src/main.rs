//! The program `testbed`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    romulus_testbed::main(std::env::args_os())
}
