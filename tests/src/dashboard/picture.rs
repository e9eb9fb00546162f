//! The whole picture: Grafana's grid, a frame and a title for each panel, headings between them.

use std::fmt::Write as _;

use super::chart::{self, Box2};
use super::units::escaped;
use super::{Dashboard, Form, Panel, Run, Shown};

/// Width of a column and height of a row of Grafana's grid, in pixels.
const CELL: (f64, f64) = (58.0, 32.0);
const MARGIN: f64 = 12.0;
const GAP: f64 = 6.0;
const HEAD: f64 = 44.0;
const COLUMNS: f64 = 24.0;

/// The dashboard with what it shows of a run, as SVG. `title` says what run it is.
#[must_use]
pub fn picture(dashboard: &Dashboard, run: &Run, title: &str) -> String {
    let rows = dashboard.panels.iter().map(|panel| panel.place.y + panel.place.h);
    let (width, height) = (
        COLUMNS * CELL.0 + 2.0 * MARGIN,
        rows.fold(0.0, f64::max) * CELL.1 + HEAD + MARGIN,
    );
    let mut svg = String::new();
    // Writing to a string does not fail.
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="Inter, Helvetica, Arial, sans-serif">
<rect width="100%" height="100%" fill="#f4f5f5"/>
<text x="{MARGIN}" y="27" font-size="19" font-weight="600" fill="#24292e">Romulus</text>
<text x="{:.0}" y="27" font-size="13" fill="#6e7780" text-anchor="end">{}</text>
"##,
        width - MARGIN,
        escaped(title)
    );
    for (panel, shown) in dashboard.panels.iter().zip(&run.panels) {
        draw(&mut svg, panel, shown, run);
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, panel: &Panel, shown: &Shown, run: &Run) {
    let place = Box2 {
        x: MARGIN + panel.place.x * CELL.0,
        y: HEAD + panel.place.y * CELL.1,
        w: panel.place.w * CELL.0 - GAP,
        h: panel.place.h * CELL.1 - GAP,
    };
    let title = escaped(&panel.title);
    if panel.form == Form::Row {
        let _ = writeln!(
            svg,
            r##"<text x="{:.1}" y="{:.1}" font-size="14" font-weight="600" fill="#464c54">{title}</text>"##,
            place.x,
            place.y + 19.0
        );
        return;
    }
    let _ = writeln!(
        svg,
        r##"<g><rect x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}" rx="3" fill="#ffffff" stroke="#dde0e3"/>
<text x="{:.1}" y="{:.1}" font-size="12.5" font-weight="600" fill="#24292e">{title}</text>"##,
        place.x,
        place.y,
        place.w,
        place.h,
        place.x + 9.0,
        place.y + 18.0
    );
    let inside = Box2 {
        x: place.x + 9.0,
        y: place.y + 26.0,
        w: place.w - 18.0,
        h: place.h - 33.0,
    };
    match panel.form {
        Form::Row => {}
        Form::Stat => chart::stat(svg, inside, panel, shown),
        Form::States => chart::states(svg, inside, panel, shown, run),
        Form::Lines => chart::lines(svg, inside, panel, shown, run),
        Form::Stacked => chart::stacked(svg, inside, panel, shown, run),
    }
    svg.push_str("</g>\n");
}
