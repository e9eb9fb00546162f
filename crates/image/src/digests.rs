//! The digest of every page, and of the image as a whole.
//!
//! 16 bytes a page, in chunks of 512 pages that exist only where a page is not zero: 0.4 % of the memory
//! that the guest has touched.

use romulus_page_codec::ImageDigest;
use romulus_types::{Digest, PageIndex};

const CHUNK_PAGES: usize = 512;
type Chunk = Box<[Digest; CHUNK_PAGES]>;

/// One digest a page, all zero at first. The digest of a page is `Digest(0)` exactly when the page is zero.
#[derive(Debug)]
pub(crate) struct DigestTable {
    page_count: u64,
    chunks: Vec<Option<Chunk>>,
    image: ImageDigest,
}

impl DigestTable {
    pub(crate) fn new(page_count: u64) -> Self {
        let chunks =
            usize::try_from(page_count.div_ceil(CHUNK_PAGES as u64)).expect("RAM_BYTES_MAX is bounded");
        Self {
            page_count,
            chunks: vec![None; chunks],
            image: ImageDigest::ZERO,
        }
    }

    fn place(&self, page: PageIndex) -> (usize, usize) {
        assert!(
            page.0 < self.page_count,
            "page {} was checked against the layout",
            page.0
        );
        let index = usize::try_from(page.0).expect("RAM_BYTES_MAX is bounded");
        (index / CHUNK_PAGES, index % CHUNK_PAGES)
    }

    /// The digest of a page.
    pub(crate) fn page(&self, page: PageIndex) -> Digest {
        let (chunk, position) = self.place(page);
        self.chunks[chunk]
            .as_ref()
            .map_or(Digest(0), |chunk| chunk[position])
    }

    /// The digest of the image.
    pub(crate) fn image(&self) -> ImageDigest {
        self.image
    }

    /// Replaces the digest of a page.
    pub(crate) fn set(&mut self, page: PageIndex, new: Digest) {
        let (chunk, position) = self.place(page);
        if new == Digest(0) && self.chunks[chunk].is_none() {
            return;
        }
        let chunk = self.chunks[chunk].get_or_insert_with(|| Box::new([Digest(0); CHUNK_PAGES]));
        let old = std::mem::replace(&mut chunk[position], new);
        self.image.replace(old, new);
    }

    /// The first page on which two tables of the same size differ.
    pub(crate) fn first_difference(&self, other: &Self) -> Option<PageIndex> {
        assert_eq!(
            self.page_count, other.page_count,
            "tables of one layout are compared"
        );
        (0..self.page_count.div_ceil(CHUNK_PAGES as u64))
            .flat_map(|chunk| {
                let first = chunk * CHUNK_PAGES as u64;
                let chunk = usize::try_from(chunk).expect("RAM_BYTES_MAX is bounded");
                let equal = self.chunks[chunk] == other.chunks[chunk];
                let end = if equal {
                    first
                } else {
                    self.page_count.min(first + CHUNK_PAGES as u64)
                };
                first..end
            })
            .map(PageIndex)
            .find(|page| self.page(*page) != other.page(*page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_digest_follows_every_replacement() {
        let mut table = DigestTable::new(1025);
        table.set(PageIndex(1024), Digest(5));
        table.set(PageIndex(0), Digest(7));
        table.set(PageIndex(1024), Digest(0));
        assert_eq!(table.image().digest(), Digest(7));
        assert_eq!(
            (table.page(PageIndex(0)), table.page(PageIndex(1024))),
            (Digest(7), Digest(0))
        );
    }

    #[test]
    fn zero_pages_take_no_memory() {
        let mut table = DigestTable::new(1 << 20);
        for page in 0..1 << 20 {
            table.set(PageIndex(page), Digest(0));
        }
        assert!(table.chunks.iter().all(Option::is_none));
    }
}
