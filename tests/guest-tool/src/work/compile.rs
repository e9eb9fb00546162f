//! `tcc`, compiling one source file. A unit is a compilation.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use super::{Program, output};

const SOURCE: &str = "/tmp/work.c";
const OBJECT: &str = "/tmp/work.o";
/// About 40 KiB of source.
const FUNCTIONS: u32 = 150;

pub(super) struct Compile {
    /// What each compilation has to make.
    object: Vec<u8>,
}

impl Compile {
    pub(super) fn begin() -> Result<Self, Box<dyn Error>> {
        fs::write(SOURCE, source(FUNCTIONS))?;
        Ok(Self { object: compile()? })
    }
}

impl Program for Compile {
    fn round(&mut self) -> Result<u64, Box<dyn Error>> {
        if compile()? != self.object {
            return Err("the same source became another object file".into());
        }
        Ok(1)
    }
}

fn compile() -> Result<Vec<u8>, Box<dyn Error>> {
    // One that is left over must not be taken for a new one.
    let _ = fs::remove_file(OBJECT);
    output(Command::new("tcc").args(["-c", "-o", OBJECT, SOURCE]), "")?;
    Ok(fs::read(OBJECT)?)
}

/// Functions that call each other, with loops, branches and tables.
fn source(functions: u32) -> String {
    let mut text = String::new();
    for number in 0..functions {
        let before = number
            .checked_sub(1)
            .map_or_else(|| "b".to_owned(), |before| format!("step{before}(b, a % 8)"));
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "static int table{number}[16];\n\
             int step{number}(int a, int b) {{\n    \
                 int sum = {before};\n    \
                 for (int i = 0; i < a; i++) {{\n        \
                     table{number}[i % 16] += b ^ {};\n        \
                     if (sum > {}) sum -= table{number}[(i + 3) % 16]; else sum += a * b;\n    \
                 }}\n    \
                 return sum;\n\
             }}",
            number * 7,
            number * 31
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_function_calls_only_one_that_stands_before_it() {
        let text = source(3);
        assert!(text.contains("int sum = b;"), "{text}");
        let (before, after) = text.split_once("int step1(").unwrap();
        assert!(before.contains("int step0(") && after.contains("step0(b, a % 8)"));
        assert!(!text.contains("step2(b"), "{text}");
        assert_eq!(text.matches('{').count(), text.matches('}').count());
    }
}
