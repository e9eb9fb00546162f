//! What is written can be read; what is damaged is a named error and never more.

use proptest::prelude::*;
use romulus_types::PAGE_BYTES;

use super::*;

fn block(name: &str, pages: usize) -> StreamBlock {
    StreamBlock {
        name: name.into(),
        bytes: (pages * PAGE_BYTES) as u64,
        gpa: None,
    }
}

fn template() -> Template {
    Template {
        machine: "pc-q35-7.2".into(),
        subsections: vec![
            Subsection {
                name: CAPABILITIES.into(),
                version: 1,
                data: b"\0\0\0\x01\x0fx-ignore-shared".to_vec(),
            },
            Subsection {
                name: "configuration/target-page-bits".into(),
                version: 1,
                data: vec![0, 0, 0, 12],
            },
        ],
        ram_section: 2,
        blocks: vec![block("ram0", 64), block("pc.bios", 3)],
        vmdesc: r#"{"page_size": 4096, "devices": []}"#.into(),
    }
}

fn saved() -> Vec<u8> {
    [
        &MAGIC[..],
        b"\x04\0\0\0\0\x05timer\0\0\0\0\0\0\0\x02abc\x7e\0\0\0\0\0",
    ]
    .concat()
}

fn bios() -> Vec<u8> {
    let mut bios = vec![0; 3 * PAGE_BYTES];
    bios[PAGE_BYTES..2 * PAGE_BYTES].fill(0xea);
    bios
}

fn pieces(pieces: Vec<(u64, Vec<u8>)>) -> BlockContent {
    BlockContent::Pieces {
        pieces,
        zeros_in_place: false,
    }
}

fn written() -> Vec<u8> {
    let mut out = Vec::new();
    write_activation(
        &template(),
        &[BlockContent::InPlace, pieces(vec![(0, bios())])],
        &saved(),
        &mut out,
    )
    .unwrap();
    out
}

/// Reads to the device sections; returns what was there in words, and how many bytes were used.
fn read(bytes: &[u8], with_gpa: bool) -> Result<(Vec<String>, usize), StreamError> {
    let mut reader = Reader::new(with_gpa);
    let (mut words, mut at) = (Vec::new(), 0);
    while let Some((used, item)) = reader.step(&bytes[at..])? {
        words.push(match item {
            Item::Page {
                block,
                offset,
                content,
            } => {
                let first = if let Content::Bytes(page) = content {
                    page[0]
                } else {
                    0
                };
                format!("page {}+{offset:#x} {first:#x}", reader.blocks()[block].name)
            }
            Item::Subsection(subsection) => subsection.name,
            Item::Devices => return Ok((words, at)),
            other => format!("{other:?}"),
        });
        at += used;
    }
    Ok((words, at))
}

#[test]
fn a_written_stream_reads_back_without_the_capabilities() {
    let bytes = written();
    let (words, at) = read(&bytes, false).unwrap();
    assert_eq!(
        words,
        [
            "Header",
            r#"Machine("pc-q35-7.2")"#,
            "configuration/target-page-bits",
            "Ram { id: 2, last: false }",
            "Blocks",
            "RecordsEnd",
            "SectionEnd",
            "Ram { id: 2, last: true }",
            "page pc.bios+0x0 0x0",
            "page pc.bios+0x1000 0xea",
            "page pc.bios+0x2000 0x0",
            "RecordsEnd",
            "SectionEnd",
        ]
    );
    let mark = vmdesc_at_end(&bytes[at..]).expect("the vmdesc ends the stream");
    assert_eq!(bytes[at..at + mark], saved()[MAGIC.len()..]);
}

#[test]
fn a_stream_cut_anywhere_asks_for_more_and_never_fails() {
    let bytes = written();
    let (_, devices) = read(&bytes, false).unwrap();
    for cut in (0..devices).step_by(7) {
        let (_, used) = read(&bytes[..cut], false).unwrap();
        assert!(used <= cut);
    }
    for cut in devices..bytes.len() {
        assert_eq!(vmdesc_at_end(&bytes[devices..cut]), None);
    }
}

#[test]
fn a_vmdesc_planted_in_device_state_is_not_taken_for_the_real_one() {
    let mut tail = b"\x04planted:\0\x06\0\0\0\x02{}more device state\0\x06\0\0\0\x02{}".to_vec();
    assert_eq!(vmdesc_at_end(&tail), Some(tail.len() - 7));
    tail.extend_from_slice(b"\0\x06\0\0\0\x03{}");
    assert_eq!(vmdesc_at_end(&tail), None);
}

