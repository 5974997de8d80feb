//! The list of mappings of a process (`/proc/PID/maps`, proc(5)).
//!
//! A VM that shares pages with others is tens of thousands of mappings, and the list of them megabytes of text. Where the kernel can be asked
//! for those of some addresses, no other is looked at; else the text is read at once, and nothing is allocated for a line.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;

use nix::libc::{ENAMETOOLONG, ENOENT};

use crate::process::{Process, ProcessError};
use crate::sys::procmap::{self, Found};

/// How the names of memfds of ours begin: templates and stores of pages in common.
const OURS: &[u8] = b"/memfd:sterna-";
/// What the kernel adds to a name that no folder has.
const DELETED: &[u8] = b" (deleted)";
/// Bytes that the list of a QEMU without any such pages takes.
const USUAL_BYTES: usize = 64 << 10;

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Map {
    /// Its first address, and the one behind its last.
    pub(crate) address: (u64, u64),
    /// What the process may do with it.
    pub(crate) rights: Rights,
    /// Whether what is written in it is seen by who maps the same file.
    pub(crate) shared: bool,
    /// Where in its file it begins.
    pub(crate) offset: u64,
    /// Device and inode of its file; no inode where it has none.
    pub(crate) dev: u64,
    pub(crate) inode: u64,
    /// Whose file it is.
    pub(crate) file: Whose,
}

/// What a process may do with a mapping, as far as anybody asks here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    Nothing,
    ReadWrite,
    Other,
}

/// Whose file is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// A store of pages that VMs have in common ([`crate::shared::NAME`]).
    Common,
    /// Another memfd of ours: a template.
    Ours,
    /// Somebody else's, or none.
    Other,
}

/// All mappings of a process, ascending.
pub(crate) fn all(process: &Process) -> Result<Vec<Map>, ProcessError> {
    within(process, std::iter::once(0..u64::MAX))
}

/// Those that touch one of these ranges, ascending; maybe others too.
pub(crate) fn within(
    process: &Process,
    ranges: impl Iterator<Item = Range<u64>>,
) -> Result<Vec<Map>, ProcessError> {
    let mut file = process.open_proc("maps")?;
    // Linux before 6.11 cannot be asked; nor can another where a rule of the host forbids it.
    let maps = ask(&file, ranges).or_else(|_| read(&mut file));
    process.is_alive().then_some(()).ok_or_else(|| process.gone())?;
    maps.map_err(|source| ProcessError::Proc { pid: process.pid(), what: "maps", source })
}

/// By a question for each mapping: half of the time that its line takes, and nothing for what is not asked for.
fn ask(maps: &File, ranges: impl Iterator<Item = Range<u64>>) -> io::Result<Vec<Map>> {
    let mut found: Vec<Map> = Vec::new();
    let mut files: Vec<((u64, u64), Whose)> = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end
            && let Some(map) = procmap::at_or_above(maps, at)?
            && map.start < range.end
        {
            found.push(of_found(maps, &map, &mut files)?);
            at = map.end;
        }
    }
    found.sort_unstable_by_key(|map| map.address);
    found.dedup_by_key(|map| map.address);
    Ok(found)
}

/// `files` are those whose names were asked for already.
fn of_found(maps: &File, map: &Found, files: &mut Vec<((u64, u64), Whose)>) -> io::Result<Map> {
    let rights = match (map.readable, map.writable, map.executable) {
        (false, false, false) => Rights::Nothing,
        (true, true, false) => Rights::ReadWrite,
        _ => Rights::Other,
    };
    let dev = rustix::fs::makedev(map.device.0, map.device.1);
    let key = (dev, map.inode);
    let file = match files.iter().find(|(known, _)| *known == key) {
        Some((_, file)) => *file,
        None if map.inode == 0 => Whose::Other,
        None => match procmap::name(maps, map.start) {
            Ok((named, name)) if named == *map => {
                let file = whose(&name);
                files.push((key, file));
                file
            }
            // It has changed since, and is gone: then it is nobody's. A name of ours is short.
            Ok(_) => Whose::Other,
            Err(why) if [ENOENT, ENAMETOOLONG].map(Some).contains(&why.raw_os_error()) => Whose::Other,
            Err(why) => return Err(why),
        },
    };
    let Found { start, end, shared, offset, inode, .. } = *map;
    Ok(Map { address: (start, end), rights, shared, offset, dev, inode, file })
}

