//! The tasks that mostly run other programs: test, fuzz, deny, ci.

use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::trial::Suite;
use crate::{deb, demo, kvm, programs, setup, sh, systemd_tree};

/// The files of end-to-end tests that need `/dev/kvm`.
const OVER_KVM: [&str; 7] = [
    "kvm.rs",
    "many.rs",
    "metrics.rs",
    "plans.rs",
    "restarts.rs",
    "storm.rs",
    "systemd_kvm.rs",
];

/// What `cargo xtask test` can be told.
#[derive(clap::Args, Debug)]
pub(crate) struct TestArgs {
    /// Leave out the end-to-end tests
    #[arg(long)]
    no_e2e: bool,
    /// Only the end-to-end tests
    #[arg(long, conflicts_with = "no_e2e")]
    only_e2e: bool,
    /// The shapes of machines that are tried end to end: those of the CI, or only shapes, but every one
    #[arg(long, value_name = "WHICH", default_value = "ci", value_parser = ["ci", "all"], conflicts_with = "no_e2e")]
    shapes: String,
    /// Up to so many failed tests are run again, each alone; the run fails only if one fails again. Those that pass are told
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) flaky_max: usize,
    /// Only tests whose names contain this
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
}

/// What `cargo xtask fuzz` can be told.
#[derive(clap::Args, Debug)]
pub(crate) struct FuzzArgs {
    /// Only this target
    #[arg(value_name = "TARGET")]
    target: Option<String>,
    /// For so long each
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u64,
}

/// Runs every test, also when some fail, so that one run tells all of them.
pub(crate) fn test(args: &TestArgs) -> Result<ExitCode> {
    // The hypervisor's own tests boot the guest, too.
    setup::need_lab_rights()?;
    let paths = setup::prepare()?;
    // What the harness's tests record traces of.
    programs::build(&paths)?;
    let mut suite = Suite::new(args);
    let every_shape = args.shapes == "all";
    if !args.only_e2e && !every_shape {
        sh::step("tests of the workspace");
        suite.run(&|| Ok(sh::cargo(&["test", "--workspace", "--no-fail-fast"])), &[])?;
    }
    if !args.no_e2e {
        demo::clean_up_on_signals(romulus_e2e::TEST_LAB);
        demo::build_daemons_and(&["bench"])?;
        systemd_tree::build(&paths)?;
        deb::build(&paths, 1)?;
        let over_kvm = kvm::need().inspect_err(|error| println!("LEAVING OUT the tests over KVM: {error:#}"));
        let over_kvm = over_kvm.is_ok();
        sh::step("end-to-end tests, one at a time");
        suite.run(
            &|| end_to_end(every_shape, over_kvm),
            &["--test-threads=1", "--nocapture"],
        )?;
    }
    suite.finish()
}

/// Each file of `tests/tests` by name: cargo then fails when one of them is not built, instead of leaving it out.
fn end_to_end(every_shape: bool, over_kvm: bool) -> Result<Command> {
    let folder = sh::root().join("tests/tests");
    let features = if every_shape { "every-shape" } else { "e2e" };
    let mut command = sh::cargo(&["test", "--package", "romulus-e2e", "--features", features]);
    command.arg("--no-fail-fast");
    // A failure's words, not the harness's frames: some logs keep only the end.
    command.env("RUST_LIB_BACKTRACE", "0");
    let mut files = 0;
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry
            .with_context(|| format!("cannot read {}", folder.display()))?
            .path();
        let wanted = if every_shape {
            path.ends_with("shapes.rs")
        } else {
            over_kvm || !OVER_KVM.iter().any(|test| path.ends_with(test))
        };
        if wanted && path.extension().is_some_and(|extension| extension == "rs") {
            command.arg("--test").arg(path.file_stem().unwrap_or_default());
            files += 1;
        }
    }
    if files == 0 {
        bail!("there is no end-to-end test in {}", folder.display());
    }
    Ok(command)
}

/// Runs the fuzz targets, which need a nightly compiler and cargo-fuzz.
pub(crate) fn fuzz(args: &FuzzArgs) -> Result<ExitCode> {
    let nightly =
        sh::output(Command::new("rustup").args(["toolchain", "list"])).context("fuzzing needs rustup")?;
    if !nightly.lines().any(|line| line.starts_with("nightly")) {
        sh::step("installing the nightly toolchain");
        sh::run(Command::new("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal"]))?;
    }
    need_cargo_tool("cargo-fuzz")?;
    let list = sh::output(
        Command::new("cargo")
            .args(["+nightly", "fuzz", "list"])
            .current_dir(sh::root()),
    )?;
    let targets: Vec<&str> = list
        .lines()
        .filter(|name| args.target.as_deref().is_none_or(|wanted| wanted == *name))
        .collect();
    if targets.is_empty() {
        bail!(
            "there is no such fuzz target; there are: {}",
            list.split_whitespace().collect::<Vec<_>>().join(", ")
        );
    }
    for target in &targets {
        sh::step(&format!("fuzzing {target} for {} s", args.seconds));
        let limit = format!("-max_total_time={}", args.seconds);
        sh::run(
            Command::new("cargo")
                .args(["+nightly", "fuzz", "run", target, "--", &limit])
                .current_dir(sh::root()),
        )?;
    }
    sh::step(&format!("fuzz: {} targets, nothing found", targets.len()));
    Ok(ExitCode::SUCCESS)
}

/// What has to hold of the licences and sources of all that is shipped: this workspace, and that of the test guest, which is linked into
/// the test VMM.
const SHIPPED: [&str; 2] = ["Cargo.toml", "crates/testbed/guest/Cargo.toml"];

/// Checks licences, bans and sources.
pub(crate) fn deny() -> Result<ExitCode> {
    need_cargo_tool("cargo-deny")?;
    for manifest in SHIPPED {
        sh::step(&format!("licences, bans and sources of {manifest}"));
        let settings = ["--config", "deny.toml", "--manifest-path", manifest];
        let mut deny = sh::cargo(&["deny"]);
        deny.args(settings).args(["check", "licenses", "bans", "sources"]);
        sh::run(&mut deny)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Does what the CI does.
pub(crate) fn ci() -> Result<ExitCode> {
    sh::run(
        Command::new("bash")
            .arg(sh::root().join(".ci/run"))
            .current_dir(sh::root()),
    )?;
    Ok(ExitCode::SUCCESS)
}

fn need_cargo_tool(name: &str) -> Result<()> {
    let listed = sh::output(&mut sh::cargo(&["install", "--list"]))?;
    if sh::has(name) || listed.lines().any(|line| line.trim() == name) {
        return Ok(());
    }
    sh::step(&format!("installing {name}"));
    sh::run(&mut sh::cargo(&["install", "--locked", name]))
}
