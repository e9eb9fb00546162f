//! Hosts made of network namespaces, and the switch between them.

use std::fmt::{Display, Formatter};
use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The guest's tap on the primary.
pub const TAP: &str = "tap0";
/// The bridge of the primary and of the backup.
pub const BRIDGE: &str = "br0";
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
    /// When `ip` is missing or refuses, most often for want of rights.
    pub fn build(prefix: &str) -> Result<Net> {
        let net = Net {
            prefix: prefix.to_owned(),
        };
        net.clean();
        for name in net.names() {
            ip(&["netns", "add", &name])?;
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
        enter(&self.namespace(host))
    }

    /// Cuts a host's cable, or plugs it in again.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn set_cable(&self, host: Host, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        ip(&["-n", &self.switch(), "link", "set", &host.port(), state])
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
            // What is not there needs no removing: failures are the usual case of a first run.
            for pid in pids(&name) {
                let _ = kill_process(pid, Signal::KILL);
            }
            let _ = Command::new("ip")
                .args(["netns", "del", &name])
                .stderr(Stdio::null())
                .status();
        }
    }

    fn wire_switch(&self) -> Result<()> {
        batch(
            &self.switch(),
            "link set lo up\nlink add sw0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0\nlink set sw0 up\n",
        )
    }

    fn wire_host(&self, host: Host) -> Result<()> {
        let (port, number) = (host.port(), host.number());
        let namespace = self.namespace(host);
        batch(
            &self.switch(),
            &format!(
                "link add {port} type veth peer name eth0 netns {namespace}\n\
                 link set {port} master sw0\nlink set {port} up\n"
            ),
        )?;
        let addresses = |device: &str| {
            format!(
                "addr add 10.77.0.{number}/24 dev {device}\naddr add fd77::{number}/64 dev {device} nodad\n"
            )
        };
        let inside = match host {
            Host::Primary | Host::Backup => format!(
                "link add {BRIDGE} type bridge forward_delay 0 stp_state 0 mcast_snooping 0\n\
                 link set eth0 master {BRIDGE}\nlink set eth0 up\nlink set {BRIDGE} up\n{}",
                addresses(BRIDGE)
            ),
            Host::Client | Host::Witness => format!("link set eth0 up\n{}", addresses("eth0")),
        };
        batch(&namespace, &format!("link set lo up\n{inside}"))?;
        if host == Host::Primary {
            batch(
                &namespace,
                &format!(
                    "tuntap add dev {TAP} mode tap\nlink set {TAP} master {BRIDGE}\nlink set {TAP} up\n"
                ),
            )?;
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.clean();
    }
}

/// Moves the calling thread to the namespace of this name.
pub(crate) fn enter(namespace: &str) -> Result<()> {
    let path = format!("/run/netns/{namespace}");
    let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter {path}"))
}

fn pids(namespace: &str) -> Vec<Pid> {
    let Ok(out) = Command::new("ip")
        .args(["netns", "pids", namespace])
        .stderr(Stdio::null())
        .output()
    else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.split_whitespace()
        .filter_map(|word| Pid::from_raw(word.parse().ok()?))
        .collect()
}

fn ip(words: &[&str]) -> Result<()> {
    let out = Command::new("ip")
        .args(words)
        .output()
        .context("cannot start `ip`; install iproute2 (`cargo xtask setup` does)")?;
    if !out.status.success() {
        bail!(
            "`ip {}` failed: {}; the lab needs root and network namespaces",
            words.join(" "),
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(())
}

/// Many `ip` commands at once, in one namespace.
fn batch(namespace: &str, script: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", namespace, "-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start `ip`; install iproute2 (`cargo xtask setup` does)")?;
    let mut stdin = child
        .stdin
        .take()
        .ok_or_else(|| anyhow!("ip has no standard input"))?;
    stdin.write_all(script.as_bytes()).context("cannot write to ip")?;
    drop(stdin);
    let out = child.wait_with_output().context("cannot wait for ip")?;
    if !out.status.success() {
        bail!(
            "`ip` failed in {namespace}: {}\n{script}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(())
}

/// Does something on a thread of its own in the namespace; what it opens there stays there.
///
/// # Errors
/// When the namespace is gone, or what `work` says.
pub(crate) fn within<T: Send>(namespace: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(namespace)?;
            work()
        });
        thread
            .join()
            .map_err(|_| anyhow!("a thread in {namespace} panicked"))?
    })
}
