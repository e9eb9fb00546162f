//! Reading a stream, up to its device sections.
//!
//! [`Reader::step`] takes one item from the front of whatever bytes are there, or says that it needs more. It keeps the
//! block list and nothing else, so a stream of any length costs the caller one buffer of [`ITEM_BYTES_MAX`] or more.

use romulus_types::{BLOCKS_MAX, PAGE_BYTES, RAM_BYTES_MAX};

use super::{
    CAPABILITIES, CAPABILITIES_MAX, MACHINE_NAME_BYTES_MAX, MAGIC, RAM_VERSION, SUBSECTIONS_MAX, StreamBlock,
    StreamError, Subsection, TAIL_BYTES_MAX, flag, mark,
};

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Zeros.
    Zero,
    /// These bytes.
    Bytes(&'a [u8; PAGE_BYTES]),
}

/// One item of a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// The header.
    Header,
    /// The machine's name.
    Machine(String),
    /// A subsection of the configuration.
    Subsection(Subsection),
    /// A command to the destination.
    Command {
        /// Its number; 8 is ENABLE_COLO.
        number: u16,
        /// Its data.
        data: &'a [u8],
    },
    /// A RAM section begins; `id` is its number.
    Ram {
        /// Its number.
        id: u32,
        /// Whether it is the last one, with the guest stopped.
        last: bool,
    },
    /// The block list is complete: see [`Reader::blocks`].
    Blocks,
    /// A page.
    Page {
        /// Position in [`Reader::blocks`].
        block: usize,
        /// Offset in the block, in bytes.
        offset: u64,
        /// What it holds.
        content: Content<'a>,
    },
    /// The section's records are over; a footer follows.
    RecordsEnd,
    /// The section is over.
    SectionEnd,
    /// The device sections begin with the byte that is next; from here on the caller collects bytes. Repeated for ever.
    Devices,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    Configuration,
    /// Between sections; `subsections` may follow only the configuration.
    Between {
        subsections: usize,
    },
    Records,
    Footer,
    Devices,
}

/// A reader of one stream.
#[derive(Debug)]
pub struct Reader {
    state: State,
    with_gpa: bool,
    ram_section: Option<u32>,
    ram_ended: bool,
    blocks: Vec<StreamBlock>,
    block_now: Option<usize>,
}

type Stepped<'a> = Result<Option<(usize, Item<'a>)>, StreamError>;

/// Gives up the current step until more bytes are there.
macro_rules! need {
    ($taken:expr) => {
        match $taken {
            Some(value) => value,
            None => return Ok(None),
        }
    };
}

impl Reader {
    /// A reader for a stream of a QEMU with (`with_gpa`) or without the capability x-ignore-shared.
    pub fn new(with_gpa: bool) -> Self {
        Self {
            state: State::Header,
            with_gpa,
            ram_section: None,
            ram_ended: false,
            blocks: Vec::new(),
            block_now: None,
        }
    }

    /// The RAM blocks, once [`Item::Blocks`] was seen.
    pub fn blocks(&self) -> &[StreamBlock] {
        &self.blocks
    }

