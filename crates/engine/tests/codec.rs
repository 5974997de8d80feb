//! Every decoder against arbitrary and damaged bytes: what is accepted is in bounds and has one form, the rest is an
//! error. The fuzz targets do the same for longer.

use proptest::prelude::*;
use sterna_engine::wire::batch::{
    self, BatchHeader, Content, DESCRIPTOR_BYTES, DESCRIPTORS_MAX, Descriptor, Layout, PAYLOAD_BYTES_MAX,
    encode_batch,
};
use sterna_engine::wire::control::{self, ControlHeader, decode_message, encode_message};
use sterna_engine::wire::message::{Block, Offer, Query, Reason, Refused, StateEnd, Text};
use sterna_engine::wire::{Message, WireError};

fn any_message() -> impl Strategy<Value = Message> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    let block = (".{0,12}", any::<u64>(), any::<bool>());
    let block = block.prop_map(|(name, bytes, travels)| Block { name, bytes, travels });
    let offer =
        (".{0,20}", any::<u64>(), prop::collection::vec(".{0,20}", 0..6), prop::collection::vec(block, 0..6));
    prop_oneof![
        offer.prop_map(|(vm, generation, argv, blocks)| {
            Message::Offer(Offer { vm, generation, argv, blocks, ..Offer::default() })
        }),
        ".{0,60}".prop_map(|text| Message::Abort(Text { text })),
        (bytes(), any::<u64>(), any::<bool>()).prop_map(|(id, generation, by_target)| {
            Message::Query(Query { id, vm: "a".into(), generation, by_target })
        }),
        (any::<u64>(), any::<u32>()).prop_map(|(bytes, last_round)| Message::StateEnd(StateEnd {
            bytes,
            last_round,
            ..StateEnd::default()
        })),
        prop::collection::vec((".{0,9}", ".{0,30}"), 0..5).prop_map(|reasons| {
            let reason = |(code, text)| Reason { code, text };
            Message::Refused(Refused { reasons: reasons.into_iter().map(reason).collect() })
        }),
    ]
}

/// Runs in order, and the pages that their block must have for them.
fn any_runs() -> impl Strategy<Value = (Vec<Descriptor>, u64)> {
    let run = (0u32..300, 1u16..40, any::<bool>());
    prop::collection::vec(run, 1..6).prop_map(|gaps| {
        let mut next = 0;
        let runs = gaps.into_iter().map(|(gap, pages, discard)| {
            let first = next + gap;
            next = first + u32::from(pages);
            let content = if discard { Content::Discard } else { Content::Bytes };
            Descriptor { first, pages, content }
        });
        let runs = runs.collect::<Vec<_>>();
        (runs, next.into())
    })
}

fn decode_batch(layout: &Layout, frame: &[u8]) -> Result<(BatchHeader, Vec<Descriptor>), WireError> {
    let short = WireError::Short { what: "batch header" };
    let header = BatchHeader::decode(frame.first_chunk().ok_or(short)?)?;
    let mut runs = Vec::new();
    layout.decode_runs(&header, &frame[batch::HEADER_BYTES..], &mut runs)?;
    Ok((header, runs))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_come_back(message in any_message()) {
        let frame = encode_message(&message).unwrap();
        let header = ControlHeader::decode(frame.first_chunk().unwrap()).unwrap();
        prop_assert_eq!(header.bytes, frame.len() - control::HEADER_BYTES);
        prop_assert_eq!(decode_message(&frame[control::HEADER_BYTES..]), Ok(message));
    }

    #[test]
    fn a_damaged_message_is_an_error_or_another_message(message in any_message(), at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
        let mut frame = encode_message(&message).unwrap();
        let at = at.index(frame.len());
        frame[at] ^= 1u8 << bit;
        let _ = ControlHeader::decode(frame.first_chunk().unwrap());
        let body = &frame[control::HEADER_BYTES..];
        let _ = decode_message(body);
        let _ = decode_message(&body[..cut.index(body.len() + 1)]);
    }

    #[test]
    fn every_control_header_is_refused_or_has_one_form(raw in any::<[u8; control::HEADER_BYTES]>(), kind in 0u8..4) {
        for raw in [raw, [raw[0], raw[1], raw[2], 0, kind, 0, 0, 0]] {
            if let Ok(header) = ControlHeader::decode(&raw) {
                prop_assert!(header.bytes <= control::MESSAGE_BYTES_MAX.max(control::STATE_PIECE_BYTES_MAX));
                prop_assert_eq!(header.encode(), raw);
            }
        }
    }

    #[test]
    fn batches_come_back_and_fit_their_block_only((runs, pages) in any_runs(), block in 0u16..3, round in any::<u32>()) {
        let mut frame = Vec::new();
        encode_batch(block, round, &runs, &mut frame);
        let fits = Layout::new((0..3).map(|_| pages * 4096));
        let (header, back) = decode_batch(&fits, &frame).unwrap();
        prop_assert_eq!((header.block, header.round, back), (block, round, runs));
        prop_assert!(decode_batch(&Layout::new((0..3).map(|_| (pages - 1) * 4096)), &frame).is_err());
        prop_assert!(decode_batch(&fits, &frame[..frame.len() - 1]).is_err());
    }

    #[test]
    fn a_damaged_batch_stays_in_bounds((runs, pages) in any_runs(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut frame = Vec::new();
        encode_batch(0, 1, &runs, &mut frame);
        let at = at.index(frame.len());
        frame[at] ^= 1u8 << bit;
        if let Ok((header, runs)) = decode_batch(&Layout::new([pages * 4096, 4096]), &frame) {
            prop_assert!(header.descriptors <= DESCRIPTORS_MAX && header.payload_bytes <= PAYLOAD_BYTES_MAX);
            let limit = if header.block == 0 { pages } else { 1 };
            prop_assert!(runs.iter().all(|run| u64::from(run.first) + u64::from(run.pages) <= limit));
            let pages = runs.iter().map(|run| run.payload_bytes()).sum::<usize>();
            let mut again = Vec::new();
            match header.encoding {
                batch::Encoding::Raw => {
                    prop_assert_eq!(pages, header.payload_bytes);
                    encode_batch(header.block, header.round, &runs, &mut again);
                }
                packed => {
                    prop_assert!(pages > header.payload_bytes && pages <= PAYLOAD_BYTES_MAX);
                    let packed = (packed, header.payload_bytes);
                    batch::encode_packed_batch(header.block, header.round, &runs, packed, &mut again);
                }
            }
            prop_assert_eq!(again, frame);
        }
    }

    #[test]
    fn garbage_runs_are_refused_or_in_order(raw in prop::collection::vec(any::<u8>(), 0..DESCRIPTOR_BYTES * 4), payload_pages in 0usize..4, pages in 0u64..1 << 34) {
        let (descriptors, payload_bytes) = (raw.len() / DESCRIPTOR_BYTES, payload_pages * 4096);
        let header =
            BatchHeader { kind: batch::FrameKind::Batch, encoding: batch::Encoding::Raw, block: 0, descriptors, payload_bytes, round: 1 };
        let mut runs = Vec::new();
        if Layout::new([pages * 4096]).decode_runs(&header, &raw, &mut runs).is_ok() {
            prop_assert!(runs.windows(2).all(|two| two[0].first + u32::from(two[0].pages) <= two[1].first));
        }
    }
}
