//! Putting a standby's tap on the backup's bridge: down and apart while it waits, up and joined when it is activated.

use std::io;

use netlink_packet_route::RouteNetlinkMessage as Route;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use crate::error::GateError;
use crate::netlink::Netlink;
use crate::plumbing;
use crate::tc;

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> GateError {
    move |source| GateError::Netlink { what, source }
}

/// Makes `tap` a port of `bridge` and switches it on, in the network namespace of the caller.
///
/// # Errors
/// [`GateError`] when either does not exist or the kernel refuses.
pub fn join_bridge(tap: &str, bridge: &str) -> Result<(), GateError> {
    let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    let port = plumbing::find_tap(&mut netlink, tap)?;
    let bridge = tc::link_named(&mut netlink, bridge)
        .map_err(failed("look the bridge up (setting bridge of the agent)"))?;
    let mut message = LinkMessage::default();
    message.header.index = port.index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::Controller(bridge.index)];
    netlink
        .change(Route::SetLink(message), 0)
        .map_err(failed("put the standby's tap on the bridge"))
}

/// Whether there is an interface of this name.
///
/// # Errors
/// [`GateError`] when the kernel does not answer.
pub fn interface_exists(name: &str) -> Result<bool, GateError> {
    let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    match tc::link_named(&mut netlink, name) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(error) => Err(failed("look an interface up")(error)),
    }
}
