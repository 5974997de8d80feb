//! The demand connection: requests against an arbitrary layout. What is accepted lies within its block, is bounded, and has one form.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna_engine::wire::batch::Layout;
use sterna_engine::wire::request::{FAULT_PAGES_MAX, REQUEST_BYTES, Request};

/// Bytes of the input that make the layout: four blocks' pages in 24 bits each.
const LAYOUT_BYTES: usize = 12;

fuzz_target!(|data: &[u8]| {
    let Some((layout, data)) = data.split_first_chunk::<LAYOUT_BYTES>() else { return };
    let pages = layout.chunks_exact(3).map(|raw| u64::from(u32::from_le_bytes([raw[0], raw[1], raw[2], 0])));
    let sizes = pages.collect::<Vec<_>>();
    let layout = Layout::new(sizes.iter().map(|pages| pages << 12));
    for raw in data.as_chunks::<REQUEST_BYTES>().0 {
        let Ok(request) = Request::decode(raw) else { continue };
        let mut again = Vec::new();
        request.encode(&mut again);
        assert_eq!(again, raw, "a request has one form");
        if request.check(&layout).is_err() {
            continue;
        }
        match request {
            Request::Fault { block, first, pages } | Request::Missing { block, first, pages } => {
                assert!(pages > 0 && first + u64::from(pages) <= sizes[usize::from(block)]);
                assert!(pages <= FAULT_PAGES_MAX || !matches!(request, Request::Fault { .. }));
            }
            Request::Listed => {}
        }
    }
});
