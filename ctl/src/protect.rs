//! `romulus protect` and `romulus wait`: start the protection of a VM, and see it through.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use romulus_config::{Guest, Replicator, Settings as _, vm_path};
use romulus_types::VmId;
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{AdminOptions, GuestOptions, ProtectOptions, WaitOptions};
use crate::daemons::{self, Answered, RUN_DIR};
use crate::exit;

/// systemd runs this host when this is there (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";
/// Time from one look at the status to the next.
const INTERVAL: Duration = Duration::from_millis(200);

/// `romulus protect`.
pub(crate) async fn protect(options: ProtectOptions) -> anyhow::Result<u8> {
    let unit = format!("romulus-replicator@{}.service", options.vm);
    if !Path::new(SYSTEMD).exists() {
        bail!("{}", by_hand(&options.vm, "this host is not run by systemd"));
    }
    if !systemctl(&["cat", &unit])?.0 {
        bail!("{}", by_hand(&options.vm, &format!("there is no unit {unit}")));
    }
    describe(&vm_path(&options.vm), &options.guest)?;
    let (started, said) = systemctl(&["start", &unit])?;
    if !started {
        bail!(
            "{unit} did not start: {}\nnext: journalctl -u {unit}",
            said.trim()
        );
    }
    if options.no_wait {
        if options.json {
            println!("{}", json!({"schema": 1, "vm": options.vm, "started": true}));
        } else {
            println!(
                "{} is being protected; next: romulus wait {}",
                options.vm, options.vm
            );
        }
        return Ok(exit::OK);
    }
    let socket = Path::new(RUN_DIR).join(format!("replicator-{}.sock", options.vm));
    let unit_runs = || systemctl(&["is-active", "--quiet", &unit]).is_ok_and(|(active, _)| active);
    let look = async || match daemons::get(&socket, "/v1/status").await {
        Ok(status) => Ok(Some(status)),
        // It may not have made its socket yet.
        Err(_) if unit_runs() => Ok(None),
        Err(error) => Err(error).context(format!("{unit} has ended; next: journalctl -u {unit}")),
    };
    see_through(options.timeout, options.json, look).await
}

/// Writes the VM's file when the command line describes the guest; without that the file has to be there. One that is there is
/// the operator's, and is not written over.
fn describe(file: &Path, options: &GuestOptions) -> anyhow::Result<()> {
    let guest = Guest {
        qmp: options.qmp.clone(),
        attach: options.attach.clone(),
        taps: options.taps.clone(),
        disposable: options.disposable.clone(),
        register: options.register,
    };
    let there = file.exists() || file.with_extension("d").exists();
    if guest == Guest::default() {
        if there {
            return Ok(());
        }
        bail!(
            "there is no {}: say how the guest is reached, with --qmp or --attach and --tap, or write that file",
            file.display()
        );
    }
    if guest.qmp.is_none() && guest.attach.is_none() {
        bail!("name the guest's hypervisor: --qmp or --attach");
    }
    let text = format!(
        "# Written by `romulus protect`.\n{}",
        toml::to_string(&Own { vm: &guest }).context("the guest can't be described")?
    );
    if there {
        if std::fs::read_to_string(file).is_ok_and(|found| found == text) {
            return Ok(());
        }
        bail!(
            "{} describes the VM already: change it there, or remove it, and leave --qmp, --attach, --tap, --disposable and \
             --register away",
            file.display()
        );
    }
    toml::from_str::<Replicator>(&text)
        .map_err(anyhow::Error::from)
        .and_then(|settings| Ok(settings.check()?))
        .context("the guest can't be reached like this")?;
    let written = std::fs::File::create_new(file).and_then(|mut made| made.write_all(text.as_bytes()));
    written.with_context(|| format!("could not write {}", file.display()))?;
    eprintln!("wrote {}", file.display());
    Ok(())
}

/// The file of a VM.
#[derive(Serialize)]
struct Own<'g> {
    vm: &'g Guest,
}

fn by_hand(vm: &VmId, why: &str) -> String {
    format!(
        "{why}: start the replicator yourself, with the guest's monitor and all its taps:\n  \
         replicator protect --vm {vm} --qmp SOCKET --tap TAP      (QEMU)\n  \
         replicator protect --vm {vm} --attach SOCKET --tap TAP   (a VMM with the attach library)\n\
         and then: romulus wait {vm}"
    )
}

/// Whether it succeeded, and what it said.
fn systemctl(arguments: &[&str]) -> anyhow::Result<(bool, String)> {
    let output = Command::new("systemctl")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("systemctl can't be run")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.success(), said))
}

/// `romulus wait`.
pub(crate) async fn wait(options: WaitOptions) -> anyhow::Result<u8> {
    let admin = options.admin.clone();
    let look = async || of_vm(&admin).await;
    see_through(options.timeout, options.admin.json, look).await
}

/// The status of the VM that is meant: at its replicator if that is here, else at the agent. `None` while it is not there.
async fn of_vm(options: &AdminOptions) -> anyhow::Result<Option<Value>> {
    let mut found: Vec<Value> = Vec::new();
    for Answered { answer, .. } in daemons::ask_all(options, "/v1/status").await? {
        let Ok(status) = answer else { continue };
        let wanted = daemons::vms(&status).into_iter();
        found.extend(wanted.filter(|vm| daemons::is_wanted(vm, options.vm())).cloned());
    }
    if found.iter().any(|vm| vm["role"] == "primary") {
        found.retain(|vm| vm["role"] == "primary");
    }
    if found.len() > 1 && options.vm().is_none() {
        bail!("several VMs are here: name one");
    }
    Ok(found.pop())
}

