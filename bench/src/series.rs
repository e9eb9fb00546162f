//! How something went over time, or over anything else: what a row can have besides its value.

use serde::{Deserialize, Serialize};

/// Most lines of a series: as many as a plot has colours for.
pub(crate) const LINES_MAX: usize = 8;
/// Most points of all its lines.
pub(crate) const POINTS_MAX: usize = 10_000;

/// Lines of points.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// What goes across, with its unit last, such as `time_s`.
    pub(crate) across: String,
    /// Of what goes up.
    pub(crate) unit: String,
    pub(crate) lines: Vec<SeriesLine>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SeriesLine {
    pub(crate) label: String,
    /// Across and up.
    pub(crate) points: Vec<(f64, f64)>,
}

impl Series {
    /// Points of all lines.
    pub(crate) fn points(&self) -> usize {
        self.lines.iter().map(|line| line.points.len()).sum()
    }
}
