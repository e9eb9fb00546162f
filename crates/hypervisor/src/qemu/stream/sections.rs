//! The names of the device sections in a saved state.
//!
//! Sections have no length, so their bounds are found by their shape: a footer with the section's own id, and behind it
//! the next section's head or the end. Guest data can imitate that, so the list is for comparing a state with
//! what a machine saves right after loading it, where guest data is the same in both. It is not for taking a state apart.

use serde::Serialize;

use super::{StreamError, device_sections, mark};

/// The head of one device section.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Section {
    /// The device's name, such as `0000:00:02.0/virtio-net`.
    pub name: String,
    /// Its instance.
    pub instance: u32,
    /// The version of its layout.
    pub version: u32,
}

impl std::fmt::Display for Section {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} v{}", self.name, self.instance, self.version)
    }
}

/// Lists the sections of a state that `xen-save-devices-state` wrote, in their order.
///
/// # Errors
/// [`StreamError::DeviceState`] when the state is not whole.
pub fn list_sections(saved: &[u8]) -> Result<Vec<Section>, StreamError> {
    let bytes = device_sections(saved)?;
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        let Some((id, section, head_bytes)) = head(&bytes[at..]) else {
            return Err(StreamError::DeviceState("a device section has no head"));
        };
        found.push(section);
        let footer = [[mark::FOOTER].as_slice(), &id.to_be_bytes()].concat();
        at += head_bytes;
        loop {
            let Some(skip) = bytes[at..].windows(footer.len()).position(|w| w == footer) else {
                return Err(StreamError::DeviceState("a device section has no footer"));
            };
            at += skip + footer.len();
            if at + 1 == bytes.len() {
                return Ok(found);
            }
            if head(&bytes[at..]).is_some() {
                break;
            }
        }
    }
}

/// A section's head at the front of `bytes`: its id, what it says, its length.
fn head(bytes: &[u8]) -> Option<(u32, Section, usize)> {
    let rest = bytes.strip_prefix(&[mark::FULL])?;
    let (id, rest) = rest.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*length))?;
    let (instance, rest) = rest.split_first_chunk::<4>()?;
    let (version, _) = rest.split_first_chunk::<4>()?;
    let plain = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
    let name = std::str::from_utf8(name).ok().filter(|_| plain)?;
    let section = Section {
        name: name.to_owned(),
        instance: u32::from_be_bytes(*instance),
        version: u32::from_be_bytes(*version),
    };
    Some((
        u32::from_be_bytes(*id),
        section,
        1 + 4 + 1 + usize::from(*length) + 4 + 4,
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::qemu::stream::MAGIC;

    fn section(id: u32, name: &str, data: &[u8]) -> Vec<u8> {
        let length = u8::try_from(name.len()).unwrap();
        let mut bytes = [&[mark::FULL], &id.to_be_bytes()[..], &[length], name.as_bytes()].concat();
        bytes.extend([[0, 0, 0, 1], [0, 0, 0, 2]].concat());
        bytes.extend(data);
        bytes.push(mark::FOOTER);
        bytes.extend(id.to_be_bytes());
        bytes
    }

    fn state(sections: &[Vec<u8>]) -> Vec<u8> {
        [&MAGIC[..], &sections.concat(), &[mark::END]].concat()
    }

    #[test]
    fn sections_are_listed_even_if_their_data_looks_like_a_footer() {
        let saved = state(&[section(3, "timer", b"\x7e\0\0\0\x03!"), section(9, "cpu", b"")]);
        let names: Vec<String> = list_sections(&saved)
            .unwrap()
            .iter()
            .map(Section::to_string)
            .collect();
        assert_eq!(names, ["timer 1 v2", "cpu 1 v2"]);
    }

    #[test]
    fn a_state_without_a_head_or_footer_is_refused() {
        let saved = state(&[section(3, "timer", b"x")]);
        let mut bad = saved.clone();
        bad[13] = 0xff;
        assert!(list_sections(&bad).is_err());
        let other_footer = saved.len() - 2;
        let mut bad = saved;
        bad[other_footer] = 4;
        assert!(list_sections(&bad).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_hang(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = list_sections(&state(&[section(1, "a", &bytes), bytes]));
        }
    }
}
