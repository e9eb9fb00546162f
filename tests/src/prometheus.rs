//! A real Prometheus that watches a lab's daemons every second, with the alerts that are shipped.
//!
//! ```text
//!   Prometheus, on the client's host ─► a forwarder for each daemon ─► its port on the loopback address of its host
//! ```

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{sleep, spawn};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::lab::word;
use crate::namespace::visit;
use crate::{Host, Lab, Process, Stamp, wait_for};

/// Where the daemons of a lab with one VM serve their metrics.
pub const WATCHED: [(Host, u16); 3] = [(Host::Backup, 7700), (Host::Witness, 7701), (Host::Primary, 7702)];
const PORT: u16 = 9090;
const RULES: &str = include_str!("../../packaging/prometheus/romulus.rules.yml");
const UP_AT_MOST: Duration = Duration::from_secs(60);
/// How often a forwarder looks whether it should end.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The server. Dropping it ends it; what it has kept goes with the lab.
#[derive(Debug)]
pub struct Prometheus {
    server: Process,
    _forwarders: Vec<Forwarder>,
}

/// One line of a chart: its labels, and points of time (seconds of Unix time) and value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Labels by name.
    pub labels: BTreeMap<String, String>,
    /// Points, in the order of time.
    pub points: Vec<(f64, f64)>,
}

impl Prometheus {
    /// Has the daemons of a lab watched, those that are there and those that are still to come.
    ///
    /// # Errors
    /// When it is not installed, or does not come up.
    pub fn start(lab: &Lab) -> Result<Prometheus> {
        let forwarders = WATCHED
            .iter()
            .map(|(host, port)| Forwarder::start(lab, *host, *port))
            .collect::<Result<Vec<_>>>()?;
        let targets: Vec<Value> = WATCHED
            .iter()
            .zip(&forwarders)
            .map(|((host, port), forwarder)| {
                let target = format!("127.0.0.1:{}", forwarder.port);
                json!({"targets": [target], "labels": {"instance": format!("{host}:{port}")}})
            })
            .collect();
        let rules = lab.run_path("romulus.rules.yml");
        std::fs::write(&rules, RULES).context("cannot write the rules")?;
        let settings = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [word(&rules)],
            "scrape_configs": [{"job_name": "romulus", "static_configs": targets}],
        });
        let file = lab.run_path("prometheus.yml");
        // JSON is YAML.
        std::fs::write(&file, settings.to_string()).context("cannot write Prometheus' settings")?;
        let argv = [
            "prometheus".to_owned(),
            format!("--config.file={}", word(&file)),
            format!("--storage.tsdb.path={}", word(&lab.run_path("prometheus"))),
            format!("--web.listen-address=127.0.0.1:{PORT}"),
            "--log.level=warn".to_owned(),
        ];
        let server = lab
            .spawn(Host::Client, "prometheus", &argv)
            .context("`cargo xtask setup` installs it")?;
        let this = Prometheus {
            server,
            _forwarders: forwarders,
        };
        let up = wait_for("Prometheus to be ready", UP_AT_MOST, || {
            let (code, _) = lab.page(Host::Client, PORT, "/-/ready").ok()?;
            (code == 200).then_some(())
        });
        up.with_context(|| this.server.tail())?;
        Ok(this)
    }

    /// Evaluates a query for each second of a time.
    ///
    /// # Errors
    /// When it is no query, or nobody answers.
    pub fn range(&self, lab: &Lab, query: &str, (from, to): (Stamp, Stamp)) -> Result<Vec<Series>> {
        let times = format!("start={}&end={}&step=1", from.seconds(), to.seconds());
        let path = format!("/api/v1/query_range?query={}&{times}", encoded(query));
        series(&self.ask(lab, &path)?)
    }

    /// Evaluates a query at one time.
    ///
    /// # Errors
    /// When it is no query, or nobody answers.
    pub fn at(&self, lab: &Lab, query: &str, at: Stamp) -> Result<Vec<Series>> {
        let path = format!("/api/v1/query?query={}&time={}", encoded(query), at.seconds());
        series(&self.ask(lab, &path)?)
    }

    /// The names of the alerts that fire now.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn firing(&self, lab: &Lab) -> Result<Vec<String>> {
        let data = self.ask(lab, "/api/v1/alerts")?;
        let alerts = data["alerts"].as_array().context("no alerts")?.iter();
        let firing = alerts.filter(|alert| alert["state"] == "firing");
        Ok(firing
            .filter_map(|alert| alert["labels"]["alertname"].as_str().map(str::to_owned))
            .collect())
    }

    fn ask(&self, lab: &Lab, path: &str) -> Result<Value> {
        let (code, text) = lab.page(Host::Client, PORT, path)?;
        ensure!(code == 200, "Prometheus refuses {path}: {text}");
        let answer: Value = serde_json::from_str(&text).context("Prometheus answers no JSON")?;
        Ok(answer["data"].clone())
    }
}

