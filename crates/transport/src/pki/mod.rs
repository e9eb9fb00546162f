//! Makes and checks the certificates of a group of hosts.
//!
//! ```text
//!   DIR/ca/       ca-cert.pem  ca-key.pem          keep this off the hosts
//!   DIR/HOST/     ca-cert.pem  server-*.pem  client-*.pem     copy this to HOST:/etc/romulus/pki
//! ```
//!
//! The layout of a host's folder is QEMU's, so folders made for QEMU work as they are. Keys are ECDSA P-256 in
//! files of mode 0600. A folder is written under another name and renamed; only [`renew`] puts one in the place
//! of another.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use romulus_types::HostId;

use crate::error::PkiError;
use crate::identity::{CA_CERT, Role, read_pem};

mod check;

pub use check::{FileReport, Report, check};

/// The folder of the CA.
pub const CA_DIR: &str = "ca";
/// The CA's key.
const CA_KEY: &str = "ca-key.pem";
/// Longest validity: 30 years.
pub const DAYS_MAX: u32 = 30 * 366;
/// Certificates start this much earlier than now, as clocks differ.
const BACKDATED: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A host, and the other names that its server certificate carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostNames {
    /// The host's name: its folder, the certificates' CN and a DNS name in them.
    pub host: HostId,
    /// DNS names and IP addresses that peers may also connect to.
    pub also: Vec<String>,
}

impl std::str::FromStr for HostNames {
    type Err = PkiError;

    /// Reads `NAME[,NAME|IP...]`.
    fn from_str(text: &str) -> Result<Self, PkiError> {
        let mut names = text.split(',');
        let first = names.next().unwrap_or_default();
        let host = HostId::new(first).map_err(|_| PkiError::Name {
            name: first.to_owned(),
        })?;
        let also: Vec<String> = names.map(str::to_owned).collect();
        for name in &also {
            alternative(name)?;
        }
        Ok(Self { host, also })
    }
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From this moment.
    pub from: SystemTime,
    /// To this moment.
    pub until: SystemTime,
}

impl Validity {
    /// From an hour ago (clocks differ) for `days` days.
    ///
    /// # Errors
    /// No days, or over [`DAYS_MAX`].
    pub fn days(days: u32) -> Result<Self, PkiError> {
        if days == 0 || days > DAYS_MAX {
            return Err(PkiError::Days {
                days,
                max_days: DAYS_MAX,
            });
        }
        let now = SystemTime::now();
        Ok(Self {
            from: now - BACKDATED,
            until: now + DAY * days,
        })
    }
}

/// Makes a CA in `dir/ca`.
///
/// # Errors
/// There is one already, or it cannot be written.
pub fn init(dir: &Path, ca_name: &str, validity: Validity) -> Result<(), PkiError> {
    let folder = Folder::start(dir, CA_DIR)?;
    let key = new_key()?;
    let mut params = params(ca_name, validity);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?;
    folder.write(CA_CERT, certificate.pem().as_bytes(), 0o644)?;
    folder.write(CA_KEY, key.serialize_pem().as_bytes(), 0o600)?;
    folder.complete()
}

/// Makes a host's folder, `dir/HOST`, signed by the CA in `dir/ca`; gives its path.
///
/// # Errors
/// The folder exists, the CA is missing, a name is not allowed, or a file cannot be written.
pub fn issue(dir: &Path, names: &HostNames, validity: Validity) -> Result<PathBuf, PkiError> {
    if names.host.as_str() == CA_DIR {
        return Err(PkiError::Name {
            name: CA_DIR.to_owned(),
        });
    }
    let (ca_pem, issuer) = authority(dir)?;
    let folder = Folder::start(dir, names.host.as_str())?;
    fill(&folder, names, validity, (&ca_pem, &issuer))?;
    folder.complete()?;
    Ok(dir.join(names.host.as_str()))
}

/// Replaces a host's folder, `dir/HOST`, by one with the same names, new keys and another validity, signed by the CA in
/// `dir/ca`; gives its path. Whoever opens the folder meanwhile finds the old one or the new one, whole.
///
/// # Errors
/// There is no such folder, its certificates can't be read, the CA is missing, or a file cannot be written.
pub fn renew(dir: &Path, host: &HostId, validity: Validity) -> Result<PathBuf, PkiError> {
    let path = dir.join(host.as_str());
    let report = check::describe(&path.join(Role::Server.cert_file()))?;
    let also = report
        .names
        .into_iter()
        .filter(|name| name != host.as_str())
        .collect();
    let names = HostNames {
        host: host.clone(),
        also,
    };
    let (ca_pem, issuer) = authority(dir)?;
    let folder = Folder::beside(dir, host.as_str())?;
    fill(&folder, &names, validity, (&ca_pem, &issuer))?;
    folder.exchange()?;
    Ok(path)
}

