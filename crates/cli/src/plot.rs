//! The figures of a measurement as SVG: pages written in each interval, and how the set of written pages grows.

use plotters::coord::Shift;
use plotters::prelude::*;
use sterna_agent::model::WorkingSetView;

/// Two panels of half the height each.
const SIZE: (u32, u32) = (800, 640);
const FONT: (&str, u32) = ("sans-serif", 14);
const TITLE: (&str, u32) = ("sans-serif", 16);
/// Room above the highest value.
const HEADROOM: f64 = 1.08;
const LINE: RGBColor = RGBColor(0x1f, 0x5f, 0xa8);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// What a panel shows.
struct Panel<'a> {
    title: String,
    across: &'a str,
    upward: &'a str,
    points: Vec<(f64, f64)>,
}

/// Draws both panels.
///
/// # Errors
/// A text when the figures cannot be drawn.
pub(crate) fn svg(view: &WorkingSetView) -> Result<String, String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&area, view).map_err(|why| format!("the figures cannot be drawn: {why}"))?;
    }
    Ok(text)
}

fn draw(area: &Area<'_>, view: &WorkingSetView) -> Drawn {
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(SIZE.1 / 2);
    // A level for each interval: intervals may differ in length.
    let level = |interval: &sterna_agent::model::IntervalView| {
        let (end, pages) = (interval.at / 1e3, interval.pages as f64);
        [(end - interval.length / 1e3, pages), (end, pages)]
    };
    panel(
        &upper,
        &Panel {
            title: format!("VM {}: pages written in each interval", view.vm),
            across: "time (s)",
            upward: "pages",
            points: view.intervals.iter().flat_map(level).collect(),
        },
    )?;
    let grown = view.growth.iter().map(|point| (point.window / 1e3, point.pages));
    panel(
        &lower,
        &Panel {
            title: format!("VM {}: pages written at least once in a window", view.vm),
            across: "length of the window (s)",
            upward: "pages",
            points: std::iter::once((0.0, 0.0)).chain(grown).collect(),
        },
    )?;
    area.present()?;
    Ok(())
}

fn panel(area: &Area<'_>, panel: &Panel<'_>) -> Drawn {
    let most = |of: fn(&(f64, f64)) -> f64| panel.points.iter().map(of).fold(0.0, f64::max);
    let room = |most: f64| if most > 0.0 { most * HEADROOM } else { 1.0 };
    let (right, top) = (room(most(|point| point.0)), room(most(|point| point.1)));
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, TITLE)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .label_style(FONT)
        .axis_desc_style(FONT)
        .x_desc(panel.across)
        .y_desc(panel.upward)
        .y_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;
    chart.draw_series(LineSeries::new(panel.points.iter().copied(), LINE.stroke_width(2)))?;
    Ok(())
}
