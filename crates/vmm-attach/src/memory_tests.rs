use super::*;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

fn region(name: &str, gpa: u64, pages: u64) -> Region {
    Region {
        name: name.into(),
        gpa,
        bytes: pages * PAGE_BYTES,
        fd_offset: 0,
    }
}

/// Two regions; the second begins in the middle of a word of the bitmap.
fn two_regions() -> GuestRam {
    GuestRam::create(&[region("low", 0, 70), region("high", 1 << 32, 200)]).unwrap()
}

fn dirty(ram: &GuestRam) -> Vec<u64> {
    let words = usize::try_from(ram.bitmap().bytes() / 8).unwrap();
    let bits = (0..words).map(|word| (word, ram.bitmap().take(word)));
    bits.flat_map(|(word, bits)| {
        (0..64)
            .filter(move |bit| bits >> bit & 1 == 1)
            .map(move |bit| word as u64 * 64 + bit)
    })
    .collect()
}

#[test]
fn every_way_in_which_a_device_writes_is_in_the_bitmap() {
    let ram = two_regions();
    let memory = ram.memory();
    memory.write_slice(&[1; 3], GuestAddress(4095)).unwrap();
    memory.write_obj(7u64, GuestAddress(69 * 4096)).unwrap();
    memory
        .store(9u32, GuestAddress(1 << 32), Ordering::Release)
        .unwrap();
    let slice = memory
        .get_slice(GuestAddress((1 << 32) + 5 * 4096), 4096)
        .unwrap();
    slice.copy_from(&[5u8; 10]);
    let mut input: &[u8] = &[3; 4096];
    memory
        .read_exact_volatile_from(GuestAddress((1 << 32) + 199 * 4096), &mut input, 4096)
        .unwrap();
    assert_eq!(dirty(&ram), [0, 1, 69, 70, 75, 269]);
    assert_eq!(dirty(&ram), [0u64; 0], "taken once");
}

#[test]
fn reading_marks_nothing() {
    let ram = two_regions();
    let mut into = [0; 8192];
    ram.memory().read_slice(&mut into, GuestAddress(4000)).unwrap();
    assert_eq!(ram.bitmap().count(), 0);
}

#[test]
fn a_private_mapping_leaves_the_files_as_they_were() {
    let ram = two_regions();
    ram.memory().write_slice(b"before", GuestAddress(0)).unwrap();
    let files = ram.files().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    let trial = GuestRam::map(ram.regions(), files, true).unwrap();
    trial.memory().write_slice(b"trial!", GuestAddress(0)).unwrap();
    let mut there = [0; 6];
    ram.memory().read_slice(&mut there, GuestAddress(0)).unwrap();
    assert_eq!(&there, b"before");
}

#[test]
fn regions_that_make_no_sense_are_refused_by_name() {
    let refuse = |specs: &[Region]| GuestRam::create(specs).unwrap_err();
    assert!(matches!(refuse(&[]), MemoryError::Count { .. }));
    let odd = Region {
        gpa: 12,
        ..region("odd", 0, 1)
    };
    assert!(matches!(refuse(&[odd]), MemoryError::Alignment { .. }));
    assert!(matches!(
        refuse(&[region("empty", 0, 0)]),
        MemoryError::Alignment { .. }
    ));
    let huge = Region {
        bytes: u64::MAX - 4095,
        ..region("huge", 0, 1)
    };
    assert!(matches!(refuse(&[huge]), MemoryError::Count { .. }));
    let twice = [region("a", 0, 2), region("b", 4096, 1)];
    assert!(matches!(refuse(&twice), MemoryError::Overlap));
    let many: Vec<_> = (0..17).map(|n| region("r", n << 20, 1)).collect();
    assert!(matches!(refuse(&many), MemoryError::Count { .. }));
}

#[test]
fn a_file_that_is_too_short_is_refused() {
    let spec = region("ram", 0, 4);
    let short = sealed_memory("short", 3 * PAGE_BYTES).unwrap();
    let refused = GuestRam::map(std::slice::from_ref(&spec), vec![short], false);
    assert!(matches!(refused, Err(MemoryError::FileTooShort { .. })));
    let refused = GuestRam::map(std::slice::from_ref(&spec), vec![], false);
    assert!(matches!(refused, Err(MemoryError::Files { .. })));
}

proptest! {
    #[test]
    fn marks_are_those_of_a_plain_set_of_pages(writes in prop::collection::vec((0usize..210 * 4096, 0usize..20_000), 0..20)) {
        let ram = two_regions();
        let part = ram.bitmap().part(70, 200);
        let mut expected = std::collections::BTreeSet::new();
        for (offset, len) in writes {
            part.mark_dirty(offset, len);
            let pages = (offset / 4096)..(offset + len).div_ceil(4096);
            expected.extend(pages.filter(|page| len > 0 && *page < 200).map(|page| page as u64 + 70));
        }
        prop_assert_eq!(dirty(&ram), expected.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn merging_puts_each_bit_at_its_page(first in 0u64..270, bits in prop::collection::vec(any::<u64>(), 1..4)) {
        let ram = two_regions();
        ram.bitmap().merge(first, &bits);
        let set = |n: u64| bits[usize::try_from(n / 64).unwrap()] >> (n % 64) & 1 == 1;
        let expected: Vec<u64> = (0..bits.len() as u64 * 64).filter(|n| set(*n)).map(|n| first + n).filter(|page| *page < 270).collect();
        prop_assert_eq!(dirty(&ram), expected);
    }
}
