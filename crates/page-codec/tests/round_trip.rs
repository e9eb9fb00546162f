//! Every page comes back as it was, each kind is chosen where it should be, and damage never panics.

use proptest::prelude::*;
use romulus_page_codec::{Kind, PAYLOAD_BYTES_MAX, Page, Scratch, decode, encode};
use romulus_types::PAGE_BYTES;

/// A small generator, so that "random" pages are the same in every run.
fn noise(seed: u64) -> Page {
    let mut state = seed | 1;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
}

fn text() -> Page {
    let words = [
        &b"epoch "[..],
        b"checkpoint ",
        b"commit ",
        b"the ",
        b"of ",
        b"guest ",
    ];
    let stream: Vec<u8> = noise(5)
        .iter()
        .flat_map(|n| words[usize::from(*n) % 6])
        .copied()
        .collect();
    stream[..PAGE_BYTES].try_into().unwrap()
}

fn check(page: &Page, previous: Option<&Page>) -> (Kind, usize) {
    let mut scratch = Scratch::new();
    let mut out = vec![0xaa; 3];
    let kind = encode(page, previous, &mut scratch, &mut out);
    assert_eq!(out[..3], [0xaa; 3], "encode appends");
    let payload = &out[3..];
    assert!(payload.len() <= PAYLOAD_BYTES_MAX);
    let mut decoded = [0x55; PAGE_BYTES];
    decode(kind.number(), payload, previous, &mut decoded).unwrap();
    assert!(decoded == *page, "{kind:?} changed the page");
    (kind, payload.len())
}

#[test]
fn a_page_of_zeros_has_no_payload_whatever_was_there_before() {
    assert_eq!(check(&[0; PAGE_BYTES], None), (Kind::Zero, 0));
    assert_eq!(check(&[0; PAGE_BYTES], Some(&noise(1))), (Kind::Zero, 0));
    assert_eq!(check(&[0; PAGE_BYTES], Some(&[0; PAGE_BYTES])), (Kind::Zero, 0));
}

#[test]
fn a_page_with_one_bit_set_anywhere_is_not_taken_for_zeros() {
    for byte in 0..PAGE_BYTES {
        let mut page = [0; PAGE_BYTES];
        page[byte] = 0x80;
        assert_ne!(check(&page, None).0, Kind::Zero);
    }
}

#[test]
fn an_unchanged_page_has_no_payload() {
    assert_eq!(check(&noise(1), Some(&noise(1))), (Kind::Same, 0));
}

#[test]
fn few_changed_words_become_a_delta() {
    let previous = noise(1);
    let mut page = previous;
    for at in [0, 8, 1000, 4095] {
        page[at] ^= 1;
    }
    assert_eq!(check(&page, Some(&previous)), (Kind::Delta, 8 + 3 + 4 * 8));
}

#[test]
fn a_small_change_in_every_word_becomes_lz4_of_the_xor() {
    let previous = noise(1);
    let mut page = previous;
    page.iter_mut().step_by(8).for_each(|byte| *byte ^= 1);
    let (kind, bytes) = check(&page, Some(&previous));
    assert_eq!(kind, Kind::XorLz4);
    assert!(bytes < 100, "{bytes}");
}

#[test]
fn text_without_a_previous_version_becomes_lz4() {
    let (kind, bytes) = check(&text(), None);
    assert_eq!(kind, Kind::Lz4);
    assert!(bytes < PAGE_BYTES * 2 / 3, "{bytes}");
    assert_eq!(check(&text(), Some(&noise(1))).0, Kind::Lz4);
}

#[test]
fn noise_is_sent_raw() {
    assert_eq!(check(&noise(1), None), (Kind::Raw, PAGE_BYTES));
    assert_eq!(check(&noise(1), Some(&noise(2))), (Kind::Raw, PAGE_BYTES));
}

#[test]
fn half_a_page_of_new_noise_is_still_a_delta() {
    let previous = noise(1);
    let mut page = previous;
    page[..2048].copy_from_slice(&noise(2)[..2048]);
    assert_eq!(check(&page, Some(&previous)), (Kind::Delta, 8 + 32 + 2048));
}

#[test]
fn the_choice_does_not_depend_on_the_pages_before() {
    let (previous, mut page) = (noise(1), noise(1));
    page.iter_mut().step_by(8).for_each(|byte| *byte ^= 1);
    let mut scratch = Scratch::new();
    let mut first = Vec::new();
    let kind = encode(&page, Some(&previous), &mut scratch, &mut first);
    for other in [text(), noise(9), [0; PAGE_BYTES]] {
        encode(&other, None, &mut scratch, &mut Vec::new());
        let mut again = Vec::new();
        assert_eq!(encode(&page, Some(&previous), &mut scratch, &mut again), kind);
        assert_eq!(again, first);
    }
}

fn any_page() -> impl Strategy<Value = Page> {
    prop_oneof![
        Just([0; PAGE_BYTES]),
        any::<u8>().prop_map(|byte| [byte; PAGE_BYTES]),
        any::<u64>().prop_map(noise),
        Just(text()),
        // Records with some constant and some random bytes, as in real heaps.
        (any::<u64>(), 1usize..64, 0usize..64).prop_map(|(seed, period, random)| {
            let noise = noise(seed);
            std::array::from_fn(|i| {
                if i % period < random {
                    noise[i]
                } else {
                    u8::try_from(i % period).unwrap()
                }
            })
        }),
    ]
}

fn any_pair() -> impl Strategy<Value = (Page, Option<Page>)> {
    let edits = prop::collection::vec((0..PAGE_BYTES, any::<u8>(), 1usize..300), 0..40);
    (any_page(), prop::option::of(any_page()), edits, any::<bool>()).prop_map(
        |(base, other, edits, related)| {
            if !related {
                return (base, other);
            }
            let mut page = base;
            for (at, byte, length) in edits {
                let end = (at + length).min(PAGE_BYTES);
                page[at..end].iter_mut().for_each(|b| *b = b.wrapping_add(byte));
            }
            (page, Some(base))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_page_comes_back_as_it_was((page, previous) in any_pair()) {
        check(&page, previous.as_ref());
    }

    #[test]
    fn any_bytes_decode_or_are_refused_without_a_panic(
        kind in 0u8..9,
        payload in prop::collection::vec(any::<u8>(), 0..PAGE_BYTES + 10),
        has_previous: bool,
    ) {
        let previous = has_previous.then_some([7; PAGE_BYTES]);
        let mut page = [0; PAGE_BYTES];
        let _ = decode(kind, &payload, previous.as_ref(), &mut page);
    }

    #[test]
    fn damaged_payloads_never_panic(
        (page, previous) in any_pair(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut payload = Vec::new();
        let kind = encode(&page, previous.as_ref(), &mut Scratch::new(), &mut payload);
        let mut decoded = [0; PAGE_BYTES];
        if !payload.is_empty() {
            let short = &payload[..cut.index(payload.len())];
            let refused = decode(kind.number(), short, previous.as_ref(), &mut decoded).is_err();
            prop_assert!(refused, "a cut payload is refused");
            for (at, byte) in damage {
                let at = at.index(payload.len());
                payload[at] ^= byte;
            }
        }
        let _ = decode(kind.number(), &payload, previous.as_ref(), &mut decoded);
    }
}
