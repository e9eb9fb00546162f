//! Huge pages under the memory of an image that is whole, for the guest that may come to run on it.
//!
//! A thread of its own does it, at ordinary priority, beside the commits: it changes no content, and nothing waits for it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use romulus_host_sys::{HugePages, priority, use_huge_pages};
use serde_json::json;
use tracing::{info, warn};

use crate::status::VmStatus;

/// Begins to put these files onto huge pages; how it went is an event.
pub fn begin(ram: Vec<PathBuf>, status: Arc<VmStatus>) {
    let vm = status.vm().to_owned();
    let work = move || {
        priority::lower();
        match of_all(&ram) {
            Ok(HugePages { huge, left }) => {
                info!(event = "huge_pages", vm = status.vm(), huge, left);
                status.event("huge_pages", &json!({"huge": huge, "left": left}));
            }
            Err(error) => {
                let error = format!("{error:#}");
                warn!(event = "huge_pages", vm = status.vm(), error);
                status.event("huge_pages", &json!({"error": error}));
            }
        }
    };
    let thread = std::thread::Builder::new().name(format!("huge-{vm}"));
    if let Err(error) = thread.spawn(work) {
        warn!(%error, vm, "the image stays on small pages");
    }
}

fn of_all(ram: &[PathBuf]) -> anyhow::Result<HugePages> {
    let mut sum = HugePages::default();
    for path in ram {
        let HugePages { huge, left } = of_one(path).with_context(|| path.display().to_string())?;
        sum.huge += huge;
        sum.left += left;
    }
    Ok(sum)
}

fn of_one(path: &Path) -> anyhow::Result<HugePages> {
    let file = File::options().read(true).write(true).open(path)?;
    Ok(use_huge_pages(&file)?)
}
