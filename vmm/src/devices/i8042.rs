// SPDX-License-Identifier: Apache-2.0

//! The keyboard controller's reset line: what `reboot=k` pulls.
//!
//! Ports 0x60 to 0x64. Everything else of it reads as zero ("ready, nothing there").

use caisson_protocol::control::ExitCause;

use crate::bus::BusDevice;
use crate::ending::Ending;

/// Number of ports.
pub const PORTS: u64 = 5;
/// The command port.
const COMMAND: u64 = 4;
/// Pulse the reset line.
const RESET: u8 = 0xfe;

/// See the module.
#[derive(Debug)]
pub struct I8042 {
    ending: Ending,
}

impl I8042 {
    /// A controller whose reset ends the machine.
    pub fn new(ending: Ending) -> Self {
        Self { ending }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [RESET] {
            self.ending.report(ExitCause::GuestReset {});
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Gate;
    use std::sync::Arc;

    #[test]
    fn only_the_reset_command_ends_the_machine() {
        let ending = Ending::new(Arc::new(Gate::new())).unwrap();
        let device = I8042::new(ending.clone());
        device.write(COMMAND, &[0xad]);
        device.write(0, &[RESET]);
        device.write(COMMAND, &[RESET, 0]);
        assert_eq!(ending.cause(), None);
        device.write(COMMAND, &[RESET]);
        assert_eq!(ending.cause(), Some(ExitCause::GuestReset {}));
    }
}