fn read(file: &mut File) -> io::Result<Vec<Map>> {
    let mut text = Vec::with_capacity(USUAL_BYTES);
    file.read_to_end(&mut text)?;
    parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The mappings of such a text.
pub(crate) fn parse(text: &[u8]) -> Option<Vec<Map>> {
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(of_line).collect()
}

/// `from-to perms offset major:minor inode name`, all numbers but the inode hexadecimal.
fn of_line(line: &[u8]) -> Option<Map> {
    let address = range_of(line)?;
    let (perms, rest) = word(word(line).1);
    let (offset, rest) = word(rest);
    let (dev, rest) = word(rest);
    let (inode, name) = word(rest);
    let (major, minor) = split(dev, b':')?;
    let rights = match perms.get(..3)? {
        b"---" => Rights::Nothing,
        b"rw-" => Rights::ReadWrite,
        _ => Rights::Other,
    };
    Some(Map {
        address,
        rights,
        shared: perms.get(3)? == &b's',
        offset: number(offset, 16)?,
        dev: rustix::fs::makedev(number(major, 16)? as u32, number(minor, 16)? as u32),
        inode: number(inode, 10)?,
        file: whose(name.trim_ascii_start()),
    })
}

/// The addresses at the head of a mapping's line, which `smaps` has too.
pub(crate) fn range_of(line: &[u8]) -> Option<(u64, u64)> {
    let (from, to) = split(word(line).0, b'-')?;
    Some((number(from, 16)?, number(to, 16)?))
}

fn whose(name: &[u8]) -> Whose {
    let Some(kind) = name.strip_prefix(OURS) else { return Whose::Other };
    let common = crate::shared::NAME.as_bytes();
    match kind.strip_suffix(DELETED).unwrap_or(kind) == common.strip_prefix(b"sterna-").unwrap_or(common) {
        true => Whose::Common,
        false => Whose::Ours,
    }
}

/// What is before the first space, and what behind it.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    split(text, b' ').unwrap_or((text, &[]))
}

fn split(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let place = text.iter().position(|byte| *byte == at)?;
    Some((&text[..place], &text[place + 1..]))
}

fn number(digits: &[u8], base: u32) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |all, digit| {
        let digit = char::from(*digit).to_digit(base)?;
        all.checked_mul(u64::from(base))?.checked_add(u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::shared::SharedWords;

    #[test]
    fn a_line_says_what_it_says() {
        let text = b"7f00-8000 rw-p 00000000 00:00 0 \n\
                     8000-9000 r--s 00012000 fd:1a 12   /a b\xff: c\n\
                     ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let all = parse(text).unwrap();
        let first = Map {
            address: (0x7f00, 0x8000),
            rights: Rights::ReadWrite,
            shared: false,
            offset: 0,
            dev: 0,
            inode: 0,
            file: Whose::Other,
        };
        assert_eq!(all[0], first);
        let second = Map {
            address: (0x8000, 0x9000),
            rights: Rights::Other,
            shared: true,
            offset: 0x12000,
            dev: rustix::fs::makedev(0xfd, 0x1a),
            inode: 12,
            ..first
        };
        assert_eq!(all[1], second);
        assert_eq!(all[2].address, (0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000));
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn the_kernel_and_its_text_say_the_same() {
        let store = crate::shared::common_store(4).unwrap();
        let process = Process::open(std::process::id() as i32).unwrap();
        let mapped = SharedWords::map(store.file(), 1024).unwrap();
        let at = mapped.words().as_ptr() as u64;
        let text = read(&mut process.open_proc("maps").unwrap()).unwrap();
        let asked = ask(&process.open_proc("maps").unwrap(), std::iter::once(0..u64::MAX)).unwrap();
        // What is beside ours may change under us, for other tests run here too.
        let of = |maps: &[Map]| maps.iter().copied().find(|map| map.address.0 == at);
        let known = |map: &Map| map.inode != 0 && map.rights == Rights::Other;
        let files = |maps: Vec<Map>| maps.into_iter().filter(known).collect::<Vec<_>>();
        assert_eq!(of(&asked), of(&text));
        assert_eq!(of(&text).unwrap().file, Whose::Common);
        assert!(!files(asked.clone()).is_empty());
        assert_eq!(files(asked), files(text));
        // Of one address there is one; what two ranges touch is told once.
        let one = within(&process, [at..at + 1, at + 4096..at + 8192].into_iter()).unwrap();
        assert_eq!(one.len(), 1);
        assert!(within(&process, std::iter::empty()).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_list_is_none() {
        for text in [
            "7f00 rw-p 0 0:0 0",
            "7f00-8000 rw",
            "7f00-8000 rw-p x 0:0 0",
            "-1 rw-p 0 0:0 0",
            "1-10000000000000000 rw-p 0 0:0 0",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse(b""), Some(Vec::new()));
    }

    #[test]
    fn memfds_of_ours_are_known_by_their_names() {
        for (name, file) in [
            ("sterna-common (deleted)", Whose::Common),
            ("sterna-common", Whose::Common),
            ("sterna-commons (deleted)", Whose::Ours),
            ("sterna-template (deleted)", Whose::Ours),
            ("other (deleted)", Whose::Other),
        ] {
            let line = format!("7f00-8000 rw-p 00000000 00:01 7                      /memfd:{name}\n");
            assert_eq!(parse(line.as_bytes()).unwrap()[0].file, file, "{name}");
        }
    }
}
