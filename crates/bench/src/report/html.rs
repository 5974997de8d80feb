//! The parts of a page: text, figures and their legends, and the style sheet.

use plotters::style::RGBColor;

use super::palette;

const STYLE: &str = "\
:root{color-scheme:light dark;--page:#fff;--ink:#1b2733;--dim:#5b6670;--box:#f3f5f7;--line:#dce1e6;--met:#14693b;--missed:#b3261e}\
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:1.5rem auto;padding:0 1rem;background:var(--page);color:var(--ink)}\
h1,h2,h3,h4{font-weight:600;line-height:1.25;overflow-wrap:anywhere}\
h2{margin-top:3rem;border-top:1px solid var(--line);padding-top:1rem}h4{margin:1.5rem 0 .5rem}\
.dim{color:var(--dim)}.met{color:var(--met)}.missed{color:var(--missed);font-weight:600}span.met,span.missed{white-space:nowrap}\
table{border-collapse:collapse;width:100%}td,th{padding:.15rem .6rem .15rem 0;text-align:left;vertical-align:top}\
th{padding-top:.7rem;border-bottom:1px solid var(--line)}td:nth-child(n+2){white-space:nowrap}\
.grid{display:grid;gap:1rem 1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr))}\
.grid.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr))}\
figure{margin:0;min-width:0}figcaption{font-size:14px;line-height:1.35}\
.legend{display:flex;flex-wrap:wrap;gap:0 .9rem;font-size:13px;color:var(--dim)}\
svg{display:block;width:100%;height:auto}svg.key{display:inline-block;width:.75em;height:.75em;margin-right:.35em}\
svg text{font-family:system-ui,sans-serif;paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}\
.scroll{overflow-x:auto}pre{background:var(--box);padding:.8rem;overflow-x:auto;font-size:12px}summary{cursor:pointer}";
/// On a phone, a goal has a line of its own above its figures.
const STYLE_NARROW: &str = "\
table,tbody{display:block}tr{display:grid;grid-template-columns:1fr 1fr auto}td:first-child{grid-column:1/-1}\
td:nth-child(n+2):not(.met,.missed){color:var(--dim)}th{grid-column:1/3}th+th{grid-column:3}";
const STYLE_DARK: &str = "\
:root{--page:#14191f;--ink:#dce3ea;--dim:#98a4ad;--box:#1e252d;--line:#363f49;--met:#6fce97;--missed:#ff8a80}";

/// All of it.
pub(super) fn document(title: &str, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <style>{STYLE}@media(max-width:36rem){{{STYLE_NARROW}}}\
         @media(prefers-color-scheme:dark){{{STYLE_DARK}{dark}}}</style></head>\n<body>\n{body}</body></html>\n",
        title = escaped(title),
        dark = palette::dark_rules(),
    )
}

/// Text that is nothing but text.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A paragraph of a class.
pub(super) fn paragraph(class: &str, text: &str) -> String {
    format!("<p class=\"{class}\">{}</p>\n", escaped(text))
}

/// A name beside its colour.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) colour: RGBColor,
    pub(super) stroke: Stroke,
}

/// How a thing is drawn that a legend names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stroke {
    /// An area, or a line.
    Full,
    /// A dashed line.
    Dashed,
    /// Not at all: only the name matters.
    Not,
}

impl Key {
    /// Of an area or a line.
    pub(super) fn full(name: impl Into<String>, colour: RGBColor) -> Key {
        Key { name: name.into(), colour, stroke: Stroke::Full }
    }

    /// Of a dashed line.
    pub(super) fn dashed(name: impl Into<String>) -> Key {
        Key { name: name.into(), colour: palette::LIMIT, stroke: Stroke::Dashed }
    }

    /// Of nothing: a remark.
    pub(super) fn text(name: impl Into<String>) -> Key {
        Key { name: name.into(), colour: palette::INK, stroke: Stroke::Not }
    }

    fn html(&self) -> String {
        let colour = palette::hex(self.colour);
        let swatch = match self.stroke {
            Stroke::Not => return format!("<span>{}</span>", escaped(&self.name)),
            Stroke::Full => format!("<rect width=\"12\" height=\"12\" fill=\"{colour}\"/>"),
            Stroke::Dashed => format!(
                "<path d=\"M6 0V12\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"3 2\"/>"
            ),
        };
        format!("<span><svg class=\"key\" viewBox=\"0 0 12 12\">{swatch}</svg>{}</span>", escaped(&self.name))
    }
}

/// A plot with its title above and its legend below.
pub(super) fn figure(title: &str, plot: &str, legend: &[Key]) -> String {
    let title = escaped(title);
    // Who does not see the plot hears what it is.
    let plot = plot.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{title}\" "), 1);
    let legend: String = legend.iter().map(Key::html).collect();
    format!("<figure><figcaption>{title}</figcaption>{plot}<div class=\"legend\">{legend}</div></figure>\n")
}

/// Figures side by side, as many as there is room for; nothing of none.
pub(super) fn grid(class: &str, title: &str, figures: &[String]) -> String {
    match figures {
        [] => String::new(),
        _ => {
            format!("<h4>{}</h4>\n<div class=\"grid {class}\">\n{}</div>\n", escaped(title), figures.concat())
        }
    }
}
