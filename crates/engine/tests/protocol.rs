//! PROTOCOL.md against the code: its tables are parsed and compared with what the codec does, and the bytes of every
//! frame and message are pinned. Whoever changes the wire changes the document, or this fails.

use std::collections::{BTreeMap, BTreeSet};
use sterna_engine::handoff::{Ownership, Step, TargetRecovery, at_source, at_target};
use sterna_engine::source::STREAMS_MAX;
use sterna_engine::units::PAGE_BYTES;
use sterna_engine::wire::batch::{self, BatchHeader, Content, Descriptor, FrameKind, encode_batch};
use sterna_engine::wire::control::{self, ControlHeader, decode_message, encode_message, state_header};
use sterna_engine::wire::message::*;
use sterna_engine::wire::{Message, VERSION_MAX, VERSION_MIN};

const DOCUMENT: &str = include_str!("../../../PROTOCOL.md");

/// Rows of the table whose header contains this cell, without markup.
fn table(header: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| {
        let inner = line.trim().trim_matches('|');
        inner.split('|').map(|cell| cell.trim().to_string()).collect::<Vec<_>>()
    };
    let mut lines = DOCUMENT.lines().peekable();
    loop {
        let line =
            lines.next().unwrap_or_else(|| panic!("PROTOCOL.md has no table with a column {header:?}"));
        let heads = line.starts_with('|') && lines.peek().is_some_and(|next| next.starts_with("|---"));
        if heads && cells(line).iter().any(|cell| cell == header) {
            break;
        }
    }
    lines.next();
    lines.take_while(|line| line.starts_with('|')).map(cells).collect()
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("{text:?} in PROTOCOL.md is no number"))
}

/// Every message with every field set: a field that is added does not compile until it is here, and then in the
/// document.
fn samples() -> Vec<(&'static str, Message, &'static str)> {
    let text = || Text { text: "why".into() };
    let (id, generation) = (vec![0xab; 2], 7);
    vec![
        (
            "Hello",
            Message::Hello(Hello { version_min: 1, version_max: 2, id: id.clone(), software: "s".into() }),
            GOLDEN[0],
        ),
        ("Welcome", Message::Welcome(Welcome { version: 1, software: "s".into() }), GOLDEN[1]),
        ("Offer", Message::Offer(offer()), GOLDEN[2]),
        (
            "Accepted",
            Message::Accepted(Accepted {
                prepare_us: 300,
                postcopy: true,
                postcopy_refusal: "no".into(),
                eager: vec![1, 4],
                room: 7,
                head_room: -300,
            }),
            GOLDEN[3],
        ),
        ("Refused", Message::Refused(Refused { reasons: vec![reason()] }), GOLDEN[4]),
        ("Barrier", Message::Barrier(Barrier { round: 3, stream: 1 }), GOLDEN[5]),
        (
            "StateEnd",
            Message::StateEnd(StateEnd {
                bytes: 9,
                last_round: 3,
                digests: vec![digest()],
                paused: true,
                postcopy: true,
            }),
            GOLDEN[6],
        ),
        ("Loaded", Message::Loaded(Loaded { load_us: 5, blocks_verified: 2 }), GOLDEN[7]),
        ("Release", Message::Release(Release { generation }), GOLDEN[8]),
        ("Committed", Message::Committed(Committed { generation, record_us: 8, resume_us: 9 }), GOLDEN[9]),
        ("NotCommitted", Message::NotCommitted(text()), GOLDEN[10]),
        ("Abort", Message::Abort(text()), GOLDEN[11]),
        (
            "Query",
            Message::Query(Query { id: id.clone(), vm: "db".into(), generation, by_target: true }),
            GOLDEN[12],
        ),
        ("Answer", Message::Answer(Answer { owner: 2 }), GOLDEN[13]),
        ("Stream", Message::Stream(Stream { id: id.clone(), index: 1, purpose: 2 }), GOLDEN[14]),
        ("Check", Message::Check(offer()), GOLDEN[15]),
        (
            "Filled",
            Message::Filled(Filled { generation, sums: vec![digest()], faults: Some(faults()) }),
            GOLDEN[16],
        ),
        ("Reattach", Message::Reattach(Reattach { id, vm: "db".into(), generation, streams: 2 }), GOLDEN[17]),
        ("Reattached", Message::Reattached(Reattached { pages: 300 }), GOLDEN[18]),
    ]
    .into_iter()
    .chain(of_memory())
    .collect()
}

