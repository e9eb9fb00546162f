//! Where one VM's image lies, what machine it is of, and its life from session to session.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use romulus_host_sys::durable;
use romulus_hypervisor::fault;
use romulus_hypervisor::spec::MachineSpec;
use romulus_image::{Image, ImageError, ImageState, Limits, PlacedFiles, Places, UnusableReason, Usage};
use romulus_page_codec::Page;
use romulus_protocol::ImageStatus;
use romulus_types::{BlockId, Digest, Epoch, PageIndex, Session, VmId};
use tracing::{debug, info, warn};

/// Largest description of a machine that is read back, in bytes.
const MACHINE_BYTES_MAX: u64 = 4 << 20;

/// The fault point between two pages.
const IN_APPLY: &str = "agent.in_apply";

/// The last commit.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    /// Its session.
    pub session: Session,
    /// Its epoch.
    pub epoch: Epoch,
}

/// What the name of the mark of a consumed image ends with.
const CONSUMED: &str = ".consumed";
/// What the name of a machine's description ends with.
const MACHINE: &str = ".machine.json";

/// One VM's image, and the notes beside it: the machine that it is of, and whether a guest was started from it. They are files in a
/// folder wherever the image lies, so that a guest is found again even when its image is gone.
pub struct VmImage {
    places: Places,
    /// Where the notes beside it lie.
    dir: PathBuf,
    vm: VmId,
    limits: Limits,
    image: Option<Image<PlacedFiles>>,
    machine: Option<Arc<MachineSpec>>,
}

impl VmImage {
    /// Opens what an earlier life left in `places` and in `dir`, if it is whole; anything else is removed and copied again.
    ///
    /// # Errors
    /// When the folder can't be used.
    pub fn open(places: &Places, dir: &Path, vm: &VmId, limits: Limits) -> anyhow::Result<Self> {
        if let Some(ending) = [CONSUMED, MACHINE]
            .iter()
            .find(|ending| vm.as_str().ends_with(**ending))
        {
            bail!("a VM that is backed up must not have a name that ends with {ending}");
        }
        let mut this = Self {
            places: places.clone(),
            dir: dir.into(),
            vm: vm.clone(),
            limits,
            image: None,
            machine: None,
        };
        // A guest was started from a consumed image and may be running in its files: they are not ours to open.
        if this.consumed_file().exists() {
            this.machine = this.read_machine();
            return Ok(this);
        }
        if !places.shelf.has(vm) {
            return Ok(this);
        }
        match Image::open_at(places, vm, limits) {
            Ok(image) => {
                this.image = Some(image);
                this.machine = this.read_machine();
                this.tell_found();
            }
            Err(
                error @ (ImageError::LayoutDamaged
                | ImageError::FileLength { .. }
                | ImageError::Version { .. }),
            ) => {
                warn!(vm = vm.as_str(), %error, "the image of an earlier life can't be used; it will be copied again");
                places.remove_all(vm).context("could not remove it")?;
            }
            Err(error) => return Err(error).context("the image of an earlier life can't be opened"),
        }
        Ok(this)
    }

    fn tell_found(&self) {
        let vm = self.vm.as_str();
        match self.image.as_ref().map(Image::state) {
            Some(ImageState::Committed { session, epoch, .. }) => {
                info!(event = "image_found", vm, session = %session, epoch = epoch.0);
            }
            Some(state) => info!(event = "image_found", vm, %state, "without a commit that can be used"),
            None => {}
        }
    }

