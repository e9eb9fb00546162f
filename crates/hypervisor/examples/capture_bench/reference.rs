//! The parts of a checkpoint, each done alone.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use romulus_host_sys::{
    Pagemap, ReadOutcome, UserFault, create_here, make_fifo, monotonic_ns, open_fifo_reader,
    read_nonblocking, resident_buffer, resize_pipe,
};
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_types::{PAGE_BYTES, PageIndex};
use serde_json::json;

/// How often QEMU saves its state alone.
const SAVES: usize = 100;

/// What finding and copying pages took.
pub(crate) struct Alone {
    pub(crate) scan_ns: u64,
    pub(crate) copy_ns: u64,
}

/// Private memory of this process, as large as the guest, tracked as the guest's is.
pub(crate) struct ReferenceMemory {
    memory: Vec<u8>,
    /// Where its first whole page begins.
    skipped: usize,
    _fault: UserFault,
    pagemap: Pagemap,
    into: Vec<u8>,
}

impl ReferenceMemory {
    pub(crate) fn new(pages: usize) -> Result<Self, Box<dyn Error>> {
        // Not zeros, and small pages: what a write-protected guest has in the end.
        let memory = vec![1_u8; (pages + 1) * PAGE_BYTES];
        let skipped = memory.as_ptr().align_offset(PAGE_BYTES);
        let fault = UserFault::enable(create_here()?)?;
        let (start, bytes) = (memory[skipped..].as_ptr() as u64, (pages * PAGE_BYTES) as u64);
        fault.register(start, bytes)?;
        fault.write_protect(start, bytes)?;
        Ok(Self {
            memory,
            skipped,
            _fault: fault,
            pagemap: Pagemap::open(std::process::id())?,
            into: resident_buffer(16 << 20),
        })
    }

    /// Writes a word to each of the pages, finds them and copies them.
    pub(crate) fn repeat(&mut self, pages: &[PageIndex]) -> Result<Alone, Box<dyn Error>> {
        let place = |page: &PageIndex| usize::try_from(page.0).map(|page| self.skipped + page * PAGE_BYTES);
        let places: Vec<usize> = pages.iter().map(place).collect::<Result<_, _>>()?;
        for at in &places {
            self.memory[*at] = self.memory[*at].wrapping_add(1);
        }
        if self.into.len() < places.len() * PAGE_BYTES {
            self.into = resident_buffer(2 * places.len() * PAGE_BYTES);
        }
        let all = &self.memory[self.skipped..self.memory.len() - (PAGE_BYTES - self.skipped)];
        let start = all.as_ptr() as u64;
        let mut found = 0;
        let begun_ns = monotonic_ns();
        self.pagemap
            .harvest_written(start, start + all.len() as u64, |region| found += region.bytes())?;
        let scanned_ns = monotonic_ns();
        for (at, into) in places.iter().zip(self.into.chunks_mut(PAGE_BYTES)) {
            into.copy_from_slice(&self.memory[*at..*at + PAGE_BYTES]);
        }
        let copied_ns = monotonic_ns();
        if found != (places.len() * PAGE_BYTES) as u64 {
            return Err(format!("{} pages were written, {found} bytes found", places.len()).into());
        }
        Ok(Alone {
            scan_ns: scanned_ns - begun_ns,
            copy_ns: copied_ns - scanned_ns,
        })
    }
}

/// From STOP to RESUME of QEMU, when it saves its device state and somebody else reads that as fast as it comes.
pub(crate) fn saves_alone(qmp: &Path, fifo: &Path) -> Result<Vec<u64>, Box<dyn Error>> {
    let owner = rustix::process::getuid();
    make_fifo(fifo, owner.as_raw(), rustix::process::getgid().as_raw())?;
    let mut monitor = Qmp::connect(qmp, Instant::now() + Duration::from_secs(10))?;
    let arguments =
        json!({ "filename": fifo.to_str().ok_or("the folder's name is no text")?, "live": false });
    let mut saves_ns = Vec::with_capacity(SAVES);
    for _ in 0..SAVES {
        std::thread::sleep(Duration::from_millis(25));
        let reader = open_fifo_reader(fifo)?;
        // It takes all of the state: QEMU waits for nobody.
        resize_pipe(&reader, 1 << 20)?;
        monitor.execute("xen-save-devices-state", arguments.clone())?;
        let mut scrap = vec![0; 1 << 20];
        while !matches!(read_nonblocking(&reader, &mut scrap)?, ReadOutcome::End) {}
        let (mut stop_us, mut resume_us) = (None, None);
        while let Some(event) = monitor.next_event(Instant::now())? {
            match event.name.as_str() {
                "STOP" => stop_us = Some(event.at_us()),
                "RESUME" => resume_us = Some(event.at_us()),
                _ => {}
            }
        }
        let (stop_us, resume_us) = stop_us.zip(resume_us).ok_or("QEMU told no STOP and RESUME")?;
        saves_ns.push(resume_us.saturating_sub(stop_us) * 1000);
    }
    std::fs::remove_file(fifo)?;
    Ok(saves_ns)
}
