//! The digest of a whole memory image, kept up to date page by page.
//!
//! ```text
//!   d(i, page) = 0                                  if the page is all zeros
//!              = xxh3_128(page, seed = i)           otherwise
//!   D(image)   = d(0, page 0) + d(1, page 1) + …    modulo 2^128
//! ```
//!
//! What follows from the sum:
//! - Order does not matter: pages may be added in any order, and by several threads that add up their parts.
//! - Replacing page i costs one subtraction and one addition: `D' = D − d(i, old) + d(i, new)`. An image of 4 GiB is
//!   never read again to learn its digest after a checkpoint.
//! - A page of zeros is worth nothing, so a sparse image costs what its other pages cost, and the empty image is 0.
//! - The index is the seed, so two pages that swapped places change the digest.
//!
//! It detects *faults*: a lost, stale, swapped or damaged page goes unnoticed with a probability of about 2^-128. It
//! does not detect *forgery*: xxh3 is no cryptographic hash, and a sum of hashes is weaker still. That is the job of
//! the mutual TLS underneath.

use romulus_types::{Digest, PageIndex};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::encode::is_zero;
use crate::kind::Page;

/// The digest of one page at its place in the guest's memory; `Digest(0)` for a page of zeros.
pub fn page_digest(index: PageIndex, page: &Page) -> Digest {
    if is_zero(page) {
        Digest(0)
    } else {
        Digest(xxh3_128_with_seed(page, index.0))
    }
}

/// The running digest of a whole memory image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageDigest(Digest);

impl ImageDigest {
    /// The digest of an image of zeros, of any size.
    pub const ZERO: Self = Self(Digest(0));

    /// Goes on from a digest that was stored or received.
    pub const fn resume(digest: Digest) -> Self {
        Self(digest)
    }

    /// The digest as it stands in a commit record.
    pub const fn digest(self) -> Digest {
        self.0
    }

    /// Replaces a page's digest `old` by `new`. Both are [`page_digest`]s at the same index; a page that was never
    /// written is zeros, so its old digest is `Digest(0)`.
    pub fn replace(&mut self, old: Digest, new: Digest) {
        self.0 = Digest(self.0.0.wrapping_sub(old.0).wrapping_add(new.0));
    }

    /// Adds the digest of another part of the same image, with no page in common.
    pub fn join(&mut self, other: Self) {
        self.0 = Digest(self.0.0.wrapping_add(other.0.0));
    }
}

#[cfg(test)]
mod tests {
    use romulus_types::PAGE_BYTES;

    use super::*;

    fn image_digest(pages: &[Page]) -> ImageDigest {
        let mut digest = ImageDigest::ZERO;
        for (index, page) in pages.iter().enumerate() {
            digest.replace(Digest(0), page_digest(PageIndex(index as u64), page));
        }
        digest
    }

    // The values are those of the reference implementation of xxHash.
    #[test]
    fn the_digest_of_a_page_does_not_change_between_versions() {
        let page: Page = std::array::from_fn(|i| u8::try_from(i % 251).unwrap());
        assert_eq!(
            page_digest(PageIndex(0), &page).to_string(),
            "e12cd72144990fe57135ffa504f1bc71"
        );
        assert_eq!(
            page_digest(PageIndex(1 << 31), &page).to_string(),
            "47496f84b873290264241abcffb0bd55"
        );
    }

    #[test]
    fn zero_pages_are_worth_nothing() {
        assert_eq!(page_digest(PageIndex(9), &[0; PAGE_BYTES]), Digest(0));
        assert_eq!(image_digest(&[[0; PAGE_BYTES]; 3]), ImageDigest::ZERO);
    }

    #[test]
    fn replacing_pages_gives_the_digest_of_the_new_image() {
        let mut pages = [[1; PAGE_BYTES], [0; PAGE_BYTES], [3; PAGE_BYTES], [3; PAGE_BYTES]];
        let mut digest = image_digest(&pages);
        for (index, byte) in [(1, 7), (3, 0), (0, 1), (1, 8)] {
            let at = PageIndex(index as u64);
            let new = [byte; PAGE_BYTES];
            digest.replace(page_digest(at, &pages[index]), page_digest(at, &new));
            pages[index] = new;
        }
        assert_eq!(digest, image_digest(&pages));
        assert_eq!(ImageDigest::resume(digest.digest()), digest);
    }

    #[test]
    fn swapped_pages_and_single_bits_change_the_digest() {
        let (one, two) = ([1; PAGE_BYTES], [2; PAGE_BYTES]);
        assert_ne!(image_digest(&[one, two]), image_digest(&[two, one]));
        let base = image_digest(&[one, two]);
        for bit in 0..PAGE_BYTES * 8 {
            let mut flipped = two;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(image_digest(&[one, flipped]), base, "bit {bit}");
        }
    }

    #[test]
    fn parts_may_be_joined_in_any_order() {
        let pages = [[1; PAGE_BYTES], [2; PAGE_BYTES], [3; PAGE_BYTES]];
        let part = |index: usize| {
            let mut part = ImageDigest::ZERO;
            part.replace(Digest(0), page_digest(PageIndex(index as u64), &pages[index]));
            part
        };
        let mut joined = part(2);
        joined.join(part(0));
        joined.join(part(1));
        assert_eq!(joined, image_digest(&pages));
    }
}
