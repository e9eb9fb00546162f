//! Reading the stream from its socket and keeping what is small.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use romulus_types::{BlockId, PAGE_BYTES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::json;

use super::{BootstrapError, Options, settings};
use crate::fault;
use crate::qemu::qmp::Monitor;
use crate::qemu::stream::{
    Content, ITEM_BYTES_MAX, Item, Reader, Subsection, TAIL_BYTES_MAX, Template, vmdesc_at_end,
};

const BUFFER_BYTES: usize = 1 << 20;
/// Longest wait before `progress` is called again.
const TICK: Duration = Duration::from_millis(50);
/// How often the guest's planned pause is doubled while the stream has no end.
const RELAX: Duration = Duration::from_secs(2);
/// The only command that such a stream carries.
const ENABLE_COLO: u16 = 8;

const _: () = assert!(BUFFER_BYTES > 2 * ITEM_BYTES_MAX);

pub(super) struct Received {
    pub(super) template: Template,
    pub(super) main: BlockId,
    pub(super) contents: Vec<Option<Vec<u8>>>,
}

/// Reads everything up to the vmdesc.
pub(super) fn receive(
    monitor: &mut dyn Monitor,
    stream: &UnixStream,
    options: &Options,
    deadline: Instant,
    progress: &mut dyn FnMut(),
) -> Result<Received, BootstrapError> {
    let mut collector = Collector::new(options);
    let mut buffer = vec![0u8; BUFFER_BYTES];
    let (mut start, mut end) = (0, 0);
    let mut pacer = Pacer::new(options);
    loop {
        progress();
        if Instant::now() >= deadline {
            return Err(BootstrapError::TooSlow);
        }
        let readable = wait(
            stream,
            TICK.min(deadline.saturating_duration_since(Instant::now())),
        )?;
        if readable {
            end += read(stream, &mut buffer[end..])?;
            start += collector.take(&buffer[start..end])?;
            buffer.copy_within(start..end, 0);
            (start, end) = (0, end - start);
        } else {
            pacer.relax(monitor)?;
        }
        if collector.tail_may_be_complete() {
            // Everything was written before QEMU says "colo". What only looks like an end is followed by more bytes.
            let state = settings::migration_state(monitor)?.unwrap_or_default();
            if state == "colo" && !wait(stream, Duration::ZERO)? {
                return collector.finish();
            }
        }
        if !readable {
            check_alive(monitor)?;
        }
    }
}

fn check_alive(monitor: &mut dyn Monitor) -> Result<(), BootstrapError> {
    match settings::migration_state(monitor)? {
        Some(state) if settings::is_over(&state) => {
            Err(BootstrapError::GaveUp(settings::migration_error(monitor)?))
        }
        _ => Ok(()),
    }
}

/// Lets QEMU plan longer pauses as time goes by, so that a busy guest's stream ends at all.
struct Pacer {
    pause_ms: u64,
    pause_ms_max: u64,
    next: Instant,
}

impl Pacer {
    fn new(options: &Options) -> Self {
        Self {
            pause_ms: options.pause_ms_max / 10,
            pause_ms_max: options.pause_ms_max,
            next: Instant::now() + RELAX,
        }
    }

    fn relax(&mut self, monitor: &mut dyn Monitor) -> Result<(), BootstrapError> {
        if Instant::now() < self.next || self.pause_ms >= self.pause_ms_max {
            return Ok(());
        }
        self.pause_ms = (self.pause_ms * 2).clamp(1, self.pause_ms_max);
        self.next = Instant::now() + RELAX;
        monitor.execute(
            "migrate-set-parameters",
            json!({ "downtime-limit": self.pause_ms }),
        )?;
        Ok(())
    }
}

/// Puts the items together.
struct Collector {
    reader: Reader,
    machine: String,
    subsections: Vec<Subsection>,
    ram_section: u32,
    contents: Vec<Option<Vec<u8>>>,
    main: usize,
    small_bytes_max: u64,
    /// From the device sections on.
    tail: Vec<u8>,
    in_tail: bool,
}

impl Collector {
    fn new(options: &Options) -> Self {
        Self {
            reader: Reader::new(options.shared_ram),
            machine: String::new(),
            subsections: Vec::new(),
            ram_section: 0,
            contents: Vec::new(),
            main: 0,
            small_bytes_max: options.small_bytes_max,
            tail: Vec::new(),
            in_tail: false,
        }
    }

