//! Programs of Debian at work, over and over, and what was done so far.
//!
//! A round is one run of the program. It counts when the program ended well and what it made is what it has to be: a guest that lost
//! a page says so instead of going on.

mod compile;
mod redis;
mod sqlite;
mod stress;

use std::error::Error;
use std::io::Write as _;
use std::process::{Command, Stdio};

/// Something that can be done again and again.
trait Program {
    /// Does some of it, and returns how many units that were.
    fn round(&mut self) -> Result<u64, Box<dyn Error>>;
}

/// Runs the program of this name for ever.
pub(crate) fn run(name: &str) -> Result<(), Box<dyn Error>> {
    let done = go_on(name);
    if let Err(error) = &done {
        crate::say(&format!("work BAD {name}: {error}"))?;
    }
    done
}

fn go_on(name: &str) -> Result<(), Box<dyn Error>> {
    let mut program: Box<dyn Program> = match name {
        "compile" => Box::new(compile::Compile::begin()?),
        "redis-benchmark" => Box::new(redis::Benchmark::begin()?),
        "sqlite" => Box::new(sqlite::Bank::open()?),
        "stress-ng" => Box::new(stress::Stress),
        _ => return Err(format!("guest-tool: there is no program {name:?} to work with").into()),
    };
    let mut units = 0_u64;
    loop {
        units += program.round()?;
        crate::say(&format!("work {name} {units}"))?;
    }
}

/// Runs a command that reads `input`, and returns what it printed.
fn output(command: &mut Command, input: &str) -> Result<String, Box<dyn Error>> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().ok_or("a child without a pipe")?;
    // None of them prints before it has read everything, so neither waits for the other.
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let out = child.wait_with_output()?;
    if !out.status.success() {
        return Err(format!(
            "{:?} ended with {}: {}",
            command.get_program(),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        )
        .into());
    }
    Ok(String::from_utf8(out.stdout)?)
}
