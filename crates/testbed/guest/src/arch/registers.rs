//! Registers that are set once and must stay: rounding modes and segment bases.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

/// Exceptions masked, round towards zero: nobody's default, and the program itself calculates with integers only.
const MXCSR: u32 = 0x7f80;
/// Exceptions masked, 53 bits, round down.
const X87_CONTROL: u16 = 0x067f;
/// The processor can set segment bases in ring 3.
const FSGSBASE: u32 = 1;

/// What was put into the registers.
#[derive(Debug, Clone, Copy)]
pub struct Marks {
    bases: Option<(u64, u64)>,
}

impl Marks {
    /// Marks this vCPU's registers; each vCPU's have other values.
    pub fn set(vcpu: u32) -> Self {
        // SAFETY: nothing in the program depends on these modes, as it calculates with integers only.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const MXCSR_VALUE, options(nostack, readonly));
            asm!("fldcw [{}]", in(reg) &raw const X87_VALUE, options(nostack, readonly));
        }
        let bases = (__cpuid_count(7, 0).ebx & FSGSBASE != 0).then(|| {
            let bases = (
                0x1234_5678_0000 + u64::from(vcpu),
                0x2345_6789_0000 + u64::from(vcpu),
            );
            // SAFETY: the processor has the instructions, and the program uses neither segment.
            unsafe {
                asm!("wrfsbase {}", "wrgsbase {}", in(reg) bases.0, in(reg) bases.1, options(nostack, nomem))
            };
            bases
        });
        Marks { bases }
    }

    /// Names a register that is no longer what it was set to, if there is one.
    pub fn wrong(&self) -> Option<&'static str> {
        let (mut mxcsr, mut x87) = (0_u32, 0_u16);
        // SAFETY: the instructions store into the variables given.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack));
            asm!("fnstcw [{}]", in(reg) &raw mut x87, options(nostack));
        }
        // The low six bits note exceptions that occurred.
        if mxcsr & !0x3f != MXCSR {
            return Some("mxcsr");
        }
        if x87 != X87_CONTROL {
            return Some("the x87 control word");
        }
        let (fs, gs) = self.bases?;
        let (fs_now, gs_now): (u64, u64);
        // SAFETY: the processor has the instructions, as bases were set.
        unsafe {
            asm!("rdfsbase {}", "rdgsbase {}", out(reg) fs_now, out(reg) gs_now, options(nostack, nomem))
        };
        match (fs_now == fs, gs_now == gs) {
            (false, _) => Some("the base of fs"),
            (_, false) => Some("the base of gs"),
            _ => None,
        }
    }

    /// Changes a register, for a test of the check that finds it.
    pub fn damage() {
        let other: u32 = 0x1f80;
        // SAFETY: as in `set`.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const other, options(nostack, readonly)) };
    }
}

static MXCSR_VALUE: u32 = MXCSR;
static X87_VALUE: u16 = X87_CONTROL;
