//! A guest's tap and a client's, with the gate between them or with a loop of reads and writes.
//!
//! ```text
//!   held:   guest ─► gg0 ═(filter)═► relay ─► Gate ─► relay ═► gg0 ─► gb0 ─► gc0 ─► client
//!   bare:   guest ─► bg0 ─► bb0 ─► bin0 ─► read, write ─► bout0 ─► bb1 ─► bc0 ─► client
//!   open:   guest ─► og0 ─► ob0 ─► oc0 ─► client
//! ```
//!
//! All of it is in a network namespace of the calling thread, which goes away with it.

use net_buffer::{Gate, GateOptions};
use romulus_e2e::links::Links;
use romulus_host_sys::netns;
use romulus_host_sys::tap::Tap;
use romulus_types::Epoch;

use crate::run::Unable;

/// Nothing larger comes from a tap.
const FRAME_BYTES_MAX: usize = 128 << 10;

/// The two ends of a way.
pub(super) struct Ends {
    pub(super) guest: Tap,
    pub(super) client: Tap,
}

/// The way through a closed gate.
pub(super) struct Held {
    pub(super) ends: Ends,
    gate: Gate,
    epoch: Epoch,
}

/// The way through a loop.
pub(super) struct Bare {
    pub(super) ends: Ends,
    inward: Tap,
    outward: Tap,
    frame: Vec<u8>,
}

/// Moves the calling thread to a network of its own.
pub(super) fn enter() -> Result<(), Unable> {
    netns::enter_new().map_err(|error| Unable::Missing {
        what: format!("no network namespace can be made ({error})"),
        remedy: "run it as root".to_owned(),
    })?;
    // The kernel's own words on every new interface would come among the frames.
    for which in ["all", "default"] {
        // Without IPv6 there is nothing to switch off.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
    Ok(())
}

/// A bridge with these taps.
fn bridge<const N: usize>(name: &str, taps: [&str; N]) -> Result<[Tap; N], Unable> {
    let mut links = Links::open().map_err(Unable::failed("opening a netlink socket"))?;
    links
        .add_bridge(name)
        .map_err(Unable::failed("making a bridge"))?;
    links
        .switch(name, true)
        .map_err(Unable::failed("making a bridge"))?;
    let mut made = Vec::with_capacity(N);
    for tap in taps {
        made.push(Tap::create(tap, true).map_err(Unable::failed("making a tap"))?);
        links
            .join(tap, name)
            .map_err(Unable::failed("putting a tap on a bridge"))?;
        links
            .switch(tap, true)
            .map_err(Unable::failed("switching a tap on"))?;
    }
    Ok(made.try_into().expect("as many as there are names"))
}

/// The way without anything between.
pub(super) fn open() -> Result<Ends, Unable> {
    let [guest, client] = bridge("ob0", ["og0", "oc0"])?;
    Ok(Ends { guest, client })
}

impl Held {
    pub(super) fn make() -> Result<Self, Unable> {
        let [guest, client] = bridge("gb0", ["gg0", "gc0"])?;
        let gate = Gate::prepare(&GateOptions::new("gg0")).map_err(Unable::failed("preparing the gate"))?;
        gate.close().map_err(Unable::failed("closing the gate"))?;
        Ok(Self {
            ends: Ends { guest, client },
            gate,
            epoch: Epoch::NONE,
        })
    }

    /// Ends an epoch: everything that the guest has sent is held.
    pub(super) fn barrier(&mut self) -> Result<(), Unable> {
        self.epoch = Epoch(self.epoch.0 + 1);
        self.gate
            .barrier(self.epoch)
            .map_err(Unable::failed("ending an epoch at the gate"))
    }

    /// Releases what was sent before the last barrier.
    pub(super) fn release(&self) -> Result<(), Unable> {
        self.gate
            .release(self.epoch)
            .map_err(Unable::failed("releasing an epoch"))
    }

    /// That so many frames are held.
    pub(super) fn ensure_holds(&self, frames: u64) -> Result<(), Unable> {
        let held = self.gate.stats().held_frames as u64;
        if held != frames {
            return Err(Unable::Wrong(format!("{held} frames are held, not {frames}")));
        }
        Ok(())
    }
}

impl Bare {
    pub(super) fn make() -> Result<Self, Unable> {
        let [guest, inward] = bridge("bb0", ["bg0", "bin0"])?;
        let [outward, client] = bridge("bb1", ["bout0", "bc0"])?;
        Ok(Self {
            ends: Ends { guest, client },
            inward,
            outward,
            frame: vec![0; FRAME_BYTES_MAX],
        })
    }

    /// Reads each frame that is there, and writes it.
    pub(super) fn pass_on(&mut self) -> Result<(), Unable> {
        loop {
            let bytes = match rustix::io::read(&self.inward, &mut self.frame[..]) {
                Ok(bytes) => bytes,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(Unable::failed("reading from a tap")(error)),
            };
            rustix::io::write(&self.outward, &self.frame[..bytes])
                .map_err(Unable::failed("writing to a tap"))?;
        }
    }
}
