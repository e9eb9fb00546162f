//! The plots, drawn by hand: a few lines, dots and words each, with colours for light and for dark paper.

use std::fmt::Write;

use super::axis::Axis;
use super::escaped;

/// In each plot, so that it keeps its colours wherever it is put.
const STYLE: &str = include_str!("plot.css");

const WIDTH: f64 = 900.0;
/// Of a letter, about, at the size that is used.
const LETTER: f64 = 7.0;
const LABEL_LETTERS_MAX: usize = 44;
/// Height of a row.
const ROW: f64 = 24.0;
/// Above the rows: the title and the legend.
const TOP: f64 = 54.0;
/// Below the rows: numbers of the axis and its name.
const BOTTOM: f64 = 44.0;
/// For the numbers at the end of a row.
const RIGHT: f64 = 132.0;
const LINES_HEIGHT: f64 = 320.0;
/// Colours that there are for lines.
pub(super) const LINES_MAX: usize = 8;

/// A number, and the least and the greatest repetition.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) middle: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Spread {
    pub(super) fn of(middle: f64, repetitions: &[f64]) -> Self {
        Self {
            middle,
            low: repetitions.iter().copied().fold(middle, f64::min),
            high: repetitions.iter().copied().fold(middle, f64::max),
        }
    }

    fn all(&self) -> [f64; 3] {
        [self.middle, self.low, self.high]
    }
}

/// A row of a plot of ratios.
pub(super) struct Ratio {
    pub(super) label: String,
    pub(super) ratio: Spread,
    pub(super) bound: Option<f64>,
}

/// A row of a plot of values.
pub(super) struct Pair {
    pub(super) label: String,
    pub(super) value: Spread,
    pub(super) reference: Option<Spread>,
}

/// A line of a sweep: x and y of each point.
pub(super) struct Line {
    pub(super) label: String,
    pub(super) points: Vec<(f64, Spread)>,
    pub(super) references: Vec<(f64, f64)>,
}

/// Ratios beside their bounds.
pub(super) fn ratios(title: &str, rows: &[Ratio]) -> String {
    let mut plot = Plot::of_rows(title, rows.len(), rows.iter().map(|row| row.label.as_str()));
    let numbers = rows
        .iter()
        .flat_map(|row| row.ratio.all().into_iter().chain(row.bound));
    let axis = plot.across(numbers.chain([1.0]));
    plot.ticks_below(&axis, "value / reference");
    let one = axis.place(1.0);
    plot.line("one", (one, TOP - 4.0), (one, plot.height - BOTTOM));
    for (number, row) in rows.iter().enumerate() {
        let y = plot.row(number, &row.label);
        let over = row.bound.is_some_and(|bound| row.ratio.middle > bound);
        let class = if over { "over" } else { "c0" };
        plot.whisker(class, &axis, &row.ratio, y);
        plot.dot(class, (axis.place(row.ratio.middle), y));
        if let Some(bound) = row.bound {
            let x = axis.place(bound);
            plot.line("bound", (x, y - 8.0), (x, y + 8.0));
        }
        let bound = row
            .bound
            .map_or_else(String::new, |bound| format!(" (≤ {})", number_words(bound)));
        plot.words_at_end(class, y, &format!("{} ×{bound}", number_words(row.ratio.middle)));
    }
    plot.legend(&[
        ("c0", "ratio"),
        ("over", "over its bound"),
        ("bound", "bound"),
        ("one", "as the reference"),
    ]);
    plot.done()
}

/// Values beside their references.
pub(super) fn pairs(title: &str, unit: &str, reference: &str, rows: &[Pair]) -> String {
    let mut plot = Plot::of_rows(title, rows.len(), rows.iter().map(|row| row.label.as_str()));
    let numbers = rows.iter().flat_map(|row| {
        let reference = row.reference.iter().flat_map(Spread::all);
        row.value.all().into_iter().chain(reference)
    });
    let axis = plot.across(numbers);
    plot.ticks_below(&axis, unit);
    for (number, row) in rows.iter().enumerate() {
        let y = plot.row(number, &row.label);
        if let Some(reference) = &row.reference {
            let (from, to) = (axis.place(reference.middle), axis.place(row.value.middle));
            plot.line("join", (from, y), (to, y));
            plot.whisker("reference", &axis, reference, y + 4.0);
            plot.dot("reference", (from, y));
        }
        plot.whisker("c0", &axis, &row.value, y - 4.0);
        plot.dot("c0", (axis.place(row.value.middle), y));
        plot.words_at_end("c0", y, &format!("{} {unit}", number_words(row.value.middle)));
    }
    if rows.iter().any(|row| row.reference.is_some()) {
        plot.legend(&[("c0", "value"), ("reference", &format!("reference: {reference}"))]);
    } else {
        plot.legend(&[("c0", "value")]);
    }
    plot.done()
}

