//! Loading small eBPF programs for traffic control with bpf(2): no compiler, no library, no pinned file.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
const LOG_BYTES: usize = 16 * 1024;
/// Helper number of `bpf_redirect(ifindex, flags)` (include/uapi/linux/bpf.h).
pub const HELPER_REDIRECT: i32 = 23;

/// One eBPF instruction, as bpf(2) takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Insn {
    const fn new(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Self {
        assert!(to <= 10 && from <= 10, "there are eleven registers");
        Self {
            code,
            registers: (from << 4) | to,
            offset,
            immediate,
        }
    }

    /// `to = value`
    pub const fn set(to: u8, value: i32) -> Self {
        Self::new(0xb7, to, 0, 0, value)
    }

    /// `to = *(u32 *)(from + offset)`
    pub const fn load_u32(to: u8, from: u8, offset: i16) -> Self {
        Self::new(0x61, to, from, offset, 0)
    }

    /// `*(u32 *)(to + offset) = from`
    pub const fn store_u32(to: u8, offset: i16, from: u8) -> Self {
        Self::new(0x63, to, from, offset, 0)
    }

    /// `if register == value, skip the next `skip` instructions`
    pub const fn skip_if_equal(register: u8, value: i32, skip: i16) -> Self {
        Self::new(0x15, register, 0, skip, value)
    }

    /// `r0 = helper(r1, r2, …)`
    pub const fn call(helper: i32) -> Self {
        Self::new(0x85, 0, 0, 0, helper)
    }

    /// `return r0`
    pub const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
}

/// The kernel refused a program.
#[derive(Debug, thiserror::Error)]
#[error("the kernel refused an eBPF program (it needs CAP_BPF and CAP_NET_ADMIN, or root): {log:?}")]
pub struct LoadError {
    /// What bpf(2) returned.
    #[source]
    pub source: io::Error,
    /// The verifier's words, when it had any.
    pub log: String,
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` needs; the kernel takes the missing rest as zeros.
#[repr(C)]
struct LoadAttr {
    program_type: u32,
    insn_count: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// The part of `union bpf_attr` that `BPF_PROG_QUERY` needs.
#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    padding: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// `name` cut to 15 bytes and closed with a NUL; the kernel allows letters, digits, `_` and `.`.
fn object_name(name: &str) -> [u8; 16] {
    let mut bytes = [0u8; 16];
    for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    bytes
}

fn address<T>(value: *const T) -> u64 {
    value.expose_provenance() as u64
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is one of the two structs above, laid out as the kernel's union begins; the kernel reads and
    // writes at most its size, and every address in it is that of a buffer the caller keeps alive.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// Loads a traffic-control classifier. It lives as long as the descriptor or a filter that uses it.
///
/// # Errors
/// [`LoadError`] with the verifier's log.
///
/// # Panics
/// When the program is empty or has more than 4,096 instructions.
pub fn load_classifier(name: &str, program: &[Insn]) -> Result<OwnedFd, LoadError> {
    assert!(
        !program.is_empty() && program.len() <= 4096,
        "a program has 1 to 4,096 instructions"
    );
    // None of the helpers in use is reserved to GPL programs, so the licence is our own.
    let license = c"Apache-2.0 OR MIT";
    let mut log = vec![0u8; LOG_BYTES];
    let mut attr = LoadAttr {
        program_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_count: u32::try_from(program.len()).expect("checked above"),
        insns: address(program.as_ptr()),
        license: address(license.as_ptr()),
        log_level: 1,
        log_bytes: u32::try_from(LOG_BYTES).expect("a small constant"),
        log: log.as_mut_ptr().expose_provenance() as u64,
        kernel_version: 0,
        flags: 0,
        name: object_name(name),
    };
    match bpf(BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => {
            let fd = libc::c_int::try_from(fd).expect("descriptors are ints");
            // SAFETY: the kernel has just made this descriptor for us (close-on-exec), and nobody else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        Err(source) => {
            let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
            Err(LoadError {
                source,
                log: String::from_utf8_lossy(&log[..end]).into_owned(),
            })
        }
    }
}

/// How many `tcx` programs sit on the ingress of an interface. They run before every classic filter.
/// A kernel without tcx (before 6.6) has none.
///
/// # Errors
/// The error of bpf(2), such as `EPERM`, or `ENODEV` when the interface is gone.
pub fn tcx_ingress_count(interface_index: u32) -> io::Result<u32> {
    let mut attr = QueryAttr {
        target_ifindex: interface_index,
        attach_type: BPF_TCX_INGRESS,
        ..QueryAttr::default()
    };
    match bpf(BPF_PROG_QUERY, &mut attr) {
        Ok(_) => Ok(attr.program_count),
        // ENOENT: nothing attached. EINVAL: a kernel that has never heard of tcx.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(0),
        Err(error) => Err(error),
    }
}

/// The number by which netlink messages name a program: its descriptor.
pub fn descriptor_number(program: &OwnedFd) -> u32 {
    u32::try_from(program.as_raw_fd()).expect("open descriptors are not negative")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_the_verifier_refuses_is_an_error_with_its_words() {
        // r0 is never set: "R0 !read_ok".
        let error = load_classifier("bad", &[Insn::exit()]).unwrap_err();
        assert!(
            error.log.contains("R0") || error.source.raw_os_error() == Some(libc::EPERM),
            "{error:?}"
        );
    }

    #[test]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        assert_eq!(size_of::<Insn>(), 8);
        assert_eq!(
            Insn::load_u32(2, 1, 8),
            Insn {
                code: 0x61,
                registers: 0x12,
                offset: 8,
                immediate: 0
            }
        );
    }
}
