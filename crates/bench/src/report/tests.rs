use super::*;
use crate::figures::{Figures, Metric};
use crate::results::tests::sample;
use crate::results::{Case, Contender, Move, Verified};

fn at(began: &str, rows: Vec<RowResult>) -> Results {
    let host = HostFacts { began: began.to_owned(), ..HostFacts::default() };
    Results { host, rows, pairs: None }
}

fn page_of(rows: Vec<RowResult>) -> String {
    page(&[("x".to_owned(), at("2026-11-21T11:45:59.6Z", rows))]).unwrap()
}

fn is_whole(page: &str) -> bool {
    let balanced =
        |tag: &str| page.matches(&format!("<{tag}")).count() == page.matches(&format!("</{tag}>")).count();
    ["svg", "figure", "section", "table", "details"].into_iter().all(balanced)
}

/// Plots, not the swatches of legends.
fn plots(page: &str) -> usize {
    page.matches("role=\"img\"").count()
}

fn downtimes(name: &str, values: impl Iterator<Item = f64>) -> Contender {
    let moved = |ms| Move { figures: Figures::default().with(Metric::Downtime, ms), ..Move::default() };
    Contender { moves: values.map(moved).collect(), ..Contender::named(name) }
}

fn row_of(contenders: Vec<Contender>) -> RowResult {
    let case = Case { contenders, ..Case::default() };
    RowResult { name: "downtime".into(), number: Some(2), cases: vec![case], ..RowResult::default() }
}

#[test]
fn the_page_has_all_plots_and_needs_nothing_from_elsewhere() {
    let page = page(&[("a <b>".to_owned(), at("2026-11-21T11:45:59Z", vec![sample()]))]).unwrap();
    assert!(is_whole(&page));
    // Three metrics, the split, two timelines and a curve.
    assert_eq!(plots(&page), 3 + 1 + 2 + 1);
    assert!(page.contains("a &lt;b&gt;") && page.contains("a guest of &lt;1024&gt; MiB"), "text is escaped");
    for part in ["2026-11-21 11:45 UTC", "limit 3500: bytes / link", "stop 1", "load 11", "equal: 4 blocks"] {
        assert!(page.contains(part), "{part}");
    }
    let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
    for word in ["http:", "https:", "src=", "href=", "<script", "@import", "url("] {
        assert!(!elsewhere.contains(word), "{word}");
    }
}

#[test]
fn dark_pages_have_other_colours() {
    let page = page_of(vec![sample()]);
    assert!(page.contains("@media(prefers-color-scheme:dark)"));
    assert!(page.contains("svg [fill=\"#1F6FB4\"]{fill:#5AA9E6}") && page.contains("fill=\"#1F6FB4\""));
}

#[test]
fn one_contender_with_one_sample_makes_a_page_as_well() {
    let page = page_of(vec![row_of(vec![downtimes("ours", std::iter::once(3.0))])]);
    assert!(is_whole(&page) && page.contains("ours  3"), "{page}");
    assert!(!page.contains("NaN"), "{page}");
}

#[test]
fn missing_figures_leave_their_plots_out() {
    let mut row = sample();
    for moved in row.cases[0].contenders.iter_mut().flat_map(|c| &mut c.moves) {
        *moved = Move::default();
    }
    row.cases[0].curves.clear();
    row.goals.push(Goal::at_most("cpu", f64::NAN, 1.0));
    let page = page_of(vec![row, row_of(Vec::new()), RowResult::default()]);
    assert!(is_whole(&page) && page.contains("<td>not measured</td>"));
    assert_eq!(plots(&page), 0);
}

#[test]
fn rows_that_did_not_run_or_missed_come_first() {
    let missed = RowResult {
        goals: vec![Goal::at_most("x", 2.0, 1.0)],
        title: "has missed".into(),
        ..row_of(Vec::new())
    };
    let not_run = RowResult {
        name: "idle".into(),
        title: "stands still".into(),
        not_run: Some("no <root>".into()),
        ..RowResult::default()
    };
    let page = page_of(vec![sample(), missed, not_run]);
    let places = ["stands still", "has missed", "the demo"].map(|title| page.find(title).unwrap());
    assert!(places.is_sorted(), "{places:?}");
    for part in ["NOT RUN", "MISSED", "no &lt;root&gt;", "at most 1"] {
        assert!(page.contains(part), "{part}");
    }
}

#[test]
fn what_was_lost_not_proved_or_failed_is_said() {
    let mut row = sample();
    row.cases[0].verified = Some(Verified { error: Some("pc.ram differs".into()), ..Verified::default() });
    row.cases[0].contenders[1].failed = Some("it did not converge".into());
    row.cases[0].contenders[0].moves[0].client.as_mut().unwrap().lost_writes = 2;
    row.notes.push("known only to <few>".into());
    let page = page_of(vec![row]);
    for part in
        ["WRONG", "pc.ram differs", "it did not converge", "2 writes LOST", "known only to &lt;few&gt;"]
    {
        assert!(page.contains(part), "{part}");
    }
}

#[test]
fn many_moves_show_how_downtime_is_distributed() {
    let many = downtimes("ours", (1..=20).map(f64::from));
    let few = downtimes("stock", (1..=7).map(f64::from));
    let page = page_of(vec![row_of(vec![many, few])]);
    assert!(
        page.contains("ours: share of 20 moves") && page.contains("p95 19") && page.contains("median 10.5")
    );
    assert!(!page.contains("stock: share of"));
}

#[test]
fn several_files_give_a_history_in_the_order_of_their_dates() {
    let mut faster = sample();
    faster.title = "the newest demo".into();
    faster.cases[0].contenders[0].moves.truncate(1);
    let files = [
        ("late".to_owned(), at("2026-11-23T10:00:00Z", vec![faster])),
        ("dateless".to_owned(), at("once", vec![sample()])),
        ("early".to_owned(), at("2026-11-21T11:45:59.6Z", vec![sample(), row_of(Vec::new())])),
    ];
    let page = page(&files).unwrap();
    assert!(is_whole(&page));
    // Total time, downtime and the ratios.
    assert_eq!(plots(&page), 7 + 3);
    let (newest, earlier) = page.split_once("Measured earlier").unwrap();
    assert!(newest.contains("late, measured 2026-11-23 10:00 UTC") && newest.contains("the newest demo"));
    assert!(earlier.contains("2 (downtime)"));
    assert!(page.contains("From file to file") && page.contains("ours / stock pre-copy, of the medians"));
    assert!(page.contains("2026-11-22"), "a tick between the two");
}

#[test]
fn no_files_make_a_page_too() {
    assert!(page(&[]).unwrap().contains("no results"));
}

#[test]
fn all_results_of_the_repository_can_be_read_and_shown() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let results = Results::parse(&text).unwrap_or_else(|why| panic!("{}: {why}", path.display()));
        assert!(results.host.began.parse::<Timestamp>().is_ok(), "{}", path.display());
        assert!(
            results.rows.iter().flat_map(|r| &r.cases).any(|c| !c.metrics().is_empty()),
            "{}",
            path.display()
        );
        files.push((path.display().to_string(), results));
    }
    assert!(!files.is_empty());
    assert!(is_whole(&page(&files).unwrap()));
}
