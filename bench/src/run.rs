//! The run of one measure: what it does in turn, what it found.
//!
//! A value and its reference are taken *in turn*, sample by sample, and who begins changes from round to round: whatever
//! the machine does meanwhile, it does to both.

use indicatif::ProgressBar;
use romulus_guest_core::random::Random;
use romulus_host_sys::monotonic_ns;

use crate::parameters::Parameters;
use crate::plan::Plan;
use crate::series::Series;
use crate::stats::{Figure, Timings};
use crate::table;

/// With `--quick`, so many times fewer rounds…
const QUICK_ROUNDS: u32 = 10;
/// …but at least so many.
const QUICK_ROUNDS_MIN: u32 = 3;
/// …and at most so many repetitions.
const QUICK_REPETITIONS: u32 = 2;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unable {
    /// This machine lacks something.
    #[error("{what}: {remedy}")]
    Missing { what: String, remedy: String },
    /// Something failed that should not.
    #[error("{doing} failed")]
    Failed {
        doing: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was measured did not do what it should: its time means nothing.
    #[error("{0}")]
    Wrong(String),
}

impl Unable {
    /// For `map_err`.
    pub(crate) fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        doing: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Failed {
            doing,
            source: source.into(),
        }
    }
}

/// How thorough a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// As planned.
    Full,
    /// A tenth of the rounds.
    Quick,
    /// One repetition of one round: only whether it runs.
    Shortest,
}

/// What holds for a whole run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) effort: Effort,
    pub(crate) repetitions: u32,
    pub(crate) seed: u64,
}

impl Settings {
    pub(crate) fn of(plan: &Plan, effort: Effort) -> Self {
        Self {
            effort,
            repetitions: plan.repetitions,
            seed: plan.seed,
        }
    }
}

/// One value with its reference.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    /// What tells it from the other rows of its measure; may be empty.
    pub(crate) case: String,
    pub(crate) unit: &'static str,
    pub(crate) value: Figure,
    /// What it is compared with, in words, and its figure.
    pub(crate) reference: Option<(String, Figure)>,
    /// Anything that helps to understand it.
    pub(crate) note: Option<String>,
}

/// A case that could not be measured, while the others could.
#[derive(Debug)]
pub(crate) struct Missed {
    pub(crate) case: String,
    pub(crate) why: Unable,
}

/// The run of one measure.
pub(crate) struct Run {
    settings: Settings,
    name: &'static str,
    bar: ProgressBar,
    findings: Vec<Result<(Finding, Parameters), Missed>>,
    /// By their cases.
    series: Vec<(String, Series)>,
}

impl Run {
    pub(crate) fn new(settings: Settings, name: &'static str, bar: ProgressBar) -> Self {
        Self {
            settings,
            name,
            bar,
            findings: Vec::new(),
            series: Vec::new(),
        }
    }

    pub(crate) fn effort(&self) -> Effort {
        self.settings.effort
    }

    pub(crate) fn seed(&self) -> u64 {
        self.settings.seed
    }

    pub(crate) fn repetitions(&self) -> u32 {
        match self.settings.effort {
            Effort::Full => self.settings.repetitions,
            Effort::Quick => self.settings.repetitions.min(QUICK_REPETITIONS),
            Effort::Shortest => 1,
        }
    }

    /// How many rounds to make when the plan says `planned`.
    pub(crate) fn rounds(&self, planned: u32) -> u32 {
        match self.settings.effort {
            Effort::Full => planned,
            Effort::Quick => (planned / QUICK_ROUNDS).max(QUICK_ROUNDS_MIN).min(planned),
            Effort::Shortest => planned.min(1),
        }
    }

    /// How a part of it is run that others only need the figures of: never longer than a quick run.
    pub(crate) fn quicker(&self) -> Settings {
        let effort = match self.settings.effort {
            Effort::Full | Effort::Quick => Effort::Quick,
            Effort::Shortest => Effort::Shortest,
        };
        Settings {
            effort,
            ..self.settings
        }
    }

    /// Random numbers that are the same in every run of the plan.
    pub(crate) fn random(&self) -> Random {
        let name = self
            .name
            .bytes()
            .fold(0, |sum: u64, byte| sum.wrapping_mul(31) + u64::from(byte));
        Random::new(self.settings.seed ^ name)
    }

    /// Says what is under way.
    pub(crate) fn say(&self, what: impl Into<String>) {
        self.bar.set_message(format!("{} {}", self.name, what.into()));
        self.bar.tick();
    }

