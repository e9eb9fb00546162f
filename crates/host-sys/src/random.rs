//! Random numbers from the kernel.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// 128 random bits.
///
/// # Errors
/// When the kernel has none.
pub fn random_u128() -> io::Result<u128> {
    let mut bytes = [0; 16];
    let got = getrandom(&mut bytes, GetRandomFlags::empty())?;
    // Requests of up to 256 bytes are never cut short.
    assert_eq!(got, bytes.len(), "the kernel gives small requests whole");
    Ok(u128::from_ne_bytes(bytes))
}
