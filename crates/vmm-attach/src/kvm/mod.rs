//! What a VMM built on kvm-ioctls and vm-memory needs to be paused, captured and restored.
