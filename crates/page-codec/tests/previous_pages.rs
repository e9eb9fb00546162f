//! The store of previous versions never lies, never grows past its capacity, and keeps the pages that matter.

use std::collections::HashMap;

use proptest::prelude::*;
use romulus_page_codec::{Page, PreviousPages, SLOT_OVERHEAD_BYTES};
use romulus_types::{PAGE_BYTES, PageIndex};

fn capacity(pages: usize) -> u64 {
    (pages * (PAGE_BYTES + SLOT_OVERHEAD_BYTES)) as u64
}

fn page(number: u64) -> Page {
    let bytes = number.to_le_bytes();
    std::array::from_fn(|i| bytes[i % 8])
}

#[test]
fn a_store_without_capacity_keeps_nothing_and_costs_nothing() {
    for capacity_bytes in [0, capacity(1) - 1] {
        let mut store = PreviousPages::new(capacity_bytes);
        store.put(PageIndex(1), &page(1));
        store.remove(PageIndex(1));
        assert!(store.get(PageIndex(1)).is_none() && store.is_empty());
        assert_eq!((store.memory_bytes(), store.capacity_pages()), (0, 0));
    }
}

#[test]
fn memory_never_exceeds_the_capacity() {
    for pages in [1, 2, 3, 63, 64, 65, 100, 129, 257, 1000] {
        let mut store = PreviousPages::new(capacity(pages));
        assert_eq!(store.capacity_pages(), pages);
        for number in 0..3 * pages as u64 {
            store.put(PageIndex(number), &page(number));
            assert!(store.memory_bytes() as u64 <= capacity(pages), "{pages} pages");
        }
        assert_eq!(store.len(), pages);
        assert_eq!(store.counters().evictions, 2 * pages as u64);
    }
}

#[test]
fn pages_written_in_every_epoch_survive_a_pass_over_all_memory() {
    let mut store = PreviousPages::new(capacity(200));
    for number in 0..50 {
        store.put(PageIndex(number), &page(number));
    }
    for round in 0..20 {
        for hot in 0..50 {
            assert!(
                store.get(PageIndex(hot)).is_some(),
                "page {hot} was dropped in round {round}"
            );
        }
        for cold in 0..140 {
            store.put(PageIndex(1_000 + round * 140 + cold), &page(cold));
        }
    }
    assert_eq!(store.counters().misses, 0);
}

#[test]
fn clear_forgets_everything_and_gives_memory_back() {
    let mut store = PreviousPages::new(capacity(100));
    let empty = store.memory_bytes();
    for number in 0..150 {
        store.put(PageIndex(number), &page(number));
    }
    store.clear();
    assert!(store.is_empty());
    assert_eq!(store.memory_bytes(), empty);
    assert!((0..150).all(|number| store.get(PageIndex(number)).is_none()));
    store.put(PageIndex(7), &page(7));
    assert_eq!(store.get(PageIndex(7)), Some(&page(7)));
}

#[derive(Clone, Debug)]
enum Step {
    Put(u64, u64),
    Get(u64),
    Remove(u64),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    // Indexes from a small range, times a stride, so that pages meet again and probes collide.
    let index = (0u64..60, prop_oneof![Just(1u64), Just(1 << 20)]).prop_map(|(n, stride)| n * stride);
    prop_oneof![
        8 => (index.clone(), any::<u64>()).prop_map(|(i, v)| Step::Put(i, v)),
        6 => index.clone().prop_map(Step::Get),
        3 => index.prop_map(Step::Remove),
        1 => Just(Step::Clear),
    ]
}

proptest! {
    #[test]
    fn a_kept_page_is_always_the_last_version(
        pages in 1usize..40,
        steps in prop::collection::vec(step(), 1..400),
    ) {
        let mut store = PreviousPages::new(capacity(pages));
        let mut model: HashMap<u64, u64> = HashMap::new();
        let mut evictions = 0;
        for step in steps {
            match step {
                Step::Put(index, value) => {
                    store.put(PageIndex(index), &page(value));
                    model.insert(index, value);
                }
                Step::Get(index) => {
                    let kept = store.get(PageIndex(index)).copied();
                    if let Some(kept) = kept {
                        prop_assert!(model.get(&index).is_some_and(|value| page(*value) == kept));
                    } else if evictions == store.counters().evictions {
                        prop_assert!(!model.contains_key(&index), "a page was lost without an eviction");
                    }
                }
                Step::Remove(index) => {
                    store.remove(PageIndex(index));
                    model.remove(&index);
                    prop_assert!(store.get(PageIndex(index)).is_none());
                }
                Step::Clear => {
                    store.clear();
                    model.clear();
                    evictions = store.counters().evictions;
                }
            }
            prop_assert!(store.len() <= pages && store.memory_bytes() as u64 <= capacity(pages));
        }
        let kept = (0..60).flat_map(|n| [n, n << 20]).collect::<std::collections::BTreeSet<u64>>();
        let kept = kept.into_iter().filter(|index| store.get(PageIndex(*index)).is_some()).count();
        prop_assert_eq!(kept, store.len(), "the table finds every slot");
    }
}
