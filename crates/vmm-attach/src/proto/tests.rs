use proptest::prelude::*;

use super::*;

fn decode_request(bytes: &[u8]) -> Result<Request, ProtoError> {
    let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a header");
    Request::decode(&Header::decode(head)?, payload)
}

fn decode_reply(bytes: &[u8]) -> Result<Reply, ProtoError> {
    let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a header");
    Reply::decode(&Header::decode(head)?, payload)
}

fn info() -> MachineInfo {
    MachineInfo {
        vmm: "testbed".into(),
        vmm_version: "0.1".into(),
        vcpus: 2,
        regions: vec![
            Region {
                name: "low".into(),
                gpa: 0,
                bytes: 3 << 30,
                fd_offset: 0,
            },
            Region {
                name: "high".into(),
                gpa: 4 << 30,
                bytes: 65 * PAGE_BYTES,
                fd_offset: 3 << 30,
            },
        ],
        nics: vec![Nic {
            name: "net0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            tap: "tap0".into(),
        }],
        disks: vec![Disk {
            id: "blk0".into(),
            bytes: 1 << 20,
            path: "/var/lib/log".into(),
        }],
        outputs: vec![Output {
            id: "serial".into(),
            to: "stdout".into(),
        }],
        tracking: Tracking::Ring,
        config: vec![1, 2, 3],
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: VERSION,
        vmm: "testbed".into(),
        vmm_version: "0.1".into(),
        role: Role::Running,
        bitmap_bytes: info().bitmap_bytes(),
        machine: Some(info()),
        state_bytes_max: 16 << 20,
        pause_limit_ns_max: 1_000_000_000,
        halt_limit_ns: 10_000_000_000,
    }
}

/// One of each.
fn requests() -> Vec<Request> {
    vec![
        Request::Hello(Hello {
            versions: Versions { min: 1, max: 3 },
            client: "replicator".into(),
        }),
        Request::Arm,
        Request::Harvest,
        Request::Pause(Pause { limit_ns: 300 }),
        Request::Resume,
        Request::Halt(Halt { for_good: true }),
        Request::Go,
        Request::Alive,
        Request::Prepare(Prepare {
            machine: info(),
            private: true,
        }),
        Request::Restore(Restore { state_bytes: 70_000 }),
        Request::Activate,
        Request::Detach,
    ]
}

/// One of each.
fn replies() -> Vec<Reply> {
    vec![
        Reply::Welcome(welcome()),
        Reply::Armed,
        Reply::Harvested(Harvested {
            dirty_pages: 5,
            harvest_ns: 6,
        }),
        Reply::Paused(Paused {
            stopped_at_ns: 1,
            kick_ns: 2,
            harvest_ns: 3,
            dirty_pages: 4,
        }),
        Reply::Resumed(Resumed { resumed_at_ns: 9 }),
        Reply::Halted,
        Reply::Going,
        Reply::Captured(Captured {
            state_bytes: 7,
            capture_ns: 8,
        }),
        Reply::Prepared,
        Reply::Restored(Restored { restore_ns: 10 }),
        Reply::Activated(Activated {
            first_entry_at_ns: 11,
        }),
        Reply::Detached,
        Reply::Error(Refusal::new(ErrorCode::Busy, "no")),
        Reply::Event(Event::Reset),
    ]
}

#[test]
fn every_message_comes_back_as_it_was() {
    for (number, request) in (7..).zip(requests()) {
        let bytes = request.encode(number).unwrap();
        assert_eq!(decode_request(&bytes).unwrap(), request);
        assert_eq!(bytes[12..16], number.to_le_bytes());
        assert!(decode_reply(&bytes).is_err(), "a request is no reply");
    }
    for reply in replies() {
        let bytes = reply.encode(1).unwrap();
        assert_eq!(decode_reply(&bytes).unwrap(), reply);
        assert!(decode_request(&bytes).is_err(), "a reply is no request");
    }
}

