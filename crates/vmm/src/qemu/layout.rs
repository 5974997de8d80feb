//! Where every RAM block is, found without anything that QEMU does not have.
//!
//! `info ramblock` lists the blocks, since QEMU 8.2 with their addresses (`HVA`). Before, `info mtree -f` tells which
//! piece of which block the guest sees where, and `gpa2hva` the address of such a piece: less the piece's offset
//! in its block, that is where the block begins. Every piece must say the same, or nothing is believed.
//!
//! The map names memory regions (`vga.vram`), the list names blocks (`0000:00:01.0/vga.vram`). A region that could
//! be two blocks is neither: a block without an address is refused by the pre-check, a wrong one corrupts a guest.

use std::collections::{BTreeMap, BTreeSet};

use super::qmp::{Qmp, QmpError, Ticket};
use super::{COMMAND_WITHIN, Qemu};
use crate::types::{Block, Layout, VmmError};

/// The list of RAM blocks.
const LIST: &str = "info ramblock";
/// The memory map.
const MAP: &str = "info mtree -f";
/// How many pieces of one block are asked for. The firmware cuts the first megabyte of main memory into a dozen.
const PIECES_MAX: usize = 32;
/// How many answers are enough: more than one, since the guest may move a piece between the map and the question.
const ANSWERS: usize = 4;
/// How often the map is read when it changes under our hands.
const TRIES_MAX: u32 = 4;
/// How many blocks are believed: a VM with every slot full has a few hundred.
const BLOCKS_MAX: usize = 4096;

pub(super) fn layout(qemu: &mut Qemu) -> Result<Layout, VmmError> {
    let listed = qemu.hmp(LIST, "list its RAM blocks")?;
    let mut blocks = parse_blocks(&listed)?;
    if blocks.iter().any(|block| block.hva.is_none()) {
        // The map is long and each piece a question: it is read again only for a block that would be missed.
        let known = |block: &Block| block.hva.is_some() || qemu.addresses.contains_key(&block.name);
        if qemu.addresses.is_empty() || blocks.iter().any(|block| !known(block) && !block.is_rebuilt()) {
            // Those that are known need not be asked for again: after a load each question is a part of the downtime.
            let known = qemu.addresses.keys().cloned().collect();
            let found = addresses_by_map(qemu, &blocks, &known)?;
            qemu.remember(found)?;
        }
        for block in blocks.iter_mut().filter(|block| block.hva.is_none()) {
            block.hva = qemu.addresses.get(&block.name).copied();
        }
    }
    blocks.sort_by(|a, b| a.name.cmp(&b.name));
    qemu.late = blocks.iter().any(|block| block.hva.is_none() && !block.is_rebuilt());
    Ok(Layout { blocks })
}

/// Sends the first questions of a layout in which nothing is missing any more, if something was: a load brings it.
pub(super) fn ask_ahead(qemu: &mut Qemu) -> Result<(), QmpError> {
    if qemu.late {
        for line in [LIST, MAP] {
            let ticket = qemu.qmp.hmp_begin(line, COMMAND_WITHIN)?;
            qemu.ahead.insert(line, ticket);
        }
    }
    Ok(())
}

/// Forgets such of these questions: those that QEMU answered too early, and all once the VM runs.
pub(super) fn forget_ahead(qemu: &mut Qemu, such: impl Fn(&Qmp, &Ticket) -> bool) {
    let Qemu { ahead, qmp, .. } = qemu;
    let these: Vec<Ticket> =
        ahead.extract_if(.., |_, ticket| such(qmp, ticket)).map(|(_, ticket)| ticket).collect();
    these.iter().for_each(|ticket| qmp.forget(ticket));
}

