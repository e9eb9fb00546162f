//! Tap devices: a network interface whose other end is a file descriptor of ours.
//!
//! Every frame read or written is `[virtio-net header, 10 bytes][Ethernet frame]` when the tap was made with
//! `vnet_header`, so that segmentation-offload frames stay whole, and `[Ethernet frame]` otherwise.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Bytes of the virtio-net header in front of each frame of a tap with `vnet_header` (`struct virtio_net_hdr`).
pub const VNET_HEADER_BYTES: usize = 10;

/// Longest interface name in bytes, without the closing NUL (`IFNAMSIZ` - 1).
pub const INTERFACE_NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// `TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN`: known to every kernel in use.
const OFFLOADS_BASIC: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08;
/// `TUN_F_USO4 | TUN_F_USO6`: Linux 6.2 and later.
const OFFLOADS_UDP: libc::c_ulong = 0x20 | 0x40;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
/// `IFF_TUN_EXCL` (0x8000): fail when the interface exists, rather than attach to it.
const IFF_TUN_EXCL: libc::c_short = libc::c_short::MIN;

/// A tap interface that goes away when this value is dropped. Reads and writes do not block.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Makes a new tap in the network namespace of the calling thread. `name` may hold one `%d`, which the kernel
    /// replaces by the first free number. The interface starts down.
    ///
    /// # Errors
    /// `InvalidInput` when the name is empty or too long, `EBUSY` or `EEXIST` when it exists, `EPERM` without
    /// `CAP_NET_ADMIN`, `ENOENT` without `/dev/net/tun`.
    pub fn create(name: &str, vnet_header: bool) -> io::Result<Self> {
        let tap = Self::open(name, vnet_header, IFF_TUN_EXCL)?;
        tap.accept_offloads(vnet_header)
    }

    /// Like [`Tap::create`], but takes over a persistent tap of that name when there is one.
    ///
    /// # Errors
    /// As [`Tap::create`]; `EBUSY` when somebody else holds the tap.
    pub fn create_or_attach(name: &str, vnet_header: bool) -> io::Result<Self> {
        let tap = Self::open(name, vnet_header, 0)?;
        tap.accept_offloads(vnet_header)
    }

    /// Like [`Tap::create_or_attach`] with the header, but for a reader that takes only frames as they are on a wire:
    /// not longer than the MTU allows, with their checksums. Every header read is all zeros.
    ///
    /// # Errors
    /// As [`Tap::create_or_attach`].
    pub fn create_or_attach_without_offloads(name: &str) -> io::Result<Self> {
        let tap = Self::open(name, true, 0)?;
        // A persistent tap remembers what its last reader was able to take, and how long its header was.
        tap.set_offloads(0)?;
        tap.set_header_bytes(VNET_HEADER_BYTES)?;
        Ok(tap)
    }

    fn open(name: &str, vnet_header: bool, exclusive: libc::c_short) -> io::Result<Self> {
        if name.is_empty() || name.len() > INTERFACE_NAME_BYTES_MAX || name.contains(['\0', '/']) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not an interface name",
            ));
        }
        let device = rustix::fs::open(
            "/dev/net/tun",
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        let file = File::from(device);
        // SAFETY: `ifreq` is plain data for which all zeros is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let header = if vnet_header { IFF_VNET_HDR } else { 0 };
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | header | exclusive;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives until the call returns.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let name: Vec<u8> = request
            .ifr_name
            .iter()
            .take_while(|c| **c != 0)
            .map(|c| c.cast_unsigned())
            .collect();
        Ok(Self {
            file,
            name: String::from_utf8_lossy(&name).into_owned(),
        })
    }

    /// Tells the kernel that this end takes unsegmented frames, so that it does not cut them up for us. Without the
    /// header there is no way to say what a frame is, and nothing to tell.
    fn accept_offloads(self, vnet_header: bool) -> io::Result<Self> {
        if vnet_header {
            let all = self.set_offloads(OFFLOADS_BASIC | OFFLOADS_UDP);
            all.or_else(|_| self.set_offloads(OFFLOADS_BASIC))?;
        }
        Ok(self)
    }

    fn set_offloads(&self, offloads: libc::c_ulong) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a plain number.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, offloads) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Leaves the interface there when this value is dropped, for somebody else to attach to.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn persist(self) -> io::Result<()> {
        let on: libc::c_ulong = 1;
        // SAFETY: TUNSETPERSIST takes a plain number.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETPERSIST, on) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn set_header_bytes(&self, bytes: usize) -> io::Result<()> {
        let bytes = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads one `int`, which lives until the call returns.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The interface's name, with a `%d` replaced.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A second descriptor of the same tap. The interface lives until all of them are closed.
    ///
    /// # Errors
    /// The error of `dup`.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