/// A value over a parameter, a line for each combination of the others; at most [`LINES_MAX`] lines.
pub(super) fn lines(title: &str, across: &str, unit: &str, lines: &[Line]) -> String {
    assert!(lines.len() <= LINES_MAX, "there are not enough colours");
    let legend = f64::from(u32::try_from(lines.len()).unwrap_or(0)) * 18.0 + 26.0;
    let mut plot = Plot::new(title, TOP + LINES_HEIGHT + BOTTOM + legend);
    plot.left = 76.0;
    let bottom = TOP + LINES_HEIGHT;
    let points = || lines.iter().flat_map(|line| &line.points);
    let wide = Axis::over(points().map(|(x, _)| *x), plot.left, WIDTH - 24.0);
    let references = lines
        .iter()
        .flat_map(|line| line.references.iter().map(|(_, y)| *y));
    let high = Axis::over(points().flat_map(|(_, y)| y.all()).chain(references), bottom, TOP);
    for (number, y) in high.ticks() {
        plot.line("grid", (plot.left, y), (WIDTH - 24.0, y));
        plot.words("dim end", (plot.left - 8.0, y + 4.0), &number_words(number));
    }
    for (number, x) in wide.ticks() {
        plot.line("grid", (x, TOP), (x, bottom));
        plot.words("dim middle", (x, bottom + 16.0), &number_words(number));
    }
    plot.words(
        "dim middle",
        (f64::midpoint(plot.left, WIDTH), bottom + 34.0),
        across,
    );
    plot.words("dim", (8.0, TOP - 10.0), unit);
    for (number, line) in lines.iter().enumerate() {
        let class = format!("c{number}");
        plot.polyline(
            &format!("{class} dashed"),
            line.references
                .iter()
                .map(|(x, y)| (wide.place(*x), high.place(*y))),
        );
        plot.polyline(
            &class,
            line.points
                .iter()
                .map(|(x, y)| (wide.place(*x), high.place(y.middle))),
        );
        for (x, y) in &line.points {
            let x = wide.place(*x);
            plot.line(&class, (x, high.place(y.low)), (x, high.place(y.high)));
            plot.dot(&class, (x, high.place(y.middle)));
        }
        let y = bottom + BOTTOM + 14.0 + 18.0 * f64::from(u32::try_from(number).unwrap_or(0));
        plot.dot(&class, (plot.left + 6.0, y - 4.0));
        plot.words("", (plot.left + 18.0, y), &line.label);
    }
    if lines.iter().any(|line| !line.references.is_empty()) {
        plot.words(
            "dim end",
            (WIDTH - 24.0, plot.height - 8.0),
            "dashed: the reference",
        );
    }
    plot.done()
}

