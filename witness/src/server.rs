//! Requests from the network: who asks is checked against the certificate, then the desk answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use romulus_daemon::AllowList;
use romulus_protocol::{Answer, WitnessReply, WitnessRequest};
use romulus_transport::{CloseCode, Connection, Control, FrameReader};
use romulus_types::Session;
use romulus_wire::{FrameType, decode_message, encode_message};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::desk::Desk;
use crate::fault;
use crate::store::StoreError;

/// A request must have arrived this long after its stream began.
const REQUEST_MAX: Duration = Duration::from_secs(5);

/// What has become of requests.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    answered: [AtomicU64; ANSWERS.len()],
    bad: [AtomicU64; BAD.len()],
}

/// Kinds of answers.
const ANSWERS: [&str; 6] = [
    "granted",
    "refused",
    "unknown_vm",
    "wrong_instance",
    "current",
    NOT_ALLOWED,
];
/// The settings do not allow the host to ask for the VM; it is told `unknown_vm`.
const NOT_ALLOWED: &str = "not_allowed";
/// Why requests are refused unanswered.
const BAD: [&str; 5] = ["other_host", "other_nonce", "late", "empty", "malformed"];

impl Counts {
    fn count_answer(&self, answer: &Answer) {
        let position = match answer {
            Answer::Granted(_) => 0,
            Answer::Refused(_) => 1,
            Answer::UnknownVm => 2,
            Answer::WrongInstance(_) => 3,
            Answer::Current(_) => 4,
        };
        self.answered[position].fetch_add(1, Ordering::Relaxed);
    }

    fn count_not_allowed(&self) {
        self.answered[ANSWERS.len() - 1].fetch_add(1, Ordering::Relaxed);
    }

    fn count_bad(&self, error: &Bad) {
        let position = match error {
            Bad::OtherHost { .. } => 0,
            Bad::OtherNonce => 1,
            Bad::Late => 2,
            Bad::Empty => 3,
            Bad::Frame(_) | Bad::Wire(_) => 4,
        };
        self.bad[position].fetch_add(1, Ordering::Relaxed);
    }

    /// Answers given.
    pub(crate) fn answered(&self) -> u64 {
        self.answers().map(|(_, count)| count).sum()
    }

    /// Answers of one kind.
    pub(crate) fn of(&self, kind: &str) -> u64 {
        self.answers()
            .find(|(name, _)| *name == kind)
            .map_or(0, |(_, count)| count)
    }

    /// Answers given, by kind.
    pub(crate) fn answers(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        ANSWERS.into_iter().zip(self.answered.iter().map(load))
    }

    /// Requests refused unanswered, by cause.
    pub(crate) fn bad(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        BAD.into_iter().zip(self.bad.iter().map(load))
    }
}

fn load(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

/// What a connection's tasks share.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) desk: Arc<Desk>,
    pub(crate) counts: Arc<Counts>,
    /// Which host may ask for which VMs.
    pub(crate) allow: AllowList,
    /// Where an error of the store goes; the process ends with it.
    pub(crate) fatal: mpsc::Sender<StoreError>,
}

