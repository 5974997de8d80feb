//! Which processes write most memory, as far as it can be told without costing them anything.
//!
//! It is judged by what a process computed since the last look, times the memory that it holds. The exact way would be the
//! kernel's soft-dirty bits (`/proc/PID/clear_refs`, `pagemap`). It was left out: clearing them makes each of a process's
//! next writes to a page a fault, which slows down everybody at the moment when there is the least time; whoever
//! else relies on these bits in the guest (checkpoints) would lose them; not every kernel has them. Minor faults tell little:
//! memory that is written again and again is faulted in once. The price is that a process that only reads or computes, and is
//! large, is slowed as well: for a few seconds, and never to nothing.

use std::collections::HashMap;

/// How many are slowed at most: a list that is followed by hand, and a signal for each in every pulse.
pub const VICTIMS_MAX: usize = 16;
/// Who does less than this part (of 100) of what the greatest does is left alone: nothing would be won.
const SHARE_MIN: u128 = 5;
/// Greater than any count of ticks or pages; what is computed with two of them fits.
const COUNT_MAX: u64 = 1 << 56;
/// The kernel's flag of its own threads (`include/linux/sched.h`, PF_KTHREAD).
const KERNEL_THREAD: u64 = 0x0020_0000;
/// The kernel cuts names of programs to this.
const NAME_MAX: usize = 15;
/// Without these nobody could look at the guest, or it would be taken for dead. Ourselves first.
pub const SPARED: &[&str] = &[
    "sterna-guest",
    "init",
    "systemd",
    "systemd-journal",
    "systemd-logind",
    "systemd-udevd",
    "dbus-daemon",
    "dbus-broker",
    "sshd",
    "agetty",
    "getty",
    "login",
    "qemu-ga",
    "watchdog",
    "corosync",
    "pacemakerd",
    "keepalived",
];

/// A process at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its pid.
    pub pid: i32,
    /// The program's name, as the kernel cuts it.
    pub name: String,
    /// When it began, in ticks: the same pid with another start is another process.
    pub start: u64,
    /// What it computed, in ticks.
    pub cpu: u64,
    /// The memory that it holds, in pages.
    pub resident: u64,
    /// It can be stopped: no kernel thread, not stopped by somebody else, not a corpse.
    pub stoppable: bool,
}

/// Who may be slowed.
#[derive(Clone, Debug, Default)]
pub struct Chooser {
    spared: Vec<String>,
    only: Vec<String>,
}

impl Chooser {
    /// Spares these programs besides those that are always spared; slows only those in `only`, unless it is empty.
    #[must_use]
    pub fn new(spared: &[String], only: &[String]) -> Self {
        let cut = |name: &str| name.chars().take(NAME_MAX).collect::<String>();
        let spared = SPARED.iter().copied().chain(spared.iter().map(String::as_str));
        Self { spared: spared.map(cut).collect(), only: only.iter().map(|name| cut(name)).collect() }
    }

    /// Those that write most between two looks, the greatest first.
    #[must_use]
    pub fn choose(&self, before: &[Usage], after: &[Usage]) -> Vec<Usage> {
        let earlier: HashMap<(i32, u64), u64> =
            before.iter().map(|usage| ((usage.pid, usage.start), usage.cpu)).collect();
        // One that was not there at the first look began since: all that it computed counts.
        let score = |usage: &Usage| {
            let cpu = usage.cpu.saturating_sub(earlier.get(&(usage.pid, usage.start)).copied().unwrap_or(0));
            u128::from(cpu.min(COUNT_MAX)) * u128::from(usage.resident.min(COUNT_MAX))
        };
        let candidates = after.iter().filter(|usage| self.may_slow(usage));
        let mut found: Vec<(u128, &Usage)> = candidates.map(|usage| (score(usage), usage)).collect();
        let greatest = found.iter().map(|(score, _)| *score).max().unwrap_or(0);
        found.retain(|(score, _)| *score > 0 && score * 100 >= greatest * SHARE_MIN);
        found.sort_by_key(|(score, usage)| (std::cmp::Reverse(*score), usage.pid));
        found.into_iter().take(VICTIMS_MAX).map(|(_, usage)| usage.clone()).collect()
    }

    fn may_slow(&self, usage: &Usage) -> bool {
        let named = |list: &[String]| list.contains(&usage.name);
        let ours = usage.pid.cast_unsigned() == std::process::id();
        let wanted = self.only.is_empty() || named(&self.only);
        usage.pid > 1 && !ours && usage.stoppable && wanted && !named(&self.spared)
    }
}

