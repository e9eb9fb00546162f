//! Any bytes from a client of the test guest: no panic, requests within their limits, read the same however they are cut, and an error
//! stays one whatever comes behind it.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use romulus_guest_core::resp::{ARGS_MAX, REQUEST_BYTES_MAX, Request, integer, parse};

/// Requests up to this length are cut everywhere.
const CUT_BYTES_MAX: usize = 512;

fuzz_target!(|data: &[u8]| {
    let mut input = data;
    while !input.is_empty() {
        match parse(input) {
            Ok(Some(request)) => {
                whole(&request, input);
                input = &input[request.bytes..];
            }
            Ok(None) => {
                assert!(input.len() < REQUEST_BYTES_MAX, "nobody keeps more");
                return;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                for tail in [&b"\r\n"[..], b"*1\r\n$4\r\nPING\r\n"] {
                    assert!(parse(&[input, tail].concat()).is_err(), "{error} was not the end");
                }
                return;
            }
        }
    }
});

fn whole(request: &Request<'_>, input: &[u8]) {
    let words = request.args.words();
    assert!((1..=input.len().min(REQUEST_BYTES_MAX)).contains(&request.bytes) && words.len() <= ARGS_MAX);
    assert!(words.iter().map(|word| word.len()).sum::<usize>() <= request.bytes);
    let alone = parse(&input[..request.bytes]).expect("it was a request");
    assert_eq!(alone.expect("and whole").args.words(), words);
    for cut in 0..request.bytes.min(CUT_BYTES_MAX) {
        assert!(matches!(parse(&input[..cut]), Ok(None)), "a request before its end");
    }
    for word in words {
        if let Some(number) = integer(word) {
            assert_eq!(number.to_string().as_bytes(), *word, "one way to write a number");
        }
    }
}
