//! The records on disk.
//!
//! ```text
//!   DIR/lock               held by the one process that writes
//!   DIR/instance           the life of this store, and the inode of this very file
//!   DIR/vms/NAME           one record a VM
//!   DIR/vms/.NAME.new      being written; worthless after a crash
//! ```
//!
//! A record is replaced in this order: write `.NAME.new`, sync it, rename it over `NAME`, sync the folder. So after a
//! crash at any point `NAME` is the old record or the new one, whole. [`Store::write`] returns after the last step,
//! and only then may the answer be sent.
//!
//! A store that was copied or restored must not grant what its original granted already. A copy's `instance` file
//! has another inode than the one written in it, so it is refused until [`renew`] gives it another instance, whose
//! records answer nothing until an operator registers each VM again. A snapshot of the whole disk cannot be told apart.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use romulus_host_sys::durable::read_small;
use romulus_host_sys::random::random_u128;
use romulus_protocol::Record;
use romulus_types::{VmId, WitnessInstance};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::fault;
use crate::file::{self, Corrupt, FILE_BYTES_MAX, Kind};

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("{} holds no store: make one with `witness init --dir {}`", dir.display(), dir.display())]
    Missing { dir: PathBuf },
    #[error("{} holds a store already: nothing was changed", dir.display())]
    Exists { dir: PathBuf },
    #[error("another witness uses {}: stop it first", dir.display())]
    Locked { dir: PathBuf },
    #[error(
        "{} was copied or restored, and may be older than what was granted from its original: \
         `witness init --renew --dir {}` makes it usable, after which each VM has to be registered again",
        dir.display(), dir.display()
    )]
    Copied { dir: PathBuf },
    #[error(
        "{} is corrupt: {problem}. It is not guessed what it was: once no host but one runs the VM, remove it \
         with `witness forget` and register the VM again",
        file.display()
    )]
    Corrupt { file: PathBuf, problem: Corrupt },
    #[error("{} holds the record of VM {vm}: restore its name or remove it", file.display())]
    OtherVm { file: PathBuf, vm: VmId },
    #[error("there is no record of VM {vm}")]
    UnknownVm { vm: VmId },
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn io_at(path: &Path) -> impl Fn(io::Error) -> StoreError + '_ {
    move |source| StoreError::Io {
        path: path.to_owned(),
        source,
    }
}

#[derive(Serialize, Deserialize)]
struct InstanceFile {
    instance: WitnessInstance,
    inode: u64,
}

#[derive(Serialize, Deserialize)]
struct RecordFile {
    vm: VmId,
    record: Record,
}

/// The store, locked for this process.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
    instance: WitnessInstance,
    _lock: File,
}

/// Makes a store in `dir` with an instance of its own.
pub(crate) fn init(dir: &Path) -> Result<WitnessInstance, StoreError> {
    make_folder(dir)?;
    let _lock = lock(dir)?;
    // Records without an instance file are what is left of a store, not an empty place.
    if dir.join("instance").exists() || dir.join("vms").exists() {
        return Err(StoreError::Exists { dir: dir.to_owned() });
    }
    make_folder(&dir.join("vms"))?;
    write_instance(dir)
}

/// Gives a store that was copied or restored another instance.
pub(crate) fn renew(dir: &Path) -> Result<WitnessInstance, StoreError> {
    if !dir.join("vms").exists() {
        return Err(StoreError::Missing { dir: dir.to_owned() });
    }
    let _lock = lock(dir)?;
    write_instance(dir)
}

/// The instance of the store in `dir`, and its records. Needs no lock.
pub(crate) fn read(dir: &Path) -> Result<(WitnessInstance, Vec<(VmId, Record)>), StoreError> {
    Ok((read_instance(dir)?, read_records(dir)?))
}

/// Removes the record of a VM, corrupt or not, from a store that no witness uses.
pub(crate) fn forget(dir: &Path, vm: &VmId) -> Result<(), StoreError> {
    if !dir.join("vms").exists() {
        return Err(StoreError::Missing { dir: dir.to_owned() });
    }
    let _lock = lock(dir)?;
    remove(dir, vm)
}

