//! Bytes on their way from and to the primary's host.

use bytes::Bytes;
use romulus_protocol::{Ask, Mode, PrimaryCommand, PrimaryMessage, WitnessReply, WitnessRequest};
use romulus_types::Session;
use romulus_wire::{Frame, FrameDecoder, FrameType, WireError, decode_message, encode_message};

use super::ANY_LIFE;
use crate::context::{BackupWork, Context, Event};
use crate::guest::Output;
use crate::network::Stream;
use crate::plan::{Line, Moment};

/// A frame leaves the host.
pub(super) fn leave(context: &mut Context, output: Output) {
    let record = context.record.clone();
    context.checks.left_primary(context.now, record.as_ref(), output);
}

pub(super) fn send_control(context: &mut Context, session: Session, bytes: Bytes) {
    if let Some(at) = context
        .network
        .send(context.now, session, Stream::ControlToBackup, bytes.len())
    {
        context.at(at, Event::Backup(ANY_LIFE, BackupWork::Control(session, bytes)));
    }
}

pub(super) fn send_data(context: &mut Context, session: Session, frames: Vec<Bytes>) {
    for frame in frames {
        let bytes = context.carry(frame);
        if let Some(at) = context
            .network
            .send(context.now, session, Stream::DataToBackup, bytes.len())
        {
            context.at(at, Event::Backup(ANY_LIFE, BackupWork::Data(session, bytes)));
        }
    }
}

/// Sends a request to the witness.
pub(crate) fn ask(context: &mut Context, line: Line, request: &WitnessRequest) {
    let moment = match &request.ask {
        Ask::Change {
            mode: Mode::Paired { .. },
            ..
        } => Some(Moment::AskPaired),
        Ask::Change { .. } if line == Line::BackupWitness => Some(Moment::AskTakeover),
        Ask::Change { .. } => Some(Moment::AskAlone),
        Ask::Read | Ask::Register => None,
    };
    if let Some(moment) = moment {
        context.moment(moment);
    }
    let bytes = encode_message(FrameType::WitnessRequest, Session(0), request).expect("a small message");
    for at in context.network.datagram(context.now, line) {
        context.at(at, Event::Witness(bytes.clone()));
    }
}

/// Reads a witness's reply.
pub(crate) fn reply(bytes: &Bytes) -> Result<WitnessReply, WireError> {
    let mut decoder = FrameDecoder::first_frame(FrameType::WitnessReply);
    let taken = decoder.push(bytes);
    assert_eq!(taken, bytes.len(), "a small message");
    let frame = decoder.next_frame()?.ok_or(WireError::Truncated("reply"))?;
    decode_message(FrameType::WitnessReply, &frame)
}

/// Reads what is whole of a control stream.
pub(crate) fn read_frames(
    decoder: &mut FrameDecoder,
    bytes: &Bytes,
    frames: &mut Vec<Frame>,
) -> Result<(), WireError> {
    let taken = decoder.push(bytes);
    assert_eq!(taken, bytes.len(), "control messages are small");
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    Ok(())
}

pub(super) fn tell(context: &mut Context, command: &PrimaryCommand) {
    if !matches!(command, PrimaryCommand::Send(_, PrimaryMessage::Heartbeat { .. })) {
        context.tell("primary", || format!("{command:?}"));
    }
}
