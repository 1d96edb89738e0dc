// SPDX-License-Identifier: Apache-2.0

//! The early console: a 16550 UART at COM1, output only, into the console ring.
//!
//! No interrupt line: the kernel's early console polls, and with `8250.nr_uarts=0` no driver comes later.

#![cfg_attr(
    not(test),
    warn(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::indexing_slicing
    )
)]

use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::bus::BusDevice;
use crate::devices::console_ring::ConsoleRing;
use crate::devices::virtio::device::SnapshotError;

/// Number of ports.
pub const PORTS: u64 = 8;
/// Most bytes in a saved receive buffer (vm-superio's own bound).
const MAX_INPUT: usize = 64;

/// An interrupt line that leads nowhere.
#[derive(Debug, Clone, Copy)]
struct NoLine;

impl Trigger for NoLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

type Uart = Serial<NoLine, NoEvents, ConsoleRing>;

/// See the module.
#[derive(Debug)]
pub struct EarlyConsole {
    uart: Mutex<Uart>,
}

/// Its registers, for saving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the registers' own names, as in vm_superio::SerialState"
)]
pub struct EarlyConsoleState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub input: Vec<u8>,
}

impl EarlyConsole {
    /// A UART after reset that writes to `ring`.
    pub fn new(ring: ConsoleRing) -> Self {
        Self {
            uart: Mutex::new(Serial::new(NoLine, ring)),
        }
    }

    /// A UART in a saved state.
    ///
    /// # Errors
    /// When it is not one of a UART.
    pub fn restore(ring: ConsoleRing, state: &EarlyConsoleState) -> Result<Self, SnapshotError> {
        if state.input.len() > MAX_INPUT {
            return Err(SnapshotError::BadState(format!(
                "{} bytes in the UART's buffer of {MAX_INPUT}",
                state.input.len()
            )));
        }
        let state = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let uart = Serial::from_state(&state, NoLine, NoEvents, ring)
            .map_err(|error| SnapshotError::BadState(format!("UART: {error}")))?;
        Ok(Self {
            uart: Mutex::new(uart),
        })
    }

    /// The registers.
    pub fn save(&self) -> EarlyConsoleState {
        let state = self.lock().state();
        EarlyConsoleState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for EarlyConsole {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.lock().write(offset, *byte)
        {
            log::debug!("early console: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_in_the_ring() {
        let ring = ConsoleRing::new(100);
        let console = EarlyConsole::new(ring.clone());
        for byte in b"panic" {
            let mut status = [0];
            console.read(5, &mut status);
            assert_eq!(status[0] & 0x60, 0x60, "ready to send");
            console.write(0, &[*byte]);
        }
        console.write(0, b"wide accesses are nobody's");
        assert_eq!(ring.contents().0, b"panic");
    }

    #[test]
    fn its_state_comes_back() {
        let ring = ConsoleRing::new(100);
        let console = EarlyConsole::new(ring.clone());
        console.write(3, &[0x83]);
        console.write(0, &[0x01]);
        console.write(7, &[0x42]);
        let json = serde_json::to_string(&console.save()).unwrap();
        let mut state: EarlyConsoleState = serde_json::from_str(&json).unwrap();
        let again = EarlyConsole::restore(ring.clone(), &state).unwrap();
        assert_eq!(again.save(), console.save());
        state.input = vec![0; MAX_INPUT + 1];
        assert!(EarlyConsole::restore(ring, &state).is_err());
    }
}