impl Store {
    /// Opens and locks the store in `dir`; gives its records as well.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Vec<(VmId, Record)>), StoreError> {
        if !dir.join("instance").exists() {
            return Err(StoreError::Missing { dir: dir.to_owned() });
        }
        let lock = lock(dir)?;
        // An earlier life may have died between renaming a record and making that durable, with its asker still waiting:
        // the repeated request would be answered by a record that a loss of power takes back.
        sync_folder(&dir.join("vms"))?;
        sync_folder(dir)?;
        let (instance, records) = read(dir)?;
        let store = Self {
            dir: dir.to_owned(),
            instance,
            _lock: lock,
        };
        store.remove_leftovers()?;
        Ok((store, records))
    }

    pub(crate) fn instance(&self) -> WitnessInstance {
        self.instance
    }

    /// Makes a record durable. After an error it is not known whether it is: this process must end.
    pub(crate) fn write(&self, vm: &VmId, record: &Record) -> Result<(), StoreError> {
        let bytes = file::encode(
            Kind::Record,
            &RecordFile {
                vm: vm.clone(),
                record: record.clone(),
            },
        );
        let path = self.dir.join("vms").join(vm.as_str());
        replace(&path, |new| {
            let (first, rest) = bytes.split_at(bytes.len() / 2);
            new.write_all(first)?;
            fault::point("store.half_written");
            new.write_all(rest)
        })
    }

    pub(crate) fn forget(&self, vm: &VmId) -> Result<(), StoreError> {
        remove(&self.dir, vm)
    }

    fn remove_leftovers(&self) -> Result<(), StoreError> {
        for path in entries(&self.dir.join("vms"))? {
            if is_leftover(&path) {
                fs::remove_file(&path).map_err(io_at(&path))?;
            }
        }
        Ok(())
    }
}

fn make_folder(dir: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io_at(dir))?;
    match dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => sync_folder(parent),
        None => Ok(()),
    }
}

fn sync_folder(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|folder| folder.sync_all())
        .map_err(io_at(dir))
}

fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path);
    let file = file.map_err(io_at(&path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Locked { dir: dir.to_owned() }),
        Err(error) => Err(StoreError::Io {
            path,
            source: error.into(),
        }),
    }
}

/// Replaces `path` by what `fill` writes, durably.
fn replace(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), StoreError> {
    let folder = path.parent().expect("files of the store are in a folder");
    let name = path
        .file_name()
        .expect("files of the store have names")
        .to_string_lossy();
    let new = folder.join(format!(".{name}.new"));
    let write = || {
        fault::point("store.before_write");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)?;
        fill(&mut file)?;
        fault::point("store.written");
        file.sync_all()?;
        fault::point("store.synced");
        fs::rename(&new, path)?;
        fault::point("store.renamed");
        File::open(folder)?.sync_all()?;
        fault::point("store.durable");
        Ok(())
    };
    write().map_err(io_at(path))
}

fn write_instance(dir: &Path) -> Result<WitnessInstance, StoreError> {
    let path = dir.join("instance");
    let instance = WitnessInstance(random_u128().map_err(io_at(Path::new("/dev/urandom")))?);
    replace(&path, |new| {
        let inode = new.metadata()?.ino();
        new.write_all(&file::encode(Kind::Instance, &InstanceFile { instance, inode }))
    })?;
    Ok(instance)
}

fn read_instance(dir: &Path) -> Result<WitnessInstance, StoreError> {
    let path = dir.join("instance");
    let bytes = read_small(&path, FILE_BYTES_MAX).map_err(io_at(&path))?;
    let bytes = bytes.ok_or_else(|| StoreError::Missing { dir: dir.to_owned() })?;
    let found: InstanceFile =
        file::decode(Kind::Instance, &bytes).map_err(|problem| StoreError::Corrupt {
            file: path.clone(),
            problem,
        })?;
    if fs::metadata(&path).map_err(io_at(&path))?.ino() != found.inode {
        return Err(StoreError::Copied { dir: dir.to_owned() });
    }
    Ok(found.instance)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_at(folder))? {
        paths.push(entry.map_err(io_at(folder))?.path());
    }
    paths.sort();
    Ok(paths)
}

