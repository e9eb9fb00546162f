//! Memory files that have no name in any file system: a keeper outside of this process holds them, by names that say whose
//! they are, and hands them to our next life.
//!
//! A file that was made survives this process once [`settle`](Shelf::settle) has returned. An image is complete only
//! with its layout, and its layout is synced, and so settled, last: a file that the keeper did not get makes no image.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use romulus_types::VmId;
use rustix::fs::{MemfdFlags, memfd_create};

use super::FileName;
use super::shelf::{Claim, Shelf};
use crate::ImageError;

/// What the names of our files begin with; others may keep files at the same keeper.
const PREFIX: &str = "image/";

/// Who keeps files for us while we are not there.
pub trait Keeper: Debug + Send + Sync {
    /// Has this file kept under a name: at most 255 printable ASCII characters, no colon.
    ///
    /// # Errors
    /// When the keeper can't be told.
    fn keep(&self, name: &str, file: &File) -> io::Result<()>;

    /// Has the files of this name forgotten.
    ///
    /// # Errors
    /// When the keeper can't be told.
    fn let_go(&self, name: &str) -> io::Result<()>;

    /// Waits until the keeper has done all that it was told.
    ///
    /// # Errors
    /// When it does not within a time of its own.
    fn settle(&self) -> io::Result<()>;
}

/// The name by which a file is kept.
fn kept_name(vm: &VmId, name: FileName) -> String {
    format!("{PREFIX}{vm}/{name}")
}

/// Whose file it is, if it is ours.
fn parse(name: &str) -> Option<(VmId, FileName)> {
    let (vm, file) = name.strip_prefix(PREFIX)?.split_once('/')?;
    Some((VmId::new(vm).ok()?, file.parse().ok()?))
}

type Key = (VmId, FileName);

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<Key, Arc<File>>,
    claimed: BTreeSet<VmId>,
}

/// Images in memory files that a [`Keeper`] keeps.
#[derive(Clone, Debug)]
pub struct KeptShelf(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    keeper: Box<dyn Keeper>,
    files_max: usize,
    /// Never held while the keeper is talked to: other VMs need not wait for that.
    state: Mutex<State>,
    /// How often the keeper was told something.
    told: AtomicU64,
    /// How much of that it is known to have done.
    done: AtomicU64,
}

impl Inner {
    fn keep(&self, name: &str, file: &File) -> io::Result<()> {
        self.keeper.keep(name, file)?;
        self.told.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn let_go(&self, name: &str) -> io::Result<()> {
        self.keeper.let_go(name)?;
        self.told.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the claim back.
struct Release(Arc<Inner>, VmId);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.state().claimed.remove(&self.1);
    }
}

impl KeptShelf {
    /// A shelf with what the keeper handed to us, of at most `files_max` files. Also returns the names of files that are
    /// no image's; they are closed here, and whoever put them there still has them kept.
    ///
    /// # Errors
    /// When the keeper can't be told to forget a file that is there twice: which one is right is not known.
    pub fn new(
        keeper: Box<dyn Keeper>,
        found: impl IntoIterator<Item = (String, OwnedFd)>,
        files_max: usize,
    ) -> io::Result<(Self, Vec<String>)> {
        let mut state = State::default();
        let (mut strangers, mut doubtful) = (Vec::new(), BTreeSet::new());
        for (name, fd) in found {
            let file = File::from(fd);
            match parse(&name) {
                Some(key) if file.metadata().is_ok_and(|metadata| metadata.is_file()) => {
                    if state.files.insert(key.clone(), Arc::new(file)).is_some() {
                        doubtful.insert(key);
                    }
                }
                _ => strangers.push(name),
            }
        }
        for key in &doubtful {
            state.files.remove(key);
        }
        let inner = Inner {
            keeper,
            files_max,
            state: Mutex::new(state),
            told: AtomicU64::new(0),
            done: AtomicU64::new(0),
        };
        for (vm, name) in &doubtful {
            inner.let_go(&kept_name(vm, *name))?;
        }
        Ok((Self(Arc::new(inner)), strangers))
    }
}

impl Shelf for KeptShelf {
    fn claim(&self, vm: &VmId, files: usize) -> Result<Claim, ImageError> {
        let mut state = self.0.state();
        // An attempt that was not completed is replaced file by file.
        let used = state.files.keys().filter(|(owner, _)| owner != vm).count();
        if files > 0 && used.saturating_add(files) > self.0.files_max {
            return Err(ImageError::ShelfFull {
                needed: files,
                used,
                files_max: self.0.files_max,
            });
        }
        if !state.claimed.insert(vm.clone()) {
            return Err(ImageError::InUse {
                place: format!("the fd store under {PREFIX}{vm}"),
            });
        }
        Ok(Box::new(Release(Arc::clone(&self.0), vm.clone())))
    }

