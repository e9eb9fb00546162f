//! Accepts primaries: reads their `Hello`, checks it, and hands them to the driver of their VM.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use romulus_daemon::AllowList;
use romulus_hypervisor::spec::MachineSpec;
use romulus_protocol::{Answer, Hello, RefuseReason};
use romulus_transport::{CloseCode, Connection, Control, Endpoint, FrameReader, SendStream};
use romulus_types::HostId;
use romulus_wire::{FrameType, decode_message};
use tokio::sync::mpsc::error::SendError;
use tracing::{debug, warn};

use crate::admission::Admission;
use crate::inbox::Input;
use crate::refusals::Refused;
use crate::registry::{Registry, VmHandle};
use crate::session::{Asking, SessionIn, refuse_early, words};

const GIVEN_UP: &str = "the backup gave this VM up and begins with it again; try again";

/// Why a hello is refused before the protocol is asked.
struct Refusal {
    cause: Refused,
    error: anyhow::Error,
    /// The same hello may succeed later without an operator.
    passing: bool,
}

impl Refusal {
    fn lasting(cause: Refused, error: anyhow::Error) -> Self {
        Self {
            cause,
            error,
            passing: false,
        }
    }
}

/// What the listener works with.
pub struct Listener {
    /// The QUIC endpoint.
    pub endpoint: Arc<Endpoint>,
    /// The VMs of this agent.
    pub registry: Registry,
    /// What may be backed up here.
    pub admission: Arc<Admission>,
    /// This host.
    pub host: HostId,
    /// Which host may have which VMs backed up here.
    pub allow: AllowList,
    /// How long a host that has connected may take to say what it wants.
    pub hello_timeout: Duration,
    /// How long the witness may take to say whether a host that says hello runs a VM that is new here.
    pub witness_wait: Duration,
}

impl Listener {
    /// Accepts until the endpoint is closed.
    pub async fn run(self: Arc<Self>) {
        loop {
            match self.endpoint.accept().await {
                Ok(connection) => {
                    let this = Arc::clone(&self);
                    tokio::spawn(async move { this.serve(connection).await });
                }
                Err(error) => return debug!(%error, "no further connections"),
            }
        }
    }

    async fn serve(&self, connection: Connection) {
        let peer = connection.peer().clone();
        let hello = tokio::time::timeout(self.hello_timeout, Self::hello(&connection)).await;
        let result = match hello.map_err(|_| anyhow!("it did not say hello in time")) {
            Ok(Ok((hello, sender, reader))) => self.consider(connection.clone(), hello, sender, reader).await,
            Ok(Err(error)) | Err(error) => Err(error),
        };
        if let Err(error) = result {
            warn!(
                event = "refused",
                peer = peer.as_str(),
                error = format!("{error:#}")
            );
            self.registry.refused_count().count(Refused::Hello);
            connection.close(CloseCode::BAD_INPUT, &format!("{error:#}"));
        }
    }

    async fn hello(connection: &Connection) -> anyhow::Result<(Hello, SendStream, FrameReader)> {
        let Control { sender, receiver } = connection.accept_control().await?;
        let mut reader = FrameReader::first_frame(receiver, FrameType::Hello);
        let frame = reader
            .next()
            .await?
            .context("the stream ended before the hello")?;
        let hello: Hello = decode_message(FrameType::Hello, &frame)?;
        ensure!(
            hello.session == frame.session,
            "the hello names another session than its frame"
        );
        Ok((hello, sender, reader))
    }