/// Those of templates and of pages in common.
fn of_memory() -> Vec<(&'static str, Message, &'static str)> {
    vec![
        (
            "Template",
            Message::Template(Template { name: "web".into(), manifest: vec![0x7b, 0x7d] }),
            GOLDEN[19],
        ),
        (
            "TemplateState",
            Message::TemplateState(TemplateState { bytes: 300, complete: true, refusal: "no".into() }),
            GOLDEN[20],
        ),
        (
            "Common",
            Message::Common(Common { store: vec![0xab; 2], runs: vec![1; 16], pending: true }),
            GOLDEN[21],
        ),
        ("Mapped", Message::Mapped(Mapped { runs: 300 }), GOLDEN[22]),
        ("Store", Message::Store(Store { id: vec![0xab; 2], pages: 300 }), GOLDEN[23]),
        ("StoreState", Message::StoreState(Text { text: "why".into() }), GOLDEN[24]),
        ("Memory", Message::Memory(Memory { rss: 300, pss: 200, shared: 100, own: 5 }), GOLDEN[25]),
    ]
}

fn offer() -> Offer {
    Offer {
        vm: "db".into(),
        generation: 7,
        argv: vec!["qemu".into(), "-S".into()],
        machine: "q35".into(),
        cpu: "max".into(),
        blocks: vec![block()],
        fingerprint: vec!["f".into()],
        streams: 4,
        verify: true,
        qemu: "10.0".into(),
        images: vec![image()],
        clear_pages: true,
        balloon: 5,
        postcopy: true,
        template: "ab".into(),
        common: true,
        expected_bytes: 300,
        account: true,
    }
}

fn faults() -> Faults {
    Faults { count: 1, mean_us: 2, p50_us: 3, p99_us: 4, max_us: 5, vcpu_blocked_us: vec![6, 300] }
}

fn image() -> Image {
    Image { path: "/d".into(), mark: 300, held: true, digest: vec![0xef; 2] }
}

fn block() -> Block {
    Block { name: "ram".into(), bytes: 4096, travels: true }
}

fn reason() -> Reason {
    Reason { code: "c".into(), text: "t".into() }
}

fn digest() -> BlockDigest {
    BlockDigest { block: 1, digest: vec![0xcd; 2] }
}

/// Whole frames, header included, as version 1 has them.
const GOLDEN: [&str; 26] = [
    "0d000000010000000a0b080110021a02abab220173",
    "070000000100000012050801120173",
    "58000000010000001a560a02646210071a0471656d751a022d5322037133352a036d6178320a0a0372616d10\
     802018013a016640044801520431302e305a0d0a022f6410ac0218012202efef6001680570017a0261628001018801ac02900101",
    "1400000001000000221208ac0210011a026e6f22020104280730d704",
    "0a000000010000002a080a060a0163120174",
    "0600000001000000320408031001",
    "12000000010000003a10080910031a0608011202cdcd20012801",
    "0600000001000000420408051002",
    "04000000010000004a020807",
    "08000000010000005206080710081809",
    "07000000010000005a050a03776879",
    "070000000100000062050a03776879",
    "0e000000010000006a0c0a02abab1202646218072001",
    "040000000100000072020802",
    "0a000000010000007a080a02abab10011802",
    "59000000010000008201560a02646210071a0471656d751a022d5322037133352a036d6178320a0a0372616d\
     10802018013a016640044801520431302e305a0d0a022f6410ac0218012202efef6001680570017a0261628001018801ac02900101",
    "1e000000010000008a011b0807120608011202cdcd1a0f08011002180320042805320306ac02",
    "0f0000000100000092010c0a02abab1202646218072002",
    "06000000010000009a010308ac02",
    "0c00000001000000a201090a0377656212027b7d",
    "0c00000001000000aa010908ac0210011a026e6f",
    "1b00000001000000b201180a02abab1210010101010101010101010101010101011801",
    "0600000001000000ba010308ac02",
    "0a00000001000000c201070a02abab10ac02",
    "0800000001000000ca01050a03776879",
    "0d00000001000000d2010a08ac0210c80118642005",
];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Field numbers and wire types of a protobuf message, in order; the bytes of those that have a length.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (field, kind) = (key >> 3, key & 7);
        let body = match kind {
            0 => {
                varint(&mut bytes);
                Vec::new()
            }
            2 => {
                let length = varint(&mut bytes) as usize;
                let (body, rest) = bytes.split_at(length);
                bytes = rest;
                body.to_vec()
            }
            other => panic!("wire type {other} is not used by this protocol"),
        };
        found.push((field, kind, body));
    }
    found
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let (first, rest) = bytes.split_first().expect("a varint ends");
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        shift += 7;
        if first & 0x80 == 0 {
            return value;
        }
    }
}

