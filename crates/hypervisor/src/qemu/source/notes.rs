//! What the next attachment has to know if this one dies, in `qemu-PID.note` beside the lock.
//!
//! The file is there only while there is something to tell: QEMU's migration settings while we are attached, and who stopped the
//! guest while it is stopped by us. It names the process by its start time too, as process ids come again.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::qemu::bootstrap::MigrationSettings;

/// Largest note that is read, in bytes.
const NOTE_BYTES_MAX: u64 = 1 << 16;

/// Why a replicator left its guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoppedBy {
    /// It suspended it for now, as it could not know who may speak for it.
    Suspension,
    /// It stopped it for good: another host speaks for it.
    AnotherHost,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    /// The start time of QEMU's process, in clock ticks since boot.
    started_ticks: u64,
    /// QEMU's migration settings as they were before the first bootstrap.
    settings: Option<MigrationSettings>,
    /// We stopped the guest.
    stopped: Option<StoppedBy>,
}

/// The note on one QEMU.
#[derive(Debug)]
pub(super) struct Notes {
    path: PathBuf,
    note: Note,
}

impl Notes {
    /// Reads what an earlier attachment to the process `pid` noted. One that cannot be read counts as none.
    pub(super) fn read(path: PathBuf, pid: u32) -> Self {
        let started_ticks = started_ticks(pid);
        let found = read_limited(&path).and_then(|bytes| Ok(serde_json::from_slice::<Note>(&bytes)?));
        let note = match found {
            Ok(note) if note.started_ticks == started_ticks => note,
            _ => Note {
                started_ticks,
                ..Note::default()
            },
        };
        Self { path, note }
    }

    pub(super) fn settings(&self) -> Option<&MigrationSettings> {
        self.note.settings.as_ref()
    }

    pub(super) fn set_settings(&mut self, settings: Option<MigrationSettings>) {
        if self.note.settings != settings {
            self.note.settings = settings;
            self.write();
        }
    }

    pub(super) fn stopped(&self) -> Option<StoppedBy> {
        self.note.stopped
    }

    pub(super) fn set_stopped(&mut self, stopped: Option<StoppedBy>) {
        if self.note.stopped != stopped {
            self.note.stopped = stopped;
            self.write();
        }
    }

    /// Best effort: a note is a help for whoever comes next, and no reason not to stop or to protect a guest now.
    fn write(&self) {
        let written = if self.note.settings.is_none() && self.note.stopped.is_none() {
            match std::fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        } else {
            // Renamed into place: whoever reads it has all of it or the one before.
            let fresh = self.path.with_extension("note-new");
            serde_json::to_vec(&self.note)
                .map_err(io::Error::from)
                .and_then(|bytes| std::fs::write(&fresh, bytes))
                .and_then(|()| std::fs::rename(&fresh, &self.path))
        };
        if let Err(error) = written {
            tracing::warn!(%error, path = %self.path.display(), "the note for the next attachment was not written");
        }
    }
}

fn read_limited(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(
        &mut io::Read::take(std::fs::File::open(path)?, NOTE_BYTES_MAX),
        &mut bytes,
    )?;
    Ok(bytes)
}

/// When a process started; 0 when it is gone.
fn started_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold anything; the state after it is field 3 and the start time field 22.
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let started = fields.split_whitespace().nth(19);
    started.and_then(|ticks| ticks.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_found_by_the_next_one_and_leaves_no_file_when_all_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qemu-1.note");
        let pid = std::process::id();
        let mut notes = Notes::read(path.clone(), pid);
        assert_eq!((notes.stopped(), notes.settings()), (None, None));
        notes.set_stopped(Some(StoppedBy::Suspension));
        assert_eq!(
            Notes::read(path.clone(), pid).stopped(),
            Some(StoppedBy::Suspension)
        );
        notes.set_stopped(None);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_note_on_another_process_of_the_same_id_or_a_damaged_one_counts_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qemu-1.note");
        let pid = std::process::id();
        assert_ne!(started_ticks(pid), 0);
        let mut notes = Notes::read(path.clone(), pid);
        notes.note.started_ticks += 1;
        notes.set_stopped(Some(StoppedBy::AnotherHost));
        assert_eq!(Notes::read(path.clone(), pid).stopped(), None);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(Notes::read(path, pid).stopped(), None);
    }
}
