use super::*;
use proptest::prelude::*;

fn sample() -> BootInfo {
    let net = Device {
        virtio_id: 1,
        vector: DEVICE_VECTOR.into(),
        mmio: VIRTIO_MMIO,
        gsi: 24,
    };
    BootInfo::new(2, 1 << 30, 0, 2_450_000, 11, &[net]).unwrap()
}

#[test]
fn boot_information_survives_its_bytes() {
    let info = sample();
    assert_eq!(BootInfo::from_bytes(&info.to_bytes()), Ok(info));
}

#[test]
fn another_version_is_refused_by_name() {
    let mut bytes = sample().to_bytes();
    bytes[8] = 9;
    assert_eq!(BootInfo::from_bytes(&bytes), Err(AbiError::Version(9)));
}

#[test]
fn the_layout_has_no_overlap() {
    assert!(TSS + u64::from(VCPUS_MAX) * TSS_STRIDE <= KERNEL_STACKS);
    assert!(kernel_stack_top(VCPUS_MAX - 1) <= HIGH_PDS);
    assert!(user_stack_top(VCPUS_MAX - 1) < IMAGE);
    assert!(KVMCLOCK + u64::from(VCPUS_MAX) * KVMCLOCK_STRIDE <= BOOT_INFO);
    assert!(BOOT_INFO + BootInfo::BYTES as u64 <= CMDLINE);
    assert_eq!(user_stack_top(0) % 16, 8);
}

#[test]
fn progress_that_is_being_written_is_not_read() {
    let progress = Progress {
        work_units: 1,
        pages_written: 2,
        dirty_rounds: 3,
        kvmclock_ns: 4,
        tsc: 5,
    };
    let bytes = |sequence: u64| {
        let mut bytes = [0; Progress::BYTES];
        let words = [Progress::MAGIC, sequence].into_iter().chain(progress.fields());
        bytes
            .chunks_mut(8)
            .zip(words)
            .for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
        bytes
    };
    assert_eq!(Progress::from_bytes(&bytes(2)), Some(progress));
    assert_eq!(Progress::from_bytes(&bytes(3)), None);
    assert_eq!(Progress::from_bytes(&[0; Progress::BYTES]), None);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = BootInfo::from_bytes(&bytes);
        let _ = ImageHeader::from_bytes(&bytes);
    }

    #[test]
    fn no_boot_information_makes_it_panic(tail in proptest::collection::vec(any::<u8>(), BootInfo::BYTES - 12)) {
        let mut bytes = [BootInfo::MAGIC.to_le_bytes().as_slice(), &ABI_VERSION.to_le_bytes()].concat();
        bytes.extend(tail);
        if let Ok(info) = BootInfo::from_bytes(&bytes) {
            prop_assert!(info.devices().len() <= DEVICES_MAX);
        }
    }
}
