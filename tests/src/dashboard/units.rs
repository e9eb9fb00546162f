//! Numbers with their units as a person reads them, the steps of an axis, and text that can stand in XML.

use anyhow::{Result, bail};

/// What a panel's numbers are; Grafana's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Plain,
    Seconds,
    PerSecond,
    Bytes,
    BytesPerSecond,
    Ratio,
}

impl Unit {
    pub(super) fn read(name: Option<&str>) -> Result<Unit> {
        Ok(match name {
            None | Some("none") => Unit::Plain,
            Some("s") => Unit::Seconds,
            Some("cps") => Unit::PerSecond,
            Some("bytes") => Unit::Bytes,
            Some("Bps") => Unit::BytesPerSecond,
            Some("percentunit") => Unit::Ratio,
            Some(other) => bail!("the unit {other:?} is not known here"),
        })
    }

    /// Powers of what its larger units are.
    fn base(self) -> f64 {
        match self {
            Unit::Bytes => 1024.0,
            _ => 1000.0,
        }
    }

    /// A number with its unit, with no more digits than tell it from its neighbours on the axis.
    pub(super) fn text(self, value: f64) -> String {
        const LARGE: [&str; 5] = ["", "k", "M", "G", "T"];
        const BYTES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        const SMALL: [&str; 4] = ["s", "ms", "µs", "ns"];
        if value == 0.0 {
            return match self {
                Unit::Ratio => "0 %".to_owned(),
                _ => "0".to_owned(),
            };
        }
        let (mut number, mut step) = (value, 0);
        match self {
            Unit::Ratio => return format!("{} %", digits(value * 100.0)),
            Unit::Seconds => {
                while number.abs() < 0.9995 && step + 1 < SMALL.len() {
                    number *= 1000.0;
                    step += 1;
                }
                return format!("{} {}", digits(number), SMALL[step]);
            }
            _ => {}
        }
        while number.abs() >= self.base() * 0.9995 && step + 1 < LARGE.len() {
            number /= self.base();
            step += 1;
        }
        match self {
            Unit::Bytes => format!("{} {}", digits(number), BYTES[step]),
            Unit::BytesPerSecond => format!("{} {}B/s", digits(number), LARGE[step]),
            Unit::PerSecond => format!("{} {}/s", digits(number), LARGE[step]).replace(" /s", "/s"),
            _ => format!("{} {}", digits(number), LARGE[step]).trim().to_owned(),
        }
    }

    /// Round numbers from 0 on, four to six of them, the last one not below `max`.
    pub(super) fn steps(self, max: f64) -> Vec<f64> {
        let max = if max > 0.0 { max } else { 1.0 };
        let base = self.base();
        let power = base.powf(max.log(base).floor());
        // Within a unit, such as 1 to 1023 KiB, steps are round numbers of it.
        let within = max / power / 5.0;
        let ten = 10f64.powf(within.log10().floor());
        let factor = [1.0, 2.0, 2.5, 5.0, 10.0];
        let factor = factor.into_iter().find(|factor| factor * ten >= within * 0.9999);
        let step = factor.unwrap_or(10.0) * ten * power;
        let mut steps = vec![0.0];
        for number in 1..=6u32 {
            if steps.last().is_none_or(|last| *last < max * 0.9999) {
                steps.push(f64::from(number) * step);
            }
        }
        steps
    }
}

/// Three significant digits at most, and no zeros after the point.
fn digits(number: f64) -> String {
    let places = match number.abs() {
        at_least if at_least >= 99.95 => 0,
        at_least if at_least >= 9.995 => 1,
        at_least if at_least >= 0.9995 => 2,
        at_least if at_least >= 0.0995 => 3,
        _ => 4,
    };
    let text = format!("{number:.places$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Text between tags, or within quotes.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_in_the_unit_that_fits_them() {
        for (unit, value, text) in [
            (Unit::Seconds, 0.000_35, "350 µs"),
            (Unit::Seconds, 0.025, "25 ms"),
            (Unit::Seconds, 1.5, "1.5 s"),
            (Unit::Bytes, 1536.0, "1.5 KiB"),
            (Unit::Bytes, 67_108_864.0, "64 MiB"),
            (Unit::BytesPerSecond, 2_500_000.0, "2.5 MB/s"),
            (Unit::PerSecond, 39.96, "40/s"),
            (Unit::PerSecond, 25_000.0, "25 k/s"),
            (Unit::Ratio, 0.125, "12.5 %"),
            (Unit::Ratio, 0.000_05, "0.005 %"),
            (Unit::Plain, 2.0, "2"),
            (Unit::Plain, 0.0, "0"),
        ] {
            assert_eq!(unit.text(value), text);
        }
    }

    #[test]
    fn an_axis_has_few_round_steps_and_reaches_over_everything() {
        for (unit, max) in [
            (Unit::Seconds, 0.0437),
            (Unit::Bytes, 70_000_000.0),
            (Unit::Plain, 3.0),
            (Unit::Ratio, 1.0),
            (Unit::PerSecond, 40.2),
            (Unit::Plain, 0.0),
        ] {
            let steps = unit.steps(max);
            assert!((3..=7).contains(&steps.len()), "{max}: {steps:?}");
            assert!(*steps.last().unwrap() >= max * 0.9999, "{max}: {steps:?}");
        }
        assert_eq!(Unit::Ratio.steps(1.0).len(), 6);
        assert_eq!(Unit::Bytes.text(Unit::Bytes.steps(70_000_000.0)[1]), "20 MiB");
    }
}
