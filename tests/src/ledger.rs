//! What the client wrote where, and what must be there afterwards.
//!
//! Write number `i` goes to the key `i mod keys` and stores `i`, so a key says by itself how old it is.

use anyhow::{Context as _, Result, bail};

use crate::resp::Reply;

/// The name of a key.
pub(crate) fn key_of(key: u64) -> String {
    format!("w:{key}")
}

/// The number that a key holds, by redis's answer to GET.
pub(crate) fn number_of(reply: Reply) -> Result<Option<u64>> {
    match reply {
        Reply::Bulk(None) => Ok(None),
        Reply::Bulk(Some(bytes)) => {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let number = text.split(' ').next().unwrap_or_default();
            Ok(Some(
                number.parse().context("a key holds what was never written")?,
            ))
        }
        other => bail!("redis answered GET with {other:?}"),
    }
}

/// How many acknowledged writes are missing: for each key, the last one and those before it that are newer than what is there.
///
/// `held` has what each key holds. A number that was never written to its key is an error, not a loss.
pub(crate) fn lost_writes(held: &[Option<u64>], keys: u64, acked: u64, sent: u64) -> Result<u64> {
    let mut lost = 0;
    for (key, found) in (0..keys).zip(held.iter().copied()) {
        if found.is_some_and(|number| number % keys != key || number >= sent) {
            bail!(
                "the key {} holds {found:?}, which was never written to it",
                key_of(key)
            );
        }
        let mut expected = last_of_key(key, keys, acked);
        while let Some(number) = expected.filter(|number| found.is_none_or(|found| found < *number)) {
            lost += 1;
            expected = number.checked_sub(keys);
        }
    }
    Ok(lost)
}

/// The last acknowledged write to a key.
fn last_of_key(key: u64, keys: u64, acked: u64) -> Option<u64> {
    let last = acked.checked_sub(1)?;
    let back = (last % keys + keys - key) % keys;
    last.checked_sub(back)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is lost of ten keys after `acked` acknowledged writes, when one key holds something else than it should.
    fn lost(acked: u64, sent: u64, change: Option<(usize, Option<u64>)>) -> Result<u64> {
        let mut held: Vec<Option<u64>> = (0..10).map(|key| last_of_key(key, 10, acked)).collect();
        if let Some((key, number)) = change {
            held[key] = number;
        }
        lost_writes(&held, 10, acked, sent)
    }

    #[test]
    fn nothing_is_lost_when_every_key_holds_its_last_write() {
        for acked in [0, 1, 9, 10, 11, 25] {
            assert_eq!(lost(acked, acked + 4, None).unwrap(), 0, "{acked} writes");
        }
    }

    #[test]
    fn the_last_write_of_a_key_is_the_newest_of_its_own() {
        for acked in 0..40_u64 {
            for key in 0..10 {
                let expected = (0..acked).filter(|number| number % 10 == key).max();
                assert_eq!(
                    last_of_key(key, 10, acked),
                    expected,
                    "key {key} after {acked} writes"
                );
            }
        }
    }

    #[test]
    fn a_write_that_was_sent_but_not_acknowledged_may_be_there() {
        assert_eq!(lost(25, 27, Some((6, Some(26)))).unwrap(), 0);
    }

    #[test]
    fn an_older_value_is_as_many_lost_writes_as_came_after_it() {
        assert_eq!(lost(25, 25, Some((3, Some(13)))).unwrap(), 1);
        assert_eq!(lost(25, 25, Some((3, Some(3)))).unwrap(), 2);
        assert_eq!(lost(25, 25, Some((3, None))).unwrap(), 3);
    }

    #[test]
    fn a_value_that_was_never_written_is_an_error() {
        assert!(lost(25, 25, Some((3, Some(14)))).is_err());
        assert!(lost(25, 25, Some((3, Some(33)))).is_err());
    }
}