#[test]
fn the_bytes_of_every_message_are_pinned() {
    let mut changed = Vec::new();
    for (name, message, golden) in samples() {
        let frame = encode_message(&message).unwrap();
        if hex(&frame) != golden {
            changed.push(format!("    \"{}\", // {name}", hex(&frame)));
        }
        assert_eq!(decode_message(&frame[control::HEADER_BYTES..]).unwrap(), message, "{name}");
    }
    assert!(changed.is_empty(), "the wire has changed: a new version?\n{}", changed.join("\n"));
}

#[test]
fn the_message_table_is_the_code() {
    let documented = table("from").into_iter().map(|row| (row[1].clone(), number(&row[0])));
    let coded = samples().into_iter().map(|(name, message, _)| {
        let frame = encode_message(&message).unwrap();
        let kinds = fields(&frame[control::HEADER_BYTES..]);
        assert_eq!(kinds.len(), 1, "{name}");
        (name.to_string(), kinds[0].0)
    });
    assert_eq!(documented.collect::<BTreeMap<_, _>>(), coded.collect::<BTreeMap<_, _>>());
}

#[test]
fn the_field_table_is_the_code() {
    let mut documented: BTreeMap<String, BTreeSet<(u64, u64)>> = BTreeMap::new();
    for row in table("type") {
        let wire_type = match row[3].as_str() {
            "uint32" | "uint64" | "sint64" | "bool" => 0,
            _ => 2,
        };
        assert!(
            documented.entry(row[0].clone()).or_default().insert((number(&row[1]), wire_type)),
            "{row:?}"
        );
    }
    let mut coded: BTreeMap<String, BTreeSet<(u64, u64)>> = BTreeMap::new();
    for (name, message, _) in samples().into_iter().filter(|(name, ..)| *name != "Check") {
        let frame = encode_message(&message).unwrap();
        let body = fields(&frame[control::HEADER_BYTES..]).remove(0).2;
        let inner = fields(&body);
        let nested = match name {
            "Offer" => &[("Block", 6), ("Image", 11)][..],
            "Refused" => &[("Reason", 1)],
            "StateEnd" => &[("BlockDigest", 3)],
            "Filled" => &[("BlockDigest", 2), ("Faults", 3)],
            _ => &[],
        };
        for (nested, at) in nested {
            let body = &inner.iter().find(|(field, ..)| field == at).expect("it is set").2;
            coded.insert(
                (*nested).into(),
                fields(body).into_iter().map(|(field, kind, _)| (field, kind)).collect(),
            );
        }
        coded.insert(name.into(), inner.into_iter().map(|(field, kind, _)| (field, kind)).collect());
    }
    assert_eq!(documented, coded);
}

