//! A small client of the admin API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::TelemetryError;

/// Most bytes of an answer.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Longer than any order of the daemons takes to be answered.
const TIMEOUT: Duration = Duration::from_secs(40);
/// How much of an answer that is not JSON is shown.
const SHOWN_CHARS: usize = 200;

/// Asks a daemon over its admin socket, one connection a request.
#[derive(Clone, Debug)]
pub struct AdminClient {
    socket: PathBuf,
    timeout: Duration,
}

impl AdminClient {
    /// For the daemon that serves `socket`; an answer may take 40 seconds.
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self {
            socket: socket.as_ref().to_owned(),
            timeout: TIMEOUT,
        }
    }

    /// Sets how long connection, request and answer may take together.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The JSON at `path`, such as `/v1/status`. An answer with an error status is returned like any other
    /// when it is JSON: it says in its own field `error` what is wrong.
    ///
    /// # Errors
    /// The daemon cannot be reached, takes too long, or answers something else than JSON.
    pub async fn get(&self, path: &str) -> Result<Value, TelemetryError> {
        self.ask(Method::GET, path, Bytes::new()).await.and_then(json)
    }

    /// Sends `body` to `path` and gives the JSON that comes back.
    ///
    /// # Errors
    /// As [`AdminClient::get`].
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, TelemetryError> {
        self.ask(Method::POST, path, body.to_string().into())
            .await
            .and_then(json)
    }

    /// Asks with any method, and gives the answer's status as well.
    ///
    /// # Errors
    /// As [`AdminClient::get`].
    pub async fn ask_with_status(&self, method: &str, path: &str) -> Result<(u16, Value), TelemetryError> {
        let known = Method::from_bytes(method.as_bytes()).map_err(|_| TelemetryError::Path {
            path: method.to_owned(),
        })?;
        let (status, bytes) = self.ask(known, path, Bytes::new()).await?;
        Ok((status.as_u16(), json((status, bytes))?))
    }

    /// The text at `path`, such as `/metrics`.
    ///
    /// # Errors
    /// As [`AdminClient::get`], and for any status but 200.
    pub async fn text(&self, path: &str) -> Result<String, TelemetryError> {
        match self.ask(Method::GET, path, Bytes::new()).await? {
            (StatusCode::OK, bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            (status, bytes) => Err(answer(status, &bytes)),
        }
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), TelemetryError> {
        let late = |_| TelemetryError::Timeout {
            path: self.socket.clone(),
        };
        tokio::time::timeout(self.timeout, self.exchange(method, path, body))
            .await
            .map_err(late)?
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), TelemetryError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|_| TelemetryError::Path {
                path: path.to_owned(),
            })?;
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| TelemetryError::Unreachable {
                    path: self.socket.clone(),
                    source,
                })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(TelemetryError::Http)?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(TelemetryError::Http)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
            let body = body.collect().await.map_err(TelemetryError::Body)?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => return answer,
            // The connection may be done with before its last bytes are taken.
            _ = connection => {}
        }
        exchange.await
    }
}

fn json((status, bytes): (StatusCode, Bytes)) -> Result<Value, TelemetryError> {
    serde_json::from_slice(&bytes).map_err(|_| answer(status, &bytes))
}

fn answer(status: StatusCode, bytes: &[u8]) -> TelemetryError {
    let text = String::from_utf8_lossy(bytes).chars().take(SHOWN_CHARS).collect();
    TelemetryError::Answer {
        status: status.as_u16(),
        text,
    }
}