/// A change here is a change of the protocol: it needs another version.
#[test]
fn the_bytes_of_version_1_stay_what_they_are() {
    let hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let hello = hex(requests()[0].encode(1).unwrap());
    assert_eq!(
        hello,
        "52415454010001000d0000000100000001030a7265706c696361746f72"
    );
    let pause = hex(requests()[3].encode(2).unwrap());
    assert_eq!(pause, "52415454010004000200000002000000ac02");
    let busy = hex(replies()[12].encode(3).unwrap());
    assert_eq!(busy, "524154540100ff01040000000300000002026e6f");
    let kinds = |bytes: Vec<u8>| u16::from_le_bytes([bytes[6], bytes[7]]);
    let of_requests: Vec<u16> = requests()
        .iter()
        .map(|request| kinds(request.encode(1).unwrap()))
        .collect();
    assert_eq!(of_requests, (1..=12).collect::<Vec<u16>>());
    let of_replies: Vec<u16> = replies()
        .iter()
        .map(|reply| kinds(reply.encode(1).unwrap()))
        .collect();
    assert_eq!(of_replies[..12], (0x101..=0x10c).collect::<Vec<u16>>());
    assert_eq!(of_replies[12..], [0x1ff, 0x201]);
}

#[test]
fn a_message_says_how_many_descriptors_belong_to_it() {
    let of_requests: Vec<usize> = requests().iter().map(Request::descriptors).collect();
    assert_eq!(of_requests, [0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0]);
    assert_eq!(Reply::Welcome(welcome()).descriptors(), 4);
    let untracked = Welcome {
        role: Role::Prepared,
        bitmap_bytes: 0,
        ..welcome()
    };
    assert_eq!(Reply::Welcome(untracked.clone()).descriptors(), 3);
    let empty = Welcome {
        role: Role::Empty,
        machine: None,
        ..untracked
    };
    assert_eq!(Reply::Welcome(empty).descriptors(), 1);
}

#[test]
fn a_bitmap_has_a_bit_for_every_page_in_whole_words() {
    let bytes = [0, 1, PAGE_BYTES, 64 * PAGE_BYTES, 65 * PAGE_BYTES].map(bitmap_bytes);
    assert_eq!(bytes, [0, 8, 8, 8, 16]);
    assert_eq!(info().bitmap_bytes(), (3 << 30) / 4096 / 8 + 16);
}

