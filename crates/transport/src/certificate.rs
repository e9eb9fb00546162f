//! What a certificate says, and what an error about one means.

use std::net::IpAddr;

use romulus_types::HostId;
use rustls::CertificateError;
use rustls_pki_types::{CertificateDer, ServerName};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::error::CertificateProblem;

/// What is of interest in a certificate.
pub(crate) struct Facts {
    /// The host it stands for: its CN, or else the first of its DNS names that can be a host's name.
    pub(crate) host: Option<HostId>,
    /// The names that a client may ask for.
    pub(crate) server_names: Vec<ServerName<'static>>,
    /// Validity, in seconds since 1970.
    pub(crate) not_before_s: i64,
    pub(crate) not_after_s: i64,
}

/// Reads a certificate without judging it.
pub(crate) fn read(certificate: &CertificateDer<'_>) -> Result<Facts, CertificateProblem> {
    let (_, x509) = X509Certificate::from_der(certificate).map_err(|_| CertificateProblem::Damaged)?;
    let mut server_names = Vec::new();
    let alternative = x509
        .subject_alternative_name()
        .map_err(|_| CertificateProblem::Damaged)?;
    for name in alternative
        .iter()
        .flat_map(|extension| &extension.value.general_names)
    {
        match name {
            GeneralName::DNSName(dns) => {
                server_names.extend(ServerName::try_from(*dns).map(|n| n.to_owned()))
            }
            GeneralName::IPAddress(bytes) => server_names.extend(ip(bytes).map(ServerName::from)),
            _ => {}
        }
    }
    let common = x509
        .subject()
        .iter_common_name()
        .next()
        .and_then(|cn| cn.as_str().ok());
    let common = common.and_then(|cn| HostId::new(cn).ok());
    let dns = || {
        server_names.iter().find_map(|name| match name {
            ServerName::DnsName(dns) => HostId::new(dns.as_ref()).ok(),
            _ => None,
        })
    };
    Ok(Facts {
        host: common.or_else(dns),
        not_before_s: x509.validity().not_before.timestamp(),
        not_after_s: x509.validity().not_after.timestamp(),
        server_names,
    })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// The problem behind a verifier's error.
pub(crate) fn problem_of(error: &rustls::Error) -> CertificateProblem {
    use CertificateProblem as P;
    let rustls::Error::InvalidCertificate(error) = error else {
        return match error {
            rustls::Error::NoCertificatesPresented => P::Missing,
            _ => P::Damaged,
        };
    };
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => P::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => P::NotYetValid,
        // A CA of the same name but with another key shows as a wrong signature.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => P::OtherCa,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => P::WrongName,
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => P::WrongPurpose,
        CertificateError::Revoked => P::Revoked,
        _ => P::Damaged,
    }
}

/// The problem that a TLS alert of the peer's is about, if it is about a certificate (RFC 8446, section 6.2).
pub(crate) fn problem_of_alert(alert: u8) -> Option<CertificateProblem> {
    use CertificateProblem as P;
    Some(match alert {
        42 | 46 => P::Damaged,
        43 => P::WrongPurpose,
        44 => P::Revoked,
        45 => P::OutOfTime,
        // decrypt_error: a signature of a CA with the same name but another key.
        48 | 51 => P::OtherCa,
        116 => P::Missing,
        _ => return None,
    })
}
