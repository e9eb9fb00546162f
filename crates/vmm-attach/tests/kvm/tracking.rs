//! Dirty tracking against a full compare of guest memory: what a sidecar would have is what the guest has.

use std::time::Duration;

use romulus_vmm_attach::kvm::{HotPageRule, KvmParts, Tracking};
use romulus_vmm_attach::memory::GuestRam;
use romulus_vmm_attach::proto::PAGE_BYTES;
use romulus_vmm_attach::server::Machine;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{Guest, HIGH, SPIN, WORK};

/// What a sidecar has: a copy of all regions, one behind the other.
struct Copy {
    bytes: Vec<u8>,
}

fn place(ram: &GuestRam, page: u64) -> GuestAddress {
    let mut first = 0;
    for region in ram.regions() {
        let pages = region.bytes / PAGE_BYTES;
        if page < first + pages {
            return GuestAddress(region.gpa + (page - first) * PAGE_BYTES);
        }
        first += pages;
    }
    panic!("page {page} is outside of guest memory");
}

pub fn whole(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = Vec::new();
    for region in ram.regions() {
        let start = bytes.len();
        bytes.resize(start + usize::try_from(region.bytes).unwrap(), 0);
        ram.memory()
            .read_slice(&mut bytes[start..], GuestAddress(region.gpa))
            .unwrap();
    }
    bytes
}

impl Copy {
    fn of(guest: &Guest) -> Self {
        Self {
            bytes: whole(&guest.ram),
        }
    }

