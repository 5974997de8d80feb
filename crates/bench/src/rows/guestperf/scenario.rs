//! guestperf's scenarios as data. Names are kept where the original differs from what they say: there,
//! `compr-xbzrle-cache-20` has 10 per cent; here it has 20.

/// What shall end a migration of a guest that writes faster than the link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// The guest is paused after so many rounds over memory.
    Pause { rounds: u64 },
    /// It runs at the target after so many rounds.
    Postcopy { rounds: u64 },
    /// It is slowed down, by so many per cent more each time.
    AutoConverge { step: u32 },
    /// Pages are compressed by so many threads.
    Threads { threads: u32 },
    /// Pages that are sent again travel as differences, with a cache of so many per cent of memory.
    Xbzrle { cache_percent: u64 },
    /// So many connections.
    Multifd { channels: u32 },
    /// Each vCPU's writes are limited.
    DirtyLimit,
}

impl Means {
    /// Who has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Means::Pause { .. } => "stock pre-copy, paused",
            Means::Postcopy { .. } => "stock post-copy",
            Means::AutoConverge { .. } => "stock auto-converge",
            Means::Threads { .. } => "stock compression",
            Means::Xbzrle { .. } => "stock XBZRLE",
            Means::Multifd { .. } => "stock multifd",
            Means::DirtyLimit => "stock dirty-limit",
        }
    }
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scenario {
    /// Its name in `comparison.py`.
    pub(super) name: &'static str,
    pub(super) means: Means,
    /// The limit, where there is one.
    pub(super) bandwidth_mib: Option<u64>,
}

const fn plain(name: &'static str, means: Means) -> Scenario {
    Scenario { name, means, bandwidth_mib: None }
}

const fn limited(name: &'static str, means: Means, mib: u64) -> Scenario {
    Scenario { name, means, bandwidth_mib: Some(mib) }
}

/// guestperf's defaults, where a scenario names only its bandwidth.
const POSTCOPY: Means = Means::Postcopy { rounds: 5 };
const AUTO_CONVERGE: Means = Means::AutoConverge { step: 10 };

/// All of them, in guestperf's order.
pub(super) const SCENARIOS: &[Scenario] = &[
    plain("pause-iters-0", Means::Pause { rounds: 0 }),
    plain("pause-iters-1", Means::Pause { rounds: 1 }),
    plain("pause-iters-5", Means::Pause { rounds: 5 }),
    plain("pause-iters-20", Means::Pause { rounds: 20 }),
    limited("post-copy-bw-100mbs", POSTCOPY, 12),
    limited("post-copy-bw-300mbs", POSTCOPY, 37),
    limited("post-copy-bw-1gbs", POSTCOPY, 125),
    limited("post-copy-bw-10gbs", POSTCOPY, 1250),
    limited("post-copy-bw-100gbs", POSTCOPY, 12500),
    plain("post-copy-iters-0", Means::Postcopy { rounds: 0 }),
    plain("post-copy-iters-1", Means::Postcopy { rounds: 1 }),
    plain("post-copy-iters-5", Means::Postcopy { rounds: 5 }),
    plain("post-copy-iters-20", Means::Postcopy { rounds: 20 }),
    plain("auto-converge-step-5", Means::AutoConverge { step: 5 }),
    plain("auto-converge-step-10", Means::AutoConverge { step: 10 }),
    plain("auto-converge-step-20", Means::AutoConverge { step: 20 }),
    limited("auto-converge-bw-100mbs", AUTO_CONVERGE, 12),
    limited("auto-converge-bw-300mbs", AUTO_CONVERGE, 37),
    limited("auto-converge-bw-1gbs", AUTO_CONVERGE, 125),
    limited("auto-converge-bw-10gbs", AUTO_CONVERGE, 1250),
    limited("auto-converge-bw-100gbs", AUTO_CONVERGE, 12500),
    plain("compr-mt-threads-1", Means::Threads { threads: 1 }),
    plain("compr-mt-threads-2", Means::Threads { threads: 2 }),
    plain("compr-mt-threads-4", Means::Threads { threads: 4 }),
    plain("compr-xbzrle-cache-5", Means::Xbzrle { cache_percent: 5 }),
    plain("compr-xbzrle-cache-10", Means::Xbzrle { cache_percent: 10 }),
    plain("compr-xbzrle-cache-20", Means::Xbzrle { cache_percent: 20 }),
    plain("compr-xbzrle-cache-50", Means::Xbzrle { cache_percent: 50 }),
    plain("compr-multifd-channels-4", Means::Multifd { channels: 4 }),
    plain("compr-multifd-channels-8", Means::Multifd { channels: 8 }),
    plain("compr-multifd-channels-32", Means::Multifd { channels: 32 }),
    plain("compr-multifd-channels-64", Means::Multifd { channels: 64 }),
    plain("compr-dirty-limit-period-500", Means::DirtyLimit),
    plain("compr-dirty-limit-period-800", Means::DirtyLimit),
    plain("compr-dirty-limit-period-1000", Means::DirtyLimit),
    plain("compr-dirty-limit-10MB", Means::DirtyLimit),
    plain("compr-dirty-limit-20MB", Means::DirtyLimit),
    plain("compr-dirty-limit-50MB", Means::DirtyLimit),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_different_and_say_what_is_done() {
        let names: std::collections::BTreeSet<_> = SCENARIOS.iter().map(|s| s.name).collect();
        assert_eq!(names.len(), SCENARIOS.len());
        for scenario in SCENARIOS {
            let number = match scenario.means {
                Means::Threads { threads: n } | Means::Multifd { channels: n } => u64::from(n),
                Means::Xbzrle { cache_percent } => cache_percent,
                _ => continue,
            };
            assert!(scenario.name.ends_with(&format!("-{number}")), "{scenario:?}");
        }
    }
}