#[test]
fn the_field_names_are_the_code() {
    let source = include_str!("../src/wire/message.rs");
    for row in table("type") {
        let tag = format!("tag = \"{}\")]\n    pub {}: ", row[1], row[2]);
        let name =
            if matches!(row[0].as_str(), "NotCommitted" | "Abort" | "StoreState") { "Text" } else { &row[0] };
        let body = source.split(&format!("pub struct {name} {{")).nth(1).expect("the struct exists");
        let body = &body[..body.find("\n}").expect("it ends")];
        assert!(body.contains(&tag), "{row:?} is not in the code");
    }
}

/// A header as the document describes it: offset and length of each field.
fn layout(header: &str) -> Vec<(u64, u64)> {
    table(header).iter().map(|row| (number(&row[0]), number(&row[1]))).collect()
}

fn size_of(layout: &[(u64, u64)]) -> usize {
    let mut end = 0;
    for (offset, bytes) in layout {
        assert_eq!(*offset, end, "a header has no gaps");
        end += bytes;
    }
    end as usize
}

#[test]
fn the_header_tables_are_the_code() {
    assert_eq!(layout("control header"), [(0, 4), (4, 1), (5, 3)]);
    assert_eq!(size_of(&layout("control header")), control::HEADER_BYTES);
    let state = state_header(&[0; 0x1234]);
    assert_eq!(hex(&state), "3412000002000000");
    assert_eq!(layout("batch header"), [(0, 1), (1, 1), (2, 2), (4, 2), (6, 2), (8, 4), (12, 4)]);
    assert_eq!(size_of(&layout("batch header")), batch::HEADER_BYTES);
    assert_eq!(layout("descriptor"), [(0, 4), (4, 2), (6, 1), (7, 1)]);
    assert_eq!(size_of(&layout("descriptor")), batch::DESCRIPTOR_BYTES);
}

#[test]
fn the_bytes_of_every_page_frame_are_pinned() {
    assert_eq!(hex(&BatchHeader::round_end(0x01020304).encode()), "02000000000000000000000004030201");
    let runs = [
        Descriptor { first: 0x11223344, pages: 2, content: Content::Bytes },
        Descriptor { first: 0x11223348, pages: 0x0506, content: Content::Discard },
    ];
    let mut frame = Vec::new();
    encode_batch(0x0a0b, 3, &runs, &mut frame);
    assert_eq!(hex(&frame[..16]), "01000b0a020000000020000003000000");
    assert_eq!(hex(&frame[16..]), "44332211020001004833221106050200");
}