/// The addresses that the memory map gives away, by the blocks' names: of all blocks but those that are `known`.
pub(super) fn addresses_by_map(
    qemu: &mut Qemu,
    blocks: &[Block],
    known: &BTreeSet<String>,
) -> Result<BTreeMap<String, u64>, VmmError> {
    // A guest that boots moves its cards' memory about between our questions: then the pieces disagree, once.
    let mut tries = 1..TRIES_MAX;
    loop {
        match addresses_once(qemu, blocks, known) {
            Err(VmmError::Layout { detail }) if tries.next().is_some() => {
                tracing::debug!(detail, "asking again")
            }
            done => return done,
        }
    }
}

fn addresses_once(
    qemu: &mut Qemu,
    blocks: &[Block],
    known: &BTreeSet<String>,
) -> Result<BTreeMap<String, u64>, VmmError> {
    let map = qemu.hmp(MAP, "show its memory map")?;
    let mut pieces: BTreeMap<&str, Vec<Piece>> = BTreeMap::new();
    for piece in parse_pieces(&map) {
        if let Some(block) = block_of(&piece, blocks) {
            pieces.entry(&block.name).or_default().push(piece);
        }
    }
    let mut found = BTreeMap::new();
    for (name, pieces) in pieces.into_iter().filter(|(name, _)| !known.contains(*name)) {
        if let Some(base) = base(qemu, name, &pieces)? {
            found.insert(name.to_owned(), base);
        }
    }
    Ok(found)
}

impl Qemu {
    fn remember(&mut self, found: BTreeMap<String, u64>) -> Result<(), VmmError> {
        for (name, hva) in found {
            let before = *self.addresses.entry(name.clone()).or_insert(hva);
            if before != hva {
                let detail = format!("block {name} was at {before:#x} and is now at {hva:#x}");
                return Err(VmmError::Layout { detail });
            }
        }
        Ok(())
    }
}

/// Where a block begins, by each of its pieces; nothing when none of them is there any more.
fn base(qemu: &mut Qemu, name: &str, pieces: &[Piece]) -> Result<Option<u64>, VmmError> {
    let (mut bases, mut answers) = (BTreeSet::new(), 0);
    let pieces = pieces.get(..PIECES_MAX).unwrap_or(pieces);
    let operation = "translate an address";
    for pieces in pieces.chunks(ANSWERS) {
        // All of them before the first is waited for.
        let mut ask =
            |piece: &Piece| qemu.qmp.hmp_begin(&format!("gpa2hva {:#x}", piece.gpa), COMMAND_WITHIN);
        let asked: Result<Vec<_>, _> = pieces.iter().map(&mut ask).collect();
        for (piece, ticket) in pieces.iter().zip(asked.map_err(|error| qemu.explain(operation, error))?) {
            // The guest may have put something else there meanwhile, or nothing (an error): another piece will tell.
            let answer = match qemu.qmp.hmp_finish(&ticket, COMMAND_WITHIN) {
                Err(QmpError::Refused { .. }) => continue,
                answer => answer.map_err(|error| qemu.explain(operation, error))?,
            };
            if let Some(hva) = parse_hva(&answer, &piece.region) {
                bases.insert(hva.wrapping_sub(piece.offset));
                answers += 1;
            }
        }
        if answers >= ANSWERS {
            break;
        }
    }
    if bases.len() > 1 {
        return Err(VmmError::Layout {
            detail: format!("the pieces of block {name} disagree about where it begins"),
        });
    }
    Ok(bases.first().copied())
}

/// Reads `info ramblock`: name, page size and its unit, offset, used, total, and since 8.2 address and access.
fn parse_blocks(text: &str) -> Result<Vec<Block>, VmmError> {
    let understood =
        text.lines().next().is_some_and(|head| head.contains("Block Name") && head.contains("Used"));
    if !understood {
        return Err(VmmError::Layout {
            detail: "info ramblock has another form than it is known to have".into(),
        });
    }
    let lines = text.lines().skip(1).filter(|line| !line.trim().is_empty());
    let blocks: Option<Vec<Block>> = lines.take(BLOCKS_MAX).map(parse_block).collect();
    let mut blocks =
        blocks.ok_or_else(|| VmmError::Layout { detail: "info ramblock has an odd line".into() })?;
    // A memory object that no device uses has no name yet: QEMU itself does not take it for the VM's.
    blocks.retain(|block| !block.name.is_empty());
    let names: BTreeSet<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
    if names.len() == blocks.len() {
        Ok(blocks)
    } else {
        Err(VmmError::Layout { detail: "two RAM blocks have one name".into() })
    }
}

