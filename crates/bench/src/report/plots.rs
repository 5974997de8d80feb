//! The plots, as SVG. Titles and legends are not in them but around them, where text wraps.

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::palette::{GRID, INK, LIMIT};
use crate::BenchError;
use crate::figures::Summary;
use crate::table;

/// Wide enough for axes, narrow enough that a phone need not make the text tiny.
const WIDE: (u32, u32) = (400, 230);
/// Bars are beside each other in threes.
const BARS_WIDTH: u32 = 300;
/// Room for a bar and the text above it.
const BAR_HEIGHT: u32 = 38;
/// Room for a bar of a split.
const SPLIT_HEIGHT: u32 = 14;
const AXIS_HEIGHT: u32 = 26;
const AXIS_HEIGHT_NAMED: u32 = 36;
const AXIS_WIDTH: u32 = 46;
const FONT: (&str, u32) = ("sans-serif", 12);
/// Room above the highest value.
const HEADROOM: f64 = 1.08;
/// A line that is the only one of its colour shows each of its points, if it has no more.
const DOTTED_AT_MOST: usize = 32;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Lines of one colour.
pub(super) struct Group {
    pub(super) colour: RGBColor,
    pub(super) lines: Vec<Vec<(f64, f64)>>,
}

/// A bar, the line over it and the text above it.
pub(super) struct Bar<'a> {
    pub(super) name: &'a str,
    pub(super) colour: RGBColor,
    pub(super) summary: Summary,
}

/// Draws into a string.
fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String, BenchError> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let drawn = draw(&area).and_then(|()| Ok(area.present()?));
        drawn.map_err(|why| BenchError::Plot(why.to_string()))?;
    }
    Ok(text)
}

/// A bar for each contender, and what physics allows.
pub(super) fn bars(bars: &[Bar<'_>], limits: &[f64]) -> Result<String, BenchError> {
    let ends = bars.iter().map(|b| b.summary.high).chain(limits.iter().copied());
    let right = length(ends.fold(0.0, f64::max));
    let count = bars.len() as f64;
    svg((BARS_WIDTH, BAR_HEIGHT * bars.len() as u32 + AXIS_HEIGHT), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_right(14)
            .margin_left(6)
            .x_label_area_size(AXIS_HEIGHT)
            .build_cartesian_2d(0.0..right, 0.0..count)?;
        mesh_below(&mut chart)?;
        for (place, bar) in bars.iter().enumerate() {
            // The first is the uppermost.
            let bottom = count - 1.0 - place as f64;
            let Summary { median, low, high, .. } = bar.summary;
            let area = Rectangle::new([(0.0, bottom + 0.08), (median, bottom + 0.5)], bar.colour.filled());
            let range = PathElement::new(vec![(low, bottom + 0.29), (high, bottom + 0.29)], INK);
            chart.draw_series([area])?;
            chart.draw_series([range])?;
        }
        for limit in limits {
            dashed(&mut chart, [(*limit, 0.0), (*limit, count)])?;
        }
        for (place, bar) in bars.iter().enumerate() {
            let at = (0.0, count - 0.27 - place as f64);
            text(&mut chart, bar_text(bar), at, HPos::Left, VPos::Center)?;
        }
        Ok(())
    })
}

fn bar_text(bar: &Bar<'_>) -> String {
    /// Longer names would leave the plot.
    const NAME_CHARS_MAX: usize = 24;
    let name: String = match bar.name.chars().count() {
        n if n > NAME_CHARS_MAX => bar.name.chars().take(NAME_CHARS_MAX - 1).chain(['…']).collect(),
        _ => bar.name.to_owned(),
    };
    let Summary { median, low, high, .. } = bar.summary;
    match (value(low), value(high)) {
        (low, high) if low == high => format!("{name}  {}", value(median)),
        (low, high) => format!("{name}  {} ({low}–{high})", value(median)),
    }
}

