//! Numbers in as few bytes as they need: LEB128, seven bits a byte, lowest first, in its shortest form only.

use bytes::{BufMut, BytesMut};

/// Most bytes of a 64-bit number.
pub(crate) const VARINT_BYTES_MAX: usize = 10;

/// Appends the number.
pub(crate) fn put(mut number: u64, out: &mut BytesMut) {
    loop {
        let low = u8::try_from(number & 0x7f).expect("seven bits fit in eight");
        number >>= 7;
        if number == 0 {
            out.put_u8(low);
            return;
        }
        out.put_u8(low | 0x80);
    }
}

/// Why there is no number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VarintError {
    /// The bytes end within it.
    Truncated,
    /// It is over 64 bits, or longer than it has to be.
    Malformed,
}

/// Takes a number off the front of `bytes`.
pub(crate) fn take(bytes: &mut &[u8]) -> Result<u64, VarintError> {
    let mut number = 0u64;
    for position in 0..VARINT_BYTES_MAX {
        let (byte, rest) = bytes.split_first().ok_or(VarintError::Truncated)?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * position;
        if (bits << shift) >> shift != bits {
            return Err(VarintError::Malformed);
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            let longer_than_needed = *byte == 0 && position > 0;
            return if longer_than_needed {
                Err(VarintError::Malformed)
            } else {
                Ok(number)
            };
        }
    }
    Err(VarintError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(number: u64) -> BytesMut {
        let mut out = BytesMut::new();
        put(number, &mut out);
        out
    }

    #[test]
    fn every_number_comes_back_and_takes_no_more_bytes_than_it_needs() {
        let edges = (0..64).flat_map(|bit| [(1u64 << bit) - 1, 1 << bit, (1 << bit) + 1]);
        for number in edges.chain([u64::MAX]) {
            let encoded = bytes(number);
            let needed = (64 - number.leading_zeros() as usize).div_ceil(7).max(1);
            assert_eq!(encoded.len(), needed);
            let mut rest = &encoded[..];
            assert_eq!(take(&mut rest), Ok(number));
            assert!(rest.is_empty());
        }
    }

    #[test]
    fn cut_overlong_and_oversized_numbers_are_refused() {
        let max = bytes(u64::MAX);
        for end in 0..max.len() {
            assert_eq!(take(&mut &max[..end]), Err(VarintError::Truncated));
        }
        assert_eq!(take(&mut &[0x80, 0x00][..]), Err(VarintError::Malformed));
        assert_eq!(take(&mut &[0xff, 0x80, 0x00][..]), Err(VarintError::Malformed));
        let mut over = [0xff; 10];
        over[9] = 2;
        assert_eq!(take(&mut &over[..]), Err(VarintError::Malformed));
        assert_eq!(take(&mut &[0xff; 11][..]), Err(VarintError::Malformed));
    }
}
