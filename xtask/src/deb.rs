//! `cargo xtask deb`: the packages, made by dpkg-deb from the release binaries, the units and the examples of the settings.
//!
//! ```text
//!   romulus                the operator's command with man pages and completions, the folders of all, alerts, dashboard, documentation
//!   romulus-backup-agent   /usr/sbin/backup-agent, its unit, its settings
//!   romulus-replicator     /usr/sbin/replicator with the packet gate, a unit for each VM, its settings
//!   romulus-witness        /usr/sbin/witness, its unit, its user, its settings
//!   romulus-bench          /usr/bin/bench: advice on epochs, measurements
//! ```
//!
//! The settings that are installed are the examples with every value commented out, so that an upgrade's defaults hold where the
//! operator has said nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use romulus_e2e::Paths;

use crate::{demo, kernel, sh};

/// What `cargo xtask deb` can be told.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Debian's part of the version
    #[arg(long, default_value_t = 1, value_name = "N")]
    revision: u32,
}

/// One package.
struct Package {
    name: &'static str,
    summary: &'static str,
    description: &'static str,
    /// Beside the C library; `=` stands for the package of the same version.
    depends: &'static str,
    /// Built files and where they go.
    programs: &'static [(&'static str, &'static str)],
    /// Files of the checkout and where they go.
    files: &'static [(&'static str, &'static str)],
    /// Examples of settings and where they go, to be edited by the operator.
    settings: &'static [(&'static str, &'static str)],
    /// Empty folders, with their modes.
    folders: &'static [(&'static str, u32)],
}

const PACKAGES: &[Package] = &[
    Package {
        name: "romulus",
        summary: "fault tolerance for KVM virtual machines: the operator's command",
        description: "What all hosts have: the command romulus, folders for settings and certificates, documentation.",
        depends: "systemd",
        programs: &[("romulus", "usr/bin/romulus")],
        files: &[
            (
                "packaging/systemd/romulus.tmpfiles",
                "usr/lib/tmpfiles.d/romulus.conf",
            ),
            (
                "packaging/prometheus/romulus.rules.yml",
                "usr/share/romulus/prometheus/romulus.rules.yml",
            ),
            (
                "packaging/prometheus/romulus.test.yml",
                "usr/share/romulus/prometheus/romulus.test.yml",
            ),
            (
                "packaging/grafana/romulus.json",
                "usr/share/romulus/grafana/romulus.json",
            ),
            ("README.md", "usr/share/doc/romulus/README.md"),
            ("CHANGELOG.md", "usr/share/doc/romulus/changelog"),
        ],
        settings: &[],
        folders: &[("etc/romulus", 0o755), ("etc/romulus/pki", 0o700)],
    },
    Package {
        name: "romulus-backup-agent",
        summary: "fault tolerance for KVM virtual machines: the backup host's daemon",
        description: "Receives checkpoints of VMs and takes over when their host is lost.",
        depends: "romulus (=), systemd",
        programs: &[("backup-agent", "usr/sbin/backup-agent")],
        files: &[(
            "packaging/systemd/romulus-backup-agent.service",
            "lib/systemd/system/romulus-backup-agent.service",
        )],
        settings: &[(
            "crates/config/examples/backup-agent.toml",
            "etc/romulus/backup-agent.toml",
        )],
        folders: &[("etc/romulus/backup-agent.d", 0o755)],
    },
    Package {
        name: "romulus-replicator",
        summary: "fault tolerance for KVM virtual machines: the protected host's daemon",
        description: "Protects a running VM by sending checkpoints to a backup host many times a second.",
        depends: "romulus (=), systemd",
        programs: &[("replicator", "usr/sbin/replicator")],
        files: &[(
            "packaging/systemd/romulus-replicator@.service",
            "lib/systemd/system/romulus-replicator@.service",
        )],
        settings: &[(
            "crates/config/examples/replicator.toml",
            "etc/romulus/replicator.toml",
        )],
        folders: &[("etc/romulus/replicator.d", 0o755), ("etc/romulus/vms", 0o755)],
    },
    Package {
        name: "romulus-witness",
        summary: "fault tolerance for KVM virtual machines: the arbiter",
        description: "Keeps the record of which host may let a VM speak. Runs on a third host.",
        depends: "romulus (=), systemd",
        programs: &[("witness", "usr/sbin/witness")],
        files: &[
            (
                "packaging/systemd/romulus-witness.service",
                "lib/systemd/system/romulus-witness.service",
            ),
            (
                "packaging/systemd/romulus-witness.sysusers",
                "usr/lib/sysusers.d/romulus-witness.conf",
            ),
            (
                "packaging/systemd/romulus-witness.tmpfiles",
                "usr/lib/tmpfiles.d/romulus-witness.conf",
            ),
        ],
        settings: &[("crates/config/examples/witness.toml", "etc/romulus/witness.toml")],
        folders: &[("etc/romulus/witness.d", 0o755)],
    },
    Package {
        name: "romulus-bench",
        summary: "fault tolerance for KVM virtual machines: advice on epochs, and measurements",
        description: "Looks at a running VM and says what protecting it would cost, and measures what bounds it.",
        depends: "romulus (=)",
        programs: &[("bench", "usr/bin/bench")],
        files: &[],
        settings: &[],
        folders: &[],
    },
];

/// Shells, and where each looks for the completions of `romulus`.
const COMPLETIONS: &[(&str, &str)] = &[
    ("bash", "usr/share/bash-completion/completions/romulus"),
    ("zsh", "usr/share/zsh/vendor-completions/_romulus"),
    ("fish", "usr/share/fish/vendor_completions.d/romulus.fish"),
];

