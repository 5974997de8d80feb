//! Figures as people read them, and text from elsewhere made harmless for a terminal.

/// Steps of 1024, as virsh prints them.
const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// A count of bytes with three decimals, as `virsh domjobinfo` has them.
pub(crate) fn bytes(count: u64) -> String {
    let (value, unit) = scaled(count as f64);
    format!("{value:.3} {unit}")
}

/// A count of bytes, short.
pub(crate) fn short_bytes(count: u64) -> String {
    let (value, unit) = scaled(count as f64);
    match unit {
        "B" => format!("{value:.0} B"),
        _ => format!("{value:.1} {unit}"),
    }
}

fn scaled(mut value: f64) -> (f64, &'static str) {
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    (value, UNITS[unit])
}

/// How long ago, in its two largest units.
pub(crate) fn age(since: jiff::Timestamp) -> String {
    let seconds = jiff::Timestamp::now().duration_since(since).as_secs().max(0);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

/// Without control characters, save newlines and tabs: names and QEMU's output reach a terminal that obeys them.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .map(|char| match char {
            '\n' | '\t' => char,
            char if char.is_control() => '\u{fffd}',
            char => char,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_largest_unit_that_is_not_a_fraction() {
        assert_eq!(bytes(0), "0.000 B");
        assert_eq!(bytes(1023), "1023.000 B");
        assert_eq!(bytes(1 << 30), "1.000 GiB");
        assert_eq!(short_bytes(1536), "1.5 KiB");
        assert_eq!(short_bytes(u64::MAX), "16384.0 PiB");
    }

    #[test]
    fn a_terminal_is_not_commanded_by_text_from_elsewhere() {
        assert_eq!(plain("a\u{1b}[2Jb\nc\u{9b}d"), "a\u{fffd}[2Jb\nc\u{fffd}d");
    }
}
