//! The gate's interfaces, qdiscs and filters: putting them in place, closing, checking, and taking every trace away.
//!
//! What there is on the guest's tap, in its ingress direction:
//!
//! - the *gate filter*, chain 0, priority 1, while the gate is closed;
//! - the *owner filter*, in a chain of its own that no frame ever visits, from `prepare` on. Its name says which relay
//!   belongs to the gate and whether the clsact qdisc is ours, so that a later process can tidy up what this one left.
//!
//! Nothing is pinned and no bpf_link is used: both filters outlive the process, the relay does not, and a frame
//! redirected to an interface that is gone is dropped. A crash leaves the guest mute.

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_route::RouteNetlinkMessage;
use romulus_host_sys::bpf::{self, load_classifier};
use romulus_host_sys::tap::Tap;

use crate::error::GateError;
use crate::netlink::Netlink;
use crate::programs;
use crate::tc::{self, Direction, Link, Place, SeenFilter};

/// The first filter to run.
const GATE_PRIORITY: u16 = 1;
/// A chain that no filter sends frames to ("ROM").
const OWNER_CHAIN: u32 = 0x52_4f4d;
const GATE_NAME: &str = "romulus-gate";
/// Name of the filter that lets what is written to a tap of ours arrive at the guest's.
pub(crate) const INJECTOR_NAME: &str = "romulus-in";
const OWNER_PREFIX: &str = "romulus-owner-1";
/// Frames that wait in the kernel while the relay thread is not running.
const RELAY_QUEUE_FRAMES: u32 = 8192;

fn netlink_error(what: &'static str) -> impl FnOnce(io::Error) -> GateError {
    move |source| GateError::Netlink { what, source }
}

/// What the owner filter's name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    relay: u32,
    added_clsact: bool,
}

impl Owner {
    fn to_name(self) -> String {
        format!("{OWNER_PREFIX}:{}:{}", self.relay, u8::from(self.added_clsact))
    }

    fn from_name(name: &str) -> Option<Self> {
        let (relay, added) = name
            .strip_prefix(OWNER_PREFIX)?
            .strip_prefix(':')?
            .split_once(':')?;
        let relay = relay
            .parse()
            .ok()
            .filter(|index| *index <= i32::MAX.cast_unsigned())?;
        Some(Self {
            relay,
            added_clsact: added == "1",
        })
    }
}

fn gate_place(tap: u32) -> Place {
    Place {
        interface: tap,
        direction: Direction::Ingress,
        chain: 0,
        priority: GATE_PRIORITY,
    }
}

fn owner_place(tap: u32) -> Place {
    Place {
        chain: OWNER_CHAIN,
        ..gate_place(tap)
    }
}

fn is_gate(filter: &SeenFilter) -> bool {
    filter.chain == 0 && filter.name.as_deref() == Some(GATE_NAME)
}

fn owner_of(filters: &[SeenFilter]) -> Option<Owner> {
    let names = filters
        .iter()
        .filter(|f| f.chain == OWNER_CHAIN)
        .filter_map(|f| f.name.as_deref());
    names.filter_map(Owner::from_name).next()
}

/// The interface, when it is a tap.
pub(crate) fn find_tap(netlink: &mut Netlink, tap: &str) -> Result<Link, GateError> {
    let link = tc::link_named(netlink, tap).map_err(|source| match source.raw_os_error() {
        Some(libc::ENODEV | libc::ERANGE | libc::EINVAL) => GateError::NoSuchTap { tap: tap.to_owned() },
        _ => GateError::Netlink {
            what: "look the guest's tap up",
            source,
        },
    })?;
    if link.is_tap {
        return Ok(link);
    }
    let kind = if link.kind.is_empty() {
        "physical or loopback".into()
    } else {
        link.kind
    };
    Err(GateError::NotATap {
        tap: tap.to_owned(),
        kind,
    })
}

