//! Measured rows ─► what each step costs.
//!
//! | step | from | for |
//! |---|---|---|
//! | capture | `kvm.pause`; without a /dev/kvm `memory.copy` | epoch, page |
//! | encode | `codec.session`, `wire.frames/put` | page |
//! | send, receive | `transport`: bulk, and a quarter of a round trip; `host.connections` of a real agent instead of the latter | byte, epoch |
//! | decode | `codec.page/decode`, `wire.frames/take` | page |
//! | verify | `digest/page` | page |
//! | commit, apply | `image.commit` | epoch, page |
//!
//! The bytes of an encoded page are no timing: pages are encoded and counted.

use romulus_page_codec::{HeldPages, SessionEncoder};
use romulus_types::{PAGE_BYTES, PageIndex, Session};

use super::shape::{Cost, Costs};
use crate::contents::Content;
use crate::plan::{Plan, PlanError};
use crate::report::{Report, Row};
use crate::run::{Run, Settings, Unable};
use crate::stats::float;

/// Pages that are encoded to see how large they get.
const SAMPLE_PAGES: u64 = 256;

/// Rows, and where they are from.
pub(super) struct Rows {
    rows: Vec<Row>,
    pub(super) sources: Vec<String>,
}

impl Rows {
    /// Those of reports, the first of a name before later ones.
    pub(super) fn of(reports: Vec<(String, Report)>) -> Self {
        let (mut rows, mut sources) = (Vec::new(), Vec::new());
        for (name, report) in reports {
            sources.push(format!("{name} (plan {}, {})", report.plan, report.host.cpu));
            rows.extend(report.measures.into_iter().filter(|row| row.value.is_some()));
        }
        Self { rows, sources }
    }

    /// Measures what no report has, as quickly as that goes.
    pub(super) fn complete(&mut self, run: &Run, content: Content) -> Result<(), Unable> {
        let mut plan = String::from("name = 'costs'\nrepetitions = 2\n");
        let mut measured = Vec::new();
        let content = format!("contents = ['{}']", content.name());
        let kvm = std::path::Path::new("/dev/kvm").exists();
        let wanted = [
            (
                "kvm.pause",
                "pages = [0, 64, 1024, 4096]\nmemory_mib = 256\nrounds = 100",
                kvm,
            ),
            ("memory.copy", "pages = [64, 1024, 4096]", !kvm),
            ("codec.session", content.as_str(), true),
            ("codec.page", content.as_str(), true),
            ("digest", "", true),
            ("wire.frames", "", true),
            ("image.commit", "", true),
            ("transport", "", true),
        ];
        for (measure, settings, possible) in wanted {
            if possible && !self.has(measure) {
                plan.push_str(&format!("[[measure]]\nmeasure = '{measure}'\n{settings}\n"));
                measured.push(measure);
            }
        }
        if measured.is_empty() {
            return Ok(());
        }
        run.say("measuring costs");
        let plan = Plan::parse(&plan).map_err(Unable::failed::<PlanError>("planning to measure costs"))?;
        let settings = Settings {
            repetitions: plan.repetitions,
            ..run.quicker()
        };
        let report = Report::of(&plan, settings);
        if let Some(row) = report.measures.iter().find(|row| row.error.is_some()) {
            let why = row.error.as_deref().unwrap_or_default();
            return Err(Unable::Wrong(format!(
                "{} could not be measured: {why}",
                row.name
            )));
        }
        self.rows.extend(report.measures);
        self.sources
            .push(format!("measured now: {}", measured.join(", ")));
        Ok(())
    }

    fn has(&self, measure: &str) -> bool {
        self.under(measure).next().is_some()
    }

