//! Figures drawn with block characters, as wide as the terminal. Without colours, so that a file or a pipe gets the same.

/// A terminal that does not tell its width, or no terminal.
const WIDTH_DEFAULT: usize = 80;
/// Narrower charts show nothing.
const WIDTH_MIN: usize = 40;
/// Wider ones are not read any better.
const WIDTH_MAX: usize = 160;
/// Eighths of a cell, from below.
const UPWARD: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Eighths of a cell, from the left.
const RIGHTWARD: [char; 9] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];

/// Columns that stdout has.
pub(crate) fn width() -> usize {
    let asked = rustix::termios::tcgetwinsize(std::io::stdout());
    let told = asked.map(|size| usize::from(size.ws_col)).ok().filter(|columns| *columns > 0);
    told.unwrap_or(WIDTH_DEFAULT).clamp(WIDTH_MIN, WIDTH_MAX)
}

/// A column for each value, or for the mean of several where there are more values than columns; `begin` and `end` are written
/// below the first and the last.
pub(crate) fn columns(values: &[f64], (begin, end): (&str, &str), width: usize, height: usize) -> String {
    let most = values.iter().copied().fold(0.0, f64::max);
    let label = short(most);
    let margin = label.len();
    let room = width.saturating_sub(margin + 2).max(1);
    let drawn = spread(values, room);
    let mut text = String::new();
    for row in (0..height).rev() {
        let (name, edge) = if row + 1 == height { (label.as_str(), '┤') } else { ("", '│') };
        let cells: String = drawn
            .iter()
            .map(|value| {
                UPWARD[eighths(value / most.max(f64::MIN_POSITIVE), height).saturating_sub(row * 8).min(8)]
            })
            .collect();
        text += format!("{name:>margin$} {edge}{cells}").trim_end();
        text.push('\n');
    }
    let gap = drawn.len().saturating_sub(begin.chars().count());
    text += &format!("{:>margin$} └{}\n", "0", "─".repeat(drawn.len()));
    text += format!("{:margin$}  {begin}{end:>gap$}\n", "").trim_end();
    text.push('\n');
    text
}

/// A bar for each value, with its name on the left and its figure behind.
pub(crate) fn bars(rows: &[(String, f64)], width: usize) -> String {
    let most = rows.iter().map(|row| row.1).fold(f64::MIN_POSITIVE, f64::max);
    let names = rows.iter().map(|row| row.0.chars().count()).max().unwrap_or(0);
    let figures = rows.iter().map(|row| short(row.1).len()).max().unwrap_or(0);
    let room = width.saturating_sub(names + figures + 2).max(1);
    let line = |(name, value): &(String, f64)| {
        let eighths = eighths(value / most, room);
        let (whole, rest) = (eighths / 8, RIGHTWARD[eighths % 8]);
        let bar = format!("{}{rest}", "█".repeat(whole));
        format!("{name:>names$} {:>figures$} {bar}", short(*value)).trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// How many eighths of so many cells; what is there at all shows.
fn eighths(part: f64, cells: usize) -> usize {
    let exact = part.clamp(0.0, 1.0) * (cells * 8) as f64;
    if exact > 0.0 { (exact.round() as usize).max(1) } else { 0 }
}

/// As many values as fit: few are drawn wider, many are put together.
fn spread(values: &[f64], room: usize) -> Vec<f64> {
    if values.len() <= room {
        let each = (room / values.len().max(1)).max(1);
        return values.iter().flat_map(|value| std::iter::repeat_n(*value, each)).collect();
    }
    let part = |at: usize| at * values.len() / room;
    let mean = |slice: &[f64]| slice.iter().sum::<f64>() / slice.len() as f64;
    (0..room).map(|at| mean(&values[part(at)..part(at + 1)])).collect()
}

/// A count in at most five characters.
pub(crate) fn short(value: f64) -> String {
    match value {
        value if value >= 1e8 => format!("{:.0}M", value / 1e6),
        value if value >= 1e6 => format!("{:.1}M", value / 1e6),
        value if value >= 1e4 => format!("{:.1}k", value / 1e3),
        value => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_rise_with_their_values() {
        let text = columns(&[0.0, 50.0, 100.0], ("0 s", "3 s"), 40, 2);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], format!("100 ┤{}{}", " ".repeat(22), "█".repeat(11)));
        assert_eq!(lines[1], format!("    │{}{}", " ".repeat(11), "█".repeat(22)));
        assert_eq!(lines[2], format!("  0 └{}", "─".repeat(33)));
        assert!(lines[3].starts_with("     0 s") && lines[3].ends_with("3 s"), "{text}");
    }

    #[test]
    fn charts_keep_to_their_width() {
        for (count, width) in [(1, 40), (35, 40), (36, 40), (1000, 40), (1000, 160), (0, 40)] {
            let values: Vec<f64> = (0..count).map(|n| f64::from(n % 7) * 1e5).collect();
            let rows: Vec<_> = values.iter().map(|value| ("window".to_owned(), *value)).collect();
            for text in [columns(&values, ("0 s", "end"), width, 8), bars(&rows, width)] {
                assert!(text.lines().all(|line| line.chars().count() <= width), "{count}, {width}: {text}");
                assert!(!text.contains('\u{1b}'));
            }
        }
    }

    #[test]
    fn the_longest_bar_fills_the_room_and_the_smallest_shows() {
        let text = bars(&[("1 s".into(), 1.0), ("10 s".into(), 20_000.0), ("0 s".into(), 0.0)], 40);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], " 1 s     1 ▏");
        assert_eq!(lines[1], format!("10 s 20.0k {}", "█".repeat(29)));
        assert_eq!(lines[2], " 0 s     0");
    }
}