    /// Takes one item from the front of `input`: how many bytes it used, and what it is. `None`: more bytes are needed,
    /// at most [`super::ITEM_BYTES_MAX`] in all; call again with the same bytes and more behind them.
    ///
    /// # Errors
    /// [`StreamError`] names what is wrong; the reader is of no use then.
    pub fn step<'a>(&mut self, input: &'a [u8]) -> Stepped<'a> {
        let mut at = Cursor { input, used: 0 };
        let item = match self.state {
            State::Header => {
                if need!(at.take(MAGIC.len())) != MAGIC {
                    return Err(StreamError::Header);
                }
                self.state = State::Configuration;
                Item::Header
            }
            State::Configuration => {
                let name = need!(machine(&mut at)?);
                self.state = State::Between { subsections: 0 };
                Item::Machine(name)
            }
            State::Between { subsections } => need!(self.between(&mut at, subsections)?),
            State::Records => need!(self.record(&mut at)?),
            State::Footer => {
                expect(need!(at.u8()), mark::FOOTER, "a section's footer")?;
                self.check_id(need!(at.be32()))?;
                self.state = State::Between {
                    subsections: SUBSECTIONS_MAX,
                };
                Item::SectionEnd
            }
            State::Devices => Item::Devices,
        };
        Ok(Some((at.used, item)))
    }

    fn check_id(&self, id: u32) -> Result<(), StreamError> {
        if self.ram_section == Some(id) {
            Ok(())
        } else {
            Err(StreamError::SectionId(id))
        }
    }

    fn between<'a>(
        &mut self,
        at: &mut Cursor<'a>,
        subsections: usize,
    ) -> Result<Option<Item<'a>>, StreamError> {
        let byte = need!(at.u8());
        let item = match byte {
            mark::SUBSECTION if subsections < SUBSECTIONS_MAX => {
                let subsection = need!(subsection(at)?);
                self.state = State::Between {
                    subsections: subsections + 1,
                };
                return Ok(Some(Item::Subsection(subsection)));
            }
            mark::COMMAND => {
                let number = need!(at.be16());
                let length = need!(at.be16());
                let data = need!(at.take(usize::from(length)));
                self.state = State::Between {
                    subsections: SUBSECTIONS_MAX,
                };
                return Ok(Some(Item::Command { number, data }));
            }
            mark::START if self.ram_section.is_none() => {
                let id = need!(ram_start(at)?);
                self.ram_section = Some(id);
                Item::Ram { id, last: false }
            }
            mark::PART | mark::LAST if self.ram_section.is_some() && !self.ram_ended => {
                let id = need!(at.be32());
                self.check_id(id)?;
                self.ram_ended = byte == mark::LAST;
                Item::Ram {
                    id,
                    last: self.ram_ended,
                }
            }
            mark::START => {
                // A second iterable section: name it, so that the operator knows which device it is.
                need!(at.be32());
                return Err(StreamError::LiveDevice(need!(at.name("a section")?).to_owned()));
            }
            mark::FULL if self.ram_ended => {
                at.used = 0;
                self.state = State::Devices;
                return Ok(Some(Item::Devices));
            }
            mark::FULL => return Err(StreamError::DevicesTooEarly),
            byte => {
                return Err(StreamError::Unexpected {
                    byte,
                    expected: "a section",
                });
            }
        };
        self.state = State::Records;
        Ok(Some(item))
    }

    fn record<'a>(&mut self, at: &mut Cursor<'a>) -> Result<Option<Item<'a>>, StreamError> {
        let head = need!(at.be64());
        let (offset, flags) = (head & !flag::ALL, head & flag::ALL);
        if flags == flag::END {
            self.state = State::Footer;
            return Ok(Some(Item::RecordsEnd));
        }
        if flags == flag::BLOCKS && self.blocks.is_empty() {
            self.blocks = need!(block_list(at, offset, self.with_gpa)?);
            return Ok(Some(Item::Blocks));
        }
        let kind = flags & !flag::CONTINUE;
        if kind != flag::ZERO && kind != flag::PAGE {
            return Err(StreamError::PageFlags(flags));
        }
        let block = if flags & flag::CONTINUE == 0 {
            let name = need!(at.name("a page's RAM block")?);
            self.blocks
                .iter()
                .position(|b| b.name == name)
                .ok_or(StreamError::PageBlock)?
        } else {
            self.block_now.ok_or(StreamError::PageBlock)?
        };
        let content = if kind == flag::ZERO {
            match need!(at.u8()) {
                0 => Content::Zero,
                fill => return Err(StreamError::Fill(fill)),
            }
        } else {
            let bytes = need!(at.take(PAGE_BYTES));
            Content::Bytes(bytes.try_into().expect("PAGE_BYTES were taken"))
        };
        // Block lengths are whole pages, so an offset inside the block is a page inside it.
        if offset >= self.blocks[block].bytes {
            return Err(StreamError::PageOffset {
                block: self.blocks[block].name.clone(),
                offset,
            });
        }
        self.block_now = Some(block);
        Ok(Some(Item::Page {
            block,
            offset,
            content,
        }))
    }
}

/// Where the vmdesc's mark stands in `tail` (everything from the device sections on) if a whole vmdesc ends it.
///
/// The device sections have no length and may hold any bytes. So the vmdesc is recognised from the end: a mark after the
/// sections' end, a length that reaches exactly to the last byte, and JSON that parses.
pub fn vmdesc_at_end(tail: &[u8]) -> Option<usize> {
    if tail.last() != Some(&b'}') || tail.len() > TAIL_BYTES_MAX {
        return None;
    }
    let head = [mark::END, mark::VMDESC];
    (0..tail.len().saturating_sub(6)).find_map(|at| {
        let rest = tail.get(at..)?.strip_prefix(&head)?;
        let (length, json) = rest.split_first_chunk::<4>()?;
        let exact = usize::try_from(u32::from_be_bytes(*length)).ok() == Some(json.len());
        (exact
            && json.first() == Some(&b'{')
            && serde_json::from_slice::<serde::de::IgnoredAny>(json).is_ok())
        .then_some(at + 1)
    })
}

