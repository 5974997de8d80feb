//! What only the long list of mappings tells (`/proc/PID/smaps`): flags, and whether huge pages are allowed. It is costly, for the
//! kernel walks over all pages.

use std::io::{self, BufRead, BufReader};
use std::ops::ControlFlow;

use crate::maps;
use crate::page::Region;
use crate::process::{Process, ProcessError};

/// A mapping.
pub(crate) struct Details {
    pub(crate) start: u64,
    pub(crate) end: u64,
    flags: String,
    /// Whether transparent huge pages are allowed in it.
    pub(crate) huge: bool,
}

impl Details {
    /// Whether it has a flag, two letters of `VmFlags` in proc(5).
    pub(crate) fn has(&self, flag: &str) -> bool {
        self.flags.split_whitespace().any(|f| f == flag)
    }
}

/// The mappings that a region touches, ascending.
pub(crate) fn details(process: &Process, region: &Region) -> Result<Vec<Details>, ProcessError> {
    let mut all = Vec::new();
    each(process, region, |details| {
        all.push(details);
        ControlFlow::Continue(())
    })?;
    Ok(all)
}

/// The first of them alone: the kernel is not asked about those behind it.
pub(crate) fn first(process: &Process, region: &Region) -> Result<Option<Details>, ProcessError> {
    let mut found = None;
    each(process, region, |details| {
        found = Some(details);
        ControlFlow::Break(())
    })?;
    Ok(found)
}

fn each(
    process: &Process,
    region: &Region,
    see: impl FnMut(Details) -> ControlFlow<()>,
) -> Result<(), ProcessError> {
    let read = parse(BufReader::new(process.open_proc("smaps")?), region, see);
    process.is_alive().then_some(()).ok_or_else(|| process.gone())?;
    read.map_err(|source| ProcessError::Proc { pid: process.pid(), what: "smaps", source })
}

fn parse(
    mut text: impl BufRead,
    region: &Region,
    mut see: impl FnMut(Details) -> ControlFlow<()>,
) -> io::Result<()> {
    let mut line = Vec::new();
    let mut last: Option<Details> = None;
    loop {
        line.clear();
        let more = text.read_until(b'\n', &mut line)? > 0;
        let range = maps::range_of(&line);
        if range.is_some() || !more {
            let ended = last.take().filter(|last| last.end > region.base);
            if ended.is_some_and(|details| see(details).is_break()) || !more {
                return Ok(());
            }
        }
        match (range, last.as_mut()) {
            (Some((start, _)), _) if start >= region.end() => return Ok(()),
            (Some((start, end)), _) => {
                last = Some(Details { start, end, flags: String::new(), huge: false });
            }
            (None, Some(last)) => match std::str::from_utf8(&line).ok().and_then(|line| line.split_once(':'))
            {
                Some(("VmFlags", flags)) => last.flags = flags.to_owned(),
                Some(("THPeligible", value)) => last.huge = value.trim() == "1",
                _ => {}
            },
            (None, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "7000-8000 rw-p 00000000 00:00 0 \nRss:  4 kB\nTHPeligible:    1\nVmFlags: rd wr um \n\
                        9000-a000 r--s 00000000 00:01 7   /a: b\nTHPeligible:    0\nVmFlags: rd lo \n\
                        b000-c000 rw-p 00000000 00:00 0 \nVmFlags: rd nr \n";

    fn seen(base: u64, end: u64) -> Vec<Details> {
        let mut all = Vec::new();
        let see = |details| {
            all.push(details);
            ControlFlow::Continue(())
        };
        parse(TEXT.as_bytes(), &Region { base, bytes: end - base }, see).unwrap();
        all
    }

    #[test]
    fn flags_belong_to_the_mapping_above_them() {
        let all = seen(0x7000, 0xc000);
        assert_eq!(all.len(), 3);
        assert!((all[0].start, all[0].end) == (0x7000, 0x8000) && all[0].huge && all[0].has("um"));
        assert!(!all[0].has("lo") && all[1].has("lo") && !all[1].has("um") && !all[1].huge);
        assert!(all[2].has("nr"), "the last has nothing behind it");
    }

    #[test]
    fn only_what_a_region_touches_is_told() {
        let starts = |base, end| seen(base, end).iter().map(|details| details.start).collect::<Vec<_>>();
        assert_eq!(starts(0x8000, 0x9000), [] as [u64; 0]);
        assert_eq!(starts(0x7000, 0x9000), [0x7000]);
        assert_eq!(starts(0x8000, 0xa000), [0x9000]);
        assert_eq!(starts(0x9000, 0xb000), [0x9000]);
    }

    #[test]
    fn who_has_seen_enough_ends_it() {
        let mut seen = 0;
        let see = |_| {
            seen += 1;
            ControlFlow::Break(())
        };
        parse(TEXT.as_bytes(), &Region { base: 0x7000, bytes: 0x5000 }, see).unwrap();
        assert_eq!(seen, 1);
    }
}
