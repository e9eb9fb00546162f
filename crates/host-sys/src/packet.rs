//! A packet socket: every frame of one sender that comes *in* on an interface, with the kernel's time of its coming.
//!
//! The kernel filters (packet(7), classic BPF), so that other traffic on the interface costs nothing here.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Socket memory for frames that nobody has fetched yet, in bytes.
const BUFFER_BYTES: libc::c_int = 64 << 20;
/// All protocols (`ETH_P_ALL`), in network order.
const PROTOCOL_ALL: u16 = 3_u16.to_be();
/// `SKF_AD_OFF + SKF_AD_PKTTYPE` (linux/filter.h): where a filter finds which way a frame goes.
const FRAME_DIRECTION: u32 = 0xffff_f004;
/// What stands there for a frame that goes out (`PACKET_OUTGOING`).
const OUTGOING: u32 = 4;
/// Instructions of the filter.
const FILTER_STEPS: u16 = 8;
/// Room for the one control message that is asked for.
const CONTROL_BYTES: usize = 64;

/// A frame that was fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenFrame {
    /// When the kernel took it in: nanoseconds since 1970 by the real-time clock.
    pub at_ns: u64,
    /// Its length in bytes, which may be more than fits into the caller's buffer.
    pub bytes: usize,
}

/// An open capture.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    /// Begins to collect what `sender` sends on the interface of this index, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`, `ENODEV` when there is no such interface.
    pub fn open(interface: u32, sender: [u8; 6]) -> io::Result<Self> {
        // SAFETY: no pointers are passed; protocol 0 keeps everything out until the filter is in place.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        let opened = Self {
            // SAFETY: the call before returned this descriptor, and nobody else has it.
            socket: unsafe { OwnedFd::from_raw_fd(raw) },
        };
        opened.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &BUFFER_BYTES)?;
        opened.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1_i32)?;
        let mut program = incoming_from(sender);
        let filter = libc::sock_fprog {
            len: FILTER_STEPS,
            filter: program.as_mut_ptr(),
        };
        // The kernel copies the program during the call.
        opened.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;
        // SAFETY: `sockaddr_ll` is plain data for which all zeros is a valid value.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("families are small numbers");
        address.sll_protocol = PROTOCOL_ALL;
        address.sll_ifindex = i32::try_from(interface)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "not an interface's index"))?;
        // SAFETY: the address is a whole `sockaddr_ll`, and its length is told.
        let bound = unsafe {
            libc::bind(
                opened.socket.as_raw_fd(),
                (&raw const address).cast(),
                length_of::<libc::sockaddr_ll>(),
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(opened)
    }

    /// Fetches the next frame into `buffer`, as much of it as fits; none when there is none now.
    ///
    /// # Errors
    /// `ENETDOWN` once after the interface went down; others when it is gone.
    pub fn next(&self, buffer: &mut [u8]) -> io::Result<Option<SeenFrame>> {
        let mut part = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let mut control = [0_u64; CONTROL_BYTES / size_of::<u64>()];
        // SAFETY: `msghdr` is plain data for which all zeros is a valid value.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = CONTROL_BYTES;
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        // SAFETY: the message points at `buffer` and `control`, with their true lengths, and both outlive the call.
        let got = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, flags) };
        let Ok(bytes) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        };
        let at_ns = timestamp_ns(&message)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a frame without a time"))?;
        Ok(Some(SeenFrame { at_ns, bytes }))
    }

    /// How many frames were lost since the last call, because nobody fetched those before them.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn lost(&self) -> io::Result<u32> {
        // SAFETY: `tpacket_stats` is plain data for which all zeros is a valid value.
        let mut counted: libc::tpacket_stats = unsafe { zeroed() };
        let mut bytes = length_of::<libc::tpacket_stats>();
        // SAFETY: the kernel writes at most `bytes` bytes into `counted`, which is as large.
        let got = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut counted).cast(),
                &raw mut bytes,
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(counted.tp_drops)
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: the kernel reads one `T`, which the reference keeps alive, and is told its length.
        let set = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                length_of::<T>(),
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for PacketSocket {
    /// Readable when there is a frame.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The length of a `T`, as socket calls take it.
fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("socket options and addresses are small")
}

/// The time in the control messages that came with a frame.
fn timestamp_ns(message: &libc::msghdr) -> Option<u64> {
    // SAFETY: the kernel has filled the control buffer of this message, and the macro stays within its length.
    let first = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if first.cmsg_level != libc::SOL_SOCKET || first.cmsg_type != libc::SCM_TIMESTAMPNS {
        return None;
    }
    // SAFETY: a message of this type holds one `timespec`, perhaps not aligned.
    let time: libc::timespec = unsafe { libc::CMSG_DATA(first).cast::<libc::timespec>().read_unaligned() };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(u64::try_from(time.tv_nsec).ok()?)
}

/// Everything that does not go out and whose source address, the bytes 6 to 11, is `sender`.
fn incoming_from(sender: [u8; 6]) -> [libc::sock_filter; FILTER_STEPS as usize] {
    // BPF_LD | BPF_ABS with BPF_B, BPF_H, BPF_W; BPF_JMP | BPF_JEQ | BPF_K; BPF_RET | BPF_K.
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_WORD: u16 = 0x20;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let [a, b, c, d, e, f] = sender;
    [
        step(LOAD_BYTE, 0, 0, FRAME_DIRECTION),
        step(IF_EQUAL, 5, 0, OUTGOING),
        step(LOAD_WORD, 0, 0, 6),
        step(IF_EQUAL, 0, 3, u32::from_be_bytes([a, b, c, d])),
        step(LOAD_HALF, 0, 0, 10),
        step(IF_EQUAL, 0, 1, u32::from_be_bytes([0, 0, e, f])),
        step(RETURN, 0, 0, u32::MAX),
        step(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program on a frame, as the kernel does (linux/filter.h); only what [`incoming_from`] uses.
    fn accepts(program: &[libc::sock_filter], direction: u32, frame: &[u8]) -> bool {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            let from = usize::try_from(step.k).unwrap();
            match step.code {
                0x30 => {
                    accumulator = if step.k == FRAME_DIRECTION {
                        direction
                    } else {
                        u32::from(frame[from])
                    }
                }
                0x28 => {
                    accumulator = u32::from(u16::from_be_bytes(frame[from..from + 2].try_into().unwrap()))
                }
                0x20 => accumulator = u32::from_be_bytes(frame[from..from + 4].try_into().unwrap()),
                0x15 => at += usize::from(if accumulator == step.k { step.jt } else { step.jf }),
                0x06 => return step.k > 0,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn only_what_comes_in_from_the_sender_is_taken() {
        let sender = [0x52, 0x54, 0, 0x77, 0, 2];
        let program = incoming_from(sender);
        let mut frame = [0_u8; 60];
        frame[6..12].copy_from_slice(&sender);
        for direction in 0..4 {
            assert!(accepts(&program, direction, &frame), "{direction}");
        }
        assert!(!accepts(&program, OUTGOING, &frame));
        for byte in 6..12 {
            let mut other = frame;
            other[byte] ^= 1;
            assert!(!accepts(&program, 0, &other), "byte {byte}");
        }
    }
}