#[test]
fn with_ignore_shared_each_block_has_its_address() {
    let mut bytes = written();
    // The list: "ram0" at its length byte, 8 bytes of length, then the address that QEMU adds.
    let at = bytes.windows(5).position(|w| w == b"\x04ram0").unwrap() + 13;
    bytes.splice(at..at, 0u64.to_be_bytes());
    let at = bytes.windows(8).position(|w| w == b"\x07pc.bios").unwrap() + 16;
    bytes.splice(at..at, 0xfffc_0000u64.to_be_bytes());
    let mut reader = Reader::new(true);
    let mut at = 0;
    while let Some((used, item)) = reader.step(&bytes[at..]).unwrap() {
        if item == Item::Devices {
            break;
        }
        at += used;
    }
    assert_eq!(
        reader.blocks().iter().map(|b| b.gpa).collect::<Vec<_>>(),
        [Some(0), Some(0xfffc_0000)]
    );
}

#[test]
fn damaged_parts_are_named() {
    let damage = |find: &[u8], put: &[u8]| {
        let mut bytes = written();
        let at = bytes.windows(find.len()).position(|w| w == find).unwrap();
        bytes.splice(at..at + find.len(), put.iter().copied());
        read(&bytes, false).unwrap_err()
    };
    assert_eq!(damage(b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x04"), StreamError::Header);
    assert_eq!(
        damage(b"\x03ram", b"\x05block"),
        StreamError::LiveDevice("block".into())
    );
    assert_eq!(
        damage(b"ram\0\0\0\0\0\0\0\x04", b"ram\0\0\0\0\0\0\0\x05"),
        StreamError::RamVersion(5)
    );
    assert!(matches!(
        damage(b"\x07pc.bios", b"\x07pc.bio\xff"),
        StreamError::Name(_)
    ));
    assert_eq!(
        damage(b"\x7e\0\0\0\x02", b"\x7e\0\0\0\x03"),
        StreamError::SectionId(3)
    );
    assert!(matches!(
        damage(b"\x1econfiguration/target-page-bits", b"\x03new"),
        StreamError::Subsection(_)
    ));
    assert!(matches!(
        damage(&0x1028u64.to_be_bytes(), &0x9028u64.to_be_bytes()),
        StreamError::PageOffset { .. }
    ));
    assert_eq!(
        damage(&0x1028u64.to_be_bytes(), &0x1048u64.to_be_bytes()),
        StreamError::PageFlags(0x48)
    );
}

#[test]
fn a_device_state_that_was_cut_short_is_refused() {
    let whole = saved();
    assert!(device_sections(&whole).is_ok());
    for cut in 0..whole.len() {
        assert!(device_sections(&whole[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn a_content_that_does_not_fit_its_block_is_refused() {
    let page = PAGE_BYTES as u64;
    for bad in [
        vec![(0, bios()[1..].to_vec())],
        vec![(page, bios())],
        vec![(1, vec![0; PAGE_BYTES])],
        vec![(page, vec![0; PAGE_BYTES]), (0, vec![0; PAGE_BYTES])],
        vec![(u64::MAX - 4095, vec![0; PAGE_BYTES])],
    ] {
        let contents = [BlockContent::InPlace, pieces(bad)];
        let error = write_activation(&template(), &contents, &saved(), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("pc.bios"), "{error}");
    }
}

#[test]
fn holes_are_zeros_and_zeros_in_place_are_left_out() {
    let middle = || vec![(PAGE_BYTES as u64, vec![0xea; PAGE_BYTES])];
    let mut with_holes = Vec::new();
    write_activation(
        &template(),
        &[BlockContent::InPlace, pieces(middle())],
        &saved(),
        &mut with_holes,
    )
    .unwrap();
    assert_eq!(with_holes, written());
    let lean = BlockContent::Pieces {
        pieces: middle(),
        zeros_in_place: true,
    };
    let mut out = Vec::new();
    write_activation(&template(), &[BlockContent::InPlace, lean], &saved(), &mut out).unwrap();
    let (words, _) = read(&out, false).unwrap();
    let pages: Vec<&String> = words.iter().filter(|w| w.starts_with("page")).collect();
    assert_eq!(pages, ["page pc.bios+0x1000 0xea"]);
}

proptest! {
    #[test]
    fn flipped_bits_are_an_error_or_another_stream_but_never_a_panic(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = written();
        for (at, xor) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= xor;
        }
        let _ = read(&bytes, false);
        let _ = read(&bytes, true);
        let _ = vmdesc_at_end(&bytes);
        let _ = device_sections(&bytes);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), gpa: bool) {
        let _ = read(&[&MAGIC[..], &bytes].concat(), gpa);
        let _ = read(&[&MAGIC[..], b"\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", &bytes].concat(), gpa);
    }
}
