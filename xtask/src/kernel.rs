//! The guests' kernels: Debian's, fetched as packages and unpacked, never installed here.
//!
//! The cloud kernel is small and quick to boot; the ordinary one has drivers of real hardware, which QEMU's default
//! machine shows to its guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{packages, sh};

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flavour {
    /// The package that always depends on the newest one.
    meta: &'static str,
    /// The folder, inside the assets, that it is unpacked into.
    unpacked: &'static str,
    /// About how much is downloaded, in MB.
    megabytes: u32,
}

/// For virtual machines with virtio devices.
pub(crate) const CLOUD: Flavour = Flavour {
    meta: "linux-image-cloud-amd64",
    unpacked: "kernel",
    megabytes: 27,
};
/// For all machines.
pub(crate) const ORDINARY: Flavour = Flavour {
    meta: "linux-image-amd64",
    unpacked: "kernel-ordinary",
    megabytes: 71,
};

/// An unpacked kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The image to boot.
    pub(crate) image: PathBuf,
    /// The folder that holds `modules.dep`.
    pub(crate) modules: PathBuf,
}

/// Unpacks the kernel under `assets` unless it is there, and finds its parts.
pub(crate) fn fetch(assets: &Path, flavour: Flavour) -> Result<Kernel> {
    let folder = assets.join(flavour.unpacked);
    if let Ok(kernel) = find(&folder) {
        return Ok(kernel);
    }
    let package = package_name(flavour.meta)?;
    sh::step(&format!(
        "kernel: downloading {package} (about {} MB; unpacked, not installed)",
        flavour.megabytes
    ));
    let download = assets.join("download");
    recreate(&download)?;
    // apt's own download user needs to write here, or apt warns.
    if download_package(&download, &package).is_err() {
        packages::update()?;
        download_package(&download, &package_name(flavour.meta)?)?;
    }
    let deb = first_with_suffix(&download, ".deb")?;
    recreate(&folder)?;
    sh::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&folder))?;
    fs::remove_dir_all(&download).with_context(|| format!("cannot remove {}", download.display()))?;
    let kernel = find(&folder)?;
    let version = kernel
        .modules
        .file_name()
        .ok_or_else(|| anyhow!("the modules have no version"))?;
    sh::output(
        Command::new("busybox")
            .arg("depmod")
            .arg("-b")
            .arg(base_of_modules(&folder))
            .arg(version),
    )?;
    Ok(kernel)
}

/// The modules that `wanted` needs, each after what it depends on.
pub(crate) fn load_order(kernel: &Kernel, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let path = kernel.modules.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut order: Vec<PathBuf> = Vec::new();
    for name in wanted {
        let line = text.lines().find(|line| {
            line.split(':')
                .next()
                .is_some_and(|file| module_name(file) == *name)
        });
        // A kernel that has it built in needs no module.
        if let Some((file, needs)) = line.and_then(|line| line.split_once(':')) {
            visit(&text, file, needs, &mut order);
        }
    }
    Ok(order.into_iter().map(|file| kernel.modules.join(file)).collect())
}

/// The name of a module by its file: compression and folders do not matter.
pub(crate) fn module_name(file: &str) -> &str {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name)
}

fn visit(text: &str, file: &str, needs: &str, order: &mut Vec<PathBuf>) {
    for need in needs.split_whitespace() {
        let line = text
            .lines()
            .find_map(|line| line.split_once(':').filter(|(name, _)| *name == need));
        if let Some((name, needs)) = line {
            visit(text, name, needs, order);
        }
    }
    if !order.iter().any(|known| known == Path::new(file)) {
        order.push(file.into());
    }
}

fn package_name(meta: &str) -> Result<String> {
    if let Some(name) = dependency(meta)? {
        return Ok(name);
    }
    packages::update()?;
    dependency(meta)?.ok_or_else(|| {
        anyhow!("apt knows no {meta}; the demo's guest needs Debian's kernel: add a Debian main repository for amd64")
    })
}

fn dependency(meta: &str) -> Result<Option<String>> {
    let Ok(text) = sh::output(Command::new("apt-cache").args(["depends", meta])) else {
        return Ok(None);
    };
    Ok(text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(|name| name.trim().to_owned()))
}

fn download_package(folder: &Path, package: &str) -> Result<()> {
    // Run as root's own sandbox user, apt cannot write into a folder of the checkout: say that it need not try.
    sh::output(packages::apt(&["-o", "APT::Sandbox::User=root", "download", package]).current_dir(folder))?;
    Ok(())
}

fn find(folder: &Path) -> Result<Kernel> {
    let image = first_with_prefix(&folder.join("boot"), "vmlinuz-")?;
    let modules = first_with_prefix(&base_of_modules(folder).join("lib/modules"), "")?;
    Ok(Kernel { image, modules })
}

/// Debian 13 and later keep `lib` in `usr`.
fn base_of_modules(folder: &Path) -> PathBuf {
    if folder.join("lib/modules").is_dir() {
        folder.to_owned()
    } else {
        folder.join("usr")
    }
}

fn first_with_prefix(folder: &Path, prefix: &str) -> Result<PathBuf> {
    first(folder, |name| name.starts_with(prefix))
}

fn first_with_suffix(folder: &Path, suffix: &str) -> Result<PathBuf> {
    first(folder, |name| name.ends_with(suffix))
}

fn first(folder: &Path, fits: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", folder.display()))?;
        if entry.file_name().to_str().is_some_and(&fits) {
            return Ok(entry.path());
        }
    }
    bail!(
        "{} does not hold what was expected; remove it and run `cargo xtask setup` again",
        folder.display()
    )
}

/// An empty folder at this place.
pub(crate) fn recreate(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_everything_it_needs_and_only_once() {
        let folder = std::env::temp_dir().join(format!("romulus-xtask-{}", std::process::id()));
        recreate(&folder).unwrap();
        fs::write(
            folder.join("modules.dep"),
            "k/net.ko.xz: k/fail.ko.xz k/ring.ko.xz\nk/fail.ko.xz: k/core.ko.xz\nk/core.ko.xz:\nk/ring.ko.xz:\n",
        )
        .unwrap();
        let kernel = Kernel {
            image: PathBuf::new(),
            modules: folder.clone(),
        };
        let order = load_order(&kernel, &["net", "core", "not_a_module"]).unwrap();
        let names: Vec<&str> = order
            .iter()
            .map(|file| module_name(file.to_str().unwrap()))
            .collect();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names, ["core", "fail", "ring", "net"]);
    }
}
