//! The inside of a panel: large values, lines or areas with axes and a legend, bars of states.

use std::fmt::Write as _;

use super::units::{Unit, escaped};
use super::{Panel, Run, Shown};

/// A part of the picture, in pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Box2 {
    pub x: f64,
    pub y: f64,
    pub w: f64,
    pub h: f64,
}

const COLOURS: [&str; 10] = [
    "#3274d9", "#e0752d", "#37872d", "#a352cc", "#c4162a", "#1f9e9e", "#b8860b", "#7a5230", "#6e7780",
    "#e02f8a",
];
/// For values that a mapping gives no colour.
const NO_COLOUR: &str = "#464c54";
const LINE_OF_LEGEND: f64 = 14.0;
const LEGEND_LINES_MAX: usize = 4;
/// Width of a letter, about, and of the colour before a name.
const LETTER: f64 = 6.4;
const SWATCH: f64 = 30.0;
const AXIS_WIDTH: f64 = 56.0;
/// Points further apart than this are not connected: the daemon was not there.
const GAP_S: f64 = 2.5;
const MARK: &str = "#c4162a";

/// Grafana's names of colours, on white.
fn colour(name: &str) -> &str {
    match name {
        "green" => "#37872d",
        "red" => "#c4162a",
        "yellow" => "#b8860b",
        "" => NO_COLOUR,
        other => other,
    }
}

fn series_colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

/// A number as a mapping has it.
fn key(value: f64) -> String {
    format!("{value}")
}

