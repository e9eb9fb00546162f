//! The tracker on memory of this very process: real protection, real writes.

use romulus_host_sys::create_here;

use super::*;

/// Whole pages of our own, on addresses that no allocator moves.
struct Memory {
    bytes: Vec<u8>,
    at: usize,
    pages: usize,
}

impl Memory {
    fn new(pages: usize) -> Self {
        let bytes = vec![7; (pages + 1) * PAGE_BYTES];
        let at = bytes.as_ptr().align_offset(PAGE_BYTES);
        Self { bytes, at, pages }
    }

    fn write(&mut self, page: usize, value: u8) {
        self.bytes[self.at + page * PAGE_BYTES + 5] = value;
    }

    fn placed(&self, name: &str) -> Placed {
        let bytes = (self.pages * PAGE_BYTES) as u64;
        Placed {
            name: name.to_owned(),
            start: (self.bytes.as_ptr() as usize + self.at) as u64,
            bytes,
            mapping_bytes: bytes,
            view: None,
            twins: Vec::new(),
        }
    }
}

fn armed(places: Vec<Placed>) -> Tracker {
    armed_for(false, places)
}

fn armed_for(kvm: bool, places: Vec<Placed>) -> Tracker {
    let fault = UserFault::enable(create_here().unwrap()).unwrap();
    let tracker = Tracker::register(std::process::id(), fault, 0, kvm, places).unwrap();
    for slice in tracker.slices(8 * PAGE) {
        tracker.protect(slice).unwrap();
    }
    tracker
}

fn copied(tracker: &mut Tracker) -> Vec<(u64, u8)> {
    let mut checkpoint = Checkpoint::default();
    tracker.copy(&mut checkpoint).unwrap();
    checkpoint
        .page_contents()
        .map(|(page, content)| (page.0, content[5]))
        .collect()
}

#[test]
fn pages_are_numbered_across_blocks_and_copied_as_they_are() {
    for kvm in [false, true] {
        numbered_and_copied(kvm);
    }
}

fn numbered_and_copied(kvm: bool) {
    let (mut first, mut second) = (Memory::new(20), Memory::new(10));
    let mut tracker = armed_for(kvm, vec![first.placed("first"), second.placed("second")]);
    assert_eq!(tracker.harvest().unwrap(), 0);
    first.write(19, 1);
    second.write(0, 2);
    second.write(9, 3);
    assert_eq!(tracker.harvest().unwrap(), 3);
    assert_eq!(copied(&mut tracker), [(19, 1), (20, 2), (29, 3)]);
    let mut pages = vec![0; 3 * PAGE_BYTES];
    tracker.read(PageIndex(18), &mut pages).unwrap();
    assert_eq!(
        [pages[5], pages[PAGE_BYTES + 5], pages[2 * PAGE_BYTES + 5]],
        [7, 1, 2]
    );
    assert!(tracker.read(PageIndex(29), &mut pages).is_err(), "past the end");
}

#[test]
fn what_an_aborted_checkpoint_had_harvested_is_in_the_next_one() {
    let mut memory = Memory::new(30);
    let mut tracker = armed(vec![memory.placed("ram")]);
    memory.write(3, 1);
    memory.write(4, 1);
    assert_eq!(tracker.harvest().unwrap(), 2);
    tracker.give_back();
    memory.write(4, 2);
    memory.write(20, 2);
    assert_eq!(tracker.harvest().unwrap(), 3);
    // And aborted again, without anything new.
    tracker.give_back();
    assert_eq!(tracker.harvest().unwrap(), 3);
    assert_eq!(copied(&mut tracker), [(3, 1), (4, 2), (20, 2)]);
    tracker.settle();
    // A failure that comes before the next harvest has nothing to give back.
    tracker.give_back();
    assert_eq!(tracker.harvest().unwrap(), 0);
}

#[test]
fn a_block_whose_pages_cannot_be_harvested_is_pending_as_a_whole() {
    let (mut good, bad) = (Memory::new(10), Memory::new(12));
    let mut tracker = armed(vec![good.placed("good"), bad.placed("bad")]);
    good.write(2, 1);
    let block = bad.placed("bad");
    tracker.fault.unregister(block.start, block.bytes).unwrap();
    assert!(tracker.harvest().is_err());
    tracker.fault.register(block.start, block.bytes).unwrap();
    tracker.protect((block.start, block.bytes)).unwrap();
    assert_eq!(
        tracker.harvest().unwrap(),
        13,
        "the good block's page and all of the bad one"
    );
}

#[test]
fn a_written_twin_is_an_error() {
    let (mut one, two) = (Memory::new(4), Memory::new(4));
    let (mut first, mut second) = (one.placed("a.rom"), two.placed("b.rom"));
    let twins = vec![(first.start, first.bytes), (second.start, second.bytes)];
    (first.twins, second.twins) = (twins.clone(), twins);
    let mut tracker = armed(vec![first, second]);
    assert_eq!(tracker.harvest().unwrap(), 0);
    one.write(1, 9);
    assert!(matches!(tracker.harvest(), Err(CaptureError::TwinWritten { .. })));
}

#[test]
fn what_is_too_much_for_one_go_is_in_the_next_ones() {
    let (mut first, mut second) = (Memory::new(20), Memory::new(10));
    let mut tracker = armed(vec![first.placed("first"), second.placed("second")]);
    for page in [3, 4, 5, 9] {
        first.write(page, 1);
    }
    second.write(2, 1);
    assert_eq!(tracker.harvest().unwrap(), 5);
    tracker.put_off_beyond(2);
    assert_eq!(copied(&mut tracker), [(3, 1), (4, 1)]);
    tracker.settle();
    first.write(4, 2);
    assert_eq!(tracker.harvest().unwrap(), 4);
    tracker.put_off_beyond(3);
    assert_eq!(copied(&mut tracker), [(4, 2), (5, 1), (9, 1)]);
    tracker.settle();
    assert_eq!(tracker.harvest().unwrap(), 1);
    tracker.put_off_beyond(3);
    assert_eq!(copied(&mut tracker), [(22, 1)]);
}
