//! The plots, as SVG.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::BenchError;
use crate::ours::Span;
use crate::results::{Demo, Metric, Move, spread};

const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const STOCK: RGBColor = RGBColor(0x9a, 0xa3, 0xab);
const INK: RGBColor = RGBColor(0x1b, 0x27, 0x33);
/// Parts of the downtime, in the order of their first appearance.
const PARTS: [RGBColor; 10] = [
    RGBColor(0x1f, 0x6f, 0xb4),
    RGBColor(0xe0, 0x8b, 0x27),
    RGBColor(0x3d, 0x9a, 0x5b),
    RGBColor(0xb9, 0x48, 0x4e),
    RGBColor(0x7d, 0x5b, 0xa6),
    RGBColor(0x8a, 0x6a, 0x4f),
    RGBColor(0xd0, 0x6f, 0xa8),
    RGBColor(0x6b, 0x77, 0x80),
    RGBColor(0xa8, 0xa0, 0x2a),
    RGBColor(0x2a, 0x9d, 0xb0),
];
const WIDE: (u32, u32) = (960, 300);
const NARROW: (u32, u32) = (180, 240);
/// Room above the highest value.
const HEADROOM: f64 = 1.15;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws into a string.
fn svg(
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<String, BenchError> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let drawn = draw(&area).and_then(|()| Ok(area.present()?));
        drawn.map_err(|why| BenchError::Plot(why.to_string()))?;
    }
    Ok(text)
}

/// A pair of bars for each figure.
pub(super) fn bars(demo: &Demo) -> Result<Vec<String>, BenchError> {
    Metric::ALL.iter().map(|metric| bar_pair(demo, *metric)).collect()
}

fn bar_pair(demo: &Demo, metric: Metric) -> Result<String, BenchError> {
    let ours: Vec<&Move> = demo.pairs.iter().map(|p| &p.ours).collect();
    let stock: Vec<&Move> = demo.pairs.iter().map(|p| &p.stock).collect();
    let columns = [("ours", &demo.ours, ours, OURS), ("stock", &demo.stock, stock, STOCK)];
    let top = columns.iter().map(|(_, _, moves, _)| spread(metric, moves).1).fold(0.0, f64::max);
    svg(NARROW, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(6)
            .caption(
                format!("{}, {}", short(metric), metric.unit()),
                ("sans-serif", 13).into_font().color(&INK),
            )
            .x_label_area_size(22)
            .y_label_area_size(42)
            .build_cartesian_2d(0.0..2.0, 0.0..height(top))?;
        chart.configure_mesh().disable_x_mesh().x_labels(0).y_labels(5).light_line_style(WHITE).draw()?;
        for (at, (name, median, moves, colour)) in columns.iter().enumerate() {
            let (left, value) = (at as f64 + 0.2, metric.of(median));
            let bar = Rectangle::new([(left, 0.0), (left + 0.6, value)], colour.filled());
            chart.draw_series([bar])?;
            let (low, high) = spread(metric, moves);
            chart.draw_series([PathElement::new(vec![(left + 0.3, low), (left + 0.3, high)], INK)])?;
            let text = format!("{name} {}", digits(value));
            chart.draw_series([Text::new(text, (left, value + height(top) * 0.06), ("sans-serif", 12))])?;
        }
        Ok(())
    })
}

/// A stacked bar for each of our moves.
pub(super) fn downtime_split(demo: &Demo) -> Result<String, BenchError> {
    let moves: Vec<&[Span]> = demo.pairs.iter().map(|p| p.ours.downtime_split.as_slice()).collect();
    let mut names: Vec<&str> = Vec::new();
    moves.iter().flat_map(|m| m.iter()).for_each(|s| {
        if !names.contains(&s.name.as_str()) {
            names.push(&s.name);
        }
    });
    let longest = moves.iter().map(|m| m.iter().map(|s| s.ms).sum()).fold(0.0, f64::max);
    svg(WIDE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .x_label_area_size(34)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..height(longest), 0.0..moves.len() as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(WHITE)
            .y_labels(0)
            .x_desc("ms stopped")
            .y_desc("pairs")
            .draw()?;
        for (row, spans) in moves.iter().enumerate() {
            let mut left = 0.0;
            for span in *spans {
                let colour = part(&names, &span.name);
                let corners = [(left, row as f64 + 0.15), (left + span.ms, row as f64 + 0.85)];
                chart.draw_series([Rectangle::new(corners, colour.filled())])?;
                left += span.ms;
            }
        }
        for name in &names {
            let colour = part(&names, name);
            let swatch = move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled());
            chart.draw_series(std::iter::empty::<Rectangle<(f64, f64)>>())?.label(*name).legend(swatch);
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .border_style(STOCK)
            .draw()?;
        Ok(())
    })
}

/// What is still to be sent, over time, of each of our moves.
pub(super) fn progress(demo: &Demo) -> Result<String, BenchError> {
    let lines: Vec<Vec<(f64, f64)>> = demo
        .pairs
        .iter()
        .map(|p| p.ours.samples.iter().map(|s| (s.ms / 1e3, s.remaining as f64 / 1e6)).collect())
        .collect();
    let both = [("MB of RAM known to be unsent, ours", OURS, lines)];
    time_lines(&both, "s since the command", "MB")
}

/// The clients' acknowledged writes, second by second.
pub(super) fn writes(demo: &Demo) -> Result<String, BenchError> {
    let of = |moves: Vec<&Move>| -> Vec<Vec<(f64, f64)>> {
        let points =
            |m: &&Move| m.client.per_second.iter().enumerate().map(|(s, n)| (s as f64, *n as f64)).collect();
        moves.iter().map(points).collect()
    };
    let ours = of(demo.pairs.iter().map(|p| &p.ours).collect());
    let stock = of(demo.pairs.iter().map(|p| &p.stock).collect());
    let both = [("writes acknowledged per second, ours", OURS, ours), ("stock", STOCK, stock)];
    time_lines(&both, "s since the client began", "writes/s")
}

/// A group of lines: its name, its colour, and the points of each.
type Group = (&'static str, RGBColor, Vec<Vec<(f64, f64)>>);

fn time_lines(groups: &[Group], x: &str, y: &str) -> Result<String, BenchError> {
    let points = || groups.iter().flat_map(|g| g.2.iter().flatten());
    let right = points().map(|p| p.0).fold(0.0, f64::max);
    let top = points().map(|p| p.1).fold(0.0, f64::max);
    svg(WIDE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .x_label_area_size(34)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..right.max(1.0), 0.0..height(top))?;
        chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw()?;
        for (name, colour, lines) in groups {
            for (index, line) in lines.iter().enumerate() {
                let drawn = chart.draw_series(LineSeries::new(line.iter().copied(), colour))?;
                if index == 0 {
                    let swatch = *colour;
                    drawn
                        .label(*name)
                        .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 14, y)], swatch));
                }
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .border_style(STOCK)
            .draw()?;
        Ok(())
    })
}

fn part(names: &[&str], name: &str) -> RGBColor {
    let at = names.iter().position(|n| *n == name).unwrap_or_default();
    PARTS[at % PARTS.len()]
}

/// An axis must have a length, also when there is nothing to show.
fn height(top: f64) -> f64 {
    if top.is_finite() && top > 0.0 { top * HEADROOM } else { 1.0 }
}

fn digits(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

fn short(metric: Metric) -> &'static str {
    match metric {
        Metric::Blackout => "blackout",
        Metric::WireBytes => "on the wire",
        Metric::Cpu => "CPU",
        other => other.label(),
    }
}
