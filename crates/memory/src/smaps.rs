//! What only the long list of mappings tells (`/proc/PID/smaps`): flags, and whether huge pages are allowed. It is costly, for the
//! kernel walks over all pages.

use crate::page::Region;
use crate::process::{Process, ProcessError, range_of};

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
    let mut all = parse(&process.read_proc("smaps")?);
    all.retain(|d| d.start < region.end() && d.end > region.base);
    Ok(all)
}

fn parse(text: &str) -> Vec<Details> {
    let mut all: Vec<Details> = Vec::new();
    for line in text.lines() {
        match (range_of(line), all.last_mut()) {
            (Some((start, end)), _) => all.push(Details { start, end, flags: String::new(), huge: false }),
            (None, Some(last)) => match line.split_once(':') {
                Some(("VmFlags", flags)) => last.flags = flags.to_owned(),
                Some(("THPeligible", value)) => last.huge = value.trim() == "1",
                _ => {}
            },
            (None, None) => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_belong_to_the_mapping_above_them() {
        let text = "7f00-8000 rw-p 00000000 00:00 0 \nRss:  4 kB\nTHPeligible:    1\nVmFlags: rd wr um \n\
                    9000-a000 r--s 00000000 00:01 7   /a: b\nTHPeligible:    0\nVmFlags: rd lo \n";
        let all = parse(text);
        assert_eq!(all.len(), 2);
        assert!((all[0].start, all[0].end) == (0x7f00, 0x8000) && all[0].huge && all[0].has("um"));
        assert!(!all[0].has("lo") && all[1].has("lo") && !all[1].has("um") && !all[1].huge);
    }
}