    /// The same, and a line of its own where no bar is drawn: for what takes long.
    pub(crate) fn tell(&self, what: impl Into<String>) {
        let what = what.into();
        self.finished(&format!("  {}: {what}", self.name));
        self.say(what);
    }

    /// A finding at these parameters, over which a report can draw it; those that came before a failure stay in the report.
    pub(crate) fn found_at(&mut self, at: impl Into<Parameters>, finding: Finding) {
        self.finished(&table::progress(self.name, &finding));
        self.findings.push(Ok((finding, at.into())));
    }

    /// How it went, for the row of this case.
    pub(crate) fn went(&mut self, case: &str, series: Series) {
        self.series.push((case.to_owned(), series));
    }

    pub(crate) fn take_series(&mut self) -> Vec<(String, Series)> {
        std::mem::take(&mut self.series)
    }

    /// Says that the measure begins, the `number`th of so many.
    pub(crate) fn began(&self, number: usize, of: usize) {
        self.finished(&format!("[{number}/{of}] {}", self.name));
    }

    /// A line for every finished row where no bar is drawn: a run that says nothing for minutes looks dead.
    fn finished(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        }
    }

    /// A case that cannot be measured; the measure goes on with the next one.
    pub(crate) fn missed(&mut self, case: &str, why: Unable) {
        self.finished(&format!("{}/{case}: FAILED: {why}", self.name));
        self.findings.push(Err(Missed {
            case: case.to_owned(),
            why,
        }));
    }

    pub(crate) fn into_findings(self) -> Vec<Result<(Finding, Parameters), Missed>> {
        self.findings
    }

    /// Takes samples of `N` things in turn: `sample(i)` does thing `i` once and returns its nanoseconds. Each is done once
    /// before, unrecorded.
    pub(crate) fn in_turn<const N: usize>(
        &self,
        what: &str,
        rounds: u32,
        mut sample: impl FnMut(usize) -> Result<u64, Unable>,
    ) -> Result<[Timings; N], Unable> {
        let mut timings: [Timings; N] = std::array::from_fn(|_| Timings::new());
        for repetition in 0..self.repetitions() {
            self.say(format!("{what}, {} of {}", repetition + 1, self.repetitions()));
            for (one, timings) in timings.iter_mut().enumerate() {
                timings.begin_repetition();
                sample(one)?;
            }
            for round in 0..self.rounds(rounds) {
                for step in 0..N {
                    let one = (round as usize + step) % N;
                    timings[one].record(sample(one)?);
                }
            }
        }
        Ok(timings)
    }
}

/// How long something takes, in nanoseconds.
pub(crate) fn timed(work: impl FnOnce()) -> u64 {
    let begun_ns = monotonic_ns();
    work();
    monotonic_ns() - begun_ns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Unit;

    fn run(effort: Effort) -> Run {
        let settings = Settings {
            effort,
            repetitions: 4,
            seed: 1,
        };
        Run::new(settings, "test", ProgressBar::hidden())
    }

    #[test]
    fn value_and_reference_are_taken_in_turn_and_nobody_always_begins() {
        let mut order = Vec::new();
        let timings = run(Effort::Full)
            .in_turn::<2>("x", 2, |one| {
                order.push(one);
                Ok(one as u64 + 1)
            })
            .unwrap();
        assert_eq!(order[..6], [0, 1, 0, 1, 1, 0], "warm-up, then two rounds");
        assert_eq!(order.len(), 4 * 6);
        let figures = timings.map(|timings| timings.figure(Unit::US).unwrap());
        assert_eq!(
            figures[0].samples, 8,
            "four repetitions of two rounds, without the warm-up"
        );
        assert!(figures[0].max < figures[1].min);
    }

    #[test]
    fn a_failure_ends_a_measure() {
        let failed = run(Effort::Full).in_turn::<1>("x", 2, |_| Err(Unable::Wrong("no".to_owned())));
        assert!(failed.is_err());
    }

    #[test]
    fn quick_is_less_but_never_nothing() {
        assert_eq!(
            (
                run(Effort::Quick).repetitions(),
                run(Effort::Quick).rounds(200),
                run(Effort::Quick).rounds(2)
            ),
            (2, 20, 2)
        );
        assert_eq!(
            (run(Effort::Full).repetitions(), run(Effort::Full).rounds(200)),
            (4, 200)
        );
        let shortest = run(Effort::Shortest);
        assert_eq!((shortest.repetitions(), shortest.rounds(200)), (1, 1));
    }
}
