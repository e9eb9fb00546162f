//! `romulus pki`: certificates in QEMU's directory layout.

use std::path::Path;

use anyhow::Context;
use romulus_transport::pki::{HostNames, Validity, check, init, issue};

use crate::args::{PkiCommand, PkiInit};

/// Name in the authority's certificate.
const CA_NAME: &str = "Romulus";
/// How long the authority is valid: ten years.
const CA_DAYS: u32 = 3650;

/// Runs a `pki` verb.
pub(crate) fn run(command: PkiCommand) -> anyhow::Result<()> {
    match command {
        PkiCommand::Init(options) => make(&options),
        PkiCommand::Check { dir } => report(&dir),
    }
}

fn make(options: &PkiInit) -> anyhow::Result<()> {
    let hosts: Vec<HostNames> = options
        .hosts
        .iter()
        .map(|text| text.parse())
        .collect::<Result<_, _>>()?;
    let validity = Validity::days(options.days)?;
    if options.dir.join("ca").exists() {
        println!("using the authority in {}", options.dir.join("ca").display());
    } else {
        init(&options.dir, CA_NAME, Validity::days(CA_DAYS)?)
            .with_context(|| format!("could not make an authority in {}", options.dir.display()))?;
        println!(
            "made {} (keep ca-key.pem off the hosts)",
            options.dir.join("ca").display()
        );
    }
    for host in &hosts {
        let folder = issue(&options.dir, host, validity)?;
        println!(
            "made {}: copy it to {} as its pki_dir",
            folder.display(),
            host.host
        );
    }
    Ok(())
}

fn report(dir: &Path) -> anyhow::Result<()> {
    let report = check(dir)?;
    println!("{}: certificates of {}", dir.display(), report.host);
    for file in &report.files {
        let until = humantime::format_rfc3339_seconds(file.not_after);
        println!(
            "  {} valid until {until}, for {}",
            file.file.display(),
            file.names.join(", ")
        );
    }
    for warning in &report.warnings {
        println!("  warning: {warning}");
    }
    Ok(())
}