    /// Takes the bits and copies their pages. Returns the pages.
    fn update(&mut self, guest: &Guest) -> Vec<u64> {
        let mut pages = Vec::new();
        for word in 0..guest.ram.bitmap().bytes() / 8 {
            let mut bits = guest.ram.bitmap().take(usize::try_from(word).unwrap());
            while bits != 0 {
                pages.push(word * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
        for page in &pages {
            let start = usize::try_from(page * PAGE_BYTES).unwrap();
            let into = &mut self.bytes[start..start + 4096];
            guest
                .ram
                .memory()
                .read_slice(into, place(&guest.ram, *page))
                .unwrap();
        }
        pages
    }

    /// Pages that differ from the guest's.
    fn wrong(&self, guest: &Guest) -> Vec<usize> {
        let there = whole(&guest.ram);
        let pairs = there.chunks(4096).zip(self.bytes.chunks(4096)).enumerate();
        pairs.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect()
    }
}

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// Writes as a device does, anywhere that is not the guest's own code and tables.
fn device_writes(guest: &Guest, random: &mut Random) {
    for _ in 0..random.below(40) {
        let base = if random.below(2) == 0 { 0x40_0000 } else { HIGH };
        let address = GuestAddress(base + random.below(8 << 20));
        let bytes = vec![random.0.to_le_bytes()[7]; usize::try_from(random.below(9000)).unwrap()];
        guest.ram.memory().write_slice(&bytes, address).unwrap();
    }
}

fn nothing_is_missed(tracking: Tracking, vcpus: u16) {
    let guest = Guest::run(WORK, vcpus, tracking);
    let mut random = Random(7);
    guest.progress(u64::from(vcpus), 1);
    guest.machine.arm().unwrap();
    // As a sidecar does: everything is copied while the guest runs, and what it writes meanwhile is told of.
    let mut copy = Copy::of(&guest);
    for epoch in 0..25 {
        device_writes(&guest, &mut random);
        guest.progress(u64::from(vcpus), 1 + random.below(20_000));
        if epoch % 3 == 0 {
            guest.machine.harvest().unwrap();
            copy.update(&guest);
            device_writes(&guest, &mut random);
        }
        guest.machine.pause().unwrap();
        guest.machine.harvest().unwrap();
        let pages = copy.update(&guest);
        assert_eq!(copy.wrong(&guest), [0usize; 0], "epoch {epoch}: missed");
        assert!(!pages.is_empty());
        if epoch % 2 == 0 {
            // Pages are protected again when the state is saved, or else when the guest runs.
            crate::state::saved(&guest);
        }
        guest.machine.resume();
    }
    guest.machine.disarm();
    guest.progress(u64::from(vcpus), 1);
    // A second session begins afresh, on the same machine.
    guest.machine.arm().unwrap();
    let mut copy = Copy::of(&guest);
    guest.progress(u64::from(vcpus), 1000);
    guest.machine.pause().unwrap();
    guest.machine.harvest().unwrap();
    copy.update(&guest);
    assert_eq!(copy.wrong(&guest), [0usize; 0], "second session: missed");
}

#[test]
fn the_plain_log_with_the_shared_bitmap_misses_no_write() {
    nothing_is_missed(Tracking::Log, 1);
    nothing_is_missed(Tracking::Log, 2);
}

#[test]
fn manual_protection_with_hot_pages_misses_no_write() {
    nothing_is_missed(Tracking::default(), 1);
    let eager = HotPageRule {
        hot_after: 2,
        recheck_every: 3,
    };
    nothing_is_missed(Tracking::Manual(eager), 2);
}

#[test]
fn the_dirty_ring_misses_no_write() {
    nothing_is_missed(Tracking::Ring { entries: 65_536 }, 1);
    nothing_is_missed(Tracking::Ring { entries: 1024 }, 2);
}

/// The kernel gives up handing a ring back when a signal is pending, and a kick is one.
#[test]
fn a_kick_that_meets_a_vcpu_handing_back_its_full_ring_loses_no_page() {
    let guest = Guest::run(WORK, 1, Tracking::Ring { entries: 1024 });
    guest.machine.arm().unwrap();
    let mut copy = Copy::of(&guest);
    let mut random = Random(3);
    for epoch in 0..100 {
        // Long enough to fill the ring several times.
        guest.progress(1, 3000 + random.below(5000));
        guest.machine.pause().unwrap();
        guest.machine.harvest().unwrap();
        copy.update(&guest);
        assert_eq!(copy.wrong(&guest), [0usize; 0], "epoch {epoch}: missed");
        guest.machine.resume();
    }
}

#[test]
fn writes_of_the_vmm_are_told_of_only_because_of_the_shared_bitmap() {
    for tracking in [
        Tracking::Log,
        Tracking::default(),
        Tracking::Ring { entries: 1024 },
    ] {
        let guest = Guest::run(SPIN, 1, tracking);
        guest.machine.arm().unwrap();
        let mut copy = Copy::of(&guest);
        // The same memory through a mapping that has another bitmap: a VMM without the shared one.
        let files = guest
            .ram
            .files()
            .map(|file| file.try_clone_to_owned().unwrap())
            .collect();
        let unseen = GuestRam::map(guest.ram.regions(), files, false).unwrap();
        unseen
            .memory()
            .write_slice(b"unseen", GuestAddress(0x50_0000))
            .unwrap();
        guest
            .ram
            .memory()
            .write_slice(b"seen by all", GuestAddress(HIGH + 4090))
            .unwrap();
        guest.machine.pause().unwrap();
        guest.machine.harvest().unwrap();
        let pages = copy.update(&guest);
        let high = guest.ram.regions()[0].bytes / PAGE_BYTES;
        assert!(
            pages.contains(&high) && pages.contains(&(high + 1)),
            "{tracking:?}: {pages:?}"
        );
        assert_eq!(
            copy.wrong(&guest),
            [0x500],
            "{tracking:?}: the kernel told of a write that is not a vCPU's"
        );
    }
}

#[test]
fn a_guest_that_writes_nothing_has_no_dirty_page() {
    for tracking in [
        Tracking::Log,
        Tracking::default(),
        Tracking::Ring { entries: 1024 },
    ] {
        let guest = Guest::run(SPIN, 1, tracking);
        guest.machine.arm().unwrap();
        let mut copy = Copy::of(&guest);
        let mut epoch = || {
            guest.machine.pause().unwrap();
            guest.machine.harvest().unwrap();
            let pages = copy.update(&guest);
            guest.machine.resume();
            pages
        };
        // At first the processor notes in the page tables what was used, and the kernel sets the clock's page.
        assert!(
            (0..100).any(|_| epoch().is_empty()),
            "{tracking:?}: something is written all the time"
        );
    }
}

#[test]
fn hot_pages_are_told_of_in_every_epoch_and_cool_down_when_they_are_left_alone() {
    let rule = HotPageRule {
        hot_after: 3,
        recheck_every: 8,
    };
    let guest = Guest::run(WORK, 1, Tracking::Manual(rule));
    guest.machine.arm().unwrap();
    let mut copy = Copy::of(&guest);
    let counter = 0xa;
    let mut told = 0;
    for _ in 0..40 {
        guest.progress(1, 100);
        guest.machine.pause().unwrap();
        guest.machine.harvest().unwrap();
        told += usize::from(copy.update(&guest).contains(&counter));
        assert_eq!(copy.wrong(&guest), [0usize; 0]);
        guest.machine.resume();
    }
    assert_eq!(told, 40, "the counter's page is written in every epoch");
    // The guest does nothing from here on: its hot pages are tried again, found clean, and told of no more.
    guest.machine.pause().unwrap();
    let told: Vec<usize> = (0..30)
        .map(|_| {
            guest.machine.harvest().unwrap();
            copy.update(&guest).len()
        })
        .collect();
    assert!(told[1] > 0, "hot pages count as dirty: {told:?}");
    assert!(told[12..].iter().all(|pages| *pages == 0), "{told:?}");
    guest.machine.resume();
    guest.progress(1, 100);
    guest.machine.pause().unwrap();
    guest.machine.harvest().unwrap();
    copy.update(&guest);
    assert_eq!(
        copy.wrong(&guest),
        [0usize; 0],
        "a page that cooled down is protected"
    );
}

#[test]
fn pages_that_were_not_protected_before_the_guest_ran_are_told_of_again() {
    let mut random = Random(11);
    for tracking in [Tracking::default(), Tracking::Ring { entries: 65_536 }] {
        let (mut parts, outside) = Guest::parts(WORK, 1, tracking);
        let bitmap = parts.ram.bitmap().clone();
        parts.tracker.arm().unwrap();
        let mut epoch = |parts: &mut KvmParts<_>| {
            parts.vcpus.run();
            std::thread::sleep(Duration::from_millis(5 + random.below(10)));
            parts.vcpus.stop(Duration::from_secs(60)).unwrap();
            parts.tracker.harvest_still(&bitmap).unwrap();
        };
        epoch(&mut parts);
        let bytes = whole(&parts.ram);
        bitmap.clear();
        epoch(&mut parts);
        let guest = Guest::of(parts, outside);
        let mut copy = Copy { bytes };
        copy.update(&guest);
        assert_eq!(copy.wrong(&guest), [0usize; 0], "{tracking:?}: missed");
    }
}

#[test]
fn a_harvest_without_tracking_is_refused() {
    let guest = Guest::run(SPIN, 1, Tracking::default());
    assert!(guest.machine.harvest().is_err());
    guest.machine.arm().unwrap();
    guest.machine.harvest().unwrap();
    guest.machine.disarm();
    assert!(guest.machine.harvest().is_err());
}
