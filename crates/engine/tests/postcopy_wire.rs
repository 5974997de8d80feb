//! PROTOCOL.md's section on missing pages against the code, as `protocol.rs` does it for the rest.

use sterna_engine::wire::request::{FAULT_PAGES_MAX, REQUEST_BYTES, Request};

const DOCUMENT: &str = include_str!("../../../PROTOCOL.md");

/// Rows of the table whose header has this as its last cell or contains it, without markup.
fn table(header: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| {
        let inner = line.trim().trim_matches('|');
        inner.split('|').map(|cell| cell.trim().to_string()).collect::<Vec<_>>()
    };
    let mut lines = DOCUMENT.lines().skip_while(|line| !cells(line).iter().any(|cell| cell == header));
    assert!(lines.next().is_some(), "PROTOCOL.md has no table with a column {header:?}");
    lines.skip(1).take_while(|line| line.starts_with('|')).map(cells).collect()
}

#[test]
fn the_request_tables_are_the_code() {
    let layout = table("request").into_iter().map(|row| (row[0].parse().unwrap(), row[1].parse().unwrap()));
    assert_eq!(layout.collect::<Vec<(u64, u64)>>(), [(0, 1), (1, 1), (2, 2), (4, 4), (8, 8)]);
    let documented = table("request kind").into_iter().map(|row| (row[0].parse().unwrap(), row[1].clone()));
    let coded = (0..=u8::MAX).filter_map(|kind| {
        let mut raw = [0; REQUEST_BYTES];
        (raw[0], raw[4]) = (kind, u8::from(kind != 3));
        let request = format!("{:?}", Request::decode(&raw).ok()?);
        Some((kind, request.split(' ').next().unwrap_or_default().to_string()))
    });
    assert_eq!(documented.collect::<Vec<(u8, String)>>(), coded.collect::<Vec<_>>());
    let limits = table("request limit").into_iter().map(|row| (row[0].clone(), row[1].parse().unwrap()));
    let coded = [("REQUEST_BYTES", REQUEST_BYTES as u64), ("FAULT_PAGES_MAX", FAULT_PAGES_MAX.into())];
    assert_eq!(limits.collect::<Vec<(String, u64)>>(), coded.map(|(name, value)| (name.to_string(), value)));
}
