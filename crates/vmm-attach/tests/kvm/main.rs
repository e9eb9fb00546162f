//! Real machines over KVM, with a guest of a few instructions in ring 3. Needs /dev/kvm, and fails without it.

mod embed;
mod guest;
mod state;
mod stopping;
mod tracking;
