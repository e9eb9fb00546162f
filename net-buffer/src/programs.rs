//! The gate's eBPF programs.
//!
//! ```text
//!   guest writes          guest's tap                       relay tap
//!   ───────────►  ingress: at_guest_tap ── no mark ──► egress: at_relay_egress ──► our read()
//!                     │                                (only frames with the mark)
//!                     │ mark: clear it, go on          ingress: at_relay_ingress ◄── our write()
//!                     ▼                                    │ set the mark
//!                  bridge   ◄── guest tap's ingress ◄──────┘
//! ```
//!
//! A frame that the host's own stack sends through the relay (IPv6 router solicitations, DHCP of a network manager) has
//! no mark, and is dropped there: it must not go out in the guest's name.

use romulus_host_sys::bpf::{HELPER_REDIRECT, Insn};

/// The skb mark inside the gate. It is cleared before the frame goes on, so that firewall rules never see it.
const MARK: i32 = 0x524d_4755;
/// Offset of `mark` in `struct __sk_buff`.
const MARK_OFFSET: i16 = 8;
/// `TC_ACT_UNSPEC` in direct-action mode: go on with the next filter.
const NEXT_FILTER: i32 = -1;
/// What a program of a filter with actions says of a frame that they are for.
const TAKE: i32 = -1;
const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;
/// `BPF_F_INGRESS`: let the frame arrive at the interface rather than leave by it.
const TO_INGRESS: i32 = 1;
const TO_EGRESS: i32 = 0;

/// Interface indexes are positive `int`s in the kernel.
fn index(interface: u32) -> i32 {
    i32::try_from(interface).expect("interface indexes fit in an int")
}

/// Sends unmarked frames to the relay; marked ones come back from it, and pass.
pub(crate) fn at_guest_tap(relay: u32) -> Vec<Insn> {
    vec![
        Insn::load_u32(2, 1, MARK_OFFSET),
        Insn::skip_if_equal(2, MARK, 6),
        Insn::set(2, MARK),
        Insn::store_u32(1, MARK_OFFSET, 2),
        Insn::set(1, index(relay)),
        Insn::set(2, TO_EGRESS),
        Insn::call(HELPER_REDIRECT),
        Insn::exit(),
        Insn::set(2, 0),
        Insn::store_u32(1, MARK_OFFSET, 2),
        Insn::set(0, NEXT_FILTER),
        Insn::exit(),
    ]
}

/// Marks what we write to the relay, and takes it: the filter's action lets it arrive at the guest's tap.
pub(crate) fn at_relay_ingress() -> Vec<Insn> {
    vec![
        Insn::set(2, MARK),
        Insn::store_u32(1, MARK_OFFSET, 2),
        Insn::set(0, TAKE),
        Insn::exit(),
    ]
}

/// Lets what we write to a tap arrive at the guest's tap like a frame of the guest: held, when there is a gate.
pub(crate) fn to_guest_ingress(guest: u32) -> Vec<Insn> {
    vec![
        Insn::set(1, index(guest)),
        Insn::set(2, TO_INGRESS),
        Insn::call(HELPER_REDIRECT),
        Insn::exit(),
    ]
}

/// Drops what did not come from the guest's tap.
pub(crate) fn at_relay_egress() -> Vec<Insn> {
    vec![
        Insn::load_u32(2, 1, MARK_OFFSET),
        Insn::skip_if_equal(2, MARK, 2),
        Insn::set(0, TC_ACT_SHOT),
        Insn::exit(),
        Insn::set(0, TC_ACT_OK),
        Insn::exit(),
    ]
}

/// Does nothing: the program of the filter that only says whose tap this is.
pub(crate) fn nothing() -> Vec<Insn> {
    vec![Insn::set(0, NEXT_FILTER), Insn::exit()]
}
