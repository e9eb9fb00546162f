//! What the verbs of the command line do, and their exit codes.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::check::{Check, History, Verdict as Moved};
use crate::compare::{self, Comparison, Verdict};
use crate::page::Page;
use crate::plan::{self, Plan};
use crate::report::Report;
use crate::run::{Effort, Settings};
use crate::{measures, read, scale, table};

/// What `bench check` compares with when nothing else is named: the checkout's history, or the host's where there is no checkout.
const HISTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/history/check.jsonl");
const HISTORY_OF_HOST: &str = "/var/lib/romulus/bench-check.jsonl";
/// The plan or the command line is wrong. The same number as clap's own.
const EXIT_USAGE: u8 = 2;
/// Everything was measured, and a bound does not hold.
const EXIT_BOUND: u8 = 3;
/// Something that the plan names could not be measured.
const EXIT_UNABLE: u8 = 4;

#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// A plan: a TOML file, or the name of one that is built in
    plan: String,
    /// Few rounds, to see that everything runs: the figures mean little
    #[arg(long)]
    quick: bool,
    /// One repetition of one round, to see that everything runs; also quick in the report
    #[arg(long, conflicts_with = "quick")]
    shortest: bool,
    /// Only measures whose name begins so; can be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
    #[command(flatten)]
    outputs: OutputArgs,
}

#[derive(clap::Args)]
pub(crate) struct ScaleArgs {
    /// A plan with the measure `scale`: a TOML file, or the name of one that is built in
    #[arg(long, default_value = "scale")]
    plan: String,
    /// A report to take costs from, instead of measuring them now; can be given several times
    #[arg(long, value_name = "FILE")]
    costs: Vec<PathBuf>,
    /// One short simulation of each fleet, and of few VMs where it saturates
    #[arg(long)]
    shortest: bool,
    #[command(flatten)]
    outputs: OutputArgs,
}

/// Where a report goes besides the terminal.
#[derive(clap::Args)]
struct OutputArgs {
    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report to this file, as an HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the page's plots into this folder
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct ReportArgs {
    /// Reports of `bench run --json`, at most 64
    #[arg(required = true, num_args = 1..=64)]
    reports: Vec<PathBuf>,
    /// Write the page to this file
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
    /// Write the plots into this folder, which is made where it is missing
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct CheckArgs {
    /// Plans; without any `parts`, and `kvm` where there is a /dev/kvm
    plans: Vec<String>,
    /// The file of earlier runs and of bounds; by default that of the source tree that this was built in, or where there is none
    /// /var/lib/romulus/bench-check.jsonl
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
    /// Add this run to the history; then a ratio that moved is no failure
    #[arg(long)]
    accept: bool,
    /// Write what was found to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How sure it must be that a ratio has moved, between 0.5 and 1
    #[arg(long, value_name = "PART", default_value_t = 0.99, value_parser = confidence)]
    confidence: f64,
}

#[derive(clap::Args)]
pub(crate) struct CompareArgs {
    /// A report of `bench run --json`
    a: PathBuf,
    /// Another one, a later one as a rule
    b: PathBuf,
    /// Write the comparison to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How sure a verdict must be, between 0.5 and 1
    #[arg(long, value_name = "PART", default_value_t = 0.95, value_parser = confidence)]
    confidence: f64,
}

/// Of a verdict.
fn confidence(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(part) if (0.5..1.0).contains(&part) => Ok(part),
        _ => Err("it must be at least 0.5 and less than 1".to_owned()),
    }
}

pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let plan = match Plan::find(&args.plan).and_then(|plan| plan.only(&args.only)) {
        Ok(plan) => plan,
        Err(error) => return Ok(usage(error)),
    };
    let effort = match args {
        RunArgs { shortest: true, .. } => Effort::Shortest,
        RunArgs { quick: true, .. } => Effort::Quick,
        _ => Effort::Full,
    };
    measure(&plan, effort, Outputs::open(&args.outputs)?)
}

/// The same for a plan with simulated fleets.
pub(crate) fn scale(args: &ScaleArgs) -> anyhow::Result<ExitCode> {
    let costs = args.costs.iter().map(|path| path.to_string_lossy().into_owned());
    let costs: Vec<toml::Value> = costs.map(toml::Value::String).collect();
    let plan = Plan::find_changed(&args.plan, |name, table| {
        if !costs.is_empty() && name.starts_with("scale") {
            table.insert("costs".to_owned(), toml::Value::Array(costs.clone()));
        }
    });
    let plan = match plan.and_then(|plan| plan.only(&["scale".to_owned()])) {
        Ok(plan) => plan,
        Err(error) => return Ok(usage(error)),
    };
    for path in &args.costs {
        if let Err(error) = read::report(path) {
            return Ok(usage(error));
        }
    }
    let effort = if args.shortest {
        Effort::Shortest
    } else {
        Effort::Full
    };
    measure(&plan, effort, Outputs::open(&args.outputs)?)
}

/// The files of [`OutputArgs`]. Opened before the first measure: minutes of it must not end in a file that cannot be written.
struct Outputs<'a> {
    json: Option<File>,
    html: Option<File>,
    svg: Option<&'a Path>,
}