    /// Rows of a measure, or of some of its cases.
    fn under(&self, name: &str) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |row| {
            let rest = row.name.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// The first row of that name.
    pub(super) fn row(&self, name: &str) -> Option<&Row> {
        self.under(name).next()
    }

    fn value(&self, name: &str) -> Result<f64, Unable> {
        let row = self.row(name).and_then(|row| row.value);
        row.ok_or_else(|| {
            Unable::Wrong(format!(
                "no report has a value of {name}, and it was not measured: give another report, or none"
            ))
        })
    }

    /// The line through the values of some rows over a parameter: what nothing costs, and each one more, in what the rows have.
    fn line(&self, name: &str, over: &str) -> Result<(f64, f64), Unable> {
        let points: Vec<(f64, f64)> = self
            .under(name)
            .filter_map(|row| Some((row.parameters.get(over)?.number()?, row.value?)))
            .collect();
        fit(&points).ok_or_else(|| {
            Unable::Wrong(format!(
                "a report has fewer than two values of {name} over {over}: its costs cannot be told"
            ))
        })
    }

    /// The costs of pages with such contents.
    pub(super) fn costs(&self, content: Content, run: &Run) -> Result<Costs, Unable> {
        let name = content.name();
        let page_bytes = encoded_bytes(content, run);
        let (pause_us, pause_page_us) = if self.has("kvm.pause") {
            self.line("kvm.pause", "pages")?
        } else {
            // What stopping a guest and saving its state costs is not known without one.
            (0.0, self.line("memory.copy", "pages")?.1)
        };
        let frames = |what: &str| {
            let (nothing, byte) = self.line(&format!("wire.frames/{what}"), "payload_bytes")?;
            Ok::<f64, Unable>(nothing + byte * page_bytes)
        };
        let byte_ns = self.value("transport/bulk")? / float(1 << 20);
        let message_ns = self.value("transport/round-trip")? * 1e3 / 4.0;
        let connection = |epoch_ns| Cost {
            epoch_ns,
            page_ns: 0.0,
            byte_ns,
        };
        // Half of it with the checkpoint, half with its answer.
        let connections = self.row("host.connections").and_then(|row| row.reference);
        let image = |what: &str| {
            let (epoch_us, page_us) = self.line(&format!("image.commit/{what}"), "pages")?;
            Ok::<Cost, Unable>(Cost {
                epoch_ns: epoch_us * 1e3,
                page_ns: page_us * 1e3,
                byte_ns: 0.0,
            })
        };
        let page = |page_ns| Cost {
            page_ns,
            ..Cost::default()
        };
        Ok(Costs {
            capture: Cost {
                epoch_ns: pause_us * 1e3,
                page_ns: pause_page_us * 1e3,
                byte_ns: 0.0,
            },
            encode: page(self.value(&format!("codec.session/{name}"))? + frames("put")?),
            send: connection(message_ns),
            receive: connection(connections.map_or(message_ns, |us| us * 1e3 / 2.0)),
            decode: page(self.value(&format!("codec.page/decode/{name}"))? + frames("take")?),
            verify: page(self.value("digest/page")?),
            commit: image("commit")?,
            apply: image("apply")?,
            page_bytes,
        })
    }
}

/// The line with the smallest relative errors, which does not begin below 0; `None` with fewer than two different places.
fn fit(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|(_, y)| *y > 0.0).collect();
    let weight = |y: f64| 1.0 / (y * y);
    let sum = |of: &dyn Fn(f64, f64) -> f64| points.iter().map(|(x, y)| weight(*y) * of(*x, *y)).sum::<f64>();
    let (all, x, y) = (sum(&|_, _| 1.0), sum(&|x, _| x), sum(&|_, y| y));
    let (xx, xy) = (sum(&|x, _| x * x), sum(&|x, y| x * y));
    let area = all * xx - x * x;
    let different = points.iter().any(|(x, _)| *x != points[0].0);
    if !different || area <= 0.0 {
        return None;
    }
    let slope = ((all * xy - x * y) / area).max(0.0);
    let nothing = (y - slope * x) / all;
    if nothing >= 0.0 {
        return Some((nothing, slope));
    }
    Some((0.0, xy / xx))
}

/// Bytes of an encoded page, in the middle of a session.
fn encoded_bytes(content: Content, run: &Run) -> f64 {
    let mut random = run.random();
    let count = usize::try_from(SAMPLE_PAGES).expect("a small number");
    let (old, new) = content.pages(count, &mut random);
    let held = HeldPages::new(Session(1), SAMPLE_PAGES);
    let mut encoder = SessionEncoder::new(held, (count * 2 * PAGE_BYTES) as u64);
    let mut bytes = 0;
    for pages in [old, new] {
        bytes = 0;
        for (index, page) in (0..).map(PageIndex).zip(&pages) {
            bytes += encoder
                .encode(index, page)
                .map_or(0, |(_, payload)| payload.len() as u64);
        }
    }
    float(bytes) / float(SAMPLE_PAGES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_again_and_never_begins_below_nothing() {
        let near = |(a, b): (f64, f64), (c, d): (f64, f64)| (a - c).abs() < 1e-6 && (b - d).abs() < 1e-6;
        let points = [(0.0, 200.0), (64.0, 264.0), (1024.0, 1224.0)];
        assert!(near(fit(&points).unwrap(), (200.0, 1.0)));
        let (nothing, slope) = fit(&[(10.0, 1.0), (100.0, 100.0)]).unwrap();
        assert!(nothing == 0.0 && slope > 0.0);
        assert_eq!(fit(&[(10.0, 1.0)]), None);
        assert_eq!(fit(&[(10.0, 1.0), (10.0, 2.0)]), None);
        assert_eq!(fit(&[]), None);
    }
}