#[test]
fn a_welcome_that_contradicts_itself_is_refused() {
    let wrong: [(&str, Welcome); 8] = [
        (
            "has a machine",
            Welcome {
                role: Role::Empty,
                ..welcome()
            },
        ),
        (
            "has no machine",
            Welcome {
                machine: None,
                bitmap_bytes: 0,
                ..welcome()
            },
        ),
        (
            "bitmap's length",
            Welcome {
                bitmap_bytes: 0,
                ..welcome()
            },
        ),
        (
            "bitmap's length",
            Welcome {
                bitmap_bytes: 8,
                role: Role::Prepared,
                ..welcome()
            },
        ),
        (
            "limit is 0",
            Welcome {
                pause_limit_ns_max: 0,
                ..welcome()
            },
        ),
        (
            "limit is 0",
            Welcome {
                state_bytes_max: 0,
                ..welcome()
            },
        ),
        (
            "version 2",
            Welcome {
                version: 2,
                ..welcome()
            },
        ),
        (
            "longer than allowed",
            Welcome {
                vmm: "x".repeat(129),
                ..welcome()
            },
        ),
    ];
    for (says, welcome) in wrong {
        let error = decode_reply(&Reply::Welcome(welcome).encode(1).unwrap()).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn the_largest_machine_fits_into_a_message_and_anything_larger_is_refused() {
    let name = |index: usize| format!("{index:02}{}", "n".repeat(NAME_BYTES_MAX - 2));
    let path = "p".repeat(PATH_BYTES_MAX);
    let region = |index: usize| Region {
        name: name(index),
        gpa: u64::MAX / 4096 / 32 * 4096 * (index as u64 + 1),
        bytes: MEMORY_BYTES_MAX / REGIONS_MAX as u64,
        fd_offset: u64::MAX / 8192 * 4096,
    };
    let largest = MachineInfo {
        vmm: name(0),
        vmm_version: name(0),
        vcpus: VCPUS_MAX,
        regions: (0..REGIONS_MAX).map(region).collect(),
        nics: (0..NICS_MAX)
            .map(|index| Nic {
                name: name(index),
                mac: [255; 6],
                tap: name(0),
            })
            .collect(),
        disks: (0..DISKS_MAX)
            .map(|index| Disk {
                id: name(index),
                bytes: u64::MAX,
                path: path.clone(),
            })
            .collect(),
        outputs: (0..OUTPUTS_MAX)
            .map(|index| Output {
                id: name(index),
                to: path.clone(),
            })
            .collect(),
        tracking: Tracking::Ring,
        config: vec![255; CONFIG_BYTES_MAX],
    };
    largest.check().unwrap();
    let welcome = Welcome {
        vmm: name(0),
        vmm_version: name(0),
        bitmap_bytes: largest.bitmap_bytes(),
        machine: Some(largest.clone()),
        ..welcome()
    };
    assert_eq!(Reply::Welcome(welcome.clone()).descriptors(), DESCRIPTORS_MAX);
    decode_reply(&Reply::Welcome(welcome).encode(u32::MAX).unwrap()).unwrap();
    let more: [fn(&mut MachineInfo); 8] = [
        |info| info.vcpus += 1,
        |info| info.regions.push(info.regions[0].clone()),
        |info| info.nics.push(info.nics[0].clone()),
        |info| info.disks.push(info.disks[0].clone()),
        |info| info.outputs.push(info.outputs[0].clone()),
        |info| info.config.push(0),
        |info| info.disks[3].path.push('x'),
        |info| info.regions[0].bytes += PAGE_BYTES,
    ];
    for (index, change) in more.into_iter().enumerate() {
        let mut changed = largest.clone();
        change(&mut changed);
        assert!(changed.check().is_err(), "{index}");
    }
}

#[test]
fn regions_stand_one_after_the_other() {
    let mut changed = info();
    changed.regions[1].gpa = (3 << 30) - PAGE_BYTES;
    assert_eq!(changed.check(), Err(MachineInfoError::Order("high".into())));
    changed.regions.swap(0, 1);
    assert!(changed.check().is_err());
    changed = info();
    changed.regions[1].gpa = 3 << 30;
    changed.check().unwrap();
    changed.regions[1].name = "low".into();
    assert_eq!(changed.check(), Err(MachineInfoError::Name("low".into())));
}

#[test]
fn a_long_refusal_is_cut_between_letters() {
    let refusal = Refusal::new(ErrorCode::Busy, "ä".repeat(TEXT_BYTES_MAX));
    assert_eq!(refusal.text.len(), TEXT_BYTES_MAX);
    let odd = Refusal::new(ErrorCode::Busy, format!("x{}", "ä".repeat(TEXT_BYTES_MAX)));
    assert_eq!(odd.text.len(), TEXT_BYTES_MAX - 1);
    decode_reply(&Reply::Error(odd).encode(1).unwrap()).unwrap();
}

proptest! {
    #[test]
    fn codes_are_numbers_for_ever(number: u16) {
        prop_assert_eq!(u16::from(ErrorCode::from(number)), number);
    }

    #[test]
    fn no_bytes_make_it_panic(head: [u8; HEADER_BYTES], kind in 0u16..0x210, payload: Vec<u8>) {
        let mut head = head;
        head[..4].copy_from_slice(&MAGIC);
        head[4..6].copy_from_slice(&VERSION.to_le_bytes());
        head[6..8].copy_from_slice(&kind.to_le_bytes());
        let bytes = [&head[..], &payload].concat();
        let _ = (decode_request(&bytes), decode_reply(&bytes));
    }

    #[test]
    fn a_damaged_message_is_refused_or_is_another_message(at: prop::sample::Index, value: u8, which: prop::sample::Index) {
        let replies = replies();
        let mut bytes = which.get(&replies).encode(5).unwrap();
        let place = at.index(bytes.len());
        bytes[place] = value;
        if let Ok(reply) = decode_reply(&bytes) {
            // Whatever it is now, it is within its limits.
            prop_assert!(reply.encode(5).is_ok() && reply.descriptors() <= DESCRIPTORS_MAX);
        }
    }

    #[test]
    fn a_cut_message_is_refused(cut: prop::sample::Index, which: prop::sample::Index) {
        let requests = requests();
        let bytes = which.get(&requests).encode(5).unwrap();
        let keep = HEADER_BYTES + cut.index(bytes.len() - HEADER_BYTES + 1);
        let whole = keep == bytes.len();
        prop_assert_eq!(decode_request(&bytes[..keep]).is_ok(), whole);
    }
}
