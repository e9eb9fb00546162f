//! Requests of the Redis protocol (RESP2), read from what a connection has received so far.
//!
//! A request is an array of bulk strings (`*2\r\n$3\r\nGET\r\n$1\r\nk\r\n`) or a line of words. It borrows from the
//! input; what is incomplete is read again when more has come.

use core::fmt;

/// Most words of a request.
pub const ARGS_MAX: usize = 128;
/// Longest request, in bytes.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Longest line that gives a count or a length, in bytes.
const HEAD_BYTES_MAX: usize = 32;

/// Why a connection's input cannot be understood. The connection is closed after it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RespError {
    /// A count is no number, or a line does not end as it should.
    BadCount,
    /// A bulk string was expected.
    NoBulk,
    /// The request has more than [`ARGS_MAX`] words.
    TooManyArgs,
    /// The request is longer than [`REQUEST_BYTES_MAX`].
    TooLong,
}

impl fmt::Display for RespError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RespError::BadCount => write!(f, "Protocol error: invalid length"),
            RespError::NoBulk => write!(f, "Protocol error: expected '$'"),
            RespError::TooManyArgs => write!(f, "Protocol error: more than {ARGS_MAX} words"),
            RespError::TooLong => write!(f, "Protocol error: more than {REQUEST_BYTES_MAX} bytes"),
        }
    }
}

/// The words of a request.
#[derive(Debug, Clone)]
pub struct Args<'a> {
    words: [&'a [u8]; ARGS_MAX],
    count: usize,
}

impl<'a> Args<'a> {
    const fn new() -> Self {
        Args {
            words: [&[]; ARGS_MAX],
            count: 0,
        }
    }

    fn push(&mut self, word: &'a [u8]) -> Result<(), RespError> {
        *self.words.get_mut(self.count).ok_or(RespError::TooManyArgs)? = word;
        self.count += 1;
        Ok(())
    }

    /// The words; none for an empty line.
    #[must_use]
    pub fn words(&self) -> &[&'a [u8]] {
        &self.words[..self.count]
    }
}

/// A request and what it took of the input.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// Its words.
    pub args: Args<'a>,
    /// Bytes of the input that it takes.
    pub bytes: usize,
}

/// Reads the request at the start of `input`; `None` when it is not complete yet.
///
/// # Errors
/// [`RespError`] when no continuation could make it a request.
pub fn parse(input: &[u8]) -> Result<Option<Request<'_>>, RespError> {
    let request = match input.first() {
        None => return Ok(None),
        Some(b'*') => array(input)?,
        Some(_) => inline(input)?,
    };
    match request {
        Some(request) if request.bytes > REQUEST_BYTES_MAX => Err(RespError::TooLong),
        None if input.len() >= REQUEST_BYTES_MAX => Err(RespError::TooLong),
        request => Ok(request),
    }
}

fn array(input: &[u8]) -> Result<Option<Request<'_>>, RespError> {
    let Some((count, mut at)) = head(input, 1)? else {
        return Ok(None);
    };
    let mut args = Args::new();
    if count > ARGS_MAX as i64 {
        return Err(RespError::TooManyArgs);
    }
    for _ in 0..count.max(0) {
        match input.get(at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(_) => return Err(RespError::NoBulk),
        }
        let Some((length, start)) = head(input, at + 1)? else {
            return Ok(None);
        };
        let length = usize::try_from(length).map_err(|_| RespError::BadCount)?;
        if length > REQUEST_BYTES_MAX {
            return Err(RespError::TooLong);
        }
        let end = start + length;
        let Some(tail) = input.get(end..end + 2) else {
            return Ok(None);
        };
        if tail != b"\r\n" {
            return Err(RespError::BadCount);
        }
        args.push(&input[start..end])?;
        at = end + 2;
    }
    Ok(Some(Request { args, bytes: at }))
}

