//! The guest's root file system: busybox, redis-server with its libraries, our workloads and a few modules.
//!
//! ```text
//!   /init             tests/guest/init
//!   /bin              busybox, guest-tool, redis-server
//!   /lib /lib64 ...   what ldd says redis-server needs, at the same paths
//!   /mod              the modules, uncompressed, and their load order
//! ```

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::kernel::{self, Kernel};
use crate::sh;

/// Debian keeps the server, the checker and the sentinel in one binary that goes by its name.
const REDIS: &str = "/usr/bin/redis-check-rdb";

/// What the guest's devices need; a kernel without one of them, or with it built in, is fine.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "e1000",
    "e1000e",
    "pvpanic-mmio",
    "af_packet",
    "ipv6",
];

/// Builds the archive from `kernel`'s modules into `archive`, by way of the folder `root`.
pub(crate) fn build(kernel: &Kernel, guest_tool: &Path, root: &Path, archive: &Path) -> Result<()> {
    kernel::recreate(root)?;
    for folder in ["bin", "mod"] {
        fs::create_dir_all(root.join(folder))?;
    }
    copy(&sh::root().join("tests/guest/init"), &root.join("init"))?;
    // A checkout on a file system without modes loses this one, and the kernel then panics.
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    copy(&busybox()?, &root.join("bin/busybox"))?;
    copy(guest_tool, &root.join("bin/guest-tool"))?;
    put_program(Path::new(REDIS), root, Path::new("bin/redis-server"))?;
    let mut order = String::new();
    for module in kernel::load_order(kernel, MODULES)? {
        order.push_str(&put_module(&module, &root.join("mod"))?);
        order.push('\n');
    }
    fs::write(root.join("mod/order"), order)?;
    pack(root, archive)
}

/// Copies a program to its `place` in the folder `root`, and its libraries to the same paths there.
pub(crate) fn put_program(program: &Path, root: &Path, place: &Path) -> Result<()> {
    copy(program, &root.join(place))?;
    for library in libraries(program)? {
        let place = library.strip_prefix("/").unwrap_or(&library);
        copy(&library, &root.join(place))?;
    }
    Ok(())
}

/// Copies what `from` points at, makes the folder first, and keeps the mode: a program stays one.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn busybox() -> Result<PathBuf> {
    for place in ["/bin/busybox", "/usr/bin/busybox"] {
        let path = PathBuf::from(place);
        if path.is_file() {
            if libraries(&path)?.is_empty() {
                return Ok(path);
            }
            bail!("{place} is not the static busybox; install the package busybox-static");
        }
    }
    bail!("busybox is missing; run `cargo xtask setup` as root")
}

/// The shared libraries, and the loader, of a program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    // ldd fails on a static program, which simply has none.
    let Ok(text) = sh::output(Command::new("ldd").arg(program)) else {
        return Ok(Vec::new());
    };
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{} lacks a library here: {}", program.display(), line.trim());
    }
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// Puts one module into `folder`, uncompressed, and returns the name of its file.
fn put_module(module: &Path, folder: &Path) -> Result<String> {
    let name = module.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let plain = format!("{}.ko", kernel::module_name(name));
    let to = folder.join(&plain);
    let unpack = match module.extension().and_then(OsStr::to_str) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            copy(module, &to)?;
            return Ok(plain);
        }
    };
    let out = File::create(&to).with_context(|| format!("cannot create {}", to.display()))?;
    sh::run(Command::new(unpack).args(["-d", "-c"]).arg(module).stdout(out))?;
    Ok(plain)
}

/// `find | cpio | gzip`, with busybox's cpio, which is there anyway.
pub(crate) fn pack(root: &Path, archive: &Path) -> Result<()> {
    let partial = archive.with_extension("partial");
    let out = File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let script = "find . | busybox cpio -o -H newc 2>/dev/null | gzip -1";
    sh::run(
        Command::new("bash")
            .args(["-o", "pipefail", "-c", script])
            .current_dir(root)
            .stdin(Stdio::null())
            .stdout(out),
    )?;
    fs::rename(&partial, archive).with_context(|| format!("cannot put {} in place", archive.display()))
}
