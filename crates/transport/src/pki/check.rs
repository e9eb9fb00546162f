//! What is in a host's folder, and whether a handshake would accept it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use romulus_types::HostId;

use crate::certificate;
use crate::error::PkiError;
use crate::identity::{CA_CERT, Identity, Role, certificates};

/// A certificate that ends within this time is worth a warning.
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// What [`check`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The host that the folder is for.
    pub host: HostId,
    /// The certificates.
    pub files: Vec<FileReport>,
    /// What works but should not stay as it is: keys that others may read, certificates that end soon.
    pub warnings: Vec<String>,
}

/// One certificate file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// The file.
    pub file: PathBuf,
    /// The names in it that a peer may ask for.
    pub names: Vec<String>,
    /// Valid from.
    pub not_before: SystemTime,
    /// Valid until.
    pub not_after: SystemTime,
}

/// Checks a host's folder as a handshake would, and reports what is in it.
///
/// # Errors
/// The first thing for which a handshake would fail, with the file and the remedy.
pub fn check(dir: &Path) -> Result<Report, PkiError> {
    let now = SystemTime::now();
    let identity = Identity::load_at(dir, now)?;
    let mut warnings = Vec::new();
    let mut files = Vec::new();
    for name in [CA_CERT, Role::Server.cert_file(), Role::Client.cert_file()] {
        let report = describe(&dir.join(name))?;
        if report.not_after < now {
            warnings.push(format!("{} has expired", report.file.display()));
        } else if report.not_after < now + SOON {
            warnings.push(format!("{} expires within 30 days", report.file.display()));
        }
        files.push(report);
    }
    for role in [Role::Server, Role::Client] {
        let file = dir.join(role.key_file());
        let metadata = std::fs::metadata(&file);
        let mode = metadata
            .map_err(|source| PkiError::Read {
                file: file.clone(),
                source,
            })?
            .permissions()
            .mode();
        // A daemon that is not root's reads it as a member of its group.
        if mode & 0o037 != 0 {
            warnings.push(format!(
                "{} may be read by others, or written to by its group: chmod 600 it, or 640 where a daemon has a user of its own",
                file.display()
            ));
        }
    }
    Ok(Report {
        host: identity.host().clone(),
        files,
        warnings,
    })
}

pub(super) fn describe(file: &Path) -> Result<FileReport, PkiError> {
    let chain = certificates(file)?;
    let facts = certificate::read(&chain[0]).map_err(|problem| PkiError::Certificate {
        file: file.to_owned(),
        problem,
    })?;
    let moment = |s: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(s).unwrap_or(0));
    Ok(FileReport {
        file: file.to_owned(),
        names: facts
            .server_names
            .iter()
            .map(|name| name.to_str().into_owned())
            .collect(),
        not_before: moment(facts.not_before_s),
        not_after: moment(facts.not_after_s),
    })
}
