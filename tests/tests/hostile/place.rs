//! Certificates, ports and the two daemons, as an operator would start them.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use romulus_e2e::Paths;
use romulus_host_sys::child::die_with_thread;
use romulus_protocol::{Answer, Ask, Record, WitnessRequest};
use romulus_transport::{Endpoint, Identity, Network, PeerAddress, Service, WitnessClient};
use romulus_types::{HostId, Nonce, VmId};
use serde_json::Value;
use tempfile::TempDir;

/// How much a daemon's peak may grow under attack. The agent's worst case is one device state of 64 MiB that is received
/// whole before staging refuses it, one connection's window of 16 MiB that nobody reads, and a frame for each stream.
pub const GROWTH_BYTES_MAX: u64 = 160 << 20;
/// What the agent is told to stage at most, in bytes.
pub const STAGING_MIB: u64 = 8;
/// Longer than anything here takes; a wait that ends by it has failed.
pub const SOON: Duration = Duration::from_secs(60);

/// Requests of this process to its witnesses.
static NONCES: AtomicU64 = AtomicU64::new(1);

/// A daemon as a child process. Dropping it kills it.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    base_bytes: u64,
}

impl Daemon {
    fn start(dir: &Path, name: &str, arguments: &[&str]) -> Daemon {
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).unwrap();
        let mut command = Command::new(Paths::here().binary(name).unwrap());
        command.args(arguments).stdin(Stdio::null());
        command.stdout(out.try_clone().unwrap()).stderr(out);
        let child = die_with_thread(&mut command).spawn().unwrap();
        Daemon {
            child,
            log,
            base_bytes: 0,
        }
    }

    /// All that it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The most memory that it has had at once.
    fn peak_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Growth is counted from here.
    pub fn note_memory(&mut self) {
        self.base_bytes = self.peak_bytes();
    }

    /// It lives, and has not grown past [`GROWTH_BYTES_MAX`].
    pub fn assert_well(&mut self, case: &str) {
        self.assert_grown_less_than(GROWTH_BYTES_MAX, case);
    }

    /// It lives, and has not grown past `bytes_max`. Gives by how much it has.
    pub fn assert_grown_less_than(&mut self, bytes_max: u64, case: &str) -> u64 {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{case}: the daemon ended ({status}):\n{}", self.log());
        }
        let growth = self.peak_bytes().saturating_sub(self.base_bytes);
        assert!(growth < bytes_max, "{case}: it grew by {} KiB", growth >> 10);
        growth
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A folder with everything, and where the daemons listen.
pub struct Place {
    pub dir: TempDir,
    pub agent_at: SocketAddr,
    pub witness_at: SocketAddr,
}

impl Place {
    /// Certificates for the hosts, of one CA, and for the same names of another.
    pub fn new() -> Place {
        let dir = tempfile::Builder::new().prefix("romhost").tempdir().unwrap();
        for pki in ["pki", "other-pki"] {
            let mut command = Command::new(Paths::here().binary("romulus").unwrap());
            command.args(["pki", "init", "--dir"]).arg(dir.path().join(pki));
            for host in ["primary", "other", "backup", "witness"] {
                command.args(["--host", &format!("{host},127.0.0.1")]);
            }
            let made = command.output().unwrap();
            assert!(made.status.success(), "{made:?}");
        }
        let [agent_at, witness_at] = free_ports();
        Place {
            dir,
            agent_at,
            witness_at,
        }
    }

