//! What can be measured: one file a family.

mod codec;
mod committed;
mod digest;
mod epoch;
mod faults;
mod gate;
mod host;
mod image;
mod kvm;
mod memory;
mod pair;
mod peers;
mod qemu;
mod restart;
mod scan;
mod transport;
mod wire;

pub(crate) use committed::{PEER, peer_main};
use serde::de::DeserializeOwned;

use crate::run::{Run, Unable};
use crate::scale::{Scale, ScaleCheck};

/// Something that can be measured, with its settings from a plan.
pub(crate) trait Measure {
    /// Measures, and reports each value with [`Run::found_at`].
    ///
    /// # Errors
    /// [`Unable`] when this machine cannot do it or it goes wrong; what was found before stays.
    fn run(&self, run: &mut Run) -> Result<(), Unable>;

    /// What is wrong with its settings, in words.
    fn problem(&self) -> Option<String> {
        None
    }
}

type Parsed = Result<Box<dyn Measure>, toml::de::Error>;

/// A kind of measure.
pub(crate) struct Kind {
    /// As a plan has it.
    pub(crate) name: &'static str,
    /// One line for `bench list`.
    pub(crate) about: &'static str,
    /// Reads its settings.
    pub(crate) parse: fn(toml::Table) -> Parsed,
}