/// All processes, now.
#[must_use]
pub fn look() -> Vec<Usage> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(usage).collect()
}

/// One process, now; nothing when it has ended.
#[must_use]
pub fn usage(pid: i32) -> Option<Usage> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse(pid, &String::from_utf8_lossy(&text))
}

/// Reads a line of proc_pid_stat(5). The name may hold anything, so it ends at the last bracket.
fn parse(pid: i32, text: &str) -> Option<Usage> {
    let (head, tail) = text.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    // The first of them is the third of the manual.
    let number = |place: usize| fields.get(place - 3)?.parse::<u64>().ok();
    let state = *fields.first()?;
    let stoppable = number(9)? & KERNEL_THREAD == 0 && matches!(state, "R" | "S" | "D");
    let cpu = number(14)?.saturating_add(number(15)?);
    Some(Usage { pid, name: name.to_owned(), start: number(22)?, cpu, resident: number(24)?, stoppable })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(pid: i32, name: &str, cpu: u64, resident: u64) -> Usage {
        Usage { pid, name: name.into(), start: 5, cpu, resident, stoppable: true }
    }

    fn chosen(chooser: &Chooser, before: &[Usage], after: &[Usage]) -> Vec<i32> {
        chooser.choose(before, after).iter().map(|usage| usage.pid).collect()
    }

    #[test]
    fn a_line_of_the_kernel_is_read_whatever_the_name() {
        let line = "77 (a) R 1 (b)) S 1 77 77 0 -1 4194560 100 0 0 0 30 12 0 0 20 0 1 0 5000 9999 321 18446744073709551615";
        let expected = Usage {
            pid: 77,
            name: "a) R 1 (b)".into(),
            start: 5000,
            cpu: 42,
            resident: 321,
            stoppable: true,
        };
        assert_eq!(parse(77, line), Some(expected));
        for short in ["", "77", "77 (x", "77 (x) S 1", &line[..60]] {
            assert_eq!(parse(77, short), None, "{short:?}");
        }
        assert!(usage(std::process::id().cast_signed()).unwrap().resident > 0);
    }

    #[test]
    fn those_that_compute_and_hold_much_are_chosen() {
        let before = [one(10, "big", 100, 1000), one(11, "idle", 9000, 9000), one(12, "small", 0, 1)];
        let after = [one(10, "big", 150, 1000), one(11, "idle", 9000, 9000), one(12, "small", 50, 1)];
        assert_eq!(chosen(&Chooser::new(&[], &[]), &before, &after), [10]);
    }

    #[test]
    fn nobody_is_chosen_whom_the_guest_needs() {
        let mut kernel = one(20, "kswapd0", 90, 1000);
        kernel.stoppable = false;
        let us = one(std::process::id().cast_signed(), "test", 90, 1000);
        let after = [
            one(1, "anything", 90, 1000),
            kernel,
            us,
            one(21, "sshd", 90, 1000),
            one(22, "sterna-guest", 90, 1000),
            one(23, "database-with-a-", 90, 1000),
            one(24, "other", 90, 1000),
        ];
        let mut after = after.to_vec();
        after[5].name.truncate(NAME_MAX);
        let spared = Chooser::new(&["database-with-a-long-name".into()], &[]);
        assert_eq!(chosen(&spared, &[], &after), [24]);
        assert_eq!(chosen(&Chooser::new(&[], &["load".into()]), &[], &after), [0; 0]);
    }

    #[test]
    fn a_pid_that_was_used_again_is_another_process() {
        let before = [one(10, "old", 1_000_000, 10)];
        let young = Usage { start: 6, ..one(10, "young", 50, 1000) };
        assert_eq!(chosen(&Chooser::new(&[], &[]), &before, &[young]), [10]);
    }

    #[test]
    fn there_are_never_too_many() {
        let after: Vec<Usage> = (2..2000).map(|pid| one(pid, "x", 50, 1000)).collect();
        assert_eq!(Chooser::new(&[], &[]).choose(&[], &after).len(), VICTIMS_MAX);
        let after: Vec<Usage> = (2..20).map(|pid| one(pid, "x", u64::MAX, u64::MAX)).collect();
        assert_eq!(Chooser::new(&[], &[]).choose(&[], &after).len(), VICTIMS_MAX);
    }
}