/// A new tap whose frames, when written, go where the filter sends them that `ingress` makes for its place.
pub(crate) fn make_injector(
    netlink: &mut Netlink,
    name: &str,
    guest: &Link,
    ingress: impl FnOnce(Place) -> RouteNetlinkMessage,
) -> Result<(Tap, Link), GateError> {
    let tap = Tap::create(name, true).map_err(|source| GateError::MakeTap {
        name: name.to_owned(),
        source,
    })?;
    let link = tc::link_named(netlink, tap.name()).map_err(netlink_error("look our tap up"))?;
    silence_ipv6(tap.name());
    tc::add_clsact(netlink, link.index).map_err(netlink_error("add clsact to our tap"))?;
    tc::add_filter(netlink, ingress(gate_place(link.index)))
        .map_err(netlink_error("add the filter to our tap that returns frames"))?;
    let outward = Place {
        direction: Direction::Egress,
        ..gate_place(link.index)
    };
    let program = load_classifier("romulus_relay", &programs::at_relay_egress())?;
    tc::add_filter(netlink, tc::filter_message(outward, &program, "romulus-out"))
        .map_err(netlink_error("add a filter to our tap"))?;
    tc::set_no_queue(netlink, link.index).map_err(netlink_error("set our tap's queue"))?;
    tc::bring_up(netlink, link.index, guest.mtu, RELAY_QUEUE_FRAMES)
        .map_err(netlink_error("bring our tap up"))?;
    Ok((tap, link))
}

/// Keeps the host's own IPv6 off a tap of ours. Only to save work: what the host sends there is dropped anyway,
/// so a read-only /proc/sys, or a kernel without IPv6, does no harm.
fn silence_ipv6(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(error) = std::fs::write(&path, "1") {
        tracing::debug!(%path, %error, "IPv6 stays on on our own tap");
    }
}

/// Everything of a gate but the frames.
#[derive(Debug)]
pub(crate) struct Plumbing {
    netlink: Netlink,
    tap: Link,
    relay: Link,
    added_clsact: bool,
    owner_placed: bool,
    closed: bool,
    close_message: RouteNetlinkMessage,
    /// Named by number in `close_message`, so it must stay open.
    _gate_program: OwnedFd,
}

impl Plumbing {
    /// Makes the relay and puts everything in place but the gate filter.
    pub(crate) fn prepare(tap: &str, relay: &str) -> Result<(Self, Tap), GateError> {
        let mut netlink = Netlink::open().map_err(netlink_error("open a netlink socket"))?;
        let tap = find_tap(&mut netlink, tap)?;
        refuse_what_runs_before(&mut netlink, &tap)?;
        let returning = load_classifier("romulus_return", &programs::at_relay_ingress())?;
        let (relay_tap, relay) = make_injector(&mut netlink, relay, &tap, |place| {
            tc::take_to_ingress_message(place, &returning, INJECTOR_NAME, tap.index)
        })?;
        let program = load_classifier("romulus_gate", &programs::at_guest_tap(relay.index))?;
        let mut plumbing = Self {
            close_message: tc::filter_message(gate_place(tap.index), &program, GATE_NAME),
            _gate_program: program,
            netlink,
            tap,
            relay,
            added_clsact: false,
            owner_placed: false,
            closed: false,
        };
        // From here on, dropping `plumbing` undoes what was done.
        plumbing.follow_address(&plumbing.tap.address.clone())?;
        plumbing.claim()?;
        Ok((plumbing, relay_tap))
    }

    /// Gives the relay the Ethernet address of the guest's tap. Whether a frame is for this host or for another the kernel
    /// decides where it enters, which is the relay; and a tap that is routed rather than bridged gets frames for this host.
    fn follow_address(&mut self, address: &[u8]) -> Result<(), GateError> {
        if self.relay.address != address {
            tc::set_address(&mut self.netlink, self.relay.index, address)
                .map_err(netlink_error("give the relay the address of the guest's tap"))?;
            address.clone_into(&mut self.relay.address);
        }
        Ok(())
    }