/// Looks until the VM is protected, with a bar for the copy of its memory.
async fn see_through(
    limit: Duration,
    json: bool,
    look: impl AsyncFn() -> anyhow::Result<Option<Value>>,
) -> anyhow::Result<u8> {
    let began = Instant::now();
    let bar = if json { ProgressBar::hidden() } else { bar() };
    loop {
        let status = look().await?;
        let shown = status.as_ref().map(progress).unwrap_or_default();
        bar.set_length(shown.of_bytes);
        bar.set_position(shown.bytes);
        bar.set_message(shown.words.clone());
        bar.tick();
        let late = began.elapsed() >= limit;
        if !shown.protected && !late {
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        bar.finish_and_clear();
        if json {
            println!(
                "{}",
                serde_json::to_string_pretty(
                    &json!({"schema": 1, "protected": shown.protected, "status": status})
                )?
            );
        } else {
            println!("{}", shown.words);
        }
        return Ok(if shown.protected {
            exit::OK
        } else {
            exit::NOT_PROTECTED
        });
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {eta}")
        .expect("the template is fixed");
    ProgressBar::no_length().with_style(style)
}

/// How far a VM is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    protected: bool,
    words: String,
    bytes: u64,
    of_bytes: u64,
}

fn progress(vm: &Value) -> Progress {
    let name = vm["vm"].as_str().unwrap_or("?");
    let pages = |field: &str| vm["first_copy"][field].as_u64().unwrap_or(0);
    let protected = vm["state"] == "protected";
    let words = match (protected, vm["reason"].as_str(), vm["detail"].as_str()) {
        (true, ..) => format!("{name}: Protected"),
        (false, Some(reason), Some(detail)) => format!("{name}: Not protected ({reason}: {detail})"),
        (false, reason, _) => format!("{name}: Not protected ({})", reason.unwrap_or("starting")),
    };
    Progress {
        protected,
        words,
        bytes: pages("pages") << 12,
        of_bytes: pages("of_pages") << 12,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vms_file_is_written_once_and_an_operators_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.toml");
        let options = |qmp: Option<&str>, tap: &str| GuestOptions {
            qmp: qmp.map(Into::into),
            attach: None,
            taps: [tap]
                .into_iter()
                .filter(|tap| !tap.is_empty())
                .map(str::to_owned)
                .collect(),
            disposable: Vec::new(),
            register: qmp.is_some(),
        };
        let error = describe(&file, &options(None, "")).unwrap_err().to_string();
        assert!(error.contains("--qmp") && error.contains("web.toml"), "{error}");
        for bad in [
            options(None, "tap0"),
            options(Some("/run/q"), "no tap"),
            options(Some("q"), "tap0"),
        ] {
            describe(&file, &bad).unwrap_err();
            assert!(!file.exists());
        }
        let good = options(Some("/run/q"), "tap0");
        describe(&file, &good).unwrap();
        let settings: Replicator = toml::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!(settings.vm.qmp.as_deref(), Some(Path::new("/run/q")));
        assert_eq!(
            (settings.vm.taps, settings.vm.register),
            (vec!["tap0".to_owned()], true)
        );
        // The same words again, and none, both go on with it; others do not.
        describe(&file, &good).unwrap();
        describe(&file, &options(None, "")).unwrap();
        let error = describe(&file, &options(Some("/run/q"), "tap1")).unwrap_err();
        assert!(error.to_string().contains("already"), "{error}");
    }

    #[test]
    fn progress_is_of_the_copy_in_bytes_and_says_what_is_waited_for() {
        let vm = json!({"vm": "web", "state": "not_protected", "reason": "resynchronising",
            "first_copy": {"pages": 256, "of_pages": 1024}});
        let shown = progress(&vm);
        assert_eq!(
            (shown.bytes, shown.of_bytes, shown.protected),
            (1 << 20, 4 << 20, false)
        );
        assert_eq!(shown.words, "web: Not protected (resynchronising)");
        assert!(progress(&json!({"vm": "web", "state": "protected"})).protected);
    }

    #[tokio::test]
    async fn a_wait_ends_when_the_vm_is_protected_and_says_so_when_its_time_is_over() {
        let looks = std::cell::Cell::new(0);
        let after_two = async || {
            looks.set(looks.get() + 1);
            let state = if looks.get() > 2 {
                "protected"
            } else {
                "not_protected"
            };
            Ok(Some(json!({"vm": "web", "state": state, "reason": "starting"})))
        };
        let hour = Duration::from_secs(3600);
        assert_eq!(see_through(hour, true, after_two).await.unwrap(), exit::OK);
        let never = async || Ok(None);
        assert_eq!(
            see_through(Duration::ZERO, true, never).await.unwrap(),
            exit::NOT_PROTECTED
        );
        let gone = async || bail!("ended");
        assert!(see_through(hour, true, gone).await.is_err());
    }

    #[test]
    fn without_systemd_the_command_to_run_is_printed() {
        let text = by_hand(&VmId::new("web").unwrap(), "no unit");
        assert!(text.contains("replicator protect --vm web --qmp"), "{text}");
    }
}
