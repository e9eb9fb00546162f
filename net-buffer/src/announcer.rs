//! Sending announcements so that they look like the guest's own.
//!
//! A frame written to the guest's tap reaches the guest, not the network, and one sent on an uplink would make the bridge learn
//! the guest's MAC on the wrong port. So the announcer has a tap of its own, whose frames are redirected to the *ingress*
//! of the guest's tap: they enter the bridge (or Open vSwitch, or a firewall) by the guest's port, which moves the MAC
//! there, and are flooded to the rest of the network. When that tap is gated, they are held like the guest's frames.

use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use romulus_host_sys::bpf::load_classifier;
use romulus_host_sys::tap::{Tap, VNET_HEADER_BYTES};
use rustix::event::{self, EventfdFlags, PollFd, PollFlags, Timespec};

use crate::announce;
use crate::error::GateError;
use crate::learn::LearntAddress;
use crate::netlink::Netlink;
use crate::plumbing;
use crate::programs;
use crate::tc;

/// Sends frames in the name of the guest behind one tap.
#[derive(Debug)]
pub struct Announcer {
    injector: Tap,
    guest_tap: String,
}

impl Announcer {
    /// Makes the injecting tap. The guest's tap must exist and be up, or the frames are lost; it can be made before
    /// the guest is activated, so that nothing but writing is left to do then.
    ///
    /// # Errors
    /// [`GateError`] when the tap does not exist or the kernel refuses.
    pub fn prepare(guest_tap: &str) -> Result<Self, GateError> {
        let mut netlink = Netlink::open().map_err(|source| GateError::Netlink {
            what: "open a netlink socket",
            source,
        })?;
        let guest = plumbing::find_tap(&mut netlink, guest_tap)?;
        let program = load_classifier("romulus_announce", &programs::to_guest_ingress(guest.index))?;
        let (injector, _) = plumbing::make_injector(&mut netlink, "romann%d", &guest, |place| {
            tc::filter_message(place, &program, plumbing::INJECTOR_NAME)
        })?;
        Ok(Self {
            injector,
            guest_tap: guest_tap.to_owned(),
        })
    }

    /// Announces `addresses` once. Returns the number of frames that the kernel took.
    pub fn announce(&self, addresses: &[LearntAddress]) -> usize {
        let mut taken = 0;
        for frame in announce::frames(addresses) {
            let mut bytes = vec![0; VNET_HEADER_BYTES];
            bytes.extend(frame);
            match rustix::io::write(&self.injector, &bytes) {
                Ok(_) => taken += 1,
                Err(error) => {
                    tracing::warn!(tap = %self.guest_tap, %error, "an announcement was not sent");
                }
            }
        }
        taken
    }

    /// Announces `addresses` by [`announce::schedule`], beginning now, on a thread of its own.
    ///
    /// # Errors
    /// [`GateError::Thread`].
    pub fn repeat(self, addresses: Vec<LearntAddress>) -> Result<Announcing, GateError> {
        let wake = event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| GateError::Thread(e.into()))?;
        let stop = wake.try_clone().map_err(GateError::Thread)?;
        let thread = std::thread::Builder::new()
            .name("announcer".into())
            .spawn(move || self.run(&addresses, &stop))
            .map_err(GateError::Thread)?;
        Ok(Announcing {
            wake,
            thread: Some(thread),
        })
    }

    fn run(&self, addresses: &[LearntAddress], stop: &OwnedFd) {
        let start = Instant::now();
        for at in announce::schedule() {
            if stopped_within(stop, at.saturating_sub(start.elapsed())) {
                return;
            }
            self.announce(addresses);
        }
    }
}

/// Waits for `time` or until it is told to stop.
fn stopped_within(stop: &OwnedFd, time: Duration) -> bool {
    let timeout = Timespec::try_from(time).expect("at most half a minute");
    let mut fds = [PollFd::new(stop, PollFlags::IN)];
    matches!(event::poll(&mut fds, Some(&timeout)), Ok(1..))
}

/// Announcements under way. Dropping it ends them.
#[derive(Debug)]
pub struct Announcing {
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Announcing {
    /// Whether the last announcement has been sent.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Announcing {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            tracing::warn!(%error, "announcements go on until their time is over");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the announcer panicked");
        }
    }
}
