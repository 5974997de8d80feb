//! Frames of a page stream: their heads written and read, their pages compressed and unpacked.

#![forbid(unsafe_code)]

#[path = "../../memory/benches/common/harness.rs"]
mod harness;

use std::hint::black_box;

use criterion::Throughput;
use harness::{Bench, noise, random};
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use sterna_engine::wire::batch::{
    BatchHeader, Content, DESCRIPTORS_MAX, Descriptor, HEADER_BYTES, Layout, PAYLOAD_BYTES_MAX, encode_batch,
};

fn main() {
    let mut criterion = harness::criterion();
    heads(&mut criterion);
    lz4(&mut criterion);
    criterion.final_summary();
}

/// One run, and as many as there may be: single pages, and discards between them.
fn heads(criterion: &mut Bench) {
    let run = |first, pages, content| Descriptor { first, pages, content };
    let alone = |page| run(page, 1, if page % 2 == 0 { Content::Bytes } else { Content::Discard });
    let scattered: Vec<Descriptor> = (0..DESCRIPTORS_MAX as u32).map(alone).collect();
    let mut group = criterion.benchmark_group("head");
    for (name, runs) in [("run", vec![run(0, 256, Content::Bytes)]), ("scattered", scattered)] {
        group.throughput(Throughput::Elements(runs.len() as u64));
        let mut frame = Vec::new();
        encode_batch(0, 1, &runs, &mut frame);
        let mut out = Vec::with_capacity(frame.len());
        group.bench_function(format!("encode/{name}"), |bencher| {
            bencher.iter(|| {
                out.clear();
                encode_batch(0, 1, black_box(&runs), &mut out);
            });
        });
        let layout = Layout::new([1 << 30]);
        let mut back = Vec::with_capacity(DESCRIPTORS_MAX);
        group.bench_function(format!("decode/{name}"), |bencher| {
            bencher.iter(|| {
                let (head, raw) = black_box(&frame).split_first_chunk::<HEADER_BYTES>().expect("a header");
                let header = BatchHeader::decode(head).expect("was encoded");
                layout.decode_runs(&header, raw, &mut back).expect("was encoded");
            });
        });
    }
}

/// A full batch of pages that shrink, and of pages that do not.
fn lz4(criterion: &mut Bench) {
    let mut group = criterion.benchmark_group("lz4");
    group.throughput(Throughput::Bytes(PAYLOAD_BYTES_MAX as u64));
    let mut packed = vec![0; get_maximum_output_size(PAYLOAD_BYTES_MAX)];
    for (name, pages) in [("words", words()), ("noise", noise(PAYLOAD_BYTES_MAX))] {
        group.bench_function(format!("compress/{name}"), |bencher| {
            bencher.iter(|| compress_into(black_box(&pages), &mut packed).expect("there is room"));
        });
        let bytes = compress_into(&pages, &mut packed).expect("there is room");
        let mut out = vec![0; PAYLOAD_BYTES_MAX];
        group.bench_function(format!("decompress/{name}"), |bencher| {
            bencher.iter(|| decompress_into(black_box(&packed[..bytes]), &mut out).expect("was compressed"));
        });
    }
}

/// What shrinks to less than half, in matches as short as those of text and program code.
fn words() -> Vec<u8> {
    let dictionary = noise(PAYLOAD_BYTES_MAX);
    let word = |number: u64| {
        let (at, bytes) = ((number >> 32) as usize % 2048, 4 + (number >> 8) as usize % 16);
        dictionary[at..at + bytes].to_vec()
    };
    random().flat_map(word).take(PAYLOAD_BYTES_MAX).collect()
}