    /// The VMs from whose images guests were started, by the marks in `dir`.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn consumed(dir: &Path) -> std::io::Result<Vec<VmId>> {
        let mut vms = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // A folder of this name is the image of a VM that is called so.
            if entry.file_type()?.is_file() {
                vms.extend(name.strip_suffix(CONSUMED).and_then(|vm| VmId::new(vm).ok()));
            }
        }
        Ok(vms)
    }

    fn machine_file(&self) -> PathBuf {
        self.dir.join(format!("{}{MACHINE}", self.vm))
    }

    fn consumed_file(&self) -> PathBuf {
        self.dir.join(format!("{}{CONSUMED}", self.vm))
    }

    /// The machine, unless there is no description of it, or one that can't be used, which is said.
    fn read_machine(&self) -> Option<Arc<MachineSpec>> {
        let file = self.machine_file();
        let read = durable::read_small(&file, MACHINE_BYTES_MAX).map_err(anyhow::Error::from);
        let machine =
            read.and_then(|bytes| Ok(bytes.map(|bytes| MachineSpec::from_json(&bytes)).transpose()?));
        let machine = machine.unwrap_or_else(|error| {
            let (vm, file, error) = (self.vm.as_str(), file.display(), format!("{error:#}"));
            warn!(event = "machine_unreadable", vm, %file, error);
            None
        });
        machine.map(Arc::new)
    }

    /// What the protocol is told at the start.
    pub fn status(&self) -> ImageStatus {
        if self.consumed_file().exists() {
            return ImageStatus::Consumed;
        }
        match (self.committed(), &self.machine) {
            (Some(Committed { session, epoch }), Some(_)) => ImageStatus::Committed { session, epoch },
            _ => ImageStatus::Unusable,
        }
    }

    /// Makes the image ready for a new session of this machine: unusable, receiving. What it still holds of an earlier
    /// session is told to `held`, page by page.
    ///
    /// # Errors
    /// When the files can't be made.
    pub fn begin(
        &mut self,
        session: Session,
        machine: Arc<MachineSpec>,
        held: impl FnMut(PageIndex, &Page),
    ) -> anyhow::Result<()> {
        self.open_again_if_failed()?;
        if self.consumed_file().exists() {
            // A guest was started from these files, and whatever became of it, they are its own.
            self.image = None;
        }
        let same_layout = self
            .image
            .as_ref()
            .is_some_and(|image| *image.layout() == machine.layout);
        if let Some(image) = self.image.take() {
            if same_layout {
                self.image = Some(image);
            } else {
                image
                    .remove()
                    .context("could not remove the image of another machine")?;
            }
        }
        if self.image.is_none() {
            self.places
                .remove_all(&self.vm)
                .context("could not remove a consumed image")?;
        }
        let image = match &mut self.image {
            Some(image) => image,
            None => self.image.insert(
                Image::create_at(&self.places, &self.vm, machine.layout.clone(), self.limits)
                    .context("could not make the image")?,
            ),
        };
        image.mark_unusable()?;
        image.begin_sync(session)?;
        image.survey(held)?;
        durable::replace(&self.machine_file(), &machine.to_json()).context("could not keep the machine")?;
        self.machine = Some(machine);
        if self.consumed_file().exists() {
            std::fs::remove_file(self.consumed_file())?;
        }
        Ok(())
    }

    /// After a write that failed half way, what stands is known only by opening the image again; one that can't be opened
    /// is removed, and copied again.
    fn open_again_if_failed(&mut self) -> anyhow::Result<()> {
        let failed = ImageState::Unusable {
            reason: UnusableReason::WriteFailed,
        };
        if self.image.as_ref().is_none_or(|image| image.state() != failed) {
            return Ok(());
        }
        self.image = None;
        match Image::open_at(&self.places, &self.vm, self.limits) {
            Ok(image) => self.image = Some(image),
            Err(error) => {
                warn!(vm = self.vm.as_str(), %error, "an image that could not be written is removed");
                self.places
                    .remove_all(&self.vm)
                    .context("could not remove an image")?;
            }
        }
        Ok(())
    }

    /// The image, when a session has made one.
    ///
    /// # Errors
    /// When there is none.
    pub fn image(&mut self) -> anyhow::Result<&mut Image<PlacedFiles>> {
        self.image.as_mut().ok_or_else(|| anyhow!("there is no image"))
    }

    /// The machine that the image is of.
    ///
    /// # Errors
    /// When there is none.
    pub fn machine(&self) -> anyhow::Result<&Arc<MachineSpec>> {
        self.machine
            .as_ref()
            .ok_or_else(|| anyhow!("no machine is known"))
    }

    /// The last commit, if it can be used.
    pub fn committed(&self) -> Option<Committed> {
        match self.image.as_ref()?.state() {
            ImageState::Committed { session, epoch, .. } => Some(Committed { session, epoch }),
            ImageState::Unusable { .. } | ImageState::Syncing { .. } => None,
        }
    }

    /// Writes the last commit into the memory files.
    ///
    /// # Errors
    /// When a file can't be written; the commit still stands and is redone when the image is opened again.
    pub fn apply(&mut self) -> anyhow::Result<()> {
        let image = self.image()?;
        if fault::is_armed(IN_APPLY) && !image.apply_some(1)? {
            fault::point(IN_APPLY);
        }
        Ok(image.apply()?)
    }

    /// Drops what is staged and not committed, and gives back what that took.
    pub fn discard_staging(&mut self) {
        if let Some(image) = &mut self.image {
            image.discard_staging();
            // What can't be given back now is by the next checkpoint.
            if let Err(error) = image.release_staging() {
                debug!(vm = self.vm.as_str(), %error, "staging is kept");
            }
        }
    }

    /// *Durable*: the image must never be used again as it is.
    ///
    /// # Errors
    /// When that can't be written.
    pub fn mark_unusable(&mut self) -> anyhow::Result<()> {
        self.open_again_if_failed()?;
        match &mut self.image {
            Some(image) => Ok(image.mark_unusable()?),
            None => Ok(()),
        }
    }

    /// *Durable*: a guest was started from it, so it is no checkpoint any more.
    ///
    /// # Errors
    /// When that can't be written; the guest must not be started then.
    pub fn mark_consumed(&self) -> anyhow::Result<()> {
        // Empty: a file without blocks can be made in a file system that is full, which must not prevent a takeover.
        durable::replace(&self.consumed_file(), b"").context("could not mark the image as consumed")
    }

    /// No guest has read it after all: it is the checkpoint that it was. A mark that comes back after a crash of the host
    /// is on the safe side.
    ///
    /// # Errors
    /// When the mark can't be removed.
    pub fn unmark_consumed(&self) -> anyhow::Result<()> {
        remove_file(&self.consumed_file()).context("the mark of a consumed image")
    }

    /// Device state of the last commit, with the primary's notes in front.
    ///
    /// # Errors
    /// When nothing is committed.
    pub fn guest_state(&self) -> anyhow::Result<Vec<u8>> {
        let image = self.image.as_ref().context("there is no image")?;
        Ok(image.device_state()?)
    }

    /// Takes the mark of consumption back if no guest has ever run from the image: its memory still is, to the bit, what was
    /// committed. (A guest can't send a frame without writing to its memory.) Only when no machine lives that could have it mapped.
    /// Whether it is a checkpoint again; otherwise the mark stays.
    ///
    /// # Errors
    /// When the image or the mark can't be read or removed.
    pub fn reclaim(&mut self) -> anyhow::Result<bool> {
        if self.machine.is_none() || !self.places.shelf.has(&self.vm) {
            return Ok(false);
        }
        let image = Image::open_at(&self.places, &self.vm, self.limits).context("the consumed image")?;
        if !matches!(image.state(), ImageState::Committed { .. }) {
            return Ok(false);
        }
        std::fs::remove_file(self.consumed_file()).context("could not remove the mark of consumption")?;
        self.image = Some(image);
        Ok(true)
    }

    /// The digest of all memory in the last commit.
    ///
    /// # Errors
    /// When there is no image.
    pub fn digest(&self) -> anyhow::Result<Digest> {
        Ok(self.image.as_ref().context("there is no image")?.image_digest())
    }

    /// Commit slots that were torn or damaged when the image was opened; opening compares all memory with its digests, too.
    pub fn damaged_slots(&self) -> u8 {
        self.image
            .as_ref()
            .map_or(0, |image| image.recovery().damaged_slots)
    }

    /// The file of a memory block.
    ///
    /// # Errors
    /// When there is no image.
    pub fn ram_path(&self, block: BlockId) -> anyhow::Result<PathBuf> {
        Ok(self.image.as_ref().context("there is no image")?.ram_path(block))
    }

    /// Removes everything that is kept of the VM. Without its machine an image is no checkpoint, so that goes first; the mark of
    /// consumption goes last.
    ///
    /// # Errors
    /// When a file can't be removed.
    pub fn forget(&mut self) -> anyhow::Result<()> {
        self.machine = None;
        remove_file(&self.machine_file())?;
        self.image = None;
        self.places
            .remove_all(&self.vm)
            .context("could not remove the image")?;
        remove_file(&self.consumed_file())
    }

    /// Whether it all lies in memory, so that no write waits for a disk, and staging a small checkpoint has nothing large to give back.
    pub fn is_at_hand(&self) -> bool {
        self.image.as_ref().is_some_and(|image| {
            let files = image.files();
            files.memory().in_memory() && files.is_ready(image.limits().staging_bytes_kept)
        })
    }

    /// Bytes of its staging that lie in files, as they had no room in memory.
    pub fn spilled_bytes(&self) -> u64 {
        let image = self.image.as_ref();
        image.map_or(0, |image| image.files().spilled_bytes())
    }

    /// The memory that it takes; nothing when that can't be found out.
    pub fn usage(&self) -> Usage {
        self.image
            .as_ref()
            .and_then(|image| image.usage().ok())
            .unwrap_or_default()
    }
}

/// Removes a file that may be gone already.
fn remove_file(file: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", file.display()))
        }
        _ => Ok(()),
    }
}