    fn claim(&mut self) -> Result<(), GateError> {
        let tap = self.tap.index;
        self.added_clsact =
            tc::add_clsact(&mut self.netlink, tap).map_err(netlink_error("add clsact to the guest's tap"))?;
        let owner = Owner {
            relay: self.relay.index,
            added_clsact: self.added_clsact,
        };
        let nothing = load_classifier("romulus_owner", &programs::nothing())?;
        let message = tc::filter_message(owner_place(tap), &nothing, &owner.to_name());
        tc::add_filter(&mut self.netlink, message).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => GateError::InUse {
                tap: self.tap.name.clone(),
                relay: "another relay".into(),
            },
            _ => GateError::Netlink {
                what: "mark the guest's tap as gated",
                source,
            },
        })?;
        self.owner_placed = true;
        Ok(())
    }

    pub(crate) fn tap_name(&self) -> &str {
        &self.tap.name
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// One netlink message: from its answer on, every frame of the guest goes to the relay.
    pub(crate) fn close(&mut self) -> Result<(), GateError> {
        if self.closed {
            return Ok(());
        }
        tc::add_filter(&mut self.netlink, self.close_message.clone())
            .map_err(netlink_error("add the gate's filter to the guest's tap"))?;
        self.closed = true;
        Ok(())
    }

    /// Takes the gate filter away: the guest's frames go straight to its bridge.
    pub(crate) fn open(&mut self) -> Result<(), GateError> {
        if self.closed {
            remove_filter(&mut self.netlink, gate_place(self.tap.index))
                .map_err(netlink_error("remove the gate's filter"))?;
            self.closed = false;
        }
        Ok(())
    }

    /// Takes away what `prepare` put on the guest's tap.
    ///
    /// # Panics
    /// When the gate is closed: removing the qdisc would open it.
    pub(crate) fn remove(&mut self) -> Result<(), GateError> {
        assert!(!self.closed, "the gate is opened before it is removed");
        let owner = Owner {
            relay: self.relay.index,
            added_clsact: self.added_clsact,
        };
        if self.owner_placed {
            remove_owner(&mut self.netlink, self.tap.index, owner)?;
            self.owner_placed = false;
        } else if self.added_clsact {
            remove_clsact_if_empty(&mut self.netlink, self.tap.index)?;
        }
        self.added_clsact = false;
        Ok(())
    }

    /// Whether the gate still holds: our filter is there, and nothing has been put in front of it.
    pub(crate) fn check(&mut self) -> Result<(), GateError> {
        let lost = || GateError::FilterLost {
            tap: self.tap.name.clone(),
        };
        let found = tc::filters(&mut self.netlink, self.tap.index, Direction::Ingress)
            .map_err(netlink_error("list the filters of the guest's tap"))?;
        if self.closed && !found.iter().any(is_gate) {
            return Err(lost());
        }
        let tap = refuse_early_programs(&mut self.netlink, &self.tap.name)?;
        let relay = tc::link_numbered(&mut self.netlink, self.relay.index);
        relay.map_err(|source| GateError::RelayLost {
            relay: self.relay.name.clone(),
            source,
        })?;
        self.follow_address(&tap.address)
    }

    /// Frames that the kernel dropped on their way to the relay.
    pub(crate) fn kernel_drops(&mut self) -> u64 {
        tc::link_numbered(&mut self.netlink, self.relay.index).map_or(0, |link| link.tx_dropped)
    }
}

impl Drop for Plumbing {
    /// A gate that was never closed leaves nothing. A closed one stays: the guest is mute until somebody decides.
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        if let Err(error) = self.remove() {
            tracing::warn!(tap = %self.tap.name, %error, "traces of the gate are left on the tap");
        }
    }
}

/// XDP and tcx programs see frames before any filter does. Returns the tap, when there are none.
fn refuse_early_programs(netlink: &mut Netlink, tap: &str) -> Result<Link, GateError> {
    let runs_before = |what: &str| {
        Err(GateError::RunsBefore {
            tap: tap.to_owned(),
            what: what.to_owned(),
        })
    };
    let link = find_tap(netlink, tap)?;
    if link.has_xdp {
        return runs_before("an XDP program");
    }
    let tcx = bpf::tcx_ingress_count(link.index).map_err(netlink_error("ask for tcx programs"))?;
    if tcx > 0 {
        runs_before("a tcx program")
    } else {
        Ok(link)
    }
}

