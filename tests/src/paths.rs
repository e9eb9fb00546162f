//! Where things are in a checkout.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Which of Debian's kernels a guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernel {
    /// The small one for virtual machines: virtio only.
    #[default]
    Cloud,
    /// The ordinary one, which knows QEMU's default network cards.
    Ordinary,
}

/// The folders and files that the lab uses.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Cargo's target folder.
    pub target: PathBuf,
    /// The guests' kernels and root file systems (`cargo xtask setup` makes them).
    pub assets: PathBuf,
    /// The release binaries.
    pub release: PathBuf,
}

impl Paths {
    /// The paths of the checkout whose root this is.
    #[must_use]
    pub fn of_checkout(root: &Path) -> Paths {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        // Daemons run elsewhere, and a path that cargo was given may be relative.
        let target = if target.is_absolute() {
            target
        } else {
            root.join(target)
        };
        Paths {
            assets: target.join("assets"),
            release: target.join("release"),
            target,
        }
    }

    /// The paths of the checkout that this crate was built in.
    #[must_use]
    pub fn here() -> Paths {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        Paths::of_checkout(manifest.parent().unwrap_or(manifest))
    }

    /// A guest's kernel.
    #[must_use]
    pub fn kernel(&self, which: Kernel) -> PathBuf {
        self.assets.join(match which {
            Kernel::Cloud => "vmlinuz",
            Kernel::Ordinary => "vmlinuz-ordinary",
        })
    }

    /// The root file system with this kernel's modules.
    #[must_use]
    pub fn initramfs(&self, which: Kernel) -> PathBuf {
        self.assets.join(match which {
            Kernel::Cloud => "initramfs.cpio.gz",
            Kernel::Ordinary => "initramfs-ordinary.cpio.gz",
        })
    }

    /// That of [`Kernel::Cloud`] with programs to be measured at work: `redis-benchmark`, `stress-ng`, `sqlite3` and `tcc`.
    #[must_use]
    pub fn initramfs_with_programs(&self) -> PathBuf {
        self.assets.join("initramfs-programs.cpio.gz")
    }

    /// The small Debian that containers with systemd share.
    #[must_use]
    pub fn systemd_tree(&self) -> PathBuf {
        self.assets.join("systemd")
    }

    /// The packages (`cargo xtask deb` makes them).
    #[must_use]
    pub fn debs(&self) -> PathBuf {
        self.target.join("deb")
    }

    /// A release binary of the workspace.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        let path = self.release.join(name);
        if !path.is_file() {
            bail!("{} is missing: `cargo build --release` builds it", path.display());
        }
        Ok(path)
    }
}
