//! Which parts of a range are protected: those with something in them, without the widest gaps.

use std::cmp::Reverse;
use std::ops::Range;

use crate::PageRegion;

/// Most parts of one range: each is a call, of one to five microseconds.
const SPANS_MAX: usize = 512;
/// A narrower gap is not worth a call.
const GAP_BYTES_MIN: u64 = 8 * 4096;

/// Parts of a range of addresses. Keeps its vectors between uses.
#[derive(Debug, Default)]
pub(crate) struct Spans {
    all: Vec<Range<u64>>,
    /// Gaps: their lengths, and the regions before which they lie.
    gaps: Vec<(u64, usize)>,
}

impl Spans {
    /// The parts, ascending, that have all of these regions.
    pub(crate) fn around(&mut self, regions: &[PageRegion]) -> &[Range<u64>] {
        self.all.clear();
        let (Some(first), Some(last)) = (regions.first(), regions.last()) else {
            return &self.all;
        };
        self.find_gaps(regions);
        let mut start = first.start;
        for (_, before) in &self.gaps {
            self.all.push(start..regions[before - 1].end);
            start = regions[*before].start;
        }
        self.all.push(start..last.end);
        &self.all
    }

    /// The widest, ascending.
    fn find_gaps(&mut self, regions: &[PageRegion]) {
        let between = regions
            .windows(2)
            .enumerate()
            .map(|(at, pair)| (pair[1].start - pair[0].end, at + 1));
        self.gaps.clear();
        self.gaps
            .extend(between.filter(|(bytes, _)| *bytes >= GAP_BYTES_MIN));
        let gaps_max = SPANS_MAX - 1;
        if self.gaps.len() > gaps_max {
            self.gaps
                .select_nth_unstable_by_key(gaps_max, |(bytes, _)| Reverse(*bytes));
            self.gaps.truncate(gaps_max);
        }
        self.gaps.sort_unstable_by_key(|(_, before)| *before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(first_page: u64, pages: u64) -> PageRegion {
        PageRegion {
            start: first_page * 4096,
            end: (first_page + pages) * 4096,
            ..PageRegion::default()
        }
    }

    fn pages(spans: &[Range<u64>]) -> Vec<(u64, u64)> {
        let pages = |span: &Range<u64>| (span.start / 4096, span.end / 4096);
        spans.iter().map(pages).collect()
    }

    #[test]
    fn parts_begin_and_end_where_something_is_and_leave_wide_gaps_out() {
        let mut spans = Spans::default();
        assert!(spans.around(&[]).is_empty());
        assert_eq!(pages(spans.around(&[region(5, 2)])), [(5, 7)]);
        let close_and_far = [region(5, 2), region(14, 1), region(23, 1), region(900, 3)];
        assert_eq!(
            pages(spans.around(&close_and_far)),
            [(5, 15), (23, 24), (900, 903)]
        );
    }

    #[test]
    fn there_is_a_limit_and_the_widest_gaps_are_left_out() {
        let mut spans = Spans::default();
        // Every third gap is of 100 pages, the others of 10 or 11.
        let mut next = 0;
        let regions: Vec<PageRegion> = (0..3 * SPANS_MAX as u64)
            .map(|at| {
                next += if at % 3 == 0 { 101 } else { 11 + at % 2 };
                region(next - 1, 1)
            })
            .collect();
        let found = spans.around(&regions);
        assert_eq!(found.len(), SPANS_MAX);
        assert!(found.iter().all(|span| span.end - span.start < 30 * 4096));
        let inside = |region: &PageRegion| {
            let holds = |span: &&Range<u64>| span.start <= region.start && region.end <= span.end;
            found.iter().filter(holds).count() == 1
        };
        assert!(regions.iter().all(inside));
    }
}
