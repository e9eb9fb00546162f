//! Payload → page. Every payload may come from a damaged or hostile peer.

use lz4_flex::block::{DecompressError, decompress_into};
use romulus_types::PAGE_BYTES;

use crate::delta::{self, DeltaError};
use crate::kind::{Kind, Page, UnknownKind};

/// Why an encoded page was refused. The checkpoint that holds it has to be discarded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The kind's number is not in use.
    #[error(transparent)]
    Kind(#[from] UnknownKind),
    /// The page is encoded against a previous version that this side does not have.
    #[error(
        "a page is encoded as {kind:?} against a previous version that this side does not have; resynchronise"
    )]
    NoPrevious {
        /// The page's encoding.
        kind: Kind,
    },
    /// A payload of a length that its kind does not allow.
    #[error("a page encoded as {kind:?} has {bytes} bytes of payload, which that encoding does not allow")]
    PayloadBytes {
        /// The page's encoding.
        kind: Kind,
        /// Length of the payload.
        bytes: usize,
    },
    /// A delta whose mask is wrong.
    #[error("a page's delta is malformed")]
    Delta(#[source] DeltaError),
    /// Not an LZ4 block.
    #[error("a page encoded as {kind:?} is not a valid LZ4 block")]
    Lz4 {
        /// The page's encoding.
        kind: Kind,
        /// What LZ4 found.
        #[source]
        source: DecompressError,
    },
    /// An LZ4 block that is shorter than a page.
    #[error("a page encoded as {kind:?} unpacks to {bytes} bytes instead of {PAGE_BYTES}")]
    Lz4Short {
        /// The page's encoding.
        kind: Kind,
        /// Bytes that it unpacks to.
        bytes: usize,
    },
}

/// Decodes one page into `into`. `previous` is the version that the encoder had, if this side has one.
///
/// Allocates nothing. After an error `into` holds anything.
///
/// # Errors
/// [`DecodeError`] for every payload that is malformed, of the wrong length or needs a `previous` that is `None`.
pub fn decode(kind: u8, payload: &[u8], previous: Option<&Page>, into: &mut Page) -> Result<(), DecodeError> {
    let kind = Kind::try_from(kind)?;
    let allowed = match kind {
        Kind::Zero | Kind::Same => payload.is_empty(),
        // What does not beat a raw page is sent raw.
        Kind::Delta | Kind::XorLz4 | Kind::Lz4 => (1..PAGE_BYTES).contains(&payload.len()),
        Kind::Raw => payload.len() == PAGE_BYTES,
    };
    if !allowed {
        return Err(DecodeError::PayloadBytes {
            kind,
            bytes: payload.len(),
        });
    }
    let previous = previous.ok_or(DecodeError::NoPrevious { kind });
    match kind {
        Kind::Zero => into.fill(0),
        Kind::Same => *into = *previous?,
        Kind::Delta => {
            *into = *previous?;
            delta::apply(payload, into).map_err(DecodeError::Delta)?;
        }
        Kind::XorLz4 => {
            let previous = previous?;
            unpack(kind, payload, into)?;
            into.iter_mut().zip(previous).for_each(|(byte, old)| *byte ^= old);
        }
        Kind::Lz4 => unpack(kind, payload, into)?,
        Kind::Raw => into.copy_from_slice(payload),
    }
    Ok(())
}

fn unpack(kind: Kind, payload: &[u8], into: &mut Page) -> Result<(), DecodeError> {
    let bytes = decompress_into(payload, into).map_err(|source| DecodeError::Lz4 { kind, source })?;
    if bytes == PAGE_BYTES {
        Ok(())
    } else {
        Err(DecodeError::Lz4Short { kind, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: Kind, payload: &[u8], previous: Option<&Page>) -> DecodeError {
        decode(kind.number(), payload, previous, &mut [0; PAGE_BYTES]).expect_err("a bad payload is refused")
    }

    #[test]
    fn an_unknown_kind_is_refused_by_its_number() {
        let error = decode(77, &[], None, &mut [0; PAGE_BYTES]).unwrap_err();
        assert!(error.to_string().contains("77"), "{error}");
    }

    #[test]
    fn a_page_against_a_version_that_is_not_there_is_refused() {
        for (kind, payload) in [
            (Kind::Same, &[][..]),
            (Kind::Delta, &[1; 17]),
            (Kind::XorLz4, &[0; 30]),
        ] {
            assert!(kind.needs_previous());
            assert!(matches!(refused(kind, payload, None), DecodeError::NoPrevious { kind: k } if k == kind));
        }
    }

    #[test]
    fn lengths_that_the_kind_does_not_allow_are_refused() {
        let previous = [3; PAGE_BYTES];
        let long = [0; PAGE_BYTES + 1];
        let cases: [(Kind, &[usize]); 6] = [
            (Kind::Zero, &[1, PAGE_BYTES]),
            (Kind::Same, &[1, PAGE_BYTES]),
            (Kind::Delta, &[0, PAGE_BYTES, PAGE_BYTES + 1]),
            (Kind::XorLz4, &[0, PAGE_BYTES, PAGE_BYTES + 1]),
            (Kind::Lz4, &[0, PAGE_BYTES, PAGE_BYTES + 1]),
            (Kind::Raw, &[0, 1, PAGE_BYTES - 1, PAGE_BYTES + 1]),
        ];
        for (kind, lengths) in cases {
            for bytes in lengths {
                let error = refused(kind, &long[..*bytes], Some(&previous));
                assert!(
                    matches!(error, DecodeError::PayloadBytes { .. }),
                    "{kind:?} {bytes}: {error}"
                );
            }
        }
    }

    #[test]
    fn lz4_blocks_that_unpack_to_less_or_more_than_a_page_are_refused() {
        for kind in [Kind::Lz4, Kind::XorLz4] {
            let short = lz4_flex::block::compress(&[5; PAGE_BYTES - 1]);
            let long = lz4_flex::block::compress(&[5; PAGE_BYTES + 1]);
            assert!(matches!(
                refused(kind, &short, Some(&[0; PAGE_BYTES])),
                DecodeError::Lz4Short { .. }
            ));
            assert!(matches!(
                refused(kind, &long, Some(&[0; PAGE_BYTES])),
                DecodeError::Lz4 { .. }
            ));
        }
    }

    #[test]
    fn every_cut_of_an_lz4_block_is_refused() {
        let page: Page = std::array::from_fn(|i| u8::try_from(i / 20 % 256).unwrap());
        let block = lz4_flex::block::compress(&page);
        for end in 0..block.len() {
            refused(Kind::Lz4, &block[..end], None);
        }
    }
}
