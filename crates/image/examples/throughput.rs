//! How long a checkpoint takes on this machine: `cargo run --release -p romulus-image --example throughput [DIR]`.
//!
//! Times each phase of checkpoints of 800 pages into an image of 1 GiB, beside a plain copy of the same
//! pages in the same run, and opening the image again. DIR defaults to `/dev/shm`; a folder is made in it and removed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use romulus_image::{Expected, Image, Limits, device_state_digest};
use romulus_page_codec::{ImageDigest, Page, page_digest};
use romulus_types::{Digest, Epoch, PAGE_BYTES, PageIndex, RamBlock, RamLayout, Session, Term, VmId};

const IMAGE_PAGES: u64 = 1 << 18;
const CHECKPOINT_PAGES: u64 = 800;
const EPOCHS: u64 = 200;

fn page_of(page: &mut Page, index: u64, version: u64) {
    for (word, bytes) in page.chunks_exact_mut(64).enumerate() {
        bytes[..8].copy_from_slice(&(index ^ (version << 32) ^ word as u64 ^ 1 << 63).to_le_bytes());
    }
}

/// Scattered, and different in each epoch.
fn indexes(epoch: u64) -> impl Iterator<Item = PageIndex> {
    (0..CHECKPOINT_PAGES).map(move |n| PageIndex((n * 313 + epoch * 17) % IMAGE_PAGES))
}

fn row(name: &str, times: &mut [Duration], reference: Duration) {
    times.sort_unstable();
    let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    let ratio = p50.as_secs_f64() / reference.as_secs_f64();
    println!("{name:<28} p50 {p50:>10.1?}  p99 {p99:>10.1?}  {ratio:>6.2} × copying the pages");
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let parent = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "/dev/shm".into()));
    let dir = parent.join(format!("romulus-image-throughput-{}", std::process::id()));
    let vm = VmId::new("throughput")?;
    let layout = RamLayout::new(vec![RamBlock {
        name: "ram".into(),
        bytes: IMAGE_PAGES * 4096,
    }])?;
    let limits = Limits::default();
    let mut image = Image::create_in(&dir, &vm, layout, limits)?;
    let result = measure(&mut image);
    drop(image);
    let opened = result.and_then(|()| {
        let start = Instant::now();
        let image = Image::open_in(&dir, &vm, limits)?;
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "open and verify              {seconds:.2} s, {:.2} GB/s",
            4096.0 * 262_144.0 / seconds / 1e9
        );
        image.remove()?;
        Ok(())
    });
    std::fs::remove_dir_all(&dir)?;
    opened
}

fn measure(image: &mut Image<romulus_image::HostFiles>) -> Result<(), Box<dyn std::error::Error>> {
    let mut page = [0; PAGE_BYTES];
    let mut digest = ImageDigest::ZERO;
    image.begin_sync(Session(1))?;
    let start = Instant::now();
    for index in 0..IMAGE_PAGES {
        page_of(&mut page, index, 0);
        image.sync_page(PageIndex(index), &page)?;
        digest.replace(Digest(0), page_digest(PageIndex(index), &page));
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "copy 1 GiB page by page      {seconds:.2} s, {:.2} GB/s",
        4096.0 * 262_144.0 / seconds / 1e9
    );

    let state: Vec<u8> = (0..171_000u32).map(|i| i.to_le_bytes()[0]).collect();
    let (mut stage, mut commit, mut apply, mut all) = (vec![], vec![], vec![], vec![]);
    let mut copy = vec![];
    let mut pages: Vec<(PageIndex, Page)> = Vec::new();
    let mut target = vec![[0; PAGE_BYTES]; 800];
    for epoch in 1..=EPOCHS {
        pages.clear();
        let mut pages_digest = ImageDigest::ZERO;
        for index in indexes(epoch) {
            image.read_page(index, &mut page)?;
            let old = page_digest(index, &page);
            page_of(&mut page, index.0, epoch);
            let new = page_digest(index, &page);
            digest.replace(old, new);
            pages_digest.replace(Digest(0), new);
            pages.push((index, page));
        }
        let expected = Expected {
            session: Session(1),
            epoch: Epoch(epoch),
            term: Term(1),
            page_count: CHECKPOINT_PAGES,
            pages_digest: pages_digest.digest(),
            device_state_bytes: state.len() as u64,
            device_state_digest: device_state_digest(&state),
            image_digest: digest.digest(),
            first: epoch == 1,
        };
        let start = Instant::now();
        for (target, (_, page)) in target.iter_mut().zip(&pages) {
            *target = *page;
        }
        copy.push(start.elapsed());
        std::hint::black_box(&mut target);
        let start = Instant::now();
        image.begin(Session(1), Epoch(epoch))?;
        for (index, page) in &pages {
            image.stage_page(*index, page)?;
        }
        image.stage_device_state(&state)?;
        let staged = Instant::now();
        image.verify_and_commit(&expected)?;
        let committed = Instant::now();
        image.apply()?;
        stage.push(staged - start);
        commit.push(committed - staged);
        apply.push(committed.elapsed());
        all.push(start.elapsed());
    }
    copy.sort_unstable();
    let reference = copy[copy.len() / 2];
    row("copy 800 pages (reference)", &mut copy, reference);
    row("stage 800 pages + 171 KB", &mut stage, reference);
    row("verify and commit", &mut commit, reference);
    row("apply", &mut apply, reference);
    row("stage + commit + apply", &mut all, reference);
    Ok(())
}
