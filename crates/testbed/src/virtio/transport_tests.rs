use super::*;
use crate::virtio::driver::{Memory, memory};

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const FEATURE: u64 = 1 << 5;

fn device() -> (Transport, Memory) {
    (Transport::new(1, FEATURE, 2), memory())
}

fn accept(device: &mut Transport, memory: &Memory, features: u64) {
    device.write(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER, memory);
    for half_index in 0..2 {
        device.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half_index, memory);
        device.write(
            reg::VIRTIO_MMIO_DRIVER_FEATURES,
            half(features, half_index),
            memory,
        );
    }
    device.write(
        reg::VIRTIO_MMIO_STATUS,
        ACKNOWLEDGE | DRIVER | VIRTIO_CONFIG_S_FEATURES_OK,
        memory,
    );
}

fn place_queue(device: &mut Transport, memory: &Memory, index: u32, base: u32) {
    device.write(reg::VIRTIO_MMIO_QUEUE_SEL, index, memory);
    device.write(reg::VIRTIO_MMIO_QUEUE_NUM, 64, memory);
    device.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base, memory);
    device.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x1000, memory);
    device.write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x2000, memory);
    device.write(reg::VIRTIO_MMIO_QUEUE_READY, 1, memory);
}

fn live_device() -> (Transport, Memory) {
    let (mut device, memory) = device();
    accept(&mut device, &memory, FEATURE | 1 << VIRTIO_F_VERSION_1);
    place_queue(&mut device, &memory, 0, 0x10000);
    let status = device.read(reg::VIRTIO_MMIO_STATUS) | VIRTIO_CONFIG_S_DRIVER_OK;
    assert_eq!(
        device.write(reg::VIRTIO_MMIO_STATUS, status, &memory),
        Effect::Notified
    );
    (device, memory)
}

#[test]
fn a_driver_that_does_what_the_specification_says_gets_a_live_queue() {
    let (mut device, _) = live_device();
    assert!(device.live());
    assert!(device.live_queue(0).is_some());
    assert!(device.live_queue(1).is_none(), "it was never made ready");
    assert!(device.live_queue(2).is_none(), "there is none");
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let (mut device, memory) = device();
    accept(&mut device, &memory, FEATURE << 1 | 1 << VIRTIO_F_VERSION_1);
    assert_eq!(
        device.read(reg::VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK,
        0
    );
    let (mut device, memory) = self::device();
    accept(&mut device, &memory, FEATURE);
    assert_eq!(
        device.read(reg::VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK,
        0,
        "without VERSION_1"
    );
    device.write(reg::VIRTIO_MMIO_STATUS, 7, &memory);
    assert!(!device.live(), "no features, no service");
}

#[test]
fn a_queue_whose_rings_are_not_in_ram_does_not_become_ready() {
    let (mut device, memory) = device();
    for base in [0xffff_0000, 0x3f_f000] {
        place_queue(&mut device, &memory, 0, base);
        assert_eq!(device.read(reg::VIRTIO_MMIO_QUEUE_READY), 0, "{base:#x}");
    }
}

#[test]
fn a_ready_queue_does_not_move() {
    let (mut device, memory) = live_device();
    device.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x90000, &memory);
    device.write(reg::VIRTIO_MMIO_QUEUE_NUM, 8, &memory);
    let queue = device.live_queue(0).unwrap();
    assert_eq!((queue.desc_table(), queue.size()), (0x10000, 64));
}

#[test]
fn an_impossible_queue_size_is_not_taken() {
    let (mut device, memory) = device();
    for size in [0, 3, 512, 65_536, u32::MAX] {
        device.write(reg::VIRTIO_MMIO_QUEUE_NUM, size, &memory);
        assert_eq!(device.queues[0].size(), QUEUE_SIZE_MAX, "{size}");
    }
}

#[test]
fn a_device_out_of_order_serves_nothing_until_it_is_reset() {
    let (mut device, memory) = live_device();
    device.need_reset();
    let status = device.read(reg::VIRTIO_MMIO_STATUS);
    device.write(
        reg::VIRTIO_MMIO_STATUS,
        status & !VIRTIO_CONFIG_S_NEEDS_RESET,
        &memory,
    );
    assert!(!device.live() && device.live_queue(0).is_none());
    assert_eq!(device.write(reg::VIRTIO_MMIO_STATUS, 0, &memory), Effect::Reset);
    assert_eq!(device.read(reg::VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn a_device_goes_on_from_its_saved_state() {
    let (mut device, memory) = live_device();
    device.live_queue(0).unwrap().set_next_avail(17);
    device.note_used();
    let state = device.save();
    let (mut other, _) = self::device();
    other.restore(&state, &memory).unwrap();
    assert_eq!(other.save(), state);
    assert_eq!(other.live_queue(0).unwrap().next_avail(), 17);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
    let (device, memory) = live_device();
    let good = device.save();
    let wrong = |change: &dyn Fn(&mut TransportState)| {
        let mut state = good.clone();
        change(&mut state);
        let (mut other, _) = self::device();
        let before = other.save();
        let error = other.restore(&state, &memory).unwrap_err();
        assert_eq!(other.save(), before, "{error}");
        error
    };
    assert!(matches!(wrong(&|s| s.device_id = 2), TransportError::Kind { .. }));
    assert!(matches!(
        wrong(&|s| s.queues.truncate(1)),
        TransportError::Kind { .. }
    ));
    assert_eq!(wrong(&|s| s.features_driver |= 1), TransportError::Features(1));
    assert_eq!(wrong(&|s| s.queues[0].size = 3), TransportError::Queue(0));
    assert_eq!(
        wrong(&|s| s.queues[0].used_ring = 1 << 40),
        TransportError::Queue(0)
    );
    assert_eq!(wrong(&|s| s.queues[1].desc_table = 7), TransportError::Queue(1));
}
