use super::*;
use crate::virtio::driver::{Driver, INDIRECT, RAM_BYTES, memory};

const BASE: u64 = 0x10000;
const NEXT: u16 = 1;

fn driver() -> Driver {
    Driver::new(&memory(), BASE)
}

fn take(driver: &Driver) -> Result<bool, QueueFault> {
    Chain::default().take_next(&mut driver.queue(), &driver.memory)
}

#[test]
fn a_request_is_split_into_what_may_be_read_and_written() {
    let mut driver = driver();
    let head = driver.offer(&[(0x20000, 16, false), (0x30000, 512, true), (0x40000, 1, true)]);
    let (mut chain, mut queue) = (Chain::default(), driver.queue());
    assert!(chain.take_next(&mut queue, &driver.memory).unwrap());
    assert_eq!(chain.head, head);
    assert_eq!(
        chain.readable,
        [Segment {
            address: GuestAddress(0x20000),
            bytes: 16
        }]
    );
    assert_eq!(total_bytes(&chain.writable), 513);
    assert!(!chain.take_next(&mut queue, &driver.memory).unwrap());
}

#[test]
fn a_circle_of_descriptors_is_a_fault() {
    let mut driver = driver();
    driver.describe(0, 0x20000, 16, NEXT, 1);
    driver.describe(1, 0x30000, 16, NEXT, 0);
    driver.offer_head(0);
    assert!(matches!(take(&driver), Err(QueueFault::BrokenChain)));
}

#[test]
fn a_chain_that_leads_out_of_its_table_is_a_fault() {
    let mut driver = driver();
    driver.describe(0, 0x20000, 16, NEXT, 64);
    driver.offer_head(0);
    assert!(matches!(take(&driver), Err(QueueFault::BrokenChain)));
    let mut driver = self::driver();
    driver.offer_head(9999);
    assert!(matches!(take(&driver), Err(QueueFault::BrokenChain)));
}

#[test]
fn an_endless_indirect_table_is_a_fault_within_the_queues_length() {
    let mut driver = driver();
    // 65,535 descriptors of zeros that each name a next one.
    driver.describe(0, 0x80000, 65_535 * 16, INDIRECT, 0);
    for index in 0..65_535u64 {
        driver.write(0x80000 + index * 16 + 12, &[1, 0, 1, 0]);
    }
    driver.offer_head(0);
    assert!(matches!(take(&driver), Err(QueueFault::BrokenChain)));
}

#[test]
fn a_readable_part_behind_a_writable_one_is_a_fault() {
    let mut driver = driver();
    driver.offer(&[(0x20000, 16, true), (0x30000, 16, false)]);
    assert!(matches!(take(&driver), Err(QueueFault::Order)));
}

#[test]
fn more_requests_than_the_ring_has_room_for_are_a_fault() {
    let mut driver = driver();
    driver.set_offered(65);
    assert!(matches!(take(&driver), Err(QueueFault::Ring(_))));
}

#[test]
fn bytes_are_copied_across_segments_from_any_offset() {
    let driver = driver();
    let at = |address, bytes| Segment {
        address: GuestAddress(address),
        bytes,
    };
    let segments = [at(0x20000, 3), at(0x30000, 0), at(0x40000, 5)];
    assert_eq!(write_at(&driver.memory, &segments, 0, b"abcdefghij").unwrap(), 8);
    assert_eq!(driver.read(0x20000, 4), b"abc\0");
    assert_eq!(driver.read(0x40000, 6), b"defgh\0");
    let mut into = [0; 10];
    assert_eq!(read_at(&driver.memory, &segments, 2, &mut into).unwrap(), 6);
    assert_eq!(&into, b"cdefgh\0\0\0\0");
    assert_eq!(read_at(&driver.memory, &segments, 9, &mut into).unwrap(), 0);
}

#[test]
fn a_buffer_outside_ram_is_a_fault_that_names_it() {
    let driver = driver();
    for address in [RAM_BYTES as u64 - 4, 1 << 40, u64::MAX - 2] {
        let segments = [Segment {
            address: GuestAddress(address),
            bytes: 8,
        }];
        let fault = read_at(&driver.memory, &segments, 0, &mut [0; 8]).unwrap_err();
        assert!(matches!(fault, QueueFault::Buffer { .. }), "{fault}");
        assert!(write_at(&driver.memory, &segments, 0, &[0; 8]).is_err());
        assert!(write_at(&driver.memory, &segments, 7, &[0; 8]).is_err());
    }
}