    /// Checks what must hold before the protocol is asked, and passes the session on.
    async fn consider(
        &self,
        connection: Connection,
        hello: Hello,
        sender: SendStream,
        reader: FrameReader,
    ) -> anyhow::Result<()> {
        let session = hello.session;
        let checked = self.check(&connection, &hello).await;
        let (vm, machine) = match checked {
            Ok(checked) => checked,
            Err(Refusal {
                cause,
                error,
                passing,
            }) => {
                self.registry.refused_count().count(cause);
                refuse_early(session, sender, connection, &format!("{error:#}"), passing).await;
                return Ok(());
            }
        };
        let asking = Asking {
            session,
            primary: hello.primary.clone(),
            term: hello.term,
            machine: Arc::new(machine),
            connection,
            sender,
            reader,
            backup: self.host.clone(),
            refused: self.registry.refused_count().clone(),
        };
        let session = Box::new(SessionIn::new(asking, Arc::clone(&vm.status)));
        let Hello {
            primary,
            term,
            instance,
            ..
        } = hello;
        let input = Input::Hello {
            session,
            primary,
            term,
            instance,
        };
        if let Err(SendError(Input::Hello { session, .. })) = vm.inbox.send(input).await {
            session.refuse(GIVEN_UP, true);
        }
        Ok(())
    }

    async fn check(
        &self,
        connection: &Connection,
        hello: &Hello,
    ) -> Result<(VmHandle, MachineSpec), Refusal> {
        if *connection.peer() != hello.primary {
            let error = anyhow!(
                "the certificate is that of {}, the hello says {}",
                connection.peer(),
                hello.primary
            );
            return Err(Refusal::lasting(Refused::Identity, error));
        }
        if !self.allow.allows(&hello.primary, &hello.vm) {
            let error = anyhow!(
                "this backup's settings do not allow {} to have {} backed up here (allow)",
                hello.primary,
                hello.vm
            );
            return Err(Refusal::lasting(Refused::NotAllowed, error));
        }
        // Nothing is made for a VM that only the hello knows of. A VM that is here is the protocol's to judge.
        if !self.registry.has(&hello.vm) {
            self.ask_witness(hello).await?;
        }
        let refused = |error| Refusal::lasting(Refused::Admission, error);
        let (vm, machine) = self.admit(hello).await.map_err(refused)?;
        if vm.inbox.is_closed() {
            return Err(Refusal {
                cause: Refused::GivenUp,
                error: anyhow!(GIVEN_UP),
                passing: true,
            });
        }
        Ok((vm, machine))
    }

    /// Whether the witness's record names the host that says hello, in the term that it says.
    async fn ask_witness(&self, hello: &Hello) -> Result<(), Refusal> {
        let asked = tokio::time::timeout(self.witness_wait, self.registry.read_record(&hello.vm)).await;
        let silent = |cause: anyhow::Error| Refusal {
            cause: Refused::WitnessSilent,
            error: cause.context(words(RefuseReason::WitnessSilent)),
            passing: true,
        };
        let not_named = |reason| Refusal {
            cause: Refused::NotNamed,
            error: anyhow!(words(reason)),
            passing: true,
        };
        let answer = match asked {
            Ok(answer) => answer.map_err(silent)?,
            Err(late) => return Err(silent(late.into())),
        };
        match answer {
            Answer::Current(record) if record.names_alone(&hello.primary, hello.instance, hello.term) => {
                Ok(())
            }
            Answer::Current(record) if record.instance == hello.instance => {
                Err(not_named(RefuseReason::NotNamed))
            }
            Answer::UnknownVm => Err(not_named(RefuseReason::NotNamed)),
            _ => Err(not_named(RefuseReason::OtherWitness)),
        }
    }

    /// What must be there to back this machine up.
    async fn admit(&self, hello: &Hello) -> anyhow::Result<(VmHandle, MachineSpec)> {
        let machine = MachineSpec::from_json(&hello.machine).context("the machine's description")?;
        let admission = Arc::clone(&self.admission);
        // Files are read and compared: off the event loop.
        let (machine, admitted) = tokio::task::spawn_blocking(move || {
            let admitted = admission.check_machine(&machine);
            (machine, admitted)
        })
        .await?;
        admitted?;
        let vm = self.registry.admit(&hello.vm, &machine, &self.admission)?;
        Ok((vm, machine))
    }
}