fn parse_block(line: &str) -> Option<Block> {
    // From the right, for a name may hold spaces: an object's id is up to the user.
    let fields: Vec<&str> = line.split_whitespace().collect();
    let unit_at = fields.iter().rposition(|field| matches!(*field, "KiB" | "MiB" | "GiB" | "B"))?;
    let (head, tail) = fields.split_at(unit_at);
    let size: u64 = head.last()?.parse().ok()?;
    let name = head.split_last()?.1.join(" ");
    let shift = match *tail.first()? {
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => 0,
    };
    let hva = match tail.get(4) {
        Some(address) => Some(hex(address)?).filter(|address| *address != 0),
        None => None,
    };
    let page_bytes = size.checked_mul(1 << shift)?;
    Some(Block { name, bytes: hex(tail.get(2)?)?, page_bytes, hva })
}

/// A piece of a RAM block in the guest's address space.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    gpa: u64,
    offset: u64,
    region: String,
}

/// Reads `info mtree -f`: the view of address space `memory`, the one that `gpa2hva` looks into.
fn parse_pieces(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut in_memory = false;
    for line in text.lines() {
        if line.starts_with("FlatView") {
            in_memory = false;
        } else if line.trim_start().starts_with("AS \"memory\",") {
            in_memory = true;
        } else if in_memory {
            pieces.extend(parse_piece(line));
        }
    }
    pieces
}

/// Reads `  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000`, where it is of RAM.
fn parse_piece(line: &str) -> Option<Piece> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let (kind, rest) = rest.split_once("): ")?;
    let kind = kind.split_once(", ")?.1;
    // `ramd` is a device's own memory, `i/o` none at all.
    if !matches!(kind, "ram" | "rom" | "romd" | "nv-ram" | "nv-rom") {
        return None;
    }
    let gpa = hex(range.split_once('-')?.0)?;
    // Under KVM each line ends with the accelerator's name.
    let rest = rest.strip_suffix(" KVM").unwrap_or(rest);
    let (region, offset) = match rest.rsplit_once(" @") {
        Some((region, offset)) => (region, hex(offset)?),
        None => (rest, 0),
    };
    Some(Piece { gpa, offset, region: region.to_owned() })
}

/// The one block that a region can be: of the same name, or of that name behind a device's path.
fn block_of<'a>(piece: &Piece, blocks: &'a [Block]) -> Option<&'a Block> {
    let fits = |name: &str| {
        name == piece.region || name.strip_suffix(&piece.region).is_some_and(|path| path.ends_with('/'))
    };
    let mut candidates = blocks.iter().filter(|block| fits(&block.name));
    let found = candidates.next()?;
    (candidates.next().is_none() && piece.offset < found.bytes).then_some(found)
}