/// A bar for each move, of parts: a colour and a length each.
pub(super) fn stacked(moves: &[Vec<(RGBColor, f64)>]) -> Result<String, BenchError> {
    let longest = moves.iter().map(|m| m.iter().map(|p| p.1).sum()).fold(0.0, f64::max);
    let count = moves.len() as f64;
    svg((WIDE.0, SPLIT_HEIGHT * moves.len() as u32 + AXIS_HEIGHT_NAMED + 4), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_right(14)
            .margin_left(6)
            .margin_top(4)
            .x_label_area_size(AXIS_HEIGHT_NAMED)
            .build_cartesian_2d(0.0..length(longest), 0.0..count)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(0)
            .x_labels(6)
            .x_max_light_lines(1)
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(FONT.into_font().color(&INK))
            .x_label_formatter(&|v| value(*v))
            .x_desc("ms stopped, a bar for each move")
            .draw()?;
        for (place, parts) in moves.iter().enumerate() {
            let (mut left, bottom) = (0.0, count - 1.0 - place as f64);
            for (colour, width) in parts {
                let corners = [(left, bottom + 0.12), (left + width, bottom + 0.88)];
                chart.draw_series([Rectangle::new(corners, colour.filled())])?;
                left += width;
            }
        }
        Ok(())
    })
}

/// Lines over an axis with a name, from 0. `x_label` writes the values of the axis; a dashed line may be drawn at a height.
pub(super) fn lines(
    groups: &[Group],
    x: &str,
    x_label: &dyn Fn(&f64) -> String,
    level: Option<f64>,
) -> Result<String, BenchError> {
    let points = || {
        groups.iter().flat_map(|g| g.lines.iter().flatten()).filter(|p| p.0.is_finite() && p.1.is_finite())
    };
    let right =
        length(points().map(|p| p.0).fold(0.0, f64::max)).max(points().map(|p| p.0).fold(0.0, f64::min));
    let left = points().map(|p| p.0).fold(0.0, f64::min);
    let bottom = points().map(|p| p.1).fold(0.0, f64::min);
    let top = length(points().map(|p| p.1).chain(level).fold(0.0, f64::max));
    svg(WIDE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_right(18)
            .margin_top(10)
            .x_label_area_size(AXIS_HEIGHT_NAMED)
            .y_label_area_size(AXIS_WIDTH)
            .build_cartesian_2d(left..right, bottom..top)?;
        mesh(&mut chart, x, x_label)?;
        for group in groups {
            for line in &group.lines {
                let line: Vec<(f64, f64)> =
                    line.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect();
                if group.lines.len() == 1 && line.len() <= DOTTED_AT_MOST {
                    let dot = |at: &(f64, f64)| Circle::new(*at, 2, group.colour.filled());
                    chart.draw_series(line.iter().map(dot))?;
                }
                chart.draw_series(LineSeries::new(line, group.colour.mix(0.85).stroke_width(1)))?;
            }
        }
        if let Some(level) = level {
            dashed(&mut chart, [(left, level), (right, level)])?;
        }
        Ok(())
    })
}

/// Which part of the samples is not above a value, with the median and the 95th of 100 marked.
pub(super) fn distribution(
    values: &[f64],
    summary: Summary,
    colour: RGBColor,
    x: &str,
) -> Result<String, BenchError> {
    /// Room at both sides for the names of the marks.
    const ROOM: f64 = 0.25;
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let room = match (summary.high - summary.low) * ROOM {
        room if room > 0.0 => room,
        _ => (summary.high.abs() * ROOM).max(1.0),
    };
    let (left, right) = (summary.low - room, summary.high + room);
    let share = |place: usize| place as f64 / sorted.len() as f64;
    let mut steps = vec![(left, 0.0)];
    for (place, at) in sorted.iter().enumerate() {
        steps.extend([(*at, share(place)), (*at, share(place + 1))]);
    }
    steps.push((right, 1.0));
    svg(WIDE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_right(18)
            .margin_top(10)
            .x_label_area_size(AXIS_HEIGHT_NAMED)
            .y_label_area_size(AXIS_WIDTH)
            .build_cartesian_2d(left..right, 0.0..1.25)?;
        mesh(&mut chart, x, &|v| value(*v))?;
        chart.draw_series(LineSeries::new(steps, colour.stroke_width(2)))?;
        // The names stand at the outer sides of their lines, so that they cannot meet.
        let marks = [("median", summary.median, HPos::Right, -0.01), ("p95", summary.p95, HPos::Left, 0.01)];
        for (name, at, side, gap) in marks {
            dashed(&mut chart, [(at, 0.0), (at, 1.22)])?;
            let place = (at + gap * (right - left), 1.14);
            text(&mut chart, format!("{name} {}", value(at)), place, side, VPos::Center)?;
        }
        Ok(())
    })
}