fn fill(
    folder: &Folder,
    names: &HostNames,
    validity: Validity,
    (ca_pem, issuer): (&[u8], &Issuer<'_, KeyPair>),
) -> Result<(), PkiError> {
    folder.write(CA_CERT, ca_pem, 0o644)?;
    for role in [Role::Server, Role::Client] {
        let key = new_key()?;
        let certificate = leaf(names, role, validity)?.signed_by(&key, issuer)?;
        folder.write(role.cert_file(), certificate.pem().as_bytes(), 0o644)?;
        folder.write(role.key_file(), key.serialize_pem().as_bytes(), 0o600)?;
    }
    Ok(())
}

/// The CA in `dir/ca`: its certificate, and what signs.
fn authority(dir: &Path) -> Result<(Vec<u8>, Issuer<'static, KeyPair>), PkiError> {
    let ca = dir.join(CA_DIR);
    let ca_pem = read_pem(&ca.join(CA_CERT))?;
    let ca_key = read_pem(&ca.join(CA_KEY))?;
    let form = |file: &str, wanted| PkiError::Form {
        file: ca.join(file),
        wanted,
    };
    let ca_text = std::str::from_utf8(&ca_pem).map_err(|_| form(CA_CERT, "certificate"))?;
    let key_text = std::str::from_utf8(&ca_key).map_err(|_| form(CA_KEY, "private key"))?;
    let signer = KeyPair::from_pem(key_text).map_err(|_| form(CA_KEY, "private key"))?;
    let issuer = Issuer::from_ca_cert_pem(ca_text, signer).map_err(|_| form(CA_CERT, "certificate"))?;
    Ok((ca_pem, issuer))
}

fn new_key() -> Result<KeyPair, PkiError> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
}

fn params(common_name: &str, validity: Validity) -> CertificateParams {
    let moment = |time: SystemTime| {
        let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since_1970.as_secs())
    };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = moment(validity.from);
    params.not_after = moment(validity.until);
    params
}

fn leaf(names: &HostNames, role: Role, validity: Validity) -> Result<CertificateParams, PkiError> {
    let mut params = params(names.host.as_str(), validity);
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match role {
        Role::Server => ExtendedKeyUsagePurpose::ServerAuth,
        Role::Client => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    params.subject_alt_names.push(alternative(names.host.as_str())?);
    for name in &names.also {
        params.subject_alt_names.push(alternative(name)?);
    }
    Ok(params)
}

fn alternative(name: &str) -> Result<SanType, PkiError> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(ip));
    }
    let refused = || PkiError::Name {
        name: name.to_owned(),
    };
    // The verifier's own idea of a DNS name: one that it would never match must not be issued.
    rustls_pki_types::DnsName::try_from(name).map_err(|_| refused())?;
    Ok(SanType::DnsName(name.try_into().map_err(|_| refused())?))
}

/// A folder that appears only when it is complete.
struct Folder {
    partial: PathBuf,
    wanted: PathBuf,
}

impl Folder {
    fn start(dir: &Path, name: &str) -> Result<Self, PkiError> {
        let wanted = dir.join(name);
        if wanted.exists() {
            return Err(PkiError::Exists { path: wanted });
        }
        Self::beside(dir, name)
    }

    /// Beside one that may be there already.
    fn beside(dir: &Path, name: &str) -> Result<Self, PkiError> {
        let wanted = dir.join(name);
        let make = |path: &Path| {
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path);
            made.map_err(|source| PkiError::Write {
                path: path.to_owned(),
                source,
            })
        };
        make(dir)?;
        let partial = dir.join(format!(".{name}.{}.partial", std::process::id()));
        make(&partial)?;
        Ok(Self { partial, wanted })
    }

    fn write(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), PkiError> {
        let path = self.partial.join(name);
        let open = || {
            std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&path)
        };
        open()
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .map_err(|source| PkiError::Write {
                path: path.clone(),
                source,
            })
    }

    fn complete(self) -> Result<(), PkiError> {
        // Renaming onto a folder that is not empty fails, so a race with another run overwrites nothing.
        std::fs::rename(&self.partial, &self.wanted).map_err(|source| match source.kind() {
            std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists => PkiError::Exists {
                path: self.wanted.clone(),
            },
            _ => PkiError::Write {
                path: self.wanted.clone(),
                source,
            },
        })
    }
}

impl Folder {
    /// Takes the place of the folder that is there; that one is removed.
    fn exchange(self) -> Result<(), PkiError> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, &self.partial, CWD, &self.wanted, RenameFlags::EXCHANGE).map_err(|source| {
            PkiError::Write {
                path: self.wanted.clone(),
                source: source.into(),
            }
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Gone already after a completed rename; the old one after an exchange.
        let _ = std::fs::remove_dir_all(&self.partial);
    }
}