/// Reads `Host virtual address for 0xfffc0000 (pc.bios) is 0x7f66a0400000`, which must be of the region asked for.
fn parse_hva(answer: &str, region: &str) -> Option<u64> {
    let (head, hva) = answer.trim().rsplit_once(" is ")?;
    if !head.ends_with(&format!("({region})")) {
        return None;
    }
    hex(hva)
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "              Block Name    PSize              Offset               Used              Total\n\
                  \u{20}                 pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\n\
                  \u{20}  0000:00:01.0/vga.vram    2 MiB  0x0000000010080000 0x0000000001000000 0x0000000001000000\n";
    const NEW: &str = "Block Name    PSize  Offset  Used  Total  HVA  RO\n\
                       /rom@etc/acpi/tables    4 KiB  0x0 0x20000 0x200000  0x00007f6641c00000  ro\n";

    fn block(name: &str) -> Block {
        Block { name: name.into(), bytes: 0x1000, page_bytes: 4096, hva: None }
    }

    fn piece(region: &str, offset: u64) -> Piece {
        Piece { gpa: 0, offset, region: region.into() }
    }

    #[test]
    fn both_forms_of_the_list_are_read() {
        let old = parse_blocks(OLD).unwrap();
        assert_eq!(old[0], Block { name: "pc.ram".into(), bytes: 0x1000_0000, page_bytes: 4096, hva: None });
        assert_eq!((old[1].page_bytes, old[1].bytes), (2 << 20, 0x100_0000));
        let new = parse_blocks(NEW).unwrap();
        assert_eq!((new[0].bytes, new[0].hva), (0x20000, Some(0x7f66_41c0_0000)));
    }

    /// A VM with a memory object that nothing used could not be looked at.
    #[test]
    fn a_block_without_a_name_is_none_of_the_vms() {
        let unused =
            "                      4 KiB  0x0000000010000000 0x0000000008000000 0x0000000008000000\n";
        assert_eq!(parse_blocks(&format!("{OLD}{unused}")).unwrap(), parse_blocks(OLD).unwrap());
    }

    #[test]
    fn an_unknown_form_is_an_error() {
        for text in [
            "",
            "unknown command: 'info ramblock'",
            "Block Name Used\nnonsense",
            "Block Name Used\nx 4 KiB 1",
        ] {
            assert!(matches!(parse_blocks(text), Err(VmmError::Layout { .. })), "{text:?}");
        }
        let twice = format!("{OLD}{}", OLD.lines().nth(1).unwrap());
        assert!(parse_blocks(&twice).unwrap_err().to_string().contains("one name"));
    }

    #[test]
    fn only_ram_of_the_system_memory_view_counts() {
        let map = "FlatView #0\n AS \"cpu-smm-1\", root: memory\n  0000000000000000-000000000000ffff (prio 0, ram): smram\n\
                   FlatView #1\n AS \"memory\", root: system\n Root memory region: system\n\
                   \u{20} 00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 KVM\n\
                   \u{20} 00000000fd000000-00000000fdffffff (prio 1, i/o): vga.vram\n\
                   \u{20} 00000000fe000000-00000000fe000fff (prio 1, ramd): bar\n\
                   \u{20} 00000000ff000000-00000000ff000fff (prio 0, romd): system.flash0\n";
        let expected = [
            Piece { gpa: 0xc0000, offset: 0xc0000, region: "pc.ram".into() },
            Piece { gpa: 0xff00_0000, offset: 0, region: "system.flash0".into() },
        ];
        assert_eq!(parse_pieces(map), expected);
    }

    #[test]
    fn a_region_that_could_be_two_blocks_is_neither() {
        let blocks =
            [block("0000:00:01.0/vga.vram"), block("0000:00:02.0/vga.vram"), block("mem"), block("x/pc.ram")];
        assert_eq!(block_of(&piece("vga.vram", 0), &blocks), None);
        assert_eq!(block_of(&piece("mem", 0), &blocks), Some(&blocks[2]));
        assert_eq!(block_of(&piece("pc.ram", 0), &blocks), Some(&blocks[3]));
        assert_eq!(block_of(&piece("am", 0), &blocks), None, "a piece of a name is no name");
        assert_eq!(block_of(&piece("mem", 0x1000), &blocks), None, "beyond the block's end");
    }

    #[test]
    fn an_address_counts_for_the_region_that_was_asked_for_only() {
        let answer = "Host virtual address for 0xfffc0000 (pc.bios) is 0x7f66a0400000\r\n";
        assert_eq!(parse_hva(answer, "pc.bios"), Some(0x7f66_a040_0000));
        assert_eq!(parse_hva(answer, "pc.ram"), None);
        assert_eq!(parse_hva("No memory is mapped at address 0x1", "pc.ram"), None);
    }
}
