//! Metrics as Prometheus reads them. They are taken from the daemon's figures when somebody asks: nothing is counted twice, and
//! counting costs the work nothing that the status does not cost it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::catalogue::{Definition, Kind, PREFIX};
use crate::{Buckets, process};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A value of one metric with one set of labels.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Whole(u64),
    Real(f64),
    Buckets(Buckets),
}

/// A metric's values, each with its labels.
struct Series {
    definition: &'static Definition,
    values: Vec<(Vec<String>, Value)>,
}

/// The values that a daemon shows when it is asked.
#[derive(Default)]
pub struct Samples(BTreeMap<&'static str, Series>);

impl Samples {
    /// A whole number, in the daemon's unit.
    pub fn number(&mut self, definition: &'static Definition, labels: &[&str], number: u64) {
        self.add(definition, labels, Value::Whole(number));
    }

    /// 1 or 0.
    pub fn flag(&mut self, definition: &'static Definition, labels: &[&str], flag: bool) {
        self.number(definition, labels, u64::from(flag));
    }

    /// A number that need not be whole.
    pub fn real(&mut self, definition: &'static Definition, labels: &[&str], number: f64) {
        self.add(definition, labels, Value::Real(number));
    }

    /// A distribution.
    pub fn buckets(&mut self, definition: &'static Definition, labels: &[&str], buckets: &Buckets) {
        self.add(definition, labels, Value::Buckets(buckets.clone()));
    }

    /// A value of each of `all`, which is the last label: 1 for the one that holds, 0 for all others.
    pub fn one_of(
        &mut self,
        definition: &'static Definition,
        labels: &[&str],
        all: &[&str],
        holds: Option<&str>,
    ) {
        for name in all {
            let labels: Vec<&str> = labels.iter().chain([name]).copied().collect();
            self.flag(definition, &labels, holds == Some(name));
        }
    }

    fn add(&mut self, definition: &'static Definition, labels: &[&str], value: Value) {
        assert_eq!(
            (labels.len(), definition.kind == Kind::Histogram),
            (definition.labels.len(), matches!(value, Value::Buckets(_))),
            "{} is given the labels and the kind of value that it has",
            definition.name
        );
        let series = self.0.entry(definition.name).or_insert_with(|| Series {
            definition,
            values: Vec::new(),
        });
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        series.values.push((labels, value));
    }
}

type Source = Arc<dyn Fn(&mut Samples) + Send + Sync>;

/// A daemon's metrics. Clones stand for the same ones.
#[derive(Clone)]
pub struct Metrics {
    catalogue: &'static [&'static Definition],
    source: Source,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// In which form metrics are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' older text form, 0.0.4, which every tool reads.
    Plain,
}

impl Metrics {
    /// The metrics of `catalogue`; `source` says them when somebody asks, and must be quick. `daemon` and `version` are what
    /// [`BUILD_INFO`](crate::catalogue::BUILD_INFO) says.
    pub fn new(
        catalogue: &'static [&'static Definition],
        daemon: &'static str,
        version: &'static str,
        source: impl Fn(&mut Samples) + Send + Sync + 'static,
    ) -> Self {
        let source: Source = Arc::new(move |samples: &mut Samples| {
            process::sample(samples, daemon, version);
            source(samples);
        });
        Self { catalogue, source }
    }

    /// All metrics as text.
    ///
    /// # Panics
    /// When the source says something that is not in its catalogue.
    pub fn text(&self, form: Form) -> String {
        let mut samples = Samples::default();
        (self.source)(&mut samples);
        for series in samples.0.values() {
            let name = series.definition.name;
            assert!(
                self.catalogue.contains(&series.definition),
                "{name} is in the catalogue"
            );
        }
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(Encoding(samples, self.catalogue)));
        let mut text = String::new();
        let written = prometheus_client::encoding::text::encode(&mut text, &registry);
        written.expect("writing to a string does not fail");
        match form {
            Form::OpenMetrics => text,
            Form::Plain => plain(&text, self.catalogue),
        }
    }

    /// A route `/metrics`, in the form that is asked for.
    pub fn router(&self) -> Router {
        let metrics = self.clone();
        let answer = move |headers: HeaderMap| {
            let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
            let (form, content) = if accept.is_some_and(|accept| accept.contains("openmetrics-text")) {
                (Form::OpenMetrics, OPEN_METRICS)
            } else {
                (Form::Plain, PLAIN)
            };
            let text = metrics.text(form);
            async move { ([(CONTENT_TYPE, content)], text) }
        };
        Router::new().route("/metrics", get(answer))
    }
}