/// The number on the line that starts at `at`, and where the next line starts.
fn head(input: &[u8], at: usize) -> Result<Option<(i64, usize)>, RespError> {
    let rest = &input[at..];
    let line = &rest[..rest.len().min(HEAD_BYTES_MAX)];
    match line.iter().position(|&byte| byte == b'\n') {
        None if line.len() == HEAD_BYTES_MAX => Err(RespError::BadCount),
        None => Ok(None),
        Some(end) => {
            let digits = line[..end].strip_suffix(b"\r").ok_or(RespError::BadCount)?;
            let number = integer(digits).ok_or(RespError::BadCount)?;
            Ok(Some((number, at + end + 1)))
        }
    }
}

fn inline(input: &[u8]) -> Result<Option<Request<'_>>, RespError> {
    let Some(end) = input.iter().position(|&byte| byte == b'\n') else {
        return Ok(None);
    };
    let mut args = Args::new();
    let words = input[..end]
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    words.into_iter().try_for_each(|word| args.push(word))?;
    Ok(Some(Request { args, bytes: end + 1 }))
}

/// A whole decimal number, as Redis writes them: no plus, no blanks, no leading zeros.
#[must_use]
pub fn integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let plain = digits == b"0" || digits.first().is_some_and(|first| (b'1'..=b'9').contains(first));
    if !plain || text == b"-0" {
        return None;
    }
    core::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(words: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend(format!("${}\r\n", word.len()).bytes());
            bytes.extend(word);
            bytes.extend(b"\r\n");
        }
        bytes
    }

    fn words_of(input: &[u8]) -> Vec<Vec<u8>> {
        let request = parse(input).unwrap().unwrap();
        request.args.words().iter().map(|word| word.to_vec()).collect()
    }

    proptest! {
        #[test]
        fn a_request_is_read_as_it_was_written_and_not_before_it_is_complete(
            words in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..12), tail: Vec<u8>,
        ) {
            let mut bytes = encode(&words);
            let length = bytes.len();
            for end in 0..length {
                prop_assert!(parse(&bytes[..end]).unwrap().is_none(), "{end} of {length}");
            }
            bytes.extend(tail);
            prop_assert_eq!(parse(&bytes).unwrap().unwrap().bytes, length);
            prop_assert_eq!(words_of(&bytes), words);
        }

        #[test]
        fn no_input_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            let _ = parse(&[b"*3\r\n$3\r\n", bytes.as_slice()].concat());
        }

        #[test]
        fn integers_are_those_that_would_be_written(number: i64) {
            prop_assert_eq!(integer(number.to_string().as_bytes()), Some(number));
        }
    }

    #[test]
    fn a_line_of_words_is_a_request() {
        assert_eq!(
            words_of(b"SET  key value\r\nPING\r\n"),
            [b"SET".to_vec(), b"key".to_vec(), b"value".to_vec()]
        );
        assert!(words_of(b"\r\n").is_empty());
    }

    #[test]
    fn lies_about_lengths_are_refused() {
        let refused = |input: &[u8]| parse(input).unwrap_err();
        assert_eq!(refused(b"*1000000\r\n"), RespError::TooManyArgs);
        assert_eq!(refused(b"*1\r\n$99999999\r\n"), RespError::TooLong);
        assert_eq!(refused(b"*1\r\n$-1\r\n"), RespError::BadCount);
        assert_eq!(refused(b"*1\r\n:1\r\n"), RespError::NoBulk);
        assert_eq!(refused(b"*1\r\n$1\r\nabc"), RespError::BadCount);
        assert_eq!(refused(&[b'*'; 40]), RespError::BadCount);
        assert_eq!(refused(&vec![b'x'; REQUEST_BYTES_MAX]), RespError::TooLong);
    }

    #[test]
    fn other_ways_to_write_a_number_are_none() {
        for text in ["", "-", "+1", "01", "-0", " 1", "1 ", "9223372036854775808"] {
            assert_eq!(integer(text.as_bytes()), None, "{text:?}");
        }
    }
}
