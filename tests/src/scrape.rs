//! What the daemons show over HTTP, as a Prometheus on their host would read it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{Host, Lab};

/// Longest that a page may take.
const PAGE_AT_MOST: Duration = Duration::from_secs(30);

/// One value of a metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its full name.
    pub name: String,
    /// Its labels as they are written, without the braces.
    pub labels: String,
    /// The value.
    pub value: f64,
}

/// A page of metrics.
#[derive(Clone, Debug)]
pub struct Scrape {
    /// The page.
    pub text: String,
    /// Its values, in their order.
    pub samples: Vec<Sample>,
}

impl Scrape {
    /// Reads a page in Prometheus' text form.
    ///
    /// # Errors
    /// When a line is not of that form.
    pub fn read(text: &str) -> Result<Scrape> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let samples = lines
            .map(|line| {
                let (series, value) = line.rsplit_once(' ')?;
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                Some(Sample {
                    name: name.to_owned(),
                    labels: labels.strip_suffix('}')?.to_owned(),
                    value: value.parse().ok()?,
                })
            })
            .collect::<Option<_>>()
            .with_context(|| format!("these are no metrics: {text}"))?;
        Ok(Scrape {
            text: text.to_owned(),
            samples,
        })
    }

    /// The one value of this name whose labels have all of `labels` in them.
    ///
    /// # Errors
    /// When there is none, or several.
    pub fn value(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let fits = |sample: &&Sample| {
            sample.name == name && labels.iter().all(|label| sample.labels.contains(label))
        };
        let mut found = self.samples.iter().filter(fits);
        let one = found.next().filter(|_| found.next().is_none());
        one.map(|sample| sample.value)
            .with_context(|| format!("not one value of {name} {labels:?} in\n{}", self.text))
    }

    /// The sum of all values of this name.
    #[must_use]
    pub fn sum(&self, name: &str) -> f64 {
        let samples = self.samples.iter();
        samples
            .filter(|sample| sample.name == name)
            .map(|sample| sample.value)
            .sum()
    }
}

impl Lab {
    /// A page that a daemon serves on the loopback address of its host: the HTTP status, and what it says.
    ///
    /// # Errors
    /// When nobody answers, or not in HTTP.
    pub fn page(&self, host: Host, port: u16, path: &str) -> Result<(u16, String)> {
        let connected = self.on(host, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)))?;
        let mut stream = connected.with_context(|| format!("nobody answers on port {port} of {host}"))?;
        stream.set_read_timeout(Some(PAGE_AT_MOST))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        Ok((code.context("no HTTP status")?, body.to_owned()))
    }

    /// The metrics of a daemon.
    ///
    /// # Errors
    /// As [`Lab::page`], and for what are no metrics.
    pub fn scrape(&self, host: Host, port: u16) -> Result<Scrape> {
        Scrape::read(&self.page(host, port, "/metrics")?.1)
    }
}
