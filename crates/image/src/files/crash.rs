//! Files that die at a chosen step, for tests and the simulator.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{FileName, Files};

#[derive(Debug, Default)]
struct State {
    steps: u64,
    blow_at: Option<u64>,
    cut_permille: u16,
    blown: bool,
}

/// Decides when a [`Crashing`] dies. Clones share one count, so a test keeps one of them.
///
/// A step is one changing call ([`create`](Files::create), [`write_at`](Files::write_at),
/// [`punch`](Files::punch), [`cut`](Files::cut), [`sync`](Files::sync), [`remove_all`](Files::remove_all)).
#[derive(Clone, Debug, Default)]
pub struct Fuse(Arc<Mutex<State>>);

impl Fuse {
    /// A fuse that only counts.
    pub fn never() -> Self {
        Self::default()
    }

    /// A fuse that blows at step `step` (counted from 0), when `cut_permille`/1000 of its bytes are written.
    /// A step without bytes happens when this is 500 or more.
    pub fn at(step: u64, cut_permille: u16) -> Self {
        let fuse = Self::default();
        fuse.set(step, cut_permille);
        fuse
    }

    /// Blows at `steps` further steps from now.
    pub fn set(&self, steps: u64, cut_permille: u16) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.blow_at = Some(state.steps.saturating_add(steps));
        state.cut_permille = cut_permille.min(1000);
    }

    /// Steps begun so far.
    pub fn steps(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).steps
    }

    /// Whether the crash has happened.
    pub fn is_blown(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).blown
    }

    /// `Ok(None)`: go on. `Ok(Some(permille))`: do this much of the step, then fail.
    fn step(&self) -> io::Result<Option<u16>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.blown {
            return Err(crashed());
        }
        let step = state.steps;
        state.steps += 1;
        if state.blow_at.is_some_and(|at| step >= at) {
            state.blown = true;
            return Ok(Some(state.cut_permille));
        }
        Ok(None)
    }

    fn check(&self) -> io::Result<()> {
        if self.is_blown() { Err(crashed()) } else { Ok(()) }
    }
}

fn crashed() -> io::Error {
    io::Error::other("the process has crashed (injected)")
}

/// [`Files`] that behave like `inner` until the [`Fuse`] blows; from then on every call fails.
#[derive(Debug)]
pub struct Crashing<F> {
    inner: F,
    fuse: Fuse,
}

impl<F: Files> Crashing<F> {
    /// Wraps `inner`.
    pub fn new(inner: F, fuse: Fuse) -> Self {
        Self { inner, fuse }
    }

    fn whole_step(&mut self, act: impl FnOnce(&mut F) -> io::Result<()>) -> io::Result<()> {
        match self.fuse.step()? {
            None => act(&mut self.inner),
            Some(permille) => {
                if permille >= 500 {
                    act(&mut self.inner)?;
                }
                Err(crashed())
            }
        }
    }
}

impl<F: Files> Files for Crashing<F> {
    fn open(&mut self, name: FileName) -> io::Result<Option<u64>> {
        self.fuse.check()?;
        self.inner.open(name)
    }

    fn create(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.whole_step(|files| files.create(name, bytes))
    }

    fn read_at(&self, name: FileName, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.fuse.check()?;
        self.inner.read_at(name, offset, into)
    }

    fn write_at(&mut self, name: FileName, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self.fuse.step()? {
            None => self.inner.write_at(name, offset, bytes),
            Some(permille) => {
                let part = bytes.len() * usize::from(permille) / 1000;
                self.inner.write_at(name, offset, &bytes[..part])?;
                Err(crashed())
            }
        }
    }

    fn punch(&mut self, name: FileName, range: Range<u64>) -> io::Result<()> {
        self.whole_step(|files| files.punch(name, range))
    }

    fn cut(&mut self, name: FileName, bytes: u64) -> io::Result<()> {
        self.whole_step(|files| files.cut(name, bytes))
    }

    fn sync(&mut self, name: FileName) -> io::Result<()> {
        self.whole_step(|files| files.sync(name))
    }

    fn next_data(&self, name: FileName, from: u64) -> io::Result<Option<Range<u64>>> {
        self.fuse.check()?;
        self.inner.next_data(name, from)
    }

    fn touched_bytes(&self, name: FileName) -> io::Result<u64> {
        self.fuse.check()?;
        self.inner.touched_bytes(name)
    }

    fn remove_all(&mut self) -> io::Result<()> {
        self.whole_step(Files::remove_all)
    }
}
