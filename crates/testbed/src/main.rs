//! A small VMM over KVM.
fn main() {}
