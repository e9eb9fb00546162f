//! Which pages a backup holds already, told by a keyed hash of each, so that a new session sends only what differs.
//!
//! A page that is not sent is a page whose content is believed, and the guest itself writes the content. So the hash
//! must withstand a program in the guest that would like a page of its own to be taken for another one. It is
//! BLAKE3 with the session's nonce as its key, which the guest never sees; the first 16 bytes are used.

use romulus_types::{Digest, PageIndex, Session};

use crate::kind::Page;

const ZERO: Digest = Digest(0);

/// Hashes pages for one session.
#[derive(Clone, Debug)]
pub struct PageHasher {
    key: [u8; blake3::KEY_LEN],
}

impl PageHasher {
    /// The hasher of a session; both sides know its nonce, nobody else does.
    pub fn new(session: Session) -> Self {
        Self {
            key: blake3::derive_key("Romulus held pages v1", &session.0.to_le_bytes()),
        }
    }

    /// The hash of a page. Where it lies is not part of it: hashes are only compared at one place.
    pub fn hash(&self, page: &Page) -> Digest {
        let hash = blake3::keyed_hash(&self.key, page);
        let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        Digest(u128::from_le_bytes(*first))
    }
}

/// What is known of the backup's page at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// It is all zeros.
    Zero,
    /// It has this very content.
    Same,
    /// It has another content.
    Other,
}

/// There is no such page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the backup says that it holds page {} of a guest that has {page_count}", page.0)]
pub struct NoSuchPage {
    /// The page.
    pub page: PageIndex,
    /// Pages of the guest.
    pub page_count: u64,
}

/// The backup's list, and what is left of it as the first copy goes over the guest's memory. 16 bytes a page.
///
/// A hash of 0 stands for a page of zeros, which has none. Should a page have it by a chance of 2^-128, or a peer say so,
/// the digest of the first checkpoint is wrong and the session ends.
#[derive(Debug)]
pub struct HeldPages {
    hasher: PageHasher,
    hashes: Vec<Digest>,
    left: u64,
}

impl HeldPages {
    /// Of a backup whose image is empty, until [`note`](Self::note) says otherwise.
    ///
    /// # Panics
    /// When the guest's pages can't be counted in memory.
    pub fn new(session: Session, page_count: u64) -> Self {
        let page_count = usize::try_from(page_count).expect("a guest's pages fit in memory");
        Self {
            hasher: PageHasher::new(session),
            hashes: vec![ZERO; page_count],
            left: 0,
        }
    }

    /// Pages of the guest.
    pub fn page_count(&self) -> usize {
        self.hashes.len()
    }

    /// Pages that are held and were not asked for yet.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The backup holds a page with this hash.
    ///
    /// # Errors
    /// When the guest has no such page.
    pub fn note(&mut self, page: PageIndex, hash: Digest) -> Result<(), NoSuchPage> {
        let page_count = self.hashes.len() as u64;
        let place = usize::try_from(page.0)
            .ok()
            .and_then(|page| self.hashes.get_mut(page))
            .ok_or(NoSuchPage { page, page_count })?;
        let old = std::mem::replace(place, hash);
        self.left += u64::from(hash != ZERO);
        self.left -= u64::from(old != ZERO);
        Ok(())
    }

    /// Compares the guest's page with the backup's, and forgets the latter: it is what the former is from now on.
    ///
    /// # Panics
    /// When the guest has no such page.
    pub fn take(&mut self, index: PageIndex, page: &Page) -> Held {
        let index = usize::try_from(index.0).expect("a guest's pages fit in memory");
        let hash = std::mem::replace(&mut self.hashes[index], ZERO);
        if hash == ZERO {
            return Held::Zero;
        }
        self.left -= 1;
        if self.hasher.hash(page) == hash {
            Held::Same
        } else {
            Held::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use romulus_types::PAGE_BYTES;

    use super::*;

    const SESSION: Session = Session(1 << 99);

    #[test]
    fn a_page_is_the_same_only_if_its_content_is() {
        let (one, two) = ([1; PAGE_BYTES], [2; PAGE_BYTES]);
        let hasher = PageHasher::new(SESSION);
        let mut held = HeldPages::new(SESSION, 4);
        for page in 0..3 {
            held.note(PageIndex(page), hasher.hash(&one)).unwrap();
        }
        assert_eq!(held.left(), 3);
        assert_eq!(held.take(PageIndex(0), &one), Held::Same);
        assert_eq!(held.take(PageIndex(1), &two), Held::Other);
        assert_eq!(held.take(PageIndex(2), &[0; PAGE_BYTES]), Held::Other);
        assert_eq!(held.take(PageIndex(3), &one), Held::Zero);
        assert_eq!(held.left(), 0);
    }

    #[test]
    fn what_was_compared_once_says_nothing_about_later_contents() {
        let page = [1; PAGE_BYTES];
        let mut held = HeldPages::new(SESSION, 1);
        held.note(PageIndex(0), PageHasher::new(SESSION).hash(&page))
            .unwrap();
        assert_eq!(held.take(PageIndex(0), &page), Held::Same);
        assert_eq!(held.take(PageIndex(0), &page), Held::Zero);
    }

    #[test]
    fn another_session_has_other_hashes() {
        let page = [1; PAGE_BYTES];
        assert_ne!(
            PageHasher::new(SESSION).hash(&page),
            PageHasher::new(Session(5)).hash(&page)
        );
    }

    #[test]
    fn a_page_that_the_guest_does_not_have_is_refused() {
        let mut held = HeldPages::new(SESSION, 4);
        let error = held.note(PageIndex(4), Digest(1)).unwrap_err();
        assert!(error.to_string().contains("page 4 "), "{error}");
        assert!(held.note(PageIndex(u64::MAX), Digest(1)).is_err());
    }
}