/// Four digits at most, without a row of zeros.
pub(super) fn number_words(number: f64) -> String {
    let size = number.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-4..1e7).contains(&size) {
        return format!("{number:.1e}");
    }
    let digits = match size {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        size if size >= 0.01 => 3,
        _ => 5,
    };
    let text = format!("{number:.digits$}");
    if digits == 0 {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// What is drawn so far.
struct Plot {
    title: String,
    body: String,
    /// Where the axis begins.
    left: f64,
    height: f64,
}

impl Plot {
    fn new(title: &str, height: f64) -> Self {
        let mut plot = Self {
            title: title.to_owned(),
            body: String::new(),
            left: 0.0,
            height,
        };
        plot.words("title", (8.0, 15.0), title);
        plot
    }

    /// A plot of so many rows, with room for their labels.
    fn of_rows<'a>(title: &str, rows: usize, labels: impl Iterator<Item = &'a str>) -> Self {
        let rows = f64::from(u32::try_from(rows).unwrap_or(u32::MAX));
        let mut plot = Self::new(title, TOP + rows * ROW + BOTTOM);
        let letters = labels.map(|label| label.chars().count().min(LABEL_LETTERS_MAX));
        let letters = u32::try_from(letters.max().unwrap_or(0)).unwrap_or(0);
        plot.left = f64::from(letters) * LETTER + 24.0;
        plot
    }

    fn across(&self, numbers: impl IntoIterator<Item = f64>) -> Axis {
        Axis::over(numbers, self.left, WIDTH - RIGHT)
    }

    fn ticks_below(&mut self, axis: &Axis, name: &str) {
        let bottom = self.height - BOTTOM;
        for (number, x) in axis.ticks() {
            self.line("grid", (x, TOP - 4.0), (x, bottom));
            self.words("dim middle", (x, bottom + 16.0), &number_words(number));
        }
        self.words(
            "dim middle",
            (f64::midpoint(self.left, WIDTH - RIGHT), bottom + 34.0),
            name,
        );
    }

    /// Writes the label of a row, and says where the row is.
    fn row(&mut self, number: usize, label: &str) -> f64 {
        let y = TOP + (f64::from(u32::try_from(number).unwrap_or(u32::MAX)) + 0.5) * ROW;
        let mut short: String = label.chars().take(LABEL_LETTERS_MAX).collect();
        if label.chars().count() > LABEL_LETTERS_MAX {
            short.pop();
            short.push('…');
        }
        self.words("end", (self.left - 12.0, y + 4.0), &short);
        y
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _ = writeln!(
            self.body,
            r#"<line class="{class}" x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}"/>"#,
            from.0, from.1, to.0, to.1
        );
    }

    fn whisker(&mut self, class: &str, axis: &Axis, spread: &Spread, y: f64) {
        self.line(class, (axis.place(spread.low), y), (axis.place(spread.high), y));
    }

    fn dot(&mut self, class: &str, at: (f64, f64)) {
        let _ = writeln!(
            self.body,
            r#"<circle class="{class}" cx="{:.1}" cy="{:.1}" r="4.5"/>"#,
            at.0, at.1
        );
    }

    fn polyline(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        if points.len() > 1 {
            let _ = writeln!(
                self.body,
                r#"<polyline class="{class}" points="{}"/>"#,
                points.join(" ")
            );
        }
    }

    fn words(&mut self, class: &str, at: (f64, f64), words: &str) {
        let words = escaped(words);
        let _ = writeln!(
            self.body,
            r#"<text class="{class}" x="{:.1}" y="{:.1}">{words}</text>"#,
            at.0, at.1
        );
    }

    fn words_at_end(&mut self, class: &str, y: f64, words: &str) {
        self.words(class, (WIDTH - RIGHT + 10.0, y + 4.0), words);
    }

    /// What the signs mean, above the rows.
    fn legend(&mut self, signs: &[(&str, &str)]) {
        let (mut x, y) = (self.left, TOP - 21.0);
        for (class, words) in signs {
            match *class {
                "bound" => self.line(class, (x + 4.0, y - 7.0), (x + 4.0, y + 7.0)),
                "one" => self.line(class, (x - 2.0, y), (x + 10.0, y)),
                _ => self.dot(class, (x + 4.0, y)),
            }
            self.words("dim", (x + 15.0, y + 4.0), words);
            let letters = u32::try_from(words.chars().count()).unwrap_or(0);
            x += f64::from(letters) * LETTER + 36.0;
        }
    }

    fn done(self) -> String {
        let Self {
            title, body, height, ..
        } = self;
        format!(
            "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
             width=\"{WIDTH}\" height=\"{height:.0}\" role=\"img\">\n<style>\n{STYLE}</style>\n<title>{}</title>\n{body}</svg>\n",
            escaped(&title)
        )
    }
}

/// A plot as a file of its own, which has its paper with it.
pub(super) fn alone(plot: &str) -> String {
    let (head, rest) = plot.split_once('>').expect("a plot begins with its element");
    let head = head.replacen("<svg", "<svg xmlns=\"http://www.w3.org/2000/svg\"", 1);
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{head}>\n\
         <rect class=\"paper\" width=\"100%\" height=\"100%\"/>{rest}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let words = [
            0.0, 0.000_012, 0.004, 0.25, 1.0, 2.345, 20.0, 100.0, 12_345.6, 1e9,
        ]
        .map(number_words);
        let expected = [
            "0", "1.2e-5", "0.004", "0.25", "1", "2.35", "20", "100", "12346", "1.0e9",
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn a_plot_has_a_row_for_each_ratio_and_marks_what_is_over_its_bound() {
        let row = |label: &str, ratio: f64, bound: Option<f64>| Ratio {
            label: label.to_owned(),
            ratio: Spread::of(ratio, &[ratio * 0.9, ratio * 1.1]),
            bound,
        };
        let plot = ratios(
            "all",
            &[
                row("a", 1.0, Some(2.0)),
                row("b", 3.0, Some(2.0)),
                row("c", 9.0, None),
            ],
        );
        assert_eq!(
            plot.matches(r#"<circle class="over""#).count(),
            2,
            "one row and the legend"
        );
        assert_eq!(plot.matches(r#"<line class="bound""#).count(), 3);
        assert!(plot.contains(">3 × (≤ 2)<") && plot.contains(">9 ×<"), "{plot}");
        assert!(alone(&plot).contains(".over"));
    }

    #[test]
    fn a_sweep_has_a_line_for_each_combination_and_its_reference_dashed() {
        let line = |label: &str| Line {
            label: label.to_owned(),
            points: vec![(1.0, Spread::of(1.0, &[])), (2.0, Spread::of(3.0, &[2.0, 4.0]))],
            references: vec![(1.0, 1.0), (2.0, 1.0)],
        };
        let plot = lines("sweep", "epoch_ms", "us", &[line("a"), line("b")]);
        assert_eq!(plot.matches("<polyline").count(), 4);
        assert_eq!(plot.matches("dashed\"").count(), 2);
        assert!(plot.contains(">epoch_ms<") && plot.contains(">b<"));
    }
}
