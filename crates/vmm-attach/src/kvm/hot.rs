//! Hot pages: those that the guest writes in every epoch. A page that is not protected again costs the guest no fault
//! at its next write; the price is that it counts as dirty whether it was written or not.
//!
//! ```text
//!   dirty at n pauses in a row ──► hot: left writable, reported each time
//!        ▲                              │  at one pause in `recheck_every`, spread over the pages
//!        └── dirty at the next pause ── on trial: protected once ──► not dirty: cool again
//! ```

use super::tracker::{HotPageRule, Moment};

/// What is remembered of the pages of one region. Pure.
#[derive(Debug)]
pub(super) struct HotPages {
    rule: HotPageRule,
    /// Pauses in a row at which the page was dirty, up to `hot_after`.
    streak: Vec<u8>,
    hot: Vec<u64>,
    /// Seen dirty since the last pause.
    seen: Vec<u64>,
    /// Pages with a streak that has to end when they are not dirty.
    counted: Vec<u64>,
    pauses: usize,
}

impl HotPages {
    pub(super) fn new(rule: HotPageRule, words: usize) -> Self {
        Self {
            rule,
            streak: vec![0; words * 64],
            hot: vec![0; words],
            seen: vec![0; words],
            counted: vec![0; words],
            pauses: 0,
        }
    }

    /// No page is hot.
    pub(super) fn forget(&mut self) {
        self.streak.fill(0);
        for bits in [&mut self.hot, &mut self.seen, &mut self.counted] {
            bits.fill(0);
        }
    }

    /// Looks at a log and says which of its pages are to be protected again.
    pub(super) fn choose(&mut self, moment: Moment, log: &[u64], clear: &mut Vec<u64>) {
        clear.clear();
        clear.extend_from_slice(log);
        if self.rule.hot_after == 0 {
            return;
        }
        let paused = moment == Moment::Paused;
        let turn = self.pauses % usize::from(self.rule.recheck_every);
        for (word, dirty) in log.iter().copied().enumerate() {
            if dirty | self.seen[word] | self.counted[word] | self.hot[word] != 0 {
                if paused {
                    self.end_epoch(word, dirty, word % usize::from(self.rule.recheck_every) == turn);
                } else {
                    self.seen[word] |= dirty;
                }
            }
            clear[word] &= !self.hot[word];
        }
        self.pauses += usize::from(paused);
    }

    fn end_epoch(&mut self, word: usize, dirty: u64, recheck: bool) {
        let hot_after = self.rule.hot_after;
        let dirty = dirty | self.seen[word];
        self.seen[word] = 0;
        let streaks = &mut self.streak[word * 64..][..64];
        each_bit(self.counted[word] & !dirty, |bit| streaks[bit] = 0);
        if recheck {
            // One more dirty epoch and they are hot again.
            each_bit(self.hot[word], |bit| streaks[bit] = hot_after - 1);
            self.hot[word] = 0;
        } else {
            let mut hot = self.hot[word];
            each_bit(dirty & !hot, |bit| {
                streaks[bit] += 1;
                if streaks[bit] >= hot_after {
                    hot |= 1 << bit;
                }
            });
            self.hot[word] = hot;
        }
        self.counted[word] = dirty & !self.hot[word];
    }
}

fn each_bit(mut bits: u64, mut each: impl FnMut(usize)) {
    while bits != 0 {
        each(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    /// The kernel's side of manual protection: a write sets the bit of a protected page, clearing protects.
    struct Model {
        pages: HotPages,
        kernel: u64,
        /// Faults the guest took.
        faults: usize,
    }

    impl Model {
        fn new(hot_after: u8, recheck_every: u16) -> Self {
            let rule = HotPageRule {
                hot_after,
                recheck_every,
            };
            Self {
                pages: HotPages::new(rule, 1),
                kernel: 0,
                faults: 0,
            }
        }

        fn write(&mut self, pages: u64) {
            self.faults += (pages & !self.kernel).count_ones() as usize;
            self.kernel |= pages;
        }

        fn harvest(&mut self, moment: Moment) -> u64 {
            let (log, mut clear) = (self.kernel, Vec::new());
            self.pages.choose(moment, &[log], &mut clear);
            assert_eq!(clear[0] & !log, 0, "only what was dirty is protected again");
            self.kernel &= !clear[0];
            log
        }

        fn epoch(&mut self, pages: u64) -> u64 {
            self.write(pages);
            self.harvest(Moment::Paused)
        }
    }

    #[test]
    fn a_page_that_is_written_in_every_epoch_is_always_reported_and_stops_costing_faults() {
        let mut model = Model::new(8, 64);
        for _ in 0..640 {
            assert_eq!(model.epoch(0b101) & 0b101, 0b101);
        }
        // Eight faults until hot, then one for each of the ten times it was tried again.
        assert!(model.faults <= 2 * (8 + 2 * 10), "{} faults", model.faults);
    }

    #[test]
    fn a_page_that_cools_down_is_clean_again_after_it_was_tried() {
        let mut model = Model::new(4, 16);
        for _ in 0..20 {
            model.epoch(1);
        }
        let reported = (0..40).filter(|_| model.epoch(0) == 1).count();
        assert!(
            (1..=17).contains(&reported),
            "reported {reported} times, then clean"
        );
        assert_eq!(model.kernel, 0);
        model.faults = 0;
        assert_eq!((model.epoch(1), model.faults), (1, 1), "the next write is seen");
    }

    #[test]
    fn a_page_that_is_dirty_now_and_then_never_gets_hot() {
        let mut model = Model::new(8, 64);
        for epoch in 0..200u64 {
            let pages = u64::from(epoch % 8 != 0);
            assert_eq!(model.epoch(pages), pages);
        }
    }

    #[test]
    fn harvests_between_pauses_belong_to_the_epoch() {
        let mut model = Model::new(3, 1000);
        for _ in 0..4 {
            model.write(1);
            model.harvest(Moment::Live);
            model.harvest(Moment::Paused);
        }
        // Hot by what the live harvests saw: left writable from its next write on.
        model.epoch(1);
        model.faults = 0;
        assert_eq!((model.epoch(1), model.faults), (1, 0));
    }

    #[test]
    fn without_a_rule_every_page_is_protected_again() {
        let mut model = Model::new(0, 1);
        for _ in 0..50 {
            model.epoch(u64::MAX);
            assert_eq!(model.kernel, 0);
        }
    }

    proptest! {
        #[test]
        fn no_write_is_ever_missed(
            hot_after in 0u8..5,
            recheck_every in 1u16..6,
            steps in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 1..60),
        ) {
            let mut model = Model::new(hot_after, recheck_every);
            let mut unseen = 0;
            for (a, b, paused) in steps {
                // Mostly the same pages.
                let pages = a & b | 0xff;
                model.write(pages);
                unseen |= pages;
                let moment = if paused { Moment::Paused } else { Moment::Live };
                unseen &= !model.harvest(moment);
                prop_assert_eq!(unseen, 0);
            }
        }
    }
}