fn refuse_what_runs_before(netlink: &mut Netlink, tap: &Link) -> Result<(), GateError> {
    let found = tc::filters(netlink, tap.index, Direction::Ingress)
        .map_err(netlink_error("list the filters of the guest's tap"))?;
    if let Some(owner) = owner_of(&found) {
        return Err(match tc::link_numbered(netlink, owner.relay) {
            Ok(relay) => GateError::InUse {
                tap: tap.name.clone(),
                relay: relay.name,
            },
            Err(_) => GateError::Stale {
                tap: tap.name.clone(),
            },
        });
    }
    if found.iter().any(is_gate) {
        return Err(GateError::Stale {
            tap: tap.name.clone(),
        });
    }
    if found.iter().any(|f| f.chain == 0 && f.priority <= GATE_PRIORITY) {
        let what = format!("a filter of priority {GATE_PRIORITY}");
        return Err(GateError::RunsBefore {
            tap: tap.name.clone(),
            what,
        });
    }
    refuse_early_programs(netlink, &tap.name).map(drop)
}

/// Removes what a process that is gone has left on `tap`. Returns whether there was anything.
pub(crate) fn remove_stale(tap: &str) -> Result<bool, GateError> {
    let mut netlink = Netlink::open().map_err(netlink_error("open a netlink socket"))?;
    let tap = find_tap(&mut netlink, tap)?;
    let found = tc::filters(&mut netlink, tap.index, Direction::Ingress)
        .map_err(netlink_error("list the filters of the guest's tap"))?;
    let owner = owner_of(&found);
    if let Some(owner) = owner
        && let Ok(relay) = tc::link_numbered(&mut netlink, owner.relay)
    {
        return Err(GateError::InUse {
            tap: tap.name,
            relay: relay.name,
        });
    }
    let gated = found.iter().any(is_gate);
    if gated {
        remove_filter(&mut netlink, gate_place(tap.index)).map_err(netlink_error("remove a stale gate"))?;
    }
    if let Some(owner) = owner {
        remove_owner(&mut netlink, tap.index, owner)?;
    }
    Ok(gated || owner.is_some())
}

fn remove_owner(netlink: &mut Netlink, tap: u32, owner: Owner) -> Result<(), GateError> {
    remove_filter(netlink, owner_place(tap)).map_err(netlink_error("remove the mark of the gate"))?;
    if owner.added_clsact {
        remove_clsact_if_empty(netlink, tap)
    } else {
        Ok(())
    }
}

/// A qdisc that we added, but that others use by now, stays.
fn remove_clsact_if_empty(netlink: &mut Netlink, tap: u32) -> Result<(), GateError> {
    for direction in [Direction::Ingress, Direction::Egress] {
        match tc::filters(netlink, tap, direction) {
            Ok(filters) if filters.is_empty() => (),
            Ok(_) => return Ok(()),
            Err(error) => return ignore_missing(Err(error)).map_err(netlink_error("list filters")),
        }
    }
    let removed = match tc::remove_clsact(netlink, tap) {
        // What the kernel says of a handle that is not there: somebody has removed the qdisc already.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => ignore_missing(other),
    };
    removed.map_err(netlink_error("remove our clsact"))
}

/// Removes a filter of ours. When the kernel says no, because the qdisc under it went, for instance, what counts is whether
/// the filter is still there.
fn remove_filter(netlink: &mut Netlink, place: Place) -> io::Result<()> {
    let Err(refused) = tc::remove_filter(netlink, place) else {
        return Ok(());
    };
    let is_it = |f: &SeenFilter| f.chain == place.chain && f.priority == place.priority && f.name.is_some();
    match tc::filters(netlink, place.interface, place.direction) {
        Ok(found) if found.iter().any(is_it) => Err(refused),
        Ok(_) => Ok(()),
        Err(error) => ignore_missing(Err(error)),
    }
}

/// A tap or a qdisc that is gone by itself needs no removal.
fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_filters_name_says_what_a_later_process_needs() {
        for owner in [
            Owner {
                relay: 17,
                added_clsact: true,
            },
            Owner {
                relay: i32::MAX.cast_unsigned(),
                added_clsact: false,
            },
        ] {
            assert_eq!(Owner::from_name(&owner.to_name()), Some(owner));
        }
    }

    #[test]
    fn names_that_are_not_ours_are_left_alone() {
        for name in [
            "",
            "romulus-owner-1",
            "romulus-owner-1:x:1",
            "romulus-owner-1:4294967295:1",
            "romulus-owner-2:1:1",
        ] {
            assert_eq!(Owner::from_name(name), None, "{name}");
        }
    }
}
