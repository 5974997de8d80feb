//! Results as one page that needs nothing else: no script, no font, no network.

mod plots;

use std::fmt::Write;

use crate::facts::HostFacts;
use crate::results::{Demo, Goal, Rate, Results};
use crate::{BenchError, table};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b2733}\
    h1,h2{font-weight:600}pre{background:#f3f5f7;padding:1rem;overflow-x:auto}\
    .row{display:flex;flex-wrap:wrap;gap:1rem}.met{color:#14693b}.missed{color:#b3261e;font-weight:600}\
    td{padding:.1rem 1rem .1rem 0}svg{max-width:100%;height:auto}";

/// The page for files of results, each with a title.
pub fn page(files: &[(String, Results)]) -> Result<String, BenchError> {
    let mut body = String::new();
    for (title, results) in files {
        let _ = writeln!(body, "<h1>{}</h1>", escaped(title));
        if let Some(demo) = &results.demo {
            body += &of_demo(demo)?;
        }
        if let Some(rate) = &results.rate {
            body += &of_rate(rate);
        }
    }
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Sterna beside stock QEMU</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n{body}</body></html>\n"
    ))
}

fn of_demo(demo: &Demo) -> Result<String, BenchError> {
    let bars = plots::bars(demo)?.concat();
    Ok(format!(
        "<h2>A VM with a server under load moves between two hosts at 1 Gbit/s</h2>\n{facts}{goals}\
         <div class=\"row\">{bars}</div>\n<p>Bars are medians, thin lines the smallest and the largest sample. Total time \
         runs from the command until the source is free, the start of the target's QEMU included. CPU seconds are those of \
         both QEMUs (the emulated guest's own work is part of it) and, for ours, of both agents.</p>\n\
         <h2>How our downtime is spent</h2>\n{split}\n<h2>How the moves go on</h2>\n{progress}\n{client}\n\
         <pre>{table}</pre>\n",
        facts = facts(&demo.host),
        goals = goals(&demo.goals),
        split = plots::downtime_split(demo)?,
        progress = plots::progress(demo)?,
        client = plots::writes(demo)?,
        table = escaped(&table::demo(demo)),
    ))
}

fn of_rate(rate: &Rate) -> String {
    format!(
        "<h2>How well a bandwidth limit is kept</h2>\n{}<pre>{}</pre>\n",
        goals(&rate.goals),
        escaped(&table::rate(rate))
    )
}

fn goals(goals: &[Goal]) -> String {
    let line = |g: &Goal| {
        let (class, verdict) = if g.met { ("met", "met") } else { ("missed", "missed") };
        format!(
            "<tr><td>{}</td><td>{:.3}</td><td>at most {}</td><td class=\"{class}\">{verdict}</td></tr>",
            escaped(&g.text),
            g.value,
            g.at_most
        )
    };
    format!("<table>{}</table>\n", goals.iter().map(line).collect::<String>())
}

fn facts(host: &HostFacts) -> String {
    let HostFacts { began, kernel, cpu, cores, memory_mib, qemu, sterna, load_before, .. } = host;
    let text = format!(
        "{sterna}, {qemu}; {cores} cores of {cpu}, {memory_mib} MiB, Linux {kernel}; load before {load_before}; {began}"
    );
    format!("<p>{}</p>\n", escaped(&text))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::sample;

    #[test]
    fn the_page_has_all_plots_and_needs_nothing_from_elsewhere() {
        let results = Results { demo: Some(sample()), rate: Some(Rate::default()) };
        let page = page(&[("a <b>".to_owned(), results)]).unwrap();
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert_eq!(page.matches("<svg").count(), 5 + 3);
        assert!(page.contains("a &lt;b&gt;"), "titles are escaped");
        let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
        for word in ["http:", "https:", "src=", "href=", "<script", "@import"] {
            assert!(!elsewhere.contains(word), "{word}");
        }
    }

    #[test]
    fn one_pair_without_samples_makes_a_page_as_well() {
        let mut demo = sample();
        demo.pairs.truncate(1);
        demo.pairs[0].ours.samples.clear();
        demo.pairs[0].ours.downtime_split.clear();
        demo.pairs[0].stock.client.per_second.clear();
        page(&[("x".to_owned(), Results { demo: Some(demo), rate: None })]).unwrap();
    }
}
