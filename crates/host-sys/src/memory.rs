//! Reading another process's memory (process_vm_readv(2)), many ranges in one call.
//!
//! The other process runs on while it is read: a range may hold old bytes, new bytes or a mixture. Whoever needs
//! one moment stops the process first.

use crate::SysError;

/// Most ranges that the kernel takes in one call (IOV_MAX).
const RANGES_MAX: usize = 1024;

/// A range of another process's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// First address there.
    pub address: u64,
    /// Length in bytes.
    pub bytes: usize,
}

/// The memory of one process. Keeps its request vector between calls, so that a call allocates nothing.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: libc::pid_t,
    request: Vec<libc::iovec>,
}

// SAFETY: the request vector holds addresses of the *other* process, which are never followed in this one.
unsafe impl Send for ProcessMemory {}

impl ProcessMemory {
    /// Prepares to read process `pid`; nothing is checked yet.
    pub fn new(pid: u32) -> Self {
        let pid = libc::pid_t::try_from(pid).unwrap_or(libc::pid_t::MAX);
        Self {
            pid,
            request: Vec::with_capacity(RANGES_MAX),
        }
    }

    /// Reads all `ranges` one behind the other into `into`, whose length is the sum of theirs.
    ///
    /// # Errors
    /// ESRCH, EPERM, or EFAULT when a range is not mapped there; [`SysError::ShortRead`] when one is in part.
    ///
    /// # Panics
    /// When the lengths do not add up.
    pub fn read_ranges(
        &mut self,
        ranges: impl IntoIterator<Item = RemoteRange>,
        into: &mut [u8],
    ) -> Result<(), SysError> {
        let mut ranges = ranges.into_iter();
        let mut rest = into;
        loop {
            self.request.clear();
            let mut wanted = 0usize;
            for range in ranges.by_ref().take(RANGES_MAX) {
                let base =
                    usize::try_from(range.address).expect("addresses have 64 bits") as *mut libc::c_void;
                self.request.push(libc::iovec {
                    iov_base: base,
                    iov_len: range.bytes,
                });
                wanted += range.bytes;
            }
            if self.request.is_empty() {
                assert!(rest.is_empty(), "the ranges are shorter than the buffer");
                return Ok(());
            }
            assert!(wanted <= rest.len(), "the ranges are longer than the buffer");
            let (now, later) = rest.split_at_mut(wanted);
            self.read_batch(now)?;
            rest = later;
        }
    }

    fn read_batch(&self, into: &mut [u8]) -> Result<(), SysError> {
        let mut done = 0;
        let mut first = 0;
        let mut skip = 0;
        // The kernel may return early (at most 2 GiB a call), so go on where it stopped.
        while done < into.len() {
            let mut head = self.request[first];
            let local = libc::iovec {
                iov_base: into[done..].as_mut_ptr().cast(),
                iov_len: into.len() - done,
            };
            let read = if skip == 0 {
                self.call(&local, &self.request[first..])
            } else {
                head.iov_base = head.iov_base.wrapping_byte_add(skip);
                head.iov_len -= skip;
                self.call(&local, std::slice::from_ref(&head))
            };
            let read = usize::try_from(read).map_err(|_| SysError::last("process_vm_readv"))?;
            if read == 0 {
                return Err(SysError::ShortRead {
                    wanted_bytes: into.len(),
                    read_bytes: done,
                });
            }
            done += read;
            skip += read;
            while first < self.request.len() && skip >= self.request[first].iov_len {
                skip -= self.request[first].iov_len;
                first += 1;
            }
        }
        Ok(())
    }

    fn call(&self, local: &libc::iovec, remote: &[libc::iovec]) -> isize {
        let count = libc::c_ulong::try_from(remote.len()).expect("at most 1024");
        // SAFETY: `local` describes memory that `read_batch` borrows mutably; `remote` is a live slice of
        // `count` entries whose addresses the kernel looks up in the other process.
        unsafe { libc::process_vm_readv(self.pid, local, 1, remote.as_ptr(), count, 0) }
    }

    /// Reads `into.len()` bytes at `address`.
    ///
    /// # Errors
    /// As [`ProcessMemory::read_ranges`].
    pub fn read(&mut self, address: u64, into: &mut [u8]) -> Result<(), SysError> {
        let range = RemoteRange {
            address,
            bytes: into.len(),
        };
        self.read_ranges([range], into)
    }
}

/// Writes `from` at `address` of process `pid`. Only for memory that the caller knows to be unused there.
pub(crate) fn write_unused(pid: u32, address: u64, from: &[u8]) -> Result<(), SysError> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| SysError::TargetGone(pid))?;
    let local = libc::iovec {
        iov_base: from.as_ptr().cast_mut().cast(),
        iov_len: from.len(),
    };
    let base = usize::try_from(address).expect("addresses have 64 bits") as *mut libc::c_void;
    let remote = libc::iovec {
        iov_base: base,
        iov_len: from.len(),
    };
    // SAFETY: the kernel only reads from the local range, which is a live slice; the remote address is looked
    // up in the other process.
    let written = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(written) {
        Ok(bytes) if bytes == from.len() => Ok(()),
        Ok(bytes) => Err(SysError::ShortRead {
            wanted_bytes: from.len(),
            read_bytes: bytes,
        }),
        Err(_) => Err(SysError::last("process_vm_writev")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_ranges_arrive_in_the_order_asked_for() {
        let source: Vec<u8> = (0..3_000_000u32)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        let base = source.as_ptr() as u64;
        let ranges: Vec<RemoteRange> = (0..2500u64)
            .rev()
            .map(|n| RemoteRange {
                address: base + n * 1200,
                bytes: 1000,
            })
            .collect();
        let mut into = vec![0; 2500 * 1000];
        ProcessMemory::new(std::process::id())
            .read_ranges(ranges.iter().copied(), &mut into)
            .unwrap();
        for (position, piece) in into.chunks(1000).enumerate() {
            let from = (2499 - position) * 1200;
            assert_eq!(piece, &source[from..from + 1000], "range {position}");
        }
    }

    #[test]
    fn an_unmapped_range_is_an_error_and_not_zeros() {
        let mut memory = ProcessMemory::new(std::process::id());
        let mut into = [0; 16];
        assert_eq!(
            memory.read(8, &mut into).unwrap_err().raw_os_error(),
            Some(libc::EFAULT)
        );
        let good = into.as_ptr() as u64;
        let ranges = [
            RemoteRange {
                address: good,
                bytes: 4,
            },
            RemoteRange { address: 8, bytes: 4 },
        ];
        assert!(memory.read_ranges(ranges, &mut [0; 8]).is_err());
    }
}
