//! `bench advise`: looks at a running guest without protecting it, and says what each length of epochs would cost it.
//!
//! ```text
//!   attach.rs     holding on to a guest, and letting it go whatever happens
//!   interrupt.rs  Ctrl-C, noted
//!   observe.rs    checkpoints at some lengths, encoded and sent nowhere
//!   answer.rs     what any length would cost, and which one suits the goal
//! ```
//!
//! Invariants: there is no backup, no gate and nothing on a network; the guest pauses for its checkpoints only, and runs on
//! untouched at the end, at an error, at Ctrl-C, and when this process is killed.

pub(crate) mod answer;
pub(crate) mod attach;
mod interrupt;
pub(crate) mod observe;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use romulus_config::{Replicator, Settings, load_over, vm_path};
use romulus_epoch::{Goal, Limits};
use romulus_types::{PAGE_BYTES, VmId};

use answer::{Answer, LENGTHS_MS, Link, Predicted, SCHEMA, recommend};
use attach::{Attached, Socket, Wanted};
use observe::{ObserveError, Watch};

use crate::host::{Host, Versions, load};

/// The command line, or the settings that it names, are wrong. The same number as clap's own.
const EXIT_USAGE: u8 = 2;
/// No length of epochs reaches the goal.
const EXIT_OUT_OF_REACH: u8 = 3;
const LENGTH_MIN: Duration = Duration::from_millis(1);
const LENGTH_MAX: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("guest").multiple(false))]
#[command(group = clap::ArgGroup::new("goal").multiple(false))]
pub(crate) struct AdviseArgs {
    /// The VM's name; its own settings file may say how it is reached
    #[arg(long, value_name = "NAME")]
    vm: VmId,
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET", group = "guest")]
    qmp: Option<PathBuf>,
    /// The attach socket of a VMM that embeds the attach library
    #[arg(long, value_name = "SOCKET", group = "guest")]
    attach: Option<PathBuf>,
    /// A tap of the guest that a gate would hold; only for what is said about what keeps the guest from being protected
    #[arg(long = "tap", value_name = "TAP")]
    taps: Vec<String>,
    /// The id of a device that is disposable; also only for that
    #[arg(long = "disposable", value_name = "ID")]
    disposable: Vec<String>,
    /// The replicator's settings. Default /etc/romulus/replicator.toml and its .d folder, then /etc/romulus/vms/VM.toml and its
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// With --qmp: folder for FIFOs that QEMU can reach by the same path
    #[arg(long, value_name = "DIR", default_value = "/run/romulus")]
    fifo_dir: PathBuf,
    /// Lengths of epochs at which checkpoints are taken, one after the other
    #[arg(long = "epoch", value_name = "TIME", value_delimiter = ',', default_value = "10ms,25ms,75ms,200ms", value_parser = epoch)]
    epochs: Vec<Duration>,
    /// For how long at each of them
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = humantime::parse_duration)]
    time: Duration,
    /// The goal: output is to be held for at most so long at the median. Without a goal, 10ms and 10% are both answered
    #[arg(long, value_name = "TIME", group = "goal", value_parser = humantime::parse_duration)]
    latency: Option<Duration>,
    /// The goal: at most so much of the guest's time is to be taken, such as 10%
    #[arg(long, value_name = "PERCENT", group = "goal", value_parser = percent)]
    overhead: Option<f64>,
    /// The link to the backup, in Mbit/s
    #[arg(long, value_name = "MBIT", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    link_mbit: u32,
    /// A round trip to the backup's host
    #[arg(long, value_name = "TIME", default_value = "200us", value_parser = humantime::parse_duration)]
    round_trip: Duration,
    /// What a commit takes at the replicator and the backup besides encoding and sending, however small it is
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = humantime::parse_duration)]
    commit_cost: Duration,
    /// What the backup takes for each page
    #[arg(long, value_name = "TIME", default_value = "2us", value_parser = humantime::parse_duration)]
    page_cost: Duration,
    /// Write everything that was found to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn epoch(text: &str) -> Result<Duration, String> {
    let length = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if (LENGTH_MIN..=LENGTH_MAX).contains(&length) {
        return Ok(length);
    }
    Err("it must be 1ms to 1s".to_owned())
}

fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').trim().parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent < 100.0 => Ok(percent),
        _ => Err("it must be a percentage between 0% and 100%, such as 10%".to_owned()),
    }
}

pub(crate) fn run(args: &AdviseArgs) -> anyhow::Result<ExitCode> {
    let settings = match settings(args) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("error: {error:#}");
            return Ok(ExitCode::from(EXIT_USAGE));
        }
    };
    let Some(socket) = socket(args, &settings) else {
        let file = vm_path(&args.vm);
        eprintln!(
            "error: name the guest's hypervisor: --qmp or --attach, or [vm] in {}",
            file.display()
        );
        return Ok(ExitCode::from(EXIT_USAGE));
    };
    // Before the guest is looked at: that must not end in a file that cannot be written.
    let json = args.json.as_deref().map(crate::commands::created).transpose()?;
    interrupt::watch().context("cannot look for Ctrl-C")?;
    let answer = look(args, &settings, socket)?;
    print!("{}", answer::table(&answer));
    if let Some(mut file) = json {
        let text = serde_json::to_string_pretty(&answer).context("cannot write as JSON")?;
        writeln!(file, "{text}").context("cannot write what was found")?;
    }
    Ok(if answer.recommended.iter().all(|one| one.reached) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_OUT_OF_REACH)
    })
}

/// As the replicator reads them.
fn settings(args: &AdviseArgs) -> anyhow::Result<Replicator> {
    let own = args.config.is_none().then(|| vm_path(&args.vm));
    let settings: Replicator = load_over(args.config.as_deref(), own.as_deref())?;
    settings.check()?;
    Ok(settings)
}

fn socket(args: &AdviseArgs, settings: &Replicator) -> Option<Socket> {
    let told = args
        .qmp
        .clone()
        .map(Socket::Qmp)
        .or(args.attach.clone().map(Socket::Attach));
    let known = settings
        .vm
        .qmp
        .clone()
        .map(Socket::Qmp)
        .or(settings.vm.attach.clone().map(Socket::Attach));
    told.or(known)
}

fn wanted(args: &AdviseArgs, settings: &Replicator, socket: Socket) -> Wanted {
    let or = |told: &[String], known: &[String]| if told.is_empty() { known } else { told }.to_vec();
    let disposable: BTreeSet<String> = or(&args.disposable, &settings.vm.disposable)
        .into_iter()
        .collect();
    Wanted {
        socket,
        taps: or(&args.taps, &settings.vm.taps),
        disposable,
        fifo_dir: args.fifo_dir.clone(),
        pause_limit_ns: u64::try_from(settings.epochs.pause_kill_limit.as_nanos()).unwrap_or(u64::MAX),
        checkpoint_pages_max: settings.memory.checkpoint_bytes_max.bytes() / PAGE_BYTES as u64,
    }
}

fn look(args: &AdviseArgs, settings: &Replicator, socket: Socket) -> anyhow::Result<Answer> {
    let wanted = wanted(args, settings, socket);
    let mut host = Host::this();
    let mut guest = Attached::to(&wanted)?;
    let in_the_way = std::mem::take(&mut guest.in_the_way);
    let watch = Watch {
        lengths: args.epochs.clone(),
        time: args.time,
        delta_bytes: settings.memory.delta_memory.bytes(),
    };
    let seen = watched(&mut guest, &watch, args.vm.as_str());
    let guest_pages = guest.source().layout().page_count();
    let seen = match seen {
        Err(error) => {
            drop(guest);
            return Err(anyhow::Error::new(error).context("the guest was let go"));
        }
        Ok(seen) => seen,
    };
    guest.let_go().context("letting the guest go")?;
    host.load_after = load();
    let link = link(args);
    let limits = limits(settings);
    let profile = link
        .profile(&seen)
        .context("the epochs that were seen cannot be compared; try again, or for longer (--time)")?;
    let predicted = LENGTHS_MS.map(|ms| Predicted::of(&profile.at(ms * 1e6, limits.fault_ns)));
    let recommended = goals(args)
        .into_iter()
        .map(|goal| recommend(&profile, goal, limits))
        .collect();
    Ok(Answer {
        schema: SCHEMA,
        vm: args.vm.as_str().to_owned(),
        hypervisor: match &wanted.socket {
            Socket::Qmp(socket) => format!("QEMU at {}", socket.display()),
            Socket::Attach(socket) => format!("VMM at {}", socket.display()),
        },
        guest_pages,
        host,
        versions: Versions::this(),
        in_the_way,
        link,
        fault_ns: limits.fault_ns,
        observed: seen,
        predicted: predicted.to_vec(),
        recommended,
    })
}

