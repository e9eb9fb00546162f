//! Prints how fast pages are encoded, decoded and digested, beside memcpy of the same pages in the same run.
//!
//! `cargo run --release -p romulus-page-codec --example speed`

use std::hint::black_box;
use std::time::Instant;

use romulus_page_codec::{Page, PreviousPages, Scratch, decode, encode, page_digest};
use romulus_types::{PAGE_BYTES, PageIndex};

const PAGES: usize = 4096;
const ROUNDS: usize = 8;

fn noise(seed: u64) -> Page {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
}

fn text(seed: u64) -> Page {
    let words = [
        &b"epoch "[..],
        b"checkpoint ",
        b"commit ",
        b"the ",
        b"of ",
        b"guest ",
    ];
    let stream: Vec<u8> = noise(seed)
        .iter()
        .flat_map(|n| words[usize::from(*n) % 6])
        .copied()
        .collect();
    stream[..PAGE_BYTES].try_into().expect("the words fill a page")
}

/// Gigabytes a second of the best of some rounds.
fn speed(mut run: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    (PAGES * PAGE_BYTES) as f64 / best / 1e9
}

fn report(name: &str, change: impl Fn(usize, &mut Page), base: impl Fn(u64) -> Page) {
    let previous: Vec<Page> = (0..PAGES).map(|n| base(n as u64)).collect();
    let mut pages = previous.clone();
    pages.iter_mut().enumerate().for_each(|(n, page)| change(n, page));
    let mut copy = previous.clone();
    let memcpy = speed(|| {
        copy.iter_mut().zip(&pages).for_each(|(to, from)| *to = *from);
        black_box(&copy);
    });

    let mut scratch = Scratch::new();
    let mut out = Vec::new();
    let mut encoded = Vec::new();
    let encoding = speed(|| {
        out.clear();
        encoded.clear();
        for (page, old) in pages.iter().zip(&previous) {
            let start = out.len();
            let kind = encode(page, Some(old), &mut scratch, &mut out);
            encoded.push((kind, start, out.len()));
        }
    });
    let mut page = [0; PAGE_BYTES];
    let decoding = speed(|| {
        for ((kind, start, end), old) in encoded.iter().zip(&previous) {
            decode(kind.number(), &out[*start..*end], Some(old), &mut page)
                .expect("what was encoded decodes");
            black_box(&page);
        }
    });
    println!(
        "{name:<28} {:<8} {:>5} B/page   encode {encoding:>5.2} GB/s (memcpy × {:.2})   decode {decoding:>5.2} GB/s",
        encoded[0].0.name(),
        out.len() / PAGES,
        encoding / memcpy,
    );
}

fn main() {
    let flip = |every: usize| {
        move |n: usize, page: &mut Page| {
            page.iter_mut()
                .skip(n % 7)
                .step_by(every)
                .for_each(|byte| *byte ^= 0x5a);
        }
    };
    report("zeros", |_, page| page.fill(0), noise);
    report("unchanged", |_, _| {}, noise);
    report("1 byte changed", flip(PAGE_BYTES), noise);
    report("8 bytes changed", flip(512), noise);
    report("64 bytes changed", flip(64), noise);
    report("1 byte of each word changed", flip(8), noise);
    report("64 bytes changed, text", flip(64), text);
    report("new text", |n, page| *page = text((n + 1) as u64 * 7919), text);
    report("new noise", |n, page| *page = noise((n + 1) as u64 * 7919), noise);

    let pages: Vec<Page> = (0..PAGES).map(|n| noise(n as u64)).collect();
    let digest = speed(|| {
        for (index, page) in pages.iter().enumerate() {
            black_box(page_digest(PageIndex(index as u64), page));
        }
    });
    let mut store = PreviousPages::new(64 << 20);
    let keep = speed(|| {
        for (index, page) in pages.iter().enumerate() {
            black_box(store.get(PageIndex(index as u64)));
            store.put(PageIndex(index as u64), page);
        }
    });
    println!("page_digest {digest:.2} GB/s; PreviousPages get + put {keep:.2} GB/s");
}
