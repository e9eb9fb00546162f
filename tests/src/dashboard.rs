//! The Grafana dashboard that is shipped, drawn without a Grafana: its panels in their places, each with its own queries,
//! which a real Prometheus evaluates over what it has read from the daemons of a run.
//!
//! It knows what that dashboard uses, and refuses a panel that it does not know, so that the picture leaves nothing out.

mod chart;
mod picture;
mod units;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::prometheus::{Prometheus, Series};
use crate::{Lab, Stamp};

pub use picture::picture;
use units::Unit;

const SHIPPED: &str = include_str!("../../packaging/grafana/romulus.json");
/// Grafana's `$__rate_interval` where a scrape comes every second.
const RATE_INTERVAL: &str = "4s";

/// The dashboard.
#[derive(Debug)]
pub struct Dashboard {
    panels: Vec<Panel>,
}

/// How a panel shows its series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A heading.
    Row,
    /// The values of now, in large letters.
    Stat,
    /// Lines over time.
    Lines,
    /// Areas upon each other.
    Stacked,
    /// Bars that change their colour with the state.
    States,
}

/// A place in Grafana's grid of 24 columns.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    x: f64,
    y: f64,
    w: f64,
    h: f64,
}

#[derive(Debug)]
struct Panel {
    title: String,
    form: Form,
    place: Place,
    unit: Unit,
    max: Option<f64>,
    /// Large letters say the series' names instead of their values.
    names_only: bool,
    /// What stands there when there is no series.
    no_value: String,
    /// Words and colours for values.
    mappings: BTreeMap<String, (String, String)>,
    targets: Vec<Target>,
}

#[derive(Debug)]
struct Target {
    query: String,
    legend: String,
}

/// A panel's series with their names, in the order of its targets.
type Shown = Vec<(String, Series)>;

/// What the panels show of a run.
#[derive(Debug)]
pub struct Run {
    from: f64,
    to: f64,
    /// Moments that are worth a line, with their names.
    marks: Vec<(f64, String)>,
    panels: Vec<Shown>,
}

impl Dashboard {
    /// The one in `packaging/grafana`.
    ///
    /// # Errors
    /// When it has something that is not known here.
    pub fn shipped() -> Result<Dashboard> {
        let dashboard: Value = serde_json::from_str(SHIPPED).context("the dashboard is no JSON")?;
        let panels = dashboard["panels"].as_array().context("it has no panels")?;
        Ok(Dashboard {
            panels: panels.iter().map(Panel::read).collect::<Result<_>>()?,
        })
    }

    /// Asks everything of this time.
    ///
    /// # Errors
    /// When a query is refused.
    pub fn ask(
        &self,
        prometheus: &Prometheus,
        lab: &Lab,
        (from, to): (Stamp, Stamp),
        marks: &[(Stamp, &str)],
    ) -> Result<Run> {
        let mut panels = Vec::new();
        for panel in &self.panels {
            let mut shown = Vec::new();
            for target in &panel.targets {
                let series = match panel.form {
                    Form::Stat => prometheus.at(lab, &target.query, to),
                    _ => prometheus.range(lab, &target.query, (from, to)),
                };
                let series = series.with_context(|| format!("the panel {:?}", panel.title))?;
                shown.extend(series.into_iter().map(|one| (target.name(&one), one)));
            }
            panels.push(shown);
        }
        let marks = marks.iter().map(|(at, name)| (at.seconds(), (*name).to_owned()));
        Ok(Run {
            from: from.seconds(),
            to: to.seconds(),
            marks: marks.collect(),
            panels,
        })
    }
}

impl Run {
    /// The titles of the panels that have nothing to show.
    #[must_use]
    pub fn empty_panels(&self, dashboard: &Dashboard) -> Vec<String> {
        let panels = dashboard.panels.iter().zip(&self.panels);
        let empty = panels.filter(|(panel, shown)| panel.form != Form::Row && shown.is_empty());
        empty.map(|(panel, _)| panel.title.clone()).collect()
    }
}

impl Panel {
    fn read(panel: &Value) -> Result<Panel> {
        let title = panel["title"].as_str().context("a panel without a title")?;
        let read = || -> Result<Panel> {
            let (defaults, place) = (&panel["fieldConfig"]["defaults"], &panel["gridPos"]);
            let number = |name: &str| place[name].as_f64().with_context(|| format!("no {name}"));
            let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
            let form = form(panel)?;
            if form == Form::Stat {
                let instant = targets.iter().all(|target| target["instant"] == true);
                ensure!(instant, "the values of now are asked for with instant queries");
            }
            Ok(Panel {
                title: title.to_owned(),
                form,
                place: Place {
                    x: number("x")?,
                    y: number("y")?,
                    w: number("w")?,
                    h: number("h")?,
                },
                unit: Unit::read(defaults["unit"].as_str())?,
                max: defaults["max"].as_f64(),
                names_only: panel["options"]["textMode"] == "name",
                no_value: defaults["noValue"].as_str().unwrap_or("No data").to_owned(),
                mappings: mappings(&defaults["mappings"])?,
                targets: targets.iter().map(Target::read).collect::<Result<_>>()?,
            })
        };
        read().with_context(|| format!("the panel {title:?}"))
    }
}