    /// A path in the folder, as text.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub async fn start_witness(&self) -> Daemon {
        let store = self.path("store");
        let witness = Paths::here().binary("witness").unwrap();
        let made = Command::new(witness)
            .args(["init", "--dir", &store])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        self.restart_witness().await
    }

    /// Starts the witness with the store that it has.
    pub async fn restart_witness(&self) -> Daemon {
        self.restart_witness_with("").await
    }

    /// The same with further settings.
    pub async fn restart_witness_with(&self, settings: &str) -> Daemon {
        let config = self.path("witness.toml");
        std::fs::write(&config, settings).unwrap();
        let store = self.path("store");
        let listen = self.witness_at.to_string();
        let (pki, admin) = (self.path("pki/witness"), self.path("witness.sock"));
        let arguments = [
            "run", "--config", &config, "--listen", &listen, "--dir", &store, "--pki", &pki, "--admin",
            &admin,
        ];
        self.up("witness", &arguments).await
    }

    /// The agent suspects nobody for 50 s: no takeover gets into the way of what is tried.
    pub async fn start_agent(&self) -> Daemon {
        self.start_agent_with("").await
    }

    /// The same with further settings.
    pub async fn start_agent_with(&self, settings: &str) -> Daemon {
        let config = self.path("agent.toml");
        std::fs::write(
            &config,
            format!("staging_bytes_max = \"{STAGING_MIB} MiB\"\nvms_max = 3\nhello_timeout = \"5s\"\nwitness_wait = \"5s\"\n\
                 {settings}\n[network]\nconnections_per_host_max = 6\nhandshake_timeout = \"10s\"\nidle_timeout = \"60s\"\n"),
        )
        .unwrap();
        let (listen, witness) = (self.agent_at.to_string(), self.witness_at.to_string());
        let (pki, admin) = (self.path("pki/backup"), self.path("backup-agent.sock"));
        let (images, state) = (self.path("images"), self.path("state"));
        let arguments = [
            "run",
            "--config",
            &config,
            "--host",
            "backup",
            "--listen",
            &listen,
            "--witness",
            &witness,
            "--pki",
            &pki,
            "--image-dir",
            &images,
            "--state-dir",
            &state,
            "--admin",
            &admin,
            "--cold",
            "--suspicion-timeout",
            "50s",
        ];
        self.up("backup-agent", &arguments).await
    }

    async fn up(&self, name: &str, arguments: &[&str]) -> Daemon {
        let mut daemon = Daemon::start(self.dir.path(), name, arguments);
        let began = Instant::now();
        while self.try_status(name).is_none() {
            assert!(began.elapsed() < SOON, "{name} is not up:\n{}", daemon.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        daemon.note_memory();
        daemon
    }

    /// Runs `romulus` with these words for a daemon, and gives whether it succeeded and what it said.
    pub fn romulus(&self, words: &[&str], name: &str) -> (bool, String) {
        let mut command = Command::new(Paths::here().binary("romulus").unwrap());
        command
            .args(words)
            .args(["--admin", &self.path(&format!("{name}.sock"))]);
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// What `romulus status --json` says of a daemon.
    pub fn status(&self, name: &str) -> Value {
        self.try_status(name).expect("the daemon answers its operator")
    }

    fn try_status(&self, name: &str) -> Option<Value> {
        let mut command = Command::new(Paths::here().binary("romulus").unwrap());
        command.args(["status", "--json", "--admin", &self.path(&format!("{name}.sock"))]);
        serde_json::from_slice(&command.output().unwrap().stdout).ok()
    }

    /// Registers a VM at the witness as running alone on `host`, and gives the record, also when it is there already.
    pub async fn register(&self, vm: &str, host: &str) -> Record {
        self.ask(vm, host, Ask::Register).await
    }

    /// One request of `host` to the witness; the record after it.
    pub async fn ask(&self, vm: &str, host: &str, ask: Ask) -> Record {
        let endpoint = Arc::new(client(&self.identity(host), Service::Witness));
        let witness = WitnessClient::new(endpoint, vec![peer(self.witness_at)]);
        let request = WitnessRequest {
            vm: VmId::new(vm).unwrap(),
            host: HostId::new(host).unwrap(),
            nonce: Nonce(u128::from(NONCES.fetch_add(1, Ordering::Relaxed))),
            ask,
        };
        match witness.ask(request).await.unwrap().answer {
            Answer::Granted(record) | Answer::Refused(record) | Answer::Current(record) => record,
            answer => panic!("{answer:?}"),
        }
    }

    /// A host's certificates, of the CA that the daemons trust.
    pub fn identity(&self, host: &str) -> Identity {
        Identity::load(&self.dir.path().join("pki").join(host)).unwrap()
    }
}

/// Free again when the sockets are dropped; nothing else takes ports in a hurry.
fn free_ports() -> [SocketAddr; 2] {
    let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap())
}

pub fn peer(address: SocketAddr) -> PeerAddress {
    address.to_string().parse().unwrap()
}

/// A client that gives no agent up because the machine is busy.
pub fn client(identity: &Identity, service: Service) -> Endpoint {
    let mut network = Network::default();
    if matches!(service, Service::Pair) {
        network.idle_timeout = SOON;
        network.handshake_timeout = SOON;
    }
    Endpoint::client(identity, &network, service, None).unwrap()
}