impl<'a> Outputs<'a> {
    fn open(args: &'a OutputArgs) -> anyhow::Result<Self> {
        let svg = args.svg.as_deref();
        svg.map(folder).transpose()?;
        Ok(Self {
            json: args.json.as_deref().map(created).transpose()?,
            html: args.html.as_deref().map(created).transpose()?,
            svg,
        })
    }
}

/// Measures all of a plan, and says what was found everywhere that it is to be said.
fn measure(plan: &Plan, effort: Effort, mut outputs: Outputs<'_>) -> anyhow::Result<ExitCode> {
    warn_of_debug();
    let report = Report::of(plan, Settings::of(plan, effort));
    match scale::table(&report) {
        Some(table) => print!("{table}"),
        None => print!("{}", table::of(&report)),
    }
    if let Some(file) = &mut outputs.json {
        let text = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.write_all(b"\n"))
            .context("cannot write the report")?;
    }
    let (unable, ok) = (report.has_errors(), report.ok);
    if outputs.html.is_some() || outputs.svg.is_some() {
        let page = Page::of(&[report]);
        if let Some(file) = &mut outputs.html {
            file.write_all(page.html.as_bytes())
                .context("cannot write the page")?;
        }
        outputs.svg.map(|dir| draw(&page, dir)).transpose()?;
    }
    Ok(if unable {
        ExitCode::from(EXIT_UNABLE)
    } else if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_BOUND)
    })
}

pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let path = match &args.history {
        Some(path) => path.clone(),
        None if Path::new(HISTORY).exists() => PathBuf::from(HISTORY),
        None => PathBuf::from(HISTORY_OF_HOST),
    };
    let mut names: Vec<&str> = args.plans.iter().map(String::as_str).collect();
    if names.is_empty() {
        names.push("parts");
        names.extend(Path::new("/dev/kvm").exists().then_some("kvm"));
    }
    let plans: Result<Vec<Plan>, _> = names.into_iter().map(Plan::find).collect();
    let (plans, history) = match (plans, History::read(&path)) {
        (Ok(plans), Ok(history)) => (plans, history),
        (Err(error), _) => return Ok(usage(error)),
        (_, Err(error)) => return Ok(usage(error)),
    };
    warn_of_debug();
    let (mut checks, mut reports) = (Vec::new(), Vec::new());
    for plan in &plans {
        let report = Report::of(plan, Settings::of(plan, Effort::Quick));
        let check = Check::of(&report, &history, args.confidence);
        print!("{}", check.table());
        checks.push(check);
        reports.push(report);
    }
    if let Some(path) = &args.json {
        write_json(path, &checks)?;
    }
    let unable = reports.iter().any(Report::has_errors);
    if args.accept && unable {
        eprintln!("not added to the history: a measure could not run");
    } else if args.accept {
        for report in &reports {
            History::accept(&path, report)?;
        }
    }
    let moved = !args.accept && checks.iter().any(|check| check.any(Moved::Higher));
    Ok(if unable {
        ExitCode::from(EXIT_UNABLE)
    } else if moved || checks.iter().any(Check::over) {
        ExitCode::from(EXIT_BOUND)
    } else {
        ExitCode::SUCCESS
    })
}

pub(crate) fn report(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    let reports: Result<Vec<Report>, _> = args.reports.iter().map(|path| read::report(path)).collect();
    let page = match reports {
        Ok(reports) => Page::of(&reports),
        Err(error) => return Ok(usage(error)),
    };
    std::fs::write(&args.html, &page.html)
        .with_context(|| format!("cannot write {}", args.html.display()))?;
    if let Some(dir) = &args.svg {
        folder(dir)?;
        draw(&page, dir)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn warn_of_debug() {
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a debug build; its figures mean nothing (cargo run --release -p bench)");
    }
}

pub(crate) fn created(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("cannot write {}", path.display()))
}

fn folder(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", path.display()))
}

/// Writes the plots of a page.
fn draw(page: &Page, dir: &Path) -> anyhow::Result<()> {
    for (name, plot) in &page.plots {
        let path = dir.join(name);
        std::fs::write(&path, plot).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

pub(crate) fn compare(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let (a, b) = match read::report(&args.a).and_then(|a| Ok((a, read::report(&args.b)?))) {
        Ok(both) => both,
        Err(error) => return Ok(usage(error)),
    };
    let comparison = Comparison::of(&a, &b, args.confidence);
    print!("{}", compare::table(&comparison));
    if let Some(path) = &args.json {
        write_json(path, &comparison)?;
    }
    Ok(match comparison.count(Verdict::Slower) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(EXIT_BOUND),
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value).context("cannot write as JSON")?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Says what is wrong with the command line, or with a file that it names.
fn usage(error: impl std::error::Error + Send + Sync + 'static) -> ExitCode {
    eprintln!("error: {:#}", anyhow::Error::new(error));
    ExitCode::from(EXIT_USAGE)
}

pub(crate) fn list() {
    println!("measures:");
    for kind in measures::ALL {
        println!("  {:18} {}", kind.name, kind.about);
    }
    println!("\nbuilt-in plans:");
    for (name, text) in plan::BUILT_IN {
        let about = Plan::parse(text).map_or_else(|error| error.to_string(), |plan| plan.about);
        println!("  {name:18} {about}");
    }
}