fn form(panel: &Value) -> Result<Form> {
    let stacking = &panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"];
    Ok(match panel["type"].as_str() {
        Some("row") => Form::Row,
        Some("stat") => Form::Stat,
        Some("state-timeline") => Form::States,
        Some("timeseries") if stacking == "normal" => Form::Stacked,
        Some("timeseries") => Form::Lines,
        other => bail!("panels of type {other:?} are not known here"),
    })
}

fn mappings(mappings: &Value) -> Result<BTreeMap<String, (String, String)>> {
    let mut found = BTreeMap::new();
    for mapping in mappings.as_array().into_iter().flatten() {
        ensure!(mapping["type"] == "value", "only values are mapped: {mapping}");
        for (value, to) in mapping["options"].as_object().into_iter().flatten() {
            let text = |name: &str| to[name].as_str().unwrap_or_default().to_owned();
            found.insert(value.clone(), (text("text"), text("color")));
        }
    }
    Ok(found)
}

impl Target {
    fn read(target: &Value) -> Result<Target> {
        let text = |name: &str| target[name].as_str().with_context(|| format!("no {name}"));
        let query = text("expr")?.replace("$__rate_interval", RATE_INTERVAL);
        let query = query.replace("$vm", ".*");
        ensure!(
            !query.contains('$'),
            "{query} has a variable that is not known here"
        );
        Ok(Target {
            query,
            legend: text("legendFormat")?.to_owned(),
        })
    }

    /// What a series is called: the legend with the values of its labels.
    fn name(&self, series: &Series) -> String {
        let mut name = String::new();
        let mut rest = self.legend.as_str();
        while let Some((before, inside)) = rest.split_once("{{") {
            let (label, after) = inside.split_once("}}").unwrap_or((inside, ""));
            name.push_str(before);
            name.push_str(series.labels.get(label.trim()).map_or("", String::as_str));
            rest = after;
        }
        name + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(labels: &[(&str, &str)], points: &[(f64, f64)]) -> Series {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Series {
            labels: labels.iter().map(owned).collect(),
            points: points.to_vec(),
        }
    }

    #[test]
    fn every_panel_of_the_shipped_dashboard_is_drawn() {
        let dashboard = Dashboard::shipped().unwrap();
        let points: Vec<(f64, f64)> = (0..40u32).map(|n| (f64::from(n), f64::from(n % 2))).collect();
        let one = series(
            &[("vm", "web"), ("reason", "no backup"), ("part", "copy")],
            &points,
        );
        let shown = |panel: &Panel| {
            let named = panel
                .targets
                .iter()
                .map(|target| (target.name(&one), one.clone()));
            named.collect::<Shown>()
        };
        let run = Run {
            from: 0.0,
            to: 40.0,
            marks: vec![(30.0, "host killed".to_owned())],
            panels: dashboard.panels.iter().map(shown).collect(),
        };
        let svg = picture(&dashboard, &run, "a test");
        for panel in &dashboard.panels {
            assert!(
                svg.contains(&format!(">{}<", units::escaped(&panel.title))),
                "{}",
                panel.title
            );
        }
        assert!(svg.contains("host killed") && svg.contains("web"));
        assert!(
            !svg.contains("NaN") && !svg.contains("inf"),
            "every place is a number"
        );
        assert_eq!(svg.matches("<g").count(), svg.matches("</g>").count());
    }

    #[test]
    fn what_is_not_known_of_a_dashboard_is_refused() {
        let good = serde_json::json!({"title": "a", "type": "timeseries", "gridPos": {"x": 0, "y": 0, "w": 8, "h": 7},
            "fieldConfig": {"defaults": {"unit": "s"}}, "targets": [{"expr": "a", "legendFormat": "{{vm}}"}]});
        Panel::read(&good).unwrap();
        for (place, wrong) in [
            ("/type", "piechart"),
            ("/fieldConfig/defaults/unit", "furlongs"),
            ("/targets/0/expr", "rate(a[$__interval])"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(place).unwrap() = wrong.into();
            assert!(Panel::read(&bad).is_err(), "{wrong} was taken");
        }
    }

    #[test]
    fn a_series_is_called_as_its_legend_says() {
        let target = Target {
            query: "a".to_owned(),
            legend: "{{vm}} late: {{ cause }}{{none}}!".to_owned(),
        };
        let one = series(&[("vm", "web"), ("cause", "load")], &[]);
        assert_eq!(target.name(&one), "web late: load!");
    }
}