pub(super) fn stat(svg: &mut String, place: Box2, panel: &Panel, shown: &Shown) {
    let values: Vec<_> = shown
        .iter()
        .filter_map(|(name, series)| Some((name, series.points.last()?.1)))
        .filter(|(_, value)| value.is_finite())
        .collect();
    if values.is_empty() {
        return nothing(svg, place, &panel.no_value);
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful of values")]
    let width = place.w / values.len() as f64;
    let mut x = place.x + width / 2.0;
    for (name, value) in values {
        let mapped = panel.mappings.get(&key(value));
        if panel.names_only {
            let middle = place.y + place.h * 0.58;
            let _ = writeln!(
                svg,
                r##"<text x="{x:.1}" y="{middle:.1}" font-size="17" font-weight="600" fill="{NO_COLOUR}" text-anchor="middle">{}</text>"##,
                escaped(name)
            );
            x += width;
            continue;
        }
        let (text, of_value) = match mapped {
            Some((text, name)) => (text.clone(), colour(name)),
            None => (panel.unit.text(value), NO_COLOUR),
        };
        let _ = writeln!(
            svg,
            r##"<text x="{x:.1}" y="{:.1}" font-size="25" font-weight="600" fill="{of_value}" text-anchor="middle">{}</text>
<text x="{x:.1}" y="{:.1}" font-size="12" fill="#6e7780" text-anchor="middle">{}</text>"##,
            place.y + place.h * 0.52,
            escaped(&text),
            place.y + place.h * 0.86,
            escaped(name)
        );
        x += width;
    }
}

fn nothing(svg: &mut String, place: Box2, text: &str) {
    let _ = writeln!(
        svg,
        r##"<text x="{:.1}" y="{:.1}" font-size="16" fill="#9fa7b3" text-anchor="middle">{}</text>"##,
        place.x + place.w / 2.0,
        place.y + place.h / 2.0,
        escaped(text)
    );
}

/// Where a time lies.
fn x_of(plot: Box2, run: &Run, time: f64) -> f64 {
    plot.x + plot.w * ((time - run.from) / (run.to - run.from)).clamp(0.0, 1.0)
}

/// The axis of time, with lines at the marks.
fn times(svg: &mut String, plot: Box2, run: &Run, named: bool) {
    let length = run.to - run.from;
    let steps = Unit::Plain.steps(length);
    for step in steps.iter().filter(|step| **step <= length) {
        let _ = writeln!(
            svg,
            r##"<text x="{:.1}" y="{:.1}" font-size="10" fill="#6e7780" text-anchor="middle">{} s</text>"##,
            x_of(plot, run, run.from + step),
            plot.y + plot.h + 13.0,
            step
        );
    }
    for (at, name) in &run.marks {
        let x = x_of(plot, run, *at);
        let _ = writeln!(
            svg,
            r##"<line x1="{x:.1}" y1="{:.1}" x2="{x:.1}" y2="{:.1}" stroke="{MARK}" stroke-dasharray="4 3"/>"##,
            plot.y,
            plot.y + plot.h
        );
        if named {
            let _ = writeln!(
                svg,
                r##"<text x="{:.1}" y="{:.1}" font-size="11" fill="{MARK}" text-anchor="end">{}</text>"##,
                x - 4.0,
                plot.y - 4.0,
                escaped(name)
            );
        }
    }
}

pub(super) fn states(svg: &mut String, place: Box2, panel: &Panel, shown: &Shown, run: &Run) {
    let names = shown.iter().map(|(name, _)| width_of(name) + 8.0);
    let axis = names.fold(AXIS_WIDTH, f64::max);
    let plot = Box2 {
        x: place.x + axis,
        y: place.y + 6.0,
        w: place.w - axis - 4.0,
        h: place.h - 22.0,
    };
    if shown.is_empty() {
        return nothing(svg, place, &panel.no_value);
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful of series")]
    let height = plot.h / shown.len() as f64;
    let mut y = plot.y;
    for (name, series) in shown {
        let _ = writeln!(
            svg,
            r##"<text x="{:.1}" y="{:.1}" font-size="11" fill="#464c54" text-anchor="end">{}</text>"##,
            plot.x - 6.0,
            y + height / 2.0 + 4.0,
            escaped(name)
        );
        for (from, to, value) in stretches(&series.points) {
            let (x, end) = (x_of(plot, run, from), x_of(plot, run, to));
            let empty = (String::new(), String::new());
            let (text, of_value) = panel.mappings.get(&key(value)).unwrap_or(&empty);
            let _ = writeln!(
                svg,
                r##"<rect x="{x:.1}" y="{:.1}" width="{:.1}" height="{:.1}" fill="{}" fill-opacity="0.85"/>"##,
                y + 2.0,
                end - x,
                height - 4.0,
                colour(of_value)
            );
            if end - x > width_of(text) + 12.0 {
                let _ = writeln!(
                    svg,
                    r##"<text x="{:.1}" y="{:.1}" font-size="11.5" fill="#ffffff">{}</text>"##,
                    x + 6.0,
                    y + height / 2.0 + 4.0,
                    escaped(text)
                );
            }
        }
        y += height;
    }
    times(svg, plot, run, true);
}

/// From when to when which value held. Each point holds for a second, the time between two.
fn stretches(points: &[(f64, f64)]) -> Vec<(f64, f64, f64)> {
    let mut found: Vec<(f64, f64, f64)> = Vec::new();
    for &(at, value) in points {
        match found.last_mut() {
            Some((_, to, last)) if (*last - value).abs() < f64::EPSILON && at - *to < GAP_S => *to = at + 1.0,
            _ => found.push((at, at + 1.0, value)),
        }
    }
    found
}

pub(super) fn lines(svg: &mut String, place: Box2, panel: &Panel, shown: &Shown, run: &Run) {
    let finite = shown
        .iter()
        .flat_map(|(_, series)| &series.points)
        .map(|point| point.1);
    let top = finite.filter(|value| value.is_finite()).fold(0.0, f64::max);
    let Some((plot, top)) = frame(svg, place, panel, shown, run, top) else {
        return;
    };
    for (number, (_, series)) in shown.iter().enumerate() {
        for piece in pieces(&series.points) {
            let points: Vec<String> = piece
                .iter()
                .map(|&(at, value)| format!("{:.1},{:.1}", x_of(plot, run, at), y_of(plot, top, value)))
                .collect();
            let line = series_colour(number);
            let _ = writeln!(
                svg,
                r##"<polyline points="{}" fill="none" stroke="{line}" stroke-width="1.5" stroke-linejoin="round"/>"##,
                points.join(" ")
            );
        }
    }
}

pub(super) fn stacked(svg: &mut String, place: Box2, panel: &Panel, shown: &Shown, run: &Run) {
    // All times at which any of them has a value; what has none there counts as nothing.
    let mut at: Vec<f64> = shown
        .iter()
        .flat_map(|(_, series)| series.points.iter().map(|point| point.0))
        .collect();
    at.sort_by(f64::total_cmp);
    at.dedup();
    let value = |points: &[(f64, f64)], time: f64| {
        let found = points.iter().find(|point| (point.0 - time).abs() < 0.5);
        found.map_or(0.0, |point| if point.1.is_finite() { point.1 } else { 0.0 })
    };
    let mut sums = vec![0.0; at.len()];
    let mut edges = vec![sums.clone()];
    for (_, series) in shown {
        for (sum, time) in sums.iter_mut().zip(&at) {
            *sum += value(&series.points, *time);
        }
        edges.push(sums.clone());
    }
    let Some((plot, top)) = frame(
        svg,
        place,
        panel,
        shown,
        run,
        sums.into_iter().fold(0.0, f64::max),
    ) else {
        return;
    };
    for (number, pair) in edges.windows(2).enumerate() {
        let point = |(time, value): (&f64, &f64)| {
            format!("{:.1},{:.1}", x_of(plot, run, *time), y_of(plot, top, *value))
        };
        let upper = at.iter().zip(&pair[1]).map(point);
        let lower = at.iter().zip(&pair[0]).rev().map(point);
        let points: Vec<String> = upper.chain(lower).collect();
        let area = series_colour(number);
        let _ = writeln!(
            svg,
            r##"<polygon points="{}" fill="{area}" fill-opacity="0.55" stroke="{area}" stroke-width="0.6"/>"##,
            points.join(" ")
        );
    }
}

/// Stretches without a gap.
fn pieces(points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
    let mut found: Vec<Vec<(f64, f64)>> = Vec::new();
    for &(at, value) in points.iter().filter(|point| point.1.is_finite()) {
        match found.last_mut() {
            Some(piece) if piece.last().is_some_and(|last| at - last.0 < GAP_S) => piece.push((at, value)),
            _ => found.push(vec![(at, value)]),
        }
    }
    found
}

fn y_of(plot: Box2, top: f64, value: f64) -> f64 {
    plot.y + plot.h * (1.0 - (value / top).clamp(0.0, 1.0))
}

/// Axes and legend; gives the place for the lines and the value at its top. `None` when there is nothing to show.
fn frame(
    svg: &mut String,
    place: Box2,
    panel: &Panel,
    shown: &Shown,
    run: &Run,
    highest: f64,
) -> Option<(Box2, f64)> {
    if shown.iter().all(|(_, series)| series.points.is_empty()) {
        nothing(svg, place, &panel.no_value);
        return None;
    }
    let legend_lines = legend(svg, place, shown);
    let plot = Box2 {
        x: place.x + AXIS_WIDTH,
        y: place.y + 6.0,
        w: place.w - AXIS_WIDTH - 8.0,
        h: place.h - 24.0 - legend_lines * LINE_OF_LEGEND,
    };
    let steps = panel.unit.steps(panel.max.unwrap_or(highest));
    let top = steps.last().copied().unwrap_or(1.0);
    for step in steps {
        let y = y_of(plot, top, step);
        let _ = writeln!(
            svg,
            r##"<line x1="{:.1}" y1="{y:.1}" x2="{:.1}" y2="{y:.1}" stroke="#e7e9eb"/><text x="{:.1}" y="{:.1}" font-size="10" fill="#6e7780" text-anchor="end">{}</text>"##,
            plot.x,
            plot.x + plot.w,
            plot.x - 5.0,
            y + 3.5,
            panel.unit.text(step)
        );
    }
    times(svg, plot, run, false);
    Some((plot, top))
}

fn width_of(text: &str) -> f64 {
    u32::try_from(text.chars().count()).map_or(f64::MAX, f64::from) * LETTER
}

/// The names below, in lines; gives their number. What has no room is counted.
fn legend(svg: &mut String, place: Box2, shown: &Shown) -> f64 {
    let mut lines: Vec<Vec<(usize, String, f64)>> = vec![Vec::new()];
    let mut x = 0.0;
    for (number, (name, _)) in shown.iter().enumerate() {
        let width = width_of(name) + SWATCH;
        if x > 0.0 && x + width > place.w {
            if lines.len() == LEGEND_LINES_MAX {
                let more = format!("and {} more", shown.len() - number + 1);
                if let Some(last) = lines.last_mut().and_then(|line| line.last_mut()) {
                    last.1 = more;
                }
                break;
            }
            lines.push(Vec::new());
            x = 0.0;
        }
        if let Some(line) = lines.last_mut() {
            line.push((number, name.clone(), x));
        }
        x += width;
    }
    let mut y = place.y + place.h;
    for line in lines.iter().rev() {
        for (number, name, x) in line {
            let _ = writeln!(
                svg,
                r##"<rect x="{:.1}" y="{:.1}" width="12" height="3" fill="{}"/><text x="{:.1}" y="{y:.1}" font-size="11" fill="#464c54">{}</text>"##,
                place.x + x,
                y - 5.0,
                series_colour(*number),
                place.x + x + 16.0,
                escaped(name)
            );
        }
        y -= LINE_OF_LEGEND;
    }
    u32::try_from(lines.len()).map_or(1.0, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_breaks_where_nobody_answered() {
        let points = [(1.0, 5.0), (2.0, 6.0), (9.0, 7.0), (10.0, f64::NAN), (11.0, 8.0)];
        let pieces = pieces(&points);
        assert_eq!(
            pieces,
            [vec![(1.0, 5.0), (2.0, 6.0)], vec![(9.0, 7.0), (11.0, 8.0)]]
        );
    }

    #[test]
    fn a_state_lasts_until_the_next_or_until_nobody_says_it() {
        let points = [(1.0, 0.0), (2.0, 0.0), (3.0, 1.0), (4.0, 1.0), (9.0, 1.0)];
        let found = stretches(&points);
        assert_eq!(found, [(1.0, 3.0, 0.0), (3.0, 5.0, 1.0), (9.0, 10.0, 1.0)]);
    }
}
