//! Line charts as SVG.

use plotters::prelude::*;

use crate::error::{Error, Result};

const SIZE: (u32, u32) = (900, 540);
const MARGIN: u32 = 16;
const LABEL_AREA: u32 = 64;
const FONT: (&str, u32) = ("sans-serif", 18);
const POINT_RADIUS: u32 = 3;

/// Lines over one pair of axes.
pub(super) struct Chart {
    /// What is shown.
    pub(super) title: String,
    /// What the horizontal axis means, with its unit.
    pub(super) x: &'static str,
    /// What the vertical axis means, with its unit.
    pub(super) y: &'static str,
    /// Whether equal distances on the vertical axis are equal ratios; all values are then positive.
    pub(super) is_log: bool,
    /// Names and points of the lines.
    pub(super) series: Vec<(String, Vec<(f64, f64)>)>,
}

/// The chart as an SVG file.
///
/// Errors: a drawing that the library gives up.
pub(super) fn svg(chart: &Chart) -> Result<String> {
    let mut text = String::new();
    draw(chart, &mut text).map_err(|error| Error::Request(format!("plotting: {error}")))?;
    Ok(text)
}

fn draw(chart: &Chart, text: &mut String) -> std::result::Result<(), Box<dyn std::error::Error>> {
    // A logarithmic axis is a linear one with other values and labels.
    let to_axis = |y: f64| if chart.is_log { y.max(f64::MIN_POSITIVE).log10() } else { y };
    let points = || chart.series.iter().flat_map(|(_, points)| points);
    let [x_first, x_end] = bounds(points().map(|(x, _)| *x));
    let [y_first, y_end] = bounds(points().map(|(_, y)| to_axis(*y)));
    let y_first = if chart.is_log { y_first } else { y_first.min(0.0) };
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut axes = ChartBuilder::on(&root)
        .margin(MARGIN)
        .caption(&chart.title, FONT)
        .x_label_area_size(LABEL_AREA)
        .y_label_area_size(LABEL_AREA)
        .build_cartesian_2d(x_first..x_end, y_first..y_end)?;
    axes.configure_mesh()
        .x_desc(chart.x)
        .y_desc(chart.y)
        .y_label_formatter(&|y| label(if chart.is_log { 10f64.powf(*y) } else { *y }))
        .draw()?;
    for (idx, (name, points)) in chart.series.iter().enumerate() {
        let color = Palette99::pick(idx).to_rgba();
        let points: Vec<(f64, f64)> = points.iter().map(|(x, y)| (*x, to_axis(*y))).collect();
        axes.draw_series(LineSeries::new(points.iter().copied(), color))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
        let dots = points.iter().map(|point| Circle::new(*point, POINT_RADIUS, color.filled()));
        axes.draw_series(dots)?;
    }
    axes.configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

/// The least and the largest value, apart from each other; 0 and 1 without values.
fn bounds(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let finite = values.filter(|value| value.is_finite());
    let range = finite.fold(None, |range: Option<[f64; 2]>, value| {
        let [first, end] = range.unwrap_or([value, value]);
        Some([first.min(value), end.max(value)])
    });
    match range {
        None => [0.0, 1.0],
        Some([first, end]) if first == end => [first - 0.5, end + 0.5],
        Some([first, end]) => [first, end + (end - first) * 0.05],
    }
}

/// A short number for an axis.
fn label(value: f64) -> String {
    if value.abs() >= 10.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_is_a_closed_svg_with_its_names() {
        for is_log in [false, true] {
            let series = vec![
                ("first <line>".to_owned(), vec![(0.0, 10.0), (1.0, 1000.0)]),
                ("second".to_owned(), vec![(0.5, 20.0)]),
            ];
            let title = "a & b".to_owned();
            let text = svg(&Chart { title, x: "n", y: "ns", is_log, series }).unwrap();
            assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{text}");
            let shown = ["first &lt;line&gt;", "second", "a &amp; b", "<polyline", "<circle"];
            for shown in shown {
                assert!(text.contains(shown), "{shown} is not in\n{text}");
            }
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
    }

    #[test]
    fn a_chart_without_points_is_drawn_too() {
        let chart =
            Chart { title: String::new(), x: "x", y: "y", is_log: false, series: Vec::new() };
        assert!(svg(&chart).unwrap().contains("</svg>"));
    }
}
