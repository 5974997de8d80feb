//! Bandwidths as people write them.
//!
//! A bare number is MiB/s, as virsh has it. Bytes and bits are told apart by the word, never by the case of a letter:
//! `GB/s` and `Gbit/s` (or `Gbps`) are clear, `Gb/s` means one to some and the other to others and is refused.

/// What `--bandwidth` takes, for its help.
pub(crate) const FORMS: &str =
    "64 (MiB/s), 64MiB/s, 500MB/s, 1.5GiB/s, 800Mbit/s, 1Gbit/s, 10Gbps; 0 is no limit";

/// Bytes per second; 0 is no limit.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|char: char| !char.is_ascii_digit() && char != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| format!("no bandwidth: write {FORMS}"))?;
    let factor = factor(unit.trim_start())
        .ok_or_else(|| format!("unknown unit {:?}: write {FORMS}", unit.trim_start()))?;
    to_bytes(number * factor)
}

/// Bytes of memory: `256MiB`, `1GiB`, `1000000`; a bare number is bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|char: char| !char.is_ascii_digit() && char != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim_start();
    let factor = match unit {
        "" => Some(1.0),
        _ if unit.ends_with("/s") || unit.ends_with("bit") || unit.ends_with("bps") => None,
        _ => factor(unit),
    };
    match (number.parse::<f64>(), factor) {
        (Ok(number), Some(factor)) if number * factor < 1e18 => Ok((number * factor) as u64),
        _ => Err("no size: write 256MiB, 1GiB, 500MB, or bytes".to_owned()),
    }
}

fn to_bytes(rate: f64) -> Result<u64, String> {
    if rate == 0.0 {
        return Ok(0);
    }
    match rate.is_finite() && (1.0..1e18).contains(&rate) {
        true => Ok(rate as u64),
        false => Err("a bandwidth is between 1 byte and 1e18 bytes per second, or 0 for no limit".to_owned()),
    }
}

/// Bytes per second of one unit.
fn factor(unit: &str) -> Option<f64> {
    if let Some(prefix) = unit.strip_suffix("bps") {
        return decimal(prefix).map(|step| step / 8.0);
    }
    let unit = unit.strip_suffix("/s").unwrap_or(unit);
    if let Some(prefix) = unit.strip_suffix("ibit") {
        return binary(prefix).map(|step| step / 8.0);
    }
    if let Some(prefix) = unit.strip_suffix("bit") {
        return decimal(prefix).map(|step| step / 8.0);
    }
    if let Some(prefix) = unit.strip_suffix("iB") {
        return binary(prefix);
    }
    match unit {
        "" => binary("M"),
        "B" => Some(1.0),
        "K" | "k" | "M" | "G" | "T" => binary(unit),
        _ => unit.strip_suffix('B').and_then(decimal),
    }
}

fn decimal(prefix: &str) -> Option<f64> {
    if prefix.is_empty() { Some(1.0) } else { exponent(prefix).map(|power| 1000f64.powi(power)) }
}

fn binary(prefix: &str) -> Option<f64> {
    exponent(prefix).map(|power| 1024f64.powi(power))
}

fn exponent(prefix: &str) -> Option<i32> {
    match prefix {
        "k" | "K" => Some(1),
        "M" => Some(2),
        "G" => Some(3),
        "T" => Some(4),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_understood() {
        for (text, bytes) in [
            ("64", 64 << 20),
            ("0", 0),
            ("0.5", 512 << 10),
            ("64MiB/s", 64 << 20),
            ("64 MiB/s", 64 << 20),
            ("64MiB", 64 << 20),
            ("64M", 64 << 20),
            ("1.5GiB/s", 3 << 29),
            ("500MB/s", 500_000_000),
            ("1Gbit/s", 125_000_000),
            ("10Gbps", 1_250_000_000),
            ("800Mbit/s", 100_000_000),
            ("1Mibit/s", 131_072),
            ("8kbit/s", 1000),
            ("1000B/s", 1000),
            ("80bps", 10),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_are_bytes() {
        assert_eq!(parse_size("256MiB"), Ok(256 << 20));
        assert_eq!(parse_size("1 GiB"), Ok(1 << 30));
        assert_eq!(parse_size("500MB"), Ok(500_000_000));
        assert_eq!((parse_size("4096"), parse_size("0")), (Ok(4096), Ok(0)));
        for text in ["", "much", "1Gbit", "64MiB/s", "-1", "1e30GiB", "9999999999TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_not_clear_is_refused() {
        for text in [
            "",
            "fast",
            "-1",
            "1Gb/s",
            "1gb/s",
            "1 GiB/h",
            "1.2.3",
            "1e9",
            "NaN",
            "inf",
            "9999999999TiB/s",
            "0.1B/s",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
