//! The admin API's server: HTTP on a Unix socket.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use crate::TelemetryError;

/// Most connections to one admin socket or metrics address; further ones wait.
pub const CONNECTIONS_MAX: usize = 32;
/// A connection on which nothing moves for this long is dropped, so that idle ones cannot take all places.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// Who may use the socket: its owner and its group.
const MODE: u32 = 0o660;

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct Server {
    task: JoinHandle<()>,
    /// The socket's path and inode: the file is removed only while it is still ours.
    socket: Option<(PathBuf, u64)>,
    address: Option<SocketAddr>,
}

impl Server {
    /// The TCP address that is served, if it is one.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if let Some((path, inode)) = &self.socket
            && std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.ino() == *inode)
        {
            // A leftover is removed at the next start anyway.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Serves `router` on a Unix socket of mode 0660 in a background task. `group` may use it, by name or number; the
/// daemon's own without one. A socket that a dead daemon left is replaced. Must be called within a tokio runtime.
///
/// # Errors
/// Another daemon serves the socket, something else is in its place, it cannot be made, there is no such group, or it cannot be given to it.
pub fn serve_admin(path: &Path, group: Option<&str>, router: Router) -> Result<Server, TelemetryError> {
    let failed = |source| TelemetryError::Socket {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    // Before anything is made, so that a name that is wrong leaves nothing behind.
    let gid = group.map(group_id).transpose()?;
    remove_stale(path)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    if let Some(group) = group {
        chown(path, None, gid).map_err(|source| TelemetryError::NotGiven {
            path: path.to_owned(),
            group: group.to_owned(),
            source,
        })?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE)).map_err(failed)?;
    let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
    let task = start(listener, router);
    Ok(Server {
        task,
        socket: Some((path.to_owned(), inode)),
        address: None,
    })
}

/// Serves `router` (metrics and health) on a TCP address in a background task. A port that is taken is passed over for the next
/// one, `ports` of them in all, as several daemons of a kind can be on a host. When none is free that is said in the log, and the
/// daemon goes on: nobody's protection depends on being watched. `None` then, and without an address.
pub async fn serve_metrics(address: Option<SocketAddr>, ports: u16, router: Router) -> Option<Server> {
    let first = address?;
    let mut result = bind(first).await;
    for offset in 1..ports {
        let taken = matches!(&result, Err(error) if error.kind() == io::ErrorKind::AddrInUse);
        let Some(port) = first.port().checked_add(offset).filter(|_| taken) else {
            break;
        };
        result = bind(SocketAddr::new(first.ip(), port)).await;
    }
    match result {
        Ok((listener, address)) => {
            tracing::info!(event = "metrics", listen = %address);
            Some(Server {
                task: start(listener, router),
                socket: None,
                address: Some(address),
            })
        }
        Err(error) => {
            tracing::warn!(event = "metrics", listen = %first, %error, "nobody can read metrics by TCP: free the port, or \
                set metrics.listen");
            None
        }
    }
}

async fn bind(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// A group's number, from its number or from its name in `/etc/group`.
fn group_id(group: &str) -> Result<u32, TelemetryError> {
    if let Ok(gid) = group.parse() {
        return Ok(gid);
    }
    let unknown = || TelemetryError::Group {
        group: group.to_owned(),
    };
    let text = std::fs::read_to_string("/etc/group").map_err(|_| unknown())?;
    let number = |line: &str| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    };
    text.lines().find_map(number).ok_or_else(unknown)
}

fn remove_stale(path: &Path) -> Result<(), TelemetryError> {
    let failed = |source| TelemetryError::Socket {
        path: path.to_owned(),
        source,
    };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(TelemetryError::NotASocket {
            path: path.to_owned(),
        });
    }
    match BlockingStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
        Ok(_) => Err(TelemetryError::SocketInUse {
            path: path.to_owned(),
        }),
    }
}

fn start<L>(listener: L, router: Router) -> JoinHandle<()>
where
    L: Listener,
    L::Addr: std::fmt::Debug,
{
    let limited = Limited {
        listener,
        places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
    };
    tokio::spawn(async move {
        // axum's loop ends only when this task is aborted.
        let _ = axum::serve(limited, router).await;
    })
}

/// A listener with at most [`CONNECTIONS_MAX`] connections.
struct Limited<L> {
    listener: L,
    places: Arc<Semaphore>,
}

impl<L: Listener> Listener for Limited<L> {
    type Io = Held<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let place = self
            .places
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (io, address) = self.listener.accept().await;
        let idle = Box::pin(tokio::time::sleep(IDLE_MAX));
        (
            Held {
                io,
                idle,
                _place: place,
            },
            address,
        )
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection with its place, which ends when it stays idle.
struct Held<I> {
    io: I,
    idle: Pin<Box<tokio::time::Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl<I> Held<I> {
    fn touch<T>(&mut self, cx: &mut Context<'_>, moved: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if moved.is_ready() {
            self.idle.as_mut().reset(tokio::time::Instant::now() + IDLE_MAX);
            return moved;
        }
        match self.idle.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Held<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.io).poll_read(cx, buffer);
        self.touch(cx, read)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Held<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.touch(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.touch(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.io).poll_shutdown(cx);
        self.touch(cx, shut)
    }
}
