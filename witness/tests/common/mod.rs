//! A real witness in a process of its own, and hosts that ask it over loopback.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use romulus_protocol::{Answer, Ask, Mode, Record, WitnessRequest};
use romulus_telemetry::AdminClient;
use romulus_transport::pki::{self, Validity};
use romulus_transport::{Endpoint, Identity, Network, PeerAddress, Service, WitnessClient};
use romulus_types::{Epoch, HostId, Nonce, Session, Term, VmId, WitnessInstance};
use tempfile::TempDir;

pub const HOSTS: [&str; 3] = ["a", "b", "witness"];

/// Certificates, a store, and a port that was free.
pub struct Place {
    pub dir: TempDir,
    pub listen: SocketAddr,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let days = Validity::days(30).unwrap();
        pki::init(&dir.path().join("pki"), "test CA", days).unwrap();
        for host in HOSTS {
            pki::issue(
                &dir.path().join("pki"),
                &format!("{host},127.0.0.1").parse().unwrap(),
                days,
            )
            .unwrap();
        }
        // Free again when the socket is dropped; nothing else on this machine takes ports in a hurry.
        let listen = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Self { dir, listen }
    }

    pub fn with_store() -> Self {
        let place = Self::new();
        let made = place.witness(&["init"]);
        assert!(made.status.success(), "{made:?}");
        place
    }

    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn admin(&self) -> PathBuf {
        self.dir.path().join("admin.sock")
    }

    /// Runs a verb of the witness on this store to its end.
    pub fn witness(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_witness"))
            .args(arguments)
            .args(["--dir".as_ref(), self.store().as_os_str()])
            .output()
            .unwrap()
    }

    /// Starts the daemon; `fault` arms a point.
    pub fn start(&self, fault: Option<&str>) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_witness"));
        command.args(["run", "--listen", &self.listen.to_string()]);
        // Several witnesses are tried at once here; who wants metrics asks the socket.
        command.args(["--metrics-listen", "none"]);
        command
            .arg("--dir")
            .arg(self.store())
            .arg("--admin")
            .arg(self.admin());
        command.arg("--pki").arg(self.dir.path().join("pki/witness"));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        if let Some(fault) = fault {
            command.env("ROMULUS_FAULT", fault);
        }
        Daemon {
            child: command.spawn().unwrap(),
        }
    }

    pub async fn start_and_wait(&self, fault: Option<&str>) -> Daemon {
        let daemon = self.start(fault);
        let admin = AdminClient::new(self.admin()).with_timeout(Duration::from_secs(1));
        for _ in 0..200 {
            if admin.get("/v1/status").await.is_ok() {
                return daemon;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the witness did not start: {}", daemon.kill_and_read());
    }

    pub fn endpoint(&self, host: &str) -> Endpoint {
        let identity = Identity::load(&self.dir.path().join("pki").join(host)).unwrap();
        Endpoint::client(&identity, &Network::default(), Service::Witness, None).unwrap()
    }

    pub fn address(&self) -> PeerAddress {
        self.listen.to_string().parse().unwrap()
    }

    pub fn client(&self, host: &str) -> WitnessClient {
        WitnessClient::new(Arc::new(self.endpoint(host)), vec![self.address()])
    }
}

pub struct Daemon {
    pub child: Child,
}

impl Daemon {
    pub fn kill_and_read(mut self) -> String {
        use std::io::Read as _;
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut text = String::new();
        let _ = self.child.stderr.take().unwrap().read_to_string(&mut text);
        text
    }

    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Waits for the end of a daemon that is about to end.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        for _ in 0..500 {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the witness did not end");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn vm() -> VmId {
    VmId::new("web").unwrap()
}

pub fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

pub fn request(from: &str, nonce: u128, ask: Ask) -> WitnessRequest {
    WitnessRequest {
        vm: vm(),
        host: host(from),
        nonce: Nonce(nonce),
        ask,
    }
}

pub fn change(instance: WitnessInstance, term: u64, mode: Mode) -> Ask {
    Ask::Change {
        instance,
        term: Term(term),
        mode,
    }
}

pub fn alone(name: &str) -> Mode {
    Mode::Alone { host: host(name) }
}

pub fn paired() -> Mode {
    Mode::Paired {
        primary: host("a"),
        backup: host("b"),
        session: Session(u128::MAX - 1),
        first_epoch: Epoch(1),
    }
}

/// The record in an answer that is a grant.
pub fn granted(answer: &Answer) -> &Record {
    match answer {
        Answer::Granted(record) => record,
        other => panic!("not granted: {other:?}"),
    }
}
