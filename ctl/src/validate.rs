//! `romulus validate`: are the settings files good, and if not, where and why?

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::bail;
use romulus_config::{
    BackupAgent, ConfigError, Replicator, Settings, Witness, default_path, load, load_over,
};
use serde_json::{Value, json};

use crate::args::{Daemon, ValidateOptions};
use crate::exit;

/// The folder of what VMs have of their own.
const VMS: &str = "vms";

/// Runs the checks.
pub(crate) fn run(options: &ValidateOptions) -> anyhow::Result<u8> {
    let files = if options.files.is_empty() {
        shipped_files()
    } else {
        options.files.clone()
    };
    if files.is_empty() {
        bail!(
            "there are no settings in /etc/romulus: every setting has its default; name a FILE to check another"
        );
    }
    let mut results = Vec::new();
    for file in &files {
        let Some(daemon) = options.daemon.or_else(|| daemon_of(file)) else {
            bail!("whose settings are in {}? Say it with --daemon", file.display());
        };
        results.push((file, daemon, check(daemon, file)));
    }
    if options.json {
        let one = |(file, daemon, result): &(&PathBuf, Daemon, Result<(), ConfigError>)| -> Value {
            let error = result.as_ref().err().map(ToString::to_string);
            json!({"file": file, "daemon": name(*daemon), "ok": error.is_none(), "error": error})
        };
        let files: Vec<Value> = results.iter().map(one).collect();
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({"schema": 1, "files": files}))?
        );
    } else {
        for (file, daemon, result) in &results {
            match result {
                Ok(()) => println!("{}: good ({})", file.display(), name(*daemon)),
                Err(error) => println!("{}: not good ({}):\n{error}", file.display(), name(*daemon)),
            }
        }
    }
    let good = results.iter().all(|(.., result)| result.is_ok());
    Ok(if good { exit::OK } else { exit::TO_MEND })
}

fn shipped_files() -> Vec<PathBuf> {
    let all = [
        default_path::<Replicator>(),
        default_path::<BackupAgent>(),
        default_path::<Witness>(),
    ];
    let mut files: Vec<PathBuf> = all
        .into_iter()
        .filter(|file| file.exists() || file.with_extension("d").exists())
        .collect();
    files.extend(vm_files(&default_path::<Replicator>().with_file_name(VMS)));
    files
}

/// The files of the VMs of a host, those included that have only a `.d` folder.
fn vm_files(folder: &Path) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.map(|entry| entry.path()).filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == "toml" || extension == "d")
    });
    named.map(|path| path.with_extension("toml")).collect()
}

/// By the name of the file, or of the `.d` folder or `vms` folder that it lies in. A VM may be called as it likes.
fn daemon_of(file: &Path) -> Option<Daemon> {
    let mut folders = file.ancestors().skip(1).take(2);
    if folders.any(|folder| folder.ends_with(VMS)) {
        return Some(Daemon::Replicator);
    }
    let folder = file.parent().and_then(Path::file_name);
    let names = [file.file_stem(), folder];
    names.into_iter().flatten().find_map(|name| match name.to_str()? {
        "replicator" | "replicator.d" => Some(Daemon::Replicator),
        "backup-agent" | "backup-agent.d" => Some(Daemon::BackupAgent),
        "witness" | "witness.d" => Some(Daemon::Witness),
        _ => None,
    })
}

/// The host's settings below those of a VM, when the file is a VM's: `vms/VM.toml`.
fn below(file: &Path) -> Option<PathBuf> {
    let folder = file.parent().filter(|folder| folder.ends_with(VMS))?;
    Some(folder.parent()?.join("replicator.toml"))
}

fn name(daemon: Daemon) -> &'static str {
    match daemon {
        Daemon::Replicator => Replicator::NAME,
        Daemon::BackupAgent => BackupAgent::NAME,
        Daemon::Witness => Witness::NAME,
    }
}

fn check(daemon: Daemon, file: &Path) -> Result<(), ConfigError> {
    // The default file may be missing beside its folder; a file that was named may not.
    let path = |default: PathBuf| (file != default || file.exists()).then_some(file);
    match daemon {
        Daemon::Replicator => match below(file) {
            // As the VM's replicator reads them.
            Some(host) => load_over::<Replicator>(host.exists().then_some(&*host), Some(file)).map(drop),
            None => load::<Replicator>(path(default_path::<Replicator>())).map(drop),
        },
        Daemon::BackupAgent => load::<BackupAgent>(path(default_path::<BackupAgent>())).map(drop),
        Daemon::Witness => load::<Witness>(path(default_path::<Witness>())).map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_named_with_its_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("witness.toml");
        for (text, line, what) in [
            ("vms_max = 3\nlisten = \"nowhere\"\n", "line 2", "listen"),
            ("dir = \"/x\"\n\n[network]\nmtuu = 1\n", "line 4", "mtuu"),
            ("[network]\n# small\nmtu = 12\n", "line 3", "network.mtu"),
            ("vms_max = 0\n", "line 1", "vms_max"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = check(Daemon::Witness, &file).unwrap_err().to_string();
            assert!(error.contains(line) && error.contains(what), "{text}: {error}");
            assert!(error.contains("witness.toml"), "{error}");
        }
        std::fs::write(&file, "vms_max = 3\n").unwrap();
        check(Daemon::Witness, &file).unwrap();
    }

    #[test]
    fn a_vms_file_is_checked_on_top_of_its_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = dir.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, text).unwrap();
            file
        };
        let web = write(
            "vms/web.toml",
            "[vm]\nqmp = \"/run/web.qmp\"\ntaps = [\"tap0\"]\n",
        );
        let only_folder = write("vms/db.d/10-site.toml", "[epochs]\nlength = \"20ms\"\n");
        let db = dir.path().join("vms/db.toml");
        assert_eq!(
            vm_files(&dir.path().join("vms")).into_iter().collect::<Vec<_>>(),
            [db.clone(), web.clone()]
        );
        write("replicator.toml", "backup = \"b:7700\"\n");
        for file in [&web, &db, &only_folder] {
            check(Daemon::Replicator, file).unwrap();
        }
        // Each is good by itself; together they are not.
        write("replicator.toml", "[vm]\nattach = \"/run/vmm\"\n");
        let error = check(Daemon::Replicator, &web).unwrap_err().to_string();
        assert!(error.contains("vm."), "{error}");
        write("vms/web.toml", "[vm]\ntap = \"tap0\"\n");
        let error = check(Daemon::Replicator, &web).unwrap_err().to_string();
        assert!(error.contains("web.toml") && error.contains("tap"), "{error}");
    }

    #[test]
    fn whose_settings_a_file_holds_follows_from_its_name_or_its_folder() {
        for (file, daemon) in [
            ("/etc/romulus/replicator.toml", Some(Daemon::Replicator)),
            (
                "/etc/romulus/backup-agent.d/10-site.toml",
                Some(Daemon::BackupAgent),
            ),
            ("/etc/romulus/vms/web.toml", Some(Daemon::Replicator)),
            ("/etc/romulus/vms/witness.toml", Some(Daemon::Replicator)),
            ("/etc/romulus/vms/web.d/10-more.toml", Some(Daemon::Replicator)),
            ("witness.toml", Some(Daemon::Witness)),
            ("/tmp/x.toml", None),
        ] {
            assert_eq!(daemon_of(Path::new(file)), daemon, "{file}");
        }
    }
}
