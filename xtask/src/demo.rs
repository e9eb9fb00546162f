//! `cargo xtask demo`: the main job, shown and judged.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use romulus_e2e::accel::{self, Accel};
use romulus_e2e::guest::QemuConfig;
use romulus_e2e::report::{Kill, Report};
use romulus_e2e::scenario::{ScenarioConfig, kill_once};
use romulus_e2e::{Net, Paths, Stamp};

use crate::{kvm, setup, sh};

/// The names of the demo's namespaces, folders and sockets begin with this.
pub(crate) const PREFIX: &str = "rom";

/// What the demo can be told.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Write what was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Kill the primary so many times, at random moments, each time with a fresh pair
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    kills: u32,
    /// Draw the random moments from this number (printed by every run)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Stay protected for so long before the kill
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    protected: u64,
    /// Pages that the guest dirties every 25 ms beside what redis does
    #[arg(long, default_value_t = 600, value_name = "N")]
    dirty_pages: u32,
    /// Run the guest in the test VMM of this checkout, over KVM: needs no package, and no emulation makes it slow
    #[arg(long)]
    kvm: bool,
    /// QEMU's accelerator, tcg or kvm; found out by trying when not given
    #[arg(long, value_name = "NAME", value_parser = ["tcg", "kvm"], conflicts_with = "kvm")]
    accel: Option<String>,
    /// Have a Prometheus watch the daemons, and draw the Grafana dashboard of the run into this file, as SVG
    #[arg(long, value_name = "FILE")]
    dashboard: Option<PathBuf>,
    /// Let the guest steer its clock by the emulated RTC, the remedy for the clock's slip
    #[arg(long, conflicts_with = "kvm")]
    clock_remedy: bool,
    /// What the names of the lab's namespaces, folders and sockets begin with
    #[arg(long, value_name = "NAME", default_value = PREFIX)]
    lab: String,
    /// Pass this on to `replicator protect` (repeat it for more)
    #[arg(long = "protect-arg", value_name = "ARG", allow_hyphen_values = true)]
    protect_args: Vec<String>,
}

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::need_lab_rights()?;
    let paths = prepare(args.kvm)?;
    clean_up_on_signals(&args.lab);
    let accelerator = if args.kvm {
        kvm::accel()
    } else {
        choose_accel(args, &paths)?
    };
    sh::step(&format!(
        "accelerator: {} ({})",
        accelerator.name, accelerator.why
    ));
    let seed = args.seed.unwrap_or_else(|| Stamp::now().micros());
    sh::step(&format!("seed: {seed}"));

    let mut kills = Vec::new();
    for number in 0..args.kills {
        println!();
        sh::step(&format!("run {} of {}", number + 1, args.kills));
        let config = scenario(args, &accelerator, seed.wrapping_add(u64::from(number)));
        let kill = kill_once(&paths, &args.lab, &config).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            let text = format!("{error:#}");
            Kill {
                verdict: text.lines().next().unwrap_or_default().to_owned(),
                ..Kill::default()
            }
        });
        print_kill(&kill);
        kills.push(kill);
    }
    let report = Report::of(kills, accelerator, seed);
    finish(args, &paths, &report)
}

/// Installs and builds what the lab needs: with the test VMM nothing but what cargo builds.
pub(crate) fn prepare(over_kvm: bool) -> Result<Paths> {
    let paths = if over_kvm {
        kvm::need()?;
        kvm::paths()
    } else {
        setup::prepare()?
    };
    build_daemons()?;
    Ok(paths)
}

/// The release binaries that the lab starts.
pub(crate) fn build_daemons() -> Result<()> {
    build_daemons_and(&[])
}

/// The same, and other packages' at once.
pub(crate) fn build_daemons_and(packages: &[&str]) -> Result<()> {
    sh::step("building the daemons (release)");
    let daemons = [
        "replicator",
        "backup-agent",
        "witness",
        "romulus",
        "romulus-testbed",
    ];
    let mut build = sh::cargo(&["build", "--quiet", "--release", "--bins"]);
    for package in daemons.iter().chain(packages) {
        build.args(["--package", package]);
    }
    sh::run(&mut build)
}

fn choose_accel(args: &Args, paths: &Paths) -> Result<Accel> {
    match args.accel.as_deref() {
        Some(name) => Ok(Accel {
            name: name.to_owned(),
            why: "asked for".to_owned(),
        }),
        None => {
            sh::step("trying whether KVM can run Linux here");
            accel::choose(paths, &args.lab)
        }
    }
}

fn scenario(args: &Args, accelerator: &Accel, seed: u64) -> ScenarioConfig {
    let mut config = ScenarioConfig {
        protected: Duration::from_secs(args.protected),
        dashboard: args.dashboard.clone(),
        ..ScenarioConfig::default()
    };
    config.stage.seed = seed;
    config.stage.print = true;
    config.stage.guest = if args.kvm {
        kvm::guest(args.dirty_pages)
    } else {
        let guest = QemuConfig {
            accel: accelerator.name.clone(),
            clock_remedy: args.clock_remedy,
            ..QemuConfig::default()
        };
        guest.dirty_pages(args.dirty_pages).into()
    };
    config.protect.extra.clone_from(&args.protect_args);
    config
}

fn finish(args: &Args, paths: &Paths, report: &Report) -> Result<ExitCode> {
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(report).context("cannot write the report as JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    }
    println!();
    let survived = report.kills.iter().filter(|kill| kill.is_ok()).count();
    println!(
        "verdict: {} ({survived} of {} kills survived; {} acknowledged writes lost, {} connections reset)",
        report.verdict,
        report.kills.len(),
        report.lost_acked_writes,
        report.connection_resets
    );
    println!("logs: {}", paths.target.join("logs").join(&args.lab).display());
    Ok(if survived == report.kills.len() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print_kill(kill: &Kill) {
    let ms = |value: Option<f64>| value.map_or_else(|| "?".to_owned(), |value| format!("{value:.1} ms"));
    println!("  from the kill to");
    println!("    suspicion           {}", ms(kill.suspicion_ms));
    println!("    grant               {}", ms(kill.grant_ms));
    println!("    activation          {}", ms(kill.activated_ms));
    println!("    the first frame     {}", ms(kill.first_frame_ms));
    println!("    the first reply     {}", ms(kill.first_reply_ms));
    println!("  the client waited     {}", ms(kill.outage_ms));
    println!(
        "  protected for         {:.1} s, {} epochs",
        kill.protected_s, kill.epochs
    );
    if let Some(pause) = kill.pause_ms {
        println!(
            "  pause                 p50 {:.2} ms, p99 {:.2} ms",
            pause.p50, pause.p99
        );
    }
    if let Some(ratio) = kill.epoch_on_time_ratio {
        println!("  epochs on time        {:.1} %", ratio * 100.0);
    }
    if let Some(added) = kill.added_latency_ms {
        println!(
            "  added latency         p50 {:.1} ms, p99 {:.1} ms",
            added.p50, added.p99
        );
    }
    println!(
        "  the guest's clock     slipped by {:.3} %",
        kill.clock_slip_ratio * 100.0
    );
    println!(
        "  acknowledged writes   {}, of which {} are lost",
        kill.acked_writes, kill.lost_acked_writes
    );
    println!("  connections reset     {}", kill.connection_resets);
}

/// An interrupted demo leaves no process and no namespace behind.
pub(crate) fn clean_up_on_signals(lab: &str) {
    let lab = lab.to_owned();
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
            return;
        };
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            eprintln!("\ninterrupted: removing the lab");
            Net::clean_prefix(&lab);
            std::process::exit(130);
        });
    });
}
