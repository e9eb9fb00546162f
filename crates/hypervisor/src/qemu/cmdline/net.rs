//! Network backends: a tap becomes the standby's tap; SLIRP that was declared disposable stays, without its forwards.

use super::{CmdlineError, Derivation, Given, Props};

/// Keys of a tap that the guest's device can tell.
const TAP_KEYS: &[&str] = &[
    "type",
    "id",
    "queues",
    "vnet_hdr",
    "vhost",
    "vhostforce",
    "sndbuf",
    "poll-us", // the netdev's
    "model",
    "macaddr",
    "mac",
    "addr",
    "vectors",
    "name",
    "netdev", // the card's, in -nic
];
/// Keys of SLIRP that only shape what the guest sees.
const USER_KEYS: &[&str] = &[
    "type",
    "id",
    "net",
    "host",
    "restrict",
    "hostname",
    "dhcpstart",
    "dns",
    "ipv4",
    "ipv6",
    "ipv6-net",
    "ipv6-host",
    "ipv6-dns",
    "domainname",
    "model",
    "macaddr",
    "mac",
    "addr",
    "vectors",
    "name",
];

fn parse(given: &Given) -> Result<(Props, String), CmdlineError> {
    let props = Props::parse(given.value(), Some("type"))?;
    let kind = props.get("type").unwrap_or_default().to_owned();
    Ok((props, kind))
}

/// Whether this backend is a tap, as which a bridge counts: QEMU makes a tap on it.
pub(super) fn is_tap(given: &Given) -> Result<bool, CmdlineError> {
    let (_, kind) = parse(given)?;
    Ok(kind == "tap" || kind == "bridge")
}

impl Derivation<'_> {
    pub(super) fn net(&mut self, given: &Given) -> Result<(), CmdlineError> {
        self.net_given = true;
        let (props, kind) = parse(given)?;
        match kind.as_str() {
            "none" => self.keep(given),
            // The card of the legacy form; its address must be the primary's even where it was made up.
            "nic" if given.name == "net" => self.keep(given),
            "tap" | "bridge" => self.tap(given, props),
            "hubport" if given.name != "nic" => self.keep(given),
            "user" => self.user(given, props)?,
            "vhost-user" | "vhost-vdpa" => {
                return Err(given.refuse("its back end writes to memory unseen; use a tap"));
            }
            _ => return Err(given.refuse("its output is not gated; use a tap")),
        }
        Ok(())
    }

    fn tap(&mut self, given: &Given, mut props: Props) {
        // Queues that were handed over as file descriptors are counted.
        let queues = props.get("fds").map(|fds| fds.split(':').count());
        props.retain(TAP_KEYS);
        props.set("type", "tap");
        if let Some(queues) = queues {
            props.set("queues", queues.to_string());
        }
        let tap = &self.plan.taps[self.taps_used];
        self.taps_used += 1;
        props.set("ifname", tap);
        props.set("script", "no");
        props.set("downscript", "no");
        let id = props.get("id").unwrap_or("without id");
        self.changes.push(format!("network {id} is the tap {tap}"));
        let name = given.name.clone();
        self.put(&name, props.to_string());
    }

    fn user(&mut self, given: &Given, mut props: Props) -> Result<(), CmdlineError> {
        let id = props.get("id").unwrap_or("user").to_owned();
        if !self.is_disposable(&[&id, "user"]) {
            return Err(given.refuse("SLIRP's output is not gated; use a tap, or declare it disposable"));
        }
        let gone = props.retain(USER_KEYS);
        let without = if gone.is_empty() {
            String::new()
        } else {
            format!(", without {}", gone.join(", "))
        };
        self.changes.push(format!(
            "network {id} starts afresh{without}: it was declared disposable"
        ));
        let name = given.name.clone();
        self.put(&name, props.to_string());
        Ok(())
    }

    /// Without any network option QEMU makes a card on SLIRP.
    pub(super) fn default_net(&mut self) -> Result<(), CmdlineError> {
        if self.is_disposable(&["user", "default"]) || self.spec.nics.is_empty() {
            return Ok(());
        }
        Err(CmdlineError::Refused {
            option: "net (by default)".into(),
            why: "SLIRP's output is not gated; give -nic none or a tap, or declare \"user\" disposable"
                .into(),
        })
    }
}
