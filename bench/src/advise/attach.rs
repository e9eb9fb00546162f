//! Holding on to a running guest without protecting it, and letting it go whatever happens.
//!
//! What speaks against protecting a guest (a network card that no gate holds, a disk that is not replicated) does not matter to
//! whoever only looks: it is declared disposable for this attachment, and told. What cannot be tracked stays refused.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use romulus_hypervisor::kvm::source as kvm;
use romulus_hypervisor::qemu::source as qemu;
use romulus_hypervisor::source::{Allowances, GuestSource, SourceError};

/// The word by which this program is its own guardian; see `main.rs`.
pub(crate) const GUARDIAN: &str = "guardian";

/// How a guest is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Socket {
    /// QEMU's QMP socket.
    Qmp(PathBuf),
    /// The attach socket of another VMM.
    Attach(PathBuf),
}

/// Which guest, and with what limits.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) socket: Socket,
    /// Taps that a gate would hold.
    pub(crate) taps: Vec<String>,
    /// Devices that are declared disposable.
    pub(crate) disposable: BTreeSet<String>,
    /// For the FIFO that QEMU opens.
    pub(crate) fifo_dir: PathBuf,
    pub(crate) pause_limit_ns: u64,
    pub(crate) checkpoint_pages_max: u64,
}

/// Why a guest cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("cannot attach to the QEMU at {}", socket.display())]
    Qemu {
        socket: PathBuf,
        #[source]
        source: Box<qemu::AttachError>,
    },
    #[error("cannot attach to the VMM at {}", socket.display())]
    Vmm {
        socket: PathBuf,
        #[source]
        source: Box<kvm::AttachError>,
    },
}

/// A guest that is held on to. It is let go when this is dropped.
pub(crate) struct Attached {
    source: Option<Box<dyn GuestSource>>,
    /// What would keep it from being protected as it is, in words.
    pub(crate) in_the_way: Vec<String>,
}

impl Attached {
    /// Attaches; the guest runs on.
    ///
    /// # Errors
    /// [`AttachError`]; nothing of the attempt stays behind.
    pub(crate) fn to(wanted: &Wanted) -> Result<Self, AttachError> {
        match &wanted.socket {
            Socket::Qmp(socket) => to_qemu(socket, wanted),
            Socket::Attach(socket) => to_vmm(socket, wanted),
        }
    }

    pub(crate) fn source(&mut self) -> &mut dyn GuestSource {
        self.source.as_mut().expect("it is there until the end").as_mut()
    }

    /// Leaves no trace in the hypervisor; the guest runs on.
    ///
    /// # Errors
    /// What was left behind.
    pub(crate) fn let_go(mut self) -> Result<(), SourceError> {
        self.source.take().expect("it is there until the end").detach()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(source) = self.source.take()
            && let Err(error) = source.detach()
        {
            eprintln!("letting the guest go left something behind: {error}");
        }
    }
}

fn to_qemu(socket: &Path, wanted: &Wanted) -> Result<Attached, AttachError> {
    let guardian = qemu::GuardianProgram {
        exe: "/proc/self/exe".into(),
        args: vec![GUARDIAN.to_owned()],
    };
    let options = |disposable: BTreeSet<String>| {
        let mut options = qemu::AttachOptions::new(socket, guardian.clone());
        options.taps.clone_from(&wanted.taps);
        options.allow = Allowances { disposable };
        options.fifo_dir.clone_from(&wanted.fifo_dir);
        options.pause_limit_ns = wanted.pause_limit_ns;
        options.checkpoint_pages_max = wanted.checkpoint_pages_max;
        options
    };
    let attach = |disposable| qemu::QemuSource::attach(options(disposable));
    let refused = |error: &qemu::AttachError| match error {
        qemu::AttachError::Refused(refusals) => Some(in_words(refusals, of_qemu)),
        _ => None,
    };
    whatever_it_has(wanted, attach, refused).map_err(|source| AttachError::Qemu {
        socket: socket.to_owned(),
        source: Box::new(source),
    })
}

fn to_vmm(socket: &Path, wanted: &Wanted) -> Result<Attached, AttachError> {
    let options = |disposable: BTreeSet<String>| {
        let mut options = kvm::AttachOptions::new(socket);
        options.taps.clone_from(&wanted.taps);
        options.allow = Allowances { disposable };
        options.pause_limit_ns = wanted.pause_limit_ns;
        options.checkpoint_pages_max = wanted.checkpoint_pages_max;
        options
    };
    let attach = |disposable| kvm::KvmSource::attach(options(disposable));
    let refused = |error: &kvm::AttachError| match error {
        kvm::AttachError::Refused(refusals) => Some(in_words(refusals, of_vmm)),
        _ => None,
    };
    whatever_it_has(wanted, attach, refused).map_err(|source| AttachError::Vmm {
        socket: socket.to_owned(),
        source: Box::new(source),
    })
}

/// Why a guest was refused, in words, and the ids under which what is in the way could be declared disposable.
type InTheWay = (Vec<String>, BTreeSet<String>);

fn in_words<R: ToString>(refusals: &[R], id_of: impl Fn(&R) -> Option<&str>) -> InTheWay {
    let ids = refusals.iter().filter_map(id_of).map(str::to_owned);
    (refusals.iter().map(ToString::to_string).collect(), ids.collect())
}

/// Attaches; when it is `refused`, once more with what was in the way declared disposable.
fn whatever_it_has<S: GuestSource + 'static, E>(
    wanted: &Wanted,
    attach: impl Fn(BTreeSet<String>) -> Result<S, E>,
    refused: impl Fn(&E) -> Option<InTheWay>,
) -> Result<Attached, E> {
    let (source, in_the_way) = match attach(wanted.disposable.clone()) {
        Ok(source) => (source, Vec::new()),
        Err(error) => {
            let (words, mut disposable) = refused(&error).ok_or(error)?;
            disposable.extend(wanted.disposable.iter().cloned());
            (attach(disposable)?, words)
        }
    };
    Ok(Attached {
        source: Some(Box::new(source)),
        in_the_way,
    })
}

/// The id under which what is refused could be declared disposable; `None` when it could not.
fn of_qemu(refusal: &qemu::Refusal) -> Option<&str> {
    match refusal {
        qemu::Refusal::UngatedDevice { id, .. }
        | qemu::Refusal::UngatedNetdev { id, .. }
        | qemu::Refusal::UngatedChardev { id, .. }
        | qemu::Refusal::WritableDisk { id, .. } => Some(id),
        _ => None,
    }
}

fn of_vmm(refusal: &kvm::Refusal) -> Option<&str> {
    match refusal {
        kvm::Refusal::Nic { name, .. } => Some(name),
        kvm::Refusal::Disk { id, .. } | kvm::Refusal::Output { id, .. } => Some(id),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_could_be_declared_disposable_is() {
        let refusals = [
            kvm::Refusal::Nic {
                name: "net0".to_owned(),
                on: "tap0".to_owned(),
            },
            kvm::Refusal::NoTracking,
            kvm::Refusal::Output {
                id: "serial".to_owned(),
                to: "a file".to_owned(),
            },
        ];
        let (words, ids) = in_words(&refusals, of_vmm);
        assert_eq!(words.len(), refusals.len(), "each is told");
        assert!(ids.iter().eq(["net0", "serial"]));
        let untracked = qemu::Refusal::UntrackedDma {
            device: "vfio-pci".to_owned(),
            id: "gpu".to_owned(),
        };
        assert_eq!(of_qemu(&untracked), None);
    }
}
