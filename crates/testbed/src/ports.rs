//! The machine's ports: console, end, reset. And what a vCPU's exit means.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuExit;
use romulus_guest_core::abi::{self, End};
use romulus_vmm_attach::kvm::Next;
use vm_memory::GuestMemory;

use crate::host::Serial;
use crate::virtio::bus::Bus;

/// Line status of the console: ready for the next byte, nothing to read.
const SERIAL_READY: u8 = 0x60;
/// Port of the line status.
const PORT_SERIAL_STATUS: u16 = abi::PORT_SERIAL + 5;

/// What the guest wants of the whole machine, or what has become of a vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The guest has ended.
    End(End),
    /// The guest wants to begin anew.
    Reset,
    /// A vCPU can't go on: its number and why.
    Stuck(usize, String),
}

/// What all vCPUs of a machine do when they leave the guest.
pub struct Exits<M> {
    /// The machine's devices.
    pub bus: Arc<Bus<M>>,
    /// The guest's console.
    pub serial: Arc<Mutex<Serial>>,
    /// Where to say what concerns the whole machine. Requests beyond its room are dropped: the first one decides.
    pub requests: SyncSender<Request>,
}

impl<M> Clone for Exits<M> {
    fn clone(&self) -> Self {
        Exits {
            bus: self.bus.clone(),
            serial: self.serial.clone(),
            requests: self.requests.clone(),
        }
    }
}

impl<M: GuestMemory + Send> Exits<M> {
    /// Does what an exit of vCPU `number` asks for.
    #[must_use]
    pub fn handle(&self, number: usize, exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Next {
        let exit = match exit {
            Ok(exit) => exit,
            Err(error) => return self.stuck(number, format!("KVM_RUN failed: {error}")),
        };
        match exit {
            VcpuExit::MmioRead(address, data) => self.bus.mmio_read(address, data),
            VcpuExit::MmioWrite(address, data) => self.bus.mmio_write(address, data),
            VcpuExit::IoOut(port, data) => self.write_port(port, data),
            VcpuExit::IoIn(port, data) => read_port(port, data),
            VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Shutdown => return self.stuck(number, "a triple fault".to_owned()),
            VcpuExit::InternalError => {
                return self.stuck(
                    number,
                    "KVM could not emulate an instruction (internal error)".to_owned(),
                );
            }
            VcpuExit::FailEntry(reason, _) => {
                return self.stuck(
                    number,
                    format!("KVM could not enter the guest (reason {reason:#x})"),
                );
            }
            other => return self.stuck(number, format!("an exit that nobody asked for: {other:?}")),
        }
        Next::Run
    }

    fn stuck(&self, number: usize, why: String) -> Next {
        let _ = self.requests.try_send(Request::Stuck(number, why));
        Next::End
    }

    fn write_port(&self, port: u16, data: &[u8]) {
        match port {
            abi::PORT_SERIAL => self
                .serial
                .lock()
                .expect("writing to a console does not panic")
                .put(data),
            abi::PORT_END => {
                let mut code = [0; 4];
                code.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
                let code = u32::from_le_bytes(code);
                // A number that means nothing is a guest that has lost its way.
                let end = End::from_code(code).unwrap_or(End::Fault);
                let _ = self.requests.try_send(Request::End(end));
            }
            abi::PORT_RESET if data == [abi::RESET_VALUE] => {
                let _ = self.requests.try_send(Request::Reset);
            }
            _ => {}
        }
    }
}

fn read_port(port: u16, data: &mut [u8]) {
    data.fill(if port == PORT_SERIAL_STATUS {
        SERIAL_READY
    } else {
        0xff
    });
}