#[test]
fn the_kinds_are_the_code() {
    let kinds = |header| table(header).into_iter().map(|row| (number(&row[0]) as u8, row[1].clone()));
    let raw = |kind| [0, 0, 0, 0, kind, 0, 0, 0];
    let coded = (0..=u8::MAX).filter_map(|kind| {
        ControlHeader::decode(&raw(kind)).ok().map(|header| (kind, format!("{:?}", header.kind)))
    });
    assert_eq!(kinds("control kind").collect::<Vec<_>>(), coded.collect::<Vec<_>>());
    let coded = (0..=u8::MAX).filter_map(|kind| {
        let descriptors = u8::from(kind != 2);
        let raw = [kind, 0, 0, 0, descriptors, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        BatchHeader::decode(&raw).ok().map(|header| (kind, format!("{:?}", header.kind)))
    });
    assert_eq!(kinds("batch kind").collect::<Vec<_>>(), coded.collect::<Vec<_>>());
    let coded = (0..=u8::MAX).filter_map(|encoding| {
        let raw = [1, encoding, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0];
        BatchHeader::decode(&raw).ok().map(|header| (encoding, format!("{:?}", header.encoding)))
    });
    assert_eq!(kinds("encoding").collect::<Vec<_>>(), coded.collect::<Vec<_>>());
    let coded = (0..=u8::MAX).filter_map(|content| {
        let payload_bytes = if content == 1 { 4096 } else { 0 };
        let header = BatchHeader {
            kind: FrameKind::Batch,
            encoding: batch::Encoding::Raw,
            block: 0,
            descriptors: 1,
            payload_bytes,
            round: 1,
        };
        let mut runs = Vec::new();
        let layout = batch::Layout::new([4096]);
        layout.decode_runs(&header, &[0, 0, 0, 0, 1, 0, content, 0], &mut runs).ok()?;
        Some((content, format!("{:?}", runs[0].content)))
    });
    assert_eq!(kinds("content").collect::<Vec<_>>(), coded.collect::<Vec<_>>());
    let coded =
        (1..=6).map(|owner| (owner, format!("{:?}", Ownership::from(Answer { owner: owner.into() }))));
    assert_eq!(kinds("owner in an Answer").collect::<Vec<_>>(), coded.collect::<Vec<_>>());
    assert_eq!(Ownership::from(Answer { owner: 7 }), Ownership::Unknown);
    let coded = (0..3).map(|number| (number as u8, format!("{:?}", Purpose::from_number(number).unwrap())));
    assert_eq!(kinds("purpose of a Stream").collect::<Vec<_>>(), coded.collect::<Vec<_>>());
    assert_eq!(Purpose::from_number(3), None);
}

#[test]
fn the_limits_are_the_code() {
    let documented = table("limit").into_iter().map(|row| (row[0].clone(), number(&row[1])));
    let coded = [
        ("VERSION_MIN", VERSION_MIN.into()),
        ("VERSION_MAX", VERSION_MAX.into()),
        ("PAGE_BYTES", PAGE_BYTES),
        ("control HEADER_BYTES", control::HEADER_BYTES as u64),
        ("MESSAGE_BYTES_MAX", control::MESSAGE_BYTES_MAX as u64),
        ("STATE_PIECE_BYTES_MAX", control::STATE_PIECE_BYTES_MAX as u64),
        ("STATE_BYTES_MAX", control::STATE_BYTES_MAX),
        ("batch HEADER_BYTES", batch::HEADER_BYTES as u64),
        ("DESCRIPTOR_BYTES", batch::DESCRIPTOR_BYTES as u64),
        ("PAYLOAD_BYTES_MAX", batch::PAYLOAD_BYTES_MAX as u64),
        ("DESCRIPTORS_MAX", batch::DESCRIPTORS_MAX as u64),
        ("BLOCKS_MAX", batch::BLOCKS_MAX as u64),
        ("STREAMS_MAX", STREAMS_MAX.into()),
    ];
    let coded = coded.map(|(name, value): (&str, u64)| (name.to_string(), value));
    assert_eq!(documented.collect::<BTreeMap<_, _>>(), coded.into_iter().collect::<BTreeMap<_, _>>());
}

#[test]
fn the_deadlines_are_the_code() {
    let mut coded = BTreeMap::new();
    for (end, text) in
        [("source", include_str!("../src/source.rs")), ("target", include_str!("../src/target.rs"))]
    {
        for line in text.lines().filter(|line| line.contains(": Duration = Duration::from_secs(")) {
            let name = line.split([' ', ':']).nth(1).expect("a constant has a name");
            let seconds = line.split(['(', ')']).nth(1).expect("it has a value");
            coded.insert((name.to_string(), end.to_string()), number(seconds));
        }
    }
    let documented =
        table("deadline").into_iter().map(|row| ((row[0].clone(), row[1].clone()), number(&row[2])));
    assert_eq!(documented.collect::<BTreeMap<_, _>>(), coded);
}

#[test]
fn the_recovery_table_is_the_code() {
    for row in table("the agent") {
        let step = Step::from_word(&row[0]).expect("a step's word");
        assert_eq!(format!("{:?}", step.role()).to_lowercase(), row[1]);
        let nothing = match row[1].as_str() {
            "source" => format!("{:?}", at_source(step)) == "Nothing",
            _ => at_target(step) == TargetRecovery::Nothing,
        };
        assert_eq!(nothing, row[2].starts_with("nothing"), "{row:?}");
    }
    assert_eq!(table("the agent").len(), 9);
}