/// The older text form differs in what names a counter in its head lines, and has no end mark.
fn plain(text: &str, catalogue: &[&Definition]) -> String {
    let counters: Vec<String> = catalogue
        .iter()
        .filter(|definition| definition.kind == Kind::Counter)
        .map(|definition| format!("{PREFIX}_{}", definition.name))
        .collect();
    let mut plain = String::with_capacity(text.len() + 16 * counters.len());
    for line in text.lines().filter(|line| *line != "# EOF") {
        let head = ["# HELP ", "# TYPE "]
            .iter()
            .find_map(|mark| Some((*mark, line.strip_prefix(mark)?)));
        match head.and_then(|(mark, rest)| Some((mark, rest.split_once(' ')?))) {
            Some((mark, (name, rest))) if counters.iter().any(|counter| counter == name) => {
                plain.push_str(&format!("{mark}{name}_total {rest}"));
            }
            _ => plain.push_str(line),
        }
        plain.push('\n');
    }
    plain
}

struct Encoding(Samples, &'static [&'static Definition]);

impl fmt::Debug for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoding").finish_non_exhaustive()
    }
}

impl Collector for Encoding {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(Samples(samples), catalogue) = self;
        for series in catalogue
            .iter()
            .filter_map(|definition| samples.get(definition.name))
        {
            series.encode(&mut encoder)?;
        }
        Ok(())
    }
}

impl Series {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let definition = self.definition;
        let kind = match definition.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        };
        let mut metric = encoder.encode_descriptor(definition.name, definition.help, None, kind)?;
        for (values, value) in &self.values {
            let labels: Vec<(&str, &str)> = definition
                .labels
                .iter()
                .copied()
                .zip(values.iter().map(String::as_str))
                .collect();
            if labels.is_empty() {
                value.encode(&mut metric, kind, definition.per_unit)?;
            } else {
                value.encode(&mut metric.encode_family(&labels)?, kind, definition.per_unit)?;
            }
        }
        Ok(())
    }
}

impl Value {
    fn encode(&self, metric: &mut MetricEncoder<'_>, kind: MetricType, per_unit: u64) -> fmt::Result {
        match self {
            Self::Buckets(buckets) => {
                let bound = |bound: Option<u64>| bound.map_or(f64::INFINITY, |end| in_units(end, per_unit));
                let bounds: Vec<(f64, u64)> =
                    buckets.each().map(|(end, count)| (bound(end), count)).collect();
                let (sum, count) = (in_units(buckets.sum(), per_unit), buckets.count());
                metric.encode_histogram::<NoLabelSet>(sum, count, &bounds, None)
            }
            Self::Whole(number) if per_unit == 1 => encode_number(metric, kind, number),
            Self::Whole(number) => encode_number(metric, kind, &in_units(*number, per_unit)),
            Self::Real(number) => encode_number(metric, kind, number),
        }
    }
}

