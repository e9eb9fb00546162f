//! Checkpoints of real guests are complete: what they add up to is the guest's memory, to the last page.

mod common;

use std::time::Duration;

use common::Guest;
use common::attach::{Q35, Q35_SHARED, goes_on, options, start, status};
use common::on_kvm::{on_kvm, rounds, wait_for_rounds};
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::source::QemuSource;
use romulus_hypervisor::source::{BarrierError, Checkpoint, GuestSource};
use romulus_testbed::firmware::Payload;
use romulus_types::{PAGE_BYTES, PageIndex};
use serde_json::json;

/// Not a test of its own: the guardian process of the tests below.
#[test]
fn helper_guardian() {
    common::attach::be_the_guardian_if_asked();
}

/// The backup's copy of a guest's memory.
struct Image(Vec<u8>);

impl Image {
    fn first_copy(source: &mut QemuSource) -> Self {
        let mut bytes = vec![0; usize::try_from(source.layout().bytes()).unwrap()];
        for (position, chunk) in bytes.chunks_mut(64 * PAGE_BYTES).enumerate() {
            source.read_pages(PageIndex(position as u64 * 64), chunk).unwrap();
        }
        Self(bytes)
    }

    fn apply(&mut self, checkpoint: &Checkpoint) {
        assert!(checkpoint.pages.is_sorted_by(|a, b| a < b), "pages ascend");
        for (page, content) in checkpoint.page_contents() {
            let at = usize::try_from(page.0).unwrap() * PAGE_BYTES;
            self.0[at..at + PAGE_BYTES].copy_from_slice(content);
        }
    }

    /// Compares a block with what QEMU itself writes out for a guest physical range.
    fn compare(&self, source: &QemuSource, other: &mut Qmp, block: &str, offset: u64, gpa: u64, bytes: u64) {
        let layout = source.layout();
        let name = |b: &&romulus_types::RamBlock| b.name.rsplit('/').next() == Some(block);
        let block = layout
            .blocks()
            .iter()
            .find(name)
            .unwrap_or_else(|| panic!("no block {block}"));
        let first = layout.first_page(layout.find(&block.name).unwrap()).0 * 4096 + offset;
        let file = tempfile::NamedTempFile::new().unwrap();
        let arguments = json!({ "val": gpa, "size": bytes, "filename": file.path().to_str().unwrap() });
        other.execute("pmemsave", arguments).unwrap();
        let truth = std::fs::read(file.path()).unwrap();
        let ours = &self.0[usize::try_from(first).unwrap()..][..truth.len()];
        let differ = truth
            .chunks(4096)
            .zip(ours.chunks(4096))
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(differ, 0, "pages of {} differ from QEMU's", block.name);
    }
}