/// The series of an answer, with `values` (of a range) or one `value`.
fn series(data: &Value) -> Result<Vec<Series>> {
    let point = |pair: &Value| {
        let value = pair[1].as_str()?.parse::<f64>().ok()?;
        Some((pair[0].as_f64()?, value))
    };
    let read = |one: &Value| {
        let labels = one["metric"].as_object()?.iter();
        let labels = labels.map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
        let points = match one["values"].as_array() {
            Some(values) => values.iter().map(point).collect::<Option<_>>()?,
            None => vec![point(&one["value"])?],
        };
        Some(Series {
            labels: labels.collect::<Option<_>>()?,
            points,
        })
    };
    let all = data["result"].as_array().context("no result")?;
    all.iter()
        .map(|one| read(one).with_context(|| format!("this is no series: {one}")))
        .collect()
}

/// A text as part of a URL's query.
fn encoded(text: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(byte);
    text.bytes()
        .map(|byte| match plain(&byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}

/// Passes connections from the client's host on to a port on the loopback address of another.
#[derive(Debug)]
struct Forwarder {
    port: u16,
    ended: Arc<AtomicBool>,
}

impl Forwarder {
    fn start(lab: &Lab, host: Host, port: u16) -> Result<Forwarder> {
        let bound = visit(&lab.net.namespace(Host::Client), || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        })?;
        let listener = bound.context("cannot listen on the client's host")?;
        listener.set_nonblocking(true)?;
        let own = listener.local_addr()?.port();
        let ended = Arc::new(AtomicBool::new(false));
        let (end, namespace) = (Arc::clone(&ended), lab.net.namespace(host));
        spawn(move || {
            while !end.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((asking, _)) => {
                        let namespace = namespace.clone();
                        spawn(move || forward(asking, &namespace, port));
                    }
                    Err(_) => sleep(LOOK_EVERY),
                }
            }
        });
        Ok(Forwarder { port: own, ended })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// Until one of both ends; a daemon that is not there is a connection that ends at once.
fn forward(asking: TcpStream, namespace: &str, port: u16) {
    let connected = visit(namespace, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
    let Ok(Ok(answering)) = connected else { return };
    let pass = |mut from: &TcpStream, mut to: &TcpStream| {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.flush();
        // Both, so that the other direction ends as well.
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    };
    if asking.set_nonblocking(false).is_err() {
        return;
    }
    std::thread::scope(|scope| {
        scope.spawn(|| pass(&asking, &answering));
        pass(&answering, &asking);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_prometheus_is_read_whether_it_is_of_a_range_or_of_a_moment() {
        let range = json!({"resultType": "matrix", "result": [
            {"metric": {"vm": "web"}, "values": [[1.5, "0.25"], [2.5, "NaN"], [3.5, "+Inf"]]}
        ]});
        let read = series(&range).unwrap();
        assert_eq!(read[0].labels["vm"], "web");
        assert_eq!(read[0].points[0], (1.5, 0.25));
        assert!(read[0].points[1].1.is_nan() && read[0].points[2].1.is_infinite());
        let moment = json!({"resultType": "vector", "result": [{"metric": {}, "value": [7, "1"]}]});
        assert_eq!(series(&moment).unwrap()[0].points, [(7.0, 1.0)]);
        assert!(series(&json!({"result": [{"metric": {}}]})).is_err());
    }

    #[test]
    fn a_query_is_encoded_so_that_nothing_of_it_ends_the_url() {
        assert_eq!(encoded("a{b=\"c d\"}[4s]&"), "a%7Bb%3D%22c%20d%22%7D%5B4s%5D%26");
    }
}
