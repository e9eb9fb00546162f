use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_queue::Queue;

use super::*;
use crate::virtio::chain::{self, Chain, QueueFault};
use crate::virtio::driver::{Driver, Memory, memory};
use crate::virtio::io_thread::IoThread;

/// How long a thing that must happen may take.
const SOON: Duration = Duration::from_secs(20);

/// A device that answers each request when the test lets it, and tells about it.
struct Slow {
    entered: Sender<()>,
    go: Receiver<()>,
    config: [u8; 8],
}

impl Backend<Memory> for Slow {
    fn virtio_id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn input(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn serve(&mut self, _index: usize, queue: &mut Queue, memory: &Memory) -> Result<Served, QueueFault> {
        let mut chain = Chain::default();
        if !chain.take_next(queue, memory)? {
            return Ok(Served::NoRequest);
        }
        self.entered.send(()).unwrap();
        // Not for ever: a test that failed has to be able to end the thread.
        let _ = self.go.recv_timeout(SOON);
        chain::give_back(queue, memory, chain.head, 0)?;
        Ok(Served::Answered)
    }
}

struct Rig {
    bus: Arc<Bus<Memory>>,
    driver: Driver,
    entered: Receiver<()>,
    go: Sender<()>,
}

fn rig() -> Rig {
    let memory = memory();
    let ((entered_in, entered), (go, go_out)) = (channel(), channel());
    let device = Slow {
        entered: entered_in,
        go: go_out,
        config: [1, 2, 3, 4, 5, 6, 7, 8],
    };
    let bus = Bus::new(memory.clone(), vec![Box::new(device) as Box<dyn Backend<Memory>>]).unwrap();
    bus.unquiesce();
    Rig {
        bus: Arc::new(bus),
        driver: Driver::new(&memory, 0x10000),
        entered,
        go,
    }
}

fn write(bus: &Bus<Memory>, register: u32, value: u32) {
    bus.mmio_write(abi::VIRTIO_MMIO + u64::from(register), &value.to_le_bytes());
}

fn read(bus: &Bus<Memory>, register: u32) -> u32 {
    let mut word = [0; 4];
    bus.mmio_read(abi::VIRTIO_MMIO + u64::from(register), &mut word);
    u32::from_le_bytes(word)
}

/// What a driver does until its device is live.
fn start(bus: &Bus<Memory>) {
    write(bus, reg::VIRTIO_MMIO_STATUS, 3);
    write(bus, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    write(bus, reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    write(bus, reg::VIRTIO_MMIO_STATUS, 11);
    write(bus, reg::VIRTIO_MMIO_QUEUE_NUM, 64);
    write(bus, reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x10000);
    write(bus, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x11000);
    write(bus, reg::VIRTIO_MMIO_QUEUE_USED_LOW, 0x12000);
    write(bus, reg::VIRTIO_MMIO_QUEUE_READY, 1);
    write(bus, reg::VIRTIO_MMIO_STATUS, 15);
}

#[test]
fn a_doorbell_has_the_request_answered_and_the_interrupt_raised() {
    let mut rig = rig();
    let _thread = IoThread::start(rig.bus.clone()).unwrap();
    start(&rig.bus);
    rig.driver.offer(&[(0x20000, 16, false)]);
    rig.bus.wakes()[0].kicks[0].write(1).unwrap();
    rig.entered.recv_timeout(SOON).unwrap();
    rig.go.send(()).unwrap();
    wait_until(|| rig.driver.used().len() == 1);
    wait_until(|| rig.bus.wakes()[0].interrupt.read().is_ok());
    assert_eq!(read(&rig.bus, reg::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !done() {
        assert!(begin.elapsed() < SOON, "it never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_quiet_bus_has_finished_its_request_and_begins_no_other() {
    let mut rig = rig();
    let _thread = IoThread::start(rig.bus.clone()).unwrap();
    start(&rig.bus);
    rig.driver.offer(&[(0x20000, 16, false)]);
    rig.driver.offer(&[(0x20000, 16, false)]);
    rig.bus.wakes()[0].kicks[0].write(1).unwrap();
    rig.entered.recv_timeout(SOON).unwrap();
    // The device is inside its first request.
    let bus = rig.bus.clone();
    let quiet = std::thread::spawn(move || bus.quiesce());
    wait_until(|| rig.bus.quiescing.load(Ordering::Acquire));
    assert!(!quiet.is_finished());
    rig.go.send(()).unwrap();
    quiet.join().unwrap();
    assert_eq!(
        rig.driver.used().len(),
        1,
        "the first is answered, the second not begun"
    );
    rig.bus.wakes()[0].kicks[0].write(1).unwrap();
    assert!(rig.entered.recv_timeout(Duration::from_millis(50)).is_err());
    rig.bus.unquiesce();
    rig.entered.recv_timeout(SOON).unwrap();
    rig.go.send(()).unwrap();
    wait_until(|| rig.driver.used().len() == 2);
}

#[test]
fn a_restored_bus_looks_at_its_queues_and_interrupts_without_a_doorbell() {
    let mut rig = rig();
    start(&rig.bus);
    rig.driver.offer(&[(0x20000, 16, false)]);
    // The doorbell was rung, and is lost with the first process.
    rig.bus.quiesce();
    let mut state = Vec::new();
    rig.bus.save(&mut state);

    let ((entered_in, entered), (go, go_out)) = (channel(), channel());
    let device = Slow {
        entered: entered_in,
        go: go_out,
        config: [0; 8],
    };
    let backends = vec![Box::new(device) as Box<dyn Backend<Memory>>];
    let other = Arc::new(Bus::new(rig.driver.memory.clone(), backends).unwrap());
    let _thread = IoThread::start(other.clone()).unwrap();
    let wakes = other.wakes();
    other.restore(&state).unwrap();
    assert!(
        entered.recv_timeout(Duration::from_millis(50)).is_err(),
        "not before it is let go"
    );
    other.unquiesce();
    assert!(
        wakes[0].interrupt.read().is_ok(),
        "an interrupt may have been on its way"
    );
    entered.recv_timeout(SOON).unwrap();
    go.send(()).unwrap();
    wait_until(|| rig.driver.used().len() == 1);
}

#[test]
fn a_damaged_state_is_refused_without_a_panic() {
    let rig = rig();
    start(&rig.bus);
    rig.bus.quiesce();
    let mut state = Vec::new();
    rig.bus.save(&mut state);
    for length in 0..state.len() {
        assert!(rig.bus.restore(&state[..length]).is_err());
    }
    let mut random = VecDeque::from(state.clone());
    for _ in 0..state.len() {
        random.rotate_left(1);
        let _ = rig.bus.restore(random.make_contiguous());
    }
    state[0] = 9;
    assert!(matches!(
        rig.bus.restore(&state),
        Err(DevicesError::Version { got: 9 })
    ));
}

#[test]
fn a_driver_that_breaks_the_rules_gets_a_device_that_needs_a_reset() {
    let mut rig = rig();
    let _thread = IoThread::start(rig.bus.clone()).unwrap();
    start(&rig.bus);
    rig.driver.set_offered(1000);
    rig.bus.wakes()[0].kicks[0].write(1).unwrap();
    wait_until(|| read(&rig.bus, reg::VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0);
    assert_eq!(read(&rig.bus, reg::VIRTIO_MMIO_INTERRUPT_STATUS) & 2, 2);
    write(&rig.bus, reg::VIRTIO_MMIO_STATUS, 0);
    rig.driver.set_offered(0);
    start(&rig.bus);
    rig.driver.offer(&[(0x20000, 16, false)]);
    rig.bus.wakes()[0].kicks[0].write(1).unwrap();
    rig.entered.recv_timeout(SOON).unwrap();
    rig.go.send(()).unwrap();
    wait_until(|| rig.driver.used().len() == 1);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut rig = rig();
    let wakes = rig.bus.wakes();
    start(&rig.bus);
    rig.driver.write(0x11000, &[1, 0]);
    rig.driver.offer(&[(0x20000, 16, false)]);
    rig.go.send(()).unwrap();
    assert_eq!(rig.bus.turn(0, 0), Some(false));
    assert_eq!(rig.driver.used().len(), 1);
    assert!(wakes[0].interrupt.read().is_err());
    rig.driver.write(0x11000, &[0, 0]);
    rig.driver.offer(&[(0x20000, 16, false)]);
    rig.go.send(()).unwrap();
    assert_eq!(rig.bus.turn(0, 0), Some(false));
    assert!(wakes[0].interrupt.read().is_ok());
}

#[test]
fn no_access_to_a_register_makes_it_panic() {
    let rig = rig();
    let addresses = [
        0,
        1,
        0xf0,
        0xfc,
        0x100,
        0x104,
        0x107,
        0xfff,
        0x1000,
        0x7000,
        u64::MAX - abi::VIRTIO_MMIO,
    ];
    for offset in addresses {
        for size in [1, 2, 4, 8] {
            let mut data = [0xff; 8];
            rig.bus.mmio_write(abi::VIRTIO_MMIO + offset, &data[..size]);
            rig.bus.mmio_read(abi::VIRTIO_MMIO + offset, &mut data[..size]);
        }
    }
    let mut config = [0; 4];
    rig.bus.mmio_read(abi::VIRTIO_MMIO + 0x102, &mut config);
    assert_eq!(config, [3, 4, 5, 6]);
}
