//! Colours, for light and dark pages. Plots are drawn in the light ones; on a dark page, rules of the style sheet put the dark
//! ones in their places.

use plotters::style::RGBColor;

/// Text, axes and thin lines.
pub(super) const INK: RGBColor = RGBColor(0x1b, 0x27, 0x33);
/// Lines behind the figures.
pub(super) const GRID: RGBColor = RGBColor(0xdc, 0xe1, 0xe6);
/// What physics allows, and what else is drawn as a dashed line.
pub(super) const LIMIT: RGBColor = RGBColor(0xb9, 0x48, 0x4e);
/// Our figures.
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
/// The first peer's.
const STOCK: RGBColor = RGBColor(0x9a, 0xa3, 0xab);
/// Parts and lines, in the order of their first appearance.
const PARTS: [RGBColor; 10] = [
    OURS,
    RGBColor(0xe0, 0x8b, 0x27),
    RGBColor(0x3d, 0x9a, 0x5b),
    LIMIT,
    RGBColor(0x7d, 0x5b, 0xa6),
    RGBColor(0x8a, 0x6a, 0x4f),
    RGBColor(0xd0, 0x6f, 0xa8),
    RGBColor(0x6b, 0x77, 0x80),
    RGBColor(0xa8, 0xa0, 0x2a),
    RGBColor(0x2a, 0x9d, 0xb0),
];
/// Those that would be too dark on a dark page, and what they are there. The others do on both.
const DARK: [(RGBColor, RGBColor); 10] = [
    (INK, RGBColor(0xdc, 0xe3, 0xea)),
    (GRID, RGBColor(0x36, 0x3f, 0x49)),
    (OURS, RGBColor(0x5a, 0xa9, 0xe6)),
    (LIMIT, RGBColor(0xe8, 0x83, 0x88)),
    (PARTS[2], RGBColor(0x5b, 0xbd, 0x7b)),
    (PARTS[4], RGBColor(0xa9, 0x8b, 0xd3)),
    (PARTS[5], RGBColor(0xb8, 0x96, 0x7a)),
    (PARTS[7], RGBColor(0x98, 0xa4, 0xad)),
    (PARTS[8], RGBColor(0xc8, 0xbf, 0x4a)),
    (PARTS[9], RGBColor(0x4f, 0xc0, 0xd2)),
];

/// Of the contender in this place; ours is the first.
pub(super) fn contender(place: usize) -> RGBColor {
    match place {
        0 => OURS,
        1 => STOCK,
        // The first part has our colour, and the fourth is that of limits.
        _ => [PARTS[1], PARTS[2], PARTS[4], PARTS[5], PARTS[6]][(place - 2) % 5],
    }
}

/// Of a part or a line.
pub(super) fn part(place: usize) -> RGBColor {
    PARTS[place % PARTS.len()]
}

/// As plots and style sheets write it.
pub(super) fn hex(colour: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

/// The rules for a dark page: they go before what is written at the elements.
pub(super) fn dark_rules() -> String {
    let rule = |(light, dark): &(RGBColor, RGBColor)| {
        let (light, dark) = (hex(*light), hex(*dark));
        format!("svg [fill=\"{light}\"]{{fill:{dark}}}svg [stroke=\"{light}\"]{{stroke:{dark}}}")
    };
    DARK.iter().map(rule).collect()
}
