//! A daemon's certificates while it runs: read again on demand, without touching the connections that exist.

use std::path::PathBuf;
use std::sync::Arc;

use romulus_types::HostId;

use crate::endpoint::Endpoint;
use crate::error::{PkiError, TransportError};
use crate::identity::Identity;

/// The directory that a daemon's certificates came from, and the endpoints that use them.
#[derive(Debug)]
pub struct Certificates {
    dir: PathBuf,
    host: HostId,
    endpoints: Vec<Arc<Endpoint>>,
}

impl Certificates {
    /// For a daemon that loaded `identity` and uses it in all of `endpoints`.
    pub fn new(identity: &Identity, endpoints: Vec<Arc<Endpoint>>) -> Self {
        Self {
            dir: identity.dir().to_owned(),
            host: identity.host().clone(),
            endpoints,
        }
    }

    /// Reads the directory again and uses what it finds for every connection from now on; those that exist go on with what
    /// they have. Blocks on file reads.
    ///
    /// # Errors
    /// Certificates that a handshake would refuse, or those of another host: then nothing has changed.
    pub fn reload(&self) -> Result<HostId, TransportError> {
        let identity = Identity::load(&self.dir)?;
        if *identity.host() != self.host {
            return Err(TransportError::from(PkiError::OtherHost {
                dir: self.dir.clone(),
                found: identity.host().clone().into(),
                host: self.host.clone().into(),
            }));
        }
        for endpoint in &self.endpoints {
            // Fails only for what the load has ruled out.
            endpoint.reload(&identity)?;
        }
        Ok(self.host.clone())
    }
}
