//! Accepts primaries: reads their `Hello`, checks it, and hands them to the driver of their VM.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use romulus_hypervisor::spec::MachineSpec;
use romulus_protocol::Hello;
use romulus_transport::{CloseCode, Connection, Control, Endpoint, FrameReader, SendStream};
use romulus_types::HostId;
use romulus_wire::{FrameType, decode_message};
use tracing::{debug, warn};

use crate::admission::Admission;
use crate::inbox::Input;
use crate::registry::Registry;
use crate::session::{Asking, SessionIn, refuse_early};

/// How long a primary may take to say what it wants: QEMU may have to stream a large guest's memory before it can.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);

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
        let hello = tokio::time::timeout(HELLO_TIMEOUT, Self::hello(&connection)).await;
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
            self.registry.refused_count().count();
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
            Err(error) => {
                self.registry.refused_count().count();
                refuse_early(session, sender, connection, &format!("{error:#}")).await;
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
        vm.inbox
            .send(input)
            .await
            .map_err(|_| anyhow!("the driver of this VM is gone"))
    }

    async fn check(
        &self,
        connection: &Connection,
        hello: &Hello,
    ) -> anyhow::Result<(crate::registry::VmHandle, MachineSpec)> {
        ensure!(
            *connection.peer() == hello.primary,
            "the certificate is that of {}, the hello says {}",
            connection.peer(),
            hello.primary
        );
        let machine = MachineSpec::from_json(&hello.machine).context("the machine's description")?;
        let held = self.registry.image_bytes_except(&hello.vm);
        let own = self.registry.touched_bytes(&hello.vm);
        let admission = Arc::clone(&self.admission);
        // Files are read and compared: off the event loop.
        let (machine, admitted) = tokio::task::spawn_blocking(move || {
            let admitted = admission.check(&machine, held, own);
            (machine, admitted)
        })
        .await?;
        admitted?;
        let vm = self.registry.vm(&hello.vm, Some(&machine))?;
        Ok((vm, machine))
    }
}
