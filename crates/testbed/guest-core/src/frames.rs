//! Datagrams that carry a sequence number must be seen once: one that is seen twice was delivered twice by a device.

/// First bytes of a datagram that is counted: then come the sender's number (u32) and the sequence number (u64), both
/// little-endian. The guest sends the datagram back as it is.
pub const MAGIC: [u8; 4] = *b"RSEQ";
/// Senders that are told apart.
pub const SENDERS_MAX: usize = 16;
/// How far back a sequence number may lie behind the newest.
const WINDOW: u64 = 1024;

/// What became of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It is not of the counted kind, or comes from a sender too many.
    NotCounted,
    /// Seen for the first time.
    First,
    /// Older than what is remembered.
    Old,
    /// Seen before.
    Again {
        /// Number of the sender.
        sender: u32,
        /// The sequence number.
        sequence: u64,
    },
}

#[derive(Debug, Clone, Copy)]
struct Window {
    sender: u32,
    newest: u64,
    seen: [u64; (WINDOW / 64) as usize],
}

/// What was seen lately, of each sender.
#[derive(Debug, Default)]
pub struct Frames {
    windows: [Option<Window>; SENDERS_MAX],
    /// Datagrams that were seen for the first time.
    pub first: u64,
    /// Datagrams that were seen again.
    pub again: u64,
}

impl Frames {
    /// Notes a datagram.
    pub fn see(&mut self, datagram: &[u8]) -> Seen {
        let Some((sender, sequence)) = parse(datagram) else {
            return Seen::NotCounted;
        };
        let Some(window) = self.window(sender, sequence) else {
            return Seen::NotCounted;
        };
        let seen = window.see(sequence);
        match seen {
            Seen::First => self.first += 1,
            Seen::Again { .. } => self.again += 1,
            Seen::Old | Seen::NotCounted => {}
        }
        seen
    }

    fn window(&mut self, sender: u32, sequence: u64) -> Option<&mut Window> {
        let known = |slot: &Option<Window>| slot.as_ref().is_some_and(|window| window.sender == sender);
        let at = self
            .windows
            .iter()
            .position(known)
            .or_else(|| self.windows.iter().position(Option::is_none))?;
        let empty = Window {
            sender,
            newest: sequence,
            seen: [0; (WINDOW / 64) as usize],
        };
        Some(self.windows[at].get_or_insert(empty))
    }
}

impl Window {
    fn see(&mut self, sequence: u64) -> Seen {
        if sequence > self.newest {
            let skipped = (sequence - self.newest).min(WINDOW);
            (1..=skipped).for_each(|back| self.set(sequence - skipped + back, false));
            self.newest = sequence;
        } else if self.newest - sequence >= WINDOW {
            return Seen::Old;
        }
        if self.get(sequence) {
            return Seen::Again {
                sender: self.sender,
                sequence,
            };
        }
        self.set(sequence, true);
        Seen::First
    }

    fn get(&self, sequence: u64) -> bool {
        let at = sequence % WINDOW;
        self.seen[(at / 64) as usize] >> (at % 64) & 1 == 1
    }

    fn set(&mut self, sequence: u64, to: bool) {
        let at = sequence % WINDOW;
        let word = &mut self.seen[(at / 64) as usize];
        *word = *word & !(1 << (at % 64)) | u64::from(to) << (at % 64);
    }
}

fn parse(datagram: &[u8]) -> Option<(u32, u64)> {
    let rest = datagram.strip_prefix(&MAGIC)?;
    let (sender, rest) = rest.split_first_chunk()?;
    let (sequence, _) = rest.split_first_chunk()?;
    Some((u32::from_le_bytes(*sender), u64::from_le_bytes(*sequence)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn datagram(sender: u32, sequence: u64) -> Vec<u8> {
        [
            MAGIC.as_slice(),
            &sender.to_le_bytes(),
            &sequence.to_le_bytes(),
            b"and more",
        ]
        .concat()
    }

    #[test]
    fn senders_are_told_apart_and_one_too_many_is_not_counted() {
        let mut frames = Frames::default();
        assert!((0..16).all(|sender| frames.see(&datagram(sender, 1)) == Seen::First));
        assert_eq!(frames.see(&datagram(16, 1)), Seen::NotCounted);
        assert_eq!(
            frames.see(&datagram(3, 1)),
            Seen::Again {
                sender: 3,
                sequence: 1
            }
        );
    }

    #[test]
    fn other_datagrams_are_left_alone() {
        let mut frames = Frames::default();
        assert_eq!(frames.see(b"RSEQ12"), Seen::NotCounted);
        assert_eq!(frames.see(b"hello, is there anybody"), Seen::NotCounted);
    }

    proptest! {
        #[test]
        fn a_repetition_within_the_window_is_always_found(
            steps in proptest::collection::vec((0..2_000_u64, 0..3_u64), 1..300), start: u32,
        ) {
            let mut frames = Frames::default();
            let (mut seen, mut newest) = (HashSet::new(), None);
            for (step, far) in steps {
                let sequence = u64::from(start) + step + far * 1_000;
                let old = newest.is_some_and(|newest| sequence + WINDOW <= newest);
                let want = match (old, seen.insert(sequence)) {
                    (true, _) => Seen::Old,
                    (false, true) => Seen::First,
                    (false, false) => Seen::Again { sender: 1, sequence },
                };
                prop_assert_eq!(frames.see(&datagram(1, sequence)), want);
                newest = newest.max(Some(sequence));
            }
        }

        #[test]
        fn no_datagram_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            Frames::default().see(&bytes);
            Frames::default().see(&[MAGIC.as_slice(), &bytes].concat());
        }
    }
}
