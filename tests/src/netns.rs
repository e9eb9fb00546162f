//! Hosts made of network namespaces, and the switch between them.

use std::fmt::{Display, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use romulus_host_sys::tap::Tap;

use crate::links::Links;
use crate::namespace::{self, within};

/// The guest's tap on the primary.
pub const TAP: &str = "tap0";
/// The bridge of the primary and of the backup.
pub const BRIDGE: &str = "br0";
/// The bridge that is the switch.
const SWITCH: &str = "sw0";
/// A host's card.
const CARD: &str = "eth0";
/// The guest's IPv4 address.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The guest's IPv6 address.
pub const GUEST_IP6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);

/// A host of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// Where the guest's clients are.
    Client,
    /// Where the guest runs first.
    Primary,
    /// Where it runs after a failover.
    Backup,
    /// Where the witness runs.
    Witness,
}

impl Host {
    /// Every host.
    pub const ALL: [Host; 4] = [Host::Client, Host::Primary, Host::Backup, Host::Witness];

    /// Its name, which is also what its daemons are told that their host is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Host::Client => "client",
            Host::Primary => "primary",
            Host::Backup => "backup",
            Host::Witness => "witness",
        }
    }

    /// The last part of its addresses.
    fn number(self) -> u8 {
        match self {
            Host::Client => 1,
            Host::Primary => 11,
            Host::Backup => 12,
            Host::Witness => 13,
        }
    }

    /// Its address.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        Ipv4Addr::new(10, 77, 0, self.number()).into()
    }

    /// Its IPv6 address.
    fn ip6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number().into())
    }

    /// Its port on the switch.
    #[must_use]
    pub fn port(self) -> String {
        format!("p-{}", self.name())
    }
}

impl Display for Host {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The namespaces of one lab. Dropping it kills what runs in them, and removes them.
#[derive(Debug)]
pub struct Net {
    prefix: String,
}

impl Net {
    /// Builds the lab's network, after removing what an earlier one of this prefix left.
    ///
    /// # Errors
    /// When the kernel refuses, most often for want of rights.
    pub fn build(prefix: &str) -> Result<Net> {
        let net = Net {
            prefix: prefix.to_owned(),
        };
        net.clean();
        for name in net.names() {
            namespace::make(&name)?;
        }
        net.wire_switch()?;
        for host in Host::ALL {
            net.wire_host(host)?;
        }
        Ok(net)
    }

    /// The namespace of a host.
    #[must_use]
    pub fn namespace(&self, host: Host) -> String {
        format!("{}-{}", self.prefix, host.name())
    }

    /// The namespace of the switch.
    #[must_use]
    pub fn switch(&self) -> String {
        format!("{}-switch", self.prefix)
    }

    /// Moves the calling thread, and what it starts and opens from now on, to `host`.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn enter(&self, host: Host) -> Result<()> {
        namespace::enter(&self.namespace(host))
    }

    /// Cuts a host's cable, or plugs it in again.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn set_cable(&self, host: Host, plugged: bool) -> Result<()> {
        within(&self.switch(), || Links::open()?.switch(&host.port(), plugged))
    }

    /// Lets no more than so many bytes a second come to a host.
    ///
    /// # Errors
    /// When the namespace is gone, or the kernel cannot do it.
    pub fn slow_down(&self, host: Host, bytes_a_second: u32) -> Result<()> {
        within(&self.switch(), || {
            Links::open()?.slow_down(&host.port(), bytes_a_second)
        })
    }

    /// Kills what runs in namespaces of this prefix, and removes them.
    pub fn clean_prefix(prefix: &str) {
        Net::clean(&Net {
            prefix: prefix.to_owned(),
        });
    }

    fn names(&self) -> Vec<String> {
        let mut names = vec![self.switch()];
        names.extend(Host::ALL.map(|host| self.namespace(host)));
        names
    }

    fn clean(&self) {
        for name in self.names() {
            namespace::remove(&name);
        }
    }

    fn wire_switch(&self) -> Result<()> {
        within(&self.switch(), || {
            let mut links = Links::open()?;
            links.switch("lo", true)?;
            links.add_bridge(SWITCH)?;
            links.switch(SWITCH, true)
        })
    }

    fn wire_host(&self, host: Host) -> Result<()> {
        let (port, inside) = (host.port(), self.namespace(host));
        let other_end = namespace::open(&inside)?;
        within(&self.switch(), || {
            let mut links = Links::open()?;
            links.add_cable(&port, CARD, &other_end)?;
            links.join(&port, SWITCH)?;
            links.switch(&port, true)
        })?;
        within(&inside, || {
            let mut links = Links::open()?;
            links.switch("lo", true)?;
            links.switch(CARD, true)?;
            let speaks = match host {
                Host::Primary | Host::Backup => {
                    links.add_bridge(BRIDGE)?;
                    links.join(CARD, BRIDGE)?;
                    links.switch(BRIDGE, true)?;
                    BRIDGE
                }
                Host::Client | Host::Witness => CARD,
            };
            links.add_address(speaks, host.ip(), 24)?;
            links.add_address(speaks, host.ip6().into(), 64)?;
            if host == Host::Primary {
                let tap = Tap::create(TAP, false).with_context(|| format!("cannot make the tap {TAP}"))?;
                tap.persist().context("cannot keep the tap")?;
                links.join(TAP, BRIDGE)?;
                links.switch(TAP, true)?;
            }
            Ok(())
        })
        .with_context(|| format!("cannot wire {host}"))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.clean();
    }
}