/// Every kind.
pub(crate) const ALL: &[Kind] = &[
    Kind {
        name: "memory.copy",
        about: "copying scattered dirty pages, against one copy of as many bytes",
        parse: parse::<memory::Copy>,
    },
    Kind {
        name: "codec.page",
        about: "encoding and decoding a page against its previous version, against memcpy",
        parse: parse::<codec::PageCodec>,
    },
    Kind {
        name: "codec.session",
        about: "the whole encoding step of a session, against memcpy",
        parse: parse::<codec::Session>,
    },
    Kind {
        name: "codec.trace",
        about: "the encoding step on pages that guests wrote, against memcpy",
        parse: parse::<kvm::TraceSpeed>,
    },
    Kind {
        name: "codec.shrink",
        about: "what is left of pages that guests wrote, against whole pages",
        parse: parse::<kvm::Shrink>,
    },
    Kind {
        name: "memory.deltas",
        about: "bytes sent with few last versions kept, against all of them kept",
        parse: parse::<kvm::Deltas>,
    },
    Kind {
        name: "digest",
        about: "digests of pages, against memcpy",
        parse: parse::<digest::Digests>,
    },
    Kind {
        name: "wire.frames",
        about: "putting pages into frames and taking them out again, against memcpy",
        parse: parse::<wire::Frames>,
    },
    Kind {
        name: "wire.committed",
        about: "checkpoints until their commit in another process, against as many bare bytes",
        parse: parse::<committed::Committed>,
    },
    Kind {
        name: "image.commit",
        about: "staging, checking, committing and applying a checkpoint in the agent's image, against memcpy",
        parse: parse::<image::Commit>,
    },
    Kind {
        name: "transport",
        about: "our QUIC transport on loopback, against bare TCP",
        parse: parse::<transport::Loopback>,
    },
    Kind {
        name: "gate.frames",
        about: "holding frames and letting them go, against reading and writing them on taps",
        parse: parse::<gate::Throughput>,
    },
    Kind {
        name: "gate.latency",
        about: "how long a frame takes beyond its hold, against without a gate",
        parse: parse::<gate::Latency>,
    },
    Kind {
        name: "kvm.pause",
        about: "a checkpoint's pause, against the sum of its parts alone",
        parse: parse::<kvm::Pause>,
    },
    Kind {
        name: "kvm.activation",
        about: "from the takeover's decision to the running guest, against restoring its state alone",
        parse: parse::<kvm::Activation>,
    },
    Kind {
        name: "kvm.tracking",
        about: "what the default dirty tracking costs the guest, against the other ways",
        parse: parse::<kvm::Modes>,
    },
    Kind {
        name: "kvm.speed",
        about: "a guest's work while it is protected, against the same guest unprotected",
        parse: parse::<kvm::Speed>,
    },
    Kind {
        name: "kvm.clock",
        about: "how far the guest's clocks slip while it is protected, against unprotected",
        parse: parse::<kvm::Clock>,
    },
    Kind {
        name: "epoch.speed",
        about: "a sweep of epoch lengths and loads: a guest's work while it is really protected, against unprotected",
        parse: parse::<epoch::Shows<epoch::Speed>>,
    },
    Kind {
        name: "epoch.latency",
        about: "of the same sweep: what the guest's client waits for an answer, against unprotected",
        parse: parse::<epoch::Shows<epoch::Latency>>,
    },
    Kind {
        name: "epoch.pause",
        about: "of the same sweep: the guest's pause, against epochs of 25 ms",
        parse: parse::<epoch::Shows<epoch::Pause>>,
    },
    Kind {
        name: "epoch.on_time",
        about: "of the same sweep: epochs that began at most 2 ms late, against epochs of 25 ms",
        parse: parse::<epoch::Shows<epoch::OnTime>>,
    },
    Kind {
        name: "epoch.lag",
        about: "of the same sweep: from a capture to its commit, against epochs of 25 ms",
        parse: parse::<epoch::Shows<epoch::Lag>>,
    },
    Kind {
        name: "epoch.wire",
        about: "of the same sweep: what is sent in a second, against epochs of 25 ms",
        parse: parse::<epoch::Shows<epoch::Wire>>,
    },
    Kind {
        name: "epoch.cpu",
        about: "of the same sweep: what replicator and agent take of a core, against epochs of 25 ms",
        parse: parse::<epoch::Shows<epoch::Cpu>>,
    },
    Kind {
        name: "epoch.recommend",
        about: "of the same sweep: the length for at most 10 ms of added latency, and for a guest at most 10 % slower",
        parse: parse::<epoch::Recommend>,
    },
    Kind {
        name: "epoch.auto",
        about: "how long epochs.length = \"auto\" takes to follow a step of the load, with the length over time",
        parse: parse::<epoch::Auto>,
    },
    Kind {
        name: "advise.check",
        about: "what bench advise predicts of a guest, against what comes when it is protected",
        parse: parse::<epoch::Check>,
    },
    Kind {
        name: "harvest.large",
        about: "finding few dirty pages in a large guest's memory, against a small guest's",
        parse: parse::<kvm::Large>,
    },
    Kind {
        name: "harvest.scan",
        about: "finding few dirty pages in a large QEMU guest's memory, against the bare scan",
        parse: parse::<scan::Scan>,
    },
    Kind {
        name: "commit.latency",
        about: "from a protected guest's pause to the commit of its checkpoint",
        parse: parse::<pair::CommitLatency>,
    },
    Kind {
        name: "idle.cost",
        about: "processor time of replicator and agent for a protected guest that does nothing, against epochs that are all alike",
        parse: parse::<pair::idle::IdleCost>,
    },
    Kind {
        name: "idle.latency",
        about: "rare requests to a protected guest that does nothing else, against epochs that are all alike",
        parse: parse::<pair::idle::IdleLatency>,
    },
    Kind {
        name: "epochs.on-time",
        about: "epochs of a protected guest that begin late",
        parse: parse::<pair::OnTime>,
    },
    Kind {
        name: "link.slow",
        about: "a protected guest's pause on a link that is too slow, against a fast one",
        parse: parse::<pair::SlowLink>,
    },
    Kind {
        name: "host.ack",
        about: "from a checkpoint's last byte to its acknowledgement at an agent with many VMs, against one VM",
        parse: parse::<host::Ack>,
    },
    Kind {
        name: "host.cpu",
        about: "the agent's processor time for a committed page with many VMs, against one VM",
        parse: parse::<host::Cpu>,
    },
    Kind {
        name: "host.memory",
        about: "the agent's memory with many VMs, against the touched pages of their images",
        parse: parse::<host::Memory>,
    },
    Kind {
        name: "host.flood",
        about: "acknowledgements of VMs beside one that floods, against without it",
        parse: parse::<host::Flood>,
    },
    Kind {
        name: "host.late",
        about: "epochs of VMs beside one that floods that begin late, against without it",
        parse: parse::<host::Late>,
    },
    Kind {
        name: "host.strangers",
        about: "what the agent's memory grows by when strangers begin thousands of connections",
        parse: parse::<host::Strangers>,
    },
    Kind {
        name: "host.beset",
        about: "epochs of protected VMs that begin late while strangers beset their agent, against before",
        parse: parse::<host::Beset>,
    },
    Kind {
        name: "host.takeover",
        about: "until all VMs of a dead host serve again, against the first of them",
        parse: parse::<host::Takeover>,
    },
    Kind {
        name: "host.connections",
        about: "processor time of the agent's thread for all connections for an epoch of a VM, against one VM",
        parse: parse::<host::Connections>,
    },
    Kind {
        name: "host.restart",
        about: "until all VMs are protected again after systemd's restart of the agent and after its SIGKILL, against the agent's start alone",
        parse: parse::<restart::Restart>,
    },
    Kind {
        name: "host.resent",
        about: "memory that is sent again after a restart of the agent and after its SIGKILL",
        parse: parse::<restart::Resent>,
    },
    Kind {
        name: "host.pause",
        about: "the longest pause of a guest once its VM is protected again after a restart of the agent and after its SIGKILL",
        parse: parse::<restart::Pause>,
    },
    Kind {
        name: "fleet.faults",
        about: "invariants that faults break, injected into many VMs on one agent in the simulator",
        parse: parse::<faults::Faults>,
    },
    Kind {
        name: "peer.colo",
        about: "the pause of a checkpoint of a QEMU guest on KVM, against QEMU's own COLO",
        parse: parse::<peers::Colo>,
    },
    Kind {
        name: "peer.migration",
        about: "pause, first copy and bytes of a Linux guest under QEMU, against its plain live migration",
        parse: parse::<peers::Migration>,
    },
    Kind {
        name: "qemu.speed",
        about: "time of a guest of QEMU on KVM for its work while checkpoints of it are taken, against undisturbed",
        parse: parse::<peers::Speed>,
    },
    Kind {
        name: "codec.peers",
        about: "our encoding of pages, against LZ4, zstd and runs in the manner of XBZRLE on the same pages",
        parse: parse::<peers::CodecPeers>,
    },
    Kind {
        name: "scale",
        about: "a simulated fleet of many VMs on one backup host, by measured costs: where it saturates, against one VM",
        parse: parse::<Scale>,
    },
    Kind {
        name: "scale.check",
        about: "what the simulation says of an agent that was measured, against what was measured",
        parse: parse::<ScaleCheck>,
    },
];

fn parse<T: Measure + DeserializeOwned + 'static>(settings: toml::Table) -> Parsed {
    Ok(Box::new(settings.try_into::<T>()?))
}

/// All names, for a message.
pub(crate) fn names() -> String {
    ALL.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ")
}

/// What is wrong with a setting that must be within limits.
pub(crate) fn outside(key: &str, value: u64, least: u64, most: u64) -> Option<String> {
    let wrong = !(least..=most).contains(&value);
    wrong.then(|| format!("{key} = {value}: it must be {least} to {most}"))
}
