//! The packet gate as the primary's host has it.

use std::collections::VecDeque;

use romulus_types::Epoch;

use crate::guest::Output;

/// Frames of the guest on their way out.
#[derive(Debug)]
pub(crate) enum Gate {
    /// Not there: frames leave as they come.
    Open,
    /// Frames are held, with the epoch that they belong to.
    Closed {
        epoch: Epoch,
        held: VecDeque<(Epoch, Output)>,
    },
    /// The replicator died with the relay: frames are dropped until somebody removes what is left of it.
    Broken,
}

impl Gate {
    /// A frame comes. Returns it when it leaves at once.
    pub(crate) fn take(&mut self, output: Output) -> Option<Output> {
        match self {
            Self::Open => Some(output),
            Self::Closed { epoch, held } => {
                held.push_back((*epoch, output));
                None
            }
            Self::Broken => None,
        }
    }

    /// The barrier of checkpoint `epoch`; closes an open gate if told to.
    pub(crate) fn barrier(&mut self, epoch: Epoch, close: bool) {
        match self {
            Self::Closed { epoch: current, .. } => *current = epoch.next(),
            Self::Open if close => {
                *self = Self::Closed {
                    epoch: epoch.next(),
                    held: VecDeque::new(),
                }
            }
            Self::Open | Self::Broken => {}
        }
    }

    /// Frames of epochs up to this one leave.
    pub(crate) fn release(&mut self, epoch: Epoch) -> Vec<Output> {
        let Self::Closed { held, .. } = self else {
            return Vec::new();
        };
        let mut left = Vec::new();
        while let Some((_, output)) = held.pop_front_if(|(of, _)| *of <= epoch) {
            left.push(output);
        }
        left
    }

    /// Everything held leaves, in order, and the gate is gone.
    pub(crate) fn open(&mut self) -> Vec<Output> {
        match std::mem::replace(self, Self::Open) {
            Self::Closed { held, .. } => held.into_iter().map(|(_, output)| output).collect(),
            Self::Open | Self::Broken => Vec::new(),
        }
    }

    /// The replicator died.
    pub(crate) fn break_off(&mut self) {
        if !matches!(self, Self::Open) {
            *self = Self::Broken;
        }
    }
}