/// Names of VMs never begin with a dot.
fn is_leftover(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

fn read_records(dir: &Path) -> Result<Vec<(VmId, Record)>, StoreError> {
    let mut records = Vec::new();
    for path in entries(&dir.join("vms"))? {
        if is_leftover(&path) {
            continue;
        }
        let Some(bytes) = read_small(&path, FILE_BYTES_MAX).map_err(io_at(&path))? else {
            // Forgotten between the listing and now.
            continue;
        };
        let found: RecordFile =
            file::decode(Kind::Record, &bytes).map_err(|problem| StoreError::Corrupt {
                file: path.clone(),
                problem,
            })?;
        if path.file_name().is_none_or(|name| name != found.vm.as_str()) {
            return Err(StoreError::OtherVm {
                file: path,
                vm: found.vm,
            });
        }
        records.push((found.vm, found.record));
    }
    Ok(records)
}

fn remove(dir: &Path, vm: &VmId) -> Result<(), StoreError> {
    let folder = dir.join("vms");
    let path = folder.join(vm.as_str());
    match fs::remove_file(&path) {
        Ok(()) => sync_folder(&folder),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(StoreError::UnknownVm { vm: vm.clone() })
        }
        Err(error) => Err(io_at(&path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use romulus_protocol::Mode;
    use romulus_types::{HostId, Nonce, Term};

    fn record(instance: WitnessInstance, term: u64) -> Record {
        let mode = Mode::Alone {
            host: HostId::new("a").unwrap(),
        };
        Record {
            instance,
            term: Term(term),
            mode,
            nonce: Nonce(term.into()),
        }
    }

    fn vm(name: &str) -> VmId {
        VmId::new(name).unwrap()
    }

    #[test]
    fn what_was_written_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let instance = init(dir.path()).unwrap();
        let (store, records) = Store::open(dir.path()).unwrap();
        assert!(records.is_empty() && store.instance() == instance);
        store.write(&vm("web"), &record(instance, 1)).unwrap();
        store.write(&vm("db"), &record(instance, 1)).unwrap();
        store.write(&vm("web"), &record(instance, 2)).unwrap();
        drop(store);
        let (store, records) = Store::open(dir.path()).unwrap();
        assert_eq!(
            records,
            [(vm("db"), record(instance, 1)), (vm("web"), record(instance, 2))]
        );
        store.forget(&vm("web")).unwrap();
        assert!(matches!(
            store.forget(&vm("web")),
            Err(StoreError::UnknownVm { .. })
        ));
        assert_eq!(read(dir.path()).unwrap().1.len(), 1);
    }

    #[test]
    fn a_store_is_made_once_and_used_by_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Store::open(dir.path()), Err(StoreError::Missing { .. })));
        let instance = init(dir.path()).unwrap();
        assert!(matches!(init(dir.path()), Err(StoreError::Exists { .. })));
        let _store = Store::open(dir.path()).unwrap();
        assert!(matches!(Store::open(dir.path()), Err(StoreError::Locked { .. })));
        assert!(matches!(
            forget(dir.path(), &vm("web")),
            Err(StoreError::Locked { .. })
        ));
        assert_eq!(read(dir.path()).unwrap().0, instance);
    }

    #[test]
    fn a_store_that_lost_its_instance_is_not_taken_for_an_empty_place() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path()).unwrap();
        fs::remove_file(dir.path().join("instance")).unwrap();
        assert!(matches!(init(dir.path()), Err(StoreError::Exists { .. })));
        assert!(matches!(Store::open(dir.path()), Err(StoreError::Missing { .. })));
    }

    #[test]
    fn a_copied_store_is_refused_until_it_is_renewed() {
        let dir = tempfile::tempdir().unwrap();
        let original = dir.path().join("original");
        let instance = init(&original).unwrap();
        let (store, _) = Store::open(&original).unwrap();
        store.write(&vm("web"), &record(instance, 7)).unwrap();
        let copy = dir.path().join("copy");
        fs::create_dir_all(copy.join("vms")).unwrap();
        for name in ["instance", "vms/web"] {
            fs::copy(original.join(name), copy.join(name)).unwrap();
        }
        assert!(matches!(Store::open(&copy), Err(StoreError::Copied { .. })));
        let renewed = renew(&copy).unwrap();
        assert_ne!(renewed, instance);
        let (store, records) = Store::open(&copy).unwrap();
        assert_eq!((store.instance(), records.len()), (renewed, 1));
        assert_eq!(
            records[0].1.instance, instance,
            "the record still names the life that made it"
        );
    }

    #[test]
    fn a_torn_or_renamed_record_stops_the_store_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let instance = init(dir.path()).unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        store.write(&vm("web"), &record(instance, 1)).unwrap();
        drop(store);
        let path = dir.path().join("vms/web");
        let whole = fs::read(&path).unwrap();
        for cut in [0, 1, 19, 20, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            let text = Store::open(dir.path()).unwrap_err().to_string();
            assert!(text.contains("vms/web") && text.contains("corrupt"), "{text}");
        }
        fs::write(&path, &whole).unwrap();
        fs::rename(&path, dir.path().join("vms/other")).unwrap();
        assert!(matches!(Store::open(dir.path()), Err(StoreError::OtherVm { .. })));
        fs::rename(dir.path().join("vms/other"), &path).unwrap();
        fs::write(dir.path().join("vms/.web.new"), "half").unwrap();
        let (_store, records) = Store::open(dir.path()).unwrap();
        assert_eq!(records.len(), 1);
        assert!(!dir.path().join("vms/.web.new").exists());
    }
}