struct Cursor<'a> {
    input: &'a [u8],
    used: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let bytes = self.input.get(self.used..)?.get(..count)?;
        self.used += count;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        Some(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn be16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn be32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn be64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length byte and that many bytes of name.
    fn name(&mut self, of: &'static str) -> Result<Option<&'a str>, StreamError> {
        let length = need!(self.u8());
        let bytes = need!(self.take(usize::from(length)));
        let name = std::str::from_utf8(bytes).map_err(|_| StreamError::Name(of))?;
        if name.is_empty() {
            Err(StreamError::Name(of))
        } else {
            Ok(Some(name))
        }
    }
}

fn expect(byte: u8, wanted: u8, expected: &'static str) -> Result<(), StreamError> {
    if byte == wanted {
        Ok(())
    } else {
        Err(StreamError::Unexpected { byte, expected })
    }
}

fn machine(at: &mut Cursor<'_>) -> Result<Option<String>, StreamError> {
    expect(need!(at.u8()), mark::CONFIGURATION, "the configuration section")?;
    let length = need!(at.be32());
    if length == 0 || length > u32::try_from(MACHINE_NAME_BYTES_MAX).expect("it is small") {
        return Err(StreamError::TooLarge {
            what: "a machine name",
            value: u64::from(length),
        });
    }
    let bytes = need!(at.take(usize::try_from(length).expect("it is small")));
    let name = std::str::from_utf8(bytes).map_err(|_| StreamError::Name("the machine"))?;
    Ok(Some(name.to_owned()))
}

/// Subsections have no length of their own, so each has to be known.
fn subsection(at: &mut Cursor<'_>) -> Result<Option<Subsection>, StreamError> {
    let name = need!(at.name("a subsection")?);
    let version = need!(at.be32());
    let from = at.used;
    match name {
        CAPABILITIES => {
            let count = need!(at.be32());
            if count > CAPABILITIES_MAX {
                return Err(StreamError::TooLarge {
                    what: "capabilities",
                    value: u64::from(count),
                });
            }
            for _ in 0..count {
                need!(at.name("a capability")?);
            }
        }
        "configuration/target-page-bits" => drop(need!(at.be32())),
        "configuration/uuid" => drop(need!(at.take(16))),
        _ => return Err(StreamError::Subsection(name.to_owned())),
    }
    Ok(Some(Subsection {
        name: name.to_owned(),
        version,
        data: at.input[from..at.used].to_vec(),
    }))
}

fn ram_start(at: &mut Cursor<'_>) -> Result<Option<u32>, StreamError> {
    let id = need!(at.be32());
    let name = need!(at.name("a section")?);
    need!(at.be32());
    let version = need!(at.be32());
    if name != "ram" {
        return Err(StreamError::LiveDevice(name.to_owned()));
    }
    if version != RAM_VERSION {
        return Err(StreamError::RamVersion(version));
    }
    Ok(Some(id))
}

fn block_list(
    at: &mut Cursor<'_>,
    total: u64,
    with_gpa: bool,
) -> Result<Option<Vec<StreamBlock>>, StreamError> {
    if total == 0 || total > RAM_BYTES_MAX {
        return Err(StreamError::TooLarge {
            what: "memory",
            value: total,
        });
    }
    let mut blocks: Vec<StreamBlock> = Vec::new();
    let mut left = total;
    while left > 0 {
        if blocks.len() == BLOCKS_MAX {
            return Err(StreamError::TooLarge {
                what: "RAM blocks",
                value: (BLOCKS_MAX + 1) as u64,
            });
        }
        let name = need!(at.name("a RAM block")?).to_owned();
        let bytes = need!(at.be64());
        let gpa = if with_gpa { Some(need!(at.be64())) } else { None };
        if blocks.iter().any(|b| b.name == name) {
            return Err(StreamError::Name("a RAM block"));
        }
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(StreamError::BlockTotal(total));
        }
        left = left.checked_sub(bytes).ok_or(StreamError::BlockTotal(total))?;
        blocks.push(StreamBlock { name, bytes, gpa });
    }
    Ok(Some(blocks))
}