/// (block, offset, guest physical address, bytes) to be compared.
type Ranges<'a> = &'a [(&'a str, u64, u64, u64)];

fn every_checkpoint_of_linux_is_complete(arguments: &[&str], workloads: &str, ranges: Ranges<'_>) {
    let (guest, mut other) = start(arguments, workloads);
    every_checkpoint_is_complete(&guest, &mut other, &|_| goes_on(&guest), ranges);
}

fn every_checkpoint_is_complete(
    guest: &Guest,
    other: &mut Qmp,
    goes_on: &dyn Fn(&mut Qmp),
    ranges: Ranges<'_>,
) {
    let folder = tempfile::tempdir().unwrap();
    let mut source = QemuSource::attach(options(guest, folder.path())).unwrap();
    source.bootstrap().unwrap();
    assert!(source.machine().check().is_ok());
    source.arm().unwrap();
    let mut image = Image::first_copy(&mut source);
    let mut checkpoint = Checkpoint::default();
    source.precopy(&mut checkpoint).unwrap();
    image.apply(&checkpoint);
    for round in 0..6 {
        for epoch in 0..8 {
            std::thread::sleep(Duration::from_millis(10));
            // A barrier that fails must lose nothing.
            let broken = epoch == 3;
            let mut barrier = || match broken {
                true => Err(BarrierError::new("the gate is gone".into())),
                false => Ok(()),
            };
            match source.capture(&mut barrier, false, &mut checkpoint) {
                Ok(report) => {
                    assert_eq!(report.dirty_pages, checkpoint.pages.len() as u64);
                    assert!(checkpoint.device_state.starts_with(b"QEVM"));
                    image.apply(&checkpoint);
                }
                Err(_) => assert!(broken),
            }
        }
        source.capture(&mut || Ok(()), true, &mut checkpoint).unwrap();
        image.apply(&checkpoint);
        assert_eq!(status(other), "paused");
        for (block, offset, gpa, bytes) in ranges {
            image.compare(&source, other, block, *offset, *gpa, *bytes);
        }
        let now = Image::first_copy(&mut source);
        assert!(
            now.0 == image.0,
            "round {round}: blocks outside of the compared ranges differ"
        );
        source.resume().unwrap();
        goes_on(other);
    }
    assert_eq!(source.poll_events(), [], "our own pauses are nobody's business");
    Box::new(source).detach().unwrap();
}

const MIB: u64 = 1 << 20;

#[test]
fn every_checkpoint_of_shared_memory_is_complete() {
    let ranges = [
        ("ram0", 0, 0, 640 << 10),
        ("ram0", MIB, MIB, 127 * MIB),
        ("pc.bios", 0, 0xfffc_0000, 0x4_0000),
    ];
    every_checkpoint_of_linux_is_complete(Q35_SHARED, "counter:50,dirty:800:25", &ranges);
}

#[test]
fn every_checkpoint_of_plain_memory_is_complete() {
    let ranges = [
        ("pc.ram", 0, 0, 640 << 10),
        ("pc.ram", MIB, MIB, 127 * MIB),
        ("pc.bios", 0, 0xfffc_0000, 0x4_0000),
    ];
    every_checkpoint_of_linux_is_complete(Q35, "counter:50,dirty:800:25", &ranges);
}

#[test]
fn every_checkpoint_of_the_default_machine_is_complete() {
    let ranges = [
        ("pc.ram", 0, 0, 640 << 10),
        ("pc.ram", MIB, MIB, 127 * MIB),
        ("pc.bios", 0, 0xfffc_0000, 0x4_0000),
        ("vga.vram", 0, 0xfd00_0000, 16 * MIB),
    ];
    every_checkpoint_of_linux_is_complete(
        &["-accel", "tcg", "-m", "128"],
        "counter:50,dirty:300:25",
        &ranges,
    );
}

/// Pages far from each other, pages beside each other, more than a harvest protects one by one.
#[test]
fn every_checkpoint_of_a_guest_under_kvm_is_complete() {
    let ranges = [
        ("pc.ram", 0, 0, 640 << 10),
        ("pc.ram", MIB, MIB, 127 * MIB),
        ("pc.bios", 0, 0xffff_0000, 0x1_0000),
    ];
    for (pages, stride) in [(50, 400), (500, 1), (1500, 15)] {
        let payload = Payload {
            pages,
            stride,
            reads: 5000,
        };
        let folder = tempfile::tempdir().unwrap();
        let (guest, mut other) = on_kvm(payload, folder.path());
        let counts_on = |other: &mut Qmp| {
            let before = rounds(other);
            wait_for_rounds(other, before + 2);
        };
        every_checkpoint_is_complete(&guest, &mut other, &counts_on, &ranges);
    }
}

#[test]
fn every_checkpoint_of_a_guest_with_two_vcpus_and_twin_roms_is_complete() {
    let more = [
        "-smp",
        "2",
        "-netdev",
        "user,id=n0",
        "-device",
        "e1000,netdev=n0",
        "-netdev",
        "user,id=n1",
    ];
    let arguments = [Q35, &more, &["-device", "e1000,netdev=n1"]].concat();
    let ranges = [("pc.ram", MIB, MIB, 127 * MIB)];
    every_checkpoint_of_linux_is_complete(&arguments, "counter:50,dirty:500:25", &ranges);
}

#[test]
fn a_checkpoint_over_its_limit_is_refused_by_name_and_the_guest_goes_on() {
    let (guest, _other) = start(Q35, "counter:50,dirty:300:10");
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(&guest, folder.path());
    options.checkpoint_pages_max = 100;
    let mut source = QemuSource::attach(options).unwrap();
    source.bootstrap().unwrap();
    source.arm().unwrap();
    let mut checkpoint = Checkpoint::default();
    std::thread::sleep(Duration::from_millis(100));
    source.precopy(&mut checkpoint).unwrap();
    assert_eq!(checkpoint.pages.len(), 100, "the rest is put off");
    std::thread::sleep(Duration::from_millis(100));
    let refused = source
        .capture(&mut || Ok(()), false, &mut checkpoint)
        .expect_err("more was written");
    let words = whole_story(&refused);
    assert!(words.contains("checkpoint_bytes_max"), "{words}");
    goes_on(&guest);
    Box::new(source).detach().unwrap();
}

fn whole_story(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        words = format!("{words}: {next}");
        cause = next.source();
    }
    words
}
