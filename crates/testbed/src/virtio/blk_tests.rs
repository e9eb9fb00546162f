use super::*;
use crate::virtio::driver::{Driver, Memory, memory};

const DISK_BYTES: u64 = 64 << 10;

fn device() -> (Blk, Driver, Memory) {
    let memory = memory();
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    (
        Blk::new(file, DISK_BYTES, "disk0"),
        Driver::new(&memory, 0x10000),
        memory,
    )
}

fn header(driver: &Driver, kind: u32, sector: u64) {
    driver.write(
        0x20000,
        &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
    );
}

/// Makes one request and returns its status and the bytes that the device says it wrote.
fn ask(device: &mut Blk, memory: &Memory, kind: u32, sector: u64, data: (u32, bool)) -> (u8, u32) {
    let mut driver = Driver::new(memory, 0x10000);
    driver.set_offered(0);
    driver.write(0x12002, &[0, 0]);
    header(&driver, kind, sector);
    driver.write(0x50000, &[0xee]);
    driver.offer(&[
        (0x20000, 16, false),
        (0x30000, data.0, data.1),
        (0x50000, 1, true),
    ]);
    assert_eq!(
        device.serve(0, &mut driver.queue(), memory).unwrap(),
        Served::Answered
    );
    (driver.read(0x50000, 1)[0], driver.used()[0].1)
}

#[test]
fn what_was_written_is_read_back_and_lies_in_the_file() {
    let (mut device, driver, memory) = device();
    let data: Vec<u8> = (0..1024u32).map(|at| at.to_le_bytes()[0] ^ 0x5a).collect();
    driver.write(0x30000, &data);
    assert_eq!(
        ask(&mut device, &memory, blk::VIRTIO_BLK_T_OUT, 3, (1024, false)),
        (0, 1)
    );
    driver.write(0x30000, &[0; 1024]);
    assert_eq!(
        ask(&mut device, &memory, blk::VIRTIO_BLK_T_IN, 3, (1024, true)),
        (0, 1025)
    );
    assert_eq!(driver.read(0x30000, 1024), data);
    let mut in_file = vec![0; 1024];
    device.file.read_exact_at(&mut in_file, 3 * 512).unwrap();
    assert_eq!(in_file, data);
}

#[test]
fn a_request_longer_than_one_piece_is_carried_out_whole() {
    let (_, _, memory) = device();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut device = Blk::new(file, 1 << 20, "disk0");
    let driver = Driver::new(&memory, 0x10000);
    let data: Vec<u8> = (0..300 * 512u32)
        .map(|at| at.wrapping_mul(31).to_le_bytes()[1])
        .collect();
    driver.write(0x60000, &data);
    for (kind, writable) in [(blk::VIRTIO_BLK_T_OUT, false), (blk::VIRTIO_BLK_T_IN, true)] {
        let mut driver = Driver::new(&memory, 0x10000);
        driver.write(0x12002, &[0, 0]);
        header(&driver, kind, 1);
        driver.offer(&[
            (0x20000, 16, false),
            (0x60000, 300 * 512, writable),
            (0x50000, 1, true),
        ]);
        device.serve(0, &mut driver.queue(), &memory).unwrap();
        assert_eq!(driver.read(0x50000, 1), [0]);
        if writable {
            assert_eq!(driver.read(0x60000, data.len()), data);
        } else {
            driver.write(0x60000, &vec![0; data.len()]);
        }
    }
}

#[test]
fn what_lies_beyond_the_disk_or_is_no_sector_is_an_error_and_no_fault() {
    let (mut device, _, memory) = device();
    let error = u8::try_from(blk::VIRTIO_BLK_S_IOERR).unwrap();
    for (sector, bytes) in [(128, 512), (127, 1024), (u64::MAX, 512), (0, 100)] {
        for kind in [blk::VIRTIO_BLK_T_IN, blk::VIRTIO_BLK_T_OUT] {
            let data = (bytes, kind == blk::VIRTIO_BLK_T_IN);
            assert_eq!(
                ask(&mut device, &memory, kind, sector, data).0,
                error,
                "{kind} {sector} {bytes}"
            );
        }
    }
}

#[test]
fn other_requests_are_answered_as_the_specification_says() {
    let (mut device, driver, memory) = device();
    assert_eq!(
        ask(&mut device, &memory, blk::VIRTIO_BLK_T_FLUSH, 0, (0, true)),
        (0, 1)
    );
    assert_eq!(
        ask(&mut device, &memory, blk::VIRTIO_BLK_T_GET_ID, 0, (20, true)),
        (0, 21)
    );
    assert_eq!(&driver.read(0x30000, 6), b"disk0\0");
    let unsupported = u8::try_from(blk::VIRTIO_BLK_S_UNSUPP).unwrap();
    assert_eq!(ask(&mut device, &memory, 77, 0, (512, true)), (unsupported, 1));
}

#[test]
fn a_request_without_header_or_status_is_a_fault() {
    let (mut device, _, memory) = device();
    for parts in [
        &[(0x20000, 15, false), (0x50000, 1, true)][..],
        &[(0x20000, 16, false)],
        &[(0x50000, 1, true)],
    ] {
        let mut driver = Driver::new(&memory, 0x10000);
        driver.offer(parts);
        let fault = device.serve(0, &mut driver.queue(), &memory).unwrap_err();
        assert!(matches!(fault, QueueFault::Length { .. }), "{fault}");
    }
}

#[test]
fn a_request_into_no_memory_is_a_fault() {
    let (mut device, mut driver, memory) = device();
    header(&driver, blk::VIRTIO_BLK_T_IN, 0);
    driver.offer(&[(0x20000, 16, false), (1 << 40, 512, true), (0x50000, 1, true)]);
    let fault = device.serve(0, &mut driver.queue(), &memory).unwrap_err();
    assert!(matches!(fault, QueueFault::Buffer { .. }), "{fault}");
}