    /// Takes whole items from the front of `bytes`; returns how many bytes they had.
    fn take(&mut self, bytes: &[u8]) -> Result<usize, BootstrapError> {
        let mut at = 0;
        while !self.in_tail {
            let Some((used, item)) = self.reader.step(&bytes[at..])? else {
                return Ok(at);
            };
            at += used;
            match item {
                Item::Machine(name) => self.machine = name,
                Item::Subsection(subsection) => self.subsections.push(subsection),
                Item::Command {
                    number: ENABLE_COLO, ..
                } => {}
                Item::Command { number, .. } => return Err(BootstrapError::Command(number)),
                Item::Ram { id, last } => {
                    self.ram_section = id;
                    if last {
                        fault::point("bootstrap.in_ram");
                    }
                }
                Item::Blocks => self.plan(),
                Item::Page {
                    block,
                    offset,
                    content,
                } => store(self.contents[block].as_mut(), offset, content),
                Item::Devices => self.in_tail = true,
                Item::Header | Item::RecordsEnd | Item::SectionEnd => {}
            }
        }
        self.tail.extend_from_slice(&bytes[at..]);
        if self.tail.len() > TAIL_BYTES_MAX {
            return Err(BootstrapError::TailTooLarge);
        }
        Ok(bytes.len())
    }

    /// Decides which blocks are kept.
    fn plan(&mut self) {
        let blocks = self.reader.blocks();
        let largest = blocks
            .iter()
            .enumerate()
            .max_by_key(|(position, b)| (b.bytes, usize::MAX - position));
        self.main = largest.map_or(0, |(position, _)| position);
        let mut left = self.small_bytes_max;
        let keep = blocks.iter().enumerate().map(|(position, block)| {
            let fits = position != self.main && block.bytes <= left;
            if fits {
                left -= block.bytes;
            }
            let bytes = usize::try_from(block.bytes).ok().filter(|_| fits)?;
            Some(vec![0u8; bytes])
        });
        self.contents = keep.collect();
    }

    fn tail_may_be_complete(&self) -> bool {
        self.in_tail && self.tail.last() == Some(&b'}') && vmdesc_at_end(&self.tail).is_some()
    }

    fn finish(self) -> Result<Received, BootstrapError> {
        let mark = vmdesc_at_end(&self.tail).expect("the caller has seen the end");
        let json = &self.tail[mark + 5..];
        let vmdesc = std::str::from_utf8(json)
            .expect("JSON that parsed is UTF-8")
            .to_owned();
        Ok(Received {
            main: BlockId(u16::try_from(self.main).expect("BLOCKS_MAX fits in 16 bits")),
            template: Template {
                machine: self.machine,
                subsections: self.subsections,
                ram_section: self.ram_section,
                blocks: self.reader.blocks().to_vec(),
                vmdesc,
            },
            contents: self.contents,
        })
    }
}

fn store(block: Option<&mut Vec<u8>>, offset: u64, content: Content<'_>) {
    let Some(block) = block else { return };
    let offset = usize::try_from(offset).expect("the reader checked it against a block that fits in memory");
    let page = &mut block[offset..offset + PAGE_BYTES];
    match content {
        Content::Zero => page.fill(0),
        Content::Bytes(bytes) => page.copy_from_slice(bytes),
    }
}

/// Whether bytes, or the stream's end, are there within `timeout`.
fn wait(stream: &UnixStream, timeout: Duration) -> Result<bool, BootstrapError> {
    let fd = stream.as_fd();
    let timeout = Timespec::try_from(timeout).ok();
    match poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(BootstrapError::Socket(error.into())),
    }
}

fn read(mut stream: &UnixStream, into: &mut [u8]) -> Result<usize, BootstrapError> {
    assert!(!into.is_empty(), "an item is smaller than the buffer");
    match stream.read(into) {
        Ok(0) => Err(BootstrapError::GaveUp("it closed the stream".to_owned())),
        Ok(count) => Ok(count),
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
            ) =>
        {
            Ok(0)
        }
        Err(error) => Err(BootstrapError::Socket(error)),
    }
}
