//! The socket that clients connect to.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens at `path`, for this user only. A socket that an ended VMM left there is replaced.
///
/// # Errors
/// `AddrInUse` when somebody listens there or another sort of file is in the way, and the kernel's.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Ok(found) = fs::symlink_metadata(path) {
        let taken = !found.file_type().is_socket() || UnixStream::connect(path).is_ok();
        if taken {
            let text = format!(
                "{} is there and in use: end its owner or choose another path",
                path.display()
            );
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        fs::remove_file(path)?;
    }
    // Under a name of its own until its rights are set, so that nobody else gets in before.
    let mut own = path.as_os_str().to_owned();
    own.push(format!(".{}", std::process::id()));
    let own = Path::new(&own);
    let _ = fs::remove_file(own);
    let listener = UnixListener::bind(own)?;
    fs::set_permissions(own, Permissions::from_mode(0o600))?;
    fs::rename(own, path)?;
    Ok(listener)
}
