//! What can go wrong with logs, metrics and the admin socket.

use std::path::PathBuf;

/// Why something could not be shown or asked.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `log.level` is no filter.
    #[error("log.level {level:?} is neither a level nor a filter such as \"info,romulus_transport=debug\"")]
    Level {
        /// The setting.
        level: String,
        /// The cause.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Logs were set up before.
    #[error("logs are set up once in a process")]
    LogTwice(#[source] tracing_subscriber::util::TryInitError),
    /// Another process serves this socket.
    #[error("another daemon serves {}: stop it, or use another socket", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else at the socket's path.
    #[error("{} is not a socket and is left as it is: use another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("cannot make the admin socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The socket could not be given to the group.
    #[error(
        "cannot give the admin socket {} to the group {group}: that takes CAP_CHOWN, or being in the group; the unit of the witness \
         has neither, so leave admin_group out and add operators to the group romulus-witness",
        path.display()
    )]
    NotGiven {
        /// The socket.
        path: PathBuf,
        /// The group, as the settings name it.
        group: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// `admin_group` names nobody.
    #[error("admin_group {group:?} is no group of this host: make it with groupadd, or name another")]
    Group {
        /// The setting.
        group: String,
    },
    /// No daemon listens on the socket, or it may not be opened.
    #[error("cannot reach the daemon on {}: check that it runs and that you may open its socket", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The daemon took too long.
    #[error("the daemon on {} did not answer in time", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke, or what came is not HTTP.
    #[error("the daemon's answer broke off")]
    Http(#[source] hyper::Error),
    /// The answer is too long or broke off.
    #[error("the daemon's answer is too long or broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The path cannot be asked for.
    #[error("{path:?} is no path of the admin API")]
    Path {
        /// The path.
        path: String,
    },
    /// The answer is not JSON.
    #[error("the daemon answered {status}: {text}")]
    Answer {
        /// HTTP's status.
        status: u16,
        /// The beginning of the answer.
        text: String,
    },
}