    fn open(&self, vm: &VmId, name: FileName) -> io::Result<Option<Arc<File>>> {
        Ok(self.0.state().files.get(&(vm.clone(), name)).cloned())
    }

    fn create(&self, vm: &VmId, name: FileName) -> io::Result<Arc<File>> {
        let (key, kept_as) = ((vm.clone(), name), kept_name(vm, name));
        let file = Arc::new(File::from(memfd_create(&kept_as, MemfdFlags::CLOEXEC)?));
        let replaced = self.0.state().files.remove(&key);
        if replaced.is_some() {
            self.0.let_go(&kept_as)?;
        }
        self.0.keep(&kept_as, &file)?;
        self.0.state().files.insert(key, Arc::clone(&file));
        Ok(file)
    }

    fn settle(&self) -> io::Result<()> {
        let told = self.0.told.load(Ordering::SeqCst);
        if self.0.done.load(Ordering::SeqCst) < told {
            self.0.keeper.settle()?;
            self.0.done.fetch_max(told, Ordering::SeqCst);
        }
        Ok(())
    }

    fn path(&self, vm: &VmId, name: FileName) -> PathBuf {
        let state = self.0.state();
        let number = state.files.get(&(vm.clone(), name)).map(AsRawFd::as_raw_fd);
        // -1 is nobody's: opening it says that there is no such file.
        let (process, number) = (std::process::id(), number.unwrap_or(-1));
        PathBuf::from(format!("/proc/{process}/fd/{number}"))
    }

    fn has(&self, vm: &VmId) -> bool {
        self.0.state().files.keys().any(|(owner, _)| owner == vm)
    }

    fn vms(&self) -> io::Result<Vec<VmId>> {
        let vms: BTreeSet<VmId> = self.0.state().files.keys().map(|(vm, _)| vm.clone()).collect();
        Ok(vms.into_iter().collect())
    }

    fn remove_all(&self, vm: &VmId) -> io::Result<()> {
        // The layout is the first of the names: without it what is left after a crash here is not an image any more.
        let files: Vec<Key> = {
            let state = self.0.state();
            let keys = state.files.keys();
            keys.filter(|(owner, _)| owner == vm).cloned().collect()
        };
        for key in files {
            self.0.let_go(&kept_name(&key.0, key.1))?;
            self.0.state().files.remove(&key);
        }
        self.settle()
    }

    fn size_bytes(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use romulus_types::{BLOCKS_MAX, BlockId, NAME_BYTES_MAX};

    use super::super::Area;
    use super::*;

    #[test]
    fn every_file_of_every_vm_has_a_name_that_systemd_takes_and_that_leads_back_to_it() {
        let last = u16::try_from(BLOCKS_MAX - 1).unwrap();
        let names = [
            FileName::Layout,
            FileName::Commit,
            FileName::Ram(BlockId(0)),
            FileName::Ram(BlockId(last)),
            FileName::Staging(Area::A),
            FileName::Staging(Area::B),
        ];
        for vm in ["web", "a.b-c_D", &"v".repeat(NAME_BYTES_MAX)] {
            let vm = VmId::new(vm).unwrap();
            for name in names {
                let kept = kept_name(&vm, name);
                assert!(
                    kept.len() <= 255 && kept.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':')
                );
                assert_eq!(parse(&kept), Some((vm.clone(), name)), "{kept}");
            }
        }
        for other in [
            "stored",
            "image/web",
            "image/web/ram-01",
            "image/web/ram-",
            "image//layout",
            "image/web/lock",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
