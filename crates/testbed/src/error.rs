//! What can go wrong when a machine is built, and what its operator can do about it.

use std::io;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::loader::LoadError;

/// A call that KVM refused.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused {call}: {source}")]
pub struct KvmCall {
    call: &'static str,
    source: kvm_ioctls::Error,
}

impl KvmCall {
    /// Gives the result of a call its name.
    ///
    /// # Errors
    /// The call's own.
    pub fn of<T>(call: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, Self> {
        result.map_err(|source| KvmCall { call, source })
    }

    /// A call that did less than it was asked to.
    #[must_use]
    pub fn refused(call: &'static str) -> Self {
        KvmCall {
            call,
            source: kvm_ioctls::Error::new(libc::EINVAL),
        }
    }
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No KVM.
    #[error(
        "there is no /dev/kvm: load the kernel's module (kvm_intel, kvm_amd or kvm_pvm), switch virtualization on in the firmware, or, in a virtual machine or container, have its host pass it through"
    )]
    NoKvm,
    /// KVM, but not for us.
    #[error(
        "/dev/kvm may not be opened by this user: add it to the group that owns /dev/kvm (often 'kvm'), or run as root"
    )]
    KvmForbidden,
    /// Another trouble with KVM.
    #[error("/dev/kvm can't be opened: {0}")]
    Kvm(kvm_ioctls::Error),
    /// A call of KVM's.
    #[error(transparent)]
    Call(#[from] KvmCall),
    /// The machine as it is described.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The guest.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Memory, state or tracking.
    #[error("{0}")]
    Library(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A file of the operator's.
    #[error("{what} {path}: {source}", path = path.display())]
    File {
        /// What it was to be.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A tap.
    #[error("tap {name}: {hint} ({source})")]
    Tap {
        /// Name of the interface.
        name: String,
        /// What to do.
        hint: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Taps and network cards are not equally many.
    #[error("the machine has {nics} network cards, but {taps} taps were named: give one --tap for each")]
    Taps {
        /// Network cards.
        nics: usize,
        /// Taps.
        taps: usize,
    },
    /// The memory that was given is not that of the machine that was described.
    #[error("the memory's regions are not those of the machine: {0}")]
    Regions(String),
    /// The guest's file is another one than the machine began with.
    #[error(
        "the guest was started from another file (CRC {want:#x}, here {got:#x}): it can't be reset here, start its VMM with the same --guest"
    )]
    OtherGuest {
        /// Of the file here.
        got: u32,
        /// Of the file that the machine began with.
        want: u32,
    },
    /// A disk's file is smaller than the disk.
    #[error(
        "the file of disk {index} has {got} bytes, the machine's disk has {want}: give the disk that the machine ran with"
    )]
    Disk {
        /// Which disk, from 0.
        index: usize,
        /// Bytes of the file.
        got: u64,
        /// Bytes of the disk.
        want: u64,
    },
    /// The system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

impl BuildError {
    /// Gives an error of the attach library a place here.
    pub fn library(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        BuildError::Library(Box::new(error))
    }

    /// Gives an error of the system the name of what was tried.
    pub fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| BuildError::System { what, source }
    }
}
