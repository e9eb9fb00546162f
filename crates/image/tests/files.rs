//! The simulator's files and the host's are the same to an image.

mod support;

use proptest::prelude::*;
use romulus_image::{FileName, Files, HostFiles, MemFiles};
use romulus_types::BlockId;
use support::{TestKeeper, in_folder, vm};

const FILE: FileName = FileName::Ram(BlockId(2));
const BYTES: u64 = 5 * 4096;

#[derive(Clone, Debug)]
enum Op {
    Write { offset: u64, length: usize, byte: u8 },
    Punch { first: u64, pages: u64 },
    Cut { bytes: u64 },
    Create { bytes: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..BYTES, 0..9000usize, 1..255u8).prop_map(|(offset, length, byte)| Op::Write { offset, length, byte }),
        3 => (0..4u64, 1..3u64).prop_map(|(first, pages)| Op::Punch { first, pages }),
        1 => (0..2 * BYTES).prop_map(|bytes| Op::Cut { bytes }),
        1 => (0..BYTES).prop_map(|bytes| Op::Create { bytes }),
    ]
}

fn run(files: &mut impl Files, op: &Op) {
    match op {
        Op::Write { offset, length, byte } => files.write_at(FILE, *offset, &vec![*byte; *length]),
        Op::Punch { first, pages } => files.punch(FILE, first * 4096..(first + pages) * 4096),
        Op::Cut { bytes } => files.cut(FILE, *bytes),
        Op::Create { bytes } => files.create(FILE, *bytes),
    }
    .unwrap();
}

/// The whole file, and what of it is not zero as `next_data` leads to it.
fn contents(files: &mut impl Files) -> (Vec<u8>, Vec<u8>) {
    let bytes = files.open(FILE).unwrap().unwrap();
    let mut whole = vec![0; usize::try_from(bytes).unwrap()];
    files.read_at(FILE, 0, &mut whole).unwrap();
    assert!(
        files.read_at(FILE, bytes, &mut [0]).is_err(),
        "nothing is read past the end"
    );
    let mut through_data = vec![0; whole.len()];
    let mut from = 0;
    while let Some(range) = files.next_data(FILE, from).unwrap() {
        assert!(
            range.start >= from && range.end > range.start && range.end <= bytes,
            "{range:?}"
        );
        let (start, end) = (
            usize::try_from(range.start).unwrap(),
            usize::try_from(range.end).unwrap(),
        );
        files
            .read_at(FILE, range.start, &mut through_data[start..end])
            .unwrap();
        from = range.end;
    }
    (whole, through_data)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_in_memory_in_a_folder_and_at_a_keeper_hold_the_same_after_the_same_calls(ops in prop::collection::vec(op(), 1..12)) {
        let dir = tempfile::Builder::new().prefix("romulus-image-").tempdir().unwrap();
        let mut host = in_folder(dir.path());
        let mut kept = HostFiles::create(TestKeeper::default().shelf(1), &vm(), 1).unwrap();
        let mut mem = MemFiles::new();
        for files in [&mut host as &mut dyn Files, &mut kept, &mut mem] {
            prop_assert_eq!(files.open(FILE).unwrap(), None);
            files.create(FILE, BYTES).unwrap();
        }
        for op in &ops {
            run(&mut host, op);
            run(&mut kept, op);
            run(&mut mem, op);
            let (host, kept, mem) = (contents(&mut host), contents(&mut kept), contents(&mut mem));
            prop_assert!(host == mem, "{:?}", op);
            prop_assert!(kept == mem, "{:?}", op);
            prop_assert!(mem.0 == mem.1, "data outside the ranges of next_data");
        }
    }

    #[test]
    fn what_was_synced_survives_a_loss_of_power_and_the_rest_need_not(
        ops in prop::collection::vec(op(), 1..12),
        synced in 0..12usize,
    ) {
        let mut mem = MemFiles::with_power_loss();
        mem.create(FILE, BYTES).unwrap();
        let mut kept = contents(&mut mem);
        for (number, op) in ops.iter().enumerate() {
            run(&mut mem, op);
            if number <= synced || matches!(op, Op::Create { .. }) {
                mem.sync(FILE).unwrap();
                kept = contents(&mut mem);
            }
        }
        mem.lose_power(|| false);
        prop_assert!(contents(&mut mem) == kept);
    }
}

#[test]
fn nothing_is_done_to_a_file_that_is_not_there() {
    let mut mem = MemFiles::new();
    assert!(mem.write_at(FILE, 0, &[1]).is_err());
    assert!(mem.punch(FILE, 0..4096).is_err());
    assert!(mem.sync(FILE).is_err());
    assert!(mem.next_data(FILE, 0).is_err());
    assert!(mem.contents(FILE).is_none());
}