/// Why a connection is not worth having.
#[derive(Debug, thiserror::Error)]
enum Bad {
    #[error("the request asks for {asked}, the certificate is that of {certified}")]
    OtherHost { asked: String, certified: String },
    #[error("the request's nonce is not its frame's")]
    OtherNonce,
    #[error("the request did not arrive in time")]
    Late,
    #[error("the stream ended before the request")]
    Empty,
    #[error(transparent)]
    Frame(#[from] romulus_transport::FrameError),
    #[error(transparent)]
    Wire(#[from] romulus_wire::WireError),
}

impl Server {
    /// Serves a connection until it ends. QUIC bounds the streams, hence the tasks, of each.
    pub(crate) async fn serve(self, connection: Connection) {
        debug!(host = %connection.peer(), "connected");
        while let Ok(control) = connection.accept_control().await {
            let (server, connection) = (self.clone(), connection.clone());
            tokio::spawn(async move {
                if let Err(error) = server.request(&connection, control).await {
                    server.refuse(&connection, &error);
                }
            });
        }
    }

    fn refuse(&self, connection: &Connection, error: &Bad) {
        if matches!(error, Bad::Frame(romulus_transport::FrameError::Transport(_))) {
            return;
        }
        self.counts.count_bad(error);
        warn!(host = %connection.peer(), %error, "a request was refused");
        let code = match error {
            Bad::OtherHost { .. } => CloseCode::IDENTITY,
            _ => CloseCode::BAD_INPUT,
        };
        connection.close(code, &error.to_string());
    }

    async fn request(&self, connection: &Connection, control: Control) -> Result<(), Bad> {
        let Control { mut sender, receiver } = control;
        let mut reader = FrameReader::first_frame(receiver, FrameType::WitnessRequest);
        let frame = tokio::time::timeout(REQUEST_MAX, reader.next())
            .await
            .map_err(|_| Bad::Late)??;
        let frame = frame.ok_or(Bad::Empty)?;
        let request: WitnessRequest = decode_message(FrameType::WitnessRequest, &frame)?;
        if request.host != *connection.peer() {
            let (asked, certified) = (request.host.to_string(), connection.peer().to_string());
            return Err(Bad::OtherHost { asked, certified });
        }
        if frame.session != Session(request.nonce.0) {
            return Err(Bad::OtherNonce);
        }
        let reply = if self.allow.allows(&request.host, &request.vm) {
            let Some(reply) = self.ask_desk(request.clone()).await else {
                return Ok(());
            };
            self.note(&request, &reply);
            reply
        } else {
            self.not_allowed(&request)
        };
        let bytes = encode_message(FrameType::WitnessReply, frame.session, &reply)?;
        // An asker that is gone asks again.
        if sender.send(bytes).await.is_ok() && sender.finish_and_flush().await.is_ok() {
            fault::point("reply.sent");
        }
        Ok(())
    }

    /// For a host that has no business with a VM there is no such VM. The connection stays: others of the host's VMs use it.
    fn not_allowed(&self, request: &WitnessRequest) -> WitnessReply {
        self.counts.count_not_allowed();
        let WitnessRequest { vm, host, nonce, .. } = request;
        warn!(event = "not_allowed", %vm, %host, "the settings do not allow this host to ask for this VM (allow)");
        WitnessReply {
            vm: vm.clone(),
            nonce: *nonce,
            answer: Answer::UnknownVm,
        }
    }

    /// The desk's answer, off this thread, as it waits for the disk. `None` when the process is to end.
    async fn ask_desk(&self, request: WitnessRequest) -> Option<WitnessReply> {
        let desk = self.desk.clone();
        let answer = tokio::task::spawn_blocking(move || desk.answer(&request)).await;
        match answer.expect("the desk does not panic") {
            Ok(reply) => reply,
            Err(error) => {
                // Full only when another error is on its way already.
                let _ = self.fatal.try_send(error);
                None
            }
        }
    }

    fn note(&self, request: &WitnessRequest, reply: &WitnessReply) {
        self.counts.count_answer(&reply.answer);
        let (vm, host) = (&request.vm, &request.host);
        match &reply.answer {
            Answer::Granted(record) => {
                info!(event = "grant", %vm, %host, term = record.term.0, mode = ?record.mode);
            }
            Answer::Refused(record) => {
                info!(event = "refusal", %vm, %host, term = record.term.0, mode = ?record.mode);
            }
            Answer::UnknownVm => info!(event = "unknown_vm", %vm, %host),
            Answer::WrongInstance(instance) => info!(event = "wrong_instance", %vm, %host, %instance),
            Answer::Current(record) => debug!(%vm, %host, term = record.term.0, "read"),
        }
    }
}
