//! Builds the guest into the testbed: a cargo build of its own, as the guest is made with other settings.
//!
//! `ROMULUS_GUEST_ELF` is then the path of the ELF file, for `include_bytes!(env!("ROMULUS_GUEST_ELF"))`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, ffi::OsStr};

/// What of the outer build's environment belongs to cargo's set-up on this machine, and is left to the guest's build.
const KEPT: [&str; 7] = [
    "CARGO_HOME",
    "CARGO_HTTP_",
    "CARGO_MAKEFLAGS",
    "CARGO_NET_",
    "CARGO_REGISTR",
    "CARGO_SOURCE_",
    "CARGO_TERM_",
];

fn main() {
    let crate_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let guest = crate_dir.join("guest");
    for watched in [
        "guest/src",
        "guest/.cargo",
        "guest/Cargo.toml",
        "guest/Cargo.lock",
        "guest/guest.ld",
    ] {
        println!("cargo:rerun-if-changed={}", crate_dir.join(watched).display());
    }
    println!(
        "cargo:rerun-if-changed={}",
        crate_dir.join("guest-core/src").display()
    );
    println!(
        "cargo:rerun-if-changed={}",
        crate_dir.join("guest-core/Cargo.toml").display()
    );
    let target_dir = PathBuf::from(variable("OUT_DIR")).join("guest");
    build(&guest, &target_dir);
    let elf = target_dir.join("x86_64-unknown-linux-gnu/release/romulus-guest");
    assert!(elf.is_file(), "the guest's build has made no {}", elf.display());
    println!("cargo:rustc-env=ROMULUS_GUEST_ELF={}", elf.display());
}

fn build(guest: &Path, target_dir: &Path) {
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args(["build", "--release", "--locked", "--quiet", "--target-dir"])
        .arg(target_dir);
    // The guest's own settings lie in its folder, where cargo looks for them.
    cargo.current_dir(guest);
    for (name, _) in env::vars_os() {
        if is_outer(&name) {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        .status()
        .unwrap_or_else(|error| panic!("cargo for the guest did not start: {error}"));
    assert!(
        status.success(),
        "the guest did not build; to see it alone: cd {} && cargo build --release",
        guest.display()
    );
}

/// Whether a variable is of the outer build: flags, wrappers (as clippy's) and settings that would reach the guest's.
fn is_outer(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let flags = [
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CLIPPY_ARGS",
        "TARGET",
    ];
    let cargos = name.starts_with("CARGO_") && !KEPT.iter().any(|kept| name.starts_with(kept));
    cargos || flags.contains(&name.as_ref()) || name.starts_with("__CARGO")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}