fn encode_number<N>(metric: &mut MetricEncoder<'_>, kind: MetricType, number: &N) -> fmt::Result
where
    N: EncodeCounterValue + EncodeGaugeValue,
{
    match kind {
        MetricType::Counter => metric.encode_counter::<NoLabelSet, N, f64>(number, None),
        _ => metric.encode_gauge(number),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a metric has 53 bits, as Prometheus does"
)]
fn in_units(number: u64, per_unit: u64) -> f64 {
    number as f64 / per_unit as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{
        LAG_SECONDS, PAGES, PAUSE_SECONDS, PROTECTED, REPLICATOR, STANDBY, START_TIME_SECONDS,
    };

    fn metrics() -> Metrics {
        Metrics::new(REPLICATOR, "replicator", "1.2.3", |samples| {
            samples.flag(&PROTECTED, &["web"], true);
            samples.number(&PAGES, &["web", "lz4"], 3);
            samples.number(&LAG_SECONDS, &["web"], 25_000_000);
            let mut pauses = Buckets::durations();
            pauses.record(20_000);
            samples.buckets(&PAUSE_SECONDS, &["web"], &pauses);
        })
    }

    #[test]
    fn open_metrics_have_the_prefix_their_labels_and_an_end() {
        let text = metrics().text(Form::OpenMetrics);
        for line in [
            "# TYPE romulus_encoded_pages counter",
            "romulus_encoded_pages_total{vm=\"web\",encoding=\"lz4\"} 3",
            "romulus_protected{vm=\"web\"} 1",
            "romulus_lag_seconds{vm=\"web\"} 0.025",
            "romulus_build_info{daemon=\"replicator\",version=\"1.2.3\"} 1",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn the_plain_form_names_a_counter_as_its_samples_do() {
        let text = metrics().text(Form::Plain);
        assert!(
            text.contains("# TYPE romulus_encoded_pages_total counter\n"),
            "{text}"
        );
        assert!(
            text.contains("# HELP romulus_encoded_pages_total Pages"),
            "{text}"
        );
        assert!(!text.contains("# EOF"), "{text}");
    }

    #[test]
    fn durations_are_shown_in_seconds_and_cumulated() {
        let text = metrics().text(Form::Plain);
        for line in [
            "romulus_pause_seconds_sum{vm=\"web\"} 0.00002",
            "romulus_pause_seconds_count{vm=\"web\"} 1",
            "romulus_pause_seconds_bucket{le=\"0.000016\",vm=\"web\"} 0",
            "romulus_pause_seconds_bucket{le=\"0.000032\",vm=\"web\"} 1",
            "romulus_pause_seconds_bucket{le=\"+Inf\",vm=\"web\"} 1",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
    }

    #[test]
    fn a_label_cannot_break_out_of_its_quotes() {
        let metrics = Metrics::new(REPLICATOR, "replicator", "1\"\n2", |_| {});
        let text = metrics.text(Form::Plain);
        assert!(text.contains(r#"version="1\"\n2"} 1"#), "{text}");
    }

    #[test]
    fn of_several_states_one_holds() {
        let mut samples = Samples::default();
        samples.one_of(&STANDBY, &["web"], &["none", "waiting"], Some("waiting"));
        let values: Vec<_> = samples.0["standby"]
            .values
            .iter()
            .map(|(_, value)| value)
            .collect();
        assert_eq!(values, [&Value::Whole(0), &Value::Whole(1)]);
    }

    #[test]
    #[should_panic(expected = "standby is in the catalogue")]
    fn what_the_catalogue_does_not_have_is_not_shown() {
        let metrics = Metrics::new(REPLICATOR, "replicator", "1", |samples| {
            samples.flag(&STANDBY, &["web", "none"], true);
        });
        let _ = metrics.text(Form::Plain);
    }

    #[test]
    fn the_process_says_when_it_began_and_what_it_costs() {
        let text = metrics().text(Form::Plain);
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!(value(&START_TIME_SECONDS.full_name()) > 1.6e9);
        assert!(value("romulus_resident_memory_bytes ") > 100_000.0);
        assert!(value("romulus_cpu_seconds_total ") >= 0.0);
    }
}
