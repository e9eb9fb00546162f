//! How a daemon says that trying again can't help.

use std::process::ExitCode;

/// As for a command line that can't be parsed: the units do not start a daemon again that ended with it.
const EXIT_SETTINGS: u8 = 2;

/// The context of an error in the settings: another try with the same ones fails, too.
#[derive(Debug)]
pub struct BadSettings;

impl std::fmt::Display for BadSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the settings are not good")
    }
}

/// A daemon's exit code for an error: 2 for [`BadSettings`], 1 for all else.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<BadSettings>() {
        ExitCode::from(EXIT_SETTINGS)
    } else {
        ExitCode::FAILURE
    }
}
