//! What the shared memory promises: no page is lost, none is made up, whatever the bitmap holds.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use romulus_types::RamBlock;
use romulus_vmm_attach::memfd::sealed;

use super::*;

/// Pages of two regions; neither fills its last word of the bitmap.
const PAGES: [u64; 2] = [70, 33];
const ALL: u64 = 103;

struct Vmm {
    files: [File; 2],
    bitmap: SharedWords,
    memory: Memory,
}

/// Files of which the first is a memory fd and the second, when `mixed`, one that may become shorter.
fn vmm(mixed: bool) -> Vmm {
    let blocks = PAGES.iter().enumerate().map(|(number, pages)| RamBlock {
        name: format!("ram{number}"),
        bytes: pages * PAGE,
    });
    let layout = RamLayout::new(blocks.collect()).unwrap();
    // The second region lies at page 1 of its file.
    let first = sealed("test-ram", PAGES[0] * PAGE).unwrap();
    let second = if mixed {
        let file = tempfile::tempfile().unwrap();
        file.set_len((PAGES[1] + 1) * PAGE).unwrap();
        file.into()
    } else {
        sealed("test-ram", (PAGES[1] + 1) * PAGE).unwrap()
    };
    let bitmap = sealed("test-bitmap", 16).unwrap();
    let files = [&first, &second].map(|file| File::from(file.try_clone().unwrap()));
    let regions = [(first, 0), (second, PAGE)].map(|(file, offset)| RegionFile { file, offset });
    Vmm {
        files,
        bitmap: SharedWords::map(&bitmap, 2).unwrap(),
        memory: Memory::map(&layout, regions.into(), &bitmap).unwrap(),
    }
}

impl Vmm {
    fn write(&self, page: u64, value: u8) {
        let (file, at) = match page.checked_sub(PAGES[0]) {
            None => (&self.files[0], page),
            Some(page) => (&self.files[1], page + 1),
        };
        file.write_all_at(&[value; 4096], at * PAGE).unwrap();
        self.mark(page);
    }

    fn mark(&self, page: u64) {
        let word = &self.bitmap[usize::try_from(page / 64).unwrap()];
        word.fetch_or(1 << (page % 64), Ordering::SeqCst);
    }
}

proptest! {
    #[test]
    fn runs_are_the_set_bits(words in prop::collection::vec(
        prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), any::<u64>().prop_map(|w| w << 60 | w >> 60)], 0..6)
    ) {
        let bits = (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1);
        let found: Vec<(u64, u64)> = runs(&words).collect();
        prop_assert!(found.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0));
        let listed = found.iter().flat_map(|(first, count)| *first..first + count);
        prop_assert!(listed.eq(bits));
    }

    #[test]
    fn every_page_that_was_written_is_copied_until_it_counts(
        mixed: bool,
        rounds in prop::collection::vec((prop::collection::btree_set(0..ALL, 0..40), 1u64..50, any::<bool>()), 1..12),
    ) {
        let mut vmm = vmm(mixed);
        let mut owed = std::collections::BTreeMap::new();
        let mut checkpoint = Checkpoint::default();
        for (round, (pages, limit, counts)) in rounds.into_iter().enumerate() {
            let value = u8::try_from(round + 1).unwrap();
            for page in pages {
                vmm.write(page, value);
                owed.insert(page, value);
            }
            prop_assert_eq!(vmm.memory.harvest(), owed.len() as u64);
            vmm.memory.copy(limit, &mut checkpoint).unwrap();
            let expected: Vec<(u64, u8)> = owed
                .iter()
                .take(usize::try_from(limit).unwrap())
                .map(|(page, value)| (*page, *value))
                .collect();
            let copied: Vec<(u64, u8)> = checkpoint
                .page_contents()
                .map(|(page, content)| {
                    assert!(content.iter().all(|byte| *byte == content[0]));
                    (page.0, content[0])
                })
                .collect();
            prop_assert_eq!(&copied, &expected);
            if counts {
                vmm.memory.settle(&checkpoint.pages);
                for (page, _) in copied {
                    owed.remove(&page);
                }
            }
        }
    }
}

#[test]
fn bits_past_the_last_page_are_no_pages() {
    let mut vmm = vmm(false);
    vmm.bitmap[1].store(u64::MAX, Ordering::SeqCst);
    assert_eq!(vmm.memory.harvest(), ALL - 64);
    let mut checkpoint = Checkpoint::default();
    vmm.memory.copy(1000, &mut checkpoint).unwrap();
    assert_eq!(checkpoint.pages.last(), Some(&PageIndex(ALL - 1)));
    vmm.memory.settle(&checkpoint.pages);
    assert_eq!(vmm.memory.harvest(), 0);
}

#[test]
fn reading_crosses_regions_and_fills_no_hole() {
    let mut vmm = vmm(false);
    vmm.write(69, 1);
    vmm.write(71, 2);
    vmm.memory.forget();
    assert_eq!(vmm.memory.harvest(), 0);
    let mut all = vec![9; usize::try_from(ALL * PAGE).unwrap()];
    vmm.memory.read(PageIndex(0), &mut all).unwrap();
    let pages: Vec<u8> = all.as_chunks::<4096>().0.iter().map(|page| page[100]).collect();
    let expected: Vec<u8> = (0..ALL)
        .map(|page| match page {
            69 => 1,
            71 => 2,
            _ => 0,
        })
        .collect();
    assert_eq!(pages, expected);
    use std::os::unix::fs::MetadataExt;
    let blocks = vmm
        .files
        .iter()
        .map(|file| file.metadata().unwrap().blocks())
        .sum::<u64>();
    assert_eq!(blocks, 2 * PAGE / 512, "only what was written is there");
    assert!(vmm.memory.read(PageIndex(ALL), &mut [0; 4096]).is_err());
    assert!(vmm.memory.read(PageIndex(u64::MAX), &mut [0; 4096]).is_err());
}

#[test]
fn a_file_that_is_cut_off_is_an_error_and_not_our_death() {
    let mut vmm = vmm(true);
    vmm.write(100, 1);
    vmm.memory.harvest();
    vmm.files[1].set_len(PAGE).unwrap();
    let mut checkpoint = Checkpoint::default();
    assert!(vmm.memory.copy(10, &mut checkpoint).is_err());
    assert!(vmm.files[0].set_len(PAGE).is_err(), "what is mapped is sealed");
}