/// Lines at the values of the lower axis, which has no name.
fn mesh_below(chart: &mut Chart<'_, '_>) -> Drawn {
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_labels(5)
        .x_max_light_lines(1)
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(FONT.into_font().color(&INK))
        .x_label_formatter(&|v| value(*v))
        .draw()?;
    Ok(())
}

/// Lines at the values of both axes.
fn mesh(chart: &mut Chart<'_, '_>, x: &str, x_label: &dyn Fn(&f64) -> String) -> Drawn {
    chart
        .configure_mesh()
        .x_labels(5)
        .y_labels(5)
        .max_light_lines(1)
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(FONT.into_font().color(&INK))
        .x_label_formatter(x_label)
        .y_label_formatter(&|v| value(*v))
        .x_desc(x)
        .draw()?;
    Ok(())
}

fn dashed(chart: &mut Chart<'_, '_>, ends: [(f64, f64); 2]) -> Drawn {
    chart.draw_series(DashedLineSeries::new(ends, 5, 4, LIMIT.stroke_width(2)))?;
    Ok(())
}

fn text(chart: &mut Chart<'_, '_>, text: String, at: (f64, f64), h: HPos, v: VPos) -> Drawn {
    let style = FONT.into_font().color(&INK).pos(Pos::new(h, v));
    chart.draw_series([Text::new(text, at, style)])?;
    Ok(())
}

/// An axis must have a length, also when there is nothing to show.
fn length(top: f64) -> f64 {
    if top.is_finite() && top > 0.0 { top * HEADROOM } else { 1.0 }
}

/// A short number: no zeros behind the point, thousands and millions by their letters.
pub(super) fn value(value: f64) -> String {
    let (scaled, letter) = match value.abs() {
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e5 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = table::number(scaled);
    let short = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{}{letter}", if short == "-0" { "0" } else { short })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let written = [0.0, 0.25, 1.5, 300.0, 10_000.0, 250_000.0, 1.5e6, -0.000_01].map(value);
        assert_eq!(written, ["0", "0.25", "1.5", "300", "10000", "250k", "1.5M", "0"]);
    }

    #[test]
    fn nothing_equal_samples_and_infinity_can_be_drawn() {
        let summary = Summary::of([2.0; 8]).unwrap();
        distribution(&[2.0; 8], summary, INK, "ms").unwrap();
        let strange =
            Group { colour: INK, lines: vec![vec![(0.0, f64::NAN), (1.0, f64::INFINITY)], Vec::new()] };
        lines(&[strange], "s", &|v| value(*v), None).unwrap();
        stacked(&[Vec::new()]).unwrap();
        bars(&[], &[]).unwrap();
    }

    #[test]
    fn text_in_a_plot_is_escaped_and_a_long_name_is_cut() {
        let bar = Bar {
            name: "<a> & a name that is much too long",
            colour: INK,
            summary: Summary::of([1.0]).unwrap(),
        };
        let plot = bars(&[bar], &[0.5]).unwrap();
        assert!(plot.contains("&lt;a&gt; &amp; a name that") && !plot.contains("too long"), "{plot}");
    }
}
