//! Page streams: headers and descriptors against an arbitrary layout. What is accepted lies within its block, in order,
//! adds up to the payload, and encodes to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna_engine::wire::patch;
use sterna_engine::wire::batch::{
    BatchHeader, DESCRIPTOR_BYTES, DESCRIPTORS_MAX, Encoding, FrameKind, HEADER_BYTES, Layout, PAYLOAD_BYTES_MAX,
    encode_batch, encode_packed_batch,
};

/// Bytes of the input that make the layout: four blocks' pages in 24 bits each.
const LAYOUT_BYTES: usize = 12;

fuzz_target!(|data: &[u8]| {
    let Some((layout, data)) = data.split_first_chunk::<LAYOUT_BYTES>() else { return };
    let pages = layout.chunks_exact(3).map(|raw| u64::from(u32::from_le_bytes([raw[0], raw[1], raw[2], 0])));
    let pages = pages.collect::<Vec<_>>();
    let layout = Layout::new(pages.iter().map(|pages| pages << 12));
    let Some((raw, rest)) = data.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = BatchHeader::decode(raw) else { return };
    assert!(header.descriptors <= DESCRIPTORS_MAX && header.payload_bytes <= PAYLOAD_BYTES_MAX);
    assert_eq!(&header.encode(), raw, "a header has one form");
    let runs_bytes = (header.descriptors * DESCRIPTOR_BYTES).min(rest.len());
    let mut runs = Vec::new();
    if layout.decode_runs(&header, &rest[..runs_bytes], &mut runs).is_err() || header.kind != FrameKind::Batch
    {
        return;
    }
    let mut next = 0;
    for run in &runs {
        assert!(u64::from(run.first) >= next && run.pages > 0);
        next = u64::from(run.first) + u64::from(run.pages);
    }
    assert!(next <= pages[usize::from(header.block)]);
    let pages = runs.iter().map(|run| run.payload_bytes()).sum::<usize>();
    let mut again = Vec::new();
    match header.encoding {
        Encoding::Raw => {
            assert_eq!(pages, header.payload_bytes);
            encode_batch(header.block, header.round, &runs, &mut again);
        }
        packed => {
            assert!(header.payload_bytes < pages && pages <= PAYLOAD_BYTES_MAX);
            encode_packed_batch(header.block, header.round, &runs, (packed, header.payload_bytes), &mut again);
            // What follows is as good a payload as any: it changes nothing outside its pages.
            let _ = patch::decode(&rest[runs_bytes..], pages / 4096, |page, change| {
                assert!(page < pages / 4096 && change.offset + change.bytes.len() <= 4096);
            });
        }
    }
    assert_eq!(again, [raw.as_slice(), &rest[..runs_bytes]].concat(), "a batch has one form");
});
