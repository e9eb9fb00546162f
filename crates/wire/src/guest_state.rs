//! The device-state section's contents: what the primary learnt about the guest, then the hypervisor's own blob.
//!
//! ```text
//!   0        4            4 + n
//!   | n: u32 | n bytes    | the rest
//!   | LE     | notes      | device state, as the hypervisor wrote it
//! ```
//!
//! Both parts are opaque here. The notes (addresses to announce at a takeover) must belong to the very checkpoint that
//! is activated, which is why they travel in it.

use crate::WireError;

/// Most bytes of notes.
pub const NOTES_BYTES_MAX: usize = 64 << 10;

const WHAT: &str = "guest state";

/// Puts the two parts together.
///
/// # Panics
/// When the notes have more than [`NOTES_BYTES_MAX`] bytes.
pub fn pack_guest_state(notes: &[u8], device_state: &[u8]) -> Vec<u8> {
    assert!(
        notes.len() <= NOTES_BYTES_MAX,
        "notes are bounded where they are made"
    );
    let length = u32::try_from(notes.len()).expect("notes are bounded");
    let mut packed = Vec::with_capacity(4 + notes.len() + device_state.len());
    packed.extend_from_slice(&length.to_le_bytes());
    packed.extend_from_slice(notes);
    packed.extend_from_slice(device_state);
    packed
}

/// Takes the two parts apart: notes, device state.
///
/// # Errors
/// [`WireError::Truncated`] when the notes are cut off, [`WireError::TooLarge`] when they are over the limit.
pub fn unpack_guest_state(packed: &[u8]) -> Result<(&[u8], &[u8]), WireError> {
    let (length, rest) = packed
        .split_first_chunk::<4>()
        .ok_or(WireError::Truncated(WHAT))?;
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > NOTES_BYTES_MAX {
        let (value, limit) = (length as u64, NOTES_BYTES_MAX as u64);
        return Err(WireError::TooLarge {
            what: "the notes in a guest state",
            value,
            limit,
        });
    }
    rest.split_at_checked(length).ok_or(WireError::Truncated(WHAT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_comes_apart_again() {
        let packed = pack_guest_state(b"notes", b"state");
        assert_eq!(
            unpack_guest_state(&packed).unwrap(),
            (&b"notes"[..], &b"state"[..])
        );
        assert_eq!(
            unpack_guest_state(&pack_guest_state(b"", b"")).unwrap(),
            (&b""[..], &b""[..])
        );
    }

    #[test]
    fn notes_that_lie_about_their_length_are_refused() {
        assert!(unpack_guest_state(&[1, 0]).is_err());
        assert!(unpack_guest_state(&[2, 0, 0, 0, 7]).is_err());
        assert!(unpack_guest_state(&[0xff, 0xff, 0xff, 0xff, 7]).is_err());
    }
}
