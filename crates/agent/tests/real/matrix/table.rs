//! What is to become of the VM in each cell, and the document that shows it to people.
//!
//! With `STERNA_WRITE_DOCS=1` a row writes what it saw into `docs/reliability.md`; otherwise it fails where they differ.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use crate::matrix::cell::{Fate, Phase};
use crate::matrix::fault::Fault;
use crate::support::count;

const BEGIN: &str = "<!-- the crash matrix writes from here -->\n";
const END: &str = "<!-- to here -->";

/// What must become of the VM. Before the hand-over it is the source's, after the commit the target's; in between the
/// target decides, whether the source lives or not.
pub(crate) fn expected(fault: Fault, phase: Phase) -> Fate {
    use Fate::{Dies, Moves, Stays};
    use Phase::{Committed, Load, Released, Running, Stop};
    match (fault, phase) {
        // A restarted agent ends a QEMU that waits and has no commit.
        (Fault::TargetAgent | Fault::BothAgents, Released) => Stays,
        // All of the VM is at the target by then: it does not need its old QEMU any more.
        (Fault::SourceQemu, Load | Released | Committed | Running) => Moves,
        (Fault::SourceQemu, _) => Dies,
        // It never ran there, and its death is proved.
        (Fault::TargetQemu, Released | Committed) => Stays,
        (Fault::TargetQemu, Running) => Dies,
        (Fault::SourceFreezes | Fault::TargetFreezes, _) => Moves,
        // The VM stands still: it is not kept so for a target that does not answer.
        (Fault::TargetFreezesLong, Stop | Load) => Stays,
        (Fault::TargetFreezesLong, _) => Moves,
        (_, Released | Committed | Running) => Moves,
        _ => Stays,
    }
}

/// The cells that are tried: all of them where nobody waits for the result, else those that take seconds.
pub(crate) fn chosen(fault: Fault) -> Vec<Phase> {
    let all = count(0, 1) == 1;
    Phase::ALL.into_iter().filter(|phase| all || is_quick(fault, *phase)).collect()
}

fn is_quick(fault: Fault, phase: Phase) -> bool {
    match fault {
        // A source whose VM runs waits half a minute for a target that takes no pages.
        Fault::Silence => phase.is_handed_over() || phase == Phase::Stop,
        // Each VM that dies is one to boot.
        Fault::SourceQemu => !matches!(phase, Phase::Setup | Phase::LaterRound),
        Fault::TargetFreezesLong => matches!(phase, Phase::Stop | Phase::Released),
        _ => true,
    }
}

/// Whether the document is to say what is seen.
fn writes() -> bool {
    std::env::var("STERNA_WRITE_DOCS").is_ok_and(|wanted| wanted == "1")
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reliability.md")
}

fn line(fault: Fault, cell: impl Fn(Phase) -> String) -> String {
    let cells: String = Phase::ALL.into_iter().map(|phase| format!(" {} |", cell(phase))).collect();
    format!("| {} |{cells}\n", fault.title())
}

/// The whole table, with the rows that the document has.
fn table(mut row: impl FnMut(Fault) -> String) -> String {
    let head: String = Phase::ALL.into_iter().map(|phase| format!(" {} |", phase.title())).collect();
    let rule = "---|".repeat(Phase::ALL.len() + 1);
    let rows: String = Fault::ALL.into_iter().map(&mut row).collect();
    format!("| |{head}\n|{rule}\n{rows}")
}

/// The document's table, before, inside and after the markers.
fn parts(document: &str) -> (&str, &str, &str) {
    let (before, rest) = document.split_once(BEGIN).expect("docs/reliability.md has the marker");
    let (inside, after) = rest.split_once(END).expect("docs/reliability.md has the second marker");
    (before, inside, after)
}

/// What a document says of a cell.
fn said(inside: &str, fault: Fault, phase: Phase) -> Option<String> {
    let row = inside.lines().find(|line| line.starts_with(&format!("| {} |", fault.title())))?;
    let at = Phase::ALL.iter().position(|other| *other == phase)?;
    row.split('|').nth(at + 2).map(|cell| cell.trim().to_owned())
}

/// Compares what a row saw with the document, or writes it there.
pub(crate) fn write_or_compare(fault: Fault, seen: &[(Phase, Fate)]) {
    let writes = writes();
    let mut file = File::options().read(true).write(writes).open(path()).unwrap();
    // Rows are tests of their own, in processes of their own.
    file.lock().unwrap();
    let mut document = String::new();
    file.read_to_string(&mut document).unwrap();
    let (before, inside, after) = parts(&document);
    let in_document = |fault, phase| said(inside, fault, phase).unwrap_or_else(|| "?".into());
    if !writes {
        for (phase, fate) in seen {
            let said = in_document(fault, *phase);
            assert_eq!(said, fate.word(), "docs/reliability.md: {}, {}", fault.title(), phase.title());
        }
        return;
    }
    let cell = |of: Fault, phase: Phase| {
        let found = seen.iter().find(|(at, _)| of == fault && *at == phase);
        found.map_or_else(|| in_document(of, phase), |(_, fate)| fate.word().into())
    };
    let inside = table(|of| line(of, |phase| cell(of, phase)));
    let text = format!("{before}{BEGIN}{inside}{END}{after}");
    file.set_len(0).unwrap();
    file.rewind().unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// What the runs that wait for nobody have not tried is in the document as well.
pub(crate) fn assert_document_has_all_rows() {
    if writes() {
        return;
    }
    let document = std::fs::read_to_string(path()).unwrap();
    let (_, inside, _) = parts(&document);
    assert_eq!(inside, table(|fault| line(fault, |phase| expected(fault, phase).word().into())));
}
