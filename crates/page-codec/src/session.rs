//! One session's pages, as the primary's side encodes them: what the backup holds is known at every point, so that each
//! page is sent in its shortest form, or not at all.
//!
//! ```text
//!   first copy    page ─► held by the backup already? ─► nothing to send
//!   later         page ─► same as its previous version? ─► nothing to send
//!                      └► encode against the previous version, if it was kept
//! ```
//!
//! A new session assumes nothing about earlier ones: it begins with what the backup says that it holds.

use romulus_types::{Digest, PageIndex};

use crate::digest::{ImageDigest, page_digest};
use crate::encode::{Scratch, encode};
use crate::held::{Held, HeldPages};
use crate::kind::{Kind, PAYLOAD_BYTES_MAX, Page};
use crate::previous::PreviousPages;

/// The state of one session's encoding: previous versions of pages (bounded), the digest of each page (16 bytes a page),
/// and of the whole image.
pub struct SessionEncoder {
    previous: PreviousPages,
    scratch: Scratch,
    payload: Vec<u8>,
    held: HeldPages,
    digests: Vec<Digest>,
    image: ImageDigest,
}

impl SessionEncoder {
    /// For a session whose backup holds `held`; keeps at most `previous_bytes_max` bytes of previous versions.
    pub fn new(held: HeldPages, previous_bytes_max: u64) -> Self {
        Self {
            previous: PreviousPages::new(previous_bytes_max),
            scratch: Scratch::new(),
            payload: Vec::with_capacity(PAYLOAD_BYTES_MAX),
            digests: vec![Digest(0); held.page_count()],
            held,
            image: ImageDigest::ZERO,
        }
    }

    /// Begins another session; the room for previous versions is used again.
    pub fn begin(&mut self, held: HeldPages) {
        self.previous.clear();
        self.digests.clear();
        self.digests.resize(held.page_count(), Digest(0));
        self.image = ImageDigest::ZERO;
        self.held = held;
    }

    /// Digest of the image that the backup has once it has everything that was encoded.
    pub fn image_digest(&self) -> Digest {
        self.image.digest()
    }

    /// Bytes that previous versions and the digests of all pages take.
    pub fn memory_bytes(&self) -> usize {
        self.previous.memory_bytes() + self.digests.len() * size_of::<Digest>()
    }

    /// Pages that the backup holds and that were not yet compared with the guest's. There must be none at a checkpoint.
    pub fn held_left(&self) -> u64 {
        self.held.left()
    }

    /// Encodes a page as it is now. `None` when the backup has this content.
    ///
    /// # Panics
    /// When the guest has no such page.
    pub fn encode(&mut self, index: PageIndex, page: &Page) -> Option<(Kind, &[u8])> {
        let position = usize::try_from(index.0).expect("a guest's pages fit in memory");
        let old = self.digests[position];
        let new = page_digest(index, page);
        let held = self.held.take(index, page);
        let both_zero = held == Held::Zero && old == Digest(0) && new == Digest(0);
        if both_zero {
            return None;
        }
        self.image.replace(old, new);
        self.digests[position] = new;
        if held == Held::Same {
            self.previous.put(index, page);
            return None;
        }
        self.payload.clear();
        let previous = self.previous.get(index);
        let kind = encode(page, previous, &mut self.scratch, &mut self.payload);
        self.previous.put(index, page);
        (kind != Kind::Same).then_some((kind, &self.payload))
    }
}

#[cfg(test)]
mod tests {
    use romulus_types::{PAGE_BYTES, Session};

    use super::*;
    use crate::decode::decode;
    use crate::held::PageHasher;

    const SESSION: Session = Session(3);
    const ZEROS: Page = [0; PAGE_BYTES];

    fn held(pages: &[Page]) -> HeldPages {
        let hasher = PageHasher::new(SESSION);
        let mut held = HeldPages::new(SESSION, pages.len() as u64);
        for (index, page) in (0..).map(PageIndex).zip(pages) {
            if *page != ZEROS {
                held.note(index, hasher.hash(page)).unwrap();
            }
        }
        held
    }

    /// Sends every page; returns how many were on the wire.
    fn copy(encoder: &mut SessionEncoder, guest: &[Page], backup: &mut [Page]) -> usize {
        let mut sent = 0;
        for (position, page) in guest.iter().enumerate() {
            let index = PageIndex(position as u64);
            if let Some((kind, payload)) = encoder.encode(index, page) {
                let base = backup[position];
                decode(kind.number(), payload, Some(&base), &mut backup[position]).unwrap();
                sent += 1;
            }
        }
        sent
    }

    fn digest(pages: &[Page]) -> Digest {
        let mut digest = ImageDigest::ZERO;
        for (index, page) in (0..).map(PageIndex).zip(pages) {
            digest.replace(Digest(0), page_digest(index, page));
        }
        digest.digest()
    }

    #[test]
    fn only_what_differs_is_sent_and_the_backup_ends_up_with_the_guests_memory() {
        let guest = [[1; PAGE_BYTES], ZEROS, [3; PAGE_BYTES], ZEROS, [5; PAGE_BYTES]];
        let mut backup = [[1; PAGE_BYTES], ZEROS, [4; PAGE_BYTES], [9; PAGE_BYTES], ZEROS];
        let mut encoder = SessionEncoder::new(held(&backup), 1 << 20);
        assert_eq!(encoder.held_left(), 3);
        assert_eq!(copy(&mut encoder, &guest, &mut backup), 3);
        assert_eq!(backup, guest);
        assert_eq!(encoder.image_digest(), digest(&guest));
        assert_eq!(encoder.held_left(), 0);
    }

    #[test]
    fn a_page_that_was_held_is_the_base_of_its_next_version() {
        let mut backup = [[1; PAGE_BYTES]];
        let mut encoder = SessionEncoder::new(held(&backup), 1 << 20);
        assert_eq!(copy(&mut encoder, &backup.clone(), &mut backup), 0);
        let mut changed = backup[0];
        changed[7] = 2;
        let (_, payload) = encoder.encode(PageIndex(0), &changed).expect("it changed");
        assert!(payload.len() < 100, "a delta, not {} bytes", payload.len());
        assert_eq!(
            copy(&mut encoder, &[changed], &mut backup),
            0,
            "it did not change"
        );
    }

    #[test]
    fn another_session_assumes_nothing() {
        let guest = [[1; PAGE_BYTES]];
        let mut encoder = SessionEncoder::new(held(&guest), 1 << 20);
        encoder.encode(PageIndex(0), &guest[0]);
        encoder.begin(HeldPages::new(SESSION, 1));
        let mut backup = [ZEROS];
        assert_eq!(copy(&mut encoder, &guest, &mut backup), 1);
        assert_eq!(backup, guest);
        assert_eq!(encoder.image_digest(), digest(&guest));
    }
}