/// Maintainer scripts that a package may have, in `packaging/deb/PACKAGE.SCRIPT`.
const SCRIPTS: &[&str] = &["postinst", "prerm", "postrm"];

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    demo::build_daemons_and(&["bench"])?;
    let folder = build(&Paths::of_checkout(&sh::root()), args.revision)?;
    sh::step(&format!("packages: in {}", folder.display()));
    Ok(ExitCode::SUCCESS)
}

/// Makes all packages from binaries that are built, and returns their folder.
pub(crate) fn build(paths: &Paths, revision: u32) -> Result<PathBuf> {
    let folder = paths.debs();
    kernel::recreate(&folder)?;
    let version = format!("{}-{revision}", env!("CARGO_PKG_VERSION"));
    for package in PACKAGES {
        let stage = folder.join(package.name);
        fill(package, &stage, paths)?;
        control(package, &stage, &version)?;
        let file = folder.join(format!("{}_{version}_amd64.deb", package.name));
        sh::output(
            Command::new("dpkg-deb")
                .args(["--root-owner-group", "-Zxz", "-z1", "--build"])
                .arg(&stage)
                .arg(&file),
        )?;
        fs::remove_dir_all(&stage).with_context(|| format!("cannot remove {}", stage.display()))?;
    }
    Ok(folder)
}

fn fill(package: &Package, stage: &Path, paths: &Paths) -> Result<()> {
    let root = sh::root();
    for (program, to) in package.programs {
        let to = stage.join(to);
        copy(&paths.binary(program)?, &to, 0o755)?;
        sh::output(Command::new("strip").arg("--strip-unneeded").arg(&to))?;
    }
    for (from, to) in package.files {
        copy(&root.join(from), &stage.join(to), 0o644)?;
    }
    for (from, to) in package.settings {
        let example = root.join(from);
        let text =
            fs::read_to_string(&example).with_context(|| format!("cannot read {}", example.display()))?;
        write(&stage.join(to), &commented_out(&text), 0o644)?;
    }
    for (folder, mode) in package.folders {
        let folder = stage.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(*mode))?;
    }
    let licence = "Romulus may be used under the Apache License 2.0 (/usr/share/common-licenses/Apache-2.0) or the MIT license:\n\n";
    let mit = fs::read_to_string(root.join("LICENSE-MIT")).context("cannot read LICENSE-MIT")?;
    let doc = stage.join("usr/share/doc").join(package.name);
    write(&doc.join("copyright"), &format!("{licence}{mit}"), 0o644)?;
    if package.name == "romulus" {
        man_and_completions(&paths.binary("romulus")?, stage)?;
        for entry in fs::read_dir(root.join("docs/src")).context("cannot list docs/src")? {
            let page = entry?;
            copy(&page.path(), &doc.join("manual").join(page.file_name()), 0o644)?;
        }
    }
    Ok(())
}

/// What the operator's command makes from its own description.
fn man_and_completions(romulus: &Path, stage: &Path) -> Result<()> {
    let man = stage.join("usr/share/man/man1");
    fs::create_dir_all(&man).with_context(|| format!("cannot create {}", man.display()))?;
    sh::output(Command::new(romulus).arg("man").arg(&man))?;
    for (shell, to) in COMPLETIONS {
        let script = sh::output(Command::new(romulus).args(["completions", shell]))?;
        write(&stage.join(to), &script, 0o644)?;
    }
    Ok(())
}

fn control(package: &Package, stage: &Path, version: &str) -> Result<()> {
    let folder = stage.join("DEBIAN");
    // dpkg wants these modes, whatever this process's mask is.
    fs::create_dir_all(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    let libc = sh::output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "libc6"]))?;
    let libc = libc.split('-').next().unwrap_or_default();
    let depends = package.depends.replace("(=)", &format!("(= {version})"));
    let Package {
        name,
        summary,
        description,
        ..
    } = package;
    let text = format!(
        "Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: The Romulus authors <romulus@example.invalid>\n\
         Section: admin\nPriority: optional\nDepends: libc6 (>= {libc}), libgcc-s1, {depends}\n\
         Description: {summary}\n {description}\n"
    );
    write(&folder.join("control"), &text, 0o644)?;
    let conffiles: String = package
        .settings
        .iter()
        .map(|(_, to)| format!("/{to}\n"))
        .collect();
    if !conffiles.is_empty() {
        write(&folder.join("conffiles"), &conffiles, 0o644)?;
    }
    for script in SCRIPTS {
        let from = sh::root().join(format!("packaging/deb/{name}.{script}"));
        if from.exists() {
            copy(&from, &folder.join(script), 0o755)?;
        }
    }
    Ok(())
}

/// An example with each value commented out; sections and comments stay.
fn commented_out(example: &str) -> String {
    let mut text = String::new();
    for line in example.lines() {
        let is_value = !line.is_empty() && !line.starts_with(['#', '[']);
        if is_value {
            text.push_str("# ");
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    if !from.is_file() {
        bail!("{} is missing", from.display());
    }
    make_folder_of(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn write(to: &Path, text: &str, mode: u32) -> Result<()> {
    make_folder_of(to)?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn make_folder_of(file: &Path) -> Result<()> {
    let folder = file.parent().context("a file without a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installed_settings_say_nothing_and_show_everything() {
        let example = "# What it is.\nlisten = \"0.0.0.0:7700\"\n\n[log]\n# A level.\nlevel = \"info\"\n";
        let installed = commented_out(example);
        assert_eq!(
            installed,
            "# What it is.\n# listen = \"0.0.0.0:7700\"\n\n[log]\n# A level.\n# level = \"info\"\n"
        );
    }
}
