//! What can be measured: one file a family.

mod codec;
mod digest;
mod epoch;
mod host;
mod kvm;
mod memory;
mod restart;
mod transport;
mod wire;

use serde::de::DeserializeOwned;

use crate::run::{Run, Unable};

/// Something that can be measured, with its settings from a plan.
pub(crate) trait Measure {
    /// Measures, and reports each value with [`Run::found`].
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
        name: "transport",
        about: "our QUIC transport on loopback, against bare TCP",
        parse: parse::<transport::Loopback>,
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
        name: "host.takeover",
        about: "until all VMs of a dead host serve again, against the first of them",
        parse: parse::<host::Takeover>,
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
];

fn parse<T: Measure + DeserializeOwned + 'static>(settings: toml::Table) -> Parsed {
    Ok(Box::new(settings.try_into::<T>()?))
}

/// All names, for a message.
pub(crate) fn names() -> String {
    ALL.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ")
}

/// What is wrong with a setting that must be within limits.
fn outside(key: &str, value: u64, least: u64, most: u64) -> Option<String> {
    let wrong = !(least..=most).contains(&value);
    wrong.then(|| format!("{key} = {value}: it must be {least} to {most}"))
}
