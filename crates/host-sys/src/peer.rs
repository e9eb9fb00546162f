//! Who is at the other end of a Unix socket.

use std::os::fd::{AsFd, AsRawFd};

use crate::SysError;

/// The process at the other end of a connected Unix socket: the one that connected, or the one that began to listen. `None`
/// when it can't be seen from our PID namespace (one outside of our container): the kernel says 0 then.
///
/// # Errors
/// The kernel's, from getsockopt(SO_PEERCRED).
pub fn socket_peer_pid(socket: impl AsFd) -> Result<Option<u32>, SysError> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("it is 12 bytes");
    // SAFETY: the kernel writes at most `length` bytes to `credentials`, which is that long, lives here, and for which any
    // bytes are valid.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(SysError::last("getsockopt(SO_PEERCRED)"));
    }
    Ok(u32::try_from(credentials.pid).ok().filter(|pid| *pid > 0))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_who_made_it_and_a_file_has_none() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(socket_peer_pid(&ours).unwrap(), Some(std::process::id()));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(socket_peer_pid(file).is_err());
    }
}