/// Looks at a guest, and shows how far it is.
fn watched(guest: &mut Attached, watch: &Watch, vm: &str) -> Result<Vec<observe::Observed>, ObserveError> {
    let bar = ProgressBar::new(1000);
    if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} {bar:24} {percent} % {msg}") {
        bar.set_style(style);
    }
    let mut last = String::new();
    let seen = observe::observe(guest.source(), watch, &mut |what, part| {
        if what != last {
            what.clone_into(&mut last);
            bar.set_message(format!("{vm}: {what}"));
            if bar.is_hidden() {
                eprintln!("{vm}: {what}");
            }
        }
        bar.set_position(thousandths(part));
    });
    bar.finish_and_clear();
    seen
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "from 0 to 1000"
)]
fn thousandths(part: f64) -> u64 {
    (part.clamp(0.0, 1.0) * 1000.0) as u64
}

fn link(args: &AdviseArgs) -> Link {
    let ns = |time: Duration| time.as_secs_f64() * 1e9;
    Link {
        bytes_a_second: f64::from(args.link_mbit) * 1e6 / 8.0,
        round_trip_ns: ns(args.round_trip),
        commit_ns: ns(args.commit_cost),
        page_ns: ns(args.page_cost),
    }
}

/// What the settings of `epochs.length = "auto"` say, but up to the longest length that is answered for.
fn limits(settings: &Replicator) -> Limits {
    let auto = &settings.epochs.auto;
    let ns = |time: Duration| time.as_secs_f64() * 1e9;
    let least_ns = ns(auto.length_min);
    Limits {
        least_ns,
        most_ns: (LENGTHS_MS[LENGTHS_MS.len() - 1] * 1e6).max(least_ns),
        fault_ns: ns(auto.fault_cost),
    }
}

fn goals(args: &AdviseArgs) -> Vec<Goal> {
    let latency = |time: Duration| Goal::Latency {
        held_ns: time.as_secs_f64() * 1e9,
    };
    let overhead = |percent: f64| Goal::Overhead {
        ratio: percent / 100.0,
    };
    match (args.latency, args.overhead) {
        (Some(time), _) => vec![latency(time)],
        (None, Some(percent)) => vec![overhead(percent)],
        (None, None) => vec![latency(Duration::from_millis(10)), overhead(10.0)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_epoch_and_no_percentage_is_refused() {
        for text in ["0ms", "2s", "x", ""] {
            assert!(epoch(text).is_err(), "{text}");
        }
        assert_eq!(epoch("25ms"), Ok(Duration::from_millis(25)));
        for text in ["0", "100%", "-1%", "ten", "NaN"] {
            assert!(percent(text).is_err(), "{text}");
        }
        assert_eq!((percent("10%"), percent("2.5")), (Ok(10.0), Ok(2.5)));
    }

    #[test]
    fn what_is_assumed_of_a_link_by_default_is_what_the_measures_assume() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: AdviseArgs,
        }
        let line = <Line as clap::Parser>::try_parse_from(["x", "--vm", "demo"]).unwrap();
        assert_eq!(link(&line.args), Link::default());
        assert_eq!((goals(&line.args).len(), line.args.epochs.len()), (2, 4));
        let both = ["x", "--vm", "demo", "--latency", "5ms", "--overhead", "5%"];
        assert!(<Line as clap::Parser>::try_parse_from(both).is_err());
    }
}
