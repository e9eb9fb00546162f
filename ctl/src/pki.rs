//! `romulus pki`: certificates in QEMU's directory layout.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use romulus_config::PKI_DIR;
use romulus_transport::pki::{CA_DIR, HostNames, Report, Validity, check, init, issue, renew};
use romulus_types::HostId;
use serde_json::{Value, json};

use crate::args::{AdminOptions, PkiCommand, PkiInit, PkiRenew};
use crate::daemons::{self, Answered};
use crate::exit;

/// Name in the authority's certificate.
const CA_NAME: &str = "Romulus";
/// How long the authority is valid: ten years.
const CA_DAYS: u32 = 3650;

/// Runs a `pki` verb.
pub(crate) async fn run(command: PkiCommand) -> anyhow::Result<u8> {
    match command {
        PkiCommand::Init(options) => {
            make_authority(&options.dir)?;
            make_hosts(&options)
        }
        PkiCommand::Issue(options) => make_hosts(&options),
        PkiCommand::Check { dirs, json } => report_all(dirs, json),
        PkiCommand::Renew(options) => renew_hosts(&options),
        PkiCommand::Reload(options) => reload(&options).await,
    }
}

fn make_authority(dir: &Path) -> anyhow::Result<()> {
    let ca = dir.join(CA_DIR);
    if ca.exists() {
        println!("using the authority in {}", ca.display());
        return Ok(());
    }
    init(dir, CA_NAME, Validity::days(CA_DAYS)?)
        .with_context(|| format!("could not make an authority in {}", dir.display()))?;
    println!("made {} (keep ca-key.pem off the hosts)", ca.display());
    Ok(())
}

fn make_hosts(options: &PkiInit) -> anyhow::Result<u8> {
    let hosts: Vec<HostNames> = options
        .hosts
        .iter()
        .map(|text| text.parse())
        .collect::<Result<_, _>>()?;
    let validity = Validity::days(options.days)?;
    for host in &hosts {
        let folder = issue(&options.dir, host, validity)?;
        println!(
            "made {}: copy it to {} as its pki_dir",
            folder.display(),
            host.host
        );
    }
    Ok(exit::OK)
}

fn renew_hosts(options: &PkiRenew) -> anyhow::Result<u8> {
    let hosts = if options.hosts.is_empty() {
        all_hosts(&options.dir)?
    } else {
        options.hosts.iter().map(HostId::new).collect::<Result<_, _>>()?
    };
    if hosts.is_empty() {
        bail!(
            "{} has no host's folder: `romulus pki issue` makes one",
            options.dir.display()
        );
    }
    let validity = Validity::days(options.days)?;
    for host in &hosts {
        let folder = renew(&options.dir, host, validity)?;
        println!(
            "renewed {}: copy it to {host}, and there: romulus pki reload",
            folder.display()
        );
    }
    Ok(exit::OK)
}

/// The folders beside the authority's that are named like a host.
fn all_hosts(dir: &Path) -> anyhow::Result<Vec<HostId>> {
    let unreadable = || format!("could not read {}", dir.display());
    let mut hosts = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(unreadable)? {
        let entry = entry.with_context(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && name != CA_DIR {
            hosts.extend(HostId::new(name));
        }
    }
    hosts.sort();
    Ok(hosts)
}

fn report_all(dirs: Vec<PathBuf>, as_json: bool) -> anyhow::Result<u8> {
    let dirs = if dirs.is_empty() {
        vec![PKI_DIR.into()]
    } else {
        dirs
    };
    let reports: Vec<_> = dirs.iter().map(|dir| (dir, check(dir))).collect();
    if as_json {
        let folders: Vec<Value> = reports
            .iter()
            .map(|(dir, result)| match result {
                Ok(report) => json_report(dir, report),
                Err(error) => json!({"dir": dir, "ok": false, "error": error.to_string()}),
            })
            .collect();
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({"schema": 1, "folders": folders}))?
        );
    } else {
        for (dir, result) in &reports {
            match result {
                Ok(report) => print_report(dir, report),
                Err(error) => println!("{}: not good: {error}", dir.display()),
            }
        }
    }
    let good = |result: &Result<Report, _>| result.as_ref().is_ok_and(|report| report.warnings.is_empty());
    Ok(if reports.iter().all(|(_, result)| good(result)) {
        exit::OK
    } else {
        exit::TO_MEND
    })
}

fn json_report(dir: &Path, report: &Report) -> Value {
    let time = |time| humantime::format_rfc3339_seconds(time).to_string();
    let files: Vec<Value> = report
        .files
        .iter()
        .map(|file| {
            json!({"file": file.file, "names": file.names, "not_before": time(file.not_before), "not_after": time(file.not_after)})
        })
        .collect();
    json!({"dir": dir, "ok": report.warnings.is_empty(), "host": report.host, "files": files, "warnings": report.warnings})
}

fn print_report(dir: &Path, report: &Report) {
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
}

async fn reload(options: &AdminOptions) -> anyhow::Result<u8> {
    let mut failed = false;
    let mut answers = Vec::new();
    for Answered { socket, .. } in daemons::ask_all(options, "/v1/status").await? {
        let answer = daemons::post(&socket, "/v1/reload-certificates").await;
        let error = match &answer {
            Ok(answer) => answer["error"].as_str().map(str::to_owned),
            Err(error) => Some(format!("{error:#}")),
        };
        failed |= error.is_some();
        if !options.json {
            match &error {
                None => println!("{}: reads them from now on", socket.display()),
                Some(error) => println!("{}: {error}", socket.display()),
            }
        }
        answers.push(json!({"socket": socket, "ok": error.is_none(), "error": error}));
    }
    if options.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({"schema": 1, "daemons": answers}))?
        );
    }
    Ok(if failed { exit::FAILED } else { exit::OK })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn hosts_are_issued_checked_and_renewed_all_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let options = |hosts: &[&str], days| PkiInit {
            dir: dir.path().to_owned(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            days,
        };
        run(PkiCommand::Init(options(&["a,10.0.0.1"], 5))).await.unwrap();
        run(PkiCommand::Issue(options(&["b"], 5))).await.unwrap();
        let folders = || vec![dir.path().join("a"), dir.path().join("b")];
        let checked = |json| report_all(folders(), json).unwrap();
        assert_eq!((checked(false), checked(true)), (exit::TO_MEND, exit::TO_MEND));
        let all = PkiRenew {
            dir: dir.path().to_owned(),
            hosts: vec![],
            days: 300,
        };
        run(PkiCommand::Renew(all)).await.unwrap();
        assert_eq!(checked(true), exit::OK);
        assert_eq!(
            report_all(vec![dir.path().join("c")], true).unwrap(),
            exit::TO_MEND
        );
        assert!(
            run(PkiCommand::Issue(options(&["b"], 5))).await.is_err(),
            "b is there already"
        );
    }
}
