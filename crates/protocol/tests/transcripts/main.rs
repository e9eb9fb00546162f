//! Replays the transcripts in `testdata/`: each command is followed by what the machines then do.
//!
//! ```text
//! # a comment
//! run 40ms                  <- a command
//! ----                      <- what follows is the trace that is expected, up to an empty line
//!     1ms primary    ask the witness: read
//! ```
//!
//! `UPDATE_TRANSCRIPTS=1 cargo test -p romulus-protocol --test transcripts` writes the traces anew; read the
//! difference before you commit it. The words of the commands are listed at [`lab::Lab::obey`].
#![forbid(unsafe_code)]

mod lab;
mod tell;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use lab::Lab;

fn replay(text: &str) -> String {
    let mut lab = Lab::new();
    let mut out = String::new();
    let mut in_trace = false;
    for line in text.lines() {
        if in_trace {
            in_trace = !line.trim().is_empty();
            continue;
        }
        if line.trim() == "----" {
            in_trace = true;
            writeln!(out, "----").expect("strings take everything");
            for told in lab.take_trace() {
                writeln!(out, "{told}").expect("strings take everything");
            }
            writeln!(out).expect("strings take everything");
            continue;
        }
        writeln!(out, "{line}").expect("strings take everything");
        if !line.trim().is_empty() && !line.starts_with('#') {
            lab.obey(line.trim());
        }
    }
    format!("{}\n", out.trim_end())
}

fn transcripts() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("testdata is there")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}

#[test]
fn the_machines_do_what_the_transcripts_say() {
    let files = transcripts();
    assert!(files.len() >= 8, "the transcripts are there");
    let mut different = Vec::new();
    for path in files {
        let expected = std::fs::read_to_string(&path).expect("readable");
        let found = replay(&expected);
        if found == expected {
            continue;
        }
        if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
            std::fs::write(&path, found).expect("writable");
        } else {
            different.push(format!("{}:\n{found}", path.display()));
        }
    }
    assert!(
        different.is_empty(),
        "other traces than expected:\n{}",
        different.join("\n")
    );
}
