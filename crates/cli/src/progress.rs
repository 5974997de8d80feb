//! What is shown while a migration goes on: a bar on a terminal, a plain line per second elsewhere, JSON lines on request.

use crate::args::Format;
use crate::exit::{complain, tell};
use crate::human::{plain, short_bytes};
use crate::postcopy;
use crate::show;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use sterna_agent::model::MigrationView;

/// How often a plain line is written.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// The bar's redraws per second: enough to look alive, cheap over a slow terminal.
const DRAWS_PER_SECOND: u8 = 10;

const TEMPLATE: &str = "{prefix} [{bar:24}] {percent:>3}%  {wide_msg}";

/// How progress is shown.
pub(crate) enum Progress {
    /// Redrawn on a terminal.
    Bar(ProgressBar),
    /// Lines on stderr.
    Lines {
        /// When the last line was written, and the status it had.
        last: Option<(Instant, String)>,
    },
    /// Each view on stdout.
    JsonLines,
    /// Notes only.
    Quiet,
}

impl Progress {
    /// Chooses by the format and by what stderr is.
    pub(crate) fn choose(format: Format, quiet: bool) -> Self {
        match format {
            Format::Jsonl => Self::JsonLines,
            _ if quiet => Self::Quiet,
            _ if std::io::stderr().is_terminal() => Self::Bar(bar()),
            _ => Self::Lines { last: None },
        }
    }

    /// The same for several migrations, each its own.
    pub(crate) fn several(format: Format, quiet: bool, count: usize) -> Vec<Self> {
        let target = ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND);
        let bars = MultiProgress::with_draw_target(target);
        let one = |_| match Self::choose(format, quiet) {
            Self::Bar(bar) => Self::Bar(bars.add(bar)),
            other => other,
        };
        (0..count).map(one).collect()
    }

    /// Shows a view.
    pub(crate) fn show(&mut self, view: &MigrationView) {
        match self {
            Self::Bar(bar) => draw(bar, view),
            Self::Lines { last } => {
                let due = last
                    .as_ref()
                    .is_none_or(|(when, status)| when.elapsed() >= LINE_EVERY || *status != view.status);
                if due {
                    tell(&format!("{}: {}", view.vm, figures(view)));
                    *last = Some((Instant::now(), view.status.clone()));
                }
            }
            // The final one is the result, which the command itself prints.
            Self::JsonLines if crate::follow::is_final(view) => {}
            Self::JsonLines => drop(show::json_line(view)),
            Self::Quiet => {}
        }
    }

    /// Says something that must not be missed.
    pub(crate) fn note(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| complain(text)),
            _ => complain(text),
        }
    }

    /// Leaves nothing of a bar behind: the result says it all.
    pub(crate) fn finish(self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
    let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.with_style(style.progress_chars("=> "))
}

fn draw(bar: &ProgressBar, view: &MigrationView) {
    bar.set_prefix(plain(&format!("{} {}", view.vm, view.status)));
    bar.set_length(view.ram.total.max(1));
    bar.set_position(done(view));
    bar.set_message(plain(&(detail(view) + &template(view))));
}

/// Bytes of RAM that need not be sent any more.
fn done(view: &MigrationView) -> u64 {
    match view.status.as_str() {
        "setup" => 0,
        _ => view.ram.total.saturating_sub(view.ram.remaining),
    }
}

fn figures(view: &MigrationView) -> String {
    match view.status.as_str() {
        "setup" => return format!("setup, to {}{}", view.target, template(view)),
        // How far it came does not matter any more; the result says why.
        "failed" | "cancelled" => return view.status.clone(),
        _ => {}
    }
    let percent = done(view) as f64 * 100.0 / view.ram.total.max(1) as f64;
    format!("{}, {percent:.1} %, {}{}", view.status, detail(view), template(view))
}

/// How far its template is, while that is on its way.
fn template(view: &MigrationView) -> String {
    let ram = &view.ram;
    match ram.template_bytes < ram.template_total {
        true => {
            format!(", template {} of {}", short_bytes(ram.template_bytes), short_bytes(ram.template_total))
        }
        false => String::new(),
    }
}

fn detail(view: &MigrationView) -> String {
    if let Some(text) = postcopy::detail(view) {
        return text;
    }
    let ram = &view.ram;
    let mut text = format!("{}/{}", short_bytes(ram.transferred), short_bytes(ram.total));
    text += &format!(", {:.1} mbps", ram.mbps);
    text += &format!(", dirty {}/s", short_bytes(ram.dirty_pages_rate.saturating_mul(ram.page_size)));
    text += &format!(", round {}", ram.dirty_sync_count);
    if view.cpu_throttle_percentage > 0 {
        text += &format!(", guest slowed by {} %", view.cpu_throttle_percentage);
    }
    if let Some(ms) = view.expected_downtime {
        text += &format!(", expected downtime {ms:.0} ms");
    }
    text
}
