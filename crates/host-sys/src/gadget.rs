//! Finds, in the code of another process, the two short instruction sequences that a call made in it needs.
//! They are only read: no text of a running process is ever changed.

use crate::{Mapping, ProcessMemory, SysError, read_maps};

/// `syscall; ret`
const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// `mov $15, %rax; syscall`: what a C library gives the kernel as a signal handler's return (rt_sigreturn).
const SIGRETURN: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];

/// Most text that is searched in one mapping, in bytes.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Addresses in the other process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gadgets {
    pub(crate) syscall_ret: u64,
    pub(crate) sigreturn: u64,
}

/// Looks through the executable mappings of `pid`, the C library first.
pub(crate) fn find(pid: u32) -> Result<Gadgets, SysError> {
    let mut texts: Vec<Mapping> = read_maps(pid)?
        .into_iter()
        .filter(|m| m.read && m.execute && m.inode != 0)
        .collect();
    texts.sort_by_key(|m| (!is_c_library(&m.path), m.bytes()));
    let mut memory = ProcessMemory::new(pid);
    let (mut syscall_ret, mut sigreturn) = (None, None);
    for text in texts {
        let bytes = usize::try_from(text.bytes().min(TEXT_BYTES_MAX)).expect("bounded");
        let mut code = vec![0; bytes];
        if memory.read(text.start, &mut code).is_err() {
            continue;
        }
        let find = |pattern: &[u8]| {
            let position = code.windows(pattern.len()).position(|window| window == pattern)?;
            Some(text.start + position as u64)
        };
        syscall_ret = syscall_ret.or_else(|| find(SYSCALL_RET));
        sigreturn = sigreturn.or_else(|| find(SIGRETURN));
        if let (Some(syscall_ret), Some(sigreturn)) = (syscall_ret, sigreturn) {
            return Ok(Gadgets {
                syscall_ret,
                sigreturn,
            });
        }
    }
    Err(SysError::NoGadget(pid))
}

fn is_c_library(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or("");
    file.starts_with("libc.") || file.starts_with("libc-") || file.starts_with("ld-musl")
}
