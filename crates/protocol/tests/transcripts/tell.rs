//! The machines' commands in words. Sessions are numbered as they appear; nonces are left out.

use romulus_protocol::{
    Ask, BackupCommand, BackupMessage, Mode, Notice, PrimaryCommand, PrimaryMessage, Protection,
};
use romulus_types::Session;

/// Numbers sessions in the order in which they appear.
#[derive(Default)]
pub(crate) struct Names {
    sessions: Vec<Session>,
}

impl Names {
    pub(crate) fn session(&mut self, session: Session) -> String {
        let found = self.sessions.iter().position(|known| *known == session);
        let position = found.unwrap_or_else(|| {
            self.sessions.push(session);
            self.sessions.len() - 1
        });
        format!("s{}", position + 1)
    }

    fn mode(&mut self, mode: &Mode) -> String {
        match mode {
            Mode::Alone { host } => format!("alone({host})"),
            Mode::Paired {
                primary,
                backup,
                session,
                first_epoch,
            } => {
                format!(
                    "paired({primary}, {backup}, {}, from epoch {first_epoch})",
                    self.session(*session)
                )
            }
            Mode::Ended => "ended".to_owned(),
        }
    }

    fn ask(&mut self, ask: &Ask) -> String {
        match ask {
            Ask::Read => "read".to_owned(),
            Ask::Register => "register".to_owned(),
            Ask::Change { term, mode, .. } => format!("term {term} -> {}", self.mode(mode)),
        }
    }

    fn notice(&mut self, notice: &Notice) -> String {
        match notice {
            Notice::Protection(protection) => words(*protection),
            Notice::Paired(term, epoch) => format!("paired in term {term} from epoch {epoch}"),
            Notice::Suspicion { silent_ns } => format!("suspicion after {} ms", silent_ns / 1_000_000),
            Notice::Grant(term, mode) => format!("granted term {term}: {}", self.mode(mode)),
            Notice::Refusal(term, mode) => format!("refused, term {term} is {}", self.mode(mode)),
            Notice::WitnessSilent(tries) => format!("the witness is silent after {tries} tries"),
            Notice::StaleAnswer { age_ns } => format!("an answer is stale: {} ms old", age_ns / 1_000_000),
            Notice::HeldTooLong { held_ns } => format!("output is held for {} ms", held_ns / 1_000_000),
            Notice::OrderRefused(protection) => format!("order refused: {}", words(*protection)),
            Notice::HandOverFailed => "the hand-over failed".to_owned(),
            Notice::BadPeer(what) => format!("bad peer: {what}"),
            Notice::ActivationFailed => "the activation failed".to_owned(),
        }
    }

    /// `None` for what happens all the time.
    pub(crate) fn primary(&mut self, command: &PrimaryCommand) -> Option<String> {
        Some(match command {
            PrimaryCommand::Remember(known) => format!("remember term {}", known.term),
            PrimaryCommand::AskWitness(request) => format!("ask the witness: {}", self.ask(&request.ask)),
            PrimaryCommand::Connect { session, term, .. } => {
                format!("connect {} in term {term}", self.session(*session))
            }
            PrimaryCommand::Disconnect(session) => format!("disconnect {}", self.session(*session)),
            PrimaryCommand::Send(_, PrimaryMessage::Heartbeat { .. }) => return None,
            PrimaryCommand::Send(_, message) => format!("send {}", message_of_primary(message)),
            PrimaryCommand::StartFirstCopy(session) => {
                format!("start the first copy of {}", self.session(*session))
            }
            PrimaryCommand::Capture {
                epoch,
                close_gate,
                stay_stopped,
                ..
            } => match (close_gate, stay_stopped) {
                (false, false) => return None,
                (true, _) => format!("capture {epoch} and close the gate"),
                (false, true) => format!("capture {epoch} and stay stopped"),
            },
            PrimaryCommand::Release(_) | PrimaryCommand::DrainSockets => return None,
            PrimaryCommand::OpenGate => "OPEN THE GATE".to_owned(),
            PrimaryCommand::StopGuest => "STOP THE GUEST".to_owned(),
            PrimaryCommand::SuspendGuest => "suspend the guest".to_owned(),
            PrimaryCommand::ResumeGuest => "resume the guest".to_owned(),
            PrimaryCommand::Report(notice) => format!("report: {}", self.notice(notice)),
            PrimaryCommand::Finish => "finish".to_owned(),
        })
    }

    /// `None` for what happens all the time.
    pub(crate) fn backup(&mut self, command: &BackupCommand) -> Option<String> {
        Some(match command {
            BackupCommand::Remember(known) => format!("remember term {}", known.term),
            BackupCommand::AskWitness(request) => format!("ask the witness: {}", self.ask(&request.ask)),
            BackupCommand::MarkUnusable => "mark the image unusable".to_owned(),
            BackupCommand::Accept(session) => format!("accept {}", self.session(*session)),
            BackupCommand::Refuse(session, reason) => {
                format!("refuse {}: {reason:?}", self.session(*session))
            }
            BackupCommand::Disconnect(session) => format!("disconnect {}", self.session(*session)),
            BackupCommand::Send(_, BackupMessage::Alive { .. }) | BackupCommand::DrainSockets => return None,
            BackupCommand::Send(_, BackupMessage::StandbyLoaded { epoch }) => {
                format!("send standby loaded {epoch}")
            }
            BackupCommand::Send(_, BackupMessage::PleaseHandOver) => "send please hand over".to_owned(),
            BackupCommand::TryStandby(_, epoch) => format!("let a standby load epoch {epoch}"),
            BackupCommand::Activate { session, term, .. } => {
                format!("ACTIVATE {} in term {term}", self.session(*session))
            }
            BackupCommand::StopGuest => "STOP THE GUEST".to_owned(),
            BackupCommand::Report(notice) => format!("report: {}", self.notice(notice)),
        })
    }
}

fn words(protection: Protection) -> String {
    match protection.words() {
        (state, None) => state.to_owned(),
        (state, Some(reason)) => format!("{state} ({reason})"),
    }
}

fn message_of_primary(message: &PrimaryMessage) -> String {
    match message {
        PrimaryMessage::Heartbeat { .. } => "heartbeat".to_owned(),
        PrimaryMessage::Paired {
            term, first_epoch, ..
        } => format!("paired in term {term} from epoch {first_epoch}"),
        PrimaryMessage::Left { term } => format!("left in term {term}"),
        PrimaryMessage::HandOver { term, last_epoch } => {
            // How many epochs fit into a transcript is not its point.
            assert!(last_epoch.0 > 0, "something was handed over");
            format!("hand-over in term {term}")
        }
        PrimaryMessage::GuestLost => "guest lost".to_owned(),
    }
}
